"""diffusion.py, run as a user runs it, against the method in dense float64 on the same files."""
import contextlib
import io
import json
import os
import re
import subprocess
import sys

import h5py
import numpy as np
import pytest

import reference
from data_directory import make_data_directory, read_features, write_made_from
import diffusion as diffusion_script
from diffusion import StoredL, main, widest_panel
from graph_utils import has_mkl
from lowshot.packages import faiss
from lowshot import completion, file_arrays, machine, split as class_split
from lowshot.file_arrays import scratch
from lowshot.completion import FixedPart
from lowshot.files import exclusive, read_json, write_json

of_neighbours = completion.Changes.of_neighbours
ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
NBG, DIM, KS = 400, 32, 16
MKL = [["--backend", "mkl"]] if has_mkl() else []


def write_background_graph(root, nbg, k):
    """The files of build_graph.py, by exact search."""
    x = vectors(root)["background"][:nbg]
    I = reference.neighbours(x, x, k)
    D = np.take_along_axis(x @ x.T, np.maximum(I, 0), 1)
    os.makedirs(os.path.join(root, "knngraph"), exist_ok=True)
    stem = os.path.join(root, "knngraph", f"ndis{nbg}_k{k}_")
    I.astype(np.int32).tofile(stem + "I_11.int32")
    D.astype(np.float32).tofile(stem + "D_11.float32")


def vectors(root):
    """Normalised vectors and labels of all images."""
    pca = faiss.read_VectorTransform(os.path.join(root, f"features/f100m/PCAR{DIM}.vt"))
    found = {}
    for name in ("train", "val"):
        x, found[name + "_labels"] = read_features(os.path.join(root, "features", name + ".hdf5"))
        found[name] = pca.apply(x)
    found["background"] = np.fromfile(os.path.join(root, f"features/f100m/concatenated_PCAR{DIM}.raw"),
                                      np.float32).reshape(-1, DIM)
    for name in ("train", "val", "background"):
        found[name] /= np.linalg.norm(found[name], axis=1, keepdims=True)
    return found


@pytest.fixture(scope="module")
def ddir(tmp_path_factory):
    root = make_data_directory(tmp_path_factory.mktemp("ddir"), nclass=30, dim=64, nbg=NBG, raw=True)
    write_background_graph(root, NBG, KS)
    write_background_graph(root, 9, 16)
    return root


def diffusion(ddir, *arguments, ok=True):
    process = subprocess.run([sys.executable, os.path.join(ROOT, "diffusion.py"), "--dim", str(DIM), *map(str, arguments)],
                             env={**os.environ, "DDIR": str(ddir)}, capture_output=True, text=True)
    if ok:
        assert process.returncode == 0, process.stderr
        return process.stdout
    assert process.returncode in (1, 2) and process.stderr.count("\n") == 1, process.stderr
    assert "Traceback" not in process.stderr
    return process.stderr


def expected(ddir, mode, nlabeled, seed, nbg, k, niter):
    """[(nnz, top-5, top-5 on novel), ...] and [L, ...] (labelled images first), by the slow way."""
    v = vectors(ddir)
    split = class_split.load_split(os.path.join(ddir, "label_idx.json"), mode)
    rows, labels, _ = class_split.labelled_images(v["train_labels"], split, nlabeled, seed)
    test_rows, test_labels = class_split.test_images(v["val_labels"], split)
    x = np.concatenate([v["train"][rows], v["background"][:nbg]])
    figures, Ls = [], []
    for L, scores in reference.diffusion(reference.neighbours(x, x, k), reference.neighbours(v["val"][test_rows], x, k),
                                         np.arange(len(rows)), labels, len(split.classes), niter):
        right = reference.top5(np.round(scores / scores.max(axis=0).clip(1e-30), 9) * scores.max(axis=0), test_labels)
        figures.append(((scores > 0).sum(axis=1).mean(), right.mean(), right[split.is_novel[test_labels]].mean()))
        Ls.append(L)
    return figures, Ls


def printed(text):
    return [tuple(map(float, m)) for m in
            re.findall(r"^(?:initial state|iter \d+/\d+) nnz (\S+) top-5 accuracy: (\S+) \((\S+) on novel\)$", text, re.M)]


@pytest.mark.parametrize("mode,nlabeled,seed,nbg,k,niter", [
    ("test", 2, 1, NBG, 8, 4), ("val", 1, 3, NBG, 16, 3), ("val", 5, 2, 0, 30, 2), ("test", 1, 1, 9, 12, 3),
    ("test", 20, 5, NBG, 1, 2), ("val", 1, 1, 0, 500, 2), ("test", 3, 4, NBG, 10, 0), ("test", 3, 4, NBG, 10, 1)])
def test_figures_equal_the_dense_ones(ddir, mode, nlabeled, seed, nbg, k, niter):
    text = diffusion(ddir, "--mode", mode, "--nlabeled", nlabeled, "--seed", seed, "--nbg", nbg, "--k", k, "--niter", niter)
    figures, _ = expected(ddir, mode, nlabeled, seed, nbg, k, niter)
    found = printed(text)
    assert len(found) == niter + 1
    name = f"{mode}_nl{nlabeled}_seed{seed}_nbg{nbg}_k{k}_ni{niter}_d{DIM}.json"
    record = json.load(open(os.path.join(ddir, "logs/diffusion", name)))
    assert record["complete"] and record["arguments"]["nlabeled"] == nlabeled
    for i, (f, e, r) in enumerate(zip(found, figures, record["results"])):
        assert f[0] == pytest.approx(e[0], abs=0.0051)
        # scores that are equal but for rounding may rank either way: two test images of 75
        assert abs(r["top5"] - e[1]) <= 2.1 / record["ntest"] and r["iteration"] == i
        assert f[1:] == pytest.approx((r["top5"], r["top5_novel"]), abs=0.00051)


def test_stored_L_equals_the_dense_one(ddir, tmp_path):
    arguments = ["--mode", "test", "--nlabeled", 2, "--seed", 2, "--nbg", NBG, "--k", 10, "--niter", 5]
    _, Ls = expected(ddir, "test", 2, 2, NBG, 10, 5)
    for extra in ([], ["--lslice", 16], ["--lslice", 5], *MKL, ["--backend", "torch", "--device", "cpu"]):
        diffusion(ddir, *arguments, *extra, "--storeLname", tmp_path / "L", "--storeLiters", "0,1,2,5")
        for i in (0, 1, 2, 5):
            L = np.load(tmp_path / f"L_iter{i}.npy")
            np.testing.assert_allclose(L, Ls[i], rtol=1e-5, atol=1e-12, err_msg=f"{extra}, iteration {i}")
        assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("backend", [["--backend", "own"], *MKL])
def test_entries_of_W_in_a_file(root, tmp_path, monkeypatch, backend):
    """Where they do not fit in memory, or in memory where the folder cannot be written: the same to the bit."""
    monkeypatch.setenv("DDIR", root)
    files, name, before = [], str(tmp_path / "L"), None
    monkeypatch.setattr(file_arrays, "scratch", lambda *a: files.append(a) or scratch(*a))
    for fits, writable in ((True, True), (False, True), (False, False)):
        monkeypatch.setattr(machine, "fits", lambda size: fits)
        monkeypatch.setattr("diffusion.spendable_memory", lambda: fits << 40)
        with monkeypatch.context() as m:
            if not writable:
                m.setattr(os, "access", lambda path, mode: not path.endswith("knngraph"))
            m.setattr(sys, "argv", ["diffusion.py", "--nbg", "60", "--k", "8", "--niter", "2", "--dim", str(DIM), *backend,
                                    "--storeLname", name, "--storeLiters", "2"])
            main()
        L = np.load(name + "_iter2.npy")
        assert len(files) == (not fits) and (fits or np.array_equal(L, before))
        before = L
    assert files[0][0] == os.path.join(root, "knngraph") and files[0][1] > 60 * 8


def test_stored_L_in_many_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr(StoredL, "ROWS", 64)
    rs = np.random.RandomState(0)
    L, rows = rs.rand(1000, 37).astype(np.float32), rs.permutation(1000)
    panels = np.split(rs.permutation(37), [16, 17, 33])

    class W:
        def read(panel, rows, scale):
            return panel[rows] * scale

    with contextlib.ExitStack() as stack:
        stored = StoredL(str(tmp_path / "L.npy"), L.shape, stack)
        for classes in panels:
            stored.write(classes, rows, W, np.pad(L[:, classes], ((0, 0), (0, 3))), np.float32(2))
        stored.finish()
    np.testing.assert_array_equal(np.load(tmp_path / "L.npy"), 2 * L[rows])
    assert os.listdir(tmp_path) == ["L.npy"]


def test_figures_depend_on_neither_slices_cache_nor_order_of_runs(ddir):
    arguments = ["--mode", "val", "--nlabeled", 2, "--seed", 7, "--nbg", NBG, "--k", 9, "--niter", 6]
    first = printed(diffusion(ddir, *arguments))
    for extra in (["--lslice", 16], ["--lslice", 3], ["--lslice", 0], ["--nocache"], ["--noprune"], ["--backend", "torch"],
                  *([*words, "--lslice", 1] for words in MKL)):
        diffusion(ddir, *arguments[:-3], 9, "--niter", 1, "--nlabeled", 4)      # another run in between, same cache
        assert printed(diffusion(ddir, *arguments, *extra)) == first, extra


def test_more_neighbours_than_nodes_are_all_nodes(ddir):
    texts = [diffusion(ddir, "--mode", "test", "--nbg", 0, "--niter", 2, "--k", k) for k in (2000, 10 ** 9)]
    assert printed(texts[0]) == printed(texts[1])
    assert re.search(r"^note: --k is 2000, there are (\d+) nodes: all of them are neighbours$", texts[0], re.M)


@pytest.mark.parametrize("script", ["diffusion.py", "logreg.py"])
def test_unreadable_images_are_noted(tmp_path, script):
    root = tmp_path
    make_data_directory(root, nclass=10, dim=64, nbg=NBG, raw=True)
    split = class_split.load_split(root / "label_idx.json", "val")
    expected = []
    for name, choose in (("train", lambda labels: class_split.labelled_images(labels, split, 2, 1)[0]),
                         ("val", lambda labels: class_split.test_images(labels, split)[0])):
        _, labels = read_features(root / "features" / f"{name}.hdf5")
        readable = np.arange(len(labels)) % 3 > 0
        with h5py.File(root / "features" / f"{name}.hdf5", "a") as f:
            f["readable"] = readable
        expected.append(np.count_nonzero(~readable[choose(labels)]))
    command = [sys.executable, os.path.join(ROOT, script), "--mode", "val", "--nlabeled", "2", "--seed", "1"]
    command += ["--nbg", "0", "--dim", str(DIM)] if script == "diffusion.py" else ["--maxiter", "3"]
    out = subprocess.run(command, env={**os.environ, "DDIR": str(root)}, capture_output=True, text=True, check=True).stdout
    assert "note: {} labelled and {} test images could not be read".format(*expected) in out


@pytest.mark.parametrize("script", ["diffusion.py", "logreg.py"])
def test_features_of_different_networks_are_refused(tmp_path, script):
    root = make_data_directory(tmp_path, nclass=10, dim=64, nbg=NBG, raw=True)
    train, val = (os.path.join(root, "features", name) for name in ("train.hdf5", "val.hdf5"))
    command = [sys.executable, os.path.join(ROOT, script), "--mode", "val"]
    command += ["--nbg", "0", "--dim", str(DIM), "--niter", "1"] if script == "diffusion.py" else ["--maxiter", "3"]

    def error():
        return subprocess.run(command, env={**os.environ, "DDIR": root}, capture_output=True, text=True).stderr

    write_made_from(train, model="ResNet10", modelfile_sha256="a", transforms={"crop": 32})
    assert not error()
    write_made_from(val, model="ResNet10", modelfile_sha256="b", transforms={"crop": 32})
    assert f"{train} and {val} must come from the same network and transforms: modelfile_sha256 is a of the one, b of" in error()
    write_made_from(val, model="ResNet10", modelfile_sha256="a", transforms={"crop": 32})
    pca = os.path.join(root, f"features/f100m/PCAR{DIM}.vt")
    write_json(pca + ".json", {"network": {"model": "ResNet10", "crop": 64}})
    assert not error() if script == "logreg.py" else f"{train} and {pca} (says its .json) must " in error()


def test_a_split_without_novel_test_images_is_noted(ddir, tmp_path):
    root = make_data_directory(tmp_path, nclass=30, dim=64, nbg=NBG, raw=True)
    path = os.path.join(root, "label_idx.json")
    classes = json.load(open(path))
    classes["novel_classes_2"] = []
    json.dump(classes, open(path, "w"))
    arguments = ("--mode", "test", "--nbg", 0, "--k", 5, "--niter", 1)
    assert "note: no test image is of a novel class" in diffusion(root, *arguments)
    assert "note:" not in diffusion(ddir, *arguments)


def test_stored_completion_is_made_anew_when_its_files_change(tmp_path):
    root = make_data_directory(tmp_path, nclass=20, dim=64, nbg=60, raw=True)
    write_background_graph(root, 60, 8)
    arguments = ["--nbg", 60, "--k", 8, "--niter", 2]
    first = diffusion(root, *arguments)
    assert "images: from " not in first and "images: from " in diffusion(root, *arguments)
    raw = os.path.join(root, f"features/f100m/concatenated_PCAR{DIM}.raw")
    x = np.fromfile(raw, np.float32)
    x[::3] *= -1
    x.tofile(raw)
    write_background_graph(root, 60, 8)
    changed = diffusion(root, *arguments)
    assert "images: from " not in changed and printed(changed) != printed(first)
    # where it was moved elsewhere, that is replaced
    folder, moved = os.path.join(root, f"knngraph/completed_val_ndis60_k8_d{DIM}"), str(tmp_path / "moved")
    os.rename(folder, moved)
    os.symlink(moved, folder)
    assert "images: from " in diffusion(root, *arguments)
    os.utime(raw, (1, 1))
    assert "images: from " not in diffusion(root, *arguments) and os.path.islink(folder)
    assert "images: from " in diffusion(root, *arguments)
    os.unlink(folder)
    os.rename(moved, folder)
    # a truncated array of the stored graph is not taken for whole
    with open(os.path.join(folder, "I.npy"), "rb+") as f:
        f.truncate(200)
    again = diffusion(root, *arguments)
    assert "images: from " not in again and printed(again) == printed(changed)
    # nor is one that does not fit the others, or holds other values
    I = np.load(os.path.join(folder, "I.npy"))
    np.save(os.path.join(folder, "I.npy"), I[:-1])
    assert "images: from " not in diffusion(root, *arguments)
    for name in FixedPart.ARRAYS:
        with open(os.path.join(folder, name + ".npy"), "rb+") as f:
            f.seek(128 + (os.path.getsize(f.name) - 128) // 2)
            f.write(bytes(os.path.getsize(f.name) - f.tell()))
        again = diffusion(root, *arguments)
        assert "images: from " not in again and printed(again) == printed(changed)
    # where values are damaged that its digest does not see, that is told
    made_from = os.path.join(folder, "made_from.json")
    note = read_json(made_from)
    for name, wrong in (("rank", -1), ("rank", 3), ("test_I", 10 ** 6), ("indices", 10 ** 6), ("indptr", -4), ("nsingle", 999),
                        ("base", np.nan), ("scale", np.inf)):
        path = os.path.join(folder, name + ".npy")
        a = np.load(path)
        whole = a.copy()
        a.reshape(-1)[0 if name == "test_I" else len(a) // 2] = wrong
        np.save(path, a)
        write_json(made_from, {**note, "arrays": FixedPart(folder=folder).digests()})
        error = diffusion(root, *arguments, ok=False)
        assert f"{folder} is damaged (" in error and "remove it" in error, error
        np.save(path, whole)
    write_json(made_from, note)
    assert printed(diffusion(root, *arguments)) == printed(changed)


def test_examples(ddir, tmp_path):
    (tmp_path / ".e.1.tmp.npz").touch()         # of a run that was killed
    diffusion(ddir, "--mode", "test", "--nbg", NBG, "--k", 6, "--niter", 3, "--storeexamples", tmp_path / "e.npz",
              "--storeLname", tmp_path / "L", "--lslice", 16)
    assert not (tmp_path / ".e.1.tmp.npz").exists()
    e, L = np.load(tmp_path / "e.npz"), np.load(tmp_path / "L_iter3.npy")
    assert len(L) == e["nlabelled"] + NBG and len(e["labelled_rows"]) == e["nlabelled"]
    np.testing.assert_allclose(e["scores"], L[e["neighbours"]].sum(axis=1), rtol=1e-5)
    best = e["scores"].argmax(axis=1)
    np.testing.assert_allclose(e["contribution"], L[e["neighbours"], best[:, None]], rtol=1e-5)


def set_label(ddir, name, row, label):
    with h5py.File(f"{ddir}/features/{name}.hdf5", "r+") as f:
        f["all_labels"][row] = label


def names_none_in_the_last_column(path):
    I = np.fromfile(path, "i4").reshape(60, 8)
    I[:, 7] = 99
    I.tofile(path)


def repeats_a_neighbour(stem):
    I, D = np.fromfile(stem + "I_11.int32", "i4").reshape(60, 8), np.fromfile(stem + "D_11.float32", "f4").reshape(60, 8)
    I[:, 2], D[:, 2] = I[:, 1], D[:, 1]
    I.tofile(stem + "I_11.int32")
    D.tofile(stem + "D_11.float32")


def truncated(path, nbytes):
    with open(path, "rb+") as f:
        f.truncate(nbytes)


@pytest.mark.parametrize("spoil,arguments,message", [
    (lambda d: os.remove(d + "/label_idx.json"), [], "no label_idx.json"),
    (lambda d: os.remove(d + "/features/val.hdf5"), [], "val.hdf5 does not exist"),
    (lambda d: truncated(d + "/features/train.hdf5", 3000), [], "train.hdf5 .3000 bytes. is truncated"),
    (lambda d: truncated(d + "/features/f100m/PCAR32.vt", 90), [], "PCAR32.vt .90 bytes. is truncated"),
    (lambda d: truncated(d + "/knngraph/ndis60_k8_I_11.int32", 60 * 8 * 4 - 4), [], "1916 bytes.* 1920 .60 rows"),
    (lambda d: truncated(d + "/knngraph/ndis60_k8_D_11.float32", 32), [], "D_11.float32 has 32 bytes"),
    (lambda d: truncated(d + "/features/f100m/concatenated_PCAR32.raw", 128), [], "128 bytes.*7680 .60 rows"),
    (lambda d: None, ["--nbg", 70], "no graph of 70 background images|70 rows"),
    (lambda d: None, ["--k", 9], "no graph of 60 background images with k >= 9.*only k = 8"),
    (lambda d: None, ["--nlabeled", 21], "nlabeled is 21, but novel class .* has 20"),
    (lambda d: None, ["--nlabeled", 0], "must be at least 1"),
    (lambda d: None, ["--storeLname", "x", "--storeLiters", "3"], "asks for iteration 3, --niter is 2"),
    (lambda d: names_none_in_the_last_column(d + "/knngraph/ndis60_k8_I_11.int32"), ["--k", 6],
     "row 0 names a neighbour that is none of 60 nodes"),
    (lambda d: repeats_a_neighbour(d + "/knngraph/ndis60_k8_"), [],
     "I_11.int32: row 0 lists a neighbour twice: python build_graph.py 60 --k 8 --dim 32 --overwrite makes it again"),
    (lambda d: np.full(60 * 8, 99, np.int32).tofile(d + "/knngraph/ndis60_k8_I_11.int32"), [],
     "row 0 names a neighbour that is none of 60 nodes"),
    (lambda d: np.tile(np.arange(9, 17, dtype=np.int32), 60).tofile(d + "/knngraph/ndis60_k8_I_11.int32"), [],
     "made from other vectors"),
    (lambda d: np.full(60 * 8, np.nan, np.float32).tofile(d + "/knngraph/ndis60_k8_D_11.float32"), [], "is damaged"),
    (lambda d: np.random.RandomState(0).randn(60, 32).astype("f4").tofile(
        d + "/features/f100m/concatenated_PCAR32.raw"), [], "made from other vectors"),
    (lambda d: np.full(60 * 8, -1, np.int32).tofile(d + "/knngraph/ndis60_k8_I_11.int32"), [], "row 0 lists no neighbour"),
    (lambda d: set_label(d, "val", 3, 20), [], "val.hdf5: the label of row 3 is 20, .*labels 0 to 19"),
    (lambda d: set_label(d, "train", 5, -1), [], "train.hdf5: the label of row 5 is -1"),
    (lambda d: None, ["--record", "/"], "is a directory"),
    (lambda d: None, ["--storeLiters", "1"], "--storeLname has to say where"),
    (lambda d: None, ["--device", "banana"], "auto, cpu, cuda, or cuda:0"),
    (lambda d: None, ["--lslice", "-5"], "at least 0"),
    (lambda d: np.full(60 * 32, np.nan, np.float32).tofile(d + "/features/f100m/concatenated_PCAR32.raw"), [],
     "row 0 holds NaN"),
])
def test_bad_input_is_one_line(tmp_path, spoil, arguments, message):
    root = make_data_directory(tmp_path, nclass=20, dim=64, nbg=60, raw=True)
    write_background_graph(root, 60, 8)
    spoil(str(root))
    error = diffusion(root, "--nbg", 60, "--k", 8, "--niter", 2, *arguments, ok=False)
    assert re.search(message, error), error
    assert not os.path.exists(os.path.join(root, "logs"))


def test_no_data_directory():
    assert "DDIR is not set" in diffusion("", ok=False)
    assert "is not a directory" in diffusion("/nonexistent", ok=False)


def small_directory(path):
    root = make_data_directory(path, nclass=20, dim=64, nbg=60, raw=True)
    write_background_graph(root, 60, 8)
    return root


@pytest.fixture
def root(tmp_path):
    return small_directory(tmp_path / "ddir")


def test_runs_that_start_together_make_the_stored_part_once(root):
    folder = os.path.join(root, "knngraph", f"completed_val_ndis0_k5_d{DIM}")
    with exclusive(folder):
        process = subprocess.Popen([sys.executable, os.path.join(ROOT, "diffusion.py"), "--dim", str(DIM), "--nbg", "0", "--k",
                                    "5", "--niter", "1"], env={**os.environ, "DDIR": root}, stdout=subprocess.PIPE, text=True)
        assert any("another run is making" in line for line in process.stdout)
        assert not os.path.exists(folder)
    process.communicate(timeout=60)
    assert process.returncode == 0 and os.path.exists(folder)


def test_graph_that_is_changed_or_made_anew_gives_the_same(ddir, tmp_path, monkeypatch):
    monkeypatch.setenv("DDIR", str(ddir))
    made = []
    for few in (0, 1):
        monkeypatch.setattr(completion, "FEW", few << 16)
        monkeypatch.setattr(completion, "FEW_OF_ALL", 0)
        monkeypatch.setattr(completion.Changes, "of_neighbours", lambda *args: made.append(few) or of_neighbours(*args))
        monkeypatch.setattr(sys, "argv", ["diffusion.py", *f"--nbg {NBG} --dim {DIM} --k 8 --niter 3".split(), "--storeLname",
                                          str(tmp_path / f"L{few}")])
        main()
    L = [np.load(tmp_path / f"L{few}_iter3.npy") for few in (0, 1)]
    assert made == [0] and np.array_equal(*L) and L[0].any()


def test_two_runs_do_not_write_one_record(root, tmp_path):
    with exclusive(tmp_path / "r.json"):
        error = diffusion(root, "--nbg", 0, "--k", 5, "--niter", 1, "--record", tmp_path / "r.json", ok=False)
    assert f"another process is writing {tmp_path / 'r.json'}" in error


def test_outputs_do_not_replace_what_is_read(root):
    for name in ("label_idx.json", "features/val.hdf5", f"features/f100m/PCAR{DIM}.vt"):
        path = os.path.join(root, name)
        before = os.stat(path).st_mtime_ns
        error = diffusion(root, "--nbg", 0, "--k", 5, "--niter", 1, "--record", path, ok=False)
        assert f"{path} is an input" in error and os.stat(path).st_mtime_ns == before


def test_iterations_are_counted_from_zero(root):
    out = diffusion(root, "--nbg", 0, "--k", 5, "--niter", 2)
    assert re.findall("^(initial state|iter .*) nnz", out, re.M) == ["initial state", "iter 0/2", "iter 1/2"]


def test_what_a_killed_run_left_of_a_stored_L_is_removed(root, tmp_path):
    (tmp_path / ".L_iter1.1.tmp.npy").touch()
    diffusion(root, "--nbg", 0, "--k", 5, "--niter", 1, "--storeLname", tmp_path / "L")
    assert (tmp_path / "L_iter1.npy").exists() and not list(tmp_path.glob(".L*"))


@pytest.mark.parametrize("name", ["train", "label_idx"])
def test_files_that_are_replaced_while_they_are_read_end_the_run(root, monkeypatch, name):
    load_split = class_split.load_split

    def replaced(path, mode):
        os.utime(path if name == "label_idx" else os.path.join(root, "features", "train.hdf5"))
        return load_split(path, mode)

    monkeypatch.setattr("diffusion.load_split", replaced)
    monkeypatch.setenv("DDIR", str(root))
    monkeypatch.setattr(sys, "argv", f"diffusion.py --nbg 0 --dim {DIM} --k 5 --niter 1".split())
    with pytest.raises(ValueError, match="was replaced while it was read"):
        main()


def test_a_stored_part_that_is_replaced_while_it_is_read_ends_the_run(root, monkeypatch):
    add_novel = completion.add_novel

    def replaced(fixed, *rest):
        write_json(os.path.join(fixed.folder, "made_from.json"), {})
        return add_novel(fixed, *rest)

    monkeypatch.setattr(completion, "add_novel", replaced)
    monkeypatch.setenv("DDIR", root)
    monkeypatch.setattr(sys, "argv", f"diffusion.py --nbg 0 --dim {DIM} --k 5 --niter 1".split())
    with pytest.raises(ValueError, match="was made anew from other files while it was read"):
        main()


def test_killed_run_goes_on_to_the_same_figures(ddir, tmp_path, monkeypatch, capsys):
    def run(record, *more):
        monkeypatch.setattr(sys, "argv", ["diffusion.py", *f"--mode test --nbg {NBG} --dim {DIM} --k 8 --niter 3".split(),
                                          "--record", str(tmp_path / record), *map(str, more)])
        main()

    class Killed(Exception):
        pass

    def stop(*args):
        stop.panels -= 1
        if stop.panels < 0:
            raise Killed
        return diffuse(*args)

    diffuse, state = diffusion_script.diffuse, tmp_path / ".r.json.state.npz"
    monkeypatch.setenv("DDIR", str(ddir))
    monkeypatch.setattr(diffusion_script, "diffuse", stop)
    monkeypatch.setattr(diffusion_script, "STATE_EVERY", -1)
    stop.panels = 10
    run("whole.json")
    for panels in 0, 1:         # killed before the first panel, and after it
        stop.panels = panels
        with pytest.raises(Killed):
            run("r.json", "--lslice", 16)
    kept = state.read_bytes()
    for other in ["--seed", 2], ["--storeexamples", tmp_path / "e.npz"]:
        stop.panels = 0
        with pytest.raises(Killed):
            run("r.json", *other)
    assert "going on" not in capsys.readouterr().out and state.read_bytes() == kept
    stop.panels = 10
    run("r.json")
    assert re.search(r"going on after \d+ of \d+ classes", capsys.readouterr().out) and stop.panels == 9
    assert read_json(tmp_path / "r.json")["results"] == read_json(tmp_path / "whole.json")["results"]
    assert not state.exists()
    with monkeypatch.context() as patch:            # killed when all classes were done
        patch.setattr(diffusion_script, "accuracies", None)
        with pytest.raises(TypeError):
            run("r.json")
    stop.panels = 0
    run("r.json")
    assert "going on after 15 of 15 classes" in capsys.readouterr().out
    assert read_json(tmp_path / "r.json")["results"] == read_json(tmp_path / "whole.json")["results"]
    stop.panels = 10
    state.write_bytes(kept[:len(kept) // 2])
    run("r.json")
    assert "r.json.state.npz is damaged" in capsys.readouterr().out
    assert read_json(tmp_path / "r.json")["results"] == read_json(tmp_path / "whole.json")["results"]
    with np.load(io.BytesIO(kept)) as f:
        np.savez(state, **{**f, "rest": json.dumps({"seconds": float("nan")})})
    run("r.json")
    assert "r.json.state.npz is damaged" in capsys.readouterr().out


@pytest.mark.parametrize("lslice,n,quickest,free,width", [
    (0, 100, 32, None, 64), (0, 100, 128, None, 128), (1, 100, 32, None, 16), (17, 100, 32, None, 32), (999, 100, 32, None, 64),
    ("auto", 100, 32, None, 32), ("auto", 100, 32, 10 ** 9, 32), ("auto", 100, 64, 2 * 4 * 100 * 48 + 99, 48),
    ("auto", 100, 32, 2 * 4 * 100 * 16, 16)])
def test_columns_at_a_time(lslice, n, quickest, free, width):
    assert widest_panel(lslice, n, quickest, free) == width


def test_too_little_memory_for_two_panels():
    with pytest.raises(MemoryError, match="two panels of 16 columns of L for 100 nodes"):
        widest_panel("auto", 100, 32, 2 * 4 * 100 * 16 - 1)
