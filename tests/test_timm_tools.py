"""timm's own tools on a converted model: heads, parameter groups, and the replacement of batch norms."""

import copy

import pytest
import timm
import torch
from timm.layers import SplitBatchNorm2d, convert_splitbn_model, convert_sync_batchnorm
from timm.models import group_modules, group_parameters
from timm.optim import create_optimizer_v2, param_groups_layer_decay, param_groups_weight_decay
from timm.utils import freeze
from torch import nn

from rblock_fx import ConversionError, RBlockLoss, apply_rblock, remove_rblock, set_drop_prob, split_pair
from tests.oracles import recorded_masks, two_forwards

SIZE = (3, 64, 64)


def build(name, **options):
    torch.manual_seed(0)
    return timm.create_model(name, num_classes=5, **options).train()


def pair(name, sites=None, **options):
    """A converted model that drops nothing yet, and the plain model with the same weights."""
    return apply_rblock(build(name), sites, **{"drop_prob": 0.0, "input_size": SIZE, **options}), build(name)


@pytest.mark.parametrize("pool", [None, "max"])
@pytest.mark.parametrize("method", ["bdropdml", "r-drop"])  # the second masks the input of the classifier itself
@pytest.mark.parametrize("name", ["test_resnet", "test_efficientnet", "test_byobnet", "test_convnext", "test_nfnet"])
def test_reset_head_trains(name, method, pool):
    model, plain = pair(name, method=method)
    for network in (model, plain):
        torch.manual_seed(1)
        network.reset_classifier(7, global_pool=pool)
    assert list(model.state_dict()) == list(plain.state_dict())
    assert model.num_classes == 7
    x, labels = torch.randn(6, *SIZE), torch.arange(6)
    with torch.no_grad():
        wanted = copy.deepcopy(plain)(x)
        torch.testing.assert_close(copy.deepcopy(model)(x), torch.cat((wanted, wanted)), rtol=1e-3, atol=1e-4)

    set_drop_prob(model, 0.3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    before = model.get_classifier().weight.detach().clone()
    output = model(x)
    assert output.shape == (12, 7)
    assert not torch.equal(*split_pair(output))
    RBlockLoss()(output, labels).backward()
    optimizer.step()
    assert not torch.equal(model.get_classifier().weight, before)
    plain.load_state_dict(model.state_dict())
    assert torch.equal(model.eval()(x), plain.eval()(x))


@pytest.mark.parametrize("name", ["test_resnet", "test_efficientnet"])
def test_head_taken_off_leaves_features(name):
    model, plain = pair(name)
    for network in (model, plain):
        network.reset_classifier(0, "")
    x = torch.randn(6, *SIZE)
    wanted = plain(x)
    assert wanted.dim() == 4
    torch.testing.assert_close(model(x), torch.cat((wanted, wanted)), rtol=1e-3, atol=1e-4)


GROUPED = ["test_resnet", "test_efficientnet", "test_byobnet", "test_convnext", "test_nfnet", "test_maxvit"]


def by_name(model, groups):
    """Parameter groups with names for parameters, in order."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    return [
        {
            **{key: value for key, value in group.items() if key != "params"},
            "names": [names[p] for p in group["params"]],
        }
        for group in groups
    ]


@pytest.mark.parametrize("name", GROUPED)
def test_parameter_groups_are_those_of_the_plain_model(name):
    model, plain = pair(name, input_size=None)  # MaxViT's windows divide its own image size only
    for coarse in (True, False):
        assert model.group_matcher(coarse=coarse) == plain.group_matcher(coarse=coarse)
        got, want = (group_parameters(network, network.group_matcher(coarse)) for network in (model, plain))
        assert got == want
        got, want = (group_modules(network, network.group_matcher(coarse)) for network in (model, plain))
        assert got == want

    without_decay = [getattr(network, "no_weight_decay", set)() for network in (model, plain)]
    assert without_decay[0] == without_decay[1]
    for grouping, options in (
        (param_groups_layer_decay, {"layer_decay": 0.7, "weight_decay": 0.05}),
        (param_groups_weight_decay, {"weight_decay": 0.05}),
    ):
        got, want = (
            by_name(network, grouping(network, no_weight_decay_list=exempt, **options))
            for network, exempt in zip((model, plain), without_decay, strict=True)
        )
        assert got == want
        assert len(got) > 1
    for options in ({"layer_decay": 0.7}, {}):
        optimizers = [
            create_optimizer_v2(network, opt="adamw", lr=0.01, weight_decay=0.05, **options)
            for network in (model, plain)
        ]
        got, want = (
            by_name(network, optimizer.param_groups)
            for network, optimizer in zip((model, plain), optimizers, strict=True)
        )
        assert got == want


def test_maxvit_exempts_parameters_from_decay():
    exempt = build("test_maxvit").no_weight_decay()
    assert exempt
    assert all(parameter.ndim > 1 for name, parameter in build("test_maxvit").named_parameters() if name in exempt)


def split_pairs(module):
    return convert_splitbn_model(module, num_splits=2)


REPLACED = [convert_sync_batchnorm, split_pairs]


@pytest.mark.parametrize("convert", REPLACED)
@pytest.mark.parametrize("name", ["test_resnet", "test_efficientnet"])
def test_batch_norms_can_be_replaced_after_conversion(name, convert):
    model, plain = pair(name, drop_prob=0.4)
    x = torch.randn(4, *SIZE)
    torch.manual_seed(1)
    before = copy.deepcopy(model)(x)
    converted, expected = convert(model), convert(plain)
    assert converted is model
    assert list(model.state_dict()) == list(expected.state_dict())
    got, want = ([getattr(type(m), "_rblock_original", type(m)) for m in net.modules()] for net in (model, expected))
    assert got == want
    assert not any(type(module) is nn.BatchNorm2d for module in model.modules()) or convert is split_pairs

    torch.manual_seed(1)
    output = model.train()(x)
    assert output.shape == (8, 5)
    if convert is convert_sync_batchnorm:  # one process: the statistics are those of all its rows, as before
        assert torch.equal(output, before)
    else:
        assert not torch.equal(output, before)
    RBlockLoss()(output, torch.arange(4)).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    expected.load_state_dict(model.state_dict())
    assert torch.equal(model.eval()(x), expected.eval()(x))
    assert type(remove_rblock(model)) is type(expected)


class SplitNet(nn.Module):
    """All batch norms behind the site."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.body = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.fc = nn.Linear(8, 5)

    def forward(self, x):
        return self.fc(self.body(self.stem(x)).mean((2, 3)))


def test_split_batch_norms_have_a_half_per_sub_model():
    plain = SplitNet().train()
    model = split_pairs(apply_rblock(SplitNet().train(), "stem", drop_prob=0.4, input_size=(3, 12, 12)))
    assert isinstance(model.body[1], SplitBatchNorm2d)
    x = torch.randn(6, 3, 12, 12)
    with recorded_masks(model) as recorded:
        output = model(x)
    first, second = copy.deepcopy(plain), copy.deepcopy(plain)
    torch.testing.assert_close(output, two_forwards(plain, recorded, x))
    for network, mask in zip((first, second), recorded["stem"].chunk(2), strict=True):
        two_forwards(network, {"stem": torch.cat((mask, mask))}, x)  # twice the same sub-model
        network.body[1].running_mean.mul_(0.1 / 0.19)  # of which once is wanted: 1 - 0.9 of 1 - 0.9^2
    torch.testing.assert_close(model.body[1].running_mean, first.body[1].running_mean)
    torch.testing.assert_close(model.body[1].aux_bn[0].running_mean, second.body[1].running_mean)


def assert_statistics_of_two_forwards(model, plain):
    x = torch.randn(8, *SIZE)
    with recorded_masks(model) as recorded:
        output = model.train()(x)
    paths = [site.path for site, _ in model.rblock.conversion.masks]
    expected = two_forwards(plain.train(), {path: recorded[path.replace(".", "_")] for path in paths}, x)
    torch.testing.assert_close(output, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    "convert",
    [
        convert_sync_batchnorm,
        split_pairs,
    ],
)
@pytest.mark.parametrize("name", ["test_resnet", "test_efficientnet"])
def test_replaced_before_conversion_per_submodel(name, convert):
    plain = convert(build(name)).train()
    model = apply_rblock(copy.deepcopy(plain), batch_norm="per_submodel", drop_prob=0.4, input_size=SIZE)
    assert list(model.state_dict()) == list(plain.state_dict())
    assert_statistics_of_two_forwards(model, plain)


@pytest.mark.parametrize("convert", REPLACED)
@pytest.mark.parametrize("name", ["test_resnet", "test_efficientnet"])
def test_replaced_after_conversion_right_or_refused(name, convert):
    model = apply_rblock(build(name), batch_norm="per_submodel", drop_prob=0.4, input_size=SIZE)
    refusal = None
    try:
        assert_statistics_of_two_forwards(convert(model).train(), convert(build(name)))
    except ConversionError as error:
        refusal = error
    assert refusal is None or "per_submodel" in str(refusal)


@pytest.mark.parametrize("batch_norm", ["joint", "per_submodel"])
@pytest.mark.parametrize(("name", "frozen"), [("test_resnet", "layer4"), ("test_efficientnet", "blocks.4")])
def test_stages_frozen_by_timm_keep_statistics(name, frozen, batch_norm):
    model = apply_rblock(build(name), batch_norm=batch_norm, drop_prob=0.4, input_size=SIZE)
    freeze(model, frozen)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    output = model(torch.randn(4, *SIZE))
    RBlockLoss()(output, torch.arange(4)).backward()
    assert not torch.equal(*split_pair(output))
    changed = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    assert not any(key.startswith(frozen) for key in changed)
    assert any(key.endswith("running_mean") for key in changed)
    for key, parameter in model.named_parameters():
        assert (parameter.grad is None) == key.startswith(frozen)
