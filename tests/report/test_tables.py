"""Tables: what is shown for which value, and whole lines in pipes."""

from __future__ import annotations

import pytest

from foedus.report.tables import bytes_shown, plain, show, shown, table


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, ""), (True, "yes"), (12, "12"), (1_234_567, "1,234,567"), (0.123456, "0.1235"), (1234.5, "1,234")]
    + [("a b", "a b")],
)
def test_values_as_cells(value: object, text: str) -> None:
    assert shown(value) == text


@pytest.mark.parametrize(("count", "text"), [(0, "0 B"), (999, "999 B"), (1e6, "1 MB"), (2.5e15, "2.5e+03 TB")])
def test_bytes(count: float, text: str) -> None:
    assert bytes_shown(count) == text


def test_columns_are_those_of_all_rows_and_the_best_is_marked() -> None:
    lines = plain(table([{"a": 1}, {"a": 2, "b": "x"}], best=1, title="Title", notes="Note")).splitlines()
    assert lines[0] == "Title"
    assert lines[1].split() == ["a", "b"]
    assert lines[3].split() == ["2", "x", "★", "best"]
    assert lines[-1] == "Note"
    assert "best" not in lines[2]


def test_brackets_in_values_are_text_and_no_markup() -> None:
    assert "[bold]" in plain(table([{"name": "[bold]"}]))


def test_a_pipe_gets_whole_lines(capsys: pytest.CaptureFixture[str]) -> None:
    show(table([{"long": "x" * 150, "end": "here"}]))
    assert "x" * 150 + "  here" in capsys.readouterr().out
