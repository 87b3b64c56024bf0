"""The network: a diffusion transformer that can be asked with, and without, the noise level.

DiT (Peebles & Xie, 2023, arXiv 2212.09748) cuts the noisy state x_t into patches and runs a plain transformer over
them. The condition c = embed(t) + embed(y) enters through adaLN-Zero: it scales and shifts what goes into each layer
and gates what comes out, and every gate starts at zero, so that a fresh block is the identity. SiT (Ma et al., 2024,
arXiv 2401.08740) is the same network trained as a flow.

Two of its embeddings have a null:
    class   row `num_classes` of the label table     for classifier-free guidance
    level   `t_embedder.null_embedding`              for noise awareness guidance, D(null, y)

Names and shapes are those of the published checkpoints, which lack but the null embedding of the level; `from_checkpoint` adds
it, and turns SiT's time and sign into ours. Below the transformer stand the autoencoder for latents, the noise estimator's network
(here, because sample.py guides by it), and the loading of weights, others' among them.

    model = MODELS["SiT-XL/2"](input_size=32, in_channels=4, num_classes=1000)
    out = model(x, t, y)                               # t is the network's own time, see diffusion.py
    out = model(x, t, y, drop_noise=torch.ones(len(x), dtype=torch.bool))
"""
import argparse
import hashlib
import math
import zipfile
from functools import partial
from pathlib import Path

import torch
import torch.utils.checkpoint
from torch import nn
from torch.nn import functional as F


# ---------------------------------------------------------------------------------------------------------------------
# Embeddings: the patch position, the noise level, the class


def sincos_2d(width, side):
    """Fixed position table (1, side², width): half of the channels tell the column, half the row, as [sin, cos]."""
    if width % 4:
        raise ValueError(f"the hidden size must be a multiple of 4 for the position table, not {width}")
    omega = 10000 ** (-torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    angle = torch.arange(side, dtype=torch.float64)[:, None] * omega                   # (side, width / 4)
    line = torch.cat([angle.sin(), angle.cos()], dim=1)                                # (side, width / 2)
    column = line[None, :, :].expand(side, side, -1)
    row = line[:, None, :].expand(side, side, -1)
    return torch.cat([column, row], dim=2).reshape(1, side * side, width).float()


class PatchEmbed(nn.Module):
    """(B, C, H, W) -> (B, tokens, hidden): a linear map of each patch, written as a convolution."""

    def __init__(self, patch_size, in_channels, hidden_size):
        super().__init__()
        self.proj = nn.Conv2d(in_channels, hidden_size, patch_size, stride=patch_size)

    def forward(self, x):
        return self.proj(x).flatten(2).transpose(1, 2)


class TimestepEmbedder(nn.Module):
    """Embeds the network's time (B,), or stands the learned null embedding in its place where `drop_noise` is True."""

    features = 256

    def __init__(self, hidden_size):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(self.features, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size))
        self.null_embedding = nn.Parameter(torch.empty(hidden_size))

    def forward(self, t, drop_noise=None):
        half = self.features // 2
        freqs = 10000 ** (-torch.arange(half, dtype=torch.float32, device=t.device) / half)
        angle = t[:, None].float() * freqs
        emb = self.mlp(torch.cat([angle.cos(), angle.sin()], dim=1).to(self.null_embedding.dtype))
        if drop_noise is None:
            return emb
        return torch.where(drop_noise[:, None], self.null_embedding.to(emb.dtype), emb)


class LabelEmbedder(nn.Module):
    """Embeds y (B,) in 0..num_classes; the last row is the null class."""

    def __init__(self, num_classes, hidden_size):
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + 1, hidden_size)

    def forward(self, y):
        return self.embedding_table(y)


# ---------------------------------------------------------------------------------------------------------------------
# The transformer


class Attention(nn.Module):
    def __init__(self, hidden_size, num_heads):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size)
        self.proj = nn.Linear(hidden_size, hidden_size)

    def forward(self, x):
        B, N, D = x.shape
        qkv = self.qkv(x).view(B, N, 3, self.num_heads, D // self.num_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)                                            # (B, heads, N, D / heads) each
        if q.device.type == "cpu" and q.dtype == torch.bfloat16:       # written out: there 1.5 to 5 times as fast
            out = (q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1)).softmax(-1) @ v
        else:
            out = F.scaled_dot_product_attention(q, k, v)
        return self.proj(out.transpose(1, 2).reshape(B, N, D))


class Mlp(nn.Module):
    def __init__(self, hidden_size):
        super().__init__()
        self.fc1 = nn.Linear(hidden_size, 4 * hidden_size)
        self.fc2 = nn.Linear(4 * hidden_size, hidden_size)

    def forward(self, x):
        weight, bias = self.fc1.weight, self.fc1.bias
        if weight.device.type == "cpu" and weight.dtype == torch.bfloat16 and not torch.is_grad_enabled() and not torch.compiler.is_compiling():
            # oneDNN bends the product while it is in the cache: 10 % less time for a whole network (sample.py keeps such weights)
            return self.fc2(torch.ops.mkldnn._linear_pointwise(x.to(torch.bfloat16), weight, bias, "gelu", [], "tanh"))
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


def modulate(x, shift, scale):
    return x * (1 + scale[:, None]) + shift[:, None]                                    # (B, N, D), (B, D), (B, D)


class DiTBlock(nn.Module):
    def __init__(self, hidden_size, num_heads):
        super().__init__()
        self.norm1 = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.attn = Attention(hidden_size, num_heads)
        self.norm2 = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.mlp = Mlp(hidden_size)
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

    input_size     height = width of the input, in latent pixels (or image pixels, without a VAE)
    in_channels    C of the input
    learn_sigma    also output C channels for the variance (unused on the linear interpolant)
    Raises ValueError when patches do not tile the input or heads do not divide the width.
    """

    def __init__(self, input_size=32, patch_size=2, in_channels=4, hidden_size=1152, depth=28, num_heads=16,
                 num_classes=1000, learn_sigma=True):
        super().__init__()
        if input_size % patch_size:
            raise ValueError(f"patches of {patch_size} do not tile an input of {input_size}×{input_size}; "
                             f"use a multiple of {patch_size}")
        if hidden_size % num_heads:
            raise ValueError(f"{num_heads} heads do not divide a width of {hidden_size}")
        self.input_size, self.patch_size, self.in_channels = input_size, patch_size, in_channels
        self.num_classes, self.learn_sigma, self.grad_checkpoint = num_classes, learn_sigma, False
        self.out_channels = in_channels * (2 if learn_sigma else 1)

        self.x_embedder = PatchEmbed(patch_size, in_channels, hidden_size)
        self.t_embedder = TimestepEmbedder(hidden_size)
        self.y_embedder = LabelEmbedder(num_classes, hidden_size)
        self.blocks = nn.ModuleList(DiTBlock(hidden_size, num_heads) for _ in range(depth))
        self.final_layer = FinalLayer(hidden_size, patch_size, self.out_channels)
        self.register_buffer("pos_embed", sincos_2d(hidden_size, input_size // patch_size))
        self.initialize()

    def initialize(self):
        """adaLN-Zero: the fresh network outputs 0 for every input, and learns from the output layer inwards."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.x_embedder.proj.weight.flatten(1))
        nn.init.zeros_(self.x_embedder.proj.bias)
        for weight in (self.y_embedder.embedding_table.weight, self.t_embedder.mlp[0].weight,
                       self.t_embedder.mlp[2].weight, self.t_embedder.null_embedding):
            nn.init.normal_(weight, std=0.02)
        for module in [block.adaLN_modulation[1] for block in self.blocks] + [self.final_layer.adaLN_modulation[1],
                                                                             self.final_layer.linear]:
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)

    def unpatchify(self, x):
        """(B, tokens, patch² · C) -> (B, C, H, W)."""
        side, p = self.input_size // self.patch_size, self.patch_size
        x = x.view(-1, side, side, p, p, self.out_channels)
        return x.permute(0, 5, 1, 3, 2, 4).reshape(-1, self.out_channels, self.input_size, self.input_size)

    def forward(self, x, t, y, drop_noise=None):
        """Prediction (B, C or 2C, H, W) for the state x (B, C, H, W).

        t (B,) is the network's own time (t itself on Linear, the DDPM step k on VP), y (B,) int64 in 0..num_classes,
        drop_noise (B,) bool or None: where True, the level is hidden from the network.
        """
        tokens = self.x_embedder(x) + self.pos_embed
        c = self.t_embedder(t, drop_noise) + self.y_embedder(y)
        for block in self.blocks:
            if self.grad_checkpoint and torch.is_grad_enabled():  # keep what goes into a block, and compute the inside again
                tokens = torch.utils.checkpoint.checkpoint(block, tokens, c, use_reentrant=False, preserve_rng_state=False)
            else:
                tokens = block(tokens, c)
        return self.unpatchify(self.final_layer(tokens, c).float())

    def flops(self):
        """Floating-point operations of one forward pass for one image: its matrix products, a multiply-add being 2."""
        N, D, depth = self.pos_embed.shape[1], self.pos_embed.shape[2], len(self.blocks)
        patch = self.patch_size ** 2
        per_token = patch * self.in_channels * D + depth * 12 * D * D + D * patch * self.out_channels
        attention = depth * 2 * N * N * D
        condition = TimestepEmbedder.features * D + D * D + depth * 6 * D * D + 2 * D * D
        return 2 * (N * per_token + attention + condition)


SIZES = {  #       width, depth, heads
    "Ti": (128, 6, 4),           # two CPU cores
    "S": (384, 12, 6),
    "B": (768, 12, 12),
    "L": (1024, 24, 16),
    "XL": (1152, 28, 16),
}
MODELS = {f"{family}-{size}/{patch}": partial(DiT, patch_size=patch, hidden_size=width, depth=depth, num_heads=heads)
          for family in ("DiT", "SiT") for size, (width, depth, heads) in SIZES.items() for patch in (2, 4, 8)}


# ---------------------------------------------------------------------------------------------------------------------
# The autoencoder of Stable Diffusion (Rombach et al., 2022): 8×8 pixels become one latent pixel of 4 channels


class ResnetBlock(nn.Module):
    def __init__(self, in_channels, out_channels):
        super().__init__()
        self.norm1 = nn.GroupNorm(32, in_channels, eps=1e-6)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = nn.GroupNorm(32, out_channels, eps=1e-6)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else None

    def forward(self, x):
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return h + (self.conv_shortcut(x) if self.conv_shortcut else x)


class PixelAttention(nn.Module):
    """Every latent pixel looks at every other, with one head."""

    def __init__(self, channels):
        super().__init__()
        self.group_norm = nn.GroupNorm(32, channels, eps=1e-6)
        self.to_q, self.to_k, self.to_v = (nn.Linear(channels, channels) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])

    def forward(self, x):
        pixels = self.group_norm(x).flatten(2).transpose(1, 2)                          # (B, H W, C)
        out = F.scaled_dot_product_attention(*(to(pixels)[:, None] for to in (self.to_q, self.to_k, self.to_v)))
        return x + self.to_out[0](out[:, 0]).transpose(1, 2).reshape(x.shape)


class Halve(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x):
        return self.conv(F.pad(x, (0, 1, 0, 1)))                                        # to the right and below only


class Double(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x):
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Stage(nn.Module):
    """Residual blocks of one resolution, then, between two stages, the way to the next."""

    def __init__(self, in_channels, out_channels, depth, downsample=False, upsample=False):
        super().__init__()
        self.resnets = nn.ModuleList(ResnetBlock(out_channels if i else in_channels, out_channels) for i in range(depth))
        self.downsamplers = nn.ModuleList([Halve(out_channels)] if downsample else [])
        self.upsamplers = nn.ModuleList([Double(out_channels)] if upsample else [])

    def forward(self, x):
        for part in (*self.resnets, *self.downsamplers, *self.upsamplers):
            x = part(x)
        return x


class MidBlock(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.attentions = nn.ModuleList([PixelAttention(channels)])
        self.resnets = nn.ModuleList(ResnetBlock(channels, channels) for _ in range(2))

    def forward(self, x):
        return self.resnets[1](self.attentions[0](self.resnets[0](x)))


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        widths = 128, 256, 512, 512
        self.conv_in = nn.Conv2d(3, widths[0], 3, padding=1)
        self.down_blocks = nn.ModuleList(Stage(widths[max(i - 1, 0)], width, 2, downsample=i < 3) for i, width in enumerate(widths))
        self.mid_block = MidBlock(widths[-1])
        self.conv_norm_out = nn.GroupNorm(32, widths[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(widths[-1], 2 * VAE.channels, 3, padding=1)

    def forward(self, x):
        x = self.conv_in(x)
        for stage in self.down_blocks:
            x = stage(x)
        return self.conv_out(F.silu(self.conv_norm_out(self.mid_block(x))))


class Decoder(nn.Module):
    def __init__(self):
        super().__init__()
        widths = 512, 512, 256, 128
        self.conv_in = nn.Conv2d(VAE.channels, widths[0], 3, padding=1)
        self.mid_block = MidBlock(widths[0])
        self.up_blocks = nn.ModuleList(Stage(widths[max(i - 1, 0)], width, 3, upsample=i < 3) for i, width in enumerate(widths))
        self.conv_norm_out = nn.GroupNorm(32, widths[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(widths[-1], 3, 3, padding=1)

    def forward(self, x):
        x = self.mid_block(self.conv_in(x))
        for stage in self.up_blocks:
            x = stage(x)
        return self.conv_out(F.silu(self.conv_norm_out(x)))


class VAE(nn.Module):
    """The Stable Diffusion AutoencoderKL; parameter names are those of the published file. It is used here, never trained.

    Latents are scaled by 0.18215, so that they have about unit variance. Works through a batch in chunks of as many images
    as have `pixels` pixels (8 of 256×256: less than 2 GB in fp32).
    """

    factor, channels, scale, pixels = 8, 4, 0.18215, 2**19
    decode_flops = 9.5e6                                          # per pixel, at 256×256

    def __init__(self):
        super().__init__()
        self.encoder, self.decoder = Encoder(), Decoder()
        self.quant_conv = nn.Conv2d(2 * self.channels, 2 * self.channels, 1)
        self.post_quant_conv = nn.Conv2d(self.channels, self.channels, 1)

    def in_chunks(self, network, x, pixels):
        allowed, torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.allow_tf32, True           # 10 bits are enough for pictures
        parts = [network(part.contiguous(memory_format=torch.channels_last)).float() for part in x.split(max(1, self.pixels // pixels))]
        torch.backends.cudnn.allow_tf32 = allowed
        return torch.cat(parts)

    @torch.no_grad()
    def encode(self, images):
        """Mean and standard deviation of the latents' posterior, (B, 4, H / 8, W / 8) each, of images (B, 3, H, W) in [−1, 1].

        Raises ValueError unless 8 divides H and W.
        """
        height, width = images.shape[2:]
        if height % self.factor or width % self.factor:
            raise ValueError(f"the VAE halves images three times, and {height}×{width} cannot be: give a multiple of {self.factor}")
        moments = self.in_chunks(lambda part: self.quant_conv(self.encoder(part)), images, height * width)
        mean, log_var = moments.chunk(2, dim=1)
        return self.scale * mean, self.scale * (log_var.clamp(-30, 20) / 2).exp()

    @torch.no_grad()
    def decode(self, latents):
        """Images (B, 3, 8 H, 8 W), about in [−1, 1], of latents (B, 4, H, W)."""
        pixels = self.factor**2 * latents.shape[2] * latents.shape[3]
        return self.in_chunks(lambda part: self.decoder(self.post_quant_conv(part)), latents / self.scale, pixels)


# ---------------------------------------------------------------------------------------------------------------------
# The noise estimator g_φ(t|x)


class TruncatedNormal:
    """N(loc, scale²) restricted to [0, 1], one density for each of a batch: loc, scale (B,)."""

    def __init__(self, loc, scale):
        self.loc, self.scale = loc, scale
        self.left, self.right = -loc / scale, (1 - loc) / scale
        self.log_mass = self._log_between(self.left, self.right)

    @staticmethod
    def _log_between(a, b):
        """log(Φ(b) − Φ(a)) for a < b, in the lower tail and in logarithms, so that it holds far outside [0, 1] too."""
        upper = a + b > 0
        a, b = torch.where(upper, -b, a), torch.where(upper, -a, b)
        log_a, log_b = torch.special.log_ndtr(a), torch.special.log_ndtr(b)
        return log_b + torch.log(-torch.expm1((log_a - log_b).clamp(max=-1e-6)))

    def log_prob(self, t):
        return -((t - self.loc) / self.scale).square() / 2 - self.scale.log() - math.log(2 * math.pi) / 2 - self.log_mass

    def cdf(self, t):
        return torch.exp(self._log_between(self.left, (t - self.loc) / self.scale) - self.log_mass)

    def mean(self):
        log_pdf = lambda z: -z.square() / 2 - math.log(2 * math.pi) / 2
        part = lambda z: torch.exp(log_pdf(z) - self.log_mass)
        return (self.loc + self.scale * (part(self.left) - part(self.right))).clamp(0, 1)


class NoiseEstimator(nn.Module):
    """How noisy is x? A small network that answers with a density over the level, g_φ(t|x), a truncated Gaussian.

    Noise is what is left when the picture is explained away, and its level is an energy: so both parts below end in squares,
    averaged, and a small MLP reads location and width off their logarithms. (For centred Gaussian data log p(x|t) is a weighted sum
    of squares in the data's principal axes; a band averages neighbours of nearly equal variance, and loses little.)
        maps    a convolutional network over 2×2 patches, free to leave of x what its neighbourhood does not predict
        bands   the whole image in the data's principal axes, in bands from strong to weak; good for what is global
    Input (B, in_channels, input_size, input_size), pixels or latents; it reads in fp32, under autocast too.
    """

    def __init__(self, input_size, in_channels, width=48, depth=3, maps=32, axes=192, bands=16, tilts=8):
        super().__init__()
        self.input_size, self.in_channels = input_size, in_channels
        self.patch = 1 if input_size % 2 else 2
        patch, size = in_channels * self.patch**2, in_channels * input_size**2
        self.stem = nn.Conv2d(patch, width, 3, padding=1)
        self.blocks = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in range(depth))
        self.maps = nn.Conv2d(width + patch, maps, 1)
        self.axes = nn.Linear(size, min(axes, size))
        self.bands = nn.Parameter(torch.zeros(bands, min(axes, size)))
        self.tilts = nn.Linear(size, tilts)                       # a few linear features, for data whose mean is not zero
        self.head = nn.Sequential(nn.Linear(2 * maps + bands + tilts, 128), nn.SiLU(), nn.Linear(128, 128), nn.SiLU(), nn.Linear(128, 2))
        nn.init.zeros_(self.head[-1].weight)
        nn.init.zeros_(self.head[-1].bias)

    @torch.no_grad()
    def start_from(self, x0):
        """Begin with the principal axes of these data (N, C, H, W), from strong to weak, and bands of neighbouring ones."""
        x0, count = x0.flatten(1), self.axes.out_features
        axes = torch.pca_lowrank(x0, q=min(count, len(x0)), niter=4)[2].T
        self.axes.weight[:len(axes)] = axes
        self.axes.bias[:] = -self.axes.weight @ x0.mean(0) / 2    # centred for levels in the middle, where the mean of x is about half of that
        place, centre = torch.linspace(0, 1, count, device=x0.device), torch.linspace(0, 1, len(self.bands), device=x0.device)
        self.bands[:] = -((place - centre[:, None]) * len(self.bands)).square().clamp(max=32) / 4

    def forward(self, x):
        with torch.autocast(x.device.type, enabled=False):
            x = x.float()
            patches = F.pixel_unshuffle(x, self.patch)
            h = self.stem(patches)
            for block in self.blocks:
                h = h + block(F.silu(h))
            maps = self.maps(torch.cat([h, patches], 1))                                # (B, maps, H / 2, W / 2)
            bands = F.linear(self.axes(x.flatten(1)).square(), self.bands.softmax(1))   # (B, bands)
            energies = torch.cat([maps.square().mean((2, 3)), bands], 1)
            features = torch.cat([(energies + 1e-6).log() / 2, maps.mean((2, 3)), self.tilts(x.flatten(1))], 1)
            loc, width = self.head(features).unbind(1)
            return TruncatedNormal(0.5 + loc, torch.exp(7 * torch.sigmoid((width + 1) / 2) - 7))     # widths of 0.001 to 1

    def gradient(self, x, t):
        """∇_x log g_φ(t|x), (B, C, H, W), for levels t, a number or a tensor () or (B,)."""
        with torch.enable_grad():
            x = x.detach().float().requires_grad_()
            t = torch.as_tensor(t, dtype=torch.float32, device=x.device)
            return torch.autograd.grad(self(x).log_prob(t).sum(), x)[0]


# ---------------------------------------------------------------------------------------------------------------------
# Weights


def convert_sit(state_dict):
    """The published SiT weights in our convention: time from data (0) to noise (1), prediction ε − x_0.

    The published network counts time the other way and predicts x_0 − ε. cos ω(1−t) and sin ω(1−t) are a rotation of
    cos ωt and sin ωt, so turning the first time layer by the angles ω, and negating the output layer, says the same.
    """
    out = dict(state_dict)
    weight = state_dict["t_embedder.mlp.0.weight"]
    half = weight.shape[1] // 2
    omega = 10000 ** (-torch.arange(half, dtype=torch.float32) / half)                  # as the network rounds them
    cos, sin = omega.double().cos(), omega.double().sin()
    on_cos, on_sin = weight.double().split(half, dim=1)
    out["t_embedder.mlp.0.weight"] = torch.cat([on_cos * cos + on_sin * sin, on_cos * sin - on_sin * cos], 1).to(weight)
    for key in ("final_layer.linear.weight", "final_layer.linear.bias"):
        out[key] = -state_dict[key]
    return out


def load_file(path, otherwise="train one with: python train.py"):
    """The dict in a checkpoint file; nothing in the file is executed. Raises ValueError when it is no checkpoint."""
    if not Path(path).is_file():
        raise ValueError(f"no file {path}; {otherwise}")
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))      # files of before 2020 are no archives
    except Exception as error:  # torch.load raises a dozen kinds, for damaged files and for pickles that carry code
        raise ValueError(f"{path} is not a readable checkpoint ({type(error).__name__}); give another file") from None
    if not isinstance(checkpoint, dict):
        raise ValueError(f"{path} holds a {type(checkpoint).__name__}, not a checkpoint; give another file")
    return checkpoint


def load_weights(model, state_dict, source):
    """Put `state_dict` into `model`, all of it; raises ValueError naming the tensors that do not fit.

    A model on the meta device takes the tensors themselves, others a copy.
    """
    want = {k: tuple(v.shape) for k, v in model.state_dict().items()}
    have = {k: tuple(v.shape) if torch.is_tensor(v) else type(v).__name__ for k, v in state_dict.items()}
    wrong = [f"{k} is {have.get(k, 'missing')}, expected {want.get(k, 'nothing')}"
             for k in sorted(want.keys() | have.keys()) if want.get(k) != have.get(k)]
    if wrong:
        more = f" (and {len(wrong) - 3} more)" if len(wrong) > 3 else ""
        raise ValueError(f"{source} does not fit the model: {'; '.join(wrong[:3])}{more}")
    model.load_state_dict({k: v.float() for k, v in state_dict.items()}, assign=any(p.is_meta for p in model.parameters()))


DIT, SIT = "https://dl.fbaipublicfiles.com/DiT/models/", "https://www.dl.dropboxusercontent.com/scl/fi/"
PUBLISHED = {                                                     # name: model, where its weights are
    "DiT-XL/2": ("DiT-XL/2", DIT + "DiT-XL-2-256x256.pt"),
    "DiT-XL/2-512": ("DiT-XL/2", DIT + "DiT-XL-2-512x512.pt"),
    "SiT-XL/2": ("SiT-XL/2", SIT + "as9oeomcbub47de5g4be0/SiT-XL-2-256.pt?rlkey=uxzxmpicu46coq3msb17b9ofa&dl=0"),
}
VAE_URL = "https://huggingface.co/stabilityai/sd-vae-ft-ema/resolve/main/diffusion_pytorch_model.bin"


def download(url, instead, name=None):
    """The state dict at `url`, kept in pretrained/ (as `name`) for the next time. Raises ValueError that says how to give a local file `instead`."""
    try:
        return torch.hub.load_state_dict_from_url(url, "pretrained", map_location="cpu", weights_only=True, file_name=name)
    except Exception as error:  # no network, no space, a damaged file
        raise ValueError(f"cannot download {url} ({error}); get the file by other means, and {instead}") from None


def load_vae(path=None):
    """The VAE in eval mode, from a file of its published weights (None: downloaded), in either naming of the attention."""
    state = load_file(path, "give --vae the file of the weights, or leave it out to download them") if path else \
        download(VAE_URL, "give --vae FILE", "sd-vae-ft-ema.bin")
    for old, new in (("query", "to_q"), ("key", "to_k"), ("value", "to_v"), ("proj_attn", "to_out.0")):
        state = {key.replace(f".attentions.0.{old}.", f".attentions.0.{new}."): value for key, value in state.items()}
    with torch.device("meta"):
        vae = VAE()
    load_weights(vae, state, path or VAE_URL)
    return vae.eval().requires_grad_(False).to(memory_format=torch.channels_last)


def fingerprint(model):
    """Sixteen hexadecimal digits that stand for the weights, however their file names them."""
    digest = hashlib.sha256()
    for value in model.state_dict().values():
        digest.update(value.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def from_checkpoint(source, name=None):
    """A model in eval mode, with the averaged weights, and the settings it was trained with.

    source  a checkpoint of train.py, of the training code of DiT, SiT or fast-DiT, a bare state dict of these, or a name in PUBLISHED
    name    of the model, such as SiT-XL/2: for a file that does not say it, since DiT and SiT have the same tensors
    Weights of SiT are turned into our convention; a null noise embedding that is lacking, or was never trained, becomes the mean over the levels.
    Raises ValueError when the file is damaged, of another kind, or does not fit its model.
    """
    if source in PUBLISHED:
        own, url = PUBLISHED[source]
        if name and name != own:
            raise ValueError(f"{source} is not a {name}; leave out --model")
        state, settings = foreign(download(url, f"give it, with --model {own}, in place of {source}"), own, source)
        settings["data"] = "imagenet"
    else:
        checkpoint = load_file(source)
        settings = checkpoint.get("settings")
        if isinstance(settings, dict):
            state = checkpoint.get("ema")
            if not isinstance(state, dict):
                raise ValueError(f"{source} is no checkpoint of train.py: it lacks 'ema'; give another file")
            if name and name != settings.get("model"):
                raise ValueError(f"{source} holds a {settings.get('model')}, not a {name}; leave out --model")
        else:
            state, settings = foreign(checkpoint, name, source)
    try:
        with torch.device("meta"):                                # no time and memory for weights that are replaced
            model = MODELS[settings["model"]](**{k: settings[k] for k in
                                                 ("input_size", "in_channels", "num_classes", "learn_sigma")})
        kinds = {"interpolant": str, "data": str, "image_size": int, "classes": list, "noise_drop": (int, float), "class_drop": (int, float)}
        wrong = [key for key, kind in kinds.items() if not isinstance(settings[key], kind)]
        if wrong or settings["interpolant"] not in ("linear", "vp") or [type(name) for name in settings["classes"]] != [str] * settings["num_classes"]:
            raise ValueError(f"wrong {', '.join(wrong) or 'interpolant or classes'}")
    except (KeyError, TypeError, ValueError, RuntimeError, ArithmeticError) as error:
        raise ValueError(f"{source} has settings that name no model of ours ({' '.join(str(error).split())[:100]}); give another file") from None
    load_weights(model, state, source)
    if not settings["noise_drop"]:                                # nothing was learned for a hidden level: begin in the middle of what was
        levels = torch.arange(1000.0) if settings["interpolant"] == "vp" else (torch.arange(1000) + 0.5) / 1000
        with torch.no_grad():
            model.t_embedder.null_embedding = nn.Parameter(model.t_embedder(levels).mean(0))
    return model.eval().requires_grad_(False), settings


def foreign(checkpoint, name, source):
    """State dict and settings, both in our convention, of a checkpoint that others' code wrote; sizes are told by the shapes."""
    state = next((checkpoint[key] for key in ("ema", "model") if isinstance(checkpoint.get(key), dict)), checkpoint)
    args = checkpoint.get("args")
    if isinstance(args, argparse.Namespace):                      # of the training code of DiT, SiT and fast-DiT
        said = getattr(args, "model", None)
        if name and said and name != said:
            raise ValueError(f"{source} holds a {said}, not a {name}; leave out --model")
        name = name or said
        for key, ours in (("path_type", "Linear"), ("prediction", "velocity")):
            if getattr(args, key, ours) != ours:
                raise ValueError(f"{source} was trained with --{key.replace('_', '-')} {getattr(args, key)}; of SiT's, only {ours} is known here")
    if name not in MODELS:
        raise ValueError(f"{source} does not say which model it holds, and DiT and SiT have the same tensors; "
                         f"give --model, DiT-XL/2 or SiT-XL/2 for example")
    try:
        state = {key.removeprefix("module.").removeprefix("_orig_mod."): value for key, value in state.items()}
        width, channels, patch, _ = state["x_embedder.proj.weight"].shape
        settings = {
            "model": name, "interpolant": "linear" if name.startswith("SiT") else "vp", "in_channels": channels,
            "input_size": math.isqrt(state["pos_embed"].shape[1]) * patch,
            "num_classes": state["y_embedder.embedding_table.weight"].shape[0] - 1,      # the last row is no class
            "learn_sigma": state["final_layer.linear.weight"].shape[0] == 2 * channels * patch**2,
            "class_drop": 0.1, "data": str(getattr(args, "data_path", None) or "unknown"),
        }
        settings["image_size"] = settings["input_size"] * (VAE.factor if channels == VAE.channels else 1)
        settings["classes"] = [str(i) for i in range(settings["num_classes"])]
        trained_here = "t_embedder.null_embedding" in state       # weights of train.py, taken out of their checkpoint
        settings["noise_drop"] = 0.1 if trained_here else 0.0
        if not trained_here:
            state = convert_sit(state) if name.startswith("SiT") else state
            state["t_embedder.null_embedding"] = torch.zeros(width)          # its place; from_checkpoint fills it
    except (AttributeError, KeyError, ValueError, RuntimeError, IndexError) as error:
        raise ValueError(f"{source} is no checkpoint of a DiT or SiT ({' '.join(str(error).split())[:100]}); give another file") from None
    return state, settings


def load_estimator(path, otherwise="train one with: python estimator.py train"):
    """A noise estimator in eval mode and the settings it was trained with, from a file of `estimator.py train`.

    Raises ValueError when the file is damaged or none of these.
    """
    checkpoint = load_file(path, otherwise)
    settings = checkpoint.get("settings")
    if not isinstance(settings, dict) or not isinstance(checkpoint.get("estimator"), dict):
        raise ValueError(f"{path} is no noise estimator; {otherwise}")
    try:
        with torch.device("meta"):
            estimator = NoiseEstimator(settings["input_size"], settings["in_channels"])
    except (KeyError, TypeError, ValueError, RuntimeError, ArithmeticError) as error:
        raise ValueError(f"{path} has settings that name no estimator of ours ({' '.join(str(error).split())[:100]}); give another file") from None
    load_weights(estimator, checkpoint["estimator"], path)
    return estimator.eval().requires_grad_(False), settings
