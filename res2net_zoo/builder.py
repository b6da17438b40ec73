"""Building a model as timm does, with weights that timm could not load by itself."""

import os
from typing import Any

from timm.models import build_model_with_cfg
from timm.models._builder import resolve_pretrained_cfg


def build_model(model_cls: Any, variant: str, pretrained: bool, **kwargs) -> Any:
    """Do as timm's `build_model_with_cfg`; a weight that no Hub has is fetched and converted first.

    timm then loads the converted file by its usual path, so that `num_classes`, `in_chans`,
    `features_only` and the like behave as with any weight.

    Args:
        model_cls: The model's class.
        variant: Its registered name.
        pretrained: Whether to load weights.
        **kwargs: As for `build_model_with_cfg`.

    Raises:
        InputError: The weight cannot be fetched or is not the right one.
    """
    if pretrained:
        overlay = dict(kwargs.get("pretrained_cfg_overlay") or {})
        cfg = resolve_pretrained_cfg(variant, kwargs.get("pretrained_cfg"), overlay)
        given = cfg.file or cfg.state_dict or overlay.get("url") or overlay.get("hf_hub_id")
        if not given and (not cfg.hf_hub_id or os.environ.get("RES2NET_ZOO_MIRROR")):
            from res2net_zoo.weights import converted

            file = converted(f"{variant}.{cfg.tag}" if cfg.tag else variant, kwargs.get("cache_dir"))
            if file:
                kwargs["pretrained_cfg_overlay"] = {**overlay, "file": str(file)}
    return build_model_with_cfg(model_cls, variant, pretrained, **kwargs)
