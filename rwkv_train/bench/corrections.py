"""How good are corrections? The protocol of the design note feedback.md, on anybody's model and cases.

Every answer is decoded greedily, to its natural end, and compared as a whole: no teacher forcing.
"""

import math
import re
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import mean

import torch

from rwkv_train.feedback.background import Background, half_the_threads
from rwkv_train.feedback.correction import Correction
from rwkv_train.feedback.decode import Form, greedy
from rwkv_train.feedback.learner import Learner
from rwkv_train.feedback.rehearsal import RehearsalSet
from rwkv_train.feedback.settings import FeedbackConfig
from rwkv_train.files import parse_json, read_lines
from rwkv_train.generate import Sampling, prefill, stream_tokens
from rwkv_train.models.base import RWKV
from rwkv_train.models.loss import IGNORE_INDEX, token_nll
from rwkv_train.models.state import State

# measure: (whether more is better, target at N = 1, 10, 100); None where a measure makes no sense
TARGETS = {
    "newest, empty state": (True, 0.99, 0.99, 0.98),
    "newest, unrelated state": (True, 0.97, 0.97, 0.95),
    "newest, dialogue state": (True, 0.97, 0.97, 0.95),
    "all retained": (True, None, 0.99, 0.97),
    "paraphrases": (True, 0.90, 0.90, 0.85),
    "neighbours changed": (False, 0.01, 0.03, 0.08),
    "same subject changed": (False, 0.01, 0.03, 0.08),
    "unrelated identical": (True, 0.99, 0.98, 0.92),
    "perplexity rise": (False, 0.001, 0.005, 0.02),
    "time over generation, p50": (False, 20.0, 20.0, 20.0),
    "time over generation, p95": (False, 40.0, 40.0, 40.0),
    "received in, p95": (False, 0.05, 0.05, 0.05),
}
UNITS = {
    "perplexity rise": "{:.2%}",
    "time over generation": "{:.1f} x",
    "received in": "{:.1f} ms",
    "seconds": "{:.2f}",
}
CONTROLS = {
    "step_factor 0": {"step_factor": 0.0, "steps": 1},
    "naive": dict.fromkeys(
        ["replay", "contrasts", "rehearsed", "free_running", "paraphrases", "random_prefixes", "extra"], 0
    ),
    "state only": {"trainable": "state"},
}
SINGLES = 10  # runs of a single correction for every seed
STRANGER = 200  # tokens of unrelated text before a question

Document = list[tuple[str, bool]]


@dataclass(frozen=True)
class Case:
    """A correction, unseen ways to ask for it, and questions whose answers must stay: {"question", "answer"} dicts."""

    question: str
    answer: str
    paraphrases: list[str] = field(default_factory=list)
    neighbours: list[dict] = field(default_factory=list)
    same_subject: list[dict] = field(default_factory=list)


def load_cases(path: str | Path) -> list[Case]:
    """Cases from jsonl, one a line. ValueError, with file and line, for anything else."""
    cases = []
    for number, line in read_lines(path):
        try:
            cases.append(_case(parse_json(line)))
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{path}:{number}: no case ({error}); it needs question and answer") from None
    if not cases:
        raise ValueError(f"{path} holds no cases; put one correction on each line")
    return cases


def _case(found: object) -> Case:
    case = Case(**found)
    watched = (*case.neighbours, *case.same_subject)
    texts = (case.question, case.answer, *case.paraphrases, *(asked["question"] for asked in watched))
    if not all(isinstance(text, str) and text.strip() for text in texts):
        raise ValueError("questions and answers must be text")
    return case


class Protocol:
    """One model, its cases and what must not change; `run` measures one recipe on a stream of corrections.

    unrelated: questions. heldout: documents as (text, whether its loss counts).
    """

    def __init__(self, base: RWKV, form: Form, cases: list[Case], unrelated: list[str], heldout: list[Document]):
        self.base, self.form, self.cases, self.unrelated = base.eval(), form, cases, unrelated
        self.rehearsal = RehearsalSet.of_model(base, form)
        self.heldout = [_counted(form, document) for document in heldout]
        self.stranger = [i for ids, _ in self.heldout for i in ids][:STRANGER]
        self.known: dict[str, str] = {}  # question: the base's answer
        self.loss_before = self._loss(base)

    def run(self, config: FeedbackConfig, count: int, seed: int, tick=lambda: None) -> dict[str, float]:
        """Measures after `count` corrections one after another, drawn by seed; the newest ones along the way."""
        rng = torch.Generator().manual_seed(seed)
        cases = [self.cases[i] for i in torch.randperm(len(self.cases), generator=rng)[:count]]
        newest: dict[str, list[bool]] = {name: [] for name in list(TARGETS)[:3]}
        seconds, ratios, received, accepted = [], [], [], 0
        context = self._context(seed)
        with self._learner(config) as learner:
            for case in cases:
                old_state = prefill(learner.model, [self.form.tokenizer.eod, *context])[1]
                correction = Correction(case.question, case.answer, tuple(context))
                begun = time.perf_counter()
                outcome = learner.learn(correction, lambda _, t=begun: received.append(time.perf_counter() - t))
                seconds.append(time.perf_counter() - begun)
                ratios.append(seconds[-1] / self._generation(case))
                accepted += outcome.accepted
                states = (None, prefill(learner.model, self.stranger)[1], old_state)
                for name, state in zip(newest, states, strict=True):
                    newest[name].append(self._answers(learner.model, [case.question], state)[0] == case.answer)
                tick()
            model = learner.model
        figures = {name: mean(right) for name, right in newest.items()}
        figures |= self._after(model, cases)
        for share in (50, 95):
            figures[f"time over generation, p{share}"] = _percentile(ratios, share)
        figures["received in, p95"] = _percentile(received, 95)
        return figures | {"accepted": accepted / len(cases), "seconds": _percentile(seconds, 50)}

    def serving(self, config: FeedbackConfig, count: int = 5) -> dict[str, float]:
        """What a reply that streams meanwhile feels of `count` corrections; and the process's memory."""
        with half_the_threads(), self._learner(config) as learner:
            idle, memory_idle = self._gaps(lambda tokens: tokens < 1000)
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
        slower = {
            f"busy over idle, p{share}": _percentile(busy, share) / _percentile(idle, share) for share in (50, 99)
        }
        figures = {"idle token, p99 ms": _percentile(idle, 99) * 1e3, "busy token, p99 ms": _percentile(busy, 99) * 1e3}
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

    def _after(self, model: RWKV, cases: list[Case]) -> dict[str, float]:
        right = [a == c.answer for a, c in zip(self._answers(model, [c.question for c in cases]), cases, strict=True)]
        asked = [(p, c.answer) for c in cases for p in c.paraphrases]
        answers = self._answers(model, [question for question, _ in asked])
        figures = {"all retained": mean(right)}
        figures["paraphrases"] = mean([a == want for a, (_, want) in zip(answers, asked, strict=True)] or [math.nan])
        for name, field_name in (("neighbours changed", "neighbours"), ("same subject changed", "same_subject")):
            figures[name] = self._changed(model, [n["question"] for c in cases for n in getattr(c, field_name)])
        figures["unrelated identical"] = 1 - self._changed(model, self.unrelated)
        figures["perplexity rise"] = math.exp(self._loss(model) - self.loss_before) - 1
        return figures

    def _changed(self, model: RWKV, questions: list[str]) -> float:
        """Share of questions that the model answers otherwise than the base."""
        before = self._before(questions)
        return mean([a != b for a, b in zip(self._answers(model, questions), before, strict=True)] or [math.nan])

    def _before(self, questions: list[str]) -> list[str]:
        new = [q for q in dict.fromkeys(questions) if q not in self.known]
        self.known |= zip(new, self._answers(self.base, new), strict=True)
        return [self.known[q] for q in questions]

    def _answers(self, model: RWKV, questions: list[str], state: State | None = None) -> list[str]:
        prompts = [self.form.prompt(q) if state is None else self.form.turn(q) for q in questions]
        return [self.form.shown(ids) for ids in greedy(model, self.form, prompts, state)] if prompts else []

    def _context(self, seed: int) -> list[int]:
        """A dialogue of three turns before the correction, with the base model's own replies."""
        rng = torch.Generator().manual_seed(1000 + seed)
        asked = [self.unrelated[int(i)] for i in torch.randperm(len(self.unrelated), generator=rng)[:3]]
        turns = zip(asked, self._before(asked), strict=True)
        return [i for q, a in turns for i in (*self.form.turn(q), *(self.form.answer(a) if a else []))]

    @torch.no_grad()
    def _loss(self, model: RWKV) -> float:
        """Mean loss on the held-out documents, nats a token, the state carried through each."""
        nll = []
        for ids, targets in self.heldout:
            state = None
            for i in range(0, len(ids), 1024):
                x, state = model.hidden(torch.tensor([ids[i : i + 1024]]), state)
                nll.append(token_nll(x, model.head.weight, torch.tensor([targets[i : i + 1024]])))
        return float(torch.cat(nll).double().mean())


def _counted(form: Form, document: Document) -> tuple[list[int], list[int]]:
    """(ids [T] from the end-of-document token on, the target of each [T])."""
    ids, targets = [form.tokenizer.eod], []
    for text, counts in document:
        part = form.tokenizer.encode(text)
        ids += part
        targets += part if counts else [IGNORE_INDEX] * len(part)
    return ids[:-1], targets


def _percentile(values: list[float], percent: int) -> float:
    return float(torch.tensor(values, dtype=torch.float64).quantile(percent / 100))


def summary(runs: list[dict[str, float]]) -> dict[str, dict]:
    """Mean and worst of each measure over runs."""
    figures = {}
    for name in runs[0]:
        values = [run[name] for run in runs]
        better = TARGETS.get(name, (name == "accepted",))[0]
        figures[name] = {"mean": mean(values), "worst": min(values) if better else max(values)}
    return figures


def table(results: dict[str, dict[str, dict]]) -> str:
    """A table in Markdown: measures, "mean (worst seed)" in a column for each recipe and number, their targets."""
    rows = [["measure", *results, "target 1 / 10 / 100"], ["---"] * (len(results) + 2)]
    for name in next(iter(results.values())):
        cells = [f"{_shown(name, r[name]['mean'])} ({_shown(name, r[name]['worst'])})" for r in results.values()]
        target = TARGETS.get(name)
        wanted = [] if target is None else ["-" if t is None else _shown(name, t) for t in target[1:]]
        sign = "" if target is None else ("≥ " if target[0] else "≤ ")
        rows.append([name, *cells, sign + " / ".join(dict.fromkeys(wanted))])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join("| " + " | ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) + " |" for row in rows)


def plot(results: dict[str, dict[str, dict]], path: str | Path) -> None:
    """What goes wrong after corrections, by recipe: a picture in the format that the path's ending names."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError('a plot needs matplotlib: pip install "rwkv_train[plots]"') from None
    names = [name for name in TARGETS if not name.startswith(tuple(UNITS))]
    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.subplots()
    height = 0.8 / len(results)
    for i, (recipe, figures) in enumerate(results.items()):
        wrong = [1 - figures[n]["mean"] if TARGETS[n][0] else figures[n]["mean"] for n in names]
        places = [place + (i - len(results) / 2 + 0.5) * height for place in range(len(names))]
        axes.barh(places, wrong, height, label=recipe)
    targets = [next(t for t in TARGETS[n][2:] if t is not None) for n in names]
    targets = [1 - t if TARGETS[n][0] else t for n, t in zip(names, targets, strict=True)]
    axes.scatter(targets, range(len(names)), marker="|", s=700, color="black", label="target, N=10", zorder=3)
    axes.set_yticks(range(len(names)), [f"{n}: not" if TARGETS[n][0] else n for n in names])
    axes.invert_yaxis()
    axes.set_xlim(0, 1)
    axes.set_xlabel("share of answers that are not as they should be; shorter is better")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)


def _shown(name: str, value: float) -> str:
    if math.isnan(value):
        return "-"
    unit = next((u for begin, u in UNITS.items() if name.startswith(begin)), "{:.1%}")
    return unit.format(value * 1e3 if unit.endswith("ms") else value)
