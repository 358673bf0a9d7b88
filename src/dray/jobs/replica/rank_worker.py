"""A policy replica that is not the first of its group: it reads, trains and saves as the first rank commands."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import cast

from dray.errors import DrayError, OutOfResources, StaleSlotError
from dray.jobs.api import PolicyTrainer, Trajectory
from dray.jobs.exit_codes import ExitCode
from dray.jobs.files import FOLDER_MODE
from dray.jobs.messages.channel import Channel, GroupLostError, RankCommand, RankReply
from dray.jobs.replica.base import Replica
from dray.jobs.replica.ranks import Failure
from dray.jobs.replica.rollout_result import decoded_metadata
from dray.jobs.replica.user_code import UserCodeError, call_user, save_into
from dray.payload import Arrays
from dray.prefetch import BatchReader, Fetched
from dray.protocol import PayloadRef


class RankWorker:
    """Carries out the commands of the first rank until the job ends.

    It does not end by itself when the job does: it would be missing in the first rank's last step.
    """

    def __init__(self, replica: Replica, trainer: PolicyTrainer, channel: Channel, reader: BatchReader) -> None:
        self._replica = replica
        self._trainer = trainer
        self._channel = channel
        self._reader = reader
        self._timeout = replica.spec.config.timeouts.read
        self._found: dict[str, Arrays | DrayError] = {}  # what was read, by the payload's key
        self._about: dict[str, tuple[int, int, str]] = {}  # version of the weights, work item, metadata

    def run(self) -> ExitCode:
        """The exit code with which the replica ends.

        Raises:
            GroupLostError: the first rank is gone.
        """
        activity = self._replica.activity
        while True:
            activity.waits("a command", self._channel.peer)
            order = self._channel.receive(RankCommand)
            if order.what == "end":
                return ExitCode.OK
            activity.doing(f"{order.what}, commanded by {self._channel.peer}")
            try:
                answer = self._carry_out(order)
            except UserCodeError as error:
                if self._channel.lost:
                    raise GroupLostError(f"{self._channel.peer} is gone") from error
                raise
            if answer is not None:
                self._channel.send(answer)

    def _carry_out(self, order: RankCommand) -> RankReply | None:
        if order.what == "begin":
            if order.text:
                call_user(self._trainer, "load", Path(order.text))
            return None
        if order.what == "read":
            return self._read(order)
        if order.what == "train":
            return self._train(order)
        if order.what == "weights":
            call_user(self._trainer, "weights")
            return None
        if order.what == "save":
            folder = Path(order.text)
            folder.mkdir(FOLDER_MODE)
            save_into(self._trainer, folder)
            return RankReply()
        raise GroupLostError(f"{self._channel.peer} shared more than this rank asked for")

    def _read(self, order: RankCommand) -> RankReply:
        """Read what was not read ahead."""
        self._reader.wait()
        self._keep(each for each in self._reader.collect() if not isinstance(each.outcome, DrayError))
        references = self._references(order)
        missing = [each for each in references if each.id.key not in self._found]
        self._keep(self._reader.fetch_all(missing, timeout=self._timeout, consume=False))
        failed: dict[str, Failure] = {}
        for each in references:
            found = self._found[each.id.key]
            if isinstance(found, OutOfResources):
                raise found  # of this process: the payload is there, and is delivered again
            if isinstance(found, DrayError):
                failed[each.id.key] = "stale" if isinstance(found, StaleSlotError) else "lost"
                del self._found[each.id.key]
        return RankReply(failed=failed)

    def _train(self, order: RankCommand) -> RankReply:
        trajectories = []
        for identity in order.identities:
            version, work_item, metadata = self._about[identity]
            arrays = cast(Arrays, self._found[identity])
            trajectories.append(Trajectory(arrays, version, work_item, decoded_metadata(metadata)))
        self._found.clear()
        self._about.clear()
        self._reader.start(self._references(order), timeout=self._timeout)
        call_user(self._trainer, "train_step", trajectories)
        self._replica.activity.counters.add_all({"payloads_read": len(trajectories), "steps": 1})
        return RankReply()

    def _references(self, order: RankCommand) -> list[PayloadRef]:
        references = [PayloadRef.from_json(text) for text in order.references]
        about = zip(order.versions, order.work_items, order.metadata, strict=True)
        self._about |= {each.id.key: rest for each, rest in zip(references, about, strict=True)}
        return references

    def _keep(self, results: Iterable[Fetched]) -> None:
        for each in results:
            self._found[each.ref.id.key] = each.outcome
