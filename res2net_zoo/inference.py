"""Inference as fast as the machine allows: `optimize(model, example_input)`."""

import copy
import hashlib
import json
import platform
import statistics
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from timm.utils import reparameterize_model
from torch import fx, nn
from torch.fx.experimental.optimization import fuse

from res2net_zoo.block import Res2NetModule
from res2net_zoo.files import write_atomically
from res2net_zoo.hub import assets, one_line
from res2net_zoo.native import Network, Unsupported
from res2net_zoo.program import InputError

Precision = Literal["float32", "bfloat16", "float16"]
Backend = Literal["native", "inductor", "inductor-padded", "openvino", "onnxruntime", "cudagraphs", "eager"]
Call = Callable[[torch.Tensor], torch.Tensor]

PADDED = 16  # channels that a GPU's matrix units take at a time in half precision
TOLERANCE = 1e-4  # of float32 logits, relative to the largest
ROUNDS = 5  # how often each backend is timed
PAUSE = 0.02  # seconds before each of them, for the threads of the last one to come to rest


class Unavailable(Exception):
    """This machine or this model cannot have a backend; the message says why."""


@dataclass(frozen=True)
class Optimized:
    """A model made fast for inference.

    Attributes:
        backend: What runs it.
        precision: Type that activations and weights have; logits are float32 in all.
        milliseconds: What each backend that was tried took for the example, where several were.
    """

    call: Call
    backend: Backend
    precision: Precision
    milliseconds: dict[Backend, float]

    @torch.no_grad()
    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """Classify images.

        Args:
            images: (N, C, H, W), normalized as the model wants them; N is any number, H and W any
                that the model takes, but other sizes than the example's may cost a compilation.

        Returns:
            Logits, (N, classes), float32.
        """
        return self.call(images).float()


def optimize(
    model: nn.Module,
    example_input: torch.Tensor,
    precision: Precision = "float32",
    backend: Backend | Literal["auto"] = "auto",
    cache_dir: str | Path | None = None,
) -> Optimized:
    """Make a model fast for inference on the machine that it is to run on.

    BatchNorm is folded into the convolutions. With `backend="auto"` the backends that this machine
    has and that are ready within seconds (on a GPU: all) run the example by turns, and the fastest is
    taken; the choice is kept in huggingface_hub's assets cache for the next time. Whatever is taken gives the
    example the same logits as the model: to 1e-4 of the largest in float32.

    Args:
        model: A model that maps images to logits. It is copied, not changed; the copy is in eval mode.
        example_input: Images, (N, C, H, W), as they will come: their number, size and device decide
            what is fastest.
        precision: Type of activations and weights.
        backend: `"native"` (CPU: the zoo's own machine code, needs a C++ compiler), `"openvino"`,
            `"onnxruntime"` (CPU, the package of that name), `"inductor"` (torch.compile with frozen
            weights; on a GPU with CUDA graphs; its first call takes a minute or more),
            `"inductor-padded"` (the same, the groups' widths padded to multiples of 16), `"cudagraphs"`
            (GPU: eager, without the cost of launching kernels), `"eager"`, or `"auto"`. What is not
            to be had is replaced by the best of the others, with a warning that says why.
        cache_dir: Where choices are kept, if not in huggingface_hub's assets cache.

    Returns:
        The model as a function from images to logits.

    Raises:
        ValueError: An unknown precision or backend, or images that are not (N, C, H, W) floats.
    """
    if precision not in get_args(Precision):
        raise ValueError(f"precision is {precision!r}; there are {', '.join(get_args(Precision))}")
    if backend not in (*get_args(Backend), "auto"):
        raise ValueError(f"backend is {backend!r}; there are auto, {', '.join(get_args(Backend))}")
    if example_input.ndim != 4 or not example_input.is_floating_point() or not len(example_input):
        raise ValueError(
            f"example_input is {tuple(example_input.shape)}, {example_input.dtype}; give images as (N, C, H, W) floats"
        )
    device = example_input.device
    if precision == "float16" and device.type == "cpu":
        raise ValueError("float16 is for GPUs; on the CPU there are float32 and bfloat16")
    example = example_input.detach().float()
    model = copy.deepcopy(model).eval().to(device).requires_grad_(False)
    with torch.no_grad():
        expected = model(example)
    if expected.ndim != 2:
        raise ValueError(
            f"the model returns {tuple(expected.shape)}, no table of logits; give it a classifier or a pooling"
        )
    folded = fold_batch_norm(model)

    def make(name: Backend) -> Call:
        """Make the model with one backend, and see that it computes what it should."""
        try:
            padded = name == "inductor-padded"
            call = BACKENDS[name](fold_batch_norm(model, PADDED) if padded else folded, example, precision)
            with torch.no_grad():
                check(call(example).float(), expected, precision)
            return call
        except Exception as error:  # a compiler can fail in any way; the next backend does not
            known = isinstance(error, (Unavailable, Unsupported, InputError))
            raise Unavailable(f"{'' if known else type(error).__name__ + ': '}{one_line(error)}") from error

    ready = candidates(device)
    if backend != "auto":
        try:
            return Optimized(make(backend), backend, precision, {})
        except Unavailable as error:
            warnings.warn(f"the backend {backend} cannot run this model here ({error}); another is taken", stacklevel=2)
            ready = [name for name in ready if name != backend]

    path = assets("optimize", "choices", cache_dir) / f"{_key(folded, example, precision, ready)}.json"
    chosen = _read_choice(path, ready)
    if chosen:
        try:
            return Optimized(make(chosen), chosen, precision, {})
        except Unavailable as error:
            warnings.warn(f"{chosen}, the fastest before, cannot run this model now ({error})", stacklevel=2)
    calls: dict[Backend, Call] = {}
    for name in ready:
        try:
            calls[name] = make(name)
        except Unavailable as error:
            # Only what would have been expected to run is missed.
            if name == "native":
                warnings.warn(
                    f"the backend {name} cannot run this model here ({error}); another is taken", stacklevel=2
                )
    milliseconds = dict(zip(calls, time_by_turns(list(calls.values()), example), strict=True))
    fastest = min(calls, key=lambda name: milliseconds[name])
    write_atomically(path, lambda file: file.write_text(json.dumps({"backend": fastest, "milliseconds": milliseconds})))
    return Optimized(calls[fastest], fastest, precision, milliseconds)


def fold_batch_norm(model: nn.Module, multiple: int = 1) -> nn.Module:
    """Return a copy of a model with each BatchNorm in the convolution before it, for inference.

    Blocks are folded by timm's convention, a method `reparameterize`; what stands outside of them, in
    stems and shortcuts, by tracing the model.

    Args:
        model: A model in eval mode.
        multiple: What the widths of Res2Net blocks' groups are padded to a multiple of.
    """
    folded = reparameterize_model(model)
    for module in folded.modules():
        if isinstance(module, Res2NetModule):
            module.pad_width(multiple)
    try:
        return fuse(folded)
    except Exception:  # models may do anything that cannot be traced; those keep the BatchNorm that is left
        return folded


def candidates(device: torch.device) -> list[Backend]:
    """Return the backends that a device has and that are ready within seconds, the last always."""
    if device.type == "cuda":
        return ["inductor", "inductor-padded", "cudagraphs", "eager"]
    if device.type != "cpu":
        return ["eager"]
    installed: list[Backend] = ["native"]
    if find_spec("openvino"):
        installed.append("openvino")
    if find_spec("onnxruntime") and find_spec("onnxscript"):
        installed.append("onnxruntime")
    return [*installed, "eager"]


def check(found: torch.Tensor, expected: torch.Tensor, precision: Precision) -> None:
    """See that a backend computes what the model does.

    Raises:
        Unavailable: It does not.
    """
    if found.shape != expected.shape:
        raise Unavailable(f"it returns {tuple(found.shape)} instead of {tuple(expected.shape)}")
    error = ((found - expected).abs().max() / expected.abs().max().clamp(min=1e-12)).item()
    # Half precision has 3 decimals, of which a deep network loses some.
    allowed = TOLERANCE if precision == "float32" else 0.1
    if not error <= allowed:
        raise Unavailable(f"its logits are off by {error:.2g} of the largest, more than {allowed:g}")


@torch.no_grad()
def time_by_turns(calls: list[Call], example: torch.Tensor) -> list[float]:
    """Return the median milliseconds of some backends for the example."""
    from res2net_zoo.measure import by_turns

    times = by_turns([partial(call, example) for call in calls], ROUNDS, pause=PAUSE)
    return [1000 * statistics.median(seconds for turn in turns for seconds in turn) for turns in times]


def _native(model: nn.Module, example: torch.Tensor, precision: Precision) -> Call:
    if example.device.type != "cpu":
        raise Unavailable("it is for CPUs")
    graph = model if isinstance(model, fx.GraphModule) else fx.symbolic_trace(model)
    return Network(graph, getattr(torch, precision))


def _eager(model: nn.Module, example: torch.Tensor, precision: Precision) -> Call:
    dtype = getattr(torch, precision)
    module: Any = copy.deepcopy(model)
    module.to(dtype=dtype, memory_format=torch.channels_last)

    def call(images: torch.Tensor) -> torch.Tensor:
        return module(images.to(dtype=dtype, memory_format=torch.channels_last))

    return call


def _inductor(model: nn.Module, example: torch.Tensor, precision: Precision) -> Call:
    options: dict[str, Any] = {"freezing": True}
    if example.device.type == "cuda":
        options |= {"max_autotune": True, "triton.cudagraphs": True}
    compiled = torch.compile(_eager(model, example, precision), options=options)

    def call(images: torch.Tensor) -> torch.Tensor:
        # Frozen weights are for inference alone; CUDA graphs overwrite what they returned last.
        with torch.no_grad():
            logits = compiled(images)
        return logits.clone() if "triton.cudagraphs" in options else logits

    return call


def _cudagraphs(model: nn.Module, example: torch.Tensor, precision: Precision) -> Call:
    if example.device.type != "cuda":
        raise Unavailable("CUDA graphs are for NVIDIA's GPUs")
    eager = _eager(model, example, precision)
    graphs: dict[tuple[int, ...], tuple[torch.cuda.CUDAGraph, torch.Tensor, torch.Tensor]] = {}

    def call(images: torch.Tensor) -> torch.Tensor:
        if tuple(images.shape) not in graphs:
            taken = images.clone()
            stream = torch.cuda.Stream()  # libraries choose their kernels before they are recorded
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(3):
                    eager(taken)
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                logits = eager(taken)
            graphs[tuple(images.shape)] = graph, taken, logits
        graph, taken, logits = graphs[tuple(images.shape)]
        taken.copy_(images)
        graph.replay()
        return logits.clone()

    return call


def _openvino(model: nn.Module, example: torch.Tensor, precision: Precision) -> Call:
    from res2net_zoo.export import run_openvino, to_openvino

    # Shapes known beforehand are faster than dynamic ones.
    return _by_shape(
        example,
        lambda images: run_openvino(
            to_openvino(model, images, dynamic_batch=False),
            "f32" if precision == "float32" else "bf16",
            torch.get_num_threads(),
        ),
    )


def _onnxruntime(model: nn.Module, example: torch.Tensor, precision: Precision) -> Call:
    from res2net_zoo.export import run_onnx, to_onnx

    if precision != "float32":
        raise Unavailable("ONNX Runtime has no bfloat16 convolutions on CPUs")
    return _by_shape(
        example, lambda images: run_onnx(to_onnx(model, images, dynamic_batch=False), torch.get_num_threads())
    )


def _by_shape(example: torch.Tensor, make: Callable[[torch.Tensor], Callable[[np.ndarray], np.ndarray]]) -> Call:
    """Return a function of images that makes another for each shape, and keeps it."""
    if example.device.type != "cpu":
        raise Unavailable("only its CPU side is used here")
    made: dict[tuple[int, ...], Callable[[np.ndarray], np.ndarray]] = {}

    def call(images: torch.Tensor) -> torch.Tensor:
        shape = tuple(images.shape)
        if shape not in made:
            made[shape] = make(images)
        return torch.from_numpy(made[shape](images.float().contiguous().numpy()))

    return call


BACKENDS: dict[str, Callable[[nn.Module, torch.Tensor, Precision], Call]] = {
    "native": _native,
    "inductor": _inductor,
    "inductor-padded": _inductor,
    "openvino": _openvino,
    "onnxruntime": _onnxruntime,
    "cudagraphs": _cudagraphs,
    "eager": _eager,
}


def _key(model: nn.Module, example: torch.Tensor, precision: Precision, ready: list[Backend]) -> str:
    """Return what a choice depends on, as a file name: model, images, machine and libraries."""
    device = example.device
    code = model.code if isinstance(model, fx.GraphModule) else str(model)
    shapes = [(name, tuple(tensor.shape)) for name, tensor in model.state_dict().items()]
    machine = torch.cuda.get_device_name(device) if device.type == "cuda" else processor()
    libraries = {name: _version(name) for name in ("res2net-zoo", "torch", "openvino", "onnxruntime")}
    facts = (code, shapes, tuple(example.shape), precision, machine, torch.get_num_threads(), libraries, ready)
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:32]


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def processor() -> str:
    """Return the processor's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _read_choice(path: Path, ready: list[Backend]) -> Backend | None:
    """Return the backend chosen before, if there is one that can still be taken."""
    try:
        chosen = json.loads(path.read_text())["backend"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return chosen if chosen in ready else None
