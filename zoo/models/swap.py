"""Models with other words in their pattern."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from zoo.core.errors import UsageError
from zoo.models.config import ModelConfig
from zoo.models.create import create_model, fitted, is_family, read_spec
from zoo.models.ends import Ends
from zoo.models.transfer import check_plain, plan, put, words_of
from zoo.pattern import Pattern, from_data, swap_each
from zoo.pattern import swap as swap_words


def swap(spec: Any, words: Mapping[str, str], *, layers: Iterable[int] | None = None) -> Any:
    """Replace words in a model, a config or a pattern: `swap("gqa mlp", {"gqa": "mla"})`.

    Args:
        spec: a model, which gives a new model that keeps the weights of every other word; a pattern as text or data,
            which gives text, or as a `Pattern`, which gives one; a `ModelConfig`, a mapping of model options, or a
            family-size (`"llama3-tiny"`), which give a `ModelConfig`. That of a family keeps `published`, which says
            where it came from; `zoo.to_hf` no longer writes such a model, and names what differs. A budget in
            the mapping, such as `n_parameters`, sets the width of the new model.
        words: names of words, and for each the word that replaces it, with options. Step options are kept.
        layers: numbers of the layers to change, by default all. A layer is a residual step with a sequence mixer and
            the channel mixers that follow it; layers are numbered from 0 in reading order with repeats written out,
            and -1 is the last, as in Python. Those of a second network of a recursive model come after the first's.

    Returns:
        For a model: a new model with the same bits in every weight that it keeps, on the same device, in the same mode.
        All weights of a replaced word are new, in the dtype of the embedding. The attribute `swapped`, a
        `zoo.models.Transfer`, lists the kept and the new weights; its text is one line. The given model is unchanged.

    Raises:
        UsageError: a name or a layer that is not in the pattern, an unknown replacement, or a model with adapters.
    """
    if isinstance(spec, Ends):
        return _swap_model(spec, words, layers)
    if isinstance(spec, nn.Module):
        raise UsageError(f"swap takes a model of the zoo, a config or a pattern, not a {type(spec).__name__}.")
    if is_family(spec) or (isinstance(spec, Mapping) and {"pattern", "family"} & spec.keys()):
        config, budget = read_spec(spec)
        swapped = swap(config, words, layers=layers)
        return swapped if budget is None else fitted(swapped, budget)
    if isinstance(spec, ModelConfig):
        return _swap_config(spec, words, layers)
    if isinstance(spec, Pattern):
        return swap_words(spec, words, layers)
    return str(swap_words(from_data(spec), words, layers))


def _swap_config(config: ModelConfig, words: Mapping[str, str], layers: Iterable[int] | None) -> ModelConfig:
    recursion = config.recursion
    outer = None if recursion is None else recursion.outer
    patterns = [from_data(text) for text in (config.pattern, outer) if text is not None]
    new = [str(pattern) for pattern in swap_each(patterns, words, layers)]
    changed = {**config.changed(), "pattern": new[0]}
    if recursion is not None and outer is not None:
        changed["recursion"] = {**recursion.changed(), "outer": new[1]}
    return ModelConfig(**changed)


def _swap_model(model: Ends, words: Mapping[str, str], layers: Iterable[int] | None) -> Ends:
    """A model with other words and the weights of the old one in all that is not replaced."""
    check_plain(model, "swap")
    new = create_model(_swap_config(model.config, words, layers))
    before, after = words_of(model), words_of(new)
    replaced = [n for n, m in after.items() if type(m) is not type(before[n]) or m.config != before[n].config]
    old, dtype = model.state_dict(), model.compute_dtype()
    transfer, _ = plan(model, new, lambda name: not any(name.startswith(f"{place}.") for place in replaced))
    stays = set(transfer.kept)
    trained = {name: p.requires_grad for name, p in model.named_parameters()}
    for name, tensor in (*new.named_parameters(), *new.named_buffers()):
        if tensor.is_floating_point():
            tensor.data = tensor.data.to(old[name].dtype if name in stays else dtype)
        if isinstance(tensor, nn.Parameter) and name in stays:
            tensor.requires_grad_(trained[name])
    new = new.to(next(model.parameters()).device)
    put(old, new, transfer)
    new.swapped = transfer
    return new.train(model.training)
