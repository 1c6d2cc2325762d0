"""Errors that mean 'the input is wrong', as opposed to 'the program is wrong'."""

import re
import reprlib
from typing import Any


class NatsError(ValueError):
    """Bad input: a file, an option or a folder that can not be used.

    The message is one line that names the file, the key and what was expected. The `nats` command prints it on
    stderr and ends with exit code 2.
    """


class Interrupted(Exception):
    """A run was asked to stop and did, behind a checkpoint."""


class GenotypeError(NatsError):
    """A genotype that is malformed or does not fit the network it is applied to."""


def one_line(error: BaseException | str) -> str:
    """What an error, or a text, says, without line breaks and secrets, to be quoted in a NatsError."""
    return " ".join(redact(str(error)).split())


def redact(text: str) -> str:
    """Text without what looks like an access token of the Hub, or a user's name and password in an address."""
    return _CREDENTIALS.sub(r"\1***@", _TOKEN.sub("hf_***", text))


def short(value: Any) -> str:
    """A value as messages quote it: at most some 70 characters of Python's notation, however large or deep it is."""
    text = _REPR.repr(value)
    return text if len(text) <= 70 else f"{text[:67]}..."


_TOKEN = re.compile(r"hf_(?:oauth_|jwt_)?[A-Za-z0-9]{8}[A-Za-z0-9._-]*")
_CREDENTIALS = re.compile(r"(\b[A-Za-z][A-Za-z0-9+.-]{0,20}://)[^\s/@]+@")
_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxother = _REPR.maxlong = 60
