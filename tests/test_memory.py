"""What a converted model keeps in memory: the part before the fork once, the part behind it twice, and no more."""

import copy
import weakref

import pytest
import timm
import torch
from torch import nn

from benchmarks import bench_memory, models
from benchmarks.live_bytes import LiveBytes, allocator_peak
from rblock_fx import apply_rblock, describe
from rblock_fx.masks.methods import BDropDML


def tiny(name, last_two, size=32):
    return models.Benchmarked(lambda: timm.create_model(name, num_classes=10), (3, size, size), 10, 16, last_two)


TINY = {
    "test_resnet": tiny("test_resnet", ("layer3", "layer4")),
    "test_efficientnet": tiny("test_efficientnet", ("blocks.3", "blocks.4")),
    "test_convnext": tiny("test_convnext", ("stages.2", "stages.3")),
    "test_nfnet": tiny("test_nfnet", ("stages.2", "final_conv")),
    "test_mambaout": tiny("test_mambaout", ("stages.2", "stages.3")),
}


@pytest.fixture(params=TINY)
def name(request, monkeypatch):
    monkeypatch.setitem(models.MODELS, request.param, TINY[request.param])
    return request.param


def recorded(step, site):
    """One step under the recorder, split at a site."""
    live = LiveBytes()
    with bench_memory._split(step.model, site, False, live, None):
        step.record(live)
    return live


def test_recorder_agrees_with_the_allocator():
    """At the peak: ReLU's result, the gradients that come to it and leave it, a weight's gradient, the loss and its."""
    net = nn.Sequential(nn.Linear(100, 200, bias=False), nn.ReLU(), nn.Linear(200, 50, bias=False))
    x = torch.randn(1000, 100)

    def step():
        net.zero_grad()
        net(x).sum().backward()

    step()
    net.zero_grad()
    live = LiveBytes()
    live.add([*net.parameters(), x], "fixed")
    before = live.peak()
    with live:
        step()
    by_hand = 3 * 1000 * 200 * 4 + 50 * 200 * 4 + 2 * 4
    assert live.peak() - before == by_hand
    net.zero_grad()
    assert allocator_peak(step, "cpu") == by_hand


@pytest.mark.parametrize("method", ["R-Block, last two", "R-Block, all"])
def test_peak_is_that_of_an_ideal_late_fork(name, method):
    step = bench_memory.Step(name, method, 16, "cpu")
    measured = step.measure()
    site = describe(step.model).sites[0]
    ideal = bench_memory.Step(name, "plain", 16, "cpu").ideal(site.path, site.is_head)
    assert measured["peak"] <= 1.05 * ideal["ideal_peak"]
    # A ReLU before a mask keeps its map beside the masked one: 8 % of a tiny network with masks at all sites.
    assert measured["activations"] <= 1.1 * ideal["ideal_activations"]
    plain = bench_memory.Step(name, "plain", 16, "cpu").measure()
    twice = bench_memory.Step(name, "two forwards", 16, "cpu").measure()
    assert plain["activations"] < measured["activations"] < twice["activations"]


def test_activations_before_the_fork_are_stored_once(name):
    converted = bench_memory.Step(name, "R-Block, last two", 16, "cpu")
    site = describe(converted.model).sites[0].path
    kept = []
    for step in (converted, bench_memory.Step(name, "plain", 16, "cpu")):
        live = recorded(step, site)
        lives = live.alive_after(live.forward_events)
        kept.append(
            sorted((life.size, life.shape) for life in lives if life.part == "prefix" and life.operation != "fixed")
        )
    assert kept[0] == kept[1]
    assert sum(size for size, _ in kept[0]) > 0


class UNet(nn.Module):
    """Uses maps from before the fork behind it, one of them three times."""

    def __init__(self):
        super().__init__()
        self.down1 = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU())
        self.down2 = nn.Sequential(nn.Conv2d(8, 8, 3, 2, padding=1), nn.ReLU())
        self.bottom = nn.Sequential(nn.Conv2d(8, 8, 3, 2, padding=1), nn.ReLU())
        self.up2 = nn.ConvTranspose2d(8, 8, 2, 2)
        self.join2 = nn.Conv2d(16, 8, 3, padding=1)
        self.up1 = nn.ConvTranspose2d(8, 8, 2, 2)
        self.join1 = nn.Conv2d(16, 8, 3, padding=1)

    def forward(self, x):
        first = self.down1(x)
        second = self.down2(first)
        x = self.bottom(second)
        x = self.join2(torch.concat([self.up2(x), second], 1))
        x = self.join1(torch.concat([self.up1(x), first], 1))
        return x * first + first


@pytest.mark.parametrize(("sites", "doublings"), [(["bottom"], 2), (["down2"], 1), (["down1"], 0)])
def test_a_skip_from_before_the_fork_is_doubled_once(sites, doublings):
    model = apply_rblock(UNet(), sites, input_size=(3, 16, 16))
    assert describe(model).code.count("torch.cat(") == doublings
    assert model(torch.randn(2, 3, 16, 16)).shape == (4, 8, 16, 16)


@pytest.mark.parametrize("architecture", ["densenet121", "hrnet_w18_small", "regnetx_002", "dla46_c"])
def test_networks_of_one_path_double_only_the_map(architecture):
    model = apply_rblock(timm.create_model(architecture), input_size=(3, 64, 64))
    assert describe(model).code.count("torch.cat(") == 0


def outputs_alive(model, x, paths):
    """For each call of a module, in order: the outputs of earlier ones that live then, by the module's path."""
    outputs, log = {}, {}
    handles = []
    for path in paths:

        def before(_module, _args, path=path):
            log[path] = {other for other, reference in outputs.items() if reference() is not None}

        def after(_module, _args, output, path=path):
            if isinstance(output, torch.Tensor):
                outputs[path] = weakref.ref(output)

        module = model.get_submodule(path)
        handles += [module.register_forward_pre_hook(before), module.register_forward_hook(after)]
    with torch.no_grad():
        model(x)
    for handle in handles:
        handle.remove()
    return log


@pytest.mark.parametrize(
    ("build", "sites"),
    [
        (lambda: timm.create_model("test_resnet"), "all"),
        (lambda: timm.create_model("test_efficientnet"), "all"),
        (lambda: timm.create_model("test_resnet", features_only=True, out_indices=(1, 2, 3)), ["layer3"]),
        (UNet, ["bottom"]),
        (UNet, ["down1", "down2"]),
    ],
)
def test_no_map_lives_longer_than_in_the_plain_model(build, sites):
    """Of the modules that the generated forward calls; under no_grad, so that nothing is saved."""
    model = build().train()
    converted = apply_rblock(copy.deepcopy(model), sites, input_size=(3, 32, 32))
    inlined = converted.rblock.conversion.guards.inlined
    called = [
        path
        for path, _ in model.named_modules()
        if path and path not in inlined and path.rpartition(".")[0] in ("", *inlined)
    ]
    x = torch.randn(2, 3, 32, 32)
    expected, alive = outputs_alive(model, x, called), outputs_alive(converted, x, called)
    assert len(alive) > 5
    assert alive.keys() == expected.keys()
    assert [path for path in alive if not alive[path] <= expected[path]] == []


def test_a_mask_keeps_its_factors_alone():
    mask = BDropDML(0.2, 3, "exact", (64, 16, 16), 1, forks=True)
    x = torch.randn(8, 64, 16, 16, requires_grad=True)
    live = LiveBytes()
    live.add([x], "fixed")
    with live:
        masked = mask(x)
    kept = sum(life.size for life in live.alive_after(len(live.events)))
    factors = 8 * 16 * 16 + 2 * 8 * 64 + 2 * 8
    assert kept - 4 * (x.numel() + masked.numel()) <= 4 * factors
