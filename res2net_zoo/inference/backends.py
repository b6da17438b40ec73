"""Inference backends: each compiles a model to a function of images."""

import contextlib
import copy
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from functools import partial
from importlib.util import find_spec
from typing import Any, Generic, Literal, NamedTuple, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import fx, nn

from res2net_zoo.kernels.cpu_network import Network, Unsupported
from res2net_zoo.utils.private_apis import freezing

Precision = Literal["float32", "bfloat16", "float16", "int8"]
Backend = Literal["native", "inductor", "inductor-padded", "openvino", "onnxruntime", "cudagraphs", "triton", "eager"]
Call = Callable[[torch.Tensor], Any]  # images to logits or maps
Load = Callable[[torch.Tensor], object]
Run = Callable[[], torch.Tensor]
Runner = Callable[[np.ndarray], np.ndarray]
T = TypeVar("T")

KEPT = 4  # networks that a backend caches, one per image size; for res2net50_26w_4s each takes 250 MB
GRAPHS = 8  # CUDA graphs that a backend caches, one per number and size of images
OLDEST = (8, 0)  # the minimum compute capability that Triton supports
LARGEST_PIXEL = 1e15  # activations of larger inputs may overflow


class Unavailable(Exception):
    """The backend is unavailable on this machine or for this model; the message gives the reason."""


def each(function: Callable[[torch.Tensor], torch.Tensor], output: Any) -> Any:
    """Apply a function to a model's output: a tensor, or each in a list or tuple."""
    return function(output) if isinstance(output, torch.Tensor) else type(output)(map(function, output))


def _native(
    model: nn.Module, example: torch.Tensor, precision: Precision, calibration: torch.Tensor | None = None
) -> Call:
    if example.device.type != "cpu":
        raise Unavailable("it supports CPUs only")
    graph = model if isinstance(model, fx.GraphModule) else fx.symbolic_trace(model)
    network = Network(graph, getattr(torch, precision), calibration=calibration)
    # Integers have no NaN.
    return _with_abnormal_images(network, model) if precision == "int8" else network


def eager(
    model: nn.Module, example: torch.Tensor, precision: Precision, calibration: torch.Tensor | None = None
) -> Call:
    """Run a copy of the model in PyTorch's eager mode, channels last."""
    if precision == "int8":
        raise Unavailable("PyTorch runs models in float only; use native, openvino or onnxruntime for int8")
    dtype = getattr(torch, precision)
    module: Any = copy.deepcopy(model)
    module.to(dtype=dtype, memory_format=torch.channels_last)

    def call(images: torch.Tensor) -> torch.Tensor:
        return module(images.to(dtype=dtype, memory_format=torch.channels_last))

    return call


def compile_frozen(model: Callable[..., torch.Tensor], device: torch.device) -> Call:
    """Compile a model with torch.compile, with constant weights, and with CUDA graphs on a GPU."""
    compiled = torch.compile(model, options={"triton.cudagraphs": True} if device.type == "cuda" else None)
    compiled_for: set[Hashable] = set()

    def call(images: torch.Tensor) -> torch.Tensor:
        kind = (images.shape, images.stride(), images.dtype, torch.is_inference_mode_enabled())
        if kind in compiled_for:
            return compiled(images)
        with freezing():
            logits = compiled(images)
        compiled_for.add(kind)
        return logits

    return call


def _inductor(
    model: nn.Module, example: torch.Tensor, precision: Precision, calibration: torch.Tensor | None = None
) -> Call:
    compiled = compile_frozen(eager(model, example, precision), example.device)

    def call(images: torch.Tensor) -> torch.Tensor:
        # Frozen weights support inference only; CUDA graphs overwrite their last output.
        with torch.no_grad():
            logits = compiled(images)
        return each(torch.clone, logits) if example.device.type == "cuda" else logits

    return call


def _cudagraphs(
    model: nn.Module, example: torch.Tensor, precision: Precision, calibration: torch.Tensor | None = None
) -> Call:
    if example.device.type != "cuda":
        raise Unavailable("CUDA graphs need an NVIDIA GPU")
    run = eager(model, example, precision)

    def prepare(shape: tuple[int, ...]) -> tuple[Load, Run]:
        taken = torch.zeros(shape, device=example.device)
        return lambda images: taken[: len(images)].copy_(images), lambda: run(taken)

    return GraphedNetwork(prepare, example)


def _triton(
    model: nn.Module, example: torch.Tensor, precision: Precision, calibration: torch.Tensor | None = None
) -> Call:
    if example.device.type != "cuda" or torch.version.hip:
        raise Unavailable("it supports NVIDIA GPUs only")
    if precision not in ("bfloat16", "float16"):
        raise Unavailable("it supports bfloat16 and float16 only")
    if torch.cuda.get_device_capability(example.device) < OLDEST:
        raise Unavailable("it needs a GPU of compute capability 8.0 (Ampere) or newer")
    if not find_spec("triton"):
        raise Unavailable("Triton is not installed")
    from res2net_zoo.kernels.gpu_network import GpuNetwork

    graph = model if isinstance(model, fx.GraphModule) else fx.symbolic_trace(model)
    network = GpuNetwork(graph, getattr(torch, precision), example.device)

    def prepare(shape: tuple[int, ...]) -> tuple[Load, Run]:
        program = network.program(shape)
        return program.load, program.run

    return GraphedNetwork(prepare, example)


class Captured(NamedTuple):
    """A CUDA graph, how to fill its input, and its output."""

    load: Load
    graph: torch.cuda.CUDAGraph
    logits: torch.Tensor


class GraphedNetwork:
    """A network that replays CUDA graphs.

    A graph has a fixed shape and fixed memory. One is captured for each image size, and for each number of images
    that is a power of two or the example's; other numbers of images use a part of the next larger graph.

    Args:
        prepare: Returns, for a shape (N, C, H, W), a function that copies up to N images into a fixed buffer, and one
            that computes logits from the buffer, which is captured.
        example: Images of the most frequent shape, on the GPU.
    """

    capturing = threading.Lock()  # other captures in the process must wait

    def __init__(self, prepare: Callable[[tuple[int, ...]], tuple[Load, Run]], example: torch.Tensor) -> None:
        self.prepare, self.device, self.usual = prepare, example.device, len(example)
        self.graphs: _Cache[Captured] = _Cache(GRAPHS)
        self.lock = threading.Lock()
        self.done = torch.cuda.Event()
        self.pool: Any = torch.cuda.graph_pool_handle()  # for all graphs, as they never run at the same time

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """Compute logits (N, classes).

        Args:
            images: Images (N, C, H, W) on the GPU of the network.

        Raises:
            ValueError: The images are on another device.
        """
        if images.device != self.device:
            raise ValueError(f"the images are on {images.device}, the optimized model is on {self.device}")
        shape = (graph_size(len(images), self.usual), *images.shape[1:])
        try:
            with self.lock, torch.cuda.device(self.device):
                return self.replay(images, self.graph(shape))
        except Unsupported:  # too many images for the kernels
            if len(images) == 1:
                raise
        return torch.cat([self(half) for half in images.chunk(2)])

    def replay(self, images: torch.Tensor, captured: Captured) -> torch.Tensor:
        """Run a graph on the current stream, after its last run on any stream."""
        stream = torch.cuda.current_stream()
        stream.wait_event(self.done)
        captured.load(images)
        captured.graph.replay()
        logits = captured.logits[: len(images)].clone()
        self.done.record(stream)
        return logits

    def graph(self, shape: tuple[int, ...]) -> Captured:
        """Return the graph of a shape."""
        if shape in self.graphs.made:
            return self.graphs.get(shape, partial(self.capture, shape))
        torch.cuda.synchronize()  # the graph that this one replaces may be running
        with contextlib.suppress(torch.OutOfMemoryError):
            return self.graphs.get(shape, partial(self.capture, shape))
        self.graphs.made.clear()
        torch.cuda.empty_cache()
        self.pool = torch.cuda.graph_pool_handle()
        return self.graphs.get(shape, partial(self.capture, shape))

    @torch.inference_mode(False)
    @torch.no_grad()
    def capture(self, shape: tuple[int, ...]) -> Captured:
        """Capture the graph of a shape."""
        with self.capturing:
            load, run = self.prepare(shape)
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):  # libraries choose their kernels before the capture
                for _ in range(3):
                    run()
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            # Other threads, such as those that load images, may allocate memory meanwhile.
            with torch.cuda.graph(graph, self.pool, stream, capture_error_mode="thread_local"):
                logits = run()
        return Captured(load, graph, logits)


def graph_size(images: int, usual: int) -> int:
    """Return the number of images of the graph that runs a number of images.

    Args:
        images: The number of images.
        usual: The most frequent number.
    """
    power = 1 << (images - 1).bit_length()
    return min(size for size in (power, usual) if size >= images)


def _openvino(
    model: nn.Module, example: torch.Tensor, precision: Precision, calibration: torch.Tensor | None = None
) -> Call:
    from res2net_zoo.inference.export import run_openvino, to_openvino
    from res2net_zoo.inference.quantization import quantize_openvino

    def run(network: Any) -> Runner:
        return run_openvino(network, "bf16" if precision == "bfloat16" else "f32", torch.get_num_threads())

    def make(images: torch.Tensor, dynamic: bool) -> Runner:
        return run(to_openvino(model, images, dynamic_batch=dynamic))

    if calibration is not None:
        tools = Quantizer(to_openvino, quantize_openvino, resize_openvino, run)
        return QuantizedNetwork(model, example, calibration, tools)
    # OpenVINO's ReLU maps NaN to 0.
    return _with_abnormal_images(_by_shape(example, make), model)


def _onnxruntime(
    model: nn.Module, example: torch.Tensor, precision: Precision, calibration: torch.Tensor | None = None
) -> Call:
    from res2net_zoo.inference.export import run_onnx, to_onnx
    from res2net_zoo.inference.quantization import quantize_onnx

    if precision == "bfloat16":
        raise Unavailable("ONNX Runtime does not support bfloat16 convolutions on CPUs")

    def run(proto: Any) -> Runner:
        return run_onnx(proto, torch.get_num_threads())

    def make(images: torch.Tensor, dynamic: bool) -> Runner:
        return run(to_onnx(model, images, dynamic_batch=dynamic))

    if calibration is not None:
        return QuantizedNetwork(model, example, calibration, Quantizer(to_onnx, quantize_onnx, resize_onnx, run))
    return _by_shape(example, make)


def resize_openvino(network: Any, shape: tuple[int, ...]) -> Any:
    """Return a copy of an OpenVINO model for images of a shape (N, C, H, W), with -1 for a dynamic batch size."""
    copied = network.clone()
    copied.reshape(list(shape))
    return copied


def resize_onnx(proto: Any, shape: tuple[int, ...]) -> Any:
    """Return a copy of an ONNX model with a dynamic batch size, for images of a shape as for `resize_openvino`."""
    copied = type(proto)()
    copied.CopyFrom(proto)
    del copied.graph.value_info[:]
    for dim, size in zip(copied.graph.input[0].type.tensor_type.shape.dim, shape, strict=True):
        if size > 0:
            dim.dim_value = size
    return copied


def _with_abnormal_images(run: Call, model: nn.Module) -> Call:
    """Return a function of images that runs NaN, infinite and huge images in PyTorch."""

    def call(images: torch.Tensor) -> Any:
        output = run(images)
        low, high = images.aminmax()
        if low > -LARGEST_PIXEL and high < LARGEST_PIXEL:
            return output
        abnormal = ~(images.float().abs().amax((1, 2, 3)) < LARGEST_PIXEL)
        exact = model(images[abnormal].float())
        outputs, exacts = ([x] if isinstance(x, torch.Tensor) else x for x in (output, exact))
        for one, other in zip(outputs, exacts, strict=True):
            one[abnormal] = other
        return output

    return call


class Quantizer(NamedTuple):
    """How a library quantizes a model.

    Attributes:
        export: Exports a PyTorch model for the size of example images and a dynamic batch size or theirs.
        quantize: Quantizes an exported model on calibration images; whether weights use 7 bits.
        resized: Copies a model for another shape, as `resize_openvino`.
        run: Compiles an exported model.
    """

    export: Callable[..., Any]
    quantize: Callable[[Any, torch.Tensor, bool], Any]
    resized: Callable[[Any, tuple[int, ...]], Any]
    run: Callable[[Any], Runner]


class QuantizedNetwork:
    """A network in int8, which is quantized once for images of all sizes.

    If the exported model depends on the size of the images, it is quantized again on calibration images of that size.

    Args:
        model: The model, with BatchNorm folded.
        example: Images of the most frequent shape.
        calibration: Calibration images of the same size.
        tools: The library.

    Attributes:
        float_layers: Names of the convolutions and linear layers that remain in float.
    """

    def __init__(self, model: nn.Module, example: torch.Tensor, calibration: torch.Tensor, tools: Quantizer) -> None:
        from res2net_zoo.inference.quantization import float_layers, has_int8_instructions

        self.model, self.calibration, self.tools = model, calibration, tools
        self.half_range = not has_int8_instructions()
        self.quantized = self.quantize(calibration)
        self.float_layers = float_layers(self.quantized)
        self.run = _with_abnormal_images(_by_shape(example, self.make), model)

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """Compute logits (N, classes) of images (N, C, H, W)."""
        return self.run(images)

    def quantize(self, images: torch.Tensor) -> Any:
        """Quantize the model for images of the same size as calibration images."""
        return self.tools.quantize(self.tools.export(self.model, images[:1]), images, self.half_range)

    def make(self, images: torch.Tensor, dynamic: bool) -> Runner:
        """Return the network for the shape of images, or for their size and a dynamic batch size."""
        size = tuple(images.shape[2:])
        shape = (-1 if dynamic else len(images), *images.shape[1:])
        if size == self.calibration.shape[2:]:
            return self.tools.run(self.tools.resized(self.quantized, shape))
        resized = F.interpolate(self.calibration, size, mode="bilinear", antialias=True)
        with contextlib.suppress(Exception):  # of many types
            network = self.tools.run(self.tools.resized(self.quantized, shape))
            if self.agrees(network, resized[:1].repeat(len(images), 1, 1, 1)):
                return network
        return self.tools.run(self.tools.resized(self.quantize(resized), shape))

    @torch.no_grad()
    def agrees(self, network: Runner, images: torch.Tensor) -> bool:
        """Return whether a network reproduces the model's logits approximately."""
        from res2net_zoo.inference.quantization import TOLERANCE, rms_error

        return rms_error(torch.from_numpy(network(images.numpy())), self.model(images)) <= TOLERANCE


class _Cache(Generic[T]):
    """A least-recently-used cache, which is not thread-safe."""

    def __init__(self, kept: int) -> None:
        self.kept = kept
        self.made: OrderedDict[Hashable, T] = OrderedDict()

    def get(self, key: Hashable, make: Callable[[], T]) -> T:
        """Return the value of a key, and create it if it is not cached."""
        if key not in self.made:
            while len(self.made) >= self.kept:
                self.made.popitem(last=False)
            self.made[key] = make()
        self.made.move_to_end(key)
        return self.made[key]


def _by_shape(example: torch.Tensor, make: Callable[[torch.Tensor, bool], Runner]) -> Call:
    """Return a function of images with a network for the example's shape, and one for each other image size.

    Args:
        example: Images (N, C, H, W) of the most frequent shape.
        make: Creates a network from images and whether its batch size is dynamic. A static batch size is faster,
            but each network takes seconds to create, and a copy of the weights.
    """
    if example.device.type != "cpu":
        raise Unavailable("it is used on CPUs only")
    usual = tuple(example.shape)
    networks: _Cache[Runner] = _Cache(KEPT)
    lock = threading.Lock()

    def call(images: torch.Tensor) -> torch.Tensor:
        shape = tuple(images.shape)
        dynamic = shape != usual
        with lock:
            network = networks.get(shape[1:] if dynamic else shape, partial(make, images, dynamic))
        return torch.from_numpy(network(images.float().contiguous().numpy()))

    return call


BACKENDS: dict[str, Callable[..., Call]] = {
    "native": _native,
    "inductor": _inductor,
    "inductor-padded": _inductor,
    "openvino": _openvino,
    "onnxruntime": _onnxruntime,
    "cudagraphs": _cudagraphs,
    "triton": _triton,
    "eager": eager,
}
