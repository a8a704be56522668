"""The first weights of a training that starts from other weights: `init=...`, or a model object."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from zoo.core.errors import UsageError
from zoo.core.run_files import CHECKPOINTS
from zoo.interop.hf import from_hf
from zoo.models.config import ModelConfig
from zoo.models.ends import Ends
from zoo.models.transfer import VOCABULARY, Misfit, check_plain, outline, plan, put
from zoo.models.weights import Transfer, grouped
from zoo.training import checkpoints
from zoo.training.init import Init
from zoo.training.loading import load_from
from zoo.training.options import Experiment
from zoo.training.saving import load_model
from zoo.training.sources import kind_of, same_source


class Start(NamedTuple):
    """Weights that a training starts from.

    Attributes:
        source: the folder that they are from, as a person reads it.
        weights: by name, on the CPU.
        transfer: what becomes of each in the model that is trained.
    """

    source: str
    weights: Mapping[str, Tensor]
    transfer: Transfer

    def into(self, model: nn.Module) -> None:
        """Put the weights into a model."""
        put(self.weights, model, self.transfer)

    def data(self) -> dict[str, Any]:
        """What the run folder records."""
        return {"source": self.source, **{k: list(names) for k, names in self.transfer._asdict().items()}}


def open_model(path: str | Path, which: str = "best") -> tuple[Ends, Path]:
    """The model of a run, of a saved or of a published folder, on the CPU, and the folder that it was read from.

    Raises:
        UsageError: no such folder, or one that cannot be read.
    """
    kind = kind_of(path)
    if kind == "run":
        return load_from(path, which)
    if which != "best":
        raise UsageError(f"which={which!r} chooses from a run: {path} holds one model.")
    return (load_model(Path(path)) if kind == "saved" else from_hf(path)), Path(path)


def check_object(model: Any) -> Ends:
    """A model object that a training can start from.

    Raises:
        UsageError: it is no model of the zoo, has frozen weights, or more weights than its config says.
    """
    if not isinstance(model, Ends):
        told = "a model of create_model, swap, from_hf or load, or options of a model"
        raise UsageError(f"model: a {type(model).__name__} cannot be trained; zoo.train takes {told}.")
    check_plain(model, "model")
    if frozen := [name for name, p in model.named_parameters() if not p.requires_grad]:
        told = "zoo.train trains all weights: set requires_grad of them, or train in a loop of your own"
        raise UsageError(f"model: {len(frozen)} weights are frozen ({grouped(frozen)}); {told}.")
    return model


def digest_of(weights: Mapping[str, Tensor]) -> str:
    """The digest of names, types, shapes and values of weights."""
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(weights.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        plain = tensor.detach().cpu().contiguous().reshape(-1)
        if plain.numel():
            digest.update(plain.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def prepare(
    experiment: Experiment, config: ModelConfig, model: Ends | None, *, fresh: bool, trains: str = ""
) -> tuple[Experiment, Start | None]:
    """What a training starts from, and its experiment with the digest of these weights.

    Nothing is read for a training that has begun: its checkpoints have all weights.

    Args:
        experiment: with `init`.
        config: of the model that is trained.
        model: the object to start from, where there is no folder.
        fresh: whether the run in the folder is about to be deleted.
        trains: see `planned`.

    Raises:
        UsageError: a source that is not there, damaged or changed; weights that do not fit.
    """
    init = experiment.init
    assert init is not None
    folder = experiment.folder / CHECKPOINTS
    if not fresh and checkpoints.steps(folder):
        begun = (checkpoints.config_of(folder) or {}).get("init")
        same = same_source(begun, init.model_dump())
        if model is not None:
            init = init.model_copy(update={"digest": digest_of(model.state_dict())})
        elif init.digest is None and same and isinstance(begun, Mapping):
            init = init.model_copy(update={"digest": begun.get("digest")})
        return experiment.model_copy(update={"init": init}), None
    if model is None:
        if init.source is None:
            told = "give the model again: zoo.train(..., model=model), or init=FOLDER"
            raise UsageError(f"{experiment.folder} was to start from a model object and has no checkpoint: {told}.")
        model, found = open_model(init.source, init.which)
    else:
        found = None
    weights = {name: tensor.detach().cpu() for name, tensor in model.state_dict().items()}
    digest = digest_of(weights)
    if init.digest not in (None, digest):
        told = "init.digest=null takes those that are there now"
        raise UsageError(f"The weights of {init.source} are not those that were recorded (init.digest): {told}.")
    source = f"a {type(model).__name__} object" if found is None else str(found)
    transfer = planned(init, model, config, trains)
    return experiment.model_copy(update={"init": init.model_copy(update={"digest": digest})}), Start(
        source, weights, transfer
    )


def planned(init: Init, source: Ends, config: ModelConfig, trains: str = "") -> Transfer:
    """What becomes of the weights of a source in a model of this config.

    Args:
        init: the options.
        source: the model that the weights are from.
        config: of the model that is trained.
        trains: what the names of the weights begin with that are trained alone, if they are. Those that the source does
            not have start as in any training.

    Raises:
        UsageError: weights do not fit and are to be refused then, a pattern matches none, or nothing is kept.
    """
    target = outline(config)
    init.check_patterns([*dict.fromkeys([*target.state_dict(), *source.state_dict()])])
    transfer, misfits = plan(source, target, init.takes, resize=init.resize_vocab)
    if trains:
        theirs = source.state_dict()
        misfits = [each for each in misfits if not each.name.startswith(trains) or each.name in theirs]
    what = "the model object" if init.source is None else f"init={init.source}"
    if misfits and init.on_mismatch == "refuse":
        raise UsageError(f"{what} does not fit the model: {_told(misfits, init, config)}.")
    if not transfer.kept:
        raise UsageError(f"{what}: no weight of it would be kept; init=null starts from new weights.")
    return transfer


def _told(misfits: Sequence[Misfit], init: Init, config: ModelConfig) -> str:
    reasons: dict[str, list[str]] = {}
    for name, why in misfits:
        reasons.setdefault(why, []).append(name)
    told = [f"{grouped(names, 2)} {'is' if len(names) == 1 else 'are'} {why}" for why, names in reasons.items()]
    more = f"; and {len(told) - 3} more" if len(told) > 3 else ""
    tokens = config.inputs is None
    resizes = tokens and not init.resize_vocab and all(name in VOCABULARY for name, _ in misfits)
    fix = "init.resize_vocab=true resizes them" if resizes else "init.on_mismatch=fresh takes new weights there"
    return f"{'; '.join(told[:3])}{more}; {fix}, init.skip=[...] names weights not to take"


__all__ = ["Start", "check_object", "digest_of", "open_model", "planned", "prepare"]
