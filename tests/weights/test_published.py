"""The comparison of a measured accuracy with the published one."""

import pytest

from res2net_zoo.catalog import Accuracy
from res2net_zoo.weights.published import agrees

PUBLISHED = Accuracy(dataset="imagenet-1k", split="validation", top1=80.0, top5=95.0, source="paper")


@pytest.mark.parametrize(
    ("top1", "top5", "expected"),
    [(80.0, 95.0, True), (80.1, 94.9, True), (80.101, 95.0, False), (80.0, 95.101, False), (79.899, 95.0, False)],
)
def test_both_accuracies_must_be_within_the_tolerance(top1, top5, expected):
    assert agrees(top1, top5, PUBLISHED, 0.1) is expected


def test_without_published_accuracy_the_result_is_none():
    assert agrees(80.0, 95.0, None, 0.1) is None
