"""R-Block (arXiv 2307.15150) for any timm or torchvision CNN: paired, complementary structured dropout."""

from rblock_fx.apply import apply_rblock, list_sites, remove_rblock
from rblock_fx.errors import (
    ConversionError,
    PairError,
    RBlockError,
    RBlockWarning,
    SettingError,
    SiteError,
    VerificationError,
)
from rblock_fx.loss import RBlockLoss, split_pair
from rblock_fx.settings import DropSchedule, describe, set_drop_prob
from rblock_fx.verify import VerifyReport, verify

__version__ = "0.1.0"

__all__ = [
    "ConversionError",
    "DropSchedule",
    "PairError",
    "RBlockError",
    "RBlockLoss",
    "RBlockWarning",
    "SettingError",
    "SiteError",
    "VerificationError",
    "VerifyReport",
    "apply_rblock",
    "describe",
    "list_sites",
    "remove_rblock",
    "set_drop_prob",
    "split_pair",
    "verify",
]
