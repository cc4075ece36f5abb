"""Lines of errors, whatever others put into them."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from edgemuse.engines.errors import one_line, pip_install


@given(text=st.text())
def test_one_printable_line(text: str) -> None:
    line = one_line(text)
    assert line.isprintable()
    assert [character for character in line if character != " "] == [
        character for character in text if character.isprintable() and not character.isspace()
    ]


def test_words_stay_apart() -> None:
    assert one_line("  a \x1b[2J\n\tb\u202e c ") == "a [2J b c"


def test_an_error_without_words() -> None:
    assert one_line(MemoryError()) == "MemoryError"
    assert one_line("") == ""


def test_extras_are_installed_from_the_source() -> None:
    assert pip_install("openvino") == 'run: pip install "openvino"'
    assert pip_install(".[export]") == """run: pip install ".[export]" in edgemuse's source folder"""
