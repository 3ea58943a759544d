"""FedEMA: a client starts from a mean of the server's model and its own last one, the more of its own the further the two are apart."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from featherlight.plugins.base import Message, Plugin, Visit
from featherlight.plugins.present import trained
from featherlight.plugins.received import check_strength
from featherlight.plugins.seeds import derive
from featherlight.plugins.targets import find_targets, follow

SCALE, MEASURED, ROUND, LOCAL, TARGET = "scale", "measured", "round", "local.", "target."


class FedEMA(Plugin):
    """At the start of a turn what trains of the client's model becomes

        w ← μ · w_local + (1 − μ) · w_received,    μ = min(λ · ‖w_received − w_local‖, 1),

    w_local as the client's last turn left it (FedEMA, arXiv 2204.04385; made for BYOL, here for any model). In its first turn a client
    starts from what it received; as its second begins, λ = τ / ‖w_received − w_local‖ is set, so that μ is then τ. λ holds as long as
    the norm is of the same parameters, and is set anew where it is of others: a stage has begun, or what is new in it has been trained
    once (ours: the paper, which trains the same in all rounds, sets λ once).

    A client remembers, between its turns, the parameters that it trained; they never travel. What it did not have in its last turn, or does
    not train any more, is as received. Momentum copies are made from the mixed model (ours: as all turns begin here), or go on as the
    client's last turn left them (``keep_targets``, the authors').

    For federations only; needs clients that train the same parameters. Methods that compare with the received model see it before it is
    mixed, wherever in the list they stand.

    Args:
        tau: τ in [0, 1] (0.7 in the paper); 0 is as without the method.
        scale: λ, in place of setting it by ``tau``.
        of: path, or paths, of the submodules whose parameters count in the norm (the encoder's, in the paper); by default all that train.
        consecutive: mix only where the client took part in the round before, too; it starts from what it received otherwise (what the
            authors' code does where clients are drawn at random).
        keep_targets: clients remember their momentum copies, too.

    Raises:
        ValueError: an argument out of its range; on attach, no such submodule.
    """

    same_for_all = True
    starts_elsewhere = True

    def __init__(
        self,
        tau: float = 0.7,
        scale: float | None = None,
        of: str | Sequence[str] | None = None,
        consecutive: bool = False,
        keep_targets: bool = False,
    ) -> None:
        if not 0 <= tau <= 1:
            raise ValueError(f"tau={tau}: give a share of the client's own model, from 0 to 1")
        if scale is not None:
            check_strength("scale", scale)
        self.tau = tau
        self.scale = scale
        self.of = of
        self.consecutive = consecutive
        self.keep_targets = keep_targets

    def attach(self, model: nn.Module) -> None:
        self._model, self._targets = model, find_targets(model)
        self._measured = ("",) if self.of is None else (self.of,) if isinstance(self.of, str) else tuple(self.of)
        parameters = [name for name, _ in model.named_parameters()]
        for path in self._measured:
            if not any(name.startswith(_below(path)) for name in parameters):
                names = ", ".join(name for name, _ in model.named_children())
                raise ValueError(f'of="{path}" has no parameters; this {type(model).__name__} has {names}')
        self._memory: Message = {}
        self._scale: Tensor | None = None
        self._of: Tensor | None = None

    def recall(self, memory: Message, visit: Visit) -> None:
        self._memory = memory

    def receive(self, visit: Visit) -> None:
        memory, self._memory = self._memory, {}
        own = {name: value for name, value in self._own().items() if LOCAL + name in memory}
        self._scale, self._of = memory.get(SCALE), memory.get(MEASURED)
        if not own:
            return
        with torch.no_grad():
            mu = self._share(own, memory)
            if self.consecutive:
                mu = torch.where(memory[ROUND] == visit.round - 1, mu, 0.0)
            for name, value in own.items():
                value.lerp_(memory[LOCAL + name], mu.to(value.dtype))
        follow(self._model, self._targets)
        if self.keep_targets:
            with torch.no_grad():
                for name, value in self._copies(own).items():
                    if TARGET + name in memory:
                        value.copy_(torch.where(mu > 0, memory[TARGET + name], value))

    def remember(self, visit: Visit) -> Message:
        if not self._mixes():
            return {}
        own = self._own()
        kept = {LOCAL + name: value.detach() for name, value in own.items()}
        if self.keep_targets:
            kept |= {TARGET + name: value.detach() for name, value in self._copies(own).items()}
        if self._scale is not None:
            kept[SCALE] = self._scale
        if self._of is not None:
            kept[MEASURED] = self._of
        return {**kept, ROUND: torch.tensor(visit.round)}

    # -- helpers --------------------------------------------------------------------------------------------------
    def _mixes(self) -> bool:
        return self.tau > 0 if self.scale is None else self.scale > 0

    def _own(self) -> dict[str, nn.Parameter]:
        """What trains now."""
        return {name: value for name, value in trained(self._model, tuple(self._targets)).items() if isinstance(value, nn.Parameter)}

    def _share(self, own: dict[str, nn.Parameter], memory: Message) -> Tensor:
        """μ, and λ for the client's later turns; as tensors, so that it can be told without data what the method costs."""
        counted = [name for name in own if name.startswith(tuple(map(_below, self._measured)))]
        if not counted:
            return next(iter(own.values())).new_zeros((), dtype=torch.float32)
        apart = torch.stack([(own[name] - memory[LOCAL + name]).float().norm() for name in counted]).norm()
        if self.scale is not None:
            return (self.scale * apart).clamp(max=1.0)
        first = torch.where(apart > 0, self.tau / apart, 0.0)  # 0 where nothing is apart: it is set in a later turn
        of = derive(*counted)
        if self._scale is not None and self._of is not None:
            first = torch.where((self._scale > 0) & (self._of == of), self._scale, first)
        self._scale, self._of = first, torch.tensor(of)
        return (self._scale * apart).clamp(max=1.0)

    def _copies(self, own: dict[str, nn.Parameter]) -> dict[str, nn.Parameter]:
        """Momentum copies of what trains, by their own names; of what is frozen they are what it is."""
        found = {}
        for target, online in self._targets.items():
            for name in own:
                if name.startswith(f"{online}."):
                    found[target + name[len(online) :]] = self._model.get_parameter(target + name[len(online) :])
        return found


def _below(path: str) -> str:
    return f"{path}." if path else ""
