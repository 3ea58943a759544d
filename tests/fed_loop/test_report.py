"""What a run tells: valid JSON, each round once, and the configuration."""

import json
import math

import pytest
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from featherlight.plugins import LayerFreezing, Plugin


class Stop(Plugin):
    def __init__(self, round):
        self._round = round

    def after_step(self, clock):
        if clock == (self._round, 1):
            raise RuntimeError("stop here")


def strict(text):
    """JSON as the standard has it."""
    return json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


def tensorboard(folder):
    return TensorBoardLogger(folder, name="", version="tensorboard")


def steps(folder, name="loss"):
    return [(event.step, event.value) for event in EventAccumulator(str(folder / "tensorboard")).Reload().Scalars(name)]


# -- rounds -------------------------------------------------------------------------------------------------------------
def test_a_round_of_which_nothing_was_used_has_no_loss(net, points, federation, tmp_path, monkeypatch):
    data = points([8, 8])
    for x, _ in data.clients:
        x.fill_(float("nan"))
    notes = []
    monkeypatch.setattr("featherlight.fed_loop.report.Progress.update", lambda self, task, note="", **_: notes.append(note))
    monkeypatch.setattr("featherlight.fed_loop.report.Console", lambda **_: Console(quiet=True))
    loggers = [tensorboard(tmp_path), CSVLogger(tmp_path, name="", version="csv")]
    result = federation(1, folder=tmp_path, progress=True, evaluate_every=1).run(
        net(), data, loggers=loggers, evaluators=[lambda module, data: {"figure": float("inf")}]
    )
    assert math.isnan(result.history[0]["loss"])
    (row,) = map(strict, (tmp_path / "metrics.jsonl").read_text().splitlines())
    assert (row["loss"], row["figure"], row["clients"], row["rejected"]) == (None, None, 0, 2)
    assert strict((tmp_path / "result.json").read_text())["metrics"] == {"figure": None}
    ((_, logged),) = steps(tmp_path)
    assert math.isnan(logged)
    assert "nan" in (tmp_path / "csv" / "metrics.csv").read_text()
    assert notes[-1] == "stage 1 all rejected"


@pytest.mark.parametrize("every", [3, 100], ids=["after the checkpoint", "before any checkpoint"])
def test_tensorboard_shows_each_round_once_after_a_resume(every, net, points, federation, tmp_path):
    """Stopped in round 5, after 3 or no rounds that a checkpoint holds: what it had logged of rounds 3 and 4 is logged again."""

    def run(stop, resume=False):
        settings = federation(7, folder=tmp_path, checkpoint_every=every)
        return settings.run(net(), points([8, 8]), [Stop(stop)], loggers=[tensorboard(tmp_path)], resume=resume)

    with pytest.raises(RuntimeError, match="stop here"):
        run(5)
    assert [step for step, _ in steps(tmp_path)] == [0, 1, 2, 3, 4]
    result = run(99, resume=True)
    assert steps(tmp_path) == [(row["round"], pytest.approx(row["loss"])) for row in result.history]
    assert len(steps(tmp_path, "hp_metric")) == 1  # and the configuration once


# -- configuration ------------------------------------------------------------------------------------------------------
class Told(CSVLogger):
    def __init__(self, folder):
        super().__init__(folder, name="", version="told")
        self.order = []

    def log_hyperparams(self, params):
        self.order.append(params)
        super().log_hyperparams(params)

    def log_metrics(self, metrics, step=None):
        self.order.append(step)
        super().log_metrics(metrics, step)


def test_every_logger_is_told_of_the_run_once_and_first(net, points, federation, tmp_path):
    one, other = Told(tmp_path / "one"), Told(tmp_path / "other")
    plugins = [LayerFreezing("blocks.*")]
    federation(2, clip=0.5).run(net(), points([8]), plugins, loggers=[one, other])
    for logger in (one, other):
        told, *rest = logger.order
        assert rest == [0, 1]
        assert (told["rounds"], told["clip"], told["model"]) == (2, "0.5", "Net({})")
        assert "LayerFreezing" in told["plugins"]
    given = {"model": {"class_path": "Net"}, "plugins": [{"class_path": "LayerFreezing"}], "lr": 0.1}
    both = [Told(tmp_path / "given"), tensorboard(tmp_path)]
    federation(1).run(net(), points([8]), loggers=both, configuration=given)
    assert both[0].order == [given, 0]
    assert "class_path: LayerFreezing" in (tmp_path / "given" / "told" / "hparams.yaml").read_text()
    content = EventAccumulator(str(tmp_path / "tensorboard")).Reload().summary_metadata
    session = content["_hparams_/session_start_info"].plugin_data.content
    assert b"model/class_path" in session
    assert b"Net" in session
