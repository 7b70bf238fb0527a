"""What a converted model keeps in memory: the part before the fork once, the part behind it twice, and no more."""

import copy
import weakref

import pytest
import timm
import torch
import torch.nn.functional as F
from rblock_fx.sharing import save_masked_only
from torch import nn

from benchmarks import bench_memory, models
from benchmarks.live_bytes import LiveBytes, allocator_peak
from rblock_fx import apply_rblock, describe, sharing
from rblock_fx.masks.methods import BDropDML

SHARED = "save_masked_only("


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


def test_the_recorder_gives_what_a_hand_counts_and_the_allocator_says():
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
def test_the_peak_is_that_of_an_ideal_late_fork(name, method):
    step = bench_memory.Step(name, method, 16, "cpu")
    measured = step.measure()
    ideal = bench_memory.Step(name, "plain", 16, "cpu").ideal(*step.first_site())
    assert measured["peak"] <= 1.02 * ideal["ideal_peak"]
    assert measured["activations"] <= 1.02 * ideal["ideal_activations"]
    plain = bench_memory.Step(name, "plain", 16, "cpu").measure()
    twice = bench_memory.Step(name, "two forwards", 16, "cpu").measure()
    assert plain["activations"] < measured["activations"] < twice["activations"]


def test_activations_before_the_fork_are_stored_once(name):
    converted = bench_memory.Step(name, "R-Block, last two", 16, "cpu")
    site, _ = converted.first_site()
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
def test_networks_of_one_path_double_nothing_but_the_map(architecture):
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
    inlined = converted.rblock.conversion.inlined
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


def masked_behind_a_relu(share, dtype=torch.float64, hooks=None, relu=F.relu_):
    """A map masked behind the fork, with a convolution on either side; the gradients of first and second order."""
    torch.manual_seed(0)
    x = torch.randn(4, 8, 9, 9, dtype=dtype, requires_grad=True)
    weight = torch.randn(8, 8, 3, 3, dtype=dtype, requires_grad=True)
    mask = BDropDML(0.4, 3, "exact", (8, 9, 9), 1, forks=False)
    with hooks or torch.enable_grad():
        y = relu(torch.conv2d(x, weight, padding=1))
        masked = mask(y)
        if share:
            save_masked_only(y, masked)
        del y
        output = torch.conv2d(masked, weight).square().sum()
    first = torch.autograd.grad(output, (x, weight), create_graph=hooks is None)
    second = torch.autograd.grad(first[0].square().sum(), (x, weight)) if hooks is None else ()
    return [*first, *second]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("relu", [F.relu, F.relu_, F.leaky_relu_, F.leaky_relu, F.relu6])
def test_a_relu_that_saves_the_masked_map_gives_the_same_gradients(dtype, relu):
    expected = masked_behind_a_relu(share=False, dtype=dtype, relu=relu)
    gradients = masked_behind_a_relu(share=True, dtype=dtype, relu=relu)
    assert len(gradients) == 4
    for gradient, other in zip(gradients, expected, strict=True):
        assert torch.equal(gradient, other)


@pytest.mark.parametrize("relu", [F.relu, F.relu_, F.leaky_relu_])
def test_the_map_before_the_mask_is_freed(relu):
    x = torch.randn(4, 8, 9, 9, requires_grad=True)
    mask = BDropDML(0.4, 3, "exact", (8, 9, 9), 1, forks=False)
    for share in (False, True):
        y = relu(2 * x)
        masked = mask(y)
        if share:
            save_masked_only(y, masked)
        storage = weakref.ref(y.untyped_storage())
        del y
        assert (storage() is None) == share


def test_saved_tensors_that_belong_to_other_hooks_stay_theirs():
    expected = masked_behind_a_relu(share=False, hooks=torch.autograd.graph.save_on_cpu())
    gradients = masked_behind_a_relu(share=True, hooks=torch.autograd.graph.save_on_cpu())
    assert all(map(torch.equal, gradients, expected))


def test_a_masked_map_changed_in_place_afterwards_is_an_error():
    x = torch.randn(4, 8, 9, 9, requires_grad=True)
    y = (2 * x).relu()
    masked = BDropDML(0.4, 3, "exact", (8, 9, 9), 1, forks=False)(y)
    save_masked_only(y, masked)
    with torch.no_grad():
        masked.add_(1)
    with pytest.raises(RuntimeError, match=r"shape \(4, 8, 9, 9\), which a ReLU needs .* changed in place"):
        masked.sum().backward()


@pytest.mark.parametrize("other", [nn.GELU(), nn.BatchNorm2d(8), nn.Identity()])
def test_what_no_relu_gave_is_left_alone(other):
    x = torch.randn(4, 8, 9, 9, requires_grad=True)
    gradients = []
    for share in (False, True):
        y = other(2 * x)
        if share:
            save_masked_only(y, y * 2)
            save_masked_only(y.detach(), y * 2)
        gradients += torch.autograd.grad(y.square().sum(), x)
    assert torch.equal(*gradients)


class ThreeStages(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = (nn.Sequential(nn.Conv2d(c, 4, 3, padding=1), nn.ReLU()) for c in (3, 4, 4))

    def forward(self, x):
        return self.c(self.b(self.a(x))).mean((2, 3))


class ChangedInPlace(ThreeStages):
    def forward(self, x):
        x = self.b(self.a(x)).mul_(2)
        return self.c(x).mean((2, 3))


class GivesItsMaps(ThreeStages):
    def forward(self, x):
        x = self.b(self.a(x))
        return self.c(x).mean((2, 3)), x.flatten(2)


class UsesItsMapWithin(ThreeStages):
    """Stage b gives its map and, beside it, something computed of it."""

    class Branching(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.side = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 1)

        def forward(self, x):
            x = self.conv(x).relu()
            return [x, self.side(x)]

    def __init__(self):
        super().__init__()
        self.b = self.Branching()

    def forward(self, x):
        first, second = self.b(self.a(x))
        return self.c(first + second).mean((2, 3))


class KeepsItsMap(ThreeStages):
    """Stage b keeps its map, for a loss of someone else's."""

    class Keeping(nn.Sequential):
        def forward(self, x):
            self.last = super().forward(x)
            return self.last

    def __init__(self):
        super().__init__()
        self.b = self.Keeping(*self.b)


@pytest.mark.parametrize(
    ("network", "sites", "shared"),
    [
        (ThreeStages, ["a", "b"], ["b"]),
        (ThreeStages, ["a", "b", "c"], ["b", "c"]),
        (ThreeStages, ["b"], []),
        (ChangedInPlace, ["a", "b"], []),
        (GivesItsMaps, ["a", "b"], []),
        (KeepsItsMap, ["a", "b"], []),
    ],
)
def test_maps_behind_the_fork_are_shared_where_nothing_can_change_them(network, sites, shared):
    model = apply_rblock(network(), sites, input_size=(3, 16, 16), drop_prob=0.4)
    code = describe(model).code
    assert code.count(SHARED) == len(shared)
    for path in shared:
        assert f"{SHARED}{path}, rblock_{path}, " in code
    output = model(torch.randn(2, 3, 16, 16))
    (output if isinstance(output, torch.Tensor) else output[0] * output[1].sum()).sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def test_a_map_that_its_module_uses_within_is_not_shared():
    code = describe(apply_rblock(UsesItsMapWithin(), ["a", "b"], input_size=(3, 16, 16))).code
    # The other item, which is no ReLU's, may be.
    assert code.count(SHARED) == 1
    assert f"{SHARED}getitem_1, rblock_b_map1, " in code


def test_a_loss_on_the_map_that_a_hook_sees_gets_its_gradient(monkeypatch):
    """As feature distillation does it: the hook sees the map before the mask."""
    torch.manual_seed(0)
    model = apply_rblock(ThreeStages(), ["a", "b"], input_size=(3, 16, 16), drop_prob=0.6)
    seen = []
    model.b[1].register_forward_hook(lambda _module, _args, output: seen.append(output))
    torch.manual_seed(1)
    (model(torch.randn(2, 3, 16, 16)).sum() + seen[0].square().sum()).backward()
    gradient = model.b[0].weight.grad
    torch.manual_seed(1)
    x = torch.randn(2, 3, 16, 16)
    model.zero_grad()
    monkeypatch.setattr(sharing, "SIGN_ONLY", ())
    (model(x).sum() + seen[1].square().sum()).backward()
    assert torch.equal(gradient, model.b[0].weight.grad)


class UsedElsewhere(nn.Module):
    """A small network whose second masked map reaches the loss by another way, too."""

    def __init__(self, way):
        super().__init__()
        self.c0, self.c1, self.c2 = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 1)
        self.a0, self.act, self.fc = nn.ReLU(), Act(way), nn.Linear(8, 5)
        self.way = way

    def forward(self, x):
        y = self.c1(self.a0(self.c0(x)))
        view = y.flatten(2) if self.way == "view" else None
        z = self.act(y)
        if self.way == "in place":
            return self.fc((self.c2(z) + y).mean((2, 3)))
        if self.way == "view":
            return self.fc(self.c2(z).mean((2, 3)) + view.mean(2))
        if self.way == "twice":
            return self.fc(self.c2(z[0]).mean((2, 3)) + z[1].mean((2, 3)))
        return self.fc(self.c2(z).mean((2, 3)))


class Act(nn.Module):
    def __init__(self, way):
        super().__init__()
        self.way, self.feats = way, []

    def forward(self, y):
        z = F.relu(y, inplace=self.way in ("in place", "view"))
        if self.way == "container":
            self.feats[:] = [z]
        if self.way == "gradient hook" and z.requires_grad:
            z.register_hook(lambda gradient: gradient + 0.1)
        return (z, z) if self.way == "twice" else z


WAYS = ["in place", "view", "twice", "container", "gradient hook", "mask hook", "mask pre-hook", "mask backward hook"]


@pytest.mark.parametrize("way", WAYS)
def test_a_map_that_is_used_by_another_way_keeps_its_gradient(way, monkeypatch):
    torch.manual_seed(0)
    model = apply_rblock(UsedElsewhere(way), ["a0", "act"], drop_prob=0.5, input_size=(3, 8, 8))
    seen = []
    last = [module for module in model.rblock.modules() if isinstance(module, BDropDML)][-1]
    if way == "mask hook":
        last.register_forward_hook(lambda _module, args, _output: seen.append(args[0]))
    if way == "mask pre-hook":
        last.register_forward_pre_hook(lambda _module, args: seen.append(args[0]))
    if way == "mask backward hook":
        last.register_full_backward_hook(lambda _module, gradients, _output: (gradients[0] + 0.1,))
    images = torch.randn(4, 3, 8, 8)

    def gradients():
        torch.manual_seed(1)
        seen.clear()
        model.zero_grad()
        loss = model(images).square().sum()
        for kept in [*seen, *(model.act.feats if way == "container" else [])]:
            loss = loss + 10 * kept.square().mean()
        loss.backward()
        return [parameter.grad.clone() for parameter in model.parameters()]

    ours = gradients()
    monkeypatch.setattr(sharing, "SIGN_ONLY", ())
    for one, other in zip(ours, gradients(), strict=True):
        assert torch.equal(one, other)
