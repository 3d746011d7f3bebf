"""What `boosts run` says while it works: lines that stay, and one that shows what it is waiting for."""

from __future__ import annotations

import contextlib
import sys
import time
from pathlib import Path

_STAGES = (
    ("Starting to load model", "loading the model"),
    ("Loading weights took", "preparing the engine"),
    ("GPU KV cache size", "warming up"),
    ("Available routes are", "starting the API server"),
)
"""What vLLM's log says at which stage of a start."""


class Progress:
    """Standard output of the stack. A terminal shows one line that changes; a log gets a line per change."""

    def __init__(self) -> None:
        self._live = sys.stdout.isatty()
        self._shown: str | None = None
        self._since = 0.0

    def say(self, text: str) -> None:
        """A line that stays."""
        self.end()
        print(text, flush=True)

    def show(self, text: str) -> None:
        """What is being waited for, with the time since it was first shown or since the last `end`."""
        if self._shown is None:
            self._since = time.monotonic()
        seconds = time.monotonic() - self._since
        line = f"{text} ({seconds:.0f} s)" if seconds >= 1 else text
        if self._live:
            print(f"\r\033[K{line}", end="", flush=True)
        elif text != self._shown:
            print(line, flush=True)
        self._shown = text

    def end(self) -> None:
        """The waiting is over."""
        if self._live and self._shown is not None:
            print("\r\033[K", end="", flush=True)
        self._shown = None


def engine_stage(log: Path, since: float) -> str:
    """What vLLM is doing, by its log; one that was last written before `since` is of an earlier run."""
    text = ""
    with contextlib.suppress(OSError):
        if log.stat().st_mtime >= since:
            text = log.read_text(errors="replace")
    reached = [stage for mark, stage in _STAGES if mark in text]
    return reached[-1] if reached else "starting vLLM"
