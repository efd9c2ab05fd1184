"""With this folder on PYTHONPATH Python finds only what a bare GPU machine has, and so do the programs it starts."""

import sys
from importlib.machinery import PathFinder

LACKING = set(
    "jsonargparse datasets platformdirs prompt_toolkit pyrwkv_tokenizer deepspeed torchao fla fla_core rwkv xdist"
    " pytest_xdist pyarrow docstring_parser chatterbot_corpus".split()
)


class Bare(PathFinder):
    @classmethod
    def find_spec(cls, fullname, path=None, target=None):
        return None if fullname.partition(".")[0] in LACKING else super().find_spec(fullname, path, target)

    @classmethod
    def find_distributions(cls, context=None):
        name = getattr(context, "name", None)
        return iter(()) if (name or "").replace("-", "_") in LACKING else super().find_distributions(context)


sys.meta_path = [Bare if finder is PathFinder else finder for finder in sys.meta_path]
