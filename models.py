"""The networks: diffusion transformer, VAE for latents, noise estimator; loading their weights.

DiT (Peebles & Xie, 2023, arXiv 2212.09748) cuts the noisy state x_t into patches and runs a plain
transformer over them. The condition c = embed(t) + embed(y) enters through adaLN-Zero: it scales
and shifts the input of each layer and gates its output, and every gate starts at zero, so that a
fresh block is the identity. SiT (Ma et al., 2024, arXiv 2401.08740) is the same network trained as
a flow. Either part of the condition can be replaced by a learned null embedding:

    class   row `num_classes` of the label table     for classifier-free guidance
    level   `t_embedder.null_embedding`              for noise awareness guidance

Parameters have the names and shapes of the published checkpoints. Only the null embedding of the
level is missing there; `from_checkpoint` adds it, and converts SiT's time and sign to ours.

    model = MODELS["SiT-XL/2"](input_size=32, in_channels=4, num_classes=1000)
    out = model(x, t, y, drop_noise)    # t is the network's own time, see diffusion.py
"""
import argparse
import hashlib
import json
import math
import re
import zipfile
from collections import OrderedDict
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.utils.checkpoint
from torch import nn
from torch.nn import functional as F


# --------------------------------------------------------------------------------------------------
# The transformer


def named(**parts):
    """Modules that are applied one after another, under the names of the published checkpoints."""
    return nn.Sequential(OrderedDict(parts))


def sincos_2d(width, side):
    """Fixed position table (1, side², width): [sin, cos] of the column, then of the row."""
    omega = 10000 ** (-torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    angle = torch.arange(side, dtype=torch.float64)[:, None] * omega    # (side, width / 4)
    line = torch.cat([angle.sin(), angle.cos()], dim=1)                 # (side, width / 2)
    column, row = line.repeat(side, 1), line.repeat_interleave(side, dim=0)
    return torch.cat([column, row], dim=1)[None].float()


class TimestepEmbedder(nn.Module):
    """Embeds the network's time (B,), or gives the null embedding where `drop_noise` is True."""

    features = 256

    def __init__(self, hidden_size):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(self.features, hidden_size), nn.SiLU(),
                                 nn.Linear(hidden_size, hidden_size))
        self.null_embedding = nn.Parameter(torch.empty(hidden_size))

    def forward(self, t, drop_noise=None):
        half = self.features // 2
        freqs = 10000 ** (-torch.arange(half, dtype=torch.float32, device=t.device) / half)
        angle = t[:, None].float() * freqs
        emb = self.mlp(torch.cat([angle.cos(), angle.sin()], 1).to(self.null_embedding.dtype))
        if drop_noise is None:
            return emb
        return torch.where(drop_noise[:, None], self.null_embedding.to(emb.dtype), emb)


class Attention(nn.Module):
    def __init__(self, hidden_size, num_heads):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size)
        self.proj = nn.Linear(hidden_size, hidden_size)

    def forward(self, x):
        B, N, D = x.shape
        qkv = self.qkv(x).view(B, N, 3, self.num_heads, D // self.num_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)                            # (B, heads, N, D / heads)
        if q.device.type == "cpu" and q.dtype == torch.bfloat16:
            # Written out, this is 1.5 to 5 times as fast as PyTorch's fused kernel for it.
            out = (q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1)).softmax(-1) @ v
        else:
            out = F.scaled_dot_product_attention(q, k, v)
        return self.proj(out.transpose(1, 2).reshape(B, N, D))


def modulate(x, shift, scale):
    return x * (1 + scale[:, None]) + shift[:, None]                    # (B, N, D), (B, D), (B, D)


class DiTBlock(nn.Module):
    def __init__(self, hidden_size, num_heads):
        super().__init__()
        self.norm1 = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.attn = Attention(hidden_size, num_heads)
        self.norm2 = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.mlp = named(fc1=nn.Linear(hidden_size, 4 * hidden_size), gelu=nn.GELU("tanh"),
                         fc2=nn.Linear(4 * hidden_size, hidden_size))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 6 * hidden_size))

    def forward(self, x, c):
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c).chunk(6, dim=1)
        x = x + gate1[:, None] * self.attn(modulate(self.norm1(x), shift1, scale1))
        return x + gate2[:, None] * self.mlp(modulate(self.norm2(x), shift2, scale2))


class FinalLayer(nn.Module):
    def __init__(self, hidden_size, patch_size, out_channels):
        super().__init__()
        self.norm_final = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(hidden_size, patch_size * patch_size * out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 2 * hidden_size))

    def forward(self, x, c):
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=1)
        return self.linear(modulate(self.norm_final(x), shift, scale))


class DiT(nn.Module):
    """The backbone of DiT and SiT.

    input_size   height = width of the input, in latent pixels (or image pixels, without a VAE)
    in_channels  C of the input
    learn_sigma  also output C channels for the variance (unused on the linear interpolant)
    Raises ValueError when patches do not tile the input.
    """

    def __init__(self, input_size=32, patch_size=2, in_channels=4, hidden_size=1152, depth=28,
                 num_heads=16, num_classes=1000, learn_sigma=True):
        super().__init__()
        if input_size % patch_size:
            raise ValueError(f"patches of {patch_size} do not tile an input of "
                             f"{input_size}×{input_size}; use a multiple of {patch_size}")
        self.input_size, self.patch_size, self.in_channels = input_size, patch_size, in_channels
        self.num_classes, self.learn_sigma = num_classes, learn_sigma
        self.out_channels = in_channels * (2 if learn_sigma else 1)
        self.grad_checkpoint = False    # True: less memory, as the backward pass recomputes blocks

        self.x_embedder = named(proj=nn.Conv2d(in_channels, hidden_size, patch_size, patch_size))
        self.t_embedder = TimestepEmbedder(hidden_size)
        self.y_embedder = named(embedding_table=nn.Embedding(num_classes + 1, hidden_size))
        self.blocks = nn.ModuleList(DiTBlock(hidden_size, num_heads) for _ in range(depth))
        self.final_layer = FinalLayer(hidden_size, patch_size, self.out_channels)
        self.register_buffer("pos_embed", sincos_2d(hidden_size, input_size // patch_size))
        self.initialize()

    def initialize(self):
        """adaLN-Zero: a fresh network outputs 0 for every input; its last layer learns first."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.x_embedder.proj.weight.flatten(1))
        nn.init.zeros_(self.x_embedder.proj.bias)
        for weight in (self.y_embedder.embedding_table.weight, self.t_embedder.mlp[0].weight,
                       self.t_embedder.mlp[2].weight, self.t_embedder.null_embedding):
            nn.init.normal_(weight, std=0.02)
        gates = [block.adaLN_modulation[1] for block in self.blocks]
        for module in gates + [self.final_layer.adaLN_modulation[1], self.final_layer.linear]:
            nn.init.zeros_(module.weight)

    def unpatchify(self, x):
        """(B, tokens, patch² · C) -> (B, C, H, W)."""
        size, p, C = self.input_size, self.patch_size, self.out_channels
        x = x.view(-1, size // p, size // p, p, p, C)
        return x.permute(0, 5, 1, 3, 2, 4).reshape(-1, C, size, size)

    def forward(self, x, t, y, drop_noise=None):
        """Prediction (B, C or 2C, H, W) for the state x (B, C, H, W).

        t           (B,) the network's own time: t itself on Linear, the DDPM step k on VP
        y           (B,) int64 in 0..num_classes
        drop_noise  (B,) bool or None: where True, the level is hidden from the network
        """
        tokens = self.x_embedder(x).flatten(2).transpose(1, 2) + self.pos_embed     # (B, N, D)
        c = self.t_embedder(t, drop_noise) + self.y_embedder(y)
        for block in self.blocks:
            if self.grad_checkpoint and torch.is_grad_enabled():
                tokens = torch.utils.checkpoint.checkpoint(block, tokens, c, use_reentrant=False,
                                                           preserve_rng_state=False)
            else:
                tokens = block(tokens, c)
        return self.unpatchify(self.final_layer(tokens, c).float())

    def flops(self):
        """Floating-point operations of one forward pass of one image, 2 for each multiply-add."""
        (_, N, D), depth = self.pos_embed.shape, len(self.blocks)
        channels = self.patch_size**2 * (self.in_channels + self.out_channels)
        per_token = channels * D + depth * 12 * D * D
        attention = depth * 2 * N * N * D
        condition = TimestepEmbedder.features * D + D * D + depth * 6 * D * D + 2 * D * D
        return 2 * (N * per_token + attention + condition)


SIZES = {      # width, depth, heads
    "Ti": (128, 6, 4),          # not in the papers; trains on two CPU cores
    "S": (384, 12, 6),
    "B": (768, 12, 12),
    "L": (1024, 24, 16),
    "XL": (1152, 28, 16),
}
MODELS = {f"{family}-{size}/{patch}": partial(DiT, patch_size=patch, hidden_size=width, depth=depth,
                                              num_heads=heads)
          for family in ("DiT", "SiT") for size, (width, depth, heads) in SIZES.items()
          for patch in (2, 4, 8)}


# --------------------------------------------------------------------------------------------------
# The autoencoder of Stable Diffusion (Rombach et al., 2022): 8×8 pixels become one latent pixel


class ResnetBlock(nn.Module):
    def __init__(self, in_channels, out_channels):
        super().__init__()
        self.norm1 = nn.GroupNorm(32, in_channels, eps=1e-6)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = nn.GroupNorm(32, out_channels, eps=1e-6)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        change = in_channels != out_channels
        self.conv_shortcut = nn.Conv2d(in_channels, out_channels, 1) if change else nn.Identity()

    def forward(self, x):
        h = self.conv1(F.silu(self.norm1(x)))
        return self.conv_shortcut(x) + self.conv2(F.silu(self.norm2(h)))


class PixelAttention(nn.Module):
    """Self-attention over all latent pixels, with one head."""

    def __init__(self, channels):
        super().__init__()
        self.group_norm = nn.GroupNorm(32, channels, eps=1e-6)
        self.to_q, self.to_k, self.to_v = (nn.Linear(channels, channels) for _ in range(3))
        self.to_out = nn.Sequential(nn.Linear(channels, channels))

    def forward(self, x):
        pixels = self.group_norm(x).flatten(2).transpose(1, 2)[:, None]     # (B, 1, H·W, C)
        q, k, v = self.to_q(pixels), self.to_k(pixels), self.to_v(pixels)
        out = F.scaled_dot_product_attention(q, k, v)[:, 0]
        return x + self.to_out(out).transpose(1, 2).reshape(x.shape)


class MidBlock(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.attentions = nn.Sequential(PixelAttention(channels))
        self.resnets = nn.ModuleList(ResnetBlock(channels, channels) for _ in range(2))

    def forward(self, x):
        return self.resnets[1](self.attentions(self.resnets[0](x)))


def stage(in_channels, out_channels, depth, downsample=False, upsample=False):
    """`depth` residual blocks at one resolution, then the step to the next one, if there is one."""
    widths = [in_channels] + [out_channels] * (depth - 1)
    parts = {"resnets": nn.Sequential(*(ResnetBlock(width, out_channels) for width in widths))}
    conv = partial(nn.Conv2d, out_channels, out_channels, 3)
    if downsample:
        pad = nn.ZeroPad2d((0, 1, 0, 1))                                # on the right and below
        parts["downsamplers"] = nn.Sequential(named(pad=pad, conv=conv(stride=2)))
    if upsample:
        nearest = nn.Upsample(scale_factor=2.0, mode="nearest")
        parts["upsamplers"] = nn.Sequential(named(nearest=nearest, conv=conv(padding=1)))
    return named(**parts)


class VAE(nn.Module):
    """The AutoencoderKL. It is used here, never trained.

    Latents are scaled by 0.18215, so that their variance is about 1. A batch is processed in chunks
    of `pixels` image pixels: 8 images of 256×256, less than 2 GB in fp32.
    """

    factor, channels, scale, pixels = 8, 4, 0.18215, 2**19

    def __init__(self):
        super().__init__()
        self.encoder = named(
            conv_in=nn.Conv2d(3, 128, 3, padding=1),
            down_blocks=nn.Sequential(
                stage(128, 128, 2, downsample=True), stage(128, 256, 2, downsample=True),
                stage(256, 512, 2, downsample=True), stage(512, 512, 2)),
            mid_block=MidBlock(512), conv_norm_out=nn.GroupNorm(32, 512, eps=1e-6), silu=nn.SiLU(),
            conv_out=nn.Conv2d(512, 2 * self.channels, 3, padding=1))   # mean and log variance
        self.decoder = named(
            conv_in=nn.Conv2d(self.channels, 512, 3, padding=1), mid_block=MidBlock(512),
            up_blocks=nn.Sequential(
                stage(512, 512, 3, upsample=True), stage(512, 512, 3, upsample=True),
                stage(512, 256, 3, upsample=True), stage(256, 128, 3)),
            conv_norm_out=nn.GroupNorm(32, 128, eps=1e-6), silu=nn.SiLU(),
            conv_out=nn.Conv2d(128, 3, 3, padding=1))
        self.quant_conv = nn.Conv2d(2 * self.channels, 2 * self.channels, 1)
        self.post_quant_conv = nn.Conv2d(self.channels, self.channels, 1)

    def in_chunks(self, network, x, pixels):
        """network(x), computed for a few images at a time; `pixels` is the size of one image."""
        allowed = torch.backends.cudnn.allow_tf32
        torch.backends.cudnn.allow_tf32 = True          # ten bits of mantissa are enough for images
        x = x.contiguous(memory_format=torch.channels_last)
        parts = [network(part).float() for part in x.split(max(1, self.pixels // pixels))]
        torch.backends.cudnn.allow_tf32 = allowed
        return torch.cat(parts)

    @torch.no_grad()
    def encode(self, images):
        """Mean and standard deviation of the latents' posterior, (B, 4, H / 8, W / 8) each.

        images (B, 3, H, W) in [−1, 1]. Raises ValueError unless 8 divides H and W.
        """
        height, width = images.shape[2:]
        if height % self.factor or width % self.factor:
            raise ValueError(f"the VAE needs images of a multiple of {self.factor} pixels, "
                             f"not {height}×{width}")
        encoder = lambda part: self.quant_conv(self.encoder(part))
        mean, log_var = self.in_chunks(encoder, images, height * width).chunk(2, dim=1)
        return self.scale * mean, self.scale * (log_var.clamp(-30, 20) / 2).exp()

    @torch.no_grad()
    def decode(self, latents):
        """Images (B, 3, 8 H, 8 W), about in [−1, 1], of latents (B, 4, H, W)."""
        decoder = lambda part: self.decoder(self.post_quant_conv(part))
        pixels = self.factor**2 * latents.shape[2] * latents.shape[3]
        return self.in_chunks(decoder, latents / self.scale, pixels)


# --------------------------------------------------------------------------------------------------
# The noise estimator g_φ(t|x)


class TruncatedNormal:
    """N(loc, scale²) restricted to [0, 1], one density for each of a batch: loc, scale (B,).

    Where loc is far outside [0, 1], the normal density underflows there. So it is taken relative to
    its value at the mode, the point of [0, 1] nearest to loc: with z = (t − loc)/scale, and d for z
    at the mode, it is f(t) = exp((d² − z²)/2). Computed in float64, returned in float32.
    """

    def __init__(self, loc, scale):
        self.loc, self.scale = loc.double(), scale.double()
        self.mode = self.loc.clamp(0, 1)
        self.d = (self.mode - self.loc) / self.scale                    # 0 where loc is in [0, 1]
        self.mass = self._integral(1.0) - self._integral(0.0)

    def _log_f(self, t):
        step = (t - self.mode) / self.scale                             # z − d
        return -step * (step / 2 + self.d)

    def _integral(self, t):
        """∫ f dz from the mode to t. erfcx(u) = exp(u²) erfc(u) does not underflow."""
        z = (t - self.loc) / self.scale
        tail = lambda z: torch.special.erfcx(z.abs() / math.sqrt(2)) / 2
        outside = torch.sign(t - self.mode) * (tail(self.d) - self._log_f(t).exp() * tail(z))
        inside = torch.special.ndtr(z) - 0.5
        return math.sqrt(2 * math.pi) * torch.where(self.d == 0, inside, outside)

    def log_prob(self, t):
        return (self._log_f(t) - self.scale.log() - self.mass.log()).float()

    def cdf(self, t):
        return ((self._integral(t) - self._integral(0.0)) / self.mass).float()

    def mean(self):
        ends = self._log_f(0.0).exp() - self._log_f(1.0).exp()
        return (self.loc + self.scale * ends / self.mass).clamp(0, 1).float()


class NoiseEstimator(nn.Module):
    """How noisy is x? A small network that answers with a density over the level, g_φ(t|x).

    Noise shows as energy where clean data has little: for centred Gaussian data, log p(x|t) is just
    a weighted sum of squares of x in the principal axes. So the features are mean squares, of
        maps    what a small convolutional network finds in 2×2 patches; it can learn to subtract
                what the neighbours predict. Its 1 + depth = 4 convolutions see 9×9 patches.
        bands   x in the 192 strongest principal axes of the data (8×8×3 has no more), averaged over
                16 bands of neighbouring axes, whose variances are nearly equal: what is global.
    From their logarithms an MLP, 128 wide, reads location and width of a truncated normal.
    x (B, in_channels, input_size, input_size) are pixels or latents. All is computed in fp32, since
    bf16 rounds by up to 0.4 %, as much as the noise at small t.
    """

    def __init__(self, input_size, in_channels, width=48, depth=3, maps=32, axes=192, bands=16,
                 tilts=8):
        super().__init__()
        self.patch = 1 if input_size % 2 else 2                 # 2×2 patches do not tile odd sizes
        patch, size = in_channels * self.patch**2, in_channels * input_size**2
        axes = min(axes, size)
        self.stem = nn.Conv2d(patch, width, 3, padding=1)
        self.blocks = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in range(depth))
        self.maps = nn.Conv2d(width + patch, maps, 1)
        self.axes = nn.Linear(size, axes)
        self.bands = nn.Parameter(torch.zeros(bands, axes))     # log weight of each axis in a band
        self.tilts = nn.Linear(size, tilts)     # data with a mean: log p(x|t) has linear terms too
        self.head = nn.Sequential(nn.Linear(2 * maps + bands + tilts, 128), nn.SiLU(),
                                  nn.Linear(128, 128), nn.SiLU(), nn.Linear(128, 2))
        nn.init.zeros_(self.head[-1].weight)                    # at first, one density for all x
        nn.init.zeros_(self.head[-1].bias)

    @torch.no_grad()
    def start_from(self, x0):
        """Begin with the principal axes of the data x0 (N, C, H, W), strongest first.

        N should be several times the number of axes, 192; estimator.py gives 2048.
        """
        x0, (bands, count) = x0.flatten(1), self.bands.shape
        axes = torch.pca_lowrank(x0, q=min(count, len(x0)), niter=4)[2].T
        self.axes.weight[:len(axes)] = axes
        self.axes.bias[:] = -self.axes.weight @ x0.mean(0) / 2  # E[x_t] = α(t) E[x_0], α about 1/2
        # In a band, an axis n bands away from its centre has the weight exp(−n²/4), or at least
        # exp(−8) = 0.0003 (n² is clamped at 32), so that training can still raise it.
        axis = torch.linspace(0, 1, count, device=x0.device)
        centre = torch.linspace(0, 1, bands, device=x0.device)[:, None]
        self.bands[:] = -((axis - centre) * bands).square().clamp(max=32) / 4

    def forward(self, x):
        """The density of the level of each image, a TruncatedNormal."""
        with torch.autocast(x.device.type, enabled=False):
            x = x.float()
            patches = F.pixel_unshuffle(x, self.patch)
            h = self.stem(patches)
            for block in self.blocks:
                h = h + block(F.silu(h))
            maps = self.maps(torch.cat([h, patches], 1))                # (B, maps, H / 2, W / 2)
            bands = F.linear(self.axes(x.flatten(1)).square(), self.bands.softmax(1))   # (B, bands)
            energies = torch.cat([maps.square().mean((2, 3)), bands], 1)
            # Half the log of an energy is the log of an amplitude, as log σ is. 1e-6 is the energy
            # of noise of σ = 0.001, a tenth of VP's lowest level, and keeps the log finite.
            amplitudes = (energies + 1e-6).log() / 2
            linear = [maps.mean((2, 3)), self.tilts(x.flatten(1))]
            loc, width = self.head(torch.cat([amplitudes, *linear], 1)).unbind(1)
            # From exp(−7) = 0.001 to 1, nearly flat on [0, 1]; 0.07 before training (width = 0).
            scale = torch.exp(7 * torch.sigmoid((width + 1) / 2) - 7)
            return TruncatedNormal(0.5 + loc, scale)

    def gradient(self, x, t):
        """∇_x log g_φ(t|x), (B, C, H, W) in fp32; t is a number, or a tensor () or (B,)."""
        with torch.enable_grad(), torch.autocast(x.device.type, enabled=False):
            x = x.detach().float().requires_grad_()
            return torch.autograd.grad(self(x).log_prob(t).sum(), x)[0]


# --------------------------------------------------------------------------------------------------
# Weights: files of torch.save and safetensors, the published ones, those of others' code


def refused(source, why, instead="give another file"):
    """A ValueError of one line. `why` may quote what the file holds, which can be anything."""
    return ValueError(f"{source} {' '.join(why.split())[:400]}; {instead}")


def read_safetensors(path):
    """The tensors of a .safetensors file: 8 bytes of length, the header in JSON, the numbers."""
    dtypes = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16,
              "BF16": torch.bfloat16, "I64": torch.int64, "I32": torch.int32, "U8": torch.uint8}
    data, tensors = np.memmap(path, mode="c"), {}
    length = int.from_bytes(data[:8], "little")
    header, numbers = json.loads(data[8:8 + length].tobytes()), data[8 + length:]
    header.pop("__metadata__", None)
    for name, entry in header.items():
        start, stop = entry["data_offsets"]
        tensor = torch.frombuffer(numbers[start:stop], dtype=dtypes[entry["dtype"]])
        tensors[name] = tensor.reshape(entry["shape"])
    return tensors


def load_file(path, otherwise="train one with: python train.py"):
    """The dict in a file of torch.save or safetensors; no code in the file is run.

    Raises ValueError if it is no checkpoint, or there is none, with what to do `otherwise`.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"no file {path}; {otherwise}")
    try:
        if path.suffix == ".safetensors":
            return read_safetensors(path)
        archive = zipfile.is_zipfile(path)          # older files, of before 2020, cannot be mapped
        with torch.serialization.safe_globals([argparse.Namespace]):
            checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=archive)
    except Exception as error:      # a dozen kinds, for damaged files and for pickles with code
        raise refused(path, f"is not a readable checkpoint ({type(error).__name__})") from None
    if not isinstance(checkpoint, dict):
        raise refused(path, f"holds a {type(checkpoint).__name__}, not a checkpoint")
    return checkpoint


def load_weights(network, state_dict, source):
    """Put all of `state_dict` into the network; ValueError names the tensors that do not fit."""
    def shape(value):
        plain = (torch.is_tensor(value) and value.layout == torch.strided and not value.is_nested
                 and not value.is_meta and not value.is_quantized and not value.is_complex())
        return tuple(value.shape) if plain else "no plain tensor"

    want = {key: tuple(value.shape) for key, value in network.state_dict().items()}
    have = {key: shape(value) for key, value in state_dict.items()}
    wrong = [f"{key} is {have.get(key, 'missing')}, expected {want.get(key, 'nothing')}"
             for key in sorted(want | have, key=str) if want.get(key) != have.get(key)]
    if wrong:
        raise refused(source, f"does not fit the model; for example, {'; '.join(wrong[:3])}")
    if sum(map(math.prod, want.values())) > 1e9:        # a small file can repeat one number
        raise refused(source, "has more than a billion weights")
    floats = {key: value.float() for key, value in state_dict.items()}
    on_meta = next(network.parameters()).is_meta
    network.load_state_dict(floats, assign=on_meta)     # assign: the tensors themselves, no copy


def restore(network, sizes, state_dict, source):
    """network(**sizes) with these weights, in eval mode; ValueError where that cannot be."""
    try:
        with torch.device("meta"):                      # no time or memory for weights of its own
            network = network(**sizes)
    except (ArithmeticError, RuntimeError, TypeError, ValueError) as error:
        raise refused(source, f"has no possible sizes ({error})") from None
    load_weights(network, state_dict, source)
    return network.eval().requires_grad_(False)


def fingerprint(network):
    """Sixteen hexadecimal digits that stand for the weights, however their file names them."""
    digest = hashlib.sha256()
    for value in network.state_dict().values():
        digest.update(value.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def download(url, instead, name=None):
    """The state dict at `url`, kept in pretrained/; ValueError with what to do `instead`."""
    try:
        return dict(torch.hub.load_state_dict_from_url(
            url, "pretrained", map_location="cpu", weights_only=True, file_name=name))
    except Exception as error:      # no network, no space, a damaged file
        instead = f"get the file by other means, and {instead}"
        raise refused(f"cannot download {url}", f"({error})", instead) from None


VAE_URL = ("https://huggingface.co/stabilityai/sd-vae-ft-ema/resolve/main/"
           "diffusion_pytorch_model.bin")
SIT_URL = "https://www.dl.dropboxusercontent.com/scl/fi/as9oeomcbub47de5g4be0/"
PUBLISHED = {       # name: model, where its weights are
    "DiT-XL/2": ("DiT-XL/2", "https://dl.fbaipublicfiles.com/DiT/models/DiT-XL-2-256x256.pt"),
    "DiT-XL/2-512": ("DiT-XL/2", "https://dl.fbaipublicfiles.com/DiT/models/DiT-XL-2-512x512.pt"),
    "SiT-XL/2": ("SiT-XL/2", f"{SIT_URL}SiT-XL-2-256.pt?rlkey=uxzxmpicu46coq3msb17b9ofa&dl=0"),
}


def load_vae(path=None):
    """The VAE in eval mode, from a file of its published weights (None: they are downloaded)."""
    if path:
        state = load_file(path, "give --vae the file of the weights, or leave it out")
    else:
        state = download(VAE_URL, "give --vae FILE", "sd-vae-ft-ema.bin")
    renamed = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
    for old, new in renamed.items():                    # the file at VAE_URL has the old names
        state = {str(key).replace(f".attentions.0.{old}.", f".attentions.0.{new}."): value
                 for key, value in state.items()}
    return restore(VAE, {}, state, path or VAE_URL).to(memory_format=torch.channels_last)


def load_estimator(path, otherwise="train one with: python estimator.py train"):
    """A noise estimator in eval mode and its settings; ValueError when the file holds none."""
    checkpoint = load_file(path, otherwise)
    settings, state = checkpoint.get("settings"), checkpoint.get("estimator")
    if not isinstance(settings, dict) or not isinstance(state, dict):
        raise refused(path, "is no noise estimator", otherwise)
    sizes = {key: settings.get(key) for key in ("input_size", "in_channels")}
    return restore(NoiseEstimator, sizes, state, path), settings


def convert_sit(state_dict):
    """The published SiT weights in our convention: time from data (0) to noise (1), ε − x_0.

    The published network counts time the other way and predicts x_0 − ε. cos ω(1−t) and sin ω(1−t)
    are a rotation of cos ωt and sin ωt: rotate the first time layer, and negate the output layer.
    """
    weight = state_dict["t_embedder.mlp.0.weight"]
    half = weight.shape[1] // 2
    omega = 10000 ** (-torch.arange(half, dtype=torch.float32) / half)  # in fp32, as the network's
    cos, sin = omega.double().cos(), omega.double().sin()
    on_cos, on_sin = weight.double().split(half, dim=1)
    rotated = torch.cat([on_cos * cos + on_sin * sin, on_cos * sin - on_sin * cos], 1)
    return {**state_dict, "t_embedder.mlp.0.weight": rotated.to(weight),
            "final_layer.linear.weight": -state_dict["final_layer.linear.weight"],
            "final_layer.linear.bias": -state_dict["final_layer.linear.bias"]}


def read_foreign(checkpoint, name, source):
    """State dict and settings of a checkpoint of DiT's, SiT's or fast-DiT's code, or weights alone.

    The model is the one that the file names, or else `name`; sizes follow from the tensors' shapes.
    """
    args = checkpoint.pop("args", {})               # a Namespace, or a dict
    args = args if isinstance(args, dict) else getattr(args, "__dict__", {})
    args = {key: value for key, value in args.items() if isinstance(value, str)}
    for key, known in (("path_type", "Linear"), ("prediction", "velocity")):
        if args.get(key, known) != known:
            raise refused(source, f"was trained with --{key.replace('_', '-')} {args[key]}",
                          f"of SiT's, only {known} is supported here")
    name = args["model"] if args.get("model") in MODELS else name
    if name not in MODELS:
        raise refused(source, "does not say which model it holds (DiT and SiT have equal tensors)",
                      "give --model, DiT-XL/2 or SiT-XL/2 for example")
    wrapped = [checkpoint.get(key) for key in ("ema", "model", "state_dict")]
    state = next((part for part in wrapped if isinstance(part, dict)), checkpoint)
    try:
        state = {re.sub(r"^((module|_orig_mod|net)\.)+", "", key): value      # left by wrappers
                 for key, value in state.items()}
        width, channels, patch, _ = state["x_embedder.proj.weight"].shape
        rows = state["y_embedder.embedding_table.weight"].shape[0]      # the last one is no class
        outputs = state["final_layer.linear.weight"].shape[0]
        size = math.isqrt(state["pos_embed"].shape[1]) * patch
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise refused(source, f"is no checkpoint of a DiT or SiT ({error})") from None
    trained = "t_embedder.null_embedding" in state      # true for weights that train.py wrote
    state.setdefault("t_embedder.null_embedding", torch.zeros(1).expand(width))    # a placeholder
    return state, {
        "model": name, "interpolant": "linear" if name.startswith("SiT") else "vp",
        "data": args.get("data_path") or "unknown", "input_size": size, "in_channels": channels,
        "image_size": size * VAE.factor if channels == VAE.channels else size,
        "num_classes": rows - 1, "learn_sigma": outputs == 2 * channels * patch**2,
        "class_drop": 0.1, "noise_drop": 0.1 if trained else 0.0}


def from_checkpoint(source, name=None):
    """A model in eval mode, with the averaged weights, and the settings it was trained with.

    source  a file of train.py or of the code of DiT, SiT or fast-DiT; or a name in PUBLISHED
    name    of the model, such as SiT-XL/2, where the file does not say it
    Published SiT weights are converted to our convention. A null embedding of the level that was
    never trained becomes the mean embedding over all levels. Raises ValueError when the file is
    damaged, of another kind, or does not fit its model.
    """
    if source in PUBLISHED:
        stated, url = PUBLISHED[source]
        if name and name != stated:
            raise refused(source, f"is not a {name}", "leave out --model")
        weights = download(url, f"give it, with --model {stated}, in place of {source}")
        checkpoint = weights | {"args": {"model": stated, "data_path": "imagenet"}}
    else:
        checkpoint = load_file(source)
    state, settings = checkpoint.get("ema"), checkpoint.get("settings")
    ours = isinstance(settings, dict) and isinstance(state, dict)
    if not ours:
        state, settings = read_foreign(checkpoint, name, source)
    # The file may hold anything: check what the other scripts rely on
    kinds = dict(model=str, interpolant=str, data=str, image_size=int, input_size=int,
                 in_channels=int, num_classes=int, learn_sigma=bool, class_drop=float,
                 noise_drop=float)
    for key, kind in kinds.items():
        if not isinstance(settings.get(key), kind):
            raise refused(source, f"has no usable {key} in its settings")
    if settings["model"] not in MODELS or settings["interpolant"] not in ("linear", "vp"):
        raise refused(source, f"holds a {settings['model']} on {settings['interpolant']}: unknown")
    if name and name != settings["model"]:
        raise refused(source, f"holds a {settings['model']}, not a {name}", "leave out --model")
    sizes = {k: settings[k] for k in ("input_size", "in_channels", "num_classes", "learn_sigma")}
    model = restore(MODELS[settings["model"]], sizes, state, source)
    classes = settings.setdefault("classes", [str(i) for i in range(model.num_classes)])
    if not isinstance(classes, list) or [type(c) for c in classes] != [str] * model.num_classes:
        raise refused(source, f"does not name its {model.num_classes} classes")
    if not settings["noise_drop"]:
        if not ours and settings["interpolant"] == "linear":
            model.load_state_dict(convert_sit(model.state_dict()), assign=True)
        steps = torch.arange(1000.0)                # the network's time is k on VP, t on Linear
        times = steps if settings["interpolant"] == "vp" else (steps + 0.5) / 1000
        mean = model.t_embedder(times).mean(0)
        model.t_embedder.null_embedding = nn.Parameter(mean, requires_grad=False)
    return model, settings
