"""The web application: reads a call in any of Telegram's encodings, records it, applies faults."""

import asyncio
import json
import time
from collections.abc import AsyncIterator
from typing import Any

from aiohttp import ClientError, ClientSession, ClientTimeout, web

from tests.fake_bot_api.methods import METHODS
from tests.fake_bot_api.state import ApiError, Fault, Json, World
from tests.fake_bot_api.user_side import user_routes

_BAD_GATEWAY_PAGE = "<html><head><title>502 Bad Gateway</title></head><body>nginx</body></html>"


def make_app(token: str, *, with_limits: bool = True) -> web.Application:
    """A server that knows one bot."""
    world = World(token, with_limits=with_limits)
    app = web.Application(client_max_size=64 << 20)
    app.cleanup_ctx.append(lambda _: _pushing(world))
    app.add_routes(user_routes(world))

    async def call(request: web.Request) -> web.StreamResponse:
        return await _call(world, request)

    async def download(request: web.Request) -> web.StreamResponse:
        content = world.files.get(request.match_info["name"])
        if request.match_info["token"] != world.token or content is None:
            return web.Response(status=404)
        return web.Response(body=content)

    app.router.add_route("*", "/bot{token}/{method}", call)
    app.router.add_get("/file/bot{token}/documents/{name}", download)
    return app


async def _call(world: World, request: web.Request) -> web.StreamResponse:
    method = request.match_info["method"].lower()
    parameters = await _parameters(request)
    shown = {name: _shown(value) for name, value in parameters.items()}
    record: Json = {
        "method": method,
        "parameters": shown,
        "status": None,
        "at": time.monotonic(),
    }
    world.requests.append(record)
    world.bell.ring()
    if request.match_info["token"] != world.token:
        response = _error(ApiError(401, "Unauthorized"))
    elif method not in METHODS:
        response = _error(ApiError(404, "Not Found"))
    else:
        response = await _carry_out(world, request, method, parameters)
    record["status"] = response.status
    world.bell.ring()
    return response


async def _carry_out(
    world: World, request: web.Request, method: str, parameters: Json
) -> web.Response:
    fault = world.take_fault(method, parameters)
    if fault is not None and not fault.after:
        return await _strike(world, request, fault)
    try:
        result = await METHODS[method](world, parameters)
    except ApiError as error:
        return _error(error)
    if fault is not None:
        world.bell.ring()
        return await _strike(world, request, fault)
    return web.json_response({"ok": True, "result": result})


async def _strike(world: World, request: web.Request, fault: Fault) -> web.Response:
    if fault.kind == "hang":
        await world.bell.wait_until(lambda: fault not in world.faults, fault.seconds)
        return web.Response(status=504)
    if fault.kind == "bad_gateway":
        return web.Response(status=502, text=_BAD_GATEWAY_PAGE, content_type="text/html")
    if fault.kind == "retry_after":
        description = f"Too Many Requests: retry after {fault.retry_after}"
        return _error(ApiError(429, description, {"retry_after": fault.retry_after}))
    if fault.kind == "reset":
        assert request.transport is not None
        request.transport.abort()
        return web.Response(status=499)  # written to nobody
    return _error(ApiError(fault.status, fault.description))


def _shown(value: Any) -> Any:
    return f"file {value.filename}" if isinstance(value, web.FileField) else value


async def _pushing(world: World) -> AsyncIterator[None]:
    """Deliver updates to the webhook while the server runs."""
    task = asyncio.create_task(_push(world))
    yield
    task.cancel()
    await asyncio.wait({task})


async def _push(world: World) -> None:
    async with ClientSession(timeout=ClientTimeout(total=10)) as client:
        while True:
            while not (world.webhook_url and world.updates):
                await world.bell.wait_until(
                    lambda: bool(world.webhook_url and world.updates), timeout_seconds=3600
                )
            update = world.updates[0]
            headers = {"X-Telegram-Bot-Api-Secret-Token": world.webhook_secret}
            try:
                async with client.post(world.webhook_url, json=update, headers=headers) as answer:
                    is_taken = answer.status == 200
            except (ClientError, TimeoutError):
                is_taken = False
            if is_taken and update in world.updates:
                world.updates.remove(update)
            else:
                world.webhook_failures += 1
                await asyncio.sleep(0.1)


def _error(error: ApiError) -> web.Response:
    body: dict[str, Any] = {
        "ok": False,
        "error_code": error.status,
        "description": error.description,
    }
    if error.parameters:
        body["parameters"] = error.parameters
    return web.json_response(body, status=error.status)


async def _parameters(request: web.Request) -> Json:
    """From the query, a form, a multipart form or a JSON body."""
    parameters: Json = dict(request.query)
    if request.content_type == "application/json":
        try:
            parameters.update(await request.json())
        except (json.JSONDecodeError, TypeError, ValueError):
            parameters["broken_json"] = True
    else:
        parameters.update(await request.post())
    return parameters
