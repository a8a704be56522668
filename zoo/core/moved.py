"""Where modules and names are that were of this project under another path, for files that still import the old one."""

from __future__ import annotations

import importlib.util

_PARTS = {"attention": "attention_parts", "delta": "delta_front", "parts": "parts"}
_OPS = (
    *("attention", "causal_conv1d", "cfc", "delta_rule", "dplr", "gated_mlp", "gated_norm", "latent_attention"),
    *("linear_attention", "ltc", "mlstm", "plain_norm", "scan", "selective_scan", "slstm", "sparse_latent_attention"),
    "token_shift",
)
_STATES = (*("canonical", "document_positions", "fork", "grow", "join", "next_position", "select", "tree_bytes"),)
MOVED = {
    "tasks": "zoo.tasks, and tasks.registry is zoo.core.options, .errors and .registry,",
    "tasks.registry": "zoo.core.options, .errors and .registry",
    "tasks.filing": "zoo.core.readers",
    "zoo.registry": "zoo.protocol for mixers, register and derive_heads, and zoo.pattern for the rest,",
    **{f"zoo.protocol.{name}": f"zoo.states.{name}" for name in _STATES},
    "zoo.benchmarks.records": "zoo.report.records",
    "zoo.report.measurements": "zoo.report.records",
    "zoo.training.listing": "zoo.listing",
    **{f"zoo.models.token.{name}": f"zoo.models.config.{name}" for name in ("ModelConfig", "Recursion")},
    **{f"zoo.models.token.{name}": f"zoo.{name}" for name in ("create_model", "list_models", "swap")},
    "zoo.models.token.model_config": "zoo.models.create.model_config",
    "zoo.models.token.make_backbone": "zoo.models.ends.make_backbone",
    **{f"zoo.mixers._{name}": f"zoo.mixers.{new}" for name, new in _PARTS.items()},
    **{f"zoo.channel_mixers.{name}": "zoo.channel_mixers.glu" for name in ("_glu", "geglu", "swiglu")},
    **{f"zoo.backbone.{name}": f"zoo.norms.rms.{name}" for name in ("PlainRMSNorm", "ZeroCentredRMSNorm")},
    "zoo.residual.HyperConnections": "zoo.residual.hyper_connections.HyperConnections",
    "zoo.residual.ManifoldHyperConnections": "zoo.residual.hyper_connections.ManifoldHyperConnections",
    **{f"zoo.models.families._{name}": f"zoo.models.published.{name}" for name in ("family", "keys", "layers", "maps")},
    "zoo.models.families._published": "zoo.models.published.config",
    "zoo.training.experiment": "zoo.training.options, .recipes and .fit",
    "zoo.training.loop.train": "zoo.train",
    "zoo.training.loop.Result": "zoo.training.result.Result",
    "zoo.training.loop.Interrupted": "zoo.training.stopping.Interrupted",
    "zoo.training.run.load": "zoo.load",
    "zoo.training.run.find_checkpoint": "zoo.training.checkpoints.find",
    "zoo.training.run.load_from": "zoo.training.loading.load_from",
    **{f"zoo.training.run.{name}": f"zoo.core.run_files.{name}" for name in ("read_config", "read_metrics", "run_of")},
    "zoo.training.evaluation.open_run": "zoo.training.loading.open_run",
    **{f"zoo.ops.{name}": f"a name of zoo.ops (from zoo.ops import {name})" for name in _OPS},
}


def moved(name: str) -> str | None:
    """Where a module, or a name of one, is that was of this project under another name."""
    top = name.partition(".")[0]
    if name not in MOVED and (top not in ("tasks", "benchmarks") or importlib.util.find_spec(f"zoo.{name}") is None):
        return None
    return f"it is {MOVED.get(name, f'zoo.{name}')} now"
