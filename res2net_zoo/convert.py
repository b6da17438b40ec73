"""From an original's file to a timm state dict: safe readers, the renaming and the strict fit.

No file is unpickled without restriction, and what a file declares is held against its size before
memory is taken for it.
"""

import io
import math
import pickle
import pickletools
import re
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import torch

from res2net_zoo.program import InputError

VERSION = "1"  # of the conversion; another one may give other bytes

Tensors = dict[str, torch.Tensor]


class FormatError(ValueError):
    """A file that is not what it should be, or that would run code."""


# ----------------------------------------------------------------------------------------- pickles

MOST = 1_000_000  # steps of a pickle; res2net200 in PaddlePaddle's format has 45,593

# Steps that take memory or call something and that no state dict has.
REFUSED = {"BYTEARRAY8", "NEXT_BUFFER", "READONLY_BUFFER", "EXT1", "EXT2", "EXT4", "INST", "OBJ"}


class _Bounded:
    """A file of which nothing is read beyond its end, so that no memory is taken for what is not there."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self.file, self.size = file, size

    def read(self, n: int = -1) -> bytes:
        if n > (left := self.size - self.file.tell()):
            raise FormatError(f"it ends {n - left:,} bytes too early")
        return self.file.read(n)

    def readline(self) -> bytes:
        return self.file.readline()


class _Pickle(pickle.Unpickler):
    """Reads one pickle after having gone through its steps, none of which may take memory by itself."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        bounded, start = _Bounded(file, size), file.tell()
        for step, (opcode, argument, _) in enumerate(pickletools.genops(bounded)):  # type: ignore[arg-type]
            if opcode.name in REFUSED:
                raise FormatError(f"its pickle has a step {opcode.name}, which no state dict has")
            if step >= MOST or (opcode.name.endswith("PUT") and int(argument or 0) >= MOST):
                raise FormatError("its pickle is larger than any state dict's")
        file.seek(start)
        super().__init__(bounded, encoding="latin1")


def _refuse(module: str, name: str) -> FormatError:
    return FormatError(f"it would call {module}.{name}; only tensors in plain containers are read")


# ---------------------------------------------------------------------------- PyTorch and mmengine


class _Ignored:
    """Stands for every object of a pickle whose storages are only counted."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def __setstate__(self, state: Any) -> None: ...

    def __setitem__(self, key: Any, value: Any) -> None: ...


class _StorageType(NamedTuple):
    """Stands for a type of storage."""

    itemsize: int


ITEMSIZES = dict(Double=8, Float=4, Half=2, BFloat16=2, Long=8, Int=4, Short=2, Char=1, Byte=1, Bool=1)
TORCH_NAMES = {
    "collections.OrderedDict",
    "torch.Size",
    "torch._utils._rebuild_parameter",
    "torch._utils._rebuild_tensor_v2",
}


class _StorageCounter(_Pickle):
    """Adds up the storages that a torch pickle declares; makes none of them and imports nothing."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        super().__init__(file, size)
        self.bytes: dict[str, int] = {}

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and name.removesuffix("Storage") in ITEMSIZES:
            return _StorageType(ITEMSIZES[name.removesuffix("Storage")])
        if f"{module}.{name}" in TORCH_NAMES:
            return _Ignored
        raise _refuse(module, name)

    def persistent_load(self, pid: Any) -> Any:
        _, kind, key, _, numel = pid[:5]
        if not isinstance(kind, _StorageType) or type(numel) is not int or numel < 0 or not isinstance(key, str):
            raise FormatError("it has a storage that is none of torch's")
        self.bytes[key] = numel * kind.itemsize
        return _Ignored()


def read_torch(path: Path) -> Tensors:
    """Read a PyTorch file, in either of torch's formats: a state dict, or one under `state_dict`.

    Args:
        path: The file.

    Returns:
        Its tensors, on the CPU.

    Raises:
        FormatError: It is cut short, packed, holds something else, or would run code.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        is_zip = file.read(4) == b"PK\x03\x04"  # as torch tells, or it could read another part than is looked at here
    if is_zip:
        with zipfile.ZipFile(path) as archive:
            for info in archive.infolist():
                # torch never packs; a small file that unpacks to a huge one is an attack.
                if info.compress_type != zipfile.ZIP_STORED:
                    raise FormatError(f"its part {info.filename} is packed, as torch writes none")
            names = [name for name in archive.namelist() if name.endswith("/data.pkl")]
            if len(names) != 1:  # of two, torch could take the other one
                raise FormatError("it is a zip file, but none of torch's")
            with archive.open(names[0]) as file:
                content = file.read()
        counter = _StorageCounter(io.BytesIO(content), len(content))
        counter.load()
    else:
        with path.open("rb") as file:
            for _ in range(3):  # magic number, protocol version and machine
                _StorageCounter(file, size).load()
            counter = _StorageCounter(file, size)
            counter.load()
    if (declared := sum(counter.bytes.values())) > size:
        raise FormatError(f"it declares {declared:,} bytes of weights and has {size:,}: it is cut short")
    state = torch.load(path, map_location="cpu", weights_only=True)
    if isinstance(state, dict):
        state = state.get("state_dict", state)
    if not isinstance(state, dict) or not all(isinstance(t, torch.Tensor) for t in state.values()):
        raise FormatError("it holds no state dict")
    return {str(name): tensor for name, tensor in state.items()}


# ------------------------------------------------------------------------------------ PaddlePaddle


class _Dtype:
    """Stands for a NumPy type while a pickle is read: only numbers."""

    def __init__(self, name: Any, *flags: Any) -> None:
        if not isinstance(name, str) or not re.fullmatch(r"[fiu][1248]", name):
            raise FormatError(f"it has an array of type {str(name)[:20]}, which no weight is")
        self.name, self.order = name, "="

    def __setstate__(self, state: Any) -> None:
        self.order = state[1] if state[1] in ("<", ">", "=", "|") else "="

    @property
    def dtype(self) -> np.dtype:
        return np.dtype(self.order.replace("|", "=") + self.name)


class _Array:
    """Stands for a NumPy array, which is made only of bytes that are there."""

    def __init__(self) -> None:
        self.array: np.ndarray | None = None

    def __setstate__(self, state: Any) -> None:
        _, shape, kind, is_fortran, raw = state
        raw = raw.encode("latin1") if isinstance(raw, str) else raw
        if not isinstance(kind, _Dtype) or not isinstance(raw, bytes) or not isinstance(shape, tuple):
            raise FormatError("it has an array that is none of numbers")
        if not all(type(n) is int and n >= 0 for n in shape) or math.prod(shape) * kind.dtype.itemsize != len(raw):
            raise FormatError(f"it has an array of shape {shape} with {len(raw):,} bytes")
        self.array = np.frombuffer(raw, kind.dtype).reshape(shape, order="F" if is_fortran else "C")


class _ArrayType:
    """Stands for NumPy's type of arrays, which `_reconstruct` is told."""

    def __init__(self, *args: Any) -> None:
        raise FormatError("it has an array without its numbers")


class _ArrayUnpickler(_Pickle):
    """Admits NumPy arrays in plain containers, and nothing else; none of NumPy's own functions is called."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        super().__init__(file, size)
        self.encoded = size

    def find_class(self, module: str, name: str) -> Any:
        if module in ("numpy._core.multiarray", "numpy.core.multiarray") and name == "_reconstruct":
            return lambda *args: _Array()
        if module == "numpy" and name in ("ndarray", "dtype"):
            return _ArrayType if name == "ndarray" else _Dtype
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if (module, name) == ("_codecs", "encode"):  # how protocol 2 writes bytes
            return self.encode
        raise _refuse(module, name)

    def encode(self, text: str, encoding: str) -> bytes:
        self.encoded -= len(text)
        if self.encoded < 0:
            raise FormatError("it makes more bytes than it has")
        return text.encode("latin1")


def read_paddle(path: Path) -> Tensors:
    """Read a PaddlePaddle state dict, a pickle of NumPy arrays.

    Args:
        path: The `.pdparams` file.

    Returns:
        Its tensors, under their structured names.

    Raises:
        FormatError: It is cut short, holds something else, or would run code.
    """
    with path.open("rb") as file:
        content = _ArrayUnpickler(file, path.stat().st_size).load()
    if not isinstance(content, dict):
        raise FormatError("it holds no state dict")
    content.pop("StructuredToParameterName@@", None)  # of Paddle's own names, which nothing here asks for
    joined = content.pop("UnpackBigParamInfor@@", {})  # what protocol 2 cannot write whole
    arrays: dict[str, np.ndarray] = {}
    while content:
        name, value = content.popitem()
        if not isinstance(value, _Array) or value.array is None:
            raise FormatError(f"its entry {name} is no array of numbers")
        arrays[str(name)], value.array = value.array, None  # so that one array under two names is noticed
    for name, part in joined.items():
        whole = np.concatenate([arrays.pop(key) for key in part["slices"]])
        arrays[name] = whole.reshape(part["OriginShape"])
    return {name: torch.from_numpy(np.require(arrays.pop(name), requirements=["C", "W"])) for name in list(arrays)}


# --------------------------------------------------------------------------------------- MindSpore

MINDSPORE_DTYPES = {
    "Float16": torch.float16,
    "Float32": torch.float32,
    "Float64": torch.float64,
    "BFloat16": torch.bfloat16,
    "Int32": torch.int32,
    "Int64": torch.int64,
}


@cache
def _checkpoint_message() -> Any:
    """Return the class of MindSpore's message `Checkpoint`, from the part of its schema that a weight needs."""
    from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

    field = descriptor_pb2.FieldDescriptorProto
    schema = descriptor_pb2.FileDescriptorProto(
        name="mindspore_checkpoint.proto", package="res2net_zoo", syntax="proto2"
    )
    for message, fields in {
        "Tensor": [
            ("dims", 1, field.LABEL_REPEATED, field.TYPE_INT64, ""),
            ("tensor_type", 2, field.LABEL_REQUIRED, field.TYPE_STRING, ""),
            ("tensor_content", 3, field.LABEL_REQUIRED, field.TYPE_BYTES, ""),
        ],
        "Value": [
            ("tag", 1, field.LABEL_REQUIRED, field.TYPE_STRING, ""),
            ("tensor", 2, field.LABEL_REQUIRED, field.TYPE_MESSAGE, ".res2net_zoo.Tensor"),
        ],
        "Checkpoint": [("value", 1, field.LABEL_REPEATED, field.TYPE_MESSAGE, ".res2net_zoo.Value")],
    }.items():
        added = schema.message_type.add(name=message)
        for name, number, label, kind, type_name in fields:
            added.field.add(name=name, number=number, label=label, type=kind, type_name=type_name or None)
    pool = descriptor_pool.DescriptorPool()
    pool.Add(schema)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("res2net_zoo.Checkpoint"))


def _count_entries(data: bytes) -> None:
    """Refuse a message of more entries than memory should be taken for, or of other fields than theirs."""
    place = entries = 0
    while place < len(data):
        if data[place] != 0x0A:  # field 1, of bytes that follow their length
            raise FormatError("it has something else than entries")
        size, shift, place, entries = 0, 0, place + 1, entries + 1
        while True:
            byte, place = data[place], place + 1
            size, shift = size | (byte & 0x7F) << shift, shift + 7
            if byte < 0x80 or shift > 63:
                break
        place += size
        if place > len(data) or entries > MOST // 10:
            raise FormatError("it is cut short" if place > len(data) else "it has more entries than any state dict")


def read_mindspore(path: Path) -> Tensors:
    """Read a MindSpore checkpoint, a protobuf message.

    Args:
        path: The `.ckpt` file.

    Returns:
        Its tensors.

    Raises:
        FormatError: It is cut short or holds something else.
    """
    data = path.read_bytes()
    if data[-17:-10] == b"crc_num":
        if zlib.crc32(data[:-17]) != int.from_bytes(data[-10:], "big"):
            raise FormatError("its checksum is not the one that it carries")
        data = data[:-17]
    _count_entries(data)
    message = _checkpoint_message()()
    message.ParseFromString(data)
    del data
    parts: dict[str, list[Any]] = {}
    last = ""
    for value in message.value:
        if value.tag in parts and value.tag != last:
            raise FormatError(f"its entry {value.tag} stands twice")
        parts.setdefault(value.tag, []).append(value.tensor)  # a large tensor is cut into several
        last = value.tag
    tensors = {}
    for name, pieces in parts.items():
        first = pieces[0]
        if first.tensor_type not in MINDSPORE_DTYPES:
            raise FormatError(f"its entry {name} is of type {first.tensor_type}, which no weight is")
        if len(first.dims) > 8 or any(size < 0 for size in first.dims):
            raise FormatError(f"its entry {name} has {len(first.dims)} dimensions, as no weight has")
        # MindSpore writes a single 0 for a number that is no array.
        dtype, shape = MINDSPORE_DTYPES[first.tensor_type], [] if list(first.dims) == [0] else list(first.dims)
        content = bytearray().join(piece.tensor_content for piece in pieces)
        if (
            any(list(piece.dims) != list(first.dims) for piece in pieces)
            or len(content) != math.prod(shape) * dtype.itemsize
        ):
            raise FormatError(f"its entry {name} has {len(content):,} bytes, not those of {shape}")
        tensors[name] = torch.frombuffer(content, dtype=dtype).reshape(shape)
    return tensors


READERS: dict[str, Callable[[Path], Tensors]] = {
    "torch": read_torch,
    "mmengine": read_torch,
    "holocron": read_torch,
    "paddle": read_paddle,
    "mindspore": read_mindspore,
}


# ---------------------------------------------------------------------------------------- renaming


def _leaf(name: str, names: Mapping[str, str]) -> tuple[list[str], str]:
    """Split a tensor's name into its modules and its own, the latter as torch calls it."""
    *modules, leaf = name.split(".")
    return modules, names.get(leaf, leaf)


def rename_torch(name: str) -> str:
    """Return timm's name for the authors' or timm's own, which are the same."""
    return name


def rename_mmengine(name: str) -> str:
    """Return timm's name for mmpretrain's: `backbone.` and `head.` before it, and another deep stem."""
    if match := re.fullmatch(r"backbone\.stem\.(\d)\.(conv|bn)\.(\w+)", name):
        layer, is_norm = int(match[1]), match[2] == "bn"
        return f"bn1.{match[3]}" if is_norm and layer == 2 else f"conv1.{3 * layer + is_norm}.{match[3]}"
    return re.sub(r"^(backbone|head)\.", "", name)


def rename_holocron(name: str) -> str:
    """Return timm's name for Holocron's: `features.4.0.conv.3.conv.1.0.weight` and the like."""
    modules, leaf = _leaf(name, {})
    if modules == ["head"]:
        return f"fc.{leaf}"
    if modules in (["features", "0"], ["features", "1"]):
        return f"{'conv1' if modules[1] == '0' else 'bn1'}.{leaf}"
    if len(modules) < 5 or modules[0] != "features":
        return name
    block = f"layer{int(modules[1]) - 3}.{modules[2]}"
    if modules[3:6] == ["conv", "3", "conv"]:
        return f"{block}.{'convs' if modules[7] == '0' else 'bns'}.{modules[6]}.{leaf}"
    inner = {"0": "conv1", "1": "bn1", "4": "conv3", "5": "bn3"}.get(modules[4], modules[4])
    return f"{block}.{inner}.{leaf}" if modules[3] == "conv" else f"{block}.{'.'.join(modules[3:])}.{leaf}"


def rename_mindspore(name: str) -> str:
    """Return timm's name for MindCV's."""
    names = {"gamma": "weight", "beta": "bias", "moving_mean": "running_mean", "moving_variance": "running_var"}
    modules, leaf = _leaf(name, names)
    if modules == ["classifier"]:
        return f"fc.{leaf}"
    return ".".join(["downsample" if module == "down_sample" else module for module in modules] + [leaf])


def rename_paddle(name: str) -> str:
    """Return timm's name for PaddleClas's: `bb_0_0.res2a_branch2b_1._conv.weight` and the like."""
    modules, leaf = _leaf(name, {"_mean": "running_mean", "_variance": "running_var"})
    if modules == ["out"]:
        return f"fc.{leaf}"
    if len(modules) < 2 or modules[-1] not in ("_conv", "_batch_norm"):
        return name
    layer, is_norm = modules[-2], modules[-1] == "_batch_norm"
    if match := re.fullmatch(r"conv1(?:_(\d))?", layer):
        if match[1] is None:
            return f"{'bn1' if is_norm else 'conv1'}.{leaf}"
        i = int(match[1]) - 1
        return f"bn1.{leaf}" if is_norm and i == 2 else f"conv1.{3 * i + is_norm}.{leaf}"
    if not (match := re.fullmatch(r"bb_(\d+)_(\d+)", modules[0])):
        return name
    block = f"layer{int(match[1]) + 1}.{match[2]}"
    if match := re.search(r"_branch2b_(\d+)$", layer):
        return f"{block}.{'bns' if is_norm else 'convs'}.{int(match[1]) - 1}.{leaf}"
    if layer == "short":
        return f"{block}.downsample.{int(is_norm)}.{leaf}"
    inner = {"conv0": "1", "conv2": "3"}.get(layer, layer)
    return f"{block}.{'bn' if is_norm else 'conv'}{inner}.{leaf}"


RENAMERS: dict[str, Callable[[str], str]] = {
    "torch": rename_torch,
    "mmengine": rename_mmengine,
    "holocron": rename_holocron,
    "paddle": rename_paddle,
    "mindspore": rename_mindspore,
}


# ------------------------------------------------------------------------------------------ fitting


def fit(source: Tensors, format: str, target: Mapping[str, torch.Tensor]) -> Tensors:
    """Rename a source's tensors and fit them to a model's, every one of both exactly once.

    Args:
        source: The original's tensors; emptied as it goes, so that no tensor is held twice.
        format: Whose names and layout they have.
        target: The model's state dict; only its names, shapes and types are read.

    Returns:
        A state dict of the model, contiguous, in the model's order and types.

    Raises:
        FormatError: A tensor is left over, missing or of another shape; lists them.
    """
    names = {name: RENAMERS[format](name) for name in source}
    # MindCV and PaddleClas have no entry for a shortcut's pooling, or none where it does not pool.
    # timm always has one, so that what is their 0 and 1 there is its 1 and 2.
    first = ".downsample.0.weight"
    unpooled = {key.removesuffix(first) for key in names.values() if key.endswith(first) and key not in target}
    fitted: Tensors = {}
    wrong: list[str] = []
    for name, key in names.items():
        tensor = source.pop(name)
        if key.partition(".downsample.")[0] in unpooled:
            key = re.sub(r"(?<=\.downsample\.)\d", lambda match: str(int(match[0]) + 1), key)
        if format == "paddle" and key == "fc.weight":
            tensor = tensor.T  # Paddle stores a linear layer transposed
        if key not in target:
            wrong.append(f"{name} {tuple(tensor.shape)} has no place in the model")
        elif key in fitted:
            wrong.append(f"{name} would be {key}, which another tensor is already")
        elif tensor.shape != target[key].shape:
            wrong.append(f"{name} is {tuple(tensor.shape)}, {key} is {tuple(target[key].shape)}")
        elif tensor.is_floating_point() != target[key].is_floating_point():
            wrong.append(f"{name} is {tensor.dtype}, {key} is {target[key].dtype}")
        else:
            fitted[key] = tensor.to(target[key].dtype).contiguous()
    for key, tensor in target.items():
        if key not in fitted and key.endswith("num_batches_tracked"):
            fitted[key] = torch.zeros_like(tensor, device="cpu")  # which other frameworks do not count
        elif key not in fitted:
            wrong.append(f"{key} {tuple(tensor.shape)} of the model is missing")
    if wrong:
        shown = "; ".join(wrong[:8]) + (f"; and {len(wrong) - 8} more" if len(wrong) > 8 else "")
        raise FormatError(f"{len(wrong)} of its tensors do not fit: {shown}")
    return {key: fitted[key] for key in target}


def convert(
    path: Path, format: str, target: Mapping[str, torch.Tensor], drop: Callable[[str], bool] = lambda name: False
) -> Tensors:
    """Read an original's file as a model's state dict.

    Args:
        path: The file.
        format: What kind of file it is, a key of `READERS`.
        target: The model's state dict; only its names, shapes and types are read.
        drop: Tells of a source's tensor that the model is known not to have.

    Returns:
        The state dict.

    Raises:
        InputError: The file cannot be read or does not fit the model.
    """
    try:
        source = READERS[format](path)
        for name in [name for name in source if drop(name)]:
            del source[name]
        return fit(source, format, target)
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from error
    except MemoryError as error:
        raise InputError(f"{path} declares more than this machine's memory holds; it is no weight file") from error
    except FormatError as error:
        raise InputError(f"{path}: {error}") from error
    except Exception as error:
        # Whatever a broken file makes a reader stumble over; there is no one type for it.
        raise InputError(
            f"{path} is no whole {format} file: {' '.join((str(error) or repr(error)).split())[:300]}"
        ) from error
