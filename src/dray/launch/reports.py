"""What the supervisor has to report to the controller: kept, in order, until the controller has answered."""

from __future__ import annotations

from typing import Protocol

from dray.errors import ControlPlaneError
from dray.runtime import messages
from dray.runtime.controller_client import ControllerLostError

Report = messages.Died | messages.Stop


class Controller(Protocol):
    """What reports are sent to; see `ControllerClient`."""

    def post(self, path: str, body: messages.Message, reply: type[messages.Directive]) -> messages.Directive:
        """Send `body` and return the answer."""
        ...


class Reports:
    """The reports that wait. There is at most one of each kind about each replica: the newest."""

    def __init__(self, controller: Controller) -> None:
        self._controller = controller
        self._waiting: dict[tuple[str, str], Report] = {}

    def add(self, report: Report) -> None:
        """Have `report` sent after all others."""
        key = ("/died", report.name) if isinstance(report, messages.Died) else ("/stop", "")
        self._waiting.pop(key, None)
        self._waiting[key] = report

    def send(self) -> messages.Directive | None:
        """Send what waits; returns the answer to the last report, or None if there was none.

        Raises:
            ControllerLostError: no answer came in time; the report and all after it wait on.
            ControlPlaneError: the controller refused a report, which is dropped.
        """
        answer = None
        while self._waiting:
            key, report = next(iter(self._waiting.items()))
            try:
                answer = self._controller.post(key[0], report, messages.Directive)
            except ControllerLostError:
                raise
            except ControlPlaneError:
                del self._waiting[key]
                raise
            del self._waiting[key]
        return answer

    def __len__(self) -> int:
        return len(self._waiting)
