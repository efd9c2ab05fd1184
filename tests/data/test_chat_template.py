"""Chat templates of Hugging Face: what ours write there, and which of theirs are read."""

import json
import re
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rwkv_train.data.chat_program import to_jinja
from rwkv_train.data.chat_template import from_jinja
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
        assert theirs.apply_chat_template(chat, tokenize=False) == "".join(pieces)
        assert theirs.apply_chat_template(chat, return_dict=False) == [
            i for piece in pieces for i in ours.encode(piece)
        ]
        asked = [i for piece in template.prompt(chat) for i in ours.encode(piece)]
        assert theirs.apply_chat_template(chat, add_generation_prompt=True, return_dict=False) == asked

    check()


THINKS = st.text(st.sampled_from(" \n\r<>think/\u4f60"), max_size=8)
REPLY = st.one_of(
    CONTENT, st.tuples(THINKS, CONTENT).map("<think>{0[0]}</think>{0[1]}".format), CONTENT.map("a\n\nUser: {}".format)
)


@pytest.mark.parametrize("thinks", [True, False])
def test_thoughts_and_paragraphs_are_those_of_ours(opened, thinks):
    """In every mode; what ours refuses is refused there."""
    form = replace(NAMED["g1"], thinks=thinks)
    ours = load_tokenizer("bytes")
    theirs = opened(ours, form)

    @settings(max_examples=80, deadline=None)
    @given(st.lists(st.tuples(CONTENT, REPLY, CONTENT), min_size=1, max_size=3), st.sampled_from(list(THINKING)))
    def check(turns, mode):
        template = replace(form, thinking=mode if thinks else "off")
        chat = []
        for question, reply, thought in turns:
            chat += [{"role": "user", "content": question}, {"role": "assistant", "content": reply}]
            if not reply.lstrip().startswith("<think>"):
                chat[-1]["reasoning_content"] = thought
        for messages, asks in ((chat, False), (chat[:-1], True)):
            try:
                pieces = template.prompt(messages) if asks else [text for text, _ in template.segments(messages)]
            except ValueError:
                with pytest.raises(Exception, match=r"empty|has no thought"):
                    theirs.apply_chat_template(messages, thinking=template.thinking, add_generation_prompt=asks)
                continue
            found = theirs.apply_chat_template(messages, thinking=template.thinking, add_generation_prompt=asks)
            assert found == [i for piece in pieces for i in ours.encode(piece)]

    check()


def test_named_templates_are_read_again():
    for template in NAMED.values():
        assert from_jinja(to_jinja(template), {}, []) == (template, [])


def test_pieces_that_a_bpe_joins_are_told(opened):
    """The text is the same, the ids are not: then it is known."""
    ours = train_bpe(["User: a\n\nAssistant: b\n\n" * 9, "\n\n" * 99], 300)
    theirs = opened(ours, Template())
    chat = [{"role": role, "content": "b"} for role in ("user", "assistant", "user")]
    pieces = [text for text, _ in Template().segments(chat)]
    assert theirs.apply_chat_template(chat, tokenize=False) == "".join(pieces)
    assert theirs.apply_chat_template(chat, return_dict=False) != [i for piece in pieces for i in ours.encode(piece)]
    assert not alike_in_one(ours, Template())
    assert theirs.apply_chat_template(chat[:1], add_generation_prompt=True, return_dict=False) == ours.encode(
        Template().prompt(chat[:1])[0]
    )


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


FORM = st.tuples(st.text("User: <|{}%'\"\\\n\u4f60", max_size=8), st.text("User: <|{}%'\"\\\n", max_size=8)).map(
    "{content}".join
)


@settings(max_examples=30, deadline=None)
@given(st.fixed_dictionaries({"user": FORM, "assistant": FORM}, optional={"system": FORM}), st.booleans())
def test_ours_is_read_again(roles, collapse):
    template = Template(roles, collapse_blank_lines=collapse)
    found, notes = from_jinja(to_jinja(template), {}, [])
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


NESTED = "{% for a in range(99999) %}" * 3 + "{% endfor %}" * 3


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
        ("{{ 'a' * 99999999999 }}", r"\* is not run here"),
        (NESTED, "more than 1,000,000 lines"),
        ("a" * 70_000, "is larger than 65,536 bytes"),
    ],
)
def test_foreign_programs_that_no_template_says(program, said):
    with pytest.raises(ValueError, match=said):
        from_jinja(program, {}, ["<s>"])


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
    assert "begins each chat with <|endoftext|>, which is not written here" in capsys.readouterr().err
    (tmp_path / "chat_template.jinja").write_text("You help." + PLAIN)
    assert TextFormat.read(tmp_path).template is None
    said = capsys.readouterr().err
    assert re.search(r"note: .*its chat template is passed over, as it begins each chat .*--template", said)
    OWN.save(tmp_path / "template.yaml")
    assert TextFormat.read(tmp_path).template == OWN and not capsys.readouterr().err
