"""The policy replica: collects a batch of payloads, runs the user's trainer, commits, publishes new weights."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import IO

import numpy as np

from dray.clock import MONOTONIC, Deadline
from dray.control import Delivery, RolloutConsumer
from dray.errors import DrayError, StaleSlotError
from dray.payload.trajectory import REWARDS
from dray.runtime import messages
from dray.runtime.checkpoint import CheckpointState, find_checkpoint, save_checkpoint
from dray.runtime.contract import PolicyTrainer, Trajectory
from dray.runtime.entry_point import load_entry_point
from dray.runtime.exit_codes import ExitCode
from dray.runtime.membership import OutcomeKind, Role
from dray.runtime.process import leave
from dray.runtime.replica import Replica, run_replica, stop_code, user_code
from dray.runtime.shutdown_step import shutdown_step
from dray.runtime.transfer import Inlet, WeightsOutlet
from dray.runtime.transfer_choice import open_inlet

_LOG = logging.getLogger("dray.runtime.policy")
_SLICE = 0.5


@dataclass(slots=True)
class Batch:
    """What one training step learns from, and what it took to get it; seconds."""

    deliveries: list[Delivery] = field(default_factory=list)
    trajectories: list[Trajectory] = field(default_factory=list)
    waited: float = 0.0
    reading: float = 0.0


def work(replica: Replica) -> ExitCode:
    """Everything between registering and unregistering."""
    config = replica.spec.config.policy
    replica.activity.doing("importing the trainer")
    trainer_class = load_entry_point("policy.trainer", config.trainer, replica.spec.job_file.parent)
    with user_code("setup"):
        trainer: PolicyTrainer = trainer_class()
        trainer.setup(replica.context(dict(config.args)))
    with open_inlet(replica) as (inlet, weights), replica.spec.folder.metrics.open("a", encoding="utf-8") as log:
        return Training(replica, trainer, inlet, weights, log).run()


class Training:
    """The loop of one policy replica, and how far it is."""

    def __init__(
        self, replica: Replica, trainer: PolicyTrainer, inlet: Inlet, weights: WeightsOutlet, log: IO[str]
    ) -> None:
        self._replica = replica
        self._config = replica.spec.config
        self._trainer = trainer
        self._inlet = inlet
        self._weights = weights
        self._log = log
        self._queue = RolloutConsumer(replica.redis, replica.keys, replica.name)
        self._began = MONOTONIC.now()
        self._step = 0
        self._version = 0
        self._next_prompt = replica.spec.first_prompt
        self._saved_step = -1

    def run(self) -> ExitCode:
        """Train until the job is solved, `max_steps` is over, or the replica must stop."""
        self._resume()
        self._replica.stop.disposable = False
        self._queue.attach()
        self._replica.activity.show_ages(lambda: {"reference": self._queue.oldest_held})
        self._publish_weights()
        stop, solved = self._replica.stop, ""
        while not solved and not stop.is_set and self._step < self._config.job.max_steps:
            batch = self._collect()
            if batch is None:
                break
            solved = self._train(batch)
            if not solved and self._step % self._config.policy.checkpoint_every == 0:
                self._save()
        return self._end(solved)

    def _resume(self) -> None:
        if not self._replica.spec.resume:
            return
        found = find_checkpoint(self._replica.spec.folder.checkpoint)
        if found is None:
            return
        place, state = found
        with user_code("load"):
            self._trainer.load(place / "trainer")
        self._step, self._version, self._saved_step = state.step, state.weight_version, state.step
        self._next_prompt = max(self._next_prompt, state.next_prompt)
        _LOG.info("goes on from step %d of %s", self._step, place)

    def _collect(self) -> Batch | None:
        """Receive and read until there is a whole batch; None when stopped before."""
        batch, size = Batch(), self._config.policy.batch_size
        activity = self._replica.activity
        while len(batch.deliveries) < size:
            if self._replica.stop.is_set:
                return None
            missing = size - len(batch.deliveries)
            activity.waits(f"{missing} of {size} payloads", "the rollout replicas")
            began = MONOTONIC.now()
            deliveries = self._queue.receive(missing, timeout=_SLICE)
            received = MONOTONIC.now()
            if deliveries:
                activity.doing(f"reading {len(deliveries)} payloads")
                self._read(deliveries, batch)
                batch.reading += MONOTONIC.now() - received
            elif not self._replica.stop.is_set:
                self._weights.restore()
            batch.waited += received - began
        return batch

    def _read(self, deliveries: list[Delivery], batch: Batch) -> None:
        failed: list[Delivery] = []
        for delivery, arrays in self._inlet.read(deliveries):
            entry = delivery.entry
            self._next_prompt = max(self._next_prompt, entry.prompt + 1)
            if isinstance(arrays, DrayError):
                kind = "stale" if isinstance(arrays, StaleSlotError) else "lost"
                self._replica.activity.counters.add(kind)
                _LOG.warning("rollout of prompt %d by %s is %s: %s", entry.prompt, entry.replica, kind, arrays)
                failed.append(delivery)
            else:
                batch.deliveries.append(delivery)
                batch.trajectories.append(Trajectory(arrays, entry.weight_version))
        if failed:
            self._queue.discard(failed, timeout=self._config.timeouts.redis)
            self._inlet.consume(failed)
            self._replica.heartbeat.settled(delivery.entry.prompt for delivery in failed)

    def _train(self, batch: Batch) -> str:
        """One step, its commit and its new weights; returns why the job is solved, or nothing."""
        activity = self._replica.activity
        activity.doing(f"training step {self._step + 1}")
        began = MONOTONIC.now()
        mean_return = _mean_return(batch.trajectories)
        with user_code("train_step"):
            metrics = {name: float(value) for name, value in self._trainer.train_step(batch.trajectories).items()}
        trained = MONOTONIC.now()
        self._step += 1
        ages = [self._version - trajectory.weight_version for trajectory in batch.trajectories]
        # The payloads are freed below, and with them the arrays of the batch.
        batch.trajectories.clear()
        activity.waits("the commit", "Redis")
        self._queue.commit(batch.deliveries, timeout=self._config.timeouts.redis)
        self._inlet.consume(batch.deliveries)
        self._replica.heartbeat.settled(delivery.entry.prompt for delivery in batch.deliveries)
        self._version += 1
        self._publish_weights()
        if mean_return is not None:
            metrics.setdefault("mean_return", mean_return)
        self._record(batch, metrics, ages, trained - began)
        stop = self._config.stop
        reached = None if stop is None else metrics.get(stop.metric)
        if stop is None or reached is None or not reached >= stop.at_least:
            return ""
        return f"{stop.metric} {reached:g} >= {stop.at_least:g} at step {self._step}"

    def _publish_weights(self) -> None:
        self._replica.activity.doing("publishing weights")
        with user_code("weights"):
            arrays = self._trainer.weights()
        self._weights.publish(arrays, self._version)

    def _record(self, batch: Batch, metrics: Mapping[str, float], ages: list[int], training: float) -> None:
        activity, statistics = self._replica.activity, self._inlet.statistics()
        activity.counters.add_all(
            {
                "payloads": len(batch.deliveries),
                "waited_seconds": batch.waited,
                "read_seconds": batch.reading,
                "train_seconds": training,
            }
        )
        staleness = float(np.mean(ages))
        for name, value in (("step", self._step), ("staleness", staleness), *statistics.items(), *metrics.items()):
            activity.show(name, float(value))
        activity.show("lane", self._inlet.lane)
        line = {
            "step": self._step,
            "seconds": round(MONOTONIC.now() - self._began, 3),
            "payloads": int(activity.counters["payloads"]),
            "bytes": int(statistics.get("bytes", 0)),
            "staleness_mean": staleness,
            "staleness_max": max(ages),
            "waited_seconds": round(batch.waited, 4),
            "read_seconds": round(batch.reading, 4),
            "train_seconds": round(training, 4),
            "metrics": metrics,
        }
        self._log.write(json.dumps(line) + "\n")
        self._log.flush()

    def _save(self, outcome: str = "") -> None:
        if self._saved_step == self._step and not outcome:
            return
        self._replica.activity.doing("writing a checkpoint")
        state = CheckpointState(self._step, self._version, self._next_prompt, outcome)
        deadline = Deadline.after(None)
        with user_code("save"):
            save_checkpoint(self._replica.spec.folder.checkpoint, state, self._trainer.save)
        self._saved_step = self._step
        _LOG.info("checkpoint of step %d written in %.2f s", self._step, deadline.elapsed)

    def _end(self, solved: str) -> ExitCode:
        kind, reason, code = self._outcome(solved)
        stop, timeouts = self._replica.stop, self._config.timeouts
        if stop.is_set:
            _LOG.info("shutdown: received no more and ended the step at hand, which took %.2f s", stop.since)
        with shutdown_step("write a checkpoint", "the trainer's save", timeouts.shutdown):
            self._save(str(kind) if code is ExitCode.OK else "")
        if kind is not None:
            body = messages.Finish(
                name=self._replica.name, incarnation=self._replica.incarnation, kind=kind, reason=reason
            )
            with shutdown_step("report the outcome", "the controller", timeouts.http):
                self._replica.client.post("/finish", body, messages.Directive)
        self._replica.leaving_reason = reason
        return code

    def _outcome(self, solved: str) -> tuple[OutcomeKind | None, str, ExitCode]:
        stop = self._replica.stop
        if solved:
            return "solved", solved, ExitCode.OK
        if self._step >= self._config.job.max_steps:
            if self._config.stop is None:
                return "finished", f"all {self._step} steps are done", ExitCode.OK
            return "max_steps", f"not solved within {self._step} steps", ExitCode.FAILED
        if stop.exit_code in (ExitCode.SIGINT, ExitCode.SIGTERM):
            return "interrupted", stop.reason, ExitCode(stop.exit_code)
        return None, stop.reason, stop_code(stop, ExitCode.FAILED)


def _mean_return(trajectories: list[Trajectory]) -> float | None:
    returns = [float(np.sum(each.arrays[REWARDS])) for each in trajectories if REWARDS in each.arrays]
    return float(np.mean(returns)) if returns else None


def main() -> int:
    """``python -m dray.runtime.policy SPEC INDEX``"""
    return run_replica(Role.POLICY, work)


if __name__ == "__main__":
    leave(main())
