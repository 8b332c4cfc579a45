"""Errors of the algebra that more than one room raises."""

from __future__ import annotations


class SignalError(RuntimeError):
    """A method asked for something this site cannot show."""
