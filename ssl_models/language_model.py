"""A causal language model from a Hugging Face configuration, as a LightningModule: what the methods are tried on beside images.

Nothing is downloaded: weights are drawn, from the shapes that the configuration names.
"""

from __future__ import annotations

from math import log
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor
from torch.nn.functional import cross_entropy, linear
from torch.optim.lr_scheduler import LambdaLR

from featherlight.ssl_models.optimizers import make_optimizer, make_schedule


class LanguageModel(LightningModule):
    """Next-token cross entropy of a transformer whose output scores share the token embeddings (as GPT-2's do).

    A batch is ``(tokens, following)``: int64 (N, T) each, ``following`` one token later.

    Args:
        architecture: a model type of transformers, such as ``gpt2``; with nothing else, GPT-2's 124,439,808 parameters.
        config: what differs from that type's default configuration, for example ``{n_layer: 2, n_embd: 64, n_head: 2, vocab_size: 256}``.
        optimizer: ``adamw``, ``sgd`` or ``lars``.
        lr: learning rate.
        weight_decay: weight decay of matrices; biases and norms have none.
        optimizer_momentum: momentum of ``sgd`` and ``lars``.
        schedule: ``constant`` or ``cosine`` learning rate.
        periods: length of the schedule: epochs under a Trainer, rounds in a federation.
        warmup_periods: periods of linear warm-up at the start.

    Raises:
        ValueError: an unknown type, an option that it has not, or tokens that it cannot take.
        ImportError: transformers is not installed.

    Example:
        >>> model = LanguageModel("gpt2", {"n_layer": 1, "n_embd": 8, "n_head": 2, "n_positions": 16, "vocab_size": 256})
        >>> model.logits(torch.zeros(4, 16, dtype=torch.long)).shape
        torch.Size([4, 16, 256])
    """

    def __init__(
        self,
        architecture: str = "gpt2",
        config: dict[str, Any] | None = None,
        optimizer: Literal["adamw", "sgd", "lars"] = "adamw",
        lr: float = 1e-3,
        weight_decay: float = 0.0,
        optimizer_momentum: float = 0.9,
        schedule: Literal["constant", "cosine"] = "constant",
        periods: int | None = None,
        warmup_periods: int = 0,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.lr_factor = make_schedule(schedule, periods, warmup_periods)
        self.transformer = _transformer(architecture, config or {})
        settings: Any = self.transformer.config
        self.vocabulary, self.context = int(settings.vocab_size), int(settings.max_position_embeddings)

    def logits(self, tokens: Tensor) -> Tensor:
        """Scores of the next token at every place, before the softmax: (N, T) to (N, T, vocabulary).

        Raises:
            ValueError: more tokens in a row than the model has positions.
        """
        if tokens.shape[1] > self.context:
            raise ValueError(
                f"{tokens.shape[1]} tokens in a row came where the model has {self.context} positions: set context={self.context} of the "
                "data, or more positions in the model's config (n_positions, for gpt2)"
            )
        hidden = self.transformer(input_ids=tokens, use_cache=False).last_hidden_state
        return linear(hidden, self.transformer.get_input_embeddings().weight)

    def forward(self, tokens: Tensor) -> Tensor:
        """As :meth:`logits`."""
        return self.logits(tokens)

    def training_step(self, batch: Any, batch_idx: int = 0) -> Tensor:
        """The loss of one batch, nats a token."""
        loss = self._loss(batch)
        self.log("train/loss", loss.detach(), prog_bar=True, batch_size=len(batch[0]))
        return loss

    def validation_step(self, batch: Any, batch_idx: int = 0) -> dict[str, Tensor]:
        """``{"loss": nats a token, "bits": bits a token}``, means over the batch; a token of :class:`TextData` is a byte."""
        return self._evaluate("val", batch)

    def test_step(self, batch: Any, batch_idx: int = 0) -> dict[str, Tensor]:
        """As :meth:`validation_step`."""
        return self._evaluate("test", batch)

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """One optimizer over every parameter, and a scheduler that steps once a period."""
        given = self.hparams
        optimizer = make_optimizer(given["optimizer"], self.parameters(), given["lr"], given["weight_decay"], given["optimizer_momentum"])
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": LambdaLR(optimizer, self.lr_factor), "interval": "epoch"}}

    def _loss(self, batch: Any) -> Tensor:
        tokens, following = batch[0], batch[1]
        return cross_entropy(self.logits(tokens).flatten(0, 1), following.flatten())

    def _evaluate(self, part: str, batch: Any) -> dict[str, Tensor]:
        with torch.no_grad():
            loss = self._loss(batch)
        scores = {"loss": loss, "bits": loss / log(2)}
        for name, score in scores.items():
            self.log(f"{part}/{name}", score, prog_bar=name == "loss", batch_size=len(batch[0]), sync_dist=True)
        return scores


def _transformer(architecture: str, options: dict[str, Any]) -> Any:
    """A base model, without an output layer of its own: a tied one is a second name for the embeddings, which moving a model unties."""
    try:
        from transformers import CONFIG_MAPPING, AutoModel
    except ImportError as error:
        raise ImportError("LanguageModel needs transformers: pip install 'featherlight[transformers]'") from error
    if architecture not in CONFIG_MAPPING:
        raise ValueError(f'architecture "{architecture}" is no model type of transformers; gpt2 is one')
    default = CONFIG_MAPPING[architecture]()
    unknown = [name for name in options if not hasattr(default, name)]
    if unknown:
        raise ValueError(f'"{unknown[0]}" is no option of {architecture}\'s configuration; it has {", ".join(sorted(default.to_dict()))}')
    config = CONFIG_MAPPING[architecture](**{"bos_token_id": None, "eos_token_id": None, **options})  # no sequence here begins or ends
    if not getattr(config, "tie_word_embeddings", True):
        raise ValueError(f"{architecture} has output scores apart from its embeddings here; set tie_word_embeddings: true in config")
    return AutoModel.from_config(config)
