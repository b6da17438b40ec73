"""The Res2Net module (Gao et al., TPAMI 2021, Section 3.1): one wiring for every backbone.

A bottleneck's 3x3 convolution becomes a hierarchy of small ones. The 1x1 convolution's output is
split along channels into `scale` equal groups x_1 ... x_s, and (Eq. 1)

    y_1 = x_1,    y_2 = K_2(x_2),    y_i = K_i(x_i + y_{i-1})    for 2 < i <= s

where K_i is a 3x3 convolution with its norm and activation. The y_i are concatenated and fused by
a second 1x1 convolution. Every published implementation numbers the groups the other way round:
the group that no convolution sees is the last, not the first. So does this one, because weights
depend on it.
"""

import copy
from collections.abc import Callable
from types import NoneType
from typing import Any, Literal, cast, get_args

import torch
import torch.nn.functional as F
from timm.layers import DropPath, create_aa, create_attn
from timm.layers.typing import LayerType
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from res2net_zoo.kernels import fused_norm
from res2net_zoo.kernels.pointwise import pointwise, pointwise_and_shortcut

Wiring = Literal["official", "paddle"]


class Res2NetModule(nn.Module):
    """The Res2Net block, whatever its shortcut is.

    A backbone subclasses it and gives `forward_residual` its own shortcut in `forward`, so that the parameters stand
    under the names that every released checkpoint uses: `conv1 bn1 convs.i bns.i conv3 bn3 se`.

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
            (Section 3.3: squeeze-and-excitation stands there), or None. Anything that timm's
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
        self.relu = act_layer(inplace=True)  # timm's name, under which an activation's parameters stand

    def zero_init_last(self) -> None:
        """Make the block start as its shortcut alone, where the last norm has a weight."""
        weight = getattr(self.bn3, "weight", None)
        if weight is not None:
            nn.init.zeros_(weight)

    @torch.no_grad()
    def reparameterize(self) -> None:
        """Fold the BatchNorms into their convolutions, for inference: what timm's `reparameterize_model` calls."""
        self.conv1, self.bn1 = fold(self.conv1, self.bn1)
        pairs = [fold(conv, bn) for conv, bn in zip(self.convs, self.bns, strict=True)]
        self.convs, self.bns = nn.ModuleList(conv for conv, _ in pairs), nn.ModuleList(bn for _, bn in pairs)
        self.conv3, self.bn3 = fold(self.conv3, self.bn3)

    @torch.no_grad()
    def pad_width(self, multiple: int) -> None:
        """Widen the groups with channels that stay zero, for hardware that computes so many at a time.

        For inference, after `reparameterize`. The output does not change.

        Args:
            multiple: What the width is to be a multiple of. Grouped convolutions are left as they are.
        """
        width = self.conv1.out_channels // self.scale
        more = -width % multiple
        if not more or cast(nn.Conv2d, self.convs[0]).groups > 1 or self.conv1.bias is None:
            return

        def widen(conv: nn.Conv2d, outputs: int, inputs: int) -> nn.Conv2d:
            """Copy a convolution of so many groups of outputs and inputs; 0 leaves their number as it is."""
            weight, bias = conv.weight, conv.bias
            if outputs:
                weight = F.pad(weight.unflatten(0, (outputs, width)), (0, 0) * 3 + (0, more)).flatten(0, 1)
                bias = bias if bias is None else F.pad(bias.unflatten(0, (outputs, width)), (0, more)).flatten()
            if inputs:
                weight = F.pad(weight.unflatten(1, (inputs, width)), (0, 0) * 2 + (0, more)).flatten(1, 2)
            new = copy.copy(conv)
            new._parameters = dict(conv._parameters)
            new.weight, new.bias = nn.Parameter(weight), None if bias is None else nn.Parameter(bias)
            new.out_channels, new.in_channels = weight.shape[:2]
            return new

        self.conv1 = widen(self.conv1, self.scale, 0)
        self.convs = nn.ModuleList(widen(cast(nn.Conv2d, conv), 1, 1) for conv in self.convs)
        self.conv3 = widen(self.conv3, 0, self.scale)

    def forward_residual(self, x: torch.Tensor, shortcut: torch.Tensor, last_act: bool = True) -> torch.Tensor:
        """Compute the block: its branch on x, stochastic depth, the shortcut, the activation.

        Args:
            x: Input, (N, in_chs, H, W); N may be 0.
            shortcut: What the branch is added to, (N, out_chs, ceil(H / stride), ceil(W / stride)).
            last_act: Whether an activation follows.

        Returns:
            As the shortcut.
        """
        if not torch.jit.is_scripting() and self.can_fuse(x):
            return self.forward_fused(x, shortcut, last_act)
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

    @torch.jit.unused
    def can_fuse(self, x: torch.Tensor) -> bool:
        """Whether an input can go through the fused steps, and nobody listens to what they leave out."""
        layers = [self.relu, self.bn1, *self.bns, self.bn3, self.conv1, *self.convs, self.conv3]
        idle = isinstance(self.aa, nn.Identity) and isinstance(self.drop_block, nn.Identity)
        return self.scale > 1 and idle and fused_norm.fits(x) and fused_norm.is_plain(layers)

    @torch.jit.unused
    def forward_fused(self, x: torch.Tensor, shortcut: torch.Tensor, last_act: bool) -> torch.Tensor:
        """Compute the block in fewer steps, in training on a CPU: see `res2net_zoo.kernels`."""
        conv1, conv3 = self.conv1, self.conv3
        plain_end = self.se is not None or not isinstance(self.drop_path, (NoneType, nn.Identity))
        if plain_end:
            x = pointwise(conv3, self.forward_groups_fused(pointwise(conv1, x)))
            return self.forward_end(x, shortcut, last_act)
        if shortcut is x:
            x, shortcut = pointwise_and_shortcut(conv1, x)
        else:
            x = pointwise(conv1, x)
        x = pointwise(conv3, self.forward_groups_fused(x))
        return fused_norm.norm_act(x, cast(nn.BatchNorm2d, self.bn3), relu=last_act, add=shortcut)

    @torch.jit.unused
    def forward_groups_fused(self, x: torch.Tensor) -> torch.Tensor:
        """Compute what `forward_groups` does in fewer steps."""
        bn1, bns = cast(Any, self.bn1), cast(Any, self.bns)
        if self.hierarchical:
            whole, slots = fused_norm.slots(x[:, : x.shape[1] // self.scale], self.scale)
            *groups, last = fused_norm.norm_act_split(x, bn1, self.scale, slots[-1])
        else:
            *groups, last = fused_norm.norm_act_split(x, bn1, self.scale)
            last = self.pool(last)
            whole, slots = fused_norm.slots(last, self.scale)
            last = fused_norm.into_slot(last, slots[-1])
        y, scales = groups[0], []
        for conv, bn, slot, following in zip(self.convs, bns, slots, [*groups[1:], None], strict=False):
            if self.hierarchical and following is not None:
                out, y = fused_norm.norm_act_sum(conv(y), bn, following, slot)
            else:
                out, y = fused_norm.norm_act(conv(y), bn, out=slot), cast(torch.Tensor, following)
            scales.append(out)
        return fused_norm.concatenated(whole, [*scales, last])


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
        if self.downsample is None:
            shortcut = x
        elif torch.jit.is_scripting():
            shortcut = self.downsample(x)
        else:
            shortcut = self.forward_projection(x)
        return self.forward_residual(x, shortcut, self.last_act)

    @torch.jit.unused
    def forward_projection(self, x: torch.Tensor) -> torch.Tensor:
        """Compute the projection shortcut, its norm in fewer steps where that can be."""
        chain = cast(Any, self.downsample)
        last_two = list(chain.children())[-2:]
        if len(last_two) < 2 or not fused_norm.fits(x) or not fused_norm.is_plain([chain, *last_two]):
            return chain(x)
        return fused_norm.norm_act(chain[:-1](x), last_two[1], relu=False)


def fold(conv: Any, norm: Any) -> tuple[Any, Any]:
    """Return a convolution that does what two layers did, and an identity; other norms than BatchNorm stay."""
    if not isinstance(norm, nn.BatchNorm2d) or norm.running_mean is None:
        return conv, norm
    return fuse_conv_bn_eval(conv.eval(), norm.eval()), nn.Identity()


def set_drop_path(model: nn.Module, rate: float) -> None:
    """Give a model stochastic depth, growing linearly from 0 in its first Res2Net block to `rate` in its last.

    For backbones that do not build their blocks one after the other, as timm's `ResNet` does.

    Args:
        model: The model; its blocks have a `drop_path`.
        rate: Probability of dropping the last block's branch.
    """
    blocks: list[Any] = [module for module in model.modules() if isinstance(module, Res2NetModule)]
    for i, block in enumerate(blocks):
        block.drop_path = DropPath(rate * i / (len(blocks) - 1)) if rate and i else None


def merge_args(model_args: dict[str, Any], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return a variant's arguments with a caller's over them.

    A caller's `block_args` add to the variant's: in their place, they would take its scale and wiring
    away, and the weights would load and compute something else.

    Args:
        model_args: What makes the variant.
        kwargs: What the caller of `timm.create_model` gave.
    """
    block_args = {**model_args.get("block_args", {}), **(kwargs.get("block_args") or {})}
    return {**model_args, **kwargs, "block_args": block_args}
