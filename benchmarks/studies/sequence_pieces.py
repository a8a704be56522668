"""Sequences cut over processes: the lengths that fit into memory, the bytes that move, and a model of larger machines.

    python -m zoo.benchmarks.studies.sequence_pieces [--lengths 4096 8192 16384] [--limit 1073741824]

*Lengths*: a training step (forward and backward) of one row by 1 and by 4 processes, each held to 1 GiB of data
(RLIMIT_DATA, which counts all private memory, that of Python and torch too). Linux only.

*Bytes*: what one layer of a word sends in a training step of one row, over 4 pieces, at two lengths; counted in
`zoo.pieces`, of the process that sends most. `predicted` is the formula that the model below uses. And what a process
sends in a training step of a layer whose experts several share out: counted in what it gives to torch.

*Model*: bytes that a GPU sends in a step, over the bandwidth of its link, for DDP, FSDP, experts and cut sequences. It
is arithmetic: nothing overlaps and no message has a latency, and no figure of it was measured on GPUs.
"""

from __future__ import annotations

import argparse
import copy
import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import torch

import zoo
from zoo.benchmarks.studies.harness import Data, Study, facts, free_port, shown_machine, table
from zoo.core.errors import UsageError
from zoo.pieces import Pieces, ProcessLink, in_threads, piece_sizes
from zoo.protocol import Context, Mixer
from zoo.training.experts import Experts

PATTERN, WIDTH = "2*(gated_deltanet swiglu) gqa swiglu", 256
WORDS: tuple[str, ...] = (
    "gqa",
    "mla",
    "swa(window=64)",
    "linear_attention",
    "gla",
    "mamba",
    "mamba2",
    "mlstm",
    "gated_deltanet",
    "rwkv7",
)
WORDS += ("rg_lru", "short_conv", "lstm")
ATTENTION = ("gqa", "mla")
SHORT, LONG, N, COUNTED_WIDTH = 256, 1024, 4, 64
EXPERTS = "moe(n_experts=8, top_k=2)"
LARGE_EXPERTS = "moe(n_experts=128, top_k=8)"
LINK = 50e9  # bytes a second each way: 400 Gbit/s, one network card a GPU
MODEL: dict[str, Any] = {"d_model": 4096, "layers": 32, "parameters": 7e9, "length": 2**20}
NO_MEMORY = 3  # exit status of a child
SECONDS = 900.0  # for a child
GPUS = (8, 64, 256, 1024)


# ---- lengths


def child(length: int, limit: int) -> int:
    """A training step of one row in this process and its fellows; NO_MEMORY where it does not suffice."""
    import resource

    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = zoo.create_model(PATTERN, d_model=WIDTH, vocab_size=256)
    pieces = None
    if size > 1:
        torch.distributed.init_process_group("gloo")
        pieces = Pieces(rank, piece_sizes(length, size), ProcessLink(range(size)))
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    try:
        tokens = torch.arange(length)[None] % 256
        cut = slice(None) if pieces is None else pieces.steps
        logits, _ = model(tokens[:, cut], None, Context(pieces=pieces))
        targets = tokens.roll(-1, 1)[:, cut].flatten()
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets, reduction="sum") / length
        loss.backward()
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, MemoryError) or "alloc" in str(error).lower():
            return NO_MEMORY
        raise
    if size > 1:
        torch.distributed.barrier()  # until the others have received what this one has sent
    print(loss.item())
    return 0


def started(n: int, *words: str) -> tuple[list[int], list[str]]:
    """Exit statuses and outputs of n processes that run a part of this file and can meet."""
    common = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(n), "OMP_NUM_THREADS": "1"}
    pipe = subprocess.PIPE
    command = [sys.executable, "-m", "zoo.benchmarks.studies.sequence_pieces", *words]
    processes = [
        subprocess.Popen(command, env=os.environ | common | {"RANK": str(r)}, stdout=pipe, stderr=pipe, text=True)
        for r in range(n)
    ]
    try:
        outputs = [process.communicate(timeout=SECONDS)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [process.returncode for process in processes], outputs


def fits(length: int, n: int, limit: int) -> Data:
    """Whether a step of this length fits into n processes, and the sum of their losses."""
    statuses, outputs = started(n, "child", str(length), str(limit))
    if any(statuses) and NO_MEMORY not in statuses:  # where one has no memory, the others lose their connection
        raise UsageError(f"A step of {length} tokens in {n} processes failed otherwise: statuses {statuses}.")
    whole = not any(statuses)
    return {"length": length, "processes": n, "fits": whole} | ({"loss": sum(map(float, outputs))} if whole else {})


# ---- bytes


def counted(word: str, length: int, n: int = N, width: int = COUNTED_WIDTH) -> list[int]:
    """Bytes that each of n processes sends in a training step of one row of one layer, in float32."""
    torch.manual_seed(0)
    mixer: Any = zoo.create_mixer(word, d_model=width)
    x = torch.randn(1, length, width)

    def sent(pieces: Pieces) -> int:
        own, given = copy.deepcopy(mixer), x[:, pieces.steps].clone().requires_grad_()
        own(given, None, Context(pieces=pieces))[0].sum().backward()
        return pieces.sent

    return in_threads(n, length, sent)


def predicted(mixer: Mixer, length: int, n: int, size: int = 4) -> float:
    """The most bytes that one of n processes sends in a training step of one row of a layer.

    Of a recurrence: its state forward, and that state's gradient backward. Of attention over all steps: process r of 0
    to n - 1 sends the keys and values of r + 1 pieces, twice, and the gradients of r pieces. Process n - 2 sends most.
    """
    name = mixer.name
    dtype = {4: torch.float32, 2: torch.bfloat16}[size]
    if name in ATTENTION:
        token = (mixer.state_bytes(1, 1024, dtype) - mixer.state_bytes(1, 512, dtype)) / 512
        piece = token * length / n
        return 2 * (n - 1) * piece + (n - 2) * piece * 4 / size
    if name == "swa":
        rows = mixer.config.window - 1
        token = (mixer.state_bytes(1, 2 * rows, dtype) - 8) / (rows + 1)
        return rows * token * (2 + 4 / size)
    return 2.0 * mixer.state_bytes(1, length, dtype)


def expert_child(length: int) -> int:
    """Print the bytes that this process sends in a training step of a layer whose experts all processes share out."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    rank, sent, original = torch.distributed.get_rank(), [0], torch.distributed.all_to_all_single

    def counting(output: torch.Tensor, input: torch.Tensor, received: Any = None, given: Any = None, **how: Any) -> Any:
        own = len(input) // torch.distributed.get_world_size() if given is None else given[rank]
        sent[0] += (len(input) - own) * input[:1].nbytes
        return original(output, input, received, given, **how)

    torch.distributed.all_to_all_single = counting  # type: ignore[assignment]
    torch.manual_seed(0)
    mixer = zoo.create_mixer(EXPERTS, d_model=COUNTED_WIDTH)
    Experts(mixer, torch.distributed.group.WORLD, None, torch.device("cpu"))
    x = torch.randn(N, length, COUNTED_WIDTH)[rank : rank + 1].clone().requires_grad_()
    mixer(x)[0].sum().backward()
    print(sent[0])
    torch.distributed.barrier()
    return 0


def experts_counted(length: int) -> float:
    """Bytes that each of N processes sends, on average, for `length` tokens of its own."""
    statuses, outputs = started(N, "experts", str(length))
    if any(statuses):
        raise UsageError(f"A layer of {N} processes failed: statuses {statuses}.")
    return sum(map(int, outputs)) / N


def experts_predicted(config: Any, width: int, tokens: float, n: int, size: int = 4) -> float:
    """The same by arithmetic: rows there and back, forward and backward, where all experts are chosen alike."""
    return 4 * config.top_k * width * tokens * (n - 1) / n * size


# ---- larger machines


def modelled(word: str, n: int) -> Data:
    """Seconds on the link, a step of one row of MODEL's length over n GPUs, by how they share the work."""
    m = MODEL
    with torch.device("meta"):
        mixer: Any = zoo.create_mixer(word, d_model=m["d_model"])
        large: Any = zoo.create_mixer(LARGE_EXPERTS, d_model=m["d_model"])
    share = (n - 1) / n
    ddp, fsdp = 2 * share * m["parameters"] * 4, 3 * share * m["parameters"] * 2
    return {
        "word": word,
        "gpus": n,
        "ddp": ddp / LINK,
        "fsdp": fsdp / LINK,
        "experts": m["layers"] * experts_predicted(large.config, m["d_model"], m["length"] / n, n, size=2) / LINK,
        "sequence": m["layers"] * predicted(mixer, m["length"], n, size=2) / LINK,
        "sequence_bytes": m["layers"] * predicted(mixer, m["length"], n, size=2),
    }


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--lengths", type=int, nargs="*", default=[4096, 8192, 16384], help="tokens of the row")
    parser.add_argument("--limit", type=int, default=2**30, help="bytes of data of each process")


def measure(arguments: argparse.Namespace, data: Data) -> Iterator[Data]:
    rows = []
    for word in WORDS:
        mixer: Any = zoo.create_mixer(word, d_model=COUNTED_WIDTH)
        short, long = (max(counted(word, length)) for length in (SHORT, LONG))
        serial = not mixer.traits.cuts_in_ops
        rows.append({"word": word, "short": short, "long": long, "serial": serial} | {
            "predicted": predicted(mixer, LONG, N)
        })  # fmt: skip
        data = {**data, "machine": facts(), "bytes": rows}
    layer: Any = zoo.create_mixer(EXPERTS, d_model=COUNTED_WIDTH)
    data["experts"] = {
        "weights": sum(layer.get_parameter(name).nbytes for name in layer.expert_weights),
        "rows": [
            {
                "tokens": length,
                "sent": experts_counted(length),
                "predicted": experts_predicted(layer.config, COUNTED_WIDTH, length, N),
            }
            for length in (SHORT, LONG)
        ],
    }
    data = {**data, "model": [modelled(word, n) for word in WORDS[:-1] for n in GPUS]}
    yield data
    lengths: list[Data] = [row for row in data.get("lengths", []) if row["length"] not in arguments.lengths]
    for length in arguments.lengths:
        for n in (1, N):
            lengths.append(fits(length, n, arguments.limit))
            data = {**data, "lengths": lengths, "limit": arguments.limit}
            yield data


def _units(n: float) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if n >= size:
            return f"{n / size:.3g} {unit}"
    return f"{n:.0f} B"


def _seconds(s: float) -> str:
    return f"{s:.2f} s" if s >= 1 else f"{1e3 * s:.3g} ms" if s >= 1e-3 else f"{1e6 * s:.3g} us"


def markdown(data: Data) -> str:
    m, lines = MODEL, ["# Sequences cut over processes", ""]
    lines += [
        "`python -m zoo.benchmarks.studies.sequence_pieces` measures this page again; its first lines say how.",
        "",
    ]
    lines += [f"Machine: {shown_machine(data['machine'])}. No GPU.", ""]
    if found := data.get("lengths"):
        lines += ["## Lengths that one process cannot train", ""]
        lines += [
            f"`{PATTERN}` at width {WIDTH}, one row, float32, {data['limit'] / 2**30:g} GiB for each process.",
            "",
        ]
        each = sorted({row["length"] for row in found})
        said = {(r["length"], r["processes"]): f"yes, loss {r['loss']:.4f}" if r["fits"] else "no" for r in found}
        rows = [[f"{n:,}", said.get((n, 1), "not tried"), said.get((n, N), "not tried")] for n in each]
        lines += [*table(["tokens", "fits into one process", f"fits into {N} processes"], rows), ""]
    lines += ["## Bytes that move", ""]
    about = (
        f"One layer of width {COUNTED_WIDTH}, one row, {N} pieces, float32: what the process that sends most sends in a"
    )
    lines += [f"{about} training step, and what the model predicts at {LONG:,} tokens.", ""]
    lines += table(
        ["word", f"{SHORT} tokens", f"{LONG:,} tokens", "predicted", "ratio"],
        [
            [
                f"`{r['word']}`" + (" (in turns)" if r["serial"] else ""),
                _units(r["short"]),
                _units(r["long"]),
                _units(r["predicted"]),
                f"{r['predicted'] / r['long']:.3f}",
            ]
            for r in data["bytes"]
        ],
    )
    low, *_, high = sorted(r["predicted"] / r["long"] for r in data["bytes"])
    lines += ["", f"The predicted bytes are {100 * low:.1f} to {100 * high:.1f} % of those that were counted.", ""]
    experts = data["experts"]
    gradients = 2 * (N - 1) / N * experts["weights"]
    lines += ["## Experts that are shared out", ""]
    about = f"One layer `{EXPERTS}` of width {COUNTED_WIDTH}, {N} processes with as many tokens each, float32: what a"
    lines += [
        f"{about} process sends in a training step, the mean of all, and what DDP sends of all experts' gradients.",
        "",
    ]
    lines += table(
        ["tokens of a process", "sent", "predicted", "ratio", "DDP, by arithmetic"],
        [
            [
                f"{r['tokens']:,}",
                _units(r["sent"]),
                _units(r["predicted"]),
                f"{r['predicted'] / r['sent']:.3f}",
                _units(gradients),
            ]
            for r in experts["rows"]
        ],
    )
    lines += ["", *TOLD_OF_EXPERTS, ""]
    lines += ["## A model of larger machines", "", "Arithmetic: no figure of this table was measured on GPUs.", ""]
    about = f"{m['parameters'] / 1e9:g} billion parameters, {m['layers']} layers of width {m['d_model']:,}, one row of"
    about = (
        f"{about} {m['length']:,} tokens, {LINK / 1e9:g} GB/s for each GPU in each direction. Seconds in a step that"
    )
    lines += [f"{about} a GPU spends sending, if nothing else slows it down:", ""]
    by_gpus = {r["gpus"]: r for r in data["model"]}
    modes = (("DDP, gradients in float32", "ddp"), ("FSDP, weights in bfloat16", "fsdp"))
    rows = [[told, *(_seconds(by_gpus[n][key]) for n in GPUS)] for told, key in modes]
    rows.append([f"experts shared out, `{LARGE_EXPERTS}`", *(_seconds(by_gpus[n]["experts"]) for n in GPUS)])
    for word in dict.fromkeys(r["word"] for r in data["model"]):
        found = {r["gpus"]: r for r in data["model"] if r["word"] == word}
        rows.append([f"cut sequence, `{word}`", *(_seconds(found[n]["sequence"]) for n in GPUS)])
    lines += table(["what is sent", *(f"{n:,} GPUs" for n in GPUS)], rows)
    lines += ["", *TOLD, ""]
    return "\n".join(lines)


TOLD_OF_EXPERTS = """\
Predicted are 4 k D (n - 1) / n numbers for a token of width D that chooses k experts: rows there and back, forward and backward.
They do not depend on the number of experts; the gradients that DDP sends do not depend on the number of tokens. The rest of what
was counted are the numbers of rows, and choices that are not even.""".splitlines()  # noqa: E501

TOLD = """\
DDP and FSDP send the same whatever the mixer is. A cut sequence is trained with one of them, so that a step sends the sum of
two rows. DDP sends each gradient 2 (n - 1) / n times. FSDP gathers the weights twice and scatters the gradients once, each
with (n - 1) / n of the bytes over NCCL. Experts that all GPUs share out send the rows of length / n tokens of each GPU, in
bfloat16, and then DDP and FSDP send nothing of the experts. The formulas of cut sequences were checked against the bytes counted above; those of DDP
and FSDP are the published ones of their algorithms. What the model leaves out: latency (the chain of states has n hops, once in the
forward and once in the backward pass, because later layers follow at the same distance), sends that overlap with computation,
and links that are shared.""".splitlines()  # noqa: E501

STUDY = Study("sequence_pieces", __doc__, arguments, measure, markdown)

if __name__ == "__main__":
    if sys.argv[1:2] == ["child"]:
        sys.exit(child(*map(int, sys.argv[2:4])))
    if sys.argv[1:2] == ["experts"]:
        sys.exit(expert_child(int(sys.argv[2])))
    STUDY.main()
