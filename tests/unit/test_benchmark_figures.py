"""How the figures of the benchmarks are computed and shown."""

import json
import sys
from itertools import pairwise
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks import pages, plot  # noqa: E402
from benchmarks.comparison import compare  # noqa: E402
from benchmarks.figures import Figure, Row, Target, percentile  # noqa: E402
from benchmarks.plan import GIB, Plan, parse_sizes, parse_targets  # noqa: E402
from benchmarks.results import Results  # noqa: E402
from benchmarks.scenario import Skipped  # noqa: E402
from benchmarks.scenarios import SCENARIOS, in_place, job  # noqa: E402
from benchmarks.tables import summary_sheet  # noqa: E402
from benchmarks.targets import NAMES, TARGETS  # noqa: E402
from benchmarks.texts import seconds_text, value_text  # noqa: E402


def figure(*rounds: float) -> Figure:
    return Figure(rounds, None, len(rounds))


class Unwatched:
    """A progress that shows nothing."""

    def step(self, doing):
        pass


def row(rounds, limit=None, unit="s", target=None, subject="shm", scenario="reads"):
    held = None if limit is None else figure(*limit)
    return Row(scenario, subject, 1024, figure(*rounds), unit, "limit" if limit else "", held, target)


def test_a_ratio_is_taken_round_by_round():
    found = row([2.0, 6.0, 3.0], [1.0, 2.0, 3.0]).ratio
    assert found is not None
    assert found.rounds == (2.0, 3.0, 1.0)
    assert found.median == 2.0


def test_a_ratio_of_rates_is_above_one_for_the_quicker_one():
    target = Target("P3", "at least", 0.9, "rate ratio")
    times = row([2.0, 2.0], [1.0, 1.0], target=target)
    rates = row([1.0, 1.0], [2.0, 2.0], unit="B/s", target=target)
    for each in (times, rates):
        assert each.ratio is not None
        assert each.ratio.median == 0.5
        assert each.reached is False


def test_a_target_of_a_value_ignores_the_limit():
    each = row([10e-6], [1e-6], target=Target("P9", "at most", 15e-6, "value"))
    assert each.reached is True


def test_a_target_of_a_ratio_is_not_reached_without_a_limit():
    target = Target("P12", "at least", 0.98, "rate ratio")
    assert row([5e4], [0.0], unit="/s", target=target).reached is False
    assert row([5e4], unit="/s", target=target).reached is False


def test_a_size_that_does_not_fit_into_memory_is_skipped_with_the_reason(monkeypatch):
    monkeypatch.setattr(in_place, "available_bytes", lambda: GIB)
    plan = Plan(targets=("P1",), sizes=(GIB,), rounds=1, most_operations=4)
    *rows, skipped = in_place.SCENARIO.run(plan, Unwatched())
    assert [each.subject for each in rows] == ["bare Unix round trip"]
    assert skipped == Skipped("shm in place, 1 GiB", "it takes 9.0 GiB of memory, and 1.0 GiB are available")


def test_rows_survive_their_document():
    target = Target("P1", "at most", 3.0, "time ratio")
    before = row([1.0, 2.0], [1.0, 1.0], target=target)
    assert Row.from_document(before.as_document()) == before


def test_results_survive_their_file(tmp_path):
    before = Results({"cores": 2}, {"rounds": 2}, (row([1.0, 2.0]),), (Skipped("ray", "not installed"),))
    before.save(tmp_path / "new" / "results.json")
    assert Results.load(tmp_path / "new" / "results.json") == before


@pytest.mark.parametrize(
    ("old", "new", "verdict"),
    [
        ([1.0, 1.1, 1.2], [1.15, 1.3, 1.4], "same"),  # the ranges touch
        ([1.0, 1.01, 1.02], [1.03, 1.04, 1.05], "same"),  # too little
        ([1.0, 1.1, 1.2], [0.5, 0.6, 0.7], "better"),
        ([1.0, 1.1, 1.2], [1.5, 1.6, 1.7], "worse"),
    ],
)
def test_only_what_lies_outside_the_spread_has_moved(old, new, verdict):
    (change,) = compare([row(old)], [row(new)])
    assert change.verdict == verdict


def test_more_of_a_rate_is_better():
    (change,) = compare([row([1.0, 1.1], unit="/s")], [row([2.0, 2.2], unit="/s")])
    assert change.verdict == "better"
    assert change.factor == pytest.approx(2.0)


def test_a_slow_machine_is_no_change_where_the_limit_is_as_slow():
    (change,) = compare([row([2.0, 2.2], [1.0, 1.1])], [row([6.0, 6.6], [3.0, 3.3])])
    assert change.verdict == "same"


def test_rows_of_one_run_only_are_new_or_gone():
    verdicts = [change.verdict for change in compare([row([1.0], subject="a")], [row([1.0], subject="b")])]
    assert verdicts == ["new", "gone"]


def test_the_summary_shows_the_size_that_is_furthest_from_the_target():
    target = Target("P1", "at most", 3.0, "time ratio")
    good, bad = row([1.0], [1.0], target=target), row([4.0], [1.0], target=target)
    lines = summary_sheet([good, bad], only=["P1"]).lines
    assert len(lines) == 1
    assert lines[0][0] == "P1"
    assert "4.00 ×" in lines[0][3]
    assert lines[0][5] == "not reached (reached at 1 of 2 sizes)"


def test_every_target_belongs_to_a_scenario():
    assert {target for scenario in SCENARIOS for target in scenario.targets} == set(NAMES)
    numbers = [*range(1, 10), "9A", *range(10, 18), 19, 20]
    assert [target.name for target in TARGETS] == [f"P{number}" for number in numbers]


def test_the_share_of_reads_comes_from_what_a_job_records(tmp_path):
    summary = {"payloads": 64, "transfer": "reference", "lane": "shm", "steps": 4}
    summary |= {"seconds": 20.0, "read_seconds": 0.1}
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    (tmp_path / "metrics.jsonl").write_text('{"seconds": 2.0}\n{"seconds": 5.0}\n')
    wall, loop = job.rows(tmp_path)
    assert wall.figure.p50 == pytest.approx(0.5)
    assert wall.reached is True
    assert loop.figure.p50 == pytest.approx(2.0)
    assert loop.note == "64 payloads by reference over shm, 4 steps"


def test_names_on_a_plot_are_moved_apart_in_their_order():
    places = plot.spread([0.5, 0.51, 0.99, 1.0, 0.1], 0.05)
    ordered = sorted(places)
    assert [places.index(place) for place in ordered] == [4, 0, 1, 2, 3]
    assert all(b - a >= 0.05 - 1e-9 for a, b in pairwise(ordered))
    assert max(places) <= 1.0


def test_choices_are_parsed():
    assert parse_sizes("1MiB, 1KiB, 1GiB") == (1 << 10, 1 << 20, 1 << 30)
    assert parse_targets("p4,P1", NAMES) == ("P1", "P4")
    with pytest.raises(ValueError, match="P99"):
        parse_targets("P99", NAMES)


def test_percentiles_lie_between_neighbours_in_proportion():
    assert percentile([4.0, 1.0, 2.0, 3.0], 0.5) == 2.5
    assert percentile([1.0], 0.99) == 1.0


def test_figures_have_three_digits_that_count():
    assert [seconds_text(value) for value in (12.34e-6, 0.999e-6, 4.567e-3, 123.4e-6)] == [
        "12.3 µs",
        "999 ns",
        "4.57 ms",
        "123 µs",
    ]
    assert value_text(152_345, "/s") == "152,345 /s"
    assert value_text(4.56e9, "B/s") == "4.56 GB/s"
    assert value_text(6.78e12, "B/s") == "6.78 TB/s"


def test_the_page_has_the_mark_of_every_section():
    text = pages.PAGE.read_text(encoding="utf-8")
    for section in pages.SECTIONS:
        begin, end = pages.marks(section)
        assert text.index(begin) < text.index(end)
