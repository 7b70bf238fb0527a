"""Compare outputs and gradients of a converted architecture with those of the plain one."""

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from benchmarks.zoo_models import build, build_without_weights, runs
from rblock_fx import apply_rblock, set_drop_prob, split_pair

SIDES = (64, 96, 128, 160, 192, 224, 256, 288, 320)  # of images, tried in this order
DRAWS = 20  # a mask on a map of few positions may drop nothing


def compare_outputs(line: dict[str, Any]) -> dict[str, Any]:
    """The same architecture with weights and images; `line` is its structure."""
    # The sites of the full size: on a small image the last map may be too small to be a stage.
    sites = list(dict.fromkeys(path.split("[")[0] for path, _, _ in line["sites"]))
    size = _smallest_size(line["name"], tuple(line["input_size"]))
    model, x = _comparable_model(line["name"], size, torch.float32)
    state = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        evaluated = _leaves(model.eval()(x))
    plain = _leaves(model.train()(x))
    with_gradient = _backward(model, plain)
    model.load_state_dict(state)

    apply_rblock(model, sites, input_size=size, drop_prob=0.2)
    with torch.no_grad():
        again = _leaves(model.eval()(x))
    model.train()
    set_drop_prob(model, 0.0)
    with torch.no_grad():
        error = _largest_error(model(x), plain)
    model.load_state_dict(state)

    set_drop_prob(model, 0.2)
    for seed in range(DRAWS):
        torch.manual_seed(seed)
        output = model(x)
        first, second = map(_leaves, split_pair(output))
        differ = not all(map(torch.equal, first, second))
        if differ:
            break
    trained = _backward(model, _leaves(output))
    numbers = {
        "input_size": list(size),
        "eval_equal": len(again) == len(evaluated) and all(map(torch.equal, again, evaluated)),
        "keys_equal": [*model.state_dict()] == [*state],
        "rows_doubled": [len(leaf) for leaf in _leaves(output)] == [2 * len(leaf) for leaf in plain],
        "halves_differ": differ,
        "undropped_error": error,
        "gradients_equal": trained == with_gradient,
        "gradients_finite": all(bool(p.grad.isfinite().all()) for p in model.parameters() if p.grad is not None),
        "plain_finite": all(bool(leaf.isfinite().all()) for leaf in plain),
    }
    if error > 1e-4:  # rounding: batch norm over a batch of two on maps of one position magnifies it
        model, x = _comparable_model(line["name"], size, torch.float64)
        state = copy.deepcopy(model.state_dict())
        with torch.no_grad():
            plain = _leaves(model(x))
            model.load_state_dict(state)
            apply_rblock(model, sites, input_size=size, drop_prob=0.0)
            numbers["undropped_error_float64"] = _largest_error(model(x), plain)
    return numbers


def _smallest_size(name: str, native: tuple[int, ...]) -> tuple[int, ...]:
    """The smallest image with which the plain model runs in both modes; else the size that it was made for."""
    weightless = build_without_weights(name).to("meta")
    for side in SIDES:
        shape = (2, *native[:-2], side, side)
        if side < native[-1] and all(runs(weightless.train(mode), shape) for mode in (False, True)):
            return shape[1:]
    return native


def _comparable_model(name: str, size: tuple[int, ...], dtype: torch.dtype) -> tuple[nn.Module, Tensor]:
    """The model in train mode, without its own dropout and without parameters of zeros, and two images."""
    torch.manual_seed(0)
    model = build(name).to(dtype)
    for module in model.modules():
        for attribute in ("p", "drop_prob", "drop_rate", "attn_drop_rate"):
            if isinstance(getattr(module, attribute, None), float):
                setattr(module, attribute, 0.0)
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():  # a zero head or residual branch would hide earlier differences
                parameter.normal_(0.0, 0.1)
    return model.train(), torch.randn(2, *size, dtype=dtype)


def _largest_error(pair: Any, plain: list[Tensor]) -> float:
    """Of both halves, as a share of the largest plain value."""
    return max(
        float((a - b).abs().max() / b.abs().max().clamp(min=1e-12))
        for half in split_pair(pair)
        for a, b in zip(_leaves(half), plain, strict=True)
    )


def _leaves(output: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor)]


def _backward(model: nn.Module, leaves: list[Tensor]) -> set[str]:
    """The names of the parameters that get a gradient."""
    model.zero_grad(set_to_none=True)
    torch.autograd.backward(sum(leaf.float().square().mean() for leaf in leaves if leaf.requires_grad))
    return {name for name, parameter in model.named_parameters() if parameter.grad is not None}
