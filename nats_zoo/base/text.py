"""Text and Markdown tables."""

import json
import re
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

TABLE_WIDTH = 120


def wrap(line: str, indent: str) -> list[str]:
    """Break a line at TABLE_WIDTH; what follows is indented by two more.

    >>> wrap("note: short", "")
    ['note: short']
    """
    return textwrap.wrap(
        line, TABLE_WIDTH, subsequent_indent=indent + "  ", break_long_words=False, break_on_hyphens=False
    )


def text_table(rows: Sequence[Sequence[str]], *columns: str, gap: str = "  ", wrapped: bool = False) -> list[str]:
    """Align cells in columns.

        >>> text_table([["name", "n"], ["a", "1"]], "<", ">3")
        ['name    n', 'a       1']

    Args:
        rows: the cells, equally many in each row; at least one row.
        columns: "<" or ">" for the side of each column, and its least width; the last one is that of all further ones.
        gap: between columns.
        wrapped: the last column takes the rest of TABLE_WIDTH, in as many lines as it needs.

    Returns:
        The lines.
    """
    if wrapped:
        rest = TABLE_WIDTH - sum(max(map(len, column)) + len(gap) for column in list(zip(*rows, strict=True))[:-1])
        rows = [
            (*(cells if number == 0 else [""] * len(cells)), line)
            for *cells, last in rows
            for number, line in enumerate(textwrap.wrap(last, rest, break_on_hyphens=False) or [""])
        ]
    cells = list(zip(*rows, strict=True))
    specs = [*columns, *[columns[-1] if columns else "<"] * len(cells)][: len(cells)]
    widths = [max(int(spec[1:] or 0), *map(len, column)) for spec, column in zip(specs, cells, strict=True)]
    sides = [f"{spec[0]}{width}" for spec, width in zip(specs, widths, strict=True)]
    return [gap.join(map(format, row, sides)).rstrip() for row in rows]


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[Any]], *, align: bool = True) -> str:
    """Write a table in Markdown.

        >>> print(markdown_table(["class", "AP"], [["cat", 4.5]]))
        | class | AP |
        |---|---:|
        | cat | 4.5 |

    Args:
        head: the columns' titles.
        rows: cells, as text or numbers.
        align: put columns in which no cell begins with a letter, such as numbers, on the right.
    """
    texts = [list(map(str, row)) for row in rows]
    is_text = [any(cell[:1].isalpha() for cell in column[1:]) for column in zip(head, *texts, strict=True)]
    rule = "".join("|---" if text or not align else "|---:" for text in is_text)
    return "\n".join([table_row(*head), f"{rule}|", *(table_row(*row) for row in texts)])


def card_table(title: str, values: Mapping[str, Any]) -> str:
    """Write a section of a card with one row per value; nothing if there are none.

    >>> print(card_table("Metrics", {"AP": 37.4}).splitlines()[-1])
    | AP | 37.4 |
    """
    if not values:
        return ""
    cells = ((key, value if isinstance(value, str) else json.dumps(value)) for key, value in values.items())
    rows = (table_row(key, value) for key, value in cells)
    return "\n".join([f"## {title}\n", "| | |", "|---|---|", *rows])


def table_row(*cells: str) -> str:
    """Write a row of a table in Markdown.

    >>> table_row("a|b", "two\\nlines")
    '| a\\\\|b | two lines |'
    """
    return f"| {' | '.join(map(cell, cells))} |"


def code_block(text: str, language: str = "") -> str:
    """Show text as it is, in Markdown; no row of backticks in it ends the block.

    >>> print(code_block("nats list", "bash"))
    ```bash
    nats list
    ```
    """
    longest = max((len(found) for found in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text}\n{fence}"


def inline_code(value: Any) -> str:
    """Show a value as code within a line of Markdown.

    >>> inline_code("a`b")
    "`a'b`"
    """
    return "`" + cell(str(value)).replace("`", "'") + "`"


def cell(text: str) -> str:
    """Keep a text within its cell of a Markdown table.

    >>> cell("two\\nlines")
    'two lines'
    """
    return " ".join(text.split()).replace("|", "\\|")
