"""Sleep: while nobody asks, all corrections are learnt together, from the base.

One after another, every correction moves a little of what the ones before it taught. Together none comes last: the
lessons and steps are those of any correction, in batches that are drawn anew in every epoch. Once all is learnt they go
on, and move all else back towards the base. What that comes to is kept only if it is better than what was there.
"""

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import cycle, islice

import torch

from rwkv_train.feedback.background import Watch, half_the_threads
from rwkv_train.feedback.correction import Reading, Received, document_of
from rwkv_train.feedback.decode import greedy
from rwkv_train.feedback.gate import shows
from rwkv_train.feedback.lesson import Lesson, lesson_of, standing
from rwkv_train.feedback.rehearsal import RehearsalSet
from rwkv_train.feedback.settings import FeedbackConfig
from rwkv_train.feedback.steps import GROWTH, REPAIRS, dynamic_evaluation, take_steps
from rwkv_train.feedback.texts import Anchored
from rwkv_train.models.base import RWKV

TOGETHER = 8  # corrections of one batch: of more, each step does little for any of them
STEPS = 4  # on one batch
EPOCHS = 20  # at most
WAIT = 3  # epochs that may do no better than one in which all answers were right
TURNS = 8  # epochs in which all contrasts of a correction are read once
ROWS, TALKS = 12, 6  # dialogues and free-running samples of the rehearsal set that are kept along with one batch
ASKED = 64  # questions that are answered at once
LESSONS = "sleep, lessons"  # what is told while they are made


@dataclass(frozen=True)
class Slept:
    """What a sleep came to.

    of: numbers of what was learnt together. why: what spoke against it, or "better". right: how many of the `count`
    corrections that have an answer gave it, or no longer gave the wrong one, as decoded. lost: numbers of those that
    were right before and are not after. drift: KL from the base, in nats a token of the rehearsal set. weights: hash.
    """

    accepted: bool
    why: str
    of: list[int]
    count: int
    right_before: int
    right_after: int
    lost: list[int]
    drift_before: float
    drift_after: float
    epochs: int
    seconds: float
    weights: str


class Sleep:
    """Corrections that are learnt together, in pieces between which it can be left and gone on with.

    received: what was learnt, in that order; the last word on a question counts. committed: how, as the journal
    records it; paraphrases and contrasts that are not there are looked for. `model` at the end follows from the
    arguments alone.
    """

    def __init__(
        self,
        rehearsal: RehearsalSet,
        received: list[Received],
        config: FeedbackConfig,
        watch: Watch,
        committed: dict[int, dict] | None = None,
    ):
        self.rehearsal, self.received, self.config, self._committed = rehearsal, received, config, committed or {}
        self.model, self.epochs, self.seconds = rehearsal.base, 0, 0.0
        self._pieces = self._run(watch)

    def go_on(self, stop: Callable[[], bool] = lambda: False) -> bool:
        """Whether it came to its end; otherwise stop() said to leave it."""
        begun = time.monotonic()
        with half_the_threads():
            stopped = any(stop() for _ in self._pieces)
        self.seconds += time.monotonic() - begun
        return not stopped

    def _run(self, watch: Watch) -> Iterator[None]:
        # 1. Texts that were only read.
        readings = [it for it in self.received if isinstance(it.item, Reading)]
        for it in watch("sleep, texts", readings):
            ids = document_of(it.item, self.rehearsal.form)
            self.model, _ = dynamic_evaluation(self.model, ids, self.rehearsal.curvature, it.config)
            yield
        # 2. The lesson of each correction, as if it were the only one.
        lessons, start = [], self.model
        for it in watch(LESSONS, standing(self.received)):
            how = self._committed.get(it.id, {})
            known = {it.id: how} if "contrasts" in how else {}
            lessons.append(lesson_of(it, [], known, start, self.rehearsal))
            yield
        lessons, rows = agreeing(lessons, self.rehearsal.rows)
        # 3. Epochs, until none does better; the best of them counts.
        # What is kept weighs more once all is learnt: from the start it would leave nothing to be learnt.
        config = replace(self.config, steps=STEPS, extra=STEPS)
        rng, grown = torch.Generator().manual_seed(0), 0
        rows = cycle([rows[i] for i in torch.randperm(len(rows), generator=rng)])
        talk = cycle(self.rehearsal.free_running)
        best, model = None, start
        for epoch in range(1, EPOCHS + 1 if lessons else 0):
            for some in watch(f"sleep, epoch {epoch}", torch.randperm(len(lessons), generator=rng).split(TOGETHER)):
                kept = [Anchored(ids, self.rehearsal.base) for ids in [*islice(rows, ROWS), *islice(talk, TALKS)]]
                lesson = together([lessons[i] for i in some], kept, epoch)
                model, _ = take_steps(model, lesson, self.rehearsal.curvature, config)
                yield
            answers = right(model, self.rehearsal, standing(self.received))
            figures = sum(answers), -self.rehearsal.drift(self.rehearsal.base, model)
            if best is None or figures > best:
                best, self.model, self.epochs = figures, model, epoch
            if all(answers) and grown < REPAIRS:
                config, grown = replace(config, kl_weight=config.kl_weight * GROWTH), grown + 1
            if best[0] == len(answers) and epoch - self.epochs == WAIT:
                break
            yield


def together(lessons: list[Lesson], rehearsed: list[Anchored], epoch: int) -> Lesson:
    """What one epoch reads of some lessons: each question alone, one of its other examples, some of its contrasts.

    The next ones follow in the next epoch, and each lesson begins elsewhere: a batch has some of every kind.
    """
    others = [lesson.new[1:] for lesson in lessons]
    others = [some[(epoch + n) % len(some)] for n, some in enumerate(others) if some]
    contrasted = [text for n, lesson in enumerate(lessons) for text in lesson.contrasted[(epoch + n) % TURNS :: TURNS]]
    return Lesson([lesson.new[0] for lesson in lessons] + others, rehearsed=rehearsed, contrasted=contrasted)


def agreeing(lessons: list[Lesson], rows: list[list[int]]) -> tuple[list[Lesson], list[list[int]]]:
    """Lessons and rows of the rehearsal set without what is about another lesson's question: it has another answer."""
    asked = [tuple(lesson.new[0].ids[: -lesson.new[0].answer]) for lesson in lessons]
    lengths, whose = {len(prompt) for prompt in asked}, defaultdict(set)
    for n, prompt in enumerate(asked):
        whose[prompt].add(n)

    def agrees(ids: list[int], n: int | None = None) -> bool:
        return all(n in whose.get(tuple(ids[:length]), {n}) for length in lengths)

    alike = [
        replace(
            lesson,
            new=[example for example in lesson.new if agrees(example.ids, n)],
            contrasted=[text for text in lesson.contrasted if agrees(text.ids, n)],
        )
        for n, lesson in enumerate(lessons)
    ]
    return alike, [ids for ids in rows if agrees(ids)]


def right(model: RWKV, rehearsal: RehearsalSet, corrections: list[Received]) -> list[bool]:
    """Of each correction whether the model gives its answer, as decoded, or not the wrong one, also in its dialogue."""
    form, wrong = rehearsal.form, set()
    asked = [(context, it) for it in corrections for context in dict.fromkeys([(), it.item.context])]
    prompts = [[form.tokenizer.eod, *context, *form.turn(it.item.question)] for context, it in asked]
    order = sorted(range(len(asked)), key=lambda i: len(prompts[i]))
    with half_the_threads():
        for some in (order[i : i + ASKED] for i in range(0, len(order), ASKED)):
            most = max(form.longest(asked[i][1].item.answer) for i in some)
            replies = greedy(model, form, [prompts[i] for i in some], max_new_tokens=most)
            shown = [shows(asked[i][1].item, form.shown(ids), form) for i, ids in zip(some, replies, strict=True)]
            wrong |= {asked[i][1].id for i, is_right in zip(some, shown, strict=True) if not is_right}
    return [it.id not in wrong for it in corrections]


def judged(sleep: Sleep, before: RWKV, weights: str) -> Slept:
    """Whether what a sleep came to is to be kept instead of the model before it; weights: the hash of sleep.model.

    Kept is what gives no fewer right answers and drifts no further from the base, and does one of both better.
    """
    begun, rehearsal, corrections = time.monotonic(), sleep.rehearsal, standing(sleep.received)
    then, now = (right(model, rehearsal, corrections) for model in (before, sleep.model))
    with half_the_threads():
        drifts = [rehearsal.drift(rehearsal.base, model) for model in (before, sleep.model)]
    why = "better"
    if sum(now) < sum(then):
        why = "it would give fewer right answers"
    elif drifts[1] > drifts[0]:
        why = "everything else would drift further"
    elif sum(now) == sum(then) and drifts[1] == drifts[0]:
        why = "it would be no better"
    return Slept(
        accepted=why == "better",
        why=why,
        of=[it.id for it in sleep.received],
        count=len(corrections),
        right_before=sum(then),
        right_after=sum(now),
        lost=[it.id for it, was, is_ in zip(corrections, then, now, strict=True) if was and not is_],
        drift_before=drifts[0],
        drift_after=drifts[1],
        epochs=sleep.epochs,
        seconds=sleep.seconds + time.monotonic() - begun,
        weights=weights,
    )
