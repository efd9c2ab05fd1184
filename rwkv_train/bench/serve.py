"""`bench serve`: sessions side by side, while corrections are learnt, after long histories; beside rwkvserve."""

import asyncio
import sys
import tempfile
from collections.abc import Awaitable
from dataclasses import asdict, dataclass
from pathlib import Path

from tqdm import tqdm

from rwkv_train.bench.correction_cases import Case
from rwkv_train.bench.fact_cases import small_talk
from rwkv_train.bench.invented_cases import invented_cases
from rwkv_train.bench.measure import Times, about, machine, number, table, target, write_json
from rwkv_train.bench.serve_clients import CALL, Client, Load, Measured, Reply, Turn, centile, serving, talk
from rwkv_train.bench.serve_peer import PEER, load_peer
from rwkv_train.bench.settings import ServeBench

OVER_ONE, OVER_IDLE, OVER_SHORT = 6.0, 2.0, 1.1  # what is aimed at
BEGIN = "User: {}\n\nAssistant:"
WILD = {"temperature": 5.0, "top_p": 1.0}  # nearly any token comes next, so nearly no text ends before it has to
SENTENCE = "The ship left the harbour in the morning, and nobody on the shore knew when it would be back. "
TIMED = 8  # tokens of a reply whose first one is timed
TURNS = 3  # that are timed in a row
TEXTS, NEAREST = 20, 5  # that are compared, and the tokens whose log probabilities are
LONGEST = 30_000  # tokens of a history, which the server reads in one request
IDLE, LEARNING = "the crowd, nothing is learnt", "the crowd, corrections are learnt"
POLL = 0.2  # seconds between looks at a correction
MANY = 10**9  # requests a minute


def serve(config: ServeBench) -> int:
    """Print the tables; 1 if a request failed, or a text is another one in company."""
    _check(config)
    print(about(machine()) + "\n")
    command = [sys.executable, "-c", CALL, "serve", "--port=0", "--folder=data", f"--rate={MANY}"]
    command += [f"--lanes={max(64, config.crowd, config.company + 1, *config.sessions)}"]
    command += [f"--model={_absolute(config.model)}"] * bool(config.model)
    command += [f"--tokenizer={_absolute(config.tokenizer)}"] * bool(config.tokenizer)
    command += [f"--dtype={config.dtype}"] * bool(config.dtype)
    with tempfile.TemporaryDirectory() as folder, serving(command, Path(folder), "serving") as address:
        bench = Bench(config, address)
        asyncio.run(bench.run())
    peer, why_not = load_peer(config) if config.peers else ({}, "not asked for")
    return bench.tell({sessions: Measured.of(loads) for sessions, loads in peer.items()}, why_not)


class Bench:
    """One server's figures, as they come."""

    def __init__(self, config: ServeBench, address: tuple[str, int]):
        self.config, self.address = config, address
        self.questions = small_talk()
        self.loads: dict[str, list[Load]] = {}
        self.histories: dict[int, list[float]] = {}
        self.texts: list[Alone] = []
        self.learnt: list[dict] = []

    async def run(self) -> None:
        config = self.config
        total = config.repeats * (2 * len(config.sessions) + len(config.history)) + 3 + config.corrections
        with tqdm(total=total, desc="bench serve", file=sys.stderr) as bar:
            first, *cases = invented_cases(config.corrections + 1)
            async with Client(self.address) as client:
                await self._learn(client, [first], bar)  # which waits for what is rehearsed with each of them
            await talk(self.address, 1, self.goes_on, asyncio.sleep(0))  # the first one is slow
            for _ in range(config.repeats):
                for count in config.sessions:
                    for what, turn in ((_goes_on(count), self.goes_on), (_turns(count), self.converses)):
                        await self._load(what, count, turn, asyncio.sleep(config.seconds))
                        bar.update()
            self.texts = await self._compare()
            bar.update()
            await self._time_histories(bar)
            if cases:
                await self._crowd(cases, bar)

    async def _load(self, what: str, count: int, turn: Turn, until: Awaitable) -> None:
        self.loads.setdefault(what, []).append(await talk(self.address, count, turn, until))

    async def goes_on(self, client: Client, session: int, count: int, last: Reply | None) -> Reply:
        """A text that goes on, mostly for as many tokens as it may."""
        body = WILD | {"max_tokens": self.config.tokens, "stream_options": {"include_usage": True}, "seed": count}
        return await client.stream("/v1/completions", body | {"prompt": BEGIN.format(self._question(session, count))})

    async def converses(self, client: Client, session: int, count: int, last: Reply | None) -> Reply:
        """A turn of a conversation, sampled as the server does unless told otherwise."""
        body = {"input": self._question(session, count), "max_output_tokens": self.config.tokens}
        if last and count % self.config.turns:
            body["previous_response_id"] = last.id
        return await client.stream("/v1/responses", body)

    def _question(self, session: int, count: int) -> str:
        return self.questions[(7 * session + count) % len(self.questions)]

    async def _crowd(self, cases: list[Case], bar: tqdm) -> None:
        """Many sessions, first while nothing is learnt, then while corrections are."""
        async with Client(self.address) as client:
            idle = asyncio.sleep(self.config.crowd_seconds)
            await self._load(IDLE, self.config.crowd, self.converses, idle)
            bar.update()
            await self._load(LEARNING, self.config.crowd, self.converses, self._learn(client, cases, bar))

    async def _learn(self, client: Client, cases: list[Case], bar: tqdm) -> None:
        """Submit corrections, all at once, and wait until the last was tried."""
        sent = []
        for case in cases:
            body = {"kind": "answer", "question": case.question, "answer": case.answer}
            sent.append((await client.ask("POST", "/v1/feedback", body))["id"])
        for id in sent:
            while (found := await client.ask("GET", f"/v1/feedback/{id}"))["status"] in ("waiting", "learning"):
                await asyncio.sleep(POLL)
            self.learnt.append(found)
            bar.update()

    async def _time_histories(self, bar: tqdm) -> None:
        """The first piece of a turn's reply, after messages of some lengths; the turns of each follow the same one."""
        async with Client(self.address) as client:
            before = {}
            for length in self.config.history:
                before[length] = await self._history(client, length)
                self.histories[before[length][1]] = []
            for _ in range(self.config.repeats):
                for id, tokens in before.values():
                    body = {"input": self.questions[0], "max_output_tokens": TIMED, "previous_response_id": id}
                    for _ in range(TURNS):
                        reply = await client.stream("/v1/responses", body)
                        self.histories[tokens] += [reply.first] * bool(reply.times)
                    bar.update()

    async def _history(self, client: Client, length: int) -> tuple[str, int]:
        """A response after so many tokens, or a few more: (its id, how many)."""

        async def said(text: str) -> dict:
            body = {"input": text, "max_output_tokens": 1, "temperature": 0}
            return await client.ask("POST", "/v1/responses", body)

        one, two = [(await said(SENTENCE * n))["usage"]["input_tokens"] for n in (1, 2)]
        count = -(-(length - 2 * one + two) // (two - one))
        found = await said(SENTENCE * count if length >= one else "Hi.")
        return found["id"], found["usage"]["total_tokens"]

    async def _compare(self) -> list["Alone"]:
        """Texts by themselves, and then beside others that are being written all the while."""
        usual = {"temperature": 0, "max_tokens": self.config.tokens, "logprobs": NEAREST}
        bodies = [usual | {"prompt": BEGIN.format(question)} for question in self.questions[:TEXTS]]
        begun, others = asyncio.Event(), set()

        async def ask(client: Client) -> list[dict]:
            found = [await client.ask("POST", "/v1/completions", body) for body in bodies]
            return [each["choices"][0]["logprobs"] for each in found]

        async def later(client: Client) -> list[dict]:
            await begun.wait()
            return await ask(client)

        async def other(client: Client, session: int, count: int, last: Reply | None) -> Reply:
            if count:
                others.add(session)
            if len(others) == self.config.company:
                begun.set()
            return await self.goes_on(client, session, count, last)

        async with Client(self.address) as client:
            alone, among = await ask(client), asyncio.ensure_future(later(client))
            await talk(self.address, self.config.company, other, among)
        return list(map(Alone.of, alone, among.result()))

    def tell(self, peer: dict[int, Measured], why_not: str) -> int:
        """Print the tables, and write the figures; the exit code."""
        config, ours = self.config, {what: Measured.of(loads) for what, loads in self.loads.items()}
        theirs = {f"{PEER}, {count} at once": found for count, found in peer.items()}
        print(table([found.row(what) for what, found in (ours | theirs).items()]))
        if why_not:
            print(f"\n{PEER}: not measured: {why_not}")
        times = {length: Times(seconds) for length, seconds in self.histories.items()}
        print("\n" + table([{"tokens before": f"{n:,}", "first piece of a turn": t.shown()} for n, t in times.items()]))
        same, differ = sum(text.same for text in self.texts), max(text.difference for text in self.texts)
        told = f"{same} of {len(self.texts)} greedy texts are the same alone and among {config.company} others"
        length = sum(text.tokens for text in self.texts)
        print(f"\n{told} ({length:,} tokens); log probabilities differ by {differ:.1e} at most")
        failed = [why for found in ours.values() for why in found.failed]
        for what, found in ours.items():
            for why in sorted(set(found.failed)):
                print(f"{what}: failed {found.failed.count(why)} times: {why}")
        if self.learnt:
            print("corrections, the first alone: " + ", ".join(map(_outcome, self.learnt)))
        targets = self._targets(ours, times, peer)
        print("\n" + table(targets))
        results = {
            "loads": {what: found.plain() for what, found in (ours | theirs).items()},
            "history": times,
            "alone": [asdict(text) for text in self.texts],
            "learnt": [{name: found[name] for name in ("id", "status", "outcome")} for found in self.learnt],
            "peer not measured": why_not,
            "targets": targets,
        }
        write_json(config.json, "serve", config, results)
        return int(bool(failed) or same < len(self.texts))

    def _targets(self, ours: dict[str, Measured], times: dict[int, Times], peer: dict[int, Measured]) -> list[dict]:
        config, rows = self.config, []
        few, many = min(config.sessions), max(config.sessions)
        usual = None if config.model else OVER_ONE
        for kind in (_goes_on, _turns) if few < many else ():
            wanted = usual if (few, many) == (1, 16) else None
            ratio = ours[kind(many)].rate / ours[kind(few)].rate
            rows.append(target(f"tokens/s of {kind(many)} over {few}", ratio, wanted, more=True))
        if LEARNING in ours:
            ratio = centile(ours[LEARNING].gaps, 99) / centile(ours[IDLE].gaps, 99)
            rows.append(target("p99 between pieces while learning, over idle", ratio, OVER_IDLE, more=False))
            rows.append(target("failed while learning", len(ours[LEARNING].failed), 0, more=False))
        if len(times) > 1:
            ratio = times[max(times)].median / times[min(times)].median
            what = f"first piece after {max(times):,} tokens over {min(times):,}"
            rows.append(target(what, ratio, OVER_SHORT, more=False))
        for count in peer:
            ratio = ours[_goes_on(count)].rate / peer[count].rate
            rows.append(target(f"tokens/s of {count} at once over {PEER}'s", ratio, None, more=True))
        return rows


@dataclass(frozen=True)
class Alone:
    """A text by itself against the same in company: whether the tokens are the same, and the largest difference of log
    probabilities of the likeliest tokens, as far as they are. tokens: of the text; common: the first that are the same.
    """

    same: bool
    difference: float
    tokens: int
    common: int

    @classmethod
    def of(cls, alone: dict, among: dict) -> "Alone":
        """Of two answers' "logprobs"."""
        pairs = list(zip(alone["tokens"], among["tokens"], strict=False))
        common = next((n for n, (a, b) in enumerate(pairs) if a != b), len(pairs))
        tops = list(zip(alone["top_logprobs"], among["top_logprobs"], strict=False))[: common + 1]
        differences = [abs(a[token] - b[token]) for a, b in tops for token in a.keys() & b.keys()]
        same = alone["tokens"] == among["tokens"]
        return cls(same, max(differences, default=0.0), len(alone["tokens"]), common)


def _goes_on(count: int) -> str:
    return f"{count} at once, texts that go on"


def _turns(count: int) -> str:
    return f"{count} at once, conversations"


def _outcome(found: dict) -> str:
    seconds = (found["outcome"] or {}).get("seconds")
    return found["status"] + (f" in {number(seconds)} s" if seconds is not None else "")


def _absolute(name: str | None) -> str | None:
    """A path that is known from any folder; a name that is none stays."""
    return str(Path(name).absolute()) if name and Path(name).exists() else name


def _check(config: ServeBench) -> None:
    """Raises ValueError for what cannot be measured."""
    for name in ("tokens", "crowd", "turns", "company", "repeats"):
        if getattr(config, name) < 1:
            raise ValueError(f"{name} must be at least 1, found {getattr(config, name)}")
    if not config.sessions or min(config.sessions) < 1:
        raise ValueError(f"sessions must be numbers from 1 on, found {config.sessions}")
    if not all(1 <= length <= LONGEST for length in config.history):
        raise ValueError(f"history must be from 1 to {LONGEST:,} tokens, found {config.history}")
    if config.corrections < 0:
        raise ValueError(f"corrections must not be negative, found {config.corrections}")
