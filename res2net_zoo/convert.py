"""From an original's file to a timm state dict: safe readers, the renaming and the strict fit.

No file is unpickled without restriction, and what a file declares is held against its size before
memory is taken for it.
"""

import math
import pickle
import re
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from safetensors.torch import load_file

from res2net_zoo.program import InputError

VERSION = "1"  # of the conversion; another one may give other bytes

Tensors = dict[str, torch.Tensor]


class FormatError(ValueError):
    """A file that is not what it should be, or that would run code."""


# ---------------------------------------------------------------------------- PyTorch and mmengine


class _Ignored:
    """Stands for every object of a pickle whose storages are only counted."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def __setstate__(self, state: Any) -> None: ...

    def __setitem__(self, key: Any, value: Any) -> None: ...


ITEMSIZES = dict(Double=8, Float=4, Half=2, BFloat16=2, Long=8, Int=4, Short=2, Char=1, Byte=1, Bool=1)


class _StorageCounter(pickle.Unpickler):
    """Adds up the storages that a torch pickle declares; makes none of them and imports nothing."""

    def __init__(self, file: BinaryIO) -> None:
        super().__init__(file)
        self.bytes: dict[str, int] = {}

    def find_class(self, module: str, name: str) -> Any:
        return ITEMSIZES.get(name.removesuffix("Storage"), 1) if module == "torch" else _Ignored

    def persistent_load(self, pid: Any) -> Any:
        _, itemsize, key, _, numel = pid[:5]
        self.bytes[key] = numel * itemsize
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
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            for info in archive.infolist():
                # torch never packs; a small file that unpacks to a huge one is an attack.
                if info.compress_type != zipfile.ZIP_STORED:
                    raise FormatError(f"its part {info.filename} is packed, as torch writes none")
            name = next((name for name in archive.namelist() if name.endswith("/data.pkl")), "")
            if not name:
                raise FormatError("it is a zip file, but none of torch's")
            with archive.open(name) as file:
                counter = _StorageCounter(file)  # type: ignore[arg-type]
                counter.load()
    else:
        with path.open("rb") as file:
            for _ in range(3):  # magic number, protocol version and machine
                _StorageCounter(file).load()
            counter = _StorageCounter(file)
            counter.load()
    if (declared := sum(counter.bytes.values())) > size:
        raise FormatError(f"it declares {declared:,} bytes of weights and has {size:,}: it is cut short")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        call = re.search(r"GLOBAL (\S+) was not", str(error))
        if call is None:
            raise
        raise FormatError(f"it would call {call[1]}; only tensors in plain containers are read") from error
    if isinstance(content, dict):
        content = content.get("state_dict", content)
    if not isinstance(content, dict) or not all(isinstance(t, torch.Tensor) for t in content.values()):
        raise FormatError("it holds no state dict")
    return {str(name): tensor for name, tensor in content.items()}


# ------------------------------------------------------------------------------------ PaddlePaddle


class _Bounded:
    """A file of which nothing is read beyond its end, so that no memory is taken for what is not there."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self.file, self.left = file, size

    def read(self, n: int = -1) -> bytes:
        if n > self.left:
            raise FormatError(f"it ends {n - self.left:,} bytes too early")
        data = self.file.read(n)
        self.left -= len(data)
        return data

    def readline(self) -> bytes:
        data = self.file.readline()
        self.left -= len(data)
        return data


class _ArrayUnpickler(pickle.Unpickler):
    """Admits NumPy arrays in plain containers, and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        if module in ("numpy._core.multiarray", "numpy.core.multiarray") and name == "_reconstruct":
            # NumPy's takes memory for whatever shape it is told; the real one follows with the data.
            return lambda *args: np.ndarray.__new__(np.ndarray, (0,), "b")
        if module == "numpy" and name in ("ndarray", "dtype"):
            return getattr(np, name)
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if (module, name) == ("_codecs", "encode"):  # how protocol 2 writes bytes
            return lambda text, encoding: text.encode("latin1")
        raise FormatError(f"it would call {module}.{name}; only NumPy arrays in plain containers are read")


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
        content = _ArrayUnpickler(_Bounded(file, path.stat().st_size), encoding="latin1").load()
    if not isinstance(content, dict):
        raise FormatError("it holds no state dict")
    content.pop("StructuredToParameterName@@", None)  # of Paddle's own names, which nothing here asks for
    arrays = {name: value for name, value in content.items() if not name.startswith("UnpackBigParamInfor@@")}
    for name, part in content.get("UnpackBigParamInfor@@", {}).items():  # what protocol 2 cannot write whole
        arrays[name] = np.concatenate([arrays.pop(key) for key in part["slices"]]).reshape(part["OriginShape"])
    for name, array in arrays.items():
        if not isinstance(array, np.ndarray) or array.dtype.kind not in "fiu":
            raise FormatError(f"its entry {name} is no array of numbers")
    return {str(name): torch.from_numpy(np.require(array, requirements=["C", "W"])) for name, array in arrays.items()}


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
        dtype, shape = MINDSPORE_DTYPES[first.tensor_type], [d for d in first.dims if list(first.dims) != [0]]
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
    "safetensors": lambda path: load_file(path),
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
    "safetensors": rename_torch,
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
