"""Stage 3: the k-nearest-neighbour graph of the background (paper, section 3.1).

reads   $DDIR/features/f100m/concatenated_PCAR256.raw    its first NBG vectors, L2-normalised as they are read
writes  $DDIR/knngraph/ndis{NBG}.index                   Faiss index of the normalised vectors, inner product
        $DDIR/knngraph/ndis{NBG}.index.json              beside an index that does not hold them as they are: of which it is
        $DDIR/knngraph/ndis{NBG}_k32_I_11.int32          neighbours of each image, itself included, best first
        $DDIR/knngraph/ndis{NBG}_k32_D_11.float32        their inner products
        $DDIR/logs/build_graph/ndis{NBG}_k32.json        one record: arguments, recall, seconds, memory

    python build_graph.py 1000000
    python build_graph.py 60000 --k 30 --dim 128
    python build_graph.py 1000000 --nprobe 256           # search 256 cells per image, as in the paper

Below 131,072 vectors the graph is exact, unless --index says otherwise, and with a GPU whose memory holds them below 16
million. Otherwise each image is compared with those of its nearest cells, and, where these would be many, with neighbours of
its neighbours, until the wanted recall is measured on a sample. A run that was cut off goes on: with the index if it is
complete, and beyond 2,000,000 vectors, or where Faiss searches, with the lists found so far, of which a copy is kept every few
minutes (not where a GPU compares all images with all, which takes no longer than that). Candidates that do not fit in memory
are kept in files without a name in $DDIR/knngraph, 16 bytes for each of up to 64 per image, or 2 k; a copy takes a quarter of
that, and there are two while one is written.
"""
import os
import time

from lowshot.features import MatrixFile
from lowshot.files import check_outputs, exclusive, file_identities, read_note, remove, whole, write_json
from lowshot.layout import MOST_COLUMNS, DataDir, padded_to_power_of_two, pca_command
from lowshot.machine import peak_memory, wait_briefly
from lowshot.script import (Parser, clock, log, number, print_header, provenance, run, show_progress, size, warn_of_memory,
                            within_memory)

wait_briefly()

CHECKPOINT_FROM = 2_000_000     # vectors; the graph of fewer takes a minute or two
# more is asked of graphs that take seconds: accuracies are within .001 of those of exact ones, not .004 (benchmarks/accuracy.py)
RECALL, RECALL_OF_SMALL, SMALL_BELOW = 0.95, 0.98, 1 << 19
NO_GPU = "--device gpu: this Faiss sees no GPU (requirements-gpu.txt has the package that does)"


def arguments():
    p = Parser(__doc__)
    p.add_argument("nbg", type=number(int, 1), help="number of background images: the first rows of the .raw file")
    g = p.add_argument_group("graph")
    g.add_argument("--k", type=number(int, 1, MOST_COLUMNS), default=32,
                   help="neighbours per image; the next power of two is stored")
    g.add_argument("--recall", type=number(float, 0, 1),
                   help="share of the true neighbours that has to be found, as measured on 1000 images; raise it for a "
                        f"better graph in more time (default: {RECALL}, below {SMALL_BELOW:,} images {RECALL_OF_SMALL})")
    g.add_argument("--nprobe", type=number(int, 0, 2 ** 31 - 1), default=0,
                   help="cells searched per image, and nothing more; 0: what the wanted recall takes")
    g.add_argument("--seed", type=number(int, 0, 2 ** 32 - 1), default=0, help="seed of k-means and of the sample")
    g = p.add_argument_group("index")
    g.add_argument("--index", default="auto", metavar="FACTORY",
                   help="Faiss factory string, e.g. IVF4000,Flat or OPQ64,IVF4000,PQ64; auto: Flat below 131,072 "
                        "vectors, else IVF with 4 sqrt(n) lists. Flat and IVF...,Flat are stored, and the graph is found in "
                        "this script's own way, to --recall; others are searched by Faiss. An index that is there is "
                        "used, whatever this says, unless --overwrite")
    g = p.add_argument_group("data")
    g.add_argument("--dim", type=number(int, 1), default=256, help="dimensions that the PCA left")
    g.add_argument("--device", choices=("auto", "cpu", "gpu"), default="auto",
                   help="gpu: on the first GPU all images are compared with all, or, with --nprobe, another kind of index or "
                        "more images than it holds or 16 million, Faiss searches on all GPUs, the index sharded among them; "
                        "auto: gpu if there is one that can")
    g.add_argument("--overwrite", action="store_true", help="make index and graph again where they exist")
    args = p.parse_args()
    if args.recall is None:
        args.recall = RECALL_OF_SMALL if args.nbg < SMALL_BELOW else RECALL
    return args


def main():
    args = arguments()
    ddir = DataDir()
    record, start = provenance(args), time.monotonic()
    n, d = args.nbg, args.dim
    ddir.check_dim(d)
    raw = ddir.raw(d)
    rows = MatrixFile(raw, "<f4", d, n, pca_command("apply", d))
    # after the checks: these load Faiss and the compiled library
    from graph_utils import neighbours as nb
    from lowshot import exact_search, knn
    from lowshot.cells import Cells, Vectors
    from lowshot.faiss_search import faiss_graph, on_gpus
    from lowshot.gpu_search import search_device
    from lowshot.index_files import Checkpoint, GraphFiles
    from lowshot.packages import faiss
    k = padded_to_power_of_two(args.k)
    gpus = faiss.get_num_gpus() if args.device != "cpu" else 0
    device = search_device("cpu" if args.device == "cpu" else "auto")
    all_on_gpu = exact_search.all_on_gpu(n, n, d, device, same=True) and not args.nprobe
    if args.device == "gpu" and not gpus and not all_on_gpu:
        raise ValueError(NO_GPU)
    path_I, path_D = ddir.graph(n, k)
    lists = path_I + ".lists.partial"
    record_path = ddir.log("build_graph", f"ndis{n}_k{k}.json")
    least = predict_memory(n, d, k, all_on_gpu, device is not None, least=True)
    predicted = within_memory(predict_memory(n, d, k, all_on_gpu, device is not None), least)
    print_header(args, predicted_memory=size(predicted), products=nb.products())
    warn_of_memory(least)
    complete = os.path.exists(path_I) and not args.overwrite        # D gets its name first
    vectors = Vectors(rows, normalise=True, device=device)
    if complete:
        is_complete = f"{path_I} is complete{lower_recall(record_path, args.recall)}"
        check_stored(path_I, path_D, k, vectors)
        if os.path.exists(lists):       # of a run that was killed at its last step
            remove(lists)
        if os.path.exists(ddir.index(n)):
            checked_index(ddir.index(n), vectors)
            log(f"{is_complete}, nothing to do (--overwrite makes it again)")
            return
    check_outputs(record_path)
    with exclusive(ddir.index(n)), exclusive(path_I), show_progress() as progress:
        if not complete and not args.overwrite and os.path.exists(path_I):
            log(f"{path_I} was completed by another run meanwhile")
            return
        vectors.progress = progress
        index, cells = stored_index(ddir.index(n), vectors, args, progress)
        if args.overwrite:
            for path in (path_I, path_D, record_path):
                remove(os.path.realpath(path))
        log(f"{ddir.index(n)} is complete after {clock(time.monotonic() - start)}")
        if complete:
            log(f"{is_complete}, and kept (--overwrite makes it again)")
            return
        identity = [file_identities([raw, ddir.index(n)]), args.recall, args.nprobe, args.seed]
        own_search = cells is not None or isinstance(index, faiss.IndexFlat)
        all_on_gpu = own_search and all_on_gpu
        if args.device == "gpu" and not gpus and not all_on_gpu:
            raise ValueError(NO_GPU)
        if args.nprobe and isinstance(index, faiss.IndexFlat) and (gpus or n < exact_search.EXACT_BELOW):
            log(f"note: --nprobe {args.nprobe} is of no use, as the index has no cells: all images are compared with all")
        gpu_index = on_gpus(index, args.device) if gpus and not all_on_gpu else None
        search_with_faiss = gpu_index is not None or not own_search
        if not search_with_faiss:
            index = None        # what was read of its file would count as memory
        files = GraphFiles(path_I, path_D, n, k, identity if search_with_faiss else None)
        if search_with_faiss:
            info = faiss_graph(index, ddir.index(n), gpu_index, vectors, k, args, files, progress)
        elif all_on_gpu or cells is None and n < exact_search.EXACT_BELOW:
            cells = None            # which take memory
            for array, found in zip(files.arrays, exact_search.exact_knn(vectors, vectors, k, progress, same=True)):
                array[:] = found
            info = {"recall": 1.0, "exact": True}
        else:
            if cells is None:
                cells = Cells.train(vectors, seed=args.seed, progress=progress)
            with Checkpoint(lists, identity) as checkpoint:
                _, _, info = knn.build_knn_graph(
                    cells, k, args.recall, nprobe=args.nprobe, seed=args.seed, out=files.arrays, progress=progress,
                    say=lambda line: log(f"{line}, {clock(time.monotonic() - start)}"),
                    checkpoint=checkpoint if n >= CHECKPOINT_FROM else None, folder=os.path.dirname(path_I))
        files.flush()
        seconds = time.monotonic() - start
        try:        # first, so that a graph that is there has its record
            write_json(record_path, {**record, **info, "products": nb.products(), "seconds": seconds,
                                     "peak_memory": peak_memory(), "predicted_memory": predicted})
        finally:
            files.finish()
        if not search_with_faiss:
            remove(lists)               # not before there is nothing left to lose
    found = "exact search" if info["exact"] else f"recall@{min(k, n)} {info['recall']:.4f}"
    log(f"wrote {path_I}: {n} x {k}, {found}, {clock(seconds)}, peak memory {size(peak_memory())} "
        f"({size(predicted)} predicted)")


def predict_memory(n, d, k, all_on_gpu, beside_gpu, least=False):
    """Peak memory in bytes. Pages of mapped files count as long as they are mapped, though the system may drop them. `least`: of
    a large set what it cannot do without, with candidates in a file."""
    from lowshot import exact_search, knn, sampling
    from lowshot.gpu_search import GPU_LIBRARIES
    from graph_utils.neighbours import words, words_of_bytes
    vectors, in_bytes = 4 * n * d, 4 * n * words_of_bytes(d)
    libraries, blocks = GPU_LIBRARIES if beside_gpu else 60e6, knn.SAMPLED * min(n, 1 << 16) // (1 << 16)
    if n < exact_search.EXACT_BELOW:    # the index and its vectors; or codes and candidates, then similarities
        similarities = vectors + 8 * n * (k + exact_search.spare_of(k, in_bytes=True)) + 16 * n * k
        return int(libraries + max(2 * vectors, 4 * n * words(d) + blocks, exact_search.memory_of_self(n, d, k), similarities))
    if all_on_gpu:                  # vectors, the cells they are sorted by, then lists twice
        return int(libraries + blocks + vectors + max(in_bytes, 16 * n * k) + 24 * n)
    listed = sampling.usual_list(k, d)
    similarities = (vectors + 8 * n * k) * (not least) + 4 * n * listed + 24 * n + knn.WORKING
    return int(libraries + max(knn.memory_of_graph(n, k, d, in_file=least), similarities))


def check_stored(path_I, path_D, k, vectors):
    """ValueError where the stored graph is damaged, or was made from others than these vectors."""
    from lowshot.index_files import check_graph, checked_rows, open_graph
    again = "--overwrite makes it again"
    graph = open_graph(path_I, path_D, vectors.n, k, again)
    with show_progress() as progress:
        for _ in checked_rows(*graph, k, again, progress):
            pass
    check_graph(vectors, *graph, again)


def lower_recall(record_path, wanted):
    """Words for a stored graph whose record tells of a lower recall than is wanted now; "" otherwise."""
    recall = read_note(record_path).get("recall")
    lower = isinstance(recall, float) and recall < wanted
    return f" (note: with recall {recall:.3f}, --recall is {wanted:g})" if lower else ""


def checked_index(path, vectors):
    """The Faiss index on disk; ValueError if it is not one of these vectors."""
    from lowshot.index_files import check_index, read_index
    index = read_index(path, vectors.n, vectors.d)
    check_index(index, vectors, path)
    return index


def stored_index(path, vectors, args, progress):
    """The Faiss index on disk, made if it is not there: (index, Cells of an IVF,Flat index or None)."""
    from lowshot.cells import Cells, default_nlist
    from lowshot.exact_search import EXACT_BELOW
    from lowshot.faiss_search import errors_name_index, is_plain_ivf
    from lowshot.index_files import cells_of_index, digest_of_vectors, holds_vectors, index_note, read_index, write_ivf_flat
    from lowshot.packages import faiss, write_by_faiss
    n, d = vectors.n, vectors.d
    if os.path.exists(path) and not args.overwrite:
        index = checked_index(path, vectors)
        if not is_plain_ivf(index):
            return index, None
        return index, Cells(vectors, *cells_of_index(index, path))
    factory = args.index
    if factory == "auto":
        factory = "Flat" if n < EXACT_BELOW else f"IVF{default_nlist(n)},Flat"
    with errors_name_index(factory):
        index = faiss.index_factory(d, factory, faiss.METRIC_INNER_PRODUCT)
    if is_plain_ivf(index):
        if not 1 <= index.nlist <= n:
            raise ValueError(f"--index {factory}: {index.nlist} lists for {n} vectors")
        cells = Cells.train(vectors, index.nlist, args.seed, progress)
        remove(index_note(path))
        write_ivf_flat(path, cells, progress=progress)
        return read_index(path, n, d), cells
    if not index.is_trained:
        import numpy as np
        ivf = faiss.try_extract_index_ivf(index)
        most = min(n, max(50 * ivf.nlist if ivf is not None else 0, 65536))
        rows = np.sort(np.random.RandomState(args.seed).choice(n, most, replace=False))
        log(f"training {factory} on {most} vectors")
        with errors_name_index(factory):
            index.train(vectors.scaled_rows(rows))
    for i, j in vectors.blocks():
        with errors_name_index(factory):
            index.add(vectors.stretch(i, j) * vectors.scale[i:j, None])
        progress("vectors added to the index", j, n)
    with whole(path) as temporary:
        write_by_faiss(faiss.write_index, index, temporary)
        remove(index_note(path))        # of another index
    if not holds_vectors(index):
        write_json(index_note(path), {"vectors": digest_of_vectors(vectors)})
    return index, None


if __name__ == "__main__":
    run(main)
