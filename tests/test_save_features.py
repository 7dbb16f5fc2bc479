import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import zipfile
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

import save_features
from lowshot import feature_writer, imagesets
from lowshot.feature_writer import FeatureWriter, first_difference, made_from
from lowshot.features import FeatureFile
from lowshot.imagesets import Batches, Preprocess, ZipSet
from lowshot.networks import FromPixels, for_inference, load_checkpoint, make_network, save_checkpoint, usual_transforms
from test_imagesets import picture, plain, write_zip

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
MEAN, STD = [.485, .456, .406], [.229, .224, .225]
N = 45
MISSING, DAMAGED = 7, 31


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A data directory with 45 background images, one missing and one cut off, a checkpoint, and the features that the
    network as it is gives, image by image."""
    root = tmp_path_factory.mktemp("ddir")
    members = {f"{i:03d}.jpg": picture(i) for i in range(N) if i != MISSING}
    members[f"{DAMAGED:03d}.jpg"] = members[f"{DAMAGED:03d}.jpg"][:200]
    write_zip(str(root / "yfcc100m/00/000.zip"), members)
    torch.manual_seed(0)
    network = make_network("ResNet10", 5).eval()
    for name, t in network.state_dict().items():
        if name.endswith("running_mean"):
            t.normal_(0, 0.1)
    save_checkpoint(network, root / "89.tar", 89)
    expected = []
    for i in range(N):
        x = np.zeros((32, 32, 3)) if i in (MISSING, DAMAGED) else plain(members[f"{i:03d}.jpg"])
        x = ((x / 255 - MEAN) / STD).transpose(2, 0, 1)[None].astype(np.float32)
        with torch.inference_mode():
            expected.append(network.trunk(torch.from_numpy(x)).numpy()[0])
    return root, np.array(expected)


@pytest.fixture
def script(data, tmp_path, monkeypatch, capsys):
    """Runs main() in this process with arguments in place of the usual ones; returns what it printed."""
    root, _ = data
    monkeypatch.setenv("DDIR", str(root))
    threads = torch.get_num_threads()

    def call(**changes):
        args = {"cfg": "demo_background.yaml", "model": "ResNet10", "modelfile": root / "89.tar",
                "outfile": tmp_path / "block0.hdf5", "workers": 2, "device": "cpu", **changes}
        flags = [f"--{k}" for k, v in args.items() if v is True]
        words = [w for k, v in args.items() if v is not None and v is not True
                 for w in (f"--{k}", str(v))]
        monkeypatch.setattr(sys, "argv", ["save_features.py", *words, *flags])
        monkeypatch.setattr(save_features, "report_speed", lambda *a: None)
        capsys.readouterr()
        save_features.main()
        return capsys.readouterr().out
    yield call
    torch.set_num_threads(threads)


def contents(path):
    with h5py.File(path) as f:
        return {name: f[name][:] for name in f}


def close(found, expected):
    return np.abs(found - expected).max() <= 1e-4 * np.abs(expected).max()


def check(path, expected, i0=0, i1=N):
    f = contents(path)
    n = i1 - i0
    assert {k: (v.dtype, v.shape) for k, v in f.items()} == {
        "all_feats": (np.float32, (n, 512)), "all_labels": (np.int32, (n,)), "count": (np.int32, (1,)),
        "readable": (bool, (n,))}
    assert f["count"][0] == n and close(f["all_feats"], expected[i0:i1])
    assert (np.flatnonzero(~f["readable"]) + i0).tolist() == [i for i in (MISSING, DAMAGED) if i0 <= i < i1]


# ---------------------------------------------------------------------------------------------- the script

@pytest.mark.parametrize("batchsize,workers", [(None, 2), (1, 1), (7, 3), (1000, 1)])
def test_features_equal_the_network_as_it_is(data, script, tmp_path, batchsize, workers):
    out = script(batchsize=batchsize, workers=workers)
    check(tmp_path / "block0.hdf5", data[1])
    assert "2 of 45 images unreadable" in out
    assert "(1 missing, 1 damaged): 00/000.zip/007.jpg, 00/000.zip/031.jpg; a damaged one: 00/000.zip/031.jpg: " in out
    assert os.listdir(tmp_path) == ["block0.hdf5"]
    with FeatureFile(tmp_path / "block0.hdf5") as f:            # readers may map it
        assert f._fd is not None and close(f.read([44, 3]), data[1][[44, 3]])


@pytest.mark.parametrize("i0,i1", [(0, 1), (5, 20), (44, -1), (40, 1000)])
def test_blocks(data, script, tmp_path, i0, i1):
    out = script(i0=i0, i1=i1)
    stop = N if i1 < 0 or i1 > N else i1
    check(tmp_path / "block0.hdf5", data[1], i0, stop)
    assert ("stopping there" in out) == (i1 > N)


@pytest.mark.parametrize("changes,message", [
    ({"i0": 45}, "has 45 images"), ({"i0": 5, "i1": 5}, "no image"), ({"i0": 5, "i1": 2}, "no image"),
    ({"cfg": "nothing.yaml"}, "nothing.yaml"), ({"model": "ResNet50"}, "trunk.4.C1.weight"),
    ({"model": "ResNet9"}, "unknown network"), ({"modelfile": "/nowhere/89.tar"}, "does not exist"),
    ({"modelfile": None}, "--modelfile"), ({"device": "cuda:99"}, "GPUs"), ({"device": "tpu"}, "--device"),
    ({"cfg": "demo_train.yaml"}, "imagenet_meta_train.json does not exist")])
def test_bad_arguments(script, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message) as e:
        script(**changes)
    assert "\n" not in str(e.value) and not os.listdir(tmp_path)


def test_crop_of_vision_transformers(script, tmp_path, monkeypatch):
    from lowshot import networks
    from lowshot.packages import load_torchvision
    network = load_torchvision().models.VisionTransformer(224, 32, num_layers=1, num_heads=1, hidden_dim=8, mlp_dim=8)
    monkeypatch.setattr(networks, "make_network", lambda *a, **k: network)
    with pytest.raises(ValueError, match="vit_b_32 takes images of 224x224 only, demo_background.yaml has crop: 32: it needs"):
        script(model="vit_b_32", modelfile=None)
    assert not os.listdir(tmp_path)


def test_other_transforms_than_those_of_torchvisions_weights(script, tmp_path):
    torch.save(make_network("resnet18").state_dict(), tmp_path / "r.pth")
    made = dict(model="resnet18", modelfile=tmp_path / "r.pth", i1=2, outfile=tmp_path / "x.hdf5")
    assert ("note: torchvision's weights of resnet18 were made for resize: 256, crop: 224; demo_background.yaml has "
            "resize: null, crop: 32\n") in script(**made)
    (tmp_path / "c.yaml").write_text("dataset: {kind: yfcc100m, root: '${DDIR}/yfcc100m'}\n")
    assert "were made for" not in script(cfg=tmp_path / "c.yaml", overwrite=True, **made)
    assert "were made for" not in script()


def test_usual_transforms():
    usual = [{"resize": r, "crop": 224, "mean": MEAN, "std": STD} for r in (232, 256)]
    assert usual_transforms("resnet50", pretrained=True) == usual[:1]
    assert all(u in usual_transforms("resnet50", pretrained=False) for u in usual)


def test_ddir_must_be_set(script, monkeypatch):
    for value in ("", None):
        monkeypatch.setenv("DDIR", "") if value == "" else monkeypatch.delenv("DDIR")
        with pytest.raises(ValueError, match="DDIR is not set"):
            script()


def test_no_readable_image_is_an_error(script, tmp_path, capsys):
    (tmp_path / "zips/00").mkdir(parents=True)
    with zipfile.ZipFile(tmp_path / "zips/00/000.zip", "w") as f:
        for i in range(30):
            f.writestr(f"{i:03d}.jpg", b"no image")
    (tmp_path / "c.yaml").write_text(f"dataset: {{kind: yfcc100m, root: {tmp_path}/zips, length: 30}}\n"
                                     "transforms: {resize: null, crop: 32}")
    with pytest.raises(ValueError, match="none of the 30 images could be read .0 missing, 30 damaged.*009.jpg and 20 more; "):
        script(cfg=tmp_path / "c.yaml")
    assert sorted(os.listdir(tmp_path)) == ["c.yaml", "zips"]
    os.truncate(tmp_path / "zips/00/000.zip", 700)
    with pytest.raises(ValueError, match="000.zip .700 bytes. is truncated, or no zip file: copy it again, or remove it"):
        script(cfg=tmp_path / "c.yaml")
    os.unlink(tmp_path / "zips/00/000.zip")
    with pytest.raises(ValueError, match="none of the 30 images could be read .30 missing, 0 damaged"):
        script(cfg=tmp_path / "c.yaml")
    assert "note: 1 of 1 zip files are not there, " in capsys.readouterr().out


def test_complete_and_other_outputs(data, script, tmp_path):
    script()
    path = tmp_path / "block0.hdf5"
    before = os.stat(path)
    assert "complete, nothing to do" in script()
    assert "complete, nothing to do" in script(overwrite=True, workers=1, batchsize=3)
    assert os.stat(path).st_mtime_ns == before.st_mtime_ns
    for changes, message in (({"i1": 10}, "i1 = 45, now 10"), ({"cfg": "demo_big.yaml"}, "transforms: crop = 32, now 64")):
        if "cfg" in changes:
            changes = {"cfg": tmp_path / "big.yaml"}
            changes["cfg"].write_text("dataset: {kind: yfcc100m, root: '${DDIR}/yfcc100m'}\n"
                                      "transforms: {resize: null, crop: 64}")
        with pytest.raises(ValueError, match=message):
            script(**changes)
    write_zip(str(tmp_path / "zips/00/000.zip"), {f"{i:03d}.jpg": picture(i) for i in range(N)})
    (tmp_path / "other.yaml").write_text(f"dataset: {{kind: yfcc100m, root: {tmp_path}/zips}}\n"
                                         "transforms: {resize: null, crop: 32}")
    with pytest.raises(ValueError, match="made from other images .names, labels or sizes differ., or it is damaged"):
        script(cfg=tmp_path / "other.yaml")
    script(i1=10, overwrite=True)
    check(path, data[1], 0, 10)


def test_a_file_that_does_not_tell_is_left_alone(script, tmp_path):
    with h5py.File(tmp_path / "block0.hdf5", "w") as f:
        f["all_feats"] = np.zeros((3, 2), np.float32)
    before = (tmp_path / "block0.hdf5").read_bytes()
    with pytest.raises(ValueError, match="unknown arguments"):
        script()
    assert (tmp_path / "block0.hdf5").read_bytes() == before


def test_bad_network_output(data, script, tmp_path):
    network = make_network("ResNet10")
    load_checkpoint(network, data[0] / "89.tar")
    network.trunk[7].BN2.running_var.fill_(-1)          # finite, but its root is not
    save_checkpoint(network, tmp_path / "bad.tar", 1)
    with pytest.raises(ValueError, match="features of image 0 are NaN"):
        script(modelfile=tmp_path / "bad.tar")
    assert not (tmp_path / "block0.hdf5").exists()


def test_labels_of_the_other_kinds(data, script, tmp_path):
    os.makedirs(tmp_path / "images/b")
    os.makedirs(tmp_path / "images/a")
    for i, name in enumerate(("b/0.jpg", "a/0.png", "a/1.jpg")):
        (tmp_path / "images" / name).write_bytes(picture(i, 50, 40))
    (tmp_path / "meta.json").write_text(json.dumps({"image_names": ["images/b/0.jpg", "images/a/1.jpg"],
                                                    "image_labels": [41, 7]}))
    (tmp_path / "f.yaml").write_text(f"dataset: {{kind: folder, root: {tmp_path}/images}}\n"
                                     "transforms: {resize: 32, crop: 32}")
    (tmp_path / "m.yaml").write_text(f"dataset: {{kind: imagenet, meta: {tmp_path}/meta.json}}\n"
                                     "transforms: {resize: 32, crop: 32}")
    out = script(cfg=tmp_path / "f.yaml", outfile=tmp_path / "f.hdf5")
    assert "2 classes in sorted order, by label: 0 a, 1 b; label_idx.json counts them from 1\n" in out
    script(cfg=tmp_path / "m.yaml", outfile=tmp_path / "m.hdf5")
    f, m = contents(tmp_path / "f.hdf5"), contents(tmp_path / "m.hdf5")
    assert f["all_labels"].tolist() == [0, 0, 1] and m["all_labels"].tolist() == [41, 7]
    assert close(m["all_feats"], f["all_feats"][[2, 1]])
    assert f["class_names"].tolist() == [b"a", b"b"] and "class_names" not in m
    with FeatureFile(tmp_path / "f.hdf5") as file:
        assert file._fd is not None and close(file.read([2, 1]), m["all_feats"])
    for c in range(19):
        os.makedirs(tmp_path / f"images/c{c:02d}")
    out = script(cfg=tmp_path / "f.yaml", outfile=tmp_path / "many.hdf5")
    assert "21 classes in sorted order, by label: 0 a, 1 b, ..., 20 c18;" in out


# ---------------------------------------------------------------------------------------------- cut off

def test_going_on_after_an_interruption(data, script, tmp_path, monkeypatch):
    original = Batches.decode
    calls = []

    def cut_off(self, b, files):
        calls.append(self.i0 + b * self.batchsize)
        if b == 3:
            raise KeyboardInterrupt
        return original(self, b, files)
    monkeypatch.setattr(Batches, "decode", cut_off)
    with pytest.raises(KeyboardInterrupt):
        script(batchsize=5, workers=1)
    assert sorted(os.listdir(tmp_path)) == ["block0.hdf5.partial", "block0.hdf5.partial.json"]
    done = json.loads((tmp_path / "block0.hdf5.partial.json").read_text())["done"]
    assert done in (5, 10, 15)

    # another network, block or set may not go on with it
    torch.manual_seed(9)
    save_checkpoint(make_network("ResNet10"), tmp_path / "other.tar", 1)
    for changes, message in (({"modelfile": tmp_path / "other.tar"}, "modelfile_sha256"), ({"i1": 44}, "i1 = 45"),
                             ({"i0": 1}, "i0 = 0, now 1")):
        with pytest.raises(ValueError, match="partial was begun with.*" + message):
            script(**changes)

    monkeypatch.setattr(Batches, "decode", lambda self, b, files: calls.append(self.i0) or original(self, b, files))
    calls.clear()
    out = script(batchsize=8)
    assert f"going on at image {done}: {done} of 45" in out and min(calls) == done
    assert "1 missing, 1 damaged" in out
    (tmp_path / "other.tar").unlink()
    assert os.listdir(tmp_path) == ["block0.hdf5"]
    check(tmp_path / "block0.hdf5", data[1])


def test_overwrite_begins_anew(data, script, tmp_path):
    with FeatureWriter(str(tmp_path / "block0.hdf5"), N, 512, np.zeros(N), {"made": "otherwise"}) as out:
        out.write(np.full((20, 512), 5, np.float32), np.ones(20, bool))
    with pytest.raises(ValueError, match="begun with"):
        script()
    script(overwrite=True)
    check(tmp_path / "block0.hdf5", data[1])


def test_killed_script(data, tmp_path):
    """kill -9 once some rows were saved; the same command then gives what an undisturbed run gives."""
    root, _ = data
    (tmp_path / "images").mkdir()
    for i in range(300):
        (tmp_path / f"images/{i:03d}.png").write_bytes(picture(i, 300, 280, "PNG"))
    (tmp_path / "c.yaml").write_text(f"dataset: {{kind: folder, root: {tmp_path}/images}}\n"
                                     "loader: {batchsize: 8}")
    command = [sys.executable, "save_features.py", "--cfg", str(tmp_path / "c.yaml"), "--model", "ResNet10",
               "--modelfile", str(root / "89.tar"), "--device", "cpu", "--workers", "1", "--outfile"]
    cut, undisturbed = str(tmp_path / "cut.hdf5"), str(tmp_path / "undisturbed.hdf5")
    process = subprocess.Popen([*command, cut], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    for _ in range(2400):
        if os.path.exists(cut + ".partial.json") or process.poll() is not None:
            break
        time.sleep(0.01)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert not os.path.exists(cut)
    second = subprocess.run([*command, cut], cwd=ROOT, capture_output=True, text=True)
    assert second.returncode == 0, second.stderr
    assert "going on at image" in second.stdout and "images/s; the same network fed from memory" in second.stdout
    subprocess.run([*command, undisturbed], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    a, b = contents(cut), contents(undisturbed)
    assert a["readable"].all() and all(np.allclose(a[k], b[k], rtol=1e-4, atol=1e-5) for k in b)
    assert sorted(os.listdir(tmp_path)) == ["c.yaml", "cut.hdf5", "images", "undisturbed.hdf5"]


WRITE_AND_DIE = """
import os, signal, sys
import numpy as np
from lowshot.feature_writer import FeatureWriter
out = FeatureWriter(sys.argv[1], 40, 3, np.arange(40), {"a": 1}, period=0)
for i in range(out.done, 40, 10):
    if i == int(sys.argv[2]):
        os.pwrite(out.file.fileno(), b"half a row", out.offsets["all_feats"] + i * 12)
        os.kill(os.getpid(), signal.SIGKILL)
    out.write(np.arange(3 * i, 3 * i + 30).reshape(10, 3), np.arange(i, i + 10) % 7 != 0)
out.finish()
"""


def test_writer_killed_at_every_step(tmp_path):
    path = str(tmp_path / "x.hdf5")
    for cut in (0, 10, 20, 30):
        died = subprocess.run([sys.executable, "-c", WRITE_AND_DIE, path, str(cut)], cwd=ROOT)
        assert died.returncode == -signal.SIGKILL and not os.path.exists(path)
        if cut:
            assert json.loads((tmp_path / "x.hdf5.partial.json").read_text())["done"] == cut
    assert subprocess.run([sys.executable, "-c", WRITE_AND_DIE, path, "99"], cwd=ROOT).returncode == 0
    f = contents(path)
    assert np.array_equal(f["all_feats"], np.arange(120).reshape(40, 3)) and f["count"].tolist() == [40]
    assert np.array_equal(f["all_labels"], np.arange(40)) and np.array_equal(f["readable"], np.arange(40) % 7 != 0)
    assert os.listdir(tmp_path) == ["x.hdf5"] and made_from(path) == {"a": 1}


def test_what_a_link_leads_to_is_written(tmp_path):
    (tmp_path / "far").mkdir()
    os.symlink("far/there.hdf5", tmp_path / "link.hdf5")
    with FeatureWriter(str(tmp_path / "link.hdf5"), 3, 2, np.arange(3), {}) as out:
        out.write(np.ones((3, 2), np.float32), np.ones(3, bool))
        out.finish()
    assert os.path.islink(tmp_path / "link.hdf5") and os.listdir(tmp_path / "far") == ["there.hdf5"]


def test_notes_of_rows_that_could_not_be_written_do_not_count(tmp_path, monkeypatch):
    path = str(tmp_path / "x.hdf5")
    with pytest.raises(OSError, match="No space"):
        with FeatureWriter(path, 6, 2, np.zeros(6), {}, period=0) as out:
            assert os.stat(path + ".partial").st_blocks * 512 >= 6 * 2 * 4      # its place is reserved
            out.write(np.ones((3, 2)), np.zeros(3, bool), {"damaged": 3})
            monkeypatch.setattr(os, "pwrite", lambda *a: (_ for _ in ()).throw(OSError(28, "No space left on device")))
            out.write(np.ones((3, 2)), np.zeros(3, bool), {"damaged": 6})
    monkeypatch.undo()
    with FeatureWriter(path, 6, 2, np.zeros(6), {}) as out:
        assert out.done == 3 and out.notes == {"damaged": 3}


def test_progress_of_a_file_that_is_gone_is_not_believed(tmp_path):
    path = str(tmp_path / "x.hdf5")
    with FeatureWriter(path, 4, 2, np.zeros(4), {}, period=0) as out:
        out.write(np.ones((3, 2)), np.ones(3, bool))
    os.unlink(path + ".partial")
    (tmp_path / ".x.hdf5.77.tmp.partial").touch()           # of a process that was killed while it made the file
    with FeatureWriter(path, 4, 2, np.zeros(4), {}) as out:
        assert out.done == 0 and not os.path.exists(path + ".partial.json")
    assert not (tmp_path / ".x.hdf5.77.tmp.partial").exists()


def test_what_is_not_gone_on_with_takes_no_room(tmp_path, monkeypatch):
    path = str(tmp_path / "x.hdf5")
    (tmp_path / "x.hdf5.partial").write_bytes(bytes(1000))      # of a process that was killed before it said what it is
    disk_usage = shutil.disk_usage
    monkeypatch.setattr(feature_writer.shutil, "disk_usage", lambda folder: disk_usage(folder)._replace(
        free=0 if os.path.exists(path + ".partial") else 1 << 20))
    with FeatureWriter(path, 4, 2, np.zeros(4), {}) as out:
        assert out.done == 0


def test_class_names_are_kept_as_they_are(tmp_path):
    path, names = str(tmp_path / "x.hdf5"), ["a", "é ß", os.fsdecode(b"\xff")]
    with FeatureWriter(path, 3, 2, np.arange(3), {}, class_names=names) as out:
        out.write(np.ones((3, 2)), np.ones(3, bool))
        out.finish()
    assert [os.fsdecode(name) for name in contents(path)["class_names"]] == names


def test_damaged_partial_file(tmp_path):
    path = str(tmp_path / "x.hdf5")
    with FeatureWriter(path, 4, 2, np.zeros(4), {}, period=0) as out:
        out.write(np.ones((4, 2)), np.ones(4, bool))
        before = Path(path + ".partial").read_bytes()
        Path(path + ".partial").write_bytes(bytes(512) + before[512:])
        with pytest.raises(ValueError, match="damaged .*: delete it"):
            out.finish()
    with pytest.raises(ValueError, match="damaged .*: delete it"):
        FeatureWriter(path, 4, 2, np.zeros(4), {})
    Path(path + ".partial").write_bytes(before)
    with FeatureWriter(path, 4, 2, np.zeros(4), {}) as out:
        out.finish()
    assert os.listdir(tmp_path) == ["x.hdf5"]


def test_truncated_partial_file(tmp_path):
    path = str(tmp_path / "x.hdf5")
    with FeatureWriter(path, 400, 20, np.zeros(400), {}) as out:
        out.write(np.ones((3, 20)), np.ones(3, bool))
    os.truncate(path + ".partial", 3000)
    with pytest.raises(ValueError, match="3000 bytes"):
        FeatureWriter(path, 400, 20, np.zeros(400), {})
    state = json.loads(Path(path + ".partial.json").read_text())
    for damage in ({"offsets": {name: None for name in state["offsets"]}}, {"offsets": []}, {"made_from": "x"}, {"notes": [1]},
                   {"done": 1.5}, {"done": True}, {"offsets": {**state["offsets"], "all_feats": "abc"}}):
        Path(path + ".partial.json").write_text(json.dumps({**state, **damage}))
        with pytest.raises(ValueError, match="partial.json is not what this script writes: delete it"):
            FeatureWriter(path, 400, 20, np.zeros(400), {})
    with FeatureWriter(path, 400, 20, np.zeros(400), {}, overwrite=True) as out:
        assert out.done == 0


def test_two_processes_do_not_write_one_file(tmp_path):
    path = str(tmp_path / "x.hdf5")
    with FeatureWriter(path, 40, 3, np.zeros(40), {}) as out:
        out.write(np.ones((10, 3)), np.ones(10, bool))
        other = subprocess.run([sys.executable, "-c", WRITE_AND_DIE, path, "99"], cwd=ROOT, capture_output=True, text=True)
        assert other.returncode == 1 and "another process is writing" in other.stderr
        assert out.done == 10
    assert not os.path.exists(path)


def test_unfinished_rows_are_refused(tmp_path):
    with FeatureWriter(str(tmp_path / "x.hdf5"), 4, 2, np.zeros(4), {}) as out:
        out.write(np.ones((3, 2)), np.ones(3, bool))
        with pytest.raises(ValueError, match="3 of 4"):
            out.finish()
    assert not (tmp_path / "x.hdf5").exists()


def test_full_disk_is_seen_at_the_start(tmp_path):
    with pytest.raises(OSError, match="the disk has"):
        FeatureWriter(str(tmp_path / "x.hdf5"), 10 ** 12, 2048, np.zeros(1), {})
    assert not os.listdir(tmp_path)


def test_first_difference():
    assert first_difference({"a": 1, "b": {"c": [1]}}, {"a": 1, "b": {"c": [1]}}) is None
    assert first_difference({"a": 1, "b": {"c": [1]}}, {"a": 1, "b": {"c": [2]}}) == "b: c = [1], now [2]"
    assert first_difference({"a": 1, "z": 3}, {"a": 1}) == "z = 3, now None"
    assert first_difference(None, {}) == "unknown arguments"
    assert first_difference({"sha256_x": "0a"}, {"sha256_x": "0b"}) == "other images (names, labels or sizes differ)"


# ---------------------------------------------------------------------------------------------- speed, same figures

@pytest.mark.parametrize("name,size", [("ResNet10", 32), ("ResNet18", 40), ("ResNet50", 64), ("resnet18", 64),
                                       ("mobilenet_v3_small", 64)])
def test_folded_network_gives_the_same_features(name, size):
    torch.manual_seed(1)
    network = make_network(name).eval()
    for tensor_name, t in network.state_dict().items():
        if tensor_name.endswith("running_mean"):
            t.normal_(0, 0.2)
        elif tensor_name.endswith("running_var"):
            t.uniform_(0.5, 1.5)
    extract = for_inference(network, MEAN, STD, (4, size, size, 3))
    x = torch.randint(0, 256, (4, size, size, 3), dtype=torch.uint8)
    y = ((x.double() / 255 - torch.tensor(MEAN)) / torch.tensor(STD)).permute(0, 3, 1, 2).float()
    with torch.inference_mode():
        expected = network(y).numpy()
        assert close(extract(x)(), expected) and close(extract(x[:2])(), expected[:2])


def test_pixels_are_normalised_once():
    seen = []
    network = torch.nn.Identity()
    network.forward = lambda x: seen.append(x) or x
    x = torch.randint(0, 256, (2, 5, 4, 3), dtype=torch.uint8)
    FromPixels(network, MEAN, STD)(x)
    expected = ((x.numpy() / 255 - MEAN) / STD).transpose(0, 3, 1, 2)
    assert np.allclose(seen[0].numpy(), expected, atol=1e-5)


@pytest.mark.parametrize("results", [save_features.by_threads, save_features.by_processes, save_features.from_memory])
@pytest.mark.parametrize("batchsize", [4, 16])
def test_all_ways_of_loading_give_the_same_in_order(data, results, batchsize):
    root, expected = data
    network = make_network("ResNet10").eval()
    load_checkpoint(network, root / "89.tar")
    extract = for_inference(network, MEAN, STD, (batchsize, 32, 32, 3))
    batches = Batches(ZipSet(str(root / "yfcc100m")), Preprocess({"transforms": {"resize": None, "crop": 32}}), 0, N,
                      batchsize)
    with torch.inference_mode():
        found = [(features(), state) for features, state, _ in results(batches, extract, 2)]
    assert [len(s) for _, s in found] == [min(batchsize, N - i) for i in range(0, N, batchsize)]
    assert close(np.concatenate([x for x, _ in found]), expected)
    assert np.flatnonzero(np.concatenate([s for _, s in found])).tolist() == [MISSING, DAMAGED]
    nothing = Batches(ZipSet(str(root / "yfcc100m")), Preprocess({"transforms": {"resize": None, "crop": 32}}), N, N, batchsize)
    assert list(results(nothing, extract, 2)) == []


def test_speed_is_told_beside_that_from_memory(monkeypatch, capsys):
    """The same number of batches for each worker, more where they take less than a second."""
    fed, now = [], [0.0]
    monkeypatch.setattr(save_features.time, "monotonic", lambda: now[0])

    def results(batches, extract, workers):
        fed.append(len(batches))
        for b in range(len(batches)):
            now[0] += .01
            yield (lambda: None), None, None
    assert save_features.from_memory_speed(results, None, 3, (5, 2, 2, 3)) == (5 * fed[-1], pytest.approx(.01 * fed[-1]))
    assert fed == [6, 120]
    save_features.report_speed(100, 2.0, [(50, 1.0), (100, 1.0)])
    assert capsys.readouterr().out == "50.0 images/s; the same network fed from memory: 75.0 images/s; ratio 0.667\n"


def test_slow_files_are_read_ahead_by_threads_of_their_own():
    """Read in the thread that works on them, until that has waited for a tenth of a second."""
    readers = []

    class Slow:
        def __len__(self):
            return 60

        def read(self, b):
            readers.append(threading.current_thread())
            time.sleep(.02)
            return [b]

        def decode(self, b, files):
            assert files == [b]
            return np.full((1, 2, 2, 3), b, np.uint8), np.zeros(1, np.uint8), []

    def extract(x):
        workers.add(threading.current_thread())
        return x[:, 0, 0, :1].numpy

    extract.shape, workers = (1, 2, 2, 3), set()
    found = [int(features()[0, 0]) for features, _, _ in save_features.by_threads(Slow(), extract, 2)]
    assert found == list(range(60))
    assert readers[0] in workers and readers[-1] not in workers and len(readers) == 60


@pytest.mark.parametrize("results", [save_features.by_threads, save_features.by_processes])
def test_errors_while_loading_end_the_run(data, monkeypatch, results):
    def full(*args):
        raise OSError(24, "Too many open files")
    monkeypatch.setattr(imagesets, "stored_members", full)
    batches = Batches(ZipSet(str(data[0] / "yfcc100m"), N), Preprocess({"transforms": {"resize": None, "crop": 32}}), 0,
                      N, 8)
    def extract(x):
        raise AssertionError("no image was loaded")

    extract.shape = (8, 32, 32, 3)
    with pytest.raises(OSError, match="Too many open files") as e:
        list(results(batches, extract, 2))
    assert "\n" not in str(e.value)


def test_killed_loading_process():
    class Killer:
        def __len__(self):
            return 2

        def read(self, b):
            os.kill(os.getpid(), signal.SIGKILL)

        decode = None

    def extract(x):
        raise AssertionError("no image was loaded")

    extract.shape = (1, 2, 2, 3)
    with pytest.raises(OSError, match="killed"):
        list(save_features.by_processes(Killer(), extract, 1))


def test_entirely_unreadable_batches_skip_the_network():
    batch = np.zeros((3, 8, 8, 3), np.uint8), np.array([imagesets.MISSING] * 3, np.uint8), []
    assert save_features.features_of(batch, None)[0] is None


def test_help_and_errors_on_the_command_line():
    found = subprocess.run([sys.executable, "save_features.py", "--help"], cwd=ROOT, capture_output=True, text=True)
    assert found.returncode == 0 and "--cfg" in found.stdout and "Stage 1" in found.stdout
    found = subprocess.run([sys.executable, "save_features.py", "--cfg", "x.yaml", "--outfile", "/tmp/none/x.hdf5"],
                           cwd=ROOT, capture_output=True, text=True)
    assert found.returncode == 1 and found.stderr.count("\n") == 1 and "no configuration x.yaml" in found.stderr


def test_rows_are_on_disk_before_a_note_or_the_name_says_so(tmp_path, monkeypatch):
    path, calls, fsync, replace = str(tmp_path / "x.hdf5"), [], os.fsync, os.replace
    with FeatureWriter(path, 4, 2, np.zeros(4), {}, period=1e9) as out:
        rows = out.file.fileno()
        monkeypatch.setattr(os, "fsync", lambda f: calls.append("rows" if f == rows else "note") or fsync(f))
        monkeypatch.setattr(os, "replace", lambda a, b: calls.append(os.path.basename(b)) or replace(a, b))
        for _ in range(2):              # the first ones are saved at once
            out.write(np.ones((2, 2)), np.ones(2, bool))
        out.finish()
    saved = ["rows", "note", "x.hdf5.partial.json"]
    assert calls == [*saved, *saved, "x.hdf5"]


def test_features_do_not_replace_the_checkpoint(data, script, tmp_path):
    shutil.copy(data[0] / "89.tar", tmp_path)
    with pytest.raises(ValueError, match="89.tar is an input"):
        script(modelfile=tmp_path / "89.tar", outfile=tmp_path / "89.tar", overwrite=True)
