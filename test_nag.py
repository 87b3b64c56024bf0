"""What the project claims, each claim against an oracle that is not the code under test.

    python -m pytest test_nag.py        # SLOW=1 before it: also the long ones; -k guid: some of it

In this order: the method, reproducibility, formats, what a user does wrong, the README, long ones.
"""
import argparse
import contextlib
import functools
import io
import itertools
import json
import math
import multiprocessing.forkserver
import os
import pickle
import random
import re
import resource
import shlex
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
import zipfile
import zlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.linalg
import torch
import torch._dynamo    # as each optimiser does, which takes a second: here once for all scripts
from PIL import Image
from scipy.optimize import brentq
from scipy.special import logit
from scipy.stats import kstest, norm, truncnorm
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import diffusion
import estimator
import fid
import models
import sample
import train

HERE = Path(__file__).resolve().parent
PATHS = [diffusion.Linear(), diffusion.VP()]
slow = pytest.mark.skipif("SLOW" not in os.environ, reason="takes minutes; set SLOW=1 to run it")
by_name = pytest.mark.parametrize("path", PATHS, ids=["linear", "vp"])
assert_same = functools.partial(torch.testing.assert_close, rtol=0, atol=0)   # nested dicts, too
close = functools.partial(torch.testing.assert_close, rtol=1e-5, atol=1e-5)


# What most tests below train: a step of it takes a tenth of the time of one of SiT-Ti/4
models.MODELS["SiT-Ti/tiny"] = functools.partial(
    models.DiT, patch_size=2, hidden_size=32, depth=2, num_heads=2)


def tiny(model=models.MODELS["SiT-Ti/tiny"], **changes):
    """A transformer that is small enough to test, with no layer at zero."""
    model = model(**{**dict(input_size=8, in_channels=3, num_classes=4), **changes})
    torch.manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return model.eval().requires_grad_(False)


# --------------------------------------------------------------------------------------------------
# Published numbers. assets/golden.npz holds what public implementations give for weights and inputs
# made by a rule (the DiT authors' model and diffusion, the SiT authors' model, diffusers'
# AutoencoderKL, torch-fidelity's Inception, pytorch-fid, prdc), and the published keys and shapes.

GOLDEN = dict(np.load(HERE / "assets/golden.npz"))
inception = lambda: fill(fid.InceptionV3())                 # with weights that were never trained


def normal(name, *shape):
    """Standard normal numbers that belong to a name, the same on every machine."""
    rng = np.random.RandomState(zlib.crc32(name.encode()))
    return torch.from_numpy(rng.standard_normal(shape or (4, 4, 8, 8)).astype(np.float32))


def fill(network, keep=()):
    """Weights by the rule: matrices and filters over √fan-in, gains near 1, all others small."""
    for key, value in network.eval().requires_grad_(False).state_dict().items():
        z = normal(key, *value.shape)
        if key.endswith("running_var"):
            value.copy_(1 + 0.1 * z.abs())
        elif value.ndim > 1 and key not in keep:
            value.copy_(z / np.sqrt(np.prod(value.shape[1:])))
        elif value.is_floating_point() and key not in keep:
            value.copy_(0.1 * z + key.endswith("weight"))
    return network


def our_numbers(name):
    """What this project gives where public implementations gave the arrays of this name."""
    model = tiny(in_channels=4, hidden_size=64, num_heads=4, num_classes=10)
    model = fill(model, keep=("pos_embed", "t_embedder.null_embedding"))
    k, y = torch.tensor([0.0, 17, 500, 999]), torch.tensor([3, 10, 0, 9])
    if name == "dit_forward":
        return model.pos_embed, model(normal("x"), k, y)
    if name == "sit_forward":                   # the SiT authors' time runs from noise to data,
        model.load_state_dict(models.convert_sit(model.state_dict()))
        t = 1 - torch.from_numpy(GOLDEN["sit_forward/t_official"])
        return [-model(normal("x"), t, y)[:, :4]]           # and their velocity is minus ours
    if name == "ddpm_loss":
        x0, eps, t = normal("x0"), normal("eps"), (k + 1) / 1000
        return [diffusion.training_loss(model, PATHS[1], x0, y, t, eps)]
    if name == "ddpm_chain":
        step, denoise = itertools.count(), diffusion.guided(model, PATHS[1], y)
        randn = lambda x: normal(f"noise{next(step)}")
        return [diffusion.sample_ddpm(denoise, normal("xT"), PATHS[1], steps=10, randn=randn)]
    if name == "vae_encode":
        posterior = fill(models.VAE()).encode(normal("img", 2, 3, 32, 32).clamp(-1, 1))
        return [part / 0.18215 for part in posterior]
    if name == "inception":
        pixels = (normal("pixels", 4, 3, 64, 64) * 64 + 128).clamp(0, 255).to(torch.uint8)
        return [inception()(pixels)[0]]
    real, fake = normal("real", 1500, 64).double(), normal("fake", 1200, 64).double() * 0.9 + 0.15
    moments = real.mean(0), torch.cov(real.T), fake.mean(0), torch.cov(fake.T)
    return fid.frechet_distance(*moments), *fid.precision_recall(real, fake, k=3)


@pytest.mark.parametrize("name, arrays, tolerances", [
    ("dit_forward", "pos_embed out", (1e-6, 1e-5)), ("sit_forward", "out_official", [1e-4]),
    ("ddpm_loss", "mse+vb", [1e-4]), ("ddpm_chain", "x0", [1e-3]), ("inception", "pool", [1e-4]),
    ("vae_encode", "mean std", (1e-4, 1e-4)),
    ("metrics", "fid precision recall", (1e-6, 1e-3, 1e-3))])
def test_numbers_are_those_of_the_public_implementations(name, arrays, tolerances):
    for array, ours, tolerance in zip(arrays.split(), our_numbers(name), tolerances, strict=True):
        theirs = sum(GOLDEN[f"{name}/{part}"].astype(np.float64) for part in array.split("+"))
        ours = np.asarray(ours, np.float64)
        assert ours.shape == theirs.shape
        assert np.linalg.norm(ours - theirs) <= tolerance * np.linalg.norm(theirs), array


@pytest.mark.parametrize("name, network", [
    ("dit_xl_2_keys", models.MODELS["DiT-XL/2"]), ("sit_xl_2_keys", models.MODELS["SiT-XL/2"]),
    ("sd_vae_keys", models.VAE), ("inception_fid_keys", fid.InceptionV3)])
def test_keys_and_shapes_are_those_of_the_published_files(name, network):
    with torch.device("meta"):
        ours = {key: list(value.shape) for key, value in network().state_dict().items()}
    ours.pop("t_embedder.null_embedding", None)             # which only NAG needs
    plain = lambda keys: {key: keys[key] for key in keys if "num_batches_tracked" not in key}
    assert plain(ours) == plain(json.loads(str(GOLDEN[name])))


# --------------------------------------------------------------------------------------------------
# diffusion.py: interpolants, loss, samplers, guidance


@by_name
def test_conversions_give_back_what_the_state_was_made_of(path):
    """Linear: α = 1 − t, σ = t. VP: DDPM's table of α², between whose rows log α is linear."""
    x0, eps = torch.randn(2, 6, 3, 4, 4, dtype=torch.float64)
    vp, levels = path is PATHS[1], torch.from_numpy(np.array([0.011, 0.1, 0.3334, 0.5, 0.9, 0.99]))
    logs = np.log(np.cumprod([1, *(1 - np.linspace(1e-4, 0.02, 1000))])) / 2
    table = lambda t: torch.from_numpy(np.exp(np.interp(1000 * t, np.arange(1001), logs)))
    alpha, sigma = lambda t: 1 - t, lambda t: t
    if vp:
        alpha, sigma = table, lambda t: (1 - table(t)**2).sqrt()
    slope, t = lambda f: (f(t + 1e-6) - f(t - 1e-6)) / 2e-6, levels.view(6, 1, 1, 1)
    x, velocity = alpha(t) * x0 + sigma(t) * eps, slope(alpha) * x0 + slope(sigma) * eps
    given = eps if vp else velocity, x, levels
    for got, want in ((diffusion.add_noise(path, x0, eps, levels), x),
                      (path.target(x0, eps), given[0]), (path.x0_eps(*given), (x0, eps)),
                      (path.velocity(*given), velocity), (path.score(*given), -eps / sigma(t))):
        close(got, want)


@by_name
def test_noise_shift_solves_its_equation(path):
    sigma = lambda t: path.sigma(float(t)).item()
    for t, sigma_e in ((0.05, 0.01), (0.2, 0.05), (0.5, 0.1), (0.7, 0.02)):
        want = brentq(lambda s: sigma(s)**2 - sigma(t)**2 - sigma_e**2, t, 1, xtol=1e-14) - t
        assert diffusion.noise_shift(path, t, sigma_e).item() == pytest.approx(want, rel=1e-6)
        assert diffusion.extra_noise(path, t, want).item() == pytest.approx(sigma_e, rel=1e-6)
        exact, expansion = (diffusion.noise_shift(path, t, 0.005, order) for order in (False, True))
        close(expansion, exact, rtol=0.01, atol=0)


def test_float32_levels_hit_the_table_and_only_the_variance_learns_from_the_bound():
    t = torch.arange(1, 1001, dtype=torch.float32) / 1000
    assert torch.equal(PATHS[1].network_time(t), torch.arange(1000).float())
    out, (x0, eps) = torch.randn(2, 6, 4, 4, requires_grad=True), torch.rand(2, 2, 3, 4, 4)
    model = lambda *_, drop_noise: out
    loss = diffusion.training_loss(model, PATHS[1], x0, None, torch.tensor([0.001, 0.4]), eps)
    of_eps, of_variance = torch.autograd.grad(loss.sum(), out)[0].chunk(2, 1)
    close(of_eps, 2 * (out[:, :3] - eps) / 48)              # of the squared error alone
    assert of_variance.any()


def exact_moments(name, path, mean, std, steps, **options):
    """Mean and variance of a sampler's results on data N(mean, std²), without Monte Carlo.

    It is affine in start and noises, and one batch tells its response to each: row 0 starts at the
    mean, row 1 a standard deviation above it, and row 2 + i has the noise 1 at step i.
    """
    def denoise(x, t):
        alpha, sigma = path.alpha(t), path.sigma(t)
        off = (x - alpha * mean) / (alpha**2 * std**2 + sigma**2)
        eps, x0 = sigma * off, mean + alpha * std**2 * off
        return eps if isinstance(path, diffusion.VP) else eps - x0

    step, alpha, sigma = itertools.count(2), path.alpha(1.0).item(), path.sigma(1.0).item()
    row = torch.arange(steps + 2).view(-1, 1, 1, 1)
    x = alpha * mean + (row == 1).double() * math.hypot(alpha * std, sigma)
    if name != "ode":
        options["randn"] = lambda x: (row == next(step)).double()
    out = sample.SAMPLERS[name](denoise, x, path, steps=steps, **options).flatten()
    assert out[-1] == out[0]                                # the last step makes no noise
    return out[0].item(), (out[1:] - out[0]).square().sum().item()


@pytest.mark.parametrize("name, path, method, expected", [
    ("ddpm", 1, None, 1), ("sde", 0, None, 1), ("sde", 1, None, 1), ("ode", 0, "euler", 1),
    ("ode", 0, "heun", 2), ("ode", 1, "euler", 1), ("ode", 1, "heun", 2)])
def test_exact_scores_lead_to_the_data_with_the_order_of_the_sampler(name, path, method, expected):
    """An ODE leads to the state at its t_end, which is N(α mean, α² std² + σ²)."""
    path, t_end, errors = PATHS[path], 0.05 if method else 0.0, []
    alpha, sigma = path.alpha(t_end).item(), path.sigma(t_end).item()
    all_steps = np.array([25, 50, 100, 200]) * (1 if method else 4)
    for steps in map(int, all_steps):
        options = dict(method=method, t_end=t_end) if method else {}
        options |= dict(last_step=1 / steps) if name == "sde" else {}
        mean, variance = exact_moments(name, path, 0.7, 0.3, steps, **options)
        errors.append((abs(mean - 0.7 * alpha), abs(variance - (0.09 * alpha**2 + sigma**2))))
    for error in np.transpose(errors):
        order = -np.polyfit(np.log(all_steps), np.log(error), 1)[0]
        assert abs(order - expected) < 0.2 and error[-1] < 0.005 or max(error) < 1e-12, errors
    assert name != "ddpm" or variance < 0.09                # the posterior's is too narrow for data


def gradient(f, x):
    x = x.clone().requires_grad_()
    return torch.autograd.grad(f(x).sum(), x)[0]


def test_finite_steps_alone_shift_the_level_by_half_a_step():
    """For data without variance v = x / t, and a step makes the variance t² into t² − 2 t Δ + 4 Δ²,
    which is (t − Δ)² + 3 Δ². So what is beyond t² obeys e' = 4 e / t − 3 Δ: e = Δ (t − t⁴), and the
    shift is Δ (1 − t³) / 2.
    """
    seen, step = {}, 0.96 / 49
    denoise = lambda x, t: seen.update({t.item(): x.std().item()}) or x / t
    torch.manual_seed(0)
    diffusion.sample_sde(denoise, torch.randn(8000, 1, 8, 8), PATHS[0], steps=50)
    for t in [t for t in seen if 0.1 < t < 0.8]:
        assert seen[t] - t == pytest.approx(step * (1 - t**3) / 2, abs=6e-4 + 3 * step**2), t


@by_name
def test_nag_is_the_gradient_of_the_level_posterior(path):
    """For a mixture of Gaussians, guided() with its exact scores gives s(x|t) + w ∇ log p(t|x)."""
    levels, vp = torch.arange(1, 1001, 5).double() / 1000, isinstance(path, diffusion.VP)
    centres = torch.tensor([[1.0, 0.2], [-0.6, 0.9], [0.1, -1.2]], dtype=torch.float64)

    def log_p(x, t):                                            # (N, T) for x (N, 2), t (T,)
        alpha, variance = path.alpha(t), 0.04 * path.alpha(t)**2 + path.sigma(t)**2
        square = (x[:, None, None] - alpha[:, None, None] * centres).square().sum(-1)
        return (-square / (2 * variance[:, None])).logsumexp(-1) - variance.log()

    def network(x, time, y, drop_noise):
        level, x = (time[:1].double() + vp) / (1000 if vp else 1), x.flatten(1)
        score = torch.where(drop_noise[:, None], gradient(unknown, x),
                            gradient(lambda x: log_p(x, level), x))
        eps = -path.sigma(level) * score
        return (eps if vp else (eps - x) / (1 - level)).view(-1, 1, 1, 2)

    x, y = torch.randn(64, 1, 1, 2, dtype=torch.float64), torch.zeros(64, dtype=torch.long)
    for t in torch.tensor([0.101, 0.401, 0.801], dtype=torch.float64):
        known, unknown = lambda x: log_p(x, t[None])[:, 0], lambda x: log_p(x, levels).logsumexp(1)
        got = path.score(diffusion.guided(network, path, y, w_nag=3.0)(x, t), x, t).flatten(1)
        want = gradient(lambda x: known(x) + 3 * (known(x) - unknown(x)), x.flatten(1))
        assert (got - want).norm() / want.norm() < 1e-5


@by_name
def test_other_levels_push_a_state_with_too_much_noise_back_and_a_right_one_nowhere(path):
    """Data N(0, v) in many dimensions: the exact prediction is c(t) x, and |x|² tells the level."""
    v, vp = 1e-4, isinstance(path, diffusion.VP)
    variance = lambda t: v * path.alpha(t)**2 + path.sigma(t)**2

    def c(t):                                       # of E[ε|x] = σ x / variance, E[x_0|x] likewise
        return path.target(v * path.alpha(t), path.sigma(t)) / variance(t)

    def network(x, time, y, drop_noise):
        return c((time.double() + vp) / (1000 if vp else 1)).view(-1, 1, 1, 1) * x

    def read(x, t):                                 # the level whose variance is that of the state
        found = [brentq(lambda t: variance(t).item() - square, 1e-3, 1 - 1e-6)
                 for square in x.square().mean((1, 2, 3)).tolist()]
        return torch.tensor(found, dtype=torch.float64)

    t, y = 0.3, torch.zeros(64, dtype=torch.long)
    noise = torch.randn(64, 1, 48, 48, dtype=torch.float64, generator=torch.manual_seed(0))
    pushes = []
    for level in (t, t + 0.02):                     # of the state
        x = variance(level).sqrt() * noise
        branches = [lambda x, t: t + 0.02 + 0 * y, read]
        moved, by_reading = (diffusion.guided(network, path, y, 3.0, nag_level=branch)(x, t)
                             for branch in branches)
        assert torch.allclose(moved, (4 * c(t) - 3 * c(t + 0.02)) * x, rtol=1e-4)
        pushes.append(((by_reading - c(t) * x) * x).mean() / x.square().mean())
    assert abs(pushes[0]) < 0.05 * pushes[1]        # along x, of which the sampler takes more off


@by_name
def test_an_ideal_null_branch_gives_half_of_the_posterior_gradient_or_less(path):
    """A trained null branch gives E[prediction|x] over the levels, converted at one of them. If all
    is noise (x_0 = 0 in 400 dimensions), the level is read off |x|: by quadrature, the difference
    of the branches is, near the state's level, 1/2 (ε) or (1 − t)/2 (v) of ∇ log p(t|x)."""
    t, vp = torch.tensor(0.3, dtype=torch.float64), isinstance(path, diffusion.VP)
    sigmas = path.sigma((torch.arange(40_000).double() + 1) / 40_000)
    x = torch.full((1, 1, 1, 400), path.sigma(0.31).item(), dtype=torch.float64)    # of level 0.31
    posterior = (-400 * sigmas.log() - x.square().sum() / (2 * sigmas**2)).softmax(0)
    network = lambda x, time, y, drop_noise: torch.where(       # x_0 = 0: ε = v = x / σ
        drop_noise.view(-1, 1, 1, 1), x * (posterior / sigmas).sum(), x / path.sigma(t))
    denoise = diffusion.guided(network, path, torch.zeros(1, dtype=torch.long), w_nag=1.0)
    difference = path.score(denoise(x, t), x, t) + x / path.sigma(t)**2
    share = difference / (x * (posterior / sigmas**2).sum() - x / path.sigma(t)**2)
    assert share.mean().item() == pytest.approx(0.5 if vp else (1 - t.item()) / 2, rel=0.05)


@by_name
@pytest.mark.parametrize("guide_y", [None, torch.tensor([9, 9])], ids=["autoguidance", "domain"])
def test_guidance_is_its_sum_and_one_call_and_neutral_scales_are_the_plain_network(path, guide_y):
    """A guide acts where CFG does; autoguidance asks it with the class, domain guidance without."""
    model, weak, calls = tiny(), tiny(num_classes=9, depth=1), []
    x, y = torch.randn(2, 3, 8, 8), torch.tensor([0, 3])
    network = lambda x, *rest: calls.append(len(x)) or model(x, *rest)
    guide = lambda x, *rest: calls.append("guide") or weak(x, *rest)
    denoise = diffusion.guided(
        network, path, y, w_nag=2.0, nag_interval=(0.3, 0.6), cfg_scale=1.7, cfg_channels=2,
        null_class=4, cfg_interval=(0.1, 0.3), guide=guide, guide_y=guide_y, guide_scale=1.8)
    time = lambda t: path.network_time(t).float().expand(2)
    plain = lambda t: model(x, time(t), y)[:, :6 if isinstance(path, diffusion.VP) else 3]
    no_class = model(x, time(0.3), torch.tensor([4, 4]))
    no_level = model(x, time(0.3), y, torch.tensor([True, True]))
    weaker = weak(x, time(0.3), y if guide_y is None else guide_y)
    cond, want = plain(0.3)[:, :3], plain(0.3)                  # a variance is left alone
    want[:, :3] += 2 * (cond - no_level[:, :3]) + 0.8 * (cond - weaker[:, :3])
    want[:, :2] += 0.7 * (cond - no_class[:, :3])[:, :2]
    close(denoise(x, 0.3), want)
    assert torch.equal(denoise(x, 0.7), plain(0.7))             # where nothing acts, to the bit
    neutral = diffusion.guided(network, path, y, w_nag=0.0, cfg_scale=1.0, guide=guide)
    assert torch.equal(neutral(x, 0.3), plain(0.3))
    for level in (0.2, 0.4):                                    # CFG and guide; NAG
        denoise(x, level)
    assert calls == [6, "guide", 2, 2, 4, "guide", 4]


@by_name
def test_classifier_guidance_adds_its_gradient_to_the_score(path):
    """Beside CFG; where NAG acts, but not where α = 0 and no prediction shows the score."""
    model, (x, g) = tiny(), torch.randn(2, 2, 3, 8, 8, dtype=torch.float64)
    network = lambda x, *rest: model(x.float(), *rest).double()
    plain, pushed = (diffusion.guided(
        network, path, torch.tensor([0, 3]), cfg_scale=1.5, null_class=4, nag_interval=(0.4, 1.0),
        w_classifier=w, classifier=lambda x, t: g * t) for w in (0.0, 2.5))
    before, after = plain(x, 0.5), pushed(x, 0.5)
    moved = path.score(after[:, :3], x, 0.5) - path.score(before[:, :3], x, 0.5)
    close(moved, 2.5 * g * 0.5, rtol=1e-8, atol=1e-8)
    assert torch.equal(after[:, 3:], before[:, 3:])
    assert torch.equal(pushed(x, 0.3), plain(x, 0.3)) and pushed(x, 1.0).isfinite().all()


@pytest.mark.parametrize("message, call", [
    ("no level holds", lambda x: diffusion.noise_shift(PATHS[0], 0.9, 0.9)),
    ("levels t in", lambda x: diffusion.noise_shift(PATHS[1], 1.5, 0.1)),
    ("multiples of 1/1000", lambda x: diffusion.training_loss(
        lambda *_, drop_noise: x, PATHS[1], x, None, torch.tensor([0.0005]), x)),
    ("last_step", lambda x: diffusion.sample_sde(None, x, PATHS[0], last_step=1.0)),
    ("'rk4'", lambda x: diffusion.sample_ode(None, x, PATHS[0], method="rk4")),
    ("20×16", lambda x: models.VAE().encode(x)),
    ("needs 4", lambda x: fid.precision_recall(x[0, 0], x[0, 0, :3]))])
def test_what_cannot_be_done_is_a_value_error(message, call):
    with pytest.raises(ValueError, match=message):
        call(torch.zeros(1, 3, 20, 16))


# --------------------------------------------------------------------------------------------------
# models.py: the transformer, the autoencoder, weights of others


def test_a_fresh_network_outputs_zero_and_hides_the_level_only_where_asked():
    x, y, t = torch.randn(4, 3, 8, 8), torch.tensor([0, 1, 4, 4]), torch.rand(4)
    assert not models.MODELS["SiT-Ti/2"](input_size=8, in_channels=3, num_classes=4)(x, t, y).any()
    model, hidden = tiny(), torch.tensor([True, False, True, False])
    moved = (model(x, t + 0.3, y, hidden) - model(x, t, y, hidden)).flatten(1).abs().amax(1)
    assert moved[hidden].max() == 0 and moved[~hidden].min() > 1e-3
    assert torch.equal(model(x, t, y), model(x, t, y, torch.zeros(4, dtype=torch.bool)))


@pytest.mark.parametrize("name", ["DiT-Ti/4", "SiT-S/4", "DiT-B/8"])
def test_flops_are_those_that_torch_counts(name):
    model = models.MODELS[name](input_size=32, in_channels=4, num_classes=10)
    unfused = torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)   # as it counts
    with FlopCounterMode(display=False) as counter, torch.no_grad(), unfused:
        model(torch.randn(2, 4, 32, 32), torch.rand(2), torch.tensor([0, 1]))
    assert counter.get_total_flops() / 2 == pytest.approx(model.flops(), rel=1e-6)


def test_checkpointed_blocks_keep_less_and_every_parameter_gets_the_same_gradient():
    model, found, (x0, eps) = tiny(depth=4).requires_grad_(True), [], torch.randn(2, 2, 3, 8, 8)
    batch = x0, torch.tensor([0, 3]), torch.tensor([0.2, 0.5]), eps, torch.tensor([False, False])
    for model.grad_checkpoint in (False, True):
        kept = []
        keep = lambda tensor: kept.append(tensor.numel()) or tensor
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = diffusion.training_loss(model, PATHS[1], *batch).sum()
        found.append((sum(kept), torch.autograd.grad(loss, [*model.parameters()])))
    assert found[1][0] < found[0][0] / 3
    close(found[1][1], found[0][1])


def test_vae_decoder_is_its_straight_path_where_its_residual_branches_are_silent():
    """That is: conv_in, three times a nearest doubling and a convolution, a norm, conv_out."""
    vae, z = models.VAE().eval().requires_grad_(False), torch.randn(2, 4, 3, 2)
    weights = vae.state_dict()
    for name, value in weights.items():
        value.mul_(".conv2." not in name and ".to_out." not in name)
    layer = lambda x, name, padding=1: F.conv2d(x, weights[f"{name}.weight"],
                                                weights[f"{name}.bias"], padding=padding)
    x = layer(layer(z / 0.18215, "post_quant_conv", 0), "decoder.conv_in")
    for i in range(4):
        if i > 1:                                           # where the width changes
            x = layer(x, f"decoder.up_blocks.{i}.resnets.0.conv_shortcut", 0)
        if i < 3:
            x = x.repeat_interleave(2, 2).repeat_interleave(2, 3)
            x = layer(x, f"decoder.up_blocks.{i}.upsamplers.0.conv")
    x = layer(F.silu(F.group_norm(x, 32, eps=1e-6)), "decoder.conv_out")
    close(vae.decode(z), x, rtol=1e-4)


def test_vae_loads_from_both_namings_and_from_a_file_of_before_2020(tmp_path):
    vae = models.VAE().half().requires_grad_(False)
    old = new = vae.state_dict()
    for ours, theirs in (("q", "query"), ("k", "key"), ("v", "value"), ("out.0", "proj_attn")):
        old = {key.replace(f".0.to_{ours}.", f".0.{theirs}."): old[key] for key in old}
    torch.save(new, tmp_path / "new")
    torch.save(old, tmp_path / "old", _use_new_zipfile_serialization=False)
    a, b = (models.fingerprint(models.load_vae(tmp_path / name)) for name in ("new", "old"))
    assert len(old.keys() - new.keys()) == 16
    assert a == b == models.fingerprint(vae.float())
    vae.quant_conv.bias[0] += 0.1
    assert a != models.fingerprint(vae)


def from_file(folder, contents, name=None):
    """The model and its settings in a checkpoint of these contents."""
    file = folder / f"{len(os.listdir(folder))}.pt"
    torch.save(contents, file)
    return models.from_checkpoint(file, name)


@by_name
def test_a_null_embedding_that_was_never_trained_is_the_mean_over_the_levels(path, tmp_path):
    """In weights of others, of which SiT's are converted, and in our own without noise dropout."""
    null = "t_embedder.null_embedding"
    load = functools.partial(from_file, tmp_path)
    name, vp = ("DiT-Ti/2", True) if path is PATHS[1] else ("SiT-Ti/2", False)
    network = tiny(models.MODELS[name])
    whole, zero = network.state_dict(), torch.zeros(128)
    model, s = load({key: value for key, value in whole.items() if key != null}, name)
    mean = model.t_embedder(path.network_time(torch.arange(1, 1001) / 1000)).mean(0)
    close(model.t_embedder.null_embedding, mean, rtol=1e-2, atol=1e-3)
    x, y, t = torch.randn(3, 3, 8, 8), torch.tensor([1, 4, 0]), torch.tensor([0.3, 0.8, 1.0])
    want = network(x, t, y) if vp else -network(x, 1 - t, y)        # SiT's time and sign
    close(model(x, t, y), want, rtol=1e-3, atol=1e-4)
    for s["noise_drop"], expected in ((0.0, mean), (0.1, zero)):
        ours, _ = load({"ema": {**model.state_dict(), null: zero}, "settings": s})
        close(ours.t_embedder.null_embedding, expected, rtol=1e-2, atol=1e-3)
    assert_same(dict(load(whole, name)[0].state_dict()), dict(whole))     # of train.py, unconverted


def test_checkpoints_of_others_training_code_load_by_their_arguments(tmp_path):
    """They save "ema" and "args", a Namespace or a dict; wrappers leave prefixes."""
    state = dict(tiny(models.MODELS["SiT-Ti/4"]).state_dict())
    del state["t_embedder.null_embedding"]
    average = {f"module._orig_mod.net.{key}": 2 * value for key, value in state.items()}
    sit = dict(model="SiT-Ti/4", data_path="/food", path_type="Linear", prediction="velocity")
    for args in (argparse.Namespace(**sit), sit):
        contents = {"model": state, "ema": average, "opt": {}, "args": args}
        model, s = from_file(tmp_path, contents)
        assert (s["model"], s["data"]) == ("SiT-Ti/4", "/food") and s["interpolant"] == "linear"
        assert torch.equal(model.pos_embed, 2 * state["pos_embed"])
    _, s = from_file(tmp_path, {"state_dict": state, "args": {"model": "DiT-Ti/4"}})
    assert s["interpolant"] == "vp"
    with pytest.raises(ValueError, match="--path-type GVP"):
        from_file(tmp_path, {"model": state, "args": {**sit, "path_type": "GVP"}})
    with pytest.raises(ValueError, match=r"linear.weight is \(96, 128\), expected \(24, 128\)"):
        from_file(tmp_path, {"model": state}, "DiT-Ti/2")


@pytest.mark.parametrize("end", [32, 40])
def test_safetensors_are_read_and_offsets_beyond_the_file_refused(tmp_path, end):
    """The format: length of the header, header in JSON, numbers."""
    file, state = tmp_path / "x.safetensors", {"a": torch.rand(2, 3), "b": torch.ones(4).bfloat16()}
    text = json.dumps({"a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
                       "b": {"dtype": "BF16", "shape": [4], "data_offsets": [end - 8, end]},
                       "__metadata__": {"format": "pt"}}).ljust(200).encode()
    data = [value.view(torch.uint8).numpy().tobytes() for value in state.values()]
    file.write_bytes(struct.pack("<Q", len(text)) + text + b"".join(data))
    if end == 32:
        return assert_same(models.load_file(file), state)
    with pytest.raises(ValueError, match="x.safetensors is not a readable checkpoint"):
        models.load_file(file)


# --------------------------------------------------------------------------------------------------
# train.py: data


def test_shapes_are_a_function_of_seed_and_index_and_some_are_a_data_set_of_their_own():
    data, some = (train.open_data(name, 16, 3) for name in ("shapes", "shapes:star,cross"))
    (images, labels), (few, few_labels) = data.images(range(400)), some.images(range(400))
    assert np.array_equal(data.images([7, 399])[0], images[[7, 399]])
    assert not np.array_equal(train.Shapes(16, seed=4).images([7])[0][0], images[7])
    same = np.array(data.classes)[labels] == np.array(["cross", "star"])[few_labels]
    assert same.sum() > 60 and np.array_equal(images[same], few[same])          # the very images


BATCHES = dict(seed=0, batch=4, interpolant="vp", levels="uniform", class_drop=0.5, noise_drop=0.3,
               in_channels=3, input_size=16, num_classes=2)


def write_photos(folder):
    """24 images of several sizes, modes and formats, eight in each of three classes."""
    kinds = ["RGB.png", "L.jpg", "P.gif", "CMYK.tif", "RGB.webp", "RGBA.png"]
    for i, image in enumerate(train.Shapes(96).images(range(24))[0].transpose(0, 2, 3, 1)):
        mode, suffix = kinds[i % 6].split(".")
        file = folder / f"{'cab'[i // 8]}/{i:02}.{suffix}"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).resize((32 + i, 80 - 2 * i)).convert(mode).save(file)
    return folder


@pytest.fixture
def photos(tmp_path):
    return write_photos(tmp_path / "photos")


def test_image_folder_gives_classes_crops_and_flips(photos):
    data, flip = train.ImageFolder(photos, 48), np.arange(24) % 2
    (images, labels), (mirrored, _) = data.images(range(24), flip), data.images(range(24), 1 - flip)
    assert data.classes == ["a", "b", "c"] and labels.tolist() == [0] * 8 + [1] * 8 + [2] * 8
    assert np.array_equal(images, mirrored[..., ::-1])
    exact = np.asarray(Image.open(photos / "b/16.webp"))        # is 48×48 already
    assert np.array_equal(images[8], exact.transpose(2, 0, 1))
    wide = np.repeat(np.arange(48, dtype=np.uint8), 4)[None, :, None].repeat(64, 0).repeat(3, 2)
    assert np.array_equal(train.centre_crop(Image.fromarray(wide), 16)[0, :, 0], np.arange(16, 32))


def test_only_folders_of_images_are_classes(photos):
    def found(*added):
        for name in added:
            (photos / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(photos / "c/01.jpg", photos / name)
        data = train.ImageFolder(photos, 16)
        return dict(zip(data.classes, np.bincount(data.labels)))

    assert found(".ipynb_checkpoints/1.jpg", "__MACOSX/a/1.jpg", "b/._0.jpg", "b/.x/1.jpg",
                 "runs/1/1.jpg", "checkpoints/1.jpg", "samples/1.jpg") == {"a": 8, "b": 8, "c": 8}
    (photos / "linked").symlink_to(photos / "b")                # in a class, runs is any name:
    assert found("my.gif/runs/2.jpg") == {"a": 8, "b": 8, "c": 8, "linked": 8, "my.gif": 1}
    (photos / "bees").mkdir()
    with pytest.raises(ValueError, match="no images in .*photos/bees"):
        found()
    (photos / "bees/up").symlink_to(photos)
    with pytest.raises(ValueError, match="bees/up is a link"):
        found()


def test_images_are_read_upright_and_16_bits_keep_their_brightness(tmp_path):
    """Bright on the left, and to be turned by a quarter. Of floats nobody knows the range; for
    PostScript Pillow would start Ghostscript."""
    exif, file = Image.Exif(), tmp_path / "a.png"
    exif[0x0112] = 6
    for pixels in (np.zeros((16, 16, 3), np.uint8), np.zeros((16, 16), np.uint16)):
        pixels[:, :8] = 200 if pixels.ndim == 3 else 200 * 257
        Image.fromarray(pixels).save(file, exif=exif)
        upright = np.asarray(train.read_image(file))
        assert (upright[:8] == 200).all() and not upright[8:].any() and upright.shape == (16, 16, 3)
    Image.fromarray(np.zeros((8, 8), np.float32)).save(tmp_path / "float.tif")
    Image.new("RGB", (8, 8)).save(tmp_path / "script.png", "eps")
    for name in ("float.tif.*mode F", "script.png.*cannot identify"):
        with pytest.raises(train.DataError, match=name):
            train.read_image(tmp_path / name.split(".*")[0])


def test_batches_are_shared_out_and_visit_every_image_once_an_epoch(photos, monkeypatch):
    batches = train.Batches(train.ImageFolder(photos, 16), SimpleNamespace(**BATCHES))
    seen = np.concatenate([batches.indices(step) for step in range(12)])        # two epochs of 24
    assert sorted(seen[:24]) == sorted(seen[24:]) == list(range(24))
    whole = batches[5]
    monkeypatch.setattr(train, "WORLD", 2)
    for rank in (0, 1):
        monkeypatch.setattr(train, "RANK", rank)
        assert_same(batches[5], [part[2 * rank:2 * rank + 2] for part in whole])


def write_latents(folder, moments, **changes):
    """A folder of latents as train.py writes it, of two classes."""
    folder.mkdir()
    n, parts = train.Latents.per_part, math.ceil(len(moments) / train.Latents.per_part)
    for k in range(parts):
        np.save(folder / f"{k}.npy", moments[k * n:(k + 1) * n])
    note = {"data": "photos", "image_size": 8 * moments.shape[-1], "images": len(moments),
            "classes": ["a", "b"], "counts": [1, len(moments) - 1], "vae": None, "weights": "w",
            "parts": [f"{k}.npy" for k in range(parts)]}
    (folder / "latents.json").write_text(json.dumps({**note, **changes}))


def test_training_draws_from_the_posteriors_and_hides_class_and_level_as_often_as_told(
        tmp_path, monkeypatch):
    """Of posteriors whose means tell number and flip, with deviations of 1/2."""
    monkeypatch.setattr(train.Latents, "per_part", 4)
    moments = np.full((10, 2, 8, 16, 16), 0.5, np.float16)
    moments[:, :, :4] = np.arange(20).reshape(10, 2, 1, 1, 1)
    write_latents(tmp_path / "latents", moments)
    args = SimpleNamespace(**{**BATCHES, "batch": 10, "in_channels": 4})
    batches = train.Batches(train.Latents(tmp_path / "latents"), args)
    x0, y, _, eps, hidden = map(torch.cat, zip(*(batches[step] for step in range(50))))
    mean = x0.mean((1, 2, 3)).round()
    number, flip, classless = mean // 2, mean % 2, y == 2
    assert number.tolist() == [i for step in range(50) for i in batches.indices(step)]
    assert torch.equal(y[~classless], (number > 0).long()[~classless])
    for share, expected in ((flip, 0.5), (classless, 0.5), (hidden, 0.3)):
        assert share.float().mean().item() == pytest.approx(expected, abs=0.08)
    noise = 2 * (x0 - mean.view(-1, 1, 1, 1))
    close(torch.cov(torch.stack([noise.flatten(), eps.flatten()])), torch.eye(2), rtol=0, atol=0.02)


# --------------------------------------------------------------------------------------------------
# The noise estimator, and what is made of its readings


def test_truncated_normal_is_scipys_also_where_its_mass_has_no_place_in_a_float():
    loc, scale, t = torch.tensor([
        (-0.3, 0.1, 0.05), (0.0, 0.5, 0.9), (0.4, 0.02, 0.41), (0.97, 0.1, 0.99), (1.2, 0.3, 0.5),
        (-0.9, 0.01, 0.001), (10.0, 0.02, 0.999), (-4.0, 0.01, 1e-4), (1.0, 1.0, 0.0)]).double().T
    theirs = truncnorm(-loc / scale, (1 - loc) / scale, loc, scale)
    ours = models.TruncatedNormal(loc, scale)
    same = functools.partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-6)
    same(ours.log_prob(t), theirs.logpdf(t))
    same(ours.cdf(t), theirs.cdf(t))
    same(ours.mean(), theirs.mean())
    of_loc = gradient(lambda loc: models.TruncatedNormal(loc, scale).log_prob(t), loc)
    assert of_loc.isfinite().all()


@pytest.mark.parametrize("size, channels", [(8, 3), (7, 1), (32, 4)])
def test_estimator_gradient_is_that_of_its_log_density(size, channels):
    """Oracle: the central difference along it. Samplers ask without gradient, and in bf16."""
    torch.manual_seed(0)
    net, x = models.NoiseEstimator(size, channels), torch.randn(3, channels, size, size)
    torch.nn.init.normal_(net.head[-1].weight, std=0.1)
    t = torch.tensor([0.3, 0.5, 0.9])
    g = net.gradient(x, t)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(net.gradient(x, t), g) and torch.equal(net.gradient(x, 0.5)[1], g[1])
    norm = g.flatten(1).norm(dim=1)
    up, down = (net(x + h * g / norm.view(-1, 1, 1, 1)).log_prob(t) for h in (5e-3, -5e-3))
    close((up - down) / 1e-2, norm, rtol=1e-2, atol=1e-4)


def trained(path, draw, size, steps, batch, lr, jitter):
    """An estimator after `steps` steps of estimator.fit on images that draw(n) gives."""
    args, rng = SimpleNamespace(steps=steps, lr=lr, jitter=jitter, seed=0), np.random.default_rng(0)
    net = models.NoiseEstimator(size, 3)
    net.start_from(estimator.jitter(draw(2048), jitter, rng))
    levels = (torch.from_numpy(path.training_level(rng.random(batch))).float()
              for _ in range(steps))
    batches = ((draw(batch), t, torch.randn(batch, 3, size, size)) for t in levels)
    estimator.fit(net, path, batches, args, torch.optim.AdamW(net.parameters(), weight_decay=0))
    return net.eval().requires_grad_(False)


@slow
def test_estimator_finds_the_exact_posterior_of_gaussian_data():
    """Of data N(m, U diag(λ) Uᵀ), with axes U in no relation to the pixels; by quadrature."""
    torch.manual_seed(0)
    axes, mean = torch.linalg.qr(torch.randn(192, 192).double())[0], 0.3 * torch.randn(192).double()
    variances, path = 7.7 * torch.arange(1, 193).double()**-1.5, PATHS[0]     # 0.1 in the mean
    levels, products = (torch.arange(400).double() + 0.5) / 400, []

    def draw(n):
        return ((mean + variances.sqrt() * torch.randn(n, 192)) @ axes.T).float().view(n, 3, 8, 8)

    def log_p(x, t):                                            # (N, T) for x (N, 192), t (T,)
        total = path.alpha(t)**2 * variances[:, None] + path.sigma(t)**2
        off = (x @ axes)[..., None] - path.alpha(t) * mean[:, None]
        return -(total.log() + off**2 / total).sum(1) / 2

    net = trained(path, draw, 8, 2000, 256, lr=4e-4, jitter=0.0)
    for t in torch.tensor([0.2, 0.3, 0.4, 0.5, 0.6, 0.7]).double():
        x = diffusion.add_noise(path, draw(400), torch.randn(400, 3, 8, 8), t).float()
        flat, g = x.double().flatten(1), net.gradient(x, t).double().flatten(1)
        error = net(x).mean() - log_p(flat, levels).softmax(1) @ levels
        assert error.abs().mean() < 0.01 and error.mean().abs() < 0.004, t
        exact = gradient(lambda x: log_p(x, t[None])[:, 0] - log_p(x, levels).logsumexp(1), flat)
        products.append(torch.stack([(g * exact).sum(), g.square().sum(), exact.square().sum()]))
    along, ours, theirs = sum(products)
    assert along / (ours * theirs).sqrt() > 0.9                 # the cosine, pooled


@pytest.mark.parametrize("path, steps, levels", [
    (PATHS[0], 400, (0.2, 0.6)), pytest.param(PATHS[1], 700, (0.1, 0.3), marks=slow)])
def test_estimator_sees_the_shift_that_known_noise_makes(path, steps, levels):
    """Real data noised to t, and further by a known σ_e."""
    torch.manual_seed(0)
    images = train.to_float(torch.from_numpy(train.Shapes(16).images(range(12_000))[0]))
    net = trained(path, lambda n: images[torch.randint(10_000, (n,))], 16, steps, 128, 1e-3, 0.4)
    for t, known in itertools.product(levels, (0.02, 0.05)):
        x = diffusion.add_noise(path, images[10_000:], torch.randn(2000, 3, 16, 16), t).float()
        sigma_e = (path.sigma(t + known)**2 - path.sigma(t)**2).sqrt().item()
        seen = (net(x + sigma_e * torch.randn(x.shape)).mean() - net(x).mean()).mean().item()
        assert seen == pytest.approx(known, rel=0.1), t


def test_the_shift_has_a_normal_interval_and_settings_are_compared_sample_by_sample():
    """±1.96 √(s²/n + r²/m) for a difference of means; of two settings, from paired differences."""
    normal = np.random.default_rng(0).standard_normal
    real, plain = 0.41 + 0.02 * normal((4000, 1)), 0.43 + 0.03 * normal((1000, 1))
    states = plain - 0.005 + 0.002 * normal((1000, 1))
    table = estimator.shift_table(PATHS[0], np.array([0.4]), np.ones(1), real, states, plain)
    shift, less = states.mean() - real.mean(), plain - states
    for name, interval, mean, error in (
            ("shift", "interval", shift, (states.var() / 1000 + real.var() / 4000)**0.5),
            ("less_than_first", "less_interval", less.mean(), less.std() / 1000**0.5)):
        got = np.array([table[name][0], *table[interval][0]])
        np.testing.assert_allclose(got, mean + error * np.array([0, -1.96, 1.96]))
    assert diffusion.noise_shift(PATHS[0], 0.4, table["sigma_e"]).item() == pytest.approx(shift)


def test_states_are_read_where_the_sampler_keeps_them():
    """Where v = x, a step h of Heun's rule multiplies the state by 1 − h + h²/2. Of the two states
    that it asks about at a level, the second is the one that it keeps."""
    options = "--sampler ode --steps 12 --nag-interval 0 1 --precision fp32 --no-compile"
    args = sample.arguments().parse_args(options.split())
    s = dict(interpolant="linear", in_channels=1, input_size=2, image_size=2, num_classes=1)
    sampler = sample.Sampler(lambda x, *_: x, s, args, [0], torch.device("cpu"))
    levels = estimator.measured_levels(sampler, 5)
    assert levels == pytest.approx([1 / 6, 2 / 6, 3 / 6, 4 / 6, 5 / 6])
    reader = lambda x: SimpleNamespace(mean=lambda: x.flatten(1)[:, 0])
    seen, *_ = estimator.observe(reader, sampler, 7, 3, levels)
    start = train.sample_noise(0, range(7))(torch.empty(7, 1, 2, 2))[:, 0, 0, :1].numpy()
    assert seen == pytest.approx(start * (1 - 1 / 12 + 1 / 288)**np.arange(10, 1, -2), rel=1e-5)


def test_a_tenth_of_the_data_is_held_out(photos):
    data = train.ImageFolder(photos, 16)
    contents = lambda part, n: {(image.tobytes(), int(label)) for image, label in
                                zip(*part.images(np.arange(n), np.zeros(n, bool)))}
    trained_on, held = (contents(part, len(part)) for part in train.split(data, 0, 0.1, 20))
    assert (len(trained_on), len(held)) == (22, 2) and trained_on | held == contents(data, 24)


# --------------------------------------------------------------------------------------------------
# fid.py: the metrics


@pytest.mark.parametrize("height, width, size", [(7, 12, 9), (16, 16, 299), (40, 33, 20)])
def test_resizing_is_the_rule_of_tensorflow_1(height, width, size):
    """Output pixel i lies at i · in / out, and between two pixels all is linear."""
    want = image = np.random.default_rng(0).random((height, width), np.float32)
    for n in (width, height):
        want = [np.interp(np.arange(size) * n / size, np.arange(n), line) for line in want]
        want = np.transpose(want)
    got = fid.resize_tf1(torch.from_numpy(image)[None, None], size)[0, 0]
    np.testing.assert_allclose(got, want, atol=2e-5)


def test_inception_logits_have_no_bias_and_its_spatial_features_are_seven_channels():
    images, net = torch.randint(0, 256, (2, 3, 50, 70), dtype=torch.uint8), inception()
    pool, spatial, logits = net(images)
    assert (pool.shape[1], spatial.shape[1], logits.shape[1]) == (2048, 17 * 17 * 7, 1008)
    close(logits, pool @ net.fc.weight.T)
    net.Mixed_6d.branch1x1.conv.weight[7:] = 0
    close(net(images)[1], spatial)


def test_frechet_distance_of_gaussians_is_its_closed_form():
    """Of covariances that commute, also of rank 20; and of 2×2 blocks in one random basis, where
    tr √M = √(tr M + 2 √det M) for a block M of Σ_a Σ_b."""
    rng = np.random.default_rng(0)
    mu1, mu2 = rng.standard_normal((2, 60))
    apart, (basis, _) = ((mu1 - mu2)**2).sum(), np.linalg.qr(rng.standard_normal((60, 60)))
    for l1, l2 in (rng.random((2, 60)), rng.random((2, 60)) * (np.arange(60) < 20)):
        got = fid.frechet_distance(mu1, basis * l1 @ basis.T, mu2, basis * l2 @ basis.T)
        assert got == pytest.approx(apart + ((l1**0.5 - l2**0.5)**2).sum(), rel=1e-6)
    roots = rng.random((2, 30, 2, 2))
    blocks = roots @ roots.swapaxes(2, 3)
    a, b = (basis @ scipy.linalg.block_diag(*side) @ basis.T for side in blocks)
    M = blocks[0] @ blocks[1]
    trace = np.sqrt(np.trace(M, axis1=1, axis2=2) + 2 * np.sqrt(np.linalg.det(M))).sum()
    want = apart + np.trace(a + b) - 2 * trace
    assert fid.frechet_distance(mu1, a, mu2, b) == pytest.approx(want, rel=1e-6)


@slow
def test_frechet_distance_is_five_times_as_fast_as_the_root_of_a_product():
    """Both at their better one of two turns: the first of each also starts threads."""
    a, b = (np.cov(x.T) for x in np.random.default_rng(0).standard_normal((2, 3000, 2048)))
    zero, found, seconds = np.zeros(2048), {}, {}
    ways = {"theirs": lambda: np.trace(a + b - 2 * scipy.linalg.sqrtm(a @ b)).real,
            "ours": lambda: fid.frechet_distance(zero, a, zero, b)}
    for name in 2 * list(ways):
        start = time.perf_counter()
        found[name] = ways[name]()
        seconds[name] = min(time.perf_counter() - start, seconds.get(name, math.inf))
    assert found["ours"] == pytest.approx(found["theirs"], rel=1e-6)
    assert seconds["theirs"] > 5 * seconds["ours"]


@pytest.mark.parametrize("n, dims", [(40, 300), (100, 64), (1000, 64)])
def test_frechet_distance_of_features_is_real_and_not_negative(n, dims):
    """With Σ = X Xᵀ and Σ' = Y Yᵀ, tr √(Σ Σ') is the sum of the singular values of Xᵀ Y, where one
    or both have fewer features than dimensions, too; and nothing lies between a set and itself."""
    x, y = torch.randn(n, dims).double(), 0.7 * torch.randn(n // 2, dims).double() + 0.3
    X, Y = ((side - side.mean(0)) / math.sqrt(len(side) - 1) for side in (x, y))
    want = (x.mean(0) - y.mean(0)).square().sum() + X.square().sum() + Y.square().sum()
    want = (want - 2 * torch.linalg.svdvals(X @ Y.T).sum()).item()
    a, b = fid.Moments.of_features(x), fid.Moments.of_features(y)
    c, d = ((side.mean(0), torch.cov(side.T)) for side in (x, y))
    assert a.distance(b) == pytest.approx(want) == fid.frechet_distance(*c, *d)
    assert 0 <= a.distance(a) < 1e-6 and 0 <= fid.frechet_distance(*c, *c) < 1e-6


def test_inception_score_precision_and_recall_by_construction():
    assert fid.inception_score(torch.randn(1, 1008).expand(6000, -1)) == pytest.approx(1)
    certain = 1e4 * torch.eye(1008)
    assert fid.inception_score(certain.repeat(2, 1), split=1008) == pytest.approx(1008)
    half = certain[torch.arange(5010) % 2]
    half[5000:] = half[0]
    assert fid.inception_score(half) == pytest.approx((2 + 1) / 2)     # the mean of two splits
    cloud = lambda n, at: torch.randn(n, 16) * 0.01 + at
    real, far = torch.cat([cloud(300, 0.0), cloud(100, 5.0)]), cloud(100, -7.0)
    assert fid.precision_recall(real, torch.cat([real[300:], far])) == (0.5, 0.25)
    assert fid.precision_recall(real, real) == (1, 1) and fid.precision_recall(real, far) == (0, 0)


# --------------------------------------------------------------------------------------------------
# How the scripts are run below: as a user runs them, but for seconds, on shapes of 8×8

SCRIPTS = {"train.py": train, "sample.py": sample, "estimator.py": estimator, "fid.py": fid}
SMALL = ("train.py --model SiT-Ti/tiny --image-size 8 --batch 8 --precision fp32 --workers 0 "
         "--cooldown 0")
LATENT = ("train.py --image-size 32 --batch 4 --precision fp32 --workers 1 --cooldown 0 "
          "--vae small.bin")


class SmallVAE(models.VAE):
    """Two layers in place of 84 million weights, which take seconds to load and to fingerprint."""

    def __init__(self):
        torch.nn.Module.__init__(self)
        self.encoder = torch.nn.Conv2d(3, 8, 8, 8)
        self.decoder = torch.nn.ConvTranspose2d(4, 3, 8, 8)
        self.quant_conv = self.post_quant_conv = torch.nn.Identity()


# Lines of Python that change something in a script
SMALL_VAE = "models.VAE = SmallVAE"
NO_GRID = "train.write_grid = lambda *args: None"
QUICK = f"{NO_GRID}; {SMALL_VAE}; estimator.HELD_OUT = 0.1, 200"     # calibrate by fewer images
NO_VAE = "models.load_vae = lambda path: torch.nn.Identity()"
OFFLINE = "torch.hub.load_state_dict_from_url = None"


@functools.cache
def forks():
    """Processes forked off one that has imported everything: it saves two seconds a script."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        multiprocessing.forkserver.ensure_running()
    return context


def in_child(cwd, command, changes, files, variables):
    """Be a script, after lines of Python have changed something in it."""
    multiprocessing.set_start_method(None, force=True)           # the default, as in any script
    signal.signal(signal.SIGINT, signal.default_int_handler)     # though the tests may ignore it
    os.chdir(cwd)
    for number, file in enumerate(files, 1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_APPEND), number)
    os.environ.update(variables)
    train.RANK = train.LOCAL_RANK = int(variables["RANK"])
    train.WORLD = int(variables["WORLD_SIZE"])
    for line in changes:
        exec(line, globals())
    sys.argv = shlex.split(command)
    train.one_line_errors(SCRIPTS[sys.argv[0]].main)


class Run:
    """A script in the background, or one for each of several ranks, told so as torchrun does."""

    def __init__(self, cwd, command, *changes, ranks=1):
        self.name, self.processes = command.split()[0], []
        self.files = tempfile.NamedTemporaryFile(), tempfile.NamedTemporaryFile()
        files = [file.name for file in self.files]
        shared = {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks),
                  "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        for rank in range(ranks):
            variables = {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            process = forks().Process(target=in_child,
                                      args=(str(cwd), command, changes, files, variables))
            process.start()
            self.processes.append(process)

    def running(self):
        return any(process.is_alive() for process in self.processes)

    def until(self, happened):
        """Wait until something happens, the script ends, or minutes pass; whether it happened."""
        end = time.monotonic() + 300
        while not happened() and self.running() and time.monotonic() < end:
            time.sleep(0.002)
        return bool(happened())

    def end(self, number=None, seconds=300):
        """Wait until it ends, by a signal if need be; adds its status, and what it printed."""
        for process in self.processes:
            if number:
                os.kill(process.pid, number)
            process.join(seconds)
            process.kill()
            process.join()
        self.status = next((p.exitcode for p in self.processes if p.exitcode), 0)
        self.out, self.err = (Path(file.name).read_text(errors="replace") for file in self.files)
        assert "Traceback" not in self.err, self.err
        return self

    def error(self):
        """What it said, and ended with status 2."""
        line = self.end().err.strip().splitlines()[-1].split("\r")[-1]
        assert self.status == 2 and line.startswith(f"{self.name}: "), self.err
        return line


def ok(*args, seconds=300, **options):
    """Run a script to its end, which must be a good one; what it printed."""
    run = Run(*args, **options).end(seconds=seconds)
    assert run.status == 0, run.err
    return run.out


@pytest.fixture(autouse=True)
def no_script_outlives_its_test():
    forks()                                         # imports in the background, meanwhile
    yield
    for process in multiprocessing.active_children():
        if process.name.startswith("ForkServer"):
            process.kill()


def shell(cwd, line):
    """A line as a user types it, in the background; `python` is this one, the scripts are these."""
    for name in SCRIPTS:
        line = line.replace(name, f"{HERE}/{name}")
    line = line.replace("torchrun ", "python -m torch.distributed.run ")
    line = line.replace("python ", f"{sys.executable} ")
    return subprocess.Popen(["bash", "-o", "pipefail", "-c", line], cwd=cwd, text=True,
                            env={**os.environ, "OMP_NUM_THREADS": "1"},
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def output(process, status=0):
    """What a line for the shell says until its end, which must have this status."""
    out, _ = process.communicate(timeout=600)
    assert process.returncode == status, out
    return out


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def full_disk(size):
    """From here on this process can write so many bytes into a file, and no more."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def limit(megabytes):
    """From here on this process has memory for so much more than it has now."""
    now = re.search(r"VmData:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]
    size = 2**10 * int(now) + 2**20 * megabytes
    resource.setrlimit(resource.RLIMIT_DATA, (size, size))


def losses(out):
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))    # every step once
    return np.array([line["loss"] for line in lines], float)


def state(out, step):
    return models.load_file(out / f"checkpoints/{step:07}.pt")


def written(out):
    """What each file of a folder holds: of a checkpoint the numbers, of a log the losses."""
    found = {}
    for file in filter(Path.is_file, out.rglob("*")):
        name = str(file.relative_to(out))
        if file.suffix == ".pt":
            found[name] = models.load_file(file)
            del found[name]["settings"]
            for part in {"opt", "muon"} & found[name].keys():
                found[name][part] = found[name][part]["state"]
        elif file.suffix == ".jsonl":
            found[name] = losses(file.parent).tolist()
        else:
            found[name] = zlib.crc32(file.read_bytes())
    return found


def assert_same_run(a, b, step):
    """Two runs are at the same weights, moments and average, to the bit, after the same losses."""
    a, b = written(a), written(b)
    for name in (f"checkpoints/{step:07}.pt", "log.jsonl"):
        assert_same(a[name], b[name])
    assert len(a["log.jsonl"]) == step and "muon" in a[f"checkpoints/{step:07}.pt"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a run of 20 steps, photos of all kinds, a VAE, "published" weights, and these
    weights tuned for two steps in latents of the photos."""
    folder = tmp_path_factory.mktemp("place")
    one = Run(folder, f"{SMALL} --steps 20 --ckpt-every 10 --out runs/one")
    write_photos(folder / "photos")
    torch.manual_seed(0)
    torch.save(SmallVAE().state_dict(), folder / "small.bin")
    vae = {key: value.half() for key, value in models.VAE().state_dict().items()}
    model = models.MODELS["DiT-Ti/2"](input_size=4, in_channels=4, num_classes=10).state_dict()
    weights = {key: value + 0.02 * torch.randn(value.shape) for key, value in model.items()
               if "null" not in key}
    torch.save(vae, folder / "vae.bin")
    torch.save(weights, folder / "published.pt")
    ok(folder, f"{LATENT} --vae vae.bin --data photos --latents latents --init published.pt "
       "--model DiT-Ti/2 --steps 2 --out runs/tuned", NO_GRID)
    assert one.end().status == 0
    return folder


# --------------------------------------------------------------------------------------------------
# Reproducibility


def test_one_rank_two_ranks_and_two_nodes_follow_the_same_curve(tmp_path):
    """The batches are split into passes of 3 and less; the nodes are torchrun's, on loopback."""
    command = SMALL.replace("SiT-Ti/tiny", "DiT-Ti/4") + " --steps 12 --micro-batch 3 --out"
    meet = f"--nnodes 2 --rdzv-backend c10d --rdzv-endpoint 127.0.0.1:{free_port()}"
    nodes = [shell(tmp_path, f"torchrun {meet} {command} nodes") for _ in range(2)]
    for ranks in (1, 2):                            # while the nodes start
        ok(tmp_path, f"{command} on{ranks}", ranks=ranks)
    for node in nodes:
        output(node)
    for other in ("on2", "nodes"):
        np.testing.assert_allclose(losses(tmp_path / other), losses(tmp_path / "on1"), rtol=1e-5)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM,
                                    pytest.param(signal.SIGHUP, marks=slow)])
def test_a_run_that_was_stopped_ends_in_the_weights_of_an_unbroken_one(tmp_path, number):
    command = f"{SMALL} --ckpt-every 1000"
    run, log = Run(tmp_path, f"{command} --steps 1000000 --out run"), tmp_path / "run/log.jsonl"
    assert run.until(lambda: log.exists() and log.stat().st_size)
    assert run.end(number).status == 128 + number
    end = 15 + int(re.search(r"stopped at step (\d+); the same command goes on", run.out)[1])
    for name in ("run", "whole"):
        ok(tmp_path, f"{command} --steps {end} --out {name}")
    assert_same_run(tmp_path / "run", tmp_path / "whole", end)
    assert "run is finished" in ok(tmp_path, f"{command} --steps {end} --out run")


def test_the_first_ctrl_c_waits_for_the_pass_and_the_second_does_not(tmp_path):
    passes = "diffusion.training_loss = lambda *_: (print('a pass', flush=True), time.sleep(600))"
    run = Run(tmp_path, f"{SMALL} --out run", passes)
    said = lambda: Path(run.files[0].name).read_text()
    assert run.until(lambda: "a pass" in said())
    os.kill(run.processes[0].pid, signal.SIGINT)
    assert run.until(lambda: "stopping after this pass" in said()) and run.running()
    assert run.end(signal.SIGINT).status == 130


def test_samples_depend_on_seed_and_index_alone(place):
    def samples(batch, ranks=1, seed=0):
        ok(place, "sample.py --ckpt runs/one --num-samples 70 --steps 6 --w-nag 1 --precision fp32 "
           f"--batch {batch} --seed {seed} --out {seed}-{batch}.npz", ranks=ranks)
        with np.load(place / f"{seed}-{batch}.npz") as file:
            assert set(file) == {"arr_0", "arr_1"} and file["arr_0"].dtype == np.uint8
            assert file["arr_0"].shape == (70, 8, 8, 3) and file["arr_1"].shape == (70,)
            return file["arr_0"].astype(int), file["arr_1"]

    images, labels = samples(64)
    for others, other_labels in (samples(3), samples(16, ranks=3)):
        difference = abs(images - others)
        assert difference.max() <= 1 and (difference > 0).mean() <= 1e-3
        assert np.array_equal(labels, other_labels)
    assert (images != samples(64, seed=1)[0]).mean() > 0.5 and (images[0] != images[1]).any()


def test_a_grid_shows_the_same_seeds_with_and_without_guidance(place):
    command = "sample.py --ckpt runs/one --num 6 --steps 3 --precision fp32"
    said = ok(place, f"{command} --w-nag 3 --out grid.png")
    assert "NAG 3 on 0.1-1" in said and said.splitlines()[-1] == "grid.png"
    ok(place, f"{command} --out plain.png")
    left, right = np.split(np.asarray(Image.open(place / "grid.png")), 2, axis=1)
    plain = np.asarray(Image.open(place / "plain.png"))
    assert np.array_equal(left, plain) and (right != plain)[20:].any()    # below the title


def test_vp_and_a_folder_train_with_worker_processes_also_from_inside_the_folder(
        place, monkeypatch):
    """What the first start leaves there is no class for the second."""
    own = shutil.copytree(place / "photos", place / "own")
    monkeypatch.chdir(own)
    command = train.arguments().parse_args(["--data", "."])
    assert train.default_out(command) == "runs/own-SiT-Ti-2"
    for epochs in (1, 2):
        ok(own, f"train.py --data . --model DiT-Ti/2 --image-size 8 --batch 12 --epochs {epochs} "
           "--cooldown 0 "
           "--workers 2 --out runs/own", QUICK)
    assert len(losses(own / "runs/own")) == 24 * 2 // 12
    ok(own, "sample.py --num 2 --steps 3 --w-nag 2 --cfg-scale 1.5 --cfg-channels 1 --classes c "
       "--out two.npz")                             # of the newest checkpoint
    assert np.load(own / "two.npz")["arr_1"].tolist() == [2, 2]


# --------------------------------------------------------------------------------------------------
# What the scripts write, and the way from published weights to numbers


@pytest.mark.parametrize("command, size, passes", [
    ("train.py --grad-checkpoint", (16, 3), {"training": 3}),    # forward, and twice that backward
    ("sample.py --steps 2", (32, 4), {"no guidance": 2, "NAG": 4, "NAG + CFG": 6})])
def test_benchmarks_are_a_line_of_json(tmp_path, command, size, passes):
    told = json.loads(ok(tmp_path, f"{command} --benchmark --model SiT-Ti/2 --batch 2",
                         "train.benchmark.__defaults__ = (0,)"))                # seconds
    assert (told["model"], told["batch"], told["ranks"]) == ("SiT-Ti/2", 2, 1)
    assert told["precision"] in ("bf16", "fp32") and 0.1 < told["peak_memory_gb"] < 3
    for name, n in passes.items():
        flops = n * models.MODELS["SiT-Ti/2"](input_size=size[0], in_channels=size[1]).flops()
        mfu = told[name]["images_per_s"] * flops / told["matmul_flops"]
        assert told[name]["flops_per_image"] == flops
        assert told[name]["mfu"] == pytest.approx(mfu, rel=0.02, abs=1e-3)
    assert not list(tmp_path.iterdir())


def test_the_speed_in_the_log_leaves_out_what_is_no_training(tmp_path):
    """On a clock that advances by 1 s at each look, and by 1000 s during a validation or a grid."""
    ok(tmp_path, f"{SMALL} --steps 20 --ckpt-every 10 --out run", "clock = [0]",
       "def look(): clock[0] += 1; return clock[0]",
       "def long(*args): clock[0] += 1000; return 1.0",
       "train.time = SimpleNamespace(perf_counter=look)",
       "train.Trainer.validation_loss = train.write_grid = long")
    rows = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    assert len(rows) == 20 and min(row["images_per_s"] for row in rows) > 8


def test_single_images_are_those_of_the_npz_and_files_hold_their_command(place):
    command = "sample.py --ckpt runs/one/checkpoints --num 9 --batch 4 --steps 2 --precision fp32"
    for out in ("singles/", "singles/", "together.npz"):
        said = ok(place, f"{command} --out {out}")
    with np.load(place / "together.npz") as file:
        images = file["arr_0"]
    files = sorted((place / "singles").glob("*.png"))
    assert len(files) == 9 and files[8].name == "000008.png"
    assert all(np.array_equal(Image.open(f), image) for f, image in zip(files, images))
    assert Image.open(files[0]).text["command"] == f"{command} --out singles/"
    assert "--steps 20" in state(place / "runs/one", 20)["settings"]["command"]
    assert "finished" in ok(place, f"{command} --out together.npz") and "finished" not in said


def test_a_start_that_drew_nothing_leaves_its_place_to_other_settings(place):
    command = "sample.py --ckpt runs/one --num 2 --steps 2 --out free.npz"
    Run(place, f"{command} --w-nag 1e38 --cfg-scale 1e38").error()
    ok(place, f"{command} --w-nag 1")


def test_latents_are_the_posteriors_of_both_flips_whoever_encodes_them(place):
    """Oracle: the VAE, asked image by image."""
    for ranks in (1, 2):
        ok(place, f"{LATENT} --data photos/a --latents by{ranks} --steps 1 --out runs/by{ranks}",
           SMALL_VAE, "train.Latents.per_part = 3", ranks=ranks)
    one, two = ([np.load(file) for file in sorted((place / f"by{ranks}").glob("*.npy"))]
                for ranks in (1, 2))
    moments = np.concatenate(one)
    assert len(one) == 3 and np.array_equal(moments, np.concatenate(two))
    data, vae = train.ImageFolder(place / "photos/a", 32), SmallVAE().requires_grad_(False)
    vae.load_state_dict(models.load_file(place / "small.bin"))
    assert moments.shape == (8, 2, 8, 4, 4) and moments.dtype == np.float16
    for number in (2, 7):
        image = train.to_float(data[number])[None]
        for flip, pixels in enumerate((image, image.flip(3))):
            alone = torch.cat(vae.encode(pixels), 1)[0]
            np.testing.assert_allclose(moments[number, flip], alone, rtol=2e-3, atol=1e-4)
    assert abs(moments[:, 0] - moments[:, 1]).max() > 0.01
    assert (place / "runs/by2/samples/0000001.png").exists()     # of latents decoded


def test_an_unreadable_image_is_named_and_moving_it_lets_the_same_command_go_on(place):
    shutil.copytree(place / "photos", place / "torn")
    bad = place / "torn/b/19.jpg"                   # number 11 of 24, in the third of parts of 4
    bad.write_bytes(bad.read_bytes()[:300])
    def run():
        return Run(place, f"{LATENT} --data torn --latents torn-latents --steps 1 --out runs/torn",
                   QUICK, "train.Latents.per_part = 4")

    def parts():
        return {(file.name, file.stat().st_ino) for file in (place / "torn-latents").glob("*.npy")}

    assert "torn/b/19.jpg" in run().error()
    before = parts()
    bad.rename(place / "elsewhere.jpg")
    assert run().end().status == 0
    assert len(before) == 2 and before < parts()                # they were kept


def test_tuning_starts_from_the_weights_and_for_other_classes_from_a_new_label_table(place):
    """AdamW moves a weight by no more than about lr in a step."""
    table = "y_embedder.embedding_table.weight"
    after, before = state(place / "runs/tuned", 2), models.load_file(place / "published.pt")
    assert after["settings"]["classes"] == ["a", "b", "c"] and len(after["model"][table]) == 4
    moved = max((after["model"][key] - before[key]).abs().max() for key in before.keys() - {table})
    assert 0 < moved < 2 * after["settings"]["lr"]
    ok(place, f"{SMALL} --init runs/one --steps 1 --lr 1e-6 --out runs/same", QUICK)
    after, before = state(place / "runs/same", 1)["model"], state(place / "runs/one", 20)["ema"]
    assert all((after[key] - before[key]).abs().max() < 2e-6 for key in before)  # the table, too


def test_tuned_weights_are_sampled_with_all_guidance_evaluated_and_their_shift_measured(place):
    command = "sample.py --ckpt runs/tuned --num 8 --steps 3 --balanced --precision fp32"
    ok(place, f"{command} --out plain.npz")
    ok(place, f"{command} --w-nag 2 --cfg-scale 1.5 --guide runs/tuned --guide-unconditional "
       "--guide-scale 1.5 --out guided.npz")
    with np.load(place / "plain.npz") as plain, np.load(place / "guided.npz") as guided:
        assert guided["arr_0"].shape == (8, 32, 32, 3)
        assert guided["arr_1"].tolist() == [0, 1, 2, 0, 1, 2, 0, 1]
        assert (plain["arr_0"] != guided["arr_0"]).any(axis=(1, 2, 3)).all()
    assert "FD-random" in ok(place, "fid.py guided.npz photos --crop 32 --features random")
    ok(place, "estimator.py train --latents latents --interpolant vp --steps 3 --batch 4")
    ok(place, "estimator.py measure --ckpt runs/tuned --num 4 --steps 4 --w-nag 0 1")
    assert len(json.loads((place / "runs/tuned/shift/shift.json").read_text())["settings"]) == 2


def test_measure_tells_the_shift_of_every_weight_and_of_an_estimator_as_guide(place):
    def measured(out, options, ranks=1):
        ok(place, "estimator.py measure --ckpt runs/one --judge reader.pt --nag-interval 0 0.6 "
           f"--steps 8 --num-samples 40 --precision fp32 {options} --out {out}", ranks=ranks)
        settings = json.loads((place / f"{out}/shift.json").read_text())["settings"]
        return settings, [setting["levels"] for setting in settings]

    ok(place, "estimator.py train --image-size 8 --steps 40 --batch 32 --out reader.pt", QUICK)
    shutil.copy(place / "reader.pt", place / "guide.pt")
    (settings, levels), (_, by_two) = (
        measured(f"kept{ranks}", "--w-nag 0 2 --keep-images", ranks) for ranks in (1, 2))
    assert [setting["name"] for setting in settings] == ["no guidance", "NAG 2 on 0-0.6"]
    for setting, one, two in zip(settings, levels, by_two):
        np.testing.assert_allclose(one["shift"], two["shift"], atol=1e-4)
        near = np.array(one["t"]) < 0.5             # SNR > 1
        assert setting["mean_shift"] == pytest.approx(np.array(one["shift"])[near].mean())
    plain, nag = levels
    np.testing.assert_allclose(np.subtract(plain["shift"], nag["shift"]), nag["less_than_first"],
                               rtol=1e-5, atol=1e-9)
    _, (by_reader,) = measured("by-reader", "--w-nag-classifier 5 --estimator guide.pt")
    for guided in (nag, by_reader):                 # seen from the step after the first guided one
        assert ((np.subtract(plain["shift"], guided["shift"]) != 0) == near).all()

    one, two = (np.load(*(place / f"kept{ranks}").glob("NAG-2*.npz")) for ranks in (1, 2))
    different = abs(one["arr_0"].astype(int) - two["arr_0"])
    assert different.max() <= 1 and (different > 0).mean() < 1e-3
    assert np.array_equal(one["arr_1"], two["arr_1"])


def test_in_a_fresh_clone_there_is_a_checkpoint_to_sample_and_a_judge_is_trained(tmp_path):
    few = ("whole = estimator.train_estimator; estimator.train_estimator = "
           "lambda args: whole(SimpleNamespace(**{**vars(args), 'steps': 3}))")
    said = ok(tmp_path, "sample.py --w-nag 3 --num 2 --steps 2")
    assert "train your own with: python train.py" in said and "NAG 3 on 0.1-1" in said
    assert (tmp_path / said.splitlines()[-1]).parent == tmp_path / "runs/shapes-SiT-Ti-2/samples"
    said = ok(tmp_path, "estimator.py measure --w-nag 0 3 --nag-against 0.02 --num 4 --steps 4",
              few, QUICK)
    assert "runs/estimator-shapes-linear.pt to judge by yet, so it is trained first" in said
    assert "NAG 3 against 0.02 on 0.1-1" in said
    assert (tmp_path / "runs/shapes-SiT-Ti-2/shift/shift.png").exists()
    ok(tmp_path, "sample.py --w-nag 3 --nag-against estimator --num 2 --steps 2 --estimator "
       "runs/estimator-shapes-linear.pt")
    ok(tmp_path, f"{SMALL} --steps 1")
    said = ok(tmp_path, "sample.py --num 2 --steps 2")           # one's own comes first
    assert "train your own" not in said and "0000001" in said


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    """Two sets of shapes, also darker, one as a folder, too; and random weights of Inception."""
    folder = tmp_path_factory.mktemp("sets")
    for seed in (0, 1):
        images = train.Shapes(16).images(range(5000 * seed, 5000 * seed + 700))[0]
        images = images.transpose(0, 2, 3, 1)
        (folder / f"seed{seed}").mkdir()
        np.savez(folder / f"seed{seed}/plain.npz", arr_0=images)
        np.savez_compressed(folder / f"seed{seed}/dark.npz", arr_0=images // 2)
    for i, image in enumerate(images):
        (folder / f"pngs/{i % 3}").mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(folder / f"pngs/{i % 3}/{i:04}.png")
    torch.save(inception().state_dict(), folder / "inception.pth")
    return folder


def compared(folder, options, change="", ranks=1):
    said = ok(folder, f"fid.py {options} --json out.json", change, ranks=ranks)
    return json.loads((folder / "out.json").read_text()), said


def test_sets_of_shapes_make_a_table_with_mean_and_deviation_over_seeds(sets):
    """Of random features, whose distance is not called FID, with the shift that was measured of
    each set, and paired differences. Oracle: each set compared alone."""
    for seed, shifts in enumerate([(0.01, 0.02), (0.03, 0.05)]):
        shutil.copy(sets / f"seed{seed}/plain.npz", sets / f"seed{seed}/no-guidance.npz")
        found = [{"images": f"{name.replace(' ', '-')}.npz", "name": name, "mean_shift": shift,
                  "sampler": "sde", "steps": 50, "seed": 0}
                 for name, shift in zip(("dark", "no guidance"), shifts)]
        note = {"checkpoint": f"{seed}.pt", "settings": found}
        (sets / f"seed{seed}/shift.json").write_text(json.dumps(note))
    same, _ = compared(sets, "pngs seed1/plain.npz --features random")
    same = same["metrics"]
    assert same["FD-random"] < 1e-6 and same["precision"] == same["recall"] == 1
    files = [f"seed{seed}/{name}.npz" for seed in (0, 1) for name in ("dark", "no-guidance")]
    options = "shapes --num 600 --features random"
    rows, said = compared(sets, f"{' '.join(files)} {options}")
    assert [row["samples"] for row in rows] == files and "FD-random" in said and "FID" not in said
    alone, _ = compared(sets, f"{files[3]} {options} classifier")
    metrics = [row["metrics"] for row in rows]
    alone = {name: alone["metrics"][name] for name in metrics[3]}    # precision is the first's
    assert metrics[3] == pytest.approx(alone, rel=1e-5)
    for dark, plain in (metrics[:2], metrics[2:]):
        assert plain["FD-random"] < 0.2 * dark["FD-random"]
        assert plain["precision"] > 2 * dark["precision"]
    for name, seeds in (("| dark |", metrics[::2]), ("| no-guidance |", metrics[1::2])):
        a, b = (row["recall"] for row in seeds)
        line = next(line for line in said.splitlines() if name in line)
        assert f"{(a + b) / 2:.3f} ± {abs(a - b) / math.sqrt(2):.3f}" in line
    assert [row["shift"] for row in metrics] == [0.01, 0.02, 0.03, 0.05]
    dark, paired = (line for line in said.splitlines() if line.startswith("| dark"))
    assert dark.endswith("| 0.02000 ± 0.01414 |")
    assert "less no guidance | 2 |" in paired and paired.endswith("| -0.01500 ± 0.00707 |")
    _, said = compared(sets, f"{files[2]} {files[1]} {files[0]} {files[3]} {options}")
    assert paired in said.splitlines()              # in whichever order the files are named


def test_inception_metrics_of_two_ranks_and_of_saved_statistics(sets):
    options = "--features inception --weights inception.pth --num-samples 5 --batch 2"
    pair = "seed0/plain.npz seed1/plain.npz"
    whole, _ = compared(sets, f"{pair} {options} --save-stats stats.npz")
    parts, _ = compared(sets, f"{pair} {options}", ranks=2)
    again, _ = compared(sets, f"seed0/plain.npz stats.npz {options}")
    assert set(whole["metrics"]) == {"FID", "sFID", "Inception Score", "precision", "recall"}
    assert parts["metrics"] == pytest.approx(whole["metrics"], rel=1e-3)
    assert again["metrics"] == pytest.approx(whole["metrics"], rel=1e-3)
    with np.load(sets / "stats.npz") as file:
        np.savez(sets / "moments.npz", mu=file["mu"], sigma=file["sigma"])
    moments, said = compared(sets, f"seed0/plain.npz moments.npz {options}")
    assert moments["metrics"]["FID"] == pytest.approx(whole["metrics"]["FID"], rel=1e-3)
    assert set(moments["left_out"]) == {"sFID", "precision", "recall"} and "left out: sFID" in said


def spoilt_shapes(n=1024):
    """Drawn shapes, and what can be wrong with them: {name: (images (n, 3, 16, 16), labels)}."""
    data, rng = train.Shapes(16, seed=9), np.random.default_rng(0)
    x, y = data.images(range(n))
    spoilt = {"good": (x, y), "mislabelled": (x, np.where(rng.random(n) < 0.2, (y + 1) % 8, y)),
              "no-moon": (x[y != 3], y[y != 3])}
    for grain in (8, 16, 32):
        noisy = x + grain * rng.standard_normal(x.shape)
        spoilt[f"grain-{grain}"] = noisy.clip(0, 255).astype(np.uint8), y
    for weight in (0.1, 0.3, 0.5):                  # of the mean of the four neighbours
        mean = sum(np.roll(x.astype(float), d, axis) for d in (-1, 1) for axis in (2, 3)) / 4
        spoilt[f"blur-{weight}"] = ((1 - weight) * x + weight * mean).astype(np.uint8), y
    for size in (4, 5, 6):
        cut = x.copy()
        cut[:, :, :size, :size] = cut[:, :, -size:, -size:] = 31
        spoilt[f"corners-{size}"] = cut, y
    outlines = list(train.OUTLINES.items())
    for part in (0.1, 0.25, 0.5):                   # of the way to the next class's outline
        with pytest.MonkeyPatch.context() as patch:
            for (name, a), (_, b) in zip(outlines, outlines[1:] + outlines[:1]):
                between = lambda x, y, a=a, b=b: (1 - part) * a(x, y) + part * b(x, y)
                patch.setitem(train.OUTLINES, name, between)
            spoilt[f"between-{part}"] = data.images(range(n))
    return spoilt


def test_a_classifier_of_the_shapes_sees_what_is_wrong_with_them(sets):
    """The classifier of the repository. The share of wrong labels, and which set of a kind is the
    worse one, are known from how the sets were made."""
    spoilt = spoilt_shapes()
    for name, (images, labels) in spoilt.items():
        np.savez(sets / f"{name}.npz", arr_0=images.transpose(0, 2, 3, 1), arr_1=labels)
    files = " ".join(f"{name}.npz" for name in spoilt)
    rows, said = compared(sets, f"{files} shapes --num 2000 --features classifier")
    assert "FID" not in said
    found = {name: row["metrics"] for name, row in zip(spoilt, rows)}
    distance = {name: metrics["FD-classifier"] for name, metrics in found.items()}
    good = found["good"]
    assert good["recognised"] > 0.995 and distance["good"] < 0.5 and good["precision"] > 0.8
    wrong = (spoilt["mislabelled"][1] != spoilt["good"][1]).mean()
    assert good["recognised"] - found["mislabelled"]["recognised"] == pytest.approx(wrong, abs=0.01)
    assert found["no-moon"]["recall"] < good["recall"] - 0.05 and distance["no-moon"] > 5
    assert found["grain-8"]["recognised"] > 0.99 and distance["grain-8"] < 0.5
    for kind in ("grain", "blur", "corners", "between"):
        rising = [distance["good"], *(distance[name] for name in spoilt if name.startswith(kind))]
        assert len(rising) == 4 and rising == sorted(rising)
    assert found["between-0.5"]["recognised"] < 0.7 and found["between-0.5"]["precision"] < 0.2


def test_a_folder_of_classes_gets_a_classifier_of_its_own_once(sets):
    """Dark images against bright ones. Labels that are none are not recognised. It is learned anew
    when an image has changed, and a damaged one is not believed."""
    few = "fid.train_classifier.__wrapped__.__defaults__ = (0, 30, 32, 16)"
    images = train.Shapes(16).images(range(60))[0].transpose(0, 2, 3, 1)
    for i, image in enumerate(images):
        for name, pixels in (("bright", image // 2 + 128), ("dark", image // 8)):
            (sets / f"light/{name}").mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(sets / f"light/{name}/{i:04}.png")
    np.savez(sets / "dark.npz", arr_0=images[:30] // 8, arr_1=np.arange(30) % 2)
    ones = np.ones(30, int)
    none = dict(third=2 * ones, negative=-ones, few=ones[:29], many=np.ones(31, int),
                floats=ones / 2, words=ones.astype(str), table=np.ones((30, 2), int))
    for name, labels in none.items():
        np.savez(sets / f"none-{name}.npz", arr_0=images[:30] // 8, arr_1=labels)
    files = " ".join(f"none-{name}.npz" for name in none)
    command = f"fid.py dark.npz light {files} light --json out.json"
    said = ok(sets, command, few)
    dark, light, *others = json.loads((sets / "out.json").read_text())
    assert "is right on 100.0% of the images held out" in said
    assert dark["metrics"]["recognised"] == 0.5 and light["metrics"]["recognised"] > 0.95
    assert light["metrics"]["FD-classifier"] < 1e-6
    assert len(others) == 7 and all("recognised" in row["left_out"] for row in others)

    file, = (sets / "pretrained").iterdir()
    before = file.stat().st_mtime_ns
    assert ok(sets, command, few).splitlines()[-1] == said.splitlines()[-1]
    assert file.stat().st_mtime_ns == before
    whole, saved = bytearray(file.read_bytes()), io.BytesIO()
    torch.save({"classifier": None, "right": None}, saved)
    whole[len(whole) // 2] ^= 1
    for damaged in (whole, whole[:1000], saved.getvalue()):
        file.write_bytes(damaged)
        assert f"{file.relative_to(sets)} is damaged" in Run(sets, "fid.py light light").error()
    os.utime(sets / "light/dark/0001.png")
    ok(sets, command, few, ranks=2)
    assert len(list((sets / "pretrained").iterdir())) == 2


def test_a_metric_of_two_networks_is_left_out_only_where_neither_has_it(sets):
    options = "--num 100 --features random classifier --metrics recognised sfid"
    row, said = compared(sets, f"shapes:star,moon shapes {options}")
    assert row["metrics"]["recognised"] > 0.98 and set(row["left_out"]) == {"sFD-random"}


@pytest.mark.parametrize("size", [1, 4, 7, 8, 63])
def test_a_classifier_of_small_images_has_as_many_features_as_it_says(size):
    for shape in ((size, size), (1, size), (size, 3)):
        images = torch.randint(0, 256, (5, 3, *shape), dtype=torch.uint8)
        network = fid.Classifier(size, 2).eval()
        pool, spatial, logits, taken = network(images)
        assert pool.shape == (5, network.widths["pool"]) and logits.shape == (5, 2)
        assert len(spatial) == len(taken) == 5


def test_the_same_seed_gives_the_same_classifier():
    images, labels = map(torch.from_numpy, train.Shapes(16).images(range(300)))
    (a, right), (b, again) = (fid.train_classifier(images, labels, 8, steps=5) for _ in range(2))
    assert_same(a.state_dict(), b.state_dict())
    assert right == again


@slow
def test_the_classifier_in_the_repository_is_that_of_seed_0(sets):
    """To the third digit: two CPUs round differently."""
    found = []
    for change in ("", "fid.__file__ = 'elsewhere/fid.py'"):     # where no assets are
        row, _ = compared(sets, "seed0/plain.npz shapes", change=change)
        found.append(row["metrics"])
    assert found[1] == pytest.approx(found[0], rel=5e-3)


# --------------------------------------------------------------------------------------------------
# Errors: what a user does wrong is told in one line that names it, with exit status 2

ERRORS = {  # a command, how it goes on, and what the line must name
    "train.py --out new": [
        ("--steps 1 --image-size 8 --batch 2 --lr 1e300", "lower --lr"),
        ("--steps 0", "'0'"), ("--lr nan", "nan"), ("--epochs 2", "no epochs"),
        ("--data nowhere", "nowhere"), ("--data empty", "empty"), ("--data mixed", "loose.png"),
        ("--data shapes:dog", "'dog'"), ("--data broken --batch 2 --workers 1", "broken/a/bad.png"),
        ("--image-size 7", "7"), ("--image-size 100000", "not enough memory"),
        ("--vae vae.bin", "in pixels"),
        ("--init runs/one --interpolant vp", "--interpolant"),
        ("--init runs/tuned --latents latents --image-size 64", "--image-size 32"),
        ("--init DiT-XL/2 --image-size 512 --data photos --vae vae.bin",
         models.PUBLISHED["DiT-XL/2-512"][1]),
        ("--data photos --image-size 60 --vae vae.bin", "multiple of 8"),
        ("--latents latents --image-size 40", "40×40"),
        ("--latents latents --vae vae.bin --image-size 32 --data others", "of photos"),
        ("--latents latents --vae other.bin --image-size 32 --data photos", "by vae.bin"),
        ("--latents old", "old/latents.json is damaged or too old"),
        ("--latents gone", "no finished latents in gone"),
        ("--latents cut --vae vae.bin --batch 2 --workers 1", "cut/0.npy is damaged"),
        ("--latents old --vae vae.bin --image-size 32 --data photos", "damaged or too old")],
    "train.py --steps 21": [
        ("--out ''", "--out"), ("--out /proc/run", "/proc/run"), ("--out file.txt/run", "file.txt"),
        ("--out runs/damaged", "runs/damaged/checkpoints/0000005.pt"),
        ("--out runs/one --lr 0.5", "started with --lr 0.004, not 0.5"),
        ("--out runs/tuned --model SiT-Ti/2", "started with --model DiT-Ti/2")],
    "sample.py --steps 2 --ckpt": [
        ("nowhere.pt", "nowhere.pt"), ("file.txt", "file.txt"), ("tensor.pt", "tensor.pt"),
        ("other.bin", "other.bin"), ("huge.pt", "huge.pt"), ("sparse.pt", "sparse.pt"),
        ("empty", "empty/checkpoints"), ("published.pt", "give --model"),
        ("published.pt --model DiT-Ti/2 --w-nag 3", "--init published.pt --model DiT-Ti/2"),
        ("plain.pt --w-nag 3", "--noise-drop"), ("plain.pt --cfg-scale 3", "--class-drop"),
        ("runs/tuned --steps 1001", "1001"), ("runs/tuned --vae published.pt", "does not fit")],
    "sample.py --steps 2 --ckpt runs/one": [
        ("--nag-against 0.02", "no effect"), ("--w-nag 1 --nag-against me", "'me'"),
        ("--w-nag 1 --nag-against estimator", "--estimator"),
        ("--model DiT-Ti/2", "holds a SiT-Ti/tiny, not a DiT-Ti/2"), ("--sampler ddpm", "ddpm"),
        ("--classes circle dog", "'dog'"), ("--w-nag 1 --nag-interval 0.5 0.1", "--nag-interval"),
        ("--cfg-scale 2 --cfg-interval 0 1.1", "1.1"), ("--out grid.gif", "grid.gif"),
        ("--cfg-scale 2 --cfg-channels 4", "--cfg-channels"), ("--vae vae.bin", "--vae"),
        ("--out file.txt/grid.png", "file.txt"), ("--out grid.png/", "'grid.png/'"),
        ("--w-nag 1e38 --cfg-scale 1e38", "not finite"), ("--guide-scale 2", "--guide"),
        ("--guide runs/one", "--guide-scale"), ("--guide runs/tuned --guide-scale 2", "runs/tuned"),
        ("--estimator good.pt", "--w-nag-classifier"), ("--w-nag-classifier 1", "--estimator")],
    "sample.py --steps 2 --ckpt runs/one --w-nag-classifier 1 --estimator": [
        ("nowhere.pt", "estimator.py train --data shapes --image-size 8 --interpolant linear"),
        ("published.pt", "published.pt is no noise estimator"), ("vp.pt", "interpolant vp"),
        ("size.pt", "input size 4"), ("grey.pt", "in channels 1")],
    "estimator.py": [
        ("", "train | measure"), ("train --latents nowhere", "no finished latents in nowhere"),
        ("train --out empty", "empty"), ("train --out tensor.pt", "tensor.pt"),
        ("train --out vp.pt --image-size 8 --steps 7", "vp.pt was trained with")],
    "estimator.py measure --ckpt runs/one": [
        ("--judge nowhere.pt", "estimator.py train"), ("--judge vp.pt", "interpolant vp"),
        ("--judge others.pt", "data photos"),
        ("--judge good.pt --w-nag-classifier 1", "--estimator"),
        ("--judge good.pt --w-nag-classifier 1 --estimator ./good.pt", "cannot judge"),
        ("--judge good.pt --steps 1", "--steps"), ("--judge good.pt --out file.txt", "file.txt")],
    "fid.py": [("shapes", "REFERENCE"), ("sizes sizes", "--crop"), ("bare.npz bare.npz", "only x")],
    "fid.py shapes": [
        ("shapes --num 1", "'1'"), ("good.npz --json ./good.npz", "an input"),
        ("shapes --save-stats good.npz/stats.npz", "nothing can be written"),
        ("shapes --features inception --weights other.bin", "other.bin"),
        ("cut.npz", "cut.npz"), ("flipped.npz", "flipped.npz"), ("file.txt", "file.txt"),
        ("short.npz", "claims"), ("pickled.npz", "pickled objects"), ("floats.npz", "float64"),
        ("grey.npz", "(4, 8, 9)"), ("none.npz", "(0, 8, 9, 3)"),
        ("nan.npz", "not finite"), ("half.npz", "sigma"), ("unfit.npz", "do not fit"),
        ("crooked.npz", "not symmetric"), ("negative.npz", "negative"),
        ("learned.npz", "classifier features"), ("shapes --save-stats new.npz", "--save-stats"),
        ("shapes:star --features classifier", "no two classes"),
        ("bare.npz --json out --save-stats ./out", "named twice"),
        ("broken", "broken/a/"), ("nowhere", "nowhere")],
}


def write_reader(path, interpolant="linear", size=8, channels=3, data="shapes"):
    """A noise estimator that was not trained."""
    torch.save({"estimator": models.NoiseEstimator(size, channels).state_dict(), "step": 9,
                "settings": dict(interpolant=interpolant, input_size=size, in_channels=channels,
                                 data=data, image_size=size, seed=0)}, path)


@pytest.fixture(scope="module")
def mistakes(place):
    """All that ERRORS names, beside the good files."""
    folder, images = place, np.zeros((4, 8, 9, 3), np.uint8)
    for name in ("empty", "mixed/a", "broken/a", "others", "sizes", "runs/damaged/checkpoints"):
        (folder / name).mkdir(parents=True)
    for name in ("mixed/loose", "mixed/a/1", "others/1", "sizes/1"):
        Image.fromarray(images[0]).save(folder / f"{name}.png")
    Image.fromarray(images[0, :, :8]).save(folder / "sizes/2.png")
    for name in ("bad", "worse"):
        (folder / f"broken/a/{name}.png").write_bytes(b"\x89PNG no image")
    (folder / "file.txt").write_text("hello")
    for name in ("old", "cut", "gone"):
        write_latents(folder / name, np.zeros((1, 2, 8, 4, 4), np.float16))
    os.truncate(folder / "cut/0.npy", 200)
    (folder / "gone/0.npy").unlink()
    note = json.loads((folder / "old/latents.json").read_text())
    del note["parts"], note["counts"]               # as it was before latents had parts
    (folder / "old/latents.json").write_text(json.dumps({**note, "names": "n", "finished": True}))

    vae = models.load_file(folder / "vae.bin")
    torch.save({key: 2 * value for key, value in vae.items()}, folder / "other.bin")
    torch.save(torch.zeros(3), folder / "tensor.pt")
    good = state(folder / "runs/one", 20)
    sparse = {key: value.to_sparse() for key, value in good["ema"].items()}
    for name, weights, changes in (("plain", good["ema"], dict(noise_drop=0.0, class_drop=0.0)),
                                   ("huge", good["ema"], dict(num_classes=10**12)),
                                   ("sparse", sparse, {})):
        torch.save({"ema": weights, "settings": good["settings"] | changes}, folder / f"{name}.pt")
    whole = (folder / "runs/one/checkpoints/0000020.pt").read_bytes()
    (folder / "runs/damaged/checkpoints/0000005.pt").write_bytes(whole[:len(whole) // 2])
    for name, changes in (("good", {}), ("vp", dict(interpolant="vp")), ("size", dict(size=4)),
                          ("grey", dict(channels=1)), ("others", dict(data="photos"))):
        write_reader(folder / f"{name}.pt", **changes)

    drawn, mu, eye = train.Shapes(16).images(range(300))[0], np.zeros(512), np.eye(512)
    np.savez_compressed(folder / "flipped.npz", arr_0=drawn.transpose(0, 2, 3, 1))
    whole = bytearray((folder / "flipped.npz").read_bytes())
    (folder / "cut.npz").write_bytes(whole[:len(whole) // 2])
    whole[len(whole) // 3] ^= 255                   # inside the compressed images
    (folder / "flipped.npz").write_bytes(whole)
    with zipfile.ZipFile(folder / "short.npz", "w") as archive:
        header = {"descr": "|u1", "fortran_order": False, "shape": (10**7, 256, 256, 3)}
        np.lib.format.write_array_header_1_0(archive.open("arr_0.npy", "w"), header)
    for name, arrays in dict(
            good=dict(arr_0=images), floats=dict(arr_0=images / 2), grey=dict(arr_0=images[..., 0]),
            none=dict(arr_0=images[:0]), bare=dict(x=images), half=dict(mu=mu),
            pickled=dict(arr_0=np.array([{1: 2}], object)), nan=dict(mu=mu * np.nan, sigma=eye),
            unfit=dict(mu=mu, sigma=np.eye(4)), crooked=dict(mu=mu, sigma=np.tri(512)),
            learned=dict(mu=mu, sigma=eye, network="classifier"),
            negative=dict(mu=mu, sigma=-eye)).items():
        np.savez(folder / f"{name}.npz", **arrays)
    return folder


@pytest.mark.parametrize("command", ERRORS)
def test_a_users_error_is_one_line_and_status_2(mistakes, command):
    """All start at once, each with an --out of its own."""
    started = [Run(mistakes, f"{command} {more}".replace("--out new", f"--out new{n}"), OFFLINE)
               for n, (more, _) in enumerate(ERRORS[command])]
    for run, (more, word) in zip(started, ERRORS[command]):
        assert word in run.error(), more
    assert not list(mistakes.glob("new*/checkpoints/*.pt"))


SHELL = [  # a line for the shell, its status, and what it must say
    ("python -OO train.py --steps 1 --image-size 8 --out closed >&-", 0, "1/1"),
    ("python train.py --help | head -n 1", 0, "usage"),
    ("RANK=1 python train.py --steps 1", 2, "start ranks by torchrun"),
    ("ulimit -n 40; python train.py --data photos --image-size 8 --batch 4 --steps 99 --workers 4 "
     "--out x", 2, "more open files than the 40 allowed"),
    (f"ONEDNN_MAX_CPU_ISA=AVX2 python sample.py --ckpt {sample.SHIPPED} --precision bf16 --num 1 "
     "--steps 2 --out old.png", 0, "old.png"),
    ("ONEDNN_MAX_CPU_ISA=AVX2 python train.py --steps 1 --image-size 8 --out old", 0, "fp32"),
]


def test_what_a_shell_can_do_to_a_script_ends_well(place):
    started = [(shell(place, line), status, says) for line, status, says in SHELL]
    for process, status, says in started:
        said = output(process, status)
        assert says in said and "Traceback" not in said, process.args


def test_what_a_gpu_holds_of_a_model_counts_once_towards_the_micro_batch(monkeypatch):
    trainer = SimpleNamespace(
        model=models.MODELS["SiT-Ti/2"](input_size=16, in_channels=3), share=10**6,
        device=torch.device("cuda"), args=SimpleNamespace(precision="bf16"))

    def fit(free, held):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (free, 80e9))
        monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: held)
        return train.fitting_micro_batch(trainer)

    assert fit(1e9, 0.5e9) == fit(1.5e9, 0) > fit(1e9, 0)


@pytest.mark.parametrize("slow", [torch.float32, torch.bfloat16])
def test_the_precision_is_the_faster_one_even_where_most_turns_are_interrupted(monkeypatch, slow):
    rng = random.Random(0)

    def product(a, b):
        time.sleep(0.002 * (rng.random() < 0.8) + 0.0005 * (a.dtype == slow))

    monkeypatch.setattr(torch.Tensor, "__matmul__", product)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: True)
    fast = {torch.float32: "bf16", torch.bfloat16: "fp32"}[slow]
    assert train.fast_precision(torch.device("cpu")) == fast
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    assert train.fast_precision(torch.device("cpu")) == "fp32"


@pytest.mark.parametrize("name", SCRIPTS)
def test_threads_are_told_how_to_wait_before_torch_is_loaded(name):
    """Where torch cannot be loaded, an import ends there; by then the environment holds it."""
    code = f"""
import contextlib, os, sys
sys.modules["torch"] = None
with contextlib.suppress(ImportError):
    import {name.removesuffix(".py")}
print(os.environ["GOMP_SPINCOUNT"])"""
    variables = {key: value for key, value in os.environ.items() if key != "GOMP_SPINCOUNT"}
    told = subprocess.check_output([sys.executable, "-c", code], cwd=HERE, env=variables)
    assert told == b"3000\n"


def test_steps_before_an_unreadable_image_are_saved_and_with_another_in_its_place_it_goes_on(place):
    """The sixth of eight images; progress that goes to a file is plain lines."""
    files = sorted(shutil.copytree(place / "photos/a", place / "spoilt").iterdir())
    bad = files[train.generator(0, "order", 0).permutation(8)[5]]
    good = bad.read_bytes()
    bad.write_bytes(b"none")
    command = ("train.py --data spoilt --image-size 8 --batch 1 --steps 9 --workers 1 "
               "--out runs/spoilt")
    run = Run(place, command, QUICK)
    assert "cannot read the image spoilt/" in run.error() and "\r" not in run.err
    assert state(place / "runs/spoilt", 5)["step"] == len(losses(place / "runs/spoilt")) == 5
    bad.write_bytes(good)
    ok(place, command, QUICK)
    assert len(losses(place / "runs/spoilt")) == 9


def test_of_several_ranks_one_tells_the_error_and_all_end(tmp_path):
    run = Run(tmp_path, "train.py --batch 3", ranks=2)
    assert "a batch of 3 cannot be shared by 2 ranks" in run.error()
    assert len(run.err.splitlines()) == 1 and [p.exitcode for p in run.processes] == [2, 2]


def test_other_images_are_refused_and_other_names_of_the_same_folder_are_not(place):
    command = "train.py --image-size 8 --batch 4 --workers 0 --cooldown 0 --out runs/moved --data"
    moving = shutil.copytree(place / "photos", place / "moving")
    for steps, name in enumerate(("moving", moving, "photos/../moving/"), 1):
        ok(place, f"{command} {name} --steps {steps}", QUICK)
    (moving / "a/08.gif").rename(moving / "b/08.gif")
    run = Run(place, f"{command} moving --steps 9")
    assert "changed since runs/moved was started" in run.error()


def test_a_second_process_may_read_what_the_first_writes_but_not_write_there(tmp_path):
    command = f"{SMALL} --ckpt-every 5 --keep 0 --steps 1000000 --out run"
    first = Run(tmp_path, command)
    assert first.until(lambda: train.checkpoints(tmp_path / "run"))
    assert "another process is writing run" in Run(tmp_path, command).error()
    ok(tmp_path, "sample.py --ckpt run --num 1 --steps 2 --out shown.png")
    assert first.running()


def test_a_damaged_newest_checkpoint_is_said_and_the_one_before_it_used(place):
    out = shutil.copytree(place / "runs/one", place / "runs/flipped")
    newest = out / "checkpoints/0000020.pt"
    data = bytearray(newest.read_bytes())
    data[len(data) // 2] ^= 1                       # one bit of a weight
    newest.write_bytes(data)
    said = ok(place, f"{SMALL} --steps 20 --ckpt-every 10 --out runs/flipped")
    assert "0000020.pt is damaged" in said
    assert "going on from runs/flipped/checkpoints/0000010.pt" in said
    assert_same_run(out, place / "runs/one", 20)
    assert newest.with_suffix(".pt.damaged").read_bytes() == data
    half = state(out, 20)
    del half["muon"]
    with train.replacing(out / "checkpoints/0000020.pt") as file:
        torch.save(half, file)
    assert "has no muon" in Run(place, f"{SMALL} --steps 21 --out runs/flipped").error()


TRAINER = dict(precision="fp32", interpolant="linear", lr=1e-2, warmup=0, steps=9, cooldown=0,
               ema=0.99, micro_batch=2, compile=False, grad_checkpoint=False, levels="uniform")


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_step_with_one_gradient_that_is_not_finite_changes_nothing(optimizer):
    """Against the same steps without it; the moments and their count stay, too."""
    args = SimpleNamespace(**TRAINER, batch=4, optimizer=optimizer)
    rng, ends = torch.Generator().manual_seed(0), []
    batches = [[x0, torch.arange(4), torch.rand(4, generator=rng), eps, torch.arange(4) < 1]
               for x0, eps in torch.randn(3, 2, 4, 3, 8, 8, generator=rng)]
    for bad_step in (None, 2):
        trainer = train.Trainer(tiny().requires_grad_(True), args, torch.device("cpu"))
        bias = trainer.model.x_embedder.proj.bias
        for number, batch in enumerate(batches, 1):
            if number == bad_step:
                hook = bias.register_hook(lambda gradient: gradient * math.inf)
                assert math.isnan(trainer.step(batch, number))
                hook.remove()
            elif number != 2:
                assert math.isfinite(trainer.step(batch, number))
        optimizers = [optimizer.state_dict()["state"] for optimizer in trainer.optimizers.values()]
        ends.append([trainer.model.state_dict(), trainer.ema.state_dict(), *optimizers])
    assert_same(*ends)
    assert len(ends[1]) == 3 + (optimizer == "muon")
    assert all(value["step"] == 2 for value in ends[1][2].values())


def test_muons_steps_are_those_of_torch():
    """torch.optim.Muon takes them in bf16, whose numbers have eight bits."""
    torch.manual_seed(0)
    shapes = [(16, 48), (48, 16), (16, 16), (16, 48)]
    ours, theirs = ([torch.zeros(shape, requires_grad=True) for shape in shapes] for _ in range(2))
    optimizers = [train.Muon(ours, {"lr": 1e-2}),
                  torch.optim.Muon(theirs, 1e-2, weight_decay=0, adjust_lr_fn="match_rms_adamw")]
    for _ in range(3):
        for a, b in zip(ours, theirs):
            a.grad, b.grad = torch.randn(a.shape).repeat(2, 1, 1)
        for optimizer in optimizers:
            optimizer.step()
    for a, b in zip(ours, theirs):
        assert (a - b).norm() < 0.02 * b.norm()
    values = torch.linalg.svdvals(train.orthogonal(torch.randn(8, 16, 48)))
    assert 0.6 < values.min() and values.max() < 1.3


@pytest.mark.parametrize("cooldown, rates", [(0, [0.5, 1, 1, 1, 1, 1, 1, 1]),
                                             (0.5, [0.5, 1, 1, 1, 1, 0.75, 0.5, 0.25])])
def test_the_rate_rises_stays_and_falls(cooldown, rates):
    args = SimpleNamespace(lr=2.0, warmup=2, cooldown=cooldown, steps=8)
    rate = train.Trainer.learning_rate
    assert [rate(SimpleNamespace(args=args), n) / 2 for n in range(1, 9)] == rates


@by_name
def test_training_levels_are_uniform_or_logit_normal_in_the_share_of_noise(path):
    """Kolmogorov and Smirnov's test; VP's levels are multiples of 1/1000."""
    def share(t):
        alpha, sigma = path.alpha(t), path.sigma(t)
        return norm.cdf(logit((sigma / (alpha + sigma)).numpy()))

    name = "linear" if isinstance(path, diffusion.Linear) else "vp"
    for levels, uniform in (("uniform", lambda t: t.numpy()), ("logit-normal", share)):
        args = SimpleNamespace(interpolant=name, batch=2000, seed=0, levels=levels, class_drop=0.1,
                               noise_drop=0.1, in_channels=3, input_size=2, num_classes=8)
        t = train.Batches(train.Shapes(2), args)[0][2].double()
        if name == "vp":
            assert (1000 * t - (1000 * t).round()).abs().max() < 1e-3 and t.min() > 0
            t = t - 0.0005                          # the middle of what became this multiple
        assert kstest(uniform(t), "uniform").pvalue > 0.01


def test_weighted_losses_of_vp_are_those_of_the_linear_path():
    """Up to the largest weight: of one x_0, ε and guess, at levels of equal share."""
    linear, vp = PATHS
    t = torch.arange(1, 1001, 37).double() / 1000
    share = vp.sigma(t) / (vp.alpha(t) + vp.sigma(t))
    x0, eps, guess = (torch.randn(len(t), 3, 4, 4, dtype=torch.double) for _ in range(3))
    close(torch.from_numpy(vp.level_of_share(share)), t)
    of_eps = (vp.target(x0, eps) - guess).square().mean((1, 2, 3))
    x = diffusion.add_noise(vp, x0, eps, t)
    of_v = (linear.target(x0, eps) - linear.target(vp.x0_eps(guess, x, t)[0], guess)).square()
    found, weight = of_v.mean((1, 2, 3)) / of_eps, (1 / (1 - share))**2
    assert weight.min() < 2 and weight.max() > 20
    close(vp.loss_weight(t), weight.clamp(max=10))
    close(found, weight)
    assert linear.loss_weight(t).tolist() == [1] * len(t)


@pytest.mark.parametrize("levels, weight", [("uniform", lambda r: 1),
                                            ("logit-normal", lambda r: (1 + r)**2)])
def test_the_trainer_weighs_the_losses_of_vp_where_levels_are_logit_normal(levels, weight):
    changes = dict(interpolant="vp", levels=levels, batch=4, optimizer="adamw")
    trainer = train.Trainer(tiny().requires_grad_(True), SimpleNamespace(**{**TRAINER, **changes}),
                            torch.device("cpu"))
    x0, eps = torch.randn(2, 4, 3, 8, 8)
    batch = x0, torch.arange(4), torch.tensor([0.02, 0.1, 0.2, 0.3]), eps, torch.arange(4) < 1
    t = batch[2].double()
    ratio = PATHS[1].sigma(t) / PATHS[1].alpha(t)
    wanted = (diffusion.training_loss(tiny(), PATHS[1], *batch) * weight(ratio)).mean()
    close(trainer.step(batch, 1), wanted.float())


@pytest.mark.parametrize("grad_checkpoint, most", [(False, 2 * 2), (True, 2)])
def test_validation_takes_as_many_images_at_a_time_as_training_has_room_for(grad_checkpoint, most):
    """Two blocks of a micro-batch of 2; with --grad-checkpoint training has room for one block."""
    changes = dict(micro_batch=2, batch=4, optimizer="adamw", grad_checkpoint=grad_checkpoint)
    trainer = train.Trainer(tiny(), SimpleNamespace(**{**TRAINER, **changes}), torch.device("cpu"))
    sizes = []
    trainer.ema.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
    batch = normal("x", 9, 3, 8, 8), torch.arange(9) % 4, torch.rand(9), normal("e", 9, 3, 8, 8)
    whole = diffusion.training_loss(trainer.ema, trainer.path, *batch, torch.zeros(9) > 0).mean()
    assert sizes.pop() == 9
    found = trainer.validation_loss([*batch, torch.zeros(9) > 0])
    assert found == pytest.approx(whole.item(), rel=1e-5)
    assert max(sizes) == most and sum(sizes) == 9


def test_a_run_that_diverges_stops_and_names_its_last_good_checkpoint(tmp_path):
    command = f"{SMALL} --warmup 0 --steps 99 --ckpt-every 1"
    line = Run(tmp_path, f"{command} --lr 1e30 --out nan", QUICK).error()
    assert "ten steps in a row up to 11" in line and "nan/checkpoints/0000010.pt" in line
    assert np.isnan(losses(tmp_path / "nan")).tolist() == [False] + 10 * [True]
    line = Run(tmp_path, f"{command} --optimizer adamw --lr 1e300 --out infinite", QUICK).error()
    assert "are not finite, and are not saved" in line
    assert not train.checkpoints(tmp_path / "infinite")


def test_a_run_whose_folder_vanishes_says_so(tmp_path):
    run = Run(tmp_path, f"{SMALL} --ckpt-every 30 --out gone")
    assert run.until(lambda: train.checkpoints(tmp_path / "gone"))
    (tmp_path / "gone").rename(tmp_path / "elsewhere")
    assert run.error().startswith("train.py: gone/") and not (tmp_path / "gone").exists()
    assert len(losses(tmp_path / "elsewhere")) >= 30


def test_a_process_that_prepares_batches_and_is_killed_is_told_in_one_line(place):
    run = Run(place, "train.py --data photos --image-size 8 --batch 2 --steps 1000000 --workers 2 "
              "--out runs/worker")
    log, pid = place / "runs/worker/log.jsonl", run.processes[0].pid
    assert run.until(lambda: log.exists() and log.stat().st_size)
    os.kill(int(Path(f"/proc/{pid}/task/{pid}/children").read_text().split()[-1]), signal.SIGKILL)
    assert "a process that prepares batches was killed" in run.error()


@pytest.mark.parametrize("command, size, named", [
    (f"{SMALL} --steps 9 --out runs/full", 300_000, "checkpoints/0000009.pt: "),
    (f"{LATENT} --data photos --latents small --steps 1 --out runs/small", 12_000, "small/00000"),
    ("sample.py --ckpt runs/one --num 70 --batch 9 --steps 2 --out full.npz", 14_000, "full.npz")])
def test_a_full_disk_names_the_file_and_with_room_again_the_command_goes_on(
        place, command, size, named):
    line = Run(place, command, QUICK, f"full_disk({size})").error()
    assert named in line and re.search("too large|disk", line)
    assert not list(place.glob("*/**/.*.tmp")) and not (place / "full.npz").exists()
    ok(place, command, QUICK)


# --------------------------------------------------------------------------------------------------
# The README

README = (HERE / "README.md").read_text()


def commands():
    """The lines of the README's shell blocks, without their comments."""
    blocks = "".join(re.findall(r"```sh\n(.*?)```", README, re.S)).replace("\\\n", " ")
    return [code for line in blocks.splitlines() if (code := line.split("#")[0].strip())]


def test_every_command_and_option_in_the_readme_exists(monkeypatch, capsys):
    """Loops' variables are filled in; options named in the text are those of some script."""
    def parse_args(self):
        original(self)
        raise EOFError                              # far enough

    original, found = train.Arguments.parse_args, 0
    monkeypatch.setattr(train.Arguments, "parse_args", parse_args)
    first = dict(re.findall(r"for (\w+) in (\S+)", README))
    for line in commands():
        line = re.sub(r"\$(\w+)", lambda variable: first[variable[1]], line)
        for name, args in re.findall(r"(?:python|torchrun .*?) ?(\w+\.py)([^&;|]*)", line):
            if name in SCRIPTS:
                monkeypatch.setattr(sys, "argv", [name, *shlex.split(args)])
                with pytest.raises(EOFError):
                    SCRIPTS[name].main()
                found += 1
    assert found > 10
    for command in (*SCRIPTS, "estimator.py train", "estimator.py measure"):
        monkeypatch.setattr(sys, "argv", [*command.split(), "--help"])
        with pytest.raises(SystemExit):
            SCRIPTS[sys.argv[0]].main()
    known = set(re.findall(r"--[a-z][a-z-]*", capsys.readouterr().out)) | {
        "--nproc-per-node", "--nnodes", "--rdzv-backend", "--rdzv-endpoint", "--max-restarts"}
    assert not set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", README)) - known


@slow
def test_the_readmes_quick_commands_run_as_written(tmp_path):
    """In a folder with what the commands before them would have left; `python` is this one."""
    for path in HERE.glob("*.py"):
        (tmp_path / path.name).symlink_to(path)
    for name in ("bin", "photos"):
        (tmp_path / name).mkdir()
    (tmp_path / "bin/python").write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    (tmp_path / "bin/python").chmod(0o755)
    ok(tmp_path, "train.py --steps 20 --batch 8 --out runs/shapes-SiT-Ti-2")
    for name in ("samples", "a", "b", "c"):
        images = np.random.default_rng(len(name)).integers(0, 256, (600, 16, 16, 3), np.uint8)
        np.savez(tmp_path / f"{name}.npz", arr_0=images)
    for i, image in enumerate(images[:24]):
        Image.fromarray(image).save(tmp_path / f"photos/{i}.png")
    lines = [part.strip() for line in commands() for part in line.split("&&")]
    quick = [line for line in lines if "--ckpt" not in line and line.startswith((    # of long runs
        "python sample.py", "python fid.py samples.npz photos", "python fid.py a.npz"))]
    search = f"{tmp_path}/bin:{os.environ['PATH']}"
    variables = {**os.environ, "OMP_NUM_THREADS": "1", "PATH": search}
    for line in quick:
        subprocess.run(line, shell=True, cwd=tmp_path, env=variables, check=True)
    assert len(quick) >= 4


def test_the_code_in_the_readme_is_that_of_the_method_and_its_pictures_are_there():
    lines = {line.strip() for line in (HERE / "diffusion.py").read_text().splitlines()}
    shown = "".join(re.findall(r"```python\n(.*?)```", README, re.S)).splitlines()
    assert len(shown) >= 4
    assert not [line for line in shown if line.split("  #")[0].strip() not in lines]
    pictures = re.findall(r"\]\((assets/[^)]*)\)", README)
    assert pictures and all((HERE / picture).exists() for picture in pictures)


# --------------------------------------------------------------------------------------------------
# What takes long: kills, damaged files, memory

KILLED = {  # what is killed: a command, how far it goes, how far with SLOW, the files it finishes
    "train": (f"{SMALL} --ckpt-every 5 --keep 2 --out OUT --steps", 25, 10**6, "checkpoints/*.pt"),
    "sample": ("sample.py --ckpt runs/one --batch 1 --steps 5 --w-nag 1 --precision fp32 "
               "--out OUT/images.npz --num", 3, 32, "images.npz.partial/0*.npy"),
    "encode": (f"{LATENT} --latents OUT --steps 1 --out OUT/run --data", "photos/a", "photos",
               "*.npy"),
    "estimator": ("estimator.py train --image-size 4 --batch 2 --interpolant vp "
                  "--out OUT/estimator.pt --steps", 401, 3200, "estimator.pt"),
}


def kill_in_writing(number):
    """From here on this process is killed when it has written so many files and most of another."""
    writings = itertools.count()

    def fsync(file):
        if next(writings) == number:
            os.kill(os.getpid(), signal.SIGKILL)

    os.fsync = fsync


@pytest.mark.parametrize("kind", KILLED)
def test_killed_in_every_writing_the_same_command_ends_in_the_same_files(place, kind):
    """The first start in its first writing, the second in its second, until one gets to the end."""
    def start(*changes):
        return Run(place, f"{command} {far}".replace("OUT", out.name), QUICK,
                   "train.Latents.per_part = 4", *changes).end().status

    command, far, *_ = KILLED[kind]
    out, kills = place / f"killed-{kind}", 0
    while (status := start(f"kill_in_writing({kills})")) == -signal.SIGKILL:
        kills += 1
    killed = written(out)
    shutil.rmtree(out)
    assert status == start() == 0 and kills > 1
    assert_same(killed, written(out))


@slow
@pytest.mark.parametrize("kind", KILLED)
def test_killed_again_and_again_the_same_command_ends_in_the_same_files(place, kind):
    """Every other kill is aimed into the writing of a file.

    While there are kills each writing takes 0.3 s, so that a start finishes no more than two files.
    """
    def start(out, *changes):
        return Run(place, f"{command} {far}".replace("OUT", out.name), QUICK,
                   "train.Latents.per_part = 1", *changes)

    def finished():
        try:
            return {(file.name, file.stat().st_ino) for file in killed.glob(pattern)}
        except FileNotFoundError:                   # removed in between, as --keep says
            return before

    def unfinished():
        return any(killed.rglob(".*.tmp"))

    command, _, far, pattern = KILLED[kind]
    killed, whole = (place / f"{kind}-{end}" for end in ("killed", "whole"))
    rng, hits, before = np.random.default_rng(0), 0, set()
    for k in range(30 if kind == "train" else 10):
        before = finished()
        run = start(killed, "os.fsync = lambda file: time.sleep(0.3)")
        assert run.until(lambda: finished() - before), run.end().err
        if k % 2:
            run.until(unfinished)
        else:
            time.sleep(0.3 * rng.random())
        assert run.end(signal.SIGKILL).status == -signal.SIGKILL
        hits += k % 2 and unfinished()
    assert hits > 0
    if kind == "train":
        far = max(int(Path(file).stem) for file, _ in finished()) + 9
    for out in (killed, whole):
        assert start(out).end().status == 0
    assert_same(written(killed), written(whole))    # nor is anything unfinished left
    if kind == "train":
        assert len(train.checkpoints(killed)) == 2                              # --keep


def test_what_killed_writers_left_is_cleared_by_the_next_start_and_what_is_written_stays(tmp_path):
    """A killed writer leaves its file unlocked; this process holds the lock of a living one."""
    left = [tmp_path / place / ".0000001.pt.tmp" for place in ("run/checkpoints", "run/samples")]
    for file in left:
        file.parent.mkdir(parents=True)
        file.write_bytes(b"half")
    with train.replacing(tmp_path / "run/samples/living.png") as living:
        ok(tmp_path, f"{SMALL} --steps 1 --out run")
        assert not any(file.exists() for file in left)
        left[1].write_bytes(b"half")
        ok(tmp_path, "sample.py --ckpt run --num 1 --steps 2 --out run/samples/one.png")
        assert not left[1].exists()
        living.write(b"whole")
    assert (tmp_path / "run/samples/living.png").read_bytes() == b"whole"


@slow
def test_a_rank_that_dies_takes_the_run_back_to_its_last_checkpoint(tmp_path):
    command = SMALL.replace("SiT-Ti/tiny", "SiT-Ti/4") + " --steps 60 --ckpt-every 10 --out"
    launch = f"torchrun --nproc-per-node 2 --max-restarts 3 --master-port {free_port()}"
    run = shell(tmp_path, f"exec {launch} {command} died")
    while run.poll() is None and len(train.checkpoints(tmp_path / "died")) < 2:
        time.sleep(0.01)
    ranks = Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()
    os.kill(int(ranks[-1]), signal.SIGKILL)
    output(run)
    ok(tmp_path, f"{command} lived", ranks=2)
    assert_same_run(tmp_path / "died", tmp_path / "lived", 60)


class Trap:
    """Unpickled, it makes a folder."""

    def __reduce__(self):
        return os.mkdir, ("TRAPPED",)


def with_code():
    """Files that would run code in whoever unpickles them."""
    checkpoint, archive = io.BytesIO(), io.BytesIO()
    torch.save({"ema": Trap()}, checkpoint)
    np.savez(archive, arr_0=np.array([Trap()], object))
    return [pickle.dumps(Trap()), checkpoint.getvalue(), archive.getvalue()]


def damage(data, others, rng):
    """The bytes of a good file, spoilt in one of five ways."""
    way, other = rng.integers(5), others[rng.integers(len(others))]
    if way == 0:                                    # cut
        return data[:rng.integers(len(data))]
    if way == 1:                                    # something else
        return other
    if way == 2:                                    # the beginning of something else
        return other[:300] + data[300:]
    data = bytearray(data)                          # flipped bits: anywhere, or close to an end
    reach = min(len(data), 200) if way == 3 else len(data)
    for at in rng.integers(-reach, reach, rng.integers(1, 20)):
        data[at] ^= 1 << rng.integers(8)
    return bytes(data)


DRAW = "--num 1 --steps 2 --precision fp32 --out case/o.png"
ENCODED = "train.py --latents case --steps 1 --batch 2 --precision fp32 --workers 0 --out case/run"
FUZZED = [  # a file, spoilt in a copy of its folder that is named case, and who reads it there
    ("runs/one/checkpoints", "0000020.pt", f"sample.py --ckpt case/0000020.pt {DRAW}"),
    ("runs/one", "checkpoints/0000020.pt", "train.py --out case --steps 21"),
    ("good", "reader.pt",
     f"sample.py --ckpt runs/one --estimator case/reader.pt --w-nag-classifier 1 {DRAW}"),
    ("good", "images.npz", "fid.py case/images.npz good/stats.npz"),
    ("good", "stats.npz", "fid.py good/images.npz case/stats.npz"),
    ("good/pictures", "0.png", "fid.py case good/stats.npz"),
    ("good/pictures", "0.jpg", "fid.py case good/stats.npz"),
    ("good/latents", "latents.json", ENCODED), ("good/latents", "0.npy", ENCODED),
]


@pytest.mark.parametrize("count", [18, pytest.param(1000, marks=slow)])
def test_damaged_files_end_in_one_line_or_in_success(place, tmp_path, count):
    """Without running code that is in them, and without taking gigabytes of memory."""
    rng, ends = np.random.default_rng(0), {0: 0, 2: 0}
    good, case = tmp_path / "good", tmp_path / "case"
    (good / "pictures").mkdir(parents=True)
    (tmp_path / "runs").symlink_to(place / "runs")
    images = rng.integers(0, 256, (6, 8, 8, 3), np.uint8)
    for name in ("0.png", "0.jpg", "1.png"):
        Image.fromarray(images[0]).save(good / "pictures" / name)
    write_reader(good / "reader.pt")
    np.savez(good / "images.npz", arr_0=images)
    np.savez(good / "stats.npz", mu=np.zeros(512), sigma=np.eye(512), network="random", size=[8, 8])
    write_latents(good / "latents", abs(rng.normal(size=(6, 2, 8, 4, 4))).astype(np.float16))
    contents = [(tmp_path / folder / file).read_bytes() for folder, file, _ in FUZZED]
    others = contents + with_code()
    for number in range(count):
        folder, file, command = FUZZED[number % len(FUZZED)]
        shutil.rmtree(case, ignore_errors=True)
        shutil.copytree(tmp_path / folder, case)
        (case / file).write_bytes(damage(contents[number % len(FUZZED)], others, rng))
        print(number, command)                      # of these, the last is the one that failed
        run = Run(tmp_path, command, QUICK, NO_VAE, OFFLINE, "limit(4000)")
        assert run.end().status == 0 or run.error()
        assert not (tmp_path / "TRAPPED").exists()
        ends[run.status] += 1
    assert ends[0] > count / 20 and ends[2] > count / 3, ends


def test_fifty_thousand_images_are_never_all_in_memory(place):
    """Of their 240 MB, less than a third; a stub stands for the network."""
    stub = "torch.zeros(len(rows), 40, 40, 3, dtype=torch.uint8).permute(0, 3, 1, 2), None"
    ok(place, "sample.py --ckpt runs/one --num 50000 --batch 500 --balanced --out many.npz",
       f"sample.Sampler.__call__ = lambda self, rows, bar: ({stub})", "limit(75)")
    with np.load(place / "many.npz") as file:
        images, labels = file["arr_0"], file["arr_1"]
    assert np.array_equal(labels, np.arange(50_000) % 8)
    assert images.shape == (50_000, 40, 40, 3) and not images[::5000].any()


@pytest.mark.parametrize("count", [3000, pytest.param(50_000, marks=slow)])
def test_images_of_256_are_read_in_a_stream(tmp_path, count):
    """Of 590 MB, or 9.8 GB; a stub of the network looks at a few pixels of each."""
    black = np.broadcast_to(np.uint8(0), (count, 256, 256, 3))  # takes no memory, nor does writing
    np.savez_compressed(tmp_path / "many.npz", arr_0=black)
    ok(tmp_path, "fid.py many.npz many.npz --features random --metrics fid",
       "fid.RandomFeatures.forward = lambda self, images: (images[:, 0, 0].float(),)",
       "limit(200)", seconds=3000)


@slow
def test_latents_are_read_about_as_fast_as_numpy_reads_them_and_memory_stays(tmp_path):
    """From a sparse folder of 610,000, 20 GB: 2 GB for a run, beside 0.5 GB for its model."""
    N, parts = 610_000, [f"{k:05}.npy" for k in range(596)]
    write_latents(tmp_path / "big", np.zeros((1, 2, 8, 32, 32), np.float16), images=N,
                  counts=[1, N - 1], parts=parts)
    for k, name in enumerate(parts):
        shape = min(1024, N - 1024 * k), 2, 8, 32, 32
        np.lib.format.open_memmap(tmp_path / "big" / name, "w+", np.float16, shape)
    run = Run(tmp_path, "train.py --latents big --model SiT-S/8 --steps 30 --batch 128 --out run",
              QUICK, NO_VAE)
    held, status = [], Path(f"/proc/{run.processes[0].pid}/status")

    def watch():                                    # mapped files do not count
        found = re.findall(r"Rss(?:Anon|Shmem):\s+(\d+)", status.read_text())
        held.append(sum(map(int, found)) / 1024)

    with contextlib.suppress(OSError):              # until it has ended
        run.until(watch)
    assert run.end().status == 0 and 500 < max(held) < 2500, run.err

    data, seconds = train.Latents(tmp_path / "big"), []
    arrays = [np.load(tmp_path / "big" / name, mmap_mode="r") for name in parts[:20]]
    noise, flip = np.ones((256, 4, 32, 32), np.float32), np.zeros(256, bool)
    for read in (lambda rows: np.stack([arrays[i // 1024][i % 1024, 0] for i in rows]),
                 lambda rows: data.images(rows, flip, noise)) * 2:
        begun = time.perf_counter()
        for rows in np.random.default_rng(0).integers(0, 20 * 1024, (100, 256)):
            read(rows)
        seconds.append(time.perf_counter() - begun)
    assert seconds[3] < 10 * seconds[2], seconds    # it also makes floats, and adds the noise

def test_training_the_tiny_model_takes_less_than_1500_megabytes(tmp_path):
    ok(tmp_path, "train.py --model DiT-Ti/2 --steps 2 --out run", "limit(1200)")


@slow
def test_twenty_thousand_steps_leave_memory_and_files_as_they_were(tmp_path):
    """Forty checkpoints are written on the way: less than 10 MB for each, and no file left open."""
    ok(tmp_path, "train.py --image-size 4 --batch 1 --precision fp32 --workers 0 --ckpt-every 500 "
       "--keep 2 --steps 20000 --out run", "limit(300)",
       "resource.setrlimit(resource.RLIMIT_NOFILE, (40, 40))", seconds=3000)
    assert len(losses(tmp_path / "run")) == 20_000 and len(train.checkpoints(tmp_path / "run")) == 2
