"""The recipes that come with the package: YAML files for `--config`, headed by the commands that they are for."""

import itertools
import re
from pathlib import Path

from ..base.errors import NatsError
from ..base.files import write_text

SUFFIX = ".yaml"
FOLDER = "recipes"  # as the commands at the recipes' heads have it
_PACKAGE = Path(__file__).parents[1]


def recipe_names() -> list[str]:
    """Names of the recipes, sorted."""
    return sorted(file.stem for file in _folder().glob(f"*{SUFFIX}"))


def read_recipe(name: str) -> str:
    """A recipe's text; NatsError lists the names if there is none of this one."""
    names = recipe_names()
    if name not in names:
        raise NatsError(f"recipe {name!r}: no such recipe, expected one of {', '.join(names)}")
    return (_folder() / f"{name}{SUFFIX}").read_text(encoding="utf-8")


def recipe_head(text: str) -> str:
    """The comment that a recipe begins with, without the number signs."""
    lines = itertools.takewhile(lambda line: line.startswith("#"), text.splitlines())
    return "\n".join(line[1:].strip() for line in lines)


def recipe_title(text: str) -> str:
    """What a recipe's head begins with, up to a full stop, colon or parenthesis, on one line."""
    return re.split(r"[.:]\s| \(", " ".join(recipe_head(text).split()), maxsplit=1)[0]


def copy_recipe(name: str, folder: str | Path = FOLDER) -> Path:
    """Write a recipe into a folder, which is created.

    Returns:
        The file, FOLDER/NAME.yaml.

    Raises:
        NatsError: no such recipe, or a file of that name with other contents.
    """
    text = read_recipe(name)
    target = Path(folder) / f"{name}{SUFFIX}"
    if target.exists() and target.read_text(encoding="utf-8") != text:
        raise NatsError(f"{target}: differs from the recipe; rename it, or copy to another folder, with --output")
    target.parent.mkdir(parents=True, exist_ok=True)
    write_text(target, text)
    return target


def _folder() -> Path:
    """Where the wheel has the recipes; in a checkout they lie beside the package."""
    installed = _PACKAGE / FOLDER
    return installed if installed.is_dir() else _PACKAGE.parent / FOLDER
