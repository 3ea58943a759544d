"""The contract every method is written against.

A method is one :class:`Plugin`: what it does to the model being trained, to what travels, and to the server. Hosts (a
Lightning callback, a federated loop) call its verbs in a fixed order and know no method by name.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from torch import Tensor, nn

if TYPE_CHECKING:
    from featherlight.plugins.calibration import Calibration
    from featherlight.plugins.mechanism import Mechanism
    from featherlight.plugins.partition import Partition

Message = dict[str, Tensor]
"""What travels: entries of a ``state_dict`` (or what codecs made of them) by name."""

SERVER = -1
"""In place of a client's number, where the server trains on data of its own."""


class Clock(NamedTuple):
    """Where training is: all a schedule may depend on.

    Args:
        period: epochs done under a Trainer, rounds done in a federation.
        step: optimizer steps done since this period (this client's visit, in a federation) began.
    """

    period: int
    step: int = 0


class Change(NamedTuple):
    """Parameters that stopped and parameters that began to be trained; falsy when there are none.

    Args:
        renewed: parameters that begin anew, so that what an optimizer keeps of their past is void.
    """

    froze: tuple[nn.Parameter, ...] = ()
    thawed: tuple[nn.Parameter, ...] = ()
    renewed: tuple[nn.Parameter, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.froze or self.thawed)


class Visit(NamedTuple):
    """One client's turn in one round; all randomness of that turn comes from these three numbers.

    Under a Trainer there is one client, number 0, and the round is the epoch.
    """

    round: int
    client: int = 0
    seed: int = 0


class Plugin:
    """A training method. Every verb does nothing unless overridden; override only what the method needs.

    A host calls, in this order: :meth:`attach` once; :meth:`check` for each stage; at the start of every period :meth:`advance`, then for
    each client :meth:`visit` and, once the model holds what that client received, :meth:`receive`, and in every step
    :meth:`before_forward`, :meth:`extra_loss`, :meth:`after_backward`, :meth:`after_update` and :meth:`after_step`; :meth:`detach` at the
    end. Between steps the model is as evaluation wants it.

    A federated host attaches one instance to the server's model, and has it :meth:`start` where a run begins anew. It asks that one, for
    each client, to :meth:`narrow` the model and to :meth:`encode_down` what goes to the client; to :meth:`decode` what comes back; and,
    once a round, to :meth:`lift`, for a :meth:`calibration`, and to :meth:`settle`. To a module that :meth:`narrow` gave, it
    attaches a second instance made with the same arguments, which gets the verbs of training, :meth:`recall`, :meth:`decode_down`,
    :meth:`encode` and :meth:`remember`; without one, the first does both.
    """

    same_for_all: ClassVar[bool] = False
    """Whether all clients must train the server's own module, none a smaller one that another method makes."""
    ordinary_server: ClassVar[bool] = True
    """Whether the server holds an ordinary model between rounds, whose weights others may change there."""

    starts_elsewhere: ClassVar[bool] = False
    """Whether :meth:`receive` moves the model away from what was received. Of a chain, such a plugin's turn comes after the others'."""

    at_once: ClassVar[bool | None] = None
    """Whether a host may train several clients of a round at once: what this method does from :meth:`decode_down` to :meth:`encode` is
    the same for all of them, looks at no parameter, gradient or loss, and is not upset by others' turns that begin in between. None: it may
    if this method overrides none of :data:`IN_TURN`."""

    stays_here: ClassVar[str] = ""
    """Why clients cannot use this method in processes of their own, where the server's instance is not; nothing where they can."""

    only_adds: ClassVar[str] = ""
    """Why of what clients send nothing but a mean can be taken, and no median; nothing where each coordinate means something by itself."""

    renames: ClassVar[bool] = False
    """Whether what the server reads of a message has other names than the entries that were encoded, until :meth:`lift`."""

    bounds: ClassVar[bool] = False
    """Whether :meth:`decode` holds the server to what :meth:`encode` did: it must then read what it encoded."""

    keeps_norm: ClassVar[bool] = False
    """Whether all that :meth:`decode` makes of a message is at most as long as what it reads, by Euclidean norm: it puts numbers in their
    places, and may make them smaller."""

    alike: ClassVar[bool] = False
    """Whether every client counts alike, whatever its number of samples, and the sum of a round's updates is divided by a number that does
    not depend on who came (:meth:`summed`)."""

    @property
    def sends_parts(self) -> bool:
        """Whether clients of one round may send different ones of the numbers that the server adds up."""
        return False

    @property
    def remakes(self) -> bool:
        """Whether the model itself, not a smaller one, trains other parameters in every period, made from its weights."""
        return False

    @property
    def moves(self) -> bool:
        """Whether :meth:`advance` changes weights, as where a stage begins with a copy."""
        return False

    # -- on the model being trained -------------------------------------------------------------------------------
    def attach(self, model: nn.Module) -> None:
        """Resolve names in ``model`` and prepare it. Existing ``state_dict`` keys never change."""

    def advance(self, clock: Clock) -> Change:
        """Bring the model to where ``clock`` says it is. A pure function of the clock, and idempotent: resume needs no state."""
        return Change()

    def stage(self, period: int) -> int:
        """The stage, counted from 0, that ``period`` belongs to: spans of periods that cost the same. Never falls as periods go by."""
        return 0

    def check(self, stage: int) -> None:
        """Look at what trains in ``stage``, which :meth:`advance` has just brought: hosts ask for all stages before the first begins.

        Raises:
            ValueError: this method cannot work on it.
        """

    def visit(self, visit: Visit) -> None:
        """A client's turn begins: draw what this method draws once per client and round."""

    def receive(self, visit: Visit) -> None:
        """The model holds what this client received, momentum copies made (under a Trainer: what the epoch begins with). Copy what the
        method needs of it, or move it to where the client is to start from. Not called where a run is resumed within a turn."""

    def copies(self) -> Sequence[Tensor]:
        """Weights that this method keeps beside the model while it trains: counted among what is held, and in a step's peak. They may
        change at :meth:`receive`."""
        return ()

    def before_forward(self, clock: Clock) -> None:
        """Put the model in its training form for one step."""

    def extra_loss(self, model: nn.Module, batch: Any) -> Tensor | None:
        """A scalar that the host adds to the model's own loss (alignment, proximal terms), or None."""
        return None

    def after_backward(self, clock: Clock) -> None:
        """Gradients are complete and not yet applied."""

    def after_update(self, clock: Clock) -> None:
        """The optimizer has moved the parameters, and nothing that follows them (a module's momentum copies) has moved yet: the last
        word on where they are. Not called for a micro-batch that ends in no optimizer step."""

    def after_step(self, clock: Clock) -> None:
        """The step is over: leave the training form that :meth:`before_forward` put on."""

    def detach(self) -> None:
        """Leave an ordinary ``nn.Module``."""

    # -- federated: the beginning ---------------------------------------------------------------------------------
    def start(self) -> None:
        """A run begins, behind :meth:`attach`, and no checkpoint holds its weights: bring in those that come from elsewhere. The server's
        instance alone is asked; where a run is resumed it is not, so that files which may be gone are not needed."""

    # -- federated: structure -------------------------------------------------------------------------------------
    def agree(self) -> Sequence[Tensor]:
        """Tensors that every process works out for itself and that must be alike in all, once a round, behind :meth:`advance`: the host
        writes the first process's into them. Not asked where there is one process."""
        return ()

    def narrow(self, visit: Visit) -> nn.Module | None:
        """A really smaller module for this client, or None: the server's own. The same object for clients whose modules are alike."""
        return None

    def partition(self, clock: Clock) -> Partition | None:
        """How this round divides the model between a device and the server, or None: clients train all that they hold."""
        return None

    # -- federated: a client, from one of its turns to the next -----------------------------------------------------
    def recall(self, memory: Message, visit: Visit) -> None:
        """A client's turn begins: what it kept at the end of its last one that the server accepted; nothing before its first.

        Other calls of :meth:`encode` have no client behind them: a host asks so what a message would look like.
        """

    def remember(self, visit: Visit) -> Message:
        """A client's turn ends, its update is encoded: what it keeps until its next one, by name. It never travels."""
        return {}

    # -- federated: the wire --------------------------------------------------------------------------------------
    def encode_down(self, message: Message, visit: Visit, kept: Collection[str] = ()) -> Message:
        """The server's side: from its entries to those that this client's module has, or to others from which the client makes those.

        An entry that comes back as the same object is the server's own, and may be kept by the client from one round to the next. So
        is an entry of a new name, which must never be used for another content. An entry whose object is new under the server's name is
        made for this client alone, and sent in every round.

        Args:
            kept: names of entries that the client still has from earlier rounds; where returned, they do not travel again.
        """
        return message

    def decode_down(self, message: Message, visit: Visit) -> Message:
        """The client's side, on arrival, in the opposite order of :meth:`encode_down`."""
        return message

    def rebuild(self, message: Message, before: Message, visit: Visit) -> Message:
        """In place of :meth:`decode_down`, for a client that lives in a process of its own: where a method sends less than the entries
        because clients have the rest, what they make of both. (Where the server's entries lie in the same memory, they are taken.)

        Args:
            before: the model's entries as this client had them, brought up to date, in its last turn, or, before its first, as every client
                makes the model; blocks that it leaves out included; and what this verb gave then under names of its own.
        """
        return self.decode_down(message, visit)

    def tell(self) -> dict[str, Any]:
        """The server's side: what a client in a process of its own could work out from configuration and schedule, had it seen every
        round, as plain data that JSON can hold. Asked behind :meth:`encode_down`; it is no part of the message."""
        return {}

    def hear(self, news: dict[str, Any], visit: Visit) -> None:
        """The client's side, behind :meth:`advance` and before :meth:`visit`: what :meth:`tell` gave. Not called where the server's
        instance is in the same process."""

    def encode(self, message: Message, visit: Visit) -> Message:
        """A client's side: select, project or quantise the entries of its update."""
        return message

    def decode(self, message: Message, visit: Visit) -> Mapping[str, Any]:
        """The server's side, per message, in the opposite order of :meth:`encode`.

        An entry may become ``(value, weight)`` with ``weight`` of the value's shape: 0 where this client held nothing.
        """
        return message

    # -- federated: the server, once a round ----------------------------------------------------------------------
    def mechanism(self) -> Mechanism | None:
        """What makes a round's result differentially private, for whoever keeps account; None: nothing does."""
        return None

    def summed(self, over: int, counted: int) -> None:
        """Behind adding and before :meth:`lift`, where a method counts clients :attr:`alike`.

        Args:
            over: what the sum is divided by: how many clients a round is to have; counted: how many are in it.
        """

    def lift(self, total: Mapping[str, Any], clock: Clock) -> Mapping[str, Any]:
        """After adding and dividing: what can be added as it came (a subspace's coordinates, a sketch) becomes entries again. The model
        holds the server's weights.

        Args:
            total: mean changes, float64, by name; ``(mean, held)`` with a mask where somebody held only some of the elements.
        """
        return total

    def arrive(self, visits: Sequence[Visit], everywhere: bool = False) -> None:
        """In a prediction, where nothing is trained and :meth:`lift` is not called: whose updates would be in the round's mean.

        Args:
            everywhere: there would be noise on all that may travel in the round, whoever came.
        """

    def calibration(self, clock: Clock) -> Calibration | None:
        """How the server trains the model on its own data, between the round's mean and :meth:`settle`; None: not at all. The host takes
        the steps, with the module's own loss and optimizer and no plugin's training verbs. Asked behind :meth:`advance`."""
        return None

    def settle(self, server: nn.Module, clock: Clock) -> None:
        """After the server's update and its calibration: what else the server does with its weights, such as a new factorisation."""

    def figures(self) -> Mapping[str, float]:
        """What this method tells of the round that ends, by name, for the log."""
        return {}

    # -- what a checkpoint of a federation must hold ------------------------------------------------------------------
    def state_dict(self) -> dict[str, Any]:
        """What the server's instance knows beyond the server's weights and the clock: tensors and plain data; for most methods nothing."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what :meth:`state_dict` gave."""

    # -- what a method is -----------------------------------------------------------------------------------------
    def describe(self) -> dict[str, Any]:
        """The constructor's arguments: what a checkpoint compares to recognise a run of another configuration."""
        return {name: value for name, value in vars(self).items() if not name.startswith("_")}


IN_TURN = (
    *("narrow", "partition", "visit", "decode_down", "receive", "copies"),
    *("before_forward", "extra_loss", "after_backward", "after_update", "after_step"),
)
"""Verbs by which a method has a hand in a client's turn."""


def overrides(plugin: Plugin | type[Plugin], verb: str) -> bool:
    """Whether ``plugin``, or all of that class, do something of their own at ``verb``."""
    return getattr(plugin if isinstance(plugin, type) else type(plugin), verb) is not getattr(Plugin, verb)
