"""Sets of images on disk, described by a YAML file, decoded to uint8 arrays of one size.

    config = load_config("f100m_save_data.yaml")
    images = open_set(config)                           # len(images), images.labels(i0, i1)
    pixels = Preprocess(config)(images.read(i))         # (crop, crop, 3) uint8

A configuration has three parts, all but `dataset` optional:

    dataset:
      kind: yfcc100m            # the image numbers are places in zip files: 12345678 is 678.jpg in ROOT/12/345.zip
      root: ${DDIR}/yfcc100m    #   ${...}: environment variables
      length: 100000000         #   number of images; without it, up to the last one found
      # kind: imagenet          # meta: a JSON file with image_names and image_labels; names are relative to root, or
      #                         #   to the JSON's folder if there is no root
      # kind: folder            # root: a subfolder per class, classes numbered in their sorted order, or images only;
      #                         #   classes: another folder of the same classes, that numbers them (root if absent)
      # kind: cifar10           # or cifar100, by torchvision: root, train (true/false), download (true/false)
    transforms:
      resize: 256               # pixels of the shorter side; null leaves images as they are
      crop: 224                 # pixels of the centre square; smaller images get a black border
      mean: [0.485, 0.456, 0.406]
      std: [0.229, 0.224, 0.225]
    loader:
      batchsize: 256            # images at a time on a GPU; a CPU takes what its caches hold
      workers: null             # threads or processes that read and decode; null: one per CPU
      open_zips: 8              # zip files that a process keeps open
"""
import collections
import errno
import functools
import hashlib
import io
import os
import re
import stat
import struct
import threading
import warnings
import zipfile
import zlib

import numpy as np
from PIL import Image

try:
    import simplejpeg           # the same pixels as PIL, several times quicker on small images
except ImportError:
    simplejpeg = None

from lowshot.files import read_json, read_yaml
from lowshot.machine import MOST_WORKERS
from lowshot.packages import load_torchvision
from lowshot.script import Progress, log

warnings.filterwarnings("ignore", module="PIL")     # of transparency, and of sizes

CONFIGS = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "configs")
SMALL = 1 << 16         # bytes that are read before a file is asked for its size, or of small members of zip files at a time
NAMES = [f"{i:03d}.jpg" for i in range(1000)]   # members of YFCC100M's zip files
HEADER = 1 << 10        # bytes at the start of a JPEG file among which its size is looked for
# of zip files: the last record (signature, disks, members here and in all, length and start of the directory, length of a
# comment), and what an entry of the directory begins with (the lengths are those of name, extra field and comment)
END_RECORD = struct.Struct("<4sIHHIIH")
ENTRY = np.dtype({"names": ["signature", "flags", "method", "checksum", "size", "lengths", "offset"],
                  "formats": ["S4", "<u2", "<u2", "<u4", "<u4", "3<u2", "<u4"],
                  "offsets": [0, 8, 10, 16, 24, 28, 42], "itemsize": 46})
ENCRYPTED, NOT_HERE = 1, 0xffffffff     # a flag, and numbers that the extra field has
LARGEST_MEMBER = 1 << 28    # bytes of an image in a zip file, which may be compressed to few
UNALIGNED = 32          # bytes, at a multiple of which pixels are not decoded to
STRIP = 1 << 24         # pixels of a resized image from which on only the part that is kept is resized
EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".ppm", ".pgm", ".tif", ".tiff")

DATASET_KEYS = {"yfcc100m": {"root", "length"}, "imagenet": {"meta", "root"}, "folder": {"root", "classes"},
                "cifar10": {"root", "train", "download"}, "cifar100": {"root", "train", "download"}}
TRANSFORMS = {"resize": 256, "crop": 224, "mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
LOADER = {"batchsize": 256, "workers": None, "open_zips": 8}


class Missing(Exception):
    """There is no image of this number."""


# ---------------------------------------------------------------------------------------------- configuration

def load_config(name):
    """Read and check a configuration: a path, or the bare name of a file in configs/. Returns a dict with all keys.

    Paths in it have their environment variables expanded. Raises ValueError, naming the file, for anything amiss.
    """
    path = name
    if not os.path.exists(path) and not os.path.dirname(name):
        path = os.path.join(CONFIGS, name)
    if not os.path.isfile(path):
        have = sorted(n for n in os.listdir(CONFIGS) if n.endswith(".yaml")) if os.path.isdir(CONFIGS) else []
        raise ValueError(f"no configuration {name}, neither here nor in {CONFIGS}, which has {', '.join(have)}")
    return _checked(read_yaml(path), path)


def _checked(content, path):
    """The configuration with defaults filled in and paths expanded."""
    def need(condition, what):
        if not condition:
            raise ValueError(f"{path}: {what}")

    def whole_number(part, key, low, optional=False):
        value = part[key]
        need(optional and value is None or type(value) is int and value >= low,
             f"{key} is {value!r}, a whole number of at least {low}{' or null' if optional else ''} was expected")

    need(isinstance(content, dict) and isinstance(content.get("dataset"), dict),
         "a section 'dataset' was expected: see lowshot/imagesets.py for an example")
    parts = {}
    for name, part in content.items():
        need(name in ("dataset", "transforms", "loader"), f"unknown section {name!r}: dataset, transforms and loader "
                                                          "are known")
        need(part is None or isinstance(part, dict), f"{name} must be a section of keys and values")
        parts[name] = dict(part or {})
    dataset = parts["dataset"]
    kind = dataset.get("kind")
    need(isinstance(kind, str) and kind in DATASET_KEYS,
         f"dataset kind is {kind!r}, one of {', '.join(DATASET_KEYS)} was expected")
    for name, known in (("dataset", {"kind"} | DATASET_KEYS[kind]), ("transforms", set(TRANSFORMS)),
                        ("loader", set(LOADER))):
        unknown = sorted(map(str, set(parts.get(name, {})) - known))
        need(not unknown, f"unknown key {unknown[0]!r} in {name}: {', '.join(sorted(known))} are known"
             if unknown else "")
    transforms = {**TRANSFORMS, **parts.get("transforms", {})}
    loader = {**LOADER, **parts.get("loader", {})}

    for key in ("root", "meta", "classes"):
        if key in dataset:
            need(isinstance(dataset[key], str) and dataset[key], f"{key} is {dataset[key]!r}, a path was expected")
            dataset[key] = _expand(dataset[key], path)
    need(("meta" if kind == "imagenet" else "root") in dataset,
         f"dataset kind {kind} needs {'meta' if kind == 'imagenet' else 'root'}")
    if kind == "yfcc100m":
        dataset.setdefault("length", None)
        whole_number(dataset, "length", 1, optional=True)
    for key, default in (("train", True), ("download", False)):
        if key in DATASET_KEYS[kind]:
            need(isinstance(dataset.setdefault(key, default), bool), f"{key} must be true or false")
    whole_number(transforms, "resize", 1, optional=True)
    whole_number(transforms, "crop", 1)
    need(transforms["crop"] <= 8192, f"crop is {transforms['crop']}, at most 8192 pixels are possible")
    need(transforms["resize"] is None or transforms["crop"] <= transforms["resize"],
         f"crop ({transforms['crop']}) is larger than resize ({transforms['resize']})")
    for key in ("mean", "std"):
        v = transforms[key]
        need(isinstance(v, list) and len(v) == 3 and all(type(x) in (int, float) and abs(x) <= 1e6 for x in v)
             and (key == "mean" or min(v) >= 1e-6), f"{key} is {v!r}, three numbers (for red, green, blue) were expected")
    whole_number(loader, "batchsize", 1)
    whole_number(loader, "workers", 1, optional=True)
    need((loader["workers"] or 1) <= MOST_WORKERS, f"workers is {loader['workers']}, at most {MOST_WORKERS} are possible")
    whole_number(loader, "open_zips", 1)
    return {"dataset": dataset, "transforms": transforms, "loader": loader}


def _expand(text, path):
    """Replace ${NAME} and $NAME by environment variables, which must be set and not empty."""
    def value(match):
        name = match.group(1) or match.group(2)
        if not os.environ.get(name):
            raise ValueError(f"{path} uses ${{{name}}}, but the environment variable {name} is not set or empty")
        return os.environ[name]
    return os.path.expanduser(re.sub(r"\$\{(\w+)\}|\$(\w+)", value, text))


# ---------------------------------------------------------------------------------------------- sets

def open_set(config):
    """The set of images that a configuration describes.

    len(images), images.labels(i0, i1) int32, images.read(i) -> bytes or uint8 (h, w, 3), images.name(i),
    images.class_names (list or None), images.identity(i0, i1): dict that tells these images from others, wherever
    they are stored; images.check(i0, i1): ValueError where files that hold many of them are damaged.
    """
    dataset = config["dataset"]
    kind = dataset["kind"]
    if kind == "yfcc100m":
        return ZipSet(dataset["root"], dataset["length"], config["loader"]["open_zips"])
    if kind == "imagenet":
        return meta_set(dataset["meta"], dataset.get("root"))
    if kind == "folder":
        return folder_set(dataset["root"], dataset.get("classes"))
    return CifarSet(kind, dataset["root"], dataset["train"], dataset["download"])


def _size(path):
    """Bytes of a file, -1 if it is not there."""
    try:
        return os.stat(path).st_size
    except OSError:
        return -1


class ImageSet:
    """What sets have if they have nothing of their own."""
    class_names = None

    def check(self, i0, i1):
        pass


class ZipSet(ImageSet):
    """YFCC100M: image number abcdefgh is fgh.jpg in ab/cde.zip. Numbers may be missing; there are no labels (0).

    At most `open_zips` files are kept open, the ones used last; threads may share them.
    """

    def __init__(self, root, length=None, open_zips=8):
        if not os.path.isdir(root):
            raise ValueError(f"{root} is not a directory: the zip files 00/000.zip ... were expected in it")
        self.root, self.open_zips = root, open_zips
        self.files, self.lock, self.last = collections.OrderedDict(), threading.Lock(), (None, None)
        self.length = self._last() + 1 if length is None else length

    def _last(self):
        """Number of the last image found."""
        for folder in sorted((n for n in os.listdir(self.root) if re.fullmatch(r"\d\d", n)), reverse=True):
            for name in sorted(os.listdir(os.path.join(self.root, folder)), reverse=True):
                if re.fullmatch(r"\d\d\d\.zip", name):
                    try:
                        with zipfile.ZipFile(os.path.join(self.root, folder, name)) as f:
                            images = [n for n in f.namelist() if re.fullmatch(r"\d\d\d\.jpg", n)]
                    except (OSError, zipfile.BadZipFile):
                        images = ["999.jpg"]        # damaged, but it has a place in the numbering
                    if images:
                        return int(folder) * 10 ** 6 + int(name[:3]) * 1000 + int(max(images)[:3])
        raise ValueError(f"no image found in {self.root}: files such as 00/000.zip, holding 000.jpg ..., were expected")

    def __len__(self):
        return self.length

    def _path(self, z):
        return os.path.join(self.root, f"{z // 1000:02d}", f"{z % 1000:03d}.zip")

    def _paths(self, i0, i1):
        """The zip files of these images."""
        return [self._path(z) for z in range(i0 // 1000, -(-i1 // 1000))]

    def identity(self, i0, i1):
        digest = hashlib.sha256()
        for path in self._paths(i0, i1):
            digest.update(b"%d " % _size(path))
        return {"sha256_zip_sizes": digest.hexdigest()}

    def check(self, i0, i1):
        """ValueError for a zip file that is truncated, and a line on those that are not there."""
        paths, absent = self._paths(i0, i1), []
        for path in paths:
            try:
                with open(path, "rb") as f:
                    whole = zipfile.is_zipfile(f)
            except FileNotFoundError:
                absent.append(path)
                continue
            if not whole:
                raise ValueError(f"{path} ({_size(path)} bytes) is truncated, or no zip file: copy it again, or remove it to "
                                 "do without its images")
        if absent:
            log(f"note: {len(absent)} of {len(paths)} zip files are not there, {absent[0]} for one: their images are missing")

    def labels(self, i0, i1):
        return np.zeros(i1 - i0, np.int32)

    def name(self, i):
        return f"{i // 10 ** 6:02d}/{i // 1000 % 1000:03d}.zip/{i % 1000:03d}.jpg"

    def read(self, i):
        """The bytes of image i; raises Missing, or any other exception if its file is damaged."""
        z, i = divmod(i, 1000)
        last = self.last        # one look, as other threads change it
        if last[0] != z:
            last = self.last = z, self._reader(z)
        return last[1].read(NAMES[i])

    def _reader(self, z):
        with self.lock:
            reader = self.files.get(z)
            if reader is None:
                while len(self.files) >= self.open_zips:
                    self.files.popitem(last=False)          # closed when the last thread that reads it lets go
                reader = self.files[z] = ZipReader(self._path(z))
            else:
                self.files.move_to_end(z)
        return reader


class ZipReader:
    """A zip file whose members are read whole. One that is missing or damaged has no members, and is remembered so.

    Members stored without compression, as in YFCC100M, are read by one system call, small ones by one for many, and where all
    are their directory is taken apart at once; the zipfile module, which does the rest, takes longer for each than the decoding
    of a small image.
    """

    class Stretch(threading.local):
        """What a thread has read of the file."""
        start, data = 0, b""

    def __init__(self, path):
        self.path, self.file, self.zip, self.members = path, None, None, {}     # (offset, size, checksum); None: by zipfile
        self.stretch, self.error = self.Stretch(), None
        try:
            self.file = open(path, "rb", buffering=0)
            self.size = os.fstat(self.file.fileno()).st_size
            self.members = stored_members(self.file.fileno(), self.size)
            if self.members is None:
                self.zip = zipfile.ZipFile(self.file)
                self.members = {m.filename: (m.header_offset, m.file_size, m.CRC)
                                if m.compress_type == zipfile.ZIP_STORED and not m.flag_bits & ENCRYPTED else None
                                for m in self.zip.infolist()}
        except FileNotFoundError:
            self.error = Missing(f"no file {path}")
        except OSError as e:
            raise_if_grave(e)
            self.error = e
        except (zipfile.BadZipFile, ValueError, NotImplementedError, struct.error, EOFError) as e:
            self.error = zipfile.BadZipFile(f"{path}: {e}")

    def read(self, name):
        if self.error is not None:
            raise self.error
        try:
            member = self.members[name]
        except KeyError:
            raise Missing(f"no {name} in {self.path}")
        offset, size, checksum = member or (0, self.zip.getinfo(name).file_size, None)
        if size > LARGEST_MEMBER:
            raise zipfile.BadZipFile(f"{name} has {size} bytes, more than an image")
        if member is None:
            return self.zip.read(name)
        if offset + size > self.size:
            raise zipfile.BadZipFile(f"{name} would end beyond the file")
        # a member is a header of 30 bytes, its name, an extra field, then the data
        spare = 64
        data, at = self._stretch(offset, 30 + len(name) + spare + size)
        if data[at:at + 4] != b"PK\3\4" or len(data) < at + 30:
            raise zipfile.BadZipFile(f"no member where {name} should start")
        start = 30 + sum(struct.unpack_from("<HH", data, at + 26))
        if at + start + size > len(data):
            data, at = self._stretch(offset + start, size)
            start = 0
        data = data[at + start:at + start + size]
        if zlib.crc32(data) != checksum:
            raise zipfile.BadZipFile(f"bad checksum of {name}")
        return data

    def _stretch(self, start, n):
        """(data, at): n bytes of the file from `start` on, or those up to its end, are data[at:at + n]."""
        have = self.stretch
        at = start - have.start
        if not 0 <= at <= len(have.data) - n:
            if n > SMALL // 8:
                return os.pread(self.file.fileno(), n, start), 0
            have.start, have.data, at = start, os.pread(self.file.fileno(), SMALL, start), 0
        return have.data, at

    def __del__(self):
        if self.file is not None:
            self.file.close()


def stored_members(fd, size):
    """{name: (offset, size, checksum)} of the zip file of `size` bytes, or None: it is to be looked at member by member.

    That is unless it ends with its directory, and this has entries of one length, of members without compression.
    """
    end = os.pread(fd, END_RECORD.size, max(0, size - END_RECORD.size))
    if len(end) < END_RECORD.size:
        return None
    signature, disk, n, total, length, start, comment = END_RECORD.unpack(end)
    if signature != b"PK\5\6" or disk or n != total or not 0 < n < 0xffff or comment or length % n \
            or start + length != size - END_RECORD.size:
        return None
    directory = np.frombuffer(os.pread(fd, length, start), np.uint8)
    if len(directory) != length or length // n < ENTRY.itemsize:
        return None
    directory = directory.reshape(n, length // n)
    entries = directory[:, :ENTRY.itemsize].copy().view(ENTRY)[:, 0]
    lengths = entries["lengths"]
    name_length = int(lengths[0, 0])
    names = directory[:, ENTRY.itemsize:ENTRY.itemsize + name_length]
    usual = ((entries["signature"] == b"PK\1\2") & (entries["flags"] & ENCRYPTED == 0)
             & (entries["method"] == zipfile.ZIP_STORED) & (lengths == lengths[0]).all(axis=1)
             & (entries["size"] < NOT_HERE) & (entries["offset"] < NOT_HERE))
    if not name_length or not usual.all() or ENTRY.itemsize + int(lengths[0].sum()) != length // n or ((names - 1) > 126).any():
        return None         # (names of ASCII, without zeros)
    names = names.tobytes().decode("ascii")
    return dict(zip((names[i:i + name_length] for i in range(0, len(names), name_length)),
                    zip(*(entries[key].tolist() for key in ("offset", "size", "checksum")))))


class FileSet(ImageSet):
    """Images in files of their own. names: paths below `root`; labels: int32 (n,)."""

    def __init__(self, root, names, labels, class_names=None):
        self.root = root
        # bytes in one array: a list of a million strings would be copied into every process
        self.names = np.array([os.fsencode(n) for n in names], dtype="S")
        self._folder = os.path.join(os.fsencode(root), b"")
        self._labels = np.asarray(labels, np.int32)
        self.class_names = class_names

    def __len__(self):
        return len(self.names)

    def identity(self, i0, i1):
        digest = hashlib.sha256(b"\0".join(self.names[i0:i1].tolist()))     # not as stored, as wide as the longest of all
        digest.update(self._labels[i0:i1].tobytes())
        sizes = np.empty(i1 - i0, np.int64)
        with Progress(len(sizes), "files looked up") as progress:
            for i in range(i0, i1):
                sizes[i - i0] = _size(self._path(i))
                progress.update(i + 1 - i0)
        digest.update(sizes.tobytes())
        return {"sha256_names_labels_sizes": digest.hexdigest()}

    def _path(self, i):
        name = self.names[i]
        return name if name[:1] == b"/" else self._folder + name

    def labels(self, i0, i1):
        return self._labels[i0:i1]

    def name(self, i):
        return os.fsdecode(self.names[i])

    def read(self, i):
        # a few system calls: a Python file object takes as long as decoding a small image
        try:
            fd = os.open(self._path(i), os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)     # not to wait for what is no file
        except FileNotFoundError as e:
            raise Missing(str(e))
        try:
            data = os.read(fd, SMALL)
            if len(data) == SMALL:
                if not stat.S_ISREG(os.fstat(fd).st_mode):      # such as one without an end
                    raise ValueError("no regular file")
                while piece := os.read(fd, max(os.fstat(fd).st_size - len(data), 0) + 1):
                    data += piece
            return data
        finally:
            os.close(fd)


def meta_set(meta, root=None):
    """ImageNet by a JSON file: image_names (paths) and image_labels (class numbers from 0, as many)."""
    if not os.path.exists(meta):
        raise ValueError(f"{meta} does not exist: a JSON file with image_names and image_labels was expected")
    content = read_json(meta)
    names, labels = (content.get(k) if isinstance(content, dict) else None for k in ("image_names", "image_labels"))
    if not isinstance(names, list) or not isinstance(labels, list):
        raise ValueError(f"{meta} has no lists image_names and image_labels")
    if len(names) != len(labels):
        raise ValueError(f"{meta} has {len(names)} image_names, but {len(labels)} image_labels")
    if not names:
        raise ValueError(f"{meta} lists no image")
    for i, (name, label) in enumerate(zip(names, labels)):
        if not _is_path(name) or type(label) is not int or not 0 <= label < 2 ** 31:
            raise ValueError(f"{meta}: entry {i} is {name!r} of class {label!r}; a path and a class number from 0 "
                             "were expected")
    return FileSet(root or os.path.dirname(os.path.abspath(meta)), names, labels)


def folder_set(root, classes=None):
    """Images in a folder, in sorted order: a subfolder per class (labels 0, 1, ...), or images only (labels 0).

    classes: folder whose subfolders number the classes, so that training and test images get the same numbers.
    """
    def subfolders(folder):
        if not os.path.isdir(folder):
            raise ValueError(f"{folder} is not a directory: images, or a subfolder of images per class, were expected")
        with os.scandir(folder) as entries:
            return sorted(e.name for e in entries if e.is_dir() and not e.name.startswith("."))

    own = subfolders(root)
    class_names = own if classes is None else subfolders(classes)
    if set(own) - set(class_names):
        raise ValueError(f"{root} has a class {sorted(set(own) - set(class_names))[0]!r} that {classes} lacks")
    number = {name: i for i, name in enumerate(class_names)}
    names, labels = [], []
    files = [n for n in sorted(os.listdir(root)) if not os.path.isdir(os.path.join(root, n))]
    loose, others = [n for n in files if _is_image(n)], [n for n in files if not _is_image(n)]
    if loose and own:
        raise ValueError(f"{root} holds both images ({loose[0]} ...) and subfolders ({own[0]} ...): either images only,"
                         " or a subfolder per class, was expected")
    if loose and classes is not None:
        raise ValueError(f"{root} holds images ({loose[0]} ...): a subfolder for each class of {classes} was expected")
    if loose:
        names, labels, class_names = loose, [0] * len(loose), None
    for name in own:
        before = len(names)
        seen = {os.path.realpath(root)}         # links may lead back
        for folder, folders, files in os.walk(os.path.join(root, name), followlinks=True):
            seen.add(os.path.realpath(folder))
            folders[:] = sorted(f for f in folders if not f.startswith(".")
                                and os.path.realpath(os.path.join(folder, f)) not in seen)
            relative = os.path.relpath(folder, root)
            names += [os.path.join(relative, n) for n in sorted(files) if _is_image(n)]
            others += [os.path.join(relative, n) for n in sorted(files) if not _is_image(n)]
        labels += [number[name]] * (len(names) - before)
    if not names:
        raise ValueError(f"{root} holds no images: files ending in {', '.join(EXTENSIONS)} were expected")
    if others:
        log(f"note: {root} has files that are left out, no images by their names: {len(others)}, {others[0]} for one")
    return FileSet(root, names, labels, class_names)


def _is_path(name):
    """Whether this can be the path of a file."""
    if not isinstance(name, str) or not name or "\0" in name:
        return False
    try:
        os.fsencode(name)
    except UnicodeEncodeError:
        return False
    return True


def _is_image(name):
    return name.lower().endswith(EXTENSIONS) and not name.startswith(".")


class CifarSet(ImageSet):
    """CIFAR-10 or CIFAR-100 (its 100 fine classes), read and checked by torchvision; all in memory."""

    def __init__(self, kind, root, train, download):
        datasets = load_torchvision().datasets
        maker = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[kind]
        try:
            data = maker(root, train=train, download=download)
        except RuntimeError as e:
            raise ValueError(f"{kind} in {root}: {str(e).splitlines()[0]} ('download: true' in the configuration "
                             "lets torchvision download it)")
        self.pixels, self._labels = data.data, np.asarray(data.targets, np.int32)
        self.class_names = list(data.classes)

    def __len__(self):
        return len(self.pixels)

    def identity(self, i0, i1):
        return {"sha256_pixels": hashlib.sha256(np.ascontiguousarray(self.pixels[i0:i1])).hexdigest()}

    def labels(self, i0, i1):
        return self._labels[i0:i1]

    def name(self, i):
        return f"image {i}"

    def read(self, i):
        return self.pixels[i]


# ---------------------------------------------------------------------------------------------- pixels

@functools.lru_cache
def frame_header(shape):
    """How a JPEG file of this shape (height, width, colours) tells of it."""
    return struct.pack(">HBHHB", 17, 8, *shape)


def decode(data, out=None):
    """An image file's bytes (or pixels as they are) -> uint8 (h, w, 3). Raises some exception if it is damaged.

    out: uint8 (h, w, 3), contiguous, which is the result if it has the image's size; its content may be lost otherwise.
    """
    if isinstance(data, np.ndarray):
        return data
    if simplejpeg is not None and data[:2] == b"\xff\xd8":
        try:
            # the frame header of this very size and three colours says all, and is found in less time than it is parsed
            if out is not None and data.find(frame_header(out.shape), 0, HEADER) > 0:
                if simplejpeg.decode_jpeg(data, buffer=out).shape == out.shape:
                    return out
            height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
            if height * width < Image.MAX_IMAGE_PIXELS and colours in ("YCbCr", "Gray", "RGB"):
                if out is not None and out.shape[:2] == (height, width):
                    simplejpeg.decode_jpeg(data, buffer=out)
                    return out
                return simplejpeg.decode_jpeg(data)
        except ValueError:
            pass                            # PIL is the judge of what is damaged
    with Image.open(io.BytesIO(data)) as image:
        if image.mode[0] not in "IF":
            return np.asarray(image.convert("RGB"))
        # grey of 16 bits, which convert() would clip at 255
        grey = np.asarray(image)
        if image.mode == "F" or grey.min() < 0 or grey.max() > 65535:
            raise ValueError(f"an image of 8 or 16 bits was expected, found pixels {grey.min():g} to {grey.max():g}")
        return np.repeat((grey >> 8).astype(np.uint8)[:, :, None], 3, axis=2)


class Preprocess:
    """uint8 (h, w, 3) or a file's bytes -> uint8 (crop, crop, 3): shorter side to `resize` (bilinear), centre crop.

    Sizes and places are those of torchvision's Resize and CenterCrop. Subtracting the mean and dividing by the
    standard deviation is left to the network's device.
    """

    def __init__(self, config):
        self.resize, self.crop = config["transforms"]["resize"], config["transforms"]["crop"]

    def __call__(self, data, out=None):
        """out: uint8 (crop, crop, 3), contiguous, or None: where the pixels may be put, if that saves a copy."""
        x = decode(data, out)
        if x is out and self.resize in (None, self.crop):
            return x
        h, w, _ = x.shape
        if self.resize is not None and min(h, w) != self.resize:
            new_h = self.resize if h <= w else int(self.resize * h / w)
            new_w = self.resize if w <= h else int(self.resize * w / h)
            if new_h * new_w > STRIP:
                return self._part_of_strip(x, new_h, new_w)
            x = np.asarray(Image.fromarray(x).resize((new_w, new_h), Image.BILINEAR))
            h, w = new_h, new_w
        c = self.crop
        if (h, w) == (c, c):
            return x
        if h < c or w < c:
            border = [(max(0, (c - s) // 2), max(0, (c - s + 1) // 2)) for s in (h, w)]
            x = np.pad(x, (*border, (0, 0)))
            h, w, _ = x.shape
        top, left = self._corner(h, w)
        return x[top:top + c, left:left + c]

    def _corner(self, h, w):
        """(top, left) of what is kept of an image of h x w."""
        return round((h - self.crop) / 2), round((w - self.crop) / 2)

    def _part_of_strip(self, x, new_h, new_w):
        """The same where the whole image, resized, would take too much memory."""
        (h, w, _), c = x.shape, self.crop
        top, left = self._corner(new_h, new_w)
        box = left * w / new_w, top * h / new_h, (left + c) * w / new_w, (top + c) * h / new_h
        return np.asarray(Image.fromarray(x).resize((c, c), Image.BILINEAR, box=box))


GRAVE = {errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EIO, errno.ESTALE, errno.ETIMEDOUT}


def raise_if_grave(e):
    """Raise errors that say nothing about the image: they may be gone at the next try, and must not be recorded."""
    if isinstance(e, MemoryError) or isinstance(e, OSError) and e.errno in GRAVE:
        raise e


READABLE, MISSING, DAMAGED = range(3)


def pixel_array(shape, buffer=None):
    """A uint8 array to decode images into, in `buffer` if there is one, which has UNALIGNED bytes more.

    Not at a multiple of 32 bytes: there libjpeg-turbo stores pixels past the caches, which takes it a quarter longer with images
    of 32 x 32, and the network has to fetch them from memory.
    """
    n = int(np.prod(shape))
    a = np.empty(n + UNALIGNED, np.uint8) if buffer is None else np.frombuffer(buffer, np.uint8)
    at = (UNALIGNED // 2 - a.ctypes.data) % UNALIGNED
    return a[at:at + n].reshape(shape)


class Batches:
    """Batch b of images i0..i1-1 -> (pixels uint8 (m, crop, crop, 3), state uint8 (m,), what is wrong with them).

    That is decode(b, read(b)): what computes and what waits for disks, for those who do them at the same time. Images that are
    MISSING or DAMAGED are black. The last batch has fewer images.
    """

    def __init__(self, images, preprocess, i0, i1, batchsize):
        self.images, self.preprocess = images, preprocess
        self.i0, self.i1, self.batchsize = i0, i1, batchsize

    def __len__(self):
        return -(-(self.i1 - self.i0) // self.batchsize)

    def read(self, b):
        """What the set has of each image of batch b, or the exception that says why it has nothing."""
        first = self.i0 + b * self.batchsize
        files = []
        for i in range(first, min(first + self.batchsize, self.i1)):
            try:
                files.append(self.images.read(i))
            except Exception as e:          # damaged files fail in many ways
                raise_if_grave(e)
                files.append(e.with_traceback(None))        # which would keep this batch in memory
        return files

    def decode(self, b, files, pixels=None):
        """The batch of what read(b) returned. pixels: array to fill, for as many images or more."""
        m, c = len(files), self.preprocess.crop
        pixels = pixel_array((m, c, c, 3)) if pixels is None else pixels[:m]
        state = np.zeros(m, np.uint8)
        faults = []
        for j, (file, out) in enumerate(zip(files, pixels)):
            if not isinstance(file, Exception):
                try:
                    x = self.preprocess(file, out)
                    if x is not out:
                        out[:] = x
                    continue
                except Exception as e:      # and so do decoders
                    raise_if_grave(e)
                    file = e
            out[:] = 0
            state[j] = MISSING if isinstance(file, Missing) else DAMAGED
            if state[j] == DAMAGED and not faults:
                name = self.images.name(self.i0 + b * self.batchsize + j)
                what = re.sub(r" ?<\S+ object at 0x\w+>", "", str(file))      # PIL's name of what it reads
                faults.append(f"{name}: {type(file).__name__} {' '.join(what.split())[:100]}")
        return pixels, state, faults
