"""Model folders in transformers, whose `TimmWrapper` builds models by `timm.create_model`."""

import ast
import json
import re
import shutil
from pathlib import Path

import pytest
import timm
import torch
from datasets import load_dataset
from PIL import Image

from res2net_zoo.weights.card import model_card
from res2net_zoo.weights.model_folder import write_backbone, write_model_folder
from tests.conftest import ROOT, SHIPPED_DATA, SHIPPED_MODEL, SMALL, spread

pytestmark = pytest.mark.first_case

transformers = pytest.importorskip("transformers")


def folder_of(model: torch.nn.Module, folder: Path) -> str:
    write_model_folder(folder, model, model_card("m", "# m", None))
    return str(folder)


def test_the_shipped_model_reads_digits_in_a_pipeline():
    images = load_dataset(str(SHIPPED_DATA), split="validation[:40]")
    classify = transformers.pipeline("image-classification", model=str(SHIPPED_MODEL))
    found = [answers[0]["label"] for answers in classify([image.convert("RGB") for image in images["image"]])]
    assert found == [str(label) for label in images["label"]]


CASES = {
    **{name: (name, arguments) for name, arguments in SMALL.items()},
    # timm's filter of DLA's weights presumes levels that are trees.
    "dla60_res2net": ("dla60_res2net", dict(channels=SMALL["dla60_res2net"]["channels"])),
    "grey images": ("res2net_tiny", dict(in_chans=1)),
    "another pooling": ("res2net_tiny", dict(global_pool="max")),
    "another wiring": ("res2net_tiny", dict(block_args=dict(wiring="paddle"))),
    "timm's model with another default": ("vit_tiny_patch16_224", dict(depth=1, global_pool="avg")),
}


@pytest.mark.parametrize(
    "page",
    [
        SHIPPED_MODEL / "README.md",
        *(ROOT / page for page in ("docs/inference.md", "res2net_zoo/weights/card.md", "res2net_zoo/training/card.md")),
    ],
    ids=lambda page: f"{page.parent.name}/{page.name}",
)
def test_the_examples_of_cards_and_docs_run(tmp_path, monkeypatch, capsys, page):
    examples = [code for code in re.findall(r"```python\n(.*?)```", page.read_text(), re.S) if "pipeline(" in code]
    assert examples
    Image.new("RGB", (80, 60), "white").save(tmp_path / "image.jpg")
    (tmp_path / SHIPPED_MODEL.name).symlink_to(SHIPPED_MODEL)
    monkeypatch.chdir(tmp_path)
    for code in examples:
        exec(re.sub(r'"DIR"|\{\{folder_name\}\}', f'"{SHIPPED_MODEL.name}"', code), {})
        answers = ast.literal_eval(capsys.readouterr().out.strip().splitlines()[-1])
        assert len(answers) == 5 and set(answers[0]) == {"label", "score"}


@pytest.mark.parametrize("case", CASES)
def test_logits_equal_those_of_timm(tmp_path, case):
    name, arguments = CASES[case]
    model = spread(timm.create_model(name, num_classes=7, **arguments)).eval()
    theirs = transformers.AutoModelForImageClassification.from_pretrained(folder_of(model, tmp_path / "m")).eval()
    size = timm.data.resolve_model_data_config(model)["input_size"][1:]
    image = torch.randn(2, arguments.get("in_chans", 3), *size)
    with torch.no_grad():
        assert torch.equal(theirs(image).logits, model(image))
        assert torch.equal(timm.create_model(f"local-dir:{tmp_path}/m", pretrained=True).eval()(image), model(image))


def test_preprocessing_equals_that_of_timm():
    image = load_dataset(str(SHIPPED_DATA), split="validation[:1]")[0]["image"].convert("RGB")
    model = timm.create_model(f"local-dir:{SHIPPED_MODEL}")
    ours = timm.data.create_transform(**timm.data.resolve_model_data_config(model))(image)
    processor = transformers.AutoImageProcessor.from_pretrained(SHIPPED_MODEL)
    assert torch.equal(processor(image)["pixel_values"][0], ours)


def test_a_backbone_loads_as_automodel(tmp_path):
    model = spread(timm.create_model("res2net_tiny", features_only=True)).eval()
    write_backbone(tmp_path / "m", "res2net_tiny", model.state_dict(), {})
    theirs = transformers.AutoModel.from_pretrained(tmp_path / "m").eval()
    image = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(theirs(image).last_hidden_state, model(image)[-1])


def test_a_fine_tuned_model_loads_in_timm(tmp_path):
    load = transformers.AutoModelForImageClassification.from_pretrained
    model = load(SHIPPED_MODEL, num_labels=3, ignore_mismatched_sizes=True)
    image = torch.randn(2, 3, 64, 64)
    model(image, labels=torch.tensor([0, 2])).loss.backward()
    assert model.timm_model.conv1[0].weight.grad.abs().max() > 0
    model.save_pretrained(tmp_path / "m")
    back = timm.create_model(f"local-dir:{tmp_path}/m", pretrained=True).eval()
    with torch.no_grad():
        assert torch.equal(back(image), model.eval()(image).logits)


def test_a_folder_with_repeated_arguments_still_loads_and_verifies(tmp_path, in_process):
    folder = Path(shutil.copytree(SHIPPED_MODEL, tmp_path / "m"))
    (folder / "bom.cdx.json").unlink()  # older versions wrote none
    config = json.loads((folder / "config.json").read_text())
    assert config["model_args"] == {}
    config["model_args"] = {"num_classes": 10, "in_chans": 3, "global_pool": "avg"}
    (folder / "config.json").write_text(json.dumps(config))
    image = torch.randn(1, 3, 64, 64)
    before, now = (timm.create_model(f"local-dir:{path}", pretrained=True).eval() for path in (folder, SHIPPED_MODEL))
    with torch.no_grad():
        assert torch.equal(before(image), now(image))
    assert in_process("hub/verify.py", folder).returncode == 0
