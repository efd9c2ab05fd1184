"""/v1/feedback: corrections, what becomes of them, and taking them back."""

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import fields
from typing import Annotated, Any, Literal, get_args

from fastapi import APIRouter, Body, Depends, Path, Query, Request
from fastapi.responses import PlainTextResponse
from pydantic import BaseModel

from rwkv_train.command_config import explained
from rwkv_train.feedback import Correction, FeedbackConfig
from rwkv_train.feedback.trainable import Trainable
from rwkv_train.files import quoted
from rwkv_train.serve.api_chat import service_of
from rwkv_train.serve.errors import ERRORS, ApiError
from rwkv_train.serve.schemas import FeedbackRequest
from rwkv_train.serve.service import Service
from rwkv_train.serve.streams import EventStream, sse
from rwkv_train.serve.tokens import Rights, require

router = APIRouter(tags=["corrections"], responses=ERRORS)
Teacher = Annotated[Rights, Depends(require("teach"))]
Model = Annotated[str | None, Query(description="The profile; the first one if not given.")]
Number = Annotated[int, Path(ge=1, le=2**31, description="A correction's number.")]
EVENTS = {200: {"content": {"text/event-stream": {"schema": {"type": "string"}}}, "description": "Its events."}}


class OutcomeAnswer(BaseModel):
    """What became of a correction. Losses and drift in nats a token, drift of everything else; share: of the change
    that was kept; paraphrases: other wordings taught along; contrasts: near questions whose answers were kept."""

    accepted: bool
    why: str
    loss_before: float | None
    loss_after: float | None
    answer_before: str | None
    answer_after: str | None
    steps: int | None
    share: float | None
    paraphrases: list[str]
    contrasts: list[str]
    drift: float | None
    seconds: float | None
    version: str | None
    note: str | None


class Feedback(BaseModel):
    id: int
    object: Literal["feedback"] = "feedback"
    model: str
    kind: Literal["answer", "good", "bad", "also", "keep"]
    status: Literal["waiting", "learning", "learnt", "refused", "failed", "undone", "outdated"]
    question: str
    answer: str | None
    rejected: str | None
    of: int | None
    response_id: str | None
    created_at: int | None
    outcome: OutcomeAnswer | None


class FeedbackList(BaseModel):
    object: Literal["list"] = "list"
    data: list[Feedback]


class Undone(BaseModel):
    undone: list[int]
    version: str


class Setting(BaseModel):
    name: str
    value: float | int | str
    default: float | int | str
    type: Literal["number", "integer", "text"]
    choices: list[str] | None
    description: str


class Settings(BaseModel):
    object: Literal["list"] = "list"
    data: list[Setting]


class Sleeping(BaseModel):
    status: Literal["sleeping"] = "sleeping"


@router.post("/v1/feedback", status_code=202, response_model=Feedback)
async def teach(request: Request, asked: FeedbackRequest, rights: Teacher) -> Any:
    """Correct the model. It is on the disk when this answers, and learnt when it is its turn."""
    service = service_of(request)
    name = taught(service, asked.model, rights)
    work = await asyncio.to_thread(_correction, service, name, asked, rights)
    number = await asyncio.to_thread(service.teaching.receive, name, asked.kind, work, asked.response_id)
    return service.teaching.one(name, number)


@router.get("/v1/feedback", response_model=FeedbackList)
async def corrections(request: Request, rights: Teacher, model: Model = None) -> Any:
    """All corrections, oldest first."""
    service = service_of(request)
    name = taught(service, model, rights)
    return {"object": "list", "data": await asyncio.to_thread(service.teaching.corrections, name)}


@router.get("/v1/feedback/settings", response_model=Settings)
async def settings(request: Request, rights: Teacher, model: Model = None) -> Any:
    """How corrections to come are learnt."""
    service = service_of(request)
    return _settings(service, taught(service, model, rights))


@router.patch("/v1/feedback/settings", response_model=Settings)
async def change(
    request: Request,
    rights: Teacher,
    changes: Annotated[dict[str, float | int | str], Body(description="New values by name.")],
    model: Model = None,
) -> Any:
    """Change how corrections to come are learnt."""
    service = service_of(request)
    name = taught(service, model, rights)
    kinds = {f.name: type(f.default) for f in fields(FeedbackConfig)}
    for key, value in changes.items():
        kind = kinds.get(key, type(value))
        if kind is float and isinstance(value, int):
            changes[key] = float(value)
        elif type(value) is not kind:
            raise ApiError(400, f"{quoted(key)} must be {KINDS[kind]}, found {value!r:.60}", param=key)
    await asyncio.to_thread(service.teaching.configure, name, changes)
    return _settings(service, name)


@router.get("/v1/feedback/export", response_class=PlainTextResponse)
async def export(request: Request, rights: Teacher, model: Model = None) -> Any:
    """What was learnt, as chats that `prepare` reads: a line of JSON each."""
    service = service_of(request)
    text = await asyncio.to_thread(service.teaching.export, taught(service, model, rights))
    return PlainTextResponse(text, media_type="application/x-ndjson")


@router.get("/v1/feedback/events", responses=EVENTS, response_class=EventStream)
async def events(request: Request, rights: Teacher, model: Model = None) -> Any:
    """Server-sent events of all corrections from now on: received, watch, step, gate, done, slept."""
    service = service_of(request)
    return EventStream(_events(service, taught(service, model, rights)))


@router.post("/v1/feedback/sleep", status_code=202, response_model=Sleeping)
async def sleep(request: Request, rights: Teacher, model: Model = None) -> Any:
    """Learn all corrections together, and keep that if it is better; `slept` on the events tells what it came to."""
    service = service_of(request)
    name = taught(service, model, rights)
    if len(service.learners[name].learnt()) < 2:
        raise ApiError(409, "there are fewer than two corrections to learn together", "nothing_to_do")
    service.teaching.sleep(name)
    return {"status": "sleeping"}


@router.get("/v1/feedback/{id}", response_model=Feedback)
async def correction(request: Request, id: Number, rights: Teacher, model: Model = None) -> Any:
    """One correction."""
    service = service_of(request)
    return _one(service, taught(service, model, rights), id)


@router.get("/v1/feedback/{id}/events", responses=EVENTS, response_class=EventStream)
async def events_of(request: Request, id: Number, rights: Teacher, model: Model = None) -> Any:
    """Server-sent events of one correction, from its beginning: received, watch, step, gate, done."""
    service = service_of(request)
    name = taught(service, model, rights)
    _one(service, name, id)
    return EventStream(_events(service, name, id))


@router.delete("/v1/feedback/{id}", response_model=Undone)
async def undo(request: Request, id: Number, rights: Teacher, model: Model = None) -> Any:
    """Take a correction back, and what belongs to it: the weights become those without it, to the bit."""
    service = service_of(request)
    name = taught(service, model, rights)
    if _one(service, name, id)["status"] not in ("waiting", "learning", "learnt", "outdated"):
        raise ApiError(409, f"correction {id} was not learnt, or was taken back before", "nothing_to_do")
    ids = await asyncio.wrap_future(service.teaching.undo(name, id))
    return {"undone": ids, "version": service.teaching.model(name)[1]}


def taught(service: Service, model: str | None, rights: Rights) -> str:
    """The profile that is spoken of. ApiError 404 if there is none, 403 where it may not be taught."""
    name = service.named(model)
    if name not in service.learners:
        raise ApiError(400, f"{quoted(name)} is the model without corrections; name a profile", param="model")
    if not rights.may_teach(name):
        raise ApiError(403, f"{quoted(rights.name)} may not teach {quoted(name)}; use a token that may", "not_allowed")
    return name


def _one(service: Service, name: str, number: int) -> dict:
    found = service.teaching.one(name, number)
    if found is None:
        raise ApiError(404, f"{quoted(name)} has no correction {number}; /v1/feedback lists them", "not_found")
    return found


NEEDS = {
    "good": ({"response_id"}, set()),
    "bad": ({"response_id"}, set()),
    "also": ({"question"}, {"of"}),
    "keep": ({"question"}, {"of"}),
}


def _correction(service: Service, name: str, asked: FeedbackRequest, rights: Rights) -> Correction:
    given = {key for key in ("response_id", "question", "answer", "of") if getattr(asked, key) is not None}
    needed, possible = NEEDS.get(
        asked.kind, ({"answer", "response_id" if "response_id" in given else "question"}, set())
    )
    if missing := sorted(needed - given):
        raise ApiError(400, f"a correction of kind {asked.kind} needs {missing[0]}; give it", param=missing[0])
    if extra := sorted(given - needed - possible):
        raise ApiError(400, f"a correction of kind {asked.kind} takes no {extra[0]}; leave it out", param=extra[0])
    if asked.kind in ("also", "keep"):
        find: Callable = service.teaching.also if asked.kind == "also" else service.teaching.keep
        return find(name, asked.question, asked.of)
    if asked.response_id is None:
        return Correction(asked.question, asked.answer)
    turn = service.sessions.get(asked.response_id, rights.name)
    if turn is None:
        missing = f"no response of yours is called {quoted(asked.response_id)}; it may have been deleted"
        raise ApiError(404, missing, "response_not_found", "response_id")
    last = turn.messages[-1]
    if last["role"] != "user":
        raise ApiError(400, "that reply answers no message of a user's, so it cannot be corrected", param="response_id")
    context = tuple(service.conversations.context(turn))
    if asked.kind == "good":
        return Correction(last["content"], turn.reply, context)
    if asked.kind == "bad":
        return Correction(last["content"], None, context, turn.reply)
    rejected = turn.reply if turn.reply and turn.reply != asked.answer else None
    return Correction(last["content"], asked.answer, context, rejected)


KINDS = {float: "a number", int: "a whole number", str: "text"}


def _settings(service: Service, name: str) -> dict:
    config, types = service.learners[name].config, {float: "number", int: "integer", str: "text"}
    return {
        "object": "list",
        "data": [
            {
                "name": f.name,
                "value": getattr(config, f.name),
                "default": f.default,
                "type": types[type(f.default)],
                "choices": list(get_args(Trainable)) if f.name == "trainable" else None,
                "description": explained(FeedbackConfig, f.name),
            }
            for f in fields(FeedbackConfig)
        ],
    }


async def _events(service: Service, name: str, number: int | None = None) -> AsyncGenerator[str]:
    """Those of one correction until it is done, or of all of a profile."""
    yield ": here\n\n"
    async with aclosing(service.listeners.listen()) as listening:
        if number is not None:
            said = service.listeners.past(name, number)
            for event, data in said:
                yield sse({"id": number} | data, event)
            now = _one(service, name, number)
            if now["status"] not in ("waiting", "learning"):
                if not said or said[-1][0] != "done":
                    yield sse(now, "done")
                return
        async for profile, which, event, data in listening:
            if profile == name and number in (None, which):
                yield sse(({"id": which} if which else {}) | data, event)
                if event == "done" and number is not None:
                    return
