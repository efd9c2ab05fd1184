"""What became of corrections: answers decoded in few batches, and the figures that follow from them."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from statistics import mean, median

import torch

from rwkv_train.bench.correction_cases import Asked, Case, Turns
from rwkv_train.feedback.decode import Form, greedy
from rwkv_train.models.base import RWKV
from rwkv_train.models.loss import IGNORE_INDEX, token_nll
from rwkv_train.models.state import State

LANES = 64  # questions that are answered at once
PERCENTILES = {"time over generation": (50, 95), "received in": (95,)}

Document = list[tuple[str, bool]]


@dataclass
class Marks:
    """Values by measure, of one case, or of everything together where case is None; a share is a list of 0 and 1.

    said: the answers behind them, by question: the base's, and that of now.
    """

    case: Case | None
    values: dict[str, list[float]]
    said: dict[str, tuple[str, str]] | None = None


def merged(first: Marks, *others: Marks) -> Marks:
    """All values of one case."""
    marks = [first, *others]
    values = {name: values for mark in marks for name, values in mark.values.items()}
    return Marks(first.case, values, next((mark.said for mark in marks if mark.said), None))


class Answers:
    """Greedy answers of models to questions; those of the base are remembered."""

    def __init__(self, base: RWKV, form: Form, max_new_tokens: int):
        self.base, self.form, self.max_new_tokens = base, form, max_new_tokens
        self._base: dict[Asked, str] = {}

    def dialogue(self, turns: Turns) -> list[int]:
        """Turns as token ids, in the middle of a document. A reply of nothing is left out."""
        form = self.form
        return [i for user, reply in turns for i in (*form.turn(user), *(form.answer(reply) if reply else []))]

    def of(self, model: RWKV, asked: list[Asked], state: State | None = None) -> list[str]:
        """What a model answers, each question on its own, from a state of one lane; None is a document's beginning."""
        begin = [self.form.tokenizer.eod] if state is None else []
        prompts = [begin + self.dialogue(before) + self.form.turn(question) for before, question in asked]
        order, answers = sorted(range(len(prompts)), key=lambda i: len(prompts[i])), [""] * len(prompts)
        for first in range(0, len(order), LANES):
            some = order[first : first + LANES]
            replies = greedy(model, self.form, [prompts[i] for i in some], state, self.max_new_tokens)
            for i, ids in zip(some, replies, strict=True):
                answers[i] = self.form.shown(ids)
        return answers

    def of_base(self, asked: Iterable[Asked]) -> dict[Asked, str]:
        """What the base answers."""
        asked = list(dict.fromkeys(asked))
        new = [a for a in asked if a not in self._base]
        self._base |= zip(new, self.of(self.base, new), strict=True)
        return {a: self._base[a] for a in asked}

    def wanted(self, case: Case) -> str:
        """A case's answer as a reply shows it."""
        return self.form.shown(self.form.answer(case.answer))

    def judge(self, model: RWKV, cases: list[Case], also: bool) -> list[Marks]:
        """What a model that was taught these cases answers to their questions, and to those near to them.

        A neighbour that was itself taught does not count. also: the first paraphrase of each was taught as well.
        """
        taught = {a for case in cases for a in case.asking([case.question, *case.paraphrases[: int(also)]])}
        asked = dict.fromkeys(a for case in cases for a in _all_asked(case))
        base, now = self.of_base(asked), dict(zip(asked, self.of(model, list(asked)), strict=True))
        return [self._judged(case, now, base, taught, also) for case in cases]

    def _judged(self, case: Case, now: dict, base: dict, taught: set[Asked], also: bool) -> Marks:
        wanted, paraphrases = self.wanted(case), case.asking(case.paraphrases[int(also) :])
        neighbours = [n for n in case.asking(case.neighbours) if n not in taught]
        same_subject = [n for n in case.asking(case.same_subject) if n not in taught]
        alike = [base[p] == base[case.asked] for p in paraphrases]
        understood = [now[p] == wanted for p in paraphrases]
        values = {
            "all retained": [now[case.asked] == wanted],
            "other paraphrases" if also else "paraphrases": understood,
            "paraphrases alike to the base": [right for right, same in zip(understood, alike, strict=True) if same],
            "alike, of the paraphrases": alike,
            "leaks": [now[n] == wanted != base[n] for n in neighbours],
            "neighbours as before": [now[n] == base[n] for n in neighbours],
            "neighbours changed": [now[n] != base[n] for n in neighbours],
            "same subject changed": [now[n] != base[n] for n in same_subject],
        }
        return Marks(case, values, {a.question: (base[a], now[a]) for a in _all_asked(case)})

    def identical(self, model: RWKV, questions: list[str]) -> list[bool]:
        """Which of some questions a model answers as the base does."""
        asked = [Asked((), question) for question in questions]
        base, now = self.of_base(asked), self.of(model, asked)
        return [now[i] == base[a] for i, a in enumerate(asked)]


def _all_asked(case: Case) -> list[Asked]:
    return case.asking([case.question, *case.paraphrases, *case.neighbours, *case.same_subject])


class Heldout:
    """Text on which the loss must stay. documents: as (text, whether its loss counts)."""

    def __init__(self, base: RWKV, form: Form, documents: list[Document]):
        self.documents = [_counted(form, document) for document in documents]
        self.before = [_loss(base, *document) for document in self.documents]

    def opening(self, count: int) -> list[int]:
        """The first so many tokens of all the text."""
        return [i for ids, _ in self.documents for i in ids][:count]

    def rise(self, model: RWKV, part: slice = slice(None)) -> Marks:
        """By how much the perplexity rises, on some of the documents."""
        before, now = self.before[part], [_loss(model, *document) for document in self.documents[part]]
        more = sum(total for total, _ in now) - sum(total for total, _ in before)
        return Marks(None, {"perplexity rise": [math.expm1(more / sum(count for _, count in before))]})


def _counted(form: Form, document: Document) -> tuple[list[int], list[int]]:
    """(ids [T] from the end-of-document token on, the target of each [T])."""
    ids, targets = [form.tokenizer.eod], []
    for text, counts in document:
        part = form.tokenizer.encode(text)
        ids += part
        targets += part if counts else [IGNORE_INDEX] * len(part)
    return ids[:-1], targets


@torch.no_grad()
def _loss(model: RWKV, ids: list[int], targets: list[int]) -> tuple[float, int]:
    """(summed loss in nats, tokens that count) of a document, the state carried through it."""
    total, count, state = 0.0, 0, None
    for i in range(0, len(ids), 1024):
        x, state = model.hidden(torch.tensor([ids[i : i + 1024]]), state)
        nll = token_nll(x, model.head.weight, torch.tensor([targets[i : i + 1024]]))
        total, count = total + float(nll.double().sum()), count + len(nll)
    return total, count


def figures(marks: list[Marks]) -> dict[str, float]:
    """Each measure over all its values: the mean share, or percentiles of times."""
    pooled: dict[str, list[float]] = {}
    for mark in marks:
        for name, values in mark.values.items():
            pooled.setdefault(name, []).extend(values)
    found = {}
    for name, values in pooled.items():
        if name in PERCENTILES:
            found |= {f"{name}, p{share}": percentile(values, share) for share in PERCENTILES[name]}
        elif name == "seconds":
            found[name] = median(values)
        else:
            found[name] = mean(values or [math.nan])
    return found


def by_group(marks: list[Marks], cases: list[Case]) -> dict[str, dict[str, float]]:
    """The same for the cases of each kind, then of each language, in the order of `cases`, with how many there are.

    Nothing if no case is of any kind.
    """
    kinds, languages = ([getattr(case, name) for case in cases] for name in ("kind", "language"))
    found = {}
    for name in dict.fromkeys(filter(None, kinds + languages if any(kinds) else [])):
        if some := [mark for mark in marks if mark.case and name in (mark.case.kind, mark.case.language)]:
            found[name] = {"cases": len({mark.case.asked for mark in some})} | figures(some)
    return found


def percentile(values: list[float], percent: int) -> float:
    return float(torch.tensor(values, dtype=torch.float64).quantile(percent / 100))


def summary(runs: list[dict[str, float]], less_is_better: set[str]) -> dict[str, dict]:
    """Mean and worst of each measure over runs; a run in which it makes no sense (nan) does not count."""
    found = {}
    for name in dict.fromkeys(name for run in runs for name in run):
        values = [run[name] for run in runs if not math.isnan(run.get(name, math.nan))] or [math.nan]
        found[name] = {"mean": mean(values), "worst": max(values) if name in less_is_better else min(values)}
    return found
