"""A profile: a base model, a journal of corrections, and the weights that follow from both."""

import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

from filelock import FileLock, Timeout
from torch import Tensor

from rwkv_train.data.templates import Template
from rwkv_train.feedback.background import half_the_threads, in_a_line
from rwkv_train.feedback.correction import Correction, Outcome, Reading, correction_of, document_of, row_of
from rwkv_train.feedback.decode import DECODED, Form, greedy
from rwkv_train.feedback.guards import Guards
from rwkv_train.feedback.journal import Journal, learnt, waiting
from rwkv_train.feedback.snapshots import Snapshots, weights_hash
from rwkv_train.feedback.steps import Diverged, FeedbackConfig, Lesson, between, changed, follow, learn
from rwkv_train.feedback.texts import Row, answer_loss, divergence
from rwkv_train.files import replace_file
from rwkv_train.models.base import RWKV
from rwkv_train.models.finite import NotFinite
from rwkv_train.tokenizer import Tokenizer

FORMS = 20  # in which questions about a correction's subject are made up
MOST = 200  # tokens of a reply that is decoded to see what was learnt
SHARES = (1.0, 0.75, 0.5)  # of a change, tried in turn when the whole of it moves everything else too far

Received = Callable[[int], None]
Tick = Callable[[int, float], None]


class Learner:
    """Learns corrections one by one. `model` is the current version: immutable, replaced as a whole.

    learn(correction) -> Outcome; undo, forget, replay, export, configure, diff. folder: holds the journal, snapshots
    and guards; one process at a time. The weights of a profile are a function of the base model and the journal:
    `replay` gives the same ones, to the bit, on the same machine.
    """

    def __init__(
        self,
        base: RWKV,
        tokenizer: Tokenizer,
        folder: str | Path,
        template: Template | None = None,
        config: FeedbackConfig | None = None,
        guards: Guards | None = None,
        recover: bool = True,
    ):
        """base: becomes float32, as corrections are finer than half precision. config: of a profile that is new.
        guards: None lets the model make them when they are first needed. recover: learn what was received and not
        tried, as after a crash; False leaves it to `commit`.

        Raises ValueError for a folder that is in use, damaged, or of another model.
        """
        self.base, self.form = base.float().eval().requires_grad_(False), Form(tokenizer, template or Template())
        self.folder, self.config, self._guards = Path(folder), config or FeedbackConfig(), guards
        self._said: list[tuple[RWKV, Tensor]] = []  # by the last two models on guard text
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = FileLock(self.folder / "lock")
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            raise ValueError(f"{self.folder} is in use by another process; close it, or use another profile") from None
        try:
            self.journal = Journal(self.folder / "journal.jsonl")
            self._snapshots = Snapshots(self.folder / "snapshots", self.base)
            self._check_base()
            self.model = self._rebuilt(self.learnt())
            if recover:
                self._recover()
        except BaseException:
            self._lock.release()
            raise

    @property
    def guards(self) -> Guards:
        """What must not change. Made late, since that takes seconds, and kept in the folder."""
        if self._guards is None:
            path = self.folder / "guards.safetensors"
            if not path.is_file():
                with half_the_threads():
                    Guards.of_model(self.base, self.form).save(path)
            self._guards = Guards.load(path, self.base, self.form)
        return self._guards

    @property
    def weights(self) -> str:
        """sha256 of the weights that are not the base's."""
        return self.weights_of(self.model)

    def weights_of(self, model: RWKV) -> str:
        """The same of a version that was `model` at some time."""
        return weights_hash(changed(model, self.base))

    def close(self) -> None:
        self.journal.close()
        self._lock.release()

    def __enter__(self) -> "Learner":
        return self

    def __exit__(self, *error) -> None:
        self.close()

    def learn(
        self,
        correction: Correction | Reading,
        received: Received = lambda number: None,
        tick: Tick = lambda step, loss: None,
    ) -> Outcome:
        """Learn one correction: `receive` and `commit` in one.

        received(id) is called as soon as the correction cannot be lost any more; tick(step, loss) at every step.
        """
        number = self.receive(correction)
        received(number)
        return self.commit(number, tick)

    def check(self, correction: Correction | Reading) -> None:
        """Raises ValueError for one that cannot be learnt."""
        if isinstance(correction, Reading):
            document_of(correction, self.form)
        else:
            row_of(correction, self.form)

    def receive(self, correction: Correction | Reading) -> int:
        """Record a correction with the settings of now, at once and from any thread; returns its number.

        Raises ValueError, before anything is recorded, for one that cannot be learnt.
        """
        self.check(correction)
        return self.journal.append("received", **asdict(correction), config=asdict(self.config))["id"]

    def commit(self, number: int, tick: Tick = lambda step, loss: None) -> Outcome:
        """Learn a received correction. Corrections are committed in the order in which they were received.

        What fails is recorded as not learnt, with the reason, and raised: it changes nothing, and is not tried again.
        """
        record = next((r for r in self.waiting() if r["id"] == number), None)
        if record is None:
            raise ValueError(f"no correction with the number {number} waits to be learnt; see the history")
        try:
            outcome, model = self._judge(record, self.learnt(), tick)
        except Exception as error:
            self.journal.append("committed", of=number, accepted=False, why=in_a_line(error))
            raise
        self.journal.append("committed", of=number, **{k: v for k, v in asdict(outcome).items() if k != "id"})
        self.model = model
        if outcome.accepted:
            try:
                self._snapshots.save(model, self.learnt())
            except OSError as error:  # learnt it is, and the journal can be replayed
                print(f"{self.folder}: no snapshot was kept: {in_a_line(error)}", file=sys.stderr)
        return outcome

    def undo(self, count: int = 1) -> list[int]:
        """Take back the last `count` corrections; returns their ids. The weights before the last are exact."""
        known = self.learnt()
        if not 1 <= count <= len(known):
            raise ValueError(f"there are {len(known)} corrections to undo, not {count}")
        return self.forget([record["id"] for record in known[-count:]])

    def forget(self, ids: list[int]) -> list[int]:
        """Take back any corrections: the weights become those of a replay without them."""
        known = self.learnt()
        if unknown := set(ids) - {record["id"] for record in known}:
            raise ValueError(f"no active correction has the number {min(unknown)}; see the history")
        model = self._rebuilt([record for record in known if record["id"] not in ids])
        self.journal.append("undone", of=list(ids))
        self.model = model
        return list(ids)

    def active(self) -> list[dict]:
        """Records of the corrections that count: learnt, or waiting to be."""
        return self.learnt() + self.waiting()

    def learnt(self) -> list[dict]:
        """Records of the corrections that were learnt and not undone."""
        return learnt(self.journal.records)

    def waiting(self) -> list[dict]:
        """Records of the corrections that were received and not tried yet."""
        return waiting(self.journal.records)

    def replay(self) -> str:
        """Rebuild the weights from the base and the journal, from the newest snapshot that fits; returns their hash.

        Corrections that were received but not committed, as after a crash, are learnt and committed.
        """
        self.model = self._rebuilt(self.learnt())
        self._recover()
        return self.weights

    def _rebuilt(self, known: list[dict]) -> RWKV:
        """The model that follows from corrections that were learnt in this order."""
        shares = {r["of"]: r["share"] for r in self.journal.records if r["kind"] == "committed" and r["accepted"]}
        found = ((n, self._snapshots.load(known[:n])) for n in range(len(known), -1, -1))
        done, model = next((n, m) for n, m in found if m)
        for n in range(done, len(known)):
            after, _ = self._learn(model, known[n], self._lesson(model, known[n], known[:n])[0])
            model = between(model, after, shares[known[n]["id"]])
            self._snapshots.save(model, known[: n + 1])
        return model

    def _recover(self) -> None:
        """Learn what waits. What cannot be learnt is told, and in the way of nothing else."""
        for record in self.waiting():
            try:
                self.commit(record["id"])
            except Exception as error:
                print(f"{self.folder}: {record['id']} was not learnt: {in_a_line(error)}", file=sys.stderr)

    def configure(self, **changes) -> None:
        """Change settings for the corrections to come; they are kept. Raises ValueError, changing nothing."""
        config = replace(self.config, **changes)
        self.journal.append("settings", config=asdict(config))
        self.config = config

    def diff(self, model: RWKV | None = None) -> dict[str, float]:
        """What of a version is not the base's: by name, the length of the change over that of the weight."""
        base = dict(self.base.named_parameters())
        ours = changed(model or self.model, self.base)
        return {n: float((w - base[n]).norm() / base[n].norm()) if n in base else 1.0 for n, w in ours.items()}

    def export(self, path: str | Path) -> int:
        """Write what was learnt as chats that `prepare` reads, and beside them PATH.pairs.jsonl, preferences.

        Returns how many chats there are.
        """
        active, path = [r for r in self.learnt() if r.get("answer") is not None], Path(path)
        chats = [
            {"messages": [{"role": "user", "content": r["question"]}, {"role": "assistant", "content": r["answer"]}]}
            for r in active
        ]
        pairs = [
            {
                "prompt": "".join(self.form.template.prompt([{"role": "user", "content": r["question"]}])),
                "chosen": r["answer"],
                "rejected": r["rejected"],
            }
            for r in active
            if r["rejected"] is not None
        ]
        for target, records in ((path, chats), (path.with_name(path.name + ".pairs.jsonl"), pairs)):
            text = "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records)
            replace_file(target, lambda temporary, text=text: temporary.write_text(text, encoding="utf-8"))
        return len(active)

    def answer(self, question: str, model: RWKV | None = None) -> str:
        """The model's greedy reply to a question on its own, as decoded."""
        return self.form.shown(greedy(model or self.model, self.form, [self.form.prompt(question)], most=MOST)[0])

    def _judge(self, record: dict, earlier: list[dict], tick: Tick) -> tuple[Outcome, RWKV]:
        """Learn a correction on top of the current model; (what became of it, the model it leaves)."""
        begun, before = time.monotonic(), self.model
        lesson, wordings, old = self._lesson(before, record, earlier)
        try:
            whole, steps = self._learn(before, record, lesson, tick)
            after, share, moved, why, new = self._gate(record, whole, old)
        except (Diverged, NotFinite) as error:
            left = "the steps left numbers that are not finite; a smaller rate may help"
            after, steps, share, moved, new = before, 0, 0.0, 0.0, old
            why = left if isinstance(error, NotFinite) else str(error)
        with half_the_threads():
            losses = [answer_loss(m, lesson.new[0]) for m in (before, after)]
        seconds, weights = time.monotonic() - begun, weights_hash(changed(after, self.base))
        accepted = why == "learnt"
        return Outcome(
            record["id"], accepted, why, *losses, old, new, steps, share, wordings, moved, seconds, weights
        ), after

    def _lesson(self, model: RWKV, record: dict, earlier: list[dict]) -> tuple[Lesson, list[str], str]:
        """(what a correction trains and keeps, other wordings of its question among it, the model's answer)."""
        config, form = FeedbackConfig(**record["config"]), self.form
        if "text" in record:
            ids = document_of(Reading(record["text"]), form)
            return Lesson([Row(ids, len(ids) - 1)]), [], ""
        valid = {r["question"]: r for r in earlier if "text" not in r}  # the last word on each question
        valid.pop(record["question"], None)
        replayed = [row_of(correction_of(r), form) for r in _spread(list(valid.values()), config.replay, record["id"])]
        correction = correction_of(record)
        row = row_of(correction, form)
        new, wordings = [row], []
        answer = row.ids[-row.answer :]
        if correction.context:
            ids = [form.tokenizer.eod, *correction.context, *form.turn(correction.question), *answer]
            new.append(Row(ids, row.answer, 1 + len(correction.context), row.bad))
        for talk in _turn(self.guards.talks, config.strangers, record["id"]):
            new.append(Row([*talk, *form.turn(correction.question), *answer], row.answer, len(talk), row.bad))
        with half_the_threads():
            around = self.guards.around(model, correction.question, config.neighbours, FORMS)
            old = around.own
            if len(old) == DECODED:
                old = greedy(model, form, [row.ids[: -row.answer]], most=MOST)[0]
        taught = {tuple(form.answer(r["answer"])) for r in valid.values() if r["answer"] is not None}
        kept, same = [], []
        for question, prompt, reply, before in around.made:
            if reply == old and around.subject in question:
                same.append((question, prompt))
            elif reply == before or tuple(reply) not in taught:  # where it differs from the base's, that was not meant
                kept.append((prompt + before, self.base))
            else:
                kept.append((prompt + reply, model))
        kept = _spread(kept, 2 * config.neighbours)
        for question, prompt in [] if row.bad else _spread(same, config.wordings):
            new.append(Row(prompt + answer, row.answer))
            wordings.append(question)
        # What a correction did away with is not kept.
        ids = {r["id"] for r in earlier}
        gone = {r["answer_before"] for r in self.journal.records if r["kind"] == "committed" and r["of"] in ids}
        gone = [old, *(form.answer(text) for text in gone if text)]
        kept += [(ids, self.base) for ids in self.guards.near(row.ids, config.guards, record["id"], gone)]
        kept += [(ids, self.base) for ids in _turn(self.guards.talks, config.talks, -record["id"])]
        return Lesson(new, replayed, kept), wordings, form.shown(old)

    def _learn(
        self, model: RWKV, record: dict, lesson: Lesson, tick: Tick = lambda step, loss: None
    ) -> tuple[RWKV, int]:
        config = FeedbackConfig(**record["config"])
        with half_the_threads():
            if "text" in record:
                return follow(model, lesson.new[0].ids, self.guards.curvature, config, tick)
            return learn(model, lesson, self.guards.curvature, config, tick)

    def _gate(self, record: dict, whole: RWKV, old: str) -> tuple[RWKV, float, float, str, str]:
        """(model, share of the change, drift, why, answer): as much of a change as shows, and leaves all else be."""
        before, budget, why = self.model, record["config"]["budget"], ""
        with half_the_threads():
            for share in SHARES:
                after = whole if share == 1 else between(before, whole, share)
                moved = self._drift(after)
                new = old if "text" in record else self.answer(record["question"], after)
                if "text" not in record and not self._wanted(record, new):
                    why = why or f"decoding still gives {new!r}"
                    break
                if moved <= budget:
                    return after, share, moved, "learnt", new
                why = f"everything else would drift by {moved:.3g} nats a token, over the budget of {budget}"
        return before, 0.0, moved, why, old

    def _drift(self, after: RWKV) -> float:
        """How far a model is from the current one on guard text, in nats a token."""
        models = (self.model, after)
        known = {id(model): said for model, said in self._said}
        self._said = [(m, known[id(m)] if id(m) in known else self.guards.said(m)) for m in models]
        return float(divergence(*(said for _, said in self._said)))

    def _wanted(self, record: dict, answer: str) -> bool:
        if record["answer"] is None:
            return answer != self.form.shown(self.form.answer(record["rejected"]))
        return answer == self.form.shown(self.form.answer(record["answer"]))

    def _check_base(self) -> None:
        """A journal belongs to the model it was begun with, and says what its settings are."""
        base = weights_hash(self.base.state_dict())
        if not self.journal.records:
            self.journal.append("base", base=base, config=asdict(self.config))
        if self.journal.records[0].get("base") != base:
            raise ValueError(f"{self.folder} was begun with another model; use another profile for this one")
        chosen = [r["config"] for r in self.journal.records if r["kind"] in ("base", "settings")]
        self.config = FeedbackConfig(**chosen[-1])


def _spread(items: list, most: int, seed: int = 0) -> list:
    """All of them if few, otherwise some, evenly from begin to end, beginning elsewhere for another seed."""
    every = max(1.0, len(items) / max(1, most))
    return [items[int(seed % every + i * every) % len(items)] for i in range(min(most, len(items)))]


def _turn(items: list, most: int, number: int) -> list:
    """`most` items, others for the next number, until all have had their turn."""
    return [items[(most * number + i) % len(items)] for i in range(most if items else 0)]
