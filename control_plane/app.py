"""The application: every route, the envelope around every answer, and the lifecycle beside them."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

from fastapi import FastAPI
from sqlalchemy import text

import control_plane.accounts.admin_routes
import control_plane.billing.routes
import control_plane.nodes.admin_routes
import control_plane.nodes.routes
import control_plane.pledges.routes
import control_plane.pools.admin_routes
import control_plane.pools.routes
import control_plane.throughput.admin_routes
import control_plane.throughput.routes
from control_plane.body_limit import BodyLimit
from control_plane.context import Context, ControlPlane
from control_plane.envelope import Shown, Success, documented, install_error_handlers
from control_plane.pledges.lifecycle import Lifecycle

_ROUTERS = (
    control_plane.pools.routes.router,
    control_plane.pledges.routes.router,
    control_plane.throughput.routes.router,
    control_plane.billing.routes.router,
    control_plane.accounts.admin_routes.router,
    control_plane.pools.admin_routes.router,
    control_plane.throughput.admin_routes.router,
    control_plane.nodes.admin_routes.router,
    control_plane.nodes.routes.router,
)


class Health(Shown):
    ok: bool


def create_app(context: ControlPlane) -> FastAPI:
    """The control plane as an ASGI application. `context` stays the caller's to close."""
    app = FastAPI(
        title="GPU Boosts",
        description="Reserved slices of shared GPU pools: guaranteed tokens per second at a fixed price.",
        version="1",
        lifespan=_lifespan,
        responses=documented(400, 413, 422, 500),
        redirect_slashes=False,
        # Their pages load scripts from elsewhere; the document itself is at /openapi.json.
        docs_url=None,
        redoc_url=None,
    )
    app.state.control_plane = context
    app.state.stopping = asyncio.Event()
    install_error_handlers(app)
    app.add_middleware(BodyLimit)
    for router in _ROUTERS:
        app.include_router(router)
    app.get("/healthz", tags=["operation"])(_healthz)
    app.get("/readyz", tags=["operation"])(_readyz)
    return app


@contextlib.asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    lifecycle = asyncio.create_task(Lifecycle(app.state.control_plane).run())
    yield
    lifecycle.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await lifecycle


async def _healthz() -> Success[Health]:
    """The process answers."""
    return Success(data=Health(ok=True))


async def _readyz(context: Context) -> Success[Health]:
    """The database answers too."""
    async with context.database.read() as session:
        await session.execute(text("SELECT 1"))
    return Success(data=Health(ok=True))
