"""How everything looks: one accent and its tint, the rest ink and paper; counts as readers like them."""

ACCENT = "#e2543b"
INK = "#1d1f23"
QUIET = "#8b9097"
FAINT = "#dfe1e4"
GONE = "#f5d3ca"
PAPER = "#ffffff"


def rgb(colour: str) -> tuple[int, int, int]:
    """'#rrggbb' as three numbers.

    >>> rgb("#ff8000")
    (255, 128, 0)
    """
    return int(colour[1:3], 16), int(colour[3:5], 16), int(colour[5:7], 16)


def count(x: float) -> str:
    """A mean count: whole where it is whole, else with one decimal.

    >>> count(12.0), count(12.34), count(float("nan"))
    ('12', '12.3', 'nan')
    """
    return f"{x:.0f}" if x % 1 == 0 else f"{x:.1f}"
