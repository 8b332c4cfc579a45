"""The algebra: plans and what makes them. Imports torch and nothing else."""

from . import attention, cluster, match, select
from .attention import Seen
from .budgets import Budget, BudgetError, Capacity, KeepRatio, Mass, Outliers, Remove, Threshold
from .errors import SignalError
from .place import Place, Site
from .plan import Hard, Masked, Plan, PlanError, Soft
from .reducer import Card, Reducer, reducer
from .signals import Signals
from .tokens import Group, Tokens
from .visual.method import Shape, VisualReducer
from .visual.view import Tower, View, Visual

__all__ = [
    "Budget", "BudgetError", "Capacity", "Card", "Group", "Hard", "KeepRatio", "Masked", "Mass", "Outliers", "Place",
    "Plan", "PlanError", "Reducer", "Remove", "Seen", "Shape", "SignalError", "Signals", "Site", "Soft", "Threshold",
    "Tokens", "Tower", "View", "Visual", "VisualReducer", "attention", "cluster", "match", "reducer", "select",
]  # fmt: skip
