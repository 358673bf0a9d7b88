"""The page that shows a job in a browser: who may open it, and its files.

A URL with a one-time token opens the page once and within a short time; the browser then gets a cookie, and shows
that. Neither opens anything but the page: what changes the job, and the job's token, are out of reach. One-time
tokens and cookies are random: they do not depend on the job's token.
"""

from __future__ import annotations

import hmac
import ipaddress
import logging
import secrets
from collections import OrderedDict
from collections.abc import Collection
from pathlib import Path
from urllib.parse import urlsplit

from fastapi import Request, Response
from fastapi.responses import HTMLResponse, PlainTextResponse

from dray.admission import LineLimit
from dray.clock import MONOTONIC, Clock, Deadline
from dray.jobs.messages.models import ErrorReply

TOKEN_SECONDS = 600.0
"""For which a one-time token is good."""

MAX_TOKENS = 4
"""One-time tokens that were not used yet; the oldest one makes room for a new one."""

MAX_WRONG = 10
"""Attempts with a wrong token after which all one-time tokens are dropped."""

MAX_COOKIES = 16
"""Browsers in which the page is open; the one that opened it first makes room for another one."""

VIEW = "/view"
HTML, SCRIPT, STYLE = "/", "/page.js", "/page.css"

FILES = {
    HTML: ("page.html", "text/html"),
    SCRIPT: ("page.js", "text/javascript"),
    STYLE: ("page.css", "text/css"),
}
"""Path → file of the page, and its media type."""

HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-store",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
}
"""Of every answer to a browser."""

_LOG = logging.getLogger("dray.jobs.controller.page")
_FOLDER = Path(__file__).parent / "static"
_LAST = {"Connection": "close"}

# A redirect continues a navigation that another origin may have begun: then a strict cookie would not be shown.
_OPENED = (
    '<!DOCTYPE html><meta charset="utf-8"><meta http-equiv="refresh" content="0; url=/"><title>dray</title>\n'
)
_CLOSED = (
    "This page opens with a one-time token, within {seconds:g} seconds after the token was made.\n"
    "`dray run` prints a URL with one when the job starts; `dray status --page` prints a new one.\n"
)
_WRONG_HOST = (
    "The controller does not know itself under this name. Open the page at localhost, at an IP address, "
    "or at the address that controller.host names.\n"
)


class PageAccess:
    """One-time tokens, and the cookies of browsers that have used one. No I/O.

    Attributes:
        cookie_name: differs from job to job, as a browser shows its cookies to all ports of a host.
    """

    def __init__(self, clock: Clock = MONOTONIC) -> None:
        self.cookie_name = f"dray-page-{secrets.token_hex(4)}"
        self._clock = clock
        self._tokens: OrderedDict[str, Deadline] = OrderedDict()
        self._cookies: OrderedDict[str, None] = OrderedDict()
        self._wrong = 0

    def new_token(self) -> str:
        """A new one-time token. Wrong attempts are counted from the beginning."""
        token = secrets.token_urlsafe(32)
        self._tokens[token] = Deadline.after(TOKEN_SECONDS, self._clock)
        self._wrong = 0
        while len(self._tokens) > MAX_TOKENS:
            self._tokens.popitem(last=False)
        return token

    def opened(self, token: str) -> str | None:
        """The value of a new cookie if this is a one-time token, which is spent then; else None."""
        found = _found(token, self._tokens)
        if found is None or self._tokens.pop(found).expired:
            self._wrong += 1
            if self._wrong >= MAX_WRONG:
                self._tokens.clear()
            return None
        value = secrets.token_urlsafe(32)
        self._cookies[value] = None
        while len(self._cookies) > MAX_COOKIES:
            self._cookies.popitem(last=False)
        return value

    def admits(self, cookie: str) -> bool:
        """Whether a browser that shows this cookie has opened the page."""
        return _found(cookie, self._cookies) is not None


def is_page(method: str, path: str) -> bool:
    """Whether a request is one that a browser makes for the page."""
    return method == "GET" and (path in FILES or path == VIEW)


class PageGate:
    """Decides about requests for the page that do not show the job's token.

    Args:
        host: `controller.host`, a name under which a browser may know the controller.
    """

    def __init__(self, access: PageAccess, host: str) -> None:
        self._access = access
        self._host = host.lower()
        self._lines = LineLimit()

    def refusal(self, request: Request) -> Response | None:
        """What such a request is answered with; None if it shows the cookie, and is to be served."""
        path = request.scope["path"]
        admitted = self._access.admits(request.cookies.get(self._access.cookie_name, ""))
        if path == VIEW and not admitted:
            return unauthorised()
        if not _is_own_name(request.headers.get("host", ""), self._host):
            return PlainTextResponse(_WRONG_HOST, 421, {**HEADERS, **_LAST})
        token = request.query_params.get("token") if path == HTML else None
        if token is None:
            return None if admitted else _closed()
        value = self._access.opened(token)
        if value is None and not admitted:
            self._lines.warn(_LOG, "the page was asked for with a token that is wrong, spent or too old")
            return _closed()
        answer = HTMLResponse(_OPENED, headers=HEADERS)
        if value is not None:
            answer.set_cookie(self._access.cookie_name, value, httponly=True, samesite="strict")
        return answer


def unauthorised() -> Response:
    """The answer to a request that shows nothing that it must show; the last one of its connection."""
    text = ErrorReply(error="unauthorised").model_dump_json()
    return Response(text, 401, _LAST, media_type="application/json")


def page_file(path: str) -> Response:
    """The file of the page at `path`, one of `FILES`."""
    name, media_type = FILES[path]
    return Response((_FOLDER / name).read_bytes(), media_type=media_type, headers=HEADERS)


def _found(shown: str, known: Collection[str]) -> str | None:
    """The one of `known` that `shown` equals; how long that takes does not depend on how much of it is right."""
    matches = [each for each in known if hmac.compare_digest(each.encode(), shown.encode("utf-8", "replace"))]
    return matches[0] if matches else None


def _is_own_name(host: str, configured: str) -> bool:
    """Whether a browser means the controller by the Host header `host`.

    A page of another origin whose name was made to mean this machine sends that name.
    """
    try:
        name = urlsplit(f"//{host}").hostname or ""
        ipaddress.ip_address(name)
    except ValueError:  # a name, not an address
        return host.partition(":")[0].lower() in ("localhost", configured)
    return True


def _closed() -> Response:
    return PlainTextResponse(_CLOSED.format(seconds=TOKEN_SECONDS), 401, {**HEADERS, **_LAST})
