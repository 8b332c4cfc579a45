"""Several tokens a pass: heads that guess ahead, how they learn, and decoding that verifies what they guess.

written = swift(model, ids, max_new_tokens=2000)                   # the text that generate would write, in fewer passes
with MultiToken(model, Layers.of(model, 3)): Trainer(...).train()   # multi-token prediction
"""

from .heads import Chained, Heads, HeadsError, Layers, load, packaged
from .ngrams import NGrams
from .penalty import ContextualPenalty
from .teaching import MultiToken, loss
from .verifying import SwiftError
from .writing import Swift, Written, swift

__all__ = [
    "Chained", "ContextualPenalty", "Heads", "HeadsError", "Layers", "MultiToken", "NGrams", "Swift", "SwiftError",
    "Written", "load", "loss", "packaged", "swift",
]  # fmt: skip
