"""The study of decoding by block diffusion: what it measures, and its page."""

from __future__ import annotations

from zoo.benchmarks.studies import block_decode


def test_every_form_is_measured_and_shown():
    found = block_decode.costs("mamba2", context=5, tokens=4, block=2, passes=[2, 1], repeats=1)
    assert set(found) == {"left to right", "2", "1"}
    assert min(found.values()) > 0
    machine = {"cpu": "one", "cpus": 1, "threads": 1, "versions": {"torch": "2"}}
    data = {"machine": machine, "load": 0.0, "context": 5, "tokens": 4, "block": 2, "repeats": 1, "passes": [2, 1]}
    text = block_decode.markdown({**data, "words": {"mamba2": {"left to right": 2.0, "2": 3.0, "1": 1.0}}})
    assert "| `mamba2` | 2.00 | 1.50 | 0.50 |" in text
