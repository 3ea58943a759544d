"""A small GPT-2 learns the standard library's source text, packages spread over clients, in random subspaces: bits a byte against traffic.

    python benchmarks/intrinsic_text.py             uncompressed averaging, four algorithms at two dimensions, and what 4 bits make of one
    python benchmarks/intrinsic_text.py --rounds 5  a look

Everybody has the text: it is the running Python's, read byte by byte, so figures shift a little between versions. Clients hold few packages
each (Dirichlet, α = 0.3). Every client takes part in every round, so a time-varying client never needs more than two vectors. Each
algorithm has the best of a few gains by bits on training text after a third of the rounds; test text is the end of every package.
"""

from __future__ import annotations

import argparse
import math
import time
import warnings
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from featherlight.fed_loop import Federation
from featherlight.plugins import IntrinsicProjection, Plugin, Quantization
from featherlight.ssl_models import Dirichlet, LanguageModel, TextData

CLIENTS, STEPS, BATCH, CONTEXT = 4, 6, 16, 64
MODEL = {"n_layer": 2, "n_embd": 64, "n_head": 4, "n_positions": CONTEXT, "vocab_size": 256}
RATE = 3e-3
GAINS = (0.1, 0.3, 1.0)


def model() -> LanguageModel:
    torch.manual_seed(0)
    quiet = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return LanguageModel("gpt2", {**MODEL, **quiet}, optimizer="adamw", lr=RATE)


def data() -> TextData:
    limit = CLIENTS * STEPS * BATCH
    return TextData(
        context=CONTEXT, batch_size=BATCH, num_clients=CLIENTS, partition=Dirichlet(0.3, min_size=2 * BATCH), limit_train=limit, seed=1
    )


def bits(module: LanguageModel, tokens: torch.Tensor) -> float:
    """Bits a byte over sequences, uint8 (N, context + 1)."""
    module.eval()
    total = 0.0
    with torch.no_grad():
        for part in tokens.long().split(256):
            total += float(module._loss((part[:, :-1], part[:, 1:]))) * len(part)
    return total / len(tokens) / math.log(2)


def methods(dim: int, gain: float, options: dict[str, Any]) -> list[Plugin]:
    """The projection, and what sends its numbers up in as few bits as they come down in."""
    bits = options.get("down_bits", 32)
    return [IntrinsicProjection(dim, gain=gain, **options), *([] if bits == 32 else [Quantization(bits)])]


def run(plugins: list[Plugin], rounds: int, text: TextData) -> tuple[LanguageModel, Any]:
    module = model()
    result = Federation(rounds, progress=False, accelerator="cpu", threads=torch.get_num_threads()).run(module, text, plugins)
    return module, result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--algorithms", nargs="+", help="some of them, by name, beside uncompressed averaging")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    warnings.filterwarnings("ignore", message=".*self.log.*")
    text, rounds = data(), arguments.rounds
    held_out = text._parts[1].tokens[:: max(1, len(text._parts[1]) // 1000)]
    trained_on = text._train.tokens
    size = sum(value.numel() for value in model().parameters())
    span = max(1, rounds // 6)
    algorithms = {
        "static": {},
        "K = 4": {"subspaces": 4},
        "time-varying": {"periods_per_span": span},
        "both": {"subspaces": 4, "periods_per_span": span},
    }
    console = Console(width=150)
    table = Table(
        title=f"GPT-2 of {size:,} parameters, {CLIENTS} clients, {rounds} rounds of {STEPS} steps on average, a span of {span} rounds; "
        f"untrained: {bits(model(), held_out):.2f} bits a byte"
    )
    for heading in ("algorithm", "d", "gain", "bits a byte, test", "training", "MB down", "MB up", "less, both ways", "seconds"):
        table.add_column(heading, justify="right")
    choices: list[tuple[str, int | None, dict[str, Any]]] = [("uncompressed", None, {})]
    choices += [(name, dim, options) for dim in (size // 100, size // 10) for name, options in algorithms.items()]
    choices += [
        ("anew each round", size // 100, {"periods_per_span": 1}),
        ("anew each round, 4 bits", 8 * size // 100, {"periods_per_span": 1, "down_bits": 4}),
    ]
    if arguments.algorithms is not None:
        unknown = sorted(set(arguments.algorithms) - {name for name, _, _ in choices})
        if unknown:
            parser.error(f"no algorithm {unknown[0]!r}; there are {', '.join(dict.fromkeys(name for name, _, _ in choices))}")
        choices = [choice for choice in choices if choice[0] in ("uncompressed", *arguments.algorithms)]
    whole = 0.0
    for name, dim, options in choices:
        started = time.perf_counter()
        gain = None
        if dim is not None:
            tried = {gain: bits(run(methods(dim, gain, options), max(1, rounds // 3), text)[0], trained_on) for gain in GAINS}
            gain = min(tried, key=lambda gain: tried[gain] if math.isfinite(tried[gain]) else math.inf)
        module, result = run([] if dim is None or gain is None else methods(dim, gain, options), rounds, text)
        down, up = (sum(row[way] for row in result.history) / 1e6 for way in ("bytes_down", "bytes_up"))
        whole = whole or down + up
        table.add_row(
            name, "" if dim is None else f"{dim:,}", "" if gain is None else f"{gain:g}", f"{bits(module, held_out):.3f}",
            f"{bits(module, trained_on):.3f}", f"{down:.2f}", f"{up:.2f}", f"{whole / (down + up):.1f}",
            f"{time.perf_counter() - started:.0f}",
        )  # fmt: skip
        Console(stderr=True).print(f"{name} {dim or ''}: {bits(module, held_out):.3f} bits a byte")
    console.print(table)


if __name__ == "__main__":
    main()
