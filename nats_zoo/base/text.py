"""Text and Markdown tables."""

import json
import re
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

TABLE_WIDTH = 120


def wrap(line: str, indent: str) -> list[str]:
    return textwrap.wrap(
        line, TABLE_WIDTH, subsequent_indent=indent + "  ", break_long_words=False, break_on_hyphens=False
    )


def align_columns(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows as aligned lines; the last column takes the rest of the width, in as many lines as it needs."""
    widths = [max(map(len, column)) for column in list(zip(*rows, strict=True))[:-1]]
    indent = sum(widths) + 2 * len(widths)
    lines = []
    for *cells, last in rows:
        begin = "".join(f"{cell:<{width}}  " for cell, width in zip(cells, widths, strict=True))
        wrapped = textwrap.wrap(last, TABLE_WIDTH - indent, break_on_hyphens=False) or [""]
        lines += [begin + wrapped[0], *(" " * indent + line for line in wrapped[1:])]
    return [line.rstrip() for line in lines]


def card_table(title: str, values: Mapping[str, Any]) -> str:
    """A section of a card with one row per value; nothing if there are none."""
    if not values:
        return ""
    cells = ((key, value if isinstance(value, str) else json.dumps(value)) for key, value in values.items())
    rows = (table_row(key, value) for key, value in cells)
    return "\n".join([f"## {title}\n", "| | |", "|---|---|", *rows])


def table_row(*cells: str) -> str:
    """A row of a table in Markdown."""
    return f"| {' | '.join(map(cell, cells))} |"


def code_block(text: str, language: str = "") -> str:
    """Text as it is, in Markdown; no row of backticks in it ends the block."""
    longest = max((len(found) for found in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text}\n{fence}"


def inline_code(value: Any) -> str:
    return "`" + cell(str(value)).replace("`", "'") + "`"


def cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")
