"""Res2Net and Res2NeXt on timm's ResNet (Gao et al., TPAMI 2021, arXiv 1904.01169)."""

from timm.models import ResNet, build_model_with_cfg, generate_default_cfgs, register_model

from res2net_zoo.block import Bottle2neck
from res2net_zoo.catalog import pretrained_cfgs

__all__: list[str] = []


def _create_res2net(variant: str, pretrained: bool = False, **kwargs) -> ResNet:
    return build_model_with_cfg(ResNet, variant, pretrained, block=Bottle2neck, **kwargs)


default_cfgs = generate_default_cfgs(pretrained_cfgs())


@register_model
def res2net50_48w_2s(pretrained: bool = False, **kwargs) -> ResNet:
    """Res2Net-50 48w2s: preserved complexity (Table 3)."""
    model_args = dict(layers=(3, 4, 6, 3), base_width=48, block_args=dict(scale=2))
    return _create_res2net("res2net50_48w_2s", pretrained, **dict(model_args, **kwargs))


@register_model
def res2net50_26w_4s(pretrained: bool = False, **kwargs) -> ResNet:
    """Res2Net-50 26w4s: the paper's main model (Tables 1 and 3)."""
    model_args = dict(layers=(3, 4, 6, 3), base_width=26, block_args=dict(scale=4))
    return _create_res2net("res2net50_26w_4s", pretrained, **dict(model_args, **kwargs))


@register_model
def res2net50_14w_8s(pretrained: bool = False, **kwargs) -> ResNet:
    """Res2Net-50 14w8s: preserved complexity (Table 3)."""
    model_args = dict(layers=(3, 4, 6, 3), base_width=14, block_args=dict(scale=8))
    return _create_res2net("res2net50_14w_8s", pretrained, **dict(model_args, **kwargs))


@register_model
def res2net50_26w_6s(pretrained: bool = False, **kwargs) -> ResNet:
    """Res2Net-50 26w6s: increased complexity (Table 3)."""
    model_args = dict(layers=(3, 4, 6, 3), base_width=26, block_args=dict(scale=6))
    return _create_res2net("res2net50_26w_6s", pretrained, **dict(model_args, **kwargs))


@register_model
def res2net50_26w_8s(pretrained: bool = False, **kwargs) -> ResNet:
    """Res2Net-50 26w8s: increased complexity (Table 3)."""
    model_args = dict(layers=(3, 4, 6, 3), base_width=26, block_args=dict(scale=8))
    return _create_res2net("res2net50_26w_8s", pretrained, **dict(model_args, **kwargs))


@register_model
def res2net101_26w_4s(pretrained: bool = False, **kwargs) -> ResNet:
    """Res2Net-101 26w4s (Table 2)."""
    model_args = dict(layers=(3, 4, 23, 3), base_width=26, block_args=dict(scale=4))
    return _create_res2net("res2net101_26w_4s", pretrained, **dict(model_args, **kwargs))


@register_model
def res2next50(pretrained: bool = False, **kwargs) -> ResNet:
    """Res2NeXt-50 8c4w4s: the module with grouped convolutions (Section 3.3, Table 1)."""
    model_args = dict(layers=(3, 4, 6, 3), base_width=4, cardinality=8, block_args=dict(scale=4))
    return _create_res2net("res2next50", pretrained, **dict(model_args, **kwargs))


@register_model
def res2net50d(pretrained: bool = False, **kwargs) -> ResNet:
    """Res2Net-50 v1b 26w4s: deep stem, average-pool shortcut (Table 1)."""
    model_args = dict(
        layers=(3, 4, 6, 3), base_width=26, block_args=dict(scale=4), stem_type="deep", stem_width=32, avg_down=True
    )
    return _create_res2net("res2net50d", pretrained, **dict(model_args, **kwargs))


@register_model
def res2net101d(pretrained: bool = False, **kwargs) -> ResNet:
    """Res2Net-101 v1b 26w4s: deep stem, average-pool shortcut (Table 1)."""
    model_args = dict(
        layers=(3, 4, 23, 3), base_width=26, block_args=dict(scale=4), stem_type="deep", stem_width=32, avg_down=True
    )
    return _create_res2net("res2net101d", pretrained, **dict(model_args, **kwargs))


@register_model
def res2net_tiny(pretrained: bool = False, **kwargs) -> ResNet:
    """A small Res2Net for tests and demonstration; ours, not the paper's."""
    model_args = dict(
        layers=(1, 2, 2, 1),
        channels=(16, 32, 64, 96),
        base_width=26,
        block_args=dict(scale=4),
        stem_type="deep",
        stem_width=16,
        avg_down=True,
    )
    return _create_res2net("res2net_tiny", pretrained, **dict(model_args, **kwargs))
