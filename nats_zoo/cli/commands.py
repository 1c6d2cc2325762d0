"""The `nats` command: the table of its subcommands, which their modules hold, and what all of them share.

Only the chosen subcommand's packages are imported, so that `nats --help` stays as cheap as `import nats_zoo`.
"""

import io
import os
import sys
from collections.abc import Sequence

from ..base.errors import Interrupted, NatsError, redact
from . import detection, exchange, search, start, zoo
from .command import Command

COMMANDS: dict[str, Command] = {}
for _group in (zoo, search, detection, exchange, start):
    COMMANDS |= _group.COMMANDS
BAD_INPUT = 2
INTERRUPTED = 130  # what shells report for Ctrl-C
OUTPUT_CLOSED = 141  # what they report for a command whose reader has gone


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code: 0, 2 for bad input, 130 when interrupted, 141 when nobody reads on."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # names that a Windows code page lacks are no reason to end
            stream.reconfigure(errors="backslashreplace")
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_overview())
        return 0
    if arguments[0] == "--version":
        from ..version import __version__

        print(f"nats-zoo {__version__}")
        return 0
    if arguments[0] not in COMMANDS:
        return _fail(f"{arguments[0]}: no such command, expected one of {', '.join(COMMANDS)}")
    return _run(arguments[0], arguments[1:])


def _overview() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {command.summary}" for name, command in COMMANDS.items()]
    return "\n".join(
        [
            "usage: nats COMMAND [options]",
            "",
            "Detection backbones whose dilations were searched channel by channel.",
            "",
            *lines,
            "",
            "nats COMMAND --help shows a command's options; each can also come from a YAML file, --config FILE.",
            "search, train and evaluate use several devices or machines as: accelerate launch -m nats_zoo COMMAND ...",
        ]
    )


def _run(name: str, arguments: list[str]) -> int:
    from ..detection.runs.processes import end_process, is_one_of_several

    code = _run_command(name, arguments)
    if is_one_of_several():
        end_process(code)
    return code


def _run_command(name: str, arguments: list[str]) -> int:
    from jsonargparse import ArgumentError, ArgumentParser

    from ..detection.runs.processes import is_lost_process, lost_process_line

    parser = ArgumentParser(prog=f"nats {name}", description=COMMANDS[name].summary, exit_on_error=False)
    parser.add_argument("--config", action="config", help="YAML file with any of the options below")
    run = COMMANDS[name].build(parser)
    try:
        options = parser.instantiate(parser.parse_args(arguments))
        options.pop("config", None)
        run(options)
        sys.stdout.flush()
    except ArgumentError as error:
        return _fail(f"{name}: {error}; see nats {name} --help")
    except RuntimeError as error:
        if not is_lost_process(error):
            raise
        return _fail(lost_process_line())
    except BrokenPipeError:  # of the output, as in `nats list | head`; the Hub's client has errors of its own
        return _end_output()
    except (NatsError, OSError) as error:  # OSError: a folder that can not be written, a full disk
        return _fail(str(error))
    except (Interrupted, KeyboardInterrupt) as stop:
        print(f"nats: {str(stop) or 'interrupted'}", file=sys.stderr)
        return INTERRUPTED
    return 0


def _end_output() -> int:
    """Print nothing more: Python would complain at its end of what nobody has read."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return OUTPUT_CLOSED


def _fail(message: str) -> int:
    print(f"nats: {' '.join(redact(message).split())}", file=sys.stderr)
    return BAD_INPUT
