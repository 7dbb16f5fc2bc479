"""The library's GPU code: on a GPU if there is one, otherwise in Triton's interpreter (conftest.py), if Triton is installed."""
import numpy as np
import pytest
import torch

pytest.importorskip("triton")

from graph_utils import gpu, neighbour_sums  # noqa: E402
from graph_utils import neighbours as nb  # noqa: E402
from lowshot import exact_search, gpu_search  # noqa: E402
from lowshot.cells import Vectors  # noqa: E402
from lowshot.backends import TritonGraph  # noqa: E402
from reference import neighbours, random_graph, transition_matrix  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
Graph = type("Graph", (TritonGraph,), {"device": DEVICE})


def panel(W, rs, ncol):
    L = W.zeros(ncol)
    L.copy_(torch.from_numpy(rs.rand(W.n, ncol).astype(np.float32)))
    return L


@pytest.mark.parametrize("n,k", [(1, 1), (2, 5), (7, 3), (65, 30), (517, 4)])
@pytest.mark.parametrize("ncol", [16, 48, 128])
def test_product_equals_dense(n, k, ncol, monkeypatch):
    monkeypatch.setattr(gpu, "SUMMED", 32)          # several parts even here
    rs = np.random.RandomState(n + ncol)
    I = random_graph(rs, n, k)
    exact, W = transition_matrix(I), Graph(I)
    L, out = panel(W, rs, ncol), W.zeros(ncol)
    scale = rs.rand(ncol).astype(np.float32)
    colsum, weighted = W.product(L, out, scale), W.product(L, out, scale, weights=W.mass())
    expected = exact @ L.cpu().numpy().astype(np.float64) * scale
    np.testing.assert_allclose(out.cpu().numpy(), expected, rtol=1e-5)
    np.testing.assert_allclose(colsum, expected.sum(axis=0), rtol=1e-6)
    np.testing.assert_allclose(weighted, (exact @ expected).sum(axis=0), rtol=1e-5)


def test_selected_rows_only():
    rs = np.random.RandomState(2)
    W = Graph(random_graph(rs, 300, 10))
    L, full, some = panel(W, rs, 32), W.zeros(32), W.zeros(32) + 7
    W.product(L, full, np.ones(32, np.float32))
    rows = np.sort(rs.choice(300, 120, replace=False)).astype(np.int32)
    colsum = W.product(L, some, np.ones(32, np.float32), rows)
    np.testing.assert_array_equal(some.cpu()[rows], full.cpu()[rows])
    assert (np.delete(some.cpu().numpy(), rows, axis=0) == 7).all()
    np.testing.assert_allclose(colsum, full.cpu().numpy()[rows].sum(axis=0, dtype=np.float64), rtol=1e-6)
    assert (W.product(L, some, np.ones(32, np.float32), np.empty(0, np.int32)) == 0).all()


def test_a_node_with_very_many_neighbours(monkeypatch):
    monkeypatch.setattr(gpu, "PIECE", 64)           # the interpreter is slow
    n = 100001 if DEVICE == "cuda" else 501
    I = np.zeros((n, 1), np.int32)                  # node 0 is everybody's neighbour, and its own
    W = Graph(I)
    L, out = W.zeros(16) + 0.1, W.zeros(16)
    W.product(L, out, np.ones(16, np.float32))
    np.testing.assert_allclose(out.cpu().numpy(), 0.1, rtol=5e-6)


@pytest.mark.parametrize("nq,k", [(1, 1), (50, 7), (33, 40)])
def test_neighbour_sums(nq, k):
    rs = np.random.RandomState(nq)
    W = Graph(random_graph(rs, 200, 5))
    L, I = panel(W, rs, 48), rs.randint(-1, 200, (nq, k)).astype(np.int32)
    I[0] = -1
    scores, scale = np.empty((nq, 48), np.float32), rs.rand(48).astype(np.float32)
    W.neighbour_sums(I, L, scale, scores)
    np.testing.assert_allclose(scores, neighbour_sums(I, np.ascontiguousarray(L.cpu().numpy()), scale), rtol=1e-5)


@pytest.fixture
def few_queries(monkeypatch):
    """Queries are padded to few: each takes the interpreter long."""
    if DEVICE == "cpu":
        monkeypatch.setattr(gpu, "TILE", (16, *gpu.TILE[1:]))


@pytest.fixture
def on_gpu(monkeypatch, few_queries):
    """Exact search of any size by the GPU's code."""
    monkeypatch.setattr(exact_search, "ON_GPU", 0)
    monkeypatch.setattr(gpu_search, "fits", lambda *sizes: True)
    return torch.device(DEVICE)


def unit(rs, n, d):
    x = rs.randn(n, d).astype(np.float32)
    return x / np.linalg.norm(x, axis=1, keepdims=True)


@pytest.mark.parametrize("nq,n,d,k", [(1, 1, 3, 1), (3, 20, 64, 40), (130, 600, 70, 1), (5, 1500, 32, 33)])
def test_exact_search(on_gpu, nq, n, d, k):
    rs = np.random.RandomState(n)
    q, x = unit(rs, nq, d), unit(rs, n, d)
    D, I = exact_search.exact_knn(q, Vectors(x, device=on_gpu), k)
    np.testing.assert_array_equal(I, neighbours(q, x, k))
    found = I >= 0
    np.testing.assert_allclose(D[found], (q @ x.T)[np.nonzero(found)[0], I[found]], atol=1e-6)
    assert (D[~found] == -np.inf).all()


@pytest.mark.parametrize("close", [0, 1e-3])
def test_a_graph_of_nearly_equal_vectors(on_gpu, monkeypatch, close):
    """Products in float16 leave nearly everything in doubt."""
    monkeypatch.setattr(gpu_search, "BLOCK", 128)
    monkeypatch.setattr(exact_search, "MANY_ON_GPU", 2)
    rs = np.random.RandomState(3)
    x = np.repeat(unit(rs, 3, 32), 30, axis=0)
    x += close * rs.randn(*x.shape).astype(np.float32)
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    D, I = exact_search.exact_knn(*2 * [Vectors(x, device=on_gpu)], 5, same=True)
    expected, _ = exact_search.exact_knn(x, x, 5, same=True)
    np.testing.assert_allclose(D, expected, atol=1e-6)
    if not close:
        np.testing.assert_array_equal(I[:, 0], np.arange(len(x)))
    assert all(len(set(row)) == 5 for row in I.tolist())


def test_new_nodes(on_gpu):
    rs = np.random.RandomState(4)
    x, new = unit(rs, 120, 24), unit(rs, 40, 24)
    lists = []
    for device in (on_gpu, None):
        vectors = Vectors(x, device=device)
        D, I = exact_search.exact_knn(vectors, vectors, 3, same=True)
        lists.append((D, I, *exact_search.cross_insert(new, vectors, D, I)))
    for by_gpu, by_cpu in zip(*lists):
        np.testing.assert_allclose(by_gpu, by_cpu, atol=1e-6)


def test_where_the_gpu_searches(monkeypatch):
    monkeypatch.setattr(gpu_search, "fits", lambda n, d, device: n < 10 ** 8)
    device = torch.device(DEVICE)
    assert exact_search.all_on_gpu(10 ** 7, 10 ** 7, 256, device) and not exact_search.all_on_gpu(10 ** 8, 10 ** 6, 256, device)
    assert not exact_search.all_on_gpu(3 * 10 ** 7, 3 * 10 ** 7, 256, device)
    assert not exact_search.all_on_gpu(10, 10, 256, None)


def test_bounds_hold(few_queries):
    rs = np.random.RandomState(5)
    q, x = Vectors(unit(rs, 20, 100)), Vectors(unit(rs, 900, 100))
    rounded = [gpu_search.Rounded(v, torch.device(DEVICE)) for v in (q, x)]
    exact = q.arrays[0].astype(np.float64) @ x.arrays[0].astype(np.float64).T
    for rows, keys, error in gpu_search.near(*rounded, 12, rounded[0].errors_with(rounded[1], exact_search._error)):
        number, products = nb.numbers(keys), nb.similarities(keys)
        assert (np.abs(products - np.take_along_axis(exact[rows], number, 1)) <= error[:, None]).all()
        left = exact[rows].copy()
        np.put_along_axis(left, number, -np.inf, 1)
        assert (left.max(axis=1) <= products.min(axis=1) + error).all()
