"""What this process may use of the machine: CPUs, memory and GPUs."""
import contextlib
import ctypes
import glob
import math
import os
import pathlib
import re
import resource
import signal

MOST_THREADS = 1 << 14
MOST_WORKERS = 1 << 10      # that load images
LIBC = ctypes.CDLL(None)       # not looked for in a new process, whose parent's threads may have been at it


def cgroups(controller, processes="/proc/self/cgroup", root="/sys/fs/cgroup"):
    """(folder, version) of the cgroups whose limits of "cpu" or "memory" apply to this process, those above included.

    In a container the names in `processes` may be those outside of it: then only the topmost is there.
    """
    lines = ["0::/", f"0:{controller}:/"]
    with contextlib.suppress(OSError):
        with open(processes) as f:
            lines += f.read().splitlines()
    found = {}
    for line in lines:
        _, controllers, path = line.split(":", 2)
        path = pathlib.PurePosixPath(path)
        for folder in (path, *path.parents):
            if not controllers:
                found[f"{root}{folder}"] = 2
            elif controller in controllers.split(","):
                found[f"{root}/{controller}{folder}"] = 1
    return list(found.items())


def _read(folder, name):
    with open(os.path.join(folder, name)) as f:
        return f.read()


def cpus():
    """How many CPUs this process may use: by its affinity, or fewer by the quotas of its cgroups, as containers have them."""
    count = len(os.sched_getaffinity(0))
    for folder, version in cgroups("cpu"):
        with contextlib.suppress(OSError, ValueError):
            quota, period = _read(folder, "cpu.max").split() if version == 2 else \
                (_read(folder, f"cpu.cfs_{name}_us").strip() for name in ("quota", "period"))
            if quota not in ("max", "-1"):
                count = min(count, math.ceil(int(quota) / int(period)))
    return max(count, 1)


def named_threads(environment=os.environ):
    """OMP_NUM_THREADS; "" if that names no number."""
    return environment.get("OMP_NUM_THREADS", "").strip()


def thread_count():
    """How many threads to start: OMP_NUM_THREADS, or one for each CPU."""
    return int(named_threads().split(",")[0] or cpus())


def keep_to_quota(environment=os.environ):
    """Name as many threads as the cgroups' quotas are good for, where these are less than the CPUs and the user named none.

    Libraries that are loaded later would take one for each CPU that they see: most of these would be kept waiting, together
    with those that wait for them. Returns whether a number was named.
    """
    kept = not named_threads(environment) and cpus() < len(os.sched_getaffinity(0))
    if kept:
        environment["OMP_NUM_THREADS"] = str(cpus())
    return kept


def check_threads(environment=os.environ):
    """ValueError for an OMP_NUM_THREADS that OpenMP takes for none, or that no system gives."""
    given = named_threads(environment)
    numbers = [int(text) if re.fullmatch(r"\s*\+?[0-9]{1,9}\s*", text) else 0 for text in given.split(",")]
    if given and not all(1 <= number <= MOST_THREADS for number in numbers):
        raise ValueError(f"OMP_NUM_THREADS is {given!r}, a number from 1 to {MOST_THREADS} was expected")


def wait_briefly():
    """To be called before libraries are loaded: the threads of GCC's OpenMP would wait for each other in a loop of 300,000 turns,
    and keep cores from the one that they wait for where other processes want these. With many short steps that is slow."""
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")


def release_memory():
    """What was freed goes back to the system: glibc keeps what is between arrays in use, of those of less than 32 MB."""
    with contextlib.suppress(AttributeError):       # another C library
        LIBC.malloc_trim(0)


def peak_memory():
    """Largest resident set of this process so far, bytes (memory-mapped file pages in use count as well)."""
    # not ru_maxrss, which starts at the size of the process that launched this one
    return _status("VmHWM") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def memory_now():
    """Resident set of this process, bytes; its peak where the system does not tell."""
    return _status("VmRSS") or peak_memory()


def _status(name):
    """Bytes by a line of this process's status, or None."""
    with contextlib.suppress(OSError):
        for line in _read("/proc/self", "status").splitlines():
            if line.startswith(name + ":"):
                return int(line.split()[1]) * 1024
    return None


def available_memory():
    """Bytes that this process may still take: the least of what the machine has free and its cgroups' limits."""
    free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    with contextlib.suppress(OSError):
        with open("/proc/meminfo") as f:
            for line in f:
                if line.startswith("MemAvailable:"):
                    free = int(line.split()[1]) * 1024
    for folder, version in cgroups("memory"):
        with contextlib.suppress(OSError, ValueError):
            limit, used = (int(_read(folder, name)) for name in (
                ("memory.max", "memory.current") if version == 2 else ("memory.limit_in_bytes", "memory.usage_in_bytes")))
            stat = dict(line.split() for line in _read(folder, "memory.stat").splitlines())
            # files that were read are kept in memory as long as nobody else wants it
            cached = int(stat.get("total_inactive_file", stat.get("inactive_file", 0))) \
                + int(stat.get("total_active_file", stat.get("active_file", 0)))
            free = min(free, max(limit - used + cached, 0))
    return free


def spendable_memory():
    """Bytes that arrays may take: what is available, but for a tenth of it for what is not counted."""
    return int(.9 * available_memory())


def fits(size):
    """Whether arrays of so many bytes fit in the memory that is free."""
    return size <= spendable_memory()


def gpu_available():
    """Whether torch sees a GPU. It is imported only where there may be one: that takes longer than a small run."""
    if not glob.glob("/dev/nvidia[0-9]*") and not os.path.exists("/dev/dxg"):       # the latter in Windows' Linux
        return False
    import torch
    return torch.cuda.is_available()


def torch_device(name):
    """The torch device of this name, "cpu" or "cuda...", checked to be there; "auto": "cuda" where there is a GPU. For CPUs torch
    is not loaded."""
    if name in ("auto", "cpu"):
        return "cuda" if name == "auto" and gpu_available() else "cpu"
    import torch
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise ValueError(f"--device is {name!r}: auto, cpu, cuda, or cuda:0 and so on was expected")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"--device is {name}, but PyTorch {torch.__version__} sees {torch.cuda.device_count()} GPUs")
    return name if device.type == "cuda" else "cpu"


def end_with_parent(parent):
    """In a new process: end when `parent`, the one that made it, ends, also where that is killed and cannot pass it on."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)       # the parent's handler would make nothing of it
    LIBC.prctl(1, signal.SIGTERM)      # PR_SET_PDEATHSIG
    if os.getppid() != parent:          # it has ended meanwhile
        os.kill(os.getpid(), signal.SIGTERM)
