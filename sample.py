"""Draw images from a checkpoint, with noise awareness guidance (NAG) and classifier-free guidance.

    python sample.py --w-nag 3                         # newest checkpoint: a grid, with and without
    python sample.py --ckpt runs/shapes-SiT-Ti-2 --w-nag 2 --cfg-scale 1.5 --nag-interval 0 0.6
    python sample.py --ckpt DiT-XL/2 --cfg-scale 4     # published weights, or a file of them
    torchrun --nproc-per-node 8 sample.py --num-samples 50000 --w-nag 3 --out samples.npz

Sample i takes its class, its start and its noise from generators of (seed, i): the batch size, the
number of ranks and a restart change nothing but rounding. Up to 64 images become a labelled PNG;
more become an .npz with arr_0 (N, H, W, 3) uint8 and arr_1 (N,) labels, as ADM's evaluator reads
it. Its batches are kept in OUT.partial, where the same command finds what was finished.
"""
import argparse
import json
import os
import shutil
import zipfile
from pathlib import Path

import train                      # before torch is loaded: it sets how its threads wait

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from torch import nn

import diffusion
import models

GRID = 64                                           # up to so many images become a picture
SAMPLERS = {"ddpm": diffusion.sample_ddpm, "sde": diffusion.sample_sde, "ode": diffusion.sample_ode}


def sampling_arguments(add, several_weights=False):
    """The options that say what is sampled; estimator.py takes several weights of NAG."""
    level = dict(type=train.number(float, 0, 1), nargs=2, metavar=("LO", "HI"))
    weight, path = train.number(float), train.place
    add("--ckpt", type=path, metavar="PATH", help="checkpoint, folder of a run, or the published "
        f"{', '.join(models.PUBLISHED)} (default: the newest below runs)")
    add("--model", choices=models.MODELS, metavar="NAME",
        help="for a checkpoint of DiT's or SiT's own code that does not say what it holds")
    weights = dict(nargs="+", default=[0.0]) if several_weights else dict(default=0.0)
    add("--w-nag", type=weight, metavar="W", **weights, help="weight of NAG (default: 0, neutral)")
    add("--nag-interval", **level, help="levels t at which NAG acts (default: 0.1 0.6 on shapes, "
        "else 0 1)")
    add("--cfg-scale", type=weight, default=1.0, metavar="S",
        help="scale of CFG (default: 1, neutral)")
    add("--cfg-interval", default=(0.0, 1.0), **level,
        help="levels t at which CFG and the guide act (default: 0 1)")
    add("--cfg-channels", type=train.number(int, 1), metavar="N",
        help="CFG on the first N channels only; 3 in the published FIDs (default: all)")
    add("--w-nag-classifier", type=weight, default=0.0, metavar="W",
        help="weight of NAG by a noise estimator in place of the null branch (default: 0)")
    add("--estimator", type=path, metavar="FILE",
        help="the noise estimator of --w-nag-classifier, from: python estimator.py train")
    add("--guide", type=path, metavar="PATH", help="checkpoint of another model to be guided by: "
        "a weaker one, or the one that this was tuned from")
    add("--guide-scale", type=weight, default=1.0, metavar="S",
        help="scale of the guide (default: 1, neutral)")
    add("--guide-unconditional", action="store_true",
        help="ask the guide without class (domain guidance)")
    add("--sampler", choices=SAMPLERS, help="default: ddpm on VP, sde on linear")
    add("--steps", type=train.number(int, 1), metavar="N",
        help="default: 100 on shapes, else 250; ode 50")
    add("--balanced", action="store_true", help="take the classes in turn (default: at random)")
    add("--seed", type=train.number(int, 0, 2**63 - 1), default=0, help="default: 0")
    add("--vae", type=path, metavar="FILE",
        help="weights of the VAE (default: those the model was trained with, or downloaded)")
    add("--precision", choices=("fp32", "bf16"),
        help="of the matrix products (default: bf16 where the processor has units for it)")
    add("--compile", action=argparse.BooleanOptionalAction, help="default: on a GPU")


def arguments():
    parser = train.Arguments(__doc__)
    add, positive = parser.add_argument, train.number(int, 1)
    sampling_arguments(add)
    add("--num", "--num-samples", type=positive, default=32, metavar="N",
        help="number of images (default: 32); torchrun needs the longer name")
    add("--batch", type=positive, default=64, metavar="N",
        help="images at a time on each rank (default: 64)")
    add("--classes", nargs="+", metavar="C", help="classes by name or number (default: all)")
    add("--benchmark", action="store_true", help="measure the speed of --model (default: DiT-XL/2) "
        "on latents, guided and not; one line of JSON")
    folder = lambda text: train.place(text) + os.sep * text.endswith(os.sep)
    add("--out", type=folder, metavar="FILE", help=".png, .npz, or a folder/ for single images "
        "(default: in the run's folder, named by the settings)")
    return parser


# --------------------------------------------------------------------------------------------------
# What is sampled, and whether it can be


def open_checkpoint(name, model=None):
    """The checkpoint that --ckpt names (None: the newest), its model and its settings."""
    if name is None:
        found = [path for path in Path("runs").glob("**/checkpoints/*.pt") if path.stem.isdecimal()]
        if not found:
            raise ValueError("no checkpoint below runs; train one with: python train.py, "
                             "or name one with --ckpt")
        name = train.broadcast(str(max(found, key=os.path.getmtime)))
    name = train.newest_checkpoint(name)
    with train.rank_0_first():
        return name, *models.from_checkpoint(name, model)


def settle(args, ckpt, s):
    """Fill in what the options leave to the checkpoint, and refuse what it cannot do (ValueError).

    s: the settings of the checkpoint.
    """
    shapes = train.is_drawn(s["data"])
    args.sampler = args.sampler or ("ddpm" if s["interpolant"] == "vp" else "sde")
    args.steps = args.steps or (50 if args.sampler == "ode" else 100 if shapes else 250)
    if args.nag_interval and not (np.any(args.w_nag) or args.w_nag_classifier):
        raise ValueError("--nag-interval has no effect without NAG; give a weight, --w-nag W")
    if args.cfg_channels and args.cfg_scale == 1:
        raise ValueError("--cfg-channels has no effect without CFG; give a scale, --cfg-scale S")
    args.nag_interval = args.nag_interval or ((0.1, 0.6) if shapes else (0.0, 1.0))
    for name in ("nag_interval", "cfg_interval"):
        lo, hi = getattr(args, name)
        if lo > hi:
            raise ValueError(f"--{name.replace('_', '-')} {lo:g} {hi:g} is empty; "
                             "give the lower level first")
    if args.sampler == "ddpm" and s["interpolant"] != "vp":
        raise ValueError(f"--sampler ddpm needs a model on vp, {ckpt} is on {s['interpolant']}; "
                         "use sde or ode")
    if args.sampler == "ddpm" and not 2 <= args.steps <= 1000:
        raise ValueError(f"--sampler ddpm takes --steps 2 to 1000, not {args.steps}")
    if np.any(args.w_nag) and not s["noise_drop"]:
        model = f" --model {args.model}" if args.model else ""
        raise ValueError(f"--w-nag needs a model trained with noise dropout, {ckpt} was not; tune "
                         f"it: python train.py --init {ckpt}{model} --noise-drop 0.1 "
                         f"--data {s['data'] if shapes else 'DIR'} --out DIR")
    if args.cfg_scale != 1 and not s["class_drop"]:
        raise ValueError(f"--cfg-scale needs a model trained with class dropout, {ckpt} was not; "
                         "train one with: python train.py --class-drop 0.1 --out DIR")
    if args.cfg_channels and args.cfg_channels > s["in_channels"]:
        raise ValueError(f"--cfg-channels {args.cfg_channels} is more than the "
                         f"{s['in_channels']} channels of the model")
    for value, neutral, option, needs, file in (
            (args.guide_scale, 1, "--guide-scale", "--guide", args.guide),
            (args.w_nag_classifier, 0, "--w-nag-classifier", "--estimator", args.estimator)):
        if (value == neutral) == bool(file):
            raise ValueError(f"{option} and {needs} FILE go together; give both, or neither")


def check_fit(name, own, s, keys, advice):
    """Raises ValueError where another network's settings are not like the model's."""
    for key in keys:
        if own.get(key) != s[key]:
            raise ValueError(f"{name} has {key.replace('_', ' ')} {own.get(key)}, "
                             f"the model has {s[key]}; {advice}")


def open_estimator(file, s, judge=False):
    """A noise estimator, and its settings; one that judges must have learned from the same data."""
    pixels = s["image_size"] == s["input_size"]
    data = f"--data {s['data']} --image-size {s['image_size']}" if pixels else "--latents DIR"
    advice = f"train one with: python estimator.py train {data} --interpolant {s['interpolant']}"
    estimator, own = models.load_estimator(file, advice)
    keys = ["interpolant", "input_size", "in_channels"] + ["data"] * judge
    check_fit(file, own, s, keys, advice)
    return estimator, own


def open_guides(args, s, device, decode=True):
    """The other networks that sampling needs, {"guide", "estimator", "vae"}; None for no need."""
    guide = estimator = vae = None
    if args.guide:
        name, guide, own = open_checkpoint(args.guide)
        advice = "give a guide like the model"
        check_fit(name, own, s, ("interpolant", "input_size", "in_channels"), advice)
        if args.guide_unconditional and not own["class_drop"]:
            raise ValueError(f"--guide-unconditional needs a guide trained with class dropout, "
                             f"{name} was not; leave it out")
        if not args.guide_unconditional:
            check_fit(name, own, s, ["num_classes"], "give --guide-unconditional")
    if args.estimator:
        estimator, _ = open_estimator(args.estimator, s)
    if s["image_size"] != s["input_size"]:
        if decode:
            with train.rank_0_first():
                vae = models.load_vae(args.vae or s.get("vae"))
    elif args.vae:
        raise ValueError("the model draws pixels, and needs no VAE; leave --vae out")
    networks = {"guide": guide, "estimator": estimator, "vae": vae}
    return {name: network and network.to(device) for name, network in networks.items()}


def class_numbers(wanted, names):
    """The labels that --classes asks for, by name or by number."""
    labels = []
    for name in wanted or names:
        if name not in names and not (name.isdecimal() and int(name) < len(names)):
            raise ValueError(f"no class {name!r}; the model knows {', '.join(names[:12])}"
                             f"{', …' if len(names) > 12 else ''} (0 to {len(names) - 1})")
        labels.append(names.index(name) if name in names else int(name))
    return labels


def guidance_name(args):
    """The guidance in a few words, for titles and file names; empty without any."""
    parts = []
    on_nag, on_cfg = (f" on {lo:g}-{hi:g}" for lo, hi in (args.nag_interval, args.cfg_interval))
    if args.w_nag:
        parts.append(f"NAG {args.w_nag:g}{on_nag}")
    if args.w_nag_classifier:
        parts.append(f"classifier NAG {args.w_nag_classifier:g}{on_nag}")
    if args.cfg_scale != 1:
        channels = f" of {args.cfg_channels} channels" if args.cfg_channels else ""
        parts.append(f"CFG {args.cfg_scale:g}{on_cfg}{channels}")
    if args.guide_scale != 1:
        alone = " without class" if args.guide_unconditional else ""
        parts.append(f"guide {args.guide_scale:g}{alone}{on_cfg}")
    return ", ".join(parts)


# --------------------------------------------------------------------------------------------------
# Sampling


class FusedMlp(nn.Module):
    """A block's MLP on a CPU in bf16: oneDNN applies GELU while the product is in the cache.

    That takes 10 % off the time of a network. The operator is private, so to_bf16 tries it first.
    """

    def __init__(self, mlp):
        super().__init__()
        self.fc1, self.fc2 = mlp.fc1, mlp.fc2

    def forward(self, x):
        weight, bias = self.fc1.weight, self.fc1.bias
        x = torch.ops.mkldnn._linear_pointwise(x.to(weight.dtype), weight, bias, "gelu", [], "tanh")
        return self.fc2(x)


def to_bf16(model, fuse):
    """Keep the weights of matrix products in bf16, to which autocast rounds them at every call."""
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            module.to(torch.bfloat16)
    for block in model.blocks if fuse else ():
        try:
            fused = FusedMlp(block.mlp)
            fused(torch.zeros(1, fused.fc1.in_features))
            block.mlp = fused
        except (RuntimeError, AttributeError):      # not on this processor, or not in this PyTorch
            break
    return model


class Sampler:
    """Samples of a checkpoint, by number: uint8 images (n, 3, H, W) and labels (n,).

    labels: the classes to draw from; estimator, guide, vae: as open_guides gives them.
    """

    def __init__(self, model, s, args, labels, device, guide=None, estimator=None, vae=None):
        self.s, self.args, self.labels, self.device, self.vae = s, args, labels, device, vae
        self.classifier = estimator and estimator.gradient
        self.guide_null = guide and guide.num_classes
        networks = [network for network in (model, guide) if network]
        if args.precision == "bf16":
            fuse = device.type == "cpu" and not args.compile
            networks = [to_bf16(network, fuse) for network in networks]
        if args.compile:
            networks = [torch.compile(network) for network in networks]
        self.model, self.guide = networks[0], networks[1] if guide else None
        self.path, self.sample = train.PATHS[s["interpolant"]](), SAMPLERS[args.sampler]
        ode = args.sampler == "ode"                 # Heun's rule; on VP, a last jump
        self.evaluations = 2 * args.steps + (self.path.t_min > 0) if ode else args.steps

    def __call__(self, indices, bar=None, guidance=True, watch=None):
        """Samples with these numbers; watch(x, t) sees each state of which the network is asked."""
        args, s = self.args, self.s
        randn = train.sample_noise(args.seed, indices)
        labels = train.sample_classes(args.seed, indices, self.labels)
        if args.balanced:
            labels = torch.tensor([self.labels[i % len(self.labels)] for i in indices])
        y = labels.to(self.device)
        terms = dict(w_nag=args.w_nag, nag_interval=args.nag_interval, cfg_scale=args.cfg_scale,
                     cfg_interval=args.cfg_interval, cfg_channels=args.cfg_channels,
                     w_classifier=args.w_nag_classifier, classifier=self.classifier,
                     guide=self.guide, guide_scale=args.guide_scale)
        if args.guide_unconditional and self.guide is not None:
            terms["guide_y"] = torch.full_like(y, self.guide_null)
        denoise = diffusion.guided(self.model, self.path, y, null_class=s["num_classes"],
                                   **terms if guidance else {})

        def watched(x, t):
            if bar is not None:
                bar.update(len(x))
            if watch:
                watch(x, t)
            return denoise(x, t)

        shape = len(indices), s["in_channels"], s["input_size"], s["input_size"]
        start = randn(torch.empty(shape, device=self.device))
        noise = {} if args.sampler == "ode" else {"randn": randn}
        with torch.autocast(self.device.type, torch.bfloat16, enabled=args.precision == "bf16"):
            x0 = self.sample(watched, start, self.path, steps=args.steps, **noise)
        if not x0.isfinite().all():
            raise train.DataError("the samples are not finite; lower the weights of guidance")
        return train.to_uint8(self.vae.decode(x0) if self.vae else x0), labels

    def bar(self, total):
        """Progress in images, counted by the network's evaluations."""
        return train.progress(total=total * self.evaluations, unit_scale=1 / self.evaluations,
                              unit="image", bar_format="{l_bar}{bar}| {n:.0f}/{total:.0f} "
                              "[{elapsed}<{remaining}, {rate_fmt}]")


def write_grid(sampler, out, title):
    """A labelled picture; with guidance, the same seeds without it stand beside it."""
    args, panels = sampler.args, {}
    guidances = {"no guidance": False, title: True} if title else {"no guidance": False}
    with sampler.bar(args.num * len(guidances)) as bar:
        for name, guidance in guidances.items():
            parts = [sampler(batch, bar, guidance) for batch in in_batches(args)]
            panels[name] = torch.cat([images for images, _ in parts]).cpu()
    names = [sampler.s["classes"][label] for _, labels in parts for label in labels]
    train.save_png(train.picture(panels, 4 if args.num <= 16 else 8, names), out)


def claim(folder, settings):
    """Be the only writer of a folder, which holds samples of these settings; ValueError if not."""
    train.lock(folder)
    if train.RANK == 0:
        note, begun = json.dumps(settings, indent=1), folder / ".settings.json"
        if begun.exists() and begun.read_text() != note:
            raise ValueError(f"{folder} holds samples of other settings; remove it, "
                             "or give another --out")
        with train.replacing(begun) as file:
            file.write(note.encode())


def write_npz(sampler, out, settings):
    """N images of all ranks: each batch is a part in OUT.partial, and rank 0 joins the parts."""
    args, work = sampler.args, out.with_name(out.name + ".partial")
    claim(work, settings)
    batches = in_batches(args)
    files = [work / f"{k:05}.npz" for k in range(len(batches))]
    todo = train.broadcast([k for k, file in enumerate(files) if not file.exists()])
    mine = todo[train.RANK::train.WORLD]
    with sampler.bar(sum(len(batches[k]) for k in mine)) as bar:
        for k in mine:
            images, labels = sampler(batches[k], bar)
            images = images.permute(0, 2, 3, 1).contiguous().cpu()
            with train.replacing(files[k]) as file:
                np.savez(file, arr_0=images.numpy(), arr_1=labels.numpy())
    if train.WORLD > 1:
        dist.barrier()
    if train.RANK == 0:
        join(files, out, args.num)
        shutil.rmtree(work)


def in_batches(args):
    return [range(i, min(i + args.batch, args.num)) for i in range(0, args.num, args.batch)]


def write_folder(sampler, out, settings):
    """N images of all ranks as 000000.png, 000001.png, …; those that exist are finished."""
    claim(out, {**settings, "num": None, "batch": None})
    file = lambda i: out / f"{i:06}.png"
    todo = train.broadcast([batch for batch in in_batches(sampler.args)
                            if not all(file(i).exists() for i in batch)])
    mine = todo[train.RANK::train.WORLD]
    with sampler.bar(sum(map(len, mine))) as bar:
        for batch in mine:
            images, _ = sampler(batch, bar)
            for i, image in zip(batch, images.permute(0, 2, 3, 1).cpu().numpy()):
                train.save_png(Image.fromarray(image), file(i))
    if train.WORLD > 1:
        dist.barrier()


def join(files, out, num):
    """Stream the parts into one .npz, array after array."""
    with train.replacing(out) as file, zipfile.ZipFile(file, "w") as archive:
        for name in ("arr_0", "arr_1"):
            with archive.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True) as member:
                for part in files:
                    array = read_part(part, name)
                    if part == files[0]:
                        header = np.lib.format.header_data_from_array_1_0(array)
                        header["shape"] = (num, *array.shape[1:])
                        np.lib.format.write_array_header_1_0(member, header)
                    member.write(array.tobytes())


def read_part(file, name):
    try:
        with np.load(file) as arrays:
            return arrays[name]
    except Exception as error:  # numpy and zipfile raise many kinds for damaged files
        raise ValueError(f"{file} is damaged ({error}); remove it, and start the same command "
                         "again") from None


def speed_of(args, device):
    """--benchmark: whole runs of the sampler with random weights, for three kinds of guidance."""
    args.model, args.steps = args.model or "DiT-XL/2", args.steps or 10
    model = models.MODELS[args.model](input_size=32, in_channels=4, num_classes=1000)
    for parameter in model.parameters():
        if not parameter.any():                     # zeros take a GPU less power, and so less time
            nn.init.normal_(parameter, std=0.02)
    s = {"data": "noise", "interpolant": train.FAMILIES[args.model[:3]], "image_size": 32,
         "input_size": 32, "in_channels": 4, "num_classes": 1000, "noise_drop": 1, "class_drop": 1}
    settle(args, args.model, s)
    sampler = Sampler(model.to(device).eval().requires_grad_(False), s, args, [0], device)

    def call(w_nag, cfg_scale):
        args.w_nag, args.cfg_scale = w_nag, cfg_scale
        sampler(range(args.batch))

    once = sampler.evaluations * model.flops()
    print(json.dumps(train.benchmark({
        "no guidance": (lambda: call(0.0, 1.0), once),
        "NAG": (lambda: call(3.0, 1.0), 2 * once),
        "NAG + CFG": (lambda: call(2.0, 1.5), 3 * once)}, args, device, train.WORLD * args.batch)))


def main():
    args, device = arguments().parse_args(), train.join_ranks()
    args.precision = args.precision or train.broadcast(train.fast_precision(device))
    args.compile = device.type == "cuda" if args.compile is None else args.compile
    if args.benchmark:
        return speed_of(args, device)
    ckpt, model, s = open_checkpoint(args.ckpt, args.model)
    settle(args, ckpt, s)
    labels, title = class_numbers(args.classes, s["classes"]), guidance_name(args)
    args.guide = args.guide and train.newest_checkpoint(args.guide)
    files = [name for name in (ckpt, args.estimator, args.guide, args.vae or s.get("vae")) if name]
    written = [os.path.getmtime(name) if os.path.exists(name) else None for name in files]
    settings = {**vars(args), "out": None, "ckpt": ckpt, "labels": labels, "written": written}
    out = args.out and Path(args.out)
    if not out:
        words = [Path(ckpt).stem, args.sampler, str(args.steps), *title.replace(",", "").split(),
                 f"seed-{args.seed}", train.digest([json.dumps(settings)])[:6]]
        kind = ".png" if args.num <= GRID else ".npz"
        out = train.run_folder(ckpt) / "samples" / ("-".join(words) + kind)
    if out.suffix not in (".png", ".npz") and not out.is_dir() and not args.out.endswith(os.sep):
        raise ValueError(f"--out {out} must end in .png, in .npz, or in / for a folder")
    train.must_be_writable(out)
    if out.suffix == ".npz" and out.exists():
        return print(f"{out} is finished; remove it to draw it again")
    out.parent.mkdir(parents=True, exist_ok=True)
    sampler = Sampler(model.to(device), s, args, labels, device, **open_guides(args, s, device))
    print(f"{ckpt}: {args.num} images in {args.steps} steps of {args.sampler}, "
          f"{title or 'no guidance'}, {args.precision}")
    if out.suffix == ".npz":
        write_npz(sampler, out, settings)
    elif out.suffix != ".png":
        write_folder(sampler, out, settings)
    elif train.RANK == 0:                           # a few images: alone
        write_grid(sampler, out, title)
    print(out)


if __name__ == "__main__":
    train.one_line_errors(main)
