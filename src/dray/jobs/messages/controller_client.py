"""The one place from which the controller is called over HTTP.

Every call has one bound over everything: connecting, sending, a peer that trickles or hangs, and retries.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import json
import selectors
import signal
import threading
from collections.abc import AsyncIterator, Coroutine
from pathlib import Path
from typing import Any, Self, TypeVar

import httpcore
from pydantic import ValidationError

from dray.clock import Deadline, retry_pauses
from dray.errors import ControlPlaneError
from dray.files import read_private_file
from dray.forking import descriptor_not_inherited, not_inherited
from dray.jobs.messages import models
from dray.jobs.messages.models import MembershipError, RecordingRefusedError
from dray.jobs.messages.view import JobView, NewPageToken, PageToken
from dray.resources import Closing

KEEP_ALIVE = 30.0
"""Seconds for which the controller keeps an idle connection; clients give one up well before."""

_LATE = 0.5
"""A call that ends so many seconds after its deadline was not waiting: its process did not run."""

_TRANSPORT_ERRORS = (httpcore.NetworkError, httpcore.ProtocolError, httpcore.TimeoutException)


class _ConnectionRefused(httpcore.ConnectError):
    """Nothing listens at the address."""


class _Network(httpcore.AnyIOBackend):
    """Connects; the connections are not those of forked children."""

    async def connect_tcp(self, *args: Any, **options: Any) -> httpcore.AsyncNetworkStream:
        try:
            stream = await super().connect_tcp(*args, **options)
        except httpcore.ConnectError as error:
            if _is_refusal(error):  # the pool of connections drops the cause
                raise _ConnectionRefused from error
            raise
        return descriptor_not_inherited(stream, _descriptor)


def _descriptor(stream: httpcore.AsyncNetworkStream) -> int:
    connected = stream.get_extra_info("socket")
    return -1 if connected is None else int(connected.fileno())


_Reply = TypeVar("_Reply", bound=models.Message)
_Result = TypeVar("_Result")


class ControllerLostError(ControlPlaneError):
    """The controller did not answer in time, retries included."""

    retryable = True


class ControllerClient(Closing):
    """Calls to one controller, safe to use from several threads.

    Args:
        url: e.g. ``"http://127.0.0.1:40000"``.
        token: the job's token.
        timeout: seconds that a call may take in all.
        hurried: the same once the process is about to end.

    Attributes:
        refused: whether the last connection was refused: the controller is gone, as it listens from before it is
            started until it ends.
    """

    def __init__(self, url: str, token: str, timeout: float, *, hurried: float = 1.0) -> None:
        self.url = url
        self._timeout = timeout
        self._hurried = hurried
        self._loop = asyncio.SelectorEventLoop(not_inherited(selectors.EpollSelector()))
        self._headers: dict[bytes | str, bytes | str] = {"Authorization": f"Bearer {token}"}
        self._pool = httpcore.AsyncConnectionPool(keepalive_expiry=KEEP_ALIVE / 2, network_backend=_Network())
        self._thread = threading.Thread(target=self._run_loop, name="controller-client", daemon=True)
        self._thread.start()
        self._closed = False
        self._bounds: set[asyncio.Timeout] = set()
        self._hurry = asyncio.Event()
        self.refused = False

    @classmethod
    def of_address_file(cls, path: Path, token: str, timeout: float, *, hurried: float = 1.0) -> Self:
        """A client for the controller that advertised itself in the file at `path`."""
        url = json.loads(read_private_file(path, "the controller's address"))["url"]
        return cls(url, token, timeout, hurried=hurried)

    def post(self, path: str, body: models.Message, reply: type[_Reply], timeout: float | None = None) -> _Reply:
        """Send `body` and return the answer; repeated after transport failures.

        Raises:
            ControllerLostError: no answer within `timeout` seconds (by default the client's).
            MembershipError: the controller does not count the caller as a member.
            RecordingRefusedError: the job cannot be recorded, or not now.
            ControlPlaneError: any other refusal.
        """
        deadline = Deadline.after(self._timeout if timeout is None else timeout)
        return self._run(self._request("POST", path, body.model_dump_json().encode(), reply, deadline))

    def status(self) -> models.Status:
        """The job's status; raises as `post` does."""
        return self._run(self._request("GET", "/status", None, models.Status, Deadline.after(self._timeout)))

    def view(self, seen: int = -1) -> JobView:
        """What the page shows: as soon as its number is above `seen`, and otherwise after `MAX_VIEW_WAIT` seconds.

        Raises as `post` does.
        """
        return self._run(self._request("GET", f"/view?seen={seen}", None, JobView, Deadline.after(self._timeout)))

    def page_url(self) -> str:
        """A URL that opens the job's page, once; raises as `post` does."""
        return f"{self.url}/?token={self.post('/page-tokens', NewPageToken(), PageToken).token}"

    def hurry(self) -> None:
        """The process is about to end: from now on, and for calls under way, wait at most the `hurried` seconds,
        and not at all for a controller that is gone."""
        if not self._closed:
            self._loop.call_soon_threadsafe(self._begin_hurry)

    def close(self) -> None:
        """Close the connections; calls under way in other threads fail."""
        if self._closed:
            return
        self._closed = True
        self._run(self._end_calls())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _run_loop(self) -> None:
        # Where user code has restored SIGPIPE, a controller that is gone must not end the process.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGPIPE})
        self._loop.run_forever()

    def _run(self, coroutine: Coroutine[Any, Any, _Result]) -> _Result:
        future = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        try:
            return future.result()
        except concurrent.futures.CancelledError as error:
            raise ControllerLostError("the client of the controller was closed", endpoint=self.url) from error

    async def _request(
        self, method: str, path: str, body: bytes | None, reply: type[_Reply], deadline: Deadline
    ) -> _Reply:
        try:
            try:
                return await self._attempts(method, path, body, reply, deadline)
            except TimeoutError:
                if deadline.now() - deadline.at < _LATE:
                    raise
            # User code held the interpreter, or the process was stopped: the controller may well have answered.
            return await self._attempts(method, path, body, reply, Deadline.after(self._hurried))
        except TimeoutError as error:
            message = f"the controller did not answer {method} {path}"
            raise ControllerLostError(message, endpoint=self.url, elapsed=deadline.elapsed) from error

    async def _attempts(
        self, method: str, path: str, body: bytes | None, reply: type[_Reply], deadline: Deadline
    ) -> _Reply:
        pauses = retry_pauses()
        async with self._bounded(deadline):
            while True:
                try:
                    response = await self._pool.request(
                        method, self.url + path, headers=self._headers, content=body
                    )
                except _TRANSPORT_ERRORS as error:
                    self.refused = isinstance(error, _ConnectionRefused)
                    if self.refused and self._hurry.is_set():
                        message = f"the controller is gone: it refused the connection for {method} {path}"
                        raise ControllerLostError(message, endpoint=self.url) from error
                else:
                    self.refused = False
                    if response.status < 500:
                        return _parsed(response, reply, self.url + path)
                await self._pause(next(pauses))

    async def _pause(self, seconds: float) -> None:
        """Wait before the next attempt; the first of a hurry comes at once."""
        if self._hurry.is_set():
            await asyncio.sleep(seconds)
            return
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._hurry.wait()

    @contextlib.asynccontextmanager
    async def _bounded(self, deadline: Deadline) -> AsyncIterator[None]:
        async with asyncio.timeout(deadline.timeout) as bound:
            self._bounds.add(bound)
            try:
                if self._hurry.is_set():
                    self._shorten()
                yield
            finally:
                self._bounds.discard(bound)

    def _begin_hurry(self) -> None:
        self._hurry.set()
        self._shorten()

    def _shorten(self) -> None:
        latest = self._loop.time() + self._hurried
        for bound in self._bounds:
            when = bound.when()
            if not bound.expired() and (when is None or when > latest):
                bound.reschedule(latest)

    async def _end_calls(self) -> None:
        others = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        await self._pool.aclose()


def _is_refusal(error: BaseException | None) -> bool:
    """Whether connecting failed because nothing listens at the address, by what `error` was raised from."""
    while error is not None and not isinstance(error, ConnectionRefusedError | BaseExceptionGroup):
        error = error.__cause__
    if isinstance(error, BaseExceptionGroup):
        return all(_is_refusal(each) for each in error.exceptions)
    return error is not None


def _parsed(response: httpcore.Response, reply: type[_Reply], url: str) -> _Reply:
    try:
        if response.status == 200:
            return reply.model_validate_json(response.content)
        refusal = models.ErrorReply.model_validate_json(response.content)
    except ValidationError as error:
        message = f"what answers with HTTP {response.status} is not a controller of this version"
        raise ControlPlaneError(message, endpoint=url) from error
    if refusal.error == "not a member":
        raise MembershipError(refusal.detail)
    if refusal.error == "recording refused":
        raise RecordingRefusedError(refusal.detail)
    raise ControlPlaneError(f"the controller refuses: {refusal.error} {refusal.detail}", endpoint=url)
