"""ServerApp and ClientApps in one process, on a grid that hands messages over: who takes part, what is told, what is refused."""

import importlib.util
import json
import os
import stat
import time
from pathlib import Path

import pytest
import torch
import yaml

pytest.importorskip("flwr", reason="Flower is not installed: pip install -e '.[test]'")

from cryptography import x509
from flwr.app import ConfigRecord, RecordDict

from featherlight.cli import main
from featherlight.commands.federate import federate
from featherlight.fed_loop import checkpoint
from featherlight.flower.credentials import write_credentials
from featherlight.flower.records import read, written

SPEC = importlib.util.spec_from_file_location("on_superlink", Path(__file__).parents[2] / "benchmarks" / "on_superlink.py")
on_superlink = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(on_superlink)
WAYS = on_superlink.WAYS
EACH = bool(os.environ.get("FEATHERLIGHT_SUPERLINK"))
"""Every method by itself, too: minutes."""

FREEZING = on_superlink.named("LayerFreezing")[0]


def test_every_method_is_in_a_run():
    run = on_superlink.ALL_METHODS
    assert {one["class_path"] for name in run for one in WAYS[name].plugins} == set(on_superlink.METHODS)
    assert [name for name in run if WAYS[name].refused] == ["PartitionedTraining"]


@pytest.mark.parametrize("way", [name for name in (WAYS if EACH else on_superlink.ALL_METHODS) if WAYS[name].refused is None])
def test_a_run_leaves_what_the_built_in_loop_leaves(way, serve, tmp_path):
    path, here = tmp_path / "small.yaml", tmp_path / "here"
    path.write_text(on_superlink.configuration(WAYS[way]))
    federate(["-c", str(path)], folder=here)
    there, _ = serve(path)
    one, other = (checkpoint.read_newest(folder)[1] for folder in (here, there))
    apart = {name: float((value.double() - other["server"][name].double()).abs().max()) for name, value in one["server"].items()}
    assert max(apart.values()) <= WAYS[way].tolerance, apart
    assert sorted(file.name for file in here.iterdir()) == sorted(file.name for file in there.iterdir())
    bytes_of = [[(row["bytes_down"], row["bytes_up"]) for row in state["history"]] for state in (one, other)]
    assert bytes_of[0] == bytes_of[1]


@pytest.mark.parametrize("way", [name for name, way in WAYS.items() if way.refused is not None])
def test_what_cannot_run_is_refused_before_any_trains(way, serve, tmp_path):
    (tmp_path / "small.yaml").write_text(on_superlink.configuration(WAYS[way]))
    with pytest.raises(ValueError, match=WAYS[way].refused):
        serve(tmp_path / "small.yaml")


def test_a_run_goes_on_with_clients_that_know_nothing_of_it(configured, serve, tmp_path):
    path = configured(FREEZING)
    serve(path, arguments="--federation.rounds=2")
    there, grid = serve(path, resume=True)
    federate(["-c", str(path)], folder=tmp_path / "here")
    one, other = (checkpoint.read_newest(folder)[1] for folder in (tmp_path / "here", there))
    assert not [name for name, value in one["server"].items() if not torch.equal(value, other["server"][name])]
    assert [kind for kind, *_ in grid.sent].count("train") == 4  # asked twice each: at first they lack what the ledger says that they have
    assert other["history"][2]["bytes_down"] > one["history"][2]["bytes_down"]


def test_a_client_that_fails_is_left_out_and_told_of(configured, serve, capsys):
    there, _ = serve(configured(), down=[(1, "1")])
    rows = [json.loads(line) for line in (there / "metrics.jsonl").read_text().splitlines()]
    assert [(row["clients"], row["rejected"]) for row in rows] == [(2, 0), (1, 1), (2, 0)]
    assert "out of memory" in "".join(capsys.readouterr())


def test_a_client_with_data_of_its_own_has_a_number_of_its_own_in_them(configured, serve):
    own = {"partition-id": 1, "data-client": 0, "arguments": "--data.num_clients=1 --data.limit_train=20"}
    there, _ = serve(configured(rounds=1), ({"partition-id": 0}, own))
    assert json.loads((there / "result.json").read_text())["turns"] == 2


@pytest.mark.parametrize(
    ("nodes", "why"),
    [
        ([{"partition-id": 0}], r"clients \[1\] did not come within 0.5 seconds"),
        ([{"partition-id": 0}, {"partition-id": 0}], "two SuperNodes say that they are client 0"),
        ([{}, {"partition-id": 0}], "must say which client it is"),
        ([{"partition-id": 2}], "client 2 has number 2 in its data, which have 2 clients"),
        (
            [{"partition-id": 0, "arguments": "--federation.seed=6"}],
            "client 0 is of another federation: seed is 6 there and 5 on the server",
        ),
        ([{"partition-id": 0, "arguments": "--model.init_args.output_dim=4"}], "client 0 is of another federation: model is"),
    ],
)
def test_clients_that_do_not_belong_are_refused_before_any_trains(nodes, why, configured, serve):
    with pytest.raises(ValueError, match=why):
        serve(configured(), nodes)


# -- what travels -------------------------------------------------------------------------------------------------------
def test_bytes_come_out_as_they_went_in():
    payload = bytes(range(256)) * 3
    assert read(written('{"a": 1}', payload)) == ('{"a": 1}', payload)
    assert read(written("", b"")) == ("", b"")


def test_messages_of_others_are_refused():
    with pytest.raises(ValueError, match="none of featherlight's"):
        read(RecordDict({"config": ConfigRecord({"lr": 0.1})}))


# -- the command --------------------------------------------------------------------------------------------------------
def test_the_command_writes_an_app_and_keys(configured, tmp_path, capsys):
    app, keys = tmp_path / "digits-app", tmp_path / "keys"
    main(
        [
            "flower",
            "-c",
            str(configured()),
            "--data.num_clients=3",
            f"--app={app}",
            f"--keys={keys}",
            "--hosts=superlink.example.org,10.0.0.7",
        ]
    )
    assert sorted(path.name for path in app.iterdir()) == ["federation.py", "pyproject.toml", "small.yaml"]
    assert yaml.safe_load((app / "small.yaml").read_text())["data"]["init_args"]["num_clients"] == 3
    compile((app / "federation.py").read_text(), "federation.py", "exec")
    names = {"ca.crt", "server.crt", "server.key", *(f"node-{n}{end}" for n in range(3) for end in ("", ".pub"))}
    assert {path.name for path in keys.iterdir()} == names
    assert {stat.S_IMODE((keys / name).stat().st_mode) for name in ("server.key", "node-0")} == {0o600}


def test_the_certificate_is_for_its_hosts_and_by_its_authority(tmp_path):
    write_credentials(tmp_path / "keys", ["superlink.example.org", "10.0.0.7"], 1)
    root, leaf = (x509.load_pem_x509_certificate((tmp_path / "keys" / name).read_bytes()) for name in ("ca.crt", "server.crt"))
    leaf.verify_directly_issued_by(root)
    names = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["superlink.example.org"]
    assert [str(address) for address in names.get_values_for_type(x509.IPAddress)] == ["10.0.0.7"]
    assert leaf.not_valid_after_utc.timestamp() > time.time() + 300 * 86400


@pytest.mark.parametrize(("name", "why"), [("my_app", "no name for a Flower app"), ("taken", "is not empty")])
def test_folders_that_do_not_serve_are_refused(name, why, configured, tmp_path, capsys):
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").touch()
    with pytest.raises(SystemExit):
        main(["flower", "-c", str(configured()), "--app", str(tmp_path / name)])
    assert why in capsys.readouterr().err
