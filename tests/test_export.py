"""torch.export and ONNX of a converted model export the plain network."""

import copy

import onnx
import onnxruntime
import pytest
import timm
import torch

from rblock_fx import apply_rblock, remove_rblock


def trained(name, batch_norm):
    """A converted model after two training steps, and the plain model with its weights."""
    plain = timm.create_model(name, num_classes=5)
    model = apply_rblock(copy.deepcopy(plain), batch_norm=batch_norm, input_size=(3, 64, 64)).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for _ in range(2):
        optimizer.zero_grad()
        model(torch.randn(4, 3, 64, 64)).square().mean().backward()
        optimizer.step()
    plain.load_state_dict(model.state_dict())
    return model.eval(), plain.eval()


@pytest.fixture(params=["converted", "removed"])
def finish(request):
    return remove_rblock if request.param == "removed" else lambda model: model


@pytest.mark.parametrize(("name", "batch_norm"), [("test_resnet", "joint"), ("test_efficientnet", "per_submodel")])
def test_an_exported_program_is_the_plain_network(name, batch_norm, finish, tmp_path):
    model, plain = trained(name, batch_norm)
    model = finish(model)
    x = torch.randn(3, 3, 64, 64)
    with torch.no_grad():
        program = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("rows")},))
        own = torch.export.export(plain, (x,), dynamic_shapes=({0: torch.export.Dim("rows")},))
        torch.export.save(program, tmp_path / "model.pt2")
        loaded = torch.export.load(tmp_path / "model.pt2").module()
        assert torch.equal(loaded(x), model(x))
        assert torch.equal(loaded(x), plain(x))
        more = torch.randn(7, 3, 64, 64)
        torch.testing.assert_close(loaded(more), plain(more))

    def operations(exported):
        return [node.target for node in exported.graph.nodes if node.op == "call_function"]

    assert operations(program) == operations(own)
    assert list(program.state_dict) == list(own.state_dict)
    assert set(program.constants) == set(own.constants)


def test_an_onnx_file_is_the_plain_network(finish, tmp_path):
    model, plain = trained("test_efficientnet", "per_submodel")
    model = finish(model)
    x = torch.randn(3, 3, 64, 64)
    path = tmp_path / "model.onnx"
    torch.onnx.export(
        model, (x,), path, dynamo=True, dynamic_shapes=({0: torch.export.Dim("rows")},), input_names=["images"]
    )
    assert not [tensor.name for tensor in onnx.load(path).graph.initializer if "rblock" in tensor.name]
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    with torch.no_grad():
        for images in (x, torch.randn(6, 3, 64, 64)):
            (logits,) = session.run(None, {"images": images.numpy()})
            torch.testing.assert_close(torch.from_numpy(logits), plain(images), rtol=1e-4, atol=1e-4)
