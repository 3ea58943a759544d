"""The server's store of messages: bounded, the oldest goes, in memory and on disk alike."""

import pytest

from featherlight.plugins.replay_buffer import ReplayBuffer


@pytest.fixture(params=["memory", "disk"])
def make(request, tmp_path):
    return lambda limit: ReplayBuffer(limit, tmp_path / "buffer" if request.param == "disk" else None)


def test_the_newest_message_of_each_client(make):
    buffer = make(100)
    buffer.put(3, 0, b"old")
    buffer.put(1, 0, b"one")
    buffer.put(3, 2, b"newer")
    assert (buffer.clients, buffer.nbytes) == ([1, 3], 8)
    assert (buffer.get(3), buffer.round_of(3), buffer.get(1)) == (b"newer", 2, b"one")


def test_the_oldest_go_first(make, tmp_path):
    buffer = make(10)
    for client, round in ((5, 0), (2, 1), (8, 1)):
        buffer.put(client, round, b"abc")
    buffer.put(5, 2, b"abc")  # 5 is the newest now
    buffer.put(9, 2, b"abcd")  # 3 + 3 + 3 + 4: the earliest round has 2 and 8, and 2 comes first
    assert buffer.clients == [5, 8, 9]
    assert buffer.nbytes == 10
    buffer.put(1, 3, b"0123456789")
    assert buffer.clients == [1]
    assert not (tmp_path / "buffer").exists() or len([*(tmp_path / "buffer").iterdir()]) == 1
    with pytest.raises(ValueError, match="client 4 sends 11 bytes, but buffer_bytes=10 is all there is"):
        buffer.put(4, 4, b"01234567890")
    assert buffer.clients == [1]


def test_its_content_is_its_state(make):
    buffer, again = make(100), ReplayBuffer(100)
    buffer.put(1, 4, bytes(range(20)))
    buffer.put(0, 5, b"x")
    state = buffer.state_dict()
    again.put(7, 0, b"gone")
    again.load_state_dict(state)
    assert (again.clients, again.round_of(1), again.get(1), again.get(0)) == ([0, 1], 4, bytes(range(20)), b"x")
    buffer.load_state_dict(state)  # over its own
    assert buffer.get(1) == bytes(range(20))


def test_a_file_is_no_folder(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r'buffer=".*file" is a file: give a folder, or "memory"'):
        ReplayBuffer(10, tmp_path / "file")
