"""Extraction of the backbone from any checkpoint: what `convert` recognizes, omits and refuses."""

import argparse
import json
import os
import re
from collections import OrderedDict
from datetime import datetime
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn
from torchvision.ops import FeaturePyramidNetwork

from res2net_zoo import catalog
from res2net_zoo.utils.errors import InputError
from res2net_zoo.weights.backbone import compare_all, find, group_by_prefix
from res2net_zoo.weights.downloads import released_as, sha256_of
from res2net_zoo.weights.layouts import to_layout, wiring_doubt
from tests.conftest import input_error, read_tree, spread
from tests.weights.originals.spec import to_holocron, to_mindspore, to_mmpretrain, to_paddle
from tests.weights.test_convert import ORIGINALS, write

pytestmark = pytest.mark.first_case

TINY = "res2net_tiny"
State = dict[str, torch.Tensor]


def to_mmdet(name: str) -> str:
    """Return MMDetection's name of a tensor of a model with a deep stem."""
    module, _, rest = name.partition(".")
    return {"conv1": f"stem.{rest}", "bn1": f"stem.7.{rest}"}.get(module, name)


@pytest.fixture(scope="module")
def tiny() -> State:
    return spread(timm.create_model(TINY, num_classes=5)).state_dict()


def without_classifier(state: State) -> State:
    return {name: tensor for name, tensor in state.items() if not name.startswith("fc.")}


def prefixed(state: State, prefix: str) -> State:
    return {prefix + name: tensor for name, tensor in state.items()}


def saved(path: Path, content: object) -> Path:
    torch.save(content, path)
    return path


def refused(*args: object, **kwargs: object) -> str:
    with pytest.raises(InputError) as caught:
        find(*args, **kwargs)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 1500
    return str(caught.value)


class Detector(nn.Module):
    """A detector around features of the zoo."""

    def __init__(self, name: str, **kwargs: object) -> None:
        super().__init__()
        self.backbone = timm.create_model(name, features_only=True, **kwargs)
        self.neck = FeaturePyramidNetwork(self.backbone.feature_info.channels(), 8)
        self.head = nn.Conv2d(8, 3, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        maps = self.neck(OrderedDict((str(i), feature) for i, feature in enumerate(self.backbone(x))))
        return sum(self.head(feature).mean() for feature in maps.values())


def test_a_detector_gives_its_backbone_to_another(in_process, tmp_path):
    detector, x = Detector(TINY), torch.randn(2, 3, 64, 64)
    spread(detector.backbone)
    optimizer = torch.optim.AdamW(detector.parameters())
    detector(x).backward()
    optimizer.step()
    run = {
        "epoch": np.float64(3),
        "args": argparse.Namespace(data=Path("images"), started=datetime.now()),
        "model": prefixed(detector.state_dict(), "module."),
        "optimizer": optimizer.state_dict(),
    }
    args = ["--checkpoint", saved(tmp_path / "last.pth", run), "--wiring", "official", "--output", tmp_path / "out"]
    contents = []
    for _ in range(2):
        result = in_process("hub/convert.py", *args)
        assert result.returncode == 0, result.stderr
        contents.append(read_tree(tmp_path / "out"))
    assert contents[0] == contents[1]
    assert "recognized res2net_tiny under the prefix model.module.backbone." in result.stdout
    assert "wiring official: as chosen" in result.stdout and "classes: none" in result.stdout
    assert "model.module.neck. 20: model.module.neck.inner_blocks.0.0.weight" in result.stdout
    assert re.search(r"\n  optimizer\. \d{3}: optimizer\.state\.0\.", result.stdout)
    other = Detector(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    with torch.no_grad():
        for ours, theirs in zip(other.backbone(x), detector.eval().backbone(x), strict=True):
            assert torch.equal(ours, theirs)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["architecture"] == TINY and config["num_classes"] == 0
    assert config["provenance"]["origin"] == "file" and config["provenance"]["source"] == "a file called last.pth"
    card = (tmp_path / "out" / "README.md").read_text()
    assert "model.module.backbone." in card and "license:" not in card and "features_only" in card
    assert in_process("hub/verify.py", tmp_path / "out").returncode == 0


@pytest.mark.parametrize(
    "prefix",
    ["", "backbone.", "resnet.", "encoder.", "module.", "model.", "net.", "module.model.encoder.", "_orig_mod.net.a."],
)
def test_prefixes(prefix, tiny, tmp_path):
    state = {**prefixed(tiny, prefix), "decoder.weight": torch.ones(1), f"{prefix}layer1_extra.weight": torch.ones(1)}
    found = find(saved(tmp_path / "file", state), wiring="official")
    assert (found.prefix, found.architecture, found.num_classes) == (prefix, TINY, 5)
    assert found.left_out == ["decoder.weight", f"{prefix}layer1_extra.weight"]
    assert found.state.keys() == tiny.keys() and all(torch.equal(found.state[key], tiny[key]) for key in tiny)


CONTAINERS = ["state_dict", "model", "model_state", "model_state_dict", "ema", "state_dict_ema", "net"]


@pytest.mark.parametrize("container", CONTAINERS)
def test_containers(container, tiny, tmp_path):
    found = find(saved(tmp_path / "file", {"step": 1, container: prefixed(tiny, "net.")}), wiring="official")
    assert found.prefix == f"{container}.net." and not found.left_out


def test_checkpoints_of_lightning_and_mmengine(tiny, tmp_path):
    class Config(dict):
        """A type of another library, with content and state."""

    Config.__module__, Config.__qualname__ = "__main__", "Config"
    import __main__

    __main__.Config = Config
    try:
        config = Config(lr=0.1)
        config.frozen = True
        lightning = {
            "pytorch-lightning_version": "2.5",
            "callbacks": {("a", 1): {"best": torch.tensor(0.5)}},
            "hyper_parameters": config,
            "rng": np.random.RandomState(0).get_state(),
            "state_dict": prefixed(tiny, "model.encoder."),
        }
        saved(tmp_path / "file", lightning)
    finally:
        del __main__.Config
    found = find(tmp_path / "file", wiring="official")
    assert found.prefix == "state_dict.model.encoder." and found.num_classes == 5
    # A run of MMEngine itself, with the history of its losses; the small model is not registered.
    assert "stage depths 1-2-1-1, widths 4-4-4-4, scale 4, cardinality 1 and a deep stem" in refused(
        ORIGINALS / "mmengine_small_trained.pth"
    )


def test_model_pickled_whole(tiny, tmp_path):
    model = nn.Sequential(OrderedDict(backbone=timm.create_model(TINY, num_classes=5), head=nn.Linear(5, 2)))
    model.backbone.load_state_dict(tiny)
    found = find(saved(tmp_path / "file", model), wiring="official")
    assert found.prefix == "backbone." and found.left_out == ["head.weight", "head.bias"]
    assert all(torch.equal(found.state[key], tiny[key]) for key in tiny)


@pytest.mark.parametrize("legacy", [False, True])
def test_training_runs_are_read_without_executing_code(legacy, tiny, tmp_path):
    class Dangerous:
        def __init__(self, call: tuple) -> None:
            self.call = call

        def __reduce__(self) -> tuple:
            return self.call

    marker = tmp_path / "marker"
    for call in ((os.mkdir, (str(marker),)), (eval, (f"open({str(marker)!r}, 'w')",)), (getattr, ("name", "upper"))):
        content = {"state_dict": tiny, "hook": Dangerous(call)}
        torch.save(content, tmp_path / "file", _use_new_zipfile_serialization=not legacy)
        assert "it would call" in refused(tmp_path / "file", wiring="official")
    # An object of another library is not imported either.
    torch.save({"state_dict": tiny, "a": Dangerous((spread, (1,)))}, tmp_path / "file")
    assert find(tmp_path / "file", wiring="official").num_classes == 5
    assert not marker.exists()


def test_safetensors(tiny, tmp_path):
    save_file(prefixed(tiny, "encoder."), tmp_path / "file")
    assert find(tmp_path / "file", wiring="official").prefix == "encoder."


def in_format(path: Path, format: str, state: State) -> Path:
    """Write a state dict with the names of a format."""
    rename = {
        "mmdet": lambda name: f"backbone.{to_mmdet(name)}",
        "mmpretrain": to_mmpretrain,
        "paddle": to_paddle,
        "mindspore": lambda name: to_mindspore(name, list(state[name].shape)),
        "holocron": to_holocron,
    }[format]
    kept = {name: t for name, t in state.items() if format[:2] == "mm" or not name.endswith("num_batches_tracked")}
    transposed = format == "paddle"
    arrays = {rename(name): (t.T if transposed and name == "fc.weight" else t).numpy() for name, t in kept.items()}
    return write(path, format, arrays)


@pytest.mark.parametrize(
    ("format", "name", "wiring"),
    [
        ("mmdet", "res2net50_v1d_26w_4s", "mmdet"),
        ("mmdet", TINY, "mmdet"),
        ("mmpretrain", TINY, "official"),
        ("paddle", "res2net50_vd_26w_4s", "paddle"),
        ("mindspore", TINY, "official"),
        ("holocron", "res2net50_26w_4s", "official"),
    ],
)
def test_formats_imply_a_wiring(format, name, wiring, tmp_path):
    state = spread(timm.create_model(name, num_classes=5)).state_dict()
    found = find(in_format(tmp_path / "file", format, state))
    assert (found.architecture, found.wiring, found.num_classes, found.contradiction) == (name, wiring, 5, "")
    assert bool(found.model_args) == (name == TINY and wiring == "mmdet")
    for key, tensor in found.state.items():
        assert torch.equal(tensor, state[key]) or key.endswith("num_batches_tracked"), key


@pytest.mark.parametrize("name", catalog.load().architectures)
def test_every_architecture_is_recognized(name):
    with torch.device("meta"):
        state = timm.create_model(name).state_dict()
    candidate = compare_all(prefixed(state, "net."), "net.")
    assert name in [misfit.model for misfit in candidate.misfits if not misfit.total]


@pytest.mark.parametrize("name", ["res2net50_26w_4s", "res2net50d"])
def test_other_combinations_of_stem_and_shortcut(name, in_process, tmp_path):
    """MMDetection's options `deep_stem` and `avg_down` are independent of each other."""
    avg_down = name == "res2net50_26w_4s"
    model = spread(timm.create_model(name, num_classes=5, avg_down=avg_down, block_args={"wiring": "mmdet"})).eval()
    path = saved(tmp_path / "file", {f"backbone.{k}": tensor for k, tensor in model.state_dict().items()})
    args = ["--checkpoint", path, "--output", tmp_path / "out"]
    assert f"shapes of {name} with avg_down={avg_down}, but" in input_error(in_process("hub/convert.py", *args))
    assert in_process("hub/convert.py", *args, "--wiring", "mmdet").returncode == 0
    ours, x = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval(), torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(ours(x), model(x))


def test_wiring_without_a_model_of_its_own_is_recorded(in_process, tiny, tmp_path):
    saved(tmp_path / "file", {f"backbone.{to_mmdet(name)}": tensor for name, tensor in tiny.items()})
    result = in_process("hub/convert.py", "--checkpoint", tmp_path / "file", "--output", tmp_path / "out")
    assert result.returncode == 0 and "wiring mmdet: its keys stem.N are MMDetection's" in result.stdout
    expected = timm.create_model(TINY, num_classes=5, block_args={"wiring": "mmdet"}).eval()
    expected.load_state_dict(tiny)
    official = timm.create_model(TINY, num_classes=5).eval()
    official.load_state_dict(tiny)
    ours, x = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval(), torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(ours(x), expected(x)) and not torch.equal(ours(x), official(x))
    assert in_process("hub/verify.py", tmp_path / "out").returncode == 0


def test_choices_of_wiring_and_model(in_process, tmp_path):
    state = prefixed(timm.create_model("res2net50d", num_classes=0).state_dict(), "encoder.")
    path = saved(tmp_path / "file", state)
    line = refused(path)
    assert "under the prefix encoder. has the shapes of res2net50d" in line
    assert all(f"{wiring} (" in line for wiring in ("official", "paddle", "mmdet"))
    assert "(--wiring)" in input_error(in_process("hub/convert.py", "--checkpoint", path, "--output", tmp_path / "out"))
    for wiring, name in dict(official="res2net50d", paddle="res2net50_vd_26w_4s", mmdet="res2net50_v1d_26w_4s").items():
        assert find(path, wiring=wiring)[1:4] == (name, {}, wiring)
        assert find(path, architecture=name)[1:4] == (name, {}, wiring)
    with pytest.raises(InputError, match="with the wiring paddle it is res2net50_vd_26w_4s"):
        find(path, wiring="paddle", architecture="res2net50d")
    assert "do not fit res2net101d" in refused(path, architecture="res2net101d") or "not complete" in refused(
        path, architecture="res2net101d"
    )
    args = ["--checkpoint", path, "--model", "res2net50_v1b_26w_4s", "--output", tmp_path / "out"]
    result = in_process("hub/convert.py", *args)
    assert result.returncode == 0 and "recognized res2net50d under" in result.stdout and not result.stderr
    # The authors' weights under MMDetection's keys were trained with the official wiring.
    renamed = saved(tmp_path / "renamed", {to_mmdet(name.removeprefix("encoder.")): t for name, t in state.items()})
    found = find(renamed, architecture="res2net50d")
    assert found.wiring == "official" and "whose wiring is mmdet" in found.contradiction


DEEP = "cardinality 1 and a deep stem"


def small(**kwargs: object) -> State:
    return timm.create_model(TINY, **kwargs).state_dict()


WITHOUT_ONE = {
    "two": (
        lambda s: {**prefixed(s, "a."), **prefixed({name: t + 1 for name, t in s.items()}, "b.net.")},
        r"has 2 complete Res2Nets: under the prefix a\. \(res2net_tiny: stage depths 1-2-2-1, widths 6-13-26-39, .*\) "
        r"and under the prefix b\.net\. \(res2net_tiny: .*\); name the prefix of one$",
    ),
    "half": (
        lambda s: {name: t for name, t in s.items() if not name.startswith(("layer3", "layer4"))},
        f"is not complete: it has stage depths 1-2, widths 6-13, scale 4, {DEEP} and lacks 85 of the 185 tensors of "
        "res2net_tiny: all of layer3; all of layer4; name a file or a prefix with all$",
    ),
    "half, with fewer tensors than it lacks": (
        lambda s: {
            name: t
            for name, t in timm.create_model("res2net50_26w_4s").state_dict().items()
            if not name.startswith(("layer3", "layer4"))
        },
        "is not complete: it has stage depths 3-4, widths 26-52, .* of res2net50_26w_4s: all of layer3; all of layer4;",
    ),
    "no stem": (
        lambda s: {name: t for name, t in s.items() if name.startswith("layer")},
        "not complete: .* no stem and lacks 15 of the 185 tensors of res2net_tiny: all of conv1; all of bn1;",
    ),
    "one missing": (
        lambda s: {name: t for name, t in s.items() if name != "layer2.1.convs.1.weight"},
        "not complete: .* lacks 1 of the 185 tensors of res2net_tiny: layer2.1.convs.1.weight;",
    ),
    "misshapen": (
        lambda s: {name: torch.ones(3) if name == "layer2.1.bn1.bias" else t for name, t in s.items()},
        r"do not fit res2net_tiny: layer2.1.bn1.bias has shape \(3,\) in the file and \(52,\) in the model$",
    ),
    "unexpected": (
        lambda s: {**s, "layer2.1.gate.weight": torch.ones(3)},
        "do not fit res2net_tiny: layer2.1.gate.weight is not in the model$",
    ),
    "a ResNet": (
        lambda s: {"model": timm.create_model("resnet50").state_dict(), "fpn.weight": torch.ones(1)},
        "has no Res2Net: under the prefix model. it has a ResNet of stage depths 3-4-6-3, widths 64-128-256-512 and a "
        "7x7 stem; .*; name a file with one$",
    ),
    "another network": (
        lambda s: {"weight": torch.ones(1), "layer.bias": torch.ones(1)},
        "has no Res2Net: its 2 tensors are under weight, layer, and none has the name of a block, such as layer1",
    ),
    "deformable convolutions": (
        lambda s: {**s, **{k.replace("weight", "offset"): t for k, t in s.items() if ".convs." in k}},
        "do not fit res2net_tiny: layer1.0.convs.0.offset is not in the model; .* and 1\\d more$",
    ),
    "many": (
        lambda s: {f"a{i}.layer1.0.convs.0.weight": torch.ones(1) for i in range(40)},
        "blocks of Res2Nets under 40 prefixes; the limit is 32",
    ),
    "no tensors": (lambda s: {"epoch": 3}, "has no Res2Net: it has no tensors"),
    "unknown widths": (
        lambda s: prefixed(small(layers=(1, 2, 4, 1), base_width=20), "net."),
        "under the prefix net. has the shape of no registered model: it has stage depths 1-2-4-1, widths 5-10-20-30, "
        f"scale 4, {DEEP}; the nearest is .*, which has .*; name the prefix of another backbone, or a model to list",
    ),
    "unknown depths": (
        lambda s: small(layers=(1, 2, 1, 1)),
        "no registered model: it has stage depths 1-2-1-1, .*; the nearest is res2net_tiny, which has .* 1-2-2-1,",
    ),
}


@pytest.mark.parametrize("case", WITHOUT_ONE)
def test_files_without_one_complete_res2net(case, tiny, tmp_path):
    change, words = WITHOUT_ONE[case]
    line = refused(saved(tmp_path / "file", change(tiny)), wiring="official")
    assert re.search(words, line), line


def test_prefix_chooses_between_backbones(tiny, tmp_path):
    other = {name: tensor + 1 for name, tensor in tiny.items()}
    content = {"state_dict": {**prefixed(tiny, "student.net."), **prefixed(other, "net.")}}
    path = saved(tmp_path / "file", content)
    for prefix in ("student.net", "student.net.", "state_dict.student.net."):
        assert torch.equal(find(path, prefix=prefix, wiring="official").state["fc.bias"], tiny["fc.bias"])
    assert torch.equal(find(path, prefix="state_dict.net", wiring="official").state["fc.bias"], other["fc.bias"])
    assert "2 complete Res2Nets" in refused(path, prefix="net", wiring="official")
    assert "no Res2Net under the prefix teacher.; there is one under the prefix state_dict.student.net. and" in refused(
        path, prefix="teacher"
    )


def test_one_module_under_two_names_is_one_backbone(tiny, tmp_path):
    path = saved(tmp_path / "file", {**prefixed(tiny, "net."), **prefixed(tiny, "encoder.body.")})
    found = find(path, wiring="official")
    assert found.prefix == "net." and len(found.left_out) == len(tiny)


@pytest.mark.parametrize("channels", [1, 6])
def test_images_with_other_channels(channels, in_process, tmp_path):
    net = spread(timm.create_model(TINY, in_chans=channels, num_classes=2)).eval()
    path = saved(tmp_path / "run.pth", {"state_dict": prefixed(net.state_dict(), "module.resnet.")})
    args = ["--checkpoint", path, "--wiring", "official", "--output", tmp_path / "out"]
    result = in_process("hub/convert.py", *args)
    assert result.returncode == 0 and f"\n  channels of its images: {channels}\n" in result.stdout
    again, x = (
        timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval(),
        torch.randn(1, channels, 64, 64),
    )
    assert torch.equal(again(x), net(x))


def moved(net: nn.Module, how: str) -> nn.Module:
    """Return a project's module that holds the parts of a Res2Net, next to others."""
    first, second = nn.Conv2d(3, 3, 1, bias=False), nn.BatchNorm2d(3)
    if how == "children":
        return nn.ModuleDict({"pre": first, "norm": second, "features": nn.Sequential(*list(net.children())[:-1])})
    if how == "parts":
        stem = nn.Sequential(net.conv1, net.bn1, net.act1)
        parts = {"layer0": stem, "layer1": nn.Sequential(net.maxpool, net.layer1), "layer2": net.layer2}
        return nn.ModuleDict({"norm": second, **parts, "layer3": net.layer3, "layer4": net.layer4, "head": first})
    names = ["conv", "bn", "act", "pool", "encoder1", "encoder2", "encoder3", "encoder4"]
    return nn.ModuleDict(dict(zip(names, net.children(), strict=False)) | {"decoder": first})


@pytest.mark.parametrize("name", [TINY, "res2net50_26w_4s"])
@pytest.mark.parametrize("how", ["children", "parts", "names"])
def test_parts_in_modules_of_a_project(how, name, tmp_path):
    with torch.device("cpu" if name == TINY else "meta"):
        net = timm.create_model(name)
    if name != TINY:
        net = net.to_empty(device="cpu")
        for tensor in net.state_dict().values():
            tensor.fill_(1)
    project = prefixed(moved(net, how).state_dict(), "module.")
    backbone = find(saved(tmp_path / "run.pth", {"state_dict": project}), wiring="official")
    expected = without_classifier(net.state_dict())
    assert backbone.architecture == name and backbone.num_classes == 0
    assert backbone.prefix == ("state_dict.module.features." if how == "children" else "state_dict.module.")
    assert backbone.state.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[key]) for key, tensor in backbone.state.items())
    incomplete = {key: tensor for key, tensor in project.items() if not key.endswith("0.convs.1.weight")}
    assert "state_dict" in refused(saved(tmp_path / "half.pth", {"state_dict": incomplete}), wiring="official")


def test_half_precision_and_other_classifiers(tiny, tmp_path):
    other = {"fc.0.weight": torch.ones(4, 384), "fc.0.bias": torch.ones(4)}
    half = {name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in tiny.items()}
    found = find(saved(tmp_path / "file", {**without_classifier(half), **other}), wiring="official")
    assert found.num_classes == 0 and found.left_out == list(other)
    assert all(torch.equal(found.state[key], half[key].to(found.state[key].dtype)) for key in found.state)


def test_omitted_tensors_are_grouped_by_prefix():
    names = ["m.net.fc.weight", "m.net.fc.bias", "m.neck.a.b", "scale", "m.x", "optimizer.0.a"]
    assert {prefix: len(group) for prefix, group in group_by_prefix(names, "m.net.").items()} == {
        "m.net.fc.": 2,
        "m.neck.": 1,
        "scale": 1,
        "m.x": 1,
        "optimizer.": 1,
    }


def test_released_file_is_recognized_by_its_hash(in_process, monkeypatch, tmp_path):
    path = saved(tmp_path / "file.pth", spread(timm.create_model("res2net50d")).state_dict())
    checkpoint = catalog.load().checkpoints["res2net50d.in1k"]
    monkeypatch.setattr(checkpoint, "sha256", sha256_of(path)[:8])
    args = ["--checkpoint", path, "--wiring", "official", "--output", tmp_path / "out"]
    result = in_process("hub/convert.py", *args)
    assert result.returncode == 0 and "res2net50d.in1k in" in result.stdout and "as published" in result.stdout
    assert released_as(path, "res2net50d", "mmdet") is None and released_as(path, "res2net101d") is None
    assert released_as(path, "res2net50d") is checkpoint


def test_checkpoint_is_downloaded_from_a_url(hub, in_process, tiny, tmp_path):
    saved(tmp_path / "det.pth", prefixed(tiny, "backbone."))
    hub.add("models/files/originals", {"det.pth": (tmp_path / "det.pth").read_bytes()})
    url = f"{hub.endpoint}/files/originals/resolve/main/det.pth"
    args = ["--checkpoint", f"{url}?signature=hunter2", "--output", tmp_path / "out"]
    line = input_error(in_process("hub/convert.py", *args))
    assert line.startswith(f"error: {url}: the Res2Net under the prefix backbone. has the shapes of res2net_tiny, but")
    assert in_process("hub/convert.py", *args, "--wiring", "official").returncode == 0
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["provenance"]["source"] == url
    assert not any(b"hunter2" in content for content in read_tree(tmp_path / "out").values())


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--checkpoint", "README.md"], "README.md: it is not a weight file of PyTorch, safetensors, PaddlePaddle"),
        (["--checkpoint", "READM.md"], "did you mean README.md?"),
        (["--checkpoint", "README.md", "--model", "res2net50"], "no model res2net50; did you mean res2net50_26w_4s"),
        (["--checkpoint", "README.md", "--wiring", "mmdett"], "invalid choice: 'mmdett'; did you mean mmdet?"),
        (
            ["--model", "res2net50d.in1k", "--prefix", "x"],
            "choose what to take from a file; name the file (--checkpoint)",
        ),
        ([], "name a weight file, or a checkpoint of the catalogue (--checkpoint, --model)"),
    ],
)
def test_bad_input_writes_nothing(in_process, args, words, tmp_path):
    assert words in input_error(in_process("hub/convert.py", *args, "--output", tmp_path / "out"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("layout", "name", "wiring", "first"),
    [
        ("mmdet", "res2net50_v1d_26w_4s", None, "stem.0.weight"),
        ("mmdet", "res2net50_26w_4s", "mmdet", "conv1.weight"),
        ("mmpretrain", "res2net50d", None, "backbone.stem.0.conv.weight"),
    ],
)
def test_round_trip_through_the_keys_of_other_code(layout, name, wiring, first, tmp_path):
    model = spread(timm.create_model(name, num_classes=5, block_args={"wiring": wiring} if wiring else None))
    state, renamed = model.state_dict(), to_layout(model.state_dict(), layout)
    assert next(iter(renamed)) == first and not wiring_doubt(model, layout)
    found = find(saved(tmp_path / "file", renamed), wiring=wiring)
    assert found.architecture == name and found.num_classes == (0 if layout == "mmdet" else 5)
    assert found.state.keys() == (without_classifier(state) if layout == "mmdet" else state).keys()
    assert all(torch.equal(found.state[key], state[key]) for key in found.state)
    expected = {"mmdet": to_mmdet, "mmpretrain": to_mmpretrain}.get(layout, str)
    deep = "conv1.0.weight" in state
    assert list(renamed) == [expected(key) if deep else key for key in found.state]


def test_other_code_lacks_some_models():
    for name in ("dla60_res2net", "seres2net50_26w_4s", "blres2net50", "res2next50", "res2next29_6c_24w_4s"):
        with torch.device("meta"):
            state = timm.create_model(name).state_dict()
        with pytest.raises(InputError, match="mmdet has only Res2Nets of four stages, without attention and cardinal"):
            to_layout(state, "mmdet")
    with pytest.raises(InputError, match="unknown keys mmseg; choose mmpretrain, mmdet"):
        to_layout({}, "mmseg")
    assert "computes the wiring mmdet: they load" in wiring_doubt(timm.create_model(TINY), "mmdet")
