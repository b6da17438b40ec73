"""A model's preprocessing, with timm: its config, its evaluation transform, and its normalization on the device."""

from collections.abc import Callable
from typing import Any

import torch
from timm.data import create_transform, resolve_model_data_config
from torch import nn

from res2net_zoo.data.images import Samples, read_named


def data_config(model: Any, img_size: int | None = None) -> dict[str, Any]:
    """Return a model's preprocessing, as arguments of timm's `create_transform`.

    Args:
        model: A timm model.
        img_size: Height and width in pixels, or None for those of the model's config.
    """
    config = resolve_model_data_config(model)
    channels, *size = config["input_size"]
    return {**config, "input_size": (channels, *(size if img_size is None else (img_size, img_size)))}


def color_mode(config: dict[str, Any]) -> str:
    """Return the PIL mode of a model's images: grey for one channel, else RGB."""
    return "L" if config["input_size"][0] == 1 else "RGB"


def evaluation_samples(
    model: Any,
    target: Callable[[int | None, str | None], Any] = lambda label, path: None,
    read: Callable[[dict[str, Any]], bytes] = read_named,
    img_size: int | None = None,
    normalize: bool = True,
) -> Samples:
    """Return a callable that decodes images and applies a model's evaluation transform.

    Args:
        model: A timm model.
        target: As for `Samples`.
        read: As for `Samples`.
        img_size: As for `data_config`.
        normalize: Whether to normalize; otherwise images are uint8, for `Normalize` on the device.

    Returns:
        The callable.
    """
    config = data_config(model, img_size)
    transform = create_transform(**config, is_training=False, normalize=normalize)
    return Samples(transform, color_mode(config), target, read)


class Normalize(nn.Module):
    """Normalizes images (N, C, H, W) of bytes on the model's device; leaves normalized ones as they are."""

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        config = resolve_model_data_config(model)
        for key in ("mean", "std"):
            self.register_buffer(key, 255 * torch.tensor(config[key]).view(-1, 1, 1))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Return images (N, C, H, W), normalized."""
        return images.float().sub_(self.mean).div_(self.std) if images.dtype == torch.uint8 else images
