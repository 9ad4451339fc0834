"""`/v1/load_lora_adapter` and `/v1/unload_lora_adapter`, as vLLM has them; for who has an admin key."""

from fastapi import APIRouter, Request
from fastapi.responses import PlainTextResponse

from full_stack_transformer.errors import AdminAccessError
from full_stack_transformer.serving.http.bodies import body_schema, parse_body
from full_stack_transformer.serving.schemas import LoadAdapterRequest, UnloadAdapterRequest
from full_stack_transformer.serving.workers.adapters import Adapters


def add_adapter_routes(router: APIRouter, adapters: Adapters) -> None:
    """The routes."""

    @router.post(
        "/load_lora_adapter",
        response_class=PlainTextResponse,
        openapi_extra=body_schema(LoadAdapterRequest),
    )
    async def load_adapter(request: Request) -> PlainTextResponse:
        """Serve an adapter as a model of its own; running streams go on."""
        _check_admin(request)
        body = await parse_body(request, LoadAdapterRequest)
        await adapters.load(
            body.lora_name,
            body.lora_path,
            base_name=body.base_model_name,
            replaces=bool(body.load_inplace),
        )
        return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' added successfully.")

    @router.post(
        "/unload_lora_adapter",
        response_class=PlainTextResponse,
        openapi_extra=body_schema(UnloadAdapterRequest),
    )
    async def unload_adapter(request: Request) -> PlainTextResponse:
        """Refuse new requests for an adapter; those under way end as they would have."""
        _check_admin(request)
        body = await parse_body(request, UnloadAdapterRequest)
        await adapters.unload(body.lora_name)
        return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' removed successfully.")


def _check_admin(request: Request) -> None:
    """Refuse before anything of the body is read.

    Raises:
        AdminAccessError: without an admin key.
    """
    if not request.state.facts.is_admin:
        raise AdminAccessError(
            "this route needs an admin key, which FST_ADMIN_KEYS or --admin_keys_file of fst serve names; "
            "send it as `Authorization: Bearer KEY`"
        )
