"""Pictures of what became of a clip's tokens: its frames side by side, once for each moment worth one."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from fewer.spec import text

from .gallery import FOLDER
from .pictures import moments, original, regions, sheet
from .style import count

if TYPE_CHECKING:
    from fewer.evaluation.video import VideoSubject
    from fewer.runtime.session import Session

WIDE = 896  # pixels of a strip


def strip(frames: np.ndarray, rows: np.ndarray, *, size: int = WIDE) -> Image.Image:
    """One clip after some block. Patches that share a row, in one frame or in several, are painted in one colour.

    frames  (T, height, width) uint8, one for each slot
    rows    (T, H, W) int, the row each patch is in, -1 = dropped
    """
    if rows.ndim != 3 or len(frames) != len(rows):
        raise ValueError(f"rows must be (frames, height, width) for {len(frames)} frames, got shape {rows.shape}")
    return regions(Image.fromarray(np.concatenate(list(frames), 1)), np.concatenate(list(rows), 1), size=size)


def strips(session: Session, subject: VideoSubject, out: Path) -> str | None:
    """Draw what a session's methods do to the first clip. Returns the file, relative to out; None without a grid."""
    subject.forward(session.model, subject.pixels(0)[:1])
    grid, start = session.last.grid, session.last.first.n
    if grid is None or len(grid) != 3:
        return None
    clip = subject.known.pixels[0].numpy()
    frames = clip[clip.shape[0] // grid[0] - 1 :: clip.shape[0] // grid[0]]
    counts = session.counts
    mean = counts if isinstance(counts, list) else counts.double().mean(1).tolist()
    tiles = [original(Image.fromarray(np.concatenate(list(frames), 1)), (grid[1], grid[0] * grid[2]), size=WIDE)]
    said = ["input"]
    for layer in moments(mean, 3, start=start):
        rows = session.last.rows(layer)[0].cpu().numpy()[session.host.prefix :].reshape(grid)
        tiles.append(strip(frames, rows))
        said.append(f"block {layer + 1}: {count(mean[layer])} tokens")
    name = " ".join(text(method) for method in session.methods)
    file = Path(FOLDER) / f"{re.sub(r'[^a-z0-9.=+]+', '-', name.lower())}.png"
    (out / FOLDER).mkdir(parents=True, exist_ok=True)
    sheet([[tile] for tile in tiles], [", then ".join(said)]).save(out / file, optimize=True)
    return file.as_posix()
