"""Running jobs: scripts that stand in for logreg.py and diffusion.py, drivers that share them, what goes wrong."""
import errno
import glob
import os
import signal
import subprocess
import sys
import time

import pytest

from lowshot import jobs as running
from lowshot.files import exclusive
from lowshot.jobs import CHECKOUT, Job
from lowshot.machine import cpus

# A stand-in for a script: writes its arguments as a record, or fails if told so.
SCRIPT = """
import json, os, sys, time
a = dict(zip(sys.argv[1::2], sys.argv[2::2]))
print("pid", os.getpid(), flush=True)
time.sleep(float(a.get("--sleep", 0)))
if a.get("--fail") == "yes":
    sys.exit("fails, as it was told to")
if a.get("--fail") != "silently":
    json.dump({"complete": True, "seconds": 1, "peak_memory": 1e9,
               "results": [{"iteration": 0, "top5": 1, "top5_novel": 1}],
               "threads": os.environ.get("OMP_NUM_THREADS", ""), "ddir": os.environ["DDIR"],
               "arguments": {k[2:]: v for k, v in a.items()}}, open(a["--record"], "w"))
"""


def stand_in_jobs(tmp_path, *arguments):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    return [Job(f"job{i}", str(script), {**a, "niter": 0}, str(tmp_path / "logs" / f"job{i}.json"))
            for i, a in enumerate(arguments)]


def test_the_log_of_another_user_is_replaced(tmp_path, monkeypatch):
    [job] = stand_in_jobs(tmp_path, {"a": 1})
    os.makedirs(tmp_path / "logs")
    log, kept = tmp_path / "logs" / "job0.log", open

    def opened(path, *rest):
        if str(path) == str(log) and log.exists() and log.read_bytes() == b"another's":
            raise PermissionError(13, "Permission denied", path)
        return kept(path, *rest)

    log.write_bytes(b"another's")
    monkeypatch.setattr(running, "open", opened, raising=False)
    running.run_jobs([job], 1, {**os.environ, "DDIR": str(tmp_path)})
    assert job.result() and log.read_text().startswith("pid")


def test_run_jobs(tmp_path, capsys):
    jobs = stand_in_jobs(tmp_path, {"a": 1}, {"a": 2}, {"a": [0.5, 1.0]})
    environment = {**os.environ, "DDIR": str(tmp_path)}
    environment.pop("OMP_NUM_THREADS", None)
    running.run_jobs(jobs[:1], 1, environment)
    record = jobs[0].result()
    assert (record["threads"], record["ddir"]) == ("", str(tmp_path))
    assert record["arguments"] == {"a": "1", "niter": "0", "record": jobs[0].record}
    before = os.stat(jobs[0].record).st_mtime_ns
    capsys.readouterr()
    running.run_jobs(jobs, 2, environment)
    out = capsys.readouterr().out
    assert "3 jobs, 1 of them complete" in out and "job0.json" not in out and "2/2 jobs done" in out
    assert os.stat(jobs[0].record).st_mtime_ns == before
    threads = max(1, cpus() // 2)
    assert jobs[1].result()["threads"] == str(threads)
    assert jobs[2].result()["arguments"]["a"] == "0.5,1"
    assert open(jobs[1].log).read().startswith("pid ")
    jobs[0].arguments["a"] = 5
    running.run_jobs(jobs, 2, environment)
    assert "note" not in out and "note: 1 of these jobs have records of other arguments" in capsys.readouterr().out

    # the printed command, pasted into a shell, makes the same record
    command = next(line for line in out.splitlines() if "job1.json" in line).split("] ", 1)[1]
    os.unlink(jobs[1].record)
    subprocess.run(command, shell=True, check=True, capture_output=True, env={"PATH": os.environ["PATH"]})
    assert jobs[1].result()["threads"] == str(threads)


def test_jobs_share_the_threads_that_a_quota_allows(tmp_path, monkeypatch):
    jobs = stand_in_jobs(tmp_path, *({"a": i} for i in range(4)))
    environment = {**os.environ, "DDIR": str(tmp_path), "OMP_NUM_THREADS": "6"}
    monkeypatch.setattr(running, "cpus", lambda: 6)
    running.run_jobs(jobs[:1], 2, environment)
    monkeypatch.setattr(running, "KEPT_TO_QUOTA", True)
    running.run_jobs(jobs[1:3], 2, environment)
    running.run_jobs(jobs, 2, environment)          # one is left, which has all to itself
    assert [job.result()["threads"] for job in jobs] == ["6", "3", "3", "6"]


def test_jobs_0_prints_commands(tmp_path, capsys):
    jobs = stand_in_jobs(tmp_path, {"a": 1}, {"a": 2})
    running.run_jobs(jobs, 0, {"DDIR": "/some where"})
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert err == "2 jobs, 0 of them complete\n"
    assert len(lines) == 2 and lines[0].startswith("DDIR='/some where' ") and not os.path.exists(tmp_path / "logs")


def test_failed_jobs_are_named_and_the_others_go_on(tmp_path, capsys):
    jobs = stand_in_jobs(tmp_path, {"fail": "yes"}, {"fail": "no"}, {"fail": "silently"}, {"fail": "yes"})
    with pytest.raises(ValueError, match="3 of 4 jobs failed: job0, job2, job3"):
        running.run_jobs(jobs, 1, {**os.environ, "DDIR": "."})
    out = capsys.readouterr().out
    assert "job0 FAILED (status 1): fails, as it was told to" in out
    assert "job2 FAILED (no complete record)" in out and "job3 FAILED as job0\n" in out
    assert jobs[1].result() is not None


def test_jobs_that_cannot_start_or_are_killed_are_named(tmp_path, capsys, monkeypatch):
    jobs = stand_in_jobs(tmp_path, {"a": 1}, {"a": 2}, {"a": 3})
    start, started = subprocess.Popen, []

    def popen(command, **options):
        started.append(command)
        if len(started) == 2:
            raise OSError(errno.EAGAIN, "Resource temporarily unavailable")
        if len(started) == 3:
            command = [sys.executable, "-c", "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"]
        return start(command, **options)

    monkeypatch.setattr(running.subprocess, "Popen", popen)
    with pytest.raises(ValueError, match="2 of 3 jobs failed: job1, job2"):
        running.run_jobs(jobs, 3, {**os.environ, "DDIR": "."})
    out = capsys.readouterr().out
    assert "job1 FAILED to start: [Errno 11] Resource temporarily unavailable" in out
    assert "job2 FAILED (ended by signal 9, Killed, for want of memory?)" in out and jobs[0].result() is not None


def start_driver(jobs):
    listed = ", ".join(f"Job({j.name!r}, {j.script!r}, {j.arguments!r}, {j.record!r})" for j in jobs)
    return subprocess.Popen([sys.executable, "-c", f"from lowshot.jobs import *\nrun_jobs([{listed}], 1)"],
                            env={**os.environ, "DDIR": ".", "PYTHONPATH": CHECKOUT}, stdout=subprocess.PIPE, text=True)


def is_running(pid):
    try:
        with open(f"/proc/{pid}/stat") as f:
            return f.read().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.parametrize("by", [signal.SIGTERM, signal.SIGKILL])
def test_ended_driver_ends_its_jobs(tmp_path, by):
    jobs = stand_in_jobs(tmp_path, {"sleep": 60})
    driver = start_driver(jobs)
    while "[1/1]" not in driver.stdout.readline():
        pass
    while not (os.path.exists(jobs[0].log) and open(jobs[0].log).read().endswith("\n")):
        time.sleep(0.02)
    pid = open(jobs[0].log).read().split()[1]
    assert is_running(pid)
    driver.send_signal(by)
    assert driver.wait(timeout=20) == (143 if by == signal.SIGTERM else -by)
    driver.stdout.close()
    end = time.time() + 20
    while is_running(pid) and time.time() < end:
        time.sleep(0.02)
    assert not is_running(pid)


def test_drivers_divide_the_jobs(tmp_path):
    jobs = stand_in_jobs(tmp_path, *[{"sleep": 0.5}] * 6)
    drivers = [start_driver(jobs) for _ in range(2)]
    outputs = [driver.communicate(timeout=60)[0] for driver in drivers]
    assert [driver.returncode for driver in drivers] == [0, 0]
    for i, job in enumerate(jobs):
        assert job.result() is not None
        assert sum(f"[{i + 1}/6]" in out for out in outputs) == 1
    assert all("6/6 jobs done" in out for out in outputs)
    assert not glob.glob(str(tmp_path / "logs" / "*.lock"))


def test_a_job_whose_log_cannot_be_written_fails_alone(tmp_path, capsys):
    jobs = stand_in_jobs(tmp_path, {"a": 1}, {"a": 2})
    os.makedirs(jobs[0].log)
    with pytest.raises(ValueError, match="1 of 2 jobs failed: job0"):
        running.run_jobs(jobs, 1, {**os.environ, "DDIR": "."})
    assert "job0 FAILED" in capsys.readouterr().out and jobs[1].result() is not None


def test_a_log_on_a_full_disk_fails_its_job_alone(tmp_path, capsys, monkeypatch):
    jobs = stand_in_jobs(tmp_path, {"fail": "yes"}, {"a": 2})

    def full(path, *mode, **options):
        if path == jobs[0].log and mode == ("a",) and os.path.exists(path):
            raise OSError(errno.ENOSPC, "No space left on device")
        return open(path, *mode, **options)
    monkeypatch.setattr(running, "open", full, raising=False)
    with pytest.raises(ValueError, match="1 of 2 jobs failed: job0"):
        running.run_jobs(jobs, 1, {**os.environ, "DDIR": "."})
    assert f"job0 FAILED (status 1): {jobs[0].log} could not be written" in capsys.readouterr().out
    assert jobs[1].result() is not None


def test_job_of_a_driver_that_gives_it_up_is_taken_over(tmp_path):
    jobs = stand_in_jobs(tmp_path, {"a": 1}, {"a": 2})
    with exclusive(jobs[0].log):
        driver = start_driver(jobs)
        while "waiting for other drivers, which run 1 of the jobs" not in driver.stdout.readline():
            pass
        assert jobs[1].result() is not None and not os.path.exists(jobs[0].log)
    assert "[1/2]" in driver.communicate(timeout=20)[0]
    assert driver.returncode == 0 and jobs[0].result() is not None


def test_a_job_that_failed_for_another_driver_is_not_tried_again(tmp_path):
    jobs = stand_in_jobs(tmp_path, {"fail": "yes"}, {"a": 2})
    with exclusive(jobs[0].log):
        driver = start_driver(jobs)
        while "waiting for other drivers" not in driver.stdout.readline():
            pass
        with open(jobs[0].log, "w") as f:
            f.write("some error\nFAILED (status 1)\n")
    out = driver.communicate(timeout=20)[0]
    assert driver.returncode and "job0 FAILED for another driver" in out and "[1/2]" not in out
    assert "waiting for other drivers" not in out           # told once
    with pytest.raises(ValueError, match="1 of 1 jobs failed: job0"):
        running.run_jobs(jobs, 1, {**os.environ, "DDIR": "."})
    assert open(jobs[0].log).read().endswith("fails, as it was told to\nFAILED (status 1)\n")


def test_the_log_of_a_job_is_that_of_its_last_run(tmp_path):
    [job] = stand_in_jobs(tmp_path, {"fail": "yes"})
    for _ in range(2):
        with pytest.raises(ValueError, match="1 of 1 jobs failed"):
            running.run_jobs([job], 1, {**os.environ, "DDIR": str(tmp_path)})
        with open(job.log) as f:
            assert f.read().count("FAILED") == 1
