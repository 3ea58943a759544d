"""The thin federated loop on Fabric: rounds, clients, wire, exact aggregation, cost, checkpoints."""

from featherlight.fed_loop.accounting import noise_for
from featherlight.fed_loop.federation import FederatedData, Federation
from featherlight.fed_loop.result import Result
from featherlight.fed_loop.robust import Median, TrimmedMean
from featherlight.fed_loop.server import Adam, Average, Momentum

__all__ = ["Adam", "Average", "FederatedData", "Federation", "Median", "Momentum", "Result", "TrimmedMean", "noise_for"]
