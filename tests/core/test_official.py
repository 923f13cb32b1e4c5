"""Proof 0: every output of the official code (JAX, float64) on fixed inputs."""

import pytest
import torch
from torch import Tensor, nn

from diffem_core import (
    Denoiser,
    GaussianPrior,
    SampleNoise,
    SinusoidalEmbedding,
    VELogLinear,
    ddim,
    denoising_loss,
    log_linear_grid,
    mmps_denoise,
)

Official = dict[str, Tensor]


def check(ours: Tensor, official: Tensor) -> None:
    assert ours.dtype == torch.float64
    torch.testing.assert_close(ours, official, rtol=1e-9, atol=1e-12)


@pytest.fixture(scope="module")
def prior(official: Official) -> GaussianPrior:
    return GaussianPrior(
        mean=official["mu"], factor=official["cov_factor"], diag=official["cov_diag"]
    )


def test_every_output_is_covered(official: Official) -> None:
    inputs = (
        "mu cov_diag cov_factor x_t sigma_t A y var_y t x_1 x_0 z loss_t network_matrix samples"
    )
    outputs = (
        "gaussian_denoiser mmps_tweedie_converged mmps_tweedie_1_iteration mmps_cov_x_converged "
        "mmps_cov_x_1_iteration sigma ddim_32_steps loss preconditioned embedding_of_log_sigma "
        "ppca_mean ppca_cov"
    )
    assert set(official) == {*inputs.split(), *outputs.split()}


def test_gaussian_denoiser(official: Official, prior: GaussianPrior) -> None:
    check(prior.denoise(official["x_t"], official["sigma_t"]), official["gaussian_denoiser"])


@pytest.mark.parametrize(("iterations", "name"), [(50, "converged"), (1, "1_iteration")])
@pytest.mark.parametrize("covariance", ["tweedie", "cov_x"])
def test_mmps_denoiser(
    official: Official, prior: GaussianPrior, covariance: str, iterations: int, name: str
) -> None:
    estimate = mmps_denoise(
        prior.denoise,
        official["x_t"],
        official["sigma_t"],
        official["y"],
        A=lambda x: x @ official["A"].mT,
        A_adjoint=lambda v: v @ official["A"],
        noise_variance=float(official["var_y"]),
        covariance=prior if covariance == "cov_x" else None,
        iterations=iterations,
        tolerance=0.0,
    )
    check(estimate, official[f"mmps_{covariance}_{name}"])


def test_schedule(official: Official) -> None:
    schedule = VELogLinear(sigma_min=1e-3, sigma_max=1e2)
    check(schedule.sigma(official["t"]), official["sigma"])
    torch.testing.assert_close(schedule.t(official["sigma"]), official["t"])


def test_ddim_trajectory(official: Official, prior: GaussianPrior) -> None:
    # 32 steps from t = 1 to 0 and one call at t = 0: 33 calls at levels that are even in log
    # sigma.
    x = ddim(
        prior.denoise,
        sigmas=log_linear_grid(1e2, 1e-3, 33),
        noise=SampleNoise(range(5), dtype=torch.float64),
        shape=(8,),
        x_start=official["x_1"],
    )
    check(x, official["ddim_32_steps"])


def test_loss(official: Official, prior: GaussianPrior) -> None:
    class Exact(Denoiser):
        def forward(self, x_t: Tensor, sigma_t: Tensor, condition: Tensor | None = None) -> Tensor:
            return prior.denoise(x_t, sigma_t)

    sigma_t = VELogLinear().sigma(official["loss_t"])
    loss = denoising_loss(Exact(nn.Identity()), official["x_0"], official["z"], sigma_t)
    check(loss, official["loss"])


def test_preconditioning(official: Official) -> None:
    class Linear(nn.Module):
        def forward(self, x: Tensor, c_noise: Tensor, condition: Tensor | None) -> Tensor:
            return x @ official["network_matrix"].mT

    denoise = Denoiser(Linear(), sigma_data=1.0)
    check(denoise(official["x_t"], official["sigma_t"]), official["preconditioned"])


def test_embedding(official: Official) -> None:
    features = SinusoidalEmbedding(64)(official["sigma_t"].log())
    check(features, official["embedding_of_log_sigma"])


def test_probabilistic_pca(official: Official) -> None:
    prior = GaussianPrior.from_samples(official["samples"], rank=3)
    check(prior.mean, official["ppca_mean"])
    check(prior.covariance(), official["ppca_cov"])
