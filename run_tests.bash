#!/usr/bin/env bash
# Make the environment and run the tests; arguments go to pytest.
#
#     bash run_tests.bash
#     bash run_tests.bash -k diffusion -x
set -euo pipefail
case "${1:-}" in -h|--help) sed -n '2,/^set /{/^set /d; s/^# \{0,1\}//; p}' "${BASH_SOURCE[0]}"; exit ;; esac
cd "$(dirname "${BASH_SOURCE[0]}")"
source ./setup.bash
exec "$PYTHON" -m pytest tests "$@"
