"""Top-5 accuracy, over all test images and over those of the novel classes (paper, section 4.1)."""
NO_NOVEL = "note: no test image is of a novel class, accuracies on novel are 0 for want of any"


def note_of_unreadable(labelled, test):
    """Words for how many labelled and test images could not be read."""
    return f"note: {labelled} labelled and {test} test images could not be read, and have the features of a black image"


def accuracies(right, labels, is_novel):
    """(accuracy over all test images, accuracy over those of novel classes; NaN-free: 0 where there are none)."""
    novel = is_novel[labels]
    return float(right.mean()), float(right[novel].mean()) if novel.any() else 0.0
