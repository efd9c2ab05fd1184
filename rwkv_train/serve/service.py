"""What the routes share: a model and its profiles, the batcher, the conversations, and the replies in the making."""

import asyncio
import secrets
import sys
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from rwkv_train.chat.opening import open_profile
from rwkv_train.checkpoints.opener import Opened
from rwkv_train.files import quoted
from rwkv_train.generation.decoder import Constraint
from rwkv_train.generation.presets import PRESETS, sampling_of, stop_texts, with_given
from rwkv_train.generation.sampling import Sampling
from rwkv_train.serve.batcher import Batcher
from rwkv_train.serve.conversation import Asked, Conversations
from rwkv_train.serve.errors import ApiError
from rwkv_train.serve.grammar import Grammars
from rwkv_train.serve.jobs import End, Event, Full, Job
from rwkv_train.serve.listeners import Listeners
from rwkv_train.serve.metrics import Metrics
from rwkv_train.serve.schemas import TextRequest
from rwkv_train.serve.sessions import MB, Sessions, Turn
from rwkv_train.serve.settings import ServeConfig
from rwkv_train.serve.teaching import BASE, Teaching
from rwkv_train.serve.tokens import Rights


@dataclass(eq=False)
class Running:
    """Replies that are being written to one request.

    ids: of the responses, one a choice. events: for one listener; the turn of a choice that ended is in `turns` before
    its End comes. note: what went wrong with keeping it.
    """

    model: str
    version: str
    ids: list[str]
    asked: Asked
    job: Job
    answer: dict
    owner: str
    stored: bool
    created: int
    events: asyncio.Queue[Event] = field(default_factory=asyncio.Queue)
    turns: dict[int, Turn] = field(default_factory=dict)
    note: str | None = None
    left: int = 0


class Service:
    """A server without its routes. A context, in the event loop whose requests it serves."""

    def __init__(self, opened: Opened, config: ServeConfig, folder: Path, name: str | Path):
        """folder: of the user's data. name: what the model was opened as. Raises ValueError as `open_profile`."""
        self.config, self.opened = config, opened
        self._sampling, self._stop = sampling_of(config), stop_texts(config.stop)
        self.tokenizer, self.template = opened.tokenizer, opened.template
        opened.model.eval().requires_grad_(False)
        self._closing = ExitStack()
        learners = {}
        with ExitStack() as opening:
            for profile in config.profiles or [None]:
                learner = open_profile(opened, folder, profile, name, config.memory)
                opening.callback(learner.close)
                learners[learner.folder.name] = learner
            if BASE in learners:
                raise ValueError(f"{BASE} is the model without corrections; name the profile otherwise")
            file = folder / "conversations" / f"{opened.tokenizer.fingerprint[:16]}.sqlite"
            self.sessions = Sessions(file, config.state_memory * MB, config.state_disk * MB)
            opening.callback(self.sessions.close)
            self._closing = opening.pop_all()
        self.learners = learners
        self.conversations = Conversations(opened.tokenizer, opened.template, self.sessions)
        self._grammars: Grammars | None = None
        self._told: list[tuple[Running, Event]] = []
        self._running: dict[str, Running] = {}
        self._tasks: set[asyncio.Task] = set()
        self.listeners = Listeners()
        self.created = int(time.time())

    async def __aenter__(self) -> "Service":
        self.loop = asyncio.get_running_loop()
        self.batcher = Batcher(self.tokenizer, self.config.lanes, self.config.waiting, self._flush)
        self.metrics = Metrics(self)
        self.teaching = Teaching(self.learners, self._tell)
        self.teaching.begin()
        return self

    def end(self) -> None:
        """Begin to stop: replies end with what was shown, as do streams of events, and nothing new is begun."""
        self.teaching.end()
        self.batcher.end()
        self.listeners.end()

    async def __aexit__(self, *error) -> None:
        """The correction that is being learnt is learnt first; replies are broken off and kept."""
        await asyncio.to_thread(self.teaching.close)
        await asyncio.to_thread(self.batcher.close)
        await asyncio.sleep(0)
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await asyncio.to_thread(self._closing.close)

    @property
    def grammars(self) -> Grammars:
        """Made when it is first needed, as that takes a moment."""
        if self._grammars is None:
            self._grammars = Grammars(self.tokenizer, self.opened.model.config.vocab_size)
        return self._grammars

    @property
    def models(self) -> list[str]:
        return [*self.learners, BASE]

    def named(self, model: str | None) -> str:
        """The model that a request names. ApiError 404 if there is none."""
        if model is None:
            return self.models[0]
        if model not in self.models:
            known = ", ".join(self.models)
            raise ApiError(404, f"there is no model {quoted(model)}; there are: {known}", "model_not_found", "model")
        return model

    def sampling(self, request: TextRequest) -> Sampling:
        """How a request's tokens are chosen."""
        if request.top_p == 0:
            request = request.model_copy(update={"temperature": 0.0, "top_p": 1.0})
        return with_given(PRESETS[request.preset] if request.preset else self._sampling, request)

    def most(self, asked: int | None) -> int:
        """Tokens of a reply. ApiError 400 for more than the server allows."""
        most = self.config.most_tokens
        if asked is not None and asked > most:
            raise ApiError(400, f"a reply has at most {most:,} tokens here, found {asked:,}", "too_many_tokens")
        return min(asked or self.config.reply_tokens, most)

    def who(self, rights: Rights, model: str) -> str:
        """Whose conversations with which model are known to a request."""
        return f"{rights.name}\n{model}"

    async def reply(
        self,
        name: str,
        find: Callable[[str], Asked],
        request: TextRequest,
        rights: Rights,
        prefix: str,
        max_new_tokens: int,
        n: int = 1,
        stored: bool = True,
        answer: dict | None = None,
        format: dict | None = None,
        likeliest: int | None = None,
    ) -> Running:
        """Submit a reply. find(version): what is asked, of that version of the model; prefix: of the response's id;
        answer: to keep with the turn; format: as of `json_schema` requests.

        ApiError 400 for a prompt that is too long or a wrong schema, 503 where too many wait.
        """
        model, version = await asyncio.to_thread(self.teaching.model, name)
        asked = await asyncio.to_thread(find, version)
        if len(asked.read) > self.config.prompt_tokens:
            most = f"the prompt has {len(asked.read):,} tokens, and this server reads {self.config.prompt_tokens:,}"
            raise ApiError(400, f"{most} at most; shorten it", "context_length_exceeded")
        seed = secrets.randbits(62) if request.seed is None else request.seed % 2**62
        running: Running
        job = Job(
            model,
            asked.read,
            asked.state and asked.state.to(model.device),
            self.sampling(request),
            [seed + choice for choice in range(n)],
            max_new_tokens,
            lambda event: self._told.append((running, event)),
            asked.template,
            asked.history,
            self._stop if request.stop is None else tuple(request.stop),
            await asyncio.to_thread(self._constraint, format),
            likeliest,
            self.config.seconds,
        )
        id, created = f"{prefix}{secrets.token_hex(12)}", int(time.time())
        ids = [id if choice == 0 else f"{id}-{choice}" for choice in range(n)]
        running = Running(name, version, ids, asked, job, answer or {}, rights.name, stored, created, left=n)
        try:
            self.batcher.submit(job)
        except Full as full:
            raise ApiError(503, f"{full}; try again in a moment", "busy", headers={"Retry-After": "1"}) from None
        for each in ids:
            self._running[each] = running
        return running

    def _constraint(self, format: dict | None) -> Callable[[], Constraint] | None:
        if format is None or format["type"] == "text":
            return None
        try:
            if format["type"] == "json_object":
                return self.grammars.json_object().copy
            return self.grammars.json_schema(format["schema"]).copy
        except ValueError as error:
            raise ApiError(400, str(error), "invalid_schema", "response_format") from None
        except ModuleNotFoundError as error:
            raise ApiError(
                400, f"this server lacks {error.name}, which it needs for JSON", param="response_format"
            ) from None

    async def events(self, running: Running) -> AsyncGenerator[Event]:
        """What becomes of the replies, until all have ended. Closing this breaks them off."""
        try:
            left = len(running.ids)
            while left:
                event = await running.events.get()
                left -= isinstance(event, End)
                yield event
        finally:
            if running.left:
                self.batcher.cancel(running.job)

    def running(self, id: str, rights: Rights) -> Running | None:
        """The reply of that id, if it is being written, and theirs."""
        found = self._running.get(id)
        return found if found and found.owner == rights.name else None

    def _flush(self) -> None:
        """In the batcher's thread: hand what was told to the event loop, all at once."""
        if self._told:
            told, self._told = self._told, []
            self.loop.call_soon_threadsafe(self._deliver, told)

    def _deliver(self, told: list[tuple[Running, Event]]) -> None:
        for running, event in told:
            if isinstance(event, End):
                self._task(self._ended(running, event))
            else:
                running.events.put_nowait(event)

    async def _ended(self, running: Running, end: End) -> None:
        """Keep a turn, and only then tell that it ended."""
        id = running.ids[end.choice]
        key = running.asked.key_with(end.shown)
        parent = running.asked.parent and running.asked.parent.id
        status = "completed" if end.reason == "stop" else "incomplete"
        length = running.asked.length + len(end.ids)
        turn = Turn(
            id, parent, running.owner, key, running.model, running.version, running.asked.messages,
            running.asked.prompt, end.shown, end.ids, end.ended, status, running.created, length,
            running.answer | {"reason": end.reason, "count": end.count, "read": len(running.asked.history)},
        )  # fmt: skip
        if running.stored and end.reason != "error":
            try:
                await asyncio.to_thread(self.sessions.add, turn, end.state)
            except Exception as error:  # whatever it is, somebody waits for the end
                running.note = f"this reply could not be kept: {error}"
                print(running.note, file=sys.stderr)
        running.turns[end.choice] = turn
        running.left -= 1
        self._running.pop(id, None)
        self.metrics.ended(end)
        running.events.put_nowait(end)

    def _tell(self, name: str, number: int | None, event: str, data: dict) -> None:
        """What becomes of corrections, from any thread."""
        self.loop.call_soon_threadsafe(self.listeners.tell, name, number, event, data)
        if event == "done":
            self.metrics.learnt(data)

    def _task(self, work) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
