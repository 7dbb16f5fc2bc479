#!/usr/bin/env bash
# Make the environment and run the tests; arguments go to pytest.
#
#     bash run_tests.bash
#     bash run_tests.bash -k diffusion -x
#     bash run_tests.bash -n 0 --pdb          # one file of tests after the other; otherwise two at a time, where there are CPUs
set -euo pipefail
case "${1:-}" in -h|--help) sed -n '2,/^set /{/^set /d; s/^# \{0,1\}//; p}' "${BASH_SOURCE[0]}"; exit ;; esac
source "$(dirname "${BASH_SOURCE[0]}")/setup.bash"
cd "$(dirname "${BASH_SOURCE[0]}")"
# most of what tests wait for is one thread, such as a script that starts
at_once=$("$PYTHON" -c 'from lowshot.machine import cpus; print(2 * (cpus() > 1))')
exec "$PYTHON" -m pytest -n "$at_once" --dist loadfile "$@"
