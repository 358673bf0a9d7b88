"""Figures as people read them: three digits that count, and a unit."""

from __future__ import annotations

from benchmarks.figures import RATES, Figure, Row, Target, Unit
from benchmarks.plan import size_name


def value_text(value: float, unit: Unit) -> str:
    """``12.3 µs``, ``4.56 GB/s``, ``152,000 /s``, ``0.31 %``."""
    match unit:
        case "s":
            return seconds_text(value)
        case "B/s":
            if value >= 1e12:
                return f"{value / 1e12:.3g} TB/s"
            return f"{value / 1e9:.3g} GB/s" if value >= 1e8 else f"{value / 1e6:.3g} MB/s"
        case "/s":
            return f"{value:,.0f} /s"
        case "B":
            return f"{value / 1024:,.0f} KiB"
        case "descriptors":
            return f"{value:.1f} descriptors"
        case "%":
            return f"{value:.2f} %"
        case "% of a core":
            return f"{value:.2f} % of a core"


def seconds_text(seconds: float) -> str:
    """``12.3 µs``, ``4.56 ms``."""
    for unit, factor in (("ns", 1e9), ("µs", 1e6), ("ms", 1e3)):
        value = seconds * factor
        if value < 999.5:
            return f"{value:.{0 if value >= 99.95 else 1 if value >= 9.995 else 2}f} {unit}"
    return f"{seconds:.2f} s"


def spread_text(figure: Figure, unit: Unit) -> str:
    """Half the distance between the quartiles of the rounds; nothing where there is one round."""
    if len(figure.rounds) < 2:
        return ""
    low, high = figure.quartiles
    if figure.p50 and (unit == "s" or unit in RATES):
        return f"± {100 * (high - low) / 2 / figure.p50:.0f} %"
    return f"± {value_text((high - low) / 2, unit)}"


def target_text(target: Target, unit: Unit) -> str:
    """``≤ 1.1 ×``, ``≥ 150,000 /s``."""
    sign = "≤" if target.sense == "at most" else "≥"
    return (
        f"{sign} {value_text(target.bound, unit)}" if target.measure == "value" else f"{sign} {target.bound:g} ×"
    )


def ratio_text(row: Row) -> str:
    """``1.05 × (1.02 to 1.09)``: the median, and the quartiles of the rounds."""
    ratio = row.ratio
    if ratio is None:
        return ""
    low, high = ratio.quartiles
    return f"{ratio.median:.2f} × ({low:.2f} to {high:.2f})"


def judged_text(row: Row) -> str:
    """What the target is about: the ratio, or the value itself."""
    if row.target is not None and row.target.measure != "value" and row.ratio is not None:
        return f"{row.ratio.median:.2f} ×"
    return value_text(row.figure.p50, row.unit)


def size_text(nbytes: int | None) -> str:
    return "" if nbytes is None else size_name(nbytes)
