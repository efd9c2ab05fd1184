"""Settings and a store -> what every step of a run reads."""

import sys

from rwkv_train.config import DataConfig, FitConfig
from rwkv_train.data.lanes import Documents, LaneBatches, split, trained_tokens
from rwkv_train.data.store import Store
from rwkv_train.data.text_format import compare, compare_templates


def make_batches(config: FitConfig, store: Store, vocab_size: int | None) -> tuple[LaneBatches, LaneBatches | None]:
    """Training and validation batches for all lanes; `OnlineTrainingModule.setup` takes each rank's rows."""
    data = config.data
    share = 0 if data.val else data.val_share
    train, val = split(store, share)
    if share:
        _say_share(store, train, val, share)
    if len(train) < data.lanes:
        cut = train.cut(-(-train.tokens // data.lanes))
        print(
            f"{store.path}: fewer documents ({len(train)}) than lanes ({data.lanes}), so they are cut into "
            f"{len(cut)} pieces; data.lanes={len(train)} would read them whole"
        )
        train = cut
    width = data.chunk_len * data.horizon
    batches = LaneBatches(
        store,
        train,
        tokens_per_row=width,
        lanes=data.lanes,
        seed=config.seed,
        accumulate=config.train.accumulate,
        steps=config.steps(train.tokens) * config.train.accumulate,
        vocab_size=vocab_size,
    )
    return batches, validation_batches(data, store, val, vocab_size, config.train.devices * config.train.nodes)


def _say_share(store: Store, train: Documents, val: Documents, asked: float) -> None:
    """A split that takes most of the text, or comes nowhere near what was asked for, is told."""
    held_out, left = (int(trained_tokens(store, part).sum()) for part in (val, train))
    share = held_out / (held_out + left)
    if share > 0.5 or not asked / 2 <= share <= 2 * asked:
        print(
            f"{store.path}: data.val_share {asked:g} holds out {held_out:,} of {held_out + left:,} trained tokens, "
            f"{share:.0%}; {left:,} ({1 - share:.0%}) are left to train on"
        )


def _check_same_format(train: Store, val: Store, tokenizer: str | None) -> None:
    """ValueError if one store's text is not written as the other's."""
    ours, theirs = train.text_format(tokenizer), val.text_format(tokenizer)
    remedy = "prepare the text of data.val with the tokenizer of data.path"
    unknown = compare(train.path, ours.tokenizer, val.path, theirs.tokenizer, remedy)
    if unknown:
        print(unknown, file=sys.stderr)
    if other := compare_templates(train.path, ours.template, val.path, theirs.template):
        raise ValueError(f"{other}; prepare both with the same --template")


def validation_batches(
    data: DataConfig, store: Store, held_out: Documents, vocab_size: int | None, ranks: int = 1
) -> LaneBatches | None:
    """One pass over data.val, or over what is held out of data.path; None if that is nothing.

    Raises ValueError if data.val was made with another tokenizer, or its chats are written otherwise.
    """
    if data.val:
        trained, store = store, Store.open(data.val)
        _check_same_format(trained, store, data.tokenizer)
        held_out = split(store, 0)[0]
    if not len(held_out):
        return None
    lanes = min(data.val_lanes, len(held_out))
    lanes = -(-lanes // ranks) * ranks
    return LaneBatches(store, held_out, tokens_per_row=data.chunk_len, lanes=lanes, vocab_size=vocab_size)
