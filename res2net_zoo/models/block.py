"""The Res2Net module (Gao et al., TPAMI 2021, Section 3.1): one wiring for every backbone.

A bottleneck's 3x3 convolution becomes a hierarchy of small ones. The 1x1 convolution's output is
split along channels into `scale` equal groups x_1 ... x_s, and (Eq. 1)

    y_1 = x_1,    y_2 = K_2(x_2),    y_i = K_i(x_i + y_{i-1})    for 2 < i <= s

where K_i is a 3x3 convolution with its norm and activation. The y_i are concatenated and fused by
a second 1x1 convolution. Every published implementation numbers the groups the other way round:
the group that no convolution sees is the last, not the first. So does this one, because weights
depend on it.
"""

from collections.abc import Callable
from typing import Any, Literal, get_args

import torch
from timm.layers import create_aa, create_attn
from timm.layers.typing import LayerType
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

Wiring = Literal["official", "paddle"]


class Res2NetModule(nn.Module):
    """The Res2Net block, for any shortcut.

    A backbone subclasses it and gives `forward_residual` its own shortcut in `forward`, so that the parameters have
    the names that every released checkpoint uses: `conv1 bn1 convs.i bns.i conv3 bn3 se`.

    Two wirings are in circulation; they have the same parameters and compute different things.
    They differ in how a block that changes the size or number of channels treats the hierarchy:

    - `"official"` (the authors, timm, MindCV): a block with a stride or a projection shortcut, so
      the first one of every stage, has no additions between the groups, and the last group goes
      through a 3x3 average pooling, which counts the zero padding in.
    - `"paddle"` (PaddleClas): only a block with a stride does. The first block of the network,
      stride 1 with a projection shortcut, keeps the additions and passes the last group on as it
      is. The pooling leaves the zero padding out of the average.

    In both, trading a stage's stride for dilation (`output_stride` 8 or 16) changes nothing but
    the resolution.

    Args:
        in_chs: Channels of the input.
        width: Channels of one group, w in the paper.
        out_chs: Channels of the output.
        scale: Number of groups, s in the paper. With 1 the branch is a plain bottleneck's.
        cardinality: Groups of each 3x3 convolution, c in the paper (Section 3.3).
        stride: Stride of the 3x3 convolutions.
        dilation: Dilation of the block's stage.
        first_dilation: Dilation of the 3x3 convolutions, where it differs from the stage's: in
            the first block of a stage that trades its stride for dilation. Default `dilation`.
        projection: Whether the block's shortcut is a projection.
        wiring: Whose hierarchy, see above.
        act_layer: Activation, called with `inplace=True`.
        norm_layer: Normalization, called with the number of channels.
        attn_layer: Channel attention on the branch's output, right before the residual addition
            (Section 3.3 places squeeze-and-excitation there), or None. Anything that timm's
            `create_attn` takes.
        aa_layer: Anti-aliased downsampling after the 3x3 convolutions, which then keep stride 1,
            or None. Used only where the block downsamples.
        drop_block: Makes the DropBlock layer of the concatenated groups, or None.
        drop_path: Stochastic depth of the branch, or None.
        device: Where to put the parameters.
        dtype: Type of the parameters.

    Raises:
        ValueError: An argument that no Res2Net block can have.
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
        if scale < 1:
            raise ValueError(f"scale is {scale}; a Res2Net block has at least one group")
        if width < 1 or width % cardinality:
            raise ValueError(f"{width} channels a group do not divide into cardinality {cardinality}")
        if wiring not in get_args(Wiring):
            raise ValueError(f"unknown wiring {wiring!r}; there are {', '.join(get_args(Wiring))}")
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        first_dilation = first_dilation or dilation
        # A stage that trades its stride for dilation gives its first block another dilation than
        # the rest, the only sign by which that block can tell that it used to downsample.
        downsamples = stride > 1 or first_dilation != dilation
        use_aa = aa_layer is not None and downsamples
        num_convs = max(1, scale - 1)

        self.scale = scale
        self.hierarchical = not (downsamples or (projection and wiring == "official"))

        self.conv1 = nn.Conv2d(in_chs, width * scale, kernel_size=1, bias=False, **dd)
        self.bn1 = norm_layer(width * scale, **dd)
        self.convs = nn.ModuleList(
            nn.Conv2d(
                width,
                width,
                kernel_size=3,
                stride=1 if use_aa else stride,
                padding=first_dilation,
                dilation=first_dilation,
                groups=cardinality,
                bias=False,
                **dd,
            )
            for _ in range(num_convs)
        )
        self.bns = nn.ModuleList(norm_layer(width, **dd) for _ in range(num_convs))
        self.aa: Any = create_aa(aa_layer or "", width, stride, enable=use_aa, **dd)
        self.pool: nn.Module
        if scale > 1 and not self.hierarchical:
            self.pool = nn.AvgPool2d(3, stride, padding=1, count_include_pad=wiring == "official")
        else:
            self.pool = nn.Identity()
        self.drop_block = drop_block() if drop_block is not None else nn.Identity()
        self.conv3 = nn.Conv2d(width * scale, out_chs, kernel_size=1, bias=False, **dd)
        self.bn3 = norm_layer(out_chs, **dd)
        self.se = create_attn(attn_layer, out_chs, **dd) if attn_layer else None
        self.drop_path = drop_path
        self.relu = act_layer(inplace=True)  # timm's name, which prefixes an activation's parameters

    def zero_init_last(self) -> None:
        """Make the block start as its shortcut alone, where the last norm has a weight."""
        weight = getattr(self.bn3, "weight", None)
        if weight is not None:
            nn.init.zeros_(weight)

    def forward_residual(self, x: torch.Tensor, shortcut: torch.Tensor, last_act: bool = True) -> torch.Tensor:
        """Compute the block: its branch on x, stochastic depth, the shortcut, the activation.

        Args:
            x: Input, (N, in_chs, H, W); N may be 0.
            shortcut: What the branch is added to, (N, out_chs, ceil(H / stride), ceil(W / stride)).
            last_act: Whether an activation follows.

        Returns:
            As the shortcut.
        """
        x = self.conv3(self.forward_groups(self.conv1(x)))
        return self.forward_end(x, shortcut, last_act)

    def forward_end(self, x: torch.Tensor, shortcut: torch.Tensor, last_act: bool) -> torch.Tensor:
        """Compute what follows conv3."""
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
    """The Res2Net block of a ResNet, with the interface that timm's `ResNet` asks of a block.

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
        last_act: Whether an activation follows the residual addition.
        **kwargs: As for `Res2NetModule`.

    Raises:
        ValueError: An argument that no Res2Net block can have.
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
            raise ValueError(
                f"block_reduce_first is {reduce_first}; a Res2Net block's width is set by base_width alone"
            )
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
        shortcut = x if self.downsample is None else self.downsample(x)
        return self.forward_residual(x, shortcut, self.last_act)


def fold(conv: Any, norm: Any) -> tuple[Any, Any]:
    """Return a convolution that computes a convolution and its BatchNorm, and an identity; keep any other norm."""
    if not isinstance(norm, nn.BatchNorm2d) or norm.running_mean is None:
        return conv, norm
    return fuse_conv_bn_eval(conv.eval(), norm.eval()), nn.Identity()
