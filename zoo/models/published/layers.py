"""Weight maps of parts that many published models have in common, with names relative to the part."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

import torch

from zoo.models.published.config import Published
from zoo.models.published.maps import Map, joined, reshaped, same, stacked, stacked_pairs, within


def token_maps(
    p: Published,
    *,
    embedding: str = "model.embed_tokens.weight",
    norm: str | None = "model.norm.weight",
    norm_bias: str | None = None,
    head: str = "lm_head.weight",
    tied: bool = False,
) -> Iterator[Map]:
    """The embedding, the last norm where it stands before the head alone, and the head; `tied` is the default of
    `tie_word_embeddings`."""
    tie = p("tie_word_embeddings", tied)
    yield same("embedding.weight", embedding, copies=(head,) if tie else ())
    if norm:
        yield same("norm.weight", norm)
    if norm_bias:
        yield same("norm.bias", norm_bias)
    if not tie:
        yield same("head.weight", head)


def step_maps(
    step: int | str,
    layer: str,
    part: str,
    maps: Iterable[Map],
    *,
    norm: str | None,
    norm_bias: bool = False,
    norm_out: str | None = None,
    mixer: int = 0,
) -> Iterator[Map]:
    """A residual step of one mixer, its norms included.

    Args:
        step: its number in the backbone, or its place, such as "1.body.steps.0".
        layer: prefix of the published layer.
        part: the mixer's prefix in there.
        maps: of the mixer.
        norm, norm_out: names in there of the norms before and after it.
        norm_bias: they have biases.
        mixer: number of the mixer among those that stand side by side in the step.
    """
    ours = f"backbone.steps.{step}."
    for kind, name in (("norm_in", norm), ("norm_out", norm_out)):
        if name:
            yield same(f"{ours}{kind}.weight", f"{layer}{name}.weight")
        if name and norm_bias:
            yield same(f"{ours}{kind}.bias", f"{layer}{name}.bias")
    yield from within(f"{ours}mixers.{mixer}.", f"{layer}{part}.", maps)


def attention_maps(
    n_heads: int,
    n_kv_heads: int,
    head_dim: int,
    *,
    bias: bool = False,
    out_bias: bool | None = None,
    qk_norm: bool = False,
    gate: bool = False,
    names: tuple[str, str, str, str] = ("q_proj", "k_proj", "v_proj", "o_proj"),
    norms: tuple[str, str] = ("q_norm", "k_norm"),
) -> Iterator[Map]:
    """`gqa` and its kin from projections of queries, keys and values apart.

    Args:
        gate: the projection of queries holds the query of each head, then its gate.
    """
    *inner, out = names
    sizes = [n * head_dim for n in (n_heads, n_kv_heads, n_kv_heads)]
    index = None
    if gate:
        sizes[0] *= 2
        queries, rest = torch.arange(sum(sizes), device="cpu").split([sizes[0], sum(sizes[1:])])
        query, gates = queries.view(n_heads, 2, head_dim).unbind(1)
        index = torch.cat([query.flatten(), rest, gates.flatten()])
    yield joined("in_proj.weight", [f"{n}.weight" for n in inner], sizes, index=index)
    yield same("out_proj.weight", f"{out}.weight")
    if bias:
        yield joined("in_proj.bias", [f"{n}.bias" for n in inner], sizes, index=index)
    if bias if out_bias is None else out_bias:
        yield same("out_proj.bias", f"{out}.bias")
    if qk_norm:
        yield same("q_norm", f"{norms[0]}.weight")
        yield same("k_norm", f"{norms[1]}.weight")


def linear_maps(ours: str, theirs: str, *, bias: bool = False) -> Iterator[Map]:
    """A linear layer."""
    yield same(f"{ours}.weight", f"{theirs}.weight")
    if bias:
        yield same(f"{ours}.bias", f"{theirs}.bias")


def glu_maps(
    *, bias: bool = False, names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
) -> Iterator[Map]:
    """`swiglu` and its kin from three projections."""
    for ours, theirs in zip(("gate_proj", "up_proj", "down_proj"), names, strict=True):
        yield from linear_maps(ours, theirs, bias=bias)


def mlp_maps(*, bias: bool = False, names: tuple[str, str] = ("up_proj", "down_proj")) -> Iterator[Map]:
    """`mlp` from two projections."""
    for ours, theirs in zip(("in_proj", "out_proj"), names, strict=True):
        yield from linear_maps(ours, theirs, bias=bias)


def conv_maps(width: int, kernel: int, *, bias: bool, name: str = "conv1d") -> Iterator[Map]:
    """The short convolution of a mixer from torch's Conv1d over `width` channels."""
    yield reshaped("conv.weight", f"{name}.weight", (width, kernel), (width, 1, kernel))
    if bias:
        yield same("conv.bias", f"{name}.bias")


def conv_parts_maps(
    widths: Sequence[int], *, names: Sequence[str] = ("q_conv1d", "k_conv1d", "v_conv1d")
) -> Iterator[Map]:
    """The short convolution of a mixer from one of torch's Conv1d for each part of its channels."""
    m = joined("conv.weight", [f"{name}.weight" for name in names], widths)
    yield replace(
        m,
        read=lambda *parts: [whole.squeeze(1) for whole in m.read(*parts)],
        write=lambda whole: m.write(whole.unsqueeze(1)),
    )


def mamba_maps(
    d_inner: int, kernel: int, *, bias: bool, conv_bias: bool, norms: tuple[str, str, str] | None = None
) -> Iterator[Map]:
    """`mamba`; `norms` are the names of those of dt, B and C."""
    yield from linear_maps("in_proj", "in_proj", bias=bias)
    yield from conv_maps(d_inner, kernel, bias=conv_bias)
    yield from linear_maps("x_proj", "x_proj")
    yield from linear_maps("dt_proj", "dt_proj", bias=True)
    yield same("A_log", "A_log")
    yield same("D", "D")
    for i, name in enumerate(norms or ()):
        yield same(f"norms.{i}.weight", f"{name}.weight")
    yield from linear_maps("out_proj", "out_proj", bias=bias)


def mamba2_maps(
    d_inner: int,
    keys: int,
    kernel: int,
    *,
    bias: bool,
    conv_bias: bool,
    out_bias: bool | None = None,
    norm: bool = True,
) -> Iterator[Map]:
    """`mamba2`; `keys` is the width of all B's, n_groups * d_state."""
    yield from linear_maps("in_proj", "in_proj", bias=bias)
    yield from conv_maps(d_inner + 2 * keys, kernel, bias=conv_bias)
    for name in ("dt_bias", "A_log", "D"):
        yield same(name, name)
    if norm:
        yield same("norm.weight", "norm.weight")
    yield from linear_maps("out_proj", "out_proj", bias=bias if out_bias is None else out_bias)


def mla_maps(
    n_heads: int, q_rank: int | None, kv_rank: int, nope_dim: int, rope_dim: int, v_dim: int, *, bias: bool = False
) -> Iterator[Map]:
    """`mla` as DeepSeek's checkpoints hold it."""
    first = "q_a_proj" if q_rank else "q_proj"
    sizes = [q_rank or n_heads * (nope_dim + rope_dim), kv_rank + rope_dim]
    yield joined("in_proj.weight", [f"{first}.weight", "kv_a_proj_with_mqa.weight"], sizes)
    if bias:
        yield joined("in_proj.bias", [f"{first}.bias", "kv_a_proj_with_mqa.bias"], sizes)
        yield same("out_proj.bias", "o_proj.bias")
    if q_rank:
        yield same("q_norm", "q_a_layernorm.weight")
        yield same("q_up.weight", "q_b_proj.weight")
    yield same("kv_norm", "kv_a_layernorm.weight")
    width = nope_dim + v_dim
    yield reshaped("kv_up", "kv_b_proj.weight", (n_heads, width, kv_rank), (n_heads * width, kv_rank))
    yield same("out_proj.weight", "o_proj.weight")


def moe_maps(
    n_experts: int,
    *,
    router: str = "gate",
    names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj"),
    shared: str | None = None,
    shared_gate: str | None = None,
    correction: str | None = None,
    gated: bool = True,
    latent: tuple[str, str] | None = None,
    whole: tuple[str, str] | None = None,
) -> Iterator[Map]:
    """`moe` from experts that lie one by one under `experts.0` and so on.

    Args:
        names: of an expert's projections; perceptrons have the last two.
        shared, shared_gate, correction: names of the shared experts, of their gate's weight, and of the bias on the
            choice, where there are any.
        gated: the experts are gated layers, not perceptrons.
        latent: names of the projections to and from the experts' width, where they have one of their own.
        whole: names of two tensors in which some checkpoints hold all experts, as ours do.
    """
    gate, up, down = ([f"experts.{i}.{name}.weight" for i in range(n_experts)] for name in names)
    yield same("router.weight", f"{router}.weight")
    experts = stacked_pairs("up_proj", gate, up) if gated else stacked("up_proj", up), stacked("down_proj", down)
    for m, name in zip(experts, whole or (None, None), strict=True):
        yield replace(m, forms=(same(m.ours[0], name),)) if name else m
    for ours, theirs in zip(("latent_in", "latent_out"), latent or (), strict=False):
        yield from linear_maps(ours, theirs)
    if shared:
        every = glu_maps(names=names) if gated else mlp_maps(names=names[1:])
        yield from within("shared.", f"{shared}.", every)
    if shared_gate:
        yield same("shared_gate.weight", shared_gate)
    if correction:
        yield same("e_score_correction_bias", correction)
