"""The authors' interface: what projects that contain a copy of the authors' file do with it; and torch.hub."""

import copy
import gzip
import inspect
import io
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from torch import nn

import res2net_zoo
from res2net_zoo import originals
from res2net_zoo.models.block import Res2NetModule
from res2net_zoo.utils.errors import InputError
from res2net_zoo.weights.authors import ARCHITECTURES
from res2net_zoo.weights.card import model_card
from res2net_zoo.weights.model_folder import write_model_folder
from tests.conftest import FEW, ROOT, relative_error, spread

pytestmark = pytest.mark.first_case

PARITY = Path(__file__).parent / "models" / "parity"
SMALL_DLA = dict(levels=(1, 1, 1, 2, 3, 1), channels=(16, 16, 32, 32, 64, 64))
REFERENCES = {
    "res2net50_26w_4s": "res2net50_26w_4s",
    "res2net50_v1b_26w_4s": "res2net50_v1b_26w_4s",
    "res2next50": "res2next50",
    "res2net_dla60": "res2net_dla60",
}


def create(name: str, *args, **kwargs):
    """Create a model with few channels, with weights that affect the output."""
    small = SMALL_DLA if "dla" in name else FEW
    return spread(getattr(originals, name)(*args, **{**small, **kwargs})).eval()


def zoo_model(name: str, model: nn.Module, **kwargs) -> nn.Module:
    """Create the zoo's model of the same architecture, with the weights of a model."""
    small = SMALL_DLA if "dla" in name else FEW
    ours = timm.create_model(ARCHITECTURES[name], **small, **kwargs).eval()
    state = model.state_dict()
    ours.load_state_dict({key: state[key] for key in ours.state_dict()})
    return ours


class ByAttribute(nn.Module):
    """Calls the parts of a backbone one by one, and keeps the stem's map before its activation."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.resnet = backbone

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        net = self.resnet
        normed = net.bn1(net.conv1(x))
        maps = [normed, net.maxpool(net.relu(normed))]
        for stage in (net.layer1, net.layer2, net.layer3, net.layer4):
            maps.append(stage(maps[-1]))
        return maps


class OfParts(nn.Module):
    """Moves the parts of a backbone into its own modules."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.layer0 = nn.Sequential(backbone.conv1, backbone.bn1, backbone.relu)
        self.layer1 = nn.Sequential(backbone.maxpool, backbone.layer1)
        self.layer2, self.layer3, self.layer4 = backbone.layer2, backbone.layer3, backbone.layer4
        self.layer4_of_depth = copy.deepcopy(backbone.layer4)
        self.pool, self.fc = backbone.avgpool, backbone.fc

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.layer3(self.layer2(self.layer1(self.layer0(x))))
        pooled = self.pool(self.layer4(x) + self.layer4_of_depth(x))
        assert pooled.ndim == 4
        return self.fc(pooled.view(pooled.size(0), -1))


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(2, 3, 65, 97, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_signatures(name):
    function = getattr(originals, name)
    pretrained, kwargs = inspect.signature(function).parameters.values()
    assert (pretrained.name, pretrained.default, kwargs.kind) == ("pretrained", False, inspect.Parameter.VAR_KEYWORD)
    assert function.__name__ == name and "pretrained:" in function.__doc__ and name in originals.__all__
    with torch.device("meta"):
        assert function(False, num_classes=7).fc.weight.shape[0] == 7


def test_urls():
    urls = originals.model_urls
    assert urls["res2net50_v1b_26w_4s"].endswith("/res2net50_v1b_26w_4s-3cf99910.pth")
    assert set(ARCHITECTURES) - set(urls) == {"res2net152_v1b_26w_4s"}


@pytest.mark.parametrize(("name", "reference"), REFERENCES.items())
def test_keys_have_the_authors_order_and_shapes(name, reference):
    rows = json.loads(gzip.decompress((PARITY / f"official-{reference}.json.gz").read_bytes()))["parameters"]
    with torch.device("meta"):
        state = getattr(originals, name)().state_dict()
    keys = [key for key in state if not key.endswith("num_batches_tracked")]
    assert keys == [row["name"] for row in rows]
    assert [list(state[key].shape) for key in keys] == [row["shape"] for row in rows]
    assert sum(key.endswith("num_batches_tracked") for key in state) == sum(key.endswith("running_var") for key in keys)


@pytest.mark.parametrize("name", ["res2net50_v1b_26w_4s", "res2net50", "res2next50", "res2net_dla60", "res2next_dla60"])
def test_output_is_the_zoos(name):
    model = create(name)
    x = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        assert torch.equal(model(x), zoo_model(name, model)(x))


def test_attributes_of_the_backbone(x):
    model = create("res2net50_v1b_26w_4s")
    maps = ByAttribute(model)(x)
    assert (maps[0] < 0).any(), "relu works in place"
    features = torch.flatten(model.avgpool(maps[-1]), 1)
    assert torch.equal(model.fc(features), model(x))
    assert not model.relu.inplace and create("res2net50").relu.inplace
    assert (model.inplanes, model.baseWidth, model.scale) == (256, 26, 4)
    first, second = model.layer2[:2]
    assert (first.stype, first.width, first.nums, first.scale) == ("stage", 13, 3, 4)
    assert second.stype == "normal" and second.downsample is None and first.expansion == 4


def test_children(x):
    model = create("res2net50_v1b_26w_4s")
    names = [name for name, _ in model.named_children()]
    assert names == ["conv1", "bn1", "relu", "maxpool", "layer1", "layer2", "layer3", "layer4", "avgpool", "fc"]
    assert torch.equal(nn.Sequential(*list(model.children())[:-2])(x), ByAttribute(model)(x)[-1])
    assert nn.Sequential(*list(model.children())[:-1])(x).shape == (2, 256, 1, 1)
    dla = create("res2net_dla60")
    levels = [f"level{i}" for i in range(6)]
    assert [name for name, _ in dla.named_children()] == ["base_layer", *levels, "avgpool", "fc"]


def test_poolings_are_the_authors(x):
    """Code recognizes layers by their class, and sets strides and windows of a built model."""
    model = create("res2net50_v1b", channels=(32, 64, 96, 128), strides=(1, 2, 2, 1))
    assert isinstance(model.avgpool, nn.AdaptiveAvgPool2d) and model.avgpool.output_size == 1
    poolings = [stage[0].downsample[0] for stage in (model.layer1, model.layer2, model.layer3, model.layer4)]
    assert all(isinstance(pooling, nn.AvgPool2d) for pooling in poolings)
    assert [pooling.kernel_size for pooling in poolings] == [1, 2, 2, 1]
    first = model.layer4[0]
    for layer in (*first.convs, first.pool, first.downsample[0]):
        layer.stride = 2
    first.downsample[0].kernel_size = 2
    plain = create("res2net50_v1b", channels=(32, 64, 96, 128))
    plain.load_state_dict(model.state_dict())
    assert torch.equal(model(x), plain(x))
    assert create("res2next50").maxpool1.kernel_size == 3


@pytest.mark.parametrize("name", ["res2next50", "res2net_dla60", "res2next_dla60"])
def test_window_of_the_pooling(name):
    """The authors' `AvgPool2d(7)` sums in another order than a mean, and reads only one window of larger maps."""
    model = create(name)
    features = torch.randn(2, model.num_features, 11, 13)
    for size in ((7, 7), (8, 7), (11, 13)):
        x = features[:, :, : size[0], : size[1]]
        assert torch.equal(model.avgpool(x), nn.AvgPool2d(7)(x))
        logits = model.fc(nn.AvgPool2d(7)(x) if "dla" in name else nn.AvgPool2d(7)(x).flatten(1))
        assert torch.equal(model.forward_head(x), logits.flatten(1))
    for size in ((6, 9), (7, 6)):
        x = features[:, :, : size[0], : size[1]]
        assert torch.equal(model.avgpool(x), nn.AdaptiveAvgPool2d(1)(x))
    assert model.avgpool(features.repeat(1, 1, 2, 1)).shape[2:] == (1, 1)
    model.reset_classifier(3)
    assert torch.equal(model.avgpool(features), nn.AvgPool2d(7)(features))


def test_parts_can_be_moved_and_trained(x):
    model = OfParts(create("res2net50_v1b_26w_4s")).train()
    model(x).square().sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_gradients_are_the_authors(x):
    """The order of adding a map's gradients from three layers affects rounding: the authors' shortcut comes last."""

    def forward(net):
        maps = [net.maxpool(net.relu(net.bn1(net.conv1(x))))]
        for stage in (net.layer1, net.layer2, net.layer3, net.layer4):
            y = maps[-1]
            for block in stage:
                branch = block.bn3(block.conv3(block.forward_groups(block.conv1(y))))
                y = block.relu(branch + (y if block.downsample is None else block.downsample(y)))
            maps.append(y)
        return maps

    model, gradients = create("res2net50_v1b", maps=(0, 1, 2, 3, 4)).train(), []
    for maps in (forward(model), model(x)):
        model.zero_grad()
        sum(m.square().mean() for m in maps).backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_classifier_can_be_replaced(x):
    model = create("res2net50_v1b_26w_4s")
    model.fc = nn.Sequential(nn.Linear(model.fc.in_features, 8), nn.Linear(8, 3))
    assert model(x).shape == (2, 3)
    model.fc = nn.Identity()
    assert model(x).shape == (2, 256)
    del model.fc, model.avgpool
    assert ByAttribute(model)(x)[-1].shape[1] == 256


@pytest.mark.parametrize("name", ["res2net50_v1b", "res2net50", "res2next_dla60"])
def test_initial_weights_are_the_authors(name):
    """Convolutions are drawn in their order from a normal distribution of their outputs, and every norm starts at 1."""
    torch.manual_seed(5)
    model = getattr(originals, name)(num_classes=3)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert (module.weight == 1).all() and (module.bias == 0).all()
    if "dla" not in name:
        torch.manual_seed(5)
        ours = timm.create_model(ARCHITECTURES[name], num_classes=3, zero_init_last=False).state_dict()
        assert all(torch.equal(tensor, ours[key]) for key, tensor in model.state_dict().items())
    conv = model.get_submodule("layer4.1.conv3" if "dla" not in name else "level5.tree2.conv3")
    assert conv.weight.std().item() == pytest.approx((2 / conv.out_channels) ** 0.5, rel=0.01)


def test_copies(x, tmp_path):
    model = create("res2net50_v1b_26w_4s")
    torch.save(model, tmp_path / "model.pt")
    for same in (
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        torch.load(tmp_path / "model.pt", weights_only=False),
        torch.jit.script(model),
    ):
        assert torch.equal(same(x), model(x))
    parallel = nn.DataParallel(create("res2net50_v1b_26w_4s"))
    parallel.load_state_dict({f"module.{key}": tensor for key, tensor in model.state_dict().items()})
    assert torch.equal(parallel.module(x), model(x))


def test_models_that_were_pickled_with_the_authors_classes(x):
    """They have different attributes: no modules without effect, and `stype`, `width` and `nums` are stored."""
    expected = create("res2net50_v1b")
    model = copy.deepcopy(expected)
    for stage in (model.layer1, model.layer2, model.layer3, model.layer4):
        for number, block in enumerate(stage):
            own = {name: module for name, module in block._modules.items() if type(module) is not nn.Identity}
            sizes = dict(stype=block.stype, width=block.width, nums=block.nums, scale=block.scale)
            state = {**vars(nn.Module().eval()), "_modules": own, "downsample": None, **sizes}
            if "downsample" in own:
                del state["downsample"]
            stage[number] = originals.Bottle2neck.__new__(originals.Bottle2neck)
            stage[number].__setstate__(state)
    restored = originals.Res2Net.__new__(originals.Res2Net)
    attributes = dict(inplanes=256, baseWidth=26, scale=4)
    restored.__setstate__({**vars(nn.Module().eval()), "_modules": model._modules, **attributes})
    assert torch.equal(restored(x), expected(x)) and restored.v1b
    again = pickle.loads(pickle.dumps(restored)).train()
    again(x).sum().backward()
    assert again.layer2[1].stype == "normal" and again.conv1[0].weight.grad is not None
    assert restored.state_dict().keys() == expected.state_dict().keys()


class TestWeights:
    def test_published(self, hub, tmp_path):
        released = spread(timm.create_model("res2net50d"))
        write_model_folder(tmp_path / "released", released, model_card("released", "# released", None))
        hub.add("models/timm/res2net50d.in1k", tmp_path / "released")
        model = originals.res2net50_v1b_26w_4s(pretrained=True)
        assert all(torch.equal(tensor, model.state_dict()[key]) for key, tensor in released.state_dict().items())
        small = originals.res2net50_v1b(True, num_classes=2)
        assert small.fc.out_features == 2 and torch.equal(small.conv1[0].weight, released.conv1[0].weight)

    @pytest.mark.parametrize("name", ["res2net50_v1b_26w_4s", "res2next_dla60"])
    def test_path(self, name, tmp_path):
        model, path = create(name), tmp_path / "weights.pth"
        small = SMALL_DLA if "dla" in name else FEW
        state = model.state_dict()
        for content in (state, {"state_dict": {f"module.{key}": tensor for key, tensor in state.items()}}):
            torch.save(content, path)
            loaded = getattr(originals, name)(pretrained=str(path), **small)
            read = zoo_model(name, loaded).state_dict()
            assert read.keys() <= state.keys() and all(torch.equal(state[key], read[key]) for key in read)
        assert getattr(originals, name)(path, **small).training

    def test_path_of_a_file_that_does_not_fit(self, tmp_path):
        path = tmp_path / "weights.pth"
        torch.save(create("res2net50_v1b", num_classes=5).state_dict(), path)
        with pytest.raises(InputError, match="the file has 5 classes and the model 1000"):
            originals.res2net50_v1b(path, **FEW)
        with pytest.raises(InputError, match="cannot read no/such"):
            originals.res2net50_v1b("no/such", **FEW)

    def test_path_of_a_malicious_file(self, tmp_path):
        class Attack:
            def __reduce__(self):
                return os.mkdir, (str(tmp_path / "attacked"),)

        torch.save({"state_dict": Attack()}, tmp_path / "weights.pth")
        with pytest.raises(InputError):
            originals.res2net50_v1b(tmp_path / "weights.pth", **FEW)
        assert not (tmp_path / "attacked").exists()

    def test_dla_loads_files_with_and_without_unused_projections(self):
        model = create("res2net_dla60")
        ours = zoo_model("res2net_dla60", model)
        assert model.state_dict().keys() > ours.state_dict().keys()
        again = create("res2net_dla60")
        for state in (model.state_dict(), ours.state_dict()):
            again.load_state_dict(state, strict=True)
        with pytest.raises(RuntimeError, match="Missing"):
            again.load_state_dict({key: tensor for key, tensor in state.items() if "level3" not in key})


@pytest.mark.parametrize("argument", ["output_stride", "dilation", "grid"])
@pytest.mark.parametrize("name", ["res2net50_v1b_26w_4s", "res2net_dla60"])
def test_ambiguous_arguments_are_refused(name, argument):
    with pytest.raises(TypeError, match=rf"^{argument} means .*strides, dilations and multi_grid.*dilation_rule"):
        getattr(originals, name)(pretrained=False, **{argument: 16})


@pytest.mark.parametrize("argument", ["baseWidth", "v1b", "frobnicate"])
def test_unknown_arguments_are_refused(argument):
    with pytest.raises(TypeError, match=argument):
        originals.res2net50_v1b_26w_4s(**{argument: 1})


def test_dilation_in_place_of_a_shortcut_is_refused():
    """Copies with a dilation take it as the block's fourth argument."""
    with pytest.raises(TypeError, match=r"downsample is 2; it must be a module or None: for .* strides, dil"):
        originals.Bottle2neck(64, 16, 1, 2)


def test_maps(x):
    expected = ByAttribute(create("res2net50_v1b"))(x)[1:]
    for maps in ((1, 2, 3, 4), (0, 1, 2, 3, 4), (3, 1), [4]):
        found = create("res2net50_v1b", maps=maps)(x)
        assert isinstance(found, list) and len(found) == len(maps)
        assert all(torch.equal(a, expected[i]) for a, i in zip(found, maps, strict=True))
    model = create("res2net50_v1b", maps=(1, 4)).train()
    model.set_grad_checkpointing()
    model(x)[1].sum().backward()
    assert model.conv1[0].weight.grad.abs().sum() > 0 and "fc.weight" in model.state_dict()
    levels = create("res2net_dla60", return_levels=True)(x[:, :, :64, :96])
    assert [tuple(level.shape[1:]) for level in levels][::5] == [(16, 64, 96), (64, 2, 3)]
    assert torch.equal(create("res2net_dla60", maps=(5,))(x[:, :, :64, :96])[0], levels[5])
    for wrong in ((), (5,), (1.0,), (-1,)):
        with pytest.raises(ValueError, match="maps is"):
            originals.res2net50_v1b(maps=wrong)


# What copies of the authors' file compute for an output_stride: UACANet's 8, 16 and 32, and InSPyReNet's 8 and 32.
DILATED = [
    dict(strides=(1, 2, 1, 1), dilations=(1, 1, 2, 4)),
    dict(strides=(1, 2, 2, 1), dilations=(1, 1, 1, 2)),
    dict(strides=(1, 2, 2, 2), dilations=(1, 1, 2, 4)),
    dict(strides=(1, 2, 1, 1), dilations=(1, 1, 2, 4), multi_grid=(1, 2, 1)),
    dict(strides=(1, 2, 2, 2), dilations=(1, 1, 2, 4), multi_grid=(1, 2, 4)),
]


@pytest.mark.parametrize("arguments", DILATED)
def test_dilation_of_copies(arguments, x):
    """Every convolution has its stage's dilation, also in the first block, whose shortcut pools only for its stride."""
    depth = dict(layers=(1, 2, 1, 3))
    model = create("res2net50_v1b", **depth, **arguments)
    plain = create("res2net50_v1b", **depth)
    plain.load_state_dict(model.state_dict())
    stages = zip(range(1, 5), arguments["strides"], arguments["dilations"], strict=True)
    for number, stride, dilation in stages:
        stage = getattr(plain, f"layer{number}")
        factors = arguments.get("multi_grid", (1, 1, 1)) if number == 4 else (1, 1, 1)
        for block, factor in zip(stage, factors, strict=False):
            for conv in block.convs:
                conv.dilation = conv.padding = (dilation * factor,) * 2
        for conv in stage[0].convs:
            conv.stride = (stride, stride)
        stage[0].pool.stride = stride
        if number > 1:
            stage[0].downsample[0] = nn.AvgPool2d(stride, stride, ceil_mode=True, count_include_pad=False)
    assert torch.equal(model(x), plain(x))
    maps = create("res2net50_v1b", **depth, **arguments, maps=(0, 1, 2, 3, 4))(x)
    assert all(torch.equal(a, b) for a, b in zip(maps, ByAttribute(plain)(x)[1:], strict=True))


def test_output_stride_with_a_rule():
    given = dict(output_stride=16, dilation_rule="mmdet")
    model = create("res2net50", **given)
    assert str(model.layer4) == str(create("res2net50", strides=(1, 2, 2, 1), dilations=(1, 1, 1, 2)).layer4)


class TestClasses:
    """`Res2Net(Bottle2neck, [3, 4, 6, 3], baseWidth=26, scale=4)`, as copies of the authors' functions call it."""

    @pytest.mark.parametrize(("name", "v1b"), [("res2net50_v1b", True), ("res2net50", False)])
    def test_network(self, x, name, v1b):
        model = create(name)
        channels = FEW["channels"]
        same = originals.Res2Net(originals.Bottle2neck, [1, 2, 1, 1], 26, 4, v1b=v1b, channels=channels).eval()
        same.load_state_dict(model.state_dict())
        assert torch.equal(same(x), model(x)) and same.relu.inplace == model.relu.inplace
        with pytest.raises(TypeError, match=r"must be res2net_zoo\.originals\.Bottle2neck"):
            originals.Res2Net(nn.Identity, [1, 2, 1, 1])

    def test_subclass(self, x):
        """A subclass with its own `forward`, as in projects that use the class of `res2net.py`."""

        class WithoutPooling(originals.Res2Net):
            def __init__(self, block, layers, baseWidth=26, scale=4, **kwargs):
                super().__init__(block, layers, baseWidth=baseWidth, scale=scale, v1b=False, **kwargs)

            def forward(self, x):
                x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
                return self.layer4(self.layer3(self.layer2(self.layer1(x))))

        model = create("res2net50")
        derived = WithoutPooling(originals.Bottle2neck, [1, 2, 1, 1], channels=FEW["channels"]).eval()
        derived.load_state_dict(model.state_dict())
        assert torch.equal(derived(x), model.forward_features(x))

    def test_blocks(self):
        shortcut = nn.Conv2d(8, 64, 1)
        first = spread(originals.Bottle2neck(8, 16, 1, shortcut, baseWidth=32, scale=2, stype="stage")).eval()
        x = torch.randn(1, 8, 7, 7)
        a, b = first.relu(first.bn1(first.conv1(x))).chunk(2, 1)
        out = torch.cat([first.relu(first.bns[0](first.convs[0](a))), nn.AvgPool2d(3, 1, 1)(b)], 1)
        assert torch.equal(first(x), torch.relu(first.bn3(first.conv3(out)) + shortcut(x)))
        normal = originals.Bottle2neck(64, 16)
        assert (normal.stype, normal.width, normal.nums) == ("normal", 6, 3) and normal.hierarchical

    def test_another_stage(self, x):
        model = create("res2net50_v1b")
        model.inplanes = model.layer3[-1].bn3.num_features
        branch = model._make_layer(originals.Bottle2neck, 64, 1, stride=2)
        assert branch.state_dict().keys() == model.layer4.state_dict().keys()
        spread(branch).eval().load_state_dict(model.layer4.state_dict())
        maps = ByAttribute(model)(x)
        assert torch.equal(branch(maps[-2]), maps[-1]) and model.inplanes == 256


class TestZoo:
    """The functions return models of the zoo."""

    def test_interface_of_timm(self, x):
        model = create("res2net50_v1b_26w_4s")
        assert isinstance(model, timm.models.ResNet) and model.act1 is model.relu and model.global_pool is model.avgpool
        features = model.forward_features(x)
        assert torch.equal(model.forward_head(features), model(x))
        assert model.forward_head(features, pre_logits=True).shape == (2, 256)
        intermediates = model.forward_intermediates(x, intermediates_only=True)
        assert torch.equal(intermediates[-1], features)
        model.reset_classifier(5)
        assert model(x).shape == (2, 5) and [name for name, _ in model.named_children()][-2:] == ["avgpool", "fc"]
        model.reset_classifier(0, "")
        assert torch.equal(model(x), features)
        of_stages = create("res2net50_v1b", features_only=True)
        assert [f.shape[1] for f in of_stages(x)] == [64, 64, 128, 192, 256]

    def test_interface_of_timm_for_dla(self):
        model, x = create("res2next_dla60"), torch.randn(1, 3, 64, 64)
        assert torch.equal(model.forward_head(model.forward_features(x)), model(x))
        model.reset_classifier(3)
        assert model(x).shape == (1, 3) and [name for name, _ in model.named_children()][-2:] == ["avgpool", "fc"]
        assert torch.equal(torch.jit.script(model)(x), model(x))

    @pytest.mark.first_case
    @pytest.mark.parametrize(
        ("name", "size"), [("res2net50_v1b_26w_4s", 64), ("res2net_dla60", 64), ("res2next50", 256)]
    )
    def test_optimize(self, name, size):
        model, x = create(name), torch.randn(1, 3, size, size)
        with torch.no_grad():
            assert relative_error(res2net_zoo.optimize(model, x, backend="native")(x), model(x)) < 1e-5

    def test_folder(self, x, tmp_path):
        model = create("res2net50_v1b", num_classes=3, maps=None)
        write_model_folder(tmp_path / "m", model, model_card("m", "# m", None))
        again = timm.create_model(f"local-dir:{tmp_path / 'm'}", pretrained=True).eval()
        assert torch.equal(again(x), model(x))
        assert all(isinstance(block, Res2NetModule) for block in model.layer1)

    def test_export(self, x):
        model = create("res2net50_v1b")
        assert torch.equal(torch.export.export(model, (x,)).module()(x), model(x))
        content = io.BytesIO()
        torch.jit.save(torch.jit.trace(model, x), content)
        content.seek(0)
        assert relative_error(torch.jit.load(content)(x), model(x)) < 1e-6


def test_torch_hub_in_a_process(tmp_path):
    code = (
        "import sys, torch\n"
        f"model = torch.hub.load({str(ROOT)!r}, 'res2net50_v1b_26w_4s', source='local', num_classes=3)\n"
        "print(model.fc.out_features, sys.modules['res2net_zoo'].__file__)"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True, check=True
    )
    assert run.stdout.split() == ["3", str(ROOT / "res2net_zoo" / "__init__.py")]


def test_torch_hub_has_the_authors_functions():
    import hubconf

    assert {name: getattr(hubconf, name) for name in hubconf.__all__} == {
        name: getattr(originals, name) for name in ARCHITECTURES
    }
    assert len(hubconf.__all__) == len(ARCHITECTURES) == 15


@pytest.mark.full
def test_importing_the_zoo_does_not_import_the_interface():
    code = "import sys, res2net_zoo; print('res2net_zoo.originals' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert run.stdout == "False\n"
