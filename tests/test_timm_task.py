"""RBlockTask is timm's ClassificationTask with a converted model and an RBlockLoss."""

import subprocess
import sys
from types import SimpleNamespace

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.loss import BinaryCrossEntropy, LabelSmoothingCrossEntropy
from timm.task import (
    ClassificationTask,
    MultiLabelClassificationTask,
    load_task_ema_checkpoint,
    resume_task_checkpoint,
)
from timm.utils import CheckpointSaver
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from rblock_fx import ConversionError, PairError, RBlockLoss, SettingError, apply_rblock, set_drop_prob, split_pair
from rblock_fx.timm_task import RBlockTask

SIZE = (3, 64, 64)


def plain(seed=0):
    torch.manual_seed(seed)
    return timm.create_model("test_resnet", num_classes=5).train()


def converted(seed=0, **settings):
    return apply_rblock(plain(seed), input_size=SIZE, **settings)


def batch(rows=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, *SIZE, generator=generator), torch.arange(rows) % 5


def train(task, optimizer, steps, first=0):
    """Run steps as timm's train.py does and return their losses."""
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


@pytest.mark.parametrize(
    "criterion", [RBlockLoss(LabelSmoothingCrossEntropy(0.2), alpha=0.3, combine="sum"), nn.MultiMarginLoss(), None]
)
def test_a_step_returns_the_loss_and_sub_model_1(criterion):
    task, model = RBlockTask(converted(), criterion, verbose=False), converted()
    loss = criterion if isinstance(criterion, RBlockLoss) else RBlockLoss(criterion)
    images, target = batch()
    torch.manual_seed(3)
    output = model(images)
    torch.manual_seed(3)
    result = task(images, target)
    assert torch.equal(result["loss"], loss(output, target))
    assert torch.equal(result["output"], split_pair(output)[0])
    evaluator = task.create_evaluator()
    evaluator.update(result["output"], target)
    assert evaluator.compute()["top1"] == pytest.approx((result["output"].argmax(1) == target).double().mean() * 100)


def test_criterion_kwargs_make_the_criterion():
    task = RBlockTask(converted(), criterion_kwargs={"smoothing": 0.2}, dtype=torch.float32, verbose=False)
    expected = ClassificationTask(plain(), criterion_kwargs={"smoothing": 0.2}, verbose=False).criterion
    assert type(task.criterion.criterion) is type(expected)
    assert task.criterion.smoothing == 0.2


@pytest.mark.filterwarnings("error")
def test_a_single_model_method_trains_without_a_pair():
    task = RBlockTask(converted(method="dropblock", block_size=1), RBlockLoss(), verbose=False)
    images, target = batch()
    result = task(images, target)
    assert result["output"].shape == (6, 5)
    assert torch.equal(result["loss"], F.cross_entropy(result["output"], target))


def test_the_task_refers_the_loss_to_its_model():
    first, second = converted(), converted(1)
    own = RBlockLoss(model=second)
    assert RBlockTask(first, RBlockLoss(), verbose=False).criterion._model.model is first
    assert RBlockTask(first, own, verbose=False).criterion._model.model is second


def test_multi_label_training_uses_bernoulli_and_its_evaluator():
    class MultiLabelTask(RBlockTask, MultiLabelClassificationTask):
        pass

    images, _ = batch()
    labels = torch.randint(2, (6, 5)).float()
    for task in (
        RBlockTask(converted(), nn.BCEWithLogitsLoss(), verbose=False),
        MultiLabelTask(converted(), verbose=False),
        MultiLabelClassificationTask(converted(), RBlockLoss(BinaryCrossEntropy()), verbose=False),
    ):
        assert task.criterion.divergence == "bernoulli"
        model = converted()
        torch.manual_seed(3)
        output = model(images)
        torch.manual_seed(3)
        loss = task(images, labels)["loss"]
        assert torch.equal(loss, RBlockLoss(task.criterion.criterion)(output, labels))
    evaluator = MultiLabelTask(converted(), verbose=False).create_evaluator()
    evaluator.update(output[:6], labels)
    assert "mAP" in evaluator.compute() or "map" in evaluator.compute()


def test_in_eval_mode_it_is_the_classification_task():
    task, expected = RBlockTask(converted(), verbose=False), ClassificationTask(plain(), verbose=False)
    images, target = batch()
    with torch.no_grad():
        got, want = task.eval()(images, target), expected.eval()(images, target)
    assert got.keys() == want.keys()
    assert all(torch.equal(got[key], want[key]) for key in want)


def test_checkpoints_have_the_keys_of_the_classification_task():
    task, expected = RBlockTask(converted(), verbose=False), ClassificationTask(plain(), verbose=False)
    assert list(task.state_dict()) == list(expected.state_dict())
    assert set(task.get_checkpoint_state()) == set(expected.get_checkpoint_state())
    assert list(task.get_checkpoint_state()["state_dict"]) == list(expected.get_checkpoint_state()["state_dict"])
    assert [name for name, _ in task.named_parameters()] == [name for name, _ in expected.named_parameters()]


def test_a_checkpoint_with_ema_resumes_both_tasks_exactly(tmp_path):
    def start(seed):
        task = RBlockTask(converted(seed, drop_prob=0.3), RBlockLoss(), verbose=False)
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

    expected = ClassificationTask(plain(2), verbose=False)
    expected.setup_ema(decay=0.5)
    load_task_ema_checkpoint(expected, path, weights_only=False)
    resume_task_checkpoint(expected, path, log_info=False, weights_only=False)
    again, _ = start(3)
    load_task_ema_checkpoint(again, path, weights_only=False)
    images, _ = batch(seed=9)
    assert torch.equal(again.get_eval_model(ema=True)(images), expected.get_eval_model(ema=True)(images))


def test_a_compiled_task_trains_like_the_eager_one():
    torch._dynamo.reset()
    eager, task = (RBlockTask(converted(drop_prob=0.3), RBlockLoss(), verbose=False) for _ in range(2))
    counter = CompileCounterWithBackend("eager")
    task.compile(backend=counter, fullgraph=True)
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


def test_models_that_are_not_converted_are_rejected():
    for model in (plain(), torch.compile(plain()), "resnet50"):
        with pytest.raises(ConversionError, match=r"RBlockTask: .* is not converted.*model = apply_rblock\(model"):
            RBlockTask(model, RBlockLoss(), verbose=False)


def test_wrong_criteria_and_targets_are_rejected():
    with pytest.raises(SettingError, match="criterion must be a loss instance"):
        RBlockTask(converted(), nn.CrossEntropyLoss, verbose=False)
    images, target = batch()
    with pytest.raises(PairError, match=r"expected 10 rows .* for 5 targets, got shape"):
        RBlockTask(converted(), verbose=False)(images, target[:5])


def test_the_package_does_not_import_timm():
    code = "import sys, rblock_fx; assert 'timm' not in sys.modules; import rblock_fx.timm_task"
    subprocess.run([sys.executable, "-c", code], check=True)
