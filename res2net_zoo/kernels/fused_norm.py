"""Training on CPUs: BatchNorm fused with adjacent activations, additions, splits and concatenations.

These operations are limited by memory bandwidth. PyTorch runs them one by one, and each reads and writes its tensors;
`fused_norm.cpp` reads a tensor twice in the forward and twice in the backward pass, for any of the operations. Results
are those of BatchNorm (Ioffe and Szegedy, arXiv 1502.03167, Algorithm 1), computed in float32, and differ from
PyTorch's only by fewer roundings.

`res2net_zoo.kernels.training` selects between this and plain PyTorch for each block.
"""

import ctypes
import warnings
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from res2net_zoo.kernels.compiler import CannotCompile, compile_library
from res2net_zoo.utils.private_apis import (
    _are_functorch_transforms_active,
    _get_current_graph_task_keep_graph,
    _has_any_global_hook,
    has_hooks,
    is_forward_ad_active,
)

SOURCE = Path(__file__).with_name("fused_norm.cpp")
FUNCTIONS = {
    "forward": (None, ctypes.c_void_p, ctypes.c_double, ctypes.c_double, ctypes.c_int, ctypes.c_int),
    "backward": (None, ctypes.c_void_p, ctypes.c_int, ctypes.c_int),
}
LEAST = 2**17  # minimum number of elements for which this is faster, despite the higher overhead of a call


@cache
def library() -> ctypes.CDLL | None:
    """Return the compiled steps; if they cannot be compiled, warn and return None."""
    try:
        return compile_library(SOURCE, FUNCTIONS)
    except CannotCompile as error:
        warnings.warn(f"training runs in plain PyTorch, which is slower: {error}", stacklevel=2)
        return None


def is_loaded() -> bool:
    """Whether `library` has returned the compiled steps, without compiling them."""
    return library.cache_info().currsize > 0 and library() is not None


def fits(x: Any) -> bool:
    """Whether the fused steps support the output of a convolution of a tensor (N, C, H, W) in training.

    Tracers, compilers and function transforms use PyTorch's operations.
    """
    return (
        not torch.jit.is_tracing()
        and type(x) is torch.Tensor  # not a proxy of a compiler or tracer
        and x.device.type == "cpu"
        and x.dtype in (torch.float32, torch.bfloat16)
        and x.numel() >= LEAST
        and x.is_contiguous(memory_format=torch.channels_last)
        and torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and not _are_functorch_transforms_active()
        and not is_forward_ad_active()
        and not (torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") == torch.float16)
        and is_loaded()
    )


def is_plain(modules: Sequence[nn.Module]) -> bool:
    """Whether modules are only convolutions, training BatchNorms, ReLUs and `Sequential`s, with no hooks attached."""
    return not _has_any_global_hook() and all(
        (
            type(module) in (nn.Conv2d, nn.ReLU, nn.Sequential)
            or (
                type(module) is nn.BatchNorm2d
                and module.training
                and module.momentum is not None
                and module.running_mean is not None
                and module.weight is not None
                and module.weight.dtype == torch.float32
            )
        )
        and not has_hooks(module)
        for module in modules
    )


def norm_act(
    x: torch.Tensor,
    norm: nn.BatchNorm2d,
    *,
    relu: bool = True,
    add: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Compute act(norm(x) + add).

    Args:
        x: Output (N, C, H, W) of a convolution whose input is supported by `fits`. The backward pass overwrites
            its memory, unless the graph is retained.
        norm: The layer, in training mode; its running statistics are updated.
        relu: Whether to apply ReLU.
        add: Tensor to add before the activation, of x's shape, or None.
        out: Output tensor, such as a slot of `concatenated`, or None.

    Returns:
        (N, C, H, W).
    """
    add = None if add is None else add.to(x.dtype)  # under autocast only convolutions are in bfloat16
    (y,) = _NormAct.apply(norm, relu, 1, [out], x, add, None, norm.weight, norm.bias)
    return y


def norm_act_sum(
    x: torch.Tensor, norm: nn.BatchNorm2d, other: torch.Tensor, out: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute y = ReLU(norm(x)) and y + other, the input of the next group in Eq. 1. See `norm_act`."""
    y, total = _NormAct.apply(norm, True, 1, [out], x, None, other, norm.weight, norm.bias)
    return y, total


def norm_act_split(
    x: torch.Tensor, norm: nn.BatchNorm2d, groups: int, last: torch.Tensor | None = None
) -> tuple[torch.Tensor, ...]:
    """Compute ReLU(norm(x)) in groups of channels, each a separate tensor; `last` is the last one's output tensor."""
    return _NormAct.apply(norm, True, groups, [*[None] * (groups - 1), last], x, None, None, norm.weight, norm.bias)


def slots(group: torch.Tensor, count: int) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Allocate the concatenation of `count` groups of channels.

    For autograd, the groups are not views: the step that computes a group writes it, and `concatenated` joins them in
    the graph.

    Args:
        group: A tensor of the same shape as each group, (N, C, H, W).
        count: Number of groups.

    Returns:
        The concatenation (N, count * C, H, W) and the groups in it, all uninitialized.
    """
    size = group.shape[1]
    whole = _like(group, count * size)
    storage, shape = whole.untyped_storage(), group.shape
    return whole, [
        torch.empty(0, dtype=whole.dtype).set_(storage, i * size, shape, whole.stride()) for i in range(count)
    ]


def concatenated(whole: torch.Tensor, groups: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return the concatenation of groups that were written into its slots."""
    return _Concatenated.apply([whole], *groups)


def into_slot(x: torch.Tensor, slot: torch.Tensor) -> torch.Tensor:
    """Copy a tensor into a slot."""
    return _IntoSlot.apply(x, [slot])


def _dense(x: torch.Tensor | None) -> torch.Tensor | None:
    """Return a tensor with adjacent channels and evenly spaced pixels, or None for None."""
    if x is None:
        return None
    _, _, h, w = x.shape
    n_stride, c_stride, h_stride, w_stride = x.stride()
    if c_stride == 1 and h_stride == w * w_stride and n_stride == h * h_stride and w_stride >= x.shape[1]:
        return x
    # Tensors of one row or column can have arbitrary strides; a copy has the usual ones.
    return torch.empty(x.shape, dtype=x.dtype, memory_format=torch.channels_last).copy_(x)


def _like(x: torch.Tensor, chs: int) -> torch.Tensor:
    n, _, h, w = x.shape
    return torch.empty((n, chs, h, w), dtype=x.dtype, memory_format=torch.channels_last)


# The fields of `Norm` and `Group` in fused_norm.cpp, in order: numbers, or addresses of tensors; in groups, each
# tensor is followed by the distance between its pixels, in elements.
NORM = (
    *("pixels", "channels", "groups", "relu", "weight", "bias", "mean", "invstd", "scale"),
    *("running_mean", "running_var", "dweight", "dbias"),
)
GROUP = ("x", "y", "add", "next", "sum", "dy", "dsum", "dx", "dadd")


def _call(
    backward: bool,
    x: torch.Tensor,
    count: int,
    tensors: dict[str, Any],
    stats: torch.Tensor,
    *numbers: float,
    **kwargs: Any,
) -> None:
    """Run a pass over x in `count` groups of channels.

    Args:
        backward: Whether to run the backward pass.
        x: The input, (N, C, H, W).
        count: Number of groups.
        tensors: For each name in `GROUP` a tensor of all channels, a list of one tensor per group, or None.
        stats: Mean, inverse standard deviation and scale (3, C), written by the forward pass.
        *numbers: Momentum and epsilon, for the forward pass.
        **kwargs: The other fields of `NORM`.
    """
    chs, size, bytes_each = x.shape[1], x.shape[1] // count, x.element_size()
    mean = stats.data_ptr()
    kwargs |= dict(pixels=x.numel() // chs, channels=chs, groups=count)
    kwargs |= dict(mean=mean, invstd=mean + 4 * chs, scale=mean + 8 * chs)
    words = [0 if (value := kwargs.get(name)) is None else _word(value) for name in NORM]
    for i in range(count):
        words += (i * size, size)
        for name in GROUP:
            value = tensors.get(name)
            if value is None:
                words += (0, 0)
            elif isinstance(value, list):
                words += (value[i].data_ptr(), value[i].stride(3))
            else:
                words += (value.data_ptr() + i * size * bytes_each, value.stride(3))
    run = library().backward if backward else library().forward  # type: ignore[union-attr]
    run((ctypes.c_int64 * len(words))(*words), *numbers, torch.get_num_threads(), x.dtype == torch.bfloat16)


def _word(value: Any) -> int:
    return value.data_ptr() if isinstance(value, torch.Tensor) else int(value)


class _NormAct(torch.autograd.Function):
    """Groups of act(norm(x) + add), and of y + other if there is one group."""

    @staticmethod
    def forward(ctx: Any, norm: Any, relu: bool, count: int, outs: list, x: Any, add: Any, other: Any, w: Any, b: Any):
        x, add, other = _dense(x), _dense(add), _dense(other)
        size = x.shape[1] // count
        stats = torch.empty(3, x.shape[1])
        ys = [_like(x, size) if out is None else out for out in outs]
        total = None if other is None else _like(x, size)
        tensors = dict(x=x, y=ys, add=add, next=other, sum=total)
        running = dict(running_mean=norm.running_mean, running_var=norm.running_var)
        _call(False, x, count, tensors, stats, norm.momentum, norm.eps, relu=relu, weight=w, bias=b, **running)
        norm.num_batches_tracked.add_(1)
        # The backward pass computes the sign of activations from x, unless something was added.
        ctx.save_for_backward(x, w, b, stats, add, ys[0] if add is not None and relu else None)
        ctx.relu, ctx.eps, ctx.has_sum, ctx.may_overwrite_x = relu, norm.eps, other is not None, True
        ctx.set_materialize_grads(False)
        return (*ys, total) if total is not None else tuple(ys)

    @staticmethod
    def backward(ctx: Any, *grads: Any):
        x, w, b, stats, add, y = ctx.saved_tensors
        count = len(grads) - ctx.has_sum
        size = x.shape[1] // count
        if torch.is_grad_enabled():
            ctx.may_overwrite_x = False  # double backward reads x again
            return _differentiable(ctx, x, w, b, add, grads)
        if any(grad is None for grad in grads):  # an unused output
            zero = torch.zeros((), dtype=x.dtype).expand(len(x), size, *x.shape[2:])
            grads = tuple(zero if grad is None else grad for grad in grads)
        dense: list[Any] = [_dense(grad) for grad in grads]
        dsum = dense.pop() if ctx.has_sum else None
        # x is the output of a convolution, and is not read after this step.
        dx = x if ctx.may_overwrite_x and not _keeps_graph() else _like(x, x.shape[1])
        dadd = None if add is None else _like(x, size)
        dw, db = torch.empty_like(w), torch.empty_like(b)
        tensors = dict(x=x, y=y, dy=dense, dsum=dsum, dx=dx, dadd=dadd)
        _call(True, x, count, tensors, stats, relu=ctx.relu, bias=b, dweight=dw, dbias=db)
        return None, None, None, None, dx, dadd, dsum, dw, db


def _keeps_graph() -> bool:
    """Whether the current backward pass retains the graph."""
    return _get_current_graph_task_keep_graph()


def _differentiable(ctx: Any, x: Any, w: Any, b: Any, add: Any, grads: Sequence[Any]):
    """Compute the gradients with PyTorch's differentiable operations."""
    # Inputs can depend on each other, such as x on the shortcut; the views do not.
    given = [None if value is None else value.view_as(value) for value in (x, add, w, b)]
    x, add, w, b = given
    y = F.batch_norm(x, None, None, w, b, True, 0.0, ctx.eps)
    y = y if add is None else y + add
    y = F.relu(y) if ctx.relu else y
    grads, total = (grads[:-1], grads[-1]) if ctx.has_sum else (grads, None)
    parts = zip(y.chunk(len(grads), 1), grads, strict=True)
    dy = torch.cat([torch.zeros_like(part) if grad is None else grad for part, grad in parts], 1)
    dy = dy if total is None else dy + total
    found = iter(torch.autograd.grad(y, [value for value in given if value is not None], dy, create_graph=True))
    dx, dadd, dw, db = (None if value is None else next(found) for value in given)
    return None, None, None, None, dx, dadd, total, dw, db


class _Concatenated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, whole: list[torch.Tensor], *groups: torch.Tensor) -> torch.Tensor:
        ctx.sizes = [group.shape[1] for group in groups]
        return whole[0]

    @staticmethod
    def backward(ctx: Any, grad: Any):
        return (None, *grad.split(ctx.sizes, 1))


class _IntoSlot(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, slot: list[torch.Tensor]) -> torch.Tensor:
        return slot[0].copy_(x)

    @staticmethod
    def backward(ctx: Any, grad: Any):
        return grad, None
