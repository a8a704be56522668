"""How a model is taught and read out."""

from zoo.objectives.base import Objective, create_objective, list_objectives, register

__all__ = ["Objective", "create_objective", "list_objectives", "register"]
