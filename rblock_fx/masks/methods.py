"""The mask methods, one small class each: the factors that it draws for one site."""

import torch
from torch import Tensor

from rblock_fx.masks.coverage import RateT, block_centre_probability
from rblock_fx.masks.functional import dilate
from rblock_fx.masks.mask import Factors, Mask, Shape

__all__ = ["METHODS", "Mask"]


class BDropDML(Mask):
    """Algorithm 1: one block mask M, each channel of it given to sub-model 1 or 2 by a fair coin.

    The two dropped sets are disjoint and their union is M on every channel.
    """

    shares_drop_prob = True

    def draw(self, rows: int, channels: int, map_size: Shape, device: torch.device) -> Factors:
        """Draw l1 ~ Bernoulli(0.5) and l2 = 1 - l1 over channels; M over positions."""
        blocks = self.draw_blocks(rows, map_size, device)
        first = _uniform(1, rows, channels, map_size, device) < 0.5
        return torch.cat((first, ~first)), blocks.unsqueeze(0)


class SDropDML(Mask):
    """Algorithm 2: channels l ~ Bernoulli(p); in each, sub-model 1 drops M, of coverage 0.5, and sub-model 2 the rest.

    The two dropped sets are disjoint and their union is every split channel, whole. gamma follows from Eq. 8 at p = 0.5
    whatever the calibration, as Algorithm 2 (step 2) says.
    """

    shares_drop_prob = True

    def draw(self, rows: int, channels: int, map_size: Shape, device: torch.device) -> Factors:
        """Draw l over channels; M and 1 - M over positions."""
        split = _uniform(1, rows, channels, map_size, device) < self.rate
        blocks = self.draw_blocks(rows, map_size, device).unsqueeze(0)
        return split, torch.cat((blocks, ~blocks))

    def compute_gamma(self, map_size: Shape, drop_prob: RateT) -> RateT:
        """Compute the gamma at which blocks cover half of the map, whatever the drop rate."""
        return block_centre_probability(0.0 * drop_prob + 0.5, map_size, self.block_size, "exact")


class CDropBlock(Mask):
    """C-DropBlock (ours, not in the paper): whole-channel blocks, each block given to one sub-model by a fair coin.

    Where blocks of the two meet, one sub-model, chosen per sample by a fair coin, drops the position. The two dropped
    sets are disjoint and their union is M on every channel.
    """

    shares_drop_prob = True

    def draw(self, rows: int, channels: int, map_size: Shape, device: torch.device) -> Factors:  # noqa: ARG002
        """Draw the blocks of sub-model 1 and those of 2, on every channel."""
        centres = self.draw_centres(rows, map_size, device)
        coin = torch.rand((rows, 1, *map_size), device=device) < 0.5
        first = dilate(centres & coin, self.block_size)
        second = dilate(centres & ~coin, self.block_size)
        first_yields = _uniform(1, rows, 1, map_size, device)[0] < 0.5
        both = first & second
        spatial = torch.stack((first & ~(both & first_yields), second & ~(both & ~first_yields)))
        return _everything(rows, map_size, device), spatial


class DropBlock(Mask):
    """DropBlock (Ghiasi et al. 2018) for one model: blocks over all channels."""

    parts = 1

    def draw(self, rows: int, channels: int, map_size: Shape, device: torch.device) -> Factors:  # noqa: ARG002
        """Draw M over positions for each part independently, on every channel."""
        blocks = self.draw_blocks(self.parts * rows, map_size, device)
        return _everything(rows, map_size, device), blocks.view(self.parts, rows, 1, *map_size)


class RDropBlock(DropBlock):
    """R-DropBlock (section 4.3, d): DropBlock twice, independently."""

    parts = 2


class SpatialDropout(Mask):
    """SpatialDropout (Tompson et al. 2015) for one model: whole channels."""

    parts = 1
    has_blocks = False

    def draw(self, rows: int, channels: int, map_size: Shape, device: torch.device) -> Factors:
        """Draw channels for each part independently, whole."""
        dropped = _uniform(self.parts, rows, channels, map_size, device) < self.rate
        return dropped, _everything(rows, map_size, device)


class RSpatialDropout(SpatialDropout):
    """R-SpatialDropout (section 4.3, c): SpatialDropout twice, independently."""

    parts = 2


class Dropout(Mask):
    """Dropout (Srivastava et al. 2014) for one model: single activations, the kept ones scaled by 1 / (1 - p)."""

    parts = 1
    needs_map = False
    has_blocks = False

    def draw(self, rows: int, channels: int, map_size: Shape, device: torch.device) -> Factors:
        """Draw activations for each part independently: a factor over all axes and one over none."""
        dropped = torch.rand((self.parts, rows, channels, *map_size), device=device) < self.rate
        return dropped, _everything(rows, map_size, device)

    def scale(self, channel: Tensor, spatial: Tensor) -> Tensor:
        """Compute 1 / (1 - p), as torch.nn.Dropout and R-Drop do."""
        return (1 / (1 - self.rate)).expand(self.parts, spatial.shape[1], *(1 for _ in channel.shape[2:]))


class RDrop(Dropout):
    """R-Drop (section 4.3, a; Liang et al. 2021): Dropout twice, independently."""

    parts = 2


class CDrop(Dropout):
    """C-Drop (section 4.3, b): an activation is dropped in 1 with p, in 2 with p, in neither with 1 - 2p (p <= 0.5)."""

    parts = 2
    largest_drop_prob = 0.5

    def draw(self, rows: int, channels: int, map_size: Shape, device: torch.device) -> Factors:
        """Draw activations from the two ends of one uniform number; at p = 0.5 exactly complementary."""
        uniform = torch.rand((1, rows, channels, *map_size), device=device)
        return torch.cat((uniform < self.rate, uniform >= 1 - self.rate)), _everything(rows, map_size, device)


METHODS: dict[str, type[Mask]] = {
    "bdropdml": BDropDML,
    "sdropdml": SDropDML,
    "c-dropblock": CDropBlock,
    "r-drop": RDrop,
    "c-drop": CDrop,
    "r-spatialdropout": RSpatialDropout,
    "r-dropblock": RDropBlock,
    "dropout": Dropout,
    "spatialdropout": SpatialDropout,
    "dropblock": DropBlock,
}


def _uniform(parts: int, rows: int, channels: int, map_size: Shape, device: torch.device) -> Tensor:
    """Draw a number in [0, 1) per channel: (parts, rows, channels, 1...)."""
    return torch.rand((parts, rows, channels, *(1 for _ in map_size)), device=device)


def _everything(rows: int, map_size: Shape, device: torch.device) -> Tensor:
    """Build the factor that is True everywhere: (1, rows, 1, 1...)."""
    return torch.ones((1, rows, 1, *(1 for _ in map_size)), dtype=torch.bool, device=device)
