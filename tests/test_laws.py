"""Every registered mixer, and the wrapper, under every law, in every one of its `law_cases`."""

from __future__ import annotations

import functools

import pytest
import torch

import zoo
from zoo.laws import LAWS, Case, Check, cases_of, noise, plan
from zoo.laws.cases import LENGTH, WIDTH
from zoo.laws.stand_ins import LAWS_OF_RESIDUALS, stand_in_class
from zoo.protocol import Place, mixers, norms
from zoo.residual import residuals

NAMES = mixers.names()


def over_all(test):
    return pytest.mark.parametrize("law", LAWS)(pytest.mark.parametrize("name", NAMES)(test))


REFUSED = {"ltc": {"positivity": "clip"}, "m2rnn": {"gradient_clipping": 0.1}, "neural_ode": {"adjoint": True}}
"""Options without second derivatives, which say so by name."""
NOT_TRANSFORMED = {"positivity": "clip", "adjoint": True, "solver": "dopri5", "gradient_clipping": 0.1}
"""Options under which torch.func is refused by name, beside a backend that was asked for."""


@functools.cache
def cases(name: str, device: str = "cpu") -> list[Case]:
    return cases_of(mixers[name], device)


def judge(checks: list[Check]) -> None:
    """All checks, and everything that they find broken; what is refused, by options that may refuse it alone."""
    findings = [check.find() for check in checks]
    broken = [str(finding) for finding in findings if finding.broken]
    assert not broken, "\n".join(broken)
    for check, finding in zip(checks, findings, strict=True):
        if finding.law.number == 13:
            refused = refusals(check)
            assert bool(finding.note) == bool(refused), finding
            assert not refused or f"{refused[0]}=" in finding.note


def refusals(check: Check) -> list[str]:
    """The options for which a derivative is refused."""
    options = check.case.options
    if check.law.name != "transforms":
        return [
            option for option, value in REFUSED.get(check.case.mixer.name, {}).items() if options.get(option) == value
        ]
    if options.get("backend", "reference") != "reference":
        return ["backend"]
    return [option for option, value in NOT_TRANSFORMED.items() if options.get(option) == value]


@over_all
def test_law(name, law):
    judge(plan(LAWS[law], cases(name)))


@pytest.mark.slow
@over_all
def test_law_in_every_case(name, law):
    """But for those checks that `test_law` has already made."""
    done = plan(LAWS[law], cases(name))
    judge([check for check in plan(LAWS[law], cases(name), thorough=True) if check not in done])


@over_all
@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_law_on_a_gpu(name, law):
    judge(plan(LAWS[law], cases(name, "cuda")[:1]))


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_second_derivatives_without_kernels(name, monkeypatch):
    monkeypatch.setenv("ZOO_KERNELS", "off")
    judge(
        [
            check._replace(setting={"n": 70, "n_continuous": 40})
            for check in plan(LAWS["second derivatives of kernels"], cases(name))
        ]
    )


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_what_no_file_holds_is_there_without_inits(name, poisoned_memory):
    """As a model in pieces is loaded: from the meta device, with copies of what a checkpoint holds alone."""
    for case in cases(name):
        whole = case.build(torch.float32).eval()
        with torch.device("meta"):
            place = Place(layer=1, n_layers=3, causal=case.causal, length=LENGTH)
            loaded = case.mixer(WIDTH, whole.config, place=place).eval()
        loaded.to_empty(device="cpu")
        for key, tensor in loaded.state_dict().items():
            tensor.copy_(whole.state_dict()[key])
        for key, buffer in whole.named_buffers():
            assert torch.equal(loaded.get_buffer(key), buffer), f"{case}: {key}"
        x, tokens = noise(2, 5, WIDTH).float(), torch.arange(10).view(2, 5)
        mine, theirs = (m(x, None, zoo.Context(tokens=tokens))[0] for m in (loaded, whole))
        assert torch.equal(mine, theirs), case


QUICK = [law for law in LAWS_OF_RESIDUALS if law not in ("compilation", "transforms")]
"""The others trace graphs, which takes half a second each."""


def of_norms_and_residual_kinds(test):
    names = [pytest.param(registry, name, id=name) for registry in (norms, residuals) for name in registry.names()]
    return pytest.mark.parametrize(("registry", "name"), names)(test)


@of_norms_and_residual_kinds
def test_laws_of_norms_and_residual_kinds(registry, name):
    own = cases_of(stand_in_class(registry[name]))
    judge([check for law in QUICK if law in own[0].mixer.laws for check in plan(LAWS[law], own)])


@pytest.mark.slow
@of_norms_and_residual_kinds
def test_laws_of_norms_and_residual_kinds_in_every_case(registry, name):
    own = cases_of(stand_in_class(registry[name]))
    judge([check for law in own[0].mixer.laws for check in plan(LAWS[law], own, thorough=True)])


def test_every_mixer_is_here():
    assert set(zoo.list_mixers()) <= set(NAMES)
    assert {"bidirectional"} == set(NAMES) - set(zoo.list_mixers())


@pytest.mark.parametrize("name", NAMES)
def test_cases_are_created_by_name(name):
    for case in cases(name):
        mixer = zoo.create_mixer(name, WIDTH, place=Place(causal=case.causal, length=LENGTH), **case.options)
        assert type(mixer) is case.mixer
        assert mixer.config == case.build().config
        traits = mixer.traits
        assert not traits.couples_rows or (name, case.options.get("solver")) == ("neural_ode", "dopri5")
        assert bool(traits.work_varies) == bool(case.options.get("n_zero_experts"))
