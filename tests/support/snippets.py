"""The code blocks of a Markdown page, and a process that runs them as a reader would, in the page's order.

A block that can not be run here stands behind a comment that says why: `<!-- not run: needs 8 GPUs -->`. Its commands
are then parsed only: options that no longer exist are found all the same.

As a program, `python snippets.py PAGE --checkout ROOT` runs a page's blocks in the current folder. `nats` commands run
in this process, with the small sizes of SMALL put behind their own options; a line of Python that ends with a literal
in a comment must give that value.
"""

import argparse
import ast
import contextlib
import importlib.util
import io
import re
import shlex
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

NOT_RUN = re.compile(r"<!-- not run: (\S.*) -->$")
LANGUAGES = ("python", "bash", "json", "yaml", "")

SMALL_HEADS = shlex.split("--fpn_channels 32 --head_size 16 --roi_samples 8 --min_size 64 --max_size 96 --workers 0")
SMALL = {
    "train": [*SMALL_HEADS, *shlex.split("--epochs 1 --batch_size 2 --calibration_images 2 --mask_channels 16")],
    "search": [*SMALL_HEADS, *shlex.split("--epochs 1 --alpha_start 0 --batch_size 1 --calibration_images 2 --space A"
                                          " --score_images 1 --held_back_images 1 --max_rounds 1")],
    "evaluate": ["--workers", "0"],
    "profile": shlex.split("--size 64 --repeats 1"),
    "erf": shlex.split("--size 256"),
}  # fmt: skip


@dataclass(frozen=True)
class Block:
    """A fenced code block of a page.

    Attributes:
        line: of its first line of code, from 1.
        language: what stands behind the fence.
        code: its text.
        not_run: why it is not run, or None.
    """

    line: int
    language: str
    code: str
    not_run: str | None


def read_blocks(page: Path) -> list[Block]:
    """The page's fenced code blocks, in their order."""
    lines = page.read_text(encoding="utf-8").splitlines()
    fences = [number for number, line in enumerate(lines) if line.startswith("```")]
    if len(fences) % 2:
        raise ValueError(f"{page}: a code block that does not end")
    return [_block(lines, start, end) for start, end in zip(fences[::2], fences[1::2], strict=True)]


def _block(lines: list[str], start: int, end: int) -> Block:
    reason = NOT_RUN.match(lines[start - 1]) if start else None
    code = "\n".join(lines[start + 1 : end])
    return Block(start + 2, lines[start].removeprefix("```").strip(), code, reason and reason[1])


def shell_commands(code: str) -> Iterator[list[str]]:
    """The words of each command of a bash block, environment settings included."""
    for line in code.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if words:
            yield words


def nats_arguments(words: list[str]) -> list[str] | None:
    """What `nats` is given, if that is what a command runs, by itself or through a launcher."""
    if "-m" in words and words[words.index("-m") + 1 : words.index("-m") + 2] == ["nats_zoo"]:
        return words[words.index("-m") + 2 :]
    return words[1:] if words[0] == "nats" else None


# --- parsing only -----------------------------------------------------------------------------------------------------


def parse_command(words: list[str], checkout: Path) -> None:
    """Parse a command of ours as it would be when it runs; others are let through.

    Raises:
        Exception: what the parser has against it.
    """
    arguments = nats_arguments(words)
    if arguments is not None:
        _parse_nats(arguments)
    elif words[0] == "python" and words[1].startswith("benchmarks/"):
        _load_module(checkout / words[1]).parse_args(words[2:])


def _parse_nats(arguments: list[str]) -> None:
    from jsonargparse import ArgumentParser

    from nats_zoo.cli.commands import COMMANDS

    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--config", action="config")
    COMMANDS[arguments[0]].build(parser)
    parser.parse_args(arguments[1:])


def _load_module(path: Path) -> Any:
    sys.path.insert(0, str(path.parent))  # as when it runs as a program
    spec = importlib.util.spec_from_file_location(f"snippet_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


# --- running ----------------------------------------------------------------------------------------------------------


def run_page(page: Path, checkout: Path) -> None:
    """Run the page's blocks in the current folder; Python blocks share their names.

    Raises:
        AssertionError: a command failed, or a value is not what its comment says.
        Exception: whatever a Python block raises.
    """
    names: dict[str, Any] = {"__name__": "__main__"}
    runners: dict[str, Callable[[Block], None]] = {
        "python": lambda block: _run_python(block, names),
        "bash": _run_bash,
    }
    for block in read_blocks(page):
        print(f"--- {page.name}, line {block.line}: {block.not_run or 'running'}", flush=True)
        if block.not_run:
            _parse_block(block, checkout)
        elif block.language in runners:
            runners[block.language](block)


def _parse_block(block: Block, checkout: Path) -> None:
    if block.language == "python":
        ast.parse(block.code)
    elif block.language == "bash" and not block.code.startswith("#!"):
        for words in shell_commands(block.code):
            parse_command(words, checkout)


def _run_python(block: Block, names: dict[str, Any]) -> None:
    lines = block.code.splitlines()
    for node in ast.parse(block.code).body:
        if isinstance(node, ast.Expr):
            value = eval(compile(ast.Expression(node.value), f"line {block.line}", "eval"), names)
            _check_value(value, lines[node.end_lineno - 1])
        else:
            exec(compile(ast.Module([node], []), f"line {block.line}", "exec"), names)


def _check_value(value: Any, line: str) -> None:
    """Compare with the literal in the comment behind a line, if there is one."""
    try:
        expected = ast.literal_eval(line.rpartition("  # ")[2])
    except (SyntaxError, ValueError):
        return
    assert type(expected)(value) == expected, f"{line!r} gives {value!r}"


def _run_bash(block: Block) -> None:
    for words in shell_commands(block.code):
        arguments = nats_arguments(words)
        assert arguments is not None, f"line {block.line}: not a nats command, and not marked as not run: {words}"
        small = SMALL.get(arguments[0], [])
        print("$", shlex.join(words), flush=True)
        if words[0] == "nats":
            _run_nats([*arguments, *small])
        else:
            subprocess.run(["env", *words, *small], check=True)


def _run_nats(arguments: list[str]) -> None:
    from accelerate.state import AcceleratorState

    from nats_zoo.cli import main

    AcceleratorState._reset_state(reset_partial_state=True)  # each command is a process of its own for a reader
    errors = io.StringIO()
    with contextlib.redirect_stderr(errors):
        code = main(arguments)
    assert code == 0, f"exit code {code}: {errors.getvalue()[-2000:]}"


def main() -> None:
    parser = argparse.ArgumentParser(description="Run the code blocks of a Markdown page in the current folder.")
    parser.add_argument("page", type=Path)
    parser.add_argument("--checkout", type=Path, required=True, help="root of the repository")
    args = parser.parse_args()
    try:
        run_page(args.page, args.checkout)
    except Exception:
        traceback.print_exc()
        sys.exit(1)


if __name__ == "__main__":
    main()
