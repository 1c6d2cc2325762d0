"""Tables as text and in Markdown."""

import pytest

from nats_zoo.base.text import TABLE_WIDTH, card_table, markdown_table, text_table


def test_columns_are_as_wide_as_they_need():
    assert text_table([["a", "b"], ["long", "c"]]) == ["a     b", "long  c"]


def test_a_column_has_a_side_and_a_least_width():
    rows = [["name", "n", "m"], ["x", "1", "1000"]]
    assert text_table(rows, "<6", ">3", gap=" ") == ["name     n    m", "x        1 1000"]


def test_columns_that_no_row_has_are_left_out():
    assert text_table([["name", "n"]], "<6", ">3", ">9") == ["name      n"]


def test_the_last_column_wraps_into_the_rest_of_the_width():
    rows = [["a", "b"], ["first", "word " * 60], ["second", ""]]
    lines = text_table(rows, wrapped=True)
    assert max(map(len, lines)) <= TABLE_WIDTH
    assert lines[2].startswith(" " * 8 + "word")
    assert lines[-1] == "second"
    assert " ".join(lines).split().count("word") == 60


def test_rows_of_different_lengths_are_refused():
    with pytest.raises(ValueError, match="zip"):
        text_table([["a", "b"], ["c"]])


def test_numbers_stand_on_the_right_in_markdown():
    table = markdown_table(("class", "AP", "share"), [("cat", 4.5, "10.0%"), ("dog", "-", "9%")])
    assert table.splitlines() == [
        "| class | AP | share |",
        "|---|---:|---:|",
        "| cat | 4.5 | 10.0% |",
        "| dog | - | 9% |",
    ]
    assert markdown_table(("a", "b"), [("x", 1)], align=False).splitlines()[1] == "|---|---|"


def test_no_cell_ends_its_column_or_its_row():
    assert markdown_table(("a", "b"), [("x|y", "two\nlines")]).splitlines()[2] == "| x\\|y | two lines |"
    assert card_table("T", {"k": "v|w"}).splitlines()[-1] == "| k | v\\|w |"
    assert card_table("T", {}) == ""
