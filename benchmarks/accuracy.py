"""What it costs in accuracy that not all neighbours are found: diffusion.py beside itself with exact graphs.

Reads $DDIR with the graph of its background, as diffusion.py does. Makes the same graph, and completes it, by comparing all with
all, in the folder --exact, where they are kept for the next time: for 1,000,000 background images that takes 22 minutes on two
cores. Prints a Markdown table, and writes it to --out: top-5 accuracy by the exact graph, and by how much that by the graph of
$DDIR exceeds it, after each iteration, on average over seeds.

    DDIR=/path/to/data python benchmarks/accuracy.py --nbg 1000000 --exact /path/to/exact --out accuracy.md
"""
import os

from runs import ROOT, diffusion, show, timed

import numpy as np
from lowshot.layout import DataDir, padded_to_power_of_two
from lowshot.script import Parser, Progress, log, number, print_header, run

# a program that runs a script, given by its arguments, with exact search for any number of vectors
EXACTLY = ["-c", f"""import runpy, sys
sys.path.insert(0, {ROOT!r})
from lowshot import exact_search
exact_search.EXACT_BELOW = 1 << 62
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")"""]


def arguments():
    p = Parser(__doc__)
    p.add_argument("--nbg", type=number(int, 1), default=1000000, help="background images")
    p.add_argument("--exact", required=True, metavar="DIR", help="data directory for the exact graphs; made if it is not there")
    p.add_argument("--nlabeled", type=number(int, 1), nargs="+", default=[1, 2, 5], help="labelled images per novel class")
    p.add_argument("--seeds", type=number(int, 0), nargs="+", default=[1, 2], help="seeds")
    p.add_argument("--niter", type=number(int, 0), default=5, help="iterations")
    p.add_argument("--k", type=number(int, 1), default=30, help="neighbours")
    p.add_argument("--out", help="file for the table")
    return p.parse_args()


def exact_directory(path, ddir, nbg, k):
    """A data directory of the same features with the exact graph."""
    os.makedirs(path, exist_ok=True)
    for source, name in ((ddir.path("features"), "features"), (ddir.label_idx(), "label_idx.json")):
        link = os.path.join(path, name)
        if not os.path.lexists(link):
            os.symlink(os.path.abspath(source), link)
        if os.path.realpath(link) != os.path.realpath(source):
            raise ValueError(f"{link} is of other data ({os.path.realpath(link)}): name another --exact")
    exact, columns = DataDir(path), padded_to_power_of_two(k)
    if not os.path.exists(exact.graph(nbg, columns)[0]):
        log(f"exact graph of {nbg} images")
        timed(exact.log("build_graph", f"ndis{nbg}_k{columns}.json"), "build_graph.py", nbg, "--k", k, "--device", "cpu",
              program=EXACTLY, ddir=path)


def accuracies(args, nlabeled, progress, **where):
    """(all, novel) of the seeds, float (2, seeds, niter + 1)."""
    found = []
    for seed in args.seeds:
        record = diffusion("--nbg", args.nbg, "--k", args.k, "--niter", args.niter, "--nlabeled", nlabeled, "--seed", seed,
                           "--device", "cpu", **where)
        found.append([[r[key] for r in record["results"]] for key in ("top5", "top5_novel")])
        progress.advance()
    return np.array(found).transpose(1, 0, 2)


def main():
    args = arguments()
    ddir = DataDir()
    print_header(args)
    exact_directory(args.exact, ddir, args.nbg, args.k)
    lines = ["| labels | images | " + " | ".join(f"{i} iterations" for i in range(args.niter + 1)) + " |",
             "| --- | --- |" + " --- |" * (args.niter + 1)]
    worst = 0.0
    with Progress(2 * len(args.nlabeled) * len(args.seeds), "runs of diffusion.py") as progress:
        for n in args.nlabeled:
            exact = accuracies(args, n, progress, program=EXACTLY, ddir=args.exact)
            ours = accuracies(args, n, progress)
            worst = max(worst, np.abs(ours - exact).max())
            for what, a, b in zip(("all", "novel"), exact.mean(1), ours.mean(1)):
                lines.append(f"| {n} | {what} | " + " | ".join(f"{x:.4f} ({y - x:+.4f})" for x, y in zip(a, b)) + " |")
    text = "\n".join([f"{args.nbg:,} background images, k = {args.k}, means over {len(args.seeds)} seeds; the largest difference "
                      f"of a single run is {worst:.4f}.", "", *lines, ""])
    show(text, args.out)


if __name__ == "__main__":
    run(main)
