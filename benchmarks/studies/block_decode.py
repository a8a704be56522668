"""Time of a token that is written by block diffusion, against one that is written left to right.

    python -m zoo.benchmarks.studies.block_decode [--words gqa,mamba2,gated_deltanet] [--context 256] [--tokens 32]
        [--block 8] [--passes 8,4,2,1] [--repeats 5]

One row, random weights, float32, one thread. A model continues the same prompt left to right (`generate`), and by
`block_diffusion` with a number of passes for a block, each from a copy of the state after the finished blocks. Reading
the prompt is part of all times. All forms of a word take turns in one process; the median of a form's times is kept.
How good the tokens are is not measured: that is a matter of training.
"""

from __future__ import annotations

import argparse
import os
from collections import deque
from collections.abc import Callable, Iterator

import torch

import zoo
from zoo.benchmarks.studies.harness import Data, Study, facts, table
from zoo.benchmarks.studies.measure import medians
from zoo.objectives.block_diffusion import BlockDiffusion
from zoo.tasks import create_task

N_LAYERS, WIDTH = 4, 128


def costs(word: str, context: int, tokens: int, block: int, passes: list[int], repeats: int) -> dict[str, float]:
    """Milliseconds of a new token by form: "left to right", or the number of passes for a block."""
    torch.manual_seed(0)
    task = create_task("text", seq_len=context + tokens)
    prompt = torch.randint(task.vocab_size, (1, context))
    mask = task.vocab_size
    model = zoo.create_model(f"{N_LAYERS}*({word} swiglu)", d_model=WIDTH, vocab_size=mask + 1).eval()
    rows = torch.cat([prompt, torch.full((1, tokens), mask)], 1)

    def written(n: int) -> Callable[[], object]:
        config = BlockDiffusion.Config(block_length=block, steps=n, order="confidence")
        objective = BlockDiffusion(config, task, causal=True)
        return lambda: deque(objective.unmask(model, rows, rows == mask, first=context), maxlen=0)

    forms: dict[str, Callable[[], object]] = {"left to right": lambda: model.generate(prompt, tokens, temperature=0)}
    forms |= {str(n): written(n) for n in passes}
    return {name: 1e3 * seconds / tokens for name, seconds in medians(forms, repeats).items()}


def markdown(data: Data) -> str:
    at, passes = data["machine"], [str(n) for n in data["passes"]]
    head = ["word", "left to right, ms a token", *(f"{n} {'passes' if n != '1' else 'pass'}" for n in passes)]
    rows = [
        [f"`{word}`", f"{ms['left to right']:.2f}", *(f"{ms[n] / ms['left to right']:.2f}" for n in passes)]
        for word, ms in data["words"].items()
    ]
    lines = [
        "# Decoding by block diffusion",
        "",
        f"{at['cpu']}, {at['threads']} thread, torch {at['versions']['torch']}.",
        f"The load average of the {at['cpus']} cores was {data['load']:.0f}: compare figures of one row only.",
        f"{N_LAYERS} layers `(WORD swiglu)` of width {WIDTH}, one row, float32, random weights.",
        f"{data['tokens']} tokens follow a prompt of {data['context']}, in blocks of {data['block']}.",
        "The columns of passes are the time of a token over that of the same model left to right (below 1: faster),",
        "for this number of passes for a block. Each pass reads the block twice from the state after the finished",
        "blocks, and a finished block is read once more. The prompt is read within all times. Median of",
        f"{data['repeats']} interleaved runs; the quality of the tokens is not measured.",
        "",
        *table(head, rows),
        "",
        "`python -m zoo.benchmarks.studies.block_decode --out docs/results` measures again.",
    ]
    return "\n".join(lines) + "\n"


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--words", default="gqa,mamba2,gated_deltanet", help="by commas")
    parser.add_argument("--context", type=int, default=256, help="tokens of the prompt")
    parser.add_argument("--tokens", type=int, default=32, help="new tokens")
    parser.add_argument("--block", type=int, default=8, help="tokens of a block")
    parser.add_argument("--passes", default="8,4,2,1", help="passes for a block, by commas")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)


def measure(args: argparse.Namespace, old: Data) -> Iterator[Data]:
    torch.set_num_threads(args.threads)
    passes, found = [int(n) for n in args.passes.split(",")], {}
    for word in args.words.split(","):
        found[word] = costs(word, args.context, args.tokens, args.block, passes, args.repeats)
        print(word, {name: float(f"{ms:.3g}") for name, ms in found[word].items()}, flush=True)
        sizes = {"context": args.context, "tokens": args.tokens, "block": args.block, "repeats": args.repeats}
        load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
        yield {"machine": facts(), "load": load, **sizes, "passes": passes, "words": found}


STUDY = Study("block_decode", __doc__, arguments, measure, markdown)

if __name__ == "__main__":
    STUDY.main()
