"""The product W L of label diffusion (paper, section 3.2), on panels of L of 16 to 64 columns."""
import contextlib
import mmap

import numpy as np

from graph_utils import core

WIDEST = 64     # columns of the widest panel: its sums fill eight AVX-512 registers
PANEL = 32      # columns of the quickest: twice as many rows fit in the caches, where there is little locality


def aligned_zeros(shape, dtype=np.float32):
    """Zeros, C-contiguous, aligned to 64 bytes; large arrays to huge pages, which they ask for, as random access to rows
    of L misses the TLB otherwise. Pages that are never touched take no memory."""
    dtype = np.dtype(dtype)
    nbytes = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    huge = 2 << 20
    if nbytes < 4 * huge:
        raw = np.zeros(nbytes + 64, np.uint8)
        start = -raw.ctypes.data % 64
    else:
        # private: huge pages of shared memory are another setting of the kernel, mostly off
        m = mmap.mmap(-1, nbytes + huge, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        with contextlib.suppress(AttributeError, OSError):      # systems without
            m.madvise(mmap.MADV_HUGEPAGE)
        raw = np.frombuffer(m, np.uint8)
        start = -raw.ctypes.data % huge
    return raw[start:start + nbytes].view(dtype).reshape(shape)


def _rows(a, dtype, name, writeable=False):
    """(flat view, row stride in items) of a matrix whose rows are contiguous but may be strided, as slices of columns
    are. The C++ side gets all from the first item to the last."""
    n, m = a.shape
    if a.dtype != dtype or a.size and (m > 1 and a.strides[1] != a.itemsize or a.strides[0] < 0 or a.strides[0] % a.itemsize):
        raise ValueError(f"{name} is {a.dtype} with strides {a.strides}, {np.dtype(dtype)} with contiguous rows expected")
    if not a.size:
        return np.empty(0, dtype), m
    stride = a.strides[0] // a.itemsize if n > 1 else m
    return np.lib.stride_tricks.as_strided(a, ((n - 1) * stride + m,), (a.itemsize,), writeable=writeable), stride


def _check(array, dtype, shape, name):
    """The array itself; ValueError if it is not C-contiguous of this dtype and shape (None: any size)."""
    if (array.dtype != dtype or array.ndim != len(shape) or not array.flags.c_contiguous
            or any(s is not None and s != t for s, t in zip(shape, array.shape))):
        want = "x".join("any" if s is None else str(s) for s in shape)
        raise ValueError(f"{name}: contiguous {np.dtype(dtype).name} {want} expected, found {array.dtype} "
                         f"{'x'.join(map(str, array.shape))}")
    return array


def _check_optional(array, dtype, shape, name):
    """The same, or None for an array that need not be given."""
    return None if array is None else _check(array, dtype, shape, name)


def _check_range(numbers, first, stop, name):
    if numbers.size and (numbers.min() < first or numbers.max() >= stop):
        raise ValueError(f"{name}: numbers from {first} to {stop - 1} expected, found {numbers.min()} to {numbers.max()}")


def _int32(array, name):
    """The array as contiguous int32; ValueError if its numbers are others then."""
    array = np.asarray(array)
    found = array.astype(np.int32, order="C", copy=False)
    if array.dtype != np.int32 and (found != array).any():
        raise ValueError(f"{name}: whole numbers of 32 bits expected, found {array.dtype}")
    return found


def check_permutation(rank, name="rank"):
    """ValueError where rank int (n,) does not hold the numbers 0 .. n - 1."""
    met = np.zeros(len(rank), bool)
    if len(rank) and rank.min() >= 0 and rank.max() < len(rank):
        met[rank] = True
    if not met.all():
        raise ValueError(f"{name} is not a permutation of 0 .. {len(rank) - 1}")


class SymmetricGraph:
    """W = W0 + W0^T of a k-nearest-neighbour graph, where W0 has a one at (i, I[i, j]): entries 1 and 2.

    I: (n, k) int32, negative numbers where a node has fewer neighbours; no neighbour twice in a row.
    rank: (n,) int32 permutation or None: node i of I is row and column rank[i] of W.
    Memory: 4 bytes per entry (at most 2 n k) and 12 bytes per node; making it takes 12 + k / 8 bytes per node more.
    There is no array of values.

    indptr int64 (n + 1,), indices int32 (nnz,), nsingle int32 (n,): the neighbours of row i are
    indices[indptr[i]:indptr[i + 1]], first the nsingle[i] with entries 1, then those with entries 2, each in order.
    Where indices is an array in a file, whose descriptor is its attribute `file`, they are read from it some rows at a time.
    """

    def __init__(self, I, rank=None):
        n, k = I.shape
        if n >= 2 ** 31:
            raise ValueError(f"{n} nodes: node numbers have 32 bits")
        rows, stride = _rows(I, np.int32, "I")
        if rank is not None:
            rank = _check(_int32(rank, "rank"), np.int32, (n,), "rank")
            check_permutation(rank)
        indptr, mutual = np.empty(n + 1, np.int64), np.empty((n, -(-k // 8)), np.uint8)
        nnz = core.symmetrise_count(n, k, stride, rows, rank, indptr, mutual)
        indices, nsingle = aligned_zeros(nnz, np.int32), np.empty(n, np.int32)
        core.symmetrise_fill(n, k, stride, rows, rank, indptr, mutual, indices, nsingle)
        self._take(indptr, indices, nsingle)

    def _take(self, indptr, indices, nsingle):
        self.n, self.indptr, self.indices, self.nsingle = len(nsingle), indptr, indices, nsingle
        file = getattr(indices, "file", None)
        if file is None:
            self._csr = indptr, indices, -1
        else:
            indices.flush()         # an error of the disk is one now, and would be wrong entries later
            self._csr = indptr, None, file

    @property
    def arrays(self):
        return self.indptr, self.indices, self.nsingle

    @classmethod
    def changed(cls, arrays, n, rows, columns, by, empty=aligned_zeros):
        """The graph of n nodes that a smaller one becomes by changes of its entries: quicker than to make it anew.

        arrays: indptr, indices, nsingle of the smaller one, whose nodes are the first ones; they may come from a file, and
        ValueError is raised where numbers are out of range or order. rows, columns int32, by int8: each changed entry of W once,
        and by how much; in order of rows, then of columns. empty: makes the array of entries, (shape, dtype) -> zeros, which may
        be in a file, as it is read in order. Memory: that of both graphs.
        """
        indptr, indices, nsingle = arrays
        if len(indptr) != len(nsingle) + 1:
            raise ValueError(f"a graph of {len(nsingle)} nodes has {len(indptr)} offsets")
        if not len(rows) == len(columns) == len(by):
            raise ValueError(f"{len(rows)} rows, {len(columns)} columns and {len(by)} changes of entries")
        changes = len(rows), rows, columns, by
        new_indptr, new_nsingle = np.empty(n + 1, np.int64), np.empty(n, np.int32)
        core.change_count(len(nsingle), indptr, len(indices), indices, nsingle, n, *changes, new_indptr, new_nsingle)
        new_indices = empty(int(new_indptr[-1]), np.int32)
        core.change_fill(len(nsingle), indptr, indices, nsingle, n, *changes, new_indptr, new_nsingle, new_indices)
        graph = cls.__new__(cls)
        graph._take(new_indptr, new_indices, new_nsingle)
        return graph

    @property
    def nnz(self):
        return int(self.indptr[-1])

    def values(self):
        """The array of values that the product does without, float32 (nnz,): multiplicity / row sum."""
        values = np.empty(self.nnz, np.float32)
        for i in range(0, self.n, 65536):
            indptr, single = self.indptr[i:i + 65537], self.nsingle[i:i + 65536]
            at, degree = slice(int(indptr[0]), int(indptr[-1])), np.diff(indptr)
            double = np.arange(at.start, at.stop) - np.repeat(indptr[:-1], degree) >= np.repeat(single, degree)
            values[at] = (1 + double) / np.repeat(np.maximum(2 * degree - single, 1), degree)
        return values

    def mass(self):
        """1^T diag(1 / row sums) W, float32 (n,): weights of `product` that make it foretell the next column sums."""
        out = np.empty(self.n, np.float32)
        core.mass(self.n, *self._csr, self.nsingle, out)
        return out

    def reach(self, rows, reached, most):
        """Neighbours of `rows` not yet marked in `reached` (uint8 (n,), updated), int32; None if more than `most`, of which
        some are marked then."""
        _check_range(rows, 0, self.n, "rows")
        _check(reached, np.uint8, (self.n,), "reached")
        found = np.empty(most, np.int32)
        count = core.reach(*self._csr, len(rows), rows, reached, most, found)
        return None if count < 0 else found[:count]

    def product(self, L, out, scale=None, rows=None, weights=None):
        """out = diag(1 / row sums) W L diag(scale); returns the column sums of out, float64 (ncol,).

        L, out: float32 (n, ncol), distinct, ncol 16, 32, 48 or 64, from aligned_zeros. scale: float32 (ncol,) or None.
        rows: int32 row numbers to compute, or None for all; the other rows of out are not touched and not summed.
        weights: float32 (n,) or None; if given, the sums are weighted by it.
        """
        for name, a in (("L", L), ("out", out)):
            if a.shape != (self.n, L.shape[1]) or a.dtype != np.float32:
                raise ValueError(f"{name} is {a.dtype} {a.shape}, float32 ({self.n}, {L.shape[1]}) expected")
        if np.may_share_memory(L, out):
            raise ValueError("out must not be L, nor have a part of it")
        _check_optional(scale, np.float32, (L.shape[1],), "scale")
        if rows is not None:
            rows = _int32(rows, "rows")
            _check_range(rows, 0, self.n, "rows")
        _check_optional(weights, np.float32, (self.n,), "weights")
        colsum = np.empty(L.shape[1], np.float64)
        core.product(self.n, *self._csr, self.nsingle, L.shape[1], L, scale,
                     0 if rows is None else len(rows), rows, weights, out, colsum)
        return colsum


def neighbour_sums(I, L, scale=None, scores=None):
    """scores[i] = (sum over j of L[I[i, j]]) * scale: each query's class scores (paper, section 3.2).

    I: int32 (nq, k), negative = none. L: float32 (n, ncol). Returns float32 (nq, ncol), `scores` if given: rows may be
    strided, so that it can be a slice of columns of a larger matrix.
    """
    I = _int32(I, "I")
    if scores is None:
        scores = np.empty((len(I), L.shape[1]), np.float32)
    if scores.shape != (len(I), L.shape[1]):
        raise ValueError(f"scores has shape {scores.shape}, ({len(I)}, {L.shape[1]}) expected")
    _check_optional(scale, np.float32, (L.shape[1],), "scale")
    flat, stride = _rows(scores, np.float32, "scores", writeable=True)
    core.neighbour_sums(len(I), I.shape[1], I, len(L), L.shape[1], L, scale, stride, flat)
    return scores


class BestClasses:
    """The `nbest` highest-scored classes of each query, gathered from slices of the classes.

    labels: int (nq,), each query's own class. Of equal scores the lower class number ranks first; zeros never count.
    """

    def __init__(self, labels, nbest=5):
        self.labels = _int32(labels, "labels")
        nq = len(self.labels)
        self.best = np.zeros((nq, nbest), np.float32)
        self.classes = np.full((nq, nbest), -1, np.int32)
        self.nnz = np.zeros(nq, np.int32)

    def update(self, scores, classes):
        """scores: float32 (nq, m), rows may be strided; classes: the m class numbers, not seen before."""
        nq, m = scores.shape
        if nq != len(self.labels) or len(classes) != m:
            raise ValueError(f"scores {scores.shape} do not fit {len(self.labels)} queries and {len(classes)} classes")
        flat, stride = _rows(scores, np.float32, "scores")
        core.update_best(nq, m, stride, flat, _int32(classes, "classes"), self.best.shape[1], self.best,
                         self.classes, self.nnz)

    def right(self):
        """Whether each query's own class is among its best, bool (nq,)."""
        return (self.classes == self.labels[:, None]).any(axis=1)


def mkl_product(indptr, indices, values, L, out=None, check=True):
    """out = A L by MKL. A: CSR with indptr int64 (n + 1), indices int32, values float32; L float32 (m, ncol). check: whether to
    look through all of A for indices that are out of range."""
    shape = len(indptr) - 1, L.shape[1]
    if out is None:
        out = np.empty(shape, np.float32)
    for name, a, its_shape in (("values", values, indices.shape), ("out", out, shape)):
        _check(a, np.float32, its_shape, name)
    if check:
        _check_range(indptr, 0, len(indices) + 1, "indptr")
        _check_range(np.diff(indptr), 0, len(indices) + 1, "differences of indptr")
        _check_range(indices, 0, len(L), "indices")
    core.mkl_product(len(indptr) - 1, len(L), indptr, indices, values, L.shape[1], L, out)
    return out
