"""The Res2Net module (Gao et al., TPAMI 2021, Section 3.1): one block for every backbone.

A bottleneck's 3x3 convolution becomes a hierarchy of small ones. The 1x1 convolution's output is
split along channels into `scale` equal groups x_1 ... x_s, and (Eq. 1)

    y_1 = x_1,    y_2 = K_2(x_2),    y_i = K_i(x_i + y_{i-1})    for 2 < i <= s

where K_i is a 3x3 convolution with its norm and activation. The y_i are concatenated and fused by
a second 1x1 convolution. Every published implementation reverses the order of the groups: the last group, not the
first, has no convolution. This implementation follows them, because weights depend on the order.
"""

from collections.abc import Callable
from typing import Any, Literal, get_args

import torch
from timm.layers import create_aa, create_attn
from timm.layers.typing import LayerType
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

Wiring = Literal["official", "paddle", "mmdet"]


class Res2NetModule(nn.Module):
    """The Res2Net block, for any shortcut.

    A backbone subclasses it and passes its own shortcut to `forward_residual` or `forward_end` in `forward`, so that
    the parameters have the names that every released checkpoint uses: `conv1 bn1 convs.i bns.i conv3 bn3 se`.

    Three wirings exist, with the same parameters but different results. They differ in the blocks that change the
    resolution or the number of channels:

    - `"official"` (the authors, timm, MindCV, MMPretrain): a block with a stride or a projection shortcut, that is, the
      first block of every stage, has no additions between the groups, and applies a 3x3 average pooling, including the
      zero padding, to the last group.
    - `"paddle"` (PaddleClas): this applies only to blocks with a stride. The first block of the network, with stride 1
      and a projection shortcut, keeps the additions and does not pool the last group. The pooling excludes the zero
      padding.
    - `"mmdet"` (MMDetection): the first block of every stage has no additions, as in `"official"`, but pools the last
      group only if it has a stride. With stride 1, as in the first stage and in dilated ones, it does not pool.

    Replacing a stage's stride by dilation changes only the resolution, and in `"mmdet"` the pooling of the last group.

    Args:
        in_chs: Channels of the input.
        width: Channels of one group, w in the paper.
        out_chs: Channels of the output.
        scale: Number of groups, s in the paper. With 1 the block is a plain bottleneck.
        cardinality: Groups of each 3x3 convolution, c in the paper (Section 3.3).
        stride: Stride of the 3x3 convolutions.
        dilation: Dilation of the block's stage.
        first_dilation: Dilation of the 3x3 convolutions if it differs from the stage's, as in the first block of a
            stage whose stride is replaced by dilation; defaults to `dilation`.
        downsamples: Whether the block has a stride, possibly replaced by dilation; by default, whether it has a
            stride or `first_dilation` differs from `dilation`.
        projection: Whether the block's shortcut is a projection.
        wiring: Wiring of the hierarchy, see above.
        act_layer: Activation, called with `inplace=True`.
        norm_layer: Normalization, called with the number of channels.
        attn_layer: Channel attention on the branch's output, right before the residual addition
            (as squeeze-and-excitation in Section 3.3), in any form that timm's `create_attn` accepts; or None.
        aa_layer: Anti-aliased downsampling after the 3x3 convolutions, which then keep stride 1,
            or None. Used only if the block downsamples.
        drop_block: Creates the DropBlock layer of the concatenated groups, or None.
        drop_path: Stochastic depth of the branch, or None.
        device: Device of the parameters.
        dtype: Type of the parameters.

    Raises:
        ValueError: An argument is invalid.
    """

    def __init__(
        self,
        in_chs: int,
        width: int,
        out_chs: int,
        *,
        scale: int = 4,
        cardinality: int = 1,
        stride: int = 1,
        dilation: int = 1,
        first_dilation: int | None = None,
        downsamples: bool | None = None,
        projection: bool = False,
        wiring: Wiring = "official",
        act_layer: Callable[..., nn.Module] = nn.ReLU,
        norm_layer: Callable[..., nn.Module] = nn.BatchNorm2d,
        attn_layer: LayerType | None = None,
        aa_layer: LayerType | None = None,
        drop_block: Callable[..., nn.Module] | None = None,
        drop_path: nn.Module | None = None,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_groups(width, scale, cardinality, wiring)
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        first_dilation = first_dilation or dilation
        # If timm replaces a stage's stride by dilation, `first_dilation` differs from `dilation` only in the block that
        # would otherwise downsample.
        downsamples = downsamples or stride > 1 or first_dilation != dilation
        use_aa = aa_layer is not None and downsamples
        num_convs = max(1, scale - 1)

        self.scale = scale
        self.wiring = wiring
        self.hierarchical = not (downsamples or (projection and wiring != "paddle"))

        self.conv1 = nn.Conv2d(in_chs, width * scale, kernel_size=1, bias=False, **dd)
        self.bn1 = norm_layer(width * scale, **dd)
        conv_args: Any = dict(
            stride=1 if use_aa else stride, padding=first_dilation, dilation=first_dilation, groups=cardinality
        )
        self.convs = nn.ModuleList(
            nn.Conv2d(width, width, kernel_size=3, bias=False, **conv_args, **dd) for _ in range(num_convs)
        )
        self.bns = nn.ModuleList(norm_layer(width, **dd) for _ in range(num_convs))
        self.aa: Any = create_aa(aa_layer or "", width, stride, enable=use_aa, **dd)
        self.pool: nn.Module
        if scale > 1 and not self.hierarchical and (stride > 1 or wiring != "mmdet"):
            self.pool = nn.AvgPool2d(3, stride, padding=1, count_include_pad=wiring != "paddle")
        else:
            self.pool = nn.Identity()
        self.drop_block = drop_block() if drop_block is not None else nn.Identity()
        self.conv3 = nn.Conv2d(width * scale, out_chs, kernel_size=1, bias=False, **dd)
        self.bn3 = norm_layer(out_chs, **dd)
        self.se = create_attn(attn_layer, out_chs, **dd) if attn_layer else None
        self.drop_path = drop_path
        self.relu = act_layer(inplace=True)  # timm's name, which prefixes an activation's parameters

    def zero_init_last(self) -> None:
        """Zero-initialize the weight of the last norm, if it has one, so that the block returns its shortcut."""
        weight = getattr(self.bn3, "weight", None)
        if weight is not None:
            nn.init.zeros_(weight)

    def forward_residual(self, x: torch.Tensor, shortcut: torch.Tensor, last_act: bool = True) -> torch.Tensor:
        """Compute the block: its branch on x, stochastic depth, the shortcut, the activation.

        Args:
            x: Input, (N, in_chs, H, W); N may be 0.
            shortcut: Output of the shortcut, (N, out_chs, ceil(H / stride), ceil(W / stride)).
            last_act: Whether to apply the activation.

        Returns:
            The output of the block, of the same shape as the shortcut.
        """
        x = self.conv3(self.forward_groups(self.conv1(x)))
        return self.forward_end(x, shortcut, last_act)

    def forward_end(self, x: torch.Tensor, shortcut: torch.Tensor, last_act: bool) -> torch.Tensor:
        """Compute the part of the block after conv3."""
        x = self.bn3(x)
        if self.se is not None:
            x = self.se(x)
        if self.drop_path is not None:
            x = self.drop_path(x)
        x += shortcut
        return self.relu(x) if last_act else x

    def forward_groups(self, x: torch.Tensor) -> torch.Tensor:
        """Compute the hierarchy of Eq. 1, from the output of conv1 to the input of conv3."""
        x = self.relu(self.bn1(x))
        groups = torch.chunk(x, self.scale, dim=1)
        y = groups[0]
        scales: list[torch.Tensor] = []
        for i, (conv, bn) in enumerate(zip(self.convs, self.bns, strict=True)):
            if i > 0:
                y = y + groups[i] if self.hierarchical else groups[i]
            y = self.aa(self.relu(bn(conv(y))))
            scales.append(y)
        if self.scale > 1:
            scales.append(self.pool(groups[-1]))
        return self.drop_block(torch.cat(scales, dim=1))

    @torch.no_grad()
    def reparameterize(self) -> None:
        """Fold each BatchNorm into its convolution, for inference. timm's `reparameterize_model` calls this method."""
        self.conv1, self.bn1 = fold(self.conv1, self.bn1)
        pairs = [fold(conv, bn) for conv, bn in zip(self.convs, self.bns, strict=True)]
        self.convs, self.bns = nn.ModuleList(conv for conv, _ in pairs), nn.ModuleList(bn for _, bn in pairs)
        self.conv3, self.bn3 = fold(self.conv3, self.bn3)


class Bottle2neck(Res2NetModule):
    """The Res2Net block of a ResNet, with the interface of a block in timm's `ResNet`.

    Args:
        inplanes: Channels of the input.
        planes: Base width; the output has `planes * expansion` channels.
        stride: Stride of the 3x3 convolutions.
        downsample: Projection shortcut, or None for the identity.
        cardinality: Groups of each 3x3 convolution.
        base_width: Channels of one group, per group of the convolutions, in a stage of 64 planes:
            26 for a 26w model.
        scale: Number of groups.
        reduce_first: Must be 1; timm's `ResNet` passes it to every block.
        drop_path: Stochastic depth of the residual branch, or None.
        last_act: Whether to apply the activation after the residual addition.
        **kwargs: Arguments of `Res2NetModule`.

    Raises:
        ValueError: An argument is invalid.
    """

    expansion = 4

    def __init__(
        self,
        inplanes: int,
        planes: int,
        stride: int = 1,
        downsample: nn.Module | None = None,
        cardinality: int = 1,
        base_width: int = 26,
        scale: int = 4,
        reduce_first: int = 1,
        drop_path: nn.Module | None = None,
        last_act: bool = True,
        **kwargs,
    ) -> None:
        if reduce_first != 1:
            raise ValueError(f"block_reduce_first is {reduce_first}; it must be 1: base_width sets a block's width")
        super().__init__(
            inplanes,
            int(planes * base_width / 64) * cardinality,
            planes * self.expansion,
            scale=scale,
            cardinality=cardinality,
            stride=stride,
            projection=downsample is not None,
            drop_path=drop_path,
            **kwargs,
        )
        self.downsample = downsample
        self.last_act = last_act

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Apply the block.

        Args:
            x: Input, (N, inplanes, H, W); N may be 0.

        Returns:
            (N, planes * 4, ceil(H / stride), ceil(W / stride)).
        """
        out = self.conv3(self.forward_groups(self.conv1(x)))
        # Last, as in the authors' and MMDetection's code: the order in which gradients are added determines rounding.
        shortcut = x if self.downsample is None else self.downsample(x)
        return self.forward_end(out, shortcut, self.last_act)


def check_groups(width: int, scale: int, cardinality: int, wiring: str) -> None:
    """Check the arguments of a block's groups.

    Raises:
        ValueError: An argument is invalid.
    """
    if scale < 1:
        raise ValueError(f"scale is {scale}; it must be at least 1")
    if width < 1 or width % cardinality:
        raise ValueError(f"{width} channels per group are not divisible by cardinality {cardinality}")
    if wiring not in get_args(Wiring):
        raise ValueError(f"wiring is {wiring!r}; it must be one of {', '.join(get_args(Wiring))}")


def fold(conv: Any, norm: Any) -> tuple[Any, Any]:
    """Fold a BatchNorm into its convolution, and return the convolution and an identity; other norms are kept."""
    if not isinstance(norm, nn.BatchNorm2d) or norm.running_mean is None:
        return conv, norm
    return fuse_conv_bn_eval(conv.eval(), norm.eval()), nn.Identity()
