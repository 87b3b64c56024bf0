"""FID, sFID, Inception Score, precision and recall, as the ADM evaluation suite defines them, in one file.

    python fid.py samples.npz VIRTUAL_imagenet256_labeled.npz   # what DiT, SiT and the NAG paper quote
    python fid.py samples.npz folder/of/images --save-stats reference.npz
    python fid.py samples.npz shapes                            # the drawn data: FD-random, precision, recall
    python fid.py runs/*/shift/*.npz shapes                     # a table, with mean and standard deviation over seeds

Images become features of a fixed network (Inception for natural images, a random one for the drawn shapes), and two sets of
images are compared by their features' distributions:

    FID        Fréchet distance |μ_a − μ_b|² + tr(Σ_a + Σ_b − 2 √(Σ_a Σ_b)) of the pool features (Heusel et al., 2017)
    sFID       the same of spatial features, 7 channels of 17×17 places (Nash et al., 2021)
    IS         exp E KL(p(class|x) ‖ p(class)) (Salimans et al., 2016)
    precision  the part of the samples that lie within the real data, taken as balls that reach to the third neighbour
    recall     the part of the real data that lie within the samples (both: Kynkäänniemi et al., 2019)

Either side is an .npz with arr_0 (N, H, W, 3) uint8, a folder of images, an .npz of statistics (mu, sigma, mu_s, sigma_s), or
`shapes`. Images are read in a stream; memory holds the features.
"""
import hashlib
import itertools
import json
import math
import os
import re
import shutil
import sys
import zipfile
import zlib
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image, ImageDraw, ImageFont
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm

import models
from estimator import FINE, STYLES, Panel, legend
from train import (RANK, WORKERS, WORLD, Arguments, ImageFolder, Shapes, UnreadableImage, agree, centre_crop, generator, ignore_signals,
                   is_drawn, join_ranks, lock, number, one_line_errors, rank_0_first, read_image, replacing, stop, write_at)

INCEPTION_URL = "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth"


# ---------------------------------------------------------------------------------------------------------------------
# The Inception network of 2015 (Szegedy et al., arXiv 1512.00567), as TensorFlow ran it for FID


class Conv(nn.Module):
    """Convolution, batch norm, ReLU; padded to keep the size where its stride is 1 and `same`."""

    def __init__(self, channels, out, kernel, stride=1, same=True):
        super().__init__()
        height, width = (kernel, kernel) if isinstance(kernel, int) else kernel
        padding = (height // 2, width // 2) if same and stride == 1 else 0
        self.conv = nn.Conv2d(channels, out, (height, width), stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(out, eps=1e-3)

    def forward(self, x):
        return F.relu(self.bn(self.conv(x)))


class Mixed(nn.Module):
    """Branches of convolutions side by side, one of them behind a 3×3 pool, joined along the channels.

    branches   {name: [(out, kernel[, stride]), …]}; a list in place of a tuple forks, and joins again at once
    pool       avg (without the padding), max, or down (max, stride 2)
    """

    def __init__(self, channels, pool, branches):
        super().__init__()
        self.pool, self.branches = pool, []
        for name, layers in branches.items():
            names, width = [], channels
            for i, layer in enumerate(layers, 1):
                fork = layer if isinstance(layer, list) else [layer]
                names.append([f"{name}_{i}{'abc'[j] if len(fork) > 1 else ''}" if len(layers) > 1 else name for j in range(len(fork))])
                for key, spec in zip(names[-1], fork):
                    self.add_module(key, Conv(width, *spec))
                width = sum(spec[0] for spec in fork)
            self.branches.append((name, names))

    def forward(self, x):
        joined = []
        for name, layers in self.branches:
            h = x
            if name == "branch_pool":
                h = {"avg": lambda: F.avg_pool2d(x, 3, 1, 1, count_include_pad=False), "max": lambda: F.max_pool2d(x, 3, 1, 1),
                     "down": lambda: F.max_pool2d(x, 3, 2)}[self.pool]()
            for fork in layers:
                h = torch.cat([getattr(self, key)(h) for key in fork], 1)
            joined.append(h)
        return torch.cat(joined, 1)


def mixed_35(channels, pool):
    return Mixed(channels, "avg", {"branch1x1": [(64, 1)], "branch5x5": [(48, 1), (64, 5)], "branch3x3dbl": [(64, 1), (96, 3), (96, 3)],
                                   "branch_pool": [(pool, 1)]})


def mixed_17(c):
    return Mixed(768, "avg", {"branch1x1": [(192, 1)], "branch7x7": [(c, 1), (c, (1, 7)), (192, (7, 1))],
                              "branch7x7dbl": [(c, 1), (c, (7, 1)), (c, (1, 7)), (c, (7, 1)), (192, (1, 7))], "branch_pool": [(192, 1)]})


def mixed_8(channels, pool):
    fork = [(384, (1, 3)), (384, (3, 1))]
    return Mixed(channels, pool, {"branch1x1": [(320, 1)], "branch3x3": [(384, 1), fork], "branch3x3dbl": [(448, 1), (384, 3), fork],
                                  "branch_pool": [(192, 1)]})


class InceptionV3(nn.Module):
    """uint8 images (N, 3, H, W) of any size -> pool (N, 2048), spatial (N, 2023), logits (N, 1008).

    The network that FID is defined by, with the names of pt_inception-2015-12-05-6726825d.pth. It differs from torchvision's in
    average pools without their padding, a max pool in the last block, and 1008 classes. The logits have no bias, as in ADM's suite.
    """

    widths = (2048, 2023, 1008)

    def __init__(self):
        super().__init__()
        self.Conv2d_1a_3x3 = Conv(3, 32, 3, stride=2)
        self.Conv2d_2a_3x3 = Conv(32, 32, 3, same=False)
        self.Conv2d_2b_3x3 = Conv(32, 64, 3)
        self.Conv2d_3b_1x1 = Conv(64, 80, 1)
        self.Conv2d_4a_3x3 = Conv(80, 192, 3, same=False)
        self.Mixed_5b, self.Mixed_5c, self.Mixed_5d = mixed_35(192, 32), mixed_35(256, 64), mixed_35(288, 64)
        self.Mixed_6a = Mixed(288, "down", {"branch3x3": [(384, 3, 2)], "branch3x3dbl": [(64, 1), (96, 3), (96, 3, 2)], "branch_pool": []})
        self.Mixed_6b, self.Mixed_6c, self.Mixed_6d, self.Mixed_6e = mixed_17(128), mixed_17(160), mixed_17(160), mixed_17(192)
        self.Mixed_7a = Mixed(768, "down", {"branch3x3": [(192, 1), (320, 3, 2)],
                                            "branch7x7x3": [(192, 1), (192, (1, 7)), (192, (7, 1)), (192, 3, 2)], "branch_pool": []})
        self.Mixed_7b, self.Mixed_7c = mixed_8(1280, "avg"), mixed_8(2048, "max")
        self.fc = nn.Linear(2048, 1008)
        self.to(memory_format=torch.channels_last)                # on two CPU cores 1.5 times as fast as the default layout

    def forward(self, images):
        x = (resize_tf1(images.float(), 299) - 128) / 128
        x = x.contiguous(memory_format=torch.channels_last)
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(F.max_pool2d(x, 3, 2)))
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(F.max_pool2d(x, 3, 2))))
        x = self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x))))
        spatial = x[:, :7].permute(0, 2, 3, 1).flatten(1)         # of the 1×1 branch, the first to be joined
        x = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(self.Mixed_6e(x))))
        pool = x.mean((2, 3))
        return pool, spatial, F.linear(pool, self.fc.weight)


def resize_tf1(x, size):
    """Bilinear as TensorFlow 1 did it: output pixel i looks at i · in / out, no half-pixel shift, no antialiasing."""
    for axis in (2, 3):
        at = torch.arange(size, dtype=torch.float32, device=x.device) * (x.shape[axis] / size)
        below = at.long()
        part = (at - below).view(-1, 1) if axis == 2 else at - below
        x = torch.lerp(x.index_select(axis, below), x.index_select(axis, (below + 1).clamp(max=x.shape[axis] - 1)), part)
    return x


class RandomFeatures(nn.Module):
    """uint8 images (N, 3, H, W) -> (N, 512): a convolutional network of fixed random weights, for images unlike ImageNet's.

    Away from natural images random features rank models as well as trained ones (Naeem et al., 2020). The weights come from
    numpy's frozen generator, so that the distances compare between machines.
    """

    widths = (512, 0, 0)

    def __init__(self):
        super().__init__()
        channels = (3, 64, 128, 256, 512)
        for i, (c, out) in enumerate(zip(channels, channels[1:])):
            rng = generator("random features", i)
            weight = rng.standard_normal((out, c, 3, 3), np.float32) * math.sqrt(2 / (9 * c))
            self.register_buffer(f"weight{i}", torch.from_numpy(weight))
            self.register_buffer(f"bias{i}", torch.from_numpy(0.1 * rng.standard_normal(out, np.float32)))

    def forward(self, images):
        x = images.float() / 127.5 - 1
        for i in range(4):
            x = F.relu(F.conv2d(x, getattr(self, f"weight{i}"), getattr(self, f"bias{i}"), stride=1 if i == 0 else 2, padding=1))
        return x.mean((2, 3)), x.new_empty(len(x), 0), x.new_empty(len(x), 0)


# ---------------------------------------------------------------------------------------------------------------------
# The five numbers


class Moments:
    """A mean (D,) and a covariance Σ (D, D) as a factor A (D, r) with A Aᵀ = Σ, in float64."""

    def __init__(self, mean, factor):
        self.mean, self.factor = mean, factor

    @classmethod
    def of_statistics(cls, mean, sigma):
        """From μ and Σ: by Cholesky, or where Σ is singular by its eigenvectors, of which those below λ_max · D · eps count as 0."""
        mean, sigma = (torch.as_tensor(a, dtype=torch.float64) for a in (mean, sigma))
        factor, failed = torch.linalg.cholesky_ex(sigma)
        pivots = factor.diagonal().square()
        if not failed and pivots.min() > pivots.max() * len(pivots) * torch.finfo(torch.float64).eps:
            return cls(mean, factor)
        values, vectors = torch.linalg.eigh(sigma)
        kept = values > values[-1].clamp(min=0) * len(values) * torch.finfo(torch.float64).eps
        return cls(mean, vectors[:, kept] * values[kept].sqrt())

    @classmethod
    def of_features(cls, features):
        """From features (N, D): with fewer of them than dimensions, they are the factor themselves, and no Σ is made."""
        if len(features) > features.shape[1]:
            return cls.of_statistics(*mean_and_covariance(features))
        features = torch.as_tensor(features).double()
        return cls(features.mean(0), (features - features.mean(0)).T / math.sqrt(len(features) - 1))

    def distance(self, other):
        """Fréchet distance. With Σ = A Aᵀ and Σ' = B Bᵀ, tr √(Σ Σ') is the sum of the singular values of Aᵀ B:

        those are the roots of the eigenvalues of Aᵀ B Bᵀ A, which are those of A Aᵀ B Bᵀ. No root of an unsymmetric product
        is taken, so nothing is complex, and a set is at distance 0 from itself.
        """
        cross = torch.linalg.svdvals(self.factor.T @ other.factor).sum()
        return ((self.mean - other.mean).square().sum() + self.factor.square().sum() + other.factor.square().sum() - 2 * cross).item()


def mean_and_covariance(features, rows=4096):
    """Of features (N, D), in float64, a few rows at a time."""
    features = torch.as_tensor(features)
    mean = sum(part.double().sum(0) for part in features.split(rows)) / len(features)
    total = torch.zeros(len(mean), len(mean), dtype=torch.float64)
    for part in features.split(rows):
        centred = part.double() - mean
        total.addmm_(centred.T, centred)
    return mean, total / (len(features) - 1)


def frechet_distance(mu1, sigma1, mu2, sigma2):
    """|μ_1 − μ_2|² + tr(Σ_1 + Σ_2 − 2 √(Σ_1 Σ_2)) for means (D,) and covariances (D, D), arrays or tensors, for who imports it.

    Raises ValueError for shapes that do not fit, and for numbers that are not finite.
    """
    arrays = [torch.as_tensor(a, dtype=torch.float64) for a in (mu1, sigma1, mu2, sigma2)]
    D = arrays[0].numel()
    for array, shape in zip(arrays, ((D,), (D, D)) * 2):
        if tuple(array.shape) != shape:
            raise ValueError(f"means and covariances do not fit: {[tuple(a.shape) for a in arrays]}")
        if not torch.isfinite(array).all():
            raise ValueError("a mean or covariance holds numbers that are not finite")
    return Moments.of_statistics(*arrays[:2]).distance(Moments.of_statistics(*arrays[2:]))


def inception_score(logits, split=5000):
    """Mean over splits of exp E KL(p(class|x) ‖ p(class)), for logits (N, classes)."""
    scores = []
    for part in torch.as_tensor(logits).split(split):
        log_p = part.double().log_softmax(1)
        p = log_p.exp()
        marginal = p.mean(0)
        kl = torch.special.entr(marginal).sum() - torch.special.entr(p).sum(1).mean()          # H(class) − E H(class|x)
        scores.append(kl.exp())
    return torch.stack(scores).mean().item()


def precision_recall(real, fake, k=3, device="cpu", progress=False):
    """Precision and recall of features real (N, D), fake (M, D): the part of one within the k-th neighbours' balls of the other.

    Raises ValueError where a set has no k neighbours. Distances are taken in blocks of 256 MB.
    """
    if min(len(real), len(fake)) <= k:
        raise ValueError(f"precision and recall with k = {k} need more than {k} images on each side, not {len(real)} and {len(fake)}")
    real, fake = (torch.as_tensor(a).to(device) for a in (real, fake))
    centre = real[:4096].mean(0)                                  # near the origin, squares cancel less
    real, fake = real - centre, fake - centre
    rows = max(1, 2**26 // max(len(real), len(fake)))
    bar = tqdm(total=2 * (len(real) + len(fake)), desc="precision, recall", unit="image", leave=False, disable=not progress, dynamic_ncols=True)

    def squared(part, whole, norms):
        bar.update(len(part))
        distance = torch.addmm(norms, part, whole.T, alpha=-2)
        return distance.add_(part.square().sum(1, keepdim=True))  # of a point to itself, 0 but for rounding

    def radii(points, norms):
        """The squared distance of each point to its k-th neighbour; the point itself is the nearest."""
        out = torch.empty_like(norms)
        for i in range(0, len(points), rows):
            out[i:i + rows] = squared(points[i:i + rows], points, norms).topk(k + 1, largest=False).values[:, k]
        return out

    def inside(points, balls, norms, reach):
        return sum((squared(part, balls, norms) <= reach).any(1).sum().item() for part in points.split(rows)) / len(points)

    real_norms, fake_norms = real.square().sum(1), fake.square().sum(1)
    result = (inside(fake, real, real_norms, radii(real, real_norms)), inside(real, fake, fake_norms, radii(fake, fake_norms)))
    bar.close()
    return result


# ---------------------------------------------------------------------------------------------------------------------
# Where images and statistics come from


class Source:
    """One side of the comparison: images, or statistics of them, or both.

    images(batch, start) gives arrays (n, H, W, 3) uint8 from number `start` on; `num` is how many, `size` their (height, width), `statistics` holds what of
    mu, sigma, mu_s, sigma_s, pool the file has, and `network` whose features those are; `shift` is the noise shift that estimator.py
    measured on the way to these images. Raises ValueError for bad input.
    """

    num, size, statistics, network, shift = 0, None, {}, None, None
    features = {}                                                 # what `compare` found: for the reference, once for all samples

    def __init__(self, name, num, seed, crop=None):
        self.name, self.limit, self.crop = name, num, crop
        path = Path(name)
        if is_drawn(name):
            self.num, self.seed, self.images = num or 10_000, seed, self.drawn
            Shapes(16, seed, name)                                # raises for a class that is none
        elif path.is_dir():
            self.files = sorted(str(p) for p in path.rglob("*") if p.suffix.lower() in ImageFolder.suffixes)[:num]
            if not self.files:
                raise ValueError(f"no images in {name} ({', '.join(sorted(ImageFolder.suffixes))}); give another folder")
            self.num, self.size, self.images = len(self.files), (crop, crop) if crop else read_image(self.files[0]).size[::-1], self.read
        elif path.is_file():
            self.open_npz()
        else:
            raise ValueError(f"no file or folder {name}; give an .npz, a folder of images, shapes, or shapes:star,cross")

    def stamp(self):
        """What says that these are the same images as before."""
        files = [] if is_drawn(self.name) else self.files if Path(self.name).is_dir() else [self.name]
        return repr([self.name, self.num, self.size, self.crop, getattr(self, "seed", None), [(file, os.stat(file).st_mtime_ns) for file in files]])

    def drawn(self, batch, start):
        data = Shapes(self.size[0], self.seed, self.name)
        for i in range(start, self.num, batch):
            yield data.images(range(data.held_out + i, data.held_out + min(i + batch, self.num)))[0].transpose(0, 2, 3, 1)

    def read(self, batch, start):
        workers = WORKERS if self.num > batch else 0
        for images in torch.utils.data.DataLoader(FileBatches(self.files[start:], self.size, batch, self.crop), batch_size=None, num_workers=workers,
                                                  worker_init_fn=ignore_signals):
            if isinstance(images, ValueError):
                raise images
            yield images.numpy()

    def open_npz(self):
        try:
            with zipfile.ZipFile(self.name) as archive:
                headers = {member.removesuffix(".npy"): npy_header(archive, member) for member in archive.namelist() if member.endswith(".npy")}
                for key, (shape, dtype) in headers.items():
                    if dtype.hasobject:
                        raise ValueError(f"{self.name}: {key} holds pickled objects, which are not opened; save plain arrays")
                if "arr_0" in headers:
                    shape, dtype = headers["arr_0"]
                    if dtype != np.uint8 or len(shape) != 4 or shape[3] != 3 or 0 in shape:
                        raise ValueError(f"{self.name}: arr_0 is {dtype} {shape}; images are uint8 (N, H, W, 3)")
                    self.num, self.size, self.images = min(shape[0], self.limit or shape[0]), shape[1:3], self.stream
                if headers.get("shift") == ((), np.float64):
                    with archive.open("shift.npy") as file:
                        self.shift = float(np.lib.format.read_array(file, allow_pickle=False))
                for key, ndim in (("mu", 1), ("sigma", 2), ("mu_s", 1), ("sigma_s", 2), ("pool", 2), ("size", 1), ("network", 0)):
                    if key in headers:
                        shape, dtype = headers[key]
                        if len(shape) != ndim or dtype.kind != {"network": "U", "size": "i"}.get(key, "f") or math.prod(shape) * dtype.itemsize > 8e9:
                            raise ValueError(f"{self.name}: {key} is {dtype} {shape}, which is no such statistic")
                        with archive.open(f"{key}.npy") as file:
                            self.statistics = {**self.statistics, key: np.lib.format.read_array(file, allow_pickle=False)}
        except ValueError as error:
            raise ValueError(f"{self.name}: {error}" if self.name not in str(error) else error) from None
        except (zipfile.BadZipFile, zlib.error, EOFError, OSError, NotImplementedError, RuntimeError) as error:        # encrypted, too
            raise ValueError(f"{self.name} is no readable .npz ({error}); give another file") from None
        if self.statistics:
            self.network = str(self.statistics.pop("network", "inception"))
            self.size = self.size or tuple(int(side) for side in self.statistics.pop("size", ()))
            if self.network not in NETWORKS:
                raise ValueError(f"{self.name} holds statistics of {self.network} features, which are none of {', '.join(NETWORKS)}")
        for a, b in (("mu", "sigma"), ("mu_s", "sigma_s")):
            if (a in self.statistics) != (b in self.statistics):
                raise ValueError(f"{self.name} has one of {a} and {b} without the other; give both")
            if a in self.statistics and self.statistics[b].shape != 2 * self.statistics[a].shape:
                raise ValueError(f"{self.name}: {a} {self.statistics[a].shape} and {b} {self.statistics[b].shape} do not fit")
        for key, array in self.statistics.items():
            if not np.isfinite(array).all():
                raise ValueError(f"{self.name}: {key} holds numbers that are not finite")
        if not self.num and not self.statistics:
            raise ValueError(f"{self.name} holds neither images (arr_0) nor statistics (mu, sigma), only {', '.join(headers) or 'nothing'}")

    def stream(self, batch, start):
        try:
            with zipfile.ZipFile(self.name) as archive, archive.open("arr_0.npy") as file:
                read_header(file)
                each = self.size[0] * self.size[1] * 3
                for i in range(0, start, batch):
                    file.read(batch * each)
                for i in range(start, self.num, batch):
                    n = min(batch, self.num - i)
                    data = file.read(n * each)
                    if len(data) < n * each:
                        raise ValueError(f"{self.name} ends after {i + len(data) // each} of its {self.num} images; make it again")
                    yield np.frombuffer(data, np.uint8).reshape(n, *self.size, 3)
        except (zipfile.BadZipFile, zlib.error, EOFError) as error:
            raise ValueError(f"{self.name} is damaged ({error}); make it again") from None


def read_header(file):
    try:
        version = np.lib.format.read_magic(file)
        shape, fortran, dtype = (np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0)(file)
    except (OSError, zipfile.BadZipFile, zlib.error):
        raise
    except Exception as error:  # numpy raises a dozen kinds for damaged headers
        raise ValueError(f"an array's header is damaged ({' '.join(str(error).split())[:80]}); make the file again") from None
    return shape, dtype, fortran


def npy_header(archive, member):
    """Shape and dtype of an array in an .npz; ValueError when the file holds less than these claim."""
    info = archive.getinfo(member)
    with archive.open(info) as file:
        shape, dtype, fortran = read_header(file)
    if not dtype.hasobject and info.file_size < math.prod(shape) * dtype.itemsize:
        raise ValueError(f"{member} claims {dtype} {shape}, and holds {info.file_size} bytes; make it again")
    if fortran and len(shape) > 2:
        raise ValueError(f"{member} is stored column by column; save it with np.ascontiguousarray")
    return shape, dtype


class FileBatches(torch.utils.data.Dataset):
    """Batch i of image files of one size, (n, H, W, 3) uint8; or the ValueError, for the caller to raise."""

    def __init__(self, files, size, batch, crop):
        self.files, self.size, self.batch, self.crop = files, size, batch, crop

    def __len__(self):
        return math.ceil(len(self.files) / self.batch)

    def __getitem__(self, i):
        out = []
        for file in self.files[i * self.batch:(i + 1) * self.batch]:
            try:
                image = centre_crop(read_image(file), self.crop) if self.crop else np.asarray(read_image(file))
            except UnreadableImage as error:
                return error
            if image.shape[:2] != self.size:
                return ValueError(f"{file} is {image.shape[1]}×{image.shape[0]}, {self.files[0]} is {self.size[1]}×{self.size[0]}; "
                                  "give --crop N, to compare N×N pixels from the middle of each")
            out.append(image)
        return torch.from_numpy(np.stack(out))


# ---------------------------------------------------------------------------------------------------------------------
# Features, and what they say


@torch.no_grad()
def features(source, network, batch, device, keep=(True, True, True), place=None):
    """The network's features of all images of a source, on rank 0: float32 arrays (N, D), of which only `keep` are kept.

    Batch after batch is read by all ranks, goes through the network of one of them, and is sent to rank 0. In the folder `place`,
    if one is given, they are written as they come, and found by the next start.
    """
    widths = [width if kept else 0 for width, kept in zip(network.widths, keep)]
    out = np.empty((source.num if RANK == 0 else 0, sum(widths)), np.float32)
    filled, file = 0, None
    if place and RANK == 0:
        lock(place / ".lock", place)
        of = hashlib.sha256(repr([source.stamp(), type(network).__name__, models.fingerprint(network), widths, batch]).encode(errors="surrogateescape"))
        (name := place / f"{of.hexdigest()[:16]}.f32").touch()
        file = open(name, "r+b", buffering=0)
        filled = min(source.num, file.seek(0, os.SEEK_END) // out[:1].nbytes // batch * batch)       # whole batches
        file.truncate(filled * out[:1].nbytes)
        out[:filled] = np.fromfile(name, np.float32).reshape(filled, out.shape[1])
    filled = agree(filled)
    with tqdm(total=source.num, initial=filled, desc=source.name[-30:], unit="image", disable=RANK != 0, dynamic_ncols=True) as bar:
        batches = source.images(batch, filled)
        while filled < source.num:
            turn = [images for _, images in zip(range(WORLD), batches)]           # one for each rank
            mine = turn[RANK] if RANK < len(turn) else turn[0][:0]
            found = torch.zeros(batch, out.shape[1])
            if len(mine):
                images = torch.from_numpy(mine.copy()).to(device).permute(0, 3, 1, 2)
                parts = [part.float().cpu() for part, width in zip(network(images), widths) if width]
                found[:len(mine)] = torch.cat(parts, 1)
            gathered = [torch.empty_like(found) for _ in range(WORLD)] if RANK == 0 else None
            if WORLD > 1:
                dist.gather(found, gathered)
            else:
                gathered = [found]
            for rank, images in enumerate(turn):
                if RANK == 0:
                    out[filled:filled + len(images)] = gathered[rank][:len(images)].numpy()
                    if file:
                        write_at(file, out[filled:filled + len(images)], filled * out[:1].nbytes)
                filled += len(images)
                bar.update(len(images))
    return np.split(out, np.cumsum(widths)[:2], axis=1)


METRICS = ("fid", "sfid", "is", "precision", "recall")
NETWORKS = {"inception": InceptionV3, "random": RandomFeatures}


def arguments():
    parser = Arguments(__doc__)
    add = parser.add_argument
    add("samples", nargs="+", metavar="SAMPLES", help=".npz with arr_0, folder of images, .npz of statistics, or shapes; several make a table")
    add("reference", metavar="REFERENCE", help="the same; of the drawn shapes, 10,000 that no training uses")
    add("--features", choices=NETWORKS, help="default: random for images smaller than 64×64 and for shapes, else inception")
    add("--metrics", nargs="+", choices=METRICS, metavar="M", help=f"of {', '.join(METRICS)} (default: all that the two sides allow)")
    add("--num", "--num-samples", type=number(int, 2), metavar="N", help="compare the first N images of each side (default: all)")
    add("--crop", type=number(int, 4), metavar="N", help="crop the images in folders to N×N, as train.py does")
    add("--batch", type=number(int, 1), default=64, metavar="N", help="images at a time on each rank (default: 64)")
    add("--device", metavar="D", help="cpu or cuda (default: cuda where there is one)")
    add("--weights", metavar="FILE", help="the Inception weights, if they cannot be downloaded")
    add("--json", metavar="FILE", help="write the numbers to a file, too; features that are done are then kept in FILE.partial, for another start")
    add("--plot", metavar="FILE", help="draw the distance, and precision against recall, of several sets over their weight of NAG, into a .png")
    add("--save-stats", metavar="FILE", help="keep the reference's statistics and features in an .npz, for REFERENCE next time")
    add("--seed", type=number(int, 0), default=0, help="of the shapes (default: 0)")
    return parser.parse_args()


def open_network(name, weights, device):
    """The network in eval mode, with the published weights; ValueError when these cannot be had."""
    network = NETWORKS[name]()
    if name == "inception":
        with rank_0_first():
            state = models.load_file(weights, "give --weights FILE, or leave it out to download them") if weights else \
                models.download(INCEPTION_URL, "give --weights FILE")
        models.load_weights(network, state, weights or INCEPTION_URL)
    return network.eval().requires_grad_(False).to(device)


def unfinished(args):
    """The folder for features until all are there: beside the file that is to be written, if any."""
    name = args.json or args.save_stats
    return Path(f"{name}.partial") if name else None


NO_SUCH_FEATURES = "random features have none"


def compare(samples, reference, network_name, wanted, args, device):
    """The metrics that `wanted` names and the sides allow: {name: value}, and {name: why it is left out}."""
    inception, left_out = network_name == "inception", {}
    has = lambda side, key: side.num or key in side.statistics
    for name in wanted:
        if name in ("sfid", "is") and not inception:
            left_out[name] = NO_SUCH_FEATURES
        for side in (samples, reference):
            what = {"fid": "mu" if "mu" in side.statistics else "pool", "sfid": "mu_s", "is": None}.get(name, "pool")
            if name not in left_out and not has(side, what) and (name != "is" or side is samples):
                also = {"fid": " and no statistics", "sfid": " and no mu_s, sigma_s", "is": ""}.get(name, " and no features")
                left_out[name] = f"{side.name} holds no images{also}"
        count = min((n for side in (samples, reference) if (n := side.num or len(side.statistics.get("pool", ())))), default=math.inf)
        least = {"precision": 4, "recall": 4, "is": 1}.get(name, 2)
        if name not in left_out and count < least:
            left_out[name] = f"{count} images; it needs {least} on each side"
    todo = [name for name in wanted if name not in left_out]

    network, found = None, {}
    for side in (samples, reference):
        keep_all = side is reference and args.save_stats and inception and "mu_s" not in side.statistics
        there = side.statistics.keys() | side.features.keys()
        asked = "precision" in todo or "recall" in todo or "fid" in todo and "mu" not in side.statistics
        saved = args.save_stats and side is reference and "pool" not in side.features
        pool = bool(asked and "pool" not in there or saved)
        spatial = "spatial" not in there and (keep_all or "sfid" in todo and "mu_s" not in side.statistics)
        keep = (pool, spatial, side is samples and "is" in todo)
        if any(keep) and side.num:
            network = network or open_network(network_name, args.weights, device)
            parts = features(side, network, args.batch, device, keep, unfinished(args))
            side.features = {**side.features, **{key: part for key, part, kept in zip(("pool", "spatial", "logits"), parts, keep) if kept}}
        found[side] = {**side.statistics, **side.features}
    if RANK:
        return {}, left_out

    def moments(side, mean, sigma, key):
        if mean in side.statistics:
            return Moments.of_statistics(side.statistics[mean], side.statistics[sigma])
        return Moments.of_features(found[side][key])

    def same_width(a, b):
        if a != b:
            raise ValueError(f"{samples.name} has features of {a} dimensions, {reference.name} of {b}")

    values = {}
    for name, keys in (("fid", ("mu", "sigma", "pool")), ("sfid", ("mu_s", "sigma_s", "spatial"))):
        if name in todo:
            a, b = (moments(side, *keys) for side in (samples, reference))
            same_width(len(a.mean), len(b.mean))
            values[name] = a.distance(b)
    if "is" in todo:
        values["is"] = inception_score(torch.from_numpy(found[samples]["logits"]))
    if "precision" in todo or "recall" in todo:
        real, fake = (torch.from_numpy(np.ascontiguousarray(found[side]["pool"], np.float32)) for side in (reference, samples))
        same_width(fake.shape[1], real.shape[1])
        values |= {name: value for name, value in zip(("precision", "recall"), precision_recall(real, fake, 3, device, True)) if name in todo}

    if args.save_stats:
        kept = {"network": np.array(network_name), "size": np.array(reference.size)}
        for mean, sigma, key in (("mu", "sigma", "pool"), ("mu_s", "sigma_s", "spatial")):
            if mean in reference.statistics:
                kept |= {mean: reference.statistics[mean], sigma: reference.statistics[sigma]}
            elif key in found[reference]:
                kept[mean], kept[sigma] = (a.numpy() for a in mean_and_covariance(torch.from_numpy(found[reference][key])))
        kept |= {"pool": found[reference]["pool"]} if "pool" in found[reference] else {}
        with replacing(args.save_stats) as file:
            np.savez(file, **kept)
    return values, left_out


def evaluate(samples, reference, args, device):
    """The metrics of one set against the reference: which features were compared, the values, and what is left out."""
    sides = (samples, reference)
    samples.size, reference.size = samples.size or reference.size or (16, 16), reference.size or samples.size or (16, 16)
    kept, drawn = {side.network for side in sides if side.statistics}, any(is_drawn(side.name) for side in sides)
    small = all(max(side.size) < 64 for side in sides) and not kept
    choice = args.features or (kept.pop() if len(kept) == 1 else "random" if small or drawn else "inception")
    for side in sides:
        if side.statistics and side.network != choice:
            raise ValueError(f"{side.name} holds statistics of {side.network} features, not of {choice}; compare like with like")
    if drawn and samples.size[0] != samples.size[1]:
        raise ValueError(f"shapes are drawn on squares, and the other images are {samples.size[1]}×{samples.size[0]}")
    if choice == "random" and samples.size != reference.size:
        raise ValueError(f"random features compare images of one size, not {samples.size[1]}×{samples.size[0]} with "
                         f"{reference.size[1]}×{reference.size[0]}")
    return choice, *compare(samples, reference, choice, args.metrics or METRICS, args, device)


def spread(values, digits):
    """Mean ± standard deviation, of one value just that."""
    return f"{np.mean(values):.{digits}f}" + (f" ± {np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else "")


def figure(groups, distance):
    """Sets named by their weight of NAG, as estimator.py measure does, as curves over it: FD or FID, and precision against recall."""
    curves, without = {}, {}                                      # {(name less the weight, what is beside NAG): {weight: {metric: mean}}}
    for name, rows in groups.items():
        nag = re.search(r"(classifier-)?NAG-([\d.]+)-on-[\d.]+-[\d.]+-?", name)
        means = {key: float(np.mean([row[key] for row in rows])) for key in ("fid", "precision", "recall") if all(key in row for row in rows)}
        if nag:
            curves.setdefault((name.replace(f"NAG-{nag[2]}", "NAG", 1), name.replace(nag[0], "")), {})[float(nag[2])] = means
        else:
            without[name.removeprefix("no-guidance-").removeprefix("no-guidance")] = means
    curves = {name: dict(sorted({**({0.0: without[rest]} if rest in without else {}), **points}.items())) for (name, rest), points in curves.items()}
    points = [point for curve in curves.values() for point in curve.values()]
    if not points or not all({"fid", "precision", "recall"} <= point.keys() for point in points):
        raise ValueError("nothing to draw: --plot takes images of several weights of NAG, from: python estimator.py measure --w-nag 0 1 2 --keep-images")

    def span(values):
        room = 0.08 * (max(values) - min(values)) + 1e-3
        return min(values) - room, max(values) + room

    shown = {key: [point[key] for point in points] for key in ("fid", "precision")}
    shown["fid"] = [value for value in shown["fid"] if value <= 2 * shown["fid"][0]]       # what is far worse than the first leaves the frame
    page = Image.new("RGB", (1000 * FINE, 440 * FINE), "white")
    small = ImageFont.load_default(12 * FINE)
    for left, xs, ys, x_name, y_name in ((90, None, "fid", "weight of NAG", distance), (590, "recall", "precision", "recall", "precision")):
        across = lambda weight, point: point[xs] if xs else weight
        panel = Panel(380, 330, span([across(w, point) for curve in curves.values() for w, point in curve.items()]), span(shown[ys]))
        for curve, (colour, dashes) in zip(curves.values(), itertools.cycle(STYLES)):
            at = [(across(w, point), point[ys]) for w, point in curve.items()]
            panel.curve(*zip(*at), colour, dashes)
            panel.dots(*zip(*at), colour, [True] * len(at))
            for (x, y), weight in zip(at, curve if xs else ()):
                u, v = panel.at(x, y)
                ImageDraw.Draw(panel.image).text((u + 7 * FINE, v), f"{weight:g}", colour, small, anchor="lm")
        panel.put(page, left, 20, x_name, y_name)
    in_words = lambda name: re.sub(r"on-([\d.]+)-([\d.]+)", r"on t from \1 to \2", name).replace("-", " ")
    legend(page, 404, [(in_words(name), *style) for name, style in zip(curves, itertools.cycle(STYLES))])
    return page.resize((page.width // FINE, page.height // FINE), Image.LANCZOS)


def main():
    args, device = arguments(), join_ranks()
    try:
        if args.device:
            device = torch.device(args.device)
            torch.zeros(1, device=device).cpu()
    except (RuntimeError, AssertionError, NotImplementedError):
        stop(f"--device {args.device} is not there; use cpu, or cuda where there is a GPU")
    if args.save_stats and not args.save_stats.endswith(".npz"):
        stop(f"--save-stats {args.save_stats} must end in .npz")
    if args.plot and not args.plot.endswith(".png"):
        stop(f"--plot {args.plot} must end in .png")
    results = []
    try:
        reference = Source(args.reference, args.num, args.seed, args.crop)
        for name in args.samples:
            samples = Source(name, args.num, args.seed + 1, args.crop)
            results.append((samples, *evaluate(samples, reference, args, device)))
            if not RANK and not results[-1][2]:
                stop(f"nothing to compare with {name}: {'; '.join(f'{key}: {why}' for key, why in results[-1][3].items())}")
            if samples.shift is not None and math.isfinite(samples.shift):
                results[-1][2]["shift"] = samples.shift
            samples.features = {}                                 # they may be many
    except ValueError as error:
        stop(error)
    if RANK:
        return

    choice = results[0][1]
    titles = {"fid": "FID" if choice == "inception" else "FD-random", "sfid": "sFID", "is": "Inception Score",
              "precision": "precision", "recall": "recall", "shift": "shift, SNR > 1"}
    digits = lambda name: 6 if name == "shift" else 5 if name == "fid" and choice == "random" else 4
    holds = lambda side: " and ".join([f"{side.num:,} images"] * bool(side.num) + ["statistics"] * bool(side.statistics))
    if len(results) == 1:
        (samples, _, values, _), = results
        print(f"samples     {samples.name} ({holds(samples)})\nreference   {reference.name} ({holds(reference)})")
        for name, value in values.items():
            print(f"{titles[name]:16} {value:10.{digits(name)}f}")
    groups = {}                                                   # sets of one file name in several folders are seeds of one setting
    for samples, _, values, _ in results:
        groups.setdefault(Path(samples.name).stem, []).append(values)
    if len(results) > 1:
        shown = [name for name in titles if all(name in values for _, _, values, _ in results)]
        print(f"against {reference.name} ({holds(reference)}); mean ± standard deviation where a set is there several times\n\n"
              f"| samples | sets | {' | '.join(titles[name] for name in shown)} |\n|---|---|{'---|' * len(shown)}")
        for group, rows in sorted(groups.items(), key=lambda item: "no-guidance" not in item[0]):
            print(f"| {group} | {len(rows)} | {' | '.join(spread([row[name] for row in rows], digits(name) - 1) for name in shown)} |")
    missing = {f"{titles[name]} ({why})": None for *_, left_out in results for name, why in left_out.items()
               if args.metrics or why != NO_SUCH_FEATURES}
    if missing:
        print("left out:", "; ".join(missing))
    if args.plot:
        try:
            page = figure(groups, titles["fid"])
        except ValueError as error:
            stop(error)
        with replacing(args.plot) as file:
            page.save(file, "png")
        print(f"\n{args.plot}")
    few = min((side.num for side in (reference, *(samples for samples, *_ in results)) if side.num), default=None)
    needed = 2048 if choice == "inception" else 512
    if few and few < needed and "fid" in results[0][2]:
        print(f"warning: {few} images are fewer than the {needed:,} dimensions of the features; {titles['fid']} is then mostly bias", file=sys.stderr)
    if args.json:
        rows = [{**values, "features": choice, "samples": samples.name, "reference": reference.name, "num_samples": samples.num,
                 "num_reference": reference.num, "left_out": left_out} for samples, choice, values, left_out in results]
        with replacing(args.json) as file:
            file.write(json.dumps(rows[0] if len(rows) == 1 else rows, indent=1).encode())
    if unfinished(args):
        shutil.rmtree(unfinished(args), ignore_errors=True)


if __name__ == "__main__":
    one_line_errors(main)
