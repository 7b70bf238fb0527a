"""What an R-Block training step costs beside a plain one, on one device and on N: a cost model in closed form.

`bench_scaling.py` checks it against what it measures. On one device it needs nothing but `list_sites`; on N devices it
needs one number more, of plain training: how long the all-reduce takes beside the compute.

**Compute.** Let F be the forward FLOPs of a batch, c = `cost_before` of the first site (the share of F in front of the
fork) and s the share of F in the layers that take the image. A backward costs F for the gradients of the weights and F
for those of the inputs, the latter without s F, since nobody asks for the gradient of the image. So plain training
costs (3 - s) F. R-Block runs what lies behind the fork once more, and the layers that take the image lie before it:

    r = ((3 - s) F + 3 (1 - c) F) / ((3 - s) F) = 1 + (1 - c) * 3 / (3 - s)

`list_sites` knows c but not s, only that 0 <= s <= cost_before of stage 0. `flop_ratio` takes s = 0, so r = 2 - c,
which is (1 - c) * s / (3 - s) too small; `flop_ratio_bounds` gives both ends. Sites behind the first change nothing.

**Bytes reduced.** Parameters are not doubled, so both methods send the same gradients: a ring all-reduce of G bytes
over N devices sends, and receives, 2 (N - 1) / N * G bytes on each device.

**Activation memory.** The prefix is kept once and the suffix twice. With a, the share of plain training's saved bytes
in front of the fork, the bytes that grow with the batch become m times as many:

    m = 2 - a + 2 * (bytes of the maps that sites keep themselves) / (bytes that plain training saves)

where the last term is for sites that end in a layer that saves its own output, as a ReLU does: the masked map, of 2N
rows, is then kept beside it. Elsewhere it is kept in place of the map, and the term is 0.

`list_sites` does not know a. A convolution of C channels spends k C FLOPs on an element of its output, with a k that is
much the same all over one network, so the stages' shares of the elements are about as (c_i - c_(i-1)) / C_i, with C_i
the channels of stage i: `activation_share_before`. It is rough where the layers of a network are unlike each other
(dense concatenation, wide expansions, heavy stems). a > c in most networks: early maps are large and cheap. Layers
that move bytes rather than multiply, as batch norms do, follow m and not r, so that a network that is bound by
memory bandwidth has a step ratio nearer to m.

**Steps on N devices.** In units of the compute of a plain step, let u be the optimizer's update and k the all-reduce:

    k = 2 (N - 1) / N * G / bandwidth / (batch * training FLOPs of a sample / FLOP/s)

Both are the same for both methods. How much of the all-reduce hides behind the backward (2/3 of the compute; DDP
sends buckets while it runs) depends on the machine, so there are two bounds of the step of a method with compute x
(x = 1 plain, x = r R-Block):

    no overlap    T(x) = x + k + u
    full overlap  T(x) = x / 3 + max(2 x / 3, k) + u

The step ratio is T(r) / T(1). It is r where compute decides (k -> 0, u = 0), falls as k grows, and is 1 where
communication does (k -> infinity). Under weak scaling, with the same batch per device, a method's efficiency is its
step on one device over its step on N, and R-Block's over plain's is

    ((r + u) / T(r)) / ((1 + u) / T(1)) >= 1

since R-Block computes more for the same bytes. Without overlap and with u = 0 it is r (1 + k) / (r + k), at most r.

**Not in the model**: kernels that are faster or slower on other shapes, layers whose time is that of reading the
weights (large ones, on few rows: doubling the batch is nearly free there), the masks, latency of messages and launches,
stragglers, contention of processes on one machine for memory, BatchNorm buffers that DDP broadcasts. A network whose
batch has to double at the input (`describe(model).early_fork_reason`) has r = 2 whatever its sites.
"""

from collections.abc import Sequence

from rblock_fx.stages import Site

# Shares of a training step's compute: the backward has a gradient of the weights and one of the inputs.
FORWARD, BACKWARD = 1 / 3, 2 / 3


def share_before_fork(sites: Sequence[Site]) -> float:
    """c: the share of the forward FLOPs before the first of the masked sites."""
    if not sites:
        raise ValueError("no sites; expected those that are masked, e.g. list_sites(model)[-2:]")
    return min(site.cost_before for site in sites)


def flop_ratio(sites: Sequence[Site], image_layers: float = 0.0) -> float:
    """r: FLOPs of an R-Block training step over those of a plain one.

    Args:
        sites: the masked sites.
        image_layers: s, the share of the forward FLOPs in the layers that take the image, in [0, c].
    """
    return 1 + (1 - share_before_fork(sites)) * 3 / (3 - image_layers)


def flop_ratio_bounds(sites: Sequence[Site], stages: Sequence[Site]) -> tuple[float, float]:
    """The r of the least and of the largest share that the layers which take the image can have.

    Args:
        sites: the masked sites.
        stages: all sites of the model, from list_sites; what takes the image lies before the first.
    """
    return flop_ratio(sites), flop_ratio(sites, share_before_fork([*stages, *sites]))


def activation_share_before(sites: Sequence[Site], stages: Sequence[Site]) -> float:
    """a, estimated: the share of the activations that plain training saves before the first of the masked sites.

    Args:
        sites: the masked sites; the first is one of the stages.
        stages: all sites of the model, in forward order, from list_sites.
    """
    fork = share_before_fork(sites)
    before = total = start = 0.0
    for stage in stages:
        channels = stage.shape[0] if stage.channel_axis == 1 else stage.shape[-1]
        elements = max(stage.cost_before - start, 0.0) / channels
        before += elements if stage.cost_before <= fork else 0.0
        total += elements
        start = max(start, stage.cost_before)
    return before / total if total else 0.0


def activation_ratio(share_before: float, masked_maps: float = 0.0) -> float:
    """m: bytes that R-Block training saves for backward over those of plain training.

    Args:
        share_before: a, the share that plain training saves before the fork.
        masked_maps: bytes of the maps, for N rows, of the sites that end in a layer which saves its own output, over
            the bytes that plain training saves.
    """
    return 2 - share_before + 2 * masked_maps


def all_reduce_bytes(gradient_bytes: float, devices: int) -> float:
    """Bytes that each device sends in a ring all-reduce of the gradients."""
    return 2 * (devices - 1) / devices * gradient_bytes


def communication_share(
    gradient_bytes: float, devices: int, *, batch: int, training_flops: float, flop_rate: float, bandwidth: float
) -> float:
    """k: seconds of the all-reduce over seconds of the compute of a plain step.

    Args:
        gradient_bytes: of all gradients, 4 for a float32 parameter.
        devices: N.
        batch: samples per device.
        training_flops: FLOPs of forward and backward of one sample through the plain model.
        flop_rate: FLOP/s that a device achieves on this model; not its peak.
        bandwidth: bytes/s that a device sends while it also receives.
    """
    return (all_reduce_bytes(gradient_bytes, devices) / bandwidth) / (batch * training_flops / flop_rate)


def step_time(compute: float, communication: float = 0.0, update: float = 0.0, *, overlap: bool = False) -> float:
    """T: a training step, in the unit of its arguments.

    Args:
        compute: x, forward and backward.
        communication: k, the all-reduce.
        update: u, the optimizer.
        overlap: whether the all-reduce hides behind the backward as far as it can, or not at all.
    """
    if overlap:
        return compute * FORWARD + max(compute * BACKWARD, communication) + update
    return compute + communication + update


def step_ratio(ratio: float, communication: float = 0.0, update: float = 0.0, *, overlap: bool = False) -> float:
    """Seconds of an R-Block step over those of a plain one, on the same N devices.

    Args:
        ratio: r, from flop_ratio.
        communication: k, in units of the compute of a plain step; 0 on one device.
        update: u, in the same unit.
        overlap: as in step_time.
    """
    return step_time(ratio, communication, update, overlap=overlap) / step_time(
        1.0, communication, update, overlap=overlap
    )


def efficiency_ratio(ratio: float, communication: float, update: float = 0.0, *, overlap: bool = False) -> float:
    """R-Block's weak-scaling efficiency over plain training's; arguments as in step_ratio."""
    return step_ratio(ratio, 0.0, update) / step_ratio(ratio, communication, update, overlap=overlap)
