"""Big-Little Net with the Res2Net module (Chen et al., ICLR 2019, arXiv 1807.03848; Res2Net paper, Table 1).

A stage has two branches: a big one, deep and wide, at half the resolution, and a little one, with the width divided by
alpha and the depth by beta, at the full resolution. The two are added, and one more block fuses them and applies the
stage's stride. The implementation is independent of published code; its structure matches the paper's description and
complexity.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from timm.layers import create_classifier, get_act_layer, get_device_dtype, get_norm_layer
from timm.layers.typing import LayerType
from timm.models import generate_default_cfgs, register_model
from torch import nn
from torch.nn import functional as F

from res2net_zoo.catalog import pretrained_cfgs
from res2net_zoo.models._builder import build_model, merge_args, set_drop_path
from res2net_zoo.models._features import ChainedFeatures
from res2net_zoo.models.block import Bottle2neck

__all__ = ["BigLittleNet"]


class ConvNorm(nn.Sequential):
    """A convolution without bias, a norm, and an optional activation."""

    def __init__(self, in_chs: int, out_chs: int, kernel_size: int, stride: int, norm_layer: Any, act: Any, dd: dict):
        conv = nn.Conv2d(in_chs, out_chs, kernel_size, stride, padding=kernel_size // 2, bias=False, **dd)
        super().__init__(conv, norm_layer(out_chs, **dd), *([act(inplace=True)] if act else []))


class BigLittleStem(nn.Module):
    """The second half of the stem: two branches of stride 2, summed and fused.

    Args:
        chs: Channels of the input and the output.
        alpha: Divisor of the little branch's width.
        norm_layer: Normalization, called with the number of channels.
        act_layer: Activation, called with `inplace=True`.
        dd: Device and type of the parameters.
    """

    def __init__(self, chs: int, alpha: int, norm_layer: Any, act_layer: Any, dd: dict[str, Any]) -> None:
        super().__init__()
        little = chs // alpha
        self.big = ConvNorm(chs, chs, 3, 2, norm_layer, None, dd)
        self.little = nn.Sequential(
            ConvNorm(chs, little, 3, 1, norm_layer, act_layer, dd),
            ConvNorm(little, little, 3, 2, norm_layer, act_layer, dd),
            ConvNorm(little, chs, 1, 1, norm_layer, None, dd),
        )
        self.act = act_layer(inplace=True)
        # Not named "fuse", which timm.utils.reparameterize_model calls as a method.
        self.merge = ConvNorm(chs, chs, 1, 1, norm_layer, act_layer, dd)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (N, chs, H, W) to (N, chs, ceil(H / 2), ceil(W / 2))."""
        return self.merge(self.act(self.big(x) + self.little(x)))


class BigLittleStage(nn.Module):
    """Both branches of a stage and their sum.

    Args:
        big: Maps (N, in_chs, H, W) to (N, out_chs, ceil(H / 2), ceil(W / 2)).
        little: Maps (N, in_chs, H, W) to (N, out_chs, H, W).
        act: Activation of the sum.
    """

    def __init__(self, big: nn.Module, little: nn.Module, act: nn.Module) -> None:
        super().__init__()
        self.big = big
        self.little = little
        self.act = act

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (N, in_chs, H, W) to (N, out_chs, H, W)."""
        little = self.little(x)
        big = F.interpolate(self.big(x), size=little.shape[-2:], mode="bilinear", align_corners=False)
        return self.act(big + little)


def make_blocks(
    in_chs: int,
    planes: int,
    depth: int,
    stride: int,
    dilation: int,
    first_dilation: int,
    norm_layer: Any,
    dd: dict[str, Any],
    last_act: bool = True,
    **kwargs,
) -> nn.Sequential:
    """Build the blocks of one branch.

    Args:
        in_chs: Channels of the input; the output has four times `planes`.
        planes: Base width.
        depth: Number of blocks.
        stride: Stride of the first block; its shortcut pools.
        dilation: Dilation of the blocks.
        first_dilation: Dilation of the 3x3 convolutions in the first block.
        norm_layer: Normalization, called with the number of channels.
        dd: Device and type of the parameters.
        last_act: Whether to apply the activation after the last block's addition.
        **kwargs: Arguments of `Bottle2neck`.
    """
    blocks = []
    out_chs = planes * Bottle2neck.expansion
    for i in range(depth):
        shortcut: list[nn.Module] = []
        if stride > 1:
            shortcut.append(nn.AvgPool2d(3, stride, padding=1))
        if in_chs != out_chs:
            shortcut.append(ConvNorm(in_chs, out_chs, 1, 1, norm_layer, None, dd))
        blocks.append(
            Bottle2neck(
                in_chs,
                planes,
                stride,
                nn.Sequential(*shortcut) if shortcut else None,
                dilation=dilation,
                first_dilation=first_dilation if i == 0 else dilation,
                last_act=last_act or i < depth - 1,
                norm_layer=norm_layer,
                **kwargs,
                **dd,
            )
        )
        in_chs, stride = out_chs, 1
    return nn.Sequential(*blocks)


def make_stage(
    blocks: Callable[..., nn.Sequential],
    in_chs: int,
    planes: int,
    depth: int,
    *,
    alpha: int,
    beta: int,
    dilation: int,
    act_layer: Any,
    norm_layer: Any,
    dd: dict[str, Any],
) -> BigLittleStage:
    """Build both branches of a stage.

    Args:
        blocks: `make_blocks` with the common arguments of all stages.
        in_chs: Channels of the input; the output has four times `planes`.
        planes: Base width.
        depth: Number of blocks, including the one that fuses the branches.
        alpha: Divisor of the little branch's width.
        beta: Divisor of the little branch's depth.
        dilation: Dilation of the blocks.
        act_layer: Activation of the sum, called with `inplace=True`.
        norm_layer: Normalization, called with the number of channels.
        dd: Device and type of the parameters.
    """
    out_chs = planes * Bottle2neck.expansion
    big = blocks(in_chs, planes, depth - 1, 2, dilation, dilation, last_act=False)
    little = nn.Sequential(
        blocks(in_chs, planes // alpha, max(1, depth // beta - 1), 1, dilation, dilation),
        ConvNorm(out_chs // alpha, out_chs, 1, 1, norm_layer, None, dd),
    )
    return BigLittleStage(big, little, act_layer(inplace=True))


def check_stages(layers: tuple[int, ...], channels: tuple[int, ...], alpha: int) -> None:
    """Check the arguments that define the stages of a `BigLittleNet`.

    Raises:
        ValueError: There are not four stages, a stage has too few blocks for two branches, or its width is not
            divisible by alpha.
    """
    if not len(layers) == len(channels) == 4 or min(layers[:3]) < 2:
        raise ValueError(f"layers are {layers}; there must be four stages, the first three with at least 2 blocks")
    if any(planes % alpha for planes in channels[:3]):
        raise ValueError(f"alpha is {alpha}; it must divide the channels of the first three stages, {channels[:3]}")


def plan_strides(output_stride: int) -> list[tuple[int, int, int]]:
    """Return the stride and dilation of the last block of each stage, and the dilation of its preceding blocks.

    Raises:
        ValueError: An unsupported output stride.
    """
    if output_stride not in (8, 16, 32):
        raise ValueError(f"output_stride is {output_stride}; Big-Little Net supports 8, 16 and 32")
    strides = []
    reduction, dilation = 4, 1
    for stride in (2, 2, 1, 2):
        first_dilation = dilation
        if reduction * stride > output_stride:
            stride, dilation = 1, dilation * stride
        reduction *= stride
        strides.append((stride, dilation, first_dilation))
    return strides


class BigLittleNet(ChainedFeatures, nn.Module):
    """Big-Little Net with Res2Net blocks, or plain bottlenecks for scale 1.

    Like timm's ResNet, it has features at strides 2, 4, 8, 16 and 32. They are the deepest ones of each stride: at 4
    and 8 the sum of both branches, before the block that applies the next stride.

    Args:
        layers: Blocks of each of the four stages, as in the corresponding ResNet.
        num_classes: Number of classes; 0 for no classifier.
        in_chans: Channels of the image.
        output_stride: 32, or 16 or 8, which replace the last strides by dilation.
        global_pool: Pooling before the classifier.
        cardinality: Groups of each 3x3 convolution.
        base_width: Channels of one group of the hierarchy, in a stage of 64 planes.
        alpha: Divisor of the little branch's width.
        beta: Divisor of the little branch's depth.
        channels: Planes of each stage; a stage has four times as many channels.
        act_layer: Activation.
        norm_layer: Normalization.
        drop_rate: Dropout before the classifier.
        drop_path_rate: Stochastic depth rate of the last block, growing linearly from 0.
        zero_init_last: Whether to zero-initialize the last norm of each block.
        block_args: Further arguments of every block.
        device: Device of the parameters.
        dtype: Type of the parameters.

    Raises:
        ValueError: The output stride, the stages or another argument is invalid.
    """

    def __init__(
        self,
        layers: tuple[int, ...],
        num_classes: int = 1000,
        in_chans: int = 3,
        output_stride: int = 32,
        global_pool: str = "avg",
        cardinality: int = 1,
        base_width: int = 64,
        alpha: int = 2,
        beta: int = 4,
        channels: tuple[int, ...] = (64, 128, 256, 512),
        act_layer: LayerType = nn.ReLU,
        norm_layer: LayerType = nn.BatchNorm2d,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        zero_init_last: bool = True,
        block_args: dict[str, Any] | None = None,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        strides = plan_strides(output_stride)
        check_stages(layers, channels, alpha)
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        act: Any = get_act_layer(act_layer)
        norm: Any = get_norm_layer(norm_layer)
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.drop_rate = drop_rate
        self.grad_checkpointing = False

        stem_chs = 64
        self.conv1 = nn.Conv2d(in_chans, stem_chs, kernel_size=7, stride=2, padding=3, bias=False, **dd)
        self.bn1 = norm(stem_chs, **dd)
        self.act1 = act(inplace=True)
        self.stem = BigLittleStem(stem_chs, alpha, norm, act, dd)
        self.feature_info = [dict(num_chs=stem_chs, reduction=2, module="act1")]

        block_args = dict(cardinality=cardinality, base_width=base_width, **(block_args or {}))
        blocks: Any = partial(make_blocks, act_layer=act, norm_layer=norm, dd=dd, **block_args)
        stage = partial(make_stage, blocks, alpha=alpha, beta=beta, act_layer=act, norm_layer=norm, dd=dd)
        chs = [stem_chs, *(planes * Bottle2neck.expansion for planes in channels)]
        self.layer1 = stage(chs[0], channels[0], layers[0], dilation=strides[0][2])
        self.fuse1 = blocks(chs[1], channels[0], 1, *strides[0])
        self.layer2 = stage(chs[1], channels[1], layers[1], dilation=strides[1][2])
        self.fuse2 = blocks(chs[2], channels[1], 1, *strides[1])
        self.layer3 = stage(chs[2], channels[2], layers[2], dilation=strides[2][2])
        self.fuse3 = blocks(chs[3], channels[2], 1, *strides[2])
        self.layer4 = blocks(chs[3], channels[3], layers[3], *strides[3])
        names, reductions = ("layer1", "layer2", "fuse3", "layer4"), (4, 8, 16, 32)
        for name, num_chs, reduction in zip(names, chs[1:], reductions, strict=True):
            self.feature_info.append(dict(num_chs=num_chs, reduction=min(reduction, output_stride), module=name))
        self.num_features = chs[-1]

        self.global_pool, self.fc = create_classifier(self.num_features, num_classes, pool_type=global_pool, **dd)
        self.head_hidden_size = self.num_features * self.global_pool.feat_mult()

        self.init_weights(zero_init_last)
        set_drop_path(self, drop_path_rate)

    @torch.jit.ignore
    def init_weights(self, zero_init_last: bool = True) -> None:
        """Initialize the weights.

        Args:
            zero_init_last: Whether to zero-initialize the last norm of each block.
        """
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(module, Bottle2neck) and zero_init_last:
                module.zero_init_last()

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Return timm's patterns that group the parameters by depth.

        Args:
            coarse: Whether a group is a stage rather than a block.
        """
        # Both branches have the same depths; 98 and 99 place their sum and the fusing block after their last blocks.
        fine = [
            (r"^layer(\d+)\.big\.(\d+)", None),
            (r"^layer(\d+)\.little\.0\.(\d+)", None),
            (r"^layer(\d+)\.little\.1", (98,)),
            (r"^layer(\d+)\.(\d+)", None),
            (r"^fuse(\d+)", (99,)),
        ]
        return dict(stem=r"^conv1|bn1|stem", blocks=r"^(?:layer|fuse)(\d+)" if coarse else fine)

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        """Return the classifier."""
        return self.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier.

        Args:
            num_classes: Number of classes; 0 for no classifier.
            global_pool: Pooling before the classifier, or None to keep the current one.
        """
        self.num_classes = num_classes
        pool_type = self.global_pool.pool_type if global_pool is None else global_pool
        self.global_pool, self.fc = create_classifier(
            self.num_features, num_classes, pool_type=pool_type, **get_device_dtype(self)
        )
        self.head_hidden_size = self.num_features * self.global_pool.feat_mult()
        self.global_pool.train(self.training)
        self.fc.train(self.training)

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """Compute the last stage's features.

        Args:
            x: Images, (N, in_chans, H, W).

        Returns:
            (N, num_features, ceil(H / 32), ceil(W / 32)).
        """
        if self.grad_checkpointing and not torch.jit.is_scripting():
            return self.forward_checkpointed(x)
        x = self.stem(self.act1(self.bn1(self.conv1(x))))
        x = self.fuse1(self.layer1(x))
        x = self.fuse2(self.layer2(x))
        x = self.fuse3(self.layer3(x))
        return self.layer4(x)

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        """Classify features.

        Args:
            x: The last stage's features, (N, num_features, h, w).
            pre_logits: Whether to stop before the classifier.

        Returns:
            Logits, (N, num_classes), or pooled features, (N, head_hidden_size).
        """
        x = self.global_pool(x)
        if self.drop_rate:
            x = F.dropout(x, p=self.drop_rate, training=self.training)
        return x if pre_logits else self.fc(x)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Classify images.

        Args:
            x: Images, (N, in_chans, H, W).

        Returns:
            Logits, (N, num_classes).
        """
        return self.forward_head(self.forward_features(x))


def _create_biglittle(variant: str, pretrained: bool = False, **kwargs) -> BigLittleNet:
    return build_model(BigLittleNet, variant, pretrained, **kwargs)


default_cfgs = generate_default_cfgs(pretrained_cfgs())


@register_model
def blresnet50(pretrained: bool = False, **kwargs) -> BigLittleNet:
    """bLResNet-50, alpha 2 and beta 4: the baseline, with plain bottlenecks (Table 1)."""
    model_args = dict(layers=(3, 4, 6, 3), base_width=64, block_args=dict(scale=1))
    return _create_biglittle("blresnet50", pretrained, **merge_args(model_args, kwargs))


@register_model
def blres2net50(pretrained: bool = False, **kwargs) -> BigLittleNet:
    """bLRes2Net-50, alpha 2 and beta 4, scale 4 (Table 1).

    The paper does not specify its width; 25 matches the baseline's complexity best.
    """
    model_args = dict(layers=(3, 4, 6, 3), base_width=25, block_args=dict(scale=4))
    return _create_biglittle("blres2net50", pretrained, **merge_args(model_args, kwargs))
