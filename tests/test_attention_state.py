"""States of the attention words hold what theory says, and the page about them holds what was measured."""

from __future__ import annotations

import json
import pathlib

import pytest

from zoo.benchmarks.studies import attention_state

DOCS = pathlib.Path(__file__).parents[1] / "docs"


@pytest.mark.parametrize("name", attention_state.THEORY)
@pytest.mark.parametrize("n_tokens", [300, 1100])
def test_measured_bytes_are_those_of_theory(name, n_tokens):
    mixer = attention_state.created(name)
    state = attention_state.read_state(mixer, n_tokens)
    expected = attention_state.THEORY[name][1](mixer, n_tokens) * 4
    assert attention_state.remembered_bytes(state) == expected == attention_state.theory_bytes(name, mixer, n_tokens)


def test_a_stretched_state_goes_on():
    for name in attention_state.attention_words():
        mixer = attention_state.created(name)
        step, token = attention_state.seconds_at(mixer, attention_state.read_state(mixer, 64), 64, 300, repeats=2)
        assert step > 0
        assert token > 0


def test_the_page_about_attention_holds_what_was_measured():
    report = json.loads((DOCS / "results" / "data" / "attention_state.json").read_text())
    page = (DOCS / "attention.md").read_text()
    assert attention_state.filled(page, report) == page
