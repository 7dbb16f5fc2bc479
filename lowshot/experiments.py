"""The experiments behind a table: which runs they consist of, running them, choosing parameters by validation.

An experiment file (configs/paper.yaml) holds the grid. Records go to $DDIR/logs/{logreg,diffusion}/{experiment}/.
run_logreg.bash and run_diffusion.bash run all this, one phase at a time (phases.py).
"""
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

import numpy as np

from lowshot import KEPT_TO_QUOTA
from lowshot.files import changed_file, exclusive, file_identities, full_disk_named, read_json, read_note, read_yaml
from lowshot.layout import command_for
from lowshot.machine import cpus, end_with_parent, named_threads
from lowshot.script import as_text, clock, log

SYSTEMS = ("logreg", "diffusion")
LEVELS = {"logreg": 1, "diffusion": 2}      # of parameters and figures: {n: {...}}, {nbg: {n: {...}}}, keys are text
SETTINGS = {"logreg.py": ("mom", "precision"), "diffusion.py": ("k", "dim")}    # that parameters are chosen for
CHECKOUT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


class Experiment:
    """An experiment file: numbers of labels, seeds, and one grid of parameters per system.

        e = Experiment("configs/paper.yaml")
        e.nlabeled, e.seeds                     lists of int
        e.logreg                                {"lr": [..], "wd": [..], "batchsize": [..], "maxiter": int, and what the file
                                                need not name: "mom", "evalevery", "precision"}
        e.diffusion                             {"nbg": [..], "k": int, "niter": int, and the same way "dim", "niter_test"}
        e.published                             {} or the content of a file like configs/paper_results.json
        e.replaced                              what the environment has in place of the file's lists, as text, or ""

    NLABELED, SEEDS and NBG in `environment` replace these lists (numbers separated by spaces or commas). The grids of
    systems that are not among `systems` may be missing: then e has no such attribute.
    """

    KEYS = {"logreg": ({"lr", "wd", "batchsize", "maxiter"}, {"mom": 0.9, "evalevery": 500, "precision": "float32"}),
            "diffusion": ({"nbg", "k", "niter"}, {"dim": 256, "niter_test": 0})}
    LISTS = {"nlabeled", "seeds", "lr", "wd", "batchsize", "nbg"}
    REALS = {"lr", "wd", "mom"}
    CHOICES = {"precision": ("float32", "bfloat16")}
    LEAST = {"nlabeled": 1, "batchsize": 1, "maxiter": 1, "k": 1, "dim": 1}
    MOST = {"seeds": 2 ** 32 - 1, "mom": 1}

    def __init__(self, path, environment=os.environ, systems=SYSTEMS):
        if not os.path.exists(path):
            raise ValueError(f"no experiment file {path}")
        content = read_yaml(path)
        if not isinstance(content, dict):
            raise ValueError(f"{path} is not an experiment file: nlabeled, seeds, logreg, diffusion are expected")
        self.path, self.name = path, os.path.splitext(os.path.basename(path))[0]
        unknown = set(content) - {"nlabeled", "seeds", "published", *SYSTEMS}
        if unknown:
            raise ValueError(f"{path}: unknown entry {min(map(str, unknown))!r}: nlabeled, seeds, published, "
                             f"{', '.join(SYSTEMS)} are known")
        diffusion, replaced = content.get("diffusion"), []
        for name, entries in (("NLABELED", content), ("SEEDS", content), ("NBG", diffusion)):
            if environment.get(name, "").strip() and isinstance(entries, dict) and name.lower() in entries:
                key, given = name.lower(), numbers(environment[name], name)
                if self._value(given, key, f"as {name}={environment[name]!r} says, ") != entries[key]:
                    replaced.append(f"{name}={as_text(given)}")
                entries[key] = given
        self.replaced = " ".join(replaced)
        self.nlabeled, self.seeds = (self._value(content.get(key), key, "") for key in ("nlabeled", "seeds"))
        for system in (s for s in SYSTEMS if s in systems or s in content):
            required, optional = self.KEYS[system]
            grid = content.get(system)
            if grid is None:
                raise ValueError(f"{path} has no section {system}")
            if not isinstance(grid, dict) or required - set(grid) or set(grid) - required - set(optional):
                unknown = min(map(str, set(grid) - required - set(optional)), default=None) if isinstance(grid, dict) else None
                raise ValueError(f"{path}: {system} {f'has an unknown entry {unknown!r}: it ' if unknown else ''}must have the "
                                 f"entries {', '.join(sorted(required))} and may have {', '.join(sorted(optional))}")
            found = {key: self._value(grid[key], key, system + ": ") for key in grid}
            setattr(self, system, {**found, **{key: optional[key] for key in optional if key not in found}})
        published = content.get("published")
        if published is not None and not isinstance(published, str):
            raise ValueError(f"{path}: published must be the name of a JSON file, found {published!r}")
        self.published_path = published and os.path.join(os.path.dirname(path), published)
        if published and not os.path.exists(self.published_path):
            raise ValueError(f"{path}: published is {published}, and {self.published_path} does not exist")
        self.published = read_json(self.published_path) if published else {}
        if not isinstance(self.published, dict) or not are_figures(self.published):
            raise ValueError(f"{self.published_path} does not hold published figures: see configs/paper_results.json")

    def _value(self, value, key, where):
        if key in self.CHOICES:
            if value not in self.CHOICES[key]:
                raise ValueError(f"{self.path}: {where}{key} must be {' or '.join(self.CHOICES[key])}, found {value!r}")
            return value
        values = value if key in self.LISTS else [value]
        kinds = (int, float) if key in self.REALS else (int,)
        if (not isinstance(values, list) or not values or len(set(map(as_text, values))) < len(values)
                or not all(type(v) in kinds and self.LEAST.get(key, 0) <= v <= self.MOST.get(key, sys.float_info.max)
                           for v in values)):
            what = "a list of different numbers" if key in self.LISTS else "a number"
            most = f" and <= {self.MOST[key]}" if key in self.MOST else ""
            raise ValueError(f"{self.path}: {where}{key} must be {what} >= {self.LEAST.get(key, 0)}{most}, found {value!r}"
                             + " (YAML takes 1e-3 for text: 0.001 or 1.0e-3)" * ("e-" in str(value)))
        return value

    def folder(self, system, ddir):
        return ddir.log(system, self.name)

    def parameters_path(self, system, ddir):
        return os.path.join(self.folder(system, ddir), "parameters.json")


def are_figures(published):
    """Whether published figures are as in configs/paper_results.json, where there are any."""
    def are(figures):
        return all(isinstance(v, list) and len(v) == 2 and all(map(is_number, v)) and v[1] >= 0
                   for v in (figures.get("all"), figures.get("novel")))

    return isinstance(published.get("parameters", {}), dict) and all(
        is_tree(published.get(system, {}), LEVELS[system], are) for system in SYSTEMS)


def is_tree(tree, levels, is_entry):
    """Whether these are dicts within dicts of so many levels, and is_entry() of all of the last."""
    return isinstance(tree, dict) and (
        all(is_tree(branch, levels - 1, is_entry) for branch in tree.values()) if levels else is_entry(tree))


def entry_of(tree, nbg, n):
    """The entry of such a tree for n labels and, of diffusion, nbg background images (None of logreg); {} if there is none."""
    return (tree if nbg is None else tree.get(str(nbg), {})).get(str(n), {})


def numbers(text, name):
    """[1, 2, 5] from "1 2 5" or "1,2,5"; name is the variable that held it."""
    words = re.split(r"[\s,]+", text.strip())
    if not all(re.fullmatch(r"0|[1-9]\d*", w) for w in words):         # 1,000 is one number to some
        raise ValueError(f"{name}={text!r} is not a list of whole numbers")
    return list(dict.fromkeys(map(int, words)))


# ------------------------------------------------------------------------------------------------------------- jobs

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


def make_job(e, system, ddir, name, arguments, *more):
    """more: functions that return lists of further inputs, or raise ValueError where these are missing."""
    inputs, lacks = [ddir.train, ddir.val], []
    for find in (lambda: [ddir.label_idx()], *more):
        try:
            inputs += find()
        except ValueError as error:
            lacks.append(str(error))
    lacks = [f"{path} does not exist: {command_for(path, arguments.get('dim', 256))} makes it"
             for path in inputs if not os.path.exists(path)] + lacks
    return Job(name, f"{system}.py", arguments, os.path.join(e.folder(system, ddir), name + ".json"), inputs, lacks)


def diffusion_job(e, ddir, name, mode, nbg, nlabeled, seed, niter):
    k, dim = e.diffusion["k"], e.diffusion["dim"]
    arguments = {"mode": mode, "nlabeled": nlabeled, "seed": seed, "nbg": nbg, "k": k, "niter": niter, "dim": dim}
    return make_job(e, "diffusion", ddir, name, arguments, lambda: ddir.check_dim(dim) or [ddir.pca(dim)],
                    lambda: [ddir.raw(dim)] if nbg else [], lambda: ddir.find_graph(nbg, k, dim)[:2] if nbg else [],
                    lambda: [path for path in [ddir.index(nbg)] if nbg and os.path.exists(path)])


def validation_jobs(e, system, ddir):
    """All jobs of phase 1: diffusion to the highest number of iterations, logreg with all lr and wd at once."""
    if system == "diffusion":
        return [diffusion_job(e, ddir, f"val_nbg{nbg}_nl{n}_seed{seed}", "val", nbg, n, seed, e.diffusion["niter"])
                for nbg, n, seed in itertools.product(e.diffusion["nbg"], e.nlabeled, e.seeds)]
    return [make_job(e, system, ddir, f"val_nl{n}_bs{batchsize}_seed{seed}",
                     {"mode": "val", "nlabeled": n, "seed": seed, **e.logreg, "batchsize": batchsize})
            for n, batchsize, seed in itertools.product(e.nlabeled, e.logreg["batchsize"], e.seeds)]


def test_jobs(e, system, ddir, parameters, source):
    """All jobs of phase 3. parameters: {n: {...}} of logreg, {nbg: {n: {...}}} of diffusion, keys are text.

    source: "chosen" or "published", where the parameters are from. Raises ValueError where one is missing.
    """
    prefix = "test" if source == "chosen" else f"test-{source}"

    def get(nbg, n):
        found = entry_of(parameters, nbg, n)
        if not found:
            what = ("" if nbg is None else f"nbg={nbg}, ") + f"nlabeled={n}"
            hint = "choose them by phases 1 and 2" if source != "chosen" else \
                f"bash run_{system}.bash 2 {short_path(e.path)} chooses them"
            raise ValueError(f"no {source} parameters of {system} for {what}: {hint}")
        return found

    if system == "diffusion":
        return [diffusion_job(e, ddir, f"{prefix}_nbg{nbg}_nl{n}_seed{seed}", "test", nbg, n, seed,
                              max(get(nbg, n)["niter"], e.diffusion["niter_test"]))
                for nbg, n, seed in itertools.product(e.diffusion["nbg"], e.nlabeled, e.seeds)]
    return [make_job(e, system, ddir, f"{prefix}_nl{n}_seed{seed}",
                     {"mode": "test", "nlabeled": n, "seed": seed, **e.logreg, "evalevery": 0,
                      **{key: get(None, n)[key] for key in ("lr", "wd", "batchsize", "maxiter")}})
            for n, seed in itertools.product(e.nlabeled, e.seeds)]


def check_chosen(e, parameters, jobs, path):
    """ValueError where the parameters, of the file `path`, were not chosen for the data and settings of these jobs, or from
    another grid; a line where it was by other seeds. Those written by hand, which do not say, are taken as they are."""
    of_seeds = set()
    for job in jobs:
        a = job.arguments
        p = entry_of(parameters, a.get("nbg"), a["nlabeled"])
        other = changed_file(job.inputs, p["files"]) or changed_grid(e, p) if "files" in p else None
        settings = (f"{key} ({as_text(p[key])}, not {as_text(a[key])})" for key in SETTINGS[job.script]
                    if key in p and p[key] != a[key])
        other = other or next(settings, None)
        if other:
            raise ValueError(f"{path} was chosen for another {other}: phases 1 and 2 choose anew")
        if isinstance(p.get("seeds"), list):
            of_seeds.add(as_text(p["seeds"]))
    for seeds in of_seeds - {as_text(e.seeds)}:
        log(f"note: {path} has parameters that were chosen by the seeds {seeds}, not {as_text(e.seeds)}")


def grid_of(e, system):
    """What parameters are chosen from: {"lr": [..], ...}."""
    grid = getattr(e, system)
    return {key: grid[key] for key in ("lr", "wd", "batchsize", "maxiter", "evalevery", "niter") if key in grid}


def changed_grid(e, parameters):
    """In what the grid that parameters were chosen from was not the experiment's, as text; None if in nothing."""
    grid, had = grid_of(e, "diffusion" if "niter" in parameters else "logreg"), parameters.get("grid")
    if not isinstance(had, dict) or set(had) != set(grid):
        return "grid, or does not tell of which"
    return next((f"grid, which had {key} {as_text(had[key])}" for key in grid if had[key] != grid[key]), None)


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


# ----------------------------------------------------------------------------------------------------------- choose

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


def best_iteration(curves):
    """Best number of iterations: highest mean top-5 over all classes; of equal ones the lowest.

    curves: one list of results per seed, [{"iteration", "top5", "top5_novel"}], after the same numbers of iterations.
    Returns (iteration, mean top-5, mean top-5 on novel), means over seeds.
    """
    top5, novel = (np.mean([[r[key] for r in c] for c in curves], axis=0) for key in ("top5", "top5_novel"))
    # means of equal accuracies may differ in their last bit
    best = int(np.argmax(top5 >= top5.max() - 1e-12))
    return curves[0][best]["iteration"], float(top5[best]), float(novel[best])


def validation_curves(system, jobs):
    """{(nbg or None, n): {setting: [results of each seed's run]}} of the records of phase 1. A setting is (lr, wd, batchsize), ()
    of diffusion; results are as best_iteration() takes them."""
    curves = {}
    for job, record in zip(jobs, records_of(jobs, 1)):
        a = job.arguments
        settings = curves.setdefault((a.get("nbg"), a["nlabeled"]), {})
        if system == "diffusion":
            settings.setdefault((), []).append(record["results"])
        else:
            for r in record["runs"]:
                settings.setdefault((r["lr"], r["wd"], a["batchsize"]), []).append(r["results"])
    return curves


def choose(e, system, jobs, curves):
    """Parameters by validation: {n: {...}} of logreg, {nbg: {n: {...}}} of diffusion, keys are text.

    jobs, curves: of phase 1, as validation_jobs() and validation_curves() give them. Of settings that are equally good the one
    with fewer iterations is taken, then the first of the grid.
    """
    jobs_of = {(job.arguments.get("nbg"), job.arguments["nlabeled"]): job for job in jobs}
    chosen = {}
    for (nbg, n), settings in curves.items():
        found = {setting: best_iteration(runs) for setting, runs in settings.items()}
        top = max(top5 for _, top5, _ in found.values())
        setting = min((s for s in found if found[s][1] >= top - 1e-12), key=lambda s: found[s][0])
        iteration, top5, novel = found[setting]
        if system == "diffusion":
            parameters = {"niter": iteration}
        else:
            parameters = {"lr": setting[0], "wd": setting[1], "batchsize": setting[2], "maxiter": iteration}
        job = jobs_of[nbg, n]
        parameters.update((key, job.arguments[key]) for key in SETTINGS[job.script])
        where = chosen if nbg is None else chosen.setdefault(str(nbg), {})
        where[str(n)] = {**parameters, "val_top5": top5, "val_top5_novel": novel, "seeds": e.seeds,
                         "grid": grid_of(e, system), "files": file_identities(job.inputs)}
    return chosen


def merge(old, new):
    """old with the entries of new in their place, at every level down to parameters (dicts of numbers)."""
    out = dict(old)
    for key, value in new.items():
        nested = all(isinstance(v, dict) for v in value.values())
        out[key] = merge(old.get(key, {}), value) if nested else value
    return out


def read_parameters(e, system, ddir, source):
    """Parameters of phase 2 (source "chosen") or of the paper ("published"), as test_jobs takes them."""
    if source == "published":
        parameters = e.published.get("parameters", {}).get(system)
        if not parameters:
            raise ValueError(f"{e.path} names no published parameters of {system}")
        if not are_parameters(parameters, system):
            raise ValueError(f"{e.published_path} does not hold parameters of {system}: see configs/paper_results.json")
        return parameters
    path = e.parameters_path(system, ddir)
    if not os.path.exists(path):
        instead = "; PARAMS=published takes the published ones instead" if e.published.get("parameters", {}).get(system) else ""
        raise ValueError(f"{path} does not exist: bash run_{system}.bash 2 {short_path(e.path)} writes it{instead}")
    parameters, why = {}, ""
    try:
        parameters = read_json(path)
    except ValueError as error:
        why = f" ({error})"
    if not parameters or not are_parameters(parameters, system):
        raise ValueError(f"{path} does not hold parameters of {system}{why}: bash run_{system}.bash 2 {short_path(e.path)} "
                         "writes it anew")
    return parameters


def parameters_and_jobs(e, system, ddir, source="chosen"):
    """(parameters as read_parameters gives them, all jobs of phase 3 with these)."""
    parameters = read_parameters(e, system, ddir, source)
    return parameters, test_jobs(e, system, ddir, parameters, source)


def are_parameters(tree, system):
    """Whether a tree is what choose() returns."""
    least, real = ({"niter": 0}, ()) if system == "diffusion" else ({"batchsize": 1, "maxiter": 1}, ("lr", "wd"))
    return is_tree(tree, LEVELS[system], lambda entry: all(is_number(entry.get(key)) for key in real) and all(
        type(entry.get(key)) is int and entry[key] >= low for key, low in least.items()))
