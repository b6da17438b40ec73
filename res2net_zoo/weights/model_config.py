"""Validation of a model folder's config.json, before loading, verifying or publishing builds its model.

A folder may come from an untrusted source. Its config determines the architecture, its arguments and the
preprocessing, so every value is checked first. The shapes in the weights' header are then compared with those of the
model on the meta device, which allocates no memory, before the model itself is built.
"""

import contextlib
import math
import re
import threading
from collections.abc import Iterator, Mapping
from dataclasses import fields
from inspect import signature
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
from huggingface_hub.constants import SAFETENSORS_SINGLE_FILE as WEIGHTS
from safetensors import SafetensorError, safe_open
from timm.data import create_transform, resolve_data_config
from timm.data.transforms import str_to_interp_mode
from timm.models import PretrainedCfg, build_model_with_cfg
from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook

from res2net_zoo.utils.console import nearest, printable
from res2net_zoo.utils.errors import InputError
from res2net_zoo.utils.files import open_regular, read_json
from res2net_zoo.utils.private_apis import load_model_config_from_path

NAME = "config.json"

# Limits for the values in a config; timm's and the zoo's models stay far below them.
LARGEST_SIDE = 4096  # pixels of an image
LARGEST_RESIZED_SIDE = 8192  # pixels before the crop
MOST_CHANNELS = 1024  # of an image
MOST_CLASSES = 2**18
LARGEST_ARGUMENT = 2**16
LARGEST_WINDOW = 64  # of attention; some timm models loop over all pairs of positions in a window
MOST_ARGUMENTS = 1000  # values in model_args, including nested ones
MOST_MODULES = 10_000  # timm's largest model has 2,540
MOST_UNSAVED_VALUES = 2**28  # in buffers that are not saved with the weights, such as attention masks

# Keys that make timm load weights from elsewhere, or only a part of them.
NOT_IN_FOLDERS = ("file", "state_dict", "hf_hub_filename")
NOT_ARGUMENTS = {
    *signature(timm.create_model).parameters,
    *signature(build_model_with_cfg).parameters,
    *("features_only", "out_indices", "feature_cls", "pruned", "block", "device", "dtype", "kwargs"),
}

DTYPES = {
    **dict.fromkeys(("F64", "F32", "F16", "BF16"), "floating-point"),
    **{f"{sign}{bits}": "integer" for sign in "IU" for bits in (8, 16, 32, 64)},
    "BOOL": "boolean",
}


Header = Mapping[str, tuple[str, tuple[int, ...]]]  # of a safetensors file: kind of dtype and shape of each tensor


class ModelConfig(NamedTuple):
    """Content of a config.json, as timm reads it.

    Attributes:
        architecture: Registered name of the architecture.
        pretrained_cfg: timm's `pretrained_cfg`, without the keys `file` and `source`.
        model_args: Arguments of the architecture's constructor.
        path: The file.
    """

    architecture: str
    pretrained_cfg: dict[str, Any]
    model_args: dict[str, Any]
    path: Path


class Invalid(ValueError):
    """An invalid value in a config; the message names the key."""


def check_folder(folder: Path) -> ModelConfig:
    """Check a model folder's config and compare its weights with it, before the model is built.

    Args:
        folder: The folder.

    Returns:
        Its config.

    Raises:
        InputError: The folder cannot be loaded; the message names the file and the value.
    """
    config = read(folder / NAME)
    check_weights(config, find_weights(folder))
    return config


def read(path: Path) -> ModelConfig:
    """Read and check a config.json.

    Args:
        path: The file.

    Raises:
        InputError: The file cannot be read, or timm cannot use it.
    """
    content = read_json(path)
    try:
        check_structure(content)
        cfg, architecture, arguments = load_model_config_from_path(path.parent)
        for key in ("file", "source"):
            del cfg[key]  # added by timm while reading
        check_pretrained_cfg(cfg)
        if cfg.get("architecture") not in (None, architecture):
            raise Invalid(f"pretrained_cfg.architecture is {cfg['architecture']}, the config's is {architecture}")
    except Invalid as error:
        raise InputError(f"{path}: {error}; correct it, or download the folder again") from error
    except (AssertionError, AttributeError, KeyError, TypeError, ValueError) as error:
        # Raised inside timm for values of an unexpected type.
        raise InputError(f"{path} cannot be loaded: {printable(repr(error))[:300]}") from error
    return ModelConfig(architecture, cfg, arguments, path)


def check_structure(content: Any) -> None:
    """Check the parts of a config that timm needs in order to read it.

    Raises:
        Invalid: A value is missing or invalid.
    """
    if not isinstance(content, dict):
        raise Invalid(f"it must be a JSON object, not {kind_of(content)}")
    check_finite(content)
    architecture = content.get("architecture")
    if not isinstance(architecture, str):
        raise Invalid(f"architecture must be a name, not {shown(architecture)}" if architecture else "no architecture")
    if not timm.is_model(architecture):
        raise Invalid(f"unknown architecture {shown(architecture)}; {nearest(architecture[:100], timm.list_models())}")
    cfg = content.get("pretrained_cfg", content)
    for key, value in (("pretrained_cfg", cfg), ("model_args", content.get("model_args", {}))):
        if not isinstance(value, dict):
            raise Invalid(f"{key} must be an object, not {kind_of(value)}")
    for key in NOT_IN_FOLDERS:
        if cfg.get(key):
            raise Invalid(f"{key} is {shown(cfg[key])}; remove it: a model folder has its own weights")
    check_arguments(content.get("model_args", {}), "model_args")
    for key in ("num_classes", "num_features"):
        whole_number(content, key, 0, MOST_CLASSES)


def check_arguments(arguments: Mapping[str, Any], what: str) -> None:
    """Check constructor arguments of any network.

    Raises:
        Invalid: An argument is not allowed in a file, or exceeds a limit.
    """
    count, left = 0, [(f"{what}.{key}", value, 0) for key, value in arguments.items()]
    for key in arguments.keys() & NOT_ARGUMENTS:
        raise Invalid(f"{what} must not have {key}")
    while left:
        key, value, depth = left.pop()
        count += 1
        if count > MOST_ARGUMENTS or depth > 5:
            raise Invalid(f"{what} has more than {MOST_ARGUMENTS:,} values, or is nested more than 5 deep")
        if isinstance(value, dict):
            left += [(f"{key}.{inner}", item, depth + 1) for inner, item in value.items()]
        elif isinstance(value, list):
            left += [(key, item, depth + 1) for item in value]
        elif isinstance(value, str):
            text(value, key)
        elif isinstance(value, int | float) and abs(value) > (most := argument_limit(key)):
            raise Invalid(f"{key} is {shown(value)}, larger than the limit of {most:,}")


def argument_limit(key: str) -> int:
    """Return the largest allowed value of an argument, by its name."""
    if "window" in key.rpartition(".")[2]:
        return LARGEST_WINDOW
    if "size" in key.rpartition(".")[2]:
        return LARGEST_RESIZED_SIDE
    return MOST_CLASSES if key.endswith(".num_classes") else LARGEST_ARGUMENT


def check_pretrained_cfg(cfg: dict[str, Any]) -> None:
    """Check every value of timm's `pretrained_cfg`.

    Raises:
        Invalid: A value would make loading fail or the model's output meaningless.
    """
    if unknown := cfg.keys() - {field.name for field in fields(PretrainedCfg)}:
        raise Invalid(f"timm {timm.__version__} does not support {shown(min(unknown))}")
    for key in ("url", "hf_hub_id", "source", "architecture", "tag", "license", "origin_url", "paper_name"):
        if cfg.get(key) is not None:
            for part in cfg[key] if key == "url" and isinstance(cfg[key], list) else [cfg[key]]:
                text(part, key)
    for key in ("custom_load", "fixed_input_size"):
        if not isinstance(cfg.get(key, False), bool):
            raise Invalid(f"{key} is {shown(cfg[key])}; it must be true or false")
    whole_number(cfg, "num_classes", 0, MOST_CLASSES)
    whole_number(cfg, "label_offset", 0, 1)
    for key in ("first_conv", "classifier"):
        for name in layer_names(cfg, key):
            text(name, key)
    check_preprocessing(cfg)
    check_labels(cfg)


def layer_names(cfg: Mapping[str, Any], key: str) -> list[Any]:
    """Return the names under a key of a config, which may have one, several or none."""
    value = cfg.get(key)
    return [name for name in (value if isinstance(value, list | tuple) else [value]) if name is not None]


def check_preprocessing(cfg: Mapping[str, Any]) -> None:
    """Check the preprocessing of a config, and that timm supports it.

    Raises:
        Invalid: A value is invalid or not supported.
    """
    for key in ("input_size", "test_input_size", "min_input_size"):
        if cfg.get(key) is not None or (key == "input_size" and key in cfg):
            whole_numbers(cfg[key], key, 3, LARGEST_SIDE)
            if cfg[key][0] > MOST_CHANNELS:
                raise Invalid(f"{key} has {cfg[key][0]:,} channels, more than the limit of {MOST_CHANNELS:,}")
    for key in ("pool_size", "test_pool_size"):
        if cfg.get(key) is not None:
            whole_numbers(cfg[key], key, 2, LARGEST_SIDE)
    for key in ("crop_pct", "test_crop_pct"):
        if cfg.get(key) is not None and not (number(cfg[key]) and 0 < cfg[key] <= 2):
            raise Invalid(f"{key} is {shown(cfg[key])}; it must be a number above 0, at most 2")
    if (mode := cfg.get("crop_mode")) not in (None, "center", "squash", "border"):
        raise Invalid(f"unknown crop_mode {shown(mode)}; choose from center, squash and border")
    try:
        str_to_interp_mode(cfg.get("interpolation") or "bicubic")
    except (KeyError, TypeError) as error:
        raise Invalid(f"unknown interpolation {shown(cfg['interpolation'])}; bicubic and bilinear are usual") from error
    for key, least in (("mean", -1e6), ("std", 1e-6)):
        if cfg.get(key) is not None:
            numbers(cfg[key], key, least)
    resolved = resolve_data_config(pretrained_cfg={"input_size": (3, 224, 224), **cfg})
    channels, *size = resolved["input_size"]
    for key in ("mean", "std"):
        if len(resolved[key]) != channels:
            raise Invalid(f"{key} has {len(resolved[key])} values for {channels} channels of input_size")
    if max(size) / resolved["crop_pct"] > LARGEST_RESIZED_SIDE:
        raise Invalid(
            f"crop_pct {resolved['crop_pct']} resizes images to more than the limit of {LARGEST_RESIZED_SIDE:,} pixels"
        )
    create_transform(**resolved)


def check_labels(cfg: Mapping[str, Any]) -> None:
    """Check the class names of a config.

    Raises:
        Invalid: There is not exactly one name for each class.
    """
    names = cfg.get("label_names") or []
    if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
        raise Invalid("label_names must be a list of names")
    classes = cfg.get("num_classes", 1000)
    if names and not len(names) == len(set(names)) == classes:
        raise Invalid(f"label_names must be one name for each of its {classes} classes, all different")


def find_weights(folder: Path) -> Path:
    """Return the weights file that timm loads from a folder.

    Raises:
        InputError: The file is missing or not a regular file.
    """
    names = (WEIGHTS, "pytorch_model.bin", "pytorch_model.pth", "model.pth")  # timm's order
    others = [
        path.name for suffix in (".safetensors", ".pth", ".pth.tar", ".bin") for path in folder.glob(f"*{suffix}")
    ]
    for name in [*names, *sorted(others)]:
        if (folder / name).exists() or (folder / name).is_symlink():
            with open_regular(folder / name):
                return folder / name
    raise InputError(f"{folder} has no {WEIGHTS}, so it is not a model folder")


def check_weights(config: ModelConfig, weights: Path) -> None:
    """Compare the header of a weights file with the model that a config describes, on the meta device.

    Args:
        config: The config.
        weights: The file; if it is not safetensors, only its size is compared.

    Raises:
        InputError: The weights do not belong to the model.
    """
    model = build_on_meta(config)
    state = model.state_dict()
    needed = sum(tensor.numel() for tensor in state.values())
    unsaved = sum(buffer.numel() for buffer in model.buffers()) + sum(p.numel() for p in model.parameters()) - needed
    header: Header = {}
    if weights.suffix == ".safetensors":
        header = read_header(weights)
        values = sum(math.prod(shape) for _, shape in header.values())
    else:
        values = weights.stat().st_size
    if needed > 1.1 * values + 2**20 or unsaved > MOST_UNSAVED_VALUES:
        raise InputError(
            f"{config.path} describes a model of {needed:,} values, {weights.name} has {values:,}"
            f"{'' if header else ' bytes'}: they do not belong together"
        )
    if header and (not is_renamed_by_timm(config.architecture) or same_names(header, state)):
        compare(header, state, config.path)
    check_names(config, model)


def same_names(header: Header, state: Mapping[str, torch.Tensor]) -> bool:
    """Return whether a safetensors header has the names of a state dict; BatchNorm's counters may be missing."""
    return header.keys() <= state.keys() and all(
        k.endswith("num_batches_tracked") for k in state.keys() - header.keys()
    )


def compare(header: Header, state: Mapping[str, torch.Tensor], path: Path) -> None:
    """Compare a safetensors header with a model's state dict.

    Args:
        header: Kind of dtype and shape of each tensor of the file.
        state: The model's state dict.
        path: The model's config.json, for messages.

    Raises:
        InputError: A tensor is missing or unexpected, or has another shape or kind of dtype.
    """
    where = f"the weights are not those of {path}"
    if not same_names(header, state):
        missing, unexpected = sorted(state.keys() - header.keys()), sorted(header.keys() - state.keys())
        prefixes = {key[: -len(end)] for key in unexpected for end in missing[:1] if key.endswith(f".{end}")}
        hint = f"; their names begin with {shown(min(prefixes))}" if prefixes else ""
        kinds = (("missing", missing), ("unexpected", unexpected))
        parts = [f"{len(keys)} {what} ({shown(keys[0])})" for what, keys in kinds if keys]
        raise InputError(f"{where}: {' and '.join(parts)} tensors{hint}")
    for key, (kind, shape) in header.items():
        tensor = state[key]
        if shape != tuple(tensor.shape):
            raise InputError(f"{where}: {shown(key)} has the shape {shape}, its model's has {tuple(tensor.shape)}")
        # BatchNorm's counter may have any numeric dtype.
        if kind not in (("floating-point",) if tensor.is_floating_point() else ("floating-point", "integer")):
            raise InputError(f"{where}: {shown(key)} has {kind} numbers, its model's are of {tensor.dtype}")


def is_renamed_by_timm(architecture: str) -> bool:
    """Return whether timm may rename or drop tensors of an architecture while loading, so names may differ."""
    module = timm.model_entrypoint(architecture).__module__
    return not module.startswith("res2net_zoo.") or module.endswith(".dla")


def read_header(weights: Path) -> Header:
    """Return kind of dtype and shape of each tensor of a safetensors file.

    Raises:
        InputError: The file is not a regular file, or not a complete safetensors file.
    """
    with open_regular(weights):
        pass
    try:
        with safe_open(weights, "pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118  not a mapping
            return {n: (DTYPES.get(s.get_dtype(), s.get_dtype()), tuple(s.get_shape())) for n, s in slices.items()}
    except (SafetensorError, OSError) as error:
        raise InputError(f"{weights} is not a complete safetensors file ({error}); replace it") from error


def check_names(config: ModelConfig, model: nn.Module) -> None:
    """Check that the first convolution and the classifier in a config are layers of the model.

    Raises:
        InputError: The layer is missing, or has another shape.
    """
    modules, cfg = dict(model.named_modules()), config.pretrained_cfg
    for key in ("first_conv", "classifier"):
        for name in filter(None, layer_names(cfg, key)):
            layer = modules.get(name)
            if layer is None:
                raise InputError(f"{config.path}: {key} is {shown(name)}, which {config.architecture} does not have")
            weight, classes = getattr(layer, "weight", None), cfg.get("num_classes", 1000)
            if key == "classifier" and isinstance(weight, torch.Tensor) and classes and weight.shape[0] != classes:
                raise InputError(f"{config.path}: classifier is {shown(name)}, a layer of {weight.shape[0]} outputs")


def build_on_meta(config: ModelConfig) -> nn.Module:
    """Build the model of a config on the meta device, without allocating memory.

    Raises:
        InputError: The arguments are invalid, or the model has too many modules.
    """
    arguments = dict(config.model_args)
    try:
        with torch.device("meta"), at_most(MOST_MODULES):
            return timm.create_model(config.architecture, pretrained_cfg=dict(config.pretrained_cfg), **arguments)
    except Exception as error:  # a constructor may raise anything for unexpected arguments
        reason = str(error) if isinstance(error, Invalid) else printable(error)[:300] or type(error).__name__
        raise InputError(f"{config.path} does not describe a valid model: {reason}") from error


@contextlib.contextmanager
def at_most(modules: int) -> Iterator[None]:
    """Limit the number of modules that this thread can create in the context.

    Raises:
        Invalid: The limit is exceeded.
    """
    thread, count = threading.get_ident(), 0

    def count_up(module: nn.Module, name: str, submodule: nn.Module | None) -> None:
        nonlocal count
        if threading.get_ident() == thread:
            count += 1
            if count > modules:
                raise Invalid(f"its arguments build more modules than the limit of {modules:,}")

    hook = register_module_module_registration_hook(count_up)
    try:
        yield
    finally:
        hook.remove()


# ------------------------------------------------------------------------------------ models of tasks


def read_task(path: Path) -> dict[str, Any]:
    """Read and check the config.json of a model of `res2net_zoo.tasks`.

    Args:
        path: The file.

    Returns:
        Its content: `task` and the settings of the model.

    Raises:
        InputError: The file cannot be read, or a value is missing or invalid.
    """
    content = read_json(path)
    try:
        if not isinstance(content, dict) or not isinstance(content.get("task"), str):
            raise Invalid("the key task is missing")
        check_finite(content)
        for key in ("task", "model", "head"):
            text(content.get(key), key)
        if not timm.is_model(content["model"]) or ":" in content["model"]:
            raise Invalid(f"unknown architecture {shown(content['model'])}")
        classes = content.get("classes")
        if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
            raise Invalid("classes must be a list of names")
        if not 0 < len(set(classes)) == len(classes) <= MOST_CLASSES:
            raise Invalid(f"classes must be from 1 to {MOST_CLASSES:,} names, all different")
        whole_number(content, "img_size", 1, LARGEST_SIDE)
        whole_number(content, "output_stride", 1, 64)
        for key, least in (("mean", -1e6), ("std", 1e-6)):
            if content.get(key) is not None:
                numbers(content[key], key, least)
                if len(content[key]) != 3:
                    raise Invalid(f"{key} has {len(content[key])} values for 3 channels")
        if not isinstance(options := content.get("head_kwargs") or {}, dict):
            raise Invalid(f"head_kwargs must be an object, not {kind_of(options)}")
        check_arguments(options, "head_kwargs")
    except Invalid as error:
        raise InputError(f"{path}: {error}; correct it, or download the folder again") from error
    return content


# ------------------------------------------------------------------------------------ values


def shown(value: Any) -> str:
    """Return a value for a message: short, on one line, without control characters."""
    words = printable(value if isinstance(value, str) else repr(value) if not is_huge(value) else "a huge number")
    return repr(words[:80]) if isinstance(value, str) else words[:80]


def is_huge(value: Any) -> bool:
    """Return whether a value is an integer too long for a message, or too long for Python to print."""
    return isinstance(value, int) and abs(value) > 10**18


def kind_of(value: Any) -> str:
    """Return the JSON type of a value, for a message."""
    kinds = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
    return kinds.get(type(value), "a number")


def number(value: Any) -> bool:
    """Return whether a value is a finite number, and not a boolean."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= 1e18


def check_finite(content: Any) -> None:
    """Check that no value is NaN or infinite, which Python's JSON reader accepts but the standard does not.

    Raises:
        Invalid: A value is NaN or infinite.
    """
    left = [("", content)]
    while left:
        key, value = left.pop()
        if isinstance(value, dict):
            left += list(value.items())
        elif isinstance(value, list):
            left += [(key, item) for item in value]
        elif isinstance(value, float) and not math.isfinite(value):
            raise Invalid(f"{printable(key)[:80]} is NaN or infinite")


def whole_number(content: Mapping[str, Any], key: str, least: int, most: int) -> None:
    """Check an optional integer.

    Raises:
        Invalid: The value is not an integer, or out of bounds.
    """
    value = content.get(key)
    if value is not None and not (type(value) is int and least <= value <= most):
        raise Invalid(f"{key} is {shown(value)}; it must be an integer from {least} to {most:,}")


def whole_numbers(value: Any, key: str, length: int, most: int) -> None:
    """Check a list of positive integers.

    Raises:
        Invalid: The value is not such a list, or a number is out of bounds.
    """
    fits = isinstance(value, list | tuple) and len(value) == length
    if not fits or not all(type(n) is int and 0 < n <= most for n in value):
        raise Invalid(f"{key} is {shown(value)}; it must be {length} integers from 1 to {most:,}")


def numbers(value: Any, key: str, least: float) -> None:
    """Check a list of numbers, one per channel.

    Raises:
        Invalid: The value is not such a list, or a number is out of bounds.
    """
    fits = isinstance(value, list | tuple) and 0 < len(value) <= MOST_CHANNELS
    if not fits or not all(number(n) and least <= n <= 1e6 for n in value):
        raise Invalid(f"{key} is {shown(value)}; it must be a list of numbers from {least:g} to 1e6, one per channel")


def text(value: Any, key: str) -> None:
    """Check a short string, such as a name or a URL.

    Raises:
        Invalid: The value is not a string, too long, or has control characters.
    """
    if not isinstance(value, str) or len(value) > 1000 or re.search(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]", value):
        raise Invalid(f"{key} is {shown(value)}; it must be one line of text with at most 1,000 characters")
