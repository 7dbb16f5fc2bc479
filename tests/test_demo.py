"""The demo: its images, the training of its network, its contact sheet, on tiny data."""
import io
import json
import multiprocessing
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
import zipfile

import matplotlib
import numpy as np
import pytest
from PIL import Image

HERE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, HERE)

from demo import make_data, show  # noqa: E402
from demo.glyphs import choose_distinct, coverage, find_fonts, glyph  # noqa: E402
from demo.make_data import damaged, draw  # noqa: E402
from lowshot.files import exclusive  # noqa: E402
from lowshot.split import labelled_images, load_split  # noqa: E402

NCLASS, NTRAIN, NVAL, NBG = 16, 8, 3, 1040


def script(name, ddir, *options, check=True, **kwargs):
    """Run a script of demo/ on a data directory; returns the completed process."""
    environment = {**os.environ, "DDIR": str(ddir), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, os.path.join(HERE, "demo", name), *map(str, options)], env=environment,
                          capture_output=True, text=True, **kwargs)
    assert not check or done.returncode == 0, done.stderr
    return done


def start(name, ddir, *options):
    """Start a script in a process group of its own."""
    environment = {**os.environ, "DDIR": str(ddir), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, os.path.join(HERE, "demo", name), *map(str, options)], env=environment,
                            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, start_new_session=True)


def contents(root):
    """{relative path: bytes} of all files but temporary ones and locks."""
    out = {}
    for folder, _, names in os.walk(root):
        if not folder.endswith(".tmp"):
            for name in names:
                if ".tmp" not in name and not name.endswith(".lock"):
                    path = os.path.join(folder, name)
                    with open(path, "rb") as f:
                        out[os.path.relpath(path, root)] = f.read()
    return out


@pytest.fixture(scope="module")
def fonts(tmp_path_factory):
    """A folder of six fonts that come with matplotlib, and a file that is no font."""
    folder = tmp_path_factory.mktemp("fonts")
    source = os.path.join(os.path.dirname(matplotlib.__file__), "mpl-data", "fonts", "ttf")
    for name in ("DejaVuSansMono", "DejaVuSansMono-Bold", "DejaVuSerif-Italic", "STIXGeneral", "STIXGeneralBol",
                 "STIXGeneralItalic"):
        shutil.copy(os.path.join(source, name + ".ttf"), folder)
    (folder / "README.txt").write_text("fonts")
    return folder


@pytest.fixture(scope="module")
def options(fonts):
    return ("--fonts", fonts, "--nclass", NCLASS, "--ntrain", NTRAIN, "--nval", NVAL, "--minfonts", 6,
            "--minfontsbg", 3)


@pytest.fixture(scope="module")
def data(tmp_path_factory, options):
    """A data directory made by one process; tests only read it."""
    ddir = tmp_path_factory.mktemp("data")
    script("make_data.py", ddir, *options, "--nbg", NBG, "--nproc", 1)
    return ddir


# ------------------------------------------------------------------------------------------------------------- glyphs

def test_coverage(fonts):
    drawn, distinct = coverage(os.path.join(fonts, "DejaVuSansMono.ttf"))
    assert drawn == sorted(set(drawn)) and set(distinct) <= set(drawn)
    assert {ord(c) for c in "Aaé9+."} <= set(distinct)
    assert ord(" ") not in drawn and 0x301 not in drawn        # no ink; a mark
    # Greek and Cyrillic capitals that the font draws as it draws Latin A
    assert {0x391, 0x410} <= set(drawn) and not {0x391, 0x410} & set(distinct)


def test_find_fonts(fonts, tmp_path):
    assert [os.path.basename(p) for p in find_fonts(str(fonts))] == sorted(
        f for f in os.listdir(fonts) if f.endswith(".ttf"))
    with pytest.raises(ValueError, match="no .ttf or .otf font"):
        find_fonts(str(tmp_path))
    for name in ("b", "a/z"):
        shutil.copytree(fonts, tmp_path / "all" / name)
    (tmp_path / "all" / "a" / "above").symlink_to("..")
    (tmp_path / "all" / "link").symlink_to(fonts)
    shutil.copy(fonts / "STIXGeneral.ttf", tmp_path / "all" / "aa.ttf")
    names = sorted(f for f in os.listdir(fonts) if f.endswith(".ttf"))
    assert [os.path.relpath(p, tmp_path / "all") for p in find_fonts(str(tmp_path / "all"))] == [
        *(f"a/z/{name}" for name in names), "aa.ttf", *(f"{folder}/{name}" for folder in ("b", "link") for name in names)]
    (tmp_path / "broken.ttf").write_bytes(b"\0\1\0\0 not a font")
    with pytest.raises(ValueError, match="broken.ttf is not a font"):
        find_fonts(str(tmp_path))


def test_choose_distinct_drops_twins(fonts):
    paths = find_fonts(str(fonts))
    codes = [ord(c) for c in "AKOo"]
    have = [set(codes)] * len(paths)
    assert choose_distinct(paths, codes, have, 3) == [ord(c) for c in "AKO"]
    assert choose_distinct(paths, codes, have, 4) == codes
    with pytest.raises(ValueError, match="5 characters wanted"):
        choose_distinct(paths, codes, have, 5)


def test_draw_shows_the_glyph(fonts):
    """On average over many images, where the ink is differs from the border; every image has contrast."""
    path = find_fonts(str(fonts))[0]
    images = np.stack([draw(np.random.RandomState([0, i]), path, ord("M")) for i in range(60)])
    assert images.shape == (60, 32, 32, 3) and images.dtype == np.uint8
    assert np.array_equal(images[7], draw(np.random.RandomState([0, 7]), path, ord("M")))
    grey = images.astype(float) @ [0.299, 0.587, 0.114]
    assert (np.abs(grey - np.median(grey, axis=(1, 2), keepdims=True)).max(axis=(1, 2)) > 35).all()
    spread = grey.std(axis=(1, 2)).mean()
    assert grey[:, :3, :3].std(axis=(1, 2)).mean() < 0.7 * spread
    mask, extent = glyph(path, ord("."))
    assert extent < 0.3 and max(mask.size) > 8          # small glyphs are drawn from a larger size


# -------------------------------------------------------------------------------------------------------------- images

def test_labelled_images(data):
    glyphs = json.loads((data / "glyphs.json").read_text())
    names = None
    for part, count in (("train", NTRAIN), ("val", NVAL)):
        meta = json.loads((data / f"imagenet_meta_{part}.json").read_text())
        assert meta["image_labels"] == [c for c in range(NCLASS) for _ in range(count)]
        assert len(meta["image_names"]) == len(set(meta["image_names"])) == NCLASS * count
        assert [ord(name[0]) for name in meta["label_names"]] == glyphs["classes"]
        names = meta["label_names"]
        for name in meta["image_names"]:
            with Image.open(data / name) as image:
                assert image.size == (32, 32) and image.mode == "RGB"
    assert all(sum(code in d for d in map(set, glyphs["distinct"])) >= 6 for code in glyphs["classes"])
    info = json.loads((data / "label_idx.json").read_text())
    parts = [info[k] for k in ("base_classes_1", "base_classes_2", "novel_classes_1", "novel_classes_2")]
    assert [len(p) for p in parts] == [NCLASS // 4] * 4
    assert sorted(sum(parts, [])) == list(range(1, NCLASS + 1))
    assert info["base_classes"] == sorted(parts[0] + parts[1]) and info["label_names"] == names
    split = load_split(data / "label_idx.json", "test")
    rows, _, nbase = labelled_images(np.repeat(np.arange(NCLASS), NTRAIN), split, 2, 1)
    assert nbase == NCLASS // 4 * NTRAIN and len(rows) == nbase + NCLASS // 4 * 2


def test_background(data):
    """Each zip lacks one image, has one that cannot be decoded, and all others can; characters as recorded."""
    codes = np.load(data / "yfcc100m_chars.npy")
    glyphs = json.loads((data / "glyphs.json").read_text())
    fonts_with = {c: sum(c in d for d in map(set, glyphs["drawn"])) for c in set(codes.tolist())}
    assert codes.shape == (NBG,) and min(fonts_with.values()) >= 3
    assert len(set(codes.tolist()) - set(glyphs["classes"])) > 500      # mostly characters that no label names
    for z, count in ((0, 1000), (1, NBG - 1000)):
        missing, unreadable = damaged(0, z)
        with zipfile.ZipFile(data / "yfcc100m" / "00" / f"{z:03d}.zip") as file:
            assert {i.compress_type for i in file.infolist()} == {zipfile.ZIP_STORED}
            assert file.namelist() == [f"{i:03d}.jpg" for i in range(count) if i != missing]
            bad = []
            for name in file.namelist():
                try:
                    with Image.open(io.BytesIO(file.read(name))) as image:
                        assert image.size == (32, 32)
                        image.convert("RGB")
                except OSError:
                    bad.append(int(name[:3]))
        assert bad == [i for i in [unreadable] if i < count]


def test_same_images_by_any_number_of_processes(data, options, tmp_path):
    script("make_data.py", tmp_path, *options, "--nbg", NBG, "--nproc", 3)
    assert contents(tmp_path) == contents(data)
    # another seed: other images
    other = tmp_path / "other"
    other.mkdir()
    script("make_data.py", other, *options, "--nbg", 20, "--seed", 1)
    assert (other / "label_idx.json").read_bytes() != (data / "label_idx.json").read_bytes()
    assert not np.array_equal(np.load(other / "yfcc100m_chars.npy"), np.load(data / "yfcc100m_chars.npy")[:20])


def test_what_is_complete_is_kept_and_the_rest_made(data, options, tmp_path):
    ddir = tmp_path / "d"
    shutil.copytree(data, ddir)
    first, second = (ddir / "yfcc100m" / "00" / name for name in ("000.zip", "001.zip"))
    first.write_bytes(first.read_bytes()[:-100])
    second_was = second.stat().st_mtime_ns
    shutil.rmtree(ddir / "imagenet" / "val" / os.listdir(ddir / "imagenet" / "val")[3])
    (ddir / "imagenet_meta_val.json").unlink()
    (ddir / "yfcc100m_chars.npy").unlink()
    script("make_data.py", ddir, *options, "--nbg", NBG)
    assert contents(ddir) == contents(data)
    assert second.stat().st_mtime_ns == second_was
    # a larger background: what was there stays as it was
    first_was = first.stat().st_mtime_ns
    script("make_data.py", ddir, *options, "--nbg", NBG + 30)
    assert first.stat().st_mtime_ns == first_was
    chars = np.load(ddir / "yfcc100m_chars.npy")
    assert np.array_equal(chars[:NBG], np.load(data / "yfcc100m_chars.npy"))
    np.save(ddir / "yfcc100m_chars.npy", chars[:NBG])       # as a run leaves it that was cut off before its end
    script("make_data.py", ddir, *options, "--nbg", NBG + 30)
    assert np.array_equal(np.load(ddir / "yfcc100m_chars.npy"), chars)
    with zipfile.ZipFile(second) as new, zipfile.ZipFile(data / "yfcc100m" / "00" / "001.zip") as old:
        assert all(new.read(name) == old.read(name) for name in old.namelist())
        assert len(new.namelist()) == len(old.namelist()) + 30 - (40 <= damaged(0, 1)[0] < 70)


def test_the_last_image_is_never_missing(data, options, tmp_path):
    missing = damaged(0, 0)[0]

    def names():
        with zipfile.ZipFile(ddir / "yfcc100m" / "00" / "000.zip") as file:
            return file.namelist()
    ddir = tmp_path / "d"
    ddir.mkdir()
    script("make_data.py", ddir, *options, "--nbg", missing + 1)
    assert names() == [f"{i:03d}.jpg" for i in range(missing + 1)]
    with zipfile.ZipFile(ddir / "yfcc100m" / "00" / "000.zip", "w") as file:        # without it, the zip is not complete
        for i in range(missing):
            file.writestr(f"{i:03d}.jpg", b"")
    script("make_data.py", ddir, *options, "--nbg", missing + 1)
    assert names()[-1] == f"{missing:03d}.jpg"
    # a larger background is as if drawn at once, and is left alone where less is asked for
    script("make_data.py", ddir, *options, "--nbg", NBG)
    assert contents(ddir) == contents(data)
    script("make_data.py", ddir, *options, "--nbg", missing + 1)
    assert f"{missing:03d}.jpg" not in names() and len(names()) == 999


def test_killed_and_run_again(data, options, tmp_path):
    process = start("make_data.py", tmp_path, *options, "--nbg", NBG, "--nproc", 2)
    deadline = time.time() + 30
    while time.time() < deadline and len(list((tmp_path / "imagenet").glob("*/U????"))) < 3:
        time.sleep(0.001)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert not (tmp_path / "yfcc100m_chars.npy").exists()
    # whatever stands under its own name is whole
    whole = contents(data)
    for path, content in contents(tmp_path).items():
        assert content == whole[path], path
    script("make_data.py", tmp_path, *options, "--nbg", NBG)
    assert contents(tmp_path) == whole


def test_killed_alone_it_takes_its_processes_along(options, tmp_path):
    environment = {**os.environ, "DDIR": str(tmp_path), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([sys.executable, os.path.join(HERE, "demo", "make_data.py"), *map(str, options), "--nbg", "9000",
                                "--nproc", "2"], env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    deadline = time.time() + 30
    while time.time() < deadline and not list(tmp_path.glob("yfcc100m/00/.*.tmp.zip")):
        time.sleep(0.01)
    process.kill()
    assert process.communicate(timeout=5)[1] == ""          # at its end no process has the pipe any more
    assert process.returncode == -signal.SIGKILL and not (tmp_path / "yfcc100m_chars.npy").exists()


def test_a_full_disk_names_the_folder(data, options, tmp_path):
    shutil.copy(data / "glyphs.json", tmp_path)
    done = script("make_data.py", tmp_path, *options, "--nbg", 10, check=False,
                  preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (600, 600)))
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1
    assert re.search(rf"error: {tmp_path}/imagenet/train/U\w+ could not be written, the disk has", done.stderr)


@pytest.mark.parametrize("change, message", [
    (("--seed", 5), "drawn with other seed (0, now 5)"),
    (("--nclass", 8), "drawn with other nclass (16, now 8)"),
    (("--nclass", 6), "not a multiple of 4"),
    (("--fonts", "/nonexistent"), "--fonts /nonexistent is not a folder"),
    (("--nbg", -1), "must be at least 0"),
])
def test_bad_arguments(data, options, change, message):
    done = script("make_data.py", data, *options, *change, check=False)
    assert done.returncode in (1, 2) and message in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_too_few_characters(fonts, tmp_path):
    done = script("make_data.py", tmp_path, "--fonts", fonts, "--nbg", 0, check=False)
    assert done.returncode == 1 and "only 0 characters are in --minfonts 70 of the 6 fonts" in done.stderr
    (tmp_path / "yfcc100m").mkdir()
    done = script("make_data.py", tmp_path, "--fonts", fonts, check=False)
    assert done.returncode == 1 and "was not drawn by this script" in done.stderr


def test_requirements_pin_the_fonts():
    with open(os.path.join(HERE, "requirements-demo.txt")) as f:
        assert re.fullmatch(r"trdg==\d+\.\d+\.\d+\n", f.read())


# ------------------------------------------------------------------------------------------------------------ training

def base_only(data, ddir):
    """Copy of the data directory in which the images of novel classes are missing."""
    shutil.copytree(data, ddir, ignore=shutil.ignore_patterns("yfcc100m"))
    glyphs = json.loads((ddir / "glyphs.json").read_text())
    base = set(json.loads((ddir / "label_idx.json").read_text())["base_classes"])
    for label, code in enumerate(glyphs["classes"]):
        if label + 1 not in base:
            for part in ("train", "val"):
                shutil.rmtree(ddir / "imagenet" / part / f"U{code:04X}")
    return ddir


def test_training_killed_and_resumed(data, tmp_path):
    import torch
    from lowshot.networks import load_checkpoint, make_network
    one, two = tmp_path / "one", base_only(data, tmp_path / "two")
    split = json.loads((two / "label_idx.json").read_text())
    del split["base_classes"]           # those of both sets then
    (two / "label_idx.json").write_text(json.dumps(split))
    shutil.copytree(data, one, ignore=shutil.ignore_patterns("yfcc100m"))
    options = ("--epochs", 3, "--batchsize", 16)
    script("train_network.py", one, *options)
    process = start("train_network.py", two, *options)
    for line in process.stdout:
        if "epoch 2/3" in line:
            break
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    folder = two / "models" / "checkpoints" / "ResNet10"
    assert not (folder / "2.tar").exists()
    done = script("train_network.py", two, *options)
    assert "going on after epoch" in done.stdout

    contents = [torch.load(d / "models" / "checkpoints" / "ResNet10" / "2.tar", weights_only=True) for d in (one, two)]
    assert [set(c) for c in contents] == [{"epoch", "state"}] * 2 and contents[0]["epoch"] == 2
    state, other = (c["state"] for c in contents)
    assert list(state) == list(other) and all(torch.equal(state[name], other[name]) for name in state)
    assert state["module.trunk.0.weight"].shape == (64, 3, 7, 7)
    assert state["module.trunk.7.BNshortcut.running_var"].shape == (512,)
    assert state["module.classifier.weight"].shape == (NCLASS // 2, 512) and "module.classifier.bias" not in state
    assert all(tensor.is_contiguous() and tensor.isfinite().all() for tensor in state.values())
    load_checkpoint(make_network("ResNet10"), folder / "2.tar")

    record = json.loads((two / "logs" / "train_network_ResNet10_2.json").read_text())
    assert record["classes"] == NCLASS // 2 and record["training_images"] == NCLASS // 2 * NTRAIN
    assert len(record["epochs"]) == 3 and record["checkpoint"] == "models/checkpoints/ResNet10/2.tar"
    assert not (folder / "training.pt").exists()
    before = (folder / "2.tar").stat().st_mtime_ns
    assert "is complete" in script("train_network.py", two, *options).stdout
    assert (folder / "2.tar").stat().st_mtime_ns == before
    script("train_network.py", two, "--epochs", 1, "--batchsize", 16)       # another network
    assert "is complete" in script("train_network.py", two, *options).stdout
    assert (folder / "2.tar").stat().st_mtime_ns == before
    done = script("train_network.py", two, *options, "--seed", 1, check=False)
    assert done.returncode == 1 and "was trained with other arguments" in done.stderr


@pytest.mark.parametrize("name,locked", [("make_data.py", "glyphs.json"),
                                         ("train_network.py", "models/checkpoints/ResNet10/training.pt")])
def test_two_at_once_are_one_too_many(tmp_path, name, locked):
    with exclusive(str(tmp_path / locked)):
        done = script(name, tmp_path, check=False)
    assert done.returncode == 1 and f"error: another process is writing {tmp_path / locked}\n" in done.stderr


def test_processes_that_draw_leave_interruptions_to_the_first():
    with multiprocessing.get_context("fork").Pool(1, make_data._begin) as pool:
        assert pool.apply(signal.getsignal, (signal.SIGINT,)) == signal.SIG_IGN


def test_training_without_data(tmp_path):
    done = script("train_network.py", tmp_path, check=False)
    assert done.returncode == 1 and "no label_idx.json" in done.stderr and len(done.stderr.splitlines()) == 1


def examples(data):
    split = load_split(data / "label_idx.json", "test")
    meta = json.loads((data / "imagenet_meta_val.json").read_text())
    labels = split.renumber(meta["image_labels"])
    rows = np.flatnonzero(labels >= 0)
    rs = np.random.RandomState(0)
    scores = rs.rand(len(rows), len(split.classes)).astype(np.float32) * 1e-4
    scores[0] = 0
    neighbours = rs.randint(0, 20 + NBG, (len(rows), 6)).astype(np.int32)
    neighbours[1] = 3                                   # labelled images only
    neighbours[2] = 20 + damaged(0, 0)[0]               # an image that is missing
    return {"rows": rows, "labels": labels[rows], "scores": scores, "neighbours": neighbours,
            "contribution": rs.rand(len(rows), 6).astype(np.float32), "nlabelled": np.int64(20),
            "labelled_rows": np.arange(20), "classes": split.classes}


def test_contact_sheet(data, tmp_path):
    found = examples(data)
    chosen = show.choose_examples(found, len(found["labels"]))
    assert sorted(chosen) == list(range(len(found["labels"])))
    assert len({int(found["labels"][i]) for i in chosen[:NCLASS // 2]}) == NCLASS // 2      # no class twice at first
    found["neighbours"][4], found["contribution"][4] = [21, 2, 25, 30, 20, 22], [0.1, 0.5, 0.3, 0, 0.1, 0]
    got = show.carriers(found, 4, 3)
    assert [n for n, _ in got] == [5, 1, 0] and [share for _, share in got] == pytest.approx([0.3, 0.1, 0.1])
    assert show.carriers(found, 1, 4) == []
    assert not show.background_image(str(data), damaged(0, 0)[0]).any()
    assert show.background_image(str(data), 1001).std() > 1
    np.savez(tmp_path / "examples.npz", **found)
    script("show.py", data, "--sheet", tmp_path / "sheet.png", "--examples", tmp_path / "examples.npz",
           "--nexamples", len(chosen))
    with Image.open(tmp_path / "sheet.png") as image:
        assert image.format == "PNG" and min(image.size) > 500
    del found["classes"]
    np.savez(tmp_path / "examples.npz", **found)
    done = script("show.py", data, "--sheet", tmp_path / "no.png", "--examples", tmp_path / "examples.npz", check=False)
    assert done.returncode == 1 and "has no array classes" in done.stderr and not (tmp_path / "no.png").exists()
