"""What scripts share: arguments, one-line errors, progress, outputs that are whole or absent."""
import argparse
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
from lowshot.script import Parser, Progress, clock, number, size  # noqa: E402


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


def test_warning_of_memory(monkeypatch, capsys):
    have = script.peak_memory()
    monkeypatch.setattr(script, "available_memory", lambda: 10 ** 9)
    script.warn_of_memory(have + 9 * 10 ** 8)
    assert capsys.readouterr().out == ""
    script.warn_of_memory(have + 2 * 10 ** 9)
    assert "of memory needed, 1.00 GB available" in capsys.readouterr().out


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


def test_clock_and_size():
    assert [clock(s) for s in (4.21, 59.94, 185, 7620, float("nan"))] == ["4.2s", "59.9s", "3m05s", "2h07m", "?"]
    assert [size(n) for n in (12_300_000, 3_214_000_000)] == ["12.3 MB", "3.21 GB"]


def test_progress_shows_done_total_and_remaining(monkeypatch, capsys):
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
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
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
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


def test_as_text():
    assert script.as_text([0.01, 1.0, 0, 5]) == "0.01,1,0,5"
    assert script.as_text(75000) == "75000"
    assert script.as_text("test") == "test"
