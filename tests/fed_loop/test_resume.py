"""Interrupted and resumed equals uninterrupted, bit for bit: weights, history and cost."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from featherlight.fed_loop import Adam, Average, Momentum, checkpoint
from featherlight.plugins import DepthDropout, LayerFreezing, Plugin, ProgressiveGrowth

BLOCKS = {"blocks": "blocks.*"}
METHODS = {
    "end to end": lambda: [],
    "layer-wise": lambda: [LayerFreezing(**BLOCKS, periods_per_stage=2, init="copy_previous")],
    "layer-wise, depth dropout": lambda: [LayerFreezing(**BLOCKS, periods_per_stage=2), DepthDropout(**BLOCKS)],
    "freezing the whole depth": lambda: [LayerFreezing(**BLOCKS, periods_per_stage=2, grow=False), DepthDropout(**BLOCKS)],
    "progressive": lambda: [ProgressiveGrowth(**BLOCKS, periods_per_stage=[1, 2, 3], warmup_periods=1, init="copy_previous")],
    "progressive, depth dropout": lambda: [ProgressiveGrowth(**BLOCKS, periods_per_stage=2), DepthDropout(**BLOCKS, scale=True)],
    "dropout by batch": lambda: [DepthDropout(**BLOCKS, rate=0.4, every="batch")],
}
SIZES = [10, 14, 6, 3]  # one of them smaller than a batch


def sgd_with_schedule(parameters):
    optimizer = torch.optim.SGD(parameters, 0.1, momentum=0.9)
    return [optimizer], [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 6)]


@pytest.mark.parametrize("method", METHODS)
def test_resumed_is_uninterrupted(method, net, points, federation, same, figures, tmp_path):
    def run(folder, rounds, server, resume=False):
        module = net(sgd_with_schedule, dropout=0.3)
        settings = {"cohort": 3, "server": server, "folder": folder, "evaluate_clients": True, "evaluate_every": 2}
        result = federation(rounds, **settings).run(module, points(SIZES, held_out=2), METHODS[method](), resume=resume)
        return module.state_dict(), result

    server = {"end to end": Momentum, "progressive": Adam}.get(method, Average)
    whole, result = run(tmp_path / "whole", 6, server())
    for round in (1, 3, 5):
        folder = tmp_path / str(round)
        run(folder, round, server())
        resumed, again = run(folder, 6, server(), resume=True)
        same(resumed, whole)
        (history, cost), (wanted, wanted_cost) = figures(again), figures(result)
        for row in (*history, *wanted):  # a run that ends evaluates what a longer one does not
            for name in ("client_loss", "client_accuracy"):
                row.pop(name, None)
        assert history == wanted
        assert cost == wanted_cost
        assert again.metrics == result.metrics
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        assert lines == again.history


def test_a_finished_run_resumes_to_what_it_was(net, points, federation, same, figures, tmp_path):
    module, again = net(), net(seed=9)
    result = federation(2, folder=tmp_path).run(module, points([8, 8]))
    resumed = federation(2, folder=tmp_path).run(again, points([8, 8]), resume=True)
    same(again.state_dict(), module.state_dict())
    assert figures(resumed) == figures(result)


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """Runs stopped at random moments and resumed; a fresh interpreter forks them, away from pytest's own threads."""
    folder = tmp_path_factory.mktemp("stopped")
    seed = os.environ.get("PYTEST_SEED", str(random.randrange(10**6)))
    print(f"PYTEST_SEED={seed}")
    script = Path(__file__).parent / "kill_and_resume.py"
    subprocess.run([sys.executable, "-W", "ignore", script, folder, seed], check=True, timeout=300)
    return folder


@pytest.mark.parametrize("how", ["killed", "replay killed", "replay on disk killed", "interrupted", "seldom saved"])
def test_stopped_at_a_random_moment(how, stopped, same):
    killed = how.endswith("killed")
    whole = "replay whole" if how.startswith("replay") else "whole"
    assert (stopped / f"{how}.code").read_text() == ("-9" if killed else "1")
    same(*(torch.load(stopped / name / "done.pt") for name in (how, whole)))
    figures, wanted = (json.loads((stopped / name / "figures.json").read_text()) for name in (how, whole))
    assert figures == wanted
    assert not list((stopped / how).glob("buffer/*"))  # not even what the killed process left
    if not killed:
        said = " ".join((stopped / f"{how}.err").read_text().split())
        assert "interrupted; saved" in said
        assert "Start again with --resume to go on" in said


class Stop(Plugin):
    """Fails in the middle of a round."""

    def __init__(self, round):
        self._round = round

    def after_step(self, clock):
        if clock == (self._round, 1):
            raise RuntimeError("stop here")


def test_a_run_that_fails_can_be_resumed(net, points, federation, same, tmp_path):
    module, whole = net(), net()
    with pytest.raises(RuntimeError, match="stop here"):
        federation(4, folder=tmp_path).run(module, points([8, 8]), [Stop(2)])
    module = net()
    federation(4, folder=tmp_path).run(module, points([8, 8]), [Stop(9)], resume=True)
    federation(4).run(whole, points([8, 8]))
    same(module.state_dict(), whole.state_dict())


OTHERS = {
    "seed": ({"seed": 1}, {}, {}, "seed was 0, now 1"),
    "cohort": ({"cohort": 1}, {}, {}, "cohort was None, now 1"),
    "server": ({"server": Average(0.5)}, {}, {}, "server.lr was 1.0, now 0.5;"),
    "model": ({}, {"blocks": 2}, {}, "its model's entries have other names or shapes"),
    "clients": ({}, {}, {"sizes": [8, 9]}, "its clients have other numbers of samples"),
    "more clients": ({}, {}, {"sizes": [8, 8, 8]}, "clients was 2, now 3;"),
    "clip": ({"clip": 1.0}, {}, {}, "clip was None, now 1.0"),
    "plugins": ({}, {}, {}, "plugins.0.LayerFreezing.periods_per_stage was 1, now 2;"),
}


@pytest.mark.parametrize("other", OTHERS)
def test_another_run_is_refused(other, net, points, federation, tmp_path):
    settings, model, data, message = OTHERS[other]
    federation(1, folder=tmp_path).run(net(), points([8, 8]), [LayerFreezing(**BLOCKS)])
    before = (tmp_path / "round-000001.ckpt").read_bytes()
    freezing = LayerFreezing(**BLOCKS, periods_per_stage=2 if other == "plugins" else 1)
    with pytest.raises(ValueError, match=f"round-000001.ckpt is of another run: {message}"):
        federation(2, folder=tmp_path, **settings).run(net(**model), points(**{"sizes": [8, 8], **data}), [freezing], resume=True)
    assert (tmp_path / "round-000001.ckpt").read_bytes() == before


def test_fewer_rounds_than_are_done_are_refused(net, points, federation, tmp_path):
    federation(3, folder=tmp_path).run(net(), points([8, 8]))
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ValueError, match=r"rounds=2, but 3 are done in .*round-000003.ckpt: give 3 or more, or another folder"):
        federation(2, folder=tmp_path).run(net(), points([8, 8]), resume=True)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_folder_in_use_is_not_written_over(net, points, federation, tmp_path):
    federation(1, folder=tmp_path).run(net(), points([8]))
    with pytest.raises(ValueError, match=r"is there already; go on from it with resume=True \(--resume\), or use another folder"):
        federation(1, folder=tmp_path).run(net(), points([8]))
    with pytest.raises(ValueError, match="to resume, give the folder"):
        federation(1).run(net(), points([8]), resume=True)


def test_disk_full_while_training(net, points, federation, same, tmp_path, monkeypatch):
    """The run stops with one line; the last good checkpoint is there, and the run goes on from it."""
    real, calls = os.fsync, []

    def full(descriptor):
        calls.append(descriptor)
        if len(calls) > 2:  # the first checkpoint's file and folder are written
            raise OSError(28, "No space left on device")
        real(descriptor)

    with monkeypatch.context() as broken:
        broken.setattr(os, "fsync", full)
        with pytest.raises(OSError, match=r"cannot write checkpoint .*000002.*last good checkpoint is .*000001"):
            federation(4, folder=tmp_path).run(net(), points([8, 8]))
    assert checkpoint.read(checkpoint.newest(tmp_path))["round"] == 1
    module, whole = net(), net()
    federation(4, folder=tmp_path).run(module, points([8, 8]), resume=True)
    federation(4).run(whole, points([8, 8]))
    same(module.state_dict(), whole.state_dict())


# -- damaged checkpoints ------------------------------------------------------------------------------------------------
class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def flip(path):
    raw = bytearray(path.read_bytes())
    for place in range(len(raw) // 2, len(raw) // 2 + 256):  # a single byte may hit what pads records, and harm nothing
        raw[place] ^= 0xFF
    path.write_bytes(raw)


DAMAGE = {
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-100]),
    "bytes": flip,
    "malicious": lambda path: torch.save({"round": 3, "server": Malicious(path.parent / "witness")}, path),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_run_goes_on_from_the_checkpoint_before_a_damaged_one(damage, net, points, federation, same, capsys, tmp_path):
    module, whole = net(), net()
    result = federation(3, folder=tmp_path).run(net(), points([8, 8]))
    newest = tmp_path / "round-000003.ckpt"
    DAMAGE[damage](newest)
    bad = newest.read_bytes()
    again = federation(4, folder=tmp_path).run(module, points([8, 8]), resume=True)
    federation(4).run(whole, points([8, 8]))
    same(module.state_dict(), whole.state_dict())
    said = "".join(capsys.readouterr().err.split())  # a long path breaks lines anywhere
    assert "round-000003.ckptcannotberead:damaged" in said
    assert "goingonfromthenewestthatcanberead,round-000002.ckpt" in said
    assert not (tmp_path / "witness").exists()
    assert (tmp_path / "round-000003.ckpt.damaged").read_bytes() == bad
    assert checkpoint.read(newest)["round"] == 3  # written anew
    assert [row["loss"] for row in again.history[:3]] == [row["loss"] for row in result.history]
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["round"] for row in lines] == [0, 1, 2, 3]


def test_where_no_checkpoint_can_be_read_nothing_is_touched(net, points, federation, tmp_path):
    federation(3, folder=tmp_path).run(net(), points([8, 8]))
    for path in checkpoint.existing(tmp_path):
        DAMAGE["malicious"](path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ValueError, match=r"000003.ckpt cannot be read.*000002.ckpt cannot be read.*no other checkpoint is there"):
        federation(4, folder=tmp_path).run(net(), points([8, 8]), resume=True)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_another_run_is_refused_after_a_damaged_checkpoint_too(net, points, federation, tmp_path):
    federation(3, folder=tmp_path).run(net(), points([8, 8]))
    DAMAGE["bytes"](tmp_path / "round-000003.ckpt")
    with pytest.raises(ValueError, match=r"round-000002.ckpt is of another run: seed was 0, now 1"):
        federation(4, folder=tmp_path, seed=1).run(net(), points([8, 8]), resume=True)
    assert (tmp_path / "round-000003.ckpt").exists()


def test_processes_that_find_different_checkpoints_are_told(net, points, federation, tmp_path, monkeypatch):
    """As on two hosts that share no disk."""
    from featherlight.fed_loop.processes import Processes

    federation(1, folder=tmp_path).run(net(), points([8]))
    monkeypatch.setattr(Processes, "gather", lambda self, item: [item, 0])
    with pytest.raises(ValueError, match=r"different checkpoints in .* \(after 1, 0 rounds, by rank\): give a folder that all hosts share"):
        federation(2, folder=tmp_path).run(net(), points([8]), resume=True)


def test_rounds_that_no_checkpoint_holds_are_forgotten(net, points, federation, tmp_path):
    """Killed before the first checkpoint: rounds begin anew, and stand in metrics.jsonl once."""
    with pytest.raises(RuntimeError, match="stop here"):
        federation(3, folder=tmp_path, checkpoint_every=9).run(net(), points([8, 8]), [Stop(2)])
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2
    result = federation(3, folder=tmp_path, checkpoint_every=9).run(net(), points([8, 8]), resume=True)
    assert [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == result.history
