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

SHIPPED = Path(__file__).with_name("assets") / "shapes-SiT-Ti-2.pt"
GRID = 64                                           # up to so many images become a picture
SAMPLERS = {"ddpm": diffusion.sample_ddpm, "sde": diffusion.sample_sde, "ode": diffusion.sample_ode}


def sampling_arguments(add):
    """The options that say what is sampled, but for --w-nag: estimator.py takes several."""
    level = dict(type=train.number(float, 0, 1), nargs=2, metavar=("LO", "HI"))
    weight, positive, path = train.number(float), train.number(int, 1), train.place
    add("--ckpt", type=path, metavar="PATH", help="checkpoint, folder of a run, or the published "
        f"{', '.join(models.PUBLISHED)} (default: the newest below runs, or the one in assets)")
    add("--model", choices=models.MODELS, metavar="NAME", help="if the checkpoint does not say it")
    names = {"null": "null", "estimator": "estimator"}
    against = lambda text: names.get(text) or train.number(float, -1, 1)(text)
    add("--nag-against", type=against, default="null", metavar="B", help="what NAG guides away "
        "from: null, the level hidden (default); estimator, the level it reads; a number, t + B")
    add("--nag-interval", **level, help="levels of NAG (default: 0.1 1 on shapes, else 0 1)")
    add("--cfg-scale", type=weight, default=1.0, metavar="S", help="scale of CFG (default: 1)")
    add("--cfg-interval", default=(0, 1), **level, help="levels of CFG and guide (default: 0 1)")
    add("--cfg-channels", type=positive, metavar="N", help="CFG on the first N only (default: all)")
    add("--w-nag-classifier", type=weight, default=0.0, metavar="W", help="NAG by --estimator")
    add("--estimator", type=path, metavar="FILE", help="a result of python estimator.py train")
    add("--guide", type=path, metavar="PATH", help="a weaker model, or the one before tuning")
    add("--guide-scale", type=weight, default=1.0, metavar="S", help="default: 1, neutral")
    add("--guide-unconditional", action="store_true", help="ask it without class: domain guidance")
    add("--sampler", choices=SAMPLERS, help="default: ddpm on VP, sde on linear")
    add("--steps", type=positive, help="default: 50 on shapes and of ode, else 250")
    add("--balanced", action="store_true", help="take the classes in turn (default: at random)")
    add("--seed", type=train.number(int, 0, 2**63 - 1), default=0, help="default: 0")
    add("--vae", type=path, metavar="FILE", help="default: that of the training, or downloaded")
    add("--precision", choices=("fp32", "bf16"), help="default: bf16 where the processor has it")
    add("--compile", action=argparse.BooleanOptionalAction, help="default: on a GPU")


def arguments():
    parser = train.Arguments(__doc__)
    add, number = parser.add_argument, train.number
    add("--w-nag", type=number(float), default=0.0, metavar="W", help="weight of NAG (default: 0)")
    sampling_arguments(add)
    add("--num", "--num-samples", type=number(int, 1), default=32, help="default: 32 images")
    add("--batch", type=number(int, 1), default=64, help="images at a time on a rank (default: 64)")
    add("--classes", nargs="+", metavar="C", help="classes by name or number (default: all)")
    add("--benchmark", action="store_true", help="speed of --model (default: DiT-XL/2), as JSON")
    add("--out", metavar="FILE", help=".png, .npz, or folder/ (default: in the run's folder)")
    return parser


# --------------------------------------------------------------------------------------------------
# What is sampled, and whether it can be


def open_checkpoint(name, model=None):
    """The checkpoint that --ckpt names (None: the newest), its model and its settings."""
    if name is None:
        found = [path for path in Path("runs").glob("**/checkpoints/*.pt") if path.stem.isdecimal()]
        if not found:
            found = [SHIPPED]
            print(f"no checkpoint below runs, so {SHIPPED.name} is taken, which comes with this "
                  "repository; train your own with: python train.py")
        name = train.broadcast(str(max(found, key=os.path.getmtime)))
    name = train.newest_checkpoint(name)
    with train.rank_0_first():
        return name, *models.from_checkpoint(name, model)


def settle(args, ckpt, s, device):
    """Fill in what the options leave open; ValueError for what a model of settings s cannot do."""
    drawn, pixels = train.is_drawn(s["data"]), s["image_size"] == s["input_size"]
    args.sampler = args.sampler or ("ddpm" if s["interpolant"] == "vp" else "sde")
    args.steps = args.steps or (50 if drawn or args.sampler == "ode" else 250)
    args.precision = args.precision or train.broadcast(train.fast_precision(device))
    args.compile = device.type == "cuda" if args.compile is None else args.compile

    reads = args.w_nag_classifier != 0 or args.nag_against == "estimator"
    tune = f"--init {ckpt}{f' --model {args.model}' if args.model else ''} --noise-drop 0.1"
    mistakes = {
        f"--sampler ddpm needs a model on vp and 2 to 1000 --steps, not {s['interpolant']} and "
        f"{args.steps}; use sde or ode":
            args.sampler == "ddpm" and not (s["interpolant"] == "vp" and 2 <= args.steps <= 1000),
        "--nag-interval has no effect without NAG; give a weight, --w-nag W":
            args.nag_interval and not (np.any(args.w_nag) or args.w_nag_classifier),
        "--cfg-channels has no effect without CFG; give a scale, --cfg-scale S":
            args.cfg_channels and args.cfg_scale == 1,
        "--nag-interval and --cfg-interval take the lower level first":
            any(lo > hi for lo, hi in filter(None, (args.nag_interval, args.cfg_interval))),
        f"--w-nag needs a model trained with noise dropout, {ckpt} was not; tune it: "
        f"python train.py {tune} --data {s['data'] if drawn else 'DIR'} --out DIR":
            np.any(args.w_nag) and args.nag_against == "null" and not s["noise_drop"],
        f"--cfg-scale needs a model trained with class dropout, {ckpt} was not; train one with: "
        "python train.py --class-drop 0.1 --out DIR":
            args.cfg_scale != 1 and not s["class_drop"],
        f"--cfg-channels {args.cfg_channels} is more than the model's {s['in_channels']}":
            (args.cfg_channels or 0) > s["in_channels"],
        "--guide and --guide-scale go together; give both, or neither":
            bool(args.guide) != (args.guide_scale != 1),
        "--estimator goes with --w-nag-classifier, or --nag-against estimator; give both, or none":
            bool(args.estimator) != reads,
        "--nag-against has no effect without NAG; give a weight, --w-nag W":
            args.nag_against != "null" and not np.any(args.w_nag),
        "the model draws pixels, and needs no VAE; leave --vae out":
            args.vae and pixels}
    for message, made in mistakes.items():
        if made:
            raise ValueError(message)
    args.nag_interval = args.nag_interval or ((0.1, 1.0) if drawn else (0.0, 1.0))


def check_fit(name, own, s, also, advice):
    """Raises ValueError where another network's settings are not like the model's."""
    for key in ("interpolant", "input_size", "in_channels", *also):
        if own.get(key) != s[key]:
            raise ValueError(f"{name} has {key.replace('_', ' ')} {own.get(key)}, "
                             f"the model has {s[key]}; {advice}")


def open_estimator(file, s, judge=False):
    """A noise estimator, and its settings; one that judges must have learned from the same data."""
    pixels = s["image_size"] == s["input_size"]
    data = f"--data {s['data']} --image-size {s['image_size']}" if pixels else "--latents DIR"
    advice = f"train one with: python estimator.py train {data} --interpolant {s['interpolant']}"
    estimator, own = models.load_estimator(file, advice)
    check_fit(file, own, s, ["data"] if judge else [], advice)
    return estimator, own


def open_guides(args, s, device, decode=True):
    """The other networks that sampling needs, {"guide", "estimator", "vae"}; None for no need."""
    networks = {"guide": None, "estimator": None, "vae": None}
    if args.guide:
        name, networks["guide"], own = open_checkpoint(args.guide)
        if args.guide_unconditional and not own["class_drop"]:
            raise ValueError(f"{name} was trained without class dropout; "
                             "leave out --guide-unconditional")
        also = [] if args.guide_unconditional else ["num_classes"]
        check_fit(name, own, s, also, "give a guide like it; with --guide-unconditional its "
                  "classes may differ")
    if args.estimator:
        networks["estimator"], _ = open_estimator(args.estimator, s)
    if decode and s["image_size"] != s["input_size"]:
        with train.rank_0_first():
            networks["vae"] = models.load_vae(args.vae or s.get("vae"))
    return {name: network and network.to(device) for name, network in networks.items()}


def class_numbers(wanted, names):
    """The labels that --classes asks for, by name or by number."""
    labels = {str(i): i for i in range(len(names))} | {name: i for i, name in enumerate(names)}
    for name in wanted or ():
        if name not in labels:
            raise ValueError(f"no class {name!r}; give a number below {len(names)}, or a name "
                             f"such as {', '.join(names[:12])}")
    return [labels[name] for name in wanted or names]


def guidance_name(args):
    """The guidance in a few words, for titles and file names; empty without any."""
    nag, cfg = (f"on {lo:g}-{hi:g}" for lo, hi in (args.nag_interval, args.cfg_interval))
    channels = f" of {args.cfg_channels} channels" if args.cfg_channels else ""
    alone = " without class" if args.guide_unconditional else ""
    against = "" if args.nag_against == "null" else f" against {args.nag_against}"
    terms = [
        (args.w_nag, 0, f"NAG {args.w_nag:g}{against} {nag}"),
        (args.w_nag_classifier, 0, f"classifier NAG {args.w_nag_classifier:g} {nag}"),
        (args.cfg_scale, 1, f"CFG {args.cfg_scale:g} {cfg}{channels}"),
        (args.guide_scale, 1, f"guide {args.guide_scale:g}{alone} {cfg}")]
    return ", ".join(text for weight, neutral, text in terms if weight != neutral)


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


class Sampler:
    """Samples of a checkpoint, by number: uint8 images (n, 3, H, W) and labels (n,).

    labels: the classes to draw from; estimator, guide, vae: as open_guides gives them.
    """

    def __init__(self, model, s, args, labels, device, guide=None, estimator=None, vae=None):
        self.model, self.guide, self.vae, self.labels = model, guide, vae, labels
        self.s, self.args, self.device = s, args, device
        self.classifier, self.nag_level = estimator and estimator.gradient, None
        if args.nag_against == "estimator":
            self.nag_level = lambda x, t: estimator(x).mean()
        elif args.nag_against != "null":
            self.nag_level = lambda x, t: torch.full(x.shape[:1], t + args.nag_against)
        self.path, self.sample = train.PATHS[s["interpolant"]](), SAMPLERS[args.sampler]
        for network in (model, guide) if guide else (model,):
            if args.precision == "bf16":
                to_bf16(network, fuse=device.type == "cpu" and not args.compile)
            if args.compile:
                network.compile()
        ode = args.sampler == "ode"                 # Heun's rule; on VP, a last jump
        self.evaluations = 2 * args.steps + (self.path.t_min > 0) if ode else args.steps

    def classes(self, indices):
        """The labels of the samples with these numbers, (n,) int64."""
        if self.args.balanced:
            return torch.tensor([self.labels[i % len(self.labels)] for i in indices])
        draws = [train.generator(self.args.seed, "class", int(i)).random() for i in indices]
        return torch.tensor([self.labels[int(u * len(self.labels))] for u in draws])

    def __call__(self, indices, bar=None, guidance=True, watch=None):
        """Samples with these numbers; watch(x, t) sees each state of which the network is asked."""
        args, s = self.args, self.s
        labels, randn = self.classes(indices), train.sample_noise(args.seed, indices)
        y, terms = labels.to(self.device), {}
        if guidance:
            terms = dict(w_nag=args.w_nag, nag_interval=args.nag_interval, cfg_scale=args.cfg_scale,
                         cfg_interval=args.cfg_interval, cfg_channels=args.cfg_channels,
                         nag_level=self.nag_level, w_classifier=args.w_nag_classifier,
                         classifier=self.classifier,
                         guide=self.guide, guide_scale=args.guide_scale)
        if self.guide and args.guide_unconditional:
            terms["guide_y"] = torch.full_like(y, self.guide.num_classes)
        denoise = diffusion.guided(self.model, self.path, y, null_class=s["num_classes"], **terms)

        def watched(x, t):
            if bar is not None:
                bar.update(len(x))
            if watch:
                watch(x, t)
            return denoise(x, t)

        start = randn(torch.empty(len(y), s["in_channels"], s["input_size"], s["input_size"],
                                  device=self.device))
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


def write_grid(sampler, batches, out, title):
    """A labelled picture; with guidance, the same seeds without it stand beside it."""
    args, panels = sampler.args, {}
    guidances = {"no guidance": False, title: True} if title else {"no guidance": False}
    with sampler.bar(args.num * len(guidances)) as bar:
        for name, guidance in guidances.items():
            images = [sampler(batch, bar, guidance)[0] for batch in batches]
            panels[name] = torch.cat(images).cpu()
    names = [sampler.s["classes"][label] for label in sampler.classes(range(args.num))]
    train.save_png(train.picture(panels, 4 if args.num <= 16 else 8, names), out)


def write_many(sampler, batches, out, settings):
    """A folder of single images, or an .npz, by all ranks; files that exist are finished.

    What becomes an .npz waits in OUT.partial, a file for each batch, until rank 0 joins them.
    """
    args, single = sampler.args, out.suffix != ".npz"
    folder = out if single else out.with_name(f"{out.name}.partial")
    train.lock(folder)
    if train.RANK == 0:                             # single images can be added, in other batches
        settings = {**settings, "num": None, "batch": None} if single else settings
        note, begun = json.dumps(settings), folder / ".settings.json"
        drawn = any(folder.glob("[0-9]*"))
        if drawn and begun.exists() and begun.read_text() != note:
            raise ValueError(f"{folder} holds samples of other settings; remove it, "
                             "or give another --out")
        with train.replacing(begun) as file:
            file.write(note.encode())
    files = {}
    for batch in batches:
        numbers, suffix = (batch, "png") if single else (batch[:1], "npy")
        files[batch] = [folder / f"{i:06}.{suffix}" for i in numbers]
    todo = [batch for batch in files if not all(file.exists() for file in files[batch])]
    mine = train.broadcast(todo)[train.RANK::train.WORLD]
    with sampler.bar(sum(map(len, mine))) as bar:
        for batch in mine:
            images, _ = sampler(batch, bar)
            images = images.permute(0, 2, 3, 1).cpu().numpy()
            if single:
                for file, image in zip(files[batch], images):
                    train.save_png(Image.fromarray(image), file)
            else:
                with train.replacing(*files[batch]) as file:
                    np.save(file, images)
    if train.WORLD > 1:
        dist.barrier()
    if train.RANK == 0 and not single:
        join(sum(files.values(), []), sampler.classes(range(args.num)), out)
        shutil.rmtree(folder)


def join(parts, labels, out):
    """Stream the images of the parts into one .npz, with the labels of all."""
    with train.replacing(out) as file, zipfile.ZipFile(file, "w") as archive:
        with archive.open("arr_0.npy", "w", force_zip64=True) as member:
            for part in parts:
                try:
                    images = np.load(part)
                except Exception as error:  # numpy raises many kinds for damaged files
                    raise ValueError(f"{part} is damaged ({error}); remove it, and start the same "
                                     "command again") from None
                if part == parts[0]:
                    shape = len(labels), *images.shape[1:]
                    header = {"descr": "|u1", "fortran_order": False, "shape": shape}
                    np.lib.format.write_array_header_1_0(member, header)
                member.write(images.tobytes())
        with archive.open("arr_1.npy", "w") as member:
            np.save(member, labels.numpy())


def speed_of(args, device):
    """--benchmark: whole runs of the sampler with random weights, for three kinds of guidance."""
    args.model, args.steps = args.model or "DiT-XL/2", args.steps or 10
    model = models.MODELS[args.model](input_size=32, in_channels=4, num_classes=1000)
    for parameter in model.parameters():
        if not parameter.any():                     # zeros take a GPU less power, and so less time
            nn.init.normal_(parameter, std=0.02)
    s = {"data": "noise", "interpolant": train.FAMILIES[args.model[:3]], "image_size": 32,
         "input_size": 32, "in_channels": 4, "num_classes": 1000, "noise_drop": 1, "class_drop": 1}
    settle(args, args.model, s, device)
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
    if args.benchmark:
        return speed_of(args, device)
    ckpt, model, s = open_checkpoint(args.ckpt, args.model)
    settle(args, ckpt, s, device)
    labels, title = class_numbers(args.classes, s["classes"]), guidance_name(args)
    args.guide = args.guide and train.newest_checkpoint(args.guide)
    files = ckpt, args.estimator, args.guide, args.vae or s.get("vae")
    written = {name: os.path.getmtime(name) for name in files if name and os.path.exists(name)}
    settings = {**vars(args), "out": None, "ckpt": ckpt, "labels": labels, "written": written}
    if args.out is None:
        digest = train.digest([json.dumps(settings)])[:6]
        words = f"{Path(ckpt).stem} {args.sampler} {args.steps} {title} seed {args.seed} {digest}"
        name = "-".join(words.replace(",", "").split())
        kind = ".png" if args.num <= GRID else ".npz"
        args.out = str(train.run_folder(ckpt) / "samples" / (name + kind))
    out = Path(args.out)
    folder = args.out.endswith(os.sep) or bool(args.out) and out.is_dir()
    if folder == (out.suffix in (".png", ".npz")):
        raise ValueError(f"--out {args.out!r} is no place for images; give one that ends in .png, "
                         "in .npz, or, with another name, in / for a folder")
    train.prepare(out)
    if out.suffix == ".npz" and out.exists():
        return print(f"{out} is finished; remove it to draw it again")
    out.parent.mkdir(parents=True, exist_ok=True)
    sampler = Sampler(model.to(device), s, args, labels, device, **open_guides(args, s, device))
    batches = [range(args.num)[i:i + args.batch] for i in range(0, args.num, args.batch)]
    print(f"{ckpt}: {args.num} images in {args.steps} steps of {args.sampler}, "
          f"{title or 'no guidance'}, {args.precision}")
    if out.suffix != ".png":
        write_many(sampler, batches, out, settings)
    elif train.RANK == 0:                           # a few images: alone
        write_grid(sampler, batches, out, title)
    print(out)


if __name__ == "__main__":
    train.one_line_errors(main)
