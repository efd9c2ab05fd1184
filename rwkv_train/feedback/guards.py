"""What must not change: dialogues that a model holds with itself.

They cover what the model knows, in the proportions in which it knows it, and need no data set. A pool of them, made
once, stands for everything; for each correction some more are made up around its question, by putting its subject into
those of the pool and theirs into it. Of those, questions about its subject that the model answers as it answers the
corrected one are other wordings of it; all the others are neighbours.
"""

import json
import re
from collections.abc import Iterable
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from rwkv_train.checkpoints.weightfile import read_weights, write_safetensors
from rwkv_train.feedback.curvature import Curvature
from rwkv_train.feedback.decode import DECODED, Form, decode, greedy, sampled
from rwkv_train.feedback.steps import localised_names, upper_names
from rwkv_train.feedback.texts import predictions
from rwkv_train.files import replace_file
from rwkv_train.models.base import RWKV
from rwkv_train.models.finite import finite

VERSION = 2  # of the file
LONGEST = 32  # tokens of a sampled question, and of a sampled answer
LATER = 4  # of so many dialogues one goes on,
TURNS = 3  # for so many turns in all
FORESEEN = 1.0  # nats of surprise below which a word goes on with what the one before began
RARE = 0.6  # of the rarity of a subject's first word: what may go on with it
CANDIDATES = 3  # words that are tried as the subject of a question
ALIKE = 0.25  # of the others put in its place that may be answered as it is
TOGETHER = 32  # questions whose subjects are found at once
TALKS, TALK = 64, 150  # texts that may stand before a question, and their tokens
HEAT = 1.5  # temperature of these: strangers' talk is not what a model would say by itself
WATCHED = 32  # rows on which drift is measured


class Around(NamedTuple):
    """Questions made up around one: (text, prompt, greedy reply of the model, of the base).

    own: the model's reply to the one itself. subject: what that is about, "" if that cannot be told.
    """

    own: list[int]
    subject: str
    made: list[tuple[str, list[int], list[int], list[int]]]


class Guards:
    """What a model says, and how it says it.

    rows: whole dialogues as token ids, the end-of-document token in front. asked: (question, its subject) of those
    that came to the end of their question. talks: what the model writes when it is made to go on and on, likewise.
    curvature: of the upper matrices on all of them.
    """

    def __init__(
        self,
        base: RWKV,
        form: Form,
        rows: list[list[int]],
        asked: list[tuple[str, str]],
        talks: list[list[int]],
        curvature: Curvature,
    ):
        if not rows:
            raise ValueError("there is no guard text; give some text that the model should go on knowing")
        self.base, self.form, self.curvature = base, form, curvature
        self.rows, self.asked, self.talks = rows, asked, talks
        self._rarity = _rarity(rows, base.config.vocab_size)
        self._said: Tensor | None = None

    @classmethod
    def of_model(cls, base: RWKV, form: Form, count: int = 512) -> "Guards":
        """`count` dialogues of one turn, and the curvature of the upper matrices. Always the same.

        A model that does not end its questions is guarded by what it writes instead.
        """
        rng = torch.Generator().manual_seed(0)
        rows, questions, dialogues = [], [], []
        for row in _spoken(base, form, "user", [[form.tokenizer.eod]] * count, rng):
            text = form.shown(row[1 + len(form.opening()) :], "user") if _ended(form, "user", row) else ""
            if text:
                questions.append(text)
            else:
                rows.append(row)
        if questions:
            replies = decode(
                base, form.tokenizer, list(map(form.prompt, questions)), form.template.end(), most=LONGEST, rng=rng
            )
            dialogues = [form.prompt(text) + reply for text, reply in zip(questions, replies, strict=True)]
        rows += dialogues
        # Only for the curvature: what the model says late in a dialogue has to stay as well.
        longer = [row for row in dialogues[::LATER] if _ended(form, "assistant", row)]
        for role in ["user", "assistant"] * (TURNS - 1) if longer else []:
            longer = [row for row in _spoken(base, form, role, longer, rng) if _ended(form, role, row)] or longer
        talks = _wander(base, form, rng)
        curvature = Curvature.measure(base, upper_names(base), localised_names(base), rows + longer + talks)
        guards = cls(base, form, rows, [], talks, curvature)
        questions = list(dict.fromkeys(questions))
        for i in range(0, len(questions), TOGETHER):
            some = questions[i : i + TOGETHER]
            found = guards._subjects(some)
            guards.asked += [(text, words[0]) for text, words in zip(some, found, strict=True) if words]
        return guards

    def save(self, path: Path) -> None:
        """Write to a file that `load` reads."""
        text = json.dumps({"version": VERSION, "rows": self.rows, "asked": self.asked, "talks": self.talks}).encode()
        found = {"text": torch.tensor(list(text), dtype=torch.uint8), **self.curvature.tensors}
        replace_file(path, lambda temporary: write_safetensors(found, temporary))

    @classmethod
    def load(cls, path: Path, base: RWKV, form: Form) -> "Guards":
        """Raises ValueError for a file that is not what `save` wrote."""
        found = read_weights(path)
        text = json.loads(bytes(found.pop("text").tolist())) if "text" in found else {}
        if text.get("version") != VERSION:
            raise ValueError(f"{path} holds no guards of this version; delete it, it is made anew")
        asked = [tuple(pair) for pair in text["asked"]]
        return cls(base, form, text["rows"], asked, text["talks"], Curvature(found))

    def near(self, ids: list[int], most: int, seed: int, gone: Iterable[list[int]] = ()) -> list[list[int]]:
        """Up to `most` rows: a third of them share most of their tokens with `ids`, the others are drawn by seed.

        None has a reply in `gone`.
        """
        gone = {tuple(reply) for reply in gone if reply}
        lengths = {len(reply) for reply in gone}
        order = [i for i in _nearest(ids, self._words) if not any(tuple(self.rows[i][-n:]) in gone for n in lengths)]
        nearest, others = order[: -(-most // 3)], order[-(-most // 3) :]
        rng = torch.Generator().manual_seed(seed)
        drawn = torch.randperm(len(others), generator=rng)[: most - len(nearest)].tolist()
        return [self.rows[i] for i in nearest + [others[j] for j in drawn]]

    def said(self, model: RWKV) -> Tensor:
        """Log probabilities [N,V] by which drift is measured: after each token of some of the rows."""
        if model is self.base and self._said is not None:
            return self._said
        said = predictions(model, self.rows[:: max(1, len(self.rows) // WATCHED)][:WATCHED])
        if model is self.base:
            self._said = said
        return said

    @cached_property
    def _words(self) -> list[set[int]]:
        """The tokens of each row."""
        return [set(row) for row in self.rows]

    @cached_property
    def _asked_words(self) -> list[set[int]]:
        """The tokens of each question that was asked."""
        return [set(self.form.begun(text)) for text, _ in self.asked]

    def around(self, model: RWKV, question: str, subjects: int, forms: int) -> Around:
        """Questions made up around one, and what the model answers to all of them.

        They are crossings with the nearest questions of the pool: this one asked of up to `subjects` others, and up to
        `forms` others asked of its subject, those before these. What it is about is what the answer depends on: of its
        rare words, the one that others in its place change most answers.
        """
        asked, tried = self.form.prompt(question), []
        for ours in self.subjects(question):
            elsewhere, otherwise = self._crossed(question, ours, subjects, forms)
            texts = [text for text in dict.fromkeys(elsewhere + otherwise) if text != question]
            prompts = [self.form.prompt(text) for text in texts]
            own, *now = greedy(model, self.form, [asked, *prompts])
            alike = [reply == own for text, reply in zip(texts, now, strict=True) if text in elsewhere]
            tried.append((sum(alike) / max(1, len(alike)), ours, texts, prompts, now))
            if tried[-1][0] < ALIKE:
                break
        alike, ours, texts, prompts, now = min(tried, key=lambda t: t[0], default=(1.0, "", [], [], []))
        if alike > 0.5:
            return Around(greedy(model, self.form, [asked])[0], "", [])
        before = now if model is self.base or not prompts else self._before(prompts, now)
        return Around(own, ours, list(zip(texts, prompts, now, before, strict=True)))

    def _before(self, prompts: list[list[int]], now: list[list[int]]) -> list[list[int]]:
        """The base's greedy replies to prompts: mostly those of now, which reading them tells faster than decoding."""
        replies, eod, end, others = list(now), self.form.tokenizer.eod, self.form.template.end(), []
        texts = [prompt + reply for prompt, reply in zip(prompts, now, strict=True)]
        counts = [1 + len(reply) for reply in now]
        best = predictions(self.base, texts, counts).argmax(-1).split(counts)
        for i, reply in enumerate(now):
            *written, after = best[i].tolist()
            ended = len(reply) == DECODED or (end and end in self.form.tokenizer.decode(reply[-8:]))
            if written != reply or not (ended or after == eod):
                others.append(i)
        if others:
            decoded = greedy(self.base, self.form, [prompts[i] for i in others])
            for i, reply in zip(others, decoded, strict=True):
                replies[i] = reply
        return replies

    def _crossed(self, question: str, ours: str, subjects: int, forms: int) -> tuple[list[str], list[str]]:
        """(a question asked of others, others asked of its subject), the nearest first."""
        places = _nearest(self.form.begun(question), self._asked_words)
        # A piece of a character is no subject.
        pairs = [(asked, theirs) for asked, theirs in (self.asked[i] for i in places) if theirs and theirs in asked]
        elsewhere = dict.fromkeys(question.replace(ours, theirs) for _, theirs in pairs)
        otherwise = dict.fromkeys(asked.replace(theirs, ours) for asked, theirs in pairs)
        return list(islice(elsewhere, subjects)), list(islice(otherwise, forms))

    def subjects(self, question: str) -> list[str]:
        """What a question may be about: rare words that the base model could not foresee, and how they go on."""
        return [word for word in self._subjects([question])[0] if word in question]

    def _subjects(self, questions: list[str]) -> list[list[str]]:
        """The rarest first, up to CANDIDATES for each question."""
        opening, begun = [self.form.tokenizer.eod, *self.form.opening()], [self.form.begun(q) for q in questions]
        said = predictions(self.base, [[*opening, *ids[:-1]] for ids in begun])
        subjects = []
        for ids, here in zip(begun, said.split([len(opening) + len(ids) - 1 for ids in begun]), strict=True):
            surprise = -here[len(opening) - 1 :][range(len(ids)), ids].cpu()
            rarity = self._rarity[ids]
            found = []
            for begin in torch.minimum(surprise, rarity).argsort(descending=True, stable=True)[:CANDIDATES].tolist():
                end = begin + 1
                while end < len(ids) and surprise[end] < FORESEEN and rarity[end] > RARE * rarity[begin]:
                    end += 1
                found.append(re.sub(r"^\W+|\W+$", "", self.form.tokenizer.decode(ids[begin:end])))
            subjects.append([word for word in found if word])
        return subjects


def _spoken(base: RWKV, form: Form, role: str, rows: list[list[int]], rng: torch.Generator) -> list[list[int]]:
    """Dialogues with one more sampled message of a role."""
    begun = [row + form.opening(role) for row in rows]
    said = decode(base, form.tokenizer, begun, form.template.end(role), most=LONGEST, rng=rng)
    return [row + ids for row, ids in zip(begun, said, strict=True)]


@torch.no_grad()
def _wander(base: RWKV, form: Form, rng: torch.Generator) -> list[list[int]]:
    """TALKS texts of TALK tokens that begin as a user's message and may not end."""
    opening = [form.tokenizer.eod, *form.opening()]
    tokens, state = torch.tensor([opening] * TALKS), None
    written = [tokens]
    for _ in range(TALK - len(opening)):
        x, state = base.hidden(tokens.to(base.device), state)
        logits = finite(base.head(x[:, -1]), base).float() / HEAT
        logits[:, form.tokenizer.eod] = -torch.inf
        tokens = sampled(logits, rng)[:, None]
        written.append(tokens.cpu())
    return torch.cat(written, 1).tolist()


def _ended(form: Form, role: str, row: list[int]) -> bool:
    return form.tokenizer.decode(row[-8:]).endswith(form.template.end(role))


def _rarity(rows: list[list[int]], vocab_size: int) -> Tensor:
    """Of each token [V], in nats: minus the logarithm of the share of rows that hold it."""
    holding = torch.zeros(vocab_size)
    for row in rows:
        holding[list(set(row))] += 1
    return (len(rows) / (holding + 1)).log().clamp(min=0)


def _nearest(ids: list[int], others: list[set[int]]) -> list[int]:
    """Places of texts by the share of their tokens that is also in `ids`, and the other way round; greatest first."""
    words = set(ids)
    shared = [len(words & other) / len(words | other) for other in others]
    return sorted(range(len(others)), key=lambda i: -shared[i])
