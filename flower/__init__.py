"""A federation as a Flower app: the same configurations on a SuperLink with SuperNodes, each client a process with data of its own.

Rounds, messages and sums are :mod:`featherlight.fed_loop`'s; Flower carries bytes. Needs ``featherlight[flower]``.
"""

from featherlight.flower.client import client_app
from featherlight.flower.server import server_app

__all__ = ["client_app", "server_app"]
