"""A restricted unpickler for tensors in plain containers, the way frameworks save weights.

Python's unpickler with restricted globals and torch's with `weights_only` run no code of a file, but a file of a
few kB can still crash the process: hashing or freeing a deeply nested tuple overflows the C stack, and one long
string used many times fills the memory. This reader supports only the opcodes of a pickled state dict, and limits
depth, repetition and number of opcodes before it creates any object.
"""

import pickle
import pickletools
import struct
import sys
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any, BinaryIO

DEEPEST = 64  # nested containers; a training checkpoint has fewer than 10
STEPS = 1_000_000  # opcodes of a pickle; res2net200 in PaddlePaddle's format has 45,593
REPEATED = 2**20  # bytes that memoized values may add to the file's size; mostly names of types and devices

# Types of the standard library that training runs save with their weights. Stand-ins replace them, as they replace
# all objects of other libraries; everything else of the standard library is refused.
PLAIN_TYPES = {
    "argparse": "Namespace",
    "builtins": "bytearray complex dict float frozenset int list object range set slice str tuple",
    "collections": "Counter defaultdict deque",
    "copyreg": "_reconstructor",
    "datetime": "date datetime timedelta timezone",
    "functools": "partial",
    "pathlib": "Path PosixPath WindowsPath PurePath PurePosixPath PureWindowsPath",
    "types": "SimpleNamespace",
    "_codecs": "encode",
}
PYTHON2 = {"__builtin__": "builtins", "copy_reg": "copyreg"}  # names of modules in pickle protocol 2

TOO_DEEP = f"its pickle nests containers more than {DEEPEST} deep, the limit for a state dict"
NAMES = {opcode.code.encode("latin1"): opcode.name for opcode in pickletools.opcodes}


class FormatError(ValueError):
    """A file that is damaged, malicious or of another format."""


class Buildable:
    """An object whose state a pickle sets after creating it."""

    def build(self, state: Any) -> None:
        """Set the state of this object."""


class StandIn(Buildable):
    """An inert object in place of one of another library: it takes arguments, content and state, and runs nothing.

    Attributes:
        state: The state that the pickle sets, such as the `__dict__` of a module; None without one.
    """

    def __init__(self, *args: Any) -> None:
        self.state: Any = None

    def build(self, state: Any) -> None:
        """Keep the state of the object."""
        self.state = state


class _Item:
    """A value with its nesting depth, its size in bytes, and whether a container holds it."""

    __slots__ = ("depth", "is_held", "size", "value")

    def __init__(self, value: Any, depth: int = 0, size: int = 1) -> None:
        self.value, self.depth, self.size, self.is_held = value, depth, size, False


class PlainUnpickler:
    """Reads one pickle with limited depth, size and number of opcodes.

    Args:
        file: A file, positioned at the start of the pickle.
        size: Number of bytes that remain in the file.
        functions: Allowed globals, by `module.name`. The pickle may call those that are callable.
        persistent_load: Returns the object for a persistent id, such as a torch storage.
        steps: Largest number of opcodes.
        stand_ins: Whether to read the file of a whole training run: objects of other libraries, which are never
            imported, become instances of `StandIn`, and entries of dicts whose keys are not plain are dropped.
    """

    def __init__(
        self,
        file: BinaryIO,
        size: int,
        functions: Mapping[str, Any],
        persistent_load: Callable[[Any], Any] | None = None,
        steps: int = STEPS,
        stand_ins: bool = False,
    ) -> None:
        self.file, self.left, self.stand_ins = file, size, stand_ins
        self.functions, self.persistent_load, self.steps = functions, persistent_load, steps
        self.may_repeat = size + REPEATED
        self.stack: list[_Item] = []
        self.marks: list[list[_Item]] = []
        self.memo: dict[int, _Item] = {}

    def load(self) -> Any:
        """Read the pickle.

        Returns:
            The unpickled object.

        Raises:
            FormatError: The pickle is truncated, exceeds a limit, or is not supported.
        """
        try:
            for _ in range(self.steps):
                code = self.read(1)
                if code == pickle.STOP:
                    (item,) = self.stack
                    return item.value
                if code not in STEP:
                    raise FormatError(f"its pickle has the opcode {NAMES.get(code, code)}, which is not supported")
                STEP[code](self)
        except FormatError:
            raise
        except (LookupError, ValueError, TypeError, AttributeError, ArithmeticError, RuntimeError) as error:
            raise FormatError(f"its pickle is damaged ({type(error).__name__})") from error
        raise FormatError(f"its pickle has more than {self.steps:,} opcodes, the limit for a state dict")

    def read(self, n: int) -> bytes:
        """Return the next `n` bytes; allocates no memory for missing bytes."""
        if n > self.left:
            raise FormatError(f"it is truncated: {n - self.left:,} bytes are missing")
        self.left -= n
        if len(data := self.file.read(n)) < n:
            raise FormatError("it is truncated")
        return data

    def number(self, format: str) -> Any:
        """Return the next number in a `struct` format."""
        return struct.unpack(format, self.read(struct.calcsize(format)))[0]

    def line(self) -> str:
        """Return the next line, a name of at most 255 bytes."""
        name = self.file.readline(256)
        self.left -= len(name)
        if not name.endswith(b"\n"):
            raise FormatError("its pickle has a name that is too long")
        return name[:-1].decode()

    def push(self, value: Any, size: int = 1) -> None:
        """Push a scalar value."""
        self.stack.append(_Item(value, 0, size))

    def push_text(self, format: str) -> None:
        """Push a length-prefixed string."""
        data = self.read(self.number(format))
        self.push(str(data, "utf-8", "surrogatepass"), len(data) + 1)

    def push_bytes(self, format: str, is_text: bool = False) -> None:
        """Push length-prefixed bytes, or text, which Python 2 wrote as bytes."""
        data = self.read(self.number(format))
        self.push(data.decode("latin1") if is_text else data, len(data) + 1)

    def push_int(self) -> None:
        """Push a long integer."""
        if (n := self.number("<B")) > 16:
            raise FormatError(f"its pickle has a number of {n} bytes, more than the limit of 16")
        self.push(pickle.decode_long(self.read(n)))

    def pop_mark(self) -> list[_Item]:
        """Return the items pushed since the last mark."""
        items, self.stack = self.stack, self.marks.pop()
        return items

    def mark(self) -> None:
        """Push a mark."""
        if len(self.marks) >= 2 * DEEPEST:
            raise FormatError(TOO_DEEP)
        self.marks.append(self.stack)
        self.stack = []

    def hold(self, items: list[_Item]) -> tuple[int, int]:
        """Return the depth and the size of a container of items, and mark the items as held."""
        depth = size = 0
        for item in items:
            item.is_held = True
            size += item.size
            if item.depth > depth:
                depth = item.depth
        if depth >= DEEPEST:
            raise FormatError(TOO_DEEP)
        return depth + 1, size

    def push_tuple(self, items: list[_Item]) -> None:
        """Push a tuple of items."""
        depth, size = self.hold(items)
        self.stack.append(_Item(tuple([item.value for item in items]), depth, size + 1))

    def push_last(self, n: int) -> None:
        """Replace the last `n` items with a tuple of them."""
        items = self.stack[-n:]
        if len(items) < n:
            raise IndexError(n)
        del self.stack[-n:]
        self.push_tuple(items)

    def fill(self, items: list[_Item], kind: type) -> Any:
        """Return the container on top of the stack, after accounting for items to be added.

        A container that is already held by another one is refused: the depth of the outer one would
        become wrong, and a container could contain itself.
        """
        depth, size = self.hold(items)
        container = self.stack[-1]
        if not isinstance(container.value, (kind, StandIn)) or container.is_held:
            raise FormatError("its pickle modifies a container that is already in use, which is not supported")
        container.depth, container.size = max(container.depth, depth), container.size + size
        return container.value

    def append(self, items: list[_Item]) -> None:
        """Add items to a list."""
        if isinstance(container := self.fill(items, list), list):
            container.extend([item.value for item in items])

    def set(self, items: list[_Item]) -> None:
        """Add keys and values to a dict."""
        if len(items) % 2:
            raise IndexError(len(items))
        container = self.fill(items, dict)
        for key, item in zip(items[::2], items[1::2], strict=True):
            if isinstance(container, dict) and (is_plain(key.value) or not self.stand_ins):
                add_entry(container, key.value, item.value)

    def push_global(self, module: Any, name: Any) -> None:
        """Push an allowed global, or a stand-in for one."""
        if f"{module}.{name}" not in self.functions:
            if self.stand_ins and may_stand_in(module, name):
                return self.push(StandIn)
            if self.stand_ins and name == "getattr" and PYTHON2.get(module, module) == "builtins":
                return self.push(attribute_of)
            raise FormatError(f"it would call {module}.{name}; only tensors in plain containers are supported")
        self.push(self.functions[f"{module}.{name}"])

    def push_stack_global(self) -> None:
        """Push the global named by the last two strings."""
        name, module = self.stack.pop().value, self.stack.pop().value
        self.push_global(module, name)

    def call(self) -> None:
        """Replace a function and its arguments with the result of the call."""
        function, arguments = self.stack[-2:]
        depth, size = self.hold([arguments])
        if not callable(function.value) or not isinstance(arguments.value, tuple):
            raise FormatError("its pickle calls something that is not a function")
        del self.stack[-2:]
        self.stack.append(_Item(function.value(*arguments.value), depth, size + 1))

    def build(self) -> None:
        """Set the state of an object."""
        state, item = self.stack.pop(), self.stack[-1]
        depth, size = self.hold([state])
        if isinstance(item.value, Buildable) and not item.is_held:
            item.value.build(state.value)
            item.depth, item.size = max(item.depth, depth), item.size + size
        elif type(item.value) is not OrderedDict:  # torch stores module versions as an attribute, ignored here
            raise FormatError("its pickle sets the state of an object for which this is not supported")

    def push_persistent(self) -> None:
        """Replace a persistent id with its object."""
        item = self.stack.pop()
        if self.persistent_load is None:
            raise FormatError("its pickle refers to external data")
        self.push(self.persistent_load(item.value))

    def get(self, index: int) -> None:
        """Push a memoized value."""
        item = self.memo[index]
        self.may_repeat -= item.size
        if self.may_repeat < 0:
            raise FormatError("its pickle repeats values until they take more bytes than the file has")
        self.stack.append(item)

    def put(self, index: int) -> None:
        """Memoize the value on top of the stack."""
        self.memo[index] = self.stack[-1]


def attribute_of(owner: Any, name: Any) -> type[StandIn]:
    """Return a stand-in for a method of a stand-in, such as MMEngine's history of the losses has."""
    if not (owner is StandIn or isinstance(owner, StandIn)):
        raise FormatError("it would call builtins.getattr; only tensors in plain containers are supported")
    return StandIn


def may_stand_in(module: Any, name: Any) -> bool:
    """Return whether a stand-in may replace a global: one of another library, or a plain type."""
    module = PYTHON2.get(str(module), str(module))
    is_standard = module.partition(".")[0] in sys.stdlib_module_names
    return not is_standard or name in PLAIN_TYPES.get(module.partition("._")[0], "").split()


def is_plain(key: Any) -> bool:
    """Return whether a key is a string or a small integer.

    Hashing a nested tuple is slow, and large integers with equal hashes are easy to construct.
    """
    return type(key) is str or (type(key) is int and abs(key) < 2**32)


def add_entry(container: dict, key: Any, value: Any) -> None:
    """Add an entry to a dict; keys must be strings or small integers."""
    if not is_plain(key):
        raise FormatError(f"its pickle has a key of type {type(key).__name__}; keys must be strings or 32-bit integers")
    if key in container:
        raise FormatError(f"its entry {str(key)[:80]} appears twice")
    container[key] = value


def ordered_dict(pairs: Any = ()) -> OrderedDict:
    """Return an ordered dict, empty or from a list of pairs as Python 2 pickled it."""
    made: OrderedDict = OrderedDict()
    for key, value in pairs:
        add_entry(made, key, value)
    return made


STEP: dict[bytes, Callable[[PlainUnpickler], object]] = {
    pickle.PROTO: lambda self: self.read(1),
    pickle.FRAME: lambda self: self.read(8),
    pickle.NONE: lambda self: self.push(None),
    pickle.NEWTRUE: lambda self: self.push(True),
    pickle.NEWFALSE: lambda self: self.push(False),
    pickle.BININT: lambda self: self.push(self.number("<i")),
    pickle.BININT1: lambda self: self.push(self.number("<B")),
    pickle.BININT2: lambda self: self.push(self.number("<H")),
    pickle.LONG1: PlainUnpickler.push_int,
    pickle.BINFLOAT: lambda self: self.push(self.number(">d")),
    pickle.SHORT_BINUNICODE: lambda self: self.push_text("<B"),
    pickle.BINUNICODE: lambda self: self.push_text("<I"),
    pickle.BINUNICODE8: lambda self: self.push_text("<Q"),
    pickle.SHORT_BINSTRING: lambda self: self.push_bytes("<B", is_text=True),
    pickle.BINSTRING: lambda self: self.push_bytes("<I", is_text=True),
    pickle.SHORT_BINBYTES: lambda self: self.push_bytes("<B"),
    pickle.BINBYTES: lambda self: self.push_bytes("<I"),
    pickle.BINBYTES8: lambda self: self.push_bytes("<Q"),
    pickle.MARK: PlainUnpickler.mark,
    pickle.EMPTY_TUPLE: lambda self: self.push(()),
    pickle.TUPLE: lambda self: self.push_tuple(self.pop_mark()),
    pickle.TUPLE1: lambda self: self.push_last(1),
    pickle.TUPLE2: lambda self: self.push_last(2),
    pickle.TUPLE3: lambda self: self.push_last(3),
    pickle.EMPTY_LIST: lambda self: self.push([]),
    pickle.APPEND: lambda self: self.append([self.stack.pop()]),
    pickle.APPENDS: lambda self: self.append(self.pop_mark()),
    pickle.EMPTY_DICT: lambda self: self.push({}),
    pickle.SETITEM: lambda self: self.set([self.stack.pop(), self.stack.pop()][::-1]),
    pickle.SETITEMS: lambda self: self.set(self.pop_mark()),
    pickle.GLOBAL: lambda self: self.push_global(self.line(), self.line()),
    pickle.STACK_GLOBAL: PlainUnpickler.push_stack_global,
    pickle.REDUCE: PlainUnpickler.call,
    pickle.NEWOBJ: PlainUnpickler.call,
    pickle.BUILD: PlainUnpickler.build,
    pickle.BINPERSID: PlainUnpickler.push_persistent,
    pickle.BINGET: lambda self: self.get(self.number("<B")),
    pickle.LONG_BINGET: lambda self: self.get(self.number("<I")),
    pickle.BINPUT: lambda self: self.put(self.number("<B")),
    pickle.LONG_BINPUT: lambda self: self.put(self.number("<I")),
    pickle.MEMOIZE: lambda self: self.put(len(self.memo)),
}
