"""What every script shares: arguments, one-line errors, progress, outputs that appear only when whole, records."""
import argparse
import contextlib
import errno
import fcntl
import glob
import hashlib
import json
import os
import platform
import re
import shutil
import sys
import tempfile
import time

from lowshot import __version__
from lowshot.machine import available_memory, cpus, peak_memory


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose help is the script's docstring, with defaults, and whose errors take one line."""

    class _Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
        def _get_help_string(self, action):
            # where there is no default, or the help tells it already, none is added
            none = action.default is None or action.default is False or action.default == "" or "(default" in action.help
            return action.help if none else super()._get_help_string(action)

    def __init__(self, doc):
        super().__init__(description=doc, formatter_class=self._Formatter)

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message} (see --help)\n")


def number(kind, low, high=None):
    """Argument type: an int or a finite float within [low, high]; an int below 2^31 if `high` is not given."""
    most = high if high is not None else 2 ** 31 - 1 if kind is int else sys.float_info.max

    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not {'a whole' if kind is int else 'a'} number")
        if not low <= value <= most:           # nor is NaN
            bound = " and finite" if kind is float and high is None else \
                f" and at most {most}" if high is not None or value > most else ""
            raise argparse.ArgumentTypeError(f"{text} must be at least {low}{bound}")
        return value
    return parse


def file_name(text):
    """Argument type: a name of a file; not an empty one, as a variable that is not set gives."""
    if not text:
        raise argparse.ArgumentTypeError("the name of a file was expected")
    return text


def run(main):
    """Run a script's main(): bad input and files become one line on stderr and exit status 1, without a traceback."""
    while (fd := os.open(os.devnull, os.O_RDWR)) <= 2:     # a file of ours would get what libraries print
        pass
    os.close(fd)
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:          # closed by whoever started this
            setattr(sys, name, open(os.devnull, "w"))
        with contextlib.suppress(AttributeError):       # a test's
            getattr(sys, name).reconfigure(errors="backslashreplace")       # names of files may be any bytes
    try:
        status = main()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 1
    except Exception as e:
        if os.environ.get("LOWSHOT_TRACEBACK"):
            raise
        text = " ".join(str(e).split())
        if isinstance(e, MemoryError) and not text or "can't start new thread" in text:
            text = f"{text or 'out of memory'} ({size(available_memory())} are free; ulimit -a tells of limits)"
        # what remains is input that nobody thought of, or an error of ours
        elif not isinstance(e, (ValueError, OSError, MemoryError, ImportError)):
            text = f"{type(e).__name__}: {text[:300]} (not foreseen: LOWSHOT_TRACEBACK=1 shows where)"
        print(f"{os.path.basename(sys.argv[0])}: error: {text or type(e).__name__}", file=sys.stderr)
        status = 1
    sys.exit(status)


def log(*words):
    """Print one line at once, also into a pipe."""
    try:
        print(*words, flush=True)
    except OSError as e:
        raise OSError(e.errno, e.strerror, "standard output")


def provenance(args):
    """What made a result: version, machine and arguments, as a JSON-ready dict."""
    return {"script": os.path.basename(sys.argv[0]), "version": __version__, "python": platform.python_version(),
            "cpus": cpus(), "omp_num_threads": os.environ.get("OMP_NUM_THREADS", ""),
            "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "arguments": dict(vars(args))}


def print_header(args, **more):
    """First line of a run: version, threads, arguments, and what the script adds (predicted memory ...)."""
    p = provenance(args)
    words = [f"{k}={v}" for k, v in {**p["arguments"], **more}.items()]
    log(f"{p['script']} {p['version']}, {p['cpus']} CPUs: {' '.join(words)}")


def within_memory(predicted, least):
    """Bytes that a process takes which would take `predicted`, but makes do with what it can get, down to `least`."""
    return max(least, min(predicted, peak_memory() + available_memory()))


def warn_of_memory(needed):
    """A line where this process will need more bytes than it can get."""
    if needed - peak_memory() > available_memory():
        log(f"warning: up to {size(needed)} of memory needed, {size(available_memory())} available")


class Progress:
    """Done/total, elapsed and remaining time on stderr, for anything that takes more than a few seconds.

        with Progress(n, "images") as progress:
            for ...: progress.update(done)
    """

    def __init__(self, total, what, start=0):
        self.total, self.what, self.start, self.done = total, what, start, start
        self.t0 = time.time()
        self.terminal = sys.stderr.isatty()
        self.period = 0.5 if self.terminal else 10.0
        self.next = self.t0 + (2.0 if self.terminal else 5.0)
        self.shown = False

    def update(self, done):
        self.done = done
        now = time.time()
        if now >= self.next:
            self.next = now + self.period
            self._show(now)

    def advance(self, by=1):
        self.update(self.done + by)

    def _show(self, now):
        elapsed = now - self.t0
        fresh = self.done - self.start
        left = elapsed * (self.total - self.done) / fresh if fresh else float("nan")
        line = f"  {self.done}/{self.total} {self.what}, {clock(elapsed)} elapsed, {clock(left)} left"
        sys.stderr.write(f"\r{line}\x1b[K" if self.terminal else line + "\n")
        sys.stderr.flush()
        self.shown = True

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        if self.shown:
            self._show(time.time())
            if self.terminal:
                sys.stderr.write("\n")


@contextlib.contextmanager
def show_progress():
    """A function of (what, done, total) that shows one line of progress per kind of work."""
    current = [None]

    def close():
        if current[0] is not None:
            current[0].__exit__(None, None, None)

    def progress(what, done, total):
        if current[0] is None or (current[0].what, current[0].total) != (what, total) or done < current[0].done:
            close()
            current[0] = Progress(total, what)
        current[0].update(done)

    try:
        yield progress
    finally:
        close()


def silent(*words):
    """Takes what progress() or log() do, for those who want neither."""


def clock(seconds):
    """Seconds as 4.2s, 3m05s or 2h07m."""
    if seconds != seconds:
        return "?"
    if seconds < 60:
        return f"{seconds:.1f}s"
    if seconds < 3600:
        return f"{int(seconds) // 60}m{int(seconds) % 60:02d}s"
    return f"{int(seconds) // 3600}h{int(seconds) % 3600 // 60:02d}m"


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


def file_identities(paths):
    """What tells whether files are still the same, for those that are there: name, size, time of last change in nanoseconds, and
    a digest of some of their bytes (of other features of as many images, unpacked with the same times, say)."""
    found = [(path, os.stat(path)) for path in paths if os.path.exists(path)]
    return [[os.path.basename(path), s.st_size, s.st_mtime_ns, digest_of_some(path)] for path, s in found]


def digest_of_some(path, pieces=16):
    """A digest of pieces of a file all over it, hexadecimal."""
    digest, nbytes, piece = hashlib.sha256(), os.path.getsize(path), 4096
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
    with open(path, encoding="utf-8") as f:
        try:
            return json.load(f, object_pairs_hook=_without_repeats)
        except (ValueError, RecursionError) as e:
            raise ValueError(f"{path} is not valid JSON: {e}")


def read_yaml(path):
    """Read YAML of plain values; a file that is not YAML, or has a key twice, is a ValueError that names it."""
    import yaml

    class Loader(yaml.SafeLoader):
        def construct_mapping(self, node, deep=False):
            _without_repeats((key.value, None) for key, _ in node.value if isinstance(key, yaml.ScalarNode))
            return super().construct_mapping(node, deep)

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
    processes of this machine."""
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


def as_text(value):
    """A value as it stands on a command line: lists with commas, whole floats as whole numbers."""
    if isinstance(value, (list, tuple)):
        return ",".join(map(as_text, value))
    return repr(value).removesuffix(".0") if isinstance(value, float) else str(value)


def size(nbytes):
    """Bytes as 3.21 GB (10^9) or 12.3 MB."""
    return f"{nbytes / 1e9:.2f} GB" if nbytes >= 1e9 else f"{nbytes / 1e6:.1f} MB"
