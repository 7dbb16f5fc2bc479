"""The whole chain through the real scripts, from fonts to the table: run_demo.bash at a tiny size."""
import os
import subprocess
import sys

import h5py
import numpy as np
import pytest

CHECKOUT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
NBG, CLASSES, TRAIN, VAL = 400, 16, 12, 6
TINY = f"""
nlabeled: [1, 2]
seeds: [1]
logreg: {{lr: [0.01], wd: [0, 0.01], batchsize: [16], maxiter: 500}}
diffusion: {{nbg: [0, 100, {NBG}], k: 10, dim: 16, niter: 3, niter_test: 3}}
"""


def run_demo(root):
    environment = {k: v for k, v in os.environ.items() if k not in ("NBG", "NLABELED", "SEEDS", "PARAMS")}
    out = subprocess.run(["bash", "run_demo.bash"], cwd=CHECKOUT, text=True, capture_output=True, env={
        **environment, "DDIR": str(root), "EXPERIMENT": str(root / "tiny.yaml"), "EPOCHS": "1", "JOBS": "2",
        "DATA": f"--nclass {CLASSES} --ntrain {TRAIN} --nval {VAL}", "PYTHON": sys.executable})
    assert out.returncode == 0, out.stdout[-3000:] + out.stderr[-3000:]
    return out.stdout


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    root = tmp_path_factory.mktemp("chain") / "demo data"
    root.mkdir()
    (root / "tiny.yaml").write_text(TINY)
    return root, run_demo(root)


def test_files_have_the_fixed_names_and_sizes(demo):
    root, _ = demo
    for name, n in (("features/train.hdf5", CLASSES * TRAIN), ("features/val.hdf5", CLASSES * VAL),
                    ("features/f100m/block0.hdf5", NBG)):
        with h5py.File(root / name) as f:
            assert f["all_feats"].shape == (n, 512) and f["count"][0] == n
    assert (root / "features/f100m/concatenated_PCAR16.raw").stat().st_size == NBG * 16 * 4
    for nbg in (100, NBG):
        I = np.fromfile(root / f"knngraph/ndis{nbg}_k16_I_11.int32", "<i4").reshape(nbg, 16)
        assert ((I >= 0) & (I < nbg)).all()
        assert (root / f"knngraph/ndis{nbg}_k16_D_11.float32").stat().st_size == nbg * 16 * 4
        assert (root / f"knngraph/ndis{nbg}.index").exists()


def test_table_and_pictures(demo):
    root, out = demo
    rows = [line for line in out.splitlines() if line.startswith("| ")]
    names = [row.split("|")[1].strip() for row in rows[-5:]]
    assert names == ["-" * len(names[0]), "logistic regression", "diffusion, no background",
                     "diffusion, 100 background images", f"diffusion, {NBG} background images"]
    for row in rows[-4:]:
        for cell in row.split("|")[2:4]:
            both, novel = map(float, cell.split("/"))
            assert 0 <= novel <= 100 and 30 < both <= 100       # 8 classes: chance is 5 of 8
    assert "accuracy of diffusion grows with the background" in out
    for name in ("logs/tiny.png", "demo_examples.png"):
        assert (root / name).read_bytes().startswith(b"\x89PNG") and str(root / name) in out


def test_second_run_makes_nothing_anew(demo):
    root, first = demo

    def made():
        return {path: path.stat().st_mtime_ns for path in root.rglob("*") if path.is_file()
                and path.suffix in (".zip", ".jpg", ".tar", ".hdf5", ".vt", ".raw", ".int32", ".float32", ".index")
                or path.parent.name == "tiny" and path.name.startswith(("val", "test"))}
    before = made()
    assert len(before) > 100
    out = run_demo(root)
    assert made() == before
    assert out[out.index("| top-5"):out.index("Means over")] == first[first.index("| top-5"):first.index("Means over")]
