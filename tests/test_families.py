"""Every published family: its tiny size learns, its sizes are well formed."""

from __future__ import annotations

import functools
import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import zoo
from zoo.interop.hf import weight_maps
from zoo.objectives import create_objective
from zoo.tasks import create_task
from zoo.training.recipes import read_experiment

TINY = zoo.list_models("*-tiny")
PARAMETERS = {  # of the published checkpoints, or of the authors' code
    "cwm-32b": 32_581_097_472,
    "dream-7b": 7_615_616_512,  # those of Qwen2.5-7B
    "deepseek_v2-236b": 235_741_434_880,
    "deepseek_v2-lite": 15_706_484_224,
    "deepseek_v3-671b": 671_026_404_352,
    "deltanet-1.3b": 1_365_677_056,  # of flash-linear-attention's default config, as the next four
    "gated_deltanet-1.3b": 1_387_348_732,
    "gla-1.3b": 1_365_514_240,
    "mamba3-1.3b": 1_387_122_688,
    "hgrn2-1.3b": 1_364_396_032,
    "deepseek_v32-671b": 671_877_929_216,  # V3's and 61 indexers of 13,959,424
    "glm_dsa-5-744b": 743_911_199_232,
    "glm_dsa-5.2-744b": 743_377_000_704,  # 57 indexers of 9,371,904 less
    "hrm-sudoku": 27_275_266 + 512,  # 512: what is learned of a puzzle, which is never counted there
    "hrm_text-1b": 1_182_795_264 - 1536,  # z_L_init is frozen, and no parameter here
    "kimi_k2-1t": 1_026_408_209_408,
    "kimi_linear-48b-a3b": 49_122_675_072,
    "lfm2-350m": 354_483_968,
    "lfm2-700m": 742_489_344,
    "lfm2-1.2b": 1_170_340_608,
    "lfm2-2.6b": 2_569_272_320,
    "lfm2_moe-8b-a1b": 8_339_929_856,
    "llada-8b": 8_015_581_184,
    "longcat_flash-560b": 560_664_958_976,
    "mamba2-7b": 7_285_403_648,
    "olmo_hybrid-7b": 7_430_870_688,
    "qwen3_5_moe-35b-a3b": 34_660_610_688,
    "qwen3_next-80b-a3b": 79_674_391_296,  # without the layer that predicts further tokens
    "recurrent_gemma-2b": 2_682_862_080,
    "recurrent_gemma-9b": 8_579_977_216,
    "rwkv6-1.3b": 1_360_224_256,  # of flash-linear-attention's default config
    "rwkv7-0.1b": 191_034_624,
    "rwkv7-0.4b": 450_767_872,
    "rwkv7-1.5b": 1_527_404_544,
    "rwkv7-2.9b": 2_947_735_040,
    "rwkv7-7.2b": 7_199_141_888,
    "trm-maze": 6_822_914 + 512,
    "trm-maze-mlp": 18_795_522 + 512,
    "trm-sudoku": 5_028_866 + 512,
    "xlstm-7b": 6_865_424_896,
    "zamba2-1.2b": 1_215_064_704,
    "zamba2-2.7b": 2_662_214_560,
    "zamba2-7b": 7_356_749_648,
}

ROUNDED = {  # where no more digits are told
    "falcon_h1-0.5b": 0.521e9,
    "falcon_h1-90m": 91.1e6,
    "jamba-large": 398e9,
    "jamba-mini": 51.6e9,
    "mamba-1.4b": 1.37e9,
    "mamba-130m": 129e6,
    "mamba-2.8b": 2.77e9,
    "mamba-370m": 372e6,
    "mamba-790m": 793e6,
    "mamba2-1.3b": 1.34e9,
    "mamba2-130m": 129e6,
    "mamba2-2.7b": 2.7e9,
    "mamba2-370m": 368e6,
    "mamba2-780m": 780e6,
    "minimax-456b": 456e9,
    "nemotron_h-3-nano-30b": 31.6e9,
    "nemotron_h-3-super-120b": 120.6e9,
    "nemotron_h-47b": 47e9,
    "nemotron_h-4b": 4.5e9,
    "nemotron_h-56b": 56e9,
    "nemotron_h-8b": 8.1e9,
    "nemotron_h-nano-12b-v2": 12.3e9,
    "nemotron_h-nano-9b-v2": 8.89e9,
    "rwkv6-1.6b": 1.6e9,
    "rwkv6-3b": 3.1e9,
    "rwkv6-7b": 7.63e9,
}


def test_sizes_under_another_name():
    """Llama 2 has the class of Llama 3: its configs are read as of that family, and give the same model."""
    model = zoo.create_model("llama2-tiny")
    family = zoo.models.families.families.of_config(model.config.published)
    assert family.name == "llama3"
    assert zoo.models.config.ModelConfig(**family.model_options(model.config.published)) == model.config


def test_every_family_has_a_tiny_size():
    assert {name.rsplit("-", 1)[0] for name in TINY} == {
        zoo.models.families.families.of(n)[0].name for n in zoo.list_models()
    }


# that a size learns takes a second or two: every twentieth in `make test`, all of them in `make check-all`
LEARNING = [pytest.param(name, marks=[pytest.mark.slow] if i % 20 else []) for i, name in enumerate(TINY)]


@pytest.mark.parametrize("name", LEARNING)
def test_tiny_sizes_learn(name):
    torch.manual_seed(0)
    config = zoo.create_model(name).config
    if config.recursion:
        losses = taught(name, "deep_supervision", create_task("sudoku", size=4), lr=1e-3, n_rows=16)
    elif not config.causal:
        losses = taught(name, "masked_diffusion", recall(), lr=3e-3, n_rows=32)
    else:
        losses = taught_to_continue(name)
    assert sum(losses[-5:]) / 5 < 0.7 * losses[0], (losses[0], losses[-5:])


def recall():
    return create_task("mqar", seq_len=16, n_pairs=2, vocab_size=32)


def taught(name, objective, task, *, lr, n_rows):
    """The losses of 50 updates by an objective."""
    objective = create_objective(objective, task, causal=False)
    model = zoo.create_model(name, vocab_size=objective.vocab_size)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    losses, carry, generator = [], {}, torch.Generator().manual_seed(0)
    for step in range(50):
        batch = task.sample(n_rows, split="train", seed=0, start=n_rows * step)
        for update in objective.updates(model, objective.encode(batch), carry, generator):
            optimizer.zero_grad()
            update.loss.backward()
            optimizer.step()
            losses.append(update.loss.item())
    return losses


def taught_to_continue(name):
    """The losses of 50 updates, told what follows at every position."""
    task = recall()
    model = zoo.create_model(name, vocab_size=task.vocab_size)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for step in range(50):
        batch = task.sample(32, split="train", seed=0, start=32 * step)
        context = zoo.Context()
        logits, _ = model(batch.inputs, context=context)
        loss = F.cross_entropy(logits.flatten(0, 1), batch.targets.flatten())
        optimizer.zero_grad()
        sum(context.losses, loss).backward()
        optimizer.step()
        for mixer in model.mixers():
            mixer.after_step()
        losses.append(loss.item())
    return losses


@functools.cache
def shadow(name):
    """A model of a size without numbers, for all tests that read its form."""
    with torch.device("meta"):
        return zoo.create_model(name)


def by_families(sizes: list[str]) -> list[Any]:
    """Sizes in order; all but the first of each family are slow."""
    found = []
    for _, names in itertools.groupby(sorted(sizes), key=lambda name: name.partition("-")[0]):
        found += [pytest.param(name, marks=[pytest.mark.slow] if i else []) for i, name in enumerate(names)]
    return found


PUBLISHED = [name for name in zoo.list_models() if name not in TINY]


@pytest.mark.parametrize("name", [*TINY, *by_families(PUBLISHED)])
def test_sizes_match_their_weight_maps(name):
    """Every parameter and buffer of a checkpoint has exactly one place in the published format."""
    model = shadow(name)
    ours = [n for m in weight_maps(model.config) for n in m.ours]
    assert sorted(ours) == sorted(model.state_dict())


@pytest.mark.parametrize("name", by_families([*PARAMETERS]))
def test_numbers_of_parameters(name):
    assert shadow(name).n_parameters() == PARAMETERS[name]


@pytest.mark.parametrize("name", by_families([*ROUNDED]))
def test_rounded_numbers_of_parameters(name):
    assert shadow(name).n_parameters() == pytest.approx(ROUNDED[name], rel=0.01)


@pytest.mark.parametrize(
    ("recipe", "name"), [("sudoku-9x9-trm", "trm-sudoku"), ("maze-30x30-trm", "trm-maze"), ("arc-trm", "trm-arc")]
)
def test_recipes_spell_out_the_published_models(recipe, name):
    made = {"task.path": None, "task.n_made": 5, "task.n_augmentations": 3}
    small = made if recipe == "arc-trm" else {}
    spelt, published = (read_experiment(recipe, {**small, **model}).build().model for model in ({}, {"model": name}))
    with torch.device("meta"):
        shapes = [{k: v.shape for k, v in zoo.create_model(m).state_dict().items()} for m in (spelt, published)]
    assert shapes[0] == shapes[1]
    ways = ("norm", "norm_eps", "placement", "positions", "embedding_scale", "causal")
    assert [getattr(spelt, k) for k in ways] == [getattr(published, k) for k in ways]
    assert spelt.recursion.changed() | {"puzzle_width": 512} == published.recursion.changed()
