"""The zoo's models as backbones of MMDetection, MMSegmentation, MMPretrain and others on mmengine's registry.

A config lists this module in `custom_imports`, and selects the backbone with `type="Res2NetZoo"`.
"""

from collections.abc import Sequence
from typing import Any

import torch
from mmengine.model import BaseModule
from mmengine.registry import MODELS
from timm.models import group_parameters

from res2net_zoo.training.optimization import BATCH_NORMS, freeze
from res2net_zoo.utils.errors import InputError
from res2net_zoo.weights.pretrained import create_model

# Arguments of MMDetection's Res2Net and ResNet, which a config inherits if it does not delete them.
INHERITED = {
    "depth",
    "scales",
    "base_width",
    "num_stages",
    "style",
    "norm_cfg",
    "deep_stem",
    "avg_down",
    "base_channels",
}


@MODELS.register_module()
class Res2NetZoo(BaseModule):
    """A backbone with the settings of MMDetection's ResNet.

    Args:
        model_name: A name as for `timm.create_model`: `arch`, `arch.tag`, `local-dir:DIR` or `hf-hub:ORG/NAME`.
        pretrained: Whether to load its weights.
        out_indices: Stages whose maps are returned; 0 to 3 are the last four, of strides 4, 8, 16 and 32 without
            dilation.
        frozen_stages: Number of stages without gradients and in evaluation mode; 0 freezes the stem, -1 nothing.
        norm_eval: Whether every BatchNorm stays in evaluation mode, with its running statistics, during training.
        in_channels: Channels of the images.
        init_cfg: Initialization by mmengine, instead of `pretrained`.
        **kwargs: Arguments of the model, such as `output_stride`, `strides`, `dilations` or `drop_path_rate`.

    Raises:
        InputError: The model or its weights cannot be loaded, or a setting is invalid.
    """

    def __init__(
        self,
        model_name: str,
        pretrained: bool = False,
        out_indices: Sequence[int] = (0, 1, 2, 3),
        frozen_stages: int = -1,
        norm_eval: bool = True,
        in_channels: int = 3,
        init_cfg: dict[str, Any] | list[dict[str, Any]] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(init_cfg)
        if inherited := sorted(INHERITED & kwargs.keys()):
            raise InputError(
                f"the backbone does not support {', '.join(inherited)}; if a base config sets them, add _delete_=True"
            )
        if not isinstance(pretrained, bool):
            raise InputError(
                f"pretrained is {pretrained!r}; it must be true or false, and model_name names the weights"
            )
        if pretrained and init_cfg:
            raise InputError("pretrained and init_cfg are mutually exclusive; remove one")
        if not -1 <= frozen_stages <= 4:
            raise InputError(f"frozen_stages is {frozen_stages}; it must be from -1 to 4")
        if not out_indices or not set(out_indices) <= {0, 1, 2, 3}:
            raise InputError(f"out_indices are {tuple(out_indices)}; they must be some of 0, 1, 2, 3")
        kwargs["in_chans"] = in_channels
        with torch.device("meta"):
            whole: Any = create_model(model_name, False, **kwargs)
        first = len(whole.feature_info) - 4
        self.features: Any = create_model(
            model_name, pretrained, features_only=True, out_indices=[first + i for i in sorted(out_indices)], **kwargs
        )
        self.norm_eval = norm_eval
        self._frozen = self._freeze(whole, frozen_stages)
        self._is_init = pretrained  # otherwise mmengine initializes the loaded weights again
        self.train()

    def _freeze(self, whole: Any, stages: int) -> list[torch.nn.Module]:
        """Remove the gradients of the first stages, and return the modules that must stay in evaluation mode."""
        if stages < 0:
            return []
        # The last group is the classifier, the four before are the stages, all others the stem.
        freeze(whole, str(max(group_parameters(whole, whole.group_matcher(coarse=True))) - 4 + stages))
        frozen = {name for name, parameter in whole.named_parameters() if not parameter.requires_grad}
        for name, parameter in self.features.named_parameters():
            parameter.requires_grad_(name not in frozen)
        children = [child for child in self.features.children() if list(child.parameters())]
        return [child for child in children if not any(p.requires_grad for p in child.parameters())]

    def train(self, mode: bool = True) -> "Res2NetZoo":
        """Set training or evaluation mode; frozen stages, and with `norm_eval` BatchNorm, stay in evaluation mode."""
        super().train(mode)
        for module in self._frozen:
            module.eval()
        for module in self.modules():
            if self.norm_eval and isinstance(module, BATCH_NORMS):
                module.eval()
        return self

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return a feature map of each stage of `out_indices`, (N, C, h, w), for images (N, in_channels, H, W)."""
        return tuple(self.features(x))
