"""The examples of docs/migrate.md, run without a network in a folder that has the files they name."""

import re
import shlex
from importlib import import_module
from pathlib import Path

import pytest
import timm
import torch

from tests.conftest import ROOT, SHIPPED_MODEL, import_mmengine

PAGE = (ROOT / "docs" / "migrate.md").read_text()


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch) -> Path:
    (tmp_path / "backbone").symlink_to(SHIPPED_MODEL)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def example(section: str, part: str, language: str = "diff") -> str:
    """Return the example of a section that contains some code; of a diff, the code after the change."""
    text = re.split(r"^## ", PAGE, flags=re.M)
    (text,) = [body for body in text if body.startswith(section)]
    (code,) = [code for code in re.findall(rf"^```{language}\n(.*?)^```", text, re.S | re.M) if part in code]
    if language == "diff":
        code = "".join(line[1:] + "\n" for line in code.splitlines() if not line.startswith("-"))
    return code


def run(code: str, result: str) -> torch.nn.Module:
    """Run an example with random weights in place of downloads, and return a variable."""
    names: dict[str, torch.nn.Module] = {}
    exec(re.sub(r"(?<!local-dir:backbone\", )(pretrained|encoder_weights)=True", r"\1=None", code), names)
    return names[result].eval()


def test_the_authors_file():
    start = example("From the authors' file", "import")
    model = run(start, "backbone")
    assert [*dict(model.named_children())][-2:] == ["avgpool", "fc"]
    dilated = run(start + example("From the authors' file", "dilations"), "backbone")
    image = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert model.forward_features(image).shape[-1] == 2 and dilated.forward_features(image).shape[-1] == 4


def test_mmdetection(folder):
    config = import_mmengine("mmengine.config").Config
    from mmengine.registry import MODELS

    base = 'model = dict(backbone=dict(type="ResNet", depth=50, norm_cfg=dict(type="BN"), style="pytorch"))'
    (folder / "base.py").write_text(base)
    code = example("From MMDetection", "custom_imports")
    (name,) = re.findall(r'model_name="([^"]+)"', code)
    assert timm.is_model_pretrained(name)
    code = code.replace(name, "local-dir:backbone")
    (folder / "config.py").write_text('_base_ = "base.py"\n' + code)
    model = MODELS.build(config.fromfile(folder / "config.py").model.backbone).eval()
    alone = run(example("From MMDetection", "create_model", "python"), "backbone")
    image = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert all(torch.equal(a, b) for a, b in zip(model(image), alone(image), strict=True))
    assert not model.features.layer1[0].conv1.weight.requires_grad


def test_commands_take_these_options():
    lines = re.findall(r"^res2net-zoo (\S+) (.*)$", PAGE, re.M)
    assert {command for command, _ in lines} == {"original", "convert"}
    for command, options in lines:
        assert import_module(f"res2net_zoo.cli.{command}").parse_args(shlex.split(options)).output


def test_timm():
    assert type(run(example("From timm", "create_model"), "model")).__module__ == "res2net_zoo.models.res2net"


def test_segmentation_models():
    pytest.importorskip("segmentation_models_pytorch")
    with torch.no_grad():
        network = run(example("From timm", "smp.Unet", "python"), "network")
        assert network(torch.randn(1, 3, 64, 64)).shape == (1, 21, 64, 64)


def test_paddleclas():
    code = example("From PaddleClas", "create_model")
    run(code, "model")
    (name,) = re.findall(r'create_model\("([^"]+)"', code)
    assert timm.is_model_pretrained(name)
    architectures = re.findall(r"`(res2net\w+)`", PAGE.partition("| PaddleClas")[2])
    tags = re.findall(r"`\.(\w+)`", PAGE)
    assert len(architectures) == 5 and all(timm.is_model_pretrained(name) for name in architectures)
    assert tags == ["pd_in1k", "ssld_in1k"] and all(timm.is_model_pretrained(f"{architectures[0]}.{t}") for t in tags)
