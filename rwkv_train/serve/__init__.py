"""A server over a model: an OpenAI-like API, corrections while it talks, and a page; see command.py for its start.

A request's way: guard.py lets it in, api_*.py reads it, conversation.py finds what of it was read before, batcher.py
writes the reply beside all others, sessions.py keeps the state after it.
"""

from rwkv_train.serve.settings import ServeConfig


def serve(config: ServeConfig) -> int:
    """Serve a model until a signal ends it. Raises ValueError where the extra `serve` is not installed."""
    try:
        from rwkv_train.serve.command import serve
    except ModuleNotFoundError as error:
        raise ValueError(f'a server needs {error.name}: pip install "rwkv_train[serve]"') from None
    return serve(config)
