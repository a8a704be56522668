"""Mamba-3 whole, as flash-linear-attention and as its authors keep it, and the authors' layers of attention.

No kernel of Mamba-3 runs on a CPU, so its recurrence stands here in their place; all around it is the library's.
"""

from __future__ import annotations

import json
import math

import pytest
import torch
import torch.nn.functional as F
from fla.layers import mamba3 as layer
from fla.models.mamba3 import Mamba3Config, Mamba3ForCausalLM
from published import LOGITS, check, check_config, perturbed, refusal
from safetensors.torch import save_file
from torch import nn
from transformers import Mamba2Config
from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer

import zoo

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 61, "head_dim": 8, "state_size": 6}


def recurrence(*, Q, K, V, ADT, DT, Trap, Q_bias, K_bias, Angles, D, Z, **how):
    """Step by step what the kernel computes for one key a step."""

    def turned(x, angle):
        x, n = x.unflatten(-1, (-1, 2)), angle.shape[-1]
        a, b = x[..., :n, 0], x[..., :n, 1]
        pairs = torch.stack([a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()], -1)
        return torch.cat([pairs, x[..., n:, :]], -2).flatten(-2)

    heads = V.shape[2] // Q.shape[2]
    q, k = (m.repeat_interleave(heads, 2) + bias for m, bias in ((Q, Q_bias), (K, K_bias)))
    angle = (math.pi * torch.tanh(Angles) * DT.mT[..., None]).cumsum(1)
    q, k = turned(q, angle), turned(k, angle)
    state, before, outputs = 0.0, 0.0, []
    for t in range(V.shape[1]):
        alpha, dt, share = (m[:, :, t, None, None] for m in (ADT.exp(), DT, torch.sigmoid(Trap)))
        write = k[:, t, :, :, None] * V[:, t, :, None]
        state = alpha * state + (1 - share) * dt * alpha * before + share * dt * write
        outputs.append((state * q[:, t, :, :, None]).sum(-2) + D[:, None] * V[:, t])
        before = write
    y = torch.stack(outputs, 1)
    return y if Z is None else y * F.silu(Z)


@pytest.fixture(autouse=True)
def on_a_cpu(monkeypatch):
    monkeypatch.setattr(layer, "mamba3_siso_combined", recurrence)

    def forward(self, hidden_states, past_key_values=None, **how):
        return self.cuda_kernels_forward(hidden_states)[0], None, past_key_values

    monkeypatch.setattr(layer.Mamba3, "forward", forward)


def made(**options):
    return perturbed(Mamba3ForCausalLM(Mamba3Config(**{**SIZES, **options})))


@pytest.mark.parametrize(
    "options",
    [
        {"fuse_norm": False},
        {"rope_fraction": 1.0, "n_groups": 2, "A_floor": 0.3, "tie_word_embeddings": True},
        {"is_outproj_norm": True, "norm_eps": 1e-3, "expand": 3},
    ],
    ids=str,
)
def test_models(options, tmp_path):
    check(made(**options), tmp_path, length=20, cuts=(1, 7, 8, 15))


def test_a_config_as_it_is_written(tmp_path):
    config = {**made().config.to_dict(), "architectures": ["Mamba3ForCausalLM"]}
    check_config(json.loads(json.dumps(config)), tmp_path)


def test_weights_of_several_values_a_step():
    """MIMO: the same names and shapes."""
    with torch.device("meta"):
        theirs = Mamba3ForCausalLM(Mamba3Config(**SIZES, is_mimo=True, mimo_rank=3, is_outproj_norm=True))
    config = {**theirs.config.to_dict(), "architectures": ["Mamba3ForCausalLM"]}
    ours = zoo.create_model(zoo.models.families.families.of_config(config).model_options(config))
    written = zoo.interop.hf.published_weights(ours)
    assert {n: t.shape for n, t in written.items()} == {n: t.shape for n, t in theirs.state_dict().items()}


def test_the_default_config_has_as_many_weights():
    with torch.device("meta"):
        theirs, ours = Mamba3ForCausalLM(Mamba3Config()), zoo.create_model("mamba3-1.3b")
    assert ours.n_parameters() == sum(p.numel() for p in theirs.parameters())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_bias": True}, "use_bias=True is not supported, only False"),
        ({"is_mimo": True, "mimo_rank": 1}, "mimo_rank=1 is not supported"),
        ({"num_heads": 3}, "num_heads=3 is not supported, only 8"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu' is not supported, only 'silu'"),
    ],
)
def test_what_is_refused(changes, message):
    assert message in refusal({**Mamba3Config(**SIZES).to_dict(), "architectures": ["Mamba3ForCausalLM"], **changes})


# ---- the authors' form, `mamba_ssm`

AUTHORS = {
    "d_model": 32,
    "n_layer": 3,
    "vocab_size": 61,
    "ssm_cfg": {"layer": "Mamba3", "headdim": 8, "d_state": 6, "ngroups": 2, "chunk_size": 64},
    "attn_layer_idx": [],
    "attn_cfg": {},
    "d_intermediate": 0,
    "rms_norm": True,
    "residual_in_fp32": True,
    "fused_add_norm": True,
    "pad_vocab_size_multiple": 16,
    "tie_embeddings": True,
}
MHA = {"causal": True, "head_dim": 8, "num_heads": 6}


def test_the_authors_folder(monkeypatch, tmp_path):
    """Their names; and another rate of decay, which their models have had as long as this layer."""
    monkeypatch.setattr(
        layer.Mamba3,
        "_compute_a",
        lambda self, a: -(a.clamp(min=0) + 1 / (1 - a.clamp(max=0))).clamp(min=self.A_floor),
    )
    theirs = made(num_hidden_layers=3, n_groups=2, vocab_size=64, tie_word_embeddings=True)
    weights = {n.replace("embeddings.", "embedding."): t for n, t in theirs.state_dict().items() if n[:2] != "lm"}
    same_logits(AUTHORS, weights, lambda tokens: theirs(tokens, use_cache=False).logits, tmp_path)


class Rotary(nn.Module):
    """In place of flash-attn's, which needs a GPU: the halves of the first `width` channels rotated."""

    def __init__(self, width, base, interleaved, device):
        super().__init__()
        self.width, self.base, self.interleaved = width, base, interleaved

    def forward(self, q, kv, **how):
        rates = self.base ** -(torch.arange(0, self.width, 2) / self.width)
        angle = (torch.arange(q.shape[1])[:, None] * rates)[:, None]

        def rotated(x):
            x, rest = x[..., : self.width], x[..., self.width :]
            a, b = (x[..., ::2], x[..., 1::2]) if self.interleaved else x.chunk(2, -1)
            parts = a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()
            x = torch.stack(parts, -1).flatten(-2) if self.interleaved else torch.cat(parts, -1)
            return torch.cat([x, rest], -1)

        return rotated(q), torch.stack([rotated(kv[:, :, 0]), kv[:, :, 1]], 2)


@pytest.mark.parametrize(
    "options",
    [
        {"attn_cfg": {**MHA, "d_conv": 4, "qkv_proj_bias": False, "out_proj_bias": False, "rotary_emb_dim": 4}},
        {"attn_cfg": {**MHA, "num_heads_kv": 2, "softmax_scale": 0.2}, "d_intermediate": 100},
        {
            "attn_cfg": {
                **MHA,
                "rotary_emb_dim": 8,
                "rotary_emb_base": 50.0,
                "rotary_emb_interleaved": True,
                "d_conv": 3,
            }
        },
    ],
    ids=str,
)
def test_layers_of_attention(options, sources, monkeypatch, tmp_path):
    """mamba2attn: the authors' attention and perceptron between layers of Mamba-2 of transformers."""
    from mamba_ssm.modules import mha
    from mamba_ssm.modules.mlp import GatedMLP

    monkeypatch.setattr(mha, "RotaryEmbedding", Rotary)
    monkeypatch.setattr(mha, "causal_conv1d_fn", None)
    config = {**AUTHORS, "ssm_cfg": {"layer": "Mamba2", "headdim": 8, "d_state": 6}, "attn_layer_idx": [1], **options}
    recurrent = Mamba2Config(
        hidden_size=32, num_heads=8, head_dim=8, state_size=6, n_groups=1, layer_norm_epsilon=1e-5, num_hidden_layers=3
    )
    layers, hidden = nn.ModuleList(), config["d_intermediate"]
    for i in range(3):
        made = {"norm": nn.RMSNorm(32, 1e-5)}
        made["mixer"] = mha.MHA(32, **config["attn_cfg"]) if i == 1 else Mamba2Mixer(recurrent, layer_idx=i)
        if hidden:
            made |= {"norm2": nn.RMSNorm(32, 1e-5), "mlp": GatedMLP(32, hidden)}
        layers.append(nn.ModuleDict(made))
    parts = {"embedding": nn.Embedding(64, 32), "layers": layers, "norm_f": nn.RMSNorm(32, 1e-5)}
    backbone = perturbed(nn.ModuleDict(parts))

    def logits(tokens):
        x = backbone["embedding"](tokens)
        for each in layers:
            y = each["mixer"](each["norm"](x))
            x = x + (y if isinstance(y, torch.Tensor) else y[0])
            x = x + each["mlp"](each["norm2"](x)) if hidden else x
        return F.linear(backbone["norm_f"](x), backbone["embedding"].weight)

    weights = {f"backbone.{name}": tensor for name, tensor in backbone.state_dict().items()}
    same_logits(config, weights, logits, tmp_path)


def same_logits(config, weights, logits, tmp_path):
    """Logits in one pass, in pieces and by steps; gradients of the embedding; there and back."""
    folder = tmp_path / "authors"
    folder.mkdir()
    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    ours = zoo.from_hf(folder)
    tokens = torch.randint(61, (2, 20), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = logits(tokens)
        assert expected.std() > 0.1
        assert (ours(tokens)[0] - expected).abs().max() < LOGITS
        for cuts in ((1, 7, 8, 15), tuple(range(1, 20))):
            state, found = ours.init_state(2), []
            for piece in tokens.tensor_split(cuts, 1):
                y, state = ours(piece, state)
                found.append(y)
            assert (torch.cat(found, 1) - expected).abs().max() < LOGITS
    back = zoo.to_hf(ours, tmp_path / "ours")
    assert json.loads((back / "config.json").read_text()) == config
    again = zoo.from_hf(back).state_dict()
    assert all(torch.equal(tensor, again[name]) for name, tensor in ours.state_dict().items())
