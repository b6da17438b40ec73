"""Pictures, by the figures that they are drawn from: ticks, and labels that cover nothing."""

import pytest

from res2net_zoo.training.report import learning_curve, learning_rate


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
def test_the_learning_curves_labels_are_outside_its_axes(average):
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
