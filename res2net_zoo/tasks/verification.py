"""Verify the folder of a model for a task."""

from pathlib import Path

import torch
from huggingface_hub.constants import SAFETENSORS_SINGLE_FILE as WEIGHTS
from safetensors import SafetensorError
from safetensors.torch import load_file

from res2net_zoo.tasks import load
from res2net_zoo.utils.errors import InputError, one_line
from res2net_zoo.utils.files import open_regular, sha256_of
from res2net_zoo.weights import bill_of_materials
from res2net_zoo.weights.checks import Check
from res2net_zoo.weights.verification import check_card, check_provenance, check_values


def verify(folder: Path) -> list[Check]:
    """Check the folder of a model for a task: it must load, and its backbone must be the network's.

    Such a folder has no fingerprint; its bill of materials has the hashes.

    Args:
        folder: The folder.

    Returns:
        The checks, in order. If the weights cannot be loaded, this is the last one.
    """
    every = "every tensor exactly once"
    checks = [bill_of_materials.check(folder)]
    if (folder / WEIGHTS).is_file():
        checks.insert(0, Check(f"SHA-256 of {WEIGHTS}", sha256_of(folder / WEIGHTS), "not recorded", None))
    try:
        model = load(str(folder))
        network = model.state_dict()
    except InputError as error:
        return [*checks, Check("strict load", str(error), every, False)]
    try:
        with open_regular(folder / "backbone" / WEIGHTS):
            backbone = load_file(folder / "backbone" / WEIGHTS)
    except (InputError, SafetensorError, OSError) as error:
        return [*checks, Check("backbone", one_line(error), "the network's", False)]
    features = model.features.state_dict()
    same = features.keys() == backbone.keys() and all(torch.equal(features[key], backbone[key]) for key in features)
    return [
        *checks,
        check_provenance(folder),
        *check_card(folder),
        Check("strict load", f"{len(network)} tensors", every, True),
        check_values(network),
        Check("backbone", "the network's" if same else "another", "the network's", same),
    ]
