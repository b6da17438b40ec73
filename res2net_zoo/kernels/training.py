"""Faster training on CPUs: fused steps for the blocks and the stem of a model, see `accelerate_training`.

The classes compute the same as those in `res2net_zoo.models`: with the steps of `fused_norm` and `pointwise` if `fits`
and `is_plain` return True, and otherwise, for example in evaluation, with the same PyTorch operations.
"""

from types import NoneType
from typing import Any, TypeVar, cast

import torch
from timm.models import checkpoint_seq
from torch import nn

from res2net_zoo.kernels.fused_norm import (
    concatenated,
    fits,
    into_slot,
    is_plain,
    library,
    norm_act,
    norm_act_split,
    norm_act_sum,
    slots,
)
from res2net_zoo.kernels.pointwise import pointwise, pointwise_and_shortcut
from res2net_zoo.models.block import Bottle2neck, Res2NetModule
from res2net_zoo.models.dla import DlaBottle2neck
from res2net_zoo.models.res2net import Res2Net

Model = TypeVar("Model", bound=nn.Module)


def accelerate_training(model: Model) -> Model:
    """Make a model train faster on the CPU, in place. Results differ from PyTorch's only by rounding.

    Parameters, state-dict keys and hooks do not change: the class of each Res2Net block and stem becomes a subclass.
    Evaluation, GPUs, and compiled, exported or scripted models are not affected. The speed-up applies to models in
    `channels_last` with BatchNorm and ReLU, in float32 and bfloat16.

    If needed, the call compiles the C++ steps, which takes several seconds. Without a C++ compiler, the model is not
    changed, and a warning gives the reason. The call is idempotent. A process that unpickles such a model must call
    it again; until then, the model trains in plain PyTorch.

    Args:
        model: A model with parameters on the CPU; other models are not changed. It can be wrapped, for example in
            `DistributedDataParallel`, or contain a backbone of the zoo.

    Returns:
        The model.
    """
    on_cpu = any(parameter.device.type == "cpu" for parameter in model.parameters())
    modules = [module for module in model.modules() if type(module) in (*FUSED, *FUSED.values())] if on_cpu else []
    if modules and library() is not None:
        for module in modules:
            module.__class__ = FUSED.get(type(module), type(module))
    return model


class FusedBlock(Res2NetModule):
    """A Res2Net block whose training step on a CPU needs fewer passes over memory."""

    def forward_residual(self, x: torch.Tensor, shortcut: torch.Tensor, last_act: bool = True) -> torch.Tensor:
        """Compute the block, see `Res2NetModule`."""
        if not torch.jit.is_scripting() and self.can_fuse(x):
            return self.forward_fused(x, shortcut, last_act)
        # TorchScript does not support super().
        x = self.conv3(self.forward_groups(self.conv1(x)))
        return self.forward_end(x, shortcut, last_act)

    @torch.jit.unused
    def can_fuse(self, x: torch.Tensor) -> bool:
        """Whether the fused steps support an input and the block's layers, which have no hooks attached."""
        layers = [self.relu, self.bn1, *self.bns, self.bn3, self.conv1, *self.convs, self.conv3]
        idle = isinstance(self.aa, nn.Identity) and isinstance(self.drop_block, nn.Identity)
        return self.scale > 1 and idle and fits(x) and is_plain(layers)

    @torch.jit.unused
    def forward_fused(self, x: torch.Tensor, shortcut: torch.Tensor, last_act: bool) -> torch.Tensor:
        """Compute the block with fused steps."""
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
        return norm_act(x, cast(nn.BatchNorm2d, self.bn3), relu=last_act, add=shortcut)

    @torch.jit.unused
    def forward_groups_fused(self, x: torch.Tensor) -> torch.Tensor:
        """Compute `forward_groups` with fused steps."""
        bn1, bns = cast(Any, self.bn1), cast(Any, self.bns)
        if self.hierarchical:
            whole, places = slots(x[:, : x.shape[1] // self.scale], self.scale)
            *groups, last = norm_act_split(x, bn1, self.scale, places[-1])
        else:
            *groups, last = norm_act_split(x, bn1, self.scale)
            last = self.pool(last)
            whole, places = slots(last, self.scale)
            last = into_slot(last, places[-1])
        y, scales = groups[0], []
        for conv, bn, place, following in zip(self.convs, bns, places, [*groups[1:], None], strict=False):
            if self.hierarchical and following is not None:
                out, y = norm_act_sum(conv(y), bn, following, place)
            else:
                out, y = norm_act(conv(y), bn, out=place), cast(torch.Tensor, following)
            scales.append(out)
        return concatenated(whole, [*scales, last])


class FusedBottle2neck(FusedBlock, Bottle2neck):
    """The block of a ResNet, including a fused norm of its shortcut."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Apply the block, see `Bottle2neck`."""
        if self.downsample is None:
            shortcut = x
        elif torch.jit.is_scripting():
            shortcut = self.downsample(x)
        else:
            shortcut = self.forward_projection(x)
        return self.forward_residual(x, shortcut, self.last_act)

    @torch.jit.unused
    def forward_projection(self, x: torch.Tensor) -> torch.Tensor:
        """Compute the projection shortcut."""
        chain = cast(Any, self.downsample)
        last_two = list(chain.children())[-2:]
        if len(last_two) < 2 or not fits(x) or not is_plain([chain, *last_two]):
            return chain(x)
        return norm_act(chain[:-1](x), last_two[1], relu=False)


class FusedDlaBottle2neck(FusedBlock, DlaBottle2neck):
    """The block of a DLA."""


class FusedRes2Net(Res2Net):
    """A ResNet with a fused norm and activation in its stem."""

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """Compute the features of the last stage, see timm's `ResNet`."""
        x = self.maxpool(self.forward_stem(self.conv1(x)))
        if self.grad_checkpointing and not torch.jit.is_scripting():
            return checkpoint_seq([self.layer1, self.layer2, self.layer3, self.layer4], x, flatten=True)
        return self.layer4(self.layer3(self.layer2(self.layer1(x))))  # type: ignore[operator]

    def forward_stem(self, x: torch.Tensor) -> torch.Tensor:
        """Normalize and activate the output of conv1."""
        if not torch.jit.is_scripting() and self.can_fuse_stem(x):
            return norm_act(x, cast(nn.BatchNorm2d, self.bn1))
        return self.act1(self.bn1(x))

    @torch.jit.unused
    def can_fuse_stem(self, x: torch.Tensor) -> bool:
        """Whether the fused step supports conv1's output and the stem's layers, which have no hooks attached."""
        convs = [self.conv1, self.conv1[-1]] if isinstance(self.conv1, nn.Sequential) else [self.conv1]
        return fits(x) and isinstance(self.act1, nn.ReLU) and is_plain([*convs, self.bn1, self.act1])


FUSED: dict[type[nn.Module], type[nn.Module]] = {
    Bottle2neck: FusedBottle2neck,
    DlaBottle2neck: FusedDlaBottle2neck,
    Res2Net: FusedRes2Net,
}
