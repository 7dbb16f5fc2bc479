"""Feature files and headerless matrices: what is read, and what is refused."""
import os
import sys

import h5py
import numpy as np
import pytest

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path[:0] = [ROOT, os.path.join(ROOT, "tests")]
from data_directory import make_data_directory, read_features, write_features, write_made_from  # noqa: E402
from lowshot import features  # noqa: E402
from lowshot.features import (FeatureFile, MatrixFile, check_same_network, labels_of_both,  # noqa: E402
                              normalise_rows)

N, D = 53, 7


@pytest.fixture(params=["contiguous", "chunked", "float64", "compressed"])
def stored(request, tmp_path, monkeypatch):
    """(path, x, labels) of one file with spare rows; slabs of 10 rows."""
    monkeypatch.setattr(features, "SLAB_BYTES", 10 * 4 * D)
    rs = np.random.RandomState(0)
    x, y = rs.randn(N, D).astype(np.float32), rs.randint(0, 1000, N)
    path = str(tmp_path / "f.hdf5")
    write_features(path, x, y, spare=4, chunks=(3, D) if request.param == "chunked" else None)
    if request.param in ("float64", "compressed"):
        with h5py.File(path, "r+") as f:
            content = f["all_feats"][:]
            del f["all_feats"]
            f.create_dataset("all_feats", data=content, dtype="f8" if request.param == "float64" else "f4",
                             compression="gzip" if request.param == "compressed" else None)
    return path, x, y


def test_rows_in_any_order_with_repeats(stored):
    path, x, y = stored
    rs = np.random.RandomState(1)
    with FeatureFile(path) as f:
        assert (f.n, f.d) == (N, D)
        assert f.labels().tolist() == y.tolist() and f.labels().dtype == np.int64
        for rows in ([], [0], [N - 1], [5, 5, 5], [50, 3, 4, 5, 20], np.arange(N), np.arange(N)[::-1],
                     rs.permutation(N)[:31], rs.randint(0, N, 200)):
            got = f.read(rows)
            assert got.dtype == np.float32 and got.shape == (len(rows), D)
            assert np.array_equal(got, x[np.asarray(rows, int)])


def test_slabs_cover_all_valid_rows_in_order(stored):
    path, x, _ = stored
    with FeatureFile(path) as f:
        parts = list(f.slabs())
        assert [i for i, _ in parts] == list(range(0, N, 10))
        assert np.array_equal(np.concatenate([p for _, p in parts]), x)
        assert np.array_equal(np.concatenate([p for _, p in f.slabs(7, 29)]), x[7:29])
        assert list(f.slabs(5, 5)) == []


@pytest.mark.parametrize("name", ["all_feats", "all_labels", "readable"])
@pytest.mark.parametrize("kind", ["link", "virtual", "external"])
def test_datasets_in_other_files_are_refused(kind, name, tmp_path):
    path, other = str(tmp_path / "f.hdf5"), str(tmp_path / "other")
    write_features(path, np.ones((N, D), np.float32), np.zeros(N))
    with h5py.File(path, "r+") as f:
        if name == "readable":
            f[name] = np.ones(N, bool)
        content = f[name][:]
        del f[name]
        if kind == "external":
            f.create_dataset(name, data=content, external=[(other, 0, content.nbytes)])
        else:
            with h5py.File(other, "w") as g:
                g["x"] = content
            if kind == "link":
                f[name] = h5py.ExternalLink(other, "x")
            else:
                layout = h5py.VirtualLayout(content.shape, content.dtype)
                layout[...] = h5py.VirtualSource(other, "x", content.shape)
                f.create_virtual_dataset(name, layout)
    with pytest.raises(ValueError, match=f"f.hdf5: {name} is kept in other files: copy it"):
        FeatureFile(path)


def test_transform_and_progress(stored):
    path, x, _ = stored
    seen = []
    with FeatureFile(path) as f:
        got = f.read(np.arange(N)[::-1], transform=lambda part: 2 * part[:, :3], progress=seen.append)
    assert np.array_equal(got, 2 * x[::-1, :3]) and seen == [10, 20, 30, 40, 50, 53]


def test_rows_beyond_count_are_refused(stored):
    path, _, _ = stored
    with FeatureFile(path) as f:
        with pytest.raises(ValueError, match=f"row {N} asked for, the file holds {N} rows"):
            f.read([0, N])
        with pytest.raises(ValueError, match="row -1 asked for"):
            f.read([0, -1])


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_nan_names_the_row(stored, value):
    path, _, _ = stored
    with h5py.File(path, "r+") as f:
        f["all_feats"][31, 2] = value
    with FeatureFile(path) as f:
        with pytest.raises(ValueError, match="f.hdf5: row 31 holds NaN or infinity"):
            f.read([40, 31, 2])
        with pytest.raises(ValueError, match="row 31 holds NaN"):
            list(f.slabs())
        f.read([30, 32])


def test_rows_are_taken_whose_squares_float32_holds(tmp_path):
    path = str(tmp_path / "f.hdf5")
    x = np.full((3, 4), 9e18, np.float32)
    x[1] = 1e19                 # whose squares add up to more than float32 holds
    write_features(path, x, np.zeros(3))
    with FeatureFile(path) as f:
        assert np.array_equal(f.read([0, 2]), x[[0, 2]])
        with pytest.raises(ValueError, match=r"f.hdf5: row 1 holds numbers as large as 1e\+19"):
            f.read([2, 1])


def test_rows_of_zeros_are_told(tmp_path, capsys):
    path, x = str(tmp_path / "f.hdf5"), np.ones((9, 4), np.float32)
    x[5:] = 0
    x[6] = 1, -1, 2, -2         # which add up to zero
    write_features(path, x, np.zeros(9))
    with FeatureFile(path) as f:
        f.read([0, 6])
    assert capsys.readouterr().out == ""
    with FeatureFile(path) as f:
        assert np.array_equal(np.concatenate([part for _, part in f.slabs()]), x)
    assert "f.hdf5: 3 of the rows that were read are zeros" in capsys.readouterr().out


def test_labels_are_whole_numbers(tmp_path):
    path = str(tmp_path / "f.hdf5")
    write_features(path, np.ones((3, 4), np.float32), np.zeros(3))
    for wrong in (np.nan, np.inf, 1.5, 1e300):
        with h5py.File(path, "r+") as f:
            del f["all_labels"]
            f["all_labels"] = np.array([7, wrong, 2.])
        with FeatureFile(path) as f, pytest.raises(ValueError, match="f.hdf5: the label of row 1 is .*whole number"):
            f.labels()
    with h5py.File(path, "r+") as f:
        f["all_labels"][1] = 4
    with FeatureFile(path) as f:
        assert f.labels().tolist() == f.labels(8).tolist() == [7, 4, 2]
        with pytest.raises(ValueError, match="f.hdf5: the label of row 0 is 7, label_idx.json has classes for labels 0 to 6 .*"
                                             ": check that labels start at 0, or list class 8 there, .* label_names$"):
            f.labels(7)
    with h5py.File(path, "r+") as f:
        f["all_labels"][2] = -1
    with FeatureFile(path) as f, pytest.raises(ValueError, match="label of row 2 is -1, .*: check that labels start at 0$"):
        f.labels(8)


def test_network_of_a_file(tmp_path):
    path = str(tmp_path / "f.hdf5")
    write_features(path, np.ones((3, 4), np.float32), np.zeros(3))
    with FeatureFile(path) as f:
        assert f.made_from == f.network == {}
    write_made_from(path, model="ResNet50", modelfile_sha256="ab", i0=0, i1=3, transforms={"crop": 224})
    with FeatureFile(path) as f:
        assert f.made_from["i1"] == 3
        assert f.network == {"model": "ResNet50", "modelfile_sha256": "ab", "crop": 224}
    for damaged in ("{", "[1]", 7):
        with h5py.File(path, "r+") as f:
            f.attrs["made_from"] = damaged
        with FeatureFile(path) as f:
            assert f.network == {}


def test_files_of_other_networks():
    network = {"model": "ResNet50", "modelfile_sha256": "ab", "crop": 224}
    for other in ({}, network, {"model": "ResNet50", "resize": 256}):
        check_same_network("a", network, "b", other)
        check_same_network("a", other, "b", network)
    for other, message in (({**network, "model": "ResNet10"}, "model is ResNet50 of the one, ResNet10 of the other"),
                           ({**network, "modelfile_sha256": None}, "modelfile_sha256 is ab of the one, None of the other"),
                           ({"crop": 32}, "crop is 224 of the one, 32 of the other")):
        with pytest.raises(ValueError, match=f"a and b must come from the same network and transforms: {message}"):
            check_same_network("a", network, "b", other)


def test_damaged_chunk_is_named(tmp_path):
    path = str(tmp_path / "f.hdf5")
    x = np.arange(32, dtype=np.float32).reshape(8, 4)
    write_features(path, x, np.zeros(8))
    with h5py.File(path, "r+") as f:
        del f["all_feats"]
        chunk = f.create_dataset("all_feats", data=x, chunks=(4, 4), compression="gzip").id.get_chunk_info(1)
    with open(path, "rb+") as f:
        f.seek(chunk.byte_offset)
        f.write(b"\xff" * chunk.size)
    with FeatureFile(path) as f:
        assert np.array_equal(f.read([1, 2]), x[1:3])
        for read in (lambda: f.read([1, 6]), lambda: list(f.slabs())):
            with pytest.raises(ValueError, match="f.hdf5: rows . to . of all_feats are damaged: save_features.py"):
                read()


def test_missing_and_truncated_files(stored):
    path, _, _ = stored
    with pytest.raises(ValueError, match="does not exist: save_features.py makes it"):
        FeatureFile(path + "x")
    whole = os.path.getsize(path)
    for nbytes in (whole - 1, whole // 2, 100, 0):
        with open(path, "rb+") as f:
            f.truncate(nbytes)
        with pytest.raises(ValueError, match=rf"\({nbytes} bytes\) is truncated or not an HDF5 file"):
            FeatureFile(path)
    with open(path, "wb") as f:
        f.write(b"text, no HDF5" * 100)
    with pytest.raises(ValueError, match="is truncated or not an HDF5 file"):
        FeatureFile(path)


@pytest.mark.parametrize("fraction", [0.2, 0.5, 0.9])
def test_file_cut_off_in_the_middle(stored, fraction):
    path, _, _ = stored
    with open(path, "rb+") as f:
        f.truncate(int(fraction * os.path.getsize(path)))
    with pytest.raises(ValueError, match="is truncated or not an HDF5 file"):
        with FeatureFile(path) as f:
            f.read(np.arange(N))


@pytest.mark.parametrize("offset", [40, 136, 400, 800, 1400, 2000])
def test_damaged_metadata(tmp_path, offset):
    """A ValueError that names the file, or nothing amiss; never h5py's own errors."""
    root = make_data_directory(tmp_path, nclass=4, dim=16)
    path = os.path.join(root, "features", "val.hdf5")
    with open(path, "rb+") as f:
        f.seek(offset)
        f.write(b"\xff" * 16)
    try:
        with FeatureFile(path) as f:
            f.labels()
    except ValueError as e:
        assert "val.hdf5" in str(e)


def test_file_cut_off_while_open(tmp_path):
    path = str(tmp_path / "f.hdf5")
    write_features(path, np.ones((5000, 64), np.float32), np.zeros(5000))
    with FeatureFile(path) as f:
        os.truncate(path, 400000)
        with pytest.raises(ValueError, match="f.hdf5 is truncated: it ends before byte"):
            f.read([1, 4999])


def edit(path, **datasets):
    with h5py.File(path, "r+") as f:
        for name, value in datasets.items():
            del f[name]
            if value is not None:
                f[name] = value


@pytest.mark.parametrize("datasets, message", [
    (dict(all_feats=None), "no 2-dimensional dataset 'all_feats'"),
    (dict(all_feats=np.zeros(9, "f4")), r"no 2-dimensional dataset 'all_feats' .but one of shape \(9,\)."),
    (dict(all_labels=np.zeros((20, 2), "i4")), r"no 1-dimensional dataset 'all_labels' .but one of shape \(20, 2\)."),
    (dict(all_labels=None), "no 1-dimensional dataset 'all_labels'"),
    (dict(count=None), "no 1-dimensional dataset 'count'"),
    (dict(count=np.zeros(0, "i4")), "'count' is empty"),
    (dict(count=np.array([99], "i4")), "count is 99, but all_feats has 20 rows and all_labels 20"),
    (dict(count=np.array([-1], "i4")), "count is -1"),
    (dict(count=np.array([0], "i4")), "count is 0, but all_feats has 20 rows: the file is damaged, or was cut off"),
    (dict(count=np.array([19.5])), "count holds float64 .*19.5.*, a number of rows was expected"),
    (dict(all_labels=np.zeros(19, "i4")), "all_labels 19"),
    (dict(all_feats=np.zeros((20, 3), "i4")), "all_feats holds int32, floating point was expected"),
])
def test_files_of_another_shape(tmp_path, datasets, message):
    path = str(tmp_path / "f.hdf5")
    write_features(path, np.zeros((20, 3), np.float32), np.zeros(20))
    edit(path, **datasets)
    with pytest.raises(ValueError, match=message):
        FeatureFile(path)


@pytest.mark.parametrize("rows, counts", [(1 << 28, 1), (1 << 40, 1), (20, 1 << 40)])
def test_more_rows_than_a_file_can_hold(tmp_path, rows, counts):
    """Of chunks that were never written."""
    path = str(tmp_path / "f.hdf5")
    write_features(path, np.zeros((20, 3), np.float32), np.zeros(20))
    with h5py.File(path, "r+") as f:
        for name, shape in ("all_feats", (rows, 64)), ("all_labels", (rows,)), ("count", (counts,)):
            del f[name]
            f.create_dataset(name, shape, "f4" if name == "all_feats" else "i8", chunks=True, compression="gzip")
        f["count"][0] = rows
    if rows > 20:
        with pytest.raises(ValueError, match=f"which cannot be {rows} rows of 64: it is damaged"):
            FeatureFile(path)
    else:
        with FeatureFile(path) as f:
            assert f.n == 20 and not f.labels().any()


@pytest.mark.parametrize("readable", [np.array(20 * ["yes"], "S3"), np.zeros(20, [("a", "i4")]), np.ones((20, 1), bool)])
def test_what_does_not_tell_which_images_could_be_read(tmp_path, readable):
    path = str(tmp_path / "f.hdf5")
    write_features(path, np.zeros((20, 3), np.float32), np.zeros(20))
    with h5py.File(path, "r+") as f:
        f["readable"] = readable
    with FeatureFile(path) as f:
        assert f.readable() is None and f.unreadable(np.arange(20)) == 0


def test_labels_as_a_column_and_a_count_without_dimensions(tmp_path):
    path = str(tmp_path / "f.hdf5")
    write_features(path, np.zeros((20, 3), np.float32), np.zeros(20))
    edit(path, all_labels=np.arange(20)[:, None], count=np.int32(17))
    with FeatureFile(path) as f:
        assert f.n == 17 and f.labels(17).tolist() == list(range(17))


def test_empty_file(tmp_path):
    path = str(tmp_path / "f.hdf5")
    write_features(path, np.zeros((0, 3), np.float32), np.zeros(0))
    with FeatureFile(path) as f:
        assert f.n == 0 and f.read([]).shape == (0, 3) and list(f.slabs()) == []


def test_size_of_a_matrix(tmp_path):
    path = str(tmp_path / "m.raw")
    x = np.arange(12, dtype=np.float32).reshape(4, 3)
    x.tofile(path)
    assert np.array_equal(MatrixFile(path, np.float32, 3, 4)[:], x) and len(MatrixFile(path, np.float32, 3, 2)[:]) == 2
    with pytest.raises(IndexError):
        MatrixFile(path, np.float32, 3, 4)[::2]
    for arguments, message in [((5, 1), r"48 bytes, at least 20 \(1 rows of 20\) expected: truncated or of another shape"),
                               ((3, 5), r"at least 60 \(5 rows of 12\) expected: it holds 4 rows"),
                               ((5, 2, "make it"), "truncated or of another shape; make it --overwrite makes it again")]:
        with pytest.raises(ValueError, match=message):
            MatrixFile(path, np.float32, *arguments)
    open(path, "w").close()
    with pytest.raises(ValueError, match="has 0 bytes"):
        MatrixFile(path, np.float32, 3, 0)
    with pytest.raises(ValueError, match="gone does not exist: train makes it"):
        MatrixFile(str(tmp_path / "gone"), np.float32, 3, 1, maker="train")


@pytest.mark.parametrize("at_once", [1, 1000, 4000, 1 << 20])
def test_a_matrix_is_read_in_parts(tmp_path, monkeypatch, at_once):
    monkeypatch.setattr(features, "READ_AT_ONCE", at_once)
    x = np.random.RandomState(0).randn(371, 7).astype("<f4")
    path = str(tmp_path / "raw")
    x.tofile(path)
    matrix = features.MatrixFile(path, "<f4", 7, 371)
    np.testing.assert_array_equal(matrix[3:370], x[3:370])
    os.truncate(path, 371 * 28 - 1)
    np.testing.assert_array_equal(matrix[:370], x[:370])
    with pytest.raises(ValueError, match="raw is truncated: it ends before byte 10388"):
        matrix[3:371]


def test_normalise_rows():
    x = np.array([[3, 4], [0, 0], [0, -2]], np.float32)
    assert normalise_rows(x, "x") is x and np.allclose(x, [[.6, .8], [0, 0], [0, -1]])
    assert normalise_rows(np.zeros((0, 5), np.float32), "none").shape == (0, 5)
    x = np.array([[3e-18, 4e-18], [3e-21, 4e-21]], np.float32)
    assert np.allclose(normalise_rows(x, "x"), [[.6, .8], [0, 0]])      # the second has no direction that float32 could tell
    # squares that float32 cannot hold give no norm; numpy's warnings would be errors here
    x[1, 1] = 2e30
    with pytest.raises(ValueError, match="f.raw: row 8 holds numbers as large as 2e\\+30"):
        features.row_norms(x, "f.raw", range(7, 9))
    with pytest.raises(ValueError, match="the vectors: a row holds numbers"):
        normalise_rows(x, "the vectors")


def test_data_directory_is_the_same_each_time(tmp_path):
    a, b = (make_data_directory(tmp_path / name, raw=True, pca_dim=16) for name in "ab")
    names = [os.path.relpath(os.path.join(folder, f), a) for folder, _, files in os.walk(a) for f in files]
    assert {"features/f100m/PCAR16.vt", "features/f100m/block1.hdf5", "label_idx.json"} < set(names)
    for name in names:
        with open(os.path.join(a, name), "rb") as f, open(os.path.join(b, name), "rb") as g:
            assert f.read() == g.read(), name
    x = np.concatenate([read_features(os.path.join(a, f"features/f100m/block{i}.hdf5"))[0] for i in (0, 1)])
    assert x.shape == (500, 64) and (x >= 0).all()
    assert os.path.getsize(os.path.join(a, "features/f100m/concatenated_PCAR16.raw")) == 500 * 16 * 4


def test_features_of_the_other_byte_order(tmp_path):
    path, x = str(tmp_path / "f.hdf5"), np.arange(6, dtype=np.float32).reshape(3, 2)
    write_features(path, x, np.zeros(3))
    edit(path, all_feats=x.astype(">f4"))
    with FeatureFile(path) as f:
        assert np.array_equal(f.read([2, 0]), x[[2, 0]])


def test_rows_beyond_the_count_need_not_be_readable(tmp_path):
    path = str(tmp_path / "f.hdf5")
    write_features(path, np.ones((3, 2), np.float32), np.zeros(3), spare=2)
    with h5py.File(path, "r+") as f:
        f["readable"] = np.array([1, 0, 1, 0, 0], bool)
    with FeatureFile(path) as f:
        assert f.readable().tolist() == [True, False, True] and f.unreadable(np.array([0, 1])) == 1


def test_class_names_and_labels_of_two_files(tmp_path, capsys):
    """Classes that have names are known, whatever the split lists; files may not count them in different ways."""
    def file(name, labels, classes):
        path = str(tmp_path / name)
        write_features(path, np.ones((len(labels), 2), np.float32), np.array(labels))
        if classes is not None:
            with h5py.File(path, "r+") as f:
                f.create_dataset("class_names", data=classes, dtype=h5py.string_dtype())
        return FeatureFile(path)
    with file("a", [0, 2, 1], [b"cat", b"caf\xe9", b"dog"]) as a, file("b", [1, 0], [b"cat", b"caf\xe9"]) as b, \
            file("c", [1, 0], [b"cat", b"cow"]) as c, file("d", [0, 1], None) as d, file("e", [3], None) as e:
        assert a.class_names == ["cat", os.fsdecode(b"caf\xe9"), "dog"] and d.class_names == []
        for val in (b, d):
            found = labels_of_both(a, val, 2)
            assert [x.tolist() for x in found] == [[0, 2, 1], val.labels().tolist()]
        with pytest.raises(ValueError, match="class 2 is .* in .*a, but cow in .*c: save_features.py makes both anew"):
            labels_of_both(a, c, 3)
        with pytest.raises(ValueError, match="e: the label of row 0 is 3, label_idx.json has classes for labels 0 to 2"):
            labels_of_both(a, e, 2)
    for name, of_same in (("a", "v"), ("d", "v"), ("d", "w")):
        write_made_from(str(tmp_path / name), sha256_zip_sizes=of_same)
    with FeatureFile(str(tmp_path / "a")) as a, FeatureFile(str(tmp_path / "d")) as d:
        capsys.readouterr()
        labels_of_both(a, a, 2), labels_of_both(a, d, 2)
        assert capsys.readouterr().out.count("are these the same images?") == 1
    write_made_from(str(tmp_path / "d"), model="ResNet10")
    write_made_from(str(tmp_path / "b"), model="ResNet50")
    with FeatureFile(str(tmp_path / "b")) as b, FeatureFile(str(tmp_path / "d")) as d:
        with pytest.raises(ValueError, match="same network"):
            labels_of_both(b, d, 2)
