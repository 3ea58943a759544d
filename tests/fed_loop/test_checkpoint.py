"""Checkpoints: whatever happens while one is written, the last good one stays; whatever is read, no code runs."""

import errno
import os
import pickle
import resource
import zipfile

import pytest
import torch

from featherlight.fed_loop import checkpoint

STATE = {"round": 1, "server": {"w": torch.arange(64.0), "n": torch.tensor(3)}, "history": [{"loss": 0.5}], "metrics": {}}


def of_round(round):
    return {**STATE, "round": round}


def equal(one, other):
    return repr(one) == repr(other) and all(torch.equal(one["server"][name], other["server"][name]) for name in one["server"])


def test_round_trip_and_two_are_kept(tmp_path):
    for round in range(1, 5):
        checkpoint.write(tmp_path / "run", round, of_round(round))
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["round-000003.ckpt", "round-000004.ckpt"]
    assert equal(checkpoint.read(checkpoint.newest(tmp_path / "run")), of_round(4))


def full_disk(*_):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("where", ["torch.save", "os.fsync", "pathlib.Path.replace"])
def test_an_error_while_writing_leaves_the_last_good_one(where, tmp_path, monkeypatch):
    good = checkpoint.write(tmp_path, 1, STATE)
    with monkeypatch.context() as broken:
        broken.setattr(where, full_disk)
        with pytest.raises(OSError, match=rf"cannot write checkpoint .*000002.ckpt .*No space left.*last good checkpoint is {good}"):
            checkpoint.write(tmp_path, 2, of_round(2))
    assert [path.name for path in tmp_path.iterdir()] == ["round-000001.ckpt"]
    assert equal(checkpoint.read(good), STATE)
    checkpoint.write(tmp_path, 2, of_round(2))


def test_there_may_be_no_earlier_one(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="there is no earlier checkpoint"):
        checkpoint.write(tmp_path, 1, STATE)


def test_a_file_that_cannot_grow(tmp_path):
    """The system itself refuses bytes in the middle of the file, as a full disk does."""
    good = checkpoint.write(tmp_path, 1, STATE)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, hard))
    try:
        with pytest.raises(OSError, match=f"cannot write checkpoint .*File too large.*the last good checkpoint is {good}"):
            checkpoint.write(tmp_path, 2, {"round": 2, "server": {"w": torch.zeros(100_000)}})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [path.name for path in tmp_path.iterdir()] == ["round-000001.ckpt"]
    assert equal(checkpoint.read(good), STATE)


def test_a_process_killed_while_writing_leaves_a_partial_file_that_nobody_reads(tmp_path):
    good = checkpoint.write(tmp_path, 1, STATE)
    (tmp_path / ".round-000002.ckpt.partial").write_bytes(good.read_bytes()[:100])
    assert checkpoint.newest(tmp_path) == good
    checkpoint.write(tmp_path, 2, of_round(2))
    assert equal(checkpoint.read(checkpoint.newest(tmp_path)), of_round(2))


def test_no_damaged_byte_goes_unnoticed(tmp_path):
    path = checkpoint.write(tmp_path, 1, STATE)
    raw = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        contents = {info.filename: archive.read(info) for info in archive.infolist()}
    for place in range(0, len(raw), 3):
        damaged = bytearray(raw)
        damaged[place] ^= 0xFF
        path.write_bytes(damaged)
        try:
            state = checkpoint.read(path)
        except ValueError:
            continue
        assert equal(state, STATE), place  # padding and fields that are not read
    weights = next(data for data in contents.values() if len(data) == 256)
    path.write_bytes(raw.replace(weights, weights[:128] + b"\x01" + weights[129:]))
    with pytest.raises(ValueError, match=r"round-000001.ckpt cannot be read: damaged.*checksum"):
        checkpoint.read(path)


@pytest.mark.parametrize("length", [0, 1, 100, 0.5, 0.99])
def test_a_truncated_file_is_refused(length, tmp_path):
    path = checkpoint.write(tmp_path, 1, STATE)
    raw = path.read_bytes()
    path.write_bytes(raw[: length if isinstance(length, int) else int(length * len(raw))])
    with pytest.raises(ValueError, match="cannot be read: damaged"):
        checkpoint.read(path)


class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("zipped", [True, False])
def test_a_malicious_pickle_does_not_run(zipped, tmp_path):
    path, witness = tmp_path / "round-000001.ckpt", tmp_path / "witness"
    if zipped:
        torch.save({"round": 1, "server": Malicious(witness)}, path)
    else:
        path.write_bytes(pickle.dumps({"round": 1, "server": Malicious(witness)}))
    with pytest.raises(ValueError, match=r"cannot be read: damaged, or not tensors and plain data alone") as error:
        checkpoint.read(path)
    assert not witness.exists()
    assert "weights_only" not in str(error.value)  # torch's own words go on to say how to run it
    assert ("it asks for io.open, which is code" in str(error.value)) == zipped
    torch.load(path, weights_only=False) if zipped else pickle.loads(path.read_bytes())  # it would have
    assert witness.exists()


def test_other_files(tmp_path):
    with pytest.raises(ValueError, match="does not exist"):
        checkpoint.read(tmp_path / "none.ckpt")
    torch.save([1], tmp_path / "list.ckpt")
    with pytest.raises(ValueError, match="is not a checkpoint of a federation"):
        checkpoint.read(tmp_path / "list.ckpt")
