"""CPUs and memory that the process may use."""
import functools
import os
import signal
import subprocess
import sys

import pytest

from lowshot.machine import available_memory, cgroups, check_threads, cpus, end_with_parent, keep_to_quota, peak_memory

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def test_the_limits_of_all_cgroups_around_the_process_count(tmp_path, monkeypatch):
    (tmp_path / "processes").write_text("5:cpu:/x\n4:cpuset,memory:/job/step\n0::/slice/a b\n")
    groups = cgroups("memory", str(tmp_path / "processes"), str(tmp_path))
    assert sorted(os.path.relpath(folder, tmp_path) for folder, _ in groups) == [
        ".", "memory", "memory/job", "memory/job/step", "slice", "slice/a b"]
    assert [os.path.relpath(folder, "/sys/fs/cgroup") for folder, _ in cgroups("memory", "/nowhere")] == [".", "memory"]
    folder = tmp_path / "memory" / "job"
    folder.mkdir(parents=True)
    for name, content in (("memory.limit_in_bytes", "5000"), ("memory.usage_in_bytes", "4000"),
                          ("memory.stat", "total_inactive_file 70")):
        (folder / name).write_text(content)
    monkeypatch.setattr("lowshot.machine.cgroups", lambda controller: groups)
    assert available_memory() == 1070
    for name, content in (("memory.max", "3000\n"), ("memory.current", "2500\n"),
                          ("memory.stat", "inactive_file 20\nactive_file 3\n")):
        (tmp_path / name).write_text(content)
    assert available_memory() == 523


@pytest.mark.parametrize("files, expected", [
    ({}, 8), ({"x/cpu.max": "max 100000\n"}, 8), ({"x/cpu.max": "150000 100000\n"}, 2),
    ({"x/cpu.max": "max 100000\n", "cpu.max": "300000 100000\n"}, 3),
    ({"cpu/y/cpu.cfs_quota_us": "-1\n", "cpu/y/cpu.cfs_period_us": "100000\n"}, 8),
    ({"cpu/y/cpu.cfs_quota_us": "10000\n", "cpu/y/cpu.cfs_period_us": "100000\n"}, 1),
    ({"x/cpu.max": "900000 100000\n"}, 8), ({"x/cpu.max": "nonsense"}, 8)])
def test_cpus_are_counted_by_affinity_and_quota(tmp_path, monkeypatch, files, expected):
    (tmp_path / "processes").write_text("5:cpu,cpuacct:/y\n0::/x\n")
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content)
    groups = cgroups("cpu", str(tmp_path / "processes"), str(tmp_path))
    monkeypatch.setattr("lowshot.machine.cgroups", lambda controller: groups)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    assert cpus() == expected
    environment = {}
    assert keep_to_quota(environment) == (expected < 8)
    assert environment == ({"OMP_NUM_THREADS": str(expected)} if expected < 8 else {})
    assert not keep_to_quota({"OMP_NUM_THREADS": "5"})
    assert keep_to_quota({"OMP_NUM_THREADS": " "}) == (expected < 8)


def test_numbers_of_threads():
    for good in ({}, *({"OMP_NUM_THREADS": text} for text in ("", "1", " 4 ", "4,2", "16384"))):
        check_threads(good)
    for bad in ("0", "-1", "two", "99999", "4,0", "1.5", "9" * 5000):
        with pytest.raises(ValueError, match="OMP_NUM_THREADS is '.*', a number from 1 to 16384 was expected"):
            check_threads({"OMP_NUM_THREADS": bad})


def test_memory_figures():
    code = "from lowshot.machine import *\na = peak_memory(); x = b'1' * 300_000_000; print(peak_memory() - a)"
    grown = int(subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True).stdout)
    assert 2.9e8 < grown < 3.3e8 and peak_memory() > 5e6
    assert 0 <= available_memory() <= os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


@pytest.mark.parametrize("ended,status", [(False, 0), (True, -signal.SIGTERM)])
def test_a_process_whose_parent_has_ended_already_ends(ended, status):
    """Also where the one that made it has a handler of the signal, as drivers have."""
    before = signal.signal(signal.SIGTERM, lambda *_: None)
    try:
        done = subprocess.run(["true"], preexec_fn=functools.partial(end_with_parent, os.getpid() + ended))
    finally:
        signal.signal(signal.SIGTERM, before)
    assert done.returncode == status
