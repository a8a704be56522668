"""loop against the low-level module of HRM-Text: outputs, gradients through its last passes, and its caches."""

from __future__ import annotations

import pytest
import torch
from published import perturbed
from torch import Tensor, nn
from transformers import HrmTextConfig, HrmTextModel

import zoo
from zoo.backbone import Backbone
from zoo.pattern import StepOptions, parse

D, LAYERS, VOCAB = 32, 2, 31
WORDS = f'{LAYERS}*(mha(n_heads=4, head_dim=8, gate="channel", rope_interleaved=False) swiglu(d_hidden=40))'
EPS = 1e-6


def hrm_text(passes: int, learning: int) -> HrmTextModel:
    """One high-level cycle, H(e + z_L), with z_L <- norm(L(z_L + e)) from zeros."""
    torch.manual_seed(0)
    config = HrmTextConfig(
        vocab_size=VOCAB,
        hidden_size=D,
        intermediate_size=40,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        head_dim=8,
        H_cycles=1,
        L_cycles=passes,
        L_bp_cycles=[learning],
        attn_implementation="sdpa",
        embedding_scale=1.0,
        prefix_lm=False,
    )
    model = perturbed(HrmTextModel(config).double())
    nn.init.zeros_(model.z_L_init)
    return model


def backbone(pattern: str) -> Backbone:
    return Backbone(parse(pattern), D, defaults=StepOptions(norm="rmsnorm_plain"), norm_eps=EPS).double()


def put(stack: nn.Module, steps: nn.ModuleList) -> list[tuple[Tensor, list[Tensor]]]:
    """Their weights in ours; pairs of one of our weights and those of theirs that stand in it, in order."""
    pairs = []
    for i, layer in enumerate(stack.layers):
        attention, dense = steps[2 * i].mixers[0], steps[2 * i + 1].mixers[0]
        own = layer.self_attn
        rows = [m.weight for m in (own.q_proj, own.k_proj, own.v_proj, own.gate_proj)]
        pairs += [(attention.in_proj.weight, rows), (attention.out_proj.weight, [own.o_proj.weight])]
        pairs += [
            (getattr(dense, n).weight, [getattr(layer.mlp, n).weight]) for n in ("gate_proj", "up_proj", "down_proj")
        ]
    with torch.no_grad():
        for ours, theirs in pairs:
            ours.copy_(torch.cat(theirs))
    return pairs


@pytest.mark.parametrize(("passes", "learning"), [(3, 2), (4, 1), (2, 2)])
def test_a_loop_is_its_low_level_module(passes, learning):
    theirs = hrm_text(passes, learning)
    low = backbone(f'loop({passes}, {WORDS}, inject="add", start="zeros", norm="rmsnorm_plain", gradient={learning})')
    high = backbone(WORDS)
    pairs = put(theirs.L_module, low.steps[0].body.steps) + put(theirs.H_module, high.steps)
    tokens = torch.randint(VOCAB, (2, 11), generator=torch.Generator().manual_seed(1))

    e = theirs.embed_tokens(tokens).detach().requires_grad_()
    expected = theirs(inputs_embeds=e, use_cache=False).last_hidden_state
    expected.sin().sum().backward()
    x = e.detach().clone().requires_grad_()
    z, _ = low(x)
    y = torch.rms_norm(high(x + z)[0], (D,), eps=EPS)
    torch.testing.assert_close(y, expected, rtol=1e-6, atol=1e-6)
    y.sin().sum().backward()
    torch.testing.assert_close(x.grad, e.grad, rtol=1e-4, atol=2e-5)  # their angles are in float32
    for ours, parts in pairs:
        torch.testing.assert_close(ours.grad, torch.cat([p.grad for p in parts]), rtol=1e-5, atol=1e-5)


def test_every_pass_has_a_cache_of_its_own():
    theirs = hrm_text(3, 3)
    low = backbone(f'loop(3, {WORDS}, inject="add", start="zeros", norm="rmsnorm_plain")')
    high = backbone(WORDS)
    put(theirs.L_module, low.steps[0].body.steps)
    put(theirs.H_module, high.steps)
    tokens = torch.randint(VOCAB, (1, 7), generator=torch.Generator().manual_seed(1))
    states, cache = [low.init_state(1), high.init_state(1)], None
    with torch.no_grad():
        for t in range(7):
            out = theirs(tokens[:, [t]], past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            e = theirs.embed_tokens(tokens[:, t])
            z, states[0] = low.step(e, states[0])
            y, states[1] = high.step(e + z, states[1])
            y = torch.rms_norm(y, (D,), eps=EPS)
            torch.testing.assert_close(y, out.last_hidden_state[:, 0], rtol=1e-6, atol=1e-6)
    keys = [layer.keys for layer in cache.layers]
    assert len(keys) == LAYERS * 4  # three low passes and the high one
    for i in range(3):
        for j in range(LAYERS):
            ours = zoo.canonical(states[0][0][i])[2 * j][0].k
            torch.testing.assert_close(ours.movedim(1, 2)[:, :, :7], keys[i * LAYERS + j], rtol=1e-6, atol=1e-6)
