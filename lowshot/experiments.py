"""The experiments behind a table: which runs they consist of (jobs.py runs them), choosing parameters by validation.

An experiment file (configs/paper.yaml) holds the grid. Records go to $DDIR/logs/{logreg,diffusion}/{experiment}/.
run_logreg.bash and run_diffusion.bash run all this, one phase at a time (phases.py).
"""
import itertools
import os
import re
import sys

import numpy as np

from lowshot.files import changed_file, file_identities, read_json, read_yaml
from lowshot.jobs import Job, is_number, records_of, short_path
from lowshot.layout import command_for
from lowshot.script import as_text, log

SYSTEMS = ("logreg", "diffusion")
LEVELS = {"logreg": 1, "diffusion": 2}      # of parameters and figures: {n: {...}}, {nbg: {n: {...}}}, keys are text
SETTINGS = {"logreg.py": ("mom", "precision"), "diffusion.py": ("k", "dim")}    # that parameters are chosen for


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


# ----------------------------------------------------------------------------------------------------------- choose

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
