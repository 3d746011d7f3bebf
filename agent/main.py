"""`python -m agent.main`: a node's agent in the foreground; `boosts node` starts it."""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import socket
import sys
from pathlib import Path

from agent.home import StartError, only_agent_in
from agent.options import Options, Pace
from contract.capacity import NodeCapacity, parse_capacity
from contract.errors import ContractError
from contract.keys import KeyKind, is_key

_EXAMPLES = """\
examples:
  # the first start on a GPU machine, with a join token from the pool's operator
  boosts node --control-plane https://pools.example.com --join-token join_... \\
    --home /var/lib/boosts --base-url https://gpu7.example.com

  # every later one: the node's identity is kept in its home
  boosts node --control-plane https://pools.example.com --home /var/lib/boosts \\
    --base-url https://gpu7.example.com

  # weights that are on this machine already, and vLLM's own flags for it behind a double dash
  boosts node --control-plane http://127.0.0.1:8000 --model /models/qwen3-8b -- --gpu-memory-utilization 0.92

  # with what `boosts capacity` has measured here, for a machine on which serving cannot measure itself
  boosts node --control-plane https://pools.example.com --capacity capacity.json

signals:
  SIGTERM, SIGINT   drain and stop serving, then end
  SIGUSR2           end and leave serving running: the next agent adopts it (upgrades)

exit status: 0 as asked, 1 could not start or was refused, 2 wrong options,
3 another agent has taken over this node
"""


def main(argv: list[str] | None = None) -> int:
    """Run the agent until SIGTERM, SIGINT or SIGUSR2; returns the exit status."""
    options = parse(list(sys.argv[1:] if argv is None else argv))
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    # Tokens, key hashes and customers' counters lie in the home: nobody else's to read.
    os.umask(0o077)
    return start(options)


def start(options: Options) -> int:
    """Run the agent of a home that is free; returns the exit status."""
    from agent.agent import FAILED, run

    try:
        with only_agent_in(options.home):
            return asyncio.run(run(options))
    except StartError as error:
        sys.stderr.write(f"boosts node: {error}\n")
        return FAILED


def parse(argv: list[str]) -> Options:
    """What the command line and the environment say. Ends the process when that is wrong."""
    engine_flags: list[str] = []
    if "--" in argv:
        split = argv.index("--")
        argv, engine_flags = argv[:split], argv[split + 1 :]
    parser = _parser()
    given = parser.parse_args(argv)
    if not given.control_plane:
        parser.error("--control-plane or BOOSTS_CONTROL_PLANE_URL is needed: the control plane's address")
    if not given.control_plane.startswith(("http://", "https://")):
        parser.error(f"--control-plane: not an http:// or https:// address: {given.control_plane!r}")
    if given.join_token is not None and not is_key(given.join_token, KeyKind.JOIN):
        parser.error("--join-token: mistyped or cut off; it begins with join_ and has 54 characters")
    if given.base_url is None and given.host in ("0.0.0.0", "::"):  # noqa: S104 - compared, not bound
        parser.error(f"--base-url is needed with --host {given.host}: where do customers reach this node?")
    if len({given.port, given.stats_port, given.agent_port}) < 3:
        parser.error("--port, --stats-port and --agent-port must differ")
    model = given.model
    if model is not None and Path(model).is_dir():
        # Serving may be compared with these options by an agent that was started elsewhere.
        model = str(Path(model).absolute())
    return Options(
        control_plane=given.control_plane,
        home=given.home.absolute(),
        name=given.name[:100],
        base_url=given.base_url or f"http://{given.host}:{given.port}",
        join_token=given.join_token,
        host=given.host,
        port=given.port,
        stats_port=given.stats_port,
        agent_port=given.agent_port,
        model=model,
        drain_s=given.drain_s,
        capacity=None if given.capacity is None else _capacity(parser, given.capacity),
        engine_flags=tuple(engine_flags),
        pace=Pace(silence_s=given.silence_s, stall_s=given.stall_s),
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="boosts node",
        description="Run this machine as a node of a pool: start, watch and drain serving, follow the "
        "control plane's orders, report throughput.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    environment, pace = os.environ, Pace()
    add = parser.add_argument
    add(
        "--control-plane",
        default=environment.get("BOOSTS_CONTROL_PLANE_URL"),
        metavar="URL",
        help="the control plane's address (BOOSTS_CONTROL_PLANE_URL)",
    )
    add(
        "--join-token",
        default=environment.get("BOOSTS_JOIN_TOKEN") or None,
        metavar="TOKEN",
        help="needed once, to join a pool (BOOSTS_JOIN_TOKEN, which other users of the machine cannot see)",
    )
    add(
        "--home",
        type=Path,
        default=environment.get("BOOSTS_HOME") or "var/node",
        metavar="DIR",
        help="identity, orders, log and spool (BOOSTS_HOME; default: %(default)s)",
    )
    add("--name", default=socket.gethostname(), help="for people (default: %(default)s)")
    add(
        "--base-url",
        metavar="URL",
        help="where customers reach this node (default: http://HOST:PORT)",
    )
    add("--host", default="127.0.0.1", help="serving's public address (default: %(default)s)")
    add("--port", type=_port, default=8001, help="serving's public port (default: %(default)s)")
    add("--stats-port", type=_port, default=8002, help="serving's /stats port (default: %(default)s)")
    add(
        "--agent-port",
        type=_port,
        default=8003,
        help="port of the agent's own /healthz, /readyz and /metrics, on loopback (default: %(default)s)",
    )
    add("--model", help="folder or id to load instead of the pool's model, served under the pool's name")
    add(
        "--capacity",
        type=Path,
        metavar="FILE",
        help="what `boosts capacity` has measured on this machine with the pool's flags; told to the control "
        "plane until serving has measured itself",
    )
    add(
        "--drain-s",
        type=int,
        default=60,
        help="seconds that running requests have to finish before a stop or restart (default: %(default)s)",
    )
    add(
        "--silence-s",
        type=float,
        default=pace.silence_s,
        help="restart serving whose stats port has not answered for this long (default: %(default)s)",
    )
    add(
        "--stall-s",
        type=float,
        default=pace.stall_s,
        help="restart serving that made no token for this long with work in flight (default: %(default)s)",
    )
    return parser


def _capacity(parser: argparse.ArgumentParser, file: Path) -> NodeCapacity:
    try:
        return parse_capacity(file.read_bytes())
    except (OSError, ContractError) as error:
        parser.error(f"--capacity {file}: {error}")


def _port(text: str) -> int:
    port = int(text)
    if not 0 < port < 65_536:
        raise argparse.ArgumentTypeError(f"not a port: {text}")
    return port


if __name__ == "__main__":
    sys.exit(main())
