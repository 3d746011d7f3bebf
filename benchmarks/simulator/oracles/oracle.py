"""What an oracle is."""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks.simulator import trace
from benchmarks.simulator.oracles.view import View


class Oracle:
    """Sees every event after the view has followed it (`see`), or before (`foresee`)."""

    name = ""
    foresees: tuple[type[trace.Event], ...] = ()
    """Kinds of events that `foresee` looks at."""
    sees: tuple[type[trace.Event], ...] = ()
    """Kinds of events that `see` looks at."""

    def foresee(self, event: trace.Event, view: View) -> Iterator[str]:
        """Broken promises that `event` shows, judged by what was so just before it."""
        yield from ()

    def see(self, event: trace.Event, view: View) -> Iterator[str]:
        """Broken promises that show once `event` has happened."""
        yield from ()
