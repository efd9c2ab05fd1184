"""Thoughts: shown and dropped, the same ids in training and in a chat, and the state as if nothing had been thought."""

from dataclasses import asdict, replace

import pytest
import torch
from feedback_toys import CONFIG, rehearsal_set, small_model
from helpers import assert_close_rel, random_model
from hypothesis import given, settings
from hypothesis import strategies as st

from rwkv_train.chat.dialogue import Dialogue, Thought
from rwkv_train.chat.session import Chat
from rwkv_train.cli import parse
from rwkv_train.config import Thinking
from rwkv_train.data.known_templates import NAMED, named_template, template_of
from rwkv_train.data.render import EARLIER, EMPTY, FAKE, Columns, render
from rwkv_train.data.templates import THINKING, split_thought
from rwkv_train.feedback import Correction, Learner
from rwkv_train.feedback.decode import Form, decode
from rwkv_train.feedback.journal import Journal
from rwkv_train.feedback.rehearsal import RehearsalSet
from rwkv_train.feedback.snapshots import weights_hash
from rwkv_train.generate import Sampling, prefill
from rwkv_train.generation.reply import Reply
from rwkv_train.tokenizer import load_tokenizer, train_bpe

G1, BYTES, WORLD = NAMED["g1"], load_tokenizer("bytes"), load_tokenizer("world")
BPE = train_bpe(["Hello there.\n\nUser: <think>\nWell.\n</think>\nAssistant: I am (think a bit) well.\n"] * 20, 330)
MODELS = {t: random_model(n_embd=8, vocab_size=t.vocab_size, dtype=torch.float64) for t in (BYTES, BPE)}
MODES = list(THINKING)


def written(mode: str, thought: str, reply: str) -> str:
    """What a model writes in a mode, after what is written for it."""
    whole = f" <think>\n{thought}\n</think>\n{reply}" if THINKING[mode].opening.endswith("<think") else f" {reply}"
    whole = f" <think>\n</think>\n{reply}" if mode == "fake" else whole
    return (whole + "\n\nUser:").removeprefix(THINKING[mode].opening)


def talk(d: Dialogue, said: str, text: str) -> tuple[str, str]:
    """(thought, reply) as shown, where the model writes `said`."""
    d.sampling = iter(d.tokenizer.encode(said))
    pieces = list(d.say(text))
    thought, reply = ("".join(p for p in pieces if isinstance(p, Thought) == wanted) for wanted in (True, False))
    assert (thought, reply) == (d.last().thought, d.last().reply)
    return thought, reply


def test_modes_have_one_list():
    assert tuple(THINKING) == Thinking.__args__


@pytest.mark.parametrize("tokenizer", [BYTES, BPE, WORLD], ids=["bytes", "bpe", "world"])
@pytest.mark.parametrize("mode", MODES)
def test_a_chat_reads_what_training_wrote(mode, tokenizer):
    """The last reply as it is trained, and those before it without their thoughts."""
    template = replace(G1, thinking=mode)
    model = MODELS.get(tokenizer) or random_model(n_embd=8, vocab_size=65536)
    d = Dialogue(model, tokenizer, template, max_new_tokens=200)
    d.system("Be brief.")
    messages = [{"role": "system", "content": "Be brief."}]
    thinks = THINKING[mode].opening.endswith("<think")
    for number in range(2):
        question, thought, reply = f"What\r\n\r\n\n{number}? ", f"Hm.\n\nSo {number}.", f"One.\n\nTwo {number}."
        messages += [{"role": "user", "content": question}]
        prompt = [i for piece in template.prompt(messages) for i in tokenizer.encode(piece)]
        assert talk(d, written(mode, thought, reply), question) == (thought if thinks else "", reply)
        answer = {"role": "assistant", "content": reply} | ({"reasoning_content": thought} if thinks else {})
        *before, (trained, is_trained) = template.segments([*messages, answer])
        assert [i for text, _ in before for i in tokenizer.encode(text)] == prompt and is_trained
        assert trained + "User:" == written(mode, thought, reply)
        messages += [answer]
        assert d.ids[1:] == [i for piece in template.history(messages) for i in tokenizer.encode(piece)]
    for ours, whole in zip(d.state, prefill(model, d.ids)[1], strict=True):
        assert_close_rel(ours, whole, 1e-9 if ours.dtype == torch.float64 else 1e-4)
    text, suffix = tokenizer.decode(d.ids[1:]), THINKING[mode].suffix
    turns = "".join(f"User: What\n{n}?{suffix}\n\nAssistant: One.\n\nTwo {n}.\n\n" for n in range(2))
    assert text == f"System: Be brief.\n\n{turns}"


def test_the_forms_are_the_makers():
    asked = [{"role": "user", "content": "Why?"}]
    forms = {mode: "".join(replace(G1, thinking=mode).prompt(asked)) for mode in MODES}
    assert forms == {
        "off": "User: Why?\n\nAssistant:",
        "fake": "User: Why?\n\nAssistant: <think>\n</think",
        "on": "User: Why?\n\nAssistant: <think",
        "normal": "User: Why? (think)\n\nAssistant: <think",
        "short": "User: Why? (think a bit)\n\nAssistant: <think",
        "long": "User: Why? (think a lot)\n\nAssistant: <think",
    }


@pytest.mark.parametrize("mode", MODES)
def test_a_mode_is_asked_for_by_flag_and_in_yaml(tmp_path, mode):
    """Where on and off are words of another meaning."""
    (tmp_path / "config.yaml").write_text(f"thinking: {mode}\n")
    (tmp_path / "template.yaml").write_text(f"thinks: true\nthinking: {mode}\n")
    for argv in ([f"--thinking={mode}"], ["--config", str(tmp_path / "config.yaml")]):
        assert parse("chat", argv)[0].thinking == mode
    assert named_template(tmp_path / "template.yaml").thinking == mode


@pytest.mark.parametrize(
    ("name", "series"),
    [
        ("rwkv7-g1d-0.1b-20260129-ctx8192.pth", "g1"),
        ("rwkv7-g1h-13.3b-20260710-ctx10240.pth", "g1"),
        ("RWKV-x070-World-0.4B-v2.9-20250107-ctx4096.pth", "world"),
        ("RWKV-4-World-0.1B-v1-20230520-ctx4096.pth", "world"),
        ("RWKV-4-Raven-3B-v12-Eng98-Other2-20230520-ctx4096.pth", "raven"),
        ("RWKV-4-Pile-169M-20220807-8023.pth", None),
        ("model.pth", None),
    ],
)
def test_the_series_is_told_by_the_files_name(name, series):
    assert template_of(f"somewhere/{name}") == (series and (series, NAMED[series]))


TEXT = st.text(st.sampled_from("ab.\n <>think/你"), max_size=24)


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(MODES), TEXT, st.booleans(), st.booleans())
def test_whatever_is_written_pieces_only_grow(mode, text, bpe, ends):
    """And at the end they are what splitting the whole text gives."""
    template, tokenizer = replace(G1, thinking=mode), BPE if bpe else BYTES
    reply, thought, shown = Reply(tokenizer, template), "", ""
    for token in tokenizer.encode(text + "\n\nUser:" * ends):
        shown += reply.push(token, lambda: None)
        assert reply.thought.startswith(thought) and reply.shown == shown
        thought = reply.thought
    shown += reply.finish()
    whole = (template.opening + text).lstrip()
    opened, (before, said) = reply.apart, ("", "") if whole == "<think" else split_thought(whole)
    assert reply.ended is ends and shown == reply.shown == said.strip()
    assert reply.thought == before
    if opened:
        ids, rest, _ = reply.settle()
        assert ids == [] and rest == (f" {shown}" if shown else "") + "\n\n" * ends


def test_a_reply_goes_on_after_a_blank_line():
    """Where it takes a role's name to end it; and such names after a blank line do not stay in what is trained."""
    d = Dialogue(MODELS[BYTES], BYTES, G1, max_new_tokens=200)
    assert talk(d, " One.\n\nTwo.\n\n- three\n\nUser: no", "Hi")[1] == "One.\n\nTwo.\n\n- three"
    assert d.last().ended and BYTES.decode(d.last().ids) == " One.\n\nTwo.\n\n- three\n\n"
    assert G1.clean("a\n\nUser: b\n\n\nc", "assistant") == "a\nUser: b\n\n\nc"
    assert G1.messages("User: a\n\nAssistant: b\n\nc\n\nUser: d\n\nAssistant: e\n\n") == [
        {"role": role, "content": text}
        for role, text in [("user", "a"), ("assistant", "b\n\nc"), ("user", "d"), ("assistant", "e")]
    ]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("stop", ["\n", "END", ">"])
def test_stops_are_of_the_reply_alone(mode, stop):
    """Not of the thought, nor of what closes it."""
    d = Dialogue(MODELS[BYTES], BYTES, replace(G1, thinking=mode), max_new_tokens=200, stops=(stop,))
    thinks = THINKING[mode].opening.endswith("<think")
    said = written(mode, f"One{stop}\nTwo.", f"Three.{stop}Four.")
    assert talk(d, said, "Hi") == (f"One{stop}\nTwo." if thinks else "", "Three.")
    assert BYTES.decode(d.ids).endswith("Assistant: Three.") and not d.last().ended


@pytest.mark.parametrize(
    ("said", "kept"),
    [(" <think>\n</think>\nHi.\n\nUser:", " Hi.\n\n"), (" <think>\nabc", ""), (" <think", ""), (" <thin", " <thin")],
)
def test_no_mark_of_a_thought_stays_in_the_history(said, kept):
    d = Dialogue(MODELS[BYTES], BYTES, G1, max_new_tokens=len(said.encode()))
    talk(d, said, "Hello")
    assert d.last().reply == kept.strip() and BYTES.decode(d.ids) == f"User: Hello\n\nAssistant:{kept}"


def test_a_trained_thought_is_one_that_a_chat_reads():
    ask = {"role": "user", "content": "a"}

    def trained(thought, template=G1):
        return template.segments([ask, {"role": "assistant", "content": "b", "reasoning_content": thought}])[-1][0]

    assert trained(" one\r\n\r\nUser: two ") == " <think>\none\nUser: two\n</think>\nb\n\n"
    with pytest.raises(ValueError, match="message 2: its thought holds </think>"):
        trained("a</think>b")
    unasked = [ask, {"role": "assistant", "content": "b", "weight": 0}]
    assert not any(is_trained for _, is_trained in replace(G1, thinking="on").segments(unasked))


def test_what_prepare_leaves_out_of_thoughts_is_told():
    ask, reply = {"role": "user", "content": "a"}, {"role": "assistant", "content": "<think>t</think>b"}
    empty = {"role": "assistant", "content": "<think>\n</think>b"}
    for messages, template, remark in (
        ([ask, reply, ask, reply], G1, EARLIER),
        ([ask, reply], replace(G1, train_roles=["user"]), EARLIER),
        ([ask, reply], replace(G1, thinking="fake"), FAKE),
        ([ask, empty], G1, EMPTY),
    ):
        assert remark in render({"messages": messages}, "auto", template, Columns()).remarks
    assert not render({"messages": [ask, reply]}, "auto", G1, Columns()).remarks


def test_a_thought_without_end_is_no_reply():
    d = Dialogue(MODELS[BYTES], BYTES, replace(G1, thinking="on"), max_new_tokens=6)
    assert talk(d, ">\nabcdefgh", "Hi") == ("abcd", "")
    assert BYTES.decode(d.ids) == "User: Hi\n\nAssistant:" and not d.last().ended


def test_decoded_replies_end_before_the_next_name():
    """Of several lanes at once, as corrections decode them."""
    model, form = MODELS[BYTES], Form(BYTES, G1)
    rows = [BYTES.encode(" a\n\nbcd\n\nUser: c"), BYTES.encode(" d\n\nAssistant: e")]

    def head(x):
        logits = torch.zeros(len(x), 257)
        for lane in range(len(x)):
            logits[lane, going[lane].pop(0) if going[lane] else 0] = 1
        return logits

    going = [list(row) for row in rows]
    model.head, kept = Fixed(head, model.head.weight), model.head
    try:
        found = decode(model, BYTES, [[0, 5], [0, 6]], G1.turn_end(), max_new_tokens=40)
    finally:
        model.head = kept
    assert [BYTES.decode(ids) for ids in found] == [" a\n\nbcd\n\n", " d\n\n"]
    assert [form.shown(ids) for ids in found] == ["a\n\nbcd", "d"]
    assert form.shown(form.answer("a\n\nb")) == "a\n\nb" == form.shown(form.taught("a\n\nb"))
    fake = Form(BYTES, replace(G1, thinking="fake"))
    assert fake.shown(fake.answer("a")) == "a" and BYTES.decode(fake.answer("a")) == ">\na\n\n"
    assert replace(G1, thinking="short").for_answers().thinking == "fake"


class Fixed(torch.nn.Module):
    """A head that says what it is told."""

    def __init__(self, call, weight):
        super().__init__()
        self.call, self.weight = call, weight

    def forward(self, x):
        return self.call(x)


def test_thoughts_are_dimmed_on_a_terminal_and_left_out_elsewhere(monkeypatch, tmp_path, capsys):
    d = Dialogue(MODELS[BYTES], BYTES, replace(G1, thinking="on"), max_new_tokens=200)
    chat = Chat(d, tmp_path)
    for is_terminal, shown in ((True, "\x1b[2mHm.\x1b[0m\nHi.\n\n"), (False, "Hi.\n\n")):
        monkeypatch.setattr("sys.stdout.isatty", lambda is_terminal=is_terminal: is_terminal)
        d.sampling = iter(BYTES.encode(written("on", "Hm.", "Hi.")))
        chat.show("Hello")
        assert capsys.readouterr().out.replace("\x1b[0m\x1b[2m", "") == shown
    d.sampling = iter(BYTES.encode(written("on", "Hm.", "Hi.")))
    chat.show("Hello", plain=True)
    chat.show("/settings thinking short")
    chat.show("/settings thinking loud")
    assert capsys.readouterr().out.startswith("Hi.\n\nthinking short\n\nthinking is 'loud', expected off,")


def test_a_profile_of_before_templates_said_more_goes_on_as_it_began(tmp_path, capsys):
    """Its corrections were written without paragraphs and thoughts, whatever the model's name means by now."""
    model = small_model()
    journal = Journal(tmp_path / "journal.jsonl")
    journal.append("base", base=weights_hash(model.state_dict()), dtype="fp32", config=asdict(CONFIG))
    journal.close()
    rehearsal_set(model).save(tmp_path / "rehearsal.safetensors")
    with Learner(model, BYTES, tmp_path, G1) as learner:
        assert learner.form.template == replace(G1, paragraphs=False, thinks=False)
        assert "thinks True, not False" in capsys.readouterr().err
    with pytest.raises(ValueError, match="another template"):
        RehearsalSet.load(tmp_path / "rehearsal.safetensors", model, Form(BYTES, G1))


def test_what_is_taught_is_said_after_an_empty_thought(tmp_path, generation, capsys):
    """Corrections of a model that is asked to think, undone and after a restart."""
    model, template = small_model(generation=generation), replace(G1, thinking="short")

    def opened():
        form = Form(BYTES, template.for_answers())
        rehearsal = rehearsal_set(model)
        rehearsal.form = form
        return Learner(model, BYTES, tmp_path / "profile", template, CONFIG, rehearsal)

    with opened() as learner:
        before = learner.weights
        outcome = learner.learn(Correction("sun?", "hot\n\nand dry"))
        assert outcome.accepted, outcome.why
        assert outcome.answer_after == "hot\n\nand dry" == learner.answer("sun?")
    template = G1  # opened in another way, its corrections go on as they began
    with opened() as learner:
        assert "thinking 'off', not 'fake'" in capsys.readouterr().err and learner.form.template.thinking == "fake"
        d = Dialogue(learner.model, BYTES, replace(G1, thinking="fake"), Sampling(0))
        assert "".join(d.say("sun?")) == "hot\n\nand dry" and d.last().ended
        learner.undo()
        assert learner.weights == before


def test_functions_stay_in_the_first_system_message(tmp_path, capsys):
    d = Dialogue(MODELS[BYTES], BYTES, G1, Sampling(0), max_new_tokens=3)
    d.functions, chat = "Tools:\n[]", Chat(d, tmp_path)
    chat.show("/system Be brief.")
    chat.show("/system")
    assert capsys.readouterr().out == "goes before your next message\n\n" * 2
    chat.show("/system Be brief.")
    list(d.say("a"))
    d.system("Be long.")
    list(d.say("b"))
    assert [turn.system for turn in d.turns] == ["Be brief.\nTools:\n[]", "Be long."]
