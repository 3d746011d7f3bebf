"""`demo.json`: where the demo stack listens and what opens it; for scripts, and for our own command line."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from agent.home import write_whole


@dataclass(frozen=True, slots=True)
class DemoFile:
    """What a running demo stack tells about itself; the field names are the file's."""

    control_plane_url: str
    operator_key: str
    customer_key: str
    pool_slug: str
    inference_url: str
    boost_key: str | None
    """None until the demo pool is live."""
    model: str
    """The name that customers use."""
    model_path: str
    """What vLLM loads: a folder or a Hugging Face id."""
    stats_url: str
    agent_url: str

    def write(self, home: Path) -> None:
        write_whole(demo_file(home), json.dumps(asdict(self), indent=2) + "\n")


def home_folder(environment: Mapping[str, str]) -> Path:
    """`BOOSTS_HOME`, or `var/` of the folder we are in."""
    return Path(environment.get("BOOSTS_HOME") or "var").absolute()


def demo_file(home: Path) -> Path:
    return home / "demo.json"
