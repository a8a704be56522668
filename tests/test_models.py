"""Token models: what they compute, how they carry on, how they generate, what they cost, what they refuse."""

from __future__ import annotations

import contextlib
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

import zoo
from zoo.laws import spelled
from zoo.models.create import model_config
from zoo.models.ends import sinusoidal
from zoo.models.stack import ModelState
from zoo.norms.none import NoNorm
from zoo.pattern import make_word, parse, to_text
from zoo.protocol import Context, Place, mixers
from zoo.states import tree_bytes

VOCAB = 11
PATTERNS = [
    "2*(mamba2 swiglu)",
    "gated_deltanet (swa(window=5) | short_conv) swiglu",
    "gqa shortcut(swiglu, lstm swiglu)",
]
over_patterns = pytest.mark.parametrize("pattern", PATTERNS)


def model_of(pattern: str, dtype: torch.dtype = torch.float64, **options) -> zoo.models.Ends:
    torch.manual_seed(0)
    model = zoo.create_model(pattern, **{"d_model": 16, "vocab_size": VOCAB, **options}).to(dtype)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.1 * torch.randn_like(p)
    return model


def tokens(batch: int, steps: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(VOCAB, (batch, steps), generator=torch.Generator().manual_seed(seed))


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-10)


# ---- what is computed


def test_forward_by_hand():
    model = model_of("swiglu", norm="layernorm")
    x = tokens(2, 5)
    step, (norm,) = model.backbone.steps[0], [model.norm]
    h = model.embedding.weight[x]
    h = h + step.mixers[0](F.layer_norm(h, (16,), step.norm_in.weight, step.norm_in.bias))[0]
    h = F.layer_norm(h, (16,), norm.weight, norm.bias)
    logits, state = model(x)
    close(logits, h @ model.head.weight.T)
    close(model.logits(model.features(x)[0]), logits)
    assert type(state) is ModelState
    assert state.position.tolist() == [5, 5]


def test_post_norm_has_no_last_norm():
    assert isinstance(model_of("swiglu", placement="post").norm, NoNorm)


def test_tied_embeddings():
    model = model_of("swiglu", tie_embeddings=True)
    assert model.head is None
    close(model(tokens(1, 3))[0], model.features(tokens(1, 3))[0] @ model.embedding.weight.T)
    assert model.n_parameters() == model_of("swiglu").n_parameters() - 16 * VOCAB


def test_softcap_bounds_the_logits():
    model, capped = model_of("swiglu"), model_of("swiglu", logit_softcap=0.5)
    x = tokens(2, 4)
    close(capped(x)[0], 0.5 * torch.tanh(model(x)[0] / 0.5))
    assert capped(x)[0].abs().max() <= 0.5


def test_embedding_scale():
    model, scaled = model_of("swiglu"), model_of("swiglu", embedding_scale=4.0)
    with torch.no_grad():
        model.embedding.weight.mul_(4)
    close(scaled(tokens(1, 4))[0], model(tokens(1, 4))[0])


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("norm", ["rmsnorm", "rmsnorm_zero_centred", "layernorm"])
def test_every_option_of_norms_and_scales_at_once(norm, tied):
    options = {"norm": norm, "norm_eps": 1e-2, "placement": "sandwich", "tie_embeddings": tied}
    options |= {"in_scale": 0.5, "out_scale": 2.0, "residual_scale": 0.9, "embedding_scale": 3.0}
    options |= {"embedding_norm": True, "head_bias": True, "logit_scale": 0.3, "logit_softcap": 2.0}
    model = model_of('mlp glu(placement="output", in_scale=1.0, out_scale=1.0, residual_scale=1.0)', **options)

    def normed(h, layer):
        if norm == "layernorm":
            return F.layer_norm(h, (16,), layer.weight, layer.bias, 1e-2)
        weight = layer.weight + 1 if norm == "rmsnorm_zero_centred" else layer.weight
        return h / (h.square().mean(-1, keepdim=True) + 1e-2).sqrt() * weight

    x = tokens(2, 5)
    first, second = model.backbone.steps
    h = normed(3 * model.embedding.weight[x], model.embedding_norm)
    h = 0.9 * h + normed(2 * first.mixers[0](0.5 * normed(h, first.norm_in))[0], first.norm_out)
    h = h + normed(second.mixers[0](h)[0], second.norm_out)
    head = model.embedding.weight if tied else model.head.weight
    logits = 0.3 * (normed(h, model.norm) @ head.T + model.head_bias)
    close(model(x)[0], 2 * torch.tanh(logits / 2))


def test_dropout_in_training_only():
    model = model_of("swiglu", dropout=0.5)
    x = tokens(2, 6)
    assert not torch.equal(model(x)[0], model(x)[0])
    model.eval()
    assert torch.equal(model(x)[0], model(x)[0])


def test_learned_positions_by_hand():
    model = model_of("swiglu", positions="learned", max_len=6)
    x = tokens(2, 6)
    place = torch.arange(6).expand(2, 6)
    close(model.embed(x, place), model.embedding.weight[x] + model.positions.weight)


def test_sinusoidal_positions_by_hand():
    table = sinusoidal(torch.tensor([[0, 3]]), 4)
    angle = torch.tensor([3.0, 3.0 / 100])
    close(table[0, 0], torch.tensor([0.0, 1.0, 0.0, 1.0]))
    close(table[0, 1], torch.stack([angle.sin(), angle.cos()], -1).flatten())
    model = model_of("swiglu", positions="sinusoidal")
    close(
        model.embed(tokens(1, 2), torch.tensor([[0, 3]])),
        model.embedding(tokens(1, 2)) + sinusoidal(torch.tensor([[0, 3]]), 16),
    )


# ---- carrying on


@over_patterns
@pytest.mark.parametrize("positions", ["none", "learned", "sinusoidal"])
def test_state_carries(pattern, positions):
    learned = {"max_len": 16} if positions == "learned" else {}
    model, x = model_of(pattern, positions=positions, **learned), tokens(3, 13)
    whole, state = model(x)
    first, carried = model(x[:, :6], model.init_state(3))
    second, carried = model(x[:, 6:], carried)
    close(torch.cat([first, second], 1), whole)
    close(tree_leaves(zoo.canonical(carried)), tree_leaves(zoo.canonical(state)))
    carried, steps = model.init_state(3, capacity=13), []
    with torch.no_grad():
        for t in range(13):
            logits, carried = model.step(x[:, t], carried)
            steps.append(logits)
    close(torch.stack(steps, 1), whole)


def tree_leaves(tree):
    return torch.utils._pytree.tree_leaves(tree)


@over_patterns
def test_packed_documents_are_alone(pattern):
    model, x = model_of(pattern, positions="learned", max_len=16), tokens(2, 12)
    resets = torch.zeros(2, 12, dtype=torch.bool)
    resets[0, 5] = resets[1, 9] = True
    logits, state = model(x, None, Context(resets=resets))
    for i, at in enumerate((5, 9)):
        close(logits[[i], :at], model(x[[i], :at])[0])
        close(logits[[i], at:], model(x[[i], at:])[0])
    assert state.position.tolist() == [7, 3]


@over_patterns
def test_ragged_rows_are_alone(pattern):
    model, x, lengths = model_of(pattern, positions="learned", max_len=24), tokens(3, 12), torch.tensor([12, 4, 7])
    later = tokens(3, 5, seed=1)
    logits, state = model(x, None, Context(lengths=lengths))
    assert state.position.tolist() == lengths.tolist()
    going_on, _ = model(later, state)
    for i, n in enumerate(lengths.tolist()):
        alone, _ = model(torch.cat([x[[i], :n], later[[i]]], 1))
        close(logits[[i], :n], alone[:, :n])
        close(going_on[[i]], alone[:, n:])


@over_patterns
def test_states_fork_select_and_join(pattern):
    model, x, later = model_of(pattern), tokens(3, 8), tokens(3, 4, seed=1)
    with torch.no_grad():
        _, state = model(x, model.init_state(3, capacity=12))
        branch = zoo.fork(state)
        expected, _ = model(later, state)
        rows = zoo.join([zoo.select(branch, [1, 2]), zoo.select(branch, [0])])
        close(model(later[[1, 2, 0]], rows)[0], expected[[1, 2, 0]])


# ---- generation


@over_patterns
def test_greedy_generation_is_an_argmax_loop(pattern):
    model, prompt = model_of(pattern), tokens(2, 4)
    expected = prompt
    for _ in range(7):
        expected = torch.cat([expected, model(expected)[0][:, -1:].argmax(-1)], 1)
    assert torch.equal(model.generate(prompt, max_new_tokens=7), expected)


@over_patterns
def test_ragged_prompts_are_continued_as_if_alone(pattern):
    model = model_of(pattern, positions="learned", max_len=16)
    prompts = [tokens(1, n, seed=n)[0] for n in (1, 6, 3)]
    together = model.generate(prompts, max_new_tokens=8)
    assert isinstance(together, list)
    for prompt, row in zip(prompts, together, strict=True):
        assert torch.equal(row, model.generate(prompt[None], max_new_tokens=8)[0])
        assert torch.equal(row[: len(prompt)], prompt)


def test_sampling_follows_its_generator_and_the_distribution():
    model, prompt = model_of("short_conv swiglu"), tokens(1, 3).expand(4000, 3)

    def sample(seed: int, temperature: float) -> torch.Tensor:
        return model.generate(prompt, 1, temperature=temperature, generator=torch.Generator().manual_seed(seed))

    first = sample(0, 2.0)
    assert torch.equal(first, sample(0, 2.0))
    assert not torch.equal(first, sample(1, 2.0))
    frequency = torch.bincount(first[:, -1], minlength=VOCAB) / 4000
    expected = torch.softmax(model(prompt[:1])[0][0, -1] / 2.0, -1)
    assert (frequency - expected).abs().max() < 0.03


def test_generation_leaves_the_model_as_it_was():
    model = model_of("short_conv swiglu", dropout=0.5).train()
    prompt = tokens(1, 3)
    assert torch.equal(model.generate(prompt, 5), model.generate(prompt, 5))
    assert model.training
    assert model.generate(prompt, 0).tolist() == prompt.tolist()
    assert not model.generate(prompt, 2).requires_grad


# ---- models that look ahead


def test_a_model_that_looks_ahead():
    model, x = model_of("bidirectional(lstm) gqa swiglu", causal=False), tokens(2, 7)
    logits, state = model(x)
    assert state == ()
    assert model.init_state(2) == ()
    assert model.state_bytes(2, 7) == 0
    changed = x.clone()
    changed[:, -1] = (x[:, -1] + 1) % VOCAB
    assert not torch.allclose(model(changed)[0][:, 0], logits[:, 0])
    close(model(x, ())[0], logits)
    with pytest.raises(zoo.UsageError, match="generate reads left to right"):
        model.generate(x, 1)
    with pytest.raises(zoo.UsageError, match="takes no state"):
        model(x, ModelState(torch.zeros(2, dtype=torch.int64), ()))


# ---- cost


@over_patterns
def test_state_bytes_are_the_states(pattern):
    model = model_of(pattern, torch.float32)
    for dtype in (torch.float32, torch.bfloat16):
        for n in (1, 4, 30):
            assert model.state_bytes(2, n, dtype) == tree_bytes(model.init_state(2, capacity=n, dtype=dtype))


@over_patterns
def test_flops_are_counted(pattern):
    formed = [word for word in parse(pattern).words() if "backend" in type(word.config).model_fields]
    references = {w.name: to_text(make_word(w.name, {**w.config.changed(), "backend": "reference"})) for w in formed}
    model = model_of(zoo.swap(pattern, references), torch.float32)
    with torch.no_grad():
        _, state = model(tokens(1, 9), model.init_state(1, capacity=10))
        with FlopCounterMode(display=False) as counter:
            model.step(tokens(1, 1)[0], state)
    assert model.flops_per_token(10) == counter.get_total_flops()


def test_parameters_on_the_meta_device():
    with torch.device("meta"):
        shadow = zoo.create_model(PATTERNS[1], d_model=16, vocab_size=VOCAB)
    assert shadow.n_parameters() == model_of(PATTERNS[1]).n_parameters()


@pytest.mark.parametrize("name", mixers.names())
def test_a_mixer_made_on_the_meta_device_takes_weights(name, poisoned_memory):
    """Nothing is left there, be it in no file, and nothing that is in no file is read unwritten."""
    cls, x = mixers[name], torch.randn(2, 5, 16)
    for options in cls.law_cases()[:3]:
        with contextlib.suppress(zoo.UsageError):  # sizes that take another width
            mixer = cls(16, cls.Config(**options), place=Place())
            for way in ("assigned", "copied"):
                with torch.device("meta"):
                    other = cls(16, cls.Config(**options), place=Place())
                other = other if way == "assigned" else other.to_empty(device="cpu")
                other.load_state_dict(mixer.state_dict(), assign=way == "assigned")
                for which, tensor in [*other.named_parameters(), *other.named_buffers()]:
                    assert not tensor.is_meta, f"{which} is on the meta device, {way}"
                for module in map(spelled, (mixer, other)):
                    module(x)  # training: what is counted is counted from zero
                assert dict(other.named_buffers()).keys() == dict(mixer.named_buffers()).keys()
                for which, buffer in other.named_buffers():
                    torch.testing.assert_close(buffer, mixer.get_buffer(which), msg=f"{which}, {way}")
                mixer.after_step()


@pytest.mark.parametrize(
    "pattern",  # the laws compile steps of every word
    [
        *(pytest.param(p, marks=[pytest.mark.slow] if i else []) for i, p in enumerate(PATTERNS)),
        "mlstm slstm rwkv7 mla",
    ],
)
def test_a_compiled_decoder_is_one_graph(pattern):
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    model, given = model_of(pattern, torch.float32).eval(), tokens(2, 4)
    step, state, outputs = (
        torch.compile(model.step, fullgraph=True, backend=backend),
        model.init_state(2, capacity=8),
        [],
    )
    with torch.no_grad():
        for t in range(4):
            logits, state = step(given[:, t], state)
            outputs.append(logits)
        expected = model(given)[0]
    assert len(graphs) == 1
    torch.testing.assert_close(torch.stack(outputs, 1), expected, rtol=1e-4, atol=1e-4)


# ---- a width for a number of parameters


def sizes(pattern: str, widths, **options) -> dict[int, int]:
    """Parameters by width, of the widths that the pattern takes."""
    found = {}
    for width in widths:
        with torch.device("meta"), contextlib.suppress(zoo.UsageError):
            found[width] = zoo.create_model(pattern, d_model=width, **options).n_parameters()
    return found


@pytest.mark.parametrize(
    ("pattern", "options"),
    [
        ("2*(mha swiglu)", {}),
        ("mqa", {}),  # the number of heads follows from the width: some have fewer parameters than narrower ones
        ("gqa(n_heads=6, n_kv_heads=3) glu", {"tie_embeddings": True}),  # not every width divides into six heads
        ("mamba2 | mha(n_heads=5)", {"residual": "mhc", "positions": "learned", "max_len": 50}),
    ],
)
def test_the_largest_width_within_a_budget(pattern, options):
    options = {"vocab_size": VOCAB, **options}
    known = sizes(pattern, range(16, 202, 2), **options)
    least, pairs = min(known), [(a, b) for (w, a), (_, b) in itertools.pairwise(known.items()) if w < 130]
    uneven = [n for a, b in pairs if b < a for n in (a - 1, a, b)]
    assert bool(uneven) == (pattern == "mqa")
    for budget in (known[least], known[least] + 1, known[90] - 1, known[90], known[120] - 1, known[120], *uneven):
        widest = max(width for width, n in known.items() if n <= budget)
        assert zoo.create_model(pattern, n_parameters=budget, **options).config.d_model == widest
    with pytest.raises(zoo.UsageError, match=f"is too few: at d_model={least}, .* this model has {known[least]}.$"):
        zoo.create_model(pattern, n_parameters=known[least] - 1, **options)


@pytest.mark.parametrize("option", ["state_bytes", "flops_per_token"])
@pytest.mark.parametrize("pattern", ["mha swiglu", "mamba2 swiglu"])
def test_a_width_for_state_or_compute(option, pattern):
    amount, asked = 40_000, {"vocab_size": VOCAB, "context_length": 50}
    config = zoo.create_model(pattern, **asked, **{option: amount}).config

    def cost(width):
        model = zoo.create_model(pattern, d_model=width, vocab_size=VOCAB)
        return model.state_bytes(1, 50) if option == "state_bytes" else model.flops_per_token(50)

    wider = {width: cost(width) for width in range(config.d_model, config.d_model + 40, 2)}
    assert [width for width, n in wider.items() if n <= amount] == [config.d_model]


def test_a_budget_is_solved_once():
    config = zoo.create_model("mha swiglu", n_parameters=50_000, vocab_size=VOCAB).config
    assert zoo.create_model(config).config == config
    assert zoo.ModelConfig(**config.model_dump()) == config
    wider = zoo.create_model(config, n_parameters=100_000)
    assert config.d_model < wider.config.d_model
    assert 50_000 < wider.n_parameters() <= 100_000


def test_the_last_to_give_the_size_decides():
    data = {"pattern": "mha", "vocab_size": VOCAB}
    solved = zoo.create_model(data, n_parameters=9_000).config.d_model
    assert zoo.create_model({**data, "d_model": 64}, n_parameters=9_000).config.d_model == solved
    assert zoo.create_model({**data, "n_parameters": 9_000}).config.d_model == solved
    assert zoo.create_model({**data, "n_parameters": 9_000}, d_model=64).config.d_model == 64
    assert zoo.create_model({**data, "n_parameters": None}, d_model=64).config.d_model == 64
    family = zoo.create_model("llama3-tiny", n_parameters=30_000)
    assert family.n_parameters() <= 30_000
    assert family.config.d_model < zoo.create_model("llama3-tiny").config.d_model


@pytest.mark.parametrize(
    ("spec", "options", "message"),
    [
        ("mha", {"d_model": 32, "n_parameters": 9}, "d_model=32 and n_parameters=9 are both given: one follows"),
        ({"pattern": "mha", "d_model": 32, "n_parameters": 9}, {}, "d_model=32 and n_parameters=9 are both given"),
        ("mha", {"n_parameters": 1e6}, "model: n_parameters=1000000.0 is not allowed: it should be a whole number"),
        ("mha", {"n_parameters": True}, "model: n_parameters=True is not allowed"),
        ("mha", {"n_parameters": 0}, "model: n_parameters=0 is not allowed"),
        ("mha", {"n_parameters": 9}, "n_parameters=9 is too few: at d_model=16, the least, this model has 1408."),
        ("mha", {"state_bytes": 9, "n_parameters": 9}, "n_parameters=9 and state_bytes=9 are both given"),
        ("mha", {"state_bytes": 900}, "model: state_bytes depends on the number of tokens read: give context_length"),
        ("mha", {"d_model": 32, "context_length": 9}, "model: context_length belongs to state_bytes or flops_per_tok"),
        ("mha", {"state_bytes": 9, "context_length": 0}, "model: context_length=0 is not allowed"),
        ("mha", {"state_bytes": 9, "context_length": 9}, "state_bytes=9 is too few: at d_model=16, the least, this"),
        ("swiglu", {"state_bytes": 99, "context_length": 9}, "state_bytes=99 sets no width: at d_model="),
        ("lstm", {"n_parameters": 9, "causal": False}, "write bidirectional(lstm)"),
        ("mha", {"n_parameters": 9, "d_modle": 3}, "Unknown option of model 'd_modle'. Did you mean 'd_model'?"),
    ],
)
def test_refused_budgets(spec, options, message):
    with pytest.raises(zoo.UsageError) as refusal:
        zoo.create_model(spec, **{"vocab_size": VOCAB, **options})
    assert message in str(refusal.value)
    assert "\n" not in str(refusal.value)


# ---- swapping


@pytest.mark.parametrize("name", zoo.list_models("*-tiny"))
def test_words_of_a_family_give_way_to_others(name, tmp_path):
    config = model_config(name)
    words = {w.name for w in parse(config.pattern).words() if zoo.list_mixers(w.name, kind="sequence")}
    other = "mqa" if "wide" in str(config.pattern) else "min_gru"  # a block of two streams begins with attention
    swapped = zoo.swap(name, dict.fromkeys(words, other if config.causal else f"bidirectional({other})"))
    assert not words & {w.name for w in parse(swapped.pattern).words()}
    rest = config.model_copy(update={"pattern": swapped.pattern, "recursion": swapped.recursion})
    assert swapped == rest
    with torch.device("meta"):
        model = zoo.create_model(swapped)
    with pytest.raises(zoo.UsageError, match="any more: pattern=" if config.published else "Only a model of a family"):
        zoo.to_hf(model, tmp_path)


def test_swap_reaches_both_networks_of_a_recursive_model():
    config = zoo.ModelConfig(pattern="mha swiglu", vocab_size=5, recursion={"outer": "2*(mha) mlp", "updates": 2})
    swapped = zoo.swap(config, {"mha": "mqa(n_heads=2)", "swiglu": "geglu"})
    assert swapped.pattern == "mqa(n_heads=2) geglu"
    assert swapped.recursion == zoo.models.Recursion(outer="2*(mqa(n_heads=2)) mlp", updates=2)


# ---- ways to say it, and refusals


def test_ways_to_create():
    expected = zoo.ModelConfig(pattern="2*(mamba2 swiglu)", d_model=32, vocab_size=VOCAB)
    data = {"pattern": [{"repeat": 2, "body": ["mamba2", "swiglu"]}], "d_model": 32, "vocab_size": VOCAB}
    for spec, options in [
        ("2*(mamba2 swiglu)", {"d_model": 32, "vocab_size": VOCAB}),
        (parse("2*(mamba2 swiglu)"), {"d_model": 32, "vocab_size": VOCAB}),
        (data["pattern"], {"d_model": 32, "vocab_size": VOCAB}),
        (data, {}),
        (data, {"d_model": 32}),
        (expected, {}),
        (zoo.ModelConfig(pattern="2*(mamba2 swiglu)", vocab_size=5), {"d_model": 32, "vocab_size": VOCAB}),
    ]:
        assert zoo.create_model(spec, **options).config == expected


def test_families():
    names = zoo.list_models()
    assert "mamba2-tiny" in names
    assert zoo.list_models("mamba2-1*") == ["mamba2-1.3b", "mamba2-130m"]
    model = zoo.create_model("mamba2-tiny", d_model=64)
    assert model.config.d_model == 64
    assert zoo.create_model({"family": "mamba2-tiny", "vocab_size": 9}).config.vocab_size == 9


def test_a_width_is_looked_for_once(monkeypatch):
    wanted = model_config("2*(gqa swiglu)", vocab_size=31, n_parameters=40_404)
    monkeypatch.setattr(zoo.models.create, "largest_width", None)
    assert model_config("2*(gqa swiglu)", vocab_size=31, n_parameters=40_404) == wanted


def test_a_family_of_a_published_size_has_the_width_of_a_budget():
    model = zoo.create_model("xlstm-tiny", n_parameters=30_000)
    assert model.config.published
    assert 25_000 < model.n_parameters() <= 30_000


def test_the_families_size_is_the_papers():
    with torch.device("meta"):
        assert abs(zoo.create_model("mamba2-130m").n_parameters() / 129e6 - 1) < 0.02


@pytest.mark.parametrize(
    ("spec", "options", "message"),
    [
        ("swiglo", {}, "Unknown mixer 'swiglo'. Did you mean 'swiglu'? Available: "),
        ("mamba2-tny", {}, "Unknown model 'mamba2-tny'. Did you mean 'mamba2-tiny'? Available: "),
        ("llama3", {}, "Unknown model 'llama3'. Did you mean 'llama3-"),
        ("swiglu", {"d_modle": 32}, "Unknown option of model 'd_modle'. Did you mean 'd_model'? Available: pattern, "),
        ("swiglu", {"d_model": 17}, "model: d_model=17 is not allowed: it should be a multiple of 2."),
        ("swiglu", {"d_model": 8}, "model: d_model=8 is not allowed: it should be greater than or equal to 16."),
        ("swiglu", {"d_model": 2**21}, "d_model=2097152 is not allowed: it should be less than or equal to 1048576."),
        ("swiglu", {"d_model": 32.0}, "model: d_model=32.0 is not allowed: it should be a valid integer."),
        ("swiglu", {"vocab_size": 0}, "model: vocab_size=0 is not allowed"),
        ("swiglu", {"placement": "pst"}, "Did you mean 'post'?"),
        ("swiglu", {"norm": "rms"}, "Did you mean 'rmsnorm'?"),
        ("swiglu", {"norm_eps": 0.0}, "model: norm_eps=0.0 is not allowed: it should be greater than 0."),
        ("swiglu", {"logit_softcap": 0.0}, "model: logit_softcap=0.0 is not allowed: it should be greater than 0."),
        ("swiglu", {"residual_scale": "half"}, "model: residual_scale='half' is not allowed"),
        ("swiglu", {"embedding_norm": True, "norm": "none"}, 'embedding_norm=True needs a norm, not norm="none".'),
        ("swiglu", {"dropout": 1.0}, "model: dropout=1.0 is not allowed: it should be less than 1."),
        ("swiglu", {"positions": "learned"}, 'positions="learned" needs max_len'),
        ("swiglu", {"max_len": 9}, 'max_len belongs to positions="learned", which is not set.'),
        ("lstm", {"causal": False}, "write bidirectional(lstm)"),
        (["swiglu", 3], {}, "A step is a word or a mapping, not 3."),
        ({"d_model": 32}, {}, "model needs 'pattern', which was not given."),
        ({"family": "mamba2-tiny", "patern": "lstm"}, {}, "Did you mean 'pattern'?"),
        ({"family": "mamba3"}, {}, "Unknown model 'mamba3'. Did you mean 'mamba"),
        (None, {}, "A pattern is a text or a list of steps, not None."),
    ],
)
def test_refused_models(spec, options, message):
    with pytest.raises(zoo.UsageError) as refusal:
        zoo.create_model(spec, **{"vocab_size": VOCAB, **options})
    assert message in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_a_vocabulary_must_be_given():
    with pytest.raises(zoo.UsageError, match="model needs 'vocab_size', which was not given"):
        zoo.create_model("swiglu")


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ([], {}, "at least one prompt, each of at least one token"),
        (
            [torch.tensor([1]), torch.tensor([], dtype=torch.int64)],
            {},
            "at least one prompt, each of at least one token",
        ),
        (torch.ones(1, 2), {"temperature": -1.0}, "temperature=-1.0 is not allowed"),
        (torch.ones(1, 2), {"max_new_tokens": -1}, "max_new_tokens=-1 is not allowed"),
        (torch.full((1, 9), 1), {"max_new_tokens": 9}, "max_len=16"),
        (torch.tensor([[VOCAB]]), {}, f"vocab_size={VOCAB}"),
        (torch.tensor([[-1]]), {}, f"vocab_size={VOCAB}"),
    ],
)
def test_refused_prompts(prompts, options, message):
    model = model_of("short_conv", positions="learned", max_len=16)
    with pytest.raises(zoo.UsageError, match=message):
        model.generate(prompts, **{"max_new_tokens": 3, **options})


def test_more_tokens_than_positions():
    model = model_of("short_conv", positions="learned", max_len=6)
    _, state = model(tokens(1, 5))
    logits, state = model.step(tokens(1, 1)[0], state)
    assert logits.isfinite().all()
    with pytest.raises(zoo.UsageError, match="max_len=6"):
        model.step(tokens(1, 1)[0], state)
    with pytest.raises(zoo.UsageError, match="7 tokens are more than max_len=6"):
        model(tokens(1, 7))
    model(tokens(1, 9), None, Context(resets=torch.arange(9).eq(4)[None]))
    model(tokens(2, 8), None, Context(lengths=torch.tensor([6, 2])))
    assert model.generate(tokens(1, 4), 3).shape == (1, 7)


def test_autocast_and_compilation():
    model = model_of("mamba2 swiglu", torch.float32)
    x = tokens(2, 9)
    expected, _ = model(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert (model(x)[0].float() - expected).norm() < 0.05 * expected.norm()
    compiled = torch.compile(lambda x: model(x)[0], fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), expected, rtol=1e-4, atol=1e-5)
