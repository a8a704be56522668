"""What the attention words remember of each token, and what a token costs at a context.

    python -m zoo.benchmarks.studies.attention_state [--words mla dsa] [--page docs/attention.md]

One layer of width 512 in float32, one row. State: bytes of the tensors that a state holds once it has read 2,048 and
4,096 tokens, beside what theory says; a window's has stopped growing by then. Compute: `flops_per_token`, the median
time of a step, and the time of a token within a piece of 256, read by `forward`, that ends at the context. For the
times, the rows of a state that has been read are repeated up to the context. Takes about a minute.
"""

from __future__ import annotations

import argparse
import pathlib
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

import zoo
from zoo.benchmarks.studies.harness import Data, Study, facts
from zoo.mixers.attention_parts import AttentionWord
from zoo.pattern import list_mixers, make_word, mixer_of
from zoo.report import static
from zoo.report.charts import Axis, Chart, Panel, Row, Series

WIDTH = 512
READ = (2048, 4096)
CONTEXTS = (1024, 4096, 16384, 65536)
PIECE, ROOM = 256, 64
SPECS = {
    "mha": "mha(n_heads=8)",
    "mqa": "mqa(n_heads=8)",
    "gqa": "gqa(n_heads=8, n_kv_heads=2)",
    "swa": "swa(n_heads=8, window=1024)",
    "mla": "mla(n_heads=8, kv_rank=128, nope_dim=64, rope_dim=32, v_dim=64)",
    "dsa": "dsa(n_heads=8, kv_rank=128, nope_dim=64, rope_dim=32, v_dim=64, top_k=512, index_heads=4, index_dim=32)",
}
THEORY: dict[
    str, tuple[str, Callable[[Any, int], int]]
] = {  # numbers after T tokens; H heads of K, G of keys and values
    "mha": ("2 H K T", lambda m, T: 2 * m.n_heads * m.head_dim * T),
    "mqa": ("2 K T", lambda m, T: 2 * m.head_dim * T),
    "gqa": ("2 G K T", lambda m, T: 2 * m.n_kv_heads * m.head_dim * T),
    "swa": ("2 G K window in all", lambda m, T: 2 * m.n_kv_heads * m.head_dim * min(T, m.window)),
    "mla": ("(r + P) T", lambda m, T: (m.kv_rank + m.rope_dim) * T),
    "dsa": ("(r + P + E) T", lambda m, T: (m.attention.kv_rank + m.attention.rope_dim + m.index_dim) * T),
}


def attention_words() -> list[str]:
    """Every registered word of attention, in the order of SPECS where they are in there."""
    names = [name for name in list_mixers() if issubclass(mixer_of(make_word(name, {}).config), AttentionWord)]
    order = list(SPECS)
    return sorted(names, key=lambda name: (order.index(name) if name in order else len(order), name))


def created(name: str) -> Any:
    torch.manual_seed(0)
    return zoo.create_mixer(SPECS.get(name, name), WIDTH)


@torch.no_grad()
def read_state(mixer: Any, n_tokens: int) -> Any:
    """The state after random tokens, with room for no more."""
    rng, state = torch.Generator().manual_seed(0), mixer.init_state(1, capacity=n_tokens)
    for start in range(0, n_tokens, PIECE):
        n = min(PIECE, n_tokens - start)
        _, state = mixer(torch.randn(1, n, WIDTH, generator=rng), state)
    return state


def remembered_bytes(state: Any) -> int:
    """Bytes of what a state remembers: all of its tensors but the count of steps."""
    return sum(x.nbytes for x in tree_leaves(state) if x.is_floating_point())


def theory_bytes(name: str, mixer: Any, n_tokens: int) -> int:
    """What those should be in float32; for words without a formula here, what the mixer says of itself."""
    if name in THEORY:
        return THEORY[name][1](mixer, n_tokens) * torch.float32.itemsize
    return remembered_bytes(mixer.init_state(1, capacity=n_tokens, device="meta", dtype=torch.float32))


def stretched(state: Any, read: int, n_tokens: int) -> Any:
    """A state after `n_tokens`, with the rows of one after `read` again and again, and some room."""

    def leaf(x: Tensor) -> Tensor:
        if not x.is_floating_point():
            return torch.full_like(x, n_tokens)
        if x.shape[1] != read:  # a full window
            return x.clone()
        rows = x.new_zeros(x.shape[0], n_tokens + PIECE + ROOM, *x.shape[2:])
        for start in range(0, n_tokens, read):
            n = min(read, n_tokens - start)
            rows[:, start : start + n] = x[:, :n]
        return rows

    return tree_map(leaf, state)


@torch.no_grad()
def seconds_at(mixer: Any, state: Any, read: int, context: int, repeats: int) -> tuple[float, float]:
    """Median seconds of a step, and of a token in a piece, at `context`."""
    x, later = torch.randn(1, PIECE, WIDTH), stretched(state, read, context)
    steps: list[float] = []
    for turn in range(repeats + repeats // 8):
        started = time.perf_counter()
        _, later = mixer.step(x[:, turn % PIECE], later)
        if turn >= repeats // 8:
            steps.append(time.perf_counter() - started)
    del later
    pieces: list[float] = []
    for turn in range(4):
        before = stretched(state, read, context - PIECE)
        started = time.perf_counter()
        mixer(x, before)
        if turn:
            pieces.append(time.perf_counter() - started)
    return statistics.median(steps), statistics.median(pieces) / PIECE


def measured(name: str, contexts: Sequence[int], repeats: int) -> dict[str, Any]:
    """Everything about one word."""
    mixer = created(name)
    states = [read_state(mixer, n) for n in READ]
    found = [remembered_bytes(state) for state in states]
    theory = [theory_bytes(name, mixer, n) for n in READ]
    row: dict[str, Any] = {
        "word": SPECS.get(name, name),
        "formula": THEORY[name][0] if name in THEORY else "",
        "theory_bytes": theory[-1],
        "measured_bytes": found[-1],
        "theory_per_token": (theory[1] - theory[0]) / (READ[1] - READ[0]),
        "measured_per_token": (found[1] - found[0]) / (READ[1] - READ[0]),
        "contexts": {},
    }
    for context in contexts:
        step, token = seconds_at(mixer, states[-1], READ[-1], context, repeats)
        row["contexts"][str(context)] = {
            "state_bytes": theory_bytes(name, mixer, context),
            "flops": mixer.flops_per_token(context),
            "step_us": 1e6 * step,
            "token_us": 1e6 * token,
        }
    return row


def tables(report: Data) -> str:
    """The tables as Markdown."""
    words, last = report["words"], report["contexts"][-1]
    lines = [
        "| word | numbers after T tokens | bytes a token | measured "
        f"| bytes after {_short(READ[-1])} | measured | at {_short(last)} |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    for name, row in words.items():
        cells = [f"`{name}`", row["formula"]]
        cells += [f"{row[key]:,.0f}" for key in ("theory_per_token", "measured_per_token")]
        cells += [f"{row[key]:,}" for key in ("theory_bytes", "measured_bytes")]
        cells.append(f"{row['contexts'][str(last)]['state_bytes'] / 2**20:.1f} MiB")
        lines.append(f"| {' | '.join(cells)} |")
    for title, key, scale in (
        ("million FLOPs of a token", "flops", 1e-6),
        ("us of a step", "step_us", 1.0),
        (f"us of a token in a piece of {PIECE}", "token_us", 1.0),
    ):
        lines += [
            "",
            f"| {title} at a context of | " + " | ".join(map(_short, report["contexts"])) + " |",
            "|---|" + "---:|" * len(report["contexts"]),
        ]
        for name, row in words.items():
            values = (row["contexts"][str(context)][key] * scale for context in report["contexts"])
            lines.append(f"| `{name}` | " + " | ".join(f"{v:,.0f}" if v >= 100 else f"{v:.3g}" for v in values) + " |")
    return "\n".join(lines) + "\n"


def _short(context: int) -> str:
    return f"{context // 1024}K" if context % 1024 == 0 else f"{context:,}"


def markdown(report: Data) -> str:
    at = report["machine"]
    words = "\n".join(f"    {row['word']}" for row in report["words"].values())
    return (
        "# What attention remembers, and what it costs\n\n"
        f"{at['cpu']}, {at['threads']} thread(s), torch {at['versions']['torch']}; width {WIDTH}, float32, "
        f"one row.\nH 8 heads of K 64 channels:\n\n{words}\n\n{tables(report)}\n"
        "![State, FLOPs and time against context](attention_state.svg)\n"
    )


def svg(report: Data) -> str:
    """State, FLOPs and time of a step against the context."""
    rows = [Row(name, name, i) for i, name in enumerate(report["words"])]
    contexts = report["contexts"]

    def panel(title: str, axis: Axis, key: str, scale: float = 1.0) -> Panel:
        series = [
            Series(row.id, contexts, [scale * report["words"][row.id]["contexts"][str(c)][key] for c in contexts])
            for row in rows
        ]
        return Panel("lines", Axis("context", "length", log=True), axis, series, title=title)

    panels: list[Any] = [
        panel("State", Axis("bytes", "size", log=True), "state_bytes"),
        panel("FLOPs of a token", Axis("FLOPs", "count", log=True), "flops"),
        panel("A step", Axis("microseconds", "count", log=True), "step_us"),
    ]
    return static.svg(Chart("attention-state", "State, FLOPs and time against context", "", panels), rows)


BEGIN, END = "<!-- written by benchmarks/studies/attention_state.py -->\n", "<!-- end -->\n"


def filled(page: str, report: Data) -> str:
    """A page with the tables between its marks."""
    before, rest = page.split(BEGIN)
    return before + BEGIN + "\n" + tables(report) + "\n" + END + rest.split(END)[1]


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--words", nargs="*", help="by default every word of attention")
    parser.add_argument("--contexts", nargs="*", type=int, default=list(CONTEXTS))
    parser.add_argument("--repeats", type=int, default=64, help="steps timed at every context")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--page", type=pathlib.Path, help="write the tables between the marks of this page")


def measure(args: argparse.Namespace, old: Data) -> Iterator[Data]:
    torch.set_num_threads(args.threads)
    words = dict(old.get("words", {})) if old.get("contexts") == args.contexts else {}
    report: Data = {"machine": facts(), "contexts": args.contexts, "words": words}
    for name in args.words or attention_words():
        report["words"][name] = row = measured(name, args.contexts, args.repeats)
        steps = {c: f"{r['step_us']:.0f} us" for c, r in row["contexts"].items()}
        print(name, row["measured_per_token"], steps, flush=True)
        yield report
    if args.page:
        args.page.write_text(filled(args.page.read_text(), report))


STUDY = Study("attention_state", __doc__, arguments, measure, markdown, svg)

if __name__ == "__main__":
    STUDY.main()
