"""Entry points of `torch.hub`: the authors' functions, see `res2net_zoo.originals`.

`torch.hub.load("ORG/REPO", "res2net50_v1b_26w_4s", pretrained=True)` returns a model.
"""

from res2net_zoo.originals import (
    res2net50,
    res2net50_14w_8s,
    res2net50_26w_4s,
    res2net50_26w_6s,
    res2net50_26w_8s,
    res2net50_48w_2s,
    res2net50_v1b,
    res2net50_v1b_26w_4s,
    res2net101_26w_4s,
    res2net101_v1b,
    res2net101_v1b_26w_4s,
    res2net152_v1b_26w_4s,
    res2net_dla60,
    res2next50,
    res2next_dla60,
)

dependencies = ["torch", "torchvision", "timm", "huggingface_hub", "safetensors", "numpy"]

__all__ = [
    "res2net50",
    "res2net50_14w_8s",
    "res2net50_26w_4s",
    "res2net50_26w_6s",
    "res2net50_26w_8s",
    "res2net50_48w_2s",
    "res2net50_v1b",
    "res2net50_v1b_26w_4s",
    "res2net101_26w_4s",
    "res2net101_v1b",
    "res2net101_v1b_26w_4s",
    "res2net152_v1b_26w_4s",
    "res2net_dla60",
    "res2next50",
    "res2next_dla60",
]
