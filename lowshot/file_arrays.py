"""Arrays that do not fit in memory, in files without a name."""
import functools
import os
import tempfile
import weakref

import numpy as np

from graph_utils import aligned_zeros
from lowshot import machine
from lowshot.files import reserve


def scratch(folder, shape, dtype):
    """An array of zeros in a file that has no name, and is gone with the array, which has its descriptor as attribute `file`.
    OSError where the disk has no room for it."""
    nbytes = int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
    if not nbytes:      # no file of no bytes is mapped
        return np.empty(shape, dtype)
    with tempfile.TemporaryFile(dir=folder) as f:
        reserve(f.fileno(), nbytes, folder)
        array = np.memmap(f, dtype, "r+", shape=shape)
        array.file = os.dup(f.fileno())
    weakref.finalize(array, os.close, array.file)
    return array


def allocator(nbytes, folder):
    """What makes arrays, (shape, dtype) -> zeros: in memory where so many bytes fit in what is free, or `folder` is None or
    cannot be written, else in files there, which is for what is read and written in order."""
    if machine.fits(nbytes) or folder is None or not os.access(folder, os.W_OK):
        return aligned_zeros
    return functools.partial(scratch, folder)
