"""The language model and its data: loss by hand, what text becomes, who has it, and the same bytes on every way to a batch."""

import math

import lightning.pytorch as pl
import pytest
import torch

from featherlight.plugins import Visit
from featherlight.plugins.present import held
from featherlight.ssl_models import LanguageModel, TextData
from featherlight.ssl_models.partitions import Natural

TINY = {
    "n_layer": 1,
    "n_embd": 16,
    "n_head": 2,
    "n_positions": 32,
    "vocab_size": 256,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
}


@pytest.fixture
def model():
    torch.manual_seed(0)
    return LanguageModel(config=TINY)


@pytest.fixture
def folder(tmp_path):
    """Two sources of text: 30 and 12 whole sequences of 10 bytes, and a rest."""
    for name, text in (("a/one.txt", "abcdefghij" * 20 + "xyz"), ("a/two.txt", "0123456789" * 10), ("b/only.txt", "." * 125)):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    (tmp_path / "b" / "picture.png").write_bytes(bytes(range(256)))
    return tmp_path


def data(folder, **options):
    return TextData("folder", root=str(folder), context=9, batch_size=4, **options)


# -- the model --------------------------------------------------------------------------------------------------------
def test_loss_by_hand(model):
    tokens = torch.randint(256, (3, 12), generator=torch.Generator().manual_seed(1))
    batch = tokens[:, :-1], tokens[:, 1:]
    model.eval()
    scores = model.logits(batch[0]).log_softmax(-1)
    by_hand = -sum(float(scores[row, place, tokens[row, place + 1]]) for row in range(3) for place in range(11)) / 33
    found = model.validation_step(batch)
    assert float(model.training_step(batch)) == pytest.approx(by_hand, rel=1e-5)
    assert float(found["loss"]) == pytest.approx(by_hand, rel=1e-5)
    assert float(found["bits"]) == pytest.approx(by_hand / math.log(2), rel=1e-5)


def test_it_looks_back_only(model):
    model.eval()
    tokens = torch.randint(256, (1, 20), generator=torch.Generator().manual_seed(1))
    other = tokens.clone()
    other[0, 12] = (other[0, 12] + 1) % 256
    one, two = model.logits(tokens), model.logits(other)
    torch.testing.assert_close(one[:, :12], two[:, :12])
    assert not torch.allclose(one[:, 12:], two[:, 12:])


def test_scores_share_the_embeddings(model):
    """Each parameter has one name: what travels has no second copy, and moving the model unties nothing."""
    assert held(model).keys() == dict(model.named_parameters()).keys()
    numbers = 256 * 16 + 32 * 16 + (16 * 48 + 48) + (16 * 16 + 16) + (16 * 64 + 64) + (64 * 16 + 16) + 3 * 2 * 16
    assert sum(value.numel() for value in model.parameters()) == numbers


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("gpt9",), 'architecture "gpt9" is no model type of transformers; gpt2 is one'),
        (("gpt2", {"layers": 2}), '"layers" is no option of gpt2\'s configuration; it has .*n_layer'),
        (("gpt2", {**TINY, "tie_word_embeddings": False}), "set tie_word_embeddings: true"),
    ],
)
def test_wrong_configurations_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        LanguageModel(*arguments)


def test_too_many_tokens(model):
    with pytest.raises(ValueError, match="33 tokens in a row came where the model has 32 positions: set context=32"):
        model.logits(torch.zeros(1, 33, dtype=torch.long))


def test_it_learns_under_a_trainer(model, folder):
    """Sources repeat ten signs: from 8 bits a byte to fewer than 5."""
    text = data(folder)
    trainer = pl.Trainer(max_epochs=8, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
    model.hparams["lr"] = 1e-2
    trainer.fit(model, datamodule=text)
    (figures,) = trainer.test(model, datamodule=text, verbose=False)
    assert figures["test/bits"] < 5


# -- the data ---------------------------------------------------------------------------------------------------------
def test_text_is_cut_by_source(folder):
    text = data(folder, test_fraction=0.0)
    assert text.sources == ["a", "b"]
    tokens, labels = text._train.tokens, text._train.labels
    whole = ("abcdefghij" * 20 + "xyz\n" + "0123456789" * 10)[:300]
    assert bytes(tokens[labels == 0].flatten().tolist()).decode() == whole
    assert bytes(tokens[labels == 1].flatten().tolist()).decode() == "." * 120


def test_the_end_of_every_source_is_for_testing(folder):
    text = data(folder, test_fraction=0.25)
    train, test = text._parts
    assert [int((part.labels == source).sum()) for source in (0, 1) for part in (train, test)] == [22, 8, 9, 3]
    held_out = torch.cat([batch[0] for batch in text.test_dataloader()])
    assert torch.equal(held_out, test.tokens)


def test_a_source_is_a_client(folder):
    text = data(folder, partition=Natural(), test_fraction=0.0)
    assert text.client_sizes() == [30, 12]
    assert text.batch_sizes(0, 2) == [4, 4, 4, 4, 4, 4, 4, 2] * 2
    assert text.steps_per_visit(1, 3) == 9
    seen = {0: [], 1: []}
    for turn, batch in text.client_batches([Visit(0, 0), Visit(0, 1)], 1):
        tokens, following = text.on_after_batch_transfer(batch)
        assert tokens.shape[1] == following.shape[1] == 9
        assert torch.equal(tokens[:, 1:], following[:, :-1])
        seen[turn].append(torch.cat([tokens, following[:, -1:]], 1))
    for client, batches in seen.items():
        assert [len(batch) for batch in batches] == text.batch_sizes(client, 1)
        mine = text._train.tokens[text._clients[client]]
        assert sorted(map(tuple, torch.cat(batches).tolist())) == sorted(map(tuple, mine.tolist()))


def test_a_trainer_s_epoch_is_client_0_s_visit(folder):
    text = data(folder, seed=5)
    loader = text.train_dataloader()
    loader.sampler.set_epoch(2)
    under_a_trainer = [text.on_after_batch_transfer(batch)[0] for batch in loader]
    in_a_federation = [text.on_after_batch_transfer(batch)[0] for _, batch in text.client_batches([Visit(2, 0, 5)], 1)]
    assert len(under_a_trainer) == len(in_a_federation)
    assert all(torch.equal(one, other) for one, other in zip(under_a_trainer, in_a_federation))


def test_clients_keep_some_for_evaluation(folder):
    text = data(folder, partition=Natural(), client_val_fraction=0.5, test_fraction=0.0)
    assert text.client_sizes() == [15, 6]
    kept = torch.cat([batch[0] for batch in text.client_val_batches(0)])
    mine = text._train.tokens[text._clients[0]]
    both = torch.cat([kept, mine])
    assert sorted(map(tuple, both.tolist())) == sorted(map(tuple, text._train.tokens[text._train.labels == 0].tolist()))


def test_limits_are_subsets(folder):
    few, more = (set(map(tuple, data(folder / "a", limit_train=limit)._train.tokens.tolist())) for limit in (5, 12))
    assert few <= more
    assert len(data(folder, limit_train=5)._train) == 5


def test_the_standard_library_is_there():
    text = TextData(context=512)
    assert {"asyncio", "json", "modules"} <= set(text.sources)
    assert not {"site-packages", "test"} & set(text.sources)
    assert b"import" in dict(text._texts)["json"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dataset": "wiki"}, "dataset='wiki' is unknown; choose from stdlib, folder"),
        ({"context": 0}, "context=0; it must be at least 1"),
        ({"test_fraction": 1.0}, "test_fraction=1.0; it must be at least 0 and below 1"),
    ],
)
def test_wrong_arguments_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        TextData(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"root": "nowhere"}, "root=nowhere is neither a file nor a folder"),
        ({"pattern": "*.rst"}, r"no file in .* has a name like \*.rst; set pattern"),
        ({"context": 1000}, "no text of 1001 bytes or more was found, which a sequence takes; set a context below 1000"),
        ({"partition": Natural(), "limit_train": 1, "client_val_fraction": 0.9}, "client 0 has no training sequence"),
    ],
)
def test_too_little_text_is_named(options, message, folder):
    text = TextData("folder", **{"root": str(folder), "context": 9, **options})
    with pytest.raises(ValueError, match=message):
        text.client_sizes()
