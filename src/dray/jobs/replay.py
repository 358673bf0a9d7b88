"""`ReplayWorker`: a job whose payloads come from a recording instead of rollouts, to debug a trainer."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dray.errors import ConfigError
from dray.jobs.api import ReplicaContext, Rollout, WorkItem
from dray.recording import Recording


class ReplayWorker:
    """A rollout worker that returns the payloads of a recording in their order, after the last the first.

    ```toml
    [rollout]
    worker = "dray.jobs.replay:ReplayWorker"
    replicas = 1                     # with one replica, batches are those of the recording
    args = { recording = "outputs/grpo/1/recording" }
    ```

    Work item i is payload i modulo their number. Metadata that was recorded comes with it; the version of the
    weights is the one that the replica has.
    """

    def setup(self, context: ReplicaContext) -> None:
        """Open the recording."""
        folder = context.args.get("recording")
        if not isinstance(folder, str):
            raise ConfigError("rollout.args.recording", folder, "the folder of a recording")
        self.recording = Recording(Path(folder).expanduser())

    def load_weights(self, weights: Mapping[str, Any], version: int) -> None:
        """Weights are not used."""

    def rollout(self, work_item: WorkItem) -> Rollout:
        """The payload of the recording that is the work item's."""
        found = self.recording[work_item.index % len(self.recording)]
        metadata = found.about.get("metadata")
        return Rollout(found.values, metadata if isinstance(metadata, Mapping) else {})
