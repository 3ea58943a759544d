"""A file is written whole or not at all, whoever writes it and whatever fails."""

import errno
import json
import os
import threading

import pytest
from lightning.pytorch.loggers import TensorBoardLogger

from featherlight.fed_loop import checkpoint
from featherlight.fed_loop.whole_files import write_text, write_whole
from featherlight.plugins import Change, Plugin


def full_disk(*_):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_file_is_on_disk_before_it_takes_the_name_and_the_folder_after(tmp_path, monkeypatch):
    path, order = tmp_path / "new" / "file", []
    real_sync, real_replace = os.fsync, type(path).replace

    def sync(descriptor):
        order.append(("sync", os.readlink(f"/proc/self/fd/{descriptor}")))
        real_sync(descriptor)

    def replace(partial, final):
        assert partial.read_bytes() == b"whole"  # flushed, too
        order.append(("replace", str(final)))
        return real_replace(partial, final)

    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(type(path), "replace", replace)
    write_whole(path, lambda file: file.write(b"whole"))
    assert order == [("sync", str(path.parent / ".file.partial")), ("replace", str(path)), ("sync", str(path.parent))]
    assert [each.name for each in path.parent.iterdir()] == ["file"]


@pytest.mark.parametrize("where", ["os.fsync", "pathlib.Path.replace"])
def test_a_full_disk_leaves_what_was_there(where, tmp_path, monkeypatch):
    path = tmp_path / "file.json"
    write_text(path, "before")
    monkeypatch.setattr(where, full_disk)
    with pytest.raises(OSError, match=rf"cannot write {path} .*No space left on device.*{path} is as it was before"):
        write_text(path, "after")
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]


def test_an_error_in_the_middle_leaves_what_was_there(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"before")

    def fail(file):
        file.write(b"half of it")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_whole(path, fail)
    assert path.read_bytes() == b"before"
    assert list(tmp_path.iterdir()) == [path]


def test_metrics_are_not_lost_when_a_run_goes_on_and_the_disk_is_full(net, points, federation, tmp_path, monkeypatch):
    """A run that goes on writes metrics.jsonl anew: as long as it cannot, the old one stays."""
    federation(2, folder=tmp_path).run(net(), points([8, 8]))
    before = (tmp_path / "metrics.jsonl").read_text()
    with monkeypatch.context() as broken:
        broken.setattr(os, "fsync", full_disk)
        with pytest.raises(OSError, match=r"cannot write .*metrics.jsonl"):
            federation(3, folder=tmp_path).run(net(), points([8, 8]), resume=True)
    assert (tmp_path / "metrics.jsonl").read_text() == before
    federation(3, folder=tmp_path).run(net(), points([8, 8]), resume=True)
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 3
    assert json.loads((tmp_path / "result.json").read_text())["rounds"] == 3


def test_what_a_killed_process_left_is_written_over(tmp_path):
    (tmp_path / ".round-000001.ckpt.partial").write_bytes(b"half")
    checkpoint.write(tmp_path, 1, {"round": 1})
    assert [path.name for path in tmp_path.iterdir()] == ["round-000001.ckpt"]


class Fill(Plugin):
    """From a round on there is no room for what is logged."""

    def __init__(self, round, folder):
        self._round, self._folder = round, folder

    def advance(self, clock):
        if clock.period == self._round:
            for path in [*self._folder.glob("events*"), *self._folder.glob("metrics.jsonl")]:
                path.unlink()
                path.symlink_to("/dev/full")
        return Change()


def test_a_log_that_cannot_grow_is_named(net, points, federation, tmp_path):
    """/dev/full is a disk without room; the run stops with a line that names what it was writing."""
    fill = Fill(1, tmp_path)
    with pytest.raises(OSError, match=r"cannot add to .*metrics.jsonl .*No space left on device"):
        federation(2, folder=tmp_path).run(net(), points([8]), [fill])
    assert checkpoint.read(checkpoint.newest(tmp_path))["round"] == 1


def test_a_logger_that_cannot_write_is_named_and_its_thread_says_nothing(net, points, federation, tmp_path, capfd):
    logger, before = TensorBoardLogger(tmp_path, name="", version="board"), threading.excepthook

    with pytest.raises(OSError, match=r"TensorBoardLogger cannot write .*No space left on device"):
        federation(200, folder=tmp_path / "run", checkpoint_every=0).run(
            net(), points([8]), [Fill(2, tmp_path / "board")], loggers=[logger]
        )
    assert "Traceback" not in capfd.readouterr().err
    assert threading.excepthook is before


def test_a_folder_that_cannot_be_written_is_named(net, points, federation, tmp_path):
    """Of another user than root, whom permissions do not hold."""
    folder = tmp_path / "closed"
    federation(1, folder=folder).run(net(), points([8]))
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    for path in (tmp_path, *tmp_path.parents):  # pytest's folders are open to their owner alone
        if path.stat().st_uid == os.getuid() and path != path.parent:
            path.chmod(path.stat().st_mode | 0o011)
    folder.chmod(0o555)
    root = os.geteuid() == 0
    try:
        if root:
            os.seteuid(65534)
        with pytest.raises(OSError, match=r"cannot write .*Permission denied"):
            federation(2, folder=folder).run(net(), points([8]), resume=True)
    finally:
        if root:
            os.seteuid(0)
        folder.chmod(0o755)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
