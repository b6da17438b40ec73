"""Res2Net and Res2NeXt on timm's ResNet (Gao et al., TPAMI 2021, arXiv 1904.01169)."""

from collections.abc import Sequence
from typing import Any, Literal, get_args

from timm.models import ResNet, generate_default_cfgs, register_model, register_model_deprecations
from torch import nn

from res2net_zoo.catalog import pretrained_cfgs
from res2net_zoo.models._builder import build_model, merge_args
from res2net_zoo.models.block import Bottle2neck

__all__: list[str] = []


DilationRule = Literal["timm", "mmdet"]

# Limits of the stride and the dilation of a block, far above those of published networks.
LARGEST_STRIDE, LARGEST_DILATION = 8, 128


class Res2Net(ResNet):
    """timm's ResNet with Res2Net blocks, and a choice between timm's and MMDetection's dilation rule.

    With the same weights, the two rules give different results. They differ in the first block of a stage whose stride
    is replaced by dilation:

    - `"timm"`: it has the dilation of the previous stage, and its average-pool shortcut pools with stride 1.
    - `"mmdet"` (MMDetection, and copies of the authors' file with an `output_stride`, such as those of UACANet and
      InSPyReNet): it has the dilation of its stage, and its shortcut does not pool. Strides and dilations can also be
      given stage by stage, so that a stage may have both.

    Args:
        block: Class of the blocks, with the interface of `Bottle2neck`.
        layers: Number of blocks of each stage.
        channels: Base width of each stage.
        output_stride: 32, or 16 or 8, which replace the stride of the last one or two stages by dilation.
        dilation_rule: `"timm"` or `"mmdet"`. Defaults to `"mmdet"` if one of the next three is given, and otherwise to
            `"timm"`.
        strides: Stride of each stage, instead of `output_stride`; (1, 2, 2, 2) if only `dilations` is given.
        dilations: Dilation of each stage, instead of `output_stride`; (1, 1, 1, 1) if only `strides` is given.
        multi_grid: Factor of the dilation of each block of the last stage, such as (1, 2, 4).
        **kwargs: Arguments of timm's ResNet.

    Raises:
        ValueError: An argument is invalid, or two are mutually exclusive.
    """

    def __init__(
        self,
        block: Any,
        layers: tuple[int, ...],
        channels: tuple[int, ...] = (64, 128, 256, 512),
        output_stride: int = 32,
        dilation_rule: DilationRule | None = None,
        strides: Sequence[int] | None = None,
        dilations: Sequence[int] | None = None,
        multi_grid: Sequence[int] | None = None,
        **kwargs,
    ) -> None:
        explicit = {"strides": strides, "dilations": dilations, "multi_grid": multi_grid}
        given = [name for name, values in explicit.items() if values is not None]
        check_dilation(output_stride, dilation_rule, given)
        if dilation_rule == "timm" or (dilation_rule is None and not given):
            super().__init__(block, layers, channels=channels, output_stride=output_stride, **kwargs)
            return
        plan = plan_stages(layers, output_stride, strides, dilations, multi_grid)
        stages: Any = tuple(_Stage(block, stride, dilations) for stride, dilations in plan)
        super().__init__(stages, layers, channels=channels, **kwargs)
        reduction = 4  # of the stem
        for info, (stride, _) in zip(self.feature_info[1:], plan, strict=True):
            reduction *= stride
            info["reduction"] = reduction


class _Stage:
    """Creates the blocks of a stage for timm's `ResNet`, with its own stride and dilations instead of timm's.

    Args:
        block: Class of the blocks.
        stride: Stride of the first block.
        dilations: Dilation of each block.
    """

    def __init__(self, block: Any, stride: int, dilations: Sequence[int]) -> None:
        self.block, self.stride, self.dilations = block, stride, dilations
        self.expansion = block.expansion
        self.created = 0

    def __call__(self, inplanes: int, planes: int, stride: int, downsample: nn.Module | None, **kwargs) -> nn.Module:
        own_stride = 1 if self.created else self.stride
        kwargs |= dict(dilation=self.dilations[self.created], first_dilation=None, downsamples=stride > 1)
        self.created += 1
        if isinstance(downsample, nn.Sequential):
            set_stride(downsample, own_stride)
        elif own_stride > 1:
            raise ValueError(f"strides has {own_stride} for a stage whose first block has no projection; it must be 1")
        return self.block(inplanes, planes, own_stride, downsample, **kwargs)


def set_stride(shortcut: nn.Sequential, stride: int) -> None:
    """Set the stride of a projection shortcut of timm's ResNet, which is undilated."""
    if isinstance(shortcut[0], nn.Conv2d):
        shortcut[0].stride = (stride, stride)
    elif stride == 1:
        shortcut[0] = nn.Identity()
    else:
        shortcut[0] = nn.AvgPool2d(stride, stride, ceil_mode=True, count_include_pad=False)


def plan_stages(
    layers: Sequence[int],
    output_stride: int,
    strides: Sequence[int] | None,
    dilations: Sequence[int] | None,
    multi_grid: Sequence[int] | None,
) -> list[tuple[int, list[int]]]:
    """Return the stride of each stage and the dilation of each of its blocks, under the rule `"mmdet"`.

    Args:
        layers: Number of blocks of each stage.
        output_stride: The output stride.
        strides: Stride of each stage.
        dilations: Dilation of each stage.
        multi_grid: Factor of the dilation of each block of the last stage.

    Raises:
        ValueError: An argument has the wrong length, or a number is out of bounds.
    """
    check_numbers("strides", strides, len(layers), LARGEST_STRIDE)
    check_numbers("dilations", dilations, len(layers), LARGEST_DILATION)
    reductions = [4 * 2**i for i in range(len(layers))]
    if strides is None:
        strides = [2 if 4 < reduction <= output_stride else 1 for reduction in reductions]
    if dilations is None:
        dilations = [max(1, reduction // output_stride) for reduction in reductions]
    check_numbers("multi_grid", multi_grid, layers[-1], LARGEST_DILATION // dilations[-1])
    stages = [[dilation] * depth for dilation, depth in zip(dilations, layers, strict=True)]
    stages[-1] = [dilations[-1] * factor for factor in multi_grid or [1] * layers[-1]]
    return list(zip(strides, stages, strict=True))


def check_dilation(output_stride: int, rule: str | None, given: Sequence[str]) -> None:
    """Check the dilation rule, and that it supports the given arguments.

    Args:
        output_stride: The output stride.
        rule: The rule, or None for the default.
        given: Which of `strides`, `dilations` and `multi_grid` are given.

    Raises:
        ValueError: An argument is invalid, or two are mutually exclusive.
    """
    if output_stride not in (8, 16, 32):
        raise ValueError(f"output_stride is {output_stride}; it must be 8, 16 or 32")
    if rule is not None and rule not in get_args(DilationRule):
        raise ValueError(f"dilation_rule is {rule!r}; it must be one of {', '.join(get_args(DilationRule))}")
    if rule == "timm" and given:
        raise ValueError(f"dilation_rule 'timm' supports only output_stride; {given[0]} needs dilation_rule 'mmdet'")
    if output_stride != 32 and given and given[0] != "multi_grid":
        raise ValueError(f"output_stride {output_stride} and {given[0]} are mutually exclusive; pass one of them")


def check_numbers(name: str, values: Any, count: int, most: int) -> None:
    """Check an argument with a number for each stage or block.

    Raises:
        ValueError: It has the wrong length, or a number is out of bounds.
    """
    if values is None:
        return
    fits = isinstance(values, list | tuple) and len(values) == count
    if not fits or not all(type(n) is int and 0 < n <= most for n in values):
        each = "block of the last stage" if name == "multi_grid" else "stage"
        raise ValueError(f"{name} is {values!r}; it must be {count} integers from 1 to {most}, one for each {each}")


def _create_res2net(variant: str, pretrained: bool = False, model_cls: type[Res2Net] = Res2Net, **kwargs) -> Res2Net:
    return build_model(model_cls, variant, pretrained, **{"block": Bottle2neck, **kwargs})


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
