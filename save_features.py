"""Stage 1: compute the features of a set of images, or of a block of it, with a network.

reads   the images that the YAML configuration describes, and the network's checkpoint
writes  OUTFILE, HDF5: all_feats float32 (n, d), all_labels int32 (n), count int32 (1), readable bool (n).
        Row r is image i0 + r. d is 2048 for ResNet50, 512 for ResNet10. Where classes have names (folders of images, CIFAR),
        also class_names, strings: row c is that of label c.

Images that are missing or damaged get the features of a black image, are False in `readable`, and are counted at the
end; a zip file that is truncated is an error before the work. A run that is cut off goes on where it was saved last, 20
seconds before or less, when the same command is given again; OUTFILE appears when complete.

The background in blocks of a million images, then the labelled images:

  python save_features.py --cfg f100m_save_data.yaml --model ResNet50 --modelfile "$DDIR/models/checkpoints/ResNet50/89.tar" \\
         --i0 0 --i1 1000000 --outfile "$DDIR/features/f100m/block0.hdf5"
  python save_features.py --cfg imagenet_train_save_data.yaml --model ResNet50 \\
         --modelfile "$DDIR/models/checkpoints/ResNet50/89.tar" --outfile "$DDIR/features/train.hdf5"
"""
import collections
import concurrent.futures
import contextlib
import gc
import itertools
import math
import mmap
import os
import signal
import threading
import time

import lowshot  # noqa: F401     before numpy: it names the number of threads
import numpy as np

from lowshot.files import check_outputs, file_sha256
from lowshot.machine import MOST_WORKERS, peak_memory, thread_count, torch_device
from lowshot.script import Parser, Progress, clock, file_name, log, number, print_header, run, size

PIXELS_ON_CPU = 1 << 18     # at a time, at the most: more leave the caches, with less workers wait for each other
IMAGES_ON_CPU = 256         # the same, as files may be large where what is kept of them is small
AHEAD = 2               # batches that each loading process is ahead
CLASSES_TOLD = 20       # names of classes that are printed; of more, the first two and the last one
UNREADABLE_TOLD = 10    # unreadable images that are named, at most
DECODED = 8 << 20       # bytes that a worker takes to decode an image of usual size


def main():
    args = arguments()
    import torch
    from lowshot.feature_writer import FeatureWriter, first_difference, made_from
    from lowshot.imagesets import Batches, Preprocess, load_config, open_set
    from lowshot.networks import NETWORKS, for_inference, load_checkpoint, make_network, usual_transforms

    config = load_config(args.cfg)
    check_outputs(args.outfile, inputs=[args.modelfile])
    loader, transforms = config["loader"], config["transforms"]
    device = torch_device(args.device)
    # on a CPU threads; with a GPU processes, which leave a CPU to this one
    workers = args.workers or loader["workers"] or max(1, thread_count() - (device != "cpu"))

    network = make_network(args.model, pretrained=not args.modelfile)
    if args.modelfile:
        load_checkpoint(network, args.modelfile)
    only = getattr(network, "image_size", transforms["crop"])          # vision transformers take one size
    if only != transforms["crop"]:
        raise ValueError(f"{args.model} takes images of {only}x{only} only, {args.cfg} has crop: {transforms['crop']}: it needs "
                         f"crop: {only}, and resize: null or at least as much")

    images = open_set(config)
    i0, i1 = block(args, len(images))
    images.check(i0, i1)
    n, d = i1 - i0, network.feature_dim
    # what the features depend on; not where it is stored
    origin = {"model": args.model, "modelfile_sha256": args.modelfile and file_sha256(args.modelfile), "i0": i0, "i1": i1,
              "kind": config["dataset"]["kind"], **images.identity(i0, i1), "transforms": transforms}

    if os.path.exists(args.outfile):
        differs = first_difference(made_from(args.outfile), origin)
        if differs is None:
            log(f"{args.outfile} is complete, nothing to do")
            return
        if not args.overwrite:
            raise ValueError(f"{args.outfile} exists, made from {differs}, or it is damaged: --overwrite replaces it")

    if device == "cpu":
        # each worker has batches of its own, and as many as the others
        most = min(max(1, PIXELS_ON_CPU // transforms["crop"] ** 2), IMAGES_ON_CPU)
        rounds = -(-n // (workers * most))
        quickest = -(-n // (workers * rounds))
    else:
        quickest = loader["batchsize"]
    batchsize = min(args.batchsize or quickest, n)
    shape = (batchsize, transforms["crop"], transforms["crop"], 3)
    print_header(args, device=device, workers=workers, images=f"{i0}..{i1 - 1}", output=size(n * (4 * d + 5)))

    if args.model not in NETWORKS:
        note_transforms(args, transforms, usual_transforms(args.model, pretrained=not args.modelfile))
    if args.modelfile and getattr(network, "transform_input", False):
        log(f"note: {args.model} normalises images in another way (transform_input), as with torchvision's weights")

    # on a CPU each worker thread runs the network by itself; and where processes decode on all cores, threads that share a copy
    # to the GPU would wait for the last of them
    torch.set_num_threads(1)
    with FeatureWriter(args.outfile, n, d, images.labels(i0, i1), origin, args.overwrite, class_names=images.class_names) as out:
        if out.done:
            log(f"going on at image {i0 + out.done}: {out.done} of {n} were done")
        todo = n - out.done
        with torch.inference_mode():
            extract = for_inference(network, transforms["mean"], transforms["std"], shape, device)
            batches = Batches(images, Preprocess(config), i0 + out.done, i1, batchsize)
            results = by_threads if device == "cpu" else by_processes

            def fed_from_memory():
                return from_memory_speed(by_threads if device == "cpu" else from_memory, extract, workers, shape)

            black = extract(torch.zeros(shape, dtype=torch.uint8))()[0].copy()
            # before and after, as machines do not go at one speed all the time
            memory = [fed_from_memory()] if todo else []
            # the network has worked on as many batches at a time as it will; images are decoded besides
            predicted = peak_memory() + workers * DECODED + (
                0 if device == "cpu" else slots(workers, batches) * int(np.prod(shape)))
            log(f"predicted memory {size(predicted)}")
            gc.freeze()         # what the libraries made is not looked at again and again while images come and go
            start = time.monotonic()
            with contextlib.closing(results(batches, extract, workers)) as stream:
                save_all(stream, black, out, i0)
            seconds = time.monotonic() - start
            report_unreadable(out, i0, images)
            out.finish()
            if todo:
                report_speed(todo, seconds, [*memory, fed_from_memory()])
    if images.class_names:
        tell_classes(images.class_names, images.labels(0, len(images)))
    log(f"wrote {args.outfile}: {n} x {d} in {clock(seconds)}, peak memory "
        f"{size(peak_memory())} ({size(predicted)} predicted)")


def arguments():
    parser = Parser(__doc__)
    group = parser.add_argument_group("input")
    group.add_argument("--cfg", required=True, help="YAML description of the images: a path, or the name of a file in "
                       "configs/")
    group.add_argument("--i0", type=number(int, 0), default=0, help="first image")
    group.add_argument("--i1", type=number(int, -1), default=-1, help="image after the last one; -1: all")
    group.add_argument("--model", default="ResNet50", help="ResNet10, 18, 34, 50 or 101, or the lower-case name of a "
                       "torchvision model")
    group.add_argument("--modelfile", type=file_name, help="checkpoint with the network's weights: what "
                       "torch.save() made of the state_dict() of a network of these tensor names, or of a dict that has it under "
                       "'state'; torchvision's models can do without, torchvision then downloads their weights")
    group = parser.add_argument_group("output")
    group.add_argument("--outfile", type=file_name, required=True, help="HDF5 file to write")
    group.add_argument("--overwrite", action="store_true", help="replace OUTFILE where it exists and was made with "
                       "other arguments or other images. One that was not is complete: images in files are told apart by "
                       "their names, labels and sizes in bytes, zips by their sizes, not by what is in them")
    group = parser.add_argument_group("machine")
    group.add_argument("--device", default="auto", help="cpu, cuda (all GPUs), cuda:0, ...; auto: all GPUs if there are "
                       "any")
    group.add_argument("--batchsize", type=number(int, 1), help="images at a time; on a CPU, of each worker "
                       "(default: on a CPU what its caches hold, on a GPU what the configuration says)")
    group.add_argument("--workers", type=number(int, 1, MOST_WORKERS), help="on a CPU, threads that decode and run the "
                       "network; with a GPU, processes that read and decode (default: of the configuration, or as many as "
                       "OMP_NUM_THREADS says or there are CPUs, but for one that feeds the GPU)")
    return parser.parse_args()


def block(args, length):
    """(i0, i1) within the set of images."""
    if args.i0 >= length:
        raise ValueError(f"--i0 is {args.i0}, but {args.cfg} has {length} images (0 to {length - 1})")
    i1 = length if args.i1 < 0 else min(args.i1, length)
    if i1 <= args.i0:
        raise ValueError(f"--i0 {args.i0} --i1 {args.i1} is no image: i1 is the image after the last one")
    if i1 < args.i1:
        log(f"--i1 is {args.i1}, {args.cfg} has {length} images: stopping there")
    return args.i0, i1


def note_transforms(args, transforms, usual):
    """Tell where the configuration's transforms are none of those that torchvision's weights were made for."""
    if transforms not in usual:
        nearest = min(usual, key=lambda u: sum(u[k] != transforms[k] for k in u))
        differing = [k for k in nearest if nearest[k] != transforms[k]]
        there, here = (", ".join(f"{k}: {'null' if t[k] is None else t[k]}" for k in differing) for t in (nearest, transforms))
        log(f"note: torchvision's weights of {args.model} were made for {there}; {args.cfg} has {here}")


def by_threads(batches, extract, workers):
    """Yield (features or None, state, faults) of all batches in order; each thread decodes and runs the network.

    On a CPU this is quicker than processes that decode beside a network on all CPUs: no core waits at the end of each
    layer for one that was busy decoding, and no pixels go from process to process. Other threads read ahead where the
    disk is waited for; where it is not, these would only be in the way.
    """
    import torch
    # threads that decode small images at the same time hold each other up (they share Python's lock), and would go on
    # doing so in step; let half of them decode while the others are in the network
    decoding = threading.Semaphore(max(1, workers // 2))
    start, waited = time.monotonic(), 0.0

    def read(b):
        nonlocal waited
        began, busy = time.monotonic(), time.thread_time()
        files = batches.read(b)
        waited += (time.monotonic() - began) - (time.thread_time() - busy)
        return files

    def work(b, reading):
        files = reading and reading.result()
        with decoding:
            batch = batches.decode(b, files or read(b))
        with torch.inference_mode():                # holds for one thread
            return features_of(batch, extract)

    ahead = 2 * workers
    with concurrent.futures.ThreadPoolExecutor(workers) as readers, \
            concurrent.futures.ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        try:
            running = collections.deque()
            for b in range(len(batches)):
                slow = waited > max(.1, .1 * (time.monotonic() - start))
                running.append(pool.submit(work, b, readers.submit(batches.read, b) if slow else None))
                if len(running) > ahead:
                    yield running.popleft().result()
            while running:
                yield running.popleft().result()
        finally:
            for threads in (readers, pool):
                threads.shutdown(wait=False, cancel_futures=True)


def slots(workers, batches):
    """Batches that are under way between processes at a time, and two that are looked at."""
    return min(AHEAD * workers + 2, len(batches))


def by_processes(batches, extract, workers):
    """The same for GPUs: processes read and decode, and this one feeds the network."""
    from torch.utils.data import DataLoader
    if not len(batches):        # all rows were written before
        return
    shared = InSharedMemory(batches, extract.shape, slots(workers, batches))
    loader = DataLoader(shared, batch_size=None, num_workers=workers, prefetch_factor=AHEAD, collate_fn=as_it_is,
                        worker_init_fn=be_quiet, multiprocessing_context="fork")
    stream = iter(loader)
    for b in range(len(batches)):
        try:
            m, state, faults = next(stream)
        except RuntimeError as e:
            raise OSError(f"{' '.join(str(e).split())[:300]} (a process killed for lack of memory? Run again to go on, "
                          "with fewer --workers)")
        except (OSError, MemoryError) as e:
            raise OSError(str(e).strip().splitlines()[-1])      # the last line of the process's traceback
        yield features_of((shared.pixels_of(b)[:m], state, faults), extract)


class InSharedMemory:
    """Batches whose pixels are left where all processes see them: through pipes they would be copied four times.

    Of `slots` batches at a time, in memory that forked processes inherit: it takes none of /dev/shm, which is small in
    containers.
    """

    def __init__(self, batches, shape, slots):
        from lowshot.imagesets import UNALIGNED, pixel_array
        self.batches = batches
        self.slots = pixel_array((slots, *shape), mmap.mmap(-1, slots * int(np.prod(shape)) + UNALIGNED))

    def __len__(self):
        return len(self.batches)

    def pixels_of(self, b):
        return self.slots[b % len(self.slots)]

    def __getitem__(self, b):
        pixels, state, faults = self.batches.decode(b, self.batches.read(b), self.pixels_of(b))
        return len(pixels), state, faults


def from_memory(batches, extract, workers):
    """The same without processes."""
    for b in range(len(batches)):
        yield features_of(batches.decode(b, batches.read(b)), extract)


def as_it_is(batch):
    return batch


def be_quiet(worker):
    signal.signal(signal.SIGINT, signal.SIG_IGN)                # the main process tells of Ctrl-C


def features_of(batch, extract):
    """Start the network on (pixels, state, faults): the first becomes a function that gives features (m, d)."""
    import torch
    pixels, state, faults = batch
    if state.all():
        return None, state, faults
    m, size_prepared = len(pixels), extract.shape[0]
    if m < size_prepared:
        pixels = np.concatenate([pixels, np.zeros((size_prepared - m, *pixels.shape[1:]), np.uint8)])
    try:
        wait = extract(torch.from_numpy(pixels))
    except RuntimeError as e:
        raise ValueError(f"the network failed on a batch of {size_prepared} images: {str(e).splitlines()[0]} (if memory "
                         "ran out: --batchsize)")
    return (lambda: wait()[:m]), state, faults


def save_all(stream, black, out, i0):
    """Write the features of all batches: a thread does, one batch behind the network. black: those of a black image, (d,)."""
    from lowshot.imagesets import DAMAGED, MISSING, READABLE

    def write(features, state, faults):
        x = np.empty((len(state), out.d), np.float32) if features is None else features().copy()
        x[state != READABLE] = black
        bad = ~np.isfinite(x).all(axis=1)
        if bad.any():
            raise ValueError(f"the features of image {i0 + out.done + np.argmax(bad)} are NaN or infinite: are the "
                             "network's weights damaged?")
        notes = {what: out.notes.get(what, 0) + int((state == code).sum())
                 for what, code in (("missing", MISSING), ("damaged", DAMAGED))}
        if faults and "fault" not in out.notes:
            notes["fault"] = faults[0]
        out.write(x, state == READABLE, notes)

    waiting = written = None
    with Progress(out.n, "images", out.done) as progress, concurrent.futures.ThreadPoolExecutor(1) as writer:
        for batch in itertools.chain(stream, [None, None]):
            if written is not None:
                written.result()
                progress.update(out.done)
            written = waiting and writer.submit(write, *waiting)
            waiting = batch


def report_unreadable(out, i0, images):
    """Count the unreadable images and name the first ones; if there is no other, that is an error and nothing is kept."""
    readable = out.readable()
    bad = out.n - int(readable.sum())
    detail = ""
    if bad:
        names = [images.name(i0 + int(i)) for i in np.flatnonzero(~readable)[:UNREADABLE_TOLD]]
        more = f" and {bad - len(names)} more" if bad > len(names) else ""
        detail = f" ({out.notes['missing']} missing, {out.notes['damaged']} damaged): {', '.join(names)}{more}"
    if "fault" in out.notes:
        detail += f"; a damaged one: {out.notes['fault']}"
    if bad == out.n:
        out.discard()
        raise ValueError(f"none of the {out.n} images could be read{detail}")
    log(f"{bad} of {out.n} images unreadable{', with the features of a black image' if bad else ''}{detail}")


def tell_classes(names, labels):
    """Say which label stands for which class, and which classes have no image."""
    told = range(len(names)) if len(names) <= CLASSES_TOLD else (0, 1, len(names) - 1)
    listed = [f"{c} {names[c]}" for c in told]
    if len(names) > CLASSES_TOLD:
        listed.insert(2, "...")
    log(f"{len(names)} classes in sorted order, by label: {', '.join(listed)}; label_idx.json counts them from 1")
    empty = sorted(set(range(len(names))) - set(labels.tolist()))
    if empty:
        log(f"note: {len(empty)} of them without images: {', '.join(names[c] for c in empty[:10])}" + " ..." * (len(empty) > 10))


def from_memory_speed(results, extract, workers, shape):
    """(images, seconds) of the network fed with images in memory for a second or more, as many batches by each worker."""
    reps, elapsed = 2 * workers, 0
    while elapsed < 1:
        if elapsed:
            reps *= math.ceil(min(64, max(2, 1.2 / elapsed)))
        start, waiting = time.monotonic(), None
        for features, _, _ in results(InMemory(shape, reps), extract, workers):
            if waiting is not None:
                waiting()
            waiting = features
        waiting()
        elapsed = time.monotonic() - start
    return reps * shape[0], elapsed


def report_speed(n, seconds, memory):
    """Images per second of this run, beside those of the network fed from memory: pairs of images and seconds."""
    images, elapsed = np.sum(memory, axis=0)
    rate, rate_of_memory = n / seconds, images / elapsed
    log(f"{rate:.1f} images/s; the same network fed from memory: {rate_of_memory:.1f} images/s; ratio "
        f"{rate / rate_of_memory:.3f}")


class InMemory:
    """The same random images as every batch."""

    def __init__(self, shape, n):
        self.batch = np.random.RandomState(0).randint(0, 256, shape).astype(np.uint8), np.zeros(shape[0], np.uint8), []
        self.n = n

    def __len__(self):
        return self.n

    def read(self, b):
        return None

    def decode(self, b, files):
        return self.batch


if __name__ == "__main__":
    run(main)
