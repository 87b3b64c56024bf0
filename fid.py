"""FID, sFID, Inception Score, precision and recall, as the ADM evaluation suite defines them.

    python fid.py samples.npz VIRTUAL_imagenet256_labeled.npz      # what DiT, SiT and NAG quote
    python fid.py samples.npz folder/of/images --save-stats reference.npz
    python fid.py runs/SiT-?/shift/*.npz shapes                    # mean and deviation over seeds

A network turns images into features. Two sets of images are compared by how these are distributed:

    FID        Fréchet distance |μ − μ'|² + tr(Σ + Σ' − 2 √(Σ Σ')) of the means and covariances of
               the pool features (Heusel et al., 2017)
    sFID       the same of spatial features, 7 channels at 17×17 places (Nash et al., 2021)
    IS         exp E KL(p(class|x) ‖ p(class)) (Salimans et al., 2016)
    precision  share of the samples that lie within the real data: in a ball around a real image
               that reaches to its third nearest neighbour (Kynkäänniemi et al., 2019)
    recall     share of the real data that lie within the samples
    recognised share of the samples that a classifier takes for their class

The network of FID is a classifier: Inception, which learned the classes of ImageNet. Small images
are compared by one that learns the reference's own classes (FD-classifier), or, for colour and
grain, by one with random weights (FD-random).

Each side is an .npz with arr_0 (N, H, W, 3) uint8 and perhaps labels arr_1, a folder of images, an
.npz of statistics (mu, sigma, mu_s, sigma_s), or `shapes`. Images are read in a stream; memory
holds their features. Under torchrun all ranks compute features, and rank 0 compares them.
"""
import contextlib
import functools
import json
import math
import os
import sys
import zipfile
from collections import OrderedDict
from pathlib import Path

import train                      # before torch is loaded: it sets how its threads wait

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F

import models

INCEPTION_URL = ("https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
                 "pt_inception-2015-12-05-6726825d.pth")


# --------------------------------------------------------------------------------------------------
# Features: the Inception network of 2015 (Szegedy et al., arXiv 1512.00567), as TensorFlow ran it


def conv(channels, out, kernel, stride=1, padding="same"):
    """Convolution without a bias, batch norm, ReLU."""
    return nn.Sequential(OrderedDict(
        conv=nn.Conv2d(channels, out, kernel, stride, padding, bias=False),
        bn=nn.BatchNorm2d(out, eps=1e-3), relu=nn.ReLU(inplace=True)))


class Mixed(nn.Module):
    """Chains of convolutions side by side, joined along the channels; branch_pool starts at a pool.

    chains  {name: [(out, kernel[, stride, padding]), ...]}; layer i is called name_i. A list in
            place of a last layer holds two side by side, name_ia and name_ib
    """

    def __init__(self, channels, pool, **chains):
        super().__init__()
        self.pool, self.chains = pool, {name: [] for name in chains}
        for name, layers in chains.items():
            width = channels
            for i, layer in enumerate(layers, 1):
                key = f"{name}_{i}" if len(layers) > 1 else name
                step = {key: layer}
                if isinstance(layer, list):
                    step = {f"{key}a": layer[0], f"{key}b": layer[1]}
                for key, (out, *shape) in step.items():
                    self.add_module(key, conv(width, out, *shape))
                self.chains[name].append(list(step))
                width = out

    def forward(self, x):
        joined = []
        for name, steps in self.chains.items():
            h = self.pool(x) if name == "branch_pool" else x
            for step in steps:
                h = torch.cat([getattr(self, key)(h) for key in step], 1)
            joined.append(h)
        return torch.cat(joined, 1)


class InceptionV3(nn.Module):
    """uint8 images (N, 3, H, W) of any size -> pool (N, 2048), spatial (N, 2023), logits (N, 1008).

    The network that defines FID. It differs from torchvision's in average pools that leave out
    their padding, a max pool in the last block, and 1008 classes, here without a bias as in ADM's.
    """

    widths = {"pool": 2048, "spatial": 2023, "logits": 1008}

    def __init__(self):
        super().__init__()
        average = nn.AvgPool2d(3, stride=1, padding=1, count_include_pad=False)
        self.halve = nn.MaxPool2d(3, stride=2)
        self.Conv2d_1a_3x3 = conv(3, 32, 3, stride=2, padding=0)
        self.Conv2d_2a_3x3 = conv(32, 32, 3, padding=0)
        self.Conv2d_2b_3x3 = conv(32, 64, 3)
        self.Conv2d_3b_1x1 = conv(64, 80, 1)
        self.Conv2d_4a_3x3 = conv(80, 192, 3, padding=0)
        for letter, channels, out in (("b", 192, 32), ("c", 256, 64), ("d", 288, 64)):
            self.add_module(f"Mixed_5{letter}", Mixed(
                channels, average, branch1x1=[(64, 1)], branch5x5=[(48, 1), (64, 5)],
                branch3x3dbl=[(64, 1), (96, 3), (96, 3)], branch_pool=[(out, 1)]))
        self.Mixed_6a = Mixed(288, self.halve, branch3x3=[(384, 3, 2, 0)],
                              branch3x3dbl=[(64, 1), (96, 3), (96, 3, 2, 0)], branch_pool=[])
        row, column = (1, 7), (7, 1)
        for letter, c in (("b", 128), ("c", 160), ("d", 160), ("e", 192)):
            self.add_module(f"Mixed_6{letter}", Mixed(
                768, average, branch1x1=[(192, 1)], branch7x7=[(c, 1), (c, row), (192, column)],
                branch7x7dbl=[(c, 1), (c, column), (c, row), (c, column), (192, row)],
                branch_pool=[(192, 1)]))
        self.Mixed_7a = Mixed(
            768, self.halve, branch3x3=[(192, 1), (320, 3, 2, 0)],
            branch7x7x3=[(192, 1), (192, row), (192, column), (192, 3, 2, 0)], branch_pool=[])
        pair = [(384, (1, 3)), (384, (3, 1))]
        for letter, channels, pool in (("b", 1280, average), ("c", 2048, nn.MaxPool2d(3, 1, 1))):
            self.add_module(f"Mixed_7{letter}", Mixed(
                channels, pool, branch1x1=[(320, 1)], branch3x3=[(384, 1), pair],
                branch3x3dbl=[(448, 1), (384, 3), pair], branch_pool=[(192, 1)]))
        self.fc = nn.Linear(2048, 1008)
        self.to(memory_format=torch.channels_last)                # 1.5 times as fast on a CPU

    def forward(self, images):
        x = (resize_tf1(images.float(), 299) - 128) / 128
        x = x.contiguous(memory_format=torch.channels_last)
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(self.halve(x)))
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(self.halve(x))))
        x = self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x))))
        spatial = x[:, :7].permute(0, 2, 3, 1).flatten(1)         # of branch1x1, the first chain
        x = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(self.Mixed_6e(x))))
        pool = x.mean((2, 3))
        return pool, spatial, F.linear(pool, self.fc.weight)


def resize_tf1(x, size):
    """Bilinear as TensorFlow 1 did it, (N, C, H, W) -> (N, C, size, size): output pixel i looks at
    input place i · in / out, without a shift of half a pixel and without antialiasing."""
    for axis in (2, 3):
        place = torch.arange(size, dtype=torch.float32, device=x.device) * (x.shape[axis] / size)
        below = place.long()
        above = (below + 1).clamp(max=x.shape[axis] - 1)
        weight = (place - below).view(-1, 1) if axis == 2 else place - below
        x = torch.lerp(x.index_select(axis, below), x.index_select(axis, above), weight)
    return x


class RandomFeatures(nn.Sequential):
    """uint8 images (N, 3, H, W) -> pool (N, 512), by convolutions with fixed random weights, the
    same on every machine. They see colour and grain, and hardly a shape."""

    widths = {"pool": 512}

    def __init__(self):
        super().__init__()
        for i, (c, out) in enumerate([(3, 64), (64, 128), (128, 256), (256, 512)]):
            rng = train.generator("random features", i)
            weight = rng.standard_normal((out, c, 3, 3), np.float32) * math.sqrt(2 / (9 * c))
            layer = nn.Conv2d(c, out, 3, stride=1 if i == 0 else 2, padding=1)
            layer.weight.data = torch.from_numpy(weight)
            layer.bias.data = torch.from_numpy(0.1 * rng.standard_normal(out, np.float32))
            self.extend([layer, nn.ReLU()])

    def forward(self, images):
        return (super().forward(images.float() / 127.5 - 1).mean((2, 3)),)


class Classifier(nn.Module):
    """uint8 images (N, 3, H, W) -> pool (N, 128), spatial (N, …), logits (N, classes), class (N,).

    A small convolutional network for small images, which learns the reference's own classes.
    """

    widths = {"pool": 128, "spatial": None, "logits": None, "class": None}

    def __init__(self, size, num_classes):
        super().__init__()
        layers, width = [conv(3, 32, 3)], 32
        while size > 4 or width < 128:
            out, size = min(2 * width, 128), math.ceil(size / 2)
            layers += [conv(width, out, 3, stride=2, padding=1), conv(out, out, 3)]
            width = out
        self.maps, self.fc = nn.Sequential(*layers), nn.Linear(width, num_classes)

    def forward(self, images):
        maps = self.maps(images.float() / 127.5 - 1)
        pool = maps.mean((2, 3))
        logits = self.fc(pool)
        return pool, maps[:, :16].flatten(1), logits, logits.argmax(1)


@torch.enable_grad()
def train_classifier(images, labels, num_classes, seed=0, steps=1000, batch=128, grain=16):
    """A Classifier of images (N, 3, H, W) uint8, in eval mode, and the shares of the tenth that is
    held out which it takes for their class: as they are, and with grain.

    It learns under grain of a random deviation up to `grain`, so that grain alone decides nothing.
    """
    torch.manual_seed(seed)
    network, rng = Classifier(max(images.shape[2:]), num_classes), train.generator(seed, "lessons")
    order = torch.from_numpy(rng.permutation(len(images)))
    held_out, rest = order.tensor_split([math.ceil(len(images) / 10)])
    optimizer = torch.optim.AdamW(network.parameters(), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)

    def classify(chosen, deviation):
        noise = rng.standard_normal((len(chosen), *images.shape[1:]), np.float32) * deviation
        *_, logits, taken = network(images[chosen] + torch.from_numpy(noise))
        return logits, taken

    def share_right(deviation):
        taken = torch.cat([classify(part, deviation)[1] for part in held_out.split(512)])
        return (taken == labels[held_out]).double().mean().item()

    for _ in train.progress(iterable=range(steps), desc="learning the reference's classes"):
        chosen = rest[rng.integers(0, len(rest), batch)]
        logits, _ = classify(chosen, rng.uniform(0, grain, (batch, 1, 1, 1)).astype(np.float32))
        F.cross_entropy(logits, labels[chosen]).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    network.eval().requires_grad_(False)
    return network, [share_right(0), share_right(grain / 2)]


def open_classifier(reference):
    """The Classifier of the reference's classes, kept in pretrained/ once it is trained."""
    lessons = Side(reference.name, seed=2, most=None, args=reference.args)
    lessons.size, count = reference.size, len(lessons.classes)
    file = Path(__file__).with_name("assets") / "shapes-classifier.pt"
    if (lessons.name, lessons.size) != ("shapes", (16, 16)) or not file.exists():
        states = [] if lessons.drawn else [(name, os.stat(name)) for name in lessons.data.files]
        key = [f"{name} {state.st_size} {state.st_mtime_ns}" for name, state in states]
        digest = train.digest([lessons.name, str(lessons.size), *key])
        file = Path("pretrained", f"classifier-{digest}.pt")
    with train.rank_0_first():
        if not file.exists():
            train.prepare(file)
            file.parent.mkdir(exist_ok=True)
            batches = range(math.ceil(lessons.num / lessons.args.batch))
            images = train.load(lessons, batches, train.WORKERS, torch.device("cpu"))
            images, labels = torch.cat(list(images)), torch.as_tensor(lessons.labels)
            network, right = train_classifier(images, labels, count)
            with train.replacing(file) as open_file:
                torch.save({"classifier": network.half().state_dict(), "right": right}, open_file)
    with naming(f"{file} is damaged; remove it, and it is made anew"):
        with zipfile.ZipFile(file) as archive:
            if archive.testzip():                   # one flipped bit would change every number
                raise ValueError("a checksum is wrong")
        saved, sizes = models.load_file(file), {"size": max(lessons.size), "num_classes": count}
        network = models.restore(Classifier, sizes, saved["classifier"], file)
        clean, grainy = map(float, saved["right"])
    print(f"{file} is right on {clean:.1%} of the images held out, with grain on {grainy:.1%}")
    return network


NETWORKS = {"inception": InceptionV3, "classifier": Classifier, "random": RandomFeatures}


@functools.cache
def open_network(name, reference):
    """The network in eval mode, with its weights; ValueError when these are not there."""
    weights = reference.args.weights
    network = open_classifier(reference) if name == "classifier" else NETWORKS[name]()
    if name == "inception":
        with train.rank_0_first():
            state = (models.load_file(weights, "leave out --weights to download them") if weights
                     else models.download(INCEPTION_URL, "give --weights FILE"))
        counters = {key: value for key, value in network.state_dict().items()
                    if key.endswith("num_batches_tracked")}      # which some files lack
        models.load_weights(network, counters | state, weights or INCEPTION_URL)
    return network.eval().requires_grad_(False).to(reference.args.device)


# --------------------------------------------------------------------------------------------------
# The numbers, as functions of features


class Missing(ValueError):
    """A metric needs more than there is."""


class Moments:
    """A mean (D,) and a covariance Σ (D, D), as a factor A (D, r) with A Aᵀ = Σ; in float64."""

    def __init__(self, mean, factor):
        self.mean, self.factor = mean, factor

    @classmethod
    def of_statistics(cls, mean, sigma):
        """From μ and Σ; ValueError when they do not fit, are not finite, or Σ is no covariance."""
        mean, sigma = (torch.as_tensor(a, dtype=torch.float64) for a in (mean, sigma))
        if mean.ndim != 1 or sigma.shape != 2 * mean.shape:
            raise ValueError(f"a mean {(*mean.shape,)}, a covariance {(*sigma.shape,)} do not fit")
        if not (mean.isfinite().all() and sigma.isfinite().all()):
            raise ValueError("a mean or a covariance holds numbers that are not finite")
        tolerance = 1e-4 * sigma.abs().max()                      # more than float32 is off by
        if (sigma - sigma.T).abs().max() > tolerance:
            raise ValueError("a covariance is not symmetric")
        factor, failed = torch.linalg.cholesky_ex(sigma)          # a tenth of the time of eigh
        pivots, rounding = factor.diagonal().square(), len(mean) * torch.finfo(torch.float64).eps
        if not failed and pivots.min() > rounding * pivots.max():
            return cls(mean, factor)
        values, vectors = torch.linalg.eigh(sigma)
        if values[0] < -tolerance:
            raise ValueError(f"a covariance has a negative eigenvalue, {values[0]:.3g}")
        kept = values > rounding * values[-1]
        return cls(mean, vectors[:, kept] * values[kept].sqrt())

    @classmethod
    def of_features(cls, features):
        """From features (N, D). Where N ≤ D they are the factor themselves, and no Σ is made."""
        N, D = features.shape
        if N < 2:
            raise Missing(f"{N} images; it needs 2 on each side")
        parts = features.split(4096)                              # never all of them in float64
        mean = sum(part.double().sum(0) for part in parts) / N
        if N <= D:
            return cls(mean, (features.double() - mean).T / math.sqrt(N - 1))
        centred = (part.double() - mean for part in parts)
        return cls.of_statistics(mean, sum(part.T @ part for part in centred) / (N - 1))

    def distance(self, other):
        """Fréchet distance. With Σ = A Aᵀ and Σ' = B Bᵀ, tr √(Σ Σ') is the sum of the roots of the
        eigenvalues of A Aᵀ B Bᵀ, and these are those of CᵀC with C = AᵀB: symmetric, so they are
        real. ValueError where the dimensions differ."""
        if len(self.mean) != len(other.mean):
            raise ValueError(f"means of {len(self.mean)} and {len(other.mean)} numbers do not fit")
        C = self.factor.T @ other.factor
        smaller = C.T @ C if C.shape[0] > C.shape[1] else C @ C.T
        trace = torch.linalg.eigvalsh(smaller).clamp(min=0).sqrt().sum()
        variances = self.factor.square().sum() + other.factor.square().sum()
        return max(0.0, ((self.mean - other.mean).square().sum() + variances - 2 * trace).item())


def frechet_distance(mu1, sigma1, mu2, sigma2):
    """Of means (D,) and covariances (D, D); ValueError where they are none, or do not fit."""
    return Moments.of_statistics(mu1, sigma1).distance(Moments.of_statistics(mu2, sigma2))


def inception_score(logits, split=5000):
    """exp E KL(p(class|x) ‖ p(class)) of logits (N, classes), as a mean over splits."""
    scores = []
    for part in logits.split(split):
        p = part.double().softmax(1)
        divergence = (p * (p / p.mean(0)).log()).nansum(1)        # 0 log 0 is 0
        scores.append(divergence.mean().exp().item())
    return sum(scores) / len(scores)


def covered(points, centres, k=3):
    """Share of points (N, D) that lie within the centres (M, D): in a ball around one of them that
    reaches to its k-th nearest neighbour. Distances are taken in blocks of at most 128 MB."""
    if points.shape[1] != centres.shape[1]:
        raise ValueError(f"features of {points.shape[1]} and {centres.shape[1]} numbers do not fit")
    if len(centres) <= k:
        raise Missing(f"{len(centres)} images; it needs {k + 1} on each side")
    origin = centres.mean(0)                                      # near it, squares cancel less
    points, centres = points - origin, centres - origin
    rows = max(1, 2**25 // len(centres))
    radii = torch.cat([torch.cdist(part, centres).topk(k + 1, largest=False).values[:, k]
                       for part in centres.split(rows)])          # the nearest is the point itself
    inside = [(torch.cdist(part, centres) <= radii).any(1) for part in points.split(rows)]
    return torch.cat(inside).double().mean().item()


def precision_recall(real, fake, k=3):
    """Precision and recall of features real (N, D) and fake (M, D); ValueError below k + 1 each."""
    return covered(fake, real, k), covered(real, fake, k)


# --------------------------------------------------------------------------------------------------
# The two sides of a comparison

MOMENTS = {"pool": ("mu", "sigma"), "spatial": ("mu_s", "sigma_s")}       # their names in an .npz


class Side:
    """Drawn shapes, a folder of images, or an .npz of images, statistics of features, or both.

    It has `num` images of `size` (height, width), `labels` (num,) and names of `classes` where they
    are known, and what is known of the features of `network`. Raises ValueError for damaged files.

    seed  of drawn shapes: 0 for a reference, 1 for samples, 2 for what a classifier learns
    most  only so many images, None for all; of shapes, 10,000
    """

    def __init__(self, name, seed, most, args):
        self.name, self.most, self.args = name, most, args
        self.num, self.size, self.labels, self.classes = 0, None, None, None
        self.use(None)
        self.drawn = train.is_drawn(name)
        self.archive = not self.drawn and not os.path.isdir(name)
        if self.archive:
            self.open_archive()
        elif self.drawn:
            self.data, self.num = train.Shapes(1, seed, name), most or 10_000
            self.indices = self.data.held_out + np.arange(self.num)
            self.labels, self.classes = self.data.images(self.indices)[1], self.data.classes
        else:
            self.data = train.ImageFolder(name, args.crop)
            self.num = len(self.data.files[:most])
            first = train.read_image(self.data.files[0])
            self.size = 2 * (args.crop,) if args.crop else first.size[::-1]
            if self.data.classes != ["all"]:
                self.labels, self.classes = self.data.labels[:self.num], self.data.classes

    def use(self, network):
        """Forget the features of another network."""
        self.network, self.known_features, self.known_moments = network, {}, {}      # by kind

    def open_archive(self):
        with naming(self.name), np.load(self.name) as found:
            for kind, (mean, sigma) in MOMENTS.items():
                if mean in found or sigma in found:
                    self.known_moments[kind] = Moments.of_statistics(found[mean], found[sigma])
            if "pool" in found:
                pool = torch.as_tensor(found["pool"][:self.most], dtype=torch.float32)
                if pool.ndim != 2 or not pool.isfinite().all():
                    raise ValueError("pool does not hold finite features (N, D)")
                self.known_features["pool"] = pool
            if self.known_moments or self.known_features:
                self.network = str(found["network"]) if "network" in found else "inception"
                self.size = tuple(map(int, found["size"])) if "size" in found else None
                if self.network not in ("inception", "random"):
                    raise ValueError(f"{self.network} features fit no others; give the images")
            if "arr_0" in found:
                _, (num, *size, _) = open_images(found.zip)
                self.num, self.size = min(num, self.most or num), tuple(size)
                if "arr_1" in found and found["arr_1"].shape == (num,):
                    self.labels = found["arr_1"][:self.num]
            elif not self.network:
                raise ValueError(f"no images (arr_0), no statistics (mu), only {', '.join(found)}")

    def features(self, kind):
        """Features (N, D), on rank 0. The first call computes all kinds; raises Missing."""
        if kind not in self.known_features:
            if not self.num or kind not in NETWORKS[self.network].widths:
                raise Missing(f"{self.name} has no {kind} features")
            train.broadcast(self.args.sides.index(self))          # the other ranks wait for this
            self.known_features = {**self.compute(), **self.known_features}
        features = self.known_features[kind]
        if not all(part.isfinite().all() for part in features.split(4096)):
            raise ValueError(f"{kind} features of {self.name} are not finite; give other --weights")
        return features.to(self.args.device)

    def moments(self, kind):
        if kind not in self.known_moments:
            self.known_moments[kind] = Moments.of_features(self.features(kind).cpu())
        return self.known_moments[kind]

    @torch.no_grad()
    def compute(self):
        """The features of all images {kind: (N, D)}, on rank 0. Each rank computes its share."""
        device, size = self.args.device, self.args.batch
        batches = range(math.ceil(self.num / size))
        network = open_network(self.network, self.args.sides[-1])
        first, end = (len(batches) * rank // train.WORLD for rank in (train.RANK, train.RANK + 1))
        mine = batches[first:end]
        images = self.read(mine) if self.archive else train.load(self, mine, train.WORKERS, device)
        count, share = min(self.num, end * size) - first * size, {}
        images = train.progress(iterable=images, total=len(mine), desc=self.name)
        for number, batch in enumerate(images):
            rows = slice(number * size, (number + 1) * size)
            for kind, part in zip(network.widths, network(batch.to(device))):
                if kind not in share:                             # parts, joined, would take twice
                    share[kind] = torch.empty(count, *part.shape[1:], dtype=part.dtype)
                share[kind][rows] = part
        if train.WORLD == 1:
            return share
        shares = [None] * train.WORLD
        dist.gather_object(share, None if train.RANK else shares)
        if train.RANK == 0:
            return {kind: torch.cat([share.pop(kind) for share in shares if kind in share])
                    for kind in network.widths}

    def read(self, numbers):
        """Yield the batches of these numbers from an .npz, uint8 (n, 3, H, W)."""
        with naming(self.name, train.DataError), zipfile.ZipFile(self.name) as archive:
            file, (_, *shape) = open_images(archive)
            for number in range(numbers.stop):
                n = min(self.args.batch, self.num - number * self.args.batch)
                flat = [np.frombuffer(file.read(math.prod(shape)), np.uint8)    # a whole batch
                        for _ in range(n)]                        # at once takes its memory twice
                images = np.stack(flat).reshape(n, *shape)
                if number in numbers:
                    yield torch.from_numpy(images).permute(0, 3, 1, 2)

    def __getitem__(self, number):
        """Batch `number` of shapes, or from a folder, uint8 (n, 3, H, W): what train.load reads."""
        rows = slice(number * self.args.batch, (number + 1) * self.args.batch)
        if self.drawn:
            self.data.image_size = self.size[0]                   # as choose_networks() set it
            return torch.from_numpy(self.data.images(self.indices[rows])[0])
        images = []
        for file in self.data.files[:self.num][rows]:
            image = train.read_image(file)
            if self.args.crop:
                image = train.centre_crop(image, self.args.crop)
            elif image.size[::-1] != self.size:
                raise train.DataError(f"{file} is {image.width}×{image.height}, "
                                      f"{self.data.files[0]} is not; give --crop N")
            images.append(np.asarray(image))
        return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)


@contextlib.contextmanager
def naming(path, kind=ValueError):
    """Whatever goes wrong in reading a file, as an error of this kind that names it."""
    try:
        yield
    except Exception as error:  # for damaged files zipfile, zlib and numpy raise a dozen kinds
        first_sentence = str(error).split(". ")[0] or type(error).__name__
        raise kind(f"{path}: {first_sentence[:200]}") from None


def open_images(archive):
    """arr_0 of an open .npz, as a file that stands at its first pixel; its shape (N, H, W, 3)."""
    file = archive.open("arr_0.npy")
    np.lib.format.read_magic(file)
    shape, fortran, dtype = np.lib.format.read_array_header_1_0(file)
    if dtype != np.uint8 or fortran or len(shape) != 4 or shape[3] != 3 or min(shape) < 1:
        raise ValueError(f"arr_0 is {dtype} {shape}; images are uint8 (N, H, W, 3) in C order, not "
                         "pickled objects")
    if archive.getinfo("arr_0.npy").file_size < math.prod(shape):
        raise ValueError(f"arr_0 claims {shape}, and the file holds less; make it again")
    return file, shape


def choose_networks(sides, asked):
    """The networks to compare by; sets the size of drawn shapes. ValueError where none fits."""
    reference, drawn = sides[-1], [side for side in sides if side.drawn]
    sizes = {side.size for side in sides if side.size} or {(16, 16)}
    for side in drawn:
        side.size = 2 * min(sizes)[:1]                            # shapes are drawn on squares
        sizes.add(side.size)
    known = [side.network for side in sides if side.network]
    learnable = len(reference.classes or ()) > 1
    large = max(map(max, sizes)) >= 64 and not drawn
    by_default = "inception" if large else "classifier" if learnable else "random"
    networks = list(dict.fromkeys(asked or known[:1] or [by_default]))
    if len(sizes) > 1 and (drawn or networks != ["inception"]):
        raise ValueError(f"{networks[-1]} features compare images of one size, not {sorted(sizes)}")
    for side in sides:
        if side.network and networks != [side.network]:
            raise ValueError(f"{side.name} holds {side.network} features; compare like with like")
    if "classifier" in networks and not learnable:
        raise ValueError(f"{reference.name} has no two classes to learn; give shapes, or a folder "
                         "with class sub-folders, or other --features")
    return networks


def recognised(samples, reference, kind):
    """Share of the samples that the reference's classifier takes for their class."""
    labels, classes = np.asarray(samples.labels), reference.classes
    names = samples.classes or classes                            # an .npz has numbers alone
    if labels.shape != (samples.num,) or labels.dtype.kind not in "iu" or min(labels) < 0 \
            or max(labels) >= len(names) or not set(names) <= set(classes):
        raise Missing(f"{samples.name} does not name a class of the reference for each image")
    found = samples.features(kind).tolist()
    return np.mean([names[label] == classes[k] for label, k in zip(labels, found)]).item()


METRICS = {     # title by Inception, by other networks; kind k of features; of samples a against b
    "fid": ("FID", "FD-{}", "pool", lambda a, b, k: b.moments(k).distance(a.moments(k))),
    "sfid": ("sFID", "sFD-{}", "spatial", lambda a, b, k: b.moments(k).distance(a.moments(k))),
    "is": ("Inception Score", "IS-{}", "logits", lambda a, b, k: inception_score(a.features(k))),
    "recognised": ("recognised", "recognised", "class", recognised),
    "precision": ("precision", "precision", "pool",
                  lambda a, b, k: covered(a.features(k), b.features(k))),
    "recall": ("recall", "recall", "pool", lambda a, b, k: covered(b.features(k), a.features(k))),
}


def compare(samples, reference, asked, row):
    """Add to a row the metrics that are asked for, or else all that their network offers; of those
    with one title, the first network's count."""
    for name, (title, other, kind, metric) in METRICS.items():
        if name not in asked if asked else kind not in NETWORKS[samples.network].widths:
            continue
        if samples.network != "inception":                        # nothing else is called FID
            title = other.format(samples.network)
        try:
            if title not in row["metrics"]:
                row["metrics"][title] = metric(samples, reference, kind)
            row["left_out"].pop(title, None)
        except Missing as why:
            row["left_out"][title] = str(why)


def arguments():
    parser = train.Arguments(__doc__)
    add = parser.add_argument
    file = {"metavar": "FILE", "type": train.place}
    add("samples", nargs="+", metavar="SAMPLES", type=train.place,
        help="an .npz of images or statistics, a folder of images, or shapes; each is a row")
    add("reference", metavar="REFERENCE", type=train.place, help="the same")
    add("--features", nargs="+", choices=NETWORKS, help="default: below 64×64 classifier where "
        "the reference has classes, random where it has none; else inception. Of several, the "
        "first gives precision and recall")
    add("--metrics", nargs="+", choices=METRICS, help="default: all that the two sides allow")
    add("--num", "--num-samples", type=train.number(int, 2), help="only the first images")
    add("--crop", type=train.number(int, 4), metavar="N", help="crop images in folders to N×N")
    add("--batch", type=train.number(int, 1), default=64, help="images at a time (default: 64)")
    add("--weights", **file, help="the Inception weights, if they cannot be downloaded")
    add("--json", **file, help="write the numbers to a file, too")
    add("--save-stats", **file, help="keep the reference's statistics and features in an .npz")
    return parser.parse_args()


def save_statistics(side, path):
    """Write what can be known of a side, for a later run to read as its REFERENCE."""
    kept = {"network": side.network, "size": side.size or ()}
    for kind, names in MOMENTS.items():
        with contextlib.suppress(Missing):
            moments = side.moments(kind)
            kept |= zip(names, (moments.mean, moments.factor @ moments.factor.T))
    with contextlib.suppress(Missing):
        kept["pool"] = side.features("pool").cpu()
    with train.replacing(path) as file:
        np.savez(file, **kept)


def measured(samples):
    """What `estimator.py measure --keep-images` noted of these samples, where it wrote them: the
    shift, whether they are without guidance, and what samples must share to be paired."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):          # others have none
        report = json.loads(Path(samples).with_name("shift.json").read_text())
        for note in report["settings"]:
            if note["images"] == Path(samples).name:
                pair = [report["checkpoint"], note["sampler"], note["steps"], note["seed"]]
                return {"shift": note["mean_shift"], "plain": note["name"] == "no guidance",
                        "pair": " ".join(map(str, pair))}
    return {}


def report(rows):
    """Print a table; files of one name, in several folders, are seeds of one setting.

    And their differences to no guidance, checkpoint by checkpoint, where measure noted these.
    """
    titles = list(dict.fromkeys(title for row in rows for title in row["metrics"]))
    left_out = "; ".join(dict.fromkeys(f"{title} ({why})" for row in rows
                                       for title, why in row["left_out"].items()))
    if not titles:
        raise ValueError(f"nothing to compare: {left_out}")
    settings = {}
    plain = {row["pair"]: row for row in rows if row.get("plain")}
    values = lambda row: np.array([row["metrics"].get(title, math.nan) for title in titles])
    for row in sorted(rows, key=lambda row: "no-guidance" not in Path(row["samples"]).name):
        name = Path(row["samples"]).name.removesuffix(".npz")
        settings.setdefault(name, []).append(values(row))
        if row.get("pair") in plain and not row["plain"]:
            difference = values(row) - values(plain[row["pair"]])
            settings.setdefault(f"{name}, less no guidance", []).append(difference)
    print(f"| against {rows[0]['reference']} | sets |", *(f"{title} |" for title in titles))
    print("|---|---|" + "---|" * len(titles))
    for name, seeds in settings.items():
        cells = [name, str(len(seeds))]
        for title, column in zip(titles, np.transpose(seeds)):
            column, digits = column[np.isfinite(column)], 5 if title == "shift" else 3
            cells.append(f"{column.mean():.{digits}f}" if len(column) else "–")
            cells[-1] += f" ± {column.std(ddof=1):.{digits}f}" if len(column) > 1 else ""
        print(f"| {' | '.join(cells)} |")
    if left_out:
        print(f"left out: {left_out}")
    nums = [row[key] for row in rows for key in ("num_samples", "num_reference") if row[key]]
    dimensions = max(NETWORKS[network].widths["pool"] for network in rows[0]["features"])
    if min(nums, default=dimensions) < dimensions:
        print(f"warning: {min(nums)} images are fewer than the {dimensions:,} dimensions of the "
              "features; a Fréchet distance is then mostly bias", file=sys.stderr)


def main():
    args = arguments()
    taken = {train.leads_to(name) for name in (*args.samples, args.reference, args.weights)}
    for path in filter(None, (args.json, args.save_stats)):
        if os.path.isdir(path) or train.leads_to(path) in taken:
            raise ValueError(f"{path} is a folder, an input, or named twice; write to another file")
        taken.add(path)
        train.prepare(path)
        Path(path).parent.mkdir(parents=True, exist_ok=True)
    args.device = train.join_ranks()
    sets = [Side(name, seed=1, most=args.num, args=args) for name in args.samples]
    reference = Side(args.reference, seed=0, most=args.num, args=args)
    args.sides = [*sets, reference]
    networks = choose_networks(args.sides, args.features)
    if args.save_stats and "classifier" in networks:
        raise ValueError("--save-stats cannot keep the features of a classifier, which is of this "
                         "reference alone; give other --features")
    rows = [{"samples": samples.name, "reference": reference.name, "features": networks,
             "num_samples": samples.num, "num_reference": reference.num, "metrics": {},
             "left_out": {}}
            for samples in sets]
    for network in networks:
        for side in args.sides:
            if side.network != network:
                side.use(network)
        if train.RANK:
            while (number := train.broadcast(None)) is not None:  # rank 0 asks for features
                args.sides[number].compute()
            continue
        if args.save_stats and network == networks[0]:
            save_statistics(reference, args.save_stats)
        for samples, row in zip(sets, rows):
            compare(samples, reference, args.metrics, row)
            samples.use(network)                                  # features may be many
        train.broadcast(None)                                     # no more is needed of the others
    if train.RANK:
        return
    for name, row in zip(args.samples, rows):
        row |= measured(name)
        if "shift" in row:
            row["metrics"]["shift"] = row.pop("shift")
    report(rows)
    if args.json:
        with train.replacing(args.json) as file:
            file.write(json.dumps(rows[0] if len(rows) == 1 else rows, indent=1).encode())


if __name__ == "__main__":
    train.one_line_errors(main)
