"""The library as compile.bash builds it for clusters of mixed machines, and without MKL: the same results."""
import os
import platform
import shutil
import subprocess
import sys

import pytest

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def has_avx2():
    with open("/proc/cpuinfo") as f:
        return platform.machine() == "x86_64" and "avx2" in f.read()


@pytest.mark.skipif(not has_avx2(), reason="this CPU has no AVX2")
def test_a_build_for_avx2_without_mkl(tmp_path):
    for name in ("graph_utils", "lowshot", "tests", "compile.bash", "logreg.py", "test_matmul.py"):
        copy = shutil.copytree if os.path.isdir(os.path.join(ROOT, name)) else shutil.copy
        copy(os.path.join(ROOT, name), tmp_path / name)
    for name in os.listdir(tmp_path / "graph_utils"):
        if name.startswith("_core"):
            os.unlink(tmp_path / "graph_utils" / name)
    environment = {**os.environ, "PYTHON": sys.executable, "CXXFLAGS_ARCH": "-march=x86-64-v3"}
    built = subprocess.run(["bash", "compile.bash", "none"], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert built.returncode == 0 and "-march=x86-64-v3" in built.stdout and "no MKL" in built.stdout, built.stderr
    code = "import graph_utils; from graph_utils import core; print(graph_utils.__file__, core.products(), core.has_mkl())"
    words = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True).stdout.split()
    assert words == [str(tmp_path / "graph_utils" / "__init__.py"), "int16", "False"]
    tests = [f"tests/test_{name}.py" for name in ("sgd", "neighbours", "product", "ordering")]
    done = subprocess.run([sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *tests], cwd=tmp_path,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert subprocess.run([sys.executable, "test_matmul.py"], cwd=tmp_path, capture_output=True).returncode == 0
