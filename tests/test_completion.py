"""Graph completion against exact search over all images."""
import contextlib
import errno
import os

import numpy as np
import pytest

import reference
from data_directory import make_data_directory
from graph_utils import SymmetricGraph
from graph_utils import neighbours as nb
from lowshot import completion, exact_search, file_arrays, machine, sampling
from lowshot.cells import Cells
from lowshot.files import file_sha256, write_json
from lowshot.file_arrays import scratch
from lowshot.layout import DataDir
from lowshot.packages import faiss
from test_diffusion import DIM, small_directory, vectors, write_background_graph

NBG, K = 2500, 12


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = make_data_directory(tmp_path_factory.mktemp("completion"), nclass=20, dim=64, nbg=NBG, raw=True)
    write_background_graph(root, NBG, 16)
    return DataDir(str(root)), vectors(root)


def complete(ddir, nbg, base_rows, test_rows, novel, train, stored=False):
    """(nodes' I, test images' I, rank) of background, base and novel images, in this order; W is checked to be theirs."""
    key = completion.FixedKey(ddir, "val", nbg, K, DIM, base_rows, test_rows)
    fixed = (key.stored_or_made if stored else key.make)()
    x = completion.fixed_vectors(ddir, nbg, DIM, fixed.load("base"), scale=fixed.load("scale"))
    changes = completion.add_novel(fixed, x, train[novel])
    np.testing.assert_array_equal(fixed.load("I")[changes.rows], changes.before)
    I = changes.of_neighbours(fixed.load("I"))
    W = SymmetricGraph.changed(fixed.graph(), len(I), *changes.of_entries())
    for found, anew in zip(W.arrays, SymmetricGraph(I, changes.rank).arrays):
        np.testing.assert_array_equal(found, anew)
    return I, changes.test_I, changes.rank


def recall(found, true):
    return np.mean([len(set(f) & set(t)) for f, t in zip(found.tolist(), true.tolist())]) / K


@pytest.mark.parametrize("nbg", [0, 1, 40, NBG])
@pytest.mark.parametrize("nbase,nnovel", [(120, 9), (1, 1), (30, 200)])
def test_exact(data, nbg, nbase, nnovel):
    ddir, v = data
    if nbg not in (0, NBG):
        write_background_graph(ddir.root, nbg, 16)
    base, novel, test = np.arange(nbase), np.arange(nbase, nbase + nnovel), np.arange(0, 80, 2)
    I, test_I, rank = complete(ddir, nbg, base, test, novel, v["train"])
    x = np.concatenate([v["background"][:nbg], v["train"][base], v["train"][novel]])
    np.testing.assert_array_equal(rank, np.arange(len(x)))
    # equal but for neighbours that are equally near to rounding
    assert recall(I, reference.neighbours(x, x, K)) > 0.9995 or len(x) < K
    assert recall(test_I, reference.neighbours(v["val"][test], x, K)) > 0.9995 or len(x) < K
    np.testing.assert_array_equal((I >= 0).sum(axis=1), min(K, len(x)))
    np.testing.assert_array_equal(I[:, 0], np.arange(len(x)))


def test_in_little_memory_the_same(data, monkeypatch):
    ddir, _ = data
    monkeypatch.setattr(exact_search, "EXACT_BELOW", 100)
    made, files, before = [], [], sorted(os.listdir(ddir.path("knngraph")))
    for free in (1 << 40, 10 ** 5):
        monkeypatch.setattr(machine, "available_memory", lambda: free)
        monkeypatch.setattr(file_arrays, "scratch", lambda *a: files.append(a[0]) or scratch(*a))
        made.append(completion.FixedKey(ddir, "val", NBG, K, DIM, np.arange(200), np.arange(80)).make())
        assert files == ([] if free > 10 ** 5 else 2 * [ddir.path("knngraph")])         # similarities, and candidates
    for name in completion.FixedPart.ARRAYS:
        np.testing.assert_array_equal(*(part.load(name) for part in made))
    assert sorted(os.listdir(ddir.path("knngraph"))) == before


@pytest.mark.parametrize("index,stored", [("", False), ("IVF60,Flat", True), ("Flat", False)])
def test_by_cells(data, monkeypatch, index, stored):
    """The cells are those of the background's index where it has some."""
    ddir, v = data
    monkeypatch.setattr(exact_search, "EXACT_BELOW", 100)
    trained = []
    train_cells = Cells.train
    monkeypatch.setattr(Cells, "train", lambda *a, **k: trained.append(1) or train_cells(*a, **k))
    path = ddir.index(NBG)
    if os.path.exists(path):
        os.unlink(path)
    if index:
        made = faiss.index_factory(DIM, index, faiss.METRIC_INNER_PRODUCT)
        made.train(v["background"])
        made.add(v["background"])
        faiss.write_index(made, path)
    base, novel, test = np.arange(200), np.arange(200, 260), np.arange(100)
    I, test_I, rank = complete(ddir, NBG, base, test, novel, v["train"], stored)
    assert bool(trained) == (index != "IVF60,Flat")
    if os.path.exists(path):
        os.unlink(path)
    x = np.concatenate([v["background"], v["train"][base], v["train"][novel]])
    np.testing.assert_array_equal(np.sort(rank), np.arange(len(x)))
    assert recall(I, reference.neighbours(x, x, K)) >= 0.95
    assert recall(test_I, reference.neighbours(v["val"][test], x, K)) >= 0.98
    for row in I:
        assert len(set(row.tolist())) == K


def test_vectors_of_another_pca_are_an_error(data):
    ddir, _ = data
    note = ddir.raw(DIM) + ".json"
    for content, said in (({"pca_sha256": file_sha256(ddir.pca(DIM))}, None), ([], "raw.json is damaged"),
                          ({"pca_sha256": "0"}, "another PCA")):
        write_json(note, content)
        with pytest.raises(ValueError, match=said) if said else contextlib.nullcontext():
            completion.FixedKey(ddir, "val", NBG, K, DIM, np.arange(3), np.arange(3))
    with open(ddir.pca(DIM), "rb") as f:
        whole = f.read()
    os.truncate(ddir.pca(DIM), 90)
    with pytest.raises(ValueError, match="PCAR32.vt .90 bytes. is truncated"):
        completion.FixedKey(ddir, "val", NBG, K, DIM, np.arange(3), np.arange(3))
    with open(ddir.pca(DIM), "wb") as f:
        f.write(whole)
    os.unlink(note)


def test_a_truncated_index_is_an_error(data, monkeypatch):
    ddir, v = data
    monkeypatch.setattr(exact_search, "EXACT_BELOW", 100)
    with open(ddir.index(NBG), "wb") as f:
        f.write(b"IwFl" + bytes(50))
    try:
        with pytest.raises(ValueError, match="truncated or not a Faiss index: remove it and run build_graph.py"):
            complete(ddir, NBG, np.arange(200), np.arange(100), np.arange(200, 260), v["train"])
    finally:
        os.unlink(ddir.index(NBG))


@pytest.mark.parametrize("nbg,nbase", [(NBG, 200), (NBG, 0), (0, 300)])
def test_test_images_are_searched_by_cells(data, monkeypatch, nbg, nbase):
    """More of them than are searched exactly; with cells that are given up before their similarities are computed."""
    ddir, v = data
    monkeypatch.setattr(exact_search, "EXACT_BELOW", 100)
    monkeypatch.setattr(sampling, "SAMPLE", 40)
    searched = []
    search_cells = nb.search_cells
    monkeypatch.setattr(nb, "search_cells", lambda Q, *a, **k: searched.append(len(Q)) or search_cells(Q, *a, **k))
    base, novel, test = np.arange(nbase), np.arange(300, 340), np.arange(100)
    I, test_I, rank = complete(ddir, nbg, base, test, novel, v["train"])
    assert len(test) in searched
    x = np.concatenate([v["background"][:nbg], v["train"][base], v["train"][novel]])
    assert recall(I, reference.neighbours(x, x, K)) >= 0.95
    assert recall(test_I, reference.neighbours(v["val"][test], x, K)) >= 0.97


def test_a_part_that_cannot_be_stored_serves_this_run(data, monkeypatch, capsys):
    ddir, v = data
    key = completion.FixedKey(ddir, "full", NBG, K, DIM, np.arange(20), np.arange(30))

    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as m:
        m.setattr(completion.np, "save", full)
        part = key.stored_or_made()
    assert "note: the completed graph is not kept for further runs" in capsys.readouterr().out
    assert part.folder is None and key.stored() is None
    assert not [name for name in os.listdir(ddir.path("knngraph")) if name.startswith("completed_full")]
    np.testing.assert_array_equal(part.load("I"), key.stored_or_made().load("I"))


def test_a_stored_part_that_is_replaced_while_it_is_read_is_an_error(data):
    ddir, _ = data
    key, other = (completion.FixedKey(ddir, "test", 0, K, DIM, np.arange(n), np.arange(20)) for n in (40, 41))
    part = key.stored_or_made()
    key.check_unchanged(part)
    other.stored_or_made()
    with pytest.raises(ValueError, match="was made anew from other files while it was read: run this again"):
        key.check_unchanged(part)
    key.check_unchanged(completion.FixedPart(part.arrays))      # one in memory


def test_what_a_killed_run_left_of_a_stored_part_is_removed(data):
    ddir, _ = data
    key = completion.FixedKey(ddir, "test", 0, K, DIM, np.arange(30), np.arange(20))
    left = f"{key.folder}.12345.tmp"
    os.makedirs(left)
    np.save(os.path.join(left, "I.npy"), np.zeros(3))
    key.stored_or_made()
    folder, name = os.path.split(key.folder)
    assert [f for f in os.listdir(folder) if f.startswith(name) and not f.endswith(".lock")] == [name]


def test_the_stored_part_is_read_as_it_was_made(data):
    ddir, _ = data
    key = completion.FixedKey(ddir, "test", NBG, K, DIM, np.arange(50), np.arange(30))
    assert key.stored() is None
    made, stored = key.make(), key.stored_or_made()
    for name in completion.FixedPart.ARRAYS:
        np.testing.assert_array_equal(made.load(name), stored.load(name))
        np.testing.assert_array_equal(made.load(name), stored.mapped(name))
    other = completion.FixedKey(ddir, "test", NBG, K, DIM, np.arange(51), np.arange(30))
    assert other.stored() is None
    os.utime(ddir.train)
    assert completion.FixedKey(ddir, "test", NBG, K, DIM, np.arange(50), np.arange(30)).stored() is None


def test_a_stored_part_of_other_test_images_or_another_version_is_not_taken(data, monkeypatch):
    ddir, _ = data
    arguments = ddir, "test", 0, K, DIM, np.arange(50)
    completion.FixedKey(*arguments, np.arange(30)).stored_or_made()
    assert completion.FixedKey(*arguments, np.arange(30)).stored() is not None
    assert completion.FixedKey(*arguments, np.arange(1, 31)).stored() is None
    monkeypatch.setattr(completion, "VERSION", completion.VERSION + 1)
    assert completion.FixedKey(*arguments, np.arange(30)).stored() is None


def test_cells_of_an_index_of_others_are_not_taken(data, monkeypatch):
    ddir, v = data
    monkeypatch.setattr(exact_search, "EXACT_BELOW", 100)
    trained, train_cells = [], Cells.train
    monkeypatch.setattr(Cells, "train", lambda *a, **k: trained.append(1) or train_cells(*a, **k))
    made = faiss.index_factory(DIM, "IVF20,Flat", faiss.METRIC_INNER_PRODUCT)
    made.train(v["background"])
    made.add(v["background"][:-1])
    faiss.write_index(made, ddir.index(NBG))
    try:
        complete(ddir, NBG, np.arange(200), np.arange(20), np.arange(200, 210), v["train"])
    finally:
        os.unlink(ddir.index(NBG))
    assert trained


def test_neighbours_that_are_none_and_lists_out_of_order_are_refused(tmp_path):
    ddir = DataDir(small_directory(tmp_path / "ddir"))
    stem = ddir.path("knngraph", "ndis60_k8_")
    I, D = np.fromfile(stem + "I_11.int32", np.int32), np.fromfile(stem + "D_11.float32", np.float32)
    x = completion.fixed_vectors(ddir, 60, DIM, np.empty((0, DIM), np.float32))
    out = np.empty((60, 8), np.int32), np.empty((60, 8), np.float32)
    completion.read_background_graph(ddir, 60, 8, *out, x)
    for wrong in (60, -2):
        spoilt = I.copy()
        spoilt[30 * 8 + 3] = wrong
        spoilt.tofile(stem + "I_11.int32")
        with pytest.raises(ValueError, match="row 30 names a neighbour that is none of 60 nodes"):
            completion.read_background_graph(ddir, 60, 8, *out, x)
    I.reshape(60, 8)[:, ::-1].tofile(stem + "I_11.int32")
    D.reshape(60, 8)[:, ::-1].tofile(stem + "D_11.float32")
    with pytest.raises(ValueError, match="similarities in decreasing order were expected"):
        completion.read_background_graph(ddir, 60, 8, *out, x)
