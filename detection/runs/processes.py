"""Several processes of one run, and how the others end when one of them does."""

import multiprocessing
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, NoReturn

from torch import distributed

from ...base.errors import NatsError

if TYPE_CHECKING:
    from accelerate.utils import InitProcessGroupKwargs

TIMEOUT = timedelta(minutes=15)  # for another process: longer than the main one's downloads, as a rule
LAUNCHER_PATIENCE = 25.0  # seconds between a launcher's SIGTERM and our own end; it sends SIGKILL after 30
BAD_EXIT = 2


class LostProcess(NatsError):
    """Another process of the run ended, or does not answer any more."""


def process_group() -> "InitProcessGroupKwargs":
    """What the accelerator's process group is begun with."""
    from accelerate.utils import InitProcessGroupKwargs  # every command imports this module

    return InitProcessGroupKwargs(timeout=TIMEOUT)


def has_launcher() -> bool:
    """Whether torchrun or `accelerate launch` started this process, among others, and ends it when it must."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def is_one_of_several() -> bool:
    """Whether this process is in a group with others."""
    return distributed.is_available() and distributed.is_initialized()


def is_lost_process(error: Exception) -> bool:
    """Whether an error is how the exchange with another process fails when that one is gone or silent."""
    if not is_one_of_several():
        return False
    return isinstance(error, distributed.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))


def lost_process_line(what_next: str = "what it wrote says why") -> str:
    """What to say then."""
    return f"another process of the run ended, or no longer answers; {what_next}"


@contextmanager
def lost_process_told(what_next: Callable[[], str]) -> Iterator[None]:
    """Turn the failed exchange with a process that is gone into LostProcess.

    Args:
        what_next: gives the end of its message: what is left and how to go on.
    """
    try:
        yield
    except RuntimeError as error:
        if not is_lost_process(error):
            raise
        raise LostProcess(lost_process_line(what_next())) from error


@contextmanager
def ended_with_launcher(what_next: Callable[[], str]) -> Iterator[None]:
    """End this process when its launcher asks for it (SIGTERM) while it waits in vain for another one.

    Python's signal handlers have to wait until an exchange returns, which may be never; the thread that is started
    here does not. Where no launcher would end the process anyhow, there is none.

    Args:
        what_next: as for `lost_process_told`.
    """
    if not has_launcher() or threading.current_thread() is not threading.main_thread():
        yield
        return
    reader, writer = socket.socketpair()
    writer.setblocking(False)
    before = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
    left = threading.Event()
    threading.Thread(target=_wait_for_signal, args=(reader, left, what_next), daemon=True).start()
    try:
        yield
    finally:
        left.set()
        signal.set_wakeup_fd(before)
        writer.close()


def _wait_for_signal(reader: socket.socket, left: threading.Event, what_next: Callable[[], str]) -> None:
    with reader:
        while number := reader.recv(1):
            if number[0] == signal.SIGTERM and not left.wait(LAUNCHER_PATIENCE):
                print(f"\nnats: {lost_process_line(what_next())}", file=sys.stderr)
                end_process(BAD_EXIT)


def end_process(code: int) -> NoReturn:
    """End this process at once: to take down a group takes seconds, and hangs where one of its processes is gone."""
    sys.stdout.flush()
    sys.stderr.flush()
    for worker in multiprocessing.active_children():  # that load data
        worker.terminate()
    os._exit(code)
