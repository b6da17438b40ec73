"""The catalogue: validation of all fields, and the commands that print them."""

import re
import subprocess
import sys
import tomllib
from collections import Counter
from dataclasses import MISSING, fields
from importlib import import_module, resources

import pytest

from res2net_zoo import catalog
from res2net_zoo.catalog import Accuracy, Architecture, CatalogError, Checkpoint
from res2net_zoo.utils.errors import InputError
from tests.conftest import ROOT, input_error

TEXT = resources.files("res2net_zoo").joinpath("catalog.toml").read_text()
FIRST = "res2net50_26w_4s.in1k"


def changed(pattern: str, replacement: str, after: str = "") -> str:
    """Change the first match of a pattern in the catalogue, after a given text."""
    start = TEXT.index(after)
    text, n = re.subn(pattern, replacement, TEXT[start:], count=1, flags=re.M)
    assert n == 1 and TEXT[:start] + text != TEXT
    return TEXT[:start] + text


def refuse(text: str) -> str:
    with pytest.raises(CatalogError) as caught:
        catalog.parse(text)
    return str(caught.value)


OPTIONAL = ("architecture", "tag", "base_model", "downstream")  # and those tested separately


@pytest.mark.parametrize("field", [f.name for f in fields(Checkpoint) if f.name not in OPTIONAL])
def test_a_missing_field_of_a_checkpoint_is_named(field):
    start = TEXT.index("[[checkpoints]]")
    pattern = r"^accuracies = \[.*?^\]\n" if field == "accuracies" else rf"^{field} = .*\n"
    text = TEXT[:start] + re.sub(pattern, "", TEXT[start:], count=1, flags=re.M | re.S)
    message = refuse(text)
    assert FIRST in message and field in message


REQUIRED = [f.name for f in fields(Architecture) if f.default is MISSING and f.default_factory is MISSING]


@pytest.mark.parametrize("field", [name for name in REQUIRED if name != "name"])
def test_a_missing_field_of_an_architecture_is_named(field):
    message = refuse(changed(rf"^{field} = .*\n", ""))
    assert "architectures.res2net50_26w_4s" in message and field in message


@pytest.mark.parametrize("field", [f.name for f in fields(Accuracy)])
def test_a_missing_field_of_an_accuracy_is_named(field):
    value = r'(?:"[^"]*"|[\d.]+)'
    pattern = rf"{field} = {value}, " if field == "dataset" else rf", {field} = {value}"
    message = refuse(changed(pattern, "", after="accuracies = ["))
    assert f"{FIRST} accuracy 1" in message and field in message


@pytest.mark.parametrize(
    ("pattern", "wrong", "field"),
    [
        (r"^crop_pct = .*", "crop_pct = 87.5", "crop_pct"),
        (r"^crop_pct = .*", 'crop_pct = "0.875"', "crop_pct"),
        (r"^interpolation = .*", 'interpolation = "cubic"', "interpolation"),
        (r"^format = .*", 'format = "zip"', "format"),
        (r"^url = .*", 'url = "http://example.org"', "url"),
        (r"^sha256 = .*", 'sha256 = "XYZ"', "sha256"),
        (r"^hub_id = .*", 'hub_id = "timm/"', "hub_id"),
        (r"^license = .*", 'license = ""', "license"),
        (r"^mean = .*", "mean = [0.485, 0.456]", "mean"),
        (r"^std = .*", "std = [0.2, 0.2, 22.0]", "std"),
        (r"^num_classes = .*", "num_classes = 0", "num_classes"),
        (r"top1 = 77.994", "top1 = 177.994", "top1"),
        (r"top5 = 93.86,", 'top5 = "93.86",', "top5"),
        (r'source = "timm results table, 2025-10"', 'source = " "', "source"),
        (r"^notes = .*", 'notes = ""\nnote = ""', "note"),
    ],
)
def test_a_wrong_field_is_named(pattern, wrong, field):
    message = refuse(changed(pattern, wrong, after="[[checkpoints]]"))
    assert FIRST in message and field in message


@pytest.mark.parametrize(
    ("pattern", "wrong", "words"),
    [
        (r'^  \{ parameters = "25.7"', '  { parameters = "about 25"', "printed 1"),
        (r', source = "official release table"', "", "source"),
        (r"^reduction = 32", "reduction = 0", "reduction"),
        (r"^papers = .*", 'papers = ["1611.05431"]', "papers"),
        (r"^crop_pct = 1.0", "crop_pct = 100", "crop_pct"),
        # A difference is required if and only if a printed size differs from the rounded one.
        (r"^difference = .*\n", "", "differing: 4.2"),
        (r'^  \{ parameters = "25.29"', '  { parameters = "25.3"', None),
        (r'^  \{ parameters = "25.29"', '  { parameters = "25.28"', "differing: 25.28"),
        (r"^num_classes = 1000", 'num_classes = 1000\ndifference = "none"', "differing: none"),
    ],
)
def test_a_wrong_field_of_an_architecture_is_named(pattern, wrong, words):
    text = changed(pattern, wrong, after="[architectures.res2net50_48w_2s]" if "none" in str(words) else "")
    if words is None:
        catalog.parse(text)
    else:
        assert words in refuse(text)


def test_other_invalid_entries():
    assert "not TOML" in refuse("= 1")
    assert "is listed twice" in refuse(TEXT + TEXT[TEXT.rindex("[[checkpoints]]") :])
    assert "'res2net51' is not listed" in refuse(changed(r"^architecture = .*", 'architecture = "res2net51"'))


def test_errors_name_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr(catalog, "path", lambda: tmp_path / "catalog.toml")
    for content, words in (
        (b"= 1", "the catalogue is not TOML"),
        (b"\xff", "it is not UTF-8 text"),
        (None, "No such file"),
    ):
        (tmp_path / "catalog.toml").unlink(missing_ok=True)
        if content is not None:
            (tmp_path / "catalog.toml").write_bytes(content)
        with pytest.raises(InputError, match=f"cannot read {tmp_path}/catalog.toml: .*{words}"):
            catalog.load.__wrapped__()


def test_content():
    everything = catalog.load()
    assert len(everything.checkpoints) == 34
    on_the_hub = {name: c for name, c in everything.checkpoints.items() if c.hub_id}
    assert len(on_the_hub) == 11
    for name, checkpoint in on_the_hub.items():
        assert checkpoint.hub_id == f"timm/{name}"
        assert checkpoint.sha256 in checkpoint.url and len(checkpoint.sha256) == 8
        assert checkpoint.license == "CC-BY-NC-SA-4.0" and "states none for the weights" in checkpoint.license_note
        benchmarks = [(a.dataset, a.source.split(" ")[0]) for a in checkpoint.accuracies]
        assert benchmarks[:2] == [("imagenet-1k", "timm"), ("imagenet-1k", "paper")]
        assert {d for d, _ in benchmarks[2:]} == {f"imagenet-{x}" for x in ("real", "v2", "sketch", "a", "r")}
    eight = everything.checkpoint("res2net50_26w_8s")
    assert [a.top1 for a in eight.accuracies[:2]] == [78.95, 79.2] and "two top-1 figures" in eight.notes
    assert everything.checkpoint("res2net_tiny") is None


def test_checkpoints_of_other_publishers():
    everything = catalog.load().checkpoints
    tags = Counter(c.tag for c in everything.values())
    detectors = dict.fromkeys(DETECTORS, 1)
    assert tags == detectors | dict(
        in1k=13, pd_in1k=5, ssld_in1k=3, mindcv_in1k=4, mmpretrain_in1k=3, holocron_imagenette=1
    )
    ssld = {a: everything[f"res2net{a}_vd_26w_4s.ssld_in1k"].accuracies[0].top1 for a in (50, 101, 200)}
    assert ssld == {50: 83.1, 101: 83.9, 200: 85.13}
    assert catalog.load().checkpoint("res2net200_vd_26w_4s").tag == "ssld_in1k"  # the best one is the default
    assert [name for name, c in everything.items() if not c.url] == ["res2net152d.in1k"]
    assert len(everything["res2net50_26w_4s.holocron_imagenette"].sha256) == 64
    for name, checkpoint in everything.items():
        assert checkpoint.license == ("CC-BY-NC-SA-4.0" if checkpoint.tag == "in1k" else "Apache-2.0"), name
        formats = dict(pd="paddle", ssld="paddle", mindcv="mindspore", mmpretrain="mmengine", holocron="holocron")
        assert checkpoint.format == formats.get(checkpoint.tag.split("_")[0], "torch") or "v1d" in name


DETECTORS = {
    "mmdet_faster_rcnn_coco": {"box AP": 43.0},
    "mmdet_mask_rcnn_coco": {"box AP": 43.6, "mask AP": 38.7},
    "mmdet_cascade_rcnn_coco": {"box AP": 45.7},
    "mmdet_cascade_mask_rcnn_coco": {"box AP": 46.4, "mask AP": 40.0},
    "mmdet_htc_coco": {"box AP": 47.5, "mask AP": 41.6},
}


def test_backbones_of_detectors(in_process):
    everything = catalog.load()
    start = everything.checkpoint("res2net101_v1d_26w_4s")
    assert (start.tag, start.format, start.num_classes, start.downstream) == ("in1k", "mmdet", 0, ())
    for tag, figures in DETECTORS.items():
        checkpoint = everything.checkpoints[f"res2net101_v1d_26w_4s.{tag}"]
        (result,) = checkpoint.downstream
        assert (result.dataset, result.figures) == ("COCO", figures)
        assert everything.url_of(result.source) == "https://github.com/open-mmlab/mmdetection"
        assert (checkpoint.format, checkpoint.num_classes, checkpoint.accuracies) == ("mmdet", 0, ())
        assert checkpoint.url.endswith(f"-{checkpoint.sha256}.pth") and len(checkpoint.sha256) == 8
        for command in ("list", "show"):
            text = in_process("res2net_zoo/__main__.py", command, checkpoint.name).stdout
            assert result.model in text and result.text in text and checkpoint.license in text


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ('"box AP" = 43.0', '"box AP" = 430.0', "downstream 1: .*figures"),
        ('source = "MMDetection configs', 'source = "configs', "does not start with a key of sources"),
    ],
)
def test_wrong_results_of_detectors_are_refused(old, new, words):
    with pytest.raises(catalog.CatalogError, match=words):
        catalog.parse(catalog.path().read_text().replace(old, new, 1))


def cli(*args: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", "res2net_zoo", *args], cwd=ROOT, capture_output=True, text=True)


def test_list_and_its_filters(in_process):
    def names(*args: str) -> list[str]:
        result = in_process("res2net_zoo/__main__.py", "list", *args)
        assert result.returncode == 0, result.stderr
        return [line.split("|")[1].strip() for line in result.stdout.splitlines()[2:] if line.startswith("| ")]

    everything = catalog.load()
    with_weights = {c.architecture for c in everything.checkpoints.values()}
    assert set(names()) == {*everything.checkpoints, *(set(everything.architectures) - with_weights)}
    assert names("res2net101*") == [
        *("res2net101_26w_4s.in1k", "res2net101_26w_4s.mindcv_in1k", "res2net101_26w_4s.mmpretrain_in1k"),
        *("res2net101d.in1k", "res2net101d.mindcv_in1k"),
        *("res2net101_vd_26w_4s.ssld_in1k", "res2net101_vd_26w_4s.pd_in1k"),
        *(f"res2net101_v1d_26w_4s.{tag}" for tag in ("in1k", *DETECTORS)),
    ]
    assert names("res2net50d", "*next50") == [
        "res2next50.in1k",
        "res2net50d.in1k",
        "res2net50d.mindcv_in1k",
    ]
    assert names("--min-top1", "83") == [f"res2net{depth}_vd_26w_4s.ssld_in1k" for depth in (50, 101, 200)]
    assert names("--max-params", "18") == ["dla60_res2next.in1k", "res2net_tiny"]
    assert names("res2ne*", "--max-gmacs", "4.17", "--pretrained") == ["res2net50_48w_2s.in1k"]
    assert len(names("--license", "apache")) == 21
    assert len(names("--license", "cc-by-nc", "--released-by", "authors")) == 13


def test_show_prints_every_fact(in_process):
    result = cli("show", "res2net50_26w_8s")
    assert result.returncode == 0, result.stderr
    checkpoint = catalog.load().checkpoint("res2net50_26w_8s")
    for fact in (
        "48,403,776",
        "8.336",
        checkpoint.url,
        "2c7c9f12",
        checkpoint.license_note,
        "bilinear",
        checkpoint.notes,
    ):
        assert fact in result.stdout
    for accuracy in checkpoint.accuracies:
        assert f"{accuracy.top1:.3f}" in result.stdout and accuracy.source in result.stdout
    assert "did you mean res2net50_26w" in input_error(in_process("res2net_zoo/__main__.py", "show", "res2net50_26w"))


def test_show_prints_published_sizes_and_differences(in_process):
    out = in_process("res2net_zoo/__main__.py", "show", "dla60_res2next").stdout
    assert "17.33 M parameters, 3.6 GMACs (official release table)" in out and "outputs are unused" in out
    out = in_process("res2net_zoo/__main__.py", "show", "res2net50_18w_4s").stdout
    assert "22.92 % top-1 error (paper (TPAMI 2021) Table 3)" in out and "none in the catalogue" in out
    for authors, ours in (("res2net50_v1b_26w_4s", "res2net50d.in1k"), ("res2next_dla60", "dla60_res2next.in1k")):
        assert f" {ours}\n" in in_process("res2net_zoo/__main__.py", "show", authors).stdout


@pytest.mark.parametrize(("command", "file"), [("list", "docs/models.md"), ("sizes", "docs/models.md")])
def test_the_generated_tables_are_current(in_process, tmp_path, command, file):
    copy = tmp_path / "copy.md"
    copy.write_text((ROOT / file).read_text())
    assert in_process("res2net_zoo/__main__.py", command, "--update", copy).returncode == 0
    assert copy.read_text() == (ROOT / file).read_text(), f"python -m res2net_zoo {command} --update {file}"
    copy.write_text("nothing to fill")
    refused = input_error(in_process("res2net_zoo/__main__.py", command, "--update", copy))
    assert import_module(f"res2net_zoo.cli.{command}").MARKS[0] in refused
    assert copy.read_text() == "nothing to fill"
    if command == "list":
        refused = input_error(in_process("res2net_zoo/__main__.py", command, "--min-top1", 99, "--update", copy))
        assert "takes no filters" in refused and copy.read_text() == "nothing to fill"


def test_package_data_and_metadata_agree():
    import res2net_zoo

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["version"] == res2net_zoo.__version__
    assert f"## {project['version']}" in (ROOT / "CHANGELOG.md").read_text()
    assert f"version: {project['version']}" in (ROOT / "CITATION.cff").read_text()


def test_contributing_shows_how_a_model_is_added():
    import textwrap

    from res2net_zoo.analysis.cost import count
    from res2net_zoo.models import res2net

    text = (ROOT / "CONTRIBUTING.md").read_text()
    code, entry = (
        textwrap.dedent(re.search(rf"   ```{kind}\n(.*?)   ```", text, re.S)[1]) for kind in ("python", "toml")
    )
    facts = catalog.parse(TEXT + "\n" + entry).architectures["res2net50_32w_3s"]
    names = {**vars(res2net), "register_model": lambda entrypoint: entrypoint}
    exec(code, names)
    assert count(names["res2net50_32w_3s"], tuple(facts.input_size)) == (facts.parameters, facts.macs)
