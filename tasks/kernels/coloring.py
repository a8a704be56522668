"""Colourings of graphs, counted in a compiled loop."""

from __future__ import annotations

import numpy as np

from zoo.tasks.kernels.random import compiled


@compiled
def count(edges, given, colors, most, result):
    """The number of colourings of each graph, at most `most`, into `result` (n,).

    Args:
        edges: (n, N, N) bool, symmetric.
        given: (n, N) colours from 0, -1 where there is none.
        colors: how many there are.
        most: a number at which counting ends.
        result: (n,) int64.
    """
    N = edges.shape[1]
    order, colours, tried, near = np.empty((4, N), dtype=np.int64)
    for row in range(len(edges)):
        colours[:] = given[row]
        n = 0
        for node in range(N):
            if given[row, node] < 0:
                order[n] = node
                n += 1
        near[:] = 0  # of each node, how many of its neighbours come before it
        for node in range(N):
            if given[row, node] >= 0:
                near += edges[row, node]
        for i in range(n):  # the node with the most of them is next
            best = i
            for k in range(i, n):
                if near[order[k]] > near[order[best]]:
                    best = k
            order[i], order[best] = order[best], order[i]
            near += edges[row, order[i]]
        found, depth = 0, 0
        tried[0] = -1
        while depth >= 0 and found < most:
            if depth == n:
                found += 1
                depth -= 1
                continue
            node = order[depth]
            colours[node] = -1
            tried[depth] += 1
            if tried[depth] == colors:
                depth -= 1
                continue
            free = True
            for other in range(N):
                free = free and not (edges[row, node, other] and colours[other] == tried[depth])
            if free:
                colours[node] = tried[depth]
                depth += 1
                if depth < n:
                    tried[depth] = -1
        result[row] = found
