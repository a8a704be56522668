"""Sudoku of 4x4, 6x6 and 9x9: generator, solver, symmetries, files, and the task itself."""

from zoo.tasks.sudoku.boards import from_text, is_solution, to_text
from zoo.tasks.sudoku.files import PuzzleFile, read_puzzles, write_csv, write_lines
from zoo.tasks.sudoku.solver import Solved, augment, fingerprint, is_minimal, solve
from zoo.tasks.sudoku.task import Sudoku

__all__ = [
    "PuzzleFile",
    "Solved",
    "Sudoku",
    "augment",
    "fingerprint",
    "from_text",
    "is_minimal",
    "is_solution",
    "read_puzzles",
    "solve",
    "to_text",
    "write_csv",
    "write_lines",
]
