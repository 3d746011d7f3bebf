"""Measures the chosen rows one after the other and puts them together."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import aiohttp

from benchmarks.completions import send_each_length
from benchmarks.guarantee import isolation, pace, returning, shares, step_time, suites, totals
from benchmarks.guarantee.bench import Bench, Part, Row, Rows
from benchmarks.guarantee.config import Config
from benchmarks.report import Check, Result, instrument_notes, write_text
from benchmarks.seats import write_entitlements
from benchmarks.servers import Engine, Progress, ServerStartError, plain_vllm, running, seat_node

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ROWS: dict[str, Row] = {
    row.name: row
    for row in (
        pace.ROW,
        totals.TOTAL_ROW,
        totals.LONE_ROW,
        isolation.ROW,
        shares.SHARES_ROW,
        shares.FLOOD_ROW,
        returning.ROW,
        suites.ROW,
        step_time.ROW,
    )
}
_OTHERS = 0.15
"""Cores in use by others that are no longer the machine's own housekeeping."""
_START_S = 30.0
"""About how long both servers take to load the demo model on two cores."""
_STEP_S = 0.03
"""About how long the demo model takes for a prompt of a new length."""

Session = list[Row]
"""The rows that are measured on one pair of freshly started servers."""
Measure = Callable[[Config, Session, Path, Progress], Iterator[Rows]]
"""Measures a session's rows, one after the other; the path is a folder for the servers' logs."""


def chosen(config: Config) -> list[Row]:
    """The rows to measure, in their order."""
    return [row for name, row in ROWS.items() if not config.only or name in config.only]


def sessions(config: Config) -> list[Session]:
    """All rows on the first pair of servers; on every further one those that need several starts."""
    rows = chosen(config)
    again = [row for row in rows if row.several_starts]
    return [rows, *([again] * (config.starts - 1) if again else ())]


def expected_s(config: Config, left: list[Session] | None = None) -> float:
    """About how long the run, or what is left of it, takes."""
    warm_up_s = 2 * (_STEP_S * config.warm_tokens + config.warm_s + config.calibration_s)
    return sum(
        _START_S + warm_up_s + sum(row.seconds(config) for row in session)
        for session in (sessions(config) if left is None else left)
    )


def _measure(config: Config, session: Session, logs: Path, progress: Progress) -> Iterator[Rows]:
    """Start both servers and measure the session's rows, one after the other."""
    logs.mkdir(exist_ok=True)
    engine = Engine(config.model, config.max_num_seqs, config.engine_flags, config.eager)
    entitlements = config.folder / "entitlements.json"
    write_entitlements([pace.OWED, pace.CROWD], entitlements, guarantee_tok_s=config.easy_guarantee_tok_s)
    with running(
        [plain_vllm(engine), seat_node(engine, entitlements)],
        logs,
        progress,
        config.start_timeout_s,
        together=config.start_together,
    ) as (plain, seats):
        bench = Bench(config, plain, seats, entitlements, progress)
        warm_up(bench)
        for row in session:
            yield row.measure(bench)


def run(
    config: Config, progress: Progress, scenario: str = "guarantee", measure: Measure = _measure
) -> Result:
    """Measure every chosen row, a session at a time by `measure`.

    After each of them what there is by then is written to the folder, with a target missed that says so: a
    run that ends early leaves that. Raises ServerStartError when a server does not start, NothingServedError
    when one serves nothing.
    """
    left = sessions(config)
    starts = len(left)
    countdown = _Countdown(progress)
    rows: Rows = []
    for start in range(1, starts + 1):
        countdown.expect(expected_s(config, left))
        countdown.say(f"start {start} of {starts}")
        session = left.pop(0)
        logs = config.folder / f"start-{start}"
        # Requests of its own: what one set of them favours does not average out over starts that repeat it.
        own = replace(config, seed=config.seed + start - 1)
        for number, measured in enumerate(measure(own, session, logs, countdown.say), 1):
            countdown.expect(sum(row.seconds(config) for row in session[number:]) + expected_s(config, left))
            rows += [{**row, "start": start} for row in measured]
            until_now = f"up to {session[number - 1].name} in start {start} of {starts}"
            so_far = summarize(asdict(config), rows, scenario)
            checks = (*so_far.checks, Check("every row", until_now, False))
            write_text(replace(so_far, checks=checks), config.folder)
    return summarize(asdict(config), rows, scenario)


def warm_up(bench: Bench) -> None:
    """Let both servers compute a step of every size and serve a crowd. Raises ServerStartError."""
    config = bench.config
    for server in bench.servers:
        bench.progress(f"{server.launch.name}: warming up")
        seat = pace.OWED if server is bench.plain else pace.CROWD
        try:
            asyncio.run(send_each_length(bench.target(server, seat), config.warm_tokens))
        except aiohttp.ClientError as failure:
            raise ServerStartError(
                f"{server.launch.name} did not answer while warming up: {failure}"
            ) from failure
        crowd = bench.crowd(server, seat, config.max_num_seqs, config.noisy_output, "warm")
        bench.phase(server, [crowd], window_s=config.calibration_s)


def summarize(config: dict[str, Any], rows: Rows, scenario: str = "guarantee") -> Result:
    """The figures of all rows that were measured."""
    parts = parts_of(config, rows)
    errors = sum(row["errors"] for row in rows)
    first = next((row["first_error"] for row in rows if row["first_error"]), "")
    checks = [check for part in parts.values() for check in part.checks]
    checks.append(Check("no failed request", f"{errors} failed {first}".rstrip(), errors == 0))
    return Result(
        scenario=scenario,
        config=config,
        figures={name: part.figures for name, part in parts.items()},
        tables=tuple(table for part in parts.values() for table in part.tables),
        checks=tuple(checks),
        rows=rows,
        notes=(
            *instrument_notes(rows),
            *_busy_notes(rows),
            *(note for part in parts.values() for note in part.notes),
        ),
    )


def _busy_notes(rows: Rows) -> tuple[str, ...]:
    """Whether the machine had other things to do."""
    others = [row["other_cores"] for row in rows]
    busy = sum(cores > _OTHERS for cores in others)
    if not busy:
        return ()
    return (
        f"processes that are no part of the measurement used more than {_OTHERS} cores in {busy} of "
        f"{len(others)} phases, at most {max(others):.2f}: repeat on a quiet machine",
    )


def parts_of(config: dict[str, Any], rows: Rows) -> dict[str, Part]:
    """What each measured row has to say, by its name."""
    measured = {name: [row for row in rows if row["row"] == name] for name in ROWS}
    return {name: ROWS[name].summarize(config, of_row) for name, of_row in measured.items() if of_row}


def plot(result: Result, figure: Figure) -> None:
    """One picture per row."""
    parts = parts_of(result.config, result.rows)
    columns = min(3, len(parts))
    lines = -(-len(parts) // columns)
    figure.set_size_inches(5.6 * columns, 4.4 * lines)
    axes = list(figure.subplots(lines, columns, squeeze=False).flat)
    for (name, part), place in zip(parts.items(), axes, strict=False):
        ROWS[name].plot(place, [row for row in result.rows if row["row"] == name], part)
    for place in axes[len(parts) :]:
        place.set_axis_off()


class _Countdown:
    """Progress lines that end with what is left of the expected time."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self.expect(0.0)

    def expect(self, seconds: float) -> None:
        """From now on, so much is left."""
        self._until = time.monotonic() + seconds

    def say(self, text: str) -> None:
        left_s = self._until - time.monotonic()
        left = f"about {left_s / 60:.0f} min left" if left_s >= 60 else "under a minute left"
        self._progress(f"{text} ({left})")
