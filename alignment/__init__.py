"""From a base language model to an instruct model people can trust, and the proof of what changed."""

__version__ = "0.1.0"
