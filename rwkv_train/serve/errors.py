"""Every error in OpenAI's shape: {"error": {"message", "type", "param", "code"}}."""

import errno
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, Field
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse
from starlette.routing import Match, Mount

from rwkv_train.files import quoted

METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")
FULL = {errno.ENOSPC, errno.EDQUOT}
TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
CODES = {401: "invalid_api_key", 429: "rate_limit_exceeded"}


class ErrorDetail(BaseModel):
    message: str = Field(description="What is wrong, where, and what to do.")
    type: str = Field(description="What kind of error it is, as `invalid_request_error`.")
    param: str | None = Field(description="The field of the request that is wrong, as `messages.0.content`.")
    code: str | None = Field(description="The error's name for programs, as `invalid_api_key`.")


class ErrorAnswer(BaseModel):
    error: ErrorDetail


_DESCRIPTIONS: dict[int | str, str] = {
    400: "The request is wrong; `param` names the field.",
    401: "There is no token, or none that is known here.",
    403: "The token does not allow this.",
    404: "There is nothing of that name.",
    408: "The request did not arrive in time.",
    409: "It does not fit what is there now.",
    413: "The request is too large.",
    429: "Too many requests; `Retry-After` says how many seconds to wait.",
    500: "A mistake of the server's, which its log describes.",
    503: "The server is busy; try again later.",
    507: "The server's disk is full.",
    "4XX": "Any other wrong request.",  # and so that FastAPI describes no 422, which is never sent
}
ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorAnswer, "description": text} for status, text in _DESCRIPTIONS.items()
}


class ApiError(Exception):
    """An answer that is an error.

    status: of HTTP. message: what is wrong, where, what to do. param: the field. type, code: None for the usual ones.
    """

    def __init__(
        self,
        status: int,
        message: str,
        code: str | None = None,
        param: str | None = None,
        type: str | None = None,
        headers: dict[str, str] | None = None,
    ):
        super().__init__(message)
        self.status, self.message, self.param = status, message, param
        self.type = type or TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
        self.code = code or CODES.get(status)
        self.headers = dict(headers or {})

    def answer(self) -> JSONResponse:
        detail = {"message": self.message, "type": self.type, "param": self.param, "code": self.code}
        # Half a surrogate pair, out of a request, is no text that could be sent.
        sound = {key: value and value.encode("utf-8", "backslashreplace").decode() for key, value in detail.items()}
        return JSONResponse({"error": sound}, self.status, self.headers)


def install_errors(app: FastAPI) -> None:
    """Have all errors of an app in OpenAI's shape. What is nobody's mistake but ours is a 500 that tells nothing; the
    server that runs the app logs it."""
    handlers = {
        ApiError: _api_error,
        HTTPException: _http_exception,
        RequestValidationError: _wrong_request,
        ValueError: _value_error,
        OSError: _os_error,
        Exception: _mistake,
    }
    for kind, handler in handlers.items():
        app.add_exception_handler(kind, handler)


async def _api_error(request: Request, error: ApiError) -> JSONResponse:
    return error.answer()


async def _http_exception(request: Request, error: HTTPException) -> JSONResponse:
    status, message, headers = error.status_code, str(error.detail), dict(error.headers or {})
    where = quoted(request.scope["path"])
    if status == 404:
        message = f"nothing is at {where}; /openapi.json lists what there is"
    if status == 405:
        allowed = ", ".join(sorted(_methods(request) or {"GET", "HEAD"}))
        headers = {name: value for name, value in headers.items() if name.lower() != "allow"} | {"Allow": allowed}
        message = f"{request.scope['method']} is not for {where}; use {allowed}"
    return ApiError(status, message, headers=headers).answer()


def _methods(request: Request) -> set[str]:
    """The methods of all routes that a request's path is for; Starlette names those of one."""
    routes = [route for route in request.app.routes if not isinstance(route, Mount)]  # which takes any
    scopes = [{**request.scope, "method": method} for method in METHODS]
    return {s["method"] for s in scopes if any(route.matches(s)[0] == Match.FULL for route in routes)}


async def _wrong_request(request: Request, error: RequestValidationError) -> JSONResponse:
    # Of a union all branches are told; the one that went deepest into the request is the one that was meant.
    places = [(_place(one, error.body), one) for one in error.errors()]
    place, found = max(places, key=lambda pair: len(pair[0]))
    param = ".".join(place) or None
    return ApiError(400, _told(param, found), found["type"], param).answer()


def _place(found: dict, body: object) -> list[str]:
    """The path to the wrong field. Pydantic puts names of a union's branches between; the request has none of them."""
    where, *rest = found["loc"]
    if where != "body":
        return [str(item) for item in rest]
    path = []
    for n, item in enumerate(rest, 1):
        if item in (body if isinstance(body, dict) else range(len(body) if isinstance(body, list) else 0)):
            body = body[item]
            path.append(str(item))
        elif n == len(rest) and found["type"] == "missing":
            path.append(str(item))
    return path


def _told(param: str | None, found: dict) -> str:
    if found["type"] == "json_invalid":
        return f"the body is no JSON: {found['ctx']['error']} at character {found['loc'][-1]}"
    name = quoted(param) if param else "the request"
    if found["type"] == "missing":
        return f"{name} is missing; give it" if param else "the body is missing; send JSON"
    if found["type"] == "extra_forbidden":
        return f"{name} is not known here; leave it out"
    value, what = found.get("input"), found["msg"].removeprefix("Value error, ")
    if isinstance(value, str | int | float):
        what += f"; found {quoted(value) if isinstance(value, str) else quoted(repr(value))[1:-1]}"
    return f"{name}: {what}"


async def _value_error(request: Request, error: ValueError) -> JSONResponse:
    """What people did wrong is a ValueError raised by our own modules; others are mistakes of ours."""
    if request.scope["type"] != "http" or not _is_ours(error):
        raise error
    return ApiError(400, str(error)).answer()


def _is_ours(error: ValueError) -> bool:
    package, trace = __name__.partition(".")[0], error.__traceback__
    while trace and trace.tb_next:
        trace = trace.tb_next
    raised = trace.tb_frame.f_globals.get("__name__", "") if trace else ""
    kind = type(error).__module__
    return raised.startswith(f"{package}.") and (type(error) is ValueError or kind.startswith(f"{package}."))


async def _os_error(request: Request, error: OSError) -> JSONResponse:
    if request.scope["type"] != "http" or error.errno not in FULL:
        raise error
    return ApiError(507, "the server's disk is full; nothing of this request was kept", "disk_full").answer()


async def _mistake(request: Request, error: Exception) -> JSONResponse:
    return ApiError(500, "the server made a mistake; its log has more", "internal_error").answer()
