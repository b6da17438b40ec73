"""Write holocron_small*.pth, a Holocron model's state dict, and the logits that Holocron computes with it.

Holocron's stem always has 64 channels, so the small model has the first release's 7x7 stem here.
"""

import json
from collections.abc import Callable

import torch
from holocron.models.classification.res2net import Bottle2neck
from holocron.models.classification.resnet import ResNet

from tests.weights.originals.draw import HERE, images, tensors

SIZES = ((64, 64), (97, 65))


def logits(model: Callable) -> dict[str, list]:
    """Return a model's logits for batches of two images, by their size."""
    with torch.no_grad():
        return {f"{h}x{w}": model(torch.from_numpy(images(h, w))).tolist() for h, w in SIZES}


def main() -> None:
    values = {name: torch.from_numpy(value) for name, value in tensors("holocron").items()}
    model = ResNet(Bottle2neck, [1, 2, 1, 1], [8, 8, 8, 8], width_per_group=32, block_args={"scale": 4}, num_classes=10)
    model.load_state_dict(values, strict=True)
    # Holocron's release has the size of the format that torch wrote before 1.6.
    torch.save(model.state_dict(), HERE / "holocron_small.pth", _use_new_zipfile_serialization=False)
    torch.save(model.state_dict(), HERE / "holocron_small_zip.pth")
    (HERE / "logits_holocron.json").write_text(json.dumps(logits(model.eval())) + "\n")


if __name__ == "__main__":
    main()
