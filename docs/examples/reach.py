"""A benchmark of one file: how far back a layer looks before it has learned anything."""

from functools import partial

import torch

from zoo.benchmarks import (
    Axis,
    Benchmark,
    BenchmarkOptions,
    Curve,
    Head,
    Lengths,
    Plot,
    Width,
    cell,
    figure,
    option,
    pivot,
    register,
    spread,
)

GRADIENT = Curve(
    "gradient", Axis("share of the gradient", log=True), "distance", Axis("steps back", "length", log=True)
)


@register("reach")
class Reach(Benchmark):
    """How much the last output of an untrained layer depends on an input some steps back.

    The norm of the gradient of the last output with respect to that input, over the norm with respect to the last
    input.
    """

    class Config(BenchmarkOptions):
        width: Width = option(64, "Width of the layer.")
        distance: Lengths = option("1,4,16,64", "Steps back, by commas.")
        rows: int = option(16, "Random rows, whose median is taken.", least=1)

    title = "Reach"
    peers = False
    plots = (Plot("reach", "Reach", "Bars reach from the first quartile of the rows to the third.", (GRADIENT,)),)
    heads = (Head("reach", GRADIENT, "max"),)

    def cells(self, request):
        width = self.config.width
        request.check([width], max(self.config.distance) + 1)
        for subject in request.at(width):
            for distance in self.config.distance:
                setting = {"width": width, "distance": distance}
                yield cell(request, self.label(), subject, setting, partial(self.measure, request, subject, distance))

    def measure(self, request, subject, distance):
        """The figures of a cell, and further fields of its record."""
        layer, laws = request.built(subject, self.config.width, distance + 1)
        x = torch.randn(self.config.rows, distance + 1, self.config.width, device=request.device, requires_grad=True)
        y, _ = layer(x)
        (gradient,) = torch.autograd.grad(y[:, -1].square().sum(), x)
        norms = gradient.norm(dim=-1)
        return {"gradient": figure((norms[:, 0] / norms[:, -1]).tolist())}, {"laws": laws}

    @classmethod
    def tables(cls, found):
        return [pivot("Reach, by steps back", found, by_distance, lambda r: spread(r, "gradient", "{:.2g}".format))]


def by_distance(record):
    return record.setting["distance"]
