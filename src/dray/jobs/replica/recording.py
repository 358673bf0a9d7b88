"""What the policy replica records of the payloads that it trains on: all of them with `policy.record`, else those
of the steps during which an order of `dray record` stands. Orders come with the answers to heartbeats."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from dray.errors import ConfigError, OutputError, PayloadError
from dray.jobs.api import Trajectory
from dray.jobs.messages.models import MAX_SENTENCE, RecordingOrder, RecordingReport
from dray.jobs.replica.heartbeat import Activity, Heartbeat
from dray.recording import Recorder
from dray.resources import Closing
from dray.text import printable

_ERRORS = (ConfigError, OutputError, PayloadError)
"""Of a `Recorder`. The job continues without a recording that cannot be written."""

_LOG = logging.getLogger("dray.jobs.replica.recording")


class TrainingRecorder(Closing):
    """Records payloads before the trainer gets them. A context manager; for the training thread.

    Args:
        folder: of `policy.record`; without this key it is None, and orders are followed.
        activity: is shown reports on an order, and warned if `folder` cannot be written any more.
        heartbeat: has the order.

    Raises:
        ConfigError: another recorder writes into `folder`.
        OutputError: `folder` cannot be written.
    """

    def __init__(self, folder: Path | None, activity: Activity, heartbeat: Heartbeat) -> None:
        self._activity = activity
        self._heartbeat = heartbeat
        self._follows_orders = folder is None
        self._recorder = None if folder is None else Recorder(folder)
        self._order: RecordingOrder | None = None
        self._report: RecordingReport | None = None
        self._step = 0

    def follow_order(self) -> None:
        """Begin or end the recording that an order asks for. To be called between two steps."""
        order = self._heartbeat.recording
        if order is None or not self._follows_orders:
            return
        if self._order is None or order.id != self._order.id:
            self._end()
            self._order, self._report = order, RecordingReport(id=order.id, first=order.first)
            if not order.end or order.first is not None:  # which an earlier replica has not reported as ended
                self._begin(order)
        if order.end:
            self._end()

    def add(self, trajectories: Sequence[Trajectory], step: int) -> None:
        """Add the payloads of training step `step`. `flush` writes them as they are now."""
        self._step = step
        if self._recorder is None:
            return
        with self._ended_by_errors():
            for each in trajectories:
                about = {
                    "step": step,
                    "work_item": each.work_item,
                    "weight_version": each.weight_version,
                    "metadata": dict(each.metadata),
                }
                self._recorder.append(each.arrays, about=about)

    def flush(self) -> None:
        """Write the payloads of a step, which is committed."""
        if self._recorder is None:
            return
        with self._ended_by_errors():
            self._recorder.flush()
            self._show(self._recorder)
        wanted = None if self._order is None else self._order.payloads
        if wanted is not None and self._report is not None and self._report.payloads >= wanted:
            self._end()

    def close(self) -> None:
        """Write what was added, and end. Twice is fine."""
        self._end()

    def _begin(self, order: RecordingOrder) -> None:
        with self._ended_by_errors():
            self._recorder = Recorder(
                order.folder,
                max_bytes=order.max_bytes,
                file_bytes=order.file_bytes,
                when_full="stop" if order.stop_when_full else "remove",
            )
            self._show(self._recorder)
            self._heartbeat.report_now()
            _LOG.info("recording into %s, as ordered by `dray record`", printable(order.folder))

    def _show(self, recorder: Recorder) -> None:
        """Report what is on the disk, if there is an order."""
        if self._report is None:
            return
        first = recorder.next_number if self._report.first is None else self._report.first
        written = max(0, recorder.next_number - first)
        self._report = self._report.model_copy(
            update={"first": first, "payloads": written, "removed": recorder.removed}
        )
        self._activity.show_recording(self._report)

    def _end(self, problem: str = "") -> None:
        """End the recording, if there is one; `problem` is the error that ends it."""
        recorder, self._recorder = self._recorder, None
        if recorder is not None:
            try:
                recorder.close()
            except _ERRORS as error:
                problem = problem or str(error)
            self._show(recorder)
        if problem:
            line = f"nothing more is recorded, from step {self._step}: {problem}"
            if self._order is None:
                self._activity.warn(line)
            else:  # shown by the command that gave the order
                _LOG.warning("%s", line)
        if self._report is not None and not self._report.ended:
            self._report = self._report.model_copy(
                update={"ended": True, "problem": printable(problem, MAX_SENTENCE)}
            )
            self._activity.show_recording(self._report)
            self._heartbeat.report_now()

    @contextmanager
    def _ended_by_errors(self) -> Iterator[None]:
        try:
            yield
        except _ERRORS as error:
            self._end(str(error))
