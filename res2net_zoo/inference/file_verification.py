"""Verify an exported file: its graph, its metadata, its name and its card must agree."""

import json
from pathlib import Path

from huggingface_hub import ModelCard
from huggingface_hub.repocard import REGEX_YAML_BLOCK

from res2net_zoo.inference.export import card_path, names_int8
from res2net_zoo.inference.exported_file import ExportedFile, is_exported_file, read
from res2net_zoo.inference.quantized_card import KEY, LABELS, accuracy_table, recorded
from res2net_zoo.utils import card_metadata
from res2net_zoo.utils.errors import InputError, clipped, one_line
from res2net_zoo.utils.files import read_text, sha256_of
from res2net_zoo.weights.provenance import parse
from res2net_zoo.weights.verification import Check

LONGEST = 100  # characters of a value
ROUNDED = 0.0015  # of the difference of two percentages of three decimals


def verify(path: Path) -> list[Check]:
    """Check an exported file against its own metadata and its card.

    Args:
        path: The .onnx or .xml file. Its network is not run.

    Returns:
        The checks, in order. What is not recorded in the file is undecided.

    Raises:
        InputError: The file cannot be read, or is truncated or damaged.
    """
    file = read(path)
    facts = {key: clipped(value, LONGEST) for key, value in file.metadata.items()}
    checks = [Check("format", file.version, "-", None), _precision(file)]
    if "int8" in (file.precision, facts.get("precision")) or names_int8(path):
        agrees = names_int8(path) == (file.precision == "int8")
        wanted = f"int8 {'in it' if file.precision == 'int8' else 'not in it'}"
        checks.append(Check("name", path.name, wanted, agrees or (False if facts else None)))
    checks += [
        Check("model", facts.get("model", "not recorded"), "-", None),
        Check("architecture", facts.get("architecture", "not recorded"), "-", None),
        _provenance(file),
    ]
    if file.precision == "int8":
        checks += [_layers(file), *_accuracies(file)]
    return checks + _card(file)


def checks_in(folder: Path) -> list[Check]:
    """Check the exported files in a model folder, each as one check; those that cannot be read are undecided."""
    checks = []
    for path in exported_files(folder):
        try:
            file = read(path)
            failed = [check for check in verify(path) if check.passed is False]
        except InputError as error:
            checks.append(Check(path.name, str(error), "-", None))
            continue
        found = f"{failed[0].what}: {failed[0].found}" if failed else f"{file.precision}, {file.version}"
        checks.append(Check(path.name, found, failed[0].expected if failed else "as recorded in it", not failed))
    return checks


def exported_files(folder: Path) -> list[Path]:
    """Return the exported files in a folder, not in its subfolders; an .xml without its .bin is something else."""
    found = sorted(path for path in folder.iterdir() if is_exported_file(path.name) and path.is_file())
    return [path for path in found if path.suffix == ".onnx" or path.with_suffix(".bin").is_file()]


def _precision(file: ExportedFile) -> Check:
    number = len(file.layers)
    of = f"{number - len(file.float_layers)} of " * (file.precision == "int8")
    found = f"{file.precision}, {of}{number} layers"
    stated = file.metadata.get("precision")
    if stated is not None:
        return Check("precision", found, f"{clipped(stated, LONGEST)} (its metadata)", file.precision == stated)
    if "provenance" not in file.metadata:
        return Check("precision", found, "not recorded in its metadata", None)
    # Earlier versions, which did not quantize, did not record the precision.
    wanted = "float32 or float16, because its metadata have no other"
    return Check("precision", found, wanted, file.precision in ("float32", "float16"))


def _provenance(file: ExportedFile) -> Check:
    text = file.metadata.get("provenance")
    if text is None:
        return Check("provenance", "not recorded", "-", None)
    try:
        return Check("provenance", str(parse(json.loads(text), file.path)), "-", None)
    except (InputError, ValueError, RecursionError) as error:
        return Check("provenance", one_line(error), "a valid record", False)


def _layers(file: ExportedFile) -> Check:
    found = ", ".join(file.float_layers) or "none"
    try:
        stated = ", ".join(map(str, json.loads(file.metadata["float_layers"]))) or "none"
    except (KeyError, ValueError, TypeError, RecursionError):
        return Check("layers in float", clipped(found, LONGEST), "not recorded in its metadata", None)
    return Check("layers in float", clipped(found), f"{clipped(stated)} (its metadata)", found == stated)


def _accuracies(file: ExportedFile) -> list[Check]:
    facts = file.metadata
    images = f"{facts.get('evaluation_images', '?')} images of {facts.get('evaluation_data', '?')}"
    checks = []
    for key, label in LABELS.items():
        if f"{key}_int8" not in facts:
            continue
        texts = [clipped(facts.get(f"{key}_{what}", "?"), LONGEST) for what in ("float32", "int8", "loss")]
        found = f"float32 {texts[0]} %, int8 {texts[1]} %: loss {texts[2]} points on {clipped(images, LONGEST)}"
        try:
            before, after, loss = map(float, texts)
            agrees = 0 <= before <= 100 and 0 <= after <= 100 and abs(before - after - loss) <= ROUNDED
        except ValueError:
            agrees = False
        checks.append(Check(label, found, "loss is float32 minus int8", agrees))
    checks += [Check("warning", clipped(facts["warning"]), "-", None)] if "warning" in facts else []
    return checks or [Check("top-1", "not recorded", "-", None)]


def _card(file: ExportedFile) -> list[Check]:
    """Compare a file with its card, if it has one: hashes, accuracies, licence, and what the title states."""
    path, hashes = card_path(file.path), {place.name: sha256_of(place) for place in file.files}
    card, problem = _read_card(path) if path.exists() else (None, "")
    if card is None:
        digests = [Check(f"SHA-256 of {name}", digest, "not recorded", None) for name, digest in hashes.items()]
        if file.precision != "int8":
            return digests  # only quantized files have cards; another .md is not one
        found = problem or f"no {path.name}"
        return [*digests, Check("card", found, "the card of this file", False if problem else None)]
    stated, wanted = card.data[KEY], recorded(file)
    known = stated.get("sha256") if isinstance(stated.get("sha256"), dict) else {}
    checks = [
        Check(f"SHA-256 of {name}", digest, f"{clipped(str(known.get(name)))} (its card)", known.get(name) == digest)
        for name, digest in hashes.items()
    ]
    wrong = [key for key in wanted.keys() | stated.keys() if stated.get(key) != wanted.get(key) and key != "sha256"]
    if wrong:
        key = min(wrong)
        found, expected = (clipped(f"{key} {values.get(key)}", LONGEST) for values in (stated, wanted))
        return [*checks, Check("card", found, f"{expected} (its metadata)", False)]
    if card.data.get("license") != file.metadata.get("license"):
        licences = [clipped(str(value), LONGEST) for value in (card.data.get("license"), file.metadata.get("license"))]
        return [*checks, Check("card", f"licence {licences[0]}", f"licence {licences[1]} (its metadata)", False)]
    title = next((line for line in card.text.splitlines() if line.startswith("# ")), "")
    if "int8" not in title.lower():
        return [*checks, Check("card", f"title {clipped(title, LONGEST)}", "a title with int8", False)]
    try:
        table = accuracy_table(file.metadata)
    except KeyError:
        table = ""
    if table not in card.text:
        return [*checks, Check("card", "other accuracies", "the accuracies of the file's metadata", False)]
    return [*checks, Check("card", path.name, "as the file's metadata", True)]


def _read_card(path: Path) -> tuple[ModelCard | None, str]:
    """Return the card of a quantized file, or None and what is wrong with it."""
    missing = f"{path.name} has no metadata of a quantized file"
    try:
        if not REGEX_YAML_BLOCK.search(read_text(path, card_metadata.LARGEST_CARD)):
            return None, missing
        card = card_metadata.read_card(path)
    except Exception as error:  # huggingface_hub may raise various errors for invalid YAML
        return None, one_line(error)
    return (card, "") if isinstance(card.data.get(KEY), dict) else (None, missing)
