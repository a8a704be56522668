"""Irregular times: read by continuous-time mixers, given to all others as a feature of the embedding."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import zoo
from zoo import tasks
from zoo.core.options import Options
from zoo.objectives import create_objective
from zoo.protocol import Context, Mixer, Traits, mixers, register
from zoo.tasks.protocol import IGNORE, Batch
from zoo.training.recipes import read_experiment

VOCAB = 5


class Level(NamedTuple):
    h: Tensor  # (B, D)


@pytest.fixture
def leaky(monkeypatch):
    """A continuous-time mixer, registered for one test: h_t = exp(-rate dt) h_{t-1} + x_t."""
    mixers.names()
    monkeypatch.setattr(mixers, "_classes", dict(mixers._classes))

    @register("leaky")
    class Leaky(Mixer):
        traits = Traits(reads_timespans=True)

        class Config(Options):
            rate: float = Field(default=1.0, gt=0)

        def __init__(self, d_model, config, *, place=None):
            super().__init__(d_model, config)
            self.rate = torch.nn.Parameter(torch.full((d_model,), config.rate))

        def init_state(self, batch_size, *, capacity=None, device=None, dtype=None):
            return Level(self.rate.new_zeros(batch_size, self.d_model))

        def forward(self, x, state=None, context=None):
            h = x.new_zeros(x[:, 0].shape) if state is None else state.h
            spans = None if context is None else context.timespans
            spans = x.new_ones(x.shape[:2]) if spans is None else spans.to(x.dtype)
            outputs = []
            for t in range(x.shape[1]):
                h = torch.exp(-self.rate * spans[:, t, None]) * h + x[:, t]
                outputs.append(h)
            return torch.stack(outputs, 1), Level(h)

        def flops_per_token(self, context_length):
            return 0

    return "leaky"


def model_of(pattern="lstm", **options):
    torch.manual_seed(0)
    return zoo.create_model(pattern, **{"d_model": 16, "vocab_size": VOCAB, "time_feature": True, **options}).double()


def noise(n=3, length=9, seed=0):
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(VOCAB, (n, length), generator=generator)
    return tokens, torch.rand(n, length, generator=generator, dtype=torch.float64) * 4


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-10)


def test_feature_by_hand():
    model = model_of("swiglu")
    tokens, spans = noise()
    up, down = model.time_feature.up, model.time_feature.down
    hidden = spans[..., None] * up.weight[:, 0] + torch.log(1 + spans)[..., None] * up.weight[:, 1] + up.bias
    expected = model.embedding.weight[tokens] + F.silu(hidden) @ down.weight.T
    close(model.embed(tokens, torch.zeros_like(tokens), spans), expected)


def test_off_by_default():
    tokens, spans = noise()
    model = model_of(time_feature=False)
    assert model.time_feature is None
    assert torch.equal(model(tokens, None, Context(timespans=spans))[0], model(tokens)[0])


def test_timespans_change_the_output_and_are_1_by_default():
    model = model_of()
    tokens, spans = noise()
    assert not torch.allclose(model(tokens, None, Context(timespans=spans))[0], model(tokens)[0])
    close(model(tokens, None, Context(timespans=torch.ones_like(spans)))[0], model(tokens)[0])
    float32 = model(tokens, None, Context(timespans=spans.float()))[0]
    torch.testing.assert_close(float32, model(tokens, None, Context(timespans=spans))[0], rtol=1e-5, atol=1e-5)


def test_feature_learns():
    model = model_of()
    tokens, spans = noise()
    model(tokens, None, Context(timespans=spans))[0].square().sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in model.time_feature.parameters())


@pytest.mark.parametrize("feature", [True, False])
def test_times_carry_through_chunks_and_steps(leaky, feature):
    model = model_of(f"{leaky} mha", time_feature=feature)
    tokens, spans = noise()
    whole, _ = model(tokens, None, Context(timespans=spans))
    a, state = model(tokens[:, :4], model.init_state(3), Context(timespans=spans[:, :4]))
    b, _ = model(tokens[:, 4:], state, Context(timespans=spans[:, 4:]))
    close(torch.cat([a, b], 1), whole)
    state, steps = model.init_state(3, capacity=9), []
    with torch.no_grad():
        for t in range(9):
            logits, state = model.step(tokens[:, t], state, Context(timespans=spans[:, t : t + 1]))
            steps.append(logits)
    close(torch.stack(steps, 1), whole)


@pytest.mark.parametrize("feature", [True, False])
def test_generation_from_prompts_with_times(leaky, feature):
    model = model_of(leaky, time_feature=feature).eval()
    with torch.no_grad():
        model.head.weight.mul_(20)
    tokens, spans = noise()
    lengths = [9, 4, 6]
    prompts = [row[:n] for row, n in zip(tokens, lengths, strict=True)]
    times = [row[:n] for row, n in zip(spans, lengths, strict=True)]
    got = model.generate(prompts, 5, timespans=times)
    for prompt, span, continued in zip(prompts, times, got, strict=True):
        said = prompt[None]
        for _ in range(5):
            context = Context(timespans=F.pad(span[None], (0, said.shape[1] - len(span)), value=1.0))
            said = torch.cat([said, model(said, None, context)[0][:, -1:].argmax(-1)], 1)
        assert torch.equal(continued, said[0])
    assert torch.equal(model.generate(tokens, 3, timespans=torch.ones_like(spans)), model.generate(tokens, 3))
    assert not torch.equal(model.generate(tokens, 3, timespans=30 * spans), model.generate(tokens, 3))
    with pytest.raises(zoo.UsageError, match="timespans should be one for every token of every prompt"):
        model.generate(prompts, 2, timespans=spans)


def test_cost_is_counted():
    for pattern in ("swiglu", "mlp"):
        model = model_of(pattern).float()
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            model.step(torch.zeros(1, dtype=torch.int64), model.init_state(1))
        assert model.flops_per_token(1) == counter.get_total_flops()


# ---- objectives and experiments


class Puzzle(tasks.Task):
    """A fill-in task with irregular times."""

    name, layout, irregular_times = "puzzle", "fill_in", True
    vocab_size, seq_len = VOCAB - 1, 6

    def __init__(self):
        pass

    def sample(self, n, *, split, seed, start=0):
        tokens, spans = noise(n, self.seq_len, seed)
        asked = spans > 2
        inputs = torch.where(asked, 0, tokens.clamp(1, 3))
        return Batch(inputs, torch.where(asked, tokens.clamp(1, 3), IGNORE), {}, spans)

    def render(self, batch, row=0, predictions=None):
        raise NotImplementedError


@pytest.mark.parametrize("feature", [True, False])
def test_generated_answers_know_the_prompts_times(leaky, feature):
    """Step by step with a state, as teacher forcing on its own answer has it."""
    batch = Puzzle().sample(8, split="train", seed=0)
    objective = create_objective("next_token", Puzzle())
    model = model_of(leaky, time_feature=feature)
    with torch.no_grad():
        model.head.weight.mul_(20)
    answer = objective.predict(model, batch)
    encoded = objective.encode(batch._replace(targets=torch.where(batch.targets == IGNORE, IGNORE, answer)))
    assert torch.equal(encoded.timespans[:, :6], batch.timespans)
    assert (encoded.timespans[:, 6:] == 1).all()
    logits, _ = model(encoded.tokens, None, Context(timespans=encoded.timespans))
    assert torch.equal(logits.flatten(0, 1)[encoded.positions].argmax(-1), encoded.targets)


def test_experiments_give_times_to_those_that_do_not_read_them(leaky):
    def feature(pattern, task="event_xor", **model):
        return read_experiment({"task": task, "model": {"pattern": pattern, **model}}).build().model.time_feature

    assert feature("lstm") is True
    assert feature("mha swiglu") is True
    assert feature(leaky) is False
    assert feature(f"mha {leaky}") is False, "one that reads them is enough"
    assert feature("lstm", task="state_tracking") is False
    assert feature("lstm", time_feature=False) is False
    assert feature(leaky, time_feature=True) is True


def test_an_experiment_with_times_says_so_in_its_config():
    experiment = read_experiment({"task": "event_xor", "model": "2*(lstm)"})
    config = experiment.resolved(experiment.build())
    assert config["model"]["time_feature"] is True
    again = read_experiment(config)
    assert again.resolved(again.build()) == config


def test_only_tasks_with_irregular_times_have_timespans():
    for name in tasks.list_tasks():
        task = tasks.create_task(name)
        assert (task.sample(2, split="train", seed=0).timespans is not None) == task.irregular_times
