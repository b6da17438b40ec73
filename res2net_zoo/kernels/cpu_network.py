"""Convolutional networks as one list of machine-code steps: the CPU backend of `res2net_zoo.optimize`.

Libraries run a network operation by operation. A Res2Net suffers from that: it has many small
convolutions, each on a slice of a tensor that has to be copied out and back in, 26 channels wide,
where their kernels think in blocks of 16 or 32. Here the network is laid out once for its image size:

- a convolution writes its bias, residual addition and activation with its result;
- the groups of a Res2Net block (Eq. 1) are never copied: K_i reads its slice where conv1 wrote it,
  writes y_i where conv3 reads it, and adds it onto the slice that K_{i+1} reads;
- all threads walk the list together, and wait only where they must.

`cpu_network.cpp` has the steps. It is compiled on the machine that runs it, once, by the C++ compiler
that it has.
"""

import contextlib
import ctypes
import mmap
import operator
import threading
from collections import Counter
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from res2net_zoo.kernels.compiler import CannotCompile, compile_library

SOURCE = Path(__file__).with_name("cpu_network.cpp")
FUNCTIONS = {
    "run": (None, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_int),
    **dict.fromkeys(("has_bf16", "lanes", "rows"), (ctypes.c_int,)),
}

CONV, POINTWISE, MAX_POOL, AVG_POOL, MEAN, RESIZE, INPUT = range(7)
NONE, RELU, SIGMOID = range(3)

CACHE_BYTES = 256 * 1024  # of its input that a convolution goes over at a time: a part of a core's second cache
MAP_ELEMENTS = 2**18  # of one image's map, from which on images go one by one: a core's second cache holds no more


class Unsupported(Exception):
    """The network has an unsupported operation, or the machine cannot compile the steps."""


class _View(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("pixels", ctypes.c_void_p),
        ("image", ctypes.c_int64),
        ("row", ctypes.c_int64),
        ("pixel", ctypes.c_int64),
    )


class _Tile(ctypes.Structure):
    _fields_ = (
        ("weight", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("first_in", "channels_in", "first_out", "channels_out")),
    )


class _Step(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int64) for name in ("kind", "act", "wait", "pixels", "channels")),
        *((name, _View) for name in ("src", "gate", "add", "dst", "also")),
        *((name, ctypes.c_int64) for name in ("dst_is_float", "block", "tiles", "taps")),
        ("tile", ctypes.c_void_p),
        ("tap", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("images", "in_h", "in_w", "out_h", "out_w")),
        *((name, ctypes.c_int64) for name in ("kernel_h", "kernel_w", "stride_h", "stride_w", "pad_h", "pad_w")),
        ("count_pad", ctypes.c_int64),
    )


@cache
def library() -> ctypes.CDLL:
    """Return the compiled steps, compiling them if this machine has not yet.

    Raises:
        Unsupported: There is no C++ compiler, or it cannot compile them.
    """
    try:
        return compile_library(SOURCE, FUNCTIONS)
    except CannotCompile as error:
        raise Unsupported(str(error)) from error


@dataclass(eq=False)
class _Value:
    """A tensor (N, C, H, W), and where it lies: a buffer of its own, or `first` channels into another."""

    n: int
    c: int
    h: int
    w: int
    base: "_Value | None" = None
    first: int = 0
    pad: int = 0  # the border of zeros that its readers want
    is_float: bool = False

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return (self.n, self.c, self.h, self.w)

    @property
    def pitch(self) -> int:
        """Elements from one pixel to the next in its buffer.

        An odd number of cache lines: pixels 4 KB apart would all fall into the same few places of a
        first cache. An image's few channels stay together, for its convolution's sake.
        """
        return self.c if self.c < 16 else (-(-self.c // 16) | 1) * 16

    @property
    def row(self) -> int:
        """Elements from one row to the next."""
        return (self.w + 2 * self.pad) * self.pitch

    @property
    def image(self) -> int:
        """Elements from one image to the next."""
        return (self.h + 2 * self.pad) * self.row

    @property
    def layout(self) -> tuple[int, ...]:
        """What values must have in common to have one buffer after another; also where the border is."""
        return (self.n, self.h, self.w, self.c, self.pad, self.is_float)

    def place(self) -> tuple["_Value", int]:
        """Return the value whose buffer this one lies in, and how many channels into it."""
        first, value = self.first, self
        while value.base is not None:
            value = value.base
            first += value.first
        return value, first


@dataclass(eq=False)
class _Node:
    """An operation, and with fusion its activation and what is added to its result or gets it added."""

    kind: int
    src: _Value
    dst: _Value
    act: int = NONE
    gate: _Value | None = None
    add: _Value | None = None
    also: _Value | None = None
    conv: Any = None
    window: tuple = ()
    # Of a convolution: ranges of its output channels, and where each goes.
    parts: list[tuple[int, int, _Value]] = field(default_factory=list)


@dataclass(eq=False)
class _Call:
    name: str
    inputs: tuple[_Value, ...]
    out: _Value
    detail: Any = None


class _Lowering(fx.Interpreter):
    """Runs a traced model on `_Value`s in place of tensors, and lists what it calls."""

    def __init__(self, graph: fx.GraphModule) -> None:
        super().__init__(graph)
        self.extra_traceback = False
        self.calls: list[_Call] = []

    def emit(self, name: str, *inputs: _Value, shape: tuple[int, int, int, int] | None = None, detail: Any = None):
        self.calls.append(_Call(name, inputs, _Value(*(shape or inputs[0].shape)), detail))
        return self.calls[-1].out

    def call_module(self, target: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        module = self.fetch_attr(str(target))
        (x,) = args
        match module:
            case nn.Identity() | nn.Dropout() | nn.Flatten():
                return self.flattened(x) if isinstance(module, nn.Flatten) else x
            case nn.ReLU():
                return self.emit("relu", x)
            case nn.Sigmoid():
                return self.emit("sigmoid", x)
            case nn.Conv2d() if module.padding_mode == "zeros" and not isinstance(module.padding, str):
                (kh, kw), (sh, sw), (ph, pw), (dh, dw) = (
                    module.kernel_size,
                    module.stride,
                    module.padding,
                    module.dilation,
                )
                h, w = (x.h + 2 * ph - dh * (kh - 1) - 1) // sh + 1, (x.w + 2 * pw - dw * (kw - 1) - 1) // sw + 1
                if x.c != module.in_channels or min(h, w) < 1:
                    raise Unsupported(f"{target} does not fit an input of {x.c} x {x.h} x {x.w}")
                return self.emit("conv", x, shape=(x.n, module.out_channels, h, w), detail=module)
            case nn.Linear() if x.h == x.w == 1:
                return self.emit("conv", x, shape=(x.n, module.out_features, 1, 1), detail=module)
            case nn.MaxPool2d() if module.dilation == 1 and not module.return_indices:
                return self.pool("max_pool", x, module)
            case nn.AvgPool2d() if module.divisor_override is None:
                return self.pool("avg_pool", x, module)
            case nn.AdaptiveAvgPool2d() if module.output_size in (1, (1, 1)):
                return self.emit("mean", x, shape=(x.n, x.c, 1, 1))
        raise Unsupported(f"there is no step for {type(module).__name__} ({target})")

    def pool(self, name: str, x: _Value, module: Any) -> _Value:
        sizes = (module.kernel_size, module.stride, module.padding)
        k, s, p = (size if isinstance(size, tuple) else (size, size) for size in sizes)
        # The shape by torch itself, whose rule for ceil_mode has corners.
        meta = torch.empty(x.n, x.c, x.h, x.w, device="meta")
        shape = F.max_pool2d if name == "max_pool" else F.avg_pool2d
        n, c, h, w = shape(meta, k, s, p, ceil_mode=module.ceil_mode).shape
        return self.emit(name, x, shape=(n, c, h, w), detail=(*k, *s, *p, getattr(module, "count_include_pad", False)))

    def flattened(self, x: _Value) -> _Value:
        if x.h * x.w != 1:
            raise Unsupported("a map is flattened that is larger than one pixel")
        return x

    def call_function(self, target: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        values = [arg for arg in args if isinstance(arg, _Value)]
        if target in (operator.add, operator.iadd, torch.add) and len(values) == 2 and not kwargs:
            if values[0].shape != values[1].shape:
                raise Unsupported("tensors of different shapes are added")
            return self.emit("add", *values)
        if target in (operator.mul, operator.imul, torch.mul) and len(values) == 2:
            x, gate = sorted(values, key=lambda value: value.h * value.w, reverse=True)
            if gate.shape != (x.n, x.c, 1, 1):
                raise Unsupported("tensors are multiplied that are no map and its gate")
            return self.emit("mul", x, gate)
        if target is torch.cat and (args[1:] == (1,) or kwargs.get("dim") == 1):
            parts = args[0]
            return self.emit("cat", *parts, shape=(parts[0].n, sum(part.c for part in parts), *parts[0].shape[2:]))
        if target is torch.chunk and kwargs.get("dim", args[2] if len(args) > 2 else 0) == 1:
            x, chunks = args[:2]
            size = -(-x.c // chunks)
            return tuple(
                self.emit("slice", x, shape=(x.n, min(size, x.c - first), x.h, x.w), detail=first)
                for first in range(0, x.c, size)
            )
        if target in (F.relu, torch.relu):
            return self.emit("relu", args[0])
        if target is torch.sigmoid:
            return self.emit("sigmoid", args[0])
        if target is torch.flatten:
            return self.flattened(args[0])
        if target is F.interpolate and kwargs.get("mode") == "bilinear" and not kwargs.get("align_corners"):
            h, w = kwargs["size"]
            return self.emit("resize", args[0], shape=(args[0].n, args[0].c, h, w))
        if values and target is not getattr:
            raise Unsupported(f"there is no step for {getattr(target, '__name__', target)}")
        return super().call_function(target, args, kwargs)

    def call_method(self, target: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        x = args[0]
        if isinstance(x, _Value):
            if target == "mean" and args[1:] == ((2, 3),) and kwargs == {"keepdim": True}:
                return self.emit("mean", x, shape=(x.n, x.c, 1, 1))
            if target == "sigmoid":
                return self.emit("sigmoid", x)
            if target == "flatten":
                return self.flattened(x)
            raise Unsupported(f"there is no step for Tensor.{target}")
        return super().call_method(target, args, kwargs)


def _cut(source: _Value, calls: list[_Call], result: _Value) -> tuple[int, _Value] | None:
    """Find where images that went one by one can go on together.

    Returns:
        How many calls come before, and the one value that passes: the last large map that passes alone. Or None.
    """
    last = {value: i for i, call in enumerate(calls) for value in call.inputs} | {result: len(calls)}
    alive = {source}
    found = None
    for i, call in enumerate(calls):
        alive = {value for value in (*alive, call.out) if last.get(value, -1) > i}
        alone = len(alive) == 1 and call.out in alive and call.name != "slice"
        if alone and call.out.c * call.out.h * call.out.w >= MAP_ELEMENTS:
            found = i + 1, call.out
    return found


def _fuse(source: _Value, calls: list[_Call], result: _Value) -> list[_Node]:
    """Turn calls into nodes: fewer of them, which write where their readers want it."""
    return _Fusion(source, calls, result).nodes


class _Fusion:
    """The nodes of a list of calls, in their order.

    Attributes:
        nodes: The nodes so far.
        uses: How often a value is read.
        slices: How many slices read a value.
        maker: The node that wrote a value, where one node alone wrote all of it.
        made: The number of nodes after which a value is complete.
        untouched: Slices that still hold what their node wrote, of values that only slices read.
    """

    def __init__(self, source: _Value, calls: list[_Call], result: _Value) -> None:
        self.nodes: list[_Node] = []
        self.uses = Counter([result, *(value for call in calls for value in call.inputs)])
        self.slices = Counter(call.inputs[0] for call in calls if call.name == "slice")
        self.maker: dict[_Value, _Node] = {}
        self.made: dict[_Value, int] = {source: 0}
        self.untouched: set[_Value] = set()
        for call in calls:
            self.take(call)

    def take(self, call: _Call) -> None:
        """Fuse a call into the nodes so far, or append a node for it."""
        out, x = call.out, call.inputs[0]
        match call.name:
            case "conv":
                self.append(CONV, x, out, conv=call.detail)
            case "relu":
                self.activate(x, out, RELU, (CONV, POINTWISE))
            case "sigmoid":
                self.activate(x, out, SIGMOID, (POINTWISE,))
            case "mul":
                self.append(POINTWISE, x, out, gate=call.inputs[1])
            case "add":
                if not self.add_before_writing(call) and not self.add_onto_a_slice(call):
                    self.append(POINTWISE, x, out, add=call.inputs[1])
            case "slice":
                out.base, out.first = x, call.detail
                self.made[out] = self.made[x]
                if self.uses[x] == self.slices[x] and x in self.maker:
                    self.untouched.add(out)
            case "cat":
                self.concatenate(call.inputs, out)
            case "max_pool" | "avg_pool":
                self.append(MAX_POOL if call.name == "max_pool" else AVG_POOL, x, out, window=call.detail)
            case "mean":
                self.append(MEAN, x, out)
            case "resize":
                self.append(RESIZE, x, out)

    def append(self, kind: int, src: _Value, dst: _Value, **kwargs) -> None:
        """Append a node."""
        self.nodes.append(_Node(kind, src, dst, **kwargs))
        self.maker[dst] = self.nodes[-1]
        self.made[dst] = len(self.nodes)

    def rename(self, node: _Node, dst: _Value) -> None:
        """Make a node write what was computed from its result."""
        del self.maker[node.dst]
        self.made[dst] = self.made.pop(node.dst)
        node.dst = dst
        self.maker[dst] = node

    def activate(self, x: _Value, out: _Value, act: int, kinds: tuple[int, ...]) -> None:
        """Apply an activation in the node that made its input, if that is of one of some kinds, or in a new one."""
        node = self.maker.get(x)
        if node and self.uses[x] == 1 and node.kind in kinds and node.act == NONE and not node.also:
            node.act = act
            self.rename(node, out)
        else:
            self.append(POINTWISE, x, out, act=act)

    def add_before_writing(self, call: _Call) -> bool:
        """Add in the node that made the later of two values, if nothing else reads that, and return whether it can."""
        free = [
            (self.made[value], value, other)
            for value, other in (call.inputs, call.inputs[::-1])
            if self.uses[value] == 1
            and (node := self.maker.get(value))
            and (node.kind, node.act, node.add) in ((CONV, NONE, None), (POINTWISE, NONE, None))
        ]
        if not free:
            return False
        when, value, other = max(free, key=lambda entry: entry[0])
        if self.made[other] >= when:
            return False
        self.maker[value].add = other
        self.rename(self.maker[value], call.out)
        return True

    def add_onto_a_slice(self, call: _Call) -> bool:
        """Add a convolution's output onto a slice that nothing else reads, and return whether that can be."""
        for value, target in (call.inputs, call.inputs[::-1]):
            node = self.maker.get(value)
            if not (node and node.kind == CONV and not node.also):
                continue
            if target in self.untouched and self.uses[target] == 1 and self.made[target] < self.made[value]:
                node.also = target
                self.untouched.remove(target)
                call.out.base = target
                self.made[call.out] = self.made[value]
                return True
        return False

    def concatenate(self, values: tuple[_Value, ...], out: _Value) -> None:
        """Place values in their concatenation, where their nodes then write them, and copy those that cannot be."""
        first = 0
        for value in values:
            origin = value.base if value in self.untouched and self.uses[value] == 1 else None
            node = self.maker.get(origin) if origin else None
            if value in self.maker and value.base is None:
                value.base, value.first = out, first
            elif origin and node and node.kind == CONV and not node.also:
                node.parts = _redirected(node.parts or [(0, origin.c, origin)], value)
                value.base, value.first = out, first
                self.untouched.remove(value)
            else:
                self.append(POINTWISE, value, _Value(*value.shape, base=out, first=first))
            first += value.c
        self.made[out] = len(self.nodes)


def _redirected(parts: list[tuple[int, int, _Value]], value: _Value) -> list[tuple[int, int, _Value]]:
    """Return what a convolution writes where, with one slice in a place of its own."""
    begin, end = value.first, value.first + value.c
    return [
        part
        for low, high, where in parts
        for part in (
            (low, min(high, begin), where),
            (max(low, begin), min(high, end), value),
            (max(low, end), high, where),
        )
        if part[0] < part[1]
    ]


class _Arena:
    """Memory in huge pages, where the system has them: steps touch dozens of far places at a time.

    With pages of 4 KB the processor would have to look up most of those addresses again and again.
    """

    CHUNK = 32 * 2**20

    def __init__(self) -> None:
        self.chunk: mmap.mmap | None = None
        self.used = 0

    def zeros(self, size: int, dtype: torch.dtype) -> torch.Tensor:
        """Return zeros that begin where a cache line does."""
        count = -(-size * dtype.itemsize // 64) * 64
        if self.chunk is None or self.used + count > len(self.chunk):
            self.chunk, self.used = mmap.mmap(-1, max(count, self.CHUNK)), 0
            if hasattr(mmap, "MADV_HUGEPAGE"):
                with contextlib.suppress(OSError):  # a kernel without them
                    self.chunk.madvise(mmap.MADV_HUGEPAGE)
        begin, self.used = self.used, self.used + count
        return torch.frombuffer(self.chunk, dtype=dtype, count=size, offset=begin)


class _Plan:
    """The steps for one number of images of one size, and the memory that they work in."""

    def __init__(self, network: "Network", shape: tuple[int, int, int, int]) -> None:
        source, calls, result = network.lower(shape)
        if result.h * result.w != 1:
            raise Unsupported("the model's output is no table of logits")
        self.network = network
        self.arena = _Arena()
        self.keep: list[Any] = []
        self.tables: dict[tuple, torch.Tensor] = {}
        self.buffers: dict[_Value, torch.Tensor] = {}

        # Where maps are large, images go one by one; where weights are, together.
        single, first_calls, one = network.lower((1, *shape[1:]))
        cut = _cut(single, first_calls, one) if shape[0] > 1 else None
        front = [_Node(INPUT, single, single)]
        together = [_Node(INPUT, source, source)]
        if cut:
            count, passed = cut
            front += _fuse(single, first_calls[:count], passed)
            source = calls[count - 1].out
            calls, together = calls[count:], []
        together += _fuse(source, calls, result)
        # Logits leave in float32, whatever the rest is in.
        logits = result
        if together[-1].dst is not result or result.base is not None or together[-1].parts:
            logits = _Value(*result.shape)
            together.append(_Node(POINTWISE, result, logits))
        logits.is_float = True
        for node in (*front, *together):
            if node.kind == CONV and isinstance(node.conv, nn.Conv2d):
                root, _ = node.src.place()
                root.pad = max(root.pad, *node.conv.padding)
        steps = []
        if cut:
            source.pad = passed.pad = max(source.pad, passed.pad)
            whole = self.buffers[source] = self.buffer(source)
            self.buffers[passed] = whole
            self.place(front)
            for i in range(shape[0]):
                self.buffers[passed] = whole[i * passed.image :]
                steps += [step for node in front for step in self.steps_of(node)]
        self.place(together)
        steps += [step for node in together for step in self.steps_of(node)]
        self.wait_where_needed(steps)
        self.steps = (_Step * len(steps))(*(step for step, _, _ in steps))
        self.inputs = [i for i, (step, _, _) in enumerate(steps) if step.kind == INPUT]
        self.logits = self.buffers[logits].as_strided((logits.n, logits.c), (logits.pitch, 1))

    def buffer(self, root: _Value) -> torch.Tensor:
        """Make a value's buffer: zeros for the border, which no step writes.

        A few more elements are for taps that read in pairs, of which the last has no second.
        """
        size = root.n * root.image + 64
        if size >= 2**31:
            raise Unsupported(f"a map of {size} elements is larger than 32-bit offsets reach")
        return self.arena.zeros(size, torch.float32 if root.is_float else self.network.dtype)

    def place(self, nodes: list[_Node]) -> None:
        """Give every value that needs one a buffer; values that do not live at once share one of their shape."""
        last: dict[_Value, int] = {}
        for i, node in enumerate(nodes):
            for value in (node.src, node.dst, node.gate, node.add, node.also):
                if value is not None:
                    last[value.place()[0]] = i
            for _, _, value in node.parts:
                last[value.place()[0]] = i
        free: dict[tuple, list[torch.Tensor]] = {}
        given = set(self.buffers)
        for i, node in enumerate(nodes):
            for value in (node.dst, *(where for _, _, where in node.parts)):
                root, _ = value.place()
                if root not in self.buffers:
                    spare = free.get(root.layout)
                    self.buffers[root] = spare.pop() if spare else self.buffer(root)
            for root, end in last.items():
                if end == i and root not in given:
                    free.setdefault(root.layout, []).append(self.buffers[root])

    def table(self, *key: int) -> int:
        """Return the address of the offsets of pixels (n, h, w), n * image + h * row + w * pixel + start."""
        if key not in self.tables:
            n, h, w, image, row, pixel, start = key
            steps = (torch.arange(size) * by for size, by in ((n, image), (h, row), (w, pixel)))
            offsets = sum(torch.meshgrid(*steps, indexing="ij"), torch.tensor(start))
            self.tables[key] = offsets.flatten().to(torch.int32)
        return self.tables[key].data_ptr()

    def view(self, value: _Value | None, pixels: tuple[int, ...] | None = None, skip: int = 0) -> _View:
        """Return a value as a step sees it.

        Args:
            value: The value, or None for a null view.
            pixels: Height, width, strides and padding of the windows that read it; None for its own pixels.
            skip: Channels that the step's numbering is ahead of the value's.
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
        return _View(data, table, image, row, pixel)

    def steps_of(self, node: _Node) -> list[tuple[_Step, list, list]]:
        """Return a node's steps, each with the ranges of channels that it reads and writes."""
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
            # The images themselves are not known yet: `run` says where they are.
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
                step.gate = _View(gate.data_ptr() + first * gate.element_size(), table)
        else:
            for view in (step.src, step.dst):
                view.data += int(ctypes.c_int32.from_address(view.pixels).value) * self.network.dtype.itemsize
            step.dst_is_float = dst.place()[0].is_float
            if node.window:
                step.kernel_h, step.kernel_w, step.stride_h, step.stride_w, step.pad_h, step.pad_w = node.window[:6]
                step.count_pad = node.window[6]
        return [(step, reads, [self.span(dst)])]

    def span(self, value: _Value, skip: int = 0, size: int | None = None) -> tuple[int, int, int]:
        """Return a buffer's address, and which of its channels a value takes."""
        root, first = value.place()
        storage = self.buffers[root].untyped_storage().data_ptr()
        return storage, first + skip, first + skip + (value.c if size is None else size)

    def convolve(self, step: _Step, node: _Node, low: int, high: int, where: _Value) -> None:
        """Fill in a convolution's step, for the output channels from `low` to `high`."""
        conv, src, dst = node.conv, node.src, node.dst
        root, _ = src.place()
        linear = isinstance(conv, nn.Linear)
        (sh, sw), (ph, pw), (dh, dw) = (
            ((1, 1), (0, 0), (1, 1)) if linear else (conv.stride, conv.padding, conv.dilation)
        )
        kh, kw = (1, 1) if linear else conv.kernel_size
        # Where pixels touch, the taps of a row are one run of channels: a stem of 7 x 7 x 3 is 7 taps of 21.
        merged = kw > 1 and dw == 1 and root.c == src.c < 16 and (linear or conv.groups == 1)
        tiles, packed = self.network.packed(conv, low, high, merged)
        step.src = self.view(src, (dst.h, dst.w, sh, sw, ph, pw))
        step.add = self.view(node.add)
        step.also = self.view(node.also)
        # Tiles count channels from the convolution's first; where a part has a buffer of its own, that counts anew.
        step.dst = self.view(where, skip=0 if where is dst or where.base is None else low)
        step.dst_is_float = where.place()[0].is_float
        row, pixel = root.row, root.pitch
        taps = [y * dh * row + x * dw * pixel for y in range(kh) for x in range(1 if merged else kw)]
        tap = torch.tensor(taps, dtype=torch.int32)
        self.keep += [tap, packed]
        step.tap, step.taps = tap.data_ptr(), len(taps)
        step.tile, step.tiles = ctypes.addressof(tiles), len(tiles)

        # Groups of pixels whose input stays in a core's own cache while all tiles go over it.
        step.block = max(1, CACHE_BYTES // (library().rows() * src.c * sh * sw * self.network.dtype.itemsize))

    def wait_where_needed(self, steps: list[tuple[_Step, list, list]]) -> None:
        """Let threads wait for each other before a step that meets what the steps since the last wait did."""

        def meet(some: list, others: list) -> bool:
            return any(a == b and low < top and bottom < high for a, low, high in some for b, bottom, top in others)

        read: list = []
        written: list = []
        for step, reads, writes in steps:
            if meet(reads, written) or meet(writes, written) or meet(writes, read):
                step.wait = 1
                read, written = [], []
            read, written = read + reads, written + writes

    def run(self, images: torch.Tensor) -> torch.Tensor:
        """Compute logits, (N, classes) in float32, of images, (N, C, H, W) in float32 with any strides."""
        image, channel, row, pixel = images.stride()
        for i, index in enumerate(self.inputs):
            step = self.steps[index]
            step.src = _View(images.data_ptr() + i * image * images.element_size(), None, image, row, pixel)
            step.gate.image = channel
        is_bf16 = self.network.dtype == torch.bfloat16
        library().run(self.steps, len(self.steps), torch.get_num_threads(), is_bf16)
        return self.logits.clone()


def _shape_of(images: torch.Tensor) -> tuple[int, int, int, int]:
    n, c, h, w = images.shape
    return n, c, h, w


class Network:
    """A network that runs as native steps.

    Plans are made for each number and size of images as they come, and the last few are kept.
    Calls from several threads take turns, because they share the memory that the steps work in.

    Args:
        graph: The traced model, in eval mode, BatchNorm folded.
        dtype: Type of activations and weights, float32 or bfloat16; sums are float32 in both.
        images_at_once: How many images go through the network together. Few keep what they leave
            behind in the caches, many share the reading of the weights.

    Raises:
        Unsupported: This machine cannot compile the steps, or has no instructions for bfloat16.
    """

    def __init__(self, graph: fx.GraphModule, dtype: torch.dtype = torch.float32, images_at_once: int = 4) -> None:
        if dtype == torch.bfloat16 and not library().has_bf16():
            raise Unsupported("this processor has no instructions for bfloat16 products")
        if dtype not in (torch.float32, torch.bfloat16):
            raise Unsupported(f"there are no steps for {dtype}")
        library()
        self.graph = graph
        self.dtype = dtype
        self.images_at_once = images_at_once
        self.plans: dict[tuple[int, ...], _Plan] = {}
        self.weights: dict[tuple, tuple[Any, Any]] = {}
        self.arena = _Arena()
        self.lock = threading.Lock()

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """Compute logits.

        Args:
            images: (N, C, H, W), on the CPU; N may be 0.

        Returns:
            (N, classes), float32.

        Raises:
            Unsupported: There is no step for something that the model does with images of this size.
        """
        images = images.detach().float()
        with self.lock:
            if not len(images):
                return self.plan((1, *_shape_of(images)[1:])).logits[:0].clone()
            parts = images.split(self.images_at_once)
            return torch.cat([self.plan(_shape_of(part)).run(part) for part in parts])

    def lower(self, shape: tuple[int, int, int, int]) -> tuple[_Value, list[_Call], _Value]:
        """Return the images as a value, what the model calls, and its result."""
        source, lowering = _Value(*shape), _Lowering(self.graph)
        result = lowering.run(source)
        if not isinstance(result, _Value):
            raise Unsupported("the model's output is not one tensor")
        return source, lowering.calls, result

    def plan(self, shape: tuple[int, int, int, int]) -> _Plan:
        """Return the steps for images of a shape (N, C, H, W)."""
        if shape not in self.plans:
            while len(self.plans) >= 4:
                del self.plans[next(iter(self.plans))]
            self.plans[shape] = _Plan(self, shape)
        return self.plans[shape]

    def packed(self, conv: Any, low: int, high: int, merged: bool) -> tuple[Any, Any]:
        """Return a convolution's tiles of output channels from `low` to `high`, and what holds their memory."""
        key = (conv, low, high, merged)
        if key not in self.weights:
            self.weights[key] = self.pack(conv, low, high, merged)
        return self.weights[key]

    def pack(self, conv: Any, low: int, high: int, merged: bool) -> tuple[Any, Any]:
        """Lay out weights as tiles read them: see `Tile` in cpu_network.cpp."""
        lanes = library().lanes()
        weight = conv.weight.detach().float()
        if weight.ndim == 2:
            weight = weight[:, :, None, None]
        out_chs, group_in, kh, kw = weight.shape
        groups = getattr(conv, "groups", 1)
        group_out = out_chs // groups
        bias = torch.zeros(out_chs) if conv.bias is None else conv.bias.detach().float()
        # With grouped convolutions a tile takes in all groups that it touches, so it is kept narrow.
        vectors = 2 if groups == 1 or group_out % (2 * lanes) == 0 else 1
        keep, tiles = [], []
        for begin in range(low, high, lanes * vectors):
            end = min(begin + lanes * vectors, high)
            width = lanes * min(vectors, -(-(end - begin) // lanes))
            first_group, last_group = begin // group_out, (end - 1) // group_out
            chs = (last_group - first_group + 1) * group_in
            block = torch.zeros(kh, kw, chs, width)
            for group in range(first_group, last_group + 1):
                a, b = max(begin, group * group_out), min(end, (group + 1) * group_out)
                c = (group - first_group) * group_in
                block[:, :, c : c + group_in, a - begin : b - begin] = weight[a:b].permute(2, 3, 1, 0)
            if merged:
                block, chs = block.view(kh, 1, kw * chs, width), kw * chs
            if self.dtype == torch.bfloat16:
                block = F.pad(block, (0, 0, 0, chs % 2)).view(*block.shape[:2], -1, 2, width).transpose(-1, -2)
            block = self.arena.zeros(block.numel(), self.dtype).copy_(block.flatten())
            offsets = F.pad(bias[begin:end], (0, width - (end - begin))).contiguous()
            keep += [block, offsets]
            tiles.append(_Tile(block.data_ptr(), offsets.data_ptr(), first_group * group_in, chs, begin, end - begin))
        return (_Tile * len(tiles))(*tiles), keep
