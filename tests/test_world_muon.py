"""The small model's optimizer of hidden matrices, against PyTorch's and by what its steps look like."""
import pytest
import torch

from world.muon import Muon, orthogonalize

SHAPES = [(24, 24), (40, 16), (16, 56)]


def matrices():
    torch.manual_seed(0)
    return [torch.nn.Parameter(torch.randn(shape)) for shape in SHAPES]


def test_steps_are_those_of_pytorchs_muon_but_for_its_rounding_to_bf16():
    ours, theirs, before = matrices(), matrices(), matrices()
    options = {"lr": 0.02, "weight_decay": 0.05, "momentum": 0.9}
    optimizers = Muon(ours, **options), torch.optim.Muon(theirs, adjust_lr_fn="match_rms_adamw", **options)
    for _ in range(3):
        for mine, its in zip(ours, theirs):
            mine.grad = torch.randn_like(mine)
            its.grad = mine.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for mine, its, old in zip(ours, theirs, before):
        assert (mine - its).norm() < 0.03 * (its - old).norm()
    assert optimizers[0].state_dict()["state"].keys() == optimizers[1].state_dict()["state"].keys()


@pytest.mark.parametrize("shape", SHAPES)
def test_an_orthogonalized_matrix_turns_every_direction_alike_and_keeps_its_own(shape):
    torch.manual_seed(1)
    matrix = torch.randn(shape)
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    turned = left.T @ orthogonalize(matrix) @ right.T                  # of the matrix's own directions
    sizes = turned.diagonal()
    assert sizes.min() > 0.6 and sizes.max() < 1.3
    assert (turned - sizes.diag()).abs().max() < 1e-4


def test_a_matrix_without_a_gradient_and_one_of_zeros_stay():
    still, zero = matrices()[:2]
    zero.grad = torch.zeros_like(zero)
    before = still.clone(), zero.clone()
    Muon([still, zero], lr=0.1, weight_decay=0.0, momentum=0.9).step()
    assert torch.equal(still, before[0]) and torch.equal(zero, before[1])
