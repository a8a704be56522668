"""A zoo of sequence models: one interface, many ways to mix a sequence."""

from tasks.registry import UsageError
from zoo.models.token import ModelConfig, create_model, list_models, swap
from zoo.protocol import Context, Mixer, Place, State, canonical, fork, join, select
from zoo.registry import create_mixer, list_mixers, register

__all__ = [
    "Context",
    "Mixer",
    "ModelConfig",
    "Place",
    "State",
    "UsageError",
    "canonical",
    "create_mixer",
    "create_model",
    "fork",
    "join",
    "list_mixers",
    "list_models",
    "register",
    "select",
    "swap",
]
