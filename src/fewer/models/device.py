"""Devices by name."""

from __future__ import annotations

import torch


def usable(name: str) -> torch.device:
    """A device that is there. Raises ValueError for one that is not, or no device's name."""
    try:
        device = torch.device(name)
        if device.type not in ("cpu", "cuda", "mps"):
            raise RuntimeError
    except RuntimeError as error:
        raise ValueError(f"device={name!r}: give cpu, cuda, cuda:1, ... or mps") from error
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise ValueError(f"device={name!r}, but torch sees no such device here; give cpu")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device={name!r}, but torch sees no CUDA device here; give cpu")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device={name!r}, but torch sees cuda:0 to cuda:{torch.cuda.device_count() - 1}")
    return device
