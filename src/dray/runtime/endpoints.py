"""The controller's endpoints, in one table: its routes, its OpenAPI document and its page follow from it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from pydantic.json_schema import models_json_schema

from dray import __version__
from dray.runtime import messages

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
    body: type[messages.Message] | None
    reply: type[messages.Message] | str
    guarded: bool = True

    @property
    def name(self) -> str:
        return self.path.strip("/").partition(".")[0].replace("-", "_")


ENDPOINTS = (
    Endpoint("GET", "/healthz", "Whether the controller lives.", None, "text/plain", guarded=False),
    Endpoint("GET", "/openapi.json", "This interface as an OpenAPI document.", None, JSON),
    Endpoint("GET", "/status", "Phase, outcome, replicas with their progress, stalls.", None, messages.Status),
    Endpoint("GET", "/metrics", "The same as numbers, for Prometheus.", None, "text/plain"),
    Endpoint("POST", "/register", "A replica has started.", messages.Register, messages.Directive),
    Endpoint("POST", "/heartbeat", "A replica lives, with its progress.", messages.Heartbeat, messages.Directive),
    Endpoint("POST", "/prompts", "A rollout replica asks for work.", messages.TakePrompts, messages.PromptList),
    Endpoint(
        "POST",
        "/under-way",
        "The policy asks which prompts are unsettled.",
        messages.Caller,
        messages.PromptsUnderWay,
    ),
    Endpoint("POST", "/finish", "The policy ends the job.", messages.Finish, messages.Directive),
    Endpoint("POST", "/unregister", "The last words of a replica.", messages.Unregister, messages.Directive),
    Endpoint("POST", "/alive", "The supervisor sees silent replicas run.", messages.Alive, messages.Directive),
    Endpoint("POST", "/died", "The supervisor saw a process end.", messages.Died, messages.Directive),
    Endpoint("POST", "/stop", "The supervisor ends the job early.", messages.Stop, messages.Directive),
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
    models = {messages.ErrorReply: None} | {
        model: None for each in ENDPOINTS for model in (each.body, each.reply) if isinstance(model, type)
    }
    _, definitions = models_json_schema(
        [(model, "serialization") for model in models], ref_template=_SCHEMAS + "{model}"
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
                responses[str(status)] = {"description": words, "content": _content(messages.ErrorReply)}
    if endpoint.body is not None:
        operation["requestBody"] = {"required": True, "content": _content(endpoint.body)}
    return operation


def _content(what: type[messages.Message] | str) -> dict[str, Any]:
    if isinstance(what, str):
        return {what: {"schema": {"type": "object" if what == JSON else "string"}}}
    return {JSON: {"schema": {"$ref": _SCHEMAS + what.__name__}}}
