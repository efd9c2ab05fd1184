"""Texts side by side: each is what it is alone, whoever joins and leaves, called or replayed."""

import pytest
import torch
from helpers import assert_close_rel, random_model

from rwkv_train.generation import lanes
from rwkv_train.generation.decoder import Decoder
from rwkv_train.generation.prefill import prefill, prefill_all
from rwkv_train.generation.sampling import Sampling, random_numbers
from rwkv_train.models.finite import NotFinite

PROMPTS = [[0, 3, 7], [0], [0, 5, 9, 2, 2, 8, 1], [0, 4, 7], [0, *range(1, 20)]]
GREEDY = [Sampling(0)] * 5
MIXED = [
    Sampling(),
    Sampling(0),
    Sampling(0.8, top_p=0.7),
    Sampling(2, top_k=4, presence_penalty=0.5),
    Sampling(1, 0.9, 20, 0.3, -0.2, 0.7),
]
STOP, MOST = frozenset([0, 1]), [12, 3, 30, 1, 9]


@pytest.fixture(params=["called", "replayed"])
def how(request, monkeypatch):
    """Steps that are called, and steps over tensors that stay, as a GPU records them: there a replay is a call."""
    if request.param == "replayed":
        monkeypatch.setattr(lanes, "recorder", lambda device: lambda call: call)
    return request.param


def models(generation, dtype=torch.float64, **more):
    return random_model(dtype=dtype, generation=generation, **more)


def decoded(model, which, samplings, seeds=(0, 1, 2, 3, 4)):
    """{number: (tokens, end state)} of some of the prompts, side by side."""
    decoder = Decoder(model)
    numbers = {decoder.add(PROMPTS[i], samplings[i], random_numbers(seeds[i]), STOP, MOST[i]): i for i in which}
    tokens, ends = {i: [] for i in which}, {}
    while len(decoder):
        for lane, token, end, _ in decoder.step():
            tokens[numbers[lane]] += [] if token is None else [token]
            if end:
                ends[numbers[lane]] = end
    return {i: (tokens[i], ends[i]) for i in which}


@pytest.mark.parametrize("samplings", [GREEDY, MIXED], ids=["greedy", "mixed"])
def test_texts_side_by_side_are_each_what_it_is_alone(how, generation, samplings):
    model = models(generation)
    together = decoded(model, range(5), samplings)
    for i in range(5):
        tokens, end = decoded(model, [i], samplings)[i]
        assert together[i][0] == tokens and len(tokens) <= MOST[i] and not STOP & set(tokens)
        read = prefill(model, PROMPTS[i] + tokens)[1]
        for ours, alone, whole in zip(together[i][1], end, read, strict=True):
            assert_close_rel(ours, alone, 1e-9)
            assert_close_rel(ours, whole, 1e-9)
    assert len({tuple(tokens) for tokens, _ in together.values()}) > 1


def test_greedy_texts_are_the_argmax_of_whole_forwards(how, generation):
    model = models(generation)
    for i, (tokens, _) in decoded(model, range(5), GREEDY).items():
        ids = list(PROMPTS[i])
        while len(ids) < len(PROMPTS[i]) + MOST[i]:
            token = int(model(torch.tensor([ids]))[0][0, -1].argmax())
            if token in STOP:
                break
            ids.append(token)
        assert ids == PROMPTS[i] + tokens


def test_replayed_is_called(monkeypatch, generation):
    model = models(generation, torch.float32)
    called = decoded(model, range(5), MIXED)
    monkeypatch.setattr(lanes, "recorder", lambda device: lambda call: call)
    replayed = decoded(model, range(5), MIXED)
    assert {i: tokens for i, (tokens, _) in called.items()} == {i: tokens for i, (tokens, _) in replayed.items()}


def test_texts_join_and_leave_between_steps(how, generation):
    model, written = models(generation), {}

    def step():
        for lane, token, *_ in decoder.step():
            written.setdefault(lane, []).append(token)

    decoder = Decoder(model)
    a = decoder.add([0, 3], Sampling(1), random_numbers(1), max_new_tokens=9)
    step()
    b = decoder.add([0, 4], Sampling(0.9, 0.8), random_numbers(2), max_new_tokens=5)
    c = decoder.go_on(*prefill(model, [0, 4, 4]), Sampling(0, presence_penalty=2.0), max_new_tokens=6)
    step()
    step()
    assert len(decoder) == 3
    decoder.drop(a)
    step()
    d = decoder.add([0, 5], Sampling(1), random_numbers(4), max_new_tokens=4)
    while len(decoder):
        step()
    decoder.drop(a)
    for lane, prompt, sampling, seed, count in (
        (a, [0, 3], Sampling(1), 1, 3),
        (b, [0, 4], Sampling(0.9, 0.8), 2, 5),
        (c, [0, 4, 4], Sampling(0, presence_penalty=2.0), 0, 6),
        (d, [0, 5], Sampling(1), 4, 4),
    ):
        alone = Decoder(model)
        alone.add(prompt, sampling, random_numbers(seed), max_new_tokens=count)
        assert written[lane] == [token for _ in range(count) for _, token, *_ in alone.step()]


def test_a_state_that_was_given_out_stays_as_it_is(how):
    model = models("rwkv7")
    decoder = Decoder(model)
    a, _ = (decoder.add(p, Sampling(0), max_new_tokens=6) for p in PROMPTS[:2])
    ids = list(PROMPTS[0])
    ids += [token for lane, token, *_ in decoder.step() if lane == a]
    state = decoder.state(a)
    decoder.step()
    for ours, read in zip(state, prefill(model, ids)[1], strict=True):
        assert_close_rel(ours, read, 1e-9)
    decoder.close()
    assert len(decoder) == 0 and decoder.step() == []


def test_two_decoders_of_a_model_do_not_meet(how):
    """They take turns, so a recording belongs to one of them at a time; afterwards the next one gets it."""
    model = models("rwkv4")
    alone = [decoded(model, [i], MIXED)[i][0] for i in (0, 2)]
    one, other = Decoder(model), Decoder(model)
    for decoder, i in ((one, 0), (other, 2)):
        decoder.add(PROMPTS[i], MIXED[i], random_numbers(i), STOP, MOST[i])
    found = [[], []]
    while len(one) or len(other):
        for tokens, decoder in zip(found, (one, other), strict=True):
            tokens += [token for _, token, *_ in decoder.step() if token is not None]
    assert found == alone


def test_recordings_are_kept_for_the_weights_they_read(monkeypatch):
    made = []

    def record(call):
        made.append(call)
        return call

    monkeypatch.setattr(lanes, "recorder", lambda device: record)
    model = models("rwkv4", torch.float32)
    for count, recordings in ((1, 1), (1, 1), (3, 4), (4, 4), (2, 4)):  # of three: as 4, and as 2 and 1 when some ended
        decoder = Decoder(model)
        for i in range(count):
            decoder.add([0], Sampling(0), max_new_tokens=2 + i)
        while len(decoder):
            decoder.step()
        assert len(made) <= recordings
    decoder, before = Decoder(model), len(made)
    decoder.add([0], Sampling(0), max_new_tokens=2)
    decoder.step()
    model.double()
    decoder.close()  # what it gives back reads the old weights
    decoded(model, [0], GREEDY)
    assert len(made) == before + 1


def test_where_nothing_can_be_recorded_it_is_said_and_called(monkeypatch, capsys):
    def record(call):
        raise RuntimeError("operation not permitted\nwhile capturing")

    model = models("rwkv4")
    called = decoded(model, range(5), MIXED)
    monkeypatch.setattr(lanes, "recorder", lambda device: record)
    found = decoded(model, range(5), MIXED)
    assert [t for t, _ in found.values()] == [t for t, _ in called.values()]
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "operation not permitted while capturing" in err


def test_prompts_of_any_lengths_are_read_as_each_alone(monkeypatch, generation):
    model = models(generation)
    carried = [None, prefill(model, [0, 6])[1], None, None, prefill(model, [7])[1]]
    alone = [prefill(model, p, s) for p, s in zip(PROMPTS, carried, strict=True)]
    for at_once in (1024, 6):
        monkeypatch.setattr("rwkv_train.generation.prefill.PREFILL", at_once)
        logits, states = prefill_all(model, PROMPTS, carried)
        for i, (expected, state) in enumerate(alone):
            assert_close_rel(logits[i], expected, 1e-9)
            for ours, read in zip(states.select(i), state, strict=True):
                assert_close_rel(ours, read, 1e-9)


def test_a_trained_beginning_is_where_texts_begin(how):
    model = models("rwkv7")
    begin = prefill(model, [9, 9])[1]
    model.initial_shift, model.initial_wkv = map(torch.nn.Parameter, begin)
    found = decoded(model, range(5), GREEDY)
    for i in range(5):
        assert found[i][0] == decoded(model, [i], GREEDY)[i][0]


def test_what_is_no_number_is_said(how):
    model = models("rwkv4")
    decoder = Decoder(model)
    decoder.add([0], Sampling(0))
    decoder.add([0, 1], Sampling(0))
    decoder.step()
    with torch.no_grad():
        model.head.weight[3, 3] = float("nan")
    with pytest.raises(NotFinite, match=r"head\.weight"):
        decoder.step()


def test_wrong_arguments_are_refused():
    decoder = Decoder(models("rwkv4"))
    with pytest.raises(ValueError, match="at least one token"):
        decoder.add([], Sampling())
    with pytest.raises(ValueError, match=r"max_new_tokens .* 0"):
        decoder.add([0], Sampling(), max_new_tokens=0)


class Cycle:
    """Allows 3, then 4, then 3 ... and after `length` tokens the stop alone."""

    def __init__(self, vocab_size, length):
        self.vocab_size, self.left, self.accepted = vocab_size, length, []

    def mask(self):
        allowed = 3 + len(self.accepted) % 2 if self.left else 0
        return torch.arange(self.vocab_size) == allowed

    def accept(self, token):
        self.accepted.append(token)
        self.left -= 1


def test_a_prompt_in_pieces_is_the_prompt(generation):
    """Others go on being written meanwhile, and a short prompt does not wait for a long one."""
    model = models(generation)
    whole = decoded(model, range(5), MIXED)
    decoder, written = Decoder(model, piece=2), {}
    numbers = [decoder.add(PROMPTS[i], MIXED[i], random_numbers(i), STOP, MOST[i]) for i in range(5)]
    first = {}
    for step in range(100):
        for lane, token, *_ in decoder.step():
            first.setdefault(lane, step)
            written.setdefault(lane, []).extend([] if token is None else [token])
    assert [written[number] for number in numbers] == [whole[i][0] for i in range(5)]
    assert first[numbers[1]] < first[numbers[4]] - 2


def test_texts_beside_one_another_read_their_prompt_once():
    model = models("rwkv7")
    alone = decoded(model, [4, 4][:1], MIXED)[4][0]
    decoder, written = Decoder(model, piece=4), {}
    one = decoder.add(PROMPTS[4], MIXED[4], random_numbers(4), STOP, MOST[4])
    two = decoder.beside(one, random_numbers(5))
    three = decoder.beside(one, random_numbers(6))
    decoder.drop(three)
    assert len(decoder) == 2
    while len(decoder):
        for lane, token, *_ in decoder.step():
            written.setdefault(lane, []).extend([] if token is None else [token])
    assert written[one] == alone and written[two] != alone and three not in written


def test_a_constraint_binds_its_own_text(how):
    model = models("rwkv7")
    alone = decoded(model, [0], MIXED)[0][0]
    decoder, written, cycle = Decoder(model), {}, Cycle(model.config.vocab_size, 5)
    free = decoder.add(PROMPTS[0], MIXED[0], random_numbers(0), STOP, MOST[0])
    bound = decoder.add(PROMPTS[1], MIXED[3], random_numbers(9), STOP, 50, constraint=cycle)
    while len(decoder):
        for lane, token, *_ in decoder.step():
            written.setdefault(lane, []).extend([] if token is None else [token])
    assert written[bound] == cycle.accepted == [3, 4, 3, 4, 3] and written[free] == alone


def test_scores_are_the_models_own(how):
    """Those of a token are of what was read before it, whatever the settings that chose it."""
    model = models("rwkv4")
    decoder = Decoder(model)
    plain = decoder.add(PROMPTS[1], Sampling(), random_numbers(3), max_new_tokens=6)
    asked = decoder.add(
        PROMPTS[0], Sampling(2, top_k=4, presence_penalty=0.5), random_numbers(1), max_new_tokens=8, likeliest=3
    )
    ids, found = [], []
    while len(decoder):
        for lane, token, _, scores in decoder.step():
            assert lane == asked or scores is None
            if lane == asked and token is not None:
                ids, found = [*ids, token], [*found, scores]
    whole = torch.tensor([PROMPTS[0] + ids])
    expected = model(whole)[0][0].log_softmax(-1)[len(PROMPTS[0]) - 1 : -1]
    assert found and plain != asked
    for row, token, scores in zip(expected, ids, found, strict=True):
        top = row.topk(3)
        assert [t for t, _ in scores.likeliest] == top.indices.tolist()
        given = [scores.token, *(score for _, score in scores.likeliest)]
        assert given == pytest.approx([float(row[token]), *top.values.tolist()], abs=1e-5)


def test_what_is_counted_fades(how):
    """A penalty that decays is the sum over the tokens before, each by how long ago it was."""
    model = models("rwkv7")
    sampling, ids, state = Sampling(0, frequency_penalty=1.5, presence_penalty=0.25, penalty_decay=0.5), [], None
    logits, state = prefill(model, PROMPTS[0])
    for _ in range(12):
        penalty = torch.zeros_like(logits)
        for ago, token in enumerate(reversed(ids)):
            penalty[token] += 1.5 * 0.5**ago
        for token in set(ids):
            penalty[token] += 0.25
        ids.append(int((logits - penalty).argmax()))
        logits, state = prefill(model, ids[-1:], state)
    decoder, found = Decoder(model), []
    decoder.add(PROMPTS[0], sampling, max_new_tokens=12)
    while len(decoder):
        found += [token for _, token, *_ in decoder.step()]
    assert found == ids
