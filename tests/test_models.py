"""The registered models: timm's own on the same weights, and everything `create_model` can ask of them."""

import subprocess
import sys

import pytest
import timm
import torch
from timm.models import ResNet
from timm.models import res2net as timm_res2net
from torch.utils.flop_counter import FlopCounterMode

import res2net_zoo
from res2net_zoo import catalog
from tests.conftest import relative_error, spread

TIMM_NAMES = [name for name in vars(timm_res2net) if name.startswith(("res2net", "res2next"))]
NAMES = list(catalog.load().architectures)


def timm_model(name: str, **kwargs) -> torch.nn.Module:
    """Make timm's own model, whose place in the registry ours has taken."""
    return getattr(timm_res2net, name)(**kwargs)


def test_every_architecture_is_registered_under_timms_module():
    assert len(TIMM_NAMES) == 9
    assert set(NAMES) == {*TIMM_NAMES, "res2net_tiny"} == set(timm.list_models(module="res2net"))
    for name in NAMES:
        assert timm.model_entrypoint(name).__module__ == "res2net_zoo.res2net"
    assert {f"{name}.in1k" for name in TIMM_NAMES} == set(timm.list_pretrained("res2ne*"))


def test_importing_is_quiet_and_costs_next_to_nothing():
    code = "import time, timm; t = time.perf_counter(); import res2net_zoo; print(time.perf_counter() - t)"
    runs = [
        subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=True)
        for _ in range(3)
    ]
    assert {run.stderr for run in runs} == {""}
    assert min(float(run.stdout) for run in runs) < 0.2


def test_other_warnings_of_overwriting_are_not_hidden():
    code = (
        "import res2net_zoo\nfrom timm.models import register_model\n"
        "def resnet18(pretrained=False): pass\nresnet18.__module__ = '__main__'\nregister_model(resnet18)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "Overwriting resnet18" in run.stderr


@pytest.mark.parametrize("name", NAMES)
def test_parameters_and_multiply_accumulates_are_the_catalogues(name):
    facts = catalog.load().architectures[name]
    with torch.device("meta"):
        model = timm.create_model(name).eval()
        counter = FlopCounterMode(display=False)
        with torch.no_grad(), counter:
            model(torch.empty(1, *facts.input_size))
    assert sum(p.numel() for p in model.parameters()) == facts.parameters
    assert counter.get_total_flops() == 2 * facts.macs
    assert model.num_classes == facts.num_classes


def test_tiny_is_tiny():
    assert catalog.load().architectures["res2net_tiny"].parameters < 1_000_000


@pytest.mark.parametrize("name", TIMM_NAMES)
def test_output_and_gradients_equal_timms(name):
    theirs = spread(timm_model(name))
    ours = timm.create_model(name)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    ours.eval(), theirs.eval()
    x = torch.randn(2, 3, 97, 128, generator=torch.Generator().manual_seed(0))
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


@pytest.mark.parametrize("name", TIMM_NAMES)
def test_pretrained_cfg_is_timms_with_its_gaps_filled(name):
    ours, theirs = timm.get_pretrained_cfg(name).to_dict(), timm_res2net.default_cfgs[name].default.to_dict()
    assert ours["hf_hub_id"] == f"timm/{name}.in1k"
    assert ours["license"] != theirs.pop("license") == "unknown"
    for source in ("url", "hf_hub_id", "tag"):  # timm fills them in as it registers
        theirs.pop(source, None)
    assert {key: ours[key] for key in theirs} == theirs


@pytest.mark.parametrize("name", ["res2net50_26w_4s", "res2net50d", "res2next50", "res2net_tiny"])
class TestSurface:
    """What `timm.create_model` and timm's models offer, on one of each shape."""

    def make(self, name, **kwargs):
        torch.manual_seed(0)
        return timm.create_model(name, **kwargs).eval()

    x = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))

    @pytest.mark.parametrize("in_chans", [1, 4])
    def test_in_chans_and_num_classes(self, name, in_chans):
        model = self.make(name, in_chans=in_chans, num_classes=7)
        assert model(torch.randn(1, in_chans, 64, 64)).shape == (1, 7)

    def test_no_classifier(self, name):
        model = self.make(name, num_classes=0)
        assert model(self.x).shape == (2, model.num_features)
        assert self.make(name, num_classes=0, global_pool="")(self.x).shape == (2, model.num_features, 2, 2)

    def test_global_pool(self, name):
        model = self.make(name, num_classes=5, global_pool="catavgmax")
        assert model(self.x).shape == (2, 5)

    def test_reset_classifier(self, name):
        model = self.make(name)
        model.reset_classifier(3, "max")
        assert model(self.x).shape == (2, 3)
        assert model.get_classifier().out_features == 3

    @pytest.mark.parametrize("output_stride", [8, 16, 32])
    def test_features_at_every_output_stride(self, name, output_stride):
        model = self.make(name, features_only=True, output_stride=output_stride)
        features = model(self.x)
        assert model.feature_info.reduction() == [min(r, output_stride) for r in (2, 4, 8, 16, 32)]
        for feature, channels, reduction in zip(
            features, model.feature_info.channels(), model.feature_info.reduction(), strict=True
        ):
            assert feature.shape == (2, channels, 64 // reduction, 64 // reduction)

    def test_out_indices(self, name):
        some, every = (self.make(name, features_only=True, **kw) for kw in (dict(out_indices=(1, 3)), {}))
        with torch.no_grad():
            for a, b in zip(some(self.x), [every(self.x)[i] for i in (1, 3)], strict=True):
                assert torch.equal(a, b)

    def test_forward_intermediates(self, name):
        model = self.make(name)
        with torch.no_grad():
            final, intermediates = model.forward_intermediates(self.x)
            assert torch.equal(final, model.forward_features(self.x))
            assert torch.equal(model.forward_head(final), model(self.x))
        assert [tuple(i.shape[-2:]) for i in intermediates] == [(32, 32), (16, 16), (8, 8), (4, 4), (2, 2)]

    def test_gradient_checkpointing_changes_no_gradient(self, name):
        gradients = []
        for enable in (False, True):
            model = self.make(name, num_classes=5).train()
            model.set_grad_checkpointing(enable)
            model(self.x).square().mean().backward()
            gradients.append([p.grad for p in model.parameters()])
        assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-7) for a, b in zip(*gradients, strict=True))

    def test_drop_path_grows_linearly_with_depth(self, name):
        model = self.make(name, drop_path_rate=0.3)
        rates = [m.drop_prob for m in model.modules() if type(m).__name__ == "DropPath"]
        assert rates == sorted(rates) and rates[-1] == pytest.approx(0.3)
        assert torch.isfinite(model.train()(self.x)).all()

    def test_drop_block_and_anti_aliasing(self, name):
        from timm.layers import BlurPool2d

        model = self.make(name, drop_block_rate=0.1, aa_layer=BlurPool2d).train()
        assert model(self.x).shape == (2, 1000)
        assert sum(isinstance(m, BlurPool2d) for m in model.modules()) == 4

    def test_squeeze_and_excitation_by_block_args(self, name):
        model = self.make(name, block_args=dict(scale=4, attn_layer="se"))
        assert "layer1.0.se.fc1.weight" in model.state_dict()
        assert model(self.x).shape == (2, 1000)

    def test_parameter_groups_cover_every_parameter(self, name):
        from timm.optim import param_groups_layer_decay

        model = self.make(name)
        groups = param_groups_layer_decay(model, layer_decay=0.75)
        assert sum(len(g["params"]) for g in groups) == len(list(model.parameters()))
        assert len({g["lr_scale"] for g in groups}) > 3

    def test_no_images_and_odd_sizes(self, name):
        model = self.make(name, num_classes=4)
        assert model(torch.empty(0, 3, 64, 64)).shape == (0, 4)
        assert model(torch.randn(1, 3, 33, 71)).shape == (1, 4)


def test_tiny_under_script_fx_export_and_channels_last():
    model = spread(timm.create_model("res2net_tiny", num_classes=6, scriptable=True)).eval()
    x = torch.randn(3, 3, 64, 64)
    with torch.no_grad():
        expected = model(x)
        assert relative_error(torch.jit.script(model)(x), expected) < 1e-6
        assert relative_error(torch.fx.symbolic_trace(model)(x), expected) < 1e-6
        exported = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("n")},)).module()
        assert relative_error(exported(x[:2]), expected[:2]) < 1e-6
        assert relative_error(model.to(memory_format=torch.channels_last)(x), expected) < 1e-5


def test_models_are_timms_resnet():
    assert isinstance(timm.create_model("res2net_tiny"), ResNet)
    assert res2net_zoo.__version__
