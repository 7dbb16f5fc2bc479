"""Top-5 accuracy, over all test images and over those of the novel classes (paper, section 4.1)."""
import numpy as np

NO_NOVEL = "note: no test image is of a novel class, accuracies on novel are 0 for want of any"


def in_top5(scores, labels, zero_counts=False):
    """Whether each test image's class is among its five highest scores, bool (nt,).

    scores: (nt, C); labels: int (nt,) in 0..C-1. Of equal scores the class with the lower number ranks first. A score
    of zero never counts, as no label reached the image, unless `zero_counts` (scores of a classifier).
    """
    scores = np.asarray(scores)
    right = np.empty(len(scores), bool)
    for i in range(0, len(scores), 4096):       # temporaries of a few MB
        s, y = scores[i:i + 4096], labels[i:i + 4096, None]
        own = np.take_along_axis(s, y, 1)
        before = (s > own).sum(axis=1) + ((s == own) & (np.arange(s.shape[1]) < y)).sum(axis=1)
        right[i:i + 4096] = (before < 5) & (zero_counts | (own[:, 0] != 0))
    return right


def accuracies(right, labels, is_novel):
    """(accuracy over all test images, accuracy over those of novel classes; NaN-free: 0 where there are none)."""
    novel = is_novel[labels]
    return float(right.mean()), float(right[novel].mean()) if novel.any() else 0.0
