"""The benchmarks run from end to end on little data, and check their results themselves."""
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

CHECKOUT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
NBG = 3000


def benchmark(script, *args, ddir=None, returncode=0):
    env = {**os.environ, **({"DDIR": str(ddir)} if ddir else {})}
    out = subprocess.run([sys.executable, os.path.join("benchmarks", script), *map(str, args)], cwd=CHECKOUT, env=env,
                         capture_output=True, text=True)
    assert out.returncode == returncode, out.stderr
    return out.stderr if returncode else out.stdout


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("benchmarks") / "data"
    benchmark("make_data.py", root, "--nclass", 24, "--per-class", 20, "--val-per-class", 4, "--nbg", NBG, "--raw", "--dim",
              300)
    out = subprocess.run([sys.executable, "build_graph.py", str(NBG)], cwd=CHECKOUT, env={**os.environ, "DDIR": str(root)},
                         capture_output=True, text=True)
    assert out.returncode == 0, out.stderr
    return root


def test_scale(data, tmp_path):
    larger = data / "knngraph" / "ndis10000.index"
    larger.touch()                      # the name of another size begins with that of one of these
    benchmark("scale.py", "--nbg", 1000, NBG, "--niter", 2, "--anew", "--out", tmp_path / "scale.md", ddir=data)
    assert larger.exists()
    larger.unlink()
    lines = (tmp_path / "scale.md").read_text().splitlines()
    assert sum(line.startswith("| 1,000 |") for line in lines) == sum(line.startswith("| 3,000 |") for line in lines) == 3
    assert os.path.exists(data / "knngraph" / f"ndis{NBG}_k32_I_11.int32")
    kept = benchmark("scale.py", "--nbg", NBG, "--niter", 1, ddir=data)
    assert "recall@32 1.000" in kept and "further runs" in kept and "first run" not in kept
    odd = tmp_path / "data[1]"          # which a pattern of file names would not find
    (odd / "knngraph").mkdir(parents=True)
    for name in ("features", "label_idx.json"):
        (odd / name).symlink_to(data / name)
    (odd / "knngraph/ndis1000.index").write_text("of another graph")
    assert "recall@64 1.000" in benchmark("scale.py", "--nbg", 1000, "--niter", 0, "--k", 40, "--anew", ddir=odd)
    (odd / "logs/build_graph/ndis1000_k64.json").unlink()       # as of a published graph
    assert "build_graph.py" not in benchmark("scale.py", "--nbg", 1000, "--niter", 0, "--k", 40, ddir=odd).split("niter=0")[1]


def test_accuracy_beside_exact_graphs(data, tmp_path):
    """The graphs of so few are exact, so there is no difference; of a graph that lacks neighbours there is one."""
    options = ["--nbg", NBG, "--exact", tmp_path / "exact", "--seeds", 1, "--nlabeled", 2, "--niter", 2]
    benchmark("accuracy.py", *options, "--out", tmp_path / "a.md", ddir=data)
    text = (tmp_path / "a.md").read_text()
    assert text.count("(+0.0000)") == 6 and "single run is 0.0000" in text
    worse = tmp_path / "worse"
    (worse / "knngraph").mkdir(parents=True)
    for name in ("features", "label_idx.json"):
        (worse / name).symlink_to(data / name)
    for name, dtype, none in (("I_11.int32", "i4", -1), ("D_11.float32", "f4", -np.inf)):
        graph = np.fromfile(data / "knngraph" / f"ndis{NBG}_k32_{name}", dtype).reshape(NBG, 32)
        graph[:, 3:] = none
        graph.tofile(worse / "knngraph" / f"ndis{NBG}_k32_{name}")
    assert "single run is 0.0000" not in benchmark("accuracy.py", *options, ddir=worse)
    other = tmp_path / "other"
    (other / "features").mkdir(parents=True)
    (other / "label_idx.json").touch()
    assert "is of other data" in benchmark("accuracy.py", *options, ddir=other, returncode=1)


def test_data_of_fewer_images_leave_none_of_more(tmp_path):
    few = ["--nclass", 8, "--per-class", 3, "--val-per-class", 2, "--dim", 20, "--block", 10]
    benchmark("make_data.py", tmp_path, *few, "--nbg", 30)
    message = benchmark("make_data.py", tmp_path, *few, "--nbg", 15, returncode=1)
    assert f"{tmp_path}/features/f100m/block2.hdf5 is of more background images" in message


def test_a_script_that_is_killed(monkeypatch):
    monkeypatch.syspath_prepend(os.path.join(CHECKOUT, "benchmarks"))       # not for long: names there are those of scripts
    import runs
    with pytest.raises(ValueError, match="test_matmul.py ended with status -9"):
        runs.timed("none.json", "test_matmul.py", program=["-c", "import os; os.kill(os.getpid(), 9)"])


def test_product(data, tmp_path):
    benchmark("product.py", "--nbg", NBG, "--columns", 40, "--rounds", 2, "--out", tmp_path / "product.md", ddir=data)
    assert "ours, renumbered" in (tmp_path / "product.md").read_text()


def test_product_on_a_gpu(data, tmp_path):
    if torch.cuda.is_available():
        benchmark("gpu_product.py", "--nbg", NBG, "--columns", 80, "--rounds", 2, "--out", tmp_path / "product.md", ddir=data)
        assert "ours, renumbered" in (tmp_path / "product.md").read_text()
    else:
        assert "sees no GPU" in benchmark("gpu_product.py", "--nbg", NBG, ddir=data, returncode=1)


@pytest.mark.parametrize("options", [[], ["--inorder", "--k", 7]])
def test_many_entries(options):
    assert "| one image more |" in benchmark("many_entries.py", "--nodes", 5000, *options)


def test_pruning(data):
    assert "| 2 |" in benchmark("pruning.py", "--nbg", NBG, "--niter", 2, ddir=data)


def test_diffusion_beside_the_papers_way(data, tmp_path):
    pytest.importorskip("scipy")        # of benchmarks/requirements.txt
    benchmark("diffusion.py", "--nbg", NBG, "--parts", "paper", "--queries", 50, "--out", tmp_path / "d.md", ddir=data)
    text = (tmp_path / "d.md").read_text()
    assert "the paper's way" in text and "background against labelled images" in text
    assert "no graph of 77 background images" in benchmark("diffusion.py", "--nbg", 77, ddir=data, returncode=1)


def test_logreg():
    assert "ours, 9 points at once" in benchmark("logreg.py", "--nimages", 200, "--nclass", 10, "--dim", 64, "--iterations", 3,
                                                 "--rounds", 1, "--batchsizes", 16)
