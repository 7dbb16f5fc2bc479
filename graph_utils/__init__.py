"""Sparse-dense products of label diffusion, and k-nearest-neighbour graphs: the numpy face of the C++ library.

    from graph_utils import SymmetricGraph
    W = SymmetricGraph(I)                    # I (n, k) int32, neighbours of each node
    colsum = W.product(L, out, scale)        # out = diag(1 / row sums) W L diag(scale)
"""
try:
    from graph_utils import core
except ImportError as e:
    import os
    why = f" ({e})" if os.path.exists(os.path.join(os.path.dirname(__file__), "core.py")) else ""
    raise ImportError(f"graph_utils is not built for this Python{why}: run bash compile.bash") from e

from graph_utils.ordering import locality_rank  # noqa: F401
from graph_utils.product import (PANEL, WIDEST, BestClasses, SymmetricGraph, aligned_zeros,  # noqa: F401
                                 check_permutation, mkl_product, neighbour_sums)
from graph_utils.sgd import FusedSGD  # noqa: F401

has_mkl = core.has_mkl
get_num_threads = core.get_num_threads
set_num_threads = core.set_num_threads
