"""The average pooling before the classifier of the authors' Res2NeXt and DLA."""

import torch
import torch.fx
import torch.nn.functional as F
from torch import nn


def has_one_window(height: int, width: int) -> bool:
    """Return whether the authors' pooling supports a map of this size: exactly one 7x7 window fits."""
    return 7 <= height < 14 and 7 <= width < 14


def pool_window(x: torch.Tensor) -> torch.Tensor:
    """Pool (N, C, H, W) to (N, C, 1, 1), see `WindowAvgPool2d`."""
    if has_one_window(x.shape[2], x.shape[3]):
        return F.avg_pool2d(x, 7)
    return F.adaptive_avg_pool2d(x, 1)


torch.fx.wrap("pool_window")  # traced as one operation, because it depends on the size


class WindowAvgPool2d(nn.Module):
    """Average pooling, bitwise identical to the authors' `AvgPool2d(7)` for every map size that it supports.

    For maps larger than 7x7, from images larger than 224x224, both read only the first 7 rows and columns. Maps that
    `AvgPool2d(7)` does not support, with fewer than 7 or at least 14 rows or columns, are averaged globally.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Pool (N, C, H, W) to (N, C, 1, 1)."""
        return pool_window(x)
