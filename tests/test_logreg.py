"""logreg.py against torch's own modules on the same batches, and the script as a user runs it."""
import json
import os
import re
import resource
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path[:0] = [ROOT, os.path.join(ROOT, "tests")]
from data_directory import make_data_directory, read_features, write_features  # noqa: E402
from graph_utils import FusedSGD  # noqa: E402
from logreg import (RunState, Sampler, arguments, default_record, evaluate, main, point_file,  # noqa: E402
                    predict_memory)
from lowshot.files import exclusive  # noqa: E402
from lowshot.layout import DataDir  # noqa: E402
from lowshot.split import load_split, test_images as images_to_test  # noqa: E402
from lowshot.torch_sgd import TorchClassifiers  # noqa: E402

torch.set_num_threads(1)
LINE = re.compile(r"\[\d+\.\d{3}s\] iteration (\d+) top-5 accuracy: ([01]\.\d{3}) \(([01]\.\d{3}) on novel\)")


def random_data(n=200, d=17, C=7, seed=0):
    rs = np.random.RandomState(seed)
    y = np.concatenate([np.arange(C), rs.randint(C, size=n - C)])
    return (rs.rand(n, d) + 0.3 * rs.rand(C, d)[y]).astype(np.float32), y


def ours(points, x, y, batches, mom):
    model = TorchClassifiers(points, y.max() + 1, x.shape[1], mom)
    model.steps(torch.from_numpy(x), np.asarray(batches), y[np.asarray(batches)])
    return model


def plain_torch(lr, wd, x, y, batches, mom):
    """nn.Linear and optim.SGD in double precision, from zero."""
    model = torch.nn.Linear(x.shape[1], int(y.max()) + 1, dtype=torch.float64)
    torch.nn.init.zeros_(model.weight), torch.nn.init.zeros_(model.bias)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=mom, weight_decay=wd)
    for rows in batches:
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(model(torch.from_numpy(x[rows]).double()), torch.from_numpy(y[rows]))
        loss.backward()
        optimizer.step()
    return model.weight.detach().numpy(), model.bias.detach().numpy()


@pytest.mark.parametrize("mom", [0.9, 0, 0.5])
@pytest.mark.parametrize("batchsize", [1, 5, 32])
def test_step_is_that_of_torch_optim_sgd(mom, batchsize):
    x, y = random_data()
    rs = np.random.RandomState(1)
    batches = rs.randint(len(x), size=(120, batchsize))
    points = [(0.01, 0), (0.01, 0.1), (0.1, 0.01), (0.001, 0.1), (0.3, 0.3), (0, 0.1)]
    model = ours(points, x, y, batches, mom)
    for g, (lr, wd) in enumerate(points):
        for mine, want in zip(model.weights(g), plain_torch(lr, wd, x, y, batches, mom)):
            assert np.abs(mine - want).max() <= 1e-5 * max(1, np.abs(want).max()), (lr, wd)


def test_grid_equals_separate_runs():
    x, y = random_data(n=300, d=33, C=11)
    batches = np.random.RandomState(2).randint(len(x), size=(200, 16))
    points = [(lr, wd) for lr in (0.1, 0.01) for wd in (0, 0.1)]
    together = ours(points, x, y, batches, 0.9)
    for g, point in enumerate(points):
        alone = ours([point], x, y, batches, 0.9)
        for a, b in zip(together.weights(g), alone.weights(0)):
            assert np.allclose(a, b, rtol=0, atol=2e-6)


def test_loss_is_the_mean_cross_entropy_before_the_step():
    x, y = random_data(C=5)
    model = TorchClassifiers([(0.1, 0), (0.1, 0.1)], 5, x.shape[1], 0.9)
    everything = np.arange(len(y))[None]
    assert np.allclose(model.steps(torch.from_numpy(x), everything, y[None], loss=True), np.log(5), atol=1e-6)
    want = [cross_entropy(x, y, *model.weights(g)) for g in range(2)]
    assert np.allclose(model.steps(torch.from_numpy(x), everything, y[None], loss=True), [want], atol=1e-5)


def cross_entropy(x, y, weight, bias):
    return torch.nn.functional.cross_entropy(torch.from_numpy(x @ weight.T + bias), torch.from_numpy(y)).item()


def test_state_passes_between_the_two_implementations():
    x, y = random_data()
    batches = np.random.RandomState(0).randint(len(x), size=(40, 6))
    points = [(0.1, 0.1), (0.01, 0)]
    whole = ours(points, x, y, batches, 0.9)
    for first, second in (TorchClassifiers, FusedSGD), (FusedSGD, TorchClassifiers):
        model = [C(points, 7, 17, 0.9) for C in (first, second)]
        model[0].steps(torch.from_numpy(x) if first is TorchClassifiers else x, batches[:15], y[batches[:15]])
        model[1].restore({k: v.copy() for k, v in model[0].state().items()})
        model[1].steps(torch.from_numpy(x) if second is TorchClassifiers else x, batches[15:], y[batches[15:]])
        for g in range(2):
            for a, b in zip(model[1].weights(g), whole.weights(g)):
                assert np.abs(a - b).max() < 1e-5


# --- mini-batches

def test_sampler_is_balanced_over_classes_and_within_them():
    labels = np.repeat([0, 1, 2, 3], [1, 2, 10, 500])
    np.random.RandomState(0).shuffle(labels)
    sampler = Sampler(labels, 64, seed=3)
    images, classes = map(np.concatenate, zip(*(sampler.batch(t) for t in range(1000))))
    assert (labels[images] == classes).all()
    n = len(classes)
    for c in range(4):
        of_class = images[classes == c]
        assert abs(len(of_class) - n / 4) < 5 * np.sqrt(n * 3 / 16)
        each = np.bincount(of_class, minlength=len(labels))[labels == c]
        expected = len(of_class) / len(each)
        assert (abs(each - expected) < 6 * np.sqrt(expected) + 1).all() and each.all()


def test_batches_depend_on_seed_and_iteration_only():
    labels = np.arange(30) % 6
    a, b = Sampler(labels, 8, 1), Sampler(labels, 8, 1)
    forwards = [a.batch(t) for t in range(1200)]
    for t in (1199, 0, 700, 511, 512):                  # in any order, as after a resumed run
        assert all(np.array_equal(u, v) for u, v in zip(b.batch(t), forwards[t]))
    assert not np.array_equal(Sampler(labels, 8, 2).batch(0)[0], forwards[0][0])
    assert not np.array_equal(forwards[0][0], forwards[512][0])


def test_sampler_refuses_a_class_without_images():
    with pytest.raises(ValueError, match="class 1 has no labelled image"):
        Sampler([0, 2, 2], 4, 1)
    with pytest.raises(ValueError, match="class 0 has no"):
        Sampler([], 4, 1)


# --- evaluation

@pytest.mark.parametrize("kind", [TorchClassifiers, FusedSGD])
def test_evaluation_counts_nan_as_wrong_and_the_bias(kind):
    model = kind([(0.1, 0), (0.2, 0)], 7, 3, 0.9)
    state = {k: v.copy() for k, v in model.state().items()}
    state["b"][:7] = [6.0, 5, 4, 3, 2, 1, 0]
    state["W"][7:] = np.nan
    model.restore(state)
    x = np.ones((7, 3), np.float32)
    store = [np.empty((7, 7), np.float32) for _ in range(2)]
    is_novel = np.array([False] * 4 + [True] * 3)
    x = torch.from_numpy(x) if kind is TorchClassifiers else x
    assert evaluate(model, x, np.arange(7), is_novel, store) == [(5 / 7, 1 / 3), (0, 0)]
    assert np.array_equal(store[0], np.tile([6, 5, 4, 3, 2, 1, 0], (7, 1))) and np.isnan(store[1]).all()


def test_point_names():
    assert point_file("a/b.npz", [(0.01, 1), (0.001, 0)], 1) == "a/b_lr0.001_wd0.npz"
    assert point_file("a/b.npz", [(0.1000001, 0), (0.1, 0)], 0) == "a/b_lr0.1000001_wd0.npz"
    assert point_file("a/b.npz", [(0.001, 0)], 0) == "a/b.npz"


# --- the script

def logreg(ddir, *words, check=True, **kwargs):
    environment = {**os.environ, "DDIR": str(ddir), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, os.path.join(ROOT, "logreg.py"), *map(str, words)], text=True,
                          capture_output=True, env=environment, **kwargs)
    if check:
        assert done.returncode == 0, done.stderr
    return done


@pytest.fixture(scope="module")
def ddir(tmp_path_factory):
    return make_data_directory(tmp_path_factory.mktemp("ddir"))


def figures(path):
    """The results of a record without the times."""
    with open(path) as f:
        return [[(r["iteration"], r["top5"], r["top5_novel"]) for r in run["results"]] for run in json.load(f)["runs"]]


def test_script_end_to_end(ddir, tmp_path):
    """Record, printed line, model and scores agree with one another and with plain torch on the same batches."""
    out = logreg(ddir, "--mode", "test", "--nlabeled", 2, "--seed", 1, "--maxiter", 150, "--lr", 0.01, "--wd", 0.01,
                 "--batchsize", 16, "--storemodel", tmp_path / "m.npz", "--storeL", tmp_path / "L.npy").stdout
    path = os.path.join(ddir, "logs/logreg/test_nl2_seed1_bs16_lr0.01_wd0.01_mi150.json")
    with open(path) as f:
        record = json.load(f)
    (run,) = record["runs"]
    (result,) = run["results"]
    assert record["complete"] and record["script"] == "logreg.py" and record["arguments"]["maxiter"] == 150
    assert (run["lr"], run["wd"], result["iteration"]) == (0.01, 0.01, 150)
    assert record["predicted_memory"] > 0 and record["peak_memory"] > 0
    (line,) = [m for m in map(LINE.fullmatch, out.splitlines()) if m]
    assert line.groups() == ("150", f"{result['top5']:.3f}", f"{result['top5_novel']:.3f}")
    assert os.listdir(os.path.dirname(path)) == [os.path.basename(path)]        # no state left behind

    split = load_split(os.path.join(ddir, "label_idx.json"), "test")
    x, y = read_features(os.path.join(ddir, "features/train.hdf5"))
    xtest, ytest = read_features(os.path.join(ddir, "features/val.hdf5"))
    rs = np.random.RandomState(1)
    rows = [np.flatnonzero(y == c) for c in split.base]
    for c in split.novel:
        of_class = np.flatnonzero(y == c)
        rs.shuffle(of_class)
        rows.append(of_class[:2])
    rows = np.concatenate(rows)
    labels = split.renumber(y[rows])
    sampler = Sampler(labels, 16, 1)
    weight, bias = plain_torch(0.01, 0.01, x[rows], labels, [sampler.batch(t)[0] for t in range(150)], 0.9)
    with np.load(tmp_path / "m.npz") as model:
        assert np.allclose(model["weight"], weight, atol=1e-5) and np.allclose(model["bias"], bias, atol=1e-5)
        assert np.array_equal(model["classes"], split.classes)
    test_rows, test_labels = images_to_test(ytest, split)
    scores = np.load(tmp_path / "L.npy")
    assert scores.dtype == np.float32 and np.allclose(scores, xtest[test_rows] @ weight.T + bias, atol=1e-4)
    right = [label in np.argsort(-s)[:5] for s, label in zip(scores, test_labels)]
    assert result["top5"] == pytest.approx(np.mean(right)) and 0.5 < result["top5"] < 1
    novel = split.is_novel[test_labels]
    assert result["top5_novel"] == pytest.approx(np.mean(np.array(right)[novel]))
    assert (record["nclass"], record["nlabelled_images"], record["ntest"]) == (15, len(rows), len(test_rows))


def test_a_cpu_does_not_need_torch(ddir, tmp_path, monkeypatch):
    """It takes longer to load than a small run."""
    (tmp_path / "torch.py").write_text("raise ImportError('torch was loaded')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    logreg(ddir, "--maxiter", 5, "--device", "cpu", "--record", tmp_path / "r.json")
    assert figures(tmp_path / "r.json")


def test_grid_run_validation_reports_and_names(ddir, tmp_path):
    words = ["--mode", "val", "--nlabeled", 1, "--maxiter", 120, "--batchsize", 8, "--evalevery", 50]
    for left_behind in (".L_lr0.1_wd0.1.1.tmp.npy", ".m_lr0.01_wd0.1.tmp.npz"):
        (tmp_path / left_behind).touch()        # by a run that was killed
    out = logreg(ddir, *words, "--lr", "0.1,0.01", "--wd", "0,0.1", "--record", tmp_path / "grid.json",
                 "--storeL", tmp_path / "L.npy", "--storemodel", tmp_path / "m.npz").stdout
    grid = figures(tmp_path / "grid.json")
    assert [r[0] for r in grid[0]] == [50, 100, 120] and len(grid) == 4
    lines = [line for line in out.splitlines() if "top-5" in line]
    assert len(lines) == 12 and lines[1].startswith("lr 0.1 wd 0.1 [") and LINE.search(lines[1]).group(1) == "50"
    assert sorted(p.name for p in tmp_path.glob("L_*")) == [
        "L_lr0.01_wd0.1.npy", "L_lr0.01_wd0.npy", "L_lr0.1_wd0.1.npy", "L_lr0.1_wd0.npy"]
    assert len(list(tmp_path.glob("m_lr*.npz"))) == 4 and not list(tmp_path.glob(".*.tmp.*"))
    logreg(ddir, *words, "--lr", 0.01, "--wd", 0.1, "--record", tmp_path / "alone.json", "--verbose")
    assert figures(tmp_path / "alone.json")[0] == grid[3]
    logreg(ddir, *words[:-2], "--evalevery", 0, "--lr", 0.01, "--wd", 0.1, "--record", tmp_path / "end.json")
    assert figures(tmp_path / "end.json")[0] == grid[3][-1:]


def test_bfloat16_gives_nearly_the_same_figures_under_another_name(ddir):
    words = ["--mode", "test", "--nlabeled", 2, "--maxiter", 200, "--lr", "0.01,0.1", "--wd", 0.01, "--batchsize", 16]
    records = []
    for precision in ("float32", "bfloat16"):
        logreg(ddir, *words, "--precision", precision, "--device", "cpu")
        name = "test_nl2_seed1_bs16_lr0.01,0.1_wd0.01_mi200" + ("_bfloat16" if precision == "bfloat16" else "")
        records.append(figures(os.path.join(ddir, "logs/logreg", name + ".json")))
    assert np.abs(np.array(records[0]) - records[1]).max() < .02


def test_diverging_run_is_recorded(ddir, tmp_path):
    out = logreg(ddir, "--mode", "test", "--maxiter", 200, "--evalevery", 100, "--lr", "1e6,0.01", "--wd", "10", "--record",
                 tmp_path / "r.json").stdout
    assert out.count("diverged") == 1 and "note: lr 1e+06 wd 10 diverged" in out
    diverged, sound = figures(tmp_path / "r.json")
    assert diverged == [(100, 0, 0), (200, 0, 0)] and sound[0][1] > 0.3


def test_killed_run_goes_on_to_the_same_figures(ddir, tmp_path):
    words = ["--mode", "val", "--maxiter", 6000, "--lr", "0.1,0.01", "--wd", "0.1", "--batchsize", 8, "--evalevery", 700,
             "--verbose"]
    whole = logreg(ddir, *words, "--record", tmp_path / "whole.json", "--storeL", tmp_path / "whole.npy")
    record, state = tmp_path / "killed.json", tmp_path / ".killed.json.state.npz"
    command = [sys.executable, os.path.join(ROOT, "logreg.py"), *map(str, words), "--record", str(record),
               "--storeL", str(tmp_path / "killed.npy"), "--checkpoint", "0.01"]
    process = subprocess.Popen(command, env={**os.environ, "DDIR": str(ddir), "OMP_NUM_THREADS": "1"},
                               stdout=subprocess.PIPE, text=True)
    for line in process.stdout:                         # after two reports there is a state that holds the first
        if "iteration 1400" in line:
            break
    deadline = time.time() + 20
    while not state.exists() and time.time() < deadline:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL and state.exists() and not record.exists()
    done = logreg(ddir, *command[2:])
    iteration = int(re.search(r"going on from iteration (\d+)", done.stdout).group(1))
    assert 0 < iteration < 6000
    assert figures(record) == figures(tmp_path / "whole.json")
    losses = {m.groups() for m in re.finditer(r"lr (.*) wd .* iteration (\d+) .* loss (.*)", done.stdout)}
    assert losses and losses <= {m.groups() for m in re.finditer(r"lr (.*) wd .* iteration (\d+) .* loss (.*)", whole.stdout)}
    for point in ("lr0.1_wd0.1", "lr0.01_wd0.1"):
        assert np.array_equal(np.load(tmp_path / f"killed_{point}.npy"), np.load(tmp_path / f"whole_{point}.npy"))
    assert not [p for p in os.listdir(tmp_path) if p.startswith(".")]


def test_default_record_name(ddir, monkeypatch):
    monkeypatch.setattr(sys, "argv", "logreg.py --mode val --lr 0.01,0.001 --wd 0,0.1 --seed 3 --maxiter 7".split())
    args = arguments()
    assert args.evalevery == 500 and args.lr == [0.01, 0.001]
    assert default_record(DataDir(ddir), args).endswith(
        "/logs/logreg/val_nl2_seed3_bs128_lr0.01,0.001_wd0,0.1_mi7.json")


@pytest.mark.parametrize("words, message", [
    (["--nlabeled", "21"], "nlabeled is 21, but novel class"),
    (["--nlabeled", "0"], "at least 1"),
    (["--lr", "0.1,x"], "'x' is not a number"),
    (["--lr", "0.1,nan"], "nan must be"),
    (["--wd", "-1"], "at least 0"),
    (["--wd", "0,0.0"], "repeats a value"),
    (["--mom", "2"], "at most 1"),
    (["--mode", "train"], "invalid choice"),
    (["--device", "cuda"], "sees 0 GPUs"),
])
def test_bad_arguments_take_one_line(ddir, words, message):
    if "cuda" in words and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    done = logreg(ddir, "--maxiter", 1, *words, check=False)
    assert done.returncode in (1, 2) and message in done.stderr and len(done.stderr.splitlines()) == 1


def test_memory_that_is_not_there_takes_one_line(ddir):
    def limit():
        resource.setrlimit(resource.RLIMIT_AS, (12 << 30, 12 << 30))

    done = logreg(ddir, "--maxiter", 1, "--batchsize", 10 ** 7, "--lr", "0.1,0.01", "--device", "cpu", check=False,
                  preexec_fn=limit)
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1
    assert re.search("training takes .* GB, the machine has .* free .*: lower --batchsize, or train fewer", done.stderr)


def test_bad_files_take_one_line(tmp_path):
    root = make_data_directory(tmp_path / "ddir", nclass=10, dim=6, per_class=3, nbg=10)
    train, val = (os.path.join(root, "features", name) for name in ("train.hdf5", "val.hdf5"))
    x, y = read_features(train)

    def expect(*parts):
        done = logreg(root, "--maxiter", 1, check=False)
        assert done.returncode == 1 and len(done.stderr.splitlines()) == 1 and "Traceback" not in done.stderr
        assert all(part in done.stderr for part in parts), done.stderr

    split = load_split(os.path.join(root, "label_idx.json"), "val")
    row = np.flatnonzero(y == split.base[0])[1]
    bad = x.copy()
    bad[row, 3] = np.nan
    write_features(train, bad, y)
    expect("train.hdf5", f"row {row} holds NaN")
    write_features(train, x[:, :5], y)
    expect("train.hdf5 has 5 columns", "val.hdf5 6")
    write_features(train, x, np.where(y == split.base[0], split.base[1], y))
    expect(f"class {split.base[0] + 1} of the split has no image")
    write_features(train, x, y)
    with open(val, "rb+") as f:
        f.truncate(1000)
    expect("val.hdf5", "1000 bytes", "truncated")
    os.unlink(val)
    expect("val.hdf5 does not exist")
    done = logreg("", "--maxiter", 1, check=False)
    assert done.returncode == 1 and "DDIR is not set" in done.stderr and len(done.stderr.splitlines()) == 1


def test_memory_prediction_counts_each_array_once():
    small = predict_memory(0, 1000, 100, 2048, 507, 1, 128)
    assert predict_memory(10 ** 8, 1000, 100, 2048, 507, 1, 128) - small == 10 ** 8
    more = predict_memory(0, 251000, 100, 2048, 507, 1, 128)
    assert 4 * 2048 * 250000 <= more - small <= 1.07 * 4 * 2048 * 250000


@pytest.fixture
def root(tmp_path):
    return make_data_directory(tmp_path / "ddir", nclass=10, dim=6, per_class=4, nbg=10)


def test_the_state_of_a_run_on_other_files_is_not_taken(root, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(RunState, "remove", lambda self: None)         # as if the run had been killed
    monkeypatch.setenv("DDIR", root)
    words = "--maxiter 600 --batchsize 8 --checkpoint 1e-9 --device cpu --record".split()
    monkeypatch.setattr(sys, "argv", ["logreg.py", *words, str(tmp_path / "r.json")])
    for change, resumed in (None, False), (None, True), (1, False):
        if change:
            os.utime(os.path.join(root, "features", "train.hdf5"), (change, change))
        main()
        assert ("going on from iteration" in capsys.readouterr().out) == resumed


@pytest.mark.parametrize("change", [
    {"iteration": 10 ** 12}, {"iteration": 10 ** 9}, {"iteration": -5}, {"iteration": 16.5}, {"iteration": "16"}, {"runs": []},
    {"runs": 5},
    {"runs": [{"lr": 5, "wd": 5, "results": []}]}, {"seconds": "a"}, {"seconds": float("nan")}, {"losses": [[["a"]]]},
    {"losses": {"a": 1}}, {"losses": [[[1.0, 2.0]]]}, {"top5": 2}, {"top5_novel": -1}, {"top5": None}])
def test_a_state_that_is_none_is_not_gone_on_from(root, tmp_path, monkeypatch, capsys, change):
    monkeypatch.setattr(RunState, "remove", lambda self: None)         # as if the run had been killed
    monkeypatch.setenv("DDIR", root)
    words = "--maxiter 40 --evalevery 10 --batchsize 8 --checkpoint 1e-9 --device cpu --record".split()
    monkeypatch.setattr(sys, "argv", ["logreg.py", *words, str(tmp_path / "r.json")])
    main()
    state = tmp_path / ".r.json.state.npz"
    with np.load(state) as f:
        content = dict(f)
    rest = json.loads(str(content["rest"]))
    assert len(rest["runs"][0]["results"]) == 3
    (rest["runs"][0]["results"][1] if set(change) & {"top5", "top5_novel"} else rest).update(change)
    content["rest"] = json.dumps(rest)
    np.savez(state, **content)
    figures = json.loads((tmp_path / "r.json").read_text())["runs"]
    capsys.readouterr()
    main()
    out = capsys.readouterr().out
    assert "r.json.state.npz is damaged" in out and "going on" not in out
    for run, again in zip(figures, json.loads((tmp_path / "r.json").read_text())["runs"]):
        assert [(r["iteration"], r["top5"]) for r in run["results"]] == [(r["iteration"], r["top5"]) for r in again["results"]]


def test_names_and_defaults_of_a_run(root, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["logreg.py"])
    args = arguments()
    assert (args.mode, args.nlabeled, args.seed, args.maxiter, args.batchsize) == ("val", 2, 1, 75000, 128)
    assert (args.lr, args.wd, args.mom, args.precision) == ([.001], [.01], .9, "float32")
    monkeypatch.setattr(sys, "argv", ["logreg.py", "--mom", "0.5"])
    assert default_record(DataDir(root), arguments()).endswith("_mi75000_mom0.5.json")


@pytest.mark.parametrize("output", ["r.json", "L.npy"])
def test_two_runs_do_not_write_one_file(root, tmp_path, output):
    with exclusive(str(tmp_path / output)):
        done = logreg(root, "--maxiter", 1, "--record", tmp_path / "r.json", "--storeL", tmp_path / "L.npy", check=False)
    assert done.returncode == 1 and f"another process is writing {tmp_path / output}" in done.stderr


def test_a_state_that_cannot_be_written_does_not_end_the_run(root, tmp_path, monkeypatch, capsys):
    def full(*args, **rest):
        raise OSError("the disk is full")

    monkeypatch.setattr(np, "savez", full)
    monkeypatch.setenv("DDIR", root)
    words = "--maxiter 600 --batchsize 8 --checkpoint 1e-9 --device cpu --record".split()
    monkeypatch.setattr(sys, "argv", ["logreg.py", *words, str(tmp_path / "r.json")])
    main()
    assert capsys.readouterr().out.count("note: no state was kept, to go on from should this run be killed (the disk is full)") == 1
    assert figures(tmp_path / "r.json")[0][-1][0] == 600


def test_outputs_do_not_replace_what_is_read(root):
    for name in ("label_idx.json", "features/train.hdf5", "features/val.hdf5"):
        for option in ("--record", "--storemodel", "--storeL"):
            done = logreg(root, "--maxiter", 1, option, os.path.join(root, name), check=False)
            assert done.returncode == 1 and f"{name} is an input" in done.stderr
