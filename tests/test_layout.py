"""Where files lie under the data directory."""
import os
import sys

import pytest

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from lowshot.layout import DataDir, padded_to_power_of_two  # noqa: E402


@pytest.fixture
def root(tmp_path):
    (tmp_path / "features" / "f100m").mkdir(parents=True)
    (tmp_path / "knngraph").mkdir()
    return tmp_path


def test_root_comes_from_the_environment(monkeypatch, root):
    monkeypatch.setenv("DDIR", str(root))
    assert DataDir().root == str(root) and DataDir().train == str(root / "features" / "train.hdf5")
    for value in (None, ""):
        monkeypatch.delenv("DDIR") if value is None else monkeypatch.setenv("DDIR", value)
        with pytest.raises(ValueError, match="DDIR is not set"):
            DataDir()
    with pytest.raises(ValueError, match="DDIR=.*nowhere is not a directory"):
        DataDir(str(root / "nowhere"))


def test_fixed_names(root):
    d, r = DataDir(str(root)), str(root)
    assert d.val == f"{r}/features/val.hdf5"
    assert d.index(1000000) == f"{r}/knngraph/ndis1000000.index"
    assert d.graph(1000000, 32) == (f"{r}/knngraph/ndis1000000_k32_I_11.int32", f"{r}/knngraph/ndis1000000_k32_D_11.float32")
    assert d.pca() == f"{r}/features/f100m/PCAR256.vt" and d.raw(64) == f"{r}/features/f100m/concatenated_PCAR64.raw"
    assert d.log("a", "b.json") == f"{r}/logs/a/b.json"


def test_other_dimensions_are_told(root):
    d = DataDir(str(root))
    d.check_dim(256)
    (root / "features" / "PCAR64.vt").touch()
    with pytest.raises(ValueError, match="has the PCA to 64 dimensions, not to 256: --dim 64, or python train_apply_pca.py train"):
        d.check_dim(256)
    d.check_dim(64)
    (root / "features" / "f100m" / "concatenated_PCAR256.raw").touch()
    d.check_dim(256)


def test_files_one_folder_up_are_read_but_not_written(root):
    d = DataDir(str(root))
    above, fixed = root / "features" / "PCAR256.vt", root / "features" / "f100m" / "PCAR256.vt"
    above.touch()
    assert d.pca() == str(above) and d.pca(write=True) == str(fixed)
    fixed.touch()
    assert d.pca() == str(fixed)


def test_blocks_are_in_number_order_without_gaps(root):
    d, folder = DataDir(str(root)), root / "features" / "f100m"
    with pytest.raises(ValueError, match="no block0.hdf5"):
        d.blocks()
    for name in [f"block{i}.hdf5" for i in range(12)] + ["block3.hdf5.tmp", "block01.hdf5", "blocks.hdf5", ".block12.7.tmp.hdf5"]:
        (folder / name).touch()
    assert [os.path.basename(p) for p in d.blocks()] == [f"block{i}.hdf5" for i in range(12)]
    (folder / "block4.hdf5").unlink()
    with pytest.raises(ValueError, match="has block11.hdf5 but no block4.hdf5"):
        d.blocks()


def test_find_graph_takes_the_narrowest_that_serves(root):
    d = DataDir(str(root))
    with pytest.raises(ValueError, match=r"no graph of 50 .*\(none\): python build_graph.py 50 --k 30"):
        d.find_graph(50, 30, 256)
    for k in (8, 64, 32):
        for path in d.graph(50, k):
            open(path, "w").close()
    for path in d.graph(500, 30):
        open(path, "w").close()
    assert d.find_graph(50, 30, 256) == (*d.graph(50, 32), 32) and d.find_graph(50, 33, 256)[2] == 64
    os.unlink(d.graph(50, 32)[1])                       # D is missing: not a graph
    assert d.find_graph(50, 30, 256)[2] == 64
    os.rename(d.graph(50, 64)[1], root / "D")
    with pytest.raises(ValueError, match=r"ndis50_k32_D_11.float32 does not exist: .*build_graph.py 50 --k 32 --overwrite makes it"):
        d.find_graph(50, 30, 256)
    os.rename(root / "D", d.graph(50, 64)[1])
    with pytest.raises(ValueError, match="only k = 8, 32, 64"):
        d.find_graph(50, 65, 256)
    with pytest.raises(ValueError, match="build_graph.py 50 --k 65 --dim 16 makes it"):
        d.find_graph(50, 65, 16)
    with pytest.raises(ValueError, match="k is 1025, graphs of background images have at most 1024 neighbours"):
        d.find_graph(50, 1025, 256)


def test_stored_columns():
    assert [padded_to_power_of_two(k) for k in (1, 2, 3, 30, 32, 33)] == [1, 2, 4, 32, 32, 64]


def test_label_idx_in_the_data_directory_or_here(root, tmp_path_factory, monkeypatch):
    here = tmp_path_factory.mktemp("here")
    monkeypatch.chdir(here)
    d = DataDir(str(root))
    with pytest.raises(ValueError, match="no label_idx.json in .* nor in the current folder: .*; or write it: see Your own"):
        d.label_idx()
    (here / "label_idx.json").touch()
    assert d.label_idx() == "label_idx.json" and d.of_label_idx() == f" of {here}/label_idx.json"
    (root / "label_idx.json").touch()
    assert d.label_idx() == str(root / "label_idx.json") and d.of_label_idx() == ""
