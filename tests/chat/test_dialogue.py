"""Dialogues: the carried state against reading the whole transcript, however replies end; going back, saving."""

from dataclasses import replace

import pytest
import torch
from helpers import assert_close_rel, random_model
from hypothesis import given, settings
from hypothesis import strategies as st

from rwkv_train.chat.dialogue import Dialogue
from rwkv_train.data.templates import Template
from rwkv_train.generate import Sampling, prefill, stream_tokens
from rwkv_train.generation.reading import Taped
from rwkv_train.tokenizer import load_tokenizer, train_bpe

BYTES = load_tokenizer("bytes")
BPE = train_bpe(["Hello there.\n\nUser: 你好\n\nAssistant: 你好！ I am well.\n"] * 20, 330)
MODELS = {t.vocab_size: random_model(n_embd=8, vocab_size=t.vocab_size, dtype=torch.float64) for t in (BYTES, BPE)}
GREEDY = Sampling(temperature=0)


def dialogue(tokenizer=BYTES, model=None, **kwargs) -> Dialogue:
    return Dialogue(model or MODELS[tokenizer.vocab_size], tokenizer, **{"max_new_tokens": 12} | kwargs)


def assert_state_is_that_of_the_transcript(d: Dialogue):
    for ours, whole in zip(d.state, prefill(d.model, d.ids)[1], strict=True):
        assert_close_rel(ours, whole, 1e-9)


def test_a_long_conversation_is_one_document(generation):
    model = random_model(n_embd=8, vocab_size=257, dtype=torch.float64, generation=generation)
    d = dialogue(model=model, sampling=Sampling(top_p=0.9))
    d.system("Be kind.")
    for n in range(25):
        pieces = list(d.say(f"question {n}\n \n你"))
        assert "".join(pieces) == d.last().reply
    assert_state_is_that_of_the_transcript(d)
    assert d.ids[0] == BYTES.eod and BYTES.eod not in d.ids[1:]
    text = BYTES.decode(d.ids)
    assert text.startswith("System: Be kind.\n\nUser: question 0\n你\n\nAssistant:")
    assert text.count("\n\nUser: question") == 25


def test_token_ids_are_those_of_training():
    """Encoded piece by piece as data/encode.py encodes a chat, though the replies come token by token."""
    d = dialogue(BPE)
    messages = [{"role": "system", "content": "Hello"}]
    d.system("Hello")
    for user, reply in (("你好", "你好！"), ("Hello there.", "I am well.")):
        messages += [{"role": "user", "content": user}, {"role": "assistant", "content": reply}]
        d.sampling = iter(BPE.encode(f" {reply}\n\n"))
        assert "".join(d.say(user)) == reply
    assert d.ids[1:] == [i for text, _ in Template().segments(messages) for i in BPE.encode(text)]


@pytest.mark.parametrize(
    ("said", "shown", "kept", "ended"),
    [
        (" Hi.\n\n", "Hi.", " Hi.\n\n", True),
        (" Hi.\n\nUser: no", "Hi.", " Hi.\n\n", True),
        (" a\nb \n\n", "a\nb", " a\nb \n\n", True),
        ("\n\n", "", "\n\n", True),
        (" Hi.\n\0", "Hi.", " Hi.", False),
        (" 0123456789abc", "0123456789a", " 0123456789a", False),
        (" 012345678你", "012345678", " 012345678", False),
    ],
)
def test_where_a_reply_ends(said, shown, kept, ended):
    d = dialogue(sampling=iter([0 if c == 0 else c + 1 for c in said.encode()]))
    assert "".join(d.say("x")) == shown
    assert (d.last().reply, BYTES.decode(d.last().ids), d.last().ended) == (shown, kept, ended)
    d.sampling = iter([0])
    list(d.say("y"))
    assert BYTES.decode(d.ids) == f"User: x\n\nAssistant:{kept.removesuffix(chr(10) * 2)}\n\nUser: y\n\nAssistant:"
    assert_state_is_that_of_the_transcript(d)


@pytest.mark.parametrize(
    ("said", "shown", "kept"),
    [(" Hi.\nUser: no\n\n", "Hi.", " Hi."), (" Hi.\nUs\0", "Hi.\nUs", " Hi.\nUs"), (" END\n\n", "", "")],
)
def test_a_reply_ends_before_a_stop(said, shown, kept):
    """What only began like one is shown."""
    d = dialogue(sampling=iter([0 if c == 0 else c + 1 for c in said.encode()]), stops=("\nUser:", "END"))
    assert "".join(d.say("x")) == shown
    assert (d.last().reply, BYTES.decode(d.last().ids).rstrip(), d.last().ended) == (shown, kept, False)
    d.sampling = iter([0])
    list(d.say("y"))
    assert BYTES.decode(d.ids).endswith("\n\nUser: y\n\nAssistant:")
    assert_state_is_that_of_the_transcript(d)


TEXT = st.text(st.sampled_from("ab. \n你好！😀Hello"), max_size=30)


@settings(max_examples=60, deadline=None)
@given(TEXT, st.integers(1, 20), st.sampled_from(["\n\n", "\n", "<e>", ""]), st.booleans(), st.data())
def test_broken_off_anywhere_the_state_holds_what_was_shown(text, pieces, end, bpe, data):
    """Also where a token ends inside a character, or holds the end of the turn and more."""
    tokenizer = BPE if bpe else BYTES
    cut = data.draw(st.integers(0, len(text)))
    ids = tokenizer.encode(text[:cut]) + tokenizer.encode(end[:1] + text[cut:] + end) + [tokenizer.eod]
    template = Template(roles={"user": "Q: {content}\n", "assistant": "A: {content}" + end})
    d = dialogue(tokenizer, template=template, sampling=iter(ids), max_new_tokens=200)
    reply = d.say("x")
    shown = "".join(piece for _, piece in zip(range(pieces), reply, strict=False))
    reply.close()
    turn = d.last()
    said = (text[:cut] + end[:1] + text[cut:] + end).split(end)[0] if end else text
    assert turn.reply == shown == shown.strip() and said.strip().startswith(shown)
    kept = tokenizer.decode(turn.ids)
    assert kept.strip() == shown or (turn.ended and kept.endswith(end) and kept.removesuffix(end).strip() == shown)
    assert_state_is_that_of_the_transcript(d)


def test_an_interrupt_inside_the_model_loses_nothing(monkeypatch):
    d = dialogue(sampling=GREEDY)
    list(d.say("a"))
    before, calls = d.turns, []

    def interrupted(read):
        def call(*args, **more):
            found = read(*args, **more)
            calls.append(1)
            if len(calls) == allowed + 1:
                raise KeyboardInterrupt
            return found

        return call

    monkeypatch.setattr(d.model, "hidden", interrupted(d.model.hidden))
    monkeypatch.setattr(Taped, "again", interrupted(Taped.again))
    for allowed in (0, 1, 4):
        calls.clear()
        with pytest.raises(KeyboardInterrupt):
            list(d.say("b"))
        assert len(d.turns) == (1 if allowed == 0 else 2)
        assert_state_is_that_of_the_transcript(d)
        if allowed:
            d.back()
        assert d.turns == before


def test_back_is_as_if_it_had_never_been_said():
    straight, detour = dialogue(sampling=GREEDY), dialogue(sampling=GREEDY)
    straight.system("s")
    detour.system("s")
    for text in ("wrong", "worse"):
        list(detour.say(text))
    detour.back(2)
    assert detour.pending == "s" and detour.state is None and detour.ids == []
    for text in ("a", "b"):
        list(straight.say(text))
        list(detour.say(text))
        list(detour.say("no"))
        detour.back()
    assert detour.ids == straight.ids
    assert all(torch.equal(a, b) for a, b in zip(detour.state, straight.state, strict=True))
    for count in (0, 3):
        with pytest.raises(ValueError, match="2 turns"):
            detour.back(count)


def test_retry_asks_the_same_question():
    d = dialogue()
    with pytest.raises(ValueError, match="nothing"):
        d.retry()
    list(d.say("a"))
    list(d.say("b"))
    first = d.last()
    replies = {"".join(d.retry()) for _ in range(5)} | {first.reply}
    assert len(replies) > 1 and len(d.turns) == 2
    assert (d.last().user, d.last().prompt) == (first.user, first.prompt)
    assert_state_is_that_of_the_transcript(d)
    d.sampling = GREEDY
    assert "".join(d.retry()) == "".join(d.retry())


def test_the_next_call_breaks_off_a_reply_that_was_left():
    d = dialogue(sampling=iter(BYTES.encode(" abcdefgh")))
    left = d.say("x")
    assert next(left) + next(left) == "ab"
    d.sampling = iter([0])
    list(d.say("y"))
    assert d.turns[0].reply == "ab" and list(left) == []
    assert_state_is_that_of_the_transcript(d)


def test_messages_that_cannot_be():
    d = dialogue(template=Template(roles={"user": "Q: {content}\n", "assistant": "A: {content}\n"}))
    with pytest.raises(ValueError, match="empty"):
        d.say("  ")
    with pytest.raises(ValueError, match="surrogate"):
        d.say("\udcff")
    with pytest.raises(ValueError, match="system"):
        d.system("x")
    assert d.turns == [] and d.pending is None
    with pytest.raises(ValueError, match="assistant"):
        dialogue(template=Template(roles={"user": "{content}"}, train_roles=[]))
    with pytest.raises(ValueError, match="--tokenizer"):
        Dialogue(random_model(), BYTES)


def test_saved_and_loaded_it_goes_on_the_same(tmp_path):
    d, file = dialogue(seed=3), tmp_path / "new" / "d.state"
    with pytest.raises(ValueError, match="nothing"):
        d.save(file)
    for text in ("a", "b"):
        list(d.say(text))
    d.system("s")
    d.save(file)
    other = dialogue(seed=4)
    list(other.say("something else"))
    other.load(file)
    assert other.ids == d.ids and other.pending == "s"
    assert list(other.say("c")) == list(d.say("c"))
    other.back(2)
    assert all(torch.equal(a, b) for a, b in zip(other.state, d.turns[0].state, strict=True))

    ids = other.ids
    model, small = MODELS[BPE.vocab_size], random_model(n_embd=16, vocab_size=257)
    for misfit in (Dialogue(model, BPE), Dialogue(small, BYTES)):
        with pytest.raises(ValueError, match="another size or tokenizer"):
            misfit.load(file)
    torch.save(d.state._asdict(), tmp_path / "no_dialogue")
    for name, message in (("no_dialogue", "no saved dialogue"), ("nothing", "No such file")):
        with pytest.raises(ValueError, match=message):
            other.load(tmp_path / name)
    assert other.ids == ids


def test_another_model_reads_the_transcript():
    d, model = dialogue(), random_model(n_embd=12, vocab_size=257, dtype=torch.float64, seed=1)
    for text in ("a", "b", "c"):
        list(d.say(text))
    transcript = d.ids
    d.reread(model)
    assert d.ids == transcript and d.state.wkv.shape[-1] == 12
    for _ in range(3):
        assert_state_is_that_of_the_transcript(d)
        list(d.say("on"))
        assert_state_is_that_of_the_transcript(d)
        d.back(2)


def test_a_dialogue_of_another_version_of_the_model_is_read_again(tmp_path):
    d, file = dialogue(), tmp_path / "d.state"
    list(d.say("a"))
    d.save(file)
    model = random_model(n_embd=d.model.config.n_embd, vocab_size=257, dtype=torch.float64, seed=1)
    d.reread(model, "newer")
    d.load(file)
    assert d.version == "newer"
    assert_state_is_that_of_the_transcript(d)


def test_what_a_correction_needs():
    d = dialogue(sampling=iter([*BYTES.encode(" A.\n\n B"), 0, 0]))
    for text in ("a", "b"):
        list(d.say(text))
    d.system("s")
    list(d.say("c"))
    assert d.prompt_of_last() + d.last().ids == d.ids
    question = BYTES.encode("User: c\n\nAssistant:")
    assert [BYTES.eod, *d.context_of_last(), *question] == d.prompt_of_last()
    d.back(2)
    assert d.context_of_last() == []


def test_penalties_count_the_tokens_of_the_reply():
    start = prefill(MODELS[257], [0])
    never_again = [t for t, _ in stream_tokens(MODELS[257], *start, replace(GREEDY, presence_penalty=1e4), 60)]
    assert len(set(never_again)) == 60
    assert len({t for t, _ in stream_tokens(MODELS[257], *start, GREEDY, 60)}) < 60
