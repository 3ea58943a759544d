"""How LW-FedSSL's table 2 (arXiv 2401.11647, version 4) counts FLOPs and traffic, which is not how ``featherlight cost`` does.

It is here so that the paper's own figures can be held against our methods; what our runs report is what was really computed and sent.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from featherlight.commands.parsing import Parts, federated_parser, parse
from featherlight.plugins import Chain, Clock, Visit, find_targets, held, trained

BATCH = 512
GB = 1024**2 * 1000
"""The paper's "GB" is MiB / 1000."""


class Rule:
    """What the paper counts, read off the model at each stage: blocks that run and that train, and entries that travel.

    Args:
        path: a federated configuration whose model is a vision transformer.
        arguments: options that override it, as on the command line.
    """

    def __init__(self, path: str, arguments: Sequence[str] = ()) -> None:
        parser = federated_parser()
        parts = Parts(parser, parse(parser, ["-c", path, *arguments]))
        with torch.device("meta"):
            self.module = parts.module()
        self.targets = find_targets(self.module)
        self.chain = Chain(parts.plugins())
        self.chain.attach(self.module)
        self.rounds = parts.federation().rounds
        self.is_simclr = type(self.module).__name__ == "SimCLR"

    def totals(self, resend: bool = False, only: str = "") -> tuple[float, float]:
        """GFLOPs of one batch, averaged over rounds; traffic of a client over the run, both ways, in the paper's GB.

        Args:
            resend: every client is sent all blocks it holds in every round, rather than only those that have changed: the worst case.
                Where the server trains all blocks (calibration, versions 1 to 3) it is so in any case.
            only: count what has names that begin so: "backbone." for the abstract's 3.2 and 1.8 times (24 / 7.5 and 24 / 13 blocks).
        """
        flops = bytes_ = 0.0
        block_macs = self._block_macs()
        for round in range(self.rounds):
            self.module.train()
            self.chain.advance(Clock(round, 0))
            self.chain.visit(Visit(round, 0, 0))
            present, sent = held(self.module), trained(self.module, tuple(self.targets))
            run = {name.split(".")[2] for name in present if name.startswith("backbone.blocks.")}
            train = {name.split(".")[2] for name in sent if name.startswith("backbone.blocks.")}
            flops += block_macs * (len(run) + 2 * len(train)) * (2 if self.is_simclr else 1) / 1e9
            resent = resend or self.chain.calibration(Clock(round, 0)) is not None
            up = sum(self._counted(name, value) for name, value in sent.items() if name.startswith(only))
            online = {name: value for name, value in present.items() if not name.startswith(tuple(f"{path}." for path in self.targets))}
            down = sum(self._counted(name, value) for name, value in online.items() if name.startswith(only)) if resent else up
            bytes_ += 4 * (up + down)
        return flops / self.rounds, bytes_ / GB

    @staticmethod
    def _counted(name: str, value: torch.Tensor) -> int:
        """The paper counts weights only in the heads, all parameters in the encoder."""
        if not isinstance(value, nn.Parameter):
            return 0
        return value.numel() if name.startswith("backbone.") or value.ndim > 1 else 0

    def _block_macs(self) -> float:
        """One block, one batch, forward: a multiply-add is 1 in linear layers, 2 in attention's products."""
        block = self.module.get_submodule("backbone.blocks.0")
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            block(torch.empty(BATCH, 65, 192, device="meta"))
        by_kind = counter.get_flop_counts()["Global"]
        attention = sum(count for kind, count in by_kind.items() if "attention" in str(kind) or "bmm" in str(kind))
        return (sum(by_kind.values()) - attention) / 2 + attention
