"""Studies: one-off measurements, run from a clone as `python -m zoo.benchmarks.studies.NAME`; no part of the wheel."""
