"""Reading a pickle of tensors in plain containers, as frameworks save weights.

Python's unpickler and torch's with `weights_only` run no code of such a file, but a file of some kB can
still end the process: hashing or freeing a deeply nested tuple overflows C's stack, and one long text
that is used many times over fills the memory. This reader supports only what the pickle of a state dict
has, and holds depth, repetition, and the number of steps against bounds before it makes anything.
"""

import pickle
import pickletools
import struct
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any, BinaryIO

DEEPEST = 64  # containers within each other; a training checkpoint has fewer than 10
STEPS = 1_000_000  # of a pickle; res2net200 in PaddlePaddle's format has 45,593
REPEATED = 2**20  # bytes that a file may use again beyond its own size; names of types and devices, mostly

TOO_DEEP = f"its pickle nests containers more than {DEEPEST} deep, as no state dict does"
NAMES = {opcode.code.encode("latin1"): opcode.name for opcode in pickletools.opcodes}


class FormatError(ValueError):
    """A file that is damaged, hostile, or of another kind than it should be."""


class Buildable:
    """An object that a pickle completes after it has been made."""

    def build(self, state: Any) -> None:
        """Take the state that the pickle has for this object."""


class _Item:
    """A value with what is known of it: how deep it is, how many bytes it has, and whether another value holds it."""

    __slots__ = ("depth", "is_held", "size", "value")

    def __init__(self, value: Any, depth: int = 0, size: int = 1) -> None:
        self.value, self.depth, self.size, self.is_held = value, depth, size, False


class PlainUnpickler:
    """Reads one pickle of bounded depth, size and number of steps.

    Args:
        file: Where the pickle begins.
        size: Bytes that are left of the file.
        functions: What the pickle may name, by `module.name`. It calls those that can be called.
        persistent_load: Returns the object for a persistent id, such as a storage of torch's.
        steps: How many steps the pickle may have.
    """

    def __init__(
        self,
        file: BinaryIO,
        size: int,
        functions: Mapping[str, Any],
        persistent_load: Callable[[Any], Any] | None = None,
        steps: int = STEPS,
    ) -> None:
        self.file, self.left = file, size
        self.functions, self.persistent_load, self.steps = functions, persistent_load, steps
        self.may_repeat = size + REPEATED
        self.stack: list[_Item] = []
        self.marks: list[list[_Item]] = []
        self.memo: dict[int, _Item] = {}

    def load(self) -> Any:
        """Read the pickle.

        Returns:
            What it holds.

        Raises:
            FormatError: It is cut short, exceeds a bound, or has something that no state dict has.
        """
        try:
            for _ in range(self.steps):
                code = self.read(1)
                if code == pickle.STOP:
                    (item,) = self.stack
                    return item.value
                if code not in STEP:
                    raise FormatError(
                        f"its pickle has the instruction {NAMES.get(code, code)}, which no state dict has"
                    )
                STEP[code](self)
        except FormatError:
            raise
        except (LookupError, ValueError, TypeError, AttributeError, ArithmeticError, RuntimeError) as error:
            raise FormatError(f"its pickle is damaged ({type(error).__name__})") from error
        raise FormatError(f"its pickle has more than {self.steps:,} steps, more than that of any state dict")

    def read(self, n: int) -> bytes:
        """Return the next bytes; takes no memory for bytes that are not there."""
        if n > self.left:
            raise FormatError(f"it ends {n - self.left:,} bytes too early")
        self.left -= n
        if len(data := self.file.read(n)) < n:
            raise FormatError("it ends too early")
        return data

    def number(self, format: str) -> Any:
        """Return the next number, of a format of `struct`'s."""
        return struct.unpack(format, self.read(struct.calcsize(format)))[0]

    def line(self) -> str:
        """Return the next line, a name of bounded length."""
        name = self.file.readline(256)
        self.left -= len(name)
        if not name.endswith(b"\n"):
            raise FormatError("its pickle has a name without an end")
        return name[:-1].decode()

    def push(self, value: Any, size: int = 1) -> None:
        """Put a value without parts on the stack."""
        self.stack.append(_Item(value, 0, size))

    def push_text(self, format: str) -> None:
        """Put the next text on the stack, whose length precedes it."""
        data = self.read(self.number(format))
        self.push(str(data, "utf-8", "surrogatepass"), len(data) + 1)

    def push_bytes(self, format: str, is_text: bool = False) -> None:
        """Put the next bytes on the stack, whose length precedes them; Python 2 wrote texts so."""
        data = self.read(self.number(format))
        self.push(data.decode("latin1") if is_text else data, len(data) + 1)

    def push_int(self) -> None:
        """Put the next long number on the stack."""
        if (n := self.number("<B")) > 16:
            raise FormatError(f"its pickle has a number of {n} bytes, which no state dict has")
        self.push(pickle.decode_long(self.read(n)))

    def pop_mark(self) -> list[_Item]:
        """Return what was put on the stack since the last mark."""
        items, self.stack = self.stack, self.marks.pop()
        return items

    def mark(self) -> None:
        """Begin a list of items."""
        if len(self.marks) >= 2 * DEEPEST:
            raise FormatError(TOO_DEEP)
        self.marks.append(self.stack)
        self.stack = []

    def hold(self, items: list[_Item]) -> tuple[int, int]:
        """Return the depth and the size of a container of items, and note that these are now held."""
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
        """Put a tuple on the stack."""
        depth, size = self.hold(items)
        self.stack.append(_Item(tuple([item.value for item in items]), depth, size + 1))

    def push_last(self, n: int) -> None:
        """Put a tuple of the last items in their place."""
        items = self.stack[-n:]
        if len(items) < n:
            raise IndexError(n)
        del self.stack[-n:]
        self.push_tuple(items)

    def fill(self, items: list[_Item], kind: type) -> Any:
        """Return the container on top of the stack, to which items are about to be added.

        Nobody fills a container that another one already holds: its depth could not be known, and it
        could hold itself.
        """
        depth, size = self.hold(items)
        container = self.stack[-1]
        if not isinstance(container.value, kind) or container.is_held:
            raise FormatError("its pickle adds to a container that is already in use, as no state dict does")
        container.depth, container.size = max(container.depth, depth), container.size + size
        return container.value

    def append(self, items: list[_Item]) -> None:
        """Add items to a list."""
        self.fill(items, list).extend([item.value for item in items])

    def set(self, items: list[_Item]) -> None:
        """Add keys and values to a dict."""
        if len(items) % 2:
            raise IndexError(len(items))
        container = self.fill(items, dict)
        for key, item in zip(items[::2], items[1::2], strict=True):
            add_entry(container, key.value, item.value)

    def push_global(self, module: Any, name: Any) -> None:
        """Put what the pickle names on the stack."""
        if f"{module}.{name}" not in self.functions:
            raise FormatError(f"it would call {module}.{name}; only tensors in plain containers are read")
        self.push(self.functions[f"{module}.{name}"])

    def push_stack_global(self) -> None:
        """Put what the last two texts name on the stack."""
        name, module = self.stack.pop().value, self.stack.pop().value
        self.push_global(module, name)

    def call(self) -> None:
        """Put the result of a function in the place of the function and its arguments."""
        function, arguments = self.stack[-2:]
        depth, size = self.hold([arguments])
        if not callable(function.value) or not isinstance(arguments.value, tuple):
            raise FormatError("its pickle calls something that is not a function")
        del self.stack[-2:]
        self.stack.append(_Item(function.value(*arguments.value), depth, size + 1))

    def build(self) -> None:
        """Complete an object by its state."""
        state, item = self.stack.pop(), self.stack[-1]
        depth, size = self.hold([state])
        if isinstance(item.value, Buildable) and not item.is_held:
            item.value.build(state.value)
            item.depth, item.size = max(item.depth, depth), item.size + size
        elif type(item.value) is not OrderedDict:  # torch keeps the versions of modules as an attribute of theirs
            raise FormatError("its pickle completes an object that no state dict has")

    def push_persistent(self) -> None:
        """Put the object of a persistent id in its place."""
        item = self.stack.pop()
        if self.persistent_load is None:
            raise FormatError("its pickle refers to something outside of it")
        self.push(self.persistent_load(item.value))

    def get(self, index: int) -> None:
        """Put a value from the memo on the stack once more."""
        item = self.memo[index]
        self.may_repeat -= item.size
        if self.may_repeat < 0:
            raise FormatError("its pickle uses the same values so often that they make more bytes than the file has")
        self.stack.append(item)

    def put(self, index: int) -> None:
        """Remember the value on top of the stack."""
        self.memo[index] = self.stack[-1]


def add_entry(container: dict, key: Any, value: Any) -> None:
    """Add an entry to a dict, whose keys are names or numbers.

    A key is hashed, which takes long for a nested tuple, and equal hashes are easily found for large numbers.
    """
    if not (type(key) is str or (type(key) is int and abs(key) < 2**32)):
        raise FormatError(f"its pickle has a key of type {type(key).__name__}; only names and numbers are read")
    if key in container:
        raise FormatError(f"its entry {str(key)[:80]} appears twice")
    container[key] = value


def ordered_dict(pairs: Any = ()) -> OrderedDict:
    """Return an ordered dict, which Python 2 pickled as a list of pairs."""
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
