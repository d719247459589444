"""Who says how good a picture is.

`Scorer` embeds pictures and texts with the public CLIP and DINO, so that likeness is a cosine: CLIP-I, CLIP-T, DINO.

`VisionJudge` asks any model behind an OpenAI-compatible endpoint for concept preservation and prompt following, as
DreamBench++ does, with rubrics in our own words.

`Judge` names the scene, the held-out subject and its hue in a picture of the emoji world. It is trained on nothing but
true pictures, and its own accuracy on new ones stands beside every score.

Next: `eval.py`, which draws the pictures and does the sums.
"""
import base64
import functools
import http.client
import io
import json
import math
import os
import re
import time
import urllib.error
import urllib.request

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import nn
from tqdm import tqdm

import data
import scenes
import sprites
from data import InputError
from emoji import EmojiData
from encoder import CLIP_NAMES, DINO_NAMES, Clip, Dino, TextConfig, VisionConfig
from weights import download, fill_in, public_name, read_tensors

TRAIN_SEED, TRUE_SEED = 71, 72        # of the judge's training and of its examination
HUE_TOLERANCE = 45                    # degrees that a right hue may be off
BLACK = 0.2      # brightness, of 1, above which a drawn segmentation is not background: from here on the tokenizer's
                 # copies of training subjects agree best with the masks (IoU 0.935; 0.915 at 0.12, 0.936 at 0.25)
NETWORKS = {     # what scores, unless a folder is named: (repository, files)
    "clip": ("openai/clip-vit-base-patch32", ("pytorch_model.bin", "vocab.json", "merges.txt")),
    "dino": ("facebook/dino-vits16", ("pytorch_model.bin",)),
}
DINO_MEAN, DINO_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


# ---------------------------------------------------------------------------------------------------------------------
# Networks that score

def network_files(kind, source):
    """-> {file name: path} of a scoring network, from a folder or the hub."""
    if source is None:
        repo, names = NETWORKS[kind]
        return {name: download(repo, name) for name in names}
    if not os.path.isdir(source):
        raise InputError(f"{source}: no such folder; --{kind} takes one with the files of {NETWORKS[kind][0]}")
    return {name: os.path.join(source, name) for name in sorted(os.listdir(source))}


def read_network(files, kind, build, table, extras):
    """Weights of a network whose size is read off its tensors. build: tensors -> module."""
    path = next((path for name, path in files.items() if name.endswith((".safetensors", ".bin", ".pt"))), None)
    if path is None:
        repo, names = NETWORKS[kind]
        raise InputError(f"--{kind}: the folder holds no weights; put {names[0]} of {repo} there")
    tensors = {name: tensor for name, tensor in read_tensors(path).items() if not re.search(extras, name)}
    try:
        with torch.device("meta"):
            model = build(tensors)
    except (KeyError, IndexError) as error:
        raise InputError(f"{path}: holds no {kind.upper()} ({error} is missing); use {NETWORKS[kind][0]}'s") from None
    fill_in(model, tensors, {public_name(name, table): name for name in model.state_dict()}, path)
    return model.eval().requires_grad_(False)


def clip_of(tensors):
    """The CLIP these tensors are of; all published ones have heads of 64 channels."""
    def tower(name):
        layers = len({key.split(".")[3] for key in tensors if key.startswith(f"{name}_model.encoder.layers.")})
        mlp, width = tensors[f"{name}_model.encoder.layers.0.mlp.fc1.weight"].shape
        positions = len(tensors[f"{name}_model.embeddings.position_embedding.weight"])
        return dict(width=width, layers=layers, heads=width // 64, mlp=mlp), positions
    (vision, places), (text, positions) = tower("vision"), tower("text")
    patch = tensors["vision_model.embeddings.patch_embedding.weight"].size(-1)
    vocab = len(tensors["text_model.embeddings.token_embedding.weight"])
    return Clip(VisionConfig(**vision, image_size=patch * round((places - 1)**0.5), patch_size=patch),
                TextConfig(**text, vocab_size=vocab, positions=positions, end_id=vocab - 1),
                len(tensors["visual_projection.weight"]))


def dino_of(tensors):
    """The DINO these tensors are of."""
    width, patch = (tensors["embeddings.patch_embeddings.projection.weight"].size(k) for k in (0, -1))
    layers = len({key.split(".")[2] for key in tensors if key.startswith("encoder.layer.")})
    return Dino(patch, width, layers, width // 64)


def clip_tokenizer(vocab, merges):
    """CLIP's byte-level BPE: lower case, words end in </w>, <|startoftext|> and <|endoftext|> around a text."""
    tokenizer = Tokenizer(models.BPE.from_file(vocab, merges, end_of_word_suffix="</w>", unk_token="<|endoftext|>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "),
                                                 normalizers.Lowercase()])
    words = Regex(r"'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(words, "removed", invert=True), pre_tokenizers.ByteLevel(add_prefix_space=False)])
    first, last = ((name, tokenizer.token_to_id(name)) for name in ("<|startoftext|>", "<|endoftext|>"))
    tokenizer.post_processor = processors.RobertaProcessing(last, first, trim_offsets=False, add_prefix_space=False)
    return tokenizer


def dino_pixels(image):
    """PIL RGB picture -> (3, 224, 224) fp32: shorter side 256 bicubic, the centre, ImageNet's mean and deviation."""
    square = data.center_square(image, 256, rounding=int).crop((16, 16, 240, 240))
    pixels = (np.asarray(square, dtype=np.float32) / 255 - np.float32(DINO_MEAN)) / np.float32(DINO_STD)
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()                         # (3, 224, 224)


class Scorer:
    """Embeddings of pictures and texts, of length 1, so that a product is a cosine.

    clip, dino: folders, None = from the hub; dino may be False, to do without it.
    """

    def __init__(self, clip, dino, device):
        files = network_files("clip", clip)
        self.device = device
        self.clip = read_network(files, "clip", clip_of, CLIP_NAMES, "position_ids$").to(device)
        if missing := {"vocab.json", "merges.txt"} - set(files):
            raise InputError(f"--clip: the folder lacks {' and '.join(sorted(missing))} of {NETWORKS['clip'][0]}")
        self.tokenizer = clip_tokenizer(files["vocab.json"], files["merges.txt"])
        self.tokenizer.enable_truncation(self.clip.text.config.positions)
        self.dino = None
        if dino is not False:
            self.dino = read_network(network_files("dino", dino), "dino", dino_of, DINO_NAMES, r"^pooler\.").to(device)

    @torch.inference_mode()
    def pictures(self, images, batch=32):
        """PIL pictures -> {"clip": (N, C), "dino": (N, C)}"""
        size, parts = self.clip.vision.config.image_size, []
        for start in range(0, len(images), batch):
            chunk = images[start:start + batch]
            part = {"clip": self.clip.embed_image(
                torch.stack([data.clip_pixels(image, size) for image in chunk]).to(self.device))}
            if self.dino:
                part["dino"] = self.dino(torch.stack([dino_pixels(image) for image in chunk]).to(self.device))
            parts.append(part)
        return {name: F.normalize(torch.cat([part[name] for part in parts]), dim=-1).cpu() for name in parts[0]}

    @torch.inference_mode()
    def text(self, text):
        """-> (C,)"""
        ids = torch.tensor([self.tokenizer.encode(text).ids], device=self.device)
        return F.normalize(self.clip.embed_text(ids)[0], dim=-1).cpu()


# ---------------------------------------------------------------------------------------------------------------------
# A vision model behind HTTP

RUBRICS = {
    "cp": """The first picture shows a reference: {subject}. The second was made by a program that was to show the very
same one again. Compare only the subject, not background, pose or style of the picture. Look at shape, colours, texture
and, where there is a face, at its features. Give one whole number:
4 = the same one, in every detail that can be seen
3 = the same one, with small differences
2 = alike, but several features differ
1 = of the same kind at most
0 = another thing, or nothing of it to be seen""",
    "pf": """This picture was made for the prompt: "{prompt}"
Judge only whether it shows what the prompt asks for: the things, their qualities, their number, what they do, where
they are, and the style if one is named. Beauty does not count. Give one whole number:
4 = all of it
3 = nearly all, a detail is missing or wrong
2 = about half
1 = a small part
0 = nothing of it""",
}
ANSWER = "\n\nSay in a sentence what you see, then end with a line of the form\nScore: N"


class Unreachable(Exception):
    """One request failed in a way that may pass."""


class VisionJudge:
    """A vision model behind an OpenAI-compatible endpoint. url: up to and with /v1; wait: seconds before the second
    try, doubled for every further one; timeout: seconds."""

    def __init__(self, url, model, key=None, tries=5, wait=1.0, timeout=60):
        self.url, self.model, self.key = url.rstrip("/"), model, key
        self.tries, self.wait, self.timeout = tries, wait, timeout

    def request(self, text, pictures, temperature):
        """One question. -> what the model says; raises Unreachable where it is worth another try, else InputError."""
        content = [{"type": "text", "text": text}]
        for picture in pictures:
            buffer = io.BytesIO()
            picture.save(buffer, "PNG")
            link = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
            content.append({"type": "image_url", "image_url": {"url": link}})
        body = {"model": self.model, "temperature": temperature, "max_tokens": 300,
                "messages": [{"role": "user", "content": content}]}
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {self.key}"} if self.key else {})
        try:
            request = urllib.request.Request(f"{self.url}/chat/completions", json.dumps(body).encode(), headers)
            with urllib.request.urlopen(request, timeout=self.timeout) as answer:
                return str(json.load(answer)["choices"][0]["message"]["content"])
        except urllib.error.HTTPError as error:
            if error.code in (408, 409, 429) or error.code >= 500:
                raise Unreachable(f"HTTP {error.code}") from None
            raise InputError(f"{self.url}: the judge refused the question (HTTP {error.code} {error.reason}); check "
                             f"--judge-url, --judge-model and the key in OPENAI_API_KEY") from None
        except (OSError, http.client.HTTPException) as error:                # refused, reset, too slow
            raise Unreachable(str(getattr(error, "reason", error)) or type(error).__name__) from None
        except (ValueError, KeyError, IndexError, TypeError):
            raise Unreachable("an answer that is not a chat completion") from None

    def score(self, rubric, pictures, **words):
        """-> score 0 to 4, or None if no answer could be read; the answers in order. InputError where none comes."""
        answers, text = [], RUBRICS[rubric].format(**words) + ANSWER
        for k in range(self.tries):
            if k:
                time.sleep(self.wait * 2 ** (k - 1))
            try:
                answers.append(self.request(text, pictures, temperature=0.7 if answers else 0))
            except Unreachable as error:
                reason = error
                continue
            if found := re.findall(r"score\W{0,5}([0-4])(?!\.?\d)", answers[-1], re.IGNORECASE):
                return int(found[-1]), answers
        if not answers:
            raise InputError(f"{self.url}: the judge gave no answer in {self.tries} tries ({reason}); what is scored "
                             f"is kept, give the same command again later")
        return None, answers


# ---------------------------------------------------------------------------------------------------------------------
# The emoji world

def held_out():
    """The subjects that no model has seen in training, by number."""
    return [i for i, subject in enumerate(sprites.subjects()) if subject.held_out]


class Judge(nn.Module):
    """(B, 3, 64, 64) in [-1, 1] -> scene logits (B, 30), logits of the held-out subjects (B, 89), hue as a direction
    (B, 2)"""

    def __init__(self):
        super().__init__()
        layers, c = [], 3
        for width, stride in ((32, 2), (64, 1), (64, 2), (128, 1), (128, 2), (256, 1), (256, 2)):
            layers += [nn.Conv2d(c, width, 3, stride, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
            c = width
        self.trunk = nn.Sequential(*layers, nn.Flatten(), nn.Linear(256 * 16, 512), nn.ReLU(), nn.Dropout(0.2))
        self.scene = nn.Linear(512, len(scenes.SCENES))
        self.subject = nn.Linear(512, len(held_out()))
        self.hue = nn.Linear(512, 2)

    def forward(self, pixels):
        h = self.trunk(pixels)                                                            # (B, 512)
        return self.scene(h), self.subject(h), self.hue(h)


def plain_prompter():
    """A prompter for samples whose prompts nobody reads."""
    return data.Prompter(data.byte_tokenizer(), patches=1, max_tokens=1 << 12)


@functools.cache
def own_hue(subject):
    """The hue of all of a subject's colours together, before it is turned. -> radians"""
    pixels = np.asarray(sprites.subjects()[subject].sprite)
    red, green, blue = pixels[pixels[..., 3] > 127, :3].mean(axis=0)
    return math.atan2((green - blue) * 3**0.5, 2 * red - green - blue)


def truth(metas):
    """What is to be seen: -> scene (B,), subject (B,), a place among the held-out ones, hue in radians (B,)"""
    names, subjects = list(scenes.SCENES), held_out()
    scene = torch.tensor([names.index(meta["scene"]) for meta in metas])
    subject = torch.tensor([subjects.index(meta["subject"]) for meta in metas])
    hue = torch.tensor([own_hue(meta["subject"]) + math.radians(meta["hue"]) for meta in metas])
    return scene, subject, hue


def blurred(pixels, generator):
    """Half of the pictures a little out of focus, so that the judge does not live on single pixels."""
    soft = F.avg_pool2d(F.pad(pixels, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    return torch.lerp(pixels, soft, torch.rand(len(pixels), 1, 1, 1, generator=generator).mul(2).sub(1).clamp(min=0))


def train_judge(path, steps, batch):
    """Trains the judge on true pictures and writes it to a file. -> what `examine` says of it"""
    torch.manual_seed(TRAIN_SEED)
    generator, model = torch.Generator().manual_seed(TRAIN_SEED), Judge()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    world = EmojiData(plain_prompter(), weights={"t2i": 1}, seed=TRAIN_SEED, held_out=True, extras=False)
    bar = tqdm(range(steps), unit="step")
    for step in bar:
        samples = [world[step * batch + k] for k in range(batch)]
        scene, subject, hue = truth([sample["meta"] for sample in samples])
        out = model(blurred(torch.stack([sample["target"] for sample in samples]), generator))
        direction = torch.stack([hue.cos(), hue.sin()], dim=1)                            # (B, 2)
        loss = (F.cross_entropy(out[0], scene) + F.cross_entropy(out[1], subject)
                + (1 - F.cosine_similarity(out[2], direction)).mean())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        bar.set_postfix_str(f"loss {loss.item():.3f}")
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    save_file(model.state_dict(), f"{path}.part")
    os.replace(f"{path}.part", path)
    return examine(model.eval())


def load_judge(path):
    """The judge that `python eval.py judge` trained."""
    if not os.path.exists(path):
        raise InputError(f"{path}: there is no judge yet; train it with `python eval.py judge`")
    model = Judge()
    fill_in(model, read_tensors(path), {name: name for name in model.state_dict()}, path)
    return model.eval()


@torch.no_grad()
def verdict(judge, pixels, metas):
    """Scores of pictures (B, 3, 64, 64) that should show what metas say. -> {score: (B,) of 0 and 1}"""
    scene, subject, hue = truth(metas)
    scenes_seen, subjects_seen, direction = judge(pixels)
    ahead = (subjects_seen > subjects_seen.gather(1, subject[:, None])).sum(dim=1)        # (B,) better placed ones
    off = torch.atan2(direction[:, 1], direction[:, 0]) - hue
    off = torch.rad2deg(torch.atan2(off.sin(), off.cos()).abs())                          # degrees, 0 to 180
    return {"scene": (scenes_seen.argmax(dim=1) == scene).float(), "subject": (ahead == 0).float(),
            "subject_top5": (ahead < 5).float(), "hue": (off <= HUE_TOLERANCE).float()}


def examine(judge, n=1000, seed=TRUE_SEED):
    """The judge's own accuracy on true pictures of held-out subjects. -> {score: share}"""
    samples = EmojiData(plain_prompter(), weights={"t2i": 1}, seed=seed, held_out=True, extras=False)
    parts = []
    for start in range(0, n, 100):
        batch = [samples[k] for k in range(start, start + 100)]
        parts.append(verdict(judge, torch.stack([s["target"] for s in batch]), [s["meta"] for s in batch]))
    return {name: torch.cat([part[name] for part in parts]).mean().item() for name in parts[0]}


def decibels(drawn, true):
    """PSNR of each picture. (B, 3, H, W) twice, in [-1, 1] -> (B,) dB"""
    return -10 * ((drawn.clamp(-1, 1) - true) / 2).square().mean((1, 2, 3)).log10()


def distance(drawn, true):
    """Mean over pixels of the distance of two colours, R, G and B in [0, 1]. (B, 3, H, W) twice -> (B,)"""
    return ((drawn.clamp(-1, 1) - true) / 2).norm(dim=1).mean((1, 2))


def iou(drawn, metas):
    """Overlap of what is not black in drawn segmentations with the true masks. -> (B,)"""
    object_drawn = ((drawn + 1) / 2).amax(dim=1) > BLACK                                  # (B, H, W)
    mask = torch.from_numpy(np.stack([m["mask"] for m in metas])) > 0
    return (object_drawn & mask).sum((1, 2)) / (object_drawn | mask).sum((1, 2))
