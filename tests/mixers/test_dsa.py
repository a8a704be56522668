"""Sparse attention: what is chosen, who learns from which loss, what a step reads; the laws are in test_laws.py."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import Tensor

import zoo
from zoo.core.errors import UsageError
from zoo.laws import LAWS, plan
from zoo.laws.cases import cases_of_word
from zoo.ops import LatentCache, SparseIndex, SparseLatentCache, latent_attention, native, sparse_latent_attention
from zoo.ops import _sparse_latent_attention as op
from zoo.ops._sparse_latent_attention import choose, index_scores
from zoo.ops.common import logged_forms
from zoo.pattern import create_mixer
from zoo.protocol import Context, Place

pytestmark = pytest.mark.usefixtures("poisoned_memory")


def noise(*shape, dtype=torch.float64, seed=3):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def arguments(B=2, T=23, H=4, G=2, N=5, P=4, V=3, r=6, J=3, E=4):
    index = SparseIndex(noise(B, T, J, E, seed=4), noise(B, T, E, seed=5), noise(B, T, J, seed=6))
    return noise(B, T, H, N + P), noise(B, T, r), noise(B, T, P), noise(G, N + V, r), index


def written_out(q, latent, key, expand, index, top_k):
    """Every query by itself: outputs and divergences."""
    (B, T, H, width), P = q.shape, key.shape[-1]
    N, R = width - P, H // len(expand)
    o, divergence = torch.zeros(B, T, H, expand.shape[1] - N, dtype=q.dtype), torch.zeros(B, T, dtype=q.dtype)
    for b in range(B):
        for t in range(T):
            score = torch.tensor(
                [(index.weight[b, t] @ (index.q[b, t] @ index.key[b, s]).relu()) for s in range(t + 1)]
            )
            best = sorted(range(t + 1), key=lambda s: (-score[s].item(), -s))[:top_k]
            shares = []
            for h in range(H):
                own = expand[h // R]
                k = torch.stack([torch.cat([own[:N] @ latent[b, s], key[b, s]]) for s in best])
                p = (k @ q[b, t, h] * width**-0.5).softmax(0)
                o[b, t, h] = p @ torch.stack([own[N:] @ latent[b, s] for s in best])
                shares.append(p)
            p = torch.stack(shares).sum(0) / H
            divergence[b, t] = (p * (p.log() - score[best].log_softmax(0))).sum()
    return o, divergence


@pytest.mark.parametrize("how", [{"backend": "reference"}, {"backend": "chunked", "chunk_size": 5}, {"absorb": True}])
@pytest.mark.parametrize("top_k", [1, 6, 23, 40])
def test_it_is_what_the_equations_say(top_k, how):
    given = arguments()
    o, state, divergence, _ = sparse_latent_attention(*given, top_k=top_k, align=True, **how)
    expected, expected_divergence = written_out(*given, top_k)
    torch.testing.assert_close(o, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(divergence, expected_divergence, rtol=0, atol=1e-12)
    assert torch.equal(state.kv, torch.cat(given[1:3], -1))
    assert torch.equal(state.index_key, given[4].key)


def test_all_steps_are_latent_attention():
    *given, index = arguments()
    expected, _ = latent_attention(*given)
    for top_k in (None, 23):
        o, _, divergence, _ = sparse_latent_attention(*given, index, top_k=top_k)
        torch.testing.assert_close(o, expected, rtol=0, atol=1e-12)
        assert divergence is None


def test_of_equal_scores_the_latest_are_chosen():
    scores = torch.tensor([[[2.0, 1.0, 1.0, 0.0, 1.0, 3.0], [-0.0, 0.0, -1.0, 0.0, 9.0, 9.0], [5.0, 1, 1, 1, 1, 1]]])
    seen = torch.tensor([[[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0], [1, 0, 0, 0, 0, 0]]]).bool()
    expected = torch.tensor([[[1, 0, 1, 0, 1, 1], [1, 1, 1, 1, 0, 0], [1, 0, 0, 0, 0, 0]]]).bool()
    assert torch.equal(choose(scores, seen, 4), expected)
    assert choose(scores, seen, 2).tolist()[0][1] == [False, True, False, True, False, False]
    compiled = torch.compile(choose, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(scores, seen, 4), expected)


@torch.no_grad()
@pytest.mark.parametrize("resets", [False, True])
def test_pieces_that_copy_their_rows(monkeypatch, resets):
    """Where few of many steps are chosen, a long piece without gradients gathers them."""
    gathered, real = [], op._piece_by_rows
    monkeypatch.setattr(op, "_piece_by_rows", lambda *a: gathered.append(a) or real(*a))
    monkeypatch.setattr(op, "SCORES_LIMIT", 1000)
    given = arguments(T=300)
    starts = {"resets": (torch.arange(300) % 70 == 50).expand(2, -1)} if resets else {}
    for causal in (True, False):
        expected, _, _, _ = sparse_latent_attention(*given, top_k=5, backend="reference", causal=causal, **starts)
        assert not gathered
        o, _, _, _ = sparse_latent_attention(*given, top_k=5, causal=causal, **starts)
        assert gathered
        torch.testing.assert_close(o, expected, rtol=0, atol=1e-12)
        gathered.clear()


def mixer_and_input(word="dsa(top_k=5, q_rank=12, n_heads=4)", T=19):
    torch.manual_seed(0)
    return create_mixer(word, 32).double(), noise(2, T, 32)


def gradients(mixer, loss):
    names = [name for name, _ in mixer.named_parameters()]
    found = torch.autograd.grad(loss, list(mixer.parameters()), allow_unused=True, retain_graph=True)
    return {n for n, g in zip(names, found, strict=True) if g is not None and g.any()}, set(names)


@pytest.mark.parametrize("word", ["dsa(top_k=5, q_rank=12)", "dsa(top_k=5, dense=True)", "dsa(top_k=40, causal=False)"])
def test_each_loss_has_its_own_parameters(word):
    mixer, x = mixer_and_input(word)
    x.requires_grad_()
    context = Context()
    y, _ = mixer(x, None, context)
    (loss,) = context.losses
    of_output, names = gradients(mixer, y.sum())
    of_loss, _ = gradients(mixer, loss)
    assert of_loss == {name for name in names if name.startswith("index_")}
    assert of_output == names - of_loss
    assert torch.autograd.grad(loss, x, allow_unused=True) == (None,)


def test_the_loss_is_the_mean_over_steps_that_are_no_padding():
    mixer, x = mixer_and_input("dsa(top_k=5, indexer_loss=0.3)")
    lengths = torch.tensor([19, 7])
    ragged = Context(lengths=lengths)
    mixer(x, None, ragged)
    alone = []
    for i, n in enumerate(lengths.tolist()):
        context = Context()
        mixer(x[[i], :n], None, context)
        alone.append(n * context.losses[0])
    torch.testing.assert_close(ragged.losses[0], sum(alone) / 26)
    torch.testing.assert_close(ragged.losses[0], 0.3 * ragged.metrics["dsa_0_divergence"])


def test_the_loss_is_of_training_alone():
    mixer, x = mixer_and_input()
    for prepare in (
        lambda: mixer.eval(),
        lambda: mixer.train().requires_grad_(False) and torch.set_grad_enabled(False),
    ):
        try:
            prepare()
            context = Context()
            mixer(x, None, context)
            assert not context.losses
        finally:
            torch.set_grad_enabled(True)
    mixer = create_mixer("dsa(indexer_loss=0.0)", 32).double()
    mixer(x, None, context)
    assert not context.losses


def test_steps_in_evaluation_pass_gradients():
    """Without a loss of the indexer single steps copy their rows, with gradients too."""
    mixer, x = mixer_and_input()
    mixer.eval()
    x.requires_grad_()
    whole, _ = mixer(x)
    state, steps = mixer.init_state(2), []
    for t in range(x.shape[1]):
        y, state = mixer.step(x[:, t], state)
        steps.append(y)
    y = torch.stack(steps, 1)
    torch.testing.assert_close(y, whole, rtol=0, atol=1e-12)
    inputs = [x, *(p for n, p in mixer.named_parameters() if not n.startswith("index_"))]
    weights = noise(*y.shape, seed=8)
    for a, b in zip(*(torch.autograd.grad((o * weights).sum(), inputs) for o in (y, whole)), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-11)


def test_the_indexer_learns_what_attention_attends_to():
    mixer, x = mixer_and_input("dsa(top_k=8, n_heads=2, index_heads=8)", T=60)
    optimizer = torch.optim.Adam([p for n, p in mixer.named_parameters() if n.startswith("index_")], lr=1e-2)
    losses = []
    for _ in range(60):
        context = Context()
        mixer(x, None, context)
        losses.append(context.losses[0].item())
        optimizer.zero_grad()
        context.losses[0].backward()
        optimizer.step()
    assert losses[-1] < 0.5 * losses[0]


@torch.no_grad()
def test_a_step_reads_no_latents_but_the_chosen(monkeypatch):
    """What is not chosen may be anything, and the kernel is given a cache of top_k rows."""
    mixer, x = mixer_and_input("dsa(top_k=5, n_heads=2)", T=50)
    _, state = mixer(x)
    shapes = []
    real = op.decode_latents
    monkeypatch.setattr(op, "decode_latents", lambda q, cache, *a: shapes.append(cache.kv.shape) or real(q, cache, *a))
    mixer.step(x[:, 0], state)
    assert shapes == [(2, 5, mixer.attention.kv_rank + mixer.attention.rope_dim)]


@torch.no_grad()
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(("J", "E"), [(1, 2), (5, 24), (16, 64), (33, 10)])
def test_the_kernel_of_scores(J, E, threads):
    """Rows of unequal length, an empty one too, capacity beyond them, several threads."""
    if reason := native.why_not():
        pytest.skip(reason)
    lengths = torch.tensor([1, 127, 5000, 0])
    one = noise(4, 1, 3, 9), noise(4, 1, 6), noise(4, 1, 4), noise(1, 12, 6)
    index = SparseIndex(noise(4, 1, J, E), noise(4, 1, E), noise(4, 1, J))
    caches = [noise(4, 5100, width) for width in (10, E)]
    for cache in caches:
        cache.masked_fill_((torch.arange(5100) >= lengths[:, None])[..., None], 0)
    state = SparseLatentCache(*(c.clone() for c in caches), lengths)
    expected, after, _, _ = sparse_latent_attention(*one, index, state, top_k=50, backend="reference")
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        with logged_forms() as forms:
            single = [x.float() for x in one]
            state = SparseLatentCache(*(c.float() for c in caches), lengths)
            actual, _, _, _ = sparse_latent_attention(
                *single, SparseIndex(*(x.float() for x in index)), state, top_k=50
            )
    finally:
        torch.set_num_threads(before)
    assert forms == {"attention": {"compiled"}, "sparse_latent_attention": {"compiled"}}
    assert after.length.tolist() == [2, 128, 5001, 1]
    assert (actual - expected).abs().max() <= 2e-5 * expected.abs().max()


def test_scores_are_float32_at_least():
    q, key, weight = noise(1, 3, 2, 4).bfloat16(), noise(1, 5, 4).bfloat16(), noise(1, 3, 2).bfloat16()
    scores = index_scores(q, key, weight)
    expected = index_scores(q.double(), key.double(), weight.double())
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores.double(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.slow
def test_compiled_blocks():
    mixer, x = mixer_and_input("dsa(top_k=5, backend='chunked')", T=40)

    def run(x: Tensor) -> tuple[Tensor, Tensor]:
        context = Context()
        y, _ = mixer(x, None, context)
        return y, context.losses[0]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(op, "SCORES_LIMIT", 16 * 40 * 8)  # blocks of 16
        results = []
        for function in (run, torch.compile(run, fullgraph=True, backend="aot_eager")):
            y, loss = function(x)
            results.append((y, loss, *torch.autograd.grad(y.sum() + loss, list(mixer.parameters()))))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


def test_deepseek_v32_has_its_published_size():
    sizes = "n_heads=128, q_rank=1536, kv_rank=512, nope_dim=128, rope_dim=64, v_dim=128"
    with torch.device("meta"):
        mixer = create_mixer(f"dsa({sizes}, top_k=2048, index_heads=64, index_dim=128)", 7168)
    assert sum(p.numel() for p in mixer.parameters()) == 187_107_328 + 13_959_424
    assert mixer.state_bytes(1, 1, torch.bfloat16) == 2 * (576 + 128) + 8
    assert mixer.attention.flops_per_token(65_536) > 8 * mixer.flops_per_token(65_536)


def test_looking_ahead():
    mixer = create_mixer("dsa", 32, place=Place(causal=False)).double()
    assert mixer.init_state(2) == ()
    assert mixer.state_bytes(2, 100, torch.float32) == 0
    with pytest.raises(UsageError, match="dsa with causal=False looks ahead"):
        mixer.step(noise(2, 32), ())


def test_wrong_options():
    with pytest.raises(UsageError, match="index_dim=4 is less than rope_dim=8"):
        create_mixer("dsa(rope_dim=8, index_dim=4)", 64)
    with pytest.raises(UsageError, match="top_k=0 is not allowed"):
        create_mixer("dsa(top_k=0)", 64)
    with pytest.raises(UsageError, match="index_rope_interleaved belongs to rope, which is not set"):
        create_mixer("dsa(rope=False, index_rope_interleaved=True)", 64)


def test_wrong_arguments():
    *given, index = arguments()
    wrong = {
        r"index\.key has shape": {"index": index._replace(key=index.key[..., :2])},
        r"index\.q has shape \(2, 23, 12\)": {"index": index._replace(q=index.q.flatten(2))},
        "top_k=0 is not allowed": {"top_k": 0},
        "chunk_size=True is not allowed": {"chunk_size": True},
        "Unknown backend 'sdpa'": {"backend": "sdpa"},
        r"state\.index_key has shape": {"state": SparseLatentCache.empty(2, 10, 5, dtype=torch.float64)},
    }
    for message, change in wrong.items():
        with pytest.raises(UsageError, match=message):
            sparse_latent_attention(*given, **{"index": index, "top_k": 4, **change})


PEAK = """
import sys
import torch
import zoo
from zoo.training.machine import peak_memory
torch.set_num_threads(1)
mixer = zoo.create_mixer("dsa(top_k=64)", 32)
def step(T):
    context = zoo.Context()
    y, _ = mixer(torch.randn(1, T, 32), None, context)
    (y.sum() + context.losses[0]).backward()
step(64)
peak = lambda: peak_memory(torch.device("cpu")) / 2**20
before = peak()
step(int(sys.argv[1]))
print(peak() - before)
"""


@pytest.mark.slow
def test_training_memory_is_linear():
    """A matrix of 16,384 x 16,384 float32 numbers alone would be 1,024 MB."""

    def megabytes(steps):
        child = [sys.executable, "-c", PEAK, str(steps)]
        return float(subprocess.run(child, capture_output=True, text=True, check=True).stdout)

    short, long = megabytes(4096), megabytes(16384)
    assert long < 500, f"{long:.0f} MB at 16,384 steps"
    assert long < 6 * short, f"{short:.0f} MB at 4,096 steps, {long:.0f} MB at 16,384"


SHARED = 'dsa(n_heads=4, top_k=5{0}) swiglu dsa(n_heads=4, top_k=5, indexer="shared"{0})'


def shared_model(more=""):
    torch.manual_seed(0)
    model = zoo.create_model(SHARED.format(more), d_model=32, vocab_size=11).double()
    for p in model.parameters():
        p.data += 0.2 * torch.randn_like(p)
    return model


@pytest.mark.parametrize("backend", ["reference", "chunked"])
def test_a_shared_indexer_is_that_of_the_layer_before(backend):
    """As if the second layer had the first one's scores: it is given its queries, keys and weights."""
    model = shared_model(f', backend="{backend}"')
    first, _, second = model.mixers()
    assert not [name for name, _ in second.named_parameters() if name.startswith("index_")]
    own = zoo.create_mixer(f'dsa(n_heads=4, top_k=5, backend="{backend}")', 32).double().eval()
    own.load_state_dict({**first.state_dict(), **second.state_dict()})
    tokens = torch.randint(11, (2, 23), generator=torch.Generator().manual_seed(1))
    seen = {}
    real, first._index = first._index, lambda x, given: seen.setdefault("index", real(x, given))
    second.register_forward_hook(lambda module, inputs, output: seen.update(x=inputs[0], y=output[0]))
    model.eval()(tokens)
    own._index = lambda x, given: seen["index"]
    torch.testing.assert_close(own(seen["x"])[0], seen["y"], rtol=0, atol=1e-12)


QUICK = ("chunk consistency", "packing", "raggedness", "states of rows", "compilation", "checkpointing")


@pytest.mark.parametrize("law", [law if law in QUICK else pytest.param(law, marks=pytest.mark.slow) for law in LAWS])
def test_laws_of_a_shared_indexer(law):
    """Cut anywhere, packed, ragged, compiled and checkpointed, as a pattern of both layers."""
    for check in plan(LAWS[law], cases_of_word(SHARED.format("").replace(" swiglu", ""))):
        finding = check.find()
        assert not finding.broken, str(finding)


@torch.no_grad()
def test_single_steps_take_the_choice_over(monkeypatch):
    """The scores of a step are computed once for both layers, and the second caches no keys of an indexer."""
    model, count = shared_model().eval(), []
    real = op._cached_scores
    monkeypatch.setattr(op, "_cached_scores", lambda *a: count.append(1) or real(*a))
    tokens = torch.randint(11, (2, 23), generator=torch.Generator().manual_seed(1))
    whole, _ = model(tokens)
    state, steps = model.init_state(2), []
    for t in range(23):
        y, state = model.step(tokens[:, t], state)
        steps.append(y)
    torch.testing.assert_close(torch.stack(steps, 1), whole, rtol=0, atol=1e-12)
    assert len(count) == 23 - 5
    assert [type(state[1][i][0]) for i in (0, 2)] == [SparseLatentCache, LatentCache]


def test_the_first_layer_that_shares_attends_to_the_latest_steps():
    mixer, x = mixer_and_input('dsa(top_k=5, n_heads=4, indexer="shared")')
    y, _ = mixer(x)
    torch.testing.assert_close(mixer(x[:, 14:])[0][:, -1], y[:, -1].detach(), rtol=0, atol=1e-12)


def test_shared_indexers_that_are_refused():
    with pytest.raises(zoo.UsageError, match='index_heads is an option of an indexer; indexer="shared" has none'):
        zoo.create_mixer('dsa(indexer="shared", index_heads=3)', 32)
    model = zoo.create_model('dsa(top_k=5) dsa(top_k=6, indexer="shared")', d_model=32, vocab_size=11)
    with pytest.raises(zoo.UsageError, match="top_k=6 follows a choice of top_k=5: give both the same"):
        model(torch.zeros(1, 4, dtype=torch.int64))
