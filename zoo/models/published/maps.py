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
        others: names that some checkpoints have in place of `theirs`; `read` takes either.
        recut: some checkpoints cut `theirs` in other lengths of the same sum.
    """

    ours: tuple[str, ...]
    theirs: tuple[str, ...]
    read: Callable[..., Sequence[Tensor]]
    write: Callable[..., Sequence[Tensor]]
    copies: tuple[str, ...] = ()
    others: tuple[str, ...] = ()
    recut: bool = False

    def found_in(self, names: Container[str]) -> Map:
        """This map with those names of theirs that are among `names`."""
        if self.others and self.theirs[0] not in names and self.others[0] in names:
            return replace(self, theirs=self.others, others=())
        return self


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
        m = renamed(m, lambda name: theirs + name)
        yield replace(m, ours=tuple(ours + name for name in m.ours))


def also_named(maps: Iterable[Map], name: Callable[[str], str]) -> Iterator[Map]:
    """The same maps, which also read checkpoints whose names are changed by `name`."""
    for m in maps:
        yield replace(m, others=tuple(map(name, m.theirs)))


def renamed(m: Map, name: Callable[[str], str]) -> Map:
    """The same map with other names of theirs."""
    theirs, copies, others = (tuple(map(name, names)) for names in (m.theirs, m.copies, m.others))
    return replace(m, theirs=theirs, copies=copies, others=others)
