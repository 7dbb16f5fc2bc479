"""Graphs by searching a Faiss index of any kind, on the CPU or on GPUs; build_graph.py has quicker ways for the plain kinds."""
import contextlib

import numpy as np

from graph_utils import neighbours as nb
from lowshot.exact_search import exact_knn, products_of_all
from lowshot.index_files import check_numbers
from lowshot.packages import faiss
from lowshot.sampling import SAMPLE, sampled
from lowshot.script import log

BLOCK = 1 << 16         # queries between two saves
MOST_GPU_NPROBE = 2048  # cells that Faiss searches on a GPU
COARSE = 1e-3           # error of a similarity that tells an index of coarse codes from one of the vectors


def is_plain_ivf(index):
    """Whether an index is IVF...,Flat with centroids that are searched one by one: what build_graph.py makes and
    searches itself."""
    return isinstance(index, faiss.IndexIVFFlat) and isinstance(faiss.downcast_index(index.quantizer), faiss.IndexFlat)


@contextlib.contextmanager
def errors_name_index(factory):
    """What Faiss says of an index that it cannot make becomes a ValueError that names it."""
    try:
        yield
    except RuntimeError as e:
        raise ValueError(f"--index {factory}: {str(e).splitlines()[-1]}")


def on_gpus(index, device):
    """The index on all GPUs, sharded among them, or None where it cannot be there, which is an error for --device gpu."""
    options = faiss.GpuMultipleClonerOptions()
    options.shard = True
    try:
        return faiss.index_cpu_to_all_gpus(index, co=options)
    except RuntimeError as e:       # many kinds of index are for CPUs only, and memory may not do
        reason = str(e).splitlines()[-1]
        if device == "gpu":
            raise ValueError(f"--device gpu: {reason}")
        log(f"note: searching on the CPU, as this index cannot be used on a GPU ({reason})")
        return None


def faiss_graph(index, path, gpu_index, vectors, k, args, files, progress):
    """The graph by searching the index, of the file `path`, with Faiss, block after block, into files, index_files.GraphFiles.

    vectors: cells.Vectors. gpu_index: the same on GPUs, or None. args: those of build_graph.py, recall, nprobe, seed. Returns
    info (recall, exact, and nprobe where the index has cells).
    """
    n = vectors.n
    ivf = faiss.try_extract_index_ivf(index)
    most = ivf.nlist if ivf is not None else 1
    parameters = faiss.ParameterSpace()
    if gpu_index is not None:
        index, parameters, most = gpu_index, faiss.GpuParameterSpace(), min(most, MOST_GPU_NPROBE)

    def set_nprobe(nprobe):
        try:
            parameters.set_index_parameter(index, "nprobe", nprobe)
        except RuntimeError:        # no such parameter: nothing to set
            return False
        return True

    def search(x):
        D, I = index.search(x, k)
        check_numbers(np.where(I == -1, 0, I), n, path)         # -1 for none
        D[I < 0] = -np.inf
        return D, I.astype(np.int32)

    sample = sampled(n, SAMPLE, args.seed)
    x = vectors.scaled_rows(sample)
    true_D, true_I = exact_knn(x, vectors, k, progress)
    nprobe, recall = min(args.nprobe or 1, most), 0.0
    while True:
        has_nprobe = set_nprobe(nprobe)
        # among equals any is right, so similarities tell: exact ones, of what was found
        D, I = search(x)
        exact = exact_similarities(x, vectors, I)
        found = (I >= 0) & (exact >= np.where(true_I >= 0, true_D, np.inf).min(1)[:, None] - 1e-6)
        before, recall = recall, float(found.sum() / max(1, (true_I >= 0).sum()))
        log(f"{f'nprobe {nprobe}: ' if has_nprobe else ''}recall@{min(k, n)} {recall:.4f} on {len(sample)} images")
        # more cells find no more where the index holds vectors too coarsely
        if args.nprobe or not has_nprobe or recall >= args.recall or nprobe >= most or before > 0 and recall < before + .001:
            if recall < args.recall:
                log(f"note: that is below --recall {args.recall:g}, and all that this index and --nprobe give")
            break
        nprobe = min(2 * nprobe, most)
    coarse = bool((np.abs(D - exact)[I >= 0] > COARSE).any())
    D, I = files.arrays
    for i in range(files.done, n, BLOCK):
        j = min(i + BLOCK, n)
        D[i:j], I[i:j] = search(vectors.stretch(i, j) * vectors.scale[i:j, None])
        files.save(j)
        progress("images searched", j, n)
    # what is stored are exact similarities of what was found, the node itself among it, also beside more than k copies
    if coarse:
        products_of_all(vectors, lambda nodes: I[nodes], D, I, progress, log)
    else:
        for i in range(0, n, BLOCK):
            rows = np.arange(i, min(i + BLOCK, n), dtype=np.int32)
            rows = rows[(I[rows] != rows[:, None]).all(axis=1)]
            nb.exact_products(nb.make_keys(D[rows], I[rows]), vectors.arrays, vectors.arrays, k, rows, None,
                              vectors.scale, vectors.scale, True, D, I)
            progress("nodes' similarities computed", min(i + BLOCK, n), n)
    return {"recall": recall, "exact": False, **({"nprobe": nprobe} if has_nprobe else {})}


def exact_similarities(x, vectors, I):
    """Inner products of each row of x with the vectors numbered in its row of I."""
    return np.stack([vectors.scaled_rows(np.maximum(row, 0)) @ q for q, row in zip(x, I)])
