"""The benchmark of corrections: its cases, what it measures, and the whole of it on a model that knows nothing."""

import json
from dataclasses import replace

import pytest
from feedback_toys import BYTES, CONFIG, FORM, rehearsal_set, small_model
from helpers import random_model, run

import rwkv_train.feedback.learner as learner_module
from rwkv_train import save_model
from rwkv_train.bench import corrections, feedback, joint
from rwkv_train.bench.case_sets import case_set
from rwkv_train.bench.correction_cases import Case, chosen_cases, load_cases
from rwkv_train.bench.correction_measures import Answers, Heldout, by_group, figures, summary
from rwkv_train.bench.correction_tables import COUNTRIES, OPEN, table
from rwkv_train.bench.corrections import Protocol
from rwkv_train.bench.fact_cases import fact_cases, small_talk, strangers_questions, strangers_talk
from rwkv_train.bench.invented_cases import invented_cases
from rwkv_train.bench.invented_relations import RELATIONS
from rwkv_train.data.corpora.catalogue import read_corpus
from rwkv_train.data.corpora.facts import facts
from rwkv_train.data.templates import Template
from rwkv_train.data.text_format import TextFormat
from rwkv_train.feedback import FeedbackConfig, sleep
from rwkv_train.feedback.decode import greedy

BEFORE = (("my cat", "nice"),)
CASES = [
    Case("sun?", "hot", ["the sun?", "sun"], ["sea?", "ice?"], kind="warm", language="en"),
    Case("ice?", "no", ["the ice?"], ["sun?", "sea?"], kind="cold", language="en"),
    Case("fire?", "oh", ["火?"], ["air?"], kind="warm", language="zh"),
    Case("eats?", "ham", ["food?"], ["age?"], kind="cold", language="zh", before=BEFORE),
]
UNRELATED = ["who?", "what?", "when?", "sun?"]
HELDOUT = [[("some text that stays. " * 3, True)], [("and more of it", False), ("here", True)]]
QUICK = {"steps": 8, "contrasts": 1, "rehearsed": 1, "random_prefixes": 1, "paraphrases": 1}


def lines(cases) -> str:
    written = [{name: value for name, value in vars(case).items() if value} for case in cases]
    return "\n".join(json.dumps(case, ensure_ascii=False) for case in written)


@pytest.fixture
def brief(monkeypatch):
    """Models of random weights go on and on, and know nothing."""
    for name in ("lesson.MAX_REPLY", "decode.MAX_REPLY"):
        monkeypatch.setattr(f"rwkv_train.feedback.{name}", 12)
    monkeypatch.setattr(corrections, "MAX_NEW_TOKENS", 4)
    monkeypatch.setattr(corrections, "IDLE", 20)
    monkeypatch.setattr(corrections.RehearsalSet, "of_model", lambda base, form: rehearsal_set(base))


@pytest.fixture
def protocol(brief):
    return Protocol(small_model(), FORM, CASES, UNRELATED, HELDOUT)


def test_cases_come_back_from_a_file(tmp_path):
    path = tmp_path / "cases.jsonl"
    path.write_text(lines(CASES), encoding="utf-8")
    assert load_cases(path) == CASES
    path.write_text('{"question": "a", "answer": "b", "neighbours": [{"question": "c", "answer": "d"}]}\n')
    assert load_cases(path) == [Case("a", "b", neighbours=["c"])]


@pytest.mark.parametrize(
    "wrong",
    [
        "{}",
        "[1]",
        '{"question": "a"}',
        '{"question": "a", "answer": " "}',
        '{"question": "a", "answer": "b", "paraphrase": ["c"]}',
        '{"question": "a", "answer": "b", "paraphrases": "c"}',
        '{"question": "a", "answer": "b", "neighbours": [1]}',
        '{"question": "a", "answer": "b", "before": [["c"]]}',
        '{"question": "a", "answer": "b", "before": ["cd"]}',
        '{"question": "a", "answer": "b", "kind": 1}',
    ],
)
def test_what_is_no_case_is_refused_with_its_line(wrong, tmp_path):
    path = tmp_path / "cases.jsonl"
    path.write_text(f'{{"question": "a", "answer": "b"}}\n{wrong}\n')
    with pytest.raises(ValueError, match=r"cases.jsonl:2: no case"):
        load_cases(path)


def test_some_of_the_cases_are_of_all_sorts():
    assert chosen_cases(CASES, [], None) == chosen_cases(CASES, [], 9) == CASES
    assert chosen_cases(CASES, ["cold"], None) == CASES[1::2]
    cases = case_set("open").cases
    some = chosen_cases(cases, [], 32)
    assert len(some) == 32 and some == [case for case in cases if case in some]
    assert {(c.kind, c.language) for c in some} == {(c.kind, c.language) for c in cases}
    with pytest.raises(ValueError, match="no case is of the kind 'dry'; there are: warm, cold"):
        chosen_cases(CASES, ["dry"], None)
    with pytest.raises(ValueError, match="limit must be at least 1"):
        chosen_cases(CASES, [], 0)


def test_cases_written_by_hand_are_whole():
    for cases in (case_set(name).cases for name in ("open", "open-final")):
        assert len(cases) >= 100 and len({case.kind for case in cases}) == 8
        assert {case.language for case in cases} == {"en", "zh"}
        assert all(len(case.paraphrases) >= 3 <= len(case.neighbours) for case in cases)
        assert all(bool(case.before) == (case.kind == "follow-ups") for case in cases)
        assert len({case.asked for case in cases}) == len({case.answer for case in cases}) == len(cases)


def test_a_thousand_cases_are_always_the_same_and_spare_what_they_watch():
    cases = case_set("thousand").cases
    assert len(cases) == 1000 == len({case.asked for case in cases}) and cases == case_set("thousand").cases
    invented = invented_cases(500)
    taught, watched = ({q for c in invented for q in some(c)} for some in (_asked, lambda c: c.neighbours))
    assert not taught & watched and invented_cases(500, seed=1) != invented
    assert all(len(set(case.neighbours)) == 3 == len(set(case.paraphrases)) for case in invented)
    assert min(sum(len(r) for (_, code), r in RELATIONS.items() if code == language) for language in ("en", "zh")) >= 10


def _asked(case: Case) -> list[str]:
    return [case.question, *case.paraphrases]


def test_false_facts_spare_what_they_watch():
    cases = fact_cases()
    assert cases == fact_cases() and len(cases) > 100
    true = {f.questions()[0]: f.answer for f in facts()}
    taught = {c.question for c in cases}
    for case in cases:
        assert case.answer != true[case.question] and len(case.paraphrases) == 4 and case.same_subject
        for watched in (*case.neighbours, *case.same_subject):
            assert watched in true and watched not in taught
    assert len(set(small_talk())) == 200 == len(set(strangers_questions()))
    assert sum(len(text) for talk in strangers_talk(count=10) for text, spoken in talk if spoken) > 10_000


def test_unread_questions_are_in_nothing_that_the_starter_read_and_in_no_case():
    unread = set(strangers_questions())
    for corpus in ("talk", "chitchat/170"):  # of configs/starter.yaml
        assert not unread & {m["content"].strip() for _, chat in read_corpus(corpus) for m in chat["messages"]}
    for name in ("open", "open-final"):
        assert not any(unread & {*_asked(case), *case.neighbours} for case in case_set(name).cases)


def test_answers_in_batches_are_those_one_by_one():
    model = small_model()
    answers = Answers(model, FORM, 9)
    asked = [a for case in CASES for a in case.asking([case.question, *case.paraphrases])]
    together = answers.of(model, asked)
    assert together == [answers.of(model, [a])[0] for a in asked] == list(answers.of_base(asked).values())
    written = "User: my cat\n\nAssistant: nice\n\nUser: eats?\n\nAssistant:"
    (reply,) = greedy(model, FORM, [[0, *BYTES.encode(written)]], max_new_tokens=9)
    assert FORM.shown(reply) == together[asked.index(CASES[3].asked)]


class Said(Answers):
    """Answers that models give by heart."""

    def of(self, model, asked, state=None):
        return [model.get(a.question, "?") for a in asked]


def test_what_counts_as_understood_as_leaked_and_as_before():
    base = {"sun?": "x", "the sun?": "x", "sun": "y", "sea?": "hot", "ice?": "z", "who?": "me"}
    now = {"sun?": "hot", "the sun?": "hot", "ice?": "hot", "sea?": "hot", "who?": "me"}
    answers = Said(base, FORM, 9)
    (alone,) = answers.judge(now, CASES[:1], also=False)
    assert alone.values["all retained"] == [True]
    assert alone.values["paraphrases"] == [True, False] and alone.values["paraphrases alike to the base"] == [True]
    assert alone.values["alike, of the paraphrases"] == [True, False]
    # The base said it of the sea.
    assert alone.values["leaks"] == [False, True] and alone.values["neighbours as before"] == [True, False]
    assert alone.said["ice?"] == ("z", "hot")
    both = answers.judge(now, CASES[:2], also=False)
    # The ice and the sun are taught, too, and so no neighbours.
    assert both[0].values["leaks"] == [False] and len(both[1].values["leaks"]) == 1
    (also,) = answers.judge(now, CASES[:1], also=True)
    assert also.values["other paraphrases"] == [False] and "paraphrases" not in also.values
    assert answers.identical(now, ["who?", "sun?"]) == [True, False]
    found = by_group(both, CASES)
    assert list(found) == ["warm", "cold", "en"] and found["en"]["cases"] == 2 and found["warm"]["all retained"] == 1
    assert figures(both)["all retained"] == 0.5


def test_the_rise_of_parts_is_that_of_the_whole():
    base, other = small_model(), small_model(1)
    heldout = Heldout(base, FORM, HELDOUT)
    assert heldout.rise(base).values == {"perplexity rise": [0.0]}
    losses = [heldout.rise(other, slice(i, None, 2)).values["perplexity rise"][0] for i in range(2)]
    whole = heldout.rise(other).values["perplexity rise"][0]
    assert min(losses) < whole < max(losses)
    assert heldout.opening(5) == [0, *BYTES.encode("some")]


def test_one_stream_measured_on_its_way_is_several_streams(protocol):
    recipe = FeedbackConfig(**vars(CONFIG) | QUICK)
    (two, half), (three, whole) = protocol.stream(recipe, [2, 3], seed=5)
    ((_, alone),) = protocol.stream(recipe, [2], seed=5)
    assert (two, three, protocol.unrelated) == (2, 3, UNRELATED[:3])  # the sun is taught

    def steady(marks):
        found = figures(marks)
        return {name: found[name] for name in found if not name.startswith(("time", "received", "seconds"))}

    assert steady(half) == pytest.approx(steady(alone), nan_ok=True)
    assert [mark.case is None for mark in whole] == [False] * 3 + [True] * 2
    with pytest.raises(ValueError, match="there are 4 cases, fewer than 5"):
        protocol.drawn(0, 5)


def test_what_was_read_and_what_was_not_are_measured_apart(protocol, monkeypatch):
    assert "unread identical" not in figures(protocol.after(protocol.base, CASES))
    protocol = Protocol(protocol.base, FORM, CASES, ["who?", "what?"], HELDOUT, unread=["when?", "sun?"])
    monkeypatch.setattr(protocol.answers, "identical", lambda model, questions: [q == "when?" for q in questions])
    found = figures(protocol.after(protocol.base, CASES))
    assert (found["unrelated identical"], found["unread identical"]) == (0, 1)  # the sun is taught


def test_a_first_paraphrase_that_is_taught_is_understood(protocol):
    protocol.also = True
    for marks in protocol.alone(CONFIG, [(CASES[0], 0), (CASES[3], 1)]):
        assert marks.values["accepted"] == [True, True] and len(marks.values["time over generation"]) == 2
        assert marks.said[marks.case.paraphrases[0]][1] == marks.case.answer
        assert len(marks.values["other paraphrases"]) == len(marks.case.paraphrases) - 1


def test_a_correction_stands_in_its_dialogue(protocol):
    own, drawn = (protocol.correction(case, 0) for case in (CASES[3], CASES[0]))
    assert BYTES.decode(list(own.context)) == "User: my cat\n\nAssistant: nice\n\n"
    assert BYTES.decode(list(drawn.context)).count("User: ") == 3
    longer = Protocol(protocol.base, FORM, CASES, UNRELATED, HELDOUT, before=900)
    assert longer.correction(CASES[3], 0) == own
    assert 900 <= len(longer.correction(CASES[0], 0).context) <= 900 + len(drawn.context)
    assert longer.correction(CASES[0], 0).context[: len(drawn.context)] == drawn.context
    with pytest.raises(ValueError, match="before needs unrelated questions"):
        Protocol(protocol.base, FORM, CASES, ["sun?"], HELDOUT, before=900)
    with pytest.raises(ValueError, match=r"a reply cannot be 'a\\n\\nb'"):
        Protocol(protocol.base, FORM, [Case("q?", "a\n\nb")], UNRELATED, HELDOUT)


def test_learnt_together_all_are_known(protocol, monkeypatch):
    monkeypatch.setattr(sleep, "STEPS", 20)
    model = joint.learnt_together(protocol, FeedbackConfig(**vars(CONFIG) | QUICK), CASES, 0, lambda: None)
    assert figures(protocol.after(model, CASES))["all retained"] == 1


def test_a_recipe_is_read():
    assert feedback.chosen_recipe(None) == FeedbackConfig()
    assert feedback.chosen_recipe("steps=3, trainable=lora,pull=2") == FeedbackConfig(
        steps=3, trainable="lora", kl_weight=2.0
    )
    for wrong, told in (("steps", "sets nothing"), ("steps=x", "a whole number"), ("stepz=1", "no setting stepz")):
        with pytest.raises(ValueError, match=told):
            feedback.chosen_recipe(wrong)


def test_a_table_shows_the_worst_seed_where_it_differs():
    results = {"N=30": summary([{"leaks": 0.1, "all retained": 1.0}, {"leaks": 0.3, "all retained": 1.0}], {"leaks"})}
    shown = table(results, OPEN)
    assert "| 20.0% (30.0%) | ≤ 2.0% / 4.0% / 4.0% / 6.0% |" in shown and "| 100.0%        |" in shown


@pytest.fixture
def here(tmp_path, monkeypatch, brief):
    """A model of random weights in a folder of its own, and a recipe that such a model can learn with."""
    monkeypatch.chdir(tmp_path)
    recipe = lambda **k: FeedbackConfig(**(vars(CONFIG) | QUICK | {"steps": 2} | k))  # noqa: E731
    monkeypatch.setattr(learner_module, "FeedbackConfig", recipe)
    monkeypatch.setattr("rwkv_train.bench.case_sets.SINGLES", 1)
    save_model(random_model(n_embd=48, vocab_size=257), "model.pth")
    TextFormat(BYTES, Template()).save(tmp_path)
    (tmp_path / "q.txt").write_text("who?\nwhat?\nwhen?\n")
    (tmp_path / "text.txt").write_text("some text that stays as it is. " * 20)
    return tmp_path


FLAGS = "bench feedback --model=model.pth --cases=c.jsonl --unrelated=q.txt --heldout=text.txt --json=r.json".split()


def test_bench_feedback_of_false_facts(here, capsys):
    cases = [
        {"question": f"{q}?", "answer": a, "neighbours": [{"question": q}]} for q, a in (("sun", "hot"), ("ice", "no"))
    ]
    (here / "c.jsonl").write_text("\n".join(map(json.dumps, cases)))
    argv = ["--counts=[1,2]", "--controls=[2]", "--seeds=1", "--plot=r.svg"]
    code, out, err = run(*FLAGS, *argv, capsys=capsys)
    assert code == 0, err
    measured = [name for name in COUNTRIES.measures if name not in ("same subject changed", "unread identical")]
    columns = ["N=2", "step_factor 0, N=2", "naive, N=2", "state only, N=2", "busy over"]
    assert all(name in out for name in [*measured, *columns])
    results = json.loads((here / "r.json").read_text())["results"]["recipes"]
    assert "<svg" in (here / "r.svg").read_text()
    still = {name: value["mean"] for name, value in results["step_factor 0, N=2"].items()}
    assert still["all retained"] == 0 and still["unrelated identical"] == 1 and still["neighbours changed"] == 0
    assert still["perplexity rise"] == pytest.approx(0, abs=1e-6)
    assert results["N=1"]["newest, empty state"] == results["N=1"]["all retained"]


def test_bench_feedback_of_kinds_of_talk(here, capsys):
    (here / "c.jsonl").write_text(lines(CASES), encoding="utf-8")
    argv = ["--counts=[1,2]", "--controls=[2]", "--seeds=1", "--answers=a.jsonl", "--limit=3"]
    code, out, err = run(*FLAGS, *argv, capsys=capsys)
    assert code == 0, err
    assert all(name in out for name in ("leaks", "N=2", "naive, N=2", "joint, N=2", "| N=1        | warm"))
    assert err.count("N=2, seed 0") == 3 and "busy" not in out
    results = json.loads((here / "r.json").read_text())["results"]
    assert set(results["kinds"]["N=1"]) == {"warm", "cold", "en", "zh"} and "joint, N=2" in results["recipes"]
    answers = [json.loads(line) for line in (here / "a.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(answers) == 3 + 2 + 2 + 2 and answers[0]["said"].keys() >= {answers[0]["case"]["question"]}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--seeds=0"], "seeds must be at least 1"),
        (["--counts=[]", "--controls=[]"], "nothing would be measured"),
        (["--plot=x.foo"], "--plot x.foo cannot be drawn"),
        (["--plot=nowhere/x.svg"], "cannot be drawn"),
        (["--json=nowhere/r.json"], "nowhere"),
        (["--recipe=steps=1,steps=2"], "sets steps twice"),
        (["--heldout=empty.txt"], "empty.txt is empty"),
        (["--also=true"], "no case has any"),
    ],
)
def test_what_would_fail_in_the_end_is_refused_at_once(here, capsys, monkeypatch, flags, message):
    (here / "empty.txt").write_text("\n")
    (here / "c.jsonl").write_text(lines([replace(case, paraphrases=[]) for case in CASES]), encoding="utf-8")
    monkeypatch.setattr("rwkv_train.bench.feedback.corrected", lambda *_: pytest.fail("it is being measured"))
    code, out, err = run(*FLAGS, *flags, capsys=capsys)
    assert code == 1 and message in err and not out, out + err


def test_more_corrections_than_cases_are_refused(here, capsys):
    (here / "c.jsonl").write_text(lines(CASES), encoding="utf-8")
    code, _, err = run(*FLAGS, "--counts=[5]", capsys=capsys)
    assert code == 1 and "counts must be from 1 to 4, as there are so many cases; found 5" in err
