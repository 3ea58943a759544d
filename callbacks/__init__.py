"""The methods as Lightning callbacks, and what a run cost."""

from featherlight.callbacks.cost_monitor import CostMonitor
from featherlight.callbacks.depth_dropout import DepthDropout
from featherlight.callbacks.fresh_start import FreshStart
from featherlight.callbacks.host import PluginCallback
from featherlight.callbacks.intrinsic import IntrinsicProjection
from featherlight.callbacks.layer_freezing import LayerFreezing
from featherlight.callbacks.prism import PrismSampling
from featherlight.callbacks.progressive_growth import ProgressiveGrowth
from featherlight.callbacks.representation_alignment import RepresentationAlignment

__all__ = [
    "CostMonitor",
    "DepthDropout",
    "FreshStart",
    "IntrinsicProjection",
    "LayerFreezing",
    "PluginCallback",
    "PrismSampling",
    "ProgressiveGrowth",
    "RepresentationAlignment",
]
