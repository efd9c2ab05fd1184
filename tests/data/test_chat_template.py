"""Chat templates of Hugging Face: what ours write there, and which of theirs are read."""

import itertools
import json
import re
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rwkv_train.data import chat_template
from rwkv_train.data.chat_program import to_jinja
from rwkv_train.data.chat_template import BEGINS, from_jinja, told_by_running
from rwkv_train.data.known_templates import NAMED
from rwkv_train.data.templates import THINKING, WORLD_CHAT, Template
from rwkv_train.data.text_format import TextFormat, alike_in_one
from rwkv_train.tokenizer import load_tokenizer, train_bpe

OWN = Template({"user": "<u>{content}</u>", "assistant": "<a>\n{content}</a>\n"}, collapse_blank_lines=False)
MESSAGE = "{{ '%s' + message['content'] + '%s' }}"
LOOP = "{%% for message in messages %%}%s{%% endfor %%}"
CHATML = LOOP % MESSAGE.replace("'%s'", "'<|im_start|>' + message['role'] + '\\n'", 1).replace("%s", "<|im_end|>\\n")
CHATML_ASKS = CHATML + "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
PLAIN = LOOP % "{{ message['role'] + ': ' + message['content'] + '\\n' }}"
# Texts with every kind of white space in and around them, and of characters that a program could take for its own.
CONTENT = st.text(st.sampled_from(" \n\r\t\x0b\x1c\u00a0\u2028aZ7.:{}%'\"\\\u4f60\U0001f600"), max_size=12)
CHAT = st.lists(CONTENT.filter(str.strip), min_size=1, max_size=5).map(
    lambda texts: [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(texts)]
)


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    """A function that exports a format and opens it by AutoTokenizer."""
    transformers = pytest.importorskip("transformers")

    def open_format(tokenizer, template):
        folder = tmp_path_factory.mktemp("folder")
        TextFormat(tokenizer, template).export(folder)
        return transformers.AutoTokenizer.from_pretrained(folder)

    return open_format


@pytest.mark.parametrize("name, template", [("world", Template()), ("bytes", OWN)])
def test_transformers_writes_the_ids_of_ours(opened, name, template):
    """Those that the chat reads before a reply, and those that `prepare` writes."""
    ours = load_tokenizer(name)
    theirs = opened(ours, template)
    assert alike_in_one(ours, template)

    @settings(max_examples=30, deadline=None)
    @given(chat=CHAT, system=CONTENT)
    def check(chat, system):
        if "system" in template.roles:
            chat = [{"role": "system", "content": system}, *chat]
        pieces = [text for text, _ in template.segments(chat)]
        assert theirs.apply_chat_template(chat, tokenize=False) == ours.eod_name + "".join(pieces)
        written = [ours.eod, *(i for piece in pieces for i in ours.encode(piece))]
        assert theirs.apply_chat_template(chat, return_dict=False) == written
        asked = [ours.eod, *(i for piece in template.prompt(chat) for i in ours.encode(piece))]
        assert theirs.apply_chat_template(chat, add_generation_prompt=True, return_dict=False) == asked

    check()


THINKS = st.text(st.sampled_from(" \n\r<>think/\u4f60"), max_size=8)
REPLY = st.one_of(
    CONTENT, st.tuples(THINKS, CONTENT).map("<think>{0[0]}</think>{0[1]}".format), CONTENT.map("a\n\nUser: {}".format)
)


@pytest.mark.parametrize("collapse", [True, False])
@pytest.mark.parametrize("paragraphs", [True, False])
@pytest.mark.parametrize("thinks", [True, False])
def test_thoughts_and_paragraphs_are_those_of_ours(opened, thinks, paragraphs, collapse):
    """In every mode; what ours refuses is refused there."""
    form = Template(paragraphs=paragraphs, thinks=thinks, collapse_blank_lines=collapse)
    ours = load_tokenizer("bytes")
    theirs = opened(ours, form)

    @settings(max_examples=40, deadline=None)
    @given(
        st.lists(st.tuples(CONTENT, REPLY, st.none() | REPLY, st.sampled_from([None, 0, 1])), min_size=1, max_size=3),
        st.sampled_from(list(THINKING) if thinks else ["off"]),
    )
    def check(turns, mode):
        template = replace(form, thinking=mode)
        chat = []
        for question, reply, thought, weight in turns:
            answer = {"role": "assistant", "content": reply, "reasoning_content": thought, "weight": weight}
            chat += [{"role": "user", "content": question}, answer]
        for messages, asks in ((chat, False), (chat[:-1], True)):
            how = {"thinking": mode, "add_generation_prompt": asks, "return_dict": False}
            try:
                pieces = template.prompt(messages) if asks else [text for text, _ in template.segments(messages)]
            except ValueError:
                with pytest.raises(Exception, match=r"is empty|has no thought|stands beside|holds </think>"):
                    theirs.apply_chat_template(messages, **how)
                continue
            found = theirs.apply_chat_template(messages, **how)
            assert found == [ours.eod, *(i for piece in pieces for i in ours.encode(piece))]

    check()


def test_named_templates_are_read_again(monkeypatch):
    """In every mode, and without running them."""
    monkeypatch.setattr(chat_template, "sys", None)
    for name, begin in itertools.product(NAMED, BEGINS):
        for thinking in THINKING if NAMED[name].thinks else ("off",):
            template = replace(NAMED[name], thinking=thinking)
            assert from_jinja(to_jinja(template, begin), {}, []) == (template, [])


def test_pieces_that_a_bpe_joins_are_told(opened):
    """The text is the same, the ids are not: then it is known."""
    ours = train_bpe(["User: a\n\nAssistant: b\n\n" * 9, "\n\n" * 99], 300)
    theirs = opened(ours, Template())
    chat = [{"role": role, "content": "b"} for role in ("user", "assistant", "user")]
    pieces = [text for text, _ in Template().segments(chat)]
    assert theirs.apply_chat_template(chat, tokenize=False) == "<|endoftext|>" + "".join(pieces)
    found = theirs.apply_chat_template(chat, return_dict=False)
    assert found != [ours.eod, *(i for piece in pieces for i in ours.encode(piece))]
    assert not alike_in_one(ours, Template())
    asked = theirs.apply_chat_template(chat[:1], add_generation_prompt=True, return_dict=False)
    assert asked == [ours.eod, *ours.encode(Template().prompt(chat[:1])[0])]


@pytest.mark.parametrize(
    "message, said",
    [
        ({"role": "tool", "content": "x"}, "role tool is unknown; the template knows system, user, assistant"),
        ({"role": "user", "content": " \n"}, r"message 1 \(user\) is empty"),
        ({"role": "user", "content": [{"type": "text", "text": "x"}]}, "message 1 has no text as its content"),
    ],
)
def test_what_ours_refuses_is_refused_there(opened, message, said):
    with pytest.raises(Exception, match=said):
        opened(load_tokenizer("bytes"), Template()).apply_chat_template([message])
    with pytest.raises(ValueError):
        Template().segments([message])


@pytest.mark.parametrize("template", [Template(), NAMED["g1"]])
def test_functions_are_not_passed_over(opened, template):
    def look_up(word: str):
        """Look a word up.

        Args:
            word: A word.
        """

    theirs, chat = opened(load_tokenizer("bytes"), template), [{"role": "user", "content": "x"}]
    calls = [{"type": "function", "function": {"name": "look_up", "arguments": {"word": "x"}}}]
    called = [*chat, {"role": "assistant", "content": "y", "tool_calls": calls}]
    for messages, tools in ((chat, [look_up]), (called, None)):
        with pytest.raises(Exception, match=r"functions and calls are not written here"):
            theirs.apply_chat_template(messages, tools=tools)


def test_a_thought_that_is_no_text_is_refused(opened):
    chat = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y", "reasoning_content": 0}]
    with pytest.raises(Exception, match="message 2: reasoning_content is no text"):
        opened(load_tokenizer("bytes"), NAMED["g1"]).apply_chat_template(chat)
    with pytest.raises(ValueError, match="message 2: reasoning_content is no text"):
        NAMED["g1"].segments(chat)


def test_the_end_of_a_document_is_no_text_of_a_message(opened):
    """It is the token there, as a chat has to begin with it; here it is plain text."""
    for template in (Template(), NAMED["g1"]):
        with pytest.raises(Exception, match=r"message 1 holds <\|endoftext\|>, which ends a document"):
            opened(load_tokenizer("bytes"), template).apply_chat_template(
                [{"role": "user", "content": "<|endoftext|>"}]
            )


FORM = st.tuples(st.text("User: <|{}%'\"\\\n\u4f60", max_size=8), st.text("User: <|{}%'\"\\\n", max_size=8)).map(
    "{content}".join
)


@settings(max_examples=30, deadline=None)
@given(st.fixed_dictionaries({"user": FORM, "assistant": FORM}, optional={"system": FORM}), st.booleans())
def test_ours_is_read_again(roles, collapse):
    template = Template(roles, collapse_blank_lines=collapse)
    found, notes = told_by_running(to_jinja(template), {}, [], "")
    assert found == template
    assert notes == ["does not write system messages as messages of their own"] * ("system" not in roles)


@pytest.mark.parametrize(
    "program, roles, said",
    [
        (CHATML_ASKS, {r: f"<|im_start|>{r}\n{{content}}<|im_end|>\n" for r in WORLD_CHAT}, ()),
        ("{{ bos_token }}" + PLAIN, {r: f"{r}: {{content}}\n" for r in WORLD_CHAT}, ("begins each chat with <s>",)),
        (PLAIN.replace("}\n", "} | trim }}\n"), {r: f"{r}: {{content}}\n" for r in WORLD_CHAT}, ()),
        (
            LOOP % "{{ message['role'] + ': ' + message['content'] | trim + '\\n' }}"
            + "{% if add_generation_prompt %}{{ 'assistant: <think>' }}{% endif %}",
            {r: f"{r}: {{content}}\n" for r in WORLD_CHAT},
            ("changes white space", "goes on with ' <think>'"),
        ),
        (
            LOOP % "{% generation %}{{ message['role'][0] + message['content'] }}{%- endgeneration -%}",
            {r: f"{r[0]}{{content}}" for r in WORLD_CHAT},
            (),
        ),
        (
            LOOP % "{% if message.role == 'system' %}{{ raise_exception('no') }}{% endif %}{{ '#' + message.content }}",
            {"user": "#{content}", "assistant": "#{content}"},
            ("does not write system messages",),
        ),
    ],
)
def test_foreign_programs(program, roles, said):
    template, notes = from_jinja(program, {"bos_token": "<s>"}, ["<s>"])
    assert template.roles == roles and not template.collapse_blank_lines and len(notes) == len(said)
    for note, words in zip(notes, said, strict=True):
        assert words in note


@pytest.mark.parametrize(
    "program, said",
    [
        (CHATML + "<|im_end|>", "does not write one message after the other"),
        (CHATML.replace("<|im_end|>", "<s>"), "writes the special token <s>"),
        ("You help." + PLAIN, "begins each chat with a text of its own, 'You help.'"),
        (PLAIN + "{% if add_generation_prompt %}{{ 'bot: ' }}{% endif %}", "asks for a reply otherwise"),
        (LOOP % "{{ loop.index ~ message.content }}", "otherwise by where they stand"),
        (LOOP % "{{ message.content ~ ('!' if loop.index > 7 else '') }}", "writes a longer chat otherwise"),
        (LOOP % "{{ message.content | upper }}", "each with its content"),
        ("{% for %}", "is no Jinja program"),
        ("{{ messages[99].content }}", "cannot be run here"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{% for a in b %}" * 25 + "{% endfor %}" * 25, "is no Jinja program .*too many"),
        ("{{ 'a'.center(70000) }}", "writes more than 65,536 characters"),
    ],
)
def test_foreign_programs_that_no_template_says(program, said):
    with pytest.raises(ValueError, match=said):
        told_by_running(program, {}, ["<s>"], "")


def repeated(times: int, what: str) -> str:
    return "{% for i in range(" + str(times) + ") %}" + what + "{% endfor %}"


@pytest.mark.parametrize(
    "program, said",
    [
        ("{% for %}", "is no Jinja program"),
        ("a" * 70_000, "is longer than 65,536 characters"),
        ("{% set a = 'a' | center(3000000) %}" + repeated(20_000, "{{ 'zz' in a }}"), "takes too much"),
        ("{{ 'abc' | slice(90000000) | list | length }}", "takes too much"),
        ("{{ 'a' | center(2000000000) }}", "takes too much"),
        ("{% set n = namespace(a='a') %}" + repeated(40, "{% set n.a = n.a ~ n.a %}"), "takes too much"),
        ("{{ '%03000000000d' % 1 }}", "takes too much"),
        (repeated(99_999, repeated(99_999, "")), "takes too much"),
    ],
)
def test_foreign_programs_may_take_only_so_much(monkeypatch, program, said):
    monkeypatch.setattr(chat_template, "SECONDS", 1)
    with pytest.raises(ValueError, match=said):
        from_jinja(program, {}, [])


def test_a_process_that_does_not_begin_is_told(monkeypatch):
    monkeypatch.setattr(chat_template.sys, "executable", "/no/python")
    with pytest.raises(ValueError, match=r"cannot be run here .*no/python"):
        from_jinja(PLAIN, {}, [])
    monkeypatch.undo()
    monkeypatch.setattr(chat_template, "__name__", "no_such_module")
    with pytest.raises(ValueError, match=r"cannot be run here .*no_such_module"):
        from_jinja(PLAIN, {}, [])


def test_a_foreign_folder(tmp_path, capsys):
    """A file beside it goes before what tokenizer_config.json says, and our own before both."""
    load_tokenizer("bytes").export_in(tmp_path)
    file = tmp_path / "tokenizer_config.json"
    config = json.loads(file.read_text())
    named = [{"name": "tool_use", "template": "{{ 1 }}"}, {"name": "default", "template": CHATML_ASKS}]
    for program in (CHATML_ASKS, named):
        file.write_text(json.dumps(config | {"chat_template": program}))
        assert TextFormat.read(tmp_path).template.roles["user"] == "<|im_start|>user\n{content}<|im_end|>\n"
    assert not capsys.readouterr().err
    (tmp_path / "chat_template.jinja").write_text("{{ bos_token }}" + PLAIN)
    assert TextFormat.read(tmp_path).template.roles["user"] == "user: {content}\n"
    assert not capsys.readouterr().err  # it is the end of a document, with which chats begin here
    (tmp_path / "chat_template.jinja").write_text("{{ other_token }}" + PLAIN)
    assert TextFormat.read(tmp_path).template.roles["user"] == "user: {content}\n"
    (tmp_path / "chat_template.jinja").write_text("You help." + PLAIN)
    assert TextFormat.read(tmp_path).template is None
    said = capsys.readouterr().err
    assert re.search(r"note: .*its chat template is passed over, as it begins each chat .*--template", said)
    OWN.save(tmp_path / "template.yaml")
    assert TextFormat.read(tmp_path).template == OWN and not capsys.readouterr().err
