"""Res2Net and Res2NeXt in Deep Layer Aggregation, on timm's DLA (Yu et al., CVPR 2018, arXiv 1707.06484)."""

from functools import partial
from typing import Any

import torch
from timm.models import dla as timm_dla
from timm.models import generate_default_cfgs, register_model, register_model_deprecations
from torch import nn

from res2net_zoo.catalog import pretrained_cfgs
from res2net_zoo.models._builder import build_model, merge_args, set_drop_path
from res2net_zoo.models._features import ChainedFeatures
from res2net_zoo.models.block import Res2NetModule
from res2net_zoo.weights.convert import UNREAD_BY_DLA

__all__ = ["DLA"]


def check_size(x: torch.Tensor, multiple: int) -> None:
    """Check that DLA supports a size, in eager mode and under FX, TorchScript and torch.export.

    Args:
        x: Images or features, (N, C, H, W).
        multiple: Required divisor of H and W.

    Raises:
        AssertionError: H or W is not a multiple.
    """
    # All these modes support torch._assert with a constant message, but not an `if` on a shape.
    message = (
        "DLA halves its input five times without rounding: use images whose height and width are multiples of 32 "
        "(for features_only, of the last feature's reduction)"
    )
    torch._assert(x.shape[-2] % multiple == 0, message)
    torch._assert(x.shape[-1] % multiple == 0, message)


class DlaBottle2neck(Res2NetModule):
    """The Res2Net block of a DLA, with the interface of a block in timm's `DlaTree`.

    The tree, not the block, contains the projection of the shortcut, so only blocks with a stride have no hierarchy.

    Args:
        inplanes: Channels of the input.
        outplanes: Channels of the output.
        stride: Stride of the 3x3 convolutions.
        dilation: Dilation of the 3x3 convolutions.
        cardinality: Groups of each 3x3 convolution.
        base_width: Determines the channels per group: outplanes * base_width / 64 * cardinality / 2.
        scale: Number of groups of the hierarchy.
        **kwargs: Arguments of `Res2NetModule`.

    Raises:
        ValueError: An argument is invalid.
    """

    expansion = 2

    def __init__(
        self,
        inplanes: int,
        outplanes: int,
        stride: int = 1,
        dilation: int = 1,
        cardinality: int = 8,
        base_width: int = 4,
        scale: int = 4,
        **kwargs,
    ) -> None:
        super().__init__(
            inplanes,
            int(outplanes * base_width / 64) * cardinality // self.expansion,
            outplanes,
            scale=scale,
            cardinality=cardinality,
            stride=stride,
            dilation=dilation,
            **kwargs,
        )
        self.stride = stride

    def forward(
        self,
        x: torch.Tensor,
        shortcut: torch.Tensor | None = None,
        children: list[torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """Apply the block.

        Args:
            x: Input, (N, inplanes, H, W); H and W must be even if the block has a stride.
            shortcut: Output of the shortcut, (N, outplanes, H / stride, W / stride), or None for `x`.
            children: Unused; part of the interface of a tree.

        Returns:
            (N, outplanes, H / stride, W / stride).

        Raises:
            AssertionError: H or W is odd and the block has a stride.
        """
        if self.stride > 1:
            check_size(x, 2)
        if shortcut is None:
            shortcut = x
        return self.forward_residual(x, shortcut)


class DLA(ChainedFeatures, timm_dla.DLA):
    """timm's DLA with gradient checkpointing, stochastic depth and arguments for its blocks.

    Args:
        levels: Levels of each stage's tree.
        channels: Channels of each stage.
        output_stride: Must be 32, because trees do not support dilation.
        drop_path_rate: Stochastic depth rate of the last block, growing linearly from 0.
        block_args: Further arguments of every block.
        **kwargs: Arguments of timm's DLA.

    Raises:
        ValueError: The output stride is not 32, or an argument is invalid.
    """

    def __init__(
        self,
        levels: tuple[int, ...],
        channels: tuple[int, ...],
        output_stride: int = 32,
        drop_path_rate: float = 0.0,
        block_args: dict[str, Any] | None = None,
        **kwargs,
    ) -> None:
        if output_stride != 32:
            raise ValueError(f"output_stride is {output_stride}; DLA supports only 32: its trees cannot be dilated")
        block: Any = partial(DlaBottle2neck, **(block_args or {}))
        super().__init__(levels, channels, block=block, **kwargs)
        self.grad_checkpointing = False
        set_drop_path(self, drop_path_rate)

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """Compute the last stage's features.

        Args:
            x: Images, (N, in_chans, H, W), H and W multiples of 32.

        Returns:
            (N, num_features, H / 32, W / 32).

        Raises:
            AssertionError: H or W is not a multiple of 32.
        """
        check_size(x, 32)
        if self.grad_checkpointing and not torch.jit.is_scripting():
            return self.forward_checkpointed(x)
        x = self.base_layer(x)
        x = self.level0(x)
        x = self.level1(x)
        x = self.level2(x)
        x = self.level3(x)
        x = self.level4(x)
        return self.level5(x)


def drop_unused(state_dict: dict[str, torch.Tensor], model: nn.Module | None = None) -> dict[str, torch.Tensor]:
    """Drop the unused weights in the authors' files: the projections of trees of trees.

    Args:
        state_dict: The authors' state dict, or timm's, which does not contain them.
        model: Unused; timm passes it to filters.
    """
    return {name: tensor for name, tensor in state_dict.items() if not name.startswith(UNREAD_BY_DLA)}


def _create_dla(variant: str, pretrained: bool = False, model_cls: type[DLA] = DLA, **kwargs) -> DLA:
    return build_model(
        model_cls,
        variant,
        pretrained,
        pretrained_filter_fn=drop_unused,
        feature_cfg=dict(out_indices=(1, 2, 3, 4, 5)),
        **kwargs,
    )


default_cfgs = generate_default_cfgs(pretrained_cfgs())


@register_model
def dla60_res2net(pretrained: bool = False, **kwargs) -> DLA:
    """Res2Net-DLA-60 4s (Table 1)."""
    model_args = dict(levels=(1, 1, 1, 2, 3, 1), channels=(16, 32, 128, 256, 512, 1024), cardinality=1, base_width=28)
    return _create_dla("dla60_res2net", pretrained, **merge_args(model_args, kwargs))


@register_model
def dla60_res2next(pretrained: bool = False, **kwargs) -> DLA:
    """Res2NeXt-DLA-60 4s (Table 1)."""
    model_args = dict(levels=(1, 1, 1, 2, 3, 1), channels=(16, 32, 128, 256, 512, 1024), cardinality=8, base_width=4)
    return _create_dla("dla60_res2next", pretrained, **merge_args(model_args, kwargs))


# The names in the authors' code.
AUTHORS_NAMES = {"res2net_dla60": "dla60_res2net", "res2next_dla60": "dla60_res2next"}
register_model_deprecations(__name__, dict(AUTHORS_NAMES))
