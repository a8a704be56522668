"""Sudoku in compiled loops: search, digging, fingerprints, symmetries.

A board is a flat uint8 array, 0 for blank. While it is searched, each cell holds the set of digits still possible
there as bits of a uint16 (bit d - 1 for digit d), with `PLACED` set once the digit has been struck from its peers.
`peers` (cells, n_peers) and `units` (3 * size, size) come from `zoo.tasks.sudoku.boards`.
"""

from __future__ import annotations

import numpy as np

from zoo.tasks.kernels.random import below, compiled, mix, shuffle, split_of

PLACED = np.uint16(1 << 15)
_DIGITS = np.uint16((1 << 15) - 1)
_ZERO, _ONE = np.uint16(0), np.uint16(1)


@compiled
def _bit_count(x):
    n = 0
    while x:
        x &= x - _ONE
        n += 1
    return n


@compiled
def _digit(x):
    d = 1
    while not x & _ONE:
        x >>= _ONE
        d += 1
    return d


@compiled
def _propagate(sets, queue, pending, peers, units):
    """Place the `pending` cells of the queue and all that follows by naked and hidden singles; False: contradiction."""
    size = units.shape[1]
    full = np.uint16((1 << size) - 1)
    while True:
        while pending:
            pending -= 1
            cell = queue[pending]
            bit = sets[cell]
            sets[cell] = bit | PLACED
            for peer in peers[cell]:
                old = sets[peer]
                if old & bit:
                    new = old & ~bit
                    if new & _DIGITS == _ZERO:
                        return False
                    sets[peer] = new
                    if new & (new - _ONE) == _ZERO:
                        queue[pending] = peer
                        pending += 1
        for u in range(units.shape[0]):
            seen, twice, placed = _ZERO, _ZERO, _ZERO
            for k in range(size):
                s = sets[units[u, k]]
                digits = s & _DIGITS
                twice |= seen & digits
                seen |= digits
                if s & PLACED:
                    placed |= digits
            if seen != full:
                return False
            hidden = seen & ~twice & ~placed
            if hidden == _ZERO:
                continue
            for k in range(size):
                cell = units[u, k]
                bit = sets[cell] & hidden
                if bit and bit != sets[cell]:
                    if bit & (bit - _ONE):
                        return False
                    sets[cell] = bit
                    queue[pending] = cell
                    pending += 1
        if pending == 0:
            return True


@compiled
def _load(board, sets, queue, size):
    """Candidate sets of a board whose givens are queued; returns how many."""
    pending = 0
    for cell in range(len(board)):
        if board[cell]:
            sets[cell] = _ONE << np.uint16(board[cell] - 1)
            queue[pending] = cell
            pending += 1
        else:
            sets[cell] = (1 << size) - 1
    return pending


@compiled
def _narrowest(sets):
    """The open cell with the fewest digits, or -1 where all are placed."""
    best, cell = 99, -1
    for c in range(len(sets)):
        if not sets[c] & PLACED:
            n = _bit_count(sets[c])
            if n == 2:
                return c
            if n < best:
                best, cell = n, c
    return cell


@compiled
def _pick(choices, state, randomly):
    """One bit of a set: the lowest, or a random one."""
    if randomly:
        for _ in range(below(state, _bit_count(choices))):
            choices &= choices - _ONE
    return choices & (~choices + _ONE)


@compiled
def _search(levels, queue, pending, peers, units, limit, solution, state, randomly):
    """Depth-first search from levels[0] with `pending` cells queued, for up to `limit` solutions.

    Returns (solutions found, guesses); the first is written to `solution`. A guess is one digit tried where nothing
    is forced; after it is refuted, the cell goes on without it.
    """
    n_cells = levels.shape[1]
    tried_cell = np.empty(n_cells, dtype=np.int64)
    tried_bit = np.empty(n_cells, dtype=np.uint16)
    found, guesses, depth = 0, 0, 0
    alive = _propagate(levels[0], queue, pending, peers, units)
    while True:
        if alive:
            cell = _narrowest(levels[depth])
            if cell >= 0:
                guesses += 1
                bit = _pick(levels[depth, cell], state, randomly)
                tried_cell[depth], tried_bit[depth] = cell, bit
                levels[depth + 1] = levels[depth]
                depth += 1
                levels[depth, cell] = bit
                queue[0] = cell
                alive = _propagate(levels[depth], queue, 1, peers, units)
                continue
            found += 1
            if found == 1:
                for c in range(n_cells):
                    solution[c] = _digit(levels[depth, c])
            if found == limit:
                return found, guesses
        depth -= 1
        if depth < 0:
            return found, guesses
        cell = tried_cell[depth]
        rest = levels[depth, cell] & ~tried_bit[depth]
        levels[depth, cell] = rest
        queue[0] = cell
        alive = _propagate(levels[depth], queue, 1 if rest & (rest - _ONE) == _ZERO else 0, peers, units)


@compiled
def solve(boards, peers, units, limit, solutions, n_solutions, guesses):
    """Solve boards (n, cells); `solutions` keeps zeros where there is none."""
    n_cells, size = boards.shape[1], units.shape[1]
    levels = np.empty((n_cells + 1, n_cells), dtype=np.uint16)
    queue = np.empty(n_cells, dtype=np.int64)
    state = np.zeros(1, dtype=np.uint64)
    for i in range(boards.shape[0]):
        pending = _load(boards[i], levels[0], queue, size)
        n_solutions[i], guesses[i] = _search(levels, queue, pending, peers, units, limit, solutions[i], state, False)


@compiled
def _needed(board, cell, levels, queue, peers, units, scratch, state):
    """Whether blanking a given cell of a board with one solution would let in a second."""
    digit, size = board[cell], units.shape[1]
    bit = _ONE << np.uint16(digit - 1)
    seen = bit
    for peer in peers[cell]:
        if board[peer]:
            seen |= _ONE << np.uint16(board[peer] - 1)
    if seen == (1 << size) - 1:  # all other digits stand among the peers: no search
        return False
    board[cell] = 0
    pending = _load(board, levels[0], queue, size)
    board[cell] = digit
    rest = levels[0, cell] & ~bit
    levels[0, cell] = rest
    if rest & (rest - _ONE) == _ZERO:
        queue[pending] = cell
        pending += 1
    return _search(levels, queue, pending, peers, units, 1, scratch, state, False)[0] > 0


@compiled
def minimal(boards, peers, units, result):
    """Whether each given of each board (n, cells) with one solution is needed, (n,) bool."""
    n_cells = boards.shape[1]
    levels = np.empty((n_cells + 1, n_cells), dtype=np.uint16)
    queue = np.empty(n_cells, dtype=np.int64)
    scratch = np.empty(n_cells, dtype=np.uint8)
    state = np.zeros(1, dtype=np.uint64)
    for i in range(boards.shape[0]):
        result[i] = True
        for cell in range(n_cells):
            if boards[i, cell] and not _needed(boards[i], cell, levels, queue, peers, units, scratch, state):
                result[i] = False
                break


@compiled
def canonical(board, maps, best):
    """The least board among all symmetric copies, given every map of positions; exact, for 4x4 and 6x6."""
    n_cells = len(board)
    names = np.empty(10, dtype=np.uint8)
    best[:] = 255
    for m in range(maps.shape[0]):
        names[:] = 0
        fresh = 1
        tied = True
        for i in range(n_cells):
            value = board[maps[m, i]]
            if value:
                if names[value] == 0:
                    names[value] = fresh
                    fresh += 1
                value = names[value]
            if tied:
                if value > best[i]:
                    break
                tied = value == best[i]
            best[i] = value


@compiled
def _line_hash(solution, start, step, other):
    """Hash of the cycle type of the permutation that takes the digits of one line to those of another."""
    image = np.empty(10, dtype=np.uint8)
    for k in range(9):
        image[solution[start + k * step]] = solution[other + k * step]
    total = np.uint64(0)
    seen = 0
    for first in range(1, 10):
        length, d = 0, first
        while not (seen >> d) & 1:
            seen |= 1 << d
            d = image[d]
            length += 1
        if length:
            total += mix(np.uint64(length))
    return mix(total)


@compiled
def _lines_hash(solution, along, across):
    """Hash of all pairs of rows (or of columns), blind to their order and that of the bands."""
    total = np.uint64(0)
    for band in range(3):
        of_band = np.uint64(0)
        for i in range(3 * band, 3 * band + 3):
            inside, outside = np.uint64(0), np.uint64(0)
            for j in range(9):
                if i != j:
                    h = _line_hash(solution, i * across, along, j * across)
                    if j // 3 == band:
                        inside += h
                    else:
                        outside += h
            of_band += mix(mix(inside) + outside)
        total += mix(of_band)
    return mix(total)


@compiled
def fingerprint(board, solution, maps, best):
    """A uint64 that all symmetric copies of a puzzle share.

    9x9: of the solution, so that puzzles with (up to symmetry) the same solution share it too; by cycle types of line
    pairs. Smaller: of the puzzle, by its canonical form.
    """
    if len(board) == 81:
        return mix(_lines_hash(solution, 1, 9) + _lines_hash(solution, 9, 1))
    canonical(board, maps, best)
    h = np.uint64(0)
    for value in best:
        h = mix(h + np.uint64(value) + np.uint64(1))
    return h


@compiled
def fingerprints(boards, solutions, maps, result):
    """`fingerprint` of boards (n, cells)."""
    best = np.empty(boards.shape[1], dtype=np.uint8)
    for i in range(boards.shape[0]):
        result[i] = fingerprint(boards[i], solutions[i], maps, best)


@compiled
def _fill(levels, queue, peers, units, solution, state):
    """A random full board."""
    for cell in range(len(solution)):
        solution[cell] = 0
    first = np.arange(1, units.shape[1] + 1)
    shuffle(state, first)
    for k in range(units.shape[1]):
        solution[units[0, k]] = first[k]
    pending = _load(solution, levels[0], queue, units.shape[1])
    _search(levels, queue, pending, peers, units, 1, solution, state, True)


@compiled
def generate(
    keys, lowest, highest, dig_all, min_guesses, split, salt, max_tries, peers, units, maps, boards, solutions, guesses
):
    """Fill the rows of `boards`, `solutions` (n, cells) and `guesses` (n,), one per key; returns the rows finished.

    Each row draws a full board and blanks cells in random order, as long as one solution remains, down to a number of
    givens drawn from [lowest, highest] (or as far as it goes, `dig_all`); again until it has a number in that
    range, `min_guesses` guesses, and a fingerprint of the split (0 train, 1 validation, 2 test). Fewer rows
    than keys are finished where one fails `max_tries` times.
    """
    n_cells, size = boards.shape[1], units.shape[1]
    levels = np.empty((n_cells + 1, n_cells), dtype=np.uint16)
    queue = np.empty(n_cells, dtype=np.int64)
    scratch = np.empty(n_cells, dtype=np.uint8)
    order = np.arange(n_cells)
    state = np.empty(1, dtype=np.uint64)
    for i in range(len(keys)):
        state[0] = keys[i]
        board, solution = boards[i], solutions[i]
        for attempt in range(max_tries + 1):
            if attempt == max_tries:
                return i
            _fill(levels, queue, peers, units, solution, state)
            if size == 9 and split_of(fingerprint(board, solution, maps, scratch), salt) != split:
                continue  # known before the costly digging
            goal = 0 if dig_all else lowest + below(state, highest - lowest + 1)
            board[:] = solution
            givens = n_cells
            shuffle(state, order)
            for cell in order:
                if givens <= goal:
                    break
                if not _needed(board, cell, levels, queue, peers, units, scratch, state):
                    board[cell] = 0
                    givens -= 1
            if givens < lowest or givens > highest:
                continue
            if size < 9 and split_of(fingerprint(board, solution, maps, scratch), salt) != split:
                continue
            pending = _load(board, levels[0], queue, size)
            guesses[i] = _search(levels, queue, pending, peers, units, 2, scratch, state, False)[1]
            if guesses[i] >= min_guesses:
                break
    return len(keys)


@compiled
def _line_order(state, n_groups, group, result):
    """A random order of lines: groups (bands or stacks) in random order, lines in random order in each."""
    groups, inner = np.arange(n_groups), np.arange(group)
    shuffle(state, groups)
    for g in range(n_groups):
        shuffle(state, inner)
        for k in range(group):
            result[g * group + k] = groups[g] * group + inner[k]


@compiled
def augment(keys, boards, solutions, size, box_height, box_width, new_boards, new_solutions):
    """Send each board and its solution through one random symmetry: lines, transposition (square boxes), digits."""
    state = np.empty(1, dtype=np.uint64)
    rows, columns = np.empty(size, dtype=np.int64), np.empty(size, dtype=np.int64)
    digits = np.empty(size + 1, dtype=np.uint8)
    for i in range(len(keys)):
        state[0] = keys[i]
        _line_order(state, size // box_height, box_height, rows)
        _line_order(state, size // box_width, box_width, columns)
        transpose = box_height == box_width and below(state, 2) == 1
        for d in range(size + 1):
            digits[d] = d
        shuffle(state, digits[1:])
        for r in range(size):
            for c in range(size):
                old = columns[c] * size + rows[r] if transpose else rows[r] * size + columns[c]
                new_boards[i, r * size + c] = digits[boards[i, old]]
                new_solutions[i, r * size + c] = digits[solutions[i, old]]
