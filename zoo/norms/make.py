"""A norm from its name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from zoo.core.errors import UsageError
from zoo.pattern.named import read_named
from zoo.protocol import Norm, norms

NORM_EPS = 1e-5
register = norms.register
"""Class decorator `@register("name")`."""


def make_norm(spec: str | Mapping[str, Any], d_model: int, eps: float = NORM_EPS, axis: str = "channels") -> Norm:
    """The norm that a text such as `rmsnorm`, or a mapping with the key `name`, stands for; see `zoo.protocol.Norm`.

    Raises:
        UsageError: an unknown norm or option, or one that does not run along `axis`.
    """
    name, config = read_named(norms, spec)
    if axis not in norms[name].axes:
        offered = " or ".join(f'"{n}"' for n in norms.names() if axis in norms[n].axes and n != "none")
        raise UsageError(f'norm_axis="{axis}" is offered for norm={offered}, not {name!r}.')
    return norms[name](d_model, config, eps=eps, axis=axis)
