"""What `zoo.ops` exports, and that its functions have names of their own."""

from __future__ import annotations

import importlib.util
import pathlib

import torch

import zoo.ops
from zoo.ops.derivatives import constant_in_graphs


def test_no_function_has_the_name_of_a_module():
    for name in zoo.ops.__all__:
        assert importlib.util.find_spec(f"zoo.ops.{name}") is None, name


def test_every_op_is_exported():
    files = pathlib.Path(zoo.ops.__file__).parent.glob("_[a-z]*.py")
    ops = {file.stem.removeprefix("_") for file in files}
    assert len(ops) > 15
    assert ops <= set(zoo.ops.__all__)
    assert all(callable(getattr(zoo.ops, name)) for name in ops)


def test_constants_in_graphs_have_the_mark_that_torch_sets():
    def function() -> None:
        """Any."""

    ours = vars(constant_in_graphs(function)).copy()
    vars(function).clear()
    assert ours
    assert ours == vars(torch.compiler.assume_constant_result(function))
