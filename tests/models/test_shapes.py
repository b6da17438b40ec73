"""Tests specific to DLA, Big-Little Net and the CIFAR models."""

from functools import partial

import pytest
import timm
import torch
from timm.models.resnet import Bottleneck, ResNet
from torch import nn
from torch.nn import functional as F

from res2net_zoo import cifar_res2next
from res2net_zoo.models.block import Bottle2neck
from res2net_zoo.models.cifar import cifar_name
from res2net_zoo.weights.card import model_card
from res2net_zoo.weights.model_folder import write_model_folder
from tests.conftest import relative_error, spread


def images(height: int, width: int, n: int = 1) -> torch.Tensor:
    return torch.randn(n, 3, height, width, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("size", [(100, 96), (96, 100), (223, 224)])
def test_dla_rejects_unsupported_sizes(size):
    model = timm.create_model("dla60_res2next", num_classes=2, scriptable=True).eval()
    with torch.no_grad():
        for run in (model, torch.fx.symbolic_trace(model)):
            with pytest.raises(AssertionError, match="height and width are multiples of 32"):
                run(images(*size))
        with pytest.raises(torch.jit.Error, match="multiples of 32"):
            torch.jit.script(model)(images(*size))
        with pytest.raises(AssertionError, match="multiples of 32"):
            torch.export.export(model, (images(*size),))


@pytest.mark.full
def test_exported_dla_rejects_unsupported_sizes():
    model = spread(timm.create_model("dla60_res2next", num_classes=2)).eval()
    dims = {0: torch.export.Dim("n"), 2: 32 * torch.export.Dim("h"), 3: 32 * torch.export.Dim("w")}
    with torch.no_grad():
        exported = torch.export.export(model, (images(96, 128, 2),), dynamic_shapes=(dims,)).module()
        x = images(64, 160, 3)
        assert relative_error(exported(x), model(x)) < 1e-6
        with pytest.raises(AssertionError, match="% 32"):
            exported(images(100, 96))


def test_dla_features_support_multiples_of_their_reduction():
    with torch.no_grad():
        early = timm.create_model("dla60_res2net", features_only=True, out_indices=(1, 2)).eval()
        assert [f.shape[-1] for f in early(images(36, 36))] == [18, 9]
        with pytest.raises(AssertionError, match="of the last feature's reduction"):
            early(images(38, 36))
        with pytest.raises(AssertionError, match="multiples of 32"):
            timm.create_model("dla60_res2net").eval().forward_intermediates(images(96, 100))


def test_dla_rejects_incomplete_weights():
    whole = timm.create_model("dla60_res2next").state_dict()
    unread = {f"{tree}.project.0.weight": torch.zeros(1) for tree in ("level3", "level4", "level4.tree1")}
    create = partial(timm.create_model, "dla60_res2next", pretrained=True)
    create(pretrained_cfg_overlay=dict(state_dict={**whole, **unread}), num_classes=3, in_chans=1)
    cut = {name: tensor for name, tensor in whole.items() if not name.startswith("level4.")}
    for wrong in (cut, {**whole, "level6.weight": torch.zeros(1)}):
        with pytest.raises(RuntimeError, match=r"level[46]\."):
            create(pretrained_cfg_overlay=dict(state_dict=wrong))


def test_dla_block_args():
    with torch.device("meta"):
        model = timm.create_model("dla60_res2net", block_args=dict(scale=2, attn_layer="se"))
    assert model.level2.tree1.scale == 2 and model.level2.tree1.se is not None


@pytest.mark.first_case
@pytest.mark.parametrize("name", ["blresnet50", "blres2net50"])
def test_big_little_stages(name):
    """Big: half the resolution, n - 1 blocks; little: half the width, n / 4 - 1 blocks; added and fused."""
    model = spread(timm.create_model(name, num_classes=2)).eval()
    x = model.stem(model.act1(model.bn1(model.conv1(images(64, 96)))))
    assert x.shape == (1, 64, 16, 24)
    for i, (depth, stride) in enumerate([(3, 2), (4, 2), (6, 1)], start=1):
        layer, fuse = getattr(model, f"layer{i}"), getattr(model, f"fuse{i}")
        assert [len(layer.big), len(layer.little[0]), len(fuse)] == [depth - 1, 1, 1]
        assert layer.little[0][0].conv3.out_channels * 2 == layer.big[0].conv3.out_channels == 2 ** (7 + i)
        big, little = layer.big(x), layer.little(x)
        height, width = x.shape[-2:]
        assert little.shape[-2:] == (height, width) and big.shape[-2:] == (-(-height // 2), -(-width // 2))
        assert big.min() < 0 and little.min() < 0  # neither is activated before the sum
        expected = torch.relu(F.interpolate(big, (height, width), mode="bilinear") + little)
        merged = layer(x)
        assert torch.equal(merged, expected)
        x = fuse(merged)
        assert x.shape[-2:] == (-(-height // stride), -(-width // stride))
        pools = [type(m) for m in fuse[0].downsample] if stride == 2 else fuse[0].downsample
        assert pools == ([nn.AvgPool2d] if stride == 2 else None)
    assert torch.equal(model.layer4(x), model.forward_features(images(64, 96)))


def test_big_little_initializes_its_weights():
    with torch.device("meta"):
        model = timm.create_model("blres2net50", num_classes=2)
    model.to_empty(device="cpu").init_weights()
    assert torch.isfinite(model.layer1.big[0].conv1.weight).all()
    assert not model.layer1.big[0].bn3.weight.any()


def test_big_little_alpha_and_beta():
    with torch.device("meta"):
        model = timm.create_model("blres2net50", alpha=4, beta=2)
        assert len(model.layer3.little[0]) == 2
        assert model.layer3.little[0][0].conv3.out_channels == 256
        assert model(torch.empty(1, 3, 97, 65)).shape == (1, 1000)


@pytest.mark.first_case
@pytest.mark.parametrize("name", ["res2next29_8c_25w_4s", "seres2next29_6c_24w_6s", "resnext29_16c_64w"])
def test_cifar_builder_matches_registered_models(name):
    numbers = {
        "res2next29_8c_25w_4s": dict(cardinality=8, width=25, scale=4),
        "seres2next29_6c_24w_6s": dict(cardinality=6, width=24, scale=6, se=True),
        "resnext29_16c_64w": dict(cardinality=16, width=64, scale=1),
    }[name]
    assert cifar_name(29, **numbers) == name
    registered = spread(timm.create_model(name)).eval()
    built = cifar_res2next(29, **numbers).eval()
    built.load_state_dict(registered.state_dict(), strict=True)
    with torch.no_grad():
        assert torch.equal(built(images(32, 32)), registered(images(32, 32)))
    assert built.pretrained_cfg == registered.pretrained_cfg


@pytest.mark.first_case
@pytest.mark.parametrize(
    "numbers",
    [
        *(dict(depth=depth, scale=1) for depth in (56, 83, 110, 137, 164)),
        *(dict(cardinality=cardinality, scale=1) for cardinality in (12, 18, 24, 30, 36)),
        *(dict(scale=scale) for scale in (1, 2, 3, 4, 5, 6)),
    ],
    ids=str,
)
def test_every_point_of_figure_5_can_be_built(numbers):
    with torch.device("meta"):
        model = cifar_res2next(**{"depth": 29, "cardinality": 6, "width": 24, **numbers})
        assert model(torch.empty(2, 3, 32, 32)).shape == (2, 100)
        weighted = [m for n, m in model.named_modules() if isinstance(m, nn.Conv2d) and "downsample" not in n]
    blocks = [m for m in model.modules() if isinstance(m, Bottle2neck)]
    convs = len(weighted) - sum(len(block.convs) - 1 for block in blocks)  # a hierarchy counts as one layer
    assert convs + 1 == numbers.get("depth", 29)
    assert {conv.groups for block in blocks for conv in block.convs} == {numbers.get("cardinality", 6)}
    assert {block.scale for block in blocks} == {numbers["scale"]}


def test_unregistered_model_round_trips_through_a_folder(tmp_path):
    model = spread(cifar_res2next(38, 4, 16, 3, se=True, num_classes=5)).eval()
    write_model_folder(tmp_path / "point", model, model_card("point", "# point", None))
    back = timm.create_model(f"local-dir:{tmp_path / 'point'}", pretrained=True).eval()
    with torch.no_grad():
        assert torch.equal(back(images(32, 32)), model(images(32, 32)))


def test_dimensions_override_block_args():
    with torch.device("meta"):
        for depth in (29, 38):
            model = cifar_res2next(depth, scale=4, block_args=dict(scale=2, attn_layer="eca"))
            assert model.layer1[0].scale == 4 and model.layer1[0].se is not None


@pytest.mark.parametrize("depth", [2, 11.5, 30, 28, -7])
def test_cifar_builder_rejects_invalid_depth(depth):
    with pytest.raises(ValueError, match=r"9n \+ 2 layers, so .*\d"):
        cifar_res2next(depth)


def test_cifar_builder_passes_arguments_to_create_model():
    model = cifar_res2next(38, 4, 16, 3, num_classes=10, in_chans=1, drop_path_rate=0.1).eval()
    assert model(torch.randn(2, 1, 32, 32)).shape == (2, 10)
    features = cifar_res2next(29, 4, 16, 3, features_only=True)
    assert features.feature_info.channels() == [64, 256, 512, 1024]


def test_scale_1_is_a_plain_resnext():
    """Equal to timm's network of Bottleneck blocks on the same weights."""
    ours = spread(timm.create_model("resnext29_8c_64w")).eval()
    theirs = ResNet(Bottleneck, (3, 3, 3), channels=(64, 128, 256), cardinality=8, base_width=64, num_classes=100)
    theirs.conv1, theirs.maxpool, theirs.layer4 = (
        nn.Conv2d(3, 64, 3, padding=1, bias=False),
        nn.Identity(),
        nn.Identity(),
    )
    renamed = {k.replace("convs.0", "conv2").replace("bns.0", "bn2"): v for k, v in ours.state_dict().items()}
    theirs.load_state_dict(renamed, strict=True)
    with torch.no_grad():
        assert relative_error(ours(images(32, 32)), theirs.eval()(images(32, 32))) < 1e-6


@pytest.mark.parametrize(
    ("name", "kwargs", "words"),
    [
        ("resnext29_8c_64w", dict(output_stride=8), "output_stride is 8"),
        ("resnext29_8c_64w", dict(layers=(1, 1, 1, 1)), "three stages"),
        ("dla60_res2net", dict(output_stride=16), "cannot be dilated"),
        ("resnext29_8c_64w", dict(stem_type="deep"), "stem is one 3x3 convolution"),
        ("resnext29_8c_64w", dict(replace_stem_pool=True), "stem is one 3x3 convolution"),
        ("blres2net50", dict(output_stride=4), "supports 8, 16 and 32"),
        ("blres2net50", dict(alpha=3), "alpha is 3"),
        ("blres2net50", dict(layers=(1, 4, 6, 3)), "at least 2 blocks"),
        ("blres2net50", dict(layers=(3, 4, 6, 3, 3)), "four stages"),
        ("blres2net50", dict(block_args=dict(wiring="mine")), "official, paddle"),
    ],
)
def test_unsupported_arguments(name, kwargs, words):
    with torch.device("meta"), pytest.raises(ValueError, match=words):
        timm.create_model(name, **kwargs)


def test_unsupported_output_format():
    with torch.device("meta"), pytest.raises(ValueError, match="NCHW"):
        timm.create_model("blres2net50").forward_intermediates(torch.empty(1, 3, 64, 64), output_fmt="NLC")
