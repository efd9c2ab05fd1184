"""States that other programs read, and theirs that we read: logits equal those of the PyPI package rwkv."""

import pytest
import torch
from helpers import assert_close_rel, random_model, run, save_point
from runs import config_of

from rwkv_train import load_model, save_model
from rwkv_train.chat.dialogue import Dialogue
from rwkv_train.checkpoints.modelfile import save_adapter
from rwkv_train.checkpoints.states import from_rwkv, load_state, save_state, to_rwkv
from rwkv_train.config import ModelConfig, TrainConfig
from rwkv_train.generate import Sampling
from rwkv_train.models.adapters import tune
from rwkv_train.models.rwkv7 import RWKV7
from rwkv_train.tokenizer import load_tokenizer
from rwkv_train.train.fit import fit

N = 64  # the size of a head in rwkv
TOKENS = torch.randint(31, (1, 12), generator=torch.Generator().manual_seed(0))


def model_of(generation, **more):
    sizes = {"n_embd": 16} if generation == "rwkv4" else {"n_embd": 128, "head_size": N}
    return random_model(n_layer=3, n_ffn=40, generation=generation, **sizes | more)


def time_states(heads=2, layers=3):
    rng = torch.Generator().manual_seed(1)
    return {f"blocks.{i}.att.time_state": torch.randn(heads, N, N, generator=rng) for i in range(layers)}


@torch.no_grad()
def tuned(model):
    """A model that begins in a state as `tune` trains it."""
    tune(model, "state", 0)
    model.initial_wkv.normal_(generator=torch.Generator().manual_seed(1))
    model.repair_initial_state()
    return model


@torch.no_grad()
def test_a_tuned_state_of_others_alone_and_merged(rwkv_package, tmp_path):
    """rwkv's own loop reads no time_state for RWKV-7: it is given the state as a list, as its users do."""
    model, state = model_of("rwkv7"), time_states()
    save_model(model, tmp_path / "base.pth")
    torch.save(state, tmp_path / "state.pth")
    torch.save(model.state_dict() | state, tmp_path / "merged.pth")
    theirs = rwkv_package(tmp_path / "merged", "rwkv7")
    shift = torch.zeros(128)
    given = [part for i in range(3) for part in (shift, theirs.z[f"blocks.{i}.att.time_state"], shift)]
    expected = theirs.forward(TOKENS[0].tolist(), given, full_output=True)[0]
    for name in (f"{tmp_path}/base.pth+{tmp_path}/state.pth", tmp_path / "merged.pth"):
        assert_close_rel(load_model(name)(TOKENS)[0][0], expected, 1e-5)
    assert not torch.allclose(model(TOKENS)[0][0], expected, atol=0.1)


@pytest.mark.parametrize("name", ["m.pth", "m.safetensors"])
def test_a_tuned_state_goes_out_as_it_came_in(tmp_path, name):
    model, state = model_of("rwkv7"), time_states()
    torch.save(model.state_dict() | state, tmp_path / "merged.pth")
    opened = load_model(tmp_path / "merged.pth")
    assert not opened.initial_shift.any() and not opened.initial_shift.requires_grad
    save_model(opened, tmp_path / name)
    save_adapter(tmp_path / "merged.pth", tmp_path / f"adapter_{name}")
    if name == "m.pth":
        whole, alone = (torch.load(tmp_path / n, weights_only=True) for n in (name, f"adapter_{name}"))
        assert whole.keys() == model.state_dict().keys() | state.keys() and alone.keys() == state.keys()
        assert all(torch.equal(found[key], t) for key, t in state.items() for found in (whole, alone))
    save_model(model, tmp_path / "base.pth")
    for path in (tmp_path / name, f"{tmp_path}/base.pth+{tmp_path}/adapter_{name}"):
        assert torch.equal(load_model(path)(TOKENS)[0], opened(TOKENS)[0])


def test_what_has_no_form_elsewhere_says_so(tmp_path, capsys, generation):
    """An RWKV-4's state, and one of an RWKV-7 whose shifts were trained, as runs of before did."""
    model = tuned(model_of(generation))
    with torch.no_grad():
        model.initial_shift.normal_()
    save_point(tmp_path / "run", 3, model)
    for out, flags in (("whole.pth", []), ("alone.pth", ["--adapter=true"])):
        code, said, _ = run("export", f"--model={tmp_path}/run", f"--out={tmp_path / out}", *flags, capsys=capsys)
        why = "an RWKV-4 has no other form" if generation == "rwkv4" else "token shifts are not zero"
        assert code == 0 and "this program alone reads" in said and why in said
        assert "--template with it" in said and ("export to a folder" in said) == (not flags)
        assert {"initial_shift", "initial_wkv"} <= torch.load(tmp_path / out, weights_only=True).keys()
    assert_close_rel(load_model(tmp_path / "whole.pth")(TOKENS)[0], model(TOKENS)[0], 1e-5)
    if generation == "rwkv7":
        torch.nn.init.zeros_(model.initial_shift)
        save_point(tmp_path / "run", 4, model)
        _, said, _ = run("export", f"--model={tmp_path}/run", f"--out={tmp_path}/w.pth", capsys=capsys)
        assert "time_state, which RWKV-Runner, ai00" in said


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"blocks.1.att.time_state": None}, r"every layer from 0 on, found 0: \[2, 64, 64\], 2: "),
        ({"blocks.1.att.time_state": torch.zeros(2, 64)}, r"1: \[2, 64\]"),
        ({"initial_wkv": torch.zeros(1)}, "both initial_wkv and time_state"),
    ],
)
def test_a_tuned_state_that_does_not_fit_is_named(tmp_path, change, message):
    found = {name: t for name, t in (time_states() | change).items() if t is not None}
    torch.save(found, tmp_path / "state.pth")
    save_model(model_of("rwkv7"), tmp_path / "base.pth")
    with pytest.raises(ValueError, match=f"state.pth.*{message}"):
        load_model(f"{tmp_path}/base.pth+{tmp_path}/state.pth")


@pytest.mark.parametrize("base", ["rwkv4", "rwkv7"])
def test_a_tuned_state_of_another_size_is_named(tmp_path, base):
    save_model(model_of(base), tmp_path / "base.pth")
    torch.save(time_states(heads=1), tmp_path / "state.pth")
    with pytest.raises(ValueError, match=r"state.pth holds an adapter alone; give it with its model, BASE"):
        load_model(tmp_path / "state.pth")
    with pytest.raises(ValueError, match=r"state.pth: the state to begin in \(initial_wkv, \[1, 3, 1, 64, 64\]\)"):
        load_model(f"{tmp_path}/base.pth+{tmp_path}/state.pth")


@pytest.mark.parametrize("parts", [("wkv",), ("shift", "wkv")])
def test_a_run_goes_on_training_the_parts_of_a_state_that_it_trained(store, tmp_path, monkeypatch, parts):
    """Runs of before trained the shifts of an RWKV-7; one that is resumed now ends where it would have ended."""
    save_model(random_model(vocab_size=257, generation="rwkv7"), tmp_path / "base.pth")
    model = ModelConfig(init=str(tmp_path / "base.pth"), tune="state")

    def trained(name, *steps):
        for last in steps:
            train = TrainConfig(steps=last, val_every=6, save_every=3, log_every=1, device="cpu")
            config = config_of(store, tmp_path, model=model, train=train, name=name)
            config.optim.schedule, config.optim.min_lr = "constant", None
            with monkeypatch.context() as patch:
                if last == steps[0]:
                    patch.setattr(RWKV7, "tuned_state", parts)
                assert fit(config, "newest" if last != steps[0] else None) == 0
        return load_model(tmp_path / name).state_dict()

    whole, resumed = trained("whole", 6), trained("resumed", 3, 6)
    assert whole["initial_shift"].any() == ("shift" in parts) and all(torch.equal(whole[k], resumed[k]) for k in whole)


@torch.no_grad()
def test_rwkv_goes_on_where_we_stopped_and_we_where_it_stopped(rwkv_package, tmp_path, generation):
    model = model_of(generation)
    save_model(model, tmp_path / "m.pth")
    theirs = rwkv_package(tmp_path / "m", generation)
    first, second = TOKENS[:, :5], TOKENS[:, 5:]
    expected, state = model(TOKENS)[0][0, 5:], model(first)[1]
    save_state(state, tmp_path / "ours.pth")
    given = torch.load(tmp_path / "ours.pth", weights_only=True)
    assert_close_rel(theirs.forward(second[0].tolist(), given, full_output=True)[0], expected, 1e-5)
    torch.save(theirs.forward(first[0].tolist(), None)[1], tmp_path / "theirs.pth")
    assert_close_rel(model(second, load_state(tmp_path / "theirs.pth", model))[0][0], expected, 1e-5)
    back = load_state(tmp_path / "ours.pth", model)
    assert all(map(torch.equal, back, state))
    assert (tmp_path / "ours.pth").stat().st_size < 4 * sum(part.numel() for part in state) + 8_000  # and nothing else


@torch.no_grad()
def test_rwkv_begins_in_a_tuned_state(rwkv_package, tmp_path, generation):
    """Given as a list; the empty state of a model that begins nowhere else is given so, too."""
    plain = model_of(generation)
    save_model(plain, tmp_path / "m.pth")
    theirs = rwkv_package(tmp_path / "m", generation)
    for model in (plain, tuned(model_of(generation))):
        given = to_rwkv(model.empty_state(1))
        assert_close_rel(theirs.forward(TOKENS[0].tolist(), given, full_output=True)[0], model(TOKENS)[0][0], 1e-5)


def test_a_state_that_does_not_fit_is_named(tmp_path, generation):
    model = model_of(generation)
    listed = to_rwkv(model.zero_state(1))
    wrong = {
        "expected 15 that begin" if generation == "rwkv4" else "expected 9 that begin": listed[1:],
        "take the model it is of": [*listed[:-1], 3],
        "not finite": [*listed[:-1], listed[-1] * float("nan")],
        "expected a list": {"a": listed[0]},
    }
    for message, found in wrong.items():
        torch.save(found, tmp_path / "x.pth")
        with pytest.raises(ValueError, match=message):
            load_state(tmp_path / "x.pth", model)
    (tmp_path / "x.pth").write_bytes(b"hello")
    with pytest.raises(ValueError, match="truncated or damaged"):
        load_state(tmp_path / "x.pth", model)
    with pytest.raises(ValueError, match="no such file"):
        load_state(tmp_path / "y.pth", model)
    double = model.double()
    assert from_rwkv(listed, double).wkv.dtype == torch.float64


def test_a_dialogue_goes_on_in_rwkv(rwkv_package, tmp_path, generation):
    """From the exported state rwkv gives the logits of the next question, and another dialogue the same reply."""
    tokenizer = load_tokenizer("bytes")
    model = model_of(generation, vocab_size=tokenizer.vocab_size)
    save_model(model, tmp_path / "m.pth")
    theirs = rwkv_package(tmp_path / "m", generation)
    one, two = (Dialogue(model, tokenizer, sampling=Sampling(0), max_new_tokens=5) for _ in range(2))
    list(one.say("a"))
    one.export_state(tmp_path / "s.pth")
    two.import_state(tmp_path / "s.pth")
    assert list(one.say("b")) == list(two.say("b"))
    question = tokenizer.encode("User: b\n\nAssistant:")
    assert one.last().prompt[-len(question) :] == two.last().prompt == question
    given = torch.load(tmp_path / "s.pth", weights_only=True)
    with torch.no_grad():
        expected = model(torch.tensor([one.prompt_of_last()]))[0][0, -1]
    assert_close_rel(theirs.forward(question, given)[0], expected, 1e-5)


def test_what_an_imported_state_does_not_know(tmp_path):
    model = model_of("rwkv7", vocab_size=257)
    d = Dialogue(model, load_tokenizer("bytes"), sampling=Sampling(0), max_new_tokens=5)
    list(d.say("a"))
    d.export_state(tmp_path / "s.pth")
    with pytest.raises(ValueError, match="no such file"):
        d.import_state(tmp_path / "t.pth")
    assert len(d.turns) == 1
    d.import_state(tmp_path / "s.pth")
    for asked in (d.retry, d.last, d.context_of_last, lambda: d.save(tmp_path / "d.state")):
        with pytest.raises(ValueError, match="nothing has been said"):
            asked()
    d.system("s")
    list(d.say("b"))
    assert d.context_of_last() == d.tokenizer.encode("System: s\n\n")
    begun, reply = d.turns[0].state, d.last().reply
    d.save(tmp_path / "d.state")
    d.reread(model_of("rwkv7", vocab_size=257, seed=1), "new")
    assert all(map(torch.equal, d.turns[0].state, begun))
    again = Dialogue(model, d.tokenizer, sampling=Sampling(0), max_new_tokens=5)
    again.load(tmp_path / "d.state")
    assert [t.imported for t in again.turns] == [True, False] and list(again.retry()) and again.last().reply == reply
    again.back()
    assert list(again.say("b"))
