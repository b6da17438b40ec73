"""Res2NeXt for 32x32 images: the ResNeXt-29 architecture of the paper's CIFAR experiments (Table 4, Figure 5).

Three stages at strides 1, 2 and 4 after one 3x3 convolution (Xie et al., CVPR 2017, arXiv 1611.05431,
Section 5.3). A model has 9n + 2 layers with n blocks per stage. Scale 1 is the plain ResNeXt.
"""

from typing import Any

import torch
from timm.models import ResNet, create_model, generate_default_cfgs, is_model, register_model
from torch import nn

from res2net_zoo.catalog import pretrained_cfgs
from res2net_zoo.models._builder import build_model, merge_args
from res2net_zoo.models._features import ChainedFeatures
from res2net_zoo.models.block import Bottle2neck

__all__ = ["CifarResNet", "cifar_res2next"]


class CifarResNet(ChainedFeatures, ResNet):
    """timm's ResNet with three stages and a stem that keeps the resolution.

    Args:
        layers: Blocks of each of the three stages.
        channels: Base width of each stage.
        output_stride: Must be 4, the actual stride, or 32, timm's default.
        stem_type: Must be "".
        replace_stem_pool: Must be False, because the stem has no pooling.
        **kwargs: Arguments of timm's ResNet.

    Raises:
        ValueError: The output stride, the stem or the number of stages is unsupported.
    """

    def __init__(
        self,
        layers: tuple[int, ...],
        channels: tuple[int, ...] = (64, 128, 256),
        output_stride: int = 32,
        stem_type: str = "",
        replace_stem_pool: bool = False,
        **kwargs,
    ) -> None:
        if output_stride not in (4, 32):
            raise ValueError(f"output_stride is {output_stride}; a CIFAR model supports only 4")
        if not len(layers) == len(channels) == 3:
            raise ValueError(
                f"a CIFAR model has three stages; layers has {len(layers)} values and channels has {len(channels)}"
            )
        if stem_type or replace_stem_pool:
            raise ValueError(
                "a CIFAR model's stem is one 3x3 convolution; stem_type and replace_stem_pool are unsupported"
            )
        super().__init__(layers=layers, channels=channels, **kwargs)
        stem: Any = self.conv1
        conv1 = nn.Conv2d(
            stem.in_channels,
            stem.out_channels,
            kernel_size=3,
            padding=1,
            bias=False,
            device=stem.weight.device,
            dtype=stem.weight.dtype,
        )
        nn.init.kaiming_normal_(conv1.weight, mode="fan_out", nonlinearity="relu")
        self.conv1 = conv1  # type: ignore[assignment]  # timm's can be a deep stem
        self.maxpool = nn.Identity()  # type: ignore[assignment]
        for info, reduction in zip(self.feature_info, (1, 1, 2, 4), strict=True):
            info["reduction"] = reduction

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """Compute the last stage's features.

        Args:
            x: Images, (N, in_chans, H, W).

        Returns:
            (N, num_features, ceil(H / 4), ceil(W / 4)).
        """
        if self.grad_checkpointing and not torch.jit.is_scripting():
            return self.forward_checkpointed(x)
        x = self.act1(self.bn1(self.conv1(x)))
        x = self.layer1(x)
        x = self.layer2(x)
        return self.layer3(x)


def _create_cifar(variant: str, pretrained: bool = False, **kwargs) -> CifarResNet:
    return build_model(
        CifarResNet, variant, pretrained, block=Bottle2neck, feature_cfg=dict(out_indices=(0, 1, 2, 3)), **kwargs
    )


default_cfgs = generate_default_cfgs(pretrained_cfgs())


def cifar_layers(depth: int) -> tuple[int, int, int]:
    """Return the number of blocks in each stage of a model with `depth` layers.

    Args:
        depth: Number of layers.

    Raises:
        ValueError: The depth is not 9n + 2.
    """
    n, rest = divmod(depth - 2, 9)
    if n < 1 or rest:
        near = [int(9 * m + 2) for m in (n, n + 1) if m >= 1]
        raise ValueError(f"a CIFAR model has 9n + 2 layers, so {' or '.join(map(str, near))}, not {depth}")
    return (int(n),) * 3


def cifar_name(depth: int, cardinality: int, width: int, scale: int, se: bool = False) -> str:
    """Return the name of a model: `res2next{L}_{C}c_{W}w_{S}s`, or `resnext{L}_{C}c_{W}w` for scale 1."""
    plain = f"{depth}_{cardinality}c_{width}w"
    return ("se" if se else "") + (f"resnext{plain}" if scale == 1 else f"res2next{plain}_{scale}s")


def cifar_res2next(
    depth: int = 29, cardinality: int = 6, width: int = 24, scale: int = 4, se: bool = False, **kwargs
) -> CifarResNet:
    """Build any model of the paper's Figure 5 from its dimensions.

    A model without a registered name is built as a registered one with other arguments, so that it can be saved to a
    model folder and loaded from it.

    Args:
        depth: Number of layers, L: 9n + 2 with n blocks per stage, that is, 29, 38, 47 and so on.
        cardinality: Groups of each 3x3 convolution, c.
        width: Channels of each group of the convolution in the first stage, w.
        scale: Number of groups of the hierarchy, s; 1 for a ResNeXt.
        se: Whether squeeze-and-excitation follows each block's branch.
        **kwargs: Arguments of `timm.create_model`.

    Returns:
        The model, without trained weights.

    Raises:
        ValueError: The depth is not 9n + 2, or an argument is invalid.
    """
    layers = cifar_layers(depth)
    name = cifar_name(depth, cardinality, width, scale, se)
    if kwargs.get("block_args") or not is_model(name):
        kwargs["block_args"] = {**(kwargs.get("block_args") or {}), "scale": scale}
    if not is_model(name):
        name = cifar_name(29, 6, 24, 4, se)
        kwargs |= dict(layers=layers, cardinality=cardinality, base_width=width)
    model: Any = create_model(name, **kwargs)
    return model


@register_model
def res2next29_6c_24w_4s(pretrained: bool = False, **kwargs) -> CifarResNet:
    """Res2NeXt-29 6c24w4s for CIFAR (Table 4)."""
    model_args = dict(layers=(3, 3, 3), cardinality=6, base_width=24, block_args=dict(scale=4))
    return _create_cifar("res2next29_6c_24w_4s", pretrained, **merge_args(model_args, kwargs))


@register_model
def res2next29_8c_25w_4s(pretrained: bool = False, **kwargs) -> CifarResNet:
    """Res2NeXt-29 8c25w4s for CIFAR (Table 4)."""
    model_args = dict(layers=(3, 3, 3), cardinality=8, base_width=25, block_args=dict(scale=4))
    return _create_cifar("res2next29_8c_25w_4s", pretrained, **merge_args(model_args, kwargs))


@register_model
def res2next29_6c_24w_6s(pretrained: bool = False, **kwargs) -> CifarResNet:
    """Res2NeXt-29 6c24w6s for CIFAR (Table 4)."""
    model_args = dict(layers=(3, 3, 3), cardinality=6, base_width=24, block_args=dict(scale=6))
    return _create_cifar("res2next29_6c_24w_6s", pretrained, **merge_args(model_args, kwargs))


@register_model
def seres2next29_6c_24w_4s(pretrained: bool = False, **kwargs) -> CifarResNet:
    """SE-Res2NeXt-29 6c24w4s for CIFAR, reduction 16 (Table 4)."""
    model_args = dict(layers=(3, 3, 3), cardinality=6, base_width=24, block_args=dict(scale=4, attn_layer="se"))
    return _create_cifar("seres2next29_6c_24w_4s", pretrained, **merge_args(model_args, kwargs))


@register_model
def seres2next29_8c_25w_4s(pretrained: bool = False, **kwargs) -> CifarResNet:
    """SE-Res2NeXt-29 8c25w4s for CIFAR, reduction 16 (Table 4)."""
    model_args = dict(layers=(3, 3, 3), cardinality=8, base_width=25, block_args=dict(scale=4, attn_layer="se"))
    return _create_cifar("seres2next29_8c_25w_4s", pretrained, **merge_args(model_args, kwargs))


@register_model
def seres2next29_6c_24w_6s(pretrained: bool = False, **kwargs) -> CifarResNet:
    """SE-Res2NeXt-29 6c24w6s for CIFAR, reduction 16 (Table 4)."""
    model_args = dict(layers=(3, 3, 3), cardinality=6, base_width=24, block_args=dict(scale=6, attn_layer="se"))
    return _create_cifar("seres2next29_6c_24w_6s", pretrained, **merge_args(model_args, kwargs))


@register_model
def resnext29_8c_64w(pretrained: bool = False, **kwargs) -> CifarResNet:
    """ResNeXt-29 8c64w for CIFAR: the baseline of Table 4."""
    model_args = dict(layers=(3, 3, 3), cardinality=8, base_width=64, block_args=dict(scale=1))
    return _create_cifar("resnext29_8c_64w", pretrained, **merge_args(model_args, kwargs))


@register_model
def resnext29_16c_64w(pretrained: bool = False, **kwargs) -> CifarResNet:
    """ResNeXt-29 16c64w for CIFAR: the larger baseline of Table 4."""
    model_args = dict(layers=(3, 3, 3), cardinality=16, base_width=64, block_args=dict(scale=1))
    return _create_cifar("resnext29_16c_64w", pretrained, **merge_args(model_args, kwargs))
