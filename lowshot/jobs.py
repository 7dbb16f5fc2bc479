"""Runs of scripts whose results are records: whether a record is complete, and running what has none, many at a time."""
import contextlib
import functools
import itertools
import math
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field

from lowshot import KEPT_TO_QUOTA
from lowshot.files import changed_file, exclusive, full_disk_named, read_note
from lowshot.machine import cpus, end_with_parent, named_threads
from lowshot.script import as_text, clock, log

CHECKOUT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


@dataclass
class Job:
    """One run of a script: its name, the arguments that make it, and the record it writes.

    record holds the path; inputs are the files that the result depends on, and that a record must name as they are; lacks
    says what of these is missing.
    """
    name: str
    script: str
    arguments: dict
    record: str
    inputs: list = field(default_factory=list)
    lacks: list = field(default_factory=list)

    @property
    def log(self):
        return os.path.splitext(self.record)[0] + ".log"

    def command(self):
        """The command line as a list of words."""
        words = [short_path(sys.executable), short_path(os.path.join(CHECKOUT, self.script))]
        for name, value in self.arguments.items():
            words += ["--" + name, as_text(value)]
        return [*words, "--record", self.record]

    def result(self):
        """The record if it is complete, of these arguments and of the data as they are; None otherwise."""
        record = read_note(self.record)
        if not record.get("complete") or not isinstance(record.get("arguments"), dict):
            return None
        if not all(as_text(record["arguments"].get(k)) == as_text(v) for k, v in self.arguments.items()):
            return None
        if not has_figures(record, self):
            return None
        return None if changed_file(self.inputs, record.get("files")) else record


def has_figures(record, job):
    """Whether a record holds the accuracies that a job reports, after each number of iterations, by logreg.py at each point, and
    what they took."""
    points, iterations = reported(job)
    if not all(is_number(record.get(key)) for key in ("seconds", "peak_memory")):
        return False
    unreadable = record.get("unreadable", [0, 0])       # of labelled and test images
    if not isinstance(unreadable, list) or [type(count) for count in unreadable] != [int, int]:
        return False
    notes = record.get("notes", [])
    if not isinstance(notes, list) or not all(isinstance(note, str) for note in notes):
        return False
    runs = [record] if points is None else record.get("runs")
    if not isinstance(runs, list) or not all(isinstance(r, dict) and isinstance(r.get("results"), list) for r in runs):
        return False
    if points is not None and [(r.get("lr"), r.get("wd")) for r in runs] != points:
        return False
    return all([r.get("iteration") if isinstance(r, dict) else None for r in run["results"]] == iterations
               and all(is_number(r.get(key)) and 0 <= r[key] <= 1 for r in run["results"] for key in ("top5", "top5_novel"))
               for run in runs)


def reported(job):
    """The points (lr, wd) that a job trains, None of diffusion.py, and the numbers of iterations after which it reports."""
    a = job.arguments
    if job.script != "logreg.py":
        return None, list(range(a["niter"] + 1))
    lr, wd = (value if isinstance(value, list) else [value] for value in (a["lr"], a["wd"]))
    every = a["evalevery"] or a["maxiter"]
    return list(itertools.product(lr, wd)), [*range(every, a["maxiter"], every), a["maxiter"]]


def is_number(value):
    return type(value) in (int, float) and math.isfinite(value)


def short_path(path):
    """Relative to the checkout where it is below that and commands are printed there."""
    relative = os.path.relpath(path)
    return path if relative.startswith("..") or os.getcwd() != CHECKOUT else relative


def run_jobs(jobs, parallel, environment=os.environ):
    """Run the jobs whose record is not complete, `parallel` at a time; raise ValueError naming those that failed.

    Each job's output goes to its log file, its command is printed. parallel = 0 prints the commands only, to stdout.
    Several drivers that are given the same jobs, on machines that share the folder as well, divide them: who runs a job
    holds the lock of its log.
    """
    todo = [job for job in jobs if job.result() is None]
    told = f"{len(jobs)} job{'s' if len(jobs) > 1 else ''}, {len(jobs) - len(todo)} of them complete"
    if parallel:
        log(told + (f", {parallel} at a time" if todo and parallel > 1 else ""))
    else:
        print(told, file=sys.stderr)
    if not todo:
        return
    replaced = sum(os.path.exists(job.record) for job in todo)
    if replaced and parallel:
        log(f"note: {replaced} of these jobs have records of other arguments or data, or incomplete ones, which are replaced")
    added = {"DDIR": environment["DDIR"]}
    if parallel > 1 and (KEPT_TO_QUOTA or not named_threads(environment)):
        added["OMP_NUM_THREADS"] = str(max(1, cpus() // min(parallel, len(todo))))
    prefix = " ".join(f"{k}={shlex.quote(v)}" for k, v in added.items())
    if parallel == 0:
        for job in todo:
            log(prefix, shlex.join(job.command()))
        return
    if all(job.lacks for job in todo):
        raise ValueError(f"none of these jobs can run: {todo[0].lacks[0]}")
    os.makedirs(os.path.dirname(todo[0].log), exist_ok=True)
    log(f"output of each job: {os.path.join(os.path.dirname(todo[0].log), 'NAME.log')}")
    failed = Driver(todo, prefix, {**environment, **added}).run(parallel)
    if failed:
        raise ValueError(f"{len(failed)} of {len(todo)} jobs failed: {', '.join(failed)} "
                         "(the same command runs these again)")


class Driver:
    """Runs jobs, each as a process; prefix stands before the commands that are printed."""

    PATIENCE = 1        # seconds between looks at the jobs of other drivers

    def __init__(self, jobs, prefix, environment):
        self.jobs, self.prefix, self.environment = jobs, prefix, environment
        self.waiting, self.elsewhere = list(jobs), []
        self.running = {}       # process -> its job and the lock of this
        self.met = set()        # names of jobs that other drivers ran
        self.done, self.failed, self.t0 = 0, {}, time.monotonic()       # failed: names of jobs -> why

    def run(self, parallel):
        """Names of the jobs that failed, in their order."""
        # so that jobs end with this process; an exception at any moment might leave a lock of subprocess behind
        ended = []
        previous = signal.signal(signal.SIGTERM, lambda *_: ended.append(True))
        looked, told = time.monotonic(), False
        try:
            while self.waiting or self.elsewhere or self.running:
                if self.elsewhere and not (self.waiting or self.running or told):
                    log(f"  waiting for other drivers, which run {len(self.elsewhere)} of the jobs")
                    told = True
                if not self.waiting and time.monotonic() - looked > self.PATIENCE:
                    self.waiting, self.elsewhere, looked = self.elsewhere, [], time.monotonic()
                while self.waiting and len(self.running) < parallel:
                    self._start(self.waiting.pop(0))
                time.sleep(0.02)
                if ended:
                    sys.exit(143)
                for process in [p for p in self.running if p.poll() is not None]:
                    self._finish(process)
        finally:
            for process in self.running:
                process.terminate()
            for process, (_, lock) in self.running.items():
                process.wait()
                lock.close()
            signal.signal(signal.SIGTERM, previous)
        return [job.name for job in self.jobs if job.name in self.failed]

    def _start(self, job):
        with contextlib.ExitStack() as lock:
            try:
                lock.enter_context(exclusive(job.log))
                output = lock.enter_context(open_log(job.log))
            except ValueError:          # until that driver is done with it, or is killed
                self.elsewhere.append(job)
                self.met.add(job.name)
                return
            except OSError as e:        # another user's, say
                self._fail(job, e)
                return
            if job.result() is not None:
                self._count(f"{job.name}: by another driver")
                return
            if job.name in self.met and last_line(job.log).startswith("FAILED"):
                self._fail(job, f"for another driver: {last_line(job.log)}")
                return
            log(f"[{self.jobs.index(job) + 1}/{len(self.jobs)}] {self.prefix} {shlex.join(job.command())}")
            output.truncate(0)
            try:
                process = subprocess.Popen(job.command(), stdout=output, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
                                           env=self.environment, preexec_fn=functools.partial(end_with_parent, os.getpid()))
            except (OSError, subprocess.SubprocessError) as e:         # for want of memory, or of files that may be open
                print(f"could not be started: {e}", file=output)         # another driver may still try it
                self._fail(job, f"to start: {e}")
                return
            self.running[process] = job, lock.pop_all()

    def _finish(self, process):
        job, lock = self.running.pop(process)
        with lock:
            if process.returncode or job.result() is None:
                why = ended_how(process.returncode)
                try:
                    said = last_line(job.log)
                    with full_disk_named(job.log), open(job.log, "a") as output:
                        print(f"FAILED ({why})", file=output)
                except OSError as e:
                    said = e
                self._fail(job, f"({why}): {said}")
            else:
                self._count()

    def _fail(self, job, why):
        first = next((name for name, other in self.failed.items() if other == str(why)), None)
        self.failed[job.name] = str(why)
        log(f"  {job.name} FAILED {why if first is None else f'as {first}'}")
        self._count()

    def _count(self, how=""):
        self.done += 1
        elapsed = time.monotonic() - self.t0
        left = elapsed / self.done * (len(self.jobs) - self.done)
        log(f"  {self.done}/{len(self.jobs)} jobs done{how and f' ({how})'}, {clock(elapsed)} elapsed, about {clock(left)} left")


def ended_how(status):
    """Words for a process that failed, by its exit status: of signals what may be behind them, as it could not say so itself."""
    if status < 0:
        why = {signal.SIGKILL: ", for want of memory?", signal.SIGSEGV: ", for a limit of ulimit -v?"}.get(-status, "")
        return f"ended by signal {-status}, {signal.strsignal(-status)}{why}"
    return f"status {status}" if status else "no complete record"


def open_log(path):
    """A log file to go on with. One that another user left is replaced: who may write is a matter of the folder."""
    try:
        return open(path, "a")
    except PermissionError:
        os.unlink(path)
        return open(path, "a")


def last_line(path):
    """The last line of a log file that is not empty."""
    with open(path, errors="replace") as f:
        lines = [line.strip() for line in re.split(r"[\r\n]", f.read()) if line.strip()]
    return lines[-1] if lines else "no output"


def records_of(jobs, phase):
    """Records of all jobs, or ValueError naming the first one that is missing."""
    records = [job.result() for job in jobs]
    check_none_lacks([job for job, record in zip(jobs, records) if record is None], jobs, phase)
    return records


def check_none_lacks(without, jobs, phase):
    """ValueError where some of the jobs, `without`, have no record."""
    if without:
        raise ValueError(f"{len(without)} of {len(jobs)} jobs have no complete record of this data and these "
                         f"arguments, {without[0].name} for one ({without[0].script}): run phase {phase} first")
