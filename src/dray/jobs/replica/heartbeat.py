"""What a replica reports to the controller while it works, and what follows from the answers.

How long the waits of a replica's end may take: parts of `timeouts.shutdown`, in one table.

| wait | part | at most |
|---|---|---|
| for one answer of the controller | 5 % | 1 s |
| for payloads to be consumed, since it is known that the job ends | 18 % | |
| for transfers in flight | 4 % | 2 s |
| for the server's threads, after that | 3 % | 5 s |

A rollout replica that is ended waits once for each of them, and for three answers: a heartbeat under way, the last
one, and to unregister. That is 40 %, and it is killed after 44 % (`dray.jobs.launch.shutdown`).
"""

from __future__ import annotations

import faulthandler
import logging
import secrets
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Literal, TypeVar

from dray.clock import MONOTONIC
from dray.counters import Counters
from dray.errors import ControlPlaneError
from dray.jobs.exit_codes import ExitCode
from dray.jobs.messages import models
from dray.jobs.messages.controller_client import ControllerClient, ControllerLostError
from dray.jobs.messages.models import MembershipError, PayloadPart
from dray.jobs.process import StopFlag, exit_at_once
from dray.resources import Closing
from dray.text import printable

# --- end bounds --------------------------------------------------------------------------------------------------

ANSWER_PART, MAX_ANSWER = 0.05, 1.0
SERVE_PART = 0.18
TRANSFERS_PART, MAX_TRANSFERS = 0.04, 2.0
THREADS_PART, MAX_THREADS = 0.03, 5.0
LEAVE_PART = 0.5
"""For payloads to be consumed, of a replica that leaves before the job ends."""


@dataclass(frozen=True, slots=True)
class EndBounds:
    """Seconds of each wait.

    Attributes:
        shutdown: all of `timeouts.shutdown`.
        answer: for one answer of the controller.
        serve: for payloads to be consumed, since it is known that the job ends.
        leave: for payloads to be consumed before the job ends.
        transfers: for transfers in flight when the server is closed.
        threads: for the server's threads after that.
    """

    shutdown: float
    answer: float
    serve: float
    leave: float
    transfers: float
    threads: float

    @classmethod
    def of(cls, shutdown: float) -> EndBounds:
        """Those for `shutdown` seconds of `timeouts.shutdown`."""
        return cls(
            shutdown=shutdown,
            answer=min(MAX_ANSWER, ANSWER_PART * shutdown),
            serve=SERVE_PART * shutdown,
            leave=LEAVE_PART * shutdown,
            transfers=min(MAX_TRANSFERS, TRANSFERS_PART * shutdown),
            threads=min(MAX_THREADS, THREADS_PART * shutdown),
        )

    @property
    def close(self) -> float:
        """Seconds that closing the payload server takes."""
        return self.transfers + self.threads


# --- member ------------------------------------------------------------------------------------------------------

_Reply = TypeVar("_Reply", bound=models.Message)


class Member:
    """A replica as the controller knows it: its calls carry its name and which process of that name it is."""

    def __init__(self, client: ControllerClient, name: str) -> None:
        self.client = client
        self.name = name
        self.incarnation = secrets.token_hex(8)

    def post(
        self,
        path: str,
        body: Callable[..., models.Caller],
        reply: type[_Reply],
        timeout: float | None = None,
        **fields: object,
    ) -> _Reply:
        """The controller's answer to a `body` with these `fields`; errors as of `ControllerClient.post`."""
        message = body(name=self.name, incarnation=self.incarnation, **fields)
        return self.client.post(path, message, reply, timeout)


# --- heartbeat ---------------------------------------------------------------------------------------------------

AgeKind = Literal["payload", "lease", "reference"]
_LOG = logging.getLogger("dray.jobs.replica.heartbeat")


class Activity:
    """What a replica does, since when, with its counters and a few words about it. Any thread may ask.

    dray's own figures (`counters`, `show`) and the metrics of the user's trainer (`show_metrics`) are kept apart,
    whatever the user's names are.
    """

    def __init__(self) -> None:
        self.counters = Counters()
        self._lock = threading.Lock()
        self._doing = "starting"
        self._since = MONOTONIC.now()
        self._waits_for = ""
        self._ages: Callable[[], Mapping[AgeKind, float | None]] = dict
        self._gauges: Callable[[], Mapping[str, float]] = dict
        self._values: dict[str, float] = {}
        self._labels: dict[str, str] = {}
        self._metrics: dict[str, float] = {}
        self._warnings: list[str] = []
        self._recording: models.RecordingReport | None = None

    def doing(self, what: str) -> None:
        """From now on the replica does `what`."""
        with self._lock:
            self._doing, self._waits_for, self._since = what, "", MONOTONIC.now()

    def waits(self, what: str, whom: str) -> None:
        """From now on the replica waits for `whom`, for `what`; the same wait again does not begin anew."""
        doing = f"waiting for {what}"
        with self._lock:
            if (doing, whom) != (self._doing, self._waits_for):
                self._doing, self._waits_for, self._since = doing, whom, MONOTONIC.now()

    def show_ages(self, ages: Callable[[], Mapping[AgeKind, float | None]]) -> None:
        """Report the result of `ages`: seconds of the oldest payload, lease and unacknowledged reference."""
        with self._lock:
            self._ages = ages

    def show_gauges(self, gauges: Callable[[], Mapping[str, float]]) -> None:
        """Report the result of `gauges`, as of the moment of each report, among dray's own figures."""
        with self._lock:
            self._gauges = gauges

    def show(self, name: str, value: float | str) -> None:
        """Put the newest `value` of a gauge or a label on the status page; an empty label is left out."""
        self.show_all({name: value})

    def show_all(self, values: Mapping[str, float | str]) -> None:
        """As `show`, for several."""
        with self._lock:
            for name, value in values.items():
                if not isinstance(value, str):
                    self._values[name] = float(value)
                elif value:
                    self._labels[name] = value

    def show_metrics(self, metrics: Mapping[str, float]) -> None:
        """Put the newest values of the user's `metrics` on the status page.

        Values of earlier calls stay; of more than `MAX_METRICS` names those go that were not given for longest.
        """
        with self._lock:
            for name, value in metrics.items():
                shown = printable(name, models.MAX_METRIC_NAME)
                self._metrics.pop(shown, None)
                self._metrics[shown] = value
            for name in list(self._metrics)[: -models.MAX_METRICS]:
                del self._metrics[name]

    def warn(self, text: str) -> None:
        """Log a warning, and show it on the status page and the terminal, there up to `MAX_WARNINGS` of them."""
        line = printable(text, models.MAX_WARNING)
        _LOG.warning("%s", line)
        with self._lock:
            if len(self._warnings) < models.MAX_WARNINGS:
                self._warnings.append(line)

    def show_recording(self, report: models.RecordingReport) -> None:
        """Report on the newest order to record."""
        with self._lock:
            self._recording = report

    def report(self) -> models.ProgressReport:
        """Everything as it is now."""
        with self._lock:
            return models.ProgressReport(
                doing=self._doing,
                seconds=MONOTONIC.now() - self._since,
                counters={**self.counters.snapshot(), **self._values, **self._gauges()},
                labels=dict(self._labels),
                waits_for=self._waits_for,
                ages={kind: age for kind, age in self._ages().items() if age is not None},
                metrics=dict(self._metrics),
                warnings=list(self._warnings),
                recording=self._recording,
            )


class Heartbeat(Closing):
    """A thread that reports the replica's progress, in intervals and when asked to at once.

    It sets `stop` when the controller answers that the job ends (then `job_over` is set, too, and `unread` once no
    policy replica is left to read payloads), when it no longer counts the replica as a member, and when it has not
    answered for `lost_after` seconds. In the last two cases it ends the process by itself if the main thread does
    not do so within `timeouts.shutdown`.

    Attributes:
        over_at: since when the job ends, on the clock of this process: the controller has answered so, or does not
            answer while the replica is to end. `unread` is set as well if the controller is gone.
        given_up: how many work items of the job were given up so far.
        recording: the newest order to record; only the first policy replica gets one.
    """

    def __init__(
        self,
        member: Member,
        activity: Activity,
        stop: StopFlag,
        *,
        interval: float,
        lost_after: float,
        bounds: EndBounds,
    ) -> None:
        self.over_at: float | None = None
        self.given_up = 0
        self.recording: models.RecordingOrder | None = None
        self.job_over = threading.Event()
        self.unread = threading.Event()
        self._watching_readers = False
        self._silent = False
        self._member = member
        self._activity = activity
        self._stop = stop
        self._interval = interval
        self._lost_after = lost_after
        self._bounds = bounds
        self._lock = threading.Lock()
        self._finished: list[int] = []
        self._finished_parts: list[PayloadPart] = []
        self._wake = threading.Event()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)
        self._thread.start()

    def follow(self, answer: models.Directive) -> None:
        """Stop the replica if the controller has answered, to this or another request, that the job ends."""
        if answer.stop:
            if not self.job_over.is_set():
                self.over_at = MONOTONIC.now()
            self.job_over.set()
            self._stop.set(f"the job is {answer.phase.value}")

    def unfinished(self) -> models.UnfinishedWork:
        """The work items that are given out and not finished, by the controller's knowledge."""
        return self._member.post("/under-way", models.Caller, models.UnfinishedWork)

    def finished(self, indices: Iterable[int]) -> None:
        """Report, at once, work items whose trajectories are trained on, lost or discarded."""
        with self._lock:
            self._finished.extend(indices)
        self._wake.set()

    def finished_payloads(self, payloads: Iterable[PayloadPart]) -> None:
        """Report, at once, payloads that are trained on, lost or discarded: each finishes its part of a work
        item."""
        found = list(payloads)
        with self._lock:
            self._finished.extend(index for index, _, parts in found if parts == 1)
            self._finished_parts.extend(each for each in found if each[2] > 1)
        self._wake.set()

    def report_now(self) -> None:
        """Report at once, and not only in intervals."""
        self._wake.set()

    def watch_readers(self) -> None:
        """From now on learn at once, and not only in intervals, that no policy replica is left."""
        self._watching_readers = True
        self._wake.set()

    def close(self) -> None:
        """Send a last report where the controller still listens, and end the thread."""
        self._closed.set()
        self._wake.set()
        self._thread.join()

    def _run(self) -> None:
        silence = 0.0
        while True:
            last, began = self._closed.is_set(), MONOTONIC.now()
            try:
                self._beat()
                silence, self._silent = 0.0, False
            except MembershipError as error:
                return self._fatal(f"not a member any more: {error}", ExitCode.NOT_A_MEMBER)
            except ControllerLostError as error:
                # The time in which user code held the interpreter is none in which the controller was silent.
                silence += min(MONOTONIC.now() - began, self._attempt)
                if silence >= self._lost_after:
                    return self._fatal(f"the controller is lost: {error}", ExitCode.CONTROLLER_LOST)
                self._silent = True
                self._note_silence()
                _LOG.warning("no answer from the controller for %.1f s: %s", silence, error)
            except ControlPlaneError as error:
                return self._fatal(str(error), ExitCode.INTERNAL)
            if (last and not self._finished and not self._finished_parts) or (
                self._silent and self._closed.is_set()
            ):
                return None
            if not self._until_unread:
                began = MONOTONIC.now()
                self._wake.wait(self._interval)
                self._wake.clear()
                silence += min(MONOTONIC.now() - began, self._interval) if self._silent else 0.0

    @property
    def _attempt(self) -> float:
        """Seconds that one call may take."""
        return min(self._lost_after, max(1.0, 2 * self._interval))

    def _note_silence(self) -> None:
        if self._stop.is_set and self.over_at is None:
            self.over_at = MONOTONIC.now() - self._stop.since
        if self._member.client.refused:
            self.unread.set()

    @property
    def _until_unread(self) -> float:
        """Seconds for which the controller may hold its answer back; takes the place of the interval."""
        if not self._watching_readers or self.unread.is_set() or self._closed.is_set() or self._silent:
            return 0.0
        return min(self._interval, self._bounds.answer / 2)

    def _beat(self) -> None:
        with self._lock:
            # What is more comes with the next one, at once.
            finished, parts = self._finished[: models.MAX_REPORTED], self._finished_parts[: models.MAX_REPORTED]
            del self._finished[: len(finished)], self._finished_parts[: len(parts)]
            if self._finished or self._finished_parts:
                self._wake.set()
        try:
            answer = self._member.post(
                "/heartbeat",
                models.Heartbeat,
                models.HeartbeatReply,
                self._attempt,
                progress=self._activity.report(),
                finished=finished,
                finished_parts=parts,
                until_unread=self._until_unread,
            )
        except ControllerLostError:
            with self._lock:
                self._finished[:0] = finished
                self._finished_parts[:0] = parts
            raise
        self.given_up = answer.given_up
        self.recording = answer.recording
        self.follow(answer)
        if answer.stop and not answer.readers:
            self.unread.set()

    def _fatal(self, reason: str, exit_code: ExitCode) -> None:
        self._stop.set(reason, exit_code)
        grace = self._bounds.shutdown
        if not self._closed.wait(grace):
            _LOG.error("the main thread did not end within %.1f s; stacks follow", grace)
            faulthandler.dump_traceback(all_threads=True)
            exit_at_once(exit_code)
