"""Methods, written once: what each does to an ``nn.Module``, to what travels, and to the server. Needs torch alone."""

from featherlight.plugins.base import SERVER, Change, Clock, Message, Plugin, Visit
from featherlight.plugins.blocks import Tower, find_blocks
from featherlight.plugins.calibration import Calibration
from featherlight.plugins.chain import Chain
from featherlight.plugins.client_privacy import ClientPrivacy
from featherlight.plugins.depth_dropout import DepthDropout
from featherlight.plugins.fed_ema import FedEMA
from featherlight.plugins.fetch_sgd import FetchSGD
from featherlight.plugins.intrinsic import IntrinsicProjection
from featherlight.plugins.layer_freezing import LayerFreezing
from featherlight.plugins.mechanism import Mechanism
from featherlight.plugins.moon import MOON
from featherlight.plugins.norm_clipping import NormClipping
from featherlight.plugins.partition import Partition
from featherlight.plugins.partitioned_training import PartitionedTraining
from featherlight.plugins.present import held, trained
from featherlight.plugins.prism import PrismSampling
from featherlight.plugins.progressive_growth import ProgressiveGrowth
from featherlight.plugins.proximal import Proximal
from featherlight.plugins.quantization import Quantization
from featherlight.plugins.representation_alignment import RepresentationAlignment
from featherlight.plugins.server_calibration import ServerCalibration
from featherlight.plugins.targets import find_targets
from featherlight.plugins.top_k import TopK

__all__ = [
    "MOON",
    "SERVER",
    "Calibration",
    "Chain",
    "Change",
    "ClientPrivacy",
    "Clock",
    "DepthDropout",
    "FedEMA",
    "FetchSGD",
    "IntrinsicProjection",
    "LayerFreezing",
    "Mechanism",
    "Message",
    "NormClipping",
    "Partition",
    "PartitionedTraining",
    "Plugin",
    "PrismSampling",
    "ProgressiveGrowth",
    "Proximal",
    "Quantization",
    "RepresentationAlignment",
    "ServerCalibration",
    "TopK",
    "Tower",
    "Visit",
    "find_blocks",
    "find_targets",
    "held",
    "trained",
]
