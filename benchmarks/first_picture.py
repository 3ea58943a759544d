"""How long it takes from ``git clone`` to the first picture: a clone, a virtual environment, README's own first line, step by step.

Seconds of the clock, and of processors, which say more on a machine that does other things as well. Packages come from the installer's own
cache where it has them.

python benchmarks/first_picture.py [--source PATH_OR_URL] [--installer pip]
"""

from __future__ import annotations

import argparse
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
PICTURE = "comparison.png"
INSTALLERS = {"pip": ["-m", "pip", "install"], "uv": ["-m", "uv", "pip", "install"]}


def first_line(readme: str) -> list[list[str]]:
    """The commands of README's first block of ``bash``.

    Raises:
        ValueError: it is none that installs and then runs something.
    """
    block = re.search(r"```bash\n(.*?)\n```", readme, re.DOTALL)
    commands = [command.split() for command in block[1].split("&&")] if block else []
    if [command[0] for command in commands] != ["pip", "featherlight"]:
        raise ValueError(f"README's first block is {block and block[1]!r}: one that installs, and runs featherlight, was expected")
    return commands


def timed(name: str, command: list[str], folder: Path, environment: dict[str, str]) -> tuple[float, float]:
    """Run one step and say how long it took: seconds of the clock, and of processors.

    Raises:
        SystemExit: it failed; its last lines are told.
    """
    started, before = time.perf_counter(), os.times()
    done = subprocess.run(command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    seconds, after = time.perf_counter() - started, os.times()
    busy = after.children_user + after.children_system - before.children_user - before.children_system
    if done.returncode:
        sys.exit(f"{name} failed after {seconds:.0f} s: {' '.join(command)}\n" + "\n".join(done.stdout.splitlines()[-15:]))
    print(f"{name:<22}{seconds:8.1f} s {busy:8.1f} s of CPU   {' '.join(map(str, command))}", flush=True)
    return seconds, busy


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--source", default=str(ROOT), help="what to clone: a path, or a URL")
    parser.add_argument("--installer", choices=INSTALLERS, default="pip", help="what installs; uv is itself installed first")
    parser.add_argument("--keep", type=Path, default=None, help="copy the picture there")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        clone, own = folder / "featherlight", folder / "venv"
        environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "VIRTUAL_ENV")}
        environment |= {"PATH": f"{own / 'bin'}{os.pathsep}{environment['PATH']}", "VIRTUAL_ENV": str(own)}
        python = str(own / "bin" / "python")
        steps = [timed("clone", ["git", "clone", "--quiet", options.source, str(clone)], folder, environment)]
        install, compare = first_line((clone / "README.md").read_text())
        steps.append(timed("virtual environment", [sys.executable, "-m", "venv", str(own)], folder, environment))
        if options.installer == "uv":
            steps.append(timed("uv", [python, "-m", "pip", "install", "uv"], clone, environment))
        steps.append(timed("install", [python, *INSTALLERS[options.installer], *install[2:]], clone, environment))
        steps.append(timed("compare", [str(own / "bin" / "featherlight"), *compare[1:]], clone, environment))
        total, busy = map(sum, zip(*steps))
        [picture] = (clone / "runs").rglob(PICTURE)
        print(f"{'in all':<22}{total:8.1f} s {busy:8.1f} s of CPU   {picture.relative_to(clone)}, {picture.stat().st_size:,} bytes")
        print(f"{platform.machine()}, {len(os.sched_getaffinity(0))} core(s) of {os.cpu_count()}, Python {platform.python_version()}")
        if options.keep:
            shutil.copy(picture, options.keep)


if __name__ == "__main__":
    main()
