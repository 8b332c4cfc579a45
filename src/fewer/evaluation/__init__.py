"""Measuring: what a method costs, what it gains, and how sure one can be."""
