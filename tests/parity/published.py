"""Whole models of transformers against ours: logits in one pass, in chunks and token by token, gradients, and back."""

from __future__ import annotations

import copy
import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.core_model_loading import revert_weight_conversion

import zoo
from zoo.interop.hf import CONFIG, INDEX, WEIGHTS, published_weights, weight_maps
from zoo.models.families import families

LOGITS, GRADIENTS = 1e-4, 1e-3


def perturbed(model: nn.Module, seed: int = 0, scale: float = 0.1, unpublished: str = "$^") -> nn.Module:
    """The model in eval mode with noise on every parameter and floating buffer of its checkpoint, none at its init, but
    for those that `unpublished` matches, which follow from the config."""
    generator = torch.Generator().manual_seed(seed)
    weights = {id(t): (n, t) for n, t in model.state_dict(keep_vars=True).items()}
    with torch.no_grad():
        for name, tensor in weights.values():
            if tensor.is_floating_point() and not re.search(unpublished, name):
                tensor += scale * torch.randn(tensor.shape, generator=generator)
    return model.eval()


def differences(
    theirs: Any,
    tmp_path: Path,
    *,
    length: int = 37,
    cuts: tuple[int, ...] = (1, 13, 14, 30),
    unpublished: str = "$^",
    recut: str = "$^",
) -> dict[str, float]:
    """Hold a model of transformers (a perturbed one, in float32) against `zoo.from_hf` of it.

    Asserts what has to be exact: that the source is left alone, and that its checkpoint folder, what `to_hf` makes of
    ours, and what transformers reads from that are all the same, bit for bit.

    Args:
        unpublished: a pattern of weights that transformers writes, and wants back, but published checkpoints lack.
        recut: a pattern of weights that transformers joins when it reads, and cuts elsewhere when it writes.

    Returns:
        The largest differences: of logits (absolute) in one pass, in chunks and token by token, and of the gradients
        of the loss (of a tensor, over its largest gradient).
    """
    before = copy.deepcopy(theirs.state_dict())
    ours = zoo.from_hf(theirs)
    assert all(torch.equal(before[name], t) for name, t in theirs.state_dict().items())
    tokens = torch.randint(ours.config.vocab_size, (2, length), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():  # the kernels that libraries keep for training may be less exact
        expected = theirs(tokens, use_cache=False).logits
    assert expected.std() > 0.1  # else the bounds say little
    logits, _ = ours(tokens)
    found = {
        "one pass": (logits - expected).abs().max().item(),
        "gradients": _gradients(ours, theirs, tokens, logits),
    }
    with torch.no_grad():
        found["chunks"] = (_in_pieces(ours, tokens, cuts) - expected).abs().max().item()
        found["steps"] = (_in_pieces(ours, tokens, tuple(range(1, length))) - expected).abs().max().item()
    _same_on_disk(ours, theirs, tmp_path, re.compile(unpublished), re.compile(recut))
    return found


def check(theirs: Any, tmp_path: Path, **options: Any) -> None:
    """`differences` within the bounds that every family has to keep."""
    found = differences(theirs, tmp_path, **options)
    print({name: f"{value:.1e}" for name, value in found.items()})
    _record(type(theirs).__name__, theirs.config.to_dict(), found)
    assert all(found[name] < LOGITS for name in ("one pass", "chunks", "steps")), found
    assert found["gradients"] < GRADIENTS, found


def _record(architecture: str, config: dict[str, Any], found: dict[str, float]) -> None:
    """Add a line to the file that PARITY_RECORD names, for `benchmarks/studies/families.py`."""
    if path := os.environ.get("PARITY_RECORD"):
        family = families.of_config({**config, "architectures": [architecture]}).name
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps({"family": family, "architecture": architecture, **found}) + "\n")


def check_config(
    config: dict[str, Any],
    tmp_path: Path,
    *,
    recut: str = "$^",
    unpublished: str = "$^",
    attention: str | None = None,
) -> None:
    """A random model of `config`, a config.json as people find it, read from a folder that holds that one: the logits
    are those of transformers, and `to_hf` writes the same config and weights. `recut` and `unpublished` are as in
    `differences`; `attention` is theirs, such as "eager"."""
    folder, back = tmp_path / "found", tmp_path / "back"
    folder.mkdir()
    (folder / CONFIG).write_text(json.dumps(config))
    theirs = AutoModelForCausalLM.from_config(
        AutoConfig.from_pretrained(folder), dtype=torch.float32, attn_implementation=attention
    )
    perturbed(theirs, unpublished=unpublished).save_pretrained(folder)
    (folder / CONFIG).write_text(json.dumps(config))
    ours = zoo.from_hf(folder)
    tokens = torch.randint(ours.config.vocab_size, (2, 37), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        difference = (ours(tokens)[0] - theirs(tokens, use_cache=False).logits).abs().max()
    assert difference < LOGITS
    zoo.to_hf(ours, back)
    assert json.loads((back / CONFIG).read_text()) == config
    saved = {n: t for n, t in load_file(folder / WEIGHTS).items() if not re.search(unpublished, n)}
    _same_weights(ours, load_file(back / WEIGHTS), saved, re.compile(recut))


def refusal(config: dict[str, Any]) -> str:
    """What is said about a config that is not supported."""
    with pytest.raises(zoo.UsageError) as error:
        families.of_config(config).model_options(config)
    return str(error.value)


def _in_pieces(model: Any, tokens: Tensor, cuts: tuple[int, ...]) -> Tensor:
    state, pieces = model.init_state(len(tokens)), []
    for piece in tokens.tensor_split(list(cuts), 1):
        logits, state = model(piece, state)
        pieces.append(logits)
    return torch.cat(pieces, 1)


def _gradients(ours: Any, theirs: Any, tokens: Tensor, logits: Tensor) -> float:
    """The largest difference of a gradient, over the largest one of its tensor."""
    for output in (logits, theirs(tokens, use_cache=False).logits):
        F.cross_entropy(output[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).backward()
    in_memory = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in theirs.named_parameters()}
    buffers = {n: torch.zeros_like(b) for n, b in theirs.state_dict().items() if n not in in_memory}
    given = revert_weight_conversion(theirs, {**buffers, **in_memory})
    own = dict(ours.named_parameters())
    worst = 0.0
    for m in (m.found_in(given) for m in weight_maps(ours.config)):
        for name, theirs_gradient in zip(m.ours, m.read(*(given[n] for n in m.theirs)), strict=True):
            if name in own:
                gradient = own[name].grad
                gradient = torch.zeros_like(own[name]) if gradient is None else gradient
                size = theirs_gradient.abs().max().clamp(min=1e-6)
                worst = max(worst, ((gradient - theirs_gradient).abs().max() / size).item())
    return worst


def _same_on_disk(ours: Any, theirs: Any, tmp_path: Path, unpublished: re.Pattern[str], recut: re.Pattern[str]) -> None:
    theirs.save_pretrained(tmp_path / "theirs")
    saved = load_file(tmp_path / "theirs" / "model.safetensors")
    extra = {name: saved.pop(name) for name in list(saved) if unpublished.search(name)}
    _same_weights(ours, published_weights(ours), saved, recut)
    from_folder = zoo.from_hf(tmp_path / "theirs")
    assert from_folder.config.pattern == ours.config.pattern
    read = from_folder.state_dict()
    assert all(torch.equal(tensor, read[name]) for name, tensor in ours.state_dict().items())
    zoo.to_hf(ours, tmp_path / "ours", shard_bytes=20_000)
    if extra:
        _added(extra, tmp_path / "ours")
    again = type(theirs).from_pretrained(tmp_path / "ours")
    state = again.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in theirs.state_dict().items())


def _same_weights(ours: Any, written: dict[str, Tensor], saved: dict[str, Tensor], recut: re.Pattern[str]) -> None:
    """What we have written is what transformers has saved, maybe under the other names that it has for some."""
    maps = weight_maps(ours.config)
    names = {n: other for m in maps for n, other in zip(m.theirs, m.found_in(saved).theirs, strict=True)}
    back = {names[name]: tensor for name, tensor in written.items()}
    assert back.keys() == saved.keys()
    assert all(torch.equal(back[name], saved[name]) for name in back if not recut.search(name))


def _added(weights: dict[str, Tensor], folder: Path) -> None:
    """Put more weights into a sharded checkpoint."""
    save_file(weights, folder / "more.safetensors", metadata={"format": "pt"})
    path = folder / INDEX
    index = json.loads(path.read_text())
    index["weight_map"] |= dict.fromkeys(weights, "more.safetensors")
    path.write_text(json.dumps(index))
