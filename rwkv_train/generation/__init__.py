"""Text from a model: choosing tokens, and many texts side by side; generate.py is the short way to one of them."""
