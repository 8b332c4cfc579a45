"""Other libraries' objects, as ours: presses of kvpress, CLIP as a guide."""
