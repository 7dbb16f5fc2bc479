"""Write a synthetic data directory in the layout of the real one, at any scale, for benchmarks and trials.

Writes  OUT/features/train.hdf5, val.hdf5, OUT/label_idx.json
        OUT/features/f100m/block0.hdf5, ...                               2048-d background features, or with --raw
        OUT/features/f100m/PCAR256.vt, concatenated_PCAR256.raw           the background after its PCA, of --pca dimensions

Features imitate average-pooled activations (not negative, 2048-d): classes in a hierarchy, each of a few modes, seen
through a fixed random rectified map, so that low-shot accuracy is neither 0 nor 1 and unlabelled neighbours carry
information. The frequencies of the classes in the background are far from even. The same arguments give the same bytes.

    python benchmarks/make_data.py OUT --per-class 60 --val-per-class 10 --nbg 100000                # a minute
    python benchmarks/make_data.py OUT --per-class 640 --val-per-class 50 --nbg 1000000 --raw        # as large as F1M

Easy data: --modes 16 --spread 0.3 (tight clusters). Hard data: --spread 1.8 (high intrinsic dimension: neighbours are
hard to find, and the graph has little locality; low-shot accuracies like the paper's).
"""
import os

import runs  # noqa: F401     it finds the project

import numpy as np
from lowshot.files import read_json, remove, whole, write_json
from lowshot.script import Parser, Progress, log, number, print_header, run

ROWS = 20000        # made at a time: part of what "the same bytes" means


def arguments():
    p = Parser(__doc__)
    p.add_argument("out", metavar="OUT", help="the directory")
    g = p.add_argument_group("size")
    g.add_argument("--nclass", type=number(int, 4), default=1000, help="classes")
    g.add_argument("--per-class", type=number(int, 1), default=60, help="training images of each class")
    g.add_argument("--val-per-class", type=number(int, 1), default=10, help="test images of each class")
    g.add_argument("--nbg", type=number(int, 0), default=100000, help="background images")
    g.add_argument("--block", type=number(int, 1), default=1000000, help="rows of a background block")
    g.add_argument("--dim", type=number(int, 1), default=2048, help="columns of the features")
    g.add_argument("--raw", action="store_true", help="write the background after its PCA without the blocks of features")
    g.add_argument("--pca", type=number(int, 1), default=256, help="dimensions of that PCA")
    g = p.add_argument_group("shape")
    g.add_argument("--latent", type=number(int, 1), default=64, help="dimensions that the features are made of")
    g.add_argument("--modes", type=number(int, 1), default=4, help="clusters of each class")
    g.add_argument("--spread", type=number(float, 0), default=0.9, help="standard deviation within a cluster")
    g.add_argument("--seed", type=number(int, 0, 2 ** 32 - 1), default=1, help="seed")
    g.add_argument("--label-idx", help="class split to copy; drawn at random otherwise")
    return p.parse_args()


class Images:
    """Draws features of images: features(labels, rs) float32 (len(labels), dim)."""

    def __init__(self, rs, args):
        self.spread, self.latent = args.spread, args.latent
        groups = rs.randn(max(2, args.nclass // 12), args.latent)
        classes = groups[rs.randint(0, len(groups), args.nclass)] + 0.75 * rs.randn(args.nclass, args.latent)
        self.modes = classes[:, None, :] + 0.45 * rs.randn(args.nclass, args.modes, args.latent)
        scale = (np.arange(1, args.latent + 1) ** -0.35).astype(np.float32)
        self.projection = (rs.randn(args.latent, args.dim) * scale[:, None]).astype(np.float32) / 3
        self.bias = rs.randn(args.dim).astype(np.float32) * 0.3 - 0.3

    def features(self, labels, rs):
        z = self.modes[labels, rs.randint(0, self.modes.shape[1], len(labels))]
        z = z + self.spread * rs.randn(len(labels), self.latent)
        x = z.astype(np.float32) @ self.projection + self.bias
        return np.maximum(x, 0, out=x)


def write_features(path, images, labels, rs, dim):
    import h5py
    with whole(path) as temporary, Progress(len(labels), f"rows of {os.path.basename(path)}") as progress:
        with h5py.File(temporary, "w") as f:
            all_feats = f.create_dataset("all_feats", (len(labels), dim), dtype="f")
            f.create_dataset("all_labels", data=labels.astype(np.int32))
            for i in range(0, len(labels), ROWS):
                all_feats[i:i + ROWS] = images.features(labels[i:i + ROWS], rs)
                progress.update(min(i + ROWS, len(labels)))
            f.create_dataset("count", data=np.array([len(labels)], np.int32))


def write_raw(folder, images, prior, args):
    """The PCA, trained on up to 50,000 background images, and the background after it."""
    from lowshot.packages import faiss, write_by_faiss
    rs = np.random.RandomState(100)
    pca = faiss.PCAMatrix(args.dim, args.pca, 0, True)
    pca.train(images.features(rs.choice(args.nclass, min(args.nbg, 50000), p=prior), rs))
    pca_path, raw = (os.path.join(folder, name) for name in (f"PCAR{args.pca}.vt", f"concatenated_PCAR{args.pca}.raw"))
    for path in (pca_path, raw):
        remove(path + ".json")      # in which train_apply_pca.py tells what it made others from
    with whole(pca_path) as temporary:
        write_by_faiss(faiss.write_VectorTransform, pca, temporary)
    with whole(raw) as temporary, open(temporary, "wb") as f, \
            Progress(args.nbg, "background images") as progress:
        for i in range(0, args.nbg, ROWS):
            pca.apply(images.features(rs.choice(args.nclass, min(ROWS, args.nbg - i), p=prior), rs)).tofile(f)
            progress.update(min(i + ROWS, args.nbg))


def random_split(rs, nclass):
    """Class numbers from 1, in the proportions of the published split."""
    classes = rs.permutation(nclass) + 1
    nbase, nnovel = int(.389 * nclass), int(.3 * nclass)
    base, novel_1, novel_2 = np.split(classes, [nbase, nbase + nnovel])
    split = {"base_classes": base, "novel_classes_1": novel_1, "novel_classes_2": novel_2,
             "base_classes_1": base[:nbase // 2], "base_classes_2": base[nbase // 2:]}
    split = {name: sorted(int(c) for c in numbers) for name, numbers in split.items()}
    return {**split, "label_names": [f"c{c:03d}" for c in range(nclass)]}


def main():
    args = arguments()
    if args.raw and min(args.dim, args.nbg) < args.pca:
        raise ValueError(f"--raw needs at least {args.pca} columns and background images (--pca), found --dim {args.dim} --nbg "
                         f"{args.nbg}")
    more = os.path.join(args.out, "features", "f100m", f"block{-(-args.nbg // args.block)}.hdf5")
    if os.path.exists(more) and not args.raw:
        raise ValueError(f"{more} is of more background images: remove it, and those after it, or name another folder")
    split = read_json(args.label_idx) if args.label_idx else None
    print_header(args)
    rs = np.random.RandomState(args.seed)
    images = Images(rs, args)
    train_labels = np.repeat(np.arange(args.nclass), args.per_class)
    rs.shuffle(train_labels)
    features = os.path.join(args.out, "features")
    write_features(os.path.join(features, "train.hdf5"), images, train_labels, np.random.RandomState(1), args.dim)
    write_features(os.path.join(features, "val.hdf5"), images, np.repeat(np.arange(args.nclass), args.val_per_class),
                   np.random.RandomState(2), args.dim)
    prior = rs.pareto(1.2, args.nclass) + 0.1
    prior /= prior.sum()
    background = os.path.join(features, "f100m")
    if args.raw:
        write_raw(background, images, prior, args)
    else:
        for b, i0 in enumerate(range(0, args.nbg, args.block)):
            rb = np.random.RandomState(100 + b)
            labels = rb.choice(args.nclass, min(args.block, args.nbg - i0), p=prior)
            write_features(os.path.join(background, f"block{b}.hdf5"), images, labels, rb, args.dim)
    write_json(os.path.join(args.out, "label_idx.json"), split or random_split(rs, args.nclass))
    log(f"{args.out} is complete: DDIR={args.out}")


if __name__ == "__main__":
    run(main)
