"""Exact k-nearest-neighbour search by inner product, by comparing all with all, and exact insertion into graphs.

Neighbour lists are pairs (D float32 (n, k), I int32 (n, k)): inner products and row numbers, best first; where there
are fewer than k neighbours, I is -1 and D is -inf. Negative similarities are neighbours like any other. Vectors `x`
are a float32 array (n, d), L2-normalised by the caller, or Vectors (lowshot/cells.py) over files and arrays.
`progress` is called with (what, done, total); script.show_progress() makes such a function.

    exact_knn(xq, x, k) -> D, I
    cross_insert(x_new, x, D, I) -> D_new, I_new            D, I of the existing nodes change

Where x are Vectors with a GPU as their `device`, that does the comparisons where they are many.
"""
import numpy as np

from graph_utils import neighbours as nb
from lowshot import gpu_search, machine
from lowshot.cells import BLOCK, as_vectors
from lowshot.features import spread_rows
from lowshot.script import silent

EXACT_BELOW = 1 << 17       # sets smaller than this are searched exactly
SPARE, SHARE_SPARE = 34, 4  # candidates kept beyond k, or a quarter of k where that is more, that prove by their distance
                            # that the k best are exact
MANY_SPARE = 16 * SPARE     # the same for few queries among many vectors
BYTES_FROM = 1 << 14        # vectors from which all are compared in bytes, where these leave few in doubt,
BYTES_SPARE = 2             # with so many times as many candidates beyond k,
BYTES_DOUBT = .02           # at most this share
BYTES_SAMPLE = 500          # of some of them
INSERTED_SPARE = 6 * SPARE  # the same for new nodes, by products of bytes, which prove less: at least, or k
FEW_INSERTED = 32 * SPARE   # and at the most, where new nodes are few
ALL_INSERTED = 1 << 20      # candidates of all new nodes together, between these
FLOAT32_BLOCK = 1 << 13     # vectors that are compared in float32 at a time
ERROR_OF_SUMS = 4e-5        # of products of unit vectors in float32, relative: the bound of 670 columns, for fewer as well
LOOKED_UP = 1 << 24         # numbers in the vectors of candidates that are read from a file at a time
ON_GPU = 1 << 30            # comparisons from which a GPU is asked
ALL_ON_GPU = 1 << 48        # comparisons for which other ways than comparing all are not better there: 7 minutes on an H200
FLOAT32_ON_GPU = 1 << 17    # queries that are compared in float32 there while the vectors are read once
MANY_ON_GPU = 16            # times as many candidates as first, where these leave doubt


def all_on_gpu(nq, n, d, device, same=False):
    """Whether `device` is a GPU, and compares so many queries with all of n vectors sooner than other ways find the nearest.
    same: these are the same."""
    return device is not None and nq * n <= ALL_ON_GPU and gpu_search.fits(n if same else nq + n, d, device)


def compares_all(nq, n, d, device):
    """Whether so many queries are compared with all of n vectors: where these are few, or `device` is a GPU that is quick at
    it."""
    return n < EXACT_BELOW or all_on_gpu(nq, n, d, device)


def _on_gpu(Q, X, same=False):
    return (Q.n * X.n >= ON_GPU and max(Q.longest, X.longest) <= gpu_search.LONGEST
            and all_on_gpu(Q.n, X.n, X.d, X.device, same))


def spare_of(k, in_bytes=False):
    """Candidates that are kept beyond k."""
    return max(SPARE, k // SHARE_SPARE) * (BYTES_SPARE if in_bytes else 1)


def exact_knn(xq, x, k, progress=silent, same=False, spare=None):
    """The k vectors of x with the highest inner product with each of xq, by comparing them all.

    Candidates come from products in bfloat16, in bytes with `same` where these do, or in float16 on the GPU of x; they are
    compared in float32, and where the errors of these could hide a better one the row is computed again in float32. same: xq and
    x are the same vectors, and each is in its own list. spare: candidates beyond k, spare_of() if None; with more of them fewer
    rows are computed again. Memory: x is read in blocks; queries in bfloat16 and 8 bytes per candidate, with `same`
    memory_of_self(), and all vectors in float32 where most are in doubt; beside a GPU that of the result.
    Returns D float32 (nq, k), I int32 (nq, k).
    """
    Q, X = as_vectors(xq), as_vectors(x)
    if Q.d != X.d:
        raise ValueError(f"queries have {Q.d} columns, vectors {X.d}")
    if not Q.n or not X.n:
        return np.full((Q.n, k), -np.inf, np.float32), np.full((Q.n, k), -1, np.int32)
    if _on_gpu(Q, X, same):
        return _exact_on_gpu(Q, X, k, progress, same)
    in_bytes = same and _bytes_tell_apart(X, k)
    keys, error = candidates_for(Q, X, k + (spare or spare_of(k, in_bytes)), progress, same,
                                 nb.to_bytes if in_bytes else nb.to_bfloat16)
    D, I, unsure = best_and_unsure(keys, error, Q, X, k, same)
    if same and len(unsure) > Q.n / 2:
        del keys, D, I              # which others take the place of, as do the vectors
        X.release()
        keys = nb.search_self(Q.converted(nb.to_float32, 0, Q.n), min(k + spare_of(k), X.n), lambda done: progress(
            "pairs of vectors compared in float32", done ** 2, Q.n ** 2))
        return best_of(keys, Q, X, k, same)
    return _in_float32(D, I, unsure, Q, X, k, progress, same)


def memory_of_self(n, d, k):
    """Bytes that exact_knn() takes to compare n vectors with themselves, but for these and the result, at the most."""
    in_bytes = 4 * n * nb.words_of_bytes(d) + 28 * n * (k + spare_of(k, True)) if n >= BYTES_FROM else 0
    return max(in_bytes, 4 * n * nb.words(d) + 28 * n * (k + spare_of(k)))


def _bytes_tell_apart(X, k):
    """Whether products in bytes leave few of the vectors in doubt, as some of them tell."""
    if X.n < BYTES_FROM:
        return False
    some = as_vectors(X.scaled_rows(spread_rows(X.n, BYTES_SAMPLE)))
    keys, error = candidates_for(some, X, k + spare_of(k, True), silent, False, nb.to_bytes)
    unsure = best_and_unsure(keys, error, some, X, k)[2]
    X.release()
    return len(unsure) <= BYTES_DOUBT * some.n


def candidates_for(Q, X, K, progress, same, convert):
    """(keys, error): the K best by products in bfloat16 or bytes, as `convert` makes them, and bounds of the errors of these,
    float32 (Q.n,)."""
    lost = np.empty(Q.n, np.float32)
    queries = np.concatenate([Q.converted(convert, i, j, residual=lost[i:j]) for i, j in Q.blocks()])
    K = min(K, X.n)
    if same:
        lost_most = float(lost.max())
        keys = nb.search_self(queries, K, lambda done: progress("pairs of vectors compared", done ** 2, Q.n ** 2))
    else:
        lost_most, keys = 0.0, np.zeros((Q.n, K), np.int64)
        for i, j in X.blocks():
            residual = np.empty(j - i, np.float32)
            nb.search_all(queries, X.converted(convert, i, j, residual=residual), K, keys, i)
            lost_most = max(lost_most, float(residual.max()))
            progress("vectors compared with all queries", j, X.n)
    return keys, _error(lost, lost_most, Q, X)


def _in_float32(D, I, unsure, Q, X, k, progress, same, on_gpu=False):
    """exact_knn() again, in float32 throughout, for a few queries that are `unsure` in D and I, which change in place."""
    step = FLOAT32_ON_GPU if on_gpu else 4096
    for i in range(0, len(unsure), step):
        rows = unsure[i:i + step].astype(np.int32)
        x = Q.scaled_rows(rows)
        keys = gpu_search.near_in_float32(x, X, k + gpu_search.SPARE) if on_gpu else _float32_candidates(x, X, k)
        best_of(keys, Q, X, k, same, rows, out=(D, I), mapped=on_gpu)
        progress("queries compared in float32", i + len(rows), len(unsure))
    return D, I


def best_and_unsure(keys, error, Q, X, k, same=False, rows=None, **where):
    """(D, I) of the k best of each list of candidates, and those lists that may lack a better one than these. keys: the best
    by products that err by `error` (n,) at the most; they are changed. rows: the queries, all if None; out, mapped: as of
    best_of()."""
    worst = nb.worst_products(keys)
    _leave_possible(keys, k, error)
    D, I = best_of(keys, Q, X, k, same, rows, **where)
    last = D[:, -1] if rows is None else D[rows, -1]
    return D, I, np.flatnonzero(last < worst + error) if keys.shape[1] < X.n else np.empty(0, np.int64)


def _exact_on_gpu(Q, X, k, progress, same, q=None, x=None):
    """exact_knn() by a GPU: it finds candidates, and more of them for queries that these leave in doubt. q, x: Q and X there,
    if they are."""
    x = x or gpu_search.Rounded(X, X.device)
    q = q or (x if same else gpu_search.Rounded(Q, X.device))
    D, I = np.empty((Q.n, k), np.float32), np.empty((Q.n, k), np.int32)
    queries, K = None, k + gpu_search.SPARE
    for _ in range(2):
        unsure, done, total = [], 0, Q.n if queries is None else len(queries)
        for rows, keys, error in gpu_search.near(q, x, K, q.errors_with(x, _error), queries):
            unsure.append(rows[best_and_unsure(keys, error, Q, X, k, same, rows, out=(D, I), mapped=True)[2]])
            done += len(rows)
            progress("queries compared with all vectors", done, total)
        queries, K = np.concatenate(unsure), MANY_ON_GPU * K
        if not len(queries):
            break
    del q, x
    _in_float32(D, I, queries, Q, X, k, progress, same, on_gpu=True)
    gpu_search.release()
    return D, I


def _error(lost, lost_most, Q, X):
    """Bounds of the errors of products of rounded vectors, for each of the first ones:
    |<q, x> - <q', x'>| <= |q - q'| |x'| + |q| |x - x'|, and that of float32 sums of as many terms as there are columns."""
    sums = np.float32(max(ERROR_OF_SUMS, Q.d * 2.0 ** -24))
    return lost * (X.longest + lost_most) + Q.longest * lost_most + sums * Q.longest * X.longest


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


def best_of(keys, Q, X, k, same=False, q_number=None, x_number=None, out=None, mapped=False):
    """nb.exact_products() of candidates all over the file of X. They are read from it, a part after the other: a map of
    the file would keep in memory what is near them as well. Files of few vectors, and those whose vectors are all looked up
    (same), are mapped; others if `mapped`, which is quicker where there is memory."""
    D, I = out or (np.empty((Q.n, k), np.float32), np.empty((Q.n, k), np.int32))
    if same or mapped or X.in_memory or X.n < EXACT_BELOW:
        return nb.exact_products(keys, Q.arrays, X.arrays, k, q_number, x_number, Q.scale, X.scale, same, D, I)
    step = max(1, LOOKED_UP // (X.d * keys.shape[1]))
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


def products_of_all(vectors, candidates, D, I, progress, say, known=0, x_number=None):
    """exact_products() of all nodes with their candidates, themselves included.

    candidates: function of nodes int32 (m,) that gives numbers int32 (m, K), -1 for none; it may look into I at these nodes.
    x_number int32 (n,): original numbers of candidates, and an order of nodes in which these are near each other.
    D, I (n, k) change, of which the first `known` rows hold products already.
    """
    if not vectors.fit(D.nbytes + I.nbytes):
        say("vectors are read in parts, as the file of them does not fit in the memory that is free")
        products_in_parts(vectors, candidates, D, I, progress, known, x_number)
        return
    n, k = D.shape
    for i in range(0, n, BLOCK):
        nodes = np.arange(i, min(i + BLOCK, n), dtype=np.int32) if x_number is None else x_number[i:i + BLOCK]
        numbers = candidates(nodes)
        nb.exact_products(nb.make_keys(np.zeros(numbers.shape, np.float32), numbers), vectors.arrays, vectors.arrays, k, nodes,
                          x_number, vectors.scale, vectors.scale, True, D, I, known=known)
        progress("nodes' similarities computed", i + len(nodes), n)


def products_in_parts(vectors, candidates, D, I, progress, known=0, x_number=None):
    """products_of_all() where the file of the vectors does not fit in memory: candidates are all over it, so it is read from end
    to end for as many nodes at a time as there is memory for."""
    n, K, free = vectors.n, candidates(np.arange(1, dtype=np.int32)).shape[1] + 1, machine.available_memory()
    nodes = max(BLOCK, int(.4 * free / (4 * vectors.d + 8 * K)))
    part = max(BLOCK, int(.2 * free / (4 * vectors.d)))
    for i in range(0, n, nodes):
        j = min(i + nodes, n)
        lists = np.empty((j - i, K), np.int32)
        for a in range(i, j, BLOCK):
            own = np.arange(a, min(a + BLOCK, j), dtype=np.int32)
            found = candidates(own)
            if found.max(initial=-1) >= n:
                raise ValueError(f"a list of candidates is damaged, no vector is {found.max()}")
            if x_number is not None:
                found = np.where(found < 0, -1, x_number[found])
            lists[own - i, :-1] = found
            lists[own - i, -1] = np.where((found == own[:, None]).any(axis=1), -1, own)
        Q, products = vectors.stretch(i, j), np.empty(lists.shape, np.float32)
        for a in range(0, n, part):
            b = min(a + part, n)
            nb.products_in_part(lists, Q, vectors.stretch(a, b), a, products, vectors.factors(slice(i, j)),
                                vectors.factors(slice(a, b)))
            progress("nodes' similarities computed", i + (j - i) * b // n, n)
        nb.best_by_products(lists, products, i, D[i:j], I[i:j], min(max(known - i, 0), j - i))
        del lists, Q, products          # before others take their place


def _float32_candidates(xq, X, k):
    """Keys of the best by products in float32, some more than k, int64 (len(xq), .)."""
    queries = nb.to_float32(xq)
    keys = np.zeros((len(xq), min(k + spare_of(k), X.n)), np.int64)
    for i in range(0, X.n, FLOAT32_BLOCK):
        j = min(i + FLOAT32_BLOCK, X.n)
        nb.search_all(queries, X.converted(nb.to_float32, i, j), keys.shape[1], keys, i)
    return keys


def worst_neighbours(D, I):
    """The last similarity of each neighbour list, float32 (n,); -inf where there is room for more."""
    return np.where(I[:, -1] < 0, np.float32(-np.inf), D[:, -1])


def cross_insert(x_new, x, D, I, progress=silent, worst=None, replace=None):
    """Add m new nodes to a graph of n existing ones, exactly; the existing vectors are read once, and again for new nodes whose
    neighbours the first products leave in doubt.

    x_new (m, d), numbered from n on; x: the n existing nodes, with lists D, I (n, k), which new nodes enter where they are
    better than the last neighbour. replace: called with (rows, D, I), the numbers of nodes whose lists change
    and their new lists; None: these are put in place. worst: worst_neighbours(D, I), if they are known; then of D and I only
    those lists are looked at that change, or nearly do. Returns the lists of the new nodes, (m, k), among existing and new
    nodes. Memory: that of exact_knn(x_new, x_new, k, same=True), or 8 bytes for each of k + 204 candidates,
    2 k where k is larger, or up to k + 1088 where new nodes are few; and blocks of x.
    """
    def in_place(rows, changed_D, changed_I):
        D[rows], I[rows] = changed_D, changed_I

    X = as_vectors(x)
    new = as_vectors(x_new, X.device)
    n, k = I.shape
    D_new, I_new = exact_knn(new, new, k, same=True)
    I_new[I_new >= 0] += n
    m, numbers = new.n, np.arange(n, n + new.n, dtype=np.int32)
    if not m or not X.n:
        return D_new, I_new
    replace = replace or in_place
    worst = worst_neighbours(D, I) if worst is None else worst

    def enter(keys, error, x, scale, i):
        rows, found_D, found_I = _entering(keys, error, x, scale, new, k)
        found_I[found_I >= 0] += n
        rows += i
        merged_D, merged_I = nb.merge_lists(D[rows], I[rows], found_D, found_I, k, rows.astype(np.int32))
        entered = (merged_I >= n).any(axis=1)
        replace(rows[entered], merged_D[entered], merged_I[entered])

    if _on_gpu(new, X):
        existing, on_gpu = (gpu_search.Rounded(v, X.device) for v in (X, new))
        for rows, keys, error in gpu_search.near(existing, on_gpu, k + gpu_search.SPARE,
                                                 existing.errors_with(on_gpu, _error)):
            i, j = int(rows[0]), int(rows[-1]) + 1
            keys[nb.similarities(keys) <= (worst[i:j] - error)[:, None]] = 0
            enter(keys, error, X.stretch(i, j), X.factors(slice(i, j)), i)
            progress("nodes compared with new ones", j, X.n)
        return nb.merge_lists(D_new, I_new, *_exact_on_gpu(new, X, k, progress, False, on_gpu, existing), k, numbers)
    new_lost = np.empty(m, np.float32)
    queries = np.concatenate([new.converted(nb.to_bytes, i, j, residual=new_lost[i:j]) for i, j in new.blocks()])
    lost_most = float(new_lost.max())
    spare = max(min(ALL_INSERTED // m, FEW_INSERTED), INSERTED_SPARE, k)
    keys_new = np.zeros((m, min(k + spare, X.n)), np.int64)
    X_lost_most = 0.0
    for i, j in X.blocks():
        lost, x, scale = np.empty(j - i, np.float32), X.stretch(i, j), X.factors(slice(i, j))
        block = nb.to_bytes(x, scale, residual=lost)
        X_lost_most = max(X_lost_most, float(lost.max()))
        error = _error(lost, lost_most, X, new)
        bound = worst[i:j] - error
        keys = np.repeat(nb.make_keys(bound, np.full(j - i, nb.NONE))[:, None], min(k + spare_of(k), m), axis=1)
        nb.search_all(queries, block, keys_new.shape[1], keys_new, i, insert=(keys, bound))
        enter(keys, error, x, scale, i)
        progress("nodes compared with new ones", j, X.n)
    found_D, found_I, unsure = best_and_unsure(keys_new, _error(new_lost, X_lost_most, new, X), new, X, k)
    found_D[unsure], found_I[unsure] = exact_knn(new.scaled_rows(unsure), X, k, spare=MANY_SPARE)
    return nb.merge_lists(D_new, I_new, found_D, found_I, k, numbers)


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
    D[unsure], I[unsure] = exact_knn(x[unsure] if scale is None else x[unsure] * scale[unsure, None], new, k)
    return rows, D, I
