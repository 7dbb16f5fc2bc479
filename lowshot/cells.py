"""Vectors sorted by cell, as an inverted file (IVF) holds them, for dense products of whole cells and for walks on
graphs: neighbours have near row numbers, so they are found in cache."""
import numpy as np

from graph_utils import neighbours as nb

BLOCK = 1 << 16
NUMBER = np.int64(0x7fffffff)       # numbers in candidate keys: NUMBER - number (graph_utils/neighbours.h)
NEW = np.int64(0x80000000)
TRAINING_PER_CELL = 48              # vectors per centroid in k-means: twice as many change recall by less than .005


class Vectors:
    """Vectors as they are given: float32 arrays (or memory maps) that follow each other, not necessarily normalised.

    parts: one array or two, each (., d). normalised: False if rows are to be divided by their norm as they are used.
    No copy is made. Raises ValueError where a row holds NaN or infinity.
    """

    def __init__(self, parts, normalised=True, names=None):
        self.parts = [parts] if isinstance(parts, np.ndarray) else [p for p in parts if len(p)] or [parts[0]]
        if len(self.parts) > 2:
            raise ValueError(f"{len(self.parts)} arrays of vectors, at most two are supported")
        # memory maps stay maps, without the overhead of their class
        self.parts = [np.asarray(p) if p.flags.c_contiguous and p.dtype == np.float32
                      else np.ascontiguousarray(p, np.float32) for p in self.parts]
        self.starts = np.cumsum([0] + [len(p) for p in self.parts])
        self.n, self.d = int(self.starts[-1]), self.parts[0].shape[1]
        if any(p.shape[1] != self.d for p in self.parts):
            raise ValueError("vectors of " + " and ".join(str(p.shape[1]) for p in self.parts) + " columns in one set")
        if self.n >= 2 ** 31:
            raise ValueError(f"{self.n} vectors: node numbers have 32 bits")
        self.scale = None
        scale = np.empty(self.n, np.float32)
        for i in range(0, self.n, BLOCK):
            x = self.rows(slice(i, min(i + BLOCK, self.n)))
            scale[i:i + BLOCK] = np.einsum("ij,ij->i", x, x)
        bad = ~np.isfinite(scale)
        if bad.any():
            row = int(np.argmax(bad))
            part = int(np.searchsorted(self.starts, row, "right")) - 1
            of = f"{names[part]}: " if names else ""
            raise ValueError(f"{of}row {row - self.starts[part]} holds NaN, infinity or numbers too large to square")
        if not normalised:
            np.sqrt(scale, out=scale)
            scale[scale == 0] = 1
            self.scale = np.divide(1, scale, out=scale)

    def rows(self, which):
        """float32 copies (or a view, for a slice within one part) of rows, not scaled. which: slice or numbers."""
        if isinstance(which, slice):
            for part, start in zip(self.parts, self.starts):
                if start <= which.start and which.stop <= start + len(part):
                    return part[which.start - start:which.stop - start]
            which = np.arange(which.start, which.stop)
        if len(self.parts) == 1:
            return self.parts[0][which]
        out = np.empty((len(which), self.d), np.float32)
        first = which < self.starts[1]
        out[first] = self.parts[0][which[first]]
        out[~first] = self.parts[1][which[~first] - self.starts[1]]
        return out

    def scale_of(self, which):
        return None if self.scale is None else np.ascontiguousarray(self.scale[which])

    def normalised_rows(self, which):
        x = self.rows(which)
        return x if self.scale is None else x * self.scale[which, None]

    def bfloat16(self, which, residual=None):
        return nb.to_bfloat16(self.rows(which), self.scale_of(which), residual=residual)


def default_nlist(n):
    """Cells of an index of n vectors (paper, section 3.2: 4 sqrt(n))."""
    return max(1, min(int(4 * n ** 0.5), n))


def train_centroids(vectors, nlist, seed=0, iterations=6, progress=None):
    """Spherical k-means on a sample. Returns float32 (nlist, d), of norm 1 (0 where all vectors are zero)."""
    rs = np.random.RandomState(seed)
    m = min(vectors.n, TRAINING_PER_CELL * nlist)
    sample = np.sort(rs.choice(vectors.n, m, replace=False)) if m < vectors.n else np.arange(m)
    x = vectors.normalised_rows(sample)
    X = nb.to_bfloat16(x)
    centroids = np.ascontiguousarray(x[rs.choice(m, nlist, replace=m < nlist)])
    for iteration in range(iterations):
        cell = nearest_cell(X, centroids)
        order = np.argsort(cell, kind="stable")
        sizes = np.bincount(cell, minlength=nlist)
        filled = sizes > 0
        sums = np.zeros_like(centroids)
        sums[filled] = np.add.reduceat(x[order], (np.cumsum(sizes) - sizes)[filled], axis=0)
        sums[~filled] = x[rs.choice(m, int((~filled).sum()))]
        norms = np.sqrt(np.einsum("ij,ij->i", sums, sums))
        norms[norms == 0] = 1
        centroids = sums / norms[:, None]
        if progress is not None:
            progress(iteration + 1)
    return centroids


def nearest_cell(X, centroids):
    """The most similar centroid of each bfloat16 vector, int64 (len(X),)."""
    keys = nb.search_all(X, nb.to_bfloat16(centroids), 1)[:, 0]
    return NUMBER - (keys & NUMBER)


def assign(vectors, centroids, progress=None):
    """The cell of each vector, int32 (n,), a block at a time."""
    cell = np.empty(vectors.n, np.int32)
    C = nb.to_bfloat16(centroids)
    for i in range(0, vectors.n, BLOCK):
        rows = slice(i, min(i + BLOCK, vectors.n))
        cell[rows] = NUMBER - (nb.search_all(vectors.bfloat16(rows), C, 1)[:, 0] & NUMBER)
        if progress is not None:
            progress(rows.stop)
    return cell


def chained(centroids):
    """An order of the centroids (nlist, d) in which each is followed by the most similar one that is left."""
    nlist = len(centroids)
    S = centroids @ centroids.T if nlist <= 1 << 14 else None
    left = np.zeros(nlist, np.float32)
    chain = np.zeros(nlist, np.int64)
    left[0] = -np.inf
    for i in range(1, nlist):
        row = S[chain[i - 1]] if S is not None else centroids @ centroids[chain[i - 1]]
        chain[i] = np.argmax(row + left)
        left[chain[i]] = -np.inf
    return chain


class Cells:
    """Vectors in bfloat16, sorted by cell, cells chained by similarity, within a cell in the order of their numbers.

    X          int32 (n, words): the vectors; row p is number order[p]
    order      int32 (n,)
    begin, end int64 (nlist,): rows of each cell
    centroids  float32 (nlist, d), in the order of the chain; C: the same in bfloat16
    residual   the largest norm of what rounding to bfloat16 took from a vector
    Memory: 2 bytes per element and 8 per vector.
    """

    def __init__(self, vectors, centroids, cell, progress=None):
        chain = chained(centroids)
        rank = np.empty(len(chain), np.int32)
        rank[chain] = np.arange(len(chain), dtype=np.int32)
        self.vectors = vectors
        self.n = vectors.n
        self.centroids = np.ascontiguousarray(centroids[chain])
        self.C = nb.to_bfloat16(self.centroids)
        self.chain = chain
        self.order = np.argsort(rank[cell], kind="stable").astype(np.int32)
        sizes = np.bincount(cell, minlength=len(chain))[chain]
        self.end = np.cumsum(sizes)
        self.begin = self.end - sizes
        self.X = nb.aligned_zeros((self.n, nb.words(vectors.d)), np.int32)
        self.residual = 0.0
        for i in range(0, self.n, BLOCK):
            rows = self.order[i:i + BLOCK]
            residual = np.empty(len(rows), np.float32)
            nb.to_bfloat16(vectors.rows(rows), vectors.scale_of(rows), out=self.X[i:i + BLOCK], residual=residual)
            self.residual = max(self.residual, float(residual.max()))
            if progress is not None:
                progress(i + len(rows))

    @classmethod
    def train(cls, vectors, nlist=None, seed=0, progress=None):
        """Cells found by k-means. progress: called with (stage, done, total)."""
        at = (lambda *a: None) if progress is None else progress
        nlist = default_nlist(vectors.n) if nlist is None else nlist
        centroids = train_centroids(vectors, nlist, seed, progress=lambda i: at("rounds of k-means", i, 6))
        cell = assign(vectors, centroids, lambda i: at("vectors assigned to cells", i, vectors.n))
        return cls(vectors, centroids, cell, lambda i: at("vectors sorted", i, vectors.n))

    def position(self):
        """int32 (n,): the row of X of each number."""
        position = np.empty(self.n, np.int32)
        position[self.order] = np.arange(self.n, dtype=np.int32)
        return position
