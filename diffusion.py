"""The mathematics, and nothing but the mathematics: interpolants, loss, guidance, samplers, noise shift.

A state of level t mixes data and noise (t = 0 is data, t = 1 is noise):

    x_t = α(t) x_0 + σ(t) ε,        score s(x|t) = ∇ log p_t(x) = −E[ε|x, t] / σ(t)

A sampler walks from t = 1 to t = 0 and gathers errors on the way, so that its state at level t really holds the noise
of some level t + δ, which the network was never told: the noise shift. Noise awareness guidance (NAG; Zhong et al., 2025,
arXiv 2510.12497) treats the level as a condition, as classifier-free guidance (CFG) treats the class, and strengthens it:

    s(x|t) + w ∇_x log p(t|x)  =  (1 + w) s(x|t) − w s(x)

where s(x), the score without the level, is approximated by the same network with its level hidden (`drop_noise`).

Levels t are floats in [0, 1] everywhere; only the network itself may count differently (`path.network_time`).
Tensors are (B, C, H, W); a level is a number, a tensor () for the whole batch, or a tensor (B,).
"""
import math

import torch


# ---------------------------------------------------------------------------------------------------------------------
# The two interpolants: how much data and how much noise a level holds


def _level(t):
    """A number as a float64 tensor (); a tensor as it is."""
    return t if torch.is_tensor(t) else torch.tensor(t, dtype=torch.float64)


class Linear:
    """α = 1 − t, σ = t: flow matching as in SiT (Ma et al., 2024). The network predicts the velocity ε − x_0."""

    prediction = "velocity"

    def alpha(self, t):
        return 1 - _level(t)

    def sigma(self, t):
        return _level(t)

    def alpha_dot(self, t):
        return -torch.ones_like(_level(t))

    def sigma_dot(self, t):
        return torch.ones_like(_level(t))

    def level(self, sigma):
        """The t in [0, 1] with σ(t) = sigma."""
        return _level(sigma)

    def network_time(self, t):
        return _level(t)

    def to(self, device):
        return self


class VP:
    """The table of DDPM (Ho et al., 2020): 1000 steps, β from 1e-4 to 0.02. The network predicts ε.

    Step k = 0..999 has level t = (k + 1)/1000 and α(t)² = ᾱ_k = Π (1 − β); in between log α is linear in t, and α(0) = 1.
    The network is given k = 1000 t − 1, rounded when within 1e-3 of a whole number, as α and σ are, so that levels in
    float32 hit the table.
    """

    prediction = "eps"
    steps = 1000

    def __init__(self):
        beta = torch.linspace(1e-4, 0.02, self.steps, dtype=torch.float64)
        self.alpha_bar = torch.cumprod(1 - beta, 0)                                     # ᾱ_0 … ᾱ_999
        self.log_alpha = torch.cat([torch.zeros(1, dtype=torch.float64), self.alpha_bar.log() / 2])     # t = 0 … 1

    def to(self, device):
        self.alpha_bar, self.log_alpha = self.alpha_bar.to(device), self.log_alpha.to(device)
        return self

    def _position(self, t):
        """1000 t in float64, on the table where it nearly is."""
        position = self.steps * t.double()
        return torch.where((position - position.round()).abs() < 1e-3, position.round(), position)

    def _log_alpha(self, t):
        table, position = self.log_alpha.to(t.device), self._position(t)
        below = position.floor().long().clamp(0, self.steps - 1)
        return torch.lerp(table[below], table[below + 1], position - below)

    def alpha(self, t):
        t = _level(t)
        return self._log_alpha(t).exp().to(t.dtype)

    def sigma(self, t):
        t = _level(t)
        return (-torch.expm1(2 * self._log_alpha(t))).sqrt().to(t.dtype)

    def _log_alpha_dot(self, t):
        """Slope of log α; at a knot of the table, where it jumps a little, the mean of both sides."""
        table, position = self.log_alpha.to(t.device), self._position(t)
        left = (position.ceil().long() - 1).clamp(0, self.steps - 1)
        right = position.floor().long().clamp(0, self.steps - 1)
        return self.steps * (table[left + 1] - table[left] + table[right + 1] - table[right]) / 2

    def alpha_dot(self, t):
        t = _level(t)
        return (self._log_alpha_dot(t) * self._log_alpha(t).exp()).to(t.dtype)

    def sigma_dot(self, t):
        """σ' = −α α' / σ, infinite at t = 0."""
        t = _level(t)
        log_alpha2 = 2 * self._log_alpha(t)
        return (-log_alpha2.exp() * self._log_alpha_dot(t) / (-torch.expm1(log_alpha2)).sqrt()).to(t.dtype)

    def level(self, sigma):
        """The t in [0, 1] with σ(t) = sigma: log α = ½ log(1 − σ²), interpolated back."""
        sigma = _level(sigma)
        log_alpha, table = torch.log1p(-sigma.double()**2) / 2, self.log_alpha.to(sigma.device)
        above = torch.searchsorted(-table, -log_alpha).clamp(1, self.steps)             # the table falls
        part = (log_alpha - table[above - 1]) / (table[above] - table[above - 1])
        return ((above - 1 + part) / self.steps).to(sigma.dtype)

    def network_time(self, t):
        t = _level(t)
        return (self._position(t) - 1).to(t.dtype)


def _like(coefficient, x):
    """A coefficient () or (B,), ready to multiply x (B, C, H, W)."""
    if coefficient.ndim == 0:
        return coefficient                                        # a scalar on the CPU multiplies tensors anywhere
    return coefficient.to(x).reshape(-1, *[1] * (x.ndim - 1))


def add_noise(path, x0, eps, t):
    """x_t = α x_0 + σ ε."""
    return _like(path.alpha(t), x0) * x0 + _like(path.sigma(t), x0) * eps


# ---------------------------------------------------------------------------------------------------------------------
# What a network predicts, and what it stands for. All of these are affine in each other at one (x, t).


def to_eps(path, prediction, x, t):
    """E[ε|x, t]. From a velocity v = α' x_0 + σ' ε and x = α x_0 + σ ε, eliminate x_0."""
    if path.prediction == "eps":
        return prediction
    alpha, sigma, alpha_dot, sigma_dot = (_like(f(t), x) for f in (path.alpha, path.sigma, path.alpha_dot, path.sigma_dot))
    return (alpha * prediction - alpha_dot * x) / (alpha * sigma_dot - alpha_dot * sigma)


def to_score(path, prediction, x, t):
    """s(x|t) = −E[ε|x, t] / σ."""
    return -to_eps(path, prediction, x, t) / _like(path.sigma(t), x)


def prediction_per_score(path, t):
    """How much the prediction moves when the score moves by 1: −σ for ε, −σ (α σ' − α' σ) / α for a velocity.

    Infinite for a velocity where α = 0.
    """
    t = _level(t)
    alpha, sigma = path.alpha(t), path.sigma(t)
    if path.prediction == "eps":
        return -sigma
    return -sigma * (alpha * path.sigma_dot(t) - path.alpha_dot(t) * sigma) / alpha


def to_x0(path, prediction, x, t):
    """E[x_0|x, t] = (x − σ ε) / α."""
    alpha, sigma = _like(path.alpha(t), x), _like(path.sigma(t), x)
    if path.prediction == "velocity":                             # the same without the division by α, which may be 0
        alpha_dot, sigma_dot = _like(path.alpha_dot(t), x), _like(path.sigma_dot(t), x)
        return (sigma_dot * x - sigma * prediction) / (alpha * sigma_dot - alpha_dot * sigma)
    return (x - sigma * prediction) / alpha


def to_velocity(path, prediction, x, t):
    """v(x, t) = E[dx_t/dt | x, t] = α' E[x_0|x, t] + σ' E[ε|x, t], the drift of the probability-flow ODE."""
    if path.prediction == "velocity":
        return prediction
    x0 = to_x0(path, prediction, x, t)
    return _like(path.alpha_dot(t), x) * x0 + _like(path.sigma_dot(t), x) * prediction


# ---------------------------------------------------------------------------------------------------------------------
# The loss


def training_loss(model, path, x0, y, t, eps, drop_noise=None):
    """Loss of each sample, (B,): squared error of the velocity, or of ε plus the bound of the learned variance.

    x0, eps (B, C, H, W); y (B,) int64; t (B,) levels in [0, 1], on VP those of the table, (k + 1)/1000.
    drop_noise (B,) bool: where the level is hidden from the network, so that it learns the null branch of NAG.
    Raises ValueError for a level outside these; on a GPU, where looking would wait for it, that sample's loss is NaN.
    """
    if path.prediction == "eps":
        position = path.steps * t.double()
        valid = ((position - position.round()).abs() < 1e-3) & (position.round() >= 1) & (position.round() <= path.steps)
    else:
        valid = (t >= 0) & (t <= 1)
    if t.device.type == "cpu" and not valid.all():
        want = "a multiple of 1/1000 from 0.001 to 1" if path.prediction == "eps" else "in [0, 1]"
        raise ValueError(f"training level t = {t[~valid][0].item():g} must be {want}")

    x_t = add_noise(path, x0, eps, t)
    out = model(x_t, path.network_time(t), y, drop_noise=drop_noise)
    prediction = out[:, :x0.shape[1]]                             # the linear interpolant has no use for a variance
    if path.prediction == "velocity":
        velocity = _like(path.alpha_dot(t), x0) * x0 + _like(path.sigma_dot(t), x0) * eps
        loss = (prediction - velocity).square().flatten(1).mean(1)
    else:
        loss = (prediction - eps).square().flatten(1).mean(1)
        if out.shape[1] == 2 * x0.shape[1]:
            loss = loss + variance_bound(path, prediction.detach(), out[:, x0.shape[1]:], x0, x_t, position.round().long() - 1)
    return torch.where(valid, loss, torch.nan)


def ddpm_posterior(alpha_bar):
    """q(x_{i−1} | x_i, x_0) for a chain with these ᾱ_0 … ᾱ_{N−1} (Ho et al., 2020, eq. 6, 7): five tensors (N,).

    Its mean is on_x0 · x_0 + on_xt · x_i. The logarithm of the variance that a network may learn lies between those of eq. 7's
    variance and of β: low and high. The posterior of i = 0 has no spread, and uses that of i = 1.
    """
    previous = torch.cat([torch.ones_like(alpha_bar[:1]), alpha_bar[:-1]])
    beta = 1 - alpha_bar / previous
    on_x0 = beta * previous.sqrt() / (1 - alpha_bar)
    on_xt = (1 - previous) * (1 - beta).sqrt() / (1 - alpha_bar)
    low = (beta * (1 - previous) / (1 - alpha_bar))[1:].log()
    return on_x0, on_xt, torch.cat([low[:1], low]), beta.log()


def learned_log_variance(v, low, high):
    """The network's v in [−1, 1] goes from one log variance to the other (Nichol & Dhariwal, 2021, eq. 15)."""
    return low + (v + 1) / 2 * (high - low)


def variance_bound(path, eps, v, x0, x_t, k):
    """The variational bound's term of step k, (B,), in bits per dimension (Nichol & Dhariwal, 2021).

    KL(q(x_{k−1}|x_k, x_0) ‖ p(x_{k−1}|x_k)), and at k = 0 the likelihood of the 8-bit pixels. Only v should learn from it.
    """
    on_x0, on_xt, low, high = (_like(table[k], x0) for table in ddpm_posterior(path.alpha_bar.to(k.device)))
    alpha_bar = _like(path.alpha_bar.to(k.device)[k], x0)
    x0_hat = (x_t - (1 - alpha_bar).sqrt() * eps) / alpha_bar.sqrt()
    mean, mean_hat = on_x0 * x0 + on_xt * x_t, on_x0 * x0_hat + on_xt * x_t
    log_var = learned_log_variance(v, low, high)

    kl = (log_var - low + (low - log_var).exp() + (mean - mean_hat).square() * (-log_var).exp() - 1) / 2
    nll = -discretized_log_likelihood(x0, mean_hat, log_var / 2)
    first = (k == 0).reshape(-1, *[1] * (x0.ndim - 1))
    return torch.where(first, nll, kl).flatten(1).mean(1) / math.log(2)


def discretized_log_likelihood(x, mean, log_std):
    """log of the mass that a Gaussian gives to the 8-bit bin x ± 1/255; the outermost bins reach to infinity."""
    def cdf(z):                                                   # Φ, as the published loss approximates it
        return (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3))) / 2

    above, below = cdf((x - mean + 1 / 255) * (-log_std).exp()), cdf((x - mean - 1 / 255) * (-log_std).exp())
    mass = torch.where(x < -0.999, above, torch.where(x > 0.999, 1 - below, above - below))
    return mass.clamp(min=1e-12).log()


# ---------------------------------------------------------------------------------------------------------------------
# Guidance


def guided(model, path, y, w_nag=0.0, cfg_scale=1.0, nag_interval=(0.0, 1.0), cfg_interval=(0.0, 1.0), cfg_channels=None,
           null_class=None, w_classifier=0.0, classifier=None, guide=None, guide_y=None, guide_scale=1.0, guide_interval=(0.0, 1.0)):
    """The guided network as a function denoise(x, t) -> prediction, for the samplers below.

        D = D(t, y) + (cfg_scale − 1) [D(t, y) − D(t, ∅)] + w_nag [D(t, y) − D(∅, y)] + (guide_scale − 1) [D(t, y) − D_guide]

    A prediction is affine in the score at the nominal level, so this sum of predictions is the same sum of scores:
    velocity and ε need no special case. NAG's other form, by a classifier g of the level, needs no null branch: it adds
    w_classifier ∇_x log g(t|x) to the score.

    y             (B,) int64 classes
    w_nag         weight of NAG, neutral at 0 (Zhong et al., 2025)
    cfg_scale     scale of CFG, neutral at 1 (Ho & Salimans, 2022)
    *_interval    (lo, hi), the levels at which the term acts; elsewhere, and at its neutral value, its branch is not run
    cfg_channels  add the CFG term to the first so many channels only (3 in the published FIDs of DiT and SiT)
    null_class    label of the null class, `model.num_classes` when None
    w_classifier  weight of the classifier's form of NAG, neutral at 0; it acts on nag_interval, too
    classifier    a function (x, t) -> ∇_x log g(t|x), as `NoiseEstimator.gradient`, of the same level as x
    guide         another network of this path and shape: a weaker one (autoguidance, Karras et al., 2024), or the one
                  that this was fine-tuned from, without class (domain guidance, Zhong et al., 2025)
    guide_y       (B,) int64 classes that the guide is asked with, by its own numbers; y when None
    guide_scale   scale of the guide, neutral at 1

    denoise takes x (B, C, H, W) and t, a number or a tensor () or (B,). Where the network learned a variance and the path
    uses it (VP) it returns 2C channels, guided ε and the variance output of D(t, y); otherwise C. All branches of a call
    run as one batch. Raises ValueError for an interval that is not 0 ≤ lo ≤ hi ≤ 1.
    """
    for name, (lo, hi) in (("nag_interval", nag_interval), ("cfg_interval", cfg_interval), ("guide_interval", guide_interval)):
        if not 0 <= lo <= hi <= 1:
            raise ValueError(f"{name} is {lo:g} to {hi:g}; it must be 0 <= lo <= hi <= 1")

    def weight(value, interval, t):
        """`value` inside the interval (to a rounding error of t), else 0."""
        return value * ((t > interval[0] - 1e-6) & (t < interval[1] + 1e-6))

    def denoise(x, t):
        t, channels = _level(t), x.shape[1]
        w_class, w_level = weight(cfg_scale - 1, cfg_interval, t), weight(w_nag, nag_interval, t)
        w_guide, w_gradient = weight(guide_scale - 1, guide_interval, t), weight(w_classifier, nag_interval, t)
        use_cfg, use_nag = bool((w_class != 0).any()), bool((w_level != 0).any())

        # D(t, y), D(t, ∅) and D(∅, y), as far as they are needed, in one batch
        copies, classes, hidden = 1 + use_cfg + use_nag, [y], None
        time = path.network_time(t).to(x.device, torch.float32).expand(len(x))
        if use_cfg:
            classes += [torch.full_like(y, model.num_classes if null_class is None else null_class)]
        if use_nag:
            classes += [y]
            hidden = torch.arange(copies * len(x), device=x.device) >= (copies - 1) * len(x)
        out = model(torch.cat([x] * copies), torch.cat([time] * copies), torch.cat(classes), drop_noise=hidden)
        cond, *nulls = out[:, :channels].split(len(x))

        result = cond
        if use_cfg:
            no_class = nulls[0]
            steered = torch.arange(channels, device=x.device) < (channels if cfg_channels is None else cfg_channels)
            result = result + _like(w_class, x) * (cond - no_class) * steered[:, None, None]
        if use_nag:
            no_level = nulls[-1]
            result = result + _like(w_level, x) * (cond - no_level)
        if bool((w_guide != 0).any()):
            guided_by = guide(x, time, y if guide_y is None else guide_y)[:, :channels]
            result = result + _like(w_guide, x) * (cond - guided_by)
        w_gradient = w_gradient * (path.alpha(t) > 0)             # at α = 0 a velocity cannot carry a score
        if bool((w_gradient != 0).any()):
            slope = torch.where(w_gradient != 0, w_gradient * prediction_per_score(path, t), 0.0)
            result = result + _like(slope, x) * classifier(x, t).to(x)

        variance = out[:len(x), channels:]
        learned = path.prediction == "eps" and variance.shape[1] == channels
        return torch.cat([result, variance], dim=1) if learned else result

    return denoise


# ---------------------------------------------------------------------------------------------------------------------
# Samplers: from x ~ N(0, I) at t = 1 to x_0. `denoise(x, t)` is a guided network, or any function of that form; it is
# called without gradient, with t a float64 tensor () on the CPU.


@torch.no_grad()
def sample_ddpm(denoise, x, path, steps=250, randn=torch.randn_like):
    """The ancestral sampler of DDPM on `steps` of the 1000 levels of VP, (B, C, H, W) -> x_0.

    Keeps evenly spaced steps, both ends included, and recomputes β from the kept ᾱ (Nichol & Dhariwal, 2021, eq. 19).
    When denoise returns 2C channels the second half is the learned variance, otherwise the posterior's is used.
    randn(x) is called once per step. Raises ValueError for another path, or for steps outside 2..1000.
    """
    if path.prediction != "eps":
        raise ValueError("the ddpm sampler needs the VP interpolant; use sde or ode")
    if not 2 <= steps <= path.steps:
        raise ValueError(f"ddpm takes 2 to {path.steps} steps, not {steps}")
    kept = torch.linspace(0, path.steps - 1, steps, dtype=torch.float64).round().long()
    on_x0, on_xt, low, high = ddpm_posterior(path.alpha_bar.cpu()[kept])
    for i in reversed(range(steps)):
        t = (kept[i] + 1).double() / path.steps
        prediction, variance = denoise(x, t).tensor_split([x.shape[1]], dim=1)
        x0 = to_x0(path, prediction, x, t)
        log_var = learned_log_variance(variance, low[i], high[i]) if variance.shape[1] else low[i].to(x)
        noise = randn(x) * (i > 0)                                                      # none at the last step
        x = on_x0[i] * x0 + on_xt[i] * x + (log_var / 2).exp() * noise
    return x


@torch.no_grad()
def sample_sde(denoise, x, path, steps=250, randn=torch.randn_like, last_step=0.04):
    """Euler–Maruyama on the reverse SDE (SiT, Ma et al., 2024, eq. 6), (B, C, H, W) -> x_0.

        dx = [v − g s] dt + sqrt(2 g) dW,  g(t) = σ(t), half of the paper's w_t,  from t = 1 down

    `steps` evaluations: steps − 1 equal steps down to t = last_step, then one step to 0 along the drift, without noise.
    randn(x) is called once for each step that has noise. Raises ValueError for steps < 1 or last_step outside (0, 1).
    """
    if steps < 1 or not 0 < last_step < 1:
        raise ValueError(f"sde needs at least 1 step and 0 < last_step < 1, not {steps} and {last_step:g}")
    levels = torch.linspace(1, last_step, steps, dtype=torch.float64)
    for i, t in enumerate(levels):
        prediction = denoise(x, t)[:, :x.shape[1]]
        drift = to_velocity(path, prediction, x, t) - path.sigma(t) * to_score(path, prediction, x, t)
        if i == steps - 1:
            return x - t * drift
        step = t - levels[i + 1]
        x = x - step * drift + (2 * path.sigma(t) * step).sqrt() * randn(x)


@torch.no_grad()
def sample_ode(denoise, x, path, steps=50, method="heun", t_end=0.0):
    """The probability-flow ODE dx/dt = v(x, t) in `steps` equal steps from t = 1 to t_end, (B, C, H, W) -> x.

    method "euler" takes one evaluation a step, "heun" two (Heun's second-order rule). On VP, where σ' is infinite at
    t = 0, a walk to below 0.001 ends there, and jumps to E[x_0|x]: one more evaluation.
    Raises ValueError for another method, steps < 1, or t_end outside [0, 1).
    """
    if method not in ("euler", "heun"):
        raise ValueError(f"unknown ode method {method!r}; use euler or heun")
    if steps < 1 or not 0 <= t_end < 1:
        raise ValueError(f"ode needs at least 1 step and 0 <= t_end < 1, not {steps} and {t_end:g}")

    def velocity(x, t):
        return to_velocity(path, denoise(x, t)[:, :x.shape[1]], x, t)

    jump = path.prediction == "eps" and t_end < 1e-3
    levels = torch.linspace(1, 1e-3 if jump else t_end, steps + 1, dtype=torch.float64)
    for t, t_next in zip(levels[:-1], levels[1:]):
        v = velocity(x, t)
        if method == "heun":
            v = (v + velocity(x + (t_next - t) * v, t_next)) / 2
        x = x + (t_next - t) * v
    return to_x0(path, denoise(x, t_next)[:, :x.shape[1]], x, t_next) if jump else x


# ---------------------------------------------------------------------------------------------------------------------
# Noise shift


def noise_shift(path, t, sigma_e, first_order=False):
    """How far the level of a state at t moves when Gaussian error of standard deviation sigma_e is added to it.

    Solves σ(t + δ)² = σ(t)² + σ_e² for δ (Zhong et al., 2025, Statement 1); with first_order, its expansion
    δ ≈ (sqrt(σ² + σ_e²) − σ) / σ'(t). t and sigma_e are numbers or tensors that broadcast.
    Raises ValueError for t outside [0, 1], and where no level holds that much noise.
    """
    t, sigma_e = _level(t), _level(sigma_e)
    if not ((t >= 0) & (t <= 1)).all():
        raise ValueError("noise_shift needs levels t in [0, 1]")
    sigma = path.sigma(t)
    total = (sigma**2 + sigma_e**2).sqrt()
    if first_order:
        return (total - sigma) / path.sigma_dot(t)
    most = path.sigma(1.0).item()
    if not (total <= most + 1e-6).all():
        raise ValueError(f"no level holds noise of standard deviation {total.max().item():g}: the most is {most:g}, at t = 1")
    return path.level(total.clamp(max=most)) - t


def extra_noise(path, t, shift):
    """The σ_e that moves the level of a state by `shift` ≥ 0, from t to at most 1: σ_e² = σ(t + δ)² − σ(t)², noise_shift the other way round."""
    return (path.sigma((_level(t) + shift).clamp(max=1.0))**2 - path.sigma(t)**2).sqrt()
