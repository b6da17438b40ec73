"""Reading what `torch.save` wrote, in both of its formats, within bounds that `torch.load` does not have.

`torch.load` with `weights_only` runs no code of the file's, but it crashes on deeply nested pickles and
takes memory for tensors that a file only declares. Here the file's own size bounds what is made of it.
"""

import contextlib
import io
import math
import os
import struct
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from pathlib import Path
from typing import Any, BinaryIO

import torch
from timm.models import _helpers, _hub

from res2net_zoo.utils.errors import InputError
from res2net_zoo.utils.files import open_regular
from res2net_zoo.weights.pickles import STEPS, Buildable, FormatError, PlainUnpickler, ordered_dict

MAGIC = 0x1950A86A20F9469CFC6C  # of the format that torch wrote before it had zip files
PARTS = 100_000  # of a zip file: one for each storage
LARGEST_DIRECTORY = 2**24  # bytes of a zip file's list of parts
LARGEST_PICKLE = 2**28  # bytes of `data.pkl`, which has no weights in it; some 100 kB

STORAGES = dict(
    DoubleStorage=torch.float64,
    FloatStorage=torch.float32,
    HalfStorage=torch.float16,
    BFloat16Storage=torch.bfloat16,
    LongStorage=torch.int64,
    IntStorage=torch.int32,
    ShortStorage=torch.int16,
    CharStorage=torch.int8,
    ByteStorage=torch.uint8,
    BoolStorage=torch.bool,
)


def _view(storage: Any, offset: Any, size: Any, stride: Any, *_: Any) -> torch.Tensor:
    """Return a tensor of a storage, as `torch._utils._rebuild_tensor_v2` does, but of nothing beyond the storage."""
    whole = isinstance(storage, torch.Tensor) and isinstance(size, tuple) and isinstance(stride, tuple)
    if not whole or len(size) != len(stride) or len(size) > 64:
        raise FormatError("it has a tensor without a storage, a size and a stride")
    if not all(type(n) is int and 0 <= n < 2**63 for n in (offset, *size, *stride)):
        raise FormatError("it has a tensor whose size or stride is not a valid number")
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    if (numbers := math.prod(size)) and max(numbers, last + 1) > storage.numel():
        shown = "x".join(map(str, size))
        raise FormatError(f"it has a tensor of {shown} numbers in a storage of {storage.numel():,}")
    # Not a view in torch's sense, so that a training can go on with it.
    return torch.empty(0, dtype=storage.dtype).set_(
        storage.untyped_storage(), storage.storage_offset() + offset, size, stride
    )


def _parameter(tensor: Any, *_: Any) -> torch.Tensor:
    """Return the tensor of a parameter; of nothing else, or a container would be known under two depths."""
    if not isinstance(tensor, torch.Tensor):
        raise FormatError("it has a parameter that is not a tensor")
    return tensor


FUNCTIONS = {
    "collections.OrderedDict": ordered_dict,
    "torch.Size": lambda sizes=(): torch.Size(sizes),
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_tensor_v2": _view,
    **{f"torch.{name}": dtype for name, dtype in STORAGES.items()},
    **{str(dtype): dtype for dtype in STORAGES.values()},
}


class _Namespace(Buildable):
    """Stands for the arguments that timm's training keeps beside the weights."""


class _Storages:
    """The storages that a pickle refers to, each made once, of together no more bytes than the file has."""

    def __init__(self, size: int, read: Callable[[str, torch.Tensor], None] | None = None) -> None:
        self.size, self.read = size, read
        self.made: dict[str, torch.Tensor] = {}
        self.declared = 0

    def __call__(self, pid: Any) -> torch.Tensor:
        """Return the storage of a persistent id, as a tensor of one dimension."""
        if not isinstance(pid, tuple) or len(pid) not in (5, 6) or pid[0] != "storage":
            raise FormatError("its pickle refers to something that is not a storage")
        _, dtype, key, _, numel = pid[:5]
        if not isinstance(dtype, torch.dtype) or not isinstance(key, str) or type(numel) is not int or numel < 0:
            raise FormatError("it has a storage of unknown type, name or size")
        if key not in self.made:
            self.declared += numel * dtype.itemsize
            if self.declared > self.size:
                raise FormatError(
                    f"it declares {self.declared:,} bytes of weights and has {self.size:,}: it is cut short"
                )
            self.made[key] = torch.empty(numel, dtype=dtype)
            if self.read:
                self.read(key, self.made[key])
        storage = self.made[key]
        if (storage.dtype, storage.numel()) != (dtype, numel):
            raise FormatError(f"it declares the storage {key[:80]} twice, each time another one")
        if len(pid) == 6 and pid[5] is not None:  # a part of a storage, as torch wrote before version 0.4
            _, start, length = pid[5]
            storage = _view(storage, start, (length,), (1,))
        return storage


def _fill(storage: torch.Tensor, file: BinaryIO) -> None:
    """Read the numbers of a storage."""
    buffer = storage.view(torch.uint8).numpy() if storage.numel() else b""
    if len(buffer) and file.readinto(buffer) != len(buffer):  # type: ignore[attr-defined]
        raise FormatError("it is cut short")


def load(path: Path, steps: int = STEPS, functions: Mapping[str, Any] = FUNCTIONS) -> Any:
    """Read a file that `torch.save` wrote.

    Args:
        path: The file.
        steps: How many steps its pickle may have.
        functions: What its pickle may name.

    Returns:
        What was saved: tensors, on the CPU, and plain values in containers.

    Raises:
        FormatError: It is damaged, exceeds a bound, or holds something else.
        InputError: It cannot be read.
    """
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        is_zip = file.read(4) == b"PK\x03\x04"
        file.seek(0)
        try:
            if not is_zip:
                return _load_legacy(file, size, steps, functions)
            with zipfile.ZipFile(_Directory(file)) as archive:
                return _load_zip(file, archive, size, steps, functions)
        except (zipfile.BadZipFile, NotImplementedError, UnicodeError, struct.error) as error:
            raise FormatError(f"it is damaged or cut short: {error}") from error


class _Directory:
    """A file as `zipfile` sees it, which would take memory for a list of parts of any length."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.seek, self.tell = file, file.seek, file.tell

    def read(self, n: int = -1) -> bytes:
        if n > LARGEST_DIRECTORY:
            raise FormatError(f"its list of parts is larger than the limit of {LARGEST_DIRECTORY:,} bytes")
        return self.file.read(n)


def _load_zip(file: BinaryIO, archive: zipfile.ZipFile, size: int, steps: int, functions: Mapping[str, Any]) -> Any:
    parts = {info.filename: info for info in archive.infolist()}
    if len(parts) > PARTS:
        raise FormatError(f"it has {len(parts):,} parts, more than the limit of {PARTS:,}")
    # torch never compresses; a small file that unpacks to a huge one is an attack, and so are parts that overlap.
    if packed := [name for name, info in parts.items() if info.compress_type != zipfile.ZIP_STORED]:
        raise FormatError(f"its part {packed[0][:80]} is packed, as torch never does")
    if len(parts) < len(archive.infolist()) or sum(info.file_size for info in parts.values()) > size:
        raise FormatError("its parts overlap or have the same names")
    names = [name for name in parts if name.endswith("/data.pkl")]
    if len(names) != 1:
        raise FormatError("it is a zip file, but not one of PyTorch's")
    folder = names[0].removesuffix("data.pkl")
    if f"{folder}constants.pkl" in parts:
        raise FormatError("it is a TorchScript archive; save the model's state_dict() instead")
    if f"{folder}byteorder" in parts and _content(file, parts[f"{folder}byteorder"], size) != b"little":
        raise FormatError("its numbers are not little-endian, which is not supported")

    def read(key: str, storage: torch.Tensor) -> None:
        part = parts.get(f"{folder}data/{key}")
        if part is None:
            raise FormatError(f"its storage {key[:80]} is missing")
        if (declared := storage.numel() * storage.dtype.itemsize) != part.file_size:
            raise FormatError(f"its part {part.filename[:80]} has {part.file_size:,} bytes, and not {declared:,}")
        _seek(file, part)
        _fill(storage, file)

    content = _content(file, parts[names[0]], LARGEST_PICKLE)
    return PlainUnpickler(io.BytesIO(content), len(content), functions, _Storages(size, read), steps).load()


def _seek(file: BinaryIO, part: zipfile.ZipInfo) -> None:
    """Go to the content of a part, which lies in the file as it is; its checksum would cost more than reading it."""
    file.seek(part.header_offset)
    header = struct.unpack("<4s22xHH", file.read(30))
    if header[0] != b"PK\x03\x04":
        raise FormatError(f"its part {part.filename[:80]} is not where it should be")
    file.seek(header[1] + header[2], os.SEEK_CUR)


def _content(file: BinaryIO, part: zipfile.ZipInfo, largest: int) -> bytes:
    if part.file_size > largest:
        raise FormatError(f"its part {part.filename[:80]} is larger than the limit of {largest:,} bytes")
    _seek(file, part)
    return file.read(part.file_size)


def _load_legacy(file: BinaryIO, size: int, steps: int, functions: Mapping[str, Any]) -> Any:
    def read(storages: _Storages | None = None) -> Any:
        return PlainUnpickler(file, size - file.tell(), functions, storages, steps).load()

    if read() != MAGIC:
        raise FormatError("it is not a PyTorch file")
    read(), read()  # the version of the format, and what machine wrote it
    storages = _Storages(size)
    content, keys = read(storages), read()
    if not isinstance(keys, list) or sorted(map(str, keys)) != sorted(storages.made):
        raise FormatError("it does not list its storages")
    for key in keys:
        if struct.unpack("<q", file.read(8))[0] != storages.made[key].numel():
            raise FormatError(f"its storage {key[:80]} is not of the size that it declares")
        _fill(storages.made[key], file)
    return content


_is_checking: ContextVar[bool] = ContextVar("is_checking", default=False)


@contextlib.contextmanager
def checking_timm() -> Iterator[None]:
    """Check every pickle that timm reads in the block, such as `pytorch_model.bin`, before it reads it.

    Raises:
        InputError: A file is damaged, exceeds a bound, or holds something else than weights.
    """
    token = _is_checking.set(True)
    try:
        yield
    finally:
        _is_checking.reset(token)


def _check_first(torch_load: Callable[..., Any]) -> Callable[..., Any]:
    def load_checked(path: Any, *args: Any, **kwargs: Any) -> Any:
        if _is_checking.get():
            try:
                load(Path(path), functions={**FUNCTIONS, "argparse.Namespace": _Namespace})
            except FormatError as error:
                raise InputError(f"{path}: {error}") from error
        return torch_load(path, *args, **kwargs)

    return load_checked


# timm has no hook for this: both of its modules call this one function for all that is not safetensors.
_helpers._torch_load = _hub._torch_load = _check_first(_helpers._torch_load)
