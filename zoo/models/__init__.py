"""Whole models: a pattern between an embedding and a head."""

from zoo.models.token import ModelConfig, TokenModel, create_model, list_models

__all__ = ["ModelConfig", "TokenModel", "create_model", "list_models"]
