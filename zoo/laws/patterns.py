"""Backbones under the laws: all steps of a pattern as one mixer, so that the laws of mixers judge every node too."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

from torch import Tensor

from zoo.backbone import Backbone
from zoo.core.options import Options
from zoo.loops import LoopStep
from zoo.pattern import Word, parse
from zoo.pattern.changes import replaced
from zoo.protocol import Context, Mixer, Place, State, Traits
from zoo.residual import ResidualText


class OfPattern(Mixer):
    """A mixer that is made of a backbone."""

    name = "pattern"

    class Config(Options):
        """The options.

        Attributes:
            pattern: the steps.
            evaluate: in evaluation mode, in which tokens leave loops early.
            residual: the residual kind.
            backend: that of all words that have several.
        """

        pattern: str
        evaluate: bool = False
        residual: ResidualText = "plain"
        backend: Literal["auto", "reference"] = "auto"

    def __init__(self, d_model: int, config: Config, *, place: Place = Place()):
        super().__init__(d_model, config, place=place)
        pattern = parse(config.pattern)
        if config.backend != "auto":
            pattern = replaced(pattern, lambda word, layer: _with_backend(word, config.backend))
        self.backbone = Backbone(pattern, d_model, causal=place.causal, residual=config.residual, length=place.length)
        self.causal = place.causal
        self.traits = self._traits()
        self.train()

    def _traits(self) -> Traits:
        parts = [mixer.traits for mixer in self.backbone.mixers()]
        found: Any = {name: next((v for p in parts if (v := getattr(p, name))), None) for name in Traits._fields}
        leaves = any(isinstance(m, LoopStep) and m.halting is not None for m in self.backbone.modules())
        if leaves and self.config.evaluate:
            found["work_varies"] = "words without a state do not run where all tokens have left a loop"
        return Traits(**{name: value for name, value in found.items() if value is not None})

    def train(self, mode: bool = True) -> OfPattern:
        super().train(mode and not self.config.evaluate)
        return self

    def init_state(
        self, batch_size: int, *, capacity: int | None = None, device: Any = None, dtype: Any = None
    ) -> State:
        return self.backbone.init_state(batch_size, capacity=capacity, device=device, dtype=dtype)

    def forward(self, x: Tensor, state: State | None = None, context: Context | None = None) -> tuple[Tensor, State]:
        return self.backbone(x, state, context)

    def flops_per_token(self, context_length: int) -> int:
        return self.backbone.flops_per_token(context_length)

    def state_bytes(self, batch_size: int, context_length: int, dtype: Any) -> int:
        return self.backbone.state_bytes(batch_size, context_length, dtype)

    @classmethod
    def text(cls, options: dict[str, Any]) -> str:
        """The pattern, and what else is said of it."""
        rest = [f"{key}={value}" for key, value in options.items() if key != "pattern"]
        return options["pattern"] + (f" [{', '.join(rest)}]" if rest else "")

    @classmethod
    def law_cases(cls) -> list[dict[str, Any]]:
        """Every node, nested, with every option of a loop and a shared block off its default at least once."""
        nested = 'loop(2, loop(2, min_gru swiglu, exit=0.4) (short_conv | gqa), inject="add", exit=0.6)'
        zamba = 'shared("a", gqa(adapter_rank=2) geglu(adapter_rank=3, residual_scale=0.0), '
        inner = 'shared("b", gru shared("c", gqa swiglu, inject="add", enters="next") swiglu, inject="concat")'
        return [
            {
                "pattern": "short_conv loop(2, (swa(window=4) | gru) shortcut(swiglu(canon=3), short_conv swiglu), "
                'inject="concat", gate=True, exit=0.7, depth_loss=0.1) swiglu'
            },
            {"pattern": nested, "evaluate": True},
            {
                "pattern": f'2*(short_conv {zamba}inject="wide", enters="next", out_proj=True) min_gru) '
                'shared("d", mlp) swiglu shared("d")'
            },
            {
                "pattern": f'short_conv loop(2, {inner} short_conv, exit=0.6) shared("c") swiglu shared("b")',
                "residual": "mhc(streams=2)",
                "evaluate": True,
            },
            {
                "pattern": "min_gru shortcut(rwkv_channel_mix, loop(3, gqa swiglu(canon=4)))",
                "residual": "mhc(streams=2)",
            },
            {
                "pattern": 'loop(3, short_conv swiglu, inject="gated", inject_rank=8, norm="rmsnorm", exit=0.5, '
                "entropy_loss=0.2)",
                "residual": "hyper_connections(streams=2)",
                "evaluate": True,
            },
            {"pattern": 'loop(4, gated_deltanet swiglu, inject="add", start="zeros", gradient=2)'},
            {
                "pattern": 'loop(2, loop(3, gqa swiglu, inject="add", start="carried", norm="rmsnorm_plain", '
                'residual=True, gradient=[1, 2]) min_gru, norm="rmsnorm_plain")'
            },
        ]


def _with_backend(word: Word, backend: str) -> Word:
    if "backend" not in type(word.config).model_fields:
        return word
    return replace(word, config=type(word.config)(**{**word.config.changed(), "backend": backend}))


def is_evaluated(mixer: Mixer) -> str | None:
    """An exemption: halting heads choose, and learn nothing."""
    return None if mixer.training else "it is in evaluation mode, where halting heads choose"


def cuts_gradients(mixer: Mixer) -> str | None:
    """An exemption: some of what its outputs depend on gets no gradient."""
    cut = any(isinstance(module, LoopStep) and module.truncated for module in mixer.modules())
    return "gradients pass through the last passes of a loop only" if cut else None
