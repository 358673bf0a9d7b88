"""dray beside what people use instead, from a producer's arrays to a consumer's: target P15."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import NamedTuple

from benchmarks.figures import Figure, Row, Target
from benchmarks.partner import Partner, PartnerError
from benchmarks.peers.catalog import IN_PLACE, OTHERS, PEERS, REDIS, Peer
from benchmarks.peers.environments import NotInstalled, interpreter
from benchmarks.peers.isolation import NotIsolated, isolated
from benchmarks.plan import KIB, MAX_COPIED, MIB, Plan, size_name
from benchmarks.scenario import Progress, Scenario, Skipped

NAME = "beside"
LATENCY, THROUGHPUT = "p50", "throughput"

_MAX_TIME_RATIO = 0.8
_LEAST_RATES = {16 * KIB: 1.2, MIB: 2.0}
"""The throughput that is asked for from each size on, as a multiple of the best peer's."""

_IN_FLIGHT = 128 * MIB
_MAX_IN_FLIGHT = 8
_WARM_UP = 4
_BLOCK_SECONDS = 0.4
_FEWEST = 4


@dataclass
class _Found:
    """What one peer gave at one size, round by round."""

    latency: list[list[float]] = field(default_factory=list)
    rates: list[float] = field(default_factory=list)
    payloads: int = 0


class _Cell(NamedTuple):
    peer: Peer
    nbytes: int


def run(plan: Plan, progress: Progress) -> Iterator[Row | Skipped]:
    """Measure those that leave each other in peace in turn, the others one after the other."""
    found: dict[_Cell, _Found] = {}
    for group in _groups(plan):
        with ExitStack() as opened:
            partners: dict[Peer, Partner] = {}
            for peer in group:
                try:
                    partners[peer] = _start(peer, opened)
                except (NotInstalled, NotIsolated) as why:
                    yield Skipped(peer.name, str(why))
            for nbytes in _sizes(plan):
                for peer, error in _measure(partners, nbytes, plan, progress, found):
                    # Its process has ended; what it gave before stays.
                    partners.pop(peer)
                    yield Skipped(f"{peer.name}, {size_name(nbytes)}", error)
    for nbytes in _sizes(plan):
        yield from _rows({cell.peer: each for cell, each in found.items() if cell.nbytes == nbytes}, nbytes)


def _start(peer: Peer, opened: ExitStack) -> Partner:
    """A peer's process, which ends with `opened`; raises NotInstalled or NotIsolated."""
    python = interpreter(peer)
    isolation = opened.enter_context(isolated()) if peer.runs_ray else None
    return opened.enter_context(
        Partner(
            peer.kind,
            module="benchmarks.peers",
            python=python,
            quiet=not peer.is_dray,
            isolation=isolation,
        )
    )


def _groups(plan: Plan) -> list[list[Peer]]:
    chosen = [peer for peer in PEERS if peer.quick or not plan.quick]
    return [[peer for peer in chosen if not peer.runs_ray], *([peer] for peer in chosen if peer.runs_ray)]


def _sizes(plan: Plan) -> list[int]:
    return [nbytes for nbytes in plan.sizes if nbytes <= MAX_COPIED]


def _measure(
    partners: Mapping[Peer, Partner],
    nbytes: int,
    plan: Plan,
    progress: Progress,
    found: dict[_Cell, _Found],
) -> list[tuple[Peer, str]]:
    """Open all, measure a block of each in every round; returns those that failed."""
    failed: dict[Peer, str] = {}
    counts: dict[Peer, int] = {}
    window = max(2, min(_MAX_IN_FLIGHT, _IN_FLIGHT // nbytes))
    progress.step(f"{size_name(nbytes)}, warm-up of {', '.join(peer.name for peer in partners)}")
    for peer, partner in partners.items():
        try:
            partner.ask("open", nbytes=nbytes, window=window)
            partner.ask("stream", count=max(window, _WARM_UP))
            warm = partner.ask("latency", count=_WARM_UP)["seconds"]
        except PartnerError as error:
            failed[peer] = str(error)
        else:
            bound = int(_BLOCK_SECONDS / statistics.median(warm))
            counts[peer] = max(_FEWEST, min(plan.operations(nbytes), bound))
    for index in range(plan.rounds):
        progress.step(f"{size_name(nbytes)}, round {index + 1} of {plan.rounds}")
        for peer in list(counts):
            try:
                latency = partners[peer].ask("latency", count=counts[peer])["seconds"]
                streamed = max(counts[peer], 2 * window)
                seconds = partners[peer].ask("stream", count=streamed)["seconds"]
            except PartnerError as error:
                failed[peer] = str(error)
                del counts[peer]
                found.pop(_Cell(peer, nbytes), None)
                continue
            cell = found.setdefault(_Cell(peer, nbytes), _Found())
            cell.latency.append(latency)
            cell.rates.append(streamed * nbytes / seconds)
            cell.payloads += streamed
    for peer in counts:
        partners[peer].ask("shut")
    return list(failed.items())


def _rows(found: Mapping[Peer, _Found], nbytes: int) -> Iterator[Row]:
    times = {peer: Figure.of(each.latency) for peer, each in found.items()}
    rates = {peer: Figure(tuple(each.rates), None, each.payloads) for peer, each in found.items()}
    rivals = [peer for peer in found if peer in OTHERS]
    for peer in found:
        against = _rivals(peer, rivals)
        for what, figures in ((LATENCY, times), (THROUGHPUT, rates)):
            best = min if what == LATENCY else max
            limit = best(against, key=lambda each: figures[each].p50) if against else None
            yield Row(
                NAME,
                f"{what}, {peer.name}",
                nbytes,
                figures[peer],
                "s" if what == LATENCY else "B/s",
                limit.name if limit is not None else "",
                figures[limit] if limit is not None else None,
                _target(what, nbytes) if peer is IN_PLACE and against else None,
                moves=False,
            )


def _target(what: str, nbytes: int) -> Target | None:
    """What is asked of a stream that is read in place."""
    if what == LATENCY:
        return Target("P15", "at most", _MAX_TIME_RATIO, "time ratio")
    asked = [bound for least, bound in _LEAST_RATES.items() if nbytes >= least]
    return Target("P15", "at least", asked[-1], "rate ratio") if asked else None


def _rivals(peer: Peer, rivals: list[Peer]) -> list[Peer]:
    """What a row of dray is held against: all peers, or Redis where the reference itself travels by Redis."""
    if not peer.is_dray:
        return []
    return [each for each in rivals if each is REDIS] if peer.kind.endswith(":redis") else rivals


def _steps(plan: Plan) -> int:
    return len(_groups(plan)) * len(_sizes(plan)) * (plan.rounds + 1)


SCENARIO = Scenario(NAME, "Beside what people use instead", ("P15",), _steps, run)
