"""The mathematics, and nothing else: interpolants, loss, guidance, samplers, noise shift.

A state of level t mixes data and noise (t = 0 is data, t = 1 is noise):

    x_t = α(t) x_0 + σ(t) ε,        score s(x|t) = ∇ log p_t(x) = −E[ε|x, t] / σ(t)

A sampler walks from t = 1 to t = 0, and its errors add up on the way. So its state at level t
really holds the noise of some level t + δ, of which the network is not told: the noise shift.
Noise awareness guidance (NAG; Zhong et al., 2025, arXiv 2510.12497) treats the level as a
condition, as classifier-free guidance (CFG) treats the class, and strengthens it:

    s(x|t) + w ∇_x log p(t|x)  =  (1 + w) s(x|t) − w s(x)

where s(x), the score without the level, is approximated by the same network with its level
hidden (`drop_noise`).

Levels t are floats in [0, 1] everywhere; only the network itself may count differently
(`path.network_time`). States are (B, C, H, W); a level is a number, or a tensor () or (B,).
"""
import math

import torch


# --------------------------------------------------------------------------------------------------
# The two interpolants: how much data and noise a level holds, and what the network predicts


def _double(number):
    """A level or a deviation, a number or a tensor, as a float64 tensor."""
    return torch.as_tensor(number, dtype=torch.float64)


def _like(coefficient, x):
    """A coefficient () or (B,), ready to multiply x (B, C, H, W)."""
    if coefficient.ndim == 0:
        return coefficient                          # it may multiply tensors of any device
    return coefficient.to(x).reshape(-1, *[1] * (x.ndim - 1))


class Path:
    """An interpolant: α(t), σ(t) and their slopes in float64, and what the network is asked.

    At one (x, t), what the network predicts, E[x_0|x, t], E[ε|x, t] and the score are affine in
    each other; x0_eps turns the prediction into the first two. level is the inverse of σ, and
    training_level rounds u in [0, 1], a numpy array, to levels that the network is trained at.

    Any path can be trained like the linear one: at the level with a given share of noise σ/(α + σ),
    which is the linear path's t at the same SNR, and with its losses times loss_weight.
    """

    def velocity(self, prediction, x, t):
        """E[dx_t/dt|x, t] = α' E[x_0|x, t] + σ' E[ε|x, t]."""
        x0, eps = self.x0_eps(prediction, x, t)
        return _like(self.alpha_dot(t), x) * x0 + _like(self.sigma_dot(t), x) * eps

    def score(self, prediction, x, t):
        """s(x|t) = −E[ε|x, t] / σ."""
        _, eps = self.x0_eps(prediction, x, t)
        return -eps / _like(self.sigma(t), x)

    def prediction_per_score(self, t):
        """How the prediction moves when the score moves by 1, so ε by −σ and x_0 by σ²/α."""
        return self.target(self.sigma(t)**2 / self.alpha(t), -self.sigma(t))


class Linear(Path):
    """α = 1 − t, σ = t: flow matching as in SiT (Ma et al., 2024).

    The network predicts the velocity v = dx_t/dt = ε − x_0, and is given t itself.
    """

    learns_variance, t_min = False, 0.0             # t_min: from there on the velocity is finite

    def alpha(self, t):
        return 1 - _double(t)

    def sigma(self, t):
        return _double(t)

    level = sigma                                   # σ = t

    def alpha_dot(self, t):
        return -torch.ones_like(_double(t))

    def sigma_dot(self, t):
        return torch.ones_like(_double(t))

    def network_time(self, t):
        return _double(t).float()

    def training_level(self, u):
        return u

    def level_of_share(self, share):
        return share

    def loss_weight(self, t):
        return torch.ones_like(t)

    def target(self, x0, eps):
        return eps - x0

    def x0_eps(self, v, x, t):
        """E[x_0|x, t] = x − t v, E[ε|x, t] = x + (1 − t) v."""
        t = _like(_double(t), x)
        return x - t * v, x + (1 - t) * v

    def velocity(self, v, x, t):
        return v


class VP(Path):
    """The table of DDPM (Ho et al., 2020): 1000 steps, β from 1e-4 to 0.02. The network predicts ε.

    Step k = 0..999 has level t = (k + 1)/1000 and α(t)² = ᾱ_k = Π (1 − β); in between log α is
    linear in t, and α(0) = 1. The network is given k = 1000 t − 1, rounded when within 1e-3 of a
    whole number, as it is for α and σ, so that levels in float32 hit the table.
    """

    steps, learns_variance, t_min = 1000, True, 1e-3             # σ' is infinite at t = 0

    def __init__(self):
        beta = torch.linspace(1e-4, 0.02, self.steps, dtype=torch.float64)
        self.alpha_bar = torch.cumprod(1 - beta, 0)                             # ᾱ_0 … ᾱ_999
        self.log_alpha = torch.cat([torch.ones(1), self.alpha_bar]).log() / 2   # t = 0, 0.001, … 1

    def _position(self, t):
        """1000 t, on the table where it nearly is; and that table, of log α, on the same device."""
        position = self.steps * _double(t)
        near = (position - position.round()).abs() < 1e-3
        return torch.where(near, position.round(), position), self.log_alpha.to(position.device)

    def _log_alpha(self, t):
        position, table = self._position(t)
        below = position.floor().long().clamp(0, self.steps - 1)
        return torch.lerp(table[below], table[below + 1], position - below)

    def alpha(self, t):
        return self._log_alpha(t).exp()

    def sigma(self, t):
        return (-torch.expm1(2 * self._log_alpha(t))).sqrt()

    def alpha_dot(self, t):
        """α (log α)'; at a knot of the table, where the slope jumps, the mean of both sides."""
        position, table = self._position(t)
        left = (position.ceil().long() - 1).clamp(0, self.steps - 1)
        right = position.floor().long().clamp(0, self.steps - 1)
        rise = (table[left + 1] - table[left] + table[right + 1] - table[right]) / 2
        return self.steps * rise * self.alpha(t)

    def sigma_dot(self, t):
        return -self.alpha(t) * self.alpha_dot(t) / self.sigma(t)

    def level(self, sigma):
        """log α = ½ log(1 − σ²), looked up in the table backwards."""
        log_alpha = torch.log1p(-_double(sigma)**2) / 2
        table = self.log_alpha.to(log_alpha.device)
        above = torch.searchsorted(-table, -log_alpha).clamp(1, self.steps)       # the table falls
        part = (log_alpha - table[above - 1]) / (table[above] - table[above - 1])
        return (above - 1 + part) / self.steps

    def network_time(self, t):
        return (self._position(t)[0] - 1).float()

    def training_level(self, u):
        return (1 + (self.steps * u).astype(int).clip(max=self.steps - 1)) / self.steps

    def level_of_share(self, share):
        share = _double(share)
        return self.level(share / torch.hypot(share, 1 - share)).numpy()

    def loss_weight(self, t):
        """(1 + σ/α)²: with it the loss of ε is that of the linear path's v. At most 10."""
        return (1 + self.sigma(t) / self.alpha(t)).square().clamp(max=10).to(t)

    def target(self, x0, eps):
        return eps

    def x0_eps(self, eps, x, t):
        """E[x_0|x, t] = (x − σ ε) / α, and ε as it is."""
        return (x - _like(self.sigma(t), x) * eps) / _like(self.alpha(t), x), eps


def add_noise(path, x0, eps, t):
    """x_t = α x_0 + σ ε."""
    return _like(path.alpha(t), x0) * x0 + _like(path.sigma(t), x0) * eps


# --------------------------------------------------------------------------------------------------
# The loss


def training_loss(model, path, x0, y, t, eps, drop_noise=None):
    """Loss of each sample, (B,): squared error, and on VP the bound of a learned variance.

    x0, eps (B, C, H, W); y (B,) int64; t (B,) levels, on VP (k + 1)/1000 with k = 0..999.
    drop_noise (B,) bool: where the level is hidden, so that NAG's null branch is learned.
    Raises ValueError for levels between the steps of VP.
    """
    x_t = add_noise(path, x0, eps, t)
    time = path.network_time(t)
    on_cpu = t.device.type == "cpu"                 # a GPU would have to wait for the answer
    if isinstance(path, VP) and on_cpu and not torch.isin(time, torch.arange(path.steps)).all():
        raise ValueError(f"training levels of VP must be multiples of 1/1000, not {t.tolist()}")
    out = model(x_t, time, y, drop_noise=drop_noise)
    prediction, variance = out.tensor_split([x0.shape[1]], dim=1)
    loss = (prediction - path.target(x0, eps)).square().flatten(1).mean(1)
    if path.learns_variance and variance.shape[1]:
        loss = loss + variance_bound(path, prediction.detach(), variance, x0, x_t, time.long())
    return loss


def ddpm_posterior(alpha_bar):
    """q(x_{i−1}|x_i, x_0) of a chain with these ᾱ_0 … ᾱ_{N−1} (Ho et al., 2020, eq. 6, 7).

    Four tensors (N,). Its mean is on_x0 · x_0 + on_xt · x_i. low is the log of its variance, and
    high is log β: a learned log variance lies in between. For i = 0, where q has no spread, low is
    that of i = 1.
    """
    previous = torch.cat([torch.ones_like(alpha_bar[:1]), alpha_bar[:-1]])
    beta = 1 - alpha_bar / previous
    on_x0 = beta * previous.sqrt() / (1 - alpha_bar)
    on_xt = (1 - previous) * (1 - beta).sqrt() / (1 - alpha_bar)
    low = (beta * (1 - previous) / (1 - alpha_bar))[1:].log()
    return on_x0, on_xt, torch.cat([low[:1], low]), beta.log()


def learned_log_variance(v, low, high):
    """v in [−1, 1] goes from one log variance to the other (Nichol & Dhariwal, 2021, eq. 15)."""
    return low + (v + 1) / 2 * (high - low)


def variance_bound(path, eps, v, x0, x_t, k):
    """Term k of the variational bound, (B,), in bits per dimension (Nichol & Dhariwal, 2021).

    KL(q(x_{k−1}|x_k, x_0) ‖ p(x_{k−1}|x_k)), and at k = 0 the likelihood of the 8-bit pixels. Only
    v should learn from it, so eps comes detached.
    """
    tables = ddpm_posterior(path.alpha_bar.to(k.device))
    on_x0, on_xt, low, high = (_like(table[k], x0) for table in tables)
    x0_hat, _ = path.x0_eps(eps, x_t, (k + 1).double() / path.steps)
    mean, mean_hat = on_x0 * x0 + on_xt * x_t, on_x0 * x0_hat + on_xt * x_t
    log_var = learned_log_variance(v, low, high)

    square = (mean - mean_hat).square()
    kl = (log_var - low + (low - log_var).exp() + square * (-log_var).exp() - 1) / 2
    nll = -discretized_log_likelihood(x0, mean_hat, log_var / 2)
    return torch.where(_like(k, x0) == 0, nll, kl).flatten(1).mean(1) / math.log(2)


def discretized_log_likelihood(x, mean, log_std):
    """log of a Gaussian's mass in the 8-bit bin x ± 1/255; the outermost bins reach to infinity."""
    def cdf(z):                                      # Φ, as the published loss approximates it
        return (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3))) / 2

    above = cdf((x - mean + 1 / 255) * (-log_std).exp())
    below = cdf((x - mean - 1 / 255) * (-log_std).exp())
    mass = torch.where(x < -0.999, above, torch.where(x > 0.999, 1 - below, above - below))
    return mass.clamp(min=1e-12).log()


# --------------------------------------------------------------------------------------------------
# Guidance


def guided(model, path, y, w_nag=0.0, cfg_scale=1.0, nag_interval=(0.0, 1.0),
           cfg_interval=(0.0, 1.0), cfg_channels=None, null_class=None, nag_level=None,
           w_classifier=0.0, classifier=None, guide=None, guide_y=None, guide_scale=1.0):
    """The guided network as a function denoise(x, t) -> prediction, for the samplers below.

        D = D(t, y) + (cfg_scale − 1)   [D(t, y) − D(t, ∅)]
                    + w_nag             [D(t, y) − D(?, y)]
                    + (guide_scale − 1) [D(t, y) − D_guide]

    A prediction is affine in the score at the nominal level, so this sum of predictions is the
    same sum of scores: velocity and ε need no special case. NAG's other form, by a classifier of
    the level, needs no null branch: it adds w_classifier ∇_x log g(t|x) to the score (not where
    α = 0, where a velocity holds no score).

    y             (B,) int64 classes
    w_nag         weight of NAG, neutral at 0; `?` is the level hidden (Zhong et al., 2025), or,
                  if given, another: nag_level is a function (x, t) -> (B,), such as the level that
                  an estimator reads, or a level higher than t (Li et al., 2024, arXiv 2412.05827)
    cfg_scale     scale of CFG, neutral at 1; ∅ is null_class, model.num_classes if None
                  (Ho & Salimans, 2022)
    *_interval    (lo, hi), the levels at which NAG acts; those at which CFG and the guide act
    cfg_channels  add the CFG term to so many channels only (3 in the published FIDs)
    classifier    a function (x, t) -> ∇_x log g(t|x), such as NoiseEstimator.gradient
    guide         another network of this path and shape: a weaker one (autoguidance, Karras et al.,
                  2024), or the one before fine-tuning, without class (domain guidance); it is
                  asked with the classes guide_y, or y if None; guide_scale is neutral at 1

    denoise takes x (B, C, H, W) and one level t. It returns C channels, or, where the network
    learned a variance and the path uses it (VP), 2C: guided ε and the variance of D(t, y). A term
    at its neutral value, or outside its interval, costs nothing; the branches of the network run
    as one batch. Raises ValueError unless 0 ≤ lo ≤ hi ≤ 1.
    """
    for name, (lo, hi) in (("nag_interval", nag_interval), ("cfg_interval", cfg_interval)):
        if not 0 <= lo <= hi <= 1:
            raise ValueError(f"{name} is {lo:g} to {hi:g}; it must be 0 <= lo <= hi <= 1")
    if null_class is None:
        null_class = getattr(model, "num_classes", None)
    inside = lambda t, interval: interval[0] - 1e-6 < t < interval[1] + 1e-6

    def denoise(x, t):
        t, B, C = float(t), *x.shape[:2]
        use_cfg = cfg_scale != 1 and inside(t, cfg_interval)
        use_nag = w_nag != 0 and inside(t, nag_interval)
        time = path.network_time(t).to(x.device).expand(B)

        # D(t, y), then D(t, ∅) and D(?, y) where they are needed, in one batch
        shown = torch.zeros(B, dtype=torch.bool, device=x.device)
        branches = [(time, y, shown)]
        if use_cfg:
            branches.append((time, torch.full_like(y, null_class), shown))
        if use_nag and nag_level:
            level = nag_level(x, t).to(x.device).clamp(path.t_min, 1)
            branches.append((path.network_time(level), y, shown))
        elif use_nag:
            branches.append((time, y, ~shown))
        times, classes, hidden = map(torch.cat, zip(*branches))
        out = model(torch.cat([x] * len(branches)), times, classes, hidden)
        cond, *nulls = out[:, :C].split(B)

        result = cond
        if use_cfg:
            no_class = nulls[0]
            term = (cfg_scale - 1) * (cond - no_class)
            if cfg_channels is not None:
                term[:, cfg_channels:] = 0
            result = result + term
        if use_nag:
            no_level = nulls[-1]
            result = result + w_nag * (cond - no_level)
        if guide is not None and guide_scale != 1 and inside(t, cfg_interval):
            weaker = guide(x, time, y if guide_y is None else guide_y)[:, :C]
            result = result + (guide_scale - 1) * (cond - weaker)
        if w_classifier != 0 and inside(t, nag_interval) and path.alpha(t) > 0:
            push = w_classifier * classifier(x, t).to(x)
            result = result + path.prediction_per_score(t) * push

        return torch.cat([result, out[:B, C:]], dim=1) if path.learns_variance else result

    return denoise


# --------------------------------------------------------------------------------------------------
# Samplers: from x ~ N(0, I) at t = 1 to x_0. `denoise(x, t)` is a guided network, or any function
# of that form; it is called without gradient, with t a float64 tensor () on the CPU.


@torch.no_grad()
def sample_ddpm(denoise, x, path, steps=250, randn=torch.randn_like):
    """DDPM's ancestral sampler on `steps` of the 1000 levels of VP, (B, C, H, W) -> x_0.

    Keeps evenly spaced steps, both ends included, and recomputes β from the kept ᾱ (Nichol &
    Dhariwal, 2021, eq. 19). When denoise returns 2C channels the second half is the learned
    variance; otherwise the posterior's is used. randn(x) is called once per step.
    Raises ValueError for another path, or for steps outside 2..1000.
    """
    if not isinstance(path, VP):
        raise ValueError("the ddpm sampler needs the VP interpolant; use sde or ode")
    if not 2 <= steps <= path.steps:
        raise ValueError(f"ddpm takes 2 to {path.steps} steps, not {steps}")
    kept = torch.linspace(0, path.steps - 1, steps, dtype=torch.float64).round().long()
    on_x0, on_xt, low, high = ddpm_posterior(path.alpha_bar[kept])
    for i in reversed(range(steps)):
        t = (kept[i] + 1).double() / path.steps
        eps, v = denoise(x, t).tensor_split([x.shape[1]], dim=1)
        x0, _ = path.x0_eps(eps, x, t)
        log_var = learned_log_variance(v, low[i], high[i]) if v.shape[1] else low[i].to(x)
        noise = randn(x) * (i > 0)                   # none at the last step
        x = on_x0[i] * x0 + on_xt[i] * x + (log_var / 2).exp() * noise
    return x


@torch.no_grad()
def sample_sde(denoise, x, path, steps=250, randn=torch.randn_like, last_step=0.04):
    """Euler–Maruyama on the reverse SDE (SiT, Ma et al., 2024, eq. 6), (B, C, H, W) -> x_0.

        dx = [v − g s] dt + sqrt(2 g) dW,  g(t) = σ(t), half of the paper's w_t,  from t = 1 down

    `steps` evaluations: steps − 1 equal steps down to t = last_step, then one step to 0 along the
    drift, without noise. randn(x) is called once for each step that has noise.
    Raises ValueError for steps < 1 or last_step outside (0, 1).
    """
    if steps < 1 or not 0 < last_step < 1:
        raise ValueError(f"sde needs steps >= 1 and 0 < last_step < 1, not {steps}, {last_step:g}")
    levels = torch.linspace(1, last_step, steps, dtype=torch.float64)
    for i, t in enumerate(levels):
        prediction = denoise(x, t)[:, :x.shape[1]]
        g = path.sigma(t)
        drift = path.velocity(prediction, x, t) - g * path.score(prediction, x, t)
        if i == steps - 1:
            return x - t * drift
        dt = t - levels[i + 1]
        x = x - dt * drift + (2 * g * dt).sqrt() * randn(x)


@torch.no_grad()
def sample_ode(denoise, x, path, steps=50, method="heun", t_end=0.0):
    """The probability-flow ODE dx/dt = v in equal steps from t = 1 to t_end, (B, C, H, W) -> x.

    method "euler" takes one evaluation a step, "heun" two (Heun's second-order rule). On VP, where
    σ' is infinite at t = 0, a walk to below 0.001 ends there, and jumps to E[x_0|x]: one more
    evaluation. Raises ValueError for another method, steps < 1, or t_end outside [0, 1).
    """
    if method not in ("euler", "heun"):
        raise ValueError(f"unknown ode method {method!r}; use euler or heun")
    if steps < 1 or not 0 <= t_end < 1:
        raise ValueError(f"ode needs steps >= 1 and 0 <= t_end < 1, not {steps}, {t_end:g}")
    velocity = lambda x, t: path.velocity(denoise(x, t)[:, :x.shape[1]], x, t)
    levels = torch.linspace(1, max(t_end, path.t_min), steps + 1, dtype=torch.float64)
    for t, t_next in zip(levels[:-1], levels[1:]):
        v = velocity(x, t)
        if method == "heun":
            v = (v + velocity(x + (t_next - t) * v, t_next)) / 2
        x = x + (t_next - t) * v
    if t_end < path.t_min:
        x, _ = path.x0_eps(denoise(x, t_next)[:, :x.shape[1]], x, t_next)
    return x


# --------------------------------------------------------------------------------------------------
# Noise shift


def noise_shift(path, t, sigma_e, first_order=False):
    """How far the level of a state at t moves when Gaussian error of deviation sigma_e is added.

    Solves σ(t + δ)² = σ(t)² + σ_e² for δ (Zhong et al., 2025, Statement 1); with first_order, its
    expansion δ ≈ (sqrt(σ² + σ_e²) − σ) / σ'(t). t and sigma_e: numbers, or tensors that broadcast.
    Raises ValueError for t outside [0, 1], and where no level holds that much noise.
    """
    t, sigma_e = _double(t), _double(sigma_e)
    if not ((t >= 0) & (t <= 1)).all():
        raise ValueError("noise_shift needs levels t in [0, 1]")
    sigma = path.sigma(t)
    total = (sigma**2 + sigma_e**2).sqrt()
    if first_order:
        return (total - sigma) / path.sigma_dot(t)
    most = path.sigma(1.0).item()
    if not (total <= most + 1e-6).all():
        raise ValueError(f"no level holds noise of deviation {total.max().item():g}, only {most:g}")
    return path.level(total.clamp(max=most)) - t


def extra_noise(path, t, shift):
    """The inverse of noise_shift: the σ_e that moves the level of a state by shift ≥ 0.

    σ_e² = σ(t + δ)² − σ(t)², where t + δ is at most 1.
    """
    return (path.sigma((_double(t) + shift).clamp(max=1.0))**2 - path.sigma(t)**2).sqrt()
