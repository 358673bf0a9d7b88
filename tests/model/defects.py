"""The defects that are planted, one at a time, to show that the search finds them."""

from __future__ import annotations

from typing import Final, NamedTuple

from model import planted_consumer as consumers
from model import planted_owner as owners
from model import planted_server as servers
from model.consumer import Consumer
from model.owner import Owner
from model.properties import Property
from model.server import Server


class Defect(NamedTuple):
    """A change of the protocol.

    Attributes:
        name: how commands refer to it.
        scenario: the scenario that finds it.
        violated: the property that the shortest interleaving violates.
        consumer: the class of consumers.
        owner: the class of the owner's threads.
        server: the class of the server.
    """

    name: str
    scenario: str
    violated: Property | None
    consumer: type[Consumer] = Consumer
    owner: type[Owner] = Owner
    server: type[Server] = Server

    @property
    def change(self) -> str:
        """What it changes: the docstring of the class that has the defect."""
        pairs = ((self.consumer, Consumer), (self.owner, Owner), (self.server, Server))
        return next((changed.__doc__ or "" for changed, base in pairs if changed is not base), "")


NO_DEFECT: Final = Defect("none", "", None)


def _of_consumer(name: str, scenario: str, violated: Property, consumer: type[Consumer]) -> Defect:
    return Defect(name, scenario, violated, consumer=consumer)


def _of_owner(name: str, scenario: str, violated: Property, owner: type[Owner]) -> Defect:
    return Defect(name, scenario, violated, owner=owner)


def _of_server(name: str, scenario: str, violated: Property, server: type[Server]) -> Defect:
    return Defect(name, scenario, violated, server=server)


_OTHER_BYTES: Final = Property.OTHER_BYTES
_CHANGED: Final = Property.SLOT_CHANGED
_STALE: Final = Property.STALE
_TWICE: Final = Property.CONSUMED_TWICE
_UNDONE: Final = Property.UNDONE
_MISCOUNTED: Final = Property.MISCOUNTED
_LOST: Final = Property.LOST
_FOREIGN: Final = Property.FOREIGN_END
_WAKE_UP: Final = Property.LOST_WAKE_UP

DEFECTS: Final = (
    # --- a consumer's lease ---------------------------------------------------------------------------------------
    _of_consumer("generation-before-word", "drop", _CHANGED, consumers.ReadsGenerationBeforeWord),
    _of_consumer("board-before-generation", "two-attachments", _TWICE, consumers.ReadsBoardBeforeGeneration),
    _of_consumer("board-not-read", "two-attachments", _TWICE, consumers.IgnoresBoard),
    _of_consumer("retiring-ignored", "drop", _CHANGED, consumers.IgnoresRetiring),
    _of_consumer("retiring-means-stale", "drop", _STALE, consumers.TakesRetiringForStale),
    _of_consumer("word-cleared-before-read", "drop", _CHANGED, consumers.ClearsWordBeforeRead),
    _of_consumer("not-registered", "attach", _CHANGED, consumers.SkipsRegistration),
    # --- a consumer's end -----------------------------------------------------------------------------------------
    _of_consumer("board-after-word", "drop", _MISCOUNTED, consumers.WritesBoardAfterWord),
    _of_consumer("board-without-word", "acknowledge", _UNDONE, consumers.WritesBoardWithoutWord),
    _of_consumer("ended-twice", "end-again", _FOREIGN, consumers.EndsTwice),
    _of_consumer("token-tested-only", "threads", _FOREIGN, consumers.TestsTokenOnly),
    _of_consumer("index-before-word", "threads", _FOREIGN, consumers.GivesIndexBackFirst),
    _of_consumer("no-doorbell-after-end", "reuse", _WAKE_UP, consumers.NoDoorbellAfterEnd),
    _of_consumer("no-doorbell-after-failed-lease", "two-attachments", _WAKE_UP, consumers.NoDoorbellAfterFailure),
    _of_consumer("doorbell-before-word", "reuse", _WAKE_UP, consumers.ReadsDoorbellFirst),
    # --- commit and retire ----------------------------------------------------------------------------------------
    _of_owner("generation-before-content", "reuse", _OTHER_BYTES, owners.CommitsGenerationFirst),
    _of_owner("no-barrier-in-retire", "two-attachments", _CHANGED, owners.NoBarrierInRetire),
    _of_owner("fence-instead-of-barrier", "two-attachments", _CHANGED, owners.FencesItselfOnly),
    _of_owner("list-before-barrier", "newest-attach", _CHANGED, owners.ListsBeforeBarrier),
    _of_owner("generation-after-scan", "newest", _CHANGED, owners.ClearsGenerationAfterScan),
    _of_owner("scan-before-barrier", "newest-two-putting", _CHANGED, owners.ScansBeforeItsBarrier),
    _of_owner("failed-barrier-ignored", "barrier-fails", _CHANGED, owners.IgnoresFailedBarrier),
    _of_owner("cleared-slots-forgotten", "barrier-fails-two-putting", _WAKE_UP, owners.ForgetsClearedSlots),
    _of_owner("socket-leases-ignored", "network", _CHANGED, owners.IgnoresLeasesOverSocket),
    _of_owner("any-board-value", "reuse", _LOST, owners.TakesAnyBoardValue),
    _of_owner("never-scanned-again", "reuse", _WAKE_UP, owners.NeverScansAgain),
    _of_owner("dead-attachments-count", "kill", _WAKE_UP, owners.CountsDeadAttachments),
    # --- drop -----------------------------------------------------------------------------------------------------
    _of_owner("no-barrier-in-drop", "drop", _CHANGED, owners.NoBarrierInDrop),
    _of_owner("generation-0-while-undecided", "drop", _STALE, owners.ClearsUndecided),
    _of_owner("drop-without-second-scan", "drop", _CHANGED, owners.DropsWithoutSecondScan),
    _of_owner("drop-under-socket-lease", "drop", _CHANGED, owners.DropsUnderLeaseOverSocket),
    _of_owner("drop-without-board", "drop", _MISCOUNTED, owners.DropsWithoutBoard),
    _of_owner("drop-board-before-words", "drop", _MISCOUNTED, owners.DropReadsBoardFirst),
    # --- wait and close -------------------------------------------------------------------------------------------
    _of_owner("no-barrier-in-wait", "reuse", _WAKE_UP, owners.NoBarrierInWait),
    _of_owner("wait-reads-nothing", "reuse", _WAKE_UP, owners.SleepsAtOnce),
    _of_owner("wait-reads-board-only", "reuse", _WAKE_UP, owners.WaitReadsBoardOnly),
    _of_owner("wait-reads-words-only", "reuse", _WAKE_UP, owners.WaitReadsWordsOnly),
    _of_owner("eventfd-reset-late", "two-reader-ids", _WAKE_UP, owners.ResetsEventfdLate),
    _of_owner("doorbell-of-others-cleared", "two-putting", _WAKE_UP, owners.ClearsDoorbellOfOthers),
    _of_owner("commit-not-notified", "two-putting-drop", _WAKE_UP, owners.CommitsSilently),
    _of_owner("others-not-notified", "newest-two-putting", _WAKE_UP, owners.WakesAlone),
    _of_owner("no-barrier-in-close", "close", _MISCOUNTED, owners.NoBarrierInClose),
    _of_owner("generation-0-after-close", "close", _STALE, owners.ClearsGenerationsAtClose),
    # --- the server, attachments ----------------------------------------------------------------------------------
    _of_server("board-ignored-over-socket", "network", _TWICE, servers.IgnoresBoardOverSocket),
    _of_server("socket-ends-not-on-board", "network", _TWICE, servers.KeepsEndsToItself),
    _of_server("stale-over-socket-while-undecided", "drop", _STALE, servers.AnswersStaleWhileUndecided),
    _of_server("no-notification-of-ends", "network", _WAKE_UP, servers.NoNotificationOfEnds),
    _of_server("no-notification-of-kills", "kill", _WAKE_UP, servers.NoNotificationOfKills),
    _of_server("attachment-ends-with-socket", "socket", _CHANGED, servers.EndsAttachmentWithSocket),
    _of_server("attachment-ends-with-empty-page", "socket", _CHANGED, servers.EndsAttachmentWithEmptyPage),
    _of_server("welcome-before-list", "drop-attach", _CHANGED, servers.WelcomesBeforeListing),
)
