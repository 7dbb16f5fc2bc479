#!/usr/bin/env bash
# Label diffusion: the runs behind the table, in four phases.
#
#     bash run_diffusion.bash 1 [EXPERIMENT.yaml]     validate: the grid on the validation split; one job tries all numbers of iterations at once
#     bash run_diffusion.bash 2 [EXPERIMENT.yaml]     choose: the parameters of the best mean accuracy, by number of labels
#     bash run_diffusion.bash 3 [EXPERIMENT.yaml]     test: the chosen parameters on the test split
#     bash run_diffusion.bash 4 [EXPERIMENT.yaml]     report: mean and standard deviation, beside the paper's figures
#
# EXPERIMENT.yaml defaults to configs/paper.yaml, the paper's grid, whose comments explain what such a file holds. From the
# environment:
#
# DDIR      the data directory; records, logs, parameters, tables and figures go to $DDIR/logs/diffusion/EXPERIMENT/
# JOBS      jobs at a time (default 1), which share the cores; JOBS=0 prints the commands that are still to be run
# PARAMS    PARAMS=published: phases 3 and 4 take the paper's parameters, so that 1 and 2 can be left out
# NBG, NLABELED, SEEDS   lists that replace the file's, e.g. NBG="1000000 10000000"
# PYTHON    interpreter (default: .venv/bin/python beside this file if it is there, else python3)
#
# Jobs whose record is complete, and of the data as they are, are not run again. The same command on machines that share the
# folders divides the jobs. A failed job is named, the others go on, the exit status is 1.
set -euo pipefail
case "${1:-}" in -h|--help) sed -n '2,/^set /{/^set /d; s/^# \{0,1\}//; p}' "${BASH_SOURCE[0]}"; exit ;; esac
here=$(cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")" && pwd)
if [ -z "${PYTHON:-}" ]; then
    if [ -x "$here/.venv/bin/python" ]; then PYTHON=$here/.venv/bin/python; else PYTHON=python3; fi
fi
PYTHONPATH=$here${PYTHONPATH:+:$PYTHONPATH} exec "$PYTHON" "$here/lowshot/phases.py" diffusion "$@"
