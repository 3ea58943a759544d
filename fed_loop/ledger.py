"""Who holds what: which entries a client must be sent, and which it still has from an earlier round.

A client keeps what it received and did not train: where a prefix is frozen, that prefix, which then travels once.
Where every entry trains, as in plain federated averaging, nothing is remembered of any client.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any


class Ledger:
    """Versions of the server's entries, and the versions clients still hold.

    Args:
        resend: send everything in every round; clients keep nothing.

    Example:
        >>> ledger = Ledger()
        >>> ledger.to_send(7, ["prefix", "block"])
        ['prefix', 'block']
        >>> ledger.visited(7, ledger.after(7, held=["prefix", "block"], trained=["block"]))
        >>> ledger.changed(["block"], round=0)
        >>> ledger.to_send(7, ["prefix", "block"])
        ['block']
    """

    def __init__(self, resend: bool = False) -> None:
        self.resend = resend
        self._versions: dict[str, int] = {}
        self._kept: dict[int, dict[str, int]] = {}

    def to_send(self, client: int, held: Iterable[str], made: Collection[str] = ()) -> list[str]:
        """The entries that ``client`` needs and does not hold as the server has them; those ``made`` for it alone always."""
        kept = self._kept.get(client, {})
        return [name for name in held if self.resend or name in made or kept.get(name) != self._version(name)]

    def kept(self, client: int) -> Collection[str]:
        """Names of what ``client`` still has."""
        return self._kept.get(client, {}).keys()

    def held(self, client: int) -> dict[str, int]:
        """What ``client`` still has, with versions."""
        return dict(self._kept.get(client, {}))

    def after(self, client: int, held: Iterable[str], trained: Iterable[str], known: Collection[str] | None = None) -> dict[str, int]:
        """What ``client`` keeps once it has trained: name → version.

        Args:
            known: the server's names; of others, only what is ``held`` now is kept. None: all names are.
        """
        if self.resend:
            return {}
        kept = {name: version for name, version in self._kept.get(client, {}).items() if known is None or name in known}
        kept |= {name: self._version(name) for name in held}
        for name in trained:
            kept.pop(name, None)
        return kept

    def visited(self, client: int, kept: dict[str, int]) -> None:
        """Note what ``client`` keeps."""
        if kept:
            self._kept[client] = kept
        else:
            self._kept.pop(client, None)

    def changed(self, names: Iterable[str], round: int) -> None:
        """The server's values of ``names`` changed in ``round``."""
        for name in names:
            self._versions[name] = round + 1

    def state_dict(self) -> dict[str, Any]:
        return {"versions": dict(self._versions), "kept": {str(client): dict(kept) for client, kept in self._kept.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._versions = dict(state["versions"])
        self._kept = {int(client): dict(kept) for client, kept in state["kept"].items()}

    def _version(self, name: str) -> int:
        return self._versions.get(name, 0)
