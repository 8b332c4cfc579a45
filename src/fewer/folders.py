"""Where this package keeps what it makes or finds out, outside the user's own folders."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """Where converted weights, texts and facts about models are kept: FEWER_CACHE, else XDG_CACHE_HOME/fewer, else
    ~/.cache/fewer."""
    own = os.environ.get("FEWER_CACHE")
    return Path(own) if own else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fewer"
