"""Every answer's envelope: `{"success": true, "data": ...}` or
`{"success": false, "error": {"code", "message", "details"?}}`."""

from __future__ import annotations

from typing import Any, Generic, Literal, TypeVar

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict
from pydantic.alias_generators import to_camel
from starlette.exceptions import HTTPException

Data = TypeVar("Data")


class Shown(BaseModel):
    """Part of an answer or a request of the pools API: camelCase outside, snake_case inside."""

    model_config = ConfigDict(
        alias_generator=to_camel,
        populate_by_name=True,
        extra="forbid",
        frozen=True,
        use_attribute_docstrings=True,
    )


class Success(BaseModel, Generic[Data]):
    """The envelope of a success."""

    success: Literal[True] = True
    data: Data


class ErrorDetail(BaseModel):
    code: str
    message: str
    details: Any = None


class Failure(BaseModel):
    """The envelope of an error."""

    success: Literal[False] = False
    error: ErrorDetail


class ApiError(Exception):
    """A refusal, with the status, the code and the message that the caller gets."""

    def __init__(
        self,
        status: int,
        code: str,
        message: str,
        details: Any = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.message = message
        self.details = details
        self.headers = headers or {}

    def answer(self) -> JSONResponse:
        error: dict[str, Any] = {"code": self.code, "message": self.message}
        if self.details is not None:
            error["details"] = self.details
        return JSONResponse({"success": False, "error": error}, self.status, self.headers)


def documented(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """For a route's `responses`: these statuses come with the error envelope."""
    return {status: {"model": Failure} for status in statuses}


def install_error_handlers(app: FastAPI) -> None:
    """Let every error of `app`, FastAPI's own included, come in the envelope."""
    app.add_exception_handler(ApiError, _api_error)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(RequestValidationError, _invalid_request)
    app.add_exception_handler(Exception, _unexpected)


_HTTP_CODES = {
    400: ("bad_request", "This is not a request we can read."),
    404: ("not_found", "There is nothing at this address."),
    405: ("method_not_allowed", "This address does not take this method."),
}


async def _api_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, ApiError)
    return error.answer()


async def _http_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    code, message = _HTTP_CODES.get(error.status_code, ("http_error", str(error.detail)))
    headers = dict(error.headers or {})
    return ApiError(error.status_code, code, message, headers=headers).answer()


async def _invalid_request(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    faults = [
        {"field": ".".join(str(part) for part in fault["loc"]), "message": fault["msg"]}
        for fault in error.errors()[:20]
    ]
    media_type = request.headers.get("content-type", "")
    if request.method in ("POST", "PATCH") and not media_type.startswith("application/json"):
        message = f"Send the body as JSON, with Content-Type: application/json (not {media_type or 'none'})."
        return ApiError(422, "invalid_request", message, faults).answer()
    named = "; ".join(f"{fault['field']}: {fault['message']}" for fault in faults[:3])
    return ApiError(422, "invalid_request", f"The request is not valid: {named}", faults).answer()


async def _unexpected(request: Request, error: Exception) -> JSONResponse:
    # Starlette logs the exception with its traceback; the caller learns nothing of our insides.
    return ApiError(500, "internal_error", "Something went wrong on our side; it was logged.").answer()
