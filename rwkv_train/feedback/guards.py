"""What must not change: dialogues that a model holds with itself.

They cover what the model knows, in the proportions in which it knows it, and need no data set. A pool of them, made
once, stands for everything; for each correction some more are made up around its question. Of those, questions that
the model answers as it answers the corrected one are other wordings of it; all the others are neighbours.
"""

import random
from collections.abc import Iterable
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

from rwkv_train.feedback.curvature import Curvature
from rwkv_train.feedback.decode import Form, decode, greedy
from rwkv_train.files import replace_file
from rwkv_train.models.common import RWKV
from rwkv_train.weightfile import read_weights, write_safetensors

LONGEST = 32  # tokens of a sampled question, and of a sampled answer
BOOST = 6.0  # added to the logit of the rarest word of a question, when others are made up around it
WATCHED = 32  # rows on which drift is measured


class Guards:
    """rows: whole dialogues as token ids, the end-of-document token in front. curvature: of the model on them."""

    def __init__(self, rows: list[list[int]], curvature: Curvature, vocab_size: int):
        if not rows:
            raise ValueError("there is no guard text; give some text that the model should go on knowing")
        self.rows, self.curvature = rows, curvature
        holding = torch.zeros(vocab_size)
        for row in rows:
            holding[list(set(row))] += 1
        self.rarity = (len(rows) / (holding + 1)).log().clamp(min=0)  # of each token [V], in nats
        self._words = [set(row) for row in rows]

    @classmethod
    def of_model(cls, base: RWKV, form: Form, names: list[str], count: int = 512) -> "Guards":
        """`count` dialogues of one turn, and the curvature of the named matrices on them. Always the same.

        A model that does not end its questions is guarded by what it writes instead.
        """
        rng = torch.Generator().manual_seed(0)
        rows, prompts = [], []
        for ids in _questions(base, form, [[]] * count, rng):
            if text := _asked(form, ids):
                prompts.append(form.prompt(text))
            else:
                rows.append([form.tokenizer.eod, *form.opening(), *ids])
        replies = decode(base, form.tokenizer, prompts, form.end(), most=LONGEST, rng=rng) if prompts else []
        rows += [p + r for p, r in zip(prompts, replies, strict=True)]
        return cls(rows, Curvature.measure(base, names, rows), base.config.vocab_size)

    def save(self, path: Path) -> None:
        """Write to a file that `load` reads."""
        found = {"vocab_size": torch.tensor(len(self.rarity)), "lengths": torch.tensor([len(r) for r in self.rows])}
        found["rows"] = torch.tensor([token for row in self.rows for token in row])
        replace_file(path, lambda temporary: write_safetensors(found | self.curvature.tensors, temporary))

    @classmethod
    def load(cls, path: Path) -> "Guards":
        """Raises ValueError for a file that is not what `save` wrote."""
        found = read_weights(path)
        try:
            vocab_size, lengths, tokens = (found.pop(name).tolist() for name in ("vocab_size", "lengths", "rows"))
        except (KeyError, AttributeError):
            raise ValueError(f"{path} holds no guards; delete it, it is made anew") from None
        tokens = iter(tokens)
        return cls([list(islice(tokens, n)) for n in lengths], Curvature(found), vocab_size)

    def near(self, ids: list[int], most: int, gone: Iterable[list[int]] = ()) -> list[list[int]]:
        """Up to `most` rows that share most of their tokens with `ids`, nearest first, none with a reply in `gone`."""
        words, gone = set(ids), {tuple(reply) for reply in gone}
        shared = [len(words & w) / len(words | w) for w in self._words]
        places = sorted(range(len(shared)), key=lambda i: -shared[i])
        rows = (self.rows[i] for i in places if not any(self.rows[i][-len(g) :] == list(g) for g in gone if g))
        return list(islice(rows, most))

    def watched(self) -> list[list[int]]:
        return self.rows[:: max(1, len(self.rows) // WATCHED)][:WATCHED]

    def around(
        self, model: RWKV, form: Form, question: str, count: int, seed: int
    ) -> list[tuple[str, list[int], list[int]]]:
        """Up to `count` (question, its prompt, greedy reply) made up around one question, none twice.

        Half go on from a beginning of it (the same relation, of another subject), half are written with a liking for
        its rare words (the same subject).
        """
        if not count:
            return []
        ids = form.begun(question)
        rng, cut = torch.Generator().manual_seed(seed), random.Random(seed)
        begun = [ids[: cut.randint(0, max(0, len(ids) - 2))] for _ in range(count // 2)]
        boost = torch.zeros(count, len(self.rarity))
        rarity = self.rarity[ids]
        boost[len(begun) :, ids] = BOOST * rarity / rarity.max().clamp(min=1e-6)
        found = _questions(model, form, begun + [[]] * (count - len(begun)), rng, boost)
        asked = [text for text in dict.fromkeys(_asked(form, ids) for ids in found) if text]
        prompts = [form.prompt(text) for text in asked]
        return list(zip(asked, prompts, greedy(model, form, prompts), strict=True)) if prompts else []

    def subject(self, form: Form, question: str) -> str:
        """The rarest word of a question, or piece of a word: what it is about."""
        ids = form.tokenizer.encode(question)
        return form.tokenizer.decode([max(ids, key=lambda i: float(self.rarity[i]))]).strip()


def _questions(
    model: RWKV, form: Form, begun: list[list[int]], rng: torch.Generator, boost: Tensor | None = None
) -> list[list[int]]:
    """What a model asks, going on from these beginnings."""
    prompts = [[form.tokenizer.eod, *form.opening(), *ids] for ids in begun]
    found = decode(model, form.tokenizer, prompts, form.end("user"), None, LONGEST, rng, boost)
    return [[*ids, *more] for ids, more in zip(begun, found, strict=True)]


def _asked(form: Form, ids: list[int]) -> str:
    """The question, if it came to its end."""
    return form.shown(ids, "user") if form.end("user") in form.tokenizer.decode(ids) else ""
