"""How a model is trained, and how its answer is computed."""

from zoo.objectives.base import Objective, create_objective, list_objectives, register

__all__ = ["Objective", "create_objective", "list_objectives", "register"]
