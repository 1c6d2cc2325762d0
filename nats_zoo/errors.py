"""Errors that mean 'the input is wrong', as opposed to 'the program is wrong'."""


class NatsError(ValueError):
    """Bad input: a file, an option or a folder that can not be used.

    The message is one line that names the file, the key and what was expected. The `nats` command prints it on
    stderr and ends with exit code 2.
    """


class GenotypeError(NatsError):
    """A genotype that is malformed or does not fit the network it is applied to."""


def one_line(error: Exception) -> str:
    """What an error says, without line breaks, to be quoted in a NatsError."""
    return " ".join(str(error).split())
