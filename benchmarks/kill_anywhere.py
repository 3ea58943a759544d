"""Kill runs anywhere, damage what they leave, take their disk away; resume them, and compare with what nobody disturbed, bit for bit.

    python benchmarks/kill_anywhere.py                              every method and fault, 10 times each: about an hour of one core
    python benchmarks/kill_anywhere.py --times 40 --out faults.json stopped and called again it goes on; the table is of all calls
    python benchmarks/kill_anywhere.py --times 100 --methods top-k intrinsic --faults killed

A toy model, so that a run takes a second and what is tried is everything around training. A row is a method, a column a fault, a cell how
often it was tried and how often the run ended, resumed, with the weights and the history of the undisturbed one. The exit code is 1 where
anything was lost. Processes are forked, and killed by SIGKILL once they have computed for a time drawn at random from a whole run's.

- killed: a federation's only process, up to three times in one run.
- killed, two: both processes of a federation on two, which then goes on with one or two, at random.
- one of two: one of them alone; the other gets SIGTERM five seconds later, and SIGKILL twenty, unless it has ended, as torchrun does it.
- raised: one of two meets an error in the middle of a round: both end, and the first alone tells of it.
- cut, flipped: killed, and the newest checkpoint loses its end, or a bit of its tensors changes.
- no room: from some byte on the system refuses to make files longer, as a full disk does.
- closed: the folder may no longer be written (for another user than root, which the process becomes).
- Trainer: killed under Lightning's Trainer, with checkpoints in the middle of epochs; damaged: and one cut or flipped; no room: or closed.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import random
import resource
import shutil
import signal
import socket
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor
from toy_runs import FEDERATED, TRAINED, Net, federate, fit

from featherlight.commands import trainer_checkpoint
from featherlight.fed_loop import checkpoint
from featherlight.fed_loop.whole_files import write_text

# -- runs, each in a process of its own ---------------------------------------------------------------------------------
Run = Callable[[str, Path, int], None]


def start(run: Run, name: str, folder: Path, processes: int = 1, before: Callable[[], None] = lambda: None) -> list[int]:
    """Fork it; what it says goes to ``said`` beside the folder. Returns the processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = []
    for rank in range(processes):
        pid = os.fork()
        if pid:
            started.append(pid)
            continue
        code = 1
        try:
            said = os.open(folder.with_suffix(".said"), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
            os.dup2(said, 1)
            os.dup2(said, 2)
            if processes > 1:  # as torchrun would
                told = {"RANK": rank, "LOCAL_RANK": rank, "GROUP_RANK": 0, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
                told |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "kill_anywhere"}
                os.environ |= {key: str(value) for key, value in told.items()}
            before()
            run(name, folder, processes)
            code = 0
        except SystemExit as left:
            code = int(left.code or 0)
        except BaseException:
            with suppress(OSError):  # where it has no room for that either
                traceback.print_exc()
        finally:
            with suppress(OSError):
                sys.stderr.flush()
            os._exit(code)  # come what may: this is a copy of the process that looks after the folder
    return started


def computed(pid: int) -> float:
    """Seconds for which a process's first thread has had a core, so far."""
    try:
        return int(Path(f"/proc/{pid}/schedstat").read_text().split()[0]) / 1e9
    except (OSError, IndexError):
        return float("inf")


def kill(pids: list[int], victims: list[int], after: float) -> bool:
    """SIGKILL the ``victims`` once the first has computed for so long; returns whether they were still there. All must end."""
    gone: dict[int, int] = {}
    while victims[0] not in gone and computed(victims[0]) < after:
        time.sleep(0.001)
        _reap(pids, gone)
    killed = [victim for victim in victims if victim not in gone]
    for victim in killed:
        os.kill(victim, signal.SIGKILL)
    began, signals = time.monotonic(), [(20.0, signal.SIGKILL), (5.0, signal.SIGTERM)]  # as torchrun does with the others
    while len(gone) < len(pids):
        time.sleep(0.002)
        _reap(pids, gone)
        if signals and time.monotonic() - began > signals[-1][0]:
            number = signals.pop()[1]
            for pid in set(pids) - gone.keys():
                os.kill(pid, number)
    return bool(killed)


def _reap(pids: list[int], gone: dict[int, int]) -> None:
    for pid in pids:
        if pid not in gone and os.waitpid(pid, os.WNOHANG)[0]:
            gone[pid] = 1


def wait(pids: list[int]) -> list[int]:
    """Exit codes."""
    return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]


# -- faults -------------------------------------------------------------------------------------------------------------
def killed(run: Run, name: str, folder: Path, whole: float, draw: random.Random) -> bool:
    hit = False
    for _ in range(draw.randint(1, 3)):
        pids = start(run, name, folder)
        hit |= kill(pids, pids, draw.uniform(0, whole))
    return hit


def killed_two(run: Run, name: str, folder: Path, whole: float, draw: random.Random) -> bool:
    pids = start(run, name, folder, processes=2)
    hit = kill(pids, pids, draw.uniform(0, whole))
    if draw.random() < 0.5:
        wait(start(run, name, folder, processes=2))
    return hit


def one_of_two(run: Run, name: str, folder: Path, whole: float, draw: random.Random) -> bool:
    pids = start(run, name, folder, processes=2)
    return kill(pids, [draw.choice(pids)], draw.uniform(0, whole))


def raised(run: Run, name: str, folder: Path, whole: float, draw: random.Random) -> bool:
    victim, steps = draw.randrange(2), iter(range(draw.randint(1, 12)))

    def arm() -> None:
        own = Net.training_step

        def training_step(self: Net, batch: Any, batch_idx: int) -> Tensor:
            if next(steps, None) is None:
                raise RuntimeError("raised on purpose")
            return own(self, batch, batch_idx)

        if os.environ["RANK"] == str(victim):
            Net.training_step = training_step  # type: ignore[method-assign]

    codes, said = wait(start(run, name, folder, processes=2, before=arm)), folder.with_suffix(".said").read_text()
    if codes == [0, 0]:
        return False
    if codes != [1, 0] or said.count("raised on purpose") > 2 or "onnection" in said:  # 2: the line of code that raises, and what it says
        (folder / "messy").touch()
    return True


def damaged(how: Callable[[bytearray, random.Random], bytes], run: Run, name: str, folder: Path, whole: float, draw: random.Random) -> bool:
    pids = start(run, name, folder)
    kill(pids, pids, draw.uniform(0.5 * whole, 1.2 * whole))
    found = trainer_checkpoint.existing(folder)[::-1] if run is fit else checkpoint.existing(folder)
    if len(found) < 2:
        return False
    found[-1].write_bytes(how(bytearray(found[-1].read_bytes()), draw))
    (folder / "done.pt").unlink(missing_ok=True)
    return True


def cut(content: bytearray, draw: random.Random) -> bytes:
    return bytes(content[: draw.randrange(len(content))])


def flipped(content: bytearray, draw: random.Random) -> bytes:
    content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    return bytes(content)


def no_room(run: Run, name: str, folder: Path, whole: float, draw: random.Random) -> bool:
    most = draw.randrange(1, 20_000)
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    codes = wait(start(run, name, folder, before=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (most, hard))))
    return codes != [0] and not (folder / "done.pt").exists()


def closed(run: Run, name: str, folder: Path, whole: float, draw: random.Random) -> bool:
    pids = start(run, name, folder)
    kill(pids, pids, draw.uniform(0.2 * whole, 0.9 * whole))
    if (folder / "done.pt").exists() or not folder.exists():
        return False
    folder.chmod(0o555)
    try:
        wait(start(run, name, folder, before=lambda: os.setuid(65534) if os.geteuid() == 0 else None))
    finally:
        folder.chmod(0o755)
    return not (folder / "done.pt").exists()


Fault = Callable[[Run, str, Path, float, random.Random], bool]
FAULTS: dict[str, Fault] = {
    "killed": killed,
    "killed, two": killed_two,
    "one of two": one_of_two,
    "raised": raised,
    "cut": lambda *told: damaged(cut, *told),
    "flipped": lambda *told: damaged(flipped, *told),
    "no room": no_room,
    "closed": closed,
    "Trainer": killed,
    "Trainer, damaged": lambda *told: damaged(told[-1].choice((cut, flipped)), *told),
    "Trainer, no room": lambda *told: told[-1].choice((no_room, closed))(*told),
}


def same(folder: Path, whole: dict[str, Any]) -> bool:
    """Weights bit for bit, and what was logged."""
    if not (folder / "done.pt").exists() or (folder / "messy").exists():
        return False
    found = torch.load(folder / "done.pt", weights_only=True)
    weights = all(torch.equal(found["weights"][name], value) for name, value in whole["weights"].items())
    return weights and repr(found["history"]) == repr(whole["history"])


def tell_loss(folder: Path, name: str, fault: str, seed: int) -> None:
    said = folder.with_suffix(".said").read_text() if folder.with_suffix(".said").exists() else ""
    print(f"LOST: {name}, {fault}, seed {seed}\n{said[-1500:]}", file=sys.stderr, flush=True)


def undisturbed(run: Run, name: str, home: Path) -> tuple[dict[str, Any], float]:
    """What a run that nobody disturbs ends with, and for how many seconds it computes; run where it has not been yet."""
    folder = home / f"{run.__name__}-{name}-whole"
    if not (folder / "done.pt").exists():
        folder.mkdir(exist_ok=True)
        [pid] = start(run, name, folder)
        seconds = 0.0
        while not os.waitpid(pid, os.WNOHANG)[0]:
            seconds = max(seconds, now) if (now := computed(pid)) < float("inf") else seconds
            time.sleep(0.002)
        if not (folder / "done.pt").exists():
            raise RuntimeError(f"{name} does not run at all:\n{folder.with_suffix('.said').read_text()[-3000:]}")
        (folder / "seconds").write_text(str(seconds))
    return torch.load(folder / "done.pt", weights_only=True), float((folder / "seconds").read_text())


def trial(fault: str, name: str, number: int, seed: int, home: Path) -> tuple[bool, bool]:
    """Whether the fault struck, and whether nothing was lost."""
    run: Run = fit if fault.startswith("Trainer") else federate
    whole, seconds = undisturbed(run, name, home)
    folder = home / f"{run.__name__}-{name}-{fault}-{number}"
    folder.mkdir()
    struck = FAULTS[fault](run, name, folder, seconds, random.Random(f"{seed} {fault} {name} {number}"))
    if not (folder / "done.pt").exists():
        wait(start(run, name, folder))
    kept = same(folder, whole)
    if not kept:
        tell_loss(folder, name, f"{fault}, number {number}", seed)
    shutil.rmtree(folder)
    folder.with_suffix(".said").unlink(missing_ok=True)
    return struck or not kept, kept


# -- many of them -------------------------------------------------------------------------------------------------------
class Counts:
    """By method and fault how often it was tried, how often nothing was lost, and the number of the next trial.

    Args:
        out: a file that keeps them.
    """

    def __init__(self, out: Path | None) -> None:
        self._out = out
        self._kept: dict[str, dict[str, list[int]]] = json.loads(out.read_text()) if out is not None and out.exists() else {}

    def of(self, name: str, fault: str) -> list[int]:
        return self._kept.setdefault(name, {}).setdefault(fault, [0, 0, 0])

    def add(self, name: str, fault: str, struck: bool, kept: bool) -> None:
        own = self.of(name, fault)
        own[:] = own[0] + struck, own[1] + (struck and kept), own[2] + 1
        if self._out is not None:
            write_text(self._out, json.dumps(self._kept, indent=1))

    def tell(self, console: Console) -> int:
        """All that was ever counted, as a table; returns how many were lost."""
        every = [(tried, survived) for own in self._kept.values() for tried, survived, _ in own.values()]
        tried = sum(count for count, _ in every)
        lost = tried - sum(count for _, count in every)
        faults = [fault for fault in FAULTS if any(fault in own for own in self._kept.values())]
        table = Table("method", *faults, box=box.MARKDOWN)
        for name in FEDERATED:
            if own := self._kept.get(name):
                table.add_row(name, *(_cell(*own[fault][:2]) if fault in own else "" for fault in faults))
        console.print(table)
        console.print(f"{tried} faults, {lost} lost")
        return lost


def _cell(tried: int, survived: int) -> str:
    return f"{tried}" if tried == survived else f"{tried}, LOST {tried - survived}"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=10, help="how often each fault is to strike each method, earlier calls' counted in")
    parser.add_argument("--methods", nargs="+", default=[*FEDERATED], choices=[*FEDERATED])
    parser.add_argument("--faults", nargs="+", default=[*FAULTS], choices=[*FAULTS])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=None, help="a file of counts, to which this call adds its own")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # who ignores it cannot wait
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    counts = Counts(options.out)
    cells = [(name, fault) for name in options.methods for fault in options.faults if not fault.startswith("Trainer") or name in TRAINED]
    with tempfile.TemporaryDirectory() as home:
        Path(home).chmod(0o755)
        for times in range(1, options.times + 1):  # each once, then each again: whenever it is stopped, all were tried alike
            for name, fault in cells:
                own = counts.of(name, fault)
                while own[0] < times and own[2] < 3 * times:
                    counts.add(name, fault, *trial(fault, name, own[2], options.seed, Path(home)))
            print(f"each {times} times", file=sys.stderr, flush=True)
    return int(counts.tell(Console(width=200)) > 0)


if __name__ == "__main__":
    sys.exit(main())
