"""Whole models: a network of mixers between an embedding and a head."""

from zoo.models.config import ModelConfig, Recursion
from zoo.models.create import create_backbone, create_model, list_models
from zoo.models.ends import Ends
from zoo.models.recursive import RecursiveModel
from zoo.models.series import SeriesModel
from zoo.models.token import TokenModel
from zoo.models.weights import Transfer

__all__ = [
    "Ends",
    "ModelConfig",
    "Recursion",
    "RecursiveModel",
    "SeriesModel",
    "TokenModel",
    "Transfer",
    "create_backbone",
    "create_model",
    "list_models",
]
