"""What readers of published weights share: files that are not trusted, and models filled by weight maps."""

from __future__ import annotations

import functools
import pickletools
import warnings
import zipfile
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import IO

import torch
from torch import Tensor, nn

from zoo.core.errors import UsageError, closest
from zoo.core.memory import gib, total_memory
from zoo.core.readers import regular, shown, unreadable
from zoo.models.config import ModelConfig
from zoo.models.create import create_model
from zoo.models.ends import Ends
from zoo.models.published.maps import Map
from zoo.models.uninitialised import Uninitialised

MOST_STEPS = 8_000_000
"""Of the pickle of a file; one weight takes some 40."""
LEGACY_PICKLES = 5
"""In a file of `torch.save` before version 1.6: a mark, a version, the system, the weights, and their names."""
MOST_SHARED = 4
"""How often over a file may hold its own bytes, for weights that are tied."""
LONGEST_SIDE = 2**25
"""Of a weight that an untrusted config asks for; maps list the rows of some."""
MOST_WEIGHTS = 2**44
"""Bytes of a file of weights, of which no more than its tensors is read into memory."""
FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def unpickle(path: Path) -> dict[str, Tensor]:
    """The tensors of a file that `torch.save` wrote, by name; nothing else in it is run or kept.

    No more memory is taken than the file has bytes: what it would expand to is known before it is read.

    Raises:
        UsageError: it cannot be read, holds anything else, or would expand.
    """
    size = regular(path, most=MOST_WEIGHTS).stat().st_size
    try:
        mapped = zipfile.is_zipfile(path)  # as torch.save writes since its version 1.6
        if mapped:
            with zipfile.ZipFile(path) as archive:
                _refuse_packed(path, archive.infolist(), size)
                for entry in archive.infolist():
                    if entry.filename.endswith(".pkl"):
                        with archive.open(entry) as stream:
                            _refuse_long(path, stream, 1)
        else:
            with open(path, "rb") as stream:
                _refuse_long(path, stream, LEGACY_PICKLES)
        with warnings.catch_warnings(action="ignore"):  # what is wrong is told in one line
            weights = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except UsageError:
        raise
    except Exception as error:  # whatever a damaged or hostile file raises
        raise unreadable(path, (str(error).splitlines() or [type(error).__name__])[0]) from None
    if not isinstance(weights, Mapping) or not all(map(_is_plain, weights.values())):
        raise UsageError(f"{shown(path)} is not a mapping of names to dense tensors.")
    if (expanded := sum(t.nbytes for t in weights.values())) > MOST_SHARED * size:  # views of a few numbers
        raise UsageError(f"{shown(path)} has {size:,} bytes and would expand to {expanded:,}.")
    return dict(weights)


def _refuse_long(path: Path, stream: IO[bytes], pickles: int) -> None:
    """Raise if these consecutive pickles have more steps than weights need: each step may create an object."""
    steps = chain.from_iterable(pickletools.genops(stream) for _ in range(pickles))
    if sum(1 for _ in islice(steps, MOST_STEPS + 1)) > MOST_STEPS:
        raise UsageError(f"{shown(path)} cannot be read: its pickle has more than {MOST_STEPS:,} steps.")


def _refuse_packed(path: Path, entries: Iterable[zipfile.ZipInfo], size: int) -> None:
    """Raise where an archive is compressed, which `torch.save` never does, or tells of more bytes than it has."""
    held = 0
    for entry in entries:
        held += entry.file_size
        if entry.compress_type != zipfile.ZIP_STORED or held > size:
            raise UsageError(
                f"{shown(path)} cannot be read: it is a compressed archive of more than {held:,} bytes, and torch.save"
                " writes none."
            )


def _is_plain(value: object) -> bool:
    return isinstance(value, Tensor) and value.layout is torch.strided and not value.is_meta


def hollow(config: ModelConfig) -> Ends:
    """A model whose parameters and buffers have shapes and no memory yet, for `fill`.

    Raises:
        UsageError: sizes beyond what tensors can have.
    """
    try:
        with torch.device("meta"), Uninitialised():
            model = create_model(config)
    except UsageError:
        raise
    except (ArithmeticError, MemoryError, RuntimeError, TypeError, ValueError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UsageError(f"A model of these sizes cannot be made: {reason}") from error
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if max(tensor.shape, default=0) > LONGEST_SIDE:
            told = f"{name} would be {tuple(tensor.shape)}; no side may be longer than {LONGEST_SIDE:,}"
            raise UsageError(f"A model of these sizes cannot be made: {told}.")
    return model


def fill(
    model: Ends,
    maps: Iterable[Map],
    weights: Mapping[str, Tensor],
    name: str,
    *,
    shapes: Mapping[str, Tensor] | None = None,
    left_aside: Collection[str] = (),
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
) -> None:
    """Put weights where they belong in a hollow model. Nothing is allocated before all names and shapes are right, and
    then one tensor at a time is in memory beside the model, or those of one map whose parts are not in order in ours.

    Args:
        weights: by their published names; they are copied.
        name: of the architecture, for messages.
        shapes: the same on the meta device, where `weights` takes time to look at.
        left_aside: names of weights that are not needed.
        dtype: of all weights; by default each keeps its own.
        device: of all weights; on "meta" only their names and shapes are looked at.

    Raises:
        UsageError: weights that are missing, not expected, of another shape (all of them are listed), quantised, or
            tied by the config and not equal, or more than the device's memory.
    """
    maps = [m.found_in(weights) for m in maps]
    needed = [n for m in maps for n in m.theirs]
    known = {*needed, *left_aside, *(n for m in maps for n in m.copies)}
    missing, unexpected = [n for n in needed if n not in weights], [n for n in weights if n not in known]
    if missing or unexpected:
        told = [f"{len(names)} weights are {what}: {some(names)}" for what, names in _faults(missing, unexpected)]
        raise UsageError(f"This is no {name} of these sizes: {'; '.join(told)}.")
    check_complete(model, maps, name)
    slots = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    given = {n: t.to("meta") for n, t in weights.items()} if shapes is None else shapes
    _check(maps, slots, given)
    hollow_too = torch.device(device).type == "meta"
    if hollow_too:
        weights = given
    else:
        _check_room(sum(given[n].numel() * (dtype or given[n].dtype).itemsize for n in needed), name, device, dtype)
    for m in maps:
        copies = [copy for copy in m.copies if copy in weights and not hollow_too]
        parts = {n: weights[n] for n in m.theirs} if copies else weights  # each read once, though it is compared too
        for copy in copies:
            if not torch.equal(weights[copy], parts[m.theirs[0]]):
                raise UsageError(f"{copy} is not {m.theirs[0]}, though the config ties them.")
        expected = [slots.pop(slot) for slot in m.ours]
        made = _read_in_place(m, expected, parts, given, dtype, device) or _read(m, parts, dtype, device)
        for slot, own in zip(m.ours, made, strict=True):
            _put(model, slot, own)
    for slot, tensor in slots.items():  # counters of ours, which start at zero
        _put(model, slot, torch.zeros_like(tensor, device=device))


def _check_room(n_bytes: int, name: str, device: torch.device | str, dtype: torch.dtype | None) -> None:
    """Refuse weights that take more bytes than the device has."""
    kind = torch.device(device).type
    room = torch.cuda.get_device_properties(device).total_memory if kind == "cuda" else total_memory()
    if 0 < room < n_bytes:
        smaller = "" if dtype in (torch.bfloat16, torch.float16) else ", dtype=torch.bfloat16 takes 2 bytes a weight"
        told = f'The weights of this {name} take {gib(n_bytes)}, and {kind} has {gib(room)}: device="meta" gives the'
        raise UsageError(f"{told} model without numbers, its names and shapes checked{smaller}.")


def _read_in_place(
    m: Map,
    expected: Sequence[Tensor],
    weights: Mapping[str, Tensor],
    given: Mapping[str, Tensor],
    dtype: torch.dtype | None,
    device: torch.device | str,
) -> list[Tensor] | None:
    """The tensors of a map, each of theirs copied to its place in ours; None if theirs are not plain parts of ours."""
    common = dtype or functools.reduce(torch.promote_types, (given[n].dtype for n in m.theirs))
    hollow_parts = m.write(*expected)
    whole = sum(t.numel() for t in expected) == sum(part.numel() for part in hollow_parts)
    if not whole or [part.shape for part in hollow_parts] != [given[n].shape for n in m.theirs]:
        return None
    if not all(any(part._base is t or part is t for t in expected) for part in hollow_parts):
        return None
    own = [torch.empty(t.shape, dtype=common, device=device) for t in expected]
    for name, place in zip(m.theirs, m.write(*own), strict=True):
        place.copy_(weights[name].detach())
    return own


def _read(
    m: Map, weights: Mapping[str, Tensor], dtype: torch.dtype | None, device: torch.device | str
) -> Iterator[Tensor]:
    """The tensors of a map, made of all of theirs at once."""
    read = [weights[n] for n in m.theirs]
    held = {t.untyped_storage().data_ptr() for t in read}
    for tensor in m.read(*read):
        own = tensor.detach().to(device, dtype or tensor.dtype).contiguous()
        yield own.clone() if own.untyped_storage().data_ptr() in held else own


def check_complete(model: nn.Module, maps: Collection[Map], name: str) -> None:
    """Check that every weight of a model has its place in a checkpoint, and one alone.

    Raises:
        UsageError: the maps of the family leave some out, place one twice, or name one that the model has not.
    """
    counts = Counter(slot for m in maps for slot in m.ours)
    placed, own = set(counts), {n for n, _ in (*model.named_parameters(), *model.named_buffers())}  # a shared one once
    if strange := [slot for slot in placed if slot not in own]:
        likely = closest(strange[0], own - placed)
        told = f"for {some(strange)}, which the model does not have"
        raise UsageError(f"The family of {name} has a map in its `weights` {told}.{likely}")
    both = counts, Counter(n for m in maps for n in m.theirs)  # the same name may stand on both sides
    if twice := [name for side in both for name, n in side.items() if n > 1]:
        raise UsageError(f"The family of {name} has several maps in its `weights` for {some(twice)}.")
    if left := sorted((own & model.state_dict().keys()) - placed):
        raise UsageError(f"The family of {name} has no map in its `weights` for {some(left)}.")


def _check(maps: Sequence[Map], slots: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> None:
    """Raise where tensors of the shapes `given`, on the meta device, are not what fills the slots."""
    wrong: list[str] = []
    for m in maps:
        read = [given[n] for n in m.theirs]
        for n, tensor in zip(m.theirs, read, strict=True):
            if tensor.dtype not in FLOATS:
                raise UsageError(f"{shown(n)} is {tensor.dtype}: quantised weights are not supported.")
        expected = [slots[n] for n in m.ours]
        try:
            fits = [t.shape for t in m.read(*read)] == [t.shape for t in expected]
            back = m.write(*expected)  # parts of other sizes may have the right sum
            same_parts = m.recut or len(back) != len(read) or [t.shape for t in back] == [t.shape for t in read]
            fits = fits and same_parts
        except (RuntimeError, IndexError, TypeError, ValueError):
            fits = False
        if not fits:
            theirs = ", ".join(f"{n} {tuple(t.shape)}" for n, t in islice(zip(m.theirs, read, strict=True), 3))
            wrong.append(f"{theirs} for {', '.join(f'{n} {tuple(slots[n].shape)}' for n in m.ours)}")
    if wrong:
        raise UsageError(f"{len(wrong)} weights have other shapes than the config says: {some(wrong)}.")


def _put(model: nn.Module, slot: str, tensor: Tensor) -> None:
    """Give a parameter, or a buffer, of the model its values."""
    owner, _, name = slot.rpartition(".")
    module = model.get_submodule(owner)
    old = getattr(module, name)
    if isinstance(old, nn.Parameter):
        tensor = nn.Parameter(tensor, requires_grad=old.requires_grad)
    setattr(module, name, tensor)


def written(model: nn.Module, maps: Iterable[Map]) -> Iterator[tuple[str, Tensor]]:
    """The published names of a model's weights, each with its tensor, on the CPU; no two share memory."""
    ours = model.state_dict()
    for m in maps:
        for name, tensor in _taken_apart(m, ours):
            yield name, tensor.detach().to("cpu").clone(memory_format=torch.contiguous_format)


def sizes(model: nn.Module, maps: Iterable[Map]) -> dict[str, int]:
    """Bytes of every weight, by published name, in the order of `written`."""
    ours = {name: tensor.to("meta") for name, tensor in model.state_dict().items()}
    return {n: t.nbytes for m in maps for n, t in _taken_apart(m, ours)}


def _taken_apart(m: Map, ours: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """The published names of a map, each with its tensor.

    Raises:
        UsageError: the map is of other sizes than the weights.
    """
    given = [ours[name] for name in m.ours]
    try:
        found = m.write(*given)
        if len(found) == len(m.theirs):
            return zip(m.theirs, found, strict=True)
        why = f"it gives {len(found)} tensors"
    except (RuntimeError, IndexError, TypeError, ValueError) as error:
        why = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
    shapes = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in zip(m.ours, given, strict=True))
    raise UsageError(f"The map in `weights` from {shapes} to {some(m.theirs)} does not fit: {why}.")


def _faults(missing: list[str], unexpected: list[str]) -> Iterator[tuple[str, list[str]]]:
    if missing:
        yield "missing", missing
    if unexpected:
        yield "not expected", unexpected


def some(names: Sequence[str], most: int = 20) -> str:
    """The first names, and how many more there are."""
    return ", ".join(map(shown, names[:most])) + (f" and {len(names) - most} more" if len(names) > most else "")
