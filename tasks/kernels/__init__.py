"""Compiled loops (numba), imported only when a puzzle is made, solved or scored."""
