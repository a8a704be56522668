"""Gated DeltaNet-2 and Comba against the papers: the recurrences written out, and what their gates can do."""

import math

import pytest
import torch
import torch.nn.functional as F

import zoo
from zoo.protocol import mixers


def unit(x):
    return x / torch.sqrt(x @ x + 1e-6)


def convolved(mixer, qkv):
    """(T, channels) through the short convolution and silu, one step and tap at a time."""
    if mixer.conv is None:
        return F.silu(qkv)
    W = mixer.config.conv_size
    padded = F.pad(qkv, (0, 0, W - 1, 0))
    y = [sum(mixer.conv.weight[:, w] * padded[t + w] for w in range(W)) for t in range(len(qkv))]
    return F.silu(torch.stack(y) + (mixer.conv.bias if mixer.config.conv_bias else 0))


def plain(mixer, x):
    """The layers' equations, one step and one head at a time, for x (T, D)."""
    c, H, G, K, V = mixer.config, mixer.n_heads, mixer.n_key_heads, mixer.d_key, mixer.d_value
    qkv, beta, *others = (x @ w.T for w in mixer.in_proj.weight.split(mixer.parts))
    q, k, v = convolved(mixer, qkv).split(mixer.qkv_parts, -1)
    q, k, v, beta = q.view(-1, G, K), k.view(-1, G, K), v.reshape(-1, H, V), torch.sigmoid(beta)
    second = mixer.name == "gated_deltanet2"
    if second:
        beta = (2 * beta if c.allow_neg_eigval else beta).view(-1, G, K)
        written, decay, gate = others
        written = torch.sigmoid(written).view(-1, H, V)
        rates = (decay @ mixer.decay_up.weight.T + mixer.dt_bias).view(-1, G, K)
        gate = mixer.gate_up(gate)
    else:
        rates = (others[0] + mixer.dt_bias)[..., None]
        gate = others[1] if c.gate else None
    decay = torch.exp(-mixer.A_log.exp()[:, None] * torch.log(1 + torch.exp(rates)))
    gate = x.new_ones(len(x), H, V) if gate is None else torch.sigmoid(gate).view(-1, H, V)
    S, outputs = x.new_zeros(H, K, V), []
    for t in range(len(x)):
        S, heads = S.clone(), []
        for h in range(H):
            g = h * G // H
            key, query = unit(k[t, g]), q[t, g]
            if second:
                faded = decay[t, g][:, None] * S[h]
                erased = faded.T @ (beta[t, g] * key)
                S[h] = faded + torch.outer(key, written[t, h] * v[t, h] - erased)
            else:
                p = k[t, g] * (torch.sigmoid(mixer.decay[g]) if hasattr(mixer, "decay") else 1)
                query = query - mixer.D[g] * p if c.output_correction else query
                S[h] = decay[t, h] * S[h] + beta[t, h] * torch.outer(key, v[t, h] - S[h].T @ unit(p))
            o = S[h].T @ unit(query) / math.sqrt(K)
            heads.append(o / torch.sqrt((o**2).mean() + c.norm_eps) * mixer.norm.weight * gate[t, h])
        outputs.append(mixer.out_proj(torch.cat(heads)))
    return torch.stack(outputs)


CASES = [(name, options) for name in ("gated_deltanet2", "comba") for options in mixers[name].law_cases()]


@torch.no_grad()
@pytest.mark.parametrize(("name", "options"), CASES, ids=str)
def test_equals_the_paper_written_out(name, options):
    mixer = zoo.create_mixer(name, 16, **options).double()
    for p in mixer.parameters():
        p += 0.1 * torch.randn_like(p)
    x = torch.randn(2, 9, 16, dtype=torch.float64)
    tolerance = {"rtol": 1e-5, "atol": 1e-5}  # p is scaled to length 1, but for the 1e-6 under the root
    torch.testing.assert_close(mixer(x)[0], torch.stack([plain(mixer, row) for row in x]), **tolerance)


def test_published_sizes():
    """fla's layers at their default sizes: 2048 wide, 16 heads of 128; 6 heads of 256 with values of 512."""
    with torch.device("meta"):
        second = zoo.create_mixer("gated_deltanet2(n_heads=16, head_dim=128)", 2048)
        comba = zoo.create_mixer("comba(n_heads=6, head_dim=256)", 2048)
    D, r = 2048, 128
    projections = 6 * D * D + 4 * D * r  # q, k, v, b, w, out; decay and gate
    assert sum(p.numel() for p in second.parameters()) == projections + 3 * D * 4 + 16 + 2 * D + r
    keys, values = 6 * 256, 6 * 512
    projections = D * (2 * keys + 3 * values + 2 * 6)
    assert sum(p.numel() for p in comba.parameters()) == projections + (2 * keys + values) * 4 + 4 * 6 + 512


@torch.no_grad()
def test_gates_of_channels_erase_and_write_apart():
    """What `kda` cannot do: erase without writing (w = 0), and write without erasing (b = 0), at one key."""
    k = F.normalize(torch.randn(1, 3, 1, 8, dtype=torch.float64), dim=-1)[:, :1].expand(-1, 3, -1, -1)
    v = torch.randn(1, 3, 1, 4, dtype=torch.float64)
    b, w = (torch.tensor(x, dtype=torch.float64).view(1, 3, 1, 1) for x in ([0.0, 0.0, 1.0], [1.0, 1.0, 0.0]))
    o, _ = zoo.ops.dplr(k, k, w * v, -b * k, k, scale=1.0)
    torch.testing.assert_close(o[0, 1, 0], v[0, 0, 0] + v[0, 1, 0])  # the second write adds
    torch.testing.assert_close(o[0, 2, 0], torch.zeros(4, dtype=torch.float64))


@torch.no_grad()
def test_strong_decay_gives_comba_a_reflection():
    """Token 2 writes a value; token 1 decays everything and subtracts it once more (exp(g) - beta = -1), token 0 does
    neither: the sign of what is read is the parity of the ones."""
    word = "comba(n_heads=1, head_dim=16, expand_v=1.0, conv_size=0, gate=False, output_correction=False)"
    mixer = zoo.create_mixer(word, 16).double()
    for name, p in mixer.named_parameters():
        p.fill_(1.0 if "norm" in name else 0.0)
    qkv, beta, a = mixer.in_proj.weight.split(mixer.parts)
    qkv[0, :3] = qkv[16, :3] = 20.0
    qkv[32, 2] = 20.0
    beta[0, :3] = torch.tensor([-800.0, 800.0, 800.0])
    a[0, :3] = torch.tensor([-800.0, 800.0, 800.0])
    mixer.out_proj.weight[0, 0] = 1.0
    bits = torch.randint(0, 2, (2, 1000), generator=torch.Generator().manual_seed(0))
    tokens = F.one_hot(torch.cat([torch.full((2, 1), 2), bits], 1), 16).double()
    y = mixer(tokens)[0][:, 1:, 0]
    assert torch.equal(y < 0, (bits.cumsum(1) % 2).bool())
    assert y.abs().min() > 0.9 * y.abs().max() > 0
