"""Language models that talk: behind any OpenAI-compatible endpoint, with every token counted.

debate    agents argue until they agree; who has nothing new to hear is not asked again (S2-MAD)
density   a summary is rewritten at equal length until it says more (Chain of Density)
endpoint  who is asked
"""

from .debate import Debate, DebateError, Outcome, View, by_answer, by_embedding
from .density import Chain, Densify, Step, abstractiveness, density, fusion, named
from .endpoint import Call, Endpoint, EndpointError, Ledger, Message, Reply, Speaker

__all__ = [
    "Call", "Chain", "Debate", "DebateError", "Densify", "Endpoint", "EndpointError", "Ledger", "Message", "Outcome",
    "Reply", "Speaker", "Step", "View", "abstractiveness", "by_answer", "by_embedding", "density", "fusion", "named",
]  # fmt: skip
