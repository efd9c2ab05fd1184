"""/v1/completions."""

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from fastapi import APIRouter, Request
from pydantic import BaseModel

from rwkv_train.serve.api_chat import SSE, Answer, Talker, broken, everything, finish, head_of, service_of, usage_of
from rwkv_train.serve.conversation import Asked
from rwkv_train.serve.errors import ERRORS, ApiError
from rwkv_train.serve.jobs import End, Piece
from rwkv_train.serve.schemas import CompletionRequest
from rwkv_train.serve.service import Running, Service
from rwkv_train.serve.streams import EventStream, sse, together, unless_gone
from rwkv_train.tokenizer import Tokenizer

router = APIRouter(tags=["text"], responses=ERRORS)


class TextChoice(BaseModel):
    index: int
    text: str
    logprobs: dict[str, Any] | None
    finish_reason: str


class TextAnswer(Answer):
    object: str = "text_completion"
    choices: list[TextChoice]


@router.post("/v1/completions", response_model=TextAnswer, responses=SSE)
async def completions(request: Request, asked: CompletionRequest, rights: Talker) -> Any:
    """A text goes on. It begins a document, as in training; nothing of it is kept."""
    service = service_of(request)
    name, tokenizer = service.named(asked.model), service.tokenizer
    prompts = [asked.prompt] if isinstance(asked.prompt, str) else asked.prompt
    if len(prompts) * asked.n > service.config.lanes:
        raise ApiError(400, f"n times the prompts is at most {service.config.lanes} here", param="n")
    running: list[Running] = []
    try:
        for number, prompt in enumerate(prompts):
            ids = [tokenizer.eod, *tokenizer.encode(prompt)]
            seed = asked if asked.seed is None else asked.model_copy(update={"seed": asked.seed + number * asked.n})
            find = lambda version, ids=ids: Asked(None, [], ids, ids, None, history=tuple(ids))  # noqa: E731
            more = {"stored": False, "likeliest": asked.logprobs}
            most = service.most(asked.max_tokens)
            running.append(await service.reply(name, find, seed, rights, "cmpl-", most, asked.n, **more))
    except BaseException:  # the whole request is refused
        for each in running:
            service.batcher.cancel(each.job)
        raise
    if asked.stream:
        usage = bool(asked.stream_options and asked.stream_options.include_usage)
        return EventStream(_text_events(service, running, asked, prompts, usage))
    return await unless_gone(request, _text_answer(service, running, asked, prompts))


async def _text_answer(service: Service, running: list[Running], asked: CompletionRequest, prompts: list[str]) -> dict:
    pieces, ends = await everything(service, running)
    choices = []
    for (job, n), end in sorted(ends.items()):
        before = prompts[job] * asked.echo
        scores = _legacy(service.tokenizer, pieces[job, n], len(before)) if asked.logprobs is not None else None
        text = before + end.shown
        index = job * asked.n + n
        choices.append({"index": index, "text": text, "logprobs": scores, "finish_reason": finish(end)})
    return head_of(running[0], "text_completion") | {"choices": choices, "usage": usage_of(running, ends.values())}


async def _text_events(
    service: Service, running: list[Running], asked: CompletionRequest, prompts: list[str], usage: bool
) -> AsyncGenerator[str]:
    head, ends = head_of(running[0], "text_completion"), []
    at = {(job, n): len(prompt) * asked.echo for job, prompt in enumerate(prompts) for n in range(asked.n)}

    def chunk(job: int, n: int, text: str, reason: str | None = None, scores: dict | None = None) -> str:
        choice = {"index": job * asked.n + n, "text": text, "logprobs": scores, "finish_reason": reason}
        return sse(head | {"choices": [choice]})

    if asked.echo:
        for job, prompt in enumerate(prompts):
            for n in range(asked.n):
                yield chunk(job, n, prompt)
    async with aclosing(together([service.events(each) for each in running])) as events:
        async for job, event in events:
            if isinstance(event, Piece) and (event.text or event.scores):
                scores = _legacy(service.tokenizer, [event], at[job, event.choice]) if event.scores else None
                at[job, event.choice] += len(scores["tokens"][0]) if scores else 0
                yield chunk(job, event.choice, event.text, scores=scores)
            if isinstance(event, End):
                ends.append(event)
                if event.reason == "error":
                    yield sse({"error": broken(event)})
                else:
                    yield chunk(job, event.choice, event.text, finish(event))
    if usage:
        yield sse(head | {"choices": [], "usage": usage_of(running, ends)})
    yield sse("[DONE]")


def _legacy(tokenizer: Tokenizer, pieces: list[Piece], begin: int = 0) -> dict:
    """Scores as completions have them. begin: characters before the first of these tokens."""

    def shown(token: int) -> str:
        data = tokenizer.decode_bytes([token])
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)

    tokens = [shown(p.token) for p in pieces]
    return {
        "tokens": tokens,
        "token_logprobs": [p.scores.token for p in pieces],
        "top_logprobs": [{shown(t): score for t, score in p.scores.likeliest} for p in pieces],
        "text_offset": [begin + sum(map(len, tokens[:n])) for n in range(len(tokens))],
    }
