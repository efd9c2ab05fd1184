"""The short commands: validate, generate, inspect, export."""

import json
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

from tqdm import tqdm

from rwkv_train.checkpoints.modelfile import load_model, save_adapter, save_model
from rwkv_train.checkpoints.opener import (
    DTYPES,
    format_of,
    format_to_export,
    load_in,
    open_model,
    remedy_of,
    told,
)
from rwkv_train.checkpoints.states import to_time_states, told_of_beginning
from rwkv_train.cli import parse
from rwkv_train.command_config import ExportConfig, GenerateConfig, InspectConfig, ValidateConfig
from rwkv_train.config import DataConfig
from rwkv_train.data.batches import make_batches, validation_batches
from rwkv_train.data.lanes import LaneBatches, split, trained_tokens
from rwkv_train.data.store import Store
from rwkv_train.data.text_format import TextFormat, alike_in_one, compare, compare_templates
from rwkv_train.evaluate import Score, Scorer, byte_lengths, position_table
from rwkv_train.files import read_lines, unescaped
from rwkv_train.generate import LANES, generate_text, generate_texts
from rwkv_train.generation.presets import sampling_of, stop_texts
from rwkv_train.models.base import RWKV
from rwkv_train.models.finite import broken_weight, finite
from rwkv_train.models.loss import IGNORE_INDEX
from rwkv_train.models.rwkv7 import RWKV7
from rwkv_train.run_config import found_paths, is_run_config, run_settings
from rwkv_train.tokenizer import Tokenizer
from rwkv_train.tokenizer_json import mentions
from rwkv_train.train.runlog import read_metrics


def validate(config: ValidateConfig) -> None:
    """Print a model's scores on a store, by position in the document, with and without carried state."""
    data, val_share = config.data, config.val_share
    if data is None:
        data, val_share = _held_out(Path(config.model))
    store = Store.open(data)
    model = load_in(config.model, config.dtype)
    training, held_out = split(store, val_share)
    documents = held_out if val_share else training
    if config.data is None:
        _check_same_part(Path(config.model), int(trained_tokens(store, documents).sum()))
    how = DataConfig(path=data, val_lanes=config.lanes, chunk_len=config.chunk_len)
    batches = validation_batches(how, store, documents, model.config.vocab_size)
    known, text = format_of(config.model), store.text_format(config.tokenizer)
    told(compare(config.model, known.tokenizer, store.path, text.tokenizer, remedy_of(config.model)))
    told(compare_templates(config.model, known.template, store.path, text.template))
    tokenizer = text.tokenizer or known.tokenizer
    score = _score(model, batches, tokenizer, forget=False)
    forgotten = _score(model, batches, tokenizer, forget=True) if config.compare else None
    without = "unknown (no tokenizer)" if score.bytes is None else "none (no text)"
    bits = without if score.bits_per_byte is None else f"{score.bits_per_byte:.4f}"
    print(f"{data}: {len(documents):,} documents, {score.tokens:,} tokens scored\n")
    print(f"loss            {score.loss:.4f}\nperplexity      {score.perplexity:.3f}\nbits per byte   {bits}\n")
    print(position_table(score, forgotten, config.chunk_len))
    if config.json:
        scores = {"carried": score, "dropped": forgotten}
        found = {name: _figures(s) for name, s in scores.items() if s}
        Path(config.json).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def _held_out(run: Path) -> tuple[str, float]:
    """(store, share) that a run's training held out."""
    file = run / "config.yaml"
    if not file.is_file():
        raise ValueError(f"{run} is no run folder, so say what to score it on with --data STORE")
    data = run_settings(file).get("data", {})
    if not data.get("val") and not data.get("val_share"):
        raise ValueError(f"the run {run} held nothing out; say what to score it on with --data STORE")
    found = found_paths(file)
    return (found["data.val"], 0.0) if data.get("val") else (found["data.path"], data["val_share"])


def _check_same_part(run: Path, tokens: int) -> None:
    """ValueError where what a run scored while it trained is not what would be scored now: it may have been trained."""
    metrics = run / "metrics.jsonl"
    scored = [r["val_tokens"] for r in read_metrics(metrics) if "val_tokens" in r] if metrics.is_file() else []
    if not scored:
        print(f"{run} recorded no validation: what it held out is taken to be what it would hold out now")
    elif scored[-1] != tokens:
        raise ValueError(
            f"{run} scored {scored[-1]:,} tokens while it trained, and would score {tokens:,} now: its text, or the "
            "way it is split, is another one since, so that some of these may have been trained; say what to score "
            "it on with --data STORE"
        )


def _score(model, batches: LaneBatches, tokenizer: Tokenizer | None, forget: bool) -> Score:
    scorer = Scorer(model, byte_lengths(tokenizer, model.config.vocab_size), forget)
    for n in tqdm(range(len(batches)), desc="state dropped" if forget else "state carried", unit="batch", leave=False):
        scorer.add(batches[n])
        finite(scorer.nats, model)
    return scorer.score()


def _figures(score: Score) -> dict:
    return {
        "loss": score.loss,
        "perplexity": score.perplexity,
        "bits_per_byte": score.bits_per_byte,
        "tokens": score.tokens,
        "by_position": score.by_position(),
    }


def generate(config: GenerateConfig) -> None:
    """Print a prompt and its continuation as it is written, or those of a file, in its order."""
    how = {"sampling": sampling_of(config), "max_new_tokens": config.tokens, "seed": config.seed}
    how["stop"] = stop_texts(config.stop)
    if config.tokens < 1:
        raise ValueError(f"--tokens must be at least 1, found {config.tokens}")
    prompts = _prompts(config)
    model, tokenizer, _ = open_model(config.model, config.tokenizer, None, config.dtype, config.device, for_chats=False)
    if config.prompts is not None:
        _show(prompts, generate_texts(model, tokenizer, prompts, lanes=config.lanes or LANES, **how))
        return
    sys.stdout.write(prompts[0])
    for piece in generate_text(model, tokenizer, prompts[0], **how):
        sys.stdout.write(piece)
        sys.stdout.flush()
    print()


def _prompts(config: GenerateConfig) -> list[str]:
    if config.lanes is not None and config.lanes < 1:
        raise ValueError(f"--lanes must be at least 1, found {config.lanes}")
    if config.lanes and config.prompts is None:
        raise ValueError("--lanes is for the prompts of a file; give --prompts, or leave it out")
    if config.prompts is None:
        return [unescaped(config.prompt)]
    if config.prompt:
        raise ValueError("--prompt and --prompts both say what to continue; give one of them")
    prompts = [unescaped(line) for _, line in read_lines(config.prompts)]
    if not prompts:
        raise ValueError(f"{config.prompts} has no prompt in it; write one in each line")
    return prompts


def _show(prompts: list[str], pieces: Iterator[tuple[int, str | None]]) -> None:
    """Print each text once it and those before it have ended, a blank line between two."""
    texts, ended, shown = list(prompts), set(), 0
    with tqdm(total=len(prompts), desc="generate", unit="text", leave=False, disable=None) as bar:
        for number, piece in pieces:
            texts[number] += piece or ""
            if piece is None:
                ended.add(number)
                bar.update()
            while shown in ended:
                tqdm.write("\n" * (shown > 0) + texts[shown], file=sys.stdout)
                shown += 1


def inspect(config: InspectConfig) -> None:
    """Print what one optimizer step of a run reads. It is a function of the settings: no checkpoint is needed."""
    run = Path(config.run)
    if not (run / "config.yaml").is_file():
        raise ValueError(f"{run} is no run: it has no config.yaml; name a folder that `fit` has written")
    settings, _ = parse("fit", ["--config", str(run / "config.yaml")])
    store = Store.open(settings.data.path)
    batches, _ = make_batches(settings, store, vocab_size=None)
    accumulate = settings.train.accumulate
    if not 1 <= config.step <= len(batches) // accumulate:
        raise ValueError(f"the run has steps 1 to {len(batches) // accumulate}, found {config.step}")
    tokenizer = store.tokenizer(settings.data.tokenizer)
    first = (config.step - 1) * accumulate
    print(f"step {config.step} trains {int(batches[first]['step_tokens']):,} tokens")
    for n in range(first, first + accumulate):
        targets = batches[n]["targets"]
        for lane in range(batches.all_lanes):
            for at, start, offset, count in batches.stretches(lane, n):
                trained = int((targets[lane, at : at + count] != IGNORE_INDEX).sum())
                ids = store.tokens[start : start + min(count, config.tokens)].tolist()
                text = repr(tokenizer.decode(ids)) if tokenizer else ids
                batch = f"batch {n - first + 1}, " if accumulate > 1 else ""
                place = f"document {store.document_at(start)}, tokens {offset} to {offset + count - 1}"
                print(f"{batch}lane {lane}, place {at}: {place}, {trained} trained: {text}")


def export(config: ExportConfig) -> None:
    """Write a model in another format, or what a run with model.tune has trained."""
    folder = config.out.endswith("/") or Path(config.out).suffix not in (".pth", ".safetensors")
    if (config.adapter or not folder) and (config.tokenizer or config.template):
        raise ValueError(f"{config.out}: a file of weights has no place for --tokenizer and --template; name a folder")
    if config.profile and config.adapter:
        raise ValueError("--profile is of a model with corrections, and --adapter of what a run trained; give one")
    if config.adapter:
        run = Path(config.model) / "config.yaml"
        found = found_paths(run, ("data.path", "data.val", "data.tokenizer")) if is_run_config(run) else {}
        adapter = save_adapter(config.model, config.out, found.get("model.init"))
        flag = f"--model BASE+{shlex.quote(config.out)}"
        said = f"{config.out}: what {config.model} trained; `{flag}` puts it on its model"
        print(said, *told_of_beginning(adapter), _left_out(format_of(config.model)), sep="\n")
        return
    if config.profile:
        from rwkv_train.chat.opening import corrected  # corrections take a moment to import, and few exports want them

        model = corrected(config.model, config.profile, config.folder)
    else:
        model = load_model(config.model)
    if broken := broken_weight(model):
        raise ValueError(f"{config.model} gives no finite number: {broken}")
    if config.profile and config.dtype in ("fp16", "bf16"):
        told(f"corrections are kept in fp32, and {config.dtype} rounds what they changed; ask the model what it knows")
    c, dtype = model.config, DTYPES[config.dtype] if config.dtype else None
    if folder:
        known = format_to_export(config.model, config.tokenizer, config.template, c.vocab_size)
        said = "\n".join(_opened_by(model, known, save_model(model, config.out, dtype, *known)))
    else:
        save_model(model, config.out, dtype)
        said = _left_out(format_of(config.model)) + ", or export to a folder"
    print(f"{config.out}: {model.name}, {c.n_layer} layers x {c.n_embd} channels, vocabulary {c.vocab_size}")
    print(*told_of_beginning(to_time_states(model.state_dict())), said, sep="\n")


def _opened_by(model: RWKV, given: TextFormat, known: TextFormat) -> Iterator[str]:
    """What opens an exported folder, and what it finds there. known: what was given with the model, or lay there."""
    lay = ["" if one or not other else ", that which lay there" for one, other in zip(given, known, strict=True)]
    if not isinstance(model, RWKV7):
        yield "weights: AutoModelForCausalLM of transformers opens them"
    elif model.config.head_size == 64:
        yield "weights: RWKV7ForCausalLM of rwkv7-hf opens them, and flash-linear-attention"
    else:
        yield f"weights: opened here alone, as others norm heads of {model.config.head_size} channels otherwise"
    if known.tokenizer:
        adds = mentions(json.loads(known.tokenizer.library_json).get("post_processor"), "TemplateProcessing")
        others = ", and adds tokens to a text unless add_special_tokens is False" if adds else ""
        yield f"tokenizer {known.tokenizer}{lay[0]}: AutoTokenizer opens it" + others
    else:
        yield "tokenizer: unknown, so none is written; give --tokenizer"
    if known.template and known.tokenizer:
        others = (
            "" if alike_in_one(known.tokenizer, known.template) else ", with other ids where a reply begins or ends"
        )
        yield "chats: apply_chat_template writes them" + others + lay[1]
    elif known.template:
        yield f"chats: written as its template.yaml{lay[1]} says"
    else:
        yield "chats: unknown how they are written, so apply_chat_template cannot; give --template"


def _left_out(known: TextFormat) -> str:
    """What a single file of weights, or an adapter, does not say."""
    names = [f"tokenizer {known.tokenizer}"] * bool(known.tokenizer) + ["template of its chats"] * bool(known.template)
    without = " and the ".join(names) or "tokenizer, which is unknown"
    return f"weights alone, without the {without}: give --tokenizer and --template with it"
