"""Averages of the weights: timm's ModelEmaV3 and torch.optim.swa_utils."""

import copy

import pytest
import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn

from client_runs import client, effective, images, masked, masks_by_name, outputs, same, zeros
from disparse_plugin import prunable_parameters
from disparse_plugin.masks import apply_masks, attach_masks, masks_of
from disparse_plugin.sparse_training import DiSparseScheduler
from networks import TwoHeads, digit_batches, digit_losses

pytestmark = pytest.mark.clients


def ema_of_timm(model):
    return client("timm.utils").ModelEmaV3(model, decay=0.5)


def swa(model):
    return AveragedModel(model)


def ema_of_torch(model):
    return AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5))


AVERAGES = pytest.mark.parametrize("average", [ema_of_timm, swa, ema_of_torch])


def update(average, model):
    (average.update if hasattr(average, "update") else average.update_parameters)(model)


def copyable():
    """A masked model after a forward without gradients."""
    model = masked()
    outputs(model)
    return model


def train(model, steps, after_step):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for batch in digit_batches(steps):
        optimizer.zero_grad()
        sum(digit_losses(model, batch).values()).backward()
        optimizer.step()
        after_step(batch)


@AVERAGES
class TestFixedMasks:
    def test_is_made_by_deepcopy_which_fails_until_a_forward_without_gradients(self, average):
        model = masked()
        with pytest.raises(RuntimeError, match="Only Tensors created explicitly by the user"):
            average(model)
        outputs(model)
        average(model)

    def test_the_average_has_the_masks(self, average):
        model = copyable()
        averaged = average(model)
        train(model, 3, lambda _: update(averaged, model))
        inner = averaged.module
        outputs(inner)
        assert all(torch.equal(zeros(inner)[name], mask) for name, mask in masks_by_name(model).items())
        assert not same(effective(inner), effective(model))
        assert not same(outputs(inner), outputs(model))


@AVERAGES
class TestMovingMasks:
    def run(self, average):
        torch.manual_seed(0)
        model = TwoHeads()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        scheduler = DiSparseScheduler(model, optimizer, digit_losses, amount=0.5, update_every=2, stop_at=10)
        averaged = average(model)  # after the scheduler, before the next forward: deepcopy works
        for batch in digit_batches(7):
            optimizer.zero_grad()
            sum(digit_losses(model, batch).values()).backward()
            optimizer.step()
            scheduler.step(batch)
            update(averaged, model)
        return model, averaged.module

    def test_masks_of_the_average_follow_only_with_apply_masks(self, average):
        model, averaged = self.run(average)
        apply_masks(averaged, model)
        stored = dict(averaged.named_parameters())
        for name, mask in masks_by_name(model).items():
            assert int((stored[f"{name}_orig"][mask] != 0).sum()) == 0

    def test_a_plain_average_is_as_sparse_as_the_model(self, average):
        model, averaged = self.run(average)
        plain = TwoHeads()
        source = dict(averaged.named_parameters())
        with torch.no_grad():
            for name, parameter in plain.named_parameters():
                parameter.copy_(source.get(name, source.get(f"{name}_orig")))
        apply_masks(plain, model)
        total = sum(layer.weight.numel() for layer, _ in prunable_parameters(plain))
        alive = sum(int((layer.weight != 0).sum()) for layer, _ in prunable_parameters(plain))
        assert 0 < alive <= round(0.5 * total)


def swa_of_buffers(model):
    return AveragedModel(model, use_buffers=True)


class TestMasksAreBuffers:
    """A mask is a buffer of 0 and 1, and an average of two masks is none."""

    def averaged(self, average):
        """An average of two models of which the second has lost a layer's weights."""
        model = copyable()
        averaged = average(model)
        update(averaged, model)
        with torch.no_grad():
            model.trunk[0].weight_mask.zero_()
        update(averaged, model)
        return model, averaged.module

    @pytest.mark.parametrize("average", [swa, ema_of_torch])
    def test_averaged_model_takes_them_over(self, average):
        model, averaged = self.averaged(average)
        assert same(masks_of(averaged), masks_of(model))

    @pytest.mark.parametrize("average", [ema_of_timm, swa_of_buffers])
    def test_timm_and_use_buffers_average_them_which_attach_masks_mends(self, average):
        model, averaged = self.averaged(average)
        values = averaged.trunk[0].weight_mask.unique().tolist()
        assert values == [0, 0.5]
        attach_masks(averaged, masks_of(model))
        assert same(masks_of(averaged), masks_of(model))
        assert averaged.trunk[0].weight_mask.unique().tolist() == [0]


def test_batch_statistics_of_an_average_are_updated_with_its_masks():
    model = copyable()
    averaged = swa(model)
    train(model, 2, lambda _: averaged.update_parameters(model))
    before = copy.deepcopy(averaged.module.trunk[1].running_mean)
    update_bn([images()], averaged)
    assert not torch.equal(averaged.module.trunk[1].running_mean, before)
    assert all(torch.equal(zeros(averaged.module)[name], mask) for name, mask in masks_by_name(model).items())
