"""The measurement of decoding: its forms are what it says, its states are whole."""

from __future__ import annotations

import torch

import zoo
from zoo.benchmarks.states import at_context
from zoo.benchmarks.studies import attention_decode
from zoo.states import tree_bytes

SMALL = {**dict.fromkeys(attention_decode.SIZES, 8), "d_model": 32, "n_heads": 4, "n_kv_heads": 2, "window": 16}


def test_states_made_by_hand_are_like_those_of_a_prefill():
    for name, word in attention_decode.words(SMALL).items():
        mixer = zoo.create_mixer(word, 32)
        state, _ = at_context(mixer, 24, room=3)
        _, real = mixer(torch.randn(1, 24, 32), mixer.init_state(1, capacity=27))
        assert [x.shape for x in state] == [x.shape for x in real], name
        assert tree_bytes(state) == mixer.state_bytes(1, 27, torch.float32)
        assert state.length.tolist() == [24]
        for made, held in zip(zoo.canonical(state)[:-1], zoo.canonical(real)[:-1], strict=True):
            assert made.shape == held.shape
            assert made.all()


def test_mqa_has_a_cache_of_the_bytes_of_mla():
    for sizes in (SMALL, attention_decode.SIZES):
        with torch.device("meta"):
            mixers = {n: zoo.create_mixer(w, sizes["d_model"]) for n, w in attention_decode.words(sizes).items()}
        taken = {name: mixer.state_bytes(1, 100, torch.float32) for name, mixer in mixers.items()}
        assert taken["mqa, cache of mla"] == taken["mla"] == taken["mla, unabsorbed"]


def test_the_table_has_a_row_for_every_form():
    contexts = {str(n): attention_decode.step_costs(SMALL, n, 1) for n in (5, 40)}
    facts = {"cpu": "a CPU", "threads": 1, "versions": {"torch": "2"}}
    text = attention_decode.markdown({"machine": facts, "sizes": SMALL, "contexts": contexts})
    for name, m in contexts["40"].items():
        assert m["ms"] > 0
        assert f"| {name} | " in text
