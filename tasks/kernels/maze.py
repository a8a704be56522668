"""Mazes in compiled loops: carving, shortest paths, checks.

A maze is a flat uint8 array of tokens. Inside a loop it becomes `open_`, a flat bool array with a frame of closed cells
around it, so that no step needs a bound check: cell (r, c) is at (r + 1) * (width + 2) + c + 1.
"""

from __future__ import annotations

import numpy as np

from zoo.tasks.kernels.random import below, compiled, mix, shuffle, split_of, word

WALL, OPEN, START, GOAL, PATH = np.uint8(1), np.uint8(2), np.uint8(3), np.uint8(4), np.uint8(5)
_STARTS_PER_MAZE = 8


@compiled
def _carve(open_, stack, state, height, width):
    """A perfect maze by random depth-first search: rooms two apart, joined into a tree, walls all around.

    An even side has a line of walls to spare, which falls on either side by chance.
    """
    across = width + 2
    rows, columns = (height - 1) // 2, (width - 1) // 2
    top = 2 + (below(state, 2) if height % 2 == 0 else 0)
    left = 2 + (below(state, 2) if width % 2 == 0 else 0)
    open_[:] = False
    choices = np.empty(4, dtype=np.int64)
    room = below(state, rows * columns)
    stack[0] = (top + 2 * (room // columns)) * across + left + 2 * (room % columns)
    open_[stack[0]] = True
    depth = 0
    while depth >= 0:
        here = stack[depth]
        r, c = (here // across - top) // 2, (here % across - left) // 2
        n = 0
        if r > 0 and not open_[here - 2 * across]:
            choices[n] = -across
            n += 1
        if r < rows - 1 and not open_[here + 2 * across]:
            choices[n] = across
            n += 1
        if c > 0 and not open_[here - 2]:
            choices[n] = -1
            n += 1
        if c < columns - 1 and not open_[here + 2]:
            choices[n] = 1
            n += 1
        if n == 0:
            depth -= 1
            continue
        step = choices[below(state, n)]
        open_[here + step] = True
        open_[here + 2 * step] = True
        depth += 1
        stack[depth] = here + 2 * step


@compiled
def _scatter(open_, cells, state, least, most):
    """Open all but a random share of the cells, itself uniform in [least, most]; shuffles `cells`."""
    share = least + (most - least) * (word(state) >> np.uint64(11)) * 2.0**-53
    n = len(cells)
    open_[cells] = True
    for i in range(round(share * n)):
        j = i + below(state, n - i)
        cells[i], cells[j] = cells[j], cells[i]
        open_[cells[i]] = False


@compiled
def _framed(cell, width):
    return (cell // width + 1) * (width + 2) + cell % width + 1


@compiled
def _distances(open_, start, across, distance, queue):
    """Breadth-first distances from `start`, -1 where none; returns how many cells of `queue` were reached, nearest
    first."""
    distance[:] = -1
    distance[start] = 0
    queue[0] = start
    head, tail = 0, 1
    while head < tail:
        here = queue[head]
        head += 1
        for step in (-across, -1, 1, across):
            there = here + step
            if open_[there] and distance[there] < 0:
                distance[there] = distance[here] + 1
                queue[tail] = there
                tail += 1
    return tail


@compiled
def _write(open_, distance, start, goal, state, height, width, grid, answer):
    """Write the maze, and the answer with one of the shortest paths, at each step back from the goal by chance."""
    across = width + 2
    for cell in range(height * width):
        grid[cell] = OPEN if open_[_framed(cell, width)] else WALL
    grid[(start // across - 1) * width + start % across - 1] = START
    grid[(goal // across - 1) * width + goal % across - 1] = GOAL
    answer[:] = grid
    steps = np.array([-across, -1, 1, across])
    here = goal
    while distance[here] > 1:
        shuffle(state, steps)
        for step in steps:
            if distance[here + step] == distance[here] - 1:
                here += step
                break
        answer[(here // across - 1) * width + here % across - 1] = PATH


@compiled
def _several_ways(distance, queue, reached, goal, across, ways):
    """Whether more than one shortest path leads to the goal; `ways` is room for the number of each cell, at most 2."""
    ways[queue[0]] = 1
    for i in range(1, reached):
        here = queue[i]
        n = 0
        for step in (-across, -1, 1, across):
            there = here + step
            if distance[there] >= 0 and distance[there] == distance[here] - 1:
                n += ways[there]
        ways[here] = min(n, 2)
        if here == goal:
            break
    return ways[goal] > 1


@compiled
def generate(
    keys, height, width, perfect, unique, least, most, shortest, longest, split, salt, max_tries, maps, grids, answers,
    lengths
):  # fmt: skip
    """Fill the rows of `grids`, `answers` (n, cells) and `lengths` (n,), one per key; returns the rows finished.

    The start is a random open cell and the goal a random one that is far enough: at a distance drawn from
    [shortest, longest], or, with longest < 0, at `shortest` or more; with `unique`, one to which a single shortest path
    leads. Again with a new maze until the fingerprint is of the split (0 train, 1 validation, 2 test). Fewer rows than
    keys are finished where one fails `max_tries` times.
    """
    across = width + 2
    open_ = np.zeros((height + 2) * across, dtype=np.bool_)
    distance = np.empty(len(open_), dtype=np.int64)
    queue = np.empty(len(open_), dtype=np.int64)
    rooms = np.empty(len(open_), dtype=np.int64)
    ways = np.empty(len(open_), dtype=np.int64)
    cells = np.empty(height * width, dtype=np.int64)
    state = np.empty(1, dtype=np.uint64)
    for i in range(len(keys)):
        state[0] = keys[i]
        for cell in range(len(cells)):
            cells[cell] = _framed(cell, width)
        wanted = shortest + below(state, longest - shortest + 1) if longest >= 0 else -1
        needed = max(wanted, shortest)
        done = False
        for _ in range(max_tries):
            if perfect:
                _carve(open_, queue, state, height, width)
            else:
                _scatter(open_, cells, state, least, most)
            n_rooms = 0
            for cell in cells:
                if open_[cell]:
                    rooms[n_rooms] = cell
                    n_rooms += 1
            if n_rooms <= needed:
                continue
            for _ in range(_STARTS_PER_MAZE):
                start = rooms[below(state, n_rooms)]
                reached = _distances(open_, start, across, distance, queue)
                farthest = distance[queue[reached - 1]]
                if farthest >= needed:
                    # The queue is in order of distance: the goals are a stretch of it.
                    last = reached
                    while wanted >= 0 and distance[queue[last - 1]] > wanted:
                        last -= 1
                    first = last
                    while distance[queue[first - 1]] >= needed:
                        first -= 1
                    goal = queue[first + below(state, last - first)]
                    if unique and _several_ways(distance, queue, reached, goal, across, ways):
                        continue
                    _write(open_, distance, start, goal, state, height, width, grids[i], answers[i])
                    lengths[i] = distance[goal]
                    done = split_of(_fingerprint(grids[i], maps), salt) == split
                    break
                if 2 * farthest < needed and n_rooms - reached <= needed:
                    break  # neither here nor in the cells not reached is there such a path
            if done:
                break
        if not done:
            return i
    return len(keys)


@compiled
def _fingerprint(grid, maps):
    total = np.uint64(0)
    for m in range(maps.shape[0]):
        h = np.uint64(0)
        for cell in range(maps.shape[1]):
            token = grid[maps[m, cell]]
            if token != WALL:
                kind = 0 if token == OPEN else 1  # start and goal may change places
                h += mix(np.uint64(2 * cell + kind + 1))
        total += mix(h)
    return mix(total)


@compiled
def fingerprints(grids, maps, result):
    """(n,) hashes of mazes that no symmetry of the grid changes, nor swapping start and goal."""
    for i in range(grids.shape[0]):
        result[i] = _fingerprint(grids[i], maps)


@compiled
def _read(grid, height, width, open_):
    """Open cells of a maze, its start and its goal, -1 where it has not exactly one of each."""
    start, goal, starts, goals = -1, -1, 0, 0
    open_[:] = False
    for cell in range(height * width):
        token = grid[cell]
        framed = _framed(cell, width)
        open_[framed] = token != WALL
        if token == START:
            start = framed
            starts += 1
        elif token == GOAL:
            goal = framed
            goals += 1
    return (start, goal) if starts == 1 and goals == 1 else (-1, -1)


@compiled
def solve(grids, height, width, answers, lengths):
    """A shortest path of each maze (n, cells) and its length; -1 and no path where there is none."""
    across = width + 2
    open_ = np.zeros((height + 2) * across, dtype=np.bool_)
    distance = np.empty(len(open_), dtype=np.int64)
    queue = np.empty(len(open_), dtype=np.int64)
    state = np.zeros(1, dtype=np.uint64)
    scratch = np.empty(height * width, dtype=np.uint8)
    for i in range(grids.shape[0]):
        answers[i] = grids[i]
        lengths[i] = -1
        start, goal = _read(grids[i], height, width, open_)
        if start >= 0:
            _distances(open_, start, across, distance, queue)
            lengths[i] = distance[goal]
            if distance[goal] >= 0:
                _write(open_, distance, start, goal, state, height, width, scratch, answers[i])


@compiled
def valid(grids, proposals, height, width, result):
    """Whether each proposal (n, cells) is its maze with one shortest path drawn in and nothing else changed."""
    across = width + 2
    open_ = np.zeros((height + 2) * across, dtype=np.bool_)
    distance = np.empty(len(open_), dtype=np.int64)
    queue = np.empty(len(open_), dtype=np.int64)
    for i in range(grids.shape[0]):
        result[i] = False
        drawn = 0
        faithful = True
        for cell in range(height * width):
            if proposals[i, cell] == PATH and grids[i, cell] == OPEN:
                drawn += 1
            elif proposals[i, cell] != grids[i, cell]:
                faithful = False
                break
        start, goal = _read(grids[i], height, width, open_)
        if not faithful or start < 0:
            continue
        _distances(open_, start, across, distance, queue)
        length = distance[goal]
        if length < 1 or drawn != length - 1:
            continue
        # So many cells of path join start and goal only if they are one shortest path.
        for cell in range(height * width):
            if proposals[i, cell] == OPEN:
                open_[_framed(cell, width)] = False
        _distances(open_, start, across, distance, queue)
        result[i] = distance[goal] == length


@compiled
def paths(grids, proposals, height, width, result):
    """Whether each proposal (n, cells) is its maze with one path drawn in, of any length, and nothing else changed.

    Start and goal have one neighbour on the path, and every other cell of it two; all of them are joined.
    """
    across = width + 2
    open_ = np.zeros((height + 2) * across, dtype=np.bool_)
    distance = np.empty(len(open_), dtype=np.int64)
    queue = np.empty(len(open_), dtype=np.int64)
    for i in range(grids.shape[0]):
        start, goal = _read(grids[i], height, width, open_)
        result[i] = start >= 0
        drawn = 2
        for cell in range(height * width):
            token = proposals[i, cell]
            if token == PATH and grids[i, cell] == OPEN:
                drawn += 1
            elif token != grids[i, cell]:
                result[i] = False
            open_[_framed(cell, width)] = token in (PATH, START, GOAL)
        if not result[i]:
            continue
        reached = _distances(open_, start, across, distance, queue)
        result[i] = reached == drawn and distance[goal] == drawn - 1
        for k in range(reached):
            joined = 0
            for step in (-across, -1, 1, across):
                joined += open_[queue[k] + step]
            if joined != (1 if queue[k] == start or queue[k] == goal else 2):
                result[i] = False
