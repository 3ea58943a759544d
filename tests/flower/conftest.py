"""Flower, tried in two ways: a SuperLink and its SuperNodes on loopback, each a process, with TLS and authentication on, gone when it is
over; and ServerApp and ClientApps in one process."""

import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import yaml

PATIENCE = 600


def free_ports(count):
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


class Deployment:
    """Args: folder: of keys, logs and homes; nodes: how many."""

    def __init__(self, folder, nodes):
        self.folder, self.keys, self.processes = folder, folder / "keys", {}
        self.number = None
        self.port, *self.node_ports = free_ports(nodes + 1)
        from featherlight.flower.credentials import write_credentials

        write_credentials(self.keys, ["127.0.0.1"], nodes)
        home = self.home("cli")
        (home / "config.toml").write_text(
            f'[superlink]\ndefault = "own"\n\n[superlink.own]\naddress = "127.0.0.1:{self.port}"\n'
            f'root-certificates = "{self.keys / "ca.crt"}"\n'
        )

    def home(self, name):
        """A host's own Flower folder."""
        path = self.folder / "homes" / name
        path.mkdir(parents=True, exist_ok=True)
        return path

    def environment(self, name):
        bin = str(Path(sys.executable).parent)
        quiet = {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1", "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
        return {**os.environ, **quiet, "FLWR_HOME": str(self.home(name)), "PATH": bin + os.pathsep + os.environ["PATH"]}

    def start(self, name, *command):
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

    def flwr(self, *command):
        done = subprocess.run(
            ["flwr", *map(str, command)], env=self.environment("cli"), cwd=self.folder, capture_output=True, text=True, timeout=PATIENCE
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def start_superlink(self):
        tls = [
            f"--ssl-{kind}={self.keys / file}"
            for kind, file in (("ca-certfile", "ca.crt"), ("certfile", "server.crt"), ("keyfile", "server.key"))
        ]
        at = ["--host", "127.0.0.1", "--port", str(self.port)]
        self.start("superlink", "flower-superlink", *tls, *at, "--enable-supernode-auth", "--disable-runtime-dependency-installation")
        self.until(self.listening, "the SuperLink listens")

    def listening(self):
        with suppress(OSError), socket.create_connection(("127.0.0.1", self.port), timeout=1):
            return True
        return False

    def node(self, key, port):
        link = ["--superlink", f"127.0.0.1:{self.port}", "--root-certificates", str(self.keys / "ca.crt")]
        return ["flower-supernode", *link, "--auth-supernode-private-key", str(key), "--host", "127.0.0.1", "--port", str(port)]

    def start_node(self, number):
        key, port = self.keys / f"node-{number}", self.node_ports[number]
        self.start(f"node-{number}", *self.node(key, port), "--node-config", f"partition-id={number}")

    def try_node(self, key):
        """The exit code of a SuperNode whose key is not known, and what it said."""
        self.start("stranger", *self.node(key, *free_ports(1)))
        return self.processes["stranger"].wait(PATIENCE), (self.folder / "stranger.log").read_text()

    def run(self, app, *options):
        """Start a run."""
        self.number = json.loads(self.flwr("run", app, "--format", "json", *options))["run-id"]

    def until(self, there, what):
        """Wait for something, as long as all processes live, and the run."""
        end = time.monotonic() + PATIENCE
        while not there():
            ended = "Finished task" in (self.folder / "superlink.log").read_text(errors="replace")
            assert not ended or there(), f"the run ended\n{self.flwr('log', self.number, '--show')}"
            dead = [name for name, process in self.processes.items() if process.poll() is not None]
            assert not dead, f"ended: {dead}\n{self.logs()}"
            assert time.monotonic() < end, f"waiting until {what}\n{self.logs()}"
            time.sleep(0.2)

    def logs(self):
        return "\n".join(f"--- {path.name}\n{path.read_text(errors='replace')[-3000:]}" for path in sorted(self.folder.glob("*.log")))

    def stop(self):
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

    def started(self):
        """Processes that belong here, in sessions of their own, too: those whose Flower folder is one of ours."""
        mark, found = f"FLWR_HOME={self.folder / 'homes'}".encode(), []
        for path in Path("/proc").glob("[0-9]*/environ"):
            with suppress(OSError):
                if mark in path.read_bytes():
                    found.append(int(path.parent.name))
        return found


@pytest.fixture
def superlink():
    """``with superlink(folder, nodes) as deployment``."""
    return deployed


@contextmanager
def deployed(folder, nodes):
    """A SuperLink that knows the keys of as many SuperNodes, which are there."""
    deployment = Deployment(folder, nodes)
    try:
        deployment.start_superlink()
        for number in range(nodes):
            deployment.flwr("supernode", "register", deployment.keys / f"node-{number}.pub")
        for number in range(nodes):
            deployment.start_node(number)
        yield deployment
    finally:
        deployment.stop()


@pytest.fixture
def configured(tmp_path):
    """Writes a configuration; returns its path."""

    def write(*methods, clients=2, **federation):
        model = {"backbone": "vit", "backbone_options": {"depth": 2, "width": 16, "heads": 2, "patch_size": 4}}
        content = {
            "model": {"class_path": "SimCLR", "init_args": {**model, "image_size": 8, "in_channels": 1, "hidden_dim": 16, "output_dim": 8}},
            "data": {"class_path": "ImageData", "init_args": {"batch_size": 16, "num_clients": clients, "limit_train": 32 * clients}},
            "plugins": list(methods),
            "federation": {"rounds": 3, "seed": 5, "accelerator": "cpu", "progress": False, **federation},
            "loggers": [],
        }
        path = tmp_path / "small.yaml"
        path.write_text(yaml.safe_dump(content))
        return path

    return write


@pytest.fixture
def serve(tmp_path):
    """Runs the ServerApp on nodes; returns the run's folder and the grid."""
    spec = importlib.util.spec_from_file_location("handed", Path(__file__).parent / "handed.py")
    handed = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(handed)

    def run(path, nodes=({"partition-id": 1}, {"partition-id": 0}), down=(), folder="there", **options):
        return tmp_path / folder, handed.serve(path, tmp_path / folder, nodes, down, **options)

    return run
