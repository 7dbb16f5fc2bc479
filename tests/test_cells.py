"""lowshot/cells.py."""
import numpy as np
import pytest

from graph_utils import neighbours as nb
from lowshot import cells as cells_module, exact_search, knn
from lowshot.cells import Cells, Codes, Vectors, chained, main_directions, train_centroids, ways_to_cells
from lowshot.features import MatrixFile
from vectors import check_exact, clustered, with_energies

pytestmark = pytest.mark.usefixtures("products")


@pytest.mark.parametrize("free", [0, 1 << 40])
def test_maps_of_files_larger_than_memory_are_not_read_ahead(tmp_path, monkeypatch, free):
    monkeypatch.setattr("lowshot.machine.available_memory", lambda: free)
    x = clustered(700, seed=1)
    x.tofile(tmp_path / "raw")
    vectors = Vectors(MatrixFile(str(tmp_path / "raw"), "<f4", 32, 700), normalise=True)
    check_exact(*exact_search.exact_knn(vectors, vectors, 9, same=True), x, x, 9)
    with open("/proc/self/smaps") as f:
        maps = f.read().split(str(tmp_path / "raw"))
    flags = next(line for line in maps[1].splitlines() if line.startswith("VmFlags:"))
    assert (" rr" in flags) == (free == 0)          # MADV_RANDOM


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
    vectors = Vectors(x, normalise=True)
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
    D, I, info = knn.build_knn_graph(Cells.train(Vectors(x), 4), 3)
    assert (I == np.arange(5)[:, None]).any(axis=1).all()


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


def test_centroids_depend_on_the_seed():
    x = Vectors(clustered(500))
    a, b, c = (train_centroids(x, 10, seed)[0] for seed in (0, 0, 1))
    assert np.array_equal(a, b) and not np.array_equal(a, c)
