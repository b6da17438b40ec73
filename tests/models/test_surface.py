"""Tests that our models have the interface of `timm.create_model` and of timm's models.

The first tier covers one model of each architecture, or one of each family in long tests. The others, which differ
only in their dimensions, are covered by `pytest -m slow`.
"""

import math

import pytest
import timm
import torch
from timm.layers import BlurPool2d
from timm.models import FeatureInfo
from timm.optim import param_groups_layer_decay
from timm.utils import freeze, reparameterize_model

from res2net_zoo import catalog
from tests.conftest import relative_error, spread

pytestmark = pytest.mark.first_case

SHAPES = [
    "res2net50_26w_4s",
    "res2next50",
    "seres2net50_26w_4s",
    "res2net50_vd_26w_4s",
    "dla60_res2net",
    "dla60_res2next",
    "blresnet50",
    "blres2net50",
    "seres2next29_6c_24w_4s",
    "resnext29_8c_64w",
    "res2net_tiny",
]
FAMILIES = ["res2net50_vd_26w_4s", "dla60_res2net", "blres2net50", "seres2next29_6c_24w_4s", "res2net_tiny"]


def names(soon: list[str]) -> pytest.MarkDecorator:
    """Parametrize by all names; those given are in the first tier."""
    every = catalog.load().architectures
    slow = pytest.mark.slow
    return pytest.mark.parametrize("name", [x if x in soon else pytest.param(x, marks=slow) for x in every])


every_name, every_name_slowly = names(SHAPES), names(FAMILIES)
resnets = pytest.mark.parametrize("name", ["res2net50_26w_4s", "res2net50_vd_26w_4s", "res2next50", "res2net_tiny"])


def is_cifar(name: str) -> bool:
    return catalog.load().architectures[name].reduction == 4


def reductions(name: str) -> list[int]:
    return [1, 1, 2, 4] if is_cifar(name) else [2, 4, 8, 16, 32]


def make(name: str, **kwargs) -> torch.nn.Module:
    torch.manual_seed(0)
    return timm.create_model(name, **kwargs).eval()


def images(name: str, n: int = 2, channels: int = 3) -> torch.Tensor:
    size = 32 if is_cifar(name) else 64
    return torch.randn(n, channels, size, size, generator=torch.Generator().manual_seed(0))


@every_name
def test_cfg_names_the_first_convolution_the_classifier_and_the_size_of_the_features(name):
    with torch.device("meta"):
        model = make(name)
        cfg = model.pretrained_cfg
        assert {f"{cfg['first_conv']}.weight", f"{cfg['classifier']}.weight"} <= model.state_dict().keys()
        assert model.get_submodule(cfg["first_conv"]).in_channels == 3
        features = model.forward_features(torch.empty(1, *cfg["input_size"]))
    assert tuple(features.shape) == (1, model.num_features, *cfg["pool_size"])
    data = timm.data.resolve_model_data_config(model)
    assert data["input_size"] == cfg["input_size"]
    assert data["crop_pct"] == (1.0 if is_cifar(name) else 0.875)


@every_name
@pytest.mark.parametrize("in_chans", [1, 4])
def test_in_chans_and_num_classes(name, in_chans):
    model = make(name, in_chans=in_chans, num_classes=7)
    with torch.no_grad():
        assert model(images(name, 1, in_chans)).shape == (1, 7)


@every_name_slowly
def test_head(name):
    model = make(name, num_classes=5, global_pool="catavgmax", drop_rate=0.5)
    x = images(name)
    with torch.no_grad():
        assert model(x).shape == (2, 5)
        assert model.forward_head(model.forward_features(x), pre_logits=True).shape == (2, model.head_hidden_size)
        assert model.head_hidden_size == 2 * model.num_features
        assert not torch.equal(model.train()(x), model(x))  # dropout, and batch statistics
        model.eval().reset_classifier(3, "max")
        assert model(x).shape == (2, 3) and model.get_classifier().weight.shape[0] == 3
        model.reset_classifier(4)
        assert model.num_classes == 4 and model.global_pool.pool_type == "max"
        model.reset_classifier(0)
        assert model(x).shape == (2, model.num_features)
        side = math.ceil(x.shape[-1] / reductions(name)[-1])
        model.reset_classifier(0, "")
        assert model(x).shape == (2, model.num_features, side, side)
        unpooled = make(name, num_classes=0, global_pool="")
        assert torch.equal(unpooled(x), unpooled.forward_features(x))


@every_name_slowly
def test_features(name):
    x = images(name)
    model = spread(make(name, features_only=True))
    assert model.feature_info.reduction() == reductions(name)
    with torch.no_grad():
        features = model(x)
        for feature, channels, reduction in zip(
            features, model.feature_info.channels(), model.feature_info.reduction(), strict=True
        ):
            assert feature.shape == (2, channels, x.shape[-1] // reduction, x.shape[-1] // reduction)
        first = 1 if name.startswith("dla") else 0  # timm's DLA has features at stride 1 as well
        some = spread(make(name, features_only=True, out_indices=(first + 1, first + 3)))
        for a, b in zip(some(x), [features[1], features[3]], strict=True):
            assert torch.equal(a, b)
        getter = make(name, features_only=True, feature_cls="getter")
        spread(getter.model)
        for a, b in zip(getter(x), features, strict=True):
            assert torch.equal(a, b)


@every_name
def test_forward_intermediates(name):
    x = images(name)
    model = spread(make(name))
    info = FeatureInfo(model.feature_info, len(model.feature_info))
    with torch.no_grad():
        final, intermediates = model.forward_intermediates(x)
        assert torch.equal(final, model.forward_features(x))
        assert torch.equal(model.forward_head(final), model(x))
        for feature, channels, reduction in zip(intermediates, info.channels(), info.reduction(), strict=True):
            assert feature.shape == (2, channels, x.shape[-1] // reduction, x.shape[-1] // reduction)
        (last,) = model.forward_intermediates(x, indices=1, intermediates_only=True)
        assert torch.equal(last, final)
        early, some = model.forward_intermediates(x, indices=[1, 2], stop_early=True)
        assert torch.equal(early, some[-1]) and torch.equal(some[0], intermediates[1])
        before = sum(p.numel() for p in model.parameters())
        assert model.prune_intermediate_layers([1, 2]) == [1, 2]
        assert sum(p.numel() for p in model.parameters()) < before
        for a, b in zip(model.forward_intermediates(x, [1, 2], intermediates_only=True), some, strict=True):
            assert torch.equal(a, b)
        assert model(x).shape[1] == model.num_features == some[-1].shape[1]


@every_name
@pytest.mark.parametrize("output_stride", [8, 16])
def test_output_stride(name, output_stride):
    if name.startswith("dla") or is_cifar(name):
        with pytest.raises(ValueError, match=f"output_stride is {output_stride}"):
            make(name, output_stride=output_stride)
        return
    x = images(name)
    model = make(name, features_only=True, output_stride=output_stride)
    assert model.feature_info.reduction() == [min(r, output_stride) for r in reductions(name)]
    with torch.no_grad():
        for feature, reduction in zip(model(x), model.feature_info.reduction(), strict=True):
            assert feature.shape[-2:] == (64 // reduction, 64 // reduction)


def gradients_and_saved_bytes(model: torch.nn.Module, x: torch.Tensor) -> tuple[list[torch.Tensor], int]:
    """Train one step; return all gradients and the bytes of saved activations."""
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    for parameter in model.parameters():
        kept[parameter.untyped_storage().data_ptr()] = 0
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = model(x)
    out.square().mean().backward()
    return [p.grad for p in model.parameters() if p.requires_grad], sum(
        n for key, n in kept.items() if key not in weights
    )


@every_name_slowly
def test_gradient_checkpointing_saves_memory_with_equal_gradients(name):
    results = []
    for enable in (False, True):
        model = spread(make(name, num_classes=5)).train()
        model.set_grad_checkpointing(enable)
        results.append(gradients_and_saved_bytes(model, images(name)))
    (plain, plain_bytes), (checkpointed, checkpointed_bytes) = results
    for a, b in zip(plain, checkpointed, strict=True):
        assert relative_error(a, b) < 1e-4
    assert checkpointed_bytes < 0.6 * plain_bytes


@every_name_slowly
def test_gradient_checkpointing_after_a_frozen_stem(name):
    """Frozen layers save no activations; the stages after them are recomputed."""
    results = []
    for enable in (False, True):
        model = spread(make(name, num_classes=5)).train()
        trained = model.feature_info[1]["module"]
        names = [key for key, _ in model.named_children()]
        freeze(model, names[: names.index(trained)])
        model.set_grad_checkpointing(enable)
        results.append(gradients_and_saved_bytes(model, images(name)))
    assert results[1][1] < 0.5 * results[0][1]
    with torch.no_grad():
        assert torch.fx.symbolic_trace(model.eval())(images(name)).shape == (2, 5)


@every_name
def test_reparameterization_keeps_the_output(name):
    """timm's `reparameterize_model` supports every model and does not change its output."""
    model, x = spread(make(name, num_classes=5)), images(name)
    with torch.no_grad():
        assert relative_error(reparameterize_model(model)(x), model(x)) < 1e-6


@every_name_slowly
def test_one_step_of_training_changes_every_parameter(name):
    model = spread(make(name, num_classes=5)).train()
    before = {key: p.detach().clone() for key, p in model.named_parameters()}
    torch.nn.functional.cross_entropy(model(images(name)), torch.tensor([1, 3])).backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    for key, parameter in model.named_parameters():
        assert not torch.equal(parameter, before[key]), key


@every_name_slowly
def test_drop_path_grows_linearly_with_depth(name):
    model = make(name, drop_path_rate=0.3)
    rates = [m.drop_prob for m in model.modules() if type(m).__name__ == "DropPath"]
    assert rates == pytest.approx([0.3 * (i + 1) / len(rates) for i in range(len(rates))])
    x = images(name)
    with torch.no_grad():
        assert torch.equal(model(x), make(name)(x))
        assert torch.isfinite(model.train()(x)).all()
    assert not any(type(m).__name__ == "DropPath" for m in make(name).modules())


@every_name
def test_layer_decay_groups_the_parameters_by_depth(name):
    model = make(name)
    groups = param_groups_layer_decay(model, layer_decay=0.75)
    assert sum(len(g["params"]) for g in groups) == len(list(model.parameters()))
    scale = {id(p): g["lr_scale"] for g in groups for p in g["params"]}
    scales = [scale[id(p)] for _, p in model.named_parameters()]
    cfg = model.pretrained_cfg
    first, last = (model.get_submodule(cfg[key]).weight for key in ("first_conv", "classifier"))
    assert scale[id(first)] == min(scales) < max(scales) == scale[id(last)] == 1
    assert len(set(scales)) > 6 or name == "res2net_tiny"
    # Stages are in order.
    stages = [i["module"] for i in model.feature_info[1:]]
    means = []
    for stage in stages:
        values = [scale[id(p)] for p in model.get_submodule(stage).parameters()]
        means.append(sum(values) / len(values))
    assert means == sorted(means) and len(set(means)) == len(means)
    coarse = {g["lr_scale"] for g in param_groups_layer_decay(model, layer_decay=0.75, min_scale=0.0)}
    assert len(coarse) == len(set(scales))


@every_name_slowly
def test_torchscript(name):
    model = spread(make(name, num_classes=6, scriptable=True))
    x = images(name)
    with torch.no_grad():
        assert relative_error(torch.jit.script(model)(x), model(x)) < 1e-6


@every_name_slowly
def test_fx(name):
    model, x = spread(make(name, num_classes=6)), images(name)
    with torch.no_grad():
        assert torch.equal(torch.fx.symbolic_trace(model)(x), model(x))
    traced = torch.fx.symbolic_trace(model.train())
    traced(x).square().mean().backward()
    assert all(p.grad is not None for p in traced.parameters())


@every_name_slowly
def test_export_with_dynamic_batch(name):
    model, x = spread(make(name, num_classes=6)), images(name, 3)
    with torch.no_grad():
        exported = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("n")},)).module()
        assert relative_error(exported(x[:2]), model(x[:2])) < 1e-6


@every_name_slowly
def test_channels_last(name):
    model, x = spread(make(name, num_classes=6)), images(name)
    with torch.no_grad():
        expected = model(x)
        fast = model.to(memory_format=torch.channels_last)(x.to(memory_format=torch.channels_last))
        assert relative_error(fast, expected) < 1e-5


@every_name
def test_no_images_and_odd_sizes(name):
    model = make(name, num_classes=4)
    x = images(name)
    with torch.no_grad():
        assert model(x[:0]).shape == (0, 4)
        if not name.startswith("dla"):
            assert model(torch.randn(1, 3, 33, 39)).shape == (1, 4)


@resnets
def test_drop_block_and_anti_aliasing(name):
    model = make(name, drop_block_rate=0.1, aa_layer=BlurPool2d).train()
    assert model(images(name)).shape == (2, 1000)
    assert sum(isinstance(m, BlurPool2d) for m in model.modules()) == 4
