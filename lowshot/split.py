"""Which classes and images are labelled (paper, section 4.1; order and random numbers as in the published tables)."""
import json
from dataclasses import dataclass

import numpy as np

from lowshot.features import labels_of_both
from lowshot.files import read_json


@dataclass
class Split:
    """Class split of one mode: 0-based class numbers, each list increasing. Label c is the c-th class of `classes`.

    known: the file lists no class from this number on, of any mode, nor has a name for one.
    """
    base: np.ndarray
    novel: np.ndarray
    known: int = None

    @property
    def classes(self):
        return np.sort(np.concatenate([self.base, self.novel]))

    @property
    def is_novel(self):
        """bool (C,): whether label c is a novel class."""
        return np.isin(self.classes, self.novel)

    def renumber(self, labels):
        """Labels 0..C-1 of class numbers; -1 for classes outside the split. int64."""
        labels = np.asarray(labels, np.int64)
        classes = self.classes
        at = np.minimum(np.searchsorted(classes, labels), len(classes) - 1)
        return np.where(classes[at] == labels, at, -1)


def load_split(path, mode):
    """Read label_idx.json: mode "val" takes class set 1, "test" class set 2. Class numbers in the file start at 1."""
    info = read_json(path)
    lists = []
    for name in {"val": ("base_classes_1", "novel_classes_1"), "test": ("base_classes_2", "novel_classes_2")}[mode]:
        numbers = info.get(name) if isinstance(info, dict) else None
        if not isinstance(numbers, list):
            raise ValueError(f"{path} has no list of class numbers {name!r}")
        for i in numbers:
            if type(i) is not int or not 1 <= i < 2 ** 31:
                expected = "class numbers start at 1 and are below 2^31" if type(i) is int else "a whole number was expected"
                raise ValueError(f"{path}: {name} holds {json.dumps(i)[:40]}, {expected}")
        if len(set(numbers)) < len(numbers):
            raise ValueError(f"{path}: {name} repeats class {max(numbers, key=numbers.count)}")
        lists.append(np.array(sorted(numbers), np.int64) - 1)
    base, novel = lists
    if np.intersect1d(base, novel).size:
        raise ValueError(f"{path}: class {np.intersect1d(base, novel)[0] + 1} is both base and novel for --mode {mode}")
    if not len(base) + len(novel):
        raise ValueError(f"{path} lists no class for --mode {mode}")
    known = [n for key, numbers in info.items() if "classes" in key and isinstance(numbers, list)
             for n in numbers if type(n) is int]
    names = info.get("label_names")
    return Split(base, novel, max(known + [len(names)] if isinstance(names, list) else known))


def labelled_images(train_labels, split, nlabeled, seed):
    """Choose the labelled training images of a run.

    All images of each base class in file order; of each novel class the first `nlabeled` after RandomState(seed) has
    shuffled its row numbers, class after class in increasing order. Base classes come first, then the novel ones.

    train_labels: int (n,), class of each row of train.hdf5. Returns (rows int64, labels int64 in 0..C-1, number of
    base rows). Raises ValueError for a class without images or a novel class with fewer than nlabeled.
    """
    train_labels = np.asarray(train_labels)
    order = np.argsort(train_labels, kind="stable")
    ordered = train_labels[order]
    rs = np.random.RandomState(seed)
    rows, labels, nbase = [], [], 0
    for classes, novel in ((split.base, False), (split.novel, True)):
        for c, label in zip(classes, split.renumber(classes)):
            of_class = order[np.searchsorted(ordered, c):np.searchsorted(ordered, c, "right")]
            if novel:
                if len(of_class) < nlabeled:
                    raise ValueError(f"nlabeled is {nlabeled}, but novel class {c + 1} has {len(of_class)} training images: "
                                     "fewer are to be labelled, or label_idx.json belongs to another data set")
                of_class = of_class.copy()
                rs.shuffle(of_class)
                of_class = of_class[:nlabeled]
            elif not len(of_class):
                raise ValueError(f"class {c + 1} of the split has no image in the training features: its folder is empty, or "
                                 "label_idx.json belongs to another data set")
            rows.append(of_class)
            labels.append(np.full(len(of_class), label))
        if not novel:
            nbase = sum(map(len, rows))
    return np.concatenate(rows).astype(np.int64), np.concatenate(labels).astype(np.int64), nbase


def test_images(val_labels, split):
    """Test images: rows of val.hdf5 whose class is in the split. Returns (rows int64, labels int64 in 0..C-1)."""
    labels = split.renumber(val_labels)
    rows = np.flatnonzero(labels >= 0)
    if not len(rows):
        raise ValueError("no test image has a class of the split: label_idx.json belongs to another data set")
    return rows, labels[rows]


def images_of_run(train_file, val_file, split, nlabeled, seed):
    """What a run works on, of FeatureFiles: (rows, labels, nbase) of labelled_images(), (rows, labels) of test_images(), and how
    many images of both could not be read, a pair."""
    train_labels, val_labels = labels_of_both(train_file, val_file, split.known)
    labelled, test = labelled_images(train_labels, split, nlabeled, seed), test_images(val_labels, split)
    return *labelled, *test, (train_file.unreadable(labelled[0]), val_file.unreadable(test[0]))
