"""Res2Net and Res2NeXt on timm's ResNet (Gao et al., TPAMI 2021, arXiv 1904.01169)."""

from timm.models import ResNet, generate_default_cfgs, register_model, register_model_deprecations

from res2net_zoo.catalog import pretrained_cfgs
from res2net_zoo.models._builder import build_model, merge_args
from res2net_zoo.models.block import Bottle2neck

__all__: list[str] = []


class Res2Net(ResNet):
    """timm's ResNet with Res2Net blocks."""


def _create_res2net(variant: str, pretrained: bool = False, **kwargs) -> Res2Net:
    return build_model(Res2Net, variant, pretrained, block=Bottle2neck, **kwargs)


# The deep stem of three 3x3 convolutions and the average pooling in the shortcut ("Bag of Tricks",
# He et al., CVPR 2019: ResNet-D), which the authors call v1b, PaddleClas vd and MMDetection v1d.
DEEP = dict(stem_type="deep", stem_width=32, avg_down=True)

default_cfgs = generate_default_cfgs(pretrained_cfgs())


@register_model
def res2net50_48w_2s(pretrained: bool = False, **kwargs) -> Res2Net:
    """Res2Net-50 48w2s: preserved complexity (Table 3)."""
    model_args = dict(layers=(3, 4, 6, 3), base_width=48, block_args=dict(scale=2))
    return _create_res2net("res2net50_48w_2s", pretrained, **merge_args(model_args, kwargs))


@register_model
def res2net50_26w_4s(pretrained: bool = False, **kwargs) -> Res2Net:
    """Res2Net-50 26w4s: the paper's main model (Tables 1 and 3)."""
    model_args = dict(layers=(3, 4, 6, 3), base_width=26, block_args=dict(scale=4))
    return _create_res2net("res2net50_26w_4s", pretrained, **merge_args(model_args, kwargs))


@register_model
def res2net50_14w_8s(pretrained: bool = False, **kwargs) -> Res2Net:
    """Res2Net-50 14w8s: preserved complexity (Table 3)."""
    model_args = dict(layers=(3, 4, 6, 3), base_width=14, block_args=dict(scale=8))
    return _create_res2net("res2net50_14w_8s", pretrained, **merge_args(model_args, kwargs))


@register_model
def res2net50_26w_6s(pretrained: bool = False, **kwargs) -> Res2Net:
    """Res2Net-50 26w6s: increased complexity (Table 3)."""
    model_args = dict(layers=(3, 4, 6, 3), base_width=26, block_args=dict(scale=6))
    return _create_res2net("res2net50_26w_6s", pretrained, **merge_args(model_args, kwargs))


@register_model
def res2net50_26w_8s(pretrained: bool = False, **kwargs) -> Res2Net:
    """Res2Net-50 26w8s: increased complexity (Table 3)."""
    model_args = dict(layers=(3, 4, 6, 3), base_width=26, block_args=dict(scale=8))
    return _create_res2net("res2net50_26w_8s", pretrained, **merge_args(model_args, kwargs))


@register_model
def res2net50_18w_4s(pretrained: bool = False, **kwargs) -> Res2Net:
    """Res2Net-50-L 18w4s: less complexity than ResNet-50 (Table 3)."""
    model_args = dict(layers=(3, 4, 6, 3), base_width=18, block_args=dict(scale=4))
    return _create_res2net("res2net50_18w_4s", pretrained, **merge_args(model_args, kwargs))


@register_model
def res2net50_18w_6s(pretrained: bool = False, **kwargs) -> Res2Net:
    """Res2Net-50 18w6s: preserved complexity (Tables 7 and 8)."""
    model_args = dict(layers=(3, 4, 6, 3), base_width=18, block_args=dict(scale=6))
    return _create_res2net("res2net50_18w_6s", pretrained, **merge_args(model_args, kwargs))


@register_model
def res2net101_26w_4s(pretrained: bool = False, **kwargs) -> Res2Net:
    """Res2Net-101 26w4s (Table 2)."""
    model_args = dict(layers=(3, 4, 23, 3), base_width=26, block_args=dict(scale=4))
    return _create_res2net("res2net101_26w_4s", pretrained, **merge_args(model_args, kwargs))


@register_model
def res2next50(pretrained: bool = False, **kwargs) -> Res2Net:
    """Res2NeXt-50 8c4w4s: the module with grouped convolutions (Section 3.3, Table 1)."""
    model_args = dict(layers=(3, 4, 6, 3), base_width=4, cardinality=8, block_args=dict(scale=4))
    return _create_res2net("res2next50", pretrained, **merge_args(model_args, kwargs))


@register_model
def seres2net50_26w_4s(pretrained: bool = False, **kwargs) -> Res2Net:
    """SE-Res2Net-50 26w4s: squeeze-and-excitation on the block's output, reduction 16 (Section 3.3, Table 1)."""
    model_args = dict(layers=(3, 4, 6, 3), base_width=26, block_args=dict(scale=4, attn_layer="se"))
    return _create_res2net("seres2net50_26w_4s", pretrained, **merge_args(model_args, kwargs))


@register_model
def res2net50d(pretrained: bool = False, **kwargs) -> Res2Net:
    """Res2Net-50 v1b 26w4s: deep stem, average-pool shortcut (Table 1)."""
    model_args = dict(layers=(3, 4, 6, 3), base_width=26, block_args=dict(scale=4), **DEEP)
    return _create_res2net("res2net50d", pretrained, **merge_args(model_args, kwargs))


@register_model
def res2net101d(pretrained: bool = False, **kwargs) -> Res2Net:
    """Res2Net-101 v1b 26w4s: deep stem, average-pool shortcut (Table 1)."""
    model_args = dict(layers=(3, 4, 23, 3), base_width=26, block_args=dict(scale=4), **DEEP)
    return _create_res2net("res2net101d", pretrained, **merge_args(model_args, kwargs))


@register_model
def res2net152d(pretrained: bool = False, **kwargs) -> Res2Net:
    """Res2Net-152 v1b 26w4s: deep stem, average-pool shortcut (released with the authors' code)."""
    model_args = dict(layers=(3, 8, 36, 3), base_width=26, block_args=dict(scale=4), **DEEP)
    return _create_res2net("res2net152d", pretrained, **merge_args(model_args, kwargs))


@register_model
def res2net50_vd_26w_4s(pretrained: bool = False, **kwargs) -> Res2Net:
    """Res2Net-50-vd 26w4s of PaddleClas: its wiring, deep stem, average-pool shortcut."""
    model_args = dict(layers=(3, 4, 6, 3), base_width=26, block_args=dict(scale=4, wiring="paddle"), **DEEP)
    return _create_res2net("res2net50_vd_26w_4s", pretrained, **merge_args(model_args, kwargs))


@register_model
def res2net101_vd_26w_4s(pretrained: bool = False, **kwargs) -> Res2Net:
    """Res2Net-101-vd 26w4s of PaddleClas: its wiring, deep stem, average-pool shortcut."""
    model_args = dict(layers=(3, 4, 23, 3), base_width=26, block_args=dict(scale=4, wiring="paddle"), **DEEP)
    return _create_res2net("res2net101_vd_26w_4s", pretrained, **merge_args(model_args, kwargs))


@register_model
def res2net200_vd_26w_4s(pretrained: bool = False, **kwargs) -> Res2Net:
    """Res2Net-200-vd 26w4s of PaddleClas: its wiring, deep stem, average-pool shortcut (Table 1)."""
    model_args = dict(layers=(3, 12, 48, 3), base_width=26, block_args=dict(scale=4, wiring="paddle"), **DEEP)
    return _create_res2net("res2net200_vd_26w_4s", pretrained, **merge_args(model_args, kwargs))


@register_model
def res2net50_v1d_26w_4s(pretrained: bool = False, **kwargs) -> Res2Net:
    """Res2Net-50-v1d 26w4s of MMDetection: its wiring, deep stem, average-pool shortcut."""
    model_args = dict(layers=(3, 4, 6, 3), base_width=26, block_args=dict(scale=4, wiring="mmdet"), **DEEP)
    return _create_res2net("res2net50_v1d_26w_4s", pretrained, **merge_args(model_args, kwargs))


@register_model
def res2net101_v1d_26w_4s(pretrained: bool = False, **kwargs) -> Res2Net:
    """Res2Net-101-v1d 26w4s of MMDetection: its wiring, deep stem, average-pool shortcut."""
    model_args = dict(layers=(3, 4, 23, 3), base_width=26, block_args=dict(scale=4, wiring="mmdet"), **DEEP)
    return _create_res2net("res2net101_v1d_26w_4s", pretrained, **merge_args(model_args, kwargs))


@register_model
def res2net50_pd_26w_4s(pretrained: bool = False, **kwargs) -> Res2Net:
    """Res2Net-50 26w4s of PaddleClas: its wiring, otherwise `res2net50_26w_4s`."""
    model_args = dict(layers=(3, 4, 6, 3), base_width=26, block_args=dict(scale=4, wiring="paddle"))
    return _create_res2net("res2net50_pd_26w_4s", pretrained, **merge_args(model_args, kwargs))


@register_model
def res2net50_pd_14w_8s(pretrained: bool = False, **kwargs) -> Res2Net:
    """Res2Net-50 14w8s of PaddleClas: its wiring, otherwise `res2net50_14w_8s`."""
    model_args = dict(layers=(3, 4, 6, 3), base_width=14, block_args=dict(scale=8, wiring="paddle"))
    return _create_res2net("res2net50_pd_14w_8s", pretrained, **merge_args(model_args, kwargs))


@register_model
def res2net_tiny(pretrained: bool = False, **kwargs) -> Res2Net:
    """A small Res2Net for tests and demonstrations, not from the paper."""
    model_args = dict(
        layers=(1, 2, 2, 1),
        channels=(16, 32, 64, 96),
        base_width=26,
        block_args=dict(scale=4),
        stem_type="deep",
        stem_width=16,
        avg_down=True,
    )
    return _create_res2net("res2net_tiny", pretrained, **merge_args(model_args, kwargs))


# The names in the authors' code.
AUTHORS_NAMES = {
    "res2net50_v1b_26w_4s": "res2net50d",
    "res2net101_v1b_26w_4s": "res2net101d",
    "res2net152_v1b_26w_4s": "res2net152d",
}
register_model_deprecations(__name__, dict(AUTHORS_NAMES))
