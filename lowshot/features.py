"""Feature files: the HDF5 blocks that save_features.py writes, and the headerless matrices made from them."""
import contextlib
import json
import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from lowshot.files import check_regular
from lowshot.script import log

SLAB_BYTES = 64 << 20
READERS = 4                 # threads that read parts of a slab: one alone waits for the disk, or for pages of memory
READ_AT_ONCE = 8 << 20      # bytes that are not worth a thread of their own
MOST_COMPRESSED = 2000      # features are never so many times as large as the file that holds them
LEAST_NORM = 1e-18          # of a vector that has a direction: squares of smaller numbers are lost in float32


def spread_rows(n, m):
    """At most m of the rows 0 .. n - 1, evenly spread, the first and the last among them, int64."""
    return np.unique(np.linspace(0, n - 1, m).astype(np.int64)) if n else np.empty(0, np.int64)


def check_readable(path, maker):
    """ValueError where a file is not there, which `maker` makes; PermissionError where it must not be read: libraries take it
    for damaged."""
    if not os.path.exists(path):
        raise ValueError(f"{path} does not exist: {maker} makes it")
    check_regular(path)
    with open(path, "rb"):
        pass


class FeatureFile:
    """One HDF5 file of features: `all_feats` float32 (n, d), `all_labels` int32 (n), `count` int32 (1).

    Rows at or beyond `count` are not valid. Nothing is read before it is asked for.

        with FeatureFile(path) as f:
            x = f.read(rows)                     # (len(rows), d) float32
            for i0, x in f.slabs(): ...          # all valid rows, in order
    """

    def __init__(self, path):
        import h5py
        check_readable(path, "save_features.py")
        self.path, self._fd = path, None
        try:
            self.file = h5py.File(path, "r")
        except OSError as e:
            raise ValueError(f"{path} ({os.path.getsize(path)} bytes) is truncated or not an HDF5 file: save_features.py "
                             f"makes it ({e})")
        try:
            self._look()
        except Exception as e:      # damaged metadata makes h5py fail in many ways
            self.file.close()
            if isinstance(e, (ValueError, MemoryError)):
                raise
            raise ValueError(f"{path} ({os.path.getsize(path)} bytes) is damaged: save_features.py makes it "
                             f"({type(e).__name__}: {e})")

    def _look(self):
        """Find size and place of the datasets."""
        path = self.path
        for name, ndim in (("all_feats", 2), ("all_labels", 1), ("count", 1)):
            shape = getattr(self.file.get(name), "shape", None)
            # other tools store labels as a column, and the count without dimensions
            other = (name, shape and shape[1:]) == ("all_labels", (1,)) or (name, shape) == ("count", ())
            if shape is None or len(shape) != ndim and not other:
                found = "" if shape is None else f" (but one of shape {shape})"
                raise ValueError(f"{path} has no {ndim}-dimensional dataset {name!r}{found}: not a feature file")
        feats, labels = self.file["all_feats"], self.file["all_labels"]
        for name in ("all_feats", "all_labels", "count", "readable", "class_names"):
            dataset = self.file.get(name)
            if dataset is not None and (getattr(dataset, "is_virtual", False) or getattr(dataset, "external", None)
                                        or not os.path.samefile(dataset.file.filename, path)):
                # their changes would not be noticed
                raise ValueError(f"{path}: {name} is kept in other files: copy it into this one")
        count = self.file["count"]
        count = np.atleast_1d(count[()] if count.shape == () else count[:1])
        if not len(count):
            raise ValueError(f"{path}: the dataset 'count' is empty, one number was expected")
        if count.dtype.kind not in "iuf" or not np.isfinite(count[0]) or count[0] != int(count[0]):
            raise ValueError(f"{path}: count holds {count.dtype} {count[0]!r}, a number of rows was expected")
        self.n = int(count[0])
        self.d = int(feats.shape[1])
        if not 0 <= self.n <= min(feats.shape[0], labels.shape[0]):
            raise ValueError(f"{path}: count is {self.n}, but all_feats has {feats.shape[0]} rows and all_labels "
                             f"{labels.shape[0]}")
        if not self.n and len(feats):
            raise ValueError(f"{path}: count is 0, but all_feats has {feats.shape[0]} rows: the file is damaged, or was cut off")
        if not self.d:
            raise ValueError(f"{path}: all_feats has no columns")
        if labels.dtype.kind not in "iuf":
            raise ValueError(f"{path}: all_labels holds {labels.dtype}, whole numbers were expected")
        if feats.dtype.kind != "f":
            raise ValueError(f"{path}: all_feats holds {feats.dtype}, floating point was expected")
        nbytes = self.n * (self.d * feats.dtype.itemsize + labels.dtype.itemsize)
        if nbytes > MOST_COMPRESSED * os.path.getsize(path):
            raise ValueError(f"{path} has {os.path.getsize(path)} bytes, which cannot be {self.n} rows of {self.d}: it is "
                             "damaged")
        self._offset, self.zeros = None, 0
        # rows of a contiguous dataset are read straight from the file, much faster than by h5py's index lists
        offset = feats.id.get_offset() if feats.chunks is None else None
        if offset is not None and feats.dtype == np.dtype("<f4"):
            self._fd, self._offset = os.open(path, os.O_RDONLY | os.O_CLOEXEC), offset

    @property
    def made_from(self):
        """What save_features.py made the file from; {} of files that do not tell."""
        with contextlib.suppress(OSError, RuntimeError, KeyError, ValueError, TypeError):
            note = json.loads(self.file.attrs["made_from"])
            return note if isinstance(note, dict) else {}
        return {}

    @property
    def network(self):
        """What made_from tells of the network, its weights and the transforms of its images; {} of files that do not tell."""
        note = self.made_from
        transforms = note.get("transforms")
        return {**{key: note[key] for key in ("model", "modelfile_sha256") if key in note},
                **(transforms if isinstance(transforms, dict) else {})}

    @property
    def class_names(self):
        """Names of the classes, that of label c at c; [] of files that do not tell."""
        names = self.file.get("class_names")
        if len(getattr(names, "shape", ())) != 1 or names.dtype.kind not in "OS":
            return []
        return [os.fsdecode(name) for name in self._stretch("class_names", 0, len(names)) if isinstance(name, (bytes, str))]

    def labels(self, known=None):
        """Labels of the valid rows, int64 (n,). ValueError for one that is not from 0 to known - 1, if known is given."""
        labels = self._stretch("all_labels", 0, self.n).reshape(self.n)
        if labels.dtype.kind == "f":
            labels = labels.astype(np.float64)
            wrong = ~(np.abs(labels) < 2 ** 53) | (np.floor(labels) != labels)
            if wrong.any():
                row = int(np.argmax(wrong))
                raise ValueError(f"{self.path}: the label of row {row} is {labels[row]}, a whole number was expected")
        labels = labels.astype(np.int64)
        outside = known is not None and (labels < 0) | (labels >= known)
        if np.any(outside):
            row = int(np.argmax(outside))
            listed = "" if labels[row] < 0 else f", or list class {labels[row] + 1} there, at the least among label_names"
            raise ValueError(f"{self.path}: the label of row {row} is {labels[row]}, label_idx.json has classes for labels 0 to "
                             f"{known - 1} (label 0 is its class 1): check that labels start at 0{listed}")
        return labels

    def _stretch(self, name, start, stop):
        """Rows start .. stop - 1 of a dataset."""
        try:
            return self.file[name][start:stop]
        except OSError as e:            # HDF5's, about a damaged chunk or the end of the file
            raise ValueError(f"{self.path}: rows {start} to {stop - 1} of {name} are damaged: save_features.py makes them ({e})")

    def readable(self):
        """Which images could be read, (n,); None of files that do not tell."""
        readable = self.file.get("readable")
        if len(getattr(readable, "shape", ())) != 1 or len(readable) < self.n or readable.dtype.kind not in "biuf":
            return None
        return self._stretch("readable", 0, self.n)

    def unreadable(self, rows):
        """How many of the images could not be read: they have the features of a black one. Of files that do not tell, 0."""
        readable = self.readable()
        return 0 if readable is None else int((readable[rows] == 0).sum())

    def row(self, i):
        """Row i as it is stored, checked for nothing, float32 (d,)."""
        return np.ascontiguousarray(self._stretch("all_feats", i, i + 1)[0], np.float32)

    def slabs(self, start=0, stop=None):
        """Yield (first row, float32 (m, d)) over rows start..stop-1 in order, about 64 MB at a time."""
        stop = self.n if stop is None else stop
        step = max(1, SLAB_BYTES // (4 * self.d))
        for i in range(start, stop, step):
            yield i, self._checked(self._stretch("all_feats", i, min(i + step, stop)), np.arange(i, min(i + step, stop)))

    def read(self, rows, transform=None, progress=None):
        """Rows in the order given, float32 (len(rows), d); transform: function of (m, d) applied to each part.

        Reads the rows that are needed, of chunked files all that is between them too, about 64 MB at a time: memory is that of
        the result.
        """
        rows = np.asarray(rows, np.int64)
        if len(rows) and not (0 <= rows.min() and rows.max() < self.n):
            raise ValueError(f"{self.path}: row {rows.max() if rows.max() >= self.n else rows.min()} asked for, "
                             f"the file holds {self.n} rows")
        order = np.argsort(rows, kind="stable")
        out = None
        step = max(1, SLAB_BYTES // (4 * self.d))
        buffer = np.empty((min(step, len(rows)), self.d), np.float32)      # once: fresh memory costs as much as the reading
        for i in range(0, len(rows), step):
            part = order[i:i + step]
            x = self._checked(self._pick(rows[part], buffer[:len(part)]), rows[part])
            if transform is not None:
                x = transform(x)
            if out is None:
                out = np.empty((len(rows), x.shape[1]), np.float32)
            out[part] = x
            if progress is not None:
                progress(i + len(part))
        if out is None:
            out = np.empty((0, self.d), np.float32)
            out = out if transform is None else transform(out)
        return out

    def _pick(self, rows, out):
        """Read rows, given in increasing order, into out (len(rows), d). Returns out."""
        if self._fd is not None:
            # plain reads, not a memory map: mapped pages count as this process's memory
            starts = np.concatenate([[0], np.flatnonzero(np.diff(rows) != 1) + 1, [len(rows)]])
            width = 4 * self.d

            def read(stretches):
                for start, stop in stretches:
                    read_into(self._fd, out[start:stop], self._offset + int(rows[start]) * width, self.path)

            stretches = list(zip(starts[:-1], starts[1:]))
            at_once(read, [stretches[i::READERS] for i in range(READERS)])
            return out
        # read whole stretches and pick: h5py takes index lists one row at a time
        step = max(1, SLAB_BYTES // (4 * self.d))
        start = 0
        while start < len(rows):
            stop = np.searchsorted(rows, rows[start] + step)
            first = rows[start]
            x = self._stretch("all_feats", first, rows[stop - 1] + 1)
            out[start:stop] = x[rows[start:stop] - first]
            start = stop
        return out

    def _checked(self, x, rows):
        with np.errstate(over="ignore"):
            x = np.ascontiguousarray(x, np.float32)
        norms = row_norms(x, self.path, rows)
        self.zeros += int((~x[norms == 0].any(axis=1)).sum())
        return x

    def close(self):
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None
        self.file.close()
        zeros, self.zeros = self.zeros, 0
        if zeros:
            log(f"note: {self.path}: {zeros} of the rows that were read are zeros, which networks do not give: is it whole?")

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.close()


def labels_of_both(train, val, known):
    """(labels of train, labels of val), two FeatureFile, int64, as labels(known) gives them; classes that have names are known as
    well. ValueError where the files come from different networks, or count the classes in different ways."""
    check_same_network(train.path, train.network, val.path, val.network)
    if train.made_from and train.made_from == val.made_from:
        log(f"note: {train.path} and {val.path} are of images of the same names, labels and sizes: are these the same images?")
    for c, (name, other) in enumerate(zip(train.class_names, val.class_names)):
        if name != other:
            raise ValueError(f"class {c + 1} is {name} in {train.path}, but {other} in {val.path}: save_features.py makes both "
                             "anew, of the same folders of classes")
    known = max(known, len(train.class_names))
    return train.labels(known), val.labels(known)


def check_same_network(path, network, other, other_network):
    """ValueError where two files tell of different networks, weights or transforms (FeatureFile.network)."""
    for key in network:
        if key in other_network and network[key] != other_network[key]:
            raise ValueError(f"{path} and {other} must come from the same network and transforms: {key} is {network[key]} of the "
                             f"one, {other_network[key]} of the other")


def at_once(function, arguments):
    """function(argument) for each, in threads; the first exception is raised."""
    with ThreadPoolExecutor(len(arguments)) as pool:
        list(pool.map(function, arguments))


def read_into(fd, array, position, path):
    """Fill a C-contiguous array with the bytes of an open file from `position` on."""
    buffer = memoryview(array.reshape(-1)).cast("B")

    def read(start):
        stop = min(start + part, len(buffer))
        while start < stop:
            got = os.preadv(fd, [buffer[start:min(stop, start + (1 << 30))]], position + start)
            if got <= 0:
                raise ValueError(f"{path} is truncated: it ends before byte {position + len(buffer)}")
            start += got

    part = max(-(-len(buffer) // READERS), READ_AT_ONCE)
    if len(buffer) <= part:
        read(0)
    else:
        at_once(read, range(0, len(buffer), part))


class MatrixFile:
    """The first `rows` rows of a headerless row-major matrix, read where they are asked for: x[i:j] is a new array
    (j - i, columns).

    Plain reads, unlike those of a memory map, do not count as this process's memory. maker: command line that makes the file,
    for the ValueError where its size is another.
    """

    def __init__(self, path, dtype, columns, rows, maker=None):
        if not os.path.exists(path):
            raise ValueError(f"{path} does not exist{f': {maker} makes it' if maker else ''}")
        check_regular(path)
        have, width = os.path.getsize(path), np.dtype(dtype).itemsize * columns
        if have % width or have < rows * width or have == 0:
            partial = have % width or not have
            why = "truncated or of another shape" if partial else f"it holds {have // width} rows"
            again = f"; {'' if partial else 'if there should be more, '}{maker} --overwrite makes it again" if maker else ""
            raise ValueError(f"{path} has {have} bytes, at least {rows * width} ({rows} rows of {width}) expected: {why}{again}")
        self.filename, self.dtype, self.shape = path, np.dtype(dtype), (rows, columns)

    def __len__(self):
        return self.shape[0]

    def __getitem__(self, rows):
        start, stop, step = rows.indices(len(self))
        if step != 1:
            raise IndexError("only stretches of rows can be read")
        x = np.empty((max(stop - start, 0), self.shape[1]), self.dtype)
        fd = os.open(self.filename, os.O_RDONLY | os.O_CLOEXEC)
        try:
            read_into(fd, x, start * self.shape[1] * self.dtype.itemsize, self.filename)
        finally:
            os.close(fd)
        return x


def row_norms(x, name, rows=None):
    """L2 norms of the rows of x float32 (n, d), 0 where they are less than LEAST_NORM. name: the file they are from, rows: their
    numbers in it or None, for the ValueError about a row that has none."""
    with np.errstate(over="ignore", invalid="ignore"):
        norms = np.sqrt(np.einsum("ij,ij->i", x, x))
    bad = ~np.isfinite(norms)
    if bad.any():
        row = np.argmax(bad)
        what = "NaN or infinity" if not np.isfinite(x[row]).all() else f"numbers as large as {np.abs(x[row]).max():.3g}"
        raise ValueError(f"{name}: {'a row' if rows is None else f'row {rows[row]}'} holds {what}")
    norms[norms < LEAST_NORM] = 0
    return norms


def normalise_rows(x, name):
    """Divide each row of x float32 (n, d) by its L2 norm, in place; rows whose norm is 0 in float32 become zeros. name: what
    errors name. Returns x."""
    norms = row_norms(x, name)
    norms[norms == 0] = np.inf
    x /= norms[:, None]
    return x
