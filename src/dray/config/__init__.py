"""The job file: TOML, parsed once and strictly, into frozen typed tables.

`tables` says what is allowed, `reading` turns a file into a `JobConfig` or into one `ConfigError`.
"""

from dray.config.reading import load_job, parse_job
from dray.config.tables import ENTRY_POINT_FORM, JobConfig, LogLevel, SlurmTable

__all__ = ["ENTRY_POINT_FORM", "JobConfig", "LogLevel", "SlurmTable", "load_job", "parse_job"]
