"""Which runs are worth their cost: the Pareto front."""

from __future__ import annotations

from collections.abc import Sequence


def pareto_front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Indices of the (cost, value) pairs that no other pair beats, by rising cost.

    A pair is beaten by one that costs no more and is worth no less, and is better in one of the two. Equal pairs do
    not beat each other.
    """
    front: list[int] = []
    for i in sorted(range(len(points)), key=lambda i: (points[i][0], -points[i][1])):
        if not front or points[i][1] > points[front[-1]][1] or points[i] == points[front[-1]]:
            front.append(i)
    return front
