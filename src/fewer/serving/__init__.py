"""A gateway in front of any OpenAI-compatible endpoint: messages get shorter on their way. Needs `fewer[serve]`.

What it stands on (FastAPI, uvicorn, httpx) is imported where it is used, so that the package imports without it.
"""

from .settings import Settings

__all__ = ["Settings"]
