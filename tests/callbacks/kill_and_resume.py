"""Train; train again, killed at a random moment; resume that from ``last.ckpt``. Arguments: folder, seed."""

import importlib.util
import multiprocessing
import os
import random
import signal
import sys
import time
from pathlib import Path

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader, TensorDataset


def load(name):
    spec = importlib.util.spec_from_file_location(name, Path(__file__).parent / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def train(folder, said=None):
    toys, resume = load("conftest"), load("test_resume")

    class Say(pl.Callback):
        def on_train_batch_start(self, *_):
            if said:
                said.send("batch")
            time.sleep(0.02)

    last = folder / "last.ckpt"
    saving = ModelCheckpoint(folder, save_last=True, every_n_train_steps=2, save_top_k=1)
    silent = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    plugins = resume.METHODS["two epochs a stage"]()
    trainer = pl.Trainer(accelerator="cpu", max_epochs=6, callbacks=[*plugins, saving, Say()], **silent)
    model, loader = toys.Byol(), toys.Positioned(DataLoader(TensorDataset(*toys.tensors()), 4))
    trainer.fit(model, loader, ckpt_path=last if last.exists() else None)
    torch.save(model.state_dict(), folder / "done.pt")


def run(folder, kill_after=None):
    fork = multiprocessing.get_context("fork")
    hear, say = fork.Pipe(duplex=False)
    process = fork.Process(target=train, args=(folder, say))
    process.start()
    say.close()  # that it has ended is heard
    if kill_after is not None:
        for _ in range(int(kill_after)):
            hear.recv()
        time.sleep(0.05 * (kill_after % 1))
        os.kill(process.pid, signal.SIGKILL)
    process.join()


if __name__ == "__main__":
    folder, moment = Path(sys.argv[1]), random.Random(sys.argv[2]).uniform(1, 17)
    for name in ("whole", "killed"):
        (folder / name).mkdir()
    run(folder / "whole")
    run(folder / "killed", moment)
    if (folder / "killed" / "done.pt").exists():
        sys.exit(f"not killed after {moment:.2f} of 18 batches")
    run(folder / "killed")
