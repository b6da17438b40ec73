"""Convolutional networks as a list of native steps: the `native` CPU backend of `res2net_zoo.optimize`.

Libraries run a network operation by operation, which is inefficient for a Res2Net: it has many small convolutions,
each on a slice of a tensor that must be copied, and 26 channels wide, while kernels process blocks of 16 or 32. Here
the network is compiled once for an image size:

- a convolution includes its bias, residual addition and activation;
- the groups of a Res2Net block (Eq. 1) are never copied: K_i reads its slice of the output of conv1, writes y_i into
  the input of conv3, and adds it to the slice that K_{i+1} reads;
- in int8, additions precede rounding to 8 bits;
- all threads execute the list together, and synchronize only where needed.

The steps are in `cpu_network.cpp`, which is compiled on the machine that runs it.
"""

import contextlib
import ctypes
import math
import mmap
import threading
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from res2net_zoo.kernels.compiler import CannotCompile, compile_library
from res2net_zoo.kernels.lowering import (
    CONV,
    INPUT,
    POINTWISE,
    RELU,
    Call,
    Lowering,
    Node,
    Unsupported,
    Value,
    fuse_nodes,
    last_large_map,
)
from res2net_zoo.kernels.quantization import LARGEST_WEIGHT, LEVELS, Scale, calibrate, quantize_weight

SOURCE = Path(__file__).with_name("cpu_network.cpp")
FUNCTIONS = {
    "run": (None, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_int),
    **dict.fromkeys(("has_bf16", "lanes", "rows", "tiled_pixels"), (ctypes.c_int,)),
}


def _l2_cache_bytes() -> int:
    """Return the size of the L2 cache of a core, or 1 MB if the system does not report it."""
    try:
        return int(Path("/sys/devices/system/cpu/cpu0/cache/index2/size").read_text().strip().removesuffix("K")) * 1024
    except (OSError, ValueError):
        return 2**20


# Measured on processors with an L2 cache of 1 MB (AMD Zen 5) and of 2 MB (Intel with AMX).
L2_BYTES = _l2_cache_bytes()
IMAGES_AT_ONCE = 8 if L2_BYTES >= 2**21 else 4  # 16 with tile registers
PIXELS_AT_ONCE = 2**23  # maximum number of pixels in a batch of more than 4 images
CACHE_BYTES = 2**15 if L2_BYTES >= 2**21 else 2**18  # block of its input that a convolution processes at a time
CACHE_BYTES_FOR_LARGE_WEIGHTS = L2_BYTES // 4
CACHE_WEIGHTS = 2**20  # size of weights that fit in the L2 cache
# The order in which instructions pack the output channels of two vectors: `pack` in vectors.h.
PACKED = torch.arange(32).view(4, 2, 4).transpose(0, 1).flatten()
LINE = 64  # bytes of a cache line, and of a row of a tile register
MAP_ELEMENTS = L2_BYTES // 4  # minimum map size to process images one by one; half with tile registers


class _View(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("pixels", ctypes.c_void_p),
        ("image", ctypes.c_int64),
        ("row", ctypes.c_int64),
        ("pixel", ctypes.c_int64),
        ("scale", ctypes.c_float),
        ("zero", ctypes.c_float),
    )


class _Tile(ctypes.Structure):
    _fields_ = (
        ("weight", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("scale", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("first_in", "channels_in", "first_out", "channels_out")),
    )


class _Step(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int64) for name in ("kind", "act", "wait", "pixels", "channels")),
        *((name, _View) for name in ("src", "gate", "add", "dst", "also")),
        *((name, ctypes.c_int64) for name in ("dst_is_float", "paired")),
        *((name, ctypes.c_float) for name in ("floor", "gain", "shift")),
        *((name, ctypes.c_int64) for name in ("rows", "bytes", "panel", "block", "tiles", "taps")),
        ("tile", ctypes.c_void_p),
        ("tap", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("images", "in_h", "in_w", "out_h", "out_w")),
        *((name, ctypes.c_int64) for name in ("kernel_h", "kernel_w", "stride_h", "stride_w", "pad_h", "pad_w")),
        ("count_pad", ctypes.c_int64),
    )


@cache
def library() -> ctypes.CDLL:
    """Return the compiled steps, compiled if they are not in the cache.

    Raises:
        Unsupported: A C++ compiler is missing, or cannot compile them.
    """
    try:
        return compile_library(SOURCE, FUNCTIONS)
    except CannotCompile as error:
        raise Unsupported(str(error)) from error


def _padded(size: int, multiple: int) -> int:
    """Round a size up to a multiple."""
    return -(-size // multiple) * multiple


class _Arena:
    """Memory in huge pages, if the system supports them.

    Steps access dozens of distant addresses at a time, which cause many TLB misses with pages of 4 KB.
    """

    CHUNK = 32 * 2**20

    def __init__(self) -> None:
        self.chunk: mmap.mmap | None = None
        self.used = 0

    def zeros(self, size: int, dtype: torch.dtype) -> torch.Tensor:
        """Return zeros that are aligned to a cache line."""
        count = -(-size * dtype.itemsize // 64) * 64
        if self.chunk is None or self.used + count > len(self.chunk):
            self.chunk, self.used = mmap.mmap(-1, max(count, self.CHUNK)), 0
            if hasattr(mmap, "MADV_HUGEPAGE"):
                with contextlib.suppress(OSError):  # unsupported by the kernel
                    self.chunk.madvise(mmap.MADV_HUGEPAGE)
        begin, self.used = self.used, self.used + count
        return torch.frombuffer(self.chunk, dtype=dtype, count=size, offset=begin)


class _Program:
    """The steps for one batch size and image size, and their memory."""

    def __init__(self, network: "Network", shape: tuple[int, int, int, int]) -> None:
        source, calls, results = network.lower(shape)
        self.network = network
        self.arena = _Arena()
        self.keep: list[Any] = []
        self.tables: dict[tuple, torch.Tensor] = {}
        self.buffers: dict[Value, torch.Tensor] = {}

        # Process images one by one where maps are large, and together where weights are large.
        single, first_calls, _ = network.lower((1, *shape[1:]))
        cut = last_large_map(single, first_calls, MAP_ELEMENTS // (1 + network.has_tiles)) if shape[0] > 1 else None
        front = [Node(INPUT, single, single)]
        together = [Node(INPUT, source, source)]
        passed: list[tuple[Value, Value]] = []  # value of an image, and that of all images
        if cut:
            count, last = cut
            pairs = [(single, source), *((one.out, all_.out) for one, all_ in zip(first_calls, calls, strict=True))]
            passed = [(one, whole) for one, whole in pairs[: count + 1] if one is last or whole in results]
            front += fuse_nodes(single, first_calls[:count], *(one for one, _ in passed))
            passed = [(_separate(one, front), whole) for one, whole in passed]
            source = calls[count - 1].out
            calls, together = calls[count:], []
        together += fuse_nodes(source, calls, *results)
        # Logits are always float32.
        results = [_separate(value, together, last=True) if value.flat else value for value in results]
        for value in results:
            value.is_float |= value.flat
        for node in (*front, *together):
            if node.kind == CONV and isinstance(node.conv, nn.Conv2d):
                root, _ = node.src.place()
                root.pad = max(root.pad, *node.conv.padding)
        steps = []
        if cut:
            for one, whole in passed:
                whole.pad = one.pad = max(whole.pad, one.pad)
                self.buffers[one] = self.buffers[whole] = self.buffer(whole)
            self.place(front)
            for i in range(shape[0]):
                for one, whole in passed:
                    self.buffers[one] = self.buffers[whole][i * one.image :]
                steps += [step for node in front for step in self.steps_of(node)]
        self.place(together, results)
        steps += [step for node in together for step in self.steps_of(node)]
        self.synchronize(steps)
        self.steps = (_Step * len(steps))(*(step for step, _, _ in steps))
        self.inputs = [i for i, (step, _, _) in enumerate(steps) if step.kind == INPUT]
        self.results = [self.tensor(value) for value in results]
        self.scales = [network.scale_of(value) for value in results]

    def tensor(self, value: Value) -> torch.Tensor:
        """Return a value as a view of its buffer, (N, C) or (N, C, H, W)."""
        root, first = value.place()
        origin = root.pad * (root.row + root.pitch) + first
        strides = (root.image, 1, root.row, root.pitch)
        pixels = self.buffers[root].as_strided(value.shape, strides, origin)
        return pixels[:, :, 0, 0] if value.flat else pixels

    def buffer(self, root: Value) -> torch.Tensor:
        """Allocate a value's buffer, with zeros for the border, which no step writes.

        Steps read several channels or pixels at a time. The additional elements at the end are those that they
        multiply by zero, or whose result they discard.
        """
        size = root.n * root.image + root.pitch + 64
        if size >= 2**31:
            raise Unsupported(f"a map of {size} elements is too large for 32-bit offsets")
        buffer = self.arena.zeros(size, torch.float32 if root.is_float else self.network.dtype)
        zero = self.network.scale_of(root).zero
        return buffer.fill_(zero) if root.pad and zero else buffer

    def place(self, nodes: list[Node], results: Sequence[Value] = ()) -> None:
        """Allocate the buffers of values; those of the same shape with disjoint lifetimes share one, except results."""
        last: dict[Value, int] = {}
        for i, node in enumerate(nodes):
            for value in (node.src, node.dst, node.gate, node.add, node.also):
                if value is not None:
                    last[value.place()[0]] = i
            for _, _, value in node.parts:
                last[value.place()[0]] = i
        last |= {value.place()[0]: len(nodes) for value in results}
        free: dict[tuple, list[torch.Tensor]] = {}
        given = set(self.buffers)
        for i, node in enumerate(nodes):
            for value in (node.dst, *(where for _, _, where in node.parts)):
                root, _ = value.place()
                if root not in self.buffers:
                    spare = free.get(self.layout(root))
                    self.buffers[root] = spare.pop() if spare else self.buffer(root)
            for root, end in last.items():
                if end == i and root not in given:
                    free.setdefault(self.layout(root), []).append(self.buffers[root])

    def layout(self, root: Value) -> tuple[int, ...]:
        """Return the properties that values must share to reuse a buffer: layout, and content of the border."""
        return (*root.layout, self.network.scale_of(root).zero if root.pad else 0)

    def table(self, *key: int) -> int:
        """Return the address of the offsets of pixels (n, h, w), n * image + h * row + w * pixel + start."""
        if key not in self.tables:
            n, h, w, image, row, pixel, start = key
            steps = (torch.arange(size) * by for size, by in ((n, image), (h, row), (w, pixel)))
            offsets = sum(torch.meshgrid(*steps, indexing="ij"), torch.tensor(start))
            self.tables[key] = offsets.flatten().to(torch.int32)
        return self.tables[key].data_ptr()

    def view(self, value: Value | None, pixels: tuple[int, ...] | None = None, skip: int = 0) -> _View:
        """Return the view of a value for a step.

        Args:
            value: The value, or None for a null view.
            pixels: Height, width, strides and padding of the windows that read it; None for single pixels.
            skip: Offset of the step's channel indices relative to the value's.
        """
        if value is None:
            return _View()
        root, first = value.place()
        buffer = self.buffers[root]
        image, row, pixel = root.image, root.row, root.pitch
        h, w, sh, sw, ph, pw = pixels or (value.h, value.w, 1, 1, 0, 0)
        origin = root.pad * (row + pixel)
        table = self.table(value.n, h, w, image, row * sh, pixel * sw, origin - ph * row - pw * pixel)
        data = buffer.data_ptr() + (first - skip) * buffer.element_size()
        return _View(data, table, image, row, pixel, *self.network.scale_of(value))

    def steps_of(self, node: Node) -> list[tuple[_Step, list, list]]:
        """Return the steps of a node, each with the ranges of channels that it reads and writes."""
        src, dst = node.src, node.dst
        step = _Step(kind=node.kind, act=node.act, pixels=dst.n * dst.h * dst.w, channels=dst.c, images=dst.n)
        step.in_h, step.in_w, step.out_h, step.out_w = src.h, src.w, dst.h, dst.w
        reads = [self.span(value) for value in (src, node.add, node.gate, node.also) if value is not None]
        if node.kind == CONV:
            steps = []
            for low, high, where in node.parts or [(0, dst.c, dst)]:
                part = _Step.from_buffer_copy(step)
                self.convolve(part, node, low, high, where)
                writes = [self.span(where, 0 if where.base is not None and where is not dst else low, high - low)]
                if node.also is not None:
                    writes.append(self.span(node.also))
                steps.append((part, reads, writes))
            return steps
        step.src, step.dst = self.view(src), self.view(dst)
        if node.kind == INPUT:
            # `run` sets the address of the images.
            origin = step.dst.pixels
            step.dst.data += int(ctypes.c_int32.from_address(origin).value) * self.network.dtype.itemsize
            step.src = _View()
            reads = []
        elif node.kind == POINTWISE:
            step.add = self.view(node.add)
            step.dst_is_float = dst.place()[0].is_float
            if node.gate is not None:
                root, first = node.gate.place()
                gate = self.buffers[root]
                table = self.table(src.n, src.h, src.w, root.pitch, 0, 0, 0)
                data = gate.data_ptr() + first * gate.element_size()
                step.gate = _View(data, table, 0, 0, 0, *self.network.scale_of(node.gate))
        else:
            for view in (step.src, step.dst):
                view.data += int(ctypes.c_int32.from_address(view.pixels).value) * self.network.dtype.itemsize
            step.dst_is_float = dst.place()[0].is_float
            if node.window:
                step.kernel_h, step.kernel_w, step.stride_h, step.stride_w, step.pad_h, step.pad_w = node.window[:6]
                step.count_pad = node.window[6]
        return [(step, reads, [self.span(dst)])]

    def span(self, value: Value, skip: int = 0, size: int | None = None) -> tuple[int, int, int]:
        """Return the address of a value's buffer, and the value's range of channels in it."""
        root, first = value.place()
        storage = self.buffers[root].untyped_storage().data_ptr()
        return storage, first + skip, first + skip + (value.c if size is None else size)

    def convolve(self, step: _Step, node: Node, low: int, high: int, where: Value) -> None:
        """Set the fields of a convolution's step for the output channels from `low` to `high`."""
        conv, src, dst = node.conv, node.src, node.dst
        root, _ = src.place()
        linear = isinstance(conv, nn.Linear)
        (sh, sw), (ph, pw), (dh, dw) = (
            ((1, 1), (0, 0), (1, 1)) if linear else (conv.stride, conv.padding, conv.dilation)
        )
        kh, kw = (1, 1) if linear else conv.kernel_size
        # For dense pixels, the taps of a row are one range of channels: a stem of 7 x 7 x 3 is 7 taps of 21 channels.
        merged = kw > 1 and dw == 1 and root.c == src.c < 16 and (linear or conv.groups == 1)
        tiles, packed = self.network.packed(conv, low, high, merged, node, where)
        step.src = self.view(src, (dst.h, dst.w, sh, sw, ph, pw))
        step.add = self.view(node.add)
        step.also = self.view(node.also)
        # Tiles count channels from the convolution's first one, but a separate buffer of a part starts at 0.
        step.dst = self.view(where, skip=0 if where is dst or where.base is None else low)
        step.dst_is_float = where.place()[0].is_float
        step.paired = self.network.is_paired(where)
        self.rescale(step, node, where)
        row, pixel = root.row, root.pitch
        taps = [y * dh * row + x * dw * pixel for y in range(kh) for x in range(1 if merged else kw)]
        tap = torch.tensor(taps, dtype=torch.int32)
        self.keep += [tap, packed]
        step.tap, step.taps = tap.data_ptr(), len(taps)
        step.tile, step.tiles = ctypes.addressof(tiles), len(tiles)
        # Number of pixel groups whose input stays in the L2 cache while all tiles process it.
        size = self.network.dtype.itemsize
        step.rows = library().rows()
        group = step.rows * src.c * sh * sw * size
        step.block = max(1, CACHE_BYTES // group)
        if len(taps) * src.c * step.channels * size > CACHE_WEIGHTS:
            step.block = max(1, CACHE_BYTES_FOR_LARGE_WEIGHTS // group)
        else:
            # Threads split pixels, so that each reads what it has written; if weights are large, they split channels.
            groups, threads = -(-step.pixels // step.rows), torch.get_num_threads()
            step.block = -(-groups // _padded(-(-groups // step.block), threads))
        if self.network.has_tiles and len({tile.channels_in for tile in tiles}) == 1:
            consecutive = kh == kw == sh == sw == 1 and root.pad == 0
            self.use_tile_registers(step, tiles[0], root, src.place()[1], consecutive)

    def use_tile_registers(self, step: _Step, tile: _Tile, src: Value, first: int, consecutive: bool) -> None:
        """Set the fields of a convolution's step that uses tile registers.

        Args:
            step: The step.
            tile: Its first tile.
            src: The value whose buffer it reads.
            first: Its first channel in the buffer.
            consecutive: Whether it reads all pixels of the buffer, in their order and without a border.
        """
        size = self.network.dtype.itemsize
        groups = -(-step.pixels // library().tiled_pixels())
        step.rows = -(-step.pixels // groups)
        step.bytes = _padded(step.taps * _padded(tile.channels_in * size, 4), LINE)
        inside = (first + tile.first_in) * size + step.bytes <= src.pitch * size
        if not (consecutive and inside):
            step.panel = (step.bytes // LINE + 1 | 1) * LINE  # an odd number of cache lines, see `Value.pitch`
        # If the weights fit in the L2 cache, it is faster to write a group's outputs together.
        if step.bytes * step.channels <= CACHE_WEIGHTS:
            step.block = 1
        else:
            step.block = max(1, CACHE_BYTES_FOR_LARGE_WEIGHTS // (step.rows * (step.panel or src.pitch * size)))

    def rescale(self, step: _Step, node: Node, where: Value) -> None:
        """Set the minimum of a convolution's output, and the scales of its addends relative to the output's."""
        step.floor = 0 if node.act == RELU else -math.inf
        if self.network.dtype != torch.uint8:
            return
        scale, zero = self.network.scale_of(where)
        step.add.scale /= scale
        if not step.dst_is_float:
            step.floor = zero if node.act == RELU else 0
        if node.also is not None and node.total is not None:
            total = self.network.scale_of(node.total)
            step.gain, step.also.scale = scale / total.scale, step.also.scale / total.scale
            step.shift = total.zero - step.gain * zero - step.also.scale * step.also.zero

    def synchronize(self, steps: list[tuple[_Step, list, list]]) -> None:
        """Synchronize threads before each step that conflicts with the steps since the last synchronization."""

        def conflict(some: list, others: list) -> bool:
            return any(a == b and low < top and bottom < high for a, low, high in some for b, bottom, top in others)

        read: list = []
        written: list = []
        for step, reads, writes in steps:
            if conflict(reads, written) or conflict(writes, written) or conflict(writes, read):
                step.wait = 1
                read, written = [], []
            read, written = read + reads, written + writes

    def run(self, images: torch.Tensor) -> list[torch.Tensor]:
        """Compute the results for images (N, C, H, W) in float32 with any strides; the next run overwrites them."""
        image, channel, row, pixel = images.stride()
        for i, index in enumerate(self.inputs):
            step = self.steps[index]
            step.src = _View(images.data_ptr() + i * image * images.element_size(), None, image, row, pixel)
            step.gate.image = channel
        library().run(self.steps, len(self.steps), torch.get_num_threads(), self.network.dtype.itemsize)
        if self.network.dtype != torch.uint8:
            return self.results
        pairs = zip(self.results, self.scales, strict=True)
        return [
            result if result.is_floating_point() else (result.float() - zero) * scale for result, (scale, zero) in pairs
        ]


def _separate(value: Value, nodes: list[Node], last: bool = False) -> Value:
    """Return a value, or its copy if it is a part of another value.

    Args:
        value: The value.
        nodes: The nodes that compute it, to which the copy is appended.
        last: Whether to copy it as well if the last node does not compute all of it, or other nodes can read it.
    """
    if value.base is None and not (last and (not nodes or nodes[-1].dst is not value or nodes[-1].parts)):
        return value
    copy = Value(*value.shape, flat=value.flat, line=value.line, like=value)
    nodes.append(Node(POINTWISE, value, copy))
    return copy


def _empty(count: int, result: torch.Tensor) -> torch.Tensor:
    """Return memory for a number of images' results in float32, in channels_last if they are maps."""
    layout = torch.channels_last if result.ndim == 4 else torch.contiguous_format
    return torch.empty((count, *result.shape[1:]), memory_format=layout)


def _shape_of(images: torch.Tensor) -> tuple[int, int, int, int]:
    n, c, h, w = images.shape
    return n, c, h, w


class Network:
    """A network that runs as native steps.

    Programs are compiled on demand for each batch size and image size, and the last few are cached. Calls are
    serialized by a lock, because the memory of the steps is shared.

    Args:
        graph: The traced model, in eval mode, with BatchNorm folded.
        dtype: Type of activations and weights: float32 or bfloat16, with sums in float32, or int8, with sums in
            int32.
        calibration: For int8, preprocessed images (N, C, H, W) that determine the scales of activations.
        images_at_once: Maximum batch size; larger batches are split. A small one keeps activations in the caches,
            a large one reuses weights for more images. By default it depends on the processor and the image size.

    Raises:
        Unsupported: This machine cannot compile the steps, or does not support bfloat16.
    """

    def __init__(
        self,
        graph: fx.GraphModule,
        dtype: torch.dtype = torch.float32,
        images_at_once: int | None = None,
        calibration: torch.Tensor | None = None,
    ) -> None:
        if dtype == torch.bfloat16 and not library().has_bf16():
            raise Unsupported("this processor does not support bfloat16 products")
        if dtype not in (torch.float32, torch.bfloat16, torch.int8):
            raise Unsupported(f"{dtype} is unsupported")
        library()
        self.graph = graph
        (self.output,) = next(reversed(graph.graph.nodes)).args  # a node, or a list or tuple of nodes
        self.dtype = torch.uint8 if dtype == torch.int8 else dtype  # of activations
        self.has_tiles = dtype != torch.float32 and library().tiled_pixels() > 0
        self.scales: dict[str, Scale] = {}
        if dtype == torch.int8:
            if calibration is None:
                raise Unsupported("int8 needs calibration images")
            self.scales = calibrate(graph, calibration)
        self.images_at_once = images_at_once
        self.programs: dict[tuple[int, ...], _Program] = {}
        self.weights: dict[tuple, tuple[Any, Any]] = {}
        self.arena = _Arena()
        self.lock = threading.Lock()

    def __call__(self, images: torch.Tensor) -> Any:
        """Compute the model's output.

        Args:
            images: (N, C, H, W), on the CPU; N may be 0.

        Returns:
            Logits (N, classes), a map (N, C, h, w), or a list or tuple of them, as the model returns; in float32, maps
            in channels_last.

        Raises:
            Unsupported: An operation of the model is unsupported for images of this size.
        """
        images = images.detach().float()
        count, done = len(images), 0
        with self.lock:
            at_once = self.images_at_once or self.best_batch(images.shape[2] * images.shape[3])
            whole = self.program((min(max(count, 1), at_once), *_shape_of(images)[1:])).results
            results = [_empty(count, result) for result in whole]
            for part in images.split(at_once) if count else ():
                for result, some in zip(results, self.program(_shape_of(part)).run(part), strict=True):
                    result[done : done + len(part)] = some
                done += len(part)
        if isinstance(self.output, tuple):
            return tuple(results)
        return results if isinstance(self.output, list) else results[0]

    def best_batch(self, pixels: int) -> int:
        """Return the best batch size for images with a number of pixels."""
        return min(16 if self.has_tiles else IMAGES_AT_ONCE, max(4, PIXELS_AT_ONCE // pixels))

    def lower(self, shape: tuple[int, int, int, int]) -> tuple[Value, list[Call], list[Value]]:
        """Return the value of the images, the calls of the model, and its results."""
        source, lowering = Value(*shape, line=LINE // self.dtype.itemsize), Lowering(self.graph)
        output = lowering.run(source)
        results = list(output) if isinstance(output, tuple | list) else [output]
        if not all(isinstance(result, Value) for result in results):
            raise Unsupported("the model's output must be a tensor, or a list or tuple of tensors")
        return source, lowering.calls, results

    def scale_of(self, value: Value) -> Scale:
        """Return the scale of a value's integers; slices and parts of a concatenation share that of the whole."""
        while (base := value.base or value.like) is not None and not (value.is_sum or value.is_float):
            value = base
        return Scale(1.0, 0) if value.is_float or not self.scales else self.scales[value.name]

    def program(self, shape: tuple[int, int, int, int]) -> _Program:
        """Return the steps for images of a shape (N, C, H, W)."""
        if shape not in self.programs:
            while len(self.programs) >= 4:
                del self.programs[next(iter(self.programs))]
            self.programs[shape] = _Program(self, shape)
        return self.programs[shape]

    def packed(self, conv: Any, low: int, high: int, merged: bool, node: Node, where: Value) -> tuple[Any, Any]:
        """Return the tiles of a convolution's output channels from `low` to `high`, and the tensors of their memory."""
        added = Scale(0.0, 0) if node.add is None else self.scale_of(node.add)
        scales = (self.scale_of(node.src), self.scale_of(where), added, self.is_paired(where))
        key = (conv, low, high, merged, scales)
        if key not in self.weights:
            self.weights[key] = self.pack(conv, low, high, merged, *scales)
        return self.weights[key]

    def is_paired(self, value: Value) -> bool:
        """Return whether the steps pack two vectors of a value's channels at a time."""
        return self.dtype == torch.uint8 and library().lanes() == 16 and not value.place()[0].is_float

    def pack(
        self, conv: Any, low: int, high: int, merged: bool, src: Scale, dst: Scale, add: Scale, paired: bool
    ) -> tuple[Any, Any]:
        """Pack weights in the layout of `Tile` in cpu_network.cpp."""
        lanes, together = library().lanes(), 4 // self.dtype.itemsize
        weight = conv.weight.detach().float()
        if weight.ndim == 2:
            weight = weight[:, :, None, None]
        out_chs, group_in, kh, kw = weight.shape
        groups = getattr(conv, "groups", 1)
        group_out = out_chs // groups
        bias = torch.zeros(out_chs) if conv.bias is None else conv.bias.detach().float()
        scale = torch.ones(out_chs)
        if self.dtype == torch.uint8:
            if weight[0].numel() * LEVELS * LARGEST_WEIGHT >= 2**31:
                raise Unsupported("a sum of so many products of 8-bit integers can overflow 32 bits")
            weight, scale = quantize_weight(weight)
            gain = scale.double() * src.scale / dst.scale
            zeros = src.zero * gain * weight.flatten(1).sum(1) + add.zero * add.scale / dst.scale
            bias, scale = (bias / dst.scale + dst.zero - zeros).float(), gain.float()
        # A tile of a grouped convolution includes all groups that it overlaps, so it is narrow.
        vectors = 2 if groups == 1 or group_out % (2 * lanes) == 0 else 1
        keep, tiles = [], []
        for begin in range(low, high, lanes * vectors):
            end = min(begin + lanes * vectors, high)
            width = lanes * min(vectors, -(-(end - begin) // lanes))
            first_group, last_group = begin // group_out, (end - 1) // group_out
            chs = (last_group - first_group + 1) * group_in
            block = torch.zeros(kh, kw, chs, width, dtype=weight.dtype)
            for group in range(first_group, last_group + 1):
                a, b = max(begin, group * group_out), min(end, (group + 1) * group_out)
                c = (group - first_group) * group_in
                block[:, :, c : c + group_in, a - begin : b - begin] = weight[a:b].permute(2, 3, 1, 0)
            if merged:
                block, chs = block.view(kh, 1, kw * chs, width), kw * chs
            order = PACKED if paired and width == len(PACKED) else torch.arange(width)
            block = F.pad(block, (0, 0, 0, -chs % together)).view(-1, together, width)[..., order].transpose(1, 2)
            block = F.pad(block, (0, 0, 0, 0, 0, -len(block) % 16))  # tile registers load 16 at a time
            packed = block.flatten().to(torch.int8).view(torch.uint8) if self.dtype == torch.uint8 else block.flatten()
            block = self.arena.zeros(block.numel(), self.dtype).copy_(packed)
            offsets, factors = (
                F.pad(x[begin:end], (0, width - (end - begin)))[order].contiguous() for x in (bias, scale)
            )
            keep += [block, offsets, factors]
            memory = (block.data_ptr(), offsets.data_ptr(), factors.data_ptr())
            tiles.append(_Tile(*memory, first_group * group_in, chs, begin, end - begin))
        return (_Tile * len(tiles))(*tiles), keep
