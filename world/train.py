"""Trains the small model of the emoji world from nothing, stage by stage.

    python -m world.train --stage vqgan              # the tokenizer, from random weights
    python -m world.train --stage pretrain           # what CLIP, FLAN-T5 and LlamaGen bring to the full model
    python -m world.train --stage 1                  # from here on the published stages
    python -m world.train --stage 2
    python -m world.train --stage multi              # then what is wanted: several subjects in one image,
    python -m world.train --stage icl                # learning from examples,
    python -m world.train --stage reconstruct        # reconstruction alone

Each starts from the one before it in out/tiny, the last three from 2. `pretrain` also aligns patches and tokens, which
the paper leaves to stage 1. Two stages in its place bring what the paper starts from and nothing more:

    python -m world.train --stage parts              # each part for itself: to see, to read, to write
    python -m world.train --stage connector          # captions through the frozen T5
    python -m world.train --stage 1 --init out/tiny/connector

Samples are painted as they are needed, unless --data names files. Flags and the loop are those of `train.py`; here
stand the small model's sizes, its rows of the stage table, the objectives of `pretrain` and `parts` and the optimizer.
On two cores take --workers 0 and `OMP_NUM_THREADS=1 torchrun --nproc_per_node=2`.

Shape letters: B batch, n samples that one loss is for, S prefix rows, T image tokens, P patches of an image, D the
decoder's width, V codes, e their width; L words of a caption, C the width of CLIP or T5. Next: `world/muon.py`.
"""
import os
from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

import cli
import data
import train
import weights
from cli import InputError
from encoder import T5Config, VisionConfig
from model import DecoderConfig, MentorConfig, Prefix, Sampling
from train import Stage, TokenObjective
from vqgan import VQConfig
from world import tokenizer
from world.muon import Muon
from world.rows import EmojiData, small_tokenizer
from world.sprites import CROWDS

SMALL = MentorConfig(      # 6.1 M parameters, 2.0 M of them in the decoder
    vision=VisionConfig(width=192, layers=4, heads=6, mlp=576, image_size=64, patch_size=8),
    t5=T5Config(width=192, layers=3, heads=6, head_dim=32, mlp=512, vocab_size=1540, dropout=0.0),
    decoder=DecoderConfig(4, 6, 192, multiple_of=64, codes=512, dropout=0.0, prefix_rope="grid", rope_base=100.0),
    vqgan=VQConfig(channels=16, multipliers=(1, 2, 4), res_blocks=1, latent=64, codes=512),
    prefix_tokens=128, image_size=64, sampling=Sampling(cfg_scale=2.0, temperature=0.9, top_k=512, top_p=0.8))
MINI = replace(SMALL,      # trains four times as fast, for tables of many trainings; 144 tokens an image
    vision=replace(SMALL.vision, width=128, heads=4, mlp=384, image_size=48),
    t5=replace(SMALL.t5, width=128, heads=4, mlp=352),
    decoder=replace(SMALL.decoder, width=128, heads=4),
    image_size=48)
MODELS = {"small": SMALL, "mini": MINI}

STAGES = {      # an epoch is 100,000 samples
    "vqgan": Stage(("vqgan",), {"picture": 1}, "random", global_batch=32, lr=1.5e-3, epochs=0.768, prefix_tokens=None,
                   micro=32),
    "pretrain": Stage(("encoder", "projector", "decoder"), {"t2i": 50, "reconstruct": 25, "segment": 25},
                      "out/tiny/vqgan", global_batch=32, lr=3e-3, epochs=0.48, prefix_tokens=128, micro=16),
    "parts": Stage(("encoder.clip", "encoder.t5", "projector", "decoder"), {"t2i": 1}, "out/tiny/vqgan",
                   global_batch=32, lr=3e-3, epochs=0.48, prefix_tokens=128, micro=16, t5_decoder=True),
    "connector": replace(train.STAGES["connector"], init="out/tiny/parts", global_batch=32, lr=2e-3, epochs=0.32,
                         prefix_tokens=128, micro=16),
    "1": replace(train.STAGES["1"], tasks={"t2i": 20, "reconstruct": 40, "segment": 40}, init="out/tiny/pretrain",
                 global_batch=32, lr=2e-3, epochs=0.112, prefix_tokens=128, micro=16),
    # with some reconstruction, or the skill is lost
    "2": replace(train.STAGES["2"], tasks={"t2i": 10, "reconstruct": 15, "segment": 15, "recover": 15, "subject": 45},
                 init="out/tiny/1", global_batch=32, lr=2e-3, epochs=0.64, prefix_tokens=128, micro=16),
    # four references, at 64 patches, and their text
    "multi": replace(train.STAGES["multi"], tasks={"t2i": 10, "reconstruct": 10, "segment": 10, "subject": 35,
                                                   "multi": 35},
                     init="out/tiny/2", global_batch=32, lr=1e-3, epochs=0.5, prefix_tokens=360, micro=16),
    # two examples and a query, so five images (paper, appendix F.4)
    "icl": replace(train.STAGES["2"], tasks={"icl": 1}, init="out/tiny/2", global_batch=32, lr=2e-3, epochs=0.5,
                   prefix_tokens=384, micro=16),
    # as the paper's Table 5 has it: 1,000 steps
    "reconstruct": replace(train.STAGES["2"], tasks={"reconstruct": 1}, init="out/tiny/2", global_batch=32, lr=1e-3,
                           steps=1000, prefix_tokens=128, micro=16),
}
CODE_DISTANCE = 4          # pretrain: weight of a code's squared distance from where it should lie
THUMBNAIL = 8              # pretrain: pixels a side of what a caption's last row has to tell of its image
ALIGNED = ("reconstruct", "segment")     # tasks whose target lies under the reference: pretrain predicts its tokens
MOMENTUM = 0.95            # Muon's
TWIN = 0.05                # --grow: how far the two halves of a code lie apart, as a share of its length, a channel


# ---------------------------------------------------------------------------------------------------------------------
# The objectives of stages pretrain and parts

class PretrainObjective(TokenObjective):
    """What CLIP, T5 and LlamaGen bring to the published recipe, learned from nothing.

    The encoders learn to see and to read through two linear heads that are thrown away afterwards: one predicts the
    tokens under each patch of a reference, in the tasks whose target lies under it; the other predicts a thumbnail of
    the image from a caption's last row. The decoder learns to write from captions, at times with its input masked, so
    from the caption alone.
    """

    def __init__(self, mentor, width=None):
        """width: of the patches' rows whose tokens are named, default the decoder's."""
        super().__init__(mentor)
        config = mentor.config
        if config.connector == "query":
            raise InputError("a query connector is none for this stage, which names the tokens under each patch; give "
                             "--connector query to a later stage")
        if config.grid % config.vision.grid:
            raise InputError(f"--size {config.image_size} gives {config.grid} tokens a side for {config.vision.grid} "
                             f"patches; take a multiple of {config.vision.grid * config.vqgan.factor}")
        self.side = config.grid // config.vision.grid          # tokens a side of one patch
        self.token_head = nn.Linear(width or config.decoder.width, self.side**2 * config.vqgan.code_width)
        self.logit_scale = nn.Parameter(torch.tensor(20.0))
        self.thumbnail_head = nn.Linear(config.decoder.width, 3 * THUMBNAIL**2)
        self.mask_embedding = nn.Parameter(0.02 * torch.randn(config.decoder.width))

    def forward(self, batch):
        """-> (B,)"""
        tokens = self.mentor.target_tokens(batch)                                         # (B, T)
        aligned = torch.tensor([task in ALIGNED for task in batch["task"]], device=tokens.device)
        drop = torch.zeros_like(aligned)
        if "drop" in batch:                    # predicting tokens from unconditional rows would teach nothing
            drop = batch["drop"] & ~aligned
        images = self.images_of(batch, tokens)
        prefix = self.mentor.prefix(batch["ids"], batch["mask"], batch["refs"], drop)
        losses = torch.zeros(len(tokens), device=tokens.device)
        for chosen, loss, target in ((aligned, self.token_losses, tokens),
                                     (~aligned, self.writing_losses, tokens),
                                     (~aligned & ~drop, self.thumbnail_losses, images)):
            if chosen.any():
                part = self.select(prefix, chosen)
                losses = losses.index_add(0, chosen.nonzero()[:, 0], loss(part, target[chosen]))
        return self.reaching_all(losses)

    def images_of(self, batch, tokens):
        """The targets' pixels, of codes that were made ahead what these paint. -> (B, 3, H, W)"""
        return batch["target"] if "target" in batch else self.mentor.vqgan.decode(tokens)

    def reaching_all(self, losses):
        """The same losses: DDP expects a gradient from every parameter on every rank, whatever a batch holds."""
        return losses + 0 * sum(p.sum() for p in self.parameters() if p.requires_grad)

    @staticmethod
    def select(prefix, chosen):
        """The chosen samples (B,) bool, without the padding that they share. -> Prefix"""
        used = prefix.valid[chosen].any(dim=0)                                            # (S,)
        return Prefix(prefix.rows[chosen][:, used], prefix.valid[chosen][:, used], prefix.is_image[chosen][:, used])

    def writing_losses(self, prefix, tokens):
        """Cross entropy of all tokens. Neighbouring tokens tell so much about each other that the little a caption
        adds would go unnoticed for long; so in half of the samples some or all of the input is masked. -> (n,)"""
        hooks = []
        if self.training:
            masked = self.masked_inputs(tokens)[..., None]                                # (n, T - 1, 1)
            replace_some = lambda module, inputs, x: torch.where(masked, self.mask_embedding, x)
            hooks.append(self.mentor.decoder.tok_embeddings.register_forward_hook(replace_some))
        logits = self.mentor.decoder(prefix, tokens[:, :-1], self.mentor.config.grid)     # (n, T, V)
        for hook in hooks:
            hook.remove()
        return F.cross_entropy(logits.float().transpose(1, 2), tokens, reduction="none").sum(dim=1)

    @staticmethod
    def masked_inputs(tokens):
        """Which inputs are masked: a function of the sample alone, on whichever rank it is. -> (n, T - 1) bool"""
        masked = torch.zeros(tokens[:, 1:].shape, dtype=torch.bool)
        for row, sample in zip(masked, tokens.cpu()):
            generator = torch.Generator().manual_seed(int(sample.sum()))
            whether, share = torch.rand(2, generator=generator)
            row |= (torch.rand(row.shape, generator=generator) < 1.2 * share) & (whether < 0.5)
        return masked.to(tokens.device)

    def token_losses(self, prefix, tokens):
        """`naming_losses` of the prefix's image rows. -> (n,)"""
        return self.naming_losses(prefix.rows[prefix.is_image], tokens)

    def naming_losses(self, rows, tokens):
        """Cross entropy of the tokens under every patch, by the patches' rows (n * P, D). The head gives a point in the
        codes' space, its similarities to the codes are the logits: similar codes are close by construction, and a near
        miss costs less. -> (n,)"""
        patches, side = self.mentor.config.vision.grid, self.side
        codes = F.normalize(self.mentor.vqgan.quantize.embedding.weight, dim=-1)          # (V, e)
        target = tokens.view(-1, patches, side, patches, side).transpose(2, 3).flatten()  # (n * T,) patch by patch
        points = self.token_head(rows)                                                    # (n * P, side**2 * e)
        points = points.unflatten(-1, (side**2, -1)).flatten(0, 1)                        # (n * T, e)
        losses = F.cross_entropy(self.logit_scale * (points @ codes.T).float(), target, reduction="none")
        losses = losses + CODE_DISTANCE * (points - codes[target]).square().sum(dim=-1)
        return losses.view(len(tokens), -1).sum(dim=1)                                    # (n,)

    def thumbnail_losses(self, prefix, images):
        """Squared error of the thumbnail, scaled to about the size of the other losses. -> (n,)"""
        thumbnails = F.adaptive_avg_pool2d(images, THUMBNAIL).flatten(1)                  # (n, 3 * THUMBNAIL**2)
        error = (self.thumbnail_head(prefix.rows[:, -1]).float() - thumbnails).square().mean(dim=1)
        return 5 * self.mentor.config.grid**2 * error


class PartsObjective(PretrainObjective):
    """What the published recipe starts from and nothing more, learned from pictures with captions: nothing here leads
    from pictures through connector and T5 to the decoder.

    CLIP's patches, as the connector will receive them, name the tokens that lie under them and, all together, the
    caption's words. T5 writes a caption from its words, some of them blank or in another order. The decoder learns to
    write from captions as in `pretrain`; T5 learns with it, which FLAN-T5 did not, because the sketch of a caption
    would stay empty otherwise.
    """

    def __init__(self, mentor):
        super().__init__(mentor, mentor.config.vision.width)
        self.word_head = nn.Linear(mentor.config.vision.width, mentor.config.t5.vocab_size)
        self.blank = nn.Parameter(0.02 * torch.randn(mentor.config.t5.width))
        nn.init.zeros_(self.token_head.weight)                 # CLIP's rows are large: a guess would cost too much

    def forward(self, batch):
        """-> (B,)"""
        tokens = self.mentor.target_tokens(batch)                                         # (B, T)
        ids, mask, images = batch["ids"], batch["mask"], self.images_of(batch, tokens)
        prefix = self.mentor.prefix(ids, mask, drop=batch.get("drop"))
        thumbnails = self.thumbnail_losses(prefix, images)
        if "drop" in batch:                    # unconditional rows tell of no image
            thumbnails = thumbnails.masked_fill(batch["drop"], 0)
        losses = self.seeing_losses(images, tokens, ids, mask) + self.reading_losses(ids, mask)
        return self.reaching_all(losses + self.writing_losses(prefix, tokens) + thumbnails)

    def seeing_losses(self, images, tokens, ids, mask):
        """CLIP names the tokens under each patch, and from the mean of all patches the words. -> (B,)"""
        clip = self.mentor.encoder.clip
        mean, std = (images.new_tensor(values).view(3, 1, 1) for values in (data.CLIP_MEAN, data.CLIP_STD))
        pixels = F.interpolate((images.clamp(-1, 1) + 1) / 2, clip.config.image_size, mode="bilinear")
        features = clip((pixels - mean) / std)                                            # (B, P, C)
        named = self.naming_losses(features.flatten(0, 1), tokens)
        words = self.word_head(features.mean(dim=1)).float().log_softmax(dim=-1)          # (B, vocabulary)
        missing = -(words.gather(1, ids) * mask).sum(dim=1) / mask.sum(dim=1)
        return named + self.tokens * missing

    def reading_losses(self, ids, mask):
        """T5 writes each caption: in half of the samples from some or none of its words, in the others from all in
        another order, as the words that a connector finds in patches have no order. -> (B,)"""
        t5 = self.mentor.encoder.t5
        rows = t5.embed(ids)                                                              # (B, L, C)
        if self.training:
            blank = F.pad(self.masked_inputs(ids), (1, 0))                                # (B, L)
            kept = torch.arange(ids.size(1), device=ids.device)
            order = torch.where(blank.any(dim=1, keepdim=True), kept, self.order(ids, mask))
            rows = torch.where(blank[..., None], self.blank.type_as(rows), rows)
            rows = rows.gather(1, order[..., None].expand_as(rows))
        losses = t5.caption_losses(t5.encode(rows, mask), mask, ids.masked_fill(~mask, -100))             # (B, L)
        return self.tokens * losses.sum(dim=1) / mask.sum(dim=1)

    @staticmethod
    def order(ids, mask):
        """Any order of each caption's words, padding behind: a function of the sample alone. -> (B, L) int64"""
        orders = torch.arange(ids.size(1)).repeat(len(ids), 1)
        for order, sample, words in zip(orders, ids.cpu(), mask.sum(dim=1).tolist()):
            generator = torch.Generator().manual_seed(int(sample.sum()) + 1)
            order[:words] = torch.randperm(words, generator=generator)
        return orders.to(ids)


OBJECTIVES = {"pretrain": PretrainObjective, "parts": PartsObjective}          # of all others: train.py's


# ---------------------------------------------------------------------------------------------------------------------
# What differs from train.py, as train.fit takes it

def make_optimizers(objective, stage):
    """Muon for the hidden matrices of the model, AdamW for the rest: every direction of a matrix moves alike, and a
    small model needs a third of the samples. The tokenizer takes AdamW alone, its discriminator another one, because
    their gradients are clipped apart. -> list
    """
    if "vqgan" in stage.trains:
        critic = set(objective.discriminator.parameters()) if objective.discriminator else set()
        optimizers = train.make_optimizers(objective, stage, leave_out=critic)
        return optimizers + (train.make_optimizers(objective.discriminator, stage) if critic else [])
    hidden = {module.weight for module in objective.mentor.modules() if isinstance(module, nn.Linear)}
    hidden -= {objective.mentor.decoder.output.weight}
    matrices = [p for p in objective.parameters() if p.requires_grad and p in hidden]
    muon = Muon(matrices, lr=stage.lr, weight_decay=train.WEIGHT_DECAY, momentum=MOMENTUM)
    return [muon, *train.make_optimizers(objective, stage, leave_out=hidden)]


def begin_larger(mentor, config):
    """An untrained model with the parts and tokenizers of another, in a configuration's sizes. -> Mentor"""
    t5_decoder = hasattr(mentor.encoder.t5, "decoder")
    return type(mentor)(config, mentor.processor.tokenizer, t5_decoder, mentor.processor.words).eval()


def grow(mentor):
    """A larger model that draws the same at first: every code becomes two that lie close together, and two decoder
    layers are added which change nothing until they are trained. -> Mentor"""
    config, tensors = mentor.config, mentor.state_dict()
    codes, layers = 2 * config.vqgan.codes, config.decoder.layers
    sampling = replace(config.sampling, top_k=codes)
    config = replace(config, vqgan=replace(config.vqgan, codes=codes), sampling=sampling,
                     decoder=replace(config.decoder, codes=codes, layers=layers + 2))
    larger = begin_larger(mentor, config)
    for name in ("vqgan.quantize.embedding.weight", "decoder.tok_embeddings.weight", "decoder.output.weight"):
        tensors[name] = torch.cat([tensors[name], tensors[name]])                         # (2 * V, ...)
    embedding = F.normalize(tensors["vqgan.quantize.embedding.weight"], dim=-1)           # (V, e)
    tensors["vqgan.quantize.embedding.weight"] = embedding + TWIN * torch.randn_like(embedding)
    larger.load_state_dict(tensors, strict=False)
    for layer in larger.decoder.layers[layers:]:
        nn.init.zeros_(layer.attention.wo.weight)
        nn.init.zeros_(layer.feed_forward.w2.weight)
    return larger


def refine(mentor):
    """A model that sees twice as finely: references of twice the pixels a side in patches of the old size, and room for
    no fewer of them. A new patch's place is read off between the old ones. -> Mentor"""
    config, tensors = mentor.config, mentor.state_dict()
    side, patches = config.vision.grid, config.vision.grid**2
    images = -(-config.prefix_tokens // patches)
    room = config.prefix_tokens + images * 3 * patches                                    # an image is 4 P rows now
    config = replace(config, vision=replace(config.vision, image_size=2 * config.vision.image_size), prefix_tokens=room)
    places = tensors["encoder.clip.pos_embed"]                                            # (1 + P, C)
    between = places[1:].T.unflatten(1, (side, side)).unsqueeze(0)                        # (1, C, side, side)
    between = F.interpolate(between, 2 * side, mode="bilinear").flatten(2)[0].T           # (4 P, C)
    tensors["encoder.clip.pos_embed"] = torch.cat([places[:1], between])
    weights.lengthen(tensors, "projector.uncond", room, last=True)
    finer = begin_larger(mentor, config)
    finer.load_state_dict(tensors)
    return finer


def begin_anew(mentor, config, seed, t5_decoder=False):
    """A model of a configuration's sizes around the tokenizer of another model, all else random. -> Mentor"""
    codes = mentor.config.vqgan.codes
    config = replace(config, vqgan=mentor.config.vqgan, decoder=replace(config.decoder, codes=codes),
                     sampling=replace(config.sampling, top_k=codes))
    model = weights.random_model(config, mentor.processor.tokenizer, seed, t5_decoder)
    model.vqgan.load_state_dict(mentor.vqgan.state_dict())
    return model


def load_start(args, stage, log):
    """The weights that a stage starts from, all or, for --model and in stage parts, their tokenizer. -> Mentor"""
    parts = args.stage == "parts"              # which begins T5's decoder half, so nothing before it holds one
    config = weights.override(MODELS[args.model or "small"], stage.prefix_rope, stage.prefix_tokens)
    if args.connector:
        config = weights.with_connector(config, args.connector)
    if stage.init == "random":
        mentor = weights.random_model(config, small_tokenizer(), args.seed, t5_decoder=parts)
    else:
        mentor = train.load_start(args, replace(stage, t5_decoder=stage.t5_decoder and not parts), log,
                                  command="-m world.train")
        mentor = grow(mentor) if args.grow else mentor
        mentor = refine(mentor) if args.refine else mentor
        if parts or args.model:
            mentor = begin_anew(mentor, config if args.model else mentor.config, args.seed, t5_decoder=parts)
    mentor = weights.resize(mentor, args.size)
    return weights.new_connector(mentor, mentor.config.connector) if parts else mentor


def make_data(args, stage, mentor, log):
    """Painted samples, and held-out subjects to validate on; or, with --data, what files hold."""
    if args.data:
        return train.task_data(args, stage, mentor, log)
    options = {"image_size": mentor.config.image_size, "weights": stage.tasks}
    val = EmojiData(mentor.processor, seed=args.seed + 1, held_out=True, **options)
    if args.several:
        options["several"] = tuple(args.several)
    return EmojiData(mentor.processor, seed=args.seed, copies=args.copies, **options), val, val


def parse(argv):
    """The command line -> arguments, the stage's row with their overrides."""
    parser = train.make_parser(list(STAGES), __doc__)
    parser.add_argument("--model", choices=MODELS, help="begin all but the tokenizer anew, in this size (stage parts "
                        "begins anew in any case)")
    parser.add_argument("--grow", action="store_true", help="make the weights larger first, with twice the codes and "
                        "two decoder layers more")
    parser.add_argument("--refine", action="store_true", help="make the vision grid twice as fine first, with four "
                        "times the patches")
    share = cli.checked(float, lambda value: 0 <= value <= 1, "a number from 0 to 1")
    parser.add_argument("--copies", type=share, default=0.0, metavar="SHARE", help="of the painted subject-driven "
                        "pairs, whose picture has its reference's own background (default 0)")
    parser.add_argument("--several", nargs="+", type=int, choices=CROWDS, help="how many subjects a painted sample of "
                        "the task multi may have (default: two to four, two most often)")
    extra = parser.add_argument_group("stage vqgan")
    extra.add_argument("--adversarial", type=cli.nonnegative_float, default=0.0, metavar="WEIGHT",
                       help="of a discriminator, to which the tokenizer listens in the second half; default 0 = none")
    extra.add_argument("--lpips", nargs=2, metavar=("VGG", "HEADS"), help="weights of a perceptual loss: "
                       "vgg16-397923af.pth and vgg.pth")
    args = parser.parse_args(argv)
    if args.stage != "vqgan" and (args.adversarial or args.lpips):
        raise InputError(f"--adversarial and --lpips are for --stage vqgan; leave them out in stage {args.stage}")
    if args.model and (args.grow or args.refine):
        raise InputError("--grow and --refine make weights larger and --model begins them anew; give one of the two")
    if args.fsdp and args.stage in ("vqgan", *OBJECTIVES):
        raise InputError(f"--fsdp is for large models; stage {args.stage} trains without it")
    stage = train.override(STAGES[args.stage], args)
    if stage.init == "random" and (args.grow or args.refine):
        raise InputError("--grow and --refine make given weights larger, and this stage begins from random ones; add "
                         "--init")
    if args.copies and (args.data or "subject" not in stage.tasks):
        raise InputError("--copies is for painted pairs of the task subject; leave it out with --data, and in a stage "
                         "without that task")
    args.out = args.out or os.path.join("out", "tiny", args.stage)
    return args, stage


def main(argv=None):
    """The command line."""
    args, stage = parse(argv)
    options = {"make_objective": OBJECTIVES.get(args.stage, TokenObjective)}
    if args.stage == "vqgan":
        make_objective = partial(tokenizer.PixelObjective, adversarial=args.adversarial, lpips=args.lpips,
                                 fresh=stage.init == "random")
        options = {"make_objective": make_objective, "before_step": tokenizer.before_step}
    train.fit(args, stage, make_data=make_data, optimizers_of=make_optimizers, start=load_start, **options)


if __name__ == "__main__":
    cli.run(main)
