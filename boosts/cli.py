"""`boosts`: run the whole stack or one part of it, buy and operate seats, measure machines.

Commands import what they need when they run, so that `boosts --help` answers at once.
"""

from __future__ import annotations

import os
import sys
from typing import Annotated, Any, NoReturn

import typer
from typer.core import TyperCommand

from boosts.admin_cli import admin
from boosts.demo_file import home_folder
from boosts.pools_cli import billing, pools

app = typer.Typer(
    help="Guaranteed inference throughput on shared GPUs.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
keys = typer.Typer(help="Boost keys for an entitlements file.", no_args_is_help=True)
app.add_typer(pools, name="pools")
app.add_typer(billing, name="billing")
app.add_typer(admin, name="admin")
app.add_typer(keys, name="keys")


class _Whole(TyperCommand):
    """A command with a parser of its own, `--help` included: it gets its arguments as they are, with the
    double dash before vLLM's flags, which is lost on a parser that ignores what it does not know."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        ctx.args = list(args)
        return list(ctx.args)


@app.command()
def run(
    model: Annotated[
        str | None,
        typer.Option(help="Hugging Face model id or folder (default: a small demo model, built here)"),
    ] = None,
    engine_flags: Annotated[
        list[str] | None,
        typer.Argument(metavar="[-- VLLM FLAGS]", help="vLLM's own flags, behind a double dash"),
    ] = None,
) -> None:
    """Start the whole stack in the foreground: control plane, node, and a demo pool that is live.

    Ports and data come from the environment: BOOSTS_CONTROL_PLANE_PORT (8000), BOOSTS_INFERENCE_PORT
    (8001), BOOSTS_STATS_PORT (8002), BOOSTS_AGENT_PORT (8003), BOOSTS_HOME (var/). BOOSTS_DEMO_POOL names
    a JSON file whose fields replace those of the demo pool. Data is kept for the next run; Ctrl-C stops
    everything.

    \b
    examples:
      boosts run
      BOOSTS_HOME=/tmp/boosts BOOSTS_CONTROL_PLANE_PORT=9000 boosts run
      boosts run --model Qwen/Qwen3-0.6B -- --max-num-seqs 16
    """
    from boosts.embedded import run_stack
    from boosts.settings import StackError, StackSettings

    try:
        settings = StackSettings.from_environment(os.environ, model, tuple(engine_flags or ()))
        raise typer.Exit(run_stack(settings))
    except StackError as error:
        print(f"boosts run: {error}", file=sys.stderr)
        raise typer.Exit(1) from None


@app.command("control-plane", cls=_Whole)
def control_plane(context: typer.Context) -> None:
    """Serve the pools API (boosts control-plane --help)."""
    _become("control_plane.main", context)


@app.command(cls=_Whole)
def node(context: typer.Context) -> None:
    """Run a node of a pool: the agent, which starts vLLM (boosts node --help)."""
    _become("agent.main", context)


@app.command(cls=_Whole)
def serve(context: typer.Context) -> None:
    """Serve a model to the seats of an entitlements file, without an agent (boosts serve --help)."""
    _become("serving.main", context)


@app.command(cls=_Whole)
def bench(context: typer.Context) -> None:
    """Measure a node against plain vLLM (boosts bench --help)."""
    from benchmarks.cli import main as bench_main

    arguments = list(context.args)
    # The GPU's scenario has its own model.
    wants_model = arguments[:1] not in ([], ["gpu"]) and not {"-h", "--help"} & set(arguments)
    if wants_model and not any(argument.startswith("--model") for argument in arguments):
        from benchmarks.guarantee import DEMO_WIDTH
        from boosts.demo_model import build_demo_model

        folder = home_folder(os.environ)
        if arguments[0] == "guarantee":
            model = build_demo_model(folder / f"demo-model-{DEMO_WIDTH}", DEMO_WIDTH)
        else:
            model = build_demo_model(folder / "demo-model")
        arguments += ["--model", str(model)]
    raise typer.Exit(bench_main(arguments))


@app.command(cls=_Whole)
def capacity(context: typer.Context) -> None:
    """Measure how many seats this machine can honour (boosts capacity --help)."""
    from benchmarks.capacity import main as capacity_main

    arguments = list(context.args)
    own = arguments[: arguments.index("--")] if "--" in arguments else arguments
    if not {"-h", "--help"} & set(own) and not any(each.split("=")[0] == "--model" for each in own):
        from boosts.demo_model import build_demo_model

        folder = build_demo_model(home_folder(os.environ) / "demo-model")
        arguments = ["--model", str(folder), "--model-id", "demo", *arguments]
    raise typer.Exit(capacity_main(arguments))


@keys.command("new")
def keys_new() -> None:
    """Make a boost key: the key for its customer, the hash for the entitlements file.

    Only the hash is stored anywhere; the key is shown this once.

    \b
    example:
      boosts keys new
    """
    from contract.keys import KeyKind, key_sha256, new_key

    key = new_key(KeyKind.BOOST)
    print(f"key         {key}")
    print(f"key_sha256  {key_sha256(key)}")


def _become(module: str, context: typer.Context) -> NoReturn:
    # In place of this process: its children look for its own entry point, and signals reach it.
    os.execv(sys.executable, [sys.executable, "-m", module, *context.args])  # noqa: S606 - no shell wanted


def main() -> None:
    """The `boosts` program."""
    app(prog_name="boosts")
