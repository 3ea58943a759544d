"""``featherlight compare``: run several configurations and set them side by side, as a table, a CSV file and a picture."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import math
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentParser
from rich.console import Console
from rich.markup import escape

from featherlight.cli import expected, one_line
from featherlight.commands.folders import folder_for
from featherlight.commands.parsing import is_federated, parse
from featherlight.commands.tables import SERVER_ROWS, comparison_table
from featherlight.fed_loop.report import valid
from featherlight.fed_loop.whole_files import write_text


def run(command: str, arguments: list[str]) -> None:
    """Run ``featherlight compare ARGUMENTS``.

    Raises:
        ValueError: nothing to compare, or runs that failed; the comparison of the others is written first.
    """
    arguments, options = for_all(arguments)
    parser = ArgumentParser(
        prog="featherlight compare",
        description="Run each configuration and compare them. Writes comparison.json, comparison.csv and comparison.png. "
        "Options of the runs themselves, such as --federation.rounds 20, are given to all of them.",
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
    runs = compare(files, out, config.resume, Console(), options)
    if failed := [run for run in runs if "failed" in run]:
        names = ", ".join(run["name"] for run in failed)
        raise ValueError(f"{len(failed)} of {len(runs)} runs failed ({names}); why is told above and in comparison.json")


def for_all(arguments: list[str]) -> tuple[list[str], list[str]]:
    """What is the comparison's own of ``arguments``, and what is for every run: options with a dot in their name, as ``--name=value``.

    Raises:
        ValueError: one without a value, or one that all runs cannot share.
    """
    own: list[str] = []
    options: list[str] = []
    left = iter(arguments)
    for argument in left:
        name, given, value = argument.partition("=")
        if not (name.startswith("--") and "." in name):
            own.append(argument)
            continue
        if name == "--federation.folder":
            raise ValueError(f"{name} is each run's own, below the comparison's: give that with --out")
        value = value if given else next(left, "")
        if not value or (not given and value.startswith("--")):
            raise ValueError(f"{name} has no value; what is for all runs is written --section.name value")
        options.append(f"{name}={value}")
    return own, options


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


def compare(files: list[Path], out: Path, resume: bool, console: Console, options: Sequence[str] = ()) -> list[dict[str, Any]]:
    """Run ``files`` one after the other, each in a folder of its own below ``out``, and write the comparison.

    Args:
        options: ``--name=value``, over what all files say.

    Returns:
        An entry a run, as in ``comparison.json``; that of a run that failed says why in ``failed``, and has no metrics.
    """
    for file in files:
        _finished(file, out / file.stem, resume, options)  # changed since? say so before the first run starts
    runs = []
    for number, file in enumerate(files, 1):
        console.print(f"[bold]{number}/{len(files)} {file.stem}")
        try:
            runs.append(_one(file, out / file.stem, resume, options))
        except Exception as error:
            if not expected(error):
                raise
            runs.append(_failed(file, out / file.stem, error, options))
            console.print(f"[red]{file.stem} failed[/]: {escape(runs[-1]['failed'])}", highlight=False)
    content = {"runs": runs}
    write_text(out / "comparison.json", json.dumps(content, indent=2))
    _write_csv(out / "comparison.csv", runs)
    from featherlight.commands.picture import draw

    if good := [run for run in runs if "failed" not in run]:
        draw(good, out / "comparison.png")
        _log(good, out)
    console.print(comparison_table(runs))
    drawn = "comparison.png, " if good else ""
    console.print(f"written to {out}: {drawn}comparison.json, comparison.csv", highlight=False)
    return runs


def _log(runs: Sequence[dict[str, Any]], out: Path) -> None:
    """The comparison as a run of its own, of the project of the first run that logs to W&B, if any does."""
    found = filter(None, (_wandb_of(out / run["name"] / "config.yaml") for run in runs))
    if (arguments := next(found, None)) is None:
        return
    from lightning.pytorch.loggers import WandbLogger

    from featherlight.commands.logging_ends import ended
    from featherlight.commands.run_logs import log_pictures, log_table

    shared = {name: arguments[name] for name in ("project", "save_dir", "offline", "entity", "group", "mode") if arguments.get(name)}
    logger = WandbLogger(**shared, name=out.name, job_type="compare")
    rows = _rows(runs)
    with ended([logger]):
        log_table(logger, "comparison_table", [*dict.fromkeys(name for row in rows for name in row)], rows, 0)
        log_pictures(logger, [out / "comparison.png"], 0)


def _wandb_of(path: Path) -> dict[str, Any] | None:
    """Arguments of the ``WandbLogger`` of a run's configuration, if it has one."""
    content = yaml.safe_load(path.read_text()) if path.exists() else {}
    given = content.get("loggers") or (content.get("trainer") or {}).get("logger") or []
    items = [item for item in (given if isinstance(given, list) else [given]) if isinstance(item, dict)]
    return next((item.get("init_args") or {} for item in items if str(item.get("class_path")).endswith(".WandbLogger")), None)


def _one(file: Path, folder: Path, resume: bool, options: Sequence[str]) -> dict[str, Any]:
    if (kept := _finished(file, folder, resume, options)) is not None:
        return kept
    told: dict[str, Any]
    if _processes(file, options) not in (1, "1", None):
        told = _in_a_process_of_its_own(file, folder, resume, options)
    elif is_federated(file):
        from featherlight.commands.federate import check_learned, federate

        result, _, _ = federate(["-c", str(file), *options, f"--federation.folder={folder}"], resume=resume)
        check_learned(result.turns, result.rejected)
        told = {"cost": result.cost.total(), "metrics": result.metrics, "turns": result.turns, "rejected": result.rejected}
        told |= {} if result.privacy is None else {"privacy": valid(result.privacy)}
        told |= {} if result.cost.server is None else {"server": result.cost.server.total()}
    else:
        from featherlight.commands.lightning_run import fit

        cost, metrics = fit(["-c", str(file), *options], folder, resume)
        told = {"cost": cost, "metrics": metrics}
    entry = {**_identity(file, options), **told}
    write_text(folder / "run.json", json.dumps(entry, indent=2))
    return entry


def _identity(file: Path, options: Sequence[str]) -> dict[str, Any]:
    more = {"options": list(options)} if options else {}
    return {"name": file.stem, "config": str(file), "digest": _digest(file, options), **more}


def _failed(file: Path, folder: Path, error: Exception, options: Sequence[str]) -> dict[str, Any]:
    """The entry of a run that failed: what it had measured by then, and why. It is not kept as finished."""
    entry = {**_identity(file, options), "cost": {}, "metrics": {}, "failed": one_line(error)}
    for name, take in (("cost.json", _costs), ("result.json", _counts)):
        with suppress(OSError, ValueError, KeyError):
            entry |= take(json.loads((folder / name).read_text()))
    return entry


def _costs(told: dict[str, Any]) -> dict[str, Any]:
    return {"cost": told["total"], **({"server": told["server"]["total"]} if "server" in told else {})}


def _counts(told: dict[str, Any]) -> dict[str, Any]:
    return {name: told[name] for name in ("turns", "rejected")}


def _processes(file: Path, options: Sequence[str]) -> object:
    """How many processes the run asks for."""
    given = [option.partition("=")[2] for option in options if option.startswith(("--federation.devices=", "--trainer.devices="))]
    content = yaml.safe_load(file.read_text())
    return given[-1] if given else (content.get("federation") or content.get("trainer") or {}).get("devices")


def _in_a_process_of_its_own(file: Path, folder: Path, resume: bool, options: Sequence[str]) -> dict[str, Any]:
    """A run that starts further processes starts its own command again in them: that must be this run, not the comparison.

    Raises:
        ValueError: the run failed, or it is one for a Trainer.
    """
    if not is_federated(file):
        raise ValueError(f"{file} trains on several devices; run it with featherlight fit, compare takes one device for a Trainer")
    from featherlight.commands.federate import check_learned

    command = [sys.executable, "-m", "featherlight", "federate", "-c", str(file), *options, f"--federation.folder={folder}"]
    done = subprocess.run([*command, *(["--resume"] if resume else [])], check=False)
    if done.returncode == 130:
        raise KeyboardInterrupt
    if done.returncode and (folder / "result.json").exists():
        check_learned(**_counts(json.loads((folder / "result.json").read_text())))
    if done.returncode:
        raise ValueError(f"the run of {file} ended with exit code {done.returncode}, see above")
    costs = _costs(json.loads((folder / "cost.json").read_text()))
    result = json.loads((folder / "result.json").read_text())
    metrics = {name: math.nan if value is None else value for name, value in result["metrics"].items()}
    return {**costs, "metrics": metrics, **_counts(result), **({"privacy": result["privacy"]} if "privacy" in result else {})}


def _finished(file: Path, folder: Path, resume: bool, options: Sequence[str]) -> dict[str, Any] | None:
    """What a finished run of ``file`` left in ``folder``, when resuming.

    Raises:
        ValueError: the file or the options have changed since, or ``run.json`` cannot be read.
    """
    path = folder / "run.json"
    if not (resume and path.exists()):
        return None
    try:
        entry = json.loads(path.read_text())
        digest = entry.get("digest")
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{path} is damaged ({error}); remove {folder} to run {file} again") from error
    if digest != _digest(file, options):
        before = " ".join(entry.get("options", []))
        changed = "has changed since it ran" if before == " ".join(options) else f"ran with other options ({before or 'none'})"
        raise ValueError(f"{file} {changed}; remove {folder} to run it again, or compare into another folder with --out")
    return entry


def _digest(file: Path, options: Sequence[str]) -> str:
    """A fingerprint of a configuration's text, and of what is said over it."""
    return hashlib.blake2b(file.read_bytes() + "\n".join(options).encode(), digest_size=8).hexdigest()


def _server(run: dict[str, Any]) -> dict[str, Any]:
    return {f"server_{name}": run["server"][name] for name in SERVER_ROWS if "server" in run}


def _write_csv(path: Path, runs: list[dict[str, Any]]) -> None:
    rows = _rows(runs)
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(dict.fromkeys(name for row in rows for name in row)))
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, text.getvalue())


def _rows(runs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """A flat row a run."""
    told = ("name", "config", "failed", "turns", "rejected")
    return [{**{name: run[name] for name in told if name in run}, **run["cost"], **_server(run), **run["metrics"]} for run in runs]
