"""TRM, the tiny recursive model (Jolicoeur-Martineau 2025, arXiv 2510.04871): two layers, applied again and again.

The config keys are the authors', of `config/arch/trm.yaml`, with the `vocab_size` and `seq_len` (and, where puzzles are
numbered, the `num_puzzle_identifiers`) that they take from the data. Their checkpoints are torch files beside a YAML
file, which `zoo.interop.trm.from_authors` loads; `zoo.from_hf` reads what `zoo.to_hf` has written, with the same names.

Sizes: of the paper's experiments, with its vocabularies; -att and -mlp are the other form on the same puzzles.
Attention reads any length, the MLP form at most `seq_len` tokens. Taught by the objective `deep_supervision`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from zoo.models.published.config import Published, stack, word
from zoo.models.published.family import Family, families
from zoo.models.published.maps import Map, parts, same

OF_THE_TRAINING = ("batch_size", "causal", "name", "loss", "halt_exploration_prob", "no_ACT_continue", "forward_dtype")
PLACES = 16  # before the tokens, for what is learned of a puzzle, where a config does not say


def _options(p: Published) -> dict[str, Any]:
    p.ignore("H_layers")  # one network serves both levels
    prefix = places(p, PLACES)
    return recursive_options(p, layers(p, "L_layers", prefix), prefix, gradient="cycle")


def recursive_options(p: Published, pattern: str, prefix: int, **recursion: Any) -> dict[str, Any]:
    """The options of a recursive model in the authors' manner."""
    p.ignore(*OF_THE_TRAINING)
    width, length, learned = p("hidden_size"), p("seq_len"), is_learned(p)
    puzzles = p("num_puzzle_identifiers", None)
    return {
        "pattern": pattern,
        "d_model": width,
        "vocab_size": p("vocab_size"),
        "causal": False,
        "norm": "rmsnorm_plain",
        "placement": "post",
        "norm_eps": p.number("rms_norm_eps", 1e-5),
        "positions": "learned" if learned else "none",
        "max_len": prefix + length if learned or p("mlp_t", False) else None,  # attention reads any length
        "embedding_scale": width**0.5,
        "recursion": {
            "cycles": p("H_cycles"),
            "updates": p("L_cycles"),
            "max_steps": p("halt_max_steps"),
            "prefix": prefix,
            **({} if puzzles is None else {"n_puzzles": puzzles}),
            "puzzle_width": p("puzzle_emb_ndim", 0) or None,
            **recursion,
        },
    }


def places(p: Published, default: int = 0) -> int:
    """The number of places before the tokens; 0 stands for as many as the numbers learned of a puzzle fill."""
    learned, given = p("puzzle_emb_ndim", 0), p("puzzle_emb_len", default)
    return (given or -(learned // -p("hidden_size"))) if learned else 0


def layers(p: Published, count: str, prefix: int) -> str:
    """The pattern of a network whose number of layers is under the key `count`."""
    positions, expansion = p.only("pos_encodings", "none", "rope", "learned"), p("expansion")
    if p("mlp_t", False):
        p.ignore("num_heads", "rope_theta")
        mixer = word("token_mlp", d_hidden=_inner(prefix + p("seq_len"), expansion), norm_axis="time")
    else:
        turned = {"rope_interleaved": False, "rope_base": p.number("rope_theta", 1e4)}
        mixer = word("mha", n_heads=p("num_heads"), **(turned if positions == "rope" else {"rope": False}))
    feed_forward = word("swiglu", d_hidden=_inner(p("hidden_size"), expansion))
    return stack([mixer, feed_forward] * p(count))


def _inner(width: int, expansion: float) -> int:
    """Two thirds of the expanded width, up to a multiple of 256."""
    return -(-round(expansion * width * 2 / 3) // 256) * 256


def _weights(p: Published) -> Iterator[Map]:
    return recursive_maps(steps(p, "L_layers"), puzzles=bool(places(p, PLACES)), positions=is_learned(p))


def is_learned(p: Published) -> bool:
    """Whether positions are."""
    return p("pos_encodings") == "learned"


def steps(p: Published, count: str) -> list[str]:
    """The names of the mixers of a network, see `layers`."""
    return ["token_mlp" if p("mlp_t", False) else "mha", "swiglu"] * p(count)


def recursive_maps(inner: Sequence[str], outer: Sequence[str] = (), *, puzzles: bool, positions: bool) -> Iterator[Map]:
    """Where the authors keep what a recursive model holds.

    Args:
        inner, outer: names of the mixers of the network, and of that for the answer where it is another.
        puzzles, positions: whether the model learns something of each.
    """
    yield same("embedding.weight", "inner.embed_tokens.embedding_weight")
    yield same("head.weight", "inner.lm_head.weight")
    yield same("halting.weight", "inner.q_head.weight")
    yield same("halting.bias", "inner.q_head.bias")
    yield same("answer_init", "inner.H_init")
    yield Map(("latent_init",), ("inner.L_init",), lambda t: (t[None],), lambda t: (t[0],))
    if puzzles:
        yield same("puzzles.weight", "inner.puzzle_emb.weights")
    if positions:
        yield same("positions.weight", "inner.embed_pos.embedding_weight")
    for ours, theirs, names in (("backbone", "L_level", inner), ("outer", "H_level", outer)):
        for i, name in enumerate(names):
            to, layer = f"{ours}.steps.{i}.mixers.0.", f"inner.{theirs}.layers.{i // 2}."
            if name == "mha":
                yield same(f"{to}in_proj.weight", f"{layer}self_attn.qkv_proj.weight")
                yield same(f"{to}out_proj.weight", f"{layer}self_attn.o_proj.weight")
                continue
            mlp = f"{layer}{'mlp_t' if name == 'token_mlp' else 'mlp'}"
            yield parts([f"{to}gate_proj.weight", f"{to}up_proj.weight"], f"{mlp}.gate_up_proj.weight")
            yield same(f"{to}down_proj.weight", f"{mlp}.down_proj.weight")


SUDOKU = {"vocab_size": 11, "seq_len": 81}
MAZE = {"vocab_size": 6, "seq_len": 900}
ARC = {"vocab_size": 12, "seq_len": 900}
_ATTENTION = {
    "H_cycles": 3,
    "L_cycles": 6,
    "H_layers": 0,
    "L_layers": 2,
    "hidden_size": 512,
    "num_heads": 8,
    "expansion": 4,
    "puzzle_emb_ndim": 512,
    "puzzle_emb_len": 16,
    "pos_encodings": "rope",
    "mlp_t": False,
    "halt_max_steps": 16,
}
_MLP = {**_ATTENTION, "mlp_t": True, "pos_encodings": "none"}
_SHORTER = {**_ATTENTION, "L_cycles": 4}
SIZES: dict[str, dict[str, Any]] = {
    "tiny": {
        **_ATTENTION,
        "H_cycles": 2,
        "L_cycles": 2,
        "hidden_size": 64,
        "num_heads": 4,
        "puzzle_emb_ndim": 0,
        "halt_max_steps": 4,
        "vocab_size": 256,
        "seq_len": 64,
    },
    "sudoku": {**_MLP, **SUDOKU},
    "sudoku-att": {**_ATTENTION, **SUDOKU},
    "maze": {**_SHORTER, **MAZE},
    "maze-mlp": {**_MLP, **MAZE, "L_cycles": 4},
    "arc": {**_SHORTER, **ARC},
}

families.add(Family("trm", "TinyRecursiveReasoningModel_ACTV1", "trm", SIZES, _options, _weights))
