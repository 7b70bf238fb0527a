"""The training loops of timm and torchvision with a converted model and its criterion wrapped: real steps on digits."""

import numpy as np
import pytest
import timm
import torch
from sklearn.datasets import load_digits
from timm.data import Mixup
from timm.loss import BinaryCrossEntropy, LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.models import model_parameters
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import AverageMeter, ModelEmaV3, NativeScaler, accuracy, dispatch_clip_grad
from torch import nn
from torch.optim.swa_utils import AveragedModel

from rblock_fx import RBlockLoss, apply_rblock, split_pair

BATCH = 32


@pytest.fixture(scope="module")
def digits():
    """Images of (1, 32, 32) and labels: 960 to train on, 320 to test on.

    Not smaller: on maps of 1x1 torch's convolutions have given NaN gradients in bfloat16, in the plain network too.
    """
    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32)[:1280, None] / 8 - 1
    images = nn.functional.interpolate(images, scale_factor=4, mode="bilinear")
    labels = torch.tensor(data.target)[:1280]
    return (images[:960], labels[:960]), (images[960:], labels[960:])


def build(batch_norm="joint"):
    torch.manual_seed(0)
    model = timm.create_model("test_resnet", in_chans=1, num_classes=10)
    return apply_rblock(model, drop_prob=0.1, batch_norm=batch_norm, input_size=(1, 32, 32))


def batches(data, epochs):
    images, labels = data
    generator = torch.Generator().manual_seed(0)
    for _ in range(epochs):
        for rows in torch.randperm(len(images), generator=generator).split(BATCH):
            yield images[rows], labels[rows]


def top1(model, data):
    """Accuracy in percent, by timm's own function, in eval mode."""
    model.eval()
    meter = AverageMeter()
    with torch.no_grad():
        for images, labels in zip(data[0].split(80), data[1].split(80), strict=True):
            output = model(images)
            meter.update(accuracy(output, labels, topk=(1, 5))[0].item(), len(labels))
    return meter.avg


TIMM_LOSSES = {
    "mixup": SoftTargetCrossEntropy,
    "smoothing": lambda: LabelSmoothingCrossEntropy(smoothing=0.1),
    "bce with mixup": lambda: BinaryCrossEntropy(target_threshold=0.2),
}


@pytest.mark.parametrize(("kind", "scaled"), [("mixup", True), ("smoothing", False), ("bce with mixup", False)])
def test_timms_loop_trains_with_the_criterion_wrapped(kind, scaled, digits):
    train, test = digits
    np.random.seed(0)  # Mixup's
    model = build()
    optimizer = create_optimizer_v2(model, opt="adamw", lr=0.01, weight_decay=0.05, layer_decay=0.9)
    scheduler, _ = create_scheduler_v2(optimizer, num_epochs=2, updates_per_epoch=30, step_on_epochs=False)
    ema = ModelEmaV3(model, decay=0.9)
    scaler = NativeScaler(device="cpu") if scaled else None
    mixup = Mixup(mixup_alpha=0.2, cutmix_alpha=0.2, label_smoothing=0.1, num_classes=10) if "mixup" in kind else None
    train_loss_fn = RBlockLoss(TIMM_LOSSES[kind]())

    losses, norms = [], []
    model.train()
    for update, (images, target) in enumerate(batches(train, epochs=2)):
        if mixup is not None:
            images, target = mixup(images, target)
        with torch.autocast("cpu", torch.bfloat16, enabled=scaled):
            output = model(images)
            loss = train_loss_fn(output, target)
        assert output.shape == (2 * BATCH, 10)
        if scaler is not None:
            scaler(loss, optimizer, clip_grad=1.0, clip_mode="norm", parameters=model_parameters(model))
        else:
            loss.backward()
            dispatch_clip_grad(model_parameters(model, exclude_head=True), value=0.01, mode="agc")
            dispatch_clip_grad(model_parameters(model), value=1.0, mode="norm")
            optimizer.step()
        norms.append(torch.cat([p.grad.flatten() for p in model.parameters()]).norm().item())
        optimizer.zero_grad()
        ema.update(model, step=update)
        scheduler.step_update(num_updates=update + 1)
        losses.append(loss.item())

    assert max(norms) < 1.001  # what was clipped is all that there is
    first, last = sum(losses[:10]), sum(losses[-10:])
    assert last < 0.8 * first
    assert top1(model, test) > 40
    assert top1(ema.module, test) > 40
    plain = timm.create_model("test_resnet", in_chans=1, num_classes=10)
    plain.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(model.eval()(test[0]), plain.eval()(test[0]))


def test_torchvisions_loop_trains_with_the_criterion_wrapped(digits):
    """references/classification: the line that reports training accuracy needs the outputs of one sub-model."""
    train, test = digits
    model = build("per_submodel").train()
    criterion = RBlockLoss(nn.CrossEntropyLoss(label_smoothing=0.1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4, nesterov=True)
    decay = 0.9
    ema = AveragedModel(
        model, avg_fn=lambda average, now, _count: decay * average + (1 - decay) * now, use_buffers=True
    )
    losses, correct = [], []
    for images, target in batches(train, epochs=2):
        output = model(images)
        loss = criterion(output, target)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        ema.update_parameters(model)
        losses.append(loss.item())
        with pytest.raises(RuntimeError, match="expanded size of the tensor"):
            accuracy(output, target)  # 2N outputs do not pass for N
        correct.append(accuracy(split_pair(output)[0], target)[0].item())

    assert sum(losses[-10:]) < 0.8 * sum(losses[:10])
    assert sum(correct[-10:]) / 10 > sum(correct[:10]) / 10 + 20
    assert top1(model, test) > 40
    assert top1(ema, test) > 40
