"""`boosts control-plane`: the pools API, its database and its lifecycle in one process."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import logging
import os
import signal
import socket
import sys
from pathlib import Path

import uvicorn
from sqlalchemy.exc import SQLAlchemyError

from control_plane.accounts.service import new_operator_key
from control_plane.app import create_app
from control_plane.billing.ledger_gateway import LedgerGateway
from control_plane.clock import system_clock
from control_plane.context import ControlPlane
from control_plane.database import Database, DatabaseError
from control_plane.envelope import ApiError
from control_plane.keys.service import check_vault
from control_plane.migrations import upgrade
from control_plane.vault import Vault, VaultError

_GRACE_S = 5
_EXAMPLES = """\
examples:
  # an embedded SQLite database and a fresh encryption key in var/control-plane
  boosts control-plane

  # an operator's key, for boosts admin and /api/admin; shown this once
  boosts control-plane --new-operator ops@example.com

  # PostgreSQL, behind a proxy that ends TLS
  BOOSTS_DATABASE_URL=postgresql://boosts@db/boosts BOOSTS_ENCRYPTION_KEY=$(cat key) \\
    boosts control-plane --public-url https://api.example.com

environment:
  BOOSTS_DATABASE_URL         sqlite:////path/to/file or postgresql://user:password@host/name
  BOOSTS_ENCRYPTION_KEY       32 bytes in base64 that boost keys are encrypted with; keep a copy, but not with
                              the database's backups. Without it: DIR/encryption.key, made if need be
  BOOSTS_CONTROL_PLANE_PORT   default of --port
"""


def main(argv: list[str] | None = None) -> int:
    """Serve until SIGTERM or SIGINT, or do what an option asks for; returns the exit status."""
    options = _parser().parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    logging.getLogger("alembic").setLevel(logging.WARNING)
    # uvicorn ends in order on SIGTERM, and then raises it again for whoever had it before: for us.
    signal.signal(signal.SIGTERM, _interrupt)
    # Keys and a database full of them: nobody else's to read.
    os.umask(0o077)
    try:
        home: Path = options.home
        home.mkdir(parents=True, exist_ok=True)
        key = os.environ.get("BOOSTS_ENCRYPTION_KEY")
        vault = Vault.from_text(key) if key else Vault.from_file(home / "encryption.key")
        url = os.environ.get("BOOSTS_DATABASE_URL") or f"sqlite:///{home.absolute()}/control-plane.db"
        return asyncio.run(_run(options, vault, Database(url)))
    except KeyboardInterrupt:
        return 0
    except (DatabaseError, VaultError, ApiError, OSError) as error:
        print(f"boosts control-plane: {error}", file=sys.stderr)
        return 1
    except SQLAlchemyError as error:
        print(f"boosts control-plane: the database: {error}", file=sys.stderr)
        return 1


async def _run(options: argparse.Namespace, vault: Vault, database: Database) -> int:
    async with contextlib.AsyncExitStack() as stack:
        stack.push_async_callback(database.close)
        await upgrade(database)
        if options.new_operator is not None:
            async with database.write() as session:
                print(await new_operator_key(session, options.new_operator, system_clock()))
            return 0
        await check_vault(database, vault)
        listener = stack.enter_context(_listen(options.host, options.port))
        public_url = (options.public_url or f"http://{options.host}:{options.port}").rstrip("/")
        gateway = LedgerGateway(database, system_clock)
        context = ControlPlane(database, system_clock, gateway, vault, public_url)
        await _Server(context).serve([listener])
    return 0


class _Server(uvicorn.Server):
    """uvicorn, which tells requests that wait for news that it is time to go."""

    def __init__(self, context: ControlPlane) -> None:
        self._app = create_app(context)
        super().__init__(
            uvicorn.Config(self._app, log_config=None, access_log=False, timeout_graceful_shutdown=_GRACE_S)
        )

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._app.state.stopping.set()
        await super().shutdown(sockets)


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def _listen(host: str, port: int) -> socket.socket:
    try:
        return socket.create_server((host, port))
    except OSError as error:
        raise OSError(f"cannot listen on {host}:{port}: {error.strerror}") from None


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="boosts control-plane",
        description="Run the control plane: the pools API, billing, keys, and the nodes' orders.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add(
        "--home",
        type=Path,
        default=Path(os.environ.get("BOOSTS_HOME", "var")) / "control-plane",
        metavar="DIR",
        help="where the embedded database and the encryption key lie (default: %(default)s)",
    )
    add("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    add(
        "--port",
        type=int,
        default=os.environ.get("BOOSTS_CONTROL_PLANE_PORT", "8000"),
        help="port to listen on (default: %(default)s)",
    )
    add("--public-url", metavar="URL", help="where customers reach it (default: http://HOST:PORT)")
    add("--new-operator", metavar="EMAIL", help="print a management key for this operator, and end")
    return parser


if __name__ == "__main__":
    sys.exit(main())
