"""A block drawn as it is wired (Eq. 1), and the costs of the model that has it."""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import timm
import torch
from torch import nn

from res2net_zoo.analysis.ablate import IMAGENET_LAYERS
from res2net_zoo.analysis.cost import Field, count, receptive_field
from res2net_zoo.models.block import Res2NetModule
from res2net_zoo.models.cifar import cifar_layers
from res2net_zoo.utils.errors import InputError, one_line

BASES = {"imagenet": "res2net50_26w_4s", "cifar": "res2next29_6c_24w_4s"}
SIZES = {"imagenet": 224, "cifar": 32}


@dataclass(frozen=True)
class Variant:
    """A Res2Net by its dimensions.

    Attributes:
        frame: `imagenet`, a ResNet, or `cifar`, a ResNeXt for images of 32 x 32 pixels.
        depth: Number of layers.
        cardinality: Groups of each 3x3 convolution, c.
        width: Channels of each group of the first stage, w.
        scale: Number of groups of the hierarchy, s.
        wiring: As for `Res2NetModule`.
    """

    frame: str = "imagenet"
    depth: int = 50
    cardinality: int = 1
    width: int = 26
    scale: int = 4
    wiring: str = "official"

    def arguments(self) -> dict[str, Any]:
        """Return the arguments of `timm.create_model` after the name.

        Raises:
            InputError: No model has this depth.
        """
        layers: tuple[int, ...]
        if self.frame == "cifar":
            try:
                layers = cifar_layers(self.depth)
            except ValueError as error:
                raise InputError(str(error)) from error
        elif self.depth in IMAGENET_LAYERS:
            layers = IMAGENET_LAYERS[self.depth]
        else:
            known = ", ".join(map(str, IMAGENET_LAYERS))
            raise InputError(f"a Res2Net for ImageNet has {known} layers, not {self.depth}")
        block = dict(scale=self.scale, wiring=self.wiring)
        return dict(layers=layers, cardinality=self.cardinality, base_width=self.width, block_args=block)

    def build(self) -> nn.Module:
        """Create the model, without trained weights."""
        return timm.create_model(BASES[self.frame], **self.arguments())

    def call(self) -> str:
        """Return the Python code that creates the model."""
        lines = [f"    {name}={value!r},\n" for name, value in self.arguments().items()]
        create = f'model = timm.create_model(\n    "{BASES[self.frame]}",\n{"".join(lines)})'
        return f"import timm\nimport res2net_zoo  # registers the models\n\n{create}\n"


@dataclass(frozen=True)
class Costs:
    """The costs of a variant.

    Attributes:
        parameters: Number of parameters.
        macs: Multiply-accumulates of one image.
        size: Height and width of that image.
        receptive_field: Height and width of the receptive field of the last features, in pixels.
    """

    parameters: int
    macs: int
    size: int
    receptive_field: int


@lru_cache(maxsize=256)
def costs(variant: Variant) -> Costs:
    """Count the costs of a variant, without allocating it.

    Raises:
        InputError: No model has these dimensions.
    """
    size = SIZES[variant.frame]
    try:
        parameters, macs = count(variant.build, (3, size, size))
        with torch.device("meta"):
            field = receptive_field(variant.build())
    except ValueError as error:
        raise InputError(one_line(error)) from error
    return Costs(parameters, macs, size, field)


@dataclass(frozen=True)
class Wiring:
    """What a block computes, read from its modules.

    Attributes:
        in_chs: Channels of the input.
        out_chs: Channels of the output.
        width: Channels of one group.
        scale: Number of groups.
        cardinality: Groups of each 3x3 convolution.
        stride: Its stride.
        hierarchical: Whether each group is added to the next one's input.
        pooled: Whether the group without a convolution is pooled.
        projection: Whether the shortcut is a projection.
    """

    in_chs: int
    out_chs: int
    width: int
    scale: int
    cardinality: int
    stride: int
    hierarchical: bool
    pooled: bool
    projection: bool

    @property
    def fields(self) -> list[int]:
        """Receptive fields of y_1 to y_s in the block's input, in pixels of its map."""
        window = dict(kernel_size=3, stride=self.stride, padding=1, dilation=1)
        field = Field()
        sizes = [field.through(**window) if self.pooled else field]
        for _ in range(max(1, self.scale - 1)):
            sizes.append((field if self.hierarchical else Field()).through(**window))
            field = sizes[-1]
        sizes = sizes if self.scale > 1 else sizes[1:]
        return [size.high - size.low + 1 for size in sizes]


@lru_cache(maxsize=256)
def wiring_of(variant: Variant, first: bool) -> Wiring:
    """Read the wiring of a block of the second stage.

    Args:
        variant: The model.
        first: Whether to read the stage's first block, which halves the resolution, instead of the second.

    Raises:
        InputError: No model has these dimensions.
    """
    try:
        with torch.device("meta"):
            model: Any = variant.build()
    except ValueError as error:
        raise InputError(one_line(error)) from error
    block: Any = model.layer2[0 if first else 1]
    assert isinstance(block, Res2NetModule)
    conv: Any = block.convs[0]
    return Wiring(
        in_chs=block.conv1.in_channels,
        out_chs=block.conv3.out_channels,
        width=conv.in_channels,
        scale=block.scale,
        cardinality=conv.groups,
        stride=conv.stride[0],
        hierarchical=block.hierarchical,
        pooled=not isinstance(block.pool, nn.Identity),
        projection=block.downsample is not None,
    )
