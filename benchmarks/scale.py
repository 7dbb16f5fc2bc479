"""Time and memory of build_graph.py and diffusion.py against the size of the background.

Reads $DDIR as they do, with as many background images as the largest of --nbg. Prints a Markdown table, and writes it to
--out. For each size: the graph of the background, the first run of diffusion.py, which completes it, and one further run.
Seconds are from start to finish, memory is the scripts' own peak, and beside it what they predicted. Of a graph that is there
the figures are read from its record; --anew removes these graphs from $DDIR/knngraph first.

    DDIR=/path/to/data python benchmarks/scale.py --nbg 100000 1000000 10000000 --niter 4 --anew --out scale.md
"""
import glob
import os
import shutil

from runs import diffusion, show, timed

from lowshot.files import read_json
from lowshot.layout import DataDir, padded_to_power_of_two
from lowshot.machine import thread_count
from lowshot.script import Parser, log, number, print_header, run, size


def arguments():
    p = Parser(__doc__)
    p.add_argument("--nbg", type=number(int, 1), nargs="+", default=[100000, 1000000, 10000000], help="sizes")
    p.add_argument("--nlabeled", type=number(int, 1), default=2, help="labelled images per novel class")
    p.add_argument("--niter", type=number(int, 0), default=4, help="iterations")
    p.add_argument("--k", type=number(int, 1), default=30, help="neighbours")
    p.add_argument("--anew", action="store_true", help="remove the graphs that are there first")
    p.add_argument("--out", help="file for the table")
    return p.parse_args()


def rows(args, ddir, nbg):
    """Yield (what, record)."""
    columns = padded_to_power_of_two(args.k)
    path, record = ddir.log("build_graph", f"ndis{nbg}_k{columns}.json"), None
    completed = ddir.path("knngraph", f"completed_test_ndis{nbg}_k{args.k}_d256")
    if args.anew:
        for name in glob.glob(glob.escape(ddir.path("knngraph", f"ndis{nbg}")) + "[._]*"):
            os.unlink(name)
        shutil.rmtree(completed, ignore_errors=True)
    if not os.path.exists(ddir.graph(nbg, columns)[0]):
        record = timed(path, "build_graph.py", nbg, "--k", args.k)
    elif os.path.exists(path):
        record = read_json(path)
        record["wall"] = record["seconds"]
    if record:
        yield f"build_graph.py, recall@{columns} {record['recall']:.3f}", record
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
                      f"{thread_count()} threads.", "", *lines, ""])
    show(text, args.out)


if __name__ == "__main__":
    run(main)
