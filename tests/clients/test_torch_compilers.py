"""torch.compile and torch.export of masked and folded models."""

import pytest
import torch
from torch.nn.utils import prune

from client_runs import images, masked, masks_by_name, outputs, same, zeros
from disparse_plugin.masks import fold
from disparse_plugin.sparse_training import DiSparseScheduler
from networks import TwoHeads, digit_batches, digit_losses

pytestmark = pytest.mark.clients

CLOSE = 1e-5  # other kernels add in another order


class TestCompile:
    @pytest.fixture(autouse=True)
    def _afresh(self):
        torch.compiler.reset()

    def compiled(self, model, **options):
        return torch.compile(model, backend="eager", fullgraph=True, **options)

    @pytest.mark.parametrize("folded", [False, True])
    def test_gives_the_same_outputs(self, folded):
        model = fold(masked()) if folded else masked()
        assert same(outputs(self.compiled(model)), outputs(model), CLOSE)

    @pytest.mark.slow
    def test_by_inductor(self):
        model = masked()
        assert same(outputs(torch.compile(model)), outputs(model), CLOSE)

    def test_training_through_changing_masks_is_that_without_compilation(self):
        results, graphs = [], []

        def counting(graph, _):
            graphs.append(graph)
            return graph.forward

        for wrap in (lambda model: model, lambda model: torch.compile(model, backend=counting, fullgraph=True)):
            torch.manual_seed(0)
            model = TwoHeads().eval()
            wrapped, optimizer = wrap(model), torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
            scheduler = DiSparseScheduler(wrapped, optimizer, digit_losses, amount=0.5, update_every=2, stop_at=10)
            for batch in digit_batches(7):
                optimizer.zero_grad()
                sum(digit_losses(wrapped, batch).values()).backward()
                optimizer.step()
                scheduler.step(batch)
            results.append(model.state_dict())
        assert len(graphs) == 1, "changing masks made torch compile again"
        assert same(*results, CLOSE)


# True of all that torch.nn.utils.prune masks: its hook sets module.weight in every forward, and export puts it back.
@pytest.mark.filterwarnings("ignore:The tensor attributes .* were assigned during export")
class TestExport:
    def test_of_a_folded_model_is_a_plain_graph(self):
        model = fold(masked())
        program = torch.export.export(model, (images(),))
        assert same(outputs(program.module()), outputs(model), CLOSE)
        assert sorted(program.state_dict) == sorted(dict(model.named_parameters()) | dict(model.named_buffers()))
        assert not any("mul" in str(node.target) for node in program.graph.nodes)

    def test_of_a_masked_model_multiplies_once_per_layer(self):
        model = masked()
        program = torch.export.export(model, (images(),))
        assert same(outputs(program.module()), outputs(model), CLOSE)
        assert sum("mul" in str(node.target) for node in program.graph.nodes) == len(masks_by_name(model))
        assert {name for name in program.state_dict if name.endswith("_mask")} == {
            name for name in model.state_dict() if name.endswith("_mask")
        }

    def test_leaves_the_masks_on_the_model(self):
        model = masked()
        before = masks_by_name(model)
        torch.export.export(model, (images(),))
        assert prune.is_pruned(model)
        assert same(zeros(model), before)


@pytest.mark.filterwarnings("ignore:.*torch.ao.quantization.*:DeprecationWarning", "ignore:.*quantiz:UserWarning")
def test_a_folded_model_keeps_its_zeros_where_it_is_quantised():
    model = fold(masked())
    small = torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear})
    for task, head in model.heads.items():
        assert torch.all(small.heads[task].weight().dequantize()[head.weight == 0] == 0)
        assert int((head.weight == 0).sum()) > 0
    with pytest.raises(RuntimeError, match="deepcopy"):  # in torch: fold first
        torch.ao.quantization.quantize_dynamic(masked(), {torch.nn.Linear})
