"""A profile: a base model, a journal of corrections, and the weights that follow from both.

One correction's way: it is received and journalled here, lesson.py says what it trains and keeps, steps.py takes the
gradient steps, gate.py accepts as much of the change as shows and leaves all else be, and it is committed here.
"""

import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

from torch import Tensor

from rwkv_train.data.templates import Template
from rwkv_train.feedback.background import Watch, half_the_threads, in_a_line, on_standard_error
from rwkv_train.feedback.correction import (
    Correction,
    Outcome,
    Reading,
    Received,
    check,
    example_of,
    item_of,
    received_of,
)
from rwkv_train.feedback.decode import Form, answer_to
from rwkv_train.feedback.export import Exported, export
from rwkv_train.feedback.extent import another_wording, belonging, is_kept, kept_question, settled
from rwkv_train.feedback.gate import judge, told_of_dialogue
from rwkv_train.feedback.lesson import Lesson, lesson_of, text_lesson
from rwkv_train.feedback.profile import Profile
from rwkv_train.feedback.rehearsal import RehearsalSet
from rwkv_train.feedback.replay import Replay
from rwkv_train.feedback.settings import FeedbackConfig, renamed
from rwkv_train.feedback.sleep import Sleep, Slept, judged
from rwkv_train.feedback.snapshots import Snapshots, weights_hash
from rwkv_train.feedback.steps import Tick, dynamic_evaluation, take_steps
from rwkv_train.feedback.trainable import changed
from rwkv_train.models.base import RWKV
from rwkv_train.ops.products import as_wide
from rwkv_train.tokenizer import Tokenizer


class Learner:
    """Learns corrections one by one. `model` is the current version: immutable, replaced as a whole.

    learn(correction) -> Outcome; also, keep, sleep, undo, forget, replay, export, configure, diff. folder: holds the
    journal, snapshots and rehearsal set; one process at a time. The weights of a profile are a function of the base
    model and the journal: `replay` gives the same ones, to the bit, on the same machine. watch(what, items) gives the
    items and shows how far they are: of what takes long.
    """

    def __init__(
        self,
        base: RWKV,
        tokenizer: Tokenizer,
        folder: str | Path,
        template: Template | None = None,
        config: FeedbackConfig | None = None,
        rehearsal: RehearsalSet | None = None,
        recover: bool = True,
        memory: int | None = None,
    ):
        """base: keeps its number format; the matrices that are trained get copies in float32. config: of a profile that
        is new. rehearsal: None lets the model make it when it is first needed. recover: learn what was received and not
        tried, as after a crash; False leaves it to `commit`. memory: bytes that corrections may take, the model
        counted; None is most of the device's. Where the settings of a new profile would take more, others are chosen,
        and told; an old one keeps its own.

        Raises ValueError for a folder that is in use, damaged, or of another model, and for a memory of nothing.
        """
        self.base = base.eval().requires_grad_(False)
        self.watch: Watch = on_standard_error
        self._rehearsal = rehearsal
        self._asleep: tuple[object, Sleep] | None = None  # one that was left, and what it is of
        given = (template or Template()).for_answers()
        self._profile = Profile(Path(folder), self.base, config or FeedbackConfig(), memory, given)
        self.form = Form(tokenizer, self._profile.template)
        self.folder, self.journal = self._profile.folder, self._profile.journal
        try:
            snapshots = Snapshots(self.folder / "snapshots", self.base)
            self._replay = Replay(self.journal, snapshots, self._learnt_whole, self._sleep_on, self._watched)
            self.model = self._replay.model_after(self._replay.sequence())
            if recover:
                self._recover()
        except BaseException:
            self._profile.close()
            raise

    @property
    def config(self) -> FeedbackConfig:
        """The settings of corrections to come."""
        return self._profile.config

    @property
    def rehearsal(self) -> RehearsalSet:
        """What must not change. Made late, since that takes seconds, and kept in the folder."""
        if self._rehearsal is None:
            path, old = self.folder / "rehearsal.safetensors", self.folder / "guards.safetensors"
            if old.is_file():
                old.replace(path)
            with half_the_threads():
                first = self._profile.begun_with
                settings = first.trainable, first.layers
                self._rehearsal = RehearsalSet.kept(path, self.base, self.form, *settings, self._watched)
        return self._rehearsal

    @property
    def weights(self) -> str:
        """sha256 of the weights that are not the base's."""
        return self.weights_of(self.model)

    def weights_of(self, model: RWKV) -> str:
        """The same of a version that was `model` at some time."""
        return weights_hash(changed(model, self.base))

    def close(self) -> None:
        self._profile.close()

    def __enter__(self) -> "Learner":
        return self

    def __exit__(self, *error) -> None:
        self.close()

    def learn(
        self,
        correction: Correction | Reading,
        received: Callable[[int], None] = lambda number: None,
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
        check(correction, self.form)

    def also(self, text: str, of: int | None = None) -> Outcome:
        """Learn another way to ask the newest correction, or the one with the number `of`."""
        return self.learn(another_wording(self.journal, text, of))

    def keep(self, text: str, of: int | None = None) -> Outcome:
        """Let a question keep the answer it had before the newest correction, or before the one with the number `of`.

        It is learnt only if the model now answers otherwise.
        """
        return self.learn(kept_question(self.journal, text, of))

    def receive(self, correction: Correction | Reading, about: dict | None = None) -> int:
        """Record a correction with the settings of now, at once and from any thread; returns its number.

        about: what else to keep of it, for whoever shows it. The question is recorded as the template writes it: white
        space around it makes no other question. Raises ValueError, before anything is recorded, for one that cannot be
        learnt.
        """
        self.check(correction)
        if isinstance(correction, Correction):
            correction = replace(correction, question=self.form.template.clean(correction.question))
        more = {"about": about} if about else {}
        return self.journal.append("received", **asdict(correction), config=asdict(self.config), **more)["id"]

    def commit(self, number: int, tick: Tick = lambda step, loss: None) -> Outcome:
        """Learn a received correction. Corrections are committed in the order in which they were received.

        What fails is recorded as not learnt, with the reason, and raised: it changes nothing, and is not tried again.
        """
        record = self.journal.ledger.waiting.get(number)
        if record is None:
            raise ValueError(f"no correction with the number {number} waits to be learnt; see the history")
        kept = {}
        try:
            received, note = settled(received_of(record), self._replay.sequence(), self._replay.model_after, self.form)
            if record.get("keeps"):
                kept = {"kept": {"answer": received.item.answer, "context": received.item.context}}
            outcome, model = self._judge(received, tick)
            if outcome.accepted:
                notes = note, told_of_dialogue(received.item, model, self.form), outcome.note
                outcome = replace(outcome, note="; ".join(filter(None, notes)))
        except Exception as error:
            self.journal.append("committed", of=number, accepted=False, why=in_a_line(error))
            raise
        self.journal.append("committed", of=number, **kept, **{k: v for k, v in asdict(outcome).items() if k != "id"})
        self.model = model
        if outcome.accepted:
            self._replay.keep(self.model)
        return outcome

    def sleep(self, stop: Callable[[], bool] = lambda: False) -> Slept | None:
        """Learn all corrections together, from the base, and keep that if it is better; see sleep.py.

        None if stop(), asked now and then, said to leave it, or a correction came: nothing is changed, and the next
        sleep goes on there if nothing else was learnt. Raises ValueError if there is nothing to learn together.
        """
        sequence = self._replay.sequence()
        if len(self.learnt()) < 2 or sequence[-1]["kind"] == "slept":
            raise ValueError("there is nothing to sleep on: fewer than two corrections, or none since the last sleep")
        of = ([record["id"] for record in sequence], self.config)
        left, self._asleep = self._asleep, None
        again = left is not None and left[0] == of
        sleep = left[1] if again else self._sleep_on(self._replay.received(sequence), self.config)
        if not sleep.go_on(lambda: stop() or bool(self.waiting())):
            self._asleep = of, sleep
            return None
        slept = judged(sleep, self.model, self.weights_of(sleep.model))
        self.journal.append("slept", **asdict(slept), config=asdict(self.config))
        if slept.accepted:
            self.model = sleep.model
            self._replay.keep(self.model)
        return slept

    def undo(self, count: int = 1) -> list[int]:
        """Take back the last `count` corrections or sleeps; returns their ids. The weights before them are exact."""
        known = self._replay.sequence()
        if not 1 <= count <= len(known):
            raise ValueError(f"there are {len(known)} corrections to undo, not {count}")
        return self.forget([record["id"] for record in known[-count:]])

    def forget(self, ids: list[int]) -> list[int]:
        """Take back corrections, and what belongs to them, or sleeps: the weights become those of a replay without.

        Corrections that were learnt together in a sleep with one that is taken back are learnt together without it.
        Returns the numbers of all, those of what belongs to the others last.
        """
        known = self._replay.sequence()
        if unknown := set(ids) - {record["id"] for record in known}:
            raise ValueError(f"no active correction has the number {min(unknown)}; see the history")
        ids = [*ids, *belonging(self.active(), ids)]
        model = self._replay.model_after([record for record in known if record["id"] not in ids])
        self.journal.append("undone", of=ids)
        self.model = model
        return ids

    def active(self) -> list[dict]:
        """Records of the corrections that count: learnt, or waiting to be."""
        return self.learnt() + self.waiting()

    def learnt(self) -> list[dict]:
        """Records of the corrections that were learnt and not undone."""
        return [record for record in self._replay.sequence() if record["kind"] == "received"]

    def waiting(self) -> list[dict]:
        """Records of the corrections that were received and not tried yet."""
        return list(self.journal.ledger.waiting.values())

    def replay(self) -> str:
        """Rebuild the weights from the base and the journal, from the newest snapshot that fits; returns their hash.

        Corrections that were received but not committed, as after a crash, are learnt and committed.
        """
        self.model = self._replay.model_after(self._replay.sequence())
        self._recover()
        return self.weights

    def _recover(self) -> None:
        """Learn what waits. What cannot be learnt is told, and in the way of nothing else."""
        for record in self.waiting():
            try:
                self.commit(record["id"])
            except Exception as error:
                print(f"{self.folder}: {record['id']} was not learnt: {in_a_line(error)}", file=sys.stderr)

    def configure(self, **changes) -> None:
        """Change settings for the corrections to come; they are kept. Raises ValueError, changing nothing."""
        self._profile.configure(replace(self.config, **renamed(changes)))

    def diff(self, model: RWKV | None = None) -> dict[str, float]:
        """What of a version is not the base's: by name, the length of the change over that of the weight."""
        base = dict(self.base.named_parameters())
        ours = changed(model or self.model, self.base)
        return {n: _moved(as_wide(base[n]), w) if n in base else 1.0 for n, w in ours.items()}

    def export(self, path: str | Path) -> Exported:
        """Write what was learnt as chats that `prepare` reads, and beside them PATH.pairs.jsonl, preferences.

        An answer in whose place another one was taught is not written. Raises ValueError where one of the files is
        there.
        """
        items = map(item_of, self.learnt())
        return export([it for it in items if isinstance(it, Correction)], self.form, Path(path))

    def answer(self, question: str, model: RWKV | None = None) -> str:
        """The model's greedy reply to a question on its own, as decoded."""
        return answer_to(model or self.model, self.form, question)

    def _judge(self, received: Received, tick: Tick) -> tuple[Outcome, RWKV]:
        """Learn a correction on top of the current model; (what became of it, the model it leaves)."""
        begun, before, item = time.monotonic(), self.model, received.item
        if isinstance(item, Correction) and item.keeps and is_kept(item, before, self.form):
            lesson = Lesson([example_of(item, self.form)], reply=self.form.answer(item.answer))
            learn = partial(tuple, (before, 0))
        else:
            lesson = self._lesson(before, received, self._replay.received(self._replay.sequence()))
            learn = partial(self._learn, before, received, lesson, tick)
        outcome, model = judge(received, before, lesson, learn, self.rehearsal)
        return replace(outcome, seconds=time.monotonic() - begun), model

    def _lesson(self, model: RWKV, received: Received, earlier: list[Received]) -> Lesson:
        """What a correction trains and keeps, after earlier ones."""
        if isinstance(received.item, Reading):
            return text_lesson(received, earlier, self.form)
        ids = [received.id, *(it.id for it in earlier)]
        committed = {number: how for number in ids if (how := self.journal.ledger.committed.get(number))}
        return lesson_of(received, earlier, committed, model, self.rehearsal)

    def _learn(
        self, model: RWKV, received: Received, lesson: Lesson, tick: Tick = lambda step, loss: None
    ) -> tuple[RWKV, int]:
        """(the model after a lesson, steps taken)."""
        curvature, config = self.rehearsal.curvature, received.config
        with half_the_threads():
            if isinstance(received.item, Reading):
                return dynamic_evaluation(model, lesson.new[0].ids, curvature, config, tick)
            return take_steps(model, lesson, curvature, config, tick)

    def _learnt_whole(self, model: RWKV, received: Received, earlier: list[Received]) -> RWKV:
        return self._learn(model, received, self._lesson(model, received, earlier))[0]

    def _sleep_on(self, received: list[Received], config: FeedbackConfig) -> Sleep:
        return Sleep(self.rehearsal, received, config, self._watched, self.journal.ledger.committed)

    def _watched(self, what: str, items: Sequence) -> Iterable:
        return self.watch(what, items)  # whatever that is by now


def _moved(base: Tensor, weight: Tensor) -> float:
    return float((weight - base).norm() / base.norm())
