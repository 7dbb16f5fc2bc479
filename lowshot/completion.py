"""Graph completion: the background's graph, the labelled images and the test images become one graph (section 3.1).

Nodes are numbered: background images, base-class images, novel-class images. All that does not depend on the seed
and the number of labels (base images and background among themselves, test images against both) is computed once and
kept under $DDIR/knngraph/, keyed by what it was made from; only the novel images are added in each run.
"""
import contextlib
import fcntl
import hashlib
import json
import os
import shutil
from dataclasses import dataclass

import numpy as np

from lowshot import knn
from lowshot.features import FeatureFile, NormalisedRows, map_matrix, normalise_rows
from lowshot.pca import load_pca
from lowshot.script import Progress, write_json

# a change of what is computed, or of how it is stored, gets a new number: stored completions are then made anew
VERSION = 1


@dataclass
class Graph:
    """k nearest nodes by inner product, best first, the node itself included; -1 where there are fewer.

    I int32 (n, k) and D float32 (n, k): nodes; test_I, test_D (nt, k): test images, which are no nodes.
    order: int32 (n,) the nodes in an order that puts near nodes next to each other, or None.
    """
    I: np.ndarray
    D: np.ndarray
    test_I: np.ndarray
    test_D: np.ndarray
    order: np.ndarray = None


def read_features(path, rows, pca_path, what):
    """Rows of a feature file after PCA and L2 normalisation, float32 (len(rows), d)."""
    with FeatureFile(path) as f, Progress(len(rows), what) as progress:
        pca = load_pca(pca_path, f.d, path)
        if not len(rows):
            return np.empty((0, pca.d_out), np.float32)
        return f.read(rows, lambda x: normalise_rows(pca.apply(x)), progress.update)


def read_background_graph(ddir, nbg, k):
    """Memory maps I, D (nbg, k) of the stored background graph, first k columns."""
    path_I, path_D, columns = ddir.find_graph(nbg, k)
    maker = f"python build_graph.py {nbg} --k {columns}"
    maps = []
    for path, dtype in ((path_I, "<i4"), (path_D, "<f4")):
        m = map_matrix(path, dtype, columns, nbg, maker)
        if len(m) != nbg:
            raise ValueError(f"{path} has {len(m)} rows, {nbg} expected: {maker} makes it")
        maps.append(m[:, :k])
    return maps


def fixed_vectors(ddir, nbg, dim, base):
    """Vectors of the background and, after it, of the base images, normalised as they are read."""
    if not nbg:
        return NormalisedRows(base)
    raw = map_matrix(ddir.raw(dim), "<f4", dim, nbg, "python train_apply_pca.py apply")
    return NormalisedRows(raw[:nbg], base)


def fixed_graph(ddir, nbg, k, x, base, test):
    """Graph of background and base images, and test images against both. Exact below 100,000 nodes.

    x: the vectors of the nodes (NormalisedRows); base float32 (nb, d), test float32 (nt, d), normalised.
    """
    n = len(x)
    D = np.full((n, k), -np.inf, np.float32)
    I = np.full((n, k), -1, np.int32)
    if nbg:
        I[:nbg], D[:nbg] = read_background_graph(ddir, nbg, k)
    if n < knn.EXACT_BELOW:
        with Progress(nbg, "background images compared with base images") as progress:
            D[nbg:], I[nbg:] = knn.cross_insert(base, x[:nbg], D[:nbg], I[:nbg], nbg, k, progress.update)
        with Progress(len(test), "test images compared with all nodes") as progress:
            test_D, test_I = knn.exact_knn(test, x[:], k, progress.update)
        return Graph(I, D, test_I, test_D)
    raise NotImplementedError


def add_novel(graph, x, novel, test):
    """The graph with the novel images as further nodes, numbered after the others.

    Exact: each novel image is compared with all nodes, which also tells whose neighbour it becomes.
    x: vectors of graph's nodes; novel float32 (m, d), test float32 (nt, d). graph.D may be a copy-on-write map; it is
    changed.
    """
    (n, k), m = graph.I.shape, len(novel)
    I = np.empty((n + m, k), np.int32)
    I[:n] = graph.I
    with Progress(n, "nodes compared with novel images") as progress:
        new_D, I[n:] = knn.cross_insert(novel, x, graph.D, I[:n], n, k, progress.update)
    found_D, found_I = knn.exact_knn(test, novel, k)
    found_I[found_I >= 0] += n
    test_D, test_I = knn.merge_neighbours(graph.test_D, graph.test_I, found_D, found_I, k)
    order = None if graph.order is None else np.concatenate([graph.order, np.arange(n, n + m, dtype=np.int32)])
    return Graph(I, None, test_I, test_D, order)


def file_identity(path):
    """What tells whether a file is still the same: name, size, time of last change."""
    s = os.stat(path)
    return [os.path.basename(path), s.st_size, s.st_mtime_ns]


class FixedPart:
    """The part of a run that no seed changes: vectors of base and test images, and their completed graph.

        part = fixed_part(...)
        part.base, part.test, part.graph
    """

    ARRAYS = ("base", "test", "I", "D", "test_I", "test_D", "order")

    def __init__(self, arrays):
        self.base, self.test = arrays["base"], arrays["test"]       # (nb, d), (nt, d)
        self.graph = Graph(*(arrays[name] for name in self.ARRAYS[2:]))


def fixed_part(ddir, mode, nbg, k, dim, base_rows, test_rows, log, cache=True):
    """Return the FixedPart, from the stored one if it was made from the same files and rows.

    base_rows: rows of train.hdf5; test_rows: rows of val.hdf5. cache=False neither reads nor writes it.
    """
    sources = [ddir.train, ddir.val, ddir.pca(dim)]
    if nbg:
        sources += [ddir.raw(dim), *ddir.find_graph(nbg, k)[:2]]
        if os.path.exists(ddir.index(nbg)):
            sources.append(ddir.index(nbg))
    for path in sources:
        if not os.path.exists(path):
            raise ValueError(f"{path} does not exist")
    key = {"version": VERSION, "k": k, "nbg": nbg, "dim": dim, "files": [file_identity(p) for p in sources],
           "rows": [hashlib.sha256(np.ascontiguousarray(r).tobytes()).hexdigest() for r in (base_rows, test_rows)]}
    folder = ddir.path("knngraph", f"completed_{mode}_ndis{nbg}_k{k}_d{dim}")

    def make():
        base = read_features(ddir.train, base_rows, ddir.pca(dim), "base images read")
        test = read_features(ddir.val, test_rows, ddir.pca(dim), "test images read")
        graph = fixed_graph(ddir, nbg, k, fixed_vectors(ddir, nbg, dim, base), base, test)
        return dict(base=base, test=test, **{name: getattr(graph, name) for name in FixedPart.ARRAYS[2:]})

    if not cache:
        return FixedPart(make())
    os.makedirs(os.path.dirname(folder), exist_ok=True)
    with open(folder + ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)        # runs that start together make it once
        arrays = load_arrays(folder, key)
        if arrays is None:
            store_arrays(folder, key, make())
            arrays = load_arrays(folder, key)
        else:
            log(f"completed graph of base images and background: from {folder}")
    return FixedPart(arrays)


def load_arrays(folder, key):
    """The stored arrays as copy-on-write maps, or None where they were made from something else or are not whole."""
    with contextlib.suppress(OSError, ValueError, KeyError, EOFError):
        with open(os.path.join(folder, "made_from.json")) as f:
            if json.load(f) != json.loads(json.dumps(key)):
                return None
        arrays = {}
        for name in FixedPart.ARRAYS:
            path = os.path.join(folder, name + ".npy")
            if name != "order" or os.path.exists(path):
                empty = np.load(path, mmap_mode="r").size == 0
                arrays[name] = np.load(path, mmap_mode=None if empty else "c")
            else:
                arrays[name] = None
        return arrays
    return None


def store_arrays(folder, key, arrays):
    """Write the arrays to a folder that appears under its name only when it is whole."""
    temporary = f"{folder}.{os.getpid()}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    os.makedirs(temporary)
    try:
        for name, a in arrays.items():
            if a is not None:
                np.save(os.path.join(temporary, name + ".npy"), a)
        write_json(os.path.join(temporary, "made_from.json"), key)
        shutil.rmtree(folder, ignore_errors=True)
        os.rename(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
