"""Time build_graph.py beside other builders of k-nearest-neighbour graphs, on the same vectors in one run.

    pip install -r benchmarks/requirements.txt
    python benchmarks/graph.py hard=HARD_DDIR easy=EASY_DDIR -n 1000000 --out graph.md

Each argument names a data directory with features/f100m/concatenated_PCAR256.raw. Recall@30 is the share of the true 30
nearest found, for 1000 random vectors, against exact search by Faiss. Seconds are for the graph of all n vectors:
build_graph.py from start to end, reading, training and the index file included; the others without reading, and Faiss
without training and adding. Where a peer takes queries one by one, it is timed on some random ones, and the time is
multiplied by n over their number: the table says so. pynndescent runs whole (numba's compilation excluded), and so does
the building of hnswlib's index.
"""
import os
import tempfile
import time

from runs import show, timed

import numpy as np
from lowshot.features import MatrixFile
from lowshot.machine import thread_count
from lowshot.script import Parser, number, run

K = 30
PEERS = ("float32", "faiss", "batch", "pynndescent30", "pynndescent60", "hnswlib")


class Data:
    """n normalised vectors, and the true neighbours of some."""

    def __init__(self, path, n, dim):
        from lowshot.packages import faiss
        self.n, self.path = n, path
        self.x = np.fromfile(path, np.float32, n * dim).reshape(n, dim)
        norms = np.linalg.norm(self.x, axis=1, keepdims=True)
        self.x /= np.where(norms == 0, 1, norms)
        self.sample = np.random.RandomState(123).choice(n, min(n, 1000), replace=False)
        _, self.truth = faiss.knn(self.x[self.sample], self.x, K, metric=faiss.METRIC_INNER_PRODUCT)

    def recall(self, I):
        """I: (1000, >= K) neighbours found of the sample."""
        return float(np.mean([len(np.intersect1d(a, b)) for a, b in zip(I[:, :K], self.truth)]) / K)


def ours(data, ddir, float32=False):
    """(seconds, recall, remark) of build_graph.py; it leaves its index in ddir."""
    folder = os.path.join(ddir, "features", "f100m")
    os.makedirs(folder, exist_ok=True)
    link = os.path.join(folder, os.path.basename(data.path))
    if not os.path.exists(link):
        os.symlink(data.path, link)
    record = timed(os.path.join(ddir, "logs", "build_graph", f"ndis{data.n}_k32.json"), "build_graph.py", data.n, "--device",
                   "cpu", "--dim", data.x.shape[1], "--overwrite", ddir=ddir,
                   **({"GRAPH_UTILS_PRODUCTS": "float32"} if float32 else {}))
    I = np.memmap(os.path.join(ddir, "knngraph", f"ndis{data.n}_k32_I_11.int32"), np.int32, "r", shape=(data.n, 32))
    how = "exact" if record["exact"] else f"{record['nprobe']} cells, {record['rounds']} rounds"
    return (record["wall"], data.recall(I[data.sample]),
            f"{how}; {record['products']} products; peak memory {record['peak_memory'] / 1e9:.2f} GB")


def ivf(data, ddir):
    from lowshot.packages import faiss
    index = faiss.read_index(os.path.join(ddir, "knngraph", f"ndis{data.n}.index"))
    if not isinstance(index, faiss.IndexIVF):
        index = faiss.index_factory(data.x.shape[1], f"IVF{int(4 * data.n ** .5)},Flat", faiss.METRIC_INNER_PRODUCT)
        index.train(data.x)
        index.add(data.x)
    return index


def faiss_search(data, index, nprobe):
    index.nprobe = nprobe
    rows = np.random.RandomState(5).choice(data.n, min(4000, data.n), replace=False)
    recall = data.recall(index.search(data.x[data.sample], K)[1])
    start = time.time()
    index.search(data.x[rows], K)
    return (time.time() - start) * data.n / len(rows), recall, f"{len(rows)} queries, times {data.n / len(rows):g}"


def faiss_rows(data, ddir, wanted):
    """Rows of the table: Faiss IVF as in the paper, and with the nprobe that reaches our recall."""
    index = ivf(data, ddir)
    yield (f"Faiss IVF{index.nlist},Flat, nprobe 256 (the paper's)", *faiss_search(data, index, 256))
    nprobe = 1
    while nprobe < index.nlist:
        index.nprobe = nprobe
        if data.recall(index.search(data.x[data.sample], K)[1]) >= wanted:
            break
        nprobe = max(nprobe + 1, int(nprobe * 1.25))
    yield f"Faiss IVF{index.nlist},Flat, nprobe {nprobe} (equal recall)", *faiss_search(data, index, nprobe)


def batch_row(data, ddir):
    from faiss.contrib.big_batch_search import big_batch_search
    index = ivf(data, ddir)
    index.nprobe = nprobe = 16
    start = time.time()
    _, I = big_batch_search(index, data.x, K, method="pairwise_distances", verbose=0)
    return f"faiss.contrib.big_batch_search, nprobe {nprobe}", time.time() - start, data.recall(I[data.sample]), "whole"


def pynndescent_row(data, n_neighbors):
    import pynndescent
    pynndescent.NNDescent(data.x[:5000], metric="dot", n_neighbors=n_neighbors)        # compiles
    start = time.time()
    I = pynndescent.NNDescent(data.x, metric="dot", n_neighbors=n_neighbors, random_state=1,
                              n_jobs=thread_count()).neighbor_graph[0]
    seconds = time.time() - start
    return (f"pynndescent {pynndescent.__version__}, n_neighbors {n_neighbors}", seconds, data.recall(I[data.sample]),
            "whole")


def hnswlib_row(data, wanted):
    import hnswlib
    index = hnswlib.Index(space="ip", dim=data.x.shape[1])
    start = time.time()
    index.init_index(max_elements=data.n, M=16, ef_construction=100, random_seed=1)
    index.set_num_threads(thread_count())
    index.add_items(data.x)
    building = time.time() - start
    ef, rows = K, np.random.RandomState(5).choice(data.n, min(10000, data.n), replace=False)
    while True:
        index.set_ef(ef)
        recall = data.recall(index.knn_query(data.x[data.sample], K)[0].astype(np.int64))
        if recall >= wanted or ef > 2000:
            break
        ef = int(ef * 1.3)
    start = time.time()
    index.knn_query(data.x[rows], K)
    searching = (time.time() - start) * data.n / len(rows)
    return (f"hnswlib, M 16, ef_construction 100, ef {ef}", building + searching, recall,
            f"built in {building:.0f} s; {len(rows)} queries, times {data.n / len(rows):g}")


def rows_of(data, ddir, peers):
    """Yield (name, seconds, recall, remark)."""
    seconds, recall, remark = ours(data, ddir)
    yield "build_graph.py", seconds, recall, remark
    if "float32" in peers:
        yield "build_graph.py, float32 products", *ours(data, ddir, float32=True)
    if "faiss" in peers:
        yield from faiss_rows(data, ddir, recall)
    if "batch" in peers:
        yield batch_row(data, ddir)
    for n_neighbors in (30, 60):
        if f"pynndescent{n_neighbors}" in peers:
            yield pynndescent_row(data, n_neighbors)
    if "hnswlib" in peers:
        yield hnswlib_row(data, recall)


def main():
    p = Parser(__doc__)
    p.add_argument("data", nargs="+", metavar="NAME=DDIR")
    p.add_argument("-n", type=number(int, K), default=1000000, help="vectors")
    p.add_argument("--dim", type=number(int, 1), default=256, help="dimensions of the vectors")
    p.add_argument("--peers", default=",".join(PEERS), help=f"what to time beside build_graph.py, some of {','.join(PEERS)} "
                   "(default: all)")
    p.add_argument("--out", metavar="FILE", help="write the table there as well")
    args = p.parse_args()
    peers = args.peers.split(",")
    if set(peers) - set(PEERS):
        p.error(f"--peers: {', '.join(set(peers) - set(PEERS))} unknown")
    lines = [f"k = {K}, {args.n:,} x {args.dim}, {thread_count()} threads", "",
             "| data | builder | seconds | recall@30 | times ours | measured |", "|---|---|---|---|---|---|"]
    for name_and_path in args.data:
        name, equals, path = name_and_path.partition("=")
        if not equals:
            raise ValueError(f"NAME=DDIR was expected, found {name_and_path!r}")
        raw = os.path.join(os.path.abspath(path), "features", "f100m", f"concatenated_PCAR{args.dim}.raw")
        MatrixFile(raw, "<f4", args.dim, args.n, f"python benchmarks/make_data.py {path} --raw --nbg {args.n}")
        data = Data(raw, args.n, args.dim)
        with tempfile.TemporaryDirectory() as ddir:
            first = None
            for builder, seconds, recall, remark in rows_of(data, ddir, peers):
                first = first or seconds
                lines.append(f"| {name} | {builder} | {seconds:.1f} | {recall:.3f} | {seconds / first:.1f} | {remark} |")
                print(lines[-1], flush=True)
    show("\n".join(lines) + "\n", args.out)


if __name__ == "__main__":
    run(main)
