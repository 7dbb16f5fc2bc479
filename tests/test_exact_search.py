"""lowshot/exact_search.py against float64."""
import numpy as np
import pytest

from graph_utils import neighbours as nb
from lowshot import exact_search, knn
from lowshot.cells import Cells, Vectors, as_vectors
from lowshot.features import MatrixFile, normalise_rows
from vectors import check_exact, clustered

pytestmark = pytest.mark.usefixtures("products")


@pytest.mark.parametrize("nq,n,k", [(0, 5, 3), (5, 0, 3), (1, 1, 1), (1, 1, 4), (7, 3, 5), (40, 700, 30), (300, 90, 10)])
def test_exact(nq, n, k):
    q, x = clustered(nq, seed=1), clustered(n, seed=2)
    check_exact(*exact_search.exact_knn(q, x, k), q, x, k)


def test_exact_where_bfloat16_cannot_tell():
    """Thousands of vectors that differ by less than rounding: the candidates prove nothing, float32 decides."""
    rs = np.random.RandomState(0)
    x = np.ones((3000, 32), np.float32) + 1e-3 * rs.randn(3000, 32).astype("f4")
    x[100:200] = x[0]
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    D, I = exact_search.exact_knn(x[:50].copy(), x, 10)
    S = x[:50].astype("f8") @ x.T
    np.testing.assert_allclose(D, -np.sort(-S, axis=1)[:, :10], atol=3e-7)
    for y in (x, np.concatenate([x, clustered(4000, d=32)])):        # most are in doubt, or fewer
        D, I = exact_search.exact_knn(y, y, 10, same=True)
        np.testing.assert_allclose(D, -np.sort(-(y.astype("f8") @ y.T), axis=1)[:, :10], atol=3e-7)
        np.testing.assert_allclose(D, np.take_along_axis(y.astype("f8") @ y.T, I.astype("i8"), 1), atol=3e-7)
        assert np.array_equal(I[:, 0], np.arange(len(y)))
        assert all(len(set(row)) == 10 for row in I.tolist())


def test_all_with_all_in_bytes_where_these_do(monkeypatch):
    rs = np.random.RandomState(0)
    apart, alike = clustered(900), np.ones((600, 32), np.float32) + 3e-3 * rs.randn(600, 32).astype("f4")
    alike[100:150] = alike[0]
    alike /= np.linalg.norm(alike, axis=1, keepdims=True)
    apart[850:] = apart[:50]
    formats, search_self = [], nb.search_self
    monkeypatch.setattr(nb, "search_self", lambda X, *args: formats.append(X.shape[1]) or search_self(X, *args))
    for first, doubt, spare, x, words in ((901, 0, 20, apart, nb.words(32)), (900, .02, 20, apart, nb.words_of_bytes(32)),
                                          (1, .02, 20, alike, nb.words(32)),
                                          # some are in doubt, which float32 tells apart
                                          (1, 1, 2, np.concatenate([apart, alike]), nb.words_of_bytes(32))):
        for name, value in (("BYTES_FROM", first), ("BYTES_DOUBT", doubt), ("SPARE", spare)):
            monkeypatch.setattr(exact_search, name, value)
        formats.clear()
        D, I = exact_search.exact_knn(x, x, 10, same=True)
        assert formats[0] == words
        S = x.astype("f8") @ x.T
        np.testing.assert_allclose(D, -np.sort(-S, axis=1)[:, :10], atol=3e-7)
        np.testing.assert_allclose(D, np.take_along_axis(S, I.astype("i8"), 1), atol=3e-7)
        assert np.array_equal(I[:, 0], np.arange(len(x))) and all(len(set(row)) == 10 for row in I.tolist())


def test_bounds_hold_where_all_elements_are_rounded_down():
    """The nearest is not among the candidates: what rounding may have taken of any vector puts the query in doubt."""
    u, d = 2.0 ** -7, 64                                        # bfloat16 holds 1 and 1 + u
    x = np.ones((60, d), "f4")
    x[0] = 1 + .49 * u
    for i in range(1, 60):
        x[i, :31 - (i - 1) // 2] += u
    x[45:] = .5
    assert exact_search.exact_knn(np.ones((1, d), "f4"), x, 1)[1][0, 0] == 0


def test_bounds_count_the_columns():
    """What float32 sums may lose grows with the number of their terms."""
    bounds = [exact_search._error(np.zeros(1, "f4"), 0.0, x, x) for x in (as_vectors(clustered(3, d=d)) for d in (64, 8192))]
    assert bounds[0] < 5e-5 and bounds[1] >= 8192 * 2.0 ** -24


def test_exact_for_vectors_that_are_not_normalised():
    rs = np.random.RandomState(0)
    q, x = 30 * rs.randn(20, 40).astype("f4"), rs.randn(500, 40).astype("f4") * rs.uniform(.01, 50, (500, 1)).astype("f4")
    D, I = exact_search.exact_knn(q, x, 5)
    S = q.astype("f8") @ x.T
    np.testing.assert_allclose(D, -np.sort(-S, axis=1)[:, :5], rtol=1e-5)


def test_candidates_that_cannot_be_among_the_best_are_taken_out():
    rs = np.random.RandomState(0)
    S, error = rs.rand(50, 20).astype("f4"), rs.uniform(0, .2, 50).astype("f4")
    numbers = np.tile(np.arange(20), (50, 1))
    numbers[7, 3:] = -1
    keys = nb.make_keys(S, numbers)
    exact_search._leave_possible(keys, 5, error)
    least = -np.sort(-S, axis=1)[:, 4] - 2 * error
    left = nb.numbers(keys)
    for i in range(50):
        want = numbers[i, :3] if i == 7 else np.flatnonzero(S[i] >= least[i] - 1e-6)
        assert set(left[i][left[i] >= 0]) == set(want)
    keys = nb.make_keys(S, numbers)
    exact_search._leave_possible(keys, 20, error)
    assert np.array_equal(keys, nb.make_keys(S, numbers))


def test_files_are_normalised_as_they_are_read(tmp_path):
    x, more = 7 * clustered(300, seed=1), clustered(50, seed=2)
    x[17] = 0
    x.tofile(tmp_path / "raw")
    parts = MatrixFile(str(tmp_path / "raw"), "<f4", 32, 300), more
    vectors, whole = Vectors(*parts, normalise=True), normalise_rows(np.concatenate([x, more]), "all")
    check_exact(*exact_search.exact_knn(more, vectors, 9), more, whole, 9)
    D, I = exact_search.exact_knn(vectors, vectors, 9, same=True)
    check_exact(D, I, whole, whole, 9)
    assert (I == np.arange(350)[:, None]).any(axis=1).all()
    x[123, 4] = np.nan
    x.tofile(tmp_path / "raw")
    vectors = Vectors(*parts, normalise=True)
    for asked in (lambda: vectors.scaled_rows([310, 5, 123]), lambda: vectors.scale):
        with pytest.raises(ValueError, match="raw: row 123 holds NaN"):
            asked()
    more[10, 4] = np.nan
    with pytest.raises(ValueError, match="the features: row 10 holds NaN"):
        Vectors(*parts, normalise=True).scaled_rows([310, 5])


def test_a_few_vectors_do_not_take_the_norms_of_all(tmp_path):
    x = 7 * clustered(300, seed=1)
    x[17] = 0
    x.tofile(tmp_path / "raw")
    told = []
    vectors = Vectors(MatrixFile(str(tmp_path / "raw"), "<f4", 32, 250), x[250:], normalise=True,
                      progress=lambda *words: told.append(words))
    rows = vectors.scaled_rows([3, 17, 280])
    assert not told
    assert np.array_equal(rows, x[[3, 17, 280]] * vectors.scale[[3, 17, 280], None])
    assert told == [("vectors read", 250, 300), ("vectors read", 300, 300)]
    assert np.array_equal(rows, vectors.scaled_rows([3, 17, 280]))


def test_candidates_are_read_from_large_files(tmp_path, monkeypatch):
    monkeypatch.setattr(exact_search, "EXACT_BELOW", 100)
    monkeypatch.setattr(exact_search, "LOOKED_UP", 500 * 32)      # eleven queries at a time, of those with all candidates
    x, more = 7 * clustered(700, seed=1), clustered(150, seed=2)
    x.tofile(tmp_path / "raw")
    vectors = Vectors(MatrixFile(str(tmp_path / "raw"), "<f4", 32, 700), more, normalise=True)
    new, q, whole = clustered(90, seed=3), clustered(60), normalise_rows(np.concatenate([x, more]), "all")
    for a, b in zip(exact_search.exact_knn(q, vectors, 9), exact_search.exact_knn(q, whole, 9)):
        np.testing.assert_allclose(a, b, atol=1e-6)
    D, I = exact_search.exact_knn(whole, whole, 6)
    check_exact(*exact_search.cross_insert(new, vectors, D, I), new, np.concatenate([whole, new]), 6)
    check_exact(D, I, whole, np.concatenate([whole, new]), 6)
    cells = Cells.train(vectors, 20)
    D, I, info = knn.search_begun(cells, np.concatenate([q] * 40), 7, recall=1)()
    check_exact(D[:60], I[:60], q, whole, 7)
    assert np.array_equal(I, np.tile(I[:60], (40, 1))) and info["recall"] > .99


@pytest.mark.parametrize("n,m,k", [(200, 20, 8), (5, 9, 8), (0, 6, 3), (30, 0, 3), (300, 1, 12), (50, 200, 6)])
def test_cross_insert(n, m, k):
    old, new = clustered(n, seed=1), clustered(m, seed=2)
    everything = np.concatenate([old, new])
    D, I = exact_search.exact_knn(old, old, k)
    D_new, I_new = exact_search.cross_insert(new, old, D, I)
    check_exact(D_new, I_new, new, everything, k)
    check_exact(D, I, old, everything, k)


def test_cross_insert_of_duplicates():
    old = clustered(400, seed=1)
    new = np.concatenate([old[:150], np.tile(old[7], (100, 1)), np.zeros((3, 32), "f4")])
    D, I = exact_search.exact_knn(old, old, 6)
    D_new, I_new = exact_search.cross_insert(new, Vectors(old, normalise=True), D, I)
    check_exact(D_new, I_new, new, np.concatenate([old, new]), 6, own=True)
    check_exact(D, I, old, np.concatenate([old, new]), 6, own=True)


def test_cross_insert_where_bytes_leave_all_in_doubt(monkeypatch):
    for spare in ("FEW_INSERTED", "INSERTED_SPARE"):
        monkeypatch.setattr(exact_search, spare, 3)
    monkeypatch.setattr(exact_search, "SPARE", 4)
    searched = []
    exact_knn = exact_search.exact_knn

    def counted(xq, x, *args, **named):
        searched.append((as_vectors(xq).n, as_vectors(x).n))
        return exact_knn(xq, x, *args, **named)

    rs = np.random.RandomState(0)
    everything = clustered(5)[rs.randint(5, size=500)] + rs.randn(500, 32).astype("f4") * 2e-3      # bytes err by as much
    everything /= np.linalg.norm(everything, axis=1, keepdims=True)
    old, new = everything[:420].copy(), everything[420:].copy()
    D, I = exact_knn(old, old, 6)
    monkeypatch.setattr(exact_search, "exact_knn", counted)
    D_new, I_new = exact_search.cross_insert(new, old, D, I)
    assert (80, 420) in searched and any(nq > 100 and n == 80 for nq, n in searched)
    check_exact(D_new, I_new, new, everything, 6)
    check_exact(D, I, old, everything, 6)


@pytest.mark.parametrize("new_are_shorter", [True, False])
def test_nodes_stay_in_their_own_lists_beside_many_copies(new_are_shorter):
    """Of copies that differ by rounding, the shorter ones are nearer to all others than to themselves."""
    v = clustered(1)
    old, new = np.repeat(v, 9, axis=0), np.repeat(v, 8, axis=0)
    (new if new_are_shorter else old)[:] *= np.float32(1 - 4e-7)
    D, I = exact_search.exact_knn(old, old, 5, same=True)
    assert (I[:, 0] == np.arange(9)).all()
    before = I.copy()
    D_new, I_new = exact_search.cross_insert(new, old, D, I)
    assert (I[:, 0] == np.arange(9)).all() and (I_new[:, 0] == np.arange(9, 17)).all()
    assert (I_new[:, 1:] < 9).all() if new_are_shorter else (I[:, 1:] >= 9).all()
    assert (before == I).all() == new_are_shorter and all(len(set(row)) == 5 for row in (*I, *I_new))


def test_merge():
    D, I = nb.merge_lists(np.array([[.5, -np.inf]]), np.array([[3, -1]]), np.array([[.7]]), np.array([[8]]), 2)
    assert I.tolist() == [[8, 3]] and D.dtype == np.float32


@pytest.mark.parametrize("call,message", [
    (lambda: exact_search.exact_knn(np.ones((2, 3), "f4"), np.ones((2, 4), "f4"), 1), "queries have 3 columns, vectors 4"),
    (lambda: Vectors(np.array([[1, np.inf]], "f4")), "row 0 holds NaN"),
    (lambda: exact_search.exact_knn(np.ones((2, 3), "f4"), np.array([[0] * 3, [np.nan] * 3], "f4"), 1), "row 1 holds NaN"),
])
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
