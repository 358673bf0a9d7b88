"""How long the waits of a replica's end may take: parts of `timeouts.shutdown`, in one table.

| wait | part | at most |
|---|---|---|
| for one answer of the controller | 5 % | 1 s |
| for payloads to be consumed, since it is known that the job ends | 18 % | |
| for transfers in flight | 4 % | 2 s |
| for the server's threads, after that | 3 % | 5 s |

A rollout replica that is ended waits once for each of them, and for three answers: a heartbeat under way, the last
one, and to unregister. That is 40 %, and it is killed after 44 % (`dray.launch.teardown`).
"""

from __future__ import annotations

from dataclasses import dataclass

ANSWER_PART, MAX_ANSWER = 0.05, 1.0
SERVE_PART = 0.18
TRANSFERS_PART, MAX_TRANSFERS = 0.04, 2.0
THREADS_PART, MAX_THREADS = 0.03, 5.0
LEAVE_PART = 0.5
"""For payloads to be consumed, of a replica that leaves while the job goes on."""


@dataclass(frozen=True, slots=True)
class EndBounds:
    """Seconds of each wait.

    Attributes:
        answer: for one answer of the controller.
        serve: for payloads to be consumed, since it is known that the job ends.
        leave: for payloads to be consumed while the job goes on.
        transfers: for transfers in flight when the server is closed.
        threads: for the server's threads after that.
    """

    answer: float
    serve: float
    leave: float
    transfers: float
    threads: float

    @classmethod
    def of(cls, shutdown: float) -> EndBounds:
        """Those for `shutdown` seconds of `timeouts.shutdown`."""
        return cls(
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

    @property
    def ended_rollout(self) -> float:
        """Seconds that all waits of a rollout replica together take once it is ended."""
        return self.serve + self.close + 3 * self.answer
