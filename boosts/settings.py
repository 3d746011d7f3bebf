"""What `boosts run` is told: by its environment, its options and the file of `BOOSTS_DEMO_POOL`."""

from __future__ import annotations

import socket
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from boosts.demo_file import home_folder

if TYPE_CHECKING:
    from control_plane.pools.models import PoolTerms

HOST = "127.0.0.1"


class StackError(Exception):
    """The stack cannot run; the message says what to do."""


@dataclass(frozen=True, slots=True)
class Ports:
    """Where the stack's parts listen on the loopback address."""

    control_plane: int = 8000
    inference: int = 8001
    stats: int = 8002
    agent: int = 8003

    @classmethod
    def from_environment(cls, environment: Mapping[str, str]) -> Ports:
        """Read the variables. Raises StackError."""
        defaults = cls()
        ports = cls(
            **{
                field: _port(environment, variable, getattr(defaults, field))
                for field, variable in _PORT_VARIABLES.items()
            }
        )
        for number, uses in Counter(ports._by_variable().values()).items():
            if uses > 1:
                names = " and ".join(name for name, port in ports._by_variable().items() if port == number)
                raise StackError(f"{names} are both {number}; give each a port of its own")
        return ports

    def refuse_taken(self) -> None:
        """Raise StackError, which names every port that another program has."""
        taken = []
        for variable, port in self._by_variable().items():
            with socket.socket() as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                try:
                    probe.bind((HOST, port))
                except OSError as error:
                    taken.append(f"port {port}: {error.strerror}; set {variable} to a free one")
        if taken:
            raise StackError("\n".join(taken))

    def _by_variable(self) -> dict[str, int]:
        return {variable: getattr(self, field) for field, variable in _PORT_VARIABLES.items()}


_PORT_VARIABLES = {
    "control_plane": "BOOSTS_CONTROL_PLANE_PORT",
    "inference": "BOOSTS_INFERENCE_PORT",
    "stats": "BOOSTS_STATS_PORT",
    "agent": "BOOSTS_AGENT_PORT",
}


@dataclass(frozen=True, slots=True)
class StackSettings:
    """Where the stack keeps its data, where it listens, and what it sells."""

    home: Path
    ports: Ports
    terms: PoolTerms
    """Of the demo pool."""
    model: str | None
    """None for the demo model."""
    engine_flags: tuple[str, ...] = ()

    @classmethod
    def from_environment(
        cls, environment: Mapping[str, str], model: str | None, engine_flags: tuple[str, ...]
    ) -> StackSettings:
        """Read BOOSTS_HOME, the ports and BOOSTS_DEMO_POOL. Raises StackError."""
        from boosts.demo_pool import demo_terms, read_overrides

        file = environment.get("BOOSTS_DEMO_POOL")
        return cls(
            home=home_folder(environment),
            ports=Ports.from_environment(environment),
            terms=demo_terms(model, read_overrides(Path(file)) if file else {}),
            model=model,
            engine_flags=engine_flags,
        )

    @property
    def node_home(self) -> Path:
        """The agent's folder: one for each pool, because a node belongs to one."""
        return self.home / f"node-{self.terms.slug}"

    @property
    def control_plane_url(self) -> str:
        return f"http://{HOST}:{self.ports.control_plane}"

    @property
    def inference_url(self) -> str:
        return f"http://{HOST}:{self.ports.inference}"

    @property
    def stats_url(self) -> str:
        return f"http://{HOST}:{self.ports.stats}"

    @property
    def agent_url(self) -> str:
        return f"http://{HOST}:{self.ports.agent}"


def _port(environment: Mapping[str, str], variable: str, default: int) -> int:
    text = environment.get(variable) or str(default)
    if not text.isdecimal() or not 0 < int(text) < 65_536:
        raise StackError(f"{variable} is {text!r}; want a port number")
    return int(text)
