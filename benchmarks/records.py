"""What `zoo bench` writes: one JSON object a line, and tables of them.

`zoo bench X --out FOLDER` keeps `FOLDER/X.jsonl`, whose every line is one cell of a benchmark: one subject in one
setting. All keys are always there:

    benchmark   "throughput" | "memory" | "decode" | "long-context" | "mad"
    name        the subject: a word or a pattern ("mamba2", "short_conv mha"), or a peer ("torch.nn.LSTM")
    same        further names that stand for the same layer at this width: one row is theirs too
    layer       the word or pattern with what `zoo bench` settled in it, such as "mha(n_heads=4)"; of trainings, that of
                the whole model; "" of a peer
    peer        whether it is a public layer measured beside the zoo's
    setting     what the figures belong to, see below; with the benchmark, the name, precision, threads and device it is
                unique in a file
    status      "ok", or why there are no figures: "over budget" | "no memory" | "not offered" | "breaks a law" |
                "failed" | "not learned" | "stopped by the clock" (a training that had not learned when its steps, or
                its budget of seconds, ended)
    why         one line that explains any other status, else ""
    figures     {name of figure: {"value": median, "low": first quartile, "high": third quartile, "n": runs, "how": H}};
                H is "measured", or how else the value came about: "formula" (said by the layer, not measured) or
                "random cache" (measured from a key-value cache filled with random numbers, not by a prefill)
    slices      {name of slice: {value as text: {name of figure: number}}}, else {}
    chance      the accuracy on 2,048 test rows of always giving the answer that is most frequent in validation rows;
                null where nothing is answered
    conditions  what else was asked for: budget in seconds, repeats, test rows, seeds, learning rates
    laws        the checks that the subject passed in the same process before anything was measured
    n_parameters, precision ("float32" | "bfloat16"), threads, device ("cpu" or the GPU's name)
    backends    {op: [forms that ran]}, as in a run's `result.json`
    machine, versions, commit    as in a run's `result.json`
    date        when, in ISO 8601, UTC

Settings and figures of each benchmark (numbers are plain; sizes in bytes, rates in tokens a second):

    throughput    width, length, batch_size, direction ("train" | "forward"), compiled
                  tokens_per_second, seconds, matmul_share (of the machine's rate of large matrix products)
    memory        width, length, batch_size, part "training": peak_bytes (of a training step, over the same process
                  before it), bytes_per_token; part "state", with `length` the context: state_bytes
    decode        width, context, batch_size, part "prefill": tokens_per_second (all tokens over all seconds, with the
                  quartiles of its pieces); part "step": tokens_per_second, seconds; part "drift", with `context` the
                  number of single steps: error, state_error, rounding, grown_bytes
    long-context  task, options (of the task, in words), width, layers (of the whole model, {mixer} for the subject),
                  train_length, length (of the test): accuracy, exact, seconds, with slices such as `depth`; and one
                  line with length 0, for the whole: effective_length (the largest length tested whose median accuracy
                  is at least 85 %, with the same of the quartiles, 0 where theirs is at none), train_seconds,
                  train_steps, learned (the share of the seeds that reached 85 % on validation). Of a training that
                  had not learned there are no figures
    mad           task, variation ("baseline", or such as "vocab_size=32"), share (of the published training), width,
                  layers: accuracy, train_seconds, share_reached; and one line with task "average": accuracy (the mean
                  over tasks of the mean over their variations), with slices `task`, and `of` in the setting: of which
                  tasks, where not of all six. Short of the published training there are figures only of what was
                  learned (85 %)
"""

from __future__ import annotations

import dataclasses
import datetime
import functools
import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from zoo.core.errors import UsageError
from zoo.report.layers import joined
from zoo.training import machine

BENCHMARKS = ("throughput", "memory", "decode", "long-context", "mad")
OK = "ok"


@dataclass(frozen=True)
class Record:
    """One cell of a benchmark; the module's docstring says what each field holds."""

    benchmark: str
    name: str
    setting: dict[str, Any]
    same: list[str] = field(default_factory=list)
    layer: str = ""
    peer: bool = False
    status: str = OK
    why: str = ""
    figures: dict[str, dict[str, Any]] = field(default_factory=dict)
    slices: dict[str, Any] = field(default_factory=dict)
    chance: float | None = None
    conditions: dict[str, Any] = field(default_factory=dict)
    laws: list[str] = field(default_factory=list)
    n_parameters: int | None = None
    precision: str = "float32"
    threads: int = 0
    device: str = "cpu"
    backends: dict[str, list[str]] = field(default_factory=dict)
    machine: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    commit: str | None = None
    date: str = ""

    @property
    def key(self) -> tuple[Any, ...]:
        """What a later measurement of the same thing has in common with it."""
        return self.key_of(self.name)

    def key_of(self, name: str) -> tuple[Any, ...]:
        """The key of a record that is like it under another name."""
        place = self.precision, self.threads, self.device
        return self.benchmark, name, json.dumps(self.setting, sort_keys=True), *place

    @property
    def label(self) -> str:
        """Its row in a table: all its names."""
        return joined((self.name, *self.same)) + (" (peer)" if self.peer else "")

    def value(self, figure: str) -> float | None:
        """The median of a figure, None where it has none."""
        return self.figures[figure]["value"] if figure in self.figures else None

    def line(self) -> str:
        """The record as one line of JSON."""
        return json.dumps(dataclasses.asdict(self))


def figure(values: float | Sequence[float], how: str = "measured") -> dict[str, Any]:
    """A figure from one value or from those of several runs."""
    values = [float(v) for v in values] if isinstance(values, Sequence) else [float(values)]
    low, high = values[0], values[0]
    if len(values) > 1:
        low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return {"value": statistics.median(values), "low": low, "high": high, "n": len(values), "how": how}


@functools.cache
def _facts(device: str, threads: int) -> dict[str, Any]:
    described = machine.describe_machine(torch.device(device))
    return {
        "threads": threads,
        "device": described["device"],
        "machine": described,
        "versions": machine.versions(),
        "commit": machine.commit(),
    }


def record(benchmark: str, name: str, setting: Mapping[str, Any], *, device: str, **rest: Any) -> Record:
    """A record of this process, now, on a device ("cpu", "cuda", "mps")."""
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    return Record(benchmark, name, dict(setting), date=now, **_facts(device, torch.get_num_threads()), **rest)


def read(path: Path) -> list[Record]:
    """The records of a file, in order.

    Raises:
        UsageError: a file that cannot be read, or a line that is no record.
    """
    try:
        lines = path.read_text(encoding="utf-8").removesuffix("\n").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{str(path)!r} cannot be read: {error}.") from None
    found = []
    for n, line in enumerate(lines, 1):
        try:
            found.append(Record(**json.loads(line)))
        except (json.JSONDecodeError, TypeError):
            raise UsageError(f"{str(path)!r} is damaged at line {n}: expected what `zoo bench` writes.") from None
    return found


def merged(old: Iterable[Record], new: Iterable[Record]) -> list[Record]:
    """Records in the order of their first appearance; of two of the same key the later one.

    Old ones under a name that is now one of several of a new record's layer are left out.
    """
    new = list(new)
    renamed = {r.key_of(name) for r in new for name in r.same}
    return list({r.key: r for r in [*(r for r in old if r.key not in renamed), *new]}.values())


def write(path: Path, records: Iterable[Record]) -> None:
    """Write a file of records."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(r.line() + "\n" for r in records), encoding="utf-8")
