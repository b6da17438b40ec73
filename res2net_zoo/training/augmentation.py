"""Augmentation of training images: timm's transforms, mixup and CutMix."""

from collections.abc import Callable, Sequence
from typing import Any

from timm.data import Mixup, create_transform
from torchvision import transforms

from res2net_zoo.data.images import Samples
from res2net_zoo.data.labels import match_classes
from res2net_zoo.data.preprocessing import color_mode, data_config
from res2net_zoo.utils.errors import InputError


def training_samples(
    model: Any,
    names: Sequence[str],
    augmentation: dict[str, Any],
    crop_padding: int,
    read: Callable[[dict[str, Any]], bytes],
) -> Samples:
    """Return a function that converts rows to training samples.

    Args:
        model: The model; its config gives size and interpolation.
        names: The classes.
        augmentation: Arguments of timm's `create_transform`.
        crop_padding: Pixels to pad by before a random crop, as usual for CIFAR (He et al., 2016, sec. 4.2); 0 for
            a random resized crop instead.
        read: Returns the encoded image of a row, see `Source.read`.

    Returns:
        The function; images are uint8, or normalized if random erasing is used.

    Raises:
        InputError: timm does not support this augmentation.
    """
    config = data_config(model)
    try:
        transform = create_transform(
            **config, **augmentation, is_training=True, normalize=augmentation.get("re_prob", 0) > 0
        )
    except (AssertionError, KeyError, ValueError) as error:
        policy = augmentation.get("auto_augment")
        if policy:
            examples = "rand-m9-mstd0.5, augmix-m3, original or 3a"
            raise InputError(f"{policy} is not a policy of timm's, such as {examples}", "auto_augment") from error
        raise InputError(f"timm does not support this augmentation: {error}") from error
    if crop_padding:
        size = config["input_size"][1:]
        transform.transforms[0:1] = [transforms.Resize(size), transforms.RandomCrop(size, padding=crop_padding)]
    classes = match_classes(names, len(names), names)
    return Samples(transform, color_mode(config), classes.targets, read)


def create_mixup(mixup: float, cutmix: float, probability: float, smoothing: float, num_classes: int) -> Mixup | None:
    """Return timm's mixup and CutMix with these alphas; None if both are 0."""
    if not mixup and not cutmix:
        return None
    return Mixup(mixup, cutmix, prob=probability, label_smoothing=smoothing, num_classes=num_classes)
