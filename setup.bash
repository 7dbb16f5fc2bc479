#!/usr/bin/env bash
# Make the environment: Python packages in .venv and the compiled library graph_utils. What is there is not made again.
#
#     bash setup.bash
#
# run_demo.bash and run_tests.bash do this by themselves: they source this file, which leaves the interpreter in PYTHON.
#
# PYTHON        interpreter of an environment to use in place of .venv; the packages it lacks are installed there
# REQUIREMENTS  requirements-gpu.txt on machines with NVIDIA GPUs (default: requirements.txt)
# CXX, MKLROOT, CXXFLAGS_ARCH: see compile.bash. pip's own settings apply, a torch that is installed is kept.
#
# g++, the Python headers and venv have to be there; as root on Debian or Ubuntu they are installed, otherwise named.
set -euo pipefail
[ "${BASH_SOURCE[0]}" != "$0" ] || case "${1:-}" in -h|--help) sed -n '2,/^set /{/^set /d; s/^# \{0,1\}//; p}' "${BASH_SOURCE[0]}"; exit ;; esac

setup_fail() { echo "setup.bash: error: $*" >&2; exit 1; }

# an interpreter that will do: python3 if it is >= 3.10, else a versioned one
find_python() {
    local candidate
    for candidate in python3 python3.14 python3.13 python3.12 python3.11 python3.10; do
        if new_enough "$candidate"; then command -v "$candidate"; return; fi
    done
    return 1
}
new_enough() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 10))' > /dev/null 2>&1; }

# Debian packages that are missing, for interpreter $1 ("" if there is none); $2: whether a venv has to be made
missing_packages() {
    local python=$1 version=
    command -v "${CXX:-g++}" > /dev/null || echo g++
    if [ -z "$python" ]; then
        command -v python3 > /dev/null || echo python3 python3-dev python3-venv
        return
    fi
    version=$("$python" -c 'import sys; print("python%d.%d" % sys.version_info[:2])')
    "$python" -c 'import os, sys, sysconfig
sys.exit(not os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h")))' || echo "$version-dev"
    if [ "$2" = yes ]; then
        "$python" -c 'import ensurepip, venv' > /dev/null 2>&1 || echo "$version-venv"
    fi
}

install_packages() {
    local ids
    # shellcheck disable=SC1091
    ids=$(. /etc/os-release 2> /dev/null && echo "${ID:-} ${ID_LIKE:-}") || ids=
    if [ "$(id -u)" = 0 ] && [[ " $ids " =~ " "(debian|ubuntu)" " ]] && command -v apt-get > /dev/null; then
        echo "setup: installing $*"
        apt-get update -q || echo "setup: apt-get update failed, going on with the package lists that are there" >&2
        DEBIAN_FRONTEND=noninteractive apt-get install -q -y --no-install-recommends "$@" \
            || setup_fail "apt-get could not install $*"
    else
        setup_fail "missing: $*. As root on Debian or Ubuntu: apt-get install $*"
    fi
}

# the packages load: checked once, before they are taken for installed
packages_load() {
    "$PYTHON" -c 'import h5py, matplotlib, numpy, PIL, pytest, torch, yaml
from lowshot.packages import faiss, load_torchvision
load_torchvision()'
}

# whether all requirements are installed, in the versions asked for
requirements_met() {
    "$PYTHON" - "$REQUIREMENTS" requirements-demo.txt << 'END' > /dev/null 2>&1
import importlib.metadata
import sys
from pip._vendor.packaging.requirements import Requirement
for path in sys.argv[1:]:
    for line in open(path):
        line = line.split("#")[0].strip()
        if line:
            r = Requirement(line)
            if r.marker is None or r.marker.evaluate():
                if not r.specifier.contains(importlib.metadata.version(r.name), prereleases=True):
                    sys.exit(1)
END
}

install_requirements() {
    local stamp hash
    stamp=$("$PYTHON" -c 'import os, sys; print(os.path.join(sys.prefix, ".lowshot-requirements"))')
    hash=$(cat "$REQUIREMENTS" requirements-demo.txt | sha256sum)
    [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$hash" ] && return
    rm -f "$stamp" 2> /dev/null || true
    if ! { requirements_met && packages_load; }; then
        echo "setup: installing the packages of $REQUIREMENTS into $("$PYTHON" -c 'import sys; print(sys.prefix)')"
        # builds of faiss share their files: others have to go before one comes
        "$PYTHON" -m pip uninstall -q -y $(grep -q '^faiss-gpu' "$REQUIREMENTS" && echo faiss-cpu || echo faiss-gpu) \
            faiss-gpu-cu12 2> /dev/null || true
        # trdg is wanted for the fonts inside it alone, so without what it depends on
        "$PYTHON" -m pip install --disable-pip-version-check -r "$REQUIREMENTS" &&
            "$PYTHON" -m pip install --disable-pip-version-check --no-deps -r requirements-demo.txt &&
            packages_load || return 1
    fi
    # an environment where we may not write is asked again each time, which costs a few seconds
    { echo "$hash" > "$stamp.tmp" && mv "$stamp.tmp" "$stamp"; } 2> /dev/null || true
}

make_environment() {
    local base missing
    REQUIREMENTS=${REQUIREMENTS:-requirements.txt}
    [ -f "$REQUIREMENTS" ] || setup_fail "REQUIREMENTS=$REQUIREMENTS does not exist"

    if [ -n "${PYTHON:-}" ]; then
        command -v "$PYTHON" > /dev/null || setup_fail "PYTHON=$PYTHON is not an interpreter"
        new_enough "$PYTHON" || setup_fail "PYTHON=$PYTHON is $("$PYTHON" -V 2>&1), Python 3.10 or later is needed"
        missing=$(missing_packages "$PYTHON" no)
        [ -z "$missing" ] || install_packages $missing
        PYTHON=$(command -v "$PYTHON")
        "$PYTHON" -m pip --version > /dev/null 2>&1 || setup_fail "PYTHON=$PYTHON has no pip"
        install_requirements || setup_fail "the packages could not be installed for PYTHON=$PYTHON; without PYTHON, " \
                                           "setup makes an environment of its own in .venv"
    else
        PYTHON=$PWD/.venv/bin/python
        if venv_works; then
            # an environment that is there needs no venv any more, but the compiler and the headers
            missing=$(missing_packages "$PYTHON" no)
            [ -z "$missing" ] || install_packages $missing
            base=$(find_python) || base=$PYTHON
        else
            base=$(find_python) || base=
            missing=$(missing_packages "$base" yes)
            [ -z "$missing" ] || install_packages $missing
            base=$(find_python) || setup_fail "Python 3.10 or later is needed, $(python3 -V 2>&1) is here; name another one: PYTHON=..."
            make_venv "$base"
        fi
        # a cut-off installation can leave packages that pip takes for whole: then once more from nothing
        install_requirements || { echo "setup: once more, in a new .venv" >&2; make_venv "$base"; install_requirements; } \
            || setup_fail "the packages could not be installed (see above)"
    fi
    export PYTHON
}

venv_works() { new_enough .venv/bin/python && .venv/bin/python -m pip --version > /dev/null 2>&1; }
make_venv() { echo "setup: making .venv with $("$1" -V)"; "$1" -m venv --clear .venv; }

# what the compiled library depends on, this machine's CPU included: -march=native code need not run on another
compiled_for() {
    cat compile.bash graph_utils/*.cpp graph_utils/*.h graph_utils/*.swig
    "${CXX:-g++}" --version
    "$PYTHON" -c 'import sys, sysconfig; print(sys.prefix, sysconfig.get_config_var("EXT_SUFFIX"))'
    echo "${CXXFLAGS_ARCH:-} ${MKLROOT:-} ${CONDA_PREFIX:-} ${SWIG:-}"
    uname -m
    grep -m 2 -E '^(model name|flags)' /proc/cpuinfo || true
}

compile_library() {
    local stamp=graph_utils/.compiled_for hash
    hash=$(compiled_for | sha256sum)
    if [ ! -f graph_utils/core.py ] || [ ! -f "$stamp" ] || [ "$(cat "$stamp")" != "$hash" ] \
            || ! compgen -G 'graph_utils/_core*.so' > /dev/null || ! "$PYTHON" -c 'import graph_utils' 2> /dev/null; then
        rm -f "$stamp"
        echo "setup: compiling graph_utils"
        bash compile.bash || setup_fail "graph_utils did not compile"
        echo "$hash" > "$stamp.tmp" && mv "$stamp.tmp" "$stamp"
    fi
}

setup() {
    local back=$PWD
    case "${PYTHON:-}" in /*) ;; */*) PYTHON=$PWD/$PYTHON ;; esac
    cd "$(dirname "${BASH_SOURCE[0]}")"
    # two set-ups at once wait for each other
    exec 9< setup.bash
    if command -v flock > /dev/null; then flock 9; fi
    make_environment
    compile_library
    exec 9<&-
    cd "$back"
}
setup
