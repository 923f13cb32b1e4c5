"""How vectors spread over the spectrum of a symmetric matrix, by Lanczos' recursion.

For a unit vector z = sum_j c_j v_j, m steps give the Gauss quadrature (theta_k, tau_k) of the
measure that puts c_j^2 at h_j:

    sum_k tau_k f(theta_k) = z' f(H) z              for polynomials f of degree up to 2 m - 1

Of K independent white z the mean estimates (1/D) tr f(H). For 0 <= f <= 1 its standard error is
at most sqrt(2 / (K D)); step functions add what the quadrature cannot resolve, which is nothing
where the spectrum has a gap that m steps see.

References:
    Golub and Meurant 2010 (Matrices, moments and quadrature), chapter 4; Ubaru, Chen and Saad
    2017 (Fast estimation of tr(f(A)) via stochastic Lanczos quadrature).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["spectral_measure"]


def spectral_measure(
    multiply: Callable[[Tensor], Tensor], z: Tensor, *, steps: int
) -> tuple[Tensor, Tensor]:
    """Compute the quadrature of each vector's measure over the spectrum.

    Arguments:
        multiply: Multiplies the matrix by vectors (D, K).
        z: Vectors to begin with, of shape (D, K), not 0.
        steps: Steps m of the recursion, at most D; m vectors of D entries are kept for each of K.

    Returns:
        Nodes theta and weights tau, both float64 of shape (K, m). The weights of each vector add
        up to 1; nodes that a recursion which ended early did not reach have weight 0.
    """
    size, count = z.shape
    steps = min(steps, size)
    basis = z.new_zeros(steps, size, count)
    alpha = torch.zeros(count, steps, dtype=torch.float64)
    beta = torch.zeros(count, max(steps - 1, 0), dtype=torch.float64)
    q = z / torch.linalg.vector_norm(z, dim=0)
    scale = torch.zeros(count, dtype=torch.float64)
    for k in range(steps):
        basis[k] = q
        r = multiply(q)
        alpha[:, k] = (q * r).sum(0).double()
        for _ in range(2):  # Twice is enough: orthogonal to what is there, to rounding.
            overlap = torch.einsum("kdc,dc->kc", basis[: k + 1], r)
            r = r - torch.einsum("kdc,kc->dc", basis[: k + 1], overlap)
        if k + 1 == steps:
            break
        norm = torch.linalg.vector_norm(r, dim=0).double()
        scale = torch.maximum(scale, torch.maximum(alpha[:, k].abs(), norm))
        # Below rounding the space is exhausted: what follows would be noise.
        alive = norm > 32 * torch.finfo(z.dtype).eps * scale
        beta[:, k] = torch.where(alive, norm, 0.0)
        q = torch.where(alive, r / norm.to(z.dtype).clamp_min(1e-300), 0.0).to(z.dtype)
    tridiagonal = torch.diag_embed(alpha)
    if steps > 1:
        tridiagonal += torch.diag_embed(beta, 1) + torch.diag_embed(beta, -1)
    theta, vectors = torch.linalg.eigh(tridiagonal)
    return theta, vectors[:, 0].square()
