"""Whether a text gives the right answer."""

from __future__ import annotations

import time
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fewer.rewards.answers import boxed, correct, grader, last_number, number, same


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (r"so \boxed{12}", "12"),
        (r"\boxed{1} no, \boxed{2}", "2"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed {7}", "7"),
        (r"\fbox{7}", "7"),
        (r"\boxed{}", ""),
        (r"\boxed{3} and then \boxed{4", "3"),  # cut off in the second box
        (r"\boxed{unfinished", None),
        (r"}} \boxed{5} {", "5"),
        (r"\boxed{ spaced }", "spaced"),
        ("boxed{5}", None),
        ("", None),
    ],
)
def test_the_last_closed_box(text: str, found: str | None):
    assert boxed(text) == found


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("3 + 4 = 7", "7"),
        ("7. That is all.", "7"),
        ("minus -3.", "-3"),
        ("5-3", "3"),
        ("x2 is no number", None),
        ("1,234,567.50 dollars", "1,234,567.50"),
        ("1, 2, 3", "3"),
        ("1,2,3", "3"),
        ("3/4 of it", "3/4"),
        ("\N{MINUS SIGN}8", "-8"),
        ("10%", "10"),
        ("no number", None),
        (".5", ".5"),
    ],
)
def test_the_last_number(text: str, found: str | None):
    assert last_number(text) == found


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("12", Fraction(12)), ("-0.50", Fraction(-1, 2)), ("1,250", Fraction(1250)), ("6/8", Fraction(3, 4)),
        (r"\frac{1}{3}", Fraction(1, 3)), (r"-\dfrac{2}{4}", Fraction(-1, 2)), (" $7$. ", Fraction(7)),
        ("1/0", None), ("1e3", None), ("x", None), ("", None), ("12 apples", None), (r"\frac{x}{3}", None),
        ("9" * 300, None), ("1e999999999", None), (r"\frac{1}{2/3}", None),
    ],
)  # fmt: skip
def test_the_value_of_a_number(text: str, value: Fraction | None):
    assert number(text) == value


def test_numbers_are_equal_by_value_and_texts_by_what_is_written():
    assert same("0.5", "1/2")
    assert same("12", 12)
    assert same("12.0", 12)
    assert same("0.1", 0.1)
    assert not same("0.1", "0.10001")
    assert same("x + 1", "x+1")
    assert not same("x + 1", "1 + x")  # algebra is for a checker of your own
    assert same("9" * 5000, "9" * 5000)  # too long to be calculated with, and Python would refuse to
    assert not same("9" * 5000, "9" * 4999)


def test_three_ways_to_be_right():
    assert correct(r"\boxed{12}", "12")
    assert not correct("12", "12")
    assert correct(r"\boxed{12}", r"First 5, then 7: \boxed{12}")  # a worked solution, as in MATH
    assert correct("it is 12.", "5 + 7 = 12\n#### 12", by="number")  # and as in GSM8K
    assert not correct("nothing", "12", by="number")
    assert correct(" yes\n", "yes", by="exact")
    assert not correct("Yes", "yes", by="exact")
    with pytest.raises(ValueError, match="answer 'yes' has no number in it"):
        correct("12", "yes", by="number")
    with pytest.raises(ValueError, match=r"correct='best': needs 'boxed', 'number', 'exact' or a callable"):
        grader("best")


@given(st.integers(-(10**9), 10**9))
def test_integers_come_back(n: int):
    assert correct(f"so \\boxed{{{n:,}}}", n)
    assert correct(f"so it is {n:,}.", str(n), by="number")
    assert not correct(f"so \\boxed{{{n}}}", n + 1)


@given(st.text(alphabet="\\boxed{}1,.-/ 9\n", max_size=60))
def test_no_text_breaks_a_checker(text: str):
    for by in ("boxed", "number", "exact"):
        assert correct(text, 1, by=by) in (True, False)


@pytest.mark.parametrize("text", [r"\boxed{" * 20_000, "{" * 100_000, "1," * 50_000, "1" * 100_000, "1/" * 50_000])
def test_long_nonsense_takes_no_time(text: str):
    start = time.perf_counter()
    correct(text, 1)
    correct(text, 1, by="number")
    assert time.perf_counter() - start < 2  # what grows with the square takes minutes
