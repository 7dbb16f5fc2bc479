"""Outputs that are whole or absent, locks, what tells files apart, JSON and YAML."""
import errno
import os
import signal
import subprocess
import sys

import pytest

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
from lowshot import files  # noqa: E402
from lowshot.files import read_json, read_yaml, whole, write_json  # noqa: E402


def raising(error):
    def function(*_):
        raise error
    return function


def test_outputs_are_checked_before_the_work(tmp_path):
    files.check_outputs("", None, str(tmp_path / "new" / "file"))
    assert not os.path.exists(tmp_path / "new")
    with pytest.raises(ValueError, match="is a directory"):
        files.check_outputs(str(tmp_path))
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError):
        files.check_outputs(str(tmp_path / "file" / "record.json"))
    with pytest.raises(ValueError, match="named for two outputs"):
        files.check_outputs(str(tmp_path / "a"), None, f"{tmp_path}/new/../a")
    os.symlink(tmp_path / "unmounted" / "a", tmp_path / "link")
    with pytest.raises(OSError, match="unmounted is not there"):
        files.check_outputs(str(tmp_path / "link"))
    with pytest.raises(ValueError, match="file is an input"):
        files.check_outputs(str(tmp_path / "a"), f"{tmp_path}/./file", inputs=[None, str(tmp_path / "file")])


def test_outputs_replace_files_only(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", "/dev/null"):
        with pytest.raises(ValueError, match="no regular file"):
            files.check_outputs(str(path))
    (tmp_path / "far").mkdir()
    (tmp_path / "link.json").symlink_to("far/there.json")
    write_json(str(tmp_path / "link.json"), [1])
    assert (tmp_path / "link.json").is_symlink() and read_json(tmp_path / "far" / "there.json") == [1]
    assert os.listdir(tmp_path / "far") == ["there.json"]


def test_one_process_at_a_time(tmp_path):
    path = str(tmp_path / "folder" / "file")
    code = ("import sys\nfrom lowshot.files import exclusive\n"
            "try:\n  with exclusive(sys.argv[1]): pass\nexcept ValueError: sys.exit(3)")
    os.symlink(path, tmp_path / "link")
    for one, other in (path, path), (path, str(tmp_path / "link")), (str(tmp_path / "link"), path):
        with files.exclusive(one):
            assert subprocess.run([sys.executable, "-c", code, other], cwd=ROOT).returncode == 3
    assert subprocess.run([sys.executable, "-c", code, path], cwd=ROOT).returncode == 0
    assert os.listdir(tmp_path / "folder") == [] and sorted(os.listdir(tmp_path)) == ["folder", "link"]


def test_another_process_can_be_waited_for(tmp_path):
    path = str(tmp_path / "file")
    code = ("import sys\nfrom lowshot.files import exclusive\nfrom lowshot.script import log\n"
            "with exclusive(sys.argv[1], lambda: log('waits')): log('in')")
    with files.exclusive(path):
        process = subprocess.Popen([sys.executable, "-c", code, path], cwd=ROOT, stdout=subprocess.PIPE, text=True)
        assert process.stdout.readline() == "waits\n" and process.poll() is None
    assert process.communicate(timeout=20)[0] == "in\n" and process.returncode == 0
    assert os.listdir(tmp_path) == []


def test_a_lock_on_a_removed_file_is_none(tmp_path, monkeypatch):
    """Another process may remove the lock file between opening and locking: then it is opened again."""
    path, lockf, locked = str(tmp_path / "file"), files.fcntl.lockf, []

    def first_removed(lock, operation):
        lockf(lock, operation)
        locked.append(os.fstat(lock.fileno()).st_ino)
        if len(locked) == 1:
            os.unlink(lock.name)

    monkeypatch.setattr(files.fcntl, "lockf", first_removed)
    with files.exclusive(path):
        assert len(locked) == 2 and os.stat(path + ".lock").st_ino == locked[1]


def test_whoever_may_write_in_a_folder_may_lock_there(tmp_path):
    for mode in 0o775, 0o700:
        tmp_path.chmod(mode)
        with files.exclusive(str(tmp_path / "file")):
            assert os.stat(tmp_path / "file.lock").st_mode & 0o777 == mode & 0o666


@pytest.mark.parametrize("number", files.NO_LOCKS)
def test_file_systems_without_locks(tmp_path, monkeypatch, capsys, number):
    """Processes of one machine still exclude each other there."""
    folder, local = tmp_path / "folder", tmp_path / "local"
    local.mkdir()
    monkeypatch.setenv("TMPDIR", str(local))
    monkeypatch.setattr(files.tempfile, "tempdir", None)
    code = ("import fcntl, os, sys\n"
            "lockf = fcntl.lockf\n"
            "def without(lock, operation):\n"
            f"    if lock.name.startswith({str(folder)!r}): raise OSError({number}, os.strerror({number}))\n"
            "    lockf(lock, operation)\n"
            "fcntl.lockf = without\n"
            "from lowshot.files import exclusive\n"
            "try:\n  with exclusive(sys.argv[1]): pass\nexcept ValueError: sys.exit(3)")
    lockf = files.fcntl.lockf

    def without(lock, operation):
        if lock.name.startswith(str(folder)):
            raise OSError(number, os.strerror(number))
        lockf(lock, operation)

    monkeypatch.setattr(files.fcntl, "lockf", without)
    with files.exclusive(str(folder / "file")):
        assert "has no locks" in capsys.readouterr().out and len(os.listdir(local)) == 1
        for name, status in ("file", 3), ("other", 0):
            assert subprocess.run([sys.executable, "-c", code, str(folder / name)], cwd=ROOT).returncode == status
    assert os.listdir(folder) == os.listdir(local) == []
    monkeypatch.setattr(files.fcntl, "lockf", lambda *a: raising(OSError(errno.EIO, "Input/output error"))())
    with pytest.raises(OSError, match="cannot be locked: Input/output error"):
        with files.exclusive(str(folder / "file")):
            pass


def test_allocated_files_have_their_space(tmp_path, monkeypatch):
    path = str(tmp_path / "file")
    files.allocate(path, 1 << 20)
    assert os.path.getsize(path) == 1 << 20 <= os.stat(path).st_blocks * 512
    os.truncate(path, 0)
    os.truncate(path, 1 << 21)
    files.allocate(path)
    assert os.path.getsize(path) == 1 << 21 <= os.stat(path).st_blocks * 512
    files.allocate(str(tmp_path / "empty"), 0)
    assert os.path.getsize(tmp_path / "empty") == 0


def test_whole_appears_only_when_it_ended_well(tmp_path):
    path = tmp_path / "new" / "out.npz"
    with whole(str(path)) as temporary:
        assert os.path.dirname(temporary) == str(path.parent) and temporary.endswith(".tmp.npz")
        with open(temporary, "w") as f:
            f.write("first")
        assert not path.exists()
    assert path.read_text() == "first"
    with pytest.raises(RuntimeError):
        with whole(str(path)) as temporary:
            with open(temporary, "w") as f:
                f.write("sec")
            raise RuntimeError
    assert path.read_text() == "first" and os.listdir(path.parent) == ["out.npz"]
    for error in (OSError("15360 requested and 992 written"), RuntimeError("Error in void faiss::write_index: fwrite failed"),
                  OSError(errno.ENOSPC, "No space left on device"),
                  RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0")):
        with pytest.raises(OSError, match="out.npz could not be written, the disk has .*B free"):
            with whole(str(path)):
                raise error
    with pytest.raises(FileNotFoundError, match="another"):
        with whole(str(path)):
            open("another")


def test_whole_is_on_disk_before_it_has_its_name(tmp_path, monkeypatch):
    calls = []
    for name in ("fsync", "replace"):
        monkeypatch.setattr(os, name, lambda *a, name=name, call=getattr(os, name): calls.append(name) or call(*a))
    with whole(str(tmp_path / "out")) as temporary, open(temporary, "w") as f:
        f.write("all")
    assert calls == ["fsync", "replace"] and (tmp_path / "out").read_text() == "all"


def test_a_full_disk_is_named_once(tmp_path):
    for error, message in ((OSError(errno.ENOSPC, "No space"), "out could not be written"),
                           (OSError(errno.EDQUOT, "Quota"), "out could not be written"),
                           (OSError(errno.ENOSPC, "No space", "other"), "'other'$"), (OSError(errno.EIO, "broken"), "broken$")):
        with pytest.raises(OSError, match=message):
            with files.full_disk_named(str(tmp_path / "out")):
                raise error


def test_whole_under_a_kill(tmp_path):
    path = tmp_path / "out.bin"
    path.write_bytes(b"old")
    code = ("import sys, time\nfrom lowshot.files import *\nwith whole(sys.argv[1]) as t, open(t, 'wb') as f:\n"
            "  f.write(b'half'); f.flush(); log('written'); time.sleep(60)")
    process = subprocess.Popen([sys.executable, "-c", code, str(path)], cwd=ROOT, stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"written\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert path.read_bytes() == b"old"
    assert len(os.listdir(tmp_path)) == 2
    files.write_text(path, "new")
    assert len(os.listdir(tmp_path)) == 2           # it may be another's that is still at it
    files.remove_left_behind(str(path))
    assert os.listdir(tmp_path) == ["out.bin"]
    (tmp_path / f".out.{process.pid}.tmp.bin").touch()
    with files.exclusive(str(path)):                    # here it is nobody's
        assert sorted(os.listdir(tmp_path)) == ["out.bin", "out.bin.lock"]
    other = tmp_path / ".out.5.123.tmp.bin"             # of out.5.bin
    other.touch()
    files.remove_left_behind(str(path))
    other.unlink()
    left = tmp_path / f".out.{process.pid}.tmp.bin"
    left.write_bytes(b"half")
    os.utime(left, (1, 1))
    files.write_text(path, "newer")
    assert os.listdir(tmp_path) == ["out.bin"]


def test_write_json_refuses_nan_and_keeps_the_old(tmp_path):
    path = str(tmp_path / "r.json")
    write_json(path, {"a": [1, 2.5]})
    with pytest.raises(ValueError):
        write_json(path, {"a": float("nan")})
    assert read_json(path) == {"a": [1, 2.5]} and os.listdir(tmp_path) == ["r.json"]
    with open(path, "w") as f:
        f.write('{"a": ')
    with pytest.raises(ValueError, match="r.json is not valid JSON"):
        read_json(path)


@pytest.mark.parametrize("read, text, message", [
    (read_json, '{"a": 1, "b": {"c": 1, "c": 2}}', "not valid JSON: the key 'c' stands there twice"),
    (read_json, "[" * 100000, "not valid JSON"), (read_json, '{"a": "\xe9"}', "not valid JSON"),
    (read_yaml, "a: 1\nb: {c: 1, c: 2}", "not valid YAML: the key 'c' stands there twice"),
    (read_yaml, "[" * 3000, "not valid YAML"), (read_yaml, "a: \xe9", "not valid YAML"),
    (read_yaml, "a: !!python/object/apply:os.getcwd []", "not valid YAML"),
    (read_yaml, "a: [&x0 [1, 1], " + ", ".join(f"&x{i} [{', '.join(10 * [f'*x{i - 1}'])}]" for i in range(1, 9)) + "]",
     "not valid YAML: it has more than 1000000 values")])
def test_bad_text_files_are_named(tmp_path, read, text, message):
    (tmp_path / "bad").write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=f"bad is {message}"):
        read(tmp_path / "bad")


@pytest.mark.parametrize("read", [read_json, read_yaml, files.file_sha256, files.digest_of_some])
@pytest.mark.parametrize("kind", ["pipe", "device", "folder"])
def test_what_is_no_file_is_not_read(tmp_path, read, kind):
    path = tmp_path / "x"
    {"pipe": os.mkfifo, "device": lambda p: p.symlink_to("/dev/zero"), "folder": os.mkdir}[kind](path)
    with pytest.raises(ValueError, match="x is no regular file"):
        read(path)


def test_yaml_of_plain_values(tmp_path):
    (tmp_path / "f.yaml").write_text("a: &x {b: [1, 2.5, text]}\nc: {<<: *x, d: null}\n")
    assert read_yaml(tmp_path / "f.yaml") == {"a": {"b": [1, 2.5, "text"]}, "c": {"b": [1, 2.5, "text"], "d": None}}


def test_a_lock_is_no_link_to_another_file(tmp_path):
    (tmp_path / "mine").write_text("x")
    (tmp_path / "file.lock").symlink_to("mine")
    with pytest.raises(OSError):
        with files.exclusive(str(tmp_path / "file")):
            pass
    assert (tmp_path / "mine").read_text() == "x"


def test_a_file_that_changed_within_a_second_is_another(tmp_path):
    path = str(tmp_path / "f")
    open(path, "w").close()
    os.utime(path, ns=(10 ** 18, 10 ** 18))
    before = files.file_identities([path])
    assert files.changed_file([path], before) is None
    os.utime(path, ns=(10 ** 18, 10 ** 18 + 10 ** 6))
    assert files.changed_file([path], before) == "f"


@pytest.mark.parametrize("nbytes", [1, 5000, 10 ** 6])
def test_a_file_of_the_same_size_and_time_is_another(tmp_path, nbytes):
    path = tmp_path / "f"
    identities = []
    for seed in (0, 0, 1):
        path.write_bytes(bytes([seed]) * nbytes)
        os.utime(path, ns=(10 ** 18, 10 ** 18))
        identities.append(files.file_identities([str(path)]))
    assert identities[0] == identities[1] and files.changed_file([str(path)], identities[0]) == "f"


def test_names_of_outputs_that_leave_no_room_for_temporary_ones(tmp_path):
    for length in (files.LONGEST_NAME, files.LONGEST_NAME + 1):
        path = str(tmp_path / ("é" * (length // 2) + "x" * (length % 2)))
        if length > files.LONGEST_NAME:
            with pytest.raises(ValueError, match="the name is longer than 220 bytes"):
                files.check_outputs(path)
        else:
            files.check_outputs(path)
            files.write_json(path, 1)
            with files.exclusive(path + ".partial"):
                files.write_json(path + ".partial.json", 1)


def test_outputs_in_a_folder_that_is_not_writable(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)         # as for another user than root
    with pytest.raises(OSError, match="cannot be written: .* is not writable"):
        files.check_outputs(str(tmp_path / "new" / "file"))
