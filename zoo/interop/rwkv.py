"""RWKV-7 in the authors' own format: a `.pth` file of weights by name, and no config (github.com/BlinkDL/RWKV-LM)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from zoo.core.errors import UsageError
from zoo.interop._weights import fill, hollow, unpickle, written
from zoo.mixers.rwkv7 import RWKV7
from zoo.models.config import ModelConfig
from zoo.models.ends import Ends
from zoo.models.families.rwkv7 import authors_maps, layers
from zoo.models.published.maps import Map
from zoo.pattern import parse

NAME = "RWKV-7 model of the authors"
NORM_EPS, GROUP_NORM_EPS = 1e-5, 64e-5  # in their code, for heads of any width
NEVER_READ = tuple(f"blocks.0.att.v{i}" for i in range(3))  # the first layer has no earlier values to mix in


def from_authors(
    source: str | Path | Mapping[str, Tensor],
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
) -> Ends:
    """A model of the authors' weights; the sizes are those of the tensors.

    Args:
        source: a `.pth` file (read with `weights_only=True`), or what it holds. `blocks.0.att.v0`, `v1` and `v2`, which
            some files have and no code reads, are left aside.
        dtype: of all weights; by default each keeps its own.
        device: where the weights go.

    Returns:
        The model, which `zoo.to_hf` can write in flash-linear-attention's format if its heads are 64 wide, as
        published ones are.

    Raises:
        UsageError: a file that cannot be read, or weights that are missing, not expected or of another shape.
    """
    weights = source if isinstance(source, Mapping) else unpickle(Path(source))
    if not all(isinstance(tensor, Tensor) for tensor in weights.values()):
        raise UsageError("from_authors takes a .pth file or a mapping of names to tensors.")
    model = hollow(_config(weights))
    fill(model, _maps(model), weights, NAME, left_aside=NEVER_READ, dtype=dtype, device=device)
    return model.eval()


def to_authors(model: Ends) -> dict[str, Tensor]:
    """The weights of an RWKV-7 model under the authors' names, for `torch.save`; on the CPU, no two share memory.

    Raises:
        UsageError: a model that the authors' code would not compute alike.
    """
    _check(model)
    return dict(written(model, _maps(model)))


def _config(weights: Mapping[str, Tensor]) -> ModelConfig:
    """The options that the shapes of weights stand for."""

    def shape(name: str) -> tuple[int, int]:
        if name not in weights:
            raise UsageError(f"This is no {NAME}: it lacks {name}.")
        if weights[name].ndim != 2:
            raise UsageError(f"This is no {NAME}: its {name} {tuple(weights[name].shape)} is no matrix.")
        return tuple(weights[name].shape)  # type: ignore[return-value]

    (vocab_size, width), (_, head_dim) = shape("emb.weight"), shape("blocks.0.att.r_k")
    n = 1
    while f"blocks.{n}.att.r_k" in weights:
        n += 1
    d_hidden = shape("blocks.0.ffn.key.weight")[0]
    decay, rate, gate = (shape(f"blocks.0.att.{name}1")[1] for name in "wag")
    value = shape("blocks.1.att.v1")[1] if n > 1 else gate  # a lone layer has none
    published = {
        "architectures": ["RWKV7ForCausalLM"],
        "model_type": "rwkv7",
        "vocab_size": vocab_size,
        "hidden_size": width,
        "num_hidden_layers": n,
        "head_dim": head_dim,
        "intermediate_size": d_hidden,
        "decay_low_rank_dim": decay,
        "a_low_rank_dim": rate,
        "v_low_rank_dim": value,
        "gate_low_rank_dim": gate,
        "norm_eps": NORM_EPS,
        "fuse_norm": False,
    }
    return ModelConfig(
        pattern=layers(
            n,
            d_hidden=d_hidden,
            head_dim=head_dim,
            decay_rank=decay,
            rate_rank=rate,
            value_rank=value,
            gate_rank=gate,
            norm_eps=GROUP_NORM_EPS,
        ),
        d_model=width,
        vocab_size=vocab_size,
        norm="layernorm",
        norm_eps=NORM_EPS,
        embedding_norm=True,
        published=published if head_dim * NORM_EPS == GROUP_NORM_EPS else None,  # the only eps that format can tell
    )


def _check(model: Ends) -> None:
    """Raise where a model is not what `_config` says of its weights."""
    form: dict[str, Any] = {"norm": "layernorm", "embedding_norm": True}
    free = {"pattern", "d_model", "vocab_size", "published", "dropout"}
    given = {k: v for k, v in model.config.changed().items() if k not in free}
    if wrong := [k for k in {**form, **given} if given.get(k) != form.get(k)]:
        told = ", ".join(f"{k}={getattr(model.config, k)!r}" for k in wrong)
        raise UsageError(f"This is no {NAME}: {told} is not what that has.")
    words = list(parse(model.config.pattern).words())
    mixers = [m for m in model.mixers() if isinstance(m, RWKV7)]
    names = ["rwkv7", "rwkv_channel_mix"] * (len(words) // 2)
    plain = [w.name for w in words] == names and not any(w.step.changed() for w in words)
    alike = all(
        (m.config.norm_eps, m.config.kappa_eps, m.config.value_residual) == (GROUP_NORM_EPS, 0.0, True) for m in mixers
    )
    if not (plain and alike and {n for m in _maps(model) for n in m.ours} == model.state_dict().keys()):
        raise UsageError(f"This is no {NAME}: pattern={model.config.pattern[:200]!r} is not what that has.")


def _maps(model: Ends) -> Iterator[Map]:
    """How the weights lie in the authors' files."""
    return authors_maps(model.config.d_model, len(model.backbone.steps) // 2)
