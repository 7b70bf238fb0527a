"""Everything that is refused, with the call that would work in the message, and the model left as it was."""

import re

import pytest
import timm
import torch
import torchvision
from accelerate import Accelerator
from torch import nn

from rblock_fx import (
    ConversionError,
    DropSchedule,
    RBlockError,
    SettingError,
    SiteError,
    apply_rblock,
    describe,
    list_sites,
    remove_rblock,
    set_drop_prob,
)
from tests.oracles import Maps


def snapshot(model):
    """All that an error must leave alone."""
    return (
        type(model),
        [(name, id(module), type(module), module.training) for name, module in model.named_modules()],
        [(name, id(value), value._version) for name, value in [*model.named_parameters(), *model.named_buffers()]],
        [sorted(vars(module)) for module in model.modules()],
        [(list(m._forward_hooks), list(m._forward_pre_hooks), list(m._backward_hooks)) for m in model.modules()],
        torch.get_rng_state().tolist(),
    )


@pytest.fixture(scope="module")
def resnet():
    return timm.create_model("test_resnet", num_classes=5)


SETTINGS = [
    ({"method": "bdropdm"}, r"method must be one of .*sdropdml.*, got 'bdropdm' \(did you mean 'bdropdml'\?\)"),
    ({"method": 3}, "method must be one of .*, got 3"),
    ({"calibration": "eq8"}, "calibration must be one of exact, eq6, eq7, got 'eq8'"),
    ({"batch_norm": "split"}, "batch_norm must be one of joint, per_submodel, got 'split'"),
    *[
        ({"drop_prob": value}, rf"drop_prob must be in \[0, 1\), got {re.escape(shown)}")
        for value, shown in [
            *[(value, str(value)) for value in (-0.1, 1.0, 1, float("nan"), float("inf"), True)],
            (1.5, "1.5 (did you mean 0.015?)"),
            (20, "20 (did you mean 0.2?)"),
            ("0.2", "'0.2'"),
            (None, "None"),
            ([0.1, 2.0], "2.0"),
        ]
    ],
    ({"drop_prob": [0.1, 0.2, 0.3]}, r"drop_prob must be one value or one per site \(2\), got 3: \[0.1, 0.2, 0.3\]"),
    ({"block_size": [3]}, r"block_size must be one value or one per site \(2\), got 1: \[3\]"),
    *[
        ({"block_size": value}, f"block_size must be an odd positive integer, got {value!r}")
        for value in (0, 2, -3, 3.0, "3", True, None)
    ],
    ({"method": "c-drop", "drop_prob": 0.6}, r"drop_prob must be at most 0.5 for method='c-drop', .*got 0.6"),
    (
        {"calibration": "eq7", "block_size": 7},
        r"calibration='eq7' needs every side of the map >= block_size, got block_size=7 on a map of 5x5",
    ),
]


@pytest.mark.parametrize(("options", "message"), SETTINGS)
def test_rejects_settings_outside_their_range(resnet, options, message):
    before = snapshot(resnet)
    with pytest.raises(SettingError, match=message):
        apply_rblock(resnet, **options)
    assert snapshot(resnet) == before


SITES = [
    (
        ["layer5"],
        r"ResNet has no module 'layer5'; did you mean 'layer\d'.*Stages are \[.*'layer4'\].*list_sites\(model\)",
    ),
    ("layr3", r"has no module 'layr3'; did you mean 'layer3'"),
    ([], r"sites=\[\] names no site"),
    ((), r"sites=\(\) names no site"),
    ("", r"has no module ''"),
    ([7], "ResNet has no stage 7"),
    ([-9], "ResNet has no stage -9"),
    ([True], "a site is a str or an int, got True"),
    ([2.0], "a site is a str or an int, got 2.0"),
    (b"layer3", "a site is a str or an int, got b'layer3'"),
    ({"layer3": 1}, r"a site is a str or an int, got \{"),
    (torch.tensor(1), r"a site is a str or an int, got tensor\("),
    ("blocks.*", r"no feature map of ResNet matches 'blocks\.\*'"),
    ("fc", r"'fc' does not return a feature map: expected 4 axes .* got \('N', 5\).*sites='head'"),
    ("global_pool", "'global_pool' does not return a feature map"),
    (["layer4", "layer4.0"], r"sites 'layer4' and 'layer4\.0' return the same map; name one"),
    ("head", "sites='head': the classifier's input is not a feature map, .*method='bdropdml'.*method='r-drop'"),
]


@pytest.mark.parametrize(("sites", "message"), SITES)
def test_rejects_unknown_sites(resnet, sites, message):
    before = snapshot(resnet)
    with pytest.raises(SiteError, match=message):
        apply_rblock(resnet, sites)
    assert snapshot(resnet) == before


def test_rejects_a_module_that_never_runs():
    class Idle(Maps):
        def __init__(self):
            super().__init__()
            self.idle = nn.Conv2d(3, 3, 1)

    with pytest.raises(SiteError, match="module 'idle' never runs in a forward, so it has no map"):
        apply_rblock(Idle(), "idle")


def test_rejects_a_model_without_stages():
    vit = timm.create_model("test_vit", num_classes=5)
    assert len(list_sites(vit)) == 0
    with pytest.raises(SiteError, match=r"VisionTransformer has no stage with a feature map.*method='r-drop'"):
        apply_rblock(vit)
    with pytest.raises(SiteError, match="VisionTransformer has no stage"):
        apply_rblock(vit, "all")
    with pytest.raises(SiteError, match=r"'blocks.1' does not return a feature map: .* got \('N', \d+, \d+\)"):
        apply_rblock(vit, "blocks.1")


def test_rejects_a_missing_head():
    headless = timm.create_model("test_resnet", num_classes=0)
    with pytest.raises(SiteError, match="sites='head': ResNet has no classifier that runs"):
        apply_rblock(headless, method="r-drop")


def test_rejects_an_input_size_that_does_not_fit(resnet):
    before = snapshot(resnet)
    with pytest.raises(
        ConversionError, match=r"ResNet does not run on a batch of \('N', 5, 32, 32\).*\n.*input_size=\("
    ):
        apply_rblock(resnet, input_size=(5, 32, 32))
    with pytest.raises(SettingError, match=r"input_size must be the shape of one sample, .* got \(3,\); e.g."):
        apply_rblock(resnet, input_size=(3,))
    with pytest.raises(SettingError, match=r"input_size must be the shape of one sample, .* got 64"):
        apply_rblock(resnet, input_size=64)
    with pytest.raises(SettingError, match=r"input_size must be the shape of one sample, .* got \(3, 0, 32\)"):
        apply_rblock(resnet, input_size=(3, 0, 32))
    assert snapshot(resnet) == before


def test_rejects_a_second_conversion():
    model = apply_rblock(timm.create_model("test_resnet"))
    before = snapshot(model)
    with pytest.raises(
        ConversionError, match=r"RBlockResNet is converted already.*remove_rblock\(model\).*set_drop_prob"
    ):
        apply_rblock(model)
    assert snapshot(model) == before
    with pytest.raises(ConversionError, match="'0' of Sequential is converted already"):
        apply_rblock(nn.Sequential(model))


def compile_in_place(model):
    model.compile()
    return model


def patch_forward(model):
    model.forward = lambda x: type(model).forward(model, x)
    return model


WRAPPERS = [
    (
        patch_forward,
        r"patched with a forward of its own instance; convert the model first: apply_rblock\(model\), then",
    ),
    (nn.DataParallel, r"DataParallel, which mixes the rows .*: DistributedDataParallel\(apply_rblock\(model\)\)"),
    (torch.compile, r"is compiled; convert the model first: torch.compile\(apply_rblock\(model\)\)"),
    (compile_in_place, r"ResNet is compiled; convert the model first"),
    (
        lambda model: Accelerator(cpu=True).prepare(model),
        r"ResNet is prepared by Accelerate; convert the model first: accelerator.prepare\(apply_rblock\(model\)\)",
    ),
    (
        lambda model: Accelerator(cpu=True, mixed_precision="bf16").prepare(model),
        r"ResNet is prepared by Accelerate; convert the model first: accelerator.prepare\(apply_rblock\(model\)\)",
    ),
]


@pytest.mark.parametrize(("wrap", "message"), WRAPPERS)
def test_rejects_wrapped_models(wrap, message):
    model = wrap(timm.create_model("test_resnet"))
    before = snapshot(model)
    with pytest.raises(ConversionError, match=message):
        apply_rblock(model)
    assert snapshot(model) == before


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")
def test_rejects_scripts():
    with pytest.raises(ConversionError, match="scripted, and a script cannot be traced; convert the model first"):
        apply_rblock(torch.jit.script(timm.create_model("test_resnet")))


def test_rejects_distributed_data_parallel(tmp_path):
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        model = nn.parallel.DistributedDataParallel(timm.create_model("test_resnet"))
        with pytest.raises(ConversionError, match=r"wrapped in DistributedDataParallel; convert the model first"):
            apply_rblock(model)
    finally:
        torch.distributed.destroy_process_group()


def test_rejects_non_modules():
    with pytest.raises(ConversionError, match=r"expected a torch.nn.Module, got str: apply_rblock\(timm.create_model"):
        apply_rblock("resnet50")
    with pytest.raises(ConversionError, match=r"expected a torch.nn.Module, got NoneType"):
        list_sites(None)
    named = Maps()
    named.rblock = 3
    with pytest.raises(ConversionError, match="Maps has an attribute 'rblock', where the masks would go; rename it"):
        apply_rblock(named, "stage")


def test_rejects_untraceable_forwards():
    class Branching(Maps):
        def forward(self, x):
            return self.stage(x) if x.sum() > 0 else x

    class Unrolled(Maps):
        def forward(self, x):
            for sample in x:
                assert sample.dim() == 3
            return self.stage(x)

    before = snapshot(model := Unrolled())
    with pytest.raises(
        ConversionError, match=r"forward of Unrolled.* cannot be traced .*Choose sites that lie less deep"
    ):
        apply_rblock(model, "stage", input_size=(3, 8, 8))
    assert snapshot(model) == before
    with pytest.raises(ConversionError, match="Branching does not run on a batch"):
        apply_rblock(Branching(), "stage", input_size=(3, 8, 8))


def test_rejects_random_numbers_around_the_sites():
    class Stochastic(Maps):
        def forward(self, x):
            x = self.stage(x)
            return x + 1 if self.training and torch.rand(()) < 0.5 else x

    torch.manual_seed(3)
    before = snapshot(model := Stochastic())
    with pytest.raises(
        ConversionError, match=r"cannot be traced \(RuntimeError: it draws random numbers, which tracing would freeze\)"
    ):
        apply_rblock(model, "stage", input_size=(3, 8, 8))
    assert snapshot(model) == before


def test_rejects_lazy_layers():
    class Lazy(Maps):
        def __init__(self):
            super().__init__()
            self.stage = nn.LazyConv2d(4, 3)

    with pytest.raises(ConversionError, match="Lazy has lazy layers that no batch has initialised yet"):
        apply_rblock(Lazy(), "stage", input_size=(3, 8, 8))


def test_rejects_hooks_on_modules_around_sites():
    model = torchvision.models.vgg11(weights=None)
    model.features.register_forward_hook(lambda *_: None)
    before = snapshot(model)
    with pytest.raises(
        ConversionError, match="'features' has hooks that would not run in train mode, because a site lies inside"
    ):
        apply_rblock(model)
    assert snapshot(model) == before


def test_rejects_outputs_without_rows():
    class Mixing(Maps):
        def forward(self, x):
            return self.stage(x).sum(0, keepdim=True)

    with pytest.raises(
        ConversionError,
        match=r"generated for Mixing returns \(1, 3, 8, 8\), expected \(2, 3, 8, 8\) with the batch as the first axis",
    ):
        apply_rblock(Mixing(), "stage", input_size=(3, 8, 8))


def test_hooks_do_not_run_during_the_conversion():
    model, seen = timm.create_model("test_resnet"), []
    model.layer4.register_forward_hook(lambda _module, _inputs, output: seen.append(output.shape))
    model.register_forward_hook(lambda _module, _inputs, output: seen.append(output.shape))
    apply_rblock(model)
    list_sites(model)
    assert seen == []
    model.train()(torch.randn(2, 3, 64, 64))
    assert [shape[0] for shape in seen] == [4, 4]


@pytest.mark.parametrize(
    "call",
    [describe, remove_rblock, lambda model: set_drop_prob(model, 0.1), lambda model: DropSchedule(model, 0, 0.1, 10)],
)
def test_rejects_models_that_are_not_converted(resnet, call):
    with pytest.raises(ConversionError, match=r"ResNet is not converted; .*model = apply_rblock\(model, sites="):
        call(resnet)


def test_remove_rejects_wrapped_models():
    model = apply_rblock(timm.create_model("test_resnet"))
    with pytest.raises(ConversionError, match=r"DataParallel wraps the converted model.*remove_rblock\(model.module\)"):
        remove_rblock(nn.DataParallel(model))
    prepared = Accelerator(cpu=True, mixed_precision="bf16").prepare(model)
    with pytest.raises(ConversionError, match=r"prepared by Accelerate.*keep_fp32_wrapper=False"):
        remove_rblock(prepared)
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    bare = accelerator.unwrap_model(prepared, keep_fp32_wrapper=False)
    assert type(remove_rblock(bare)) is timm.models.resnet.ResNet


def test_bad_drop_prob_changes_no_site():
    model = apply_rblock(timm.create_model("test_resnet"), [3, 4], drop_prob=[0.1, 0.2])
    for value in ([0.3, 1.5], [0.3], "0.3", float("nan")):
        with pytest.raises(SettingError):
            set_drop_prob(model, value)
    assert [site.drop_prob for site in describe(model).sites] == [0.1, 0.2]
    for arguments in ((-0.1, 0.2, 10), (0, 1, 10), (0, 0.2, 0), (0, 0.2, 1.5)):
        with pytest.raises(SettingError):
            DropSchedule(model, *arguments)
    assert [site.drop_prob for site in describe(model).sites] == [0.1, 0.2]


def test_every_error_is_a_value_error():
    assert issubclass(RBlockError, ValueError)
    assert all(issubclass(error, RBlockError) for error in (SettingError, SiteError, ConversionError))


def test_converts_a_model_that_accelerate_unwrapped():
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    model = accelerator.prepare(timm.create_model("test_resnet", num_classes=5))
    bare = accelerator.unwrap_model(model, keep_fp32_wrapper=False)
    del bare._is_accelerate_prepared  # Accelerate leaves its mark, by which a model in use is refused
    assert apply_rblock(bare).train()(torch.randn(2, 3, 64, 64)).shape == (4, 5)


UNSUITABLE = {
    "ssdlite320_mobilenet_v3_large": (
        lambda: torchvision.models.detection.ssdlite320_mobilenet_v3_large(weights=None, weights_backbone=None),
        "SSD is a torchvision detector or the backbone of one: a detector has N targets",
    ),
    "raft_small": (
        lambda: torchvision.models.optical_flow.raft_small(weights=None),
        r"RAFT is an optical flow model, .*apply_rblock\(model\.feature_encoder\)",
    ),
    "quantized mobilenet_v2": (
        lambda: torchvision.models.quantization.mobilenet_v2(weights=None, quantize=True),
        "is quantized: its integer layers cannot be trained",
    ),
}


@pytest.mark.parametrize("name", UNSUITABLE)
@pytest.mark.parametrize("call", [list_sites, apply_rblock])
def test_rejects_unsuitable_networks(name, call):
    build, message = UNSUITABLE[name]
    model = build()
    before = type(model), list(model.state_dict())
    with pytest.raises(ConversionError, match=message):
        call(model)
    assert before == (type(model), list(model.state_dict()))
    assert not hasattr(model, "rblock")


def test_converts_a_quantizable_model_in_floating_point():
    model = apply_rblock(torchvision.models.quantization.mobilenet_v2(weights=None))
    assert model.train()(torch.randn(2, 3, 64, 64)).shape[0] == 4


def test_rejects_images_too_small_to_train_on():
    """Inception's auxiliary head, which only trains, takes larger images than the rest."""
    model = torchvision.models.inception_v3(weights=None, init_weights=False)
    message = r"does not run in train mode on .*128, 128\)[\s\S]*input_size=\(3, 299, 299\)"
    with pytest.raises(ConversionError, match=message):
        apply_rblock(model, input_size=(3, 128, 128))
    assert type(model) is torchvision.models.Inception3


def test_rejects_a_video_network_without_a_usual_size():
    with pytest.raises(ConversionError, match=r"for video \(channels, frames, height, width\)"):
        list_sites(nn.Sequential(nn.Conv3d(3, 4, 200), nn.Conv3d(4, 4, 3)))
