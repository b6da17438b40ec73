"""Tests of both dilation rules, against an independent implementation of whole networks."""

from collections.abc import Sequence

import pytest
import timm
import torch
from torch.nn import functional as F

from res2net_zoo.utils.errors import InputError
from res2net_zoo.weights.card import model_card
from res2net_zoo.weights.model_config import check_folder
from res2net_zoo.weights.model_folder import write_model_folder
from res2net_zoo.weights.pretrained import create_model
from tests.conftest import relative_error, spread

pytestmark = pytest.mark.first_case

LAYERS = (1, 2, 2, 3)
WIRINGS = {"official": "res2net50d", "paddle": "res2net50_vd_26w_4s", "mmdet": "res2net50_v1d_26w_4s"}

# With the rule "mmdet": arguments, stride of each stage, dilation of each of its blocks.
PLANS = {
    "undilated": (dict(dilation_rule="mmdet"), (1, 2, 2, 2), [[1], [1, 1], [1, 1], [1, 1, 1]]),
    "16": (dict(output_stride=16, dilation_rule="mmdet"), (1, 2, 2, 1), [[1], [1, 1], [1, 1], [2, 2, 2]]),
    "8": (dict(output_stride=8, dilation_rule="mmdet"), (1, 2, 1, 1), [[1], [1, 1], [2, 2], [4, 4, 4]]),
    "explicit": (dict(strides=(1, 2, 2, 1), dilations=(1, 1, 1, 2)), (1, 2, 2, 1), [[1], [1, 1], [1, 1], [2, 2, 2]]),
    "stride and dilation": (dict(dilations=[1, 1, 2, 4]), (1, 2, 2, 2), [[1], [1, 1], [2, 2], [4, 4, 4]]),
    "grid": (dict(output_stride=16, multi_grid=(1, 2, 4)), (1, 2, 2, 1), [[1], [1, 1], [1, 1], [2, 4, 8]]),
    "grid of strided stages": (
        dict(dilations=(1, 1, 2, 4), multi_grid=(1, 2, 1)),
        (1, 2, 2, 2),
        [[1], [1, 1], [2, 2], [4, 8, 4]],
    ),
    "grid without dilation": (
        dict(strides=(1, 2, 1, 1), multi_grid=(2, 1, 3)),
        (1, 2, 1, 1),
        [[1], [1, 1], [1, 1], [2, 1, 3]],
    ),
    "strides": (dict(strides=(2, 1, 3, 1)), (2, 1, 3, 1), [[1], [1, 1], [1, 1], [1, 1, 1]]),
}
# With the rule "timm": arguments, strides, dilations.
TIMM_PLANS = {
    "16": (dict(output_stride=16), (1, 2, 2, 1), [[1], [1, 1], [1, 1], [1, 2, 2]]),
    "8": (dict(output_stride=8, dilation_rule="timm"), (1, 2, 1, 1), [[1], [1, 1], [1, 2], [2, 4, 4]]),
}


class Reference:
    """A Res2Net-50 26w4s as a function of its weights, for any strides and dilations.

    Args:
        weights: A state dict with the authors' names.
        wiring: The wiring of its blocks.
        pools_dilated: Whether the average-pool shortcut of a stage whose stride is replaced by dilation pools 2x2
            pixels with stride 1, with zeros after the last row and column.
    """

    def __init__(self, weights: dict[str, torch.Tensor], wiring: str, pools_dilated: bool) -> None:
        self.weights, self.wiring, self.pools_dilated = weights, wiring, pools_dilated

    def norm(self, x: torch.Tensor, name: str) -> torch.Tensor:
        keys = ("running_mean", "running_var", "weight", "bias")
        mean, var, weight, bias = (self.weights[f"{name}.{key}"][:, None, None] for key in keys)
        return (x - mean) / (var + 1e-5).sqrt() * weight + bias

    def conv(self, x: torch.Tensor, name: str, norm: str, stride: int = 1, dilation: int = 1) -> torch.Tensor:
        weight = self.weights[f"{name}.weight"]
        return self.norm(F.conv2d(x, weight, None, stride, weight.shape[-1] // 2 * dilation, dilation), norm)

    def stem(self, x: torch.Tensor) -> torch.Tensor:
        if "conv1.weight" in self.weights:
            x = self.conv(x, "conv1", "bn1", 2)
        else:
            x = self.conv(x, "conv1.0", "conv1.1", 2).relu()
            x = self.conv(self.conv(x, "conv1.3", "conv1.4").relu(), "conv1.6", "bn1")
        return F.max_pool2d(x.relu(), 3, 2, 1)

    def last_group(self, x: torch.Tensor, stride: int, drops: bool) -> torch.Tensor:
        if not drops or (self.wiring == "mmdet" and stride == 1):
            return x
        total = F.avg_pool2d(x, 3, stride, 1, divisor_override=1)
        count = F.avg_pool2d(torch.ones_like(x), 3, stride, 1, divisor_override=1)
        return total / (count if self.wiring == "paddle" else 9)

    def shortcut(self, x: torch.Tensor, name: str, stride: int, replaced: bool) -> torch.Tensor:
        if f"{name}.downsample.1.running_mean" in self.weights:  # a convolution with a stride
            return self.conv(x, f"{name}.downsample.0", f"{name}.downsample.1", stride)
        if stride > 1:
            x = F.avg_pool2d(x, stride, stride, ceil_mode=True, count_include_pad=False)
        elif replaced and self.pools_dilated:
            x = F.avg_pool2d(F.pad(x, (0, 1, 0, 1)), 2, 1)
        return self.conv(x, f"{name}.downsample.1", f"{name}.downsample.2")

    def block(self, x: torch.Tensor, name: str, stride: int, dilation: int, first: int) -> torch.Tensor:
        """Compute a block; `first` is the number of its stage if it is the stage's first, else 0."""
        drops = bool(first) and (self.wiring != "paddle" or first > 1 or stride > 1)
        groups = self.conv(x, f"{name}.conv1", f"{name}.bn1").relu().chunk(4, 1)
        outputs: list[torch.Tensor] = []
        for i in range(3):
            group = groups[i] if drops or not i else groups[i] + outputs[-1]
            outputs.append(self.conv(group, f"{name}.convs.{i}", f"{name}.bns.{i}", stride, dilation).relu())
        outputs.append(self.last_group(groups[3], stride, drops))
        y = self.conv(torch.cat(outputs, 1), f"{name}.conv3", f"{name}.bn3")
        return (y + (self.shortcut(x, name, stride, first > 1) if first else x)).relu()

    def features(self, x: torch.Tensor, strides: Sequence[int], dilations: list[list[int]]) -> list[torch.Tensor]:
        features, x = [], self.stem(x)
        for stage, (stride, rates) in enumerate(zip(strides, dilations, strict=True), 1):
            for i, rate in enumerate(rates):
                x = self.block(x, f"layer{stage}.{i}", 1 if i else stride, rate, 0 if i else stage)
            features.append(x)
        return features


@torch.no_grad()
def check(name: str, wiring: str, kwargs: dict, strides: Sequence[int], dilations: list, pools_dilated: bool) -> None:
    """Check a model's features on weights of an undilated one, which load strictly."""
    weights = spread(timm.create_model(name, layers=LAYERS, num_classes=2)).state_dict()
    model = timm.create_model(name, layers=LAYERS, num_classes=2, **kwargs).eval()
    model.load_state_dict(weights, strict=True)
    x = torch.randn(2, 3, 97, 130, generator=torch.Generator().manual_seed(0))
    expected = Reference(weights, wiring, pools_dilated).features(x, strides, dilations)
    for ours, theirs in zip(model.forward_intermediates(x, intermediates_only=True)[1:], expected, strict=True):
        assert ours.shape == theirs.shape
        assert relative_error(ours, theirs) < 5e-6


@pytest.mark.parametrize("wiring", WIRINGS)
@pytest.mark.parametrize("plan", PLANS)
def test_mmdets_rule(plan, wiring):
    check(WIRINGS[wiring], wiring, *PLANS[plan], pools_dilated=False)


@pytest.mark.parametrize("wiring", WIRINGS)
@pytest.mark.parametrize("plan", TIMM_PLANS)
def test_timms_rule(plan, wiring):
    check(WIRINGS[wiring], wiring, *TIMM_PLANS[plan], pools_dilated=True)


@pytest.mark.parametrize("plan", ["8", "grid of strided stages", "strides"])
def test_mmdets_rule_with_a_strided_convolution_in_the_shortcut(plan):
    check("res2net50_26w_4s", "official", *PLANS[plan], pools_dilated=False)


def test_rules_differ_on_the_same_weights():
    """Weights of one rule load into the other without an error, so the rule is an option."""
    x = torch.randn(1, 3, 97, 130, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        timms, mmdets = (
            spread(timm.create_model("res2net50d", output_stride=16, dilation_rule=rule)).eval()(x)
            for rule in ("timm", "mmdet")
        )
    assert 0.01 < relative_error(timms, mmdets) < 1


@pytest.mark.parametrize(
    ("kwargs", "reductions"),
    [
        (dict(output_stride=16, dilation_rule="mmdet"), [2, 4, 8, 16, 16]),
        (dict(output_stride=8, multi_grid=(1, 2, 4)), [2, 4, 8, 8, 8]),
        (dict(dilations=(1, 1, 2, 4)), [2, 4, 8, 16, 32]),
        (dict(strides=(1, 1, 2, 1)), [2, 4, 4, 8, 8]),
    ],
)
def test_features_only(kwargs, reductions):
    model = timm.create_model("res2net50_v1d_26w_4s", layers=LAYERS, features_only=True, **kwargs).eval()
    assert model.feature_info.reduction() == reductions
    with torch.no_grad():
        features = model(torch.zeros(1, 3, 128, 96))
    assert [tuple(x.shape[-2:]) for x in features] == [(128 // r, 96 // r) for r in reductions]


@pytest.mark.parametrize(
    ("kwargs", "words"),
    [
        (dict(output_stride=4), "output_stride is 4; it must be 8, 16 or 32"),
        (dict(dilation_rule="mine"), "dilation_rule is 'mine'; it must be one of timm, mmdet"),
        (dict(dilation_rule="timm", multi_grid=(1, 2, 4)), "'timm' supports only output_stride; multi_grid needs"),
        (dict(output_stride=16, strides=(1, 2, 2, 1)), "output_stride 16 and strides are mutually exclusive"),
        (dict(output_stride=8, dilations=(1, 1, 2, 4)), "output_stride 8 and dilations are mutually exclusive"),
        (dict(strides=(1, 2, 2)), r"strides is \(1, 2, 2\); it must be 4 integers from 1 to 8, one for each stage"),
        (dict(strides=(1, 2, 2, 0)), "integers from 1 to 8"),
        (dict(strides=(1, 2, 2, True)), "integers from 1 to 8"),
        (dict(dilations=()), "dilations is"),
        (dict(dilations=2), "dilations is 2; it must be 4 integers"),
        (dict(dilations="1112"), "dilations is '1112'"),
        (dict(dilations=(1, 1, 1, 2.0)), "4 integers from 1 to 128"),
        (dict(dilations=(1, 1, 1, 10**6)), "4 integers from 1 to 128"),
        (dict(multi_grid=(1, 2)), r"multi_grid is \(1, 2\); it must be 3 integers .* block of the last stage"),
        (dict(output_stride=8, multi_grid=(1, 2, 33)), "3 integers from 1 to 32"),
        (dict(strides=(2, 2, 2, 2), channels=(16, 128, 256, 512)), "strides has 2 for a stage whose .* no projection"),
    ],
)
def test_invalid_arguments(kwargs, words):
    with pytest.raises(ValueError, match=words), torch.device("meta"):
        timm.create_model("res2net50d", **kwargs)


@pytest.mark.parametrize(
    "kwargs",
    [
        dict(output_stride=16, dilation_rule="mmdet"),
        dict(strides=(1, 2, 2, 1), dilations=(1, 1, 1, 2), block_args=dict(wiring="mmdet")),
    ],
)
def test_a_folder_keeps_the_dilation(tmp_path, kwargs):
    model = spread(timm.create_model("res2net_tiny", num_classes=3, **kwargs)).eval()
    write_model_folder(tmp_path / "m", model, model_card("m", "# m", None))
    check_folder(tmp_path / "m")
    x = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    plain = timm.create_model("res2net_tiny", num_classes=3).eval()
    plain.load_state_dict(model.state_dict())
    with torch.no_grad():
        for load in (create_model, timm.create_model):
            assert torch.equal(load(f"local-dir:{tmp_path / 'm'}", pretrained=True).eval()(x), model(x))
        assert not torch.equal(plain(x), model(x))


def test_a_folder_with_invalid_dilation_is_refused(tmp_path):
    model = timm.create_model("res2net_tiny", num_classes=3, dilations=(1, 1, 1, 2))
    write_model_folder(tmp_path / "m", model, model_card("m", "# m", None))
    config = tmp_path / "m" / "config.json"
    text = "".join(config.read_text().split())
    config.write_text(text.replace('"dilations":[1,1,1,2]', '"dilations":[1,1,2]'))
    assert text != config.read_text()
    with pytest.raises(InputError, match=r"dilations is \[1, 1, 2\]; it must be 4 integers"):
        check_folder(tmp_path / "m")
