"""Visual tokens in a language model's sequence: where they stand, and what a method may look at besides them.

A method for vision-language models sees visual rows only: one line of R per image or video (`scope = "image"`) or per
prompt (`scope = "prompt"`). Its plan is made over these rows; the session lifts it to the whole sequence, in which text
and separators stay.
"""

from .method import Shape, VisualReducer, acts_on_visual_rows
from .view import Scope, Tower, Unplaced, View, Visual

__all__ = ["Scope", "Shape", "Tower", "Unplaced", "View", "Visual", "VisualReducer", "acts_on_visual_rows"]
