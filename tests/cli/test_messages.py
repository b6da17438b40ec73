"""Error messages of programs: one line that names the cause and suggests a correction."""

import ast
import csv
import json
import re
import sys
import unicodedata
from collections.abc import Iterator
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image

from res2net_zoo import cli
from res2net_zoo.cli import main
from res2net_zoo.utils.command_line import closest
from res2net_zoo.utils.console import run
from res2net_zoo.utils.errors import InputError
from res2net_zoo.utils.markdown import code_span, markdown, markdown_table
from res2net_zoo.weights.card import model_card
from res2net_zoo.weights.model_folder import write_model_folder
from res2net_zoo.weights.pretrained import create_model
from tests.conftest import SHIPPED_MODEL, input_error

PROGRAMS = {
    "scripts/validate.py": (),
    "scripts/finetune.py": (),
    "scripts/predict.py": ("a.jpg",),
    "scripts/benchmark.py": (),
    "scripts/export.py": ("--format", "onnx"),
    "scripts/cam.py": ("a.jpg",),
    "scripts/train_task.py": (),
    "scripts/validate_task.py": ("model", "--data", "data"),
    "scripts/predict_task.py": ("model", "a.jpg"),
    "hub/convert.py": ("--model", "res2net50d.in1k"),
}
PACKAGE = Path(cli.__file__).parents[1]
TAKE_PARAMETERS = {"InputError", "LicenseError", "warn", "with_options"}  # a message, then parameters
HOSTILE = "a\x1b[31m|b\u202e\udcff<i>"


def plain(text: str) -> bool:
    """Return whether a text has only printable characters."""
    return all(c == "\n" or unicodedata.category(c) not in ("Cc", "Cf", "Cs", "Zl", "Zp") for c in text)


@pytest.mark.parametrize("program_args", PROGRAMS.items(), ids=PROGRAMS)
def test_misspelt_options_are_reported_before_missing_ones(in_process, program_args):
    path, args = program_args
    line = input_error(in_process(path, *args, "--ouput", "x"))
    assert "unrecognized argument --ouput; did you mean --output" in line


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (("hub/mirror.py", "--too", "x"), "--too; did you mean --to?"),
        (("hub/verify.py", "x", "--revison=v1"), "--revison; did you mean --revision?"),
        (("hub/publish.py", "x", "--dryrun"), "--dryrun; did you mean --dry-run?"),
        (("scripts/export.py", "--format", "onx", "--output", "x.onnx"), "invalid choice: 'onx'; did you mean onnx?"),
        (("scripts/predict.py", "a.jpg", "--format", "xml"), "invalid choice: 'xml'; choose from table, jsonl, csv"),
        (("scripts/train_task.py", "--task", "detectio"), "did you mean detection?"),
        (("scripts/finetune.py", "--balance", "los"), "did you mean loss?"),
        (("scripts/finetune.py", "--opt", "adamm"), "no optimizer adamm; did you mean adam "),
        (("scripts/finetune.py", "--sched", "cosin"), "no schedule cosin; did you mean cosine?"),
        (("scripts/finetune.py", "--recipe", "finetun"), "no recipe finetun; did you mean finetune?"),
        (("scripts/finetune.py", "--recipe", "./finetune.toml"), "no recipe file ./finetune.toml"),
        (("scripts/finetune.py", "extra"), "unrecognized argument extra; --help lists"),
        (("scripts/train_task.py", "--task", "saliency", "--data", "x", "--opt", "adamm"), "did you mean adam "),
        (("scripts/cam.py", "hub", "--class", "dog"), "there is no class dog; there are 10: 0, 1, 2, 3"),
        (("scripts/finetune.py", "--model", "res2net50"), "res2net50_26w_4s"),
        (("scripts/export.py", "--format", "onnx", "--output", "x.onnx", "--model", "hub"), "local-dir:hub"),
        (("hub/verify.py", "hub/modles"), "there is no model folder hub/modles; did you mean hub/models?"),
        (("hub/verify.py", "../no/such"), "there is no model folder ../no/such"),
        (("hub/verify.py", "local-dir:hub/modles"), "did you mean hub/models?"),
        (("hub/verify.py", "README.md"), "README.md is a file; name a model folder"),
        (("hub/publish.py", "hub/modles", "--repo-id", "a/b"), "there is no model folder hub/modles; did you mean"),
        (("hub/mirror.py", "--to", "README.md"), "README.md is a file; name a folder"),
        (
            ("hub/convert.py", "--model", "res2net50d.in1k", "--checkpoint", "READM.md", "--output", "x"),
            "cannot read READM.md: No such file; did you mean README.md?",
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_errors_are_one_line_with_a_suggestion(in_process, monkeypatch, tmp_path, args, expected):
    if "cam.py" in args[0]:
        Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
        args = (args[0], tmp_path, *args[2:], "--output", tmp_path / "cam.png")
    assert expected in input_error(in_process(*args))


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (("lst",), "invalid choice: 'lst'; did you mean list?"),
        (("list", "--pretraind"), "unrecognized argument --pretraind; did you mean --pretrained?"),
        (("list", "--max-params", "nan"), "--max-params: nan is not 0 or more and finite"),
        (("list", "--max-gmacs", "inf"), "--max-gmacs: inf is not 0 or more and finite"),
        (("list", "--min-top1", "101"), "--min-top1: 101 is not 0 or more, up to 100"),
        (("show", "res2net50_26"), "did you mean res2net50_26w_4s or"),
        (("show", "res2net50d.in2k"), "did you mean res2net50d.in1k"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_catalogue_commands_suggest_names(capfd, args, expected):
    with pytest.raises(SystemExit) as stopped:
        raise SystemExit(main(args))
    _, err = capfd.readouterr()
    assert stopped.value.code == 2 and err.count("\n") == 1 and expected in err


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("res2net50", "did you mean res2net50_26w_4s or res2net50_48w_2s or"),
        ("Res2Net50_26w_4s", "did you mean res2net50_26w_4s?"),
        ("resnet5O", "did you mean resnet50"),
        ("res2net50_26w_4s.in2k", "did you mean res2net50_26w_4s.in1k?"),
        (
            "org/mine",
            "there is no model folder org/mine; name a folder as local-dir:DIR, or a repository as hf-hub",
        ),
        ("hub/models", "hub/models is a folder; use local-dir:hub/models"),
        ("hub", "hub is a folder; use local-dir:hub"),
        ("./hub/modls", "did you mean local-dir:hub/models?"),
        ("hub/publish.py", "hub/publish.py is a file"),
        ("../no/such", "there is no model folder ../no/such; name a folder as local-dir:DIR"),
        ("local_dir:hub", "unknown source local_dir; did you mean local-dir?"),
        ("localdir:hub", "did you mean local-dir?"),
        ("local-dir:", "missing name after the colon; use local-dir:DIR"),
        ("local-dir:hub/modles", "there is no model folder hub/modles; did you mean hub/models?"),
        ("local-dir:README.md", "README.md is a file"),
        ("local-dir:~/no-such", "write it in full"),
        ("local-dir:" + 5000 * "a", "there is no model folder aaa"),
        ("hf-hub:../x", "../x is not a repository id ORG/NAME"),
    ],
    ids=lambda value: value[:30],
)
def test_model_names_are_suggested(monkeypatch, name, expected):
    monkeypatch.chdir(SHIPPED_MODEL.parents[2])
    with pytest.raises(InputError) as refused:
        create_model(name)
    assert expected in str(refused.value)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ('lr = "fast"', "--lr: invalid float value: 'fast'"),
        ("lr = inf", "--lr: inf is not 0 or more and finite"),
        ("lr = nan", "--lr: nan is not 0 or more"),
        ("lr = -1", "--lr: -1 is not 0 or more"),
        ('lss = "ce"', "sets lss, which is not a setting; did you mean loss?"),
        ('loss = "c"', "invalid choice: 'c'"),
        ("lr = ", "is not TOML"),
        (f"x = {'[' * 5000}", "is nested too deeply"),
        ('tracker = ["none", "--overwrite"]', "must be a list of values"),
        ('tracker = "--overwrite"', "the tracker --overwrite is unknown to"),
        (b"\xff\xfe", "is not TOML"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_errors_name_the_recipe(in_process, tmp_path, content, expected):
    path = tmp_path / "mine.toml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    line = input_error(in_process("scripts/finetune.py", "--recipe", path, "--output", tmp_path / "out"))
    assert expected in line and ("mine.toml" in line or "--tracker" in line)


def test_recipe_with_byte_order_mark(in_process, tmp_path):
    (tmp_path / "mine.toml").write_bytes(b'\xef\xbb\xbfopt = "adamm"\n')
    args = ("--recipe", tmp_path / "mine.toml", "--output", tmp_path / "out")
    assert "no optimizer adamm" in input_error(in_process("scripts/finetune.py", *args))


@pytest.mark.parametrize("value", ["inf", "-inf", "nan", "1e999"])
def test_numbers_must_be_finite(in_process, value):
    line = input_error(in_process("scripts/finetune.py", f"--lr={value}"))
    assert "is not 0 or more" in line


@pytest.mark.parametrize(
    ("error", "code", "expected"),
    [
        (InputError(f"no {HOSTILE}"), 2, r"error: no a\x1b[31m|b\u202e\udcff<i>"),
        (OSError(28, "No space left on device", "out.json"), 2, "error: cannot read or write out.json: No space left"),
        (MemoryError(), 1, "error: not enough memory; reduce"),
        (torch.OutOfMemoryError("CUDA out of memory.\nmore"), 1, "error: not enough memory: CUDA out of memory.;"),
    ],
    ids=["control characters", "full disk", "memory", "memory of a GPU"],
)
def test_exceptions_are_printed_on_one_line(capfd, error, code, expected):
    def main() -> int:
        raise error

    assert run(main) == code
    _, err = capfd.readouterr()
    assert err.count("\n") == 1 and err.startswith(expected) and plain(err)


def test_command_line_errors_escape_control_characters(in_process):
    line = input_error(in_process("scripts/predict.py", "a.jpg", f"--{HOSTILE}"))
    assert r"\x1b[31m" in line and plain(line)
    assert plain(input_error(in_process("scripts/finetune.py", "--recipe", f"{HOSTILE}.toml")))


def test_tables_escape_bars_and_control_characters():
    header, rule, row = markdown_table((HOSTILE, "top-1"), [(HOSTILE, "1.0")]).splitlines()
    assert plain(header + row)
    cell = r"a\x1b[31m\|b\u202e\udcff<i>"
    assert header.startswith(f"| {cell} |") and row.startswith(f"| {cell} |")
    assert len(header) == len(rule) == len(row)


@pytest.fixture(scope="module")
def hostile_model(tmp_path_factory):
    """A model folder with class names that a terminal, Markdown and matplotlib would interpret."""
    folder = tmp_path_factory.mktemp("hostile") / "model"
    names = ["red\x1b[31m|pipe", "right\u202eleft", "cost_$5^_$", "<script>x</script>", "`code` [a](b)"]
    write_model_folder(folder, timm.create_model("res2net_tiny", num_classes=5), model_card("m", "# m", None), names)
    return folder


@pytest.mark.parametrize("program", ["predict", "cam", "class"])
def test_class_names_are_escaped_on_terminals(in_process, tmp_path, hostile_model, program):
    image = tmp_path / "$_^a\x1b[2J.png"
    Image.new("RGB", (8, 8)).save(image)
    args = {
        "predict": ("scripts/predict.py", image),
        "cam": ("scripts/cam.py", image, "--class", "2", "--output", tmp_path / "cam.png"),
        "class": ("scripts/cam.py", image, "--class", "dog", "--output", tmp_path / "cam.png"),
    }[program]
    result = in_process(*args, "--model", f"local-dir:{hostile_model}")
    assert result.returncode == (2 if program == "class" else 0), result.stderr
    assert plain(result.stdout + result.stderr)
    if program == "predict":
        header, rule, row = result.stdout.splitlines()
        assert row.replace(r"\|", "").count("|") == header.count("|") == rule.count("|") == 7
        assert r"red\x1b[31m\|pipe" in row


@pytest.mark.parametrize("form", ["jsonl", "csv"])
def test_predictions_are_escaped_on_terminals_but_not_in_files(in_process, tmp_path, monkeypatch, form):
    name = "a\x1b[2J\x9b1m\u202eé.png"
    Image.new("RGB", (8, 8)).save(tmp_path / name)
    args = ("scripts/predict.py", tmp_path, "--format", form, "--topk", 1)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    result = in_process(*args)
    assert result.returncode == 0 and plain(result.stdout.replace("\r\n", "\n")) and "é" in result.stdout
    assert in_process(*args, "--output", tmp_path / "out").returncode == 0
    text = (tmp_path / "out").read_text()
    rows = [json.loads(text)] if form == "jsonl" else list(csv.DictReader(text.splitlines()))
    assert [row["path"] for row in rows] == [str(tmp_path / name)]


def test_warnings_escape_control_characters(in_process, tmp_path):
    (tmp_path / "a\x1b[31m.png").write_bytes(b"no image")
    Image.new("RGB", (8, 8)).save(tmp_path / "b.png")
    result = in_process("scripts/predict.py", tmp_path, "--skip-corrupt")
    assert result.returncode == 1 and result.stderr.startswith("warning: ") and r"a\x1b[31m.png" in result.stderr
    assert result.stderr.count("\n") == 1 and plain(result.stderr + result.stdout)


def test_cards_escape_markdown_in_names():
    assert markdown("<b>*x*</b>") == r"\<b>\*x\*\</b>"
    assert markdown("[a](http://b) `c`") == r"[a\](http://b) \`c\`"
    assert markdown("n01440764_x a-b") == "n01440764_x a-b"
    assert code_span("<b>") == "`<b>`" and code_span("a`b``c") == "``` a`b``c ```"
    assert markdown("# no heading\n\n---") == r"\# no heading ---"


def test_the_closest_names_come_first():
    assert closest("res2net50", ["resnet50", "res2net50_26w_4s", "res2net50d"]) == [
        "res2net50_26w_4s",
        "res2net50d",
        "resnet50",
    ]
    assert closest("--ouput", ["--opt", "--output", "--drop"]) == ["--output"]
    assert closest("zzz", ["abc"]) == []
    assert closest("a" * 100_000, ["abc"]) == []


def messages(path: Path) -> Iterator[str]:
    """Yield the string literals of a module that are not docstrings."""
    tree = ast.parse(path.read_text())
    docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
            yield node.value


def test_the_library_names_no_option_and_no_script():
    """It names the parameters to change, and the running program adds its options; only a clone has scripts."""
    found = {
        (path.relative_to(PACKAGE).as_posix(), text)
        for path in library()
        for text in messages(path)
        if re.search(r"(?<![\w-])--[a-z]|\b\w+\.py\b", re.sub(r"var\(--[\w-]+\)", "", text))  # without CSS variables
    }
    assert found == {
        ("utils/command_line.py", "--help lists all options"),  # of every parser
        ("weights/pretrained.py", " --revision "),  # of `hf download`
    }


def test_every_parameter_that_a_message_names_is_an_option():
    options = {text for path in (PACKAGE / "cli").glob("*.py") for text in messages(path) if text.startswith("--")}
    named = {name for path in library() for name in parameters_of(path)}
    assert {"eval_split", "skip_corrupt", "resume", "freeze_bn", "workers"} <= named
    assert [name for name in named if f"--{name.replace('_', '-')}" not in options] == []


def library() -> list[Path]:
    """Return the modules of the package outside cli/."""
    return [path for path in PACKAGE.rglob("*.py") if PACKAGE / "cli" not in path.parents]


def parameters_of(path: Path) -> Iterator[str]:
    """Yield the names that calls pass after a message."""
    for call in ast.walk(ast.parse(path.read_text())):
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id in TAKE_PARAMETERS:
            for node in (node for argument in call.args[1:] for node in ast.walk(argument)):
                if isinstance(node, ast.Constant) and isinstance(node.value, str):
                    yield node.value
