"""Cross-entropy at the labels' resolution without logits there."""

import pytest
import torch
import torch.nn.functional as F

from fit3d_ns.support.compiling import can_compile
from probe.data.base import IGNORE
from probe.tasks import losses
from probe.tasks.losses import cell_cross_entropy, cross_entropy, full_resolution_cross_entropy


def plain_cross_entropy(logits, labels):
    return cross_entropy(F.interpolate(logits, size=labels.shape[1:], mode="bilinear"), labels)


def logits_and_labels(size, grid, device="cpu", num_classes=7):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, num_classes, *grid, generator=generator).to(device).requires_grad_()
    labels = torch.randint(0, num_classes, (2, *size), generator=generator)
    labels[torch.rand(labels.shape, generator=generator) < 0.2] = IGNORE
    return logits, labels.to(device)


@pytest.mark.parametrize(
    "size, grid", [((50, 63), (4, 5)), ((9, 7), (1, 2)), ((16, 16), (8, 8)), ((5, 5), (5, 5)), ((3, 4), (6, 5))]
)
def test_cross_entropy_by_cells_equals_upsampled(size, grid):
    logits, labels = logits_and_labels(size, grid)
    expected = plain_cross_entropy(logits, labels)
    (expected_gradient,) = torch.autograd.grad(3 * expected, logits)
    found = cell_cross_entropy(logits, labels)
    (gradient,) = torch.autograd.grad(3 * found, logits)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-4, atol=1e-7)


def test_cross_entropy_of_ignored_labels_alone_is_zero():
    logits, labels = logits_and_labels((12, 12), (3, 3))
    labels.fill_(IGNORE)
    found = cell_cross_entropy(logits, labels)
    (gradient,) = torch.autograd.grad(found, logits)
    assert found.item() == 0.0 and not gradient.any()


@pytest.mark.parametrize("num_classes", [11, 16, 17, 150])
def test_few_classes_are_upsampled(monkeypatch, num_classes):
    taken = []
    monkeypatch.setattr(losses, "can_compile", lambda device: True)
    monkeypatch.setattr(losses, "cell_cross_entropy", lambda *_: taken.append("cells"))
    full_resolution_cross_entropy(torch.zeros(1, num_classes, 2, 2), torch.zeros(1, 4, 4, dtype=torch.long))
    assert bool(taken) == (num_classes > 16)


@pytest.mark.gpu
@pytest.mark.parametrize("size, grid", [((512, 512), (37, 37)), ((50, 63), (4, 5))])
def test_fused_cross_entropy_on_cuda(size, grid):
    logits, labels = logits_and_labels(size, grid, "cuda", num_classes=21)
    (expected,) = torch.autograd.grad(plain_cross_entropy(logits, labels), logits)
    gradients = [torch.autograd.grad(full_resolution_cross_entropy(logits, labels), logits)[0] for _ in range(2)]
    torch.testing.assert_close(gradients[0], expected, rtol=1e-3, atol=1e-7)
    assert torch.equal(*gradients)
    if not can_compile(logits.device):
        pytest.skip("kernels cannot be compiled here, so that the loss is taken as it is written")
    big = torch.randn(4, 150, 37, 37, device="cuda", requires_grad=True)
    places = torch.randint(0, 150, (4, 512, 512), device="cuda")
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    full_resolution_cross_entropy(big, places).backward()
    # The logits of all pixels alone would be 0.6 GB.
    assert torch.cuda.max_memory_allocated() - before < 2**28
