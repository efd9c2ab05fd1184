"""The rehearsal set: what a model says by itself, which must not change.

Dialogues that it holds with itself cover what it knows, in the proportions in which it knows it, and need no data set:
pseudo-rehearsal (Robins 1995). They are made once, stand for everything, and are a cache of the model: whenever the
file is of no use they are made anew.
"""

import json
import sys
import weakref
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from rwkv_train.checkpoints.weightfile import read_weights, write_safetensors
from rwkv_train.feedback.background import Watch
from rwkv_train.feedback.curvature import Curvature
from rwkv_train.feedback.decode import Form, decode, lanes_at_once, sampled
from rwkv_train.feedback.texts import divergence, is_large, log_probs
from rwkv_train.feedback.trainable import Trainable, curved_names
from rwkv_train.feedback.words import Vocabulary, Word
from rwkv_train.files import replace_file
from rwkv_train.models.base import RWKV
from rwkv_train.models.finite import finite

VERSION = 3  # of the file
LONGEST = 32  # tokens of a sampled question, and of a sampled answer
LATER = 4  # of so many dialogues one goes on,
TURNS = 3  # for so many turns in all
SAMPLES, SAMPLE = 64, 150  # free-running samples, and the tokens of each
TEMPERATURE = 1.5  # of these: a stranger's talk is not what a model would say by itself
WATCHED = 32  # dialogues on which drift is measured


class RehearsalSet:
    """What a model says, and how it says it.

    rows: whole dialogues as token ids, the end-of-document token in front. asked: the questions among them
    that came to an end. free_running: what the model writes when it is made to go on and on,
    likewise; it may also stand before a question, as a random prefix. curvature: of the upper matrices on all of them.
    """

    def __init__(
        self,
        base: RWKV,
        form: Form,
        rows: list[list[int]],
        asked: list[str],
        free_running: list[list[int]],
        curvature: Curvature,
    ):
        if not rows:
            raise ValueError("the rehearsal set is empty; give some text that the model should go on knowing")
        self.base, self.form, self.curvature = base, form, curvature
        self.rows, self.asked, self.free_running = rows, asked, free_running
        self._log_probs: list[tuple[weakref.ref[RWKV], Tensor]] = []  # by the base, and by the last two models

    @classmethod
    def of_model(
        cls,
        base: RWKV,
        form: Form,
        count: int = 512,
        trainable: Trainable = "upper",
        layers: int = 0,
        watch: Watch = lambda what, items: items,
    ) -> "RehearsalSet":
        """`count` dialogues of one turn, and the curvature of the matrices that are trained. Always the same.

        A question that comes to no end is cut: a model that knows no dialogues has to keep what it says there, too.
        watch: shows which of its parts is being made.
        """
        parts = iter(watch("getting to know the model", range(2 * TURNS + 2)))
        next(parts)
        rng = torch.Generator().manual_seed(0)
        rows, questions, dialogues = [], [], []
        for row in _with_a_message(base, form, "user", [[form.tokenizer.eod]] * count, rng):
            text = form.shown(row[1 + len(form.opening()) :], "user")
            if text:
                questions.append(text)
            else:
                rows.append(row)
        next(parts)
        if questions:
            prompts, end = list(map(form.prompt, questions)), form.template.turn_end()
            replies = decode(base, form.tokenizer, prompts, end, max_new_tokens=LONGEST, rng=rng)
            dialogues = [prompt + reply for prompt, reply in zip(prompts, replies, strict=True)]
        rows += dialogues
        # Only for the curvature: what the model says late in a dialogue has to stay as well.
        longer = [row for row in dialogues[::LATER] if _ended(form, "assistant", row)]
        for role in ["user", "assistant"] * (TURNS - 1) if longer else []:
            next(parts)
            grown = _with_a_message(base, form, role, longer, rng)
            longer = [row for row in grown if _ended(form, role, row)] or longer
        next(parts)
        samples = free_running(base, form, rng)
        next(parts)
        curvature = Curvature.measure(base, *curved_names(base, trainable, layers), rows + longer + samples)
        for _ in parts:  # there are fewer of a model that writes no dialogues
            pass
        return cls(base, form, rows, list(dict.fromkeys(questions)), samples, curvature)

    @classmethod
    def kept(
        cls,
        path: Path,
        base: RWKV,
        form: Form,
        trainable: Trainable = "upper",
        layers: int = 0,
        watch: Watch = lambda what, items: items,
    ) -> "RehearsalSet":
        """The one in a file; made and written there if there is none, and told if there is one of no use."""
        if path.is_file():
            try:
                return cls.load(path, base, form)
            except ValueError as error:
                print(f"{path} is made anew: {error}. A replay may give other weights than before", file=sys.stderr)
        cls.of_model(base, form, trainable=trainable, layers=layers, watch=watch).save(path)
        return cls.load(path, base, form)

    def save(self, path: Path) -> None:
        """Write to a file that `load` reads."""
        content = {"version": VERSION, "rows": self.rows, "asked": self.asked, "talks": self.free_running}
        content["template"] = self.form.template.as_dict()
        text = torch.tensor(list(json.dumps(content).encode()), dtype=torch.uint8)
        tensors = {"text": text, **self.curvature.tensors}
        replace_file(path, lambda temporary: write_safetensors(tensors, temporary))

    @classmethod
    def load(cls, path: Path, base: RWKV, form: Form) -> "RehearsalSet":
        """Raises ValueError for a file that is not what `save` wrote."""
        tensors = read_weights(path)
        content = json.loads(bytes(tensors.pop("text").tolist())) if "text" in tensors else {}
        if content.get("version") != VERSION:
            raise ValueError("it holds no rehearsal set of this version")
        if content.get("template", form.template.as_before().as_dict()) != form.template.as_dict():
            raise ValueError("its chats are written with another template")
        curvature = Curvature({name: tensor.to(base.device) for name, tensor in tensors.items()})
        return cls(base, form, content["rows"], content["asked"], content["talks"], curvature)

    def near(self, ids: list[int], count: int, seed: int, replaced: Iterable[list[int]] = ()) -> list[list[int]]:
        """Up to `count` rows: a third of them share most of their tokens with `ids`, the others are drawn by seed.

        None has a reply in `replaced`.
        """
        replaced = {tuple(reply) for reply in replaced if reply}
        lengths = {len(reply) for reply in replaced}
        order = nearest(ids, self._tokens_of_rows)
        order = [i for i in order if not any(tuple(self.rows[i][-n:]) in replaced for n in lengths)]
        near, others = order[: -(-count // 3)], order[-(-count // 3) :]
        rng = torch.Generator().manual_seed(seed)
        drawn = torch.randperm(len(others), generator=rng)[: count - len(near)].tolist()
        return [self.rows[i] for i in near + [others[j] for j in drawn]]

    def drift(self, before: RWKV, after: RWKV) -> float:
        """KL of one model from another on some of the rows, in nats a token."""
        models = (before, after) if is_large(self.base) else (self.base, before, after)
        known = {id(model()): it for model, it in self._log_probs if model() is not None}
        for model in (before, after):
            if id(model) not in known:
                known[id(model)] = self.log_probs(model)
        self._log_probs = [(weakref.ref(m), known[id(m)]) for m in models if id(m) in known]
        return float(divergence(known[id(before)], known[id(after)]))

    def log_probs(self, model: RWKV) -> Tensor:
        """Log probabilities [N,V] by which drift is measured: after each token of some of the rows."""
        return log_probs(model, self.rows[:: max(1, len(self.rows) // WATCHED)][:WATCHED])

    @cached_property
    def tokens_of_asked(self) -> list[set[int]]:
        """The tokens of each question that was asked."""
        return [set(self.form.begun(text)) for text in self.asked]

    @cached_property
    def content_of_asked(self) -> list[list[Word]]:
        """The content words of each."""
        return list(map(self.vocabulary.content, self.asked))

    @cached_property
    def vocabulary(self) -> Vocabulary:
        """The words of the dialogues."""
        texts = [self.form.tokenizer.decode(row[1:]) for row in self.rows]
        return Vocabulary(texts, self.base, self.form.tokenizer)

    @cached_property
    def _tokens_of_rows(self) -> list[set[int]]:
        return [set(row) for row in self.rows]


def _with_a_message(base: RWKV, form: Form, role: str, rows: list[list[int]], rng: torch.Generator) -> list[list[int]]:
    """Dialogues with one more sampled message of a role."""
    begun = [row + form.opening(role) for row in rows]
    written = decode(base, form.tokenizer, begun, form.template.turn_end(role), max_new_tokens=LONGEST, rng=rng)
    return [row + ids for row, ids in zip(begun, written, strict=True)]


@torch.no_grad()
def free_running(base: RWKV, form: Form, rng: torch.Generator) -> list[list[int]]:
    """SAMPLES texts of SAMPLE tokens that begin as a user's message and may not end."""
    opening, texts = [form.tokenizer.eod, *form.opening()], []
    for tokens in torch.tensor([opening] * SAMPLES).split(lanes_at_once(base)):
        state, written = None, [tokens]
        for _ in range(SAMPLE - len(opening)):
            x, state = base.hidden(tokens.to(base.device), state)
            logits = finite(base.head(x[:, -1]), base).float() / TEMPERATURE
            logits[:, form.tokenizer.eod] = -torch.inf
            tokens = sampled(logits, rng)[:, None]
            written.append(tokens.cpu())
        texts += torch.cat(written, 1).tolist()
    return texts


def _ended(form: Form, role: str, row: list[int]) -> bool:
    return form.tokenizer.decode(row[-8:]).endswith(form.template.end(role))


def nearest(ids: list[int], others: list[set[int]]) -> list[int]:
    """Indices of texts by the share of their tokens that is also in `ids`, and the other way round; greatest first."""
    words = set(ids)
    shared = [len(words & other) / len(words | other) for other in others]
    return sorted(range(len(others)), key=lambda i: -shared[i])
