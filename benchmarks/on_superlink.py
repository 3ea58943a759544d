"""Every method on one SuperLink with two SuperNodes, TLS and keys on: three rounds each, beside the built-in loop's from the same seed.

    python benchmarks/on_superlink.py                           minutes a row on one core: for every message a process imports torch
    python benchmarks/on_superlink.py --ways TopK PrismSampling
    python benchmarks/on_superlink.py --ways each               every method by itself, too

A row is a way to train a small vision transformer on digits, with as many methods at once as go together. It has the
largest difference between any two weights of both runs at the end; payload bytes of all rounds and clients, the same in both runs or it
says so; seconds from ``flwr run`` to the end of the run, and those of ``featherlight federate``. What is refused there has the reason in
its row. The exit code is 1 where weights are further apart than :data:`WAYS` allows, bytes differ, or what should be refused ran.

Flower gives up a task whose process has not said within 30 seconds that it lives, and begins it anew: where a machine is so busy that
imports take longer, rounds never end. ``--alive 600`` gives all of its processes more time.

All processes are on loopback, and gone when it is over. Needs ``featherlight[flower]``.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout, suppress
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from featherlight import plugins
from featherlight.commands.federate import federate
from featherlight.fed_loop import checkpoint
from featherlight.flower.credentials import write_credentials
from featherlight.flower.folder import write_app
from featherlight.plugins import Chain, Plugin

CLIENTS, ROUNDS = 2, 3
PATIENCE = 1800
"""Seconds that anything may take; a round waits half of it for its clients."""


# -- what is run ------------------------------------------------------------------------------------------------------------
class Way(NamedTuple):
    """How to train.

    Args:
        plugins: of the configuration; model: arguments of it; federation: settings.
        tolerance: how far weights may be apart; refused: why this way does not run with clients in processes of their own.
    """

    plugins: Sequence[Mapping[str, Any]] = ()
    model: Mapping[str, Any] = {}
    federation: Mapping[str, Any] = {}
    tolerance: float = 0.0
    refused: str | None = None


STAGED = {"blocks": "backbone.blocks.*", "periods_per_stage": 1}
NEEDED: Mapping[str, Mapping[str, Any]] = {
    "ClientPrivacy": {"clip": 1.0, "noise_multiplier": 0.1, "statistics": "stay"},
    "DepthDropout": {"blocks": "backbone.blocks.*"},
    "FetchSGD": {"columns": 200, "k": 50},
    "IntrinsicProjection": {"dim": 50},
    "LayerFreezing": STAGED,
    "NormClipping": {"max_norm": 1.0},
    "PartitionedTraining": {"cut": "backbone.blocks.0"},
    "PrismSampling": {"keep": 0.5},
    "ProgressiveGrowth": STAGED,
    "TopK": {"k": 50},
}
"""Arguments that a method does not do without; the others take their defaults."""


def named(*methods: str) -> list[dict[str, Any]]:
    """Plugins as a configuration has them."""
    return [{"class_path": name, "init_args": dict(NEEDED.get(name, {}))} for name in methods]


METHODS = [
    name
    for name in plugins.__all__
    if isinstance(kind := getattr(plugins, name), type) and issubclass(kind, Plugin) and kind not in (Plugin, Chain)
]
TOGETHER = (
    ("LayerFreezing", "MOON", "FedEMA", "ServerCalibration", "TopK", "Quantization"),
    ("PrismSampling", "ProgressiveGrowth", "DepthDropout", "RepresentationAlignment", "Proximal", "NormClipping", "Quantization"),
)
PLAIN = {"optimizer": "sgd", "lr": 0.05}
"""Where clients work weights out by themselves: Adam makes as much of a gradient's last digits as of its first."""
WAYS: dict[str, Way] = {
    "averaging": Way(),
    **{name: Way(named(name)) for name in METHODS},
    "IntrinsicProjection": Way(named("IntrinsicProjection"), model=PLAIN, tolerance=1e-5),
    "PartitionedTraining": Way(
        named("PartitionedTraining"),
        refused="a model divided between device and server does not run with clients in processes of their own",
    ),
    **{" + ".join(names): Way(named(*names)) for names in TOGETHER},
    "IntrinsicProjection + ClientPrivacy": Way(named("IntrinsicProjection", "ClientPrivacy"), model=PLAIN, tolerance=1e-5),
    "Median": Way(federation={"aggregate": {"class_path": "Median"}}),
}
ALL_METHODS = [*(" + ".join(names) for names in TOGETHER), "PartitionedTraining", "IntrinsicProjection + ClientPrivacy", "FetchSGD"]
"""Ways that have every method of :data:`METHODS` among them, in five runs."""


def configuration(way: Way) -> str:
    """A small federation, as YAML."""
    backbone = {"backbone": "vit", "backbone_options": {"depth": 2, "width": 16, "heads": 2, "patch_size": 4}}
    model = {**backbone, "image_size": 8, "in_channels": 1, "hidden_dim": 16, "output_dim": 8, **way.model}
    data = {"dataset": "digits", "batch_size": 16, "num_clients": CLIENTS, "limit_train": 32 * CLIENTS, "server_fraction": 0.3}
    content = {
        "model": {"class_path": "SimCLR", "init_args": model},
        "data": {"class_path": "ImageData", "init_args": data},
        "plugins": [dict(one) for one in way.plugins],
        "federation": {"rounds": ROUNDS, "seed": 5, "accelerator": "cpu", "progress": False, **way.federation},
        "loggers": [],
    }
    return yaml.safe_dump(content)


# -- where it runs ----------------------------------------------------------------------------------------------------------
def free_ports(count: int) -> list[int]:
    """Of this machine, as it is now."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [int(one.getsockname()[1]) for one in sockets]
    for one in sockets:
        one.close()
    return ports


class Deployment:
    """A SuperLink and its SuperNodes on loopback, each a process, with TLS and authentication on.

    Args:
        folder: of keys, logs and homes; nodes: how many; alive: seconds within which processes must say that they live, None: Flower's own.
    """

    def __init__(self, folder: Path, nodes: int, alive: int | None = None) -> None:
        self.folder, self.keys = folder, folder / "keys"
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self.port, *self.node_ports = free_ports(nodes + 1)
        write_credentials(self.keys, ["127.0.0.1"], nodes)
        self.paths = os.environ.get("PYTHONPATH", "")
        if alive is not None:
            patch = f"import flwr.common.constant\n\nflwr.common.constant.HEARTBEAT_DEFAULT_INTERVAL = {alive}\n"
            (self.home("all") / "sitecustomize.py").write_text(patch)
            self.paths = os.pathsep.join(filter(None, (str(self.home("all")), self.paths)))
        (self.home("cli") / "config.toml").write_text(
            f'[superlink]\ndefault = "own"\n\n[superlink.own]\naddress = "127.0.0.1:{self.port}"\n'
            f'root-certificates = "{self.keys / "ca.crt"}"\n'
        )

    def home(self, name: str) -> Path:
        """A host's own Flower folder."""
        path = self.folder / "homes" / name
        path.mkdir(parents=True, exist_ok=True)
        return path

    def environment(self, name: str) -> dict[str, str]:
        bin = str(Path(sys.executable).parent)
        quiet = {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1", "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
        own = {"FLWR_HOME": str(self.home(name)), "PATH": bin + os.pathsep + os.environ["PATH"], "PYTHONPATH": self.paths}
        return {**os.environ, **quiet, **own}

    def start(self, name: str, *command: str) -> None:
        with (self.folder / f"{name}.log").open("ab") as log:
            self.processes[name] = subprocess.Popen(
                command,
                env=self.environment(name),
                cwd=self.folder,
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )

    def flwr(self, *command: str) -> str:
        """What Flower's own command says.

        Raises:
            RuntimeError: it fails.
        """
        done = subprocess.run(
            ["flwr", *command], env=self.environment("cli"), cwd=self.folder, capture_output=True, text=True, timeout=PATIENCE
        )
        if done.returncode:
            raise RuntimeError(f"flwr {' '.join(command)}: {done.stdout}{done.stderr}")
        return done.stdout

    def start_superlink(self) -> None:
        files = (("ca-certfile", "ca.crt"), ("certfile", "server.crt"), ("keyfile", "server.key"))
        tls = [f"--ssl-{kind}={self.keys / file}" for kind, file in files]
        at = ["--host", "127.0.0.1", "--port", str(self.port)]
        self.start("superlink", "flower-superlink", *tls, *at, "--enable-supernode-auth", "--disable-runtime-dependency-installation")
        self.until(self.listening, "the SuperLink listens")

    def listening(self) -> bool:
        with suppress(OSError), socket.create_connection(("127.0.0.1", self.port), timeout=1):
            return True
        return False

    def node(self, key: Path, port: int) -> list[str]:
        link = ["--superlink", f"127.0.0.1:{self.port}", "--root-certificates", str(self.keys / "ca.crt")]
        return ["flower-supernode", *link, "--auth-supernode-private-key", str(key), "--host", "127.0.0.1", "--port", str(port)]

    def start_node(self, number: int) -> None:
        key, port = self.keys / f"node-{number}", self.node_ports[number]
        self.start(f"node-{number}", *self.node(key, port), "--node-config", f"partition-id={number}")

    def try_node(self, key: Path) -> tuple[int, str]:
        """The exit code of a SuperNode whose key is not known, and what it said."""
        self.start("stranger", *self.node(key, *free_ports(1)))
        return self.processes.pop("stranger").wait(PATIENCE), (self.folder / "stranger.log").read_text()

    def run(self, app: Path, *options: str) -> str:
        """Run an app to its end; what its ServerApp said."""
        before = self.ended()
        number = str(json.loads(self.flwr("run", str(app), "--format", "json", *options))["run-id"])
        self.until(lambda: self.ended() > before, f"{app.name} is over")
        return self.flwr("log", number, "--show")

    def ended(self) -> int:
        """Runs that are over."""
        return (self.folder / "superlink.log").read_text(errors="replace").count("Finished task")

    def until(self, there: Callable[[], bool], what: str) -> None:
        """Wait for something, as long as all processes live.

        Raises:
            RuntimeError: one does not, or it takes too long.
        """
        end = time.monotonic() + PATIENCE
        while not there():
            if dead := [name for name, process in self.processes.items() if process.poll() is not None]:
                raise RuntimeError(f"ended: {dead}\n{self.logs()}")
            if time.monotonic() > end:
                raise RuntimeError(f"waiting until {what}\n{self.logs()}")
            time.sleep(0.2)

    def logs(self) -> str:
        return "\n".join(f"--- {path.name}\n{path.read_text(errors='replace')[-3000:]}" for path in sorted(self.folder.glob("*.log")))

    def stop(self) -> None:
        for process in reversed(self.processes.values()):
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)
        end = time.monotonic() + 5
        for process in self.processes.values():
            with suppress(subprocess.TimeoutExpired):
                process.wait(max(0.1, end - time.monotonic()))
        for process in self.processes.values():
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        while self.started() and time.monotonic() < end + 5:  # children see within moments that their parents are gone
            time.sleep(0.2)
        for number in self.started():
            with suppress(ProcessLookupError):
                os.kill(number, signal.SIGKILL)

    def started(self) -> list[int]:
        """Processes that belong here, in sessions of their own, too: those whose Flower folder is one of ours."""
        mark, found = f"FLWR_HOME={self.folder / 'homes'}".encode(), []
        for path in Path("/proc").glob("[0-9]*/environ"):
            with suppress(OSError):
                if mark in path.read_bytes():
                    found.append(int(path.parent.name))
        return found


@contextmanager
def deployed(folder: Path, nodes: int = CLIENTS, alive: int | None = None) -> Iterator[Deployment]:
    """A SuperLink that knows the keys of as many SuperNodes, which are there; arguments are :class:`Deployment`'s."""
    deployment = Deployment(folder, nodes, alive)
    try:
        deployment.start_superlink()
        for number in range(nodes):
            deployment.flwr("supernode", "register", str(deployment.keys / f"node-{number}.pub"))
        for number in range(nodes):
            deployment.start_node(number)
        yield deployment
    finally:
        deployment.stop()


# -- the comparison -----------------------------------------------------------------------------------------------------------
class Compared(NamedTuple):
    """One way, in both loops.

    Args:
        said: by the ServerApp; there, here: what both runs left, None where a run left nothing; seconds: of both.
    """

    said: str
    there: Mapping[str, Any] | None
    here: Mapping[str, Any]
    seconds: tuple[float, float]

    def apart(self) -> float:
        """The largest difference between any two weights or buffers, of the same names and shapes."""
        assert self.there is not None
        there, here = self.there["server"], self.here["server"]
        assert there.keys() == here.keys()
        return max(float((value.double() - here[name].double()).abs().max()) for name, value in there.items())

    def traffic(self) -> list[list[tuple[int, int]]]:
        """Of both runs, payload bytes down and up in each round."""
        return [[(row["bytes_down"], row["bytes_up"]) for row in state["history"]] for state in (self.there, self.here) if state]


def compare(deployment: Deployment, name: str) -> Compared:
    """Run one of :data:`WAYS` on the SuperLink and here."""
    text = configuration(WAYS[name])
    folder = deployment.folder / re.sub(r"[^A-Za-z0-9]+", "-", name)[:32].strip("-")
    here, there = folder / "here", folder / "there"
    write_app(folder / folder.name, text, "small")
    (folder / "small.yaml").write_text(text)
    started = time.monotonic()
    said = deployment.run(
        folder / folder.name, "--run-config", f'arguments="--federation.folder={there}" wait={PATIENCE // 2} patience={PATIENCE // 2}'
    )
    over = time.monotonic()
    federate(["-c", str(folder / "small.yaml")], folder=here)
    seconds = over - started, time.monotonic() - over
    left = checkpoint.read_newest(there)[1] if checkpoint.path_of(there, ROUNDS).exists() else None
    return Compared(said, left, checkpoint.read_newest(here)[1], seconds)


def row(name: str, compared: Compared) -> tuple[str, bool]:
    """A line of the table, and whether all is as it should be."""
    way, took = WAYS[name], "{:.0f} | {:.1f}".format(*compared.seconds)
    if compared.there is None:
        fine = way.refused is not None and way.refused in compared.said
        told = f"refused: {way.refused}" if fine else f"ended with: {compared.said.strip()[-2000:]}"
        return f"| {name} | {told} | | {took} |", fine
    apart, (there, here) = compared.apart(), compared.traffic()
    bytes_told = f"{sum(map(sum, there)):,}" + ("" if there == here else f", here {sum(map(sum, here)):,}")
    if lost := sum(one["rejected"] for one in compared.there["history"]):
        bytes_told += f"; {lost} updates lost"
    return f"| {name} | {apart:.1g} | {bytes_told} | {took} |", way.refused is None and apart <= way.tolerance and there == here


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    choices = [*WAYS, "each"]
    parser.add_argument("--ways", nargs="+", default=ALL_METHODS, choices=choices, metavar="WAY", help=f"of {', '.join(choices)}")
    parser.add_argument("--alive", type=int, help="seconds in place of Flower's 30, for busy machines")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # and no process stays behind
    fine = True
    with (
        tempfile.TemporaryDirectory(prefix="on_superlink-") as folder,
        deployed(Path(folder), alive=arguments.alive) as deployment,
    ):
        print("| way | largest difference of a weight | payload bytes | seconds there | here |\n|---|---|---|---|---|")
        for name in WAYS if "each" in arguments.ways else arguments.ways:
            with redirect_stdout(sys.stderr):
                compared = compare(deployment, name)
            line, as_it_should_be = row(name, compared)
            print(line, flush=True)
            fine &= as_it_should_be
    sys.exit(not fine)


if __name__ == "__main__":
    main()
