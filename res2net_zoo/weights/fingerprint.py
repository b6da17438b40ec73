"""A model's fingerprint: the hash of its weights, and its logits for a fixed synthetic input."""

import hashlib
import json
import math
import re
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from huggingface_hub.constants import SAFETENSORS_SINGLE_FILE as WEIGHTS
from torch import nn

from res2net_zoo.data.preprocessing import data_config
from res2net_zoo.utils.errors import InputError, one_line
from res2net_zoo.utils.files import read_json, sha256_of, write_atomically

NAME = "fingerprint.json"

PREPROCESSING = ("input_size", "crop_pct", "interpolation", "mean", "std")
LARGEST = 32 * 2**20  # bytes; a logit takes about 15

# Relative to the largest logit. Other thread counts, channels_last or double precision differ by about 4e-7; wrong
# wiring of the block, wrong statistics or wrong padding differ by 1e-3 or more, except that the logits of the wirings
# "official" and "mmdet" differ by 2e-4 only.
TOLERANCE = 1e-4


def synthetic_image(input_size: tuple[int, int, int]) -> torch.Tensor:
    """Return an image of sine waves of several frequencies, which does not depend on a random number generator.

    Args:
        input_size: (channels, height, width).

    Returns:
        A tensor (1, channels, height, width) with values in the range of a normalized image.
    """
    channels, height, width = input_size
    y, x = np.arange(height) / height, np.arange(width) / width
    image = np.zeros(input_size)
    for channel in range(channels):
        for waves in (1, 3, 7, 17, 41):
            rows, columns = np.cos(2 * math.pi * waves * y + waves), np.sin(2 * math.pi * (waves * x + channel / 3))
            image[channel] += rows[:, None] * columns[None, :]
    return torch.from_numpy(image).float().unsqueeze(0)


def logits(model: nn.Module, input_size: tuple[int, int, int]) -> list[float]:
    """Return a model's logits for the synthetic image, in float32 on the CPU.

    Args:
        model: The model, on the CPU; set to evaluation mode.
        input_size: (channels, height, width) of the image.

    Returns:
        One logit per class, rounded to seven digits.
    """
    with torch.no_grad():
        output = model.eval()(synthetic_image(input_size))
    return [float(f"{value:.7g}") for value in output[0].tolist()]


def difference(ours: list[float], theirs: list[float]) -> float:
    """Return the largest difference of two lists of logits relative to the largest logit.

    The result is infinite if the lengths differ or a logit is not finite.
    """
    if len(ours) != len(theirs) or not all(map(math.isfinite, [*ours, *theirs])):
        return math.inf
    apart = max(abs(a - b) for a, b in zip(ours, theirs, strict=True))
    largest = max(map(abs, theirs))
    return apart / largest if largest else math.inf if apart else 0.0


def load_model(folder: Path) -> nn.Module:
    """Load the model of a folder on the CPU, strictly, without changing torch's random state."""
    import timm

    with torch.random.fork_rng(devices=[]):  # timm initializes the model with random weights first
        return timm.create_model(f"local-dir:{folder}", pretrained=True)


def of(folder: Path) -> dict[str, Any]:
    """Compute the fingerprint of a model folder.

    Args:
        folder: The folder, with weights and config.

    Returns:
        The input size, the logits, the SHA-256 of the weights, and the versions of the libraries.
    """
    import timm
    from timm.data import resolve_model_data_config

    model = load_model(folder)
    size = resolve_model_data_config(model)["input_size"]
    return {
        "input_size": list(size),
        "logits": logits(model, size),
        "sha256": {WEIGHTS: sha256_of(folder / WEIGHTS)},
        "made_with": {"timm": timm.__version__, "torch": torch.__version__.partition("+")[0]},
    }


class Stored(NamedTuple):
    """Content of a fingerprint.json.

    Attributes:
        sha256: SHA-256 of the weights.
        input_size: (channels, height, width) of the synthetic image.
        logits: One logit per class.
    """

    sha256: str
    input_size: tuple[int, int, int]
    logits: list[float]


def read(folder: Path) -> Stored | None:
    """Read the fingerprint of a model folder; None if the folder has no fingerprint.

    Raises:
        InputError: The file is not a valid fingerprint.
    """
    path = folder / NAME
    if not path.exists() and not path.is_symlink():
        return None
    try:
        content = read_json(path, LARGEST)
        digest, size, values = content["sha256"][WEIGHTS], content["input_size"], content["logits"]
        # The file must not determine how much memory is allocated.
        fits = len(size) == 3 and all(type(n) is int and 0 < n <= 4096 for n in size) and math.prod(size) <= 3 * 2048**2
        numbers = isinstance(values, list) and len(values) > 0 and all(type(x) is float for x in values)
        if not (isinstance(digest, str) and re.fullmatch(r"[0-9a-f]{64}", digest) and fits and numbers):
            raise ValueError("its hash, input size or logits are invalid")
    except (InputError, OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} is not a valid fingerprint: {one_line(error, 200)}") from error
    return Stored(digest, tuple(size), values)


def write(folder: Path) -> None:
    """Compute the fingerprint of a model folder and write it to fingerprint.json."""
    content = json.dumps(of(folder)) + "\n"
    write_atomically(folder / NAME, lambda path: path.write_text(content))


def weights_sha256(model: nn.Module) -> str:
    """Return a hash of the names, types, shapes and values of a model's weights."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def model_identity(model: Any) -> dict[str, Any]:
    """Return what a model's answers depend on: hashes of weights and label names, and the preprocessing.

    Args:
        model: A timm model.

    Returns:
        Values that JSON can represent.
    """
    label_names = model.pretrained_cfg.get("label_names")
    return {
        "weights_sha256": weights_sha256(model),
        "label_names": label_names and hashlib.sha256(json.dumps(label_names).encode()).hexdigest(),
        **{
            key: list(value) if isinstance(value, tuple) else value
            for key, value in data_config(model).items()
            if key in PREPROCESSING
        },
    }
