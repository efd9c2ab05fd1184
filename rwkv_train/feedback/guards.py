"""What must not change: dialogues that a model holds with itself.

They cover what the model knows, in the proportions in which it knows it, and need no data set. A pool of them, made
once, stands for everything; for each correction some more are made up around its question, by putting its subject into
those of the pool and theirs into it. Of those, questions about its subject that the model answers as it answers the
corrected one are other wordings of it; all the others are neighbours.
"""

import json
from collections.abc import Iterable
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

from rwkv_train.feedback.curvature import Curvature
from rwkv_train.feedback.decode import Form, decode, greedy
from rwkv_train.feedback.texts import predictions
from rwkv_train.files import replace_file
from rwkv_train.models.common import RWKV
from rwkv_train.weightfile import read_weights, write_safetensors

LONGEST = 32  # tokens of a sampled question, and of a sampled answer
FORESEEN = 1.0  # nats of surprise below which a word goes on with what the one before began
RARE = 0.6  # of the rarity of a subject's first word: what may go on with it
TOGETHER = 32  # questions whose subjects are found at once
WATCHED = 32  # rows on which drift is measured


class Guards:
    """What a model says, and how it says it.

    rows: whole dialogues as token ids, the end-of-document token in front. asked: (question, its subject) of those
    that came to the end of their question. curvature: of the model on the rows.
    """

    def __init__(
        self, base: RWKV, form: Form, rows: list[list[int]], asked: list[tuple[str, str]], curvature: Curvature
    ):
        if not rows:
            raise ValueError("there is no guard text; give some text that the model should go on knowing")
        self.base, self.form, self.rows, self.asked, self.curvature = base, form, rows, asked, curvature
        self._rarity = _rarity(rows, base.config.vocab_size)

    @classmethod
    def of_model(cls, base: RWKV, form: Form, names: list[str], count: int = 512) -> "Guards":
        """`count` dialogues of one turn, and the curvature of the named matrices on them. Always the same.

        A model that does not end its questions is guarded by what it writes instead.
        """
        rng = torch.Generator().manual_seed(0)
        rows, questions = [], []
        begun = [[form.tokenizer.eod, *form.opening()]] * count
        for ids in decode(base, form.tokenizer, begun, form.end("user"), most=LONGEST, rng=rng):
            text = form.shown(ids, "user") if form.end("user") in form.tokenizer.decode(ids) else ""
            if text:
                questions.append(text)
            else:
                rows.append([form.tokenizer.eod, *form.opening(), *ids])
        prompts = [form.prompt(text) for text in questions]
        replies = decode(base, form.tokenizer, prompts, form.end(), most=LONGEST, rng=rng) if prompts else []
        rows += [p + r for p, r in zip(prompts, replies, strict=True)]
        guards = cls(base, form, rows, [], Curvature.measure(base, names, rows))
        questions = list(dict.fromkeys(questions))
        for i in range(0, len(questions), TOGETHER):
            some = questions[i : i + TOGETHER]
            guards.asked += zip(some, guards._subjects(some), strict=True)
        return guards

    def save(self, path: Path) -> None:
        """Write to a file that `load` reads."""
        text = json.dumps({"rows": self.rows, "asked": self.asked}).encode()
        found = {"text": torch.tensor(list(text), dtype=torch.uint8), **self.curvature.tensors}
        replace_file(path, lambda temporary: write_safetensors(found, temporary))

    @classmethod
    def load(cls, path: Path, base: RWKV, form: Form) -> "Guards":
        """Raises ValueError for a file that is not what `save` wrote."""
        found = read_weights(path)
        if "text" not in found:
            raise ValueError(f"{path} holds no guards; delete it, it is made anew")
        text = json.loads(bytes(found.pop("text").tolist()))
        return cls(base, form, text["rows"], [tuple(pair) for pair in text["asked"]], Curvature(found))

    def near(self, ids: list[int], most: int, seed: int, gone: Iterable[list[int]] = ()) -> list[list[int]]:
        """Up to `most` rows: a third of them share most of their tokens with `ids`, the others are drawn by seed.

        None has a reply in `gone`.
        """
        gone = [reply for reply in gone if reply]
        order = [i for i in _nearest(ids, self.rows) if not any(self.rows[i][-len(g) :] == g for g in gone)]
        nearest, others = order[: -(-most // 3)], order[-(-most // 3) :]
        rng = torch.Generator().manual_seed(seed)
        drawn = torch.randperm(len(others), generator=rng)[: most - len(nearest)].tolist()
        return [self.rows[i] for i in nearest + [others[j] for j in drawn]]

    def watched(self) -> list[list[int]]:
        return self.rows[:: max(1, len(self.rows) // WATCHED)][:WATCHED]

    def around(
        self, model: RWKV, question: str, subjects: int, forms: int
    ) -> list[tuple[str, list[int], list[int], list[int]]]:
        """Questions made up around one, none twice: (text, prompt, greedy reply of a model, of the base).

        They are crossings with the nearest questions of the pool: this one asked of up to `subjects` others, and up to
        `forms` others asked of its subject, those before these.
        """
        ours = self.subject(question)
        places = _nearest(self.form.begun(question), [self.form.begun(text) for text, _ in self.asked])
        # A piece of a character is no subject.
        pairs = [(asked, theirs) for asked, theirs in (self.asked[i] for i in places) if theirs and theirs in asked]
        if not ours or ours not in question:
            return []
        elsewhere = dict.fromkeys(question.replace(ours, theirs) for _, theirs in pairs)
        otherwise = dict.fromkeys(asked.replace(theirs, ours) for asked, theirs in pairs)
        made = [*islice(elsewhere, subjects), *islice(otherwise, forms)]
        made = [text for text in dict.fromkeys(made) if text != question]
        prompts = [self.form.prompt(text) for text in made]
        if not prompts:
            return []
        replies = greedy(self.base, self.form, prompts)
        now = replies if model is self.base else greedy(model, self.form, prompts)
        return list(zip(made, prompts, now, replies, strict=True))

    def subject(self, question: str) -> str:
        """What a question is about: its rarest word that the base model could not foresee, and how that goes on."""
        return self._subjects([question])[0]

    def _subjects(self, questions: list[str]) -> list[str]:
        opening, begun = [self.form.tokenizer.eod, *self.form.opening()], [self.form.begun(q) for q in questions]
        said = predictions(self.base, [[*opening, *ids[:-1]] for ids in begun])
        subjects = []
        for ids, here in zip(begun, said.split([len(opening) + len(ids) - 1 for ids in begun]), strict=True):
            surprise = -here[len(opening) - 1 :][range(len(ids)), ids].cpu()
            rarity = self._rarity[ids]
            begin = int(torch.minimum(surprise, rarity).argmax())
            end = begin + 1
            while end < len(ids) and surprise[end] < FORESEEN and rarity[end] > RARE * rarity[begin]:
                end += 1
            subjects.append(self.form.tokenizer.decode(ids[begin:end]).strip())
        return subjects


def _rarity(rows: list[list[int]], vocab_size: int) -> Tensor:
    """Of each token [V], in nats: minus the logarithm of the share of rows that hold it."""
    holding = torch.zeros(vocab_size)
    for row in rows:
        holding[list(set(row))] += 1
    return (len(rows) / (holding + 1)).log().clamp(min=0)


def _nearest(ids: list[int], rows: list[list[int]]) -> list[int]:
    """Places of rows by the share of their tokens that is also in `ids`, and the other way round; greatest first."""
    words = set(ids)
    shared = [len(words & set(row)) / len(words | set(row)) for row in rows]
    return sorted(range(len(rows)), key=lambda i: -shared[i])
