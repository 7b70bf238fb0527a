"""The R-Block loss (paper, section 2, Eq. 1-5) on a batch that contains both sub-models."""

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from rblock_fx.checks import is_real
from rblock_fx.errors import PairError, RBlockWarning, SettingError
from rblock_fx.pair import (
    ModelReference,
    check_softmax,
    default_divergence,
    divergence_of,
    is_pair,
    read_outputs,
    reduce_like,
    returns_pair,
    split_pair,
    undouble,
)

__all__ = ["RBlockLoss", "split_pair"]

INF = float("inf")


class RBlockLoss(nn.Module):
    """Mean over the sub-models i of (1 - alpha) * criterion(z_i, y) + alpha * T^2 * KL(p_j || p_i), p = softmax(z / T).

    The KL is summed over classes (axis 1) and averaged over samples and positions, with gradients through both
    distributions. Both terms are computed in float32 (float64 stays) under any autocast. Samples whose class index is
    the criterion's ignore_index (-100 by default) train with the KL alone, which is semi-supervised training. Logits of
    N rows for N targets, as in evaluation, get the plain criterion. The loss has the shape that the criterion's
    reduction returns, with the same share of the KL; `loss.reduction` reads and sets that reduction.

    Args:
        criterion: called as criterion(logits, target) on one tensor of logits; default nn.CrossEntropyLoss(). Its
            attributes can be read through the loss.
        alpha: weight of the divergence, in [0, 1].
        temperature: T > 0.
        divergence: "softmax" for classes; "bernoulli" for independent labels, the KL of sigmoid(z / T) summed over
            labels; "mse" for regression, or a symmetric callable(z_1, z_2), both on the outputs without T and in the
            place of T^2 * KL. None follows the criterion's class: BCEWithLogitsLoss and timm's BinaryCrossEntropy and
            AsymmetricLossMultiLabel mean "bernoulli"; MSE, L1, SmoothL1 and Huber mean "mse"; others "softmax".
        combine: "mean" over the sub-models, with plain training's learning rate, or the paper's "sum" (Eq. 5).
        aux_weight: weight >= 0 of the criterion of every output beside the main one, which has no KL; 0 skips them.
        model: the converted model. It is not registered as a submodule, and a pickle of the loss leaves it out. While
            it trains by a pair method, N rows with gradients are 2N rows for targets doubled by hand; without gradients
            they are an evaluation, of an averaged copy for instance. Without a model, N rows with gradients warn once.
        reduction: not a setting: see combine.

    Raises:
        SettingError: a setting is outside its range.
        ConversionError: model was not converted by apply_rblock.
    """

    def __init__(
        self,
        criterion: Callable[[Tensor, Any], Tensor] | None = None,
        *,
        alpha: float = 0.1,
        temperature: float = 3.0,
        divergence: str | Callable[[Tensor, Tensor], Tensor] | None = None,
        combine: str = "mean",
        aux_weight: float = 0.4,
        model: nn.Module | None = None,
        reduction: None = None,
    ) -> None:
        super().__init__()
        is_loss = criterion is None or (callable(criterion) and not isinstance(criterion, type))
        is_divergence = divergence is None or callable(divergence) or divergence in ("softmax", "bernoulli", "mse")
        is_temperature = is_real(temperature) and 0 < temperature < INF
        for is_right, name, expected, got in (
            (is_loss, "criterion", "a loss instance or function", criterion),
            (is_real(alpha) and 0 <= alpha <= 1, "alpha", "in [0, 1]", alpha),
            (is_temperature, "temperature", "positive and finite", temperature),
            (is_divergence, "divergence", "'softmax', 'bernoulli', 'mse' or a callable", divergence),
            (combine in ("mean", "sum"), "combine", "'mean' or 'sum'", combine),
            (is_real(aux_weight) and 0 <= aux_weight < INF, "aux_weight", "a number >= 0", aux_weight),
        ):
            if not is_right:
                raise SettingError(f"RBlockLoss: {name} must be {expected}, got {got!r}")
        if reduction is not None:
            raise SettingError("RBlockLoss: reduction belongs to the criterion; use combine='mean' or combine='sum'")
        self.criterion = nn.CrossEntropyLoss() if criterion is None else criterion
        self.alpha = alpha
        self.temperature = temperature
        self.divergence = divergence or default_divergence(self.criterion) or "softmax"
        self._is_default = divergence is None
        self.combine = combine
        self.aux_weight = aux_weight
        self._has_warned = False
        self.attach(model)

    def attach(self, model: nn.Module | None) -> None:
        """Set the converted model whose mode and method determine whether a pair is expected."""
        if model is not None:
            returns_pair(model, "RBlockLoss")
        self._model = ModelReference(model)

    @property
    def is_attached(self) -> bool:
        """Whether the loss refers to a model."""
        return self._model.model is not None

    @property
    def reduction(self) -> str:
        """The criterion's reduction; setting it sets the criterion's, as fastai's MixUp does."""
        criterion: Any = self.criterion
        return criterion.reduction  # type: ignore[no-any-return]

    @reduction.setter
    def reduction(self, value: str) -> None:
        if not hasattr(self.criterion, "reduction"):
            raise SettingError(
                f"RBlockLoss: the criterion {_name_of(self.criterion)} has no reduction to set; "
                "use a loss module: RBlockLoss(nn.CrossEntropyLoss())"
            )
        self.criterion.reduction = value

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("_") or name == "criterion":
                raise
            return getattr(self.criterion, name)

    def forward(self, output: Any, target: Any) -> Tensor:
        """Return the loss of an output with 2N rows and N targets, or the plain criterion of N rows.

        Args:
            output: logits (2N, K, *S) with sub-model 1 in the first half, or (N, K, *S) in evaluation; or a dict or
                named tuple of such tensors, the main one called "out" or "logits". None values are ignored.
            target: N rows of whatever the criterion takes: (N,), (N, *S) or (N, K, *S).

        Raises:
            PairError: a tensor has neither N nor 2N rows, the main output is ambiguous, or 2N targets for 2N rows
                differ between the halves (with model=).
            SettingError: "softmax" with one class, or by default with float targets that do not sum to 1.
        """
        main, auxiliary, target, pair = self._read(output, target)
        if not pair:
            loss = self.criterion(main, target)
            for logits in auxiliary:
                loss = loss + self.aux_weight * self.criterion(logits, target)
            return loss
        criterion, divergence = self._terms(main, target)
        scale = self.temperature**2 if self.divergence in ("softmax", "bernoulli") else 1.0
        loss = (1 - self.alpha) * criterion + self.alpha * scale * divergence
        for logits in auxiliary:
            loss = loss + self.aux_weight * self._criterion_of_both(logits, target)
        return loss if self.combine == "sum" else loss / 2

    def terms(self, output: Any, target: Any) -> tuple[Tensor, Tensor]:
        """Return the two sums of Eq. 4-5 over the sub-models: of the criterion, and of the divergence without T^2.

        Both are of the main output alone. Arguments and errors are those of `forward`; N rows are a PairError.
        """
        main, _, target, pair = self._read(output, target)
        if not pair:
            raise PairError(
                f"RBlockLoss.terms: expected 2N logits for N targets, got {len(main)} for {len(main)}; pass the output "
                "of a converted model in train mode"
            )
        return self._terms(main, target)

    def _terms(self, logits: Tensor, target: Any) -> tuple[Tensor, Tensor]:
        first, second = logits.chunk(2)
        if self.divergence == "softmax":
            check_softmax(first, target, check_target=self._is_default)
        criterion = self._criterion_of_both(logits, target)
        with torch.autocast(logits.device.type, enabled=False):
            divergence = divergence_of(first, second, self.divergence, self.temperature)
        count = 1
        if _option(self.criterion, "reduction", "mean") == "sum":
            kind = default_divergence(self.criterion) or self.divergence
            count = (first if kind in ("bernoulli", "mse") or first.dim() == 1 else first[:, 0]).numel()
        return criterion, reduce_like(divergence, criterion, count)

    def _criterion_of_both(self, logits: Tensor, target: Any) -> Tensor:
        """Sum of the criterion over the sub-models, 0 where no sample has a label."""
        with torch.autocast(logits.device.type, enabled=False):
            first, second = logits.chunk(2)
            loss = self.criterion(first, target) + self.criterion(second, target)
        if isinstance(target, Tensor) and not target.is_floating_point():
            has_label = (target != _option(self.criterion, "ignore_index", -100)).any()
            loss = torch.where(has_label, loss, 0.0)  # torch returns nan, with zero gradients
        return loss

    def _read(self, output: Any, target: Any) -> tuple[Tensor, list[Tensor], Any, bool]:
        """Return the main logits, the auxiliary ones, the targets, and whether the logits are a pair's.

        The logits of a pair are in float32 or float64.
        """
        main, auxiliary = read_outputs(output, with_auxiliary=self.aux_weight > 0)
        pair = is_pair(main, target)
        if not pair and torch.is_grad_enabled() and main.requires_grad:
            if not self.is_attached:
                self._warn_once(len(main))
            elif self._model.returns_pair:
                target, pair = undouble(target, len(main)), True
        if pair:
            main, *auxiliary = (z if z.dtype == torch.float64 else z.float() for z in (main, *auxiliary))
        return main, auxiliary, target, pair

    def _warn_once(self, rows: int) -> None:
        if self._has_warned or torch.compiler.is_compiling():
            return
        self._has_warned = True
        warnings.warn(
            f"RBlockLoss: expected 2N rows for N targets in training, got {rows} rows with gradients for as many "
            "targets, which get the plain criterion. Call the converted model itself in train mode and pass each "
            "target once. RBlockLoss(..., model=model) checks this and recognises single-model methods.",
            RBlockWarning,
            stacklevel=6,
        )

    def extra_repr(self) -> str:
        """The settings."""
        plain = "" if isinstance(self.criterion, nn.Module) else f"{_name_of(self.criterion)}, "
        return (
            f"{plain}alpha={self.alpha:g}, temperature={self.temperature:g}, divergence={_name_of(self.divergence)}, "
            f"combine={self.combine}, aux_weight={self.aux_weight:g}"
        )


def _option(criterion: Any, name: str, default: Any) -> Any:
    """An option of a loss module, or of a functools.partial of a function."""
    return getattr(criterion, name, getattr(criterion, "keywords", {}).get(name, default))


def _name_of(choice: Any) -> str:
    return choice if isinstance(choice, str) else str(getattr(choice, "__name__", type(choice).__name__))
