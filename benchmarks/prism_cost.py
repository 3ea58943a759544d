"""What a PriSM client costs, CIFAR ResNet-18, as a share of the full model: derived, predicted, and measured on real steps, in one run.

    python benchmarks/prism_cost.py                 predicted by `featherlight cost` from configs/papers/prism_resnet18_*.yaml
    python benchmarks/prism_cost.py --real          besides, seconds and memory of real steps of one client
    python benchmarks/prism_cost.py --svd           besides, the server's factorisation against the time of a round of 20 clients

The derived columns follow from the method (arXiv 2208.13141) by counting; activations are counted as the outputs of convolutions, while
bytes kept for backward hold whatever a step keeps.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import nn

from featherlight.commands.cost import predict_config
from featherlight.plugins import Clock, PrismSampling, Visit
from featherlight.plugins.factors import factorise
from featherlight.plugins.sampled_layers import Sampled
from featherlight.plugins.step_cost import StepMeter
from featherlight.ssl_models import Classifier

PAPERS = Path(__file__).parent.parent / "configs" / "papers"
DERIVED = {  # κ: parameters, multiply-adds, activations without rows; parameters, activations with rows
    0.1: (0.129, 0.129, 1.09, 0.118, 0.37),
    0.2: (0.240, 0.239, 1.16, 0.220, 0.53),
    0.4: (0.461, 0.461, 1.32, 0.431, 0.85),
    0.8: (0.904, 0.905, 1.65, 0.884, 1.49),
    1.0: (1.125, 1.121, 1.80, 1.125, 1.80),
}
BATCH = 32


def config(keep: float | None, rows: bool) -> str:
    """The path of a configuration: as it stands, without row sampling, or of the full model."""
    path = PAPERS / f"prism_resnet18_{round(10 * (keep or 0.2)):02d}.yaml"
    if keep is not None and rows:
        return str(path)
    content = yaml.safe_load(path.read_text())
    if keep is None:
        del content["plugins"]
    else:
        content["plugins"][0]["init_args"]["rows"] = False
    written = Path(tempfile.mkdtemp()) / path.name
    written.write_text(yaml.safe_dump(content))
    return str(written)


def predicted(keep: float | None, rows: bool) -> dict[str, float]:
    """A client's figures in one round, by `featherlight cost`. All rounds cost the same."""
    return predict_config(config(keep, rows), ["--federation.rounds=1"]).rows()[0]


def client(keep: float | None, rows: bool = True) -> Any:
    """The module that a client trains."""
    torch.manual_seed(0)
    model = Classifier("resnet18_cifar", backbone_options={"norm": "group"}, optimizer="sgd", lr=0.1, weight_decay=5e-4)
    if keep is None:
        return model
    plugin = PrismSampling(keep, rows=rows)
    plugin.attach(model)
    plugin.advance(Clock(0))
    small = plugin.narrow(Visit(0))
    server = {name: value.detach() for name, value in model.state_dict(keep_vars=True).items()}
    small.load_state_dict(plugin.encode_down(server, Visit(0)))
    return small


def activations(model: nn.Module) -> int:
    """Numbers put out by convolutions for one image: of a sampled layer its r and n channels."""
    total = 0

    def count(module: Any, inputs: Any, out: torch.Tensor) -> None:
        nonlocal total
        size = out.shape[-2] * out.shape[-1]
        total += size * (sum(module.u.shape) if isinstance(module, Sampled) else out.shape[1])

    handles = [module.register_forward_hook(count) for module in model.modules() if isinstance(module, nn.Conv2d)]
    with torch.no_grad():
        model.logits(torch.zeros(1, 3, 32, 32))  # type: ignore[operator]
    for handle in handles:
        handle.remove()
    return total


def median_seconds(act: Callable[[], object], runs: int) -> float:
    act()
    times = []
    for _ in range(runs):
        started = time.perf_counter()
        act()
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def real(keep: float | None, rows: bool, runs: int) -> tuple[float, int, int]:
    """Median seconds of a step, bytes it keeps for backward, its peak; batch 32."""
    model = client(keep, rows)
    optimizer = model.configure_optimizers()
    optimizer = optimizer["optimizer"] if isinstance(optimizer, dict) else optimizer
    batch = torch.randn(BATCH, 3, 32, 32), torch.randint(10, (BATCH,))
    model._log = lambda *_: None

    def step(meter: StepMeter | None = None) -> None:
        loss = model.training_step(batch, 0)
        if meter is not None:
            meter.forward_is_done()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    seconds = median_seconds(step, runs)
    with StepMeter(model, [optimizer], batch) as meter:
        step(meter)
    return seconds, meter.cost.saved_bytes, meter.cost.peak_bytes


def svd(console: Console, seconds_of_step: float, runs: int) -> None:
    """Three ways to factorise every layer, beside a round of 20 clients of 500 images, 3 local epochs, one after the other."""
    model = client(None)
    weights = [module.weight.detach() for module in model.modules() if isinstance(module, nn.Conv2d) and module.weight[0, 0].numel() > 1]
    weights = [weight for weight in weights if weight.shape[1] > 3]

    def core(weight: torch.Tensor) -> None:
        q, r = torch.linalg.qr(weight.flatten(1).T)
        _, _, v = torch.linalg.svd(r.T)
        q @ v.T

    ways: dict[str, Callable[[torch.Tensor], object]] = {
        "SVD (torch.linalg.svd)": lambda weight: torch.linalg.svd(weight.flatten(1), full_matrices=False),
        "QR, then SVD of the R×R core": core,
        "eigenvectors of W·Wᵀ, float64 (ours)": factorise,
    }
    steps = 20 * 3 * -(-500 // BATCH)
    table = Table(title=f"server, once a round, {len(weights)} layers; a round: {steps} steps of {seconds_of_step:.3f} s at κ = 0.2")
    for heading in ("way", "seconds", "of a round", "times ours"):
        table.add_column(heading, justify="right")
    times = {name: median_seconds(lambda way=way: [way(weight) for weight in weights], runs) for name, way in ways.items()}  # type: ignore[misc]
    for name, seconds in times.items():
        table.add_row(name, f"{seconds:.2f}", f"{seconds / (steps * seconds_of_step):.2%}", f"{seconds / [*times.values()][-1]:.1f}")
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--real", action="store_true", help="take real steps, too")
    parser.add_argument("--svd", action="store_true", help="time the server's factorisation, too")
    parser.add_argument("--runs", type=int, default=5, help="medians of so many")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    console = Console(width=190)
    table = Table(title="a client's share of the full model (CIFAR ResNet-18, 11.17 M parameters, batch 32): derived → ours")
    headings = ["κ", "rows", "parameters", "off", "multiply-adds", "off", "activations", "off", "down", "up", "kept for backward", "peak"]
    for heading in headings + (["step seconds", "measured kept", "measured peak"] if arguments.real else []):
        table.add_column(heading, justify="right")
    whole, whole_activations = predicted(None, True), activations(client(None))
    whole_real = real(None, True, arguments.runs) if arguments.real else None
    at_two_tenths = 0.0
    choices = [(keep, rows) for rows in (False, True) for keep in DERIVED]
    for keep, rows in track(choices, "configurations", console=Console(stderr=True), transient=True):
        parameters, multiply_adds, outputs, parameters_rows, outputs_rows = DERIVED[keep]
        row = predicted(keep, rows)
        cells = [f"{keep}", "sampled" if rows else "all"]
        for name, derived, ours in (
            ("parameters", parameters_rows if rows else parameters, row["params_held"] / whole["params_held"]),
            ("multiply-adds", None if rows else multiply_adds, row["flops_forward"] / whole["flops_forward"]),
            ("activations", outputs_rows if rows else outputs, activations(client(keep, rows)) / whole_activations),
        ):
            digits = 2 if name == "activations" else 3
            cells += [f"{derived:.{digits}f} → {ours:.3f}", f"{ours / derived - 1:+.1%}"] if derived else [f"{ours:.3f}", ""]
        cells += [f"{row[name] / whole[name]:.3f}" for name in ("bytes_down", "bytes_up", "saved_bytes", "peak_bytes")]
        if whole_real is not None:
            measured = real(keep, rows, arguments.runs)
            cells += [f"{ours / theirs:.3f}" for ours, theirs in zip(measured, whole_real)]
            at_two_tenths = measured[0] if (keep, rows) == (0.2, True) else at_two_tenths
        table.add_row(*cells)
    console.print(table)
    if whole_real is not None:
        console.print(
            f"the full model's step: {whole_real[0]:.2f} s, {whole_real[1] / 2**20:.0f} MiB kept, peak {whole_real[2] / 2**20:.0f} MiB"
        )
    if arguments.svd:
        svd(console, at_two_tenths or real(0.2, True, arguments.runs)[0], arguments.runs)


if __name__ == "__main__":
    main()
