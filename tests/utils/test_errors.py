"""What messages quote of the errors of others."""

from res2net_zoo.utils.errors import clipped, first_line, one_line


def test_one_line_without_credentials_and_queries():
    error = RuntimeError("cannot read\n  https://user:secret@host/file?token=secret#part now")
    assert one_line(error) == "cannot read https://host/file now"


def test_an_error_without_text_is_named_by_its_type():
    assert one_line(MemoryError()) == first_line(MemoryError("\n")) == "MemoryError"


def test_long_texts_are_clipped():
    assert one_line(ValueError("x" * 400)) == "x" * 300 + " ..."
    assert one_line(ValueError("x " * 400), 5) == "x x x ..."
    assert clipped("x" * 300) == "x" * 300


def test_the_first_line_alone():
    assert first_line(RuntimeError("\nno kernel\nC++ frames:\n" + "frame\n" * 100)) == "no kernel"
