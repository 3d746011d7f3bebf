"""What `boosts capacity` tells of a machine: tables, files, a picture."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.capacity_fit import Offer, Point
from contract.capacity import NodeCapacity, Promise

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SHORT_PROMPT = 32
"""Tokens of the prompts of most levels; the others have long ones."""


@dataclass(frozen=True, slots=True)
class Measured:
    """All that one run found."""

    capacity: NodeCapacity
    promise: Promise
    points: tuple[Point, ...]
    offers: tuple[Offer, ...]
    prefill_tok_s: float


def report(measured: Measured) -> str:
    """The tables, as text."""
    capacity, promise = measured.capacity, measured.promise
    assert capacity.error is not None, "a measurement has its error"
    rows = [
        (f"{each.guarantee_tok_s:g}", f"{each.streams}", f"{each.total_tok_s:,.0f}", f"{each.seats}")
        for each in measured.offers
    ]
    return "\n\n".join(
        (
            f"{capacity.model_id}: {capacity.slots} slots, {capacity.kv_tokens:,} tokens of KV cache, "
            f"{measured.prefill_tok_s:,.0f} prompt tokens per second",
            table(
                ("measured", "streams", "context", "step ms", "fitted ms", "tok/s each", "tok/s in all"),
                [_measured_cells(each, capacity) for each in measured.points],
            ),
            f"The fit is off by {capacity.error:.1%} on average{_doubt(capacity.error, promise.margin)}.",
            table(("guarantee tok/s", "streams at this pace", "best total tok/s", "seats to sell"), rows),
            f"Seats: each with {promise.context_tokens:,} tokens of context and {promise.input_tok_s:,.0f} "
            f"prompt tokens per second, {promise.margin:.0%} of the machine left free.",
        )
    )


def _doubt(error: float, margin: float) -> str:
    if error <= margin:
        return ""
    return f", more than the margin of {margin:.0%}: measure again when nothing else uses the machine"


def _measured_cells(each: Point, capacity: NodeCapacity) -> tuple[str, ...]:
    return (
        each.level,
        f"{each.streams:.1f}",
        f"{each.kv_tokens / each.streams:,.0f}",
        f"{1000 * each.step_s:.2f}",
        f"{1000 * _fitted_s(each, capacity):.2f}",
        f"{each.stream_tok_s:,.0f}",
        f"{each.total_tok_s:,.0f}",
    )


def _fitted_s(each: Point, capacity: NodeCapacity) -> float:
    return capacity.step_time.seconds(each.prefill_tokens, each.streams, each.kv_tokens)


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Lines of text: the first column to the left, figures to the right."""
    widths = [max(map(len, cells)) for cells in zip(columns, *rows, strict=True)]
    lines = [columns, *rows]
    return "\n".join(
        "  ".join(
            [line[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(line[1:], widths[1:], strict=True))]
        )
        for line in lines
    )


def draw(measured: Measured, figure: Figure) -> None:
    """What was measured and the fit beside it; the best total and the seats at each pace."""
    capacity, paces = measured.capacity, [each.guarantee_tok_s for each in measured.offers]
    figure.suptitle(f"What a node can do: {capacity.model_id}, {capacity.slots} slots")
    steps, totals, seats = figure.subplots(1, 3)
    _draw_steps(steps, measured)
    totals.plot(paces, [each.total_tok_s for each in measured.offers], "-o", label="all streams together")
    totals.set(ylabel="output tok/s (higher is better)", title="Best total at each pace")
    seats.plot(paces, [each.streams for each in measured.offers], "--o", label="streams that keep the pace")
    seats.plot(paces, [each.seats for each in measured.offers], "-s", label="seats to sell")
    seats.set(ylabel="at once", title="Seats at each guarantee")
    for axes in (totals, seats):
        axes.set(xlabel="pace, tok/s for each stream")
        axes.set_xscale("log")
        shown = [pace for pace in paces if f"{pace:.1e}"[:3] in ("1.0", "2.0", "5.0")]
        axes.set_xticks(shown, [f"{pace:g}" for pace in shown])
        axes.minorticks_off()
    for axes in (steps, totals, seats):
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)


def _draw_steps(axes: Axes, measured: Measured) -> None:
    short = [each for each in measured.points if _is_short(each)]
    long = [each for each in measured.points if not _is_short(each)]
    for points, mark, label in ((short, "o", "short prompts"), (long, "s", "long prompts")):
        streams = [each.streams for each in points]
        (drawn,) = axes.plot(
            streams, [1000 * each.step_s for each in points], mark, alpha=0.7, label=f"{label}, measured"
        )
        fitted = [1000 * _fitted_s(each, measured.capacity) for each in points]
        # Each level has its own context, so between two of them there is no line to draw.
        axes.plot(streams, fitted, "_", color=drawn.get_color(), markersize=16, label=f"{label}, fitted")
    axes.set(xlabel="streams", ylabel="step time, ms (lower is better)", title="A step with so many streams")
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")


def _is_short(each: Point) -> bool:
    return f" {SHORT_PROMPT} tokens" in each.level


def write(measured: Measured, folder: Path) -> list[Path]:
    """capacity.json, the rows behind it, the tables and the picture; returns their paths."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    written = [folder / name for name in ("capacity.json", "measured.json", "table.txt")]
    written[0].write_text(measured.capacity.model_dump_json(indent=2) + "\n")
    rows: dict[str, Any] = {
        "prefill_tok_s": measured.prefill_tok_s,
        "points": [asdict(each) for each in measured.points],
        "offers": [asdict(each) for each in measured.offers],
    }
    written[1].write_text(json.dumps(rows, indent=1) + "\n")
    written[2].write_text(report(measured) + "\n")
    figure = Figure(figsize=(14, 4.6), layout="constrained", dpi=110)
    FigureCanvasAgg(figure)
    draw(measured, figure)
    picture = folder / "capacity.png"
    figure.savefig(picture)
    return [*written, picture]
