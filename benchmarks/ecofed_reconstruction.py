"""What a server can see of images by the activations that it gets: a measured attack, as a warning, in one run of minutes on one core.

    python benchmarks/ecofed_reconstruction.py                     scikit-learn's digits, enlarged to 16 px
    python benchmarks/ecofed_reconstruction.py --data FOLDER       FOLDER/train/CLASS/*.jpg, FOLDER/test/CLASS/*.jpg
    python benchmarks/ecofed_reconstruction.py --data FOLDER --size 32 --front runs/pretrain_vgg11/checkpoints/last.ckpt --steps 5000

The attacker is a server that is curious: it knows the front, which it has trained itself, and has images of its own of the same kind (the
training part). On them it trains a small decoder from the quantised activations at the cut, batches of 10 sharing a scale as on the wire,
back to pixels, and lets it loose on what clients send (the test part, of which it has seen nothing). PSNR and SSIM are means over images,
pixels from 0 to 1. To compare: the mean of the attacker's images, and that one of them which is nearest in pixels, which needs no
activations to be shown but the image itself to be found. More steps and a larger decoder see more: what is printed is a lower bound.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor, nn
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

from featherlight.fed_loop import Federation
from featherlight.plugins import Clock, PartitionedTraining
from featherlight.ssl_models import ImageData, SimCLR

ON_THE_WIRE = 10
"""Images of a client's batch, which share a scale."""


def images_of(loader: Iterable[Any], limit: int) -> Tensor:
    """The first ``limit`` images of a loader, ``(N, C, H, W)``, as models get them."""
    found: list[Tensor] = []
    for x, _ in loader:
        found.append(x)
        if sum(map(len, found)) >= limit:
            break
    return torch.cat(found)[:limit]


def trained_front(arguments: argparse.Namespace, data: ImageData, channels: int) -> nn.Module:
    """VGG11, its front from a file or trained by SimCLR on the attacker's images."""
    torch.manual_seed(arguments.seed)
    model = SimCLR("vgg11", image_size=arguments.size, in_channels=channels, hidden_dim=256, output_dim=64, temperature=0.5, lr=1e-3)
    if arguments.front is None and arguments.pretrain_epochs:
        Federation(arguments.pretrain_epochs, seed=arguments.seed, accelerator="cpu", checkpoint_every=0).run(model, data)
    return model


def sent(model: nn.Module, cut: int, bits: int, images: Tensor, front: str | None) -> Tensor:
    """What the server reads of ``images`` where the model is cut behind block ``cut``."""
    plugin = PartitionedTraining(f"backbone.blocks.{cut}", bits=bits, signed=False, front_checkpoint=front)
    plugin.attach(model)
    plugin.start()
    plugin.advance(Clock(0))
    partition = plugin.partition(Clock(0))
    assert partition is not None
    read = []
    with torch.no_grad():
        for batch in images.split(ON_THE_WIRE):
            out = partition.cut.run(batch)
            read.append(partition.codec.decode(partition.codec.encode(out), tuple(out.shape)))
    plugin.detach()
    return torch.cat(read)


def decoder(shape: torch.Size, channels: int, size: int, width: int) -> nn.Module:
    """``(N, *shape)`` → pixels, ``(N, channels, size, size)``: convolutions, each behind an enlargement by two."""
    layers: list[nn.Module] = [nn.Conv2d(shape[0], width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
    side = shape[-1]
    while side < size:
        side = min(2 * side, size)
        layers += [nn.Upsample(size=side), nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
    return nn.Sequential(*layers, nn.Conv2d(width, channels, 3, padding=1), nn.Sigmoid())


def attack(activations: Tensor, pixels: Tensor, arguments: argparse.Namespace, advance: Callable[[], None]) -> nn.Module:
    """A decoder trained on the attacker's images."""
    torch.manual_seed(arguments.seed)
    model = decoder(activations.shape[1:], pixels.shape[1], pixels.shape[-1], arguments.width)
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=arguments.steps)
    scale = activations.abs().amax().clamp_min(1e-9)
    for _ in range(arguments.steps):
        chosen = torch.randint(len(pixels), (32,))
        loss = nn.functional.mse_loss(model(activations[chosen] / scale), pixels[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        advance()
    model.eval()
    return nn.Sequential(Scaled(float(scale)), model)


class Scaled(nn.Module):
    """x / scale."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        return x / self.scale


def likeness(seen: Tensor, pixels: Tensor) -> tuple[float, float]:
    """PSNR in dB and SSIM of images with pixels from 0 to 1, means over images."""
    psnr = peak_signal_noise_ratio(seen, pixels, data_range=1.0, dim=(1, 2, 3), reduction="elementwise_mean")
    ssim = structural_similarity_index_measure(seen, pixels, data_range=1.0)
    assert isinstance(ssim, Tensor)
    return float(psnr), float(ssim)


def draw(rows: list[tuple[str, Tensor]], path: Path) -> None:
    """A line of images a row."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    count = len(rows[0][1])
    figure, panels = pyplot.subplots(len(rows), count, figsize=(count + 1.6, len(rows)), squeeze=False)
    for line, (name, images) in zip(panels, rows):
        for panel, image in zip(line, images):
            panel.imshow(image.permute(1, 2, 0).squeeze(-1).numpy(), cmap="gray", vmin=0, vmax=1)
            panel.set_xticks([])
            panel.set_yticks([])
        line[0].set_ylabel(name, rotation=0, ha="right", va="center", fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, bbox_inches="tight")
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="folder of images: train/CLASS/*, test/CLASS/*; by default scikit-learn's digits")
    parser.add_argument("--front", help="the front's weights, as front_checkpoint takes them; by default SimCLR on the attacker's images")
    parser.add_argument("--cuts", type=int, nargs="+", default=[0, 1, 2, 3], choices=range(8), help="blocks behind which the model is cut")
    parser.add_argument("--bits", type=int, nargs="+", default=[8, 6, 4])
    for name, value in {"size": 16, "auxiliary": 1200, "held": 300, "pretrain-epochs": 2, "steps": 250, "width": 32, "seed": 0}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--out", type=Path, default=Path("runs/ecofed_reconstruction.png"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    data = ImageData(
        "folder" if arguments.data else "digits", root=arguments.data or "", image_size=arguments.size, batch_size=64,
        limit_train=arguments.auxiliary, seed=arguments.seed,
    )  # fmt: skip
    own, theirs = (images_of(loader, limit) for loader, limit in zip(data.probe_data(), (arguments.auxiliary, arguments.held)))
    model = trained_front(arguments, data, own.shape[1])
    lowest, highest = own.amin((0, 2, 3), keepdim=True), own.amax((0, 2, 3), keepdim=True)  # black and white, normalised
    own_pixels, pixels = (((x - lowest) / (highest - lowest)).clamp(0, 1) for x in (own, theirs))

    nearest = own_pixels[torch.cdist(pixels.flatten(1), own_pixels.flatten(1)).argmin(1)]
    mean = own_pixels.mean(0).expand_as(pixels)
    rows = [("what clients have", pixels)]
    table = Table(
        title=f"{len(pixels)} images of clients, {arguments.size} px, from what they send: PSNR in dB / SSIM; "
        f"a decoder trained for {arguments.steps} steps on {len(own)} other images"
    )
    for heading in ("cut behind block", "numbers sent for one of the image", *(f"{bits} bits" for bits in arguments.bits)):
        table.add_column(heading, justify="right")
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("attacks", total=len(arguments.cuts) * len(arguments.bits) * arguments.steps)
        for cut in arguments.cuts:
            cells = []
            for bits in arguments.bits:
                activations = sent(model, cut, bits, own, arguments.front)
                attacker = attack(activations, own_pixels, arguments, lambda: progress.advance(task))
                with torch.no_grad():
                    seen = attacker(sent(model, cut, bits, theirs, arguments.front))
                cells.append("{:.1f} / {:.2f}".format(*likeness(seen, pixels)))
                rows.append((f"block {cut}, {bits} bits", seen))
            table.add_row(str(cut), f"{activations[0].numel() / pixels[0].numel():.2g}", *cells)
    for name, seen in (("mean image", mean), ("nearest image", nearest)):
        table.add_row(name, "0", *["{:.1f} / {:.2f}".format(*likeness(seen, pixels))] * len(arguments.bits))
    Console(width=150).print(table)
    rows += [("nearest image", nearest)]
    draw([(name, images[:12]) for name, images in rows], arguments.out)
    print(f"{arguments.out}: images of clients, and what was made of their activations")


if __name__ == "__main__":
    main()
