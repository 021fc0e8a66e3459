"""The formulas of derivations.md on a tiny RBM, against routes that do not use them.

Every expectation here starts from the assignment's energy alone: integrals over a grid, enumeration of all
hidden states, automatic and finite differences. The formulas are written out below, by equation number.
"""

import itertools
import math

import pytest
import torch

D, M = 2, 3
GRID = torch.linspace(-14, 14, 561, dtype=torch.float64)
CELL = (GRID[1] - GRID[0]).item() ** D
HIDDEN = torch.tensor(list(itertools.product([0.0, 1.0], repeat=M)), dtype=torch.float64)  # (2^M, M)


@pytest.fixture
def theta():
    """W (M, D), b (D), alpha (M), log_sigma (D) of a tiny RBM."""
    generator = torch.Generator().manual_seed(7)
    sizes = {"W": (M, D), "b": (D,), "alpha": (M,), "log_sigma": (D,)}
    return {k: 0.6 * torch.randn(s, generator=generator, dtype=torch.float64) for k, s in sizes.items()}


def energy(v, h, theta):
    """The assignment's energy, term by term. v: (..., D); h: (..., M)."""
    sigma, total = torch.exp(theta["log_sigma"]), 0
    for i in range(D):
        for j in range(M):
            total = total + theta["W"][j, i] * h[..., j] * v[..., i] / sigma[i]
        total = total - (v[..., i] - theta["b"][i]) ** 2 / (2 * sigma[i] ** 2)
    for j in range(M):
        total = total + theta["alpha"][j] * h[..., j]
    return -total


def visible_grid():
    return torch.stack(torch.meshgrid(GRID, GRID, indexing="ij"), dim=-1)  # (n, n, D)


def joint(theta):
    """exp(-E) on the grid for every hidden state: (2^M, n, n)."""
    return torch.stack([torch.exp(-energy(visible_grid(), h, theta)) for h in HIDDEN])


def inputs_to_hidden(v, theta):
    return theta["alpha"] + (v / torch.exp(theta["log_sigma"])) @ theta["W"].T


def free_energy(v, theta):
    """Equation (7)."""
    quadratic = ((v - theta["b"]) ** 2 / (2 * torch.exp(2 * theta["log_sigma"]))).sum(-1)
    return quadratic - torch.nn.functional.softplus(inputs_to_hidden(v, theta)).sum(-1)


def log_z(theta):
    """Equation (11)."""
    sigma, s = torch.exp(theta["log_sigma"]), HIDDEN @ theta["W"]
    exponents = HIDDEN @ theta["alpha"] + (theta["b"] / sigma * s).sum(1) + 0.5 * (s**2).sum(1)
    return torch.log(math.sqrt(2 * math.pi) * sigma).sum() + torch.logsumexp(exponents, 0)


def assert_slopes(function, theta, gradient):
    """That central differences of a function of theta, in every entry, are its gradient."""
    for (name, value), slopes in zip(theta.items(), gradient):
        for index in itertools.product(*map(range, value.shape)):
            step = torch.zeros_like(value)
            step[index] = 1e-5
            up, down = (function(theta | {name: moved}) for moved in (value + step, value - step))
            assert slopes[index].item() == pytest.approx((up - down) / 2e-5, abs=1e-6), (name, index)


def test_visible_given_hidden_is_the_gaussian_of_equation_4(theta):
    sigma = torch.exp(theta["log_sigma"])
    for h, density in zip(HIDDEN, joint(theta)):
        for i in range(D):
            marginal = density.sum(1 - i)  # integrate the other visible unit out
            numeric = marginal / (marginal.sum() * (GRID[1] - GRID[0]))
            mean = theta["b"][i] + sigma[i] * (theta["W"][:, i] * h).sum()
            expected = torch.exp(torch.distributions.Normal(mean, sigma[i]).log_prob(GRID))
            torch.testing.assert_close(numeric, expected, atol=1e-8, rtol=1e-6)


def test_visible_given_hidden_in_integral_form_equation_2(theta):
    sigma, h = torch.exp(theta["log_sigma"]), HIDDEN[5]
    for i in range(D):
        f = GRID / sigma[i] * (theta["W"][:, i] * h).sum() - (GRID - theta["b"][i]) ** 2 / (2 * sigma[i] ** 2)
        marginal = joint(theta)[5].sum(1 - i)
        torch.testing.assert_close(torch.exp(f) / torch.exp(f).sum(), marginal / marginal.sum())


def test_visible_units_are_independent_given_hidden(theta):
    density = joint(theta)[6]
    density = density / density.sum()
    torch.testing.assert_close(density, density.sum(1, keepdim=True) * density.sum(0, keepdim=True))


def test_hidden_given_visible_is_the_sigmoid_of_equation_6(theta):
    v = torch.tensor([0.7, -1.3], dtype=torch.float64)
    weights = torch.exp(-energy(v, HIDDEN, theta))
    expected = (weights[:, None] * HIDDEN).sum(0) / weights.sum()
    torch.testing.assert_close(torch.sigmoid(inputs_to_hidden(v, theta)), expected)


def test_free_energy_of_equation_7(theta):
    v = torch.randn(9, D, dtype=torch.float64)
    expected = -torch.logsumexp(torch.stack([-energy(v, h, theta) for h in HIDDEN]), 0)
    torch.testing.assert_close(free_energy(v, theta), expected)


def test_log_z_of_equation_11_by_integration_and_enumeration(theta):
    assert log_z(theta).item() == pytest.approx(math.log(joint(theta).sum().item() * CELL), abs=1e-8)


def test_gradient_of_the_log_likelihood_equation_8(theta):
    """Positive plus negative phase, the expectation over a grid, against finite differences of log p(v)."""
    v = torch.tensor([0.4, 1.1], dtype=torch.float64)
    parameters = {k: p.clone().requires_grad_() for k, p in theta.items()}
    with torch.no_grad():
        p = joint(theta).sum(0)
        p = p / p.sum()
    phases = -free_energy(v, parameters) + (p * free_energy(visible_grid(), parameters)).sum()
    gradient = torch.autograd.grad(phases, list(parameters.values()))

    def log_p(changed):
        numerator = torch.exp(-energy(v, HIDDEN, changed)).sum()
        return math.log(numerator / (joint(changed).sum() * CELL))

    assert_slopes(log_p, theta, gradient)


def test_derivatives_of_the_free_energy_equation_9(theta):
    v = torch.tensor([-0.8, 0.5], dtype=torch.float64)
    parameters = {k: p.clone().requires_grad_() for k, p in theta.items()}
    free_energy(v, parameters).backward()
    sigma, h = torch.exp(theta["log_sigma"]), torch.sigmoid(inputs_to_hidden(v, theta))
    expected = {
        "W": h[:, None] * v / sigma,
        "b": (v - theta["b"]) / sigma**2,
        "alpha": h,
        "log_sigma": (v - theta["b"]) ** 2 / sigma**2 - v / sigma * (h @ theta["W"]),
    }
    for name, value in expected.items():
        torch.testing.assert_close(-parameters[name].grad, value)


def test_the_model_is_a_mixture_of_gaussians_with_weights_p_h(theta):
    """The last sentence of section 7."""
    sigma, s = torch.exp(theta["log_sigma"]), HIDDEN @ theta["W"]
    exponents = HIDDEN @ theta["alpha"] + (theta["b"] / sigma * s).sum(1) + 0.5 * (s**2).sum(1)
    weights = torch.softmax(exponents, 0)
    numeric = joint(theta).sum((1, 2))
    torch.testing.assert_close(weights, numeric / numeric.sum())
    v = torch.tensor([0.3, -0.2], dtype=torch.float64)
    components = torch.distributions.Normal(theta["b"] + sigma * s, sigma).log_prob(v).sum(1)
    log_p = torch.logsumexp(torch.log(weights) + components, 0)
    torch.testing.assert_close(log_p, -free_energy(v, theta) - log_z(theta))


def c_and_g(theta):
    """c and G of equation (12)."""
    return theta["alpha"] + theta["W"] @ (theta["b"] / torch.exp(theta["log_sigma"])), theta["W"] @ theta["W"].T


def log_f(h, theta):
    """Equation (12). h: (..., M)."""
    c, G = c_and_g(theta)
    constant = torch.log(math.sqrt(2 * math.pi) * torch.exp(theta["log_sigma"])).sum()
    return constant + h @ c + 0.5 * (h @ G * h).sum(-1)


def test_f_of_equation_12_is_the_energy_with_v_integrated_out(theta):
    torch.testing.assert_close(torch.exp(log_f(HIDDEN, theta)), joint(theta).sum((1, 2)) * CELL)


def test_gradient_of_log_z_equations_13_and_14(theta):
    """As a mean of the derivatives of log f, and by the two moments, against finite differences of an integral."""
    p = joint(theta).sum((1, 2))
    p = p / p.sum()
    mean, second = p @ HIDDEN, torch.einsum("n,nj,nk->jk", p, HIDDEN, HIDDEN)
    W, b, sigma = theta["W"], theta["b"], torch.exp(theta["log_sigma"])
    by_moments = {
        "W": mean[:, None] * b / sigma + second @ W,
        "b": mean @ W / sigma,
        "alpha": mean,
        "log_sigma": 1 - b / sigma * (mean @ W),
    }
    parameters = {k: value.clone().requires_grad_() for k, value in theta.items()}
    gradient = torch.autograd.grad((p * log_f(HIDDEN, parameters)).sum(), list(parameters.values()))
    torch.testing.assert_close(gradient, tuple(by_moments.values()))
    assert_slopes(lambda changed: math.log(joint(changed).sum()), theta, gradient)


def test_one_hidden_unit_given_the_others_equation_16(theta):
    weights = joint(theta).sum((1, 2))
    c, G = c_and_g(theta)
    for j in range(M):
        on = HIDDEN[:, j] == 1  # in both halves the other units go through their states in the same order
        expected = weights[on] / (weights[on] + weights[~on])
        others = HIDDEN[on].clone()
        others[:, j] = 0
        torch.testing.assert_close(torch.sigmoid(c[j] + 0.5 * G[j, j] + others @ G[j]), expected)


def test_images_less_a_constant_equation_17(theta):
    origin, v = torch.tensor([0.6, -0.4], dtype=torch.float64), torch.randn(9, 1, D, dtype=torch.float64)
    moved = theta | {"b": theta["b"] - origin, "alpha": inputs_to_hidden(origin, theta)}
    torch.testing.assert_close(energy(v - origin, HIDDEN, moved), energy(v, HIDDEN, theta))
