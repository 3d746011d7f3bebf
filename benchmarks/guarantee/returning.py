"""Row *return*: a seat that comes back after idling has its full rate at once, and no more than that.

One seat is backlogged all the time; another of equal weight is away, comes back backlogged, and leaves
again. Its full rate is half of the service (input + 2 * output tokens). How soon it has it: the end of
the first half second in which it got at least nine tenths of that. No burst is read in two ways: by the
end of no half second has it had more than half of all service since its return, and in no half second alone.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from benchmarks.estimates import median, percentile_estimate
from benchmarks.guarantee.bench import Bench, Part, Row, Rows, tell
from benchmarks.guarantee.config import Config
from benchmarks.load import Sample, Visits
from benchmarks.report import COLORS, SEATS, Check, Table
from benchmarks.seats import Seat

if TYPE_CHECKING:
    from matplotlib.axes import Axes

STAYING, RETURNING = Seat("staying"), Seat("returning")
FULL_WITHIN_S, BURST = 2.0, 0.05
_NEARLY_FULL = 0.9
_SAMPLE_S = 0.125
_SLICE_S = 0.5


def seconds(config: Config) -> float:
    return config.visits * (config.idle_s + config.busy_s) + config.visit_groups * config.warm_s


def measure(bench: Bench) -> Rows:
    config = bench.config
    bench.sell([STAYING, RETURNING], config.easy_guarantee_tok_s)
    visits = Visits(config.idle_s, config.busy_s)
    each = config.visits // config.visit_groups
    rows = []
    for number in range(1, config.visit_groups + 1):
        tell(bench, "return", number, config.visit_groups, f"with seats, {each} visits")
        clients = [
            bench.crowd(
                bench.seats, seat, config.visit_connections, config.visit_output, f"return/{number}", there
            )
            for seat, there in ((STAYING, None), (RETURNING, visits))
        ]
        window_s = each * (config.idle_s + config.busy_s) - config.warm_s
        # A sample more than the last visit needs.
        phase, common = bench.phase(
            bench.seats, clients, window_s=window_s + 2 * _SAMPLE_S, sample_s=_SAMPLE_S
        )
        for start_s in _starts(visits, each):
            rows.append({"row": "return", **common, **_visit(config, phase.samples, start_s)})
    return rows


def _starts(visits: Visits, count: int) -> Iterator[float]:
    return (start_s for start_s, _ in zip(visits.starts(), range(count), strict=False))


def _visit(config: Config, samples: Sequence[Sample], start_s: float) -> dict[str, Any]:
    end_s = start_s + config.busy_s
    shares = slices(samples, start_s, end_s, _SLICE_S)
    return {
        "start_s": start_s,
        "slices": shares,
        "full_after_s": full_after_s(shares, _SLICE_S),
        "largest_share": max(running_shares(samples, start_s, end_s, _SLICE_S)),
    }


def share(samples: Sequence[Sample], start_s: float, end_s: float) -> float:
    """The returning seat's part of all service between two moments, to the nearest sample after each."""

    def served(moment_s: float) -> tuple[float, float]:
        place = min(bisect_left(samples, moment_s, key=lambda sample: sample.at_s), len(samples) - 1)
        sample = samples[place].served
        return sample[RETURNING.name].cost(), sample[STAYING.name].cost()

    before, after = served(start_s), served(end_s)
    gained = [late - early for early, late in zip(before, after, strict=True)]
    return gained[0] / sum(gained) if sum(gained) > 0 else 0.0


def slices(samples: Sequence[Sample], start_s: float, end_s: float, length_s: float) -> list[float]:
    """Its share in each slice of that length since its return."""
    count = int((end_s - start_s) / length_s)
    moments = [start_s + number * length_s for number in range(count + 1)]
    return [share(samples, early, late) for early, late in pairwise(moments)]


def running_shares(samples: Sequence[Sample], start_s: float, end_s: float, length_s: float) -> list[float]:
    """Its share of all service since its return, by the end of each slice of that length."""
    count = int((end_s - start_s) / length_s)
    return [share(samples, start_s, start_s + number * length_s) for number in range(1, count + 1)]


def full_after_s(shares: Sequence[float], length_s: float) -> float:
    """When the first slice with nearly the full rate ended, s since the return; if none had, one slice more
    than the visit has: it took at least so long."""
    full = (number for number, part in enumerate(shares, 1) if part >= _NEARLY_FULL / 2)
    return next(full, len(shares) + 1) * length_s


def summarize(config: dict[str, Any], rows: Rows) -> Part:
    seed = config["seed"]
    after = percentile_estimate([row["full_after_s"] for row in rows], 0.99, seed)
    largest = [2 * row["largest_share"] for row in rows]
    burst = percentile_estimate(largest, 0.99, seed)
    alone = [2 * max(row["slices"]) for row in rows]
    alone_burst = percentile_estimate(alone, 0.99, seed)
    figures = {
        "full_after_s_p99": asdict(after),
        "largest_over_full_rate_p99": asdict(burst),
        "largest_half_second_over_full_rate_p99": asdict(alone_burst),
        "full_after_s_p50": median([row["full_after_s"] for row in rows]),
        "largest_over_full_rate_p50": median(largest),
        "largest_half_second_over_full_rate_p50": median(alone),
    }
    return Part(
        figures=figures,
        tables=(
            Table(
                title=f"A seat that returns {len(rows)} times beside a backlogged one of equal weight",
                columns=("figure", "p50", "p99 [95 %]"),
                rows=(
                    ("full rate after, s", f"{figures['full_after_s_p50']:.2f}", str(after)),
                    ("most since the return, over full rate", f"{median(largest):.3f}", str(burst)),
                    ("most in one half second, over full rate", f"{median(alone):.3f}", str(alone_burst)),
                ),
            ),
        ),
        checks=(
            Check(
                f"return: full rate within {FULL_WITHIN_S:.0f} s at p99",
                f"{after} s over {len(rows)} visits",
                after.high <= FULL_WITHIN_S,
            ),
            Check(
                f"return: since its return never more than {1 + BURST:.2f} of its full rate at p99",
                f"{burst}",
                burst.high <= 1 + BURST,
            ),
            Check(
                f"return: in no half second more than {1 + BURST:.2f} of its full rate at p99",
                f"{alone_burst}",
                alone_burst.high <= 1 + BURST,
            ),
        ),
    )


def plot(axes: Axes, rows: Rows, _part: Part) -> None:
    """Its share since its return: every visit, and their median."""
    count = min(len(row["slices"]) for row in rows)
    moments = [(number + 1) * _SLICE_S for number in range(count)]
    for row in rows:
        axes.plot(moments, row["slices"][:count], color=COLORS[SEATS], alpha=0.15)
    middle = [median([row["slices"][place] for row in rows]) for place in range(count)]
    axes.plot(moments, middle, color=COLORS[SEATS], linewidth=2, label="median of visits")
    axes.axhline(0.5, color="red", linestyle="--", label="full rate")
    axes.set(title="A seat that returns", xlabel="s since its return", ylabel="its share of the service")
    axes.legend(fontsize=8)


ROW = Row("return", "a seat that comes back after idling, many times", seconds, measure, summarize, plot)
