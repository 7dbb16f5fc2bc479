"""Top-5 accuracy, over all test images and over those of the novel classes (paper, section 4.1)."""
import numpy as np


def note_of_unreadable(labelled, test):
    """A list of a line, or of none, about how many labelled and test images could not be read."""
    return [f"note: {labelled} labelled and {test} test images could not be read, and have the features of a black image"] * bool(
        labelled or test)


def notes_of_classes(labels, split):
    """Yield lines about what the test images lack: some of novel classes, or of some classes, or classes that can be wrong.
    labels: int (nt,), 0..C-1, of test images."""
    if len(split.classes) <= 5:
        yield f"note: there are {len(split.classes)} classes: each is among the five best, by diffusion each with a score above 0"
    if not split.is_novel[labels].any():
        yield "note: no test image is of a novel class, accuracies on novel are 0 for want of any"
    lacking = np.setdiff1d(split.classes, split.classes[labels]) + 1
    if len(lacking):
        yield (f"note: {len(lacking)} of {len(split.classes)} classes have no test image: class "
               + ", ".join(map(str, lacking[:5])) + " ..." * (len(lacking) > 5))


def accuracies(right, labels, is_novel):
    """(accuracy over all test images, accuracy over those of novel classes; NaN-free: 0 where there are none)."""
    novel = is_novel[labels]
    return float(right.mean()), float(right[novel].mean()) if novel.any() else 0.0
