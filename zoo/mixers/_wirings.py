"""Sparse wirings of liquid networks: which neuron feeds which, with what sign.

Neural circuit policies (Lechner et al. 2020, Nature Machine Intelligence 2, 642-652; methods, "Design principles of
NCPs"): sensory -> inter -> command -> motor neurons, recurrence among command neurons only. The draws are those of the
authors' package ncps (1.0), so that a seed gives the same network there and here.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import numpy as np
from pydantic import Field

from zoo.core.errors import UsageError
from zoo.core.options import Options

WIRINGS = Literal["fully_connected", "random", "auto_ncp", "ncp"]
SEEDS = {"fully_connected": 1111, "random": 1111, "auto_ncp": 22222, "ncp": 22222}
USES = {
    None: set(),
    "fully_connected": {"n_motor", "wiring_seed"},
    "random": {"n_motor", "sparsity", "wiring_seed"},
    "auto_ncp": {"n_motor", "sparsity", "wiring_seed"},
    "ncp": {"ncp_neurons", "ncp_synapses", "wiring_seed"},
}


class Wiring(NamedTuple):
    """Synapses as signs: 1 excitatory, -1 inhibitory, 0 none; rows are sources, columns targets.

    Attributes:
        sensory: (inputs, units).
        inner: (units, units).
        layers: the neurons of each layer, from inputs to outputs; the motor neurons come first in number.
        n_motor: how many neurons are read out.
    """

    sensory: np.ndarray
    inner: np.ndarray
    layers: tuple[range, ...]
    n_motor: int


MOST_NEURONS = 8192  # each may have a synapse to each


class WiringOptions(Options):
    """The options of a wiring, shared by the mixers that have one.

    Attributes:
        d_hidden: number of neurons, D by default; with "ncp" the sum of `ncp_neurons`.
        n_motor: number of output neurons; all by default, 3 in 10 with "auto_ncp".
        sparsity: share of synapses removed by "random" (0 to 1) and "auto_ncp" (0.1 to 0.9).
        ncp_neurons: neurons of "ncp": inter, command and motor neurons.
        ncp_synapses: synapses of "ncp": targets of each sensory and of each inter neuron, synapses among the
            command neurons, sources of each motor neuron.
        wiring_seed: seed of the drawn synapses and signs; the published one by default.
    """

    d_hidden: int | None = Field(default=None, ge=1)
    n_motor: int | None = Field(default=None, ge=1)
    sparsity: float = Field(default=0.5, ge=0, lt=1)
    ncp_neurons: tuple[int, int, int] | None = None
    ncp_synapses: tuple[int, int, int, int] | None = None
    wiring_seed: int | None = Field(default=None, ge=0, le=2**32 - 1)


def units_of(mixer: str, wiring: str | None, options: WiringOptions, d_model: int) -> int:
    """The number of neurons.

    Raises:
        UsageError: an option that this wiring does not read, or "ncp" without its numbers.
    """
    for name in ("n_motor", "sparsity", "ncp_neurons", "ncp_synapses", "wiring_seed"):
        if name in options.changed() and name not in USES[wiring]:
            allowed = " or ".join(repr(w) for w, names in USES.items() if name in names)
            raise UsageError(f"{mixer}: {name} has no effect with wiring={wiring!r}; it belongs to {allowed}.")
    if wiring != "ncp":
        return options.d_hidden or d_model
    if options.ncp_neurons is None or options.ncp_synapses is None:
        raise UsageError(f"{mixer}: wiring='ncp' needs ncp_neurons and ncp_synapses; 'auto_ncp' derives them.")
    units = sum(options.ncp_neurons)
    if options.d_hidden not in (None, units):
        raise UsageError(f"{mixer}: d_hidden={options.d_hidden} is not the sum of ncp_neurons, {units}.")
    return units


def make_wiring(mixer: str, wiring: str, options: WiringOptions, d_in: int, units: int) -> Wiring:
    """The wiring of `units` neurons with `d_in` inputs.

    Raises:
        UsageError: numbers that no such wiring can have.
    """
    if units > MOST_NEURONS:
        raise UsageError(f"{mixer}: {units:,} wired neurons are too many: at most {MOST_NEURONS:,} are drawn.")
    seed = SEEDS[wiring] if options.wiring_seed is None else options.wiring_seed
    if wiring == "ncp":
        assert options.ncp_neurons is not None
        assert options.ncp_synapses is not None
        return _ncp(mixer, d_in, options.ncp_neurons, options.ncp_synapses, seed)
    if wiring == "auto_ncp":
        return _auto_ncp(mixer, d_in, units, options.n_motor or max(1, units * 3 // 10), options.sparsity, seed)
    n_motor = options.n_motor or units
    if n_motor > units:
        raise UsageError(f"{mixer}: n_motor={n_motor} is more than the {units} neurons there are.")
    rng = np.random.default_rng(seed)
    if wiring == "fully_connected":
        inner, sensory = (rng.choice([-1, 1, 1], (n, units)) for n in (units, d_in))
    else:
        inner = _sparse(rng, units, units, options.sparsity, n_draws=1)
        sensory = _sparse(rng, d_in, units, options.sparsity, n_draws=2)  # as published: the second sign counts
    return Wiring(sensory, inner, (range(units),), n_motor)


def _sparse(rng: np.random.Generator, n_from: int, n_to: int, sparsity: float, n_draws: int) -> np.ndarray:
    """(n_from, n_to) with a share of 1 - sparsity of signs, two in three of them positive."""
    count = int(np.round(n_from * n_to * (1 - sparsity)))
    signs = np.zeros(n_from * n_to, dtype=np.int64)
    at = rng.choice(n_from * n_to, size=count, replace=False)
    signs[at] = rng.choice([-1, 1, 1], (count, n_draws))[:, -1]
    return signs.reshape(n_from, n_to)


def _auto_ncp(mixer: str, d_in: int, units: int, n_motor: int, sparsity: float, seed: int) -> Wiring:
    """A circuit derived from its size: 2 in 5 of the neurons that are no motor neurons are command neurons."""
    if n_motor >= units - 2:
        raise UsageError(
            f"{mixer}: n_motor={n_motor} is not allowed: it should be less than d_hidden - 2 = {units - 2}."
        )
    if not 0.1 <= sparsity <= 0.9:
        raise UsageError(
            f"{mixer}: sparsity={sparsity:g} is not allowed: with 'auto_ncp' it should be from 0.1 to 0.9."
        )
    density = 1.0 - sparsity
    command = max(int(0.4 * (units - n_motor)), 1)
    inter = units - n_motor - command
    to_inter, to_command = max(int(inter * density), 1), max(int(command * density), 1)
    synapses = (to_inter, to_command, max(int(command * density * 2), 1), to_command)
    return _ncp(mixer, d_in, (inter, command, n_motor), synapses, seed)


def _ncp(
    mixer: str, d_in: int, neurons: tuple[int, int, int], synapses: tuple[int, int, int, int], seed: int
) -> Wiring:
    n_inter, n_command, n_motor = neurons
    to_inter, to_command, among_command, to_motor = synapses
    if min(neurons) < 1 or min(to_inter, to_command, to_motor) < 1 or among_command < 0:
        raise UsageError(
            f"{mixer}: ncp_neurons={neurons}, ncp_synapses={synapses}: there should be at least one of each."
        )
    if to_inter > n_inter or max(to_command, to_motor) > n_command:
        raise UsageError(f"{mixer}: ncp_synapses={synapses} is not allowed: more partners than ncp_neurons={neurons}.")
    units = sum(neurons)
    sensors, motor = range(d_in), range(n_motor)
    command, inter = range(n_motor, n_motor + n_command), range(n_motor + n_command, units)
    rng = np.random.RandomState(seed)
    sensory, inner = np.zeros((d_in, units), dtype=np.int64), np.zeros((units, units), dtype=np.int64)
    _connect(rng, sensory, sensors, inter, to_inter)
    _connect(rng, inner, inter, command, to_command)
    for _ in range(among_command):
        source, target = rng.choice(command), rng.choice(command)
        inner[source, target] = rng.choice([-1, 1])
    _connect(rng, inner.T, motor, command, to_motor)
    return Wiring(sensory, inner, (inter, command, motor), n_motor)


def _connect(rng: np.random.RandomState, signs: np.ndarray, these: range, others: range, count: int) -> None:
    """Give each of `these` `count` partners among `others`; an other left out gets its mean number of them."""

    def link(partners: range, size: int) -> tuple[np.ndarray, np.ndarray]:
        chosen = rng.choice(partners, size=size, replace=False)
        return chosen, rng.choice([-1, 1], size)

    left_out = set(others)
    for one in these:
        chosen, drawn = link(others, count)
        signs[one, chosen] = drawn
        left_out -= set(chosen.tolist())
    mean = min(max(len(these) * count // len(others), 1), len(these))
    for other in sorted(left_out):
        chosen, drawn = link(these, mean)
        signs[chosen, other] = drawn
