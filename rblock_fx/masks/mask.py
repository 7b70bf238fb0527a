"""The base class of the mask modules: settings, the drop rate and its gamma, forward."""

import math
from abc import abstractmethod
from collections.abc import Callable
from typing import ClassVar, Self

import torch
from torch import Tensor, nn

from rblock_fx.masks.coverage import RateT, block_centre_probability
from rblock_fx.masks.functional import count_dropped, dilate, fork_and_mask, kept_scale, mask_parts

Shape = tuple[int, ...]
Factors = tuple[Tensor, Tensor]

# fit_shares draws about this many numbers, for at most this many samples.
_FIT_DRAWS, _FIT_SAMPLES = 1 << 18, 4096


class Mask(nn.Module):
    """Masks drawn at every call, per sample, from torch's default generator of the input's device.

    A pair method takes (N, C, *S) where the batch forks and (2N, C, *S) behind the fork, and returns (2N, C, *S) with
    sub-model 1 in the first half. A single-model method returns the shape that it takes. The module masks whenever it
    is called, in evaluation too: only the training forward calls it. A dropped inf or nan becomes nan.

    Args:
        drop_prob: probability that an activation is dropped, in [0, 1). The complementary methods (BDropDML, SDropDML,
            C-DropBlock) share it between the two sub-models: each drops drop_prob / 2.
        block_size: side of a block, odd.
        calibration: how gamma follows from drop_prob: "exact" (Eq. 8), "eq6" or "eq7".
        shape: shape of one sample's map, channels where `channel_axis` says. gamma is calibrated for it, and computed
            again for a map of any other size.
        channel_axis: 1 for (N, C, *S), -1 for (N, *S, C).
        forks: whether the batch doubles here.
        place: index of the map in the list that the site returns; None where it returns a tensor.
    """

    parts: ClassVar[int] = 2
    needs_map: ClassVar[bool] = True
    has_blocks: ClassVar[bool] = True
    largest_drop_prob: ClassVar[float] = 1.0
    shares_drop_prob: ClassVar[bool] = False  # between the sub-models: each drops drop_prob / 2

    rate: Tensor
    gamma: Tensor

    def __init__(
        self,
        drop_prob: float,
        block_size: int,
        calibration: str,
        shape: Shape,
        channel_axis: int,
        forks: bool,
        place: int | None = None,
    ) -> None:
        super().__init__()
        self.block_size = block_size
        self.calibration = calibration
        self.shape = shape
        self.channel_axis = channel_axis
        self.forks = forks
        self.place = place
        self.map_size = tuple(shape[1:] if channel_axis == 1 else shape[:-1])
        # Tensors, because torch.compile builds a graph for each value of a Python float; 0-dim and never a mask,
        # because DistributedDataParallel copies the buffers of rank 0 to every rank.
        for name in ("rate", "gamma"):
            self.register_buffer(name, torch.empty((), dtype=torch.float32, device="cpu"), persistent=False)
        self.set_drop_prob(drop_prob)

    @abstractmethod
    def draw(self, x: Tensor) -> Factors:
        """Draw the dropped channels, (K, N, C, 1...), and the dropped positions, (K, N, 1, *S), for x of (N, C, *S).

        Both are bool, and an activation is dropped where both are True. A factor that is True everywhere may have
        size 1 on any axis. Of x only the shape and the device matter.
        """

    def scale(self, channel: Tensor, spatial: Tensor) -> Tensor:
        """Compute the factor of each sample's kept activations, 1 / kept share: (K, N, 1, 1...)."""
        return kept_scale(channel, spatial)

    def forward(self, x: Tensor) -> Tensor:
        """Mask x, doubling its batch where this site forks."""
        x = x.movedim(self.channel_axis, 1)
        samples = x if self.forks else x[: len(x) // self.parts]
        channel, spatial = self.draw(samples)
        scale = self.scale(channel, spatial).expand(self.parts, len(samples), *(1 for _ in x.shape[1:]))
        operation = fork_and_mask if self.forks else mask_parts
        return operation(x, channel, spatial, scale).movedim(1, self.channel_axis)

    def set_drop_prob(self, drop_prob: float) -> None:
        """Change the drop rate, in [0, 1), and gamma with it; written to the buffers in place."""
        self.drop_prob = drop_prob
        with torch.no_grad():
            self.rate.fill_(drop_prob)
            self.gamma.fill_(self.compute_gamma(self.map_size, drop_prob) if self.has_blocks else 0.0)

    def compute_gamma(self, map_size: Shape, drop_prob: RateT) -> RateT:
        """Compute the probability of a block centre on a map of this size, for a float or a 0-dim tensor."""
        return block_centre_probability(drop_prob, map_size, self.block_size, self.calibration)

    def draw_centres(self, x: Tensor, parts: int = 1) -> Tensor:
        """Draw block centres r ~ Bernoulli(gamma) for each part: (K * N, 1, *S)."""
        map_size = tuple(x.shape[2:])
        gamma: Tensor | float = self.gamma
        if map_size != self.map_size:
            compiling = torch.compiler.is_compiling()  # a graph must follow the rate
            compute = self.compute_gamma
            gamma = compute(map_size, self.rate) if compiling else compute(map_size, self.drop_prob)
        return torch.rand((parts * len(x), 1, *map_size), device=x.device) < gamma

    def draw_blocks(self, x: Tensor, parts: int = 1) -> Tensor:
        """Draw the block mask M for each part: (K, N, 1, *S)."""
        return dilate(self.draw_centres(x, parts), self.block_size).view(parts, len(x), 1, *x.shape[2:])

    @property
    def covers_map(self) -> bool:
        """Whether one block can cover the whole map: block_size >= every side."""
        return self.has_blocks and self.block_size >= max(self.map_size)

    def fit_shares(self) -> tuple[float, float]:
        """Estimate how well blocks fit the map, from draws of its own that leave torch's random state as it was.

        Returns:
            The share of samples, per sub-model, that lose nothing and the share that lose every activation.
        """
        channels = self.shape[0 if self.channel_axis == 1 else -1]
        if not self.has_blocks:
            units = channels if self.needs_map else math.prod(self.shape)
            return (1 - self.drop_prob) ** units, self.drop_prob**units
        rows = max(min(_FIT_DRAWS // (channels + math.prod(self.map_size)), _FIT_SAMPLES), 16)
        # A twin on the CPU, wherever this mask is.
        twin = type(self)(self.drop_prob, self.block_size, self.calibration, self.shape, self.channel_axis, self.forks)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(0)
            samples = torch.empty((), device="cpu").expand(rows, channels, *self.map_size)
            dropped, total = count_dropped(*twin.draw(samples))
        return (dropped == 0).double().mean().item(), (dropped == total).double().mean().item()

    def extra_repr(self) -> str:
        """Show every hyperparameter, and the gamma that follows from them."""
        blocks = ["block_size", "calibration", "gamma"] if self.has_blocks else []
        names = ["drop_prob", *blocks, "shape", "channel_axis", "forks", *([] if self.place is None else ["place"])]
        values = {**vars(self), "gamma": float(f"{self.compute_gamma(self.map_size, self.drop_prob):.5g}")}
        return ", ".join(f"{name}={values[name]!r}" for name in names)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Follow the model to its device but stay in float32: gamma in half precision is a different drop rate."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, buffer in self.named_buffers(recurse=False):
            self._buffers[name] = torch.empty((), dtype=torch.float32, device=buffer.device)
        self.set_drop_prob(self.drop_prob)
        return self
