"""A tiny data directory in the real layout, for the tests: all files of the table in README.md that stages read.

Features imitate average-pooled ReLU activations: a class hierarchy (super-class, class, mode) in a small latent space,
seen through one random rectified map, so that low-shot accuracy lies well between 0 and 1 and unlabelled neighbours
carry information.
"""
import json
import os

import h5py
import numpy as np

LATENT, MODES = 12, 3


def write_features(path, x, labels, spare=0, chunks=None):
    """Write a feature file; `spare`: rows of NaN beyond `count`, which nobody may read."""
    os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
    n, d = x.shape
    with h5py.File(path, "w") as f:
        feats = f.create_dataset("all_feats", (n + spare, d), np.float32, chunks=chunks)
        feats[:n] = x
        feats[n:] = np.nan
        all_labels = f.create_dataset("all_labels", (n + spare,), np.int32)
        all_labels[:n] = labels
        all_labels[n:] = -7
        f.create_dataset("count", data=np.array([n], np.int32))


def write_made_from(path, **note):
    """What save_features.py tells that it made the file from."""
    with h5py.File(path, "r+") as f:
        f.attrs["made_from"] = json.dumps(note)


def read_features(path):
    """(x float32 (n, d), labels int32 (n)) of the valid rows."""
    with h5py.File(path, "r") as f:
        n = int(f["count"][0])
        return f["all_feats"][:n], f["all_labels"][:n]


class Features:
    """Draws features float32 (len(labels), dim) of classes 0..nclass-1."""

    def __init__(self, nclass, dim, spread=1.6, seed=0):
        rs = np.random.RandomState(seed)
        superclasses = rs.randn(max(2, nclass // 6), LATENT)
        centres = superclasses[rs.randint(0, len(superclasses), nclass)] + 0.8 * rs.randn(nclass, LATENT)
        self.modes = centres[:, None] + 0.45 * rs.randn(nclass, MODES, LATENT)
        self.map = rs.randn(LATENT, dim) / 3
        self.offset = 0.3 * rs.randn(dim) - 0.1
        self.spread = spread

    def draw(self, labels, rs):
        z = self.modes[labels, rs.randint(0, MODES, len(labels))] + self.spread * rs.randn(len(labels), LATENT)
        return np.maximum(z @ self.map + self.offset, 0).astype(np.float32)


def make_data_directory(root, nclass=30, dim=64, per_class=20, val_per_class=5, nbg=500, block=300, seed=0,
                        raw=False, pca_dim=None, spread=1.6):
    """Write features/{train,val}.hdf5, features/f100m/block*.hdf5 and label_idx.json below `root`; returns `root`.

    Half of the first two fifths of the classes are base classes of the validation split and half those of the test
    split; the other classes are novel in one or the other. Training rows are shuffled, as are class numbers among
    the lists. The train file and the last block have spare rows of NaN beyond `count`; block files are chunked if
    their number is odd, contiguous if not. Background images are of the same classes, unevenly.

    raw: also PCAR{pca_dim}.vt and concatenated_PCAR{pca_dim}.raw, made with faiss (pca_dim: half of dim, 256 at the
    most; the scripts' own default of 256 needs dim >= 256 and nbg >= 256). Same arguments, same bytes.
    """
    root = str(root)
    folder = os.path.join(root, "features")
    features = Features(nclass, dim, spread, seed)
    rs = np.random.RandomState(seed + 1)

    labels = np.repeat(np.arange(nclass), per_class)
    rs.shuffle(labels)
    write_features(os.path.join(folder, "train.hdf5"), features.draw(labels, rs), labels, spare=3)
    labels = np.repeat(np.arange(nclass), val_per_class)
    write_features(os.path.join(folder, "val.hdf5"), features.draw(labels, rs), labels)

    prior = rs.pareto(1.2, nclass) + 0.3
    classes = rs.choice(nclass, nbg, p=prior / prior.sum())
    background = features.draw(classes, rs)
    starts = range(0, nbg, block)
    for b, i in enumerate(starts):
        last = i == starts[-1]
        write_features(os.path.join(folder, "f100m", f"block{b}.hdf5"), background[i:i + block],
                       np.zeros(len(background[i:i + block])), spare=5 if last else 0,
                       chunks=(16, dim) if b % 2 else None)

    order = rs.permutation(nclass) + 1
    nbase, nnovel = 2 * nclass // 5, 3 * nclass // 10
    lists = {"base_classes": order[:nbase], "base_classes_1": order[:nbase // 2],
             "base_classes_2": order[nbase // 2:nbase], "novel_classes_1": order[nbase:nbase + nnovel],
             "novel_classes_2": order[nbase + nnovel:]}
    info = {name: sorted(map(int, numbers)) for name, numbers in lists.items()}
    info["label_names"] = [f"class {c}" for c in range(nclass)]
    with open(os.path.join(root, "label_idx.json"), "w") as f:
        json.dump(info, f)

    if raw:
        write_pca(folder, background, pca_dim or min(256, dim // 2))
    return root


def write_pca(folder, background, dim):
    """Train a rotated PCA on the background and apply it, straight with faiss."""
    from lowshot.packages import faiss
    faiss_threads = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)
    pca = faiss.PCAMatrix(background.shape[1], dim, 0, True)
    pca.train(background)
    faiss.write_VectorTransform(pca, os.path.join(folder, "f100m", f"PCAR{dim}.vt"))
    pca.apply(background).astype(np.float32).tofile(os.path.join(folder, "f100m", f"concatenated_PCAR{dim}.raw"))
    faiss.omp_set_num_threads(faiss_threads)
