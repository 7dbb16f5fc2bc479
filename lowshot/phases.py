"""Command line of run_logreg.bash and run_diffusion.bash: one phase of an experiment (see experiments.py).

    1  validate   logreg.py or diffusion.py on the validation split (--mode val), for all parameters of the grid
    2  choose     the parameters with the best mean accuracy over all classes, written to parameters.json; parameters.png shows
                  accuracy against iterations
    3  test       the chosen parameters on the test split (--mode test)
    4  report     mean and standard deviation over seeds, beside the paper's figures where there are any: report.md, report.json,
                  and report.png, accuracy against the number of labels

compare prints the table of both systems, after phase 3 of both, and draws them: $DDIR/logs/EXPERIMENT.md and .png.

    python -m lowshot.phases logreg 1 configs/paper.yaml
    python -m lowshot.phases compare configs/demo.yaml
"""
import contextlib
import os
import re
import sys

from lowshot.experiments import (SYSTEMS, Experiment, check_chosen, choose, entry_of, merge, parameters_and_jobs, read_parameters,
                                 validation_curves, validation_jobs)
from lowshot.figures import save, validation_figure
from lowshot.files import exclusive, write_json
from lowshot.jobs import CHECKOUT, run_jobs
from lowshot.layout import DataDir
from lowshot.report import print_comparison, print_report
from lowshot.script import Parser, as_text, log, run

PHASES = {"1": "validate", "2": "choose", "3": "test", "4": "report"}


def phase_choose(e, system, ddir):
    jobs = validation_jobs(e, system, ddir)
    curves = validation_curves(system, jobs)
    chosen, marks = choose(e, system, jobs, curves), {}
    path = e.parameters_path(system, ddir)
    old = {}
    with exclusive(path, lambda: log(f"another process is writing {path}")):
        with contextlib.suppress(ValueError):       # what is no parameters is written anew
            old = read_parameters(e, system, ddir, "chosen")
        write_json(path, merge(old, chosen))
    key, grid = ("niter", e.diffusion) if system == "diffusion" else ("maxiter", e.logreg)
    for nbg, n in curves:
        p = entry_of(chosen, nbg, n)
        marks[nbg, n] = tuple(p[name] for name in ("lr", "wd", "batchsize") if name in p), p[key]
        where = "" if nbg is None else f"nbg={nbg} "
        settings = ", ".join(f"{k} {as_text(v)}" for k, v in p.items() if k in ("lr", "wd", "batchsize", "maxiter", "niter"))
        log(f"{where}nl={n}: {settings}{', the last of the grid' * (p[key] == grid[key])} (validation: "
            f"{100 * p['val_top5']:.2f}, novel {100 * p['val_top5_novel']:.2f})")
    picture = os.path.splitext(path)[0] + ".png"
    save(validation_figure(curves, marks), picture)
    log(f"wrote {path} and {picture}")


def jobs_at_a_time():
    text = os.environ.get("JOBS") or "1"
    if not re.fullmatch(r"\d+", text):
        raise ValueError(f"JOBS={text!r} is not a whole number")
    return int(text)


def main():
    p = Parser(__doc__)
    p.add_argument("what", choices=(*SYSTEMS, "compare"), help="one system, or a table and a figure of all of them")
    p.add_argument("phase", nargs="?", help="1 validate, 2 choose, 3 test, 4 report; with compare there is none")
    p.add_argument("experiment", nargs="?", help="experiment file (default: configs/paper.yaml)")
    if sys.argv[1:2] and sys.argv[1] in SYSTEMS:
        p.prog = sys.argv[0] = f"run_{sys.argv[1]}.bash"        # which errors name
    args = p.parse_args()
    if args.what == "compare":
        if args.experiment:
            p.error(f"compare takes one experiment file, found {args.experiment} as well")
        phase, path = None, args.phase
    else:
        phase, path = args.phase, args.experiment
        if phase not in PHASES:
            p.error(f"{'no phase' if phase is None else f'unknown phase {phase!r}'}: the phases are "
                    + ", ".join(f"{k} ({v})" for k, v in PHASES.items()))
    if os.environ.get("DDIR") and os.getcwd() != CHECKOUT:
        os.environ["DDIR"] = os.path.abspath(os.environ["DDIR"])        # commands are printed for use in the checkout
    ddir = DataDir()
    e = Experiment(path or os.path.join(CHECKOUT, "configs", "paper.yaml"), systems=SYSTEMS if phase is None else [args.what])
    source = os.environ.get("PARAMS") or "chosen"
    if source not in ("chosen", "published"):
        raise ValueError(f"PARAMS={source!r}: chosen or published is expected")
    if phase is None:
        print_comparison(e, ddir, source)
    elif phase == "1":
        run_jobs(validation_jobs(e, args.what, ddir), jobs_at_a_time())
    elif phase == "2":
        phase_choose(e, args.what, ddir)
    else:
        parameters, jobs = parameters_and_jobs(e, args.what, ddir, source)
        if source == "chosen":
            check_chosen(e, parameters, jobs, e.parameters_path(args.what, ddir))
        if phase == "3":
            run_jobs(jobs, jobs_at_a_time())
        else:
            print_report(e, args.what, ddir, jobs, parameters, source)
    return 0


if __name__ == "__main__":
    run(main)
