"""lowshot/knn.py and lowshot/cells.py against exact search in float64."""
import numpy as np
import pytest

from graph_utils import neighbours as nb
from lowshot import cells as cells_module, knn
from lowshot.cells import Cells, Codes, Vectors, chained, default_nlist, main_directions, train_centroids, ways_to_cells
from lowshot.features import MatrixFile, NormalisedRows
from lowshot.layout import padded_to_power_of_two


pytestmark = pytest.mark.usefixtures("products")


def clustered(n, d=32, clusters=12, seed=0, spread=0.6):
    rs = np.random.RandomState(seed)
    centres = np.random.RandomState(99).randn(clusters, d)
    x = centres[rs.randint(0, clusters, n)] + spread * rs.randn(n, d)
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)


def check_exact(D, I, q, x, k, first=0):
    """Lists are the best in float64, up to equals; padded with -inf and -1."""
    S = q.astype(np.float64) @ x.T.astype(np.float64)
    kk = min(k, len(x))
    assert D.shape == I.shape == (len(q), k) and D.dtype == np.float32 and I.dtype == np.int32
    assert (I[:, kk:] == -1).all() and (D[:, kk:] == -np.inf).all()
    if not kk:
        return
    np.testing.assert_allclose(D[:, :kk], -np.sort(-S, axis=1)[:, :kk], atol=1e-6)
    np.testing.assert_allclose(np.take_along_axis(S, (I[:, :kk] - first).astype(np.int64), 1), D[:, :kk], atol=1e-6)
    assert all(len(set(row)) == kk for row in I[:, :kk].tolist())
    assert (np.diff(D[:, :kk], axis=1) <= 0).all()


def recall(I, q, x, k):
    want = np.argsort(-(q @ x.T), axis=1)[:, :k]
    return np.mean([len(np.intersect1d(a, b)) for a, b in zip(I, want)]) / k


@pytest.mark.parametrize("nq,n,k", [(0, 5, 3), (5, 0, 3), (1, 1, 1), (1, 1, 4), (7, 3, 5), (40, 700, 30), (300, 90, 10)])
def test_exact(nq, n, k):
    q, x = clustered(nq, seed=1), clustered(n, seed=2)
    check_exact(*knn.exact_knn(q, x, k), q, x, k)


def test_exact_where_bfloat16_cannot_tell():
    """Thousands of vectors that differ by less than rounding: the candidates prove nothing, float32 decides."""
    rs = np.random.RandomState(0)
    x = np.ones((3000, 32), np.float32) + 1e-3 * rs.randn(3000, 32).astype("f4")
    x[100:200] = x[0]
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    D, I = knn.exact_knn(x[:50].copy(), x, 10)
    S = x[:50].astype("f8") @ x.T
    np.testing.assert_allclose(D, -np.sort(-S, axis=1)[:, :10], atol=3e-7)
    for y in (x, np.concatenate([x, clustered(4000, d=32)])):        # most are in doubt, or fewer
        D, I = knn.exact_knn(y, y, 10, self=True)
        np.testing.assert_allclose(D, -np.sort(-(y.astype("f8") @ y.T), axis=1)[:, :10], atol=3e-7)
        np.testing.assert_allclose(D, np.take_along_axis(y.astype("f8") @ y.T, I.astype("i8"), 1), atol=3e-7)
        assert np.array_equal(I[:, 0], np.arange(len(y)))
        assert all(len(set(row)) == 10 for row in I.tolist())


def test_exact_for_vectors_that_are_not_normalised():
    rs = np.random.RandomState(0)
    q, x = 30 * rs.randn(20, 40).astype("f4"), rs.randn(500, 40).astype("f4") * rs.uniform(.01, 50, (500, 1)).astype("f4")
    D, I = knn.exact_knn(q, x, 5)
    S = q.astype("f8") @ x.T
    np.testing.assert_allclose(D, -np.sort(-S, axis=1)[:, :5], rtol=1e-5)


def test_candidates_that_cannot_be_among_the_best_are_taken_out():
    rs = np.random.RandomState(0)
    S, error = rs.rand(50, 20).astype("f4"), rs.uniform(0, .2, 50).astype("f4")
    numbers = np.tile(np.arange(20), (50, 1))
    numbers[7, 3:] = -1
    keys = nb.make_keys(S, numbers)
    knn._leave_possible(keys, 5, error)
    least = -np.sort(-S, axis=1)[:, 4] - 2 * error
    left = nb.numbers(keys)
    for i in range(50):
        want = numbers[i, :3] if i == 7 else np.flatnonzero(S[i] >= least[i] - 1e-6)
        assert set(left[i][left[i] >= 0]) == set(want)
    assert knn._leave_possible(nb.make_keys(S, numbers), 20, error) is None


def test_files_are_normalised_as_they_are_read(tmp_path):
    x, more = 7 * clustered(300, seed=1), clustered(50, seed=2)
    x[17] = 0
    x.tofile(tmp_path / "raw")
    rows = NormalisedRows(MatrixFile(str(tmp_path / "raw"), "<f4", 32, 300), more)
    whole = rows[:]
    check_exact(*knn.exact_knn(more, rows, 9), more, whole, 9)
    D, I, info = knn.build_knn_graph(rows, 9)
    check_exact(D, I, whole, whole, 9)
    assert info["exact"] and (I == np.arange(350)[:, None]).any(axis=1).all()
    x[123, 4] = np.nan
    x.tofile(tmp_path / "raw")
    with pytest.raises(ValueError, match="raw: row 123 holds NaN"):
        Vectors(rows)


@pytest.mark.parametrize("free", [0, 1 << 40])
def test_maps_of_files_larger_than_memory_are_not_read_ahead(tmp_path, monkeypatch, free):
    monkeypatch.setattr("lowshot.cells.available_memory", lambda: free)
    x = clustered(700, seed=1)
    x.tofile(tmp_path / "raw")
    vectors = Vectors(NormalisedRows(MatrixFile(str(tmp_path / "raw"), "<f4", 32, 700)))
    check_exact(*knn.exact_knn(vectors, vectors, 9, self=True), x, x, 9)
    with open("/proc/self/smaps") as f:
        maps = f.read().split(str(tmp_path / "raw"))
    flags = next(line for line in maps[1].splitlines() if line.startswith("VmFlags:"))
    assert (" rr" in flags) == (free == 0)          # MADV_RANDOM


def test_candidates_are_read_from_large_files(tmp_path, monkeypatch):
    monkeypatch.setattr(knn, "EXACT_BELOW", 100)
    monkeypatch.setattr(knn, "LOOKED_UP", 500)      # eleven queries at a time, of those with all candidates
    x, more = 7 * clustered(700, seed=1), clustered(150, seed=2)
    x.tofile(tmp_path / "raw")
    rows, new, q = NormalisedRows(MatrixFile(str(tmp_path / "raw"), "<f4", 32, 700), more), clustered(90, seed=3), clustered(60)
    whole = rows[:]
    for a, b in zip(knn.exact_knn(q, rows, 9), knn.exact_knn(q, whole, 9)):
        np.testing.assert_allclose(a, b, atol=1e-6)
    D, I = knn.exact_knn(whole, whole, 6)
    check_exact(*knn.cross_insert(new, rows, D, I, 850, 6), new, np.concatenate([whole, new]), 6)
    check_exact(D, I, whole, np.concatenate([whole, new]), 6)
    cells = Cells.train(Vectors(rows), 20)
    D, I, info = knn.search_begun(cells, np.concatenate([q] * 40), 7, recall=.999, nprobe=20)()
    check_exact(D[:60], I[:60], q, whole, 7)
    assert np.array_equal(I, np.tile(I[:60], (40, 1))) and info["recall"] > .99


@pytest.mark.parametrize("n,m,k", [(200, 20, 8), (5, 9, 8), (0, 6, 3), (30, 0, 3), (300, 1, 12), (50, 200, 6)])
def test_cross_insert(n, m, k):
    old, new = clustered(n, seed=1), clustered(m, seed=2)
    everything = np.concatenate([old, new])
    D, I = knn.exact_knn(old, old, k)
    D_new, I_new = knn.cross_insert(new, old, D, I, n, k)
    check_exact(D_new, I_new, new, everything, k)
    check_exact(D, I, old, everything, k)


def test_cross_insert_of_duplicates():
    old = clustered(400, seed=1)
    new = np.concatenate([old[:150], np.tile(old[7], (100, 1)), np.zeros((3, 32), "f4")])
    D, I = knn.exact_knn(old, old, 6)
    D_new, I_new = knn.cross_insert(new, NormalisedRows(old), D, I, 400, 6)
    check_exact(D_new, I_new, new, np.concatenate([old, new]), 6)
    check_exact(D, I, old, np.concatenate([old, new]), 6)


def test_cross_insert_where_bytes_leave_all_in_doubt(monkeypatch):
    for spare in ("FEW_INSERTED", "INSERTED_SPARE"):
        monkeypatch.setattr(knn, spare, 3)
    monkeypatch.setattr(knn, "SPARE", 4)
    searched = []
    exact_knn = knn.exact_knn

    def counted(xq, x, *args, **named):
        searched.append((knn._vectors(xq).n, knn._vectors(x).n))
        return exact_knn(xq, x, *args, **named)

    rs = np.random.RandomState(0)
    everything = clustered(5)[rs.randint(5, size=500)] + rs.randn(500, 32).astype("f4") * 2e-3      # bytes err by as much
    everything /= np.linalg.norm(everything, axis=1, keepdims=True)
    old, new = everything[:420].copy(), everything[420:].copy()
    D, I = exact_knn(old, old, 6)
    monkeypatch.setattr(knn, "exact_knn", counted)
    D_new, I_new = knn.cross_insert(new, old, D, I, 420, 6)
    assert (80, 420) in searched and any(nq > 100 and n == 80 for nq, n in searched)
    check_exact(D_new, I_new, new, everything, 6)
    check_exact(D, I, old, everything, 6)


@pytest.mark.parametrize("rounds", [False, True])
@pytest.mark.parametrize("n,k,nlist", [(1, 1, 1), (3, 8, 3), (500, 10, 40), (3000, 16, None)])
def test_graph_by_cells(n, k, nlist, rounds, monkeypatch):
    if rounds:
        monkeypatch.setattr(knn, "ROUND", 0)
    x = clustered(n)
    cells = Cells.train(Vectors(x), nlist)
    lines = []
    D, I, info = knn.build_knn_graph(None, k, recall=.97, cells=cells, say=lines.append)
    assert info["recall"] >= .97 and lines and (info["rounds"] > 0) <= rounds
    assert n < 3000 or (info["rounds"] > 0) == rounds
    assert recall(I[:, :min(k, n)], x, x, min(k, n)) > .96
    assert (I == np.arange(n)[:, None]).any(axis=1).all() and (I[:, min(k, n):] == -1).all()
    have = I >= 0
    S = np.take_along_axis(x.astype("f8") @ x.T, np.maximum(I, 0).astype("i8"), 1)
    np.testing.assert_allclose(D[have], S[have], atol=1e-6)
    assert all(len(set(row[row >= 0])) == (row >= 0).sum() for row in I)


@pytest.mark.parametrize("spread,unsure", [(.6, False), (.0005, True)])
def test_a_sample_by_bytes_has_the_true_neighbours(spread, unsure, monkeypatch):
    """Clusters as tight as rounding, too: there the candidates leave some in doubt, and these are searched again."""
    monkeypatch.setattr(knn, "MANY_SPARE", 50)
    monkeypatch.setattr(knn, "SEARCH_BLOCK", 700)
    again, exact = [], knn.exact_knn
    monkeypatch.setattr(knn, "exact_knn", lambda x, *args, **options: again.append(len(x)) or exact(x, *args, **options))
    x = clustered(3000, spread=spread)
    cells = Cells.train(Vectors(x), 60)
    sample = knn.Sample(cells.vectors, cells.vectors, 10, 0, first=500, size=300, cells=cells)
    assert cells.codes.plain and (sum(again) > 0) == unsure and sample.number.min() >= 500
    check_exact(sample.D, sample.I, x[sample.number], x, 10)
    assert sample.candidates.shape == (300, 60) and all(len(set(row)) == 60 for row in sample.candidates)
    few = knn.Sample(cells.vectors, Vectors(x[:40].copy()), 10, 0, cells=Cells.train(Vectors(x[:40].copy()), 4))
    check_exact(few.D, few.I, x[few.number], x[:40], 10)


def test_measured_recall_is_the_recall():
    x = clustered(4000, spread=1.5)
    D, I, info = knn.build_knn_graph(None, 10, nprobe=3, cells=Cells.train(Vectors(x), 100))
    assert info["nprobe"] == 3 and info["rounds"] == 0 and .2 < info["recall"] < .95
    assert abs(info["recall"] - recall(I, x, x, 10)) < .03


@pytest.mark.parametrize("round_costs", [0, 1.25])
def test_graph_of_hard_data_reaches_the_recall_asked_for(round_costs, monkeypatch):
    monkeypatch.setattr(knn, "ROUND", round_costs)
    x = clustered(6000, d=64, spread=3.)
    results = [knn.build_knn_graph(None, 12, recall=r, cells=Cells.train(Vectors(x), 150)) for r in (.8, .99)]
    for (D, I, info), wanted in zip(results, (.8, .99)):
        assert info["recall"] >= wanted and recall(I, x, x, 12) >= wanted - .01
    assert results[0][2] != results[1][2]


def test_longer_lists_where_many_cells_would_be_searched(monkeypatch):
    x = clustered(6000, d=64, spread=3.)
    cells = Cells.train(Vectors(x), 150)
    monkeypatch.setattr(knn, "ROUND", 0)
    plain = knn.build_knn_graph(None, 12, recall=.965, cells=cells)
    monkeypatch.setattr(knn, "WIDE_FROM", 1)
    D, I, info = knn.build_knn_graph(None, 12, recall=.965, cells=cells)
    assert 2 * info["nprobe"] < plain[2]["nprobe"] and info["rounds"]
    assert info["recall"] >= .965 and recall(I, x, x, 12) >= .955
    S = np.take_along_axis(x.astype("f8") @ x.T, I.astype("i8"), 1)
    np.testing.assert_allclose(D, S, atol=1e-6)
    assert all(len(set(row)) == 12 for row in I) and (np.diff(D) <= 0).all()
    # not where they do not reach as far
    assert knn.build_knn_graph(None, 12, recall=.99, cells=cells)[2]["nprobe"] > info["nprobe"]


def test_longer_lists_are_compared_in_all_dimensions(monkeypatch):
    monkeypatch.setattr(knn, "WIDE_FROM", 1)
    monkeypatch.setattr(knn, "ROUND", 0)
    x = with_energies(4000, .97 ** np.arange(256))
    cells, lines = Cells.train(Vectors(x), 200), []
    D, I, info = knn.build_knn_graph(None, 12, cells=cells, say=lines.append)
    assert "in 128 of 256" in lines[0] and "64 candidates" in lines[1] and cells.codes.words(256) == 65
    assert info["rounds"] and info["recall"] >= .95 and recall(I, x, x, 12) >= .94


def test_best_of_longer_lists():
    x = clustered(300)
    cells = Cells.train(Vectors(x), 10)
    lists = knn.Lists(cells, cells.position(), 30)
    rs = np.random.RandomState(0)
    for i in range(300):
        count = rs.randint(31)
        lists.keys[i, :count] = knn.nb.make_keys(rs.randn(1, count).astype("f4"), rs.permutation(300)[None, :count])[0]
    for rows in (slice(7, 100), np.array([5, 299, 0])):
        got = lists.best(rows, 11)
        want = -np.sort(-lists.keys[rows].view(np.uint64).astype("f8"), axis=1)[:, :11]
        assert np.array_equal(-np.sort(-got.view(np.uint64).astype("f8"), axis=1), want) and got.flags.c_contiguous
    assert np.array_equal(lists.best(slice(0, 9), 30), lists.keys[:9])


def test_the_curve_predicts_what_a_number_of_cells_finds():
    x = clustered(3000, spread=1.)
    cells = Cells.train(Vectors(x), 60)
    sample = knn.Sample(cells.vectors, cells.vectors, 10, 0)
    cells.use(Codes())
    curve = sample.recall_by_nprobe(cells, cells.position())
    assert len(curve) == 60 and abs(curve[-1] - 1) < 1e-9 and (np.diff(curve) >= 0).all()
    for nprobe in (1, 4, 16):
        D, I, info = knn.build_knn_graph(None, 10, nprobe=nprobe, cells=cells)
        assert abs(info["recall"] - curve[nprobe - 1]) < .01


@pytest.mark.parametrize("spread", [.6, 1.2])
def test_cells_near_a_nodes_own_hold_its_nearest(spread):
    x = clustered(6000, spread=spread)
    cells = Cells.train(Vectors(x), 300)
    sample = knn.Sample(cells.vectors, cells.vectors, 10, 0)
    cells.use(Codes())
    position, p = cells.position(), 6
    curve = sample.recall_by_nprobe(cells, position)
    near = sample.near_cells(cells, position, p, curve[p - 1])
    assert near.dtype == np.int32 and near.shape[0] == 300 and 2 * p <= near.shape[1] <= 75
    assert all(len(set(row)) == len(row) for row in near) and (near == np.arange(300)[:, None]).any(axis=1).all()
    plain, quick = (knn.Lists(cells, position, 20) for _ in range(2))
    plain.search(p, knn._silent)
    quick.search(p, knn._silent, near)
    assert abs(plain.recall(sample, 20) - curve[p - 1]) < .01
    assert abs(quick.recall(sample, 20) - plain.recall(sample, 20)) <= 3 * knn.MISSED
    assert not np.array_equal(plain.keys, quick.keys)
    assert sample.near_cells(cells, position, 40, curve[39]) is None       # saves nothing


@pytest.mark.parametrize("n0,n1", [(1500, 400), (1000, 0), (3, 800)])
def test_completion_of_a_known_graph(n0, n1):
    x = clustered(n0 + n1)
    D0, I0 = knn.exact_knn(x[:n0].copy(), x[:n0].copy(), 12)
    rows = NormalisedRows(x[:n0].copy(), x[n0:].copy())
    D, I = np.full((n0 + n1, 12), 9, np.float32), np.full((n0 + n1, 12), 9, np.int32)
    D[:n0], I[:n0] = D0, I0         # the outputs may be what is given
    cells = Cells.train(Vectors(rows), 50)
    D, I, info = knn.build_knn_graph(None, 12, recall=.98, initial=(D[:n0], I[:n0]), cells=cells, out=(D, I))
    assert info["recall"] >= .98 and recall(I, x, x, 12) > .975
    S = np.take_along_axis(x.astype("f8") @ x.T, I.astype("i8"), 1)
    np.testing.assert_allclose(D, S, atol=1e-6)


def test_few_new_nodes_among_many_known_ones_are_all_found():
    """However few they are: recall over all nodes would not tell whether they have their neighbours."""
    x, n0, k = clustered(4000), 4000 - 25, 12
    D0, I0 = knn.exact_knn(x[:n0].copy(), x[:n0].copy(), k)
    D, I, info = knn.build_knn_graph(None, k, initial=(D0, I0), cells=Cells.train(Vectors(x), 300))
    want = np.argsort(-(x.astype("f8") @ x.T), axis=1)[:, :k]
    assert info["recall"] > .99 and np.mean([len(np.intersect1d(a, b)) for a, b in zip(I[n0:], want[n0:])]) > .99 * k
    entries = [(i, j) for i in range(n0) for j in want[i] if j >= n0]
    assert len(entries) > 100 and np.mean([j in I[i] for i, j in entries]) > .95


def test_known_lists_have_bars_behind_them():
    x = clustered(900)
    D0, I0 = knn.exact_knn(x[:500].copy(), x[:500].copy(), 8)
    I0[3, 5:], D0[3, 5:] = -1, -np.inf
    cells = Cells.train(Vectors(x), 20)
    cells.use(Codes())
    lists = knn.Lists(cells, cells.position(), 8 + knn.SPARE_LISTED, (D0, I0), error=.01)
    at = cells.position()
    keys = lists.keys[at[:500]]
    numbers = nb.numbers(keys)
    np.testing.assert_array_equal(numbers[:, :8], np.where(I0 < 0, -1, at[I0]))
    assert (numbers[:, 8:] == -1).all() and not lists.keys[at[500:]].any()
    full = np.arange(500) != 3
    np.testing.assert_allclose(nb.similarities(keys)[:, :8], np.where(I0 < 0, -np.inf, D0), atol=.01)
    np.testing.assert_allclose(nb.similarities(keys)[full, 8:], np.repeat(nb.similarities(keys)[full, :8].min(1, keepdims=True) - knn.BAR * .01,
                                                                          knn.SPARE_LISTED, 1), atol=1e-6)
    assert not keys[3, 5:].any()
    lists._mark_new()
    assert not (lists.keys[at[:500]] & nb.NEW).any()


def test_search_among_cells(monkeypatch):
    monkeypatch.setattr(knn, "EXACT_BELOW", 100)
    monkeypatch.setattr(knn, "SAMPLE", 200)
    x, q = clustered(3000), clustered(700, seed=5)
    D, I, info = knn.search_begun(Cells.train(Vectors(x)), q, 10, recall=.96)()
    assert not info["exact"] and info["recall"] >= .95 and recall(I, q, x, 10) > .95
    np.testing.assert_allclose(D, np.take_along_axis(q.astype("f8") @ x.T, I.astype("i8"), 1), atol=1e-6)


def test_cells_hold_each_vector_once_near_its_centroid():
    x = clustered(2000)
    x[5] = 0
    cells = Cells.train(Vectors(x), 40)
    assert np.array_equal(np.sort(cells.order), np.arange(2000))
    assert np.array_equal(cells.order[cells.position()], np.arange(2000))
    assert cells.begin[0] == 0 and cells.end[-1] == 2000 and np.array_equal(cells.begin[1:], cells.end[:-1])
    np.testing.assert_allclose(np.linalg.norm(cells.centroids, axis=1), 1, rtol=1e-5)
    S = x @ cells.centroids.T
    for c in range(40):
        rows = cells.order[cells.begin[c]:cells.end[c]]
        assert (np.diff(rows) > 0).all()
        assert (S[rows, c] >= S[rows].max(axis=1) - 5e-3).all()
    for codes, convert in ((Codes(), nb.to_bytes), (Codes("bfloat16"), nb.to_bfloat16), (Codes("float32"), nb.to_float32)):
        cells.use(codes)
        assert np.array_equal(cells.X, convert(x)[cells.order]) and np.array_equal(cells.C, convert(cells.centroids))
        assert codes.words(x.shape[1]) == cells.X.shape[1]


@pytest.mark.parametrize("spread,few", [(.2, True), (.4, True), (2., False)])
def test_cells_found_by_way_of_few_centroids_are_the_nearest(spread, few, monkeypatch):
    """Where few would have to be nearly all, all are compared."""
    x = clustered(5000, clusters=200, spread=spread)
    vectors = Vectors(NormalisedRows(x))
    y = clustered(900, clusters=200, spread=spread, seed=1)
    plain, _ = train_centroids(vectors, 400)
    monkeypatch.setattr(cells_module, "FEW_CELLS", 60)
    monkeypatch.setattr(cells_module, "STAY_NEAR", 4)
    centroids, sample = train_centroids(vectors, 400)
    np.testing.assert_allclose(np.linalg.norm(centroids, axis=1), 1, rtol=1e-5)
    assert not np.array_equal(plain, centroids)
    assert (y @ centroids.T).max(axis=1).mean() > (y @ plain.T).max(axis=1).mean() - .01
    ways = ways_to_cells(centroids, *sample)
    assert (ways is not None) == few
    if few:
        top, (offsets, listed) = ways
        assert len(offsets) == len(top) + 1 and len(listed) == offsets[-1] < 160 * len(top)
        assert all(len(set(listed[i:j])) == j - i for i, j in zip(offsets, offsets[1:]))
    for first in (0, 700):
        cell = cells_module.assign(vectors, centroids, ways, first=first)
        S = x[first:] @ centroids.T
        assert (S.argmax(axis=1) == cell).mean() > .98          # by bytes, too
        assert (S.max(axis=1) - S[np.arange(len(S)), cell]).mean() < 2e-3


@pytest.mark.parametrize("apart", [True, False])
def test_a_minority_far_from_all_others_finds_its_cells(apart):
    """A quarter of a percent of the vectors, in dimensions of their own or not: the share of misses is nobody's all."""
    rs = np.random.RandomState(0)
    n, few, d = 24000, 60, 64
    x = np.zeros((n, d))
    own = slice(32, None) if apart else slice(None)
    x[:, :32] = rs.randn(150, 32)[rs.randint(0, 150, n)] + .5 * rs.randn(n, 32)
    x[-few:] = 0
    x[-few:, own] = rs.randn(d)[own] + rs.randn(few, d)[:, own]
    x += .35 * rs.randn(n, d)
    x = (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)
    vectors = Vectors(x)
    centroids, sample = train_centroids(vectors, 1100)
    ways = ways_to_cells(centroids, *sample)
    assert ways is not None
    cells = Cells(vectors, centroids, cells_module.assign(vectors, centroids, ways))
    D, I, info = knn.build_knn_graph(None, 10, cells=cells)
    assert info["recall"] > .95 and recall(I[-few:], x[-few:], x, 10) > .95


def test_new_nodes_look_for_cells_near_their_own(monkeypatch):
    x, n0, k = clustered(8000, spread=1.), 3000, 12
    monkeypatch.setattr(knn, "AFFORDABLE", 0)
    asked = []
    near_cells = knn.Sample.near_cells
    monkeypatch.setattr(knn.Sample, "near_cells", lambda *a: asked.append(near_cells(*a)) or asked[-1])
    D0, I0 = knn.exact_knn(x[:n0].copy(), x[:n0].copy(), k)
    D, I, info = knn.build_knn_graph(None, k, initial=(D0, I0), cells=Cells.train(Vectors(x), 300), seed=3)
    assert len(asked) == 1 and asked[0] is not None and info["nprobe"] < 40
    assert info["recall"] >= .95 and recall(I, x, x, k) > .95


@pytest.mark.parametrize("n", [1, 50, 500])
def test_chain_visits_each_centroid_once_nearest_next(n, monkeypatch):
    monkeypatch.setattr(cells_module, "CHAINED", 16)
    c = clustered(n, spread=2.)
    chain = chained(c)
    assert np.array_equal(np.sort(chain), np.arange(n))
    for i in range(n - 1):
        left = chain[i + 1:]
        assert np.isclose((c[chain[i]] @ c[left].T).max(), c[chain[i]] @ c[chain[i + 1]])


def test_kmeans_with_fewer_vectors_than_centroids_and_with_zeros():
    x = np.zeros((5, 32), np.float32)
    x[0, 0] = 1
    centroids, _ = train_centroids(Vectors(x), 9)
    assert centroids.shape == (9, 32) and np.isfinite(centroids).all()
    D, I, info = knn.build_knn_graph(None, 3, cells=Cells.train(Vectors(x), 4))
    assert (I == np.arange(5)[:, None]).any(axis=1).all()


def test_same_seed_same_graph(monkeypatch):
    monkeypatch.setattr(knn, "ROUND", 0)
    x = clustered(3000, spread=1.5)
    a, b = (knn.build_knn_graph(None, 10, cells=Cells.train(Vectors(x), 60, seed=3), seed=3) for _ in range(2))
    assert np.array_equal(a[1], b[1]) and np.array_equal(a[0], b[0]) and a[2] == b[2]


@pytest.mark.parametrize("round_costs", [0, 1.25])
def test_many_duplicates(round_costs, monkeypatch):
    """Unreadable images all have the same features: more of them than neighbours."""
    monkeypatch.setattr(knn, "ROUND", round_costs)
    x = clustered(1500)
    x[200:900] = x[3]
    x[900:1000] = 0
    D, I, info = knn.build_knn_graph(None, 8, cells=Cells.train(Vectors(x), 30))
    np.testing.assert_allclose(D[200:900], 1, atol=1e-6)
    assert (I == np.arange(1500)[:, None]).any(axis=1).all()
    assert info["recall"] >= .95 and default_nlist(1500) == 154


def test_copies_beyond_the_first_are_compared_with_nobody_twice(monkeypatch):
    """Their neighbours are the first ones and themselves; known nodes come first among those that new ones are compared with."""
    monkeypatch.setattr(cells_module, "KEPT", 40)
    monkeypatch.setattr(cells_module, "CROWDED", 100)
    monkeypatch.setattr(cells_module, "REPEATED", 1)
    x = clustered(1500)
    x[200:900:2] = x[3]
    x[900:1000] = 0
    cells = Cells.train(Vectors(x), 30)
    begin, end = cells.begin, cells.stop
    left_out = np.concatenate([cells.order[i:j] for i, j in zip(end, cells.end)])
    copies = np.concatenate([[3], np.arange(200, 900, 2)])
    assert np.array_equal(np.sort(left_out), np.concatenate([copies[40:], np.arange(940, 1000)]))
    for i, j, last in zip(begin, end, cells.end):
        assert (np.diff(cells.order[i:j]) > 0).all() and (np.diff(cells.order[j:last]) > 0).all()
    assert np.array_equal(cells.cell_of(cells.position()[left_out]), cells.cell_of(cells.position()[np.where(left_out < 900, 3, 900)]))
    D, I, info = knn.build_knn_graph(None, 8, cells=cells)
    S = np.sort(x.astype("f8") @ x.T, axis=1)[:, ::-1]
    assert (I == np.arange(1500)[:, None]).any(axis=1).all() and info["recall"] >= .95
    np.testing.assert_allclose(D[copies], S[copies, :8], atol=1e-6)
    assert np.isin(I[copies], copies).all() and np.isin(I[copies[40:]], copies[:40]).sum() == 7 * len(copies[40:])
    for n0 in (1, 500, 1000, 1499):
        joined = knn.build_knn_graph(None, 8, initial=(D[:n0], I[:n0]), cells=cells)
        assert joined[2]["recall"] >= .95 and (np.diff(joined[0], axis=1) <= 0).all()
        np.testing.assert_allclose(joined[0][copies[copies >= n0]], 1, atol=1e-6)


@pytest.mark.parametrize("spread,format", [(.03, "bytes"), (.008, "bfloat16"), (.001, "float32"), (1e-5, "bytes")])
def test_clusters_as_tight_as_rounding(spread, format):
    """Bursts of nearly the same image: bytes hide who is the nearest, until float32 does not tell either and all will do."""
    rs = np.random.RandomState(0)
    x = np.repeat(rs.randn(30, 64), 100, axis=0) / 8 + spread * rs.randn(3000, 64)
    x = (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)
    cells, lines = Cells.train(Vectors(x), 100), []
    D, I, info = knn.build_knn_graph(None, 10, cells=cells, say=lines.append)
    assert cells.codes.format == format and (f"compared in {format}" in lines[0]) == (format != "bytes")
    assert info["recall"] >= .95 and info["nprobe"] < 50 and not lines[-1].startswith("note")
    assert spread < 1e-4 or recall(I, x, x, 10) > .94
    assert (I == np.arange(3000)[:, None]).any(axis=1).all()
    assert (I // 100 == np.arange(3000)[:, None] // 100).all()
    np.testing.assert_allclose(D, np.take_along_axis(x.astype("f8") @ x.T, I.astype("i8"), 1), atol=1e-6)


def with_energies(n, energies, seed=0):
    """Vectors with these standard deviations along directions at random."""
    d = len(energies)
    x = np.random.RandomState(seed).randn(n, d) * energies @ np.linalg.qr(np.random.RandomState(99).randn(d, d))[0]
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)


def test_main_directions_hold_the_most_energy():
    x = with_energies(2000, .9 ** np.arange(96))
    P = main_directions(Vectors(x), 32)
    assert P.shape == (32, 96) and P.dtype == np.float32
    np.testing.assert_allclose(P @ P.T, np.eye(32), atol=1e-5)
    kept = (Codes("bytes", P).projected(x) ** 2).sum(1)
    best = np.linalg.svd(x.astype("f8"), full_matrices=False)[1][:32]
    np.testing.assert_allclose(kept.sum(), (best ** 2).sum(), rtol=1e-5)
    spread = Codes("bytes", P).projected(x).std(0)
    assert spread.max() < 2.5 * spread.min()            # of 30 before they were turned


@pytest.mark.parametrize("energies,words", [(.96 ** np.arange(256), 33), (np.ones(256), 65)])
def test_half_the_dimensions_are_compared_where_they_tell_enough(energies, words):
    x = with_energies(4000, energies)
    cells, lines = Cells.train(Vectors(x), 30), []
    D, I, info = knn.build_knn_graph(None, 10, recall=.97, cells=cells, say=lines.append, nprobe=30)
    assert cells.codes.words(256) == words and ("128 of 256" in lines[0]) == (words == 33)
    assert recall(I, x, x, 10) >= .99 and abs(info["recall"] - recall(I, x, x, 10)) < .01
    np.testing.assert_allclose(D, np.take_along_axis(x.astype("f8") @ x.T, I.astype("i8"), 1), atol=1e-6)


def test_what_codes_lose_is_what_a_search_of_all_loses():
    x = with_energies(5000, .99 ** np.arange(256))
    sample = knn.Sample(Vectors(x), Vectors(x), 20, 0)
    codes = Codes("bytes", main_directions(Vectors(x), 128))
    [comparison] = sample.compared([codes], 60)
    measured, error = comparison.curve, comparison.error
    rows = sample.number[::knn.CODES_SAMPLE]
    keys = np.sort(nb.search_all(codes(x[rows]), codes(x), 60).view(np.uint64))[:, ::-1].view(np.int64)
    found = nb.numbers(keys)
    true = np.argsort(-(x[rows].astype("f8") @ x.T), axis=1)[:, :20]
    for K in (20, 28, 60):
        want = np.mean([len(np.intersect1d(a, b)) for a, b in zip(found[:, :K], true)]) / 20
        assert abs(measured[K - 20] - want) < .003
    assert .5 < measured[0] < .96 < .98 < measured[40]
    exact = np.take_along_axis(x[rows].astype("f8") @ x.T, found, 1)
    assert .5 * error < (nb.similarities(keys) - exact).std() < 2 * error


def test_completion_by_half_the_dimensions():
    """Known lists hold products of the codes too: otherwise new neighbours, whose products lack a half, would not get in."""
    x, n0, k = with_energies(4000, .96 ** np.arange(256)), 2500, 10
    D0, I0 = knn.exact_knn(x[:n0].copy(), x[:n0].copy(), k)
    cells = Cells.train(Vectors(x), 30)
    D, I, info = knn.build_knn_graph(None, k, recall=.96, initial=(D0, I0), cells=cells, nprobe=30)
    assert cells.codes.words(256) == 33 and recall(I, x, x, k) > .98 and recall(I[:n0], x[:n0], x, k) > .98
    np.testing.assert_allclose(D, np.take_along_axis(x.astype("f8") @ x.T, I.astype("i8"), 1), atol=1e-6)


def test_each_sample_tells_whether_codes_serve_it():
    """Base images in a cluster that differ along directions with little energy, among others that differ along all."""
    energies, k = .97 ** np.arange(256), 10
    x, q = with_energies(2500, energies), with_energies(700, energies, seed=3)
    base = with_energies(1, energies, seed=4) + .12 * with_energies(300, np.repeat([1e-9, 1], 128), seed=5)
    base /= np.linalg.norm(base, axis=1, keepdims=True)
    nodes = np.concatenate([x, base])
    D0, I0 = knn.exact_knn(x, x, k)
    cells, lines = Cells.train(Vectors(nodes), 50), []
    comparison = knn.compared_by(knn.Sample(Vectors(q), cells.vectors, k, 0), cells, .97, lambda *a: None, lines.append)
    assert cells.codes is comparison.codes and cells.codes.words(256) == 33
    D, I, info = knn.build_knn_graph(None, k, recall=.96, initial=(D0, I0), cells=cells, say=lines.append)
    assert cells.codes.words(256) > 33 and info["recall"] >= .96
    assert recall(I[2500:], base, nodes, k) >= .95


def test_merge_and_columns():
    D, I = knn.merge_neighbours(np.array([[.5, -np.inf]]), np.array([[3, -1]]), np.array([[.7]]), np.array([[8]]), 2)
    assert I.tolist() == [[8, 3]] and D.dtype == np.float32
    assert [padded_to_power_of_two(k) for k in (1, 2, 3, 30, 32, 33)] == [1, 2, 4, 32, 32, 64]


@pytest.mark.parametrize("call,message", [
    (lambda: knn.exact_knn(np.ones((2, 3), "f4"), np.ones((2, 4), "f4"), 1), "queries have 3 columns, vectors 4"),
    (lambda: Vectors(np.array([[1, np.inf]], "f4")), "row 0 holds NaN"),
    (lambda: knn.exact_knn(np.ones((2, 3), "f4"), np.array([[0] * 3, [np.nan] * 3], "f4"), 1), "row 1 holds NaN"),
])
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
