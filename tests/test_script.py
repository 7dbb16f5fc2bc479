"""What scripts share: arguments, one-line errors, progress, outputs that are whole or absent."""
import argparse
import errno
import io
import json
import os
import signal
import subprocess
import sys
import time

import pytest

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
from lowshot import script  # noqa: E402
from lowshot.script import Parser, Progress, clock, number, read_json, read_yaml, size, whole, write_json  # noqa: E402


@pytest.mark.parametrize("kind, low, high, text, value", [
    (int, 1, None, "1", 1), (int, -3, None, "-3", -3), (float, 0, 1, "1", 1.0), (float, 0, None, "1e-3", 1e-3)])
def test_number_takes(kind, low, high, text, value):
    assert number(kind, low, high)(text) == value


@pytest.mark.parametrize("kind, low, high, text, message", [
    (int, 1, None, "0", "0 must be at least 1"), (int, 1, 5, "6", "at least 1 and at most 5"),
    (int, 1, None, str(2 ** 31), "at least 1 and at most 2147483647"),
    (int, 1, None, "1.5", "'1.5' is not a whole number"), (float, 0, None, "x", "'x' is not a number"),
    (float, 0, None, "nan", "nan must be at least 0 and finite"), (float, 0, 1, "inf", "inf must be at least 0 and at most 1$"),
    (float, 0, None, "inf", "inf must be at least 0 and finite"),
    (float, 0, None, "-1e400", "-1e400 must be at least 0 and finite")])
def test_number_refuses(kind, low, high, text, message):
    with pytest.raises(argparse.ArgumentTypeError, match=message):
        number(kind, low, high)(text)


def test_parser_help_is_the_docstring_with_defaults(capsys):
    parser = Parser("Title.\n\n    python x.py --k 3\n")
    parser.prog = "x.py"
    parser.add_argument("--k", type=number(int, 1), default=30, help="neighbours")
    parser.add_argument("--seed", type=int, default=0, help="seed")
    parser.add_argument("--cfg", help="description")
    parser.add_argument("--workers", help="threads (default: one per CPU)")
    with pytest.raises(SystemExit) as e:
        parser.parse_args(["--help"])
    out = capsys.readouterr().out
    assert "seed (default: 0)" in out and out.count("(default") == 3
    assert e.value.code == 0 and "\n    python x.py --k 3\n" in out and "neighbours (default: 30)" in out
    with pytest.raises(SystemExit) as e:
        parser.parse_args(["--k", "0"])
    err = capsys.readouterr().err
    assert e.value.code == 2 and err == "x.py: error: argument --k: 0 must be at least 1 (see --help)\n"


def raising(error):
    def main():
        raise error
    return main


@pytest.mark.parametrize("main, status, text", [
    (lambda: None, None, ""), (lambda: 3, 3, ""),
    (raising(ValueError("a\n  b")), 1, ": error: a b\n"),
    (raising(FileNotFoundError(2, "No such file", "x.bin")), 1, "No such file: 'x.bin'\n"),
    (raising(MemoryError()), 1, " are free; ulimit -a tells of limits)\n"),
    (raising(MemoryError("5 GB are free: take less")), 1, ": error: 5 GB are free: take less\n"),
    (raising(RuntimeError("can't start new thread")), 1, " are free; ulimit -a tells of limits)\n"),
    (raising(ImportError("graph_utils is not built")), 1, ": error: graph_utils is not built\n")])
def test_run_turns_errors_into_one_line(main, status, text, capsys):
    with pytest.raises(SystemExit) as e:
        script.run(main)
    err = capsys.readouterr().err
    assert e.value.code == status and err.endswith(text) and err.count("\n") == (1 if text else 0)


@pytest.mark.parametrize("when", ["import lowshot; interrupt()", "from lowshot.script import run; run(interrupt)"])
def test_ctrl_c_ends_a_script_with_one_line(when):
    code = ("import signal; signal.signal(signal.SIGINT, signal.default_int_handler)        # those in the background ignore it\n"
            f"interrupt = lambda: signal.raise_signal(signal.SIGINT); {when}")
    p = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert (p.returncode, p.stderr) == (-signal.SIGINT, "-c: interrupted\n")


def test_what_nobody_foresaw_is_one_line_too_that_says_how_to_see_more(capsys, monkeypatch):
    with pytest.raises(SystemExit) as e:
        script.run(raising(KeyError("x")))
    err = capsys.readouterr().err
    assert e.value.code == 1 and "KeyError: 'x'" in err and "LOWSHOT_TRACEBACK=1" in err and err.count("\n") == 1
    monkeypatch.setenv("LOWSHOT_TRACEBACK", "1")
    with pytest.raises(KeyError):
        script.run(raising(KeyError("x")))


def test_outputs_are_checked_before_the_work(tmp_path):
    script.check_outputs("", None, str(tmp_path / "new" / "file"))
    assert not os.path.exists(tmp_path / "new")
    with pytest.raises(ValueError, match="is a directory"):
        script.check_outputs(str(tmp_path))
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError):
        script.check_outputs(str(tmp_path / "file" / "record.json"))
    with pytest.raises(ValueError, match="named for two outputs"):
        script.check_outputs(str(tmp_path / "a"), None, f"{tmp_path}/new/../a")
    os.symlink(tmp_path / "unmounted" / "a", tmp_path / "link")
    with pytest.raises(OSError, match="unmounted is not there"):
        script.check_outputs(str(tmp_path / "link"))
    with pytest.raises(ValueError, match="file is an input"):
        script.check_outputs(str(tmp_path / "a"), f"{tmp_path}/./file", inputs=[None, str(tmp_path / "file")])


def test_outputs_replace_files_only(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", "/dev/null"):
        with pytest.raises(ValueError, match="no regular file"):
            script.check_outputs(str(path))
    (tmp_path / "far").mkdir()
    (tmp_path / "link.json").symlink_to("far/there.json")
    write_json(str(tmp_path / "link.json"), [1])
    assert (tmp_path / "link.json").is_symlink() and read_json(tmp_path / "far" / "there.json") == [1]
    assert os.listdir(tmp_path / "far") == ["there.json"]


def test_warning_of_memory(monkeypatch, capsys):
    have = script.peak_memory()
    monkeypatch.setattr(script, "available_memory", lambda: 10 ** 9)
    script.warn_of_memory(have + 9 * 10 ** 8)
    assert capsys.readouterr().out == ""
    script.warn_of_memory(have + 2 * 10 ** 9)
    assert "of memory needed, 1.00 GB available" in capsys.readouterr().out


def test_one_process_at_a_time(tmp_path):
    path = str(tmp_path / "folder" / "file")
    code = ("import sys\nfrom lowshot.script import exclusive\n"
            "try:\n  with exclusive(sys.argv[1]): pass\nexcept ValueError: sys.exit(3)")
    os.symlink(path, tmp_path / "link")
    for one, other in (path, path), (path, str(tmp_path / "link")), (str(tmp_path / "link"), path):
        with script.exclusive(one):
            assert subprocess.run([sys.executable, "-c", code, other], cwd=ROOT).returncode == 3
    assert subprocess.run([sys.executable, "-c", code, path], cwd=ROOT).returncode == 0
    assert os.listdir(tmp_path / "folder") == [] and sorted(os.listdir(tmp_path)) == ["folder", "link"]


def test_another_process_can_be_waited_for(tmp_path):
    path = str(tmp_path / "file")
    code = "import sys\nfrom lowshot.script import exclusive, log\nwith exclusive(sys.argv[1], lambda: log('waits')): log('in')"
    with script.exclusive(path):
        process = subprocess.Popen([sys.executable, "-c", code, path], cwd=ROOT, stdout=subprocess.PIPE, text=True)
        assert process.stdout.readline() == "waits\n" and process.poll() is None
    assert process.communicate(timeout=20)[0] == "in\n" and process.returncode == 0
    assert os.listdir(tmp_path) == []


def test_a_lock_on_a_removed_file_is_none(tmp_path, monkeypatch):
    """Another process may remove the lock file between opening and locking: then it is opened again."""
    path, lockf, locked = str(tmp_path / "file"), script.fcntl.lockf, []

    def first_removed(lock, operation):
        lockf(lock, operation)
        locked.append(os.fstat(lock.fileno()).st_ino)
        if len(locked) == 1:
            os.unlink(lock.name)

    monkeypatch.setattr(script.fcntl, "lockf", first_removed)
    with script.exclusive(path):
        assert len(locked) == 2 and os.stat(path + ".lock").st_ino == locked[1]


def test_whoever_may_write_in_a_folder_may_lock_there(tmp_path):
    for mode in 0o775, 0o700:
        tmp_path.chmod(mode)
        with script.exclusive(str(tmp_path / "file")):
            assert os.stat(tmp_path / "file.lock").st_mode & 0o777 == mode & 0o666


@pytest.mark.parametrize("number", script.NO_LOCKS)
def test_file_systems_without_locks(tmp_path, monkeypatch, capsys, number):
    """Processes of one machine still exclude each other there."""
    folder, local = tmp_path / "folder", tmp_path / "local"
    local.mkdir()
    monkeypatch.setenv("TMPDIR", str(local))
    monkeypatch.setattr(script.tempfile, "tempdir", None)
    code = ("import fcntl, os, sys\n"
            "lockf = fcntl.lockf\n"
            "def without(lock, operation):\n"
            f"    if lock.name.startswith({str(folder)!r}): raise OSError({number}, os.strerror({number}))\n"
            "    lockf(lock, operation)\n"
            "fcntl.lockf = without\n"
            "from lowshot.script import exclusive\n"
            "try:\n  with exclusive(sys.argv[1]): pass\nexcept ValueError: sys.exit(3)")
    lockf = script.fcntl.lockf

    def without(lock, operation):
        if lock.name.startswith(str(folder)):
            raise OSError(number, os.strerror(number))
        lockf(lock, operation)

    monkeypatch.setattr(script.fcntl, "lockf", without)
    with script.exclusive(str(folder / "file")):
        assert "has no locks" in capsys.readouterr().out and len(os.listdir(local)) == 1
        for name, status in ("file", 3), ("other", 0):
            assert subprocess.run([sys.executable, "-c", code, str(folder / name)], cwd=ROOT).returncode == status
    assert os.listdir(folder) == os.listdir(local) == []
    monkeypatch.setattr(script.fcntl, "lockf", lambda *a: raising(OSError(errno.EIO, "Input/output error"))())
    with pytest.raises(OSError, match="cannot be locked: Input/output error"):
        with script.exclusive(str(folder / "file")):
            pass


def test_allocated_files_have_their_space(tmp_path, monkeypatch):
    path = str(tmp_path / "file")
    script.allocate(path, 1 << 20)
    assert os.path.getsize(path) == 1 << 20 <= os.stat(path).st_blocks * 512
    os.truncate(path, 0)
    os.truncate(path, 1 << 21)
    script.allocate(path)
    assert os.path.getsize(path) == 1 << 21 <= os.stat(path).st_blocks * 512
    script.allocate(str(tmp_path / "empty"), 0)
    assert os.path.getsize(tmp_path / "empty") == 0


def test_names_of_any_bytes_can_be_told():
    code = "import os\nfrom lowshot.script import *\ndef main(): log(os.fsdecode(b'caf\\xe9'))\nrun(main)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True,
                          env={**os.environ, "PYTHONIOENCODING": "utf-8:strict"})
    assert (done.returncode, done.stdout, done.stderr) == (0, b"caf\\udce9\n", b"")


def test_names_of_files_are_not_empty():
    assert script.file_name("a b") == "a b"
    with pytest.raises(argparse.ArgumentTypeError, match="name of a file"):
        script.file_name("")


def test_run_can_show_the_traceback(monkeypatch):
    monkeypatch.setenv("LOWSHOT_TRACEBACK", "1")
    with pytest.raises(ValueError):
        script.run(raising(ValueError("x")))


@pytest.mark.parametrize("closed,written", [("2>&-", "done\n"), (">&- 2>&-", ""), ("<&- >&-", "1/2 steps")])
def test_closed_streams(closed, written):
    code = ("import sys; sys.path.insert(0, sys.argv[1]); from lowshot import script\n"
            "def main():\n"
            "    with script.Progress(2, 'steps') as progress:\n"
            "        progress.next = 0\n"
            "        progress.update(1)\n"
            "    script.log('done')\n"
            "script.run(main)")
    command = ["bash", "-c", f'"$0" -c "$1" "$2" {closed}', sys.executable, code, ROOT]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and written in done.stdout + done.stderr and "Error" not in done.stdout + done.stderr
    assert written or not done.stdout + done.stderr


def test_output_into_a_closed_pipe_is_no_traceback():
    code = "from lowshot.script import *\ndef main():\n  while True: log('line')\nrun(main)"
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.readline()
    process.stdout.close()
    assert process.stderr.read() == b"" and process.wait(20) == 1
    process.stderr.close()


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
            with script.full_disk_named(str(tmp_path / "out")):
                raise error


def test_whole_under_a_kill(tmp_path):
    path = tmp_path / "out.bin"
    path.write_bytes(b"old")
    code = ("import sys, time\nfrom lowshot.script import *\nwith whole(sys.argv[1]) as t, open(t, 'wb') as f:\n"
            "  f.write(b'half'); f.flush(); log('written'); time.sleep(60)")
    process = subprocess.Popen([sys.executable, "-c", code, str(path)], cwd=ROOT, stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"written\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert path.read_bytes() == b"old"
    assert len(os.listdir(tmp_path)) == 2
    script.write_text(path, "new")
    assert len(os.listdir(tmp_path)) == 2           # it may be another's that is still at it
    script.remove_left_behind(str(path))
    assert os.listdir(tmp_path) == ["out.bin"]
    other = tmp_path / ".out.5.123.tmp.bin"             # of out.5.bin
    other.touch()
    script.remove_left_behind(str(path))
    other.unlink()
    left = tmp_path / f".out.{process.pid}.tmp.bin"
    left.write_bytes(b"half")
    os.utime(left, (1, 1))
    script.write_text(path, "newer")
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
    (read_yaml, "a: !!python/object/apply:os.getcwd []", "not valid YAML")])
def test_bad_text_files_are_named(tmp_path, read, text, message):
    (tmp_path / "bad").write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=f"bad is {message}"):
        read(tmp_path / "bad")


def test_yaml_of_plain_values(tmp_path):
    (tmp_path / "f.yaml").write_text("a: &x {b: [1, 2.5, text]}\nc: {<<: *x, d: null}\n")
    assert read_yaml(tmp_path / "f.yaml") == {"a": {"b": [1, 2.5, "text"]}, "c": {"b": [1, 2.5, "text"], "d": None}}


def test_clock_and_size():
    assert [clock(s) for s in (4.21, 59.94, 185, 7620, float("nan"))] == ["4.2s", "59.9s", "3m05s", "2h07m", "?"]
    assert [size(n) for n in (12_300_000, 3_214_000_000)] == ["12.3 MB", "3.21 GB"]


def test_progress_shows_done_total_and_remaining(monkeypatch, capsys):
    now = [1000.0]
    monkeypatch.setattr(time, "time", lambda: now[0])
    with Progress(200, "images", start=100) as progress:
        progress.update(110)
        assert capsys.readouterr().err == ""            # nothing in the first seconds
        now[0] += 20
        progress.advance(10)
        assert capsys.readouterr().err == "  120/200 images, 20.0s elapsed, 1m20s left\n"
        now[0] += 1
        progress.update(150)
        assert capsys.readouterr().err == ""
        progress.update(200)
    assert capsys.readouterr().err == "  200/200 images, 21.0s elapsed, 0.0s left\n"


def test_progress_on_a_terminal_stays_on_one_line(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "time", lambda: now[0])
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", terminal)
    with Progress(3, "rows") as progress:
        for i in range(1, 4):
            now[0] += 2
            progress.update(i)
    assert terminal.getvalue().count("\n") == 1 and terminal.getvalue().count("\r") == 4


def test_short_work_shows_no_progress(capsys):
    with Progress(3, "rows") as progress:
        progress.update(3)
    assert capsys.readouterr().err == ""


def test_provenance_is_ready_for_json(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/x/stage.py"])
    args = argparse.Namespace(k=30, lr=[0.1])
    p = json.loads(json.dumps(script.provenance(args)))
    assert p["script"] == "stage.py" and p["arguments"] == {"k": 30, "lr": [0.1]} and p["cpus"] >= 1
    script.print_header(args, predicted_memory="1.00 GB")
    out = capsys.readouterr().out
    assert out.startswith("stage.py ") and "k=30" in out and out.endswith("predicted_memory=1.00 GB\n")


@pytest.mark.parametrize("script", ["save_features.py", "train_apply_pca.py", "build_graph.py", "logreg.py", "diffusion.py",
                                    "test_matmul.py"])
def test_an_interpreter_without_packages_is_told_of_in_one_line(script):
    """By lowshot, which every script loads before numpy, as it names the number of threads, too."""
    found = subprocess.run([sys.executable, "-S", script, "--help"], cwd=ROOT, capture_output=True, text=True, env={})
    assert found.returncode == 1 and not found.stdout
    assert found.stderr.startswith(f"{script}: error: ") and found.stderr.count("\n") == 1
    assert "has no numpy: bash setup.bash makes the environment" in found.stderr


def test_a_lock_is_no_link_to_another_file(tmp_path):
    (tmp_path / "mine").write_text("x")
    (tmp_path / "file.lock").symlink_to("mine")
    with pytest.raises(OSError):
        with script.exclusive(str(tmp_path / "file")):
            pass
    assert (tmp_path / "mine").read_text() == "x"


def test_a_file_that_changed_within_a_second_is_another(tmp_path):
    path = str(tmp_path / "f")
    open(path, "w").close()
    os.utime(path, ns=(10 ** 18, 10 ** 18))
    before = script.file_identities([path])
    assert script.changed_file([path], before) is None
    os.utime(path, ns=(10 ** 18, 10 ** 18 + 10 ** 6))
    assert script.changed_file([path], before) == "f"


@pytest.mark.parametrize("nbytes", [1, 5000, 10 ** 6])
def test_a_file_of_the_same_size_and_time_is_another(tmp_path, nbytes):
    path = tmp_path / "f"
    identities = []
    for seed in (0, 0, 1):
        path.write_bytes(bytes([seed]) * nbytes)
        os.utime(path, ns=(10 ** 18, 10 ** 18))
        identities.append(script.file_identities([str(path)]))
    assert identities[0] == identities[1] and script.changed_file([str(path)], identities[0]) == "f"


def test_names_of_outputs_that_leave_no_room_for_temporary_ones(tmp_path):
    for length in (script.LONGEST_NAME, script.LONGEST_NAME + 1):
        path = str(tmp_path / ("é" * (length // 2) + "x" * (length % 2)))
        if length > script.LONGEST_NAME:
            with pytest.raises(ValueError, match="the name is longer than 220 bytes"):
                script.check_outputs(path)
        else:
            script.check_outputs(path)
            script.write_json(path, 1)
            with script.exclusive(path + ".partial"):
                script.write_json(path + ".partial.json", 1)


def test_outputs_in_a_folder_that_is_not_writable(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)         # as for another user than root
    with pytest.raises(OSError, match="cannot be written: .* is not writable"):
        script.check_outputs(str(tmp_path / "new" / "file"))


def test_as_text():
    assert script.as_text([0.01, 1.0, 0, 5]) == "0.01,1,0,5"
    assert script.as_text(75000) == "75000"
    assert script.as_text("test") == "test"
