"""Writes one HDF5 block of features so that work can be cut off at any moment, and goes on where it stopped.

While it grows, block0.hdf5 is called block0.hdf5.partial: an HDF5 file whose datasets have been laid out in full, empty,
and whose structure is never touched again. Rows are written straight into their places; block0.hdf5.partial.json says how
many are on disk for certain, and what they are made from. The last act is to rename the file.
"""
import contextlib
import json
import math
import os
import shutil
import time

import numpy as np

from lowshot.features import FeatureFile
from lowshot.files import allocate, exclusive, read_json, remove, whole, write_json
from lowshot.script import size


class FeatureWriter:
    """Features of n images, written in order.

        with FeatureWriter(path, n, d, labels, made_from) as out:
            for i in range(out.done, n, m):
                out.write(features, readable)       # (m, d) float32, (m,) bool: rows i..i+m-1
            out.finish()

    labels: int32 (n,). made_from: JSON-ready dict; a partial file made from something else is refused, or begun anew if
    `overwrite`. class_names: list or None. The attribute `notes`, a JSON-ready dict that write() takes, is kept with the
    progress, for the caller. Only what was saved counts as done: at most `period` seconds are lost.
    """

    def __init__(self, path, n, d, labels, made_from, overwrite=False, period=20, class_names=None):
        self.path, self.n, self.d, self.made_from, self.period = os.path.realpath(path), n, d, made_from, period
        self.partial, self.progress = self.path + ".partial", self.path + ".partial.json"
        self.overwrite, self.widths = overwrite, {"all_feats": 4 * d, "readable": 1}       # bytes in a row
        self.done, self.notes = 0, {}
        os.makedirs(os.path.dirname(self.path), exist_ok=True)
        with contextlib.ExitStack() as stack:
            stack.enter_context(exclusive(self.partial))
            if not self._resumed():
                self._create(labels, class_names)
            self.file = stack.enter_context(open(self.partial, "r+b", buffering=0))
            self.open = stack.pop_all()
        self.saved, self.saved_at = self.done, -math.inf        # the first rows are saved at once, with what they are made from

    def _resumed(self):
        """Whether what a partial file holds is taken over; if it is of something else, and may be replaced, it is not."""
        if not (os.path.exists(self.partial) and os.path.exists(self.progress)):
            return False
        try:
            self._resume()
        except ValueError:
            if not self.overwrite:
                raise
            return False
        return True

    def _resume(self):
        """Take over what a partial file holds. ValueError where that is of something else, or damaged."""
        try:
            state = read_json(self.progress)
            if not (isinstance(state, dict) and all(isinstance(state.get(key), dict) for key in ("made_from", "offsets", "notes"))
                    and all(type(state["offsets"].get(name)) is int for name in self.widths) and type(state.get("done")) is int):
                raise ValueError(f"{self.progress} is not what this script writes")
        except ValueError as e:
            raise ValueError(f"{e}: delete it and {self.partial} to start over, or --overwrite")
        differs = first_difference(state["made_from"], self.made_from)
        if differs:
            raise ValueError(f"{self.partial} was begun with {differs}: delete it, or --overwrite")
        self.offsets = state["offsets"]
        needed = max(self.offsets[k] + self.n * w for k, w in self.widths.items())
        if os.path.getsize(self.partial) < needed or not 0 <= state["done"] <= self.n:
            raise ValueError(f"{self.partial} has {os.path.getsize(self.partial)} bytes, at least {needed} expected, and "
                             f"{state['done']} of {self.n} images: delete it and {self.progress} to start over")
        self._check_structure()
        self.done, self.notes = state["done"], state["notes"]

    def _check_structure(self):
        """ValueError where the partial file is not HDF5 with the datasets where they were."""
        import h5py
        found, why = None, "its datasets are elsewhere"
        try:
            with h5py.File(self.partial, "r") as f:
                found = {name: f[name].id.get_offset() for name in self.widths}, f["count"][:].tolist(), len(f["all_labels"])
        except (OSError, RuntimeError, KeyError, ValueError, TypeError) as e:
            if getattr(e, "errno", None):       # not the file's fault
                raise
            why = e
        if found != (self.offsets, [self.n], self.n):
            raise ValueError(f"{self.partial} is damaged ({why}): delete it and {self.progress} to start over")

    def _create(self, labels, class_names):
        remove(self.progress)                   # of a file that is no more, or is not gone on with
        remove(self.partial)
        needed = self.n * (4 * self.d + 5) + (1 << 16)
        free = shutil.disk_usage(os.path.dirname(self.path)).free
        if needed > free:
            raise OSError(f"{self.path} needs {size(needed)}, the disk has {size(free)} free")
        with whole(self.partial) as temporary:
            self._lay_out(temporary, labels, class_names)
            allocate(temporary)         # not to fail for want of space hours later

    def _lay_out(self, path, labels, class_names):
        import h5py
        with h5py.File(path, "w") as f:
            f.attrs["made_from"] = json.dumps(self.made_from)
            f["count"] = np.array([self.n], np.int32)
            f["all_labels"] = np.ascontiguousarray(labels, np.int32)
            if class_names:     # bytes, as names of folders need not be UTF-8
                f.create_dataset("class_names", data=[os.fsencode(name) for name in class_names], dtype=h5py.string_dtype())
            for name, shape, dtype in (("all_feats", (self.n, self.d), h5py.h5t.IEEE_F32LE),
                                       ("readable", (self.n,), h5py.h5t.py_create(np.dtype(bool), logical=True))):
                plist = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
                plist.set_layout(h5py.h5d.CONTIGUOUS)
                plist.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)         # so that its place is known
                plist.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
                plist.set_obj_track_times(False)            # the same features are the same file
                h5py.h5d.create(f.id, name.encode(), dtype, h5py.h5s.create_simple(shape), dcpl=plist)
            self.offsets = {name: f[name].id.get_offset() for name in self.widths}

    def write(self, features, readable, notes=()):
        """Write the next rows: float32 (m, d) and bool (m,). notes: what changes in self.notes when they are written."""
        for name, x in (("all_feats", np.ascontiguousarray(features, "<f4")),
                        ("readable", np.ascontiguousarray(readable, np.uint8))):
            data = memoryview(x).cast("B")
            at = self.offsets[name] + self.done * self.widths[name]
            while data:
                written = os.pwrite(self.file.fileno(), data, at)
                data, at = data[written:], at + written
        self.done += len(features)
        self.notes.update(notes)
        if time.monotonic() > self.saved_at + self.period:
            self.save()

    def save(self):
        """Make sure that all rows so far are on disk, then say so."""
        os.fsync(self.file.fileno())
        write_json(self.progress, {"done": self.done, "notes": self.notes, "offsets": self.offsets,
                                   "made_from": self.made_from})
        self.saved, self.saved_at = self.done, time.monotonic()

    def readable(self):
        """bool (n,) of the rows written so far."""
        data = os.pread(self.file.fileno(), self.done, self.offsets["readable"])
        return np.frombuffer(data, bool)

    def finish(self):
        """Give the file its name: all rows must have been written."""
        if self.done != self.n:
            raise ValueError(f"{self.done} of {self.n} rows written")
        self.save()                             # if the rename fails, nothing is lost
        self._check_structure()
        os.replace(self.partial, self.path)
        remove(self.progress)

    def discard(self):
        """Remove the partial file."""
        remove(self.progress)
        remove(self.partial)
        self.saved = self.done = 0

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        with self.open:
            if self.done > self.saved:
                self.save()


def made_from(path):
    """What a complete block was made from, or None if it does not tell."""
    try:
        with FeatureFile(path) as f:
            return f.made_from or None
    except (OSError, ValueError):
        return None


def first_difference(old, new):
    """None if two dicts are equal, else the first key they differ in, as text: 'i1 = 10, now 20'; of digests of images, that
    they are others."""
    if old is None:
        return "unknown arguments"
    for key in (*new, *(k for k in old if k not in new)):
        a, b = old.get(key), new.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            inner = first_difference(a, b)
            if inner:
                return f"{key}: {inner}"
        elif a != b and key.startswith("sha256_"):
            return "other images (names, labels or sizes differ)"
        elif a != b:
            return f"{key} = {a}, now {b}"
    return None
