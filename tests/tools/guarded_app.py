"""A small app behind a guard, with every kind of error."""

import errno
from typing import Annotated, Any

from fastapi import APIRouter, Depends, FastAPI, WebSocket
from pydantic import BaseModel, ConfigDict, Field
from starlette.responses import PlainTextResponse
from starlette.testclient import TestClient

from rwkv_train.chat.room import Room
from rwkv_train.serve.guard import ERRORS, ApiError, ErrorAnswer, Guard, Rights, Tokens, install_errors, require

VIEWER, OWNER = "viewer-token-0123456789", "owner-token-0123456789"
TOKENS = {VIEWER: Rights("viewers", talk=True), OWNER: Rights("owner", True, frozenset({"starter"}), True)}


class Message(BaseModel):
    role: str
    content: str


class Ask(BaseModel):
    model_config = ConfigDict(extra="forbid")
    text: str | list[Message]
    temperature: float = Field(1.0, ge=0, le=2)
    metadata: dict[str, Any] = {}


def small_app(tokens: Tokens) -> FastAPI:
    app, routes = FastAPI(responses=ERRORS), APIRouter()
    app.state.tokens = tokens
    install_errors(app)

    @app.post("/v1/ask")
    async def ask(body: Ask, rights: Annotated[Rights, Depends(require("talk"))]) -> dict:
        return {"name": rights.name, "metadata": body.metadata}

    @app.get("/v1/teach")
    async def teach(profile: str, rights: Annotated[Rights, Depends(require("teach"))]) -> bool:
        return rights.may_teach(profile)

    @routes.delete("/v1/teach")
    async def operate(rights: Annotated[Rights, Depends(require("operate"))]) -> None: ...

    @app.get("/page")
    async def page() -> PlainTextResponse:
        return PlainTextResponse("a page", headers={"Access-Control-Allow-Origin": "*", "X-Frame-Options": "DENY"})

    @app.get("/fail/{how}")
    async def fail(how: str) -> None:
        if how == "ours":
            Room(queue=0)
        raise {
            "api": ApiError(409, "no \ud800 now", "busy", "model", headers={"X-Why": "this"}),
            "full": OSError(errno.ENOSPC, "No space left on device", "/home/somebody/journal"),
            "gone": FileNotFoundError(errno.ENOENT, "no such file", "/home/somebody/journal"),
            "theirs": ValueError("/home/somebody"),
            "bug": KeyError("/home/somebody"),
        }[how]

    @app.websocket("/ws")
    async def ws(socket: WebSocket) -> None:
        await socket.accept()
        await socket.send_text("hello")

    app.include_router(routes)
    return app


def client(tokens: Tokens | None = None, base: str = "http://localhost:8000", **limits) -> TestClient:
    tokens = tokens or Tokens()
    guard = Guard(small_app(tokens), tokens, **limits)
    return TestClient(guard, base, raise_server_exceptions=False)


def bearer(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"}


def told(answer, status: int) -> dict:
    """The error of an answer, which has OpenAI's shape."""
    assert answer.status_code == status, answer.text
    return ErrorAnswer.model_validate(answer.json(), strict=True).error.model_dump()
