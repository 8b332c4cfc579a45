"""Texts condensed to a few learned rows that a model reads in their place: gist tokens, AutoCompressors, ICAE, and soft
prompts that stand for a hard one.

Each of them makes a `Summary`: embeddings, or keys and values, with the position where text goes on. It is saved,
loaded, and used in one way: `model.generate(**summary.inputs(ids, mask))`.
"""

from .autocompressor import AutoCompressor
from .gist import Collator, Gist
from .soft import Contrastive
from .summary import Summary, SummaryError, joined, stacked

__all__ = ["AutoCompressor", "Collator", "Contrastive", "Gist", "Summary", "SummaryError", "joined", "stacked"]
