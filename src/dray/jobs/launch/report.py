"""What a run leaves behind for its reader: `summary.json` and a plot, `returns.png` unless it has another name."""

from __future__ import annotations

import io
import logging
import math
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from types import MappingProxyType
from typing import Any

import numpy as np

from dray.errors import ConfigError
from dray.files import write_json, write_whole
from dray.jobs.config import JobConfig
from dray.jobs.controller.state import FINISHED_OUTCOMES, FIRST_POLICY
from dray.jobs.exit_codes import USER_CODES, ExitCode
from dray.jobs.folder import JobFolder, finite, short_path
from dray.jobs.launch.bottleneck import bottleneck, figures_of
from dray.jobs.launch.stage_table import read_trace, stage_table
from dray.jobs.messages.models import Phase, Role, Status
from dray.jobs.replica.metrics import MEAN_RETURN, read_metrics
from dray.text import printable, printable_value

_LOG = logging.getLogger("dray.jobs.launch.report")
_MAX_LABEL = 80
_LINE = "#2a6f97"
_RAW = "#a9c6d9"
_DELIVERY = ("published", "trained", "rolled_back", "discarded", "too_old", "repeated", "trimmed", "dead_letters")
_EVALUATION = "#c8553d"
_SECONDS = {
    "waited_seconds": "policy_waited_seconds",
    "read_seconds": "read_seconds",
    "train_seconds": "train_seconds",
}
"""Figure of the policy, and its name in the summary."""
_WEIGHTS = {
    "loaded": "weight_payloads",
    "in_place": "weights_in_place",
    "deltas": "weight_deltas",
    "bytes": "weight_bytes",
    "received_bytes": "weight_received_bytes",
}
"""Name in the summary, and the figure of each rollout replica that is summed up."""


def write_report(
    folder: JobFolder,
    config: JobConfig,
    status: Status | None,
    *,
    seconds: float,
    exit_code: int,
    reason: str,
    first_step: int,
    age: float | None = None,
    heirs: Mapping[str, int] = MappingProxyType({}),
) -> list[str]:
    """Write both files and return the lines with which `dray run` ends: its bottleneck, where that is known, and
    its outcome.

    A file that cannot be written, as on a full disk, is a warning and a remark in the last line: the checkpoint
    and the outcome of the job stand without it.

    Args:
        status: the job's last status, if there was one.
        seconds: how long the run took.
        reason: why it ended.
        first_step: the step that the run resumed from.
        age: seconds since the controller last answered, where it was gone before it could write the last status.
        heirs: what agents have inherited of killed rollout replicas.
    """
    age = None if age is None else round(age, 2)
    if status is None:
        status = Status(
            job=config.job.name, phase=Phase.FAILED, seconds=0.0, outcome=None, members=[], work_items={}
        )
    outcome = status.outcome
    steps = read_metrics(folder.metrics)
    last = steps[-1]["step"] if steps else first_step
    stages = _stages(folder, config)
    figures = figures_of(config, status, [line for line in steps if line["step"] > first_step], stages)
    limit = [bottleneck(figures)] if stages and figures is not None else []
    summary = {
        "job": config.job.name,
        "solved": config.stop is not None and outcome is not None and outcome.kind == "solved",
        "exit_code": int(exit_code),
        "exit_reason": reason,
        "steps": last,
        "steps_of_this_run": last - first_step,
        "seconds": round(seconds, 2),
        "figures_age": age,
        **_counters(status),
        "heirs": dict(heirs),
        "stages": stages,
        "metrics": _last_metrics(steps),
    }
    remarks = [
        *_remark("no summary", partial(write_json, folder.summary, summary), OSError),
        # Whatever a library of plots raises, the run is over and has its outcome.
        *_remark("no plot", partial(_plot, folder, config, steps), Exception),
    ]
    finished = outcome is not None and outcome.kind in FINISHED_OUTCOMES
    if summary["solved"]:
        head = "solved"
    elif finished or exit_code in USER_CODES | {ExitCode.FAILED}:
        head = "finished" if exit_code == 0 else "not solved" if finished else "failed"
    else:
        head = "stopped"
    old = "" if age is None else f" (its figures may be {age:.1f} s old: the controller was gone before the end)"
    place = short_path(folder.root) + (f" ({'; '.join(remarks)})" if remarks else "") + old
    detail = reason.removeprefix("not solved ") if head == "not solved" else reason
    return [*limit, f"{head}{' ' if head == 'not solved' else ': '}{detail}, after {seconds:.1f} s; see {place}"]


def _stages(folder: JobFolder, config: JobConfig) -> dict[str, dict[str, float]]:
    """The table of stages; empty where none were written."""
    if not config.job.trace:
        return {}
    try:
        return stage_table(read_trace(folder))
    except ConfigError:
        return {}  # no sampled payload was handed on
    except OSError as error:
        _LOG.warning("the stages of payloads cannot be read (%s)", error)
        return {}


def _remark(missing: str, write: Callable[[], None], expected: type[Exception]) -> Iterator[str]:
    """Call `write`; if it raises what is `expected`, a warning, and a remark that something is `missing`."""
    try:
        write()
    except expected as error:
        if isinstance(error, ModuleNotFoundError) and error.name == "matplotlib":
            yield f"{missing}: matplotlib is not installed"
            return
        _LOG.warning("%s", missing, exc_info=not isinstance(error, OSError))
        yield f"{missing}: {getattr(error, 'strerror', None) or printable_value(error)}"


def _counters(status: Status) -> dict[str, Any]:
    members, policy = status.members, status.progress(FIRST_POLICY)
    rollouts = {member.name: member.progress for member in members if member.role is Role.ROLLOUT}
    own = finite({name: policy.counters[name] for name in (MEAN_RETURN, *_SECONDS) if name in policy.counters})
    return {
        "transfer": policy.labels.get("transfer", ""),
        **{name: policy.labels[name] for name in ("lane",) if name in policy.labels},
        **{name: own[name] for name in (MEAN_RETURN,) if name in own},
        **{name: policy.count(name) for name in ("payloads", "bytes", "stale", "lost", "retries")},
        **{shown: round(own.get(name) or 0.0, 3) for name, shown in _SECONDS.items()},
        "staleness_max": policy.count("staleness_max"),
        "delivery": {
            **{name: policy.count(f"stream_{name}") for name in _DELIVERY},
            "backlog": policy.count("stream_backlog"),
            "unfreed": policy.count("unfreed"),
            "reclaimed": sum(each.count("reclaimed") for each in rollouts.values()),
            "abandoned": sum(each.count("abandoned") for each in rollouts.values()),
        },
        "work_items": {
            name: status.work_items.get(name, 0) for name in ("given_again", "failed_attempts", "given_up")
        },
        "weights": {
            "published": policy.count("weights_published"),
            **{shown: sum(each.count(name) for each in rollouts.values()) for shown, name in _WEIGHTS.items()},
        },
        "weight_payloads_fetched": {
            name: progress.count("weight_payloads") for name, progress in sorted(rollouts.items())
        },
        "replicas": {member.name: f"{member.state.value}: {member.reason}" for member in members},
        "counters": {member.name: dict(sorted(finite(member.progress.counters).items())) for member in members},
    }


def _last_metrics(steps: list[dict[str, Any]]) -> dict[str, float | None]:
    """The last value of every metric, of whichever step."""
    last: dict[str, float | None] = {}
    for line in steps:
        last |= line["metrics"]
    return dict(sorted(finite(last).items()))


def _plot(folder: JobFolder, config: JobConfig, steps: list[dict[str, Any]]) -> None:
    """Draw return and throughput over `steps`, if there are any and the job has a plot."""
    if not (steps and config.job.plot):
        return
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    number = np.array([line["step"] for line in steps])
    figure = Figure(figsize=(8, 6), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=[2, 1])

    # As for `[stop]`, a metric of the trainer takes the place of dray's own figure of that name.
    own = any(MEAN_RETURN in line["metrics"] for line in steps)
    returns = np.array([_drawn((line["metrics"] if own else line).get(MEAN_RETURN)) for line in steps])
    above.plot(number, returns, color=_RAW, linewidth=1, label="mean return of a batch")
    above.plot(number, _smoothed(returns), color=_LINE, linewidth=2, label="smoothed over 10 steps")
    if config.stop is not None:
        name = config.stop.metric
        found = [(line["step"], _drawn(line["metrics"][name])) for line in steps if name in line["metrics"]]
        if found and name != MEAN_RETURN:
            above.plot(
                *zip(*found, strict=True), "o-", color=_EVALUATION, markersize=4, linewidth=1, label=_label(name)
            )
        above.axhline(config.stop.at_least, color="0.4", linestyle="--", linewidth=1)
        above.annotate(
            f"solved at {config.stop.at_least:g}", (number[0], config.stop.at_least), xytext=(2, 3),
            textcoords="offset points", color="0.3", fontsize=9,
        )  # fmt: skip
    above.set_ylabel("return" if config.stop is None else f"return, {_label(config.stop.metric)}")
    above.set_title(f"{config.job.name}: return and payload throughput")
    above.legend(loc="lower right", frameon=False)

    below.plot(number, _smoothed(_rates(steps)), color=_LINE, linewidth=1.5)
    below.set_ylabel("payloads, MB/s")
    below.set_xlabel("training step")
    below.set_ylim(bottom=0)
    for axes in (above, below):
        axes.grid(color="0.9")
        axes.spines[["top", "right"]].set_visible(False)
    image = io.BytesIO()
    figure.savefig(image)
    write_whole(folder.root / config.job.plot, image.getvalue())


def _drawn(value: float | None) -> float:
    """Where there is no value, the line has a gap."""
    return math.nan if value is None else value


def _label(name: str) -> str:
    """`name` as matplotlib shows it: a dollar sign begins a formula."""
    return printable(name, _MAX_LABEL).replace("$", r"\$")


def _rates(steps: list[dict[str, Any]]) -> np.ndarray[Any, np.dtype[np.float64]]:
    """MB/s of each step. Seconds and bytes continue where a run was resumed."""
    seconds = np.diff([0.0, *(line["seconds"] for line in steps)])
    nbytes = np.diff([0.0, *(line["bytes"] for line in steps)])
    rates: np.ndarray[Any, np.dtype[np.float64]] = nbytes / np.where(seconds > 0, seconds, np.inf) / 1e6
    return rates


def _smoothed(values: np.ndarray[Any, np.dtype[np.float64]]) -> np.ndarray[Any, np.dtype[np.float64]]:
    """The mean of each value and the nine before it."""
    totals = np.concatenate([[0.0], np.cumsum(values)])
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(0, ends - 10)
    means: np.ndarray[Any, np.dtype[np.float64]] = (totals[ends] - totals[starts]) / (ends - starts)
    return means
