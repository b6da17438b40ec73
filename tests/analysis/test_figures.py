"""Tests of figures: ticks, and labels that do not overlap."""

import pytest
import torch

from res2net_zoo.training.report import Mistakes, learning_curve, learning_rate, mistakes_sheet


def epochs(number: int, average: bool) -> list[dict[str, float]]:
    rows = []
    for epoch in range(1, number + 1):
        top1 = 90 - 60 / epoch
        row = {"epoch": epoch, "train_loss": 2 / epoch, "top1": top1, "top5": top1 + 5}
        rows.append(row | ({"ema_top1": top1 + 0.5, "ema_top5": top1 + 5.5} if average else {}))
    return rows


@pytest.mark.parametrize("number", [1, 2, 6, 100])
def test_epochs_are_whole_numbers(number):
    rates = [(step / 10, 1e-3) for step in range(10 * number)]
    for figure in (learning_curve(epochs(number, False)), learning_rate(rates)):
        figure.draw_without_rendering()
        for axes in figure.axes:
            low, high = axes.get_xlim()
            ticks = [tick for tick in axes.get_xticks() if low <= tick <= high]
            assert ticks and all(tick == int(tick) for tick in ticks)


@pytest.mark.parametrize("average", [False, True])
def test_legend_is_outside_the_axes(average):
    figure = learning_curve(epochs(6, average))
    figure.draw_without_rendering()
    (legend,) = figure.legends
    own = legend.get_window_extent()
    assert (
        not any(axes.get_tightbbox().overlaps(own) for axes in figure.axes)
        and figure.bbox.count_contains(own.corners()) == 4
    )
    assert not any(axes.texts or axes.get_legend() for axes in figure.axes)
    best = 80.5 if average else 80
    assert f"best: {best:.2f} in epoch 6" in [text.get_text() for text in legend.get_texts()]


@pytest.mark.parametrize("number", [1, 2, 7])
def test_titles_of_mistakes_are_not_clipped(number):
    mistakes = Mistakes(2)
    mistakes.worst = [(0.9, 0, 1, torch.zeros(3, 8, 8, dtype=torch.uint8))] * number
    figure = mistakes_sheet(mistakes, ["a_class_with_a_long_name, and another", "seven"])
    figure.draw_without_rendering()
    titles = [figure.get_suptitle() and figure.texts[0], *(axes.title for axes in figure.axes)]
    assert all(figure.bbox.count_contains(title.get_window_extent().corners()) == 4 for title in titles)
