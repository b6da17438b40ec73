"""The interface of the authors' code, for projects that contain a copy of it.

`from res2net_zoo.originals import res2net50_v1b_26w_4s` replaces the import from a copied `res2net_v1b.py`,
`res2net.py`, `res2next.py` or `dla.py`. The functions have the authors' names and signatures. They return models of the
zoo whose children, state-dict keys and attributes have the authors' names and order, with the same output and
initialization.
"""

import copy
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any, cast

import timm
import torch
import torch.nn.functional as F
from timm.layers import SelectAdaptivePool2d
from timm.models import checkpoint_seq
from timm.models.dla import DlaTree
from timm.models.resnet import downsample_avg, downsample_conv
from torch import nn

from res2net_zoo import catalog
from res2net_zoo.models import dla, res2net
from res2net_zoo.models._pooling import WindowAvgPool2d
from res2net_zoo.models.block import Bottle2neck as ZooBottle2neck
from res2net_zoo.models.block import Res2NetModule
from res2net_zoo.utils.private_apis import update_model_args
from res2net_zoo.weights.authors import ARCHITECTURES
from res2net_zoo.weights.convert import UNREAD_BY_DLA, convert

__all__ = ["DLA", "Bottle2neck", "Res2Net", "model_urls", *ARCHITECTURES]

# The original files by function, for code that downloads them itself.
model_urls = {
    name: checkpoint.url
    for name, architecture in ARCHITECTURES.items()
    if (checkpoint := catalog.load().checkpoint(architecture)) and checkpoint.url
}

# Other names of the attributes: timm's, and that of the max pooling in the authors' Res2NeXt.
AUTHORS_ATTRIBUTES = {"act1": "relu", "global_pool": "avgpool", "maxpool1": "maxpool"}

# Arguments that are not recorded for rebuilding the model from a folder.
NOT_RECORDED = {"maps", "return_levels", "cache_dir", "pretrained_cfg", "pretrained_cfg_overlay", "device", "dtype"}

# Arguments with which copies of the authors' file dilate the network, each in its own way.
AMBIGUOUS = ("output_stride", "dilation", "dilated", "grid", "replace_stride_with_dilation", "os")


class _AuthorsNames:
    """Stores timm's `act1` and `global_pool` under the authors' names `relu` and `avgpool`; both names can be read.

    The pooling keeps both spatial dimensions, and `forward_head` flattens.
    """

    has_window = True  # whether the average pooling is that of the authors' Res2NeXt and DLA

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(AUTHORS_ATTRIBUTES.get(name, name), value)

    def __getattr__(self, name: str) -> Any:
        return super().__getattr__(AUTHORS_ATTRIBUTES.get(name, name))  # type: ignore[misc]

    def reset_pooling(self, pool_type: str) -> None:
        """Set the global pooling.

        Args:
            pool_type: The pooling, as for timm's `SelectAdaptivePool2d`; `""` for none.
        """
        pooling: Any = SelectAdaptivePool2d(pool_type=pool_type, flatten=False)
        if pool_type == "avg":
            pooling = WindowAvgPool2d() if self.has_window else nn.AdaptiveAvgPool2d(1)
        pooling.pool_type = pool_type  # which timm's `reset_classifier` reads
        self.avgpool = pooling.train(self.training)
        self.is_pooled = bool(pool_type)


class Bottle2neck(ZooBottle2neck):
    """The zoo's block with the constructor and the attributes of the authors'.

    Args:
        inplanes: Channels of the input.
        planes: Base width; the output has `planes * expansion` channels.
        stride: Stride of the 3x3 convolutions.
        downsample: Projection shortcut, or None for the identity.
        baseWidth: Channels of one group in a stage of 64 planes.
        scale: Number of groups.
        stype: `"stage"` for the first block of a stage, which has no additions between the groups and pools the last
            one; `"normal"` for the others.

    Raises:
        TypeError: `downsample` is not a module, for example because a copy of the authors' file takes a dilation there.
    """

    def __init__(
        self,
        inplanes: int,
        planes: int,
        stride: int = 1,
        downsample: nn.Module | None = None,
        baseWidth: int = 26,
        scale: int = 4,
        stype: str = "normal",
    ) -> None:
        if not isinstance(downsample, nn.Module | None):
            raise TypeError(
                f"downsample is {downsample!r}; it must be a module or None: for copies of the authors' file that take "
                "a dilation there, use Res2Net's strides, dilations and multi_grid"
            )
        Res2NetModule.__init__(
            self,
            inplanes,
            int(planes * baseWidth / 64),
            planes * self.expansion,
            scale=scale,
            stride=stride,
            projection=stype == "stage",
        )
        self.downsample = downsample
        self.last_act = True

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore a block, or one of the authors' class from a pickled model."""
        if "hierarchical" not in state:
            absent = {name: nn.Identity() for name in ("pool", "aa", "drop_block")}
            added = dict(
                wiring="official", hierarchical=state["stype"] == "normal", last_act=True, se=None, drop_path=None
            )
            state = {**state, **added, "_modules": {**absent, **state["_modules"]}}
        super().__setstate__(state)

    @property
    def width(self) -> int:
        """Channels of one group."""
        return self.conv1.out_channels // self.scale

    @property
    def nums(self) -> int:
        """Number of 3x3 convolutions."""
        return len(self.convs)

    @property
    def stype(self) -> str:
        """`"stage"` or `"normal"`."""
        return "normal" if self.hierarchical else "stage"


class _Block(Bottle2neck):
    """The authors' block with the constructor that timm's `ResNet` calls."""

    __init__ = ZooBottle2neck.__init__


class Res2Net(_AuthorsNames, res2net.Res2Net):
    """The zoo's Res2Net with the constructor and the attributes of the authors'.

    Its children are `conv1 bn1 relu maxpool layer1 layer2 layer3 layer4 avgpool fc`. In a v1b model `relu` is not
    in place. `avgpool` keeps both spatial dimensions. The last BatchNorm of a block starts at 1.

    Args:
        block: `Bottle2neck`.
        layers: Number of blocks of each stage.
        baseWidth: Channels of one group in the first stage.
        scale: Number of groups.
        num_classes: Number of classes; 0 for no classifier.
        v1b: Whether it is the model of the authors' `res2net_v1b.py`, with three 3x3 convolutions as its stem and
            average pooling in the shortcuts, or that of `res2net.py`.
        maps: Stages whose maps `forward` returns as a list, in this order, in place of logits: 1 to 4, and 0 for the
            stem's map after its pooling, which has the size of stage 1's.
        **kwargs: Arguments of the zoo's Res2Net, such as `strides`, `dilations`, `multi_grid` and `dilation_rule`.

    Raises:
        TypeError: An argument means different things in copies of the authors' file, or `block` is another class.
        ValueError: An argument is invalid.
    """

    def __init__(
        self,
        block: Any,
        layers: Sequence[int],
        baseWidth: int = 26,
        scale: int = 4,
        num_classes: int = 1000,
        *,
        v1b: bool = True,
        maps: Sequence[int] | None = None,
        **kwargs,
    ) -> None:
        refuse_ambiguous(kwargs)
        if block is not Bottle2neck:
            raise TypeError(f"block is {block!r}; it must be res2net_zoo.originals.Bottle2neck")
        arguments = {"base_width": baseWidth, "zero_init_last": False, **(res2net.DEEP if v1b else {}), **kwargs}
        arguments["block_args"] = {"scale": scale, **(kwargs.get("block_args") or {})}
        pool_type = arguments.pop("global_pool", "avg")
        super().__init__(_Block, tuple(layers), num_classes=num_classes, global_pool=pool_type, **arguments)
        self.has_window = arguments.get("cardinality", 1) > 1
        self.reset_pooling(pool_type)
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            pool_every_projection(stage[0].downsample)
        self.relu.inplace = not v1b
        self.feature_info[0]["module"] = "relu"
        self.maps = None if maps is None else checked_maps(maps, 4)
        self.v1b, self.inplanes = v1b, self.num_features
        self.baseWidth, self.scale = arguments["base_width"], arguments["block_args"]["scale"]

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore a model, or a pickled one of the authors' class."""
        if "maps" not in state:
            added = dict(maps=None, has_window=False, is_pooled=True, drop_rate=0.0, grad_checkpointing=False)
            state = {"v1b": isinstance(state["_modules"]["conv1"], nn.Sequential), **added, **state}
        super().__setstate__(state)

    def _make_layer(self, block: Any, planes: int, blocks: int, stride: int = 1) -> nn.Sequential:
        """Create another stage, as the authors' method of this name does for subclasses of their model.

        Args:
            block: `Bottle2neck`.
            planes: Base width.
            blocks: Number of blocks.
            stride: Stride of the first block.
        """
        outputs = planes * block.expansion
        shortcut = None
        if stride != 1 or self.inplanes != outputs:
            create = downsample_avg if self.v1b else downsample_conv
            shortcut = create(self.inplanes, outputs, kernel_size=1, stride=stride)
        sizes = dict(baseWidth=self.baseWidth, scale=self.scale)
        first = block(self.inplanes, planes, stride, shortcut, stype="stage", **sizes)
        self.inplanes = outputs
        return nn.Sequential(first, *(block(outputs, planes, **sizes) for _ in range(1, blocks)))

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier, see timm's `ResNet`."""
        super().reset_classifier(num_classes, global_pool)
        self.reset_pooling(self.avgpool.pool_type)

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """Compute the last stage's map, (N, num_features, H / 32, W / 32)."""
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        if self.grad_checkpointing and not torch.jit.is_scripting():
            return checkpoint_seq([self.layer1, self.layer2, self.layer3, self.layer4], x, flatten=True)
        return self.layer4(self.layer3(self.layer2(self.layer1(x))))

    def forward_maps(self, x: torch.Tensor) -> list[torch.Tensor]:
        """Compute the maps that `maps` selects.

        Args:
            x: Images, (N, in_chans, H, W).

        Returns:
            The maps, each (N, C, h, w), in the order of `maps`.
        """
        chosen = cast(tuple[int, ...], self.maps)
        found = [self.maxpool(self.relu(self.bn1(self.conv1(x))))]
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4)[: max(chosen)]:
            found.append(checkpoint_seq(stage, found[-1]) if self.grad_checkpointing else stage(found[-1]))
        return [found[i] for i in chosen]

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        """Compute the logits from the last stage's map, see timm's `ResNet`."""
        x = self.avgpool(x)
        if self.is_pooled:
            x = torch.flatten(x, 1)
        if self.drop_rate > 0:
            x = F.dropout(x, p=float(self.drop_rate), training=self.training)
        return x if pre_logits else self.fc(x)

    def forward(self, x: torch.Tensor) -> Any:
        """Compute the logits, (N, num_classes), or the list of maps if `maps` was given."""
        if self.maps is not None:
            return self.forward_maps(x)
        return self.forward_head(self.forward_features(x))


class DLA(_AuthorsNames, dla.DLA):
    """The zoo's DLA with the authors' children and state-dict keys, including those of projections that are never used.

    Args:
        levels: Levels of each stage's tree.
        channels: Channels of each stage.
        return_levels: Whether `forward` returns the list of all six levels' maps.
        maps: Levels, 0 to 5, whose maps `forward` returns as a list, in this order, in place of logits.
        **kwargs: Arguments of the zoo's DLA.

    Raises:
        TypeError: An argument means different things in copies of the authors' file.
        ValueError: An argument is invalid.
    """

    def __init__(
        self,
        levels: tuple[int, ...],
        channels: tuple[int, ...],
        return_levels: bool = False,
        maps: Sequence[int] | None = None,
        **kwargs,
    ) -> None:
        refuse_ambiguous(kwargs)
        super().__init__(levels, channels, **kwargs)
        self.maps = tuple(range(6)) if return_levels else None if maps is None else checked_maps(maps, 5)
        self.drop_rate = self.head_drop.p
        self.remove_flattening()
        for tree in [module for module in self.modules() if isinstance(module, DlaTree)]:
            order_projection(tree)
        self.register_load_state_dict_pre_hook(keep_unread)

    def remove_flattening(self) -> None:
        """Leave only the authors' children in the head."""
        del self.flatten
        if hasattr(self, "head_drop"):
            del self.head_drop
        self.reset_pooling(self.avgpool.pool_type)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier, see timm's `DLA`."""
        super().reset_classifier(num_classes, global_pool)
        self.remove_flattening()

    def _chain(self) -> Iterator[tuple[str, nn.Module]]:
        return takewhile(lambda child: child[0] != "avgpool", self.named_children())

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        """Compute the logits from the last level's map, see timm's `DLA`."""
        x = self.avgpool(x)
        if self.drop_rate > 0:
            x = F.dropout(x, p=self.drop_rate, training=self.training)
        if not pre_logits:
            x = self.fc(x)
        return torch.flatten(x, 1) if self.is_pooled else x

    def forward(self, x: torch.Tensor) -> Any:
        """Compute the logits, (N, num_classes), or the list of maps if `maps` or `return_levels` was given."""
        if self.maps is not None:
            levels = self.forward_intermediates(x, list(range(max(self.maps) + 1)), stop_early=True)[1]
            return [levels[i] for i in self.maps]
        return self.forward_head(self.forward_features(x))


def pool_every_projection(shortcut: Any) -> None:
    """Replace the identity of a v1b shortcut with stride 1 by the authors' pooling, which has the same output."""
    if isinstance(shortcut, nn.Sequential) and isinstance(shortcut[0], nn.Identity):
        shortcut[0] = nn.AvgPool2d(1, 1, ceil_mode=True, count_include_pad=False)


def order_projection(tree: Any) -> None:
    """Register a tree's projection last, as the authors do, and create the one of a tree of trees that they never use.

    Args:
        tree: timm's `DlaTree`.
    """
    leaf = tree
    while leaf.levels > 1:
        leaf = leaf.tree1
    project = tree.project if leaf is tree else copy.deepcopy(leaf.project)
    del tree.project
    tree.project = project


def keep_unread(model: nn.Module, state: dict[str, torch.Tensor], prefix: str, *_: Any) -> None:
    """Keep the values of the unused projections that are missing in a state dict, such as timm's."""
    for key, tensor in model.state_dict().items():
        if key.startswith(UNREAD_BY_DLA):
            state.setdefault(prefix + key, tensor)


def checked_maps(maps: Sequence[int], most: int) -> tuple[int, ...]:
    """Return the numbers of the chosen maps.

    Raises:
        ValueError: There are none, or a number is out of bounds.
    """
    if not maps or not all(type(i) is int and 0 <= i <= most for i in maps):
        raise ValueError(f"maps is {maps!r}; it must be one or more numbers from 0 to {most}, such as (1, 2, 3, 4)")
    return tuple(maps)


def refuse_ambiguous(arguments: Mapping[str, Any]) -> None:
    """Check that no argument dilates the network in a way that depends on the copy of the authors' file.

    Raises:
        TypeError: One does, and `dilation_rule` does not determine its meaning.
    """
    for name in AMBIGUOUS:
        if name in arguments and not (name == "output_stride" and arguments.get("dilation_rule")):
            raise TypeError(
                f"{name} means different things in copies of the authors' file; pass your copy's values as strides, "
                "dilations and multi_grid, such as strides=(1, 2, 2, 1), dilations=(1, 1, 1, 2), multi_grid=(1, 2, 4), "
                'or output_stride with dilation_rule="mmdet" or "timm"'
            )


def load_file(model: nn.Module, path: str | os.PathLike) -> None:
    """Load the weights of a file, strictly and without unrestricted unpickling.

    The state dict is the file's content or its entry `state_dict`, and all names may have a prefix such as `module.`.
    Projections that the authors' DLA never uses keep their values.

    Args:
        model: A model of this module.
        path: A file written by `torch.save`.

    Raises:
        InputError: The file cannot be read, or does not fit the model.
    """
    target = {key: tensor for key, tensor in model.state_dict().items() if not is_unread(model, key)}
    model.load_state_dict(convert(Path(path), "torch", target, lambda key: is_unread(model, key)))


def is_unread(model: nn.Module, key: str) -> bool:
    """Return whether a tensor belongs to a projection that the authors' DLA never uses."""
    return isinstance(model, DLA) and key.startswith(UNREAD_BY_DLA)


def _function(name: str) -> Callable[..., Any]:
    """Return the authors' function of a name.

    Args:
        name: A key of `ARCHITECTURES`.
    """
    architecture = ARCHITECTURES[name]
    own: dict[str, Any] = dict(model_cls=Res2Net, block=Bottle2neck, v1b="_v1b" in name)
    if architecture.startswith("dla"):
        own = dict(model_cls=DLA)

    def create(pretrained: bool | str | os.PathLike = False, **kwargs) -> Any:
        if fixed := kwargs.keys() & {*own, "baseWidth"}:
            raise TypeError(f"{name}() got an unexpected keyword argument {min(fixed)!r}")
        refuse_ambiguous(kwargs)
        arguments = {key: value for key, value in kwargs.items() if value is not None}
        path = pretrained if isinstance(pretrained, str | os.PathLike) else None
        model: Any = timm.model_entrypoint(architecture)(bool(pretrained) and path is None, **own, **arguments)
        update_model_args(model, **{key: value for key, value in arguments.items() if key not in NOT_RECORDED})
        if path is not None:
            load_file(model, path)
        return model

    create.__name__ = create.__qualname__ = name
    create.__doc__ = f"""Create the authors' `{name}`, which is the zoo's {architecture}.

    Args:
        pretrained: Whether to load the published weights, which are downloaded and verified; or the path of a file with
            weights.
        **kwargs: `num_classes`, `in_chans` and other arguments of the zoo's model; `maps`, the stages whose maps
            `forward` returns as a list.

    Raises:
        InputError: The weights cannot be downloaded or read, or do not fit the model.
        TypeError: An argument means different things in copies of the authors' file.
    """
    return create


res2net50_v1b = _function("res2net50_v1b")
res2net50_v1b_26w_4s = _function("res2net50_v1b_26w_4s")
res2net101_v1b = _function("res2net101_v1b")
res2net101_v1b_26w_4s = _function("res2net101_v1b_26w_4s")
res2net152_v1b_26w_4s = _function("res2net152_v1b_26w_4s")
res2net50 = _function("res2net50")
res2net50_26w_4s = _function("res2net50_26w_4s")
res2net50_26w_6s = _function("res2net50_26w_6s")
res2net50_26w_8s = _function("res2net50_26w_8s")
res2net50_48w_2s = _function("res2net50_48w_2s")
res2net50_14w_8s = _function("res2net50_14w_8s")
res2net101_26w_4s = _function("res2net101_26w_4s")
res2next50 = _function("res2next50")
res2net_dla60 = _function("res2net_dla60")
res2next_dla60 = _function("res2next_dla60")
