"""Who may open the page of a job, and what a browser gets."""

import asyncio
import re
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from dray.jobs.controller.app import Controller
from dray.jobs.controller.page import FILES, MAX_COOKIES, MAX_TOKENS, MAX_WRONG, TOKEN_SECONDS, PageAccess
from dray.jobs.folder import JobFolder, JobSpec
from dray.jobs.job_file import parse_job

PATHS = ["/", "/page.js", "/page.css", "/view"]


class ManualClock:
    """A clock that a test sets."""

    def __init__(self) -> None:
        self.seconds = 1000.0

    def now(self) -> float:
        return self.seconds


def ask(
    tmp_path: Path, requests: Callable[[httpx.AsyncClient, JobSpec], Awaitable[None]], host: str = "127.0.0.1:9400"
) -> None:
    """Make `requests` of a controller without the job's token, as a browser that keeps cookies."""
    rollout, policy = {"worker": "a.py:A"}, {"trainer": "a.py:B", "batch_size": 2}
    config = parse_job({"job": {"name": "small", "max_steps": 3}, "rollout": rollout, "policy": policy})
    spec = JobSpec(config, tmp_path / "job.toml", JobFolder(tmp_path), b"s" * 32, "unix:///x", "small-1", False, 0)

    async def make() -> None:
        transport = httpx.ASGITransport(Controller(spec).application)
        async with httpx.AsyncClient(transport=transport, base_url=f"http://{host}") as client:
            await requests(client, spec)

    asyncio.run(make())


async def opening(client: httpx.AsyncClient, spec: JobSpec) -> str:
    answer = await client.post("/page-tokens", json={}, headers={"Authorization": f"Bearer {spec.token}"})
    assert answer.status_code == 200
    assert answer.json()["seconds"] == TOKEN_SECONDS
    return f"/?token={answer.json()['token']}"


# --- tokens and cookies -----------------------------------------------------------------------------------------


def test_token_opens_the_page_once() -> None:
    access = PageAccess()
    token = access.new_token()
    cookie = access.opened(token)
    assert cookie is not None
    assert access.admits(cookie)
    assert access.opened(token) is None


def test_token_that_is_too_old_opens_nothing() -> None:
    clock = ManualClock()
    access = PageAccess(clock)
    token, in_time = access.new_token(), access.new_token()
    clock.seconds += TOKEN_SECONDS - 1
    assert access.opened(in_time) is not None
    clock.seconds += 1
    assert access.opened(token) is None


def test_wrong_attempts_end_the_tokens_that_wait_and_no_cookie() -> None:
    access = PageAccess()
    cookie, token = access.opened(access.new_token()), access.new_token()
    assert cookie is not None
    for _ in range(MAX_WRONG - 1):
        assert access.opened("wrong") is None
    assert access.opened(token) is not None
    token = access.new_token()
    for _ in range(MAX_WRONG):
        assert access.opened("wrong") is None
    assert access.opened(token) is None
    assert access.admits(cookie)
    assert access.opened(access.new_token()) is not None


def test_tokens_and_cookies_are_bounded_and_the_oldest_goes_first() -> None:
    access = PageAccess()
    tokens = [access.new_token() for _ in range(MAX_TOKENS + 1)]
    assert [access.opened(each) is not None for each in tokens] == [False] + [True] * MAX_TOKENS
    cookies = [access.opened(access.new_token()) or "" for _ in range(MAX_COOKIES + 1)]
    assert [access.admits(each) for each in cookies] == [False] + [True] * MAX_COOKIES


@pytest.mark.parametrize("shown", ["", "x", "é", "\udcff", "a" * 10_000])
def test_what_is_no_token_or_cookie_opens_nothing(shown: str) -> None:
    access = PageAccess()
    access.opened(access.new_token())
    access.new_token()
    assert access.opened(shown) is None
    assert not access.admits(shown)


# --- over HTTP ---------------------------------------------------------------------------------------------------


def test_browser_with_a_token_sees_the_page_and_nothing_else_of_the_controller(tmp_path: Path) -> None:
    async def requests(client: httpx.AsyncClient, spec: JobSpec) -> None:
        opened = await client.get(await opening(client, spec))
        assert opened.status_code == 200
        (cookie,) = opened.headers.get_list("set-cookie")
        assert re.fullmatch(r"dray-page-\w+=[\w-]{40,}; HttpOnly; Path=/; SameSite=strict", cookie)
        for path in PATHS:
            answer = await client.get(path)
            assert answer.status_code == 200
            assert spec.token not in answer.text
        for path in ("/status", "/metrics", "/openapi.json"):
            assert (await client.get(path)).status_code == 401
        for path in ("/stop", "/recording", "/page-tokens", "/", "/view"):
            assert (await client.post(path, json={"reason": "x"})).status_code == 401

    ask(tmp_path, requests)


def test_wrong_spent_and_missing_tokens_open_nothing(tmp_path: Path) -> None:
    async def requests(client: httpx.AsyncClient, spec: JobSpec) -> None:
        path = await opening(client, spec)
        for wrong in ("/", "/?token=", "/?token=wrong", f"/?token={spec.token}", path[:-1], *PATHS):
            answer = await client.get(wrong)
            assert (answer.status_code, answer.headers["connection"]) == (401, "close")
            assert "set-cookie" not in answer.headers
        assert (await client.get(path)).status_code == 200
        client.cookies.clear()
        spent = await client.get(path)
        assert spent.status_code == 401
        assert "dray status --page" in spent.text

    ask(tmp_path, requests)


def test_browser_that_has_the_page_open_may_show_its_spent_token_again(tmp_path: Path) -> None:
    async def requests(client: httpx.AsyncClient, spec: JobSpec) -> None:
        path = await opening(client, spec)
        await client.get(path)
        for _ in range(2 * MAX_WRONG):
            again = await client.get(path)
            assert again.status_code == 200
            assert "set-cookie" not in again.headers

    ask(tmp_path, requests)


@pytest.mark.parametrize(
    ("host", "allowed"),
    [
        ("127.0.0.1:9400", True),
        ("[::1]:9400", True),
        ("192.0.2.7", True),
        ("localhost:80", True),
        ("LOCALHOST", True),
        ("attacker.example:9400", False),
        ("127.0.0.1.attacker.example", False),
        ("localhost.attacker.example:9400", False),
        ("[::1", False),
        ("", False),
    ],
)
def test_page_is_not_served_under_a_name_that_is_not_its_own(tmp_path: Path, host: str, allowed: bool) -> None:
    async def requests(client: httpx.AsyncClient, spec: JobSpec) -> None:
        path = await opening(client, spec)
        answer = await client.get(path, headers={"Host": host})
        assert (answer.status_code, "set-cookie" in answer.headers) == ((200, True) if allowed else (421, False))
        await client.get(await opening(client, spec))
        for each in PATHS:
            assert (await client.get(each, headers={"Host": host})).status_code == (200 if allowed else 421)

    ask(tmp_path, requests)


def test_answers_to_a_browser_forbid_everything_that_the_page_does_not_need(tmp_path: Path) -> None:
    async def requests(client: httpx.AsyncClient, spec: JobSpec) -> None:
        path = await opening(client, spec)
        for each in ("/", path, *FILES):
            headers = (await client.get(each)).headers
            policy = headers["content-security-policy"]
            assert policy.startswith(
                "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self';"
            )
            assert "frame-ancestors 'none'" in policy
            assert "unsafe" not in policy
            assert headers["cache-control"] == "no-store"
            assert headers["referrer-policy"] == "no-referrer"
            assert headers["x-content-type-options"] == "nosniff"

    ask(tmp_path, requests)


def test_files_of_the_page_name_nothing_outside_and_make_no_markup_of_text(tmp_path: Path) -> None:
    async def requests(client: httpx.AsyncClient, spec: JobSpec) -> None:
        await client.get(await opening(client, spec))
        texts = {path: (await client.get(path)).text for path in FILES}
        for text in texts.values():
            without_namespace = text.replace('"http://www.w3.org/2000/svg"', "")
            assert re.findall(r"//\w+[.:]\w|@import|url\(", without_namespace) == []
        assert (
            re.findall(r"innerHTML|outerHTML|insertAdjacent|document\.write|eval\(|\.style\b", texts["/page.js"])
            == []
        )
        assert re.findall(r"\son\w+=|<style|style=|javascript:", texts["/"]) == []

    ask(tmp_path, requests)


def test_view_is_held_until_there_is_something_new(tmp_path: Path) -> None:
    async def requests(client: httpx.AsyncClient, spec: JobSpec) -> None:
        bearer = {"Authorization": f"Bearer {spec.token}"}
        first = (await client.get("/view", headers=bearer)).json()
        waiting = asyncio.create_task(client.get(f"/view?seen={first['number']}", headers=bearer))
        stopped: Any = await client.post("/stop", json={"reason": "the test ends it"}, headers=bearer)
        assert stopped.status_code == 200
        answer = (await waiting).json()
        assert answer["number"] > first["number"]
        assert answer["outcome"]["reason"] == "the test ends it"
        assert (await client.get("/view?seen=x", headers=bearer)).status_code == 422

    ask(tmp_path, requests)
