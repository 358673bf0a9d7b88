"""Recordings: payloads of a stream or of a job in files, to read and to replay them."""

from __future__ import annotations

from dray.recording.files import RecordedPayload
from dray.recording.reader import Recording
from dray.recording.recorder import Recorder, record
from dray.recording.replay import replay

__all__ = ["RecordedPayload", "Recorder", "Recording", "record", "replay"]
