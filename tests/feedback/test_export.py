"""What was learnt is training data, and says last what was said last."""

import json

from feedback_toys import BYTES, FORM, open_learner

from rwkv_train.data.prepare import PrepareConfig, prepare
from rwkv_train.feedback import Correction
from rwkv_train.feedback.export import export


def test_export_is_training_data(tmp_path):
    learner = open_learner(tmp_path)
    learner.learn(Correction("sun?", "hot", rejected="cold"))
    assert learner.export(tmp_path / "out.jsonl").chats == 1
    learner.close()
    store = prepare(PrepareConfig([str(tmp_path / "out.jsonl")], str(tmp_path / "store"), tokenizer="bytes"))
    trained = [int(t) for t, m in zip(store.tokens, store.mask, strict=True) if m]
    assert BYTES.decode(trained) == " hot\n\n"
    (pair,) = map(json.loads, (tmp_path / "out.jsonl.pairs.jsonl").read_text().splitlines())
    assert pair == {"prompt": "User: sun?\n\nAssistant:", "chosen": "hot", "rejected": "cold"}


def test_of_several_answers_to_a_question_the_last_is_exported(tmp_path):
    first, other = Correction("sun?", "hot"), Correction("sea?", "wet")
    path, bad = tmp_path / "bad.jsonl", [Correction("sun?", None, rejected=reply) for reply in ("hot", "cold")]
    assert export([first, *bad, other], FORM, path).chats == len(path.read_text().splitlines()) == 1
    for last, answers in [
        (Correction("sun?", "cold"), ["wet", "cold"]),
        (Correction("sun?", "hot", rejected="no"), ["hot", "wet", "hot"]),
        (Correction("sun?", None, rejected="hot"), ["wet"]),
        (Correction("sun?", None, rejected="cold"), ["hot", "wet"]),
    ]:
        path = tmp_path / f"{len(list(tmp_path.iterdir()))}.jsonl"
        exported = export([first, other, last], FORM, path)
        written = [json.loads(line)["messages"][-1]["content"] for line in path.read_text().splitlines()]
        assert written == answers and exported.replaced == 2 + (last.answer is not None) - len(answers)
