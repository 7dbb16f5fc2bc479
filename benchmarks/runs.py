"""What the benchmarks share: where the project is, runs of its scripts, and how results are shown. To be imported first."""
import json
import os
import subprocess
import sys
import tempfile
import time

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
from lowshot.files import write_text  # noqa: E402     the package, before numpy: it names the number of threads
from lowshot.script import log  # noqa: E402


def timed(record, script, *args, program=(), ddir=None, **variables):
    """Run a script; the record that it leaves at `record`, with `wall`: seconds from start to finish. ValueError with the
    script's last line where it fails. program: arguments of Python before the script's; ddir: in place of $DDIR; variables:
    of the environment."""
    command = [sys.executable, *program, os.path.join(ROOT, script), *map(str, args)]
    environment = {**os.environ, **({"DDIR": os.path.abspath(ddir)} if ddir else {}), **variables}
    start = time.perf_counter()
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    wall = time.perf_counter() - start
    if done.returncode:
        # one that was killed says nothing
        raise ValueError((done.stderr.strip().splitlines() or [f"{script} ended with status {done.returncode}"])[-1])
    with open(record) as f:
        return {**json.load(f), "wall": wall}


def diffusion(*args, **how):
    """The record of one run of diffusion.py --mode test."""
    with tempfile.TemporaryDirectory() as folder:
        record = os.path.join(folder, "record.json")
        return timed(record, "diffusion.py", "--mode", "test", "--record", record, *args, **how)


def show(text, out):
    """Print a table, and write it to the file that --out names, if any."""
    log("\n" + text)
    if out:
        write_text(out, text)
