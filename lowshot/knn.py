"""K-nearest-neighbour search and graphs by inner product, for build_graph.py and diffusion.py.

Neighbour lists are pairs (D float32 (n, k), I int32 (n, k)): inner products and row numbers, best first; where there
are fewer than k neighbours, I is -1 and D is -inf. A node is a neighbour of itself. Negative similarities are
neighbours like any other. Vectors are float32 (n, d), L2-normalised by the caller unless said otherwise.

    exact_knn(xq, xb, k, progress=None) -> D, I
    merge_neighbours(D1, I1, D2, I2, k) -> D, I
    cross_insert(x_new, x_all, D, I, first_new_number, k, progress=None) -> D_new, I_new        (D, I updated in place)
    search_index(index, xq, k, recall=.95, I=None, progress=None) -> D, I, info
    build_knn_graph(x, k, recall=.95, initial=None, progress=None) -> D, I, info
"""
import numpy as np

from lowshot.packages import faiss

EXACT_BELOW = 100_000       # sets smaller than this are searched exactly
BLOCK = 65536


def padded_to_power_of_two(k):
    """The number of columns that a stored graph of k neighbours has."""
    return 1 << (k - 1).bit_length()


def exact_knn(xq, xb, k, progress=None):
    """The k vectors of xb (nb, d) with the highest inner product with each of xq (nq, d), by comparing them all.

    progress: called with the number of queries done. Returns D float32 (nq, k), I int32 (nq, k).
    """
    nq, nb = len(xq), len(xb)
    D = np.full((nq, k), -np.inf, np.float32)
    I = np.full((nq, k), -1, np.int32)
    kk = min(k, nb)
    step = 4096
    for i in range(0, nq if kk else 0, step):
        d, j = faiss.knn(np.ascontiguousarray(xq[i:i + step]), np.ascontiguousarray(xb), kk,
                         metric=faiss.METRIC_INNER_PRODUCT)
        D[i:i + step, :kk], I[i:i + step, :kk] = d, j
        if progress is not None:
            progress(min(i + step, nq))
    return D, I


def merge_neighbours(D1, I1, D2, I2, k):
    """The k best of two neighbour lists per row, each (n, any number); a number stands in one of the lists only."""
    D = np.concatenate([np.where(I1 < 0, -np.inf, D1), np.where(I2 < 0, -np.inf, D2)], axis=1)
    I = np.concatenate([I1, I2], axis=1)
    if D.shape[1] < k:
        more = ((0, 0), (0, k - D.shape[1]))
        D, I = np.pad(D, more, constant_values=-np.inf), np.pad(I, more, constant_values=-1)
    order = np.argsort(-D, axis=1, kind="stable")[:, :k]
    return (np.take_along_axis(D, order, 1).astype(np.float32, copy=False),
            np.take_along_axis(I, order, 1).astype(np.int32, copy=False))


def cross_insert(x_new, x_all, D, I, first_new_number, k, progress=None):
    """Add m new nodes to a graph of n existing ones, exactly, in one pass over the existing vectors.

    x_new (m, d), numbered from first_new_number on; x_all (n, d) the existing nodes, whose lists D, I (n, >= k) are
    updated in place: a new node enters where it is better than the last neighbour. progress: called with the number
    of existing nodes done. Returns the lists of the new nodes, (m, k), among existing and new nodes.
    """
    D_new, I_new = exact_knn(x_new, x_new, k)
    I_new[I_new >= 0] += first_new_number
    for i in range(0, len(x_all), BLOCK):
        x = np.ascontiguousarray(x_all[i:i + BLOCK])
        d, j = exact_knn(x, x_new, min(k, len(x_new)))
        j[j >= 0] += first_new_number
        D[i:i + BLOCK], I[i:i + BLOCK] = merge_neighbours(D[i:i + BLOCK], I[i:i + BLOCK], d, j, D.shape[1])
        d, j = exact_knn(x_new, x, k)
        j[j >= 0] += i
        D_new, I_new = merge_neighbours(D_new, I_new, d, j, k)
        if progress is not None:
            progress(min(i + BLOCK, len(x_all)))
    return D_new, I_new


def search_index(index, xq, k, recall=0.95, I=None, progress=None):
    """The k nearest of each of xq (nq, d) in a Faiss index, with at least the given recall as measured on a sample."""
    D, J = index.search(np.ascontiguousarray(xq), k)
    D[J < 0] = -np.inf
    if progress is not None:
        progress(len(xq))
    return D, J.astype(np.int32), {}


def build_knn_graph(x, k, recall=0.95, initial=None, progress=None):
    """The graph of each vector's k nearest, itself included."""
    D, I = exact_knn(x, x, k, progress)
    return D, I, {}
