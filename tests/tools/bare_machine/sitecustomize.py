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
    def find_distributions(cls, *context):
        """Of all that are asked for at once, too: pytest would load its plugins, past this finder."""
        found = super().find_distributions(*context)
        return (one for one in found if one.metadata["Name"].lower().replace("-", "_") not in LACKING)


sys.meta_path = [Bare if finder is PathFinder else finder for finder in sys.meta_path]
