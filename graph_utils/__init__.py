"""Sparse-dense products of label diffusion, and k-nearest-neighbour graphs: the numpy face of the C++ library.

    from graph_utils import SymmetricGraph
    W = SymmetricGraph(I)                    # I (n, k) int32, neighbours of each node
    colsum = W.product(L, out, scale)        # out = diag(1 / row sums) W L diag(scale)
"""
import os

if "OMP_WAIT_POLICY" not in os.environ:
    # GCC's OpenMP reads it when it is loaded. By default its threads wait for each other in a loop of 300,000 turns, and keep
    # their cores from the one that they wait for where other processes want them: many times slower
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
try:
    from graph_utils import core
except ImportError as e:
    raise ImportError(f"graph_utils is not built for this Python ({e}): run bash compile.bash") from e

from graph_utils.product import (PANEL, WIDEST, BestClasses, SymmetricGraph, aligned_zeros,  # noqa: F401
                                 mkl_product, neighbour_sums, panel_widths)
from graph_utils.sgd import FusedSGD  # noqa: F401

has_mkl = core.has_mkl
get_num_threads = core.get_num_threads
set_num_threads = core.set_num_threads
