"""`res2net-zoo`: its commands and their help, launchers, and the wheel."""

import argparse
import re
import statistics
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest

from res2net_zoo import cli
from res2net_zoo.cli.shipped import CLONE
from res2net_zoo.utils.command_line import Parser
from tests.conftest import ROOT, read_tree

COMMANDS = [command for group in cli.COMMANDS.values() for command in group]
TASKS = ["train-task", "validate-task", "predict-task"]
LAUNCHERS = {
    f"{folder}/{command.replace('-', '_')}.py": command
    for folder, commands in {
        "scripts": ["validate", "finetune", "predict", "export", "benchmark", "cam", *TASKS],
        "hub": ["convert", "verify", "publish", "mirror"],
    }.items()
    for command in commands
}
# Their values differ between commands; `benchmark` is the only one without plain PyTorch as a backend.
OWN_VALUES = {"--backend", "--output", "--format", "--precision", "--mixed-precision", "--license", "--scale"}
ENTRY = "import sys; from res2net_zoo_cli import main; sys.exit(main())"


def module_of(command: str):
    return import_module(f"res2net_zoo.cli.{command.replace('-', '_')}")


def help_of(capfd: pytest.CaptureFixture, *words: str) -> str:
    with pytest.raises(SystemExit) as stopped:
        cli.main([*words, "--help"])
    out, err = capfd.readouterr()
    assert (stopped.value.code, err) == (0, "")
    return out


def parser_of(monkeypatch: pytest.MonkeyPatch, command: str) -> Parser:
    """Return a command's parser, intercepted when it parses."""
    caught = []

    def stop(self, *args, **kwargs):
        caught.append(self)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Parser, "parse_args", stop)
        with pytest.raises(KeyboardInterrupt):
            module_of(command).parse_args([])
    return caught[0]


def options_of(parser: argparse.ArgumentParser) -> Iterator[tuple[str, argparse.Action]]:
    for action in parser._actions:
        for option in action.option_strings:
            yield option, action


def test_overview_lists_every_command(capfd):
    text = help_of(capfd)
    modules = [path.stem.replace("_", "-") for path in Path(cli.__file__).parent.glob("*.py")]
    assert set(COMMANDS) == {name for name in modules if name != "--init--" and hasattr(module_of(name), "main")}
    for command in COMMANDS:
        assert re.search(rf"^  {command} +{re.escape(module_of(command).__doc__.splitlines()[0])}$", text, re.M)
    assert max(map(len, text.splitlines())) <= 120


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_usage_options_examples_and_exit_codes(capfd, command):
    text = help_of(capfd, command)
    order = [
        f"Usage: res2net-zoo {command}",
        "\n  -h, --help",
        "\nExamples:\n  res2net-zoo " + command,
        "\nExit codes: 0 ",
    ]
    places = [text.index(part) for part in order]
    assert places == sorted(places)
    assert "2 bad input" in text[places[-1] :]
    assert "['" not in text and "None" not in text and str(ROOT) not in text


def test_an_option_has_the_same_form_in_every_command(monkeypatch):
    forms: dict[str, set[str]] = {}
    for command in COMMANDS:
        parser = parser_of(monkeypatch, command)
        formatter = parser.formatter_class(prog="")
        for option, action in options_of(parser):
            metavar = action.metavar or formatter._get_default_metavar_for_optional(action)
            form = "" if action.nargs == 0 else str(list(action.choices) if action.choices else metavar)
            forms.setdefault(option, set()).add(form)
    assert {option: form for option, form in forms.items() if len(form) > 1 and option not in OWN_VALUES} == {}
    assert len(forms["--output"]) == 2  # FILE and DIR


def test_both_spellings_of_a_precision_are_accepted():
    for words in (["--precision", "bfloat16"], ["--precision", "bf16"], ["--mixed-precision", "bf16"]):
        assert module_of("validate").parse_args(words).mixed_precision == "bf16"
    assert module_of("validate").parse_args([]).mixed_precision is None
    assert module_of("validate").parse_args(["--precision", "bf16", "--mixed-precision", "bf16"])


@pytest.mark.parametrize(
    ("program", "words", "message"),
    [
        ("validate", "--precision int8 --mixed-precision bf16", "two different precisions are given; choose one"),
        ("validate", "--precision int9", "did you mean int8?"),
        ("validate", "--precision int8 --backend torch", "replace --backend torch by --backend auto"),
        ("validate", "--calibrate data", "--calibrate needs --precision int8"),
        ("predict", "a.jpg --precision int8 --model resnet50", "--precision int8 needs --calibrate DATA"),
        ("predict", "a.jpg --precision int8 --embeddings e.parquet", "remove --precision int8"),
        ("predict", "a.jpg --calibrate data", "--calibrate needs --precision int8"),
        ("finetune", "--precision int8", "choose from float32, bfloat16, float16"),
    ],
)
def test_unsupported_precisions(program, words, message, capsys):
    with pytest.raises(SystemExit) as error:
        module_of(program).parse_args(words.split())
    assert error.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.parametrize(("path", "command"), LAUNCHERS.items(), ids=LAUNCHERS)
def test_launchers_run_their_command(in_process, capfd, path, command):
    assert in_process(path, "--help").stdout == help_of(capfd, command)
    result = in_process(path, "--frobnicate")
    assert result.returncode == 2 and result.stderr.startswith(f"res2net-zoo {command}: error: ")


def test_every_program_of_a_clone_is_a_launcher():
    programs = [path for folder in ("scripts", "hub") for path in (ROOT / folder).glob("*.py")]
    assert {path.relative_to(ROOT).as_posix() for path in programs} == {*LAUNCHERS}


def test_a_command_is_required():
    result = subprocess.run([sys.executable, "-c", ENTRY], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 2 and "COMMAND" in result.stderr and result.stderr.count("\n") == 1


@pytest.mark.parametrize("entry", [["-c", ENTRY], ["-m", "res2net_zoo"]], ids=["script", "module"])
@pytest.mark.parametrize("words", [["--help"], ["validate", "--help"], ["show", "--frobnicate"]], ids=" ".join)
def test_programs_parse_options_quickly(words, entry):
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        result = subprocess.run([sys.executable, *entry, *words], cwd=ROOT, capture_output=True, text=True)
        seconds.append(time.perf_counter() - start)
        assert result.returncode == (0 if "--help" in words else 2), result.stderr
    assert statistics.median(seconds) < 2, seconds


def test_console_script_imports_the_package_after_parsing():
    code = "import sys, res2net_zoo_cli\nassert res2net_zoo_cli.main(['show', 'res2net_tiny']) == 0\n"
    code += "import res2net_zoo, timm\nassert timm.is_model('blres2net50') and res2net_zoo.optimize"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0 and result.stdout.startswith("name "), result.stderr


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The content of the wheel, in a folder for `sys.path`."""
    for module in ("hatchling", "hatch_fancy_pypi_readme"):
        pytest.importorskip(module)
    folder = tmp_path_factory.mktemp("wheel")
    build = f"from hatchling.build import build_wheel; print(build_wheel({str(folder)!r}))"
    done = subprocess.run([sys.executable, "-c", build], cwd=ROOT, capture_output=True, text=True, check=True)
    with zipfile.ZipFile(folder / done.stdout.split()[-1]) as archive:
        archive.extractall(folder / "site")
    return folder / "site"


def test_wheel_contains_shipped_files(wheel):
    shipped = read_tree(wheel / "res2net_zoo" / "shipped")
    expected = {}
    for kind, folder in CLONE.items():
        names = subprocess.run(["git", "ls-files", folder], cwd=ROOT, capture_output=True, text=True, check=True)
        for name in names.stdout.split():
            if not name.endswith(".py") or kind == "space":
                expected[f"{kind}/{Path(name).relative_to(folder).as_posix()}"] = (ROOT / name).read_bytes()
    assert shipped == expected and len(shipped) > 20
    modules = {path.relative_to(wheel).as_posix() for path in wheel.rglob("*.py")}
    assert modules == {path.relative_to(ROOT).as_posix() for path in [*ROOT.glob("res2net_zoo/**/*.py")]} | {
        "res2net_zoo_cli.py",
        "res2net_zoo/shipped/space/app.py",
    }
    (entry_points,) = wheel.glob("*.dist-info/entry_points.txt")
    assert "res2net-zoo = res2net_zoo_cli:main" in entry_points.read_text()


def test_wheel_validates_the_shipped_model(wheel, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(wheel))
    run = [sys.executable, "-c", ENTRY, "validate", "--check"]
    result = subprocess.run(run, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    row = [cell.strip() for cell in result.stdout.splitlines()[-1].split("|")]
    assert row[1:5] == ["local-dir:hub/models/res2net_tiny.digits", "hub/datasets/digits", "validation", "360"]
    assert row[-2] == "passed" and not [*tmp_path.iterdir()]
