"""Several plugins as one, so that a host holds exactly one."""

from __future__ import annotations

import copy
from bisect import bisect_left
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from featherlight.plugins.base import IN_TURN, Change, Clock, Message, Plugin, Visit, overrides
from featherlight.plugins.calibration import Calibration
from featherlight.plugins.mechanism import Mechanism
from featherlight.plugins.partition import Partition

_FAR = 2**31  # a period that no run reaches: its stage is the last


class Chain(Plugin):
    """Plugins in the order given; the first to encode is the last to decode.

    Raises:
        TypeError: something among them is not a Plugin.
    """

    def __init__(self, plugins: Iterable[Plugin] = ()) -> None:
        self.plugins = tuple(plugins)
        for plugin in self.plugins:
            if not isinstance(plugin, Plugin):
                raise TypeError(f"{plugin!r} is not a featherlight Plugin; a method is a subclass of featherlight.plugins.Plugin")

    @property
    def decodes(self) -> bool:
        """Whether any plugin rebuilds entries on arrival, so that an entry may carry a weight for each of its elements."""
        return any(overrides(plugin, "decode") for plugin in self.plugins)

    @property
    def by_differences(self) -> bool:
        """Whether differences must travel up, since a plugin changes them there or on arrival; where none does, new values travel."""
        return any(overrides(plugin, verb) for plugin in self.plugins for verb in ("encode", "lift"))

    @property
    def sees_gradients(self) -> bool:
        """Whether any plugin does something between the backward pass and the step."""
        return any(overrides(plugin, "after_backward") for plugin in self.plugins)

    @property
    def advances(self) -> bool:
        """Whether any plugin does something where a period begins, to weights, too, perhaps."""
        return any(overrides(plugin, "advance") for plugin in self.plugins)

    @property
    def visits(self) -> bool:
        """Whether any plugin makes one client's turn differ from another's in the same period."""
        return any(overrides(plugin, "visit") for plugin in self.plugins)

    @property
    def settles(self) -> bool:
        """Whether any plugin does something to the server's model at a round's end."""
        return any(overrides(plugin, "settle") for plugin in self.plugins)

    @property
    def encodes_down(self) -> bool:
        """Whether any plugin changes what goes to a client."""
        return any(overrides(plugin, "encode_down") for plugin in self.plugins)

    @property
    def rebuilds(self) -> bool:
        """Whether a client in a process of its own must keep the model that it received."""
        return any(overrides(plugin, "rebuild") for plugin in self.plugins)

    @property
    def remembers(self) -> bool:
        """Whether a client keeps anything from one turn to the next."""
        return any(overrides(plugin, "remember") for plugin in self.plugins)

    @property
    def counts_alike(self) -> bool:
        """Whether each client of a round counts alike, and their sum is divided by a number that does not depend on who came."""
        return any(plugin.alike for plugin in self.plugins)

    def why_alone(self) -> str:
        """Why a host must train one client after the other, or nothing."""
        for plugin in self.plugins:
            verbs = [verb for verb in IN_TURN if overrides(plugin, verb)]
            if plugin.at_once is False or (plugin.at_once is None and verbs):
                return f"{type(plugin).__name__} has a hand in each client's turn" + (f" ({', '.join(verbs)})" if verbs else "")
        return ""

    def anew(self) -> Chain:
        """The same plugins, not attached to anything. To be asked for before :meth:`attach`."""
        return copy.deepcopy(self)

    def attach(self, model: nn.Module) -> None:
        remaking = [type(plugin).__name__ for plugin in self.plugins if plugin.remakes]
        needing = [type(plugin).__name__ for plugin in self.plugins if plugin.same_for_all]
        if remaking and needing:
            raise ValueError(
                f"{', '.join(needing)} needs the same parameters in every period, and {', '.join(remaking)} trains others in each: "
                "leave one out"
            )
        for number, plugin in enumerate(self.plugins):
            if plugin.bounds and (later := [type(other).__name__ for other in self.plugins[number + 1 :] if other.renames]):
                name = type(plugin).__name__
                raise ValueError(
                    f"{later[0]} makes other numbers of what {name} bounds, and the server could not tell whether a client kept to it: put "
                    f"{name} behind {later[0]}"
                )
        self._check_noise()
        self._model = model
        for number, plugin in enumerate(self.plugins):
            try:
                plugin.attach(model)
            except BaseException:
                Chain(self.plugins[:number]).detach()  # a chain that cannot be attached leaves the model as it was
                raise

    def _check_noise(self) -> None:
        """Noise is for what one client adds, bounded, to a sum.

        Raises:
            ValueError: something would make that longer, or add to the sum before there is noise in it.
        """
        places = [place for place, plugin in enumerate(self.plugins) if plugin.mechanism() is not None]
        if not places:
            return
        name = type(self.plugins[places[0]]).__name__
        if len(places) > 1:
            raise ValueError(f"{name} and {type(self.plugins[places[1]]).__name__} each add noise to a round's sum: leave one of them out")
        mechanism = self.plugins[places[0]].mechanism()
        parts = [type(plugin).__name__ for plugin in self.plugins if plugin.sends_parts]
        if mechanism is not None and mechanism.shares and parts:
            raise ValueError(
                f"with {parts[0]} clients of a round send different parts, and the noise of shares={mechanism.shares} would not be on what "
                f"others left out: have the server add it ({name} without shares), or leave {parts[0]} out"
            )
        for plugin in self.plugins[: places[0]]:
            if overrides(plugin, "decode") and not plugin.keeps_norm:
                raise ValueError(f"{type(plugin).__name__} sends codes, and {name} bounds the length of numbers: put {name} in front of it")
        for plugin in self.plugins[places[0] + 1 :]:
            if overrides(plugin, "lift"):
                raise ValueError(f"{type(plugin).__name__} takes a round's sum before {name} has added noise to it: put {name} behind it")

    def advance(self, clock: Clock) -> Change:
        changes = [plugin.advance(clock) for plugin in self.plugins]
        return Change(*(tuple(parameter for change in changes for parameter in change[kind]) for kind in range(3)))

    def stage(self, period: int) -> int:
        return sum(plugin.stage(period) for plugin in self.plugins)

    def last_stage(self) -> tuple[int, int]:
        """The stage that training ends in where it goes on for long enough, and the period with which it begins."""
        last = self.stage(_FAR)
        return last, bisect_left(range(_FAR), last, key=self.stage)

    def check(self, periods: int, now: int = 0) -> None:
        """Have plugins look at each stage of so many periods before they come. The model is then in that of period ``now``, but for what
        trains and which modules evaluate, which are as they were: the next :meth:`advance` tells of every change.

        Raises:
            ValueError: one of them cannot work on what trains then.
        """
        if not any(overrides(plugin, "check") for plugin in self.plugins):
            return
        trains = [(parameter, parameter.requires_grad) for parameter in self._model.parameters()]
        modes = [(module, module.training) for module in self._model.modules()]
        for stage in range(self.stage(now), self.stage(periods - 1) + 1):
            begins = bisect_left(range(periods), stage, key=self.stage)
            self.advance(Clock(begins, 1))
            for plugin in self.plugins:
                plugin.check(self.stage(begins))
        self.advance(Clock(now, 1))
        for parameter, on in trains:
            parameter.requires_grad_(on)
        for module, on in modes:
            module.training = on

    def visit(self, visit: Visit) -> None:
        for plugin in self.plugins:
            plugin.visit(visit)

    def receive(self, visit: Visit) -> None:
        for plugin in sorted(self.plugins, key=lambda plugin: plugin.starts_elsewhere):  # in order, the moving ones last
            plugin.receive(visit)

    def copies(self) -> Sequence[Tensor]:
        return [tensor for plugin in self.plugins for tensor in plugin.copies()]

    def before_forward(self, clock: Clock) -> None:
        for plugin in self.plugins:
            plugin.before_forward(clock)

    def extra_loss(self, model: nn.Module, batch: Any) -> Tensor | None:
        terms = [term for plugin in self.plugins if (term := plugin.extra_loss(model, batch)) is not None]
        return sum(terms[1:], terms[0]) if terms else None

    def after_backward(self, clock: Clock) -> None:
        for plugin in self.plugins:
            plugin.after_backward(clock)

    def after_update(self, clock: Clock) -> None:
        for plugin in reversed(self.plugins):
            plugin.after_update(clock)

    def after_step(self, clock: Clock) -> None:
        for plugin in reversed(self.plugins):
            plugin.after_step(clock)

    def detach(self) -> None:
        for plugin in reversed(self.plugins):
            plugin.detach()

    def start(self) -> None:
        for plugin in self.plugins:
            plugin.start()

    def agree(self) -> Sequence[Tensor]:
        return [tensor for plugin in self.plugins for tensor in plugin.agree()]

    def narrow(self, visit: Visit) -> nn.Module | None:
        modules = [module for plugin in self.plugins if (module := plugin.narrow(visit)) is not None]
        if len(modules) > 1:
            narrowing = ", ".join(type(plugin).__name__ for plugin in self.plugins if overrides(plugin, "narrow"))
            raise ValueError(f"{narrowing} each make a smaller module for a client, which can have one: choose one of them")
        needing = ", ".join(type(plugin).__name__ for plugin in self.plugins if plugin.same_for_all)
        if modules and needing:
            narrowing = ", ".join(type(plugin).__name__ for plugin in self.plugins if overrides(plugin, "narrow"))
            raise ValueError(
                f"{needing} needs clients that train the same parameters, and {narrowing} gives them smaller modules: leave one out"
            )
        if modules and (early := self._coding_before_narrowing()):
            raise ValueError(
                f"{early[0]} changes what travels, and stands before {early[1]}, which takes layers apart: put {early[1]} first"
            )
        return modules[0] if modules else None

    def _coding_before_narrowing(self) -> tuple[str, str] | None:
        """A plugin that encodes, and the one behind it that makes smaller modules: it could not read its own entries on arrival."""
        coding = None
        for plugin in self.plugins:
            if overrides(plugin, "narrow"):
                return (coding, type(plugin).__name__) if coding else None
            if any(overrides(plugin, verb) for verb in ("encode", "decode", "encode_down", "decode_down")):
                coding = coding or type(plugin).__name__
        return None

    def partition(self, clock: Clock) -> Partition | None:
        for plugin in self.plugins:
            if (partition := plugin.partition(clock)) is not None:
                self._check_beside(plugin)
                return partition
        return None

    def _check_beside(self, dividing: Plugin) -> None:
        """Where the model is divided, nobody else may change what of it there is, or what travels.

        Raises:
            ValueError: somebody would.
        """
        of_model = ("advance", "visit", "receive", "before_forward", "narrow", "partition")
        verbs = (*of_model, "encode_down", "decode_down", "encode", "decode", "lift")
        for plugin in self.plugins:
            if plugin is not dividing and (changed := [verb for verb in verbs if overrides(plugin, verb)]):
                raise ValueError(
                    f"{type(dividing).__name__} divides the model between device and server; {type(plugin).__name__} changes the model "
                    f"or what travels ({', '.join(changed)}): leave one of them out"
                )

    def recall(self, memory: Message, visit: Visit) -> None:
        for place, plugin in enumerate(self.plugins):
            mark = f"{place}:"
            plugin.recall({name.removeprefix(mark): value for name, value in memory.items() if name.startswith(mark)}, visit)

    def remember(self, visit: Visit) -> Message:
        return {f"{place}:{name}": value for place, plugin in enumerate(self.plugins) for name, value in plugin.remember(visit).items()}

    def encode_down(self, message: Message, visit: Visit, kept: Collection[str] = ()) -> Message:
        for plugin in self.plugins:
            message = plugin.encode_down(message, visit, kept)
        return message

    def decode_down(self, message: Message, visit: Visit) -> Message:
        for plugin in reversed(self.plugins):
            message = plugin.decode_down(message, visit)
        return message

    def rebuild(self, message: Message, before: Message, visit: Visit) -> Message:
        for plugin in reversed(self.plugins):
            message = plugin.rebuild(message, before, visit)
        return message

    def tell(self) -> dict[str, Any]:
        return {str(place): told for place, plugin in enumerate(self.plugins) if (told := plugin.tell())}

    def hear(self, news: dict[str, Any], visit: Visit) -> None:
        for place, own in news.items():
            self.plugins[int(place)].hear(own, visit)

    def encode(self, message: Message, visit: Visit) -> Message:
        for plugin in self.plugins:
            message = plugin.encode(message, visit)
        return message

    def decode(self, message: Message, visit: Visit) -> Mapping[str, Any]:
        decoded: Mapping[str, Any] = message
        for plugin in reversed(self.plugins):
            decoded = plugin.decode(dict(decoded), visit)
        return decoded

    def mechanism(self) -> Mechanism | None:
        return next((found for plugin in self.plugins if (found := plugin.mechanism()) is not None), None)

    def summed(self, over: int, counted: int) -> None:
        for plugin in self.plugins:
            plugin.summed(over, counted)

    def lift(self, total: Mapping[str, Any], clock: Clock) -> Mapping[str, Any]:
        for plugin in reversed(self.plugins):
            total = plugin.lift(total, clock)
        return total

    def arrive(self, visits: Sequence[Visit], everywhere: bool = False) -> None:
        for plugin in self.plugins:
            plugin.arrive(visits, everywhere)

    def calibration(self, clock: Clock) -> Calibration | None:
        found = [(type(plugin).__name__, given) for plugin in self.plugins if (given := plugin.calibration(clock)) is not None]
        if len(found) > 1:
            names = " and ".join(name for name, _ in found)
            raise ValueError(f"{names} each train the server's model on its own data: leave all but one out")
        other = ", ".join(type(plugin).__name__ for plugin in self.plugins if not plugin.ordinary_server)
        if found and other:
            raise ValueError(
                f"{found[0][0]} trains the server's model on the server's own data, and with {other} the server holds no ordinary model "
                "between rounds, to which that could be done: leave one of them out"
            )
        return found[0][1] if found else None

    def settle(self, server: nn.Module, clock: Clock) -> None:
        for plugin in self.plugins:
            plugin.settle(server, clock)

    def figures(self) -> Mapping[str, float]:
        return {name: figure for plugin in self.plugins for name, figure in plugin.figures().items()}

    def state_dict(self) -> dict[str, Any]:
        return {str(place): state for place, plugin in enumerate(self.plugins) if (state := plugin.state_dict())}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for place, own in state.items():
            self.plugins[int(place)].load_state_dict(own)

    def describe(self) -> dict[str, Any]:
        return {f"{position}.{type(plugin).__name__}": plugin.describe() for position, plugin in enumerate(self.plugins)}
