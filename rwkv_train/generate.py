"""Sampling from a state: constant memory and time per token, however long the text before.

The short way to `rwkv_train.generation`, for one text or several.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from rwkv_train.generation.decoder import Decoder
from rwkv_train.generation.prefill import prefill
from rwkv_train.generation.reply import Reply
from rwkv_train.generation.sampling import Sampling, random_numbers
from rwkv_train.models.base import RWKV
from rwkv_train.models.state import State
from rwkv_train.tokenizer import Tokenizer

__all__ = ["Sampling", "generate_text", "generate_texts", "prefill", "random_numbers", "stream_tokens"]

LANES = 16  # texts written side by side, unless told otherwise


def stream_tokens(
    model: RWKV,
    logits: Tensor,
    state: State,
    sampling: Sampling,
    max_new_tokens: int,
    stop: frozenset[int] = frozenset(),
    rng: torch.Generator | None = None,
) -> Iterator[tuple[int, State]]:
    """Up to `max_new_tokens` tokens sampled from `logits` and what follows, each with the state after it.

    Ends before a token in `stop`. The penalties count the tokens of this call.
    """
    if max_new_tokens < 1:
        return
    decoder = Decoder(model)
    lane = decoder.go_on(logits, state, sampling, rng, stop, max_new_tokens)
    try:
        while len(decoder):
            for _, token, end, _ in decoder.step():
                if token is not None:
                    yield token, end or decoder.state(lane)
    finally:
        decoder.close()


def generate_text(
    model: RWKV,
    tokenizer: Tokenizer,
    prompt: str,
    sampling: Sampling,
    max_new_tokens: int,
    seed: int = 0,
    stop: tuple[str, ...] = (),
) -> Iterator[str]:
    """The continuation of a prompt, piece by piece, never breaking inside a character.

    It ends at a document's end, or before one of the texts `stop`, no part of which is given. As in training, a text
    starts after the end-of-document token.
    """
    for _, piece in generate_texts(model, tokenizer, [prompt], sampling, max_new_tokens, seed, stop=stop):
        if piece:
            yield piece


def generate_texts(
    model: RWKV,
    tokenizer: Tokenizer,
    prompts: list[str],
    sampling: Sampling,
    max_new_tokens: int,
    seed: int = 0,
    lanes: int = LANES,
    stop: tuple[str, ...] = (),
) -> Iterator[tuple[int, str | None]]:
    """The continuations of prompts, `lanes` of them side by side: (number of the prompt from 0, piece of its text).

    There is a piece for each token, sometimes ""; the last one of a text is followed by None. Each is what
    `generate_text` gives with that prompt alone, with the seed `seed` + its number.
    """
    if lanes < 1:
        raise ValueError(f"lanes must be at least 1, found {lanes}")
    if max_new_tokens < 1:
        return
    decoder, end_of_document = Decoder(model), frozenset([tokenizer.eod])
    waiting, texts = list(enumerate(prompts))[::-1], {}
    try:
        while waiting or len(decoder):
            while waiting and len(decoder) < lanes:
                number, prompt = waiting.pop()
                ids, rng = [tokenizer.eod, *tokenizer.encode(prompt)], random_numbers(seed + number)
                lane = decoder.add(ids, sampling, rng, end_of_document, max_new_tokens)
                texts[lane] = number, Reply(tokenizer, None, stop=stop)
            for lane, token, end, _ in decoder.step():
                number, text = texts[lane]
                if token is not None:
                    yield number, text.push(token, lambda: None)
                if end is not None or text.done:
                    decoder.drop(lane)
                    yield number, text.finish()
                    yield number, None
    finally:
        decoder.close()
