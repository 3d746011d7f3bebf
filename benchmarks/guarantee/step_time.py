"""Row *step-time*: what the step scheduler itself costs each step of a full engine.

The node counts the CPU seconds that its scheduler adds to each of vLLM's steps; they are read from its
metrics at both ends of the window. vLLM's own scheduling is not in them. Measured twice: while nobody's pace
is in danger, and while one stream holds a guarantee of twice its rate, so that there is something to decide.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from benchmarks.guarantee.bench import Bench, Part, Row, Rows, some, tell
from benchmarks.guarantee.config import Config
from benchmarks.guarantee.counters import Histogram
from benchmarks.report import Check, Table
from benchmarks.seats import Seat, write_entitlements
from benchmarks.servers import Engine, running, seat_node

if TYPE_CHECKING:
    from matplotlib.axes import Axes

OWED, CROWD = Seat("owed"), Seat("crowd")
EASY, TIGHT = "no pace in danger", "a pace in danger"
TARGET_US = 100.0
METRIC = "boosts_step_scheduler_seconds"
_START_S = 30.0


def seconds(config: Config) -> float:
    start_s = 0.0 if _fits(config) else _START_S
    return start_s + 2 * (2 * config.warm_s + config.step_s)


def measure(bench: Bench) -> Rows:
    config = bench.config
    if _fits(config):
        bench.sell([OWED, CROWD], config.step_guarantee_tok_s)
        return _cases(bench)
    entitlements = config.folder / "entitlements-step-time.json"
    write_entitlements([OWED, CROWD], entitlements, guarantee_tok_s=config.step_guarantee_tok_s)
    engine = Engine(config.model, config.step_streams, config.engine_flags, config.eager)
    logs = config.folder / "step-time"
    logs.mkdir(exist_ok=True)
    launch = seat_node(engine, entitlements)
    with running([launch], logs, bench.progress, config.start_timeout_s) as (node,):
        return _cases(replace(bench, seats=node, entitlements=entitlements, revision=1))


def _fits(config: Config) -> bool:
    """Whether the node under test has that many slots; else one of its own is started."""
    return config.max_num_seqs >= config.step_streams


def _cases(bench: Bench) -> Rows:
    config = bench.config
    easy = _row(bench, 1, EASY)
    bench.sell([OWED, CROWD], config.pace_times * some(easy["owed_tok_s"]))
    return [easy, _row(bench, 2, TIGHT)]


def _row(bench: Bench, number: int, case: str) -> dict[str, Any]:
    config, node = bench.config, bench.seats
    tell(bench, "step-time", number, 2, f"with seats, {config.step_streams} streams, {case}")
    clients = [
        bench.owed_stream(node, OWED, "step-time"),
        bench.crowd(node, CROWD, config.step_streams - 1, config.noisy_output, "step-time"),
    ]
    before = Histogram.read(node.metrics(), METRIC)
    phase, common = bench.phase(node, clients, window_s=config.step_s, warm_s=2 * config.warm_s)
    after = Histogram.read(node.metrics(), METRIC)
    took = after - before if before is not None and after is not None else None
    return {
        "row": "step-time",
        **common,
        "case": case,
        "streams": config.step_streams,
        "owed_tok_s": phase.output_tok_s(OWED.name),
        "steps": took.count if took else 0,
        "mean_us": 1e6 * took.mean if took else None,
        "share_within": took.share_within(TARGET_US / 1e6) if took else None,
        "p99_at_most_us": 1e6 * took.edge_above(0.99) if took else None,
        "edges_us": [1e6 * edge for edge in took.edges] if took else [],
        "counts": list(took.counts) if took else [],
    }


def summarize(_config: dict[str, Any], rows: Rows) -> Part:
    figures, lines, checks = {}, [], []
    for row in rows:
        about = f"step-time: the step scheduler's own time, {row['streams']} streams, {row['case']}"
        target = f"{about}: mean at most {TARGET_US:.0f} us per step"
        if row["mean_us"] is None:
            checks.append(Check(target, f"the node has no metric {METRIC}", met=False))
            continue
        mean_us, p99_us, steps = row["mean_us"], row["p99_at_most_us"], row["steps"]
        within = row["share_within"]
        figures[row["case"]] = {
            key: row[key] for key in ("mean_us", "share_within", "p99_at_most_us", "steps")
        }
        measured = (
            f"{mean_us:.0f} us, {within:.0%} of {steps:,.0f} steps within it, p99 at most {p99_us:.0f} us"
        )
        checks.append(Check(target, measured, mean_us <= TARGET_US))
        rate = f"{row['total_tok_s']:,.0f}"
        lines.append((row["case"], f"{steps:,.0f}", f"{mean_us:.0f}", f"{within:.0%}", f"{p99_us:.0f}", rate))
    title = f"The step scheduler's own time with {rows[0]['streams']} streams"
    columns = ("case", "steps", "mean us", f"within {TARGET_US:.0f} us", "p99 us at most", "total tok/s")
    return Part(figures, (Table(title, columns, tuple(lines)),), tuple(checks))


def plot(axes: Axes, rows: Rows, _part: Part) -> None:
    """Share of steps below each edge."""
    for row in rows:
        if row["counts"] and row["counts"][-1]:
            shares = [count / row["counts"][-1] for count in row["counts"]]
            axes.plot(row["edges_us"][:-1], shares[:-1], "o-", label=row["case"])
            axes.set_xscale("log")
    axes.axvline(TARGET_US, color="red", linestyle="--", label=f"target {TARGET_US:.0f} us")
    axes.set(title="The step scheduler's own time", xlabel="us per step", ylabel="share of steps")
    axes.legend(fontsize=8)


ROW = Row("step-time", "the step scheduler's own time with a full engine", seconds, measure, summarize, plot)
