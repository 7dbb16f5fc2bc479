"""An order of the nodes of the graph that puts near nodes next to each other: SymmetricGraph(I, locality_rank(I)).

The product W L reads a row of L for each edge: where neighbours have near numbers, most of them are still in a cache.
"""
import numpy as np

from graph_utils import core
from graph_utils.product import _rows


def locality_rank(I):
    """I: (n, k) int32 neighbours, negative = none. Returns the place of each node, int32 (n,), a permutation.

    Clusters by label propagation, of growing size, each level's clusters made of those of the level below, laid out so
    that clusters with many edges between them are side by side. The same for any number of threads. Memory: about 25
    bytes per node, up to 100 where neighbours are at random; seconds for a million nodes, time is proportional to n k.
    """
    I = np.asarray(I)
    n, k = I.shape
    rows, stride = _rows(I, np.int32, "I")
    order = np.empty(n, np.int32)
    core.locality_order(n, k, stride, rows, order)
    rank = np.empty(n, np.int32)
    rank[order] = np.arange(n, dtype=np.int32)
    return rank
