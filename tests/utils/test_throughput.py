"""Throughput of data loading and of the model."""

import time

import pytest

from res2net_zoo.utils import throughput
from res2net_zoo.utils.errors import InputError
from res2net_zoo.utils.throughput import Throughput, measure


@pytest.fixture(autouse=True)
def short(monkeypatch):
    monkeypatch.setattr(throughput, "SECONDS", 0.3)


def slow_pass(batches: int = 5, images: int = 4, seconds: float = 0.01):
    for _ in range(batches):
        time.sleep(seconds)
        yield [0] * images


def test_rates_are_those_of_each_part_alone():
    passes = []

    def start():
        passes.append(slow_pass())
        return passes[-1]

    found = measure(start, len, lambda batch: time.sleep(0.04), whole=80.0, workers=2)
    assert 200 < found.loader < 400 and 50 < found.model < 100  # 4 images in 0.01 and in 0.04 seconds
    assert found.whole == 80 and len(passes) > 2  # a pass of 0.05 seconds is repeated
    assert str(found).endswith("together 80.0; limited by the model") and "(2 workers per process)" in str(found)


def test_the_slower_part_is_named_and_a_run_without_images_has_no_rate():
    text = str(Throughput(loader=10.04, model=20.0, whole=None, workers=1))
    loading = "data loading alone 10.0 (1 worker per process)"
    assert text == f"images/s: {loading}, model alone 20.0, together -; limited by data loading"


@pytest.mark.parametrize(("whole", "competing"), [(8.0, False), (7.0, True)])
def test_a_whole_below_both_parts_is_not_blamed_on_one(whole, competing):
    text = str(Throughput(loader=10.0, model=20.0, whole=whole, workers=1))
    assert ("limited by data loading" in text) != competing
    assert ("slower than either, because they compete for the CPU or the run is short" in text) == competing


def test_batches_without_images_are_skipped_and_none_at_all_is_an_error():
    batches = [[], [0, 0]]
    seen = []
    measure(lambda: batches, len, seen.append, whole=None, workers=0)
    assert seen and all(batch == [0, 0] for batch in seen)
    with pytest.raises(InputError, match="has no images"):
        measure(lambda: [[]], len, seen.append, whole=None, workers=0)
