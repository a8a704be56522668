"""Time of one decoded token against the context, for every word of attention.

    python -m zoo.benchmarks.studies.attention_decode [--contexts 1024,4096,16384,65536] [--repeats 21]

One row, one layer, float32, one thread. All forms have the sizes of `SIZES`, after DeepSeek-V3.2's proportions: "mqa"
is one key and value of a width whose cache has as many bytes as `mla`'s. The states are not results of a prefill: they
are made by hand, filled with random numbers, `length` set to the context, and room for the measured steps. All forms
take turns in one process; the median of a form's times is kept.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Mapping

import torch

import zoo
from zoo.benchmarks.states import at_context
from zoo.benchmarks.studies.harness import Data, Study, facts
from zoo.benchmarks.studies.measure import medians
from zoo.protocol import Mixer

CONTEXTS = (1024, 4096, 16384, 65536)
SIZES = {
    "d_model": 1024,
    "n_heads": 32,
    "n_kv_heads": 8,
    "q_rank": 512,
    "kv_rank": 512,
    "nope_dim": 64,
    "rope_dim": 64,
    "v_dim": 64,
    "top_k": 2048,
    "index_heads": 16,
    "index_dim": 64,
    "window": 1024,
}
Sizes = Mapping[str, int]


def shared_width(sizes: Sizes) -> int:
    """Width of one key and one value that together are as wide as a row of `mla`'s cache."""
    return (sizes["kv_rank"] + sizes["rope_dim"]) // 2


def words(sizes: Sizes) -> dict[str, str]:
    """The forms by name, absorbed `mla` first."""
    heads = f"n_heads={sizes['n_heads']}"
    names = ("q_rank", "kv_rank", "nope_dim", "rope_dim", "v_dim")
    latent = f"{heads}, " + ", ".join(f"{name}={sizes[name]}" for name in names)
    chosen = ", ".join(f"{name}={sizes[name]}" for name in ("top_k", "index_heads", "index_dim"))
    plain = f"{heads}, head_dim={sizes['v_dim']}"
    return {
        "mla": f"mla({latent}, absorb=True)",
        "mla, unabsorbed": f"mla({latent}, absorb=False)",
        "mqa, cache of mla": f"mqa({heads}, head_dim={shared_width(sizes)})",
        "dsa": f"dsa({latent}, {chosen})",
        "swa": f"swa({plain}, window={sizes['window']})",
        "gqa": f"gqa({plain}, n_kv_heads={sizes['n_kv_heads']})",
        "mha": f"mha({plain})",
    }


class Decoding:
    """Steps of a mixer from a state made by hand; every call is one."""

    def __init__(self, mixer: Mixer, context: int, room: int):
        self.mixer = mixer
        self.state, _ = at_context(mixer, context, room=room)
        self.x = torch.randn(1, mixer.d_model, generator=torch.Generator().manual_seed(1))

    @torch.no_grad()
    def __call__(self) -> None:
        _, self.state = self.mixer.step(self.x, self.state)


def step_costs(sizes: Sizes, context: int, repeats: int) -> dict[str, dict[str, float]]:
    """Milliseconds of a step, bytes of the state per token and matmul FLOPs of a step, by form."""
    torch.manual_seed(0)
    mixers = {name: zoo.create_mixer(word, sizes["d_model"]).eval() for name, word in words(sizes).items()}
    steps: dict[str, Callable[[], object]] = {n: Decoding(m, context, repeats + 2) for n, m in mixers.items()}
    seconds = medians(steps, repeats)
    return {
        name: {
            "ms": 1e3 * seconds[name],
            "bytes_per_token": mixer.state_bytes(1, context, torch.float32) / context,
            "flops": float(mixer.flops_per_token(context)),
        }
        for name, mixer in mixers.items()
    }


def markdown(report: Data) -> str:
    at, sizes, found = report["machine"], report["sizes"], report["contexts"]
    last = max(found, key=int)
    lines = [
        "# One decoded token against the context",
        "",
        f"{at['cpu']}, {at['threads']} thread, torch {at['versions']['torch']}. Milliseconds of a step of one",
        "row and one layer in float32, median of interleaved steps. The states are made by hand: random numbers in",
        f"every row, `length` set. `mqa` has one key and value of {shared_width(sizes)} channels, so its cache has",
        f"the bytes of `mla`'s. State and work are those at {int(last):,}. Sizes:",
        f"{', '.join(f'{k} {v}' for k, v in sizes.items())}.",
        "",
        "| form | state bytes/token | MFLOP | " + " | ".join(f"{int(c):,}" for c in found) + " | over `mla` |",
        "|---|---:|---:|" + "---:|" * (len(found) + 1),
    ]
    for name, m in found[last].items():
        times = " | ".join(f"{forms[name]['ms']:.2f}" for forms in found.values())
        ratio = m["ms"] / found[last]["mla"]["ms"]
        lines.append(f"| {name} | {m['bytes_per_token']:,.0f} | {m['flops'] / 1e6:,.1f} | {times} | {ratio:.2f} |")
    return "\n".join(lines) + "\n"


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--contexts", default=",".join(map(str, CONTEXTS)), help="numbers of tokens, by commas")
    parser.add_argument("--repeats", type=int, default=21)
    parser.add_argument("--threads", type=int, default=1)


def measure(args: argparse.Namespace, old: Data) -> Iterator[Data]:
    torch.set_num_threads(args.threads)
    found = dict(old.get("contexts", {}))
    for context in map(int, args.contexts.split(",")):
        found[str(context)] = forms = step_costs(SIZES, context, args.repeats)
        print(context, {name: float(f"{m['ms']:.3g}") for name, m in forms.items()}, flush=True)
        by_context = {c: found[c] for c in sorted(found, key=int)}
        yield {"machine": facts(), "sizes": SIZES, "states": "made by hand, random", "contexts": by_context}


STUDY = Study("attention_decode", __doc__, arguments, measure, markdown)

if __name__ == "__main__":
    STUDY.main()
