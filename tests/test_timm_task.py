"""RBlockTask is timm's ClassificationTask with the R-Block model and its loss, in timm's own task calls."""

import copy
import subprocess
import sys
from types import SimpleNamespace

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.loss import LabelSmoothingCrossEntropy
from timm.task import ClassificationTask, load_task_ema_checkpoint, resume_task_checkpoint
from timm.utils import CheckpointSaver
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from rblock_fx import (
    ConversionError,
    PairError,
    RBlockLoss,
    SettingError,
    SiteError,
    apply_rblock,
    describe,
    set_drop_prob,
    split_pair,
)
from rblock_fx.timm_task import RBlockTask

SIZE = (3, 64, 64)


def build(seed=0):
    torch.manual_seed(seed)
    return timm.create_model("test_resnet", num_classes=5).train()


def batch(rows=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, *SIZE, generator=generator), torch.arange(rows) % 5


def train(task, optimizer, steps, first=0):
    """Steps in the way of timm's train.py; the losses."""
    losses = []
    for step in range(first, first + steps):
        images, target = batch(seed=step)
        result = task(images, target)
        result["loss"].backward()
        nn.utils.clip_grad_norm_(list(task.get_clip_parameters()), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        task.update_ema(step=step + 1)
        losses.append(result["loss"].item())
    return losses


def test_a_step_gives_the_rblock_loss_and_logits_for_the_targets():
    settings = {"sites": ["layer3", "layer4"], "method": "sdropdml", "drop_prob": 0.4, "input_size": SIZE}
    criterion = LabelSmoothingCrossEntropy(0.2)
    task = RBlockTask(build(), criterion, alpha=0.3, temperature=2.0, reduction="mean", verbose=False, **settings)
    model = apply_rblock(build(), **settings)
    assert str(describe(task.get_trainable_module())) == str(describe(model))
    assert task.criterion is criterion
    images, target = batch()
    torch.manual_seed(3)
    output = model(images)
    torch.manual_seed(3)
    result = task(images, target)
    expected = RBlockLoss(criterion, alpha=0.3, temperature=2.0, reduction="mean")(output, target)
    assert torch.equal(result["loss"], expected)
    assert torch.equal(result["output"], split_pair(output)[0])
    result["loss"].backward()
    expected.backward()
    for (name, got), want in zip(task.get_trainable_module().named_parameters(), model.parameters(), strict=True):
        assert torch.equal(got.grad, want.grad), name


def test_the_defaults_are_those_of_apply_rblock_and_rblock_loss():
    task = RBlockTask(build(), verbose=False)
    assert str(describe(task.get_trainable_module())) == str(describe(apply_rblock(build())))
    model, criterion = apply_rblock(build()), ClassificationTask(build(), verbose=False).criterion
    images, target = batch()
    torch.manual_seed(3)
    loss = task(images, target)["loss"]
    torch.manual_seed(3)
    assert torch.equal(loss, RBlockLoss(criterion)(model(images), target))


def test_a_converted_model_and_an_rblock_loss_are_taken_as_they_are():
    model = apply_rblock(build(), "layer4", drop_prob=0.3)
    criterion = RBlockLoss(nn.CrossEntropyLoss(), alpha=0.7)
    task = RBlockTask(model, criterion, verbose=False)
    assert task.get_trainable_module() is model
    assert task.pair_loss() is criterion
    images, target = batch()
    torch.manual_seed(3)
    loss = task(images, target)["loss"]
    torch.manual_seed(3)
    assert torch.equal(loss, criterion(model(images), target))


def test_a_single_model_method_trains_with_the_plain_criterion():
    task = RBlockTask(build(), nn.CrossEntropyLoss(), method="dropblock", input_size=SIZE, verbose=False)
    images, target = batch()
    result = task(images, target)
    assert result["output"].shape == (6, 5)
    assert torch.equal(result["loss"], F.cross_entropy(result["output"], target))


def test_in_eval_mode_it_is_the_classification_task():
    task = RBlockTask(build(), verbose=False, input_size=SIZE)
    plain = ClassificationTask(build(), verbose=False)
    images, target = batch()
    with torch.no_grad():
        got, want = task.eval()(images, target), plain.eval()(images, target)
    assert all(torch.equal(got[key], want[key]) for key in want)
    assert got.keys() == want.keys()
    metrics = []
    for one in (task, plain):
        evaluator = one.create_evaluator()
        evaluator.update(one.get_eval_model()(images), target)
        metrics.append(evaluator.compute())
    assert metrics[0] == metrics[1]


def test_the_training_output_is_what_timms_evaluator_takes():
    task = RBlockTask(build(), verbose=False, input_size=SIZE)
    images, target = batch()
    evaluator = task.create_evaluator()
    output = task(images, target)["output"]
    evaluator.update(output, target)
    assert evaluator.compute()["top1"] == pytest.approx((output.argmax(1) == target).double().mean().item() * 100)


def test_the_state_is_that_of_the_classification_task():
    def criterion():
        return nn.CrossEntropyLoss(weight=torch.arange(5.0))

    task, plain = (
        RBlockTask(build(), criterion(), verbose=False),
        ClassificationTask(build(), criterion(), verbose=False),
    )
    assert list(task.state_dict()) == list(plain.state_dict())
    plain.load_state_dict(task.state_dict(), strict=True)
    task.load_state_dict(plain.state_dict(), strict=True)
    assert set(task.get_checkpoint_state()) == set(plain.get_checkpoint_state())
    assert list(task.get_checkpoint_state()["state_dict"]) == list(plain.get_checkpoint_state()["state_dict"])
    assert [name for name, _ in task.named_parameters()] == [name for name, _ in plain.named_parameters()]


def test_training_with_ema_goes_on_from_a_checkpoint_as_if_never_interrupted(tmp_path):
    def start(seed):
        task = RBlockTask(build(seed), drop_prob=0.3, input_size=SIZE, verbose=False)
        task.setup_ema(decay=0.5)
        return task, torch.optim.SGD(task.get_trainable_module().parameters(), lr=0.05, momentum=0.9)

    task, optimizer = start(0)
    losses = train(task, optimizer, 3)
    args = SimpleNamespace(model="test_resnet")
    saver = CheckpointSaver(task.get_trainable_module(), optimizer, args=args, checkpoint_dir=tmp_path, task=task)
    path = tmp_path / "checkpoint.pth.tar"
    saver._save(str(path), epoch=1)
    torch.manual_seed(5)
    losses = train(task, optimizer, 3, first=3)

    resumed, its_optimizer = start(1)
    assert resume_task_checkpoint(resumed, path, its_optimizer, log_info=False, weights_only=False) == 2
    load_task_ema_checkpoint(resumed, path, weights_only=False)
    torch.manual_seed(5)
    assert train(resumed, its_optimizer, 3, first=3) == losses
    for ema in (False, True):
        got, want = (one.get_checkpoint_state(ema=ema) for one in (resumed, task))
        assert got.keys() == want.keys()
        for states in zip(got.values(), want.values(), strict=True):
            assert all(torch.equal(value, states[1][key]) for key, value in states[0].items())

    # The averaged model is the plain network, and a checkpoint of it is one for the plain task.
    average = task.get_eval_model(ema=True)
    assert any(
        not torch.equal(value, task.get_eval_model().state_dict()[key])
        for key, value in average.module.state_dict().items()
    )
    plain = ClassificationTask(build(2), verbose=False)
    plain.setup_ema(decay=0.5)
    load_task_ema_checkpoint(plain, path, weights_only=False)
    resume_task_checkpoint(plain, path, log_info=False, weights_only=False)
    again, _ = start(3)
    load_task_ema_checkpoint(again, path, weights_only=False)
    images, _ = batch(seed=9)
    assert torch.equal(again.get_eval_model(ema=True)(images), plain.get_eval_model(ema=True)(images))


def test_a_compiled_task_trains_as_the_eager_one():
    torch._dynamo.reset()
    eager = RBlockTask(build(), drop_prob=0.3, input_size=SIZE, verbose=False)
    task = RBlockTask(build(), drop_prob=0.3, input_size=SIZE, verbose=False)
    counter = CompileCounterWithBackend("eager")
    for one in (eager, task):
        one.setup_ema(decay=0.5)
    task.compile(backend=counter, fullgraph=True)
    assert task.get_eval_model() is task.get_trainable_module()
    losses = []
    for one in (eager, task):
        torch.manual_seed(5)
        optimizer = torch.optim.SGD(one.get_trainable_module().parameters(), lr=0.05)
        losses.append(train(one, optimizer, 2))
        set_drop_prob(one.get_trainable_module(), 0.1)
        losses[-1] += train(one, optimizer, 1, first=2)
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    images, target = batch(seed=9)
    with torch.no_grad():
        got, want = (one.eval()(images, target)["output"] for one in (task, eager))
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3)
    assert counter.frame_count == 2
    for ema, key in ((False, "state_dict"), (True, "state_dict_ema")):
        got, want = (one.get_checkpoint_state(ema=ema)[key] for one in (task, eager))
        assert list(got) == list(want)
        for name, value in want.items():
            torch.testing.assert_close(got[name], value, rtol=1e-3, atol=1e-3)


def test_a_criterion_that_is_exchanged_takes_effect():
    task = RBlockTask(build(), nn.CrossEntropyLoss(), alpha=0.3, drop_prob=0.0, input_size=SIZE, verbose=False)
    images, target = batch()
    with torch.no_grad():
        output = copy.deepcopy(task.get_trainable_module())(images)
        task.criterion = nn.MultiMarginLoss()
        assert torch.equal(task(images, target)["loss"], RBlockLoss(nn.MultiMarginLoss(), alpha=0.3)(output, target))


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"alpha": 1.5}, SettingError, "alpha=1.5 is not in"),
        ({"temperature": 0}, SettingError, "temperature=0 is not a positive"),
        ({"reduction": "none"}, SettingError, "reduction='none' is neither"),
        ({"criterion": nn.CrossEntropyLoss}, SettingError, "no loss that can be called"),
        (
            {"criterion": RBlockLoss(), "alpha": 0.2},
            SettingError,
            "the criterion is an RBlockLoss with settings of its",
        ),
        ({"method": "dropdml"}, SettingError, "unknown method 'dropdml'"),
        ({"drop_prob": 1.0}, SettingError, "drop_prob=1.0 is no probability"),
        ({"sites": "layer9"}, SiteError, "layer9"),
        ({"sites": "layer4", "drop_prob": [0.1, 0.2]}, SettingError, "drop_prob"),
    ],
)
def test_what_is_wrong_is_refused_and_the_model_left_alone(settings, error, message):
    model = build()
    with pytest.raises(error, match=message):
        RBlockTask(model, verbose=False, **settings)
    assert type(model) is timm.models.resnet.ResNet
    assert "rblock" not in dict(model.named_children())


def test_a_model_that_cannot_be_converted_is_refused():
    with pytest.raises(ConversionError, match=r"expected a torch\.nn\.Module, got str"):
        RBlockTask("resnet50", verbose=False)
    with pytest.raises(ConversionError, match="is compiled"):
        RBlockTask(torch.compile(build()), verbose=False)


@pytest.mark.parametrize(
    "wrap", [lambda model: model, torch.compile, nn.Sequential], ids=["bare", "compiled", "inside"]
)
def test_settings_for_a_model_that_is_converted_already_are_refused(wrap):
    model = apply_rblock(build(), "layer4")
    before = str(describe(model))
    with pytest.raises(SettingError, match=r"is converted already, got \{'drop_prob': 0.3\} for another conversion"):
        RBlockTask(wrap(model), drop_prob=0.3, verbose=False)
    assert str(describe(model)) == before
    assert isinstance(RBlockTask(wrap(model), verbose=False).pair_loss(), RBlockLoss)


def test_targets_given_twice_are_refused():
    task = RBlockTask(build(), verbose=False, input_size=SIZE)
    images, target = batch()
    with pytest.raises(PairError, match="got 12 logits"):
        task(images, target[:5])


def test_the_package_does_not_import_timm():
    code = "import sys, rblock_fx; assert 'timm' not in sys.modules; import rblock_fx.timm_task"
    subprocess.run([sys.executable, "-c", code], check=True)
