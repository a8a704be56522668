"""Time of a decoded token in this tree, against another checkout of it, in turns.

    python -m zoo.benchmarks.studies.decode_turns OTHER [--patterns "4*(mha swiglu)" ...] [--turns 15] [--tokens 60]

OTHER is the folder of another checkout, as `git worktree add` makes one of an earlier commit. A process of each, on one
thread, makes the same model of width 128, reads the same prompt of 16 tokens and writes tokens greedily (`generate`),
one after the other, many times. What is kept are the milliseconds of a token, prompt included, and the ratios of the
turns with their quartiles. Processor time is taken, which other work on the machine changes less than the clock.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from zoo.benchmarks.studies.harness import Data, Study, facts, load, quartiles, shown_load, table
from zoo.core.errors import UsageError

PATTERNS = ("4*(gated_deltanet swiglu)", "4*(mha swiglu)", "4*mamba2", "4*(rwkv7 rwkv_channel_mix)")
WIDTH, PROMPT = 128, 16
WRITER = """
import sys, time, torch, zoo
torch.set_num_threads(1)
torch.manual_seed(0)
pattern, width, prompt, tokens = sys.argv[1], *map(int, sys.argv[2:])
model = zoo.create_model(pattern, d_model=width, vocab_size=256).eval()
prompt = torch.randint(0, 256, (1, prompt))
model.generate(prompt, max_new_tokens=tokens)
print("ready", flush=True)
for _ in sys.stdin:
    start = time.process_time()
    model.generate(prompt, max_new_tokens=tokens)
    print(1e3 * (time.process_time() - start) / tokens, flush=True)
"""


class Writer:
    """A process that decodes with the package of one checkout."""

    def __init__(self, tree: Path, pattern: str, tokens: int):
        environment = {**os.environ, "PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-c", WRITER, pattern, *map(str, (WIDTH, PROMPT, tokens))]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, cwd=tree, env=environment, stdin=pipe, stdout=pipe, text=True)
        if self._line() != "ready":
            raise UsageError(f"{tree} does not decode {pattern!r}: is it a checkout of this project?")

    def _line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def milliseconds(self) -> float:
        """Of one token."""
        assert self.process.stdin is not None
        print(file=self.process.stdin, flush=True)
        return float(self._line())

    def close(self) -> None:
        """End the process."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def compared(other: Path, own: Path, pattern: str, turns: int, tokens: int) -> Data:
    """Medians of the milliseconds of both, and the quartiles of other / own."""
    writers = [Writer(tree, pattern, tokens) for tree in (other, own)]
    pairs = [(writers[0].milliseconds(), writers[1].milliseconds()) for _ in range(turns)]
    for writer in writers:
        writer.close()
    others, own_times = zip(*pairs, strict=True)
    before, after = statistics.median(others), statistics.median(own_times)
    return {"other": before, "own": after, "ratio": quartiles(others, own_times)}


def markdown(data: Data) -> str:
    """The report as a page."""
    at = data["machine"]
    rows = [
        [
            f"`{pattern}`",
            f"{row['other']:.2f}",
            f"{row['own']:.2f}",
            "{1:.2f} ({0:.2f} to {2:.2f})".format(*row["ratio"]),
        ]
        for pattern, row in data["patterns"].items()
    ]
    lines = [
        "# A decoded token, before and now",
        "",
        f"{at['cpu']}, 1 thread, torch {at['versions']['torch']}{shown_load(data.get('load'))}.",
        f"In float32, width {WIDTH}, one row, {data['tokens']} tokens after a prompt of {PROMPT}, which is part of all "
        "times. Nothing is compiled by torch.",
        f"Milliseconds of processor time for a token, the median of {data['turns']} turns, at commit {data['commit']} "
        "and in this tree; and how many times as long the former takes, with quartiles.",
        "",
        *table(["model", data["commit"], "this tree", "ratio"], rows),
        "",
        f"`git worktree add --detach ../before {data['commit']}` and `python -m zoo.benchmarks.studies.decode_turns "
        "../before` measure again.",
    ]
    return "\n".join(lines) + "\n"


def measure(args: argparse.Namespace, old: Data) -> Iterator[Data]:
    """A row for each pattern."""
    own = Path(__file__).resolve().parents[2]
    if not (args.other / "zoo" / "__init__.py").is_file():
        raise UsageError(f"{args.other} is no checkout of this project: it should be the folder that holds zoo/.")
    found = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=args.other, capture_output=True, text=True)
    report: Data = {"machine": facts(), "commit": found.stdout.strip() or args.other.name, "patterns": {}}
    report |= {"turns": args.turns, "tokens": args.tokens, "load": load()}
    if all(old.get(key) == report[key] for key in ("commit", "turns", "tokens")):
        report["patterns"] = old["patterns"]
    for pattern in args.patterns:
        report["patterns"][pattern] = row = compared(args.other.resolve(), own, pattern, args.turns, args.tokens)
        print(f"{pattern:32} {row['other']:.2f} -> {row['own']:.2f} ms, {row['ratio'][1]:.2f} times")
        yield report


def arguments(parser: argparse.ArgumentParser) -> None:
    """Those of the study."""
    parser.add_argument("other", type=Path, help="folder of another checkout")
    parser.add_argument("--patterns", nargs="+", default=PATTERNS)
    parser.add_argument("--turns", type=int, default=15)
    parser.add_argument("--tokens", type=int, default=60)


STUDY = Study("decode_turns", __doc__, arguments, measure, markdown)

if __name__ == "__main__":
    STUDY.main()
