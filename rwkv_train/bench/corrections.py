"""How good are corrections? The protocol of the design note feedback.md, on anybody's model and cases.

Every answer is decoded greedily, to its natural end, and compared as a whole: no teacher forcing.
"""

import math
import re
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import torch

from rwkv_train.bench.correction_cases import Asked, Case
from rwkv_train.bench.correction_measures import Answers, Document, Heldout, Marks, merged, percentile
from rwkv_train.feedback.background import Background, half_the_threads
from rwkv_train.feedback.correction import Correction, Outcome
from rwkv_train.feedback.decode import MAX_NEW_TOKENS, Form
from rwkv_train.feedback.learner import Learner
from rwkv_train.feedback.rehearsal import RehearsalSet
from rwkv_train.feedback.settings import FeedbackConfig
from rwkv_train.generate import Sampling, prefill, stream_tokens
from rwkv_train.models.base import RWKV

CONTROLS = {
    "step_factor 0": {"step_factor": 0.0, "steps": 1},
    "naive": dict.fromkeys(
        ["replay", "contrasts", "rehearsed", "free_running", "paraphrases", "random_prefixes", "extra"], 0
    ),
    "state only": {"trainable": "state"},
}
STRANGER = 200  # tokens of unrelated text before a question
IDLE = 1000  # tokens that are timed while nothing is learnt

Tick = Callable[[], object]


class Protocol:
    """One model, its cases and what must not change; `alone` and `stream` measure one recipe.

    unrelated: questions. heldout: documents as (text, whether its loss counts). also: the first paraphrase of each
    case is taught as another way to ask, and not measured. before: tokens of the dialogue that a case without one of
    its own is corrected in, at least. unread: more unrelated questions, which the model was not trained on.
    """

    def __init__(
        self,
        base: RWKV,
        form: Form,
        cases: list[Case],
        unrelated: list[str],
        heldout: list[Document],
        also: bool = False,
        before: int = 0,
        unread: Iterable[str] = (),
    ):
        self.base, self.form, self.cases, self.also, self.before = base.eval(), form, cases, also, before
        for case in cases:
            if form.shown(form.answer(case.answer)) != case.answer.strip():
                raise ValueError(f"a reply cannot be {case.answer!r}: the template ends it before; leave that case out")
        taught = {question for case in cases for question in (case.question, *case.paraphrases)}
        self.unrelated, self.unread = ([text for text in some if text not in taught] for some in (unrelated, unread))
        if before and not self.unrelated:
            raise ValueError("before needs unrelated questions that no case teaches; give others as unrelated")
        self.rehearsal = RehearsalSet.of_model(base, form)
        self.heldout = Heldout(base, form, heldout)
        self.stranger = self.heldout.opening(STRANGER)
        self.answers = Answers(base, form, max(MAX_NEW_TOKENS, *(len(form.answer(case.answer)) for case in cases)))

    def known(self) -> list[Case]:
        """The cases whose question the base answers as they want."""
        said = self.answers.of_base(case.asked for case in self.cases)
        return [case for case in self.cases if said[case.asked] == self.answers.wanted(case)]

    def drawn(self, seed: int, count: int) -> list[Case]:
        """The first cases of the seed's order. ValueError if there are fewer."""
        if count > len(self.cases):
            raise ValueError(f"there are {len(self.cases)} cases, fewer than {count}; ask for fewer")
        order = torch.randperm(len(self.cases), generator=torch.Generator().manual_seed(seed))
        return [self.cases[i] for i in order[:count]]

    def alone(
        self, config: FeedbackConfig, drawn: list[tuple[Case, int]], tick: Tick = lambda: None, parts: int = 1
    ) -> list[Marks]:
        """Measures of corrections each learnt by the base on its own; drawn: cases, each with the seed of a dialogue.

        parts: of the held-out documents and the unrelated questions; each correction is asked for one of them, in turn.
        """
        parts, marks = min(parts, len(self.heldout.documents)), []
        for number, (case, seed) in enumerate(drawn):
            with self._learner(config) as learner:
                newest = self._newest(learner, self.correction(case, seed), case)
                after = self.after(learner.model, [case], slice(number % parts, None, parts))
            marks.append(merged(newest, *after))
            tick()
        return marks

    def stream(
        self, config: FeedbackConfig, counts: list[int], seed: int, tick: Tick = lambda: None
    ) -> Iterator[tuple[int, list[Marks]]]:
        """(number, measures) after each number in `counts` of corrections one after another, in the seed's order."""
        cases, newest = self.drawn(seed, max(counts)), []
        with self._learner(config) as learner:
            for number, case in enumerate(cases, 1):
                newest.append(self._newest(learner, self.correction(case, seed), case))
                tick()
                if number in counts:
                    after = self.after(learner.model, cases[:number])
                    yield number, [*map(merged, newest, after), *after[number:]]

    def after(self, model: RWKV, cases: list[Case], part: slice = slice(None)) -> list[Marks]:
        """Measures of a model that was taught these cases, in their order; then of a part of all else."""
        unrelated = {"unrelated identical": self.answers.identical(model, self.unrelated[part])}
        if self.unread:
            unrelated["unread identical"] = self.answers.identical(model, self.unread[part])
        return [
            *self.answers.judge(model, cases, self.also),
            Marks(None, unrelated),
            self.heldout.rise(model, part),
        ]

    def correction(self, case: Case, seed: int) -> Correction:
        """A case in its dialogue; if it has none, in three turns with the base's replies, or in `before` tokens."""
        if case.before:
            return Correction(case.question, case.answer, tuple(self.answers.dialogue(case.before)))
        rng, turns = torch.Generator().manual_seed(1000 + seed), []
        while self.unrelated and (not turns or len(self.answers.dialogue(turns)) < self.before):
            order = torch.randperm(len(self.unrelated), generator=rng)[:3]
            asked = [Asked((), self.unrelated[int(i)]) for i in order]
            turns += [(a.question, reply) for a, reply in self.answers.of_base(asked).items()]
        return Correction(case.question, case.answer, tuple(self.answers.dialogue(turns)))

    def _newest(self, learner: Learner, correction: Correction, case: Case) -> Marks:
        """Teach a case, and ask it at once in three states."""
        before = learner.model
        outcomes, seconds, received = _teach(learner, correction, case.paraphrases[: int(self.also)])
        model, wanted, generation = learner.model, self.answers.wanted(case), self._generation(case)
        stranger = prefill(model, self.stranger)[1]
        dialogue = prefill(before, [self.form.tokenizer.eod, *correction.context])[1]
        states = {
            "newest, empty state": (case.asked, None),
            "newest, unrelated state": (case.asked, stranger),
            "newest, dialogue state": (Asked((), case.question), dialogue),
        }
        values = {name: [self.answers.of(model, [a], state)[0] == wanted] for name, (a, state) in states.items()}
        values |= {"time over generation": [s / generation for s in seconds], "seconds": seconds}
        return Marks(case, values | {"received in": [received], "accepted": [o.accepted for o in outcomes]})

    def serving(self, config: FeedbackConfig, count: int = 5) -> dict[str, float]:
        """What a reply that streams meanwhile feels of `count` corrections; and the process's memory."""
        with half_the_threads(), self._learner(config) as learner:
            idle, memory_idle = self._gaps(lambda tokens: tokens < IDLE)
            errors: list[Exception] = []
            background, done = Background(errors.append), threading.Event()
            for case in self.cases[:count]:
                number = learner.receive(Correction(case.question, case.answer))
                background.submit(lambda number=number: learner.commit(number))
            background.submit(done.set)
            busy, memory_busy = self._gaps(lambda tokens: not done.is_set())
            background.close()
        if errors:
            raise errors[0]
        slower = {f"busy over idle, p{share}": percentile(busy, share) / percentile(idle, share) for share in (50, 99)}
        figures = {"idle token, p99 ms": percentile(idle, 99) * 1e3, "busy token, p99 ms": percentile(busy, 99) * 1e3}
        return {**figures, **slower, "peak memory over idle": memory_busy / memory_idle}

    @contextmanager
    def _learner(self, config: FeedbackConfig) -> Iterator[Learner]:
        """A learner that accepts whatever decodes, and whose profile is gone afterwards."""
        config, form = replace(config, max_kl=math.inf), self.form
        with (
            tempfile.TemporaryDirectory() as folder,
            Learner(self.base, form.tokenizer, folder, form.template, config, self.rehearsal) as learner,
        ):
            yield learner

    def _gaps(self, going: Callable[[int], bool]) -> tuple[list[float], float]:
        """(seconds between tokens that the base generates for as long as going(tokens so far), peak memory in kB)."""
        gaps: list[float] = []
        reset_peak, status = Path("/proc/self/clear_refs"), Path("/proc/self/status")
        if reset_peak.exists():
            reset_peak.write_text("5")
        while going(len(gaps)):
            logits, state = prefill(self.base, [self.form.tokenizer.eod])
            last = time.perf_counter()
            for _ in stream_tokens(self.base, logits, state, Sampling(), 100, rng=torch.Generator().manual_seed(0)):
                now = time.perf_counter()
                gaps.append(now - last)
                last = now
        peak = re.search(r"VmHWM:\s+(\d+)", status.read_text()) if status.exists() else None
        return gaps, float(peak[1]) if peak else math.nan

    def _generation(self, case: Case) -> float:
        """Seconds to generate as many tokens as a case's prompt and answer have, one by one."""
        begun, state = time.perf_counter(), None
        for token in [*self.form.prompt(case.question), *self.form.answer(case.answer)]:
            state = prefill(self.base, [token], state)[1]
        return time.perf_counter() - begun


def _teach(learner: Learner, correction: Correction, also: list[str]) -> tuple[list[Outcome], list[float], float]:
    """(what became of a correction and of other ways to ask it, seconds of each, seconds until it was recorded)."""
    recorded, times = [], [time.perf_counter()]
    outcomes = [learner.learn(correction, lambda number: recorded.append(time.perf_counter()))]
    times.append(time.perf_counter())
    for text in also if outcomes[0].accepted else []:
        outcomes.append(learner.also(text))
        times.append(time.perf_counter())
    return outcomes, [end - begin for begin, end in pairwise(times)], recorded[0] - times[0]
