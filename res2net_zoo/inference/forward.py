"""The forward pass of a program: plain PyTorch, or a backend of `optimize` that all processes share."""

import copy
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import nn

from res2net_zoo.data.preprocessing import data_config
from res2net_zoo.utils.console import warn
from res2net_zoo.utils.errors import InputError, one_line
from res2net_zoo.utils.processes import all_or_none, autocasting

if TYPE_CHECKING:
    from res2net_zoo.inference.optimization import Optimized

PRECISIONS = {"no": "float32", "bf16": "bfloat16", "fp16": "float16"}  # Accelerate's name: torch's
TORCH = "torch"


class Forward(NamedTuple):
    """A forward pass.

    Attributes:
        call: Maps images (N, C, H, W), normalized, to logits (N, classes) in any precision.
        backend: `torch` for plain PyTorch, else the backend of `optimize`.
        calibration_images: Number of images that calibrated an int8 network; 0 in float.
    """

    call: Callable[[torch.Tensor], torch.Tensor]
    backend: str
    calibration_images: int = 0


def create_forward(
    model: Any, backend: str, accelerator: Accelerator, batch_size: int, calibration: torch.Tensor | None = None
) -> Forward:
    """Return the forward pass of a model with a backend, in the accelerator's precision or in int8.

    With `auto`, the main process compares the backends, and all processes use the fastest, because the last digits of
    logits depend on the backend. In int8 each process quantizes the model identically.

    Args:
        model: A timm model on the accelerator's device, in eval mode.
        backend: `torch` for plain PyTorch, or a backend of `optimize`.
        accelerator: Determines device and precision.
        batch_size: Images of a typical batch; other batches are supported as well.
        calibration: For int8, images (N, C, H, W) of the model's size, the same in all processes.

    Raises:
        InputError: No backend can run the model; raised in all processes.
    """
    if backend == TORCH:
        return Forward(autocasting(model, accelerator), TORCH)
    shape = (batch_size, *data_config(model)["input_size"])
    # Noise is sufficient to compare backends, and is the same in all processes.
    example = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(accelerator.device)

    def compiled(name: str) -> Forward:
        optimized = _optimized(model, example, name, accelerator, calibration)
        return Forward(optimized, optimized.backend, optimized.calibration_images)

    first = all_or_none(lambda: compiled(backend) if accelerator.is_main_process else None)
    (chosen,) = broadcast_object_list([first and first.backend])
    return all_or_none(lambda: first or compiled(chosen))


def accelerate_features(
    backbone: nn.Module, backend: str, accelerator: Accelerator, calibration: torch.Tensor | None = None
) -> None:
    """Run a backbone with a backend, in the accelerator's precision or in int8.

    The backend is prepared by the first call. With `auto` it is the fastest for the images of that call, in int8 for a
    calibration image.

    Args:
        backbone: A part of a larger network, in eval mode, which returns maps; its method `forward` is replaced, as
            Accelerate does.
        backend: `torch` for plain PyTorch, which changes nothing, or a backend of `optimize`.
        accelerator: Determines the precision.
        calibration: For int8, images (N, C, H, W); those of a call may have another size.

    Raises:
        InputError: No backend can run the backbone; raised by its first call.
    """
    if backend == TORCH:
        return
    original = copy.copy(backbone)  # shares the layers, and keeps the method
    optimized: Optimized | None = None

    def forward(images: torch.Tensor) -> Any:
        nonlocal optimized
        if optimized is None:
            with torch.inference_mode(False), torch.no_grad(), torch.autocast(images.device.type, enabled=False):
                example = images.clone() if calibration is None else calibration[:1]
                optimized = _optimized(original, example, backend, accelerator, calibration)
        return optimized(images)

    backbone.forward = forward


def _optimized(
    model: nn.Module,
    example: torch.Tensor,
    backend: Any,
    accelerator: Accelerator,
    calibration: torch.Tensor | None = None,
) -> "Optimized":
    """Optimize a model in the accelerator's precision, or in int8; print its warnings.

    Raises:
        InputError: No backend can run the model.
    """
    from res2net_zoo.inference.optimization import optimize  # imports the backends' libraries
    from res2net_zoo.inference.quantization import check_calibration

    precision: Any = PRECISIONS[accelerator.mixed_precision] if calibration is None else "int8"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if calibration is not None:
            try:
                calibration = check_calibration(model, calibration)
            except ValueError as error:
                raise InputError(one_line(error), "calibrate") from error
            caught.clear()  # `optimize` repeats them
        try:
            optimized = optimize(model, example, precision, backend, calibration)
        except ValueError as error:
            raise InputError(one_line(error), "backend", "mixed_precision") from error
    for warning in caught:
        if issubclass(warning.category, UserWarning):
            warn(str(warning.message))
    return optimized
