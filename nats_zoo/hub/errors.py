"""What the Hub's client raises, as one line for people; and which calls are tried again, after how long."""

import json
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime, timezone
from email.utils import parsedate_to_datetime
from typing import Any, TypeVar

from huggingface_hub import constants
from huggingface_hub.errors import (
    FileMetadataError,
    GatedRepoError,
    HTTPError,  # base of what the HTTP library below raises, whichever that is in the installed version
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from ..base.errors import NatsError, one_line
from ..version import __version__

LIBRARY: dict[str, Any] = {"library_name": "nats-zoo", "library_version": __version__}

LOGIN = "run `hf auth login` or set HF_TOKEN"
TRIES = 4
PATIENCE = 20.0  # seconds that tries may have taken for another to begin; the client tries some calls again by itself
LONGEST_WAIT = 60.0  # seconds; a Hub that asks for more is not waited for
BUSY = (408, 429, 500, 502, 503, 504)
NOT_CARRIED_OUT = (429,)  # of these, what says for sure that the call had no effect
_CUTS = ("ChunkedEncodingError", "RemoteProtocolError")  # of a body that ended too early: requests', httpx's
_WRONG_SIZE = re.compile(r"should be of size (\d+) but has size (\d+)")  # the client's words
_HTTP_LIBRARIES = ("httpx", "httpx2", "requests", "urllib3")

CLIENT_ERRORS = (HTTPError, OSError, ValueError, RuntimeError)  # what the Hub's client raises

Result = TypeVar("Result")


@contextmanager
def hub_errors(what: str, revision: str | None) -> Iterator[None]:
    """Turn what the Hub's client raises into one line that begins with `what`.

    Example:
        >>> with hub_errors("org/name: not listed", None):
        ...     refs = HfApi().list_repo_refs("org/name")
    """
    try:
        yield
    except NatsError:
        raise
    except CLIENT_ERRORS as error:
        raise NatsError(f"{what}: {explain(error, revision)}") from error


def retried(what: str, call: Callable[[], Result], statuses: Sequence[int] = BUSY) -> Result:
    """Make a call that may be repeated; while the Hub is busy or fails it is made again, after a wait.

    Waits as long as the Hub asks for (`Retry-After`), else 1, 2 and 4 seconds, and says so on stderr.

    Args:
        what: begins that line.
        call: changes nothing, or nothing further when it is repeated after an answer of these statuses.
        statuses: of answers after which it is made again.

    Returns:
        What the call returned.

    Raises:
        Exception: what the last try raised.

    Example:
        >>> refs = retried("org/name", partial(HfApi().list_repo_refs, "org/name"))
    """
    waited, began = 0.0, time.monotonic()
    for attempt in range(1, TRIES + 1):
        try:
            return call()
        except Exception as error:
            wait = _wait_after(error, attempt, statuses)
            if wait is None or attempt == TRIES or time.monotonic() - began - waited > PATIENCE:
                raise
            print(f"{what}: {explain(error, None)}; trying again in {wait:g} s", file=sys.stderr)
            time.sleep(wait)
            waited += wait
    raise AssertionError("unreachable")


def _wait_after(error: BaseException, attempt: int, statuses: Sequence[int]) -> float | None:
    """Count the seconds until the next try; None: there is no use in one."""
    if type(error).__name__ == _CUTS[0] and statuses is BUSY:  # a cut body, which older clients do not take up again
        return 1.0
    response = _response(error)
    # What comes before a commit has no effect without one; older clients give up there.
    is_of_upload = "/info/lfs/" in str(getattr(response, "url", ""))
    if response is None or response.status_code not in (BUSY if is_of_upload else statuses):
        return None
    asked = _retry_after(response)
    wait = 2.0 ** (attempt - 1) if asked is None else asked
    return wait if wait <= LONGEST_WAIT else None


def _retry_after(response: Any) -> float | None:
    """Read how many seconds the Hub asks to wait; it may give them, or a date."""
    text = response.headers.get("Retry-After", "").strip()
    if text.isdigit():
        return float(text)
    try:
        date = parsedate_to_datetime(text)
    except ValueError:
        return None
    if date.tzinfo is None:
        return None
    return max(0.0, (date - datetime.now(timezone.utc)).total_seconds())


def explain(error: BaseException, revision: str | None) -> str:
    """Say what an error of the Hub's client means to a user.

    Example:
        >>> explain(TimeoutError(), None)
        'the Hub did not answer in time (see HF_HUB_ETAG_TIMEOUT and HF_HUB_DOWNLOAD_TIMEOUT)'
    """
    cause, response = error.__cause__, getattr(error, "response", None)
    if isinstance(error, LocalEntryNotFoundError) and cause is not None:
        refused = status(cause) not in (None, *BUSY)
        return explain(cause, revision) + ("" if refused else ", and it is not in the cache")
    if isinstance(error, RuntimeError) and cause is not None and not _is_network_error(error):
        return explain(cause, revision)
    return _explain_silence(error) if response is None else _explain_answer(error, response, revision)


def _explain_silence(error: BaseException) -> str:
    """Explain an error that is about no answer of a Hub."""
    size = _WRONG_SIZE.search(str(error))
    is_timeout = isinstance(error, TimeoutError) or (_is_network_error(error) and "Timeout" in type(error).__name__)
    reasons = (
        (isinstance(error, OfflineModeIsEnabled), "the Hub can not be reached (HF_HUB_OFFLINE is set)"),
        (
            isinstance(error, FileMetadataError | json.JSONDecodeError),
            f"what answers at {constants.ENDPOINT} is not a Hub: check HF_ENDPOINT, the proxy and the firewall",
        ),
        (is_timeout, "the Hub did not answer in time (see HF_HUB_ETAG_TIMEOUT and HF_HUB_DOWNLOAD_TIMEOUT)"),
        (type(error).__name__ in _CUTS, "the connection was cut"),
        (
            size is not None,
            f"{size[2]} bytes came instead of {size[1]}, a proxy's error page?; try again" if size else "",
        ),
        (_is_network_error(error), f"the Hub can not be reached ({one_line(error)})"),
    )
    return _first(reasons, error)


def _first(reasons: Iterable[tuple[bool, str]], error: BaseException) -> str:
    return next((reason for applies, reason in reasons if applies), one_line(error))


def _is_network_error(error: BaseException) -> bool:
    """Tell whether the HTTP library raised it, or something of its kind."""
    libraries = (kind.__module__.partition(".")[0] for kind in type(error).__mro__)
    return any(library in _HTTP_LIBRARIES for library in libraries)


def status(error: BaseException) -> int | None:
    """Read the status of the answer that an error, or what caused it, is about; None: there was none.

    Example:
        >>> status(OSError("no answer")) is None
        True
    """
    return getattr(_response(error), "status_code", None)


def _response(error: BaseException) -> Any:
    """Find the answer that an error, or what caused it, is about; None: there was none."""
    response = getattr(error, "response", None)
    if response is None and error.__cause__ is not None:
        return _response(error.__cause__)
    return response


def _explain_answer(error: BaseException, response: Any, revision: str | None) -> str:
    """Explain an error status; only some Hubs send the header from which the client takes the error's class."""
    status, request = response.status_code, getattr(response, "request", None)
    has_token = request is not None and "authorization" in request.headers
    reads = request is not None and request.method in ("GET", "HEAD")
    ask = "ask for access on its page" + (" with the token's account" if has_token else f", then {LOGIN}")
    private = " and the token's account can not see it" if has_token else f": then {LOGIN}"
    asked = _retry_after(response)
    then = "" if asked is None else f", which asks to wait {asked:,.0f} s"
    named = "" if revision is None else f" or revision {revision!r}"
    reasons = (
        (isinstance(error, GatedRepoError), f"the repository is gated: {ask}"),
        (
            isinstance(error, RevisionNotFoundError),
            f"the repository has no revision {revision!r}, expected a branch, a tag or a commit",
        ),
        (
            isinstance(error, RepositoryNotFoundError) or (status == 401 and not has_token),
            f"no such repository, or it is private{private}",
        ),
        (status == 401, f"the token is not valid: {LOGIN}"),
        (status == 403 and reads, f"no access; if the repository is gated, {ask}"),
        (status == 403, "the token has no right to do this: use one with write access to the repository"),
        (status == 404, f"no such repository{named}, or it is private{private}"),
        (status == 429, f"too many requests for the Hub (429){then}"),
        (status in BUSY, f"the Hub failed with status {status}{then}"),
    )
    return _first(reasons, error)
