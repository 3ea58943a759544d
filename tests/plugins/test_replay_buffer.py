"""The server's store of messages: bounded, the oldest goes, in memory and on disk alike."""

import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

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
    assert not (tmp_path / "buffer").exists() or len([*(tmp_path / "buffer").rglob("*.safetensors")]) == 1
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


def files(folder):
    return {path.name: path.stat().st_size for path in folder.rglob("*.safetensors")}


def test_what_is_set_aside_counts_once_the_round_does(make, tmp_path):
    buffer = make(10)
    buffer.put(1, 0, b"abc")
    buffer.put(6, 0, b"abc")
    for client in (1, 2, 3):
        buffer.set_aside(client, b"wxyz")
    assert (buffer.clients, buffer.get(1), buffer.nbytes) == ([1, 6], b"abc", 6)
    assert dict(buffer.aside) == {2: 4, 3: 4}  # all three have no room
    assert files(tmp_path) in (
        {},
        dict.fromkeys(("client-000001.safetensors", "client-000006.safetensors"), 3)
        | dict.fromkeys(("new-000002.safetensors", "new-000003.safetensors"), 4),
    )
    buffer.commit(4)
    assert (buffer.clients, buffer.nbytes, buffer.get(3), buffer.round_of(3)) == ([2, 3], 8, b"wxyz", 4)
    assert files(tmp_path) in ({}, dict.fromkeys(("client-000002.safetensors", "client-000003.safetensors"), 4))
    buffer.set_aside(3, b"newer")
    buffer.set_aside(2, b"n")
    buffer.keep_aside([3])
    buffer.commit(5)
    assert (buffer.clients, buffer.get(3), buffer.get(2), dict(buffer.aside)) == ([2, 3], b"newer", b"wxyz", {})
    buffer.drop(2)
    buffer.drop(9)
    assert (buffer.clients, buffer.nbytes) == ([3], 5)


@given(st.dictionaries(st.integers(0, 30), st.integers(1, 12), max_size=12), st.integers(12, 40), st.randoms())
def test_what_fits_does_not_depend_on_the_order_in_which_it_came(sizes, limit, random):
    """As if each client's came in the order of their numbers, the lowest going for it."""
    in_order = ReplayBuffer(limit)
    for client in sorted(sizes):
        in_order.put(client, 3, bytes(sizes[client]))
    buffer = ReplayBuffer(limit)
    buffer.set_aside(40, b"of a round that was interrupted")
    buffer.begin_round()
    order = list(sizes)
    random.shuffle(order)
    for client in order:
        buffer.set_aside(client, bytes(sizes[client]))
        assert sum(buffer.aside.values()) <= limit
    buffer.commit(3)
    assert buffer.clients == in_order.clients


def test_several_buffers_in_one_folder_do_not_meet(tmp_path):
    """As several runs, or processes of one run, have them; what else is there is left alone."""
    (tmp_path / "client-000001.safetensors").write_bytes(b"somebody's")
    (tmp_path / "featherlight-replay-notes").mkdir()
    (tmp_path / "featherlight-replay-notes" / "notes.txt").write_text("mine")
    one, other = ReplayBuffer(10, tmp_path), ReplayBuffer(10, tmp_path)
    one.put(1, 0, b"one")
    other.put(1, 0, b"other")
    assert (one.get(1), other.get(1), one.nbytes, other.nbytes) == (b"one", b"other", 3, 5)
    one.drop(1)
    assert other.get(1) == b"other"
    one.close()
    other.close()
    left = sorted(path.name for path in tmp_path.rglob("*"))
    assert left == ["client-000001.safetensors", "featherlight-replay-notes", "notes.txt"]


LEAVE = """
import os, sys
from pathlib import Path
from featherlight.plugins.message_store import OnDisk

store = OnDisk(Path(sys.argv[1]))
store.write("client-000001", b"left")
os.kill(os.getpid(), 9)
"""


def test_what_a_killed_process_left_is_cleared_by_the_next(tmp_path):
    assert subprocess.run([sys.executable, "-c", LEAVE, tmp_path], check=False).returncode == -9
    assert files(tmp_path) == {"client-000001.safetensors": 4}
    buffer, again = ReplayBuffer(10, tmp_path), ReplayBuffer(10, tmp_path)
    buffer.put(2, 0, b"mine")
    assert files(tmp_path) == {"client-000002.safetensors": 4}
    again.put(3, 0, b"theirs")  # does not take a living one's folder for a left one
    assert buffer.get(2) == b"mine"
    buffer.close()
    again.close()
    assert not [*tmp_path.iterdir()]


def test_one_that_was_still_ending_is_cleared_at_the_close(tmp_path):
    ends_late = LEAVE.replace("os.kill(os.getpid(), 9)", "print(flush=True); sys.stdin.read()")
    process = subprocess.Popen([sys.executable, "-c", ends_late, tmp_path], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout.readline()
    buffer = ReplayBuffer(10, tmp_path)
    buffer.put(2, 0, b"mine")
    assert files(tmp_path) == {"client-000001.safetensors": 4, "client-000002.safetensors": 4}
    process.kill()
    process.wait()
    buffer.close()
    assert not [*tmp_path.iterdir()]


def test_a_file_is_no_folder(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r'buffer=".*file" is a file: give a folder, or "memory"'):
        ReplayBuffer(10, tmp_path / "file")
