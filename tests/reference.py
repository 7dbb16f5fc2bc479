"""The method written the slow obvious way, in dense float64 numpy: what the fast code is held against."""
import numpy as np


def random_graph(rs, n, k):
    """(n, k) distinct neighbours per row, some rows cut short or empty."""
    I = np.full((n, k), -1, np.int32)
    for i in range(n):
        row = rs.choice(n, min(k, n), replace=False)
        I[i, :len(row)] = row
        I[i, rs.choice([0, k // 2, k, k]):] = -1
    return I


def neighbours(xq, xb, k):
    """I (nq, k): the k nearest rows of xb by inner product, best first; -1 where there are fewer."""
    I = np.full((len(xq), k), -1, np.int64)
    S = xq.astype(np.float64) @ xb.astype(np.float64).T
    kk = min(k, len(xb))
    I[:, :kk] = np.argsort(-S, axis=1, kind="stable")[:, :kk]
    return I


def transition_matrix(I):
    """W = W0 + W0^T, each row divided by its sum (rows of zeros stay)."""
    W0 = np.zeros((len(I), len(I)))
    for i, row in enumerate(I):
        W0[i, row[row >= 0]] = 1
    W = W0 + W0.T
    return W / np.maximum(W.sum(axis=1, keepdims=True), 1)


def diffusion(I, test_I, nodes, labels, nclass, niter):
    """Yield (L, scores of the test images) after 0, 1, ..., niter iterations."""
    W = transition_matrix(I)
    L = np.zeros((len(I), nclass))
    L[nodes, labels] = 1
    for i in range(niter + 1):
        if i:
            L = W @ L
            sums = L.sum(axis=0)
            L = L / np.where(sums > 0, sums, 1)
        yield L, np.array([L[row[row >= 0]].sum(axis=0) for row in test_I])


def top5(scores, labels):
    """Whether each row's label is among its five highest non-zero scores; of equal ones the lower class is first."""
    return np.array([y in [c for c in np.argsort(-s, kind="stable")[:5] if s[c] > 0] for s, y in zip(scores, labels)])
