"""What is measured: mixers by their words, stacks of them by their patterns, and public layers as their peers.

Every subject is built to a module like a `Mixer`: `forward(x, state) -> (y, state)`, `init_state`, `step`, `d_model`,
`causal`, `flops_per_token` and `state_bytes`; a public layer that does not tell one of the last two returns None. Its
parameters are moved off their inits, so that no zero or one hides what the layer computes. Attention words that name no
number of heads get at least `HEADS`, and names that stand for one layer at a width are one subject.
"""

from __future__ import annotations

import fnmatch
import functools
import importlib
import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.bias import causal_lower_right

from zoo import laws
from zoo.backbone import Backbone
from zoo.core.errors import UsageError
from zoo.mixers.attention_parts import AttentionWord
from zoo.pattern import Pattern, Word, create_mixer, list_mixers, mixer_of, parse, replaced
from zoo.protocol import Context, derive_heads, first_parameter_like
from zoo.report.layers import joined, layer_of, same_layers
from zoo.states import tree_bytes

HEADS = 4
"""The fewest heads that an attention word is measured with where it names no number: with one, `mha`, `gqa` and `mqa`
are the same layer."""


@dataclass(frozen=True)
class Subject:
    """A layer to measure.

    Attributes:
        name: a word, a pattern, or a peer's name.
        make: from width and length to the module.
        peer: whether it is a public layer.
        same: other names that were given and stand for the same layer at the width it is measured at.
    """

    name: str
    make: Callable[[int, int], nn.Module]
    peer: bool = False
    same: tuple[str, ...] = ()

    @property
    def names(self) -> str:
        """All its names."""
        return joined((self.name, *self.same))

    def text(self, width: int) -> str:
        """The pattern that is measured at a width, empty for a peer."""
        return "" if self.peer else str(with_heads(parse(self.name), width))

    def build(self, width: int, length: int, device: torch.device | str = "cpu") -> Any:
        """The module with weights from a fixed seed, moved off their inits.

        Args:
            width: D.
            length: T, of which only layers with weights for every step make use.
            device: where it lies.

        Raises:
            UsageError: options that do not fit the width.
        """
        torch.manual_seed(0)
        return laws.off_inits(self.make(width, length)).to(device)

    def weight_bytes(self, width: int, length: int) -> int:
        """Bytes of the module's weights, counted without making them."""
        with torch.device("meta"):
            return sum(p.numel() * p.element_size() for p in self.make(width, length).parameters())


class Layers(nn.Module):
    """The residual steps of a pattern as one layer, norms included."""

    def __init__(self, pattern: str, width: int, length: int):
        super().__init__()
        self.d_model, self.causal = width, True
        self.body = Backbone(parse(pattern), width, length=length)

    def forward(self, x: Tensor, state: Any = None, context: Context | None = None) -> tuple[Tensor, Any]:
        return self.body(x, state, context)

    def step(self, x_t: Tensor, state: Any, context: Context | None = None) -> tuple[Tensor, Any]:
        y, state = self.body(x_t.unsqueeze(1), state, context)
        return y.squeeze(1), state

    def init_state(self, batch_size: int, **options: Any) -> Any:
        return self.body.init_state(batch_size, **options)

    def flops_per_token(self, context_length: int) -> int:
        return self.body.flops_per_token(context_length)

    def state_bytes(self, batch_size: int, context_length: int, dtype: torch.dtype) -> int:
        return self.body.state_bytes(batch_size, context_length, dtype)


def from_pattern(pattern: str) -> Subject:
    """A word alone, or the residual steps of a pattern with several.

    Raises:
        UsageError: an unknown word or option.
    """
    nodes = parse(pattern).nodes
    alone = len(nodes) == 1 and isinstance(nodes[0], Word) and not nodes[0].step.changed()

    def make(width: int, length: int) -> nn.Module:
        text = str(with_heads(parse(pattern), width))
        return layer_of(text, width, length) if alone else Layers(text, width, length)

    return Subject(pattern, make)


def heads_at(width: int, groups: int = 1) -> int:
    """The number of heads of an attention word that names none, a multiple of `groups`: at least `HEADS`."""
    fewest = max(HEADS, derive_heads(width))
    return next((n for n in range(groups, width + 1, groups) if n >= fewest and width % n == 0), groups)


def with_heads(pattern: Pattern, width: int) -> Pattern:
    """A pattern whose attention words have at least `HEADS` heads each, but for those that settle it themselves."""

    def word(old: Word) -> Word:
        config: Any = old.config
        options = dict(config)
        settled = options.get("n_heads", 0) is not None or options.get("head_dim") is not None
        if settled or not issubclass(mixer_of(config), AttentionWord):
            return old
        groups = options.get("n_kv_heads") or 1
        if max(groups, derive_heads(width)) >= HEADS:
            return old
        new = type(config)(**{**config.changed(), "n_heads": heads_at(width, groups)})
        try:
            with torch.device("meta"):
                create_mixer(new, width)
        except UsageError:  # other options want another number
            return old
        return replace(old, config=new)

    return replaced(pattern, lambda old, layer: word(old))


def distinct_layers(subjects: Sequence[Subject], width: int) -> list[Subject]:
    """The subjects, of those that are one layer at this width only the first, which has the names of all."""
    own = {s.name: s for s in subjects if not s.peer}
    texts: dict[str, list[str]] = {}
    for name, subject in own.items():
        texts.setdefault(subject.text(width), []).append(name)
    found = [[name for text in group for name in texts[text]] for group in same_layers(texts, width, length=HEADS * 16)]
    same = {first: tuple(others) for first, *others in found}
    return [replace(s, same=same.get(s.name, ())) for s in subjects if s.peer or s.name in same]


# ---- public layers


class SDPA(nn.Module):
    """Softmax attention as torch brings it: three projections, `scaled_dot_product_attention`, one projection."""

    causal = True

    def __init__(self, width: int):
        super().__init__()
        self.d_model, self.heads = width, heads_at(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)

    def init_state(self, batch_size: int, *, capacity: int | None = None, device=None, dtype=None) -> Any:
        device, dtype = first_parameter_like(self, device, dtype)
        shape = (2, self.heads, capacity or 0, self.d_model // self.heads)
        buffer = torch.zeros(batch_size, *shape, device=device, dtype=dtype)
        return buffer, torch.zeros(batch_size, dtype=torch.int64, device=buffer.device)

    def forward(self, x: Tensor, state: Any = None, context: Context | None = None) -> tuple[Tensor, Any]:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        if state is None:
            o = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            buffer, length = state
            seen = int(length[0])
            if (missing := seen + q.shape[2] - buffer.shape[3]) > 0:
                buffer = F.pad(buffer, (0, 0, 0, max(missing, buffer.shape[3])))
            buffer[:, :, :, seen : seen + q.shape[2]] = torch.stack([k, v], 1)
            k, v = buffer[:, :, :, : seen + q.shape[2]].unbind(1)
            mask = None if q.shape[2] == 1 else causal_lower_right(q.shape[2], k.shape[2])
            o = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
            state = buffer, length + q.shape[2]
        return self.out(o.transpose(1, 2).flatten(2)), state

    def step(self, x_t: Tensor, state: Any) -> tuple[Tensor, Any]:
        y, state = self(x_t.unsqueeze(1), state)
        return y.squeeze(1), state

    def flops_per_token(self, context_length: int) -> int:
        return 8 * self.d_model**2 + 4 * self.d_model * context_length

    def state_bytes(self, batch_size: int, context_length: int, dtype: torch.dtype) -> int:
        return tree_bytes(self.init_state(batch_size, capacity=context_length, device="meta", dtype=dtype))


class TorchLSTM(nn.Module):
    """`torch.nn.LSTM`."""

    causal = True

    def __init__(self, width: int):
        super().__init__()
        self.d_model = width
        self.cell = nn.LSTM(width, width, batch_first=True)

    def init_state(self, batch_size: int, *, capacity: int | None = None, device=None, dtype=None) -> Any:
        device, dtype = first_parameter_like(self, device, dtype)
        zeros = torch.zeros(batch_size, 1, self.d_model, device=device, dtype=dtype)
        return zeros, zeros.clone()

    def forward(self, x: Tensor, state: Any = None, context: Context | None = None) -> tuple[Tensor, Any]:
        carried = None if state is None else tuple(s.transpose(0, 1).contiguous() for s in state)
        y, state = self.cell(x, carried)
        return y, tuple(s.transpose(0, 1) for s in state)

    def step(self, x_t: Tensor, state: Any) -> tuple[Tensor, Any]:
        y, state = self(x_t.unsqueeze(1), state)
        return y.squeeze(1), state

    def flops_per_token(self, context_length: int) -> int:
        return 16 * self.d_model**2

    def state_bytes(self, batch_size: int, context_length: int, dtype: torch.dtype) -> int:
        return tree_bytes(self.init_state(batch_size, device="meta", dtype=dtype))


class Foreign(nn.Module):
    """A public layer of whole sequences, as it comes: no state of it is measured."""

    causal = True

    def __init__(self, layer: nn.Module, width: int):
        super().__init__()
        self.d_model, self.layer = width, layer

    def forward(self, x: Tensor, state: Any = None, context: Context | None = None) -> tuple[Tensor, Any]:
        y = self.layer(x)
        return (y[0] if isinstance(y, tuple) else y), ()

    def flops_per_token(self, context_length: int) -> None:
        return None

    def state_bytes(self, batch_size: int, context_length: int, dtype: torch.dtype) -> None:
        return None


def _fla(layer: str, width: int, length: int) -> nn.Module:
    _needs_gpu("fla")
    heads = derive_heads(width)
    options = {"num_heads": heads, "head_dim": width // heads} if layer in ("GatedDeltaNet", "RWKV7Attention") else {}
    options = {"head_dim": width // heads, "layer_idx": 0} if layer == "RWKV7Attention" else options
    made = getattr(importlib.import_module("fla.layers"), layer)(hidden_size=width, **options)
    return Foreign(made, width)


def _mamba_ssm(layer: str, width: int, length: int) -> nn.Module:
    _needs_gpu("mamba_ssm")
    return Foreign(getattr(importlib.import_module("mamba_ssm"), layer)(d_model=width), width)


def _mambapy(width: int, length: int) -> nn.Module:
    module = importlib.import_module("mambapy.mamba")
    return Foreign(module.MambaBlock(module.MambaConfig(d_model=width, n_layers=1)), width)


def _xlstm(layer: str, width: int, length: int) -> nn.Module:
    module = importlib.import_module("xlstm")
    heads = derive_heads(width)
    if layer == "mLSTM":
        made = module.mLSTMLayer(module.mLSTMLayerConfig(embedding_dim=width, num_heads=heads, context_length=length))
    else:
        config = module.sLSTMLayerConfig(embedding_dim=width, num_heads=heads, backend="vanilla", dtype="float32")
        made = module.sLSTMLayer(config)
    return Foreign(made, width)


def _ncps(width: int, length: int) -> nn.Module:
    return Foreign(importlib.import_module("ncps.torch").CfC(width, width), width)


def _needs_gpu(package: str) -> None:
    if not torch.cuda.is_available():
        raise ImportError(f"the layers of {package} run on GPUs only")


PEERS: dict[str, tuple[str, Callable[[int, int], nn.Module]]] = {
    "torch SDPA attention": ("torch", lambda width, length: SDPA(width)),
    "torch.nn.LSTM": ("torch", lambda width, length: TorchLSTM(width)),
    **{f"fla {n}": ("fla", functools.partial(_fla, n)) for n in ("GatedDeltaNet", "GatedLinearAttention", "DeltaNet")},
    **{f"mamba_ssm {name}": ("mamba_ssm", functools.partial(_mamba_ssm, name)) for name in ("Mamba", "Mamba2")},
    "mambapy MambaBlock": ("mambapy", _mambapy),
    "xlstm mLSTM": ("xlstm", functools.partial(_xlstm, "mLSTM")),
    "xlstm sLSTM": ("xlstm", functools.partial(_xlstm, "sLSTM")),
    "ncps CfC": ("ncps", _ncps),
}
"""The package, and how a layer of that width and length is made; ImportError where it cannot run here."""


def peers() -> list[Subject]:
    """The public layers that are installed."""
    found = [(name, make) for name, (package, make) in PEERS.items() if importlib.util.find_spec(package)]
    return [Subject(name, make, peer=True) for name, make in found]


# ---- choosing


def choose(words: Sequence[str]) -> list[Subject]:
    """The subjects that words, patterns of words and shell patterns name; every sequence mixer where none is given.

    Raises:
        UsageError: an unknown word, or a shell pattern that nothing matches.
    """
    known = list_mixers(kind="sequence")
    names: list[str] = []
    for word in words or known:
        if _is_shell_pattern(word):
            matched = fnmatch.filter(known, word)
            if not matched:
                raise UsageError(f"No sequence mixer matches {word!r}. Available: {', '.join(known)}.")
            names += matched
        else:
            names.append(word)
    return [from_pattern(name) for name in dict.fromkeys(names)]


def _is_shell_pattern(text: str) -> bool:
    """Whether `*` and `?` stand within one name, unlike the `*` of `2*(mamba2 swiglu)`."""
    name = text.replace("*", "").replace("?", "")
    return name != text and (not name or name.isidentifier())


@functools.cache
def _passed_laws(subject: Subject, width: int, length: int, device: str) -> list[str]:
    return laws.quick(subject.build(width, max(length, 2 * 70), device))


def passed_laws(subject: Subject, width: int, length: int, device: str) -> list[str]:
    """The names of the laws that a subject passes at this width, checked once in a process; none for a peer.

    Raises:
        laws.LawBroken: one that does not hold.
    """
    return [] if subject.peer else _passed_laws(subject, width, length, device)
