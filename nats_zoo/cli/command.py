"""What a subcommand is: a function of nats_zoo whose parameters are the options and whose docstring is their help."""

import importlib
import inspect
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..base.errors import redact


def print_result(function: Callable[..., Any], options: dict[str, Any]) -> None:
    """Call the function and print what it returns, if anything."""
    result = function(**options)
    if result is not None:
        print(result)


def print_with_file(what: str) -> Callable[[Callable[..., Any], dict[str, Any]], None]:
    """Call the function, which returns what it made and the file that it wrote, and print both."""

    def run(function: Callable[..., Any], options: dict[str, Any]) -> None:
        made, path = function(**options)
        print(f"{made}\n\n{what}: {path}")

    return run


@dataclass(frozen=True)
class Command:
    """A subcommand. To add one: a function, and a line in its group's table.

    Attributes:
        summary: its line in the help.
        function: MODULE:NAME in nats_zoo, imported when the command is chosen. Parameters without a default are
            positional. Of a class, the parameters of its constructor are the options, all with two dashes.
        run: is called with the function and the options.
        words: parameters that take several words, where a list would have to be typed as [one,two].
        defaults: of options, where they are not the function's.
        skip: parameters that are no options.
        more: options (`-s --long`: one with a short name) that are no parameters as they stand, with what argparse's
            add_argument takes for each; `run` takes them out where the function has none of the name.
    """

    summary: str
    function: str
    run: Callable[[Any, dict[str, Any]], None] = print_result
    words: Sequence[str] = ()
    defaults: Mapping[str, Any] = field(default_factory=dict)
    skip: Sequence[str] = ()
    more: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def build(self, parser: Any) -> Callable[[Any], None]:
        """Give a parser of jsonargparse the options; returns what runs the command with the parsed ones."""
        module, _, name = self.function.partition(":")
        function = getattr(importlib.import_module(f"nats_zoo.{module}"), name)
        skip = {*self.words, *self.skip}
        if inspect.isclass(function):
            parser.add_class_arguments(function, as_group=False, skip=skip)
        else:
            parser.add_function_arguments(function, as_group=False, as_positional=True, skip=skip)
        for option, settings in self.more.items():
            parser.add_argument(*option.split(), **settings)
        for option in self.words:
            _add_words(parser, function, option)
        parser.set_defaults(dict(self.defaults))
        for action in parser._actions:
            if action.option_strings and getattr(action, "_typehint", None) in (bool, bool | None):
                action.nargs, action.const = "?", True  # `--fixed` stands for `--fixed true`
        return lambda options: self.run(function, options.as_dict())


def _add_words(parser: Any, function: Callable[..., Any], name: str) -> None:
    from docstring_parser import parse

    default = inspect.signature(function).parameters[name].default
    help = next(each.description for each in parse(inspect.getdoc(function) or "").params if each.arg_name == name)
    if default is inspect.Parameter.empty:
        parser.add_argument(name, nargs="+", type=str, help=help)
    elif default is None:
        parser.add_argument(f"--{name}", nargs="+", type=str, help=help)
    else:
        parser.add_argument(name, nargs="*", default=list(default), type=str, help=help)


def print_once(text: str) -> None:
    """Print from one process per machine; all of them come here."""
    from accelerate import PartialState

    PartialState().print(text)


def typed_command() -> str:
    """The command line, for files and model cards, without secrets."""
    return redact(shlex.join(["nats", *sys.argv[1:]]))
