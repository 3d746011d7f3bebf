"""How far this machine's clock is from the control plane's. Seats begin and end by the clock."""

from __future__ import annotations

from collections import deque

_KEPT = 8


class ClockOffset:
    """Estimates the offset from calls that carry the control plane's time (Cristian 1989).

    The true offset lies within half the round trip of the middle of the call, so of the recent calls
    the quickest tells most.
    """

    def __init__(self) -> None:
        self._measured: deque[tuple[float, float]] = deque(maxlen=_KEPT)

    def measure(self, sent_at: float, received_at: float, server_at: float) -> None:
        """Take in one call: both ends on this machine's wall clock, `server_at` on the other's."""
        round_trip = received_at - sent_at
        # Negative when the clock was set back meanwhile.
        if round_trip >= 0:
            self._measured.append((round_trip, (sent_at + received_at) / 2 - server_at))

    @property
    def seconds(self) -> float | None:
        """This clock minus the control plane's; None until measured."""
        return min(self._measured)[1] if self._measured else None
