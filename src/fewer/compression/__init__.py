"""Texts in, shorter texts out: what leaves, what must stay, and how it comes back."""

from .compressed import Compressed, Shelf
from .compressor import CompressionError, Compressor, Prompt
from .source import Source, SourceError

__all__ = ["Compressed", "CompressionError", "Compressor", "Prompt", "Shelf", "Source", "SourceError"]
