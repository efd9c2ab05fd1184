"""How good are corrections? The protocol of the design note feedback.md, on anybody's model and cases.

Every answer is decoded greedily, to its natural end, and compared as a whole: no teacher forcing.
"""

import json
import math
import tempfile
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import mean

import torch

from rwkv_train.feedback.decode import greedy
from rwkv_train.feedback.guards import Guards
from rwkv_train.feedback.learner import Correction, Learner
from rwkv_train.feedback.steps import FeedbackConfig
from rwkv_train.generate import prefill
from rwkv_train.loss import token_nll
from rwkv_train.models.common import RWKV
from rwkv_train.state import State
from rwkv_train.tokenizer import Tokenizer

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
}
CONTROLS = {
    "rate 0": {"rate": 0.0, "steps": 1},
    "naive": {"replay": 0, "pull": 0.0, "extra": 0},
}


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
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), 1):
        try:
            cases.append(Case(**json.loads(line)))
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path}:{number}: no case ({error}); it needs question and answer") from None
    if not cases:
        raise ValueError(f"{path} holds no cases; put one correction on each line")
    return cases


class Protocol:
    """One model, its cases and what must not change; `run` measures one recipe on a stream of corrections."""

    def __init__(
        self,
        base: RWKV,
        tokenizer: Tokenizer,
        cases: list[Case],
        unrelated: list[str],
        heldout: str,
    ):
        self.base, self.tokenizer, self.cases, self.unrelated = base.eval(), tokenizer, cases, unrelated
        self.guards = Guards.of_model(base, tokenizer.encode("User:"), tokenizer.eod)
        ids = tokenizer.encode(heldout)
        self.heldout, self.stranger = ids[200:], [tokenizer.eod, *ids[:200]]
        self.before = self._answers(base, unrelated)
        self.loss_before = self._loss(base)

    def run(self, config: FeedbackConfig, count: int, seed: int, tick=lambda: None) -> dict[str, float]:
        """Measures after `count` corrections one after another, drawn by seed; the newest ones along the way."""
        rng = torch.Generator().manual_seed(seed)
        cases = [self.cases[i] for i in torch.randperm(len(self.cases), generator=rng)[:count]]
        newest: dict[str, list[bool]] = {name: [] for name in list(TARGETS)[:3]}
        seconds, accepted = [], 0
        context = self._context(seed)
        with tempfile.TemporaryDirectory() as folder:
            learner = Learner(self.base, self.tokenizer, folder, self.guards, replace(config, budget=math.inf))
            for case in cases:
                old_state = self._state(learner.model, [self.tokenizer.eod, *context])
                begun = time.perf_counter()
                outcome = learner.learn(Correction(case.question, case.answer, tuple(context)))
                seconds.append(time.perf_counter() - begun)
                accepted += outcome.accepted
                states = (None, self._state(learner.model, self.stranger), old_state)
                for name, state in zip(newest, states, strict=True):
                    newest[name].append(self._answers(learner.model, [case.question], state)[0] == case.answer)
                tick()
            model = learner.model
            learner.close()
        found = {name: mean(right) for name, right in newest.items()}
        found |= self._after(model, cases)
        return found | {"accepted": accepted / len(cases), "seconds": sorted(seconds)[len(seconds) // 2]}

    def _after(self, model: RWKV, cases: list[Case]) -> dict[str, float]:
        right = [a == c.answer for a, c in zip(self._answers(model, [c.question for c in cases]), cases, strict=True)]
        asked = [(p, c.answer) for c in cases for p in c.paraphrases]
        answers = self._answers(model, [question for question, _ in asked])
        found = {"all retained": mean(right)}
        found["paraphrases"] = mean([a == want for a, (_, want) in zip(answers, asked, strict=True)] or [math.nan])
        for name, field_name in (("neighbours changed", "neighbours"), ("same subject changed", "same_subject")):
            questions = [n["question"] for c in cases for n in getattr(c, field_name)]
            found[name] = self._changed(model, questions)
        found["unrelated identical"] = 1 - self._changed(model, self.unrelated, self.before)
        found["perplexity rise"] = math.exp(self._loss(model) - self.loss_before) - 1
        return found

    def _changed(self, model: RWKV, questions: list[str], before: list[str] | None = None) -> float:
        """Share of questions that the model answers otherwise than the base."""
        if not questions:
            return math.nan
        before = self._answers(self.base, questions) if before is None else before
        return mean([a != b for a, b in zip(self._answers(model, questions), before, strict=True)])

    def _answers(self, model: RWKV, questions: list[str], state: State | None = None) -> list[str]:
        prompts = [self._prompt(q, first=state is None) for q in questions]
        return greedy(model, self.tokenizer, prompts, state)

    def _prompt(self, question: str, first: bool) -> list[int]:
        ids = self.tokenizer.encode(f"User: {question}\n\nAssistant:")
        return [self.tokenizer.eod, *ids] if first else ids

    def _state(self, model: RWKV, ids: list[int]) -> State:
        return prefill(model, ids)[1]

    def _context(self, seed: int) -> list[int]:
        """A dialogue of three turns before the correction, with the base model's own replies."""
        rng = torch.Generator().manual_seed(1000 + seed)
        turns = [int(i) for i in torch.randperm(len(self.unrelated), generator=rng)[:3]]
        text = "".join(f"User: {self.unrelated[i]}\n\nAssistant: {self.before[i]}\n\n" for i in turns)
        return self.tokenizer.encode(text)

    @torch.no_grad()
    def _loss(self, model: RWKV) -> float:
        """Mean loss on the held-out text, nats a token, read in one go with the state carried."""
        ids, state, nll = [self.tokenizer.eod, *self.heldout], None, []
        for i in range(0, len(ids) - 1, 1024):
            chunk = torch.tensor([ids[i : i + 1025]])
            x, state = model.hidden(chunk[:, :-1], state)
            nll.append(token_nll(x, model.head.weight, chunk[:, 1:]))
        return float(torch.cat(nll).double().mean())


def table(results: dict[str, dict[str, float]]) -> str:
    """Measures by column, beside their targets; columns are named after their recipe and number of corrections."""
    columns = list(results)
    lines = [f"{'measure':<26}" + "".join(f"{c:>14}" for c in columns) + "      target 1 / 10 / 100"]
    for name in [*TARGETS, "accepted", "seconds"]:
        cells = "".join(f"{_shown(name, results[c].get(name, math.nan)):>14}" for c in columns)
        target = TARGETS.get(name)
        sign = "" if target is None else (">= " if target[0] else "<= ")
        wanted = "" if target is None else " / ".join("-" if t is None else _shown(name, t) for t in target[1:])
        lines.append(f"{name:<26}{cells}      {sign}{wanted}")
    return "\n".join(lines)


def _shown(name: str, value: float) -> str:
    if math.isnan(value):
        return "-"
    return f"{value:.2f} s" if name == "seconds" else f"{value:.2%}" if "perplexity" in name else f"{value:.1%}"
