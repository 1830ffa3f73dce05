"""ONNX files of masked and folded models, run by onnxruntime."""

import pytest
import torch

from client_runs import client, images, masked, outputs
from disparse_plugin.masks import fold

pytestmark = [
    pytest.mark.clients,
    # The exporter of torch and onnxscript use what Python, and torch itself, have deprecated.
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning"),
]


@pytest.fixture
def exported(tmp_path):
    """Write a model as a file, and return what onnxruntime computes with it, and the tensors in the file."""
    onnx, onnxruntime = client("onnx"), client("onnxruntime")
    client("onnxscript")

    def export(model):
        path = tmp_path / "model.onnx"
        torch.onnx.export(model, (images(),), str(path), dynamo=True, verbose=False)
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        found = session.run(None, {session.get_inputs()[0].name: images().numpy()})
        stored = {item.name: onnx.numpy_helper.to_array(item) for item in onnx.load(path).graph.initializer}
        return [torch.from_numpy(output) for output in found], stored

    return export


@pytest.mark.parametrize("folded", [False, True])
def test_onnxruntime_computes_what_the_model_does(exported, folded):
    model = fold(masked()) if folded else masked()
    found, _ = exported(model)
    for one, other in zip(found, outputs(model).values(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_the_zeros_of_a_folded_model_are_in_the_file(exported):
    model = fold(masked())
    _, stored = exported(model)
    expected = sum(int((layer.weight == 0).sum()) for layer in model.modules() if isinstance(layer, torch.nn.Linear))
    assert expected > 0
    heads = [values for name, values in stored.items() if name.startswith("heads.") and values.ndim == 2]
    assert sum(int((values == 0).sum()) for values in heads) == expected
