"""Iterations per second of logreg.py's training, beside the same training written the obvious way.

The obvious way: a Python loop draws each image of the batch, one torch.nn.Linear at a time goes through
cross_entropy, backward() and torch.optim.SGD. Drawn at once: the same, but for batches that are drawn as ours. All are
given the same synthetic features in memory, (lr, wd) points of the paper's grid and number of threads; rounds of all ways
alternate and the best of each counts. bfloat16: with --precision bfloat16.

    python benchmarks/logreg.py --out logreg.md
"""
import time

from runs import show

import numpy as np
import torch     # before logreg.py, whose setting of OpenMP would make it slower
from graph_utils import FusedSGD
from logreg import Sampler
from lowshot.script import Parser, log, number, print_header, run

LEARNING_RATES, WEIGHT_DECAYS = (0.01, 0.001, 0.0001), (0, 0.01, 0.1)


def drawn_one_by_one(X, labels, batchsize, iterations, seed):
    """Yield batches, float32 (batchsize, d) and int64 (batchsize,)."""
    images_of = [np.flatnonzero(labels == c) for c in range(labels.max() + 1)]
    rs = np.random.RandomState(seed)
    for _ in range(iterations):
        x, y = [], []
        for _ in range(batchsize):
            c = rs.randint(len(images_of))
            x.append(X[rs.choice(images_of[c])])
            y.append(c)
        yield torch.stack(x), torch.tensor(y)


def drawn_at_once(X, labels, batchsize, iterations, seed):
    sampler = Sampler(labels, batchsize, seed)
    for t in range(iterations):
        images, classes = sampler.batches(t, t + 1)
        yield X[images[0]], torch.from_numpy(classes[0])


def train_obvious_way(batches, C, d, lr, wd):
    model = torch.nn.Linear(d, C)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9, weight_decay=wd)
    next(batches)                                       # what is made once
    t0 = time.time()
    iterations = 0
    for x, y in batches:
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        iterations += 1
    return iterations / (time.time() - t0)


def train_ours(X, labels, batchsize, iterations, points, seed, arithmetic="split"):
    sampler = Sampler(labels, batchsize, seed)
    classifiers = FusedSGD(points, labels.max() + 1, X.shape[1], 0.9, arithmetic)
    T = classifiers.together(batchsize)
    for t in range(0, 2 * T, T):                        # all memory is there
        classifiers.steps(X, *sampler.batches(t, t + T))
    classifiers.flush()
    t0 = time.time()
    for t in range(0, iterations, T):
        classifiers.steps(X, *sampler.batches(t, min(t + T, iterations)))
    classifiers.flush()
    return len(points) * iterations / (time.time() - t0)


def evaluation_seconds(X, labels, points):
    classifiers = FusedSGD(points, labels.max() + 1, X.shape[1], 0.9)
    classifiers.steps(X, *Sampler(labels, 64, 0).batches(0, 100))
    seconds = []
    for _ in range(3):
        t0 = time.time()
        classifiers.top(X, labels)
        seconds.append(time.time() - t0)
    return min(seconds)


def main():
    parser = Parser(__doc__)
    parser.add_argument("--nimages", type=number(int, 1), default=50000, help="labelled images")
    parser.add_argument("--nclass", type=number(int, 2), default=507, help="classes")
    parser.add_argument("--dim", type=number(int, 1), default=2048, help="columns of the features")
    parser.add_argument("--iterations", type=number(int, 1), default=150, help="iterations of a round")
    parser.add_argument("--rounds", type=number(int, 1), default=3, help="rounds")
    parser.add_argument("--batchsizes", type=number(int, 1), nargs="+", default=[16, 64, 128], help="mini-batches")
    parser.add_argument("--out", default="", help="also write the table to this file")
    args = parser.parse_args()
    if args.nimages < args.nclass:
        parser.error("--nimages is less than --nclass")
    print_header(args, threads=torch.get_num_threads())
    rs = np.random.RandomState(0)
    X = rs.random_sample((args.nimages, args.dim)).astype(np.float32)
    labels = np.concatenate([np.arange(args.nclass), rs.randint(args.nclass, size=args.nimages - args.nclass)])
    grid = [(lr, wd) for lr in LEARNING_RATES for wd in WEIGHT_DECAYS]
    table = ["| batch | obvious way, one point | drawn at once | ours, one point | ours, 9 points at once | speed-up per point "
             "| 9 points, bfloat16 | speed-up |", "|---|---|---|---|---|---|---|---|"]
    for batchsize in args.batchsizes:
        best = np.zeros(5)
        for r in range(args.rounds + 1):                # the first round warms up
            one_at_a_time = [train_obvious_way(draw(torch.from_numpy(X), labels, batchsize, args.iterations + 1, r), args.nclass,
                                               args.dim, 0.001, 0.01) for draw in (drawn_one_by_one, drawn_at_once)]
            figures = [*one_at_a_time, train_ours(X, labels, batchsize, args.iterations, [(0.001, 0.01)], r),
                       train_ours(X, labels, batchsize, args.iterations, grid, r),
                       train_ours(X, labels, batchsize, args.iterations, grid, r, "bfloat16")]
            if r:
                best = np.maximum(best, figures)
        obvious, at_once, single, whole_grid, rounded = best
        table.append(f"| {batchsize} | {obvious:.0f} | {at_once:.0f} | {single:.0f} | {whole_grid:.0f} | "
                     f"{whole_grid / obvious:.1f} | {rounded:.0f} | {rounded / obvious:.1f} |")
        log(table[-1])
    table = [f"Iterations per second and (lr, wd) point; {args.nclass} classes, {args.dim} columns, {args.nimages} "
             f"labelled images, {torch.get_num_threads()} threads.", ""] + table
    m = min(args.nimages, 25000)
    table += ["", f"Top-5 accuracy of {m} test images, 9 points at once: {evaluation_seconds(X[:m], labels[:m], grid):.2f} s."]
    show("\n".join(table) + "\n", args.out)


if __name__ == "__main__":
    run(main)
