"""See the noise shift: how much noise do the states of a sampler really hold, and does NAG mend it?

    python estimator.py train                                   # g_φ(t|x) on the drawn shapes, minutes on two CPU cores
    python estimator.py measure --w-nag 0 1 3                   # the newest checkpoint: a table, shift.json and shift.png
    python sample.py --w-nag-classifier 1 --estimator runs/estimator-shapes-linear.pt

g_φ(t|x) (models.NoiseEstimator) is trained on real data noised to known levels, by maximum likelihood, and knows nothing of
any sampler. Its mean t̂(x) reads the level off a state. Read off the states x̂_t of a sampler, at nominal level t, it shows the
noise shift (Zhong et al., 2025), and read off real data at the same t what of that is the estimator's own bias:

    δ(t) = E[t̂(x̂_t)] − E[t̂(x_t)],        and by Statement 1 the extra noise σ_e² = σ(t + δ)² − σ(t)²

The level of a state shows twice: in its noise, σ(t), and in the strength of its signal, α(t), where data have a known one, as
shapes on one grey ground do. Errors of a sampler add noise and leave the signal, so that a reader who trusts the signal
overlooks a part of them. Therefore contrast and brightness of the training images are jittered (--jitter 0: the plain
posterior). How much the estimator sees of a known shift is measured too, and printed ("seen"): on VP at large t, σ is almost 1
everywhere, only α tells the level, and even an ideal reader sees little.
"""
import argparse
import copy
import dataclasses
import itertools
import json
import math
import os
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

import diffusion
import models
from sample import Sampler, guidance_name, open_checkpoint, open_estimator, open_guide, open_vae, run_folder, sampling_arguments, settle
from train import (PATHS, RANK, WORKERS, WORLD, Arguments, Batches, Latents, UnreadableImage, agree, compiles, fast_precision, generator, ignore_signals,
                   is_drawn, join_ranks, lock, number, one_line_errors, open_data, replacing, save_file, stop, to_float)


def arguments():
    parser = Arguments(__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="train | measure")

    add = commands.add_parser("train", story="Train a noise estimator on real data.", help="train a noise estimator").add_argument
    add("--data", default="shapes", metavar="DIR", help="folder of images, or shapes (default), or some of these, shapes:star,cross")
    add("--image-size", type=number(int, 4), metavar="N", help="height and width (default: 16 for shapes, else 32)")
    add("--latents", metavar="DIR", help="in latents, those in this folder, which train.py made, in place of --data")
    add("--interpolant", choices=PATHS, default="linear", help="default: linear")
    add("--steps", type=number(int, 1), default=3000, metavar="N", help="default: 3000")
    add("--batch", type=number(int, 1), default=128, metavar="N", help="images per step (default: 128)")
    add("--lr", type=number(float, 0), default=1e-3, help="highest rate of AdamW; falls to 0 along a cosine (default: 1e-3)")
    add("--jitter", type=number(float, 0, 2), default=0.4, metavar="J",
        help="contrast times e^-J to e^J, brightness by N(0, (J/2)^2), so that the level is read off the noise alone (default: 0.4)")
    add("--seed", type=number(int, 0, 2**63 - 1), default=0, help="default: 0")
    add("--workers", type=number(int, 0), metavar="N", help="processes that prepare batches (default: 0 on a CPU with shapes, else up to 4)")
    add("--out", metavar="FILE", help="default: runs/estimator-<data>[-latents]-<interpolant>.pt")

    add = commands.add_parser("measure", story="Measure the noise shift of a checkpoint, in every combination of the settings given.",
                              help="measure the noise shift of a checkpoint").add_argument
    sampling_arguments(add, several=True)
    add("--estimator", metavar="FILE", help="what reads the levels (default: runs/estimator-<data>[-latents]-<interpolant>.pt)")
    add("--latents", metavar="DIR", help="the real data of a model in latents (default: where it found them)")
    add("--guide-estimator", metavar="FILE", help="another estimator, for --w-nag-classifier to guide by: it should not judge itself")
    add("--num", "--num-samples", type=number(int, 2), default=1024, metavar="N", help="images for each setting (default: 1024)")
    add("--levels", type=number(int, 1, 999), default=19, metavar="N", help="read at N levels, evenly spaced in t (default: 19)")
    add("--batch", type=number(int, 1), default=256, metavar="N", help="images at a time on each rank (default: 256)")
    add("--vae", metavar="FILE", help="for --keep-images of a model in latents, as in sample.py")
    add("--keep-images", action="store_true", help="keep the images of each setting, too, in an .npz for fid.py")
    add("--out", metavar="DIR", help="where shift.json, shift.png and images go (default: <run>/shift)")
    return parser.parse_args()


def default_file(data, interpolant, latent):
    return Path(f"runs/estimator-{Path(data).name}{'-latents' * latent}-{interpolant}.pt")


# ---------------------------------------------------------------------------------------------------------------------
# Real data, of which a part is held out: to judge the estimator, and to compare samples with


def open_source(latents, data, size, seed):
    """Latents from their folder, where one is named, or else the pixels of `data`."""
    if not latents:
        return open_data(data, size, seed)
    try:
        return Latents(latents)
    except ValueError as error:
        stop(error)


def split(source, seed):
    """The data to train on, and the numbers of the held-out images: a tenth of them, at most 5000; of shapes no end."""
    if source.endless:
        return source, None
    if len(source) < 2:
        stop(f"{len(source)} image is too few to hold some out; give --data another folder")
    order = generator(seed, "held out").permutation(len(source))
    held = max(1, min(5000, len(source) // 10))
    return source.part(order[held:]), order[:held]


def some_of(source, numbers, size, seed):
    """These images: uint8 (N, 3, size, size), or latents (N, 4, size, size) drawn once."""
    noise = [generator(seed, "posterior").standard_normal((len(numbers), models.VAE.channels, size, size), np.float32)] if source.latent else []
    try:
        return torch.from_numpy(source.images(numbers, np.zeros(len(numbers), bool), *noise)[0])
    except UnreadableImage as error:
        stop(error)


def held_out(source, size, seed, most):
    """Up to `most` held-out images."""
    numbers = split(source, seed)[1]
    return some_of(source, range(source.held_out, source.held_out + most) if numbers is None else numbers[:most], size, seed)


# ---------------------------------------------------------------------------------------------------------------------
# Training: maximum likelihood of the level


def jitter(images, strength, rng):
    """Another contrast and, for each channel, another brightness for each of the images (B, C, H, W)."""
    B, C = images.shape[:2]
    gain = np.exp(rng.uniform(-strength, strength, (B, 1, 1, 1)))
    return torch.from_numpy(gain).to(images) * images + torch.from_numpy(rng.normal(0, strength / 2, (B, C, 1, 1))).to(images)


def fit(estimator, path, batches, s, optimizer, start=0, every=lambda step: None):
    """Fit by the log density of the levels, from step `start` to s["steps"]; `batches` gives (x0, t, eps), one a step."""
    bar = tqdm(total=s["steps"], initial=start, unit="step", dynamic_ncols=True, smoothing=0.05)
    recent = []
    for step, (x0, t, eps) in enumerate(batches, start + 1):
        warm_up, cosine = min(1, step / 100), (1 + math.cos(math.pi * (step - 1) / s["steps"])) / 2
        for group in optimizer.param_groups:
            group["lr"] = s["lr"] * warm_up * cosine
        x0 = jitter(x0, s["jitter"], generator(s["seed"], "jitter", step))
        loss = -estimator(diffusion.add_noise(path, x0, eps, t)).log_prob(t).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(estimator.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        recent.append(loss.detach())
        bar.update()
        if step % 50 == 0 or step == s["steps"]:
            bar.set_postfix_str(f"log density {-torch.stack(recent).mean().item():.3f}")
            recent = []
        every(step)
    bar.close()


def train(args):
    device = join_ranks()
    if WORLD > 1:
        stop("an estimator is trained on one device; start it without torchrun")
    if args.latents and (args.data != "shapes" or args.image_size):
        stop("--latents are of their own data and size; leave out --data and --image-size")
    data = os.path.normpath(args.data)
    image_size = size = args.image_size or (16 if is_drawn(data) else 32)
    source = open_source(args.latents, data, size, args.seed)
    if source.latent:
        data, image_size, size = source.note["data"], source.note["image_size"], source.moments.shape[-1]
    out = Path(args.out) if args.out else default_file(data, args.interpolant, source.latent)
    if out.is_dir():
        stop(f"--out {out} is a folder; give the name of a file")
    s = {"data": data, "interpolant": args.interpolant, "image_size": image_size, "input_size": size,
         "in_channels": models.VAE.channels if source.latent else 3, "steps": args.steps,
         "batch": args.batch, "lr": args.lr, "jitter": args.jitter, "seed": args.seed, "class_drop": 0.0, "noise_drop": 0.0}
    s["num_classes"], s["images"] = len(source.classes), None if source.endless else len(source)
    path = PATHS[args.interpolant]().to(device)

    lock(out.with_name(f".{out.name}.lock"), out)
    torch.manual_seed(args.seed)
    estimator, start, saved = models.NoiseEstimator(size, s["in_channels"]).to(device), 0, {}
    optimizer = torch.optim.AdamW(estimator.parameters(), lr=args.lr, weight_decay=0)
    if out.exists():                                              # finished, or to be gone on with
        try:
            estimator_there, settings_there = models.load_estimator(out)
            saved = models.load_file(out)
        except ValueError as error:
            stop(f"{error}; remove it, or give another --out")
        for name in s:
            if settings_there.get(name) != s[name]:
                option = f"--{name.replace('_', '-')}" if hasattr(args, name) else name
                stop(f"{out} was trained with {option} {settings_there.get(name)}, not {s[name]}; give another --out")
        try:
            start = int(saved["step"])
            estimator.load_state_dict(estimator_there.state_dict())
            optimizer.load_state_dict(copy.deepcopy(saved["opt"]))
        except (KeyError, TypeError, ValueError) as error:
            stop(f"cannot go on from {out} ({error}); remove it, or give another --out")
        if start >= s["steps"]:
            print(f"{out} is finished; now: python estimator.py measure --w-nag 0 1 2 --estimator {out}")
            return
    training, _ = split(source, args.seed)
    if not start:
        numbers = range(min(2048, len(training) if not training.endless else 2048))
        first = to_float(some_of(training, numbers, size, args.seed))
        estimator.start_from(jitter(first.to(device), args.jitter, generator(args.seed, "jitter", 0)))

    workers = args.workers if args.workers is not None else 0 if training.endless and device.type == "cpu" else WORKERS
    loader = torch.utils.data.DataLoader(Batches(training, s), batch_size=None, sampler=range(start, s["steps"]), num_workers=workers,
                                         pin_memory=device.type == "cuda", worker_init_fn=ignore_signals)

    def batches():
        for batch in loader:
            if isinstance(batch, UnreadableImage):
                stop(batch)
            images, _, t, eps, _ = (part.to(device, non_blocking=True) for part in batch)
            yield to_float(images), t, eps

    def save(step):
        if step % 200 == 0 or step == s["steps"]:
            save_file({"estimator": estimator.state_dict(), "opt": optimizer.state_dict(), "step": step, "settings": s}, out)

    begun = time.perf_counter()
    print(f"a noise estimator ({sum(p.numel() for p in estimator.parameters()) / 1e3:.0f} k parameters) for {data} {image_size}×{image_size}{' in latents' * source.latent} on "
          f"{args.interpolant}: {s['steps'] - start} steps of {args.batch} images on {device.type}; writes {out}", flush=True)
    fit(estimator, path, batches(), s, optimizer, start, save)
    took = time.perf_counter() - begun

    images = held_out(source, size, args.seed, 4096)
    print(f"\nafter {took:.0f} s; on {len(images)} held-out images:\n\n    t      bias   mean abs. error   68 % interval covers   seen")
    for row in calibration(estimator.eval(), path, images, [(2 * i + 1) / 20 for i in range(10)], device):
        print(f"  {row.t:.2f}   {row.bias:+.4f}       {row.error:.4f}             {row.coverage:5.1%}          {in_percent(row.seen)}")
    print(f"\n(seen: how much of a shift of {PROBE:g}, made of real data by adding noise, the estimator shows)\n"
          f"{out}; now: python estimator.py measure --w-nag 0 1 2 --estimator {out}")


# ---------------------------------------------------------------------------------------------------------------------
# What the estimator reads off real data


PROBE = 0.03                                                      # a known shift, to see how much of it is seen


def in_percent(share):
    return "  –  " if share is None else f"{share:4.0%}"


@dataclasses.dataclass
class Reading:
    """Real data at level t: what is read there, (N,), its mean error, mean absolute error, and how good the densities are."""
    t: float
    estimates: np.ndarray
    bias: float
    error: float
    coverage: float                                               # how often the central 68 % of the density hold t
    seen: float | None                                            # share of a known shift of PROBE; None beyond t = 1


@torch.no_grad()
def calibration(estimator, path, images, levels, device):
    """A Reading of the real images (N, C, H, W), uint8 pixels or latents, at each of the levels."""
    readings = []
    for t in levels:
        rows, moved = [], []                                      # t̂ and its distribution function at t; how far a known shift moves t̂
        rng = generator("calibration", round(1e6 * t))
        for part in images.split(512):
            noise = lambda: torch.from_numpy(rng.standard_normal(part.shape, np.float32)).to(device)
            x = diffusion.add_noise(path, to_float(part.to(device)), noise(), t).float()
            posterior = estimator(x)
            rows.append(torch.stack([posterior.mean(), posterior.cdf(t)]).double().cpu().numpy())
            if t + PROBE <= 1 and len(moved) < 2:                # on 1024 of the images: the same ones, so this is sharp enough
                extra = diffusion.extra_noise(path, t, PROBE).float()
                moved.append((estimator(x + extra * noise()).mean() - posterior.mean()).mean().item())
        estimates, below = np.concatenate(rows, 1)
        readings.append(Reading(t, estimates, estimates.mean() - t, abs(estimates - t).mean(), ((below > 0.1587) & (below < 0.8413)).mean(),
                                np.mean(moved) / PROBE if moved else None))
    return readings


# ---------------------------------------------------------------------------------------------------------------------
# What it reads off the states of a sampler


def combinations(args, ckpt, s):
    """A Namespace as sample.py has it for each setting that the lists of options combine to; none twice."""
    if np.any(args.w_nag_classifier) and not args.guide_estimator:
        stop("--w-nag-classifier needs the estimator to guide by, --guide-estimator FILE; "
             "train one with: python estimator.py train --seed 1 --out FILE")
    as_list = lambda value: value if isinstance(value, list) else [value]
    names = ("sampler", "steps", "w_nag", "cfg_scale", "w_nag_classifier", "guide_scale", "nag_interval", "cfg_interval", "guide_interval")
    found = {}
    for values in itertools.product(*(as_list(getattr(args, name)) if getattr(args, name) else [getattr(args, name)] for name in names)):
        setting = settle(argparse.Namespace(**{**vars(args), **dict(zip(names, values)), "estimator": args.guide_estimator}), ckpt, s)
        found.setdefault((setting.sampler, setting.steps, guidance_name(setting)), setting)      # NAG 0 has no interval
    return list(found.values())


def visited(sampler):
    """The levels at which the sampler asks its network, from a run of it on one number."""
    levels = []
    def note(x, t):
        levels.append(t.item())
        return torch.zeros_like(x)
    sampler.sample(note, torch.zeros(1, 1, 1, 1), sampler.path, steps=sampler.args.steps)
    return levels


def nearest(levels, count):
    """Of the levels inside (0, 1) those next to `count` evenly spaced ones, in rising order."""
    inside = sorted({t for t in levels if 0 < t < 1})
    return sorted({min(inside, key=lambda t: abs(t - (i + 1) / (count + 1))) for i in range(count)}) if inside else []


def observe(estimator, sampler, num, batch, levels):
    """t̂ (num, levels) off the sampler's states at these levels, each just before its step; and where they lead, uint8 images and labels."""
    mine = np.array_split(np.arange(num), WORLD)[RANK]
    rows, drawn = [np.empty((0, len(levels)))], []
    with sampler.bar(len(mine)) as bar:
        for at in range(0, len(mine), batch):
            seen = {}
            def watch(x, t):
                if t.item() in levels:                            # Heun's rule comes by twice; the second state is the one it keeps
                    seen[t.item()] = estimator(x).mean().double().cpu().numpy()
            drawn.append([part.cpu().numpy() for part in sampler(mine[at:at + batch], bar, watch=watch)])
            rows.append(np.stack([seen[t] for t in levels], 1))
    parts = [(np.concatenate(rows), drawn)]
    if WORLD > 1:
        parts = [None] * WORLD
        dist.all_gather_object(parts, (np.concatenate(rows), drawn))
    rows, drawn = zip(*parts)                                     # in the order of the images
    images, labels = zip(*itertools.chain(*drawn))
    return np.concatenate(rows), np.concatenate(images), np.concatenate(labels)


def bootstrap(estimates, rng, times=1000):
    """Means (times, levels) over resampled rows of estimates (N, levels)."""
    return np.stack([estimates[rng.integers(0, len(estimates), len(estimates))].mean(0) for _ in range(times)])


def shift_at(real, t, estimates):
    """δ(t) = E[t̂(x̂_t)] − E[t̂(x_t)], of estimates (N,) and the Reading of real data at t."""
    return float(estimates.mean() - real[t].estimates.mean())


def near_data(path, real, levels, estimates):
    """The mean shift over those of the levels where the data outweighs the noise, SNR = α² / σ² > 1; NaN where none does."""
    shift = [shift_at(real, t, estimates[:, j]) for j, t in enumerate(levels) if path.alpha(t) > path.sigma(t)]
    return float(np.mean(shift)) if shift else math.nan


def shifts(path, real, results):
    """The shift of each setting, rows of numbers: results is a list of (name, levels, estimates (N, levels)), real {t: Reading}.

    Intervals are bootstrap 95 % over images, of both sides. Settings share their seeds, and where they share the levels
    the difference to the first one is bootstrapped image by image.
    """
    between = lambda means: [float(v) for v in np.percentile(means, (2.5, 97.5))]
    real_means = {t: bootstrap(reading.estimates[:, None], generator("real", i))[:, 0] for i, (t, reading) in enumerate(real.items())}
    first_levels, first = results[0][1], results[0][2]
    first_means = bootstrap(first, generator("samples"))
    table = []
    for k, (name, levels, estimates) in enumerate(results):
        means, rows = bootstrap(estimates, generator("samples")), []
        for j, t in enumerate(levels):
            shift = shift_at(real, t, estimates[:, j])
            row = {"t": t, "shift": shift, "interval": between(means[:, j] - real_means[t]),
                   "sigma_e": diffusion.extra_noise(path, t, shift).item() if shift >= 0 else None}
            if k and levels == first_levels and len(estimates) == len(first):
                row["less_than_first"] = float(first[:, j].mean() - estimates[:, j].mean())
                row["less_interval"] = between(first_means[:, j] - means[:, j])
            rows.append(row)
        table.append({"name": name, "near_data": near_data(path, real, levels, estimates), "levels": rows})
    return table


def measure(args):
    device = join_ranks()
    ckpt, model, s = open_checkpoint(args.ckpt, args.model)
    latent = s["image_size"] != s["input_size"]
    latents = args.latents or s.get("latents") if latent else None
    if latent and not latents:
        stop(f"{ckpt} is a model in latents; give those of real data with --latents")
    if latent and s["data"] in ("imagenet", "unknown"):           # a published model, which does not say where its data are
        s["data"] = open_source(latents, None, None, None).note["data"]
    file = Path(args.estimator) if args.estimator else default_file(s["data"], s["interpolant"], latent)
    estimator, own = open_estimator(file, ckpt, s, judge=True)
    source = open_source(latents, s["data"], s["image_size"], own["seed"])
    images = held_out(source, s["input_size"], own["seed"], 4 * args.num) if RANK == 0 else None
    classifier = open_estimator(args.guide_estimator, ckpt, s)[0].to(device) if args.guide_estimator else None
    guide = open_guide(args, s)
    guide = guide and guide.to(device)
    estimator.to(device), model.to(device)
    args.precision = args.precision or agree(fast_precision(device))
    args.compile = compiles(device) if args.compile is None else args.compile
    settings = combinations(args, ckpt, s)
    vae = open_vae(args, s) if args.keep_images else None
    vae = vae and vae.to(device)
    samplers = [Sampler(model, s, setting, list(range(s["num_classes"])), device, classifier, guide, vae) for setting in settings]
    out = Path(args.out) if args.out else run_folder(ckpt) / "shift"
    if out.exists() and not out.is_dir():
        stop(f"--out {out} is a file; give the name of a folder")

    begun, path, results, real = time.perf_counter(), samplers[0].path, [], {}
    same = len({(setting.sampler, setting.steps) for setting in settings}) == 1
    for setting, sampler in zip(settings, samplers):
        walk = f"{setting.sampler}, {setting.steps} steps"
        name = guidance_name(setting) or "no guidance"
        if RANK == 0:
            print(f"{ckpt}: {args.num} images in {walk}, {name}, {args.precision}", flush=True)
        levels = nearest(visited(sampler), args.levels)
        if not levels:
            stop(f"{walk} visit no level between 0 and 1; give more --steps")
        estimates, drawn, labels = observe(estimator, sampler, args.num, args.batch, levels)
        if not np.isfinite(estimates).all():
            stop(f"the states of {name}, {walk}, are not finite; lower its weights")
        results.append((name if same else f"{name}, {walk}", levels, estimates))
        if RANK == 0:
            real |= {reading.t: reading for reading in calibration(estimator, path, images, [t for t in levels if t not in real], device)}
        if args.keep_images and RANK == 0:
            with replacing(out / f"{name}, {walk}.npz".replace(", ", "-").replace(" ", "-")) as target:
                np.savez(target, arr_0=drawn.transpose(0, 2, 3, 1), arr_1=labels, shift=near_data(path, real, levels, estimates))
    if RANK:
        return

    table = shifts(path, {t: real[t] for t in sorted(real)}, results)

    title = f"{ckpt}, {args.num} images" + (f", {walk}" if same else "")
    print(f"\n{title}, read by {file}, against {len(images)} held-out real images")
    for setting in table:
        print(f"\n{setting['name']}\n    t      SNR     shift     95 % interval       sigma_e   seen" +
              ("    less than the first by" if "less_than_first" in setting["levels"][0] else ""))
        for row in setting["levels"]:
            snr = (path.alpha(row["t"]) / path.sigma(row["t"])).item()**2
            line = (f"  {row['t']:.3f} {snr:8.3g}   {row['shift']:+.4f}   {row['interval'][0]:+.4f} to {row['interval'][1]:+.4f}   "
                    f"{'   –   ' if row['sigma_e'] is None else format(row['sigma_e'], '7.4f')}   {in_percent(real[row['t']].seen)}")
            if "less_than_first" in row:
                line += f"    {row['less_than_first']:+.4f} ({row['less_interval'][0]:+.4f} to {row['less_interval'][1]:+.4f})"
            print(line)
    print("\nmean over the levels where SNR > 1:" + "".join(f"\n  {setting['near_data']:+.5f}  {setting['name']}" for setting in table))
    print(f"\nshift: E[t̂] of the samples' states minus that of real data at the same t; sigma_e: the extra noise that makes it;\n"
          f"seen: how much of a known shift of {PROBE:g} the estimator shows there. Far from 100 %, the shift stands for more than it says.")

    with replacing(out / "shift.json") as target:
        everything = {
            "checkpoint": str(ckpt), "estimator": str(file), "guide_estimator": args.guide_estimator, "num": args.num, "real": len(images),
            "precision": args.precision, "seed": args.seed, "minutes": round((time.perf_counter() - begun) / 60, 2),
            "real_data": [{"t": r.t, "bias": r.bias, "spread": float(r.estimates.std()), "seen": r.seen} for r in real.values()],
            "settings": [{**row, "near_data": row["near_data"] if math.isfinite(row["near_data"]) else None, **{key: getattr(setting, key) for key in
                                    ("sampler", "steps", "w_nag", "nag_interval", "cfg_scale", "cfg_interval", "cfg_channels", "w_nag_classifier",
                                     "guide", "guide_scale", "guide_interval")}}
                         for row, setting in zip(table, settings)]}
        target.write(json.dumps(everything, indent=1).encode())
    with replacing(out / "shift.png") as target:
        figure(path, title, real, table, results).save(target, "png")
    print(f"{out}/shift.json, {out}/shift.png; {time.perf_counter() - begun:.0f} s")


# ---------------------------------------------------------------------------------------------------------------------
# The figure, drawn three times too large and shrunk, which smooths it


STYLES = [((0, 0, 0), ()), ((0, 114, 178), (14, 6)), ((213, 94, 0), (4, 5)), ((0, 158, 115), (14, 5, 4, 5)), ((204, 121, 167), (24, 6)),
          ((130, 130, 130), (2, 3))]                              # colours for the colour-blind, dashes for greyscale
FINE = 3


def ticks(low, high, most):
    """Round numbers between low and high, at most so many, and their labels."""
    raw = (high - low) / most
    power = 10**math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= raw * (1 - 1e-9))
    places = max(0, -math.floor(math.log10(step) + 1e-9))
    return [(k * step, f"{k * step:.{places}f}") for k in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


class Panel:
    """A frame with two axes, in which curves are drawn in the units of the data."""

    def __init__(self, width, height, x_range, y_range):
        self.size, self.x_range, self.y_range = (width * FINE, height * FINE), x_range, y_range
        self.image = Image.new("RGB", self.size, "white")

    def at(self, x, y):
        (x0, x1), (y0, y1), (w, h) = self.x_range, self.y_range, self.size
        return (float(x) - x0) / (x1 - x0) * w, h - (float(y) - y0) / (y1 - y0) * h

    def band(self, xs, lows, highs, colour):
        mask = Image.new("L", self.size, 0)
        ImageDraw.Draw(mask).polygon([self.at(x, y) for x, y in zip(xs, lows)] + [self.at(x, y) for x, y in zip(xs[::-1], highs[::-1])], fill=45)
        self.image.paste(colour, mask=mask)

    def curve(self, xs, ys, colour, dashes=(), width=2.2):
        pen, points = ImageDraw.Draw(self.image), [self.at(x, y) for x, y in zip(xs, ys)]
        lengths, part, on = [d * FINE for d in dashes] or [math.inf], 0, True
        left = lengths[0]
        for (xa, ya), (xb, yb) in zip(points, points[1:]):
            length, done = math.hypot(xb - xa, yb - ya), 0.0
            while done < length:
                go = min(left, length - done)
                if on:
                    ends = [(xa + (xb - xa) * f / length, ya + (yb - ya) * f / length) for f in (done, done + go)]
                    pen.line(ends, colour, round(width * FINE))
                done, left = done + go, left - go
                if left <= 0:
                    part, on = (part + 1) % len(lengths), not on
                    left = lengths[part]

    def dots(self, xs, ys, colour, filled):
        pen, r = ImageDraw.Draw(self.image), 3.5 * FINE
        for x, y, full in zip(xs, ys, filled):
            u, v = self.at(x, y)
            pen.ellipse((u - r, v - r, u + r, v + r), fill=colour if full else "white", outline=colour, width=round(1.5 * FINE))

    def put(self, page, left, top, xlabel, ylabel, numbers=True):
        """Onto the page, with frame, ticks and labels; left and top of the frame in final pixels."""
        w, h = self.size
        x0, y0 = left * FINE, top * FINE
        page.paste(self.image, (x0, y0))
        pen, font, small = ImageDraw.Draw(page), ImageFont.load_default(15 * FINE), ImageFont.load_default(13 * FINE)
        pen.rectangle((x0, y0, x0 + w, y0 + h), outline="black", width=FINE)
        for value, label in ticks(*self.x_range, w // (FINE * 75)):
            u = x0 + self.at(value, 0)[0]
            pen.line((u, y0 + h, u, y0 + h - 5 * FINE), "black", FINE)
            pen.text((u, y0 + h + 5 * FINE), label, "black", small, anchor="ma")
        if numbers:
            for value, label in ticks(*self.y_range, h // (FINE * 45)):
                v = y0 + self.at(0, value)[1]
                pen.line((x0, v, x0 + 5 * FINE, v), "black", FINE)
                pen.text((x0 - 6 * FINE, v), label, "black", small, anchor="rm")
        pen.text((x0 + w / 2, y0 + h + 24 * FINE), xlabel, "black", font, anchor="ma")
        turned = Image.new("L", (h, 24 * FINE), 0)
        ImageDraw.Draw(turned).text((h / 2, 12 * FINE), ylabel, 255, font, anchor="mm")
        turned = turned.rotate(90, expand=True)
        page.paste("black", (x0 - (82 if numbers else 32) * FINE, y0), turned)


def legend(page, top, entries):
    """Name, colour and dashes of each curve, in rows from `top` on, in final pixels."""
    pen, font, left = ImageDraw.Draw(page), ImageFont.load_default(14 * FINE), 90
    x = left
    for name, colour, dashes in entries:
        key, width = Panel(38, 12, (0, 1), (0, 1)), 66 + round(font.getlength(name) / FINE)
        key.curve((0, 1), (0.5, 0.5), colour, dashes)
        x, top = (x, top) if (x + width) * FINE < page.width else (left, top + 19)
        page.paste(key.image, (x * FINE, top * FINE))
        pen.text(((x + 46) * FINE, (top + 6) * FINE), name, "black", font, anchor="lm")
        x += width


def figure(path, title, real, table, results):
    """The shift against t with its 95 % band for each setting, and densities of t̂ at three levels."""
    from scipy.stats import gaussian_kde                          # takes a second, which only this figure needs

    page = Image.new("RGB", (1200 * FINE, 640 * FINE), "white")
    pen, font, small = ImageDraw.Draw(page), ImageFont.load_default(14 * FINE), ImageFont.load_default(13 * FINE)
    styled = lambda rows: zip(rows, itertools.cycle(STYLES))
    pen.text((90 * FINE, 14 * FINE), title, "black", font)

    trusted = lambda t: real[t].seen is not None and real[t].seen > 0.9
    rows = [row for setting in table for row in setting["levels"]]
    shown = [row for row in rows if trusted(row["t"])] or rows
    low, high = min(0, *(row["interval"][0] for row in shown)), max(1e-6, *(row["interval"][1] for row in shown))
    differing = [(setting, style) for setting, style in styled(table) if "less_than_first" in setting["levels"][0]]
    panel = Panel(590, 335 if differing else 500, (0, 1), (low - 0.08 * (high - low), high + 0.08 * (high - low)))
    panel.curve((0, 1), (0, 0), (150, 150, 150), width=1)
    equal = min((i / 1000 for i in range(1, 1001)), key=lambda t: abs((path.alpha(t) - path.sigma(t)).item()))
    panel.curve((equal, equal), panel.y_range, (150, 150, 150), (3, 4), width=1)
    ImageDraw.Draw(panel.image).text((panel.at(equal, 0)[0] - 6 * FINE, 8 * FINE), "SNR > 1", (110, 110, 110), small, anchor="ra")
    for setting, (colour, dashes) in styled(table):
        ts, ys = zip(*((row["t"], row["shift"]) for row in setting["levels"]))
        panel.band(ts, *zip(*(row["interval"] for row in setting["levels"])), colour)
        panel.curve(ts, ys, colour, dashes)
        panel.dots(ts, ys, colour, [trusted(t) for t in ts])
    panel.put(page, 90, 50, "" if differing else "nominal level t", "noise shift")

    if differing:                                                 # the same images, guided and not: the difference is sharper
        rows = [row for setting, _ in differing for row in setting["levels"] if trusted(row["t"])] or differing[0][0]["levels"]
        low, high = min(0, *(row["less_interval"][0] for row in rows)), max(1e-6, *(row["less_interval"][1] for row in rows))
        panel = Panel(590, 130, (0, 1), (low - 0.1 * (high - low), high + 0.1 * (high - low)))
        panel.curve((0, 1), (0, 0), (150, 150, 150), width=1)
        panel.curve((equal, equal), panel.y_range, (150, 150, 150), (3, 4), width=1)
        for setting, (colour, dashes) in differing:
            ts, ys = zip(*((row["t"], row["less_than_first"]) for row in setting["levels"]))
            panel.band(ts, *zip(*(row["less_interval"] for row in setting["levels"])), colour)
            panel.curve(ts, ys, colour, dashes)
        panel.put(page, 90, 420, "nominal level t", "removed of it")

    first = results[0][1]
    three = [min(first, key=lambda t: abs(t - aim)) for aim in (0.2, 0.4, 0.6)]
    for k, t in enumerate(three):
        groups = [("real data", real[t].estimates, (150, 150, 150), ())]
        groups += [(name, estimates[:, levels.index(t)], *style) for (name, levels, estimates), style in styled(results) if t in levels]
        ends = np.concatenate([values for _, values, *_ in groups])
        span = (max(0, np.percentile(ends, 0.2)), min(1, np.percentile(ends, 99.8)))
        span = (min(span[0], t) - 0.1 * (span[1] - span[0] + 1e-3), max(span[1], t) + 0.1 * (span[1] - span[0] + 1e-3))
        grid = np.linspace(*span, 300)
        heights = [gaussian_kde(values)(grid) if values.std() > 1e-9 else np.zeros(300) for _, values, *_ in groups]
        panel = Panel(390, 125, span, (0, 1.12 * max(1e-9, *(height.max() for height in heights))))
        panel.curve((t, t), panel.y_range, (150, 150, 150), (3, 4), width=1)
        panel.band(grid, np.zeros(300), heights[0], (60, 60, 60))
        for height, (_, _, colour, dashes) in zip(heights, groups):
            panel.curve(grid, height, colour, dashes, width=1.8)
        ImageDraw.Draw(panel.image).text((panel.size[0] - 8 * FINE, 6 * FINE), f"t = {t:.3f}", "black", small, anchor="ra")
        panel.put(page, 760, 50 + 187 * k, "estimated level" if k == 2 else "", "density", numbers=False)

    legend(page, 606, [(setting["name"], *style) for setting, style in styled(table)] + [("real data", (150, 150, 150), ())])
    if not all(map(trusted, real)):
        pen.text((1180 * FINE, 14 * FINE), "open dots: the estimator sees less than 90 % of a shift", "black", font, anchor="ra")
    return page.resize((page.width // FINE, page.height // FINE), Image.LANCZOS)


def main():
    args = arguments()
    {"train": train, "measure": measure}[args.command](args)


if __name__ == "__main__":
    one_line_errors(main)
