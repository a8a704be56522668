"""How our weights lie in published checkpoints: rearrangements with exact inverses, so that no bit is lost either way.

A map moves numbers and never changes them. A factor or an offset that a published model applies is an option of ours
(`embedding_scale`, `norm="rmsnorm_zero_centred"`), not arithmetic on weights; gradients then follow the same maps. One
family is an exception and says why, `mdlm`.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Map:
    """Tensors of ours that are made of tensors of theirs.

    Attributes:
        ours, theirs: names.
        read: tensors of theirs, in order, to those of ours.
        write: the inverse.
        copies: names under which a checkpoint may hold `theirs[0]` again (tied embeddings); they have to be equal.
        forms: maps of the same tensors of ours from others of theirs, which some checkpoints have in place of `theirs`.
        recut: some checkpoints cut `theirs` in other lengths of the same sum.
    """

    ours: tuple[str, ...]
    theirs: tuple[str, ...]
    read: Callable[..., Sequence[Tensor]]
    write: Callable[..., Sequence[Tensor]]
    copies: tuple[str, ...] = ()
    forms: tuple[Map, ...] = ()
    recut: bool = False

    def found_in(self, names: Container[str]) -> Map:
        """This map, or that of its forms whose tensors of theirs are among `names`."""
        if self.theirs[0] in names:
            return self
        return next((form for form in self.forms if form.theirs[0] in names), self)


def same(ours: str, theirs: str, *, copies: Sequence[str] = ()) -> Map:
    """One tensor under two names."""
    return Map((ours,), (theirs,), lambda t: (t,), lambda t: (t,), tuple(copies))


def reshaped(ours: str, theirs: str, our_shape: Sequence[int], their_shape: Sequence[int]) -> Map:
    """The same numbers in the same order, in another shape."""
    return Map((ours,), (theirs,), lambda t: (t.reshape(our_shape),), lambda t: (t.reshape(their_shape),))


def transposed(ours: str, theirs: str, dim0: int = -2, dim1: int = -1, *, index: Tensor | None = None) -> Map:
    """Two axes exchanged; with `index`, ours[i] along `dim0` is then row `index[i]`, as in `joined`."""
    m = joined(ours, [theirs], dim=dim0, index=index)
    swap = lambda t: t.transpose(dim0, dim1)  # noqa: E731
    return replace(m, read=lambda t: m.read(swap(t)), write=lambda t: [swap(each) for each in m.write(t)])


def joined(
    ours: str, theirs: Sequence[str], sizes: Sequence[int] | None = None, *, dim: int = 0, index: Tensor | None = None
) -> Map:
    """Ours is theirs end to end along `dim`.

    Args:
        sizes: their lengths along `dim`; equal where not given.
        index: ours[i] is row `index[i]` of theirs, once joined: a permutation along `dim`.
    """

    def read(*parts: Tensor) -> tuple[Tensor]:
        whole = parts[0] if len(parts) == 1 else torch.cat(parts, dim)
        return (whole if index is None else whole.index_select(dim, index.to(whole.device)),)

    def write(whole: Tensor) -> Sequence[Tensor]:
        whole = whole if index is None else whole.index_select(dim, index.argsort().to(whole.device))
        return whole.chunk(len(theirs), dim) if sizes is None else whole.split(list(sizes), dim)

    return Map((ours,), tuple(theirs), read, write)


def parts(ours: Sequence[str], theirs: str, sizes: Sequence[int] | None = None, *, dim: int = 0) -> Map:
    """Theirs is ours end to end along `dim`."""
    whole = joined(theirs, ours, sizes, dim=dim)
    return Map(whole.theirs, whole.ours, whole.write, whole.read)


def stacked(ours: str, theirs: Sequence[str]) -> Map:
    """Ours has theirs one behind the other along a first axis of its own."""
    return Map((ours,), tuple(theirs), lambda *each: (torch.stack(each),), lambda whole: whole.unbind(0))


def stacked_pairs(ours: str, first: Sequence[str], second: Sequence[str]) -> Map:
    """Ours[i] is first[i] and second[i] end to end along the first axis of theirs: experts' gates and inputs."""
    n = len(first)

    def read(*each: Tensor) -> tuple[Tensor]:
        return (torch.cat([t for pair in zip(each[:n], each[n:], strict=True) for t in pair]).unflatten(0, (n, -1)),)

    def write(whole: Tensor) -> Sequence[Tensor]:
        one, two = whole.chunk(2, 1)
        return [*one.unbind(0), *two.unbind(0)]

    return Map((ours,), (*first, *second), read, write)


def within(ours: str, theirs: str, maps: Iterable[Map]) -> Iterable[Map]:
    """The same maps with prefixes in front of all names."""
    for m in maps:
        yield renamed(m, lambda name: theirs + name, lambda name: ours + name)


def also_named(maps: Iterable[Map], name: Callable[[str], str]) -> Iterator[Map]:
    """The same maps, which also read checkpoints whose names are changed by `name`."""
    for m in maps:
        yield replace(m, forms=(*m.forms, *(renamed(replace(form, forms=()), name) for form in (m, *m.forms))))


def renamed(m: Map, name: Callable[[str], str], ours: Callable[[str], str] = str) -> Map:
    """The same map with other names of theirs, and of `ours` where that is given."""
    theirs, copies = (tuple(map(name, names)) for names in (m.theirs, m.copies))
    forms = tuple(renamed(form, name, ours) for form in m.forms)
    return replace(m, ours=tuple(map(ours, m.ours)), theirs=theirs, copies=copies, forms=forms)
