import numpy as np

from lowshot.evaluate import accuracies, note_of_unreadable, notes_of_classes
from lowshot.split import Split


def test_accuracies():
    is_novel = np.array([False, True, True])
    assert accuracies(np.array([True, False, True, True]), np.array([0, 0, 1, 2]), is_novel) == (0.75, 1.0)
    assert accuracies(np.array([True, False]), np.array([0, 0]), is_novel) == (0.5, 0.0)


def test_notes_of_classes_without_test_images():
    split = Split(np.arange(4, 10), np.arange(20, 23))
    assert list(notes_of_classes(np.arange(9), split)) == []
    assert list(notes_of_classes(np.array([0, 1, 2, 4, 5, 7, 8]), split)) == [
        "note: 2 of 9 classes have no test image: class 8, 21"]
    assert list(notes_of_classes(np.array([1, 1]), split)) == [
        "note: no test image is of a novel class, accuracies on novel are 0 for want of any",
        "note: 8 of 9 classes have no test image: class 5, 7, 8, 9, 10 ..."]


def test_few_classes_cannot_be_wrong():
    split = Split(np.array([0, 4]), np.array([2, 3, 7]))
    assert list(notes_of_classes(np.arange(5), split)) == [
        "note: there are 5 classes: each is among the five best, by diffusion each with a score above 0"]


def test_images_that_could_not_be_read_are_counted():
    assert note_of_unreadable(3, 1) == [
        "note: 3 labelled and 1 test images could not be read, and have the features of a black image"]
    assert note_of_unreadable(0, 0) == []
