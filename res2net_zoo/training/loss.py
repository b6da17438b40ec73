"""The loss of a classifier, and weights to balance classes."""

from collections.abc import Sequence

import torch
from timm.loss import BinaryCrossEntropy
from torch import nn


class Criterion(nn.Module):
    """Cross entropy or binary cross entropy, for class indices or mixed targets.

    The mean is over images, also with class weights, so that the mean over processes is the mean
    over all their images.

    Args:
        loss: `ce` or `bce` (as in Wightman et al., 2021, arXiv 2110.00476).
        smoothing: Label smoothing of class indices; mixed targets are already smoothed.
        weights: Weight of each class, for `ce`; their mean over the images should be 1.
        threshold: Value of a mixed target above which it becomes 1, for `bce`.
    """

    weights: torch.Tensor | None

    def __init__(
        self, loss: str, smoothing: float, weights: torch.Tensor | None = None, threshold: float | None = None
    ) -> None:
        super().__init__()
        self.smoothing = smoothing
        self.binary = BinaryCrossEntropy(smoothing, target_threshold=threshold) if loss == "bce" else None
        self.register_buffer("weights", weights, persistent=False)

    def forward(self, logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Return the loss of logits (N, classes) for class indices (N,) or mixed targets (N, classes)."""
        logits = logits.float()
        if self.binary is not None:
            return self.binary(logits, target)
        smoothing = 0.0 if target.is_floating_point() else self.smoothing
        if self.weights is not None and not target.is_floating_point():
            # Torch divides by the sum of the batch's weights for class indices, but by N for mixed targets.
            target = nn.functional.one_hot(target, logits.shape[1]).to(logits.dtype)
        return nn.functional.cross_entropy(logits, target, weight=self.weights, label_smoothing=smoothing)


def balanced(counts: Sequence[int]) -> torch.Tensor:
    """Return class weights, inversely proportional to `counts`, with a mean of 1 over all images."""
    numbers = torch.tensor(counts, dtype=torch.float32)
    return numbers.sum() / (len(numbers) * numbers)
