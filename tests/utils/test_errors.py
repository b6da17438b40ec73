"""Shortened messages of other errors, and the options that programs add to messages."""

import pickle

import pytest

from res2net_zoo.utils.console import run, warn, with_options
from res2net_zoo.utils.errors import InputError, clipped, first_line, one_line
from res2net_zoo.utils.processes import all_or_none

OPTIONS = {"eval_split": "--eval-split", "train_split": "--train-split"}


def test_one_line_removes_credentials_and_queries():
    error = RuntimeError("cannot read\n  https://user:secret@host/file?token=secret#part now")
    assert one_line(error) == "cannot read https://host/file now"


def test_error_without_text_is_named_by_its_type():
    assert one_line(MemoryError()) == first_line(MemoryError("\n")) == "MemoryError"


def test_long_texts_are_clipped():
    assert one_line(ValueError("x" * 400)) == "x" * 300 + " ..."
    assert one_line(ValueError("x " * 400), 5) == "x x x ..."
    assert clipped("x" * 300) == "x" * 300


def test_first_line():
    assert first_line(RuntimeError("\nno kernel\nC++ frames:\n" + "frame\n" * 100)) == "no kernel"


def test_a_program_adds_its_options_to_an_error(capsys):
    def main():
        raise InputError("no such split; name another", "split", "train_split", "eval_split")

    assert run(main, OPTIONS) == 2
    assert capsys.readouterr().err == "error: no such split; name another (--train-split, --eval-split)\n"
    assert run(main) == 2
    assert capsys.readouterr().err == "error: no such split; name another\n"


def test_a_program_adds_its_options_to_warnings_and_texts(capsys):
    def main():
        warn("both are one split", "eval_split")
        print(with_options("name another", "train_split"))
        return 0

    assert run(main, OPTIONS) == 0
    written = capsys.readouterr()
    assert (written.err, written.out) == (
        "warning: both are one split (--eval-split)\n",
        "name another (--train-split)\n",
    )
    assert with_options("name another", "train_split") == "name another"


def test_an_error_of_another_process_keeps_its_parameters(monkeypatch):
    sent = []
    monkeypatch.setattr("accelerate.utils.gather_object", lambda mine: sent.append(pickle.dumps(mine)) or mine)

    def work():
        raise InputError("name another split", "eval_split")

    with pytest.raises(InputError):
        all_or_none(work)
    monkeypatch.setattr("accelerate.utils.gather_object", lambda mine: [*mine, *pickle.loads(sent[0])])
    with pytest.raises(InputError, match=r"^name another split$") as caught:
        all_or_none(lambda: None)
    assert caught.value.parameters == ("eval_split",)
