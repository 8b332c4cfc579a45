"""The contract every method is held to, as importable checks.

    from fewer.testing import CHECKS, TinyHost, fitted

    for check in CHECKS:
        check(fitted(MyMethod), TinyHost("vit"))

A check raises AssertionError and says what is wrong. A method that cannot meet one declares it, with the reason, in
its `@reducer(..., exempt={"check_name": "why"})`; such a check is then expected to fail.
"""

from .checks import CHECKS, Check
from .faults import FAULTS, Fault, Honest
from .hosts import TinyHost, fitted, keep_all, text_hosts, tiny_hosts, video_hosts

__all__ = [
    "CHECKS",
    "FAULTS",
    "Check",
    "Fault",
    "Honest",
    "TinyHost",
    "fitted",
    "keep_all",
    "text_hosts",
    "tiny_hosts",
    "video_hosts",
]
