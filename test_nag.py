"""What the project claims, each claim against an oracle that is not the code under test.

    python -m pytest test_nag.py                                # SLOW=1 before it: also what takes minutes each
    python -m pytest test_nag.py -k "guid or shift"             # some of it

In this order: the network; interpolants, loss, samplers and guidance on Gaussian data, whose exact answers are known; the noise
estimator; data; the scripts, run as a user runs them; published weights and latents; what must survive kills, damaged files and
full disks; what is made of an estimator's readings; what a user does wrong; memory; the metrics; the README itself.
"""
import argparse
import functools
import io
import itertools
import json
import math
import multiprocessing.forkserver
import os
import pickle
import re
import shlex
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
import traceback
import zipfile
import zlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.linalg
import torch
from PIL import Image
from scipy.optimize import brentq
from scipy.special import logsumexp
from scipy.stats import truncnorm

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


def tiny(**kwargs):
    """A network small enough to test, with no layer at zero."""
    torch.manual_seed(0)
    model = models.DiT(**{**dict(input_size=8, patch_size=2, in_channels=3, hidden_size=32, depth=2, num_heads=2, num_classes=4),
                          **kwargs})
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.1)
    return model.eval().requires_grad_(False)


# ---------------------------------------------------------------------------------------------------------------------
# models.py


def test_a_fresh_network_outputs_zero_and_hides_the_level_only_where_asked():
    fresh = models.MODELS["SiT-Ti/2"](input_size=8, in_channels=3, num_classes=4)
    x, y, t = torch.randn(4, 3, 8, 8), torch.tensor([0, 1, 4, 4]), torch.rand(4)
    assert fresh(x, t, y).abs().max() == 0
    model, hide = tiny(), torch.tensor([True, False, True, False])
    moved = model(x, t + 0.3, y, drop_noise=hide) - model(x, t, y, drop_noise=hide)
    assert moved[hide].abs().max() == 0 and moved[~hide].flatten(1).abs().amax(1).min() > 1e-3
    assert torch.equal(model(x, t, y), model(x, t, y, drop_noise=torch.zeros(4, dtype=torch.bool)))


def test_no_parameter_is_ever_unused():
    model = tiny().train().requires_grad_(True)
    loss = diffusion.training_loss(model, diffusion.VP(), torch.randn(2, 3, 8, 8), torch.tensor([0, 1]), torch.tensor([0.2, 0.5]),
                                   torch.randn(2, 3, 8, 8), drop_noise=torch.tensor([False, False]))
    loss.sum().backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("name", ["DiT-Ti/4", "SiT-S/4", "DiT-B/8"])
def test_flops_are_those_that_torch_counts(name):
    from torch.utils.flop_counter import FlopCounterMode
    model = models.MODELS[name](input_size=32, in_channels=4, num_classes=10)
    plain = torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)           # the counter knows no fused one
    with FlopCounterMode(display=False) as counter, torch.no_grad(), plain:
        model(torch.randn(2, 4, 32, 32), torch.rand(2), torch.tensor([0, 1]))
    assert counter.get_total_flops() / 2 == pytest.approx(model.flops(), rel=1e-6)


def test_published_sit_weights_are_turned_into_our_time_and_sign():
    published, converted = tiny(), tiny()
    converted.load_state_dict(models.convert_sit(published.state_dict()))
    x, t, y = torch.randn(5, 3, 8, 8), torch.tensor([0.0, 0.1, 0.5, 0.93, 1.0]), torch.arange(5)
    torch.testing.assert_close(converted(x, 1 - t, y), -published(x, t, y), rtol=1e-4, atol=1e-5)


def test_files_of_before_2020_are_read(tmp_path):
    """torch.save wrote no archives then, and such files, the published Inception weights among them, cannot be mapped into memory."""
    torch.save({"a": torch.arange(3)}, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    assert not zipfile.is_zipfile(tmp_path / "old.pth")
    assert torch.equal(models.load_file(tmp_path / "old.pth")["a"], torch.arange(3))


def test_weights_that_do_not_fit_are_named():
    state = tiny().state_dict()
    state["y_embedder.embedding_table.weight"] = torch.zeros(11, 32)
    del state["x_embedder.proj.bias"]
    with pytest.raises(ValueError, match=r"x_embedder.proj.bias is missing, expected \(32,\); y_embedder.*\(11, 32\), expected \(5, 32\)"):
        models.load_weights(tiny(), state, "file")


def vae_with(state=None, **weights):
    """A VAE with random weights, small in number where `weights` sets all of a kind (by the end of their names)."""
    torch.manual_seed(0)
    vae = models.VAE().eval().requires_grad_(False)
    for name, parameter in vae.named_parameters():
        for end, value in weights.items():
            if name.endswith(end.replace("__", ".")):
                parameter.fill_(value)
    return vae


def test_vae_in_chunks_is_the_vae_of_each_image_and_its_deviation_is_clamped():
    vae = vae_with()
    images = torch.rand(3, 3, 16, 24) * 2 - 1
    mean, std = vae.encode(images)
    assert mean.shape == std.shape == (3, 4, 2, 3)
    vae.pixels = 1                                                # one image at a time
    alone = [torch.cat(parts) for parts in zip(*(vae.encode(image[None]) for image in images))]
    torch.testing.assert_close(torch.stack(alone), torch.stack(vae.encode(images)), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(torch.stack([mean, std]), torch.stack(alone), rtol=1e-4, atol=1e-5)
    vae.quant_conv.bias[4:] = 1e4
    assert torch.equal(vae.encode(images)[1], torch.full((3, 4, 2, 3), 0.18215) * torch.tensor(10.0).exp())
    with pytest.raises(ValueError, match="20×16"):
        vae.encode(torch.zeros(1, 3, 20, 16))


def test_vae_decoder_is_its_straight_path_where_its_branches_are_silent():
    """With the residual branches at zero, what is left is conv_in, three times (nearest doubling, convolution), norm, conv_out."""
    vae = vae_with(conv2__weight=0, conv2__bias=0, to_out__0__weight=0, to_out__0__bias=0)
    z, W = torch.randn(2, 4, 3, 2), vae.state_dict()
    F = torch.nn.functional
    layer = lambda name, x, pad: F.conv2d(x, W[f"{name}.weight"], W[f"{name}.bias"], padding=pad)
    x = layer("decoder.conv_in", layer("post_quant_conv", z / 0.18215, 0), 1)
    for i in range(4):
        for j in range(3):
            name = f"decoder.up_blocks.{i}.resnets.{j}.conv_shortcut"
            x = layer(name, x, 0) if f"{name}.weight" in W else x
        if i < 3:
            x = layer(f"decoder.up_blocks.{i}.upsamplers.0.conv", x.repeat_interleave(2, 2).repeat_interleave(2, 3), 1)
    groups = x.reshape(2, 32, -1)
    x = ((groups - groups.mean(2, keepdim=True)) / (groups.var(2, correction=0, keepdim=True) + 1e-6).sqrt()).reshape(x.shape)
    x = layer("decoder.conv_out", x * x.sigmoid(), 1)             # norms are fresh: gain 1, bias 0
    torch.testing.assert_close(vae.decode(z), x, rtol=1e-4, atol=1e-5)
    assert vae.decode(z).shape == (2, 3, 24, 16)


def old_names(state):
    """The attention's names in the file that was published first."""
    for new, old in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")):
        state = {key.replace(f"attentions.0.{new}.", f"attentions.0.{old}."): value for key, value in state.items()}
    return state


def test_vae_loads_from_both_namings(tmp_path):
    state = vae_with().state_dict()
    torch.save(state, tmp_path / "new.bin")
    torch.save(old_names(state), tmp_path / "old.bin")
    assert any(".query." in key for key in old_names(state)) and not any(".query." in key for key in state)
    a, b = (models.load_vae(tmp_path / name) for name in ("new.bin", "old.bin"))
    assert_same(a.state_dict(), b.state_dict())
    assert models.fingerprint(a) == models.fingerprint(b) != models.fingerprint(vae_with(norm1__bias=1))


def hollow(name, **shape):
    """A state dict of the model as it was published, without null embedding. Each tensor is one number, repeated: XL in a few kB."""
    with torch.device("meta"):
        model = models.MODELS[name](**shape)
    return {key: torch.full((), 0.01 + i / 1e4).expand(value.shape) for i, (key, value) in enumerate(model.state_dict().items())
            if "null" not in key}


@pytest.mark.parametrize("name", ["DiT-XL/2", "SiT-XL/2"])
def test_published_weights_of_full_size_load_under_their_name(name, monkeypatch):
    state, asked = hollow(name, input_size=32), []
    def download(url, *args, **options):
        asked.append(url)
        return state
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", download)
    model, settings = models.from_checkpoint(name)
    assert asked == [models.PUBLISHED[name][1]] and settings["noise_drop"] == 0 and settings["num_classes"] == 1000
    assert (settings["interpolant"], settings["image_size"]) == ("vp" if name[0] == "D" else "linear", 256)
    same = {key for key, value in state.items() if torch.equal(model.state_dict()[key], value)}
    turned = {"t_embedder.mlp.0.weight", "final_layer.linear.weight", "final_layer.linear.bias"}
    assert state.keys() - same == (turned if name == "SiT-XL/2" else set())


@by_name
def test_a_lacking_null_embedding_is_the_mean_over_the_levels(path, tmp_path):
    name = "SiT-Ti/2" if path.prediction == "velocity" else "DiT-Ti/2"
    network = models.MODELS[name](input_size=8, in_channels=3, num_classes=4)
    for p in network.parameters():
        torch.nn.init.normal_(p, std=0.1)
    state = {key: value for key, value in network.state_dict().items() if "null" not in key}
    torch.save(state, tmp_path / "bare.pt")
    model, settings = models.from_checkpoint(tmp_path / "bare.pt", name)
    assert settings["num_classes"] == 4 and settings["input_size"] == settings["image_size"] == 8
    t = torch.linspace(0, 1, 4001)[1:].clamp(max=1) if name[0] == "S" else (torch.arange(1000) + 1) / 1000
    mean = model.t_embedder(path.network_time(t)).mean(0)
    torch.testing.assert_close(model.t_embedder.null_embedding, mean, rtol=1e-2, atol=1e-3)
    for noise_drop in (0.0, 0.1):                                 # of our own checkpoints, in those that never hid a level
        told = {**settings, "interpolant": {"D": "vp", "S": "linear"}[name[0]], "noise_drop": noise_drop}
        torch.save({"ema": model.state_dict() | {"t_embedder.null_embedding": torch.zeros(128)}, "settings": told}, tmp_path / "ours.pt")
        null = models.from_checkpoint(tmp_path / "ours.pt")[0].t_embedder.null_embedding
        torch.testing.assert_close(null, torch.zeros(128) if noise_drop else mean, rtol=1e-2, atol=1e-3)
    x, y = torch.randn(2, 3, 8, 8), torch.tensor([1, 4])
    t = torch.tensor([0.3, 0.8])
    if name[0] == "S":                                            # published SiT counts time the other way, with the other sign
        torch.testing.assert_close(model(x, t, y), -network(x, 1 - t, y), rtol=1e-3, atol=1e-4)
    else:
        torch.testing.assert_close(model(x, t, y), network(x, t, y))
    torch.save(network.state_dict(), tmp_path / "ours.pt")        # with a null embedding the weights are of train.py: left as they are
    ours, settings = models.from_checkpoint(tmp_path / "ours.pt", name)
    assert_same(ours.state_dict(), network.state_dict())
    assert settings["noise_drop"] > 0


def test_checkpoints_of_others_training_code_load_by_their_arguments(tmp_path):
    """DiT, SiT and fast-DiT save {"model", "ema", "opt", "args": Namespace}; wrappers leave a prefix."""
    Namespace, state = argparse.Namespace, hollow("SiT-S/4", input_size=32)
    doubled = {f"module._orig_mod.{key}": 2 * value for key, value in state.items()}
    save = lambda name, **parts: torch.save({"model": state, "ema": doubled, "opt": {}, **parts}, tmp_path / name)
    save("sit.pt", args=Namespace(model="SiT-S/4", data_path="/data/food", path_type="Linear", prediction="velocity"))
    model, settings = models.from_checkpoint(tmp_path / "sit.pt")
    assert settings["model"] == "SiT-S/4" and settings["data"] == "/data/food" and settings["class_drop"]
    assert torch.equal(model.x_embedder.proj.bias, 2 * state["x_embedder.proj.bias"])
    save("dit.pt", args=Namespace(model="DiT-S/4"))
    assert models.from_checkpoint(tmp_path / "dit.pt")[1]["interpolant"] == "vp"
    for name, args, asked, word in (("gvp.pt", Namespace(model="SiT-S/4", path_type="GVP"), None, "--path-type GVP"),
                                    ("sit.pt", None, "DiT-S/4", "holds a SiT-S/4, not a DiT-S/4"), ("bare.pt", Namespace(), None, "give --model"),
                                    ("bare.pt", Namespace(), "DiT-S/2", r"linear.weight is \(128, 384\), expected \(32, 384\)"),
                                    ("bare.pt", Namespace(), "DiT-B/4", r"\(384,\), expected \(768,\)")):
        if args:
            save(name, args=args)
        with pytest.raises(ValueError, match=word):
            models.from_checkpoint(tmp_path / name, asked)
    torch.save({"pos_embed": torch.zeros(3)}, tmp_path / "none.pt")
    with pytest.raises(ValueError, match="no checkpoint of a DiT or SiT"):
        models.from_checkpoint(tmp_path / "none.pt", "DiT-S/2")


def test_checkpointed_blocks_give_the_same_gradients_and_keep_less():
    model, found = tiny(depth=4).requires_grad_(True), []
    x, t, y = torch.randn(2, 3, 8, 8), torch.rand(2), torch.tensor([0, 3])
    for model.grad_checkpoint in (False, True):
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor.numel()) or tensor, lambda tensor: tensor):
            out = model(x, t, y)
        out.square().sum().backward()
        found.append((sum(kept), [p.grad.clone() for p in model.parameters() if p.grad is not None]))
        model.zero_grad()
    (all_of_it, plain), (less, checkpointed) = found
    assert less < all_of_it / 3 and len(plain) == len(checkpointed) > 40
    for a, b in zip(plain, checkpointed):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_weights_in_bf16_are_as_good_as_autocast():
    model, x, t, y = tiny(hidden_size=128), torch.randn(8, 3, 8, 8), torch.rand(8), torch.arange(8) % 5
    exact, errors = model(x, t, y), []
    for network in (model, sample.halve(model)):
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            errors.append(((network(x, t, y) - exact).norm() / exact.norm()).item())
    assert model.blocks[0].mlp.fc1.weight.dtype == torch.bfloat16 and 0 < errors[1] < 1.1 * errors[0] < 0.02


# ---------------------------------------------------------------------------------------------------------------------
# diffusion.py: interpolants


def test_vp_is_the_table_of_ddpm_and_float32_levels_hit_it():
    bars = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
    t = (torch.arange(1000, dtype=torch.float32) + 1) / 1000
    path = diffusion.VP()
    np.testing.assert_allclose(path.alpha(t).double()**2, bars, rtol=2e-7)
    np.testing.assert_allclose(path.sigma(t).double()**2, 1 - bars, rtol=2e-7)
    assert torch.equal(path.network_time(t), torch.arange(1000).float())
    assert path.network_time(0.0123456).item() == pytest.approx(11.3456) and path.alpha(0.0) == 1 and path.sigma(0.0) == 0


@by_name
def test_derivatives_and_inverse_of_the_interpolants(path):
    knots = torch.arange(20, 999, 7, dtype=torch.float64) / 1000   # of the table of VP, and places in between
    t, h = torch.cat([knots, knots + 0.00037]), 1e-5
    for f, dot in ((path.alpha, path.alpha_dot), (path.sigma, path.sigma_dot)):
        torch.testing.assert_close(dot(t), (f(t + h) - f(t - h)) / (2 * h), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(path.level(path.sigma(t)), t, rtol=1e-7, atol=1e-7)


@by_name
def test_conversions_give_back_what_the_state_was_made_of(path):
    x0, eps = torch.randn(2, 6, 3, 4, 4, dtype=torch.float64)
    t = torch.tensor([0.011, 0.1, 0.333, 0.5, 0.9, 0.99], dtype=torch.float64)
    x = diffusion.add_noise(path, x0, eps, t)
    velocity = path.alpha_dot(t).view(-1, 1, 1, 1) * x0 + path.sigma_dot(t).view(-1, 1, 1, 1) * eps
    prediction = velocity if path.prediction == "velocity" else eps
    for f, want in ((diffusion.to_eps, eps), (diffusion.to_x0, x0), (diffusion.to_velocity, velocity),
                    (diffusion.to_score, -eps / path.sigma(t).view(-1, 1, 1, 1))):
        torch.testing.assert_close(f(path, prediction, x, t), want, rtol=1e-8, atol=1e-8)


# ---------------------------------------------------------------------------------------------------------------------
# diffusion.py: the loss


def test_loss_is_zero_for_the_truth_and_needs_levels_of_the_path():
    x0, eps, y = torch.randn(3, 3, 8, 8), torch.randn(3, 3, 8, 8), torch.zeros(3, dtype=torch.long)
    t = torch.tensor([0.1, 0.5, 1.0])
    truth = lambda x, t, y, drop_noise=None: eps - x0
    assert diffusion.training_loss(truth, diffusion.Linear(), x0, y, t, eps).abs().max() == 0
    truth = lambda x, t, y, drop_noise=None: eps
    assert diffusion.training_loss(truth, diffusion.VP(), x0, y, t, eps).abs().max() == 0
    for path, bad in ((diffusion.VP(), 0.0005), (diffusion.VP(), 0.0), (diffusion.VP(), 1.001), (diffusion.Linear(), 1.2)):
        with pytest.raises(ValueError, match="training level"):
            diffusion.training_loss(truth, path, x0, y, torch.tensor([0.1, bad, 0.5]), eps)


def test_variance_bound_is_the_divergence_of_bayes_posterior():
    """Oracle: q(x_{k−1}|x_k, x_0) by multiplying two Gaussians, and torch's own Kullback–Leibler divergence."""
    normal, bars = torch.distributions.Normal, torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)
    x0, eps, eps_hat, v = (torch.randn(4, 3, 4, 4, dtype=torch.float64).clamp(-1, 1) for _ in range(4))
    k = torch.tensor([1, 20, 500, 999])
    got = diffusion.training_loss(lambda x, t, y, drop_noise: torch.cat([eps_hat, v], 1), diffusion.VP(), x0, None,
                                  (k + 1).double() / 1000, eps) - (eps - eps_hat).square().flatten(1).mean(1)
    for i, step in enumerate(k.tolist()):
        bar, before = bars[step], bars[step - 1]
        a = bar / before                                          # x_k = √a x_{k−1} + √(1−a) z
        x = bar.sqrt() * x0[i] + (1 - bar).sqrt() * eps[i]
        def posterior(start):
            precision = 1 / (1 - before) + a / (1 - a)
            return (before.sqrt() * start / (1 - before) + a.sqrt() * x / (1 - a)) / precision, precision**-0.5
        mean, std = posterior(x0[i])
        mean_hat, _ = posterior((x - (1 - bar).sqrt() * eps_hat[i]) / bar.sqrt())
        std_hat = ((1 + v[i]) / 2 * (1 - a).log() / 2 + (1 - v[i]) / 2 * std.log()).exp()
        want = torch.distributions.kl_divergence(normal(mean, std), normal(mean_hat, std_hat)).mean() / math.log(2)
        assert got[i].item() == pytest.approx(want.item(), rel=1e-6)


def test_only_the_variance_learns_from_the_bound():
    out = torch.randn(2, 6, 4, 4, requires_grad=True)
    x0, eps, t = torch.randn(2, 3, 4, 4).clamp(-1, 1), torch.randn(2, 3, 4, 4), torch.tensor([0.001, 0.4])
    diffusion.training_loss(lambda *_, drop_noise: out, diffusion.VP(), x0, None, t, eps).sum().backward()
    torch.testing.assert_close(out.grad[:, :3], 2 * (out - torch.cat([eps, eps], 1)).detach()[:, :3] / 48)
    assert out.grad[:, 3:].abs().min() > 0


# ---------------------------------------------------------------------------------------------------------------------
# diffusion.py: samplers, on Gaussian data, whose exact prediction is known


MEAN = torch.tensor([0.7, -0.4], dtype=torch.float64)
COV = torch.tensor([[0.5, 0.3], [0.3, 0.4]], dtype=torch.float64)


def gaussian(path, mean=MEAN, cov=COV):
    """denoise(x, t) for data N(mean, cov) in the last dimension: E[ε|x, t] = σ (α² cov + σ²)⁻¹ (x − α mean)."""
    def denoise(x, t):
        alpha, sigma = path.alpha(t), path.sigma(t)
        total = alpha**2 * cov + sigma**2 * torch.eye(len(cov), dtype=torch.float64)
        eps = torch.linalg.solve(total, (x - alpha * mean).unsqueeze(-1)).squeeze(-1) * sigma
        if path.prediction == "eps":
            return eps
        x0 = mean + torch.linalg.solve(total, (x - alpha * mean).unsqueeze(-1)).squeeze(-1) @ cov * alpha
        return eps - x0
    return denoise


def run(name, path, denoise, x, **options):
    return {"ddpm": diffusion.sample_ddpm, "sde": diffusion.sample_sde, "ode": diffusion.sample_ode}[name](denoise, x, path, **options)


@pytest.mark.parametrize("name, path", [("ddpm", PATHS[1]), *((n, p) for n in ("sde", "ode") for p in PATHS)],
                         ids=lambda value: value if isinstance(value, str) else type(value).__name__)
def test_exact_score_drives_the_samplers_to_the_data(name, path):
    n, rng = 20_000, torch.Generator().manual_seed(0)
    draw = lambda x: torch.randn(x.shape, generator=rng, dtype=torch.float64)
    options = dict(ddpm=dict(steps=1000, randn=draw), sde=dict(steps=500, randn=draw, last_step=1 / 500), ode=dict(steps=100))[name]
    x = run(name, path, gaussian(path), draw(torch.empty(n, 1, 1, 2)), **options).reshape(n, 2)
    error = 4 * COV.diagonal().sqrt() / n**0.5
    assert ((x.mean(0) - MEAN).abs() < error).all(), x.mean(0)
    spread = 4 * ((COV**2 + torch.outer(COV.diagonal(), COV.diagonal())) / n).sqrt()     # of a sample covariance
    assert ((torch.cov(x.T) - COV).abs() < spread).all(), torch.cov(x.T)


def exact_moments(name, path, mean, std, steps, **options):
    """Mean and variance of a sampler's result on scalar Gaussian data, without Monte Carlo, from the exact start p_1.

    The sampler is affine in its start and its noises, so one batch tells its response to each: row 0 starts at the mean,
    row 1 a standard deviation above it, and row 2 + i at the mean, with the noise 1 at step i.
    """
    call = iter(range(10**6))
    def impulse(x):
        out = torch.zeros_like(x)
        out[2 + next(call)] = 1
        return out
    alpha, sigma = path.alpha(1.0).item(), path.sigma(1.0).item()
    x = torch.full((steps + 2, 1, 1, 1), alpha * mean, dtype=torch.float64)
    x[1] += math.hypot(alpha * std, sigma)
    if name != "ode":
        options["randn"] = impulse
    denoise = gaussian(path, torch.tensor([mean], dtype=torch.float64), torch.tensor([[std**2]], dtype=torch.float64))
    out = run(name, path, denoise, x, steps=steps, **options).flatten()
    return out[0].item(), (out[1:] - out[0]).square().sum().item()


def order(errors, steps):
    """The slope of log error against log steps, with its sign turned."""
    return -np.polyfit(np.log(steps), np.log(errors), 1)[0]


@by_name
def test_sde_converges_with_order_one(path):
    steps = [100, 200, 400, 800]
    means, variances = zip(*(exact_moments("sde", path, 0.7, 0.3, n, last_step=1 / n) for n in steps))
    assert 0.9 < order([abs(v - 0.09) for v in variances], steps) < 1.2, variances
    if path.prediction == "eps":
        assert 0.9 < order([abs(m - 0.7) for m in means], steps) < 1.1, means
    else:                                                         # the mean of linear moves on a straight line
        assert max(abs(m - 0.7) for m in means) < 1e-12, means


def test_finite_steps_alone_shift_the_level_by_half_a_step():
    """Data without variance, exact velocity x / t: the variance beyond t² obeys e' = 4 e / t − 3 Δ, so e = Δ (t − t⁴) and δ = Δ (1 − t³) / 2.

    One step makes t² into t² − 2 t Δ + 4 Δ², which is (t − Δ)² + 3 Δ²: that is where the 3 Δ a unit of t comes from.
    """
    seen = {}
    def denoise(x, t):
        seen[t.item()] = x.std().item()
        return x / t
    diffusion.sample_sde(denoise, torch.randn(8000, 1, 8, 8), diffusion.Linear(), steps=50)
    step = 0.96 / 49
    for t in [t for t in seen if 0.1 < t < 0.8]:
        assert seen[t] - t == pytest.approx(step * (1 - t**3) / 2, abs=6e-4 + 3 * step**2), t


@by_name
@pytest.mark.parametrize("method, expected", [("euler", 1), ("heun", 2)])
def test_ode_converges_to_the_closed_form_flow(path, method, expected):
    """Gaussian data flow by x(t) = α m + (x(1) − α(1) m) · std(t)/std(1)."""
    mean, std, t_end, steps = 0.7, 0.6, 0.05, [25, 50, 100, 200]
    spread = lambda t: (path.alpha(t)**2 * std**2 + path.sigma(t)**2).sqrt()
    x = torch.linspace(-2, 2, 9, dtype=torch.float64).view(9, 1, 1, 1)
    want = path.alpha(t_end) * mean + (x - path.alpha(1.0) * mean) * spread(t_end) / spread(1.0)
    denoise = gaussian(path, torch.tensor([mean], dtype=torch.float64), torch.tensor([[std**2]], dtype=torch.float64))
    errors = [(diffusion.sample_ode(denoise, x, path, n, method, t_end) - want).abs().max().item() for n in steps]
    assert abs(order(errors, steps) - expected) < 0.15, errors


def test_ddpm_error_falls_with_every_doubling_of_its_steps():
    steps = [8, 16, 32, 64, 125, 250, 500, 1000]
    moments = [exact_moments("ddpm", PATHS[1], 0.7, 0.6, n) for n in steps]
    errors = [abs(v - 0.36) for _, v in moments]
    assert all(b < a for a, b in zip(errors, errors[1:])) and errors[-1] < 0.005, errors


def test_samplers_refuse_what_they_cannot_do():
    x, denoise = torch.zeros(1, 1, 1, 2), lambda x, t: x
    for call in (lambda: diffusion.sample_ddpm(denoise, x, diffusion.Linear()), lambda: diffusion.sample_ddpm(denoise, x, PATHS[1], steps=1001),
                 lambda: diffusion.sample_sde(denoise, x, PATHS[0], steps=0), lambda: diffusion.sample_sde(denoise, x, PATHS[0], last_step=1.0),
                 lambda: diffusion.sample_ode(denoise, x, PATHS[0], method="rk4"), lambda: diffusion.sample_ode(denoise, x, PATHS[0], t_end=1.0)):
        with pytest.raises(ValueError):
            call()


# ---------------------------------------------------------------------------------------------------------------------
# diffusion.py: guidance


@by_name
def test_nag_mixture_is_the_gradient_of_the_level_posterior(path):
    """On a Gaussian mixture with known levels, guided() with the exact branches gives s(x|t) + w ∇ log p(t|x) by autograd."""
    levels = (torch.arange(0, 1000, 5, dtype=torch.float64) + 1) / 1000
    centres = torch.tensor([[1.0, 0.2], [-0.6, 0.9], [0.1, -1.2]], dtype=torch.float64)

    def log_p(x, t):
        """log p_t(x), (N, T) for x (N, 2), t (T,)."""
        alpha, sigma = path.alpha(t), path.sigma(t)
        variance = alpha**2 * 0.04 + sigma**2
        square = (x[:, None, None] - alpha[:, None, None] * centres).square().sum(-1)    # (N, T, 3)
        return (-square / (2 * variance[:, None])).logsumexp(-1) - variance.log()

    def gradient(f, x):
        x = x.clone().requires_grad_()
        return torch.autograd.grad(f(x).sum(), x)[0]

    def network(x, time, y, drop_noise=None):
        hidden = drop_noise if drop_noise is not None else torch.zeros(len(x), dtype=torch.bool)
        out = torch.empty_like(x)
        level = (time[:1].double() + 1) / 1000 if path.prediction == "eps" else time[:1].double()
        flat = x.reshape(len(x), 2)
        score = torch.where(hidden[:, None], gradient(lambda x: log_p(x, levels).logsumexp(1), flat),
                            gradient(lambda x: log_p(x, level), flat))
        eps = -path.sigma(level) * score
        out = eps if path.prediction == "eps" else (eps - flat) / (1 - level)            # v = (ε − x) / (1 − t)
        return out.reshape(x.shape)

    x = torch.randn(64, 1, 1, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for t in (0.101, 0.401, 0.801):
        denoise = diffusion.guided(network, path, torch.zeros(64, dtype=torch.long), w_nag=3.0)
        got = diffusion.to_score(path, denoise(x, t), x, torch.tensor(t, dtype=torch.float64)).reshape(64, 2)
        at = torch.tensor([t], dtype=torch.float64)
        log_posterior = lambda x: log_p(x, at)[:, 0] - log_p(x, levels).logsumexp(1)
        flat = x.reshape(64, 2)
        want = gradient(lambda x: log_p(x, at), flat) + 3.0 * gradient(log_posterior, flat)
        assert (got - want).norm() / want.norm() < 1e-5


@by_name
def test_an_ideal_null_branch_gives_half_of_the_posterior_gradient_or_less(path):
    """What the trained null branch means: E[prediction|x] over the unknown level, converted at the nominal one.

    Where the data carries no signal (x_0 = 0 in 400 dimensions) the level is read off |x|, and by quadrature over it the
    branch difference is 1/2 (ε) or (1 − t)/2 (velocity) of ∇ log p(t|x), near the state's own level.
    """
    dims, t = 400, 0.3
    levels = (torch.arange(1000, dtype=torch.float64) + 1) / 1000 if path.prediction == "eps" else torch.linspace(1e-4, 1, 40_000, dtype=torch.float64)
    sigmas = path.sigma(levels)
    x = torch.full((1, 1, 1, dims), path.sigma(0.31).item(), dtype=torch.float64)        # it really holds level 0.31
    weights = torch.from_numpy((lambda logs: np.exp(logs - logsumexp(logs)))(
        (-dims * sigmas.log() - x.square().sum() / (2 * sigmas**2)).numpy()))            # p(level | x)
    inverse, inverse_square = (weights / sigmas).sum(), (weights / sigmas**2).sum()

    def network(x, time, y, drop_noise=None):                                            # x_0 = 0: ε = v = x / σ
        return torch.where(drop_noise.view(-1, 1, 1, 1), x * inverse, x / path.sigma(t))

    denoise = diffusion.guided(network, path, torch.zeros(1, dtype=torch.long), w_nag=1.0)
    score = diffusion.to_score(path, denoise(x, t), x, torch.tensor(t, dtype=torch.float64))
    difference = score - -x / path.sigma(t)**2
    gradient = -x / path.sigma(t)**2 + x * inverse_square
    assert (difference / gradient).mean().item() == pytest.approx(0.5 if path.prediction == "eps" else (1 - t) / 2, rel=0.05)


@by_name
def test_mixing_predictions_is_mixing_scores(path):
    x, *predictions = torch.randn(4, 5, 3, 4, 4, dtype=torch.float64)
    weights, t = (2.5, -1.0, -0.5), torch.tensor(0.37, dtype=torch.float64)
    mixed = sum(w * p for w, p in zip(weights, predictions))
    scores = sum(w * diffusion.to_score(path, p, x, t) for w, p in zip(weights, predictions))
    torch.testing.assert_close(diffusion.to_score(path, mixed, x, t), scores, rtol=1e-10, atol=1e-10)


@by_name
def test_neutral_scales_are_the_unguided_sampler_bit_for_bit(path):
    model, y, x = tiny(), torch.tensor([0, 1, 2]), torch.randn(3, 3, 8, 8)
    def plain(x, t):
        out = model(x, path.network_time(t).float().expand(3), y)
        return out if path.prediction == "eps" else out[:, :3]
    for name in ("sde", "ode") + (("ddpm",) if path.prediction == "eps" else ()):
        seeded = lambda: torch.Generator().manual_seed(5)
        options = lambda g: {} if name == "ode" else {"randn": lambda x: torch.randn(x.shape, generator=g)}
        want = run(name, path, plain, x, steps=4, **options(seeded()))
        neutral = diffusion.guided(model, path, y, w_nag=0.0, cfg_scale=1.0)
        outside = diffusion.guided(model, path, y, w_nag=3.0, cfg_scale=4.0, nag_interval=(0, 0), cfg_interval=(0.0001, 0.0002))
        assert torch.equal(run(name, path, neutral, x, steps=4, **options(seeded())), want)
        if name != "ode" or path.prediction == "eps":                                    # Heun on linear ends at t = 0
            assert torch.equal(run(name, path, outside, x, steps=4, **options(seeded())), want)


@by_name
def test_guidance_is_its_sum_and_one_call(path):
    model, calls = tiny(), []
    y, x, k = torch.tensor([0, 3]), torch.randn(2, 3, 8, 8), 299.0 if path.prediction == "eps" else 0.3
    def counted(x, t, y, drop_noise=None):
        calls.append(len(x))
        return model(x, t, y, drop_noise=drop_noise)
    ask = lambda y, hide: model(x, torch.full((2,), k), y, drop_noise=torch.tensor([hide, hide]))
    cond, no_class, no_level = ask(y, False), ask(torch.tensor([4, 4]), False), ask(y, True)
    cfg = 0.7 * (cond - no_class)[:, :3]
    cfg[:, 2:] = 0
    want = cond[:, :3] + cfg + 2 * (cond - no_level)[:, :3]
    denoise = diffusion.guided(counted, path, y, w_nag=2.0, cfg_scale=1.7, cfg_channels=2, null_class=4, nag_interval=(0.3, 0.6),
                               cfg_interval=(0.1, 0.3))
    got = denoise(x, 0.3)
    torch.testing.assert_close(got[:, :3], want, rtol=1e-5, atol=1e-5)
    if path.prediction == "eps":
        torch.testing.assert_close(got[:, 3:], cond[:, 3:], rtol=1e-5, atol=1e-5)
    for t in (0.2, 0.4, 0.7):
        denoise(x, t)
    assert calls == [6, 4, 4, 2]
    levels = torch.tensor([0.2, 0.4])                             # a level for each sample
    torch.testing.assert_close(denoise(x, levels)[:1], denoise(x, 0.2)[:1], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(denoise(x, levels)[1:], denoise(x, 0.4)[1:], rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="nag_interval"):
        diffusion.guided(model, path, y, nag_interval=(0.6, 0.3))


@by_name
def test_a_guide_adds_its_difference_inside_its_interval(path):
    """Autoguidance asks the guide with the class, domain guidance with the guide's own null label; NAG and CFG beside it."""
    model, weak, y = tiny(), tiny(num_classes=9, depth=1), torch.tensor([0, 3])
    x, k = torch.randn(2, 3, 8, 8), path.network_time(torch.tensor(0.3)).float().expand(2)
    options = dict(w_nag=1.0, cfg_scale=1.5)
    plain = diffusion.guided(model, path, y, **options)(x, 0.3)
    cond = model(x, k, y)[:, :3]
    for labels in (None, torch.tensor([9, 9])):
        guide = weak(x, k, y if labels is None else labels)[:, :3]
        got = diffusion.guided(model, path, y, guide=weak, guide_y=labels, guide_scale=1.8, guide_interval=(0.2, 0.4), **options)(x, 0.3)
        torch.testing.assert_close(got[:, :3], plain[:, :3] + 0.8 * (cond - guide), rtol=1e-5, atol=1e-5)
        assert torch.equal(got[:, 3:], plain[:, 3:])
    def never(*args):
        raise AssertionError("the guide was asked where it does not act")
    for terms in (dict(guide_scale=1.0), dict(guide_scale=1.8, guide_interval=(0.4, 0.6))):
        assert torch.equal(diffusion.guided(model, path, y, guide=never, **terms, **options)(x, 0.3), plain)
    with pytest.raises(ValueError, match="guide_interval"):
        diffusion.guided(model, path, y, guide_interval=(0.6, 0.3))


@by_name
def test_classifier_guidance_adds_its_gradient_to_the_score(path):
    """With CFG beside it, at levels given for all or for each; nothing outside its interval, and where α = 0."""
    model, y, asked = tiny(), torch.tensor([0, 3]), []
    x, g = torch.randn(2, 2, 3, 8, 8, dtype=torch.float64)
    def classifier(at, t):
        asked.append(t.tolist())
        return g * _like(t, g) + 0 * at
    _like = lambda t, x: t.to(x).reshape(-1, 1, 1, 1)
    network = lambda x, *rest, **options: model(x.float(), *rest, **options).double()
    options = dict(cfg_scale=1.5, null_class=4, nag_interval=(0.1, 0.6))
    plain = diffusion.guided(network, path, y, **options)
    pushed = diffusion.guided(network, path, y, w_classifier=2.5, classifier=classifier, **options)
    for t in (torch.tensor(0.1, dtype=torch.float64), torch.tensor(0.5, dtype=torch.float64), torch.tensor([0.2, 0.6], dtype=torch.float64)):
        score = lambda denoise: diffusion.to_score(path, denoise(x, t)[:, :3], x, t)
        torch.testing.assert_close(score(pushed) - score(plain), 2.5 * g * _like(t, g), rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(pushed(x, 0.5)[:, 3:], plain(x, 0.5)[:, 3:])              # the variance is left alone
    count = len(asked)
    assert torch.equal(pushed(x, 0.7), plain(x, 0.7)) and len(asked) == count
    everywhere = diffusion.guided(network, path, y, w_classifier=2.5, classifier=classifier)
    assert torch.isfinite(everywhere(x, 1.0)).all()


@by_name
def test_prediction_per_score_is_the_inverse_of_to_scores_slope(path):
    x, prediction, change = torch.randn(3, 4, 3, 4, 4, dtype=torch.float64)
    for t in (0.05, 0.3, 0.8):
        moved = prediction + diffusion.prediction_per_score(path, t) * change
        t = torch.tensor(t, dtype=torch.float64)
        torch.testing.assert_close(diffusion.to_score(path, moved, x, t) - diffusion.to_score(path, prediction, x, t), change)


@by_name
def test_noise_shift_solves_its_equation(path):
    for t, sigma_e in ((0.05, 0.01), (0.2, 0.05), (0.5, 0.1), (0.7, 0.02)):
        sigma = lambda s: path.sigma(float(s)).item()
        want = brentq(lambda s: sigma(s)**2 - sigma(t)**2 - sigma_e**2, t, 1, xtol=1e-14) - t
        assert diffusion.noise_shift(path, t, sigma_e).item() == pytest.approx(want, rel=1e-6)
    small = diffusion.noise_shift(path, torch.tensor([0.3, 0.5], dtype=torch.float64), 0.01)
    torch.testing.assert_close(diffusion.noise_shift(path, torch.tensor([0.3, 0.5], dtype=torch.float64), 0.01, first_order=True), small,
                               rtol=0.02, atol=0)
    for t, sigma_e in ((0.9, 0.9), (1.0, 0.1), (1.5, 0.1)):
        with pytest.raises(ValueError):
            diffusion.noise_shift(path, t, sigma_e)


# ---------------------------------------------------------------------------------------------------------------------
# models.py and estimator.py: the noise estimator


def test_truncated_normal_is_scipys():
    """In the middle, at the ends, and far outside, where the mass within [0, 1] has no place in a float."""
    loc = torch.tensor([-0.3, 0.0, 0.4, 0.97, 1.2, -0.114, 1.5, -0.9])
    scale = torch.tensor([0.1, 0.5, 0.02, 0.1, 0.3, 0.02, 0.05, 0.01])
    t = torch.tensor([0.05, 0.9, 0.41, 0.99, 0.5, 0.001, 0.99, 0.001])
    ours = models.TruncatedNormal(loc, scale)
    theirs = truncnorm(-loc.numpy() / scale.numpy(), (1 - loc.numpy()) / scale.numpy(), loc.numpy(), scale.numpy())
    np.testing.assert_allclose(ours.log_prob(t), theirs.logpdf(t), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(ours.mean(), theirs.mean(), rtol=0.01, atol=1e-4)
    np.testing.assert_allclose(ours.cdf(t), theirs.cdf(t), rtol=1e-2, atol=1e-4)
    loc.requires_grad_()
    models.TruncatedNormal(loc, scale).log_prob(t).sum().backward()
    assert torch.isfinite(loc.grad).all()


@pytest.mark.parametrize("size, channels", [(8, 3), (7, 1), (32, 4)])
def test_estimator_gradient_is_that_of_its_log_density(size, channels):
    """Oracle: the central difference along the gradient; also where the samplers call it, without gradient and in bf16."""
    torch.manual_seed(0)
    net, x = models.NoiseEstimator(size, channels), torch.randn(3, channels, size, size)
    torch.nn.init.normal_(net.head[-1].weight, std=0.1)
    t = torch.tensor([0.3, 0.5, 0.9])
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        g = net.gradient(x, t)
        assert torch.equal(net.gradient(x, 0.5)[1], g[1]) and g.shape == x.shape and g.dtype == torch.float32
    step = 5e-3 * g / g.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    change = (net(x + step).log_prob(t) - net(x - step).log_prob(t)) / 1e-2
    torch.testing.assert_close(change, g.flatten(1).norm(dim=1), rtol=1e-2, atol=1e-4)


class Gaussian:
    """Data N(m, U diag(λ) Uᵀ) of 8×8×3 with axes U in no relation to the pixels, whose level posterior is known."""

    def __init__(self, path):
        rng = torch.Generator().manual_seed(0)
        randn = lambda *shape: torch.randn(*shape, generator=rng, dtype=torch.float64)
        self.rng, self.path = rng, path
        self.axes, self.mean = torch.linalg.qr(randn(192, 192))[0], 0.3 * randn(192)
        self.variances = torch.arange(1, 193, dtype=torch.float64)**-1.5
        self.variances *= 0.1 * 192 / self.variances.sum()
        self.levels = (torch.arange(2000, dtype=torch.float64) + 0.5) / 2000

    def draw(self, n):
        z = self.mean + self.variances.sqrt() * torch.randn(n, 192, generator=self.rng, dtype=torch.float64)
        return (z @ self.axes.T).float().view(n, 3, 8, 8)

    def posterior(self, x, t):
        """E[t|x] by quadrature over the levels, and ∇ log p(t|x) = s(x|t) − Σ p(t'|x) s(x|t')."""
        z = x.double().flatten(1) @ self.axes
        alpha, sigma = self.path.alpha(self.levels), self.path.sigma(self.levels)
        total = alpha**2 * self.variances[:, None] + sigma**2                            # (192, T)
        shifted = alpha * self.mean[:, None]
        logs = -(total.log().sum(0) + z**2 @ (1 / total) - 2 * z @ (shifted / total) + (shifted**2 / total).sum(0)) / 2
        p = logs.softmax(1)
        score = -(z - self.path.alpha(t) * self.mean) / (self.path.alpha(t)**2 * self.variances + self.path.sigma(t)**2)
        unknown = -(z * (p @ (1 / total).T) - p @ (shifted / total).T)
        return p @ self.levels, ((score - unknown) @ self.axes.T).view(x.shape)


def trained(path, draw, size, steps, batch, jitter, lr=1e-3):
    """An estimator after `steps` of estimator.fit on images that draw(n) gives."""
    torch.manual_seed(0)
    s = dict(steps=steps, lr=lr, jitter=jitter, seed=0)
    net = models.NoiseEstimator(size, 3)
    net.start_from(estimator.jitter(draw(2048), jitter, train.generator(0)))
    def batches():
        for _ in range(steps):
            x0, k = draw(batch), torch.randint(1, 1001, (batch,))
            yield x0, k / 1000 if path.prediction == "eps" else torch.rand(batch), torch.randn(x0.shape)
    estimator.fit(net, path, batches(), s, torch.optim.AdamW(net.parameters(), weight_decay=0))
    return net.eval().requires_grad_(False)


@slow
def test_estimator_finds_the_exact_posterior_of_gaussian_data():
    path = diffusion.Linear()
    data = Gaussian(path)
    net = trained(path, data.draw, 8, 2000, 256, jitter=0.0, lr=4e-4)
    products = torch.zeros(3)
    for t in (0.2, 0.3, 0.4, 0.5, 0.6, 0.7):
        x = diffusion.add_noise(path, data.draw(1000), torch.randn(1000, 3, 8, 8), t).float()
        mean, exact = data.posterior(x, t)
        error, g = net(x).mean() - mean, net.gradient(x, t)
        print(f"t {t}: mean off by {error.mean():+.4f}, each by {error.abs().mean():.4f}; cosine {(g * exact).sum() / (g.norm() * exact.norm()):.3f}")
        assert error.abs().mean() < 0.01 and abs(error.mean()) < 0.003
        products += torch.stack([(g * exact).sum(), g.square().sum(), exact.square().sum()])
    cosine = products[0] / (products[1] * products[2]).sqrt()
    print(f"pooled cosine {cosine:.3f}")
    assert cosine > 0.9


@pytest.mark.parametrize("path", [PATHS[0], pytest.param(PATHS[1], marks=slow)], ids=["linear", "vp"])
def test_estimator_sees_the_shift_that_known_noise_makes(path):
    """Real data noised to t, and perturbed by noise of a known σ_e: δ is that of the equation of Statement 1."""
    data = train.Shapes(16, seed=0)
    images = train.to_float(torch.from_numpy(data.images(range(12_000))[0]))
    training, held = images[:10_000], images[10_000:]
    net = trained(path, lambda n: training[torch.randint(0, 10_000, (n,))], 16, 400 if path.prediction == "velocity" else 700, 128, jitter=0.4)
    for t, known in itertools.product(*(((0.2, 0.45, 0.7), (0.02, 0.05, 0.1)) if path.prediction == "velocity" else ((0.1, 0.2, 0.3), (0.02, 0.05)))):
        x = diffusion.add_noise(path, held, torch.randn(held.shape), t).float()
        sigma_e = (path.sigma(t + known)**2 - path.sigma(t)**2).sqrt().item()
        seen = (net(x + sigma_e * torch.randn(x.shape)).mean() - net(x).mean()).mean().item()
        print(f"t {t}: {seen:.4f} of {known}")
        assert seen == pytest.approx(diffusion.noise_shift(path, t, sigma_e).item(), rel=0.1), (t, known)


# ---------------------------------------------------------------------------------------------------------------------
# train.py: data


def test_shapes_are_a_function_of_seed_and_index():
    data = train.Shapes(16, seed=3)
    images, labels = data.images(range(400))
    again, _ = data.images([7, 399])
    assert np.array_equal(again, images[[7, 399]]) and images.dtype == np.uint8 and images.shape == (400, 3, 16, 16)
    assert not np.array_equal(train.Shapes(16, seed=4).images([7])[0], again[:1])
    assert np.bincount(labels, minlength=8).min() > 25 and len(data.classes) == 8


def test_some_of_the_shapes_are_a_data_set_of_their_own():
    """shapes:star,cross draws, where the number calls for the same class, the very image that shapes draws."""
    every, some = train.open_data("shapes", 16, 3), train.open_data("shapes:star,cross", 16, 3)
    assert some.classes == ["cross", "star"]
    (images, labels), (few, few_labels) = every.images(range(400)), some.images(range(400))
    same = np.array(every.classes)[labels] == np.array(some.classes)[few_labels]
    assert same.sum() > 60 and np.array_equal(images[same], few[same]) and np.bincount(few_labels).min() > 160


def test_a_drawn_circle_covers_its_area():
    """Oracle: π r² of a disc of radius 0.9 · radius, from the random numbers that the class, size and place come from."""
    data, checked = train.Shapes(32, seed=0), 0
    for i in range(60):
        image, label = data.images([i])
        if data.classes[label[0]] == "circle":
            u = train.generator(0, "shapes", i).random(6)
            bright = image[0].max(0).astype(float)
            cover = (bright - bright.min()) / (bright.max() - bright.min())
            assert cover.mean() * 4 == pytest.approx(math.pi * (0.9 * (0.6 + 0.25 * u[1]))**2, rel=0.02)
            checked += 1
    assert checked > 2


@pytest.fixture
def photos(tmp_path):
    """A folder of two classes with images of several sizes, modes and formats."""
    rng = np.random.default_rng(0)
    for name in ("birds", "ants"):
        (tmp_path / "photos" / name).mkdir(parents=True)
    for i, (mode, suffix, size) in enumerate([("RGB", "png", (40, 30)), ("L", "jpg", (16, 16)), ("RGBA", "png", (20, 70)),
                                              ("P", "png", (33, 33)), ("CMYK", "jpg", (50, 40)), ("RGB", "jpg", (17, 90))]):
        pixels = Image.fromarray(rng.integers(0, 255, (*size[::-1], 3), dtype=np.uint8)).convert(mode)
        pixels.save(tmp_path / "photos" / ("ants" if i % 2 else "birds") / f"{i}.{suffix}")
    return tmp_path / "photos"


def test_image_folder_gives_classes_crops_and_flips(photos):
    data = train.ImageFolder(photos, 16)
    assert data.classes == ["ants", "birds"] and len(data) == 6
    images, labels = data.images(range(6), np.zeros(6, bool))
    mirrored, _ = data.images(range(6), np.ones(6, bool))
    assert np.array_equal(images, mirrored[..., ::-1]) and labels.tolist() == [0, 0, 0, 1, 1, 1]
    exact = np.asarray(Image.open(photos / "ants" / "1.jpg").convert("RGB"))             # is 16×16 already
    assert np.array_equal(images[0], exact.transpose(2, 0, 1))


def test_centre_crop_takes_the_middle_and_rotation_tags_are_obeyed(tmp_path):
    wide = np.zeros((16, 48, 3), np.uint8)
    wide[:, 16:32] = 200
    assert (train.centre_crop(Image.fromarray(wide), 16) == 200).all()
    exif = Image.Exif()
    exif[0x0112] = 6                                              # to be shown turned by a quarter, clockwise
    pixels = np.zeros((16, 16, 3), np.uint8)
    pixels[:, :8] = 255                                           # bright on the left; shown upright, at the top
    Image.fromarray(pixels).save(tmp_path / "turned.png", exif=exif)
    upright = np.asarray(train.read_image(tmp_path / "turned.png"))
    assert (upright[:8] == 255).all() and (upright[8:] == 0).all()


def test_batches_are_shared_out_and_visit_every_image_once_an_epoch(photos, monkeypatch):
    settings = dict(seed=0, batch=4, interpolant="vp", class_drop=0.5, noise_drop=0.5, in_channels=3, input_size=16, num_classes=2)
    batches = train.Batches(train.ImageFolder(photos, 16), settings)
    seen = np.concatenate([batches.indices(step) for step in range(3)])                  # 12 places: two epochs of 6
    assert sorted(seen[:6]) == sorted(seen[6:]) == list(range(6))
    whole = batches[5]
    monkeypatch.setattr(train, "WORLD", 2)
    for rank in (0, 1):
        monkeypatch.setattr(train, "RANK", rank)
        for part, full in zip(batches[5], whole):
            assert torch.equal(part, full[2 * rank:2 * rank + 2])


# ---------------------------------------------------------------------------------------------------------------------
# The scripts, run as a user runs them. A run of these takes seconds: 8×8 shapes, a handful of steps.


SCRIPTS = {"train.py": train, "sample.py": sample, "estimator.py": estimator, "fid.py": fid}
SMALL = "--image-size 8 --batch 8 --precision fp32 --workers 0".split()


def environment():
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE)}


def in_child(name, args, folder, output, error):
    """Be the script `name`, in a process of its own."""
    os.chdir(folder)
    for file, number in ((output, 1), (error, 2)):
        os.dup2(os.open(file, os.O_WRONLY), number)
    sys.argv = [name, *args]
    try:
        train.one_line_errors(SCRIPTS[name].main)
    finally:
        sys.stdout.flush(), sys.stderr.flush()


@functools.cache
def forks():
    """Processes forked off one that has imported everything, with one thread: that saves two seconds a script."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["test_nag"])
    before, os.environ["OMP_NUM_THREADS"] = os.environ.get("OMP_NUM_THREADS"), "1"
    multiprocessing.forkserver.ensure_running()
    if before is None:
        del os.environ["OMP_NUM_THREADS"]
    else:
        os.environ["OMP_NUM_THREADS"] = before
    return context


def script(name, *args, cwd, ranks=1, **options):
    """Run a script to its end; its output and exit status."""
    if ranks == 1 and not options:
        with tempfile.NamedTemporaryFile() as output, tempfile.NamedTemporaryFile() as error:
            process = forks().Process(target=in_child, args=(name, [*map(str, args)], str(cwd), output.name, error.name))
            process.start()
            process.join(240)
            process.kill()
            process.join()
            return SimpleNamespace(returncode=process.exitcode, stdout=Path(output.name).read_text(), stderr=Path(error.name).read_text())
    port = str(20_000 + os.getpid() % 20_000)
    launch = ["-m", "torch.distributed.run", "--nproc-per-node", str(ranks), "--master-port", port] if ranks > 1 else []
    return subprocess.run([sys.executable, *launch, str(HERE / name), *map(str, args)], cwd=cwd, env=environment(), text=True,
                          capture_output=True, timeout=240, **options)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A folder with a finished run of 20 steps in it."""
    folder = tmp_path_factory.mktemp("runs")
    done = script("train.py", "--steps", 20, *SMALL, "--ckpt-every", 10, "--out", "runs/one", cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder


def losses(out):
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))            # every step once
    return np.array([line["loss"] for line in lines])


def state(out, step):
    return models.load_file(out / "checkpoints" / f"{step:07}.pt")


def assert_same(a, b):
    """Equal to the bit, tensors inside dicts and lists too."""
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b)
        for x, y in zip(a, b):
            assert_same(x, y)
    else:
        assert torch.equal(a, b) if torch.is_tensor(a) else a == b


def test_a_run_writes_its_files_and_knows_when_it_is_finished(runs):
    out = runs / "runs/one"
    assert len(losses(out)) == 20 and losses(out)[-1] < losses(out)[0]
    assert sorted(p.name for p in (out / "checkpoints").iterdir()) == ["0000010.pt", "0000020.pt"]
    assert Image.open(out / "samples/0000020.png").size[0] > 100
    again = script("train.py", *SMALL, "--out", "runs/one", cwd=runs)
    assert again.returncode == 0 and "is finished" in again.stdout


def test_training_follows_the_same_curve_on_two_ranks(tmp_path):
    for ranks in (1, 2):
        done = script("train.py", "--steps", 20, *SMALL, "--model", "DiT-Ti/2", "--micro-batch", 3, "--out", f"on{ranks}", cwd=tmp_path, ranks=ranks)
        assert done.returncode == 0, done.stderr
    np.testing.assert_allclose(losses(tmp_path / "on2"), losses(tmp_path / "on1"), rtol=1e-5)


@pytest.mark.skipif(sys.platform != "linux", reason="threads are named in /proc")
def test_no_thread_of_a_process_group_outlives_it(tmp_path):
    """One that did aborted the process now and then: it asked for Python's lock while Python ended."""
    code = f"""
import pathlib, torch, train
names = lambda: [file.read_text().strip() for file in pathlib.Path('/proc/self/task').glob('*/comm')]
torch.distributed.init_process_group('gloo', init_method='file://{tmp_path}/meet', rank=0, world_size=1)
network = train.DistributedDataParallel(torch.nn.Linear(1, 1))
network(torch.ones(1, 1)).sum().backward()
print('with', *names())
del network
torch.distributed.destroy_process_group()
print('without', *names())"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=240)
    alive, left = done.stdout.splitlines()
    assert "gloo" in alive and left.startswith("without") and "gloo" not in left, done.stdout + done.stderr


def test_two_nodes_follow_the_curve_of_one_process(runs):
    """As on two machines: a torchrun for each, that meet at an address."""
    meet = ["--nnodes", "2", "--nproc-per-node", "1", "--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{21_000 + os.getpid() % 20_000}"]
    nodes = [subprocess.Popen([sys.executable, "-m", "torch.distributed.run", *meet, str(HERE / "train.py"), "--steps", "20", *SMALL, "--out", "runs/nodes"],
                              cwd=runs, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    for node in nodes:
        _, err = node.communicate(timeout=120)
        assert node.returncode == 0, err
    np.testing.assert_allclose(losses(runs / "runs/nodes"), losses(runs / "runs/one"), rtol=1e-5)


@pytest.mark.parametrize("name, batch", [("train.py", 4), ("sample.py", 2)])
def test_benchmarks_end_in_a_line_of_json(tmp_path, name, batch):
    done = script(name, "--benchmark", "--model", "SiT-Ti/2", "--batch", batch, *(["--steps", 2] if name == "sample.py" else ["--grad-checkpoint"]), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    forward = models.MODELS["SiT-Ti/2"](input_size=16, in_channels=3).flops()
    assert (told["model"], told["batch"]) == ("SiT-Ti/2", batch) and told["precision"] in ("bf16", "fp32") and told["compile"] is False
    rows = [(told, 3 * forward)] if name == "train.py" else [(told["guidance"][kind], branches * 2 * forward) for kind, branches in (
        ("no guidance", 1), ("NAG", 2), ("CFG", 2), ("NAG + CFG", 3), ("NAG on half of the levels", 1.5))]
    for row, work in rows:
        assert row["flops_per_image"] == work
        assert row["flops"] == pytest.approx(row["images_per_s"] * work, rel=1e-2) and 0 < row["mfu"] < 1
        assert row["mfu"] == pytest.approx(row["flops"] / told["matmul_flops"], rel=1e-2)
    assert 0.1 < told["peak_memory_gb"] < 2 and not list(tmp_path.iterdir())


@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=slow)])
def test_ctrl_c_and_the_same_command_end_in_the_same_weights(runs, number):
    for name in ("stopped", "whole"):
        shutil.rmtree(runs / f"runs/{name}", ignore_errors=True)
    command = [sys.executable, str(HERE / "train.py"), "--steps", "400", *SMALL, "--ckpt-every", "1000", "--out", "runs/stopped"]
    run = subprocess.Popen(command, cwd=runs, env=environment(), text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    log = runs / "runs/stopped/log.jsonl"
    while run.poll() is None and not (log.exists() and log.read_text().count("\n") >= 10):
        time.sleep(0.02)
    run.send_signal(number)
    out, err = run.communicate(timeout=60)
    assert run.returncode == 128 + number and "the same command goes on" in out and "Traceback" not in err
    stopped_at = int(re.search(r"stopped at step (\d+)", out)[1])
    assert 10 <= stopped_at < 400
    end = stopped_at + 15
    for name in ("stopped", "whole"):
        done = script("train.py", "--steps", end, *SMALL, "--ckpt-every", 1000, "--out", f"runs/{name}", cwd=runs)
        assert done.returncode == 0, done.stderr
    stopped, whole = state(runs / "runs/stopped", end), state(runs / "runs/whole", end)
    for part in ("model", "ema", "opt"):
        assert_same(stopped[part], whole[part])
    assert np.array_equal(losses(runs / "runs/stopped"), losses(runs / "runs/whole"))


def test_vp_and_a_folder_of_images_train_with_worker_processes(photos):
    done = script("train.py", "--data", photos, "--model", "DiT-Ti/2", "--image-size", 16, "--batch", 4, "--epochs", 2, "--workers", 2,
                  "--out", "out", cwd=photos.parent)
    assert done.returncode == 0, done.stderr
    assert len(losses(photos.parent / "out")) == 3 and state(photos.parent / "out", 3)["settings"]["classes"] == ["ants", "birds"]
    done = script("sample.py", "--ckpt", "out", "--num", 2, "--steps", 3, "--w-nag", 2, "--cfg-scale", 1.5, "--classes", "birds",
                  "--cfg-channels", 1, "--out", "two.npz", cwd=photos.parent)
    assert done.returncode == 0, done.stderr
    assert np.load(photos.parent / "two.npz")["arr_1"].tolist() == [1, 1]


def samples(folder, *args, ranks=1):
    out = f"samples{''.join(map(str, args))}-{ranks}.npz"
    done = script("sample.py", "--ckpt", "runs/one", "--num-samples", 70, "--steps", 6, "--w-nag", 1, "--precision", "fp32", "--out", out, *args, cwd=folder,
                  ranks=ranks)
    assert done.returncode == 0, done.stderr
    with np.load(folder / out) as file:
        assert set(file) == {"arr_0", "arr_1"} and file["arr_0"].shape == (70, 8, 8, 3) and file["arr_0"].dtype == np.uint8
        return file["arr_0"].astype(int), file["arr_1"]


@pytest.mark.parametrize("ranks", [3, pytest.param(2, marks=slow)])
def test_samples_depend_on_seed_and_index_alone(runs, ranks):
    images, labels = samples(runs, "--batch", 64)
    for other, other_labels in (samples(runs, "--batch", 1), samples(runs, "--batch", 7), samples(runs, "--batch", 16, ranks=ranks)):
        difference = abs(images - other)
        assert difference.max() <= 1 and (difference > 0).mean() <= 1e-3 and np.array_equal(labels, other_labels)
    assert (abs(images - samples(runs, "--batch", 64, "--seed", 1)[0]) > 0).mean() > 0.5
    assert abs(images[0] - images[1]).max() > 0


def test_an_interrupted_npz_is_finished_by_the_same_command(runs):
    """What a kill leaves behind: OUT.partial with some samples marked as done, which are not drawn again."""
    images, labels = samples(runs, "--batch", 32)
    command = ["--ckpt", "runs/one", "--num", 70, "--steps", 6, "--w-nag", 1, "--precision", "fp32", "--batch", 10, "--out", "cut.npz"]
    full = script("sample.py", *command, cwd=runs, preexec_fn=limit_file_size)           # fails while it joins the parts
    assert full.returncode == 2 and "Traceback" not in full.stderr and "sample.py: cut.npz: File too large" in full.stderr
    work = runs / "cut.npz.partial"
    assert work.is_dir() and not (runs / "cut.npz").exists()
    done = np.load(work / "arr_1.npy", mmap_mode="r+")
    pixels = np.load(work / "arr_0.npy", mmap_mode="r+")
    done[15:] = -1
    pixels[:10], pixels[10:] = 7, 0                               # finished batches are kept as they are, the rest is drawn
    done.flush(), pixels.flush()
    assert script("sample.py", *command, cwd=runs).returncode == 0
    with np.load(runs / "cut.npz") as file:
        assert (file["arr_0"][:10] == 7).all() and abs(file["arr_0"][10:].astype(int) - images[10:]).max() <= 1
        assert np.array_equal(file["arr_1"], labels) and not work.exists()


def limit_file_size():
    """No file may grow beyond 14.2 kB: enough for the 13.6 kB of arr_0.npy, too little for the whole .npz."""
    import resource
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (14_200, 14_200))


def test_a_grid_shows_the_same_seeds_with_and_without_guidance(runs):
    done = script("sample.py", "--ckpt", "runs/one", "--num", 6, "--steps", 3, "--w-nag", 3, "--out", "grid.png", cwd=runs)
    assert done.returncode == 0 and "NAG 3 on 0.1-0.6" in done.stdout, done.stderr
    plain = script("sample.py", "--ckpt", "runs/one", "--num", 6, "--steps", 3, "--out", "plain.png", cwd=runs)
    assert plain.returncode == 0
    both, one = np.asarray(Image.open(runs / "grid.png")), np.asarray(Image.open(runs / "plain.png"))
    assert both.shape[1] == 2 * one.shape[1] and np.array_equal(both[:, :one.shape[1]], one)


# ---------------------------------------------------------------------------------------------------------------------
# Published weights, latents, fine-tuning


@pytest.fixture(scope="module")
def studio(tmp_path_factory):
    """A folder with photos of all kinds, a VAE of random weights, and a DiT-S/2 of random weights as if published."""
    folder = tmp_path_factory.mktemp("studio")
    kinds = [("RGB", "png", (80, 100)), ("L", "png", (64, 64)), ("P", "png", (130, 70)), ("RGBA", "png", (90, 90)),
             ("RGB", "jpg", (200, 150)), ("CMYK", "jpg", (100, 80)), ("L", "jpg", (70, 66)), ("RGB", "jpg", (66, 90))]
    for i, (mode, suffix, size) in enumerate(kinds * 3):
        file = folder / f"photos/{'cdb'[i // 8]}/{i}.{suffix}"
        file.parent.mkdir(parents=True, exist_ok=True)
        pixels = Image.fromarray(train.Shapes(96).images([i])[0][0].transpose(1, 2, 0)).resize(size).convert(mode)
        exif = Image.Exif()
        exif[0x0112] = 6 if i % 8 == 7 else 1                     # the last kind is to be turned
        pixels.save(file, exif=exif)
    torch.save({key: value.half() for key, value in old_names(vae_with().state_dict()).items()}, folder / "vae.bin")
    torch.manual_seed(1)
    model = models.MODELS["DiT-S/2"](input_size=8, in_channels=4, num_classes=1000)
    for p in model.parameters():
        if not p.abs().max():
            torch.nn.init.normal_(p, std=0.02)
    torch.save({key: value for key, value in model.state_dict().items() if "null" not in key}, folder / "published.pt")
    return folder


LATENT = "--data photos --image-size 32 --vae vae.bin --precision fp32 --batch 4 --workers 1".split()


def cache(folder):
    return [np.load(folder / name) for name in ("moments.npy", "labels.npy")]


def test_latents_are_the_posteriors_of_both_flips_whoever_encodes_them_and_however_often(studio):
    """One rank, killed in the middle, and the same command again; two ranks; and the VAE, asked image by image."""
    command = [*LATENT, "--model", "SiT-Ti/2", "--steps", 1, "--ckpt-every", 9]
    run = subprocess.Popen([sys.executable, str(HERE / "train.py"), *map(str, command), "--latents", "killed", "--out", "runs/killed"], cwd=studio,
                           env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    labels = studio / "killed/labels.npy"
    while run.poll() is None and not (labels.exists() and labels.stat().st_size == 128 + 24 * 8 and (np.load(labels)[:16] >= 0).all()):
        time.sleep(0.01)
    run.kill()
    run.wait()
    half = cache(studio / "killed")
    assert (half[1][:16] >= 0).all() and (half[1][16:] == -1).all() and not json.loads((studio / "killed/latents.json").read_text())["finished"]
    half[0][0] += 1                                               # finished work is kept as it is
    np.save(studio / "killed/moments.npy", half[0])
    refused = script("train.py", "--latents", "killed", "--out", "runs/none", cwd=studio)
    assert refused.returncode == 2 and "no finished latents in killed" in refused.stderr
    done = script("train.py", *command, "--latents", "killed", "--out", "runs/killed", cwd=studio)
    assert done.returncode == 0 and "0.00 GB" in done.stdout, done.stderr
    done = script("train.py", *command, "--latents", "shared", "--out", "runs/shared", cwd=studio, ranks=2)
    assert done.returncode == 0, done.stderr
    (moments, found), (mended, _) = cache(studio / "shared"), cache(studio / "killed")
    assert np.array_equal(mended[1:], moments[1:]) and np.array_equal(mended[0], moments[0] + 1)
    assert found.tolist() == [0] * 8 + [1] * 8 + [2] * 8 and moments.shape == (24, 2, 8, 4, 4)
    data, vae = train.ImageFolder(studio / "photos", 32), models.load_vae(studio / "vae.bin")
    for flip in (0, 1):
        image = train.to_float(torch.from_numpy(data.images([7, 18], [flip, flip])[0]))
        alone = torch.cat(vae.encode(image), 1)
        torch.testing.assert_close(torch.from_numpy(moments[[7, 18], flip]).float(), alone, rtol=2e-3, atol=1e-4)
    assert abs(moments[:, 0] - moments[:, 1]).max() > 0.01


def test_training_draws_from_the_posteriors(studio):
    """Mean + deviation × noise of the global batch, of the flip that was drawn; images left out are never asked for."""
    folder, rng = studio / "posteriors", np.random.default_rng(0)
    moments, labels = abs(rng.normal(size=(6, 2, 8, 4, 4))).astype(np.float16), np.array([0, 1, -2, 1, 0, 1])
    write_latents(folder, moments, labels)
    data = train.Latents(folder)
    s = dict(seed=0, batch=5, interpolant="linear", class_drop=0.0, noise_drop=0.0, in_channels=4, input_size=4, num_classes=2)
    batches = train.Batches(data, s)
    x0, y, t, eps, _ = batches[3]
    numbers = data.index[batches.indices(3)]
    assert sorted(numbers) == [0, 1, 3, 4, 5] and y.tolist() == labels[numbers].tolist()
    stream = train.generator(0, "batch", 3)
    flip, *_ = (stream.random(5) for _ in range(4))
    drawn, noise = (stream.standard_normal((5, 4, 4, 4), np.float32) for _ in range(2))
    assert torch.equal(eps, torch.from_numpy(drawn))
    chosen = moments[numbers, (flip < 0.5).astype(int)].astype(np.float32)
    np.testing.assert_allclose(x0.numpy(), chosen[:, :4] + chosen[:, 4:] * noise, rtol=1e-6, atol=1e-6)
    part = data.part([4, 0])
    assert part.labels.tolist() == [1, 0] and len(part) == 2 and part.index.tolist() == [5, 0]


def write_latents(folder, moments, labels, **changes):
    folder.mkdir(exist_ok=True)
    np.save(folder / "moments.npy", moments), np.save(folder / "labels.npy", labels)
    note = {"data": "photos", "image_size": 8 * moments.shape[-1], "images": len(labels), "names": "n", "classes": ["a", "b"], "vae": None,
            "weights": "w", "finished": True}
    (folder / "latents.json").write_text(json.dumps({**note, **changes}))


def test_an_unreadable_image_keeps_what_is_done_and_may_be_skipped(studio):
    shutil.copytree(studio / "photos", studio / "torn")
    (studio / "torn/d/12.jpg").write_bytes((studio / "torn/d/12.jpg").read_bytes()[:300])
    command = [*LATENT, "--data", "torn", "--model", "SiT-Ti/2", "--steps", 1, "--ckpt-every", 9, "--latents", "torn-latents", "--out", "runs/torn"]
    done = script("train.py", *command, cwd=studio)
    assert done.returncode == 2 and "torn/d/12.jpg" in done.stderr.splitlines()[-1] and "--skip-bad" in done.stderr
    assert "Traceback" not in done.stderr and not (studio / "runs/torn").exists()
    assert np.flatnonzero(cache(studio / "torn-latents")[1] == -1).tolist() == [18]      # 8 of b, 8 of c, and d/10, d/11
    done = script("train.py", *command, "--skip-bad", cwd=studio)
    assert done.returncode == 0 and "1 unreadable images are left out" in done.stdout, done.stderr
    assert (studio / "torn-latents/skipped.txt").read_text() == "torn/d/12.jpg\n"
    assert np.flatnonzero(cache(studio / "torn-latents")[1] < 0).tolist() == [18]
    assert state(studio / "runs/torn", 1)["settings"]["images"] == 23


def refused(capsys, monkeypatch, folder, name, *args):
    """Run a script's main() here, in its folder; the last line of its error, of exit status 2."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", [name, *map(str, args)])
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    with pytest.raises(SystemExit) as status:
        train.one_line_errors(SCRIPTS[name].main)
    for number, handler in handlers.items():
        signal.signal(number, handler)
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert status.value.code == 2 and line.startswith(name)
    return line


def test_the_whole_chain_from_photos_and_published_weights_to_the_metrics(studio, capsys, monkeypatch):
    """Encode, fine-tune the "published" DiT-S/2 for NAG, sample with NAG + CFG + domain guidance, decode, evaluate; measure the shift."""
    def ok(name, *args):
        done = script(name, *args, cwd=studio)
        assert done.returncode == 0, done.stderr
        return done.stdout
    out = ok("train.py", *LATENT, "--image-size", 64, "--init", "published.pt", "--model", "DiT-S/2", "--steps", 2, "--latents", "chain", "--out", "runs/chain")
    assert "the label table starts anew" in out
    tuned, before = state(studio / "runs/chain", 2), models.load_file(studio / "published.pt")
    assert tuned["settings"]["init"] == "published.pt" and tuned["settings"]["classes"] == ["b", "c", "d"] and tuned["settings"]["lr"] == 1e-4
    assert tuned["model"]["y_embedder.embedding_table.weight"].shape == (4, 384)
    moved = max((tuned["model"][key] - value).abs().max().item() for key, value in before.items() if "y_embedder" not in key)
    assert 0 < moved < 5e-4                                       # two steps of AdamW at 1e-4, from the published weights
    guide = ["--guide", "published.pt", "--guide-model", "DiT-S/2", "--guide-scale", 1.5, "--guide-unconditional"]
    for name, more in (("plain", []), ("guided", ["--w-nag", 2, "--cfg-scale", 1.5, *guide])):
        ok("sample.py", "--ckpt", "runs/chain", "--num", 8, "--steps", 3, "--balanced", "--precision", "fp32", *more, "--out", f"{name}.npz")
    with np.load(studio / "plain.npz") as plain, np.load(studio / "guided.npz") as guided:
        assert guided["arr_0"].shape == (8, 64, 64, 3) and guided["arr_1"].tolist() == [0, 1, 2, 0, 1, 2, 0, 1]
        assert abs(plain["arr_0"].astype(int) - guided["arr_0"]).max() > 3
    ok("sample.py", "--ckpt", "runs/chain", "--num", 2, "--steps", 2, "--guide", "runs/chain", "--guide-scale", 1.5, "--out", "auto.png")     # autoguidance
    assert "FD-random" in ok("fid.py", "guided.npz", "photos", "--crop", 64, "--features", "random")
    ok("estimator.py", "train", "--latents", "chain", "--interpolant", "vp", "--steps", 3, "--batch", 4)
    ok("estimator.py", "measure", "--ckpt", "runs/chain", "--num", 4, "--steps", 4, "--levels", 2, "--w-nag", 0, 1, "--precision", "fp32")
    assert (studio / "runs/chain/shift/shift.json").exists()
    (studio / "others").mkdir()
    Image.new("RGB", (8, 8)).save(studio / "others/1.png")
    for args, word in ((["sample.py", "--ckpt", "published.pt"], "give --model"),
                       (["sample.py", "--ckpt", "published.pt", "--model", "DiT-S/2", "--w-nag", 3], "--init published.pt --model DiT-S/2 --data DIR"),
                       (["sample.py", "--ckpt", "runs/chain", *guide[:-1]], "give --guide-unconditional"),
                       (["sample.py", "--ckpt", "runs/chain", "--guide", "published.pt"], "--guide-scale"),
                       (["sample.py", "--ckpt", "runs/chain", "--guide-scale", 2], "--guide"),
                       (["sample.py", "--ckpt", "runs/chain", "--vae", "published.pt"], "published.pt does not fit"),
                       (["sample.py", "--ckpt", "runs/chain", "--model", "DiT-B/2"], "holds a DiT-S/2, not a DiT-B/2"),
                       (["train.py", *LATENT, "--image-size", 128, "--init", "published.pt", "--model", "DiT-S/2", "--out", "x"], "--image-size 64"),
                       (["train.py", *LATENT, "--image-size", 60, "--out", "x"], "not a multiple of 8"),
                       (["train.py", "--latents", "chain", "--data", "others", "--out", "x"], "other images, of photos"),
                       (["train.py", "--latents", "chain", "--image-size", 40, "--out", "x"], "latents of 64×64"),
                       (["train.py", "--latents", "nowhere", "--out", "x"], "no finished latents in nowhere"),
                       (["train.py", "--vae", "vae.bin", "--out", "x"], "shapes are trained in pixels"),
                       (["train.py", "--init", "runs/one", "--out", "runs/chain", "--latents", "chain"], "started with --init published.pt")):
        assert word in refused(capsys, monkeypatch, studio, *args), args
    assert "no finished latents in nowhere" in refused(capsys, monkeypatch, studio, "estimator.py", "train", "--latents", "nowhere")
    line = refused(capsys, monkeypatch, studio, "train.py", *LATENT, "--image-size", 128, "--init", "published.pt", "--model", "DiT-S/2", "--out", "x")
    assert "is a model of 64×64 images in latents, not of 128×128 images in latents" in line
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    line = refused(capsys, monkeypatch, studio, "train.py", *LATENT, "--image-size", 128, "--latents", "narrow", "--out", "x")
    assert "narrow needs 0.00 GB more" in line and not (studio / "x").exists()
    def offline(url, *args, **options):
        raise OSError("no route")
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", offline)
    line = refused(capsys, monkeypatch, studio, "train.py", *LATENT, "--image-size", 512, "--init", "DiT-XL/2", "--out", "x")
    assert models.PUBLISHED["DiT-XL/2-512"][1] in line and "give it, with --model DiT-XL/2" in line and not (studio / "x").exists()


def test_fine_tuning_keeps_what_it_should(runs, capsys, monkeypatch):
    """--train-only null changes the null embedding alone; other classes get a new label table; the same command goes on."""
    checkpoint = state(runs / "runs/one", 20)
    checkpoint["settings"]["classes"] = [f"other {name}" for name in checkpoint["settings"]["classes"]]
    torch.save(checkpoint, runs / "others.pt")
    common = ["--batch", 8, "--precision", "fp32", "--workers", 0, "--ckpt-every", 3]
    for steps in (3, 6):
        done = script("train.py", *common, "--init", "runs/one", "--train-only", "null", "--steps", steps, "--out", "runs/null", cwd=runs)
        assert done.returncode == 0, done.stderr
    before, after = checkpoint["ema"], state(runs / "runs/null", 6)
    changed = [key for key in before if not torch.equal(before[key], after["model"][key])]
    assert changed == ["t_embedder.null_embedding"] and after["settings"]["noise_drop"] == 1
    assert len(after["opt"]["state"]) == 1
    done = script("train.py", *common, "--init", "others.pt", "--steps", 1, "--out", "runs/others", cwd=runs)
    assert done.returncode == 0 and "the label table starts anew" in done.stdout, done.stderr
    for args, word in (([], "give one with --init"), (["--noise-drop", 0.1, "--init", "runs/one"], "leave out --noise-drop")):
        assert word in refused(capsys, monkeypatch, runs, "train.py", *common, *args, "--train-only", "null", "--out", "x")


@slow
def test_the_loader_gives_twenty_thousand_latents_a_second_and_its_memory_stays(tmp_path):
    """A sparse cache of 20 GB, 610,000 images: one thread reads in random order, and a run stays under 2 GB beside its model."""
    N = 610_000
    folder = tmp_path / "big"
    write_latents(folder, np.zeros((1, 2, 8, 32, 32), np.float16), np.zeros(N, np.int64), images=N)
    np.lib.format.open_memmap(folder / "moments.npy", "w+", np.float16, (N, 2, 8, 32, 32))
    assert (folder / "moments.npy").stat().st_size > 19.9e9
    code = f"""
import sys, threading, time; sys.path.insert(0, {str(HERE)!r})
import numpy as np, torch, train
torch.set_num_threads(1)
data, rng = train.Latents("big"), np.random.default_rng(0)
noise = rng.standard_normal((256, 4, 32, 32), np.float32)
near = rng.integers(0, 20_000, (80, 256))                         # 640 MB, which stay in the page cache
for rows in near:
    data.moments[rows, 0].sum()
start = time.perf_counter()
for rows in near:
    torch.from_numpy(data.moments[data.index[rows], 0]).float()
reading, start = 80 * 256 / (time.perf_counter() - start), time.perf_counter()
for rows in near:
    data.images(rows, np.zeros(256), noise)
print('rate', reading, 80 * 256 / (time.perf_counter() - start))
peak = []
def watch():
    while True:
        lines = dict(line.split(':') for line in open('/proc/self/status').read().splitlines())
        peak.append(sum(int(lines[name].split()[0]) for name in ('RssAnon', 'RssShmem')) // 1024)
        time.sleep(0.05)
threading.Thread(target=watch, daemon=True).start()
sys.argv = ['train.py', '--latents', 'big', '--model', 'SiT-S/8', '--steps', '30', '--batch', '128']
train.main()
print('peak', max(peak))"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    print(done.stdout)
    reading, drawing = map(float, re.search(r"rate (\S+) (\S+)", done.stdout).groups())
    model = 16 * 33                                               # weights, average and two moments, in MB
    assert reading > 20_000 and int(re.search(r"peak (\d+)", done.stdout)[1]) < 2000 + model, done.stderr


# ---------------------------------------------------------------------------------------------------------------------
# Nothing is lost: kills, locks, damaged files, diverging runs, full disks


def start(name, *args, cwd, **options):
    return subprocess.Popen([sys.executable, str(HERE / name), *map(str, args)], cwd=cwd, env=environment(), text=True,
                            **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options})


def until(run, happened, seconds=60):
    """Wait until something happened, or the process ended; whether it is still running."""
    end = time.monotonic() + seconds
    while run.poll() is None and not happened() and time.monotonic() < end:
        time.sleep(0.002)
    return run.poll() is None


def test_a_second_process_is_refused_and_a_killed_one_leaves_no_lock(runs):
    command = ["--steps", 4000, *SMALL, "--ckpt-every", 5, "--out", "runs/locked"]
    first = start("train.py", *command, cwd=runs)
    assert until(first, lambda: len(train.checkpoints(runs / "runs/locked")) > 0)
    second = script("train.py", *command, cwd=runs)
    assert second.returncode == 2 and "train.py: another process is writing runs/locked" in second.stderr
    shown = script("sample.py", "--ckpt", "runs/locked", "--num", 1, "--steps", 2, "--out", "shown.png", cwd=runs)
    assert shown.returncode == 0, shown.stderr                    # a running run can be sampled
    first.kill()
    first.communicate()
    step = int(train.checkpoints(runs / "runs/locked")[-1].stem)
    after = script("train.py", *command, "--steps", step + 1, cwd=runs)
    assert after.returncode == 0, after.stderr


def killed_and_continued(folder, kills, steps, rng, every=7):
    """Train with SIGKILLs at random moments, every other one aimed into the writing of a checkpoint; its last state is an unbroken run's."""
    command = ["--model", "SiT-Ti/2", *SMALL, "--ckpt-every", every, "--keep", 2, "--out", "runs/killed"]
    done = 0
    for k in range(kills):
        run = start("train.py", "--steps", 10**6, *command, cwd=folder)
        log = folder / "runs/killed/log.jsonl"
        before = log.stat().st_size if log.exists() else 0
        writing = lambda: any((folder / "runs/killed/checkpoints").glob(".*.tmp"))
        until(run, lambda: log.exists() and log.stat().st_size > max(before, 1))
        if k % 2:
            until(run, writing)
        else:
            time.sleep(rng.random() * 1.5)
        run.kill()
        _, err = run.communicate()
        assert run.returncode == -signal.SIGKILL and "Traceback" not in err, err
        found = train.checkpoints(folder / "runs/killed")
        assert not found or len(found) <= 3                       # --keep, and one that was not yet removed
        done = int(found[-1].stem) if found else 0
    end = done + steps
    assert script("train.py", "--steps", end, *command, cwd=folder).returncode == 0
    assert script("train.py", "--steps", end, *command[:-1], "runs/unbroken", cwd=folder).returncode == 0
    for part in ("model", "ema", "opt"):
        assert_same(state(folder / "runs/killed", end)[part], state(folder / "runs/unbroken", end)[part])
    assert np.array_equal(losses(folder / "runs/killed"), losses(folder / "runs/unbroken")) and len(losses(folder / "runs/killed")) == end
    assert not list((folder / "runs/killed").rglob(".*.tmp")) and len(train.checkpoints(folder / "runs/killed")) == 2


def test_a_run_killed_now_and_then_ends_as_an_unbroken_one(tmp_path):
    killed_and_continued(tmp_path, 2, 3, np.random.default_rng(0))


@slow
def test_a_run_killed_thirty_times_ends_as_an_unbroken_one(tmp_path):
    killed_and_continued(tmp_path, 30, 20, np.random.default_rng(1))


@pytest.mark.parametrize("kills", [2, pytest.param(10, marks=slow)])
def test_sampling_that_is_killed_gives_the_same_file(runs, kills):
    num = max(160, 48 * kills)                                    # a start draws a batch of 16 or two before it is killed
    command = ["--ckpt", "runs/one", "--num", num, "--steps", 10 * kills, "--precision", "fp32", "--batch", 16, "--w-nag", 1]
    rng, work, name = np.random.default_rng(0), runs / f"kill{kills}.npz.partial/arr_1.npy", f"kill{kills}.npz"
    count = lambda: (np.fromfile(work, np.int64)[-num:] >= 0).sum() if work.with_name("settings.json").exists() else 0
    for _ in range(kills):
        before = count()
        run = start("sample.py", *command, "--out", name, cwd=runs)
        assert until(run, lambda: count() > before)
        time.sleep(rng.random() * 0.2)
        run.kill()
        run.communicate()
        assert run.returncode == -signal.SIGKILL
    assert 16 * kills <= count() < num
    for out in (name, "whole.npz"):
        assert script("sample.py", *command, "--out", out, cwd=runs).returncode == 0
    assert (runs / name).read_bytes() == (runs / "whole.npz").read_bytes()


@slow
def test_encoding_that_is_killed_ten_times_gives_the_same_cache(studio):
    command = [*LATENT, "--image-size", 32, "--model", "SiT-S/2", "--steps", 1, "--ckpt-every", 9]
    shutil.copytree(studio / "photos", studio / "many/first")
    for i in range(8):
        shutil.copytree(studio / "photos", studio / f"many/copy{i}")
    command[command.index("photos")] = "many"
    rng, labels = np.random.default_rng(0), studio / "broken-off/labels.npy"
    count = lambda: (np.fromfile(labels, np.int64)[-216:] >= 0).sum() if labels.exists() else 0
    for k in range(10):
        before = count()
        run = start("train.py", *command, "--latents", "broken-off", "--out", "runs/broken-off", cwd=studio)
        assert until(run, lambda: count() > before)
        time.sleep(rng.random() * 0.1)
        run.kill()
        run.communicate()
    for name in ("broken-off", "unbroken"):
        done = script("train.py", *command, "--latents", name, "--out", f"runs/{name}", cwd=studio)
        assert done.returncode == 0, done.stderr
    for a, b in zip(cache(studio / "broken-off"), cache(studio / "unbroken")):
        assert np.array_equal(a, b)


@slow
def test_a_rank_that_dies_takes_the_run_back_to_its_last_checkpoint(tmp_path):
    command = ["--steps", 60, *SMALL, "--ckpt-every", 10]
    port = str(22_000 + os.getpid() % 20_000)
    run = subprocess.Popen([sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--max-restarts", "3", "--master-port", port,
                            str(HERE / "train.py"), *map(str, command), "--out", "died"], cwd=tmp_path, env=environment(),
                           stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    assert until(run, lambda: len(train.checkpoints(tmp_path / "died")) > 1)
    children = Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()
    os.kill(int(children[-1]), signal.SIGKILL)
    _, err = run.communicate(timeout=200)
    assert run.returncode == 0, err
    done = script("train.py", *command, "--out", "lived", cwd=tmp_path, ranks=2)
    assert done.returncode == 0, done.stderr
    for part in ("model", "ema", "opt"):
        assert_same(state(tmp_path / "died", 60)[part], state(tmp_path / "lived", 60)[part])
    assert np.array_equal(losses(tmp_path / "died"), losses(tmp_path / "lived"))


def test_a_damaged_newest_checkpoint_is_reported_and_the_one_before_it_used(runs):
    shutil.copytree(runs / "runs/one", runs / "runs/flipped")
    newest = runs / "runs/flipped/checkpoints/0000020.pt"
    data = bytearray(newest.read_bytes())
    data[len(data) // 2] ^= 1                                     # one bit of a weight
    newest.write_bytes(data)
    done = script("train.py", "--steps", 20, *SMALL, "--ckpt-every", 10, "--out", "runs/flipped", cwd=runs)
    assert done.returncode == 0 and "0000020.pt is damaged" in done.stdout and "going on from runs/flipped/checkpoints/0000010.pt" in done.stdout, done.stderr
    for part in ("model", "ema", "opt"):
        assert_same(state(runs / "runs/flipped", 20)[part], state(runs / "runs/one", 20)[part])
    assert newest.with_suffix(".pt.damaged").read_bytes() == data and np.array_equal(losses(runs / "runs/flipped"), losses(runs / "runs/one"))


def test_a_step_that_is_not_finite_changes_nothing():
    """Against the same steps without it; the moments and their count stay, too."""
    s = dict(batch=4, precision="fp32", interpolant="linear", lr=1e-2, warmup=0, ema=0.99, micro_batch=2, compile=False)
    rng, ends = torch.Generator().manual_seed(0), []
    batches = [[torch.randn(4, 3, 8, 8, generator=rng), torch.arange(4), torch.rand(4, generator=rng), torch.randn(4, 3, 8, 8, generator=rng),
                torch.zeros(4, dtype=torch.bool)] for _ in range(4)]
    broken = [part.clone() for part in batches[1]]
    broken[0][3, 0, 0, 0] = math.nan
    for bad in (None, broken):
        trainer = train.Trainer(tiny().requires_grad_(True), s.copy(), torch.device("cpu"))
        for number, batch in ((1, batches[0]), (2, bad), (3, batches[2]), (4, batches[3])):
            if batch:
                loss, skipped = trainer.step(batch, number).tolist()
                assert skipped == (batch is broken) and math.isfinite(loss) == (batch is not broken)
        ends.append((trainer.model.state_dict(), trainer.ema.state_dict(), trainer.optimizer.state_dict()))
    assert_same(*ends)
    assert all(value["step"] == 3 for value in ends[1][2]["state"].values())


def test_a_run_that_diverges_stops_and_keeps_its_last_good_checkpoint(runs):
    shutil.copytree(runs / "runs/one", runs / "runs/diverged")
    checkpoint = state(runs / "runs/diverged", 20)
    for group in checkpoint["opt"]["param_groups"]:
        group["lr"] = 1e30
    checkpoint["settings"] |= {"warmup": 0, "lr": 1e30}
    with train.replacing(runs / "runs/diverged/checkpoints/0000020.pt") as file:         # the old one is still mapped
        torch.save(checkpoint, file)
    done = script("train.py", "--steps", 200, "--ckpt-every", 7, "--out", "runs/diverged", cwd=runs)
    line = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 2 and line.startswith("train.py: ten steps in a row up to ") and "Traceback" not in done.stderr
    last = train.checkpoints(runs / "runs/diverged")[-1]
    assert str(last.relative_to(runs)) in line
    assert all(value.isfinite().all() for value in models.load_file(last)["model"].values())
    log = [json.loads(text) for text in (runs / "runs/diverged/log.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in log] == list(range(1, len(log) + 1))
    assert all(entry.get("skipped") and entry["loss"] is None for entry in log[-10:]) and len(log) < 60


def test_a_run_whose_folder_vanishes_says_so(tmp_path):
    run = start("train.py", "--steps", 4000, *SMALL, "--ckpt-every", 30, "--out", "gone", cwd=tmp_path)
    assert until(run, lambda: len(train.checkpoints(tmp_path / "gone")) > 0)
    (tmp_path / "gone").rename(tmp_path / "elsewhere")
    _, err = run.communicate(timeout=60)
    line = err.strip().splitlines()[-1]
    assert run.returncode == 2 and line.startswith("train.py: gone") and "Traceback" not in err, err
    assert not (tmp_path / "gone").exists() and len(losses(tmp_path / "elsewhere")) >= 30


def test_a_killed_process_that_prepares_batches_is_told_in_one_line(photos):
    run = start("train.py", "--data", "photos", "--model", "SiT-Ti/2", "--image-size", 8, "--batch", 2, "--steps", 10**6, "--workers", 2, "--out", "run",
                cwd=photos.parent)
    log = photos.parent / "run/log.jsonl"
    assert until(run, lambda: log.exists() and log.stat().st_size)
    workers = Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()
    os.kill(int(workers[-1]), signal.SIGKILL)
    _, err = run.communicate(timeout=60)
    line = err.strip().splitlines()[-1]
    assert run.returncode == 2 and line.startswith("train.py: a process that prepares batches was killed") and "Traceback" not in err, err


def test_what_the_system_refuses_is_one_line_that_says_so(runs, capsys, monkeypatch):
    assert "/proc/run" in refused(capsys, monkeypatch, runs, "train.py", *SMALL, "--steps", 1, "--out", "/proc/run")
    (runs / "file").touch()
    assert "file/run" in refused(capsys, monkeypatch, runs, "train.py", *SMALL, "--steps", 1, "--out", "file/run")
    def closed():
        raise BrokenPipeError(32, "Broken pipe")                  # as in: python fid.py … | head -1
    with pytest.raises(SystemExit):
        train.one_line_errors(closed)
    line = capsys.readouterr().err
    assert "Broken pipe" in line and "prepares batches" not in line


def test_a_class_name_that_leads_elsewhere_does_not(runs):
    """In the file name of a picture, where --classes takes a class by its number from a checkpoint of unknown origin."""
    shutil.copytree(runs / "runs/one", runs / "runs/odd")
    checkpoint = state(runs / "runs/odd", 20)
    checkpoint["settings"]["classes"] = ["x/../../../../escaped", "new\nline", "\udcff", "Ünï", *checkpoint["settings"]["classes"][4:]]
    with train.replacing(runs / "runs/odd/checkpoints/0000020.pt") as file:
        torch.save(checkpoint, file)
    before = set(runs.rglob("*.png"))
    for number in range(4):
        done = script("sample.py", "--ckpt", "runs/odd", "--num", 1, "--steps", 2, "--classes", number, cwd=runs)
        assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    made = set(runs.rglob("*.png")) - before
    assert len(made) == 4 and all(path.parent == runs / "runs/odd/samples" for path in made)


def test_links_that_lead_round_in_circles_are_not_followed(photos):
    (photos / "birds/up").symlink_to(photos)
    (photos / "birds/self").symlink_to(photos / "birds/self")
    assert len(train.ImageFolder(photos, 16)) == 6
    (photos / "birds/self.png").symlink_to(photos / "birds/self.png")
    with pytest.raises(train.UnreadableImage, match="self.png"):
        train.read_image(str(photos / "birds/self.png"))


def test_a_png_of_sixty_thousand_squared_is_refused_before_it_takes_memory(tmp_path):
    part = lambda kind, data: struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    (tmp_path / "bomb.png").write_bytes(b"\x89PNG\r\n\x1a\n" + part(b"IHDR", header) + part(b"IDAT", zlib.compress(bytes(1000))) + part(b"IEND", b""))
    before = train.peak_memory(torch.device("cpu"))
    with pytest.raises(train.UnreadableImage, match="bomb.png.*3600000000"):
        train.read_image(str(tmp_path / "bomb.png"))
    assert train.peak_memory(torch.device("cpu")) < before + 0.1


@slow
def test_twenty_thousand_steps_leave_memory_and_files_as_they_were(tmp_path):
    command = ["--image-size", 4, "--batch", 1, "--precision", "fp32", "--workers", 0, "--ckpt-every", 500, "--keep", 2, "--steps", 20_000, "--out", "soak"]
    run = start("train.py", *command, cwd=tmp_path, stderr=subprocess.DEVNULL)
    log, seen = tmp_path / "soak/log.jsonl", []
    while run.poll() is None:                                     # memory in MB, open files, files of the run beside its pictures
        try:
            step = log.read_bytes().count(b"\n") if log.exists() else 0
            memory = int(re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{run.pid}/status").read_text())[1]) / 1024
            files = [path for path in (tmp_path / "soak").rglob("*") if path.is_file() and path.suffix not in (".png", ".tmp")]
            seen.append((step, memory, len(os.listdir(f"/proc/{run.pid}/fd")), len(files)))
        except (OSError, TypeError):
            pass                                                  # it has just ended
        time.sleep(0.2)
    assert run.wait() == 0 and len(losses(tmp_path / "soak")) == 20_000
    early, late = ([row[1:] for row in seen if low < row[0] <= high] for low, high in ((2000, 5000), (17_000, 20_000)))
    print("memory in MB, open files, files:", np.median(early, 0), np.median(late, 0), "most:", np.max(early, 0), np.max(late, 0))
    assert np.median(late, 0)[0] < np.median(early, 0)[0] + 10 and np.max(late, 0)[1] <= np.max(early, 0)[1] and np.max(late, 0)[2] <= 5


@pytest.mark.parametrize("what", ["checkpoint", "latents"])
def test_a_full_disk_names_the_file_and_spares_the_others(runs, studio, what):
    """No file may grow beyond what the last checkpoint took but for a little, or beyond one byte less than the moments need."""
    folder, limit = (runs, 1_000_000) if what == "checkpoint" else (studio, 10_000)
    def small():
        import resource
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    if what == "checkpoint":
        shutil.copytree(runs / "runs/one", runs / "runs/full")
        done = script("train.py", "--steps", 40, *SMALL, "--ckpt-every", 10, "--out", "runs/full", cwd=folder, preexec_fn=small)
        word = "runs/full/checkpoints/0000030.pt"
        assert state(runs / "runs/full", 20)["step"] == 20 and not list((runs / "runs/full").rglob(".*.tmp"))
    else:
        done = script("train.py", *LATENT, "--model", "SiT-S/2", "--steps", 1, "--latents", "full", "--out", "runs/full", cwd=folder, preexec_fn=small)
        word = "full/moments.npy"
    assert done.returncode == 2 and word in done.stderr.strip().splitlines()[-1] and "Traceback" not in done.stderr, done.stderr


class Trap:
    """Unpickled, it makes a file."""

    def __reduce__(self):
        return os.mkdir, ("TRAPPED",)


def damage(data, others, rng):
    """A good file's bytes, spoilt in one of seven ways."""
    data, way = bytearray(data), rng.integers(7)
    if way == 0:                                                  # flipped bits, anywhere
        for at in rng.integers(0, len(data), rng.integers(1, 20)):
            data[at] ^= 1 << rng.integers(8)
    elif way == 1:                                                # flipped bits where headers and directories are
        for at in rng.integers(0, min(len(data), 400), rng.integers(1, 8)):
            data[at if rng.random() < 0.5 else -1 - at] ^= 1 << rng.integers(8)
    elif way == 2:
        del data[rng.integers(0, len(data)):]
    elif way == 3:                                                # another file's beginning
        other = others[rng.integers(len(others))][:rng.integers(1, 300)]
        data[:len(other)] = other
    elif way == 4:                                                # a hole
        at = rng.integers(0, len(data))
        data[at:at + 500] = bytes(min(500, len(data) - at))
    elif way == 5:
        data += rng.bytes(rng.integers(1, 1000))
    else:
        file = io.BytesIO()
        [lambda: pickle.dump(Trap(), file), lambda: torch.save({"ema": Trap(), "settings": {}}, file), lambda: np.savez(file, arr_0=np.array([Trap()], object)),
         lambda: np.savez(file, arr_0=rng.random((3, 8, 8, 3))), lambda: np.savez(file, arr_0=np.zeros((2, 2), np.int8), mu=np.zeros((3, 3)))][rng.integers(5)]()
        data = file.getvalue()
    return bytes(data)


def fuzz(count, seed):
    """Give `count` spoilt files to the scripts, each in a forked process, in a folder with good ones; print what went wrong."""
    rng, wrong, ends = np.random.default_rng(seed), [], {}
    good = {path: path.read_bytes() for path in map(Path, ("good.pt", "reader.pt", "good.npz", "stats.npz", "good.png", "good.jpg", "latents/latents.json",
                                                             "latents/labels.npy", "latents/moments.npy"))}
    others = list(good.values())
    fid_of = lambda a, b: ("fid.py", f"{a} {b} --features random --metrics fid")
    for case in range(count):
        path = list(good)[case % len(good)]
        shutil.rmtree("case", ignore_errors=True)
        if path.parent.name == "latents":
            shutil.copytree("latents", "case")
            spoilt, (name, args) = Path("case", path.name), ("train.py", "--latents case --model SiT-Ti/2 --steps 1 --batch 2 --precision fp32 --workers 0 --out case/run")
        elif path.suffix in (".png", ".jpg"):
            shutil.copytree("photos", "case")
            spoilt, (name, args) = Path("case", path.name), fid_of("case", "stats.npz")
        elif path.name == "good.pt" and case % 2:
            spoilt, (name, args) = Path("case/checkpoints/0000020.pt"), ("train.py", "--out case --steps 21")
        else:
            spoilt = Path("case", path.name)
            name, args = {"good.pt": ("sample.py", f"--ckpt {spoilt} --num 1 --steps 2 --precision fp32 --out case/o.png"),
                          "reader.pt": ("sample.py", f"--ckpt good.pt --estimator {spoilt} --w-nag-classifier 1 --num 1 --steps 2 --precision fp32 --out case/o.png"),
                          "good.npz": fid_of(spoilt, "stats.npz"), "stats.npz": fid_of("good.npz", spoilt)}[path.name]
        spoilt.parent.mkdir(parents=True, exist_ok=True)
        spoilt.write_bytes(damage(good[path], others, rng))
        if not (child := os.fork()):
            status = 1
            signal.alarm(20)
            output = os.open("output", os.O_RDWR | os.O_CREAT | os.O_TRUNC)
            os.dup2(output, 1), os.dup2(output, 2)
            try:
                sys.argv = [name, *args.split()]
                train.one_line_errors(SCRIPTS[name].main)
                status = 0
            except SystemExit as end:
                status = end.code or 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush(), sys.stderr.flush()
                os._exit(status)
        _, status, usage = os.wait4(child, 0)
        code, said = os.waitstatus_to_exitcode(status), Path("output").read_text(errors="replace")
        last = (said.strip().splitlines() or [""])[-1].split("\r")[-1]
        fine = code == 0 or code == 2 and last.startswith(f"{name}: ")
        if not fine or "Traceback" in said or usage.ru_maxrss > 2e6 or Path("TRAPPED").exists():
            wrong.append((case, name, str(spoilt), code, usage.ru_maxrss, said[-1500:]))
            shutil.copytree("case", f"wrong/{case}", dirs_exist_ok=True)
        ends[code] = ends.get(code, 0) + 1
    print(json.dumps({"ends": ends, "wrong": wrong}))


@pytest.mark.parametrize("count", [18, pytest.param(1000, marks=slow)])
def test_damaged_files_end_in_one_line_or_in_success(runs, count):
    folder = runs / f"fuzz{count}"
    (folder / "photos").mkdir(parents=True)
    shutil.copy(runs / "runs/one/checkpoints/0000020.pt", folder / "good.pt")
    with train.replacing(folder / "reader.pt") as file:
        torch.save({"estimator": models.NoiseEstimator(8, 3).state_dict(), "step": 9,
                    "settings": dict(interpolant="linear", input_size=8, in_channels=3, data="shapes", image_size=8, seed=0)}, file)
    rng = np.random.default_rng(0)
    np.savez(folder / "good.npz", arr_0=rng.integers(0, 256, (6, 8, 8, 3), np.uint8), arr_1=np.zeros(6, np.int64))
    np.savez(folder / "stats.npz", mu=np.zeros(512), sigma=np.eye(512), network="random", size=np.array([8, 8]))
    for name in ("good.png", "good.jpg", "photos/0.png", "photos/1.png"):
        Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8)).save(folder / name)
    write_latents(folder / "latents", abs(rng.normal(size=(6, 2, 8, 4, 4))).astype(np.float16), np.arange(6) % 2)
    done = subprocess.run([sys.executable, "-c", f"import test_nag; test_nag.fuzz({count}, 0)"], cwd=folder, env=environment(), text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    assert not told["wrong"], "\n".join(map(str, told["wrong"][:5]))
    assert told["ends"]["0"] > count / 20 and told["ends"]["2"] > count / 3, told["ends"]
    print(told["ends"])


# ---------------------------------------------------------------------------------------------------------------------
# estimator.py: what it makes of readings


def test_shift_interval_is_that_of_a_difference_of_means_and_covers_it():
    """Oracle: the normal interval of a difference of two means, ±1.96 √(s²/n + r²/m); paired, of the mean difference."""
    rng, path = np.random.default_rng(0), diffusion.Linear()
    real = {0.4: estimator.Reading(0.4, 0.41 + 0.02 * rng.standard_normal(4000), 0.01, 0.0, 0.68, 1.0)}
    plain = 0.43 + 0.03 * rng.standard_normal((1000, 1))
    less = plain - 0.005 + 0.002 * rng.standard_normal((1000, 1))
    table = estimator.shifts(path, real, [("none", [0.4], plain), ("NAG", [0.4], less)])
    row, guided = table[0]["levels"][0], table[1]["levels"][0]
    error = 1.96 * math.sqrt(plain.var() / 1000 + real[0.4].estimates.var() / 4000)
    assert row["shift"] == pytest.approx(plain.mean() - real[0.4].estimates.mean(), abs=1e-12)
    np.testing.assert_allclose(np.array(row["interval"]) - row["shift"], (-error, error), rtol=0.1)
    error = 1.96 * (plain - less).std() / math.sqrt(1000)
    assert guided["less_than_first"] == pytest.approx((plain - less).mean(), abs=1e-12)
    np.testing.assert_allclose(np.array(guided["less_interval"]) - guided["less_than_first"], (-error, error), rtol=0.15)
    assert diffusion.noise_shift(path, 0.4, row["sigma_e"]).item() == pytest.approx(row["shift"])
    assert estimator.shifts(path, real, [("none", [0.4], plain - 0.1)])[0]["levels"][0]["sigma_e"] is None         # towards less noise


@pytest.mark.parametrize("name, path", [("ddpm", "vp"), ("sde", "vp"), ("ode", "vp"), ("sde", "linear"), ("ode", "linear")])
def test_states_are_read_where_the_sampler_keeps_them(name, path):
    """A reader that returns the state itself sees the walk that the sampler's own rule makes, written out here for the ODE."""
    settings = dict(interpolant=path, in_channels=1, input_size=2, image_size=2, num_classes=1)
    args = SimpleNamespace(sampler=name, steps=12, seed=0, precision="fp32", w_nag=0.0, cfg_scale=1.0, nag_interval=(0, 1), cfg_interval=(0, 1),
                           cfg_channels=None, w_nag_classifier=0.0, guide_scale=1.0, guide_interval=(0, 1), guide_unconditional=False,
                           balanced=False, compile=False)
    def model(x, t, y, drop_noise=None):
        return x * (1 + t.view(-1, 1, 1, 1) / 1000)
    sampler = sample.Sampler(model, settings, args, [0], torch.device("cpu"))
    levels = estimator.nearest(estimator.visited(sampler), 5)
    assert len(levels) == 5 and all(abs(t - (i + 1) / 6) < 0.06 for i, t in enumerate(levels))
    class Reader:
        def __call__(self, x):
            return SimpleNamespace(mean=lambda: x.flatten(1)[:, 0])
    seen, images, labels = estimator.observe(Reader(), sampler, 7, 3, levels)
    assert seen.shape == (7, 5) and images.shape == (7, 1, 2, 2) and labels.shape == (7,)
    if name == "ode":
        grid = torch.linspace(1, 1e-3 if path == "vp" else 0, 13, dtype=torch.float64)
        v = lambda x, t: diffusion.to_velocity(sampler.path, model(x, sampler.path.network_time(t).float().expand(1), None), x, t)
        noise = train.SampleNoise(0, [4])
        noise.classes([0])
        x, walk = noise(torch.empty(1, 1, 2, 2)), {}
        for t, after in zip(grid[:-1], grid[1:]):
            walk[t.item()] = x[0, 0, 0, 0].item()
            half = v(x, t)
            x = x + (after - t) * (half + v(x + (after - t) * half, after)) / 2
        np.testing.assert_allclose(seen[4], [walk[t] for t in levels], rtol=1e-5)


@pytest.fixture(scope="module")
def readers(runs):
    """Two estimators of a few steps in the folder of `runs`."""
    for seed in (0, 1):
        done = script("estimator.py", "train", "--image-size", 8, "--steps", 60, "--batch", 32, "--seed", seed, "--out", f"reader{seed}.pt", cwd=runs)
        assert done.returncode == 0 and "68 % interval" in done.stdout, done.stderr
    return runs


def test_measure_tells_the_shift_of_every_setting(readers):
    command = ["measure", "--ckpt", "runs/one", "--estimator", "reader0.pt", "--guide-estimator", "reader1.pt", "--w-nag", 0, 2, "--w-nag-classifier", 0, 1,
               "--nag-interval", 0, 0.6, "--steps", 8, "--num-samples", 40, "--levels", 3, "--precision", "fp32"]
    for ranks in (1, 2):
        done = script("estimator.py", *command, "--keep-images", "--out", f"shift{ranks}", cwd=readers, ranks=ranks)
        assert done.returncode == 0, done.stderr
    whole, parts = (json.loads((readers / f"shift{ranks}/shift.json").read_text()) for ranks in (1, 2))
    assert [setting["name"] for setting in whole["settings"]] == [
        "no guidance", "classifier NAG 1 on 0-0.6", "NAG 2 on 0-0.6", "NAG 2 on 0-0.6, classifier NAG 1 on 0-0.6"]
    for a, b in zip(whole["settings"], parts["settings"]):
        assert len(a["levels"]) == 3
        np.testing.assert_allclose([row["shift"] for row in a["levels"]], [row["shift"] for row in b["levels"]], atol=1e-4)
    above = whole["settings"][1]["levels"][2]
    assert above["t"] > 0.6 and above["less_than_first"] == 0 and above["less_interval"] == [0, 0]       # outside the interval
    assert all(row["less_than_first"] != 0 for row in (setting["levels"][0] for setting in whole["settings"][1:]))
    assert Image.open(readers / "shift1/shift.png").size == (1200, 640) and "classifier NAG 1" in done.stdout
    assert "less than the first" in done.stdout and not list(readers.glob("shift1/.*"))
    near_data = [np.mean([row["shift"] for row in setting["levels"] if row["t"] < 0.5]) for setting in whole["settings"]]
    assert [setting["near_data"] for setting in whole["settings"]] == pytest.approx(near_data) and "  NAG 2 on 0-0.6" in done.stdout

    # --keep-images: those that sample.py draws, in the order of their numbers from any number of ranks
    done = script("sample.py", "--ckpt", "runs/one", "--num", 65, "--steps", 8, "--w-nag", 2, "--nag-interval", 0, 0.6, "--precision", "fp32",
                  "--out", "kept.npz", cwd=readers)
    assert done.returncode == 0, done.stderr
    with np.load(readers / "kept.npz") as file:
        images, labels = file["arr_0"][:40].astype(int), file["arr_1"][:40]
    for ranks in (1, 2):
        with np.load(readers / f"shift{ranks}/NAG-2-on-0-0.6-sde-8-steps.npz") as kept:
            assert kept["shift"] == pytest.approx(near_data[2], abs=1e-4) and np.array_equal(kept["arr_1"], labels) and abs(kept["arr_0"] - images).max() <= 1 and (kept["arr_0"] != images).mean() < 1e-3


def test_sampling_with_the_estimator_as_guide(readers):
    plain = ["--ckpt", "runs/one", "--num", 65, "--steps", 4, "--precision", "fp32"]
    for name, options in (("plain", []), ("neutral", ["--w-nag-classifier", 0, "--estimator", "reader0.pt"]),
                          ("guided", ["--w-nag-classifier", 2, "--estimator", "reader0.pt", "--cfg-scale", 1.5])):
        done = script("sample.py", *plain, *options, "--out", f"by-{name}.npz", cwd=readers)
        assert done.returncode == 0, done.stderr
    load = lambda name: np.load(readers / f"by-{name}.npz")["arr_0"].astype(int)
    assert np.array_equal(load("plain"), load("neutral")) and abs(load("plain") - load("guided")).max() > 3


def test_an_estimator_that_was_killed_ends_in_the_same_weights(tmp_path):
    command = ["train", "--image-size", 4, "--batch", 4, "--steps", 260, "--interpolant", "vp"]
    run = subprocess.Popen([sys.executable, str(HERE / "estimator.py"), *map(str, command), "--out", "killed.pt"], cwd=tmp_path, env=environment(),
                           stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while run.poll() is None and not (tmp_path / "killed.pt").exists():
        time.sleep(0.02)
    run.kill()
    run.wait()
    assert models.load_file(tmp_path / "killed.pt")["step"] == 200
    for name in ("killed", "whole"):
        done = script("estimator.py", *command, "--out", f"{name}.pt", cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    assert_same(models.load_file(tmp_path / "killed.pt"), models.load_file(tmp_path / "whole.pt"))
    assert "is finished" in script("estimator.py", *command, "--out", "whole.pt", cwd=tmp_path).stdout


def test_a_tenth_of_a_folder_is_held_out(photos):
    data = train.ImageFolder(photos, 16)
    part, numbers = estimator.split(data, seed=3)
    assert len(part) == 5 and len(numbers) == 1 and {data.files[numbers[0]], *part.files} == set(data.files)
    assert estimator.held_out(data, 16, 3, 10).shape == (1, 3, 16, 16)
    assert all(data.labels[data.files.index(file)] == label for file, label in zip(part.files, part.labels))


# ---------------------------------------------------------------------------------------------------------------------
# What a user does wrong ends in one line that names it


ERRORS = [  # script, arguments, what the line must name
    ("train.py", "--model DiT-XXL/2", "DiT-XXL/2"),
    ("train.py", "--steps 0", "'0'"),
    ("train.py", "--noise-drop 1.5", "1.5"),
    ("train.py", "--lr nan", "nan"),
    ("train.py", "--steps 5 --epochs 2", "--epochs"),
    ("train.py", "--epochs 2 --out new", "epochs"),
    ("train.py", "--data nowhere --out new", "nowhere"),
    ("train.py", "--data empty --out new", "empty"),
    ("train.py", "--data mixed --out new", "loose.png"),
    ("train.py", "--data broken --batch 2 --out new", "broken/a/bad.png"),
    ("train.py", "--image-size 7 --out new", "7×7"),
    ("train.py", "--lr 0.5 --out runs/one", "--lr"),
    ("train.py", "--model DiT-Ti/2 --out runs/one", "SiT-Ti/2"),
    ("train.py", "--out runs/damaged", "runs/damaged/checkpoints/0000005.pt"),
    ("train.py", "--out file.txt/run", "file.txt"),
    ("sample.py", "--ckpt nowhere.pt", "nowhere.pt"),
    ("sample.py", "--ckpt file.txt", "file.txt"),
    ("sample.py", "--ckpt tensor.pt", "tensor.pt"),
    ("sample.py", "--ckpt other.pt", "other.pt"),
    ("sample.py", "--ckpt empty", "empty/checkpoints"),
    ("sample.py", "--ckpt runs/one --sampler ddpm", "ddpm"),
    ("sample.py", "--ckpt runs/one --classes circle dog", "'dog'"),
    ("sample.py", "--ckpt runs/one --nag-interval 0.5 0.1", "--nag-interval"),
    ("sample.py", "--ckpt runs/one --nag-interval 0.5 1.1", "1.1"),
    ("sample.py", "--ckpt runs/one --cfg-channels 4", "--cfg-channels"),
    ("sample.py", "--ckpt runs/one --num 0", "'0'"),
    ("sample.py", "--ckpt runs/one --out grid.gif", "grid.gif"),
    ("sample.py", "--ckpt runs/one --out file.txt/grid.png --num 1 --steps 1", "file.txt"),
    ("sample.py", "--ckpt runs/plain --w-nag 3", "--noise-drop"),
    ("sample.py", "--what", "--what"),
    ("sample.py", "--ckpt runs/one --w-nag-classifier 1", "--estimator"),
    ("sample.py", "--ckpt runs/one --w-nag-classifier 1 --estimator nowhere.pt", "nowhere.pt; train one for it with: python estimator.py train --data shapes --image-size 8 --interpolant linear"),
    ("sample.py", "--ckpt runs/one --estimator good.pt", "--w-nag-classifier"),
    ("sample.py", "--ckpt runs/one --w-nag-classifier 1 --estimator runs/one/checkpoints/0000020.pt", "0000020.pt is no noise estimator"),
    ("sample.py", "--ckpt runs/one --w-nag-classifier 1 --estimator vp.pt", "interpolant vp"),
    ("sample.py", "--ckpt runs/one --w-nag-classifier 1 --estimator size.pt", "image size 4"),
    ("sample.py", "--ckpt runs/one --w-nag-classifier 1 --estimator grey.pt", "channel count 1"),
    ("sample.py", "--ckpt vp.pt", "vp.pt"),
    ("estimator.py", "", "train | measure"),
    ("estimator.py", "train --jitter 3", "'3'"),
    ("estimator.py", "train --data nowhere", "nowhere"),
    ("estimator.py", "train --out empty", "empty"),
    ("estimator.py", "train --out vp.pt --steps 7", "--interpolant"),
    ("estimator.py", "train --out tensor.pt", "tensor.pt"),
    ("estimator.py", "train --data broken --out new.pt --batch 2", "broken/a/bad.png"),
    ("estimator.py", "measure --ckpt runs/one", "runs/estimator-shapes-linear.pt"),
    ("estimator.py", "measure --ckpt runs/one --estimator vp.pt", "interpolant vp"),
    ("estimator.py", "measure --ckpt runs/one --estimator good.pt --w-nag 0 x", "'x'"),
    ("estimator.py", "measure --ckpt runs/one --estimator good.pt --num 1", "'1'"),
    ("estimator.py", "measure --ckpt runs/one --estimator good.pt --w-nag-classifier 1", "--guide-estimator"),
    ("estimator.py", "measure --ckpt runs/one --estimator good.pt --sampler sde ddpm", "ddpm"),
    ("estimator.py", "measure --ckpt runs/one --estimator good.pt --steps 1", "steps"),
    ("estimator.py", "measure --ckpt runs/one --estimator good.pt --out file.txt", "file.txt"),
    ("estimator.py", "measure --ckpt runs/one --estimator good.pt --num 2 --steps 3 --w-nag 1e38 --cfg-scale 1e38", "not finite"),
    ("estimator.py", "measure --ckpt runs/one --estimator photos.pt", "photos.pt is an estimator for the data photos"),
    ("fid.py", "shapes shapes --device tpu", "tpu"),
    ("fid.py", "shapes shapes --features inception --weights nowhere.pth", "nowhere.pth"),
    ("fid.py", "shapes shapes --features inception --weights other.pt", "other.pt"),
    ("fid.py", "shapes shapes --metrics sfid", "nothing to compare"),
    ("fid.py", "shapes shapes --save-stats stats.txt", "stats.txt"),
    ("fid.py", "shapes shapes --num 1", "'1'"),
    ("fid.py", "shapes", "REFERENCE"),
]


@pytest.mark.parametrize("name, args, word", ERRORS, ids=[f"{n} {a}" for n, a, _ in ERRORS])
def test_a_users_error_is_one_line_and_status_2(runs, name, args, word, capsys, monkeypatch):
    monkeypatch.chdir(runs)
    (runs / "empty").mkdir(exist_ok=True)
    (runs / "mixed/a").mkdir(parents=True, exist_ok=True)
    (runs / "mixed/loose.png").touch()
    (runs / "broken/a").mkdir(parents=True, exist_ok=True)
    (runs / "broken/a/bad.png").write_bytes(b"\x89PNG no image")
    (runs / "file.txt").write_text("hello")
    torch.save(torch.zeros(3), runs / "tensor.pt")
    torch.save({"state_dict": {}}, runs / "other.pt")
    (runs / "runs/damaged/checkpoints").mkdir(parents=True, exist_ok=True)
    good = (runs / "runs/one/checkpoints/0000020.pt").read_bytes()
    (runs / "runs/damaged/checkpoints/0000005.pt").write_bytes(good[:len(good) // 2])
    if not (runs / "runs/plain").exists():
        checkpoint = state(runs / "runs/one", 20)
        checkpoint["settings"]["noise_drop"] = 0.0
        with train.replacing(runs / "runs/plain/checkpoints/0000020.pt") as file:
            torch.save(checkpoint, file)
    (runs / "broken/a/worse.png").write_bytes(b"\x89PNG no image")
    for file, interpolant, size, channels, data in (("good", "linear", 8, 3, "shapes"), ("vp", "vp", 8, 3, "shapes"), ("size", "linear", 4, 3, "shapes"),
                                                    ("grey", "linear", 8, 1, "shapes"), ("photos", "linear", 8, 3, "photos")):
        torch.save({"estimator": models.NoiseEstimator(size, channels).state_dict(), "step": 9,
                    "settings": dict(interpolant=interpolant, input_size=size, in_channels=channels, data=data, image_size=size, seed=0)}, runs / f"{file}.pt")
    assert word in refused(capsys, monkeypatch, runs, name, *args.split())
    assert not (runs / "new/checkpoints").exists()


def test_a_batch_that_the_ranks_do_not_divide_is_refused(tmp_path):
    done = script("train.py", *SMALL, "--batch", 3, "--steps", 1, cwd=tmp_path, ranks=2)
    assert done.returncode and [line for line in done.stderr.splitlines() if line.startswith("train.py: a batch of 3 cannot be shared by 2 ranks")]
    assert 'exitcode  : 2' in done.stderr


# ---------------------------------------------------------------------------------------------------------------------
# Memory


def test_gradient_checkpoints_let_more_images_through_at_once(monkeypatch):
    """Of DiT-B/2 in 8 GB beside its weights: at least twice as many, and still fewer than the batch."""
    monkeypatch.setattr(train, "free_memory", lambda device: 8e9)
    with torch.device("meta"):
        model = models.MODELS["DiT-B/2"]()
    fitting = {}
    for model.grad_checkpoint in (False, True):
        fitting[model.grad_checkpoint] = train.fitting_micro_batch(model, torch.device("cuda"), 4096, "bf16")
    assert 1 < 2 * fitting[False] <= fitting[True] < 4096


@slow
def test_training_the_tiny_model_stays_under_1500_megabytes(tmp_path):
    code = (f"import sys; sys.argv = ['train.py', '--model', 'DiT-Ti/2', '--steps', '4']; sys.path.insert(0, {str(HERE)!r})\n"
            "import train; train.main(); print('peak', round(1000 * train.peak_memory(train.torch.device('cpu'))))")
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert int(re.search(r"peak (\d+)", done.stdout)[1]) < 1500, done.stderr


def test_fifty_thousand_images_are_never_all_in_memory(tmp_path):
    """The 154 MB of images pass through: memory grows by less than a third of them."""
    code = f"""
import sys, resource; sys.path.insert(0, {str(HERE)!r})
import torch, sample
from pathlib import Path
from types import SimpleNamespace
class Stub:
    settings = dict(image_size=32)
    args, evaluations = SimpleNamespace(num=50_000, batch=500), 1
    bar = sample.Sampler.bar
    def __call__(self, indices, bar):
        bar.update(len(indices))
        return torch.randint(0, 256, (len(indices), 3, 32, 32), dtype=torch.uint8), torch.full((len(indices),), 3)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
sample.write_npz(Stub(), Path("many.npz"), {{}})
print('grown', (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert int(re.search(r"grown (\d+)", done.stdout)[1]) < 50, done.stderr
    with np.load(tmp_path / "many.npz") as file:
        assert file["arr_0"].shape == (50_000, 32, 32, 3) and (file["arr_1"] == 3).all()


# ---------------------------------------------------------------------------------------------------------------------
# fid.py


@pytest.mark.parametrize("height, width, size", [(7, 12, 9), (16, 16, 299), (40, 33, 20)])
def test_resizing_is_the_rule_of_tensorflow_1(height, width, size):
    """Oracle: output (i, j) from its four neighbours, one pixel at a time."""
    x = np.random.default_rng(0).random((height, width))
    want = np.empty((size, size))
    for i, j in itertools.product(range(size), range(size)):
        a, b = i * height / size, j * width / size
        i0, j0 = int(a), int(b)
        i1, j1 = min(i0 + 1, height - 1), min(j0 + 1, width - 1)
        want[i, j] = ((1 - a + i0) * ((1 - b + j0) * x[i0, j0] + (b - j0) * x[i0, j1]) + (a - i0) * ((1 - b + j0) * x[i1, j0] + (b - j0) * x[i1, j1]))
    got = fid.resize_tf1(torch.from_numpy(x)[None, None].float(), size)[0, 0]
    np.testing.assert_allclose(got, want, atol=2e-5)


def inception(seed=0):
    """The Inception network with random weights that keep the scale."""
    torch.manual_seed(seed)
    net = fid.InceptionV3().eval().requires_grad_(False)
    for name, value in net.state_dict().items():
        if value.ndim > 1:
            torch.nn.init.kaiming_normal_(value)
        elif "running_mean" in name or name.endswith("bias"):
            torch.nn.init.normal_(value, std=0.1)
    return net


def test_inception_logits_have_no_bias_and_its_spatial_features_are_seven_channels():
    images, net = torch.randint(0, 256, (2, 3, 50, 70), dtype=torch.uint8), inception()
    plain = net(images)
    assert tuple(part.shape[1] for part in plain) == fid.InceptionV3.widths == (2048, 2023, 1008)
    torch.testing.assert_close(plain[2], plain[0] @ net.fc.weight.T)                     # no bias
    torch.nn.init.zeros_(net.Mixed_6d.branch1x1.conv.weight[7:])                         # nothing but the first 7 channels counts
    torch.testing.assert_close(net(images)[1], plain[1])


def rotated_blocks(dims, seed):
    """Two covariances that do not commute, of 2×2 blocks in a common random basis, and tr √(Σ_a Σ_b) from the blocks'

    closed form: tr √M = √(tr M + 2 √det M) for a 2×2 matrix with positive eigenvalues.
    """
    rng = np.random.default_rng(seed)
    basis, _ = np.linalg.qr(rng.standard_normal((dims, dims)))
    a, b, trace = np.zeros((dims, dims)), np.zeros((dims, dims)), 0.0
    for i in range(0, dims, 2):
        blocks = [m @ m.T for m in rng.standard_normal((2, 2, 2))]
        a[i:i + 2, i:i + 2], b[i:i + 2, i:i + 2] = blocks
        product = blocks[0] @ blocks[1]
        trace += math.sqrt(np.trace(product) + 2 * math.sqrt(np.linalg.det(product)))
    return basis @ a @ basis.T, basis @ b @ basis.T, trace


def test_frechet_distance_of_gaussians_is_its_closed_form():
    rng = np.random.default_rng(0)
    mu1, mu2 = rng.standard_normal((2, 60))
    basis, _ = np.linalg.qr(rng.standard_normal((60, 60)))
    for l1, l2 in (rng.random((2, 60)), np.concatenate([rng.random((2, 20)), np.zeros((2, 40))], 1)):      # commuting; of rank 20
        got = fid.frechet_distance(mu1, basis * l1 @ basis.T, mu2, basis * l2 @ basis.T)
        assert got == pytest.approx(((mu1 - mu2)**2).sum() + ((l1**0.5 - l2**0.5)**2).sum(), rel=1e-6)
    a, b, trace = rotated_blocks(60, 1)
    assert np.abs(a @ b - b @ a).max() > 0.1
    assert fid.frechet_distance(mu1, a, mu2, b) == pytest.approx(((mu1 - mu2)**2).sum() + np.trace(a + b) - 2 * trace, rel=1e-6)
    with pytest.raises(ValueError, match="do not fit"):
        fid.frechet_distance(mu1, a, mu2[:3], b)
    with pytest.raises(ValueError, match="not finite"):
        fid.frechet_distance(mu1, a * np.nan, mu2, b)


@pytest.mark.parametrize("n, dims", [(500, 2048), (3000, 64)])
def test_frechet_distance_of_features_moved_and_scaled(n, dims):
    """Of X and c X + m it is |mean shift|² + (1 − c)² tr Σ, with fewer features than dimensions too; of X and X nothing."""
    x = torch.randn(n, dims, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    y = 0.7 * x + 0.3
    sigma = torch.cov(x.T)
    want = (x.mean(0) - y.mean(0)).square().sum().item() + 0.09 * sigma.trace().item()
    a, b = fid.Moments.of_features(x), fid.Moments.of_features(y)
    assert a.distance(b) == pytest.approx(want, rel=1e-6) and abs(a.distance(a)) < 1e-6
    if n < dims:
        assert a.factor.shape == (dims, n)                        # no covariance of 2048² was made
    assert fid.frechet_distance(x.mean(0), sigma, y.mean(0), torch.cov(y.T)) == pytest.approx(want, rel=1e-6)


def test_frechet_distance_is_real_where_the_root_of_the_product_is_not():
    x, y = np.random.default_rng(0).standard_normal((2, 40, 128))                        # 40 features of 128 dimensions
    a, b = np.cov(x.T), np.cov(y.T)
    root = scipy.linalg.sqrtm(a @ b)
    assert np.iscomplexobj(root) or not np.isfinite(root).all()
    want = ((x.mean(0) - y.mean(0))**2).sum() + np.trace(a + b) - 2 * np.linalg.svd((x - x.mean(0)) @ (y - y.mean(0)).T / 39, compute_uv=False).sum()
    assert fid.frechet_distance(x.mean(0), a, y.mean(0), b) == pytest.approx(want, rel=1e-6)


def test_inception_score_of_constant_and_of_certain_predictions():
    assert fid.inception_score(torch.zeros(6000, 1008)) == pytest.approx(1)
    assert fid.inception_score(torch.randn(1, 1008).expand(300, -1)) == pytest.approx(1)
    assert fid.inception_score(1e4 * torch.eye(1008).repeat(2, 1), split=1008) == pytest.approx(1008)
    half = 1e4 * torch.eye(1008)[torch.arange(5000 + 10) % 2]
    half[5000:] = half[0]
    assert fid.inception_score(half) == pytest.approx((2 + 1) / 2)                       # the mean of two splits


def test_precision_and_recall_by_construction():
    rng = torch.Generator().manual_seed(0)
    cloud = lambda n, at: torch.randn(n, 16, generator=rng) * 0.01 + at
    real = torch.cat([cloud(300, 0.0), cloud(100, 5.0)])
    fake = torch.cat([cloud(100, 5.0), cloud(100, -7.0)])
    precision, recall = fid.precision_recall(real, torch.cat([real[300:], cloud(100, -7.0)]))
    assert precision == 0.5 and recall == 0.25
    assert fid.precision_recall(real, real) == (1.0, 1.0) and fid.precision_recall(real, cloud(50, 40.0)) == (0.0, 0.0)
    from scipy.spatial import cKDTree
    trees = [cKDTree(a.numpy()) for a in (real, fake)]
    radii = [tree.query(tree.data, 4)[0][:, 3] for tree in trees]
    covered = lambda points, tree, reach: np.mean([(np.linalg.norm(tree.data - p, axis=1) <= reach).any() for p in points.numpy()])
    precision, recall = fid.precision_recall(real, fake)
    assert abs(precision - covered(fake, trees[0], radii[0])) < 0.01 and abs(recall - covered(real, trees[1], radii[1])) < 0.01
    with pytest.raises(ValueError, match="more than 3"):
        fid.precision_recall(real, fake[:3])


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    """Two sets of shapes as .npz, one of them as a folder too, and a checkpoint of Inception with random weights."""
    folder = tmp_path_factory.mktemp("sets")
    for name, start in (("a", 0), ("b", 5000)):
        images = train.Shapes(16, 0).images(range(start, start + 700))[0].transpose(0, 2, 3, 1)
        np.savez(folder / f"{name}.npz", arr_0=images, arr_1=np.zeros(700, int))
    with np.load(folder / "a.npz") as file:
        images = file["arr_0"]
    np.savez_compressed(folder / "darker.npz", arr_0=images // 2)
    for i, image in enumerate(images):
        (folder / f"a/{i % 3}").mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(folder / f"a/{i % 3}/{i:04}.png")
    torch.save(inception().state_dict(), folder / "inception.pth")
    return folder


def compared(folder, *args, ranks=1):
    done = script("fid.py", *args, "--json", "out.json", cwd=folder, ranks=ranks)
    assert done.returncode == 0, done.stderr
    return json.loads((folder / "out.json").read_text()), done


def test_the_drawn_shapes_are_compared_by_random_features(sets):
    same, done = compared(sets, "a.npz", "shapes")
    assert "FD-random" in done.stdout and "FID" not in done.stdout and same["features"] == "random" and same["num_reference"] == 10_000
    dark, _ = compared(sets, "darker.npz", "b.npz")
    assert same["fid"] < 0.1 * dark["fid"] and same["precision"] > 0.8 > 0.4 > dark["precision"]
    folder, done = compared(sets, "a", "a.npz")
    assert abs(folder["fid"]) < 1e-6 and folder["precision"] == folder["recall"] == 1
    assert "warning" not in done.stderr


def test_several_sets_make_a_table_with_mean_and_deviation_over_seeds(sets):
    """Oracle: each set compared alone."""
    files = {}
    for seed in (0, 1):
        for weight, name in ((0, "no-guidance"), (0.5, "NAG-0.5-on-0-1"), (2, "NAG-2-on-0-1")):
            files[seed, name] = f"seed{seed}/{name}.npz"
            (sets / f"seed{seed}").mkdir(exist_ok=True)
            with np.load(sets / ("a.npz", "b.npz")[seed]) as file:
                np.savez(sets / files[seed, name], arr_0=(file["arr_0"] * (1 - weight / 8)).astype(np.uint8))
    together, done = compared(sets, *files.values(), "shapes", "--num", 600, "--plot", "curves.png")
    assert [row["samples"] for row in together] == list(files.values())
    for row, name in list(zip(together, files.values()))[-2:]:
        alone, _ = compared(sets, name, "shapes", "--num", 600)
        assert all(row[metric] == pytest.approx(alone[metric], rel=1e-5) for metric in ("fid", "precision", "recall"))
    for name, rows in (("no-guidance", together[::3]), ("NAG-2-on-0-1", together[2::3])):
        a, b = (row["recall"] for row in rows)
        line = next(line for line in done.stdout.splitlines() if name in line)
        assert line.startswith(f"| {name} | 2 |") and line.endswith(f"| {(a + b) / 2:.3f} ± {abs(a - b) / math.sqrt(2):.3f} |")
    assert Image.open(sets / "curves.png").size == (1000, 440)
    curve = script("fid.py", "a.npz", "shapes", "--num", 600, "--plot", "none.png", cwd=sets)
    assert curve.returncode == 2 and "nothing to draw" in curve.stderr and not (sets / "none.png").exists()
    features = np.random.default_rng(0).standard_normal((600, 512))
    np.savez(sets / "bare.npz", mu=features.mean(0), sigma=np.cov(features.T), network="random", size=[16, 16])
    _, done = compared(sets, "seed0/no-guidance.npz", "seed1/no-guidance.npz", "bare.npz", "--features", "random")
    assert "left out: precision (bare.npz holds no images and no features); recall" in done.stdout and "sFID" not in done.stdout


def test_the_curve_over_the_weight_passes_through_its_points():
    """Where they must lie in the frame at (90, 20) of 380×330, by hand; there the curve is black, and a little above it white.

    A curve with CFG begins at CFG alone; and one set may come with its shift, and another without.
    """
    row = lambda distance, **more: [{"fid": distance, "precision": 0.5, "recall": 0.5, **more}]
    beside = {"CFG-1.5-on-0-1-sde-50-steps": row(1.4), "NAG-2-on-0-1-CFG-1.5-on-0-1-sde-50-steps": row(1.4)}
    for walk, more in (("", {}), ("-sde-50-steps", beside)):
        names = {f"no-guidance{walk}": row(1.0, shift=0.1), f"NAG-1-on-0-1{walk}": row(1.5) * 2 + row(1.5, shift=0.1), f"NAG-2-on-0-1{walk}": row(1.2)}
        page = fid.figure({**names, **more}, "FD-random")
        at = lambda weight, distance: (round(90 + 380 * (weight + 0.161) / 2.322), round(20 + 330 * (1.541 - distance) / 0.582))
        for weight, distance in ((0, 1.0), (1, 1.5), (2, 1.2)):
            x, y = at(weight, distance)
            assert max(page.getpixel((x, y))) < 60 and min(page.getpixel((x, y - 12))) > 200
        assert not more or page.getpixel(at(0, 1.4)) == page.getpixel(at(2, 1.4)) == estimator.STYLES[1][0]


def test_inception_metrics_of_two_ranks_and_of_saved_statistics(sets):
    options = ["--features", "inception", "--weights", "inception.pth", "--num-samples", 8, "--batch", 3]
    whole, done = compared(sets, "a.npz", "b.npz", *options, "--save-stats", "b-stats.npz")
    assert all(math.isfinite(whole[name]) for name in fid.METRICS) and "warning: 8 images are fewer than the 2,048" in done.stderr
    parts, _ = compared(sets, "a.npz", "b.npz", *options, ranks=2)
    again, _ = compared(sets, "a.npz", "b-stats.npz", *options)
    for name in fid.METRICS:
        assert parts[name] == pytest.approx(whole[name], rel=1e-3) and again[name] == pytest.approx(whole[name], rel=1e-3)
    with np.load(sets / "b-stats.npz") as file:
        np.savez(sets / "moments.npz", **{key: file[key] for key in ("mu", "sigma")})
    moments, done = compared(sets, "a.npz", "moments.npz", *options)
    assert set(moments["left_out"]) == {"sfid", "precision", "recall"} and "left out: sFID" in done.stdout
    assert moments["fid"] == pytest.approx(whole["fid"], rel=1e-3)


def test_features_that_are_done_are_not_computed_again(tmp_path, monkeypatch):
    """The second start takes the images from where the first broke off, and ends in the same features to the bit."""
    monkeypatch.setattr(fid, "lock", lambda *args: None)
    np.savez(tmp_path / "set.npz", arr_0=np.random.default_rng(0).integers(0, 256, (50, 8, 8, 3), np.uint8))
    network, started = fid.RandomFeatures().eval(), []
    def run(place, end=99):
        source = fid.Source(str(tmp_path / "set.npz"), None, 0)
        def images(batch, start):
            started.append(start)
            for i, part in enumerate(source.stream(batch, start)):
                if start + i * batch >= end:
                    raise KeyboardInterrupt
                yield part
        source.images = images
        return fid.features(source, network, 8, torch.device("cpu"), (True, False, False), place)[0]
    (tmp_path / "work").mkdir()
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "work", end=24)
    with open(next((tmp_path / "work").iterdir()), "ab") as file:
        file.write(b"half a row")
    assert np.array_equal(run(tmp_path / "work"), run(None)) and started == [0, 24, 0]
    assert np.array_equal(run(tmp_path / "work"), run(None)) and started[3] == 48          # whole batches are kept; the last was none


@pytest.mark.parametrize("count", [4000, pytest.param(50_000, marks=slow)])
def test_images_of_256_are_read_in_a_stream(tmp_path, count):
    """Of 50,000, 9.8 GB pass a stub of the network; memory grows by less than 100 MB."""
    with zipfile.ZipFile(tmp_path / "many.npz", "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive, archive.open("arr_0.npy", "w", force_zip64=True) as file:
        np.lib.format.write_array_header_1_0(file, dict(descr="|u1", fortran_order=False, shape=(count, 256, 256, 3)))
        block = bytes(100 * 256 * 256 * 3)
        for _ in range(count // 100):
            file.write(block)
    code = f"""
import sys, resource, torch; sys.path.insert(0, {str(HERE)!r})
import fid
class Stub:
    widths = (8, 0, 0)
    def __call__(self, images):
        return images[:, :, 0, :8].float().mean(1), torch.empty(len(images), 0), torch.empty(len(images), 0)
source = fid.Source("many.npz", None, 0)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
pool = fid.features(source, Stub(), 64, "cpu")[0]
print(pool.shape, 'grown', (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=900)
    assert f"({count}, 8)" in done.stdout and int(re.search(r"grown (\d+)", done.stdout)[1]) < 100, done.stderr


@slow
def test_precision_and_recall_take_memory_for_a_block_alone(tmp_path):
    code = f"""
import sys, resource, torch; sys.path.insert(0, {str(HERE)!r})
import fid
real, fake = torch.randn(6000, 16), torch.randn(40_000, 16)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
fid.precision_recall(real, fake)
print('grown', (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=240)
    assert int(re.search(r"grown (\d+)", done.stdout)[1]) < 1500, done.stderr


BAD_SETS = {  # file: what the line must name
    "cut.npz": "cut.npz", "text.npz": "text.npz", "short.npz": "claims", "pickled.npz": "pickled objects", "floats.npz": "float64", "grey.npz": "(4, 8, 8)",
    "none.npz": "(0, 8, 8, 3)", "bare.npz": "only x", "nan.npz": "not finite", "half.npz": "sigma", "unfit.npz": "do not fit", "mixed": "9×8", "broken": "bad.png",
    "empty": "no images", "nowhere": "nowhere", "one.npz": "1 images; it needs 4", "flipped.npz": "flipped.npz",
}


@pytest.mark.parametrize("name", BAD_SETS)
def test_bad_sets_of_images_are_one_line_and_status_2(sets, name, capsys, monkeypatch):
    monkeypatch.chdir(sets)
    good, images = (sets / "a.npz").read_bytes(), np.zeros((4, 8, 8, 3), np.uint8)
    (sets / "cut.npz").write_bytes(good[:len(good) // 2])
    (sets / "text.npz").write_text("hello")
    flipped = bytearray((sets / "darker.npz").read_bytes())
    flipped[len(flipped) // 3] ^= 255                             # inside the compressed images
    (sets / "flipped.npz").write_bytes(flipped)
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, dict(descr="|u1", fortran_order=False, shape=(10**7, 256, 256, 3)))
    with zipfile.ZipFile(sets / "short.npz", "w") as archive:
        archive.writestr("arr_0.npy", header.getvalue() + bytes(100))
    np.savez(sets / "pickled.npz", arr_0=np.array([{1: 2}], dtype=object))
    for file, arrays in (("floats", dict(arr_0=images / 2)), ("grey", dict(arr_0=images[..., 0])), ("none", dict(arr_0=images[:0])), ("bare", dict(x=images)),
                         ("nan", dict(mu=np.array([np.nan]), sigma=np.eye(1))), ("half", dict(mu=np.zeros(3))), ("one", dict(arr_0=images[:1])),
                         ("unfit", dict(mu=np.zeros(3), sigma=np.eye(4)))):
        np.savez(sets / f"{file}.npz", **arrays)
    for folder in ("mixed", "broken", "empty"):
        (sets / folder).mkdir(exist_ok=True)
    Image.fromarray(images[0]).save(sets / "mixed/1.png")
    Image.fromarray(np.zeros((8, 9, 3), np.uint8)).save(sets / "mixed/2.png")
    (sets / "broken/bad.png").write_bytes(b"\x89PNG no image")
    monkeypatch.setattr(sys, "argv", ["fid.py", name, name if name == "one.npz" else "shapes", *(["--metrics", "precision"] if name == "one.npz" else [])])
    with pytest.raises(SystemExit) as status:
        train.one_line_errors(fid.main)
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert status.value.code == 2 and error.startswith("fid.py: ") and BAD_SETS[name] in error, error


# ---------------------------------------------------------------------------------------------------------------------
# The README


README = (HERE / "README.md").read_text()


def commands():
    """The lines of the README's shell blocks, without their comments."""
    blocks = re.findall(r"```sh\n(.*?)```", README, re.S)
    return [line.split("#")[0].strip() for line in "".join(blocks).splitlines() if line.split("#")[0].strip()]


def test_every_command_and_option_in_the_readme_exists(monkeypatch, capsys):
    """Each script reads its arguments, with the loops' variables filled in; and options named in the text are some script's."""
    found = 0
    for line in commands():
        line = line.replace("$seed", "0").replace("$model", "SiT").replace("$steps", "50")
        for name, args in re.findall(r"(?:python|torchrun .*?) ?(\w+\.py)([^&;|]*)", line):
            if name in SCRIPTS:
                monkeypatch.setattr(sys, "argv", [name, *shlex.split(args)])
                SCRIPTS[name].arguments()
                found += 1
    assert found > 20
    known = {"--nproc-per-node", "--nnodes", "--rdzv-backend", "--rdzv-endpoint", "--max-restarts", "--num", "--help"}          # of torchrun, some
    for name, more in (("train.py", []), ("sample.py", []), ("estimator.py", ["train"]), ("estimator.py", ["measure"]), ("fid.py", [])):
        monkeypatch.setattr(sys, "argv", [name, *more, "--help"])
        with pytest.raises(SystemExit):
            SCRIPTS[name].arguments()
        known |= set(re.findall(r"--[a-z][a-z-]*", capsys.readouterr().out))
    assert not set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", README)) - known


def test_the_code_in_the_readme_is_that_of_the_method():
    lines = {line.strip() for line in (HERE / "diffusion.py").read_text().splitlines()}
    shown = "".join(re.findall(r"```python\n(.*?)```", README, re.S)).splitlines()
    assert len(shown) >= 8 and all(line.split("  #")[0].strip() in lines for line in shown)
    for picture in re.findall(r"\]\((assets/[^)]*)\)", README):
        assert (HERE / picture).stat().st_size < 300_000


@slow
def test_the_readmes_quick_commands_run_as_written(photos):
    """Those that take less than a minute, in a folder with what the commands before them would have left; `python` is this one."""
    folder = photos.parent
    (folder / "bin").mkdir()
    (folder / "bin/python").write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    (folder / "bin/python").chmod(0o755)
    for path in HERE.glob("*.py"):
        (folder / path.name).symlink_to(path)
    for name, *args in (("train.py", "--steps", 20, "--batch", 8, "--out", "runs/shapes-SiT-Ti-2"), ("estimator.py", "train", "--steps", 20, "--out", "runs/guide.pt")):
        assert script(name, *args, cwd=folder).returncode == 0
    for name in ("samples", "a", "b", "c"):
        np.savez(folder / f"{name}.npz", arr_0=np.random.default_rng(len(name)).integers(0, 256, (600, 16, 16, 3), np.uint8))
    for path in list(photos.rglob("*.*")):
        image = Image.fromarray(train.centre_crop(train.read_image(path), 16))
        path.unlink(), image.save(path.with_suffix(".png"))
    lines = [part.strip() for line in commands() for part in line.split("&&")]
    quick = [line for line in lines if line.startswith(("python sample.py", "python fid.py samples.npz photos", "python fid.py a.npz"))]
    assert len(quick) >= 6
    for line in quick:
        begun = time.monotonic()
        done = subprocess.run(line, shell=True, cwd=folder, env={**environment(), "PATH": f"{folder}/bin:{os.environ['PATH']}"}, text=True, capture_output=True)
        print(f"{time.monotonic() - begun:4.0f} s  {line}")
        assert done.returncode == 0, (line, done.stderr)
