"""Graph completion: the background's graph, the labelled images and the test images become one graph (section 3.1).

Nodes are numbered: background images, base-class images, novel-class images. All that does not depend on the seed
and the number of labels (base images and background among themselves, test images against both) is computed once and
kept under $DDIR/knngraph/, keyed by what it was made from; only the novel images are added in each run.
"""
import contextlib
import glob
import hashlib
import os
import shutil
from dataclasses import dataclass

import numpy as np

from graph_utils import SymmetricGraph, check_permutation, locality_rank
from graph_utils.neighbours import merge_lists
from lowshot import exact_search, knn
from lowshot.cells import Cells, Vectors, as_vectors, assign
from lowshot.faiss_search import is_plain_ivf
from lowshot.features import FeatureFile, MatrixFile, at_once, check_readable, normalise_rows, read_into
from lowshot.file_arrays import allocator
from lowshot.files import check_regular, digest_of_some, exclusive, file_identities, read_json, whole, write_json
from lowshot.index_files import cells_of_index, check_graph, checked_rows, open_graph, open_index
from lowshot.layout import command_for, graph_command, pca_command
from lowshot.machine import release_memory
from lowshot.packages import faiss
from lowshot.pca import check_made_by, load_pca
from lowshot.sampling import COMPLETION_SAMPLE, Sample
from lowshot.script import Progress, log, show_progress, silent

# a change of what is computed, or of how it is stored, gets a new number: stored completions are then made anew
VERSION = 10
FEW, FEW_OF_ALL = 1 << 16, 1 / 32       # novel neighbours, and their share: of copies of one image nearly all lists change


def read_features(path, rows, pca_path, what):
    """Rows of a feature file after PCA and L2 normalisation, float32 (len(rows), d)."""
    with FeatureFile(path) as f, Progress(len(rows), what) as progress:
        pca = load_pca(pca_path, f)
        x = f.read(rows, lambda x: normalise_rows(pca.apply(x), f"{path} after {pca_path}"), progress.update)
    release_memory()
    return x


def read_background_graph(ddir, nbg, k, I, D, vectors, progress=silent):
    """Read the first k columns of the stored background graph into I, D (nbg, k).

    vectors: Vectors of the nodes, the background's first: some similarities are compared with theirs.
    """
    path_I, path_D, columns = ddir.find_graph(nbg, k, vectors.d)
    again = f"{graph_command(nbg, columns, vectors.d)} --overwrite makes it again"
    stored_I, stored_D = open_graph(path_I, path_D, nbg, columns, again)
    for rows, number, similarity in checked_rows(stored_I, stored_D, k, again, progress):
        I[rows], D[rows] = number, similarity
    check_graph(vectors, stored_I, stored_D, again)


def fixed_vectors(ddir, nbg, dim, base, **named):
    """Vectors of the background and, after it, of the base images, normalised as they are read. named: scale,
    progress and device of Vectors."""
    background = [MatrixFile(ddir.raw(dim), "<f4", dim, nbg, pca_command("apply", dim))] if nbg else []
    return Vectors(*background, base, normalise=True, **named)


def cells_of_nodes(ddir, nbg, vectors, progress):
    """The nodes by cell: the background as in its index, if there is one that serves; otherwise by cells made here."""
    path = ddir.index(nbg)
    if nbg >= exact_search.EXACT_BELOW and os.path.exists(path):
        index = open_index(path)
        if is_plain_ivf(index) and (index.ntotal, index.d, index.metric_type) == (nbg, vectors.d, faiss.METRIC_INNER_PRODUCT):
            centroids, cell = cells_of_index(index, path)
            return Cells(vectors, centroids, np.concatenate([cell, assign(vectors, centroids, first=nbg)]))
    return Cells.train(vectors, progress=progress)


def fixed_graph(ddir, nbg, k, vectors, base, test, progress):
    """Graph of background and base images, and test images against both: a dict of arrays of FixedPart.

    Exact below 131,072 nodes, and where a GPU, the `device` of the vectors, holds them; otherwise base images are searched for
    among near cells, and neighbours of neighbours, at recall@k >= 0.97, and test images among near cells at recall@k >= 0.995, as
    measured on samples of both: accuracies are then within about .002 of those of an exact graph (benchmarks/accuracy.py).
    vectors: of the nodes; base float32 (nb, d), test float32 (nt, d), normalised.
    """
    n, folder = vectors.n, ddir.path("knngraph")
    exact = exact_search.compares_all(2 * len(base) + len(test), n, vectors.d, vectors.device)
    I = np.full((n, k), -1, np.int32)
    # little is looked at in D, and that in order: it is the first to go to a file
    D = allocator(4 * k * n + knn.memory_of_graph(n, k, vectors.d), None if exact else folder)((n, k), np.float32)
    D[nbg:] = -np.inf
    if nbg:
        read_background_graph(ddir, nbg, k, I[:nbg], D[:nbg], vectors, progress)
    if exact:
        background = Vectors(vectors.sources[0] if nbg else base[:0], normalise=True, scale=vectors.scale[:nbg],
                             device=vectors.device)
        D[nbg:], I[nbg:] = exact_search.cross_insert(base, background, D[:nbg], I[:nbg], progress)
        background.release()
        test_D, test_I = exact_search.exact_knn(test, vectors, k, progress)
    else:
        cells = cells_of_nodes(ddir, nbg, vectors, progress)
        # before codes are chosen; and the graph gives the vectors in cells up
        new = Sample(vectors, vectors, k, 0, cells, progress, size=COMPLETION_SAMPLE, first=nbg) if len(base) else None
        search_done = knn.search_begun(cells, test, k, recall=0.995, progress=progress, say=log)
        if len(base):
            knn.build_knn_graph(cells, k, recall=0.97, out=(D, I), known=nbg, progress=progress, say=log, sample=new,
                                folder=folder)
        test_D, test_I, info = search_done()
        log("test images: exact search" if info["exact"] else f"test images: recall@{k} {info['recall']:.4f} on a sample")
    rank = locality_rank(I) if n >= exact_search.EXACT_BELOW else np.arange(n, dtype=np.int32)
    return dict(I=I, D=D, test_I=test_I, test_D=test_D, scale=vectors.scale, rank=rank)


@dataclass
class Changes:
    """What novel images, as m nodes after the n of the fixed part, change there.

    rows int32 (c,): nodes whose lists change; before, after int32 (c, k): their neighbours. novel_I int32 (m, k): those of the
    novel images; test_I int32 (nt, k): those of the test images, among all nodes. rank int32 (n + m,): rows of W.
    """
    rows: np.ndarray
    before: np.ndarray
    after: np.ndarray
    novel_I: np.ndarray
    test_I: np.ndarray
    rank: np.ndarray

    def are_few(self):
        """Whether to change W by entries takes less time and memory than to make it of the neighbours of all nodes."""
        m, k = self.novel_I.shape
        n = len(self.rank) - m
        return np.count_nonzero(self.after >= n) + m * k <= max(FEW, FEW_OF_ALL * n * k)

    def of_neighbours(self, I):
        """The neighbours of all nodes, int32 (n + m, k), from those in the fixed part."""
        I = np.concatenate([I, self.novel_I])
        I[self.rows] = self.after
        return I

    def of_entries(self):
        """Changed entries of W = W0 + W0^T: rows and columns, int32, and by how much, int8; in order of rows and columns."""
        n = len(self.rank)
        check_permutation(self.rank)
        first = n - len(self.novel_I)
        come, stay = self.after >= first, ((self.after >= 0) & (self.after < first)).sum(axis=1)
        # lists are merged: of what was there the first ones stay
        gone = (self.before >= 0) & (np.arange(self.before.shape[1]) >= stay[:, None])
        # numbers of entries, times two, and one more where they come
        changes = []
        for nodes, I, which, comes in ((self.rows, self.before, gone, False), (self.rows, self.after, come, True),
                                       (np.arange(first, n), self.novel_I, self.novel_I >= 0, True)):
            row, column = (self.rank[i] for i in (np.repeat(nodes, which.sum(axis=1)), I[which]))
            changes += [2 * (i.astype(np.int64) * n + j) + comes for i, j in ((row, column), (column, row))]     # W0 and W0^T
        changes = np.concatenate(changes)
        changes.sort()
        starts = np.flatnonzero(np.diff(changes >> 1, prepend=-1))
        by = np.add.reduceat((2 * (changes & 1) - 1).astype(np.int8), starts, dtype=np.int8)
        entry = changes[starts[by != 0]] >> 1
        return (entry // n).astype(np.int32), (entry % n).astype(np.int32), by[by != 0]


def add_novel(fixed, vectors, novel):
    """The novel images as further nodes, numbered after the others. Returns Changes.

    Exact: each novel image is compared with all nodes, which also tells whose neighbour it becomes.
    fixed: FixedPart; vectors: of its nodes; novel float32 (m, d).
    """
    I, D = fixed.mapped("I"), fixed.mapped("D")
    (n, k), m = D.shape, len(novel)
    changed = [(np.empty(0, np.int32), np.empty((0, k), np.int32))]
    with show_progress() as progress:
        _, novel_I = exact_search.cross_insert(
            novel, vectors, D, I, progress, fixed.load("worst"),
            lambda rows, D_after, I_after: changed.append((rows.astype(np.int32), I_after)))
    release_memory()
    found_D, found_I = exact_search.exact_knn(fixed.load("test"), as_vectors(novel, vectors.device), k)
    found_I[found_I >= 0] += n
    _, test_I = merge_lists(fixed.load("test_D"), fixed.load("test_I"), found_D, found_I, k)
    rank = np.concatenate([fixed.load("rank"), np.arange(n, n + m, dtype=np.int32)])
    rows, after = map(np.concatenate, zip(*changed))
    return Changes(rows, I[rows], after, novel_I, test_I, rank)


class FixedPart:
    """The part of a run that no seed changes: vectors of base and test images, and their completed graph.

    Arrays: base (nb, d), test (nt, d); I, D (n, k), of the nodes, and test_I, test_D (nt, k), of the test images, which are no
    nodes: the k nearest nodes by inner product, best first, the node itself included, -1 where there are fewer; scale (n,): one
    over the norms of the nodes' vectors; worst (n,) as of exact_search.worst_neighbours(); rank (n,): node i is row rank[i] of
    W = W0 + W0^T, near ones near each other; indptr, indices, nsingle as of SymmetricGraph. They are in memory, or in the files
    of a folder, from where they are read when asked for.
    """

    # dtype, and a letter for each dimension
    ARRAYS = {"base": ("f4", "bd"), "test": ("f4", "td"), "I": ("i4", "nk"), "D": ("f4", "nk"), "test_I": ("i4", "tk"),
              "test_D": ("f4", "tk"), "scale": ("f4", "n"), "worst": ("f4", "n"), "rank": ("i4", "n"), "indptr": ("i8", "p"),
              "indices": ("i4", "e"), "nsingle": ("i4", "n")}

    def __init__(self, arrays=None, folder=None):
        self.arrays, self.folder = arrays, folder

    def load(self, name):
        """The array, in memory."""
        if self.folder is None:
            return self.arrays[name]
        path = self._path(name)
        shape, dtype, offset = npy_header(path)
        a = np.empty(shape, dtype)
        with open(path, "rb") as f:
            read_into(f.fileno(), a, offset, path)
        if name in ("base", "test", "scale") and not np.isfinite(a).all():
            raise ValueError(f"{self.folder} is damaged ({name}.npy holds NaN or infinity): remove it, and run this again")
        return a

    def mapped(self, name):
        """The array, of which little is looked at, or all in order: a map of the file."""
        if self.folder is None:
            return self.arrays[name]
        shape, dtype, offset = npy_header(self._path(name))
        return np.memmap(self._path(name), dtype, "r", offset, shape) if np.prod(shape) else np.empty(shape, dtype)

    def graph(self):
        """indptr, indices, nsingle."""
        return self.load("indptr"), self.mapped("indices"), self.load("nsingle")

    @contextlib.contextmanager
    def errors_name_folder(self):
        """Errors in what is made of the arrays tell that the folder is damaged."""
        try:
            yield
        except (ValueError, IndexError) as e:
            if self.folder is None:
                raise
            raise ValueError(f"{self.folder} is damaged ({e}): remove it, and run this again")

    def check(self):
        """ValueError where a file of the folder is not whole, or does not fit the others."""
        sizes = {}
        for name, (dtype, letters) in self.ARRAYS.items():
            shape, found, _ = npy_header(self._path(name))
            if found != dtype or len(shape) != len(letters) or any(sizes.setdefault(*s) != s[1] for s in zip(letters, shape)):
                raise ValueError(f"{self._path(name)} holds {found} {shape}, and does not fit the other arrays there")

    def digests(self):
        """What tells of files in the folder that were damaged since they were written."""
        return {name: digest_of_some(self._path(name)) for name in self.ARRAYS}

    def _path(self, name):
        return os.path.join(self.folder, name + ".npy")


def npy_header(path):
    """(shape, dtype, offset of the data) of a .npy file in C order; ValueError where it is not whole."""
    check_regular(path)
    with open(path, "rb") as f:
        try:
            np.lib.format.read_magic(f)
            shape, fortran, dtype = np.lib.format.read_array_header_1_0(f)
        except Exception as e:          # of numpy's parser, in many ways
            raise ValueError(f"{path} is no .npy file ({type(e).__name__})")
        offset = f.tell()
    if fortran or dtype.hasobject or os.path.getsize(path) != offset + dtype.itemsize * int(np.prod(shape)):
        raise ValueError(f"{path} is truncated")
    return shape, dtype, offset


class FixedKey:
    """What the fixed part of a run is made from, and where it is kept. sources: paths of the files.

    base_rows: rows of train.hdf5; test_rows: rows of val.hdf5.
    """

    def __init__(self, ddir, mode, nbg, k, dim, base_rows, test_rows):
        self.ddir, self.nbg, self.k, self.dim = ddir, nbg, k, dim
        self.base_rows, self.test_rows = base_rows, test_rows
        ddir.check_dim(dim)
        self.sources = [ddir.train, ddir.val, ddir.pca(dim)]
        if nbg:
            self.sources += [ddir.raw(dim), *ddir.find_graph(nbg, k, dim)[:2]]
            if os.path.exists(ddir.index(nbg)):
                self.sources.append(ddir.index(nbg))
        for path in self.sources:
            check_readable(path, command_for(path, dim))
        load_pca(ddir.pca(dim))         # tells whether it is damaged: then its digest is another, too
        if nbg:
            check_made_by(ddir.pca(dim), ddir.raw(dim), dim)
        self.made_from = {
            "version": VERSION, "k": k, "nbg": nbg, "dim": dim, "files": file_identities(self.sources),
            "rows": [hashlib.sha256(np.ascontiguousarray(r).tobytes()).hexdigest() for r in (base_rows, test_rows)]}
        # where the folder is a link, what it leads to is replaced
        self.folder = os.path.realpath(ddir.path("knngraph", f"completed_{mode}_ndis{nbg}_k{k}_d{dim}"))

    def stored(self):
        """The stored part, or None where it is missing, damaged, or made from something else."""
        with contextlib.suppress(OSError, ValueError):
            part = FixedPart(folder=self.folder)
            part.check()
            if read_json(os.path.join(self.folder, "made_from.json")) == {**self.made_from, "arrays": part.digests()}:
                return part
        return None

    def check_unchanged(self, part):
        """ValueError where a stored part was replaced since stored() gave it: what was loaded may be of both."""
        if part.folder and self.stored() is None:
            raise ValueError(f"{self.folder} was made anew from other files while it was read: run this again")

    def make(self, device=None):
        """Compute the fixed part, on this GPU, if any (search_device()), where that pays. Its arrays are in memory."""
        base = read_features(self.ddir.train, self.base_rows, self.ddir.pca(self.dim), "base images read")
        test = read_features(self.ddir.val, self.test_rows, self.ddir.pca(self.dim), "test images read")
        with show_progress() as progress:
            vectors = fixed_vectors(self.ddir, self.nbg, self.dim, base, progress=progress, device=device)
            graph = fixed_graph(self.ddir, self.nbg, self.k, vectors, base, test, progress)
        indptr, indices, nsingle = SymmetricGraph(graph["I"], graph["rank"]).arrays
        return FixedPart(dict(base=base, test=test, **graph, worst=exact_search.worst_neighbours(graph["D"], graph["I"]),
                              indptr=indptr, indices=indices, nsingle=nsingle))

    def stored_or_made(self, device=None):
        """The stored part, made first where there is none; runs that start together make it once, if the disk has room for it."""
        with contextlib.ExitStack() as stack:
            try:
                stack.enter_context(exclusive(self.folder, lambda: log(f"another run is making {self.folder}")))
            except OSError as e:
                raise OSError(f"{e}: the completed graph cannot be kept there; --nocache --record FILE does without")
            part = self.stored()
            if part is None:
                part = self.make(device)
                try:
                    self._store(part)
                    part = self.stored() or part
                except OSError as e:        # a full disk: what took longest is done
                    log(f"note: the completed graph is not kept for further runs ({e})")
            return part

    def _store(self, part):
        """Write the arrays to a folder that appears under its name only when it is whole."""
        for left_behind in glob.glob(glob.escape(self.folder) + ".*.tmp"):     # by killed processes
            shutil.rmtree(left_behind, ignore_errors=True)
        temporary = f"{self.folder}.{os.getpid()}.tmp"
        os.makedirs(temporary)
        try:
            def store(name):
                with whole(os.path.join(temporary, name + ".npy")) as path:
                    np.save(path, np.ascontiguousarray(part.arrays[name]))

            at_once(store, FixedPart.ARRAYS)
            digests = FixedPart(folder=temporary).digests()
            write_json(os.path.join(temporary, "made_from.json"), {**self.made_from, "arrays": digests})
            shutil.rmtree(self.folder, ignore_errors=True)
            os.rename(temporary, self.folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
