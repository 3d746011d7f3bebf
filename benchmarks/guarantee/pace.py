"""Rows *pace* and *price*: twice plain vLLM's rate beside a crowd, and what that costs the crowd.

One stream holds a guarantee of twice what plain vLLM gives it beside `noisy_streams` others. The
yardstick for the price is plain vLLM with a fixed number of noisy streams, the largest with which the
stream still gets that rate: faster steps cost throughput on any machine, and that is the least they
cost. Its number is the solution of `1 / rate = a + b * streams`, fitted to plain vLLM's phases so far, so
that it follows the machine; but for those beside the whole crowd, so far off that they bend the line: with
them the batch was one stream too many. Each round runs plain vLLM so, then ours beside the whole crowd, then
plain vLLM so again: one ratio against the mean of the two, and one of the two against each other as a
control.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from itertools import chain, combinations
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.estimates import Estimate, median, median_estimate, share_estimate
from benchmarks.guarantee.bench import Bench, Part, Row, Rows, some, tell
from benchmarks.guarantee.config import Config
from benchmarks.guarantee.windows import KEPT, attained_by_reading, delivered_by_window, kept
from benchmarks.report import COLORS, PLAIN, SEATS, Check, Table
from benchmarks.seats import Seat
from benchmarks.servers import Server

if TYPE_CHECKING:
    from matplotlib.axes import Axes

OWED, CROWD = Seat("owed"), Seat("crowd")
WINDOWS_TARGET, PRICE_TARGET = 0.99, 0.92

_WHOLE_CROWD_EVERY = 4
"""Rounds between two looks at plain vLLM beside the whole crowd, which is shown for contrast."""


def seconds(config: Config) -> float:
    turn_s = config.warm_s + config.fixed_s
    calibration_s = len(_ladder(config)) * (config.warm_s + config.calibration_s)
    whole_crowds = -(-config.pace_rounds // _WHOLE_CROWD_EVERY)
    ours_s = config.warm_s + config.pace_s
    return calibration_s + config.pace_rounds * (2 * turn_s + ours_s) + whole_crowds * turn_s


def measure(bench: Bench) -> Rows:
    config = bench.config
    ladder = _ladder(config)
    rows = []
    for number, streams in enumerate(ladder, 1):
        tell(bench, "pace", number, len(ladder), f"plain vLLM, beside {streams} streams (calibration)")
        rows.append(_phase(bench, bench.plain, "calibration", number, streams, config.calibration_s, 0.0))
    whole_rates = [row["owed_tok_s"] for row in rows if row["streams"] == config.noisy_streams]
    guarantee = config.pace_times * some(median(whole_rates))
    bench.sell([OWED, CROWD], guarantee)
    whole = config.noisy_streams
    for number in range(1, config.pace_rounds + 1):
        fixed = largest_batch(_points(rows, below=whole), guarantee, whole)
        turns = [
            ("before", bench.plain, fixed, config.fixed_s),
            ("ours", bench.seats, whole, config.pace_s),
            ("after", bench.plain, fixed, config.fixed_s),
        ]
        if number % _WHOLE_CROWD_EVERY == 1:
            turns.append(("whole crowd", bench.plain, whole, config.fixed_s))
        for run, server, streams, window_s in turns:
            tell(bench, "pace", number, config.pace_rounds, f"{server.launch.name}, beside {streams} streams")
            rows.append(_phase(bench, server, run, number, streams, window_s, guarantee))
    return rows


def _ladder(config: Config) -> tuple[int, ...]:
    """Crowds to fit the step time to; the whole crowd three times, since it sets the guarantee."""
    whole = config.noisy_streams
    return (whole // 4, whole, whole // 2, whole, whole // 8, whole)


def _points(rows: Rows, *, below: int) -> list[tuple[int, float]]:
    plain = [row for row in rows if row["system"] == PLAIN and row["streams"] < below]
    return [(row["streams"], row["owed_tok_s"]) for row in plain]


def largest_batch(points: Sequence[tuple[int, float]], pace_tok_s: float, most: int) -> int:
    """Of (noisy streams, the stream's tok/s beside them): the most streams beside which it keeps the pace."""
    steps_s = [(streams, 1 / rate) for streams, rate in points if rate > 0]
    # Theil and Sen's line: a phase in which the machine did something else does not bend it.
    slope = np.median([(y2 - y1) / (x2 - x1) for (x1, y1), (x2, y2) in combinations(steps_s, 2) if x1 != x2])
    base = np.median([step_s - slope * streams for streams, step_s in steps_s])
    return max(1, min(most, int((1 / pace_tok_s - base) / slope))) if slope > 0 else most


def _phase(
    bench: Bench, server: Server, run: str, number: int, streams: int, window_s: float, guarantee: float
) -> dict[str, Any]:
    round_name = f"pace/{number}"
    clients = [
        bench.owed_stream(server, OWED, round_name),
        bench.crowd(server, CROWD, streams, bench.config.noisy_output, round_name),
    ]
    phase, common = bench.phase(server, clients, window_s=window_s, watched=OWED)
    windows = chain.from_iterable(
        delivered_by_window(record, phase.start_s, phase.end_s)
        for record in phase.records
        if record.client == OWED.name
    )
    return {
        "row": "pace",
        **common,
        "run": run,
        "round": number,
        "streams": streams,
        "guarantee_tok_s": guarantee,
        "owed_tok_s": phase.output_tok_s(OWED.name),
        "windows_tokens": list(windows),
        "ledger_attained": attained_by_reading(bench.readings, guarantee, phase.start_s, phase.end_s)
        if guarantee
        else [],
    }


def summarize(config: dict[str, Any], rows: Rows) -> Part:
    guarantee = max(row["guarantee_tok_s"] for row in rows)
    groups = {
        f"{PLAIN}, whole crowd": [row for row in rows if row["run"] == "whole crowd"],
        f"{PLAIN}, fixed batch": [row for row in rows if row["run"] in {"before", "after"}],
        SEATS: [row for row in rows if row["run"] == "ours"],
    }
    ours = groups[SEATS]
    attained = [share for row in ours for share in _attained(row)]
    ledger = [share for row in ours for share in row["ledger_attained"]]
    windows = share_estimate(kept(attained), len(attained))
    by_ledger = share_estimate(kept(ledger), len(ledger))
    ratios, controls = _ratios(rows)
    price, control = median_estimate(ratios, config["seed"]), median_estimate(controls, config["seed"])
    return Part(
        figures={
            "guarantee_tok_s": guarantee,
            "windows_kept_at_client": asdict(windows),
            "windows_kept_by_ledger": asdict(by_ledger),
            "total_over_fixed_batch": asdict(price),
            "plain_over_plain": asdict(control),
            "total_ratios": ratios,
            "control_ratios": controls,
        },
        tables=(_table(groups, guarantee),),
        checks=(
            _pace_check(guarantee, "at the client", windows),
            _pace_check(guarantee, "by the node's ledger", by_ledger),
            Check(
                f"price: total at that pace over plain vLLM's best fixed batch at least {PRICE_TARGET:.2f}",
                f"{price} over {price.samples} rounds (plain over plain: {control})",
                price.low >= PRICE_TARGET,
            ),
        ),
    )


def _pace_check(guarantee: float, where: str, windows: Estimate) -> Check:
    return Check(
        f"pace: at {guarantee:.0f} tok/s beside the crowd, {KEPT:.0%} of owed delivered in at least "
        f"{WINDOWS_TARGET:.0%} of busy seconds, {where}",
        f"{windows} of {windows.samples} seconds",
        windows.low >= WINDOWS_TARGET,
    )


def _attained(row: dict[str, Any]) -> list[float]:
    return [tokens / row["guarantee_tok_s"] for tokens in row["windows_tokens"]]


def _ratios(rows: Rows) -> tuple[list[float], list[float]]:
    """Of each round: ours over the mean of the fixed batches around it, and these against each other."""
    ratios, controls = [], []
    for number in sorted({row["round"] for row in rows if row["run"] == "ours"}):
        total = {row["run"]: row["total_tok_s"] for row in rows if row["round"] == number}
        if not (total["before"] and total["after"]):
            continue
        ratios.append(total["ours"] / ((total["before"] + total["after"]) / 2))
        controls.append(total["after"] / total["before"])
    return ratios, controls


def _table(groups: dict[str, Rows], guarantee: float) -> Table:
    def line(name: str, rows: Rows) -> tuple[str, ...]:
        attained = [share for row in rows for share in _attained(row)]
        return (
            name,
            f"{median([row['streams'] for row in rows]):.0f}",
            f"{median([row['owed_tok_s'] for row in rows]):,.0f}",
            f"{kept(attained)} of {len(attained)}",
            f"{min(attained, default=float('nan')):.2f}",
            f"{median([row['total_tok_s'] for row in rows]):,.0f}",
        )

    return Table(
        title=f"One stream with a guarantee of {guarantee:.0f} tok/s beside a crowd (medians over phases)",
        columns=("system", "crowd", "owed stream tok/s", "seconds kept", "worst second", "total tok/s"),
        rows=tuple(line(name, rows) for name, rows in groups.items()),
    )


def plot(axes: Axes, rows: Rows, part: Part) -> None:
    """Every busy second's rate, as a distribution, with the guarantee."""
    for name, run, color in (
        (f"{PLAIN}, whole crowd", "whole crowd", COLORS[PLAIN]),
        (f"{PLAIN}, fixed batch", "before", "#5f6368"),
        (SEATS, "ours", COLORS[SEATS]),
    ):
        tokens = [count for row in rows if row["run"] == run for count in row["windows_tokens"]]
        if tokens:
            axes.ecdf(tokens, color=color, label=name)
    axes.axvline(part.figures["guarantee_tok_s"], color="red", linestyle="--", label="guarantee")
    price = part.figures["total_over_fixed_batch"]["value"]
    axes.set(
        title=f"Pace beside a crowd; total {price:.2f} of the best fixed batch",
        xlabel="tokens of the owed stream in a busy second",
        ylabel="share of seconds",
    )
    axes.legend(fontsize=8)


ROW = Row(
    "pace",
    "a guarantee of twice plain vLLM's rate beside a crowd, and its price in throughput",
    seconds,
    measure,
    summarize,
    plot,
)
