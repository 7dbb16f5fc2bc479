"""Top-5 accuracy against a sort of each row."""
import os
import sys

import numpy as np
import pytest

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from lowshot.evaluate import accuracies, in_top5  # noqa: E402


def by_sorting(scores, labels, zero_counts):
    right = []
    for s, y in zip(scores.tolist(), labels):
        best = sorted(range(len(s)), key=lambda c: (-s[c], c))[:5]
        right.append(y in best and (zero_counts or s[y] != 0))
    return right


@pytest.mark.parametrize("zero_counts", [False, True])
@pytest.mark.parametrize("nt, C", [(300, 3), (300, 5), (300, 6), (300, 40), (0, 10), (4097, 9)])
@pytest.mark.parametrize("levels", [2, 4, 1000])
def test_in_top5_with_ties_and_zeros(nt, C, levels, zero_counts):
    rs = np.random.RandomState(nt + C + levels)
    scores = rs.randint(0, levels, size=(nt, C)).astype(np.float32)
    labels = rs.randint(C, size=nt)
    assert in_top5(scores, labels, zero_counts).tolist() == by_sorting(scores, labels, zero_counts)


def test_in_top5_worked_by_hand():
    scores = np.array([[9, 8, 7, 6, 5, 5], [9, 8, 7, 6, 5, 5], [0, 1, 0, 0, 0, 0], [0, 1, 0, 0, 0, 0], [-1] * 6])
    assert in_top5(scores, np.array([4, 5, 1, 0, 4])).tolist() == [True, False, True, False, True]
    assert in_top5(scores, np.array([4, 5, 1, 5, 5]), True).tolist() == [True, False, True, False, False]


def test_accuracies():
    is_novel = np.array([False, True, True])
    assert accuracies(np.array([True, False, True, True]), np.array([0, 0, 1, 2]), is_novel) == (0.75, 1.0)
    assert accuracies(np.array([True, False]), np.array([0, 0]), is_novel) == (0.5, 0.0)
