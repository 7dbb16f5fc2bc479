"""K-nearest-neighbour search and graphs by inner product: shapes, dtypes and allocation for neighbours.cpp.

Vectors to search among are held in bytes (`to_bytes`), or in bfloat16 (`to_bfloat16`) where that is too coarse, as
int32 arrays (n, words); the number of words tells which, as only vectors in bytes end in a scale. Where even bfloat16
is too coarse they are float32 arrays, padded (`to_float32`). Candidate lists are int64 arrays (n, K) of keys:
similarity and neighbour number in one integer, the greater the better, 0 for none, in no order. `exact_products`
turns them into float32 similarities and numbers.
"""
import numpy as np

from graph_utils import core
from graph_utils.product import _check, _check_optional, _check_range, check_permutation

products = core.products
use_products = core.use_products

NONE = 0x7fffffff       # the number that no vector has
NEW = np.int64(1)       # bit of a key: new to the next round of neighbours-of-neighbours


def numbers(keys):
    """Neighbour numbers of keys, int64, -1 for none."""
    low = (keys & 0xffffffff) >> 1
    return np.where(low == 0, -1, NONE - low)


def listed(keys):
    """Numbers of keys as rounds of neighbours-of-neighbours have them, int32: -1 for none, the top bit set in what is new."""
    return (numbers(keys) | (keys & NEW) << 31).astype(np.int32)


def similarities(keys):
    """Similarities of keys (those that they were found with), float32, -inf for none."""
    bits = (keys >> 32) & 0xffffffff
    bits = np.where(bits & 0x80000000, bits ^ 0x80000000, bits ^ 0xffffffff).astype(np.uint32)
    return np.where(keys == 0, np.float32(-np.inf), bits.view(np.float32))


def make_keys(D, I):
    """Keys, int64, of similarities D float32 and numbers I, -1 for none; NONE for a bar, which others have to pass."""
    bits = np.ascontiguousarray(D, np.float32).view(np.int32).astype(np.int64)
    bits = np.where(bits < 0, ~bits & 0xffffffff, bits | 0x80000000)
    return np.where(I < 0, 0, (bits << 32) | ((NONE - I.astype(np.int64)) << 1))


def words(d):
    """Words of a bfloat16 vector of d elements: padded to a multiple of 32 elements."""
    return max(1, -(-d // 32)) * 16


def words_of_bytes(d):
    """Words of a vector of d elements in bytes: padded to a multiple of 64 elements, and the scale."""
    return max(1, -(-d // 64)) * 16 + 1


def to_bytes(x, scale=None, residual=None):
    """x float32 (n, d), finite, each row times scale (n,) if given, as int32 (n, words_of_bytes(d)).

    A row has 255 levels, evenly spaced from its largest element to the opposite of it. Products err by about .0006 of the
    norms where elements are alike in size. residual: as of to_bfloat16.
    """
    return _rounded(core.to_bytes, words_of_bytes(x.shape[1]), x, scale, residual)


def _rounded(convert, words, x, scale, residual):
    x = np.ascontiguousarray(x, np.float32)
    n, d = x.shape
    out = np.empty((n, words), np.int32)
    for array, name in ((scale, "scale"), (residual, "residual")):
        _check_optional(array, np.float32, (n,), name)
    convert(n, d, x, scale, words - words % 16, out, residual)
    return out


def _words(X, name, like=None):
    """Vectors (n, words) as int32; ValueError if they are not held as `like` is."""
    dtype = np.float32 if (X if like is None else like).dtype == np.float32 else np.int32
    return _check(X, dtype, (None, None if like is None else like.shape[1]), name).view(np.int32)


def _format(X):
    """(words without the scale, bits of an element) of vectors (n, words)."""
    width = X.shape[1]
    if width % 16 > (X.dtype != np.float32):
        raise ValueError(f"vectors of {width} words: a multiple of 16 expected, and one more in bytes")
    return width - width % 16, 32 if X.dtype == np.float32 else 8 if width % 16 else 16


def to_bfloat16(x, scale=None, residual=None):
    """x float32 (n, d), each row times scale (n,) if given, as int32 (n, words(d)).

    residual: float32 (n,) that receives the L2 norm of what rounding took from each row.
    """
    return _rounded(core.to_bfloat16, words(x.shape[1]), x, scale, residual)


def to_float32(x, scale=None):
    """x float32 (n, d), each row times scale (n,) if given, with zeros to a multiple of 16 columns."""
    n, d = x.shape
    out = np.zeros((n, max(1, -(-d // 16)) * 16), np.float32)
    np.multiply(x, 1 if scale is None else scale[:, None], out=out[:, :d])
    return out


FORMATS = {"bytes": to_bytes, "bfloat16": to_bfloat16, "float32": to_float32}


def search_all(Q, X, K, keys=None, first=0, insert=None):
    """The K best of X (nb, words) for each of Q (nq, words), numbered from `first`, joined with `keys`. Returns keys.

    Both are held in the same way.

    insert: None, or (x_keys int64 (nb, L), x_worst float32 (nb,)): the queries enter, under the numbers of their rows,
    the lists x_keys of the rows of X, in the place of the worst, or of the first of the worst. x_worst are the worst
    products in x_keys, see worst_products; both are updated.
    """
    nq = len(Q)
    keys = np.zeros((nq, K), np.int64) if keys is None else _check(keys, np.int64, (nq, K), "keys")
    x_keys, x_worst = insert or (None, None)
    if insert:
        _check(x_keys, np.int64, (len(X), None), "x_keys")
        _check(x_worst, np.float32, (len(X),), "x_worst")
    core.search_all(nq, _words(Q, "Q"), len(X), _words(X, "X", Q), *_format(Q), first, K, keys,
                    x_keys.shape[1] if insert else 0, x_keys, x_worst)
    return keys


def search_self(X, K, progress=None, block=1 << 14):
    """The K best of X (n, words) for each of X itself: search_all(X, X, K), with half the products.

    progress: called with the number of rows that have been compared with all before them. Memory: 20 K bytes per row
    besides the keys, or 8 K + 128 where K is small. Returns keys, int64 (n, K).
    """
    n, words = len(X), _words(X, "X")
    keys = np.zeros((n, K), np.int64)
    for i in range(0, n, block):
        core.search_self(i, min(i + block, n), words, *_format(X), K, keys)
        if progress is not None:
            progress(min(i + block, n))
    return keys


def _listed(group, listed, nq):
    """(group, number of groups, offsets, rows) of what is listed for groups of queries, see search_near."""
    if isinstance(listed, np.ndarray):
        _check(listed, np.int32, (None, None), "listed")
        listed = np.arange(len(listed) + 1) * listed.shape[1], listed.ravel()
    offsets, rows = listed
    _check(rows, np.int32, (None,), "listed")
    _check(offsets, np.int64, (None,), "offsets")
    if not len(offsets) or offsets[-1] > len(rows):
        raise ValueError(f"offsets of listed vectors end at {offsets[-1:]}, {len(rows)} are listed")
    return _check(group, np.int32, (nq,), "group"), len(offsets) - 1, offsets, rows


def search_near(Q, group, listed, X, K, order=None):
    """The K best for each of Q (nq, words) among those rows of X (nb, words) that are listed for its group.

    group int32 (nq,); listed: int32 (ngroup, m), distinct rows of X; or (offsets int64 (ngroup + 1,), int32): those for
    group g from offsets[g] to offsets[g + 1] - 1. order int32 (nq,), a permutation: then group[i] is that of row order[i] of
    Q; one that puts rows of a group together is the quick one. Returns keys, int64 (nq, K), in the order of Q.
    """
    nq = len(Q)
    keys = np.zeros((nq, K), np.int64)
    if order is not None:
        check_permutation(_check(order, np.int32, (nq,), "order"), "order")
    core.search_near(nq, _words(Q, "Q"), order, *_format(Q), *_listed(group, listed, nq), len(X), _words(X, "X", Q), K, keys)
    return keys


def group_sums(x, order, end):
    """Sums of rows of x float32 (n, d), float32 (ngroup, d): those of group g are order[end[g - 1]:end[g]], order int32."""
    n, d = _check(x, np.float32, (None, None), "x").shape
    out = np.empty((len(end), d), np.float32)
    core.group_sums(n, d, x, len(_check(order, np.int32, (None,), "order")), order, len(end),
                    _check(end, np.int64, (None,), "end"), out)
    return out


def search_cells(Q, centroids, nprobe, begin, end, X, keys, insert=None, near=None, before=None):
    """Join to keys (nq, K) the best of rows begin[c]..end[c]-1 of X for the nprobe cells c that are nearest to each
    query, and of more cells until they hold K vectors.

    insert: None, or (middle int64 (nlist,), numbers int32 (nq,), x_keys int64 (n, K), x_worst float32 (n,)): the queries
    enter, under these numbers, the lists x_keys of the rows begin[c]..middle[c]-1 that they are compared with. x_worst
    are the worst products in x_keys, see worst_products; both are updated.
    near: None, or (own int32 (nq,), listed int32 (nlist, m)): a cell near each query, and m >= nprobe near each cell. The
    nearest to a query are then looked for among those listed for its own alone; successive queries should have the same.
    before: None, or (nprobe, near) of a search whose cells are left out. keys may hold vectors of the others as well, and what
    enters is marked as new (NEW). Not with insert.
    """
    nq = len(Q)
    nlist, K = len(centroids), keys.shape[1]
    middle, numbers, x_keys, x_worst = insert or (None,) * 4
    for rows, name in ((begin, "begin"), (end, "end"), *([(middle, "middle")] if insert else [])):
        _check_range(_check(rows, np.int64, (nlist,), name), 0, len(X) + 1, name)
    if insert:
        _check_range(_check(numbers, np.int32, (nq,), "numbers"), 0, NONE, "numbers")
        _check(x_keys, np.int64, (len(X), K), "x_keys")
        _check(x_worst, np.float32, (len(X),), "x_worst")

    def cells_near(near, nprobe):
        if near is None:
            return None, None, None
        _check(near[1], np.int32, (nlist, None), "listed")
        if near[1].shape[1] < min(nprobe, nlist):
            raise ValueError(f"{near[1].shape[1]} cells are listed for each, fewer than nprobe {nprobe}")
        own, _, offsets, listed = _listed(*near, nq)
        return own, offsets, listed

    nprobe_before, near_before = before or (0, None)
    core.search_cells(nq, _words(Q, "Q"), *_format(Q), nlist, _words(centroids, "centroids", Q), *cells_near(near, nprobe),
                      nprobe, *cells_near(near_before, nprobe_before), nprobe_before, begin, end, _words(X, "X", Q), K,
                      _check(keys, np.int64, (nq, K), "keys"), middle, numbers, x_keys, x_worst)


def worst_products(keys):
    """The worst product in each list of keys (n, K), float32 (n,): -inf where it is not full."""
    worst, block = np.empty(len(keys), np.float32), 1 << 16
    for i in range(0, len(keys), block):
        # the order of keys is that of integers without sign
        worst[i:i + block] = similarities(keys[i:i + block].view(np.uint64).min(axis=1).view(np.int64))
    return worst


def known_lists(X, order, position, I, margin, keys):
    """Fill keys (n, K) with the products of known neighbours I int32 (n0, k <= K) of the first n0 nodes.

    order, position: int32 (n,), the node in each row of X, and the row of each node; neighbours are nodes in I, and rows
    in the keys. Places after k neighbours get a bar, `margin` below the worst of them.
    """
    n = len(X)
    I = np.ascontiguousarray(I)
    for array, dtype, shape, name in ((order, np.int32, (n,), "order"), (position, np.int32, (n,), "position"),
                                      (I, np.int32, (None, None), "I"), (keys, np.int64, (n, None), "keys")):
        _check(array, dtype, shape, name)
    _check_range(order, 0, n, "order")
    _check_range(position, 0, n, "position")
    core.known_lists(n, _words(X, "X"), *_format(X), order, position, len(I), I.shape[1], I, margin, keys.shape[1], keys)


def descent_round(X, keys, R=32, seed=0, progress=None, part=None, empty=np.empty, block=1 << 16, started=None):
    """One round of neighbours-of-neighbours on the lists of all nodes, in place (NN-descent).

    For each node, its neighbours and up to R of its reverse neighbours are compared with each other, where at least
    one of the two entered its list since the last round. progress: called with the number of nodes done.
    part: work on the lists of so many nodes at a time, which are the same in the end; keys may then be a map of a file, and
    what is read in order as well: empty(shape, dtype) makes these arrays. started: called with the lists that the round begins
    with, int32 (n, K), in the form of listed(); they stay as they are while it lasts.
    Returns the number of insertions, which depends on when threads look, as the lists do not. Memory: 12 bytes per node, 8
    per entry of keys of what is read in order, and 8 per entry of a part.
    """
    n, K = keys.shape
    words = _words(X, "X")
    _check(keys, np.int64, (len(X), K), "keys")
    lists = empty((n, K), np.int32)
    worst = np.empty(n, np.float32)
    core.start_round(n, K, keys, lists, worst)
    if started is not None:
        started(lists)
    step = part or max(n, 1)
    inserted, parts = 0, [slice(i, min(i + step, n)) for i in range(0, n, step)]
    offsets = np.empty(n + 1, np.int64)
    reverse = empty(core.reverse_offsets(n, K, lists, offsets), np.int32)
    for nodes in parts:
        first, last = offsets[[nodes.start, nodes.stop]]
        own = reverse if part is None else np.empty(last - first, np.int32)     # written in no order: not to a file
        core.reverse_lists(n, K, lists, nodes.start, nodes.stop, offsets[nodes.start:nodes.stop + 1], own)
        if part is not None:
            reverse[first:last] = own
        del own
    for done, targets in enumerate(parts):
        own = keys if part is None else np.array(keys[targets])
        for i in range(0, n, block):
            j = min(i + block, n)
            inserted += core.join_range(n, words, *_format(X), K, lists, offsets[i:j + 1], reverse, R, seed, i, j,
                                        targets.start, targets.stop, own, worst[targets])
            if progress is not None:
                progress((n * done + j) // len(parts))
        if part is not None:
            keys[targets] = own
        del own
    return inserted


def read_rows(path, rows, nrow, out):
    """Read rows of a headerless file of float32 into out (len(rows), d), those numbered 0 .. nrow - 1; the others of out
    stay as they are. ValueError where the file is too short."""
    rows = np.ascontiguousarray(rows, np.int64)
    _check(out, np.float32, (len(rows), None), "out")
    with open(path, "rb", buffering=0) as f:
        try:
            core.read_rows(f.fileno(), nrow, len(rows), rows, out.shape[1], out)
        except ValueError as e:
            raise ValueError(f"{path} is truncated: {e}")
        except OSError as e:
            raise OSError(f"{path}: {e}")


def _two_parts(parts, name, d=None):
    """Vectors of d elements as one or two float32 arrays, the second's rows numbered after the first's."""
    parts = [parts] if isinstance(parts, np.ndarray) else list(parts)
    if len(parts) not in (1, 2):
        raise ValueError(f"{name}: one or two arrays expected, found {len(parts)}")
    for part in parts:
        _check(part, np.float32, (None, d or parts[0].shape[1]), name)
    return parts[0], parts[1] if len(parts) > 1 else None, sum(map(len, parts))


def exact_products(keys, queries, base, k, q_number=None, x_number=None, q_scale=None, x_scale=None, same=False,
                   D=None, I=None, known=0):
    """The k best of each list of keys (m, K), by float32 inner products, best first.

    queries, base: float32 (., d), finite, or pairs of such arrays that follow each other; q_scale, x_scale: factors of their
    rows. q_number int32 (m,): the query and the row of D, I of each list (default: in order). x_number int32: original
    numbers of the numbers in the keys. same: queries and base are the same; each is in its own list, and first in it
    where none is nearer by more than rounding. known: rows of D, I before this one hold exact products already, which are
    looked up there, not computed again. Returns D float32, I int32, with as many rows as there are queries; those of no list
    are as they were.
    """
    m, K = keys.shape
    Q0, Q1, nq = _two_parts(queries, "queries")
    X0, X1, nb = _two_parts(base, "base", Q0.shape[1])
    if same and nq != nb:
        raise ValueError(f"{nq} queries and {nb} base vectors are not the same")
    if D is None:
        D, I = np.empty((nq, k), np.float32), np.empty((nq, k), np.int32)
    _check(D, np.float32, (nq, k), "D")
    _check(I, np.int32, (nq, k), "I")
    for array, dtype, length, name in ((q_number, np.int32, m, "q_number"), (x_number, np.int32, None, "x_number"),
                                       (q_scale, np.float32, nq, "q_scale"), (x_scale, np.float32, nb, "x_scale")):
        _check_optional(array, dtype, (length,), name)
    nnumber = nb if x_number is None else len(x_number)
    core.exact_products(m, K, _check(keys, np.int64, (m, K), "keys"), q_number, x_number, nnumber,
                        Q0.shape[1], Q0, len(Q0), Q1, nq, q_scale, X0, len(X0), X1, nb, x_scale, bool(same), k, known, D, I)
    return D, I


def products_in_part(numbers, Q, X, first, products, q_scale=None, x_scale=None):
    """Products of each of Q float32 (m, d) with those of its candidates, numbers int32 (m, K), that are in X: vectors
    float32 (n, d) numbered from `first` on. They go to their places in products float32 (m, K). q_scale, x_scale: factors."""
    (m, K), (n, d) = numbers.shape, X.shape
    for array, dtype, shape, name in ((numbers, np.int32, (m, K), "numbers"), (Q, np.float32, (m, d), "Q"),
                                      (X, np.float32, (n, d), "X"), (products, np.float32, (m, K), "products")):
        _check(array, dtype, shape, name)
    for scale, length, name in ((q_scale, m, "q_scale"), (x_scale, n, "x_scale")):
        _check_optional(scale, np.float32, (length,), name)
    core.products_in_part(m, K, numbers, d, Q, q_scale, first, n, X, x_scale, products)


def best_by_products(numbers, products, first, D, I, known=0):
    """What exact_products(same=True) does, for nodes first, first + 1, ..., given the products of all their candidates.

    numbers int32, products float32 (m, K), negative numbers are none, each node is in its own list; D, I (m, k): rows of these
    nodes alone, of which the first `known` hold exact products that count."""
    (m, K), k = numbers.shape, I.shape[1]
    for array, dtype, shape, name in ((numbers, np.int32, (m, K), "numbers"), (products, np.float32, (m, K), "products"),
                                      (D, np.float32, (m, k), "D"), (I, np.int32, (m, k), "I")):
        _check(array, dtype, shape, name)
    core.best_by_products(m, K, numbers, products, first, known, k, D, I)


def merge_lists(D1, I1, D2, I2, k, own=None):
    """The k best of two neighbour lists per row, each best first with -1 at the end. own int32 (n,): the node of each row, which
    stays the first where the first list begins with it, as it does beside many copies. Returns D (n, k), I (n, k)."""
    n = len(I1)
    arrays = []
    for D, I in ((D1, I1), (D2, I2)):
        arrays += [np.ascontiguousarray(D, np.float32), np.ascontiguousarray(I, np.int32)]
        if len(D) != n or D.shape != I.shape:
            raise ValueError(f"lists of {len(I1)} and {len(I2)} rows, similarities {D.shape}, numbers {I.shape}")
    _check_optional(own, np.int32, (n,), "own")
    D, I = np.empty((n, k), np.float32), np.empty((n, k), np.int32)
    core.merge_lists(n, D1.shape[1], arrays[0], arrays[1], D2.shape[1], arrays[2], arrays[3], own, k, D, I)
    return D, I
