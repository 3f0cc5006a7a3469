"""Error messages, which have one line whatever the user's input."""

from __future__ import annotations

import pytest

from safemax_sd.core.errors import LONGEST_VALUE, OptionError, SafemaxError


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ("a\nb", r"a\nb"),
        ("a\u2028b", r"a\u2028b"),
        ("\x1b[31mred", r"\x1b[31mred"),
        ("né 愛", "né 愛"),
        ("[/x]", "[/x]"),
    ],
)
def test_what_does_not_print_is_escaped(value: str, shown: str) -> None:
    assert str(OptionError("--seed", value, "must be a number")) == f"--seed {shown}: must be a number"
    assert str(SafemaxError(value)) == shown


def test_a_long_value_is_cut() -> None:
    assert (
        str(OptionError("--config", "a" * 5000, "cannot be read")) == f"--config {'a' * LONGEST_VALUE}…: cannot be read"
    )
