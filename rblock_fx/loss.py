"""The R-Block loss (paper, section 2, Eq. 1-5), and the layout of a pair in one batch."""

import dataclasses
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from rblock_fx.errors import PairError, SettingError
from rblock_fx.settings import is_real

# What the main output is called: in torchvision's segmentation models, and in its GoogLeNet and Inception v3.
MAIN_OUTPUTS = ("out", "logits")

# The usual weights of torchvision's auxiliary outputs: of its segmentation reference, of Inception v3 (PyTorch's
# finetuning tutorial; the paper gives none), and of GoogLeNet (arXiv 1409.4842, section 5).
AUX_WEIGHTS = {"aux": 0.5, "aux_logits": 0.4, "aux_logits1": 0.3, "aux_logits2": 0.3}


class RBlockLoss(nn.Module):
    """Sum over the sub-models i of (1 - alpha) * criterion(z_i, y) + alpha * T^2 * KL(p_j || p_i), p = softmax(z / T).

    The KL is taken over the classes (axis 1), meant over samples and, for dense outputs, positions; it needs no label,
    so it also counts the positions that the criterion ignores (ignore_index). Gradients flow through both
    distributions. The KL is computed in float32 whatever autocast does outside; the logits reach the criterion in
    float32 and untempered.

    Auxiliary outputs (torchvision's GoogLeNet, Inception v3, segmentation models) add weight * criterion(z_i, y) of
    both sub-models. They have no KL, so their criterion is not scaled by the 1 - alpha that Eq. 4 trades against it.

    Args:
        criterion: any loss called as criterion(logits, target) with one tensor of logits; default F.cross_entropy
            (class indices, or probabilities from mixup and smoothing).
        alpha: weight of the KL term, in [0, 1].
        temperature: T > 0.
        reduction: "sum" over the two sub-models (Eq. 5) or their "mean".
        aux_weights: weights of the auxiliary outputs, >= 0, where 0 leaves an output out: one number for all, or a
            mapping from each one's name to its weight. None is the usual 0.5 for "aux" (segmentation), 0.4 for
            "aux_logits" (Inception v3), and 0.3 for "aux_logits1" and "aux_logits2" (GoogLeNet).

    Raises:
        SettingError: alpha, temperature, reduction or aux_weights outside its range.
    """

    def __init__(
        self,
        criterion: Callable[[Tensor, Any], Tensor] | None = None,
        *,
        alpha: float = 0.1,
        temperature: float = 3.0,
        reduction: str = "sum",
        aux_weights: float | Mapping[str, float] | None = None,
    ) -> None:
        super().__init__()
        if criterion is not None and (isinstance(criterion, type) or not callable(criterion)):
            raise SettingError(
                f"RBlockLoss: criterion={criterion!r} is no loss that can be called as criterion(logits, target); pass "
                "an instance or a function: RBlockLoss(nn.CrossEntropyLoss(), alpha=0.1)"
            )
        if isinstance(alpha, bool) or not is_real(alpha) or not 0 <= alpha <= 1:
            raise SettingError(f"RBlockLoss: alpha={alpha} is not in [0, 1], the weight of the KL term, e.g. alpha=0.1")
        if not is_real(temperature) or not 0 < temperature < float("inf"):
            raise SettingError(f"RBlockLoss: temperature={temperature} is not a positive number, e.g. temperature=3.0")
        if reduction not in ("sum", "mean"):
            raise SettingError(f"RBlockLoss: reduction={reduction!r} is neither 'sum' (Eq. 5) nor 'mean'")
        _check_aux_weights(aux_weights)
        self.criterion = F.cross_entropy if criterion is None else criterion
        self.alpha = alpha
        self.temperature = temperature
        self.reduction = reduction
        self.aux_weights = dict(aux_weights) if isinstance(aux_weights, Mapping) else aux_weights

    def forward(self, output: Any, target: Any) -> Tensor:
        """Loss of an output of 2N rows against N targets; of N rows, the plain criterion with its auxiliary outputs.

        Args:
            output: logits (2N, K) or (2N, K, *S), sub-model 1 in the first half, or (N, K, ...) in evaluation; or a
                dict or named tuple of such tensors, the main one called "out" or "logits". Those that are None are
                ignored.
            target: whatever the criterion takes, N rows: (N,), (N, *S) or (N, K, ...).

        Raises:
            PairError: a tensor has neither N nor 2N rows, or not those of the main output; the main output cannot be
                told, or an auxiliary one has no weight.
        """
        main, auxiliary, is_pair = self._read(output, target)
        if not is_pair:
            loss = self.criterion(main, target)
            for weight, logits in auxiliary:
                loss = loss + weight * self.criterion(logits, target)
            return loss
        criterion, divergence = self._terms(main, target)
        loss = (1 - self.alpha) * criterion + self.alpha * self.temperature**2 * divergence
        for weight, logits in auxiliary:
            loss = loss + weight * self._criterion_of_both(logits, target)
        return loss if self.reduction == "sum" else loss / 2

    def terms(self, output: Any, target: Any) -> tuple[Tensor, Tensor]:
        """The two sums of Eq. 4-5, unweighted: of the criterion over both sub-models, of the KL in both directions.

        Both are of the main output alone; what auxiliary outputs add is the rest of the loss.
        """
        main, _, is_pair = self._read(output, target)
        if not is_pair:
            raise PairError(
                f"RBlockLoss.terms: {len(main)} logits for {len(main)} targets are one model's output; "
                "expected 2N logits of a model converted by apply_rblock, in train mode."
            )
        return self._terms(main, target)

    def _terms(self, logits: Tensor, target: Any) -> tuple[Tensor, Tensor]:
        with torch.autocast(logits.device.type, enabled=False):
            first, second = _halves(logits)
            return self.criterion(first, target) + self.criterion(second, target), self._divergence(first, second)

    def _criterion_of_both(self, logits: Tensor, target: Any) -> Tensor:
        with torch.autocast(logits.device.type, enabled=False):
            first, second = _halves(logits)
            return self.criterion(first, target) + self.criterion(second, target)

    def _divergence(self, first: Tensor, second: Tensor) -> Tensor:
        """KL(p_1 || p_2) + KL(p_2 || p_1) = sum_k (p_1 - p_2)(ln p_1 - ln p_2), mean over everything but classes."""
        log_first = F.log_softmax(first / self.temperature, dim=1)
        log_second = F.log_softmax(second / self.temperature, dim=1)
        # Classes that both sub-models rule out by a logit of -inf agree.
        difference = torch.where(log_first == log_second, 0.0, log_first - log_second)
        return ((log_first.exp() - log_second.exp()) * difference).sum(1).mean()

    def _read(self, output: Any, target: Any) -> tuple[Tensor, list[tuple[float, Tensor]], bool]:
        """The main logits, the auxiliary ones with their weights, and whether they are a pair's; all checked."""
        main, named = _by_name(output)
        logits = named.pop(main)
        is_pair = _is_pair(logits, target, main)
        weights = self._weights_of(list(named))
        auxiliary = {name: value for name, value in named.items() if weights[name]}
        for name, value in auxiliary.items():
            if not (isinstance(value, Tensor) and value.dim() and len(value) == len(logits)):
                got = f"of shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
                raise PairError(
                    f"RBlockLoss: the auxiliary output {name!r} is {got}, expected a tensor of {len(logits)} rows like "
                    f"the main output {main!r} of shape {tuple(logits.shape)}. Every output of a converted model has "
                    "the same rows: double one that was computed outside it, torch.cat([x, x]), or leave out what is "
                    f"not to be trained, RBlockLoss(aux_weights={weights | {name: 0}})."
                )
        return logits, [(weights[name], value) for name, value in auxiliary.items()], is_pair

    def _weights_of(self, names: list[str]) -> dict[str, float]:
        """The weight of each auxiliary output."""
        if not (self.aux_weights is None or isinstance(self.aux_weights, dict)):
            return dict.fromkeys(names, self.aux_weights)
        known = AUX_WEIGHTS if self.aux_weights is None else self.aux_weights
        unknown = [name for name in names if name not in known]
        if unknown:
            complete = {name: known.get(name, 0.4) for name in names}
            raise PairError(
                f"RBlockLoss: auxiliary outputs without a weight: {', '.join(map(repr, unknown))}; give each one, or 0 "
                f"to leave it out, e.g. RBlockLoss(aux_weights={complete})"
            )
        return {name: known[name] for name in names}

    def extra_repr(self) -> str:
        """The hyperparameters."""
        plain = "" if isinstance(self.criterion, nn.Module) else f"{getattr(self.criterion, '__name__', '?')}, "
        weights = "" if self.aux_weights is None else f", aux_weights={self.aux_weights}"
        return f"{plain}alpha={self.alpha:g}, temperature={self.temperature:g}, reduction={self.reduction!r}{weights}"


def _check_aux_weights(aux_weights: Any) -> None:
    """Refuse what is neither None, nor a weight, nor a mapping from names of auxiliary outputs to weights."""
    if aux_weights is None:
        return
    by_name = aux_weights if isinstance(aux_weights, Mapping) else {"": aux_weights}
    if not all(is_real(w) and not isinstance(w, bool) and 0 <= w < float("inf") for w in by_name.values()):
        raise SettingError(
            f"RBlockLoss: aux_weights={aux_weights!r} is neither a weight in [0, inf) nor a mapping from names to such "
            "weights; e.g. aux_weights=0.4 for every auxiliary output, or aux_weights={'aux': 0.5}"
        )
    for name in MAIN_OUTPUTS:
        if name in by_name:
            raise SettingError(
                f"RBlockLoss: aux_weights={aux_weights!r} names {name!r}, the main output, which has Eq. 4's weights; "
                "name auxiliary outputs only, e.g. aux_weights={'aux': 0.5}"
            )


def _by_name(output: Any) -> tuple[str, dict[str, Any]]:
    """The name of the main output, empty for a tensor, and by their names all outputs that are not None."""
    named: dict[str, Any]
    if isinstance(output, Mapping):
        named = dict(output)
    elif isinstance(output, tuple) and hasattr(output, "_fields"):
        named = dict(zip(output._fields, output, strict=True))
    elif isinstance(output, list | tuple):
        raise PairError(
            f"RBlockLoss: got a {type(output).__name__} of {len(output)}, whose outputs have no names to tell the main "
            "one by. Pass one, criterion(output[0], labels), or name them, "
            "criterion({'out': output[0], 'aux': output[1]}, labels). timm's distilled models give one tensor after "
            "model.set_distilled_training(False)."
        )
    else:
        return "", {"": output}
    named = {name: value for name, value in named.items() if value is not None}
    mains = [name for name in MAIN_OUTPUTS if name in named]
    if len(mains) != 1:
        name = next(iter(named), "main")
        access = f"output[{name!r}]" if isinstance(output, Mapping) else f"output.{name}"
        raise PairError(
            f"RBlockLoss: got a {type(output).__name__} of {', '.join(map(repr, named)) or 'nothing'}; expected one "
            f"main output, called 'out' or 'logits'. Pass the tensor, criterion({access}, labels), or name it, "
            f"criterion({{'out': {access}}}, labels)."
        )
    return mains[0], named


def _is_pair(logits: Any, target: Any, name: str) -> bool:
    """Whether the main logits have two rows for each target."""
    if not isinstance(logits, Tensor) or logits.dim() < 2:
        got = f"{tuple(logits.shape)}" if isinstance(logits, Tensor) else type(logits).__name__
        raise PairError(
            f"RBlockLoss: expected logits of (2N, classes, ...), got {got}{f' in {name!r}' if name else ''}. Pass a "
            "tensor, or a dict or named tuple of tensors, as the model gives it: criterion(model(images), labels)."
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
    return len(logits) != rows


def _halves(logits: Tensor) -> tuple[Tensor, Tensor]:
    """The logits of the two sub-models, at least in float32."""
    first, second = (logits if logits.dtype == torch.float64 else logits.float()).chunk(2)
    return first, second


def split_pair(output: Any) -> tuple[Any, Any]:
    """Split a training output into (output of sub-model 1, output of sub-model 2).

    Args:
        output: any nesting of tensors of 2N rows; dicts, lists, tuples and named tuples keep their type, and what is no
            tensor goes to both.

    Raises:
        PairError: a tensor has an odd number of rows or none, or the output holds no tensor, or a container of a type
            that torch.utils._pytree does not know.
    """
    leaves, structure = pytree.tree_flatten(output)
    for leaf in leaves:
        is_container = isinstance(leaf, Collection) and not isinstance(leaf, str | bytes | Tensor)
        if is_container or dataclasses.is_dataclass(leaf):
            raise PairError(
                f"split_pair: cannot split what is inside a {type(leaf).__name__}; pass tensors in dicts, lists, "
                "tuples or named tuples, e.g. split_pair({'out': logits})"
            )
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
