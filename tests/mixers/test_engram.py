"""The n-gram memory: against its definition, and what its tokens are in every kind of model."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import zoo
from zoo.channel_mixers.engram import multipliers, primes
from zoo.laws import assert_close, noise, off_inits
from zoo.protocol import Context

D = 16


def engram(text: str = "engram(n_slots=30)") -> zoo.protocol.Mixer:
    return off_inits(zoo.create_mixer(text, D).double())


def drawn(*shape: int, seed: int = 0, n: int = 5) -> Tensor:
    return torch.randint(n, shape, generator=torch.Generator().manual_seed(seed))


def norm(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.square().mean() + 1e-5).sqrt() * weight


def by_definition(mixer, x: Tensor, tokens: list[int]) -> Tensor:
    """One step of one document at a time, with the equations of DeepSeek's demonstration (`engram_demo_v1.py`)."""
    o, conv = mixer.config, mixer.conv
    n, mults, table = o.max_order, multipliers(o.seed, o.max_order), mixer.memory.table.weight
    sizes = primes(o.n_slots, (n - 1) * o.n_heads)
    gated, outputs = [], []
    for t in range(len(tokens)):
        parts = []
        for order in range(2, n + 1):
            mix = 0
            for k in range(order):
                mix ^= (tokens[t - k] + 1 if t >= k else 0) * mults[k]
            for head in range(o.n_heads):
                i = (order - 2) * o.n_heads + head
                parts.append(table[sum(sizes[:i]) + mix % sizes[i]])
        e = torch.cat(parts)
        key, query = norm(mixer.key_proj.weight @ e, mixer.key_norm.weight), norm(x[t], mixer.query_norm.weight)
        s = (key * query).sum() / D**0.5
        gated.append(torch.sigmoid(s.sign() * s.abs().clamp(min=1e-6).sqrt()) * (mixer.value_proj.weight @ e))
        y = gated[t]
        if conv is not None:
            taps = conv.weight.shape[1]
            total = torch.zeros(D, dtype=x.dtype)
            for w in range(taps):
                if (at := t - (taps - 1 - w) * conv.dilation) >= 0:
                    total = total + conv.weight[:, w] * norm(gated[at], conv.norm.weight)
            y = y + total * torch.sigmoid(total)
        outputs.append(y)
    return torch.stack(outputs)


@pytest.mark.parametrize(
    "options", ["", ", conv_size=None, max_order=4", ", dilation=2, conv_size=3, seed=9, n_heads=3"]
)
def test_equals_its_definition(options):
    mixer, x, tokens = engram(f"engram(n_slots=30{options})"), noise(2, 14, D), drawn(2, 14)
    resets = torch.zeros(2, 14, dtype=torch.bool)
    resets[0, 6] = True
    y, _ = mixer(x, None, Context(resets=resets, tokens=tokens))
    parts = [by_definition(mixer, x[0, a:b], tokens[0, a:b].tolist()) for a, b in ((0, 6), (6, 14))]
    expected = torch.stack([torch.cat(parts), by_definition(mixer, x[1], tokens[1].tolist())])
    assert_close(y, expected, 1e-12, "outputs")
    inputs = list(mixer.parameters())
    grads = [torch.autograd.grad(found.sin().sum(), inputs) for found in (y, expected)]
    assert_close(*grads, 1e-11, "gradients")


def test_the_hash_is_the_same_everywhere():
    assert multipliers(0, 3) == [1896895517, 926699317, 56766093]
    assert primes(4096, 3) == (4099, 4111, 4127)
    assert not any(p % d == 0 for p in primes(2, 30) for d in range(2, p))
    found = engram("engram(n_slots=4096, seed=1)").memory.multipliers.tolist()
    assert found == multipliers(1, 3) != multipliers(0, 3)
    assert all(m % 2 and m < 2**31 for m in multipliers(7, 16))


def test_no_token_reaches_a_row_that_is_not_there():
    mixer, x = engram(), noise(1, 6, D)
    strange = torch.tensor([[0, -1, -100, 2**31, 2**62, -(2**63)]])
    y, _ = mixer(x, None, Context(tokens=strange))
    assert y.isfinite().all()
    none = mixer(x[:, :2], None, Context(tokens=torch.tensor([[-1, -7]])))[0]
    assert torch.equal(none, mixer(x[:, :2], None, Context(tokens=torch.tensor([[-1, -1]])))[0])


def test_what_has_no_tokens_is_refused():
    mixer, x = zoo.create_mixer("engram", D), torch.randn(2, 4, D)
    for call in (lambda: mixer(x), lambda: mixer(x, None, Context()), lambda: mixer.step(x[:, 0], mixer.init_state(2))):
        with pytest.raises(
            zoo.UsageError, match=r"engram looks up tokens, and the pass has none: give Context\(tokens="
        ):
            call()
    with pytest.raises(zoo.UsageError, match=r"tokens are \(2, 3\) int64 on cpu, expected \(2, 4\) whole numbers"):
        mixer(x, None, Context(tokens=torch.zeros(2, 3, dtype=torch.int64)))
    with pytest.raises(zoo.UsageError, match="engram looks up tokens, and this model reads vectors"):
        zoo.create_model("lstm engram", d_model=D, inputs=3, outputs=2)
    with pytest.raises(zoo.UsageError, match="dilation belongs to the convolution"):
        zoo.create_mixer("engram(conv_size=None, dilation=2)", D)


def test_a_backbone_is_given_its_tokens():
    backbone, x, tokens = zoo.create_backbone("gqa engram", d_model=D), torch.randn(2, 5, D), drawn(2, 5)
    whole, _ = backbone(x, None, Context(tokens=tokens))
    _, state = backbone(x[:, :3], None, Context(tokens=tokens[:, :3]))
    rest, _ = backbone(x[:, 3:], state, Context(tokens=tokens[:, 3:].to(torch.int16)))
    torch.testing.assert_close(rest, whole[:, 3:])
    with pytest.raises(zoo.UsageError, match="engram looks up tokens"):
        backbone(x)


def sensitive(model, tokens: Tensor, at: int) -> list[int]:
    """At which steps the logits change with the token `at`, the stream of that token aside."""
    other = tokens.clone()
    other[:, at] = (other[:, at] + 1) % 5
    with torch.no_grad():
        model.embedding.weight[:] = model.embedding.weight[:1]  # all tokens look alike: their ids alone differ
        a, b = (model(t)[0] for t in (tokens, other))
    return (a != b).any(-1)[0].nonzero().flatten().tolist()


@pytest.mark.parametrize("pattern", ["mlp engram(conv_size=None)", "loop(2, mlp engram(conv_size=None))"])
def test_a_model_gives_its_tokens(pattern):
    model = off_inits(zoo.create_model(pattern, d_model=D, vocab_size=5)).eval()
    assert sensitive(model, drawn(1, 9), 3) == [3, 4, 5]
    whole, _ = model(tokens := drawn(2, 9))
    _, state = model(tokens[:, :4])
    torch.testing.assert_close(model(tokens[:, 4:], state)[0], whole[:, 4:])
    model.recompute = True
    torch.testing.assert_close(model(tokens)[0], whole)


def test_a_model_that_looks_ahead_reads_the_tokens_that_it_is_given():
    model = off_inits(zoo.create_model("mlp engram(conv_size=None)", d_model=D, vocab_size=5, causal=False)).eval()
    assert sensitive(model, drawn(1, 9), 3) == [3, 4, 5]


def test_a_recursive_model_has_no_tokens_at_the_places_of_its_puzzle():
    options = {"recursion": {"cycles": 1, "updates": 1, "prefix": 2, "n_puzzles": 1}, "max_len": 11, "placement": "pre"}
    pattern = "mlp engram(conv_size=None)"
    model = off_inits(zoo.create_model(pattern, d_model=D, vocab_size=5, causal=False, **options)).eval()
    assert sensitive(model, drawn(1, 9), 3) == [3, 4, 5]
    seen = []
    for mixer in model.mixers():
        mixer.register_forward_hook(lambda m, args, y: seen.append(args[2].tokens[0].tolist()))
    model(tokens := drawn(1, 9))
    assert seen[0] == [-1, -1, *tokens[0].tolist()]


@pytest.mark.parametrize("objective", ["next_token", "masked_diffusion"])
def test_it_trains_under(objective, tmp_path):
    causal = objective == "next_token"
    word = "gqa" if causal else "mha"
    task = {"name": "mqar", "seq_len": 16, "n_pairs": 2} if causal else {"name": "sudoku", "size": 4}
    model = {"pattern": f"{word} engram(n_slots=50)", "d_model": D, "causal": causal}
    train = {"steps": 2, "batch_size": 2, "device": "cpu", "eval_rows": 2, "test_rows": 2}
    out = str(tmp_path / "run")
    parts = {"task": task, "model": model, "objective": {"name": objective}, "train": train, "out": out}
    zoo.train(parts, quiet=True)
    assert zoo.load(out)(drawn(1, 6))[0].isfinite().all()
