"""/v1/responses: a conversation goes on from the state after any of its replies."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Annotated, Any

from fastapi import APIRouter, Path, Request
from pydantic import BaseModel, ConfigDict

from rwkv_train.files import quoted
from rwkv_train.serve.api_chat import SSE, Talker, service_of, thinking_of
from rwkv_train.serve.errors import ERRORS, ApiError
from rwkv_train.serve.jobs import End, Piece
from rwkv_train.serve.schemas import ResponseRequest
from rwkv_train.serve.service import Running, Service
from rwkv_train.serve.sessions import Turn
from rwkv_train.serve.streams import EventStream, sse, unless_gone
from rwkv_train.serve.tokens import Rights

router = APIRouter(tags=["conversations"], responses=ERRORS)
WHY = {"length": "max_output_tokens", "cancelled": "cancelled", "time": "time"}
Id = Annotated[str, Path(max_length=100, description="A response's id.")]


class ResponseAnswer(BaseModel):
    """As OpenAI's; `version` is of the weights that wrote it, `note` what went wrong with keeping it."""

    model_config = ConfigDict(extra="allow")

    id: str
    object: str = "response"
    created_at: int
    model: str
    status: str
    output: list[dict[str, Any]]
    previous_response_id: str | None
    usage: dict[str, Any] | None
    metadata: dict[str, str]
    version: str
    note: str | None


class Items(BaseModel):
    object: str = "list"
    data: list[dict[str, Any]]
    first_id: str | None
    last_id: str | None
    has_more: bool = False


class Deleted(BaseModel):
    id: str
    object: str = "response"
    deleted: bool = True


@router.post("/v1/responses", response_model=ResponseAnswer, responses=SSE)
async def respond(request: Request, asked: ResponseRequest, rights: Talker) -> Any:
    """A reply, kept with the state after it. With `previous_response_id` only the new input is read."""
    service = service_of(request)
    name, previous = service.named(asked.model), None
    messages = [{"role": "system", "content": asked.instructions}] if asked.instructions else []
    given = [{"role": "user", "content": asked.input}] if isinstance(asked.input, str) else asked.input
    messages += [m if isinstance(m, dict) else m.plain() for m in given]
    if asked.previous_response_id is not None:
        previous = await _turn(service, asked.previous_response_id, rights)
        if asked.model is None:
            name = service.named(previous.model)
    who, thinking = (
        service.who(rights, name),
        thinking_of(asked.reasoning and asked.reasoning.effort, asked.text and asked.text.format),
    )

    def find(version: str):
        if previous:
            return service.conversations.after(previous, messages, version, thinking)
        return service.conversations.whole(messages, who, version, thinking)

    format = asked.text and asked.text.format and asked.text.format.model_dump(by_alias=True, exclude_none=True)
    sampled = service.sampling(asked)
    answer = {
        "previous": asked.previous_response_id,
        "instructions": asked.instructions,
        "metadata": asked.metadata or {},
        "temperature": sampled.temperature,
        "top_p": sampled.top_p,
        "max_output_tokens": asked.max_output_tokens,
        "format": format or {"type": "text"},
    }
    most, stored = service.most(asked.max_output_tokens), asked.store is not False
    running = await service.reply(
        name, find, asked, rights, "resp_", most, stored=stored, answer=answer, format=format or None
    )
    if asked.stream:
        return EventStream(_events(service, running))
    return await unless_gone(request, _answer(service, running))


@router.get("/v1/responses/{id}", response_model=ResponseAnswer)
async def get(request: Request, id: Id, rights: Talker) -> Any:
    """A reply that was kept, or one that is being written."""
    service = service_of(request)
    if running := service.running(id, rights):
        return _object(running, "in_progress")
    return _kept(await _turn(service, id, rights))


@router.get("/v1/responses/{id}/input_items", response_model=Items)
async def items(request: Request, id: Id, rights: Talker) -> Any:
    """All messages of a conversation before a reply, oldest first."""
    service = service_of(request)
    turn = await _turn(service, id, rights)
    try:
        messages = await asyncio.to_thread(service.conversations.transcript, turn)
    except ValueError as error:
        raise ApiError(404, str(error), "not_found") from None
    data = [
        {
            "id": f"msg_{n}_{m['turn']}",
            "type": "message",
            "role": m["role"],
            "status": "completed",
            "content": [{"type": "output_text" if m["role"] == "assistant" else "input_text", "text": m["content"]}],
            "response_id": m["turn"],
        }
        for n, m in enumerate(messages)
    ]
    ends = {"first_id": data[0]["id"] if data else None, "last_id": data[-1]["id"] if data else None}
    return {"object": "list", "data": data, "has_more": False} | ends


@router.delete("/v1/responses/{id}", response_model=Deleted)
async def delete(request: Request, id: Id, rights: Talker) -> Any:
    """Forget a turn. What follows it stays."""
    if not await asyncio.to_thread(service_of(request).sessions.delete, id, rights.name):
        raise _unknown(id)
    return {"id": id, "object": "response", "deleted": True}


async def _turn(service: Service, id: str, rights: Rights) -> Turn:
    if service.running(id, rights):
        raise ApiError(409, f"the response {quoted(id)} is still being written; wait for its end", "in_progress")
    turn = await asyncio.to_thread(service.sessions.get, id, rights.name)
    if turn is None:
        raise _unknown(id)
    return turn


def _unknown(id: str) -> ApiError:
    return ApiError(404, f"no response of yours is called {quoted(id)}; it may have been deleted", "response_not_found")


async def _answer(service: Service, running: Running) -> dict:
    async with aclosing(service.events(running)) as events:
        async for event in events:
            if isinstance(event, End) and event.reason == "error":
                raise ApiError(500, f"the reply broke off: {event.error}", "model_error")
    return _kept(running.turns[0], running.note)


async def _events(service: Service, running: Running) -> AsyncGenerator[str]:
    """As OpenAI's, one after another."""
    number, item = 0, {"type": "message", "id": f"msg_{running.ids[0]}", "role": "assistant"}
    place = {"item_id": item["id"], "output_index": 0, "content_index": 0}

    def event(kind: str, **data) -> str:
        nonlocal number
        number += 1
        return sse({"type": kind, "sequence_number": number - 1} | data, kind)

    yield event("response.created", response=_object(running, "in_progress"))
    yield event("response.in_progress", response=_object(running, "in_progress"))
    opened = item | {"status": "in_progress", "content": []}
    yield event("response.output_item.added", output_index=0, item=opened)
    yield event("response.content_part.added", **place, part=_part(""))
    async with aclosing(service.events(running)) as events:
        async for each in events:
            if each.text:
                yield event("response.output_text.delta", **place, delta=each.text, logprobs=[])
            if isinstance(each, Piece):
                continue
            if each.reason == "error":
                broken = {"code": "server_error", "message": f"the reply broke off: {each.error}"}
                yield event("response.failed", response=_object(running, "failed") | {"error": broken})
                return
            answer = _kept(running.turns[0], running.note)
            yield event("response.output_text.done", **place, text=each.shown, logprobs=[])
            yield event("response.content_part.done", **place, part=_part(each.shown))
            yield event("response.output_item.done", output_index=0, item=answer["output"][0])
            yield event(f"response.{answer['status']}", response=answer)


def _part(text: str) -> dict:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def _kept(turn: Turn, note: str | None = None) -> dict:
    """A turn as the API shows it."""
    why, more = WHY.get(turn.answer["reason"]), turn.answer
    written = turn.answer["count"]
    message = {"type": "message", "id": f"msg_{turn.id}", "role": "assistant", "status": turn.status}
    output = [message | {"content": [_part(turn.reply)]}]
    usage = {
        "input_tokens": turn.length - len(turn.ids),
        "input_tokens_details": {"cached_tokens": turn.length - len(turn.ids) - more.get("read", 0)},
        "output_tokens": written,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": turn.length - len(turn.ids) + written,
    }
    known = {"note": note, "output": output, "usage": usage, "incomplete_details": {"reason": why} if why else None}
    return _shown(turn.id, turn.created, turn.model, turn.version, turn.status, more) | known


def _object(running: Running, status: str) -> dict:
    return _shown(running.ids[0], running.created, running.model, running.version, status, running.answer)


def _shown(id: str, created: int, model: str, version: str, status: str, more: dict) -> dict:
    return {
        "id": id,
        "object": "response",
        "created_at": created,
        "model": model,
        "version": version,
        "status": status,
        "output": [],
        "previous_response_id": more.get("previous"),
        "instructions": more.get("instructions"),
        "metadata": more.get("metadata", {}),
        "temperature": more.get("temperature"),
        "top_p": more.get("top_p"),
        "max_output_tokens": more.get("max_output_tokens"),
        "text": {"format": more.get("format", {"type": "text"})},
        "error": None,
        "incomplete_details": None,
        "usage": None,
        "note": None,
        "parallel_tool_calls": False,
        "tool_choice": "none",
        "tools": [],
    }
