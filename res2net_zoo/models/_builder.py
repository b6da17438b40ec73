"""Building a model as timm does, with weights that timm could not load by itself."""

import os
from collections.abc import Mapping
from typing import Any

from huggingface_hub.constants import SAFETENSORS_SINGLE_FILE as WEIGHTS
from timm.layers import DropPath
from timm.models import build_model_with_cfg, get_pretrained_cfg, resolve_pretrained_cfg
from torch import nn

from res2net_zoo import catalog
from res2net_zoo.models.block import Res2NetModule
from res2net_zoo.weights import torch_file

# The largest models have 66 blocks, 8 groups and 2,048 channels; DLA's levels are the depths of binary trees.
LARGEST = dict(layers=256, levels=6, scale=64, cardinality=1024, base_width=4096, channels=2**14, stem_width=2**12)
LARGEST |= dict(num_classes=2**20, in_chans=2**12, alpha=64, beta=64)


def check_bounds(arguments: Mapping[str, Any]) -> None:
    """Check the numbers that a model's size follows from, before it is built.

    Args:
        arguments: As for the model's class.

    Raises:
        ValueError: One is out of bounds.
    """
    for name, value in {**arguments, **(arguments.get("block_args") or {})}.items():
        if most := LARGEST.get(name):
            for number in value if isinstance(value, list | tuple) else [value]:
                if isinstance(number, int | float) and not 0 <= number <= most:
                    raise ValueError(f"{name} is {number}; it must be from 0 to {most:,}")


def build_model(model_cls: Any, variant: str, pretrained: bool, **kwargs) -> Any:
    """Do as timm's `build_model_with_cfg`; a weight that no Hub has is fetched and converted first.

    timm then loads the converted file by its usual path, so that `num_classes`, `in_chans`,
    `features_only` and the like behave as with any weight. One that timm takes from the Hub is held
    against its hash before the model is given away.

    Args:
        model_cls: The model's class.
        variant: Its registered name.
        pretrained: Whether to load weights.
        **kwargs: As for `build_model_with_cfg`.

    Raises:
        InputError: The weight cannot be fetched or is not the right one.
        ValueError: A number of layers, groups or channels beyond what the zoo builds.
    """
    hub_id, filename, known = "", WEIGHTS, ""
    check_bounds(kwargs)
    if pretrained:
        import res2net_zoo.utils.hub_client  # noqa: F401  bounds what the Hub's client waits for

        overlay = dict(kwargs.get("pretrained_cfg_overlay") or {})
        cfg = resolve_pretrained_cfg(variant, kwargs.get("pretrained_cfg"), overlay)
        name = f"{variant}.{cfg.tag}" if cfg.tag else variant
        checkpoint = catalog.load().checkpoint(name)
        # Weights from another repository, folder or cfg of the caller are left to timm.
        ours = not (cfg.source or cfg.file or cfg.state_dict or overlay.keys() & {"url", "hf_hub_id"})
        if ours and checkpoint:
            registered = get_pretrained_cfg(checkpoint.name)
            ours = registered is not None and (cfg.url, cfg.hf_hub_id) == (registered.url, registered.hf_hub_id)
        if ours and checkpoint and (not cfg.hf_hub_id or os.environ.get("RES2NET_ZOO_MIRROR")):
            from res2net_zoo.weights.originals import converted

            file = converted(checkpoint, kwargs.get("cache_dir"))
            kwargs["pretrained_cfg_overlay"] = {**overlay, "file": str(file)}
        elif cfg.hf_hub_id and (cfg.source == "hf-hub" or not (cfg.source or cfg.file or cfg.state_dict)):
            hub_id, filename = cfg.hf_hub_id, cfg.hf_hub_filename or WEIGHTS
            known = checkpoint.hub_sha256 if checkpoint and checkpoint.hub_id == hub_id else ""
    try:
        with torch_file.checking_timm():
            return build_model_with_cfg(model_cls, variant, pretrained, **kwargs)
    finally:  # also where timm stumbled over a wrong byte
        if hub_id:
            from res2net_zoo.utils.hub_client import check_cached

            check_cached(hub_id, filename, kwargs.get("cache_dir"), known)
            # timm falls back to this file where a repository lacks the other.
            check_cached(hub_id, "pytorch_model.bin", kwargs.get("cache_dir"))


def set_drop_path(model: nn.Module, rate: float) -> None:
    """Give a model stochastic depth, growing linearly from 0 in its first Res2Net block to `rate` in its last.

    For backbones that do not build their blocks one after the other, as timm's `ResNet` does.

    Args:
        model: The model; its blocks have a `drop_path`.
        rate: Probability of dropping the last block's branch.
    """
    blocks: list[Any] = [module for module in model.modules() if isinstance(module, Res2NetModule)]
    for i, block in enumerate(blocks):
        block.drop_path = DropPath(rate * i / (len(blocks) - 1)) if rate and i else None


def merge_args(model_args: dict[str, Any], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return a variant's arguments with a caller's over them.

    A caller's `block_args` add to the variant's: in their place, they would take its scale and wiring
    away, and the weights would load and compute something else.

    Args:
        model_args: What makes the variant.
        kwargs: What the caller of `timm.create_model` gave.
    """
    block_args = {**model_args.get("block_args", {}), **(kwargs.get("block_args") or {})}
    return {**model_args, **kwargs, "block_args": block_args}
