"""pfl-research's CIFAR-10 benchmark (arXiv 2404.06430) on ours, on pfl and on Flower's simulation, with the bare loop as the bound.

    python benchmarks/pfl_cifar10.py --data FOLDER              FOLDER/train/CLASS/*.jpg, and test/ likewise; some minutes
    python benchmarks/pfl_cifar10.py --random                   pictures of noise; the time is the same
    python benchmarks/pfl_cifar10.py --random --quick           100 users, cohorts of 10, one repetition: does it work?
    python benchmarks/pfl_cifar10.py --random --clock cpu       by processor time of all processes: on a machine that has other work

1,000 users of 50 images, IID; cohorts of 50; one local epoch in batches of 10 by plain SGD; two convolutions, 1,626,442 parameters. As
theirs but for dropout, which everybody draws otherwise: everybody's weights must be the bare loop's to rounding, or this stops.
All read one file of pictures and first weights, take its cohorts and its batches in its order, with one thread a process, each in
processes of its own; peers in virtual environments that this makes (uv or pip; `--venvs`), with the torch that ours has. Ours has
on all that a run has: costs, checks, exact sums, a line a round. pfl's users are weighted alike; Flower's actors keep data and model.

Seconds of a round are medians over rounds after the first and over repetitions, in which all take turns. Memory is the peak resident
size of each process of the run, added up: Flower's are an actor a process, the server's, and Ray's own.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path

import torch
from peers.job import Job, Settings, as_input
from peers.launch import NEEDED, VENVS, Answer, environment, on, run
from small_models import CLASSES, check, make, spread
from torch import Tensor

from featherlight.fed_loop.cohort import sample

NAMES = {"bare": "bare loop", "our": "ours", "pfl": "pfl", "flower": "Flower"}
SAMPLES, BATCH = 50, 10


def pictures(folder: Path, count: int) -> tuple[Tensor, Tensor]:
    """``count`` images, (N, 3, 32, 32) of bytes, and labels, of classes in turn: a folder for each class, in order of names.

    Raises:
        SystemExit: there are not as many.
    """
    import numpy as np
    from PIL import Image

    classes = [sorted(path.iterdir()) for path in sorted(folder.iterdir()) if path.is_dir()] if folder.is_dir() else []
    each = -(-count // max(1, len(classes)))
    if len(classes) != CLASSES or any(len(files) < each for files in classes):
        raise SystemExit(f"{folder} has not {CLASSES} folders of {each} images and more: give --data, lower --users, or use --random")
    chosen = [(files[place], label) for place in range(each) for label, files in enumerate(classes)][:count]
    images = np.stack([np.asarray(Image.open(path).convert("RGB")) for path, _ in chosen])
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(), torch.tensor([label for _, label in chosen])


def noise(count: int) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(1)
    return torch.randint(256, (count, 3, 32, 32), generator=draw, dtype=torch.uint8), torch.randint(CLASSES, (count,), generator=draw)


def job_of(arguments: argparse.Namespace) -> Job:
    """The job; the cohorts are those that our federation draws from seed 0."""
    count = arguments.users * SAMPLES
    images, labels = noise(count) if arguments.random else pictures(arguments.data / "train", count)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0))
    cohorts = [sample(arguments.users, arguments.cohort, 0, round) for round in range(arguments.rounds)]
    settings = Settings("CNN", arguments.lr, SAMPLES, BATCH, clock=arguments.clock, channels_last=arguments.channels_last)
    return Job(settings, images[order], labels[order], torch.tensor(cohorts), make("CNN").state_dict())


def accuracy(job: Job, weights: list[Tensor], images: Tensor, labels: Tensor) -> float:
    model = job.model()
    model.load_state_dict(dict(zip(model.state_dict(), weights, strict=True)))
    with torch.no_grad():
        return float((torch.cat([model(as_input(part)).argmax(1) for part in images.split(500)]) == labels).double().mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--data", type=Path, help="folder of train/CLASS/*.jpg and test/CLASS/*.jpg")
    source.add_argument("--random", action="store_true", help="pictures of noise")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--users", type=int, default=1000)
    parser.add_argument("--cohort", type=int, default=50)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--runs", type=int, default=3, help="repetitions")
    parser.add_argument("--lr", type=float, default=0.1)
    parser.add_argument("--processes", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--peers", nargs="*", default=list(NEEDED), choices=list(NEEDED))
    parser.add_argument("--ours", type=json.loads, default={}, help="more settings of our federation, as '{\"client_batch\": 10}'")
    parser.add_argument("--channels-last", action="store_true", help="everybody's model laid out so")
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall")
    parser.add_argument("--venvs", type=Path, default=VENVS, help="where peers' environments are, or are made")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.users, arguments.cohort, arguments.rounds, arguments.runs = 100, 10, 3, 1
    torch.set_num_threads(1)
    pythons: dict[str, dict[str, str]] = {"bare": {}, "our": {}}
    for peer in arguments.peers:
        try:
            pythons[peer] = {"python": environment(peer, arguments.venvs)}
        except RuntimeError as error:
            print(f"left out: {error}")
    job = job_of(arguments)
    cells = [(peer, count) for count in arguments.processes for peer in pythons if count == 1 or peer != "bare"]
    answers: dict[tuple[str, int], list[Answer]] = {cell: [] for cell in cells}
    wanted = run("bare", job).weights
    for _ in range(arguments.runs):
        for peer, count in list(answers):
            settings = {"settings": arguments.ours} if peer == "our" else {}
            try:
                answer = run(peer, on(job, processes=count), **pythons[peer], **settings)
            except RuntimeError as error:
                print(f"left out: {error}")
                del answers[peer, count]
                continue
            check(f"{NAMES[peer]}, {count} processes", answer.weights, wanted, 1e-3)
            answers[peer, count].append(answer)
    tell(answers, arguments.clock)
    if arguments.data:
        images, labels = pictures(arguments.data / "test", 2000)
        scores = {NAMES[peer]: accuracy(job, runs[0].weights, images, labels) for (peer, count), runs in answers.items() if runs}
        print("accuracy on 2,000 test images: " + ", ".join(f"{name} {score:.2%}" for name, score in scores.items()))


def tell(answers: dict[tuple[str, int], list[Answer]], clock: str) -> None:
    """A line for each cell, with its ratio to ours with as many processes, and to the same with one."""
    seconds = {cell: [value for answer in runs for value in answer.seconds] for cell, runs in answers.items()}
    middle = {cell: statistics.median(values) for cell, values in seconds.items()}
    print(f"seconds of a round ({clock} time), torch {torch.__version__}; final weights as the bare loop's")
    for (peer, count), runs in answers.items():
        ours, one = middle.get(("our", count)), middle.get((peer, 1))
        ratio = f"{middle[peer, count] / ours:.2f} times ours" if ours and peer != "our" else ""
        gain = f"{one / middle[peer, count]:.2f} times as fast as with one" if one and count > 1 else ""
        mib = statistics.median(answer.mib for answer in runs)
        told = "; ".join(filter(None, [f"{spread(seconds[peer, count])} s", f"{mib:.0f} MiB", ratio, gain]))
        print(f"    {NAMES[peer]:10s} {count} {'process  ' if count == 1 else 'processes'} {told}")


if __name__ == "__main__":
    main()
