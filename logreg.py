"""Logistic regression on the labelled images: the baseline of the paper (section 4.2).

A linear classifier with bias is trained on the 2048-d features as they are, by stochastic gradient descent on the
softmax loss of class-balanced mini-batches: a class at random, then one of its labelled images. Evaluation is the top-5
accuracy on the images of val.hdf5 whose class is in the split.

Reads    $DDIR/features/train.hdf5, val.hdf5 (the rows of the split's classes only), $DDIR/label_idx.json
Writes   $DDIR/logs/logreg/{mode}_nl{nlabeled}_seed{seed}_bs{batchsize}_lr{lr}_wd{wd}_mi{maxiter}.json

    python logreg.py --mode test --nlabeled 2 --seed 1 --maxiter 29500 --lr 0.001 --wd 0.01 --batchsize 128

--lr and --wd take several values separated by commas: all combinations are then trained at once on the same
mini-batches, with the figures of separate runs:

    python logreg.py --mode val --nlabeled 2 --seed 1 --maxiter 75000 --lr 0.01,0.001,0.0001 --wd 0,0.01,0.1

A run that was killed goes on from its last checkpoint when the same command is given again.
"""
import argparse
import contextlib
import glob
import json
import os
import time
import zipfile

import numpy as np

from lowshot.evaluate import accuracies, in_top5
from lowshot.features import FeatureFile, SLAB_BYTES
from lowshot.layout import DataDir
from lowshot.script import (Parser, Progress, available_memory, log, number, peak_memory, print_header, provenance,
                            run, size, whole, write_json)
from lowshot.split import labelled_images, load_split, test_images

EVALUATION_BLOCK = 1024         # test images whose scores are in memory at once


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


class LinearClassifiers:
    """G linear classifiers of C classes with bias, trained side by side by SGD, one per (lr, wd) of `points`.

    Each starts at zero and follows torch.optim.SGD(lr, momentum=mom, weight_decay=wd) on the mean softmax loss,
    weight decay on the bias as well:

        M <- mom M + gradient + wd W,    W <- W - lr M.

    At G C d parameters an iteration costs as much for moving W and M as for the products, so they are kept in the
    form that needs one pass each. With a decay factor rho >= 1 per point, and `shrink` = rho^-t,

        W = shrink W~,    V = M + kappa W = V~ / shrink,
        V~ <- mom V~ + shrink gradient           (one product that accumulates)
        W~ <- W~ - lr rho / (shrink_t)^2 V~

    is the same recursion if kappa solves  lr mom kappa^2 + (1 - mom - lr wd) kappa + wd = 0, rho = 1 - lr kappa: then
    V is an eigenvector of the momentum recursion and weight decay needs no term of its own. kappa = 0, rho = 1 without
    weight decay. Where the root is not real (lr wd large) the term wd W is added explicitly.

    W~ and V~ with their biases are float32, 8 G C (d + 1) bytes together.
    """

    RESCALE = 1e-2              # W~ and V~ are multiplied out when shrink falls below this

    def __init__(self, points, C, d, mom, device="cpu"):
        import torch
        self.torch, self.points, self.C, self.d, self.mom, self.device = torch, points, C, d, mom, device
        G = len(points)
        self.W, self.V = (torch.zeros(G * C, d, device=device) for _ in range(2))
        self.b, self.vb = (torch.zeros(G * C, device=device) for _ in range(2))
        self.kappa, self.explicit = np.zeros(G), np.zeros(G, bool)
        for g, (lr, wd) in enumerate(points):
            middle = 1 - mom - lr * wd
            square = middle * middle - 4 * lr * mom * wd
            self.explicit[g] = wd > 0 and (middle <= 0 or square < 0)
            if wd > 0 and not self.explicit[g]:
                self.kappa[g] = -2 * wd / (middle + square ** 0.5)
        self.rho = 1 - np.array([lr for lr, _ in points]) * self.kappa
        self.shrink = np.ones(G)
        self.buffers = {}

    def step(self, x, y, loss=False):
        """One iteration on the batch x float32 (B, d), y int64 (B,), tensors of this device.

        loss: return the mean softmax loss of each point before the step, float64 (G,).
        """
        torch, G, C, B = self.torch, len(self.points), self.C, len(x)
        if B not in self.buffers:
            self.buffers[B] = torch.empty(G * C, B, device=self.device), torch.arange(B, device=self.device)
        Z, each = self.buffers[B]
        shrink = torch.tensor(self.shrink, dtype=torch.float32, device=self.device).view(G, 1, 1)
        torch.mm(self.W, x.t(), out=Z)
        P = Z.add_(self.b[:, None]).view(G, C, B).mul_(shrink).softmax(1)                   # (G, C, B)
        values = -P[:, y, each].double().log().mean(1) if loss else None
        P[:, y, each] -= 1
        P.mul_(shrink / B)
        self.V.addmm_(P.view(G * C, B), x, beta=self.mom)
        self.vb.mul_(self.mom).add_(P.sum(2).view(-1))
        for g, (lr, wd) in enumerate(self.points):
            if self.explicit[g]:
                self._of(self.V, g).add_(self._of(self.W, g), alpha=wd)
                self._of(self.vb, g).add_(self._of(self.b, g), alpha=wd)
            rate = -lr * self.rho[g] / self.shrink[g] ** 2
            self._of(self.W, g).add_(self._of(self.V, g), alpha=rate)
            self._of(self.b, g).add_(self._of(self.vb, g), alpha=rate)
            self.shrink[g] /= self.rho[g]
            if self.shrink[g] < self.RESCALE:
                for decaying, growing in ((self.W, self.V), (self.b, self.vb)):
                    self._of(decaying, g).mul_(self.shrink[g])
                    self._of(growing, g).div_(self.shrink[g])
                self.shrink[g] = 1
        return values

    def _of(self, tensor, g):
        return tensor[g * self.C:(g + 1) * self.C]

    def weights(self, g):
        """(W float32 (C, d), b float32 (C,)) of point g, numpy."""
        return tuple((self._of(t, g) * self.shrink[g]).cpu().numpy() for t in (self.W, self.b))

    def scores(self, x):
        """Scores of x float32 (m, d): float32 (G, m, C), numpy."""
        torch, G = self.torch, len(self.points)
        shrink = torch.tensor(self.shrink, dtype=torch.float32, device=self.device).view(G, 1, 1)
        Z = torch.addmm(self.b, x, self.W.t()).view(len(x), G, self.C).transpose(0, 1).mul_(shrink)
        return Z.cpu().numpy()

    def state(self):
        """Everything that training goes on from, as numpy arrays."""
        return {"shrink": self.shrink, **{k: getattr(self, k).cpu().numpy() for k in ("W", "V", "b", "vb")}}

    def restore(self, state):
        self.shrink = np.array(state["shrink"])
        for k in ("W", "V", "b", "vb"):
            getattr(self, k).copy_(self.torch.from_numpy(state[k]))


def evaluate(classifiers, x, labels, is_novel, store=None):
    """[(top-5 accuracy over all test images, over those of novel classes)] per point.

    x: float32 (nt, d) tensor of the test images, labels: int (nt,). A score that is NaN counts as wrong.
    store: a list of G arrays (nt, C) that receive the scores, or None.
    """
    right = np.empty((len(classifiers.points), len(labels)), bool)
    for i in range(0, len(labels), EVALUATION_BLOCK):
        block = slice(i, i + EVALUATION_BLOCK)
        scores = classifiers.scores(x[block].to(classifiers.device))
        for g, s in enumerate(scores):
            own = s[np.arange(len(s)), labels[block]]
            right[g, block] = in_top5(s, labels[block], zero_counts=True) & ~np.isnan(own)
            if store is not None:
                store[g][block] = s
    return [accuracies(r, labels, is_novel) for r in right]


def predict_memory(now, n, nt, d, C, G, batchsize, on_gpu=False):
    """Peak memory in bytes of this process: `now` (interpreter and libraries), the features of the n labelled and nt
    test images once, and the larger of what reading and what training hold beside them."""
    features = 4 * d * (n + nt)
    reading = 2 * SLAB_BYTES + 24 * (n + nt)
    parameters = 8 * G * C * (d + 1)
    training = 12 * G * C * batchsize + 16 * Sampler.DRAWN * batchsize * 2 + 4 * d * batchsize
    evaluation = G * C * EVALUATION_BLOCK * 5
    if on_gpu:
        parameters = training = 0
    return int(now + features + max(reading, parameters + training + evaluation))


def point_file(path, points, g):
    """The file of point g: with several points its name gets _lr.._wd.. in front of the extension."""
    stem, extension = os.path.splitext(path)
    return f"{stem}_lr{points[g][0]:g}_wd{points[g][1]:g}{extension}" if len(points) > 1 else path


@contextlib.contextmanager
def score_file(path, nt, C):
    """A float32 (nt, C) array that becomes the .npy file `path` when the block ends well."""
    with whole(path) as temporary:
        array = np.lib.format.open_memmap(temporary, "w+", np.float32, shape=(nt, C))
        yield array
        array.flush()


class Checkpoint:
    """The state of a run that is under way, in a file beside its record; `key` says what it belongs to."""

    def __init__(self, record, key):
        folder, name = os.path.split(os.path.abspath(record))
        self.path = os.path.join(folder, f".{os.path.splitext(name)[0]}.state.npz")
        self.key = json.dumps(key, sort_keys=True)

    def save(self, classifiers, **rest):
        with whole(self.path) as temporary:
            with open(temporary, "wb") as f:
                np.savez(f, key=self.key, rest=json.dumps(rest), **classifiers.state())

    def load(self, classifiers):
        """Restore the classifiers; returns the rest that was saved, None if there is no state of the same run."""
        if not os.path.exists(self.path):
            return None
        try:
            with np.load(self.path, allow_pickle=False) as state:
                if str(state["key"]) != self.key:
                    return None
                classifiers.restore(state)
                return json.loads(str(state["rest"]))
        except (OSError, ValueError, KeyError, EOFError, RuntimeError, zipfile.BadZipFile) as e:
            raise ValueError(f"{self.path} is not a state of logreg.py ({e}): delete it to start afresh")

    def remove(self):
        stem = self.path[:-len(".npz")]
        folder, name = os.path.split(stem)
        left_behind = os.path.join(glob.escape(folder), f".{glob.escape(name)}.*.tmp.npz")      # by killed processes
        for path in [self.path, *glob.glob(left_behind)]:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)


def numbers(text):
    """Argument type: numbers >= 0 separated by commas."""
    values = [number(float, 0, 1e6)(part) for part in text.split(",")]
    if len(set(values)) < len(values):
        raise argparse.ArgumentTypeError(f"{text} repeats a value")
    return values


def parse_arguments():
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
    group.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto", help="auto: a GPU if there is one")
    group.add_argument("--checkpoint", type=number(float, 0), default=60,
                       help="seconds between checkpoints of a long run, 0: none")
    group = parser.add_argument_group("output")
    group.add_argument("--record", default="", help="JSON record; by default under $DDIR/logs/logreg, named by the "
                                                    "arguments")
    group.add_argument("--storemodel", default="", metavar="FILE",
                       help=".npz with weight float32 (C, d), bias float32 (C), classes int64 (C): class numbers from "
                            "0; with several points the name gets _lr.._wd.. before its extension")
    group.add_argument("--storeL", default="", metavar="FILE",
                       help=".npy with the final scores (logits) float32 (test images, C): rows in the order of "
                            "val.hdf5 without classes outside the split, columns in increasing class number; "
                            "named as --storemodel with several points")
    group.add_argument("--verbose", action="store_true", help="also the mean training loss since the last report")
    args = parser.parse_args()
    if args.evalevery is None:
        args.evalevery = 500 if args.mode == "val" else 0
    return args


def default_record(ddir, args):
    lr, wd = (",".join(f"{v:g}" for v in values) for values in (args.lr, args.wd))
    return ddir.log("logreg", f"{args.mode}_nl{args.nlabeled}_seed{args.seed}_bs{args.batchsize}_lr{lr}_wd{wd}"
                              f"_mi{args.maxiter}.json")


def choose_device(name):
    import torch
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: this torch sees no GPU")
    return "cuda" if name != "cpu" and torch.cuda.is_available() else "cpu"


def read_rows(file, rows, what):
    with Progress(len(rows), what) as progress:
        return file.read(rows, progress=progress.update)


def train(classifiers, sampler, X, args, report, checkpoint, first):
    """Iterations first..maxiter-1; `report(iteration, losses)` where due, checkpoints in between."""
    import torch
    losses, last_saved = [], time.time()
    with Progress(args.maxiter, "iterations", start=first) as progress:
        for t in range(first, args.maxiter):
            images, classes = (torch.from_numpy(v).to(X.device) for v in sampler.batch(t))
            loss = classifiers.step(X.index_select(0, images), classes, args.verbose)
            if args.verbose:
                losses.append(loss)
            done = t + 1
            if done == args.maxiter or (args.evalevery and done % args.evalevery == 0):
                report(done, torch.stack(losses).mean(0).tolist() if losses else None)
                losses = []
            if args.checkpoint and done < args.maxiter and time.time() - last_saved > args.checkpoint:
                checkpoint(done)
                last_saved = time.time()
            progress.update(done)


def main():
    args = parse_arguments()
    ddir = DataDir()
    record = provenance(args)
    args.record = args.record or default_record(ddir, args)
    split = load_split(ddir.label_idx(), args.mode)
    C = len(split.classes)
    points = [(lr, wd) for lr in args.lr for wd in args.wd]

    with FeatureFile(ddir.train) as train_file, FeatureFile(ddir.val) as val_file:
        if train_file.d != val_file.d:
            raise ValueError(f"{ddir.train} has {train_file.d} columns and {ddir.val} {val_file.d}: "
                             "both must come from the same network")
        d = train_file.d
        rows, labels, nbase = labelled_images(train_file.labels(), split, args.nlabeled, args.seed)
        test_rows, test_labels = test_images(val_file.labels(), split)

        import torch
        torch.set_grad_enabled(False)
        device = choose_device(args.device)
        predicted = predict_memory(peak_memory(), len(rows), len(test_rows), d, C, len(points), args.batchsize,
                                   device != "cpu")
        print_header(args, device=device, threads=torch.get_num_threads(), predicted_memory=size(predicted))
        if predicted - peak_memory() > available_memory():
            log(f"warning: {size(predicted)} needed, {size(available_memory())} available")
        log(f"{C} classes ({len(split.novel)} novel), {len(rows)} labelled images ({nbase} of base classes), "
            f"{len(test_rows)} test images, {d} columns, {len(points)} (lr, wd) points")
        X = torch.from_numpy(read_rows(train_file, rows, "labelled images")).to(device)            # (n, d)
        Xtest = torch.from_numpy(read_rows(val_file, test_rows, "test images"))                    # (nt, d)

    classifiers = LinearClassifiers(points, C, d, args.mom, device)
    sampler = Sampler(labels, args.batchsize, args.seed)
    runs = [{"lr": lr, "wd": wd, "results": []} for lr, wd in points]
    state = Checkpoint(args.record, {
        "arguments": {k: v for k, v in vars(args).items() if k not in ("device", "checkpoint", "storemodel", "storeL")},
        "ddir": os.path.abspath(ddir.root), "sizes": [len(rows), len(test_rows), d, C],
        "files": [os.stat(path).st_mtime_ns for path in (ddir.train, ddir.val, ddir.label_idx())]})
    first, t0 = 0, time.time()
    saved = state.load(classifiers)
    if saved:
        first, runs, t0 = saved["iteration"], saved["runs"], t0 - saved["seconds"]
        log(f"going on from iteration {first} of an interrupted run")

    def report(iteration, losses):
        with contextlib.ExitStack() as outputs:
            scores = None
            if args.storeL and iteration == args.maxiter:
                scores = [outputs.enter_context(score_file(point_file(args.storeL, points, g), len(test_rows), C))
                          for g in range(len(points))]
            figures = evaluate(classifiers, Xtest, test_labels, split.is_novel, scores)
        seconds = time.time() - t0
        for g, ((lr, wd), (top5, novel)) in enumerate(zip(points, figures)):
            prefix = f"lr {lr:g} wd {wd:g} " if len(points) > 1 else ""
            loss = f" loss {losses[g]:.4f}" if losses else ""
            log(f"{prefix}[{seconds:.3f}s] iteration {iteration} top-5 accuracy: {top5:.3f} ({novel:.3f} on novel)"
                + loss)
            runs[g]["results"].append({"iteration": iteration, "top5": top5, "top5_novel": novel, "seconds": seconds})

    train(classifiers, sampler, X, args, report,
          lambda done: state.save(classifiers, iteration=done, runs=runs, seconds=time.time() - t0), first)
    for g in range(len(points) if args.storemodel else 0):
        weight, bias = classifiers.weights(g)
        with whole(point_file(args.storemodel, points, g)) as temporary, open(temporary, "wb") as f:
            np.savez(f, weight=weight, bias=bias, classes=split.classes)

    write_json(args.record, {
        **record, "runs": runs, "nclass": C, "nlabelled_images": len(rows), "ntest": len(test_rows),
        "device": device, "threads": torch.get_num_threads(), "seconds": time.time() - t0,
        "predicted_memory": predicted, "peak_memory": peak_memory(), "complete": True})
    state.remove()
    log(f"record {args.record}, peak memory {size(peak_memory())} ({size(predicted)} predicted)")


if __name__ == "__main__":
    run(main)
