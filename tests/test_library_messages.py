"""The library's errors name no options of programs: a program knows which of its options to change."""

import ast
import re

from tests.conftest import ROOT

PACKAGE = ROOT / "res2net_zoo"
PROGRAMS = {"main"}  # functions that are programs
FILES = [
    *sorted((PACKAGE / "analysis").glob("*.py")),
    *(path for path in sorted((PACKAGE / "tasks").glob("*.py")) if path.name != "engine.py"),
    PACKAGE / "evaluation.py",
    PACKAGE / "training" / "report.py",
]


def test_errors_name_no_options():
    named = []
    for path in FILES:
        for function in ast.walk(ast.parse(path.read_text())):
            if isinstance(function, ast.FunctionDef) and function.name not in PROGRAMS:
                raised = (node for node in ast.walk(function) if isinstance(node, ast.Raise))
                named += [f"{path.name}: {text}" for node in raised if has_option(text := ast.unparse(node))]
    assert not named


def has_option(text: str) -> bool:
    return re.search(r"(?<![\w-])--[a-z]|scripts/|\b[a-z_]+\.py\b", text) is not None
