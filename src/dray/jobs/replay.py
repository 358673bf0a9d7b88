"""`ReplayWorker`: a job whose payloads come from a recording instead of rollouts, to debug a trainer."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dray.errors import ConfigError
from dray.jobs.api import ReplicaContext, Rollout, WorkItem
from dray.recording import Recording


class ReplayWorker:
    """The rollout worker of a job with `work.replay`: payloads of a recording in their order, then from the first.

    Metadata that was recorded comes with a payload; the version of the weights is the one that the replica has.
    """

    def setup(self, context: ReplicaContext) -> None:
        """Open the recording."""
        self.recording = Recording(Path(context.args["recording"]))
        if not len(self.recording):
            raise ConfigError("work.replay", str(self.recording.folder), "a recording with payloads")
        self.payloads = context.args["payloads_per_work_item"]

    def load_weights(self, weights: Mapping[str, Any], version: int) -> None:
        """Weights are not used."""

    def rollout(self, work_item: WorkItem) -> list[Rollout]:
        """The next payloads of the recording: one, or `rollout.payloads_per_work_item`."""
        first = work_item.index * self.payloads
        return [self._rollout((first + each) % len(self.recording)) for each in range(self.payloads)]

    def _rollout(self, number: int) -> Rollout:
        found = self.recording[number]
        metadata = found.about.get("metadata")
        return Rollout(found.values, metadata if isinstance(metadata, Mapping) else {})
