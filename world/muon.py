"""Muon in the weights' own type, its work shared out among the ranks: the optimizer of `train.py`'s hidden matrices.

PyTorch's own rounds to bf16 before it multiplies. A CPU without bf16 instructions is a hundred times slower at that
than at fp32: there a training step would spend nine tenths of its time here. Next: `judge.py`.
"""
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

COEFFICIENTS = (3.4445, -4.7750, 2.0315)       # of the quintic polynomial, chosen to be steep at zero
ITERATIONS = 5


def orthogonalize(matrix):
    """The matrix with all singular values near one, by Newton-Schulz iterations (Jordan et al. 2024,
    github.com/KellerJordan/Muon). (rows, columns) -> the same shape"""
    a, b, c = COEFFICIENTS
    tall = matrix.size(0) > matrix.size(1)
    x = matrix.T if tall else matrix                                   # (short, long)
    x = x / x.norm().clamp(min=1e-7)                                   # so that no singular value exceeds one
    for _ in range(ITERATIONS):
        gram = x @ x.T                                                 # (short, short)
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if tall else x


class Muon(torch.optim.Optimizer):
    """Muon with Nesterov's momentum and steps as long as AdamW's (arXiv 2502.16982), so both share a learning rate.

    Every rank has the same gradients; it orthogonalizes its part of the matrices and receives the others from their
    ranks, so all take exactly the step that one process alone takes. Of a matrix that is itself spread over the ranks
    (--fsdp) all ranks compute every product together.
    """

    def __init__(self, matrices, lr, weight_decay, momentum):
        super().__init__(matrices, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure=None):
        """One step. closure: always None, by which PyTorch's loading of states calls it"""
        for group in self.param_groups:
            matrices = [p for p in group["params"] if p.grad is not None]
            for matrix, update in zip(matrices, self.updates(matrices, group["momentum"])):
                rms = 0.2 * max(matrix.shape) ** 0.5                   # AdamW's, of an orthogonal matrix
                matrix.mul_(1 - group["lr"] * group["weight_decay"])
                matrix.add_(update, alpha=-group["lr"] * rms)

    def updates(self, matrices, momentum):
        """The orthogonalized momentum of all matrices. -> list of tensors in their shapes"""
        alone = not dist.is_initialized() or any(isinstance(matrix, DTensor) for matrix in matrices)
        rank, ranks = (0, 1) if alone else (dist.get_rank(), dist.get_world_size())
        updates = []
        for i, matrix in enumerate(matrices):
            state = self.state[matrix]
            if "momentum_buffer" not in state:
                state["momentum_buffer"] = torch.zeros_like(matrix)
            state["momentum_buffer"].lerp_(matrix.grad, 1 - momentum)
            mine = i % ranks == rank
            ahead = matrix.grad.lerp(state["momentum_buffer"], momentum)           # Nesterov's
            updates.append(orthogonalize(ahead) if mine else torch.zeros_like(ahead))
        if ranks > 1:
            flat = torch.cat([update.flatten() for update in updates])
            dist.all_reduce(flat)                                      # one rank's value and zeros: nothing is rounded
            parts = flat.split([update.numel() for update in updates])
            updates = [part.view_as(update) for part, update in zip(parts, updates)]
        return updates
