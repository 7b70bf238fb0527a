"""A converted model trained by two processes: real ones, started by torchrun, whose records are judged here.

The worker only records. What it should have found is computed here in one process, by plain models.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn
from torch.nn import functional as F

from tests.distributed_worker import ROWS, SITES, batch_norm_net, converted_net, images, plain_net
from tests.oracles import eq8, opened, two_forwards

ROOT = Path(__file__).parent.parent
ENVIRONMENT = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("distributed")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*launcher, str(ROOT / "tests" / "distributed_worker.py"), str(folder)],
        cwd=folder,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return folder


def records(folder, scenario):
    """What the two processes found, the first process's first."""
    found = [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in range(2)]
    assert [record["world_size"] for record in found] == [2, 2]
    for record in found:
        assert isinstance(record[scenario], dict), record[scenario]
    return [record[scenario] for record in found]


@pytest.fixture(scope="module")
def data_parallel(folder):
    return records(folder, "data_parallel")


@pytest.fixture(scope="module")
def synchronised(folder):
    return records(folder, "synchronised")


@pytest.fixture(scope="module")
def sharded(folder):
    return records(folder, "sharded")


@pytest.fixture(scope="module", params=["no", "bf16"])
def accelerated(folder, request):
    found = [record[request.param] for record in records(folder, "accelerated")]
    assert [record["processes"] for record in found] == [2, 2]
    return request.param, found


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(got, want, tolerance=1e-4):
    """Two sets of tensors by name, each compared by its norm: convolutions sum in another order for another batch."""
    assert list(got) == list(want)
    size = max(value.norm() for value in want.values())
    assert size > 0
    for name, value in want.items():
        error = (got[name].float() - value.float()).norm()
        assert error <= tolerance * (value.norm() + 0.01 * size), f"{name}: {error} of {value.norm()}"


def assert_equal(got, want):
    assert list(got) == list(want)
    for name, value in want.items():
        assert torch.equal(got[name], value), name


def gradients_of_all_images(model, autocast=None):
    """The plain loss of the whole batch, times (1 - alpha): the mean over two equal sub-models."""
    shares = [images(rank) for rank in range(2)]
    x, y = (torch.cat(parts) for parts in zip(*shares, strict=True))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast == "bf16"):
        output = model(x)
    ((1 - 0.1) * F.cross_entropy(output.float(), y)).backward()
    return gradients(model)


def mean_of_two_forwards(model, steps, inputs, tolerance=1e-4):
    """The mean over the processes of the gradients that a plain model has for each one's images and masks."""
    for step, x in zip(steps, inputs, strict=True):
        masks = {name.replace("_", "."): mask for name, mask in step["masks"].items()}
        assert all((mask == 0).any() for mask in masks.values())
        output = two_forwards(model, masks, x)
        assert_same({"output": step["output"]}, {"output": output.detach()}, tolerance)
        (output.square().sum() / len(steps)).backward()
    return gradients(model)


def mean_of(first, second):
    return {name: (first[name] + second[name]) / 2 for name in first}


def assert_masks_differ(first, second):
    assert first.keys() == second.keys() != set()
    for name, mask in first.items():
        assert not torch.equal(mask == 0, second[name] == 0), name


INPUTS = [images(rank)[0] for rank in range(2)]


def test_ddp_at_rate_0_has_the_gradients_of_one_process(data_parallel):
    want = gradients_of_all_images(plain_net())
    for found in data_parallel:
        assert_same(found["gradients at rate 0"], want)
    assert_equal(*(found["gradients at rate 0"] for found in data_parallel))


def test_ddp_accumulates_under_no_sync(data_parallel):
    want = gradients_of_all_images(plain_net())
    first, second = (found["gradients before they are shared"] for found in data_parallel)
    assert not any(torch.equal(first[name], second[name]) for name in first)
    for found in data_parallel:
        assert_same(found["accumulated gradients"], want)
    assert_equal(*(found["accumulated gradients"] for found in data_parallel))


def test_ddp_averages_the_gradients_of_each_processs_masks(data_parallel):
    steps = [found["own seeds"] for found in data_parallel]
    assert_masks_differ(*(step["masks"] for step in steps))
    want = mean_of_two_forwards(plain_net(), steps, INPUTS)
    for step in steps:
        assert_same(step["gradients"], want)
    assert_equal(*(step["gradients"] for step in steps))


def test_processes_of_one_seed_draw_the_same_masks(data_parallel):
    assert_equal(*(found["one seed"]["masks"] for found in data_parallel))


def test_ddp_broadcasts_no_rates(data_parallel):
    for found in data_parallel:
        assert found["rates after a step"] == found["rates set"]
        assert found["buffers of masks"] == []
        assert {name: rate for name, (rate, _) in found["rates set"].items()} == {
            "stages_1": pytest.approx(0.5),
            "stages_2": pytest.approx(0.3),
        }
        assert eq8(found["rates set"]["stages_1"][1], 8, 8, 3) == pytest.approx(0.5, abs=1e-5)
        assert eq8(found["rates set"]["stages_2"][1], 4, 4, 3) == pytest.approx(0.3, abs=1e-5)


def test_a_schedule_reaches_the_masks_through_ddp(data_parallel):
    for found in data_parallel:
        assert found["rates of the schedule"] == [pytest.approx(rate) for rate in (0, 0.1, 0.2, 0.3, 0.4)]


def test_ddp_trains_one_model_and_evaluates_the_plain_one(data_parallel):
    assert_equal(*(found["weights"] for found in data_parallel))
    plain = plain_net()
    assert data_parallel[0]["keys"] == list(plain.state_dict())
    before = dict(plain.named_parameters())
    assert not any(torch.equal(weight, before[name]) for name, weight in data_parallel[0]["weights"].items())
    plain.load_state_dict(data_parallel[0]["weights"])
    plain.eval()
    for found, x in zip(data_parallel, INPUTS, strict=True):
        for output in found["evaluation"]:
            assert torch.equal(output, plain(x))


@pytest.mark.parametrize("option", ["find_unused_parameters", "static_graph", "gradient_as_bucket_view"])
def test_options_of_ddp_keep_the_gradients(data_parallel, option):
    steps = [found[str({option: True})] for found in data_parallel]
    want = mean_of_two_forwards(plain_net(), steps, INPUTS)
    for step in steps:
        assert_same(step["gradients"], want)


def test_ddp_with_statistics_per_submodel_is_two_forwards(data_parallel):
    """Each step begins with the first process's statistics, which DDP broadcasts; each process then adds its own."""
    main = plain_net("test_resnet")
    for number in range(2):
        steps = [found["batch norm"][number] for found in data_parallel]
        assert_masks_differ(*(step["masks"] for step in steps))
        replicas = [plain_net("test_resnet") for _ in steps]
        found = []
        for rank, (replica, step) in enumerate(zip(replicas, steps, strict=True)):
            replica.load_state_dict(main.state_dict())
            found.append(mean_of_two_forwards(replica, [step], [images(rank, number)[0]], 1e-3))
            for name, buffer in replica.named_buffers():
                if name.startswith(("layer3.", "layer4.")):
                    torch.testing.assert_close(step["buffers"][name], buffer, rtol=1e-4, atol=1e-5, msg=name)
        for step in steps:
            assert_same(step["gradients"], mean_of(*found), 1e-3)
        main = replicas[0]
    behind = [value for name, value in steps[0]["buffers"].items() if name.startswith("layer4") and "tracked" in name]
    assert {int(value) for value in behind} == {4}


def test_synchronised_statistics_are_shared_per_submodel(synchronised):
    """Two forwards of one process on all images: sub-model 1 of both processes, then sub-model 2."""
    steps = [found["step"] for found in synchronised]
    assert_masks_differ(*(step["masks"] for step in steps))
    plain = batch_norm_net(nn.BatchNorm2d)
    x = torch.cat([share[:, :, :8, :8] for share in INPUTS]).double()
    halves = [step["masks"]["site_0"].chunk(2) for step in steps]
    mask = torch.cat([half[submodel] for submodel in range(2) for half in halves])
    expected = two_forwards(plain, {"0": mask}, x)
    (expected.square().sum() / 2).backward()
    outputs = [step["output"].chunk(2) for step in steps]
    torch.testing.assert_close(torch.cat([half[submodel] for submodel in range(2) for half in outputs]), expected)
    for step in steps:
        assert_same(step["gradients"], gradients(plain), 1e-6)
        for name, buffer in plain.named_buffers():
            torch.testing.assert_close(step["buffers"][name], buffer, rtol=1e-5, atol=1e-7, msg=name)


@pytest.mark.parametrize("batch_norm", ["joint", "per_submodel"])
def test_sync_batch_norm_refuses_cpu_tensors_as_in_plain(synchronised, batch_norm):
    for found in synchronised:
        assert found["plain"].startswith("ValueError: SyncBatchNorm expected input tensor to be on GPU")
        assert found[f"training {batch_norm}"] == found["plain"]


@pytest.mark.parametrize("batch_norm", ["joint", "per_submodel"])
def test_converts_a_synchronised_model(synchronised, batch_norm):
    for found in synchronised:
        assert f"batch norm {batch_norm}" in found[f"conversion {batch_norm}"]


def test_fsdp2_shards_every_block_under_the_plain_names(sharded):
    plain = plain_net()
    for found in sharded:
        assert found["keys"] == list(plain.state_dict())
        local, total = map(sum, zip(*found["local shares"].values(), strict=True))
        assert 0.4 * total < local < 0.6 * total
    assert {sum(found["local shares"][name][0] for found in sharded) for name in ("stem.conv1.weight",)} == {
        plain.stem.conv1.weight.numel()
    }


def test_fsdp2_step_is_the_step_of_the_unsharded_model(sharded):
    steps = [found["step"] for found in sharded]
    plain = plain_net()
    want = mean_of_two_forwards(plain, steps, INPUTS)
    for rank, found in enumerate(sharded):
        assert_same(found["step"]["gradients"], want)
        unsharded = converted_net([0.5, 0.3])
        torch.manual_seed(rank)
        assert_same({"output": found["step"]["output"]}, {"output": unsharded(INPUTS[rank]).detach()})
    torch.optim.SGD(plain.parameters(), 0.001).step()
    plain.zero_grad()
    again = mean_of_two_forwards(plain, [found["second step"] for found in sharded], INPUTS)
    for found in sharded:
        assert_same(found["weights"], {name: p.detach() for name, p in plain.named_parameters()}, 1e-6)
        assert_same(found["second step"]["gradients"], again)


def test_fsdp2_shards_blocks_inside_the_sites(sharded):
    steps = [found["blocks inside the sites"] for found in sharded]
    want = mean_of_two_forwards(plain_net(), steps, INPUTS)
    for step in steps:
        assert_same(step["gradients"], want)


def test_fsdp2_accumulates_without_synchronisation(sharded):
    for found in sharded:
        assert {name: rate for name, (rate, _) in found["rates"].items()} == {"stages_1": 0, "stages_2": 0}
        plain = plain_net()
        plain.load_state_dict(found["weights then"])
        assert_same(found["accumulated gradients"], gradients_of_all_images(plain))


def test_fsdp2_evaluates_as_the_plain_model(sharded):
    plain = plain_net()
    plain.load_state_dict(sharded[0]["weights"])
    plain.eval()
    for found, x in zip(sharded, INPUTS, strict=True):
        for output in found["evaluation"]:
            assert torch.equal(output, plain(x))
        assert all(f"{site} " in found["description"] for site in SITES)


def test_fsdp2_in_bfloat16_keeps_the_rates_exact(sharded):
    steps = [found["bfloat16"] for found in sharded]
    want = mean_of_two_forwards(plain_net().bfloat16(), steps, [x.bfloat16() for x in INPUTS], tolerance=0.05)
    for found in sharded:
        assert found["bfloat16"]["output"].dtype == torch.bfloat16
        assert found["bfloat16 rates"] == {
            name: (pytest.approx(0.3, abs=1e-7), pytest.approx(gamma, abs=1e-6))
            for name, gamma in {"stages_1": solve(0.3, 8), "stages_2": solve(0.3, 4)}.items()
        }
        assert_same(found["bfloat16"]["gradients"], want, tolerance=0.1)


def solve(drop_prob, side):
    """Gamma of a square map by Eq. 8 and bisection."""
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if eq8(middle, side, side, 3) < drop_prob else (low, middle)
    return low


def test_rejects_sharded_modules_around_sites(sharded):
    for found in sharded:
        assert found["a sharded container"].startswith("ConversionError")
        assert "'stages.2'" in found["a sharded container"]


def test_rejects_conversion_and_removal_when_sharded(sharded):
    for found in sharded:
        assert found["removal"].startswith("ConversionError: remove_rblock: FSDPRBlock")
        assert "is sharded by FSDP; convert the model first" in found["conversion of a part"]


def test_fsdp2_with_statistics_per_submodel_is_two_forwards(sharded):
    steps = [found["batch norm"] for found in sharded]
    plains = [plain_net("test_resnet") for _ in steps]
    found = [
        mean_of_two_forwards(plain, [step], [x], 1e-3) for plain, step, x in zip(plains, steps, INPUTS, strict=True)
    ]
    for plain, step in zip(plains, steps, strict=True):
        assert_same(step["gradients"], mean_of(*found), 1e-3)
        for name, buffer in plain.named_buffers():
            if name.startswith(("layer3.", "layer4.")):
                torch.testing.assert_close(step["buffers"][name], buffer, rtol=1e-4, atol=1e-5, msg=name)


def tolerance_of(precision):
    return {"no": 1e-4, "bf16": 0.05}[precision]


def test_accelerate_wraps_in_ddp_and_accumulates(accelerated):
    precision, found = accelerated
    want = gradients_of_all_images(plain_net(), precision)
    for record in found:
        assert record["wrapper"] == "DistributedDataParallel"
        assert record["batches"] == 3
        assert_same(record["accumulated gradients"], want, tolerance_of(precision))
    assert_equal(*(record["accumulated gradients"] for record in found))


def test_device_specific_seeds_draw_other_masks(accelerated):
    _, found = accelerated
    for step in range(2):
        assert_masks_differ(*(record["steps"][step]["masks"] for record in found))
        assert_equal(*(record["steps"][step]["weights"] for record in found))
    for record in found:
        for name, mask in record["steps"][0]["masks"].items():
            union = (mask.chunk(2)[0] == 0) | (mask.chunk(2)[1] == 0)
            assert all((opened(row.numpy(), 3) == row.numpy()).all() for row in union[:, 0]), name


def test_run_resumes_from_accelerates_checkpoint(accelerated):
    _, found = accelerated
    for record in found:
        for step, again in zip(record["steps"], record["steps again"], strict=True):
            assert_equal(again["masks"], step["masks"])
            assert_equal(again["weights"], step["weights"])
            assert again["loss"] == step["loss"]
        assert record["rates"]["stages_1"][0] == pytest.approx(0.5)
        assert record["rates"]["stages_2"][0] == pytest.approx(0.3)


def test_prepared_model_evaluates_as_the_plain_one(accelerated, folder):
    precision, found = accelerated
    plain = plain_net()
    plain.load_state_dict(safetensors.torch.load_file(folder / precision / "weights" / "model.safetensors"))
    plain.eval()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        expected = [plain(x).float() for x in INPUTS]
    for record, output in zip(found, expected, strict=True):
        assert record["keys"] == list(plain.state_dict())
        assert_equal(record["weights"], dict(plain.named_parameters()))
        assert [torch.equal(got, output) for got in record["evaluation"]] == [True, True]
        assert torch.equal(record["gathered"], torch.cat(expected))
        assert record["training rows"] == 2 * ROWS


def test_unwrapped_model_is_bare_and_can_be_restored(accelerated):
    _, found = accelerated
    for record, x in zip(found, INPUTS, strict=True):
        plain = plain_net()
        plain.load_state_dict(record["weights"])
        plain.eval()
        for output in (*record["unwrapped"], *record["removed"]):
            assert torch.equal(output, plain(x))
        assert record["class after removal"] == type(plain).__name__
