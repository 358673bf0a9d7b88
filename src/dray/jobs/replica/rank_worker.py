"""A policy replica that is not the first of its group: it carries out the commands of the first rank."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import cast

from dray.errors import DrayError, OutOfResources, StaleSlotError
from dray.jobs.api import PolicyTrainer, Trajectory
from dray.jobs.exit_codes import ExitCode
from dray.jobs.files import FOLDER_MODE
from dray.jobs.messages.channel import GroupLostError, MessageChannel
from dray.jobs.messages.models import RankCommand, RankReply
from dray.jobs.replica.base import Replica
from dray.jobs.replica.ranks import Failure
from dray.jobs.replica.rollout_result import decoded_metadata
from dray.jobs.replica.user_code import UserCodeError, call_user, save_into
from dray.payload import Arrays
from dray.prefetch import BatchReader, Fetched
from dray.protocol import PayloadRef


class RankWorker:
    """Carries out the commands of the first rank until the command to end.

    It does not end by itself when the job does: it would be missing in the first rank's last step.
    """

    def __init__(
        self, replica: Replica, trainer: PolicyTrainer, channel: MessageChannel, reader: BatchReader
    ) -> None:
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
            activity.waits("its commands", self._channel.peer)
            command = self._channel.receive(RankCommand)
            if command.what == "end":
                return ExitCode.OK
            activity.doing(f"{command.what}, commanded by {self._channel.peer}")
            try:
                reply = self._carry_out(command)
            except UserCodeError as error:
                if self._channel.lost:
                    raise GroupLostError(f"{self._channel.peer} is gone") from error
                raise
            if reply is not None:
                self._channel.send(reply)

    def _carry_out(self, command: RankCommand) -> RankReply | None:
        if command.what == "begin":
            if command.text:
                call_user(self._trainer, "load", Path(command.text))
            return None
        if command.what == "read":
            return self._read(command)
        if command.what == "train":
            return self._train(command)
        if command.what == "weights":
            call_user(self._trainer, "weights")
            return None
        if command.what == "save":
            folder = Path(command.text)
            folder.mkdir(FOLDER_MODE)
            save_into(self._trainer, folder)
            return RankReply()
        raise GroupLostError(f"{self._channel.peer} shared more than this rank asked for")

    def _read(self, command: RankCommand) -> RankReply:
        """Read what was not read ahead."""
        self._reader.wait()
        self._keep(each for each in self._reader.collect() if not isinstance(each.outcome, DrayError))
        references = self._references(command)
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

    def _train(self, command: RankCommand) -> RankReply:
        trajectories = []
        for identity in command.identities:
            version, work_item, metadata = self._about[identity]
            arrays = cast(Arrays, self._found[identity])
            trajectories.append(Trajectory(arrays, version, work_item, decoded_metadata(metadata)))
        self._found.clear()
        self._about.clear()
        self._reader.start(self._references(command), timeout=self._timeout)
        call_user(self._trainer, "train_step", trajectories)
        self._replica.activity.counters.add_all({"payloads_read": len(trajectories), "steps": 1})
        return RankReply()

    def _references(self, command: RankCommand) -> list[PayloadRef]:
        references = [PayloadRef.from_json(text) for text in command.references]
        about = zip(command.versions, command.work_items, command.metadata, strict=True)
        self._about |= {each.id.key: rest for each, rest in zip(references, about, strict=True)}
        return references

    def _keep(self, results: Iterable[Fetched]) -> None:
        for each in results:
            self._found[each.ref.id.key] = each.outcome
