import asyncio
import re
from pathlib import Path
from typing import Any

import httpx
import pytest

from dray.jobs.controller.app import ENDPOINTS, Controller, Endpoint, openapi
from dray.jobs.folder import JobFolder, JobSpec
from dray.jobs.job_file import parse_job

PAGE = Path(__file__).parents[4] / "docs" / "reference" / "runtime.md"


@pytest.fixture
def spec(tmp_path: Path) -> JobSpec:
    rollout, policy = {"worker": "a.py:A"}, {"trainer": "a.py:B", "batch_size": 2}
    config = parse_job({"job": {"name": "small", "max_steps": 3}, "rollout": rollout, "policy": policy})
    return JobSpec(config, tmp_path / "job.toml", JobFolder(tmp_path), b"s" * 32, "unix:///x", "small-1", False, 0)


def answer(spec: JobSpec, endpoint: Endpoint, token: str | None) -> httpx.Response:
    async def ask() -> httpx.Response:
        transport = httpx.ASGITransport(Controller(spec).application)
        headers = {} if token is None else {"Authorization": f"Bearer {token}"}
        async with httpx.AsyncClient(transport=transport, base_url="http://job", headers=headers) as client:
            return await client.request(endpoint.method, endpoint.path, content="{}")

    return asyncio.run(ask())


@pytest.mark.parametrize("endpoint", ENDPOINTS, ids=lambda endpoint: endpoint.name)
def test_every_endpoint_but_the_health_probe_asks_for_the_token(spec: JobSpec, endpoint: Endpoint) -> None:
    for wrong in (None, "", "x" * 64, spec.token[:-1]):
        assert answer(spec, endpoint, wrong).status_code == (200 if endpoint.path == "/healthz" else 401)
    assert answer(spec, endpoint, spec.token).status_code in (200, 422)


def test_served_document_describes_every_endpoint(spec: JobSpec) -> None:
    (endpoint,) = (each for each in ENDPOINTS if each.path == "/openapi.json")
    served = answer(spec, endpoint, spec.token).json()
    assert served == openapi()
    assert served["openapi"].startswith("3.1")
    described = {(method.upper(), path) for path, methods in served["paths"].items() for method in methods}
    assert described == {(each.method, each.path) for each in ENDPOINTS}
    assert "security" not in served["paths"]["/healthz"]["get"]
    assert set(served["paths"]["/work-items"]["post"]["responses"]) == {"200", "401", "409", "413", "422"}


def test_every_schema_that_the_document_names_is_in_it() -> None:
    document = openapi()
    schemas = document["components"]["schemas"]

    def references(part: Any) -> list[str]:
        if isinstance(part, dict):
            own = [part["$ref"]] if "$ref" in part else []
            return own + [each for inner in part.values() for each in references(inner)]
        return [each for inner in part for each in references(inner)] if isinstance(part, list) else []

    named = {reference.removeprefix("#/components/schemas/") for reference in references(document)}
    assert named == set(schemas)
    assert schemas["Heartbeat"]["additionalProperties"] is False


def test_page_on_the_runtime_lists_every_endpoint() -> None:
    listed = re.findall(r"^\| `(GET|POST) (/\S+)` \| ([^|]*) \|$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    assert listed == [(each.method, each.path, each.summary) for each in ENDPOINTS]
