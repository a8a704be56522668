"""Which packages the parts need, looked for before anything is imported: a missing one ends everything at once.

This file imports Python's own modules only.
"""

from __future__ import annotations

import importlib.util
import sys

OLDEST = (3, 11)
NEEDED = {
    "torch": "torch",
    "numpy": "numpy",
    "pydantic": "pydantic",
    "pydantic_core": "pydantic-core",
    "annotated_types": "annotated-types",
    "typing_inspection": "typing-inspection",
    "typing_extensions": "typing-extensions",
    "yaml": "pyyaml",
    "safetensors": "safetensors",
    "filelock": "filelock",
    "rich": "rich",
    "numba": "numba",
    "scipy": "scipy",
}
"""Without these no part runs: module and package."""
HELPFUL = {
    "triton": ("triton", "Triton kernels are left out, ours too, and nothing is compiled"),
    "fla": ("flash-linear-attention", "it is neither a form of an op nor a peer"),
    "flash_qla": ("flash-qla", "it is neither a form of an op nor a peer"),
    "mamba_ssm": ("mamba-ssm", "it is neither a form of an op nor a peer"),
    "causal_conv1d": ("causal-conv1d", "it is neither a form of an op nor a peer"),
}
"""Without these something is left out: module, package and what."""


def absent(modules: dict[str, str]) -> list[str]:
    """The packages, of those by their modules, that are not there."""
    return [package for module, package in modules.items() if importlib.util.find_spec(module) is None]


def problems() -> list[str]:
    """A line for each reason why nothing can run here."""
    found = [f"{package} is missing: no part runs without it." for package in absent(NEEDED)]
    if sys.version_info < OLDEST:
        found.insert(0, f"Python {'.'.join(map(str, OLDEST))} or later is needed, this is {sys.version.split()[0]}.")
    return found


def left_out() -> list[str]:
    """A line for each package without which something is left out."""
    gone = absent({module: package for module, (package, _) in HELPFUL.items()})
    return [f"{package} is not installed: {what}." for package, what in HELPFUL.values() if package in gone]
