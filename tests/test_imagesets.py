import concurrent.futures
import errno
import io
import json
import mmap
import os
import pickle
import struct
import zipfile

import numpy as np
import pytest
from PIL import Image

from lowshot import imagesets
from lowshot.imagesets import (CONFIGS, DAMAGED, MISSING, Batches, CifarSet, Missing, Preprocess, ZipSet, decode,
                               folder_set, load_config, meta_set, open_set)

CONFIG_NAMES = sorted(os.listdir(CONFIGS))


def picture(seed, w=32, h=32, format="JPEG", mode="RGB", **more):
    """An image file's bytes."""
    rs = np.random.RandomState(seed)
    small = Image.fromarray(rs.randint(0, 256, (4, 4, 3)).astype(np.uint8))
    file = io.BytesIO()
    small.resize((w, h), Image.BICUBIC).convert(mode).save(file, format, **more)
    return file.getvalue()


def plain(data):
    """The obvious reference."""
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def write_zip(path, members, compression=zipfile.ZIP_STORED):
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with zipfile.ZipFile(path, "w", compression) as f:
        for name, data in members.items():
            f.writestr(name, data)


def write_config(tmp_path, text):
    path = tmp_path / "c.yaml"
    path.write_text(text)
    return str(path)


# ---------------------------------------------------------------------------------------------- configuration

@pytest.mark.parametrize("name", [n for n in CONFIG_NAMES if n.startswith(("f100m_save", "imagenet_", "demo_train",
                                                                           "demo_val", "demo_background", "folder_",
                                                                           "cifar"))])
def test_every_configuration_is_valid(name, monkeypatch):
    monkeypatch.setenv("DDIR", "/data/lowshot")
    monkeypatch.setenv("IMAGES", "/data/lowshot/mine")
    config = load_config(name)
    path = config["dataset"].get("root") or config["dataset"]["meta"]
    assert path.startswith("/data/lowshot/")
    assert config["transforms"]["mean"] == [.485, .456, .406] and config["transforms"]["std"] == [.229, .224, .225]
    small = name.startswith(("demo", "cifar"))
    assert (config["transforms"]["resize"], config["transforms"]["crop"]) == ((None, 32) if small else (256, 224))


def test_configurations_of_the_contract_exist():
    assert {"f100m_save_data.yaml", "imagenet_train_save_data.yaml", "imagenet_val_save_data.yaml",
            "demo_background.yaml", "demo_train.yaml", "demo_val.yaml"} <= set(CONFIG_NAMES)


def test_a_path_goes_before_a_bare_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DDIR", "/d")
    assert load_config("f100m_save_data.yaml")["dataset"]["length"] == 10 ** 8
    (tmp_path / "f100m_save_data.yaml").write_text("dataset: {kind: yfcc100m, root: $DDIR/x, length: 5}")
    assert load_config("f100m_save_data.yaml")["dataset"] == {"kind": "yfcc100m", "root": "/d/x", "length": 5}


@pytest.mark.parametrize("text,message", [
    ("dataset: [", "not valid YAML"),
    ("", "section 'dataset'"),
    ("dataset: {}", "kind is None"),
    ("dataset: {kind: imagnet, root: /x}", "'imagnet'.*yfcc100m, imagenet, folder"),
    ("dataset: {kind: folder}", "needs root"),
    ("dataset: {kind: imagenet, root: /x}", "needs meta"),
    ("dataset: {kind: folder, root: /x, length: 3}", "unknown key 'length'"),
    ("dataset: {kind: folder, root: 3}", "root is 3"),
    ("dataset: {kind: yfcc100m, root: /x, length: 0}", "length is 0"),
    ("dataset: {kind: yfcc100m, root: /x, length: 1e6}", "length is"),
    ("dataset: {kind: cifar10, root: /x, train: 3}", "train must be"),
    ("dataset: {kind: folder, root: '${NOT_SET_ANYWHERE}/x'}", "NOT_SET_ANYWHERE is not set"),
    ("dataset: {kind: folder, root: '${EMPTY}/x'}", "EMPTY is not set or empty"),
    ("dataset: {kind: folder, root: /x}\ntransform: {}", "unknown section 'transform'"),
    ("dataset: {kind: folder, root: /x}\ntransforms: {size: 3}", "unknown key 'size'"),
    ("dataset: {kind: folder, root: /x}\ntransforms: {crop: 300}", "crop .300. is larger"),
    ("dataset: {kind: folder, root: /x}\ntransforms: {crop: null}", "crop is None"),
    ("dataset: {kind: folder, root: /x}\ntransforms: {std: [1, 1]}", "three numbers"),
    ("dataset: {kind: folder, root: /x}\ntransforms: {std: [1, 1, 0]}", "three numbers"),
    ("dataset: {kind: folder, root: /x}\ntransforms: {std: [1, 1, 1.0e-300]}", "three numbers"),
    ("dataset: {kind: folder, root: /x}\ntransforms: {mean: [1, 1, 1" + 400 * "0" + "]}", "three numbers"),
    ("dataset: {kind: folder, root: /x}\nloader: {workers: 1000000000}", "at most 1024"),
    ("dataset: {kind: folder, root: /x}\nloader: {batchsize: no}", "batchsize is False"),
    ("dataset: {kind: folder, root: /x}\nloader: {workers: -1}", "workers is -1"),
    ("dataset: !!python/object/apply:os.system ['touch /tmp/never']", "not valid YAML")])
def test_bad_configurations(tmp_path, monkeypatch, text, message):
    monkeypatch.setenv("EMPTY", "")
    with pytest.raises(ValueError, match=message) as e:
        load_config(write_config(tmp_path, text))
    assert "c.yaml" in str(e.value) and "\n" not in str(e.value)


def test_missing_configuration_lists_what_there_is():
    with pytest.raises(ValueError, match="f100m_save_data.yaml"):
        load_config("nothing.yaml")
    with pytest.raises(ValueError, match="dir/nothing.yaml"):
        load_config("dir/nothing.yaml")


# ---------------------------------------------------------------------------------------------- zips

def test_places_of_the_images():
    images = ZipSet(os.path.dirname(__file__), 10 ** 8)
    assert len(images) == 10 ** 8
    assert images.name(12345678) == "12/345.zip/678.jpg"
    assert images.name(0) == "00/000.zip/000.jpg" and images.name(10 ** 8 - 1) == "99/999.zip/999.jpg"
    assert images.labels(5, 9).tolist() == [0] * 4 and images.labels(5, 9).dtype == np.int32


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_zip_members(tmp_path, compression):
    data = {i: picture(i) for i in (1, 2, 999)}
    write_zip(str(tmp_path / "12/345.zip"), {f"{i:03d}.jpg": d for i, d in data.items()}, compression)
    images = ZipSet(str(tmp_path), 10 ** 8)
    for i, d in data.items():
        assert images.read(12345000 + i) == d
    for i in (12345000, 12346001, 99000001):
        with pytest.raises(Missing):
            images.read(i)


def test_member_with_a_long_extra_field(tmp_path):
    path = str(tmp_path / "00/000.zip")
    os.makedirs(os.path.dirname(path))
    info = zipfile.ZipInfo("007.jpg")
    info.extra = b"\x77\x77\xc8\x00" + bytes(200)
    with zipfile.ZipFile(path, "w") as f:
        f.writestr(info, picture(7))
        f.writestr("008.jpg", b"")
    images = ZipSet(str(tmp_path))
    assert images.read(7) == picture(7) and images.read(8) == b""


def whole_zip(names, extra=b"", compression=zipfile.ZIP_STORED, comment=b""):
    """The bytes of a zip file of these members."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as f:
        for i, name in enumerate(names):
            info = zipfile.ZipInfo(name)
            info.compress_type, info.extra = compression, extra
            f.writestr(info, bytes([i]) * (100 * i % 777))
        f.comment = comment
    return bytearray(file.getvalue())


def directories(tmp_path, data):
    """What stored_members() and zipfile make of these bytes; None where they do not."""
    (tmp_path / "a.zip").write_bytes(data)
    with open(tmp_path / "a.zip", "rb") as f:
        quick = imagesets.stored_members(f.fileno(), len(data))
        try:
            with zipfile.ZipFile(f) as z:
                slow = {m.filename: (m.header_offset, m.file_size, m.CRC) for m in z.infolist()}
        except (zipfile.BadZipFile, ValueError, NotImplementedError, struct.error):
            slow = None
    return quick, slow


ALIKE = [f"{i:03d}.jpg" for i in range(30)]


def test_directory_of_stored_members(tmp_path):
    for extra in (b"", b"UT\5\0\3abcd"):
        for names in (ALIKE, ["000.jpg"], ALIKE[::-1]):
            quick, slow = directories(tmp_path, whole_zip(names, extra=extra))
            assert quick == slow and list(quick) == names
    with pytest.warns(UserWarning, match="Duplicate"):
        data = whole_zip(["000.jpg", "001.jpg", "000.jpg"])
    quick, slow = directories(tmp_path, data)
    assert quick == slow and len(quick) == 2


def encrypted(data):
    data[data.rindex(b"PK\1\2") + 8] |= 1
    return data


def far(data):
    """The last member's offset is to be found elsewhere, in an extra field."""
    at = data.rindex(b"PK\1\2") + 42
    data[at:at + 4] = b"\xff" * 4
    return data


@pytest.mark.parametrize("data", [
    whole_zip([]), whole_zip(["000.jpg", "1000.jpg"]), b"#!/bin/sh\n" + whole_zip(ALIKE), whole_zip(ALIKE, comment=b"made by"),
    whole_zip(ALIKE, compression=zipfile.ZIP_DEFLATED), whole_zip(["00\u00e9.jpg", "00\u00e8.jpg"]), encrypted(whole_zip(ALIKE)),
    far(whole_zip(ALIKE)), whole_zip(["00.jpg", "10.jpg"]).replace(b"10.jpg", b"1\0.jpg"), bytearray(), bytearray(30)])
def test_other_directories_are_left_to_zipfile(tmp_path, data):
    assert directories(tmp_path, data)[0] is None


def test_damaged_directories_are_read_as_zipfile_does(tmp_path):
    rng, data = np.random.RandomState(0), whole_zip(ALIKE)
    start, taken = data.index(b"PK\1\2"), 0
    for _ in range(2000):
        damaged = data.copy()
        damaged[rng.randint(start, len(data))] = rng.choice([0, 1, 255, rng.randint(256)])
        quick, slow = directories(tmp_path, damaged)
        taken += quick is not None and damaged != data
        assert quick in (None, slow) or slow is None
    assert taken > 100          # checksums, sizes, names: what is wrong is found when members are read
    for n in range(start, len(data)):
        assert directories(tmp_path, data[:n]) == (None, None)


def test_length_is_found(tmp_path):
    write_zip(str(tmp_path / "00/000.zip"), {"000.jpg": b"x"})
    write_zip(str(tmp_path / "03/041.zip"), {"005.jpg": b"x", "readme.txt": b"x"})
    write_zip(str(tmp_path / "03/900.zip"), {})
    (tmp_path / "notes").mkdir()
    assert len(ZipSet(str(tmp_path))) == 3041006
    (tmp_path / "04").mkdir()
    (tmp_path / "04/000.zip").write_bytes(b"broken")
    assert len(ZipSet(str(tmp_path))) == 4001000


def test_empty_or_missing_root(tmp_path):
    with pytest.raises(ValueError, match="no image found"):
        ZipSet(str(tmp_path))
    with pytest.raises(ValueError, match="not a directory"):
        ZipSet(str(tmp_path / "x"), 100)


def test_what_is_no_file_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "a.jpg")
    (tmp_path / "b.jpg").write_bytes(b"image")
    (tmp_path / "c.jpg").symlink_to("/dev/zero")
    images = folder_set(str(tmp_path))
    assert [images.read(i) for i in range(2)] == [b"", b"image"]
    with pytest.raises(ValueError, match="no regular file"):
        images.read(2)


def test_truncated_zip_and_damaged_members(tmp_path):
    path = tmp_path / "00/000.zip"
    write_zip(str(path), {f"{i:03d}.jpg": picture(i) for i in range(20)})
    data = bytearray(path.read_bytes())
    at = data.index(picture(3)) + 200
    data[at] ^= 255
    path.write_bytes(data)
    images = ZipSet(str(tmp_path))
    with zipfile.ZipFile(path) as f:
        entry = f.start_dir                 # of 000.jpg
    with open(path, "r+b") as f:
        f.seek(entry + 20)
        f.write(struct.pack("<II", 1 << 27, 1 << 27))
    with pytest.raises(zipfile.BadZipFile, match="000.jpg would end beyond the file"):
        imagesets.ZipReader(path).read("000.jpg")
    with pytest.raises(zipfile.BadZipFile, match="checksum of 003"):
        images.read(3)
    assert images.read(4) == picture(4)
    path.write_bytes(data[:len(data) // 2])
    images = ZipSet(str(tmp_path), 20)
    for i in (0, 19, 0):
        with pytest.raises(zipfile.BadZipFile):
            images.read(i)


@pytest.mark.parametrize("kind", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_members_that_are_larger_than_images(tmp_path, monkeypatch, kind):
    monkeypatch.setattr(imagesets, "LARGEST_MEMBER", 1000)
    with zipfile.ZipFile(tmp_path / "a.zip", "w", kind) as f:
        f.writestr("000.jpg", bytes(1000))
        f.writestr("001.jpg", bytes(1001))
    reader = imagesets.ZipReader(tmp_path / "a.zip")
    assert reader.read("000.jpg") == bytes(1000)
    with pytest.raises(zipfile.BadZipFile, match="001.jpg has 1001 bytes, more than an image"):
        reader.read("001.jpg")


def test_bounded_number_of_open_zips(tmp_path):
    for z in range(12):
        write_zip(str(tmp_path / f"00/{z:03d}.zip"), {"000.jpg": bytes([z])})
    images = ZipSet(str(tmp_path), open_zips=3)
    before = len(os.listdir("/proc/self/fd"))
    for z in [*range(12), 11, 10, 9, 0]:
        assert images.read(z * 1000) == bytes([z])
        assert len(images.files) <= 3 and len(os.listdir("/proc/self/fd")) <= before + 3
    assert list(images.files) == [10, 9, 0]


def test_threads_share_the_open_zips(tmp_path):
    for z in range(6):
        write_zip(str(tmp_path / f"00/{z:03d}.zip"), {f"{i:03d}.jpg": bytes([z, i]) * 50 for i in range(20)})
    images = ZipSet(str(tmp_path), open_zips=2)
    numbers = [z * 1000 + i for i in range(20) for z in range(6)] * 3
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        for n, data in zip(numbers, pool.map(images.read, numbers)):
            assert data == bytes([n // 1000, n % 1000]) * 50


def test_grave_errors_are_raised(tmp_path, monkeypatch):
    write_zip(str(tmp_path / "00/000.zip"), {"000.jpg": b"x"})

    def full(*args):
        raise OSError(24, "Too many open files")
    images = ZipSet(str(tmp_path), 5)
    monkeypatch.setattr(imagesets, "stored_members", full)
    batches = Batches(images, lambda data: data, 0, 5, 5)
    batches.preprocess.crop = 8
    with pytest.raises(OSError, match="Too many"):
        batches.read(0)

    def no_memory(*args):
        raise MemoryError
    no_memory.crop = 8
    with pytest.raises(MemoryError):
        Batches(images, no_memory, 0, 5, 5).decode(0, [b"x"])


def test_identity_follows_the_zips(tmp_path):
    for z in range(3):
        write_zip(str(tmp_path / f"00/{z:03d}.zip"), {"000.jpg": b"x" * z})
    images = ZipSet(str(tmp_path), 3000)
    first, second = images.identity(0, 2000), images.identity(0, 2001)
    write_zip(str(tmp_path / "00/002.zip"), {"000.jpg": b"other"})
    assert images.identity(0, 2000) == first and images.identity(0, 2001) != second


# ---------------------------------------------------------------------------------------------- lists and folders

def test_meta_json(tmp_path):
    os.makedirs(tmp_path / "imagenet/a")
    for i in range(3):
        (tmp_path / f"imagenet/a/{i}.jpg").write_bytes(picture(i))
    names = ["imagenet/a/0.jpg", str(tmp_path / "imagenet/a/1.jpg"), "imagenet/a/none.jpg", "imagenet/a/2.jpg"]
    meta = tmp_path / "meta.json"
    meta.write_text(json.dumps({"image_names": names, "image_labels": [7, 0, 3, 999]}))
    images = meta_set(str(meta))
    assert len(images) == 4 and images.labels(1, 4).tolist() == [0, 3, 999]
    assert [images.read(i) for i in (0, 1, 3)] == [picture(i) for i in range(3)]
    with pytest.raises(Missing):
        images.read(2)
    meta.write_text(json.dumps({"image_names": ["2.jpg"], "image_labels": [1]}))
    assert meta_set(str(meta), str(tmp_path / "imagenet/a")).read(0) == picture(2)


@pytest.mark.parametrize("content,message", [
    ("{", "not valid JSON"), ("[]", "no lists"), ('{"image_names": []}', "no lists"),
    ('{"image_names": [], "image_labels": []}', "no image"),
    ('{"image_names": ["a"], "image_labels": [1, 2]}', "1 image_names, but 2"),
    ('{"image_names": ["a", "b"], "image_labels": [1, -2]}', "entry 1"),
    ('{"image_names": ["a", 3], "image_labels": [1, 2]}', "entry 1"),
    ('{"image_names": ["\\ud800"], "image_labels": [1]}', "entry 0"),
    ('{"image_names": ["a"], "image_names": ["b"], "image_labels": [1]}', "'image_names' stands there twice"),
    ('{"image_names": ["a"], "image_labels": [1.5]}', "entry 0")])
def test_bad_meta_json(tmp_path, content, message):
    (tmp_path / "m.json").write_text(content)
    with pytest.raises(ValueError, match=message) as e:
        meta_set(str(tmp_path / "m.json"))
    assert "m.json" in str(e.value)


def test_missing_meta_json(tmp_path):
    with pytest.raises(ValueError, match="does not exist"):
        meta_set(str(tmp_path / "m.json"))


def test_folders_of_classes(tmp_path, capsys):
    for name, files in {"train/cat": ["b.JPG", "a.png", "deep/c.jpg"], "train/ant": ["z.jpeg"], "train/bee": [],
                        "val/cat": ["1.jpg"]}.items():
        for file in files:
            path = tmp_path / name / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(b"x")
        (tmp_path / name).mkdir(parents=True, exist_ok=True)
    (tmp_path / "train/cat/notes.txt").write_text("x")
    (tmp_path / "train/.hidden").mkdir()
    train = folder_set(str(tmp_path / "train"))
    assert capsys.readouterr().out == (
        f"note: {tmp_path}/train has files that are left out, no images by their names: 1, cat/notes.txt for one\n")
    assert train.class_names == ["ant", "bee", "cat"]
    assert [train.name(i).replace("/./", "/") for i in range(4)] == ["ant/z.jpeg", "cat/a.png", "cat/b.JPG",
                                                                   "cat/deep/c.jpg"]
    assert train.labels(0, 4).tolist() == [0, 2, 2, 2]
    assert folder_set(str(tmp_path / "val")).labels(0, 1).tolist() == [0]
    val = folder_set(str(tmp_path / "val"), str(tmp_path / "train"))
    assert val.labels(0, 1).tolist() == [2] and val.class_names == train.class_names
    with pytest.raises(ValueError, match="class 'ant' that .*val lacks"):
        folder_set(str(tmp_path / "train"), str(tmp_path / "val"))
    (tmp_path / "train/loose.jpg").write_bytes(b"x")
    with pytest.raises(ValueError, match="both images .loose.jpg"):
        folder_set(str(tmp_path / "train"))


def test_links_are_followed_and_hidden_folders_are_not(tmp_path):
    for name in ("elsewhere/sub/a.jpg", "train/cat/b.jpg", "train/cat/.checkpoints/c.jpg", "train/dog/d.jpg"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")
    (tmp_path / "train/cat/link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere/back").symlink_to(tmp_path / "train/cat")
    (tmp_path / "train/cat/up").symlink_to("..")
    (tmp_path / "train/dog/gone.jpg").symlink_to(tmp_path / "nowhere.jpg")
    images = folder_set(str(tmp_path / "train"))
    names = [os.path.normpath(images.name(i)) for i in range(len(images))]
    assert names == ["cat/b.jpg", "cat/link/sub/a.jpg", "dog/d.jpg", "dog/gone.jpg"]
    (tmp_path / "flat").mkdir()
    (tmp_path / "flat/gone.jpg").symlink_to(tmp_path / "nowhere.jpg")
    with pytest.raises(Missing):
        folder_set(str(tmp_path / "flat")).read(0)


def test_identity_follows_the_files(tmp_path):
    for name in ("a.jpg", "b.jpg", "c.jpg"):
        (tmp_path / name).write_bytes(b"x")
    images = folder_set(str(tmp_path))
    whole, part = images.identity(0, 3), images.identity(0, 2)
    (tmp_path / "c.jpg").write_bytes(b"xx")
    assert images.identity(0, 3) != whole and images.identity(0, 2) == part
    (tmp_path / "c.jpg").unlink()
    assert len({str(x) for x in (images.identity(0, 3), whole, part)}) == 3
    (tmp_path / "zz of a longer name.jpg").write_bytes(b"x")        # one of other images
    assert folder_set(str(tmp_path)).identity(0, 2) == part


def test_flat_folder(tmp_path):
    for name in ("b.jpg", "a.webp", "é.png"):
        (tmp_path / name).write_bytes(picture(1, format="PNG"))
    images = folder_set(str(tmp_path))
    assert [images.name(i) for i in range(len(images))] == ["a.webp", "b.jpg", "é.png"]
    assert images.labels(0, 3).tolist() == [0, 0, 0] and images.class_names is None
    assert images.read(2) == picture(1, format="PNG")


def test_loose_images_where_classes_are_folders(tmp_path):
    (tmp_path / "train" / "cat").mkdir(parents=True)
    (tmp_path / "val").mkdir()
    for name in ("train/cat/1.jpg", "val/1.jpg"):
        (tmp_path / name).write_bytes(picture(1))
    with pytest.raises(ValueError, match="val holds images .1.jpg ....: a subfolder for each class of .*train was expected"):
        folder_set(str(tmp_path / "val"), str(tmp_path / "train"))


def test_folder_without_images(tmp_path):
    for message, path in (("not a directory", "none"), ("holds no images", ".")):
        with pytest.raises(ValueError, match=message):
            folder_set(str(tmp_path / path))


@pytest.mark.parametrize("kind,key,folder", [("cifar10", b"labels", "cifar-10-batches-py"),
                                             ("cifar100", b"fine_labels", "cifar-100-python")])
def test_cifar(tmp_path, monkeypatch, kind, key, folder):
    from lowshot.packages import load_torchvision
    datasets = load_torchvision().datasets
    monkeypatch.setattr(datasets.CIFAR10, "_check_integrity", lambda self: True)
    os.makedirs(tmp_path / folder)
    pixels = np.random.RandomState(0).randint(0, 256, (6, 3, 32, 32)).astype(np.uint8)
    file = "test_batch" if kind == "cifar10" else "test"
    with open(tmp_path / folder / file, "wb") as f:
        pickle.dump({"data": pixels.reshape(6, -1), key.decode(): [5, 4, 3, 2, 1, 0]}, f)
    names = "batches.meta" if kind == "cifar10" else "meta"
    monkeypatch.setattr(datasets.CIFAR10, "meta", {**getattr(datasets, kind.upper()).meta, "md5": None})
    monkeypatch.setattr(datasets.CIFAR100, "meta", {**datasets.CIFAR100.meta, "md5": None})
    with open(tmp_path / folder / names, "wb") as f:
        pickle.dump({getattr(datasets, kind.upper()).meta["key"]: list("abcdef")}, f)
    images = open_set({"dataset": {"kind": kind, "root": str(tmp_path), "train": False, "download": False}})
    assert len(images) == 6 and images.labels(1, 3).tolist() == [4, 3] and images.class_names == list("abcdef")
    assert np.array_equal(images.read(2), pixels[2].transpose(1, 2, 0))


def test_cifar_missing(tmp_path):
    with pytest.raises(ValueError, match="download: true"):
        CifarSet("cifar10", str(tmp_path), True, False)


# ---------------------------------------------------------------------------------------------- pixels

def choose_decoder(monkeypatch, quick):
    if quick:
        pytest.importorskip("simplejpeg")
    else:
        monkeypatch.setattr(imagesets, "simplejpeg", None)


@pytest.mark.parametrize("quick", [True, False])
@pytest.mark.parametrize("format,mode,more", [
    ("JPEG", "RGB", {}), ("JPEG", "RGB", {"progressive": True}), ("JPEG", "RGB", {"subsampling": 2}),
    ("JPEG", "L", {}), ("JPEG", "CMYK", {}), ("PNG", "RGB", {}), ("PNG", "RGBA", {}), ("PNG", "L", {}), ("PNG", "P", {}),
    ("PNG", "1", {}), ("GIF", "P", {}), ("BMP", "RGB", {}), ("WEBP", "RGB", {})])
def test_decoding_equals_pil(monkeypatch, quick, format, mode, more):
    choose_decoder(monkeypatch, quick)
    for w, h in ((33, 47), (1, 1), (8, 16)):
        data = picture(0, w, h, format, mode, **more)
        x = decode(data)
        assert x.dtype == np.uint8 and np.array_equal(x, plain(data))


@pytest.mark.parametrize("quick", [True, False])
def test_damaged_images_are_errors(monkeypatch, quick):
    choose_decoder(monkeypatch, quick)
    for format in ("JPEG", "PNG"):
        data = picture(0, 64, 64, format)
        for bad in (data[:len(data) // 2], data[:20], b"", b"\xff\xd8", b"\0" * 100, data[:2] + bytes(500)):
            with pytest.raises(Exception):
                decode(bad)


@pytest.mark.parametrize("format", ["PNG", "TIFF"])
def test_sixteen_bits(format):
    grey = np.random.RandomState(0).randint(0, 65536, (20, 30)).astype(np.uint16)
    file = io.BytesIO()
    Image.fromarray(grey).save(file, format)
    x = decode(file.getvalue())
    assert x.dtype == np.uint8 and np.array_equal(x, np.repeat((grey >> 8)[:, :, None], 3, axis=2))
    for other in (grey.astype(np.float32), grey.astype(np.int32) + 60000):
        file = io.BytesIO()
        Image.fromarray(other).save(file, "TIFF")
        with pytest.raises(ValueError, match="8 or 16 bits"):
            decode(file.getvalue())


def preprocess(resize, crop):
    return Preprocess({"transforms": {"resize": resize, "crop": crop}})


@pytest.mark.parametrize("resize,crop", [(256, 224), (40, 40), (41, 32), (None, 32), (None, 50)])
@pytest.mark.parametrize("w,h", [(500, 375), (375, 500), (300, 301), (32, 32), (33, 90), (41, 41), (7, 500), (49, 51)])
def test_preprocessing_equals_torchvision(resize, crop, w, h, monkeypatch):
    from lowshot.packages import load_torchvision
    load_torchvision()
    from torchvision import transforms
    data = picture(w + h, w, h, "PNG")
    steps = [transforms.Resize(resize)] if resize else []
    expected = transforms.Compose([*steps, transforms.CenterCrop(crop)])(Image.fromarray(plain(data)))
    found = preprocess(resize, crop)(data)
    assert found.shape == (crop, crop, 3) and np.array_equal(found, np.asarray(expected))
    monkeypatch.setattr(imagesets, "STRIP", 0)          # the part alone, which may be rounded the other way
    assert np.abs(preprocess(resize, crop)(data).astype(int) - found).max() <= 1


def test_strips_take_no_memory():
    for w, h in ((1, 20000), (20000, 1)):
        data = picture(1, w, h, "PNG")
        x, middle = preprocess(256, 224)(data), plain(data).reshape(-1, 3)[9998:10002]      # less than two pixels of it
        assert x.shape == (224, 224, 3) and ((middle.min(0) <= x) & (x <= middle.max(0))).all()


@pytest.mark.parametrize("batchsize", [1, 4, 10, 100])
def test_batches(tmp_path, batchsize):
    members = {f"{i:03d}.jpg": picture(i) for i in range(10) if i != 4}
    members["007.jpg"] = members["007.jpg"][:100]
    members["008.jpg"] = b""
    write_zip(str(tmp_path / "00/000.zip"), members)
    batches = Batches(ZipSet(str(tmp_path)), preprocess(None, 32), 2, 10, batchsize)
    found = [batches.decode(b, batches.read(b)) for b in range(len(batches))]
    assert len(found) == -(-8 // batchsize)
    pixels, state = np.concatenate([x for x, _, _ in found]), np.concatenate([s for _, s, _ in found])
    assert state.tolist() == [0, 0, MISSING, 0, 0, DAMAGED, DAMAGED, 0]
    for i in range(2, 10):
        expected = plain(members[f"{i:03d}.jpg"]) if i not in (4, 7, 8) else np.zeros((32, 32, 3))
        assert np.array_equal(pixels[i - 2], expected)
    told = [f for _, _, faults in found for f in faults]
    assert any("00/000.zip/007.jpg" in f for f in told) and not any("object at" in f for f in told)
    if batchsize == 1:
        assert told[-1] == "00/000.zip/008.jpg: UnidentifiedImageError cannot identify image file"


def test_files_of_any_size_below_the_root_or_anywhere(tmp_path):
    contents = {"empty": b"", "one": b"1", "full": bytes(imagesets.SMALL), "large": os.urandom(3 * imagesets.SMALL + 5)}
    os.makedirs(tmp_path / "root")
    for name, content in contents.items():
        (tmp_path / "root" / name).write_bytes(content)
    (tmp_path / "outside").write_bytes(b"2")
    images = imagesets.FileSet(str(tmp_path / "root"), [*contents, str(tmp_path / "outside"), "none"], [0] * 6)
    assert [images.read(i) for i in range(5)] == [*contents.values(), b"2"]
    with pytest.raises(imagesets.Missing):
        images.read(5)


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_jpegs_decode_as_by_pil_into_a_buffer_of_any_size(mode):
    pixels = np.random.RandomState(0).randint(0, 256, (20, 30, 3)).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(file, "JPEG")
    expected = np.asarray(Image.open(file).convert("RGB"))
    for shape in ((20, 30, 3), (30, 20, 3), (8, 8, 3), (64, 64, 3)):
        out = np.zeros(shape, np.uint8)
        x = imagesets.decode(file.getvalue(), out)
        assert np.array_equal(x, expected)
        assert (x is out) == (shape == (20, 30, 3) and mode != "CMYK" and imagesets.simplejpeg is not None)
        # a comment that looks like the header of an image of another size
        Image.fromarray(pixels).convert(mode).save(file := io.BytesIO(), "JPEG", comment=imagesets.frame_header(shape))
        x = imagesets.decode(file.getvalue(), out)
        assert x.shape == expected.shape and (mode == "CMYK" or np.array_equal(x, expected))


@pytest.mark.parametrize("order", [range(700), range(699, -1, -1), np.random.RandomState(1).permutation(700)])
def test_members_are_read_in_any_order(tmp_path, order):
    """Small ones many at a time, large ones alone, some across the end of what was read."""
    rs = np.random.RandomState(0)
    members = {f"{i:03d}.jpg": rs.bytes(int(rs.choice([0, 1, 700, 5000, 8000, 9000, 70000], p=[.02, .02, .5, .3, .1, .05, .01])))
               for i in range(700)}
    write_zip(str(tmp_path / "00" / "000.zip"), members)
    images = ZipSet(str(tmp_path), 700)
    assert os.path.getsize(tmp_path / "00" / "000.zip") > 20 * imagesets.SMALL
    for i in order:
        assert images.read(int(i)) == members[f"{i:03d}.jpg"]
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        assert list(pool.map(images.read, map(int, order))) == [members[f"{i:03d}.jpg"] for i in order]


def test_identity_follows_the_labels(tmp_path):
    (tmp_path / "a.jpg").write_bytes(b"x")
    first, second = (imagesets.FileSet(str(tmp_path), ["a.jpg"], [label]).identity(0, 1) for label in (0, 1))
    assert first != second


def test_hidden_files_are_no_images(tmp_path):
    (tmp_path / "cat").mkdir()
    for name in ("cat/a.jpg", "cat/._a.jpg"):
        (tmp_path / name).write_bytes(b"x")
    images = imagesets.folder_set(str(tmp_path))
    assert [images.name(i) for i in range(len(images))] == ["cat/a.jpg"]


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ESTALE, errno.ETIMEDOUT, errno.EIO])
def test_errors_that_may_be_gone_at_the_next_try_are_raised(number):
    class Images:
        def read(self, i):
            raise OSError(number, os.strerror(number))
    with pytest.raises(OSError):
        Batches(Images(), None, 0, 1, 1).read(0)


def test_images_of_too_many_pixels_are_not_decoded(monkeypatch):
    monkeypatch.setattr(imagesets.Image, "MAX_IMAGE_PIXELS", 40 * 40)
    assert decode(picture(0, 40, 39)).shape == (39, 40, 3)
    with pytest.raises(imagesets.Image.DecompressionBombError):
        decode(picture(0, 80, 80))


def test_a_folder_whose_name_ends_like_that_of_an_image_is_a_class(tmp_path):
    (tmp_path / "a.jpg").mkdir()
    (tmp_path / "a.jpg" / "1.jpg").write_bytes(b"x")
    assert imagesets.folder_set(str(tmp_path)).class_names == ["a.jpg"]


def test_pixels_are_not_decoded_past_the_caches():
    """At no multiple of 32 bytes, in a buffer or not, nor are the images in it."""
    buffer = mmap.mmap(-1, 4 * 8 * 32 * 32 * 3 + imagesets.UNALIGNED)
    for a in imagesets.pixel_array((4, 8, 32, 32, 3), buffer), imagesets.pixel_array((8, 32, 32, 3)):
        assert a.dtype == np.uint8 and a.flags.c_contiguous and all(x.ctypes.data % 32 == 16 for x in a)
    imagesets.pixel_array((4, 8, 32, 32, 3), buffer)[3, 7, 31, 31] = 1, 2, 3
    assert bytes(buffer)[:-imagesets.UNALIGNED // 2][-3:] == bytes([1, 2, 3])
