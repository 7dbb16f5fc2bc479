"""Stage 4: logistic regression on the labelled images, the baseline of the paper (section 4.2).

A linear classifier with bias is trained on the 2048-d features as they are, by stochastic gradient descent on the
softmax loss of class-balanced mini-batches: a class at random, then one of its labelled images. Evaluation is the top-5
accuracy on the images of val.hdf5 whose class is in the split.

Reads    $DDIR/features/train.hdf5, val.hdf5 (the rows of the split's classes only), $DDIR/label_idx.json
Writes   $DDIR/logs/logreg/{mode}_nl{nlabeled}_seed{seed}_bs{batchsize}_lr{lr}_wd{wd}_mi{maxiter}.json, with _mom{mom} and
         _bfloat16 before .json where --mom and --precision bfloat16 are given

    python logreg.py --mode test --nlabeled 2 --seed 1 --maxiter 29500 --lr 0.001 --wd 0.01 --batchsize 128

--lr and --wd take several values separated by commas: all combinations are then trained at once on the same
mini-batches, with the figures of separate runs:

    python logreg.py --mode val --nlabeled 2 --seed 1 --maxiter 75000 --lr 0.01,0.001,0.0001 --wd 0,0.01,0.1

A run that was killed goes on from its last checkpoint when the same command is given again.
"""
import argparse
import contextlib
import errno
import functools
import math
import os
import time

import lowshot  # noqa: F401     before numpy: it names the number of threads
import numpy as np

from lowshot.evaluate import accuracies, note_of_unreadable, notes_of_classes
from lowshot.features import FeatureFile, SLAB_BYTES
from lowshot.files import allocate, check_outputs, exclusive, file_identities, whole, write_json
from lowshot.layout import DataDir
from lowshot.machine import available_memory, peak_memory, torch_device, wait_briefly
from lowshot.run_state import RunState
from lowshot.script import Parser, Progress, as_text, file_name, log, number, print_header, provenance, run, size, warn_of_memory
from lowshot.split import images_of_run, load_split

wait_briefly()


class Sampler:
    """Class-balanced mini-batches: for each image a class at random, then one of its images, both uniformly.

    labels: int (n,), class 0..C-1 of each image; every class must occur. Batch t depends on (seed, t) only: batches
    are drawn DRAWN at a time, the j-th time from RandomState([seed, j]), first `randint` for all the classes, then
    `random_sample` for the positions within them.
    """

    DRAWN = 512

    def __init__(self, labels, batchsize, seed):
        labels = np.asarray(labels, np.int64)
        self.order = np.argsort(labels, kind="stable")
        self.count = np.bincount(labels)
        if not len(labels) or self.count.min() == 0:
            raise ValueError(f"class {np.argmin(self.count) if len(labels) else 0} has no labelled image")
        self.start = np.cumsum(self.count) - self.count
        self.batchsize, self.seed, self.drawn = batchsize, seed, -1

    def batch(self, t):
        """(images, their classes) of the mini-batch of iteration t >= 0, both int64 (batchsize,)."""
        if t // self.DRAWN != self.drawn:
            self.drawn = t // self.DRAWN
            rs = np.random.RandomState([self.seed, self.drawn])
            self.classes = rs.randint(len(self.count), size=(self.DRAWN, self.batchsize))
            count = self.count[self.classes]
            at = np.minimum((rs.random_sample(self.classes.shape) * count).astype(np.int64), count - 1)
            self.images = self.order[self.start[self.classes] + at]
        return self.images[t % self.DRAWN], self.classes[t % self.DRAWN]

    def batches(self, first, end):
        """(images, classes) of iterations first .. end - 1, both int64 (end - first, batchsize)."""
        return tuple(map(np.stack, zip(*(self.batch(t) for t in range(first, end)))))


def evaluate(classifiers, X, labels, is_novel, store=None):
    """[(top-5 accuracy over all test images, over those of novel classes)] per point.

    X: float32 (nt, d), the test images, labels: int (nt,). A score that is NaN counts as wrong.
    store: a list of G arrays (nt, C) that receive the scores, or None.
    """
    right = classifiers.top(X, labels) if store is None else classifiers.ranks(X, labels, store) < 5
    return [accuracies(r, labels, is_novel) for r in right]


def predict_memory(now, n, nt, d, C, G, batchsize, on_gpu=False):
    """Peak memory in bytes of this process: `now` (interpreter and libraries), and the larger of what is held while the features
    of the n labelled images are read, then those of the nt test images, and while these are there once and training goes on."""
    from graph_utils import FusedSGD
    labelled, test = 4 * d * n, 4 * d * nt
    reading = max(labelled + min(SLAB_BYTES, labelled), labelled + test + min(SLAB_BYTES, test)) + 24 * (n + nt)
    drawn = 16 * Sampler.DRAWN * batchsize * 2
    return int(now + max(reading, labelled + test + drawn + (0 if on_gpu else FusedSGD.memory(G, C, d, batchsize))))


def point_file(path, points, g):
    """The file of point g: with several points its name gets _lr.._wd.. in front of the extension."""
    stem, extension = os.path.splitext(path)
    lr, wd = map(as_text, points[g])
    return f"{stem}_lr{lr}_wd{wd}{extension}" if len(points) > 1 else path


@contextlib.contextmanager
def score_file(path, nt, C):
    """A float32 (nt, C) array that becomes the .npy file `path` when the block ends well."""
    with whole(path) as temporary:
        array = np.lib.format.open_memmap(temporary, "w+", np.float32, shape=(nt, C))
        allocate(temporary)
        yield array
        array.flush()


def check_saved(rest, points, args):
    """Some exception where a state is not that of a run of these points, or is beyond its end."""
    runs, first = rest["runs"], rest["iteration"]
    due = range(args.evalevery, first + 1, args.evalevery) if args.evalevery else ()
    if not (type(first) is int and 0 < first < args.maxiter and math.isfinite(rest["seconds"])
            and [(r["lr"], r["wd"]) for r in runs] == points
            and all([r["iteration"] for r in run["results"]] == list(due) for run in runs)
            and all(0 <= r[key] <= 1 for run in runs for r in run["results"] for key in ("top5", "top5_novel"))
            and all(np.array(some, np.float64).shape[1] == len(points) for some in rest["losses"])):
        raise ValueError("it is not of this run")


def numbers(text):
    """Argument type: numbers >= 0 separated by commas."""
    values = [number(float, 0, 1e6)(part) for part in text.split(",")]
    if len(set(values)) < len(values):
        raise argparse.ArgumentTypeError(f"{text} repeats a value")
    return values


def arguments():
    parser = Parser(__doc__)
    group = parser.add_argument_group("experiment")
    group.add_argument("--mode", choices=["val", "test"], default="val",
                       help="class set 1 (val, to choose parameters) or 2 (test)")
    group.add_argument("--nlabeled", type=number(int, 1), default=2, help="labelled images per novel class")
    group.add_argument("--seed", type=number(int, 0, 2 ** 32 - 1), default=1,
                       help="which novel images are labelled, and the mini-batches")
    group = parser.add_argument_group("training")
    group.add_argument("--maxiter", type=number(int, 1), default=75000, help="iterations")
    group.add_argument("--lr", type=numbers, default="0.001", help="learning rates, comma separated")
    group.add_argument("--wd", type=numbers, default="0.01", help="weight decays, comma separated")
    group.add_argument("--batchsize", type=number(int, 1), default=128, help="images per mini-batch")
    group.add_argument("--mom", type=number(float, 0, 1), default=0.9, help="momentum")
    group.add_argument("--evalevery", type=number(int, 0), default=None,
                       help="report every so many iterations and at the end, 0: at the end only; "
                            "500 in validation mode and 0 in test mode unless given")
    group = parser.add_argument_group("computation")
    group.add_argument("--device", default="auto", help="cpu, cuda, cuda:0, ...; auto: a GPU if there is one")
    group.add_argument("--precision", choices=["float32", "bfloat16"], default="float32",
                       help="of the products in training, on a CPU. bfloat16: factors are rounded to 8 binary digits, which "
                            "CPUs with products of such numbers multiply twice as fast or more; parameters and sums "
                            "remain float32, and evaluation exact. Accuracies then differ by less than those of two seeds")
    group.add_argument("--checkpoint", type=number(float, 0), default=60,
                       help="seconds between checkpoints of a long run, 0: none")
    group = parser.add_argument_group("output")
    group.add_argument("--record", type=file_name, metavar="FILE",
                       help="JSON record; by default under $DDIR/logs/logreg, named by the arguments")
    group.add_argument("--storemodel", type=file_name, metavar="FILE",
                       help=".npz with weight float32 (C, d), bias float32 (C), classes int64 (C): class numbers from "
                            "0; with several points the name gets _lr.._wd.. before its extension")
    group.add_argument("--storeL", type=file_name, metavar="FILE",
                       help=".npy with the final scores (logits) float32 (test images, C): rows in the order of "
                            "val.hdf5 without classes outside the split, columns in increasing class number; "
                            "named as --storemodel with several points")
    group.add_argument("--verbose", action="store_true", help="also the mean training loss since the last report")
    args = parser.parse_args()
    if args.evalevery is None:
        args.evalevery = 500 if args.mode == "val" else 0
    return args


def default_record(ddir, args):
    lr, wd = as_text(args.lr), as_text(args.wd)
    rest = (f"_mom{as_text(args.mom)}" if args.mom != 0.9 else "") + (f"_{args.precision}" if args.precision != "float32" else "")
    return ddir.log("logreg", f"{args.mode}_nl{args.nlabeled}_seed{args.seed}_bs{args.batchsize}_lr{lr}_wd{wd}"
                              f"_mi{args.maxiter}{rest}.json")


def read_rows(file, rows, what):
    with Progress(len(rows), what) as progress:
        return file.read(rows, progress=progress.update)


def train(classifiers, sampler, X, args, report, checkpoint, first, losses):
    """Iterations first..maxiter-1; `report(iteration, losses)` where due, `checkpoint(iteration, losses)` in between.

    losses: with --verbose those of the iterations since the last report, a list of arrays (iterations, points).
    """
    last_saved, T, t = time.monotonic(), classifiers.together(args.batchsize), first
    with Progress(args.maxiter, "iterations", start=first) as progress:
        while t < args.maxiter:
            # up to the next multiple of T or report: the same groups, thus the same figures, also after a resumption
            end = min(t - t % T + T, args.maxiter, t - t % args.evalevery + args.evalevery if args.evalevery else math.inf)
            loss = classifiers.steps(X, *sampler.batches(t, end), args.verbose)
            if args.verbose:
                losses.append(loss)
            t = end
            if t == args.maxiter or (args.evalevery and t % args.evalevery == 0):
                report(t, np.concatenate(losses).mean(0).tolist() if losses else None)
                losses = []
            if args.checkpoint and t < args.maxiter and time.monotonic() - last_saved > args.checkpoint:
                checkpoint(t, losses)
                last_saved = time.monotonic()
            progress.update(t)


def main():
    args = arguments()
    ddir = DataDir()
    record = provenance(args)
    args.record = args.record or default_record(ddir, args)
    inputs = [ddir.train, ddir.val, ddir.label_idx()]
    points = [(lr, wd) for lr in args.lr for wd in args.wd]
    stored = [point_file(path, points, g) for path in (args.storemodel, args.storeL) if path for g in range(len(points))]
    check_outputs(args.record, *stored, inputs=inputs)
    record["files"] = file_identities(inputs)
    with contextlib.ExitStack() as stack:
        for path in (args.record, *stored):         # with the record goes the state beside it
            stack.enter_context(exclusive(path))
        experiment(args, ddir, record, points)


def experiment(args, ddir, record, points):
    """Train and evaluate what the arguments say, and complete and write the record."""
    from graph_utils import FusedSGD, get_num_threads
    split = load_split(ddir.label_idx(), args.mode)
    C = len(split.classes)
    with FeatureFile(ddir.train) as train_file, FeatureFile(ddir.val) as val_file:
        if train_file.d != val_file.d:
            raise ValueError(f"{ddir.train} has {train_file.d} columns and {ddir.val} {val_file.d}: "
                             "both must come from the same network")
        d = train_file.d
        rows, labels, nbase, test_rows, test_labels, unreadable = images_of_run(train_file, val_file, split, args.nlabeled,
                                                                                args.seed)
        record["unreadable"] = unreadable

        device = torch_device(args.device)
        if device != "cpu" and args.precision != "float32":
            raise ValueError(f"--precision {args.precision} is for CPUs: add --device cpu")
        predicted = predict_memory(peak_memory(), len(rows), len(test_rows), d, C, len(points), args.batchsize,
                                   device != "cpu")
        print_header(args, device=device, threads=get_num_threads(), predicted_memory=size(predicted))
        warn_of_memory(predicted)
        log(f"{C} classes{ddir.of_label_idx()} ({len(split.novel)} novel), {len(rows)} labelled images ({nbase} of base "
            f"classes), {len(test_rows)} test images, {d} columns, {len(points)} (lr, wd) points")
        record["notes"] = list(notes_of_classes(test_labels, split))
        for note in note_of_unreadable(*unreadable) + record["notes"]:
            log(note)
        X = read_rows(train_file, rows, "labelled images")                                         # (n, d)
        Xtest = read_rows(val_file, test_rows, "test images")                                      # (nt, d)

    if device == "cpu":
        classifiers = FusedSGD(points, C, d, args.mom, "split" if args.precision == "float32" else args.precision)
    else:
        import torch
        from lowshot.torch_sgd import TorchClassifiers
        torch.set_grad_enabled(False)
        X, Xtest = torch.from_numpy(X).to(device), torch.from_numpy(Xtest)
        classifiers = TorchClassifiers(points, C, d, args.mom, device)
    sampler = Sampler(labels, args.batchsize, args.seed)
    runs = [{"lr": lr, "wd": wd, "results": []} for lr, wd in points]
    state = RunState(args.record, {
        "arguments": {k: v for k, v in vars(args).items() if k not in ("device", "checkpoint", "record", "storemodel", "storeL")},
        "sizes": [len(rows), len(test_rows), d, C], "files": record["files"]})
    first, losses, diverged, t0 = 0, [], set(), time.monotonic()
    saved = state.load(classifiers.state(), functools.partial(check_saved, points=points, args=args))
    if saved:
        arrays, saved = saved
        classifiers.restore(arrays)
        first, runs, t0 = saved["iteration"], saved["runs"], t0 - saved["seconds"]
        losses = [np.array(some) for some in saved["losses"]]
        log(f"going on from iteration {first} of an interrupted run")

    def report(iteration, losses):
        with contextlib.ExitStack() as outputs:
            scores = None
            if args.storeL and iteration == args.maxiter:
                scores = [outputs.enter_context(score_file(point_file(args.storeL, points, g), len(test_rows), C))
                          for g in range(len(points))]
            figures = evaluate(classifiers, Xtest, test_labels, split.is_novel, scores)
        seconds = time.monotonic() - t0
        for g, ((lr, wd), (top5, novel)) in enumerate(zip(points, figures)):
            prefix = f"lr {lr:g} wd {wd:g} " if len(points) > 1 else ""
            loss = f" loss {losses[g]:.4f}" if losses else ""
            log(f"{prefix}[{seconds:.3f}s] iteration {iteration} top-5 accuracy: {top5:.3f} ({novel:.3f} on novel)"
                + loss)
            runs[g]["results"].append({"iteration": iteration, "top5": top5, "top5_novel": novel, "seconds": seconds})
            if g not in diverged and not np.isfinite(classifiers.weights(g)[1]).all():
                diverged.add(g)
                log(f"note: lr {lr:g} wd {wd:g} diverged, its scores are not numbers")

    try:
        train(classifiers, sampler, X, args, report,
              lambda done, losses: state.save(classifiers.state(), iteration=done, runs=runs, seconds=time.monotonic() - t0,
                                              losses=[some.tolist() for some in losses]), first, losses)
    except (MemoryError, OSError) as e:
        if isinstance(e, OSError) and e.errno != errno.ENOMEM:
            raise
        raise MemoryError(f"training takes {size(predicted)}, the machine has {size(available_memory())} free ({e}): lower "
                          f"--batchsize{', or train fewer --lr and --wd at a time' * (len(points) > 1)}")
    for g in range(len(points) if args.storemodel else 0):
        weight, bias = classifiers.weights(g)
        with whole(point_file(args.storemodel, points, g)) as temporary, open(temporary, "wb") as f:
            np.savez(f, weight=weight, bias=bias, classes=split.classes)

    write_json(args.record, {
        **record, "runs": runs, "nclass": C, "nlabelled_images": len(rows), "ntest": len(test_rows),
        "device": device, "threads": get_num_threads(), "seconds": time.monotonic() - t0,
        "predicted_memory": predicted, "peak_memory": peak_memory(), "complete": True})
    state.remove()
    log(f"record {args.record}, peak memory {size(peak_memory())} ({size(predicted)} predicted)")


if __name__ == "__main__":
    run(main)
