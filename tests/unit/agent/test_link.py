"""Calls to the control plane: what each kind of failure means to the agent."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest
from aiohttp import web

from agent import link as module
from agent.link import Link, LinkError, RefusedError, ReplacedError, UnreachableError
from contract.nodes import Registration
from tests.unit.agent.conftest import free_ports
from tests.unit.agent.control_plane_stand_in import ControlPlane, orders

REGISTRATION = Registration(boot_id="agent", base_url="http://node")


@pytest.fixture
async def link(control_plane: ControlPlane) -> AsyncIterator[Link]:
    async with Link(control_plane.url + "/", 0.3) as link:
        link.token = control_plane.node_token
        yield link


async def fails(link: Link) -> LinkError:
    heard_at = link.heard_at
    with pytest.raises(LinkError) as caught:
        await link.register(REGISTRATION)
    assert link.heard_at == heard_at
    return caught.value


@pytest.mark.parametrize("refusal", [(500, "x"), (502, "x"), (408, "x"), (425, "x"), (429, "x"), (302, "x")])
async def test_failures_that_pass_are_worth_another_try(
    link: Link, control_plane: ControlPlane, refusal: tuple[int, str]
) -> None:
    control_plane.refusals["register"] = refusal
    assert isinstance(await fails(link), UnreachableError)


@pytest.mark.parametrize("refusal", [(400, "x"), (401, "x"), (404, "x"), (409, "conflict"), (422, "x")])
async def test_refusal_tells_its_status_and_reason(
    link: Link, control_plane: ControlPlane, refusal: tuple[int, str]
) -> None:
    control_plane.refusals["register"] = refusal
    error = await fails(link)
    assert isinstance(error, RefusedError)
    assert error.status == refusal[0]
    assert str(error) == f"status {refusal[0]} {refusal[1]}: no: {refusal[1]}"


async def test_stale_epoch_means_replaced(link: Link, control_plane: ControlPlane) -> None:
    await link.register(REGISTRATION)
    await link.register(REGISTRATION.model_copy(update={"boot_id": "another"}))
    with pytest.raises(ReplacedError):
        await link.orders(1, "", 0, 0.0)


async def test_registering_twice_is_registering_once(link: Link) -> None:
    assert (await link.register(REGISTRATION)).epoch == (await link.register(REGISTRATION)).epoch


@pytest.mark.parametrize("garbage", ["", "{}", '{"success": true, "data": {"epoch": 0}}', "\x00"])
async def test_answer_that_breaks_the_contract_is_worth_another_try(
    link: Link, control_plane: ControlPlane, garbage: str
) -> None:
    control_plane.garbage["register"] = garbage
    assert isinstance(await fails(link), UnreachableError)


async def test_frozen_control_plane_is_given_up_in_time(link: Link, control_plane: ControlPlane) -> None:
    control_plane.thawed.clear()
    assert "did not answer in time" in str(await asyncio.wait_for(fails(link), 1.0))


async def test_absent_control_plane_is_unreachable() -> None:
    async with Link(f"http://127.0.0.1:{free_ports(1)[0]}", 1.0) as link:
        assert isinstance(await fails(link), UnreachableError)


async def test_endless_answer_is_cut(
    link: Link, control_plane: ControlPlane, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MAX_ANSWER_BYTES", 1000)
    control_plane.garbage["register"] = "x" * 10_000
    assert "more than" in str(await fails(link))


async def test_redirect_gets_no_token() -> None:
    calls: list[str] = []

    async def redirect(request: web.Request) -> web.Response:
        calls.append(request.path)
        return web.Response(status=307, headers={"Location": "/elsewhere"})

    application = web.Application()
    application.router.add_route("*", "/{path:.*}", redirect)
    runner = web.AppRunner(application)
    await runner.setup()
    [port] = free_ports(1)
    await web.TCPSite(runner, "127.0.0.1", port).start()
    async with Link(f"http://127.0.0.1:{port}", 1.0) as link:
        link.token = "secret"
        assert isinstance(await fails(link), UnreachableError)
    await runner.cleanup()
    assert calls == ["/internal/register"]


async def test_held_request_for_orders_is_answered_when_they_change(
    link: Link, control_plane: ControlPlane
) -> None:
    epoch = (await link.register(REGISTRATION)).epoch
    assert await link.orders(epoch, "", 0, 0.0) is None
    held = asyncio.create_task(link.orders(epoch, "", 0, 5.0))
    await asyncio.sleep(0.05)
    control_plane.order(orders())
    assert await asyncio.wait_for(held, 1.0) == orders()
    assert await link.orders(epoch, "store", 3, 0.0) is None
