"""Dialogues that say what a test wants."""

from itertools import islice

import pytest

from rwkv_train.generate import Sampling, prefill, stream_tokens


@pytest.fixture(autouse=True)
def scripts(monkeypatch):
    """A dialogue with an iterator in place of its sampling says the tokens that come from it."""

    def stream(model, logits, state, sampling, max_new_tokens, stop, rng):
        if isinstance(sampling, Sampling):
            yield from stream_tokens(model, logits, state, sampling, max_new_tokens, stop, rng)
            return
        for token in islice(sampling, max_new_tokens):
            if token in stop:
                return
            state = prefill(model, [token], state)[1]
            yield token, state

    monkeypatch.setattr("rwkv_train.chat.dialogue.stream_tokens", stream)
