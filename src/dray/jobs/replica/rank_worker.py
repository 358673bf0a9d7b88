"""A policy replica that is not the first of its group: it carries out the commands of the first rank."""

from __future__ import annotations

from pathlib import Path

from dray.errors import OutOfResources, StaleSlotError
from dray.jobs.api import PolicyTrainer, Trajectory
from dray.jobs.exit_codes import ExitCode
from dray.jobs.files import FOLDER_MODE
from dray.jobs.messages.channel import GroupLostError, MessageChannel
from dray.jobs.messages.models import RankCommand, RankReply
from dray.jobs.replica.base import Replica
from dray.jobs.replica.ranks import Failure
from dray.jobs.replica.user_code import UserCodeError, call_user, save_into
from dray.protocol import PayloadRef
from dray.transport import PayloadClient


class RankWorker:
    """Carries out the commands of the first rank until the command to end.

    It does not end by itself when the job does: it would be missing in the first rank's last step.
    """

    def __init__(
        self, replica: Replica, trainer: PolicyTrainer, channel: MessageChannel, client: PayloadClient
    ) -> None:
        self._replica = replica
        self._trainer = trainer
        self._channel = channel
        self._client = client
        self._read_so_far: dict[str, Trajectory] = {}

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
            return self._train(command.identities)
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
        references = [PayloadRef.from_json(text) for text in command.references]
        versions = {each.identity: version for each, version in zip(references, command.versions, strict=True)}
        failed: dict[str, Failure] = {}
        results = self._client.read_many(
            references, timeout=self._replica.spec.config.timeouts.read, consume=False, return_errors=True
        )
        for result in results:
            reference, error = result.ref, result.error
            identity = f"{reference.producer.hex()}:{reference.sequence}"
            if isinstance(error, OutOfResources):
                raise error  # of this process: the payload is there, and is delivered again
            if error is not None:
                failed[identity] = "stale" if isinstance(error, StaleSlotError) else "lost"
            else:
                self._read_so_far[identity] = Trajectory(result.payload, versions[reference.identity])
        return RankReply(failed=failed)

    def _train(self, identities: list[str]) -> RankReply:
        trajectories = [self._read_so_far[identity] for identity in identities]
        self._read_so_far.clear()
        call_user(self._trainer, "train_step", trajectories)
        self._replica.activity.counters.add_all({"payloads_read": len(trajectories), "steps": 1})
        return RankReply()
