#!/usr/bin/env python3
"""Stage 3: build the k-nearest-neighbour graph of the background (paper, section 3.1).

reads   $DDIR/features/f100m/concatenated_PCAR256.raw, its first NBG vectors, L2-normalised as they are read
writes  $DDIR/knngraph/ndis{NBG}.index                   Faiss index of the normalised vectors, inner product
        $DDIR/knngraph/ndis{NBG}_k32_I_11.int32          neighbours of each image, itself included, best first
        $DDIR/knngraph/ndis{NBG}_k32_D_11.float32        their inner products

    python build_graph.py 1000000
    python build_graph.py 60000 --k 30 --dim 128
"""
import os
import time

import numpy as np

from lowshot.features import MatrixFile, NormalisedRows, matrix_rows
from lowshot.layout import DataDir
from lowshot.script import Parser, Progress, clock, log, number, peak_memory, print_header, run, size, whole

BLOCK = 65536


def arguments():
    p = Parser(__doc__)
    p.add_argument("nbg", type=number(int, 1), help="number of background images: the first rows of the .raw file")
    p.add_argument("--k", type=number(int, 1), default=32, help="neighbours; stored are the next power of two")
    p.add_argument("--dim", type=number(int, 1), default=256, help="dimensions that the PCA left")
    p.add_argument("--index", default="", help="Faiss factory string (default: Flat below 100,000 vectors, else "
                                               "IVF with 4 sqrt(n) lists)")
    return p.parse_args()


def main():
    args = arguments()
    ddir = DataDir()
    from lowshot import knn
    n, k = args.nbg, knn.padded_to_power_of_two(args.k)
    raw = ddir.raw(args.dim)
    matrix_rows(raw, "<f4", args.dim, n, "python train_apply_pca.py apply")
    x = NormalisedRows(MatrixFile(raw, "<f4", args.dim, n))
    print_header(args)
    path_I, path_D = ddir.graph(n, k)
    start = time.time()
    write_index(ddir.index(n), x, args)
    if all(os.path.exists(p) and os.path.getsize(p) == 4 * n * k for p in (path_I, path_D)):
        log(f"{path_I} is complete, nothing to do")
        return
    with Progress(n, "images") as progress:
        D, I, _ = knn.build_knn_graph(x[:], k, progress=progress.update)
    for path, a in ((path_D, D), (path_I, I)):
        with whole(path) as temporary:
            a.tofile(temporary)
    log(f"wrote {path_I}: {n} x {k} in {clock(time.time() - start)}, peak memory {size(peak_memory())}")


def write_index(path, x, args):
    from lowshot import knn
    from lowshot.packages import faiss
    if os.path.exists(path):
        return
    n, d = x.shape
    factory = args.index or ("Flat" if n < knn.EXACT_BELOW else f"IVF{int(4 * n ** 0.5)},Flat")
    index = faiss.index_factory(d, factory, faiss.METRIC_INNER_PRODUCT)
    if not index.is_trained:
        index.train(x[:min(n, 50 * int(4 * n ** 0.5))])
    for i in range(0, n, BLOCK):
        index.add(np.ascontiguousarray(x[i:i + BLOCK]))
    with whole(path) as temporary:
        faiss.write_index(index, temporary)


if __name__ == "__main__":
    run(main)
