"""The controller: an HTTP service that knows who takes part in a job and which phase it is in.

One event loop owns all state, so a request sees the job at one moment. Decisions are in `membership` and
`work_items`; here is only what reaches them from outside: requests, the clock, signals.
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
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar

import uvicorn
from pydantic import ValidationError
from pydantic.json_schema import models_json_schema
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from dray import __version__
from dray.admission import ACCEPT_FAILURES, UNPROVEN_CLOSED
from dray.clock import MONOTONIC, Deadline, Stopwatch
from dray.counters import Counters
from dray.jobs.controller.listener import PROVEN, HttpServer
from dray.jobs.controller.metrics import MEDIA_TYPE, JobMetrics
from dray.jobs.controller.stall import StallWatch, job_snapshot
from dray.jobs.controller.state import Membership, Outcome, Progress, final_phase
from dray.jobs.controller.work_queue import WorkQueue, work_item_seed
from dray.jobs.exit_codes import ExitCode
from dray.jobs.files import write_json
from dray.jobs.folder import JobFolder, JobSpec
from dray.jobs.messages import models
from dray.jobs.messages.controller_client import KEEP_ALIVE
from dray.jobs.messages.models import MembershipError, Phase, Role
from dray.jobs.process import begin_process, finish_process, set_log_level, shutdown_step

# --- controller --------------------------------------------------------------------------------------------------

MAX_BODY = 4 << 20
HTTP_CLOSE_BOUND = 2
_LOG = logging.getLogger("dray.jobs.controller.app")
_Body = TypeVar("_Body", bound=models.Message)


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
        self.application = Starlette(routes=[self._route(endpoint) for endpoint in ENDPOINTS])

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
        if self._stall.look(job_snapshot(self.membership, MONOTONIC.now(), self._running.elapsed)):
            _LOG.warning("stall: %s", self._stall.line)
        await self._after_event()

    async def interrupt(self, reason: str) -> None:
        """End the job whatever its members do."""
        self.membership.stop(Outcome("interrupted", reason))
        await self._after_event()
        self.final.set()

    def status(self) -> models.Status:
        """The job as it is now."""
        membership, now = self.membership, MONOTONIC.now()
        outcome = membership.outcome
        return models.Status(
            job=self._spec.config.job.name,
            phase=membership.phase,
            seconds=self._running.elapsed,
            outcome=None if outcome is None else models.OutcomeReport(**asdict(outcome)),
            work_items=membership.work_items.statistics(),
            stall=self._stalled(),
            members=[
                models.MemberStatus(
                    name=member.name,
                    role=member.role,
                    state=member.state,
                    reason=member.reason,
                    pid=member.pid,
                    silence=now - member.last_heard,
                    progress=models.ProgressReport(**asdict(member.progress)),
                )
                for member in membership.members.values()
            ],
        )

    def _stalled(self) -> models.Stall | None:
        stall = self._stall
        if not stall.line:
            return None
        return models.Stall(line=stall.line, seconds=stall.seconds, reports=stall.reports)

    async def _after_event(self) -> None:
        membership = self.membership
        while membership.notices:
            _LOG.info("%s", membership.notices.pop(0))
        if membership.outcome is not None and self._record is not None:
            record, self._record = self._record, None
            record(self.status())
        if membership.phase.is_final and not self.final.is_set():
            self.final.set()
        async with self._changed:
            self._changed.notify_all()

    def _route(self, endpoint: Endpoint) -> Route:
        answer = getattr(self, f"_{endpoint.name}")
        return Route(
            endpoint.path, self._guarded(answer) if endpoint.guarded else answer, methods=[endpoint.method]
        )

    @property
    def _readers(self) -> int:
        return len(self.membership.active(Role.POLICY))

    async def _wait_for_change(self, deadline: Deadline) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(deadline.timeout), self._changed:
                await self._changed.wait()

    def _directive(self) -> models.Directive:
        phase = self.membership.phase
        return models.Directive(
            phase=phase,
            stop=not phase.gives_work,
            readers=self._readers,
            given_up=self.membership.work_items.given_up,
        )

    async def _healthz(self, _: Request) -> Response:
        return PlainTextResponse("ok\n")

    async def _openapi(self, _: Request) -> Response:
        return JSONResponse(openapi())

    async def _status(self, _: Request) -> Response:
        return _reply(self.status())

    async def _metrics(self, _: Request) -> Response:
        membership, stalled = self.membership, self._stall.seconds
        metrics = JobMetrics(self._spec.config.job.name, membership, stalled, self.connections.snapshot())
        # Requests are answered meanwhile.
        return Response(await asyncio.to_thread(metrics.text), media_type=MEDIA_TYPE)

    async def _register(self, request: Request) -> Response:
        body = await _body(request, models.Register)
        self.membership.register(body.name, body.role, body.incarnation, body.pid)
        await self._after_event()
        return _reply(self._directive())

    async def _heartbeat(self, request: Request) -> Response:
        body = await _body(request, models.Heartbeat)
        report = body.progress
        progress = Progress(**dict(report))
        self.membership.heard(body.name, body.incarnation, progress)
        self.membership.work_items.settled(body.settled)
        self.membership.work_items.settled_parts(body.settled_parts)
        await self._after_event()
        deadline = Deadline.after(body.until_unread)
        while (self._readers or self.membership.phase.gives_work) and not deadline.expired:
            await self._wait_for_change(deadline)
        return _reply(self._directive())

    async def _work_items(self, request: Request) -> Response:
        body = await _body(request, models.TakeWork)
        self.membership.heard(body.name, body.incarnation)
        self.membership.work_items.published(body.name, body.published)
        if body.failed:
            self.membership.failed(body.name, body.failed)
            await self._after_event()
        deadline = Deadline.after(body.wait)
        taken: list[int] = []
        while self.membership.phase.gives_work:
            others = [each.name for each in self.membership.active(Role.ROLLOUT) if each.name != body.name]
            taken = self.membership.work_items.take(body.name, body.want, working=body.working, others=others)
            if taken or deadline.expired:
                break
            await self._wait_for_change(deadline)
            self.membership.heard(body.name, body.incarnation)
        seed = self._spec.config.job.seed
        directive = self._directive()
        work_items = [(index, work_item_seed(seed, index)) for index in taken]
        attempts = [self.membership.work_items.attempt(index) for index in taken]
        return _reply(models.WorkList(**directive.model_dump(), work_items=work_items, attempts=attempts))

    async def _under_way(self, request: Request) -> Response:
        body = await _body(request, models.Caller)
        self.membership.heard(body.name, body.incarnation)
        work_items = self.membership.work_items
        unsettled, following = work_items.unfinished()
        return _reply(
            models.UnsettledWork(
                unsettled=unsettled,
                published=work_items.in_flight(),
                next=following,
                settled_parts=work_items.partly_settled(),
            )
        )

    async def _finish(self, request: Request) -> Response:
        body = await _body(request, models.Finish)
        self.membership.heard(body.name, body.incarnation)
        self.membership.stop(Outcome(body.kind, body.reason))
        await self._after_event()
        return _reply(self._directive())

    async def _unregister(self, request: Request) -> Response:
        body = await _body(request, models.Unregister)
        self.membership.left(
            body.name,
            body.incarnation,
            body.reason,
            body.published,
            failed=body.failed,
            exit_code=body.exit_code,
        )
        await self._after_event()
        return _reply(self._directive())

    async def _alive(self, request: Request) -> Response:
        body = await _body(request, models.Alive)
        for each in body.seen:
            self.membership.seen(each.name, each.pid, each.seconds)
        return _reply(self._directive())

    async def _stop(self, request: Request) -> Response:
        body = await _body(request, models.Stop)
        self.membership.stop(Outcome("interrupted", body.reason))
        await self._after_event()
        return _reply(self._directive())

    async def _died(self, request: Request) -> Response:
        body = await _body(request, models.Died)
        self.membership.died(
            body.name, body.role, body.reason, pid=body.pid, final=body.final, exit_code=body.exit_code
        )
        await self._after_event()
        return _reply(self._directive())

    def _guarded(
        self, answer: Callable[[Request], Awaitable[Response]]
    ) -> Callable[[Request], Awaitable[Response]]:
        """`answer`, for callers that show the job's token; its refusals become replies."""
        expected = f"Bearer {self._spec.token}".encode()

        async def guarded(request: Request) -> Response:
            if not hmac.compare_digest(request.headers.get("authorization", "").encode(), expected):
                return _reply(models.ErrorReply(error="unauthorised"), 401, {"Connection": "close"})
            request.scope.get("state", {}).get(PROVEN, _unbounded)()
            try:
                return await answer(request)
            except MembershipError as error:
                return _reply(models.ErrorReply(error="not a member", detail=str(error)), 409)
            except ValidationError as error:
                detail = json.dumps(
                    error.errors(include_url=False, include_input=False, include_context=False)[:3]
                )
                return _reply(models.ErrorReply(error="malformed", detail=detail), 422)
            except ClientDisconnect:
                path = request.url.path
                _LOG.info("a client closed its connection before its request for %s was complete", path)
                return Response(status_code=400)
            except _BodyTooLarge:
                return _reply(models.ErrorReply(error="too large", detail=f"at most {MAX_BODY} bytes"), 413)

        return guarded


class _BodyTooLarge(Exception):
    """The body of a request exceeds `MAX_BODY`."""


async def _body(request: Request, kind: type[_Body]) -> _Body:
    content = bytearray()
    async for chunk in request.stream():
        content += chunk
        if len(content) > MAX_BODY:
            raise _BodyTooLarge
    return kind.model_validate_json(bytes(content))


def _reply(message: models.Message, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    return Response(message.model_dump_json(), status, headers, media_type=JSON)


def _unbounded() -> None:
    """The application is not served by an `HttpServer`, so that nothing bounds its connections."""


def record_status(folder: JobFolder, status: models.Status) -> None:
    """Write the job's status to the folder's `outcome`, where the supervisor reads it; a failure is logged."""
    # A number that is not finite is a string in the text only, and strict JSON has no other way to write it.
    document = json.loads(status.model_dump_json())
    try:
        write_json(folder.outcome, document)
    except OSError as error:
        # The supervisor has asked for the status, and finds the end of the work in the checkpoint, too.
        _LOG.error("cannot write the outcome to %s: %s", folder.outcome, error.strerror)


async def serve(spec: JobSpec, listener: socket.socket) -> Outcome:
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
    outcome = controller.membership.outcome or Outcome("failed", "the controller ended without an outcome")
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


# --- app ---------------------------------------------------------------------------------------------------------

JSON = "application/json"
_SCHEMAS = "#/components/schemas/"
_TOKEN = "token"


@dataclass(frozen=True, slots=True)
class Endpoint:
    """One thing that can be asked of the controller.

    Attributes:
        path: unique; the controller's method for it has the same name.
        summary: one sentence.
        body: what the request holds, if it is a POST.
        reply: what is answered with status 200; a model, or the media type of a text.
        guarded: only for callers that show the job's token.
    """

    method: Literal["GET", "POST"]
    path: str
    summary: str
    body: type[models.Message] | None
    reply: type[models.Message] | str
    guarded: bool = True

    @property
    def name(self) -> str:
        return self.path.strip("/").partition(".")[0].replace("-", "_")


ENDPOINTS = (
    Endpoint("GET", "/healthz", "Whether the controller lives.", None, "text/plain", guarded=False),
    Endpoint("GET", "/openapi.json", "This interface as an OpenAPI document.", None, JSON),
    Endpoint("GET", "/status", "Phase, outcome, replicas with their progress, stalls.", None, models.Status),
    Endpoint("GET", "/metrics", "The same as numbers, for Prometheus.", None, "text/plain"),
    Endpoint("POST", "/register", "A replica has started.", models.Register, models.Directive),
    Endpoint("POST", "/heartbeat", "A replica lives, with its progress.", models.Heartbeat, models.Directive),
    Endpoint("POST", "/work-items", "A rollout replica asks for work.", models.TakeWork, models.WorkList),
    Endpoint(
        "POST",
        "/under-way",
        "The policy asks which work items are unsettled.",
        models.Caller,
        models.UnsettledWork,
    ),
    Endpoint("POST", "/finish", "The policy ends the job.", models.Finish, models.Directive),
    Endpoint("POST", "/unregister", "The last words of a replica.", models.Unregister, models.Directive),
    Endpoint("POST", "/alive", "The supervisor sees silent replicas run.", models.Alive, models.Directive),
    Endpoint("POST", "/died", "The supervisor saw a process end.", models.Died, models.Directive),
    Endpoint("POST", "/stop", "The supervisor ends the job early.", models.Stop, models.Directive),
)

REFUSALS = {
    401: "the token is missing or wrong",
    409: "the caller is not, or no longer, a member",
    413: "the body is too large",
    422: "the body is malformed",
}
"""Status codes other than 200, all with an `ErrorReply`."""


def openapi() -> dict[str, Any]:
    """The OpenAPI 3.1 document of `ENDPOINTS`."""
    bodies = {models.ErrorReply: None} | {
        body: None for each in ENDPOINTS for body in (each.body, each.reply) if isinstance(body, type)
    }
    _, definitions = models_json_schema(
        [(body, "serialization") for body in bodies], ref_template=_SCHEMAS + "{model}"
    )
    paths: dict[str, dict[str, Any]] = {}
    for endpoint in ENDPOINTS:
        paths.setdefault(endpoint.path, {})[endpoint.method.lower()] = _operation(endpoint)
    return {
        "openapi": "3.1.0",
        "info": {"title": "dray controller", "version": __version__},
        "paths": paths,
        "components": {
            "schemas": definitions["$defs"],
            "securitySchemes": {_TOKEN: {"type": "http", "scheme": "bearer"}},
        },
    }


def _operation(endpoint: Endpoint) -> dict[str, Any]:
    responses = {"200": {"description": "done", "content": _content(endpoint.reply)}}
    operation: dict[str, Any] = {"operationId": endpoint.name, "summary": endpoint.summary, "responses": responses}
    if endpoint.guarded:
        operation["security"] = [{_TOKEN: []}]
        for status, words in REFUSALS.items():
            if endpoint.body is not None or status == 401:
                responses[str(status)] = {"description": words, "content": _content(models.ErrorReply)}
    if endpoint.body is not None:
        operation["requestBody"] = {"required": True, "content": _content(endpoint.body)}
    return operation


def _content(what: type[models.Message] | str) -> dict[str, Any]:
    if isinstance(what, str):
        return {what: {"schema": {"type": "object" if what == JSON else "string"}}}
    return {JSON: {"schema": {"$ref": _SCHEMAS + what.__name__}}}


if __name__ == "__main__":
    sys.exit(main())
