#!/usr/bin/env bash
# Build graph_utils: SWIG and g++ make graph_utils/core.py and graph_utils/_core*.so.
#
#     bash compile.bash                     # MKL is looked for: $MKLROOT, the Python environment, conda, /opt/intel
#     bash compile.bash /path/to/mkl        # MKL there (the folder that holds include/ and lib/)
#     bash compile.bash none                # without MKL: the library's own kernel only
#
# PYTHON names the interpreter (default: .venv/bin/python if it exists, else python3), CXX the compiler.
# CXXFLAGS_ARCH replaces -march=native: the code then runs on every machine of that kind, e.g.
# CXXFLAGS_ARCH=-march=x86-64-v3 for a cluster where all machines have AVX2.
set -euo pipefail
case "${1:-}" in -h|--help) sed -n '2,/^set /{/^set /d; s/^# \{0,1\}//; p}' "${BASH_SOURCE[0]}"; exit ;; esac
# relative to the caller's folder
case "${PYTHON:-}" in /*) ;; */*) PYTHON=$PWD/$PYTHON ;; esac
[ ! -d "${1:-}" ] || set -- "$(cd "$1" && pwd)"
cd "$(dirname "${BASH_SOURCE[0]}")"

fail() { echo "compile.bash: error: $*" >&2; exit 1; }

if [ -z "${PYTHON:-}" ]; then
    if [ -x .venv/bin/python ]; then PYTHON=.venv/bin/python; else PYTHON=python3; fi
fi
CXX=${CXX:-g++}
read -ra ARCH <<< "${CXXFLAGS_ARCH:--march=native}"
command -v "$CXX" > /dev/null || fail "no C++ compiler '$CXX' (Debian/Ubuntu: apt-get install g++)"
command -v "$PYTHON" > /dev/null || fail "no Python interpreter '$PYTHON'"
prefix=$("$PYTHON" -c 'import sys; print(sys.prefix)')
include=$("$PYTHON" -c 'import sysconfig; print(sysconfig.get_path("include"))')
suffix=$("$PYTHON" -c 'import sysconfig; print(sysconfig.get_config_var("EXT_SUFFIX"))')
[ -f "$include/Python.h" ] || fail "no Python headers in $include (Debian/Ubuntu: apt-get install python3-dev)"

SWIG=${SWIG:-}
for candidate in "$prefix/bin/swig" swig swig4.0; do
    if [ -z "$SWIG" ] && command -v "$candidate" > /dev/null; then SWIG=$candidate; fi
done
[ -n "$SWIG" ] || fail "no swig ($PYTHON -m pip install swig)"

# MKL: a folder whose include/ has mkl_spblas.h and whose lib/ (or lib/intel64) has libmkl_rt
mkl_library() {
    local file
    for file in "$1"/lib/libmkl_rt.so* "$1"/lib/intel64/libmkl_rt.so*; do
        if [ -f "$file" ]; then echo "$file"; return; fi
    done
}
mkl_here() { { [ -f "$1/include/mkl_spblas.h" ] || [ -f "$1/include/mkl/mkl_spblas.h" ]; } && [ -n "$(mkl_library "$1")" ]; }
mkl=
if [ "${1:-}" != none ]; then
    if [ -n "${1:-}" ]; then
        mkl_here "$1" || fail "no include/mkl_spblas.h and lib/libmkl_rt.so in $1"
        mkl=$1
    else
        for folder in "${MKLROOT:-}" "$prefix" "${CONDA_PREFIX:-}" /opt/intel/oneapi/mkl/latest /opt/intel/mkl; do
            if [ -z "$mkl" ] && [ -n "$folder" ] && mkl_here "$folder"; then mkl=$folder; fi
        done
    fi
fi

# -Wno-psabi: vectors that functions take and return do not leave their file
flags=(-std=c++17 -O3 "${ARCH[@]}" -fopenmp -fPIC -shared -Wall -Wno-unused-function -Wno-psabi -fvisibility=hidden
       "-I$include" -Igraph_utils)
libraries=()
if [ -n "$mkl" ]; then
    library=$(mkl_library "$mkl")
    flags+=("-I$mkl/include" "-I$mkl/include/mkl" -DGRAPH_UTILS_MKL)
    libraries+=("$library" "-Wl,-rpath,$(cd "$(dirname "$library")" && pwd)")
fi

# everything is built under temporary names, so that a cut-off build leaves no library behind
build=$(mktemp -d graph_utils/build.XXXXXX)
trap 'rm -rf "$build"' EXIT
"$SWIG" -c++ -python -DSWIGWORDSIZE64 -outdir "$build" -o "$build/core_wrap.cpp" graph_utils/graph_utils.swig
objects=()
for source in graph_utils/*.cpp "$build/core_wrap.cpp"; do
    object=$build/$(basename "$source" .cpp).o
    optimise=("${flags[@]}")
    [ "$source" = "$build/core_wrap.cpp" ] && optimise+=(-O1 -w)
    # what is in the background does not hear Ctrl-C otherwise
    (trap - INT; exec "$CXX" "${optimise[@]}" -c "$source" -o "$object") &
    objects+=("$object")
done
failed=0
for job in $(jobs -p); do wait "$job" || failed=1; done
[ $failed = 0 ] || fail "a source file did not compile"
"$CXX" "${flags[@]}" "${objects[@]}" "${libraries[@]}" -o "$build/_core$suffix"
PYTHONPATH=$build "$PYTHON" -c 'import core' || fail "the library was built but does not load"
mv "$build/_core$suffix" "graph_utils/_core$suffix"
mv "$build/core.py" graph_utils/core.py
echo "graph_utils built for $("$PYTHON" -V) with ${ARCH[*]}; sparse-dense products: own kernel$([ -n "$mkl" ] && echo ", and MKL from $library" || echo " only (no MKL found)")"
