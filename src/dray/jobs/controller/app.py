"""The controller: an HTTP service that knows who takes part in a job and which phase it is in.

One event loop owns all state, so a request sees the job at one moment. Decisions are in `state` and `work_queue`;
here is only what reaches them from outside: requests, the clock, signals.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import json
import logging
import signal
import socket
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import uvicorn
from fastapi import FastAPI, HTTPException, Request, Response
from fastapi.datastructures import Headers
from fastapi.exceptions import RequestValidationError
from fastapi.responses import PlainTextResponse

from dray import __version__
from dray.admission import ACCEPT_FAILURES, UNPROVEN_CLOSED
from dray.clock import MONOTONIC, Deadline, Stopwatch
from dray.counters import Counters
from dray.files import write_json
from dray.jobs.controller.listener import PROVEN, HttpServer
from dray.jobs.controller.metrics import MEDIA_TYPE, JobMetrics
from dray.jobs.controller.page import (
    FILES,
    HEADERS,
    TOKEN_SECONDS,
    VIEW,
    PageAccess,
    PageGate,
    is_page,
    page_file,
    unauthorised,
)
from dray.jobs.controller.recording import ANSWER_SECONDS, JobRecording
from dray.jobs.controller.stall import StallWatch, job_snapshot
from dray.jobs.controller.state import FIRST_POLICY, Membership, final_phase
from dray.jobs.controller.viewer import JobViewer
from dray.jobs.controller.work_queue import WorkQueue, work_item_seed
from dray.jobs.exit_codes import ExitCode
from dray.jobs.folder import JobFolder, JobSpec
from dray.jobs.log_files import LogFiles, LogLine
from dray.jobs.messages import models
from dray.jobs.messages.controller_client import KEEP_ALIVE
from dray.jobs.messages.models import MembershipError, Phase, RecordingRefusedError, Role
from dray.jobs.messages.view import MAX_LOG_LINES, MAX_VIEW_WAIT, JobView, NewPageToken, PageToken
from dray.jobs.process import begin_process, finish_process, set_log_level, shutdown_step

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

MAX_BODY = 4 << 20
HTTP_CLOSE_BOUND = 2
MAX_LOGS = 16  # of those that were written last, the page shows lines
_LOG = logging.getLogger("dray.jobs.controller.app")
_HEALTH = "/healthz"
_NOT_JSON = {"type": "json_invalid", "loc": ["body"], "msg": "JSON decode error"}
_SECURITY: dict[str, Any] = {"security": [{"token": []}]}
_NO_TELEMETRY: Any = {"tracing": False, "metrics": False, "logs": False, "auto_configure": False}

REFUSALS: dict[int | str, dict[str, Any]] = {
    401: {"model": models.ErrorReply, "description": "the token is missing or wrong"},
    409: {"model": models.ErrorReply, "description": "no member, or a recording that is refused"},
    413: {"model": models.ErrorReply, "description": "the body is too large"},
    422: {"model": models.ErrorReply, "description": "the body is malformed"},
}
"""Status codes other than 200, all with an `ErrorReply`."""

# --- controller --------------------------------------------------------------------------------------------------


class Controller:
    """The requests of one job, as methods; `application` is the ASGI application that serves them.

    Args:
        record: called with the status as soon as the outcome is decided: it must outlive the controller, whatever
            ends that.

    Attributes:
        connections: counts of those that have not shown the token.
    """

    def __init__(self, spec: JobSpec, record: Callable[[models.Status], None] | None = None) -> None:
        config = spec.config
        self._spec = spec
        self._running = Stopwatch()
        self._changed = asyncio.Condition()
        self._record = record
        self.membership = Membership(
            {Role.ROLLOUT: config.rollout.replicas, Role.POLICY: config.policy.replicas},
            WorkQueue(config.work_items_in_flight, spec.first_work_item, max_attempts=config.rollout.max_attempts),
            dead_after=config.controller.dead_after,
            start_timeout=config.timeouts.start,
            restartable=config.policy.restarts > 0,
            rollout_restarts=config.rollout.restarts,
            max_failures=config.rollout.max_failures,
        )
        self.connections = Counters(UNPROVEN_CLOSED, ACCEPT_FAILURES)
        self.final = asyncio.Event()
        self._stall = StallWatch(config.timeouts.stall)
        self._viewer = JobViewer(config)
        self._page = PageAccess()
        self._recording = JobRecording(config, self.membership)
        self.application = self._application()

    async def reap_until_final(self) -> None:
        """Let time act on the job, until its phase is final."""
        interval = min(1.0, self._spec.config.controller.heartbeat_interval, self._spec.config.timeouts.stall)
        while not self.final.is_set():
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self.final.wait(), interval)
            await self.reap_once()

    async def reap_once(self) -> None:
        """Let the time that has passed act on the job."""
        self.membership.reap()
        if self._stall.update(job_snapshot(self.membership, MONOTONIC.now(), self._running.elapsed)):
            assert self._stall.stall is not None
            _LOG.warning("stall: %s", self._stall.stall.line)
            self._viewer.note_stall(self._stall.stall.line, self._running.elapsed)
        self._viewer.sample(self.membership, self._running.elapsed)
        await self._after_event()

    async def interrupt(self, reason: str) -> None:
        """End the job whatever its members do."""
        self.membership.stop("interrupted", reason)
        await self._after_event()
        self.final.set()

    def status(self) -> models.Status:
        """The job as it is now."""
        membership, now = self.membership, MONOTONIC.now()
        return models.Status(
            job=self._spec.config.job.name,
            phase=membership.phase,
            seconds=self._running.elapsed,
            outcome=membership.outcome,
            work_items=membership.work_items.statistics(),
            stall=self._stall.stall,
            members=[
                models.MemberStatus(
                    name=each.name,
                    role=each.role,
                    state=each.state,
                    reason=each.reason,
                    pid=each.pid,
                    silence=now - each.last_request,
                    progress=each.progress,
                )
                for each in membership.members.values()
            ],
        )

    async def _after_event(self) -> None:
        membership = self.membership
        while membership.notices:
            _LOG.info("%s", membership.notices.pop(0))
        self._viewer.note_phase(membership)
        if membership.outcome is not None and self._record is not None:
            record, self._record = self._record, None
            record(self.status())
        if membership.phase.is_final:
            self.final.set()
        async with self._changed:
            self._changed.notify_all()

    def _application(self) -> FastAPI:
        application = FastAPI(
            title="dray controller",
            version=__version__,
            openapi_url=None,  # it would be served without the token
            docs_url=None,
            redoc_url=None,
            separate_input_output_schemas=False,
            strict_content_type=False,
            generate_unique_id_function=lambda route: route.name.lstrip("_"),
            exception_handlers={
                MembershipError: _not_a_member,
                RecordingRefusedError: _recording_refused,
                RequestValidationError: _malformed,
                400: _malformed,  # FastAPI's for a body that is not JSON
                413: _too_large,
            },
            telemetry=_NO_TELEMETRY,  # the environment must not decide where the figures of a job are sent
        )
        gate = PageGate(self._page, self._spec.config.controller.host)
        application.add_middleware(_TokenRequired, token=self._spec.token, gate=gate)
        get = partial(application.add_api_route, methods=["GET"])
        get(_HEALTH, self._healthz, summary="Whether the controller is alive.", response_class=PlainTextResponse)
        for path in FILES:
            get(path, partial(self._file, path), include_in_schema=False, name=path)
        get = partial(get, responses={401: REFUSALS[401]}, openapi_extra=_SECURITY)
        get("/openapi.json", self._openapi, summary="This interface as an OpenAPI document.")
        get("/status", self._status, summary="Phase, outcome, replicas with their progress, stalls.")
        numbers = "The same as numbers, for Prometheus."
        get(VIEW, self._view, summary="What the page shows: figures over time, replicas, the last reports.")
        get("/metrics", self._metrics, summary=numbers, response_class=PlainTextResponse)
        post = partial(application.add_api_route, methods=["POST"], responses=REFUSALS, openapi_extra=_SECURITY)
        post("/register", self._register, summary="A replica has started.")
        post("/heartbeat", self._heartbeat, summary="A replica is alive; its progress.")
        post("/work-items", self._work_items, summary="A rollout replica asks for work.")
        post("/under-way", self._under_way, summary="The policy asks which work items are unfinished.")
        post("/finish", self._finish, summary="The policy ends the job.")
        post("/unregister", self._unregister, summary="The last words of a replica.")
        post("/alive", self._alive, summary="The supervisor sees silent replicas run.")
        post("/died", self._died, summary="The supervisor saw a process end.")
        post("/recording", self._record_job, summary="Record what the job trains on.")
        post("/page-tokens", self._page_token, summary="A new one-time token that opens the page.")
        post("/stop", self._stop, summary="The supervisor ends the job early.")
        return application

    async def _wait_for_change(self, deadline: Deadline) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(deadline.timeout), self._changed:
                await self._changed.wait()

    def _directive(self) -> models.Directive:
        phase = self.membership.phase
        return models.Directive(
            phase=phase,
            stop=not phase.gives_work,
            readers=len(self.membership.active(Role.POLICY)),
            given_up=self.membership.work_items.given_up,
        )

    async def _changed_directive(self) -> models.Directive:
        await self._after_event()
        return self._directive()

    # --- endpoints -----------------------------------------------------------------------------------------------

    async def _healthz(self) -> str:
        return "ok\n"

    async def _openapi(self) -> dict[str, Any]:
        document = self.application.openapi()
        document["components"]["securitySchemes"] = {"token": {"type": "http", "scheme": "bearer"}}
        return document

    async def _status(self) -> models.Status:
        return self.status()

    async def _view(self, response: Response, seen: int = -1) -> JobView:
        """Answered at once, or, if the caller has seen the newest `number`, when there is a newer one."""
        response.headers.update(HEADERS)
        deadline = Deadline.after(MAX_VIEW_WAIT)
        while self._viewer.number <= seen and not self.final.is_set() and not deadline.expired:
            await self._wait_for_change(deadline)
        log_lines = await asyncio.to_thread(self._log_lines)  # requests are answered meanwhile
        return self._viewer.view(
            self.membership, self._stall.stall, self._running.elapsed,
            log_lines=log_lines, recording=self._recording.line(),
        )  # fmt: skip

    def _log_lines(self) -> list[LogLine]:
        return LogFiles(self._spec.folder.newest_logs, most=MAX_LOGS).last(MAX_LOG_LINES)

    async def _file(self, path: str) -> Response:
        return page_file(path)

    async def _page_token(self, _: NewPageToken) -> PageToken:
        return PageToken(token=self._page.new_token(), seconds=TOKEN_SECONDS)

    async def _metrics(self) -> Response:
        stalled = 0.0 if self._stall.stall is None else self._stall.stall.seconds
        metrics = JobMetrics(self._spec.config.job.name, self.membership, stalled, self.connections.snapshot())
        # Requests are answered meanwhile.
        return Response(await asyncio.to_thread(metrics.text), media_type=MEDIA_TYPE)

    async def _register(self, body: models.Register) -> models.Directive:
        self.membership.register(body.name, body.role, body.incarnation, body.pid)
        return await self._changed_directive()

    async def _heartbeat(self, body: models.Heartbeat) -> models.HeartbeatReply:
        self.membership.note_request(body.name, body.incarnation, body.progress)
        self.membership.work_items.finished(body.finished)
        self.membership.work_items.finished_parts(body.finished_parts)
        if body.name == FIRST_POLICY and body.progress.recording is not None:
            self._recording.note(body.progress.recording)
        directive = await self._changed_directive()
        deadline = Deadline.after(body.until_unread)
        while (directive.readers or not directive.stop) and not deadline.expired:
            await self._wait_for_change(deadline)
            directive = self._directive()
        order = self._recording.order() if body.name == FIRST_POLICY else None
        return models.HeartbeatReply(**directive.model_dump(), recording=order)

    async def _record_job(self, body: models.RecordingOrder) -> models.RecordingState:
        """Answered as soon as the recording has ended, and otherwise after a while: then the caller asks again."""
        self._recording.follow(body)
        deadline = Deadline.after(ANSWER_SECONDS)
        while not (state := self._recording.state()).ended and not deadline.expired:
            await self._wait_for_change(deadline)
        return state

    async def _work_items(self, body: models.TakeWork) -> models.WorkList:
        membership, work_items = self.membership, self.membership.work_items
        membership.note_request(body.name, body.incarnation)
        work_items.published(body.name, body.published)
        if body.failed:
            membership.failed(body.name, body.failed)
            await self._after_event()
        deadline = Deadline.after(body.wait)
        taken: list[int] = []
        while membership.phase.gives_work:
            others = [each.name for each in membership.active(Role.ROLLOUT) if each.name != body.name]
            taken = work_items.assign(body.name, body.want, working=body.working, others=others)
            if taken or deadline.expired:
                break
            await self._wait_for_change(deadline)
            membership.note_request(body.name, body.incarnation)
        seed = self._spec.config.job.seed
        return models.WorkList(
            **self._directive().model_dump(),
            work_items=[(index, work_item_seed(seed, index)) for index in taken],
            attempts=[work_items.attempt(index) for index in taken],
        )

    async def _under_way(self, body: models.Caller) -> models.UnfinishedWork:
        self.membership.note_request(body.name, body.incarnation)
        return self.membership.work_items.under_way()

    async def _finish(self, body: models.Finish) -> models.Directive:
        self.membership.note_request(body.name, body.incarnation)
        self.membership.stop(body.kind, body.reason)
        return await self._changed_directive()

    async def _unregister(self, body: models.Unregister) -> models.Directive:
        self.membership.left(
            body.name, body.incarnation, body.reason, body.published, failed=body.failed, exit_code=body.exit_code
        )
        return await self._changed_directive()

    async def _alive(self, body: models.Alive) -> models.Directive:
        for each in body.seen:
            self.membership.seen(each.name, each.pid, each.seconds)
        return self._directive()

    async def _stop(self, body: models.Stop) -> models.Directive:
        self.membership.stop("interrupted", body.reason)
        return await self._changed_directive()

    async def _died(self, body: models.Died) -> models.Directive:
        self.membership.died(
            body.name, body.role, body.reason, pid=body.pid, final=body.final, exit_code=body.exit_code
        )
        return await self._changed_directive()


# --- requests that are refused -----------------------------------------------------------------------------------


class _TokenRequired:
    """ASGI middleware that lets requests with the job's token pass; their bodies have at most `MAX_BODY` bytes.

    Requests for the page may show the page's cookie instead.
    """

    def __init__(self, app: ASGIApp, token: str, gate: PageGate) -> None:
        self._app = app
        self._gate = gate
        self._expected = f"Bearer {token}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] != _HEALTH:
            shown = Headers(scope=scope).get("authorization", "").encode()
            if not hmac.compare_digest(shown, self._expected):
                asks_for_page = is_page(scope["method"], scope["path"])
                refusal = self._gate.refusal(Request(scope)) if asks_for_page else unauthorised()
                if refusal is not None:
                    return await refusal(scope, receive, send)
            if PROVEN in scope.get("state", {}):  # else it is not served by an `HttpServer`
                scope["state"][PROVEN]()
        return await self._app(scope, _bounded(receive, scope), send)


def _bounded(receive: Receive, scope: Scope) -> Receive:
    left = MAX_BODY

    async def receive_bounded() -> Message:
        nonlocal left
        message = await receive()
        left -= len(message.get("body", b""))
        if left < 0:
            raise HTTPException(413)
        if message["type"] == "http.disconnect":
            _LOG.info("a client closed its connection before its request for %s was complete", scope["path"])
        return message

    return receive_bounded


def _refusal(status: int, reply: models.ErrorReply) -> Response:
    return Response(reply.model_dump_json(), status, media_type="application/json")


async def _not_a_member(_: Request, error: Exception) -> Response:
    return _refusal(409, models.ErrorReply(error="not a member", detail=str(error)))


async def _recording_refused(_: Request, error: Exception) -> Response:
    return _refusal(409, models.ErrorReply(error="recording refused", detail=str(error)))


async def _malformed(_: Request, error: Exception) -> Response:
    found = error.errors()[:3] if isinstance(error, RequestValidationError) else [_NOT_JSON]
    detail = json.dumps([{key: each[key] for key in ("type", "loc", "msg")} for each in found])
    return _refusal(422, models.ErrorReply(error="malformed", detail=detail))


async def _too_large(_request: Request, _error: Exception) -> Response:
    return _refusal(413, models.ErrorReply(error="too large", detail=f"at most {MAX_BODY} bytes"))


# --- process -----------------------------------------------------------------------------------------------------


def record_status(folder: JobFolder, status: models.Status) -> None:
    """Write the job's status to the folder's `outcome`, where the supervisor reads it; a failure is logged."""
    # A number that is not finite is a string in the text only, and strict JSON has no other way to write it.
    document = json.loads(status.model_dump_json())
    try:
        write_json(folder.outcome, document)
    except OSError as error:
        # The supervisor has asked for the status, and finds the end of the work in the checkpoint, too.
        _LOG.error("cannot write the outcome to %s: %s", folder.outcome, error.strerror)


async def serve(spec: JobSpec, listener: socket.socket) -> models.OutcomeReport:
    """Serve until the job is final or a signal comes; returns how the job ended."""
    record = partial(record_status, spec.folder)
    controller = Controller(spec, record)
    server = HttpServer(
        uvicorn.Config(
            controller.application,
            log_config=None,
            access_log=False,
            lifespan="off",
            timeout_keep_alive=int(KEEP_ALIVE),
            timeout_graceful_shutdown=HTTP_CLOSE_BOUND,
        ),
        listener,
        controller.connections,
    )
    loop = asyncio.get_running_loop()
    interrupted: set[asyncio.Task[None]] = set()

    def on_signal(number: signal.Signals) -> None:
        interrupted.add(loop.create_task(controller.interrupt(f"controller received {number.name}")))

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal, number)
    serving = loop.create_task(server.serve())
    await controller.reap_until_final()
    outcome = controller.membership.outcome
    assert outcome is not None  # a final phase has one, and so has an interrupted job
    record(controller.status())
    _LOG.info("final: %s (%s)", outcome.kind, outcome.reason)
    with shutdown_step("stop answering", "requests under way", HTTP_CLOSE_BOUND):
        server.should_exit = True
        await serving
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.remove_signal_handler(number)
    finish_process()
    return outcome


def main() -> int:
    """``python -m dray.jobs.controller.app SPEC SOCKET``, where SOCKET is the number of a listening socket."""
    begin_process("controller")
    spec = JobSpec.read(Path(sys.argv[1]))
    set_log_level(spec.config.job.log_level)
    with socket.socket(fileno=int(sys.argv[2])) as listener:
        outcome = asyncio.run(serve(spec, listener))
    return ExitCode.OK if final_phase(outcome.kind) is Phase.DONE else ExitCode.FAILED


if __name__ == "__main__":
    sys.exit(main())
