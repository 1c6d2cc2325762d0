"""Reading a run's log: JSONL, one record per line, with the `step` and `epoch` that it was logged at.

`null` counts as absent. A last line that was torn, by a process killed while it wrote, is left out. A resumed run may
have logged steps again: of a key's records at one step the last one counts.
"""

import json
import math
import os
from collections.abc import Iterable, Mapping
from typing import Any

from .errors import NatsError, short
from .files import MAX_LEVELS, TooLargeError, is_deeper, parse_json, read_limited

MAX_BYTES = 2**29  # of a log: millions of records

# Keys of any record whose value is a number, if there is one.
NUMBERS = (
    *("loss", "lr", "AP", "AP50", "AP75", "mask_AP", "alpha_loss", "entropy", "share_changed", "temperature"),
    *("trial", "changes", "predicted", "actual", "held_back_loss"),
)

Record = Mapping[str, Any]


def read_log(path: str | os.PathLike) -> list[Record]:
    """Read all records of a log, in its order, without the keys that are null.

        >>> read_log("runs/a/log.jsonl")[0]
        {'step': 10, 'epoch': 0.1, 'loss': 1.5}

    Raises:
        NatsError: a log that can not be read; or, with its number, a line that is no record, or where a key of NUMBERS
            holds something else.
    """
    try:
        content = read_limited(path, MAX_BYTES)
    except OSError as error:
        raise NatsError(f"{path}: can not be read as a log: {error.strerror}") from error
    except TooLargeError as error:
        raise NatsError(f"{path}: too large for a log, expected at most {MAX_BYTES} bytes") from error
    lines = content.split(b"\n")
    if not _is_json(lines[-1]):  # empty, as a rule: what follows the last line break
        lines.pop()
    return [_read_record(line, f"{path}: line {number}") for number, line in enumerate(lines, 1) if line.strip()]


def series(records: Iterable[Mapping[str, Any]], key: str) -> tuple[list[float], list[Any]]:
    """List epochs and values of the records that have a key, in order of their steps.

    >>> series([{"step": 1, "epoch": 0.5, "loss": 2.0}], "loss")
    ([0.5], [2.0])
    """
    ordered = latest(records, key)
    return [record["epoch"] for record in ordered], [record[key] for record in ordered]


def latest(records: Iterable[Record], key: str, *also: str) -> list[Record]:
    """List the records that have a key, in order of their steps; of those at one step, the last.

        >>> latest([{"step": 1, "AP": 3.0}, {"step": 1, "AP": 4.0}], "AP")
        [{'step': 1, 'AP': 4.0}]

    Args:
        records: of a log.
        key: null counts as absent.
        also: further keys which they must have; those that differ in one of these do not replace each other.
    """
    having = (record for record in records if keys_in(record, (key, *also)))
    found = {(record["step"], *(record[name] for name in also)): record for record in having}
    return [found[place] for place in sorted(found)]


def has_key(records: Iterable[Record], key: str) -> bool:
    """Tell whether any record has a key.

    >>> has_key([{"step": 1}], "AP")
    False
    """
    return any(key in record for record in records)


def keys_in(record: Mapping[str, Any], keys: Iterable[str]) -> bool:
    """Tell whether a record has all of the keys.

    >>> keys_in({"step": 1, "epoch": 0.5}, ("step", "epoch"))
    True
    """
    return all(key in record for key in keys)


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True


def _read_record(line: bytes, where: str) -> Record:
    record = parse_json(line, where, strict=False)
    if is_deeper(record, MAX_LEVELS):
        raise NatsError(f"{where}: nested too deeply, expected at most {MAX_LEVELS} levels")
    if not isinstance(record, dict) or not keys_in(record, ("step", "epoch")):
        raise NatsError(f"{where}: expected an object with the keys 'step' and 'epoch'")
    record = {key: value for key, value in record.items() if value is not None or key in ("step", "epoch")}
    for key in ("step", "epoch", *NUMBERS):
        if key in record and not _is_number(record[key]):
            raise NatsError(f"{where}: {key}: expected a number, found {short(record[key])}")
    if not math.isfinite(record["step"]) or not math.isfinite(record["epoch"]):
        raise NatsError(f"{where}: step, epoch: expected finite numbers")
    return record


def _is_number(value: Any) -> bool:
    """True is none, nor is an integer beyond the range of float; NaN is, as a diverged loss."""
    return type(value) is float or (type(value) is int and abs(value) < 2**1000)
