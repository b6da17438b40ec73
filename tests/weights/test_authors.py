"""Weights under the keys of the authors' code: `res2net-zoo original`."""

import gzip
import json
from collections import OrderedDict
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file

from res2net_zoo import cli
from res2net_zoo.weights.card import model_card
from res2net_zoo.weights.convert import read_torch
from res2net_zoo.weights.downloads import sha256_of
from res2net_zoo.weights.model_folder import write_model_folder
from tests.conftest import SHIPPED_MODEL, spread

pytestmark = pytest.mark.first_case

PARITY = Path(__file__).parents[1] / "models" / "parity"


def authors_shapes(reference: str) -> dict[str, list[int]]:
    """Return the shapes of the tensors in the authors' model, by their keys, including the counters of BatchNorm."""
    rows = json.loads(gzip.decompress((PARITY / f"official-{reference}.json.gz").read_bytes()))["parameters"]
    shapes = {row["name"]: row["shape"] for row in rows}
    return shapes | {
        key.replace("running_var", "num_batches_tracked"): [] for key in shapes if key.endswith(".running_var")
    }


def save(model: torch.nn.Module, folder: Path) -> str:
    write_model_folder(folder, model, model_card(folder.name, "# mine", None))
    return f"local-dir:{folder}"


def error_of(capsys: pytest.CaptureFixture, *args: object) -> str:
    capsys.readouterr()
    assert cli.main(["original", *map(str, args)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


@pytest.fixture(scope="module")
def finetuned(tmp_path_factory) -> str:
    model = spread(timm.create_model("res2net50d", num_classes=3))
    model.bn1.num_batches_tracked.fill_(7)
    return save(model, tmp_path_factory.mktemp("models") / "finetuned")


def test_published_weights_are_downloaded_to_a_file(hub, finetuned, tmp_path, monkeypatch, capsys):
    released = spread(timm.create_model("res2net50d"), seed=1)
    save(released, tmp_path / "released")
    hub.add("models/timm/res2net50d.in1k", tmp_path / "released")
    monkeypatch.chdir(tmp_path)
    assert cli.main(["original", "res2net50_v1b_26w_4s"]) == 0
    path = tmp_path / "res2net50_v1b_26w_4s-3cf99910.pth"
    assert capsys.readouterr().out.startswith(f"{path.name}: 524 tensors")
    state = torch.load(path)
    assert type(state) is OrderedDict and list(state) == list(released.state_dict())
    assert {key: list(tensor.shape) for key, tensor in state.items()} == authors_shapes("res2net50_v1b_26w_4s")
    assert all(torch.equal(state[key], tensor) for key, tensor in released.state_dict().items())
    assert not any(tensor.requires_grad or tensor.is_cuda for tensor in state.values())
    # The next one comes from the cache.
    hub.requests.clear()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert cli.main(["original", "res2net50d.in1k", "--output", "again.pth"]) == 0
    assert sha256_of(tmp_path / "again.pth") == sha256_of(path) and not hub.requests


def test_finetuned_weights_are_written_and_replace_a_file(finetuned, tmp_path, capsys):
    path = tmp_path / "mine.pth"
    path.write_text("something else")
    assert cli.main(["original", finetuned, "--output", str(path)]) == 0
    expected = load_file(Path(finetuned.removeprefix("local-dir:")) / "model.safetensors")
    state = read_torch(path)
    assert state.keys() == expected.keys() and state["bn1.num_batches_tracked"] == 7
    assert all(torch.equal(state[key], tensor) for key, tensor in expected.items())
    assert [file.name for file in tmp_path.iterdir()] == ["mine.pth"]


def test_dla_has_the_projections_that_the_authors_never_use(tmp_path, capsys):
    model = spread(timm.create_model("dla60_res2next", num_classes=1000))
    name = save(model, tmp_path / "dla")
    assert cli.main(["original", name, "--output", str(tmp_path / "dla.pth")]) == 0
    state = torch.load(tmp_path / "dla.pth")
    project = {key: shape for key, shape in authors_shapes("res2net_dla60").items() if ".project." in key}
    assert {key: list(state[key].shape) for key in state if ".project." in key} == project
    assert all(torch.equal(state[key], tensor) for key, tensor in model.state_dict().items())
    # `convert` reads the file.
    args = ["--model", "dla60_res2next.in1k", "--checkpoint", str(tmp_path / "dla.pth")]
    assert cli.main(["convert", *args, "--output", str(tmp_path / "back")]) == 0
    back = load_file(tmp_path / "back" / "model.safetensors")
    assert all(torch.equal(back[key], tensor) for key, tensor in model.state_dict().items())


def test_a_backbone_is_written_without_a_classifier(tmp_path, capsys):
    name = save(spread(timm.create_model("res2net50_48w_2s", num_classes=0)), tmp_path / "backbone")
    assert cli.main(["original", name, "--output", str(tmp_path / "backbone.pth")]) == 0
    assert "without a classifier (strict=False)" in capsys.readouterr().out
    assert not any(key.startswith("fc.") for key in torch.load(tmp_path / "backbone.pth"))


@pytest.mark.parametrize(
    ("keys", "model", "first", "wiring"),
    [
        ("mmdet", "res2net50_v1d_26w_4s", "stem.0.weight", []),
        ("mmpretrain", "res2net50d", "backbone.stem.0.conv.weight", []),
        ("mmdet", "res2net50d", "stem.0.weight", ["--wiring", "official", "--model", "res2net50d"]),
    ],
)
def test_keys_of_openmmlab_and_back(keys, model, first, wiring, tmp_path, capsys):
    """The keys are MMDetection's or MMPretrain's, `convert` reads them back, and another wiring is warned about."""
    name = save(spread(timm.create_model(model, num_classes=3)), tmp_path / "zoo")
    assert cli.main(["original", name, "--keys", keys, "--output", str(tmp_path / "x.pth")]) == 0
    printed = capsys.readouterr()
    assert ("they load into it, but its outputs differ" in " ".join(printed.err.split())) == bool(wiring)
    assert next(iter(torch.load(tmp_path / "x.pth"))) == first
    args = ["--checkpoint", str(tmp_path / "x.pth"), "--output", str(tmp_path / "back"), *wiring]
    assert cli.main(["convert", *args]) == 0
    zoo, back = (load_file(tmp_path / folder / "model.safetensors") for folder in ("zoo", "back"))
    assert back.keys() == {key for key in zoo if keys == "mmpretrain" or not key.startswith("fc.")}
    assert all(torch.equal(tensor, zoo[key]) for key, tensor in back.items())


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("res2net50_v1b_26w_4", "there is no model res2net50_v1b_26w_4; did you mean res2net50_v1b_26w_4s"),
        ("res2net50_vd_26w_4s.ssld_in1k", "is not a model of the authors' code, which has res2net50d, "),
        (f"local-dir:{SHIPPED_MODEL}", "a res2net_tiny, is not a model of the authors' code"),
        ("res2net152_v1b_26w_4s", "res2net152d.in1k has no direct download"),
        ("local-dir:no/such", "there is no model folder no/such"),
    ],
)
def test_names_without_weights_of_the_authors(name, words, tmp_path, capsys):
    assert words in error_of(capsys, name, "--output", tmp_path / "x.pth")
    assert not list(tmp_path.iterdir())


def test_models_that_the_authors_code_cannot_compute(tmp_path, capsys):
    model = timm.create_model("res2next50", num_classes=3, block_args=dict(wiring="paddle"))
    line = error_of(capsys, save(model, tmp_path / "m"), "--output", tmp_path / "x.pth")
    assert "the authors' code cannot compute" in line and "its layer1.0.pool is missing" in line
    assert not (tmp_path / "x.pth").exists()


def test_dilated_models_are_written_with_a_warning(tmp_path, capsys):
    dilated = dict(strides=(1, 2, 2, 2), dilations=(1, 1, 2, 4), multi_grid=(1, 2, 4))
    name = save(timm.create_model("res2net50d", num_classes=3, **dilated), tmp_path / "m")
    assert cli.main(["original", name, "--output", str(tmp_path / "x.pth")]) == 0
    (line,) = capsys.readouterr().err.splitlines()
    assert "is dilated: {'strides': [1, 2, 2, 2]" in line and (tmp_path / "x.pth").exists()
    name = save(timm.create_model("res2net50d", output_stride=16, dilation_rule="mmdet"), tmp_path / "mmdet")
    assert cli.main(["original", name, "--output", str(tmp_path / "x.pth")]) == 0
    # No copy of the authors' code has timm's rule.
    name = save(timm.create_model("res2net50d", num_classes=3, output_stride=16), tmp_path / "timm")
    assert "its layer4.0.convs.0 is" in error_of(capsys, name, "--output", tmp_path / "y.pth")


def test_files_that_cannot_be_written(finetuned, tmp_path, capsys):
    assert "is a folder; name a file" in error_of(capsys, finetuned, "--output", tmp_path)
    assert "cannot write into" in error_of(capsys, finetuned, "--output", tmp_path / "no" / "such.pth")
