"""Who this node is: what the control plane answered when it enrolled, kept in `node.json`."""

from __future__ import annotations

from pathlib import Path

from agent.home import StartError, write_whole
from contract.errors import ContractError
from contract.nodes import Enrolled

_FILE = "node.json"
ENROL_AGAIN = "remove {home}/node.json and start once with a new --join-token"


def load_identity(home: Path) -> Enrolled | None:
    """The node's identity; None before it enrolled. Raises StartError for a file that cannot be read."""
    try:
        return Enrolled.parse((home / _FILE).read_bytes(), _FILE)
    except FileNotFoundError:
        return None
    except (ContractError, OSError) as error:
        raise StartError(f"{error}; restore the file, or {ENROL_AGAIN.format(home=home)}") from None


def save_identity(home: Path, identity: Enrolled) -> None:
    """Keep it; its token is not shown again. Raises OSError."""
    write_whole(home / _FILE, identity.model_dump_json(indent=2) + "\n")
