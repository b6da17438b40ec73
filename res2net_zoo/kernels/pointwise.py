"""Training on CPUs in bfloat16: 1x1 convolutions whose backward pass is matrix products.

In channels_last a 1x1 convolution is a matrix product. PyTorch's convolution computes the weight's gradient more
slowly than a matrix product, and needs a separate step to add the gradients of the branch and the shortcut of a block,
which a matrix product can accumulate. In float32, convolutions are faster and are kept.

`res2net_zoo.kernels.training` selects where this is used.
"""

from typing import Any

import torch
from torch import nn

from res2net_zoo.utils.private_apis import has_bfloat16_convolutions

LEAST_CHANNELS = 128  # minimum of input and output channels for which the weight's gradient is faster as a product


def pointwise(conv: nn.Conv2d, x: torch.Tensor) -> torch.Tensor:
    """Compute a 1x1 convolution of stride 1 without a bias.

    Args:
        conv: The layer.
        x: (N, C, H, W), supported by `fused_norm.fits`.

    Returns:
        (N, conv.out_channels, H, W).
    """
    return _Pointwise.apply(*_cast(conv, x), False) if _is_faster(conv, x) else conv(x)


def pointwise_and_shortcut(conv: nn.Conv2d, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute the 1x1 convolution, and also return x for the block's shortcut.

    The convolution adds its gradient to the shortcut's in place, so the step that reads the shortcut must not reuse
    that memory.
    """
    return _Pointwise.apply(*_cast(conv, x), True) if _is_faster(conv, x) else (conv(x), x)


def _is_faster(conv: nn.Conv2d, x: torch.Tensor) -> bool:
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
    return dtype == torch.bfloat16 and has_bfloat16_convolutions()


def _cast(conv: nn.Conv2d, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return input and weight in the dtype of a convolution under autocast."""
    if not torch.is_autocast_enabled("cpu"):
        return x, conv.weight
    return x.to(torch.bfloat16), conv.weight.to(torch.bfloat16)


def _matrix(x: torch.Tensor) -> torch.Tensor:
    """Return (N, C, H, W) as (N * H * W, C), in the same memory if it is dense in channels_last."""
    return x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])


class _Pointwise(torch.autograd.Function):
    """The output of the convolution and, for the shortcut, its input."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, with_shortcut: bool):
        ctx.save_for_backward(x, weight)
        ctx.set_materialize_grads(False)
        y = torch.conv2d(x, weight)
        return (y, x) if with_shortcut else y

    @staticmethod
    def backward(ctx: Any, *grads: Any):
        dy: Any = grads[0]
        dshortcut: Any = grads[1] if len(grads) > 1 else None
        if dy is None:
            return dshortcut, None, None
        x, weight = ctx.saved_tensors
        needs_dx, needs_dw, _ = ctx.needs_input_grad
        # Only PyTorch's convolution supports double backward.
        adds = dshortcut is not None and needs_dx and not torch.is_grad_enabled()
        by_product = needs_dw and min(weight.shape[:2]) >= LEAST_CHANNELS and not torch.is_grad_enabled()
        mask = [needs_dx and not adds, needs_dw and not by_product, False]
        dx, dw, _ = torch.ops.aten.convolution_backward(
            dy, x, weight, None, [1, 1], [0, 0], [1, 1], False, [0, 0], 1, mask
        )
        if adds:
            dx = dshortcut.contiguous(memory_format=torch.channels_last)
            _matrix(dx).addmm_(_matrix(dy), weight.flatten(1))
        elif dshortcut is not None and needs_dx:
            dx = dx + dshortcut
        if by_product:
            dw = torch.empty_like(weight)  # in the weight's memory format, as autograd expects
            torch.mm(_matrix(dy).t(), _matrix(x), out=dw.view(weight.shape[:2]))
        return dx, dw, None
