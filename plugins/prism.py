"""PriSM: every client trains a principal sub-model, a random share of each layer's most important kernels (arXiv 2208.13141)."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping, Sequence
from functools import partial
from math import inf
from typing import Any

import torch
from torch import Tensor, nn

from featherlight.plugins import factors
from featherlight.plugins.base import Change, Clock, Message, Plugin, Visit
from featherlight.plugins.bypass import Bypass
from featherlight.plugins.factors import Factors
from featherlight.plugins.optimizer_state import OwnDecay
from featherlight.plugins.picks import Pick, draw_rows, place
from featherlight.plugins.present import held
from featherlight.plugins.principal import Layer, find_layers, shrink, warn_of_what_stays_whole
from featherlight.plugins.sampled_in_place import idle, make_whole, sample_in_place
from featherlight.plugins.sampled_layers import sampled_layers
from featherlight.plugins.seeds import generator
from featherlight.plugins.targets import find_targets, follow

GOLDEN = 0.6180339887498949
"""Multiples of the golden ratio's fraction fill [0, 1) evenly however many there are: so are keep ratios dealt out to clients."""


class PrismSampling(Plugin):
    """Train a model that no client holds whole. Layers are taken apart into principal kernels by an SVD; a client gets a share of them,
    drawn by importance p_i = σ_i^k / Σ_j σ_j^k, trains those, and the server puts together what comes back, entry by entry.

    It must come first among plugins. Weight decay acts on the product u·v, with the optimizer's own rate and in its own way: beside the
    step of AdamW; of others, and so of Adam, through the gradients. The model that is evaluated is the whole one, with ordinary weights.
    Batch norm's running statistics are averaged over the clients that held a channel, but they are those of sub-models: use group norm,
    or see to the statistics before evaluating (the plugin warns).

    Args:
        keep: κ, the share of every layer that a client holds, in (0, 1]; or shares of clients by κ, as in ``{0.2: 0.6, 0.4: 0.4}``.
        layers: what is taken apart: ``"auto"`` (convolutions of more than one tap but the stem; MLPs of transformers), or paths and
            patterns.
        attention: with ``"auto"``, take apart attention's linear layers, too.
        power: k: 2.5 for IID clients, 4 for others (the paper's).
        warmup_periods: rounds at the beginning in which every client gets the most important kernels (the paper: 50).
        rows: of each layer's outputs, too, a client computes the share κ, drawn anew each round, so that activations shrink: those of
            convolutions with a norm right behind them, and of MLPs' hidden units. Not of a layer whose norm is not known; and leave a
            classifier out of ``layers``, since what is not drawn is 0.
        principal_start: for random weights: as period 0 begins, kernels beyond the (smallest) κ are scaled by 0.1
            (:func:`featherlight.plugins.factors.concentrate`; ours), so that clients hold nearly all of the model's energy. Otherwise
            the whole model is, until training has made its spectra fall, mostly what its clients do not see.

    Raises:
        ValueError: a share or power out of its range; on attach, nothing to take apart, or another plugin came before.
    """

    keeps_norm = True

    def __init__(
        self,
        keep: float | dict[float, float] = 0.2,
        layers: str | Sequence[str] = "auto",
        attention: bool = False,
        power: float = 2.5,
        warmup_periods: int = 0,
        rows: bool = True,
        principal_start: bool = False,
    ) -> None:
        shares = keep if isinstance(keep, dict) else {keep: 1.0}
        given: dict[str, Sequence[Any]] = {"keep": [*shares, *shares.values()], "power": [power], "warmup_periods": [warmup_periods]}
        for name, values in given.items():
            if wrong := [value for value in values if type(value) not in (int, float)]:
                raise ValueError(f"{name}={wrong[0]!r}: give a plain number, as 0.2 or 1, not a {type(wrong[0]).__name__}")
        if not shares or not all(0 < ratio <= 1 for ratio in shares):
            raise ValueError(f"keep={keep}: give a share above 0 and up to 1, or {{share: part of the clients}}")
        if not all(part > 0 for part in shares.values()) or not abs(sum(shares.values()) - 1) <= 1e-6:
            raise ValueError(
                f"keep={keep}: the parts of the clients must be above 0 and add up to 1; they add up to {sum(shares.values()):g}"
            )
        if not 0 <= power < inf:
            raise ValueError(f"power={power}: give 0 (all kernels alike) or more")
        if not 0 <= warmup_periods < inf or warmup_periods != int(warmup_periods):
            raise ValueError(f"warmup_periods={warmup_periods}: give 0 or more, a whole number")
        self.keep = keep
        self.layers = layers
        self.attention = attention
        self.power = power
        self.warmup_periods = warmup_periods
        self.rows = rows
        self.principal_start = principal_start
        self._shares = dict(sorted(shares.items()))
        self._in_place = False
        self._forget()

    def _forget(self) -> None:
        """As if no model had been seen yet."""
        self._layers: dict[str, Layer] = {}
        self._modules: dict[float, nn.Module] = {}
        self._small: dict[str, Any] = {}
        self._factors: dict[str, Factors] = {}
        self._versions: dict[str, tuple[int, int]] = {}
        self._stale = True
        self._picked: tuple[Visit | None, dict[str, Pick]] = (None, {})
        self._figures: dict[str, float] = {}
        self._masked = True
        self._changed: list[nn.Module] = []
        self._resting: list[tuple[nn.Parameter, Tensor, Tensor]] = []

    def in_place(self) -> PrismSampling:
        """Work on one machine, where nobody narrows the model for a client: its own layers train in a share of themselves.

        Raises:
            ValueError: there are several keep ratios, and one client.
        """
        if len(self._shares) > 1:
            raise ValueError(f"keep={self.keep}: on one machine there is one client; give it one share")
        self._in_place = True
        return self

    @property
    def sends_parts(self) -> bool:
        return True

    @property
    def remakes(self) -> bool:
        return self._in_place

    def keep_of(self, client: int) -> float:
        """κ of ``client``: dealt out in the given parts, the same in every round."""
        place, reached = (client + 1) * GOLDEN % 1, 0.0
        for ratio, share in self._shares.items():
            reached += share
            if place < reached:
                return ratio
        return ratio

    # -- on the model being trained -------------------------------------------------------------------------------
    def attach(self, model: nn.Module) -> None:
        self._forget()
        self._model = model
        self._small = sampled_layers(model)
        if self._small and self._in_place:
            raise ValueError("PrismSampling stands twice among the plugins: leave one of them out")
        if self._small:  # a client's: what the server's instance made
            self._mark(self._small)
            return
        if any(isinstance(module, Bypass) for module in model.modules()):
            raise ValueError("PrismSampling takes layers apart, which others then freeze or leave out: put it first among the plugins")
        targets = find_targets(model)
        layers = find_layers(model, self.layers, self.attention, self.rows, targets)
        _warn_of_statistics(model)
        if self.layers == "auto":
            warn_of_what_stays_whole(model, layers, self.attention, min(self._shares))
        self._layers = {path: layer for path, layer in layers.items() if layer.leader == path}
        self._copies = {path: layer.leader for path, layer in layers.items() if layer.leader != path}
        self._all = list(layers)
        if self._in_place:
            self._changed = sample_in_place(model, layers, next(iter(self._shares)))
            self._mark(sampled_layers(model))
        else:
            self._modules = {ratio: shrink(model, layers, ratio) for ratio in self._shares}

    def advance(self, clock: Clock) -> Change:
        if self.principal_start and clock == Clock(0, 0) and not self._small:
            self._concentrate()
        if self._in_place:
            new = [layer for layer in sampled_layers(self._model).values() if clock.step == 0 or int(layer.drawn_in) < 0]
            return Change(renewed=tuple(p for layer in new for p in (layer.u, layer.v)))
        self._stale = self._stale or clock.step == 0
        return Change()

    def visit(self, visit: Visit) -> None:
        if self._in_place:
            self._draw_in_place(visit)

    def before_forward(self, clock: Clock) -> None:
        self._sample(True)

    def after_update(self, clock: Clock) -> None:
        with torch.no_grad():
            for parameter, rows, values in self._resting:  # momentum and decay move what has no gradient, too
                parameter[rows] = values

    def after_step(self, clock: Clock) -> None:
        self._sample(False)

    def detach(self) -> None:
        for module in self._changed:
            make_whole(module)
        self._forget()

    # -- federated ------------------------------------------------------------------------------------------------
    def agree(self) -> Sequence[Tensor]:
        """The round's factors, since signs and bases of equal σ are the machine's choice, and the weights that they are of."""
        self._factorise()
        weights = [held(self._model)[f"{path}.weight"].detach() for path in self._factors]
        return weights + [part for layer in self._factors.values() for part in layer]

    def narrow(self, visit: Visit) -> nn.Module:
        return self._modules[self.keep_of(visit.client)]

    def encode_down(self, message: Message, visit: Visit, kept: Collection[str] = ()) -> Message:
        message = dict(message)
        for path, pick in self._picks(visit).items():
            layer, (u, v, _) = self._layers[path], self._factors[path]
            weight = message.pop(f"{path}.weight")
            v = v[pick.kernels]
            message[f"{path}.v"] = v.view(len(v), *weight.shape[1:])
            message[f"{path}.u"] = (u if pick.rows is None else u[pick.rows])[:, pick.kernels]
            for name in self._per_row(layer, path, message):
                message[name] = message[name] if pick.rows is None else message[name][pick.rows]
        return message

    def decode_down(self, message: Message, visit: Visit) -> Message:
        for layer in self._small.values():
            if layer.rows is not None:
                layer.rows.copy_(draw_rows(visit, layer.rows_as, layer.whole, len(layer.rows)))
        return message

    def decode(self, message: Message, visit: Visit) -> Mapping[str, Any]:
        entries: dict[str, Any] = dict(message)
        for path, pick in self._picks(visit).items():
            layer, u, v = self._layers[path], f"{path}.u", f"{path}.v"
            self._check(path, pick, message)
            if u in message or v in message:
                entries[u] = place(message[u], (layer.outputs, layer.rank), pick.rows, pick.kernels)
                entries[v] = place(message[v], (layer.rank, *message[v].shape[1:]), pick.kernels)
            if pick.rows is not None:
                for name in self._per_row(layer, path, message):
                    entries[name] = place(message[name], (layer.outputs,), pick.rows)
        return entries

    def summed(self, over: int, counted: int) -> None:
        self._masked = False  # such a sum does not say who held what

    def lift(self, total: Mapping[str, Any], clock: Clock) -> Mapping[str, Any]:
        """ΔW = (u + Δu)·(v + Δv) − u·v, Δ the means over those who held an entry."""
        total, covered = dict(total), []
        for path, (u, v, _) in self._factors.items():
            if f"{path}.u" not in total:
                if self._model.get_submodule(path).weight.requires_grad:  # else it is frozen
                    covered.append(0.0)
                continue
            change_u, change_v = total.pop(f"{path}.u"), total.pop(f"{path}.v")
            if isinstance(change_v, tuple):
                change_v, mask = change_v
                covered.append(float(mask.flatten(1).any(1).double().mean()))
            else:
                covered.append(1.0)
            change_u = change_u[0] if isinstance(change_u, tuple) else change_u
            shape = change_v.shape[1:]
            change_v = change_v.flatten(1)
            change = change_u @ (v.double() + change_v) + u.double() @ change_v
            total[f"{path}.weight"] = change.view(len(u), *shape)
        self._figures = {"kernel_coverage": sum(covered) / len(covered)} if covered and self._masked else {}
        return total

    def figures(self) -> dict[str, float]:
        """``kernel_coverage``: the share of principal kernels that somebody held in the round just ended, mean over layers. Not where
        clients count alike, whatever they held (:attr:`alike`)."""
        return self._figures

    # -- helpers --------------------------------------------------------------------------------------------------
    def _concentrate(self) -> None:
        with torch.no_grad():
            for path in self._all:
                weight: Tensor = self._model.get_submodule(path).weight  # type: ignore[assignment]
                weight.copy_(factors.concentrate(weight, min(self._shares), name=path))

    def _mark(self, layers: Mapping[str, Any]) -> None:
        for layer in layers.values():
            layer.u._own_decay = layer.v._own_decay = OwnDecay(partial(_decay_of_product, layer))

    def _sample(self, on: bool) -> None:
        for module in self._changed:
            module.sampling = on  # type: ignore[assignment]

    def _draw_in_place(self, visit: Visit) -> None:
        """A new share of every layer, unless a run that is resumed goes on with the one it had."""
        drawn = False
        for path, layer in self._layers.items():
            module: Any = self._model.get_submodule(path)
            if int(module.drawn_in) == visit.round:
                continue
            drawn = True
            weight = module.whole_weight().detach()
            self._factors[path] = factors.factorise(weight, path)
            pick = self._pick(path, layer, self.keep_of(0), visit)
            rows = module.rows.new_tensor(range(layer.outputs)) if pick.rows is None else pick.rows
            module.begin(self._factors.pop(path), pick.kernels, rows, visit.round)
        if drawn:
            follow(self._model, self._copies)
        self._resting = []
        for module in self._changed:
            self._resting += [(parameter, rows, parameter.detach()[rows]) for parameter, rows in idle(module)]

    def _factorise(self) -> None:
        """Take the server's weights apart, once a round and when asked: plugins behind this one say in `advance` what is there."""
        present = held(self._model)
        weights = {path: present[f"{path}.weight"] for path in self._layers if f"{path}.weight" in present}
        versions = {path: (id(weight), weight._version) for path, weight in weights.items()}
        if versions != self._versions:  # in a prediction nothing ever changes
            self._factors = factors.factorise_all(weights)
            self._versions = versions
        self._picked, self._stale = (None, {}), False

    def _picks(self, visit: Visit) -> dict[str, Pick]:
        """What ``visit``'s client holds of each layer that is there: a function of the visit and the server's weights."""
        if self._stale:
            self._factorise()
        if self._picked[0] != visit:
            keep = self.keep_of(visit.client)
            self._picked = visit, {path: self._pick(path, self._layers[path], keep, visit) for path in self._factors}
        return self._picked[1]

    def _pick(self, path: str, layer: Layer, keep: float, visit: Visit) -> Pick:
        size, odds = layer.kernels_at(keep), factors.importance(self._factors[path].values, self.power)
        if visit.round < self.warmup_periods:
            kernels = torch.arange(size)
        else:
            kernels = factors.draw(odds.cpu(), size, generator(visit.seed, visit.round, visit.client, "kernels", path))
        rows = draw_rows(visit, layer.rows_as, layer.outputs, layer.rows_at(keep)) if layer.samples_rows else None
        device = odds.device
        return Pick(kernels.to(device), None if rows is None else rows.to(device))

    def _check(self, path: str, pick: Pick, message: Mapping[str, Any]) -> None:
        rows = self._layers[path].outputs if pick.rows is None else len(pick.rows)
        whole: Any = self._model.get_submodule(path)
        of_factors = {f"{path}.u": (rows, len(pick.kernels)), f"{path}.v": (len(pick.kernels), *whole.weight.shape[1:])}
        shapes: dict[str, tuple[int, ...]] = of_factors if of_factors.keys() & message.keys() else {}
        for name, shape in {**shapes, **dict.fromkeys(self._per_row(self._layers[path], path, message), (rows,))}.items():
            given = tuple(message[name].shape) if name in message else "nothing"
            if given != shape:
                raise ValueError(f"{name}: the client holds a part of shape {shape}, and sent {given}")

    def _per_row(self, layer: Layer, path: str, message: Mapping[str, Any]) -> list[str]:
        """Entries that have one figure for each of the layer's rows."""
        norm = [f"{layer.norm}.{name}" for name in ("weight", "bias", "running_mean", "running_var")] if layer.norm else []
        return [name for name in (f"{path}.bias", *norm) if name in message]


def _warn_of_statistics(model: nn.Module) -> None:
    norms = [
        path
        for path, module in model.named_modules()
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d) and module.running_mean is not None
    ]
    if norms:
        warnings.warn(
            f"batch norm's running statistics ({norms[0]}, {len(norms)} in all) are gathered by sub-models and do not fit the whole model "
            'that is evaluated: use group norm where a backbone offers it (norm="group" in those of ssl_models), or gather them anew, as '
            "torch.optim.swa_utils.update_bn(loader, model) does, before you evaluate what depends on them",
            stacklevel=3,
        )


def _decay_of_product(layer: Any) -> list[tuple[nn.Parameter, Tensor]]:
    of_u, of_v = factors.decay(layer.u.detach(), layer.v.detach().flatten(1), 1.0)
    return [(layer.u, of_u), (layer.v, of_v.view_as(layer.v))]
