"""A reader for both formats of `torch.save`, with limits that `torch.load` does not have.

`torch.load` with `weights_only` runs no code of a file, but it crashes on deeply nested pickles and allocates
memory for tensors that a file only declares. Here allocations are limited by the size of the file.
"""

import contextlib
import io
import math
import os
import struct
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import torch

from res2net_zoo.utils.errors import InputError
from res2net_zoo.utils.files import open_regular
from res2net_zoo.utils.private_apis import wrap_timm_torch_load
from res2net_zoo.weights.pickles import STEPS, Buildable, FormatError, PlainUnpickler, ordered_dict

MAGIC = 0x1950A86A20F9469CFC6C  # of torch's format before version 1.6
PARTS = 100_000  # files in a zip archive, one per storage
LARGEST_DIRECTORY = 2**24  # bytes of a zip archive's directory
LARGEST_PICKLE = 2**28  # bytes of `data.pkl`, which does not include weights; usually 100 kB

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
    """Return a view of a storage, as `torch._utils._rebuild_tensor_v2` does, after checking its bounds."""
    whole = isinstance(storage, torch.Tensor) and isinstance(size, tuple) and isinstance(stride, tuple)
    if not whole or len(size) != len(stride) or len(size) > 64:
        raise FormatError("it has a tensor without a storage, a size and a stride")
    if not all(type(n) is int and 0 <= n < 2**63 for n in (offset, *size, *stride)):
        raise FormatError("it has a tensor with an invalid offset, size or stride")
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    if (numbers := math.prod(size)) and max(numbers, last + 1) > storage.numel():
        shown = "x".join(map(str, size))
        raise FormatError(f"it has a tensor of {shown} numbers in a storage of {storage.numel():,}")
    # Not a view for autograd, so that the tensor can be trained.
    return torch.empty(0, dtype=storage.dtype).set_(
        storage.untyped_storage(), storage.storage_offset() + offset, size, stride
    )


def _parameter(tensor: Any, *_: Any) -> torch.Tensor:
    """Return the tensor of a parameter; a container is refused, because its depth would be lost."""
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
    """Stand-in for the arguments that timm's training script saves with the weights."""


class _Storages:
    """The storages that a pickle refers to, each created once; their total size is limited by the file's."""

    def __init__(self, size: int, read: Callable[[str, torch.Tensor], None] | None = None) -> None:
        self.size, self.read = size, read
        self.made: dict[str, torch.Tensor] = {}
        self.declared = 0

    def __call__(self, pid: Any) -> torch.Tensor:
        """Return the storage of a persistent id as a 1-D tensor."""
        if not isinstance(pid, tuple) or len(pid) not in (5, 6) or pid[0] != "storage":
            raise FormatError("its pickle refers to something that is not a storage")
        _, dtype, key, _, numel = pid[:5]
        if not isinstance(dtype, torch.dtype) or not isinstance(key, str) or type(numel) is not int or numel < 0:
            raise FormatError("it has a storage of unknown type, name or size")
        if key not in self.made:
            self.declared += numel * dtype.itemsize
            if self.declared > self.size:
                raise FormatError(
                    f"it declares {self.declared:,} bytes of weights but has {self.size:,}: it is truncated"
                )
            self.made[key] = torch.empty(numel, dtype=dtype)
            if self.read:
                self.read(key, self.made[key])
        storage = self.made[key]
        if (storage.dtype, storage.numel()) != (dtype, numel):
            raise FormatError(f"it declares the storage {key[:80]} twice with different types or sizes")
        if len(pid) == 6 and pid[5] is not None:  # a view of a storage, from torch before version 0.4
            _, start, length = pid[5]
            storage = _view(storage, start, (length,), (1,))
        return storage


def _fill(storage: torch.Tensor, file: BinaryIO) -> None:
    """Read the values of a storage from a file."""
    buffer = storage.view(torch.uint8).numpy() if storage.numel() else b""
    if len(buffer) and file.readinto(buffer) != len(buffer):  # type: ignore[attr-defined]
        raise FormatError("it is truncated")


def load(path: Path, steps: int = STEPS, functions: Mapping[str, Any] = FUNCTIONS, stand_ins: bool = False) -> Any:
    """Read a file written by `torch.save`.

    Args:
        path: The file.
        steps: Largest number of opcodes in its pickle.
        functions: Allowed globals of its pickle.
        stand_ins: Whether inert objects replace those of other libraries, as a `PlainUnpickler` does.

    Returns:
        The saved object: tensors, on the CPU, and plain values in containers.

    Raises:
        FormatError: The file is damaged, exceeds a limit, or contains something else.
        InputError: The file cannot be read.
    """
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        is_zip = file.read(4) == b"PK\x03\x04"
        file.seek(0)
        unpickler = partial(PlainUnpickler, functions=functions, steps=steps, stand_ins=stand_ins)
        try:
            if not is_zip:
                return _load_legacy(file, size, unpickler)
            with zipfile.ZipFile(_Directory(file)) as archive:
                return _load_zip(file, archive, size, unpickler)
        except (zipfile.BadZipFile, NotImplementedError, UnicodeError, struct.error) as error:
            raise FormatError(f"it is damaged or truncated: {error}") from error


class _Directory:
    """A file for `zipfile` that limits how much memory it allocates for the archive's directory."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.seek, self.tell = file, file.seek, file.tell

    def read(self, n: int = -1) -> bytes:
        if n > LARGEST_DIRECTORY:
            raise FormatError(f"its directory is larger than the limit of {LARGEST_DIRECTORY:,} bytes")
        return self.file.read(n)


def _load_zip(file: BinaryIO, archive: zipfile.ZipFile, size: int, unpickler: Callable[..., PlainUnpickler]) -> Any:
    parts = {info.filename: info for info in archive.infolist()}
    if len(parts) > PARTS:
        raise FormatError(f"it has {len(parts):,} parts, more than the limit of {PARTS:,}")
    # torch does not compress; compressed or overlapping parts would be a decompression bomb.
    if packed := [name for name, info in parts.items() if info.compress_type != zipfile.ZIP_STORED]:
        raise FormatError(f"its part {packed[0][:80]} is compressed, which is not supported")
    if len(parts) < len(archive.infolist()) or sum(info.file_size for info in parts.values()) > size:
        raise FormatError("its parts overlap or have duplicate names")
    names = [name for name in parts if name.endswith("/data.pkl")]
    if len(names) != 1:
        raise FormatError("it is a zip file, but not a PyTorch file")
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
            raise FormatError(f"its part {part.filename[:80]} has {part.file_size:,} bytes instead of {declared:,}")
        _seek(file, part)
        _fill(storage, file)

    content = _content(file, parts[names[0]], LARGEST_PICKLE)
    return unpickler(io.BytesIO(content), len(content), persistent_load=_Storages(size, read)).load()


def _seek(file: BinaryIO, part: zipfile.ZipInfo) -> None:
    """Seek to the uncompressed content of a part; the checksum is skipped, as it takes longer than reading."""
    file.seek(part.header_offset)
    header = struct.unpack("<4s22xHH", file.read(30))
    if header[0] != b"PK\x03\x04":
        raise FormatError(f"its part {part.filename[:80]} is not at its recorded offset")
    file.seek(header[1] + header[2], os.SEEK_CUR)


def _content(file: BinaryIO, part: zipfile.ZipInfo, largest: int) -> bytes:
    if part.file_size > largest:
        raise FormatError(f"its part {part.filename[:80]} is larger than the limit of {largest:,} bytes")
    _seek(file, part)
    return file.read(part.file_size)


def _load_legacy(file: BinaryIO, size: int, unpickler: Callable[..., PlainUnpickler]) -> Any:
    def read(storages: _Storages | None = None) -> Any:
        return unpickler(file, size - file.tell(), persistent_load=storages).load()

    if read() != MAGIC:
        raise FormatError("it is not a PyTorch file")
    read(), read()  # the version of the format, and properties of the machine that wrote it
    storages = _Storages(size)
    content, keys = read(storages), read()
    if not isinstance(keys, list) or sorted(map(str, keys)) != sorted(storages.made):
        raise FormatError("its list of storages is invalid")
    for key in keys:
        if struct.unpack("<q", file.read(8))[0] != storages.made[key].numel():
            raise FormatError(f"its storage {key[:80]} does not have its declared size")
        _fill(storages.made[key], file)
    return content


_is_checking: ContextVar[bool] = ContextVar("is_checking", default=False)


@contextlib.contextmanager
def checking_timm() -> Iterator[None]:
    """Check every pickle that timm loads in the context, such as `pytorch_model.bin`, before timm reads it.

    Raises:
        InputError: A file is damaged, exceeds a limit, or contains something other than weights.
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


wrap_timm_torch_load(_check_first)
