"""Inference backends: each compiles a model to a function of images."""

import copy
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from functools import partial
from importlib.util import find_spec
from typing import Any, Generic, Literal, TypeVar

import numpy as np
import torch
from torch import fx, nn

from res2net_zoo.kernels.cpu_network import Network

Precision = Literal["float32", "bfloat16", "float16"]
Backend = Literal["native", "inductor", "inductor-padded", "openvino", "onnxruntime", "cudagraphs", "triton", "eager"]
Call = Callable[[torch.Tensor], torch.Tensor]
T = TypeVar("T")

KEPT = 4  # networks that a backend caches, one per image size; for res2net50_26w_4s each takes 250 MB
LARGEST_PIXEL = 1e15  # activations of larger inputs may overflow


class Unavailable(Exception):
    """The backend is unavailable on this machine or for this model; the message has the reason."""


def _native(model: nn.Module, example: torch.Tensor, precision: Precision) -> Call:
    if example.device.type != "cpu":
        raise Unavailable("it supports CPUs only")
    graph = model if isinstance(model, fx.GraphModule) else fx.symbolic_trace(model)
    return Network(graph, getattr(torch, precision))


def eager(model: nn.Module, example: torch.Tensor, precision: Precision) -> Call:
    """Run a copy of the model in PyTorch's eager mode, channels last."""
    dtype = getattr(torch, precision)
    module: Any = copy.deepcopy(model)
    module.to(dtype=dtype, memory_format=torch.channels_last)

    def call(images: torch.Tensor) -> torch.Tensor:
        return module(images.to(dtype=dtype, memory_format=torch.channels_last))

    return call


def compile_frozen(model: Callable[..., torch.Tensor], device: torch.device) -> Callable[..., torch.Tensor]:
    """Compile a model by torch.compile with constant weights, and with CUDA graphs on a GPU."""
    options: dict[str, Any] = {"freezing": True}
    if device.type == "cuda":
        options |= {"max_autotune": True, "triton.cudagraphs": True}
    return torch.compile(model, options=options)


def _inductor(model: nn.Module, example: torch.Tensor, precision: Precision) -> Call:
    compiled = compile_frozen(eager(model, example, precision), example.device)

    def call(images: torch.Tensor) -> torch.Tensor:
        # Frozen weights support inference only; CUDA graphs overwrite their last output.
        with torch.no_grad():
            logits = compiled(images)
        return logits.clone() if example.device.type == "cuda" else logits

    return call


def _cudagraphs(model: nn.Module, example: torch.Tensor, precision: Precision) -> Call:
    if example.device.type != "cuda":
        raise Unavailable("CUDA graphs need an NVIDIA GPU")
    run = eager(model, example, precision)

    def prepare(images: torch.Tensor) -> tuple[Callable[[torch.Tensor], object], Callable[[], torch.Tensor]]:
        taken = images.clone()
        return taken.copy_, lambda: run(taken)

    return _graphed(prepare)


def _triton(model: nn.Module, example: torch.Tensor, precision: Precision) -> Call:
    if example.device.type != "cuda":
        raise Unavailable("it supports NVIDIA GPUs only")
    if not find_spec("triton"):
        raise Unavailable("Triton is not installed")
    from res2net_zoo.kernels.gpu_network import GpuNetwork

    graph = model if isinstance(model, fx.GraphModule) else fx.symbolic_trace(model)
    network = GpuNetwork(graph, getattr(torch, precision), example.device)

    def prepare(images: torch.Tensor) -> tuple[Callable[[torch.Tensor], object], Callable[[], torch.Tensor]]:
        program = network.program(images)
        program.load(images)
        return program.load, program.run

    return _graphed(prepare)


def _graphed(
    prepare: Callable[[torch.Tensor], tuple[Callable[[torch.Tensor], object], Callable[[], torch.Tensor]]],
) -> Call:
    """Return a function of images that replays a CUDA graph, captured for each shape.

    Args:
        prepare: Returns, for images, a function that writes images of that shape into a fixed buffer, and one that
            computes logits from the buffer, which is captured.
    """

    def record(images: torch.Tensor) -> tuple[Callable[[torch.Tensor], object], torch.cuda.CUDAGraph, torch.Tensor]:
        torch.cuda.synchronize()  # the graph that this one replaces may still be running
        load, run = prepare(images)
        stream = torch.cuda.Stream()  # warm up, so that libraries choose their kernels before the capture
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                run()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            logits = run()
        return load, graph, logits

    graphs: _Cache[tuple[Callable[[torch.Tensor], object], torch.cuda.CUDAGraph, torch.Tensor]] = _Cache()
    lock = threading.Lock()  # a graph has a single input and a single output buffer

    def call(images: torch.Tensor) -> torch.Tensor:
        with lock:
            load, graph, logits = graphs.get(tuple(images.shape), partial(record, images))
            load(images)
            graph.replay()
            return logits.clone()

    return call


def _openvino(model: nn.Module, example: torch.Tensor, precision: Precision) -> Call:
    from res2net_zoo.inference.export import run_openvino, to_openvino

    hint = "f32" if precision == "float32" else "bf16"
    run = _by_shape(
        example,
        lambda images, dynamic: run_openvino(
            to_openvino(model, images, dynamic_batch=dynamic), hint, torch.get_num_threads()
        ),
    )

    def call(images: torch.Tensor) -> torch.Tensor:
        logits = run(images)
        # OpenVINO's ReLU maps NaN to 0; let PyTorch compute the logits of NaN, infinite and huge inputs.
        largest = torch.linalg.vector_norm(images.float().flatten(1), float("inf"), 1)
        abnormal = ~(largest < LARGEST_PIXEL)
        if abnormal.any():
            logits[abnormal] = model(images[abnormal].float())
        return logits

    return call


def _onnxruntime(model: nn.Module, example: torch.Tensor, precision: Precision) -> Call:
    from res2net_zoo.inference.export import run_onnx, to_onnx

    if precision != "float32":
        raise Unavailable("ONNX Runtime does not support bfloat16 convolutions on CPUs")
    return _by_shape(
        example,
        lambda images, dynamic: run_onnx(to_onnx(model, images, dynamic_batch=dynamic), torch.get_num_threads()),
    )


class _Cache(Generic[T]):
    """A least-recently-used cache, which is not thread-safe."""

    def __init__(self) -> None:
        self.made: OrderedDict[Hashable, T] = OrderedDict()

    def get(self, key: Hashable, make: Callable[[], T]) -> T:
        """Return the value of a key, and create it if it is not cached."""
        if key not in self.made:
            while len(self.made) >= KEPT:
                self.made.popitem(last=False)
            self.made[key] = make()
        self.made.move_to_end(key)
        return self.made[key]


def _by_shape(example: torch.Tensor, make: Callable[[torch.Tensor, bool], Callable[[np.ndarray], np.ndarray]]) -> Call:
    """Return a function of images with a network for the example's shape, and one for each other image size.

    Args:
        example: Images (N, C, H, W) of the most frequent shape.
        make: Creates a network from images and whether its batch size is dynamic. A static batch size is faster,
            but each network takes seconds to create, and a copy of the weights.
    """
    if example.device.type != "cpu":
        raise Unavailable("it is used on CPUs only")
    usual = tuple(example.shape)
    networks: _Cache[Callable[[np.ndarray], np.ndarray]] = _Cache()
    lock = threading.Lock()

    def call(images: torch.Tensor) -> torch.Tensor:
        shape = tuple(images.shape)
        dynamic = shape != usual
        with lock:
            network = networks.get(shape[1:] if dynamic else shape, partial(make, images, dynamic))
        return torch.from_numpy(network(images.float().contiguous().numpy()))

    return call


BACKENDS: dict[str, Callable[[nn.Module, torch.Tensor, Precision], Call]] = {
    "native": _native,
    "inductor": _inductor,
    "inductor-padded": _inductor,
    "openvino": _openvino,
    "onnxruntime": _onnxruntime,
    "cudagraphs": _cudagraphs,
    "triton": _triton,
    "eager": eager,
}
