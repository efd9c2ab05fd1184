"""Presets: their names and what help says of them, what is given beside them, and the makers' own sampler."""

import json
from pathlib import Path
from typing import get_args

import pytest
import torch
from helpers import random_model, run

from rwkv_train import cli
from rwkv_train.command_config import Preset, explained
from rwkv_train.generate import Sampling, prefill, stream_tokens
from rwkv_train.generation import presets
from rwkv_train.generation.presets import PRESETS, described, sampling_of, stop_texts
from rwkv_train.generation.sampling import Needs, choose, random_numbers


def test_the_help_and_the_page_name_every_preset(capsys):
    assert get_args(Preset) == tuple(PRESETS)
    page = Path(presets.__file__).parent.parent / "serve/page/settings.js"
    assert f"const PRESETS = {json.dumps(['', *PRESETS])};" in page.read_text(encoding="utf-8")
    for command, usual in (("generate", "text"), ("chat", "chat"), ("serve", "chat")):
        told = " ".join(run(command, "--help", capsys=capsys)[1].split())
        assert all(f"{name} ({described(sampling)})" in told for name, sampling in PRESETS.items())
        config, _ = cli.parse(command, ["--model=x"])
        assert config.preset == usual and explained(type(config), "preset") in told


def test_what_is_given_goes_before_the_preset_and_is_told(capsys):
    def found(*argv, command="generate"):
        return sampling_of(cli.parse(command, ["--model=x", *argv])[0]), capsys.readouterr().err

    assert found() == (Sampling(1.0, 0.9), "") and found(command="chat") == (Sampling(0.8, 0.5), "")
    assert found("--temperature=0.9", "--min-p=0.1") == (Sampling(0.9, 0.9, min_p=0.1), "")
    assert found("--preset=thinking", "--top-k=32") == (PRESETS["thinking"], "")
    sampling, told = found("--preset", "fake-thinking", "--temperature=0.5", "--penalty-decay=0.99", command="chat")
    assert sampling == Sampling(0.5, 0.28, 32, penalty_decay=0.99)
    assert told == "note: the preset fake-thinking with temperature 0.5, not 1, penalty_decay 0.99, not 1\n"
    with pytest.raises(SystemExit, match="2"):
        found("--preset=loud")
    assert "thinking" in capsys.readouterr().err


def test_stops_are_texts_as_they_are_typed(tmp_path):
    """Also those that look like a list or a number; they replace those of a file."""
    file = tmp_path / "a.yaml"
    file.write_text('stop: ["of the file"]\n')

    def found(*argv):
        return stop_texts(cli.parse("generate", ["--model=x", "--config", str(file), *argv])[0].stop)

    assert found() == ("of the file",)
    assert found("--stop", "User:") == ("User:",)
    assert found("--stop=[END]", "--stop", r"\n\nUser:", "--stop=7") == ("[END]", "\n\nUser:", "7")
    assert found('--stop=["a", "b"]', r"--stop=C:\\n") == ("a", "b", r"C:\n") and found("--stop=[]") == ()
    with pytest.raises(ValueError, match="--stop needs a text"):
        found("--stop=")
    with pytest.raises(SystemExit, match="2"):
        found("--stop", "--tokens=3")


@pytest.mark.parametrize(
    ("sampling", "count"),
    [
        (PRESETS["thinking"], 80),
        (Sampling(0, frequency_penalty=0.05, presence_penalty=0.02, penalty_decay=0.9), 80),
        (Sampling(0, frequency_penalty=1.0, presence_penalty=1e4, penalty_decay=0.5), 200),  # a count of 2**-200
    ],
)
def test_penalties_are_those_of_the_package_rwkv(sampling, count):
    """Of tokens that are no digits, spaces or tabs, which the package does not count."""
    utils, draw = pytest.importorskip("rwkv.utils"), random_numbers(3)
    model, written = random_model(n_embd=8, vocab_size=257, dtype=torch.float64), []
    rest = Sampling(sampling.temperature, sampling.top_p, sampling.top_k)

    class Pipeline(utils.PIPELINE):
        def __init__(self):
            self.model = self

        def forward(self, tokens, state):
            return prefill(model, tokens, state)

        def encode(self, text):
            return [0, 7]

        def decode(self, tokens):
            return "".join(chr(0x4E00 + token) for token in tokens)

        def sample_logits(self, logits, **how):
            uniform = torch.zeros(1) if rest.greedy else torch.rand(1, generator=draw, dtype=torch.float64)
            written.append(int(choose(logits[None], torch.tensor([rest.numbers]), uniform, Needs.of([rest]))))
            return written[-1]

    args = utils.PIPELINE_ARGS(
        alpha_presence=sampling.presence_penalty,
        alpha_frequency=sampling.frequency_penalty,
        alpha_decay=sampling.penalty_decay,
    )
    Pipeline().generate("", count, args)
    ours = stream_tokens(model, *prefill(model, [0, 7]), sampling, count, rng=random_numbers(3))
    assert [token for token, _ in ours] == written
    assert (len(set(written)) < count) == (sampling.presence_penalty < 1e4)
