"""Optimized inference: `optimize(model, example_input)`."""

import copy
import hashlib
import itertools
import json
import platform
import statistics
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast, get_args

import torch
import torch.nn.functional as F
from huggingface_hub import cached_assets_path
from timm.layers import AvgPool2dSame
from timm.utils import reparameterize_model
from torch import fx, nn
from torch.fx.experimental.optimization import fuse

from res2net_zoo.inference.backends import BACKENDS, Backend, Call, Precision, Unavailable, each
from res2net_zoo.inference.quantization import TOLERANCE as INT8_TOLERANCE
from res2net_zoo.inference.quantization import (
    check_calibration,
    evenly_spaced,
    float_norms,
    has_int8_instructions,
    rms_error,
)
from res2net_zoo.kernels.cpu_network import Unsupported
from res2net_zoo.models.block import Res2NetModule
from res2net_zoo.utils.errors import InputError, one_line
from res2net_zoo.utils.files import is_special, read_json, write_atomically
from res2net_zoo.utils.timing import by_turns

# Multiples to which the widths of groups are padded: the channels that a GPU's matrix units process at a time in half
# precision, and those that a thread reads at a time.
PADDED: dict[str, int] = {"inductor-padded": 16, "triton": 8}
RETURN_LISTS = ("native", "inductor", "inductor-padded", "eager")  # backends of models that return several tensors
TOLERANCE = 1e-4  # maximum error of float32 logits, relative to the largest
TF32_TOLERANCE = 2e-2  # the same if the model's own logits have the 3 decimals of TF32
COMPARED = 64  # calibration images for which the logits of int8 backends are compared
COMPARED_MAPS = 8  # those for which maps are compared, which take about 10 MB each
INT8_PACKAGES = ("onnx", "onnxscript", "onnxruntime", "openvino", "nncf")
NAMED = 8  # layers in the warning about layers in float
ROUNDS = 5  # timings of each backend
PAUSE = 0.02  # seconds before each timing, in which the threads of the previous backend become idle
CHANGED = 1.5  # a cached choice is repeated if its time differs by this factor, because the machine was busy or is
CANNOT_RUN = "the backend {name} cannot run this model here ({error}); another is used"
CANNOT_RUN_NOW = "{name}, the fastest backend so far, cannot run this model any more ({error})"


@dataclass(frozen=True)
class Optimized:
    """A model optimized for inference.

    Attributes:
        backend: The backend that runs it.
        precision: Type of activations and weights; logits and maps are always float32.
        milliseconds: Time of each backend for the example; empty if backends were not compared.
        classes: Number of logits per image; None if the model returns feature maps.
        calibration_images: Number of calibration images that were used; 0 in float.
        float_layers: Names of the layers that an int8 network computes in float; empty in float.
    """

    call: Call
    backend: Backend
    precision: Precision
    milliseconds: dict[Backend, float]
    classes: int | None
    calibration_images: int = 0
    float_layers: tuple[str, ...] = ()

    @torch.no_grad()
    def __call__(self, images: torch.Tensor) -> Any:
        """Compute the model's output.

        Args:
            images: Normalized images (N, C, H, W) of any number, including 0, and any size that the model
                supports, on the example's device. Sizes other than the example's can require a compilation of
                several seconds; networks are cached for the last few sizes.

        Returns:
            Logits (N, classes) in float32, or the map (N, C, h, w), list or tuple of maps that the model returns.
            Images with NaN or infinite pixels get the same logits as from the model.

        Raises:
            ValueError: The images are not (N, C, H, W), or on another device.
        """
        if images.ndim != 4:
            raise ValueError(f"images have the shape {tuple(images.shape)}, not (N, C, H, W)")
        if not len(images) and self.classes is not None:
            return images.new_zeros((0, self.classes), dtype=torch.float32)
        if not len(images):
            one = self.call(images.new_zeros((1, *images.shape[1:])))
            return each(lambda tensor: tensor[:0].float(), one)
        return each(torch.Tensor.float, self.call(images))


def optimize(
    model: nn.Module,
    example_input: torch.Tensor,
    precision: Precision = "float32",
    backend: Backend | Literal["auto"] = "auto",
    calibration: torch.Tensor | Iterable[torch.Tensor] | None = None,
    cache_dir: str | Path | None = None,
    refresh: bool = False,
) -> Optimized:
    """Optimize a model for inference on this machine.

    BatchNorm is folded into the convolutions. With `backend="auto"`, interleaved timings of the example compare the
    backends that are available without torch.compile, and select the fastest. The choice is cached with its time in
    huggingface_hub's assets cache; if the backend's time differs much from it later, the comparison is repeated. The
    selected backend reproduces the model's logits for the example, in float32 to 1e-4 of the largest, and in int8 for
    the calibration images with a root mean square error of at most a quarter of that of the logits.

    Args:
        model: A model that maps images to logits, to a feature map (N, C, h, w), or to a list or tuple of maps, such as
            `timm.create_model(..., features_only=True)`. It is not modified; its copy is in eval mode.
        example_input: Typical images (N, C, H, W); the fastest backend depends on their number, size and device.
        precision: Type of activations and weights; int8 is post-training quantization, on CPUs.
        backend: `"native"` (CPU: the zoo's own machine code, needs a C++ compiler), `"openvino"`,
            `"onnxruntime"` (CPU, the package of that name), `"inductor"` (torch.compile with frozen
            weights; on a GPU with CUDA graphs; its first call takes a minute or more),
            `"inductor-padded"` (the same, the groups' widths padded to multiples of 16), `"triton"` (NVIDIA GPU,
            bfloat16 and float16: the zoo's own kernels), `"cudagraphs"` (GPU: eager, without the cost of launching
            kernels), `"eager"`, or `"auto"`. An unavailable backend is replaced by the fastest other one, with a
            warning that gives the reason. The first three support int8; the extra `int8` installs their libraries.
        calibration: For int8, preprocessed images (N, C, H, W) of the example's size, or an iterable of such tensors:
            at least 32, better a few hundred, typical of the images to classify. At most 300 are used. Other
            precisions ignore it.
        cache_dir: Folder for cached choices; defaults to huggingface_hub's assets cache.
        refresh: Whether to compare the backends again instead of using a cached choice.

    Returns:
        The model as a function from images to logits.

    Raises:
        ValueError: The precision or backend is unknown, the images are not (N, C, H, W) floats, the model returns
            NaN or infinite logits for them, no backend can run it, or the calibration images are invalid.
    """
    _check_request(example_input, precision, backend)
    device, example = example_input.device, example_input.detach().float()
    images = _calibration(model, example, calibration) if precision == "int8" else None
    model = copy.deepcopy(model).eval().to(device).requires_grad_(False)
    folded = fold_batch_norm(model)
    reference = Reference.of(model, example, images)
    classes = reference.output.shape[1] if is_logits(reference.output) else None
    single = isinstance(reference.output, torch.Tensor)
    build = partial(
        _build, model=model, folded=folded, example=example, reference=reference, precision=precision, images=images
    )
    key = partial(_key, folded, example, precision, calibration=images)
    ready = [name for name in candidates(device, precision) if single or name in RETURN_LISTS]
    name, call, milliseconds = _choose(build, key, backend, ready, example, precision, cache_dir, refresh)
    fast = Optimized(call, name, precision, milliseconds, classes)
    if images is None:
        return fast
    return replace(fast, calibration_images=len(images), float_layers=_float_layers(call, model, folded))


def _choose(
    build: Callable[[Backend], Call],
    key: Callable[[list[Backend]], str],
    backend: Backend | Literal["auto"],
    ready: list[Backend],
    example: torch.Tensor,
    precision: Precision,
    cache_dir: str | Path | None,
    refresh: bool,
) -> tuple[Backend, Call, dict[Backend, float]]:
    """Return the requested backend, or else the cached or the fastest one, and the times if they were compared.

    Raises:
        ValueError: No backend can run the model.
    """
    if backend != "auto":
        if call := _build_or_warn(build, backend, CANNOT_RUN):
            return backend, call, {}
        ready = [name for name in ready if name != backend] or [backend]  # whose failure the error explains

    cached = key(ready)
    calls: dict[Backend, Call] = {}
    kept = None if refresh else _read_choice(cached, cache_dir, ready)
    if kept and (call := _build_or_warn(build, kept.backend, CANNOT_RUN_NOW)):
        if _takes(call, example, kept.milliseconds):
            return kept.backend, call, {}
        calls = {kept.backend: call}
    calls |= _build_all(build, [name for name in ready if name not in calls], precision, required=not calls)
    milliseconds = dict(zip(calls, time_interleaved(list(calls.values()), example), strict=True))
    fastest = min(calls, key=lambda name: milliseconds[name])
    _keep_choice(cached, cache_dir, {"backend": fastest, "milliseconds": milliseconds})
    return fastest, calls[fastest], milliseconds


class Reference(NamedTuple):
    """Images (N, C, H, W) and the model's output for them, to which that of each backend is compared."""

    images: torch.Tensor
    output: Any

    @classmethod
    def of(cls, model: nn.Module, example: torch.Tensor, calibration: torch.Tensor | None) -> "Reference":
        """Compute the output for the example, or else for calibration images.

        Raises:
            ValueError: The model does not return logits or maps, or they are NaN or infinite.
        """
        output = _output_of(model, example)
        if calibration is None:
            return cls(example, output)
        batch = len(example)
        chosen = torch.tensor(evenly_spaced(len(calibration), COMPARED if is_logits(output) else COMPARED_MAPS))
        # Whole batches, for which a backend has a network; a larger batch than the images repeats them.
        chosen = chosen[torch.arange(batch * max(1, len(chosen) // batch)) % len(chosen)]
        parts = [_output_of(model, part) for part in calibration[chosen].split(batch)]
        return cls(calibration[chosen], _joined(parts))

    @torch.no_grad()
    def check(self, call: Call, batch: int, precision: Precision) -> None:
        """Check the output of a backend.

        Args:
            call: The backend.
            batch: Number of images per call.
            precision: Its precision.

        Raises:
            Unavailable: They differ.
        """
        parts = [each(torch.Tensor.float, call(part)) for part in self.images.split(batch)]
        check(_joined(parts), self.output, precision)


def _joined(parts: list[Any]) -> Any:
    """Return the output for all images from that for some of them each."""
    if isinstance(parts[0], torch.Tensor):
        return torch.cat(parts)
    return [torch.cat(same) for same in zip(*parts, strict=True)]


def _calibration(
    model: nn.Module, example: torch.Tensor, calibration: torch.Tensor | Iterable[torch.Tensor] | None
) -> torch.Tensor:
    """Check the calibration images, and warn if the processor has no instructions for int8.

    Raises:
        ValueError: They are invalid or not of the example's size.
    """
    images = check_calibration(model, calibration)
    if images.shape[2:] != example.shape[2:]:
        sizes = ["x".join(map(str, shape[2:])) for shape in (images.shape, example.shape)]
        raise ValueError(f"calibration images are {sizes[0]} and example_input is {sizes[1]}; use the same size")
    if not has_int8_instructions():
        warnings.warn("this processor has no VNNI instructions; int8 is hardly faster than float32 on it", stacklevel=3)
    return images


def _float_layers(call: Call, model: nn.Module, folded: nn.Module) -> tuple[str, ...]:
    """Return the names of the layers that an int8 network computes in float, with a warning."""
    names = (*getattr(call, "float_layers", ()), *float_norms(model, folded))
    if names:
        more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
        warnings.warn(f"layers that remain in float: {', '.join(names[:NAMED])}{more}", stacklevel=3)
    return names


def _check_request(example_input: torch.Tensor, precision: str, backend: str) -> None:
    """Check the arguments of `optimize`.

    Raises:
        ValueError: An argument is invalid.
    """
    if precision not in get_args(Precision):
        raise ValueError(f"precision is {precision!r}; it must be one of {', '.join(get_args(Precision))}")
    if backend not in (*get_args(Backend), "auto"):
        raise ValueError(f"backend is {backend!r}; it must be one of auto, {', '.join(get_args(Backend))}")
    if example_input.ndim != 4 or not example_input.is_floating_point() or not len(example_input):
        raise ValueError(
            f"example_input is {tuple(example_input.shape)}, {example_input.dtype}; it must be (N, C, H, W) floats"
        )
    if precision == "int8" and example_input.device.type != "cpu":
        raise ValueError("int8 is supported on CPUs only; use bfloat16 or float16 on a GPU")
    if precision == "float16" and example_input.device.type == "cpu":
        raise ValueError("float16 needs a GPU; use float32 or bfloat16 on the CPU")


def is_logits(output: Any) -> bool:
    """Return whether a model's output is logits (N, classes)."""
    return isinstance(output, torch.Tensor) and output.ndim == 2


def _output_of(model: nn.Module, example: torch.Tensor) -> Any:
    """Return the logits or maps of a model, as a reference for each backend.

    Raises:
        ValueError: The model returns neither, or they are NaN or infinite.
    """
    with torch.no_grad():
        expected = model(example)
    tensors = list(expected) if isinstance(expected, list | tuple) else [expected]
    if not is_logits(expected) and not all(isinstance(x, torch.Tensor) and x.ndim == 4 for x in tensors):
        found = ", ".join(str(tuple(x.shape)) if isinstance(x, torch.Tensor) else type(x).__name__ for x in tensors)
        raise ValueError(
            f"the model returns {found}, not logits (N, classes) or maps (N, C, H, W); add a classifier or pooling"
        )
    if not all(x.isfinite().all() for x in tensors):
        raise ValueError(_why_not_finite(model, example))
    return expected


def _build(
    name: Backend,
    model: nn.Module,
    folded: nn.Module,
    example: torch.Tensor,
    reference: Reference,
    precision: Precision,
    images: torch.Tensor | None,
) -> Call:
    """Build a model with one backend, and check its output.

    Raises:
        Unavailable: The backend fails or returns a different output.
    """
    if not isinstance(reference.output, torch.Tensor) and name not in RETURN_LISTS:
        raise Unavailable("it supports models that return a single tensor only")
    try:
        network = fold_batch_norm(model, PADDED[name]) if name in PADDED else folded
        call = BACKENDS[name](network, example, precision, images)
        reference.check(call, len(example), precision)
        return call
    except Exception as error:  # compilers raise any type; the other backends are tried
        known = isinstance(error, (Unavailable, Unsupported, InputError))
        raise Unavailable(f"{'' if known else type(error).__name__ + ': '}{one_line(error)}") from error


def _build_or_warn(build: Callable[[Backend], Call], name: Backend, warning: str) -> Call | None:
    """Build a model with one backend; if it is unavailable, warn the caller of `optimize` and return None."""
    try:
        return build(name)
    except Unavailable as error:
        warnings.warn(warning.format(name=name, error=error), stacklevel=4)
        return None


def _build_all(
    build: Callable[[Backend], Call], ready: list[Backend], precision: Precision, required: bool
) -> dict[Backend, Call]:
    """Build a model with each backend that can run it.

    Raises:
        ValueError: No backend can run it, and one is required.
    """
    calls: dict[Backend, Call] = {}
    reasons = []
    for name in ready:
        try:
            calls[name] = build(name)
        except Unavailable as error:
            reasons.append(f"{name}: {error}")
            if name == "native":  # expected to run everywhere
                warnings.warn(CANNOT_RUN.format(name=name, error=error), stacklevel=4)
    if required and not calls:
        missing = precision == "int8" and not all(map(find_spec, INT8_PACKAGES))
        hint = "; pip install 'res2net-zoo[int8]' for more" if missing else ""
        raise ValueError(f"no backend can run this model here in {precision}: {'; '.join(reasons)}{hint}")
    return calls


def _why_not_finite(model: nn.Module, example: torch.Tensor) -> str:
    """Return the probable reason for NaN or infinite logits."""
    if not example.isfinite().all():
        return "example_input has NaN or infinite values"
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            return f"the model's {name} has NaN or infinite values; load other weights"
    return "the model returns NaN or infinite logits for example_input; check its weights"


def fold_batch_norm(model: nn.Module, multiple: int = 1) -> nn.Module:
    """Return a copy of a model with each BatchNorm folded into the preceding convolution, for inference.

    Blocks are folded by their method `reparameterize`, timm's convention; stems and shortcuts by tracing the model.

    Args:
        model: A model in eval mode.
        multiple: Pad the widths of the groups in Res2Net blocks to a multiple of this.
    """
    folded = reparameterize_model(model)
    replace_same_pooling(folded)
    for module in folded.modules():
        if isinstance(module, Res2NetModule):
            pad_width(module, multiple)
    try:
        return fuse(folded)
    except Exception:  # the remaining BatchNorms stay if the model cannot be traced
        return folded


@torch.no_grad()
def replace_same_pooling(model: nn.Module) -> None:
    """Replace the 2x2 average pooling with stride 1 in the shortcuts of dilated stages by depthwise convolutions.

    timm's `AvgPool2dSame` computes its padding from the size of its input, which cannot be traced. With stride 1 it is
    always one row and one column of zeros at the end, and the average includes them.
    """
    for shortcut in [module for module in model.modules() if isinstance(module, nn.Sequential)]:
        for i, (pool, conv) in enumerate(itertools.pairwise(shortcut)):
            if (
                isinstance(pool, AvgPool2dSame)
                and (pool.kernel_size, pool.stride) == ((2, 2), (1, 1))
                and isinstance(conv, nn.Conv2d)
            ):
                chs, like = conv.in_channels, conv.weight
                mean = nn.Conv2d(chs, chs, 3, padding=1, groups=chs, bias=False).to(like.device, like.dtype)
                mean.weight.zero_()[:, :, 1:, 1:] = 1 / 4
                shortcut[i] = mean.requires_grad_(False)


@torch.no_grad()
def pad_width(block: Res2NetModule, multiple: int) -> None:
    """Pad a block's groups with zero channels, for hardware that processes a fixed number of channels at a time.

    Grouped convolutions, and those whose BatchNorm is not folded, are not padded. The output does not change.

    Args:
        block: A block after `reparameterize`.
        multiple: The width becomes a multiple of this.
    """
    width = block.conv1.out_channels // block.scale
    more = -width % multiple
    if not more or cast(nn.Conv2d, block.convs[0]).groups > 1 or block.conv1.bias is None:
        return

    def widen(conv: nn.Conv2d, outputs: int, inputs: int) -> nn.Conv2d:
        """Copy a convolution, padding each of its groups of outputs and of inputs; 0 groups keeps the channels."""
        weight, bias = conv.weight, conv.bias
        if outputs:
            weight = F.pad(weight.unflatten(0, (outputs, width)), (0, 0) * 3 + (0, more)).flatten(0, 1)
            bias = bias if bias is None else F.pad(bias.unflatten(0, (outputs, width)), (0, more)).flatten()
        if inputs:
            weight = F.pad(weight.unflatten(1, (inputs, width)), (0, 0) * 2 + (0, more)).flatten(1, 2)
        new = copy.copy(conv)
        new._parameters = dict(conv._parameters)
        new.weight, new.bias = nn.Parameter(weight), None if bias is None else nn.Parameter(bias)
        new.out_channels, new.in_channels = weight.shape[:2]
        return new

    block.conv1 = widen(block.conv1, block.scale, 0)
    block.convs = nn.ModuleList(widen(cast(nn.Conv2d, conv), 1, 1) for conv in block.convs)
    block.conv3 = widen(block.conv3, 0, block.scale)


def candidates(device: torch.device, precision: Precision, slow: bool = False) -> list[Backend]:
    """Return the backends that are available for a device.

    Args:
        device: The device.
        precision: Type of activations and weights.
        slow: Whether to include those of torch.compile, which take a minute or more to be ready.
    """
    found: list[Backend] = []
    if device.type == "cuda":
        if precision != "float32":
            found.append("triton")
        found += ["cudagraphs", *(("inductor", "inductor-padded") if slow else ())]
    elif device.type == "cpu":
        found.append("native")
        if find_spec("openvino") and (precision != "int8" or find_spec("nncf")):
            found.append("openvino")
        if find_spec("onnxruntime") and find_spec("onnxscript"):
            found.append("onnxruntime")
        if slow and precision != "int8":
            found.append("inductor")
    return found if precision == "int8" else [*found, "eager"]


def check(found: Any, expected: Any, precision: Precision) -> None:
    """Check the logits of a backend, or each of its maps, against the model's.

    Raises:
        Unavailable: They differ.
    """
    if not isinstance(expected, torch.Tensor):
        for one, other in zip(found, expected, strict=True):
            check(one, other, precision)
        return
    if found.shape != expected.shape:
        raise Unavailable(f"it returns {tuple(found.shape)} instead of {tuple(expected.shape)}")
    if precision == "int8":
        if not (error := rms_error(found, expected)) <= INT8_TOLERANCE:
            raise Unavailable(f"the error of its logits is {error:.2g} of the logits, more than {INT8_TOLERANCE:g}")
        return
    error = ((found - expected).abs().max() / expected.abs().max().clamp(min=1e-12)).item()
    # Half precision has 3 decimals, some of which a deep network loses.
    exact = TF32_TOLERANCE if uses_tf32(expected.device) else TOLERANCE
    allowed = exact if precision == "float32" else 0.1
    if not error <= allowed:
        kind = "logits" if is_logits(expected) else "maps"
        raise Unavailable(f"its {kind} differ by {error:.2g} of the largest, more than {allowed:g}")


def uses_tf32(device: torch.device) -> bool:
    """Return whether float32 convolutions on a device round their inputs to TF32, PyTorch's default on GPUs."""
    return device.type == "cuda" and torch.backends.cudnn.allow_tf32


@torch.no_grad()
def time_interleaved(calls: list[Call], example: torch.Tensor) -> list[float]:
    """Return the median time of each backend for the example, in milliseconds."""
    times = by_turns([partial(call, example) for call in calls], ROUNDS, pause=PAUSE)
    return [1000 * statistics.median(seconds for turn in turns for seconds in turn) for turns in times]


def _takes(call: Call, example: torch.Tensor, milliseconds: float) -> bool:
    """Return whether a backend takes about as long as when it was chosen."""
    (now,) = time_interleaved([call], example)
    return milliseconds / CHANGED < now < milliseconds * CHANGED


def _key(
    model: nn.Module,
    example: torch.Tensor,
    precision: Precision,
    ready: list[Backend],
    calibration: torch.Tensor | None = None,
) -> str:
    """Return a file name for a choice: a hash of model, images, machine and libraries.

    The calibration images decide which backends agree, so that other images can lead to another choice.
    """
    device = example.device
    code = model.code if isinstance(model, fx.GraphModule) else str(model)
    shapes = [(name, tuple(tensor.shape)) for name, tensor in model.state_dict().items()]
    machine = torch.cuda.get_device_name(device) if device.type == "cuda" else processor()
    libraries = {name: _version(name) for name in ("res2net-zoo", "torch", "openvino", "onnxruntime", "nncf")}
    content = None if calibration is None else hashlib.sha256(calibration.contiguous().numpy().data).hexdigest()
    threads = torch.get_num_threads()
    facts = (code, shapes, tuple(example.shape), precision, machine, threads, libraries, ready, content)
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:32]


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def processor() -> str:
    """Return the name of the processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _choice_path(key: str, cache_dir: str | Path | None) -> Path:
    return cached_assets_path("res2net_zoo", "optimize", "choices", assets_dir=cache_dir) / f"{key}.json"


class Choice(NamedTuple):
    """A cached choice: the fastest backend, and its time for the example in milliseconds."""

    backend: Backend
    milliseconds: float


def _read_choice(key: str, cache_dir: str | Path | None, ready: list[Backend]) -> Choice | None:
    """Return a cached choice, or None if it is missing, invalid or not available any more."""
    try:
        kept = read_json(_choice_path(key, cache_dir))
        chosen = Choice(kept["backend"], float(kept["milliseconds"][kept["backend"]]))
    except (OSError, ValueError, TypeError, KeyError, InputError):
        return None
    return chosen if chosen.backend in ready else None


def _keep_choice(key: str, cache_dir: str | Path | None, choice: dict[str, Any]) -> None:
    """Cache a choice, or warn that the backends will be compared again."""
    try:
        path = _choice_path(key, cache_dir)
        if is_special(path):  # writing to a pipe that is not read blocks
            path.unlink()
        write_atomically(path, lambda file: file.write_text(json.dumps(choice)))
    except (OSError, ValueError) as error:
        warnings.warn(f"the choice of a backend cannot be cached: {one_line(error)}; set HF_HOME", stacklevel=4)
