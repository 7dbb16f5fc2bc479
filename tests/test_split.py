"""The class split and the order of the labelled images."""
import json
import os
import sys

import numpy as np
import pytest

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from lowshot.split import Split, labelled_images, load_split, test_images as images_to_test  # noqa: E402


def write(path, **lists):
    path.write_text(json.dumps(lists))
    return str(path)


def test_modes_take_their_own_lists_zero_based(tmp_path):
    path = write(tmp_path / "s.json", base_classes=[9, 8, 2, 5], base_classes_1=[9, 2], novel_classes_1=[4, 1],
                 base_classes_2=[8, 5], novel_classes_2=[10, 3, 6])
    val, test = load_split(path, "val"), load_split(path, "test")
    assert val.known == test.known == 10
    assert val.base.tolist() == [1, 8] and val.novel.tolist() == [0, 3] and val.classes.tolist() == [0, 1, 3, 8]
    assert val.is_novel.tolist() == [True, False, True, False]
    assert test.base.tolist() == [4, 7] and test.novel.tolist() == [2, 5, 9]
    assert test.renumber([2, 4, 5, 7, 9]).tolist() == [0, 1, 2, 3, 4]
    assert test.renumber([-1, 0, 3, 8, 10, 999]).tolist() == [-1] * 6
    assert test.renumber([]).tolist() == []


@pytest.mark.parametrize("lists, message", [
    (dict(base_classes_1=[1]), "no list of class numbers 'novel_classes_1'"),
    (dict(base_classes_1=[1], novel_classes_1="2"), "no list of class numbers 'novel_classes_1'"),
    (dict(base_classes_1=[1.5], novel_classes_1=[2]), "base_classes_1 holds 1.5, a whole number was expected"),
    (dict(base_classes_1=[1, "4"], novel_classes_1=[2]), 'base_classes_1 holds "4", a whole number was expected'),
    (dict(base_classes_1=[1, 3, 3], novel_classes_1=[2]), "base_classes_1 repeats class 3"),
    (dict(base_classes_1=[0], novel_classes_1=[2]), "base_classes_1 holds 0, class numbers start at 1"),
    (dict(base_classes_1=[1, 3], novel_classes_1=[2, 3]), "class 3 is both base and novel"),
    (dict(base_classes_1=[], novel_classes_1=[]), "lists no class for --mode val"),
])
def test_bad_split_files(tmp_path, lists, message):
    with pytest.raises(ValueError, match=message):
        load_split(write(tmp_path / "s.json", **lists), "val")


def test_classes_that_only_have_a_name_are_known(tmp_path):
    lists = dict(base_classes_1=[1, 3], novel_classes_1=[2], base_classes_2=[], novel_classes_2=[])
    for names, known in ((["a", "b", "c", "d", "e"], 5), (["a"], 3), ({"a": 1}, 3), (9, 3)):
        assert load_split(write(tmp_path / "s.json", **lists, label_names=names), "val").known == known


def test_split_file_that_is_no_json(tmp_path):
    (tmp_path / "s.json").write_text("{")
    with pytest.raises(ValueError, match="s.json is not valid JSON"):
        load_split(str(tmp_path / "s.json"), "val")
    (tmp_path / "s.json").write_text("[1]")
    with pytest.raises(ValueError, match="no list of class numbers"):
        load_split(str(tmp_path / "s.json"), "val")


# the images of class c are the rows where this holds c; base classes 1 and 4, novel ones 0 and 3
LABELS = np.array([3, 1, 0, 4, 0, 3, 1, 2, 0, 3, 0, 4, 1, 3])
SPLIT = Split(np.array([1, 4]), np.array([0, 3]))


def test_order_worked_by_hand():
    """Base rows in file order, class by class, then the novel ones out of one stream of random numbers.

    After RandomState(7), one shuffle turns [2, 4, 8, 10] (class 0) into [8, 4, 2, 10], and the next one
    [0, 5, 9, 13] (class 3) into [13, 5, 0, 9].
    """
    rows, labels, nbase = labelled_images(LABELS, SPLIT, 2, seed=7)
    assert rows.tolist() == [1, 6, 12, 3, 11, 8, 4, 13, 5] and nbase == 5
    assert labels.tolist() == [1, 1, 1, 3, 3, 0, 0, 2, 2]
    assert rows.dtype == labels.dtype == np.int64


def test_more_labels_of_the_same_seed_contain_the_fewer():
    one, two, four = (set(labelled_images(LABELS, SPLIT, n, 5)[0].tolist()) for n in (1, 2, 4))
    assert one < two < four and len(four) == 5 + 8
    assert len({tuple(labelled_images(LABELS, SPLIT, 2, seed)[0]) for seed in range(8)}) > 1


def test_without_base_or_without_novel_classes():
    rows, labels, nbase = labelled_images(LABELS, Split(np.array([], int), np.array([2])), 1, 1)
    assert rows.tolist() == [7] and labels.tolist() == [0] and nbase == 0
    rows, labels, nbase = labelled_images(LABELS, Split(np.array([4]), np.array([], int)), 3, 1)
    assert rows.tolist() == [3, 11] and nbase == 2


def test_too_few_images():
    with pytest.raises(ValueError, match="nlabeled is 5, but novel class 1 has 4 training images"):
        labelled_images(LABELS, SPLIT, 5, 1)
    with pytest.raises(ValueError, match="class 8 of the split has no image"):
        labelled_images(LABELS, Split(np.array([7]), np.array([0])), 1, 1)


def test_test_images_are_those_of_the_split():
    rows, labels = images_to_test([0, 1, 2, 3, 4, 4, 9, 0], SPLIT)
    assert rows.tolist() == [0, 1, 3, 4, 5, 7] and labels.tolist() == [0, 1, 2, 3, 3, 0]
    with pytest.raises(ValueError, match="no test image has a class of the split"):
        images_to_test([2, 2, 8], SPLIT)


def test_class_numbers_have_31_bits(tmp_path):
    lists = dict(novel_classes_1=[2], base_classes_1=[2 ** 31])
    with pytest.raises(ValueError, match="base_classes_1 holds 2147483648, class numbers start at 1 and are below 2"):
        load_split(write(tmp_path / "s.json", **lists), "val")
