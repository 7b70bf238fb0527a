"""The cost model of benchmarks/cost_model.py against counts of real training steps and a simulated ring of devices."""

import pytest
import timm
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from benchmarks import cost_model
from rblock_fx import apply_rblock, list_sites
from rblock_fx.stages import Site

# All their multiplications are those of convolutions and linear layers.
MODELS = ("test_resnet", "test_efficientnet", "test_convnext", "test_nfnet", "test_mambaout")
SIZE = (3, 64, 64)

ratios = st.floats(1, 2)
shares = st.floats(0, 1000)
updates = st.floats(0, 2)
overlaps = st.booleans()


def sites_of(costs, channels=None):
    channels = channels or [8] * len(costs)
    return [
        Site(index=i, path=f"layer{i}", shape=(c, 4, 4), channel_axis=1, cost_before=cost)
        for i, (cost, c) in enumerate(zip(costs, channels, strict=True))
    ]


def plain_net(name):
    torch.manual_seed(0)
    return timm.create_model(name, num_classes=5).train()


def multiplications_of_a_step(model, images):
    """Forward and backward of convolutions and linear layers: what each takes is read off the tensors that pass it."""
    total = 0

    def count(module, inputs, output):
        nonlocal total
        out, weight = output.numel(), module.weight
        per_element = weight[0].numel()  # of a linear layer, or of one group of a convolution
        total += out * per_element * (2 + inputs[0].requires_grad)

    layers = [module for module in model.modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    hooks = [layer.register_forward_hook(count) for layer in layers]
    model(images).sum().backward()
    for hook in hooks:
        hook.remove()
    return total


@pytest.mark.parametrize("name", MODELS)
def test_the_flop_ratio_of_every_stage_is_what_a_training_step_multiplies(name):
    images = torch.randn(2, *SIZE)
    plain = plain_net(name)
    stages = list_sites(plain, SIZE)
    once = multiplications_of_a_step(plain, images)
    assert len(stages) >= 4
    for first in range(len(stages)):
        model = apply_rblock(plain_net(name), [site.path for site in stages[first:]], input_size=SIZE)
        counted = multiplications_of_a_step(model, images) / once
        low, high = cost_model.flop_ratio_bounds(stages[first:], stages)
        assert low - 0.01 <= counted <= high + 0.01, stages[first].path  # a stage's cost is of the forward in eval mode
        assert cost_model.flop_ratio(stages[first:]) == low
        assert low == pytest.approx(2 - stages[first].cost_before)


def test_the_share_of_the_first_layer_makes_the_flop_ratio_exact():
    """Three 1x1 convolutions on one map: FLOPs go as channels in times channels out."""
    net = nn.Sequential(nn.Conv2d(3, 10, 1), nn.ReLU(), nn.Conv2d(10, 6, 1), nn.ReLU(), nn.Conv2d(6, 5, 1))
    images = torch.randn(2, 3, 8, 8)
    forward = [3 * 10, 10 * 6, 6 * 5]
    once = multiplications_of_a_step(net, images)
    assert once == 2 * 64 * (3 * sum(forward) - forward[0])
    site = sites_of([sum(forward[:2]) / sum(forward)])
    model = apply_rblock(net, ["3"], input_size=(3, 8, 8))
    counted = multiplications_of_a_step(model, images) / once
    assert cost_model.flop_ratio(site, forward[0] / sum(forward)) == pytest.approx(counted, rel=1e-12)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=6), st.floats(0, 1))
def test_only_the_first_site_decides_what_the_flops_are(costs, extra):
    ratio = cost_model.flop_ratio(sites_of(costs))
    assert ratio == cost_model.flop_ratio(sites_of([min(costs)]))
    assert 1 <= ratio <= 2
    assert cost_model.flop_ratio(sites_of([*costs, extra])) >= ratio
    assert cost_model.flop_ratio(sites_of(costs), 0.0) <= cost_model.flop_ratio(sites_of(costs), min(costs))


def test_no_sites_is_an_error():
    with pytest.raises(ValueError, match=r"no sites; expected those that are masked"):
        cost_model.flop_ratio([])


def saved_bytes(model, images, site=None):
    """Bytes that a forward keeps for backward: in all, when a module had returned, and of the map that it gave."""
    own = {t.untyped_storage().data_ptr() for t in [images, *model.parameters(), *model.buffers()]}
    kept, until, outputs = {}, {}, []

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage
        return tensor

    def hook(_module, _inputs, output):
        until.update(kept)
        outputs.append(until.get(output.untyped_storage().data_ptr()))

    handle = model.get_submodule(site).register_forward_hook(hook) if site else None
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(images)
    if handle is not None:
        handle.remove()
    return [sum(storage.nbytes() for storage in group if storage) for group in (kept.values(), until.values(), outputs)]


def saved_by_a_sample(model, *site):
    """As saved_bytes, without what does not grow with the batch, such as weights that a layer standardises."""
    two, four = (saved_bytes(model, torch.randn(rows, *SIZE), *site) for rows in (2, 4))
    return [(more - less) / 2 for less, more in zip(two, four, strict=True)]


@pytest.mark.parametrize("name", MODELS)
def test_activation_memory_is_the_prefix_and_two_suffixes_and_the_maps_that_sites_keep(name):
    stages = list_sites(plain_net(name), SIZE)
    for site in stages[:-1]:  # what follows the last stage, pooling, does not keep its input
        once, before, own_map = saved_by_a_sample(plain_net(name), site.path)
        converted = apply_rblock(plain_net(name), [site.path], input_size=SIZE)
        counted = saved_by_a_sample(converted)[0] / once
        predicted = cost_model.activation_ratio(before / once, own_map / once)
        assert predicted == pytest.approx(counted, rel=0.02), site.path


@pytest.mark.parametrize(("name", "size"), [("resnet18", 96), ("resnet50", 96), ("efficientnet_b0", 96)])
def test_the_activation_share_of_list_sites_is_a_rough_one(name, size):
    images = torch.randn(2, 3, size, size)
    stages = list_sites(plain_net(name), images.shape[1:])
    for site in stages[1:]:
        once, before, _ = saved_bytes(plain_net(name), images, site.path)
        assert cost_model.activation_share_before([site], stages) == pytest.approx(before / once, abs=0.15), site.path


@given(st.integers(1, 6), st.data())
def test_activation_shares_of_stages_of_one_kind_are_exact(count, data):
    """Stages of 1x1 convolutions that keep their channels: C^2 FLOPs and C elements a position, of any size."""
    channels = data.draw(st.lists(st.integers(1, 512), min_size=count, max_size=count))
    elements = data.draw(st.lists(st.integers(1, 10**6), min_size=count, max_size=count))
    flops = [c * n for c, n in zip(channels, elements, strict=True)]
    stages = sites_of([sum(flops[: i + 1]) / sum(flops) for i in range(count)], channels)
    for i in range(count):
        want = sum(elements[: i + 1]) / sum(elements)
        assert cost_model.activation_share_before(stages[i:], stages) == pytest.approx(want, rel=1e-6, abs=1e-6)


@given(st.integers(1, 12), st.integers(1, 10**9))
def test_a_ring_sends_what_its_devices_pass_on(devices, gradient_bytes):
    """Each device holds one chunk of N; every chunk makes N - 1 hops to be summed and N - 1 to be spread."""
    chunk = gradient_bytes / devices
    sent = [0.0] * devices
    for owner in range(devices):
        for hop in range(2 * (devices - 1)):
            sent[(owner + hop) % devices] += chunk
    for bytes_of_one in sent:
        assert cost_model.all_reduce_bytes(gradient_bytes, devices) == pytest.approx(bytes_of_one)


@given(st.integers(1, 512), st.integers(1, 256))
def test_the_share_of_communication_is_seconds_over_seconds(devices, batch):
    share = cost_model.communication_share(
        100e6, devices, batch=batch, training_flops=24e9, flop_rate=40e12, bandwidth=25e9
    )
    seconds = cost_model.all_reduce_bytes(100e6, devices) / 25e9
    assert share * batch * 24e9 / 40e12 == pytest.approx(seconds)


@given(ratios, shares, updates, overlaps)
def test_the_step_ratio_lies_between_the_compute_s_and_1_and_falls_with_communication(ratio, share, update, overlap):
    found = cost_model.step_ratio(ratio, share, update, overlap=overlap)
    assert 1 <= found <= ratio * (1 + 1e-12)
    more = cost_model.step_ratio(ratio, 2 * share + 0.1, update, overlap=overlap)
    assert more <= found * (1 + 1e-12)
    assert cost_model.step_ratio(ratio, share, update + 0.1, overlap=overlap) <= found * (1 + 1e-12)


@given(ratios, overlaps)
def test_the_limits_are_the_flop_ratio_and_1(ratio, overlap):
    assert cost_model.step_ratio(ratio) == ratio
    assert cost_model.step_ratio(ratio, 0.0, overlap=overlap) == pytest.approx(ratio)
    assert cost_model.step_ratio(ratio, 1e9, overlap=overlap) == pytest.approx(1, abs=1e-6)
    assert cost_model.efficiency_ratio(ratio, 0.0, overlap=overlap) == pytest.approx(1)
    assert cost_model.efficiency_ratio(ratio, 1e9, overlap=overlap) == pytest.approx(ratio, rel=1e-6)


@given(ratios, shares, updates)
def test_overlap_never_lengthens_a_step_and_hides_all_of_a_short_all_reduce(ratio, share, update):
    apart = cost_model.step_time(ratio, share, update)
    hidden = cost_model.step_time(ratio, share, update, overlap=True)
    assert hidden <= apart * (1 + 1e-12)
    assert hidden >= (max(ratio, share) + update) * (1 - 1e-12)
    short = min(share, 2 / 3)
    assert cost_model.step_ratio(ratio, short, overlap=True) == pytest.approx(ratio)


@given(ratios, shares, updates, overlaps)
def test_r_block_scales_no_worse_than_plain_training(ratio, share, update, overlap):
    def efficiency(compute):
        return cost_model.step_time(compute, 0.0, update) / cost_model.step_time(
            compute, share, update, overlap=overlap
        )

    found = cost_model.efficiency_ratio(ratio, share, update, overlap=overlap)
    assert found == pytest.approx(efficiency(ratio) / efficiency(1))
    assert found >= 1 - 1e-9


@given(st.floats(1.01, 2), st.floats(0.01, 100), st.integers(2, 64))
def test_more_devices_bring_the_step_ratio_closer_to_1(ratio, seconds, devices):
    def on(count):
        share = cost_model.communication_share(
            seconds, count, batch=1, training_flops=1.0, flop_rate=1.0, bandwidth=1.0
        )
        return cost_model.step_ratio(ratio, share)

    assert on(2 * devices) < on(devices) < on(1) == ratio
