"""TTT against the paper's equations, whose inner gradients autograd takes; its sizes; cuts inside a mini-batch."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import zoo
from zoo.protocol import Context, mixers

D = 16


def turned(x: Tensor, place: int, base: float) -> Tensor:
    """A head x (K) with its neighbouring channels rotated by their place."""
    pairs = torch.view_as_complex(x.view(-1, 2))
    angle = place * base ** -(torch.arange(len(pairs)).double() * 2 / len(x))
    return torch.view_as_real(pairs * torch.polar(torch.ones_like(angle), angle)).flatten()


def by_hand(m, x: Tensor) -> Tensor:
    """One row x (T, D) of one document, one step and one head at a time."""
    c, H, K = m.config, m.n_heads, m.head_dim
    q, *rest = m.in_proj(x).chunk(m.n_parts, -1)
    if c.share_qk:
        padded = F.pad(q, (0, 0, c.conv_size - 1, 0))
        q, k = (
            conv.bias + sum(conv.weight[:, w] * padded[w : w + len(x)] for w in range(c.conv_size))
            for conv in (m.conv_q, m.conv_k)
        )
    else:
        k = rest.pop(0)
    eta = m.base_rate * torch.sigmoid(m.rate_proj(x)) / K

    def norm(z: Tensor, h: int) -> Tensor:
        return F.layer_norm(z, (K,), m.inner_norm_weight[h], m.inner_norm_bias[h], c.norm_eps)

    def model(z: Tensor, weights: list[Tensor]) -> Tensor:
        z = z @ weights[0] + weights[1][0]
        return F.gelu(z, approximate="tanh") @ weights[2] + weights[3][0] if len(weights) == 4 else z

    names = ["W1", "b1", "W2", "b2"] if c.inner == "mlp" else ["W1", "b1"]
    y = torch.zeros(len(x), H, K).double()
    for h in range(H):
        at = slice(h * K, (h + 1) * K)
        start = [getattr(m, name)[h].detach() for name in names]
        sums = [torch.zeros_like(w) for w in start]
        for t in range(len(x)):
            i = t % c.mini_batch
            q_t, k_t = (turned(part[t, at], i, c.rope_base) for part in (q, k))
            weights = [w.clone().requires_grad_() for w in start]
            loss = (k_t + norm(model(k_t, weights), h) - rest[0][t, at]).square().sum() / 2
            sums = [s + eta[t, h] * g for s, g in zip(sums, torch.autograd.grad(loss, weights), strict=True)]
            spread = max(1 / (i + 1) + m.places[i].item(), 0)
            now = [w - spread * s for w, s in zip(start, sums, strict=True)]
            y[t, h] = q_t + norm(model(q_t, now), h)
            if i == c.mini_batch - 1:
                start, sums = now, [torch.zeros_like(w) for w in start]
    y = m.norm(y.flatten(1))
    y = F.gelu(rest[1], approximate="tanh") * y if c.gate else y
    return m.out_proj(y)


def off_inits(**options):
    torch.manual_seed(0)
    mixer = zoo.create_mixer("ttt", D, **options).double()
    for p in mixer.parameters():
        p.data += 0.2 * torch.randn_like(p)
    return mixer.requires_grad_(False)


@pytest.mark.parametrize("backend", ["chunked", "reference"])
@pytest.mark.parametrize("options", mixers["ttt"].law_cases(), ids=str)
def test_the_equations(options, backend):
    mixer = off_inits(**options | {"backend": backend})
    x = torch.randn(2, 37, D).double()
    torch.testing.assert_close(mixer(x)[0], torch.stack([by_hand(mixer, row) for row in x]))


@pytest.mark.parametrize("inner", ["linear", "mlp"])
def test_every_cut_of_a_mini_batch_and_documents_that_start_within_one(inner):
    mixer = off_inits(inner=inner, mini_batch=4, backend="chunked")
    x = torch.randn(2, 11, D).double()
    whole, last = mixer(x)
    for cut in range(1, 11):
        first, state = mixer(x[:, :cut])
        assert state.inner.position.tolist() == [cut % 4] * 2
        second, state = mixer(x[:, cut:], state)
        torch.testing.assert_close(torch.cat([first, second], 1), whole)
        torch.testing.assert_close(state, last)
        resets = torch.zeros(2, 11, dtype=torch.bool)
        resets[:, cut] = True
        packed, state = mixer(x, None, Context(resets=resets))
        alone, state_alone = mixer(x[:, cut:])
        torch.testing.assert_close(packed, torch.cat([first, alone], 1))
        torch.testing.assert_close(state, state_alone)


def test_published_size():
    """The authors' 1.3B shape: 2048 wide, 32 heads, 16 steps a mini-batch."""
    with torch.device("meta"):
        linear, mlp = (zoo.create_mixer("ttt", 2048, inner=inner) for inner in ("linear", "mlp"))
    shared = 4 * 2048**2 + 2048 * 32 + 32 + 16 + 4 * 2048
    assert sum(p.numel() for p in linear.parameters()) == shared + 32 * (64 * 64 + 64)
    assert sum(p.numel() for p in mlp.parameters()) == shared + 32 * (2 * 4 * 64 * 64 + 5 * 64)
    assert linear.state_bytes(1, 1, torch.float32) == 4 * 2 * 32 * 65 * 64 + 8


def test_stray_options_are_refused():
    with pytest.raises(zoo.UsageError, match="conv_size belongs to share_qk"):
        zoo.create_mixer("ttt(conv_size=3)", D)
    with pytest.raises(zoo.UsageError, match='expand belongs to inner="mlp"'):
        zoo.create_mixer("ttt(expand=2)", D)
    with pytest.raises(zoo.UsageError, match="n_heads=3 does not divide d_model=16"):
        zoo.create_mixer("ttt(n_heads=3)", D)
