"""`python -m zoo.benchmarks.studies.gpu`: what is missing is said before torch is imported."""

from __future__ import annotations

import sys

from zoo.benchmarks.studies.gpu import wheels

if __name__ == "__main__":
    if found := wheels.problems():
        found.append(f"Python is {sys.executable}; docs/install-gpu.md has the line that brings wheels to it.")
        print("\n".join(found), file=sys.stderr)
        sys.exit(2)
    for line in wheels.left_out():
        print(line, file=sys.stderr, flush=True)
    from zoo.benchmarks.studies.gpu.study import STUDY

    STUDY.main()
