"""Directed graphs without cycles in compiled loops: random ones, an order of a node's ancestors, and its check."""

from __future__ import annotations

import numpy as np

from zoo.tasks.kernels.random import below, compiled, mix

MOST = 4  # edges into a node, and out of one
_ROUNDS = 6  # of refinement of the nodes' names
_QUERY, _NODE, _UP, _DOWN = np.uint64(0x51), np.uint64(0x1D), np.uint64(0xA11), np.uint64(0xD0)


@compiled
def write(nodes, keys, edges, order):
    """Random graphs of nodes[i] nodes, and the ancestors of their last node, from one key each.

    The first nodes, from 1 to a quarter of the others (and one more), have no edge in. Each other node has edges from 1
    to 4 different earlier nodes that have fewer than 4 edges out.

    Args:
        nodes: (n,).
        keys: (n,).
        edges: (n, E, 2) filled with -1, in which the edges are put in random order.
        order: (n, N) filled with -1, for the ancestors and the last node itself, each behind all its ancestors. Of
            nodes that may come next from the end, each is as probable as the others.
    """
    state = np.empty(1, dtype=np.uint64)
    most = order.shape[1]
    out, waiting = np.empty(most, dtype=np.int64), np.empty(most, dtype=np.int64)
    free = np.empty(most, dtype=np.int64)
    parents, n_parents = np.empty((most, MOST), dtype=np.int64), np.empty(most, dtype=np.int64)
    needed = np.empty(most, dtype=np.bool_)
    for i in range(len(nodes)):
        n = nodes[i]
        state[0] = keys[i]
        out[:n], n_parents[:n], waiting[:n], needed[:n] = 0, 0, 0, False
        count = 0
        for node in range(1 + below(state, (n - 1) // 4 + 1), n):
            there = 0
            for earlier in range(node):
                if out[earlier] < MOST:
                    free[there] = earlier
                    there += 1
            wanted = 1 + below(state, min(there, MOST)) if there else 0
            for k in range(wanted):
                j = k + below(state, there - k)
                free[k], free[j] = free[j], free[k]
                parents[node, k] = free[k]
                out[free[k]] += 1
                edges[i, count, 0], edges[i, count, 1] = free[k], node
                count += 1
            n_parents[node] = wanted
        for k in range(count - 1, 0, -1):
            j = below(state, k + 1)
            for end in range(2):
                edges[i, k, end], edges[i, j, end] = edges[i, j, end], edges[i, k, end]
        needed[n - 1] = True
        size = 0
        for node in range(n - 1, -1, -1):
            if needed[node]:
                size += 1
                for k in range(n_parents[node]):
                    needed[parents[node, k]] = True
                    waiting[parents[node, k]] += 1
        free[0], there = n - 1, 1
        for place in range(size - 1, -1, -1):
            j = below(state, there)
            node = free[j]
            there -= 1
            free[j:there] = free[j + 1 : there + 1].copy()
            order[i, place] = node
            for k in range(n_parents[node]):
                parent = parents[node, k]
                waiting[parent] -= 1
                if waiting[parent] == 0:
                    free[there] = parent
                    there += 1


@compiled
def names(edges, query):
    """(n,) names of graphs of edges (n, E, 2), filled up with -1, between any numbers, and of one node of each (n,).

    They stay as they are where nodes are renamed and edges exchanged.
    """
    found = np.zeros(len(edges), dtype=np.uint64)
    most = 2 * edges.shape[1] + 1
    nodes = np.empty(most, dtype=np.int64)
    ends = np.empty((edges.shape[1], 2), dtype=np.int64)
    name, up, down = np.empty(most, dtype=np.uint64), np.empty(most, dtype=np.uint64), np.empty(most, dtype=np.uint64)
    for i in range(len(edges)):
        n, count = _read(edges[i], nodes, ends)
        for node in range(n):
            name[node] = mix(_QUERY) if nodes[node] == query[i] else mix(_NODE)
        for _ in range(_ROUNDS):
            up[:n], down[:n] = np.uint64(0), np.uint64(0)
            for k in range(count):
                a, b = ends[k]
                down[a] += mix(name[b] ^ _DOWN)
                up[b] += mix(name[a] ^ _UP)
            for node in range(n):
                name[node] = mix(mix(name[node] + up[node]) ^ down[node])
        for node in range(n):
            found[i] += mix(name[node])
    return found


@compiled
def sizes(edges, query):
    """Nodes of each graph (n,), and the edges from its node in question back to the nearest node without an edge in
    (n,); arguments as of `names`."""
    found, total = np.zeros(len(edges), dtype=np.int64), np.zeros(len(edges), dtype=np.int64)
    most = 2 * edges.shape[1] + 1
    nodes, far = np.empty(most, dtype=np.int64), np.empty(most, dtype=np.int64)
    ends = np.empty((edges.shape[1], 2), dtype=np.int64)
    source = np.empty(most, dtype=np.bool_)
    for i in range(len(edges)):
        n, count = _read(edges[i], nodes, ends)
        source[:n] = True
        for k in range(count):
            source[ends[k, 1]] = False
        for node in range(n):
            far[node] = 0 if nodes[node] == query[i] else most
        found[i], total[i] = most, n
        for step in range(n):
            for node in range(n):
                if far[node] == step and source[node]:
                    found[i] = min(found[i], step)
            if found[i] < most:
                break
            for k in range(count):
                if far[ends[k, 1]] == step and far[ends[k, 0]] == most:
                    far[ends[k, 0]] = step + 1
    return total, found


@compiled
def follow(edges, query, true, said):
    """Whether nodes said are right answers: (n,) bool of whole answers, and (n, A) bool of each node by itself, put in
    place of the true one behind the true nodes before it.

    Args:
        edges: (n, E, 2) filled up with -1.
        query: (n,).
        true: (n, A) a right answer, filled up with -1.
        said: (n, A); what stands beyond the true answer counts as more nodes unless it is -1.
    """
    whole = np.zeros(len(edges), dtype=np.bool_)
    steps = np.zeros(true.shape, dtype=np.bool_)
    for i in range(len(edges)):
        size = 0
        while size < true.shape[1] and true[i, size] >= 0:
            size += 1
        for k in range(size):
            steps[i, k] = _may_follow(edges[i], true[i], k, said[i, k], true[i], size)
        whole[i] = size == true.shape[1] or said[i, size] < 0
        for k in range(size):
            whole[i] = whole[i] and _may_follow(edges[i], said[i], k, said[i, k], true[i], size)
    return whole, steps


@compiled
def _may_follow(edges, done, n_done, node, needed, n_needed):
    """Whether a node is needed, not yet done, and all nodes with an edge to it are done."""
    there = False
    for k in range(n_needed):
        there = there or needed[k] == node
    for k in range(n_done):
        there = there and done[k] != node
    k = 0
    while there and k < len(edges) and edges[k, 0] >= 0:
        if edges[k, 1] == node:
            found = False
            for j in range(n_done):
                found = found or done[j] == edges[k, 0]
            there = found
        k += 1
    return there


@compiled
def _read(edges, nodes, ends):
    """The numbers of nodes and edges of a graph (E, 2), filled up with -1; its nodes go into `nodes`, and the places of
    the ends of its edges among these into `ends`."""
    n = count = 0
    while count < len(edges) and edges[count, 0] >= 0:
        for end in range(2):
            n, ends[count, end] = _known(nodes, n, edges[count, end])
        count += 1
    return n, count


@compiled
def _known(nodes, n, node):
    """How many nodes are known, and the place of one among them, at the end if it is new."""
    for k in range(n):
        if nodes[k] == node:
            return n, k
    nodes[n] = node
    return n + 1, n
