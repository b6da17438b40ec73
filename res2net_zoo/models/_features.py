"""Intermediate features and gradient checkpointing for a backbone that is a chain of its children."""

from collections.abc import Iterator
from typing import Any

import torch
from timm.models import checkpoint_seq
from torch import nn

from res2net_zoo.models.block import Res2NetModule
from res2net_zoo.utils.private_apis import feature_take_indices


class ChainedFeatures:
    """What timm's ResNet has for its four stages, for backbones of other stages.

    A mixin for models whose children, in the order of their registration and up to `global_pool`,
    are applied one after the other, which `features_only` asks of a model anyway. The children named
    in `feature_info` are the ones that features are taken from. `forward_features` stays with the
    model, written out, because TorchScript has to read it.
    """

    feature_info: list[dict[str, Any]]
    grad_checkpointing: bool

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the activations of each stage, or of each of its blocks, in the backward pass.

        Args:
            enable: Whether to.
        """
        self.grad_checkpointing = enable

    def _chain(self) -> Iterator[tuple[str, nn.Module]]:
        for name, child in self.named_children():  # type: ignore[attr-defined]
            if name == "global_pool":
                return
            yield name, child

    def _forward_child(self, child: nn.Module, x: torch.Tensor) -> torch.Tensor:
        # A single layer has nothing to gain, and an activation in place must not be run again.
        if not self.grad_checkpointing or not any(True for _ in child.children()):
            return child(x)
        is_blocks = isinstance(child, nn.Sequential) and isinstance(child[0], Res2NetModule)
        # Re-entrant checkpointing would give the first stage no gradient, as the image needs none.
        return checkpoint_seq(child if is_blocks else [child], x, use_reentrant=False)

    def forward_checkpointed(self, x: torch.Tensor) -> torch.Tensor:
        """Do as `forward_features` does, with gradient checkpointing.

        Args:
            x: Images, (N, in_chans, H, W).

        Returns:
            The last stage's features, (N, num_features, h, w).
        """
        for _, child in self._chain():
            x = self._forward_child(child, x)
        return x

    def forward_intermediates(
        self,
        x: torch.Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[torch.Tensor] | tuple[torch.Tensor, list[torch.Tensor]]:
        """Return the features of several stages, as timm's models do.

        Args:
            x: Images, (N, in_chans, H, W).
            indices: Which entries of `feature_info`: the last n if an int, all if None.
            norm: Unused; there is no final norm.
            stop_early: Whether to leave out the stages after the last one asked for.
            output_fmt: Must be `NCHW`.
            intermediates_only: Whether to return the intermediate features alone.

        Returns:
            The last stage's features and the list of intermediate ones, each (N, C, h, w), or the list alone.

        Raises:
            ValueError: Another `output_fmt`.
        """
        if output_fmt != "NCHW":
            raise ValueError(f"output_fmt is {output_fmt!r}; there is only 'NCHW'")
        take_indices, max_index = feature_take_indices(len(self.feature_info), indices)
        index_of = {info["module"]: i for i, info in enumerate(self.feature_info)}
        intermediates = []
        for name, child in self._chain():
            x = self._forward_child(child, x)
            if index_of.get(name) in take_indices:
                intermediates.append(x)
            if stop_early and index_of.get(name) == max_index:
                break
        return intermediates if intermediates_only else (x, intermediates)

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Remove the stages after the last one asked for.

        Args:
            indices: Which entries of `feature_info`: the last n if an int.
            prune_norm: Unused; there is no final norm.
            prune_head: Whether to remove the classifier where all stages stay.

        Returns:
            The indices that are kept.
        """
        take_indices, max_index = feature_take_indices(len(self.feature_info), indices)
        last = self.feature_info[max_index]
        names = [name for name, _ in self._chain()]
        surplus = names[names.index(last["module"]) + 1 :]
        for name in surplus:
            setattr(self, name, nn.Sequential())
        if surplus:
            # The head is sized for features that are no longer made.
            self.num_features = self.head_hidden_size = last["num_chs"]
        if prune_head or surplus:
            self.reset_classifier(0, "")  # type: ignore[attr-defined]
        return take_indices
