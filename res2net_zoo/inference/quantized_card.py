"""The card of a quantized file: it is next to the file, and is generated from the file's metadata and hash."""

import json
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard

from res2net_zoo.catalog import Accuracy
from res2net_zoo.inference.exported_file import ExportedFile
from res2net_zoo.utils.errors import clipped
from res2net_zoo.utils.files import sha256_of
from res2net_zoo.utils.markdown import code_span, markdown, markdown_table
from res2net_zoo.weights.card import CITATION, model_card_data
from res2net_zoo.weights.provenance import parse

TEMPLATE = Path(__file__).with_name("quantized_card.md")
KEY = "quantization"  # in the card's metadata
LABELS = {"top1": "top-1", "top5": "top-5"}
# Keys of a quantized file's metadata, besides those of `export_metadata`. Accuracies are in percent, losses in points.
RECORDED = (
    "precision", "quantization", "calibration_data", "calibration_images", "evaluation_data", "evaluation_images",
    *(f"{k}_{what}" for k in LABELS for what in ("float32", "int8", "loss")), "same_top1",
    "max_loss", "layers", "float_layers", "float_norms", "runtime", "processor", "versions", "warning",
)  # fmt: skip
ONNX_USE = """\
```python
import onnxruntime

session = onnxruntime.InferenceSession({file})
(logits,) = session.run(None, {{"images": images}})
```"""
OPENVINO_USE = """\
```python
import openvino

model = openvino.Core().compile_model({file}, "CPU")
logits = model(images)["logits"]
```"""


def recorded(file: ExportedFile) -> dict[str, Any]:
    """Return what the metadata of a card must state about its file."""
    values: dict[str, Any] = {key: file.metadata[key] for key in RECORDED if key in file.metadata}
    return values | {"sha256": {path.name: sha256_of(path) for path in file.files}}


def accuracy_table(facts: dict[str, str]) -> str:
    """Return the accuracies before and after quantization as a table."""
    rows = [
        (f"{label} (%)", *(facts[f"{key}_{what}"] for what in ("float32", "int8", "loss")))
        for key, label in LABELS.items()
        if f"{key}_int8" in facts
    ]
    return markdown_table((f"{facts['evaluation_images']} images", "float32", "int8", "loss (points)"), rows)


def quantized_card(file: ExportedFile) -> ModelCard:
    """Make the card of a quantized file.

    Args:
        file: The file, with the metadata of `export_metadata` and those in `RECORDED`.
    """
    facts, name = file.metadata, file.path.name
    data, _, split = facts["evaluation_data"].rpartition(", split ")
    accuracy = Accuracy(
        dataset=data,
        split=split,
        top1=float(facts["top1_int8"]),
        top5=float(facts.get("top5_int8", 100)),
        source="res2net-zoo export",
    )
    metadata = model_card_data(
        file.path.stem,
        facts.get("license"),
        [accuracy],
        base_model=facts.get("base_model"),
        task="image-classification",
    )
    metadata.library_name = "onnx" if len(file.files) == 1 else "openvino"
    metadata.tags = ["image-classification", "res2net", metadata.library_name, "int8", "quantized"]
    if "top5_int8" not in facts and metadata.eval_results:
        metadata.eval_results = metadata.eval_results[:1]
    if metadata.base_model:
        metadata["base_model_relation"] = "quantized"
    metadata[KEY] = recorded(file)
    use = ONNX_USE if len(file.files) == 1 else OPENVINO_USE
    return ModelCard.from_template(
        metadata,
        template_path=str(TEMPLATE),
        title=f"{markdown(file.path.stem)} (int8)",
        model=markdown(facts["model"]),
        architecture=facts["architecture"],
        version=file.version,
        accuracies=accuracy_table(facts),
        runtime=facts["runtime"],
        evaluation=f"{facts['evaluation_images']} images of {markdown(facts['evaluation_data'])}",
        warning=facts.get("warning", ""),
        quantization=markdown_table(("int8", ""), _quantization(file)),
        details=markdown_table(("model", ""), _details(facts)),
        use=use.format(file=json.dumps(name)),
        input_size=", ".join(map(str, json.loads(facts["input_size"]))),
        verify=code_span(f"res2net-zoo verify {name}"),
        files=markdown_table(("file", "SHA-256"), [(key, value) for key, value in metadata[KEY]["sha256"].items()]),
        citation=CITATION,
    )


def _quantization(file: ExportedFile) -> list[tuple[str, str]]:
    facts = file.metadata
    kept = json.loads(facts["float_layers"])
    same = f"{facts['same_top1']} of {facts['evaluation_images']} images"
    return [
        ("method", facts["quantization"]),
        ("calibration", f"{facts['calibration_images']} images of {markdown(facts['calibration_data'])}"),
        ("layers in int8", f"{int(facts['layers']) - len(kept)} of {facts['layers']}"),
        ("layers in float", ", ".join(map(code_span, [*kept, *json.loads(facts["float_norms"])])) or "none"),
        ("same top-1 as float32", same),
        ("processor", markdown(facts["processor"])),
        ("versions", ", ".join(f"{name} {version}" for name, version in json.loads(facts["versions"]).items())),
    ]


def _details(facts: dict[str, str]) -> list[tuple[str, str]]:
    """Return what the card states about the model and its preprocessing."""
    origin = parse(json.loads(facts["provenance"]), Path("provenance"))
    names = json.loads(facts.get("class_names", "[]"))
    rows = [
        ("weights", markdown(facts["model"])),
        ("architecture", facts["architecture"]),
        ("licence", facts.get("license", "not stated")),
        ("base model", facts.get("base_model", "")),
        ("provenance", markdown(str(origin))),
        ("SHA-256 of the original", origin.source_sha256 or ""),
        ("classes", clipped(f"{len(names)}: {', '.join(map(markdown, names))}") if names else ""),
        *((key.replace("_", " "), facts[key]) for key in ("input_size", "color", "mean", "std", "crop_pct")),
        *((key.replace("_", " "), facts[key]) for key in ("crop_mode", "interpolation")),
    ]
    return [(key, value) for key, value in rows if value]
