"""The process's random states: seeded for a training, and given back to the caller as they were."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator

import numpy as np
import torch


def seed_device(seed: int, device: torch.device) -> None:
    """Seed torch's generators of the CPU and of one device; those of other devices are left alone."""
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)
    elif device.type == "mps":
        torch.mps.manual_seed(seed)


@contextlib.contextmanager
def kept_random_state() -> Iterator[None]:
    """Python's, numpy's and torch's global random states afterwards as before, however the block ends."""
    python, numpy, cpu, seed = random.getstate(), np.random.get_state(), torch.get_rng_state(), torch.initial_seed()
    had_cuda, has_mps = torch.cuda.is_initialized(), torch.backends.mps.is_available()
    cuda = torch.cuda.get_rng_state_all() if had_cuda else None
    mps = torch.mps.get_rng_state() if has_mps else None
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(cpu)
        if cuda is not None:
            torch.cuda.set_rng_state_all(cuda)
        elif torch.cuda.is_initialized():  # within the block: as the caller's seed would have left it
            torch.cuda.manual_seed_all(seed)
        if mps is not None:
            torch.mps.set_rng_state(mps)


__all__ = ["kept_random_state", "seed_device"]
