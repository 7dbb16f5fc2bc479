"""One iteration L <- normalise(W L) beside other sparse products, on the graph of a data directory.

Reads   $DDIR/knngraph/ndis{nbg}_k32_I_11.int32      the background's graph (build_graph.py), or --graph FILE.npy
        $DDIR/features/f100m/concatenated_PCAR256.raw  to measure the graph's recall, if it is there
Prints a Markdown table, and writes it to --out.

Ours: panels of 32 columns, no array of values, with column sums and scaling; the graph renumbered by
graph_utils.locality_rank, and in the order of the files. MKL: its general product of a CSR matrix and a row-major L, with the
nodes in the order of the files as in the paper, and renumbered. scipy, torch (CSR tensors) and sparse_dot_mkl: the
same W in the order of the files, the product alone. All get the same L, threads and number of columns; the best of
several rounds counts. Every result is compared with float64 on a sample of rows.

    DDIR=/path/to/data python benchmarks/product.py --nbg 1000000 --out product.md
    DDIR=demo_data python benchmarks/product.py --nbg 60000

Peers that are not installed are left out: pip install -r benchmarks/requirements.txt. Memory: 16 bytes x nodes x
columns, 8.5 GB for 1,000,000 nodes and 512 columns.
"""
import concurrent.futures
import contextlib
import importlib.metadata
import os
import platform
import time
import warnings

from runs import show

import numpy as np
from lowshot.machine import thread_count
from lowshot.script import Parser, log, number, print_header, run

SAMPLE = 500        # rows that are compared with float64, and nodes that recall is measured on


def graph_arguments(p):
    """What read_graph() reads."""
    p.add_argument("--nbg", type=number(int, 1), default=1000000, help="background images of the graph in $DDIR")
    p.add_argument("--graph", metavar="FILE.npy", help="int32 (nodes, k) neighbours, instead of the graph in $DDIR")
    p.add_argument("--k", type=number(int, 1), default=30, help="neighbours per node: first columns of the graph")
    p.add_argument("--dim", type=number(int, 1), default=256, help="dimensions of the vectors, to measure recall")


def arguments():
    p = Parser(__doc__)
    graph_arguments(p)
    p.add_argument("--columns", type=number(int, 1), nargs="+", default=[64, 512], help="columns of L, a table each")
    p.add_argument("--panel", type=int, choices=(16, 32, 48, 64), help="columns of our panels (default: as diffusion.py, 32)")
    p.add_argument("--rounds", type=number(int, 1), default=4, help="rounds, the first of which does not count")
    p.add_argument("--patience", type=number(float, 0), default=10,
                   help="seconds: a product that takes longer is not repeated")
    p.add_argument("--threads", type=number(int, 1), default=thread_count(), help="threads of all")
    p.add_argument("--only", nargs="+", default=[], metavar="WORD", help="only rows whose name contains one of these")
    p.add_argument("--out", help="file for the table")
    return p.parse_args()


def read_graph(args):
    """(I, recall of the graph on a sample or None)."""
    if args.graph:
        I = np.load(args.graph, mmap_mode="r")
        if I.ndim != 2 or I.dtype != np.int32 or I.shape[1] < args.k:
            raise ValueError(f"{args.graph} holds {I.dtype} {I.shape}, int32 with at least {args.k} columns expected")
        return np.ascontiguousarray(I[:, :args.k]), None
    from lowshot.cells import Vectors
    from lowshot.exact_search import exact_knn
    from lowshot.features import MatrixFile
    from lowshot.layout import DataDir
    ddir = DataDir()
    path, _, columns = ddir.find_graph(args.nbg, args.k, args.dim)
    if os.path.getsize(path) != 4 * columns * args.nbg:
        raise ValueError(f"{path} has {os.path.getsize(path)} bytes, {4 * columns * args.nbg} expected")
    I = np.ascontiguousarray(MatrixFile(path, "<i4", columns, args.nbg)[:][:, :args.k])
    if not os.path.exists(ddir.raw(args.dim)):
        return I, None
    vectors = Vectors(MatrixFile(ddir.raw(args.dim), "<f4", args.dim, args.nbg), normalise=True)
    nodes = np.sort(np.random.RandomState(0).choice(args.nbg, min(SAMPLE, args.nbg), replace=False))
    _, exact = exact_knn(vectors.scaled_rows(nodes), vectors, min(args.k, args.nbg))
    return I, float(np.mean([len(np.intersect1d(a, b)) / len(a) for a, b in zip(exact, I[nodes])]))


def copy_seconds(a, b, threads):
    """Seconds to copy a to b with the given number of threads, best of 5."""
    pieces = list(zip(np.array_split(a.reshape(-1), 16 * threads), np.array_split(b.reshape(-1), 16 * threads)))
    best = np.inf
    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        for _ in range(5):
            t0 = time.perf_counter()
            list(pool.map(lambda piece: np.copyto(piece[1], piece[0]), pieces))
            best = min(best, time.perf_counter() - t0)
    return best


class Case:
    """A graph, in the order of the files and renumbered by rank, an L in the order of the files, and room for a product.

    Each way of multiplying is a method that returns (call, rows): a call() multiplies, rows() are those of the sample.
    """

    def __init__(self, W, renumbered, rank, ncol, panel):
        from graph_utils import PANEL, aligned_zeros
        self.W, self.renumbered, self.rank = W, renumbered, rank
        widest = panel or PANEL         # first column, columns, and these padded to a multiple of 16
        self.panels = [(c, min(widest, ncol - c), -(-min(widest, ncol - c) // 16) * 16) for c in range(0, ncol, widest)]
        padded = sum(p for _, _, p in self.panels)
        self.L, self.input, self.output = (aligned_zeros(W.n * padded) for _ in range(3))
        self.L = self.L[:W.n * ncol].reshape(W.n, ncol)
        rs = np.random.RandomState(1)
        for i in range(0, W.n, 65536):
            rows = self.L[i:i + 65536]
            rows[:] = rs.random_sample(rows.shape)
        self.nodes = np.sort(rs.choice(W.n, min(SAMPLE, W.n), replace=False))
        rows = [slice(*W.indptr[i:i + 2]) for i in self.nodes]
        self.exact = np.array([W.csr_values[r] @ self.L[W.indices[r]].astype(np.float64) for r in rows])

    def error(self, found):
        return float(np.abs(found - self.exact).max() / max(np.abs(self.exact).max(), 1e-30))

    def own(self, renumber):
        """(call, rows of the result): the library's kernel, panel by panel."""
        W, place = (self.renumbered, self.rank) if renumber else (self.W, slice(None))
        pieces, at = [], 0
        for first, ncol, padded in self.panels:
            panel, out = (a[at:at + W.n * padded].reshape(W.n, padded) for a in (self.input, self.output))
            panel[:, ncol:] = 0
            panel[place, :ncol] = self.L[:, first:first + ncol]
            pieces.append((panel, out, np.ones(padded, np.float32), ncol))
            at += W.n * padded

        def call():
            for panel, out, scale, _ in pieces:
                W.product(panel, out, scale)

        rows = self.rank[self.nodes] if renumber else self.nodes
        return call, lambda: np.concatenate([out[rows, :ncol] for _, out, _, ncol in pieces], axis=1)

    def mkl(self, renumber):
        from graph_utils import has_mkl, mkl_product
        if not has_mkl():
            raise ImportError("graph_utils was built without MKL")
        W = self.renumbered if renumber else self.W
        L, out = (a[:self.L.size].reshape(self.L.shape) for a in (self.input, self.output))
        L[self.rank if renumber else slice(None)] = self.L
        rows = self.rank[self.nodes] if renumber else self.nodes
        return (lambda: mkl_product(W.indptr, W.indices, W.csr_values, L, out, check=False)), lambda: out[rows]

    def scipy_matrix(self):
        import scipy.sparse
        indptr = self.W.indptr if self.W.indptr[-1] >= 2 ** 31 else self.W.indptr.astype(np.int32)
        return scipy.sparse.csr_matrix((self.W.csr_values, self.W.indices, indptr), shape=(self.W.n, self.W.n))

    def scipy(self):
        A = self.scipy_matrix()
        return self.calling(lambda: A @ self.L)

    def sparse_dot_mkl(self):
        from sparse_dot_mkl import dot_product_mkl
        A = self.scipy_matrix()
        return self.calling(lambda: dot_product_mkl(A, self.L))

    def torch(self):
        import torch
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support")
        torch.set_num_threads(self.threads)
        A = torch.sparse_csr_tensor(*map(torch.from_numpy, (self.W.indptr.astype(np.int32), self.W.indices, self.W.csr_values)),
                                    size=(self.W.n, self.W.n), check_invariants=False)
        L = torch.from_numpy(self.L)
        return self.calling(lambda: (A @ L).numpy())

    def calling(self, product):
        """A product that makes its own result."""
        result = []

        def call():
            result.clear()
            result.append(product())

        return call, lambda: result[0][self.nodes]


def versions():
    found = {"Python": platform.python_version(), "numpy": np.__version__}
    for name in ("mkl", "scipy", "torch", "sparse_dot_mkl"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return ", ".join(f"{name} {version}" for name, version in found.items())


def cpu():
    with contextlib.suppress(OSError), open("/proc/cpuinfo") as f:
        for line in f:
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.machine()


def measure(call, args):
    """Seconds of the fastest round; the first one counts only where the product is not repeated."""
    times = []
    for _ in range(args.rounds):
        t0 = time.perf_counter()
        call()
        times.append(time.perf_counter() - t0)
        if times[-1] > args.patience:
            break
    return min(times[1:] or times)


def table_of(W, renumbered, rank, ncol, args):
    case = Case(W, renumbered, rank, ncol, args.panel)
    case.threads = args.threads
    copy = copy_seconds(case.L, case.output[:case.L.size].reshape(case.L.shape), args.threads)
    bound = copy * (1 + W.indices.nbytes / (2 * case.L.nbytes))
    ways = {"ours, renumbered": lambda: case.own(True), "ours, order of the files": lambda: case.own(False),
            PAPER: lambda: case.mkl(False), "MKL, renumbered": lambda: case.mkl(True), "scipy CSR": case.scipy,
            "torch CSR": case.torch, "sparse_dot_mkl": case.sparse_dot_mkl}
    seconds, errors = {}, {}
    for name, way in ways.items():
        if args.only and not any(word in name for word in args.only):
            continue
        try:
            call, rows = way()
        except ImportError as e:
            log(f"{name}: left out, {e}")
            continue
        seconds[name] = measure(call, args)
        errors[name] = case.error(rows())
        log(f"{ncol} columns, {name}: {seconds[name]:.3f} s, error {errors[name]:.1e}")
        del call, rows
    if not seconds:
        raise ValueError(f"--only {' '.join(args.only)}: none of {', '.join(ways)}")
    paper = seconds.get(PAPER)
    lines = [f"{ncol} columns", "", "| product | s | times MKL in file order | times the copy | largest relative error |",
             "| --- | --- | --- | --- | --- |"]
    for name in seconds:
        speed = f"{paper / seconds[name]:.2f}" if paper else ""
        lines.append(f"| {name} | {seconds[name]:.3g} | {speed} | {seconds[name] / bound:.1f} | {errors[name]:.0e} |")
    lines += [f"| copy: L in and out once, indices in once | {bound:.3g} | "
              f"{f'{paper / bound:.2f}' if paper else ''} | 1.0 | |", "",
              f"Copy speed, {args.threads} threads: {2 * case.L.nbytes / copy / 1e9:.1f} GB/s read and written.", ""]
    worst = max(errors.values())
    if worst > 1e-5:
        raise ValueError(f"a product is wrong: relative error {worst:.1e}")
    return lines


PAPER = "MKL, order of the files"


def main():
    args = arguments()
    # read by the OpenMP libraries when they are loaded
    os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = str(args.threads)
    print_header(args)
    import graph_utils
    from graph_utils import locality_rank
    graph_utils.set_num_threads(args.threads)
    I, recall = read_graph(args)
    t0 = time.perf_counter()
    rank = locality_rank(I)
    t1 = time.perf_counter()
    renumbered = graph_utils.SymmetricGraph(I, rank)
    t2 = time.perf_counter()
    W = graph_utils.SymmetricGraph(I)
    n, k = I.shape
    del I
    W.csr_values, renumbered.csr_values = W.values(), renumbered.values()
    lines = [f"{n:,} nodes, k = {k}, {W.nnz:,} entries of W"
             + (f", recall@{k} of the graph {recall:.3f}" if recall is not None else "")
             + f"; {args.threads} threads, {cpu()}; {versions()}; MKL inside graph_utils: {graph_utils.has_mkl()}.",
             f"Once per graph: order {t1 - t0:.2f} s, W = W0 + W0^T {t2 - t1:.2f} s.", ""]
    log("\n".join(lines))
    for ncol in args.columns:
        lines += table_of(W, renumbered, rank, ncol, args)
    show("\n".join(lines), args.out)


if __name__ == "__main__":
    run(main)
