"""Mixtures of experts written out, their routing, balancing and accounts."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import zoo
from zoo.channel_mixers.moe import MoE
from zoo.protocol import Context, Place

D = 16


def make(**options) -> MoE:
    torch.manual_seed(0)
    mixer = zoo.create_mixer("moe", D, place=Place(layer=3, n_layers=4), d_hidden=24, **options).double()
    for p in mixer.parameters():
        p.data += 0.3 * torch.randn_like(p)
    return mixer


def inputs(*shape: int) -> Tensor:
    return torch.randn(*shape, D, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def expert(mixer: MoE, e: int, x: Tensor) -> Tensor:
    gate, up = (mixer.up_proj[e] @ x).chunk(2)
    return mixer.down_proj[e] @ (F.silu(gate) * up)


def one_token(mixer: MoE, x: Tensor) -> Tensor:
    """The definition, one token at a time."""
    config, logits = mixer.config, mixer.router.weight @ x
    scores = logits.softmax(0) if config.router == "softmax" else logits.sigmoid()
    wanted = scores if mixer.e_score_correction_bias is None else scores + mixer.e_score_correction_bias
    size = len(wanted) // config.n_groups
    judged = 2 if config.group_score == "top2" else 1
    of_group = [sum(sorted(group.tolist())[-judged:]) for group in wanted.split(size)]
    best = sorted(range(config.n_groups), key=lambda g: -of_group[g])[: config.top_groups]
    allowed = [i for i in range(len(wanted)) if i // size in best]
    chosen = sorted(allowed, key=lambda i: -wanted[i].item())[: config.top_k]
    total = sum(scores[i] for i in chosen) + config.normalize_eps if config.normalize else 1.0
    y = torch.zeros_like(x)
    for i in chosen:
        out = expert(mixer, i, x) if i < config.n_experts else x
        y += config.scale * scores[i] / total * out
    if mixer.shared is not None:
        shared = mixer.shared(x[None, None])[0][0, 0]
        y += shared if mixer.shared_gate is None else torch.sigmoid(mixer.shared_gate(x)) * shared
    return y


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"n_experts": 12, "top_k": 3, "n_groups": 4, "top_groups": 2, "router": "sigmoid", "scale": 2.5},
        {"n_experts": 12, "top_k": 3, "n_groups": 4, "top_groups": 2, "group_score": "max", "normalize": False},
        {"router": "sigmoid", "normalize_eps": 0.1},
        {"n_zero_experts": 4, "top_k": 4, "balance": "bias", "normalize": False},
        {"n_zero_experts": 8, "top_k": 8, "balance": "bias"},
        {"n_shared": 2, "router": "sigmoid", "balance": "both"},
        {"n_shared": 1, "d_shared": 10, "shared_gate": True, "top_k": 1, "normalize": False},
        {"top_k": 8},
    ],
    ids=str,
)
def test_written_out(options):
    mixer = make(**options)
    if mixer.e_score_correction_bias is not None:
        mixer.e_score_correction_bias.normal_(std=0.2)
    x = inputs(2, 30)
    expected = torch.stack([one_token(mixer, token) for token in x.flatten(0, 1)]).view_as(x)
    torch.testing.assert_close(mixer(x)[0], expected, rtol=1e-10, atol=1e-12)


def test_perceptrons_as_experts():
    mixer, x = make(gated=False, activation="relu_squared", bias=True), inputs(1, 9)
    routing = mixer.route(x[0])
    expected = torch.zeros_like(x[0])
    for t, e in ((t, e) for t in range(9) for e in range(2)):
        i = routing.experts[t, e]
        h = F.relu(mixer.up_proj[i] @ x[0, t] + mixer.up_bias[i]).square()
        expected[t] += routing.weights[t, e] * (mixer.down_proj[i] @ h + mixer.down_bias[i])
    torch.testing.assert_close(mixer(x)[0][0], expected)


def test_experts_in_a_latent_width():
    mixer, x = make(d_latent=12, n_shared=1), inputs(1, 9)
    routing, latent = mixer.route(x[0]), x[0] @ mixer.latent_in.weight.T
    expected = mixer.shared(x)[0][0]
    for t, e in ((t, e) for t in range(9) for e in range(2)):
        out = expert(mixer, routing.experts[t, e], latent[t])
        expected[t] += routing.weights[t, e] * (mixer.latent_out.weight @ out)
    torch.testing.assert_close(mixer(x)[0][0], expected)


def test_ties_go_to_the_lowest_index():
    mixer = make(n_experts=8, top_k=3)
    mixer.router.weight.data.zero_()
    assert mixer.route(inputs(5)).experts.tolist() == [[0, 1, 2]] * 5
    mixer.router.weight.data[[6, 2, 4]] = 1.0
    positive = inputs(5).abs()
    assert mixer.route(positive).experts.tolist() == [[2, 4, 6]] * 5
    grouped = make(n_experts=8, top_k=3, n_groups=4, top_groups=2)
    grouped.router.weight.data.zero_()
    assert grouped.route(inputs(5)).experts.tolist() == [[0, 1, 2]] * 5


def test_one_expert_takes_every_token():
    """No capacity: nothing is dropped where all want the same."""
    mixer = make(balance="bias", top_k=1, normalize=False)
    mixer.e_score_correction_bias[5] = 100.0
    x = inputs(3, 50)
    weights = mixer.route(x.flatten(0, 1)).weights.view(3, 50, 1)
    expected = torch.stack([expert(mixer, 5, token) for token in x.flatten(0, 1)]).view_as(x)
    torch.testing.assert_close(mixer(x)[0], weights * expected)


def test_the_bias_chooses_and_does_not_weigh():
    mixer, x = make(balance="bias", normalize=False), inputs(40)
    before = mixer.route(x)
    mixer.e_score_correction_bias[3] = 10.0
    after = mixer.route(x)
    assert (after.experts[:, 0] == 3).all()
    assert torch.equal(after.scores, before.scores)
    assert torch.equal(after.weights, after.scores.gather(1, after.experts))


def test_the_router_is_exact_in_low_precision():
    mixer, x = make().float(), inputs(200).float()
    expected = mixer.route(x)
    with torch.autocast("cpu", torch.bfloat16):
        actual = mixer.route(x)
    assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))
    low = copy.deepcopy(mixer).bfloat16().route(x.bfloat16())
    assert low.weights.dtype == low.scores.dtype == torch.float32


# ---- losses and figures


def test_balance_loss_is_its_coefficient_when_even():
    mixer, context = make(n_experts=4, top_k=4, balance_loss=0.03), Context()
    mixer.router.weight.data.zero_()
    mixer(inputs(2, 10), None, context)
    torch.testing.assert_close(context.losses[0].item(), 0.03)
    assert context.metrics["moe_3_max_load"].item() == 0.25
    assert context.metrics["moe_3_load_entropy"].item() == pytest.approx(1.0)


@pytest.mark.parametrize("router", ["softmax", "sigmoid"])
def test_losses_written_out(router):
    mixer = make(router=router, balance_loss=0.5, z_loss=0.25)
    x, context = inputs(2, 11), Context()
    mixer(x, None, context)
    routing = mixer.route(x.flatten(0, 1))
    share = torch.tensor([(routing.experts == e).sum() / 44 for e in range(8)], dtype=torch.float64)
    mean = (routing.scores / routing.scores.sum(1, keepdim=True)).mean(0)
    torch.testing.assert_close(context.losses[0], 0.5 * 8 * (share * mean).sum(), rtol=1e-6, atol=0)
    z = torch.log(torch.exp(routing.logits).sum(1))
    torch.testing.assert_close(context.losses[1], 0.25 * (z**2).mean())
    torch.testing.assert_close(context.metrics["moe_3_max_load"], share.max(), rtol=1e-6, atol=0)
    entropy = -(share * share.clamp(min=1e-30).log()).sum() / math.log(8)
    torch.testing.assert_close(context.metrics["moe_3_load_entropy"], entropy, rtol=1e-6, atol=0)


def test_padding_does_not_count():
    mixer = make(balance="both", z_loss=0.1)
    rows = [inputs(1, 20)[:, :n] for n in (20, 7)]
    padded = torch.cat([rows[0], F.pad(rows[1], (0, 0, 0, 13), value=1e3)])
    context = Context(lengths=torch.tensor([20, 7]))
    mixer(padded, None, context)
    load, mixer.load = mixer.load, torch.zeros_like(mixer.load)
    alone = Context()
    mixer(torch.cat(rows, 1), None, alone)
    assert torch.equal(load, mixer.load)
    torch.testing.assert_close(context.losses, alone.losses)
    torch.testing.assert_close(context.metrics, alone.metrics)


@pytest.mark.parametrize("padded", [False, True])
def test_balance_over_sequences(padded):
    """The mean over the sequences of what each would give alone."""
    mixer, x, lengths = make(balance_over="sequence"), inputs(3, 20), [20, 7, 1] if padded else [20] * 3
    alone = [Context() for _ in lengths]
    for row, n, context in zip(x, lengths, alone, strict=True):
        mixer(row[None, :n], None, context)
    whole, batch = Context(lengths=torch.tensor([*lengths, 0])), Context(lengths=torch.tensor([*lengths, 0]))
    mixer(F.pad(x, (0, 0, 0, 0, 0, 1)), None, whole)
    torch.testing.assert_close(whole.losses[0], torch.stack([c.losses[0] for c in alone]).mean())
    make()(F.pad(x, (0, 0, 0, 0, 0, 1)), None, batch)
    assert not torch.allclose(whole.losses[0], batch.losses[0])


def test_only_padding():
    mixer, context = make(z_loss=0.1), Context(lengths=torch.zeros(2, dtype=torch.int64))
    mixer(inputs(2, 5), None, context)
    assert [loss.item() for loss in context.losses] == [0.0, 0.0]


def test_no_account_is_kept_in_evaluation():
    mixer, context = make(balance="both").eval(), Context()
    mixer(inputs(2, 5), None, context)
    assert not context.losses
    assert not context.metrics
    assert not mixer.load.any()


# ---- balancing without a loss


def test_the_bias_moves_against_the_load():
    mixer, x = make(balance="bias", bias_rate=0.25), inputs(2, 50)
    experts = torch.cat([mixer.route(part.flatten(0, 1)).experts for part in (x, 2 * x[:, :9])])
    mixer(x), mixer(2 * x[:, :9])  # all passes since the last step count
    with torch.no_grad():
        mixer(x)  # this one does not teach
    load = torch.bincount(experts.flatten(), minlength=8)
    assert torch.equal(mixer.load, load)
    mixer.after_step()
    assert torch.equal(mixer.e_score_correction_bias, -0.25 * (load - load.double().mean()).sign())
    assert not mixer.load.any()
    before = mixer.e_score_correction_bias.clone()
    mixer.after_step()  # nothing was seen
    assert torch.equal(mixer.e_score_correction_bias, before)


def test_what_checkpoints_keep():
    assert "e_score_correction_bias" in make(balance="bias").state_dict()
    assert "e_score_correction_bias" not in make().state_dict()
    assert "load" not in make(balance="bias").state_dict()


@pytest.mark.parametrize(
    "lower", [MoE.bfloat16, MoE.half, lambda m: m.to(torch.bfloat16), lambda m: m.to("cpu", torch.half)]
)
def test_the_bias_stays_exact_in_low_precision(lower):
    mixer = make(balance="bias").float()
    mixer.e_score_correction_bias += 0.5 + 0.001 * torch.arange(mixer.n_choices)
    before = mixer.e_score_correction_bias.clone()
    lower(mixer)
    assert mixer.router.weight.dtype in (torch.bfloat16, torch.half)
    assert mixer.e_score_correction_bias.dtype == torch.float32
    assert torch.equal(mixer.e_score_correction_bias, before)
    for _ in range(50):
        mixer.load = torch.eye(mixer.n_choices, dtype=torch.int64)[0]
        mixer.after_step()
    moved = (mixer.e_score_correction_bias - before)[0].item()
    assert abs(moved + 50 * mixer.config.bias_rate) < 1e-6
    assert mixer.double().e_score_correction_bias.dtype == torch.float64


def test_a_lopsided_router_is_evened_out():
    mixer, x = make(balance="bias", bias_rate=0.002), inputs(4, 256)
    mixer.router.weight.data *= 0.5
    mixer.router.weight.data[:2] += x.mean((0, 1)) * 20
    shares = []
    for _ in range(400):
        context = Context()
        mixer(x, None, context)
        mixer.after_step()
        shares.append(context.metrics["moe_3_max_load"].item())
    assert shares[0] > 0.2
    assert sum(shares[-20:]) / 20 < 0.14  # even is 0.125


def test_compiled_training_counts_the_same():
    torch._dynamo.reset()
    x = inputs(2, 12).float()
    biases = []
    for compiled in (False, True):
        mixer = make(balance="bias", n_zero_experts=2).float()
        if compiled:
            mixer.compile(backend="aot_eager", fullgraph=True)
        for scale in (1.0, 0.5, 2.0):
            mixer(scale * x)[0].sum().backward()
            mixer.after_step()
        biases.append(mixer.e_score_correction_bias)
    assert biases[0].any()
    assert torch.equal(*biases)


# ---- sizes


def test_sizes_and_inits():
    """The active experts have the weights of a dense SwiGLU layer; DeepSeek-V3's layer in full."""
    mixer = zoo.create_mixer("moe(top_k=4)", 384)
    assert 4 * mixer.d_hidden == zoo.create_mixer("swiglu", 384).d_hidden
    assert mixer.up_proj.std().item() == pytest.approx(384**-0.5, rel=0.02)
    assert mixer.down_proj.std().item() == pytest.approx((2 * 256) ** -0.5, rel=0.02)
    with torch.device("meta"):
        options = {"n_experts": 256, "top_k": 8, "d_hidden": 2048, "n_shared": 1, "router": "sigmoid"}
        layer = zoo.create_mixer("moe", 7168, n_groups=8, top_groups=4, balance="bias", **options)
    assert sum(p.numel() for p in layer.parameters()) == 257 * 3 * 7168 * 2048 + 256 * 7168
    assert layer.flops_per_token(1) == 2 * (9 * 3 * 7168 * 2048 + 256 * 7168)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"n_groups": 3}, "n_groups=3 does not divide the 8 experts"),
        ({"n_groups": 2, "top_groups": 3}, "top_groups=3 is more than n_groups=2"),
        ({"top_k": 9}, "top_k=9 is more than the 8 experts"),
        ({"n_groups": 8, "top_k": 2}, "top_k=2 is more than the 1 experts"),
        ({"top_k": 1}, "set normalize=False"),
        ({"shared_gate": True}, "needs n_shared"),
        ({"gated": False, "activation": "gpt_oss"}, "needs gated=True"),
        ({"d_latent": 8, "n_zero_experts": 1}, "take one of the two"),
        ({"d_shared": 8}, "moe: d_shared belongs to n_shared, which is not set"),
        ({"normalize": False, "normalize_eps": 1e-6}, "normalize_eps belongs to normalize, which is not set"),
        ({"group_score": "max"}, "group_score belongs to n_groups, which is not set"),
        ({"balance": "none", "balance_loss": 0.1}, 'balance_loss belongs to balance="loss" or "both", which is not'),
        ({"balance": "bias", "balance_over": "sequence"}, 'balance_over belongs to balance="loss" or "both", which is'),
        ({"bias_rate": 0.1}, 'bias_rate belongs to balance="bias" or "both", which is not set'),
    ],
    ids=str,
)
def test_options_that_do_not_go_together(options, told):
    with pytest.raises(zoo.UsageError, match=told):
        zoo.create_mixer("moe", D, **options)
