"""How an agent is started: what an operator says, and the pace at which it works."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path

from contract.capacity import NodeCapacity
from contract.nodes import HEARTBEAT_S, MAX_WAIT_S


@dataclass(frozen=True, slots=True)
class Pace:
    """How often, how soon and for how long, in seconds. Tests are in more of a hurry than nodes."""

    heartbeat_s: float = HEARTBEAT_S
    orders_wait_s: float = MAX_WAIT_S
    call_s: float = 10.0
    """The longest a call to the control plane may take, beside the wait for orders."""
    retry_first_s: float = 1.0
    retry_most_s: float = 10.0
    look_s: float = 2.0
    """How long each of the two questions of a look at serving may take."""
    sample_s: float = 1.0
    """Between looks at serving: what a crash may lose of the counters."""
    doubt_s: float = 10.0
    """Serving that was ready and does not answer counts as ready for this much longer: it may be busy."""
    drain_sample_s: float = 0.05
    """The same while serving drains, so that its last tokens are seen."""
    report_s: float = 10.0
    """Reports are of whole multiples of this on the wall clock."""
    restart_first_s: float = 1.0
    restart_most_s: float = 60.0
    restart_forgiven_s: float = 300.0
    """Serving that was ready for this long is restarted as soon as if it had never failed."""
    silence_s: float = 120.0
    stall_s: float = 300.0
    kill_s: float = 10.0
    """Between SIGTERM and SIGKILL for serving that hangs, and on top of the drain for one that does not."""
    farewell_s: float = 2.0


@dataclass(frozen=True, slots=True)
class Options:
    """One node's settings."""

    control_plane: str
    home: Path
    """Absolute: serving is told of files in it."""
    name: str
    base_url: str
    """Where customers reach this node."""
    join_token: str | None = None
    host: str = "127.0.0.1"
    port: int = 8001
    stats_port: int = 8002
    agent_port: int = 8003
    model: str | None = None
    """Loaded instead of the pool's model, under its name."""
    drain_s: int = 60
    capacity: NodeCapacity | None = None
    """Of this node, as `boosts capacity` has measured it; until serving has measured itself."""
    engine_flags: tuple[str, ...] = ()
    """vLLM's, for this node alone; after the pool's, so they win."""
    serving: tuple[str, ...] = (sys.executable, "-m", "serving.main")
    pace: Pace = field(default_factory=Pace)
