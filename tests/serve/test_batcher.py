"""Replies side by side: each is what it is alone, whoever comes and goes."""

import queue

import pytest
import torch
from feedback_toys import BYTES, small_model
from helpers import random_model

from rwkv_train.data.templates import Template
from rwkv_train.generation.prefill import prefill
from rwkv_train.generation.sampling import Sampling
from rwkv_train.serve.batcher import Batcher
from rwkv_train.serve.jobs import End, Full, Job, Piece
from rwkv_train.tokenizer import train_bpe

WORDS = train_bpe(["It was a bright cold day in April, and the clocks were striking thirteen."] * 9, 330)

PROMPTS = [[0, *BYTES.encode(text)] for text in ("User: hi\n\nAssistant:", "a", "User: " + "long " * 60, "xyz " * 9)]


class Client:
    """Collects what a job tells."""

    def __init__(self):
        self.events = queue.Queue()

    def job(self, model, prompt, state=None, sampling=Sampling(1.5), seeds=(1,), most=20, **more):  # noqa: B008
        return Job(model, prompt, state, sampling, list(seeds), most, self.events.put, **more)

    def ends(self, count=1):
        """The ends of so many choices, in their order."""
        found = []
        while len(found) < count:
            event = self.events.get(timeout=60)
            if isinstance(event, End):
                found.append(event)
        return sorted(found, key=lambda end: end.choice)


@pytest.fixture
def batcher():
    running = Batcher(BYTES, lanes=8, waiting=4)
    yield running
    running.close()


@pytest.fixture(scope="module", params=["rwkv4", "rwkv7"])
def model(request):
    return small_model(generation=request.param).double()


def alone(batcher, model, **asked):
    client = Client()
    batcher.submit(client.job(model, **asked))
    return client.ends()[0]


def test_a_reply_is_the_same_alone_and_in_company(batcher, model):
    asked = [{"prompt": prompt, "seeds": (n,), "most": 25 + n} for n, prompt in enumerate(PROMPTS)]
    expected = [alone(batcher, model, **one) for one in asked]
    clients = [Client() for _ in asked]
    for client, one in zip(clients, asked, strict=True):
        batcher.submit(client.job(model, **one))
    for client, end in zip(clients, expected, strict=True):
        found = client.ends()[0]
        assert found.ids == end.ids and found.shown == end.shown and found.reason == end.reason == "length"
        for ours, theirs in zip(found.state, end.state, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


def test_a_state_holds_what_was_shown(batcher, model):
    """Going on from it is going on from the whole text."""
    end = alone(batcher, model, prompt=PROMPTS[0], template=Template())
    expected = prefill(model, PROMPTS[0] + end.ids)[1]
    for ours, theirs in zip(end.state, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
    more = alone(batcher, model, prompt=[5, 6], state=end.state, seeds=(9,))
    whole = alone(batcher, model, prompt=[*PROMPTS[0], *end.ids, 5, 6], seeds=(9,))
    assert more.ids == whole.ids


@pytest.mark.parametrize("cut", range(1, 12))
def test_after_a_stop_inside_a_token_nothing_is_forgotten(cut):
    """A token of several letters, and a stop that begins inside it: the state is right, or nobody knows it."""
    tokenizer, model = WORDS, random_model(16, 2, WORDS.vocab_size, dtype=torch.float64, generation="rwkv7")
    batcher = Batcher(tokenizer, lanes=2)
    prompt = [tokenizer.eod, *tokenizer.encode("It was")]
    whole = alone(batcher, model, prompt=prompt, most=16)
    stop = whole.shown[cut : cut + 3]
    end = alone(batcher, model, prompt=prompt, most=16, stop=(stop,), template=Template())
    batcher.close()
    assert end.reason == "stop" and end.shown == whole.shown[: whole.shown.index(stop)].strip()
    assert end.state is not None or not end.ids
    if end.state is not None:
        expected = prefill(model, prompt + end.ids)[1]
        for ours, theirs in zip(end.state, expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("cut", range(1, 12))
def test_wherever_a_reply_is_cut_its_state_holds_just_that(batcher, cut):
    """Also where white space, half a character, or half of a stop is held back."""
    model = small_model(generation="rwkv7").double()
    whole = alone(batcher, model, prompt=PROMPTS[0], most=14)
    stop = (whole.shown[cut : cut + 2],) if cut < len(whole.shown) - 2 else ()
    end = alone(batcher, model, prompt=PROMPTS[0], most=14, stop=stop, template=Template())
    assert end.reason == ("stop" if stop else "length")
    if stop:
        assert end.shown == whole.shown[: whole.shown.index(stop[0])].strip()
    if end.state is not None:
        expected = prefill(model, PROMPTS[0] + end.ids)[1] if end.ids else prefill(model, PROMPTS[0])[1]
        for ours, theirs in zip(end.state, expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


def test_another_version_has_its_own_lanes(batcher):
    """Replies that began with a version end with it."""
    old, new = small_model(0, "rwkv7").double(), random_model(48, 2, 257, dtype=torch.float64, seed=5)
    asked = {"prompt": PROMPTS[0], "most": 30}
    expected = [alone(batcher, each, **asked).ids for each in (old, new)]
    first, second = Client(), Client()
    batcher.submit(first.job(old, **asked))
    assert isinstance(first.events.get(timeout=60), Piece)
    batcher.submit(second.job(new, **asked))
    assert [first.ends()[0].ids, second.ends()[0].ids] == expected and expected[0] != expected[1]


def test_a_job_that_is_dropped_frees_its_lanes(batcher, model):
    client = Client()
    job = client.job(model, PROMPTS[1], seeds=range(8), most=100_000)
    batcher.submit(job)
    waits = Client()
    batcher.submit(waits.job(model, PROMPTS[0]))
    assert isinstance(client.events.get(timeout=60), Piece)
    batcher.cancel(job)
    assert {end.reason for end in client.ends(8)} == {"cancelled"}
    assert waits.ends()[0].reason == "length"
    batcher.cancel(job)  # again is nothing
    assert alone(batcher, model, prompt=PROMPTS[1]).reason == "length"


def test_what_was_shown_of_a_dropped_reply_is_its_state(batcher, model):
    client = Client()
    job = client.job(model, PROMPTS[0], most=100_000, template=Template())
    batcher.submit(job)
    for _ in range(5):
        client.events.get(timeout=60)
    batcher.cancel(job)
    end = client.ends()[0]
    expected = prefill(model, PROMPTS[0] + end.ids)[1]
    for ours, theirs in zip(end.state, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


def test_too_many_are_refused_and_time_ends(batcher, model):
    client, late = Client(), Client()
    long = [client.job(model, PROMPTS[1], seeds=range(4), most=1_000_000) for _ in range(2)]
    for job in long:
        batcher.submit(job)
    batcher.submit(late.job(model, PROMPTS[1], seconds=0))
    with pytest.raises(Full):
        batcher.submit(client.job(model, PROMPTS[1], seeds=range(4)))
    with pytest.raises(ValueError, match="8 replies side by side"):
        batcher.submit(client.job(model, PROMPTS[1], seeds=range(9)))
    assert late.ends()[0] == End(0, "time", "", "", [], None, False, 0)
    for job in long:
        batcher.cancel(job)
    client.ends(8)


def test_a_model_that_fails_ends_its_own_replies(batcher, model):
    broken = small_model(3, "rwkv7").double()
    with torch.no_grad():
        broken.head.weight[0, 0] = torch.nan
    good, bad = Client(), Client()
    batcher.submit(good.job(model, PROMPTS[0], most=30))
    batcher.submit(bad.job(broken, PROMPTS[0]))
    end = bad.ends()[0]
    assert end.reason == "error" and "finite" in end.error and good.ends()[0].reason == "length"


class Fails:
    """Allows all, and cannot be followed past its third token."""

    def __init__(self):
        self.left = 3

    def mask(self):
        return torch.ones(257, dtype=torch.bool)

    def accept(self, token):
        self.left -= 1
        if not self.left:
            raise ValueError("too deep")


def test_a_constraint_that_cannot_be_followed_ends_its_own_reply(batcher, model):
    good, bad = Client(), Client()
    expected = alone(batcher, model, prompt=PROMPTS[0], most=30)
    batcher.submit(good.job(model, PROMPTS[0], most=30))
    batcher.submit(bad.job(model, PROMPTS[0], most=30, constraint=Fails))
    end = bad.ends()[0]
    assert (end.reason, end.error, end.count) == ("error", "too deep", 3) and good.ends()[0].ids == expected.ids


def test_a_mistake_ends_what_is_written_and_the_batcher_goes_on(batcher, model, monkeypatch, capsys):
    client, broken = Client(), Client()
    batcher.submit(client.job(model, PROMPTS[0], most=1_000_000))
    assert isinstance(client.events.get(timeout=60), Piece)

    def fails():
        raise RuntimeError("as it happens")

    batcher.submit(broken.job(model, PROMPTS[0], constraint=fails))
    assert client.ends()[0].error == "RuntimeError: as it happens" and "as it happens" in broken.ends()[0].error
    assert alone(batcher, model, prompt=PROMPTS[0]).reason == "length"
    assert "as it happens" in capsys.readouterr().err


def test_choices_share_one_prompt(batcher, model):
    client = Client()
    read = batcher.load.read
    batcher.submit(client.job(model, PROMPTS[0], seeds=(3, 4, 5)))
    together = client.ends(3)
    assert batcher.load.read == read + len(PROMPTS[0])
    assert [end.ids for end in together] == [
        alone(batcher, model, prompt=PROMPTS[0], seeds=(n,)).ids for n in (3, 4, 5)
    ]
