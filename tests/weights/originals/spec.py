"""Write small.json: the names of the small model's tensors in timm and in each framework.

Run it where torch, timm and res2net_zoo are installed; the make scripts need only its output.
"""

import json
import string
from pathlib import Path

from res2net_zoo.models.block import Bottle2neck
from timm.models.resnet import ResNet

HERE = Path(__file__).parent
KINDS = {"running_mean": "mean", "running_var": "var", "num_batches_tracked": "count"}
PADDLE_LEAVES = {"running_mean": "_mean", "running_var": "_variance"}
MINDSPORE_LEAVES = {
    "weight": "gamma",
    "bias": "beta",
    "running_mean": "moving_mean",
    "running_var": "moving_variance",
}


def small(wiring: str = "official", deep: bool = True) -> ResNet:
    """Build the small model.

    Args:
        wiring: Wiring of the hierarchy.
        deep: Whether it has the stem and the shortcuts of a v1b or vd model, else those of the first release.
    """
    stem = dict(stem_type="deep", stem_width=8, avg_down=True) if deep else dict(stem_width=8)
    return ResNet(
        Bottle2neck,
        layers=(1, 2, 1, 1),
        channels=(8, 8, 8, 8),
        base_width=32,
        block_args=dict(scale=4, wiring=wiring),
        num_classes=10,
        **stem,
    )


def kind(name: str, shape: list[int]) -> str:
    """Return how a tensor is drawn, depending on its name in timm and its shape."""
    leaf = name.rpartition(".")[2]
    if name.startswith("fc."):
        return "fc" if leaf == "weight" else "fcb"
    return KINDS.get(leaf) or ("conv" if len(shape) == 4 else "gamma" if leaf == "weight" else "beta")


def to_paddle(name: str) -> str:
    """Return PaddleClas's name of a tensor of a vd model."""
    *parts, leaf = name.split(".")
    leaf = PADDLE_LEAVES.get(leaf, leaf)
    if parts == ["fc"]:
        return f"out.{leaf}"
    if parts[0] in ("conv1", "bn1"):
        layer, norm = (2, True) if parts == ["bn1"] else divmod(int(parts[1]), 3)
        return f"conv1_{layer + 1}.{'_batch_norm' if norm else '_conv'}.{leaf}"
    stage, block = int(parts[0][-1]), int(parts[1])
    norm = parts[2].startswith("bn") or parts[2:] == ["downsample", "2"]
    layer = {"conv1": "conv0", "bn1": "conv0", "conv3": "conv2", "bn3": "conv2", "downsample": "short"}.get(
        parts[2], f"res{stage + 1}{string.ascii_lowercase[block]}_branch2b_{int(parts[-1]) + 1}" if parts[3:] else ""
    )
    return f"bb_{stage - 1}_{block}.{layer}.{'_batch_norm' if norm else '_conv'}.{leaf}"


def to_mindspore(name: str, shape: list[int]) -> str:
    """Return MindCV's name of a tensor of a v1b model."""
    *parts, leaf = name.split(".")
    if parts == ["fc"]:
        return f"classifier.{leaf}"
    if "downsample" in parts:
        parts[2] = "down_sample"
        parts[3] = str(int(parts[3]) - (parts[0] == "layer1"))
    return ".".join([*parts, leaf if len(shape) == 4 else MINDSPORE_LEAVES[leaf]])


def to_holocron(name: str) -> str:
    """Return Holocron's name of a tensor of a model with the first release's stem and shortcuts."""
    *parts, leaf = name.split(".")
    if parts == ["fc"]:
        return f"head.{leaf}"
    if len(parts) == 1:
        return f"features.{'0' if parts[0] == 'conv1' else '1'}.{leaf}"
    inner = {"conv1": "conv.0", "bn1": "conv.1", "conv3": "conv.4", "bn3": "conv.5"}.get(parts[2])
    if parts[2] in ("convs", "bns"):
        inner = f"conv.3.conv.{parts[3]}.{'0' if parts[2] == 'convs' else '1'}"
    return f"features.{int(parts[0][-1]) + 3}.{parts[1]}.{inner or '.'.join(parts[2:])}.{leaf}"


def to_mmpretrain(name: str, deep: bool = True) -> str:
    """Return mmpretrain's name of a tensor."""
    *parts, leaf = name.split(".")
    if parts == ["fc"]:
        return f"head.fc.{leaf}"
    if deep and parts[0] in ("conv1", "bn1"):
        layer, norm = (2, True) if parts == ["bn1"] else divmod(int(parts[1]), 3)
        return f"backbone.stem.{layer}.{'bn' if norm else 'conv'}.{leaf}"
    return f"backbone.{name}"


def main() -> None:
    spec: dict[str, list] = {}
    for framework in ("paddle", "mindspore", "holocron", "mmengine"):
        spec[framework] = []
        for name, value in small(deep=framework != "holocron").state_dict().items():
            shape = list(value.shape)
            counts = name.endswith("num_batches_tracked")
            if counts and framework in ("paddle", "mindspore"):
                continue
            own = {
                "paddle": lambda: to_paddle(name),  # noqa: B023
                "mindspore": lambda: to_mindspore(name, shape),  # noqa: B023
                "holocron": lambda: to_holocron(name),  # noqa: B023
                "mmengine": lambda: to_mmpretrain(name),  # noqa: B023
            }[framework]()
            # Paddle stores a linear layer transposed.
            own_shape = shape[::-1] if framework == "paddle" and name == "fc.weight" else shape
            spec[framework].append(dict(timm=name, name=own, shape=own_shape, kind=kind(name, shape)))
    lines = (f'"{key}": [\n' + ",\n".join(map(json.dumps, rows)) + "\n]" for key, rows in spec.items())
    (HERE / "small.json").write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    main()
