"""Corrections of models in 16, 8 and 4 bits: what is trained is float32, and everything else stays as it is."""

from dataclasses import replace
from itertools import product
from typing import get_args

import pytest
import torch
from feedback_toys import BYTES, CONFIG, QUICK, rehearsal_set, small_model
from helpers import assert_close_rel

from rwkv_train import load_model, save_model
from rwkv_train.feedback import Learner, Reading
from rwkv_train.feedback.snapshots import weights_hash
from rwkv_train.feedback.texts import log_probs
from rwkv_train.feedback.trainable import Trainable, changed, trained_twin
from rwkv_train.generate import Sampling, prefill, stream_tokens
from rwkv_train.models.quantised import BITS, quantise
from rwkv_train.ops.products import as_wide, is_quantised

FORMATS = ("bf16", "fp16", "int8", "nf4")
WITHIN = {"bf16": 0.05, "fp16": 0.01, "int8": 0.05, "nf4": 0.05}


def small_in(dtype: str, generation="rwkv4"):
    if dtype in BITS:
        pytest.importorskip("torchao")
        return quantise(small_model(generation=generation).bfloat16(), dtype)
    return small_model(generation=generation).to({"bf16": torch.bfloat16, "fp16": torch.float16}[dtype])


def open_in(dtype: str, folder, config=CONFIG, generation="rwkv4") -> Learner:
    model = small_in(dtype, generation)
    return Learner(model, BYTES, folder / "profile", config=config, rehearsal=rehearsal_set(model))


def as_float32(model):
    """A model with the same numbers, all in float32."""
    wide = small_model(generation="rwkv7" if model.name == "RWKV-7" else "rwkv4")
    for name, p in model.named_parameters():
        wide.get_parameter(name).copy_(as_wide(p))
    return wide


@pytest.mark.parametrize(("dtype", "generation"), [*((dtype, "rwkv4") for dtype in FORMATS), ("bf16", "rwkv7")])
def test_corrections_are_learnt_replayed_and_undone_exactly(tmp_path, dtype, generation):
    with open_in(dtype, tmp_path, generation=generation) as learner:
        base = weights_hash(learner.base.state_dict())
        hashes = [learner.weights]
        for correction in QUICK[:2]:
            outcome = learner.learn(correction)
            assert outcome.accepted and outcome.answer_after == correction.answer, outcome
            hashes.append(outcome.weights)
        assert [learner.answer(c.question) for c in QUICK[:2]] == ["hot", "cold"]
        assert {w.dtype for w in changed(learner.model, learner.base).values()} == {torch.float32}
        assert weights_hash(learner.base.state_dict()) == base
    with open_in(dtype, tmp_path, generation=generation) as learner:  # from its snapshot
        assert learner.weights == hashes[2]
        for file in (tmp_path / "profile" / "snapshots").iterdir():
            file.unlink()
        assert learner.replay() == hashes[2]
        learner.undo()
        assert learner.weights == hashes[1]
        learner.undo()
        assert learner.model is learner.base and learner.weights == hashes[0]


@pytest.mark.parametrize("trainable", get_args(Trainable))
@pytest.mark.parametrize("dtype", FORMATS)
def test_only_what_is_trained_is_float32(dtype, trainable):
    base = small_in(dtype)
    twin, parameters = trained_twin(base, trainable)
    ours = changed(twin, base)
    assert parameters and {p.dtype for p in [*parameters.values(), *ours.values()]} == {torch.float32}
    others = [p for name, p in twin.named_parameters() if name not in ours]
    assert all(any(p is q for q in base.parameters()) for p in others)


@pytest.mark.parametrize(
    ("trainable", "dtype"),
    [*product(["upper", "full", "lora"], FORMATS), ("pissa", "nf4"), ("miss", "nf4"), ("miss", "bf16")],
)
def test_whatever_is_trained_learns(tmp_path, trainable, dtype):
    with open_in(dtype, tmp_path, replace(CONFIG, trainable=trainable, steps=300)) as learner:
        outcome = learner.learn(QUICK[0])
        assert outcome.accepted and learner.answer("sun?") == "hot", outcome
        assert all(share > 0 for share in learner.diff().values())


@pytest.mark.parametrize("dtype", FORMATS)
def test_predictions_are_those_of_the_same_numbers_in_float32(tmp_path, dtype, generation):
    with open_in(dtype, tmp_path, generation=generation) as learner:
        learner.learn(QUICK[0])
        for model in (learner.base, learner.model):
            found = log_probs(model, learner.rehearsal.rows)
            assert found.dtype == torch.float32
            assert_close_rel(found, log_probs(as_float32(model), learner.rehearsal.rows), WITHIN[dtype])


@pytest.mark.parametrize("dtype", FORMATS)
def test_a_token_at_a_time_reads_as_a_text_at_once(tmp_path, dtype, generation):
    with open_in(dtype, tmp_path, generation=generation) as learner:
        learner.learn(QUICK[0])
        model, prompt = learner.model, learner.form.prompt("sun?")
        logits, state = prefill(model, prompt)
        tokens = list(stream_tokens(model, logits, state, Sampling(temperature=0), 8, frozenset(), None))
        ids = [token for token, _ in tokens]
        assert BYTES.decode(ids).startswith(" hot")
        at_once = model(torch.tensor([prompt + ids]))[0][0]
        before = [state, *(s for _, s in tokens[:-1])]
        one_by_one = torch.stack([prefill(model, [token], s)[0] for token, s in zip(ids, before, strict=True)])
        assert_close_rel(one_by_one.float(), at_once[-len(ids) :].float(), WITHIN[dtype])


@pytest.mark.parametrize("dtype", FORMATS)
def test_a_text_is_read_and_undone(tmp_path, dtype):
    with open_in(dtype, tmp_path, replace(CONFIG, learn_rate=0.01)) as learner:
        outcome = learner.learn(Reading("to and fro " * 100))
        assert outcome.accepted and outcome.loss_after < outcome.loss_before
        learner.undo()
        assert learner.model is learner.base


@pytest.mark.parametrize("dtype", FORMATS)
def test_a_corrected_model_is_saved_and_opens_in_float32(tmp_path, dtype):
    """A file that mixes formats opens in the widest; what is in 8 bits is written as it computes."""
    with open_in(dtype, tmp_path) as learner:
        learner.learn(QUICK[0])
        for name in ("m.pth", "m.safetensors", "folder"):
            save_model(learner.model, tmp_path / name)
            opened = load_model(tmp_path / name)
            assert opened.dtype == torch.float32 and learner.answer("sun?", opened) == "hot"
            for n, w in changed(learner.model, learner.base).items():
                assert torch.equal(opened.get_parameter(n), w)


def test_a_profile_says_in_which_number_format_it_was_begun(tmp_path):
    open_in("bf16", tmp_path).close()
    with pytest.raises(ValueError, match="model in bf16, and this one is in fp16; open it with --dtype bf16"):
        open_in("fp16", tmp_path)


@pytest.mark.parametrize("dtype", BITS)
def test_weights_in_few_bits_are_told_from_others(dtype):
    model = small_in(dtype)
    plain = [n for n, p in model.named_parameters() if p.ndim == 2 and not is_quantised(p)]
    assert plain == ["emb.weight", "head.weight"]
