"""What the library must compute, written a second time without it: NumPy and SciPy in float64, plain loops."""

from contextlib import contextmanager

import numpy as np
import scipy.ndimage
import scipy.special
import torch
from torch import nn


def eq8(gamma, m, n, block_size):
    """Eq. 8 as it is printed, for a map of m x n with m, n >= 2k."""
    k = block_size // 2
    q = 1 - gamma
    inner = (1 - 2 * k / m) * (1 - 2 * k / n) * (1 - q ** ((2 * k + 1) ** 2))
    i = np.arange(1, k + 1)
    corners = 4 * (k**2 / (m * n) - (q ** ((k + i)[:, None] * (k + i)[None, :])).sum() / (m * n))
    edges = 2 * (1 / m + 1 / n - 4 * k / (m * n)) * (1 - q ** ((2 * k + 1) * (k + i))).sum()
    return inner + corners + edges


def eq18(gamma, block_size):
    return 1 - (1 - gamma) ** (block_size**2)


def eq19(gamma, m, n, block_size):
    return (m - block_size + 1) * (n - block_size + 1) * eq18(gamma, block_size) / (m * n)


def coverage_by_enumeration(gamma, shape, block_size):
    """E[M] position by position: how many positions can put a block on this one."""
    k = block_size // 2
    total = 0.0
    for position in np.ndindex(*shape):
        reach = 1
        for i, length in zip(position, shape, strict=True):
            reach *= sum(1 for j in range(length) if abs(i - j) <= k)
        total += 1 - (1 - gamma) ** reach
    return total / np.prod(shape)


def coverage_by_simulation(gamma, shape, block_size, draws, seed):
    """Mean and standard error of the covered share, drawn and dilated by SciPy."""
    centres = np.random.default_rng(seed).random((draws, *shape)) < gamma
    covered = scipy.ndimage.maximum_filter(centres, size=(1, *[block_size] * len(shape)), mode="constant")
    shares = covered.reshape(draws, -1).mean(1)
    return shares.mean(), shares.std(ddof=1) / np.sqrt(draws)


def opened(dropped, block_size):
    """The part of a boolean map that a union of clipped blocks can make up."""
    k = block_size // 2
    padded = np.pad(dropped, k, constant_values=True)
    structure = np.ones([block_size] * dropped.ndim, bool)
    return scipy.ndimage.binary_opening(padded, structure)[tuple(slice(k, -k or None) for _ in dropped.shape)]


def agreement(first, second, divergence, temperature):
    """One value for each row of (N, K): KL(p_1 || p_2) + KL(p_2 || p_1) times T^2, or twice the squared distance."""
    if divergence == "mse":
        return 2 * ((first - second) ** 2).mean(1)
    if divergence == "softmax":
        p, q = (scipy.special.softmax(z / temperature, axis=1) for z in (first, second))
    else:  # yes and no of every label
        p, q = (scipy.special.expit(np.concatenate((z, -z), axis=1) / temperature) for z in (first, second))
    return temperature**2 * (scipy.special.rel_entr(p, q) + scipy.special.rel_entr(q, p)).sum(1)


def cross_entropies(logits, target):
    """One value for each row of (N, K); target (N,) of indices, where -100 adds 0, or (N, K) of probabilities."""
    target = np.asarray(target)
    if target.ndim == 1:
        target = np.eye(logits.shape[1])[np.maximum(target, 0)] * (target[:, None] >= 0)
    return -(target * scipy.special.log_softmax(logits, axis=1)).sum(1)


def rblock_loss(logits, target, alpha, temperature, combine="mean", auxiliary=()):
    """Eq. 1-5, term by term; logits (2N, K); `auxiliary` has pairs of a weight and logits (2N, K)."""
    halves = np.split(np.asarray(logits, np.float64), 2)
    total = sum((1 - alpha) * cross_entropies(half, target).mean() for half in halves)
    total += alpha * agreement(*halves, "softmax", temperature).mean()
    for weight, others in auxiliary:
        for half in np.split(np.asarray(others, np.float64), 2):
            total += weight * cross_entropies(half, target).mean()
    return total if combine == "sum" else total / 2


class Maps(nn.Module):
    """One Identity stage and one parameter: fed with ones it gives its masks."""

    def __init__(self):
        super().__init__()
        self.stage = nn.Identity()
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, x):
        return self.stage(x)


@contextmanager
def recorded_masks(model):
    """Collect the masks that a training forward draws, by the name of the mask module.

    After each call of a mask module it is run once more, on ones, from the state that the generator had before it.
    """
    masks = {}
    states = {}
    handles = []
    for name, module in model.rblock.named_children():

        def before(_module, _inputs, name=name):
            states[name] = torch.get_rng_state()

        def after(module, inputs, _output, name=name):
            now = torch.get_rng_state()
            torch.set_rng_state(states[name])
            masks[name] = module.forward(torch.ones_like(inputs[0]))  # past the hooks
            torch.set_rng_state(now)

        handles += [module.register_forward_pre_hook(before), module.register_forward_hook(after)]
    try:
        yield masks
    finally:
        for handle in handles:
            handle.remove()


def two_forwards(plain, masks, x):
    """Run a plain model twice, its site modules' outputs multiplied by the given masks.

    The masks are {site path: (2N, ...)}; of a site that gives a list or tuple, {site path: {place: (2N, ...)}}.
    """

    def masked(output, mask, half):
        if isinstance(mask, dict):
            return type(output)(
                item * mask[place].chunk(2)[half] if place in mask else item for place, item in enumerate(output)
            )
        return output * mask.chunk(2)[half]

    outputs = []
    for half in range(2):
        handles = []
        for path, mask in masks.items():

            def hook(_module, _inputs, output, mask=mask, half=half):
                return masked(output, mask, half)

            handles.append(plain.get_submodule(path).register_forward_hook(hook))
        outputs.append(plain(x))
        for handle in handles:
            handle.remove()
    return torch.cat(outputs)
