"""Tests of the registered models: equality with timm's on the same weights, and arguments of `create_model`."""

import subprocess
import sys
from decimal import ROUND_HALF_UP, Decimal

import pytest
import timm
import torch
from timm.models import ResNet
from timm.models import dla as timm_dla
from timm.models import res2net as timm_res2net
from torch.utils.flop_counter import FlopCounterMode

from res2net_zoo import catalog
from tests.conftest import relative_error, spread

pytestmark = pytest.mark.first_case

IN_TIMM = {
    name: entrypoint
    for module in (timm_res2net, timm_dla)
    for name, entrypoint in vars(module).items()
    if name in module.__all__ and ("res2net" in name or "res2next" in name)
}
NAMES = list(catalog.load().architectures)
# The design's table: parameters in millions, to 0.1 percent, and GMACs, rounded to three decimals and then to two.
TABLE = {
    "res2net50_48w_2s": (25.287, 4.16),
    "res2net50_26w_4s": (25.699, 4.26),
    "res2net50_14w_8s": (25.060, 4.18),
    "res2net50_26w_6s": (37.051, 6.30),
    "res2net50_26w_8s": (48.404, 8.34),
    "res2net50_18w_4s": (18.095, 2.90),
    "res2net50_18w_6s": (25.159, 4.18),
    "res2net101_26w_4s": (45.207, 8.07),
    "res2next50": (24.671, 4.17),
    "seres2net50_26w_4s": (28.230, 4.26),
    "res2net50d": (25.718, 4.50),
    "res2net101d": (45.226, 8.31),
    "res2net152d": (61.295, 12.12),
    "res2net50_vd_26w_4s": (25.718, 4.50),
    "res2net101_vd_26w_4s": (45.226, 8.31),
    "res2net200_vd_26w_4s": (76.216, 15.71),
    "res2net50_v1d_26w_4s": (25.718, 4.50),
    "res2net101_v1d_26w_4s": (45.226, 8.31),
    "res2net50_pd_26w_4s": (25.699, 4.26),
    "res2net50_pd_14w_8s": (25.060, 4.18),
    "dla60_res2net": (20.848, 4.12),
    "dla60_res2next": (17.033, 3.46),
    "blresnet50": (26.695, 2.86),
    "blres2net50": (None, None),
    "res2net_tiny": (None, None),
    "res2next29_6c_24w_4s": (23.706, None),
    "res2next29_8c_25w_4s": (32.957, None),
    "res2next29_6c_24w_6s": (36.146, None),
    "seres2next29_6c_24w_4s": (24.228, None),
    "seres2next29_8c_25w_4s": (33.479, None),
    "seres2next29_6c_24w_6s": (36.668, None),
    "resnext29_8c_64w": (34.519, None),
    "resnext29_16c_64w": (68.247, None),
}
AUTHORS_NAMES = {
    "res2net50_v1b_26w_4s": "res2net50d",
    "res2net101_v1b_26w_4s": "res2net101d",
    "res2net152_v1b_26w_4s": "res2net152d",
    "res2net_dla60": "dla60_res2net",
    "res2next_dla60": "dla60_res2next",
}


def timm_model(name: str, **kwargs) -> torch.nn.Module:
    """Build timm's model, which ours replaces in the registry."""
    return IN_TIMM[name](**kwargs)


def test_every_architecture_is_registered_and_timms_are_replaced():
    assert len(IN_TIMM) == 11
    assert set(NAMES) == set(TABLE) >= set(IN_TIMM)
    ours = {name for name in timm.list_models() if timm.model_entrypoint(name).__module__.startswith("res2net_zoo.")}
    assert ours == set(NAMES)
    # timm groups models by the name of their module.
    for module in ("res2net", "dla", "biglittle", "cifar"):
        names = {name for name in ours if timm.model_entrypoint(name).__module__ == f"res2net_zoo.models.{module}"}
        assert names and names <= set(timm.list_models(module=module))
    assert "dla60" in timm.list_models(module="dla")
    downloads = {name for name, c in catalog.load().checkpoints.items() if c.url}
    assert downloads == set(timm.list_pretrained("*res2ne*")) >= {f"{name}.in1k" for name in IN_TIMM}


@pytest.mark.parametrize(("alias", "name"), AUTHORS_NAMES.items())
def test_names_of_the_authors_are_aliases(alias, name):
    assert not timm.list_models(alias) and timm.is_model(alias)
    with torch.device("meta"):
        with pytest.warns(UserWarning, match=f"{alias} to current {name}") as warned:
            model = timm.create_model(alias, num_classes=3)
        assert len(warned) == 1
        assert model.state_dict().keys() == timm.create_model(name, num_classes=3).state_dict().keys()
    assert model.pretrained_cfg["architecture"] == name and model.fc.weight.shape[0] == 3


def test_importing_is_quiet_and_fast():
    code = "import time, timm; t = time.process_time(); import res2net_zoo; print(time.process_time() - t)"
    run = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=True)
    assert run.stderr == "" and float(run.stdout) < 0.2


@pytest.mark.full
def test_other_overwriting_warnings_are_shown():
    code = (
        "import res2net_zoo\nfrom timm.models import register_model\n"
        "def resnet18(pretrained=False): pass\nresnet18.__module__ = '__main__'\nregister_model(resnet18)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "Overwriting resnet18" in run.stderr


@pytest.mark.parametrize("name", NAMES)
def test_parameters_and_macs_match_the_catalogue(name):
    facts = catalog.load().architectures[name]
    with torch.device("meta"):
        model = timm.create_model(name).eval()
        counter = FlopCounterMode(display=False)
        with torch.no_grad(), counter:
            model(torch.empty(1, *facts.input_size))
    assert sum(p.numel() for p in model.parameters()) == facts.parameters
    assert counter.get_total_flops() == 2 * facts.macs
    assert model.num_classes == facts.num_classes
    parameters, gmacs = TABLE[name]
    assert parameters is None or facts.parameters / 1e6 == pytest.approx(parameters, rel=1e-3)
    thousandths = Decimal(facts.macs).scaleb(-9).quantize(Decimal("0.001"), ROUND_HALF_UP)
    assert gmacs is None or float(thousandths.quantize(Decimal("0.01"), ROUND_HALF_UP)) == gmacs


def test_width_of_big_little_matches_the_baselines_complexity():
    """The paper does not specify the width; ours has the closest GMACs."""
    baseline = catalog.load().architectures["blresnet50"].macs
    assert abs(catalog.load().architectures["blres2net50"].macs / baseline - 1) < 0.02


def test_size_of_tiny():
    assert catalog.load().architectures["res2net_tiny"].parameters < 1_000_000


@pytest.mark.parametrize("name", IN_TIMM)
def test_output_and_gradients_equal_timms(name):
    theirs = spread(timm_model(name))
    ours = timm.create_model(name)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    ours.eval(), theirs.eval()
    height = 96 if "dla" in name else 97
    x = torch.randn(2, 3, height, 128, generator=torch.Generator().manual_seed(0))
    outputs = [model(x) for model in (ours, theirs)]
    assert relative_error(*outputs) < 1e-6
    for output in outputs:
        output.square().mean().backward()
    gradients = dict(theirs.named_parameters())
    for key, parameter in ours.named_parameters():
        assert relative_error(parameter.grad, gradients[key].grad) < 1e-5, key


@pytest.mark.parametrize("output_stride", [8, 16])
@pytest.mark.parametrize("name", ["res2net50_26w_4s", "res2net50d", "res2next50"])
def test_dilated_output_equals_timms(name, output_stride):
    theirs = spread(timm_model(name, output_stride=output_stride)).eval()
    ours = timm.create_model(name, output_stride=output_stride).eval()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    x = torch.randn(1, 3, 97, 128, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert relative_error(ours.forward_features(x), theirs.forward_features(x)) < 1e-6


@pytest.mark.parametrize("name", IN_TIMM)
def test_pretrained_cfg_extends_timms(name):
    default_cfgs = timm_dla.default_cfgs if "dla" in name else timm_res2net.default_cfgs
    ours, theirs = timm.get_pretrained_cfg(name).to_dict(), default_cfgs[name].default.to_dict()
    assert ours["hf_hub_id"] == f"timm/{name}.in1k"
    assert ours["license"] != theirs.pop("license") == "unknown"
    for source in ("url", "hf_hub_id", "tag"):  # set by timm on registration
        theirs.pop(source, None)
    assert {key: ours[key] for key in theirs} == theirs


def test_models_are_subclasses_of_timms():
    with torch.device("meta"):
        for name, cls in (("res2net_tiny", ResNet), ("dla60_res2net", timm_dla.DLA), ("resnext29_8c_64w", ResNet)):
            assert isinstance(timm.create_model(name), cls)


def test_block_args_are_merged():
    with torch.device("meta"):
        model = timm.create_model("res2net50_pd_14w_8s", block_args=dict(attn_layer="se"))
    block = model.layer1[0]
    assert block.scale == 8 and block.hierarchical and block.se is not None
    with torch.device("meta"):
        assert not timm.create_model("res2net50_pd_14w_8s", block_args=dict(wiring="official")).layer1[0].hierarchical
