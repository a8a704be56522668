"""What the attention words remember of each token, and what a token costs at a context.

    python -m zoo.benchmarks.attention_state [--words mla dsa] [--out docs/results] [--page docs/attention.md]

One layer of width 512 in float32, one row. State: bytes of the tensors that a state holds once it has read 2,048 and
4,096 tokens, beside what theory says; a window's has stopped growing by then. Compute: `flops_per_token`, the median
time of a step, and the time of a token within a piece of 256, read by `forward`, that ends at the context. For the
times, the rows of a state that has been read are repeated up to the context. Takes about a minute. Writes
attention_state.json, .md and .svg, and the tables into the page.
"""

from __future__ import annotations

import argparse
import io
import json
import pathlib
import statistics
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

import zoo
from zoo.mixers.attention_parts import AttentionWord
from zoo.pattern import make_word
from zoo.registry import list_mixers, mixer_of
from zoo.report.style import Look, house_style
from zoo.training import machine

if TYPE_CHECKING:
    from matplotlib.figure import Figure

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


def held_bytes(state: Any) -> int:
    """Bytes of what a state remembers: all of its tensors but the count of steps."""
    return sum(x.nbytes for x in tree_leaves(state) if x.is_floating_point())


def theory_bytes(name: str, mixer: Any, n_tokens: int) -> int:
    """What those should be in float32; for words without a formula here, what the mixer says of itself."""
    if name in THEORY:
        return THEORY[name][1](mixer, n_tokens) * torch.float32.itemsize
    return int(mixer.state_bytes(1, n_tokens, torch.float32) - mixer.state_bytes(1, 0, torch.float32))


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
    held = [held_bytes(state) for state in states]
    theory = [theory_bytes(name, mixer, n) for n in READ]
    row: dict[str, Any] = {
        "word": SPECS.get(name, name),
        "formula": THEORY[name][0] if name in THEORY else "",
        "theory_bytes": theory[-1],
        "measured_bytes": held[-1],
        "theory_per_token": (theory[1] - theory[0]) / (READ[1] - READ[0]),
        "measured_per_token": (held[1] - held[0]) / (READ[1] - READ[0]),
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


def tables(report: dict[str, Any]) -> str:
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


def markdown(report: dict[str, Any]) -> str:
    facts = report["machine"]
    words = "\n".join(f"    {row['word']}" for row in report["words"].values())
    return (
        "# What attention remembers, and what it costs\n\n"
        f"{facts['cpu']}, {facts['threads']} thread(s), torch {facts['versions']['torch']}; width {WIDTH}, float32, "
        f"one row.\nH 8 heads of K 64 channels:\n\n{words}\n\n{tables(report)}\n"
        "![State, FLOPs and time against context](attention_state.svg)\n"
    )


def figure_of(report: dict[str, Any]) -> Figure:
    """State, FLOPs and time of a step against the context."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullFormatter

    panels = (
        ("State, MiB", "state_bytes", 2.0**-20),
        ("Million FLOPs of a token", "flops", 1e-6),
        ("Microseconds of a step", "step_us", 1.0),
    )
    with house_style():
        figure = Figure(figsize=(11, 3.8), layout="constrained")
        contexts = report["contexts"]
        for axes, (title, key, scale) in zip(figure.subplots(1, len(panels)), panels, strict=True):
            for i, (name, row) in enumerate(report["words"].items()):
                values = [row["contexts"][str(context)][key] * scale for context in contexts]
                axes.plot(contexts, values, label=name, **Look.of(i).line(len(contexts)))
            axes.set(title=title, xlabel="context", xscale="log", yscale="log")
            axes.set_xticks(contexts, [_short(context) for context in contexts])
            axes.yaxis.set_major_formatter("{x:,g}")
            for axis in (axes.xaxis, axes.yaxis):
                axis.set_minor_formatter(NullFormatter())
        handles, names = axes.get_legend_handles_labels()
        figure.legend(handles, names, loc="outside right center")
    return figure


def svg(report: dict[str, Any]) -> str:
    """The figure; the same report gives the same text."""
    out = io.StringIO()
    with house_style():
        from matplotlib import rcParams

        rcParams["svg.hashsalt"] = "attention-state"
        figure_of(report).savefig(out, format="svg", facecolor="white", metadata={"Date": None})
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines()) + "\n"


BEGIN, END = "<!-- written by benchmarks/attention_state.py -->\n", "<!-- end -->\n"


def filled(page: str, report: dict[str, Any]) -> str:
    """A page with the tables between its marks."""
    before, rest = page.split(BEGIN)
    return before + BEGIN + "\n" + tables(report) + "\n" + END + rest.split(END)[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--words", nargs="*", help="by default every word of attention")
    parser.add_argument("--contexts", nargs="*", type=int, default=list(CONTEXTS))
    parser.add_argument("--repeats", type=int, default=64, help="steps timed at every context")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=pathlib.Path, help="write attention_state.json, .md and .svg into this folder")
    parser.add_argument("--page", type=pathlib.Path, help="write the tables between the marks of this page")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    facts = machine.describe_machine(torch.device("cpu")) | {"versions": machine.versions()}
    report: dict[str, Any] = {"machine": facts, "contexts": args.contexts, "words": {}}
    for name in args.words or attention_words():
        report["words"][name] = row = measured(name, args.contexts, args.repeats)
        print(
            name,
            row["measured_per_token"],
            {c: f"{r['step_us']:.0f} us" for c, r in row["contexts"].items()},
            flush=True,
        )
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "attention_state.json").write_text(json.dumps(report, indent=1) + "\n")
        (args.out / "attention_state.md").write_text(markdown(report))
        (args.out / "attention_state.svg").write_text(svg(report))
    if args.page:
        args.page.write_text(filled(args.page.read_text(), report))
    print(json.dumps(report))


if __name__ == "__main__":
    main()
