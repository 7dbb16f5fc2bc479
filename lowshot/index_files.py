"""Files of the background's graph: the Faiss index, graphs as they are stored, and what lets a killed run go on."""
import contextlib
import errno
import hashlib
import json
import os
import shutil
import struct
import threading
import time

import numpy as np

from graph_utils import aligned_zeros
from graph_utils import neighbours as nb
from lowshot.cells import BLOCK
from lowshot.features import MatrixFile, check_readable, spread_rows
from lowshot.files import allocate, read_note, remove, remove_left_behind, whole, write_json
from lowshot.packages import faiss
from lowshot.script import log, silent

SIMILAR = 0.01          # by how much stored similarities and elements may differ from exact ones: enough for float16
SIMILAR_MEAN = 0.0005   # and similarities on average
MADE_AGAIN = "remove it and run build_graph.py again"       # an index; a graph that is there is kept


def open_index(path):
    """A Faiss index on disk, whose lists stay there. ValueError if the file is none."""
    check_readable(path, "build_graph.py")
    try:
        return faiss.read_index(path, faiss.IO_FLAG_MMAP | faiss.IO_FLAG_READ_ONLY)
    except RuntimeError as e:
        raise ValueError(f"{path} ({os.path.getsize(path)} bytes) is truncated or not a Faiss index: {MADE_AGAIN} "
                         f"({str(e).splitlines()[0]})")


def read_index(path, n, d):
    """The same of n vectors of d dimensions. ValueError if it is of others."""
    index = open_index(path)
    have = (index.ntotal, index.d, index.metric_type)
    if have != (n, d, faiss.METRIC_INNER_PRODUCT):
        raise ValueError(f"{path} holds {have[0]} vectors of {have[1]} dimensions, metric {have[2]}; {n} of {d}, inner "
                         f"product ({faiss.METRIC_INNER_PRODUCT}), expected: {MADE_AGAIN}")
    return index


def check_numbers(number, n, path):
    """ValueError where an index numbers its n vectors other than 0 .. n - 1. number: int (m,), m > 0, some of them."""
    if number.min() < 0 or number.max() >= n:
        raise ValueError(f"{path} is damaged, or made from others: it numbers its {n} vectors {number.min()} .. {number.max()}: "
                         f"{MADE_AGAIN}")


def cells_of_index(index, path):
    """(centroids float32 (nlist, d), cell of each vector int32 (n,)) of an IVF index. path: for the ValueError where it is
    damaged."""
    cell = np.full(index.ntotal, -1, np.int32)
    lists = index.invlists
    for c in range(index.nlist):
        size = lists.list_size(c)
        if size:
            ids = lists.get_ids(c)
            number = faiss.rev_swig_ptr(ids, size)
            check_numbers(number, index.ntotal, path)
            cell[number] = c
            lists.release_ids(c, ids)
    if (cell < 0).any():
        raise ValueError(f"{path} is damaged: it has no vector number {np.argmax(cell < 0)}: {MADE_AGAIN}")
    quantizer = index.quantizer
    if (quantizer.ntotal, quantizer.d) != (index.nlist, index.d):
        raise ValueError(f"{path} is damaged: it has {quantizer.ntotal} centroids of {quantizer.d} dimensions for {index.nlist} "
                         f"lists: {MADE_AGAIN}")
    return np.ascontiguousarray(quantizer.reconstruct_n(0, index.nlist)), cell


def write_ivf_flat(path, cells, progress=silent):
    """Write the vectors of `cells` as a Faiss IVF,Flat index: what faiss.write_index would, without a copy in memory. It
    searches 256 cells if nobody says otherwise (paper, section 3.2)."""
    v = cells.vectors
    nlist, sizes = len(cells.centroids), (cells.end - cells.begin).astype("<u8")
    quantizer = faiss.IndexFlatIP(v.d)
    quantizer.add(cells.centroids)
    empty = faiss.IndexIVFFlat(quantizer, v.d, nlist, faiss.METRIC_INNER_PRODUCT)
    empty.is_trained, empty.ntotal, empty.nprobe = True, v.n, min(256, nlist)
    # an index ends with its lists: "ilar", their number, bytes per vector, how sizes are stored, sizes, contents
    header = faiss.serialize_index(empty).tobytes()
    lists = b"ilar" + struct.pack("<QQ", nlist, 4 * v.d)
    none = lists + b"sprs" + struct.pack("<Q", 0)
    if not header.endswith(none):
        raise RuntimeError(f"Faiss {faiss.__version__} writes IVF indexes in another way than expected")
    with whole(path) as temporary, open(temporary, "wb") as f:
        f.write(header[:-len(none)] + lists + b"full" + struct.pack("<Q", nlist) + sizes.tobytes())
        for first, last in stretches_of_cells(cells):
            begin, end = cells.begin[first], cells.end[last - 1]
            x = v.scaled_rows(cells.order[begin:min(end, begin + BLOCK)])
            for c in range(first, last):
                rows = slice(cells.begin[c], cells.end[c])
                f.write(x[rows.start - begin:rows.stop - begin])
                for i in range(rows.start + BLOCK, rows.stop, BLOCK):       # of one that holds most vectors, say
                    f.write(v.scaled_rows(cells.order[i:min(i + BLOCK, rows.stop)]))
                f.write(cells.order[rows].astype("<i8"))
            progress("vectors written to the index", int(end), v.n)


def stretches_of_cells(cells):
    """Yield (first, last + 1) of cells that hold about a block of vectors together, or one cell."""
    first = 0
    while first < len(cells.end):
        last = max(first + 1, int(np.searchsorted(cells.end, cells.begin[first] + BLOCK, "right")))
        yield first, last
        first = last


def open_graph(path_I, path_D, n, columns, remedy):
    """(I, D): a stored graph of n nodes, as MatrixFiles. ValueError, with the remedy, where a file has another size."""
    for path in (path_I, path_D):
        have, width = os.path.getsize(path) if os.path.exists(path) else 0, 4 * columns
        if have != n * width:
            raise ValueError(f"{path} has {have} bytes, {n * width} ({n} rows of {width}) expected: {remedy}")
    return MatrixFile(path_I, "<i4", columns, n), MatrixFile(path_D, "<f4", columns, n)


def checked_rows(I, D, k, remedy, progress=silent):
    """Yield (rows, I, D): the first k columns of a stored graph, a block of rows after the other; ValueError, with the remedy,
    where a row is no list of neighbours. I, D: of open_graph()."""
    n = len(I)
    for i in range(0, n, BLOCK):
        rows = slice(i, i + BLOCK)
        number, similarity = I[rows], D[rows]
        have, ordered = number >= 0, np.sort(number, axis=1)
        for wrong, what in ((~have[:, :1], "lists no neighbour"),
                            ((number >= n) | (number < -1), f"names a neighbour that is none of {n} nodes"),
                            (have[:, 1:] & ~have[:, :-1], "has a gap between its neighbours"),
                            ((ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0), "lists a neighbour twice")):
            if wrong.any():
                raise ValueError(f"{I.filename}: row {i + np.argmax(wrong.any(axis=1))} {what}: {remedy}")
        if not np.isfinite(similarity[have]).all() or not (similarity[:, :-1] >= similarity[:, 1:] - SIMILAR)[have[:, 1:]].all():
            raise ValueError(f"{D.filename} is damaged: similarities in decreasing order were expected; {remedy}")
        progress("rows of the stored graph checked", min(i + BLOCK, n), n)
        yield rows, number[:, :k], similarity[:, :k]


def check_graph(vectors, I, D, remedy):
    """Compare some rows of a stored graph of n nodes, checked_rows(), with the vectors it should be of, the first n of `vectors`:
    ValueError, with the remedy, if it is of others. I, D: of open_graph()."""
    n, differences = len(I), []
    for row in spread_rows(n, 64):
        number, similarity = I[row:row + 1][0], D[row:row + 1][0]
        have = number >= 0
        exact = vectors.scaled_rows(number[have]) @ vectors.scaled_rows([row])[0]
        wrong = ~(np.abs(similarity[have] - exact) < SIMILAR)
        if wrong.any():
            raise ValueError(f"{D.filename} says {similarity[have][wrong][0]:.4g} for the similarity of vectors {row} and "
                             f"{number[have][wrong][0]}, which is {exact[wrong][0]:.4g}: the graph was made from other "
                             f"vectors; {remedy}")
        differences.append(np.abs(similarity[have] - exact))
    mean = np.concatenate(differences or [np.zeros(1)]).mean()
    if mean > SIMILAR_MEAN:
        raise ValueError(f"{D.filename} holds similarities that differ by {mean:.4g} on average from those of the vectors: the "
                         f"graph was made from others, or in other dimensions; {remedy}")


def index_note(path):
    """Where it stands which vectors an index is of that does not hold them as they are."""
    return path + ".json"


def holds_vectors(index):
    """Whether an index holds its vectors as they are."""
    return isinstance(index, (faiss.IndexFlat, faiss.IndexIVFFlat))


def digest_of_vectors(vectors):
    """A digest of some vectors, hexadecimal."""
    return hashlib.sha256(vectors.rows(spread_rows(vectors.n, 1024)).tobytes()).hexdigest()


def check_index(index, vectors, path):
    """Compare the vectors of some lists of an IVF,Flat or Flat index with those that it should hold: ValueError if they are
    others. Of another kind of index its note tells, if there is one."""
    def compare(number, x):
        check_numbers(number, vectors.n, path)
        with np.errstate(all="ignore"):         # of what is damaged
            wrong = ~(np.abs(np.asarray(x) - vectors.scaled_rows(number)).max(axis=1, initial=0) < SIMILAR)
        if wrong.any():
            raise ValueError(f"{path} holds another vector {np.asarray(number)[wrong][0]}: it was made from others: {MADE_AGAIN}")

    if not holds_vectors(index):
        digest = digest_of_vectors(vectors)
        if read_note(index_note(path)).get("vectors", digest) != digest:
            raise ValueError(f"{path} was made from other vectors: {MADE_AGAIN}")
    elif isinstance(index, faiss.IndexFlat):
        rows = spread_rows(vectors.n, 64)
        compare(rows, [index.reconstruct(int(row)) for row in rows])
    else:
        lists = index.invlists
        for c in spread_rows(index.nlist, 16):
            size = min(lists.list_size(int(c)), 8)
            if size:
                ids, codes = lists.get_ids(int(c)), lists.get_codes(int(c))
                compare(np.array(faiss.rev_swig_ptr(ids, size)),
                        faiss.rev_swig_ptr(codes, size * 4 * index.d).view(np.float32).reshape(size, -1))
                lists.release_ids(int(c), ids)
                lists.release_codes(int(c), codes)


class Checkpoint:
    """Copies of the candidate lists of build_knn_graph() in a file, from which a killed run goes on, to the same graph.

    A thread writes one every few minutes, of what does not change meanwhile: the lists of nodes that were searched, or those
    that a round of neighbours-of-neighbours begins with. Numbers are written, and compared again when they are read.

    path: the file, numbers int32 (n, K) and then, as JSON, what they are; identity: what the lists depend on, JSON-ready.
    """

    EVERY = 300             # seconds from one copy to the next
    PIECE = 8 << 20         # bytes written at a time

    def __init__(self, path, identity):
        self.path, self.identity = path, identity
        self.writer, self.stopped = None, threading.Event()

    def open(self, keys, X, empty=aligned_zeros):
        """Fill keys (n, K), zeros, with what was saved, and products of the codes X (n, words). Returns (nodes searched, rounds
        done, nprobe), zeros where there is nothing. empty: makes an array for meanwhile, (shape, dtype) -> zeros."""
        n, K = keys.shape
        # lists that were found by one code are not those of another
        self.fresh = {"identity": self.identity, "shape": [n, K], "words": X.shape[1]}
        self.saved, state = time.monotonic(), {}
        remove_left_behind(self.path)
        with contextlib.suppress(OSError, TypeError, ValueError), open(self.path, "rb") as f:
            f.seek(4 * n * K)
            state = dict(json.loads(f.read(1 << 16)))
        if any(state.get(key) != value for key, value in self.fresh.items()):
            return 0, 0, 0
        saved = MatrixFile(self.path, "<i4", K, n)
        numbers, nodes = empty((n, K), np.int32), np.arange(n, dtype=np.int32)
        for i in range(0, n, BLOCK):
            part = saved[i:i + BLOCK]
            numbers[i:i + BLOCK] = np.where(part == -1, -1, part & nb.NONE)
        try:
            nb.known_lists(X, nodes, nodes, numbers[:state["searched"]], 0, keys)
        except ValueError as e:
            raise ValueError(f"{self.path} is damaged ({e}): delete it to start afresh")
        for i in range(0, n, BLOCK):
            keys[i:i + BLOCK] |= np.where(saved[i:i + BLOCK] < -1, nb.NEW, 0)
        return state["searched"], state["rounds"], state["nprobe"]

    def save(self, lists, searched, rounds, nprobe):
        """Begin to write a copy, if it is time, of the lists (n, K) of the first nodes, those searched: keys, or nb.listed(keys).
        They must not change before wait() or give_up()."""
        if self.writer is not None and self.writer.is_alive() or time.monotonic() - self.saved < self.EVERY:
            return
        state = {**self.fresh, "searched": searched, "rounds": rounds, "nprobe": nprobe}
        self.writer = threading.Thread(target=self._write, args=(lists, state), daemon=True)
        self.writer.start()

    def _write(self, lists, state):
        n, K = lists.shape
        searched = state["searched"]
        size, step = 4 * K * searched, max(1, self.PIECE // (4 * K))
        try:
            os.makedirs(os.path.dirname(self.path), exist_ok=True)
            if shutil.disk_usage(os.path.dirname(self.path)).free < size:       # rather than fill the disk in trying
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), self.path)
            with whole(self.path) as temporary, open(temporary, "wb") as f:
                for i in range(0, searched, step):
                    piece = lists[i:min(i + step, searched)]
                    f.write(np.ascontiguousarray(piece if piece.dtype == np.int32 else nb.listed(piece)))
                    f.flush()
                    # what waits to be written would take the memory of others, and make them wait
                    os.fdatasync(f.fileno())
                    os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
                    if self.stopped.is_set():
                        raise InterruptedError
                f.seek(4 * n * K)
                state = json.dumps(state).encode()
                f.write(state.ljust(-(-len(state) // (4 * K)) * 4 * K))        # to whole rows
        except InterruptedError:
            return
        except OSError as e:
            log(f"note: no copy of the lists was written, to go on from should this run be killed ({e})")
        self.saved = time.monotonic()

    def wait(self):
        """Until a copy that is being written is whole."""
        if self.writer is not None:
            self.writer.join()

    def give_up(self):
        """Stop writing a copy, if one is being written."""
        self.stopped.set()
        self.wait()
        self.stopped.clear()

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.give_up()


class GraphFiles:
    """The graph's two files while they are made: (D, I) maps of temporary files, renamed when they are complete.

    A run that writes blocks of rows in order may say how many are done with save(), and go on there the next time.
    """

    def __init__(self, path_I, path_D, n, k, identity):
        self.paths = [os.path.realpath(path) for path in (path_D, path_I)]     # what links lead to is written
        self.temporary = [p + ".partial" for p in self.paths]
        self.state_path = self.temporary[1] + ".json"
        self.state = {"identity": identity, "shape": [n, k]}
        self.done = 0
        os.makedirs(os.path.dirname(path_I), exist_ok=True)
        state = read_note(self.state_path)
        with contextlib.suppress(OSError, TypeError, ValueError):
            if (identity is not None and all(state.get(key) == value for key, value in self.state.items())
                    and all(os.path.getsize(p) == 4 * n * k for p in self.temporary)):
                self.done = int(state["done"])
        if not self.done:
            remove(self.state_path)
        self.maps = []
        for path, dtype in zip(self.temporary, ("<f4", "<i4")):
            if not self.done:
                allocate(path, 4 * n * k)
            self.maps.append(np.memmap(path, dtype, "r+", shape=(n, k)))

    @property
    def arrays(self):
        return tuple(np.asarray(m) for m in self.maps)

    def save(self, done):
        self.flush()
        write_json(self.state_path, {**self.state, "done": done})

    def flush(self):
        """Make sure that all is on disk."""
        for m, temporary in zip(self.maps, self.temporary):
            m.flush()
            with open(temporary, "rb+") as f:
                os.fsync(f.fileno())

    def finish(self):
        """Give the files, once flushed, their names: D first, so that a graph whose I is there is complete."""
        self.maps = None
        for temporary, path in zip(self.temporary, self.paths):
            os.replace(temporary, path)
        remove(self.state_path)
