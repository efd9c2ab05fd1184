"""A server over a model: an OpenAI-like API, corrections while it talks, and a page; see command.py for its start.

A request's way: guard.py lets it in, api_*.py reads it, conversation.py finds what of it was read before, batcher.py
writes the reply beside all others, sessions.py keeps the state after it.
"""
