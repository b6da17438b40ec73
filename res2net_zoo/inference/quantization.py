"""Post-training quantization to int8: the calibration images, and the quantization of OpenVINO and ONNX models.

Both libraries quantize weights symmetrically with one scale per output channel, and activations with one scale per
tensor, from the values that they have on the calibration images.
"""

import contextlib
import io
import logging
import tempfile
import threading
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from res2net_zoo.utils.packages import require
from res2net_zoo.utils.private_apis import hidden

if TYPE_CHECKING:
    import onnx
    import openvino

MINIMUM = 32  # calibration images
CALIBRATION_IMAGES = 300  # maximum, as by default in NNCF; more change the scales little
# Maximum root mean square error of int8 logits, relative to that of the logits; the models of the family have 0.005 to
# 0.1.
TOLERANCE = 0.25
NOISE = 0.2  # correlation of neighbouring pixels, which is 0 in random noise and 0.8 to 1 in photographs
OVERSHOOT = 0.05  # pixels outside of 0 to 1 by less than this may be due to interpolation
NARROW = 0.5  # the pixels of many images, in at least one channel, use more than this part of the range 0 to 1
INT8_INSTRUCTIONS = {"avx512_vnni", "avx_vnni", "amx_int8", "asimddp", "i8mm"}
OTHER_NORMS = (nn.InstanceNorm2d, nn.GroupNorm, nn.LayerNorm)  # which cannot be folded
# Operations that ONNX Runtime quantizes. It cannot quantize a decomposed GroupNorm.
OPERATIONS = [
    *("Conv", "ConvTranspose", "Gemm", "MatMul", "Add", "Relu", "Clip", "MaxPool", "AveragePool", "GlobalAveragePool"),
    *("Concat", "Split", "Slice", "Pad", "Resize", "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Transpose"),
]

QUANTIZING = threading.Lock()  # `_quiet` changes settings of the process


def check_calibration(model: nn.Module, images: torch.Tensor | Iterable[torch.Tensor] | None) -> torch.Tensor:
    """Check the calibration images of a model.

    Args:
        model: The model. If it has timm's `pretrained_cfg`, the normalization of the images is checked.
        images: Preprocessed images (N, C, H, W), or an iterable of such tensors.

    Returns:
        At most 300 of them in float32 on the CPU, evenly spaced, or the first 300 of an iterable.

    Raises:
        ValueError: They are missing, fewer than 32, not (N, C, H, W) floats of the model's channels, NaN or infinite,
            constant or random noise.
    """
    if images is None:
        raise ValueError(
            "int8 needs calibration images: pass a few hundred preprocessed images (N, C, H, W) of the training data"
        )
    checked = _collected(images)
    if len(checked) < MINIMUM:
        raise ValueError(
            f"there are {len(checked)} calibration images; int8 needs at least {MINIMUM}, better {CALIBRATION_IMAGES}"
        )
    first = next((module for module in model.modules() if isinstance(module, nn.Conv2d)), None)
    if first is not None and first.in_channels != checked.shape[1]:
        raise ValueError(f"calibration images have {checked.shape[1]} channels; the model needs {first.in_channels}")
    if not checked.isfinite().all():
        raise ValueError("calibration images have NaN or infinite pixels")
    correlation = _correlation(checked)
    if not correlation > NOISE:
        what = "constant" if correlation != correlation else f"random noise (neighbouring pixels: {correlation:.2f})"
        raise ValueError(f"calibration images look like {what}; pass real images, whose neighbouring pixels correlate")
    _warn_of_normalization(model, checked)
    return checked


def _collected(images: torch.Tensor | Iterable[torch.Tensor]) -> torch.Tensor:
    """Return at most `CALIBRATION_IMAGES` images as one tensor in float32 on the CPU.

    Raises:
        ValueError: They are not (N, C, H, W) floats.
    """
    parts: list[torch.Tensor] = []
    for part in [images] if isinstance(images, torch.Tensor) else images:
        if not isinstance(part, torch.Tensor) or part.ndim != 4 or not part.is_floating_point():
            found = f"{tuple(part.shape)}, {part.dtype}" if isinstance(part, torch.Tensor) else type(part).__name__
            raise ValueError(
                f"calibration images are {found}; they must be preprocessed images, (N, C, H, W) floats, "
                "in one tensor or several"
            )
        if parts and part.shape[1:] != parts[0].shape[1:]:
            raise ValueError("calibration images have different sizes; preprocess all of them to the same")
        parts.append(part.detach())
        if not isinstance(images, torch.Tensor) and sum(map(len, parts)) >= CALIBRATION_IMAGES:
            break
    if not parts:
        return torch.zeros(0, 1, 1, 1)
    every = torch.cat(parts)
    if not isinstance(images, torch.Tensor):
        every = every[:CALIBRATION_IMAGES]
    return every[evenly_spaced(len(every), CALIBRATION_IMAGES)].float().cpu()


def evenly_spaced(number: int, most: int) -> list[int]:
    """Return at most `most` evenly spaced indices of a number of items."""
    return [i * number // min(number, most) for i in range(min(number, most))]


def _correlation(images: torch.Tensor) -> float:
    """Return the median correlation of neighbouring pixels of the images that are not constant; NaN if all are."""
    centred = images - images.mean((2, 3), keepdim=True)
    variance = centred.square().mean((1, 2, 3))
    ways = [(centred[..., 1:] * centred[..., :-1]), (centred[..., 1:, :] * centred[..., :-1, :])]
    products = torch.stack([way.mean((1, 2, 3)) for way in ways]).mean(0)
    return (products / variance)[variance > 1e-8 * images.square().mean()].median().item()


def _warn_of_normalization(model: nn.Module, images: torch.Tensor) -> None:
    """Warn if the range of the pixels does not fit the normalization of a timm model."""
    config: Any = getattr(model, "pretrained_cfg", None) or {}
    mean, std = config.get("mean"), config.get("std")
    if not mean or not std or len(mean) not in (1, images.shape[1]):
        return
    mean, std = (torch.tensor(values, dtype=torch.float32).view(1, -1, 1, 1) for values in (mean, std))
    pixels = images * std + mean
    low, high = pixels.amin((0, 2, 3)), pixels.amax((0, 2, 3))
    if low.min() < -OVERSHOOT or high.max() > 1 + OVERSHOOT or (high - low).max() < NARROW:
        least, most = ((-mean / std).min().item(), ((1 - mean) / std).max().item())
        warnings.warn(
            f"the pixels of the calibration images are from {images.min():.3g} to {images.max():.3g}, but the model's "
            f"normalization gives {least:.3g} to {most:.3g}; preprocess them as for evaluation, or int8 loses accuracy",
            stacklevel=5,  # the caller of `optimize`
        )


def rms_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the root mean square error of logits, relative to that of the expected logits."""
    return ((found - expected).norm() / expected.norm().clamp(min=1e-12)).item()


def instruction_sets() -> set[str] | None:
    """Return the names of the processor's instruction sets as in /proc/cpuinfo, or None on other systems."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return None
    flags = next((line.split(":", 1)[1] for line in lines if line.startswith(("flags", "Features"))), None)
    return None if flags is None else set(flags.split())


def has_int8_instructions() -> bool:
    """Return whether the processor has dot products of int8 (VNNI, AMX, or Arm's), as far as is known."""
    known = instruction_sets()
    return known is None or bool(known & INT8_INSTRUCTIONS)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Suppress progress bars, log messages and telemetry of the quantization libraries, one thread at a time."""
    root, disabled, logger_class = logging.getLogger(), logging.root.manager.disable, logging.getLoggerClass()
    silent = logging.NullHandler()  # without a handler, `logging.warning` installs one that prints
    with QUANTIZING, hidden("openvino_telemetry"), contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        root.addHandler(silent)
        logging.disable(logging.ERROR)
        try:
            yield
        finally:
            logging.disable(disabled)
            root.removeHandler(silent)
            logging.setLoggerClass(logger_class)  # NNCF sets its own


def quantize_openvino(network: "openvino.Model", images: torch.Tensor, half_range: bool = False) -> "openvino.Model":
    """Quantize an OpenVINO model by NNCF's post-training quantization.

    Args:
        network: The model, with a dynamic batch size or one of 1; it is not modified.
        images: Calibration images (N, C, H, W).
        half_range: Whether weights use 7 bits, for processors without VNNI, whose sums of two products saturate.

    Returns:
        The model with FakeQuantize operations and int8 weights.

    Raises:
        InputError: NNCF is not installed.
    """
    require("int8 by OpenVINO needs", "int8", "nncf")
    with _quiet():
        import nncf

        overflow = nncf.OverflowFix.ENABLE if half_range else nncf.OverflowFix.DISABLE
        return nncf.quantize(
            network,
            nncf.Dataset([image.numpy() for image in images.split(1)]),
            preset=nncf.QuantizationPreset.PERFORMANCE,  # symmetric activations, faster than asymmetric ones
            target_device=nncf.TargetDevice.CPU,
            subset_size=len(images),
            advanced_parameters=nncf.AdvancedQuantizationParameters(overflow_fix=overflow),
        )


def quantize_onnx(proto: "onnx.ModelProto", images: torch.Tensor, half_range: bool = False) -> "onnx.ModelProto":
    """Quantize an ONNX model by ONNX Runtime's static quantization, with uint8 activations and int8 weights.

    Args:
        proto: The model with one input, with a dynamic batch size or one of 1; it is not modified.
        images: Calibration images (N, C, H, W).
        half_range: Whether weights use 7 bits, for processors without VNNI, whose sums of two products saturate.

    Returns:
        The model with QuantizeLinear and DequantizeLinear operations (QDQ).

    Raises:
        InputError: onnx or onnxruntime is not installed.
    """
    require("int8 by ONNX Runtime needs", "int8", "onnx", "onnxruntime")
    with _quiet(), tempfile.TemporaryDirectory() as folder:
        import onnx
        from onnxruntime import quantization

        class Reader(quantization.CalibrationDataReader):
            def __init__(self) -> None:
                self.left = iter(images.split(1))

            def get_next(self) -> dict[str, np.ndarray] | None:
                image = next(self.left, None)
                return None if image is None else {proto.graph.input[0].name: image.numpy()}

        copied, file = onnx.ModelProto(), Path(folder) / "quantized.onnx"
        copied.CopyFrom(proto)  # the quantizer moves the weights of its input to a file
        quantization.quantize_static(
            copied,
            file,
            Reader(),
            quant_format=quantization.QuantFormat.QDQ,
            op_types_to_quantize=OPERATIONS,
            per_channel=True,
            reduce_range=half_range,
            activation_type=quantization.QuantType.QUInt8,
            weight_type=quantization.QuantType.QInt8,
        )
        return onnx.load(file)


def float_layers(quantized: "openvino.Model | onnx.ModelProto") -> list[str]:
    """Return the convolutions and linear layers that a quantized model computes in float, in its order.

    Args:
        quantized: A model of `quantize_openvino` or `quantize_onnx`.

    Returns:
        Names of the layers as in the model, such as `layer1.0.conv1`, or of operations without weights.
    """
    names = _float_in_onnx(quantized) if hasattr(quantized, "graph") else _float_in_openvino(quantized)
    return [name.removesuffix(".weight") for name in names]


def _float_in_onnx(proto: Any) -> Iterator[str]:
    made = {output: node.op_type for node in proto.graph.node for output in node.output}
    weights = {tensor.name for tensor in proto.graph.initializer}
    for node in proto.graph.node:
        if node.op_type in ("Conv", "ConvTranspose", "Gemm", "MatMul"):
            inputs = node.input[:2]
            if any(made.get(name) != "DequantizeLinear" for name in inputs):
                yield next((name for name in inputs if name in weights), node.name)


def _float_in_openvino(network: Any) -> Iterator[str]:
    kinds = ("Convolution", "GroupConvolution", "ConvolutionBackpropData", "GroupConvolutionBackpropData", "MatMul")
    for operation in network.get_ordered_ops():
        if operation.get_type_name() in kinds:
            weight = operation.input_value(1).get_node()
            while weight.get_type_name() in ("Reshape", "Transpose"):  # of a grouped convolution
                weight = weight.input_value(0).get_node()
            if weight.get_type_name() not in ("FakeQuantize", "Multiply"):
                constant = weight.get_type_name() == "Constant"
                yield (weight if constant else operation).get_friendly_name()


def float_norms(model: nn.Module, folded: nn.Module) -> list[str]:
    """Return the names of a model's norms that are not folded into convolutions; norms are never quantized.

    Args:
        model: The model.
        folded: The same with BatchNorm folded; a traced model has only the operations of other norms.
    """
    left = dict(folded.named_modules())
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, OTHER_NORMS)
        or (isinstance(module, nn.BatchNorm2d) and isinstance(left.get(name), nn.BatchNorm2d))
    ]
