import asyncio
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from dray.jobs.controller.app import Controller
from dray.jobs.folder import JobFolder, JobSpec
from dray.jobs.job_file import parse_job

PAGE = Path(__file__).parents[4] / "docs" / "reference" / "runtime.md"
SCHEMAS = "#/components/schemas/"


@pytest.fixture
def spec(tmp_path: Path) -> JobSpec:
    rollout, policy = {"worker": "a.py:A"}, {"trainer": "a.py:B", "batch_size": 2}
    config = parse_job({"job": {"name": "small", "max_steps": 3}, "rollout": rollout, "policy": policy})
    return JobSpec(config, tmp_path / "job.toml", JobFolder(tmp_path), b"s" * 32, "unix:///x", "small-1", False, 0)


def answer(spec: JobSpec, method: str, path: str, token: str | None, content: bytes = b"{}") -> httpx.Response:
    async def ask() -> httpx.Response:
        transport = httpx.ASGITransport(Controller(spec).application)
        headers = {} if token is None else {"Authorization": f"Bearer {token}"}
        async with httpx.AsyncClient(transport=transport, base_url="http://job", headers=headers) as client:
            return await client.request(method, path, content=content)

    return asyncio.run(ask())


@pytest.fixture
def document(spec: JobSpec) -> Any:
    """The OpenAPI document that the controller serves."""
    return answer(spec, "GET", "/openapi.json", spec.token).json()


def operations(document: Any) -> Iterator[tuple[str, str, Any]]:
    """Method, path and description of every endpoint, in the order of the document."""
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            yield method.upper(), path, operation


def test_every_endpoint_but_the_health_probe_asks_for_the_token(spec: JobSpec, document: Any) -> None:
    for method, path, operation in operations(document):
        for wrong in (None, "", "x" * 64, spec.token[:-1]):
            assert answer(spec, method, path, wrong).status_code == (200 if path == "/healthz" else 401)
        assert answer(spec, method, path, spec.token).status_code in (200, 422)
        assert ("security" in operation) is (path != "/healthz")


@pytest.mark.parametrize("path", ["/docs", "/redoc", "/docs/oauth2-redirect"])
def test_no_page_that_loads_scripts_is_served(spec: JobSpec, path: str) -> None:
    assert answer(spec, "GET", path, spec.token).status_code == 404


@pytest.mark.parametrize(
    "content", [b"", b"[", b"[" * 100_000, b"\xff", b"1" * 5000, b'{"reason": "\\udfff"}', b"null"]
)
def test_body_that_is_no_json_object_is_malformed(spec: JobSpec, content: bytes) -> None:
    refused = answer(spec, "POST", "/stop", spec.token, content)
    assert (refused.status_code, refused.json()["error"]) == (422, "malformed")
    assert json.loads(refused.json()["detail"])


def test_request_with_a_wrong_token_is_refused_before_its_body_is_read(spec: JobSpec) -> None:
    sent = []

    async def receive() -> Any:
        pytest.fail("the body was read")

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": "/stop", "query_string": b"", "headers": []}
    asyncio.run(Controller(spec).application(scope, receive, send))
    assert sent[0]["status"] == 401


def test_served_document_describes_every_refusal(document: Any) -> None:
    assert document["openapi"].startswith("3.1")
    assert set(document["paths"]["/work-items"]["post"]["responses"]) == {"200", "401", "409", "413", "422"}
    assert set(document["paths"]["/status"]["get"]["responses"]) == {"200", "401"}
    assert list(document["components"]["securitySchemes"]) == ["token"]
    identities = [operation["operationId"] for _, _, operation in operations(document)]
    assert "work_items" in identities
    assert len(set(identities)) == len(identities)


def test_every_schema_that_the_document_names_is_in_it(document: Any) -> None:
    schemas = document["components"]["schemas"]

    def references(part: Any) -> list[str]:
        if isinstance(part, dict):
            own = [part["$ref"]] if "$ref" in part else []
            return own + [each for inner in part.values() for each in references(inner)]
        return [each for inner in part for each in references(inner)] if isinstance(part, list) else []

    named = {reference.removeprefix(SCHEMAS) for reference in references(document)}
    assert named == set(schemas)
    assert schemas["Heartbeat"]["additionalProperties"] is False


def test_page_on_the_runtime_lists_every_endpoint(document: Any) -> None:
    listed = re.findall(r"^\| `(GET|POST) (/\S+)` \| ([^|]*) \|$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    assert listed == [(method, path, operation["summary"]) for method, path, operation in operations(document)]


def test_bodies_on_the_runtime_page_are_those_of_the_document(document: Any) -> None:
    pattern = r"^\| `POST (/\S+)` \| ([^|]*) \| ([^|]*) \|$"
    listed = re.findall(pattern, PAGE.read_text(encoding="utf-8"), re.MULTILINE)

    def fields(described: Any) -> str:
        name = described["content"]["application/json"]["schema"]["$ref"].removeprefix(SCHEMAS)
        return ", ".join(document["components"]["schemas"][name]["properties"])

    assert listed == [
        (path, fields(operation["requestBody"]), fields(operation["responses"]["200"]))
        for method, path, operation in operations(document)
        if method == "POST"
    ]
