"""The bill of materials, bom.cdx.json, of every kind of model folder."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import timm
from huggingface_hub import ModelCard

from res2net_zoo import catalog
from res2net_zoo.catalog import Accuracy
from res2net_zoo.tasks import task_class
from res2net_zoo.utils.files import sha256_of
from res2net_zoo.weights import bill_of_materials, provenance
from res2net_zoo.weights.card import model_card
from res2net_zoo.weights.model_folder import write_converted, write_model_folder
from tests.conftest import SHIPPED_MODEL, input_error, read_tree


def bill_of(folder: Path) -> dict[str, Any]:
    """Return a folder's bill of materials, which is valid under the schema and lists every file with its hash."""
    from cyclonedx.schema import SchemaVersion
    from cyclonedx.validation.json import JsonStrictValidator

    pytest.importorskip("jsonschema")
    text = (folder / "bom.cdx.json").read_text()
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(text) is None
    bill = json.loads(text)
    files = {part["name"]: part["hashes"] for part in bill["components"] if part["type"] == "file"}
    expected = {name for name in read_tree(folder) if not name.endswith(("bom.cdx.json", "model.sig"))}
    assert files == {name: [{"alg": "SHA-256", "content": sha256_of(folder / name)}] for name in expected}
    model = bill["metadata"]["component"]
    assert model["type"] == "machine-learning-model" and model["hashes"] == files["model.safetensors"]
    assert {part["name"]: part["version"] for part in bill["components"] if part["type"] == "library"}.keys() == {
        "timm",
        "torch",
    }
    assert "timestamp" not in bill["metadata"] and bill_of_materials.check(folder).passed
    return bill


def figures_of(bill: dict[str, Any]) -> list[tuple[str, str, str]]:
    metrics = bill["metadata"]["component"]["modelCard"]["quantitativeAnalysis"]["performanceMetrics"]
    return [(metric["type"], metric["value"], metric["slice"]) for metric in metrics]


def references_of(bill: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {reference["url"]: reference for reference in bill["metadata"]["component"]["externalReferences"]}


def write_published(folder: Path, name: str) -> None:
    checkpoint = catalog.load().checkpoints[name]
    state = timm.create_model(checkpoint.architecture, num_classes=checkpoint.num_classes).state_dict()
    source = checkpoint.url or "here.pth"
    metadata = {"source": source, "source_sha256": checkpoint.sha256.ljust(64, "0"), "converter": "1"}
    write_converted(folder, checkpoint, state, metadata)


def test_shipped_model():
    bill = bill_of(SHIPPED_MODEL)
    model = bill["metadata"]["component"]
    assert model["name"] == "res2net_tiny.digits" and model["licenses"][0]["license"]["id"] == "Apache-2.0"
    parameters = model["modelCard"]["modelParameters"]
    assert (parameters["task"], parameters["modelArchitecture"]) == ("image-classification", "res2net_tiny")
    assert parameters["datasets"] == [{"ref": "data:digits"}]
    assert figures_of(bill)[0] == ("Top-1 accuracy", "100.0", "digits validation; measured by res2net-zoo")


def test_published_checkpoint(tmp_path):
    write_published(tmp_path / "m", "dla60_res2next.in1k")
    bill = bill_of(tmp_path / "m")
    checkpoint, model = catalog.load().checkpoints["dla60_res2next.in1k"], bill["metadata"]["component"]
    assert (model["name"], model["publisher"]) == (checkpoint.name, checkpoint.released_by)
    assert model["licenses"] == [{"license": {"acknowledgement": "declared", "id": checkpoint.license}}]
    accuracy = checkpoint.accuracies[0]
    kind, value, where = figures_of(bill)[0]
    assert (kind, value) == ("Top-1 accuracy", str(accuracy.top1)) and f"published: {accuracy.source}" in where
    assert len(figures_of(bill)) == 2 * len(checkpoint.accuracies)
    references = references_of(bill)
    assert references.keys() >= {checkpoint.url, "https://arxiv.org/abs/1904.01169"} - {""}
    assert {part["name"] for part in bill["components"] if part["type"] == "data"} == {"imagenet-1k"}


def test_hash_and_address_of_the_original(tmp_path):
    name = next(n for n, c in catalog.load().checkpoints.items() if c.url and len(c.sha256) == 64 and c.num_classes)
    write_published(tmp_path / "m", name)
    checkpoint = catalog.load().checkpoints[name]
    reference = references_of(bill_of(tmp_path / "m"))[checkpoint.url]
    assert reference["type"] == "distribution" and reference["hashes"][0]["content"] == checkpoint.sha256


def test_same_bytes_in_another_folder(tmp_path):
    """Converting twice gives the same bytes: see also test_weights.py."""
    write_published(tmp_path / "a", "dla60_res2next.in1k")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    (tmp_path / "b" / "bom.cdx.json").unlink()
    bill_of_materials.write(tmp_path / "b")
    assert read_tree(tmp_path / "a") == read_tree(tmp_path / "b")
    first = json.loads((tmp_path / "a" / "bom.cdx.json").read_text())["serialNumber"]
    (tmp_path / "b" / "README.md").write_text("---\nlicense: mit\n---\n")
    bill_of_materials.write(tmp_path / "b")
    assert json.loads((tmp_path / "b" / "bom.cdx.json").read_text())["serialNumber"] != first


def test_trained_weights_name_what_they_derive_from(tmp_path):
    published = provenance.of_checkpoint(catalog.load().checkpoints["res2net50_26w_4s.in1k"])
    origin = published.after_training("res2net50_26w_4s.in1k", license="my licence", teacher="res2net101d")
    accuracy = Accuracy(dataset="flowers", split="val", top1=91.5, top5=99.0, source="res2net-zoo finetune")
    card = model_card("mine", "# mine", "other", [accuracy], ["org/flowers"])
    write_model_folder(tmp_path / "mine", timm.create_model("res2net_tiny", num_classes=5), card, origin=origin)
    bill = bill_of(tmp_path / "mine")
    model = bill["metadata"]["component"]
    assert model["name"] == "mine" and model["licenses"][0]["license"]["name"] == "my licence"
    assert [part["purl"] for part in model["pedigree"]["ancestors"]] == ["pkg:huggingface/timm/res2net50_26w_4s.in1k"]
    properties = {entry["name"]: entry["value"] for entry in model["properties"]}
    assert properties["res2net-zoo:teacher"] == "res2net101d" and properties["res2net-zoo:trained"] == "true"
    assert properties["res2net-zoo:inherited-license"] == published.license
    assert ("Top-1 accuracy", "91.5", "flowers val; measured by res2net-zoo") in figures_of(bill)
    data = {part["name"]: part for part in bill["components"] if part["type"] == "data"}
    assert data.keys() == {"flowers", "org/flowers"} and data["org/flowers"]["description"] == "data of training"


def test_model_for_a_task_and_its_backbone(tmp_path):
    model = task_class("saliency")("res2net_tiny", ["object"])
    model.save(tmp_path / "task", ModelCard("---\npipeline_tag: image-segmentation\n---\n"))
    parameters = bill_of(tmp_path / "task")["metadata"]["component"]["modelCard"]["modelParameters"]
    assert (parameters["task"], parameters["modelArchitecture"]) == ("image-segmentation", "res2net_tiny")
    bill = json.loads((tmp_path / "task" / "backbone" / "bom.cdx.json").read_text())
    assert {part["name"] for part in bill["components"] if part["type"] == "file"} == {
        "config.json",
        "model.safetensors",
    }
    assert bill["metadata"]["component"]["name"] == "res2net_tiny"
    assert bill_of_materials.check(tmp_path / "task" / "backbone").passed
    (tmp_path / "task" / "backbone" / "config.json").write_text("{}")
    assert "backbone/config.json differs" in bill_of_materials.check(tmp_path / "task").found


def test_unknown_licence_and_origin(tiny_folder):
    model = bill_of(tiny_folder)["metadata"]["component"]
    assert model["licenses"] == [{"license": {"name": "unknown"}}] and "quantitativeAnalysis" not in model["modelCard"]
    assert {"name": "res2net-zoo:origin", "value": "unknown"} in model["properties"]


@pytest.fixture
def folder(tmp_path) -> Path:
    return Path(shutil.copytree(SHIPPED_MODEL, tmp_path / "model"))


def parts_of(folder: Path, change) -> None:
    path = folder / "bom.cdx.json"
    bill = json.loads(path.read_text())
    change(bill)
    path.write_text(json.dumps(bill))


@pytest.mark.parametrize(
    ("change", "passed", "words"),
    [
        (lambda f: (f / "bom.cdx.json").unlink(), None, "no bom.cdx.json"),
        (lambda f: (f / "README.md").write_text("---\nlicense: mit\n---\n"), None, "README.md differs"),
        (lambda f: (f / "recipe.toml").unlink(), None, "recipe.toml is missing"),
        (lambda f: (f / "config.json").write_text("{}"), False, "config.json differs"),
        (lambda f: os.truncate(f / "README.md", 2**40), None, "README.md has 1,099,511,627,776 bytes"),
        (lambda f: (f / "README.md").unlink() or os.mkfifo(f / "README.md"), None, "README.md cannot be read"),
        (lambda f: (f / "bom.cdx.json").unlink() or os.mkfifo(f / "bom.cdx.json"), False, "cannot read"),
        (lambda f: (f / "bom.cdx.json").write_text("{"), False, "is not JSON"),
        (lambda f: (f / "bom.cdx.json").write_text("[]"), False, "is not a CycloneDX"),
        (lambda f: (f / "bom.cdx.json").write_text("[" * 100_000), False, "nested too deeply"),
        (lambda f: parts_of(f, lambda b: b.pop("components")), False, "is not listed"),
        (lambda f: parts_of(f, lambda b: b.update(components=[5])), False, "without a name"),
        (lambda f: parts_of(f, lambda b: [p.pop("hashes", 0) for p in b["components"]]), False, "or its SHA-256"),
        (lambda f: parts_of(f, lambda b: [p.update(name="../x") for p in b["components"]]), False, "outside"),
        (lambda f: parts_of(f, lambda b: [p.update(name=["x"]) for p in b["components"]]), False, "without a name"),
        (lambda f: parts_of(f, lambda b: b["components"].append(
            {"type": "file", "name": "x" * 5000, "hashes": [{"alg": "SHA-256", "content": "0"}]})), None, "is missing"),
    ],
)  # fmt: skip
def test_changed_folders(folder, change, passed, words):
    change(folder)
    result = bill_of_materials.check(folder)
    assert result.passed is passed and words in result.found and len(result.found) < 400


def test_verify_and_publish_report_a_bill_of_other_files(in_process, folder, hub):
    parts_of(folder, lambda bill: [part.update(hashes=bill["components"][-3]["hashes"]) for part in bill["components"]])
    result = in_process("hub/verify.py", folder)
    assert result.returncode == 1 and "| bill of materials" in result.stdout
    line = input_error(in_process("hub/publish.py", folder, "--repo-id", "zoo/x"))
    assert "does not verify: bill of materials" in line and not hub.repositories


def test_publish_renews_the_bill_after_a_change_of_the_card(in_process, folder, hub):
    card = (folder / "README.md").read_text()
    (folder / "README.md").write_text(card + "\nMore.\n")
    assert in_process("hub/publish.py", folder, "--repo-id", "zoo/x").returncode == 0
    assert hub.files("models/zoo/x")["bom.cdx.json"] == (folder / "bom.cdx.json").read_bytes()
    bill_of(folder)


def test_text_from_files_is_printable(folder):
    config = json.loads((folder / "config.json").read_text())
    config["provenance"] |= {"origin": "file", "source": "a b\u202e.pth"}
    (folder / "config.json").write_text(json.dumps(config | {"architecture": "\x1b[31mred"}))
    with pytest.raises(Exception, match="printable"):
        bill_of_materials.write(folder)
    config["provenance"]["source"] = "a <b>.pth"
    (folder / "config.json").write_text(json.dumps(config | {"architecture": "\x1b[31mred"}))
    bill_of_materials.write(folder)
    assert "\\u001b" not in (folder / "bom.cdx.json").read_text()
    bill_of(folder)
