"""What a question may be about: rare words that the model could not foresee."""

import re

import torch
from torch import Tensor

from rwkv_train.feedback.decode import Form
from rwkv_train.feedback.texts import log_probs
from rwkv_train.models.base import RWKV

FORESEEN = 1.0  # nats of surprise below which a word goes on with what the one before began
RARE = 0.6  # of the rarity of a subject's first word: what may go on with it
CANDIDATES = 3  # words of a question that are named


def subjects_of(base: RWKV, form: Form, rarity: Tensor, questions: list[str]) -> list[list[str]]:
    """Of each question up to CANDIDATES words that it may be about, the rarest and least foreseen first.

    rarity: of each token [V], in nats, as `rarity_of` gives it.
    """
    opening, begun = [form.tokenizer.eod, *form.opening()], [form.begun(q) for q in questions]
    foretold = log_probs(base, [[*opening, *ids[:-1]] for ids in begun])
    subjects = []
    for ids, here in zip(begun, foretold.split([len(opening) + len(ids) - 1 for ids in begun]), strict=True):
        surprise, rare = -here[len(opening) - 1 :][range(len(ids)), ids].cpu(), rarity[ids]
        words = []
        for begin in torch.minimum(surprise, rare).argsort(descending=True, stable=True)[:CANDIDATES].tolist():
            end = begin + 1
            while end < len(ids) and surprise[end] < FORESEEN and rare[end] > RARE * rare[begin]:
                end += 1
            words.append(re.sub(r"^\W+|\W+$", "", form.tokenizer.decode(ids[begin:end])))
        subjects.append([word for word in words if word])
    return subjects


def rarity_of(documents: list[list[int]], vocab_size: int) -> Tensor:
    """Of each token [V], in nats: minus the logarithm of the share of documents that hold it."""
    holding = torch.zeros(vocab_size)
    for ids in documents:
        holding[list(set(ids))] += 1
    return (len(documents) / (holding + 1)).log().clamp(min=0)
