"""The job file: TOML, parsed once and strictly, into frozen typed tables.

`tables` says what is allowed, `reading` turns a file into a `JobConfig`, or into a `JobDraft` with every mistake.
"""

from dray.config.reading import MAX_MISTAKES, JobDraft, draft_job, load_job, parse_job
from dray.config.tables import ENTRY_POINT_FORM, JOB_NAME_FORM, JobConfig, LogLevel, SlurmTable, is_job_name

__all__ = [
    "ENTRY_POINT_FORM",
    "JOB_NAME_FORM",
    "MAX_MISTAKES",
    "JobConfig",
    "JobDraft",
    "LogLevel",
    "SlurmTable",
    "draft_job",
    "is_job_name",
    "load_job",
    "parse_job",
]
