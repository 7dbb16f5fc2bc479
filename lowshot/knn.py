"""K-nearest-neighbour search and graphs by inner product, for build_graph.py and diffusion.py.

Neighbour lists are pairs (D float32 (n, k), I int32 (n, k)): inner products and row numbers, best first; where there
are fewer than k neighbours, I is -1 and D is -inf. Negative similarities are neighbours like any other. Vectors `x`
are a float32 array (n, d), L2-normalised by the caller, or NormalisedRows (lowshot/features.py) over files and arrays.
`progress` is called with (what, done, total); show_progress() makes such a function.

    exact_knn(xq, x, k) -> D, I
    merge_neighbours(D1, I1, D2, I2, k) -> D, I
    cross_insert(x_new, x, D, I, first_new_number, k) -> D_new, I_new       D, I of the existing nodes change
    cells = Cells.train(Vectors(x))                                         cells.order puts near nodes together
    build_knn_graph(x, k, recall=.95, initial=(D, I), cells=cells) -> D, I, info
    search_begun(cells, xq, k, recall=.95)() -> D, I, info
    cells_of_index(index) -> centroids, cell                                of a Faiss index IVF,Flat

Below EXACT_BELOW vectors all is exact, and with a GPU (use_gpu) where that compares all with all quickly enough; otherwise
recall is measured on a sample by exact search, and raised until it is reached.
"""
import contextlib
from dataclasses import dataclass

import numpy as np

from graph_utils import neighbours as nb
from lowshot import gpu_search
from lowshot.cells import BLOCK, Cells, Codes, Vectors, main_directions, nearest_cell, nearest_cells
from lowshot.packages import faiss
from lowshot.script import Progress, size

EXACT_BELOW = 1 << 17       # sets smaller than this are searched exactly
SPARE = 34                  # candidates kept beyond k, that prove by their distance that the k best are exact
MANY_SPARE = 16 * SPARE     # the same for few queries among many vectors
INSERTED_SPARE = 6 * SPARE  # the same for new nodes, by products of bytes, which prove less: at least
FEW_INSERTED = 32 * SPARE   # and at the most, where new nodes are few
ALL_INSERTED = 1 << 20      # candidates of all new nodes together, between these
FLOAT32_BLOCK = 1 << 13     # vectors that are compared in float32 at a time
BYTES_ERR = 10              # standard errors by which products of bytes are taken to err at the most
BAR = 3                     # standard errors of codes by which a candidate may seem worse than a node's known neighbours
LOOKED_UP = 1 << 16         # candidates whose vectors are read from a file at a time
SPARE_LISTED = 8            # candidates beyond k at least, where nothing is proven
SAMPLE = 1000               # queries that recall is measured on: its standard error is about .003
CODES_SAMPLE = 4            # of these, every fourth tells what codes lose
CODES_AT_ONCE = 25          # so many of them at a time
SEARCH_BLOCK = 1 << 19      # queries between reports; groups of queries that share cells are largest at this number
REVERSE = 32                # reverse neighbours that take part in a round of neighbours-of-neighbours; twice as many
                            # where lists are longer
AFFORDABLE = 1 << 31        # comparisons of new nodes with known ones that are not worth leaving out
ROUND = 1.25                # comparisons that take as long as a round of neighbours-of-neighbours does for a pair, at least
NEARLY_ALL = .995           # recall that is worth a quarter of that in further comparisons
ON_GPU = 1 << 30            # comparisons from which a GPU is asked
ALL_ON_GPU = 1 << 48        # comparisons for which other ways than comparing all are not better there: 7 minutes on an H200
FLOAT32_ON_GPU = 1 << 17    # queries that are compared in float32 there while the vectors are read once
MANY_ON_GPU = 16            # times as many candidates as first, where these leave doubt
MISSED = .001               # recall that may be lost where the nearest cells are looked for among few
WIDE_FROM = 1 << 15         # comparisons per node from which longer lists and more rounds are the quicker way
WIDE_LEAST = 64             # how long the lists are then at least
WIDE_START = .75            # recall that these rounds start from; from lower, they end lower
WIDE_UPTO = .97             # recall that they reach where neighbours are hard to find


@contextlib.contextmanager
def show_progress():
    """A function of (what, done, total) that shows one line of progress per kind of work."""
    current = [None]

    def close():
        if current[0] is not None:
            current[0].__exit__(None, None, None)

    def progress(what, done, total):
        if current[0] is None or (current[0].what, current[0].total) != (what, total) or done < current[0].done:
            close()
            current[0] = Progress(total, what)
        current[0].update(done)

    try:
        yield progress
    finally:
        close()


def _silent(what, done, total):
    pass


def _vectors(x):
    return x if isinstance(x, Vectors) else Vectors(x)


_gpu = None


def use_gpu(device):
    """From now on exact search is by this torch device where that pays, and graphs are exact; None: by the CPU."""
    global _gpu
    _gpu = device


def all_on_gpu(nq, n, d, self=False):
    """Whether there is a GPU in use that compares so many queries with all of n vectors sooner than other ways find the
    nearest. self: these are the same."""
    return _gpu is not None and nq * n <= ALL_ON_GPU and gpu_search.fits(n if self else nq + n, d, _gpu)


def _on_gpu(Q, X, self=False):
    return (Q.n * X.n >= ON_GPU and max(Q.longest, X.longest) <= gpu_search.LONGEST
            and all_on_gpu(Q.n, X.n, X.d, self))


# ---- exact search

def exact_knn(xq, x, k, progress=None, self=False, spare=SPARE):
    """The k vectors of x with the highest inner product with each of xq, by comparing them all.

    Candidates come from products in bfloat16, or in float16 on a GPU in use; they are compared in float32, and where the errors
    of these could hide a better one the row is computed again in float32. self: xq and x are the same vectors, and each is in
    its own list. spare: candidates beyond k; with more of them fewer rows are computed again. Memory: x is read in blocks;
    queries in bfloat16 and 8 bytes per candidate, with `self` 28; and with `self` all vectors in float32 where most are in
    doubt; beside a GPU that of the result.
    Returns D float32 (nq, k), I int32 (nq, k).
    """
    Q, X = _vectors(xq), _vectors(x)
    if Q.d != X.d:
        raise ValueError(f"queries have {Q.d} columns, vectors {X.d}")
    if not Q.n or not X.n:
        return np.full((Q.n, k), -np.inf, np.float32), np.full((Q.n, k), -1, np.int32)
    if _on_gpu(Q, X, self):
        return _exact_on_gpu(Q, X, k, progress or _silent, self)
    return _exact_of(*_candidates(Q, X, k + spare, progress or _silent, self), Q, X, k, progress or _silent, self)


def _candidates(Q, X, K, progress, self):
    """(keys, error): the K best by products in bfloat16, and bounds of the errors of these, float32 (Q.n,)."""
    lost = np.empty(Q.n, np.float32)
    queries = np.concatenate([Q.converted(nb.to_bfloat16, i, j, residual=lost[i:j]) for i, j in Q.blocks()])
    K = min(K, X.n)
    if self:
        lost_most = float(lost.max())
        keys = nb.search_self(queries, K, lambda done: progress("pairs of vectors compared", done ** 2, Q.n ** 2))
    else:
        lost_most, keys = 0.0, np.zeros((Q.n, K), np.int64)
        for i, j in X.blocks():
            residual = np.empty(j - i, np.float32)
            nb.search_all(queries, X.converted(nb.to_bfloat16, i, j, residual=residual), K, keys, i)
            lost_most = max(lost_most, float(residual.max()))
            progress("vectors compared with all queries", j, X.n)
    return keys, _error(lost, lost_most, Q.longest, X.longest)


def _exact_of(keys, error, Q, X, k, progress, self):
    """exact_knn(), given what _candidates() found; keys are changed."""
    D, I, unsure = _best_and_unsure(keys, error, Q, X, k, self)
    return _in_float32(D, I, unsure, Q, X, k, progress, self)


def _in_float32(D, I, unsure, Q, X, k, progress, self, on_gpu=False):
    """exact_knn() again, in float32 throughout, for queries that are `unsure` in D and I, which change in place."""
    if self and len(unsure) > Q.n / 2 and not on_gpu:
        keys = nb.search_self(Q.converted(nb.to_float32, 0, Q.n), min(k + SPARE, X.n), lambda done: progress(
            "pairs of vectors compared in float32", done ** 2, Q.n ** 2))
        return _best_of(keys, Q, X, k, self, out=(D, I))
    step = FLOAT32_ON_GPU if on_gpu else 4096
    for i in range(0, len(unsure), step):
        rows = unsure[i:i + step].astype(np.int32)
        x = Q.scaled_rows(rows)
        keys = gpu_search.near_in_float32(x, X, k + gpu_search.SPARE, _gpu) if on_gpu else _float32_candidates(x, X, k)
        _best_of(keys, Q, X, k, self, rows, out=(D, I), mapped=on_gpu)
        progress("queries compared in float32", i + len(rows), len(unsure))
    return D, I


def _best_and_unsure(keys, error, Q, X, k, self=False, rows=None, **where):
    """(D, I) of the k best of each list of candidates, and those lists that may lack a better one than these. keys: the best
    by products that err by `error` (n,) at the most; they are changed. rows: the queries, all if None; out, mapped: as of
    _best_of()."""
    worst = nb.worst_products(keys)
    _leave_possible(keys, k, error)
    D, I = _best_of(keys, Q, X, k, self, rows, **where)
    last = D[:, -1] if rows is None else D[rows, -1]
    return D, I, np.flatnonzero(last < worst + error) if keys.shape[1] < X.n else np.empty(0, np.int64)


def _exact_on_gpu(Q, X, k, progress, self, q=None, x=None):
    """exact_knn() by a GPU: it finds candidates, and more of them for queries that these leave in doubt. q, x: Q and X there,
    if they are."""
    x = x or gpu_search.Rounded(X, _gpu)
    q = q or (x if self else gpu_search.Rounded(Q, _gpu))
    D, I = np.empty((Q.n, k), np.float32), np.empty((Q.n, k), np.int32)
    queries, K = None, k + gpu_search.SPARE
    for _ in range(2):
        unsure, done, total = [], 0, Q.n if queries is None else len(queries)
        for rows, keys, error in gpu_search.near(q, x, K, q.errors_with(x, _error), queries):
            unsure.append(rows[_best_and_unsure(keys, error, Q, X, k, self, rows, out=(D, I), mapped=True)[2]])
            done += len(rows)
            progress("queries compared with all vectors", done, total)
        queries, K = np.concatenate(unsure), MANY_ON_GPU * K
        if not len(queries):
            break
    del q, x
    _in_float32(D, I, queries, Q, X, k, progress, self, on_gpu=True)
    gpu_search.release()
    return D, I


def _error(lost, lost_most, q_longest, x_longest):
    """Bounds of the errors of products of rounded vectors, for each of the first ones:
    |<q, x> - <q', x'>| <= |q - q'| |x'| + |q| |x - x'|, and that of float32 sums, of 670 terms at the worst."""
    return lost * (x_longest + lost_most) + q_longest * lost_most + np.float32(4e-5) * q_longest * x_longest


def _leave_possible(keys, k, error):
    """Take out of each list of candidates, in place, what cannot be among its k best: k others are better even if all
    products err by `error` (n,) to their disfavour."""
    if keys.shape[1] <= k:
        return
    for i in range(0, len(keys), BLOCK):
        part, e = keys[i:i + BLOCK], error[i:i + BLOCK]
        least = np.partition(part.view(np.uint64), -k, axis=1)[:, -k].view(np.int64)
        least = nb.make_keys(nb.similarities(least) - 2 * e, np.where(least == 0, -1, nb.NONE))
        part[part.view(np.uint64) < least.view(np.uint64)[:, None]] = 0


def _best_of(keys, Q, X, k, self=False, q_number=None, x_number=None, out=None, mapped=False):
    """nb.exact_products() of candidates all over the file of X. They are read from it, a part after the other: a map of
    the file would keep in memory what is near them as well. Files of few vectors, and those whose vectors are all looked up
    (self), are mapped; others if `mapped`, which is quicker where there is memory."""
    D, I = out or (np.empty((Q.n, k), np.float32), np.empty((Q.n, k), np.int32))
    if self or mapped or X.in_memory or X.n < EXACT_BELOW:
        return nb.exact_products(keys, Q.arrays, X.arrays, k, q_number, x_number, Q.scale, X.scale, self, D, I)
    step = max(1, LOOKED_UP // keys.shape[1])
    for i in range(0, len(keys), step):
        part = keys[i:i + step]
        rows = np.arange(i, i + len(part), dtype=np.int32) if q_number is None else q_number[i:i + step]
        number = nb.numbers(part)
        have = number >= 0
        number, place = np.unique(number[have] if x_number is None else x_number[number[have]], return_inverse=True)
        found = np.zeros(part.shape, np.int64)
        found[have] = nb.make_keys(np.zeros(len(place), np.float32), place)
        nb.exact_products(found, Q.arrays, X.rows(number), k, rows, None, Q.scale, X.factors(number), False, D, I)
        I[rows] = np.where(I[rows] < 0, -1, number[I[rows]])
    return D, I


def _float32_candidates(xq, X, k):
    """Keys of the best by products in float32, some more than k, int64 (len(xq), .)."""
    queries = nb.to_float32(xq)
    keys = np.zeros((len(xq), min(k + SPARE, X.n)), np.int64)
    for i in range(0, X.n, FLOAT32_BLOCK):
        j = min(i + FLOAT32_BLOCK, X.n)
        nb.search_all(queries, X.converted(nb.to_float32, i, j), keys.shape[1], keys, i)
    return keys


def merge_neighbours(D1, I1, D2, I2, k):
    """The k best of two neighbour lists per row, each best first; a number stands in one of the two only."""
    return nb.merge_lists(D1, I1, D2, I2, k)


def worst_neighbours(D, I):
    """The last similarity of each neighbour list, float32 (n,); -inf where there is room for more."""
    return np.where(I[:, -1] < 0, np.float32(-np.inf), D[:, -1])


def cross_insert(x_new, x, D, I, first_new_number, k, progress=None, worst=None, replace=None):
    """Add m new nodes to a graph of n existing ones, exactly; the existing vectors are read once, and again for new nodes whose
    neighbours the first products leave in doubt.

    x_new (m, d), numbered from first_new_number on; x: the n existing nodes, with lists D, I (n, >= k), which new nodes enter
    where they are better than the last neighbour. replace: called with (rows, D, I), the numbers of nodes whose lists change
    and their new lists; None: these are put in place. worst: worst_neighbours(D, I), if they are known; then of D and I only
    those lists are looked at that change, or nearly do. Returns the lists of the new nodes, (m, k), among existing and new
    nodes. Memory: that of exact_knn(x_new, x_new, k, self=True), or 8 bytes for each of k + 204 candidates,
    or up to k + 1088 where new nodes are few; and blocks of x.
    """
    def in_place(rows, changed_D, changed_I):
        D[rows], I[rows] = changed_D, changed_I

    new, X = _vectors(x_new), _vectors(x)
    D_new, I_new = exact_knn(new, new, k, self=True)
    I_new[I_new >= 0] += first_new_number
    m = new.n
    if not m or not X.n:
        return D_new, I_new
    progress, replace = progress or _silent, replace or in_place
    worst = worst_neighbours(D, I) if worst is None else worst

    def enter(keys, error, x, scale, i):
        rows, found_D, found_I = _entering(keys, error, x, scale, new, I.shape[1])
        found_I[found_I >= 0] += first_new_number
        rows += i
        merged_D, merged_I = nb.merge_lists(D[rows], I[rows], found_D, found_I, I.shape[1])
        entered = (merged_I >= first_new_number).any(axis=1)
        replace(rows[entered], merged_D[entered], merged_I[entered])

    if _on_gpu(new, X):
        existing, on_gpu = gpu_search.Rounded(X, _gpu), gpu_search.Rounded(new, _gpu)
        for rows, keys, error in gpu_search.near(existing, on_gpu, I.shape[1] + gpu_search.SPARE,
                                                 existing.errors_with(on_gpu, _error)):
            i, j = int(rows[0]), int(rows[-1]) + 1
            keys[nb.similarities(keys) <= (worst[i:j] - error)[:, None]] = 0
            enter(keys, error, X.stretch(i, j), X.factors(slice(i, j)), i)
            progress("nodes compared with new ones", j, X.n)
        return nb.merge_lists(D_new, I_new, *_exact_on_gpu(new, X, k, progress, False, on_gpu, existing), k)
    new_lost = np.empty(m, np.float32)
    queries = np.concatenate([new.converted(nb.to_bytes, i, j, residual=new_lost[i:j]) for i, j in new.blocks()])
    lost_most = float(new_lost.max())
    spare = max(min(ALL_INSERTED // m, FEW_INSERTED), INSERTED_SPARE)
    keys_new = np.zeros((m, min(k + spare, X.n)), np.int64)
    X_lost_most = 0.0
    for i, j in X.blocks():
        lost, x, scale = np.empty(j - i, np.float32), X.stretch(i, j), X.factors(slice(i, j))
        block = nb.to_bytes(x, scale, residual=lost)
        X_lost_most = max(X_lost_most, float(lost.max()))
        error = _error(lost, lost_most, X.longest, new.longest)
        bound = worst[i:j] - error
        keys = np.repeat(nb.make_keys(bound, np.full(j - i, nb.NONE))[:, None], min(I.shape[1] + SPARE, m), axis=1)
        nb.search_all(queries, block, keys_new.shape[1], keys_new, i, insert=(keys, bound))
        enter(keys, error, x, scale, i)
        progress("nodes compared with new ones", j, X.n)
    found_D, found_I, unsure = _best_and_unsure(keys_new, _error(new_lost, X_lost_most, new.longest, X.longest), new, X, k)
    if len(unsure):
        found_D[unsure], found_I[unsure] = exact_knn(new.scaled_rows(unsure), X, k, spare=MANY_SPARE)
    return nb.merge_lists(D_new, I_new, found_D, found_I, k)


def _entering(keys, error, x, scale, new, k):
    """(rows, D, I): those of the nodes x that have new ones among `keys`, and the k best of these for each.

    keys: for each node the new ones that may enter its list, as many as there are or all that fit, by products that err by
    `error`; bars and zeros are none.
    """
    rows = np.flatnonzero(nb.numbers(keys[:, 0]) >= 0)      # the best comes first, or the one that made room for others
    keys, x, scale = np.ascontiguousarray(keys[rows]), x[rows], None if scale is None else scale[rows]
    D, I = nb.exact_products(keys, x, new.arrays, k, q_scale=scale, x_scale=new.scale)
    full = (nb.numbers(keys) >= 0).all(axis=1) & (keys.shape[1] < new.n)
    unsure = np.flatnonzero(full & (D[:, -1] < nb.worst_products(keys) + error[rows]))
    if len(unsure):
        D[unsure], I[unsure] = exact_knn(x[unsure] if scale is None else x[unsure] * scale[unsure, None], new, k)
    return rows, D, I


# ---- recall

def sampled(n, size, seed):
    """Numbers of `size` of n vectors, or of all, increasing. They are drawn as nobody else draws: of data that were made with
    the same seed the sample might be all the copies, say, and tell nothing of the others."""
    return np.sort(np.random.RandomState([seed, *b"sample"]).choice(n, min(size, n), replace=False))


class Sample:
    """Some of `vectors`, of those from number `first` on, and their true neighbours among the Vectors X.

    number int32 (m,); D, I: their k nearest by exact search. candidates: int64 (m, k + MANY_SPARE), the nearest by products in
    bytes or bfloat16, in no order; in very tight clusters these miss some of the k nearest.
    cells: Cells of X, or None. Where these hold all dimensions in bytes, that serves to find candidates, in less than half the
    time; products are then taken to err by BYTES_ERR standard errors at the most. Cells that hold nothing get the vectors so.
    """

    def __init__(self, vectors, X, k, seed, progress=None, size=SAMPLE, first=0, cells=None):
        self.number = (first + sampled(vectors.n - first, size, seed)).astype(np.int32)
        self.k, self.X = k, X
        self.x = vectors.scaled_rows(self.number)
        Q, progress = _vectors(self.x), progress or _silent
        # in tight clusters the errors of candidates leave many in doubt, and float32 is slow
        K = k + MANY_SPARE
        if cells is None or cells.codes is not None and not cells.codes.plain:
            keys, error = _candidates(Q, X, K, progress, False)
            self.candidates = nb.numbers(keys)
            self.D, self.I = _exact_of(keys, error, Q, X, k, progress, False)
        else:
            keys, error = self._by_bytes(Q, X, K, cells, progress)
            self.candidates = nb.numbers(keys)
            self.D, self.I, unsure = _best_and_unsure(keys, error, Q, X, k)
            if len(unsure):
                self.D[unsure], self.I[unsure] = exact_knn(self.x[unsure], X, k, progress, spare=MANY_SPARE)

    @staticmethod
    def _by_bytes(Q, X, K, cells, progress):
        """(keys, error) as of _candidates(). A step of bytes errs like a uniform variable, whose variance is 1 / 12."""
        if cells.codes is None:
            cells.use(Codes(), lambda done: progress("vectors sorted by cell", done, cells.n))
        keys, queries = np.zeros((Q.n, min(K, X.n)), np.int64), Q.converted(cells.codes, 0, Q.n)
        step = 0.0
        for i in range(0, X.n, SEARCH_BLOCK):
            part = cells.X[i:i + SEARCH_BLOCK]
            nb.search_all(queries, part, keys.shape[1], keys, i)
            step = max(step, float(part[:, -1].copy().view(np.float32).max()))
            progress("vectors compared with a sample", i + len(part), X.n)
        variance = (queries[:, -1].copy().view(np.float32) * X.longest) ** 2 + (step * Q.longest) ** 2
        numbers = nb.numbers(keys)
        keys = nb.make_keys(nb.similarities(keys), np.where(numbers < 0, -1, cells.order[numbers]))
        return keys, BYTES_ERR * np.sqrt(variance / 12).astype(np.float32)

    def recall_by_nprobe(self, cells, position, listed=None):
        """Share of the true neighbours in the nprobe nearest cells, float64 (nlist,): for nprobe = 1, 2, ...

        listed: bool (m, nlist), cells of which the nearest are taken; all if None.
        """
        nlist = len(cells.centroids)
        far = -cells.codes.projected(self.x) @ cells.codes.projected(cells.centroids).T
        if listed is not None:
            far[~listed] = np.inf
        cell = cells.cell_of(position[np.maximum(self.I, 0)])
        mine = np.take_along_axis(far, cell, 1)
        far.sort(axis=1)
        rank = np.stack([np.searchsorted(row, x) for row, x in zip(far, mine)])
        found = rank[(self.I >= 0) & np.isfinite(mine)]
        return np.cumsum(np.bincount(found, minlength=nlist)) / max(1, (self.I >= 0).sum())

    def near_cells(self, cells, position, nprobe, recall):
        """For each cell those near it among which a node of its own finds the nprobe nearest, int32 (nlist, m): so many that no
        more of the sample's true neighbours are lost by it than MISSED. None where that saves little.

        recall: that of the nprobe nearest of all cells.
        """
        nlist = len(cells.centroids)
        C = cells.codes.projected(cells.centroids)
        similar = C[cells.cell_of(position[self.number])] @ C.T
        m = 2 * nprobe
        while m <= nlist // 4:
            least = -np.partition(-similar, m - 1, axis=1)[:, m - 1:m]
            if self.recall_by_nprobe(cells, position, similar >= least)[nprobe - 1] >= recall - MISSED:
                return nearest_cells(cells.C, cells.C, m)
            m *= 2
        return None

    def compared(self, choices, longest):
        """A Comparison for each of some codes, with at most `longest` candidates."""
        found, errors, true = np.zeros((len(choices), longest)), [[] for _ in choices], 0
        chosen = np.arange(0, len(self.number), CODES_SAMPLE)
        for rows in np.split(chosen, range(CODES_AT_ONCE, len(chosen), CODES_AT_ONCE)):
            numbers = self.candidates[rows]         # as many for each
            x = self.X.scaled_rows(numbers.ravel())
            coded = [(codes(self.x[rows]), codes(x)) for codes in choices]
            for r, i in enumerate(rows):
                mine = slice(r * numbers.shape[1], (r + 1) * numbers.shape[1])
                products = np.einsum("ij,j->i", x[mine], self.x[i])
                k = np.count_nonzero(self.I[i] >= 0)
                true += k
                for choice, (q_codes, x_codes) in enumerate(coded):
                    keys = nb.search_all(q_codes[r:r + 1], x_codes[mine], numbers.shape[1])[0]
                    keys = np.sort(keys.view(np.uint64))[::-1].view(np.int64)
                    exact = products[nb.numbers(keys)]
                    errors[choice].append((nb.similarities(keys) - exact).std())
                    near = np.cumsum(exact[:longest] >= self.D[i, k - 1] - 1e-6)
                    found[choice, :len(near)] += np.minimum(near, k)
                    found[choice, len(near):] += min(near[-1], k)
        return [Comparison(codes, self.k, curve, float(np.sqrt(np.mean(np.square(e)))))
                for codes, curve, e in zip(choices, found[:, self.k - 1:] / true, errors)]

    def recall_of_keys(self, keys, cells):
        """recall() of the best of candidates, int64 (m, K)."""
        return self.recall(_best_of(keys, _vectors(self.x), cells.vectors, self.k, x_number=cells.order)[0])

    def recall(self, D):
        """Share of the true neighbours found, given the similarities of what was found; equals count as found."""
        have = self.I >= 0
        last = np.where(have, self.D, np.inf).min(axis=1)
        found = (D[:, :self.k] >= last[:, None] - 1e-6) & have
        return float(found.sum() / max(1, have.sum()))


def with_margin(recall):
    """What is to be measured on a sample for that recall: a little more, as samples err, less so near 1."""
    return recall + min(.005, (1 - recall) / 4)


def cells_reaching(curve, wanted):
    """The smallest p with curve[p - 1] >= wanted, or the number of cells."""
    reached = np.flatnonzero(curve >= wanted)
    return int(reached[0]) + 1 if len(reached) else len(curve)


# ---- graphs

def build_knn_graph(x, k, recall=0.95, initial=None, cells=None, nprobe=0, seed=0, out=None, progress=None, say=None,
                    checkpoint=None, release=False, sample=None, exact=False):
    """The graph of each vector's k nearest, itself included.

    Sets below EXACT_BELOW are compared whole, and others if `exact`, for GPUs. Of larger ones, the vectors of each node's
    nprobe nearest cells are compared with it, and then neighbours of neighbours, or more cells where that is quicker, until
    recall@k as measured on a sample is reached. Similarities are exact float32 products; those in known lists stay as they
    are. Deterministic for a seed, and whatever the number of threads but for rounding in projections by BLAS.

    initial: (D, I) known lists of the first nodes (n0, >= k), which are then compared with the other nodes only; recall
    is that of the other nodes.
    cells: Cells of x, made here if needed and not given. nprobe: search that many cells, without further rounds.
    release: give up the vectors in cells before the similarities are computed, to save memory.
    sample: Sample of the nodes, of those that are new if lists are given; made here if None.
    out: arrays (D, I) (n, k) to fill. say: function that gets a line on each step. checkpoint: Checkpoint or None.
    Returns D, I, info (recall, nprobe, rounds, exact).
    """
    progress, say = progress or _silent, say or (lambda line: None)
    vectors = cells.vectors if cells is not None else _vectors(x)
    n = vectors.n
    D, I = out if out is not None else (np.empty((n, k), np.float32), np.empty((n, k), np.int32))
    if exact or n < EXACT_BELOW and cells is None:
        for array, found in zip((D, I), exact_knn(vectors, vectors, k, progress, self=True)):
            array[:] = found
        return D, I, {"recall": 1.0, "exact": True}
    if cells is None:
        cells = Cells.train(vectors, seed=seed, progress=progress)
    position = cells.position()
    n0 = len(initial[0]) if initial is not None and len(initial[0]) < n else 0
    # known lists are as they are: it is the new nodes, and their entries in these lists, that have to be found
    sample = sample or Sample(vectors, vectors, min(k, n), seed, progress, first=n0, cells=cells)
    wanted, reverse = with_margin(recall), REVERSE
    comparison = compared_by(sample, cells, recall, progress, say)
    needed = comparison.needed(recall)
    curve = sample.recall_by_nprobe(cells, position)
    if initial is not None and len(initial[0]):
        K = max(needed, initial[0].shape[1] + SPARE_LISTED)
        lists = Lists(cells, position, K, initial, checkpoint, comparison.error)
        # few are searched for: cheaper than a round over all nodes, up to some number of cells. To the wanted recall and a
        # little further, as codes err; and as far as it takes a second or two
        affordable = AFFORDABLE // max(1, (n - n0) * n // len(curve))
        p = nprobe or max(min(cells_reaching(curve, wanted + comparison.lost(K) + MISSED), max(1, len(curve) // 8)),
                          min(affordable, len(curve)))
    else:
        # from here on neighbours of neighbours are the quicker way, unless a round takes longer than the cells that are left
        p, K = nprobe or cells_reaching(curve, max(1 - 2.5 * (1 - wanted), .5)), needed
        alone = cells_reaching(curve, wanted + min(comparison.lost(K), (1 - wanted) / 4) + MISSED)
        round_cells = int(ROUND * (K + REVERSE) ** 2 * len(curve) / n)
        if not nprobe and alone - p < round_cells:
            p = max(alone, min(cells_reaching(curve, max(NEARLY_ALL, wanted)), alone + round_cells // 4))
        elif not nprobe and p * n > WIDE_FROM * len(curve) and wanted <= WIDE_UPTO:
            # in all dimensions: with half of them lists would be long for their sake alone
            needed = compared_by(sample, cells, recall, progress, say, half=False).needed(recall)
            curve = sample.recall_by_nprobe(cells, position)
            p, K, reverse = cells_reaching(curve, WIDE_START), max(needed, longest_list(k)), 2 * REVERSE
            say(f"neighbours are far and wide: {K} candidates are kept for each, compared in all dimensions")
        lists = Lists(cells, position, K, None, checkpoint)

    def near(p):
        # a cell's own nodes have to be enough for the work on its list
        return None if nprobe or n - n0 < 16 * len(curve) else sample.near_cells(cells, position, p, curve[p - 1])

    rounds, have = lists.rounds, 0.0
    p = lists.nprobe or p           # of a run that was killed
    while True:
        lists.search(p, progress, near(p))
        have = lists.recall(sample, needed)
        say(f"{p} cells of {len(curve)} per node: recall@{k} {have:.4f} on {len(sample.number)} {'new ' if n0 else ''}nodes")
        gained = 1.0
        while not nprobe and have < wanted and gained > .002 and rounds < 12:
            inserted = nb.descent_round(cells.X, lists.keys, reverse, seed + rounds,
                                        lambda done: progress("nodes' neighbours compared with each other", done, n))
            rounds += 1
            lists.round_done(rounds)
            before, have = have, lists.recall(sample, needed)
            gained = have - before
            say(f"neighbours of neighbours, round {rounds}: {inserted / n:.2f} insertions per node, recall@{k} {have:.4f}")
        if nprobe or have >= wanted or curve[p - 1] >= wanted or p == len(curve):
            break               # more cells do not find what rounding hides
        p, rounds = min(4 * p, len(curve)), 0
        lists.restart()
    if have < recall and not nprobe:
        say(f"note: recall@{k} {have:.4f} is all that comparing candidates in {cells.codes.format} gives here")
    if release:
        cells.X = None      # not needed any more, and the largest part of the memory
    numbers = lists.become_numbers(needed)
    if n0:
        D[:n0], I[:n0] = (a[:, :k] for a in initial)
    for i in range(0, n, BLOCK):
        rows = slice(i, i + BLOCK)
        keys = nb.make_keys(np.zeros(numbers[rows].shape, np.float32), numbers[rows])
        nb.exact_products(keys, vectors.arrays, vectors.arrays, k, cells.order[rows], cells.order, vectors.scale,
                          vectors.scale, True, D, I, known=n0)
        progress("nodes' similarities computed", min(i + BLOCK, n), n)
    vectors.release()
    return D, I, {"recall": sample.recall(D[sample.number]), "nprobe": p, "rounds": rounds, "exact": False}


@dataclass
class Comparison:
    """What comparing vectors by codes loses, as measured on a sample.

    k: neighbours that are wanted; curve: share of them among the best K by codes, for K = k, k + 1, ...; error: standard
    error of products of codes.
    """
    codes: Codes
    k: int
    curve: np.ndarray
    error: float

    def lost(self, K):
        """Recall that is lost where K candidates are kept."""
        return 1 - float(self.curve[min(K - self.k, len(self.curve) - 1)])

    def needed(self, recall):
        """Candidates per node, a few more than neighbours, so that codes cost a quarter of what recall leaves at most; the
        most there may be, where that is not enough."""
        most = self.k + len(self.curve) - 1
        return next((K for K in range(self.k + SPARE_LISTED, most, 8) if self.suffices(recall, K)), most)

    def suffices(self, recall, K):
        return self.lost(K) <= (1 - recall) / 4

    def cost(self, recall, d):
        """Of the rounds of neighbours-of-neighbours, to compare with that of others; infinite where recall is out of reach."""
        K = self.needed(recall)
        return self.codes.words(d) * (K + REVERSE) ** 2 if self.suffices(recall, K) else np.inf


def compared_by(sample, cells, recall, progress, say, half=True):
    """The Comparison that is the cheapest for this recall; cells then hold the vectors by its codes.

    Bytes of half the dimensions or of all; where vectors differ by hardly more than bytes do, as in clusters of nearly the
    same image, bfloat16, and where that is too coarse as well, float32. Codes that were chosen before are kept if they serve
    this sample too. half: whether half the dimensions may do.
    """
    d, longest = sample.x.shape[1], longest_list(sample.k)
    if cells.chosen and (half or cells.codes.transform is None):
        [now] = sample.compared([cells.codes], longest)
        if now.codes.format == "float32" or now.suffices(recall, now.needed(recall)):
            return now
    m, choices = -(-d // 128) * 64, [cells.codes if cells.codes is not None and cells.codes.plain else Codes()]
    if half and m < d:
        choices.append(Codes("bytes", main_directions(cells.vectors, m)))
    best = min(sample.compared(choices, longest), key=lambda c: c.cost(recall, d))
    if best.cost(recall, d) == np.inf:
        finer = sample.compared([Codes("bfloat16"), Codes("float32")], longest)
        best = next((c for c in finer if c.cost(recall, d) < np.inf), finer[-1])
        more = 4 * cells.n * (best.codes.words(d) - Codes().words(d))
        say(f"vectors are nearly the same: compared in {best.codes.format}, slower and in {size(more)} more memory than bytes")
    elif best.codes.transform is not None:
        say(f"vectors are compared in {m} of {d} dimensions, {best.needed(recall)} candidates are kept for each")
    if best.codes is not cells.codes:
        cells.use(best.codes, lambda done: progress("vectors sorted by cell", done, cells.n))
    cells.chosen = True
    return best


def longest_list(k):
    """Candidates per node, at most, while a graph of k neighbours is built."""
    return max(2 * k, WIDE_LEAST)


class Lists:
    """The candidate lists of all nodes, in the order of cells."""

    def __init__(self, cells, position, K, initial=None, checkpoint=None, error=0.0):
        self.cells, self.position, self.checkpoint = cells, position, checkpoint
        self.initial, self.error = initial, error
        self.n0 = len(initial[0]) if initial is not None else 0
        self.K = K
        n = cells.n
        # in each cell the first nodes come first: from `middle` on they are new
        known = np.concatenate([[0], np.cumsum(cells.order < self.n0)])
        self.middle = cells.begin + known[cells.stop] - known[cells.begin]
        if checkpoint is not None:
            self.keys, self.searched, self.rounds, self.nprobe = checkpoint.open(n, self.K, cells.X.shape[1])
        else:
            self.keys, self.searched, self.rounds, self.nprobe = nb.aligned_zeros((n, self.K), np.int64), 0, 0, 0
        if self.searched == 0:
            self.restart()

    def restart(self):
        """Empty lists, but for those that were given."""
        if self.checkpoint is not None:
            self.checkpoint.give_up()
        self.searched, self.rounds = 0, 0
        if self.n0:
            # further places are for what may be among the k best, not for whatever comes first
            nb.known_lists(self.cells.X, self.cells.order, self.position, self.initial[1], BAR * self.error, self.keys)
        else:
            self.keys[:] = 0

    def search(self, nprobe, progress, near=None):
        """Join the best of each node's nprobe nearest cells; near: those to look at, of Sample.near_cells()."""
        c, n = self.cells, self.cells.n
        if self.searched and self.nprobe != nprobe:
            self.restart()
        self.nprobe = nprobe
        if self.n0:
            self._search_new(nprobe, progress, near)
        for i in range(self.searched, n, SEARCH_BLOCK):
            block = slice(i, min(i + SEARCH_BLOCK, n))
            self.keys[block] = 0        # of a run that was killed in this block
            nb.search_cells(c.X[block], c.C, nprobe, c.begin, c.stop, c.X, self.keys[block],
                            near=self._near(near, np.arange(i, block.stop)))
            self.searched = block.stop
            if self.checkpoint is not None:
                self.checkpoint.save(self)
            progress("nodes compared with near cells", block.stop, n)
        self._mark_new()

    def _near(self, near, rows):
        return None if near is None else (self.cells.cell_of(rows).astype(np.int32), near)

    def _search_new(self, nprobe, progress, near):
        """Compare the new nodes with near cells; they enter the lists of the known nodes there as well."""
        c = self.cells
        new = self._new_rows()
        worst = nb.worst_products(self.keys)
        for i in range(0, len(new), SEARCH_BLOCK):
            rows = new[i:i + SEARCH_BLOCK]
            keys = self.keys[rows]
            nb.search_cells(c.X[rows], c.C, nprobe, c.begin, c.stop, c.X, keys,
                            insert=(self.middle, rows, self.keys, worst), near=self._near(near, rows))
            self.keys[rows] = keys
            progress("new nodes compared with near cells", i + len(rows), len(new))
        self.searched = c.n

    def _new_rows(self):
        return np.flatnonzero(self.cells.order >= self.n0).astype(np.int32)

    def _mark_new(self):
        """All that is not between two known nodes is new to the rounds of neighbours-of-neighbours."""
        rows = self._new_rows()
        for i in range(0, len(rows), BLOCK):        # those that entered the lists of others are marked already
            block = rows[i:i + BLOCK] if self.n0 else slice(i, i + BLOCK)
            keys = self.keys[block]
            self.keys[block] = np.where(nb.numbers(keys) >= 0, keys | nb.NEW, keys)

    def round_done(self, rounds):
        self.rounds = rounds
        if self.checkpoint is not None:
            self.checkpoint.save(self)

    def best(self, rows, most):
        """The keys of some nodes, int64 (., K): the best `most` of longer lists."""
        keys = self.keys[rows]
        if self.K <= most:
            return np.ascontiguousarray(keys)
        keys = np.partition(keys.view(np.uint64), self.K - most, axis=1)[:, self.K - most:]
        return np.ascontiguousarray(keys).view(np.int64)

    def become_numbers(self, most):
        """The numbers of the best alone, int32 (n, K), -1 for none, in half the memory; the lists are given up."""
        if self.checkpoint is not None:
            self.checkpoint.give_up()
        numbers = np.empty((len(self.keys), min(self.K, most)), np.int32)
        for i in range(0, len(numbers), BLOCK):
            numbers[i:i + BLOCK] = nb.numbers(self.best(slice(i, i + BLOCK), most))
        self.keys = None
        return numbers

    def recall(self, sample, most):
        """Recall on the sample, as it would be if similarities of the best `most` were computed now."""
        return sample.recall_of_keys(self.best(self.position[sample.number], most), self.cells)


# ---- searching for vectors that are no nodes

def search_begun(cells, xq, k, recall=0.95, nprobe=0, seed=0, progress=None, say=lambda line: None):
    """The k nearest of each of xq among the vectors of cells, with at least the given recall on a sample of xq.

    In two parts: this one needs the codes in cells; the function that it returns, which needs them no more, returns
    D, I, info (recall, nprobe).
    nprobe: number of cells to search, found by measurement if 0.
    say: function that gets a line on how vectors are compared, where it is not by bytes of all dimensions.
    """
    progress = progress or _silent
    Q, X = _vectors(xq), cells.vectors
    if Q.n <= 2 * SAMPLE or X.n < EXACT_BELOW or all_on_gpu(Q.n, X.n, X.d):
        found = *exact_knn(Q, X, k, progress), {"recall": 1.0, "exact": True}
        return lambda: found
    sample = Sample(Q, X, k, seed, progress, cells=cells)
    K = compared_by(sample, cells, recall, progress, say).needed(recall)
    curve = sample.recall_by_nprobe(cells, cells.position())
    p = nprobe or cells_reaching(curve, with_margin(recall))
    queries = np.concatenate([Q.converted(cells.codes, i, j) for i, j in Q.blocks()])
    # queries of one cell after the other share what is read
    order = np.argsort(nearest_cell(queries, cells.C), kind="stable").astype(np.int32)
    keys = np.zeros((Q.n, K), np.int64)
    for i in range(0, Q.n, SEARCH_BLOCK):
        rows = slice(i, i + SEARCH_BLOCK)
        nb.search_cells(queries[order[rows]], cells.C, p, cells.begin, cells.stop, cells.X, keys[rows])
        progress("queries searched", min(i + SEARCH_BLOCK, Q.n), Q.n)

    def similarities():
        D, I = _best_of(keys, Q, X, k, q_number=order, x_number=cells.order)
        return D, I, {"recall": sample.recall(D[sample.number]), "nprobe": p, "exact": False}

    return similarities


def cells_of_index(index):
    """(centroids float32 (nlist, d), cell of each vector int32 (n,)) of an IVF index."""
    cell = np.full(index.ntotal, -1, np.int32)
    lists = index.invlists
    for c in range(index.nlist):
        size = lists.list_size(c)
        if size:
            ids = lists.get_ids(c)
            number = faiss.rev_swig_ptr(ids, size)
            if number.min() < 0 or number.max() >= index.ntotal:
                raise ValueError(f"the index numbers its {index.ntotal} vectors up to {number.max()}")
            cell[number] = c
            lists.release_ids(c, ids)
    if (cell < 0).any():
        raise ValueError(f"the index has no vector number {np.argmax(cell < 0)}")
    return np.ascontiguousarray(index.quantizer.reconstruct_n(0, index.nlist)), cell
