"""Stage 2: train the PCA that brings features to 256 dimensions, and apply it to the whole background.

train   reads   $DDIR/features/f100m/block0.hdf5
        writes  $DDIR/features/f100m/PCAR256.vt, a Faiss PCAMatrix(2048, 256, 0, True): PCA, then a random rotation
apply   reads   PCAR256.vt and all of $DDIR/features/f100m/block0.hdf5, block1.hdf5, ...
        writes  $DDIR/features/f100m/concatenated_PCAR256.raw, float32 (images, 256) without header, not normalised

Beside each output a small .json tells what it was made from. What is complete is not made again; `apply` goes on where
it was cut off.

  python train_apply_pca.py train
  python train_apply_pca.py apply
  python train_apply_pca.py train apply --dim 128 --ntrain 100000
"""
import hashlib
import json
import os
import shutil
import time

import lowshot  # noqa: F401     before numpy: it names the number of threads
import numpy as np

from lowshot.features import SLAB_BYTES, FeatureFile, MatrixFile, check_same_network, spread_rows
from lowshot.files import check_outputs, exclusive, file_sha256, full_disk_named, read_note, remove, whole, write_json
from lowshot.layout import DataDir
from lowshot.machine import available_memory, memory_now, peak_memory, wait_briefly
from lowshot.script import Parser, Progress, clock, log, number, print_header, run, size

wait_briefly()


def main():
    args = arguments()
    ddir = DataDir()
    blocks = ddir.blocks()
    check_blocks(blocks)
    if "train" in args.steps:
        train(args, blocks[0], ddir.pca(args.dim, write=True))
    if "apply" in args.steps:
        apply(args, blocks, ddir.pca(args.dim), ddir.raw(args.dim, write=True))


def arguments():
    parser = Parser(__doc__)
    parser.add_argument("steps", nargs="+", choices=("train", "apply"), help="what to do")
    parser.add_argument("--dim", type=number(int, 1), default=256, help="dimensions to keep; file names carry it")
    parser.add_argument("--ntrain", type=number(int, 1), help="train on the first rows of block0 only, this many "
                        "(default: all; takes their memory)")
    parser.add_argument("--overwrite", action="store_true", help="replace outputs that were made from something else. "
                        "After train comes apply: diffusion.py refuses vectors of another PCA")
    args = parser.parse_args()
    if args.ntrain and "train" not in args.steps:
        parser.error("--ntrain is for train")
    return args


def check_blocks(blocks):
    """ValueError where blocks tell that they were made with different networks, or do not continue each other."""
    first = before = None
    for block in blocks:
        with FeatureFile(block) as f:
            network, note = f.network, f.made_from
        if network and first is None:
            first = block, network
        elif network:
            check_same_network(block, network, *first)
        rows = [note.get("i0"), note.get("i1")]
        if before and None not in rows + before[1] and rows[0] != before[1][1]:
            raise ValueError("{} has the images from {} to before {}, {} those from {} to before {}: blocks must continue each "
                             "other (save_features.py --i0, --i1)".format(before[0], *before[1], block, *rows))
        before = block, rows


def train(args, block0, path):
    """Train on rows of block0 and write the transform."""
    from lowshot.packages import faiss, write_by_faiss
    from lowshot.pca import load_pca
    with FeatureFile(block0) as f:
        n = f.n if args.ntrain is None else args.ntrain
        if n > f.n:
            raise ValueError(f"--ntrain is {n}, but {block0} has {f.n} rows")
        if args.dim > f.d:
            raise ValueError(f"--dim is {args.dim}, but {block0} has {f.d} columns: PCA keeps at most as many")
        if n < args.dim:
            raise ValueError(f"{n} rows of {block0} are too few to train {args.dim} dimensions: at least as many are "
                             "needed (--dim, --ntrain)")
        origin = {"dim": args.dim, "rows": n, "block0": identity(f), "network": f.network}
        if complete(path, origin, args.overwrite, lambda: load_pca(path)):
            return
        check_outputs(path)
        # rows, and a slab being read or, later, the covariance matrix in float32 and its eigenvectors in float64
        memory = 4 * n * f.d + max(min(SLAB_BYTES, 4 * n * f.d), 12 * f.d * f.d)
        print_header(args, step="train", rows=n, columns=f.d, predicted_memory=size(peak_memory() + memory))
        if memory > available_memory():
            raise ValueError(f"training on {n} rows takes {size(memory)}, the machine has {size(available_memory())} "
                             f"free: --ntrain {max(args.dim, int(0.8 * n * available_memory() / memory))} fits")
        start = time.monotonic()
        with Progress(n, "rows read") as progress:
            x = f.read(np.arange(n), progress=progress.update)
    pca = faiss.PCAMatrix(x.shape[1], args.dim, 0, True)
    pca.max_points_per_d = n                    # Faiss would leave rows out beyond 1000 per column
    log(f"training on {n} x {x.shape[1]}")
    pca.train(x)
    variances = faiss.vector_to_array(pca.eigenvalues).astype(np.float64)
    if not (np.isfinite(variances).all() and np.isfinite(faiss.vector_to_array(pca.A)).all()):
        raise ValueError(f"{block0}: the features are too large, their covariances are NaN or infinite")
    kept = variances[:args.dim].clip(0).sum() / max(variances.clip(0).sum(), 1e-300)
    # the note beside it and the file are of one training
    with exclusive(path, lambda: log(f"another process is writing {path}")), whole(path) as temporary:
        write_by_faiss(faiss.write_VectorTransform, pca, temporary)
        make_way(path, origin)
    log(f"wrote {path}: {x.shape[1]} -> {args.dim} dimensions, {kept:.1%} of the variance, in "
        f"{clock(time.monotonic() - start)}, peak memory {size(peak_memory())}")


def apply(args, blocks, pca_path, path):
    """Apply the transform to all rows of all blocks, one slab of about 64 MB after the other."""
    from lowshot.pca import load_pca
    counts, origins = [], []
    for block in blocks:
        with FeatureFile(block) as f:
            pca = load_pca(pca_path, f)
            counts.append(f.n)
            origins.append(identity(f))
    n, width = sum(counts), 4 * args.dim
    origin = {"dim": args.dim, "pca_sha256": file_sha256(pca_path), "blocks": origins}
    if complete(path, origin, args.overwrite, lambda: check_rows(blocks, counts, pca, path), n * width):
        return
    with exclusive(partial_of(path)):
        write_all(args, blocks, counts, pca, path, origin)


def check_rows(blocks, counts, pca, path):
    """ValueError where one of some rows of the output is not the transform of its features."""
    if not sum(counts):
        return
    rows, first = MatrixFile(path, "<f4", pca.d_out, sum(counts)), 0
    shift = np.linalg.norm(pca.apply(np.zeros((1, pca.d_in), np.float32)))
    for block, count in zip(blocks, counts):
        with FeatureFile(block) as f:
            for row in spread_rows(count, 16):
                expected, found = pca.apply(f.read([row]))[0], rows[first + row:first + row + 1][0]
                # batches of other sizes are summed in another order
                with np.errstate(all="ignore"):         # of what is damaged
                    apart = np.abs(found - expected).max()
                if not apart <= 1e-3 * np.linalg.norm(expected) + 1e-5 * shift:
                    raise ValueError(f"{path}: row {first + row} is not what the PCA makes of the features: --overwrite makes it "
                                     "again")
        first += count


def write_all(args, blocks, counts, pca, path, origin):
    """The rows of all blocks to `path`, going on from a partial file made from the same."""
    n, width = sum(counts), 4 * args.dim
    partial = partial_of(path)
    progress_path = partial + ".json"
    done = 0
    if os.path.exists(partial) and os.path.exists(progress_path):
        state = read_note(progress_path)
        rows = state.get("rows")
        if (state.get("made_from") == origin and type(rows) is int and 0 <= rows <= n
                and os.path.getsize(partial) >= rows * width):
            done = rows
        elif not args.overwrite:
            raise ValueError(f"{partial} was begun from another PCA or other blocks, or it is cut off: delete it, or --overwrite")
    slab = min(SLAB_BYTES, 4 * max(counts) * pca.d_in)
    # two slabs, and what the PCA makes of one; training, of which nothing is kept, may have taken more
    memory = max(peak_memory(), memory_now() + min(2 * slab, 4 * n * pca.d_in) + slab * args.dim / pca.d_in)
    print_header(args, step="apply", blocks=len(blocks), rows=n, output=size(n * width), predicted_memory=size(memory))
    free = shutil.disk_usage(os.path.dirname(partial)).free
    if (n - done) * width > free:
        raise OSError(f"{path} needs {size((n - done) * width)} more, the disk has {size(free)} free")
    if done:
        log(f"going on at row {done}")
    else:
        remove(progress_path)           # it tells of rows of another PCA, perhaps

    start = time.monotonic()
    with full_disk_named(path), open(partial, "r+b" if done else "wb") as out, Progress(n, "rows", done) as progress:
        out.seek(done * width)
        out.truncate()                          # what was written after the progress was noted last

        def save():
            out.flush()
            os.fsync(out.fileno())
            write_json(progress_path, {"rows": done, "made_from": origin})

        first, saved = 0, time.monotonic()
        for block, count in zip(blocks, counts):
            with FeatureFile(block) as f:
                for i, x in f.slabs(min(max(done - first, 0), count), count):
                    y = pca.apply(x)
                    if not np.isfinite(y).all():
                        row = int(np.argmin(np.isfinite(y).all(axis=1)))
                        raise ValueError(f"{block}: row {i + row} is too large, the PCA makes NaN or infinity of it")
                    out.write(y)
                    done = first + i + len(x)
                    progress.update(done)
                    if time.monotonic() > saved + 10:
                        save()
                        saved = time.monotonic()
            first += count
        save()
    if os.path.getsize(partial) != n * width:
        raise OSError(f"{partial} has {os.path.getsize(partial)} bytes, {n * width} expected ({n} rows of {width})")
    make_way(path, origin)
    os.replace(partial, os.path.realpath(path))
    os.unlink(progress_path)
    log(f"wrote {path}: {n} x {args.dim}, {os.path.getsize(path)} bytes, in {clock(time.monotonic() - start)}, "
        f"peak memory {size(peak_memory())}")


def identity(f):
    """What tells a feature file from another: its size, and a digest of what it says it was made from, of which images were
    readable, and of 256 of its rows (reading all takes too long)."""
    digest = hashlib.sha256(json.dumps(f.made_from, sort_keys=True).encode())
    readable = f.readable()
    if readable is not None:
        digest.update(np.ascontiguousarray(readable).tobytes())
    for row in spread_rows(f.n, 256):       # one by one: read() takes in all that is between, of chunked files
        digest.update(f.row(row).tobytes())
    return {"rows": f.n, "columns": f.d, "sha256": digest.hexdigest()}


def partial_of(path):
    """Where the rows of a file are until they are all there: beside what it leads to, if it is a link."""
    return os.path.realpath(path) + ".partial"


def make_way(path, origin):
    """What is done before a file gets its name: no other has it, and the note beside it tells what this one is made from."""
    with whole(path + ".json") as temporary:
        write_json(temporary, origin)
        remove(os.path.realpath(path))


def complete(path, origin, overwrite, check, nbytes=None):
    """Whether the output is there, made from the same and whole; one that is not is an error unless it may be replaced.

    check: called where it should be, raises ValueError if it is not whole.
    """
    if not os.path.exists(path):
        return False
    note = path + ".json"
    noted = read_note(note)
    if origin == noted and nbytes in (None, os.path.getsize(path)):
        try:
            check()
        except ValueError:
            if not overwrite:
                raise
            return False
        log(f"{path} is complete, nothing to do")
        partial = partial_of(path)
        if os.path.exists(partial + ".json") and not os.path.exists(partial):
            remove(partial + ".json")           # of a run that was killed at its last step
        return True
    if not overwrite:
        found = "was made from something else" if noted else "does not tell what it was made from"
        if nbytes not in (None, os.path.getsize(path)):
            found = f"has {os.path.getsize(path)} bytes, {nbytes} expected from the blocks there are"
        raise ValueError(f"{path} exists and {found}: --overwrite replaces it")
    return False


if __name__ == "__main__":
    run(main)
