"""A run whose updates were rejected says so wherever its figures stand; one that learned nothing is no result."""

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from featherlight.cli import main
from featherlight.fed_loop.aggregate import Mean


def run(*arguments: object) -> int:
    """The exit code of ``featherlight ARGUMENTS``."""
    try:
        main([str(argument) for argument in arguments])
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


def result(folder: str) -> dict[str, Any]:
    return json.loads((Path(folder) / "result.json").read_text())


@pytest.fixture
def steep(config: Path) -> Path:
    """The same run with a learning rate under which no update is finite."""
    path = config.with_name("steep.yaml")
    path.write_text(config.read_text().replace("output_dim: 8", "output_dim: 8\n    lr: 1.0e+30\n    optimizer: sgd"))
    return path


@pytest.fixture
def one_is_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    add, calls = Mean.add, []

    def picky(mean: Mean, *arguments: Any) -> None:
        calls.append(mean)
        if len(calls) == 1:
            raise ValueError("not today")
        add(mean, *arguments)

    monkeypatch.setattr(Mean, "add", picky)


def test_a_run_that_learned_nothing_ends_with_an_error_after_writing_what_there_is(steep: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for resume in ([], ["--resume"]):
        assert run("federate", "-c", steep, *resume) == 2
        told = capsys.readouterr()
        assert "featherlight: error: all 8 updates were rejected, so nothing was learned; why is told above" in told.err
        assert "knn" not in told.out
        assert {name: result("runs/steep")[name] for name in ("rounds", "turns", "rejected")} == {"rounds": 4, "turns": 8, "rejected": 8}
        assert Path("runs/steep/cost.json").exists()
        assert Path("runs/steep/config.yaml").exists()


@pytest.mark.usefixtures("one_is_rejected")
def test_a_rejected_update_is_told_beside_the_figures(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("federate", "-c", config) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert "1 of 8 updates rejected" in told
    assert "knn" in told
    assert (result("runs/small")["turns"], result("runs/small")["rejected"]) == (8, 1)


def test_a_run_without_rejected_updates_says_nothing_of_them(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("federate", "-c", config) == 0
    assert "rejected" not in capsys.readouterr().out
    assert (result("runs/small")["turns"], result("runs/small")["rejected"]) == (8, 0)


@pytest.mark.parametrize("devices", [1, 2])
def test_compare_shows_a_run_that_learned_nothing_as_failed_and_goes_on(
    devices: int, config: Path, steep: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = steep.rename("a_steep.yaml")
    first.write_text(first.read_text().replace("accelerator: cpu", f"accelerator: cpu, devices: {devices}"))
    for resume in ([], ["--resume"]) if devices == 1 else ([],):
        assert run("compare", first, config, "--out", "out", *resume) == 2
        told = capsys.readouterr()
        assert "1 of 2 runs failed (a_steep)" in told.err
        table = [line.split() for line in told.out.splitlines()]
        assert next(line for line in table if line[:1] == ["rejected"]) == ["rejected", "8", "of", "8", "0", "of", "8"]
        assert next(line for line in table if line[:1] == ["knn"])[1] == "failed"
    bad, good = json.loads(Path("out/comparison.json").read_text())["runs"]
    assert "nothing was learned" in bad["failed"]
    assert (bad["metrics"], bad["turns"], bad["rejected"]) == ({}, 8, 8)
    assert bad["cost"]["bytes_up"] == good["cost"]["bytes_up"]
    assert "failed" not in good
    assert (good["turns"], good["rejected"]) == (8, 0)
    with Path("out/comparison.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["turns"], row["rejected"], bool(row["failed"]), bool(row["knn"])) for row in rows] == [
        ("8", "8", True, False),
        ("8", "0", False, True),
    ]


def test_compare_where_every_run_failed_still_tells(steep: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("compare", steep, "--out", "out") == 2
    assert "failed" in capsys.readouterr().out
    assert len(json.loads(Path("out/comparison.json").read_text())["runs"]) == 1
    assert not Path("out/comparison.png").exists()
