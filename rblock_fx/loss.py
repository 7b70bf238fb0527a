"""The R-Block loss (paper, section 2, Eq. 1-5), and the layout of a pair in one batch."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from rblock_fx.errors import PairError, SettingError
from rblock_fx.settings import is_real


class RBlockLoss(nn.Module):
    """Sum over the sub-models i of (1 - alpha) * criterion(z_i, y) + alpha * T^2 * KL(p_j || p_i), p = softmax(z / T).

    The KL is taken over the classes (axis 1), meant over samples and, for dense outputs, positions. Gradients flow
    through both distributions. The KL is computed in float32 whatever autocast does outside; the logits reach the
    criterion in float32 and untempered.

    Args:
        criterion: any loss called as criterion(logits, target); default F.cross_entropy (class indices, or
            probabilities from mixup and smoothing).
        alpha: weight of the KL term, in [0, 1].
        temperature: T > 0.
        reduction: "sum" over the two sub-models (Eq. 5) or their "mean".

    Raises:
        SettingError: alpha, temperature or reduction outside its range.
    """

    def __init__(
        self,
        criterion: Callable[[Tensor, Any], Tensor] | None = None,
        *,
        alpha: float = 0.1,
        temperature: float = 3.0,
        reduction: str = "sum",
    ) -> None:
        super().__init__()
        if criterion is not None and (isinstance(criterion, type) or not callable(criterion)):
            raise SettingError(
                f"RBlockLoss: criterion={criterion!r} is no loss that can be called as criterion(logits, target); pass "
                "an instance or a function: RBlockLoss(nn.CrossEntropyLoss(), alpha=0.1)"
            )
        if not is_real(alpha) or not 0 <= alpha <= 1:
            raise SettingError(f"RBlockLoss: alpha={alpha} is not in [0, 1], the weight of the KL term, e.g. alpha=0.1")
        if not is_real(temperature) or not 0 < temperature < float("inf"):
            raise SettingError(f"RBlockLoss: temperature={temperature} is not a positive number, e.g. temperature=3.0")
        if reduction not in ("sum", "mean"):
            raise SettingError(f"RBlockLoss: reduction={reduction!r} is neither 'sum' (Eq. 5) nor 'mean'")
        self.criterion = F.cross_entropy if criterion is None else criterion
        self.alpha = alpha
        self.temperature = temperature
        self.reduction = reduction

    def forward(self, logits: Tensor, target: Any) -> Tensor:
        """Loss of 2N logits (2N, K, ...) against N targets; of N logits, the plain criterion.

        Args:
            logits: (2N, K) or (2N, K, *S), sub-model 1 in the first half; or (N, K, ...) in evaluation.
            target: whatever the criterion takes, N rows: (N,), (N, *S) or (N, K, ...).

        Raises:
            PairError: the logits have neither N nor 2N rows, or are no tensor.
        """
        if self._is_plain(logits, target):
            return self.criterion(logits, target)
        criterion, divergence = self.terms(logits, target)
        loss = (1 - self.alpha) * criterion + self.alpha * self.temperature**2 * divergence
        return loss if self.reduction == "sum" else loss / 2

    def terms(self, logits: Tensor, target: Any) -> tuple[Tensor, Tensor]:
        """The two sums of Eq. 4-5, unweighted: of the criterion over both sub-models, of the KL in both directions."""
        if self._is_plain(logits, target):
            raise PairError(
                f"RBlockLoss.terms: {logits.shape[0]} logits for {logits.shape[0]} targets are one model's output; "
                "expected 2N logits of a model converted by apply_rblock, in train mode."
            )
        with torch.autocast(logits.device.type, enabled=False):
            first, second = logits.float().chunk(2) if logits.dtype != torch.float64 else logits.chunk(2)
            return self.criterion(first, target) + self.criterion(second, target), self._divergence(first, second)

    def _divergence(self, first: Tensor, second: Tensor) -> Tensor:
        """KL(p_1 || p_2) + KL(p_2 || p_1) = sum_k (p_1 - p_2)(ln p_1 - ln p_2), mean over everything but classes."""
        log_first = F.log_softmax(first / self.temperature, dim=1)
        log_second = F.log_softmax(second / self.temperature, dim=1)
        # Classes that both sub-models rule out by a logit of -inf agree.
        difference = torch.where(log_first == log_second, 0.0, log_first - log_second)
        return ((log_first.exp() - log_second.exp()) * difference).sum(1).mean()

    def _is_plain(self, logits: Tensor, target: Any) -> bool:
        if not isinstance(logits, Tensor) or logits.dim() < 2:
            got = f"{tuple(logits.shape)}" if isinstance(logits, Tensor) else type(logits).__name__
            raise PairError(
                f"RBlockLoss: expected logits of (2N, classes, ...), got {got}. "
                "Of a dict or named tuple pass the tensor, e.g. criterion(model(images)['out'], labels)."
            )
        rows = next((len(leaf) for leaf in pytree.tree_leaves(target) if isinstance(leaf, Tensor) and leaf.dim()), None)
        if rows is None:
            raise PairError(f"RBlockLoss: expected targets with N rows, got {type(target).__name__} without any")
        if len(logits) not in (rows, 2 * rows):
            raise PairError(
                f"RBlockLoss: got {len(logits)} logits {tuple(logits.shape)} for {rows} targets; expected {2 * rows} "
                f"(both sub-models, train mode) or {rows} (plain, eval mode). Pass the targets once: "
                "criterion(model(images), labels)."
            )
        return len(logits) == rows

    def extra_repr(self) -> str:
        """The hyperparameters."""
        plain = "" if isinstance(self.criterion, nn.Module) else f"{getattr(self.criterion, '__name__', '?')}, "
        return f"{plain}alpha={self.alpha:g}, temperature={self.temperature:g}, reduction={self.reduction!r}"


def split_pair(output: Any) -> tuple[Any, Any]:
    """Split a training output into (output of sub-model 1, output of sub-model 2).

    Args:
        output: any nesting of tensors of 2N rows; dicts, tuples and named tuples keep their type.

    Raises:
        PairError: a tensor has an odd number of rows or none, or the output holds no tensor.
    """
    leaves, structure = pytree.tree_flatten(output)
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    if not tensors:
        raise PairError(
            f"split_pair: no tensor in {type(output).__name__}; pass a training output: split_pair(model(x))"
        )
    for tensor in tensors:
        if tensor.dim() == 0 or len(tensor) % 2:
            raise PairError(
                f"split_pair: expected an even number of rows (2N), got shape {tuple(tensor.shape)}; is the model "
                "converted by apply_rblock with a pair method, and in train mode?"
            )

    def half(index: int) -> Any:
        return pytree.tree_unflatten([x.chunk(2)[index] if isinstance(x, Tensor) else x for x in leaves], structure)

    return half(0), half(1)
