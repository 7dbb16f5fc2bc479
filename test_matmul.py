"""Check the compiled library: products of a graph and a matrix against dense float64, each error on one line.

Reads nothing, writes nothing. Exits with status 1 if a relative error is 1e-6 or more.

    python test_matmul.py
"""
import lowshot  # noqa: F401     before numpy: it names the number of threads
import numpy as np

from lowshot.script import Parser, log, number, run

LIMIT = 1e-6


def arguments():
    p = Parser(__doc__)
    p.add_argument("--seed", type=number(int, 0, 2 ** 32 - 1), default=0, help="seed of the random graphs")
    return p.parse_args()


def random_neighbours(rs, n, k):
    """n x k neighbour numbers, distinct in each row; some rows end early (-1), a few are empty."""
    I = np.full((n, k), -1, np.int32)
    for i in range(n):
        found = rs.choice(n, min(k, n), replace=False)
        I[i, :len(found)] = found
        I[i, rs.choice([0, k // 2, k, k], p=[.05, .15, .4, .4]):] = -1
    return I


def relative_error(found, expected):
    return float(np.abs(found - expected).max() / max(np.abs(expected).max(), 1e-30))


def errors(seed):
    """Yield (what, relative error) of every product of the library."""
    from graph_utils import SymmetricGraph, aligned_zeros, has_mkl, mkl_product, neighbour_sums
    rs = np.random.RandomState(seed)
    for n, k, ncol in ((1, 1, 16), (7, 12, 16), (100, 5, 32), (1000, 30, 48), (3001, 30, 64)):
        I = random_neighbours(rs, n, k)
        W0 = np.zeros((n, n))
        W0[np.repeat(np.arange(n), (I >= 0).sum(axis=1)), I[I >= 0]] = 1
        W = W0 + W0.T
        W /= np.maximum(W.sum(axis=1, keepdims=True), 1)
        L = aligned_zeros((n, ncol))
        L[:] = rs.rand(n, ncol)
        scale = rs.rand(ncol).astype(np.float32)
        expected = W @ L.astype(np.float64) * scale
        rank = rs.permutation(n).astype(np.int32)
        what = f"{n} nodes, k = {k}, {ncol} columns"
        inverse = np.argsort(rank)
        for renumbered in (False, True):
            graph = SymmetricGraph(I, rank if renumbered else None)
            order = inverse if renumbered else np.arange(n)
            x, out = aligned_zeros((n, ncol)), aligned_zeros((n, ncol))
            x[:] = L[order]
            colsum = graph.product(x, out, scale)
            how = f"{what}{', renumbered' if renumbered else ''}"
            yield f"product, {how}", relative_error(out, expected[order])
            yield f"column sums, {how}", relative_error(colsum, expected.sum(axis=0))
        graph = SymmetricGraph(I)
        if has_mkl():
            found = mkl_product(graph.indptr, graph.indices, graph.values(), np.ascontiguousarray(L))
            yield f"MKL product, {what}", relative_error(found * scale, expected)
        yield f"neighbour sums, {what}", relative_error(neighbour_sums(I, L, scale), W0 @ L.astype(np.float64) * scale)


def main():
    args = arguments()
    worst = 0.0
    for what, error in errors(args.seed):
        log(f"{what}: relative error {error:.2e}")
        worst = max(worst, error)
    log(f"largest error {worst:.2e}, limit {LIMIT:.0e}: {'passed' if worst < LIMIT else 'FAILED'}")
    return 0 if worst < LIMIT else 1


if __name__ == "__main__":
    run(main)
