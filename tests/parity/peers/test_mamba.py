"""Mamba against the layer of transformers (its sequential form): outputs, all gradients, decoding from a cache."""

from __future__ import annotations

import pytest
import torch
from cached_layers import agree, close, moved
from transformers import JambaConfig, MambaConfig
from transformers.models.jamba.modeling_jamba import JambaMambaMixer
from transformers.models.mamba.modeling_mamba import MambaMixer

import zoo

D = 32


def weights_of(theirs: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Our names for the parameters of `theirs`: a rename, and the convolution without its middle axis."""
    names = {"conv1d": "conv", "dt_layernorm": "norms.0", "b_layernorm": "norms.1", "c_layernorm": "norms.2"}
    weights = {}
    for name, x in theirs.named_parameters():
        module, _, rest = name.partition(".")
        ours = f"{names.get(module, module)}.{rest}" if rest else module
        weights[ours] = x.squeeze(1) if ours == "conv.weight" else x
    return weights


def pair(options: dict, ours: dict):
    config = MambaConfig(hidden_size=D, num_hidden_layers=1, **options)
    theirs = moved(MambaMixer(config, 0))
    mixer = zoo.create_mixer("mamba", D, **ours)
    mixer.load_state_dict(weights_of(theirs))
    return mixer, theirs, config


def agree_in_gradients(mixer, theirs, steps: int = 70) -> None:
    x, w = (torch.randn(2, steps, D, generator=torch.Generator().manual_seed(i)) for i in (3, 4))
    for module in (mixer, theirs):
        (module(x)[0] * w if module is mixer else module(x) * w).sum().backward()
    gradients = dict(mixer.named_parameters())
    ours = {name: p.grad for name, p in gradients.items()}
    for p in theirs.parameters():
        p.data = p.grad
    for name, g in weights_of(theirs).items():
        close(ours[name], g, f"gradient of {name}")


OPTIONS = [
    ({}, {}),
    ({"state_size": 5, "conv_kernel": 3, "expand": 3}, {"d_state": 5, "conv_size": 3, "expand": 3}),
    ({"use_bias": True, "use_conv_bias": False, "time_step_rank": 7}, {"bias": True, "conv_bias": False, "dt_rank": 7}),
]


@pytest.mark.parametrize("backend", ["auto", "chunked", "reference"])
@pytest.mark.parametrize(("options", "ours"), OPTIONS)
def test_mamba(options, ours, backend):
    mixer, theirs, config = pair(options, ours | {"backend": backend})
    agree(mixer, theirs, config)
    agree_in_gradients(mixer, theirs)


def test_inits():
    config = MambaConfig(hidden_size=D, num_hidden_layers=1)
    theirs, ours = weights_of(MambaMixer(config, 0)), dict(zoo.create_mixer("mamba", D).named_parameters())
    assert {name: p.shape for name, p in ours.items()} == {name: p.shape for name, p in theirs.items()}
    for name in ("A_log", "D"):
        torch.testing.assert_close(ours[name], theirs[name])


def test_the_norms_of_jamba():
    config = JambaConfig(hidden_size=D, mamba_d_state=8, mamba_dt_rank=4, use_mamba_kernels=False, num_hidden_layers=1)
    theirs = moved(JambaMambaMixer(config, 0))
    mixer = zoo.create_mixer("mamba(inner_norm=True, d_state=8, dt_rank=4)", D)
    mixer.load_state_dict(weights_of(theirs))
    x = torch.randn(2, 70, D, generator=torch.Generator().manual_seed(1))
    close(mixer(x)[0], theirs(x), "outputs")
    agree_in_gradients(mixer, theirs)
