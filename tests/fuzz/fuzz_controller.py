"""The controller's HTTP bodies: any body of any request has an answer, and the job's status can be read then.

Input: one digit for the request, then its body; a zero byte ends a body and begins the next request.
"""

import asyncio
import functools
import json
import re
from pathlib import Path

from dray.jobs.controller.app import Controller
from dray.jobs.folder import JobFolder, JobSpec
from dray.jobs.job_file import parse_job

_PATHS = ("/register", "/heartbeat", "/work-items", "/finish", "/unregister", "/stop", "/died", "/status")
_WAITS = re.compile(rb'"(\\u0077|w)(\\u0061|a)(\\u0069|i)(\\u0074|t)"')


def request(path: str, **body: object) -> bytes:
    return str(_PATHS.index(path)).encode() + json.dumps(body).encode()


_CALLER = {"name": "rollout-0", "incarnation": "a"}
_PROGRESS = {"doing": "step", "seconds": 1.5, "counters": {"reads": 3}, "labels": {"lane": "shm"}}
_REGISTERED = request("/register", **_CALLER, role="rollout", pid=7) + b"\0"
SEEDS = [
    _REGISTERED + request("/heartbeat", **_CALLER, progress=_PROGRESS, finished=[0, 5]),
    _REGISTERED + request("/heartbeat", **_CALLER, progress={**_PROGRESS, "seconds": float("nan")}),
    _REGISTERED + request("/heartbeat", **_CALLER, progress={**_PROGRESS, "counters": {"reads": float("inf")}}),
    _REGISTERED + request("/heartbeat", **_CALLER, progress={**_PROGRESS, "counters": {"re ads\n": 1e300}}),
    _REGISTERED + request("/heartbeat", **_CALLER, progress={**_PROGRESS, "metrics": {'a "b\\\n': float("nan")}}),
    _REGISTERED + request("/heartbeat", **_CALLER, progress={**_PROGRESS, "warnings": ["\x1b[2J"] * 21}),
    _REGISTERED + request("/work-items", **_CALLER, want=4, published=[1, 2**63 - 1]),
    _REGISTERED + request("/unregister", **_CALLER, reason="x" * 300),
    _REGISTERED + request("/finish", **_CALLER, kind="solved", reason=""),
    request("/died", name="policy-0", role="policy", reason="killed"),
    request("/stop", reason="\udfff"),
    request("/stop", reason="enough") + b"\0" + request("/register", name="policy-0", incarnation="", pid=2**70),
    b"1" + b"[" * 500,
    b"0\xff{",
]


@functools.cache
def _spec() -> JobSpec:
    job = {"name": "fuzz", "max_steps": 3}
    rollout, policy = {"worker": "a:B", "slots": 8}, {"trainer": "a:B", "batch_size": 4}
    config = parse_job({"job": job, "rollout": rollout, "policy": policy})
    return JobSpec(config, Path("job.toml"), JobFolder(Path("out")), b"secret", "", "id", False, 0)


def run(data: bytes) -> None:
    asyncio.run(_run(data))


async def _run(data: bytes) -> None:
    controller = Controller(_spec())
    for each in data.split(b"\0")[:4]:
        path, body = _PATHS[each[0] % len(_PATHS)] if each else "/status", each[1:]
        if _WAITS.search(body):  # it would be answered late, but not otherwise
            continue
        status, answer = await _ask(controller, "GET" if path == "/status" else "POST", path, body)
        assert status in (200, 409, 422), (status, answer)
        _strict(answer)
    for path in ("/status", "/metrics"):
        status, answer = await _ask(controller, "GET", path, b"")
        assert status == 200
    status, answer = await _ask(controller, "GET", "/status", b"")
    _strict(answer)


def _strict(answer: bytes) -> None:
    def refuse(text: str) -> None:
        raise AssertionError(f"{text} is not JSON")

    assert isinstance(json.loads(answer, parse_constant=refuse), dict)


async def _ask(controller: Controller, method: str, path: str, body: bytes) -> tuple[int, bytes]:
    """One request to the application, without a server around it."""
    answer: list[dict] = []

    async def receive() -> dict:
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(message: dict) -> None:
        answer.append(message)

    scope = {
        "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": method, "scheme": "http",
        "path": path, "raw_path": path.encode(), "root_path": "", "query_string": b"",
        "headers": [(b"authorization", f"Bearer {_spec().token}".encode())],
        "client": ("127.0.0.1", 1), "server": ("127.0.0.1", 2),
    }  # fmt: skip
    await controller.application(scope, receive, send)
    return answer[0]["status"], b"".join(message.get("body", b"") for message in answer[1:])
