"""Measure the error of a Res2Net's output if its weights run in another wiring, or with another dilation rule.

`python -m tests.models.compare_wirings [--update docs/models.md]`

The model is res2net50d with random weights, drawn from their names as in tests/models/parity, and the images are those
of the parity tests at 224x224. A figure is the largest difference, in percent of the largest value.
"""

import argparse
from pathlib import Path
from typing import Any, get_args

import timm
import torch
from torch import nn

from res2net_zoo.models.block import Wiring
from res2net_zoo.utils.markdown import markdown_table, update_between
from tests.conftest import relative_error
from tests.weights.originals.draw import images, parameter

MARKS = ("<!-- wirings: python -m tests.models.compare_wirings --update docs/models.md -->", "<!-- end of wirings -->")

# Ways to run the same weights, which are compared within a group.
GROUPS: list[dict[str, dict[str, Any]]] = [
    {wiring: dict(block_args=dict(wiring=wiring)) for wiring in get_args(Wiring)},
    *(
        {
            f"dilation_rule {rule}, output_stride {stride}": dict(output_stride=stride, dilation_rule=rule)
            for rule in ("timm", "mmdet")
        }
        for stride in (16, 8)
    ),
    {"undilated": {}, "dilations 1, 1, 2, 4": dict(dilations=(1, 1, 2, 4))},
]


def draw(model: nn.Module) -> None:
    """Set a model's parameters and statistics to values drawn from their names."""
    modules = dict(model.named_modules())
    for name, tensor in model.state_dict().items():
        owner, _, leaf = name.rpartition(".")
        kinds = {"running_mean": "mean", "running_var": "var", "num_batches_tracked": "count"}
        if isinstance(modules[owner], nn.BatchNorm2d):
            kinds |= {"weight": "gamma", "bias": "beta"}
        else:
            kinds |= {"weight": "fc" if owner == "fc" else "conv", "bias": "fcb"}
        tensor.copy_(torch.from_numpy(parameter(name, list(tensor.shape), kinds[leaf])))


@torch.no_grad()
def outputs(kwargs: dict[str, Any]) -> list[torch.Tensor]:
    """Return the features of the four stages and the logits."""
    model = timm.create_model("res2net50d", **kwargs).eval()
    draw(model)
    last, features = model.forward_intermediates(torch.from_numpy(images(224, 224)))
    return [*features[1:], model.forward_head(last)]


def table() -> str:
    """Return the table in Markdown."""
    rows = []
    for group in GROUPS:
        computed = {name: outputs(kwargs) for name, kwargs in group.items()}
        for trained_for, expected in computed.items():
            for run_as, ours in computed.items():
                if run_as != trained_for:
                    errors = [100 * relative_error(a, b) for a, b in zip(ours, expected, strict=True)]
                    rows.append((trained_for, run_as, *(f"{error:.2g}" if error else "0" for error in errors)))
    return markdown_table(("trained for", "run as", "stage 1", "stage 2", "stage 3", "stage 4", "logits"), rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--update", type=Path, help="update the table in FILE between its marker lines")
    args = parser.parse_args()
    if args.update:
        update_between(args.update, table(), MARKS)
    else:
        print(table())


if __name__ == "__main__":
    main()
