#!/usr/bin/env python3
"""Time and memory of build_graph.py and diffusion.py against the size of the background.

Reads $DDIR as they do, with as many background images as the largest of --nbg. Prints a Markdown table, and writes it to
--out. For each size: the graph of the background, the first run of diffusion.py, which completes it, and one further run.
Seconds are from start to finish, memory is the scripts' own peak, and beside it what they predicted. What is complete in
$DDIR/knngraph is removed first, unless --keep is given: then the figures of what was made are read from the records.

    DDIR=/path/to/data python benchmarks/scale.py --nbg 100000 1000000 10000000 --niter 4 --out scale.md
"""
import glob
import json
import os
import shutil
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from lowshot.layout import DataDir  # noqa: E402
from lowshot.script import Parser, log, number, print_header, run, size  # noqa: E402
from runs import diffusion, show, timed  # noqa: E402


def arguments():
    p = Parser(__doc__)
    p.add_argument("--nbg", type=number(int, 1), nargs="+", default=[100000, 1000000, 10000000], help="sizes")
    p.add_argument("--nlabeled", type=number(int, 1), default=2, help="labelled images per novel class")
    p.add_argument("--niter", type=number(int, 0), default=4, help="iterations")
    p.add_argument("--k", type=number(int, 1), default=30, help="neighbours")
    p.add_argument("--keep", action="store_true", help="keep the graphs that are there")
    p.add_argument("--out", help="file for the table")
    return p.parse_args()


def rows(args, ddir, nbg):
    """Yield (what, record)."""
    graph = ddir.log("build_graph", f"ndis{nbg}_k32.json")
    completed = ddir.path("knngraph", f"completed_test_ndis{nbg}_k{args.k}_d256")
    if not args.keep:
        for path in glob.glob(ddir.path("knngraph", f"ndis{nbg}[._]*")):
            os.unlink(path)
        shutil.rmtree(completed, ignore_errors=True)
    if args.keep and os.path.exists(graph):
        with open(graph) as f:
            record = json.load(f)
        yield f"build_graph.py, recall@32 {record['recall']:.3f}", {**record, "wall": record["seconds"]}
    else:
        record = timed(graph, "build_graph.py", nbg)
        yield f"build_graph.py, recall@32 {record['recall']:.3f}", record
    options = ["--nlabeled", args.nlabeled, "--nbg", nbg, "--k", args.k, "--niter", args.niter]
    if not os.path.exists(completed):
        yield "diffusion.py, first run", diffusion(*options)
    yield "diffusion.py, further runs", diffusion(*options)


def main():
    args = arguments()
    ddir = DataDir()
    print_header(args)
    lines = ["| background | what | s | microseconds per node | peak memory | predicted |", "| --- | --- | --- | --- | --- | --- |"]
    for nbg in args.nbg:
        for what, record in rows(args, ddir, nbg):
            nodes = record.get("nodes", nbg)
            lines.append(f"| {nbg:,} | {what} | {record['wall']:.1f} | {1e6 * record['wall'] / nodes:.0f} | "
                         f"{size(record['peak_memory'])} | {size(record['predicted_memory'])} |")
            log(lines[-1])
    text = "\n".join([f"{args.niter} iterations, {args.nlabeled} labels per novel class, k = {args.k}, "
                      f"{len(os.sched_getaffinity(0))} CPUs.", "", *lines, ""])
    show(text, args.out)


if __name__ == "__main__":
    run(main)
