"""W of more than 2^31 entries, as that of 100 million images: made, changed and multiplied, and compared with float64.

There is no graph of that size to read: image i's neighbours are the --k that follow it. So no two are neighbours of each
other, and W has 2 k entries in each row, all of them one. Checked are the row sums of W, rows and column sums of W L, rows
reached, and W of one image more. Times are of these steps alone. The numbers of images run backwards in W, or with --inorder
as in the lists.

    python benchmarks/many_entries.py --nodes 36000000

Memory: 16 bytes x nodes x k for W twice, and the lists, 4 bytes x nodes x k, in a file in --folder, whose pages the system may
take back: 17 GB and 4.3 GB for the default.
"""
import os
import tempfile
import time

from runs import show

import numpy as np

from lowshot.files import allocate
from lowshot.machine import peak_memory
from lowshot.script import Parser, log, number, print_header, run, size

NCOL, BLOCK, SAMPLE = 16, 1 << 20, 1000


def arguments():
    p = Parser(__doc__)
    p.add_argument("--nodes", type=number(int, 100, 2 ** 31 - 2), default=36000000, help="images")
    p.add_argument("--k", type=number(int, 1, 49), default=30, help="neighbours of each")
    p.add_argument("--inorder", action="store_true", help="rows of W in the order of the images")
    p.add_argument("--folder", default=tempfile.gettempdir(), help="where the lists are kept meanwhile")
    p.add_argument("--out", help="file for the table")
    return p.parse_args()


def followers(path, n, k):
    """The lists, in a file: int32 (n, k)."""
    allocate(path, 4 * n * k)
    I = np.memmap(path, np.int32, "r+", shape=(n, k))
    for i in range(0, n, BLOCK):
        I[i:i + BLOCK] = (np.arange(i, min(i + BLOCK, n))[:, None] + np.arange(1, k + 1)) % n
    return I


def check(what, right):
    if not right:
        raise ValueError(f"{what} of W is wrong")


def main():
    args = arguments()
    print_header(args)
    from graph_utils.product import SymmetricGraph, aligned_zeros
    n, k, rng, steps = args.nodes, args.k, np.random.default_rng(1), []

    def timed(what, call, *arguments):
        start = time.perf_counter()
        out = call(*arguments)
        steps.append((what, time.perf_counter() - start))
        log(f"{what}: {steps[-1][1]:.2f}s, peak memory so far {size(peak_memory())}")
        return out

    around = np.concatenate([np.arange(-k, 0), np.arange(1, k + 1)])        # the same forwards and backwards
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        I = followers(os.path.join(folder, "I.int32"), n, k)
        rank = None if args.inorder else np.arange(n - 1, -1, -1, dtype=np.int32)
        W = timed("made from the lists", SymmetricGraph, I, rank)
        del I
    check("the number of entries", W.nnz == 2 * k * n)
    L, out = aligned_zeros((n, NCOL)), aligned_zeros((n, NCOL))
    for i in range(0, n, BLOCK):
        L[i:i + BLOCK] = rng.random((min(BLOCK, n - i), NCOL), np.float32)
    sums = timed(f"W L, {NCOL} columns", W.product, L, out)
    rows = np.unique(np.concatenate([np.arange(k), n - 1 - np.arange(k), rng.integers(0, n, SAMPLE)])).astype(np.int32)
    exact = L[(rows[:, None] + around) % n].mean(1, dtype=np.float64)
    error = np.abs(out[rows] / exact - 1).max()
    check("a product", error < 1e-5)
    check("a column sum", np.allclose(sums, sum(L[i:i + BLOCK].sum(0, dtype=np.float64) for i in range(0, n, BLOCK)), 1e-5))
    check("a row sum", np.allclose(W.mass(), 1, 1e-5))
    computed = out[rows]
    out[rows] = -1
    W.product(L, out, rows=rows)
    check("a part of the product", np.array_equal(out[rows], computed))
    reached = np.zeros(n, np.uint8)
    reached[rows] = 1
    found = np.concatenate([rows, W.reach(rows, reached, 2 * k * len(rows))])
    check("a row reached", np.array_equal(np.sort(found), np.unique(np.append(rows, (rows[:, None] + around) % n))))
    del L, out
    # image n, whose row is the last, and the first and last of the others become neighbours
    changes = [np.array(c, t) for c, t in (([0, n - 1, n, n], np.int32), ([n, n, 0, n - 1], np.int32), ([1] * 4, np.int8))]
    larger = timed("one image more", SymmetricGraph.changed, W.arrays, n + 1, *changes)
    added = [larger.indices[larger.indptr[i]:larger.indptr[i + 1]] for i in (0, n - 1, n)]
    want = [np.append(np.sort((i + around) % n), n) for i in (0, n - 1)] + [[0, n - 1]]
    check("an entry", larger.nnz == W.nnz + 4 and all(map(np.array_equal, added, want)))
    lines = [f"{n:,} nodes, k = {k}, {W.nnz:,} entries of W ({W.nnz / 2 ** 31:.3f} of 2^31), largest relative error {error:.0e}, "
             f"peak memory {size(peak_memory())}.", "", "| step | s |", "| --- | --- |"]
    show("\n".join(lines + [f"| {what} | {seconds:.1f} |" for what, seconds in steps]) + "\n", args.out)


if __name__ == "__main__":
    run(main)
