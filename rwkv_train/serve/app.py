"""The FastAPI app: routes, what guards them, and the page."""

import asyncio
import sys
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path as File
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, FastAPI, Path, Request
from fastapi.responses import FileResponse, PlainTextResponse, Response
from fastapi.staticfiles import StaticFiles
from pydantic import BaseModel

from rwkv_train.serve import api_chat, api_completions, api_feedback, api_responses
from rwkv_train.serve.api_chat import service_of
from rwkv_train.serve.errors import ERRORS, install_errors
from rwkv_train.serve.guard import Guard
from rwkv_train.serve.room import LiveRoom
from rwkv_train.serve.service import Service
from rwkv_train.serve.tokens import Rights, Tokens, require

TOKEN_RATE = 600  # requests a minute of a token, unless told otherwise
PAGE = File(__file__).parent / "page"
router = APIRouter(tags=["server"], responses=ERRORS)


class Health(BaseModel):
    status: Literal["ok"]


class Model(BaseModel):
    """A profile, which corrections change, or the model without them. talk, teach, operate: whether you may."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str
    version: str
    talk: bool
    teach: bool
    operate: bool
    learning: int | None
    waiting: int


class Models(BaseModel):
    object: Literal["list"] = "list"
    data: list[Model]


async def known(request: Request) -> Rights:
    """Whoever asks, whatever they may do."""
    return request.app.state.tokens.of(request.headers.get("authorization"))


Known = Annotated[Rights, Depends(known)]


@router.get("/health", response_model=Health)
async def health() -> Any:
    """Whether the server is up. It asks for no token."""
    return {"status": "ok"}


@router.get("/metrics", response_class=PlainTextResponse, dependencies=[Depends(require("operate"))])
async def metrics(request: Request) -> Any:
    """Figures for Prometheus."""
    return PlainTextResponse(
        await asyncio.to_thread(service_of(request).metrics.text), media_type="text/plain; version=0.0.4"
    )


@router.get("/v1/models", response_model=Models)
async def models(request: Request, rights: Known) -> Any:
    """The models; the first is taken where a request names none."""
    service = service_of(request)
    return {"object": "list", "data": [_model(service, name, rights) for name in service.models]}


@router.get("/v1/models/{id}", response_model=Model)
async def model(
    request: Request, id: Annotated[str, Path(max_length=200, description="A name of /v1/models.")], rights: Known
) -> Any:
    """One model."""
    service = service_of(request)
    return _model(service, service.named(id), rights)


def _model(service: Service, name: str, rights: Rights) -> dict:
    taught, now = name in service.learners, service.teaching.now
    return {
        "id": name,
        "object": "model",
        "created": service.created,
        "owned_by": "rwkv_train",
        "version": service.teaching.model(name)[1],
        "talk": rights.talk,
        "teach": taught and rights.may_teach(name),
        "operate": rights.operate,
        "learning": now[1] if now and now[0] == name else None,
        "waiting": service.teaching.waiting(name) if taught else 0,
    }


pages = APIRouter(include_in_schema=False)


@pages.get("/")
async def chat_page() -> Response:
    return FileResponse(PAGE / "index.html")


@pages.get("/room")
async def room_page() -> Response:
    return FileResponse(PAGE / "room.html")


def create_app(service: Service, tokens: Tokens) -> Guard:
    """The app of a service, which it opens and closes, behind its guard."""
    room = LiveRoom(service, service.config)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncGenerator[None]:
        async with service, room:
            app.state.service = service
            if service.config.room:
                room.feed(sys.stdin, sys.stdout)
            yield

    app = FastAPI(
        title="rwkv_train",
        description="Talk to an RWKV model, and correct it while you talk.",
        version="1",
        lifespan=lifespan,
        docs_url=None,  # its page would load scripts from elsewhere
        redoc_url=None,
    )
    app.state.tokens = tokens
    config = service.config
    install_errors(app)
    for each in (router, api_chat.router, api_completions.router, api_responses.router, api_feedback.router, pages):
        app.include_router(each)
    room.attach(app)
    app.mount("/page", StaticFiles(directory=PAGE), name="page")
    rate = config.rate or (TOKEN_RATE if len(tokens) else None)
    return Guard(app, tokens, config.host, config.allow_host, body_bytes=config.body, rate=rate)
