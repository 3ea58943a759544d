"""featherlight: train a large model where only a small one fits.

Layer freezing, depth dropout and progressive growth as plugins that compose, usable as Lightning callbacks
(:mod:`featherlight.callbacks`) and in a federated loop on Fabric (:mod:`featherlight.fed_loop`).
Importing this package loads nothing heavy; import what you need from its parts.
"""

__version__ = "0.1.0"
