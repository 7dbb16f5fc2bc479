"""What leaving rows out of the diffusion saves: diffusion.py with and without --noprune, for 1 to 7 iterations.

Reads $DDIR as diffusion.py does. Prints a Markdown table, and writes it to --out. Times are of the diffusion alone; the
accuracies of both runs have to be equal, up to rounding.

    DDIR=/path/to/data python benchmarks/pruning.py --nbg 1000000 --nlabeled 2
"""
from runs import diffusion, show

from lowshot.machine import thread_count
from lowshot.script import Parser, log, number, run


def arguments():
    p = Parser(__doc__)
    p.add_argument("--nbg", type=number(int, 0), default=1000000, help="background images")
    p.add_argument("--nlabeled", type=number(int, 1), default=2, help="labelled images per novel class")
    p.add_argument("--k", type=number(int, 1), default=30, help="neighbours")
    p.add_argument("--niter", type=number(int, 1), default=7, help="iterations, from 1 on")
    p.add_argument("--out", help="file for the table")
    return p.parse_args()


def diffused(args, niter, *more):
    """(seconds of the diffusion, results) of the better of two runs."""
    options = ["--nbg", args.nbg, "--nlabeled", args.nlabeled, "--k", args.k, "--niter", niter, *more]
    record = min((diffusion(*options) for _ in range(2)), key=lambda record: record["steps"][-1]["seconds"])
    return record["steps"][-1]["seconds"], record["results"]


def main():
    args = arguments()
    diffused(args, 0)          # completes the graph if need be
    lines = ["| iterations | all rows, s | pruned, s | saved |", "| --- | --- | --- | --- |"]
    for niter in range(1, args.niter + 1):
        (full, a), (pruned, b) = diffused(args, niter, "--noprune"), diffused(args, niter)
        if any(abs(x["top5"] - y["top5"]) > 2e-4 or abs(x["nnz"] - y["nnz"]) > 1e-2 for x, y in zip(a, b)):
            raise ValueError(f"the results differ after {niter} iterations: {a} {b}")
        lines.append(f"| {niter} | {full:.2f} | {pruned:.2f} | {1 - pruned / full:.0%} |")
        log(lines[-1])
    table = "\n".join([f"{args.nbg:,} background images, {args.nlabeled} labels per novel class, {thread_count()} threads", "",
                       *lines, ""])
    show(table, args.out)


if __name__ == "__main__":
    run(main)
