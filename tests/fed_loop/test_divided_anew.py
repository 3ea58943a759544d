"""A divided model leaves nothing behind: of one run in the next, of a rehearsal in the model, of labels on the wire."""

import pytest
import torch

from featherlight.fed_loop import wire
from featherlight.fed_loop.predict import predict
from featherlight.plugins import PartitionedTraining
from featherlight.plugins.replay_buffer import ReplayBuffer


@pytest.fixture
def sent(monkeypatch):
    """Names of all entries that were serialised."""
    names, save = set(), wire.save
    monkeypatch.setattr(wire, "save", lambda message, **options: names.update(message) or save(message, **options))
    return names


def test_a_second_run_with_the_same_plugin_is_as_with_a_new_one(net, points, federation, same):
    plugin = PartitionedTraining("blocks.0")
    federation(2, cohort=2, seed=7).run(net(), points([8] * 4), [plugin])
    predict(federation(2, cohort=2, seed=1), net, points([8] * 4), [plugin])
    again, anew = net(), net()
    second = federation(2, cohort=2, seed=1).run(again, points([8] * 4), [plugin])
    first = federation(2, cohort=2, seed=1).run(anew, points([8] * 4), [PartitionedTraining("blocks.0")])
    same(again.state_dict(), anew.state_dict())
    assert [row["stored_clients"] for row in second.history] == [row["stored_clients"] for row in first.history] == [2, 2]


def test_accounting_for_a_message_touches_no_file(tmp_path):
    run, prediction = ReplayBuffer(10, tmp_path), ReplayBuffer(10, tmp_path)
    run.put(3, 0, b"sixsix")
    prediction.note(3, 0, 6)
    assert prediction.note(4, 1, 6) == [3]
    assert run.get(3) == b"sixsix"
    run.put(4, 1, b"sixsix")
    assert [path.name for path in tmp_path.rglob("*.safetensors")] == ["client-000004.safetensors"]
    run.close()


def test_a_rehearsal_changes_no_buffer(net, points, federation, same):
    def centred():
        model = net()
        model.register_buffer("centre", torch.zeros(()))
        own = model.training_step

        def training_step(batch, batch_idx=0):
            model.centre += 1.0
            return own(batch, batch_idx) * (1.0 + 0.1 * model.centre)

        model.training_step = training_step
        return model

    divided, whole = centred(), centred()
    federation(2, cohort=1).run(divided, points([8]), [PartitionedTraining("blocks.0", way="split")])
    federation(2, cohort=1).run(whole, points([8]), [])
    assert divided.centre == whole.centre > 0
    same(divided.state_dict(), whole.state_dict())


def test_the_devices_own_head_learns_from_two_views_and_sends_no_labels(ssl, digits, federation, sent):
    model = ssl("simclr")
    plugin = PartitionedTraining("backbone.blocks.0", way="local_loss", classes=10)
    result = federation(1).run(model, digits(), [plugin])
    assert result.rejected == 0
    assert any(name.endswith("codes") for name in sent)
    assert not any("labels" in name for name in sent)
