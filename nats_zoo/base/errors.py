"""Errors that mean 'the input is wrong', as opposed to 'the program is wrong'."""

import re
import reprlib
from typing import Any


class NatsError(ValueError):
    """Bad input: a file, an option or a folder that can not be used.

    The message is one line that names the file, the key and what was expected. The `nats` command prints it on
    stderr and ends with exit code 2.

        >>> raise NatsError("runs/a/run.json: lr: expected a number, found 'fast'")
        Traceback (most recent call last):
        nats_zoo.base.errors.NatsError: runs/a/run.json: lr: expected a number, found 'fast'
    """


class Interrupted(Exception):
    """A run was asked to stop and did, behind a checkpoint.

    try:
        trainer.run()
    except Interrupted as stopped:
        print(stopped)  # says how to go on
    """


class GenotypeError(NatsError):
    """A genotype that is malformed or does not fit the network it is applied to.

    try:
        genotype = Genotype.load("mine.json")
    except GenotypeError as error:
        print(error)  # the file, the convolution and what was expected
    """


def one_line(error: BaseException | str) -> str:
    """Quote what an error, or a text, says in a NatsError: without line breaks and secrets.

    >>> one_line(ValueError("two\\nlines"))
    'two lines'
    """
    return " ".join(redact(str(error)).split())


def redact(text: str) -> str:
    """Hide what looks like an access token of the Hub, or a user's name and password in an address.

    >>> redact("https://me:secret@example.org")
    'https://***@example.org'
    """
    return _CREDENTIALS.sub(r"\1***@", _TOKEN.sub("hf_***", text))


def short(value: Any) -> str:
    """Quote a value in a message: at most some 70 characters of Python's notation, however large or deep it is.

    >>> short("3"), short(list(range(1000)))
    ("'3'", '[0, 1, 2, 3, 4, 5, ...]')
    """
    text = _REPR.repr(value)
    return text if len(text) <= 70 else f"{text[:67]}..."


_TOKEN = re.compile(r"hf_(?:oauth_|jwt_)?[A-Za-z0-9]{8}[A-Za-z0-9._-]*")
_CREDENTIALS = re.compile(r"(\b[A-Za-z][A-Za-z0-9+.-]{0,20}://)[^\s/@]+@")
_REPR = reprlib.Repr()
_REPR.maxother = _REPR.maxlong = 60
_REPR.maxstring = 66  # a sha256 in quotes is whole
