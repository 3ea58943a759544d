"""Hugging Face's GPT-2, from a configuration, learning the next byte of a text file.

python examples/hugging_face_gpt2.py --text FILE --width 768 --depth 12 --context 1024 --batch_size 8 --steps -1 --epochs 24
"""

from pathlib import Path

import lightning as L
import torch
from shared import Ways, arguments, compare
from torch.utils.data import DataLoader
from transformers import GPT2Config, GPT2LMHeadModel

from featherlight.callbacks import DepthDropout, IntrinsicProjection, LayerFreezing, ProgressiveGrowth


class GPT2(L.LightningModule):
    def __init__(self, width: int, depth: int, context: int) -> None:
        super().__init__()
        # Scores of their own: tied to the embeddings, which are the stem, they would be frozen with it after the first stage.
        shape = {"n_embd": width, "n_layer": depth, "n_head": max(1, width // 64), "n_positions": context, "vocab_size": 256}
        self.model = GPT2LMHeadModel(GPT2Config(**shape, bos_token_id=None, eos_token_id=None, tie_word_embeddings=False, use_cache=False))

    def training_step(self, batch, batch_idx):
        return self.model(input_ids=batch, labels=batch).loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=3e-4)


def ways(epochs: int, depth: int) -> Ways:
    """Two stages of half the blocks each. PriSM takes apart ``nn.Linear`` and convolutions; GPT-2's layers are transformers' own Conv1D.
    Alignment wants submodules that make one tensor of one; GPT-2's have other arguments, too."""
    stages = {"blocks": "model.transformer.h.*", "blocks_per_stage": depth // 2, "periods_per_stage": max(1, epochs // 2)}
    return {
        "LayerFreezing": lambda: [LayerFreezing(**stages)],
        "LayerFreezing + DepthDropout": lambda: [LayerFreezing(**stages), DepthDropout(blocks="model.transformer.h.*", rate=0.5)],
        "ProgressiveGrowth": lambda: [ProgressiveGrowth(**stages)],
        "DepthDropout": lambda: [DepthDropout(blocks="model.transformer.h.*", rate=0.5)],
        "IntrinsicProjection": lambda: [IntrinsicProjection(dim=4096)],
    }


def main():
    options = arguments(
        __doc__, epochs=2, batch_size=8, width=128, depth=4, context=128, text=str(Path(__file__).parent.parent / "README.md")
    )
    data = torch.frombuffer(bytearray(Path(options.text).read_bytes()), dtype=torch.uint8).long()
    rows = data[: len(data) // options.context * options.context].view(-1, options.context)
    rows = rows if options.steps < 0 else rows[: options.steps * options.batch_size]
    loader = DataLoader(rows, options.batch_size, shuffle=True, drop_last=True)
    return compare(lambda: GPT2(options.width, options.depth, options.context), loader, ways(options.epochs, options.depth), options)


if __name__ == "__main__":
    main()
