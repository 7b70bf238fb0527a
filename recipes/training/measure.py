"""What a run measures: training as it goes, the full network on held-out images, and the gap between the two."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn

from rblock_fx import RBlockLoss, split_pair
from rblock_fx.masks.methods import Mask

Row = dict[str, Any]  # one row of metrics.csv
Prepare = Callable[[Tensor], Tensor]  # images as they were loaded -> as the network takes them

# What is summed over the images of an epoch; from pairs on, of pairs alone.
SUMS = ("images", "loss", "cross_entropy", "hits", "pairs", "divergence", "hits_1", "hits_2", "agreeing")


@torch.no_grad()
def training_sums(loss: Tensor, logits: Tensor, targets: Tensor, criterion: RBlockLoss) -> Tensor:
    """SUMS over one batch, on its device: logits (2N, K) or (N, K); targets (N,), or (N, K) where images were mixed."""
    labels = targets if targets.dim() == 1 else targets.argmax(1)
    parts = split_pair(logits.float()) if len(logits) == 2 * len(labels) else (logits.float(),)
    hits = [(part.argmax(1) == labels).sum() for part in parts]
    cross_entropy = sum(F.cross_entropy(part, targets, reduction="sum") for part in parts)
    sums = [loss.new_tensor(len(labels)), loss * len(labels), cross_entropy / len(parts), sum(hits) / len(parts)]
    if len(parts) == 2:
        divergence = criterion.terms(logits, targets)[1] * len(labels)
        sums += [sums[0], divergence, *hits, (parts[0].argmax(1) == parts[1].argmax(1)).sum()]
    else:
        sums += [loss.new_tensor(0.0)] * 5
    return torch.stack([torch.as_tensor(value, device=loss.device).float() for value in sums])


def training_row(sums: list[float]) -> Row:
    """The columns of metrics.csv that the sums of an epoch give; those of pairs are empty for other methods."""
    total = dict(zip(SUMS, sums, strict=True))
    count = total["images"]
    row: Row = {
        "train_loss": total["loss"] / count,
        "train_ce": total["cross_entropy"] / count,
        "train_kl": total["divergence"] / count,
        "train_top1": 100 * total["hits"] / count,
        "train_top1_1": 100 * total["hits_1"] / count,
        "train_top1_2": 100 * total["hits_2"] / count,
        "train_agreement": 100 * total["agreeing"] / count,
    }
    if not total["pairs"]:
        row |= dict.fromkeys(("train_kl", "train_top1_1", "train_top1_2", "train_agreement"))
    return row


@torch.no_grad()
def evaluate(model: Callable[[Tensor], Tensor], loader: Any, prepare: Prepare, accelerator: Accelerator) -> list[float]:
    """Cross-entropy (nats) and top-1 (%) over a whole split.

    The processes share it and each image counts once; a stream, which each of them reads whole, counts once for each.
    """
    sums = torch.zeros(3, device=accelerator.device)
    for images, targets in loader:
        with accelerator.autocast():
            logits = model(prepare(images))
        logits, labels = accelerator.gather_for_metrics((logits.float(), targets))  # drops the last batch's padding
        hits = (logits.argmax(1) == labels).sum()
        cross_entropy = F.cross_entropy(logits, labels, reduction="sum")
        sums += torch.stack((cross_entropy, hits.float(), logits.new_tensor(len(labels))))
    cross_entropy_sum, hit_sum, count = sums.tolist()
    return [cross_entropy_sum / count, 100 * hit_sum / count]


@torch.no_grad()
def train_inference_gap(network: nn.Module, batches: Iterable[Any], prepare: Prepare, seed: int) -> Row:
    """How far what was trained is from what is used: a sub-model beside the full network, on held-out images.

    `gap_kl` is KL(full network || sub-model) in nats, `gap_agreement` the share of images (%) of which the two name the
    same class, both means over images and, of a pair, the two sub-models; `drop_rate` is the share of non-zero
    activations at the sites that a sub-model loses. Batch norm uses its running statistics in both, so that the masks
    are all that differs; they are drawn from a generator of their own, the same at every call, and training goes on as
    if nothing had been measured.
    """
    divergence, agreeing, count = 0.0, 0, 0
    device = next(network.parameters()).device
    network.eval()
    with _seeded(seed, device), _counting_drops(network) as dropped:
        for images, *_ in batches:
            prepared = prepare(images.to(device))
            full = network(prepared).float().log_softmax(1)
            network.training = True  # its forward alone: the modules inside stay in evaluation
            masked = network(prepared).float().log_softmax(1)
            network.training = False
            full = full.repeat(len(masked) // len(full), 1)
            divergence += F.kl_div(masked, full, reduction="sum", log_target=True).item()
            agreeing += int((masked.argmax(1) == full.argmax(1)).sum())
            count += len(masked)
    lost, active = dropped
    return {
        "gap_kl": divergence / count,
        "gap_agreement": 100 * agreeing / count,
        "drop_rate": lost / active if active else 0.0,
    }


@contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


@contextmanager
def _counting_drops(network: nn.Module) -> Iterator[list[int]]:
    """[activations that masks set to zero, activations that were not zero before], over all calls inside."""
    counts = [0, 0]

    def count(_mask: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        active = inputs[0] != 0
        active = active.repeat(len(output) // len(active), *(1 for _ in active.shape[1:]))
        counts[0] += int((active & (output == 0)).sum())
        counts[1] += int(active.sum())

    handles = [module.register_forward_hook(count) for module in network.modules() if isinstance(module, Mask)]
    try:
        yield counts
    finally:
        for handle in handles:
            handle.remove()
