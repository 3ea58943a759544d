"""The methods as Lightning callbacks, and what a run cost."""

from featherlight.callbacks.depth_dropout import DepthDropout
from featherlight.callbacks.host import PluginCallback
from featherlight.callbacks.layer_freezing import LayerFreezing
from featherlight.callbacks.progressive_growth import ProgressiveGrowth

__all__ = ["DepthDropout", "LayerFreezing", "PluginCallback", "ProgressiveGrowth"]
