"""The messages of a job's processes: bodies of the controller's requests and replies, and those over channels."""

from __future__ import annotations

import math
from enum import StrEnum
from itertools import islice
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from dray.errors import ControlPlaneError
from dray.text import printable


class Phase(StrEnum):
    """Where a job stands."""

    STARTING = "starting"  # not every kind of replica has registered
    RUNNING = "running"
    DRAINING = "draining"  # no new work; replicas finish what is in flight and leave
    DONE = "done"  # every member has left; the job was solved, or all its steps are done
    INTERRUPTED = "interrupted"  # every member has left, because a signal ended the job
    FAILED = "failed"  # every member has left; the job could not continue, or was not solved within its steps

    @property
    def is_final(self) -> bool:
        return self in (Phase.DONE, Phase.INTERRUPTED, Phase.FAILED)

    @property
    def gives_work(self) -> bool:
        return self in (Phase.STARTING, Phase.RUNNING)


OutcomeKind = Literal["solved", "finished", "max_steps", "interrupted", "failed"]


class Role(StrEnum):
    """What a replica does."""

    ROLLOUT = "rollout"
    POLICY = "policy"


class MemberState(StrEnum):
    """Whether a member takes part."""

    ACTIVE = "active"
    LEFT = "left"
    DEAD = "dead"


class MembershipError(ControlPlaneError):
    """The controller does not, or no longer, know the caller as a member; the caller must end."""


class RecordingRefusedError(ControlPlaneError):
    """The job cannot be recorded, or not now; the message names what is required."""


# --- messages ----------------------------------------------------------------------------------------------------

# Bounds of what one message holds.
MAX_SENTENCE = 2000  # characters of a reason
MAX_WORK_WAIT = 2.0  # seconds that a request for work items may be held open when there are none
MAX_MEMBERS = 2048  # replicas that it is about
MAX_REPORTED = 1 << 16  # work items that it reports
MAX_FAILED = 1024  # failed attempts that it reports
MAX_ERROR = 1000  # characters of the error of a failed rollout
MAX_FIGURES = 256  # of dray's own
MAX_LABELS = 64
MAX_FIGURE_NAME = 100  # characters of the name of a figure or label
MAX_WORDS = 200  # characters of a label, of what a replica does, and of what it waits for
MAX_METRICS = 256  # of the user's trainer
MAX_METRIC_NAME = 200  # characters
MAX_WARNINGS = 20
MAX_WARNING = 500  # characters
MAX_PATH = 4096  # characters of the path of a folder

Name = Annotated[str, Field(pattern=r"^[a-z][a-z0-9-]{0,62}$")]
Index = Annotated[int, Field(ge=0, lt=2**63)]
Indices = Annotated[list[Index], Field(max_length=1 << 20)]
Sentence = Annotated[str, Field(max_length=MAX_SENTENCE)]
Reported = Annotated[list[Index], Field(max_length=MAX_REPORTED)]
ReportedParts = Annotated[list[tuple[Index, Index, Index]], Field(max_length=MAX_REPORTED)]
FigureName = Annotated[str, Field(max_length=MAX_FIGURE_NAME)]
MetricName = Annotated[str, Field(max_length=MAX_METRIC_NAME)]
Words = Annotated[str, Field(max_length=MAX_WORDS)]
OrderId = Annotated[str, Field(min_length=1, max_length=64)]


class Message(BaseModel):
    """A body: no unknown fields. NaN and infinite metrics are strings, as strict JSON has no numbers for them."""

    model_config = ConfigDict(extra="forbid", frozen=True, ser_json_inf_nan="strings")


class Caller(Message):
    """A replica that calls the controller: `incarnation` is which process of that name it is."""

    name: Name
    incarnation: Annotated[str, Field(min_length=1, max_length=64)]


class Register(Caller):
    """``POST /register``: a replica has started."""

    role: Role
    pid: Annotated[int, Field(gt=0)]


class _Trimming:
    """Cuts what exceeds a bound, and counts how many texts were cut and how many entries were dropped."""

    def __init__(self) -> None:
        self.count = 0

    def text(self, given: Any, most: int) -> Any:
        """`given` with at most so many characters."""
        if not isinstance(given, str) or len(given) <= most:
            return given
        self.count += 1
        return printable(given, most)

    def texts(self, given: Any, most: int, longest: int) -> Any:
        """The first texts of the list `given`."""
        if not isinstance(given, list):
            return given
        self.count += max(0, len(given) - most)
        return [self.text(each, longest) for each in given[:most]]

    def table(self, given: Any, most: int, longest_name: int, longest_text: int | None = None) -> Any:
        """The first entries of the dictionary `given`, with bounded names, and texts where a bound is given."""
        if not isinstance(given, dict):
            return given
        self.count += max(0, len(given) - most)
        return {
            self.text(name, longest_name): value if longest_text is None else self.text(value, longest_text)
            for name, value in islice(given.items(), most)
        }


class RecordingReport(Message):
    """What the policy replica has done about the `RecordingOrder` with this `id`.

    `first` is the number in the recording of the order's first payload, None as long as nothing was opened.
    `payloads` are on the disk, and `removed` are payloads that made room for them. If the recording has `ended`,
    everything is on the disk, or `problem` is why not.
    """

    id: OrderId
    first: Index | None = None
    payloads: Index = 0
    removed: Index = 0
    ended: bool = False
    problem: Sentence = ""


class ProgressReport(Message):
    """What a replica does, for how many seconds, dray's own figures as `counters`, and words about it as `labels`.

    `waits_for` is the member that it waits for, if any; `ages` are those of the oldest payload, lease and
    unacknowledged reference it has, in seconds. `metrics` are the newest values of what the user's `train_step`
    returned, under the user's names; `warnings` are lines that the user should see. `recording` is
    about the newest order to record that the replica has followed.

    What exceeds the bounds is cut or dropped, when a report is made and when one is read; `trimmed` counts it.
    """

    doing: Words
    seconds: float
    counters: Annotated[dict[FigureName, float], Field(max_length=MAX_FIGURES)] = {}
    labels: Annotated[dict[FigureName, Words], Field(max_length=MAX_LABELS)] = {}
    waits_for: Words = ""
    ages: dict[Literal["payload", "lease", "reference"], float] = {}
    metrics: Annotated[dict[MetricName, float], Field(max_length=MAX_METRICS)] = {}
    warnings: Annotated[list[Annotated[str, Field(max_length=MAX_WARNING)]], Field(max_length=MAX_WARNINGS)] = []
    trimmed: Annotated[int, Field(ge=0)] = 0
    recording: RecordingReport | None = None

    @model_validator(mode="before")
    @classmethod
    def _trim(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        trimming = _Trimming()
        fields = {
            **given,
            "doing": trimming.text(given.get("doing"), MAX_WORDS),
            "waits_for": trimming.text(given.get("waits_for", ""), MAX_WORDS),
            "counters": trimming.table(given.get("counters", {}), MAX_FIGURES, MAX_FIGURE_NAME),
            "labels": trimming.table(given.get("labels", {}), MAX_LABELS, MAX_FIGURE_NAME, MAX_WORDS),
            "metrics": trimming.table(given.get("metrics", {}), MAX_METRICS, MAX_METRIC_NAME),
            "warnings": trimming.texts(given.get("warnings", []), MAX_WARNINGS, MAX_WARNING),
        }
        if not trimming.count:
            return given
        earlier = given.get("trimmed", 0)
        return {**fields, "trimmed": earlier + trimming.count if isinstance(earlier, int) else earlier}

    def count(self, name: str) -> int:
        """The counter `name` as a whole number; 0 if there is none, or none that is finite."""
        value = self.counters.get(name, 0)
        return int(value) if math.isfinite(value) else 0


class Heartbeat(Caller):
    """``POST /heartbeat``: alive, with progress; `finished` are work items trained on, lost or discarded.

    `finished_parts` are the same for payloads of work items with several: index of the work item, number of the
    payload, and how many payloads there are.

    The answer is held back for up to `until_unread` seconds until the job ends and no policy replica is left.
    """

    progress: ProgressReport
    finished: Reported = []
    finished_parts: ReportedParts = []
    until_unread: Annotated[float, Field(ge=0, le=MAX_WORK_WAIT)] = 0.0


class FailedAttempt(Message):
    """Attempt number `attempt` at work item `index` failed with `error`, one line."""

    index: Index
    attempt: Annotated[int, Field(ge=1)]
    error: Annotated[str, Field(max_length=MAX_ERROR)]


FailedAttempts = Annotated[list[FailedAttempt], Field(max_length=MAX_FAILED)]


class TakeWork(Caller):
    """``POST /work-items``: asks for up to `want` work items, and reports those published since the last time.

    `failed` are the attempts that failed since then, and `working` the work items that the caller still works on.
    """

    want: Annotated[int, Field(ge=1, le=4096)]
    wait: Annotated[float, Field(ge=0, le=MAX_WORK_WAIT)] = 0.0
    published: Reported = []
    failed: FailedAttempts = []
    working: Reported = []


class Finish(Caller):
    """``POST /finish``: the policy ends the job."""

    kind: OutcomeKind
    reason: Sentence


class Unregister(Caller):
    """``POST /unregister``: the last request of a replica, which is about to end; fields as in `TakeWork`."""

    reason: Sentence
    published: Reported = []
    failed: FailedAttempts = []
    exit_code: Annotated[int, Field(ge=0, le=255)] = 0


class Died(Message):
    """``POST /died``: the supervisor saw a replica's process end, with `exit_code` as `subprocess` gives it.

    `reason` counts if the replica has given none; `final` unless the replica, or its group, is restarted. It
    changes nothing for another process of the same name that has registered since.
    """

    name: Name
    role: Role
    pid: Annotated[int, Field(ge=0)] = 0
    reason: Sentence
    final: bool = True
    exit_code: Annotated[int, Field(ge=-255, le=255)] | None = None


class Seen(Message):
    """A replica whose process `pid` was known to run `seconds` ago."""

    name: Name
    pid: Annotated[int, Field(gt=0)]
    seconds: Annotated[float, Field(ge=0, allow_inf_nan=False)]


class Alive(Message):
    """``POST /alive``: what the supervisor knows of replicas from which no heartbeat comes."""

    seen: Annotated[list[Seen], Field(max_length=MAX_MEMBERS)]


class Stop(Message):
    """``POST /stop``: the supervisor was interrupted."""

    reason: Sentence


class RecordingOrder(Message):
    """``POST /recording``: record what the job trains on from now on into `folder`, which is absolute.

    The caller repeats the order about once a second, and ends it by `end`; an order that is not repeated for some
    seconds ends as well. A recording with `payloads` ends after the step by which so many are on the disk.

    `first` is for a policy replica that takes the order up from an earlier one: as in `RecordingReport`.
    """

    id: OrderId
    folder: Annotated[str, Field(pattern=r"^/", max_length=MAX_PATH)]
    payloads: Annotated[int, Field(ge=1)] | None = None
    max_bytes: Annotated[int, Field(ge=1)]
    file_bytes: Annotated[int, Field(ge=1)]
    stop_when_full: bool = False
    end: bool = False
    first: Index | None = None


class RecordingState(Message):
    """The answer to ``POST /recording``.

    `doing` is what the first policy replica does. `began` is true once the recording is open, and `ended` once
    nothing more is written: for `problem`, or because the order or the job has ended. `confirmed` is true if the
    policy replica has reported that; else `payloads` are those of its last report.
    """

    phase: Phase
    doing: str
    began: bool
    payloads: int
    removed: int
    ended: bool
    confirmed: bool
    problem: str


class Directive(Message):
    """What most answers have in common; `readers` are policy replicas that are there to read payloads."""

    phase: Phase
    stop: bool
    readers: int = 0
    given_up: int = 0


class HeartbeatReply(Directive):
    """The answer to a heartbeat: `recording` is the order that the first policy replica follows."""

    recording: RecordingOrder | None = None


class WorkList(Directive):
    """The answer to work items: pairs of index and seed, if there is work, and the numbers of the attempts at
    them, from 1."""

    work_items: list[tuple[int, int]] = []
    attempts: list[int] = []


class UnfinishedWork(Message):
    """The answer to ``POST /under-way``, which a policy asks with a `Caller`.

    `published` are unfinished work items whose trajectories were published, `finished_parts` the finished payloads
    of unfinished work items, as in `Heartbeat`.
    """

    unfinished: Indices
    published: Indices
    next: int
    finished_parts: Annotated[list[tuple[Index, Index, Index]], Field(max_length=1 << 20)] = []


class MemberStatus(Message):
    """One member on the status page; `silence` in seconds."""

    name: str
    role: Role
    state: MemberState
    reason: str
    pid: int
    silence: float
    progress: ProgressReport


class OutcomeReport(Message):
    """How the job came to its end; `cause` is the exit code of the replica that it failed for."""

    kind: OutcomeKind
    reason: str
    cause: int | None = None


class Stall(Message):
    """A member waits for longer than `timeouts.stall`: the line about it, and how many there were so far."""

    line: str
    seconds: float
    reports: int


class Status(Message):
    """``GET /status``."""

    job: str
    phase: Phase
    seconds: float
    outcome: OutcomeReport | None
    members: list[MemberStatus]
    work_items: dict[str, int]
    stall: Stall | None = None

    def progress(self, name: str) -> ProgressReport:
        """What the member `name` has reported last; an empty report if there is no such member."""
        found = (member.progress for member in self.members if member.name == name)
        return next(found, ProgressReport(doing="", seconds=0.0))


class ErrorReply(Message):
    """The body of every answer that is not 200."""

    error: Literal["unauthorised", "not a member", "recording refused", "malformed", "too large"]
    detail: str = ""


# --- messages over channels --------------------------------------------------------------------------------------


class RankCommand(Message):
    """A command of rank 0 of a policy group to the other ranks; they come in this order:

    | what | |
    |---|---|
    | share | while the trainers are set up: `text` is what rank 0 gave to `PolicyGroup.share` |
    | begin | load from the folder `text`, which is this rank's; nothing if it is empty |
    | read | read those of `references` that were not read ahead; answered with those that failed |
    | train | train on the payloads `identities`, and meanwhile read `references` ahead; answered when done |
    | weights | join in `PolicyTrainer.weights` |
    | save | save into the folder `text`, which is this rank's; answered when done |
    | end | the job has ended |
    """

    what: Literal["share", "begin", "read", "train", "weights", "save", "end"]
    text: str = ""
    references: list[str] = []
    versions: list[Annotated[int, Field(ge=0)]] = []
    work_items: list[Annotated[int, Field(ge=0)]] = []
    metadata: list[str] = []
    identities: list[str] = []


class RankReply(Message):
    """The answer of a rank; `failed` maps the identity of a payload to ``"stale"`` or ``"lost"``."""

    what: Literal["reply"] = "reply"
    failed: dict[str, Literal["stale", "lost"]] = {}


class StartReplica(Message):
    """From the head: start a replica that the plan places on the node."""

    what: Literal["start"] = "start"
    name: Name


class ReplicaStarted(Message):
    """From a node: a replica was started, with this pid."""

    what: Literal["started"] = "started"
    name: Name
    pid: Annotated[int, Field(gt=0)]


class ReplicasRunning(Message):
    """From a node, in intervals: the replicas whose processes run, and are not stopped."""

    what: Literal["running"] = "running"
    names: Annotated[list[Name], Field(max_length=MAX_MEMBERS)]


class HeirFigures(Message):
    """From a node, when it has changed: what the agent there has inherited of killed rollout replicas so far.

    Attributes:
        rings: rings of theirs that had payloads.
        payloads, bytes: in these.
        consumed: of the payloads, those that were consumed since.
        dropped: those that were given up, for a limit of memory or time.
        left: those that are still there.
    """

    what: Literal["heirs"] = "heirs"
    rings: Annotated[int, Field(ge=0)] = 0
    payloads: Annotated[int, Field(ge=0)] = 0
    bytes: Annotated[int, Field(ge=0)] = 0
    consumed: Annotated[int, Field(ge=0)] = 0
    dropped: Annotated[int, Field(ge=0)] = 0
    left: Annotated[int, Field(ge=0)] = 0


class ReplicaEnded(Message):
    """From a node: how a replica ended, and the number of the signal with which the node has had it end, or 0."""

    what: Literal["ended"] = "ended"
    name: Name
    code: int
    request: Annotated[int, Field(ge=0, le=64)] = 0


class SendSignal(Message):
    """From the head: send a replica a signal."""

    what: Literal["signal"] = "signal"
    name: Name
    number: Annotated[int, Field(ge=1, le=64)]


class KillReplica(Message):
    """From the head: kill a replica, and what is in its process group."""

    what: Literal["kill"] = "kill"
    name: Name


class Shutdown(Message):
    """From the head: the job has ended; the node kills what is left and confirms by closing the connection."""

    what: Literal["shutdown"] = "shutdown"


class HeadAddress(Message):
    """Where the head of an attempt listens for other nodes; a file in the job's folder."""

    host: str
    port: int
    attempt: str
    job_id: str
    boot_id: str


RankMessage = RankCommand | RankReply
HeadMessage = StartReplica | SendSignal | KillReplica | Shutdown
NodeMessage = ReplicaStarted | ReplicasRunning | HeirFigures | ReplicaEnded
ChannelMessage = Annotated[RankMessage | HeadMessage | NodeMessage, Field(discriminator="what")]


# --- work item parts ---------------------------------------------------------------------------------------------

PayloadPart = tuple[int, int, int]
"""A payload by its place: the index of its work item, its number there, and how many payloads the item has."""


class PartlyFinished:
    """The work items of which some payloads are finished, or whose number of payloads is known: the newest one, as
    another attempt may have another number."""

    def __init__(self) -> None:
        self._finished: dict[int, set[int]] = {}
        self._parts: dict[int, int] = {}

    def found(self, index: int, parts: int) -> None:
        """A payload of the work item has `parts` as their number."""
        self._parts[index] = parts

    def finish(self, payload: PayloadPart) -> bool:
        """A payload is finished; returns whether its whole work item is, which is forgotten then."""
        index, part, parts = payload
        self._parts[index] = parts
        finished = self._finished.setdefault(index, set())
        finished.add(part)
        if len(finished) < parts:
            return False
        self.forget(index)
        return True

    def forget(self, index: int) -> None:
        """The work item is finished, whatever is known of its payloads."""
        self._finished.pop(index, None)
        self._parts.pop(index, None)

    def remaining(self, index: int, otherwise: int) -> int:
        """How many payloads of the work item are not finished; `otherwise` if that is not known."""
        if index not in self._parts:
            return otherwise
        return max(1, self._parts[index] - len(self._finished.get(index, ())))

    def finished(self) -> list[PayloadPart]:
        """The finished payloads of work items that are not finished as a whole."""
        return [
            (index, part, self._parts[index]) for index, found in self._finished.items() for part in sorted(found)
        ]
