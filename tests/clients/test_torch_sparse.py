"""torch.sparse and safetensors: what becomes of a folded model where zeros are to save room."""

import pytest
import torch
from safetensors.torch import load_file, save_model

from client_runs import images, masked, masks_by_name, outputs, same, zeros
from disparse_plugin.masks import fold, sparsity_report
from networks import TwoHeads

pytestmark = [pytest.mark.clients, pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")]


def heads(model):
    return model.heads.values()


@pytest.mark.parametrize("layout", [torch.sparse_coo, torch.sparse_csr])
def test_a_folded_weight_stores_only_what_is_alive(layout):
    model = masked()
    alive = [int(head.weight_mask.sum()) for head in heads(model)]
    fold(model)
    kept = [head.weight.detach().to_sparse(layout=layout) for head in heads(model)]
    assert [weight._nnz() for weight in kept] == alive
    assert all(torch.equal(w.to_dense(), head.weight) for w, head in zip(kept, heads(model), strict=True))


@pytest.mark.parametrize("layout", [torch.sparse_coo, torch.sparse_csr])
def test_a_sparse_weight_computes_the_same(layout):
    model = fold(masked())
    features = model.trunk(images()).detach()
    for head in heads(model):
        sparse = head.weight.detach().to_sparse(layout=layout)
        found = torch.sparse.mm(sparse, features.T).T + head.bias.detach()
        torch.testing.assert_close(found, head(features).detach())


def test_safetensors_of_a_folded_model_load_into_a_plain_model(tmp_path):
    model = masked()
    expected, masks = outputs(model), masks_by_name(model)
    save_model(fold(model), str(tmp_path / "model.safetensors"))
    torch.manual_seed(1)
    plain = TwoHeads().eval()
    plain.load_state_dict(load_file(tmp_path / "model.safetensors"))  # strict
    assert same(outputs(plain), expected)
    assert all(torch.equal(zeros(plain)[name], mask) for name, mask in masks.items())


def test_a_plain_model_with_zeros_is_reported_as_dense():
    """Counts come from masks: after folding there are none."""
    model = masked()
    before = sparsity_report(model)
    after = sparsity_report(fold(model))
    assert before.alive < before.total == after.alive
