"""See the noise shift: how much noise do the states of a sampler really hold, and does NAG help?

    python estimator.py train                    # g_φ(t|x) on the shapes: minutes on a CPU
    python estimator.py measure --w-nag 0 1 3    # newest checkpoint: tables, shift.json, shift.png

The noise estimator g_φ(t|x) (models.NoiseEstimator) learns from real data alone, noised to known
levels t: it fits a density over t by maximum likelihood, and never meets a sampler. The mean of
that density, t̂(x), is the level that a state x seems to have. Its average over the states x̂_t of
a sampler at level t, less its average over real data at t, where it errs by its own bias, is the
noise shift (Zhong et al., 2025). Their Statement 1 gives the extra noise σ_e that makes it:

    δ(t) = E[t̂(x̂_t)] − E[t̂(x_t)],        σ_e² = σ(t + δ)² − σ(t)²

Not every shift can be seen: on VP at large t, σ is close to 1 everywhere, and tells little about t.
So noise is added to real data, too, to make a known shift. Where the share of it that t̂ shows,
"seen", is far below 1, the true shift is larger than δ. An estimator can also guide sampling, by
--w-nag-classifier 1 --estimator FILE; then another one has to judge.
"""
import copy
import json
import math
import time
from pathlib import Path

import train                      # before torch is loaded: it sets how its threads wait

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

import diffusion
import models
import sample

LEVELS = 19                                         # the shift is measured at so many levels
PROBE = 0.03                                        # the known shift
HELD_OUT = 0.1, 20_000                              # a tenth of the images, at most so many
FILE = "runs/estimator-{}-{}.pt"                    # for data[-latents] and interpolant

# A level shows twice in a state: in its noise, σ(t), and in the strength of its signal, α(t). The
# errors of a sampler change the noise alone, and an estimator that trusts the signal overlooks a
# part of them. So it learns from images c x + b of random contrast c, from e^−J to e^J, and random
# brightness b ~ N(0, (J/2)²) of each channel: the noise is all that is left to tell t by.
JITTER = 0.4


# --------------------------------------------------------------------------------------------------
# Real data, of which a part is held out: to calibrate the estimator, and to compare samples with


def load_images(data, most, size, seed):
    """Up to `most` images, uint8 (N, 3, size, size), or latents (N, 4, size, size) drawn once."""
    n, noise = most if data.endless else min(most, len(data)), []
    if data.latent:
        shape = n, models.VAE.channels, size, size
        noise = [train.generator(seed, "posterior").standard_normal(shape, np.float32)]
    return torch.from_numpy(data.images(np.arange(n), np.zeros(n, bool), *noise)[0])


# --------------------------------------------------------------------------------------------------
# Training: maximum likelihood of the level


def jitter(images, strength, rng):
    """Images (B, C, H, W) of another contrast and, in each channel, another brightness."""
    B, C = images.shape[:2]
    gain = np.exp(rng.uniform(-strength, strength, (B, 1, 1, 1)))
    offset = rng.normal(0, strength / 2, (B, C, 1, 1))
    return torch.from_numpy(gain).to(images) * images + torch.from_numpy(offset).to(images)


def fit(estimator, path, batches, args, optimizer, start=0, after_step=lambda step: None):
    """Maximise log g_φ(t|x), from step `start` on; a batch is x0 (B, C, H, W), t (B,) and eps."""
    bar = train.progress(total=args.steps, initial=start, unit="step", smoothing=0.05)
    for step, (x0, t, eps) in enumerate(batches, start + 1):
        cosine = (1 + math.cos(math.pi * (step - 1) / args.steps)) / 2
        for group in optimizer.param_groups:
            group["lr"] = args.lr * min(1, step / 100) * cosine
        x0 = jitter(x0, args.jitter, train.generator(args.seed, "jitter", step))
        loss = -estimator(diffusion.add_noise(path, x0, eps, t)).log_prob(t).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(estimator.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        bar.update()
        if step % 50 == 0:                          # not more often: it waits for the GPU
            bar.set_postfix_str(f"log density {-loss.item():.3f}")
        after_step(step)
    bar.close()


def resume(out, settings, estimator, optimizer):
    """Load what an earlier run with the same settings wrote, and return its step."""
    _, before = models.load_estimator(out, "give another --out")
    for name, value in settings.items():
        if before.get(name) != value:
            raise ValueError(f"{out} was trained with {name.replace('_', ' ')} {before.get(name)}, "
                             f"not {value}; give another --out")
    saved = models.load_file(out)
    if not {"opt", "step"} <= saved.keys():
        raise ValueError(f"{out} lacks its optimiser's state; give another --out")
    estimator.load_state_dict(saved["estimator"])
    optimizer.load_state_dict(copy.deepcopy(saved["opt"]))          # the file is mapped
    return saved["step"]


def train_estimator(args):
    device = train.join_ranks()
    if train.WORLD > 1:
        train.stop("an estimator is trained on one device; start it without torchrun")
    if args.latents and (args.data or args.image_size):
        train.stop("--latents have their own data and size; leave out --data and --image-size")
    if args.latents:
        source = train.Latents(args.latents)
        args.data, args.image_size = source.note["data"], source.note["image_size"]
        args.input_size, args.in_channels = source.size, models.VAE.channels
    else:
        args.data = args.data or "shapes"
        args.image_size = args.image_size or (16 if train.is_drawn(args.data) else 32)
        args.input_size, args.in_channels = args.image_size, 3
        source = train.open_data(args.data, args.image_size, args.seed)
    args.num_classes, args.images = len(source.classes), None if source.endless else len(source)
    args.jitter, args.class_drop, args.noise_drop, args.levels = JITTER, 0.0, 0.0, "uniform"
    settings = {k: v for k, v in vars(args).items() if k not in ("command", "latents", "out")}
    name = train.data_name(args.data) + "-latents" * source.latent
    out = Path(args.out or FILE.format(name, args.interpolant))
    train.lock(out.with_name(f".{out.name}"))

    torch.manual_seed(args.seed)
    estimator = models.NoiseEstimator(args.input_size, args.in_channels).to(device)
    optimizer = torch.optim.AdamW(estimator.parameters(), lr=args.lr, weight_decay=0)
    start = resume(out, settings, estimator, optimizer) if out.exists() else 0
    then = f"now: python estimator.py measure --w-nag 0 1 2 --judge {out}"
    if start >= args.steps:
        return print(f"{out} is finished; {then}")
    training, held_out = train.split(source, args.seed, *HELD_OUT)
    if not len(held_out):
        raise ValueError(f"{len(source)} images are too few to hold some out; give another --data")
    if start == 0:
        x0 = train.to_float(load_images(training, 2048, args.input_size, args.seed).to(device))
        estimator.start_from(jitter(x0, JITTER, train.generator(args.seed, "jitter", 0)))
    workers = 0 if training.endless and device.type == "cpu" else train.WORKERS
    loader = train.load(train.Batches(training, args), range(start, args.steps), workers, device)
    batches = ((train.to_float(images.to(device)), t.to(device), eps.to(device))
               for images, _, t, eps, _ in loader)

    def save(step):
        if step % 200 == 0 or step == args.steps:
            with train.replacing(out) as file:
                torch.save({"estimator": estimator.state_dict(), "opt": optimizer.state_dict(),
                            "step": step, "settings": settings}, file)

    print(f"{out}: {args.data} {args.image_size}×{args.image_size} on {args.interpolant}, steps "
          f"{start} to {args.steps} of {args.batch} images", flush=True)
    path = train.PATHS[args.interpolant]()
    fit(estimator, path, batches, args, optimizer, start, save)
    images = load_images(held_out, 4096, args.input_size, args.seed)
    _, calibration = calibrate(estimator.eval(), path, images, np.arange(0.05, 1, 0.1), device)
    print(f"\non {len(images)} held-out images (seen: the share of a shift of {PROBE:g}):")
    print_table(calibration)
    print(then)


# --------------------------------------------------------------------------------------------------
# Measurement: what the estimator makes of real data, and of the states of a sampler


@torch.no_grad()
def calibrate(estimator, path, images, levels, device):
    """The estimator on real images (N, C, H, W), uint8 or latents, noised to each of L levels.

    Returns t̂ (N, L), and a table of columns (L,): bias, mean absolute error, how often the central
    68 % of the density hold t, and the share seen of a shift of PROBE (or 1 − t, if that is less).
    """
    columns = []
    for t in levels:
        rng, known = train.generator("calibration", round(1e6 * t)), min(PROBE, 1 - t)
        sigma_e = diffusion.extra_noise(path, t, known).float()
        rows = []
        for part in images.split(512):
            noise = rng.standard_normal((2, *part.shape), np.float32)
            eps, more = torch.from_numpy(noise).to(device)
            x = diffusion.add_noise(path, train.to_float(part.to(device)), eps, t).float()
            density = estimator(x)
            seen = (estimator(x + sigma_e * more).mean() - density.mean()) / known
            rows.append(torch.stack([density.mean(), density.cdf(t), seen]).double().cpu())
        columns.append(torch.cat(rows, 1))
    estimates, below, seen = torch.stack(columns, 2).numpy()        # (N, L) each
    error, covered = estimates - levels, (below > 0.1587) & (below < 0.8413)
    return estimates, {"t": levels, "bias": error.mean(0), "mean abs. error": abs(error).mean(0),
                       "68 % interval covers": covered.mean(0), "seen": seen.mean(0)}


def measured_levels(sampler, count=LEVELS):
    """The levels that a sampler visits closest to `count` evenly spaced ones, in rising order."""
    visited, path = set(), sampler.path

    def note(x, t):
        visited.add(float(t))
        return x

    sampler.sample(note, torch.zeros(1, 1, 1, 1), path, steps=sampler.args.steps)
    inside = [t for t in visited if 0 < t < 1]
    if not any(path.alpha(t) > path.sigma(t) for t in inside):
        raise ValueError(f"no state with SNR > 1 in {sampler.args.steps} steps; give more --steps")
    aims = np.arange(1, count + 1) / (count + 1)
    return sorted({min(inside, key=lambda t: abs(t - aim)) for aim in aims})


def observe(estimator, sampler, num, batch, levels):
    """Draw `num` samples, shared by the ranks, and look at their states on the way.

    Returns, in the order of the samples, t̂ (num, L) of their states at the levels, the images
    uint8 (num, C, H, W), and the labels (num,).
    """
    means, parts = {}, []

    def watch(x, t):                # Heun's rule calls twice at a level, and keeps the second state
        if float(t) in levels:
            means[float(t)] = estimator(x).mean().double().cpu().numpy()

    mine = np.array_split(np.arange(num), train.WORLD)[train.RANK]
    with sampler.bar(len(mine)) as bar:
        for first in range(0, len(mine), batch):
            images, labels = sampler(mine[first:first + batch], bar, watch=watch)
            states = np.stack([means[t] for t in levels], 1)
            parts.append((states, images.cpu().numpy(), labels.numpy()))
    if train.WORLD > 1:
        gathered = [None] * train.WORLD
        torch.distributed.all_gather_object(gathered, parts)
        parts = sum(gathered, [])
    return [np.concatenate(arrays) for arrays in zip(*parts)]


def shift(states, real):
    """δ = E[t̂(x̂_t)] − E[t̂(x_t)] and its standard error; t̂ of states (N, …), of data (M, …)."""
    error = np.sqrt(states.var(0) / len(states) + real.var(0) / len(real))
    return states.mean(0) - real.mean(0), error


def shift_table(path, levels, seen, real, states, first=None):
    """A table of columns (L,): the shift at each level, with normal 95 % intervals.

    seen (L,) and real (M, L) are from `calibrate`; states (N, L) and those of the first setting,
    first (N, L), from `observe`. As all settings have the same seeds, what one has less than the
    first is measured sample by sample: it is known much better than the shift.
    """
    def interval(mean, error):
        return np.stack([mean - 1.96 * error, mean + 1.96 * error], 1).tolist()

    delta, error = shift(states, real)
    t, positive = torch.tensor(levels, dtype=torch.float64), torch.from_numpy(delta).clamp(min=0)
    table = {"t": levels, "SNR": (path.alpha(t) / path.sigma(t)).square().numpy(), "shift": delta,
             "interval": interval(delta, error),
             "sigma_e": diffusion.extra_noise(path, t, positive).numpy(), "seen": seen}
    if first is not None:
        less = first - states
        table["less_than_first"] = less.mean(0)
        table["less_interval"] = interval(less.mean(0), less.std(0) / np.sqrt(len(less)))
    return table


def print_table(table):
    """Print a dict {heading: column of numbers or of pairs [low, high]}."""
    def text(value):
        return " to ".join(map(text, value)) if isinstance(value, list) else f"{value:.4f}"[:8]

    columns = [[name, *map(text, values)] for name, values in table.items()]
    columns = [[cell.rjust(max(map(len, column))) for cell in column] for column in columns]
    print("\n".join("  " + "  ".join(row) for row in zip(*columns)))


def open_judge(args, s, device):
    """The estimator that judges, whose file becomes args.judge, and held-out real images."""
    source, latent = None, s["image_size"] != s["input_size"]
    if latent:
        if not (args.latents or s.get("latents")):
            train.stop("this model draws latents; give those of real data with --latents")
        source = train.Latents(args.latents or s["latents"])
        if s["data"] in ("imagenet", "unknown"):    # a published model does not name its folder
            s["data"] = source.note["data"]
    name = train.data_name(s["data"]) + "-latents" * latent
    if not args.judge:
        args.judge = FILE.format(name, s["interpolant"])
        if not Path(args.judge).exists() and not latent:
            print(f"there is no {args.judge} to judge by yet, so it is trained first")
            train_estimator(arguments().parse_args([
                "train", "--data", s["data"], "--image-size", str(s["image_size"]),
                "--interpolant", s["interpolant"]]))
    if args.estimator and train.leads_to(args.estimator) == train.leads_to(args.judge):
        train.stop(f"{args.judge} cannot judge what it guides; train another one for --estimator")
    judge, own = sample.open_estimator(args.judge, s, judge=True)
    source = source or train.open_data(s["data"], s["image_size"], own["seed"])
    _, held_out = train.split(source, own["seed"], *HELD_OUT)
    return judge.to(device), load_images(held_out, 4 * args.num, s["input_size"], own["seed"])


def measure(args):
    begun, device = time.perf_counter(), train.join_ranks()
    ckpt, model, s = sample.open_checkpoint(args.ckpt, args.model)
    judge, real_images = open_judge(args, s, device)
    sample.settle(args, ckpt, s, device)
    guides = sample.open_guides(args, s, device, decode=args.keep_images)
    out = Path(args.out) if args.out else train.run_folder(ckpt) / "shift"
    train.prepare(out)
    out.mkdir(parents=True, exist_ok=True)

    sampler = sample.Sampler(model.to(device), s, args, range(s["num_classes"]), device, **guides)
    levels, path = measured_levels(sampler), sampler.path
    title = f"{ckpt}, {args.num} images, {args.sampler}, {args.steps} steps"
    weights, observed = list(dict.fromkeys(args.w_nag)), []
    for w_nag in weights:
        args.w_nag = w_nag                          # the sampler takes it from there
        name = sample.guidance_name(args) or "no guidance"
        print(f"{title}, {args.precision}: {name}", flush=True)
        states, images, labels = observe(judge, sampler, args.num, args.batch, levels)
        words = f"{name} {args.sampler} {args.steps} steps".replace(",", "").split()
        kept = "-".join(words) + ".npz" if args.keep_images else None
        observed.append(({"name": name, "images": kept, **vars(args)}, states))
        if args.keep_images and train.RANK == 0:
            with train.replacing(out / kept) as file:
                np.savez(file, arr_0=images.transpose(0, 2, 3, 1), arr_1=labels)
    if train.RANK:
        return
    real, calibration = calibrate(judge, path, real_images, levels, device)
    print(f"\n{title}, judged by {args.judge}, against {len(real)} held-out real images")
    curves = []
    for setting, states in observed:
        first = observed[0][1] if curves else None
        table = shift_table(path, levels, calibration["seen"], real, states, first)
        near = table["SNR"] > 1
        mean, error = shift(states[:, near].mean(1), real[:, near].mean(1))
        setting |= {"mean_shift": mean, "mean_shift_error": error, "levels": table}
        print(f"\n{setting['name']}: mean {mean:.5f} where SNR > 1, standard error {error:.5f}")
        print_table(table)
        curves.append((setting["name"], levels, table["shift"], *zip(*table["interval"])))
    report = {"checkpoint": ckpt, **vars(args), "w_nag": weights, "real": len(real),
              "minutes": round((time.perf_counter() - begun) / 60, 2),
              "real_data": calibration, "settings": [setting for setting, _ in observed]}
    with train.replacing(out / "shift.json") as file:
        file.write(json.dumps(report, indent=1, default=np.ndarray.tolist).encode())
    equal = min(np.linspace(0, 1, 1001), key=lambda t: abs(path.alpha(t) - path.sigma(t)))
    chart = line_chart(curves, "nominal level t", "noise shift", title, (equal, "SNR = 1"))
    train.save_png(chart, out / "shift.png")
    print(f"\n{out}/shift.json, {out}/shift.png; {time.perf_counter() - begun:.0f} s")


COLOURS = ["#000000", "#0072b2", "#d55e00", "#009e73", "#cc79a7"]   # of Okabe and Ito
CORNERS = [30, 4, 3, 6]                                             # of the markers


def line_chart(curves, x_label, y_label, title="", x_mark=None):
    """A picture of curves (name, xs, ys, lows, highs), with a band from lows to highs unless None.

    x_mark = (x, text) is a dashed line. Drawn three times as large, and reduced: smooth lines.
    """
    left, top, right, bottom = 260, 200, 2360, 1400                 # the frame
    page = Image.new("RGB", (right + 90, bottom + 160 + 75 * len(curves)), "white")
    pen, font = ImageDraw.Draw(page, "RGBA"), ImageFont.load_default(45)
    points = np.array([(x, y) for _, xs, *sides in curves for ys in sides if ys is not None
                       for x, y in zip(xs, ys)])
    margin = np.where(np.ptp(points, 0) > 0, 0.06 * np.ptp(points, 0), 1)
    low, high = points.min(0) - margin, points.max(0) + margin
    low = np.where((low > 0) & (low < high / 3), 0, low)            # zero is shown where it is near

    def at(xs, ys):
        u, v = ((np.array([xs, ys]).T - low) / (high - low)).T
        return list(zip(left + (right - left) * u, bottom - (bottom - top) * v))

    for k, anchor in enumerate(("ma", "rm")):           # about six round numbers at each axis
        steps = [m * 10.0**e for e in range(-9, 9) for m in (1, 2, 5)]
        step = min(steps, key=lambda step: abs((high - low)[k] / step - 6))
        for value in step * np.arange(math.ceil(low[k] / step), math.floor(high[k] / step) + 1):
            ends = np.array([low, high])
            ends[:, k] = value
            pen.line(at(*ends.T), "lightgray", 3)
            pen.text(at(*ends.T)[0], f"{value:.6g}" + "  " * k, "black", font, anchor)
    pen.text((60, 40), title, "black", font)
    pen.text((60, top - 15), y_label, "black", font, "ld")
    pen.text((right, bottom + 60), x_label, "black", font, "ra")
    if x_mark:
        u, _ = at([x_mark[0]], [0])[0]
        pen.text((u, top - 15), x_mark[1], "black", font, "md")
        for v in range(top, bottom, 40):
            pen.line((u, v, u, v + 20), "black", 4)

    for k, (name, xs, ys, lows, highs) in enumerate(curves):
        colour, corners = COLOURS[k % len(COLOURS)], CORNERS[k % len(CORNERS)]
        if lows is not None:
            pen.polygon(at(xs, lows) + at(xs, highs)[::-1], f"{colour}2d")
        below = bottom + 160 + 75 * k
        for line in at(xs, ys), [(left, below), (left + 120, below)]:
            pen.line(line, colour, 7, "curve")
            for u, v in line:
                pen.regular_polygon((u, v, 18), corners, fill=colour)
        pen.text((left + 160, below), name, "black", font, "lm")
    pen.rectangle((left, top, right, bottom), outline="black", width=4)
    return page.reduce(3)


def arguments():
    parser, number, place = train.Arguments(__doc__), train.number, train.place
    commands = parser.add_subparsers(dest="command", required=True, metavar="train | measure")
    add = commands.add_parser("train", story="Train a noise estimator on real data.").add_argument
    add("--data", type=place, help="folder of images, or shapes (default), or shapes:star,cross")
    add("--image-size", type=number(int, 4), help="default: 16 for shapes, else 32")
    add("--latents", type=place, help="those that train.py made in this folder, instead of --data")
    add("--interpolant", choices=train.PATHS, default="linear", help="default: linear")
    add("--steps", type=number(int, 1), default=3000, help="default: 3000")
    add("--batch", type=number(int, 1), default=128, help="images per step (default: 128)")
    add("--lr", type=number(float, 0), default=1e-3, help="of AdamW, at most (default: 1e-3)")
    add("--seed", type=number(int, 0, 2**63 - 1), default=0, help="default: 0")
    add("--out", type=place, help="default: runs/estimator-<data>[-latents]-<interpolant>.pt")
    add = commands.add_parser("measure", story="Measure a checkpoint's noise shift.").add_argument
    add("--w-nag", type=number(float), nargs="+", default=[0.0], help="weights of NAG (default: 0)")
    sample.sampling_arguments(add)
    add("--judge", type=place, help="the estimator to judge by (default: as --out of train)")
    add("--latents", type=place, help="real data of a model in latents (default: what it knows)")
    add("--num", "--num-samples", type=number(int, 2), default=1024, help="default: 1024 images")
    add("--batch", type=number(int, 1), default=256, help="images at a time (default: 256)")
    add("--keep-images", action="store_true", help="write an .npz for each weight, for fid.py")
    add("--out", type=place, help="folder for shift.json, shift.png, .npz (default: <run>/shift)")
    return parser


def main():
    args = arguments().parse_args()
    {"train": train_estimator, "measure": measure}[args.command](args)


if __name__ == "__main__":
    train.one_line_errors(main)
