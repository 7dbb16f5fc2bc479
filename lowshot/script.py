"""What every script shares: arguments, one-line errors, progress, what is told of a run."""
import argparse
import contextlib
import os
import platform
import sys
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
        self.t0 = time.monotonic()
        self.terminal = sys.stderr.isatty()
        self.period = 0.5 if self.terminal else 10.0
        self.next = self.t0 + (2.0 if self.terminal else 5.0)
        self.shown = False

    def update(self, done):
        self.done = done
        now = time.monotonic()
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
            self._show(time.monotonic())
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


def as_text(value):
    """A value as it stands on a command line: lists with commas, whole floats as whole numbers."""
    if isinstance(value, (list, tuple)):
        return ",".join(map(as_text, value))
    return repr(value).removesuffix(".0") if isinstance(value, float) else str(value)


def size(nbytes):
    """Bytes as 3.21 GB (10^9) or 12.3 MB."""
    return f"{nbytes / 1e9:.2f} GB" if nbytes >= 1e9 else f"{nbytes / 1e6:.1f} MB"
