"""Which published configs say that their weights are quantised, how, and whether that form is read."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

from zoo.core.errors import UsageError
from zoo.core.readers import shown

KEYS = ("quantization_config", "quantization", "compression_config")
TOOLS = {  # by what it writes, where it does not name itself; the first that fits
    "compressed-tensors": {"config_groups", "format"},
    "modelopt": {"quant_algo", "producer"},
    "bitsandbytes": {"load_in_4bit", "load_in_8bit"},
    "awq": {"w_bit", "zero_point", "q_group_size"},
    "gptq": {"desc_act", "sym", "damp_percent"},
    "fp8": {"weight_block_size", "fmt"},
    "mlx": {"bits", "group_size"},
}
BLOCK = (128, 128)
WHICH = {"quant_method", "modules_to_not_convert", "ignored_layers", "dequantize"}
"""Keys that change no number: tensors of the checkpoint say themselves which of them are quantised."""
ALLOWED: dict[str, dict[str, tuple[Any, ...]]] = {
    "mxfp4": {},
    "fp8": {
        "fmt": ("e4m3",),
        "activation_scheme": ("dynamic",),  # of what is multiplied with the weights: nothing in the checkpoint
        "scale_fmt": ("float", "ue8m0"),  # powers of two are float32 too
        "expert_dtype": ("fp8",),
        "weight_block_size": (),  # any but none, which is one factor for a whole matrix
    },
}
"""The options of the methods that are read, each with its values."""


class Quantised(NamedTuple):
    """How the weights of a checkpoint are quantised.

    Attributes:
        key: of the config that says so.
        method: such as "fp8" or "gptq".
        told: both, for messages.
        block: rows and columns of "fp8" that share a scale.
    """

    key: str
    method: str
    told: str
    block: tuple[int, int]


def quantised(config: Mapping[str, Any]) -> Quantised | None:
    """How a config says that its weights are quantised; None if it does not."""
    for key in KEYS:
        if given := dict(config.get(key) or {}):
            method = str(given.get("quant_method") or _tool(given))
            extra = [f"{given[k]} {told}" for k, told in (("bits", "bits"), ("format", "format")) if given.get(k)]
            told = f"{key} ({', '.join([f'method {method!r}', *map(str, extra)])[:100]})"
            return Quantised(key, method, told, _block(given) if method == "fp8" else BLOCK)
    return None


def check_readable(config: Mapping[str, Any], methods: Collection[str], architecture: str) -> None:
    """Check that the weights of a config are not quantised, or by one of `methods`, with options that are read.

    Raises:
        UsageError: by another, which is named, or with other options.
    """
    found = quantised(config)
    if found is None:
        return
    if found.method not in methods:
        told = "take the weights in bfloat16, float16 or float32"
        raise UsageError(f"{architecture} with {found.told} is not supported: {told}.")
    options = ALLOWED[found.method]
    for key, value in config[found.key].items():
        allowed = options.get(key, ())
        if key in WHICH or value in allowed or (value is not None) == (key == "weight_block_size"):
            continue
        only = f", only {' or '.join(map(repr, allowed))}" if allowed else ""
        told = f"{found.told} and {shown(key)}={shown(repr(value)[:60])}"
        raise UsageError(f"{architecture} with {told} is not supported{only}.")


def _tool(given: Mapping[str, Any]) -> str:
    return next((tool for tool, keys in TOOLS.items() if keys & set(given)), "unknown")


def _block(given: Mapping[str, Any]) -> tuple[int, int]:
    """Rows and columns that share a scale."""
    rows, columns = given.get("weight_block_size") or BLOCK
    if not all(type(n) is int and n > 0 for n in (rows, columns)):
        raise ValueError("weight_block_size is no pair of whole numbers from 1")
    return rows, columns
