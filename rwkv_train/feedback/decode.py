"""How questions and answers are written for a model, and decoding of many replies at once."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import groupby

import torch
from torch import Tensor

from rwkv_train.data.templates import Template, TurnEnd, split_thought
from rwkv_train.generation.sampling import argmax, pick
from rwkv_train.models.base import RWKV
from rwkv_train.models.finite import finite
from rwkv_train.models.state import State
from rwkv_train.tokenizer import Tokenizer

MAX_NEW_TOKENS = 48  # of a reply, unless told otherwise
STATES = 1 << 28  # bytes of the states of lanes that are decoded side by side
MAX_REPLY = 200  # tokens of a reply that is decoded to see what was learnt, if what is taught is not longer


@dataclass(frozen=True)
class Form:
    """A tokenizer and a template: everything about a chat that is not the model."""

    tokenizer: Tokenizer
    template: Template = field(default_factory=Template)

    def prompt(self, question: str) -> list[int]:
        """A document that begins with a question, up to where the reply begins."""
        return [self.tokenizer.eod, *self.turn(question)]

    def turn(self, question: str) -> list[int]:
        """A question in the middle of a document, up to where the reply begins."""
        pieces = self.template.prompt([{"role": "user", "content": question}])
        return [i for piece in pieces for i in self.tokenizer.encode(piece)]

    def dialogue(self, messages: list[dict]) -> list[int]:
        """Messages in the middle of a document. Raises ValueError for what is no message of the template's."""
        return [i for piece in self.template.history(messages) for i in self.tokenizer.encode(piece)]

    def longest(self, answer: str | None) -> int:
        """Tokens of a reply that are decoded to see whether it is an answer that was taught."""
        return max(MAX_REPLY, len(self.answer(answer)) if answer else 0)

    def answer(self, text: str) -> list[int]:
        """A reply and its end. ValueError if the template trains none of it."""
        if text not in self._answers:  # every correction asks for those of all earlier ones
            said = split_thought(text)[1] if self.template.thinks else text
            *_, (written, trained) = self.template.segments([{"role": "assistant", "content": said}])
            ids = self.tokenizer.encode(written)
            if not ids or not trained:
                raise ValueError("the answer has no tokens that can be trained; see the template's train_roles")
            self._answers[text] = tuple(ids)
        return list(self._answers[text])

    def taught(self, text: str) -> list[int]:
        """A reply and what tells its end, as it is trained: where that takes a role's name, with the user's."""
        return [*self.answer(text), *(self.opening() if self.template.turn_end().before else ())]

    @cached_property
    def _answers(self) -> dict[str, tuple[int, ...]]:
        return {}

    def shown(self, ids: list[int], role: str = "assistant") -> str:
        """What a person sees of a decoded message."""
        text = cut(self.tokenizer.decode(ids), self.template.turn_end(role), keep=False)
        if role == "assistant" and self.template.thinks:
            text = split_thought(self.template.opening + text)[1]
        return text.strip()

    def opening(self, role: str = "user") -> list[int]:
        """What comes before a message of a role ("User:"), where a sampled one begins."""
        return self.tokenizer.encode(self.template.roles[role].split("{content}")[0].rstrip())

    def begun(self, text: str, role: str = "user") -> list[int]:
        """A message's beginning, as it goes on from its opening."""
        before = self.template.roles[role].split("{content}")[0]
        return self.tokenizer.encode(before[len(before.rstrip()) :] + text)


def greedy(
    model: RWKV, form: Form, prompts: list[list[int]], state: State | None = None, max_new_tokens: int = MAX_NEW_TOKENS
) -> list[list[int]]:
    """Ids of the greedy reply to each prompt with its end; None for a state is the beginning of a document."""
    return decode(model, form.tokenizer, prompts, form.template.turn_end(), state, max_new_tokens)


def answer_to(model: RWKV, form: Form, question: str, context: Sequence[int] = (), taught: str | None = None) -> str:
    """The greedy reply to a question on its own, as a person sees it, of at most MAX_REPLY tokens.

    context: ids of a dialogue before it. taught: what it should be, of which all is decoded.
    """
    prompt = [form.tokenizer.eod, *context, *form.turn(question)]
    return form.shown(greedy(model, form, [prompt], max_new_tokens=form.longest(taught))[0])


@torch.no_grad()
def decode(
    model: RWKV,
    tokenizer: Tokenizer,
    prompts: list[list[int]],
    end: TurnEnd,
    state: State | None = None,
    max_new_tokens: int = MAX_NEW_TOKENS,
    rng: torch.Generator | None = None,
    temperature: float = 1.0,
) -> list[list[int]]:
    """What a model writes after each prompt, through its end, before the document's, at most max_new_tokens.

    prompts: token ids, at least one each. state: of one lane, from which every prompt goes on; None is empty.
    rng: samples at a temperature; None takes the likeliest.

    Raises NotFinite, a ValueError, if the model gives no finite number.
    """
    written: list[list[int]] = [[] for _ in prompts]
    newest = max(map(len, end.marks), default=0) + 8  # tokens, among which an end is that the last one brings
    if state is None and model.initial_wkv is None:
        groups = [list(range(len(prompts)))]  # all at once: a reset makes padding in front of a document nothing
    else:
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        groups = [list(rows) for _, rows in groupby(order, key=lambda i: len(prompts[i]))]
    together = lanes_at_once(model)
    groups = [rows[i : i + together] for rows in groups for i in range(0, len(rows), together)]
    for rows in groups:
        width = max(len(prompts[r]) for r in rows)
        tokens = torch.tensor([[tokenizer.eod] * (width - len(prompts[r])) + prompts[r] for r in rows])
        begins = torch.tensor([[width - len(prompts[r])] for r in rows])
        lanes = None if state is None else state.select([0] * len(rows))
        reset = None if len({len(prompts[r]) for r in rows}) == 1 else torch.arange(width) == begins
        for _ in range(max_new_tokens):
            x, lanes = model.hidden(tokens.to(model.device), lanes, None if reset is None else reset.to(model.device))
            logits, reset = finite(model.head(x[:, -1]), model), None
            best = argmax(logits) if rng is None else sampled(logits / temperature, rng)
            going = []
            for place, (r, token) in enumerate(zip(rows, best.tolist(), strict=True)):
                if token == tokenizer.eod:
                    continue
                written[r].append(token)
                if end.find(tokenizer.decode(written[r][-newest:])) < 0:
                    going.append(place)
                elif end.before:
                    written[r] = without_name(tokenizer, written[r], end)
            if not going:
                break
            rows, lanes, tokens = [rows[place] for place in going], lanes.select(going), best[going][:, None]
    return written


def cut(text: str, end: TurnEnd, keep: bool) -> str:
    """A message up to its end; keep: with the text of that."""
    at = end.find(text)
    if at < 0:  # the last message of a document has nothing after it
        return text if keep else text.removesuffix(end.text)
    return text[: at + len(end.text) * keep]


def without_name(tokenizer: Tokenizer, ids: list[int], end: TurnEnd) -> list[int]:
    """A decoded message without the role's name that told its end."""
    text = cut(tokenizer.decode(ids), end, keep=True)
    for count in range(len(ids), 0, -1):
        if tokenizer.decode(ids[:count]) == text:
            return ids[:count]
    return tokenizer.encode(text)


def lanes_at_once(model: RWKV) -> int:
    """How many texts of a model are decoded side by side."""
    return max(1, STATES // sum(part.nbytes for part in model.zero_state(1)))


def sampled(logits: Tensor, rng: torch.Generator) -> Tensor:
    """A token [N] of each lane by its logits [N,V]; a number of `rng` for each."""
    uniform = torch.rand(len(logits), generator=rng, dtype=torch.float64)
    return pick(logits.float().softmax(-1), uniform.to(logits.device))
