"""Tests of our models against the original implementations (tests/models/parity, see its README)."""

import gzip
import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch

from res2net_zoo import catalog
from res2net_zoo.models.dla import drop_unused
from res2net_zoo.weights.convert import fit
from tests.conftest import ROOT, relative_error
from tests.models import compare_wirings
from tests.weights.originals.draw import images, parameter

pytestmark = pytest.mark.first_case

PARITY = Path(__file__).parent / "parity"
TOLERANCE = 5e-6


def drop(name: str) -> bool:
    """Return whether a tensor in the authors' files is unused."""
    return not drop_unused({name: torch.empty(0)})


CASES = [
    ("official-res2net50_26w_4s", "res2net50_26w_4s", "torch"),
    ("official-res2next50", "res2next50", "torch"),
    ("official-res2net50_v1b_26w_4s", "res2net50d", "torch"),
    ("official-res2net_dla60", "dla60_res2net", "torch"),
    ("mindcv-res2net50_v1b", "res2net50d", "mindspore"),
    ("paddle-Res2Net50_14w_8s", "res2net50_pd_14w_8s", "paddle"),
    ("paddle-Res2Net50_vd_26w_4s", "res2net50_vd_26w_4s", "paddle"),
]
BACKBONE = ("mmdet-res2net50_v1d_26w_4s", "res2net50_v1d_26w_4s", "mmdet")


def load(case: tuple[str, str, str], **kwargs) -> tuple[torch.nn.Module, dict]:
    """Rebuild an original's parameters, each drawn from its own name, and convert them."""
    file, name, format = case
    reference = json.loads(gzip.decompress((PARITY / f"{file}.json.gz").read_bytes()))
    model = timm.create_model(name, **kwargs)
    source = {
        p["name"]: torch.from_numpy(parameter(p["name"], p["shape"], p["kind"]))
        for p in reference["parameters"]
        if not drop(p["name"])
    }
    model.load_state_dict(fit(source, format, model.state_dict()), strict=True)
    return model.eval(), reference["features" if "features" in reference else "logits"]


def check_features(model: torch.nn.Module, features: dict, wanted: Callable[[float], bool]) -> None:
    """Check each stage's features: mean and central value of the first 16 channels, relative to the largest."""
    for size, stages in features.items():
        with torch.no_grad():
            ours = model(torch.from_numpy(images(*map(int, size.split("x")))))
        assert [list(x.shape) for x in ours] == [stage["shape"] for stage in stages]
        for x, stage in zip(ours, stages, strict=True):
            height, width = x.shape[-2:]
            x = x[:, :16]
            values = {"mean": x.mean((2, 3)), "centre": x[:, :, height // 2, width // 2]}
            for key, value in values.items():
                error = relative_error(value, torch.tensor(stage[key]))
                assert wanted(error), (size, list(x.shape), key, error)


@pytest.mark.parametrize("case", CASES, ids=[case[0] for case in CASES])
def test_equals_the_original(case):
    model, logits = load(case)
    for size, expected in logits.items():
        with torch.no_grad():
            ours = model(torch.from_numpy(images(*map(int, size.split("x")))))[:, :16]
        assert relative_error(ours, torch.tensor(expected)) < TOLERANCE, size


@pytest.mark.parametrize(("case", "name"), [(CASES[-1], "res2net50d"), (CASES[-2], "res2net50_14w_8s")])
def test_official_wiring_differs_from_paddle(case, name):
    """Weights load without an error but give wrong results, so the wiring is an option."""
    file, _, format = case
    model, logits = load((file, name, format))
    with torch.no_grad():
        ours = model(torch.from_numpy(images(224, 224)))[:, :16]
    assert 0.005 < relative_error(ours, torch.tensor(logits["224x224"])) < 0.2


def test_features_equal_mmdetections():
    model, features = load(BACKBONE, features_only=True, out_indices=(1, 2, 3, 4))
    assert set(features) == {"224x224", "193x225"}
    check_features(model, features, lambda error: error < TOLERANCE)


@pytest.mark.parametrize("wiring", ["official", "paddle"])
def test_other_wirings_differ_from_mmdetections(wiring):
    model, features = load(BACKBONE, features_only=True, out_indices=(1, 2, 3, 4), block_args=dict(wiring=wiring))
    check_features(model, features, lambda error: 20 * TOLERANCE < error < 0.5)


@pytest.mark.full
def test_docs_show_the_error_of_a_wrong_wiring():
    """The table in docs/models.md is current; its figures may differ in the last digit."""
    printed = (ROOT / "docs/models.md").read_text().split(compare_wirings.MARKS[0])[1]
    printed = printed.split(compare_wirings.MARKS[1])[0].strip()
    rows, current = (
        [line.split("|")[1:-1] for line in table.splitlines()] for table in (printed, compare_wirings.table())
    )
    assert len(rows) == len(current) == 2 + 12
    for row, wanted in zip(rows[2:], current[2:], strict=True):
        assert [cell.strip() for cell in row[:2]] == [cell.strip() for cell in wanted[:2]]
        assert [float(cell) for cell in row[2:]] == pytest.approx([float(cell) for cell in wanted[2:]], rel=0.12)


def test_unused_weights_explain_the_printed_size_of_dla():
    reference = json.loads(gzip.decompress((PARITY / "official-res2net_dla60.json.gz").read_bytes()))
    learnt = [p for p in reference["parameters"] if p["kind"] not in ("mean", "var")]
    surplus = sum(math.prod(p["shape"]) for p in learnt if drop(p["name"]))
    assert surplus == 297_472
    facts = catalog.load().architectures["dla60_res2net"]
    assert sum(math.prod(p["shape"]) for p in learnt) == facts.parameters + surplus
    assert f"{(facts.parameters + surplus) / 1e6:.2f}" == facts.printed[0].parameters == "21.15"


def test_every_reference_is_tested():
    assert {path.name.removesuffix(".json.gz") for path in PARITY.glob("*.gz")} == {x[0] for x in [*CASES, BACKBONE]}
