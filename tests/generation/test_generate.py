"""The short way: text of one prompt and of several."""

from dataclasses import replace

import pytest
import torch
from helpers import random_model

from rwkv_train.generate import Sampling, generate_text, generate_texts, prefill, random_numbers, stream_tokens
from rwkv_train.tokenizer import load_tokenizer

BYTES = load_tokenizer("bytes")
GREEDY = Sampling(temperature=0)


def test_greedy_generation_is_the_argmax_of_whole_forwards(generation):
    model = random_model(vocab_size=257, generation=generation)
    text = "".join(generate_text(model, BYTES, "hi", GREEDY, 12))
    ids = [0, *BYTES.encode("hi")]
    for _ in range(12):
        ids.append(int(model(torch.tensor([ids]))[0][0, -1].argmax()))
        if ids[-1] == 0:
            break
    assert text == BYTES.decode(ids[3:])


def test_prefill_in_pieces_is_prefill_at_once(monkeypatch, generation):
    model = random_model(dtype=torch.float64, generation=generation)
    ids = list(range(20))
    whole = prefill(model, ids)
    monkeypatch.setattr("rwkv_train.generation.prefill.PREFILL", 3)
    parts = prefill(model, ids)
    for a, b in zip((whole[0], *whole[1]), (parts[0], *parts[1]), strict=True):
        assert torch.allclose(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("lanes", [1, 2, 9])
def test_several_prompts_are_each_written_as_alone(generation, lanes):
    model = random_model(vocab_size=257, dtype=torch.float64, generation=generation)
    prompts, sampling = ["hi", "", "a longer one, 你好", "hi"], Sampling(1.1, 0.95)
    texts, ended = [""] * 4, []
    for number, piece in generate_texts(model, BYTES, prompts, sampling, 15, seed=3, lanes=lanes):
        assert number not in ended
        texts[number] += piece or ""
        ended += [number] if piece is None else []
    assert sorted(ended) == [0, 1, 2, 3]
    alone = ["".join(generate_text(model, BYTES, p, sampling, 15, seed=3 + i)) for i, p in enumerate(prompts)]
    assert texts == alone and texts[0] != texts[3]


def test_texts_end_before_their_stops():
    model, prompts = random_model(vocab_size=257, dtype=torch.float64), ["hi", "", "hi"]
    whole = ["".join(generate_text(model, BYTES, p, Sampling(), 40, seed=i)) for i, p in enumerate(prompts)]
    stop = (whole[0][9:11], whole[1][3], "never so long a text")
    found = ["", "", ""]
    for number, piece in generate_texts(model, BYTES, prompts, Sampling(), 40, lanes=2, stop=stop):
        found[number] += piece or ""
    assert found == [text[: min(text.find(end) for end in stop if end in text)] for text in whole]


def test_a_stream_takes_one_number_a_token_and_stops():
    model = random_model(dtype=torch.float64)
    start, rng = prefill(model, [0]), random_numbers(5)
    whole = [t for t, _ in stream_tokens(model, *start, Sampling(), 20, rng=rng)]
    after = torch.rand((), generator=rng, dtype=torch.float64)
    assert after == torch.rand(21, generator=random_numbers(5), dtype=torch.float64)[-1]
    stop = frozenset([whole[7]])
    assert [t for t, _ in stream_tokens(model, *start, Sampling(), 20, stop, random_numbers(5))] == whole[
        : whole.index(whole[7])
    ]
    assert list(stream_tokens(model, *start, Sampling(), 0)) == []


def test_penalties_count_the_tokens_of_the_reply():
    model = random_model(n_embd=8, vocab_size=257, dtype=torch.float64)
    start = prefill(model, [0])
    never_again = [t for t, _ in stream_tokens(model, *start, replace(GREEDY, presence_penalty=1e4), 60)]
    assert len(set(never_again)) == 60
    assert len({t for t, _ in stream_tokens(model, *start, GREEDY, 60)}) < 60
