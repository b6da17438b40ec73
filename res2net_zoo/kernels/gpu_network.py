"""Convolutional networks as Triton kernels: the `triton` GPU backend of `res2net_zoo.optimize`.

The approach of `cpu_network` on a GPU, in channels_last: a convolution includes its bias, residual addition and
activation, and the groups of a Res2Net block (Eq. 1) are never copied: K_i reads its slice of the output of conv1,
writes y_i into the input of conv3, and adds it to the slice that K_{i+1} reads. Libraries lack such a convolution: they
copy each group out and back, and apply bias, ReLU and sums in separate passes over memory, which limit the speed.
"""

import contextlib
import copy
import math
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn
from triton.runtime.errors import OutOfResources

from res2net_zoo.kernels import gpu_steps
from res2net_zoo.kernels.lowering import (
    AVG_POOL,
    CONV,
    MAX_POOL,
    MEAN,
    POINTWISE,
    RELU,
    RESIZE,
    Lowering,
    Node,
    Unsupported,
    Value,
    fuse_nodes,
)
from res2net_zoo.utils.private_apis import occupy_gpu

UNIT = 8  # channels that a thread reads at once
SLACK = 256  # elements and rows that a tile may read past the weights
SPLITS = (1, 2, 4, 8, 16)
REPEATS = 5  # timings of a tile size
Tile = tuple[int, int, int, int, int]  # pixels, output channels, input channels, warps, stages
TILES: tuple[Tile, ...] = (
    (128, 256, 64, 8, 3),
    (128, 128, 64, 8, 3),
    (128, 128, 32, 4, 4),
    (256, 64, 32, 8, 4),
    (128, 64, 64, 4, 3),
    (128, 64, 32, 4, 4),
    (64, 128, 64, 4, 4),
    (128, 32, 32, 4, 5),
    (64, 64, 64, 4, 4),
    (64, 32, 64, 4, 5),
    (32, 64, 128, 4, 4),
    (16, 64, 128, 4, 4),
)
SMALLEST: Tile = (16, 32, 32, 4, 2)  # for GPUs with little shared memory, where the others fail


def units(*numbers: int) -> int:
    """Return the largest power of two up to `UNIT` that divides all numbers."""
    return math.gcd(UNIT, *numbers)


@dataclass(eq=False)
class Weights:
    """The weights of a convolution in the layout of the kernel: (taps, input channels, output channels), padded."""

    weight: torch.Tensor
    bias: torch.Tensor
    rows: int
    pitch: int


class Convolution:
    """One launch of `gpu_steps.convolve`.

    Args:
        src: Input, a range of channels of NHWC pixels.
        dst: Output, likewise.
        weights: The packed weights.
        geometry: Kernel height and width, stride, padding, dilation.
        chs_out: Number of output channels.
        relu: Whether to apply ReLU.
        add: Tensor to add to the output before ReLU, or None.
        rest: Output for the channels that do not fit in `dst`, or None.
        also: Tensor to which the output is added, or None.
    """

    def __init__(
        self,
        src: torch.Tensor,
        dst: torch.Tensor,
        weights: Weights,
        geometry: tuple[int, int, int, int, int],
        chs_out: int,
        relu: bool,
        add: torch.Tensor | None = None,
        rest: torch.Tensor | None = None,
        also: torch.Tensor | None = None,
    ) -> None:
        kh, kw, stride, pad, dilation = geometry
        n, in_h, in_w, self.chs_in = src.shape
        _, out_h, out_w, cut = dst.shape
        self.pixels, self.chs_out, self.taps = n * out_h * out_w, chs_out, kh * kw
        pitches = [1 if t is None else t.stride(2) for t in (add, dst, rest, also)]
        used = [t.stride(2) for t in (add, dst, rest, also) if t is not None]
        src_unit = units(self.chs_in, src.stride(2))
        unit = units(chs_out, cut, *used)
        self.device = src.device
        self.tensors = (src, weights.weight, weights.bias, *(dst if t is None else t for t in (add, dst, rest, also)))
        self.sizes = (
            self.pixels, in_h, in_w, out_h, out_w, self.chs_in // src_unit, chs_out // unit, cut // unit,
            stride, pad, dilation, src.stride(2) // src_unit, *(pitch // unit for pitch in pitches),
            weights.rows // 16, weights.pitch // 16,
        )  # fmt: skip
        self.constants = dict(
            KH=kh, KW=kw, SRC_UNIT=src_unit, DST_UNIT=unit, RELU=relu, HAS_ADD=add is not None,
            HAS_PARTS=rest is not None, HAS_ALSO=also is not None,
        )  # fmt: skip
        self.variant = (*self.constants.values(), src.dtype, dst.dtype)
        self.key = (self.sizes, self.variant)
        self.tile: Tile = (64, 64, 32, 4, 3)
        self.split = 1
        self.scratch: tuple[torch.Tensor, torch.Tensor] | None = None

    def tiles(self, tile: Tile) -> int:
        """Return the number of tiles of the output."""
        return -(-self.pixels // tile[0]) * -(-self.chs_out // tile[1])

    def choices(self, processors: int) -> Iterator[tuple[Tile, int]]:
        """Yield the tile sizes that suit this convolution, each with the number of programs that share a tile."""
        for tile in TILES:
            bm, bn, bk, *_ = tile
            if bn >= 2 * max(32, self.chs_out) or bk >= 2 * max(32, self.chs_in) or bm >= 2 * max(16, self.pixels):
                continue
            steps = self.taps * -(-self.chs_in // bk)
            for split in SPLITS:
                if split == 1 or (2 * split <= steps and self.tiles(tile) * split <= 2 * processors):
                    yield tile, split

    def choose(self, tile: Tile, split: int, scratch: tuple[torch.Tensor, torch.Tensor] | None) -> None:
        """Set the tile size."""
        self.tile, self.split, self.scratch = tile, split, scratch

    def room(self, tile: Tile, split: int) -> tuple[int, int]:
        """Return the numbers of partial sums and of counters that a choice needs."""
        return (self.tiles(tile) * split * tile[0] * tile[1], self.tiles(tile)) if split > 1 else (0, 0)

    def arguments(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return the arguments of the kernel."""
        bm, bn, bk, warps, stages = self.tile
        scratch = self.scratch or (self.tensors[2], self.tensors[2].view(torch.int32))
        values = dict(self.constants, BM=bm, BN=bn, BK=bk, SHARED=self.split > 1, num_warps=warps, num_stages=stages)
        src, weight, bias, add, dst, rest, also = self.tensors
        return (src, weight, bias, add, dst, rest, also, *scratch, *self.sizes), values

    def compile(self, tile: Tile, split: int) -> None:
        """Compile the kernel for a tile size; failures are raised when it is launched."""
        step = copy.copy(self)
        step.choose(tile, split, None)
        args, values = step.arguments()
        with contextlib.suppress(Exception):
            gpu_steps.convolve.warmup(*args, **values, grid=(1,))

    def __call__(self) -> None:
        """Launch the kernel."""
        args, values = self.arguments()
        gpu_steps.convolve[(self.tiles(self.tile), self.split)](*args, **values)


class Program:
    """The kernels for one batch size and image size, and their buffers."""

    def __init__(self, network: "GpuNetwork", shape: tuple[int, int, int, int]) -> None:
        source, lowering = Value(*shape), Lowering(network.graph)
        result = lowering.run(source)
        if not isinstance(result, Value) or result.h * result.w != 1:
            raise Unsupported("the model's output must be logits (N, classes)")
        self.network = network
        self.buffers: dict[Value, torch.Tensor] = {}
        self.steps: list[Callable[[], object]] = []
        nodes = fuse_nodes(source, lowering.calls, result)
        if nodes[-1].dst is result and result.base is None and not nodes[-1].parts:
            result.is_float = True
        self.source, self.result = source, result
        # The stem reads windows as rows of up to 8 pixels of 4 channels: 8 bytes at a time, without masks.
        readers = [node for node in nodes if node.src is source]
        self.border = readers[0].conv.padding[0] if len(readers) == 1 and is_stem(readers[0]) else None
        self.place(nodes)
        for node in nodes:
            self.lower(node)
        network.tune([step for step in self.steps if isinstance(step, Convolution)])
        self.logits = self.view(result)[:, 0, 0]

    def place(self, nodes: list[Node]) -> None:
        """Allocate the buffers of values; values of the same shape with disjoint lifetimes share one."""
        last: dict[Value, int] = {}
        for i, node in enumerate(nodes):
            values = [node.src, node.dst, node.gate, node.add, node.also, *(where for _, _, where in node.parts)]
            for value in filter(None, values):
                last[value.place()[0]] = i
        free: dict[tuple, list[torch.Tensor]] = {}
        self.buffers[self.source] = self.new(self.source)
        for i, node in enumerate(nodes):
            for value in (node.dst, *(where for _, _, where in node.parts)):
                root, _ = value.place()
                if root not in self.buffers:
                    spare = free.get(root.layout)
                    self.buffers[root] = spare.pop() if spare else self.new(root)
            for root, end in last.items():
                if end == i and root is not self.source:
                    free.setdefault(root.layout, []).append(self.buffers[root])

    def new(self, root: Value) -> torch.Tensor:
        """Allocate a value's buffer (N, H, W, pitch)."""
        dtype = torch.float32 if root.is_float else self.network.dtype
        if root is self.source and self.border is not None:
            height, width = root.h + 2 * self.border, -(-(root.w + 2 * self.border + 8) // 4) * 4
            room = torch.zeros(root.n * height * width * 4 + 32, dtype=dtype, device=self.network.device)
            return room[:-32].view(root.n, height, width, 4)
        pitch = -(-root.c // UNIT) * UNIT
        if root.n * root.h * root.w * pitch >= 2**31:
            raise Unsupported("a map of 2**31 elements or more is too large")
        return torch.zeros(root.n, root.h, root.w, pitch, dtype=dtype, device=self.network.device)

    def view(self, value: Value) -> torch.Tensor:
        """Return a value as a tensor (N, H, W, C)."""
        root, first = value.place()
        whole = self.buffers[root]
        if root is self.source and self.border is not None:
            whole = whole[:, self.border : self.border + root.h, self.border : self.border + root.w]
        return whole[..., first : first + value.c]

    def lower(self, node: Node) -> None:
        """Append the kernels of a node."""
        src, dst = self.view(node.src), self.view(node.dst)
        match node.kind:
            case _ if node.kind == CONV:
                self.convolve(node)
            case _ if node.kind in (MAX_POOL, AVG_POOL):
                self.steps.append(lambda: pool(src, dst, node.kind == MAX_POOL, node.window))
            case _ if node.kind == MEAN:
                self.steps.append(lambda: dst.copy_(src.mean((1, 2), keepdim=True)))
            case _ if node.kind == POINTWISE:
                gate = None if node.gate is None else self.view(node.gate)
                add = None if node.add is None else self.view(node.add)
                self.steps.append(lambda: dst.copy_(pointwise(src, gate, add, node.act)))
            case _ if node.kind == RESIZE:
                size = (node.dst.h, node.dst.w)
                self.steps.append(lambda: dst.copy_(nhwc(F.interpolate(nchw(src), size=size, mode="bilinear"))))

    def convolve(self, node: Node) -> None:
        """Append the kernels of a convolution."""
        conv, src = node.conv, self.view(node.src)
        linear = isinstance(conv, nn.Linear)
        kh, kw = (1, 1) if linear else conv.kernel_size
        same = linear or all(len(set(pair)) == 1 for pair in (conv.stride, conv.padding, conv.dilation))
        add = None if node.add is None else self.view(node.add)
        also = None if node.also is None else self.view(node.also)
        parts = node.parts or [(0, node.dst.c, node.dst)]
        if (not linear and conv.groups > 1) or not same or len(parts) > 2 or (len(parts) == 2 and also is not None):
            self.convolve_by_torch(node, src, add, also, parts)
            return
        stride, pad, dilation = (1, 0, 1) if linear else (conv.stride[0], conv.padding[0], conv.dilation[0])
        where = [self.view(value) for _, _, value in parts]
        if len(parts) == 2 and where[0].shape[-1] != parts[0][1]:
            where[0] = where[0][..., : parts[0][1]]
        stem = node.src is self.source and self.border is not None
        if stem:
            # One tap per row of the window, which is a range of 32 elements.
            whole = self.buffers[self.source]
            n, height, width, _ = whole.shape
            src = whole.as_strided((n, height, width, 32), whole.stride(), 0)
            kw, pad = 1, 0
        step = Convolution(
            src, where[0], self.network.packed(conv, stem), (kh, kw, stride, pad, dilation), node.dst.c,
            node.act == RELU, add, where[1] if len(where) == 2 else None, also,
        )  # fmt: skip
        self.steps.append(step)

    def convolve_by_torch(self, node: Node, src, add, also, parts) -> None:
        """Append a convolution that the kernel does not support."""
        conv = node.conv
        weight, bias = conv.weight.to(src), None if conv.bias is None else conv.bias.to(src)
        weight = weight.contiguous(memory_format=torch.channels_last)
        where = [(low, high, self.view(value)) for low, high, value in parts]

        def run() -> None:
            x = F.conv2d(nchw(src), weight, bias, conv.stride, conv.padding, conv.dilation, conv.groups)
            out = pointwise(nhwc(x), None, add, node.act)
            for low, high, dst in where:
                dst[..., : high - low].copy_(out[..., low:high])
            if also is not None:
                also.add_(out)

        self.steps.append(run)

    def load(self, images: torch.Tensor) -> None:
        """Copy images (N, C, H, W) of any strides into the network's input; N may be less than the network's."""
        n, c, h, w = images.shape
        if self.border is None:
            self.view(self.source)[:n].copy_(nhwc(images))
            return
        to = self.buffers[self.source]
        gpu_steps.load_images[(-(-n * h * w // 256),)](
            images, to, n * h * w, h, w, *images.stride(), *to.stride()[:2], CHS=c, ROOM=4, BORDER=self.border, BP=256
        )

    def run(self) -> torch.Tensor:
        """Compute and return `logits`."""
        for step in self.steps:
            step()
        return self.logits


def is_stem(node: Node) -> bool:
    """Return whether the kernel's method for few input channels supports a node."""
    conv = node.conv
    if node.kind != CONV or isinstance(conv, nn.Linear) or node.src.c > 4 or conv.groups > 1:
        return False
    return conv.kernel_size[1] <= 8 and conv.dilation[0] == conv.dilation[1] == 1


def nchw(x: torch.Tensor) -> torch.Tensor:
    """Return a view (N, C, H, W)."""
    return x.permute(0, 3, 1, 2)


def nhwc(x: torch.Tensor) -> torch.Tensor:
    """Return a view (N, H, W, C)."""
    return x.permute(0, 2, 3, 1)


def pointwise(x: torch.Tensor, gate: torch.Tensor | None, add: torch.Tensor | None, act: int) -> torch.Tensor:
    """Multiply, add and activate."""
    if gate is not None:
        x = x * gate
    if add is not None:
        x = x + add
    return F.relu(x) if act == RELU else torch.sigmoid(x) if act else x


def pool(src: torch.Tensor, dst: torch.Tensor, is_max: bool, window: tuple) -> None:
    """Launch `gpu_steps.pool`."""
    kh, kw, sh, sw, ph, pw, count_pad = window
    n, in_h, in_w, chs = src.shape
    _, out_h, out_w, _ = dst.shape
    unit = units(chs, src.stride(2), dst.stride(2))
    pixels, bc = n * out_h * out_w, min(64, 1 << (chs - 1).bit_length())
    bp = 32
    grid = (-(-pixels // bp), -(-chs // bc))
    gpu_steps.pool[grid](
        src, dst, pixels, in_h, in_w, out_h, out_w, chs // unit, src.stride(2) // unit, dst.stride(2) // unit,
        KH=kh, KW=kw, SH=sh, SW=sw, PH=ph, PW=pw, MAX=is_max, COUNT_PAD=bool(count_pad), UNIT=unit, BP=bp, BC=bc,
    )  # fmt: skip


class GpuNetwork:
    """A network that runs as Triton kernels, for capture into CUDA graphs.

    Args:
        graph: The traced model, in eval mode, with BatchNorm folded and groups padded to multiples of `UNIT` channels.
        dtype: Type of activations and weights, bfloat16 or float16; sums are float32.
        device: The GPU, or the CPU under Triton's interpreter.
    """

    def __init__(self, graph: fx.GraphModule, dtype: torch.dtype, device: torch.device) -> None:
        self.graph, self.dtype, self.device = graph, dtype, device
        self.weights: dict[tuple[nn.Module, bool], Weights] = {}
        self.tuned: dict[tuple, tuple[Tile, int]] = {}
        self.partial = torch.empty(0, device=device)
        self.ready = torch.empty(0, dtype=torch.int32, device=device)

    def program(self, shape: tuple[int, ...]) -> Program:
        """Return the kernels for images of a shape (N, C, H, W)."""
        n, c, h, w = shape
        return Program(self, (n, c, h, w))

    def packed(self, conv: Any, stem: bool) -> Weights:
        """Return the weights of a convolution in the kernel's layout."""
        if (conv, stem) not in self.weights:
            weight = conv.weight.detach().float()
            if weight.ndim == 2:
                weight = weight[:, :, None, None]
            taps = weight.permute(2, 3, 1, 0)  # height, width, inputs, outputs
            if stem:
                taps = F.pad(taps, (0, 0, 0, 4 - taps.shape[2], 0, 8 - taps.shape[1])).flatten(1, 2)
            else:
                taps = taps.flatten(0, 1)
            rows, pitch = (-(-size // 16) * 16 for size in taps.shape[1:])
            taps = F.pad(taps, (0, pitch - taps.shape[2], 0, rows - taps.shape[1])).contiguous()
            flat = F.pad(taps.flatten(), (0, SLACK * (pitch + 1))).to(self.device, self.dtype)
            bias = torch.zeros(len(weight)) if conv.bias is None else conv.bias.detach().float()
            self.weights[conv, stem] = Weights(flat, F.pad(bias.to(self.device), (0, SLACK)), rows, pitch)
        return self.weights[conv, stem]

    def scratch(self, sums: int, counters: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return memory for partial sums, which all convolutions share, and counters, which are 0."""
        if sums > self.partial.numel():
            self.partial = torch.empty(sums, device=self.device)
        if counters > self.ready.numel():
            self.ready = torch.zeros(counters, dtype=torch.int32, device=self.device)
        return self.partial, self.ready

    def tune(self, steps: list[Convolution]) -> None:
        """Choose the fastest tile size of each convolution."""
        if self.device.type != "cuda":
            return
        processors = torch.cuda.get_device_properties(self.device).multi_processor_count
        new = {step.key: step for step in steps if step.key not in self.tuned}
        choices = {key: list(step.choices(processors)) for key, step in new.items()}
        kernels: dict[tuple, tuple[Convolution, Tile, int]] = {}
        for key, step in new.items():
            for tile, split in choices[key]:
                kernels.setdefault((step.variant, tile, split > 1), (step, tile, split))
        with ThreadPoolExecutor() as pool:  # compilers run in parallel
            list(pool.map(lambda kernel: kernel[0].compile(*kernel[1:]), kernels.values()))
        for key, step in new.items():
            timed = self.time(step, choices[key]) or self.time(step, [(SMALLEST, 1)])
            if not timed:
                raise Unsupported("no tile size of the kernel works on this GPU")
            self.tuned[key] = min(timed)[1:]
        for step in steps:
            tile, split = self.tuned[step.key]
            step.choose(tile, split, self.scratch(*step.room(tile, split)))

    def time(self, step: Convolution, choices: list[tuple[Tile, int]]) -> list[tuple[float, Tile, int]]:
        """Return the times of a convolution with tile sizes, in milliseconds, for those that this GPU supports."""
        timed = []
        for tile, split in choices:
            step.choose(tile, split, self.scratch(*step.room(tile, split)))
            with contextlib.suppress(OutOfResources):
                timed.append((milliseconds(step), tile, split))
        return timed


def milliseconds(step: Callable[[], object]) -> float:
    """Return the time of a kernel in milliseconds."""
    step()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    times = []
    for _ in range(2):
        torch.cuda.synchronize()
        occupy_gpu(1_000_000)
        start.record()
        for _ in range(REPEATS):
            step()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / REPEATS)
    return min(times)
