"""R-Block (arXiv 2307.15150) for any timm or torchvision CNN: paired, complementary structured dropout."""

from rblock_fx.apply import apply_rblock, list_sites, remove_rblock
from rblock_fx.describe import describe
from rblock_fx.errors import ConversionError, PairError, RBlockError, SettingError, SiteError
from rblock_fx.loss import RBlockLoss, split_pair
from rblock_fx.schedule import DropSchedule, set_drop_prob


__version__ = "0.1.0"

__all__ = [
    "ConversionError",
    "DropSchedule",
    "PairError",
    "RBlockError",
    "RBlockLoss",
    "SettingError",
    "SiteError",
    "apply_rblock",
    "describe",
    "list_sites",
    "remove_rblock",
    "set_drop_prob",
    "split_pair",
]
