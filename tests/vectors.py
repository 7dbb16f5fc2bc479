"""Vectors in clusters, and lists of neighbours against float64."""
import numpy as np


def clustered(n, d=32, clusters=12, seed=0, spread=0.6):
    rs = np.random.RandomState(seed)
    centres = np.random.RandomState(99).randn(clusters, d)
    x = centres[rs.randint(0, clusters, n)] + spread * rs.randn(n, d)
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)


def check_exact(D, I, q, x, k, first=0, own=False):
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
    # own: a node is the first in its own list, also beside copies that are nearer by rounding
    assert (np.diff(D[:, own:kk], axis=1) <= 0).all() and (D[:, :1] >= D[:, 1:2] - 1e-6).all()


def recall(I, q, x, k):
    want = np.argsort(-(q @ x.T), axis=1)[:, :k]
    return np.mean([len(np.intersect1d(a, b)) for a, b in zip(I, want)]) / k


def with_energies(n, energies, seed=0):
    """Vectors with these standard deviations along directions at random."""
    d = len(energies)
    x = np.random.RandomState(seed).randn(n, d) * energies @ np.linalg.qr(np.random.RandomState(99).randn(d, d))[0]
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)


def known_lists(D0, I0, n):
    """Arguments of build_knn_graph() for n nodes, of which the first have these lists."""
    D, I = np.empty((n, D0.shape[1]), np.float32), np.empty((n, D0.shape[1]), np.int32)
    D[:len(D0)], I[:len(D0)] = D0, I0
    return {"out": (D, I), "known": len(D0)}
