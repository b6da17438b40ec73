"""Intermediate features and gradient checkpointing for backbones that apply their children in sequence."""

from collections.abc import Iterator
from typing import Any

import torch
from timm.models import checkpoint_seq
from torch import nn

from res2net_zoo.models.block import Res2NetModule
from res2net_zoo.utils.private_apis import feature_take_indices


class ChainedFeatures:
    """The feature interface of timm's ResNet, for backbones with other stages.

    A mixin for models that apply their children in the order of registration, up to `global_pool`, which
    `features_only` requires as well. Features are the outputs of the children in `feature_info`. The model must
    implement `forward_features` explicitly, because TorchScript compiles it.
    """

    feature_info: list[dict[str, Any]]
    grad_checkpointing: bool

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the activations of each stage, or of each of its blocks, in the backward pass.

        Args:
            enable: Whether to enable gradient checkpointing.
        """
        self.grad_checkpointing = enable

    def _chain(self) -> Iterator[tuple[str, nn.Module]]:
        for name, child in self.named_children():  # type: ignore[attr-defined]
            if name == "global_pool":
                return
            yield name, child

    def _forward_child(self, child: nn.Module, x: torch.Tensor) -> torch.Tensor:
        # Checkpointing a single layer saves no memory, and an in-place activation must not be recomputed.
        if not self.grad_checkpointing or not any(True for _ in child.children()):
            return child(x)
        is_blocks = isinstance(child, nn.Sequential) and isinstance(child[0], Res2NetModule)
        # Re-entrant checkpointing computes no gradient for the first stage, because the image does not require one.
        return checkpoint_seq(child if is_blocks else [child], x, use_reentrant=False)

    def forward_checkpointed(self, x: torch.Tensor) -> torch.Tensor:
        """Compute `forward_features` with gradient checkpointing.

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
            indices: Indices into `feature_info`; an int n selects the last n, None all.
            norm: Unused; there is no final norm.
            stop_early: Whether to skip the stages after the last selected one.
            output_fmt: Must be `NCHW`.
            intermediates_only: Whether to return only the intermediate features.

        Returns:
            The features of the last stage and the list of intermediate ones, each (N, C, h, w), or only the list.

        Raises:
            ValueError: `output_fmt` is not `NCHW`.
        """
        if output_fmt != "NCHW":
            raise ValueError(f"output_fmt is {output_fmt!r}; only 'NCHW' is supported")
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
        """Remove the stages after the last selected one.

        Args:
            indices: Indices into `feature_info`; an int n selects the last n.
            prune_norm: Unused; there is no final norm.
            prune_head: Whether to remove the classifier if all stages are kept.

        Returns:
            The indices of the features that are kept.
        """
        take_indices, max_index = feature_take_indices(len(self.feature_info), indices)
        last = self.feature_info[max_index]
        names = [name for name, _ in self._chain()]
        surplus = names[names.index(last["module"]) + 1 :]
        for name in surplus:
            setattr(self, name, nn.Sequential())
        if surplus:
            # The head has the size of features that are no longer computed.
            self.num_features = self.head_hidden_size = last["num_chs"]
        if prune_head or surplus:
            self.reset_classifier(0, "")  # type: ignore[attr-defined]
        return take_indices
