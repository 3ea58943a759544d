"""The processes that share a federation's clients: Fabric starts them, this adds up and passes on between them.

Each process trains its clients alone: the model is set up on its own device and never wrapped for data parallelism, since clients of
different sizes take different numbers of steps, and gradients of different clients must not be averaged.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lightning.fabric import Fabric
from lightning.fabric.strategies import SingleDeviceStrategy
from torch import Tensor

from featherlight.fed_loop.wire import pack, unpack
from featherlight.plugins.base import Message


class Processes:
    """One or several processes on one or several hosts.

    Args:
        accelerator, devices, num_nodes, precision: as for ``lightning.Fabric``; ``devices`` is the number of processes.
        threads: CPU threads of each process. Matrix products split over more threads round differently, so it must not depend on
            how many processes there are.
    """

    def __init__(
        self, accelerator: str = "auto", devices: int | str = 1, num_nodes: int = 1, precision: str | int | None = None, threads: int = 1
    ) -> None:
        several = devices not in (1, "1") or num_nodes > 1
        self._several = several
        own: Any = {"strategy": "ddp"} if several else {"precision": precision}
        self._outer = Fabric(accelerator=accelerator, devices=devices, num_nodes=num_nodes, **own)
        self._precision = precision
        self._threads = threads

    def launch(self) -> None:
        """Start the other processes, unless something (torchrun) has."""
        self._outer.launch()
        self._threads_before = torch.get_num_threads()
        torch.set_num_threads(self._threads)
        device = self._outer.device
        self.fabric = self._outer
        if not self._several:
            return
        self.fabric = Fabric(
            accelerator=device.type,
            devices=1,
            strategy=SingleDeviceStrategy(device=device),
            precision=self._precision,  # type: ignore[arg-type]
        )

    def close(self) -> None:
        """Give the process back its threads."""
        torch.set_num_threads(self._threads_before)

    @property
    def rank(self) -> int:
        return self._outer.global_rank

    @property
    def size(self) -> int:
        return self._outer.world_size

    def all_reduce(self, value: Tensor) -> Tensor:
        """The sum over processes."""
        return value if self.size == 1 else self._outer.all_reduce(value, reduce_op="sum")  # type: ignore[return-value]

    @contextmanager
    def together(self) -> Iterator[None]:
        """What all processes do or none: where one fails, the first raises and so tells of it, once; the others leave without a word.

        Raises:
            ValueError: in the first process, where only another failed; else what went wrong in the first itself.
            SystemExit: in the others.
        """
        failed: Exception | None = None
        try:
            yield
        except Exception as error:
            failed = error
        told = self.gather("" if failed is None else str(failed) or type(failed).__name__)
        if not any(told):
            return
        if self.rank:
            raise SystemExit(0) from failed  # a code of its own would have the launcher kill the first, which gives the run's
        if failed is not None:
            raise failed
        raise ValueError(next(f"process {rank}: {text}" for rank, text in enumerate(told) if text))

    def from_first(self, values: Iterable[Tensor]) -> None:
        """Make ``values`` the first process's, in place, bit for bit."""
        if self.size > 1:
            for value in values:
                torch.distributed.broadcast(value, src=0)

    def share(self, message: Message) -> Message:
        """Everybody's entries as one message, bit for bit; names must differ."""
        if self.size == 1:
            return message
        payload = pack(message)
        shared: Message = {}
        for rank, length in enumerate(self.gather(len(payload))):
            data = bytearray(payload if rank == self.rank else length)
            values = torch.frombuffer(data, dtype=torch.uint8).to(self._outer.device)
            torch.distributed.broadcast(values, src=rank)
            shared |= unpack(values.cpu().numpy().tobytes(), limit=length)
        return shared

    def gather(self, item: Any) -> list[Any]:
        """Everybody's ``item`` (plain data), in the order of ranks: as JSON, since nothing here is ever unpickled."""
        if self.size == 1:
            return [item]
        text = torch.frombuffer(bytearray(json.dumps(item).encode()), dtype=torch.uint8)
        lengths = self._outer.all_gather(torch.tensor([text.numel()])).flatten().tolist()  # type: ignore[union-attr]
        padded = torch.zeros(max(lengths), dtype=torch.uint8)
        padded[: text.numel()] = text
        rows = self._outer.all_gather(padded)
        return [json.loads(bytes(row[:length].cpu().tolist())) for row, length in zip(rows, lengths)]  # type: ignore[arg-type]
