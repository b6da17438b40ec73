"""The operations of a traced network, fused into the nodes that `cpu_network` and `gpu_network` run.

`Lowering` records the calls of a traced model on `Value`s. `fuse_nodes` fuses them into `Node`s, whose outputs go
directly into the buffers of their readers: slices and concatenations (Eq. 1) need no operation.
"""

import operator
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from res2net_zoo.models._pooling import has_one_window, pool_window

# Kinds of nodes, and activations; `Kind` and `Act` in cpu_network.cpp.
CONV, POINTWISE, MAX_POOL, AVG_POOL, MEAN, RESIZE, INPUT = range(7)
NONE, RELU, SIGMOID = range(3)


class Unsupported(Exception):
    """The network contains an unsupported operation, or the machine cannot compile the steps."""


@dataclass(eq=False)
class Value:
    """A tensor (N, C, H, W) in a separate buffer, or at channel `first` of another value."""

    n: int
    c: int
    h: int
    w: int
    base: "Value | None" = None
    first: int = 0
    pad: int = 0  # border of zeros that its readers need
    is_float: bool = False
    line: int = 16  # elements of a cache line
    name: str = ""  # of the graph's node, which identifies its calibrated scale
    is_sum: bool = False  # a sum stored in place of a slice, with its own scale
    like: "Value | None" = None  # the value whose scale it uses
    flat: bool = False  # represents a tensor (N, C)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """The shape as a tensor (N, C, H, W)."""
        return (self.n, self.c, self.h, self.w)

    @property
    def pitch(self) -> int:
        """Elements from one pixel to the next in its buffer.

        An odd number of cache lines, because pixels at a distance of 4 KB map to the same few sets of an L1 cache.
        The few channels of an image are dense, as its convolution requires.
        """
        lines = -(-self.c // self.line)
        return self.c if self.c < 16 else (lines | 1 if lines * self.line > 128 else lines) * self.line

    @property
    def layout(self) -> tuple[int, ...]:
        """The layout that values must share to reuse the same buffer, including the border."""
        return (self.n, self.h, self.w, self.c, self.pad, self.is_float)

    @property
    def row(self) -> int:
        """Elements from one row to the next."""
        return (self.w + 2 * self.pad) * self.pitch

    @property
    def image(self) -> int:
        """Elements from one image to the next."""
        return (self.h + 2 * self.pad) * self.row

    def place(self) -> tuple["Value", int]:
        """Return the value whose buffer contains this one, and the first channel in it."""
        first, value = self.first, self
        while value.base is not None:
            value = value.base
            first += value.first
        return value, first


@dataclass(eq=False)
class Node:
    """An operation with its fused activation; `add` is added to its result, which is added to `also`."""

    kind: int
    src: Value
    dst: Value
    act: int = NONE
    gate: Value | None = None
    add: Value | None = None
    also: Value | None = None
    total: Value | None = None  # the sum stored in place of `also`
    conv: Any = None
    window: tuple = ()
    # For a convolution: ranges of its output channels, and the destination of each.
    parts: list[tuple[int, int, Value]] = field(default_factory=list)


@dataclass(eq=False)
class Call:
    """A call of an operation on values, with its output and its parameters."""

    name: str
    inputs: tuple[Value, ...]
    out: Value
    detail: Any = None


class Lowering(fx.Interpreter):
    """Runs a traced model on `Value`s instead of tensors, and records its calls."""

    def __init__(self, graph: fx.GraphModule) -> None:
        super().__init__(graph)
        self.extra_traceback = False
        self.calls: list[Call] = []

    def run_node(self, n: fx.Node) -> Any:
        """Run a node of the graph, and name its result."""
        result = super().run_node(n)
        if isinstance(result, Value):
            result.name = n.name
        return result

    def emit(self, name: str, *inputs: Value, shape: tuple[int, int, int, int] | None = None, detail: Any = None):
        """Record an operation on values, and return its output."""
        out = Value(*(shape or inputs[0].shape), flat=inputs[0].flat, line=inputs[0].line)
        self.calls.append(Call(name, inputs, out, detail))
        return out

    def call_module(self, target: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        """Record a module."""
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
        raise Unsupported(f"{type(module).__name__} is unsupported ({target})")

    def pool(self, name: str, x: Value, module: Any) -> Value:
        """Record a pooling."""
        sizes = (module.kernel_size, module.stride, module.padding)
        k, s, p = (size if isinstance(size, tuple) else (size, size) for size in sizes)
        # Let torch compute the shape, because the rules for ceil_mode are complicated.
        meta = torch.empty(x.n, x.c, x.h, x.w, device="meta")
        shape = F.max_pool2d if name == "max_pool" else F.avg_pool2d
        n, c, h, w = shape(meta, k, s, p, ceil_mode=module.ceil_mode).shape
        out = self.emit(name, x, shape=(n, c, h, w), detail=(*k, *s, *p, getattr(module, "count_include_pad", False)))
        out.like = x if name == "max_pool" else None
        return out

    def flattened(self, x: Value) -> Value:
        """Return the value of a flattened map, which must be a single pixel."""
        if x.h * x.w != 1:
            raise Unsupported("flattening a map larger than one pixel is unsupported")
        x.flat = True
        return x

    def call_function(self, target: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        """Record a function."""
        values = [arg for arg in args if isinstance(arg, Value)]
        if target in (operator.add, operator.iadd, torch.add) and len(values) == 2 and not kwargs:
            if values[0].shape != values[1].shape:
                raise Unsupported("adding tensors of different shapes is unsupported")
            return self.emit("add", *values)
        if target in (operator.mul, operator.imul, torch.mul) and len(values) == 2:
            x, gate = sorted(values, key=lambda value: value.h * value.w, reverse=True)
            if gate.shape != (x.n, x.c, 1, 1):
                raise Unsupported("multiplying tensors is supported only for a map and its gate")
            return self.emit("mul", x, gate)
        if target is pool_window:
            (x,) = args
            if has_one_window(x.h, x.w):
                return self.pool("avg_pool", x, nn.AvgPool2d(7))
            return self.emit("mean", x, shape=(x.n, x.c, 1, 1))
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
            raise Unsupported(f"{getattr(target, '__name__', target)} is unsupported")
        return super().call_function(target, args, kwargs)

    def call_method(self, target: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        """Record a method."""
        x = args[0]
        if isinstance(x, Value):
            if target == "mean" and args[1:] == ((2, 3),) and kwargs == {"keepdim": True}:
                return self.emit("mean", x, shape=(x.n, x.c, 1, 1))
            if target == "sigmoid":
                return self.emit("sigmoid", x)
            if target == "flatten":
                return self.flattened(x)
            raise Unsupported(f"Tensor.{target} is unsupported")
        return super().call_method(target, args, kwargs)


def last_large_map(source: Value, calls: list[Call], large: int) -> tuple[int, Value] | None:
    """Find the call after which images that were processed one by one can be processed together.

    Args:
        source: The image.
        calls: The calls.
        large: Minimum number of elements of a large map.

    Returns:
        The number of calls up to it, and the only value that later calls read: the last large map of this kind; or
        None.
    """
    last = {value: i for i, call in enumerate(calls) for value in call.inputs}
    alive = {source}
    found = None
    for i, call in enumerate(calls):
        alive = {value for value in (*alive, call.out) if last.get(value, -1) > i}
        alone = len(alive) == 1 and call.out in alive and call.name != "slice"
        if alone and call.out.c * call.out.h * call.out.w >= large:
            found = i + 1, call.out
    return found


def fuse_nodes(source: Value, calls: list[Call], *results: Value) -> list[Node]:
    """Fuse calls into fewer nodes, which write directly to the buffers of their readers."""
    return _Fusion(source, calls, results).nodes


class _Fusion:
    """Fuses a list of calls into nodes.

    Attributes:
        nodes: The nodes so far.
        uses: Number of reads of a value.
        slices: Number of slices of a value.
        maker: The node that wrote a value, if a single node wrote all of it.
        made: The number of nodes after which a value is complete.
        untouched: Unmodified slices of values that only slices read.
    """

    def __init__(self, source: Value, calls: list[Call], results: tuple[Value, ...]) -> None:
        self.nodes: list[Node] = []
        self.uses = Counter([*results, *(value for call in calls for value in call.inputs)])
        self.slices = Counter(call.inputs[0] for call in calls if call.name == "slice")
        self.maker: dict[Value, Node] = {}
        self.made: dict[Value, int] = {source: 0}
        self.untouched: set[Value] = set()
        for call in calls:
            self.fuse_call(call)

    def fuse_call(self, call: Call) -> None:
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
                if not self.add_before_writing(call) and not self.add_to_slice(call):
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

    def append(self, kind: int, src: Value, dst: Value, **kwargs) -> None:
        """Append a node."""
        self.nodes.append(Node(kind, src, dst, **kwargs))
        self.maker[dst] = self.nodes[-1]
        self.made[dst] = len(self.nodes)

    def rename(self, node: Node, dst: Value) -> None:
        """Replace the output of a node by a value that was computed from it."""
        del self.maker[node.dst]
        self.made[dst] = self.made.pop(node.dst)
        node.dst = dst
        self.maker[dst] = node

    def activate(self, x: Value, out: Value, act: int, kinds: tuple[int, ...]) -> None:
        """Apply an activation in the node of its input, if it has one of these kinds, or in a new node."""
        node = self.maker.get(x)
        if node and self.uses[x] == 1 and node.kind in kinds and node.act == NONE and not node.also:
            node.act = act
            self.rename(node, out)
        else:
            self.append(POINTWISE, x, out, act=act)

    def add_before_writing(self, call: Call) -> bool:
        """Fuse an addition into the node of the later operand, if nothing else reads it; return whether it did."""
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

    def add_to_slice(self, call: Call) -> bool:
        """Add the output of a convolution to a slice that nothing else reads; return whether it did."""
        for value, target in (call.inputs, call.inputs[::-1]):
            node = self.maker.get(value)
            if not (node and node.kind == CONV and not node.also):
                continue
            if target in self.untouched and self.uses[target] == 1 and self.made[target] < self.made[value]:
                node.also, node.total = target, call.out
                self.untouched.remove(target)
                call.out.base, call.out.is_sum = target, True
                self.made[call.out] = self.made[value]
                return True
        return False

    def concatenate(self, values: tuple[Value, ...], out: Value) -> None:
        """Redirect the outputs of nodes into their concatenation, and copy other values."""
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
                self.append(POINTWISE, value, Value(*value.shape, base=out, first=first))
            first += value.c
        self.made[out] = len(self.nodes)


def _redirected(parts: list[tuple[int, int, Value]], value: Value) -> list[tuple[int, int, Value]]:
    """Return the destinations of a convolution's output channels, with a separate one for a slice."""
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
