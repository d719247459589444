"""Trains MENTOR stage by stage, on one process or many (paper sections 2.3 and 3.1).

    torchrun --nproc_per_node=8 --shutdown-timeout 600 train.py --stage 2 --compile        # 8 GPUs; data/2/*.jsonl
    python train.py --stage 2 --data my_photos/data.jsonl --init mentor --out out/mine                       # one GPU
    python train.py --stage 2                  # nothing there yet: a two-minute example with the small bundled model

A stage is one row of STAGES: what it trains, on which tasks, how long, from which weights. Flags override the row.
`--out` becomes a folder that `sample.py --weights` takes, with `log.jsonl`, a plot of the losses and images sampled
along the way, and checkpoints from which `--resume` goes on exactly. "Step" always means an optimizer step.

The loop at the end is short: start there if you like. Next: `world/`, where a small model is trained from nothing.
"""
import argparse
import copy
import json
import math
import os
import signal
import sys
import time
from contextlib import closing, contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace

import numpy as np
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import (StateDictOptions, get_model_state_dict, get_optimizer_state_dict,
                                                     set_optimizer_state_dict)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

import cli
import data
import weights
from cli import InputError
from encoder import CONNECTORS
from model import PARTS, Mentor
from rope2d import PREFIX_ROPE


# ---------------------------------------------------------------------------------------------------------------------
# Stages

@dataclass(frozen=True)
class Stage:
    """One row of the recipe (paper section 3.1 and appendix B)."""
    trains: tuple                      # prefixes of the parameters' names
    tasks: dict                        # task -> weight in the mixture
    init: str                          # the weights it starts from, as weights.load takes them
    global_batch: int
    lr: float
    epochs: float = 1
    steps: int | None = None           # instead of epochs
    prefix_tokens: int | None = 512    # room for so many prefix rows, 512 at most with a query connector; None = as the
                                       # weights it starts from
    prefix_rope: str | None = None     # rotation of the prefix; None = as the weights it starts from
    micro: int = 8                     # the largest micro-batch that is taken without being asked for
    t5_decoder: bool = False           # with T5's captioning half


ENCODER_AND_DECODER = ("encoder.connector", "encoder.t5", "projector", "decoder")
STAGES = {
    # text to image with the corrected rotary positions, from LlamaGen's weights: without it every image token would
    # still read the plain average of its prefix
    "rope": Stage(("projector", "decoder"), {"t2i": 1}, "llamagen", global_batch=256, lr=1e-4, prefix_rope="identity"),
    # captions through the frozen T5: the connector learns to say in T5's language what CLIP sees
    "connector": Stage(("encoder.connector",), {"caption": 1}, "generator", global_batch=256, lr=1e-3,
                       t5_decoder=True),
    # multimodal alignment: the decoder learns to read image rows pixel by pixel, by copying and cutting out; the
    # released code trained connector, T5 and output layer here instead
    "1": Stage(("projector", "decoder"), {"t2i": 700, "reconstruct": 180, "segment": 1600}, "out/mentor/connector",
               global_batch=128, lr=5e-4),
    # instruction tuning: keep the subject and follow the prompt at once; everything but CLIP
    "2": Stage(ENCODER_AND_DECODER, {"t2i": 600, "segment": 150, "recover": 150, "subject": 400}, "out/mentor/1",
               global_batch=128, lr=1e-4, epochs=2),
    # several subjects, up to four reference images
    "multi": Stage(ENCODER_AND_DECODER, {"t2i": 600, "segment": 150, "recover": 150, "subject": 400, "multi": 1500},
                   "out/mentor/2", global_batch=128, lr=1e-4, prefix_tokens=1280),
    # the further fine-tunings of appendix G: X2I's subject-driven set; in-context examples, here two pairs and a query;
    # reconstruction alone (Table 5). The paper gives their lengths; the first two rates are ours
    "subjects": Stage(ENCODER_AND_DECODER, {"multi": 1}, "out/mentor/2", global_batch=128, lr=5e-5, epochs=2,
                      prefix_tokens=1280),
    "icl": Stage(ENCODER_AND_DECODER, {"icl": 1}, "out/mentor/2", global_batch=128, lr=5e-5, epochs=10,
                 prefix_tokens=1536),
    "reconstruct": Stage(ENCODER_AND_DECODER, {"reconstruct": 1}, "out/mentor/2", global_batch=128, lr=1e-4,
                         steps=1000),
}
# what --stage 2 does where there is no data: a whole run in miniature; no other stage starts from it
EXAMPLE = replace(STAGES["2"], init="tiny", global_batch=16, lr=5e-5, steps=60, prefix_tokens=None)
EXAMPLE_DATA = os.path.join(os.path.dirname(os.path.abspath(__file__)), "assets", "example")
EXAMPLE_OUT = os.path.join("out", "example", "2")      # replaced each time

BETAS, WEIGHT_DECAY, CLIP_NORM = (0.9, 0.95), 0.05, 1.0
WARMUP, FLOOR = 0.05, 0.1  # share of the steps in which the learning rate rises; what share of it is left in the end
UNCONDITIONAL = 0.1        # share of samples that learn the unconditional rows


RATE = 4.5                 # samples a second and A100, in the paper's stage 2 (section 3.1)


def lr_at(step, steps, peak):
    """Learning rate of a step (from 0): linear warm-up over 5 % of the steps, then a cosine down to a tenth."""
    warmup = max(1, round(WARMUP * steps))
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - 1 - warmup)
    return peak * (FLOOR + (1 - FLOOR) * 0.5 * (1 + math.cos(math.pi * min(1, progress))))


# ---------------------------------------------------------------------------------------------------------------------
# Command line

def make_parser(stages, description):
    """The flags of a run; those that override the stage's row are None unless they are given."""
    parser = cli.Parser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    yes_no = argparse.BooleanOptionalAction
    what = parser.add_argument_group("what (default: as the stage's row says)")
    what.add_argument("--stage", required=True, choices=stages)
    what.add_argument("--init", help="weights to start from, as sample.py --weights takes them")
    what.add_argument("--connector", choices=CONNECTORS, help="begin a new one of this form")
    what.add_argument("--prefix-rope", choices=PREFIX_ROPE, help="rotation of the prefix")
    what.add_argument("--prefix-tokens", type=cli.positive_int, help="room for so many prefix rows, if not more")
    what.add_argument("--size", type=cli.positive_int, help="pixels a side of the targets; default: the weights' own")
    what.add_argument("--trains", nargs="+", choices=PARTS, help="parts that are trained")
    what.add_argument("--without", action="append", default=[], metavar="TASK", help="leave a task out; repeat")
    source = parser.add_argument_group("data (default: data/STAGE/*.jsonl, else data/*.jsonl)")
    source.add_argument("--data", action="append", metavar="JSONL", help="rows to learn from; repeat for several")
    source.add_argument("--val", action="append", metavar="JSONL", help="for validation; default: val*.jsonl there")
    source.add_argument("--backgrounds", action="append", metavar="JSONL",
                        help="images for the recovery task; default: backgrounds.jsonl there")
    source.add_argument("--codes", metavar="FOLDER", help="what `prepare.py encode` made of --data")
    cli.add_fit_flag(source)
    source.add_argument("--workers", type=cli.natural, default=2, help="processes that load images, per rank")
    how = parser.add_argument_group("how long and how fast (default: as the stage's row says)")
    how.add_argument("--steps", type=cli.positive_int, help="optimizer steps, instead of epochs")
    how.add_argument("--epochs", type=cli.positive_float, help="how often the data is seen")
    how.add_argument("--global-batch", type=cli.positive_int, help="samples of a step, over all ranks")
    how.add_argument("--micro-batch", type=cli.positive_int, help="samples that a rank computes at once")
    how.add_argument("--lora", type=cli.positive_int, metavar="RANK", help="train low-rank updates alone (lora.py); 16 "
                     "is usual, with ten times the --lr")
    how.add_argument("--lr", type=cli.positive_float, help="peak of the learning rate")
    how.add_argument("--seed", type=cli.natural, default=0, help="of everything random (default 0)")
    machine = parser.add_argument_group("machine")
    machine.add_argument("--device", help="default: cuda, else cpu")
    machine.add_argument("--fsdp", action=yes_no, default=False, help="spread parameters, gradients and optimizer over "
                         "the ranks (FSDP2) instead of copying them (DDP)")
    machine.add_argument("--checkpoint-activations", action=yes_no, default=False, help="compute them twice")
    machine.add_argument("--bf16", action=yes_no, help="bf16 products over fp32 weights; default: on a GPU")
    machine.add_argument("--compile", action=yes_no, default=False, help="compile the blocks of T5 and decoder")
    output = parser.add_argument_group("output")
    output.add_argument("--out", metavar="FOLDER", help="default: out/mentor/STAGE")
    output.add_argument("--resume", action=yes_no, default=False, help="go on from the newest checkpoint in --out")
    output.add_argument("--save-every", type=cli.positive_int, default=500, help="steps between checkpoints")
    output.add_argument("--sample-every", type=cli.positive_int, default=500, help="steps between validations")
    output.add_argument("--keep", type=cli.positive_int, default=2, help="checkpoints to keep")
    return parser


def override(stage, args):
    """The stage's row with what the command line gives in its place."""
    if args.epochs:
        stage = replace(stage, steps=None)
    for name in ("trains", "init", "global_batch", "lr", "epochs", "steps", "prefix_tokens", "prefix_rope"):
        value = getattr(args, name)
        if value is not None:
            stage = replace(stage, **{name: tuple(value) if name == "trains" else value})
    unknown = sorted(set(args.without) - set(stage.tasks))
    if unknown:
        raise InputError(f"--without {' '.join(unknown)}: stage {args.stage} has no such task; its tasks are "
                         f"{', '.join(stage.tasks)}")
    tasks = {task: weight for task, weight in stage.tasks.items() if task not in args.without}
    if not tasks:
        raise InputError(f"--without leaves stage {args.stage} no task; remove one of them")
    return replace(stage, tasks=tasks)


def parse(argv):
    """The command line -> arguments, the stage's row with their overrides, whether this is the example."""
    parser = make_parser(list(STAGES), __doc__)
    plan = parser.add_argument_group("plan")
    plan.add_argument("--dry-run", action="store_true", help="print rows, steps, hours and memory, and stop; needs "
                      "neither the weights nor a GPU")
    plan.add_argument("--gpus", type=cli.positive_int, default=int(os.environ.get("WORLD_SIZE", 8)),
                      help="for --dry-run (default: torchrun's, else 8)")
    plan.add_argument("--rate", type=cli.positive_float, default=RATE, help="samples a second and GPU, for --dry-run; "
                      f"default {RATE}, the paper's on A100s")
    args = parser.parse_args(argv)
    for folder in (os.path.join("data", args.stage), "data"):
        if not args.data:
            cli.find_data(args, folder)
    example = args.stage == "2" and not (args.data or args.init or os.path.exists("data"))
    if example:
        cli.find_data(args, EXAMPLE_DATA)
        args.out = args.out or EXAMPLE_OUT
    if not args.data:
        raise InputError(f"there is nothing to learn from; put JSON lines into data/{args.stage}/ or data/, or name "
                         f"them by --data (python prepare.py import makes such a file of images and of others' data)")
    args.out = args.out or os.path.join("out", "mentor", args.stage)
    return args, override(EXAMPLE if example else STAGES[args.stage], args), example


# ---------------------------------------------------------------------------------------------------------------------
# Objectives: batch -> losses (B,), each the sum over a sample's elements, so that any split of a batch adds up

class TokenObjective(nn.Module):
    """Next-token cross entropy of images, or of captions in stage connector."""

    def __init__(self, mentor):
        super().__init__()
        self.mentor, self.tokens = mentor, (mentor.config.image_size // mentor.vqgan.factor)**2

    def elements(self, batch):
        """Of how many terms each sample's loss is the sum. -> (B,)"""
        if "labels" in batch:
            return (batch["labels"] != -100).sum(dim=1)
        return torch.full((len(batch["ids"]),), self.tokens)

    def forward(self, batch):
        return self.mentor(batch).sum(dim=1)                                              # (B,)


def freeze(objective, trains):
    """Only the named parts of the model train, or their low-rank updates; the others stay in eval mode, so without
    dropout."""
    objective.train()
    for name, parameter in objective.mentor.named_parameters():
        parameter.requires_grad_(name.startswith(trains) and (not objective.mentor.adapter or ".lora_" in name))
    for name in PARTS:
        if not name.startswith(trains):
            objective.mentor.get_submodule(name).eval()


# ---------------------------------------------------------------------------------------------------------------------
# Processes

def checkpointed(forward):
    """A block's forward that keeps its inputs alone for the backward pass, and computes the rest twice."""
    def call(*inputs):
        if torch.is_grad_enabled():
            return checkpoint(forward, *inputs, use_reentrant=False)
        return forward(*inputs)                # it also draws sheets, in CUDA graphs, which no checkpoint may enter
    return call


def wrap(objective, args, ranks):
    """The objective as all ranks train it together; the blocks compiled and checkpointed as asked for."""
    mentor = objective.mentor
    blocks = weights.trainable_blocks(mentor)
    for block in blocks:
        if args.compile:
            block.forward = torch.compile(block.forward)
        if args.checkpoint_activations:        # outside: the compiler does not look into a checkpoint
            block.forward = checkpointed(block.forward)
    if ranks.world == 1:
        return objective
    if not args.fsdp:
        return DistributedDataParallel(objective, gradient_as_bucket_view=True)
    mesh = init_device_mesh(ranks.device.type, (ranks.world,))
    mentor.replay = None                       # no graph can hold the talk between ranks
    for block in [*mentor.encoder.clip.blocks, *weights.connector_blocks(mentor), *blocks]:
        fully_shard(block, mesh=mesh)
    return fully_shard(objective, mesh=mesh)


def accumulating(model, last):
    """Context of one micro-batch: DDP's gradients travel between ranks only with the last one of a step. FSDP's travel
    each time: to wait would keep the gradients of all parameters on every rank."""
    return model.no_sync() if isinstance(model, DistributedDataParallel) and not last else nullcontext()


def make_optimizers(objective, stage, leave_out=()):
    """AdamW with weight decay on matrices only. -> a list of one (another may take care of what is left out)"""
    trained = [p for p in objective.parameters() if p.requires_grad and p not in leave_out]
    groups = [{"params": [p for p in trained if p.dim() >= 2], "weight_decay": WEIGHT_DECAY},
              {"params": [p for p in trained if p.dim() < 2], "weight_decay": 0.0}]
    groups = [group for group in groups if group["params"]]
    return [torch.optim.AdamW(groups, lr=stage.lr, betas=BETAS, fused=trained[0].is_cuda)]


# ---------------------------------------------------------------------------------------------------------------------
# The run

@dataclass
class Run:
    """Everything a run needs, made once by `fit`."""
    args: argparse.Namespace
    stage: Stage                       # with the command line's overrides
    ranks: cli.Ranks
    mentor: Mentor
    objective: nn.Module               # around the mentor
    model: nn.Module                   # the objective, wrapped for all ranks
    optimizers: list
    train: torch.utils.data.Dataset
    val: torch.utils.data.Dataset | None
    shown: torch.utils.data.Dataset    # what sheets are sampled from: the validation data, else the training data
    micro: int                         # samples a rank computes at once
    accum: int                         # micro-batches a rank computes in a step
    steps: int
    first: int                         # steps done before
    log: object                        # takes a line; silent but on rank 0

    def autocast(self, cache=True):
        """bf16 products over fp32 weights, as --bf16 says. cache: keep the weights' bf16 copies for their next use,
        which a training step does not have."""
        return torch.autocast(self.ranks.device.type, torch.bfloat16, enabled=self.args.bf16, cache_enabled=cache)

    @contextmanager
    def evaluating(self):
        """Without dropout and gradients, and with FSDP's shards gathered for what is not called through `model`."""
        training = [module for module in self.model.modules() if module.training]
        sharded = [module for module in self.model.modules() if isinstance(module, FSDPModule)]
        self.model.eval()
        for module in sharded:
            module.set_reshard_after_forward(False, recurse=False)         # or each decoding step would gather anew
            module.unshard()
        with torch.no_grad():
            yield
        for module in sharded:
            module.set_reshard_after_forward(module is not self.model, recurse=False)
            module.reshard()
        for module in training:
            module.training = True

    def settings(self):
        """Everything that decides the losses, for a resumed run to compare; machine and output do not."""
        free = ("resume", "out", "device", "fsdp", "checkpoint_activations", "compile", "workers", "save_every",
                "sample_every", "keep", "val", "codes", "without", "micro_batch", "dry_run", "gpus", "rate", "bf16")
        given = {name: value for name, value in vars(self.args).items() if name not in free}
        config, recipe = self.mentor.config, asdict(replace(self.stage, epochs=0, micro=0))
        given["rows"] = getattr(self.train, "fingerprint", None)           # what the files hold; painted data has none
        derived = {"epochs": 0, "steps": self.steps, "samples": len(self.train), "size": config.image_size,
                   "prefix_tokens": config.prefix_tokens, "prefix_rope": config.decoder.prefix_rope}
        return json.loads(json.dumps({**given, **recipe, **derived}))                     # as JSON gives it back


def load_start(args, stage, log, command="train.py"):
    """The weights that a stage starts from. -> Mentor; where they are the stage's own and missing, InputError says how
    to get them."""
    folder, name = os.path.split(stage.init)
    if args.init is None and folder and not os.path.isdir(stage.init):
        raise InputError(f"stage {args.stage} starts from {stage.init}, which is not there; make it by `python "
                         f"{command} --stage {name}`, or name other weights by --init")
    try:
        return weights.load(stage.init, t5_decoder=stage.t5_decoder, log=log, prefix_rope=stage.prefix_rope,
                            prefix_tokens=weights.prefix_room(stage, args), image_size=args.size,
                            connector=args.connector)
    except InputError as error:
        if args.init:
            raise
        raise InputError(f"stage {args.stage} starts from {stage.init}, which `python weights.py convert {stage.init} "
                         f"out/{stage.init}` fetches (then add --init out/{stage.init}): {error}") from None


def task_data(args, stage, mentor, log):
    """Training data, validation data (or None) and what sheets are sampled from, of JSONL files."""
    options = {"processor": mentor.processor, "image_size": mentor.config.image_size}
    extra = options | {"seed": args.seed, "backgrounds": args.backgrounds or ()}
    codes = weights.Codes(args.codes, mentor.vqgan, mentor.config.image_size, args.fit) if args.codes else None
    train = data.TaskData(args.data, weights=stage.tasks, codes=codes, **extra)
    for problem in train.problems:
        log(f"skipped {problem}")
    if train.lacking:
        log(f"left out, because there are no rows for it: {', '.join(train.lacking)}")
    if not args.val:
        shown = copy.copy(train)
        shown.codes = None                     # sheets show pixels
        return train, None, shown
    present = {"picture", "caption", *data.TaskData(args.val, **options).tasks}
    tasks = {task: None for task in stage.tasks if task in present}
    if not tasks:
        raise InputError(f"--val {' '.join(args.val)}: holds no row of this stage's tasks, {', '.join(stage.tasks)}; "
                         f"give another file or none")
    val = data.TaskData(args.val, weights=tasks, **extra)
    return train, val, val


def steps_of(stage, samples):
    """Optimizer steps of a run over so many samples an epoch."""
    return stage.steps or max(1, round(stage.epochs * samples / stage.global_batch))


def batch_arithmetic(args, stage, mentor, ranks, samples):
    """-> samples a rank computes at once (as asked for, else the most that leave its GPU 8 GB free), how often in a
    step, steps of the run"""
    sizes = [micro for micro in range(stage.micro, 0, -1) if stage.global_batch / ranks.world % micro == 0] or [1]
    card, way = cli.card_memory(ranks.device), weights.Way(args.fsdp, args.checkpoint_activations, args.micro_batch)
    micro = args.micro_batch or sizes[0]
    if card:
        micro = weights.micro_batch_that_fits(mentor, stage.trains, ranks.world, card, way, sizes)
    accum = stage.global_batch // (micro * ranks.world)
    if accum * micro * ranks.world != stage.global_batch:
        raise InputError(f"--global-batch {stage.global_batch} is no multiple of --micro-batch {micro} x {ranks.world} "
                         f"ranks; change one of them")
    return micro, accum, steps_of(stage, samples)


def check(run, before):
    """Raises InputError for a run that cannot be meant. before: settings of the run that this one resumes, or None."""
    args, stage, untrained = run.args, run.stage, run.mentor.config.untrained
    seeing = [task for task in stage.tasks if task not in ("t2i", "picture")]
    if seeing and "encoder.connector" in untrained:
        raise InputError(f"{stage.init}: holds no trained connector, and stage {args.stage} leaves it as it is, so the "
                         f"task {seeing[0]} could not see its images; run --stage connector first, or name other "
                         f"weights by --init")
    for name, value in run.settings().items() if before else ():
        if name in ("prefix_rope", "prefix_tokens", "size"):   # the model has its own: what counts is what was asked
            value = getattr(args, name) or value
        if before.get(name, value) != value:
            raise InputError(f"--resume: the run was started with {name} {before[name]}, not {value}; give the same, "
                             f"or start a new run in another --out")


def plan(args, stage):
    """Prints what a run would be, from its rows and its weights' sizes alone."""
    mentor = weights.without_numbers(stage.init, stage.t5_decoder, args.connector, args.size,
                                     args.lora and (args.lora, stage.trains), prefix_rope=stage.prefix_rope,
                                     prefix_tokens=weights.prefix_room(stage, args))
    args.codes = None                          # encoding ahead changes neither rows nor memory
    train, _, _ = task_data(args, stage, mentor, print)
    steps = steps_of(stage, len(train))
    for task, count in train.counts.items():
        rows = len(np.unique(train.entries[task][:, 0]))
        print(f"{task:12}{rows:10,} rows {count:10,} samples an epoch")
    hours = steps * stage.global_batch / (args.rate * args.gpus) / 3600
    print(f"steps: {steps:,} of {stage.global_batch} samples, {hours:,.1f} hours on {args.gpus} GPUs at {args.rate} "
          f"samples a second and GPU\n{weights.memory_table(mentor, stage.trains, args.gpus)}")


def report(run):
    """Prints what will happen: parts, batch arithmetic, memory and length."""
    args, stage, ranks, config = run.args, run.stage, run.ranks, run.mentor.config
    print(f"stage {args.stage} from {stage.init}: tasks {stage.tasks}, lr {stage.lr}, seed {args.seed}, prefix "
          f"{config.prefix_tokens} rows, {config.decoder.prefix_rope}")
    print(weights.parts_table(run.mentor))
    print(f"batch: {run.micro} samples x {ranks.world} ranks x {run.accum} micro-batches = {stage.global_batch}")
    print(f"steps: {run.steps} of {stage.global_batch} samples, {len(run.train)} samples an epoch")
    way, card = weights.Way(args.fsdp, args.checkpoint_activations, run.micro), cli.card_memory(ranks.device)
    rows = weights.training_memory(run.mentor, stage.trains, ranks.world, way, 2 if args.bf16 else 4)
    print("memory per rank, estimated: " + ", ".join(f"{what} {gib:.2f}" for what, gib in rows.items())
          + f"; together {sum(rows.values()):.2f} GiB" + (f" of the GPU's {card:.1f}" if card else ""))


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints: out/step-00000500/ is a model folder plus training.safetensors and training.json; the newest model's
# files are linked into out/ itself, so that `sample.py --weights out` always works

FULL = StateDictOptions(full_state_dict=True)                  # for reading: without copies on the host
ON_HOST = StateDictOptions(full_state_dict=True, cpu_offload=True)
OURS = "mentor."           # names of the model's tensors in an objective; all others belong to the training alone


def save_checkpoint(run, step, name=None):
    """Writes the state after `step` optimizer steps; it appears whole or not at all. -> its folder"""
    out, state = run.args.out, get_model_state_dict(run.model, options=ON_HOST)  # on rank 0: everything, gathered
    folder = os.path.join(out, name or f"step-{step:08}")
    moments = get_optimizer_state_dict(run.model, run.optimizers, options=ON_HOST)
    if run.ranks.rank == 0:
        tensors = {key: tensor for key, tensor in state.items() if not key.startswith(OURS)}
        for parameter, values in moments["state"].items():
            for key, tensor in values.items():
                tensors[f"{key}:{parameter}"] = tensor
        model = {key.removeprefix(OURS): tensor for key, tensor in state.items() if key.startswith(OURS)}
        weights.save_checkpoint(run.mentor, folder, model, tensors, {"step": step, "settings": run.settings()})
        if name is None:
            publish(run, step)
    run.ranks.barrier()
    return folder


def publish(run, step):
    """Links the model of the checkpoint after `step` into out/ and removes older checkpoints that are too many."""
    weights.publish(os.path.join(run.args.out, f"step-{step:08}"), run.args.out, run.args.keep)


def restore(model, optimizers, tensors):
    """Puts the optimizers' moments back."""
    moments = {}
    for name, tensor in tensors.items():
        if ":" in name:
            key, parameter = name.split(":", 1)
            moments.setdefault(parameter, {})[key] = tensor
    state = {"state": moments, "param_groups": get_optimizer_state_dict(model, optimizers)["param_groups"]}
    set_optimizer_state_dict(model, optimizers, state, options=FULL)


# ---------------------------------------------------------------------------------------------------------------------
# Watching it: validation losses, images, the log and its plot

VAL_SAMPLES, SHEET_ROWS = 128, 4


def validate(run):
    """Mean loss an element for every task of the validation data, the batches shared among the ranks."""
    count, val, parts = min(len(run.val), VAL_SAMPLES), run.val, []
    starts = range(0, count, run.micro)
    for first in range(0, len(starts), run.ranks.world):
        # where a rank has no batch left it repeats one without counting it: FSDP needs all ranks in every forward
        number = first + run.ranks.rank
        start = starts[min(number, len(starts) - 1)]
        batch = data.collate([val[k] for k in range(start, min(start + run.micro, count))])
        with run.evaluating(), run.autocast():
            losses = run.model(run.ranks.move(batch))                        # (B,)
        if number < len(starts):
            parts += zip(batch["task"], losses.tolist(), run.objective.elements(batch).tolist())
    return run.ranks.means(parts)[1]


def sheet(run):
    """reference | sample | target over the prompt, for fixed samples, each drawn by one rank. -> PIL image

    For a tokenizer the sample is the reconstruction. None on ranks but 0, and where nothing is drawn (captions).
    """
    mentor, ranks, tiles = run.mentor, run.ranks, []
    if "caption" in run.stage.tasks:
        return None
    samples = [run.shown[int(k)] for k in np.linspace(0, len(run.shown) - 1, min(SHEET_ROWS, len(run.shown)))]
    places = 2 + max(len(sample["refs"]) for sample in samples)
    for first in range(0, len(samples), ranks.world):
        sample = samples[min(first + ranks.rank, len(samples) - 1)]
        with run.evaluating(), run.autocast():
            if "picture" in run.stage.tasks:
                image = mentor.vqgan.decode(mentor.vqgan.encode(sample["target"][None].to(ranks.device)))
            else:
                image = mentor.sample(data.collate([sample]), [run.args.seed])            # (1, 3, size, size)
        tiles += ranks.gather(data.tile(sample, places, image[0].cpu()))
    return cli.contact_sheet(tiles[:len(samples)], columns=1) if ranks.rank == 0 else None


# ---------------------------------------------------------------------------------------------------------------------
# The loop

def read_micro_batches(run, loader, problems, step):
    """This rank's micro-batches of a step. batch["drop"] (B,): the samples that learn the unconditional rows."""
    micro_batches = []
    for i in range(run.accum):
        batch = next(loader)
        problems.seen += len(batch["name"])
        for problem in sum(batch["problems"], []):
            problems.add(problem)
        position = step * run.stage.global_batch + (i * run.ranks.world + run.ranks.rank) * run.micro
        draws = [np.random.default_rng((run.args.seed, 1, position + k)).random() for k in range(len(batch["name"]))]
        batch["drop"] = torch.tensor(draws) < UNCONDITIONAL    # a function of (seed, sample)
        micro_batches.append(batch)
    return micro_batches


def clip_gradients(optimizer):
    """Clips what an optimizer moves, apart from the others': a discriminator's gradients say nothing of a tokenizer's.
    -> their norm before"""
    norm = nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], CLIP_NORM)
    return float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)


def train_step(run, micro_batches, step):
    """One optimizer step. -> {"loss", "losses" per task, "grad_norm"}; raises InputError where they are not finite."""
    parts, elements = [], [run.objective.elements(batch) for batch in micro_batches]             # (B,) each
    total = run.ranks.sum([float(torch.cat(elements).sum())])[0]
    for i, batch in enumerate(micro_batches):
        with accumulating(run.model, last=i == len(micro_batches) - 1):
            with run.autocast(cache=False):
                losses = run.model(run.ranks.move(batch))                    # (B,), sums over elements
            # divided by all elements of the global batch; times world, because the ranks' gradients are averaged
            (losses.sum() * (run.ranks.world / total)).backward()
        parts += zip(batch["task"], losses.tolist(), elements[i].tolist())
    loss, losses = run.ranks.means(parts)
    norm = math.hypot(*map(clip_gradients, run.optimizers))
    if not (math.isfinite(loss) and math.isfinite(norm)):
        names = sum(run.ranks.gather([name for batch in micro_batches for name in batch["name"]]), [])
        folder = save_checkpoint(run, step, f"nonfinite-step-{step}")
        raise InputError(f"step {step}: the loss is {loss} and the gradient {norm}; the state before it is in "
                         f"{folder}, its samples are {', '.join(names)}; look at them or lower --lr")
    keep = isinstance(run.model, DistributedDataParallel)      # its gradients are views into the buckets that travel
    for optimizer in run.optimizers:
        optimizer.step()
        optimizer.zero_grad(set_to_none=not keep)
    return {"loss": loss, "losses": losses, "grad_norm": norm}


def watch(run, step):
    """Validation losses, on the screen and for the log, and the sheet of samples. -> record for the log, or None"""
    losses, image = validate(run) if run.val else None, sheet(run)
    if image:
        with cli.atomic_file(os.path.join(run.args.out, f"samples-{step:08}.png")) as temporary:
            image.save(temporary)
    if losses is None:
        return None
    run.log(f"step {step}: validation " + ", ".join(f"{task} {loss:.4f}" for task, loss in losses.items()))
    return {"step": step, "val": losses}


def loop(run, stop, loader, problems, before_step):
    """All steps: learning rate, batches, step, log, checkpoint, validation. -> steps done, fewer after a signal"""
    args, stage, ranks = run.args, run.stage, run.ranks

    def due(done, every):
        return done % every == 0 or done == run.steps
    if run.first and due(run.first, args.sample_every):        # the run may have been killed before it came to this
        cli.write_log(args.out, watch(run, run.first), ranks)
    bar = cli.bar(range(run.first, run.steps), initial=run.first, total=run.steps, unit="step", disable=ranks.rank > 0)
    for step in bar:
        begun, done = time.perf_counter(), step + 1
        torch.manual_seed((args.seed * 1_000_003 + step) * 4_001 + ranks.rank)     # dropout: by seed, step and rank
        lr = lr_at(step, run.steps, stage.lr)
        for optimizer in run.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr
        micro_batches = read_micro_batches(run, loader, problems, step)
        with cli.enough_memory(f"step {done} takes {run.micro} samples at once; go on with a smaller --micro-batch, or "
                               "--fsdp or --checkpoint-activations, and --resume if there is a checkpoint"):
            before_step(run, micro_batches, step)
            record = train_step(run, micro_batches, step)
        record |= {"step": done, "lr": lr, "memory_gib": cli.used_memory(ranks.device),
                   "samples_per_s": stage.global_batch / (time.perf_counter() - begun)}
        bar.set_postfix_str(f"loss {record['loss']:.4f}, lr {lr:.1e}, {record['samples_per_s']:.1f} samples/s, "
                            f"{record['memory_gib']:.1f} GiB", refresh=False)
        cli.write_log(args.out, record, ranks)
        leave = ranks.sum([stop.signal is not None])[0] > 0
        if due(done, args.save_every) or leave:
            save_checkpoint(run, done)
        if leave and done < run.steps:
            return done
        if due(done, args.sample_every):
            cli.write_log(args.out, watch(run, done), ranks)
    return run.steps


def make_run(args, stage, ranks, log, make_objective, make_data, optimizers_of, start):
    """Model, data, objective and optimizers, new or as the newest checkpoint has them. -> Run"""
    saved, training = {}, {"step": 0, "settings": None}
    if args.resume:
        mentor, saved, training = weights.newest_checkpoint(args.out, stage.t5_decoder, log)
        if ranks.rank == 0:
            cli.trim_log(os.path.join(args.out, "log.jsonl"), training["step"])
        if not (args.steps or args.epochs):
            stage = replace(stage, steps=training["settings"].get("steps"))
    else:
        mentor = start(args, stage, log)
        if args.lora:
            weights.add_lora(mentor, args.lora, stage.trains, stage.init)
    if not args.lora:
        untrained = tuple(part for part in mentor.config.untrained if not part.startswith(stage.trains))
        mentor.config = replace(mentor.config, untrained=untrained)
    mentor.processor.fit = args.fit
    train, val, shown = make_data(args, stage, mentor, log)
    micro, accum, steps = batch_arithmetic(args, stage, mentor, ranks, len(train))

    torch.manual_seed(args.seed)               # what an objective adds to the model starts the same on every rank
    objective = make_objective(mentor)
    freeze(objective, stage.trains)
    if args.lora and ranks.device.type == "cuda" and not args.fsdp:        # which would have all of one type
        weights.halve_frozen(mentor)
    objective.load_state_dict({name: tensor for name, tensor in saved.items() if ":" not in name}, strict=False)
    model = wrap(objective.to(ranks.device), args, ranks)
    optimizers = optimizers_of(objective, stage)
    run = Run(args, stage, ranks, mentor, objective, model, optimizers, train, val, shown, micro, accum, steps,
              training["step"], log)
    check(run, training["settings"])
    if saved:
        restore(model, optimizers, saved)
    return run


def fit(args, stage, make_objective=TokenObjective, make_data=task_data, optimizers_of=make_optimizers,
        start=load_start, before_step=lambda run, micro_batches, step: None, replace_old=False):
    """A whole training run, from the command line to the last checkpoint.

    make_objective: Mentor -> module as TokenObjective. make_data: (args, stage, mentor, log) -> (training data,
    validation data or None, data to sample sheets from). optimizers_of: (objective, stage) -> list. start: (args,
    stage, log) -> Mentor. before_step: called with (run, micro-batches, step). replace_old: a run in --out goes.
    """
    ranks = cli.Ranks.join(args.device)
    if args.bf16 is None:
        args.bf16 = ranks.device.type == "cuda"
    log = tqdm.write if ranks.rank == 0 else lambda line: None
    if args.bf16:
        weights.warn_of_detours(ranks.device, torch.bfloat16, log)
    if ranks.device.type == "cuda":
        torch.set_float32_matmul_precision("high")
        torch.backends.cuda.enable_cudnn_sdp(False)            # NaN gradients under some masks (pytorch issue 196678)
    with cli.claimed(args.out, ranks, args.resume, replace_old):
        run = make_run(args, stage, ranks, log, make_objective, make_data, optimizers_of, start)
        if ranks.rank == 0:
            report(run)
            if args.resume:
                publish(run, run.first)        # the run may have been killed before it came to this
        stop, total = cli.Stop(), run.stage.global_batch
        loader = data.batches(run.train, run.first * total, run.steps * total, run.micro, ranks.rank, ranks.world,
                              args.workers)
        with closing(loader):                  # workers end with it, whatever ends the loop
            done = loop(run, stop, loader, cli.Problems(tqdm.write), before_step)
        if ranks.rank == 0:
            cli.plot_log(os.path.join(args.out, "log.jsonl"), os.path.join(args.out, "loss.png"))
    ranks.leave()
    if done < run.steps:
        log(f"stopped after step {done} of {run.steps}; --resume goes on from there")
        sys.exit(128 + (stop.signal or signal.SIGTERM))        # as the shell expects
    log(f"wrote {args.out}; `python sample.py --weights {args.out}` samples from it")


def main(argv=None):
    """The command line."""
    args, stage, example = parse(argv)
    if args.dry_run:
        return plan(args, stage) if os.environ.get("RANK", "0") == "0" else None
    if example and os.environ.get("RANK", "0") == "0":
        print("there is no data/: fine-tuning the small bundled model on the example rows of "
              f"{EXAMPLE_DATA} (tutorial/training.md)")
    fit(args, stage, replace_old=args.out == EXAMPLE_OUT)


if __name__ == "__main__":
    cli.run(main)
