"""The papers' own cost columns beside ours, each by the rule the paper used and as really serialised.

    python benchmarks/papers.py                  all of LW-FedSSL's table 2 (arXiv 2401.11647, version 4) and ResNet-18
    python benchmarks/papers.py --quick          the three ViT-Tiny MoCo v3 configurations only

Nothing is trained: `featherlight cost` predicts every configuration in configs/papers. Printed figures come from the paper's table 2.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import yaml
from rich.console import Console
from rich.table import Table

from featherlight.commands.cost import predict_config
from featherlight.commands.paper_rule import GB, Rule
from featherlight.fed_loop.predict import Parts
from featherlight.plugins.cost_table import CostTable

PAPERS = Path(__file__).parent.parent / "configs" / "papers"
WAYS = ("end_to_end", "layerwise", "progressive")
PRINTED = {  # memory GB, GFLOPs, communication "GB"
    "MoCoV3": {"end_to_end": (8.72, 586, 8.40), "layerwise": (2.61, 139, 1.66), "progressive": (8.69, 318, 5.04)},
    "BYOL": {"end_to_end": (8.72, 586, 8.40), "layerwise": (2.61, 139, 1.66), "progressive": (8.69, 318, 5.04)},
    "SimCLR": {"end_to_end": (14.39, 1169, 8.03), "layerwise": (8.59, 278, 1.29), "progressive": (14.36, 635, 4.68)},
}
PRINTED_DROPOUT = {"layerwise": (2.49, 111, 1.66), "progressive": (5.24, 233, 3.97)}
WORST_CASE = 3.35
CHEAPER = {"layerwise_calibrated": 3.2, "progressive_calibrated": 1.8}
"""Traffic of the encoder, end to end over this: versions 1 to 3, whose server trains all blocks after each round."""


def variant(way: str, model: str, family: str = "vit_tiny") -> str:
    """The path of a configuration, with another self-supervised method in it where asked."""
    path = PAPERS / f"{family}_{way}.yaml"
    content = yaml.safe_load(path.read_text())
    if content["model"]["class_path"] == model:
        return str(path)
    content["model"]["class_path"] = model
    arguments = content["model"]["init_args"]
    if model == "SimCLR":
        del arguments["momentum"]
    if model == "BYOL":
        del arguments["temperature"]
    written = Path(tempfile.mkdtemp()) / path.name
    written.write_text(yaml.safe_dump(content))
    return str(written)


def wire(table: CostTable) -> float:
    """Traffic as serialised, in the paper's GB."""
    total = table.total()
    return (total["bytes_down"] + total["bytes_up"]) / GB


def encoder(way: str) -> tuple[float, float]:
    """Traffic of the encoder alone, both ways, in the paper's GB: by its rule, and of the tensors that `featherlight cost` predicts."""
    told: list[Parts] = []
    path = variant(way, "MoCoV3")
    predict_config(path, [], parts=told.append)
    return Rule(path).totals(only="backbone.")[1], sum(told[0]["backbone"]) / GB


def mean(table: CostTable, name: str) -> float:
    """Mean over rounds of a row's figure."""
    rows = table.rows()
    return sum(row[name] * row["rounds"] for row in rows) / sum(row["rounds"] for row in rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the three ViT-Tiny MoCo v3 configurations only")
    quick = parser.parse_args().quick
    console = Console(width=170)
    out = Table(title="ViT-Tiny, 32 px, 10 clients, 180 rounds (paper: arXiv 2401.11647 v4, table 2)")
    for heading in ("configuration", "GFLOPs paper", "ours, its rule", "off", "GB paper", "ours, its rule", "off", "as serialised"):
        out.add_column(heading, justify="right")
    memory = Table(
        title="memory against end to end: the paper's GB, our peak of a step, bytes kept for backward (means over rounds in brackets)"
    )
    for heading in ("configuration", "GB paper", "ratio", "peak MiB", "ratio", "(mean)", "saved MiB", "ratio", "(mean)"):
        memory.add_column(heading, justify="right")
    for model in ("MoCoV3",) if quick else PRINTED:
        whole: CostTable | None = None
        ways = [(way, way, PRINTED[model][way]) for way in WAYS]
        if model == "MoCoV3" and not quick:
            ways += [(f"{way}_depth_dropout", f"{way} + depth dropout", printed) for way, printed in PRINTED_DROPOUT.items()]
        for way, label, (gigabytes, gflops, traffic) in ways:
            path = variant(way, model)
            flops, counted = Rule(path).totals()
            table = predict_config(path, [])
            whole = whole or table
            out.add_row(
                f"{model} {label}", f"{gflops}", f"{flops:.0f}", f"{flops / gflops - 1:+.1%}",
                f"{traffic:.2f}", f"{counted:.3f}", f"{counted / traffic - 1:+.1%}", f"{wire(table):.3f}",
            )  # fmt: skip
            cells = [f"{model} {label}", f"{gigabytes:.2f}", f"{PRINTED[model]['end_to_end'][0] / gigabytes:.2f}"]
            for name in ("peak_bytes", "saved_bytes"):
                cells += [
                    f"{table.total()[name] / 2**20:.0f}",
                    f"{whole.total()[name] / table.total()[name]:.2f}",
                    f"{mean(whole, name) / mean(table, name):.2f}",
                ]
            memory.add_row(*cells)
    path = variant("layerwise", "MoCoV3")
    _, counted = Rule(path).totals(resend=True)
    resent = wire(predict_config(path, ["--federation.resend=true"]))
    out.add_row(
        "MoCoV3 layerwise, worst case", "", "", "", f"{WORST_CASE}", f"{counted:.3f}", f"{counted / WORST_CASE - 1:+.1%}", f"{resent:.3f}"
    )
    console.print(out)
    calibrated = Table(title="with server-side calibration (versions 1 to 3): traffic of the encoder only, GB, and end to end over it")
    for heading in ("configuration", "paper", "its rule, GB", "ratio", "predicted, GB", "ratio"):
        calibrated.add_column(heading, justify="right")
    ours = encoder("end_to_end")
    for way, printed in CHEAPER.items():
        by_rule, predicted = encoder(way)
        calibrated.add_row(
            f"MoCoV3 {way}", f"{printed}", f"{by_rule:.3f}", f"{ours[0] / by_rule:.2f}", f"{predicted:.3f}", f"{ours[1] / predicted:.2f}"
        )
    console.print(calibrated)
    console.print(memory)
    if not quick:
        resnet = Table(title="ResNet-18 (CIFAR stem) in its four groups, same settings; the paper prints no costs for it")
        for heading in ("configuration", "peak MiB", "saved MiB", "TFLOPs a round", "GB as serialised", "saved, end to end / this"):
            resnet.add_column(heading, justify="right")
        whole = None
        for way in WAYS:
            table = predict_config(variant(way, "MoCoV3", "resnet18"), [])
            whole = whole or table
            total = table.total()
            resnet.add_row(
                way, f"{total['peak_bytes'] / 2**20:.0f}", f"{total['saved_bytes'] / 2**20:.0f}",
                f"{(mean(table, 'flops_forward') + mean(table, 'flops_backward')) / 1e12:.1f}",
                f"{wire(table):.2f}", f"{mean(whole, 'saved_bytes') / mean(table, 'saved_bytes'):.2f}",
            )  # fmt: skip
        console.print(resnet)


if __name__ == "__main__":
    main()
