"""/v1/chat/completions, and what other routes for text share with it."""

import json
import secrets
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request
from pydantic import BaseModel

from rwkv_train.data import functions
from rwkv_train.data.templates import REASONING
from rwkv_train.serve.errors import ERRORS, ApiError
from rwkv_train.serve.jobs import End, Event, Piece
from rwkv_train.serve.schemas import EFFORTS, ChatRequest, FlatSchemaFormat, Format, SchemaFormat
from rwkv_train.serve.service import Running, Service
from rwkv_train.serve.streams import EventStream, sse, together, unless_gone
from rwkv_train.serve.tokens import Rights, require
from rwkv_train.tokenizer import Tokenizer

router = APIRouter(tags=["text"], responses=ERRORS)
Talker = Annotated[Rights, Depends(require("talk"))]
SSE = {
    200: {"content": {"text/event-stream": {"schema": {"type": "string"}}}, "description": "The text, or its events."}
}


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: dict[str, int]


class Choice(BaseModel):
    index: int
    message: dict[str, Any]
    logprobs: dict[str, Any] | None
    finish_reason: str


class Answer(BaseModel):
    """`system_fingerprint` is the version of the weights."""

    id: str
    created: int
    model: str
    system_fingerprint: str
    usage: Usage


class ChatAnswer(Answer):
    object: str = "chat.completion"
    choices: list[Choice]


def thinking_of(effort: str | None, format: Format | SchemaFormat | FlatSchemaFormat | None) -> str | None:
    """How a thought is asked for; None leaves it to the server. A format is followed from the first letter on."""
    if format is None or format.type == "text":
        return EFFORTS.get(effort)
    if effort not in (None, "none"):
        raise ApiError(400, "a reply in a format has no thought; leave out the effort, or the format", param="effort")
    return "off"


def service_of(request: Request) -> Service:
    return request.app.state.service


@router.post("/v1/chat/completions", response_model=ChatAnswer, responses=SSE)
async def chat(request: Request, asked: ChatRequest, rights: Talker) -> Any:
    """A reply to a conversation. What of it was said here before is not read again."""
    service = service_of(request)
    if asked.max_tokens and asked.max_completion_tokens:
        raise ApiError(400, "max_tokens and max_completion_tokens are the same; give one of them", param="max_tokens")
    if asked.top_logprobs is not None and not asked.logprobs:
        raise ApiError(400, "top_logprobs needs logprobs: true", param="top_logprobs")
    if asked.stream_options and not asked.stream:
        raise ApiError(400, "stream_options needs stream: true", param="stream_options")
    name = service.named(asked.model)
    format = asked.response_format and asked.response_format.model_dump(by_alias=True, exclude_none=True)
    if format and format["type"] == "json_schema":
        format = {"type": "json_schema"} | format["json_schema"]
    tools = [] if asked.tool_choice == "none" else [tool.plain() for tool in asked.tools or ()]
    messages, who = functions.as_texts([m.plain() for m in asked.messages], tools), service.who(rights, name)
    thinking = thinking_of(asked.reasoning_effort, asked.response_format)
    running = await service.reply(
        name,
        lambda version: service.conversations.whole(messages, who, version, thinking),
        asked,
        rights,
        "chatcmpl-",
        service.most(asked.max_tokens or asked.max_completion_tokens),
        asked.n,
        asked.store is not False,
        format=format,
        likeliest=(asked.top_logprobs or 0) if asked.logprobs else None,
    )
    if asked.stream:
        usage = bool(asked.stream_options and asked.stream_options.include_usage)
        return EventStream(_chat_events(service, running, bool(asked.logprobs), usage, bool(tools)))
    return await unless_gone(request, _chat_answer(service, running, bool(asked.logprobs), bool(tools)))


async def _chat_answer(service: Service, running: Running, scored: bool, called: bool) -> dict | None:
    pieces, ends = await everything(service, [running])
    choices = [
        {
            "index": n,
            "message": {"role": "assistant", "refusal": None} | _said(end, called) | _reasoning(end.thought),
            "logprobs": {"content": [_scored(service.tokenizer, p) for p in pieces[0, n]]} if scored else None,
            "finish_reason": finish(end, called),
        }
        for (_, n), end in sorted(ends.items())
    ]
    return head_of(running, "chat.completion") | {"choices": choices, "usage": usage_of([running], ends.values())}


async def _chat_events(
    service: Service, running: Running, scored: bool, usage: bool, called: bool
) -> AsyncGenerator[str]:
    head, ends = head_of(running, "chat.completion.chunk"), []
    thought = [0] * len(running.ids)  # characters of it that were sent
    held = dict.fromkeys(range(len(running.ids)), "") if called else {}  # what may become a call

    def sure(n: int, text: str) -> str:
        """What of a choice's text is no call."""
        if n not in held:
            return text
        held[n] += text
        return "" if functions.may_call(held[n]) else held.pop(n)

    def chunk(n: int, delta: dict, reason: str | None = None, scores: list | None = None) -> str:
        choice = {"index": n, "delta": delta, "logprobs": scores and {"content": scores}, "finish_reason": reason}
        return sse(head | {"choices": [choice]} | ({"usage": None} if usage else {}))

    for n in range(len(running.ids)):
        yield chunk(n, {"role": "assistant", "content": ""})
    async with aclosing(service.events(running)) as events:
        async for event in events:
            if isinstance(event, Piece) and (event.text or event.thought or scored):
                scores = [_scored(service.tokenizer, event)] if scored else None
                text = sure(event.choice, event.text)
                thought[event.choice] += len(event.thought)
                yield chunk(event.choice, {"content": text} | _reasoning(event.thought), scores=scores)
            if isinstance(event, End):
                ends.append(event)
                if event.reason == "error":
                    yield sse({"error": broken(event)})
                    continue
                if more := event.thought[thought[event.choice] :]:
                    yield chunk(event.choice, {"content": ""} | _reasoning(more))
                (asked, rest), left = _calls(event, called), held.get(event.choice, "") + event.text
                if asked:
                    yield chunk(event.choice, {"tool_calls": [{"index": i} | call for i, call in enumerate(asked)]})
                if rest if asked else left:
                    yield chunk(event.choice, {"content": rest if asked else left})
                yield chunk(event.choice, {}, finish(event, called))
    if usage:
        yield sse(head | {"choices": [], "usage": usage_of([running], ends)})
    yield sse("[DONE]")


async def everything(service: Service, running: list[Running]) -> tuple[dict, dict]:
    """({(job, choice): its pieces}, {(job, choice): its end}) ApiError where one failed."""
    pieces: dict[tuple[int, int], list[Piece]] = {(j, n): [] for j, r in enumerate(running) for n in range(len(r.ids))}
    ends: dict[tuple[int, int], End] = {}
    async with aclosing(together([service.events(each) for each in running])) as events:
        async for job, event in events:
            _collect(job, event, pieces, ends)
    return pieces, ends


def _collect(job: int, event: Event, pieces: dict, ends: dict) -> None:
    if isinstance(event, Piece):
        pieces[job, event.choice].append(event)
        return
    if event.reason == "error":
        raise ApiError(500, broken(event)["message"], "model_error")
    ends[job, event.choice] = event


def _reasoning(thought: str) -> dict[str, str]:
    return {REASONING: thought} if thought else {}


def _said(end: End, called: bool) -> dict[str, Any]:
    """A reply as a message has it. called: functions were named that it may call."""
    asked, rest = _calls(end, called)
    return {"content": rest or None, "tool_calls": asked} if asked else {"content": end.shown}


def _calls(end: End, called: bool) -> tuple[list[dict[str, Any]], str]:
    """(the calls of a reply, what else it says)"""
    asked, rest = functions.calls(end.shown) if called else ([], end.shown)
    given = [call["arguments"] for call in asked]
    texts = [a if isinstance(a, str) else json.dumps(a, ensure_ascii=False) for a in given]
    return [
        {"id": f"call_{secrets.token_hex(8)}", "type": "function", "function": call | {"arguments": text}}
        for call, text in zip(asked, texts, strict=True)
    ], rest


def finish(end: End, called: bool = False) -> str:
    if called and functions.calls(end.shown)[0]:
        return "tool_calls"
    return "stop" if end.reason == "stop" else "length"


def usage_of(running: list[Running], ends) -> dict:
    """Tokens; `cached_tokens` of the prompt were read before."""
    prompt, written = sum(r.asked.length + r.asked.opened for r in running), sum(end.count for end in ends)
    cached = prompt - sum(len(r.asked.read) for r in running)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": written,
        "total_tokens": prompt + written,
        "prompt_tokens_details": {"cached_tokens": cached},
    }


def broken(end: End) -> dict:
    return {
        "message": f"the reply broke off: {end.error}",
        "type": "server_error",
        "param": None,
        "code": "model_error",
    }


def head_of(running: Running, object: str) -> dict:
    head = {"id": running.ids[0], "object": object, "created": running.created, "model": running.model}
    return head | {"system_fingerprint": running.version}


def _scored(tokenizer: Tokenizer, piece: Piece) -> dict:
    def shown(token: int, score: float) -> dict:
        data = tokenizer.decode_bytes([token])
        return {"token": data.decode(errors="replace"), "logprob": score, "bytes": list(data)}

    top = [shown(*pair) for pair in piece.scores.likeliest]
    return shown(piece.token, piece.scores.token) | {"top_logprobs": top}
