"""Train a DiT or SiT with noise dropout, so that its samples can be guided by the noise level.

    python train.py                                             # drawn shapes, a small SiT, minutes on two CPU cores
    python train.py --data photos --image-size 64               # a folder of images, its sub-folders being the classes
    torchrun --nproc-per-node 8 train.py --model DiT-XL/2 --noise-drop 0.1
    torchrun --nproc-per-node 8 train.py --data imagenet --image-size 256 --init DiT-XL/2 --epochs 10     # published weights

Images of 256×256 and more are encoded once, by the VAE of Stable Diffusion, and training reads their latents.

Everything random about step s is a function of (seed, s), for the whole batch: which images, their flips, levels and noise,
and both dropouts. A rank takes its slice of it. So a run that was stopped repeats, bit for bit, what it would have done,
and any number of ranks follows the same curve. Stop it at any time; the same command goes on.

Writes OUT/checkpoints/0001000.pt, OUT/samples/0001000.png (EMA samples, always from the same noise) and OUT/log.jsonl.
"""
import argparse
import contextlib
import copy
import ctypes
import datetime
import fcntl
import functools
import hashlib
import importlib.util
import json
import math
import mmap
import os
import re
import resource
import shutil
import signal
import sys
import time
import zipfile
import zlib
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.nn                                       # early: imported later, by DDP, its default arguments would keep the group alive
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import diffusion
import models

WORKERS = min(4, os.cpu_count())                                  # processes that prepare batches, where nothing else is said
RANK, WORLD, LOCAL_RANK = (int(os.environ.get(name, default)) for name, default in
                           (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))


# ---------------------------------------------------------------------------------------------------------------------
# The user's errors: one line, exit status 2


def stop(message, everywhere=False):
    """End with one line on standard error and exit status 2; of several ranks, the first speaks (or `everywhere`)."""
    for bar in list(getattr(tqdm, "_instances", ())):
        bar.close()                                               # the line stands alone
    if RANK == 0 or everywhere:
        print(f"{Path(sys.argv[0]).name}: {' '.join(str(message).split())}", file=sys.stderr)
    raise SystemExit(2)


class Arguments(argparse.ArgumentParser):
    def __init__(self, story, **options):
        super().__init__(description=story.split("\n\n")[0], allow_abbrev=False, **options)

    def error(self, message):
        stop(f"{message}; see --help")


def number(kind, low=-math.inf, high=math.inf):
    """An argparse type: a finite int or float with low <= value <= high."""
    def parse(text):
        try:
            value = kind(text)
            valid = low <= value <= high and abs(value) < math.inf
        except ValueError:
            valid = False
        if not valid:
            name = {int: "a whole number", float: "a number"}[kind]
            bounds = f" from {low:g} to {high:g}" if high < math.inf else f" of at least {low:g}" if low > -math.inf else ""
            raise argparse.ArgumentTypeError(f"{text!r} is not {name}{bounds}")
        return value
    return parse


def one_line_errors(main):
    """Run `main`, ending with one line for what the file system refuses (no space, no permission, a folder gone)."""
    sys.stdout.reconfigure(errors="backslashreplace")             # file names need not be text
    try:
        main()
    except torch.OutOfMemoryError:
        stop("the GPU has not enough free memory; lower --micro-batch (train.py) or --batch (sample.py)", everywhere=True)
    except (OSError, RuntimeError) as error:
        if "DataLoader worker" in str(error) or isinstance(error, ConnectionResetError):      # torch finds it in two ways
            sys.unraisablehook = lambda unraisable: None          # its loader would complain once more while it is taken down
            stop("a process that prepares batches was killed, as happens when memory is short; the same command goes on, with fewer --workers if "
                 "that helps", everywhere=True)
        if not isinstance(error, OSError):
            raise
        stop(f"{error.filename or 'file system'}: {error.strerror or error}", everywhere=True)
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    finally:
        if dist.is_initialized() and (sys.exc_info()[0] is None or not torch.cuda.is_available()):
            dist.destroy_process_group()                          # after an error NCCL could wait for the others for ever


# ---------------------------------------------------------------------------------------------------------------------
# Data: shapes that the code draws, or a folder of images. Both give uint8 images (n, 3, size, size) and labels (n,).


def generator(*key):
    """The random numbers that belong to a key, such as (seed, "batch", step); names are hashed to integers."""
    return np.random.default_rng([zlib.crc32(part.encode()) if isinstance(part, str) else part for part in key])


class Shapes:
    """Endless images of one shape each, drawn from (seed, index): class, colour, place, size and rotation are random.

    The outline is where a signed distance is zero (negative inside); the distance, in pixels, also antialiases it.
    """

    endless, latent = True, False
    classes = ["bar", "circle", "cross", "moon", "ring", "square", "star", "triangle"]
    held_out = 2**40                                              # from this index on, for what training should not have seen

    def __init__(self, image_size, seed=0, name="shapes"):
        """`name` is "shapes", or "shapes:star,cross" for some of the classes. Raises ValueError for one that cannot be drawn."""
        self.image_size, self.seed = image_size, seed
        if name != "shapes":
            self.classes = sorted(set(name.removeprefix("shapes:").split(",")))
            if unknown := set(self.classes) - set(Shapes.classes):
                raise ValueError(f"no shape {sorted(unknown)[0]!r}; {name} may name {', '.join(Shapes.classes)}")

    @staticmethod
    def distance(name, x, y):
        """Signed distance of the points (x, y) to the outline of a shape at the origin, with a radius of about 1."""
        r, wide, narrow = np.hypot(x, y), np.maximum(abs(x), abs(y)), np.minimum(abs(x), abs(y))
        if name == "bar":
            return np.maximum(abs(x) - 1, abs(y) - 0.36)
        if name == "circle":
            return r - 0.9
        if name == "cross":
            return np.maximum(wide - 1, narrow - 0.36)
        if name == "moon":
            return np.maximum(r - 1, 0.78 - np.hypot(x - 0.5, y))
        if name == "ring":
            return abs(r - 0.74) - 0.24
        if name == "square":
            return wide - 0.8
        if name == "triangle":
            return np.maximum(abs(x) * 3**0.5 / 2 - y / 2, y) - 0.54
        # star: fold the plane onto half of one spike, which is bounded by the line from its tip to the next notch
        fold = np.arctan2(x, -y) % (2 * np.pi / 5)
        fold = np.minimum(fold, 2 * np.pi / 5 - fold)
        tip, notch = 1.1, 0.48
        normal = np.array([notch * np.sin(np.pi / 5), tip - notch * np.cos(np.pi / 5)])
        normal /= np.hypot(*normal)
        return normal[0] * (r * np.cos(fold) - tip) + normal[1] * r * np.sin(fold)

    def images(self, indices, flip=None):                         # no flips: all that they could show is drawn anyway
        u = np.stack([generator(self.seed, "shapes", int(i)).random(6) for i in indices]).T[:, :, None, None]
        label = (u[0] * len(self.classes)).astype(np.int64).ravel()
        radius, angle, hue = 0.6 + 0.25 * u[1], np.pi / 9 * (2 * u[4] - 1), 6 * u[5]     # up to 20° to either side

        at = (np.arange(self.image_size) + 0.5) * 2 / self.image_size - 1                # the image spans [−1, 1]²
        x, y = (at - (2 * v - 1) * (0.95 - radius) for v in u[2:4])
        x, y = x * np.ones_like(y).swapaxes(1, 2), y.swapaxes(1, 2) * np.ones_like(x)
        x, y = (np.cos(angle) * x + np.sin(angle) * y) / radius, (np.cos(angle) * y - np.sin(angle) * x) / radius
        distance = np.empty_like(x)
        for k, name in enumerate(self.classes):
            distance[label == k] = self.distance(name, x[label == k], y[label == k])
        cover = np.clip(0.5 - distance * radius * self.image_size / 2, 0, 1)

        k = (hue[:, None] + np.array([5, 3, 1])[:, None, None]) % 6        # HSV to RGB, (n, 3, 1, 1)
        colour, grey = 1 - 0.85 * np.clip(np.minimum(k, 4 - k), 0, 1), 0.12
        images = grey + cover[:, None] * (colour - grey)
        return (255 * images + 0.5).astype(np.uint8), label


class ImageFolder:
    """The images below a folder; its sorted sub-folders are the classes (without sub-folders, there is one class)."""

    endless, latent = False, False
    suffixes = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm"}

    def __init__(self, folder, image_size):
        self.image_size = image_size
        if not Path(folder).is_dir():
            stop(f"no folder {folder}; --data takes a folder of images, shapes, or shapes:star,cross")
        self.classes = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir())
        self.files, self.labels = [], []
        for label, name in enumerate(self.classes or ["."]):
            found = sorted(path for path in Path(folder, name).rglob("*") if path.suffix.lower() in self.suffixes)
            self.files += [str(path) for path in found]           # plain strings: a million Paths weigh a gigabyte
            self.labels += [label] * len(found)
        beside = [entry.name for entry in os.scandir(folder) if Path(entry.name).suffix.lower() in self.suffixes]
        if self.classes and beside:
            stop(f"{folder} has class sub-folders and {len(beside)} images beside them, such as {beside[0]}; move these into a class")
        self.classes = self.classes or ["all"]
        if not self.files:
            stop(f"no images in {folder} ({', '.join(sorted(self.suffixes))}); give --data another folder")

    def __len__(self):
        return len(self.files)

    def fingerprint(self, folder):
        """Sixteen hexadecimal digits that stand for the names of the files, below the folder that was opened."""
        names = "\0".join(name.removeprefix(f"{Path(folder)}/") for name in self.files)
        return hashlib.sha256(names.encode(errors="surrogateescape")).hexdigest()[:16]

    def part(self, numbers):
        """The same with only these images."""
        part = copy.copy(self)
        part.files, part.labels = [self.files[i] for i in numbers], [self.labels[i] for i in numbers]
        return part

    def images(self, indices, flip):
        out = np.empty((len(indices), 3, self.image_size, self.image_size), np.uint8)
        for row, index, mirrored in zip(out, indices, flip):
            image = centre_crop(read_image(self.files[index]), self.image_size)
            row[:] = image.transpose(2, 0, 1)[:, :, ::-1 if mirrored else 1]
        return out, np.array([self.labels[i] for i in indices])


def is_drawn(name):
    """Whether a data set's name means Shapes, all or some of them."""
    return name.split(":")[0] == "shapes"


def open_data(name, image_size, seed):
    """The data set that --data names, in pixels."""
    try:
        return Shapes(image_size, seed, name) if is_drawn(name) else ImageFolder(name, image_size)
    except ValueError as error:
        stop(error)


class UnreadableImage(ValueError):
    """Names the file."""


def read_image(path):
    """The image in a file as upright RGB; raises UnreadableImage when it is none."""
    try:
        with Image.open(path) as image:
            return ImageOps.exif_transpose(image).convert("RGB")
    except Exception as error:  # Pillow raises many kinds for damaged files
        raise UnreadableImage(f"cannot read the image {path} ({error}); mend or remove it") from None


def centre_crop(image, size):
    """ADM's crop (Dhariwal & Nichol, 2021): halve by boxes while twice too large, resize bicubically, cut the middle."""
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.BOX)
    scale = size / min(image.size)
    image = image.resize((max(size, round(image.width * scale)), max(size, round(image.height * scale))), Image.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return np.asarray(image)[top:top + size, left:left + size]


class Batches(torch.utils.data.Dataset):
    """Training batch number `step`, or this rank's slice of it: a function of (seed, step)."""

    def __init__(self, data, settings):
        self.data, self.settings = data, settings

    @functools.lru_cache(2)
    def order(self, epoch):
        return generator(self.settings["seed"], "order", epoch).permutation(len(self.data))

    def indices(self, step):
        """Of the data, in the global batch: epoch after epoch, each in its own order, without a gap in between."""
        places = range(step * self.settings["batch"], (step + 1) * self.settings["batch"])
        if self.data.endless:
            return np.array(places)
        return np.array([self.order(place // len(self.data))[place % len(self.data)] for place in places])

    def __getitem__(self, step):
        s, B = self.settings, self.settings["batch"]
        rng = generator(s["seed"], "batch", step)
        flip = rng.random(B) < 0.5
        t = rng.random(B) if s["interpolant"] == "linear" else (1 + rng.integers(0, diffusion.VP.steps, B)) / diffusion.VP.steps
        drop_class, drop_noise = rng.random(B) < s["class_drop"], rng.random(B) < s["noise_drop"]
        shape = B, s["in_channels"], s["input_size"], s["input_size"]
        eps = rng.standard_normal(shape, np.float32)
        noise = rng.standard_normal(shape, np.float32) if self.data.latent else None

        mine = slice(RANK * B // WORLD, (RANK + 1) * B // WORLD)
        try:
            drawn = [noise[mine]] if self.data.latent else []
            images, y = self.data.images(self.indices(step)[mine], flip[mine], *drawn)
        except UnreadableImage as error:
            return error                                          # for main() to tell: raised in a worker process it would bring a traceback
        y = np.where(drop_class[mine], s["num_classes"], y)
        batch = images, y, t[mine].astype(np.float32), eps[mine], drop_noise[mine]
        return [torch.from_numpy(np.ascontiguousarray(part)) for part in batch]


def ignore_signals(worker):
    """For the processes that prepare batches: Ctrl-C and SIGTERM are for the run itself to answer, and its end is not theirs to tell."""
    sys.excepthook = lambda *error: None                          # the thread that hands batches over; errors of the data go another way
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def to_float(images):
    """uint8 pixels as floats in [−1, 1]; latents, which are floats, as they are."""
    return images.float() / 127.5 - 1 if images.dtype == torch.uint8 else images


def to_uint8(images):
    """Floats in [−1, 1] as uint8 pixels."""
    return (127.5 * images + 128).clamp(0, 255).to(torch.uint8)


# ---------------------------------------------------------------------------------------------------------------------
# Samples: their randomness, and a picture of them


class SampleNoise:
    """All that is random about samples number `indices`, each from its own generator of (seed, index)."""

    def __init__(self, seed, indices):
        self.generators = [generator(seed, "sample", int(i)) for i in indices]

    def classes(self, among):
        """One class of the list for each sample, (B,) int64; to be drawn first."""
        return torch.tensor([among[int(g.random() * len(among))] for g in self.generators])

    def __call__(self, x):
        """Standard normal noise like x, for `randn` of the samplers."""
        noise = torch.from_numpy(np.stack([g.standard_normal(x.shape[1:], np.float32) for g in self.generators]))
        if x.device.type == "cuda":                               # from pinned memory the copy does not wait for what the GPU is doing
            noise = noise.pin_memory()
        return noise.to(x.device, non_blocking=True)


def picture(panels, columns=8, captions=None):
    """Panels {title: uint8 images (n, 3, H, W)} side by side, each a grid, with a caption under each image."""
    zoom = max(1, 64 // next(iter(panels.values())).shape[-1])
    font = ImageFont.load_default(12)
    drawn = []
    for title, images in panels.items():
        n, _, height, width = images.shape
        across, text = min(columns, n), 16 if captions else 0
        cell_w, cell_h, head = width * zoom + 6, height * zoom + 6 + text, 20 if title else 4
        panel = Image.new("RGB", (across * cell_w + 14, math.ceil(n / across) * cell_h + head + 4), "white")
        pen = ImageDraw.Draw(panel)
        pen.text((8, 3), title, "black", font)
        for i, image in enumerate(images):
            x, y = 8 + i % across * cell_w, head + i // across * cell_h
            pixels = Image.fromarray(image.permute(1, 2, 0).numpy())
            panel.paste(pixels.resize((width * zoom, height * zoom), Image.NEAREST), (x, y))
            if captions:
                pen.text((x + width * zoom / 2, y + height * zoom + 1), captions[i], "black", font, anchor="ma")
        drawn.append(panel)
    whole = Image.new("RGB", (sum(p.width for p in drawn), drawn[0].height), "white")
    for k, panel in enumerate(drawn):
        whole.paste(panel, (sum(p.width for p in drawn[:k]), 0))
    return whole


# ---------------------------------------------------------------------------------------------------------------------
# Files: written beside their place and renamed, so that a kill leaves the old one or the new one


@contextlib.contextmanager
def replacing(path):
    """An open binary file that takes the place of `path` when all went well."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(beside, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except OSError as error:                                      # of a full disk, say: name the file
        raise OSError(error.errno, error.strerror, str(path)) from None
    finally:
        beside.unlink(missing_ok=True)


def save_file(contents, path):
    """A checkpoint, which takes its place when it is whole."""
    try:
        with replacing(path) as file:
            torch.save(contents, file)
    except RuntimeError:                                          # so torch.save reports a full disk
        stop(f"cannot write {path}: is the disk full? What was written before is whole")


LOCKS = {}                                                        # open files by name: each lock is held until its process ends


def lock(path, what):
    """Be the only writer of `what`, by a lock on the file `path`; stops when another process is. Of several ranks, the first locks."""
    path = Path(path)
    if RANK == 0 and path not in LOCKS:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open(path, "ab")
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)      # of this process alone: the kernel lets go of it however that ends
        except (BlockingIOError, PermissionError):
            stop(f"another process is writing {what}; wait for it, or give another --out")
        LOCKS[path] = file


def checkpoints(out):
    """The checkpoint files of a run, oldest first."""
    return sorted((path for path in Path(out, "checkpoints").glob("*.pt") if path.stem.isdecimal()), key=lambda path: int(path.stem))


# ---------------------------------------------------------------------------------------------------------------------
# The machine: ranks, speed, memory


def join_ranks():
    """The device of this rank, after joining the others under torchrun (NCCL between GPUs, gloo between CPUs)."""
    cuda = torch.cuda.is_available()
    if not cuda and sys.platform == "linux":
        # glibc hands every freed large block back, to be faulted in again, page by page: 5 to 12 % of a small model's step
        libc = ctypes.CDLL(None)
        if hasattr(libc, "mallopt"):
            libc.mallopt(-3, 1 << 26)                             # M_MMAP_THRESHOLD
            libc.mallopt(-1, 1 << 30)                             # M_TRIM_THRESHOLD
    if cuda:
        if LOCAL_RANK >= torch.cuda.device_count():
            stop(f"rank {LOCAL_RANK} has no GPU: the machine has {torch.cuda.device_count()}; lower --nproc-per-node",
                 everywhere=True)
        torch.cuda.set_device(LOCAL_RANK)
        torch.backends.cudnn.allow_tf32 = False                   # fp32 means fp32, in the patch embedding too
    if WORLD > 1 and not dist.is_initialized():                   # ranks may wait long for one that draws or writes
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=datetime.timedelta(days=1))
    return torch.device("cuda", LOCAL_RANK) if cuda else torch.device("cpu")


def agree(value):
    """Rank 0's plain value, on every rank."""
    box = [value]
    if WORLD > 1:
        dist.broadcast_object_list(box)
    return box[0]


@contextlib.contextmanager
def rank_0_first():
    """The other ranks do what stands below when rank 0 has done it, and then find what it downloaded."""
    if RANK and WORLD > 1:
        dist.barrier()
    yield
    if RANK == 0 and WORLD > 1:
        dist.barrier()


def synchronize(device):
    if device.type == "cuda":
        torch.cuda.synchronize()


def matmul_rate(device, dtype, seconds=0.1):
    """Matrix-product rate of this device, FLOP/s, as one measures it now: the yardstick of MFU."""
    n = 8192 if device.type == "cuda" else 1024
    a, count = torch.randn(n, n, device=device, dtype=dtype), 0
    for _ in range(2):
        a @ a
    synchronize(device)
    start = time.perf_counter()
    while (took := time.perf_counter() - start) < seconds:
        a @ a
        synchronize(device)
        count += 1
    return 2 * n**3 * count / took


def fast_precision(device):
    """bf16 where its matrix products are much faster than those of fp32, as on GPUs and on CPUs with bf16 units."""
    return "bf16" if matmul_rate(device, torch.bfloat16) > 1.5 * matmul_rate(device, torch.float32) else "fp32"


def free_memory(device):
    """Bytes that this rank may still use."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info()[0]
    try:
        meminfo = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        free = int(meminfo["MemAvailable"].split()[0]) * 1024
        limit = Path("/sys/fs/cgroup/memory.max")
        if limit.exists() and limit.read_text().strip() != "max":
            used = dict(line.split() for line in Path("/sys/fs/cgroup/memory.stat").read_text().splitlines())
            free = min(free, int(limit.read_text()) - int(used["anon"]))      # the page cache makes room when asked
    except OSError:                                               # not Linux: half of what is built in
        free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    return free // int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def fitting_micro_batch(model, device, batch, precision):
    """Largest equal share of this rank's batch whose activations fit beside the model's state, by their count.

    Per token and block the backward pass keeps about 26 numbers per channel, at most 4 bytes each, and the attention map
    where it is written out (with grad_checkpoint: that of one block, and what goes into each); per parameter there will be a
    gradient, two moments and a half-precision copy.
    """
    tokens, width, depth = model.pos_embed.shape[1], model.pos_embed.shape[2], len(model.blocks)
    number_bytes = 2.6 if precision == "bf16" else 4
    attention = 3 * model.blocks[0].attn.num_heads * tokens if device.type == "cpu" else 0
    inside = tokens * (26 * width + attention) * number_bytes                               # of one block
    per_image = inside + 4 * tokens * width * depth if model.grad_checkpoint else inside * depth
    state = 14 * sum(p.numel() for p in model.parameters())
    fit = max(1, int((0.85 * free_memory(device) - state) / per_image))
    return math.ceil(batch / math.ceil(batch / fit))


def in_words(seconds):
    for unit, length in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} seconds"


# ---------------------------------------------------------------------------------------------------------------------
# Latents: what the VAE makes of a folder of images, encoded once, and mapped into memory


TO_DO, UNREADABLE = -1, -2                                        # in the place of a label


class Latents:
    """The posteriors of encoded images, in a folder that `encode` made; x_0 is drawn from them anew whenever it is asked for.

    moments.npy   (N, 2, 8, h, h) float16: as it is and flipped; mean and standard deviation of 4 channels, scaled
    labels.npy    (N,) int64, TO_DO or UNREADABLE where there is no posterior
    latents.json  of which images and by which weights, and whether it is finished
    """

    endless, latent = False, True

    def __init__(self, folder):
        self.folder, self.note = Path(folder), read_note(folder)
        if not self.note or not self.note["finished"]:
            raise ValueError(f"no finished latents in {folder}; give the folder to encode: python train.py --data DIR --latents {folder}")
        labels, size = open_array(self.folder / "labels.npy")[:], self.note["image_size"] // models.VAE.factor
        expected = (self.note["images"], 2, 2 * models.VAE.channels, size, size)
        if self.moments.shape != expected or self.moments.dtype != np.float16 or labels.shape != expected[:1]:
            raise ValueError(f"{folder}/moments.npy is {self.moments.dtype} {self.moments.shape}, latents.json says float16 {expected}; encode again")
        self.index = np.flatnonzero(labels != UNREADABLE)         # 8 bytes an image, and 8 for its label: all that is in memory
        self.labels, self.classes = labels[self.index], self.note["classes"]
        if not len(self.index) or self.labels.min() < 0 or self.labels.max() >= len(self.classes):
            raise ValueError(f"{folder}/labels.npy has labels outside 0 to {len(self.classes) - 1}; encode again")

    @functools.cached_property
    def moments(self):
        array = open_array(self.folder / "moments.npy")
        array._mmap.madvise(mmap.MADV_RANDOM)                     # no reading ahead: the next image is somewhere else
        return array

    def __getstate__(self):                                       # for worker processes: they map the file themselves
        return {name: value for name, value in self.__dict__.items() if name != "moments"}

    def __len__(self):
        return len(self.index)

    def part(self, numbers):
        """The same with only these images."""
        part = copy.copy(self)
        part.index, part.labels = self.index[numbers], self.labels[numbers]
        return part

    def images(self, indices, flip, noise):
        """x_0 (n, 4, h, h) float32 of the posteriors, where noise (n, 4, h, h) is standard normal, and labels (n,)."""
        indices = np.asarray(indices)
        mean, std = torch.from_numpy(self.moments[self.index[indices], np.asarray(flip, np.int64)]).float().chunk(2, dim=1)
        return torch.addcmul(mean, std, torch.from_numpy(noise)).numpy(), self.labels[indices]


def open_array(path):
    """An .npy file, mapped into memory to read; raises ValueError where it is none."""
    try:
        return np.lib.format.open_memmap(path, "r")
    except OSError:
        raise
    except Exception as error:  # numpy raises a dozen kinds for damaged headers
        raise ValueError(f"{path} is no readable .npy ({' '.join(str(error).split())[:80]}); encode again") from None


def read_note(folder):
    """What latents.json says, None where there is none; raises ValueError where it is damaged."""
    path, kinds = Path(folder) / "latents.json", {"data": str, "image_size": int, "images": int, "names": str, "weights": str, "finished": bool}
    if not path.exists():
        return None
    try:
        note = json.loads(path.read_text())
        valid = all(type(note[key]) is kind for key, kind in kinds.items()) and min(note["images"], note["image_size"]) > 0
        valid = valid and all(type(name) is str for name in note["classes"]) and type(note["vae"]) in (str, type(None))
    except (ValueError, KeyError, TypeError):
        valid = False
    if not valid:
        raise ValueError(f"{path} is damaged; remove {folder}, and encode again")
    return note


def allocate(path, dtype, shape):
    """An .npy file of zeros, which takes its space only as it is filled."""
    try:
        np.lib.format.open_memmap(path, "w+", dtype, shape)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None


def write_at(file, array, offset):
    """Write an array's bytes at a place of an open file."""
    left = memoryview(np.ascontiguousarray(array)).cast("B")
    try:
        while left:
            written = os.pwrite(file.fileno(), left, offset)
            left, offset = left[written:], offset + written
    except OSError as error:
        raise OSError(error.errno, error.strerror, file.name) from None


class Crops(torch.utils.data.Dataset):
    """The images of one chunk, (n, 3, size, size) uint8, and {number in the chunk: UnreadableImage}, whose place is left black."""

    chunk = 16                                                    # so many at a time, always the same ones: whoever encodes them gets the same

    def __init__(self, source):
        self.source = source

    def __getitem__(self, chunk):
        numbers, images, bad = range(chunk * self.chunk, min((chunk + 1) * self.chunk, len(self.source))), [], {}
        for i, number in enumerate(numbers):
            try:
                images.append(self.source.images([number], [False])[0][0])
            except UnreadableImage as error:
                bad[i] = error
                images.append(np.zeros((3, self.source.image_size, self.source.image_size), np.uint8))
        return torch.from_numpy(np.stack(images)), bad


def encode(source, data, folder, vae, vae_name, device, skip_bad, workers):
    """Encode the images of the ImageFolder `source` into `folder`, going on where that was begun; all ranks share the work.

    A chunk's labels are written when its moments are on the disk, and the description is marked as finished when all are. An unreadable
    image ends it, after the others of its chunk; with skip_bad it is left out, and listed in skipped.txt.
    """
    folder, N, side = Path(folder), len(source), source.image_size // models.VAE.factor
    note = {"data": data, "image_size": source.image_size, "images": N, "names": source.fingerprint(data), "classes": source.classes,
            "vae": vae_name, "weights": models.fingerprint(vae), "finished": False}
    files = {"moments.npy": (np.float16, (N, 2, 2 * models.VAE.channels, side, side)), "labels.npy": (np.int64, (N,))}
    lock(folder / ".lock", f"the latents in {folder}")
    if RANK == 0:
        try:
            there = read_note(folder)
        except ValueError as error:
            stop(error)
        for key, what in (("image_size", "images of size {}"), ("names", "other images, of {}"), ("weights", "latents of another VAE, {}")):
            if there and there[key] != note[key]:
                stop(f"{folder} holds {what.format(there[{'names': 'data', 'weights': 'vae'}.get(key, key)])}; give another --latents")
        needed = N * (2 * 2 * models.VAE.channels * side * side * 2 + 8)
        if not there:
            folder.mkdir(parents=True, exist_ok=True)
            for name, (dtype, shape) in files.items():
                allocate(folder / name, dtype, shape)
            with open(folder / "labels.npy", "r+b") as file:
                write_at(file, np.full(N, TO_DO), open_array(folder / "labels.npy").offset)
        taken = sum((folder / name).stat().st_blocks * 512 for name in files)
        free = shutil.disk_usage(folder).free
        print(f"encoding {N} images of {data} at {source.image_size}×{source.image_size}, and flipped, into {folder}: "
              f"{needed / 1e9:.2f} GB, of which {taken / 1e9:.2f} are written", flush=True)
        if needed - taken > free:
            stop(f"{folder} needs {(needed - taken) / 1e9:.2f} GB more, {free / 1e9:.2f} GB are free; give --latents on another disk")
        with replacing(folder / "latents.json") as file:
            file.write(json.dumps(note, indent=1).encode())
    agree(None)                                                   # all wait for the files
    try:
        labels = open_array(folder / "labels.npy")
        chunks = np.arange(math.ceil(N / Crops.chunk))
        todo = chunks[np.logical_or.reduceat(labels == TO_DO, chunks * Crops.chunk)]
        offsets = [open_array(folder / name).offset for name in files]
    except ValueError as error:
        stop(error)
    mine = agree(todo)[RANK::WORLD]
    loader = torch.utils.data.DataLoader(Crops(source), batch_size=None, sampler=mine.tolist(), num_workers=workers,
                                         worker_init_fn=ignore_signals)
    vae.to(device)
    with open(folder / "moments.npy", "r+b") as moments_file, open(folder / "labels.npy", "r+b") as labels_file, tqdm(
            total=sum(min(Crops.chunk, N - chunk * Crops.chunk) for chunk in mine), unit="image", disable=RANK != 0, dynamic_ncols=True,
            desc=f"encoding, rank 0 of {WORLD}" if WORLD > 1 else "encoding") as bar:
        for chunk, (images, bad) in zip(mine, loader):
            images, first = to_float(images.to(device)), int(chunk) * Crops.chunk
            moments = torch.stack([torch.cat(vae.encode(flipped), 1) for flipped in (images, images.flip(3))], 1).half().cpu().numpy()
            found = np.array(source.labels[first:first + len(images)], np.int64)
            for i in bad:
                found[i] = UNREADABLE if skip_bad else TO_DO
            write_at(moments_file, moments, offsets[0] + first * moments[0].nbytes)
            os.fdatasync(moments_file.fileno())                   # before it is said to be there
            write_at(labels_file, found, offsets[1] + first * 8)
            if bad and not skip_bad:
                stop(f"{str(bad[min(bad)]).removesuffix('; mend or remove it')}; mend it, or give --skip-bad to go on without such images; "
                     "what is encoded is kept", everywhere=True)
            bar.update(len(images))
    if WORLD > 1:
        dist.barrier()
    if RANK == 0:
        skipped = [source.files[i] for i in np.flatnonzero(open_array(folder / "labels.npy")[:] == UNREADABLE)]
        if len(skipped) == N:
            stop(f"none of the {N} images of {data} can be read; see {source.files[0]}")
        if skipped:
            print(f"{len(skipped)} unreadable images are left out, listed in {folder}/skipped.txt: {', '.join(skipped[:3])}{', …' if skipped[3:] else ''}")
            with replacing(folder / "skipped.txt") as file:
                file.writelines(f"{name}\n".encode(errors="surrogateescape") for name in skipped)
        for name in files:
            with open(folder / name, "rb") as file:
                os.fsync(file.fileno())
        with replacing(folder / "latents.json") as file:
            file.write(json.dumps({**note, "finished": True}, indent=1).encode())
    agree(None)


def open_latents(s, given, device):
    """The latents in s["latents"], encoded first where they are not complete; fills in data, image size and VAE where they tell them."""
    folder = s["latents"]
    try:
        note = agree(read_note(folder) if RANK == 0 else None)
        if note and note["finished"]:
            if "image_size" in given and given["image_size"] != note["image_size"]:
                stop(f"{folder} holds latents of {note['image_size']}×{note['image_size']} images, not {given['image_size']}; give another --latents")
            if "data" in given and ImageFolder(given["data"], note["image_size"]).fingerprint(given["data"]) != note["names"]:
                stop(f"{folder} holds latents of other images, of {note['data']}; give another --latents, or leave out --data")
            if given.get("vae", note["vae"]) != note["vae"] and models.fingerprint(models.load_vae(given["vae"])) != note["weights"]:
                stop(f"{folder} holds latents of another VAE, {note['vae']}; give another --latents, or leave out --vae")
        else:
            if is_drawn(s["data"]):
                stop(f"no finished latents in {folder}; give the --data to encode")
            if s["image_size"] % models.VAE.factor:
                stop(f"--image-size {s['image_size']} is not a multiple of {models.VAE.factor}, as the VAE needs; give one that is")
            with rank_0_first():
                vae = models.load_vae(s.get("vae"))
            workers = s.get("workers", WORKERS)
            encode(ImageFolder(s["data"], s["image_size"]), s["data"], folder, vae, s.get("vae"), device, s.get("skip_bad", False), workers)
        latents = Latents(folder)
    except ValueError as error:
        stop(error)
    s |= {"data": latents.note["data"], "image_size": latents.note["image_size"], "vae": s.get("vae", latents.note["vae"]),
          "encoding": f"{latents.note['names']}-{latents.note['weights']}-{len(latents)}"}
    return latents


# ---------------------------------------------------------------------------------------------------------------------
# The run


FAMILIES = {"DiT": "vp", "SiT": "linear"}                         # the interpolant that each was published with
PATHS = {"linear": diffusion.Linear, "vp": diffusion.VP}


def arguments():
    parser = Arguments(__doc__)
    add = functools.partial(parser.add_argument, default=argparse.SUPPRESS)
    add("--model", choices=models.MODELS, metavar="NAME", help="DiT-* or SiT-*, Ti S B L XL, /2 /4 /8 (default: SiT-Ti/2)")
    add("--data", metavar="DIR", help="folder of images, or shapes (default), or some of these, shapes:star,cross")
    add("--image-size", type=number(int, 4), metavar="N",
        help="height and width; from 256 on in latents (default: of --init or --latents, 256 in latents, 16 for Ti on shapes, else 32)")
    add("--latents", metavar="DIR", help="train in latents, kept there; encodes --data first (default: runs/latents-<data>-<size>)")
    add("--vae", metavar="FILE", help="weights of Stable Diffusion's VAE, if they cannot be downloaded")
    add("--skip-bad", action="store_true", help="leave out images that cannot be read, and list them")
    add("--init", metavar="CKPT", help=f"start from weights: a checkpoint, or the published {', '.join(models.PUBLISHED)}")
    add("--train-only", choices=("null",), help="null: only the null noise embedding, the rest stays as --init has it")
    add("--interpolant", choices=PATHS, help="default: vp for DiT, linear for SiT")
    add("--noise-drop", type=number(float, 0, 1), metavar="P", help="how often the level is hidden, for NAG (default: 0.1)")
    add("--class-drop", type=number(float, 0, 1), metavar="P", help="how often the class is hidden, for CFG (default: 0.1)")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--steps", type=number(int, 1), default=argparse.SUPPRESS, metavar="N",
                        help=f"default: {DEFAULTS['Ti']['steps']} for Ti, with --init {FINE_TUNING['Ti']['steps']}; else {DEFAULTS['']['steps']}")
    length.add_argument("--epochs", type=number(float, 1e-6), default=argparse.SUPPRESS, metavar="N", help="passes over a folder (default: 10 with --init)")
    add("--batch", type=number(int, 1), metavar="N", help="images per step, of all ranks together (default: 32 for Ti, else 256)")
    add("--micro-batch", type=number(int, 1), metavar="N", help="images per pass of a rank (default: what fits in memory)")
    add("--lr", type=number(float, 0), help="of AdamW (default: 6e-3 for Ti, with --init 1.5e-3; else 1e-4)")
    add("--warmup", type=number(int, 0), metavar="N", help="steps in which the rate rises to --lr, to fall as sqrt(N/step) after; "
        "0: constant (default: 300 for Ti, with --init 40; else 0)")
    add("--ema", type=number(float, 0, 1), metavar="DECAY", help="of the averaged weights (default: 0.9999)")
    add("--seed", type=number(int, 0, 2**63 - 1), help="default: 0")
    add("--out", metavar="DIR", help="default: runs/<data>-<model>, with --init of a run runs/<run>[-on-<data>]-tuned")
    add("--workers", type=number(int, 0), metavar="N", help="processes that prepare batches (default: 0 on a CPU with shapes, else up to 4)")
    add("--ckpt-every", type=number(int, 1), metavar="STEPS", help="checkpoint and samples (default: 1000 for Ti, else 5000)")
    add("--keep", type=number(int, 0), metavar="N", help="checkpoints kept, 0 for all (default: 3)")
    add("--precision", choices=("fp32", "bf16"), help="of the matrix products (default: bf16 where that is faster)")
    add("--grad-checkpoint", action="store_true", help="keep no activations inside the blocks, compute them again: less memory, a quarter slower")
    add("--benchmark", action="store_true", help="measure speed and memory of --model (default: DiT-XL/2) on latents of --image-size; one line of JSON")
    add("--compile", action=argparse.BooleanOptionalAction, help="torch.compile (default: on a GPU)")
    return vars(parser.parse_args())


DEFAULTS = {
    "Ti": dict(steps=4000, batch=32, lr=6e-3, warmup=300, ckpt_every=1000),
    "": dict(steps=400_000, batch=256, lr=1e-4, warmup=0, ckpt_every=5000),
}
FINE_TUNING = {"Ti": dict(steps=400, lr=1.5e-3, warmup=40)}        # beside these, where --init is given
FIXED = ("model", "data", "image_size", "interpolant", "noise_drop", "class_drop", "batch", "lr", "warmup", "ema", "seed", "precision",
         "init", "train_only", "classes", "images", "encoding")   # what may not change while a run lasts


def share(batch):
    """A rank's part of a batch."""
    if batch % WORLD:
        stop(f"a batch of {batch} cannot be shared by {WORLD} ranks; give a --batch that {WORLD} divides")
    return batch // WORLD


def compiles(device):
    """Whether torch.compile is used where nothing is said."""
    return device.type == "cuda" and importlib.util.find_spec("triton") is not None


def resolve(given, out, saved, init, device):
    """Every setting of the run: as given, else as in its checkpoint (`saved`), else as in that of --init, else by default; and the data."""
    of_init = {name: init[name] for name in ("model", "interpolant", "learn_sigma") if init}
    s = {"model": "SiT-Ti/2", "data": "shapes", "noise_drop": 0.1, "class_drop": 0.1, "ema": 0.9999, "seed": 0, "keep": 3,
         "learn_sigma": True, **of_init, **saved, **given}
    family, size = s["model"].split("/")[0].split("-")
    s = {**DEFAULTS.get(size, DEFAULTS[""]), **(FINE_TUNING.get(size, {}) if "init" in s else {}), "interpolant": FAMILIES[family], **s}
    if s.get("train_only") == "null":
        if "init" not in s or given.get("noise_drop", 1) != 1:
            stop("--train-only null hides every level from a trained model; " +
                 ("leave out --noise-drop" if "init" in s else "give one with --init"))
        s["noise_drop"] = 1.0
    s["compile"] = given.get("compile", compiles(device))
    if "precision" not in s:
        s["precision"] = agree(fast_precision(device))

    for name in FIXED:
        if saved and name in given and given[name] != saved.get(name):
            option = f"--{name.replace('_', '-')}"
            before = f"with {option} {saved[name]}" if name in saved else f"without {option}"
            stop(f"{out} was started {before}, not {given[name]}; give another --out")
    share(s["batch"])

    # In pixels, or in latents?
    in_latents = bool(init and init["in_channels"] == models.VAE.channels or "latents" in s or "vae" in s)
    drawn = is_drawn(s["data"]) and "latents" not in s
    if "image_size" not in s:
        s["image_size"] = init["image_size"] if init else 256 if in_latents else 16 if size == "Ti" and drawn else 32
    if in_latents and drawn:
        stop("shapes are trained in pixels; give the --data to encode, or a folder of --latents")
    in_latents = in_latents or not drawn and s["image_size"] >= 256
    kind = lambda pixels, latent: f"{pixels}×{pixels} {'images in latents' if latent else 'pixels'}"
    asked, has = kind(s["image_size"], in_latents), init and kind(init["image_size"], init["in_channels"] == models.VAE.channels)
    if init and has != asked:
        stop(f"{s['init']} is a model of {has}, not of {asked}; give --image-size {init['image_size']}, or other data")
    if in_latents:
        s.setdefault("latents", f"runs/latents-{Path(s['data']).name}-{s['image_size']}")
        data = open_latents(s, given, device)
        s |= {"input_size": s["image_size"] // models.VAE.factor, "in_channels": models.VAE.channels}
    else:
        data = open_data(s["data"], s["image_size"], s["seed"])
        s |= {"input_size": s["image_size"], "in_channels": 3}
    s |= {"classes": data.classes, "num_classes": len(data.classes), "images": None if data.endless else len(data)}
    for name in ("classes", "images", "encoding"):
        if name in saved and s[name] != saved[name]:
            stop(f"the {name} of {s['data']} changed since {out} was started; give another --out")

    s.setdefault("workers", 0 if data.endless and device.type == "cpu" else WORKERS)
    if "init" in s and not data.endless and not {"steps", "epochs"} & (saved.keys() | given.keys()):
        s["epochs"] = 10
    if "epochs" in s:
        if data.endless:
            stop("shapes are endless and have no epochs; use --steps")
        s["steps"] = math.ceil(s.pop("epochs") * len(data) / s["batch"])
    s.pop("skip_bad", None)
    return s, data


def sample_grid(ema, path, s, device, autocast, vae):
    """EMA samples of the first classes from fixed noise, without guidance: a picture to watch the model learn."""
    y = torch.arange(32, device=device) % min(8, s["num_classes"])
    noise = SampleNoise(s["seed"], range(32))
    noise.classes([0])
    start = noise(torch.empty(32, s["in_channels"], s["input_size"], s["input_size"], device=device))
    sampler = diffusion.sample_ddpm if s["interpolant"] == "vp" else diffusion.sample_sde
    with autocast:
        images = sampler(diffusion.guided(ema.eval(), path, y), start, path, steps=50, randn=noise)
    images = vae.decode(images) if vae else images
    return picture({"": to_uint8(images).cpu()})


class Trainer:
    """A model, its average and its optimiser on this rank, and the step that moves all three."""

    def __init__(self, model, s, device):
        self.s, self.device, self.share = s, device, share(s["batch"])
        self.dtype = torch.bfloat16 if s["precision"] == "bf16" else torch.float32
        self.autocast = torch.autocast(device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16)
        if device.type == "cuda":                                 # what bf16 leaves in fp32 is TF32; with --precision fp32, fp32
            torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = self.dtype == torch.bfloat16
        self.path = PATHS[s["interpolant"]]().to(device)
        self.model = model.to(device)
        self.model.grad_checkpoint = s.get("grad_checkpoint", False)
        if s.get("train_only") == "null":
            model.requires_grad_(False)
            model.t_embedder.null_embedding.requires_grad_(True)
        self.ema = copy.deepcopy(model).requires_grad_(False)
        self.optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=s["lr"], weight_decay=0, fused=True)
        s["micro_batch"] = min(self.share, s.get("micro_batch") or agree(fitting_micro_batch(model, device, self.share, s["precision"])))
        self.network = torch.compile(model) if s["compile"] else model
        if WORLD > 1:
            self.network = DistributedDataParallel(self.network, gradient_as_bucket_view=True, static_graph=s["micro_batch"] == self.share)
            self.network.broadcast_buffers = False                # the position table never changes
        self.work = 3 * model.flops()                             # per image: the backward pass costs two forward passes

    def step(self, batch, number, interrupted=lambda: False):
        """Step `number` (from 1) with this rank's part of a batch: (2,), its mean loss, and 1 where the step was skipped; None where it was interrupted.

        The batch goes through in passes of a micro-batch, whose gradients add up; ranks exchange them during the last. A loss or
        gradient that is not finite, on any rank, leaves weights, moments and average as they were. Nothing here waits for the device.
        """
        s, (images, y, t, eps, drop_noise) = self.s, (part.to(self.device, non_blocking=True) for part in batch)
        loss_sum = torch.zeros((), device=self.device)
        parts = [part.split(s["micro_batch"]) for part in (to_float(images), y, t, eps, drop_noise)]
        for i, part in enumerate(zip(*parts)):
            if interrupted():
                return None                                       # the step that was begun is left undone
            last = i == len(parts[0]) - 1
            with contextlib.nullcontext() if WORLD == 1 or last else self.network.no_sync():
                with self.autocast:
                    loss = diffusion.training_loss(self.network, self.path, *part).sum() / self.share
                loss.backward()
            loss_sum += loss.detach()
        if s["warmup"]:
            for group in self.optimizer.param_groups:
                group["lr"] = s["lr"] * min(number / s["warmup"], math.sqrt(s["warmup"] / number))
        with torch.no_grad():
            norms = torch._foreach_norm([p.grad for p in self.model.parameters() if p.grad is not None])
            skipped = 1 - (torch.stack(norms).sum() + loss_sum).isfinite().float()
            if WORLD > 1:
                dist.all_reduce(skipped, dist.ReduceOp.MAX)
            self.optimizer.found_inf, self.optimizer.grad_scale = skipped, None          # the fused AdamW reads this on the device
            self.optimizer.step()
            self.optimizer.zero_grad()
            weight = (1 - min(s["ema"], number / (number + 9))) * (1 - skipped)          # the average starts short: of 10 % of the run so far
            average = list(self.ema.parameters())
            torch._foreach_lerp_(average, list(self.model.parameters()), [weight] * len(average))
        return torch.stack([loss_sum, skipped])


def synthetic(name, image_size=None):
    """A model for --benchmark, with random weights, none of them zero (zeros take a GPU less power, and so less time); and its defaults."""
    family, size = name.split("/")[0].split("-")
    image_size = image_size or (16 if size == "Ti" else 256)
    factor, channels = (models.VAE.factor, models.VAE.channels) if image_size >= 256 else (1, 3)
    try:
        model = models.MODELS[name](input_size=image_size // factor, in_channels=channels, num_classes=1000)
    except ValueError as error:
        stop(error)
    for parameter in model.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.02)
    return model, {"model": name, "image_size": image_size, "interpolant": FAMILIES[family], **DEFAULTS.get(size, DEFAULTS[""])}


def benchmark(given, device):
    """Training steps on a batch that is there already, of the shape of latents (Ti: of shapes); one line of JSON."""
    model, defaults = synthetic(given.get("model", "DiT-XL/2"), given.get("image_size"))
    s = {"ema": 0.9999, **defaults, "compile": compiles(device), **given}
    s["precision"] = s.get("precision") or agree(fast_precision(device))
    trainer, B, rng = Trainer(model, s, device), share(s["batch"]), torch.Generator().manual_seed(0)
    x0, eps = torch.randn(2, B, model.in_channels, model.input_size, model.input_size, generator=rng)
    batch = [x0, torch.randint(0, 1000, (B,), generator=rng), (1 + torch.randint(0, 1000, (B,), generator=rng)) / 1000, eps, torch.rand(B, generator=rng) < 0.1]
    batch = [part.pin_memory() for part in batch] if device.type == "cuda" else batch
    measured = timed(lambda number: trainer.step(batch, number), s["batch"], trainer.work, device, trainer.dtype)
    if RANK == 0:
        print(json.dumps({"model": s["model"], "batch": s["batch"], "precision": s["precision"], "compile": s["compile"], "micro_batch": s["micro_batch"],
                          "grad_checkpoint": s.get("grad_checkpoint", False), "ranks": WORLD, **measured}))


def timed(step, images, work, device, dtype, seconds=5):
    """What --benchmark reports of step(number), which takes `images` of `work` FLOP each, on all ranks together."""
    for number in range(1, 4):                                    # compiling, and memory that is taken for the first time
        step(number)
    rate, count = matmul_rate(device, dtype, 0.5), 0
    synchronize(device)
    start = time.perf_counter()
    while count < 3 or agree(time.perf_counter() - start < seconds):
        step(4 + count)
        count += 1
        if count == 3 or count % 20 == 0:
            synchronize(device)
    synchronize(device)
    took = time.perf_counter() - start
    rate = WORLD * (rate + matmul_rate(device, dtype, 0.5)) / 2     # the yardstick, before and after
    return {"device": device_name(device), "images_per_s": round(count * images / took, 2), "flops_per_image": work,
            "flops": round(count * images * work / took), "matmul_flops": round(rate), "mfu": round(count * images * work / took / rate, 4),
            "peak_memory_gb": peak_memory(device)}


def device_name(device):
    return torch.cuda.get_device_name() if device.type == "cuda" else f"cpu, {torch.get_num_threads()} threads"


def peak_memory(device):
    """The most that this rank has used, in GB: of the GPU's memory, or of the machine's."""
    if device.type == "cuda":
        used = torch.cuda.max_memory_allocated()
    elif Path("/proc/self/status").exists():                      # ru_maxrss would count what stood in the process's place before it
        used = 1024 * int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1])
    else:
        used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(used / 1e9, 3)


def last_good(out):
    """The newest checkpoint of a run that is whole, None where none was written. Damaged ones are reported and renamed; nothing else is lost."""
    damaged = []
    for path in reversed(checkpoints(out)):
        try:
            with zipfile.ZipFile(path) as archive:
                if wrong := archive.testzip():                    # reads it all: a flipped bit is not to be trained on
                    raise ValueError(f"{path} is damaged ({wrong})")
            checkpoint = models.load_file(path)
            missing = {"model", "ema", "opt", "step", "settings"} - checkpoint.keys()
            if missing or type(checkpoint["step"]) is not int or not isinstance(checkpoint["settings"], dict):
                raise ValueError(f"{path} is no checkpoint of train.py{f': it lacks {sorted(missing)}' if missing else ''}")
        except (ValueError, zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
            damaged.append((path, error))
            continue
        for bad, error in damaged:
            print(f"{bad} is damaged ({error}) and now named .damaged; going on from {path}", flush=True)
            bad.rename(bad.with_suffix(".pt.damaged"))
        return path
    if damaged:
        stop(f"cannot go on from {damaged[0][0]}: {damaged[0][1]}; remove it, or give another --out")


def main():
    given = arguments()
    for name in {"data", "latents"} & given.keys():
        given[name] = os.path.normpath(given[name])               # photos/ is photos
    model_name = given.get("model") or {name: model for name, (model, _) in models.PUBLISHED.items()}.get(given.get("init"), "SiT-Ti/2")
    data_name = Path(given.get("data") or given.get("latents", "shapes")).name
    name = f"{data_name}-{model_name.replace('/', '-')}"
    if "init" in given:
        origin = Path(given["init"])
        if origin.parent.name == "checkpoints":                   # of a run
            origin = origin.parent.parent
        if given["init"] not in models.PUBLISHED and "model" not in given:
            name = origin.name.removesuffix(".pt") + (f"-on-{data_name}" if {"data", "latents"} & given.keys() else "")
        name += "-tuned"
    out = Path(given.pop("out", f"runs/{name}"))
    device = join_ranks()
    if given.pop("benchmark", False):
        return benchmark(given, device)

    # What to do: the command's settings, and the state of the run where one was begun
    if out.exists():
        lock(out / ".lock", out)
    saved = agree(last_good(out) if RANK == 0 else None)
    checkpoint = models.load_file(saved) if saved else {"settings": {}, "step": 0}
    start, s = checkpoint["step"], dict(checkpoint["settings"])
    init, of_init = None, None
    if "init" in given and not start:
        source = given["init"]
        if f"{source}-{given.get('image_size')}" in models.PUBLISHED:
            source = f"{source}-{given['image_size']}"            # DiT-XL/2 at 512×512
        try:
            if Path(source).is_dir():
                source = str(checkpoints(source)[-1])
            with rank_0_first():
                init, of_init = models.from_checkpoint(source, given.get("model"))
        except (ValueError, IndexError) as error:
            stop(error if isinstance(error, ValueError) else f"no checkpoints in {source}/checkpoints; give --init another")
    s, data = resolve(given, out, s, of_init, device)
    if start >= s["steps"]:
        if RANK == 0:
            print(f"{out} is finished: it stands at step {start}, and {s['steps']} are asked for"
                  f"{'' if {'steps', 'epochs'} & given.keys() else ', as when it was started'}; a larger --steps goes on")
        return

    # The network, its average, and the optimiser
    torch.manual_seed(s["seed"])
    try:
        model = models.MODELS[s["model"]](**{k: s[k] for k in ("input_size", "in_channels", "num_classes", "learn_sigma")})
    except ValueError as error:
        stop(error)
    if init:
        weights, table = init.state_dict(), "y_embedder.embedding_table.weight"
        names = of_init["classes"] if not of_init["classes"][0].isdecimal() else s["classes"]       # numbers stand for any names
        if (s["num_classes"], names) != (of_init["num_classes"], s["classes"]):
            weights[table] = model.state_dict()[table]
            if RANK == 0:
                print(f"{s['init']} knows {of_init['num_classes']} other classes than the {s['num_classes']} of {s['data']}: the label table starts anew")
        try:
            models.load_weights(model, weights, s["init"])
        except ValueError as error:
            stop(error)
        del init, weights
    trainer = Trainer(model, s, device)
    ema, optimizer, work = trainer.ema, trainer.optimizer, trainer.work
    if start:
        try:
            models.load_weights(model, checkpoint["model"], saved)
            models.load_weights(ema, checkpoint["ema"], saved)
            optimizer.load_state_dict(copy.deepcopy(checkpoint["opt"]))      # a copy in memory: the file is mapped
        except (ValueError, KeyError) as error:
            stop(error)
    del checkpoint
    loader = torch.utils.data.DataLoader(
        Batches(data, s), batch_size=None, sampler=range(start, s["steps"]), num_workers=s["workers"],
        pin_memory=device.type == "cuda", worker_init_fn=ignore_signals)

    rate = WORLD * matmul_rate(device, trainer.dtype)
    usual = 0.5 if device.type == "cuda" else 0.28                # of that rate is what one reaches: only for the estimates
    if RANK == 0:
        expected = in_words((s["steps"] - start) * s["batch"] * work / (usual * rate))
        print(f"{s['model']} ({sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters, {s['interpolant']}) on "
              f"{s['data']} {s['image_size']}×{s['image_size']}: {s['steps'] - start} steps of {s['batch']} images "
              f"({s['micro_batch']} at a time) in {s['precision']} on {WORLD} {device.type}, about {expected}; writes {out}",
              flush=True)

    # Ctrl-C and SIGTERM only leave a note, which the ranks share between two passes, to stop at the same one
    signals = []
    for name in (signal.SIGINT, signal.SIGTERM):
        signal.signal(name, lambda number, frame: signals.append(number))

    def interrupted():
        noted = torch.tensor(len(signals))
        if WORLD > 1:
            dist.all_reduce(noted)
        return noted.item() > 0

    def still_there(step):
        if not (out / ".lock").exists():
            stop(f"{out} is gone, and with it the checkpoints; stopped at step {step}")

    def save(step):
        if RANK == 0:
            still_there(step)
            save_file({"model": model.state_dict(), "ema": ema.state_dict(), "opt": optimizer.state_dict(),
                       "step": step, "settings": s}, out / "checkpoints" / f"{step:07}.pt")
            for old in checkpoints(out)[:-s["keep"]] if s["keep"] else ():
                old.unlink()

    def draw(step):
        if RANK == 0:
            try:
                vae = models.load_vae(s["vae"]).to(device) if data.latent else None
            except ValueError as error:
                return bar.write(f"no samples at step {step}: {error}")
            grid = sample_grid(ema, trainer.path, s, device, trainer.autocast, vae)
            still_there(step)
            with replacing(out / "samples" / f"{step:07}.png") as file:
                grid.save(file, "png")

    log = None
    lock(out / ".lock", out)
    if RANK == 0:                                                 # the log up to where we stand; the rest is repeated
        for leftover in (*out.glob("*/.*.tmp"), *out.glob(".*.tmp")):
            leftover.unlink()                                     # of a writer that was killed
        lines = (out / "log.jsonl").read_text().splitlines() if (out / "log.jsonl").exists() and start else []
        with replacing(out / "log.jsonl") as file:
            file.writelines(f"{line}\n".encode() for line in lines[:start])
        log = open(out / "log.jsonl", "a")

    in_a_row = 0
    bar = tqdm(total=s["steps"], initial=start, disable=RANK != 0, unit="step", dynamic_ncols=True, smoothing=0.05)
    losses, since, step = [], time.perf_counter(), start
    decoding = models.VAE.decode_flops * s["image_size"]**2 if data.latent else 0
    grid_takes = 32 * (50 * model.flops() + decoding) / (usual * rate / WORLD)              # in seconds
    last_grid = time.perf_counter()
    for batch in loader:
        if isinstance(batch, UnreadableImage):
            stop(batch, everywhere=True)
        loss = trainer.step(batch, step + 1, interrupted)
        stopping = loss is None
        if not stopping:
            step += 1
            losses.append(loss)
            bar.update()

        saving = stopping or step == s["steps"] or step % s["ckpt_every"] == 0
        if losses and (saving or step % 10 == 0):                 # the only look at the losses
            values = torch.stack(losses)
            if WORLD > 1:
                dist.all_reduce(values)
            values = (values / WORLD).tolist()
            took, since = time.perf_counter() - since, time.perf_counter()
            speed, good = s["batch"] * len(values) / took, [loss for loss, skipped in values if not skipped]
            bar.set_postfix_str(f"loss {sum(good) / len(good) if good else math.nan:.4f}, {speed:.0f} images/s, MFU {speed * work / rate:.0%}")
            for number, (loss, skipped) in enumerate(values, step - len(values) + 1):
                in_a_row = in_a_row + 1 if skipped else 0
                if log:
                    log.write(json.dumps({"step": number, "loss": None if skipped else loss, "images_per_s": round(speed, 1),
                                          **({"skipped": True} if skipped else {})}) + "\n")
                if skipped and RANK == 0:
                    bar.write(f"step {number} was skipped: its loss or gradient is not finite")
                if in_a_row == 10:
                    kept = checkpoints(out)
                    stop(f"ten steps in a row up to {number} had no finite loss or gradient; the last good checkpoint is {kept[-1] if kept else 'none'}; "
                         "start anew with a lower --lr and another --out")
            if log:
                log.flush()
            losses = []
        if saving and step > start:
            save(step)
            if not stopping and grid_takes < max(20, time.perf_counter() - last_grid):
                draw(step)
                last_grid = time.perf_counter()
            elif not stopping and RANK == 0:
                bar.write(f"no samples at step {step}: they would take {in_words(grid_takes)}, longer than the training since the last")
            since = time.perf_counter()
        if stopping:
            break
    bar.close()
    if RANK == 0:
        print(f"stopped at step {step}; the same command goes on" if stopping else
              f"finished: {out}/checkpoints/{step:07}.pt; now: python sample.py{' --w-nag 3' if s['noise_drop'] else ''} --ckpt {out}")
    if stopping:
        raise SystemExit(128 + (signals or [signal.SIGTERM])[0])          # as a shell knows it, so that && does not go on


if __name__ == "__main__":
    one_line_errors(main)
