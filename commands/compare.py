"""``featherlight compare``: run several configurations and set them side by side, as a table, a CSV file and a picture."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentParser
from rich.console import Console

from featherlight.commands.folders import folder_for
from featherlight.commands.parsing import is_federated, parse
from featherlight.commands.tables import comparison_table
from featherlight.fed_loop.whole_files import write_text


def run(command: str, arguments: list[str]) -> None:
    """Run ``featherlight compare ARGUMENTS``."""
    parser = ArgumentParser(
        prog="featherlight compare",
        description="Run each configuration and compare them. Writes comparison.json, comparison.csv and comparison.png.",
        exit_on_error=False,
    )
    parser.add_argument("paths", nargs="+", help="YAML files, or folders of them")
    parser.add_argument("--out", type=str, default=None, help="folder to write to; by default runs/NAME, numbered")
    parser.add_argument("--resume", action="store_true", help="go on with the last comparison of this name: finished runs are kept")
    if "-h" in arguments or "--help" in arguments:
        parser.print_help()
        return
    config = parse(parser, arguments)
    files = find(config.paths)
    name = Path(config.paths[0]).stem if len(config.paths) == 1 else "comparison"
    out = Path(config.out) if config.out else folder_for(name, config.resume)
    if out.exists() and any(out.iterdir()) and not config.resume:
        raise ValueError(f"{out} is not empty; go on with it by --resume, or give another folder with --out")
    compare(files, out, config.resume, Console())


def find(paths: list[str]) -> list[Path]:
    """The configuration files at ``paths``, in order of name within a folder.

    Raises:
        ValueError: nothing there, or two files of one name.
    """
    files: list[Path] = []
    for path in map(Path, paths):
        found = sorted([*path.glob("*.yaml"), *path.glob("*.yml")]) if path.is_dir() else [path]
        if not found:
            raise ValueError(f"there is no .yaml file in {path}")
        files += found
    for file in files:
        is_federated(file)  # readable? say so before the first run starts, not after it
    names = [file.stem for file in files]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"two configurations are called {twice[0]}; runs are told apart by file name: rename one")
    return files


def compare(files: list[Path], out: Path, resume: bool, console: Console) -> list[dict[str, Any]]:
    """Run ``files`` one after the other, each in a folder of its own below ``out``, and write the comparison."""
    for file in files:
        _finished(file, out / file.stem, resume)  # changed since? say so before the first run starts
    runs = []
    for number, file in enumerate(files, 1):
        console.print(f"[bold]{number}/{len(files)} {file.stem}")
        runs.append(_one(file, out / file.stem, resume))
    content = {"runs": runs}
    write_text(out / "comparison.json", json.dumps(content, indent=2))
    _write_csv(out / "comparison.csv", runs)
    from featherlight.commands.picture import draw

    draw(runs, out / "comparison.png")
    console.print(comparison_table(runs))
    console.print(f"written: {out / 'comparison.png'}, comparison.json, comparison.csv", highlight=False)
    return runs


def _one(file: Path, folder: Path, resume: bool) -> dict[str, Any]:
    if (kept := _finished(file, folder, resume)) is not None:
        return kept
    digest = _digest(file)
    if _processes(file) not in (1, "1", None):
        cost, metrics = _in_a_process_of_its_own(file, folder, resume)
    elif is_federated(file):
        from featherlight.commands.federate import federate

        result, _, _ = federate(["-c", str(file), f"--federation.folder={folder}"], resume=resume)
        cost, metrics = result.cost.total(), result.metrics
    else:
        from featherlight.commands.lightning_run import fit

        cost, metrics = fit(["-c", str(file)], folder, resume)
    entry = {"name": file.stem, "config": str(file), "digest": digest, "cost": cost, "metrics": metrics}
    write_text(folder / "run.json", json.dumps(entry, indent=2))
    return entry


def _processes(file: Path) -> object:
    """How many processes the configuration asks for."""
    content = yaml.safe_load(file.read_text())
    return (content.get("federation") or content.get("trainer") or {}).get("devices")


def _in_a_process_of_its_own(file: Path, folder: Path, resume: bool) -> tuple[dict[str, float], dict[str, float]]:
    """A run that starts further processes starts its own command again in them: that must be this run, not the comparison.

    Raises:
        ValueError: the run failed, or it is one for a Trainer.
    """
    if not is_federated(file):
        raise ValueError(f"{file} trains on several devices; run it with featherlight fit, compare takes one device for a Trainer")
    command = [sys.executable, "-m", "featherlight", "federate", "-c", str(file), f"--federation.folder={folder}"]
    done = subprocess.run([*command, *(["--resume"] if resume else [])], check=False)
    if done.returncode == 130:
        raise KeyboardInterrupt
    if done.returncode:
        raise ValueError(f"the run of {file} ended with exit code {done.returncode}, see above")
    cost = json.loads((folder / "cost.json").read_text())["total"]
    metrics = json.loads((folder / "result.json").read_text())["metrics"]
    return cost, {name: math.nan if value is None else value for name, value in metrics.items()}


def _finished(file: Path, folder: Path, resume: bool) -> dict[str, Any] | None:
    """What a finished run of ``file`` left in ``folder``, when resuming.

    Raises:
        ValueError: the file has changed since, or ``run.json`` cannot be read.
    """
    path = folder / "run.json"
    if not (resume and path.exists()):
        return None
    try:
        entry = json.loads(path.read_text())
        digest = entry.get("digest")
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{path} is damaged ({error}); remove {folder} to run {file} again") from error
    if digest != _digest(file):
        raise ValueError(f"{file} has changed since it ran; remove {folder} to run it again, or compare into another folder with --out")
    return entry


def _digest(file: Path) -> str:
    """A fingerprint of a configuration's text."""
    return hashlib.blake2b(file.read_bytes(), digest_size=8).hexdigest()


def _write_csv(path: Path, runs: list[dict[str, Any]]) -> None:
    rows = [{"name": run["name"], "config": run["config"], **run["cost"], **run["metrics"]} for run in runs]
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(dict.fromkeys(name for row in rows for name in row)))
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, text.getvalue())
