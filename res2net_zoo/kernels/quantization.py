"""Post-training quantization of a traced network to 8-bit integers, for `cpu_network`.

Activations are unsigned, real = scale * (q - zero), with one scale for each tensor, calibrated on images. Weights are
signed and symmetric, with one scale for each output channel (Krishnamoorthi, arXiv 1806.08342, section 2).
"""

from typing import Any, NamedTuple

import torch
from torch import fx

LEVELS = 255  # steps of an unsigned 8-bit integer
LARGEST_WEIGHT = 127  # maximum absolute value of a signed 8-bit integer, in a symmetric range
AT_ONCE = 8  # images per forward pass of the calibration


class Scale(NamedTuple):
    """Scale and zero point of a tensor: real = scale * (q - zero)."""

    scale: float
    zero: int


class _Ranges(fx.Interpreter):
    """Runs a traced model, and records the minimum and the maximum of each map."""

    def __init__(self, graph: fx.GraphModule) -> None:
        super().__init__(graph)
        self.extra_traceback = False
        self.ranges: dict[str, tuple[float, float]] = {}

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if isinstance(result, torch.Tensor) and n.op != "get_attr":
            low, high = self.ranges.get(n.name, (0.0, 0.0))  # padding needs zero
            lowest, highest = (value.item() for value in result.aminmax())
            self.ranges[n.name] = min(low, lowest), max(high, highest)
        return result


@torch.no_grad()
def calibrate(graph: fx.GraphModule, images: torch.Tensor) -> dict[str, Scale]:
    """Return scale and zero point of each map of a network, by its minimum and maximum.

    Smaller ranges, in which rare values saturate, increase the error of the logits: saturation errors are
    systematic, while rounding errors average out.

    Args:
        graph: The traced model, in eval mode, with BatchNorm folded.
        images: Preprocessed images (N, C, H, W).

    Returns:
        The scales by name of the graph's node.
    """
    runner = _Ranges(graph)
    for part in images.split(AT_ONCE):
        runner.run(part.to(memory_format=torch.channels_last))
    scales = {}
    for name, (low, high) in runner.ranges.items():
        scale = (high - low) / LEVELS or 1.0
        scales[name] = Scale(scale, round(-low / scale))
    return scales


def quantize_weight(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize the weights of a convolution, symmetrically for each output channel.

    Args:
        weight: (out_chs, ...), float32.

    Returns:
        Integers of the same shape in int8, and the scale of each output channel (out_chs,) in float32.
    """
    largest = weight.flatten(1).abs().amax(1)
    scale = torch.where(largest > 0, largest, torch.ones(())) / LARGEST_WEIGHT
    return (weight / scale.view(-1, *(1,) * (weight.ndim - 1))).round().to(torch.int8), scale
