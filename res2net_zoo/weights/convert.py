"""Convert an original weight file to a timm state dict: safe readers, key renaming and strict loading.

No file is unpickled without restriction, and declared sizes are compared with the size of the file
before memory is allocated.
"""

import contextlib
import math
import os
import re
import zlib
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from res2net_zoo.utils.errors import InputError, one_line
from res2net_zoo.utils.files import open_regular
from res2net_zoo.weights import torch_file
from res2net_zoo.weights.pickles import Buildable, FormatError, PlainUnpickler, ordered_dict

# Projections of nested trees in the authors' DLA weights, whose outputs are never used.
UNREAD_BY_DLA = ("level3.project.", "level4.project.", "level4.tree1.project.")
VERSION = "1"  # of the conversion; increment it if the output changes

LARGEST = 4 * 2**30  # bytes of an original file; the catalogue's largest has 0.4 GB
ENTRIES = 100_000  # limit for a MindSpore checkpoint

Tensors = dict[str, torch.Tensor]


def short(name: object) -> str:
    """Return a name from a file, shortened to 80 characters."""
    return text if len(text := str(name)) <= 80 else f"{text[:77]}..."


# ------------------------------------------------------------------ PyTorch, mmengine and MMDetection


def read_torch(path: Path) -> Tensors:
    """Read a PyTorch file, in either of torch's formats, with a state dict at the top level or under `state_dict`.

    Args:
        path: The file.

    Returns:
        Its tensors, on the CPU.

    Raises:
        FormatError: The file is truncated, compressed, contains something else, or would run code.
        InputError: The file cannot be read.
    """
    state = torch_file.load(path)
    if isinstance(state, dict):
        state = state.get("state_dict", state)
    if not isinstance(state, dict):
        raise FormatError("it does not contain a state dict")
    if other := [name for name, tensor in state.items() if not isinstance(tensor, torch.Tensor)]:
        raise FormatError(f"its entry {short(other[0])} is not a tensor")
    return {str(name): tensor for name, tensor in state.items()}


def read_mmdet(path: Path) -> Tensors:
    """Read the backbone of a detector of MMDetection, or a backbone under its keys.

    Args:
        path: A file with a state dict, at the top level or under `state_dict`. Of a whole detector only the tensors
            under `backbone.` are returned; of a backbone all but a classifier, which MMDetection does not have.

    Raises:
        FormatError: As `read_torch`.
        InputError: The file cannot be read.
    """
    state = read_torch(path)
    if any(name.startswith("backbone.") for name in state):
        return {name: tensor for name, tensor in state.items() if name.startswith("backbone.")}
    return {name: tensor for name, tensor in state.items() if not name.startswith("fc.")}


# ------------------------------------------------------------------------------------ PaddlePaddle


class _Dtype(Buildable):
    """Stand-in for a NumPy dtype while a pickle is read; numeric types only."""

    def __init__(self, name: Any, *flags: Any) -> None:
        if not isinstance(name, str) or not re.fullmatch(r"[fiu][1248]", name):
            raise FormatError(f"it has an array of type {str(name)[:20]}; weights are numbers")
        self.name, self.order = name, "="

    def build(self, state: Any) -> None:
        """Set the byte order."""
        self.order = state[1] if state[1] in ("<", ">", "=", "|") else "="

    @property
    def dtype(self) -> np.dtype:
        return np.dtype(self.order.replace("|", "=") + self.name)


class _Array(Buildable):
    """Stand-in for a NumPy array; allocates no more than the bytes in the file."""

    def __init__(self, *args: Any) -> None:
        self.array: np.ndarray | None = None

    def build(self, state: Any) -> None:
        """Build the array from its shape, dtype, memory order and bytes."""
        _, shape, kind, is_fortran, raw = state
        raw = raw.encode("latin1") if isinstance(raw, str) else raw
        if not isinstance(kind, _Dtype) or not isinstance(raw, bytes) or not isinstance(shape, tuple):
            raise FormatError("it has an array that is not numeric")
        if not all(type(n) is int and 0 <= n < 2**63 for n in shape) or len(shape) > 8:
            raise FormatError("it has an array with an invalid shape")
        if math.prod(shape) * kind.dtype.itemsize != len(raw):
            raise FormatError(f"it has an array of shape {shape} with {len(raw):,} bytes")
        self.array = np.frombuffer(raw, kind.dtype).reshape(shape, order="F" if is_fortran else "C")


class _ArrayType:
    """Stand-in for `numpy.ndarray`, an argument of `_reconstruct`."""

    def __init__(self, *args: Any) -> None:
        raise FormatError("it has an array without data")


def _encode(text: Any, encoding: Any) -> bytes:
    """Return bytes, which pickle protocol 2 stores as text."""
    if not isinstance(text, str) or encoding != "latin1":
        raise FormatError("its pickle encodes something other than bytes")
    return text.encode("latin1")


# Stand-ins for the globals in the pickle of a NumPy array; NumPy's own functions are never called.
ARRAYS: dict[str, Any] = {
    "numpy._core.multiarray._reconstruct": _Array,
    "numpy.core.multiarray._reconstruct": _Array,
    "numpy.ndarray": _ArrayType,
    "numpy.dtype": _Dtype,
    "collections.OrderedDict": ordered_dict,
    "_codecs.encode": _encode,
}


def read_paddle(path: Path) -> Tensors:
    """Read a PaddlePaddle state dict, a pickle of NumPy arrays.

    Args:
        path: The `.pdparams` file.

    Returns:
        Its tensors, by their structured names.

    Raises:
        FormatError: The file is truncated, contains something else, or would run code.
        InputError: The file cannot be read.
    """
    with open_regular(path) as file:
        content = PlainUnpickler(file, os.fstat(file.fileno()).st_size, ARRAYS).load()
    if not isinstance(content, dict):
        raise FormatError("it does not contain a state dict")
    content.pop("StructuredToParameterName@@", None)  # maps to Paddle's internal names, which are not needed
    joined = content.pop("UnpackBigParamInfor@@", {})  # arrays too large for pickle protocol 2, stored in slices
    arrays: dict[str, np.ndarray] = {}
    while content:
        name, value = content.popitem()
        if not isinstance(value, _Array) or value.array is None:
            raise FormatError(f"its entry {short(name)} is not an array of numbers, or appears twice")
        arrays[str(name)], value.array = value.array, None  # detects one array under two names
    _join(arrays, joined)
    return {name: torch.from_numpy(_native(arrays.pop(name))) for name in list(arrays)}


def _native(array: np.ndarray) -> np.ndarray:
    """Return an array that torch accepts: contiguous, writable and in native byte order."""
    return np.require(array, array.dtype.newbyteorder("="), ["C", "W"])


def _join(arrays: dict[str, np.ndarray], joined: Any) -> None:
    """Join the slices of large arrays; each slice must be used exactly once."""
    if not isinstance(joined, dict):
        raise FormatError("its list of large arrays is not valid")
    for name, part in joined.items():
        slices, shape = (part.get("slices"), part.get("OriginShape")) if isinstance(part, dict) else (None, None)
        if not isinstance(slices, list | tuple) or not slices or not isinstance(shape, list | tuple):
            raise FormatError(f"its large array {short(name)} has no list of slices or no shape")
        if missing := [key for key in slices if not isinstance(key, str) or key not in arrays]:
            raise FormatError(f"the slice {short(missing[0])} of its large array {short(name)} is missing")
        if len(set(slices)) < len(slices) or (name in arrays and name not in slices):
            raise FormatError(f"its large array {short(name)} uses the same slice twice")
        pieces = [arrays.pop(key).reshape(-1) for key in slices]
        if not all(type(n) is int and 0 <= n < 2**63 for n in shape) or math.prod(shape) != sum(map(len, pieces)):
            raise FormatError(f"the slices of its large array {short(name)} do not fill its shape")
        arrays[str(name)] = np.concatenate(pieces).reshape(shape)


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
    """Return the protobuf class of MindSpore's message `Checkpoint`, limited to the fields that weights need."""
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
    """Count the entries of a serialized message, before protobuf allocates memory for them.

    Raises:
        FormatError: There are more than the limit, or the message has other fields.
    """
    place = entries = 0
    while place < len(data):
        if data[place] != 0x0A:  # field 1, of bytes that follow their length
            raise FormatError("it has fields other than entries")
        size, shift, place, entries = 0, 0, place + 1, entries + 1
        while place < len(data):
            byte, place = data[place], place + 1
            size, shift = size | (byte & 0x7F) << shift, shift + 7
            if byte < 0x80 or shift > 63:
                break
        place += size
        if entries > ENTRIES:
            raise FormatError(f"it has more entries than the limit of {ENTRIES:,}")
    if place > len(data):
        raise FormatError("it is truncated")


def read_mindspore(path: Path) -> Tensors:
    """Read a MindSpore checkpoint, a protobuf message.

    Args:
        path: The `.ckpt` file.

    Returns:
        Its tensors.

    Raises:
        FormatError: The file is truncated or contains something else.
        InputError: The file cannot be read.
    """
    from google.protobuf.message import DecodeError

    with open_regular(path) as file:
        data = file.read()
    if data[-17:-10] == b"crc_num":
        if zlib.crc32(data[:-17]) != int.from_bytes(data[-10:], "big"):
            raise FormatError("its checksum does not match its content: it is damaged")
        data = data[:-17]
    _count_entries(data)
    message = _checkpoint_message()()
    try:
        message.ParseFromString(data)
    except DecodeError as error:
        raise FormatError("its entries are damaged") from error
    del data
    parts: dict[str, list[Any]] = {}
    last = ""
    for value in message.value:
        if not isinstance(value.tag, str):  # protobuf returns invalid UTF-8 as bytes
            raise FormatError("it has a name that is not UTF-8")
        if value.tag in parts and value.tag != last:
            raise FormatError(f"its entry {short(value.tag)} appears twice")
        parts.setdefault(value.tag, []).append(value.tensor)  # a large tensor is stored in several pieces
        last = value.tag
    return {name: _from_pieces(short(name), pieces) for name, pieces in parts.items()}


def _from_pieces(name: str, pieces: list[Any]) -> torch.Tensor:
    """Return a tensor joined from MindSpore's pieces."""
    first = pieces[0]
    if first.tensor_type not in MINDSPORE_DTYPES:
        raise FormatError(f"its entry {name} is of the unsupported type {short(first.tensor_type)}")
    if len(first.dims) > 8 or any(size < 0 for size in first.dims):
        raise FormatError(f"its entry {name} has {len(first.dims):,} dimensions or a negative one; the limit is 8")
    # MindSpore stores the shape of a scalar as a single 0.
    dtype, shape = MINDSPORE_DTYPES[first.tensor_type], [] if list(first.dims) == [0] else list(first.dims)
    if any(piece.dims != first.dims for piece in pieces):
        raise FormatError(f"the pieces of its entry {name} have different shapes")
    content = bytearray().join(piece.tensor_content for piece in pieces)
    if len(content) != math.prod(shape) * dtype.itemsize:
        raise FormatError(f"its entry {name} has {len(content):,} bytes, not those of {shape}")
    return torch.frombuffer(content, dtype=dtype).reshape(shape) if content else torch.empty(shape, dtype=dtype)


READERS: dict[str, Callable[[Path], Tensors]] = {
    "torch": read_torch,
    "mmengine": read_torch,
    "mmdet": read_mmdet,
    "holocron": read_torch,
    "paddle": read_paddle,
    "mindspore": read_mindspore,
}


# ---------------------------------------------------------------------------------------- renaming


def _leaf(name: str, names: Mapping[str, str]) -> tuple[list[str], str]:
    """Split a tensor's name into module names and the tensor's own name, the latter translated by `names`."""
    *modules, leaf = name.split(".")
    return modules, names.get(leaf, leaf)


def rename_torch(name: str) -> str:
    """Return timm's name for a tensor of the authors, who use the same names."""
    return name


def rename_mmengine(name: str) -> str:
    """Return timm's name for a tensor of mmpretrain: removes `backbone.` and `head.`, and renames the deep stem."""
    if match := re.fullmatch(r"(?:backbone\.)?stem\.(\d)\.(conv|bn)\.(\w+)", name):
        layer, is_norm = int(match[1]), match[2] == "bn"
        return f"bn1.{match[3]}" if is_norm and layer == 2 else f"conv1.{3 * layer + is_norm}.{match[3]}"
    return re.sub(r"^(backbone|head)\.", "", name)


def rename_mmdet(name: str) -> str:
    """Return timm's name for a tensor of MMDetection: removes `backbone.`, and renames the deep stem."""
    name = name.removeprefix("backbone.")
    if match := re.fullmatch(r"stem\.(\d)\.(\w+)", name):
        return f"bn1.{match[2]}" if match[1] == "7" else f"conv1.{match[1]}.{match[2]}"
    return name


def rename_holocron(name: str) -> str:
    """Return timm's name for a tensor of Holocron, such as `features.4.0.conv.3.conv.1.0.weight`."""
    modules, leaf = _leaf(name, {})
    if modules == ["head"]:
        return f"fc.{leaf}"
    if modules in (["features", "0"], ["features", "1"]):
        return f"{'conv1' if modules[1] == '0' else 'bn1'}.{leaf}"
    if len(modules) < 5 or modules[0] != "features" or not re.fullmatch(r"\d{1,3}", modules[1]):
        return name
    block = f"layer{int(modules[1]) - 3}.{modules[2]}"
    if modules[3:6] == ["conv", "3", "conv"] and len(modules) == 8:
        return f"{block}.{'convs' if modules[7] == '0' else 'bns'}.{modules[6]}.{leaf}"
    inner = {"0": "conv1", "1": "bn1", "4": "conv3", "5": "bn3"}.get(modules[4], modules[4])
    return f"{block}.{inner}.{leaf}" if modules[3] == "conv" else f"{block}.{'.'.join(modules[3:])}.{leaf}"


def rename_mindspore(name: str) -> str:
    """Return timm's name for a tensor of MindCV."""
    names = {"gamma": "weight", "beta": "bias", "moving_mean": "running_mean", "moving_variance": "running_var"}
    modules, leaf = _leaf(name, names)
    if modules == ["classifier"]:
        return f"fc.{leaf}"
    return ".".join(["downsample" if module == "down_sample" else module for module in modules] + [leaf])


def rename_paddle(name: str) -> str:
    """Return timm's name for a tensor of PaddleClas, such as `bb_0_0.res2a_branch2b_1._conv.weight`."""
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
    if not (match := re.fullmatch(r"bb_(\d{1,3})_(\d{1,3})", modules[0])):
        return name
    block = f"layer{int(match[1]) + 1}.{match[2]}"
    if match := re.search(r"_branch2b_(\d{1,3})$", layer):
        return f"{block}.{'bns' if is_norm else 'convs'}.{int(match[1]) - 1}.{leaf}"
    if layer == "short":
        return f"{block}.downsample.{int(is_norm)}.{leaf}"
    inner = {"conv0": "1", "conv2": "3"}.get(layer, layer)
    return f"{block}.{'bn' if is_norm else 'conv'}{inner}.{leaf}"


RENAMERS: dict[str, Callable[[str], str]] = {
    "torch": rename_torch,
    "mmengine": rename_mmengine,
    "mmdet": rename_mmdet,
    "holocron": rename_holocron,
    "paddle": rename_paddle,
    "mindspore": rename_mindspore,
}


# ------------------------------------------------------------------------------------------ fitting


def timm_names(source: Iterable[str], format: str, target: Container[str]) -> dict[str, str]:
    """Return timm's name for each of an original's tensors, by its own name.

    Args:
        source: The original's names.
        format: The format of the names, a key of `RENAMERS`.
        target: The model's names.
    """
    names = {name: RENAMERS[format](name) for name in source}
    # timm's shortcut always begins with a pooling layer, at index 0. PaddleClas's names have none, and MindCV's only
    # where it pools, so that indices 0 and 1 become 1 and 2. Without it, later stages compute something else.
    first = ".downsample.0.weight"
    unpooled = {key.removesuffix(first) for key in names.values() if key.endswith(first) and key not in target}
    if format != "paddle":
        unpooled &= {"layer1.0"}
    return {
        name: re.sub(r"(?<=\.downsample\.)\d", lambda match: str(int(match[0]) + 1), key)
        if key.partition(".downsample.")[0] in unpooled
        else key
        for name, key in names.items()
    }


def fit(source: Tensors, format: str, target: Mapping[str, torch.Tensor]) -> Tensors:
    """Rename an original's tensors and match them with a model's, each exactly once.

    Args:
        source: The original's tensors; emptied during conversion to save memory.
        format: The format whose names and layout they have, a key of `RENAMERS`.
        target: The model's state dict; only its names, shapes and dtypes are used.

    Returns:
        A state dict for the model, contiguous, in the model's order and dtypes.

    Raises:
        FormatError: Tensors are unexpected, missing or have another shape; the message lists them.
    """
    names = timm_names(source, format, target)
    fitted: Tensors = {}
    found: set[str] = set()
    wrong: list[str] = []
    classes: set[str] = set()
    for name, key in names.items():
        tensor = source.pop(name)
        if format == "paddle" and key == "fc.weight" and tensor.ndim == 2:
            tensor = tensor.T  # Paddle stores a linear layer transposed
        label = short(name) if name == key else f"{short(name)} (in the model {short(key)})"
        if key not in target:
            wrong.append(f"{short(name)} {tuple(tensor.shape)} is not in the model")
        elif key in found:
            wrong.append(f"{label} appears twice")
        elif tensor.shape != target[key].shape:
            wrong.append(f"{label} has {shapes(tensor.shape, target[key].shape)}")
            classes.update(classes_of(key, tensor.shape, target[key].shape))
        elif tensor.is_floating_point() != target[key].is_floating_point():
            wrong.append(f"{label} is of type {tensor.dtype} in the file and {target[key].dtype} in the model")
        else:
            fitted[key] = tensor.to(target[key].dtype).contiguous()
        found.add(key)
    for key, tensor in target.items():
        if key not in fitted and key.endswith("num_batches_tracked"):
            fitted[key] = torch.zeros_like(tensor, device="cpu")  # other frameworks do not store this counter
        elif key not in found:
            wrong.append(f"{key} {tuple(tensor.shape)} of the model is missing")
    if wrong:
        if names and target and not target.keys() & set(names.values()):
            have, want = (short(next(iter(keys))) for keys in (names, target))
            raise FormatError(
                f"none of its {len(names)} tensor names is in the model: its first is {have}, the model's is {want}"
            )
        raise FormatError(f"{''.join(classes)}{len(wrong)} of its tensors do not fit: {listed(wrong)}")
    return {key: fitted[key] for key in target}


def listed(wrong: list[str]) -> str:
    """Return the first 8 problems on one line."""
    return "; ".join(wrong[:8]) + (f"; and {len(wrong) - 8} more" if len(wrong) > 8 else "")


def shapes(found: Iterable[int], expected: Iterable[int]) -> str:
    """Return both shapes, for a message."""
    return f"shape {tuple(found)} in the file and {tuple(expected)} in the model"


def classes_of(key: str, found: Sequence[int], expected: Sequence[int]) -> list[str]:
    """Return a note for a message if the file's classifier has another number of classes than the model's."""
    if not key.startswith("fc.") or len(found) != len(expected) or found[1:] != expected[1:]:
        return []
    return [f"the file has {found[0]} classes and the model {expected[0]}; "]


def explain(error: Exception) -> str:
    """Summarize an error of `load_state_dict` on one line, with the file's and the model's shapes.

    Args:
        error: What `load_state_dict` raised; the text of any other error is returned on one line.
    """
    text = str(error)
    names = r"((?:\"[^\"\n]*\"(?:, )?)+)"
    wrong, classes = [], set()
    for match in re.finditer(rf"Missing key\(s\) in state_dict: {names}", text):
        wrong += [f"{short(name)} of the model is missing" for name in re.findall(r'"([^"]*)"', match[1])]
    for match in re.finditer(rf"Unexpected key\(s\) in state_dict: {names}", text):
        wrong += [f"{short(name)} is not in the model" for name in re.findall(r'"([^"]*)"', match[1])]
    size = r"torch\.Size\(\[([\d, ]*)\]\)"
    mismatch = (
        rf"size mismatch for (\S+): copying a param with shape {size} from checkpoint, the shape in .*? is {size}"
    )
    for name, *both in re.findall(mismatch, text):
        found, expected = (tuple(map(int, re.findall(r"\d+", numbers))) for numbers in both)
        wrong.append(f"{short(name)} has {shapes(found, expected)}")
        classes.update(classes_of(name, found, expected))
    return f"{''.join(classes)}{listed(wrong)}" if wrong else one_line(error, 500)


def strip_prefix(source: Tensors, format: str, target: Mapping[str, torch.Tensor]) -> Tensors:
    """Remove a prefix from tensor names if all names have it and none of the model's names does.

    `DataParallel` adds the prefix `module.`, `torch.compile` adds `_orig_mod.`, and a larger model adds the name of
    its backbone.

    Args:
        source: The original's tensors.
        format: The format whose names they have, a key of `RENAMERS`.
        target: The model's state dict; only its names are used.
    """
    rename, names = RENAMERS[format], list(source)
    while names and not any(rename(name) in target for name in names):
        prefixes = {name.partition(".")[0] for name in names}
        names = [name.partition(".")[2] for name in names]
        if len(prefixes) > 1 or not all(names):
            return source
    return dict(zip(names, source.values(), strict=True))


def check_file(path: Path) -> None:
    """Check that a file can be an original weight file, before reading it.

    Raises:
        InputError: The file is missing, unreadable, not a regular file, or too large.
    """
    with open_regular(path) as file:
        if (size := os.fstat(file.fileno()).st_size) > LARGEST:
            raise InputError(f"cannot read {path}: it has {size:,} bytes, more than the limit of {LARGEST:,}")


def convert(
    path: Path, format: str, target: Mapping[str, torch.Tensor], drop: Callable[[str], bool] = lambda name: False
) -> Tensors:
    """Read an original weight file as a model's state dict.

    Args:
        path: The file.
        format: The format of the file, a key of `READERS`.
        target: The model's state dict; only its names, shapes and dtypes are used.
        drop: Returns whether to ignore a tensor of the file, given its name.

    Returns:
        The state dict.

    Raises:
        InputError: The file cannot be read or does not fit the model.
    """
    with readable_errors(path, format):
        check_file(path)
        source = strip_prefix(READERS[format](path), format, target)
        for name in [name for name in source if drop(name)]:
            del source[name]
        return fit(source, format, target)


@contextlib.contextmanager
def readable_errors(path: Path, what: str) -> Iterator[None]:
    """Turn every error of reading and fitting a file into one line.

    Args:
        path: The file.
        what: The kind of file that it should be, for messages.

    Raises:
        InputError: Any error was raised.
    """
    try:
        yield
    except InputError:
        raise
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from error
    except MemoryError as error:
        raise InputError(f"cannot read {path}: it needs more memory than this machine has") from error
    except FormatError as error:
        raise InputError(f"{path}: {error}") from error
    except Exception as error:
        # A damaged file can make a reader raise almost anything.
        raise InputError(f"{path} is not a valid {what} file: {one_line(error)}") from error
