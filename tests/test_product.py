import mmap
import os

import numpy as np
import pytest

import graph_utils
from graph_utils import BestClasses, SymmetricGraph, aligned_zeros, mkl_product, neighbour_sums
from lowshot.file_arrays import scratch
from reference import random_graph, transition_matrix
from reference import top5 as slow_top5


def panel(rs, n, ncol):
    L = aligned_zeros((n, ncol))
    L[:] = rs.rand(n, ncol)
    return L


GRID = [(1, 1), (2, 5), (7, 3), (65, 30), (1025, 4), (2500, 30)]


@pytest.mark.parametrize("n,k", GRID)
@pytest.mark.parametrize("ncol", [16, 32, 48, 64])
def test_product_equals_dense(n, k, ncol):
    rs = np.random.RandomState(n + ncol)
    I = random_graph(rs, n, k)
    W = transition_matrix(I)
    L = panel(rs, n, ncol)
    scale = rs.rand(ncol).astype(np.float32)
    graph = SymmetricGraph(I)
    out = aligned_zeros((n, ncol))
    weights = graph.mass()
    colsum, weighted = graph.product(L, out, scale), graph.product(L, out, scale, weights=weights)
    expected = W @ L.astype(np.float64) * scale
    np.testing.assert_allclose(out, expected, rtol=1e-5)
    np.testing.assert_allclose(colsum, expected.sum(axis=0), rtol=1e-6)
    np.testing.assert_allclose(weights, W.sum(axis=0), rtol=1e-6)
    # the weighted sums are the column sums of the product after this one
    np.testing.assert_allclose(weighted, (W @ expected).sum(axis=0), rtol=1e-5)


@pytest.mark.parametrize("ncol", [16, 32, 48, 64])
def test_product_of_near_and_of_far_neighbours(tmp_path, ncol):
    """Blocks of rows whose neighbours have near numbers are computed in another way than those with far ones."""
    rs, n, k = np.random.RandomState(ncol), 40000, 6
    steps = np.array([rs.choice(60, k, replace=False) - 30 for _ in range(n)])
    steps[5000:20000] *= 600
    steps[:, 0] = np.where(rs.rand(n) < .5, 0, steps[:, 0])
    I = (np.arange(n)[:, None] + steps) % n
    I = np.where([[j in row[:at] for at, j in enumerate(row)] for row in I], -1, I).astype(np.int32)
    graph, L, out = SymmetricGraph(I), panel(rs, n, ncol), aligned_zeros((n, ncol))
    colsum = graph.product(L, out)
    expected, degree = np.zeros((n, ncol)), np.zeros(n)
    for column in I.T:
        i, j = np.flatnonzero(column >= 0), column[column >= 0]
        for a, b in ((i, j), (j, i)):
            np.add.at(expected, a, L[b])
            np.add.at(degree, a, 1)
    expected /= np.maximum(degree, 1)[:, None]
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(colsum, expected.sum(axis=0), rtol=1e-6)
    entries = scratch(str(tmp_path), graph.nnz, np.int32)
    none = np.empty(0, np.int32), np.empty(0, np.int32), np.empty(0, np.int8)
    in_file = SymmetricGraph.changed(graph.arrays, n, *none, empty=lambda shape, dtype: entries)
    threads, sums = graph_utils.get_num_threads(), []
    for number in (1, 2, 5):
        graph_utils.set_num_threads(number)
        found = aligned_zeros((n, ncol))
        sums.append(in_file.product(L, found))
        np.testing.assert_array_equal(found, out)
        np.testing.assert_array_equal(sums[-1], sums[0])
    graph_utils.set_num_threads(threads)
    np.testing.assert_allclose(sums[0], colsum, rtol=1e-6)


@pytest.mark.parametrize("ncol", [16, 48])
@pytest.mark.parametrize("n,mutual", [(200001, 0), (20001, 2000)])
def test_a_node_with_very_many_neighbours(ncol, n, mutual):
    """Equal numbers, whose sums in float drift away."""
    I = np.full((n, mutual + 1), -1, np.int32)
    I[:, 0] = 0                                 # node 0 is everybody's neighbour
    I[0, :] = np.arange(mutual + 1)             # and some are its own
    graph = SymmetricGraph(I)
    L, out = aligned_zeros((n, ncol)), aligned_zeros((n, ncol))
    L[:] = 0.1
    L[1:mutual + 1] = 0.7
    graph.product(L, out)
    singles, twice = n - 1 - mutual, 1 + mutual
    expected = (singles * 0.1 + 2 * (0.1 + 0.7 * mutual)) / (singles + 2 * twice)
    np.testing.assert_allclose(out[0], expected, rtol=5e-6)
    np.testing.assert_allclose(out[mutual + 1:], 0.1, rtol=1e-6)


@pytest.mark.parametrize("n,k", GRID)
def test_graph_structure(n, k):
    rs = np.random.RandomState(n)
    I = random_graph(rs, n, k)
    graph = SymmetricGraph(I)
    W = np.zeros((n, n))
    W[np.repeat(np.arange(n), np.diff(graph.indptr)), graph.indices] = graph.values()
    np.testing.assert_allclose(W, transition_matrix(I), rtol=1e-6)
    rank = rs.permutation(n).astype(np.int32)
    renumbered = SymmetricGraph(I, rank)
    V = np.zeros((n, n))
    V[np.repeat(np.arange(n), np.diff(renumbered.indptr)), renumbered.indices] = renumbered.values()
    np.testing.assert_array_equal(V[np.ix_(rank, rank)], W.astype(V.dtype))
    for i in range(n):      # each part of a row increases
        row = graph.indices[graph.indptr[i]:graph.indptr[i + 1]]
        for part in (row[:graph.nsingle[i]], row[graph.nsingle[i]:]):
            assert (np.diff(part) > 0).all()


def test_worked_by_hand():
    # 0 <-> 1 mutual, 2 -> 0, 3 has no neighbour and is nobody's
    I = np.array([[0, 1], [1, 0], [2, 0], [-1, -1]], np.int32)
    graph = SymmetricGraph(I)
    L = aligned_zeros((4, 16))
    L[0, 0], L[2, 1], L[3, 2] = 1, 1, 1
    out = aligned_zeros((4, 16))
    colsum = graph.product(L, out)
    # row 0 of W: 2 for itself, 2 for node 1, 1 for node 2
    np.testing.assert_allclose(out[:, 0], [2 / 5, 2 / 4, 1 / 3, 0], rtol=1e-6)
    np.testing.assert_allclose(out[:, 1], [1 / 5, 0, 2 / 3, 0], rtol=1e-6)
    assert (out[:, 2:] == 0).all() and colsum[2] == 0


def test_rows_of_a_matrix_with_more_columns():
    rs = np.random.RandomState(1)
    wide = random_graph(rs, 50, 8)
    wide[:, :5] = random_graph(rs, 50, 5)
    a, b = SymmetricGraph(wide[:, :5]), SymmetricGraph(wide[:, :5].copy())
    np.testing.assert_array_equal(a.indices, b.indices)
    np.testing.assert_array_equal(a.indptr, b.indptr)


def test_selected_rows_only():
    rs = np.random.RandomState(2)
    graph = SymmetricGraph(random_graph(rs, 300, 10))
    L, full, some = panel(rs, 300, 32), aligned_zeros((300, 32)), aligned_zeros((300, 32))
    graph.product(L, full)
    some[:] = 7
    rows = np.sort(rs.choice(300, 120, replace=False)).astype(np.int32)
    colsum = graph.product(L, some, rows=rows)
    np.testing.assert_array_equal(some[rows], full[rows])
    assert (np.delete(some, rows, axis=0) == 7).all()
    np.testing.assert_allclose(colsum, full[rows].sum(axis=0, dtype=np.float64), rtol=1e-6)
    assert (graph.product(L, some, rows=np.empty(0, np.int32)) == 0).all()


def test_number_of_threads_does_not_matter():
    rs = np.random.RandomState(3)
    I = random_graph(rs, 3000, 12)
    results = []
    before = graph_utils.get_num_threads()
    for threads in (1, 2, 5):
        graph_utils.set_num_threads(threads)
        graph = SymmetricGraph(I)
        out = aligned_zeros((3000, 48))
        L = panel(np.random.RandomState(4), 3000, 48)
        results.append((graph.indices, out, graph.product(L, out), graph.mass()))
    graph_utils.set_num_threads(before)
    for other in results[1:]:
        for a, b in zip(results[0], other):
            np.testing.assert_array_equal(a, b)


@pytest.mark.skipif(not graph_utils.has_mkl(), reason="built without MKL")
@pytest.mark.parametrize("n,k", GRID)
def test_mkl_product(n, k):
    rs = np.random.RandomState(5)
    graph = SymmetricGraph(random_graph(rs, n, k))
    L = rs.rand(n, 20).astype(np.float32)
    found = mkl_product(graph.indptr, graph.indices, graph.values(), L)
    W = np.zeros((n, n))
    W[np.repeat(np.arange(n), np.diff(graph.indptr)), graph.indices] = graph.values()
    np.testing.assert_allclose(found, W @ L, rtol=1e-5)
    assert mkl_product(graph.indptr, graph.indices, graph.values(), L[:, :0].copy()).shape == (n, 0)
    empty = np.zeros(n + 1, np.int64), np.empty(0, np.int32), np.empty(0, np.float32)
    assert not mkl_product(*empty, np.empty((0, 3), np.float32), np.ones((n, 3), np.float32)).any()


@pytest.mark.parametrize("nq,k,ncol", [(0, 3, 5), (1, 1, 1), (130, 7, 33), (300, 30, 64)])
def test_neighbour_sums(nq, k, ncol):
    rs = np.random.RandomState(6)
    L = rs.rand(40, ncol).astype(np.float32)
    I = rs.randint(-1, 40, (nq, k)).astype(np.int32)
    scale = rs.rand(ncol).astype(np.float32)
    expected = np.array([L[row[row >= 0]].sum(axis=0) for row in I]).reshape(nq, ncol) * scale
    np.testing.assert_allclose(neighbour_sums(I, L, scale), expected, rtol=1e-5)
    wide = np.zeros((nq, ncol + 3), np.float32)
    neighbour_sums(I, L, scale, wide[:, 1:ncol + 1])
    np.testing.assert_allclose(wide[:, 1:ncol + 1], expected, rtol=1e-5)
    assert (wide[:, 0] == 0).all() and (wide[:, ncol + 1:] == 0).all()


def test_reach_is_breadth_first():
    rs = np.random.RandomState(7)
    I = random_graph(rs, 400, 3)
    graph = SymmetricGraph(I)
    W = transition_matrix(I) > 0
    reached = np.zeros(400, np.uint8)
    front = np.array([5, 17], np.int32)
    reached[front] = 1
    expected = reached.astype(bool)
    for _ in range(4):
        front = graph.reach(front, reached, 400)
        expected |= W[:, expected].any(axis=1)
        np.testing.assert_array_equal(reached.astype(bool), expected)
    everything = np.arange(400, dtype=np.int32)
    count = int(W.any(axis=0).sum())
    assert len(graph.reach(everything, np.zeros(400, np.uint8), count)) == count
    for most in (count - 1, 3):
        assert graph.reach(everything, np.zeros(400, np.uint8), most) is None


def test_arrays_of_other_sizes_are_refused():
    graph = SymmetricGraph(random_graph(np.random.RandomState(1), 20, 3))
    L, out, I = aligned_zeros((20, 16)), aligned_zeros((20, 16)), np.zeros((2, 3), np.int32)
    for call, name in ((lambda: graph.product(L, L[:19]), "out"), (lambda: graph.product(L, out, np.ones(15, np.float32)), "scale"),
                       (lambda: graph.product(L, out, weights=np.ones(19, np.float32)), "weights"),
                       (lambda: graph.reach(I[0], np.zeros(19, np.uint8), 5), "reached"),
                       (lambda: neighbour_sums(I, L, np.ones(15, np.float32)), "scale"),
                       (lambda: neighbour_sums(I, L, scores=np.ones((2, 15), np.float32)), "scores"),
                       (lambda: mkl_product(graph.indptr, graph.indices, graph.values()[1:], L), "values"),
                       (lambda: mkl_product(graph.indptr[::-1].copy(), graph.indices, graph.values(), L), "differences of indptr"),
                       (lambda: mkl_product(graph.indptr, graph.indices, graph.values(), L, L[:19]), "out")):
        with pytest.raises(ValueError, match=f"{name}( is| has shape|: contiguous|: numbers) .* expected"):
            call()


def test_best_classes_in_any_slices():
    rs = np.random.RandomState(8)
    scores = rs.randint(0, 6, (500, 23)).astype(np.float32)      # many ties, many zeros
    labels = rs.randint(0, 23, 500)
    for pieces in ([np.arange(23)], np.array_split(rs.permutation(23), 4), [[c] for c in range(23)]):
        best = BestClasses(labels)
        for classes in pieces:
            best.update(np.ascontiguousarray(scores[:, classes]), classes)
        np.testing.assert_array_equal(best.right(), slow_top5(scores, labels))
        np.testing.assert_array_equal(best.nnz, (scores > 0).sum(axis=1))
        np.testing.assert_array_equal(best.best[:, 0], scores.max(axis=1))


def test_fewer_than_five_classes():
    best = BestClasses([0, 1, 1])
    best.update(np.array([[0, 1], [1, 2], [1, 0]], np.float32), [0, 1])
    np.testing.assert_array_equal(best.right(), [False, True, False])


def test_bad_graphs():
    with pytest.raises(ValueError, match="node 1 has neighbour 9 of 2 nodes"):
        SymmetricGraph(np.array([[0, 1], [1, 9]], np.int32))
    with pytest.raises(ValueError, match="node 1 has neighbour 2 of 2 nodes"):
        SymmetricGraph(np.array([[0, 1], [1, 2]], np.int32))
    with pytest.raises(ValueError, match="node 0 lists neighbour 1 twice"):
        SymmetricGraph(np.array([[1, 1], [1, 0]], np.int32))
    with pytest.raises(ValueError, match="permutation"):
        SymmetricGraph(np.array([[0], [1]], np.int32), np.array([0, 0]))
    with pytest.raises(ValueError, match="permutation"):
        SymmetricGraph(np.array([[0], [1]], np.int32), np.array([0, -1]))
    with pytest.raises(ValueError, match="rank: contiguous int32 2 expected, found int32 3"):
        SymmetricGraph(np.array([[0], [1]], np.int32), np.arange(3))
    with pytest.raises(ValueError, match="rank: contiguous int32 2 expected, found int32 2x2"):
        SymmetricGraph(np.array([[0], [1]], np.int32), np.array([[0, 1], [1, 0]]))
    for rank in (np.array([0.2, 1.2]), np.array([0, 1 + 2 ** 32])):
        with pytest.raises(ValueError, match="rank: whole numbers of 32 bits expected"):
            SymmetricGraph(np.array([[0], [1]], np.int32), rank)
    packed = np.zeros(4, np.dtype([("I", "i4", 3), ("more", "i1")]))
    with pytest.raises(ValueError, match="contiguous rows expected"):
        SymmetricGraph(packed["I"])
    with pytest.raises(ValueError, match="contiguous rows expected"):
        SymmetricGraph(np.array([[0, 1], [1, 0]], np.int32)[::-1])


def test_no_nodes_at_all():
    graph = SymmetricGraph(np.empty((0, 3), np.int32))
    assert graph.nnz == 0 and graph.values().shape == graph.mass().shape == (0,)
    assert not graph.product(aligned_zeros((0, 16)), aligned_zeros((0, 16))).any()
    assert neighbour_sums(np.full((2, 3), -1), np.empty((0, 5), np.float32)).tolist() == np.zeros((2, 5)).tolist()


def test_aligned_where_the_system_has_no_huge_pages(monkeypatch):
    class NoHugePages(mmap.mmap):
        def madvise(self, *args):
            raise OSError(22, "Invalid argument")
    monkeypatch.setattr(mmap, "mmap", NoHugePages)
    x = aligned_zeros((1 << 20, 4))
    assert x.shape == (1 << 20, 4) and not x.any() and x.ctypes.data % 64 == 0


def changes(before, after):
    """Entries in which two matrices differ, as SymmetricGraph.changed() takes them."""
    rows, columns = np.nonzero(before != after)
    return rows.astype(np.int32), columns.astype(np.int32), (after - before)[rows, columns].astype(np.int8)


def entries(I, n):
    """W0 + W0^T, int (n, n); rows and columns beyond those of I are zeros."""
    W0 = np.zeros((n, n), int)
    for i, row in enumerate(I):
        W0[i, row[row >= 0]] = 1
    return W0 + W0.T


@pytest.mark.parametrize("n0,n,k", [(1, 1, 1), (0, 7, 3), (7, 7, 3), (40, 65, 30), (1100, 1101, 4), (1024, 2500, 12)])
def test_a_changed_graph_is_as_made_anew(n0, n, k):
    rs = np.random.RandomState(n)
    I = random_graph(rs, n, k)
    old = np.where(I[:n0] < n0, I[:n0], -1)             # no edges to nodes that are not there yet
    W = SymmetricGraph(old)
    some = rs.rand(n0) < .3
    I[:n0][~some] = old[~some]
    changed = SymmetricGraph.changed(W.arrays, n, *changes(entries(old, n), entries(I, n)))
    for found, anew in zip(changed.arrays, SymmetricGraph(I).arrays):
        np.testing.assert_array_equal(found, anew)
    same = SymmetricGraph.changed(W.arrays, n0, *changes(entries(old, n0), entries(old, n0)))
    assert all(np.array_equal(a, b) for a, b in zip(same.arrays, W.arrays))


def test_bad_changes():
    indptr, indices, nsingle = SymmetricGraph(np.array([[0, 1], [1, 2], [2, 0]], np.int32)).arrays
    none = np.empty(0, np.int32), np.empty(0, np.int32), np.empty(0, np.int8)

    def changed(message, n=3, change=none, indptr=indptr, indices=indices, nsingle=nsingle):
        with pytest.raises(ValueError, match=message):
            SymmetricGraph.changed((indptr, indices, nsingle), n, *map(np.array, change))

    def change(rows, columns, by):
        return np.array(rows, np.int32), np.array(columns, np.int32), np.array(by, np.int8)

    changed("entry 0, 0 of the graph would be 3", change=change([0], [0], [1]))
    changed("entry 1, 2 of the graph would be -1", change=change([1], [2], [-2]))
    changed("out of range", change=change([3], [0], [1]))
    changed("out of range", change=change([0], [-1], [1]))
    changed("not in increasing order", change=change([1, 0], [0, 1], [1, 1]))
    changed("not in increasing order", change=change([1, 1], [0, 0], [1, 1]))
    changed("offsets are damaged", n=2)
    changed("3 nodes has 2 offsets", indptr=indptr[:2])
    changed("1 rows, 2 columns and 1 changes", change=change([0], [0, 1], [1]))
    for bad in ([1, 3, 6, 9], [0, 3, 6, 8], [0, 7, 6, 9], [0, 3, 10, 9]):
        changed("offsets are damaged", indptr=np.array(bad))
    for bad in ([-1, 2, 2], [2, 2, 4]):
        changed("offsets are damaged", nsingle=np.array(bad, np.int32))
    for bad in (3, -1, 0):
        changed("out of range or not in increasing order", indices=np.where(indices == 1, bad, indices).astype(np.int32))


def test_bad_panels():
    graph = SymmetricGraph(np.array([[0], [1]], np.int32))
    L = aligned_zeros((2, 16))
    with pytest.raises(ValueError, match="must not be L"):
        graph.product(L, L)
    with pytest.raises(ValueError, match="out is"):
        graph.product(L, aligned_zeros((3, 16)))
    with pytest.raises(ValueError, match="16, 32, 48 or 64"):
        graph.product(aligned_zeros((2, 17)), aligned_zeros((2, 17)))
    beside = aligned_zeros(36)[4:].reshape(2, 16)          # by 16 bytes
    for pair in ((L, beside), (beside, L)):
        with pytest.raises(ValueError, match="aligned to 64 bytes"):
            graph.product(*pair)
    with pytest.raises(ValueError, match="rows: numbers from 0 to 1 expected, found 2 to 2"):
        graph.product(L, aligned_zeros((2, 16)), rows=np.array([2]))
    with pytest.raises(ValueError, match="rows: numbers from 0 to 1 expected"):
        graph.reach(np.array([-5], np.int32), np.zeros(2, np.uint8), 2)
    with pytest.raises(ValueError, match="query 0 has neighbour 2"):
        neighbour_sums(np.array([[2]]), L)
    for I in (np.array([[2 ** 32 + 1]]), np.array([[1.9]])):
        with pytest.raises(ValueError, match="I: whole numbers of 32 bits expected"):
            neighbour_sums(I, L)
    both = aligned_zeros((3, 16))
    with pytest.raises(ValueError, match="nor have a part of it"):
        graph.product(both[:2], both[1:])
    with pytest.raises(ValueError, match="best classes is less than 1"):
        BestClasses([0, 0], nbest=0).update(L, np.arange(16))
    with pytest.raises(ValueError, match="indices: array of int32_t expected, found items of format"):
        graph_utils.core.mass(2, graph.indptr, graph.indices.astype(np.int64), -1, graph.nsingle, np.empty(2, np.float32))


def test_large_arrays_are_aligned():
    a = aligned_zeros((3 << 20, 3))
    assert a.ctypes.data % (2 << 20) == 0 and a.shape == (3 << 20, 3)
    a[-1] = 1
    assert a.sum() == 3


def test_weighted_sums_of_selected_rows():
    rs = np.random.RandomState(2)
    graph, weights = SymmetricGraph(random_graph(rs, 300, 10)), rs.rand(300).astype("f4")
    L, out = aligned_zeros((300, 16)), aligned_zeros((300, 16))
    L[:] = rs.rand(300, 16)
    rows = np.sort(rs.choice(300, 120, replace=False)).astype(np.int32)
    colsum = graph.product(L, out, rows=rows, weights=weights)
    np.testing.assert_allclose(colsum, weights[rows].astype("f8") @ out[rows], rtol=1e-6)


@pytest.mark.parametrize("ncol", [0, 80])
def test_widths(ncol):
    graph = SymmetricGraph(np.array([[0], [1]], np.int32))
    with pytest.raises(ValueError, match="16, 32, 48 or 64"):
        graph.product(aligned_zeros((2, ncol)), aligned_zeros((2, ncol)))


@pytest.mark.parametrize("row,column", [(-1, 0), (0, 3)])
def test_changes_out_of_range(row, column):
    graph = SymmetricGraph(np.array([[0, 1], [1, 2], [2, 0]], np.int32))
    with pytest.raises(ValueError, match="a changed entry is out of range"):
        SymmetricGraph.changed(graph.arrays, 3, np.array([row], "i4"), np.array([column], "i4"), np.array([1], "i1"))


def test_offsets_that_fall_in_another_block():
    indptr, indices, nsingle = SymmetricGraph(np.arange(3000, dtype="i4")[:, None]).arrays
    indptr = indptr.copy()
    indptr[900:1025] += 1 << 40
    with pytest.raises(ValueError, match="offsets are damaged"):
        SymmetricGraph.changed((indptr, indices, nsingle), 3000, np.array([950], "i4"), np.array([0], "i4"), np.array([1], "i1"))


def test_scores_below_zero():
    best = BestClasses([0])
    best.update(np.array([[-1, 2, 0]], np.float32), [0, 1, 2])
    assert best.nnz == 2 and best.best[0].tolist() == [2, 0, 0, 0, 0]


def test_a_neighbour_that_is_not_there():
    indptr, indices, nsingle = SymmetricGraph(np.array([[0, 1], [1, 2], [2, 0]], np.int32)).arrays
    none = np.empty(0, np.int32), np.empty(0, np.int32), np.empty(0, np.int8)
    with pytest.raises(ValueError, match="out of range or not in increasing order"):
        SymmetricGraph.changed((indptr, np.where(indices == 2, 3, indices).astype("i4"), nsingle), 3, *none)


@pytest.mark.parametrize("ncol", [16, 48])
@pytest.mark.parametrize("n, k", [(2, 5), (50, 7), (9000, 12)])
def test_entries_in_a_file(tmp_path, n, k, ncol):
    """Read from it some rows at a time, what is asked for of them in any order: the same as in memory."""
    rs = np.random.RandomState(n)
    graph, L, weights = SymmetricGraph(random_graph(rs, n, k)), panel(rs, n, ncol), rs.rand(n).astype(np.float32)
    none = np.empty(0, np.int32), np.empty(0, np.int32), np.empty(0, np.int8)
    entries = scratch(str(tmp_path), graph.nnz, np.int32)
    in_file = SymmetricGraph.changed(graph.arrays, n, *none, empty=lambda shape, dtype: entries)
    assert in_file.indices is entries and isinstance(entries, np.memmap)
    np.testing.assert_array_equal(in_file.mass(), graph.mass())
    seeds = rs.permutation(n)[:3].astype(np.int32)
    reached = [np.zeros(n, np.uint8) for _ in range(2)]
    np.testing.assert_array_equal(in_file.reach(seeds, reached[0], n), graph.reach(seeds, reached[1], n))
    some = rs.permutation(n)[:n // 2]
    for rows in (None, seeds, np.sort(some), some, np.arange(n), np.repeat(seeds, 2)):
        out = [aligned_zeros((n, ncol)) for _ in range(2)]
        sums = [g.product(L, o, None, rows, weights) for g, o in zip((in_file, graph), out)]
        np.testing.assert_array_equal(*out)
        np.testing.assert_allclose(*sums, rtol=1e-6)
    os.truncate(entries.file, 4 * (graph.nnz - 1))
    with pytest.raises(ValueError, match="the file ends before the end of the entries"):
        in_file.product(L, out[0])
