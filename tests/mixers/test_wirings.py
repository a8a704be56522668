"""Wirings of liquid networks: every neuron is reached, layers feed layers, a seed decides."""

import numpy as np
import pytest

from zoo.mixers._wirings import WiringOptions, make_wiring


def auto_ncp(seed=None, sparsity=0.5, d_in=6, units=30, n_motor=7):
    return make_wiring(
        "ltc", "auto_ncp", WiringOptions(sparsity=sparsity, n_motor=n_motor, wiring_seed=seed), d_in, units
    )


@pytest.mark.parametrize("sparsity", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("seed", [None, 0, 1, 2])
def test_a_circuit_runs_from_inputs_to_motor_neurons(seed, sparsity):
    wiring = auto_ncp(seed, sparsity)
    inter, command, motor = wiring.layers
    assert (len(inter), len(command), len(motor)) == (14, 9, 7)  # 2 in 5 of the neurons before the motor ones
    allowed = np.zeros_like(wiring.inner)
    for sources, targets in ((inter, command), (command, command), (command, motor)):
        allowed[np.ix_(sources, targets)] = 1
    assert not (wiring.inner * (1 - allowed)).any()
    assert not np.delete(wiring.sensory, list(inter), 1).any()
    reached = [wiring.sensory[:, inter], wiring.inner[np.ix_(inter, command)], wiring.inner[np.ix_(command, motor)]]
    for signs in reached:
        assert signs.any(0).all(), "a neuron with no source"
        assert signs.any(1).all(), "a source with no target"
    assert set(np.unique(wiring.inner)) == {-1, 0, 1}


def test_a_seed_decides():
    assert all(np.array_equal(a, b) for a, b in zip(auto_ncp(3)[:2], auto_ncp(3)[:2], strict=True))
    assert not np.array_equal(auto_ncp(3).inner, auto_ncp(4).inner)
    assert np.array_equal(auto_ncp().inner, auto_ncp(22222).inner)


@pytest.mark.parametrize("sparsity", [0.0, 0.25, 0.9])
def test_a_random_wiring_has_its_share_of_synapses(sparsity):
    wiring = make_wiring("ltc", "random", WiringOptions(sparsity=sparsity, n_motor=4), 10, 20)
    assert np.count_nonzero(wiring.inner) == round(400 * (1 - sparsity))
    assert np.count_nonzero(wiring.sensory) == round(200 * (1 - sparsity))
    assert wiring.n_motor == 4


def test_two_in_three_synapses_excite():
    wiring = make_wiring("ltc", "fully_connected", WiringOptions(), 50, 100)
    assert (wiring.inner != 0).all()
    assert abs((wiring.inner > 0).mean() - 2 / 3) < 0.02
    assert abs((wiring.sensory > 0).mean() - 2 / 3) < 0.02


def test_a_circuit_by_its_numbers():
    options = WiringOptions(ncp_neurons=(9, 6, 4), ncp_synapses=(3, 2, 5, 3), wiring_seed=1)
    wiring = make_wiring("ltc", "ncp", options, 5, 19)
    inter, command, motor = wiring.layers
    assert (np.count_nonzero(wiring.sensory, 1) >= 3).all()
    assert (np.count_nonzero(wiring.inner[np.ix_(inter, command)], 1) >= 2).all()
    assert (np.count_nonzero(wiring.inner[np.ix_(command, motor)], 0) >= 3).all()
    assert 1 <= np.count_nonzero(wiring.inner[np.ix_(command, command)]) <= 5
