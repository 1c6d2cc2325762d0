"""The `nats` command, one module per group of commands.

Imports everything; nothing imports it.
"""

from .commands import main

__all__ = ["main"]
