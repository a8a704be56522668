"""Mazes of any size: generator, shortest paths, files, and the task itself."""

from zoo.tasks.maze.files import MazeFile, read_mazes, write_mazes
from zoo.tasks.maze.grids import CHARACTERS, fingerprint, is_path, is_valid, solve, to_text
from zoo.tasks.maze.task import Maze

__all__ = [
    "CHARACTERS",
    "Maze",
    "MazeFile",
    "fingerprint",
    "is_path",
    "is_valid",
    "read_mazes",
    "solve",
    "to_text",
    "write_mazes",
]
