"""train_apply_pca.py against the PCA written out in numpy, and its files: resumed, replaced, damaged."""
import contextlib
import json
import os
import re
import resource
import subprocess
import sys

import h5py
import numpy as np
import pytest

import train_apply_pca
from data_directory import write_features, write_made_from
from lowshot import pca
from lowshot.files import exclusive, write_json
from lowshot.packages import faiss, write_by_faiss

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
D, DIM = 24, 10
ROWS = (500, 301, 1)          # of the blocks


def write_block(root, number, n, seed, extra=7, readable=None):
    """A block of n valid rows and some invalid ones, chunked and compressed as some published files are."""
    rs = np.random.RandomState(seed)
    x = (rs.randn(n, D) * np.linspace(3, .2, D) + 1).astype(np.float32)
    folder = root / "features" / "f100m"
    os.makedirs(folder, exist_ok=True)
    with h5py.File(folder / f"block{number}.hdf5", "w") as f:
        f.create_dataset("all_feats", data=np.concatenate([x, np.full((extra, D), np.nan, np.float32)]),
                         **({} if number else {"chunks": (64, D), "compression": "gzip"}))
        f["all_labels"] = np.zeros(n + extra, np.int32)
        f["count"] = np.array([n], np.int32)
        if readable is not None:
            f["readable"] = readable
    return x


@pytest.fixture
def root(tmp_path):
    for b, n in enumerate(ROWS):
        write_block(tmp_path, b, n, b)
    return tmp_path


def features(root):
    """All valid rows of all blocks."""
    out = []
    for b, n in enumerate(ROWS):
        with h5py.File(path(root, f"block{b}.hdf5")) as f:
            out.append(f["all_feats"][:n])
    return np.concatenate(out)


def run(root, *args, ok=True):
    done = subprocess.run([sys.executable, os.path.join(ROOT, "train_apply_pca.py"), *map(str, args), "--dim", str(DIM)],
                          env={**os.environ, "DDIR": str(root)}, capture_output=True, text=True)
    assert (done.returncode == 0) == ok, done.stderr
    if not ok:
        assert done.stderr.strip().count("\n") == 0, done.stderr
    return done.stdout + done.stderr


def path(root, name=f"concatenated_PCAR{DIM}.raw"):
    return str(root / "features" / "f100m" / name)


def raw(root):
    return np.fromfile(path(root), "<f4").reshape(-1, DIM)


def test_equals_numpy(root):
    run(root, "train", "apply")
    y, x = raw(root), features(root).astype(np.float64)
    assert y.shape == (802, DIM)
    mean = x[:500].mean(axis=0)
    values, vectors = np.linalg.eigh(np.cov(x[:500].T))
    kept = (x - mean) @ vectors[:, ::-1][:, :DIM]
    # the rotation after the PCA is random: inner products tell
    np.testing.assert_allclose(y @ y.T, kept @ kept.T, atol=2e-3)
    for name in os.listdir(root / "features" / "f100m"):
        assert not name.endswith((".partial", ".tmp", ".lock")), name


def test_predicted_memory(root):
    """Of both steps in one process, and of apply alone."""
    x = np.random.RandomState(0).rand(40000, 512).astype(np.float32)
    write_features(path(root, "block0.hdf5"), x, np.zeros(len(x)))
    for b in (1, 2):
        os.unlink(path(root, f"block{b}.hdf5"))
    for steps in (["train", "apply"], ["apply"]):
        found = re.findall("predicted_memory=([0-9.]+) MB|peak memory ([0-9.]+) MB", run(root, *steps))
        predicted, peak = (float("".join(pair)) for pair in found[-2:])
        assert .8 * peak < predicted < 1.2 * peak
        os.unlink(path(root))


def test_ntrain(root):
    run(root, "train", "--ntrain", 100)
    A = faiss.read_VectorTransform(path(root, f"PCAR{DIM}.vt"))
    np.testing.assert_allclose(faiss.vector_to_array(A.mean), features(root)[:100].mean(axis=0), atol=1e-5)
    assert "500 rows" in run(root, "train", "--ntrain", 501, "--overwrite", ok=False)
    assert "too few" in run(root, "train", "--ntrain", 9, "--overwrite", ok=False)


def test_what_is_complete_stays_until_the_input_changes(root):
    run(root, "train", "apply")
    before = os.stat(path(root)).st_mtime_ns
    for args in (["apply"], ["train", "apply", "--overwrite"]):
        assert "nothing to do" in run(root, *args)
    assert os.stat(path(root)).st_mtime_ns == before
    x = write_block(root, 1, 301, seed=9)
    assert "--overwrite replaces it" in run(root, "apply", ok=False)
    run(root, "apply", "--overwrite")
    transform = faiss.read_VectorTransform(path(root, f"PCAR{DIM}.vt"))
    np.testing.assert_allclose(raw(root)[500:801], transform.apply(x), atol=1e-5)


def test_what_links_lead_to_is_written(root):
    run(root, "train", "apply")
    far = root / "far"
    far.mkdir()
    for name in (path(root), path(root, f"PCAR{DIM}.vt")):
        os.rename(name, far / os.path.basename(name))
        os.symlink(far / os.path.basename(name), name)
    assert "nothing to do" in run(root, "apply")
    x = write_block(root, 1, 301, seed=9)
    run(root, "train", "apply", "--overwrite")
    assert os.path.islink(path(root)) and os.path.islink(path(root, f"PCAR{DIM}.vt"))
    transform = faiss.read_VectorTransform(path(root, f"PCAR{DIM}.vt"))
    np.testing.assert_allclose(raw(root)[500:801], transform.apply(x), atol=1e-5)
    assert sorted(os.listdir(far)) == sorted([f"PCAR{DIM}.vt", os.path.basename(path(root))])
    # what a killed run of another data directory with such a link has begun there is not gone on with
    partial = far / (os.path.basename(path(root)) + ".partial")
    partial.write_bytes(bytes(4 * DIM * 5))
    with open(str(partial) + ".json", "w") as f:
        json.dump({"rows": 5, "made_from": {"dim": DIM}}, f)
    os.unlink(far / os.path.basename(path(root)))
    assert "was begun from another PCA" in run(root, "apply", ok=False)
    run(root, "apply", "--overwrite")
    assert "nothing to do" in run(root, "apply") and len(os.listdir(far)) == 2


def test_a_block_extracted_again_with_more_images_is_another(root):
    readable = np.ones(301, bool)
    readable[7] = False
    write_block(root, 1, 301, seed=1, readable=readable)
    run(root, "train", "apply")
    write_block(root, 1, 301, seed=1, readable=np.ones(301, bool))
    assert "--overwrite replaces it" in run(root, "apply", ok=False)


def test_a_block_of_other_images_is_another(root):
    """Although those of its rows that are looked at are the same."""
    write_made_from(path(root, "block1.hdf5"), sha256_names_labels_sizes="a")
    run(root, "train", "apply")
    write_made_from(path(root, "block1.hdf5"), sha256_names_labels_sizes="b")
    assert "--overwrite replaces it" in run(root, "apply", ok=False)
    assert "wrote" in run(root, "apply", "--overwrite")


def test_blocks_of_different_networks_are_refused(root):
    write_made_from(path(root, "block1.hdf5"), model="ResNet10", modelfile_sha256="a")      # block0 does not tell
    write_made_from(path(root, "block2.hdf5"), model="ResNet10", modelfile_sha256="b")
    for step in ("train", "apply"):
        assert (f"{path(root, 'block2.hdf5')} and {path(root, 'block1.hdf5')} must come from the same network and transforms: "
                "modelfile_sha256 is b of the one, a of the other" in run(root, step, ok=False))
    for b in range(3):
        write_made_from(path(root, f"block{b}.hdf5"), model="ResNet10", modelfile_sha256="a")
    run(root, "train", "apply")
    assert "complete, nothing to do" in run(root, "train")
    for b in range(3):
        write_made_from(path(root, f"block{b}.hdf5"), model="ResNet50", modelfile_sha256="a")
    assert f"block0.hdf5 and {path(root, f'PCAR{DIM}.vt')} (says its .json) must come from" in run(root, "apply", ok=False)


def test_blocks_that_do_not_continue_each_other_are_refused(root):
    for b, (i0, i1) in enumerate([(0, 500), (500, 801), (801, 802)]):
        write_made_from(path(root, f"block{b}.hdf5"), i0=i0, i1=i1)
    run(root, "train", "apply")
    write_made_from(path(root, "block1.hdf5"), i0=0, i1=301)
    for step in ("train", "apply"):
        assert ("{} has the images from 0 to before 500, {} those from 0 to before 301: blocks must continue".format(
            path(root, "block0.hdf5"), path(root, "block1.hdf5")) in run(root, step, ok=False))


def test_going_on_after_a_kill(root, monkeypatch):
    """Cut off after each slab in turn; the result is that of an uninterrupted run."""
    run(root, "train", "apply")
    expected = raw(root).copy()
    os.unlink(path(root))
    monkeypatch.setenv("DDIR", str(root))
    monkeypatch.setattr("lowshot.features.SLAB_BYTES", 4 * D * 100)
    monkeypatch.setattr(sys, "argv", ["train_apply_pca.py", "apply", "--dim", str(DIM)])

    class Killed(BaseException):
        pass

    saves = []

    def save_and_die(name, content):
        save(name, content)
        if name.endswith(".partial.json") and content["rows"] not in saves:
            saves.append(content["rows"])
            raise Killed

    save = train_apply_pca.write_json
    monkeypatch.setattr(train_apply_pca, "write_json", save_and_die)
    monkeypatch.setattr(train_apply_pca.time, "monotonic", iter(range(0, 10 ** 6, 11)).__next__)
    for _ in range(20):
        try:
            train_apply_pca.main()
            break
        except Killed:
            assert not os.path.exists(path(root))
            # what was written after the last note does not count
            with open(path(root) + ".partial", "ab") as f:
                f.write(b"garbage")
    assert len(saves) > 5 and saves == sorted(saves)
    np.testing.assert_allclose(raw(root), expected, atol=1e-5)      # slabs are smaller here, rounding differs


@contextlib.contextmanager
def largest_file(nbytes):
    """As on a disk that takes no more."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("less", [1, 100, 3000])
def test_last_bytes_that_a_disk_does_not_take_are_an_error(root, tmp_path, less):
    run(root, "train")
    pca, index = faiss.read_VectorTransform(path(root, f"PCAR{DIM}.vt")), faiss.IndexFlat(7)
    index.add(np.ones((300, 7), np.float32))
    for write, what in (faiss.write_VectorTransform, pca), (faiss.write_index, index):
        write_by_faiss(write, what, str(tmp_path / "own"))
        write(what, str(tmp_path / "its"))
        whole = (tmp_path / "own").read_bytes()
        assert whole == (tmp_path / "its").read_bytes()
        with largest_file(len(whole) - less), pytest.raises(OSError, match="File too large"):
            write_by_faiss(write, what, str(tmp_path / "own"))


def test_what_a_killed_training_left_is_removed(root):
    left = path(root, f".PCAR{DIM}.1.tmp.vt")
    open(left, "w").close()
    run(root, "train")
    assert not os.path.exists(left)


def test_a_note_of_another_pca_does_not_outlive_its_rows(root, monkeypatch):
    run(root, "train", "apply")
    os.unlink(path(root))
    partial = path(root) + ".partial"
    with open(partial, "wb") as f:
        f.write(bytes(4 * DIM * 400))
    write_json(partial + ".json", {"rows": 400, "made_from": "another PCA"})

    class Killed(BaseException):
        pass

    def die(*args):
        raise Killed

    monkeypatch.setenv("DDIR", str(root))
    monkeypatch.setattr(sys, "argv", ["train_apply_pca.py", "apply", "--overwrite", "--dim", str(DIM)])
    monkeypatch.setattr(train_apply_pca.Progress, "update", die)
    with pytest.raises(Killed):
        train_apply_pca.main()
    assert os.path.exists(partial) and not os.path.exists(partial + ".json")


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("step", ["train", "apply"])
def test_killed_beside_the_rename(root, monkeypatch, step, after):
    output = path(root, f"PCAR{DIM}.vt") if step == "train" else path(root)
    run(root, "train", "apply")
    expected = open(output, "rb").read()
    os.unlink(output)

    class Killed(BaseException):
        pass

    def rename_and_die(source, target):
        if target == output:
            if after:
                rename(source, target)
            raise Killed
        rename(source, target)

    rename = os.replace
    with monkeypatch.context() as m:
        m.setenv("DDIR", str(root))
        m.setattr(sys, "argv", ["train_apply_pca.py", step, "--dim", str(DIM)])
        m.setattr(os, "replace", rename_and_die)
        with pytest.raises(Killed):
            train_apply_pca.main()
    assert os.path.exists(output) == after
    assert ("nothing to do" in run(root, step)) == after
    assert open(output, "rb").read() == expected and "nothing to do" in run(root, step)
    assert not [name for name in os.listdir(os.path.dirname(output)) if "partial" in name or "tmp" in name]


@pytest.mark.parametrize("content", ["[]", "{}", "null", "not JSON"])
def test_notes_that_are_none(root, content):
    run(root, "train", "apply")
    with open(path(root) + ".json", "w") as f:
        f.write(content)
    assert "does not tell" in run(root, "apply", ok=False)
    os.unlink(path(root))
    for name in (path(root) + ".partial.json", path(root) + ".partial"):
        with open(name, "w") as f:
            f.write(content)
    assert "delete it, or --overwrite" in run(root, "apply", ok=False)
    run(root, "apply", "--overwrite")
    assert len(raw(root)) == 802


def spoil_pca(root):
    p = path(root, f"PCAR{DIM}.vt")
    A = faiss.read_VectorTransform(p)
    values = faiss.vector_to_array(A.A)
    values[3] = np.nan
    faiss.copy_array_to_vector(values, A.A)
    faiss.write_VectorTransform(A, p)


def resized(root, name, size):
    transform = faiss.read_VectorTransform(path(root, f"PCAR{DIM}.vt"))
    faiss.copy_array_to_vector(np.ones(size, np.float32), getattr(transform, name))
    faiss.write_VectorTransform(transform, path(root, f"PCAR{DIM}.vt"))


def huge(root):
    with h5py.File(path(root, "block1.hdf5"), "r+") as f:
        f["all_feats"][4] = 3e38


def steep(root):
    transform = faiss.read_VectorTransform(path(root, f"PCAR{DIM}.vt"))
    faiss.copy_array_to_vector(faiss.vector_to_array(transform.A) * np.float32(3e38), transform.A)
    faiss.write_VectorTransform(transform, path(root, f"PCAR{DIM}.vt"))


def test_a_damaged_output_of_the_right_size_is_not_complete(root):
    run(root, "train", "apply")
    right = raw(root)
    for wrong in (np.zeros_like(right), right + .1):
        wrong.tofile(path(root))
        assert "row 0 is not what the PCA makes of the features: --overwrite" in run(root, "apply", ok=False)
        assert "wrote" in run(root, "apply", "--overwrite")
        np.testing.assert_array_equal(raw(root), right)
    assert "complete, nothing to do" in run(root, "train", "apply", "--overwrite")


def test_a_truncated_pca_is_not_complete(root):
    run(root, "train")
    os.truncate(path(root, f"PCAR{DIM}.vt"), 0)
    assert f"train --dim {DIM} --overwrite makes it again" in run(root, "train", ok=False)
    run(root, "train", "--overwrite")
    assert "complete" in run(root, "train")


def nan(root):
    with h5py.File(path(root, "block1.hdf5"), "r+") as f:
        f["all_feats"][4, 3] = np.nan


@pytest.mark.parametrize("spoil,message", [
    (lambda root: os.unlink(path(root, f"PCAR{DIM}.vt")), f"train --dim {DIM} makes it"),
    (lambda root: os.truncate(path(root, f"PCAR{DIM}.vt"), 100), "truncated"),
    (lambda root: faiss.write_VectorTransform(faiss.PCAMatrix(D, DIM), path(root, f"PCAR{DIM}.vt")), "not trained"),
    (spoil_pca, "NaN or infinity"),
    (lambda root: faiss.write_VectorTransform(faiss.RemapDimensionsTransform(D, DIM, False), path(root, f"PCAR{DIM}.vt")),
     "holds a RemapDimensionsTransform, a linear transform (PCAMatrix) was expected"),
    (lambda root: resized(root, "A", 17), f"matrix or bias have another size than {D} x {DIM}"),
    (lambda root: resized(root, "b", 3), f"matrix or bias have another size than {D} x {DIM}"),
    (lambda root: os.rename(path(root, f"PCAR{DIM}.vt"), path(root, "x.vt")) or os.symlink(
        path(root, "PCAR5.vt"), path(root, f"PCAR{DIM}.vt")) or faiss.write_VectorTransform(
            faiss.RandomRotationMatrix(D, 5), path(root, "PCAR5.vt")), "gives 5 dimensions, its name says 10"),
    (lambda root: os.unlink(path(root, "block1.hdf5")), "no block1.hdf5"),
    (nan, "block1.hdf5: row 4 holds NaN"),
    (huge, "block1.hdf5: row 4 holds numbers as large as 3e+38"),
    (steep, "is too large, the PCA makes NaN or infinity of it"),
])
def test_bad_input_is_one_line_and_leaves_no_output(root, spoil, message):
    run(root, "train")
    spoil(root)
    assert message in run(root, "apply", ok=False)
    assert not os.path.exists(path(root))


def test_published_vectors_are_not_of_a_pca_that_was_trained_here(tmp_path):
    (tmp_path / "f100m").mkdir()
    vt, raws = str(tmp_path / "f100m" / "PCAR8.vt"), [str(f / "concatenated_PCAR8.raw") for f in (tmp_path, tmp_path / "f100m")]
    for raw in raws:
        pca.check_made_by(vt, raw, 8)
    write_json(vt + ".json", {})
    for raw in raws:
        with pytest.raises(ValueError, match="was made by another PCA than"):
            pca.check_made_by(vt, raw, 8)


def test_features_that_are_newer_than_the_vectors_are_told(root, capsys):
    run(root, "train", "apply")
    vt, raw_path = path(root, f"PCAR{DIM}.vt"), path(root)
    pca.check_made_by(vt, raw_path, DIM)
    assert capsys.readouterr().out == ""
    os.utime(path(root, "block1.hdf5"), (2e9, 2e9))
    pca.check_made_by(vt, raw_path, DIM)
    assert "block1.hdf5 is newer than" in capsys.readouterr().out
    for name in vt, raw_path:           # as of files that were put there
        os.unlink(name + ".json")
    pca.check_made_by(vt, raw_path, DIM)
    assert capsys.readouterr().out == ""


def test_a_pca_of_other_columns_is_named(tmp_path):
    rotation = faiss.RandomRotationMatrix(6, 3)
    rotation.init(0)
    faiss.write_VectorTransform(rotation, str(tmp_path / "PCAR3.vt"))

    class File:
        path, d, network = "f.hdf5", 7, {}
    with pytest.raises(ValueError, match="f.hdf5 has 7 columns, .*PCAR3.vt expects 6: both must come from the same network"):
        pca.load_pca(str(tmp_path / "PCAR3.vt"), File)


def test_all_rows_train(root):
    """Faiss takes no more than 1000 per column unless it is told to."""
    x = write_block(root, 0, 1000 * D + 3000, 3)
    x[-3000:] += 2
    with h5py.File(path(root, "block0.hdf5"), "r+") as f:
        f["all_feats"][:len(x)] = x
    run(root, "train")
    trained = faiss.read_VectorTransform(path(root, f"PCAR{DIM}.vt"))
    np.testing.assert_allclose(faiss.vector_to_array(trained.mean), x.mean(axis=0, dtype="f8"), atol=1e-4)


def test_directions_are_turned_at_random(root):
    """After PCA alone they are not correlated, in the rows that it was trained on."""
    run(root, "train", "apply")
    C = np.cov(raw(root)[:500].T)
    assert np.abs(C - np.diag(np.diag(C))).max() > .1 * C.max()


def test_rows_are_on_disk_before_a_note_counts_them(root, monkeypatch):
    run(root, "train")
    calls, fsync, write_json = [], os.fsync, train_apply_pca.write_json
    monkeypatch.setenv("DDIR", str(root))
    monkeypatch.setattr(sys, "argv", ["train_apply_pca.py", "apply", "--dim", str(DIM)])
    monkeypatch.setattr(os, "fsync", lambda f: calls.append("fsync") or fsync(f))
    monkeypatch.setattr(train_apply_pca, "write_json", lambda name, content: calls.append(name) or write_json(name, content))
    train_apply_pca.main()
    assert calls[:2] == ["fsync", path(root) + ".partial.json"]


def test_two_processes_do_not_write_one_file(root):
    run(root, "train")
    with exclusive(path(root) + ".partial"):
        assert "another process is writing" in run(root, "apply", ok=False)


def test_a_partial_file_that_is_cut_off_is_not_gone_on_with(root, monkeypatch):
    run(root, "train")
    monkeypatch.setenv("DDIR", str(root))
    monkeypatch.setattr(sys, "argv", ["train_apply_pca.py", "apply", "--dim", str(DIM)])
    with monkeypatch.context() as m:
        m.setattr(train_apply_pca, "make_way", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            train_apply_pca.main()
    os.truncate(path(root) + ".partial", 4 * DIM * 100)
    assert "or it is cut off: delete it" in run(root, "apply", ok=False)


def test_training_that_takes_more_memory_than_there_is(root, monkeypatch):
    monkeypatch.setenv("DDIR", str(root))
    monkeypatch.setattr(sys, "argv", ["train_apply_pca.py", "train", "--dim", str(DIM)])
    monkeypatch.setattr(train_apply_pca, "available_memory", lambda: 50000)
    with pytest.raises(ValueError, match="training on 500 rows takes .* free: --ntrain 2.. fits"):
        train_apply_pca.main()
