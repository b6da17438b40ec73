"""From an original's file to a timm state dict: safe readers, the renaming and the strict fit.

No file is unpickled without restriction, and what a file declares is held against its size before
memory is taken for it.
"""

import math
import os
import re
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from res2net_zoo.utils.errors import InputError, one_line
from res2net_zoo.utils.files import open_regular
from res2net_zoo.weights import torch_file
from res2net_zoo.weights.pickles import Buildable, FormatError, PlainUnpickler, ordered_dict

# The projections of trees of trees, which the authors' DLA weights have and nothing reads.
UNREAD_BY_DLA = ("level3.project.", "level4.project.", "level4.tree1.project.")
VERSION = "1"  # of the conversion; another one may give other bytes

LARGEST = 4 * 2**30  # bytes of an original; the catalogue's largest has 0.4 GB
ENTRIES = 100_000  # of a MindSpore checkpoint

Tensors = dict[str, torch.Tensor]


def short(name: object) -> str:
    """Return a name from a file in bearable length."""
    return text if len(text := str(name)) <= 80 else f"{text[:77]}..."


# ---------------------------------------------------------------------------- PyTorch and mmengine


def read_torch(path: Path) -> Tensors:
    """Read a PyTorch file, in either of torch's formats: a state dict, or one under `state_dict`.

    Args:
        path: The file.

    Returns:
        Its tensors, on the CPU.

    Raises:
        FormatError: It is cut short, packed, holds something else, or would run code.
        InputError: It cannot be read.
    """
    state = torch_file.load(path)
    if isinstance(state, dict):
        state = state.get("state_dict", state)
    if not isinstance(state, dict):
        raise FormatError("it does not hold a state dict")
    if other := [name for name, tensor in state.items() if not isinstance(tensor, torch.Tensor)]:
        raise FormatError(f"its entry {short(other[0])} is not a tensor")
    return {str(name): tensor for name, tensor in state.items()}


# ------------------------------------------------------------------------------------ PaddlePaddle


class _Dtype(Buildable):
    """Stands for a NumPy type while a pickle is read: only numbers."""

    def __init__(self, name: Any, *flags: Any) -> None:
        if not isinstance(name, str) or not re.fullmatch(r"[fiu][1248]", name):
            raise FormatError(f"it has an array of type {str(name)[:20]}; weights are numbers")
        self.name, self.order = name, "="

    def build(self, state: Any) -> None:
        """Take the byte order."""
        self.order = state[1] if state[1] in ("<", ">", "=", "|") else "="

    @property
    def dtype(self) -> np.dtype:
        return np.dtype(self.order.replace("|", "=") + self.name)


class _Array(Buildable):
    """Stands for a NumPy array, which is made only of bytes that are there."""

    def __init__(self, *args: Any) -> None:
        self.array: np.ndarray | None = None

    def build(self, state: Any) -> None:
        """Make the array of its shape, type, order and bytes."""
        _, shape, kind, is_fortran, raw = state
        raw = raw.encode("latin1") if isinstance(raw, str) else raw
        if not isinstance(kind, _Dtype) or not isinstance(raw, bytes) or not isinstance(shape, tuple):
            raise FormatError("it has an array that is not one of numbers")
        if not all(type(n) is int and 0 <= n < 2**63 for n in shape) or len(shape) > 8:
            raise FormatError("it has an array whose shape is not valid")
        if math.prod(shape) * kind.dtype.itemsize != len(raw):
            raise FormatError(f"it has an array of shape {shape} with {len(raw):,} bytes")
        self.array = np.frombuffer(raw, kind.dtype).reshape(shape, order="F" if is_fortran else "C")


class _ArrayType:
    """Stands for NumPy's type of arrays, an argument of `_reconstruct`."""

    def __init__(self, *args: Any) -> None:
        raise FormatError("it has an array without its numbers")


def _encode(text: Any, encoding: Any) -> bytes:
    """Return bytes, which protocol 2 writes as text."""
    if not isinstance(text, str) or encoding != "latin1":
        raise FormatError("its pickle encodes something else than bytes")
    return text.encode("latin1")


# Stand-ins for what the pickle of a NumPy array names; none of NumPy's own functions is called.
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
        Its tensors, under their structured names.

    Raises:
        FormatError: It is cut short, holds something else, or would run code.
        InputError: It cannot be read.
    """
    with open_regular(path) as file:
        content = PlainUnpickler(file, os.fstat(file.fileno()).st_size, ARRAYS).load()
    if not isinstance(content, dict):
        raise FormatError("it does not hold a state dict")
    content.pop("StructuredToParameterName@@", None)  # of Paddle's own names, which nothing here asks for
    joined = content.pop("UnpackBigParamInfor@@", {})  # what protocol 2 cannot write whole
    arrays: dict[str, np.ndarray] = {}
    while content:
        name, value = content.popitem()
        if not isinstance(value, _Array) or value.array is None:
            raise FormatError(f"its entry {short(name)} is not an array of numbers, or appears twice")
        arrays[str(name)], value.array = value.array, None  # so that one array under two names is noticed
    _join(arrays, joined)
    return {name: torch.from_numpy(_native(arrays.pop(name))) for name in list(arrays)}


def _native(array: np.ndarray) -> np.ndarray:
    """Return an array as torch takes it: contiguous, writable and in this machine's byte order."""
    return np.require(array, array.dtype.newbyteorder("="), ["C", "W"])


def _join(arrays: dict[str, np.ndarray], joined: Any) -> None:
    """Join the slices of large arrays, each of which is used once."""
    if not isinstance(joined, dict):
        raise FormatError("its list of large arrays is not valid")
    for name, part in joined.items():
        slices, shape = (part.get("slices"), part.get("OriginShape")) if isinstance(part, dict) else (None, None)
        if not isinstance(slices, list | tuple) or not slices or not isinstance(shape, list | tuple):
            raise FormatError(f"its large array {short(name)} has no list of slices or no shape")
        if missing := [key for key in slices if not isinstance(key, str) or key not in arrays]:
            raise FormatError(f"the slice {short(missing[0])} of its large array {short(name)} is missing")
        if len(set(slices)) < len(slices) or (name in arrays and name not in slices):
            raise FormatError(f"its large array {short(name)} is made of the same slice twice")
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
        while place < len(data):
            byte, place = data[place], place + 1
            size, shift = size | (byte & 0x7F) << shift, shift + 7
            if byte < 0x80 or shift > 63:
                break
        place += size
        if entries > ENTRIES:
            raise FormatError(f"it has more than {ENTRIES:,} entries, more than any state dict has")
    if place > len(data):
        raise FormatError("it is cut short")


def read_mindspore(path: Path) -> Tensors:
    """Read a MindSpore checkpoint, a protobuf message.

    Args:
        path: The `.ckpt` file.

    Returns:
        Its tensors.

    Raises:
        FormatError: It is cut short or holds something else.
        InputError: It cannot be read.
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
        if not isinstance(value.tag, str):  # protobuf returns bytes that are not UTF-8 as they are
            raise FormatError("it has a name that is not UTF-8")
        if value.tag in parts and value.tag != last:
            raise FormatError(f"its entry {short(value.tag)} appears twice")
        parts.setdefault(value.tag, []).append(value.tensor)  # a large tensor is cut into several
        last = value.tag
    return {name: _from_pieces(short(name), pieces) for name, pieces in parts.items()}


def _from_pieces(name: str, pieces: list[Any]) -> torch.Tensor:
    """Return a tensor from the pieces that MindSpore cuts it into."""
    first = pieces[0]
    if first.tensor_type not in MINDSPORE_DTYPES:
        raise FormatError(f"its entry {name} is of the unsupported type {short(first.tensor_type)}")
    if len(first.dims) > 8 or any(size < 0 for size in first.dims):
        raise FormatError(f"its entry {name} has {len(first.dims):,} dimensions or a negative one; the limit is 8")
    # MindSpore writes a single 0 for a number that is not an array.
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
    if len(modules) < 5 or modules[0] != "features" or not re.fullmatch(r"\d{1,3}", modules[1]):
        return name
    block = f"layer{int(modules[1]) - 3}.{modules[2]}"
    if modules[3:6] == ["conv", "3", "conv"] and len(modules) == 8:
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
    found: set[str] = set()
    wrong: list[str] = []
    classes: set[str] = set()
    for name, key in names.items():
        tensor = source.pop(name)
        if key.partition(".downsample.")[0] in unpooled:
            key = re.sub(r"(?<=\.downsample\.)\d", lambda match: str(int(match[0]) + 1), key)
        if format == "paddle" and key == "fc.weight" and tensor.ndim == 2:
            tensor = tensor.T  # Paddle stores a linear layer transposed
        label = short(name) if name == key else f"{short(name)} (in the model {short(key)})"
        if key not in target:
            wrong.append(f"{short(name)} {tuple(tensor.shape)} is not in the model")
        elif key in found:
            wrong.append(f"{label} is there twice")
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
            fitted[key] = torch.zeros_like(tensor, device="cpu")  # which other frameworks do not count
        elif key not in found:
            wrong.append(f"{key} {tuple(tensor.shape)} of the model is missing")
    if wrong:
        if names and target and not target.keys() & set(names.values()):
            have, want = (short(next(iter(keys))) for keys in (names, target))
            raise FormatError(
                f"none of its {len(names)} tensors has a name of the model's: its first is {have}, the model's {want}"
            )
        raise FormatError(f"{''.join(classes)}{len(wrong)} of its tensors do not fit: {listed(wrong)}")
    return {key: fitted[key] for key in target}


def listed(wrong: list[str]) -> str:
    """Return what is wrong on one line, of many things the first 8."""
    return "; ".join(wrong[:8]) + (f"; and {len(wrong) - 8} more" if len(wrong) > 8 else "")


def shapes(found: Iterable[int], expected: Iterable[int]) -> str:
    """Return whose shape is which, for a message."""
    return f"shape {tuple(found)} in the file and {tuple(expected)} in the model"


def classes_of(key: str, found: Sequence[int], expected: Sequence[int]) -> list[str]:
    """Return a sentence about the numbers of classes, where the classifier of a file has another number of them."""
    if not key.startswith("fc.") or len(found) != len(expected) or found[1:] != expected[1:]:
        return []
    return [f"the file has {found[0]} classes and the model {expected[0]}; "]


def explain(error: Exception) -> str:
    """Return what torch found wrong with a state dict, on one line that names the file's and the model's shapes.

    Args:
        error: What `load_state_dict` raised; any other error's text is returned as it is, on one line.
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
    """Return a source's tensors without a prefix that all of their names share and no name of the model has.

    `DataParallel` puts `module.` before every name, `torch.compile` puts `_orig_mod.`, and a larger model the
    name that it has for its backbone.

    Args:
        source: The original's tensors.
        format: Whose names they have.
        target: The model's state dict; only its names are read.
    """
    rename, names = RENAMERS[format], list(source)
    while names and not any(rename(name) in target for name in names):
        prefixes = {name.partition(".")[0] for name in names}
        names = [name.partition(".")[2] for name in names]
        if len(prefixes) > 1 or not all(names):
            return source
    return dict(zip(names, source.values(), strict=True))


def check_file(path: Path) -> None:
    """Refuse what cannot be an original before any of it is read.

    Raises:
        InputError: It is missing, unreadable, not a regular file, or too large.
    """
    with open_regular(path) as file:
        if (size := os.fstat(file.fileno()).st_size) > LARGEST:
            raise InputError(f"cannot read {path}: it has {size:,} bytes, more than the limit of {LARGEST:,}")


def convert(
    path: Path, format: str, target: Mapping[str, torch.Tensor], drop: Callable[[str], bool] = lambda name: False
) -> Tensors:
    """Read an original's file as a model's state dict.

    Args:
        path: The file.
        format: What kind of file it is, a key of `READERS`.
        target: The model's state dict; only its names, shapes and types are read.
        drop: Whether a source's tensor, by its name, is one that the model is known not to have.

    Returns:
        The state dict.

    Raises:
        InputError: The file cannot be read or does not fit the model.
    """
    try:
        check_file(path)
        source = strip_prefix(READERS[format](path), format, target)
        for name in [name for name in source if drop(name)]:
            del source[name]
        return fit(source, format, target)
    except InputError:
        raise
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from error
    except MemoryError as error:
        raise InputError(f"cannot read {path}: it needs more memory than this machine has") from error
    except FormatError as error:
        raise InputError(f"{path}: {error}") from error
    except Exception as error:
        # Whatever a broken file makes a reader stumble over; there is no one type for it.
        raise InputError(f"{path} is not a valid {format} file: {one_line(error)}") from error
