"""Lines of errors, whatever others put into them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgemuse.engines.errors import BackendError, InputError, foreign, one_line, pip_install, printable


@given(text=st.text())
def test_one_printable_line(text: str) -> None:
    line = one_line(text)
    assert line.isprintable()
    assert "  " not in line
    assert printable(text).isprintable()


@given(text=st.text(st.characters(categories=["L", "N", "P", "S"])))
def test_letters_of_every_language_stay(text: str) -> None:
    assert printable(text) == one_line(text) == text


def test_words_stay_apart() -> None:
    assert one_line("  a \x1b[2J\n\tb\u202e c ") == r"a \x1b[2J b\u202e c"
    assert printable("a \x1b[2J\n\tb\udcff") == r"a \x1b[2J\n\tb\udcff"


def test_an_error_without_words() -> None:
    assert one_line(MemoryError()) == "MemoryError"
    assert one_line("") == ""


def test_extras_are_installed_from_the_source() -> None:
    assert pip_install("openvino") == 'run: pip install "openvino"'
    assert pip_install(".[export]") == """run: pip install ".[export]" in edgemuse's source folder"""


@pytest.mark.parametrize(
    "error", [RecursionError("too deep"), MemoryError(), KeyError("x"), UnicodeError("\x1b"), OSError]
)
def test_whatever_a_library_raises_is_one_error(error: Exception) -> None:
    with pytest.raises(BackendError, match="it does not work") as caught, foreign(BackendError, "it does not work"):
        raise error
    assert str(caught.value).isprintable()
    with pytest.raises(InputError, match="mine"), foreign(BackendError, "it does not work"):
        raise InputError("mine")
