"""Stage 5: diffuse the labels of a few images along the graph, and classify the test images (paper, section 3).

Reads   $DDIR/features/{train,val}.hdf5           network features of labelled and test images
        $DDIR/features/f100m/PCAR256.vt           the PCA, and the background's vectors after it:
        $DDIR/features/f100m/concatenated_PCAR256.raw
        $DDIR/knngraph/ndis{nbg}_k32_*            the background's graph (build_graph.py), and ndis{nbg}.index, its cells
        $DDIR/label_idx.json                      the class split
Writes  $DDIR/logs/diffusion/*.json               one record: arguments, accuracy per iteration, times, memory
        $DDIR/knngraph/completed_*                the part of the graph that further runs share

The labelled images join the background in one graph of k nearest neighbours, W0. It is symmetrised, W = W0 + W0^T,
and each row divided by its sum. L (nodes x classes) has a one where an image is labelled; each iteration is
L <- W L, then every column is divided by its sum. A test image's score for a class is the sum of L over its k
nearest nodes. Printed per iteration: nnz, the mean number of classes with a non-zero score per test image, and top-5
accuracy over all test images and over those of the novel classes. "iter 2/20" is the third iteration of 20: what
--niter 3 ends with.

    python diffusion.py --mode test --nlabeled 2 --seed 1 --nbg 1000000 --k 30 --niter 3
    python diffusion.py --mode val --nlabeled 5 --seed 1 --nbg 0 --k 30 --niter 40

A run that was killed goes on, when the same command is given again, from the graph that further runs share, if it came that
far, and from the classes that it had diffused half a minute before, unless it stores L or examples.
"""
import contextlib
import functools
import os
import tempfile
import time

import lowshot  # noqa: F401     before numpy: it names the number of threads
import numpy as np

from lowshot.evaluate import accuracies, note_of_unreadable, notes_of_classes
from lowshot.features import FeatureFile, read_into
from lowshot.files import check_outputs, exclusive, file_identities, reserve, whole, write_json
from lowshot.layout import DataDir
from lowshot.machine import peak_memory, release_memory, spendable_memory, wait_briefly
from lowshot.run_state import RunState
from lowshot.script import (Parser, Progress, file_name, log, number, print_header, provenance, run, silent, size, warn_of_memory,
                            within_memory)
from lowshot.split import images_of_run, load_split

wait_briefly()

STATE_EVERY = 30        # seconds of diffusion after which what it found is kept
AROUND = 1 << 16        # bytes of a file that Linux maps around a place that is looked at


def arguments():
    p = Parser(__doc__)
    g = p.add_argument_group("which images are labelled")
    g.add_argument("--mode", choices=("val", "test"), default="val", help="class split: validation or test")
    g.add_argument("--nlabeled", type=number(int, 1), default=2, help="labelled images per novel class")
    g.add_argument("--seed", type=number(int, 0, 2 ** 32 - 1), default=1, help="seed of their choice")
    g = p.add_argument_group("graph")
    g.add_argument("--nbg", type=number(int, 0), default=1000000,
                   help="background images; build_graph.py has to have made their graph. 0: none")
    g.add_argument("--k", type=number(int, 1), default=30, help="neighbours per node and per test image")
    g.add_argument("--dim", type=number(int, 1), default=256, help="dimensions that the PCA leaves")
    g.add_argument("--nocache", action="store_true",
                   help="compute the whole graph here, and keep nothing of it in $DDIR/knngraph for further runs")
    g = p.add_argument_group("diffusion")
    g.add_argument("--niter", type=number(int, 0), default=3, help="iterations")
    g.add_argument("--lslice", type=slice_width, default="auto", metavar="COLUMNS",
                   help="classes diffused at a time, rounded up to a multiple of 16, at most 64, with triton 128; 0: that many. "
                        "Memory is 8 bytes x nodes x this; the results do not depend on it, up to rounding. auto: what is "
                        "quickest, 32 with the library's kernel for CPUs, or as many as the free memory allows")
    g.add_argument("--noprune", action="store_true",
                   help="compute all rows of L in every iteration, also those that no label has reached or that no test "
                        "image reads; the results are the same, up to rounding")
    g.add_argument("--backend", choices=("auto", "own", "triton", "mkl", "torch"), default="auto",
                   help="who multiplies: own and triton are the library's kernels for CPUs and GPUs, mkl and torch general "
                        "sparse products; auto: triton on a GPU if one holds the graph, else own. The completion goes by it")
    g.add_argument("--device", default="auto", help="auto, cpu or cuda: where the graph is completed, and where L and "
                                                    "the graph are during the diffusion")
    g = p.add_argument_group("outputs")
    g.add_argument("--record", type=file_name, metavar="FILE",
                   help="the JSON record (default: a name made of the arguments, in $DDIR/logs/diffusion)")
    g.add_argument("--storeLname", type=file_name, metavar="PREFIX",
                   help="store L as PREFIX_iter{i}.npy, float32 (nodes, classes): the labelled images first, base "
                        "classes before novel ones, then the background; each column divided by its sum after the "
                        "first iteration. Takes twice its size of disk while it is written")
    g.add_argument("--storeLiters", metavar="I,J,...", type=iteration_list,
                   help="numbers of iterations after which L is stored (default: the last)")
    g.add_argument("--storeexamples", type=file_name, metavar="FILE.npz",
                   help="store the test images' final scores and the neighbours that gave them")
    return p.parse_args()


def slice_width(text):
    return text if text == "auto" else number(int, 0)(text)


def iteration_list(text):
    return [number(int, 0)(i) for i in text.split(",")]


class Steps:
    """Logs time and memory of every step, and keeps them for the record."""

    def __init__(self):
        self.t0 = self.last = time.monotonic()
        self.records = []

    def done(self, what):
        release_memory()
        now = time.monotonic()
        self.records.append({"step": what, "seconds": now - self.last, "peak_memory": peak_memory()})
        log(f"[{now - self.t0:.3f}s] {what}: {now - self.last:.2f}s, peak memory so far {size(peak_memory())}")
        self.last = now

    def add_interrupted(self, seconds):
        """Of a run that this one goes on from."""
        self.t0 -= seconds
        self.records.append({"step": "a run that was interrupted", "seconds": seconds, "peak_memory": peak_memory()})


def widest_panel(lslice, n, quickest, free=None):
    """Columns of L diffused at a time, a multiple of 16, at most 64, or 128 with triton: what --lslice says, or the width that
    the backend is quickest with, or what two panels in `free` bytes leave room for."""
    if lslice != "auto":
        most = max(64, quickest)
        return most if lslice <= 0 else min(most, -(-lslice // 16) * 16)
    if free is None:
        return quickest
    if free < 2 * 4 * n * 16:
        raise MemoryError(f"two panels of 16 columns of L for {n} nodes take {size(2 * 4 * n * 16)}, {size(free)} are "
                          "free: take a smaller --nbg")
    return int(min(quickest, free // (2 * 4 * n * 16) * 16))


def panels(is_novel, width):
    """Cut the classes in panels, base and novel ones apart: labels of novel classes are few, and reach few nodes."""
    return [part[i:i + width] for part in (np.flatnonzero(~is_novel), np.flatnonzero(is_novel))
            for i in range(0, len(part), width)]


def predict_memory(n, nt, nbase, nnovel, k, dim, stored, width, Backend, device, niter, least=False, examples=0):
    """Peak memory of this process in bytes: the largest of its steps.

    The completion maps the background's file, whose pages count as well, although the system may drop them; so do those that
    an exact search for novel images looks up. `least`: what it cannot do without, with candidates, similarities and entries of W
    in files. examples: bytes of the scores and contributions that are kept for --storeexamples.
    """
    from graph_utils.neighbours import words_of_bytes
    from lowshot import exact_search, knn, sampling
    from lowshot.backends import ENTRIES
    from lowshot.cells import BLOCK
    from lowshot.gpu_search import GPU_LIBRARIES
    nbg = n - nbase - nnovel
    vectors, blocks = 4 * dim * (nbase + nt), min(n, BLOCK) * (6 * dim + 8 * (k + exact_search.spare_of(k)))
    edges = ENTRIES * k * n
    in_memory = 0 if least else 4 * edges       # entries of W, besides what the backend adds to them
    mapped = 0 if least else 4 * dim * nbg
    exact = exact_search.compares_all(2 * nbase + nt, n - nnovel, dim, device)
    # I and D: in memory where they are made exact, else D may be in a file; both are where they are stored
    lists = 8 * k * nt + (8 if exact or not least else 4) * k * n * (not (least and stored))
    looked_up = min(mapped, 2 * k * nnovel * AROUND)        # their neighbours, and nodes that have them as neighbours
    changed = 24 * k * min(n // 2, k * nnovel)      # lists, before and after, and as they are collected
    steps = {"add novel images": vectors + blocks + lists + changed + (looked_up if exact else 0),
             # the graph without the novel images, in memory where it was made just now, and with them
             "symmetrise": (in_memory if stored else 4 * edges) + in_memory + (Backend.entry_bytes - 4) * edges + 40 * n
             + 400 * k * nnovel,
             "diffuse": memory_of_diffusion(n, nt, edges, width, Backend, niter, least) + examples}
    if not stored:
        listed = sampling.usual_list(k, dim)
        steps["add novel images"] += 4 * edges + 24 * n
        steps["symmetrise"] += vectors + lists
        # base images among themselves; and with the background: in bytes, candidates, lists
        steps["complete"] = vectors + lists + max(
            exact_search.memory_of_self(nbase, dim, k),
            blocks + mapped + 4 * nbase * words_of_bytes(dim) + 8 * nbase * (2 * k + exact_search.INSERTED_SPARE))
        if not exact:
            # candidates, mostly without rounds; then similarities
            steps["complete"] = vectors + lists + max(knn.memory_of_graph(n, k, dim, in_file=least, rounds=False),
                                                      mapped + 4 * listed * n + 24 * n + knn.WORKING)
    return int((GPU_LIBRARIES if Backend.device != "cpu" else Backend.libraries) + max(steps.values()))


def memory_of_diffusion(n, nt, entries, width, Backend, niter, in_file=False):
    """Bytes of W of so many entries, two panels of L of that width, and scores. in_file: with the entries in a file."""
    panels = 2 * 4 * width * n if Backend.device == "cpu" else 0
    return (Backend.entry_bytes - 4 * in_file) * entries + panels + 24 * n + nt * (44 * (niter + 1) + 4 * width)


def diffuse(W, seeds, columns, L, out, niter, test_nodes, mass, report, prune=True):
    """Diffuse one panel of L from labelled nodes, and report(i, L, scale) after i = 0 .. niter iterations.

    W: graph of n nodes (lowshot/backends.py). seeds: nodes with a label; columns: the panel's column of each. L, out:
    two panels, float32 (n, ncol), whose content is lost. test_nodes: int32, the nodes whose rows are needed at the end,
    increasing, or None for all. mass: W.mass().

    The true L is report's L times scale, as its columns are not divided by their sums: column scaling commutes with
    W, so it is done along with the next product. Rows that no label has reached yet, and in the last iteration rows
    that nobody reads, are not computed, unless prune is False.
    """
    W.seed(out, seeds[:0], columns[:0])
    W.seed(L, seeds, columns)
    scale = np.ones(L.shape[1], np.float32)
    report(0, L, scale)
    # mass @ L foretells the column sums of the next L, so that the last iteration may leave rows out
    ahead = np.bincount(columns, mass[seeds].astype(np.float64), L.shape[1])
    reached = np.zeros(W.n, np.uint8)
    active = front = np.unique(seeds).astype(np.int32)
    reached[active] = 1
    if not prune:
        test_nodes = None
    if not prune or not W.follows:
        active = None
    for i in range(1, niter + 1):
        if active is not None:
            most = W.n // 2 - len(active)
            front = W.reach(front, reached, most) if len(front) * (W.nnz / W.n) < most else None
            active = None if front is None else np.sort(np.concatenate([active, front]))
        colsum = ahead * scale
        if i < niter:
            ahead = W.product(L, out, scale, active, mass)
        else:
            rows = active if test_nodes is None else test_nodes
            if active is not None and test_nodes is not None:
                rows = np.intersect1d(active, test_nodes, assume_unique=True)
            W.product(L, out, scale, rows)
        scale = (1 / np.where(colsum > 0, colsum, 1)).astype(np.float32)
        L, out = out, L
        report(i, L, scale)


class StoredL:
    """L after one iteration, a float32 .npy file (nodes, classes).

    Panels are written one after the other to a file without a name, and from there side by side: in their places at once, each
    page of a file larger than the memory would be read and written for every panel.
    """

    ROWS = 1 << 13      # at a time

    def __init__(self, path, shape, stack):
        self.shape, self.classes = shape, []
        stack.enter_context(exclusive(path))
        temporary = stack.enter_context(whole(path))
        self.file = stack.enter_context(open(temporary, "wb"))
        self.panels = stack.enter_context(tempfile.TemporaryFile(dir=os.path.dirname(temporary)))
        np.lib.format.write_array_header_1_0(self.file, {"descr": "<f4", "fortran_order": False, "shape": shape})
        for f in (self.file, self.panels):
            reserve(f.fileno(), f.tell() + 4 * shape[0] * shape[1], path)

    def write(self, classes, rows, W, L, scale):
        self.classes.append(classes)
        for i in range(0, len(rows), self.ROWS):
            self.panels.write(np.ascontiguousarray(W.read(L, rows[i:i + self.ROWS], scale)[:, :len(classes)], "<f4"))

    def finish(self):
        n, C = self.shape
        self.panels.flush()
        with Progress(n, "rows of L written") as progress:
            for i in range(0, n, self.ROWS):
                rows, start = np.empty((min(self.ROWS, n - i), C), "<f4"), 0
                for classes in self.classes:
                    panel = np.empty((len(rows), len(classes)), "<f4")
                    read_into(self.panels.fileno(), panel, 4 * (start + i * len(classes)), "the file of panels of L")
                    rows[:, classes] = panel
                    start += n * len(classes)
                self.file.write(rows)
                progress.update(i + len(rows))


def stored_iterations(args):
    if args.storeLiters and not args.storeLname:
        raise ValueError("--storeLiters says when L is stored, --storeLname has to say where")
    iterations = (args.storeLiters or [args.niter]) if args.storeLname else []
    if iterations and max(iterations) > args.niter:
        raise ValueError(f"--storeLiters asks for iteration {max(iterations)}, --niter is {args.niter}")
    return sorted(set(iterations))


class Examples:
    """Scores of the test images after the last iteration, and what each neighbour gave to the best class."""

    def __init__(self, nt, C, k):
        self.scores = np.zeros((nt, C), np.float32)
        self.contribution = np.zeros((nt, k), np.float32)

    def update(self, scores, classes, top, W, L, scale, test_I):
        """Take a panel's scores; top: each test image's best class so far."""
        self.scores[:, classes] = scores[:, :len(classes)]
        for column, c in enumerate(classes):
            of_class = np.flatnonzero(top == c)
            I = test_I[of_class]
            given = W.read(L, np.maximum(I, 0).ravel(), scale)[:, column].reshape(I.shape)
            self.contribution[of_class] = np.where(I < 0, 0, given)

    def store(self, path, **arrays):
        with exclusive(path, wait=silent), whole(path) as temporary, open(temporary, "wb") as f:
            np.savez(f, scores=self.scores, contribution=self.contribution, **arrays)


def check_saved(rest):
    """Some exception where a state cannot be that of a diffusion."""
    if not 0 <= rest["seconds"] < 1e9:
        raise ValueError("it is not of this run")


def main():
    args = arguments()
    with contextlib.ExitStack() as locks:
        experiment(args, locks)


def experiment(args, locks):
    """Complete the graph, diffuse the labels, and write the record of it. locks: ExitStack for those that are held to the end."""
    ddir = DataDir()
    name = f"{args.mode}_nl{args.nlabeled}_seed{args.seed}_nbg{args.nbg}_k{args.k}_ni{args.niter}"
    record_path = args.record or ddir.log("diffusion", name + ("" if args.dim == 256 else f"_d{args.dim}") + ".json")
    store_at = stored_iterations(args)
    record, steps = provenance(args), Steps()
    # after the arguments: these load faiss and the compiled library
    from graph_utils import BestClasses, aligned_zeros
    from lowshot.backends import choose_backend
    from lowshot.completion import FixedKey, add_novel, fixed_vectors, read_features
    from lowshot.file_arrays import allocator
    from lowshot.gpu_search import search_device
    free = spendable_memory()

    # ---- which images are labelled, and which are classified
    identities = file_identities([ddir.label_idx(), ddir.train, ddir.val])
    split = load_split(ddir.label_idx(), args.mode)
    with FeatureFile(ddir.train) as train_file, FeatureFile(ddir.val) as val_file:
        rows, labels, nbase, test_rows, test_labels, unreadable = images_of_run(train_file, val_file, split, args.nlabeled,
                                                                                args.seed)
    record["unreadable"] = unreadable
    nl, nt, C, n = len(rows), len(test_rows), len(split.classes), len(rows) + args.nbg
    k = args.k if args.nbg else min(args.k, n)      # more than there are nodes are the same
    key = FixedKey(ddir, args.mode, args.nbg, k, args.dim, rows[:nbase], test_rows)
    check_outputs(record_path, args.storeexamples, *(f"{args.storeLname}_iter{i}.npy" for i in store_at),
                  inputs=[ddir.label_idx(), *key.sources])
    if identities != file_identities([ddir.label_idx()]) + key.made_from["files"][:2]:
        raise ValueError(f"{ddir.train}, {ddir.val} or {ddir.label_idx()} was replaced while it was read: run this again")
    record["files"] = key.made_from["files"] + identities[:1]
    fixed = None if args.nocache else key.stored()
    Backend = choose_backend(args.backend, args.device, n, k)
    device = search_device(Backend.device)
    memory = functools.partial(predict_memory, n, nt, nbase, nl - nbase, k, args.dim, fixed is not None, Backend=Backend,
                               device=device, niter=args.niter, examples=4 * nt * (C + k) if args.storeexamples else 0)
    width = widest_panel(args.lslice, n, Backend.panel)
    least = memory(width=16 if args.lslice == "auto" else width, least=True)
    predicted = within_memory(memory(width=width), least)
    print_header(args, predicted_memory=size(predicted))
    warn_of_memory(least)
    log(f"{nl} labelled images ({nbase} of base classes), {args.nbg} background images, {nt} test images, {C} classes"
        f"{ddir.of_label_idx()} ({len(split.novel)} novel)")
    if args.k > n:
        log(f"note: --k is {args.k}, there are {n} nodes: all of them are neighbours")
    record["notes"] = list(notes_of_classes(test_labels, split))
    for note in note_of_unreadable(*unreadable) + record["notes"]:
        log(note)

    # ---- the graph over all images; nodes are numbered background, base, novel
    if fixed:
        log(f"graph of background and base images: from {key.folder}")
    else:
        fixed = key.make(device) if args.nocache else key.stored_or_made(device)
        steps.done("graph of background and base images")
    novel = read_features(ddir.train, rows[nbase:], ddir.pca(args.dim), "novel images read")
    changes = add_novel(fixed, fixed_vectors(ddir, args.nbg, args.dim, fixed.load("base"), scale=fixed.load("scale"),
                                             device=device), novel)
    steps.done("novel images added to the graph")
    rank = changes.rank         # node i is row rank[i] of W
    with fixed.errors_name_folder():
        graph = fixed.graph()
        # to read entries for each product takes long: that is for where nothing else is left, all that is held now given up
        needed = memory_of_diffusion(n, nt, len(graph[1]), 16, Backend, args.niter)
        empty = aligned_zeros if needed <= free else allocator(needed, ddir.path("knngraph"))
        if changes.are_few() or empty is not aligned_zeros:
            W = Backend.changed(graph, n, *changes.of_entries(), empty=empty)
        else:
            W = Backend(changes.of_neighbours(fixed.mapped("I")), rank)
        test_I = np.where(changes.test_I < 0, -1, rank[changes.test_I])
    key.check_unchanged(fixed)
    test_nodes = np.unique(test_I[test_I >= 0]).astype(np.int32)
    seeds = rank[args.nbg:]
    # L as stored has the labelled images first
    stored_order = np.concatenate([rank[args.nbg:], rank[:args.nbg]])
    del fixed, graph, changes, novel
    mass = W.mass()
    steps.done("W = W0 + W0^T")
    record.update(nodes=n, nlabelled_images=nl, ntest=nt, nclass=C, entries=W.nnz, test_nodes=len(test_nodes))

    # ---- L <- W L, a panel of classes at a time
    # beside entries in a file narrow panels are the quicker ones: what they leave of the memory keeps parts of it
    width = widest_panel(args.lslice, n, W.panel if empty is aligned_zeros else 16, W.free_memory())
    pieces = panels(split.is_novel, width)
    L, out = W.zeros(width), W.zeros(width)
    best = [BestClasses(test_labels) for _ in range(args.niter + 1)]
    examples = Examples(nt, C, k) if args.storeexamples else None
    locks.enter_context(exclusive(record_path))         # with it goes the state
    not_in_figures = ("record", "nocache", "lslice", "noprune")
    state = RunState(record_path, {"arguments": {a: v for a, v in record["arguments"].items() if a not in not_in_figures},
                                   "graph": key.made_from, "files": record["files"]})
    done = np.zeros(C, bool)        # classes
    found = {"done": done, **{f"{name}{i}": getattr(b, name) for i, b in enumerate(best) for name in ("best", "classes", "nnz")}}
    resumable = not store_at and not examples
    saved = state.load(found, check_saved) if resumable else None
    if saved:
        arrays, saved = saved
        for name, a in found.items():
            a[...] = arrays.pop(name)
        steps.add_interrupted(saved["seconds"])
        log(f"going on after {done.sum()} of {C} classes of an interrupted run")
        pieces = [left for left in (classes[~done[classes]] for classes in pieces) if len(left)]
    last_saved = time.monotonic()
    scores = np.empty((nt, width), np.float32)
    with contextlib.ExitStack() as stack:
        stored = {i: StoredL(f"{args.storeLname}_iter{i}.npy", (n, C), stack) for i in store_at}
        with Progress(len(pieces) * (args.niter + 1), "iterations of panels") as progress:
            for classes in pieces:
                column = np.full(C, -1)
                column[classes] = np.arange(len(classes))
                mine = column[labels] >= 0
                ncol = -(-len(classes) // 16) * 16
                panel, other, s = (a.reshape(-1)[:len(a) * ncol].reshape(-1, ncol) for a in (L, out, scores))

                def report(i, L, scale):
                    W.neighbour_sums(test_I, L, scale, s)
                    best[i].update(s[:, :len(classes)], classes)
                    if i in stored:
                        stored[i].write(classes, stored_order, W, L, scale)
                    if examples and i == args.niter:
                        examples.update(s, classes, best[i].classes[:, 0], W, L, scale, test_I)
                    progress.advance()

                diffuse(W, seeds[mine], column[labels[mine]], panel, other, args.niter,
                        None if args.niter in store_at else test_nodes, mass, report, not args.noprune)
                done[classes] = True
                if resumable and time.monotonic() - last_saved > STATE_EVERY:
                    state.save(found, seconds=time.monotonic() - steps.t0)
                    last_saved = time.monotonic()
        for one in stored.values():
            one.finish()
    steps.done(f"diffusion, {args.niter} iterations")

    # ---- accuracy
    record["results"] = []
    for i, b in enumerate(best):
        top5, top5_novel = accuracies(b.right(), test_labels, split.is_novel)
        nnz = float(b.nnz.mean())
        log(f"{'initial state' if i == 0 else f'iter {i - 1}/{args.niter}'} nnz {nnz:.2f} "
            f"top-5 accuracy: {top5:.3f} ({top5_novel:.3f} on novel)")
        record["results"].append({"iteration": i, "nnz": nnz, "top5": top5, "top5_novel": top5_novel})
    if examples:
        node = np.empty(n, np.int32)
        node[stored_order] = np.arange(n, dtype=np.int32)
        examples.store(args.storeexamples, rows=test_rows, labels=test_labels, classes=split.classes,
                       neighbours=np.where(test_I < 0, -1, node[test_I]), nlabelled=nl, labelled_rows=rows)
    record.update(steps=steps.records, seconds=time.monotonic() - steps.t0, predicted_memory=predicted,
                  peak_memory=peak_memory(), complete=True)
    write_json(record_path, record)
    state.remove()
    log(f"[{record['seconds']:.3f}s] done, wrote {record_path}, peak memory {size(peak_memory())} ({size(predicted)} predicted)")


if __name__ == "__main__":
    run(main)
