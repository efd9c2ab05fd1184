"""Adapters as Hugging Face PEFT and RWKV-PEFT have them: in, out, refused; and whose base they are of."""

import json
from contextlib import nullcontext

import pytest
import torch
from helpers import assert_close_rel, random_model
from safetensors.torch import save_file

from rwkv_train import load_model, save_model
from rwkv_train.checkpoints.modelfile import save_adapter
from rwkv_train.checkpoints.peft import read_peft
from rwkv_train.models.adapters import is_adapter, relative, tune
from rwkv_train.models.rwkv4 import RWKV4

TOKENS = torch.arange(20)[None]
LAYER, MATRIX = "blocks.1.ffn.key", (64, 16)


def model_of(generation, **sizes):
    """Of sizes with which rwkv7_hf's norm of heads has our eps."""
    return random_model(generation=generation, **({"n_embd": 64, "head_size": 64} if generation == "rwkv7" else sizes))


def trained(model, what, seed=1, **settings):
    """A model after some training of its factors."""
    tune(model, what, **({"rank": 3} | settings))
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p += 0.1 * torch.randn(p.shape, generator=rng)
    return model


@pytest.fixture
def based(tmp_path, generation):
    """A folder with a model as base.pth, and in Hugging Face's layout as base."""
    for name in ("base.pth", "base"):
        save_model(model_of(generation), tmp_path / name)
    return tmp_path


def theirs(peft, generation, folder, adapter):
    package = pytest.importorskip("transformers" if generation == "rwkv4" else "rwkv7_hf")
    kind = package.RwkvForCausalLM if generation == "rwkv4" else package.RWKV7ForCausalLM
    return peft.PeftModel.from_pretrained(kind.from_pretrained(folder / "base"), folder / adapter).eval()


@pytest.mark.parametrize("what", ["lora", "pissa", "miss"])
@pytest.mark.parametrize("ranks", [(), ("att.key=2", "blocks.1.ffn=0", "blocks.0-1.att=5")])
@torch.no_grad()
def test_peft_opens_what_a_run_trained_and_we_what_peft_saves(based, generation, what, ranks):
    peft = pytest.importorskip("peft")
    model = trained(model_of(generation), what, ranks=ranks)
    torch.save(model.state_dict(), based / "run.pth")
    save_adapter(based / "run.pth", based / "adapter", str(based / "base"))
    expected = model(TOKENS)[0]
    assert_close_rel(load_model(f"{based}/base.pth+{based}/adapter")(TOKENS)[0], expected, 1e-4)
    opened = theirs(peft, generation, based, "adapter")
    assert opened.peft_config["default"].peft_type == ("MISS" if what == "miss" and not ranks else "LORA")
    assert opened.peft_config["default"].base_model_name_or_path == str(based / "base")
    assert_close_rel(opened(TOKENS, use_cache=False).logits, expected, 1e-4)
    opened.save_pretrained(based / "back")
    assert_close_rel(load_model(f"{based}/base.pth+{based}/back")(TOKENS)[0], expected, 1e-4)


@torch.no_grad()
def test_we_open_what_peft_makes_of_its_pissa(tmp_path):
    peft, transformers = map(pytest.importorskip, ("peft", "transformers"))
    for name in ("base.pth", "base"):
        save_model(random_model(), tmp_path / name)
    config = peft.LoraConfig(r=4, target_modules=["key", "value", "head"], init_lora_weights="pissa")
    model = peft.get_peft_model(transformers.RwkvForCausalLM.from_pretrained(tmp_path / "base"), config).eval()
    config.init_lora_weights = True  # as their page of it says
    model.save_pretrained(tmp_path / "begun")
    config.init_lora_weights = "pissa"
    for p in model.parameters():
        if p.requires_grad:
            p += 0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()))
    model.save_pretrained(tmp_path / "as_it_is")
    model.save_pretrained(tmp_path / "converted", path_initial_model_for_weight_conversion=str(tmp_path / "begun"))
    with pytest.raises(ValueError, match="init_lora_weights is 'pissa', which changes the base model"):
        load_model(f"{tmp_path}/base.pth+{tmp_path}/as_it_is")
    ours = load_model(f"{tmp_path}/base.pth+{tmp_path}/converted")(TOKENS)[0]
    assert_close_rel(ours, model(TOKENS, use_cache=False).logits, 1e-4)


def written(folder, tensors, **config):
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 3, "lora_alpha": 6} | config))
    return folder


def factors(rank=3):
    rng = torch.Generator().manual_seed(2)
    return torch.randn(rank, MATRIX[1], generator=rng), torch.randn(MATRIX[0], rank, generator=rng)


@pytest.mark.parametrize(
    ("config", "scale"),
    [
        ({}, 2.0),
        ({"use_rslora": True}, 6 / 3**0.5),
        ({"alpha_pattern": {"att.key": 1, r"ffn\.(key|value)": 12}, "rank_pattern": {"ffn.key": 3}, "r": 8}, 4.0),
        ({"lora_dropout": 0.5, "target_modules": ["key"], "loftq_config": {}, "init_lora_weights": "gaussian"}, 2.0),
    ],
)
@pytest.mark.parametrize("prefix", ["base_model.model.", ""])
def test_factors_act_as_their_settings_say(tmp_path, config, scale, prefix):
    down, up = factors()
    names = {f"{prefix}{LAYER}.lora_A.weight": down, f"{prefix}{LAYER}.lora_B.weight": up}
    save_model(random_model(), tmp_path / "base.pth")
    model = load_model(f"{tmp_path}/base.pth+{written(tmp_path / 'adapter', names, **config)}")
    expected = random_model().get_parameter(f"{LAYER}.weight") + scale * up @ down
    assert_close_rel(model.get_parameter(f"{LAYER}.weight"), expected, 1e-6)


def test_low_rank_maps_are_matrices_of_hugging_face_the_other_way_round(tmp_path):
    """As target_modules "all-linear" adapts those of an RWKV-7."""
    down, up = torch.randn(2, 16), torch.randn(3, 2)
    before = "base_model.model.model.layers.1.attn.w_lora.lora.0"
    folder = written(tmp_path / "a", {f"{before}.lora_A.weight": down, f"{before}.lora_B.weight": up}, lora_alpha=2)
    save_model(random_model(generation="rwkv7"), tmp_path / "base.pth")
    model, base = load_model(f"{tmp_path}/base.pth+{folder}"), random_model(generation="rwkv7")
    assert_close_rel(model.blocks[1].att.w1, base.blocks[1].att.w1 + (up @ down).t(), 1e-6)


@pytest.mark.parametrize("rank", [4, 5])  # 5 does not divide 16
def test_miss_is_one_matrix_side_by_side(tmp_path, rank):
    small = torch.randn(rank, MATRIX[0])
    folder = written(tmp_path / "a", {f"base_model.model.{LAYER}.miss_block": small}, peft_type="MISS")
    torch.save({f"{LAYER}.disha": small}, tmp_path / "rwkv-0.pth")  # of RWKV-PEFT
    save_model(random_model(), tmp_path / "base.pth")
    change = torch.stack([small[i % rank] for i in range(MATRIX[1])], 1)
    for adapter in (folder, tmp_path / "rwkv-0.pth"):
        found = load_model(f"{tmp_path}/base.pth+{adapter}").get_parameter(f"{LAYER}.weight")
        assert_close_rel(found, random_model().get_parameter(f"{LAYER}.weight") + change, 1e-6)


@pytest.mark.parametrize(
    ("theirs", "generation", "message"),
    [
        ("model.layers.1.ffn.key", "rwkv7", None),
        ("rwkv.blocks.1.feed_forward.key", "rwkv4", None),
        ("rwkv.blocks.1.feed_forward.key", "rwkv7", "rwkv.blocks.1.feed_forward.key does not fit the model"),
        ("model.layers.1.ffn.key", "rwkv4", "model.layers.1.ffn.key does not fit the model"),
    ],
)
def test_names_are_those_of_the_generation(tmp_path, theirs, generation, message):
    down, up = factors()
    names = {f"base_model.model.{theirs}.lora_A.weight": down, f"base_model.model.{theirs}.lora_B.weight": up}
    save_model(random_model(generation=generation), tmp_path / "base.pth")
    with pytest.raises(ValueError, match=message) if message else nullcontext():
        load_model(f"{tmp_path}/base.pth+{written(tmp_path / 'a', names)}")


def test_a_single_file_has_to_say_how_it_is_scaled(tmp_path):
    down, up = factors()
    torch.save({f"{LAYER}.lora_A": down, f"{LAYER}.lora_B": up}, tmp_path / "rwkv-0.pth")
    with pytest.raises(ValueError, match=r'does not say how its factors are scaled; write \{"peft_type": "LORA"'):
        read_peft(tmp_path / "rwkv-0.pth", RWKV4)
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", "lora_alpha": 6}')
    assert_close_rel(read_peft(tmp_path / "rwkv-0.pth", RWKV4)[f"{LAYER}.up"], 2 * up, 1e-6)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"peft_type": "LOHA"}, "peft_type is 'LOHA', expected LORA or MISS"),
        ({"use_dora": True}, "use_dora is True, which is not supported"),
        ({"modules_to_save": ["head"]}, r"modules_to_save is \['head'\], which is not supported"),
        ({"bias": "lora_only"}, "bias is 'lora_only'"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out is True"),
        ({"from_tomorrow": 1}, "from_tomorrow is 1, which is not supported"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa', which changes the base model; save it as LoRA"),
        ({"peft_type": "MISS", "init_weights": "bat"}, "init_weights is 'bat', which changes the base model"),
        ({"lora_alpha": None}, "lora_alpha and alpha_pattern cannot be read"),
        ({"lora_alpha": "much"}, "lora_alpha and alpha_pattern cannot be read"),
        ({"alpha_pattern": {"(": 1}}, "lora_alpha and alpha_pattern cannot be read"),
        ({"alpha_pattern": [1]}, "lora_alpha and alpha_pattern cannot be read"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(tmp_path, config, message):
    down, up = factors()
    names = {f"base_model.model.{LAYER}.lora_A.weight": down, f"base_model.model.{LAYER}.lora_B.weight": up}
    with pytest.raises(ValueError, match=message):
        read_peft(written(tmp_path / "adapter", names, **config), RWKV4)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["lora_A.weight", "lora_B.weight", "lora_magnitude_vector"], "lora_magnitude_vector' is no part of a LoRA"),
        (["lora_A.weight"], r"blocks.1.ffn.key has down \[3, 3\], expected lora_A and lora_B"),
        (["lora_A.weight", "lora_B.weight"], "blocks.1.ffn.key does not fit the model"),
        ([], "no part of a LoRA or MiSS|holds no adapter"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(tmp_path, names, message):
    folder = written(tmp_path / "a", {f"base_model.model.{LAYER}.{name}": torch.zeros(3, 3) for name in names})
    save_model(random_model(), tmp_path / "base.pth")
    with pytest.raises(ValueError, match=message):
        load_model(f"{tmp_path}/base.pth+{folder}")


@pytest.mark.parametrize("what", ["lora", "pissa", "miss", "state"])
def test_an_adapter_knows_its_base(tmp_path, what):
    """Not another model of the same sizes; the same one rounded, and what other adapters have made of it."""
    save_model(random_model(), tmp_path / "base.pth")
    save_model(random_model(), tmp_path / "half.pth", torch.float16)
    save_model(random_model(seed=1), tmp_path / "other.pth")
    torch.save(trained(random_model(), what).state_dict(), tmp_path / "run.pth")
    save_adapter(tmp_path / "run.pth", tmp_path / "one.safetensors")
    load_model(f"{tmp_path}/half.pth+{tmp_path}/one.safetensors")
    again = trained(load_model(f"{tmp_path}/base.pth+{tmp_path}/one.safetensors"), "lora", seed=2)
    torch.save({n: t for n, t in relative(again.state_dict()).items() if is_adapter(n)}, tmp_path / "two.pth")
    for order in ("one.safetensors", "one.safetensors+two.pth", "one.safetensors+one.safetensors", "run.pth"):
        load_model("+".join(f"{tmp_path}/{name}" for name in ["base.pth", *order.split("+")]))
    bad = ["other.pth+one.safetensors"] + ["base.pth+two.pth"] * (what != "state")
    for names in bad:
        with pytest.raises(ValueError, match="was trained on another model: 14 of 14 matrices, as blocks"):
            load_model("+".join(f"{tmp_path}/{name}" for name in names.split("+")))


def test_another_name_of_the_base_is_told(tmp_path, capsys):
    down, up = factors()
    names = {f"{LAYER}.lora_A.weight": down, f"{LAYER}.lora_B.weight": up}
    save_model(random_model(), tmp_path / "base.pth")
    for name, told in (("somebody/base", False), ("somebody/other", True)):
        load_model(f"{tmp_path}/base.pth+{written(tmp_path / 'a', names, base_model_name_or_path=name)}")
        assert ("says that it was trained on somebody/other" in capsys.readouterr().err) is told


def test_only_adapters_go_into_a_folder_of_theirs(tmp_path):
    for what in ("state", "lora"):
        torch.save(trained(random_model(), what).state_dict(), tmp_path / f"{what}.pth")
    with pytest.raises(ValueError, match=r"no place for the state a model begins in; use .pth"):
        save_adapter(tmp_path / "state.pth", tmp_path / "folder")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "letter.txt").touch()
    with pytest.raises(ValueError, match="is not empty and holds no adapter to replace"):
        save_adapter(tmp_path / "lora.pth", tmp_path / "taken")
    with pytest.raises(ValueError, match=r"v1.0: unknown suffix; use .pth or .safetensors, or \".*v1.0/\" for a PEFT"):
        save_adapter(tmp_path / "lora.pth", tmp_path / "v1.0")
    save_adapter(tmp_path / "lora.pth", tmp_path / "alone.pth")
    with pytest.raises(ValueError, match="is an adapter without its model"):
        save_adapter(tmp_path / "alone.pth", tmp_path / "folder")
    with pytest.raises(ValueError, match=r"holds an adapter alone; give it with its model, BASE\+"):
        save_adapter(tmp_path / "lora.pth", tmp_path / "folder")
        load_model(tmp_path / "folder")
