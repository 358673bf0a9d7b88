"""The policy replica: collects a batch of payloads, runs the user's trainer, commits, publishes new weights.

Of several policy replicas the first does all this, and commands the others to read and to train: see `ranks`.
"""

from __future__ import annotations

import logging
import math
import socket
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import numpy as np

from dray.clock import MONOTONIC, Stopwatch
from dray.errors import ControlPlaneError
from dray.jobs.api import PolicyGroup, PolicyTrainer, Trajectory
from dray.jobs.exit_codes import ExitCode
from dray.jobs.folder import finite
from dray.jobs.messages import models
from dray.jobs.messages.channel import GroupLostError, MessageChannel
from dray.jobs.messages.models import OutcomeKind, RankCommand, Role
from dray.jobs.process import leave, shutdown_step
from dray.jobs.queue import RedisUnavailableError, RolloutConsumer
from dray.jobs.replica.base import Replica, run_replica, stop_code
from dray.jobs.replica.checkpoint import (
    CheckpointState,
    find_checkpoint,
    record_committed,
    save_checkpoint,
    trainer_folder,
)
from dray.jobs.replica.delivery import Deliveries, PayloadTracker
from dray.jobs.replica.entry_points import load_entry_point
from dray.jobs.replica.metrics import MEAN_RETURN, MetricsLog, StopCondition, StopMetricError
from dray.jobs.replica.ranks import Batch, KeptArrays, Ranks, RankWorker
from dray.jobs.replica.read_ahead import ReadAhead
from dray.jobs.replica.recording import TrainingRecorder
from dray.jobs.replica.stages import PayloadStages, Stage
from dray.jobs.replica.transfer import TrajectoryReader, WeightsPublisher, policy_ends, rank_reader
from dray.jobs.replica.user_code import (
    UserCodeError,
    call_user,
    carried,
    make_user_object,
    returned_arrays,
    returned_metrics,
    save_into,
)
from dray.payload import Ragged
from dray.payload.trajectory import REWARDS
from dray.text import printable

_LOG = logging.getLogger("dray.jobs.replica.policy")
_COUNTERS = (
    "waited_seconds", "read_seconds", "train_seconds", "stale", "lost", "discarded", "too_old", "dead_letters",
)  # fmt: skip
_TOTALS = (*_COUNTERS, "seconds", "staleness_max", "bytes", "retries")
"""Figures that continue from a checkpoint; the first ones are counters of the activity."""


def work(restarts: int, descriptors: Sequence[int], replica: Replica) -> ExitCode:
    """Everything between registering and unregistering.

    Args:
        restarts: how many times the policy group was started before.
        descriptors: sockets to the other ranks, for rank 0; for the others, the one to rank 0.
    """
    config = replica.spec.config
    first = replica.index == 0
    with ExitStack() as opened:
        peers = [f"policy-{rank}" for rank in (range(1, config.policy.replicas) if first else (0,))]
        channels = [
            opened.enter_context(
                MessageChannel(socket.socket(fileno=descriptor), peer, replica.stop, config.timeouts.shutdown / 2)
            )
            for descriptor, peer in zip(descriptors, peers, strict=True)
        ]
        # Before the channels are closed, by which the other ranks notice.
        opened.push(partial(_leave_at_once, replica))
        ranks = Ranks(channels, config.policy.readers) if first else None
        group = PolicyGroup(
            rank=replica.index,
            size=config.policy.replicas,
            readers=config.policy.readers,
            share=partial(_shared_by, channels[0]) if ranks is None else ranks.share,
        )
        replica.activity.doing("importing the trainer")
        found = load_entry_point("policy.trainer", config.policy.trainer, replica.spec.job_file.parent)
        trainer: PolicyTrainer = make_user_object(found)
        call_user(trainer, "setup", replica.context(dict(config.policy.args), group))
        if ranks is None:
            reader = opened.enter_context(rank_reader(replica))
            replica.stop.disposable = False
            timeout = config.timeouts.read
            return RankWorker(trainer, channels[0], reader, replica.activity, timeout=timeout).run()
        stages = PayloadStages(replica.stages)
        trajectories, weights = opened.enter_context(policy_ends(replica, stages.freed))
        log = opened.enter_context(MetricsLog(replica.spec.folder.metrics))
        record = None if config.policy.record is None else replica.spec.folder.root / config.policy.record
        recorder = opened.enter_context(TrainingRecorder(record, replica.activity, replica.heartbeat))
        return Training(replica, trainer, ranks, trajectories, weights, log, recorder, stages).run(
            may_load=replica.spec.resume or restarts > 0
        )


def _leave_at_once(replica: Replica, _: object, error: BaseException | None, __: object) -> None:
    if isinstance(error, UserCodeError):
        replica.leave_at_once(error)


def _shared_by(channel: MessageChannel, _text: str | None) -> str:
    command = channel.receive(RankCommand)
    if command.what != "share":
        raise GroupLostError(f"{channel.peer} sent another command while this rank waited for a shared text")
    return command.text


class Training:
    """The loop of the first policy replica, and how far it is."""

    def __init__(
        self,
        replica: Replica,
        trainer: PolicyTrainer,
        ranks: Ranks,
        reader: TrajectoryReader,
        weights: WeightsPublisher,
        log: MetricsLog,
        recorder: TrainingRecorder,
        stages: PayloadStages,
    ) -> None:
        self._replica = replica
        self._config = replica.spec.config
        self._trainer = trainer
        self._ranks = ranks
        self._reader = reader
        self._weights = weights
        self._log = log
        self._recorder = recorder
        self._stages = stages
        self._began = MONOTONIC.now()
        self._step = 0
        self._version = 0
        self._next_work_item = replica.spec.first_work_item
        self._saved_step = -1
        self._oldest = 0
        self._earlier: Mapping[str, float] = {}
        self._deliveries: Deliveries
        self._ahead: ReadAhead
        self._stop_condition = StopCondition(self._config.stop, self._config.policy.checkpoint_every)
        self._mistake = ""
        self._not_finite: set[str] = set()
        self._kept = KeptArrays(replica.activity.warn)

    def run(self, *, may_load: bool) -> ExitCode:
        """Train until the job is solved, `max_steps` are done, or the replica must stop.

        Raises:
            OldEpochError: the group has a newer epoch.
            GroupLostError: another rank is gone.
        """
        found = self._find(may_load=may_load)
        state = CheckpointState(0, 0, self._next_work_item) if found is None else found[1]
        self._resume(state)
        self._deliveries = self._open_deliveries(state, self._log.committed if may_load else 0)
        if found is not None:
            record_committed(*found, self._deliveries.committed)
        self._log.cut(self._step)
        self._replica.activity.show_ages(lambda: {"reference": self._queue.oldest_held})
        self._publish_weights()
        try:
            solved = self._train_until_stopped()
        except RedisUnavailableError:
            # What is trained on and not committed stands in the checkpoint.
            self._save()
            raise
        except StopMetricError as error:
            # In order, and with a checkpoint: `--resume` continues from here with the right name.
            self._mistake, solved = str(error), ""
            _LOG.error("%s", error)
        return self._end(solved)

    def _find(self, *, may_load: bool) -> tuple[Path, CheckpointState] | None:
        """The checkpoint to resume from, if there is one; all ranks have loaded it when this returns."""
        found = find_checkpoint(self._replica.spec.folder.checkpoint) if may_load else None
        self._ranks.begin(None if found is None else found[0])
        if found is not None:
            place, state = found
            call_user(self._trainer, "load", trainer_folder(place, 0))
            _LOG.info("resuming from step %d of checkpoint %s", state.step, place)
            self._saved_step = state.step
        return found

    def _resume(self, state: CheckpointState) -> None:
        """Take up the figures of the training that led to `state`."""
        self._step = state.step
        self._next_work_item = max(self._next_work_item, state.next_work_item)
        # No version is given out twice: an earlier epoch may have published some after its last checkpoint.
        newest = self._weights.newest_version()
        self._version = state.weight_version if newest is None else max(state.weight_version, newest + 1)
        self._earlier = {name: state.totals.get(name, 0.0) for name in _TOTALS}
        self._began -= self._earlier["seconds"]
        self._oldest = int(self._earlier["staleness_max"])
        activity = self._replica.activity
        # From the start also what has never happened: a metric that begins at 1 has no increase.
        begun = {name: self._earlier[name] for name in _COUNTERS}
        activity.counters.add_all({**begun, "payloads": state.contributed, "weights_published": 0})
        activity.show_all({"step": self._step, "staleness_max": self._oldest, **self._read_statistics()})

    def _read_statistics(self) -> dict[str, float]:
        """The reader's statistics, which continue from those of the checkpoint."""
        return {name: value + self._earlier.get(name, 0.0) for name, value in self._reader.statistics().items()}

    def _totals(self) -> dict[str, float]:
        """What a checkpoint keeps of the figures, by the names in `_TOTALS`."""
        own = {"seconds": MONOTONIC.now() - self._began, "staleness_max": self._oldest, **self._read_statistics()}
        counters = self._replica.activity.counters
        return {name: own[name] if name in own else counters[name] for name in _TOTALS}

    def _open_deliveries(self, state: CheckpointState, recorded: int) -> Deliveries:
        """Begin an epoch of the group, in which a payload is committed or refused from now on."""
        replica, config = self._replica, self._config
        self._queue = RolloutConsumer(
            replica.redis,
            replica.keys,
            # A name for this epoch alone: an earlier one that wakes is given nothing that would be taken for ours.
            f"{replica.name}.{replica.member.incarnation}",
            max_deliveries=config.policy.max_deliveries,
            remembered=max(65536, config.rollout.slots * config.rollout.replicas),
        )
        deliveries = Deliveries(
            self._queue,
            self._reader.consume,
            replica.heartbeat,
            config,
            state,
            recorded=recorded,
            epoch_file=replica.spec.folder.group_epoch,
            count=replica.activity.counters.add,
            ending=lambda: replica.stop.is_set,
            payloads=PayloadTracker(self._stages.changed),
        )
        replica.stop.disposable = False
        deliveries.open()
        return deliveries

    def _train_until_stopped(self) -> str:
        """Why the job is solved, or nothing."""
        stop, solved = self._replica.stop, ""
        with ReadAhead(
            self._deliveries,
            self._reader.read,
            batch_size=self._config.policy.batch_size,
            parts=self._ranks.parts,
            version=self._version,
            count=self._replica.activity.counters.add,
            ending=lambda: stop.is_set,
            reading=self._stages.reading,
        ) as self._ahead:
            stop.on_set(self._ahead.wake)
            while not solved and not stop.is_set and self._step < self._config.job.max_steps:
                self._recorder.follow_order()
                batch = self._collect()
                if batch is None:
                    break
                solved = self._train(batch)
                if not solved and self._step % self._config.policy.checkpoint_every == 0:
                    self._save()
        return solved

    def _collect(self) -> Batch | None:
        """The next batch, read by all ranks; None when stopped before."""
        size, activity = self._config.policy.batch_size, self._replica.activity

        def show(missing: int) -> None:
            activity.waits(f"{missing} of {size} payloads", "the rollout replicas")

        def on_slice() -> None:
            if not self._replica.stop.is_set:
                self._weights.restore()
                self._kept.check()
                self._recorder.follow_order()

        while (batch := self._ahead.wait(show, on_slice)) is not None:
            reading = Stopwatch()
            activity.doing(f"reading {size} payloads")
            self._ranks.read(batch.by_part())
            failed = self._ranks.failures()
            batch.reading += reading.elapsed
            if not failed:
                self._ahead.begin()
                return batch
            self._ahead.drop(failed)
        return None

    def _train(self, batch: Batch) -> str:
        """One step, its commit and its new weights; returns why the job is solved, or nothing."""
        activity = self._replica.activity
        activity.doing(f"training step {self._step + 1}")
        began = MONOTONIC.now()
        trajectories = [batch.trajectories.pop(each.entry.id) for each in batch.by_part()[0]]
        self._next_work_item = max(self._next_work_item, *(each.entry.work_item + 1 for each in batch.deliveries))
        mean_return = _mean_return(trajectories)
        self._ranks.train(batch, self._ahead.known())
        self._kept.lend(trajectories)
        self._recorder.add(trajectories, self._step + 1)
        metrics = self._train_step(trajectories)
        if self._config.policy.replicas > 1:
            activity.waits("the end of their training step", "the other policy replicas")
        self._ranks.wait()
        trained = MONOTONIC.now()
        self._step += 1
        ages = [self._version - delivery.entry.weight_version for delivery in batch.deliveries]
        # With the weights, whether or not it is committed: a checkpoint stores both.
        self._version += 1
        # The payloads are freed below, and with them the arrays of the batch.
        trajectories.clear()
        self._kept.check()
        activity.waits("the commit", "Redis")
        try:
            self._deliveries.trained(batch.deliveries)
        except RedisUnavailableError:
            # The checkpoint that follows has this step, and so must its line.
            self._record(batch, metrics, mean_return, ages, trained - began)
            raise
        self._record(batch, metrics, mean_return, ages, trained - began)
        self._recorder.flush()
        self._deliveries.freed(frozenset(self._reader.unfreed()))
        activity.show_all(self._deliveries.statistics())
        self._publish_weights()
        self._deliveries.finished(batch.deliveries)
        solved = self._stop_condition.judge(self._step, metrics, mean_return)
        if self._stop_condition.remark:
            activity.warn(self._stop_condition.remark)
        return solved

    def _train_step(self, trajectories: Sequence[Trajectory]) -> dict[str, float]:
        try:
            found = call_user(self._trainer, "train_step", trajectories)
            return returned_metrics(self._trainer, "train_step", found)
        except UserCodeError as error:
            # The error is often only a consequence: another rank is gone.
            try:
                self._ranks.check()
            except GroupLostError as lost:
                raise lost from error
            raise

    def _publish_weights(self) -> None:
        self._replica.activity.doing("publishing weights")
        with self._replica.stages.measuring(Stage.WEIGHTS, self._step):
            self._ranks.weights()
            arrays = returned_arrays(self._trainer, "weights", call_user(self._trainer, "weights"))
            with carried(self._trainer, "weights"):
                self._weights.publish(arrays, self._version, self._queue.epoch)
        self._replica.activity.counters.add("weights_published")

    def _record(
        self,
        batch: Batch,
        metrics: Mapping[str, float],
        mean_return: float | None,
        ages: list[int],
        training: float,
    ) -> None:
        """Write the step's line, and show its figures."""
        activity, statistics = self._replica.activity, self._read_statistics()
        seconds = {"waited_seconds": batch.waited, "read_seconds": batch.reading, "train_seconds": training}
        activity.counters.add_all({"payloads": len(batch.deliveries), **seconds})
        staleness = float(np.mean(ages))
        self._oldest = max(self._oldest, *ages)
        own = {} if mean_return is None else {MEAN_RETURN: mean_return}
        activity.show_all({"step": self._step, "staleness": staleness, "staleness_max": self._oldest})
        activity.show_all({**own, **statistics, "transfer": self._reader.transfer, "lane": self._reader.lane})
        activity.show_metrics(metrics)
        self._warn_of_not_finite({f"the metric {name!r} of train_step": value for name, value in metrics.items()})
        self._warn_of_not_finite({f"{name}, the mean sum of rewards,": value for name, value in own.items()})
        line = {
            "step": self._step,
            "seconds": round(MONOTONIC.now() - self._began, 3),
            "payloads": int(activity.counters["payloads"]),
            "committed": self._deliveries.committed,
            "bytes": int(statistics.get("bytes", 0)),
            "staleness_mean": staleness,
            "staleness_max": max(ages),
            **{name: round(value, 4) for name, value in seconds.items()},
            **finite(own),
            "metrics": finite(metrics),
        }
        try:
            self._log.write(line)
        except OSError as error:
            # The line is kept, and written with the next one as soon as there is space.
            activity.warn(f"{self._replica.spec.folder.metrics.name} cannot be written ({error.strerror})")

    def _warn_of_not_finite(self, values: Mapping[str, float]) -> None:
        for what, value in values.items():
            if not math.isfinite(value) and what not in self._not_finite:
                self._not_finite.add(what)
                self._replica.activity.warn(f"{what} is {value:g} at step {self._step}")

    def _save(self, outcome: str = "") -> None:
        """Write a checkpoint, unless there is one of this step, and commit what waited for it."""
        if self._saved_step == self._step and not outcome:
            return
        self._replica.activity.doing("writing a checkpoint")
        try:
            self._queue.check_epoch(self._config.timeouts.redis)
        except RedisUnavailableError as error:
            _LOG.warning(
                "writing a checkpoint although it is unknown whether the group has a newer epoch: %s", error
            )
        state = CheckpointState(
            step=self._step,
            weight_version=self._version,
            next_work_item=self._next_work_item,
            outcome=outcome,
            contributed=self._deliveries.contributed,
            committed=self._deliveries.committed,
            unconfirmed=self._deliveries.unconfirmed,
            unfreed=tuple(each.key for each in self._reader.unfreed()),
            ranks=self._config.policy.replicas,
            totals=self._totals(),
        )
        writing = Stopwatch()
        with self._replica.stages.measuring(Stage.CHECKPOINT, self._step):
            self._log.sync()
            save_checkpoint(self._replica.spec.folder.checkpoint, state, self._save_trainers)
        self._saved_step = self._step
        _LOG.info("checkpoint of step %d written in %.2f s", self._step, writing.elapsed)
        self._deliveries.commit()

    def _save_trainers(self, folder: Path) -> None:
        self._ranks.save(folder.parent)
        save_into(self._trainer, folder)
        self._ranks.wait()

    def _show_last(self) -> None:
        self._replica.activity.show_all(self._read_statistics())
        try:
            self._replica.activity.show_all(self._deliveries.statistics(now=True))
        except ControlPlaneError as error:
            _LOG.warning("the last figures of the stream are missing: %s", error)

    def _end(self, solved: str) -> ExitCode:
        kind, reason, code = self._outcome(solved)
        stop, timeouts = self._replica.stop, self._config.timeouts
        if stop.is_set:
            _LOG.info("shutdown: received no more and ended the step at hand, which took %.2f s", stop.since)
        with shutdown_step("write a checkpoint", "the trainer's save", timeouts.shutdown):
            self._save(str(kind) if code is ExitCode.OK else "")
        self._show_last()
        if kind is not None:
            with shutdown_step("report the outcome", "the controller", timeouts.http):
                self._replica.member.post(
                    "/finish",
                    models.Finish,
                    models.Directive,
                    kind=kind,
                    reason=printable(reason, models.MAX_SENTENCE),
                )
        self._replica.leaving_reason = reason
        self._ranks.end()
        return code

    def _outcome(self, solved: str) -> tuple[OutcomeKind | None, str, ExitCode]:
        stop = self._replica.stop
        if self._mistake:
            return "failed", self._mistake, ExitCode.FAILED
        if solved:
            return "solved", solved, ExitCode.OK
        if self._step >= self._config.job.max_steps:
            if self._config.stop is None:
                return "finished", f"all {self._step} steps are done", ExitCode.OK
            remark = self._stop_condition.never_returned
            reason = f"not solved within {self._step} steps{remark and f': {remark}'}"
            return "max_steps", reason, ExitCode.FAILED
        if stop.exit_code in (ExitCode.SIGINT, ExitCode.SIGTERM):
            return "interrupted", stop.reason, ExitCode(stop.exit_code)
        return None, stop.reason, stop_code(stop, ExitCode.FAILED)


def _mean_return(trajectories: list[Trajectory]) -> float | None:
    """The figure `MEAN_RETURN`; None where no payload has rewards. Each row of ragged rewards is an episode."""
    rewards = [each.arrays.get(REWARDS) for each in trajectories]
    episodes = [row for found in rewards for row in (found if isinstance(found, Ragged) else [found])]
    returns = [float(np.sum(each, dtype=np.float64)) for each in episodes if isinstance(each, np.ndarray)]
    return float(np.mean(returns)) if returns else None


def main() -> int:
    """``python -m dray.jobs.replica.policy SPEC INDEX [RESTARTS DESCRIPTOR …]``"""
    restarts, *descriptors = map(int, sys.argv[3:] or ["0"])
    return run_replica(Role.POLICY, partial(work, restarts, descriptors))


if __name__ == "__main__":
    leave(main())
