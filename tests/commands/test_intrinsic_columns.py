"""Intrinsic gradient compression of GPT-2: the paper's columns (arXiv 2112.02656), and the command that prints them."""

from pathlib import Path

import pytest
import torch
import yaml
from torch._subclasses.fake_tensor import FakeTensorMode

from featherlight.cli import main
from featherlight.plugins import IntrinsicProjection, Visit
from featherlight.ssl_models import LanguageModel

PAPERS = Path(__file__).parent.parent.parent / "configs" / "papers"
COLUMNS = {  # total compression of static subspaces, and of K = 8
    16384: ("7595", "1688"),
    65536: ("1899", "422"),
    262144: ("475", "105"),
    1048576: ("119", "26.4"),
    4194304: ("29.7", None),
}


@pytest.fixture(scope="module")
def gpt2():
    """124,439,808 parameters in no memory."""
    with torch.device("meta"):
        module = LanguageModel()
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        module.to_empty(device="cpu")
    assert sum(value.numel() for value in module.parameters()) == 124_439_808
    return module, mode


def arguments(dim, subspaces):
    content = yaml.safe_load((PAPERS / f"intrinsic_gpt2_{dim}{'_k8' if subspaces > 1 else ''}.yaml").read_text())
    assert content["model"] == {"class_path": "LanguageModel", "init_args": {"architecture": "gpt2", "optimizer": "sgd", "lr": 0.1}}
    (plugin,) = content["plugins"]
    assert plugin["class_path"] == "IntrinsicProjection"
    return plugin["init_args"]


@pytest.mark.parametrize("subspaces", [1, 8])
@pytest.mark.parametrize("dim", COLUMNS)
def test_columns_are_the_papers(dim, subspaces, gpt2):
    """What goes down and up in the second round, in numbers."""
    printed = COLUMNS[dim][subspaces > 1]
    if printed is None:
        assert not list(PAPERS.glob(f"intrinsic_gpt2_{dim}_k8*"))
        return
    module, mode = gpt2
    plugin = IntrinsicProjection(**arguments(dim, subspaces))
    with mode:
        plugin.attach(module)
        entries = {name: value.detach() for name, value in module.named_parameters()}
        first = plugin.encode_down(entries, Visit(0))
        plugin.encode(entries, Visit(0))
        plugin.arrive([Visit(0)])
        second = plugin.encode_down(entries, Visit(1), list(first))
        up = plugin.encode(entries, Visit(1))
    sent = sum(value.numel() for value in second.values()), sum(value.numel() for value in up.values())
    assert sent == (subspaces * dim, dim)
    total = 2 * 124_439_808 / sum(sent)
    assert (f"{total:.0f}" if total >= 100 else f"{total:.1f}") == printed


def test_the_command_prints_a_column(capsys):
    small = [
        "--data.init_args.context=4",
        "--data.init_args.batch_size=1",
        "--data.init_args.limit_train=8",
        "--data.init_args.partition=IID",
    ]
    options = [*small, "--data.init_args.num_clients=2", "--federation.rounds=2", "--federation.cohort=1"]
    assert main(["cost", "-c", str(PAPERS / "intrinsic_gpt2_65536_k8.yaml"), *options]) in (None, 0)
    told = " ".join(capsys.readouterr().out.split())
    assert "237× less down, 1899× less up, 422× less both ways" in told


def test_more_dimensions_than_parameters(capsys, tmp_path):
    """In one line, before anything is trained."""
    content = yaml.safe_load((PAPERS / "intrinsic_gpt2_65536.yaml").read_text())
    content["model"]["init_args"]["config"] = {"n_layer": 1, "n_embd": 8, "n_head": 2, "n_positions": 16, "vocab_size": 256}
    content["data"]["init_args"] |= {"context": 8, "limit_train": 60}
    content["data"]["init_args"].pop("partition")
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(content))
    size = sum(value.numel() for value in LanguageModel(config=content["model"]["init_args"]["config"]).parameters())
    with pytest.raises(SystemExit) as stopped:
        main(["cost", "-c", str(tmp_path / "small.yaml")])
    assert stopped.value.code != 0
    assert f"dim=65536: {size} parameters train in this stage; give that many or fewer" in " ".join(capsys.readouterr().err.split())
