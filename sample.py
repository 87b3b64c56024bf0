"""Draw images from a checkpoint, with noise awareness guidance (NAG) and classifier-free guidance (CFG).

    python sample.py --w-nag 3                                  # newest checkpoint: a grid, beside the same without NAG
    python sample.py --ckpt runs/shapes-SiT-Ti-2 --w-nag 2 --cfg-scale 1.5 --nag-interval 0 0.6
    python sample.py --ckpt DiT-XL/2 --cfg-scale 4              # published weights, downloaded; or a file of them
    torchrun --nproc-per-node 8 sample.py --num-samples 50000 --w-nag 3 --out samples.npz

Sample i takes its class, its start and its noise from a generator of (seed, i): the batch size, the number of ranks and
a restart change nothing but rounding. Up to 64 images become a labelled PNG; more become an .npz with arr_0 (N, H, W, 3)
uint8 and arr_1 (N,) labels, as ADM's evaluator reads it. That is written to disk batch by batch, in OUT.partial, where the
same command finds what an interrupted one had finished.
"""
import argparse
import json
import shutil
import time
import zipfile
import zlib
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

import diffusion
import models
from train import (PATHS, RANK, WORLD, Arguments, SampleNoise, agree, allocate, checkpoints, compiles, device_name, fast_precision, is_drawn, join_ranks, lock,
                   matmul_rate, number, one_line_errors, peak_memory, picture, rank_0_first, replacing, stop, synchronize, synthetic,
                   to_uint8, write_at)

GRID = 64                                                         # up to so many images become a picture


def sampling_arguments(add, several=False):
    """The options that say what is sampled, also for `estimator.py measure`, which takes several values of some."""
    one_of = {"nargs": "+"} if several else {}
    pair_of = {"action": "append"} if several else {}
    add("--ckpt", metavar="PATH", help=f"checkpoint, folder of a run, or the published {', '.join(models.PUBLISHED)} (default: the newest below runs)")
    add("--model", choices=models.MODELS, metavar="NAME", help="for a checkpoint of DiT's or SiT's own code that does not say what it holds")
    add("--w-nag", type=number(float), default=0.0, metavar="W", help="weight of NAG (default: 0, which is neutral)", **one_of)
    add("--cfg-scale", type=number(float), default=1.0, metavar="S", help="scale of CFG (default: 1, which is neutral)", **one_of)
    add("--w-nag-classifier", type=number(float), metavar="W",
        help="weight of NAG by a noise estimator in place of the null branch (default: 0, which is neutral)", **one_of)
    add("--nag-interval", type=number(float, 0, 1), nargs=2, metavar=("LO", "HI"),
        help="levels t at which NAG acts, in both forms (default: 0.1 0.6 on shapes, else 0 1)", **pair_of)
    add("--cfg-interval", type=number(float, 0, 1), nargs=2, metavar=("LO", "HI"), help="levels t at which CFG acts (default: 0 1)", **pair_of)
    add("--cfg-channels", type=number(int, 1), metavar="N",
        help="CFG on the first N channels only; 3 in the published FIDs (default: all)")
    add("--guide", metavar="PATH", help="checkpoint of another model to be guided by: a weaker one, or the one that this was tuned from")
    add("--guide-scale", type=number(float), default=1.0, metavar="S", help="scale of the guide (default: 1, which is neutral)", **one_of)
    add("--guide-unconditional", action="store_true", help="ask the guide without class (domain guidance)")
    add("--guide-interval", type=number(float, 0, 1), nargs=2, metavar=("LO", "HI"), help="levels t at which the guide acts (default: 0 1)", **pair_of)
    add("--guide-model", choices=models.MODELS, metavar="NAME", help="as --model, for the guide")
    add("--sampler", choices=("ddpm", "sde", "ode"), help="default: ddpm on VP, sde on linear", **one_of)
    add("--steps", type=number(int, 1), metavar="N", help="default: 100 on shapes, else 250; ode 50", **one_of)
    add("--balanced", action="store_true", help="take the classes in turn, so that all come equally often (default: at random)")
    add("--seed", type=number(int, 0), default=0, help="sample i is a function of it and i (default: 0)")
    add("--precision", choices=("fp32", "bf16"), help="of the matrix products (default: bf16 where that is faster)")
    add("--compile", action=argparse.BooleanOptionalAction, help="torch.compile (default: on a GPU)")


def arguments():
    parser = Arguments(__doc__)
    add = parser.add_argument
    sampling_arguments(add)
    add("--estimator", metavar="FILE", help="the noise estimator of --w-nag-classifier, from: python estimator.py train")
    add("--vae", metavar="FILE", help="weights of Stable Diffusion's VAE (default: those the model was trained with, or downloaded)")
    add("--num", "--num-samples", type=number(int, 1), default=32, metavar="N",
        help="number of images (default: 32); behind torchrun, which takes --num for one of its own options, say --num-samples")
    add("--batch", type=number(int, 1), default=64, metavar="N", help="images at a time on each rank (default: 64)")
    add("--classes", nargs="+", metavar="C", help="draw classes from these names or numbers (default: all)")
    add("--benchmark", action="store_true", help="measure the speed of --model (default: DiT-XL/2) on latents, guided and not; one line of JSON")
    add("--out", metavar="FILE", help=".png or .npz (default: in the run's folder, named by the settings)")
    return parser.parse_args()


def newest_checkpoint():
    """The checkpoint below runs/ that was written last, of the run that wrote last."""
    found = [checkpoints(run)[-1] for run in Path("runs").glob("*") if checkpoints(run)]
    if not found:
        stop("no checkpoint below runs; train one with: python train.py, or name one with --ckpt")
    return max(found, key=lambda path: path.stat().st_mtime)


def class_numbers(wanted, names):
    """The labels that --classes asks for, by name or by number."""
    labels = []
    for name in wanted or names:
        if name not in names and not (name.isdecimal() and int(name) < len(names)):
            stop(f"no class {name!r}; the model knows {', '.join(names[:12])}{', …' if len(names) > 12 else ''} "
                 f"(0 to {len(names) - 1})")
        labels.append(names.index(name) if name in names else int(name))
    return labels


def guidance_name(args):
    """The guidance in a few words, for titles and file names; empty without any."""
    parts = []
    if args.w_nag:
        parts.append(f"NAG {args.w_nag:g} on {args.nag_interval[0]:g}-{args.nag_interval[1]:g}")
    if args.w_nag_classifier:
        parts.append(f"classifier NAG {args.w_nag_classifier:g} on {args.nag_interval[0]:g}-{args.nag_interval[1]:g}")
    if args.cfg_scale != 1:
        channels = f" of {args.cfg_channels} channels" if args.cfg_channels else ""
        parts.append(f"CFG {args.cfg_scale:g} on {args.cfg_interval[0]:g}-{args.cfg_interval[1]:g}{channels}")
    if args.guide_scale != 1:
        alone = " without class" if args.guide_unconditional else ""
        parts.append(f"guide {args.guide_scale:g}{alone} on {args.guide_interval[0]:g}-{args.guide_interval[1]:g}")
    return ", ".join(parts)


def halve(model):
    """Keep the weights of matrix products in bf16, to which autocast would round them at every call."""
    for module in model.modules():
        if isinstance(module, (torch.nn.Linear, torch.nn.Conv2d)):
            module.to(torch.bfloat16)
    return model


class Sampler:
    """Samples number `indices` of a checkpoint: uint8 (n, 3, H, W) and labels (n,), with or without the guidance.

    `watch`, if given, is called with every state (n, C, H, W) and level () at which the network is asked.
    """

    def __init__(self, model, settings, args, labels, device, estimator=None, guide=None, vae=None):
        self.model, self.settings, self.args, self.labels, self.device = model, settings, args, labels, device
        self.guide, self.vae, self.null_class, self.guide_null = guide, vae, settings["num_classes"], guide and guide.num_classes
        if args.precision == "bf16":
            self.model, self.guide = halve(model), guide and halve(guide)
        if args.compile:
            self.model, self.guide = torch.compile(self.model), guide and torch.compile(self.guide)
        self.classifier = estimator and estimator.gradient
        self.path = PATHS[settings["interpolant"]]()
        self.sample = {"ddpm": diffusion.sample_ddpm, "sde": diffusion.sample_sde, "ode": diffusion.sample_ode}[args.sampler]
        self.evaluations = args.steps if args.sampler != "ode" else 2 * args.steps + (self.path.prediction == "eps")

    def __call__(self, indices, bar, guidance=True, watch=None):
        args, s = self.args, self.settings
        noise = SampleNoise(args.seed, indices)
        labels = noise.classes(self.labels)
        if args.balanced:
            labels = torch.tensor([self.labels[i % len(self.labels)] for i in indices])
        y = labels.to(self.device)
        start = noise(torch.empty(len(indices), s["in_channels"], s["input_size"], s["input_size"], device=self.device))
        terms = dict(w_nag=args.w_nag, cfg_scale=args.cfg_scale, nag_interval=args.nag_interval,
                     cfg_interval=args.cfg_interval, cfg_channels=args.cfg_channels,
                     w_classifier=args.w_nag_classifier, classifier=self.classifier, guide=self.guide, guide_scale=args.guide_scale,
                     guide_interval=args.guide_interval, null_class=self.null_class) if guidance else {}
        if guidance and args.guide_unconditional:
            terms["guide_y"] = torch.full_like(y, self.guide_null)
        denoise = diffusion.guided(self.model, self.path, y, **terms)

        def watched(x, t):
            bar.update(len(x))
            if watch:
                watch(x, t)
            return denoise(x, t)

        options = {} if args.sampler == "ode" else {"randn": noise}
        with torch.autocast(self.device.type, torch.bfloat16, enabled=args.precision == "bf16"):
            x0 = self.sample(watched, start, self.path, steps=args.steps, **options)
        return to_uint8(self.vae.decode(x0) if self.vae else x0), labels

    def bar(self, total):
        """Progress in images, counted by the network's evaluations."""
        return tqdm(total=total * self.evaluations, unit_scale=1 / self.evaluations, unit="image", disable=RANK != 0,
                    desc=f"rank 0 of {WORLD}" if WORLD > 1 else None, dynamic_ncols=True,
                    bar_format="{l_bar}{bar}| {n:.0f}/{total:.0f} [{elapsed}<{remaining}, {rate_fmt}]")


def write_grid(sampler, out, title):
    """A labelled picture; with guidance, the same seeds without it stand beside. A few images: rank 0 draws them alone."""
    if RANK:
        return
    args, panels = sampler.args, {}
    kinds = [("no guidance", False)] + ([(title, True)] if title else [])
    with sampler.bar(args.num * len(kinds)) as bar:
        for name, guidance in kinds:
            batches = [sampler(range(i, min(i + args.batch, args.num)), bar, guidance) for i in range(0, args.num, args.batch)]
            panels[name] = torch.cat([images for images, _ in batches]).cpu()
    labels = torch.cat([labels for _, labels in batches])
    names = sampler.settings["classes"]
    with replacing(out) as file:
        columns = 4 if args.num <= 16 else 8
        picture(panels, columns, captions=[names[label] for label in labels]).save(file, "png")


def write_npz(sampler, out, settings):
    """N images of all ranks, streamed: each batch goes to its place in OUT.partial/arr_0.npy, and its labels, written after
    it, mark it as done (−1 is: not yet). The two files then become the members of the .npz."""
    args, size = sampler.args, sampler.settings["image_size"]
    work = out.with_name(out.name + ".partial")
    parts = {"arr_0.npy": (np.uint8, (args.num, size, size, 3)), "arr_1.npy": (np.int64, (args.num,))}
    note = json.dumps(settings, indent=1)
    lock(work / ".lock", out)
    if RANK == 0:
        if not (work / "settings.json").exists():
            needed, free = 2 * args.num * (3 * size * size + 8), shutil.disk_usage(out.parent).free
            if needed > free:
                stop(f"{out} needs {needed / 1e9:.1f} GB while it is written, {free / 1e9:.1f} GB are free; give another --out")
            for name, (dtype, shape) in parts.items():
                allocate(work / name, dtype, shape)
            np.lib.format.open_memmap(work / "arr_1.npy", "r+")[:] = -1
            with replacing(work / "settings.json") as file:
                file.write(note.encode())
        elif (work / "settings.json").read_text() != note:
            stop(f"{work} holds samples of other settings; remove it, or give another --out")
    todo = agree(np.load(work / "arr_1.npy") < 0 if RANK == 0 else None)                # all wait for the files
    batches = np.split(np.arange(args.num), range(args.batch, args.num, args.batch))
    mine = [batch for batch in batches if todo[batch].any()][RANK::WORLD]                # whole ones: the same samples beside each other, to the bit

    images_at, labels_at = (np.lib.format.open_memmap(work / name, "r").offset for name in parts)
    with sampler.bar(sum(map(len, mine))) as bar, open(work / "arr_0.npy", "r+b") as images_file, open(work / "arr_1.npy", "r+b") as labels_file:
        def write(batch, images, labels):
            for file, at, rows in ((images_file, images_at, images.permute(0, 2, 3, 1).contiguous().cpu()), (labels_file, labels_at, labels)):
                for index, row in zip(batch, rows.numpy()):
                    write_at(file, row, at + int(index) * row.nbytes)

        drawn = None
        for batch in mine:
            done, drawn = drawn, (batch, *sampler(batch, bar))
            if done:                                              # fetched and written while a GPU works at the next
                write(*done)
        if drawn:
            write(*drawn)
    if WORLD > 1:
        dist.barrier()
    if RANK == 0:
        with replacing(out) as file, zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
            for name in parts:
                with archive.open(zipfile.ZipInfo(name), "w", force_zip64=True) as member, open(work / name, "rb") as source:
                    shutil.copyfileobj(source, member, 1 << 20)
        shutil.rmtree(work)


def open_checkpoint(name, model=None):
    """The checkpoint that --ckpt names (None: the newest), its model and its settings."""
    ckpt = name or agree(newest_checkpoint() if RANK == 0 else None)
    if ckpt not in models.PUBLISHED:
        ckpt = Path(ckpt)
        if ckpt.is_dir():
            if not checkpoints(ckpt):
                stop(f"no checkpoints in {ckpt}/checkpoints; train some with: python train.py --out {ckpt}")
            ckpt = agree(checkpoints(ckpt)[-1])
    try:
        with rank_0_first():
            return ckpt, *models.from_checkpoint(ckpt, model)
    except ValueError as error:
        stop(error)


def run_folder(ckpt):
    """Where what is made of a checkpoint goes."""
    if ckpt in models.PUBLISHED:
        return Path("runs", ckpt.replace("/", "-"))
    return ckpt.parent.parent if ckpt.parent.name == "checkpoints" else ckpt.parent


def open_guide(args, s):
    """The model of --guide, which must be like that of the settings s; None where no guide acts."""
    if np.all(np.equal(args.guide_scale, 1)):
        if args.guide:
            stop("a guide is there to be guided by; give a --guide-scale, or leave --guide out")
        return None
    if not args.guide:
        stop("--guide-scale needs a guide; give its checkpoint with --guide")
    name, guide, own = open_checkpoint(args.guide, args.guide_model)
    for key, what in (("interpolant", "interpolant"), ("input_size", "input size"), ("in_channels", "channel count")):
        if own[key] != s[key]:
            stop(f"the guide {name} has the {what} {own[key]}, the model has {s[key]}; give a guide like the model")
    if args.guide_unconditional and not own["class_drop"]:
        stop(f"--guide-unconditional needs a guide trained with class dropout, {name} was not; leave it out")
    if not args.guide_unconditional and own["num_classes"] != s["num_classes"]:
        stop(f"the guide {name} knows {own['num_classes']} classes, the model {s['num_classes']}; give --guide-unconditional")
    return guide


def open_vae(args, s):
    """The VAE of a model in latents, from --vae, the file it was trained with, or the published weights; None for pixels."""
    if s["image_size"] == s["input_size"]:
        if args.vae:
            stop("the model draws pixels, and needs no VAE; leave --vae out")
        return None
    file = args.vae or s.get("vae")
    try:
        if file and not args.vae and not Path(file).exists():
            raise ValueError(f"the VAE that the model was trained with, {file}, is not there; give --vae FILE")
        with rank_0_first():
            return models.load_vae(file)
    except ValueError as error:
        stop(error)


def open_estimator(name, ckpt, s, judge=False):
    """The noise estimator in a file, if it is one for the model of `ckpt`, with the settings s; and its own settings.

    One that only guides may have learned from other data; a judge may not.
    """
    pixels = s["image_size"] == s["input_size"]
    of = f"--data {s['data']} --image-size {s['image_size']}" if pixels else f"--latents {s.get('latents', 'DIR')}"
    command = (f"train one for it with: python estimator.py train {of} --interpolant {s['interpolant']} "
               f"--out {name if not Path(name).exists() else 'FILE'}")
    try:
        estimator, own = models.load_estimator(name, command)
    except ValueError as error:
        stop(error)
    fixed = [("interpolant", "interpolant"), ("input_size", "image size"), ("in_channels", "channel count")]
    for key, what in fixed + [("data", "data")] * judge:
        if own.get(key) != s[key]:
            stop(f"{name} is an estimator for the {what} {own.get(key)}, {ckpt} has {s[key]}; {command}")
    return estimator, own


def settle(args, ckpt, s):
    """Fill in what the options leave to the checkpoint `ckpt`, with the settings s; stop where it cannot do what they ask."""
    shapes = is_drawn(s["data"])
    args.sampler = args.sampler or ("ddpm" if s["interpolant"] == "vp" else "sde")
    args.steps = args.steps or (50 if args.sampler == "ode" else 100 if shapes else 250)
    args.nag_interval = args.nag_interval or ((0.1, 0.6) if shapes else (0.0, 1.0))
    args.cfg_interval, args.guide_interval = args.cfg_interval or (0.0, 1.0), args.guide_interval or (0.0, 1.0)
    for name, (lo, hi) in (("--nag-interval", args.nag_interval), ("--cfg-interval", args.cfg_interval), ("--guide-interval", args.guide_interval)):
        if lo > hi:
            stop(f"{name} {lo:g} {hi:g} is empty; give the lower level first")
    if args.sampler == "ddpm" and s["interpolant"] != "vp":
        stop(f"--sampler ddpm needs a model on vp, {ckpt} is on {s['interpolant']}; use sde or ode")
    if args.sampler == "ddpm" and not 2 <= args.steps <= 1000:
        stop(f"--sampler ddpm takes --steps 2 to 1000, not {args.steps}")
    if args.w_nag and not s["noise_drop"]:
        stop(f"--w-nag needs a model trained with noise dropout, {ckpt} was not; train it on with some: "
             f"python train.py --init {ckpt}{f' --model {args.model}' if args.model else ''} --data {s['data'] if shapes else 'DIR'} --noise-drop 0.1 --out DIR")
    if args.estimator and args.w_nag_classifier is None:
        stop("an estimator is there to guide by, with --w-nag-classifier W; give a weight, or leave the estimator out")
    args.w_nag_classifier = args.w_nag_classifier or 0.0
    if args.w_nag_classifier and not args.estimator:
        stop("--w-nag-classifier needs a noise estimator, --estimator FILE; train one with: python estimator.py train")
    if args.cfg_scale != 1 and not s["class_drop"]:
        stop(f"--cfg-scale needs a model trained with class dropout, {ckpt} was not: python train.py --class-drop 0.1 --out DIR")
    if args.cfg_channels and args.cfg_channels > s["in_channels"]:
        stop(f"--cfg-channels {args.cfg_channels} is more than the model's {s['in_channels']}")
    return args


def benchmark(args, device):
    """Whole runs of the sampler on random weights, of the shape of latents (Ti: of shapes), for each kind of guidance; one line of JSON."""
    model, s = synthetic(args.model or "DiT-XL/2")
    s |= {"in_channels": model.in_channels, "input_size": model.input_size, "num_classes": 1000, "data": "noise"}
    args.steps = args.steps or 10
    settle(args, s["model"], s)
    args.precision = args.precision or agree(fast_precision(device))
    everywhere, half = (0.0, 1.0), (0.0, 0.5)
    rounds = 5
    kinds = {"no guidance": (0.0, 1.0, everywhere), "NAG": (3.0, 1.0, everywhere), "CFG": (0.0, 1.5, everywhere),
             "NAG + CFG": (2.0, 1.5, everywhere), "NAG on half of the levels": (3.0, 1.0, half)}
    sampler = Sampler(model.to(device).eval().requires_grad_(False), s, args, [0], device)
    dtype, took = torch.bfloat16 if args.precision == "bf16" else torch.float32, {kind: [] for kind in kinds}
    asked = {}                                                    # branches that a whole run of the `kind` below asks for
    def counted(x, *rest, **options):
        asked[kind] += len(x) / args.batch
        return network(x, *rest, **options)
    network, sampler.model = sampler.model, counted
    rates, steps, rows = [], args.steps, {}
    for repeat in range(1 + rounds):                              # the first warms up; then the kinds take turns
        rates.append(matmul_rate(device, dtype, 0.5))
        args.steps = 2 if repeat == 0 else steps
        for kind, terms in kinds.items():
            args.w_nag, args.cfg_scale, args.nag_interval = terms
            asked[kind] = 0
            synchronize(device)
            start = time.perf_counter()
            sampler(range(args.batch), tqdm(disable=True))
            synchronize(device)
            if repeat:
                took[kind].append(time.perf_counter() - start)
    rate, middle = np.median(rates), {kind: np.median(times) for kind, times in took.items()}
    for kind in kinds:
        work = asked[kind] * model.flops()
        per_s = args.batch / middle[kind]
        rows[kind] = {"images_per_s": round(WORLD * per_s, 3), "flops_per_image": work, "flops": round(WORLD * per_s * work), "mfu": round(per_s * work / rate, 4),
                      "times_unguided": round(np.median(np.divide(took[kind], took["no guidance"])), 3)}
    if RANK == 0:
        print(json.dumps({"model": s["model"], "batch": args.batch, "precision": args.precision, "compile": args.compile, "device": device_name(device),
                          "sampler": args.sampler, "steps": steps, **rows["no guidance"], "matmul_flops": round(WORLD * rate),
                          "peak_memory_gb": peak_memory(device), "guidance": rows}))


def main():
    args, device = arguments(), join_ranks()
    args.compile = compiles(device) if args.compile is None else args.compile
    if args.benchmark:
        return benchmark(args, device)
    ckpt, model, s = open_checkpoint(args.ckpt, args.model)
    settle(args, ckpt, s)
    guide, vae = open_guide(args, s), open_vae(args, s)
    guide, vae = guide and guide.to(device), vae and vae.to(device)
    estimator = open_estimator(args.estimator, ckpt, s)[0].to(device) if args.w_nag_classifier else None
    labels, title = class_numbers(args.classes, s["classes"]), guidance_name(args)

    kind = ".png" if args.num <= GRID else ".npz"
    chosen = ["of", *(s["classes"][label] for label in labels)] if args.classes else []
    if len(chosen) > 5:                                           # file names have an end
        chosen = [f"of-{len(labels)}-classes-{zlib.crc32(str(labels).encode()):08x}"]
    by = [Path(args.estimator).stem] if args.w_nag_classifier else []
    by += [str(args.guide).replace("/", "-")] if guide else []
    by += ["balanced"] if args.balanced else []
    chosen = [part.replace("/", "-") for part in chosen]          # names in a checkpoint may be anything, and must not lead elsewhere
    name = "-".join([Path(ckpt).stem, args.sampler, str(args.steps), *title.replace(",", "").split(), *by, *chosen, f"seed-{args.seed}", f"n-{args.num}"])
    out = Path(args.out) if args.out else run_folder(ckpt) / "samples" / (name + kind)
    if out.suffix not in (".png", ".npz"):
        stop(f"--out {out} must end in .png or .npz")

    begun = out.with_name(out.name + ".partial") / "settings.json"
    args.precision = args.precision or agree(json.loads(begun.read_text())["precision"] if begun.exists() else fast_precision(device))
    sampler = Sampler(model.to(device), s, args, labels, device, estimator, guide, vae)
    if RANK == 0:
        print(f"{ckpt}: {args.num} images in {args.steps} steps of {args.sampler}, {title or 'no guidance'}, {args.precision}")
    if out.suffix == ".png":
        write_grid(sampler, out, title)
    else:
        stamp = lambda file: [str(file), Path(file).stat().st_mtime_ns if Path(file).exists() else None] if file else None
        write_npz(sampler, out, {**vars(args), "ckpt": stamp(ckpt), "estimator": stamp(args.w_nag_classifier and args.estimator),
                                 "guide": stamp(args.guide), "vae": stamp(vae and (args.vae or s.get("vae"))),
                                 "batch": None, "out": None, "compile": None, "benchmark": None, "labels": labels})
    if RANK == 0:
        print(out)


if __name__ == "__main__":
    one_line_errors(main)
