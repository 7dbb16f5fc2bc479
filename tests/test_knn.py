"""lowshot/knn.py against exact search in float64."""
import os

import numpy as np
import pytest

from graph_utils import neighbours as nb
from lowshot import cells as cells_module, exact_search, knn, machine, sampling
from lowshot.cells import Cells, Codes, Vectors, default_nlist, train_centroids, ways_to_cells
from lowshot.features import MatrixFile
from lowshot.script import silent
from vectors import clustered, known_lists, recall, with_energies

pytestmark = pytest.mark.usefixtures("products")


@pytest.mark.parametrize("rounds", [False, True])
@pytest.mark.parametrize("n,k,nlist", [(1, 1, 1), (3, 8, 3), (500, 10, 40), (3000, 16, None)])
def test_graph_by_cells(n, k, nlist, rounds, monkeypatch):
    if rounds:
        monkeypatch.setattr(knn, "ROUND", 0)
    x = clustered(n)
    cells = Cells.train(Vectors(x), nlist)
    lines = []
    D, I, info = knn.build_knn_graph(cells, k, recall=.97, say=lines.append)
    assert info["recall"] >= .97 and lines and (info["rounds"] > 0) <= rounds
    assert n < 3000 or (info["rounds"] > 0) == rounds
    assert recall(I[:, :min(k, n)], x, x, min(k, n)) > .96
    assert (I == np.arange(n)[:, None]).any(axis=1).all() and (I[:, min(k, n):] == -1).all()
    have = I >= 0
    S = np.take_along_axis(x.astype("f8") @ x.T, np.maximum(I, 0).astype("i8"), 1)
    np.testing.assert_allclose(D[have], S[have], atol=1e-6)
    assert all(len(set(row[row >= 0])) == (row >= 0).sum() for row in I)


@pytest.mark.parametrize("free", [0, 4 * 10 ** 4, 13 * 10 ** 4])
@pytest.mark.parametrize("n0", [0, 2500])
def test_vectors_and_candidates_that_do_not_fit_in_memory(tmp_path, monkeypatch, free, n0):
    """The same graph to the bit, also where lists are known; new nodes come from memory, as in diffusion.py."""
    (tmp_path / "lists").mkdir()
    monkeypatch.setattr(knn, "ROUND", 0)
    monkeypatch.setattr(knn, "AFFORDABLE", 0)
    if n0:                              # these few cells leave something to rounds
        monkeypatch.setattr(knn, "cells_reaching", lambda *a: 3)
    parts = []
    monkeypatch.setattr(knn.nb, "descent_round", lambda *a, round=nb.descent_round, **how: parts.append(a[5]) or round(*a, **how))
    x, k = clustered(3000, spread=1.5) * np.random.RandomState(0).uniform(.1, 3, (3000, 1)).astype("f4"), 10
    x[7:60] = x[7]                      # equals are ordered by number, behind the node itself
    x[60] = 0
    x[:2500].tofile(tmp_path / "raw")
    monkeypatch.setattr(exact_search, "BLOCK", 130)
    if n0:
        D0, I0 = exact_search.exact_knn(*2 * [Vectors(x[:n0], normalise=True)], k, same=True)
        D0[:, 0] += .5                  # what is known is not computed again
    graphs = []
    for memory in (1 << 40, free):
        monkeypatch.setattr(machine, "available_memory", lambda: memory)
        vectors = Vectors(MatrixFile(str(tmp_path / "raw"), "<f4", x.shape[1], 2500), x[2500:], normalise=True)
        lines = []
        cells, known = Cells.train(vectors, 60), known_lists(D0, I0, 3000) if n0 else {}
        graphs.append(knn.build_knn_graph(cells, k, recall=.9 if n0 else .995, **known, say=lines.append,
                                          folder=str(tmp_path / "lists")))
        assert any("read in parts" in line for line in lines) == (memory == free)
        assert any("kept in files" in line for line in lines) == (memory == free)
    assert os.listdir(tmp_path / "lists") == []         # it never had a name
    half = len(parts) // 2
    assert half and parts[:half] == [None] * half
    assert all(part == 188 if free <= 4 * 10 ** 4 else 300 < part < 600 for part in parts[half:])
    (D, I, info), parts = graphs
    assert np.array_equal(D, parts[0]) and np.array_equal(I, parts[1]) and info == parts[2]
    assert not n0 or (D[:n0, 0] > 1.4).mean() > .99


def test_a_damaged_list_in_parts():
    x, (D, I) = Vectors(clustered(40)), (np.zeros((40, 3), "f4"), np.zeros((40, 3), "i4"))
    with pytest.raises(ValueError, match="damaged, no vector is 40"):
        exact_search.products_in_parts(x, lambda nodes: np.full((len(nodes), 3), 40, "i4"), D, I, silent)


@pytest.mark.parametrize("round_costs", [0, 1.25])
def test_graph_of_hard_data_reaches_the_recall_asked_for(round_costs, monkeypatch):
    monkeypatch.setattr(knn, "ROUND", round_costs)
    x = clustered(6000, d=64, spread=3.)
    results = [knn.build_knn_graph(Cells.train(Vectors(x), 150), 12, recall=r) for r in (.8, .99)]
    for (D, I, info), wanted in zip(results, (.8, .99)):
        assert info["recall"] >= wanted and recall(I, x, x, 12) >= wanted - .01
    assert results[0][2] != results[1][2]


def test_longer_lists_where_many_cells_would_be_searched(monkeypatch):
    x = clustered(6000, d=64, spread=3.)
    cells = Cells.train(Vectors(x), 150)
    monkeypatch.setattr(knn, "ROUND", 0)
    plain = knn.build_knn_graph(cells, 12, recall=.965)
    monkeypatch.setattr(knn, "WIDE_FROM", 1)
    D, I, info = knn.build_knn_graph(cells, 12, recall=.965)
    assert 2 * info["nprobe"] < plain[2]["nprobe"] and info["rounds"]
    assert info["recall"] >= .965 and recall(I, x, x, 12) >= .955
    S = np.take_along_axis(x.astype("f8") @ x.T, I.astype("i8"), 1)
    np.testing.assert_allclose(D, S, atol=1e-6)
    assert all(len(set(row)) == 12 for row in I) and (np.diff(D) <= 0).all()
    # not where they do not reach as far
    assert knn.build_knn_graph(cells, 12, recall=.99)[2]["nprobe"] > info["nprobe"]


def test_as_many_cells_as_it_takes_where_rounds_find_nothing(monkeypatch):
    x, lines = clustered(6000, d=64, spread=3.), []
    monkeypatch.setattr(knn, "ROUND", 0)
    monkeypatch.setattr(knn.nb, "descent_round", lambda *args, **how: 0)
    search_cells, before = nb.search_cells, []
    monkeypatch.setattr(knn.nb, "search_cells", lambda *a, **k: before.append(k["before"]) or search_cells(*a, **k))
    cells = Cells.train(Vectors(x), 150)
    D, I, info = knn.build_knn_graph(cells, 12, recall=.9, say=lines.append)
    searched = [int(line.split()[0]) for line in lines if "cells of" in line]
    assert len(searched) > 1 and searched[0] < searched[1] < 3 * searched[0] and info["nprobe"] == searched[-1]
    assert info["recall"] >= .9 and recall(I, x, x, 12) >= .89
    assert [b and b[0] for b in before] == [None, *searched[:-1]]       # and none of them twice
    at_once = knn.build_knn_graph(cells, 12, recall=.9, nprobe=searched[-1])
    assert (np.sort(I) == np.sort(at_once[1])).mean() > .999


def test_longer_lists_are_compared_in_all_dimensions(monkeypatch):
    monkeypatch.setattr(knn, "WIDE_FROM", 1)
    monkeypatch.setattr(knn, "ROUND", 0)
    x = with_energies(4000, .97 ** np.arange(256))
    cells, lines = Cells.train(Vectors(x), 200), []
    D, I, info = knn.build_knn_graph(cells, 12, say=lines.append)
    assert "in 128 of 256" in lines[0] and "64 candidates" in lines[1] and cells.codes.words(256) == 65
    assert info["rounds"] and info["recall"] >= .95 and recall(I, x, x, 12) >= .94


def test_best_of_longer_lists():
    x = clustered(300)
    cells = Cells.train(Vectors(x), 10)
    lists = knn.Lists(cells, cells.position(), 30)
    rs = np.random.RandomState(0)
    for i in range(300):
        count = rs.randint(31)
        lists.keys[i, :count] = nb.make_keys(rs.randn(1, count).astype("f4"), rs.permutation(300)[None, :count])[0]
    for rows in (slice(7, 100), np.array([5, 299, 0])):
        got = lists.best(rows, 11)
        want = -np.sort(-lists.keys[rows].view(np.uint64).astype("f8"), axis=1)[:, :11]
        assert np.array_equal(-np.sort(-got.view(np.uint64).astype("f8"), axis=1), want) and got.flags.c_contiguous
    assert np.array_equal(lists.best(slice(0, 9), 30), lists.keys[:9])


@pytest.mark.parametrize("spread", [.6, 1.2])
def test_cells_near_a_nodes_own_hold_its_nearest(spread):
    x = clustered(6000, spread=spread)
    cells = Cells.train(Vectors(x), 300)
    sample = sampling.Sample(cells.vectors, cells.vectors, 10, 0, cells)
    position, p = cells.position(), 6
    curve = sample.recall_by_nprobe(cells, position)
    near = sample.near_cells(cells, position, p, curve[p - 1])
    assert near.dtype == np.int32 and near.shape[0] == 300 and 2 * p <= near.shape[1] <= 75
    assert all(len(set(row)) == len(row) for row in near) and (near == np.arange(300)[:, None]).any(axis=1).all()
    plain, quick = (knn.Lists(cells, position, 20) for _ in range(2))
    plain.search(p, silent)
    quick.search(p, silent, near)
    assert abs(plain.recall(sample, 20) - curve[p - 1]) < .01
    assert abs(quick.recall(sample, 20) - plain.recall(sample, 20)) <= 3 * sampling.MISSED
    assert not np.array_equal(plain.keys, quick.keys)
    assert sample.near_cells(cells, position, 40, curve[39]) is None       # saves nothing


@pytest.mark.parametrize("n0,n1", [(1500, 400), (3, 800)])
def test_completion_of_a_known_graph(n0, n1):
    x = clustered(n0 + n1)
    D0, I0 = exact_search.exact_knn(x[:n0].copy(), x[:n0].copy(), 12)
    vectors = Vectors(x[:n0].copy(), x[n0:].copy(), normalise=True)
    D, I = np.full((n0 + n1, 12), 9, np.float32), np.full((n0 + n1, 12), 9, np.int32)
    D[:n0], I[:n0] = D0, I0         # the outputs may be what is given
    cells = Cells.train(vectors, 50)
    D, I, info = knn.build_knn_graph(cells, 12, recall=.98, out=(D, I), known=n0)
    assert info["recall"] >= .98 and recall(I, x, x, 12) > .975
    S = np.take_along_axis(x.astype("f8") @ x.T, I.astype("i8"), 1)
    np.testing.assert_allclose(D, S, atol=1e-6)


def test_few_new_nodes_among_many_known_ones_are_all_found():
    """However few they are: recall over all nodes would not tell whether they have their neighbours."""
    x, n0, k = clustered(4000), 4000 - 25, 12
    D0, I0 = exact_search.exact_knn(x[:n0].copy(), x[:n0].copy(), k)
    D, I, info = knn.build_knn_graph(Cells.train(Vectors(x), 300), k, **known_lists(D0, I0, len(x)))
    want = np.argsort(-(x.astype("f8") @ x.T), axis=1)[:, :k]
    assert info["recall"] > .99 and np.mean([len(np.intersect1d(a, b)) for a, b in zip(I[n0:], want[n0:])]) > .99 * k
    entries = [(i, j) for i in range(n0) for j in want[i] if j >= n0]
    assert len(entries) > 100 and np.mean([j in I[i] for i, j in entries]) > .95


def test_known_lists_have_bars_behind_them():
    x = clustered(900)
    D0, I0 = exact_search.exact_knn(x[:500].copy(), x[:500].copy(), 8)
    I0[3, 5:], D0[3, 5:] = -1, -np.inf
    cells = Cells.train(Vectors(x), 20)
    cells.use(Codes())
    lists = knn.Lists(cells, cells.position(), 8 + sampling.SPARE_LISTED, I0, error=.01)
    at = cells.position()
    keys = lists.keys[at[:500]]
    numbers = nb.numbers(keys)
    np.testing.assert_array_equal(numbers[:, :8], np.where(I0 < 0, -1, at[I0]))
    assert (numbers[:, 8:] == -1).all() and not lists.keys[at[500:]].any()
    full = np.arange(500) != 3
    np.testing.assert_allclose(nb.similarities(keys)[:, :8], np.where(I0 < 0, -np.inf, D0), atol=.01)
    np.testing.assert_allclose(nb.similarities(keys)[full, 8:], np.repeat(nb.similarities(keys)[full, :8].min(1, keepdims=True) - knn.BAR * .01,
                                                                          sampling.SPARE_LISTED, 1), atol=1e-6)
    assert not keys[3, 5:].any()
    assert not (keys & nb.NEW).any()
    lists.search(3, silent)         # what is not between two known nodes is new
    numbers, new = nb.numbers(lists.keys), cells.order >= 500
    assert (numbers[~new] >= 0).any() and new[numbers[~new]].any()
    np.testing.assert_array_equal(lists.keys & nb.NEW > 0, (numbers >= 0) & (new[:, None] | new[numbers]))


def test_search_among_cells(monkeypatch):
    monkeypatch.setattr(exact_search, "EXACT_BELOW", 100)
    monkeypatch.setattr(sampling, "SAMPLE", 200)
    x, q = clustered(3000), clustered(700, seed=5)
    D, I, info = knn.search_begun(Cells.train(Vectors(x)), q, 10, recall=.96)()
    assert not info["exact"] and info["recall"] >= .95 and recall(I, q, x, 10) > .95
    np.testing.assert_allclose(D, np.take_along_axis(q.astype("f8") @ x.T, I.astype("i8"), 1), atol=1e-6)


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
    D, I, info = knn.build_knn_graph(cells, 10)
    assert info["recall"] > .95 and recall(I[-few:], x[-few:], x, 10) > .95


def test_new_nodes_look_for_cells_near_their_own(monkeypatch):
    x, n0, k = clustered(8000, spread=1.), 3000, 12
    monkeypatch.setattr(knn, "AFFORDABLE", 0)
    asked = []
    near_cells = sampling.Sample.near_cells
    monkeypatch.setattr(sampling.Sample, "near_cells", lambda *a: asked.append(near_cells(*a)) or asked[-1])
    D0, I0 = exact_search.exact_knn(x[:n0].copy(), x[:n0].copy(), k)
    D, I, info = knn.build_knn_graph(Cells.train(Vectors(x), 300), k, **known_lists(D0, I0, len(x)), seed=3)
    assert len(asked) == 1 and asked[0] is not None and info["nprobe"] < 40
    assert info["recall"] >= .95 and recall(I, x, x, k) > .95


def test_same_seed_same_graph(monkeypatch):
    monkeypatch.setattr(knn, "ROUND", 0)
    x = clustered(3000, spread=1.5)
    a, b = (knn.build_knn_graph(Cells.train(Vectors(x), 60, seed=3), 10, seed=3) for _ in range(2))
    assert np.array_equal(a[1], b[1]) and np.array_equal(a[0], b[0]) and a[2] == b[2]


@pytest.mark.parametrize("round_costs", [0, 1.25])
def test_many_duplicates(round_costs, monkeypatch):
    """Unreadable images all have the same features: more of them than neighbours."""
    monkeypatch.setattr(knn, "ROUND", round_costs)
    x = clustered(1500)
    x[200:900] = x[3]
    x[900:1000] = 0
    D, I, info = knn.build_knn_graph(Cells.train(Vectors(x), 30), 8)
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
    D, I, info = knn.build_knn_graph(cells, 8)
    S = np.sort(x.astype("f8") @ x.T, axis=1)[:, ::-1]
    assert (I == np.arange(1500)[:, None]).any(axis=1).all() and info["recall"] >= .95
    np.testing.assert_allclose(D[copies], S[copies, :8], atol=1e-6)
    assert np.isin(I[copies], copies).all() and np.isin(I[copies[40:]], copies[:40]).sum() == 7 * len(copies[40:])
    for n0 in (1, 500, 1000, 1499):
        joined = knn.build_knn_graph(cells, 8, **known_lists(D[:n0], I[:n0], len(x)))
        assert joined[2]["recall"] >= .95 and (np.diff(joined[0], axis=1) <= 0).all()
        np.testing.assert_allclose(joined[0][copies[copies >= n0]], 1, atol=1e-6)


@pytest.mark.parametrize("spread,format", [(.03, "bytes"), (.008, "bfloat16"), (.001, "float32"), (1e-5, "bytes")])
def test_clusters_as_tight_as_rounding(spread, format):
    """Bursts of nearly the same image: bytes hide who is the nearest, until float32 does not tell either and all will do."""
    rs = np.random.RandomState(0)
    x = np.repeat(rs.randn(30, 64), 100, axis=0) / 8 + spread * rs.randn(3000, 64)
    x = (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)
    cells, lines = Cells.train(Vectors(x), 100), []
    D, I, info = knn.build_knn_graph(cells, 10, say=lines.append)
    assert cells.codes.format == format and (f"compared in {format}" in lines[0]) == (format != "bytes")
    assert info["recall"] >= .95 and info["nprobe"] < 50 and not lines[-1].startswith("note")
    assert spread < 1e-4 or recall(I, x, x, 10) > .94
    assert (I == np.arange(3000)[:, None]).any(axis=1).all()
    assert (I // 100 == np.arange(3000)[:, None] // 100).all()
    np.testing.assert_allclose(D, np.take_along_axis(x.astype("f8") @ x.T, I.astype("i8"), 1), atol=1e-6)


@pytest.mark.parametrize("energies,words", [(.96 ** np.arange(256), 33), (np.ones(256), 65)])
def test_half_the_dimensions_are_compared_where_they_tell_enough(energies, words):
    x = with_energies(4000, energies)
    cells, lines = Cells.train(Vectors(x), 30), []
    D, I, info = knn.build_knn_graph(cells, 10, recall=.97, say=lines.append, nprobe=30)
    assert cells.codes.words(256) == words and ("128 of 256" in lines[0]) == (words == 33)
    assert recall(I, x, x, 10) >= .99 and abs(info["recall"] - recall(I, x, x, 10)) < .01
    np.testing.assert_allclose(D, np.take_along_axis(x.astype("f8") @ x.T, I.astype("i8"), 1), atol=1e-6)


def test_completion_by_half_the_dimensions():
    """Known lists hold products of the codes too: otherwise new neighbours, whose products lack a half, would not get in."""
    x, n0, k = with_energies(4000, .96 ** np.arange(256)), 2500, 10
    D0, I0 = exact_search.exact_knn(x[:n0].copy(), x[:n0].copy(), k)
    cells = Cells.train(Vectors(x), 30)
    D, I, info = knn.build_knn_graph(cells, k, recall=.96, **known_lists(D0, I0, len(x)), nprobe=30)
    assert cells.codes.words(256) == 33 and recall(I, x, x, k) > .98 and recall(I[:n0], x[:n0], x, k) > .98
    np.testing.assert_allclose(D, np.take_along_axis(x.astype("f8") @ x.T, I.astype("i8"), 1), atol=1e-6)
