"""The data directory: where every file lives under $DDIR (names fixed, as published files are dropped in as they are)."""
import os
import re

MOST_COLUMNS = 1024         # neighbours that a graph may have


def graph_command(nbg, k, dim):
    """The command that makes a background graph."""
    return f"python build_graph.py {nbg} --k {k}" + (f" --dim {dim}" if dim != 256 else "")


def pca_command(step, dim):
    """The command that trains or applies the PCA."""
    return f"python train_apply_pca.py {step}" + (f" --dim {dim}" if dim != 256 else "")


def command_for(path, dim):
    """What makes a file of features or of the PCA."""
    return "save_features.py" if path.endswith(".hdf5") else pca_command("train apply", dim)


def padded_to_power_of_two(k):
    """The number of columns that a stored graph of k neighbours has."""
    return 1 << (k - 1).bit_length()


class DataDir:
    """Paths below the root of the data directory, `DDIR` in the environment unless given.

    Files that are read may also stand where some published copies have them; files that are written go to the
    table's place.
    """

    def __init__(self, root=None):
        root = os.environ.get("DDIR", "") if root is None else root
        if not root:
            raise ValueError("the environment variable DDIR is not set: it names the data directory (see README.md)")
        if not os.path.isdir(root):
            raise ValueError(f"DDIR={root} is not a directory")
        try:
            root.encode()
        except UnicodeEncodeError:
            raise ValueError(f"DDIR={root!r} is not UTF-8, which Faiss expects of file names (or this locale is not: set "
                             "PYTHONUTF8=1)")
        self.root = root

    def path(self, *parts):
        return os.path.join(self.root, *parts)

    @property
    def train(self):
        return self.path("features", "train.hdf5")

    @property
    def val(self):
        return self.path("features", "val.hdf5")

    def blocks(self):
        """Paths of features/f100m/block0.hdf5, block1.hdf5, ...: consecutive from 0."""
        folder = self.path("features", "f100m")
        names = os.listdir(folder) if os.path.isdir(folder) else []
        numbers = sorted(int(m.group(1)) for m in (re.fullmatch(r"block(0|[1-9]\d*)\.hdf5", n) for n in names) if m)
        if not numbers:
            raise ValueError(f"no block0.hdf5 in {folder}: save_features.py makes it")
        if numbers != list(range(len(numbers))):
            missing = min(set(range(numbers[-1])) - set(numbers))
            raise ValueError(f"{folder} has block{numbers[-1]}.hdf5 but no block{missing}.hdf5: "
                             "save_features.py makes it")
        return [os.path.join(folder, f"block{i}.hdf5") for i in numbers]

    def pca(self, dim=256, write=False):
        return self._either(f"PCAR{dim}.vt", write)

    def raw(self, dim=256, write=False):
        return self._either(f"concatenated_PCAR{dim}.raw", write)

    def check_dim(self, dim):
        """ValueError where there is the PCA, or vectors after it, of other dimensions only."""
        folders = [f for f in (self.path("features", "f100m"), self.path("features")) if os.path.isdir(f)]
        names = [re.fullmatch(r"PCAR(\d+)\.vt|concatenated_PCAR(\d+)\.raw", n) for f in folders for n in os.listdir(f)]
        have = sorted({int(m.group(1) or m.group(2)) for m in names if m})
        if have and dim not in have:
            raise ValueError(f"{self.path('features')} has the PCA to {', '.join(map(str, have))} dimensions, not to {dim}: "
                             f"--dim {have[-1]}, or {pca_command('train apply', dim)}")

    def _either(self, name, write):
        fixed = self.path("features", "f100m", name)
        above = self.path("features", name)
        return above if not write and not os.path.exists(fixed) and os.path.exists(above) else fixed

    def index(self, nbg):
        return self.path("knngraph", f"ndis{nbg}.index")

    def graph(self, nbg, k):
        """Paths (I, D) of the background graph with k columns."""
        stem = self.path("knngraph", f"ndis{nbg}_k{k}")
        return f"{stem}_I_11.int32", f"{stem}_D_11.float32"

    def find_graph(self, nbg, k, dim):
        """(I path, D path, columns) of a stored background graph that has at least k columns, fewest columns first.

        dim: dimensions of its vectors, for the command that makes it.
        """
        folder = self.path("knngraph")
        pattern = re.compile(rf"ndis{nbg}_k(\d+)_I_11\.int32")
        names = os.listdir(folder) if os.path.isdir(folder) else []
        columns = sorted(int(m.group(1)) for m in map(pattern.fullmatch, names) if m)
        for kk in columns:
            if kk >= k and all(map(os.path.exists, self.graph(nbg, kk))):
                return (*self.graph(nbg, kk), kk)
        for kk in columns:
            if kk >= k:
                raise ValueError(f"{self.graph(nbg, kk)[1]} does not exist: {graph_command(nbg, kk, dim)} --overwrite makes it")
        if k > MOST_COLUMNS:
            raise ValueError(f"k is {k}, graphs of background images have at most {MOST_COLUMNS} neighbours")
        have = f"only k = {', '.join(map(str, columns))}" if columns else "none"
        raise ValueError(f"no graph of {nbg} background images with k >= {k} in {folder} ({have}): "
                         f"{graph_command(nbg, k, dim)} makes it")

    def label_idx(self):
        """label_idx.json of the data directory, or the copy in the current folder."""
        for path in (self.path("label_idx.json"), "label_idx.json"):
            if os.path.exists(path):
                return path
        raise ValueError(f"no label_idx.json in {self.root} nor in the current folder: "
                         "it comes with the low-shot-shrink-hallucinate package; or write it: see Your own images in README.md")

    def of_label_idx(self):
        """Words that name label_idx.json where it is not the data directory's."""
        path = self.label_idx()
        return "" if path == self.path("label_idx.json") else f" of {os.path.abspath(path)}"

    def log(self, *parts):
        return self.path("logs", *parts)
