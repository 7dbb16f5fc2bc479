"""lowshot/sampling.py: recall, and what codes lose."""
import numpy as np
import pytest

from graph_utils import neighbours as nb
from lowshot import exact_search, knn, sampling
from lowshot.cells import Cells, Codes, Vectors, main_directions
from vectors import check_exact, clustered, known_lists, recall, with_energies

pytestmark = pytest.mark.usefixtures("products")


@pytest.mark.parametrize("spread,unsure", [(.6, False), (.0005, True)])
def test_a_sample_by_bytes_has_the_true_neighbours(spread, unsure, monkeypatch):
    """Clusters as tight as rounding, too: there the candidates leave some in doubt, and these are searched again."""
    monkeypatch.setattr(exact_search, "MANY_SPARE", 50)
    monkeypatch.setattr(sampling, "SEARCH_BLOCK", 700)
    again, exact = [], exact_search.exact_knn
    monkeypatch.setattr(exact_search, "exact_knn", lambda x, *args, **options: again.append(len(x)) or exact(x, *args, **options))
    x = clustered(3000, spread=spread)
    cells = Cells.train(Vectors(x), 60)
    sample = sampling.Sample(cells.vectors, cells.vectors, 10, 0, cells, first=500, size=300)
    assert cells.codes.plain and (sum(again) > 0) == unsure and sample.number.min() >= 500
    check_exact(sample.D, sample.I, x[sample.number], x, 10)
    assert sample.candidates.shape == (300, 60) and all(len(set(row)) == 60 for row in sample.candidates)
    few = sampling.Sample(cells.vectors, Vectors(x[:40].copy()), 10, 0, Cells.train(Vectors(x[:40].copy()), 4))
    check_exact(few.D, few.I, x[few.number], x[:40], 10)


def test_measured_recall_is_the_recall():
    x = clustered(4000, spread=1.5)
    D, I, info = knn.build_knn_graph(Cells.train(Vectors(x), 100), 10, nprobe=3)
    assert info["nprobe"] == 3 and info["rounds"] == 0 and .2 < info["recall"] < .95
    assert abs(info["recall"] - recall(I, x, x, 10)) < .03


def test_the_curve_predicts_what_a_number_of_cells_finds():
    x = clustered(3000, spread=1.)
    cells = Cells.train(Vectors(x), 60)
    sample = sampling.Sample(cells.vectors, cells.vectors, 10, 0, cells)
    curve = sample.recall_by_nprobe(cells, cells.position())
    assert len(curve) == 60 and abs(curve[-1] - 1) < 1e-9 and (np.diff(curve) >= 0).all()
    for nprobe in (1, 4, 16):
        D, I, info = knn.build_knn_graph(cells, 10, nprobe=nprobe)
        assert abs(info["recall"] - curve[nprobe - 1]) < .01


def test_what_codes_lose_is_what_a_search_of_all_loses():
    x = with_energies(5000, .99 ** np.arange(256))
    sample = sampling.Sample(Vectors(x), Vectors(x), 20, 0, Cells.train(Vectors(x), 50))
    codes = Codes("bytes", main_directions(Vectors(x), 128))
    [comparison] = sample.compared([codes], 60)
    measured, error = comparison.curve, comparison.error
    rows = sample.number[::sampling.CODES_SAMPLE]
    keys = np.sort(nb.search_all(codes(x[rows]), codes(x), 60).view(np.uint64))[:, ::-1].view(np.int64)
    found = nb.numbers(keys)
    true = np.argsort(-(x[rows].astype("f8") @ x.T), axis=1)[:, :20]
    for K in (20, 28, 60):
        want = np.mean([len(np.intersect1d(a, b)) for a, b in zip(found[:, :K], true)]) / 20
        assert abs(measured[K - 20] - want) < .003
    assert .5 < measured[0] < .96 < .98 < measured[40]
    exact = np.take_along_axis(x[rows].astype("f8") @ x.T, found, 1)
    assert .5 * error < (nb.similarities(keys) - exact).std() < 2 * error


def test_each_sample_tells_whether_codes_serve_it():
    """Base images in a cluster that differ along directions with little energy, among others that differ along all."""
    energies, k = .97 ** np.arange(256), 10
    x, q = with_energies(2500, energies), with_energies(700, energies, seed=3)
    base = with_energies(1, energies, seed=4) + .12 * with_energies(300, np.repeat([1e-9, 1], 128), seed=5)
    base /= np.linalg.norm(base, axis=1, keepdims=True)
    nodes = np.concatenate([x, base])
    D0, I0 = exact_search.exact_knn(x, x, k)
    cells, lines = Cells.train(Vectors(nodes), 50), []
    sample = sampling.Sample(Vectors(q), cells.vectors, k, 0, cells)
    comparison = sampling.compared_by(sample, cells, .97, lambda *a: None, lines.append)
    assert cells.codes is comparison.codes and cells.codes.words(256) == 33
    D, I, info = knn.build_knn_graph(cells, k, recall=.96, **known_lists(D0, I0, len(nodes)), say=lines.append)
    assert cells.codes.words(256) > 33 and info["recall"] >= .96
    assert recall(I[2500:], base, nodes, k) >= .95


def test_a_sample_is_drawn_as_nobody_else_draws():
    found = sampling.sampled(1000, 100, 3)
    assert len(set(found)) == 100 and not np.array_equal(
        found, np.sort(np.random.RandomState(3).choice(1000, 100, replace=False)))


def test_margin_of_a_measured_recall():
    assert [round(sampling.with_margin(r), 5) for r in (0, .95, .98, .99, 1)] == [.005, .955, .985, .9925, 1]
