"""Experiment files, jobs, the choice of parameters, tables: with records written by hand."""
import json
import os
import re
import sys
import time

import numpy as np
import pytest
import yaml

from lowshot import experiments, phases, report
from lowshot.experiments import Experiment, read_parameters
from lowshot.files import file_identities
from lowshot.jobs import CHECKOUT, run_jobs, short_path
from lowshot.layout import DataDir
from lowshot.script import run

TINY = """
nlabeled: [1, 2]
seeds: [1, 2]
logreg: {lr: [0.01, 0.001], wd: [0, 0.1], batchsize: [16, 64], maxiter: 1000}
diffusion: {nbg: [0, 500], k: 10, niter: 4}
"""


def experiment(folder, text=TINY, environment=None):
    path = folder / "tiny.yaml"
    path.write_text(text)
    return Experiment(str(path), environment or {})


@pytest.fixture
def ddir(tmp_path):
    root = tmp_path / "data"
    (root / "features").mkdir(parents=True)
    for name in ("train", "val"):
        (root / "features" / f"{name}.hdf5").write_bytes(b"x")
        os.utime(root / "features" / f"{name}.hdf5", (1e9, 1e9))
    return DataDir(str(root))


def write_record(job, results=None, complete=True, **changes):
    """The record that the job would write: results is {iteration: (top5, novel)}, or {(lr, wd): such a dict}."""
    arguments = {**job.arguments, "record": job.record, "device": "auto", **changes}
    for key in ("lr", "wd"):
        if key in arguments:
            arguments[key] = [float(v) for v in np.atleast_1d(arguments[key])]

    def listed(figures):
        return [{"iteration": i, "top5": a, "top5_novel": b} for i, (a, b) in figures.items()]
    content = {"arguments": arguments, "complete": complete, "files": file_identities(job.inputs), "seconds": 1.5,
               "peak_memory": 2e9}
    if job.script == "logreg.py":
        content["runs"] = [{"lr": lr, "wd": wd, "results": listed(figures)} for (lr, wd), figures in results.items()]
    else:
        content["results"] = listed(results or {i: (.5, .5) for i in range(job.arguments["niter"] + 1)})
    os.makedirs(os.path.dirname(job.record), exist_ok=True)
    with open(job.record, "w") as f:
        json.dump(content, f)


def all_points(figures):
    """The same figures at each point of TINY."""
    return {(lr, wd): figures for lr in (0.01, 0.001) for wd in (0.0, 0.1)}


# ------------------------------------------------------------------------------------------------- experiment files

def test_the_experiment_files_of_the_package_load():
    e = Experiment(os.path.join(CHECKOUT, "configs", "paper.yaml"), {})
    assert (e.name, e.nlabeled, e.seeds) == ("paper", [1, 2, 5, 10, 20], [1, 2, 3, 4, 5])
    assert e.logreg == {"lr": [0.01, 0.001, 0.0001], "wd": [0, 0.01, 0.1], "batchsize": [16, 64, 128], "maxiter": 75000,
                        "mom": 0.9, "evalevery": 500, "precision": "float32"}
    assert e.diffusion == {"nbg": [1000000], "k": 30, "niter": 40, "dim": 256, "niter_test": 0}
    assert e.published["diffusion"]["1000000"]["1"]["all"] == [61.24, 0.55]
    e = Experiment(os.path.join(CHECKOUT, "configs", "demo.yaml"), {})
    assert e.diffusion["nbg"] == [0, 6000, 60000] and e.nlabeled == [1, 2, 5, 20] and e.published == {}


def test_lists_from_the_environment(tmp_path):
    e = experiment(tmp_path, environment={"NBG": "7, 10000000", "NLABELED": "5", "SEEDS": " 3 4 3 "})
    assert (e.diffusion["nbg"], e.nlabeled, e.seeds) == ([7, 10000000], [5], [3, 4])
    for text in "1e6", "1,000":
        with pytest.raises(ValueError, match=f"NBG='{text}' is not a list of whole numbers"):
            experiment(tmp_path, environment={"NBG": text})
    with pytest.raises(ValueError, match="nlabeled must be a list of different numbers >= 1, found .0."):
        experiment(tmp_path, environment={"NLABELED": "0"})


@pytest.mark.parametrize("change, message", [
    (("seeds: [1, 2]", "seeds: 3"), "seeds must be a list of different numbers >= 0 and <= 4294967295, found 3"),
    (("seeds: [1, 2]", "seeds: [4294967296]"), "seeds must be a list of different numbers >= 0 and <= 4294967295"),
    (("maxiter: 1000", "maxiter: 1000, mom: 7"), "logreg: mom must be a number >= 0 and <= 1, found 7"),
    (("[0.01, 0.001]", "[0.01, 0.01]"), r"logreg: lr must be a list of different numbers"),
    (("[0, 0.1]", "[0, 0.0]"), r"logreg: wd must be a list of different numbers"),
    (("k: 10", "k: ten"), "diffusion: k must be a number >= 1, found 'ten'"),
    (("niter: 4", "niter: 4.5"), "diffusion: niter must be a number"),
    (("maxiter: 1000", "maxiter: 1000, precision: half"), "logreg: precision must be float32 or bfloat16, found 'half'"),
    (("k: 10, ", ""), "diffusion must have the entries k, nbg, niter"),
    (("seeds:", "seed:"), "unknown entry 'seed'"),
    (("nlabeled: [1, 2]", "nlabeled: ["), "is not valid YAML"),
    ((TINY, "just text"), "is not an experiment file")])
def test_bad_experiment_files(tmp_path, change, message):
    with pytest.raises(ValueError, match=message) as e:
        experiment(tmp_path, TINY.replace(*change))
    assert "tiny.yaml" in str(e.value)


def test_a_system_that_is_not_run_needs_no_section(tmp_path, ddir, monkeypatch, capsys):
    for system, other in (("logreg", "diffusion"), ("diffusion", "logreg")):
        path = tmp_path / f"{system}.yaml"
        path.write_text("\n".join(line for line in TINY.splitlines() if not line.startswith(other)))
        code, out = call(monkeypatch, capsys, system, "1", str(path), DDIR=ddir.root, JOBS="0", NBG="0")
        assert code == 0 and f"{system}.py --mode val" in out.out
        for arguments in ([other, "1", str(path)], ["compare", str(path)]):
            code, out = call(monkeypatch, capsys, *arguments, DDIR=ddir.root)
            assert code == 1 and f"{path} has no section {other}" in out.err


def test_the_comments_of_the_papers_file_name_all_entries(tmp_path):
    """With the defaults that they show taken in, it loads and says the same."""
    with open(os.path.join(CHECKOUT, "configs", "paper.yaml")) as f:
        text = re.sub("^  # (?=[a-z_]+: [0-9f])", "  ", f.read(), flags=re.M).replace("published: ", "# ")
    e = experiment(tmp_path, text)
    shipped = Experiment(os.path.join(CHECKOUT, "configs", "paper.yaml"), {})
    for system, (required, optional) in Experiment.KEYS.items():
        assert set(yaml.safe_load(text)[system]) == required | set(optional)
        assert getattr(e, system) == getattr(shipped, system)


def test_missing_experiment_file():
    with pytest.raises(ValueError, match="no experiment file nowhere.yaml"):
        Experiment("nowhere.yaml")


# ------------------------------------------------------------------------------------------------------------- jobs

def test_validation_jobs(tmp_path, ddir):
    e = experiment(tmp_path)
    jobs = experiments.validation_jobs(e, "diffusion", ddir)
    assert len(jobs) == len({j.name for j in jobs}) == 8
    assert jobs[0].arguments == {"mode": "val", "nlabeled": 1, "seed": 1, "nbg": 0, "k": 10, "niter": 4, "dim": 256}
    assert jobs[0].record == ddir.log("diffusion", "tiny", "val_nbg0_nl1_seed1.json")
    jobs = experiments.validation_jobs(e, "logreg", ddir)
    assert len(jobs) == len({j.name for j in jobs}) == 8
    command = " ".join(jobs[0].command())
    assert "logreg.py --mode val --nlabeled 1 --seed 1 --lr 0.01,0.001 --wd 0,0.1 --batchsize 16 --maxiter 1000" in command
    e = experiment(tmp_path, TINY.replace("maxiter: 1000", "maxiter: 1000, precision: bfloat16"))
    assert "--precision bfloat16" in " ".join(experiments.validation_jobs(e, "logreg", ddir)[0].command())
    one = {"lr": 0.001, "wd": 0.1, "batchsize": 64, "maxiter": 500}
    jobs = experiments.test_jobs(e, "logreg", ddir, {"1": one, "2": one}, "chosen")
    assert jobs[0].arguments["precision"] == "bfloat16"


def test_test_jobs(tmp_path, ddir):
    e = experiment(tmp_path, TINY.replace("niter: 4", "niter: 4, niter_test: 3, dim: 32"))
    chosen = {nbg: {"1": {"niter": 4}, "2": {"niter": 1}} for nbg in ("0", "500")}
    jobs = experiments.test_jobs(e, "diffusion", ddir, chosen, "chosen")
    # not fewer than niter_test iterations
    assert [j.arguments["niter"] for j in jobs] == [4, 4, 3, 3] * 2
    assert {j.arguments["dim"] for j in jobs} == {32} and {j.arguments["mode"] for j in jobs} == {"test"}
    one = {"lr": 0.001, "wd": 0.1, "batchsize": 64, "maxiter": 500}
    jobs = experiments.test_jobs(e, "logreg", ddir, {"1": one, "2": one}, "published")
    assert jobs[0].name == "test-published_nl1_seed1"
    assert jobs[0].arguments == {"mode": "test", "nlabeled": 1, "seed": 1, **one, "mom": 0.9, "evalevery": 0,
                                 "precision": "float32"}
    with pytest.raises(ValueError, match="no chosen parameters of diffusion for nbg=500, nlabeled=1"):
        experiments.test_jobs(e, "diffusion", ddir, {"0": chosen["0"]}, "chosen")
    with pytest.raises(ValueError, match="no published parameters of logreg for nlabeled=2"):
        experiments.test_jobs(e, "logreg", ddir, {"1": one}, "published")


def test_published_parameters_cover_the_paper(ddir):
    e = Experiment(os.path.join(CHECKOUT, "configs", "paper.yaml"), {"NBG": "0 100000 1000000 10000000 100000000"})
    for system, njobs in (("logreg", 25), ("diffusion", 125)):
        parameters = experiments.read_parameters(e, system, ddir, "published")
        assert len(experiments.test_jobs(e, system, ddir, parameters, "published")) == njobs


def test_only_complete_records_of_these_arguments_and_this_data_count(tmp_path, ddir):
    e = experiment(tmp_path)
    diffusion, logreg = (experiments.validation_jobs(e, system, ddir)[0] for system in ("diffusion", "logreg"))
    assert diffusion.result() is None
    write_record(diffusion)
    assert diffusion.result()["complete"]
    write_record(diffusion, complete=False)
    assert diffusion.result() is None
    write_record(diffusion, niter=3)
    assert diffusion.result() is None
    with open(diffusion.record, "w") as f:
        f.write('{"complete": tr')
    assert diffusion.result() is None
    write_record(diffusion, dim=64)         # of another experiment file, which said so
    assert diffusion.result() is None
    write_record(diffusion)
    train = os.stat(ddir.train)
    for changed in (time.time() + 60, 1):       # also by older data
        os.utime(ddir.train, (changed,) * 2)
        assert diffusion.result() is None
    os.utime(ddir.train, ns=(train.st_atime_ns, train.st_mtime_ns))
    assert diffusion.result() is not None
    os.utime(diffusion.record, (1, 1))          # clocks may differ
    assert diffusion.result() is not None
    # vectors of the background count as well
    of_background = experiments.validation_jobs(e, "diffusion", ddir)[-1]
    assert of_background.arguments["nbg"] == 500
    assert f"{ddir.raw()} does not exist: python train_apply_pca.py train apply makes it" in of_background.lacks
    assert ddir.index(500) not in of_background.inputs
    os.makedirs(ddir.path("knngraph"), exist_ok=True)
    with open(ddir.index(500), "wb"):       # and the index, if there is one
        pass
    assert ddir.index(500) in experiments.validation_jobs(e, "diffusion", ddir)[-1].inputs
    os.unlink(ddir.index(500))
    figures = all_points({500: (0.5, 0.5), 1000: (0.5, 0.5)})
    write_record(logreg, figures)
    assert logreg.result() is not None
    write_record(logreg, figures, lr=[0.01])
    assert logreg.result() is None


@pytest.mark.parametrize("system,change", [
    ("logreg", lambda r: r.update(runs=[])), ("logreg", lambda r: r.update(runs=[{}] * 4)),
    ("logreg", lambda r: r.update(runs=3)), ("logreg", lambda r: r["runs"].pop()), ("logreg", lambda r: r["runs"].reverse()),
    ("logreg", lambda r: r["runs"][2]["results"].pop()), ("logreg", lambda r: r["runs"][2].update(results=None)),
    ("diffusion", lambda r: r.update(results=[])), ("diffusion", lambda r: r.update(arguments=None)),
    ("diffusion", lambda r: r["results"].pop()), ("diffusion", lambda r: r["results"].append(r["results"][-1])),
    ("diffusion", lambda r: r["results"][1].update(top5="high")), ("diffusion", lambda r: r["results"][1].update(top5=2.5)),
    ("diffusion", lambda r: r["results"][1].update(top5_novel=-1)), ("diffusion", lambda r: r["results"][1].pop("top5")),
    ("diffusion", lambda r: r["results"][1].update(top5=float("nan"))), ("diffusion", lambda r: r.update(unreadable=None)),
    ("diffusion", lambda r: r.pop("seconds")), ("logreg", lambda r: r.update(peak_memory="much")),
    ("diffusion", lambda r: r.update(unreadable=[1]))])
def test_records_without_figures_do_not_count(tmp_path, ddir, system, change):
    job = experiments.validation_jobs(experiment(tmp_path), system, ddir)[0]
    write_record(job, all_points({500: (.5, .5), 1000: (.5, .5)}) if system == "logreg" else None)
    assert job.result() is not None
    content = json.load(open(job.record))
    change(content)
    json.dump(content, open(job.record, "w"))
    assert job.result() is None


@pytest.mark.parametrize("content", ["[]", "null", "{\"500\": 5}", "{\"500\": {\"1\": {\"top5\": 1}}}",
                                     "{\"500\": {\"1\": {\"niter\": 3.0}}}", "{\"500\": {\"1\": {\"niter\": -1}}}"])
def test_parameters_that_are_none_are_refused_and_written_anew(tmp_path, ddir, content):
    e = experiment(tmp_path)
    path = e.parameters_path("diffusion", ddir)
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "w") as f:
        f.write(content)
    with pytest.raises(ValueError, match="run_diffusion.bash 2 .*tiny.yaml writes it anew"):
        experiments.read_parameters(e, "diffusion", ddir, "chosen")


def test_jobs_that_all_lack_an_input_are_not_started(tmp_path, capsys):
    e = Experiment(os.path.join(CHECKOUT, "configs", "demo.yaml"), {"NBG": "0 6000"})
    jobs = experiments.validation_jobs(e, "diffusion", DataDir(str(tmp_path)))
    environment = {**os.environ, "DDIR": str(tmp_path)}
    with pytest.raises(ValueError, match="none of these jobs can run: .*train.hdf5 does not exist"):
        run_jobs(jobs, 1, environment)
    (tmp_path / "features" / "f100m").mkdir(parents=True)
    for name in ("features/train.hdf5", "features/val.hdf5", "features/f100m/PCAR256.vt"):
        (tmp_path / name).touch()
    with pytest.raises(ValueError, match="none of these jobs can run: no label_idx.json in"):
        run_jobs(experiments.validation_jobs(e, "diffusion", DataDir(str(tmp_path))), 1, environment)
    (tmp_path / "label_idx.json").touch()
    jobs = experiments.validation_jobs(e, "diffusion", DataDir(str(tmp_path)))
    assert {job.arguments["nbg"] for job in jobs if job.lacks} == {6000}       # and the others would be started
    assert jobs[-1].lacks[-1].startswith("no graph of 6000 background images")
    run_jobs(jobs, 0, environment)
    assert not (tmp_path / "logs").exists()


# ----------------------------------------------------------------------------------------------------------- choose

def curve(*figures):
    return [{"iteration": i, "top5": a, "top5_novel": a / 2} for i, a in enumerate(figures)]


def test_best_iteration():
    assert experiments.best_iteration([curve(0.2, 0.5, 0.4), curve(0.2, 0.1, 0.4)])[0] == 2
    assert experiments.best_iteration([curve(0.25, 0.5, 0.5), curve(0.5, 0.5, 0.5)]) == (1, 0.5, 0.25)
    assert experiments.best_iteration([curve(0.25)]) == (0, 0.25, 0.125)
    # equal means that differ in their last bit: .1 + .2 and .3 + 0
    assert experiments.best_iteration([curve(0.3, 0.1), curve(0.0, 0.2)])[0] == 0
    assert experiments.best_iteration([curve(0.1, 0.3), curve(0.2, 0.0)])[0] == 0


def test_choose_diffusion(tmp_path, ddir):
    e = experiment(tmp_path)
    jobs = experiments.validation_jobs(e, "diffusion", ddir)
    best = {(0, 1): 0, (0, 2): 1, (500, 1): 4, (500, 2): 3}
    with pytest.raises(ValueError, match="8 of 8 jobs have no complete record .* run phase 1 first"):
        experiments.validation_curves("diffusion", jobs)
    for job in jobs:
        at = best[job.arguments["nbg"], job.arguments["nlabeled"]]
        bonus = 0.1 * job.arguments["seed"]
        write_record(job, {i: (0.5 - 0.1 * abs(i - at) + bonus, 0.25) for i in range(5)})
    chosen = experiments.choose(e, "diffusion", jobs, experiments.validation_curves("diffusion", jobs))
    assert {(int(nbg), int(n)): p["niter"] for nbg, d in chosen.items() for n, p in d.items()} == best
    assert chosen["500"]["1"]["val_top5"] == pytest.approx(0.65) and chosen["0"]["2"]["seeds"] == [1, 2]
    os.unlink(jobs[3].record)
    with pytest.raises(ValueError, match=f"1 of 8 jobs .* {jobs[3].name}"):
        experiments.validation_curves("diffusion", jobs)


def test_choose_logreg(tmp_path, ddir):
    e = experiment(tmp_path)
    points = [(lr, wd) for lr in (0.01, 0.001) for wd in (0.0, 0.1)]
    jobs = experiments.validation_jobs(e, "logreg", ddir)
    for job in jobs:
        figures = {p: {500: (0.3, 0.1), 1000: (0.2, 0.1)} for p in points}
        if job.arguments["batchsize"] == 64 and job.arguments["nlabeled"] == 1:
            figures[0.001, 0.1] = {500: (0.2, 0.1), 1000: (0.4, 0.35)}
        if job.arguments["nlabeled"] == 2:      # as good at 500 iterations as others at 1000
            figures = {p: {500: (0.1, 0.1), 1000: (0.6, 0.1)} for p in points}
            if job.arguments["batchsize"] == 64:
                figures[0.001, 0.0] = {500: (0.6, 0.2), 1000: (0.6, 0.2)}
        write_record(job, figures)
    chosen = experiments.choose(e, "logreg", jobs, experiments.validation_curves("logreg", jobs))
    keys = ("lr", "wd", "batchsize", "maxiter")
    assert [chosen["1"][k] for k in keys] == [0.001, 0.1, 64, 1000]
    assert [chosen["2"][k] for k in keys] == [0.001, 0.0, 64, 500]
    assert chosen["1"]["val_top5_novel"] == pytest.approx(0.35)


def test_merge():
    old = {"0": {"1": {"niter": 3, "seeds": [1]}}, "500": {"1": {"niter": 9, "seeds": [1]}}}
    new = {"0": {"1": {"niter": 2, "seeds": [2]}, "5": {"niter": 1, "seeds": [2]}}}
    assert experiments.merge(old, new) == {"0": new["0"], "500": old["500"]}
    assert experiments.merge({"1": {"lr": 1, "seeds": [1]}}, {"1": {"lr": 2, "seeds": [1]}})["1"]["lr"] == 2


# ---------------------------------------------------------------------------------------------------------- reports

@pytest.fixture
def finished(tmp_path, ddir):
    """An experiment of one background size with the records of the test phase of both systems."""
    figures = {"1": {"all": [60.32, 0.845], "novel": [42.5, 1.34]}}
    (tmp_path / "paper.json").write_text(json.dumps({
        "logreg": figures, "diffusion": {"500": figures}, "parameters": {"logreg": {}, "diffusion": {}}}))
    e = experiment(tmp_path, TINY + "published: paper.json\n")
    chosen = {"diffusion": {nbg: {"1": {"niter": 2}, "2": {"niter": 0}} for nbg in ("0", "500")},
              "logreg": {n: {"lr": 0.001, "wd": 0.1, "batchsize": 64, "maxiter": 500} for n in ("1", "2")}}
    for system in chosen:
        os.makedirs(e.folder(system, ddir), exist_ok=True)
        with open(e.parameters_path(system, ddir), "w") as f:
            json.dump(chosen[system], f)
        for job in experiments.test_jobs(e, system, ddir, chosen[system], "chosen"):
            a = job.arguments
            top5 = 0.5 + 0.01 * a["seed"] + 0.1 * a["nlabeled"] + 0.0001 * a.get("nbg", 0)
            if system == "logreg":
                write_record(job, {(0.001, 0.1): {500: (top5 - 0.005, top5 - 0.1)}})
            else:
                write_record(job, {i: (top5 if i == a["niter"] else 0.1, top5 - 0.02) for i in range(a["niter"] + 1)})
    return e


def test_rows_are_of_the_seeds_of_the_experiment(finished, ddir):
    write_record(experiments.diffusion_job(finished, ddir, "test_nbg0_nl1_seed9", "test", 0, 1, 9, 2))       # of an earlier SEEDS
    systems = report.comparison(finished, ddir, "chosen")
    assert list(systems) == [("logreg", None), ("diffusion", 0), ("diffusion", 500)]
    assert all(list(rows) == [1, 2] and all(row["seeds"] == [1, 2] for row in rows.values()) for rows in systems.values())
    row = systems["diffusion", 0][1]
    assert [[r["iteration"] for r in results] for results in row["results"]] == [[0, 1, 2]] * 2
    assert row["seconds"] == [1.5, 1.5] and row["peak_memory"] == [2e9, 2e9]
    parameters = read_parameters(finished, "logreg", ddir, "chosen")
    os.unlink(experiments.test_jobs(finished, "logreg", ddir, parameters, "chosen")[3].record)
    with pytest.raises(ValueError, match="1 of 4 jobs have no complete record of this data and these arguments, test_nl2_seed2 "
                                         "for one"):
        report.print_comparison(finished, ddir, "chosen")
    assert not os.path.exists(ddir.log("tiny.md")) and not os.path.exists(ddir.log("tiny.png"))


def test_report(finished, ddir, capsys):
    e = finished
    for system in ("logreg", "diffusion"):
        parameters = experiments.read_parameters(e, system, ddir, "chosen")
        jobs = experiments.test_jobs(e, system, ddir, parameters, "chosen")
        report.print_report(e, system, ddir, jobs, parameters, "chosen")
    out = capsys.readouterr().out
    # seeds 1, 2: population standard deviation of .61, .62 is .005
    assert "nl=1: 61.00 +/- 0.500, novel 51.50 +/- 0.500" in out
    assert "nbg=500\nnl=1: 66.50 +/- 0.500, novel 64.50 +/- 0.500" in out
    rows = [[c.strip() for c in line.split("|")[1:-1]] for line in out.splitlines() if line.startswith("| 500 ")]
    assert rows[0] == ["500", "1", "2", "2", "66.50 +/- 0.500", "64.50 +/- 0.500", "60.32 +/- 0.845", "42.50 +/- 1.340",
                       "1.5", "2.00"]
    assert rows[1][-4:] == ["", "", "1.5", "2.00"] and rows[1][2] == "0"
    table = open(os.path.join(e.folder("logreg", ddir), "report.md")).read()
    assert table.startswith("Top-5 accuracy in per cent, mean +/- standard deviation over seeds (population), chosen "
                            "parameters.\n\n|")
    assert "| 1                      | 64        | 0.001 | 0.1 | 500     | 2     | 61.00 +/- 0.500 |" in table
    stored = json.load(open(os.path.join(e.folder("diffusion", ddir), "report.json")))
    assert [(r["nbg"], r["nlabeled"]) for r in stored] == [(0, 1), (0, 2), (500, 1), (500, 2)]
    assert stored[2]["top5"] == pytest.approx([66, 67]) and stored[2]["seeds"] == [1, 2]


def test_what_is_in_place_of_the_files_lists_is_told(finished, ddir, monkeypatch, capsys):
    for arguments in ("logreg", "4", finished.path), ("compare", finished.path):
        code, out = call(monkeypatch, capsys, *arguments, DDIR=ddir.root, NLABELED="1", SEEDS="1 2")
        assert not code and out.out.count("\nnote: with NLABELED=1 in place of what tiny.yaml has\n") == 1
    assert "note: with" in open(ddir.log("tiny.md")).read()
    code, out = call(monkeypatch, capsys, "compare", finished.path, DDIR=ddir.root, NLABELED="1 2")
    assert not code and "note: with" not in out.out


def test_comparison_by_published_parameters(finished, ddir, tmp_path, monkeypatch, capsys):
    path = str(tmp_path / "paper.json")
    figures = json.load(open(path))
    chosen = {system: read_parameters(finished, system, ddir, "chosen") for system in ("logreg", "diffusion")}
    json.dump({**figures, "parameters": chosen}, open(path, "w"))
    e = Experiment(finished.path)
    for system in chosen:
        for job in experiments.test_jobs(e, system, ddir, chosen[system], "published"):
            if system == "logreg":
                write_record(job, {(0.001, 0.1): {500: (.25, .125)}})
            else:
                write_record(job, {i: (.75, .5) for i in range(job.arguments["niter"] + 1)})
    code, out = call(monkeypatch, capsys, "compare", e.path, DDIR=ddir.root, PARAMS="published")
    assert not code and "| logistic regression              | 25.0 / 12.5" in out.out and "tiny-published.png" in out.err
    assert os.path.exists(ddir.log("tiny-published.md")) and not os.path.exists(ddir.log("tiny.md"))


@pytest.mark.parametrize("content, message", [
    (None, "published is paper.json, and .*paper.json does not exist"),
    ({"parameters": {"diffusion": {"500": {"1": {"niter": "3"}}}}}, "paper.json does not hold parameters of diffusion: see"),
    ({}, "tiny.yaml names no published parameters of diffusion")])
def test_published_parameters_that_are_none_are_named(finished, ddir, tmp_path, monkeypatch, capsys, content, message):
    os.unlink(tmp_path / "paper.json")
    if content is not None:
        json.dump(content, open(tmp_path / "paper.json", "w"))
    code, out = call(monkeypatch, capsys, "diffusion", "4", finished.path, DDIR=ddir.root, PARAMS="published")
    assert code == 1 and re.search(message, out.err)


def test_a_forgotten_dim_is_named(tmp_path, ddir):
    os.makedirs(ddir.path("features", "f100m"))
    open(ddir.pca(32), "w").close()
    job = experiments.validation_jobs(experiment(tmp_path), "diffusion", ddir)[-1]
    assert any("has the PCA to 32 dimensions, not to 256: --dim 32, or" in why for why in job.lacks)


def test_report_tells_what_is_missing(finished, ddir, capsys):
    e = finished
    parameters = experiments.read_parameters(e, "logreg", ddir, "chosen")
    jobs = experiments.test_jobs(e, "logreg", ddir, parameters, "chosen")
    os.unlink(jobs[1].record)
    with pytest.raises(ValueError, match=f"1 of 4 jobs have no complete record .* {jobs[1].name} for one"):
        report.print_report(e, "logreg", ddir, jobs, parameters, "chosen")
    assert "nl=1: 60.50 +/- 0.000" in capsys.readouterr().out
    assert not os.path.exists(os.path.join(e.folder("logreg", ddir), "report.md"))
    for job in jobs[:1] + jobs[2:]:
        os.unlink(job.record)
    with pytest.raises(ValueError, match="4 of 4 jobs have no complete record"):
        report.print_report(e, "logreg", ddir, jobs, parameters, "chosen")


def test_comparison(finished, ddir, capsys):
    report.print_comparison(finished, ddir, "chosen")
    out = capsys.readouterr().out
    assert "| logistic regression              | 61.0 / 51.5" in out
    assert "| diffusion, no background         | 61.5 / 59.5" in out
    assert "| diffusion, 500 background images | 66.5 / 64.5" in out
    assert "- holds: n = 1: diffusion is ahead of logistic regression by 5 points or more on the novel classes (+13.0)" in out
    assert "- holds: n = 2: accuracy of diffusion grows with the background (71.5, 76.5)" in out
    assert open(ddir.log("tiny.md")).read().strip() == out.strip()
    assert open(ddir.log("tiny.png"), "rb").read(4) == b"\x89PNG"


def row(top5, novel):
    return {"top5": [top5], "top5_novel": [novel]}


def test_findings_that_do_not_hold(tmp_path):
    e = experiment(tmp_path, TINY.replace("[1, 2]", "[2, 20]", 1))
    systems = {("logreg", None): {2: row(60, 50), 20: row(70, 60)},
               ("diffusion", 0): {2: row(64, 52), 20: row(71, 61)},
               ("diffusion", 500): {2: row(64, 54.9), 20: row(71.5, 65)}}
    found = report.findings(e, systems)
    assert [holds for _, holds in found] == [False, False, True, False]
    assert "(+4.9)" in found[0][0] and "(64.0, 64.0)" in found[1][0] and "(-1.5)" in found[3][0]
    assert all(holds for _, holds in report.findings(e, {**systems, ("diffusion", 500): {
        2: row(65, 55), 20: row(69, 60)}, ("diffusion", 0): {2: row(60, 40), 20: row(68, 60)}}))


def test_markdown():
    assert report.markdown(["a", "long"], [["1234", "5"]]) == "| a    | long |\n| ---- | ---- |\n| 1234 | 5    |"


# ----------------------------------------------------------------------------------------------------- command line

def call(monkeypatch, capsys, *arguments, **environment):
    for name in ("PARAMS", "JOBS", "NBG", "NLABELED", "SEEDS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "argv", ["phases.py", *arguments])
    with pytest.raises(SystemExit) as e:
        run(phases.main)
    return e.value.code, capsys.readouterr()


def test_phases_2_and_4(finished, ddir, monkeypatch, capsys):
    e = finished
    for job in experiments.validation_jobs(e, "diffusion", ddir):
        write_record(job, {i: (0.5 + (i == 2) / 10, 0.3) for i in range(5)})
    code, out = call(monkeypatch, capsys, "diffusion", "2", e.path, DDIR=ddir.root, NBG="500")
    assert code == 0 and "nbg=500 nl=1: niter 2 (validation: 60.00, novel 30.00)" in out.out
    parameters = json.load(open(e.parameters_path("diffusion", ddir)))
    assert parameters["0"]["2"]["niter"] == 0 and parameters["500"]["2"]["niter"] == 2      # NBG: 500 only
    for job in experiments.validation_jobs(e, "diffusion", ddir):
        write_record(job, {i: (0.5 + i / 100, 0.3) for i in range(5)})
    code, out = call(monkeypatch, capsys, "diffusion", "2", e.path, DDIR=ddir.root, NBG="500")
    assert code == 0 and "nbg=500 nl=1: niter 4, the last of the grid (validation: 54.00, novel 30.00)" in out.out
    code, out = call(monkeypatch, capsys, "logreg", "2", e.path, DDIR=ddir.root)
    assert code == 1 and out.err.startswith("run_logreg.bash: error: 8 of 8 jobs have no complete record")
    code, out = call(monkeypatch, capsys, "logreg", "4", e.path, DDIR=ddir.root)
    assert code == 0 and "nl=1: 61.00" in out.out
    code, out = call(monkeypatch, capsys, "compare", e.path, DDIR=ddir.root, NBG="0")
    assert code == 0 and "no background" in out.out


def test_parameters_of_other_data_or_settings_are_refused(finished, tmp_path, ddir, monkeypatch, capsys):
    for job in experiments.validation_jobs(finished, "diffusion", ddir):
        write_record(job, {i: (0.5 + (i == 2) / 10, 0.3) for i in range(5)})
    words = dict(DDIR=ddir.root, JOBS="0")
    assert call(monkeypatch, capsys, "diffusion", "2", finished.path, **words)[0] == 0
    assert call(monkeypatch, capsys, "diffusion", "3", finished.path, **words)[0] == 0
    code, out = call(monkeypatch, capsys, "diffusion", "3", finished.path, **words, SEEDS="5 6")
    assert code == 0 and "has parameters that were chosen by the seeds 1,2, not 5,6" in out.out
    path = finished.parameters_path("diffusion", ddir)
    parameters = json.load(open(path))
    for of_labels in parameters.values():       # these jobs have no use for
        of_labels["1"]["seeds"] = [7]
    json.dump(parameters, open(path, "w"))
    code, out = call(monkeypatch, capsys, "diffusion", "3", finished.path, **words, NLABELED="2")
    assert code == 0 and "chosen by the seeds" not in out.out
    experiment(tmp_path, TINY.replace("k: 10", "k: 5"))
    path = finished.parameters_path("diffusion", ddir)
    code, out = call(monkeypatch, capsys, "diffusion", "3", finished.path, **words)
    assert code == 1 and f"{path} was chosen for another k (10, not 5): phases 1 and 2" in out.err
    for job in experiments.validation_jobs(finished, "logreg", ddir):
        write_record(job, all_points({500: (.5, .5), 1000: (.5, .5)}))
    assert call(monkeypatch, capsys, "logreg", "2", finished.path, **words)[0] == 0
    assert call(monkeypatch, capsys, "logreg", "3", finished.path, **words)[0] == 0
    for more, was in (("mom: 0.5", "mom (0.9, not 0.5)"), ("precision: bfloat16", "precision (float32, not bfloat16)")):
        experiment(tmp_path, TINY.replace("maxiter: 1000", "maxiter: 1000, " + more))
        code, out = call(monkeypatch, capsys, "logreg", "3", finished.path, **words)
        assert code == 1 and f"was chosen for another {was}: phases 1 and 2" in out.err
    experiment(tmp_path)
    os.utime(ddir.train, (1, 1))
    for phase in "34":
        code, out = call(monkeypatch, capsys, "diffusion", phase, finished.path, **words)
        assert code == 1 and f"{path} was chosen for another train.hdf5: phases 1 and 2" in out.err


def test_printed_commands_are_for_the_checkout(ddir, tmp_path, monkeypatch, capsys):
    path = experiment(tmp_path).path
    monkeypatch.chdir(os.path.dirname(ddir.root))
    code, out = call(monkeypatch, capsys, "logreg", "1", path, DDIR=os.path.basename(ddir.root), JOBS="0")
    words = out.out.splitlines()[0].split()
    assert code == 0 and words[0] == f"DDIR={ddir.root}" and words[2] == os.path.join(CHECKOUT, "logreg.py")
    assert words[-1].startswith(ddir.root)


@pytest.mark.parametrize("arguments, environment, message", [
    (["logreg"], {}, "no phase: the phases are 1 (validate), 2 (choose), 3 (test), 4 (report)"),
    (["logreg", "5"], {}, "unknown phase '5': the phases are 1 (validate)"),
    (["logreg", "1", "nowhere.yaml"], {}, "no experiment file nowhere.yaml"),
    (["logreg", "3"], {"PARAMS": "best"}, "PARAMS='best': chosen or published is expected"),
    (["logreg", "1"], {"JOBS": "two"}, "JOBS='two' is not a whole number"),
    (["logreg", "3"], {}, "parameters.json does not exist: bash run_logreg.bash 2 "
     f"{short_path(os.path.join(CHECKOUT, 'configs', 'paper.yaml'))} writes it"),
    (["logreg", "1"], {"DDIR": ""}, "DDIR is not set"),
    (["logreg", "1"], {"DDIR": "/nowhere/at/all"}, "DDIR=/nowhere/at/all is not a directory")])
def test_bad_calls(ddir, monkeypatch, capsys, arguments, environment, message):
    code, out = call(monkeypatch, capsys, *arguments, **{"DDIR": ddir.root, **environment})
    assert code in (1, 2) and message in out.err and len(out.err.strip().splitlines()) == 1


def test_published_is_refused_where_there_is_none(tmp_path, ddir, monkeypatch, capsys):
    e = experiment(tmp_path)
    code, out = call(monkeypatch, capsys, "diffusion", "3", e.path, DDIR=ddir.root, PARAMS="published")
    assert code == 1 and "names no published parameters of diffusion" in out.err


def test_results_of_the_paper_file():
    """The file's figures are those of the paper's table: a few of them, read off by hand."""
    with open(os.path.join(CHECKOUT, "configs", "paper_results.json")) as f:
        paper = json.load(f)
    assert paper["logreg"]["20"]["novel"] == [82.92, 0.232]
    assert paper["diffusion"]["100000000"]["1"]["all"] == [63.5, 0.642]
    assert paper["parameters"]["logreg"]["2"] == {"lr": 0.001, "wd": 0.01, "batchsize": 128, "maxiter": 29500}
    assert not re.search("session|issue", json.dumps(paper))


def test_jobs_name_all_settings_of_the_file(tmp_path, ddir):
    e = experiment(tmp_path, TINY.replace("maxiter: 1000", "maxiter: 1000, mom: 0.5, evalevery: 250"))
    a = experiments.validation_jobs(e, "logreg", ddir)[0].arguments
    assert (a["mom"], a["evalevery"]) == (0.5, 250)
    one = {"lr": 0.001, "wd": 0.1, "batchsize": 64, "maxiter": 500}
    a = experiments.test_jobs(e, "logreg", ddir, {"1": one, "2": one}, "chosen")[0].arguments
    assert (a["mom"], a["evalevery"]) == (0.5, 0)


def test_a_record_is_of_the_pca_the_vectors_and_the_graph_as_they_are(tmp_path, ddir):
    paths = [ddir.pca(), ddir.raw(), *ddir.graph(500, 16)]
    for path in [*paths, ddir.path("label_idx.json")]:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        open(path, "w").close()
    job = experiments.validation_jobs(experiment(tmp_path), "diffusion", ddir)[-1]
    assert job.arguments["nbg"] == 500 and not job.lacks
    write_record(job)
    for path in paths:
        before = os.stat(path)
        assert job.result() is not None
        os.utime(path, (1, 1))
        assert job.result() is None, path
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def test_a_report_by_published_parameters_does_not_replace_the_other(finished, ddir):
    parameters = read_parameters(finished, "logreg", ddir, "chosen")
    jobs = experiments.test_jobs(finished, "logreg", ddir, parameters, "chosen")
    report.print_report(finished, "logreg", ddir, jobs, parameters, "published")
    assert sorted(n for n in os.listdir(finished.folder("logreg", ddir)) if n.startswith("report")) == [
        "report-published.json", "report-published.md", "report-published.png"]


@pytest.mark.parametrize("system, change, was", [
    ("logreg", ("lr: [0.01, 0.001]", "lr: [0.01]"), "lr 0.01,0.001"), ("logreg", ("wd: [0, 0.1]", "wd: [0]"), "wd 0,0.1"),
    ("logreg", ("batchsize: [16, 64]", "batchsize: [16]"), "batchsize 16,64"),
    ("logreg", ("maxiter: 1000", "maxiter: 499"), "maxiter 1000"),
    ("diffusion", ("niter: 4", "niter: 9"), "niter 4"), ("logreg", ("niter: 4", "niter: 9"), None),
    ("diffusion", ("maxiter: 1000", "maxiter: 499"), None)])
def test_parameters_of_another_grid_are_refused(finished, ddir, tmp_path, system, change, was):
    """But for those written by hand, which do not tell what they were chosen for."""
    e, path = experiment(tmp_path, TINY.replace(*change)), finished.parameters_path(system, ddir)
    for by_hand in (True, False):
        parameters = read_parameters(finished, system, ddir, "chosen")
        jobs = experiments.test_jobs(e, system, ddir, parameters, "chosen")
        for tree in [parameters] if system == "logreg" else parameters.values():
            for p in tree.values():
                p.update({} if by_hand else {"files": file_identities(jobs[0].inputs),
                                             "grid": experiments.grid_of(finished, system)})
            if not by_hand:
                without = {key: value for key, value in p.items() if key != "grid"}
                assert experiments.changed_grid(e, without) == "grid, or does not tell of which"
        if was and not by_hand:
            with pytest.raises(ValueError, match=f"was chosen for another grid, which had {was}: phases 1 and 2 choose anew"):
                experiments.check_chosen(e, parameters, jobs, path)
        else:
            experiments.check_chosen(e, parameters, jobs, path)


def test_what_test_images_lack_is_told(finished, ddir, capsys):
    parameters, jobs = experiments.parameters_and_jobs(finished, "logreg", ddir)
    note = "note: no test image is of a novel class, accuracies on novel are 0 for want of any"
    for job in jobs[:2]:
        content = {**job.result(), "notes": [note]}
        with open(job.record, "w") as f:
            json.dump(content, f)
    report.print_report(finished, "logreg", ddir, jobs, parameters, "chosen")
    report.print_comparison(finished, ddir, "chosen")
    assert capsys.readouterr().out.splitlines().count(note) == 2
    for path in (os.path.join(finished.folder("logreg", ddir), "report.md"), ddir.log("tiny.md")):
        with open(path) as f:
            assert f.read().splitlines()[-2:] == ["", note]


@pytest.mark.parametrize("figures", ['{"diffusion": {"0": {"1": {"all": 5}}}}', '{"logreg": {"1": {"all": [5, 1], "novel": [5]}}}',
                                     '{"parameters": 3}'])
def test_published_figures_that_are_none_are_refused(tmp_path, figures):
    (tmp_path / "pub.json").write_text(figures)
    with pytest.raises(ValueError, match="pub.json does not hold published figures"):
        experiment(tmp_path, TINY + "published: pub.json")


def test_runs_with_images_that_could_not_be_read_are_told(finished, ddir, capsys):
    parameters = read_parameters(finished, "logreg", ddir, "chosen")
    jobs = experiments.test_jobs(finished, "logreg", ddir, parameters, "chosen")
    for job, counts in zip(jobs, ([0, 2], [3, 2], [1, 2])):
        content = {**job.result(), "unreadable": counts}
        with open(job.record, "w") as f:
            json.dump(content, f)
    report.print_report(finished, "logreg", ddir, jobs, parameters, "chosen")
    out = capsys.readouterr().out
    assert "note: 2 of 4 runs have labelled images that could not be read, up to 3, which have the features of a black one\n" in out
    assert "note: 3 of 4 runs have test images that could not be read, up to 2, " in out


