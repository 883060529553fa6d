"""Streaming generation: a model reads a prompt in one pass and goes on token by token, at a constant cost."""

from fairseq_flash.generation.choice import Choice
from fairseq_flash.generation.reader import Reader
from fairseq_flash.generation.text import StreamedText, encode

__all__ = ["Choice", "Reader", "StreamedText", "encode"]
