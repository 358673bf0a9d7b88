"""Job files and overrides: a configuration that survives the way to the processes of a job, or one `ConfigError`
with a short line for each mistake.

The input is a job file; lines after a NUL byte are overrides. A first byte of 0xff stands for a whole valid file,
so that the fuzzer need not find one.
"""

import functools
import json
import tempfile
from pathlib import Path

from dray.errors import ConfigError
from dray.jobs.config import TABLES, JobConfig
from dray.jobs.job_file import MAX_MISTAKES, JobDraft, draft_job

WHOLE = b"\xff"
WHOLE_FILE = b"""
[job]
name = "fuzz"
max_steps = 3
[policy]
trainer = "job.py:Trainer"
batch_size = 4
[rollout]
worker = "job.py:Worker"
slots = 8
"""
SEEDS = [
    WHOLE,
    WHOLE_FILE,
    WHOLE
    + b"replicas = 4\nargs = {depth = [1, 2], name = 'x', rate = 1e-3, on = true}\n[redis]\nurl='redis://h:1'\n",
    WHOLE + b"[stop]\nmetric = 'return'\nat_least = 450\n[timeouts]\nread = 1.5\n[controller]\ndead_after = 3\n",
    WHOLE + b"args = {when = 1979-05-27T07:32:00Z, day = 1979-05-27, at = 07:32:00}\n",
    WHOLE + b"args = {far = inf, none = nan}\n",
    WHOLE + b"slot_bytes = 0x" + b"f" * 64 + b"\n",
    WHOLE + b"replicas = " + b"9" * 5000 + b"\n",
    WHOLE + b"args = 0x" + b"f" * 5000 + b"\n",
    WHOLE + b"args = " + b"[" * 2000 + b"\n",
    WHOLE + b'"a\\nb" = 1\n',
    WHOLE + b"['a.b']\nc = 1\n",
    WHOLE + b"[[job]]\n",
    WHOLE + b"[[stop]]\nmetric = 3\n",
    WHOLE + b"slots = 2\n",
    WHOLE + b"\0job.lane=tcp\nrollout.args.depth=[1, 2]",
    WHOLE + b"\0job.sede=3",
    WHOLE + b"\0job.sede=3\njob.lane=rdma\nlane\npolicy.args.x=nan\npolicy.x=inf",
    WHOLE + b"\0job=3",
    WHOLE + b"\0rollout.args.x=" + b"[" * 2000,
    WHOLE + b"\0stop.at_least=nan\nstop.metric=a",
    b"\xff\xfe\xfd",
]


@functools.cache
def _folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="fuzz-config-")


def run(data: bytes) -> None:
    text, _, overrides = data.partition(b"\0")
    if text.startswith(WHOLE):
        text = WHOLE_FILE + text[1:]
    path = Path(_folder().name) / "job.toml"
    path.write_bytes(text)
    try:
        draft = draft_job(path, overrides.decode(errors="surrogateescape").splitlines())
        _check_draft(draft)
        config = draft.checked()
    except ConfigError as error:
        _check(error)
        return
    assert config.work_items_in_flight * config.payloads_of_work_item >= config.policy.batch_size
    # As a job's processes get it; see JobSpec.
    written = json.dumps(config.model_dump(mode="json"))
    assert JobConfig.model_validate(json.loads(written)) == config


def _check_draft(draft: JobDraft) -> None:
    """Each key that is known has a value; a key is unknown only if there is a mistake."""
    assert bool(draft.unusable) <= bool(draft.mistakes)
    for name, table in TABLES.items():
        found = getattr(draft.config, name, None)
        for key in table.model_fields:
            if draft.knows(f"{name}.{key}") and (found is not None or name not in ("work", "stop", "slurm")):
                getattr(found, key)


def _check(error: ConfigError) -> None:
    """A line for each mistake, and no more lines than a person reads."""
    assert str(error).split("\n") == [each.message for each in error.mistakes]
    assert 1 <= len(error.mistakes) <= MAX_MISTAKES
    for mistake in error.mistakes:
        line = mistake.message
        assert line.isprintable(), line
        assert mistake.key
        assert mistake.allowed
        assert line.startswith(mistake.key)
        assert mistake.allowed in line
        assert len(line) < 2000, len(line)
