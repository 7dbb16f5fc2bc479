"""Files: outputs that appear only when whole, locks, what tells whether a file is the same, and JSON and YAML as data."""
import contextlib
import errno
import fcntl
import glob
import hashlib
import json
import os
import re
import shutil
import tempfile
import time

from lowshot.script import log, size


def _temporary(path, process):
    folder, name = os.path.split(os.path.abspath(path))
    stem, extension = os.path.splitext(name)
    return os.path.join(folder, f".{stem}.{process}.tmp{extension}")


@contextlib.contextmanager
def whole(path):
    """Yield a temporary name beside `path`; rename to `path` if the block ends well, remove it otherwise.

    So a file under its own name is always complete. The temporary name keeps the extension and ends in .tmp before it. Where
    `path` is a link, the file that it leads to is written.
    """
    path = os.path.realpath(path)
    remove_left_behind(path, 86400)     # others may be writing the same
    temporary = _temporary(path, os.getpid())
    folder = os.path.dirname(temporary)
    os.makedirs(folder, exist_ok=True)
    try:
        with full_disk_named(path):
            open(temporary, "wb").close()       # where that fails, libraries would say so in their own ways
            yield temporary
            with open(temporary, "rb+") as f:
                os.fsync(f.fileno())
            os.replace(temporary, path)
    finally:
        remove(temporary)


NO_ROOM = errno.ENOSPC, errno.EDQUOT, errno.EFBIG


@contextlib.contextmanager
def full_disk_named(path):
    """Where the block fails for want of space and does not say so of a file, an OSError names `path`."""
    try:
        yield
    except (OSError, RuntimeError) as e:
        # some libraries tell neither which file nor why
        if getattr(e, "filename", None) is None and (getattr(e, "errno", None) in NO_ROOM or re.search(
                r"No space|File too large|requested and .* written|fwrite|faiss::write|inline_container", str(e))):
            text, free = " ".join(str(e).split())[:200], shutil.disk_usage(os.path.dirname(os.path.abspath(path))).free
            raise OSError(f"{path} could not be written, the disk has {size(free)} free ({text})") from e
        raise


def check_regular(path):
    """ValueError where something else than a file stands under a file's name: of some devices and pipes reading never ends."""
    if os.path.exists(path) and not os.path.isfile(path):
        raise ValueError(f"{path} is no regular file")


def file_identities(paths):
    """What tells whether files are still the same, for those that are there: name, size, time of last change in nanoseconds, and
    a digest of some of their bytes (of other features of as many images, unpacked with the same times, say)."""
    found = [(path, os.stat(path)) for path in paths if os.path.exists(path)]
    return [[os.path.basename(path), s.st_size, s.st_mtime_ns, digest_of_some(path)] for path, s in found]


def digest_of_some(path):
    """A digest of pieces of a file all over it, hexadecimal."""
    check_regular(path)
    digest, nbytes, pieces, piece = hashlib.sha256(), os.path.getsize(path), 16, 4096
    with open(path, "rb", buffering=0) as f:
        for i in range(pieces):
            digest.update(os.pread(f.fileno(), piece, max(0, nbytes - piece) * i // (pieces - 1)))
    return digest.hexdigest()[:32]


def changed_file(paths, identities):
    """The name of one of the files that is not as the file_identities() of a record say; None if there is none."""
    return next((f[0] for f in file_identities(paths) if not isinstance(identities, list) or f not in identities), None)


def remove_left_behind(path, seconds=0):
    """Remove what processes that were killed while they wrote `path` left of it, if it is so many seconds old."""
    real = os.path.realpath(path)
    for temporary in glob.glob(_temporary(glob.escape(real), "*")):
        if temporary not in [_temporary(real, process) for process in re.findall(r"\.(\d+)\.tmp", temporary)]:
            continue            # of x.1.npy, where `path` is x.npy
        with contextlib.suppress(OSError):      # another user's, say
            if not seconds or os.path.getmtime(temporary) <= time.time() - seconds:
                os.unlink(temporary)


def allocate(path, nbytes=None):
    """Reserve the disk space of a file before it is written through a memory map: on a full disk that is an OSError now,
    and would end the process without a word later. The file is made anew, with nbytes of zeros; or it is there, and is
    as long as it will be, if nbytes is None."""
    with open(path, "rb+" if nbytes is None else "wb") as f:
        reserve(f.fileno(), os.path.getsize(path) if nbytes is None else nbytes, path)


def reserve(fd, nbytes, path):
    """allocate() for an open file; path: what errors name."""
    try:
        if nbytes:
            os.posix_fallocate(fd, 0, nbytes)
    except OSError as e:
        raise OSError(e.errno, e.strerror, path) from e


def write_text(path, text):
    """Write text whole or not at all."""
    with whole(path) as temporary, open(temporary, "w") as f:
        f.write(text)


def write_json(path, content):
    """Write JSON whole or not at all."""
    try:
        text = json.dumps(content, indent=1, allow_nan=False)
    except ValueError as e:
        raise ValueError(f"{path}: a number to be written is NaN or infinite ({e})")
    write_text(path, text + "\n")


def read_note(path):
    """What a note beside a file says, a dict: {} where there is none that can be read."""
    with contextlib.suppress(OSError, ValueError):
        note = read_json(path)
        return note if isinstance(note, dict) else {}
    return {}


def file_sha256(path):
    """SHA-256 of a file, hexadecimal."""
    check_regular(path)
    digest = hashlib.sha256()
    with open(path, "rb") as f:
        while data := f.read(1 << 20):
            digest.update(data)
    return digest.hexdigest()


def _without_repeats(pairs):
    """A dict of (key, value) pairs; ValueError for a key that stands there twice, of which parsers keep the last one."""
    found = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"the key {key!r} stands there twice")
        found[key] = value
    return found


def read_json(path):
    """Read JSON; a file that is not JSON, or has a key twice, is a ValueError that names it."""
    check_regular(path)
    with open(path, encoding="utf-8") as f:
        try:
            return json.load(f, object_pairs_hook=_without_repeats)
        except (ValueError, RecursionError) as e:
            raise ValueError(f"{path} is not valid JSON: {e}")


MOST_NODES = 1_000_000


def _nodes(node, known):
    """How many nodes there are below a YAML node, itself included, where aliases are written out. known: {id: number}."""
    if id(node) not in known:
        known[id(node)] = 1
        children = node.value if isinstance(getattr(node, "value", None), list) else []
        for child in children:
            known[id(node)] += sum(_nodes(part, known) for part in (child if isinstance(child, tuple) else [child]))
    return known[id(node)]


def read_yaml(path):
    """Read YAML of plain values; a file that is not YAML, or has a key twice, is a ValueError that names it."""
    check_regular(path)
    import yaml

    class Loader(yaml.SafeLoader):
        def construct_mapping(self, node, deep=False):
            _without_repeats((key.value, None) for key, _ in node.value if isinstance(key, yaml.ScalarNode))
            return super().construct_mapping(node, deep)

        def get_single_node(self):
            node = super().get_single_node()
            if _nodes(node, {}) > MOST_NODES:       # a few aliases within each other can stand for more than memory holds
                raise ValueError(f"it has more than {MOST_NODES} values, those that aliases stand for included")
            return node

    with open(path, encoding="utf-8") as f:
        try:
            return yaml.load(f, Loader)
        except (yaml.YAMLError, ValueError, RecursionError) as e:
            raise ValueError(f"{path} is not valid YAML: {' '.join(str(e).split())}")


def remove(path):
    """Remove a file that may not be there."""
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)


LONGEST_NAME = 220          # of outputs: systems have names of 255 bytes, and what is written first has longer ones
NO_LOCKS = errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP     # as some parallel file systems of clusters answer


@contextlib.contextmanager
def exclusive(path, wait=None):
    """While the block runs no other process can enter one for the same path. Ends with the process, however it ends, and is
    not passed on to processes it forks. Where another process is in it that is a ValueError; or, if `wait` is given, wait() is
    called, and it is waited for. Of a link what it leads to counts. Where the file system has no locks, this holds for the
    processes of this machine. What processes that were killed while they wrote `path` left of it is removed."""
    real = os.path.realpath(path)
    os.makedirs(os.path.dirname(real), exist_ok=True)
    name = real + ".lock"
    with contextlib.ExitStack() as stack:
        while True:
            lock = stack.enter_context(open(name, "w", opener=_open_no_link))
            with contextlib.suppress(PermissionError):      # of all who may write there, should this be killed
                os.fchmod(lock.fileno(), os.stat(os.path.dirname(name)).st_mode & 0o666)
            try:
                fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as e:
                if e.errno in NO_LOCKS and name == real + ".lock":
                    remove(name)
                    digest = hashlib.sha256(os.fsencode(real)).hexdigest()[:32]
                    name = os.path.join(tempfile.gettempdir(), f"lowshot-{os.getuid()}-{digest}.lock")
                    log(f"note: the file system of {path} has no locks: no other machine may write it now")
                    continue
                if e.errno not in (errno.EACCES, errno.EAGAIN):
                    raise OSError(e.errno, f"{name} cannot be locked: {e.strerror}")
                if not wait:
                    raise ValueError(f"another process is writing {path}")
                wait()
                fcntl.lockf(lock, fcntl.LOCK_EX)
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(lock.fileno()), os.stat(lock.name)):
                    break
            # the process that had the lock has just removed the file: this is a lock on nothing
        try:
            remove_left_behind(path)
            yield
        finally:
            remove(lock.name)


def _open_no_link(path, flags):
    """In a folder that all may write to, a link under the lock's name could lead to any file."""
    return os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)


def check_outputs(*paths, inputs=()):
    """ValueError or OSError where a file of one of these names cannot be written, two are the same, or one is among the
    inputs: before the work, not after it."""
    named, read = set(), {os.path.realpath(path) for path in filter(None, inputs)}
    for path in filter(None, paths):
        real = os.path.realpath(path)
        if real in named:
            raise ValueError(f"{path} is named for two outputs")
        if real in read:
            raise ValueError(f"{path} is an input, which the output would replace")
        named.add(real)
        if os.path.isdir(path) or path.endswith(os.sep):
            raise ValueError(f"{path} is a directory: the name of a file was expected")
        if len(os.fsencode(os.path.basename(real))) > LONGEST_NAME:
            raise ValueError(f"{path}: the name is longer than {LONGEST_NAME} bytes, which leaves no room for temporary names")
        if os.path.exists(path) and not os.path.isfile(path):
            raise ValueError(f"{path} is no regular file: it would be replaced by one")
        folder = os.path.dirname(real)
        if os.path.islink(path) and not os.path.isdir(folder):      # of a disk that is not mounted, say
            raise OSError(f"{path} leads to {real}, and {folder} is not there")
        while not os.path.exists(folder):
            folder = os.path.dirname(folder)
        if not os.path.isdir(folder) or not os.access(folder, os.W_OK | os.X_OK):
            raise OSError(f"{path} cannot be written: {folder} is {'not writable' if os.path.isdir(folder) else 'a file'}")
