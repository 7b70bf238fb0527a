"""Batch statistics behind the fork: of each sub-model alone, or of all 2N rows."""

import copy
import pickle

import numpy as np
import pytest
import timm
import torch
from timm.layers import (
    BatchNormAct2d,
    convert_splitbn_model,
    convert_sync_batchnorm,
    freeze_batch_norm_2d,
    unfreeze_batch_norm_2d,
)
from torch import nn
from torchvision.models.video.resnet import BasicBlock, BasicStem, Conv3DSimple
from torchvision.ops import FrozenBatchNorm2d

from rblock_fx import ConversionError, apply_rblock, remove_rblock
from tests.oracles import recorded_masks, two_forwards

STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


class Net(nn.Module):
    """One batch norm before its site, two behind it, and one of vectors before the classifier."""

    def __init__(self, norm, axes=2):
        super().__init__()
        torch.manual_seed(0)
        conv = {2: nn.Conv2d, 3: nn.Conv3d}[axes]
        self.stem = conv(3, 8, 3, padding=1)
        self.norm0 = norm(8)
        self.site = conv(8, 8, 3, padding=1)
        self.norm1 = norm(8)
        self.conv = conv(8, 6, 3, padding=1)
        self.norm2 = norm(6)
        self.norm3 = nn.BatchNorm1d(6)
        self.fc = nn.Linear(6, 5)
        self.double()

    def forward(self, x):
        x = self.site(self.norm0(self.stem(x)).sigmoid())
        x = self.norm2(self.conv(self.norm1(x).sigmoid()))
        return self.fc(self.norm3(x.flatten(2).mean(2)))


class Conditional(nn.BatchNorm2d):
    """A layer of the user's with an input of its own."""

    def forward(self, input, shift=None):
        output = super().forward(input=input)
        return output if shift is None else output + shift


class Conditioned(Net):
    def __init__(self):
        super().__init__(Conditional)

    def forward(self, x):
        x = self.site(self.norm0(self.stem(x)).sigmoid())
        x = self.norm2(self.conv(self.norm1(x, x.mean((2, 3), keepdim=True)).sigmoid()))
        return self.fc(self.norm3(x.flatten(2).mean(2)))


NETS = {
    "BatchNorm2d": lambda: Net(nn.BatchNorm2d),
    "BatchNorm3d": lambda: Net(nn.BatchNorm3d, axes=3),
    "BatchNormAct2d": lambda: Net(BatchNormAct2d),
    "SyncBatchNorm": lambda: Net(nn.SyncBatchNorm),
    "SyncBatchNorm of 3-D maps": lambda: Net(nn.SyncBatchNorm, axes=3),
    "SyncBatchNormAct": lambda: convert_sync_batchnorm(Net(BatchNormAct2d)),
    "cumulative average": lambda: Net(lambda width: nn.BatchNorm2d(width, momentum=None)),
    "cumulative average of BatchNormAct2d": lambda: Net(lambda width: BatchNormAct2d(width, momentum=None)),
    "momentum of 0.7": lambda: Net(lambda width: nn.BatchNorm2d(width, momentum=0.7)),
    "no running statistics": lambda: Net(lambda width: nn.BatchNorm2d(width, track_running_stats=False)),
    "not affine": lambda: Net(lambda width: nn.BatchNorm2d(width, affine=False)),
    "with a condition": Conditioned,
}


def samples(rows, axes=2):
    return torch.randn(rows, 3, *(8, 7, 5)[:axes], dtype=torch.float64)


def axes_of(net):
    return net.stem.weight.dim() - 2


def per_submodel(net, drop_prob=0.4):
    size = tuple(samples(1, axes_of(net)).shape[1:])
    return apply_rblock(net, ["site"], batch_norm="per_submodel", drop_prob=drop_prob, input_size=size)


def assert_same_buffers(model, expected, prefix=""):
    buffers = dict(model.named_buffers())
    for key, want in expected.named_buffers():
        torch.testing.assert_close(buffers[key], want, msg=lambda text, key=key: f"{prefix}{key}: {text}")


def assert_trains_as_two_forwards(model, plain, x, before=("stem", "norm0")):
    """One step of the model against two forwards of the plain one.

    Both give the same maps before the fork, where the model runs once: there the statistics must be of one forward.
    """
    with recorded_masks(model) as recorded:
        output = model(x)
    untouched = {name: copy.deepcopy(plain.get_submodule(name)) for name in before}
    expected = two_forwards(plain, {"site": recorded["site"]}, x)
    assert (recorded["site"] == 0).any()
    torch.testing.assert_close(output, expected)
    weight = torch.randn(output.shape, dtype=output.dtype)
    (output * weight).sum().backward()
    (expected * weight).sum().backward()
    for (key, got), want in zip(model.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(got.grad, want.grad, msg=lambda text, key=key: f"{key}: {text}")
    hidden = x
    for name, module in untouched.items():
        hidden = module(hidden)
        plain.get_submodule(name).load_state_dict(module.state_dict())
    assert_same_buffers(model, plain)


@pytest.mark.parametrize("name", NETS)
def test_per_submodel_training_is_two_forwards(name):
    plain, model = NETS[name](), per_submodel(NETS[name]())
    assert list(model.state_dict()) == list(plain.state_dict())
    optimizers = [torch.optim.SGD(net.parameters(), 0.1) for net in (plain, model)]
    for rows in (4, 3, 5):
        assert_trains_as_two_forwards(model, plain, samples(rows, axes_of(plain)))
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    assert list(model.state_dict()) == list(plain.state_dict())
    plain.load_state_dict(model.state_dict())
    x = samples(3, axes_of(plain))
    assert torch.equal(model.eval()(x), plain.eval()(x))


def test_counts_updates_once_before_the_fork_twice_behind():
    model = per_submodel(NETS["BatchNorm2d"]())
    for _ in range(3):
        model(samples(4))
    assert [int(model.get_submodule(f"norm{i}").num_batches_tracked) for i in range(4)] == [3, 6, 6, 6]


def build(name, convert=lambda model: model):
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=5)
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():  # timm starts the gains of residual branches, and biases, at 0
                parameter.normal_(0.5, 0.1)
    return convert(model).train()


@pytest.mark.parametrize(
    ("name", "convert"),
    [
        ("test_resnet", lambda model: model),
        ("test_efficientnet", lambda model: model),
        ("test_byobnet", lambda model: model),
        ("test_efficientnet", convert_sync_batchnorm),
        ("test_resnet", nn.SyncBatchNorm.convert_sync_batchnorm),
    ],
    ids=["resnet", "efficientnet", "byobnet", "efficientnet, synchronised by timm", "resnet, synchronised by torch"],
)
def test_per_submodel_statistics_are_those_of_two_forwards(name, convert):
    plain = build(name)
    model = apply_rblock(
        build(name, convert), [-2, -1], batch_norm="per_submodel", drop_prob=0.4, input_size=(3, 96, 96)
    )
    assert list(model.state_dict()) == list(plain.state_dict())
    x = torch.randn(4, 3, 96, 96)
    with recorded_masks(model) as recorded:
        output = model(x)
    paths = [site.path for site, _ in model.rblock.conversion.masks]
    prefix = copy.deepcopy(plain)
    expected = two_forwards(plain, {path: recorded[path.replace(".", "_")] for path in paths}, x)
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-4)
    output.square().sum().backward()
    expected.square().sum().backward()
    for (key, got), want in zip(model.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(
            got.grad, want.grad, rtol=1e-3, atol=1e-3, msg=lambda text, key=key: f"{key}: {text}"
        )

    # Before the fork the statistics are of one forward, behind it of two.
    prefix(x)
    once, twice = dict(prefix.named_buffers()), dict(plain.named_buffers())
    updates = {1: 0, 2: 0}
    for key, got in dict(model.named_buffers()).items():
        if key.endswith("num_batches_tracked"):
            updates[int(got)] += 1
            want = twice if got == 2 else once
            for statistic in ("running_mean", "running_var"):
                name_of = key.replace("num_batches_tracked", statistic)
                torch.testing.assert_close(model.get_buffer(name_of), want[name_of], rtol=1e-4, atol=1e-5)
    assert min(updates.values()) > 0


def test_per_submodel_training_of_video_is_two_forwards():
    class Video(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.stem = BasicStem()
            self.site = nn.Conv3d(64, 8, 1)
            self.block = BasicBlock(8, 8, Conv3DSimple)
            self.fc = nn.Linear(8, 5)
            self.double()

        def forward(self, x):
            return self.fc(self.block(self.site(self.stem(x))).mean((2, 3, 4)))

    plain = Video()
    model = apply_rblock(Video(), ["site"], batch_norm="per_submodel", drop_prob=0.4, input_size=(3, 8, 16, 16))
    assert_trains_as_two_forwards(model, plain, torch.randn(2, 3, 8, 16, 16, dtype=torch.float64), before=("stem",))
    assert {int(value) for key, value in model.named_buffers() if key.startswith("block") and "batches" in key} == {2}


@pytest.mark.parametrize("frozen", [["norm0"], ["norm1"], ["norm0", "norm1", "norm2", "norm3"]], ids=str)
@pytest.mark.parametrize("name", ["BatchNorm2d", "BatchNormAct2d", "SyncBatchNorm"])
def test_layers_frozen_by_eval_stay_frozen(name, frozen):
    plain, model = NETS[name](), per_submodel(NETS[name]())
    x = samples(4)
    for net in (plain, model):
        torch.manual_seed(1)
        for path in frozen:
            layer = net.get_submodule(path).eval()
            layer.running_mean.normal_()
            layer.running_var.uniform_(0.5, 2)
    before = {path: copy.deepcopy(model.get_submodule(path).state_dict()) for path in frozen}
    assert_trains_as_two_forwards(model, plain, x)
    for path, state in before.items():
        assert all(torch.equal(model.get_submodule(path).state_dict()[key], value) for key, value in state.items())
    # A layer thawed again takes its place among the others.
    model.train()
    plain.train()
    model.zero_grad()
    plain.zero_grad()
    assert_trains_as_two_forwards(model, plain, x)


def randomise(net):
    torch.manual_seed(2)
    for key, value in net.named_buffers():
        if key.startswith("norm") and value.is_floating_point():
            value.uniform_(0.5, 2)
    return net


def unfrozen(net):
    return unfreeze_batch_norm_2d(freeze_batch_norm_2d(net))


def test_layers_without_batch_statistics_stay():
    plain, model = randomise(Net(FrozenBatchNorm2d)), per_submodel(randomise(Net(FrozenBatchNorm2d)))
    before = {key: value.clone() for key, value in model.norm1.named_buffers()}
    assert_trains_as_two_forwards(model, plain, samples(4))
    assert type(model.norm1) is FrozenBatchNorm2d
    assert all(torch.equal(value, before[key]) for key, value in model.norm1.named_buffers())


@pytest.mark.parametrize("norm", [nn.BatchNorm2d, BatchNormAct2d])
@pytest.mark.parametrize(
    "order",
    [
        "freeze, apply",
        "apply, freeze",
    ],
)
def test_layers_frozen_by_timm_stay_frozen(norm, order):
    plain = freeze_batch_norm_2d(randomise(Net(norm)))
    model = randomise(Net(norm))
    model = per_submodel(freeze_batch_norm_2d(model)) if order == "freeze, apply" else per_submodel(model)
    if order == "apply, freeze":
        model = freeze_batch_norm_2d(model)
    for net in (plain, model):
        net.double()  # timm makes new layers in single precision
    assert list(model.state_dict()) == list(plain.state_dict())
    before = {key: value.clone() for key, value in model.norm1.named_buffers()}
    assert_trains_as_two_forwards(model, plain, samples(4))
    assert all(torch.equal(value, before[key]) for key, value in model.norm1.named_buffers())
    x = samples(3)
    plain.load_state_dict(model.state_dict())
    assert torch.equal(model.eval()(x), plain.eval()(x))


def net_of_maps():
    """Without the layer of vectors, of which timm's converters make layers of maps."""
    net = Net(BatchNormAct2d)
    net.norm3 = nn.Identity()
    return net


def test_split_layers_run_on_each_sub_model():
    plain, model = (convert_splitbn_model(net_of_maps()).double() for _ in range(2))
    assert_trains_as_two_forwards(per_submodel(model), plain, samples(4))


@pytest.mark.parametrize("convert", [convert_sync_batchnorm, convert_splitbn_model, unfrozen])
def test_rejects_layers_replaced_after_the_conversion(convert):
    model = convert(per_submodel(net_of_maps())).double()
    with pytest.raises(ConversionError, match="norm1"):
        model(samples(4))


def test_rejects_one_value_per_channel_as_torch_does():
    x = samples(1)
    with pytest.raises(ValueError, match="more than 1 value per channel") as wanted:
        NETS["BatchNorm2d"]()(x)
    with pytest.raises(ValueError, match="more than 1 value per channel") as got:
        per_submodel(NETS["BatchNorm2d"]())(x)
    assert str(got.value) == str(wanted.value)
    assert apply_rblock(NETS["BatchNorm2d"](), ["site"], input_size=(3, 8, 7))(x).shape == (2, 5)


@pytest.mark.parametrize("name", ["BatchNorm2d", "BatchNormAct2d", "SyncBatchNormAct", "BatchNorm3d"])
def test_copies_keep_their_own_statistics(name):
    plain, model = NETS[name](), per_submodel(NETS[name]())
    for duplicate in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        untrained = copy.deepcopy(plain)
        assert_trains_as_two_forwards(duplicate, untrained, samples(4, axes_of(plain)))
        assert_same_buffers(model, plain, "the model that was copied: ")
        restored = remove_rblock(duplicate)
        assert [type(module) for module in restored.modules()] == [type(module) for module in plain.modules()]
        x = samples(3, axes_of(plain))
        assert torch.equal(restored(x), untrained(x))
        assert_same_buffers(restored, untrained)


def test_joint_statistics_are_of_the_2n_rows():
    plain = Net(nn.BatchNorm2d)
    model = apply_rblock(Net(nn.BatchNorm2d), ["site"], drop_prob=0.4, input_size=(3, 8, 7))
    x = samples(4)
    with recorded_masks(model) as recorded:
        output = model(x)
    maps = plain.site(plain.norm0(plain.stem(x)).sigmoid())
    rows = (torch.cat((maps, maps)) * recorded["site"]).detach().numpy()
    mean, variance = rows.mean((0, 2, 3)), rows.var((0, 2, 3))
    unbiased = rows.var((0, 2, 3), ddof=1)
    np.testing.assert_allclose(model.norm1.running_mean.numpy(), 0.1 * mean, rtol=1e-6)
    np.testing.assert_allclose(model.norm1.running_var.numpy(), 0.9 + 0.1 * unbiased, rtol=1e-6)
    normalised = (rows - mean[:, None, None]) / np.sqrt(variance + 1e-5)[:, None, None]
    hidden = plain.norm2(plain.conv(torch.from_numpy(normalised).sigmoid()))
    torch.testing.assert_close(output, plain.fc(plain.norm3(hidden.mean((2, 3)))))
    assert [int(model.get_submodule(f"norm{i}").num_batches_tracked) for i in range(4)] == [1, 1, 1, 1]
    assert_same_buffers(model.norm0, plain.norm0)


def test_evaluated_layers_are_what_they_were():
    plain = build("test_resnet")
    model = apply_rblock(build("test_resnet"), [-2], batch_norm="per_submodel", input_size=(3, 96, 96))
    x = torch.randn(4, 3, 96, 96)
    before = {key: value.clone() for key, value in model.named_buffers()}
    assert torch.equal(model.eval()(x), plain.eval()(x))
    assert all(torch.equal(value, before[key]) for key, value in model.named_buffers())


def test_remove_restores_the_layers():
    model = remove_rblock(apply_rblock(build("test_byobnet"), batch_norm="per_submodel"))
    assert [type(module) for module in model.modules()] == [type(module) for module in build("test_byobnet").modules()]


class NormBeforeAndBehind(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 3, 3, padding=1)
        self.norm = nn.BatchNorm2d(3)

    def forward(self, x):
        return self.norm(self.second(self.norm(input=self.first(x)))).mean((2, 3))


def test_rejects_a_layer_that_runs_before_and_behind_the_fork():
    with pytest.raises(
        ConversionError, match="'norm' must run on each sub-model alone, but it also runs before the fork"
    ):
        apply_rblock(NormBeforeAndBehind(), "second", batch_norm="per_submodel", input_size=(3, 8, 8))
    assert len(apply_rblock(NormBeforeAndBehind(), "second", input_size=(3, 8, 8))(torch.randn(2, 3, 8, 8))) == 4
    model = apply_rblock(NormBeforeAndBehind(), "first", batch_norm="per_submodel", input_size=(3, 8, 8))
    model(torch.randn(2, 3, 8, 8))
    assert model.norm.num_batches_tracked == 4  # two calls, each of them for either sub-model
