"""`python -m serving.main`: a node in the foreground; `boosts serve` and the agent start it."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from serving.family import die_with_parent, keep_children_close
from serving.tiles import allow_tiles

_EXAMPLES = """\
examples:
  # a model from Hugging Face on a GPU
  boosts serve --model Qwen/Qwen3-8B --entitlements entitlements.json

  # vLLM's own engine flags go behind a double dash
  boosts serve --model Qwen/Qwen3-8B --entitlements entitlements.json -- --max-num-seqs 128
"""


def main(argv: list[str] | None = None) -> int:
    """Serve until SIGTERM or SIGINT; returns the exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    engine_flags: list[str] = []
    if "--" in arguments:
        split = arguments.index("--")
        arguments, engine_flags = arguments[:split], arguments[split + 1 :]
    options = _parser().parse_args(arguments)
    # vLLM takes ten seconds to import; a mistyped flag must not.
    from scheduler import Policy
    from serving.launch import LaunchError, ServeOptions, serve

    try:
        serve(
            ServeOptions(
                model=options.model,
                served_model_name=options.served_model_name,
                entitlements=options.entitlements,
                host=options.host,
                port=options.port,
                stats_host=options.stats_host,
                stats_port=options.stats_port,
                drain_s=options.drain_s,
                policy=Policy(
                    queue_timeout_s=options.queue_timeout_s, max_queued_per_seat=options.max_queued_per_seat
                ),
                engine_flags=tuple(engine_flags),
            )
        )
    except LaunchError as error:
        print(f"boosts serve: {error}", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="boosts serve",
        description="Serve a model with vLLM to the seats of an entitlements file.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--model", required=True, help="Hugging Face model id or folder")
    add("--served-model-name", help="the name that clients use (default: --model)")
    add(
        "--entitlements",
        required=True,
        type=Path,
        metavar="FILE",
        help="who may use the node; changes are followed",
    )
    add("--host", default="127.0.0.1", help="public address (default: %(default)s)")
    add("--port", type=int, default=8001, help="public port (default: %(default)s)")
    add("--stats-host", default="127.0.0.1", help="address of /metrics and /stats (default: %(default)s)")
    add("--stats-port", type=int, default=8002, help="port of /metrics and /stats (default: %(default)s)")
    add(
        "--drain-s",
        type=int,
        default=5,
        help="seconds to finish running requests on SIGTERM (default: %(default)s)",
    )
    add(
        "--queue-timeout-s",
        type=float,
        default=60.0,
        help="a request that waited this long is given up with 503 (default: %(default)s)",
    )
    add(
        "--max-queued-per-seat",
        type=int,
        default=256,
        help="requests that may wait per seat (default: %(default)s)",
    )
    return parser


if __name__ == "__main__":
    keep_children_close()
    allow_tiles()
    sys.exit(main())
elif __name__ == "__mp_main__":
    # A spawned child of ours imports this module under this name; a forked one has run the hook.
    keep_children_close()
    die_with_parent()
    allow_tiles()
