"""What tells one text from another, without reading all of it."""

import hashlib

import numpy as np

from rwkv_train.data.blocks import BLOCK
from rwkv_train.data.store import Store

WHOLE = 1024  # blocks of a plain binidx that are read at most: 64 MiB


def identity(store: Store) -> dict:
    """The same for a store that was made again from the same text; another one where a token or a mask differs.

    documents, tokens, eod; places and contents, SHA-256 of where documents lie and of tokens and masks; of a store its
    tokenizer's fingerprint, too. A store has checksums of all of it. Of a plain binidx up to 64 MiB of tokens are read:
    of a larger one the first block, the last one and 1022 between them.
    """
    facts = {"documents": len(store.lengths), "tokens": len(store.tokens), "eod": store.eod}
    if store.manifest:
        sums, fingerprint = store.manifest["sha256"], store.manifest["tokenizer"]["fingerprint"]
        return facts | {"tokenizer": fingerprint, "places": sums["tokens.idx"], "contents": sums["tokens.crc"]}
    data = store.tokens.view(np.uint8)
    count = -(-len(data) // BLOCK)
    found = hashlib.sha256()
    for block in np.unique(np.linspace(0, count - 1, min(count, WHOLE)).astype(np.int64)):
        found.update(data[block * BLOCK : (block + 1) * BLOCK])
    places = hashlib.sha256(np.ascontiguousarray(store.offsets)).hexdigest()
    return facts | {"places": places, "contents": found.hexdigest()}
