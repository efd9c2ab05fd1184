"""What of a record becomes text, and which part of it is trained."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prepared import CHAT, documents, jsonl, make

from rwkv_train.data.render import Columns, render
from rwkv_train.data.templates import Template

BARE = {"user": "{content}\n", "assistant": "{content}\n"}  # a template that knows no system
SHAREGPT = [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]


def test_pairs_train_the_completion_and_the_end(tmp_path):
    source = jsonl(tmp_path / "x.jsonl", [{"prompt": "Q: 1+1\nA:", "completion": " 2\n"}] * 2)
    assert documents(make(tmp_path, source)) == [("Q: 1+1\nA: 2\n", " 2\n$")] * 2
    rows = [{"instruction": "Add", "input": "1+1", "output": "=2"}, {"instruction": "Go", "output": "!"}]
    columns = {"prompt_field": "instruction,input", "completion_field": "output"}
    store = make(tmp_path, jsonl(tmp_path / "y.jsonl", rows), out="columns", **columns)
    assert documents(store) == [("Add\n1+1=2", "=2$"), ("Go!", "!$")]


WRITTEN = "System: Be brief.\n\nUser: Hi\nthere\n\nAssistant: Hello!\n\nUser: Bye\n\nAssistant: See\nyou.\n\n"


@pytest.mark.parametrize(
    ("roles", "trained"),
    [
        (["assistant"], " Hello!\n\n See\nyou.\n\n$"),
        (["user"], " Hi\nthere\n\n Bye\n\n"),
        (["user", "assistant"], " Hi\nthere\n\n Hello!\n\n Bye\n\n See\nyou.\n\n$"),
        (["system"], " Be brief.\n\n"),
    ],
)
def test_messages_train_the_roles_asked_for(tmp_path, roles, trained):
    names = {"system": "system", "user": "human", "assistant": "gpt"}
    sharegpt = [{"from": names[m["role"]], "value": m["content"]} for m in CHAT]
    source = jsonl(tmp_path / "x.jsonl", [{"messages": CHAT}, {"conversations": sharegpt}])
    assert documents(make(tmp_path, source, train_roles=roles)) == [(WRITTEN, trained)] * 2


def test_generation_prompt_is_what_training_saw():
    template = Template()
    both = Template(train_roles=["user", "assistant"])
    assert both.prompt(CHAT[:2]) == [text for text, _ in both.segments(CHAT[:3])[:-1]]
    segments = template.segments(CHAT)
    assert [trained for _, trained in segments] == [
        False,
        True,
        False,
        True,
    ]  # joined as generation reads them
    assert segments[-1] == (" See\nyou.\n\n", True)
    assert template.prompt(CHAT[:4]) == [text for text, _ in segments[:-1]]
    assert template.prompt([]) == ["Assistant:"]


def test_template_file(tmp_path):
    (tmp_path / "t.yaml").write_text(
        'roles: {user: "<u>{content}</u>", bot: "<b> {content}</b>"}\ntrain_roles: [bot]\ncollapse_blank_lines: false\n'
    )
    messages = [{"role": "user", "content": "a\n\n{content}"}, {"role": "bot", "content": "b"}]
    source = jsonl(tmp_path / "x.jsonl", [{"chat": messages}])
    store = make(tmp_path, source, template=str(tmp_path / "t.yaml"), messages_field="chat", kind="messages")
    assert documents(store) == [("<u>a\n\n{content}</u><b> b</b>", " b</b>$")]
    assert Template(**store.manifest["request"]["template"]) == Template.load(tmp_path / "t.yaml")
    for content in ("rolls: {}", "roles: [1]", "roles: {user: hello}", "train_roles: [cat]", "{", "[]"):
        (tmp_path / "t.yaml").write_text(content)
        with pytest.raises(ValueError, match="emplate"):
            Template.load(tmp_path / "t.yaml")


chats = st.lists(
    st.tuples(st.sampled_from(["user", "assistant", "system"]), st.sampled_from(["a", "b c", "d\n\ne"])), min_size=1
)


@given(chat=chats, data=st.data(), template=st.sampled_from([Template(), Template(BARE | {"system": "{content}"})]))
def test_weights_change_what_is_trained_and_no_token(chat, data, template):
    plain = [{"role": role, "content": content} for role, content in chat]
    weighed = [message | {"weight": data.draw(st.sampled_from([0, 1, None]))} for message in plain]
    pieces = zip(template.segments(plain), template.segments(weighed), strict=False)
    assert "".join(text for text, _ in template.segments(plain)) == "".join(t for t, _ in template.segments(weighed))
    if template == Template():
        kept = iter([m["weight"] != 0 for m in weighed if m["role"] == "assistant"])
        assert all(text == same and now == (was and next(kept)) for (text, was), (same, now) in pieces)
        assert template.prompt(weighed) == template.prompt(plain)
    trained = "".join(text for text, trained in template.segments(weighed) if trained)
    wanted = [m for m in weighed if m["role"] == "assistant" and m["weight"] != 0]
    assert trained == "".join(text for m in wanted for text, trained in template.segments([m]) if trained)


@pytest.mark.parametrize("weight", [2, -1, 0.5, True, "0", [1]])
def test_any_other_weight_is_refused(weight):
    messages = [CHAT[1], CHAT[2] | {"weight": weight}]
    with pytest.raises(ValueError, match=r"message 2: weight .* must be 0 \(not trained\) or 1 \(trained\)"):
        render({"messages": messages}, "auto", Template(), Columns())


def test_a_weight_of_0_at_the_end_does_not_train_the_end(tmp_path, capsys):
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}] * 2
    chat = [m | {"weight": w} for m, w in zip(chat, (1, 1, None, 0), strict=True)]
    store = make(tmp_path, jsonl(tmp_path / "x.jsonl", [{"messages": chat}, {"messages": chat[2:]}, {"text": "c"}]))
    assert [trained for _, trained in documents(store)] == [" b\n\n", "", "c$"]
    out = capsys.readouterr().out
    assert 'not trained: messages of "weight": 0 (2 records)\n' in out
    assert 'not trained: messages of "weight": 1 whose role is none of --train-roles (1 record)\n' in out
    assert "not trained: all of a chat (1 record)\n" in out


@pytest.mark.parametrize(
    ("record", "text"),
    [
        ({"system": "Be kind.", "conversations": SHAREGPT}, "System: Be kind.\n\nUser: Q\n\nAssistant: A\n\n"),
        ({"system": " ", "conversations": SHAREGPT}, "User: Q\n\nAssistant: A\n\n"),
        ({"system": None, "messages": CHAT[1:3]}, "User: Hi\nthere\n\nAssistant: Hello!\n\n"),
        ({"system": "Be brief.", "messages": CHAT[:2]}, "System: Be brief.\n\nUser: Hi\nthere\n\n"),
        ({"system": "Be kind.", "prompt": "Q", "completion": "A"}, "Be kind.\nQA"),
    ],
)
def test_a_system_column_comes_first(record, text):
    found = render(record, "auto", Template(), Columns())
    assert "".join(text for text, _ in found.segments) == text and not found.unused
    assert len([remark for remark in found.remarks if '"system"' in remark]) == ("kind" in text)


def test_a_system_column_that_contradicts_the_chat_is_refused():
    with pytest.raises(ValueError, match='both a "system" column and a system message'):
        render({"system": "Be kind.", "messages": CHAT}, "auto", Template(), Columns())
    with pytest.raises(ValueError, match='the "system" column needs a role'):
        render({"system": "Be kind.", "messages": CHAT[1:]}, "auto", Template(BARE), Columns())


def test_a_system_column_that_was_asked_for_is_used_once():
    columns = Columns(prompt="instruction, system", completion="output")
    found = render({"instruction": "Q", "system": "S", "output": "A"}, "auto", Template(), columns)
    assert found.segments == [("Q\nS", False), ("A", True)] and found.unused == found.remarks == ()


def test_what_is_not_used_is_named_with_its_count(tmp_path, capsys):
    tool = {"role": "assistant", "content": "x", "name": "bot", "tool_calls": [], "refusal": None}
    records = [
        {"messages": [CHAT[1], tool, tool], "tools": [{}], "id": 3, "text": "lost", "meta": None},
        {"messages": CHAT, "tools": [{}], "\ud83d": 1},
        {"prompt": "Q", "completion": "A", "history": [["a", "b"]], "system": 7},
    ]
    (tmp_path / "x.jsonl").write_text("\n".join(map(json.dumps, records)))
    make(tmp_path, tmp_path / "x.jsonl")
    out = capsys.readouterr().out
    (line,) = [line for line in out.splitlines() if line.startswith("not used: ")]
    assert sorted(line.removeprefix("not used: ").split(", ")) == [
        '"\\ud83d" (1 record)', '"history" (1 record)', '"id" (1 record)', '"messages.name" (1 record)',
        '"messages.tool_calls" (1 record)', '"system" (1 record)', '"text" (1 record)', '"tools" (2 records)',
    ]  # fmt: skip
    assert 'pairs are trained without their "history"' in out


columns = st.fixed_dictionaries(
    {},
    optional={name: st.none() for name in ("text", "prompt", "completion", "messages", "conversations", "system", "x")},
)


@given(nulls=columns, record=st.sampled_from([{"text": "t"}, {"prompt": "p", "completion": "c"}, {"messages": CHAT}]))
def test_a_null_column_is_as_if_absent(nulls, record):
    assert render(nulls | record, "auto", Template(), Columns()) == render(record, "auto", Template(), Columns())


def test_a_chat_of_nothing_is_refused():
    with pytest.raises(ValueError, match='"messages" holds nothing but empty messages'):
        render({"messages": [{"role": "system", "content": ""}]}, "auto", Template(), Columns())
