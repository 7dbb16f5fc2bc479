"""Vectors sorted by cell, as an inverted file (IVF) holds them, for dense products of whole cells and for walks on
graphs: neighbours have near row numbers, so they are found in cache."""
import mmap

import numpy as np

from graph_utils import aligned_zeros, neighbours as nb
from lowshot import machine
from lowshot.features import MatrixFile, normalise_rows, row_norms, spread_rows
from lowshot.packages import faiss
from lowshot.script import silent

BLOCK = 1 << 14                     # vectors in hand at a time: memory that is freed and taken again stays mapped, and in cache
TRAINING_PER_CELL = 48              # vectors per centroid in k-means: twice as many change recall by less than .005
FEW_CELLS = 1024                    # of no more than these the nearest is found by comparing with all
ROUNDS = 6                          # of k-means
STAY_NEAR = 16                      # from one round of k-means to the next, vectors stay within the nearest 1/16 of the cells
CHAINED = 64                        # centroids near each that the next in a chain is mostly among
KEPT = 1 << 11                      # copies of a vector that others are compared with: more than anybody's candidates
CROWDED = 4 * KEPT                  # vectors of a cell from which on copies are looked for,
REPEATED = 20                       # if the same is as many times among a thousand of them
SAME_CELL = .997                    # share of a sample whose nearest centroid is found by way of few others


class Vectors:
    """Vectors where they are: one or two float32 arrays (., d) or files of float32 (MatrixFile) that follow each other.

    normalise: whether rows are divided by their L2 norm when they are used; otherwise the caller has done that. Files are read
    plainly, but for `arrays`, memory maps whose pages release() gives back. Raises ValueError where a row holds NaN or
    infinity.

    device: the GPU that compares them where that pays, a torch device; None: the CPU does.
    n, d; scale float32 (n,) factor of each row, or None; longest: the largest norm of a scaled row.
    scale, as an argument: that of the same vectors, if it is known. Otherwise these are read through for it when it is first
    needed; progress: what is told of that, as in exact_search.py.
    Memory: 4 bytes per vector.
    """

    def __init__(self, *parts, normalise=False, scale=None, progress=silent, device=None):
        self._scale, self._normalise, self.progress, self.device = scale, normalise, progress, device
        self.d = parts[0].shape[1]
        self.sources = [m if isinstance(m, MatrixFile) else np.ascontiguousarray(m, np.float32)
                        for m in parts if len(m)] or [np.empty((0, self.d), np.float32)]
        if len(self.sources) > 2:
            raise ValueError(f"{len(self.sources)} arrays of vectors, at most two are supported")
        self._arrays = None
        self.starts = np.cumsum([0] + [len(m) for m in self.sources])
        self.n = int(self.starts[-1])
        if self.n >= 2 ** 31:
            raise ValueError(f"{self.n} vectors: node numbers have 32 bits")
        if scale is not None and scale.shape != (self.n,):
            raise ValueError(f"{scale.shape} factors given for {self.n} vectors")
        self.longest = 1.0 if normalise or scale is not None else float(self._norms().max(initial=0))

    @staticmethod
    def _name(source):
        return getattr(source, "filename", "the features")

    @property
    def scale(self):
        if self._scale is None and self._normalise:
            self._scale = one_over(self._norms())
        return self._scale

    def _norms(self):
        norms = np.empty(self.n, np.float32)
        for source, start in zip(self.sources, self.starts):
            for i in range(0, len(source), BLOCK):
                rows = source[i:i + BLOCK]
                norms[start + i:start + i + len(rows)] = row_norms(rows, self._name(source), range(i, i + len(rows)))
                self.progress("vectors read", int(start) + i + len(rows), self.n)
        return norms

    def stretch(self, start, stop):
        """Rows start .. stop - 1, not scaled; an array or a view of one."""
        pieces = [m[max(start - first, 0):stop - first] for m, first in zip(self.sources, self.starts)
                  if start < first + len(m) and stop > first]
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces or [np.empty((0, self.d), np.float32)])

    def blocks(self):
        """Yield (first, last + 1) of stretches that cover all rows."""
        for i in range(0, self.n, BLOCK):
            yield i, min(i + BLOCK, self.n)

    @property
    def in_memory(self):
        return all(isinstance(m, np.ndarray) for m in self.sources)

    def fit(self, besides):
        """Whether all vectors and so many other bytes fit in the memory that is free."""
        return self.in_memory or machine.fits(4 * self.n * self.d + besides)

    @property
    def arrays(self):
        """The parts as arrays, files as memory maps."""
        if self._arrays is None:
            self._arrays = [m if isinstance(m, np.ndarray) else np.memmap(m.filename, m.dtype, "r", shape=m.shape)
                            for m in self.sources]
            for a in self._arrays:
                if isinstance(a, np.memmap) and a.nbytes > machine.available_memory():
                    # neighbours are all over the file: what is read around each would push out others
                    a._mmap.madvise(mmap.MADV_RANDOM)
        return [np.asarray(a) for a in self._arrays]

    def release(self):
        """Give back the pages of memory maps; they count as this process's memory as long as they are mapped."""
        for a in self._arrays or []:
            if isinstance(a, np.memmap):
                a._mmap.madvise(mmap.MADV_DONTNEED)

    def rows(self, which):
        """Copies of rows by number, not scaled, float32 (len(which), d)."""
        which = np.asarray(which, np.int64)
        out = np.empty((len(which), self.d), np.float32)
        for source, first in zip(self.sources, self.starts):
            if isinstance(source, MatrixFile):
                nb.read_rows(source.filename, which - first, len(source), out)
            else:
                mine = (which >= first) & (which < first + len(source))
                out[mine] = source[which[mine] - first]
        return out

    def factors(self, which):
        """Factors of rows, by number or as a slice: float32, or None."""
        return None if self.scale is None else self.scale[which]

    def scaled_rows(self, which):
        """Copies of rows by number, scaled, float32 (len(which), d)."""
        x = self.rows(which)
        if self._scale is None and self._normalise:         # a few rows do not take the norms of all
            which, norms = np.asarray(which, np.int64), np.empty(len(x), np.float32)
            for source, first in zip(self.sources, self.starts):
                mine = (which >= first) & (which < first + len(source))
                norms[mine] = row_norms(x[mine], self._name(source), which[mine] - first)
            x *= one_over(norms)[:, None]
        elif self.scale is not None:
            x *= self.scale[which, None]
        return x

    def converted(self, convert, start, stop, **out):
        """Rows start .. stop - 1 by convert(x, scale, **out): nb.to_bytes, nb.to_bfloat16 or Codes."""
        return convert(self.stretch(start, stop), self.factors(slice(start, stop)), **out)


def one_over(norms):
    """Factors that make rows of these norms as long as 1, in the place of the norms; of rows so small that their norm is 0 in
    float32, zeros."""
    norms[norms == 0] = np.inf
    return np.divide(1, norms, out=norms)


def as_vectors(x, device=None):
    return x if isinstance(x, Vectors) else Vectors(x, device=device)


def default_nlist(n):
    """Cells of an index of n vectors (paper, section 3.2: 4 sqrt(n))."""
    return max(1, min(int(4 * n ** 0.5), n))


def train_centroids(vectors, nlist, seed=0, progress=silent):
    """Spherical k-means on a sample. Returns centroids float32 (nlist, d), of norm 1 (0 where all vectors are zero), and the
    sample in bytes and its cells, int32."""
    rs = np.random.RandomState(seed)
    m = min(vectors.n, TRAINING_PER_CELL * nlist)
    sample = np.sort(rs.choice(vectors.n, m, replace=False)) if m < vectors.n else np.arange(m)
    x = vectors.scaled_rows(sample)
    X = nb.to_bytes(x)
    centroids = np.ascontiguousarray(x[rs.choice(m, nlist, replace=m < nlist)])
    cell = order = None
    for iteration in range(ROUNDS):
        C = nb.to_bytes(centroids)
        cell = nearest_cell(X, C) if cell is None or nlist <= FEW_CELLS else still_nearest(X, cell, C, order)
        order = np.argsort(cell, kind="stable").astype(np.int32)
        sizes = np.bincount(cell, minlength=nlist)
        sums = nb.group_sums(x, order, np.cumsum(sizes))
        empty = np.flatnonzero(sizes == 0)
        sums[empty] = x[rs.choice(m, len(empty))]
        centroids = normalise_rows(sums, "centroids")
        progress("rounds of k-means", iteration + 1, ROUNDS)
    return centroids, (X, cell)


def nearest_cells(X, C, m):
    """The m most similar centroids of each vector, in no order, int32 (len(X), m). X, C: vectors and centroids in one
    format."""
    return nb.numbers(nb.search_all(X, C, m)).astype(np.int32)


def nearest_cell(X, C):
    """The most similar centroid of each vector, int32 (len(X),)."""
    return nearest_cells(X, C, 1)[:, 0]


def nearest_of_listed(X, group, listed, C, order=None):
    """The most similar of the centroids listed for each vector's group, int32 (len(X),). group int32 (len(X),); listed as in
    nb.search_near. order: an order of the vectors by group, if it is known."""
    if order is None:
        order = np.argsort(group, kind="stable").astype(np.int32)
    return nb.numbers(nb.search_near(X, group[order], listed, C, 1, order)[:, 0]).astype(np.int32)


def still_nearest(X, cell, C, order=None):
    """The most similar centroid of each vector, of those near the one that was, `cell`."""
    return nearest_of_listed(X, cell, nearest_cells(C, C, len(C) // STAY_NEAR), C, order)


def ways_to_cells(centroids, X, cell, seed=0):
    """Few vectors, in bytes, and for each of them the centroids to look at where it is the most similar of the few, listed as
    in nb.search_near; None where that saves little.

    Listed are the nearest, so many that the most similar centroid of SAME_CELL of the vectors is among them; and those of any
    of the vectors, so that no cell is out of reach of its own. X, cell: of train_centroids().
    """
    nlist, C = len(centroids), nb.to_bytes(centroids)
    few, _ = train_centroids(Vectors(centroids), int(2 * nlist ** .5), seed)
    top = nb.to_bytes(few)
    cell, group = still_nearest(X, cell, C), nearest_cell(X, top)
    far = -few @ centroids.T
    rows = np.random.RandomState(seed).choice(len(X), min(len(X), 4000), replace=False)
    mine = far[group[rows], nearest_cell(X[rows], C)]
    far.sort(axis=1)
    before = np.sort([np.searchsorted(far[g], x) for g, x in zip(group[rows], mine)])
    near = nearest_cells(top, C, int(before[int(SAME_CELL * len(before))]) + 1)
    pairs = np.union1d((np.arange(len(top))[:, None] * nlist + near).ravel(), group.astype(np.int64) * nlist + cell)
    offsets = np.searchsorted(pairs, np.arange(len(top) + 1) * nlist)
    if len(top) + np.diff(offsets)[group].mean() > nlist / 2:
        return None
    return top, (offsets, (pairs % nlist).astype(np.int32))


def assign(vectors, centroids, ways=None, progress=silent, first=0):
    """The cell of each vector from number `first` on, int32 (n - first,), a block at a time.

    ways: of ways_to_cells(), or None. With them a few vectors get a cell that is not the most similar one.
    """
    C, cell = nb.to_bytes(centroids), np.empty(vectors.n - first, np.int32)
    for i in range(first, vectors.n, BLOCK):
        j = min(i + BLOCK, vectors.n)
        X = vectors.converted(nb.to_bytes, i, j)
        if ways is None:
            cell[i - first:j - first] = nearest_cell(X, C)
        else:
            top, listed = ways
            cell[i - first:j - first] = nearest_of_listed(X, nearest_cell(X, top), listed, C)
        progress("vectors assigned to cells", j, vectors.n)
    return cell


def chained(centroids):
    """An order of the centroids (nlist, d) in which each is followed by the most similar one that is left."""
    nlist = len(centroids)
    keys = nb.search_self(nb.to_float32(centroids), min(CHAINED, nlist))
    near = nb.numbers(np.sort(keys.view(np.uint64), axis=1)[:, ::-1].view(np.int64))
    left = np.ones(nlist, bool)
    left[0] = False
    chain = np.zeros(nlist, np.int64)
    for i in range(1, nlist):
        last = chain[i - 1]
        found = near[last][left[near[last]]]
        if not len(found):              # all that are near have their place
            rest = np.flatnonzero(left)
            found = rest[[np.argmax(centroids[rest] @ centroids[last])]]
        chain[i] = found[0]
        left[chain[i]] = False
    return chain


class Codes:
    """What stands for vectors when many are compared: all their dimensions, or the projection on some, in few bits.

    format: "bytes", "bfloat16" or "float32"; projection: float32 (m, d), or None.
    """

    def __init__(self, format="bytes", projection=None):
        self.format, self.transform = format, None
        if projection is not None:
            # Faiss, not numpy, whose threads wait for more of the same after each product, in the way of ours
            self.transform = faiss.LinearTransform(projection.shape[1], projection.shape[0], False)
            faiss.copy_array_to_vector(projection.ravel(), self.transform.A)
            self.transform.is_trained = True

    @property
    def plain(self):
        return self.format == "bytes" and self.transform is None

    def projected(self, x):
        """x float32 (n, d) in the dimensions that are compared."""
        return x if self.transform is None else self.transform.apply(x)

    def __call__(self, x, scale=None):
        """x, each row times scale (n,) if given, in this format (n, words): see graph_utils.neighbours."""
        return nb.FORMATS[self.format](self.projected(x), scale)

    def words(self, d):
        return self(np.empty((0, d), np.float32)).shape[1]


def main_directions(vectors, m):
    """Projection float32 (m, d) on the m directions with the most of the vectors' energy.

    Turned at random within these, so that elements are alike in size, which is what a common step of bytes suits.
    """
    rs = np.random.RandomState(0)
    sample = np.sort(rs.choice(vectors.n, min(vectors.n, max(4 * vectors.d, (1 << 22) // vectors.d)), replace=False))
    x = vectors.scaled_rows(sample).astype(np.float64)
    V = np.linalg.eigh(x.T @ x)[1][:, ::-1]         # by falling eigenvalue
    turn = np.linalg.qr(rs.randn(m, m))[0]
    return np.ascontiguousarray(turn @ V[:, :m].T, dtype=np.float32)


class Cells:
    """Vectors sorted by cell, cells chained by similarity, within a cell in the order of their numbers.

    order      int32 (n,): row p of X is number order[p]
    begin, end int64 (nlist,): rows of each cell
    stop       int64 (nlist,): rows that others are compared with end there. Copies of a vector beyond the first KEPT come after
               them, in the order of their numbers: of a million equal ones, as of unreadable images, each need not see all
    centroids  float32 (nlist, d), in the order of the chain
    and, once it is known what stands for the vectors, after use(), until a graph gives X up:
    codes      Codes; X (n, words), int32 or float32: the vectors; C: the centroids
    chosen     whether these codes were compared with others
    Memory: that of the codes, and 12 bytes per vector.
    """

    def __init__(self, vectors, centroids, cell):
        chain = chained(centroids)
        rank = np.empty(len(chain), np.int32)
        rank[chain] = np.arange(len(chain), dtype=np.int32)
        self.vectors, self.codes, self.X, self.chosen = vectors, None, None, False
        self.n = vectors.n
        self.centroids = np.ascontiguousarray(centroids[chain])
        self.order = np.argsort(rank[cell], kind="stable").astype(np.int32)
        sizes = np.bincount(cell, minlength=len(chain))[chain]
        self.end = np.cumsum(sizes)
        self.begin = self.end - sizes
        self.stop = self.end.copy()
        for c in np.flatnonzero(sizes > CROWDED):
            rows = self.order[self.begin[c]:self.end[c]]
            surplus = self._copies(rows)
            self.stop[c] -= surplus.sum()
            rows[:] = np.concatenate([rows[~surplus], rows[surplus]])

    def _copies(self, numbers):
        """Whether each of some vectors is equal to KEPT before it, bool (len(numbers),): if their hashes of 64 bits are."""
        odd = np.random.RandomState(0).randint(1 << 62, size=self.vectors.d).astype(np.uint64) * 2 + 1

        def hashes_of(numbers):
            return np.concatenate([self.vectors.rows(numbers[i:i + BLOCK]).view(np.uint32) @ odd
                                   for i in range(0, len(numbers), BLOCK)])

        surplus = np.zeros(len(numbers), bool)
        some = hashes_of(numbers[spread_rows(len(numbers), 1000)])
        if np.unique(some, return_counts=True)[1].max() < REPEATED:
            return surplus
        hashes = hashes_of(numbers)
        order = np.argsort(hashes, kind="stable")
        first = np.searchsorted(hashes, hashes[order], sorter=order)
        surplus[order] = np.arange(len(numbers)) - first >= KEPT
        return surplus

    def use(self, codes, progress=silent):
        self.codes, self.X = codes, None
        self.C = codes(self.centroids)
        self.X = aligned_zeros((self.n, self.C.shape[1]), self.C.dtype)
        position = self.position()
        for i, j in self.vectors.blocks():
            self.X[position[i:j]] = self.vectors.converted(codes, i, j)
            progress("vectors sorted by cell", j, self.n)

    @classmethod
    def train(cls, vectors, nlist=None, seed=0, progress=silent):
        """Cells found by k-means. progress: as in exact_search.py."""
        centroids, sample = train_centroids(vectors, nlist or default_nlist(vectors.n), seed, progress)
        ways = ways_to_cells(centroids, *sample, seed) if len(centroids) > FEW_CELLS else None
        del sample
        return cls(vectors, centroids, assign(vectors, centroids, ways, progress))

    def cell_of(self, rows):
        """The cell of rows of X, int64, in the shape of rows."""
        return np.searchsorted(self.end, rows, "right")

    def position(self):
        """int32 (n,): the row of X of each number."""
        position = np.empty(self.n, np.int32)
        position[self.order] = np.arange(self.n, dtype=np.int32)
        return position
