"""Model creation with timm, including weights that timm cannot load itself."""

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
    """Check the arguments that determine a model's size, before it is built.

    Args:
        arguments: Arguments of the model's class.

    Raises:
        ValueError: An argument is out of bounds.
    """
    for name, value in {**arguments, **(arguments.get("block_args") or {})}.items():
        if most := LARGEST.get(name):
            for number in value if isinstance(value, list | tuple) else [value]:
                if isinstance(number, int | float) and not 0 <= number <= most:
                    raise ValueError(f"{name} is {number}; it must be from 0 to {most:,}")


def build_model(model_cls: Any, variant: str, pretrained: bool, **kwargs) -> Any:
    """Build a model with timm's `build_model_with_cfg`, downloading and converting weights that are not on the Hub.

    timm loads the converted file like any weights, so `num_classes`, `in_chans`, `features_only` and other arguments
    work as usual. Weights from the Hub are verified by their hash before the model is returned.

    Args:
        model_cls: The model's class.
        variant: Its registered name.
        pretrained: Whether to load weights.
        **kwargs: Arguments of `build_model_with_cfg`.

    Raises:
        InputError: The weights cannot be downloaded, or their hash is wrong.
        ValueError: A number of layers, groups or channels is out of bounds.
    """
    hub_id, filename, known = "", WEIGHTS, ""
    check_bounds(kwargs)
    if not pretrained and not kwargs.get("pretrained_cfg") and variant in catalog.load().architectures:
        # The cfg of the default weights may be that of a backbone without a classifier.
        kwargs.setdefault("num_classes", catalog.load().architectures[variant].num_classes)
    if pretrained:
        import res2net_zoo.utils.hub_client  # noqa: F401  sets timeouts of the Hub's client

        overlay = dict(kwargs.get("pretrained_cfg_overlay") or {})
        cfg = resolve_pretrained_cfg(variant, kwargs.get("pretrained_cfg"), overlay)
        name = f"{variant}.{cfg.tag}" if cfg.tag else variant
        checkpoint = catalog.load().checkpoint(name)
        # timm itself loads weights from the caller's repository, folder or cfg.
        ours = not (cfg.source or cfg.file or cfg.state_dict or overlay.keys() & {"url", "hf_hub_id"})
        if ours and checkpoint:
            registered = get_pretrained_cfg(checkpoint.name)
            ours = registered is not None and (cfg.url, cfg.hf_hub_id) == (registered.url, registered.hf_hub_id)
        if ours and checkpoint and (not cfg.hf_hub_id or os.environ.get("RES2NET_ZOO_MIRROR")):
            from res2net_zoo.weights.downloads import converted

            file = converted(checkpoint, kwargs.get("cache_dir"))
            kwargs["pretrained_cfg_overlay"] = {**overlay, "file": str(file)}
        elif cfg.hf_hub_id and (cfg.source == "hf-hub" or not (cfg.source or cfg.file or cfg.state_dict)):
            hub_id, filename = cfg.hf_hub_id, cfg.hf_hub_filename or WEIGHTS
            known = checkpoint.hub_sha256 if checkpoint and checkpoint.hub_id == hub_id else ""
    try:
        with torch_file.checking_timm():
            return build_model_with_cfg(model_cls, variant, pretrained, **kwargs)
    finally:  # also if timm failed because of a corrupted file
        if hub_id:
            from res2net_zoo.utils.hub_client import check_cached

            check_cached(hub_id, filename, kwargs.get("cache_dir"), known)
            # timm falls back to this file if a repository lacks the other.
            check_cached(hub_id, "pytorch_model.bin", kwargs.get("cache_dir"))


def set_drop_path(model: nn.Module, rate: float) -> None:
    """Set the stochastic depth of a model, growing linearly from 0 in the first Res2Net block to `rate` in the last.

    For backbones that do not build their blocks in sequence, as timm's `ResNet` does.

    Args:
        model: The model; its blocks have a `drop_path`.
        rate: Probability of dropping the last block's branch.
    """
    blocks: list[Any] = [module for module in model.modules() if isinstance(module, Res2NetModule)]
    for i, block in enumerate(blocks):
        block.drop_path = DropPath(rate * i / (len(blocks) - 1)) if rate and i else None


def merge_args(model_args: dict[str, Any], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of a variant, updated with the caller's.

    The caller's `block_args` are merged with the variant's. If they replaced them, the variant's scale and wiring
    would be lost, and its weights would load but compute wrong results.

    Args:
        model_args: Arguments of the variant.
        kwargs: Arguments of the caller of `timm.create_model`.
    """
    block_args = {**model_args.get("block_args", {}), **(kwargs.get("block_args") or {})}
    return {**model_args, **kwargs, "block_args": block_args}
