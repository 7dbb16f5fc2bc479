import numpy as np

from lowshot.evaluate import accuracies


def test_accuracies():
    is_novel = np.array([False, True, True])
    assert accuracies(np.array([True, False, True, True]), np.array([0, 0, 1, 2]), is_novel) == (0.75, 1.0)
    assert accuracies(np.array([True, False]), np.array([0, 0]), is_novel) == (0.5, 0.0)
