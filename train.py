"""Train a DiT or SiT with noise dropout, so that its samples can be guided by the noise level.

    python train.py                                    # drawn shapes, minutes on two CPU cores
    python train.py --data photos --image-size 64      # a folder; sub-folders are the classes
    torchrun --nproc-per-node 8 train.py --model DiT-XL/2 --noise-drop 0.1
    torchrun --nproc-per-node 8 train.py --data imagenet --image-size 256 --init DiT-XL/2

Folders are trained in latents from 256×256 on: the VAE of Stable Diffusion encodes them, once.

Everything random about step s is a function of (seed, s), for the whole batch; a rank takes its
slice. So a run that was stopped repeats, bit for bit, what it would have done, and any number of
ranks follows the same curve. Stop it at any time; the same command goes on.

Writes OUT/checkpoints/0001000.pt, OUT/samples/0001000.png (samples of the averaged weights, always
from the same noise) and OUT/log.jsonl, with each checkpoint's loss on images held out.
"""
import argparse
import collections
import contextlib
import copy
import datetime
import fcntl
import functools
import hashlib
import itertools
import json
import math
import os
import resource
import shlex
import signal
import sys
import time
import zipfile
import zlib
from pathlib import Path

# OpenMP's waiting threads spin: beside two other programs a step took 40 times as long, with so few
# turns 3 times (read when torch is loaded). And glibc hands large freed blocks back, to be faulted
# in again at every step: 8 % of a small model's time, unless a process starts with these.
os.environ.setdefault("GOMP_SPINCOUNT", "3000")
if __name__ == "__main__" and "MALLOC_TRIM_THRESHOLD_" not in os.environ:
    os.environ.update(MALLOC_TRIM_THRESHOLD_=str(2**30), MALLOC_MMAP_THRESHOLD_=str(2**26))
    os.execv(sys.executable, sys.orig_argv)

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.nn       # before a group exists: its default arguments would keep it alive
from PIL import Image, ImageDraw, ImageFont, ImageOps, PngImagePlugin
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import diffusion
import models

RANK, WORLD, LOCAL_RANK = (int(os.environ.get(name, default)) for name, default in
                           (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
WORKERS = min(4, os.cpu_count())                    # processes that prepare batches, by default
FAMILIES = {"DiT": "vp", "SiT": "linear"}           # the interpolant that each was published with
PATHS = {"linear": diffusion.Linear, "vp": diffusion.VP}


# --------------------------------------------------------------------------------------------------
# Data: drawn shapes, a folder of images, or a folder of latents. Each gives images (n, C, H, W),
# uint8 pixels or float32 latents, and labels (n,), for the indices that it is asked for.


def generator(*key):
    """The random numbers that belong to a key such as (seed, "batch", step)."""
    return np.random.default_rng([zlib.crc32(part.encode()) if isinstance(part, str) else part
                                  for part in key])


def digest(names):
    """Sixteen hexadecimal digits that stand for a list of names."""
    return hashlib.sha256("\0".join(names).encode(errors="surrogateescape")).hexdigest()[:16]


def star(x, y):
    """Fold the plane onto half a spike, bounded by the line from its tip to the next notch."""
    fold = np.arctan2(x, -y) % (2 * np.pi / 5)
    fold = np.minimum(fold, 2 * np.pi / 5 - fold)
    tip, notch = 1.1, 0.48
    normal = np.array([notch * np.sin(np.pi / 5), tip - notch * np.cos(np.pi / 5)])
    normal /= np.hypot(*normal)
    r = np.hypot(x, y)
    return normal[0] * (r * np.cos(fold) - tip) + normal[1] * r * np.sin(fold)


OUTLINES = {    # signed distance of points (x, y) to a shape of radius 1 at 0, negative inside
    "bar": lambda x, y: np.maximum(abs(x) - 1, abs(y) - 0.36),
    "circle": lambda x, y: np.hypot(x, y) - 0.9,
    "cross": lambda x, y: np.maximum(np.maximum(abs(x), abs(y)) - 1,
                                     np.minimum(abs(x), abs(y)) - 0.36),
    "moon": lambda x, y: np.maximum(np.hypot(x, y) - 1, 0.78 - np.hypot(x - 0.5, y)),
    "ring": lambda x, y: abs(np.hypot(x, y) - 0.74) - 0.24,
    "square": lambda x, y: np.maximum(abs(x), abs(y)) - 0.8,
    "star": star,
    "triangle": lambda x, y: np.maximum(abs(x) * 3**0.5 / 2 - y / 2, y) - 0.54,
}


class Shapes:
    """Endless images of one shape each: class, colour, place, size and rotation are random.

    The outline is where the signed distance is zero; the distance, in pixels, also antialiases it.
    """

    endless, latent, fingerprint = True, False, None
    held_out = 2**40                                # images from this index on are never trained on

    def __init__(self, image_size, seed=0, name="shapes"):
        """`name` is "shapes", or "shapes:star,cross" for some; ValueError for an unknown shape."""
        self.image_size, self.seed = image_size, seed
        chosen = OUTLINES if name == "shapes" else name.removeprefix("shapes:").split(",")
        self.classes = sorted(set(chosen))
        for unknown in set(chosen) - OUTLINES.keys():
            raise ValueError(f"no shape {unknown!r}; give some of {', '.join(OUTLINES)}")

    def images(self, indices, flip=None):           # without flips: rotations are drawn
        u = np.stack([generator(self.seed, "shapes", int(i)).random(6) for i in indices])
        u = u.T[:, :, None, None]                                                # (6, n, 1, 1)
        label = (u[0] * len(self.classes)).astype(np.int64).ravel()
        radius, angle, hue = 0.6 + 0.25 * u[1], np.pi / 9 * (2 * u[4] - 1), 6 * u[5]

        at = (np.arange(self.image_size) + 0.5) * 2 / self.image_size - 1        # spans [−1, 1]
        x, y = (at - (2 * v - 1) * (0.95 - radius) for v in u[2:4])              # (n, 1, size)
        x, y = np.broadcast_arrays(x, y.swapaxes(1, 2))                          # (n, size, size)
        x, y = ((np.cos(angle) * x + np.sin(angle) * y) / radius,
                (np.cos(angle) * y - np.sin(angle) * x) / radius)
        distance = np.empty_like(x)
        for k, name in enumerate(self.classes):
            distance[label == k] = OUTLINES[name](x[label == k], y[label == k])
        cover = np.clip(0.5 - distance * radius * self.image_size / 2, 0, 1)

        k = (hue[:, None] + np.array([5, 3, 1])[:, None, None]) % 6              # HSV to RGB
        colour, grey = 1 - 0.85 * np.clip(np.minimum(k, 4 - k), 0, 1), 0.12      # (n, 3, 1, 1)
        images = grey + cover[:, None] * (colour - grey)
        return (255 * images + 0.5).astype(np.uint8), label


class ImageFolder(torch.utils.data.Dataset):
    """The images below a folder; its sorted sub-folders are the classes (without any, it is one).

    Names that begin with a dot or __ are left out, and folders that these scripts write.
    Raises ValueError where it is not clear what belongs to which class.
    """

    endless, latent = False, False
    suffixes = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm"}
    ours = {"runs", "checkpoints", "samples", "pretrained"}

    def __init__(self, folder, image_size):
        self.folder, self.image_size, self.files, self.labels = Path(folder), image_size, [], []
        if not self.folder.is_dir():
            raise ValueError(f"no folder {folder}; give one of images, shapes or shapes:star,cross")
        places = [path for path in self.folder.iterdir() if not path.name.startswith((".", "__"))]
        self.classes = sorted(p.name for p in places if p.is_dir() and p.name not in self.ours)
        beside = [p for p in places if p.is_file() and p.suffix.lower() in self.suffixes]
        if self.classes and beside:
            raise ValueError(f"{folder} has class sub-folders and images beside them, such as "
                             f"{beside[0].name}; move these into a class")
        for label, name in enumerate(self.classes or ["."]):
            found = sorted(self.find(self.folder / name) if self.classes else map(str, beside))
            if not found:
                raise ValueError(f"no images in {self.folder / name}; remove it, or give another "
                                 f"folder ({', '.join(sorted(self.suffixes))})")
            self.files += found
            self.labels += [label] * len(found)
        self.classes = self.classes or ["all"]
        self.fingerprint = digest(os.path.relpath(name, self.folder) for name in self.files)

    def find(self, folder):
        """The images below a class's folder: as strings, a million Paths weigh a gigabyte."""
        for place, folders, files in os.walk(folder):
            folders[:] = [name for name in folders if not name.startswith((".", "__"))]
            for name in folders:
                if os.path.islink(os.path.join(place, name)):
                    raise ValueError(f"{place}/{name} is a link; put images in its place")
            for name in files:
                if Path(name).suffix.lower() in self.suffixes and not name.startswith((".", "__")):
                    yield os.path.join(place, name)

    def __len__(self):
        return len(self.files)

    def __getitem__(self, index):
        """Image number `index`, uint8 (3, size, size)."""
        image = centre_crop(read_image(self.files[index]), self.image_size)
        return torch.from_numpy(image.transpose(2, 0, 1).copy())

    def images(self, indices, flip):
        images = [self[i].flip(2) if mirrored else self[i] for i, mirrored in zip(indices, flip)]
        return torch.stack(images).numpy(), np.array([self.labels[i] for i in indices])


class DataError(ValueError):
    """Something that only one rank meets, such as a file that cannot be read: it says so."""


def read_image(path):
    """The image in a file as upright RGB; raises DataError where it cannot be read.

    Only Pillow's readers for our suffixes are tried: some others start external programs.
    """
    formats = ["PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM"]
    try:
        with Image.open(path, formats=formats) as image:
            if image.mode in ("I", "F"):
                raise ValueError(f"pixels of mode {image.mode} have no fixed range")
            image = ImageOps.exif_transpose(image)
            if image.mode.startswith("I;16"):       # 16-bit grey, which convert() would clip
                image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
            return image.convert("RGB")
    except Exception as error:  # Pillow raises many kinds for damaged files
        raise DataError(f"cannot read the image {path} ({error}); put one that can be read in its "
                        "place, and start the same command again") from None


def centre_crop(image, size):
    """ADM's crop (Dhariwal & Nichol, 2021), uint8 (size, size, 3).

    Halve by boxes while twice too large, resize bicubically, cut the middle out.
    """
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.BOX)
    scale = size / min(image.size)
    width, height = (max(size, round(side * scale)) for side in image.size)
    image = image.resize((width, height), Image.BICUBIC)
    left, top = (width - size) // 2, (height - size) // 2
    return np.asarray(image)[top:top + size, left:left + size]


def is_drawn(name):
    """Whether a data set's name means Shapes, all or some of them."""
    return name.split(":")[0] == "shapes"


def data_name(name):
    """What files of a data set are called after: its folder, also where --data is "."."""
    return Path(name).absolute().name


def open_data(name, image_size, seed):
    """The data set that --data names, in pixels."""
    return Shapes(image_size, seed, name) if is_drawn(name) else ImageFolder(name, image_size)


class Latents:
    """The posteriors of encoded images, in a folder that `encode` made; x_0 is drawn from them anew
    whenever it is asked for.

    latents.json    of which images, with which classes, and by which weights
    00000-….npy, …  1,024 images each, (n, 2, 8, h, h) float16: the image and its mirror image; mean
                    and standard deviation of 4 channels, scaled. The name holds a digest of the
                    images' names, their size and the VAE.

    Raises ValueError where the folder is not finished, or damaged.
    """

    endless, latent, per_part = False, True, 1024

    def __init__(self, folder):
        self.note = read_note(folder)
        self.files = [Path(folder, name) for name in self.note["parts"]] if self.note else []
        if not self.files or not all(file.exists() for file in self.files):
            raise ValueError(f"no finished latents in {folder}; give the --data to encode")
        self.classes, self.size = self.note["classes"], self.note["image_size"] // models.VAE.factor
        self.labels = np.repeat(np.arange(len(self.classes)), self.note["counts"])
        self.fingerprint = digest(self.note["parts"])

    def __len__(self):
        return len(self.labels)

    def images(self, indices, flip, noise):
        """x_0 (n, 4, h, h) of the posteriors, for standard normal noise (n, 4, h, h)."""
        moments = np.empty((len(indices), 8, self.size, self.size), np.float16)
        for row, index, mirrored in zip(moments, indices, flip):
            part, place = divmod(int(index), self.per_part)
            array = map_array(self.files[part])
            if array.shape[1:] != (2, *row.shape) or place >= len(array):
                raise DataError(f"{self.files[part]} does not belong to these latents; remove it, "
                                "and encode again")
            row[:] = array[place, int(mirrored)]
        mean, std = torch.from_numpy(moments).float().chunk(2, dim=1)
        return torch.addcmul(mean, std, torch.from_numpy(noise)).numpy(), self.labels[indices]


@functools.cache
def map_array(path):
    """An .npy file, mapped into memory without keeping it open: there may be thousands."""
    try:
        array = np.load(path, mmap_mode="r")
        whole = torch.from_file(str(path), size=array.offset + array.nbytes, dtype=torch.uint8)
        return whole.numpy()[array.offset:].view(array.dtype).reshape(array.shape)
    except Exception as error:  # numpy raises a dozen kinds for damaged headers
        raise DataError(f"{path} is damaged ({error}); remove it, and encode again") from None


def read_note(folder):
    """latents.json, None where there is none; raises ValueError where it is damaged."""
    path = Path(folder) / "latents.json"
    if not path.exists():
        return None
    try:
        note = json.loads(path.read_text())
        counts, images = note["counts"], note["images"]
        if sum(counts) == images and len(counts) == len(note["classes"]) and min(counts) >= 0 \
                and len(note["parts"]) == math.ceil(images / Latents.per_part) \
                and note["image_size"] > 0 and isinstance(note["data"] + note["weights"], str) \
                and all(Path(name).name == name for name in note["parts"]):
            return note
    except (ValueError, KeyError, TypeError):
        pass
    raise ValueError(f"{path} is damaged or too old; remove {folder}, and encode again")


class Part(torch.utils.data.Subset):
    """Some images of a data set, those with the given numbers, as a data set."""

    endless = False
    latent = property(lambda self: self.dataset.latent)

    def images(self, indices, *rest):
        return self.dataset.images(self.indices[indices], *rest)


def split(data, seed, share, most):
    """The data to train on, and a share that is held out, at most so many; of shapes, others."""
    if data.endless:
        return data, Part(data, np.arange(data.held_out, data.held_out + most))
    order = generator(seed, "held out").permutation(len(data))
    count = min(most, int(share * len(data)))
    return Part(data, np.sort(order[count:])), Part(data, order[:count])


class Batches(torch.utils.data.Dataset):
    """Training batch number `step`, or this rank's slice of it: a function of (seed, step).

    Images as the data gives them; y (B,), the null class where the class is hidden; levels t (B,);
    noise eps like x_0; drop_noise (B,) bool, where the level is hidden.
    """

    def __init__(self, data, args):
        self.data, self.args, self.path = data, args, PATHS[args.interpolant]()

    @functools.lru_cache(2)
    def order(self, epoch):
        return generator(self.args.seed, "order", epoch).permutation(len(self.data))

    def indices(self, step):
        """Of the data, in the global batch: epoch after epoch, without a gap in between."""
        places = range(step * self.args.batch, (step + 1) * self.args.batch)
        if self.data.endless:
            return np.array(places)
        n = len(self.data)
        return np.array([self.order(place // n)[place % n] for place in places])

    def __getitem__(self, step):
        args, B = self.args, self.args.batch
        rng = generator(args.seed, "batch", step)
        flip = rng.random(B) < 0.5
        level = rng.random(B)
        if args.levels == "logit-normal":           # seldom near 0 or 1 (Esser et al., 2024)
            share_of_noise = 1 / (1 + np.exp(-rng.standard_normal(B)))
            level = self.path.level_of_share(share_of_noise)
        t = self.path.training_level(level)
        drop_class, drop_noise = rng.random(B) < args.class_drop, rng.random(B) < args.noise_drop
        shape = B, args.in_channels, args.input_size, args.input_size
        eps = rng.standard_normal(shape, np.float32)

        mine = slice(RANK * B // WORLD, (RANK + 1) * B // WORLD)
        noise = [rng.standard_normal(shape, np.float32)[mine]] if self.data.latent else []
        images, y = self.data.images(self.indices(step)[mine], flip[mine], *noise)
        y = np.where(drop_class[mine], args.num_classes, y)
        batch = images, y, t[mine].astype(np.float32), eps[mine], drop_noise[mine]
        return [torch.from_numpy(np.ascontiguousarray(part)) for part in batch]


def open_batches(data, args):
    """Batches to train on; one of held-out images and nothing hidden, None where they are few."""
    training, held_out = split(data, args.seed, 0.02, 1024)
    visible = {**vars(args), "batch": len(held_out), "class_drop": 0, "noise_drop": 0,
               "levels": "uniform"}
    validation = Batches(held_out, argparse.Namespace(**visible))
    return Batches(training, args), validation[0] if len(held_out) >= WORLD else None


def to_float(images):
    """uint8 pixels as floats in [−1, 1]; latents, which are floats, as they are."""
    return images.float() / 127.5 - 1 if images.dtype == torch.uint8 else images


def to_uint8(images):
    """Floats in [−1, 1] as uint8 pixels."""
    return (127.5 * images + 128).clamp(0, 255).to(torch.uint8)


# --------------------------------------------------------------------------------------------------
# The training step


class Trainer:
    """A model, its average and its optimiser on this rank, and the step that moves all three."""

    def __init__(self, model, args, device):
        self.args, self.device, self.share = args, device, args.batch // WORLD
        bf16 = args.precision == "bf16"
        self.autocast = torch.autocast(device.type, torch.bfloat16, enabled=bf16)
        if device.type == "cuda":                   # what bf16 leaves in fp32 may be TF32
            torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = bf16
        self.path = PATHS[args.interpolant]()
        self.model = model.to(device)
        self.model.grad_checkpoint = args.grad_checkpoint
        self.ema = copy.deepcopy(model).requires_grad_(False)
        self.optimizers = optimizers(model, args)
        self.scaler = torch.amp.GradScaler(device.type, init_scale=1.0)
        args.micro_batch = args.micro_batch or broadcast(fitting_micro_batch(self))
        args.micro_batch = min(self.share, args.micro_batch)
        self.network = torch.compile(model) if args.compile else model
        if WORLD > 1:
            self.network = DistributedDataParallel(
                self.network, gradient_as_bucket_view=True,
                static_graph=args.micro_batch == self.share)
        self.flops = 3 * model.flops()              # per image: backward is two forward passes

    def resume(self, checkpoint):
        models.load_weights(self.model, checkpoint["model"], self.args.out)
        models.load_weights(self.ema, checkpoint["ema"], self.args.out)
        for name, optimizer in self.optimizers.items():
            if name not in checkpoint:
                raise ValueError(f"the checkpoint of {self.args.out} has no {name}, the state of "
                                 "an optimiser; give another --out")
            optimizer.load_state_dict(copy.deepcopy(checkpoint[name]))         # the file is mapped

    def passes(self, batch, size):
        """This rank's part of a batch on the device, cut into parts of so many images."""
        images, *rest = (part.to(self.device, non_blocking=True) for part in batch)
        return list(zip(*(part.split(size) for part in (to_float(images), *rest))))

    def step(self, batch, number, interrupted=lambda: False):
        """Step `number` (from 1) with this rank's part of a batch; its mean loss, a tensor ().

        The batch goes through in passes of a micro-batch, whose gradients add up; ranks exchange
        them during the last. A gradient that is not finite leaves weights, moments and average as
        they were, and the loss is NaN. With AdamW nothing waits for the GPU. Where `interrupted()`
        before a pass, the step is given up, and the result is None.
        """
        passes = self.passes(batch, self.args.micro_batch)
        loss = torch.zeros((), device=self.device)
        for i, micro_batch in enumerate(passes):
            if interrupted():
                return None
            last = i == len(passes) - 1
            with contextlib.nullcontext() if WORLD == 1 or last else self.network.no_sync():
                with self.autocast:
                    losses = diffusion.training_loss(self.network, self.path, *micro_batch)
                    if self.args.levels == "logit-normal":
                        _, _, t, *_ = micro_batch
                        losses = losses * self.path.loss_weight(t)
                    loss_part = losses.sum() / self.share
                self.scaler.scale(loss_part).backward()
            loss += loss_part.detach()

        norm = torch.nn.utils.get_total_norm([p.grad for p in self.model.parameters()])
        finite = norm.isfinite()
        if len(self.optimizers) > 1:                # each would look at its own gradients alone
            for parameter in self.model.parameters():
                parameter.grad *= torch.where(finite, 1, torch.nan)
        for optimizer in self.optimizers.values():
            for group in optimizer.param_groups:
                group["lr"] = self.learning_rate(number)
            self.scaler.step(optimizer)             # its scale is 1: it only leaves out bad steps
            optimizer.zero_grad()
        self.scaler.update(1.0)
        with torch.no_grad():                       # the average starts short: a tenth of the run
            weight = (1 - min(self.args.ema, number / (number + 9))) * finite
            for average, parameter in zip(self.ema.parameters(), self.model.parameters()):
                average.lerp_(parameter, weight)
        return torch.where(finite, loss, torch.nan)

    @torch.no_grad()
    def validation_loss(self, batch):
        """The loss of the averaged weights on a batch, of which this is the rank's part.

        Training keeps what every block computed, unless with --grad-checkpoint. Nothing is kept
        here, so that as many times more images fit as there are blocks.
        """
        total = torch.zeros(2, device=self.device)
        kept_blocks = 1 if self.args.grad_checkpoint else len(self.model.blocks)
        for micro_batch in self.passes(batch, self.args.micro_batch * kept_blocks):
            with self.autocast:
                losses = diffusion.training_loss(self.ema, self.path, *micro_batch)
            total += torch.stack([losses.sum(), losses.new_tensor(len(losses))])
        if WORLD > 1:
            dist.all_reduce(total)
        return (total[0] / total[1]).item()

    def learning_rate(self, number):
        """Rises to --lr during the warm-up; falls to zero over the last --cooldown of the run."""
        args = self.args
        rise = number / args.warmup if args.warmup else 1
        fall = (args.steps - number + 1) / (args.cooldown * args.steps) if args.cooldown else 1
        return args.lr * min(1, rise, fall)


class Muon(torch.optim.Optimizer):
    """SGD with momentum, for matrices, that moves by the nearest orthogonal matrix instead: all
    directions by as much (Jordan et al., 2024).

    torch.optim.Muon finds it in bf16, one matrix at a time, and on a CPU without bf16 that is most
    of the training. Here it is found in fp32, for all matrices of one shape together.
    """

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            by_shape = collections.defaultdict(list)
            for parameter in group["params"]:
                by_shape[parameter.shape].append(parameter)
            for shape, matrices in by_shape.items():
                steps = torch.stack([self.momentum(parameter) for parameter in matrices])
                # an orthogonal matrix has an RMS of 1/√max(shape), a step of AdamW about 0.2 lr
                size = 0.2 * math.sqrt(max(shape)) * group["lr"]
                for parameter, step in zip(matrices, orthogonal(steps)):
                    parameter.sub_(step, alpha=size)

    def momentum(self, parameter, decay=0.95):
        """The gradient averaged over steps, looking one step ahead (Nesterov)."""
        state, grad = self.state[parameter], parameter.grad
        if not state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        return grad.lerp(state["momentum_buffer"].lerp_(grad, 1 - decay), decay)


def orthogonal(matrices, iterations=5):
    """About U Vᵀ for each of the matrices U S Vᵀ, (N, rows, columns).

    Each iteration maps the singular values s by the polynomial below, which leads all but the
    smallest into 0.7 to 1.2 (Newton-Schulz).
    """
    if matrices.shape[1] > matrices.shape[2]:
        return orthogonal(matrices.mT, iterations).mT
    x = matrices / matrices.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(iterations):                     # s → 3.4445 s − 4.775 s³ + 2.0315 s⁵
        square = x @ x.mT
        x = 3.4445 * x + torch.baddbmm(square, square, square, beta=-4.775, alpha=2.0315) @ x
    return x


def optimizers(model, args):
    """AdamW, as published; with --optimizer muon, Muon for the matrices of the blocks."""
    parts = {"opt": [], "muon": []}
    for name, parameter in model.named_parameters():
        matrix = name.startswith("blocks.") and parameter.ndim == 2
        parts["muon" if matrix and args.optimizer == "muon" else "opt"].append(parameter)
    found = {"opt": torch.optim.AdamW(parts["opt"], args.lr, weight_decay=0, fused=True)}
    if parts["muon"]:
        found["muon"] = Muon(parts["muon"], {"lr": args.lr})
    return found


def fitting_micro_batch(trainer):
    """The largest equal share of a rank's batch whose activations should fit into memory.

    Per token and block the backward pass keeps about 26 numbers per channel, and on a CPU the
    attention map; with --grad-checkpoint, of one block at a time. Weights, average, gradients, two
    moments and a copy in bf16 take 22 bytes a parameter.
    """
    model, cuda = trainer.model, trainer.device.type == "cuda"
    tokens, width, depth = model.pos_embed.shape[1], model.pos_embed.shape[2], len(model.blocks)
    attention = 0 if cuda else 3 * model.blocks[0].attn.num_heads * tokens
    bytes_each = 2.6 if trainer.args.precision == "bf16" else 4
    block = tokens * (26 * width + attention) * bytes_each
    per_image = block + 4 * tokens * width * depth if model.grad_checkpoint else block * depth
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    local = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if cuda:                                        # the weights and the average are there already
        memory = torch.cuda.mem_get_info()[0] + torch.cuda.memory_allocated()
    else:
        memory = machine / 2 / local
    state = 22 * sum(p.numel() for p in model.parameters())
    fit = max(1, int((0.85 * memory - state) / per_image))
    return math.ceil(trainer.share / math.ceil(trainer.share / fit))


# --------------------------------------------------------------------------------------------------
# Samples: their random numbers, and a picture of them


def sample_noise(seed, indices):
    """randn(x) for the samplers: noise like x (n, …), each row from its own sample's generator."""
    generators = [generator(seed, "sample", int(i)) for i in indices]

    def randn(x):
        rows = [g.standard_normal(x.shape[1:], np.float32) for g in generators]
        noise = torch.from_numpy(np.stack(rows))
        if x.device.type == "cuda":                 # the copy then does not wait for the GPU
            noise = noise.pin_memory()
        return noise.to(x.device, non_blocking=True)

    return randn


def picture(panels, columns=8, captions=None):
    """Panels {title: uint8 images (n, 3, H, W)} side by side, each a grid with captions."""
    n, _, height, width = next(iter(panels.values())).shape
    zoom, columns = max(1, 64 // width), min(columns, n)
    cell_w, cell_h = width * zoom + 6, height * zoom + (22 if captions else 6)
    panel_w, head = columns * cell_w + 14, 20 if any(panels) else 4
    size = panel_w * len(panels), math.ceil(n / columns) * cell_h + head + 4
    page, font = Image.new("RGB", size, "white"), ImageFont.load_default(12)
    pen = ImageDraw.Draw(page)
    for k, (title, images) in enumerate(panels.items()):
        pen.text((k * panel_w + 8, 3), title, "black", font)
        for i, image in enumerate(images):
            x, y = k * panel_w + 8 + i % columns * cell_w, head + i // columns * cell_h
            pixels = Image.fromarray(image.permute(1, 2, 0).numpy())
            page.paste(pixels.resize((width * zoom, height * zoom), Image.NEAREST), (x, y))
            if captions:
                below = x + width * zoom / 2, y + height * zoom + 1
                pen.text(below, captions[i], "black", font, anchor="ma")
    return page


def write_grid(trainer, step, vae):
    """Samples of the average from the same noise each time, without guidance: to watch it learn."""
    args, device = trainer.args, trainer.device
    y = torch.arange(32, device=device) % min(8, args.num_classes)
    shape = 32, args.in_channels, args.input_size, args.input_size
    randn = sample_noise(args.seed, range(32))
    sampler = diffusion.sample_ddpm if args.interpolant == "vp" else diffusion.sample_sde
    denoise = diffusion.guided(trainer.ema.eval(), trainer.path, y)
    with trainer.autocast:
        x0 = sampler(denoise, randn(torch.empty(shape, device=device)), trainer.path, 50, randn)
    images = to_uint8(vae.decode(x0) if vae else x0).cpu()
    save_png(picture({"": images}), Path(args.out, "samples", f"{step:07}.png"))


# --------------------------------------------------------------------------------------------------
# The run


TI = dict(steps=2500, batch=32, optimizer="muon", lr=4e-3, warmup=100, cooldown=0.2,
          levels="logit-normal", ckpt_every=500)
TI_TUNING = dict(steps=400, lr=1e-3, warmup=40)     # beside these, from --init
LARGE = dict(steps=400_000, batch=256, optimizer="adamw", lr=1e-4, warmup=0, cooldown=0.0,
             levels="uniform", ckpt_every=5000)     # as published
FIXED = ("model", "data", "image_size", "interpolant", "noise_drop", "class_drop", "batch", "lr",
         "optimizer", "warmup", "cooldown", "levels", "ema", "seed", "precision", "init")


def arguments():
    parser = Arguments(__doc__)
    add, share, path = parser.add_argument, number(float, 0, 1), place
    positive, whole = number(int, 1), number(int, 0)
    add("--model", choices=models.MODELS, metavar="NAME",
        help="DiT-* or SiT-*, of Ti S B L XL and /2 /4 /8 (default: SiT-Ti/2)")
    add("--data", type=path, help="folder of images, or shapes (default), or shapes:star,cross")
    add("--image-size", type=number(int, 4), metavar="N", help="default: of --init or --latents, "
        "256 in latents, 16 for Ti on shapes, else 32")
    add("--latents", type=path, metavar="DIR", help="train in latents, kept there; --data is "
        "encoded first (from 256 on by default: runs/latents-<data>-<size>)")
    add("--vae", type=path, metavar="FILE", help="weights of the VAE (default: downloaded)")
    add("--init", type=path, metavar="CKPT",
        help=f"start from weights: a checkpoint, or the published {', '.join(models.PUBLISHED)}")
    add("--interpolant", choices=PATHS, help="default: vp for DiT, linear for SiT")
    add("--noise-drop", type=share, metavar="P", help="hide the level so often (default: 0.1)")
    add("--class-drop", type=share, metavar="P", help="hide the class so often (default: 0.1)")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--steps", type=positive, help="default: 2,500 for Ti, with --init 400; "
                        "else 400,000")
    length.add_argument("--epochs", type=number(float, 1e-6), help="default: 10 with --init DIR")
    add("--batch", type=positive, help="images per step of all ranks (default: Ti 32, else 256)")
    add("--micro-batch", type=positive, metavar="N", help="images at a time (default: what fits)")
    add("--lr", type=number(float, 0), help="default: 4e-3 for Ti, with --init 1e-3; else 1e-4")
    add("--optimizer", choices=("adamw", "muon"), help="default: muon for Ti, else adamw")
    add("--warmup", type=whole, metavar="N",
        help="steps in which the rate rises (default: 100 for Ti, with --init 40; else 0)")
    add("--cooldown", type=share, metavar="P",
        help="last part of the run, in which the rate falls to 0 (default: 0.2 for Ti, else 0)")
    add("--levels", choices=("uniform", "logit-normal"), help="uniform, or drawn (and on VP "
        "weighted) as if σ/(α + σ) were logit-normal (default: the latter for Ti)")
    add("--ema", type=share, help="decay of the averaged weights, at most (default: 0.9999)")
    add("--seed", type=number(int, 0, 2**63 - 1), help="default: 0")
    add("--out", type=path, metavar="DIR",
        help="default: runs/<data>-<model>, with --init runs/<data>-<its run>-tuned")
    add("--workers", type=whole, help="processes that prepare batches (default: up to 4)")
    add("--ckpt-every", type=positive, metavar="STEPS", help="default: 500 for Ti, else 5000")
    add("--keep", type=whole, metavar="N", help="checkpoints kept, 0 for all (default: 3)")
    add("--precision", choices=("fp32", "bf16"), help="default: the faster one")
    add("--grad-checkpoint", action="store_true", help="less memory, a quarter slower")
    add("--compile", action=argparse.BooleanOptionalAction, help="default: on a GPU")
    add("--benchmark", action="store_true", help="measure the speed, write one line of JSON")
    return parser


def default_out(args):
    data = data_name(args.data or args.latents or "shapes")
    if args.init:
        return f"runs/{data}-{run_folder(newest_checkpoint(args.init)).name}-tuned"
    return f"runs/{data}-{(args.model or 'SiT-Ti/2').replace('/', '-')}"


def settings(parser, device):
    """All settings, the newest checkpoint (None before the first), --init (model, settings), data.

    What the command leaves open is as in the checkpoint, else as in --init, else by default.
    """
    given = parser.parse_args()
    out = given.out or default_out(given)
    prepare(out)
    if Path(out).exists() and not given.benchmark:
        lock(out, "checkpoints", "samples")
    checkpoint = None if given.benchmark else newest_whole(out)
    saved = checkpoint["settings"] if checkpoint else {}
    init, of_init = open_init(given) if given.init and not checkpoint else (None, {})
    model = given.model or saved.get("model") or of_init.get("model", "SiT-Ti/2")
    family, size = model.split("/")[0].split("-")
    parser.set_defaults(data="shapes", noise_drop=0.1, class_drop=0.1, ema=0.9999, seed=0, keep=3,
                        interpolant=FAMILIES[family], learn_sigma=True, in_channels=None,
                        precision=broadcast(fast_precision(device)), compile=device.type == "cuda",
                        **(TI if size == "Ti" else LARGE))
    if given.init and size == "Ti":
        parser.set_defaults(**TI_TUNING)
    inherited = "interpolant", "learn_sigma", "image_size", "in_channels"
    parser.set_defaults(**{key: of_init[key] for key in inherited if init})
    saved = {key: value for key, value in saved.items() if key not in ("compile", "workers")}
    parser.set_defaults(**{**saved, "model": model, "out": out, "command": shlex.join(sys.argv)})
    args = parser.parse_args()

    for key in FIXED if saved else ():              # what may not change while a run lasts
        if leads_to(getattr(args, key)) != leads_to(saved.get(key)):
            raise ValueError(f"{out} was started with --{key.replace('_', '-')} {saved.get(key)}, "
                             f"not {getattr(args, key)}; give another --out")
    if init and args.interpolant != of_init["interpolant"]:
        raise ValueError(f"{args.init} was trained on {of_init['interpolant']}, and cannot start a "
                         f"model on {args.interpolant}; leave out --interpolant")
    if args.batch % WORLD:
        raise ValueError(f"a batch of {args.batch} cannot be shared by {WORLD} ranks; "
                         f"give a --batch that {WORLD} divides")
    data = training_data(args, given, of_init, device)
    before = saved.get("classes"), saved.get("fingerprint")
    if saved and before != (data.classes, data.fingerprint):
        raise ValueError(f"the images of {args.data} changed since {out} was started; to go on "
                         f"with these, give --init {out} and another --out")
    args.classes, args.num_classes = data.classes, len(data.classes)
    args.fingerprint = data.fingerprint
    if args.workers is None:
        args.workers = 0 if data.endless and device.type == "cpu" else WORKERS
    if args.init and not (saved or given.steps or given.epochs or data.endless):
        args.epochs = 10
    if args.epochs:
        if data.endless:
            raise ValueError("shapes are endless and have no epochs; use --steps")
        args.steps, args.epochs = math.ceil(args.epochs * len(data) / args.batch), None
    if saved and args.cooldown and args.steps != saved["steps"]:
        raise ValueError(f"the rate of {out} falls to 0 towards step {saved['steps']}, not "
                         f"{args.steps}; give another --out")
    return args, checkpoint, (init, of_init), data


def training_data(args, given, of_init, device):
    """The data set; settles image_size, input_size and in_channels, and encodes what is missing."""
    note = read_note(args.latents) if args.latents else None
    drawn = is_drawn(args.data) and bool(given.data or not note)
    latent = bool(args.latents or args.vae or args.in_channels == models.VAE.channels)
    if latent and drawn:
        raise ValueError("shapes are trained in pixels, and there are no finished latents; "
                         "give the --data to encode")
    by_default = 256 if latent else 16 if drawn and "-Ti/" in args.model else 32
    size = args.image_size or (note["image_size"] if note else by_default)
    latent = latent or not drawn and size >= 256
    args.image_size, args.in_channels = size, models.VAE.channels if latent else 3
    args.input_size = size // models.VAE.factor if latent else size
    what = f"{size}×{size} {'images in latents' if latent else 'pixels'}"
    if of_init and (of_init["image_size"], of_init["in_channels"]) != (size, args.in_channels):
        raise ValueError(f"{args.init} was not trained on {what}; give --image-size "
                         f"{of_init['image_size']}, or other data")
    if not latent:
        return open_data(args.data, size, args.seed)
    args.latents = args.latents or f"runs/latents-{data_name(args.data)}-{size}"
    if given.data or not note:
        encode(args, device)
    data = Latents(args.latents)
    if data.note["image_size"] != size:
        raise ValueError(f"{args.latents} holds no latents of {what}; give another --latents")
    args.data, args.vae = data.note["data"], args.vae or data.note["vae"]
    return data


def open_init(args):
    """--init's model and its settings."""
    large = f"{args.init}-{args.image_size}"        # DiT-XL/2 is published for 512×512, too
    source = large if large in models.PUBLISHED else newest_checkpoint(args.init)
    with rank_0_first():
        return models.from_checkpoint(source, args.model)


def new_model(args, init, of_init):
    """The network as it starts: fresh, or with the weights of --init."""
    torch.manual_seed(args.seed)
    shape = {key: getattr(args, key)
             for key in ("input_size", "in_channels", "num_classes", "learn_sigma")}
    model = models.MODELS[args.model](**shape)
    if init:
        weights, table = init.state_dict(), "y_embedder.embedding_table.weight"
        numbered = of_init["classes"][0].isdecimal()             # numbers stand for any names
        same = of_init["num_classes"] == args.num_classes if numbered else \
            of_init["classes"] == args.classes
        if not same:
            weights[table] = model.state_dict()[table]
            print(f"{args.init} was trained on other classes ({of_init['num_classes']}) than "
                  f"{args.data} ({args.num_classes}): the label table starts anew")
        models.load_weights(model, weights, args.init)
    return model


def newest_whole(out):
    """The newest checkpoint of a run that is whole, None where none was written.

    Those after it are damaged, and renamed. Raises ValueError where the first is, too.
    """
    found = checkpoints(out) if RANK == 0 else []
    while found:
        try:
            with zipfile.ZipFile(found[-1]) as archive:
                if wrong := archive.testzip():      # reads it all: one flipped bit is too many
                    raise ValueError(wrong)
            checkpoint = models.load_file(found[-1])
            kinds = {"model": dict, "ema": dict, "opt": dict, "step": int, "settings": dict}
            for key, kind in kinds.items():
                if not isinstance(checkpoint.get(key), kind):
                    raise ValueError(f"it has no {key}")
            break
        except (ValueError, zipfile.BadZipFile, zlib.error, EOFError, RuntimeError) as error:
            damaged = found.pop()
            if not found:
                raise ValueError(f"cannot go on from {damaged}: {error}; remove it, "
                                 "or give another --out") from None
            print(f"{damaged} is damaged ({error}), and now named .damaged; "
                  f"going on from {found[-1]}")
            damaged.rename(damaged.with_suffix(".pt.damaged"))
    newest = broadcast(found[-1] if found else None)
    return newest and models.load_file(newest)


class Log:
    """OUT/log.jsonl, a line for each step, and the progress on the terminal."""

    def __init__(self, trainer, start):
        args, self.trainer, self.losses, self.bad = trainer.args, trainer, [], 0
        self.validation_loss = None
        self.peak = WORLD * matmul_rate(trainer.device, args.precision)
        path = Path(args.out, "log.jsonl")
        if RANK == 0:                               # steps after the checkpoint are repeated
            lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
            with replacing(path) as file:
                file.writelines(lines[:start])
        self.file = open(path, "a") if RANK == 0 else open(os.devnull, "w")
        self.bar = progress(total=args.steps, initial=start, unit="step", smoothing=0.05)
        self.since = time.perf_counter()

    def add(self, loss):
        self.losses.append(loss)
        self.bar.update()

    def restart(self):
        """The speed is measured from here on: what came before was no training."""
        self.since = time.perf_counter()
        self.bar.refresh()

    def flush(self, step, validation=None):
        """Write the losses up to this step, and that on a validation batch, which takes no part in
        the speed. Nothing else reads the losses: it waits for the device.

        Raises ValueError after ten steps in a row without a finite loss and gradient.
        """
        if not self.losses:
            return
        args, losses, self.losses = self.trainer.args, torch.stack(self.losses), []
        if WORLD > 1:
            dist.all_reduce(losses)
        losses = (losses / WORLD).tolist()
        speed = round(args.batch * len(losses) / (time.perf_counter() - self.since), 1)
        if validation:
            self.validation_loss = self.trainer.validation_loss(validation)
        self.since = time.perf_counter()
        finite = [loss for loss in losses if math.isfinite(loss)]
        for number, loss in enumerate(losses, step - len(losses) + 1):
            self.bad = 0 if loss in finite else self.bad + 1
            row = {"step": number, "loss": None if self.bad else loss, "images_per_s": speed}
            if validation and number == step:
                row["validation_loss"] = self.validation_loss
            print(json.dumps(row), file=self.file, flush=True)
            if self.bad and RANK == 0:
                self.bar.write(f"step {number} was skipped: its gradient is not finite")
            if self.bad == 10:
                last = checkpoints(args.out)[-1:] or ["none"]
                raise ValueError(f"ten steps in a row up to {number} had no finite gradient; the "
                                 f"last good checkpoint is {last[0]}; start anew with a lower --lr "
                                 "and another --out")
        mfu = speed * self.trainer.flops / self.peak
        mean = np.mean(finite) if finite else math.nan
        held_out = f" (held out {self.validation_loss:.4f})" if self.validation_loss else ""
        self.bar.set_postfix_str(f"loss {mean:.4f}{held_out}, {speed:.0f} images/s, MFU {mfu:.0%}",
                                 refresh=False)


class Interruption:
    """Ctrl-C and other signals leave a note, which ranks share between two passes."""

    def __init__(self):
        self.signals = []
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) != signal.SIG_IGN:       # as nohup has it
                signal.signal(number, self.note)

    def note(self, number, frame):
        if number == signal.SIGINT in self.signals:
            raise KeyboardInterrupt                 # the second Ctrl-C
        self.signals.append(number)
        with contextlib.suppress(OSError, RuntimeError):         # the terminal may be gone
            print("\nstopping after this pass", flush=True)

    def __call__(self):
        noted = torch.tensor(len(self.signals))
        if WORLD > 1:
            dist.all_reduce(noted)
        return noted.item() > 0


def save(trainer, step):
    """Write the checkpoint of this step, and remove what is older than --keep."""
    args = trainer.args
    if not all(value.isfinite().all() for value in trainer.model.parameters()):
        raise ValueError(f"the weights after step {step} are not finite, and are not saved; "
                         "start anew with a lower --lr and another --out")
    path = Path(args.out, "checkpoints", f"{step:07}.pt")
    checkpoint = {"model": trainer.model.state_dict(), "ema": trainer.ema.state_dict(),
                  "step": step, "settings": vars(args),
                  **{name: opt.state_dict() for name, opt in trainer.optimizers.items()}}
    with replacing(path) as file:
        torch.save(checkpoint, file)
    for old in checkpoints(args.out)[:-args.keep] if args.keep else ():
        old.unlink()


def main():
    parser, device = arguments(), join_ranks()
    args, checkpoint, init, data = settings(parser, device)
    step = start = checkpoint["step"] if checkpoint else 0
    if step >= args.steps:
        return print(f"{args.out} is finished: it stands at step {step} of {args.steps}"
                     + "; a larger --steps goes on" * (not args.cooldown))
    trainer = Trainer(new_model(args, *init), args, device)
    if args.benchmark:
        return speed_of(trainer, data)
    if checkpoint:
        trainer.resume(checkpoint)
    if RANK == 0:
        lock(args.out, "checkpoints", "samples")
        vae = models.load_vae(args.vae).to(device) if data.latent else None
    del checkpoint, init                            # their files are mapped
    count = sum(p.numel() for p in trainer.model.parameters())
    print(f"{args.model} ({count / 1e6:.1f} M parameters, {args.interpolant}) on {args.data} "
          f"{args.image_size}×{args.image_size}: steps {step} to {args.steps} of {args.batch} "
          f"images ({args.micro_batch} at a time), {args.precision} on {WORLD} {device.type}; "
          f"writes {args.out}")
    log, interrupted = Log(trainer, start), Interruption()

    training, validation = open_batches(data, args)
    batches = load(training, range(start, args.steps), args.workers, device)
    while step < args.steps:
        try:
            batch = next(batches)
        except DataError:
            if WORLD == 1 and step > start:
                log.flush(step)
                save(trainer, step)
            raise
        loss = trainer.step(batch, step + 1, interrupted)
        if loss is None:
            break
        step += 1
        log.add(loss)
        saving = step % args.ckpt_every == 0 or step == args.steps
        if saving or step % 10 == 0:
            log.flush(step, validation if saving else None)
        if saving and RANK == 0:
            save(trainer, step)
            write_grid(trainer, step, vae)
            log.restart()

    log.bar.close()
    if step == args.steps:
        nag = " --w-nag 3" if args.noise_drop else ""
        return print(f"finished: {args.out}/checkpoints/{step:07}.pt; now: "
                     f"python sample.py{nag} --ckpt {args.out}")
    log.flush(step)
    if step > start and RANK == 0:
        save(trainer, step)
    if WORLD > 1:
        dist.barrier()                              # torchrun ends all when one has ended
    with contextlib.suppress(OSError):              # the terminal may be gone
        print(f"stopped at step {step}; the same command goes on", flush=True)
    raise SystemExit(128 + (interrupted.signals or [signal.SIGTERM])[0])      # so that && stops


def speed_of(trainer, data):
    """--benchmark: one batch, again and again."""
    batch = Batches(data, trainer.args)[0]
    if trainer.device.type == "cuda":
        batch = [part.pin_memory() for part in batch]
    calls = {"training": (lambda: trainer.step(batch, 1), trainer.flops)}
    print(json.dumps(benchmark(calls, trainer.args, trainer.device, trainer.args.batch)))


# --------------------------------------------------------------------------------------------------
# Encoding a folder of images into latents


def encode(args, device):
    """Encode the images of --data into the parts of --latents that do not exist yet.

    All ranks share the work, in whole parts. Raises ValueError where the folder holds latents of
    other data. When an image is added or removed, the parts from there on are made anew.
    """
    size, factor = args.image_size, models.VAE.factor
    if size % factor:
        raise ValueError(f"--image-size {size} is not a multiple of {factor}, as the VAE needs; "
                         "give one that is")
    folder, source = Path(args.latents), ImageFolder(args.data, size)
    with rank_0_first():
        vae = models.load_vae(args.vae).to(device)
    n, weights, before = Latents.per_part, models.fingerprint(vae), read_note(folder)
    if before and (leads_to(before["data"]), before["image_size"], before["weights"]) != \
            (leads_to(args.data), size, weights):
        raise ValueError(f"{folder} holds latents of {before['data']} at {before['image_size']} by "
                         f"{before['vae'] or 'the published VAE'}; give another --latents")
    parts = [range(i, min(i + n, len(source))) for i in range(0, len(source), n)]
    names = [os.path.relpath(name, args.data) for name in source.files]
    files = [folder / f"{k:05}-{digest([weights, str(size), *names[part.start:part.stop]])}.npy"
             for k, part in enumerate(parts)]
    lock(folder)
    todo = broadcast([k for k, file in enumerate(files) if not file.exists()])
    if RANK == 0:
        note = {"data": args.data, "image_size": size, "images": len(source), "vae": args.vae,
                "classes": source.classes, "counts": np.bincount(source.labels).tolist(),
                "weights": weights, "parts": [file.name for file in files]}
        with replacing(folder / "latents.json") as file:
            file.write(json.dumps(note, indent=1).encode())
    needed = len(source) * 2 * 8 * (size // factor)**2 * 2 / 1e9
    print(f"{len(source)} images of {args.data} at {size}×{size}, and mirror images, in {folder}: "
          f"{needed:.2f} GB, {len(todo)} of {len(files)} parts are missing")
    todo = todo[RANK::WORLD]
    numbers = [i for k in todo for i in parts[k]]
    images = load(source, numbers, WORKERS if args.workers is None else args.workers, device)
    with progress(total=len(numbers), unit="image", desc="encoding") as bar:
        for k in todo:
            moments = []
            for i in range(0, len(parts[k]), 16):   # always the same 16, for the same rounding
                pixels = torch.stack(list(itertools.islice(images, len(parts[k][i:i + 16]))))
                pixels = to_float(pixels.to(device))
                both = [torch.cat(vae.encode(x), 1) for x in (pixels, pixels.flip(3))]
                moments.append(torch.stack(both, 1).half().cpu())
                bar.update(len(pixels))
            with replacing(files[k]) as file:
                np.save(file, torch.cat(moments).numpy())
    torch.cuda.empty_cache()                        # what the VAE used is free for training
    if WORLD > 1:
        dist.barrier()


# --------------------------------------------------------------------------------------------------
# Plumbing that all scripts share; a reader of the method may stop here.


def stop(message, everywhere=False):
    """End with one line on standard error and exit status 2; of several ranks, the first speaks."""
    for bar in list(getattr(tqdm, "_instances", ())):
        bar.close()                                 # the line stands alone
    if RANK == 0 or everywhere:
        print(f"{Path(sys.argv[0]).name}: {' '.join(str(message).split())}", file=sys.stderr)
    raise SystemExit(2)


def one_line_errors(main):
    """Run main(); an error of the user or of the system is one line, with exit status 2.

    `python -X dev` shows where it was raised.
    """
    sys.stdout, sys.stderr = (out or open(os.devnull, "w") for out in (sys.stdout, sys.stderr))
    sys.stdout.reconfigure(errors="backslashreplace")            # file names need not be text
    try:
        main()
        sys.stdout.flush()
    except BrokenPipeError:                         # as in: train.py | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(128 + signal.SIGPIPE) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    except Exception as error:
        if sys.flags.dev_mode or not (message := explanation(error)):
            raise
        stop(message, everywhere=not isinstance(error, ValueError) or isinstance(error, DataError))
    finally:
        end_workers()                               # after an error NCCL could wait for ever
        if dist.is_initialized() and (sys.exc_info()[0] is None or not torch.cuda.is_available()):
            dist.destroy_process_group()


def explanation(error):
    """What the user reads of an error, None where it is a mistake of the program."""
    text = str(error)
    if isinstance(error, ValueError):
        return text
    if isinstance(error, OSError):
        return f"{error.filename or 'file system'}: {error.strerror or text}"
    if isinstance(error, MemoryError) or "allocate memory" in text or "out of memory" in text:
        return "there is not enough memory; lower --micro-batch (train.py), --batch, or the size"
    if "DataLoader worker" in text:
        return ("a process that prepares batches was killed, as happens when memory is short; the "
                "same command goes on, or with fewer --workers")
    if "without overflow" in text:
        return f"a number is too large ({text}); lower --lr"
    if "ompiler" in text:
        return "torch.compile finds no working compiler; give --no-compile"
    if WORLD > 1 and "by peer" in text:
        return "another rank has stopped; its message says why"


class Arguments(argparse.ArgumentParser):
    def __init__(self, story, **options):
        story = (story or "").split("\n\n")[0]           # python -OO leaves no docstrings
        super().__init__(description=story, allow_abbrev=False, **options)

    def error(self, message):
        stop(f"{message}; see --help")


def number(kind, low=-math.inf, high=math.inf):
    """An argparse type: a finite int or float with low <= value <= high."""
    def parse(text):
        with contextlib.suppress(ValueError):
            if low <= (value := kind(text)) <= high and abs(value) < math.inf:
                return value
        name = {int: "a whole number", float: "a number"}[kind]
        limits = f" from {low:g} to {high:g}" if high < 2**62 else f" of at least {low:g}"
        raise argparse.ArgumentTypeError(f"{text!r} is not {name}{limits * (low > -math.inf)}")
    return parse


def place(text):
    """An argparse type: the name of a file or folder."""
    if not text:
        raise argparse.ArgumentTypeError("an empty name; give that of a file or folder")
    return text if text in models.PUBLISHED else os.path.normpath(text)


def leads_to(name):
    """Where a name leads on disk, so that two names of one place are equal; else the name."""
    return os.path.realpath(name) if isinstance(name, str) and os.path.exists(name) else name


@contextlib.contextmanager
def replacing(path):
    """An open binary file that takes the place of `path`, in a folder that exists, when whole."""
    path = Path(path)
    beside = path.with_name(f".{path.name}.tmp")
    try:
        with open(beside, "wb") as file:
            fcntl.lockf(file, fcntl.LOCK_EX)        # until it is closed, or its writer is killed
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except (OSError, RuntimeError) as error:        # torch.save and np.save do not tell the reason
        if "CUDA" in str(error):
            raise
        why = getattr(error, "strerror", None) or "cannot be written; is the disk full?"
        raise OSError(getattr(error, "errno", None), why, str(path)) from None
    finally:
        with contextlib.suppress(OSError):
            beside.unlink()


def clear(folder):
    """Remove the unfinished files of killed writers: those of living ones are locked."""
    for unfinished in Path(folder).glob(".*.tmp"):
        with contextlib.suppress(OSError), open(unfinished, "r+b") as file:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            unfinished.unlink()


def save_png(image, path):
    """Write a picture, and in it the command that made it."""
    info, command = PngImagePlugin.PngInfo(), shlex.join(sys.argv)
    info.add_text("command", command.encode(errors="backslashreplace").decode())
    with replacing(path) as file:
        image.save(file, "png", pnginfo=info)


LOCKS = {}                                          # open files: locks end with their process


def lock(folder, *inside):
    """Rank 0 makes a folder, and folders inside, and becomes their only writer."""
    if RANK or folder in LOCKS:
        return
    places = [Path(folder), *(Path(folder, name) for name in inside)]
    for place in places:
        place.mkdir(parents=True, exist_ok=True)
    LOCKS[folder] = open(Path(folder, ".lock"), "ab")
    try:
        fcntl.lockf(LOCKS[folder], fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        raise ValueError(f"another process is writing {folder}; wait for it, "
                         "or give another --out") from None
    for place in places:
        clear(place)


def prepare(path):
    """Before the work: raises OSError where a file or folder cannot be made, and clears its place
    of what killed writers left."""
    above = next(place for place in (Path(path), *Path(path).absolute().parents) if place.exists())
    if not os.access(above, os.W_OK) or above.is_file() and above != Path(path):
        raise OSError(None, "nothing can be written there", str(path))
    if RANK == 0:
        clear(Path(path).parent)


def checkpoints(out):
    """The checkpoint files of a run, oldest first."""
    found = (path for path in Path(out, "checkpoints").glob("*.pt") if path.stem.isdecimal())
    return sorted(found, key=lambda path: int(path.stem))


def newest_checkpoint(name):
    """The checkpoint that a name means: itself, or a run's newest."""
    if name in models.PUBLISHED or not Path(name).is_dir():
        return name
    name = str(Path(name).parent) if Path(name).name == "checkpoints" else name
    found = checkpoints(name)
    if not found:
        raise ValueError(f"no checkpoints in {name}/checkpoints; train some with: "
                         f"python train.py --out {name}")
    return broadcast(str(found[-1]))


def run_folder(ckpt):
    """Where what is made of a checkpoint goes: its run, or of a file elsewhere, runs/<its name>."""
    if ckpt in models.PUBLISHED:
        return Path("runs", ckpt.replace("/", "-"))
    parent = Path(ckpt).parent
    return parent.parent if parent.name == "checkpoints" else Path("runs", Path(ckpt).stem)


def join_ranks():
    """The device of this rank, after joining the others under torchrun."""
    cuda = torch.cuda.is_available()
    if RANK >= WORLD:
        stop(f"RANK is {RANK} of a WORLD_SIZE of {WORLD}; start ranks by torchrun", everywhere=True)
    if cuda and LOCAL_RANK >= torch.cuda.device_count():
        stop(f"rank {LOCAL_RANK} has no GPU, there are {torch.cuda.device_count()}; "
             "lower --nproc-per-node", everywhere=True)
    if cuda:
        torch.cuda.set_device(LOCAL_RANK)
        torch.backends.cudnn.allow_tf32 = False     # fp32 means fp32, in the patch embedding too
    if RANK:
        sys.stdout = open(os.devnull, "w")          # one rank prints
    if WORLD > 1 and not dist.is_initialized():     # ranks may wait long for one that writes
        backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
        dist.init_process_group(backend, timeout=datetime.timedelta(days=1))
    return torch.device("cuda", LOCAL_RANK) if cuda else torch.device("cpu")


def broadcast(value):
    """Rank 0's plain value, on every rank."""
    box = [value]
    if WORLD > 1:
        dist.broadcast_object_list(box)
    return box[0]


@contextlib.contextmanager
def rank_0_first():
    """The other ranks do what stands below after rank 0, and find what it downloaded."""
    if RANK and WORLD > 1:
        dist.barrier()
    yield
    if RANK == 0 and WORLD > 1:
        dist.barrier()


def load(dataset, numbers, workers, device):
    """dataset[number] for each of the numbers, in order, prepared by worker processes.

    Raises DataError for data that cannot be read, RuntimeError where a worker was killed.
    """
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]        # beyond it, workers would hang
    if workers and 0 <= files < 32 * (1 + workers):
        raise DataError(f"{workers} workers need more open files than the {files} allowed; raise "
                        "the limit, as by ulimit -n 1024, or give fewer --workers")
    loader = torch.utils.data.DataLoader(dataset, batch_size=None, sampler=numbers,
                                         num_workers=workers, pin_memory=device.type == "cuda",
                                         worker_init_fn=ignore_signals)
    try:
        yield from loader
    except DataError as error:                      # a worker's message is a traceback
        raise DataError(str(error).rpartition("DataError: ")[2]) from None
    except (RuntimeError, OSError, EOFError) as error:
        if isinstance(error, (ConnectionError, EOFError)):       # PyTorch finds it in several ways
            raise RuntimeError("DataLoader worker") from None
        raise


def ignore_signals(worker):
    """Ctrl-C and SIGTERM are for the run to answer, not for processes that prepare batches."""
    sys.stderr = open(os.devnull, "w")              # their errors are carried to the run
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def end_workers():
    """Kill the processes that prepare batches: they ignore SIGTERM, and Python would wait."""
    for worker in torch.multiprocessing.active_children():
        if worker.daemon:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)        # PyTorch would raise an error
            sys.unraisablehook = lambda unraisable: None
            worker.kill()


def progress(**options):
    """A bar on rank 0, where standard error is a terminal; elsewhere a line every minute."""
    if not sys.stderr.isatty():
        bar = options.pop("bar_format", "{l_bar}{bar:10}{r_bar}")
        options |= {"bar_format": bar + "\n", "mininterval": 60, "maxinterval": 60}
    return tqdm(disable=RANK != 0, dynamic_ncols=True, **options)


def fast_precision(device):
    """bf16 where its products are the faster ones, else fp32.

    CPUs with the same instructions take from a third to twice fp32's time for them. The best of
    100 short turns decides, which is the same on one machine, however busy.
    """
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    if not torch.backends.mkldnn.is_available() \
            or not torch.ops.mkldnn._is_mkldnn_bf16_supported():     # it would take seconds
        return "fp32"
    factors = {"fp32": torch.randn(256, 256), "bf16": torch.randn(256, 256).bfloat16()}
    times = {name: [] for name in factors}
    for _ in range(100):
        for name, a in factors.items():
            times[name].append(seconds(lambda: a @ a, device))
    return min(times, key=lambda name: min(times[name]))


def seconds(call, device):
    """How long a call takes, with what it leaves to a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def matmul_rate(device, precision):
    """Matrix-product rate of this device, FLOP/s, measured now: the yardstick of MFU."""
    n = 8192 if device.type == "cuda" else 1024
    a = torch.randn(n, n, device=device, dtype=torch.bfloat16 if precision == "bf16" else None)
    return 2 * n**3 / np.median([seconds(lambda: a @ a, device) for _ in range(5)])


def benchmark(calls, args, device, images, lasting=20):
    """Time calls, {name: (call, FLOP per image)}, each of so many images on all ranks together.

    They take turns, for so many seconds, and the figures are medians, ready for JSON.
    """
    times, rates, start = {name: [] for name in calls}, [], time.perf_counter()
    while len(rates) < 5 or broadcast(time.perf_counter() - start < lasting):
        rates.append(matmul_rate(device, args.precision))
        for name, (call, _) in calls.items():
            times[name].append(seconds(call, device))
    rate, rows = WORLD * np.median(rates), {}
    for name, (_, flops) in calls.items():
        speed = images / np.median(times[name][2:])              # the first two compile
        rows[name] = {"images_per_s": round(speed, 3), "flops_per_image": flops,
                      "mfu": round(speed * flops / rate, 4)}
    if device.type == "cuda":
        name, peak = torch.cuda.get_device_name(), torch.cuda.max_memory_allocated()
    else:
        name = f"cpu, {torch.get_num_threads()} threads"
        peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"model": args.model, "device": name, "ranks": WORLD, "batch": args.batch,
            "precision": args.precision, "compile": args.compile, "matmul_flops": round(rate),
            "peak_memory_gb": round(peak / 1e9, 3), **rows}


if __name__ == "__main__":
    one_line_errors(main)
