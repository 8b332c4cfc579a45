"""Texts in, shorter texts out: what leaves, what must stay, and how it comes back."""

from .compressed import Compressed, Shelf
from .compressor import CompressionError, Compressor, Prompt
from .conversation import Conversation, ConversationError, Conversed, Segment
from .policy import Policy, PolicyError, policies
from .source import Source, SourceError

__all__ = [
    "Compressed", "CompressionError", "Compressor", "Conversation", "ConversationError", "Conversed", "Policy",
    "PolicyError", "Prompt", "Segment", "Shelf", "Source", "SourceError", "policies",
]  # fmt: skip
