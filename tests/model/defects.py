"""The defects that are planted, one at a time, to show that the search finds them."""

from __future__ import annotations

from typing import Final, NamedTuple, cast

from model import planted_consumer as consumers
from model import planted_observer as observers
from model import planted_owner as owners
from model import planted_server as servers
from model.consumer import Consumer
from model.observer import Observer
from model.owner import Owner
from model.properties import Property
from model.server import Server


class Defect(NamedTuple):
    """A change of the protocol.

    Attributes:
        name: how commands refer to it.
        scenario: the scenario that finds it.
        violated: the property that the shortest interleaving violates.
        change: what it changes.
        consumer: the class of consumers.
        owner: the class of the owner's threads that put payloads.
        observer: the class of the server's thread that observers.
        server: the class of the server.
    """

    name: str
    scenario: str
    violated: Property | None
    change: str
    consumer: type[Consumer] = Consumer
    owner: type[Owner] = Owner
    observer: type[Observer] = Observer
    server: type[Server] = Server


NO_DEFECT: Final = Defect("none", "", None, "")


def _of_consumer(name: str, scenario: str, violated: Property, consumer: type[Consumer]) -> Defect:
    return Defect(name, scenario, violated, consumer.__doc__ or "", consumer=consumer)


def _of_owner(name: str, scenario: str, violated: Property, owner: type[Owner]) -> Defect:
    return Defect(name, scenario, violated, owner.__doc__ or "", owner=owner)


def _of_observer(name: str, scenario: str, violated: Property, observer: type[Observer]) -> Defect:
    owner = cast("type[Owner]", type(observer.__name__, (observer, Owner), {}))
    return Defect(name, scenario, violated, observer.__doc__ or "", owner=owner, observer=observer)


def _of_server(name: str, scenario: str, violated: Property, server: type[Server]) -> Defect:
    return Defect(name, scenario, violated, server.__doc__ or "", server=server)


_OTHER_BYTES: Final = Property.OTHER_BYTES
_CHANGED: Final = Property.SLOT_CHANGED
_STALE: Final = Property.STALE
_TWICE: Final = Property.CONSUMED_TWICE
_UNDONE: Final = Property.UNDONE
_MISCOUNTED: Final = Property.MISCOUNTED
_LOST: Final = Property.LOST
_UNSERVED: Final = Property.UNSERVED
_FOREIGN: Final = Property.FOREIGN_END
_WAKE_UP: Final = Property.LOST_WAKE_UP

DEFECTS: Final = (
    # --- a consumer's lease ------------------------------------------------------------------------------------
    _of_consumer("generation-before-word", "drop", _CHANGED, consumers.ReadsGenerationBeforeWord),
    _of_consumer("board-before-generation", "two-attachments", _TWICE, consumers.ReadsBoardBeforeGeneration),
    _of_consumer("board-not-read", "two-attachments", _TWICE, consumers.IgnoresBoard),
    _of_consumer("retiring-ignored", "drop", _CHANGED, consumers.IgnoresRetiring),
    _of_consumer("retiring-means-stale", "drop", _STALE, consumers.TakesRetiringForStale),
    _of_consumer("word-cleared-before-copy", "drop", _CHANGED, consumers.ClearsWordBeforeRead),
    _of_consumer("not-registered", "attach", _CHANGED, consumers.SkipsRegistration),
    _of_consumer("closed-word-not-read", "close", _STALE, consumers.IgnoresClosedWord),
    # --- a consumer's end --------------------------------------------------------------------------------------
    _of_consumer("board-after-word", "drop", _MISCOUNTED, consumers.WritesBoardAfterWord),
    _of_consumer("board-without-word", "acknowledge", _UNDONE, consumers.WritesBoardWithoutWord),
    _of_consumer("lease-ended-twice", "end-again", _FOREIGN, consumers.EndsTwice),
    _of_consumer("token-tested-only", "threads", _FOREIGN, consumers.TestsTokenOnly),
    _of_consumer("index-before-word", "threads", _FOREIGN, consumers.GivesIndexBackFirst),
    _of_consumer("no-doorbell-after-end", "reuse", _WAKE_UP, consumers.NoDoorbellAfterEnd),
    _of_consumer("no-doorbell-after-failed-lease", "two-attachments", _WAKE_UP, consumers.NoDoorbellAfterFailure),
    _of_consumer("doorbell-before-word", "reuse", _WAKE_UP, consumers.ReadsDoorbellFirst),
    _of_consumer("closed-flag-not-read", "end-attachment-threads", _MISCOUNTED, consumers.IgnoresClosedFlag),
    _of_consumer("end-word-before-flag", "end-attachment-threads", _MISCOUNTED, consumers.EndWordBeforeFlag),
    # --- commit and retire -------------------------------------------------------------------------------------
    _of_owner("generation-before-content", "reuse", _OTHER_BYTES, owners.CommitsGenerationFirst),
    _of_observer("barrier-left-out-of-retire", "two-attachments", _CHANGED, observers.NoBarrierInRetire),
    _of_observer("fence-instead-of-barrier", "two-attachments", _CHANGED, observers.FencesItselfOnly),
    _of_observer("generation-cleared-after-scan", "newest-attach", _CHANGED, observers.ClearsGenerationAfterScan),
    _of_observer("barrier-of-another-thread", "newest-two-putting", _CHANGED, observers.FreesWithBarrierOfAnother),
    _of_observer("due-again-freed-by-older-barrier", "due-again", _CHANGED, observers.KnowsDueSlotsByIndex),
    _of_observer("failed-barrier-ignored", "barrier-fails", _CHANGED, observers.IgnoresFailedBarrier),
    _of_observer("undecided-after-failed-barrier", "barrier-fails", _LOST, observers.KeepsVictimAfterFailure),
    _of_observer("socket-leases-ignored", "network", _CHANGED, observers.IgnoresLeasesOverSocket),
    _of_observer("any-board-value", "reuse", _LOST, observers.TakesAnyBoardValue),
    _of_observer("never-scanned-again", "reuse", _WAKE_UP, observers.NeverScansAgain),
    _of_observer("dead-attachments-count", "kill", _WAKE_UP, observers.CountsDeadAttachments),
    # --- drop --------------------------------------------------------------------------------------------------
    _of_observer("barrier-left-out-of-drop", "drop", _CHANGED, observers.NoBarrierInDrop),
    _of_observer("generation-0-while-undecided", "drop", _STALE, observers.ClearsUndecided),
    _of_observer("drop-without-second-scan", "drop", _CHANGED, observers.DropsWithoutSecondScan),
    _of_observer("drop-under-socket-lease", "drop", _CHANGED, observers.DropsUnderLeaseOverSocket),
    _of_observer("drop-without-board", "drop", _MISCOUNTED, observers.DropsWithoutBoard),
    _of_observer("drop-board-before-words", "drop", _MISCOUNTED, observers.DropReadsBoardFirst),
    _of_owner("drop-at-once-without-board", "end-attachment-drop", _MISCOUNTED, owners.DropsAtOnceWithoutBoard),
    _of_owner("undecided-after-exception", "exception", _LOST, owners.StaysUndecidedAfterException),
    # --- wait --------------------------------------------------------------------------------------------------
    _of_owner("barrier-left-out-of-wait", "reuse", _WAKE_UP, owners.NoBarrierInWait),
    _of_owner("wait-reads-nothing", "reuse", _WAKE_UP, owners.SleepsAtOnce),
    _of_owner("wait-reads-board-only", "reuse", _WAKE_UP, owners.WaitReadsBoardOnly),
    _of_owner("wait-reads-words-only", "reuse", _WAKE_UP, owners.WaitReadsWordsOnly),
    _of_owner("wait-although-notified", "drop", _WAKE_UP, owners.WaitsAlthoughNotified),
    _of_observer("eventfd-reset-late", "two-reader-ids", _WAKE_UP, observers.ResetsEventfdLate),
    _of_owner("doorbell-of-others-cleared", "two-putting-drop", _WAKE_UP, owners.ClearsDoorbellOfOthers),
    _of_owner("commit-not-notified", "two-putting-drop", _WAKE_UP, owners.CommitsSilently),
    _of_observer("free-slots-not-notified", "reuse", _WAKE_UP, observers.WakesAlone),
    _of_observer("ready-not-notified", "socket", _WAKE_UP, observers.KeepsEndsOfLeasesToItself),
    _of_observer("retirement-not-notified", "drain", _WAKE_UP, observers.RetiresSilently),
    _of_observer(
        "last-attachment-not-notified", "end-attachment-drop", _WAKE_UP, observers.LosesLastAttachmentSilently
    ),
    # --- close -------------------------------------------------------------------------------------------------
    _of_owner("closed-word-after-generations", "close", _STALE, owners.ClosesWordLast),
    _of_owner("closed-word-left-out", "close", _STALE, owners.ClosesWithoutWord),
    # --- the server, attachments -------------------------------------------------------------------------------
    _of_server("board-ignored-by-network-lane", "network", _TWICE, servers.IgnoresBoardOverSocket),
    _of_server("socket-ends-not-on-board", "network", _TWICE, servers.KeepsEndsToItself),
    _of_server("stale-over-socket-while-undecided", "drop", _STALE, servers.AnswersStaleWhileUndecided),
    _of_server("no-notification-of-ends", "network", _WAKE_UP, servers.NoNotificationOfEnds),
    _of_server("attachment-ended-by-socket", "socket", _CHANGED, servers.EndsAttachmentWithSocket),
    _of_server("attachment-ended-by-empty-page", "socket", _CHANGED, servers.EndsAttachmentWithEmptyPage),
    _of_server("welcome-before-list", "drop-attach", _CHANGED, servers.WelcomesBeforeListing),
    _of_observer("end-word-after-lease-words", "end-attachment", _CHANGED, observers.ReadsEndWordLast),
    _of_observer("attachment-ended-under-lease", "end-attachment", _CHANGED, observers.EndsAttachmentUnderLease),
    # --- a server that stops -----------------------------------------------------------------------------------
    _of_server("retiring-left-out-without-server", "server-stops", _UNSERVED, servers.StopsSilently),
    Defect(
        "eventfd-without-new-server",
        "server-stops",
        _WAKE_UP,
        observers.WaitsForFirstServerOnly.__doc__ or "",
        observer=observers.WaitsForFirstServerOnly,
    ),
    _of_server("undecided-drop-published", "server-stops", _CHANGED, servers.PublishesUndecided),
    _of_owner("commit-without-server", "server-stops", _UNSERVED, owners.CommitsWithoutRetiring),
    _of_observer("given-back-without-server", "server-stops", _UNSERVED, observers.GivesBackWithoutRetiring),
)
