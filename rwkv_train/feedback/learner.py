"""A profile: a base model, a journal of corrections, and the weights that follow from both."""

import hashlib
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from filelock import FileLock, Timeout

from rwkv_train.data.templates import Template
from rwkv_train.feedback.decode import greedy
from rwkv_train.feedback.guards import Guards
from rwkv_train.feedback.journal import Journal
from rwkv_train.feedback.steps import (
    Diverged,
    FeedbackConfig,
    Row,
    answer_loss,
    divergence,
    learn,
    weights_of,
    with_weights,
)
from rwkv_train.files import replace_file
from rwkv_train.models.common import RWKV
from rwkv_train.tokenizer import Tokenizer
from rwkv_train.weightfile import read_weights, write_safetensors

LONGEST = 2000  # characters of a question or an answer
SNAPSHOTS = 8  # newest weights kept as files; older ones are replayed from the journal
WATCHED = 64  # guard rows on which drift is measured


@dataclass(frozen=True)
class Correction:
    """What the model should have answered.

    question: the user's message; answer: the right reply; context: ids of the dialogue before the question.
    rejected: the wrong reply, if there was one, for preference pairs.
    """

    question: str
    answer: str
    context: tuple[int, ...] = field(default=(), repr=False)
    rejected: str | None = None


@dataclass(frozen=True)
class Outcome:
    """What became of a correction: losses in nats a token, answers as decoded, drift in nats a token on guard rows."""

    id: int
    accepted: bool
    why: str
    loss_before: float
    loss_after: float
    answer_before: str
    answer_after: str
    steps: int
    seconds: float
    drift: float
    weights: str


class Learner:
    """Learns corrections one by one. `model` is the current version: immutable, replaced as a whole.

    folder: holds journal.jsonl and snapshots; one process at a time. The state of a profile is a function of the
    base model, the journal and the settings: `replay` gives the same weights, to the bit, on the same machine.
    """

    def __init__(
        self,
        base: RWKV,
        tokenizer: Tokenizer,
        folder: str | Path,
        guards: Guards | None = None,
        config: FeedbackConfig | None = None,
        template: Template | None = None,
    ):
        """guards: text on which `base` must be kept; None lets it write some itself when it is first needed."""
        self.base, self.tokenizer = base.eval().requires_grad_(False), tokenizer
        self.folder, self.config, self.template = Path(folder), config or FeedbackConfig(), template or Template()
        self._guards = guards
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = FileLock(self.folder / "lock")
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            raise ValueError(f"{self.folder} is in use by another process; close it, or use another profile") from None
        self.journal = Journal(self.folder / "journal.jsonl")
        self._check_base()
        self.model = base
        self.replay()

    @property
    def guards(self) -> Guards:
        """What must not change. Made late, since that can take seconds."""
        if self._guards is None:
            begin = self.template.roles["user"].split("{content}")[0].rstrip()
            self._guards = Guards.of_model(self.base, self.tokenizer.encode(begin), self.tokenizer.eod)
        return self._guards

    def close(self) -> None:
        self.journal.close()
        self._lock.release()

    def learn(
        self,
        correction: Correction,
        received: Callable[[int], None] = lambda number: None,
        tick: Callable[[int, float], None] = lambda step, loss: None,
    ) -> Outcome:
        """Learn one correction: `receive` and `commit` in one.

        received(id) is called as soon as the correction cannot be lost any more; tick(step, loss) at every step.
        """
        number = self.receive(correction)
        received(number)
        return self.commit(number, tick)

    def receive(self, correction: Correction) -> int:
        """Record a correction, at once and from any thread; returns its number.

        Raises ValueError, before anything is recorded, for one that cannot be learnt.
        """
        self._row(correction)
        return self.journal.append("received", **asdict(correction))["id"]

    def commit(self, number: int, tick: Callable[[int, float], None] = lambda step, loss: None) -> Outcome:
        """Learn a received correction. Corrections are committed in the order in which they were received."""
        return self._commit(self.journal.records[number - 1], tick)

    def undo(self, count: int = 1) -> list[int]:
        """Take back the last `count` corrections; returns their ids. The weights before the last are exact."""
        active = self.active()
        if not 1 <= count <= len(active):
            raise ValueError(f"there are {len(active)} corrections to undo, not {count}")
        return self.forget([record["id"] for record in active[-count:]])

    def forget(self, ids: list[int]) -> list[int]:
        """Take back any corrections: the weights become those of a replay without them."""
        known = {record["id"] for record in self.active()}
        if unknown := set(ids) - known:
            raise ValueError(f"no active correction has the number {min(unknown)}; see the history")
        self.journal.append("undone", of=list(ids))
        self.replay()
        return list(ids)

    def active(self) -> list[dict]:
        """Records of the corrections that count: received, not rejected, not undone."""
        gone = {i for r in self.journal.records if r["kind"] == "undone" for i in r["of"]}
        gone |= {r["of"] for r in self.journal.records if r["kind"] == "committed" and not r["accepted"]}
        return [r for r in self.journal.records if r["kind"] == "received" and r["id"] not in gone]

    def replay(self) -> str:
        """Rebuild the weights from the base and the journal, from the newest snapshot that fits; returns their hash.

        Corrections that were received but not committed, as after a crash, are learnt and committed.
        """
        active = self.active()
        committed = {r["of"] for r in self.journal.records if r["kind"] == "committed"}
        done, self.model = next((n, m) for n in range(len(active), -1, -1) if (m := self._load(active[:n])))
        for n in range(done, len(active)):
            if active[n]["id"] in committed:
                self.model, _ = self._learn(active[n], active[:n], lambda step, loss: None)
                self._save(active[: n + 1])
            else:
                self._commit(active[n], lambda step, loss: None)
        return weights_hash(self.model)

    def export(self, path: str | Path) -> int:
        """Write the active corrections as chats that `prepare` reads, and beside them PATH.pairs.jsonl, preferences.

        Returns how many corrections there are.
        """
        active, path = self.active(), Path(path)
        chats = [
            {"messages": [{"role": "user", "content": r["question"]}, {"role": "assistant", "content": r["answer"]}]}
            for r in active
        ]
        pairs = [
            {"prompt": self._prompt(r["question"]), "chosen": r["answer"], "rejected": r["rejected"]}
            for r in active
            if r["rejected"] is not None
        ]
        for target, records in ((path, chats), (path.with_name(path.name + ".pairs.jsonl"), pairs)):
            text = "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records)
            replace_file(target, lambda temporary, text=text: temporary.write_text(text, encoding="utf-8"))
        return len(active)

    def answer(self, question: str, model: RWKV | None = None, most: int = 200) -> str:
        """The model's greedy reply to a question on its own, as decoded."""
        prompt = [self.tokenizer.eod, *self.tokenizer.encode(self._prompt(question))]
        return greedy(model or self.model, self.tokenizer, [prompt], most=most)[0]

    def _commit(self, record: dict, tick) -> Outcome:
        """Learn a received correction, keep the weights if they pass, and record what became of it."""
        begun, before = time.monotonic(), self.model
        earlier = [r for r in self.active() if r["id"] < record["id"]]
        row = self._row(_correction(record))
        why, steps, after = "learnt", 0, before
        try:
            after, steps = self._learn(record, earlier, tick)
        except Diverged as error:
            why = str(error)
        answer = self.answer(record["question"], after)
        drift = self._drift(after)
        if why == "learnt" and answer != self._wanted(record["answer"]):
            why = f"decoding still gives {answer!r} after {steps} steps"
        elif why == "learnt" and drift > self.config.budget:
            why = f"everything else would drift by {drift:.3g} nats a token, over the budget of {self.config.budget}"
        accepted = why == "learnt"
        if accepted:
            self.model = after
            self._save([*earlier, record])
        with torch.no_grad():
            losses = [float(answer_loss(m, row, self.config.reach, self.tokenizer.eod)) for m in (before, self.model)]
        outcome = Outcome(
            record["id"],
            accepted,
            why,
            *losses,
            self.answer(record["question"], before),
            answer if accepted else self.answer(record["question"]),
            steps,
            time.monotonic() - begun,
            drift,
            weights_hash(self.model),
        )
        self.journal.append("committed", of=record["id"], **{k: v for k, v in asdict(outcome).items() if k != "id"})
        return outcome

    def _learn(self, record: dict, earlier: list[dict], tick) -> tuple[RWKV, int]:
        rows = [self._row(_correction(r)) for r in earlier]
        row = self._row(_correction(record))
        return learn(self.model, row, rows, self.guards, self.config, self.tokenizer.eod, seed=record["id"], tick=tick)

    def _drift(self, model: RWKV) -> float:
        with torch.no_grad():
            watched = range(0, len(self.guards), max(1, len(self.guards) // WATCHED))
            return float(divergence(model, self.guards, list(watched)[:WATCHED]))

    def _prompt(self, question: str) -> str:
        return self.template.prompt([{"role": "user", "content": question}])

    def _wanted(self, answer: str) -> str:
        """An answer as decoding can give it: as the template writes it, without the end of the turn."""
        *_, (text, _) = self.template.segments([{"role": "assistant", "content": answer}])
        return text.strip()

    def _row(self, correction: Correction) -> Row:
        for name in ("question", "answer"):
            text = getattr(correction, name)
            if not text.strip():
                raise ValueError(f"the {name} is empty; say what the model should answer to what")
            if len(text) > LONGEST:
                raise ValueError(f"the {name} has {len(text):,} characters, more than {LONGEST:,}; shorten it")
            try:
                text.encode()
            except UnicodeEncodeError as error:
                raise ValueError(f"the {name} is not valid Unicode ({error.reason}); type it again") from None
        messages = [
            {"role": r, "content": t} for r, t in (("user", correction.question), ("assistant", correction.answer))
        ]
        parts = [(self.tokenizer.encode(text), trained) for text, trained in self.template.segments(messages)]
        ids, answer = [i for part, _ in parts for i in part], len(parts[-1][0])
        if not answer or not parts[-1][1]:
            raise ValueError("the answer has no tokens that can be trained; see the template's train_roles")
        return Row(ids, answer, correction.context)

    def _check_base(self) -> None:
        """A journal belongs to the model it was begun with."""
        digest = hashlib.sha256()
        for name, p in sorted(self.base.state_dict().items()):
            digest.update(name.encode() + p.contiguous().view(torch.uint8).numpy().tobytes())
        base = {"base": digest.hexdigest(), "config": asdict(self.config)}
        if not self.journal.records:
            self.journal.append("base", **base)
        begun = self.journal.records[0]
        if begun.get("base") != base["base"]:
            raise ValueError(f"{self.folder} was begun with another model; use another profile for this one")
        self.config = FeedbackConfig(**begun["config"])

    def _snapshot(self, records: list[dict]) -> str:
        """The beginning of the name of the file that keeps the weights after these corrections."""
        ids = ",".join(str(r["id"]) for r in records)
        return hashlib.sha256(ids.encode()).hexdigest()[:16]

    def _save(self, records: list[dict]) -> None:
        folder = self.folder / "snapshots"
        folder.mkdir(exist_ok=True)
        path = folder / f"{self._snapshot(records)}-{weights_hash(self.model)[:16]}.safetensors"
        replace_file(path, lambda temporary: write_safetensors(weights_of(self.model), temporary))
        for old in sorted(folder.glob("*.safetensors"), key=lambda p: p.stat().st_mtime)[:-SNAPSHOTS]:
            old.unlink()

    def _load(self, records: list[dict]) -> RWKV | None:
        """The model after these corrections, if a sound snapshot of it is kept."""
        if not records:
            return self.base
        for path in (self.folder / "snapshots").glob(f"{self._snapshot(records)}-*.safetensors"):
            try:
                model = with_weights(self.base, read_weights(path))
            except (ValueError, RuntimeError):
                continue  # damaged: what it held can be replayed
            if path.stem.endswith(weights_hash(model)[:16]):
                return model
        return None


def weights_hash(model: RWKV) -> str:
    """sha256 of the weights that corrections change."""
    digest = hashlib.sha256()
    for weight in weights_of(model).values():
        digest.update(weight.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _correction(record: dict) -> Correction:
    return Correction(record["question"], record["answer"], tuple(record["context"]), record["rejected"])
