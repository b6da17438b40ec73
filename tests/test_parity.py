"""Our models compute what the original implementations computed (tests/parity, see its README)."""

import gzip
import json
import math
import re
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import timm
import torch

from res2net_zoo import catalog
from res2net_zoo.dla import drop_unread
from tests.conftest import relative_error

PARITY = Path(__file__).parent / "parity"
TOLERANCE = 5e-6


def parameter(name: str, shape: list[int], kind: str) -> torch.Tensor:
    """Rebuild a parameter of the original, drawn from its own name."""
    n = np.random.RandomState(zlib.crc32(name.encode()) & 0x7FFFFFFF).standard_normal(shape).astype("float32")
    values = {
        "conv": lambda: n * np.sqrt(2.0 / np.prod(shape[1:])),
        "fc": lambda: n * 0.02,
        "gamma": lambda: 0.6 * (1 + 0.2 * n),
        "var": lambda: 1 + 0.5 * np.abs(n),
    }.get(kind, lambda: 0.1 * n)()
    return torch.from_numpy(values.astype("float32"))


def images(height: int, width: int) -> torch.Tensor:
    return torch.from_numpy(np.random.RandomState(7).standard_normal((2, 3, height, width)).astype("float32"))


def from_paddle(name: str, deep_stem: bool) -> str:
    """Return timm's key for PaddleClas's: `bb_0_0.res2a_branch2b_1._conv.weight` and the like."""
    *parts, leaf = name.split(".")
    leaf = {"_mean": "running_mean", "_variance": "running_var"}.get(leaf, leaf)
    if parts == ["out"]:
        return f"fc.{leaf}"
    layer, kind = parts[-2:]
    is_norm = kind == "_batch_norm"
    if layer.startswith("conv1") and len(parts) == 2:
        if not deep_stem:
            return f"{'bn1' if is_norm else 'conv1'}.{leaf}"
        i = int(layer[-1]) - 1
        return f"bn1.{leaf}" if is_norm and i == 2 else f"conv1.{3 * i + is_norm}.{leaf}"
    stage, block = (int(i) for i in re.match(r"bb_(\d+)_(\d+)", parts[0]).groups())
    prefix = f"layer{stage + 1}.{block}"
    if match := re.search(r"branch2b_(\d+)$", layer):
        return f"{prefix}.{'bns' if is_norm else 'convs'}.{int(match[1]) - 1}.{leaf}"
    if layer in ("conv0", "conv2"):
        return f"{prefix}.{'bn' if is_norm else 'conv'}{1 if layer == 'conv0' else 3}.{leaf}"
    # The shortcut; with a deep stem an average pooling stands before it.
    return f"{prefix}.downsample.{deep_stem + is_norm}.{leaf}"


def from_mindspore(name: str) -> str:
    """Return timm's key for MindCV's."""
    *parts, leaf = name.split(".")
    leaf = {
        "gamma": "weight",
        "beta": "bias",
        "moving_mean": "running_mean",
        "moving_variance": "running_var",
    }.get(leaf, leaf)
    if parts[0] == "classifier":
        parts[0] = "fc"
    if parts[0] == "layer1" and "down_sample" in parts:
        # Where nothing is pooled MindCV has no entry for it, which timm has.
        parts[-1] = str(int(parts[-1]) + 1)
    return ".".join([*parts, leaf]).replace("down_sample", "downsample")


def from_dla(name: str) -> str | None:
    """Return timm's key for the authors', or None for projections that nothing reads."""
    return name if drop_unread({name: torch.empty(0)}) else None


CASES: list[tuple[str, str, Callable[[str], str | None]]] = [
    ("official-res2net50_26w_4s", "res2net50_26w_4s", str),
    ("official-res2next50", "res2next50", str),
    ("official-res2net50_v1b_26w_4s", "res2net50d", str),
    ("official-res2net_dla60", "dla60_res2net", from_dla),
    ("mindcv-res2net50_v1b", "res2net50d", from_mindspore),
    ("paddle-Res2Net50_14w_8s", "res2net50_pd_14w_8s", lambda name: from_paddle(name, False)),
    ("paddle-Res2Net50_vd_26w_4s", "res2net50_vd_26w_4s", lambda name: from_paddle(name, True)),
]


def load(case: tuple) -> tuple[torch.nn.Module, dict]:
    file, name, rename = case
    reference = json.loads(gzip.decompress((PARITY / f"{file}.json.gz").read_bytes()))
    model = timm.create_model(name)
    state = {key: value for key, value in model.state_dict().items() if key.endswith("num_batches_tracked")}
    for p in reference["parameters"]:
        if (key := rename(p["name"])) is not None:
            value = parameter(p["name"], p["shape"], p["kind"])
            # Paddle stores a linear layer transposed.
            state[key] = value.T if p["name"] == "out.weight" else value
    model.load_state_dict(state, strict=True)
    return model.eval(), reference["logits"]


@pytest.mark.parametrize("case", CASES, ids=[case[0] for case in CASES])
def test_equals_the_original(case):
    model, logits = load(case)
    for size, expected in logits.items():
        with torch.no_grad():
            ours = model(images(*map(int, size.split("x"))))[:, :16]
        assert relative_error(ours, torch.tensor(expected)) < TOLERANCE, size


@pytest.mark.parametrize(("case", "name"), [(CASES[-1], "res2net50d"), (CASES[-2], "res2net50_14w_8s")])
def test_the_official_wiring_does_not_compute_what_paddle_does(case, name):
    """Its weights load without an error and give something else: why the wiring is an option."""
    file, _, rename = case
    model, logits = load((file, name, rename))
    with torch.no_grad():
        ours = model(images(224, 224))[:, :16]
    assert 0.005 < relative_error(ours, torch.tensor(logits["224x224"])) < 0.2


def test_what_the_originals_dla_has_and_nothing_reads_is_the_difference_in_its_printed_size():
    reference = json.loads(gzip.decompress((PARITY / "official-res2net_dla60.json.gz").read_bytes()))
    learnt = [p for p in reference["parameters"] if p["kind"] not in ("mean", "var")]
    surplus = sum(math.prod(p["shape"]) for p in learnt if from_dla(p["name"]) is None)
    assert surplus == 297_472
    facts = catalog.load().architectures["dla60_res2net"]
    assert sum(math.prod(p["shape"]) for p in learnt) == facts.parameters + surplus
    assert f"{(facts.parameters + surplus) / 1e6:.2f}" == facts.printed[0].parameters == "21.15"


def test_every_reference_is_tested():
    assert {path.name.removesuffix(".json.gz") for path in PARITY.glob("*.gz")} == {case[0] for case in CASES}
