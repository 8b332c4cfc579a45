"""Optimal transport: what goes where at the least cost."""

from __future__ import annotations

import torch
from torch import Tensor

FACTORS = 5  # iterations between two visits to the log domain
TINY = 1e-30


def sinkhorn(cost: Tensor, source: Tensor, target: Tensor, *, blur: float = 0.1, iterations: int = 50) -> Tensor:
    """The plan that moves a mass from N places to M others at little cost, spread by an entropy.

    Shapes   cost: (R, N, M) finite; source: (R, N), target: (R, M): the masses, at least zero, of equal sums in each
             line; a place of mass zero takes no part. Returns (R, N, M) float32, without gradient.
    Units    blur: weight of the entropy, in those of the cost; the smaller, the nearer to the cheapest plan and the
             more iterations it takes. Rows sum to the source exactly, columns to the target as far as it converged.
    Cost     about 8 N M FLOPs per iteration, in the log domain, and three matrices of N x M floats; no sync.
    Raises   ValueError for a blur that is not positive or less than one iteration.
    Source   Sinkhorn 1967; Cuturi 2013, arXiv:1306.0895.
    """
    if not blur > 0 or iterations < 1:
        raise ValueError(f"blur={blur}, iterations={iterations}: blur must be positive, iterations at least 1")
    with torch.no_grad():
        kernel = cost.float() / -blur
        source, target = source.float(), target.float()
        g = target.log() - kernel.masked_fill((source == 0)[..., None], -torch.inf).logsumexp(1)
        f = source.log() - (kernel + g[:, None]).logsumexp(2)
        for begun in range(1, iterations, FACTORS):  # potentials hold the scale, factors in between stay near one
            plan = _plan(kernel, f, g)
            u, v = torch.ones_like(f), torch.ones_like(g)
            for _ in range(min(FACTORS, iterations - begun)):
                v = target / (u[:, None] @ plan)[:, 0].clamp_min(TINY)
                u = source / (plan @ v[..., None])[..., 0].clamp_min(TINY)
            f, g = f + u.log(), g + v.log()
        return _plan(kernel, f, g)


def _plan(kernel: Tensor, f: Tensor, g: Tensor) -> Tensor:
    """exp(kernel_ij + f_i + g_j), zero where a place has no mass. kernel: (R, N, M); f: (R, N); g: (R, M)."""
    return (kernel + f[..., None]).add_(g[:, None]).exp_().nan_to_num_(0.0, 0.0)
