"""What of a record becomes text, and which part of it is trained."""

import pytest
from prepared import CHAT, documents, jsonl, make

from rwkv_train.data.templates import Template


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
