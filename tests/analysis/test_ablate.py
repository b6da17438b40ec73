"""Tests of counting, receptive fields, latency, and `python -m res2net_zoo ablate`."""

import json
import subprocess
import sys
import time

import pytest
import timm
import torch
from PIL import Image
from timm.models import ResNet
from torch import nn

from res2net_zoo import cifar_res2next
from res2net_zoo.analysis.cost import count, receptive_field
from res2net_zoo.models.block import Bottle2neck
from res2net_zoo.models.dla import DLA
from res2net_zoo.utils.timing import latencies
from tests.conftest import ROOT, input_error


def seen_pixels(model: nn.Module, height: int) -> int:
    """Return the number of image rows that a unit of the last features depends on, by its gradient."""
    model = model.double().eval()
    for module in model.modules():
        # With positive weights and without clipping, all connected inputs have a gradient.
        if isinstance(module, nn.BatchNorm2d):
            nn.init.ones_(module.weight)
        elif isinstance(module, nn.Conv2d):
            nn.init.constant_(module.weight, 1 / module.weight[0].numel())
        elif isinstance(module, nn.MaxPool2d):
            # A maximum has a gradient for one input only, a mean for all inputs of the window.
            module.forward = nn.AvgPool2d(module.kernel_size, module.stride, module.padding).forward
    x = torch.ones(1, 3, height, 32, dtype=torch.double, requires_grad=True)
    features = model.forward_features(x)
    features[0, :, features.shape[2] // 2, features.shape[3] // 2].sum().backward()
    rows = x.grad.abs().sum((0, 1, 3)).nonzero().flatten()
    assert rows[0] > 0 and rows[-1] < height - 1, "the image is smaller than the receptive field"
    return int(rows[-1] - rows[0] + 1)


def small_resnet(**kwargs) -> ResNet:
    return ResNet(Bottle2neck, (1, 2, 1, 2), channels=(8, 8, 8, 8), num_classes=2, **kwargs)


@pytest.mark.parametrize(
    ("make", "height"),
    [
        (lambda: cifar_res2next(29, 1, 4, 4), 160),
        (lambda: cifar_res2next(20, 2, 4, 1), 64),
        (lambda: small_resnet(base_width=32, block_args=dict(scale=3)), 768),
        (lambda: small_resnet(base_width=32, block_args=dict(scale=4, wiring="paddle"), stem_type="deep"), 1024),
        (lambda: small_resnet(base_width=32, block_args=dict(scale=3), output_stride=8, avg_down=False), 768),
        (lambda: DLA((1, 1, 1, 2, 1, 1), (4, 4, 8, 8, 8, 8), num_classes=2, cardinality=1, base_width=64), 1024),
    ],
    ids=["cifar", "cifar scale 1", "resnet", "paddle", "dilated", "dla"],
)
def test_receptive_field_matches_the_gradient(make, height):
    assert receptive_field(make()) == seen_pixels(make(), height)


def test_receptive_field_of_resnet50_and_gated_models():
    with torch.device("meta"):
        assert receptive_field(timm.create_model("resnet50")) == 427
        plain, gated = (timm.create_model(f"{p}res2next29_6c_24w_4s") for p in ("", "se"))
    assert receptive_field(plain) == receptive_field(gated) == 95


def test_unsupported_receptive_field():
    with torch.device("meta"):
        model = timm.create_model("blresnet50")
    with pytest.raises(ValueError, match=r"interpolate is unsupported$"):
        receptive_field(model)


def test_count():
    def build() -> nn.Module:
        return nn.Sequential(nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False), nn.Flatten(), nn.Linear(8 * 16, 5))

    assert count(build, (3, 8, 8)) == (3 * 8 * 9 + 128 * 5 + 5, 3 * 8 * 9 * 16 + 128 * 5)


def test_latencies_are_interleaved_medians():
    turns: list[str] = []

    def call(name: str, seconds: float):
        def run() -> None:
            time.sleep(seconds * (10 if len(turns) < 4 else 1))
            turns.append(name)

        return run

    slow, fast = latencies([call("slow", 0.02), call("fast", 0.002)], 3)
    assert turns == ["slow", "fast", "fast", "slow"] * 2  # the order alternates
    assert 20 <= slow < 100 and 2 <= fast < 20  # excludes the warm-up and the slow first round


def ablate(in_process, *args: object):
    return in_process("res2net_zoo/__main__.py", "ablate", *args)


def test_ablation_of_table_3(in_process, tmp_path):
    result = ablate(in_process, "--only", "table3", "--rounds", 0, "--figure", tmp_path / "a.png")
    assert result.returncode == 0, result.stderr
    rows = [[c.strip() for c in line.split("|")[1:-1]] for line in result.stdout.splitlines() if line.startswith("| r")]
    assert len(rows) == 7
    cells = {row[0]: row[1:] for row in rows}
    assert cells["resnet50"] == ["25.56", "4.09", "427", "-", "-", "4.2", "149", "23.85"]
    assert cells["res2net50_26w_4s"] == ["25.70", "4.26", "1131", "-", "-", "4.2", "153", "22.01"]
    assert cells["res2net50_26w_6s"][-3:] == ["6.3", "-", "21.42"]
    assert cells["res2net50_18w_4s"] == ["18.10", "2.90", "1131", "-", "-", "2.9", "106", "22.92"]
    assert Image.open(tmp_path / "a.png").size[0] > 500


def test_ablation_of_a_grid(in_process, tmp_path):
    numbers = ["--depth", 11, "--width", 4, 8, "--cardinality", 2, "--scale", 1, 2, 3]
    files = ["--figure", tmp_path / "a.svg", "--output", tmp_path / "a.json"]
    result = ablate(in_process, *numbers, "--rounds", 2, "--batch-size", 3, *files)
    assert result.returncode == 0, result.stderr
    assert "ms for 3" in result.stdout and "res2next11_2c_8w_3s" in result.stdout
    points = json.loads((tmp_path / "a.json").read_text())
    assert [p["name"] for p in points[:3]] == ["resnext11_2c_4w", "res2next11_2c_4w_2s", "res2next11_2c_4w_3s"]
    assert {p["series"] for p in points} == {"width 4", "width 8"}
    model = cifar_res2next(11, 2, 8, 3)
    assert points[5]["parameters"] == sum(p.numel() for p in model.parameters())
    assert points[5]["receptive_field"] == receptive_field(model)
    assert all(p["latency_ms"] > 0 and p["batch_size"] == 3 for p in points)
    assert (tmp_path / "a.svg").stat().st_size > 5000


def test_tables_do_not_need_matplotlib_or_write_files(in_process, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    numbers = ["--depth", 11, "--width", 4, "--rounds", 0]
    result = ablate(in_process, *numbers)
    assert result.returncode == 0 and "resnext11_6c_4w" in result.stdout
    assert "figure" not in result.stdout and not (ROOT / "ablation.png").exists()
    assert "drawing needs matplotlib" in input_error(ablate(in_process, *numbers, "--figure", tmp_path / "a.png"))


@pytest.mark.full
def test_closed_pipe():
    script = (
        "import sys; import res2net_zoo.utils.console as p; sys.exit(p.run(lambda: print('a line\\n' * 100_000) or 0))"
    )
    run = subprocess.run(
        ["bash", "-o", "pipefail", "-c", f'"{sys.executable}" -c "{script}" | head -1'], capture_output=True, text=True
    )
    assert run.stdout == "a line\n" and run.stderr == "" and run.returncode == 141


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--depth", "30"], "a CIFAR model has 9n + 2 layers, so 29 or 38, not 30 (--depth)"),
        (["--frame", "imagenet", "--depth", "34"], "has 50, 101, 152, 200 layers, not 34 (--depth)"),
        (["--only", "table3", "--scale", "2"], "remove it"),
        (["--scale", "0"], "argument --scale: 0 is not 1 or more"),
        (["--rounds", "-1"], "argument --rounds: -1 is not 0 or more"),
        (["--only", "table5"], "table5"),
        (["--device", "abacus"], "device abacus: "),
        (["--device", "meta"], "device meta: "),
        (["--device", "mps"], "device mps: "),
        (["--device", "hpu"], "device hpu: "),
        (["--frame", "imagenet"], "--frame needs a custom grid"),
        (["--figure", "same.svg", "--output", "same.svg"], "are both same.svg; name two files"),
        (["--output", "docs"], "docs is a folder; name a file"),
        (["--figure", "a.docx"], "the name of a figure must end in"),
        (["--figure", "no/such/folder/a.png"], "cannot write into no/such/folder"),
        (["--output", "no/such/folder/a.json"], "cannot write into no/such/folder"),
    ],
)
def test_invalid_input(in_process, args, words):
    assert words in input_error(ablate(in_process, *args))
