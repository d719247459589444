"""Networks and services that only score images; nothing here is trained or sampled from.

    images --Clip, Dino--> embeddings of length 1, so that likeness is a cosine: CLIP-I, CLIP-T, DINO      (Scorer)
    images --HTTP--> a vision model that gives 0 to 4 for concept preservation and prompt following       (VisionJudge)

A library: `python eval.py dreambench ...` samples the images and averages the scores; construct.py asks other services
through `Endpoint`. The public weights come from the hub, or from the folders that --clip and --dino name.
Shape letters: B batch, P patches of an image, L length of a text, C width.

Next: `eval.py`.
"""
import base64
import http.client
import io
import json
import os
import re
import socket
import ssl
import statistics
import time
import urllib.error
import urllib.request
from contextlib import suppress
from dataclasses import dataclass
from urllib.parse import urlsplit

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import nn

import cli
import data
from cli import InputError
from encoder import ClipVision, VisionConfig, VitBlock
from weights import CLIP_NAMES, download, fill_in, public_name, read_tensors

NETWORKS = {     # used unless a folder is named: (repository, files)
    "clip": ("openai/clip-vit-base-patch32", ("pytorch_model.bin", "vocab.json", "merges.txt")),
    "dino": ("facebook/dino-vits16", ("pytorch_model.bin",)),
}
DINO_MEAN, DINO_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)        # ImageNet's
BLACK = 0.2      # brightness, of 1, up to which a pixel of a drawn segmentation counts as background: the value at
                 # which the emoji world's tokenizer's copies of training subjects agree best with the masks (IoU 0.935;
                 # 0.915 at 0.12, 0.936 at 0.25)
CATEGORIES = ("animal", "human", "object", "style")                # of DreamBench++'s pictures; of its nine prompts:
PROMPT_GROUPS = {"photorealistic": range(4), "style transfer": range(4, 7), "imaginative": range(7, 9)}
MAX_ANSWER = 4 << 20                                                      # bytes of an HTTP answer; more is an error


# ---------------------------------------------------------------------------------------------------------------------
# CLIP with its text half. https://github.com/openai/CLIP/blob/main/clip/model.py

@dataclass(frozen=True)
class TextConfig:
    """CLIP's text tower; the defaults go with ViT-L/14."""
    width: int = 768
    layers: int = 12
    heads: int = 12
    mlp: int = 3072
    vocab_size: int = 49408
    positions: int = 77
    end_id: int = 49407


class ClipText(nn.Module):
    """Causal transformer over a text, pooled at the first end token."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.token_embed = nn.Embedding(config.vocab_size, config.width)
        self.pos_embed = nn.Parameter(torch.randn(config.positions, config.width) * 0.02)
        self.blocks = nn.ModuleList(VitBlock(config.width, config.heads, config.mlp) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.width)

    def forward(self, ids):
        """(B, L) ids, an end token in each row -> (B, C)"""
        x = self.token_embed(ids) + self.pos_embed[:ids.size(1)]                          # (B, L, C)
        for block in self.blocks:
            x = block(x, causal=True)
        first_end = (ids == self.config.end_id).int().argmax(dim=1)                       # (B,)
        return self.norm(x[torch.arange(len(x), device=x.device), first_end])             # (B, C)


class Clip(nn.Module):
    """Both towers and their projections into one space, where the cosine is the score."""

    def __init__(self, vision=VisionConfig(), text=TextConfig(), dim=768):
        super().__init__()
        self.vision, self.text = ClipVision(vision), ClipText(text)
        self.vision_projection = nn.Linear(vision.width, dim, bias=False)
        self.text_projection = nn.Linear(text.width, dim, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor(2.6592))

    def embed_images(self, pixels):
        """(B, 3, c, c) normalised pixels -> (B, dim), not normalised."""
        x = self.vision.forward_features(pixels, self.vision.config.layers)               # (B, 1 + P, C)
        return self.vision_projection(self.vision.norm_post(x[:, 0]))                     # (B, dim)

    def embed_texts(self, ids):
        """(B, L) ids -> (B, dim), not normalised."""
        return self.text_projection(self.text(ids))                                       # (B, dim)


CLIP_TEXT_NAMES = (  # ours -> public; CLIP_NAMES + CLIP_TEXT_NAMES is the table of the whole CLIP
    (r"^text\.blocks", "text_model.encoder.layers"),
    (r"^text\.pos_embed", "text_model.embeddings.position_embedding.weight"),
    (r"^text\.token_embed", "text_model.embeddings.token_embedding"),
    (r"^text\.norm", "text_model.final_layer_norm"),
    (r"^vision_projection", "visual_projection"),
)


# ---------------------------------------------------------------------------------------------------------------------
# DINO. https://github.com/facebookresearch/dino/blob/main/vision_transformer.py

class Dino(nn.Module):
    """facebook/dino-vits16 and dino-vits8: an image embedding that tells subjects of one class apart."""

    def __init__(self, patch_size=16, width=384, layers=12, heads=6, image_size=224):
        super().__init__()
        self.patch_embed = nn.Conv2d(3, width, patch_size, patch_size)
        self.class_embed = nn.Parameter(torch.randn(1, 1, width) * 0.02)
        self.pos_embed = nn.Parameter(torch.randn(1, (image_size // patch_size)**2 + 1, width) * 0.02)
        self.blocks = nn.ModuleList(VitBlock(width, heads, 4 * width, F.gelu, eps=1e-12) for _ in range(layers))
        self.norm = nn.LayerNorm(width, eps=1e-12)

    def forward(self, pixels):
        """(B, 3, 224, 224) normalised pixels -> class token (B, C)"""
        patches = self.patch_embed(pixels).flatten(2).transpose(1, 2)                     # (B, P, C)
        x = torch.cat([self.class_embed.expand(len(pixels), -1, -1), patches], dim=1)     # (B, 1 + P, C)
        x = x + self.pos_embed
        for block in self.blocks:
            x = block(x)
        return self.norm(x[:, 0])                                                         # (B, C)


DINO_NAMES = (  # ours -> public, regular expressions applied in order
    (r"^blocks\.", "encoder.layer."),
    (r"\.norm1\.", ".layernorm_before."),
    (r"\.norm2\.", ".layernorm_after."),
    (r"\.attn\.q\.", ".attention.attention.query."),
    (r"\.attn\.k\.", ".attention.attention.key."),
    (r"\.attn\.v\.", ".attention.attention.value."),
    (r"\.attn\.o\.", ".attention.output.dense."),
    (r"\.fc1\.", ".intermediate.dense."),
    (r"\.fc2\.", ".output.dense."),
    (r"^patch_embed", "embeddings.patch_embeddings.projection"),
    (r"^class_embed", "embeddings.cls_token"),
    (r"^pos_embed", "embeddings.position_embeddings"),
    (r"^norm\.", "layernorm."),
)


# ---------------------------------------------------------------------------------------------------------------------
# Reading the public files

def network_files(kind, folder):
    """-> {file name: path} of a scoring network; folder: None = from the hub."""
    repo, names = NETWORKS[kind]
    if folder is None:
        return {name: download(repo, name) for name in names}
    if not os.path.isdir(folder):
        raise InputError(f"--{kind} {folder}: no such folder; name one with the files of {repo}")
    return {name: os.path.join(folder, name) for name in sorted(os.listdir(folder))}


def published_name(config):
    """What a CLIP of that image tower is called, and whether published CMMD figures use it. -> str, bool"""
    letter = {768: "B", 1024: "L", 1280: "H"}.get(config.width, f"{config.width} channels")
    return f"ViT-{letter}/{config.patch_size} at {config.image_size} pixels", (
        config.width, config.patch_size, config.image_size) == (1024, 14, 336)


def clip_of(tensors):
    """The Clip that these public tensors belong to; all published ones have heads of 64 channels."""
    def tower_sizes(tower):
        layers = {name.split(".")[3] for name in tensors if name.startswith(f"{tower}_model.encoder.layers.")}
        mlp, width = tensors[f"{tower}_model.encoder.layers.0.mlp.fc1.weight"].shape
        return {"width": width, "layers": len(layers), "heads": width // 64, "mlp": mlp}

    patch_size = tensors["vision_model.embeddings.patch_embedding.weight"].size(-1)
    patches = len(tensors["vision_model.embeddings.position_embedding.weight"]) - 1       # one row is the class token
    vision = VisionConfig(**tower_sizes("vision"), image_size=patch_size * round(patches**0.5), patch_size=patch_size)
    vocab_size = len(tensors["text_model.embeddings.token_embedding.weight"])
    positions = len(tensors["text_model.embeddings.position_embedding.weight"])
    text = TextConfig(**tower_sizes("text"), vocab_size=vocab_size, positions=positions, end_id=vocab_size - 1)
    return Clip(vision, text, len(tensors["visual_projection.weight"]))


def dino_of(tensors):
    """The Dino that these public tensors belong to."""
    patch_embed = tensors["embeddings.patch_embeddings.projection.weight"]                # (C, 3, patch, patch)
    width, patch_size = patch_embed.size(0), patch_embed.size(-1)
    layers = {name.split(".")[2] for name in tensors if name.startswith("encoder.layer.")}
    return Dino(patch_size, width, len(layers), width // 64)


def read_network(kind, files, build, table, unused):
    """A frozen network whose size is read off its tensors. build: tensors -> module; unused: pattern of names."""
    repo, names = NETWORKS[kind]
    path = next((path for name, path in files.items() if name.endswith((".safetensors", ".bin", ".pt"))), None)
    if path is None:
        raise InputError(f"--{kind}: the folder holds no weights; put {names[0]} of {repo} there")
    tensors = {name: tensor for name, tensor in read_tensors(path).items() if not re.search(unused, name)}
    try:
        with torch.device("meta"):
            network = build(tensors)
    except (LookupError, ValueError, TypeError, ArithmeticError, RuntimeError) as error:
        reason = f"{error} is missing" if isinstance(error, KeyError) else error
        raise InputError(f"{path}: holds no {kind.upper()} ({str(reason):.200}); use the file of {repo}") from None
    fill_in(network, tensors, {public_name(name, table): name for name in network.state_dict()}, path)
    return network.eval().requires_grad_(False)


def clip_tokenizer(vocab, merges):
    """CLIP's byte-level BPE from the paths of its two files: lower case, words end in </w>, <|startoftext|> and
    <|endoftext|> around a text. https://github.com/openai/CLIP/blob/main/clip/simple_tokenizer.py"""
    cli.check_file(vocab, "a vocabulary of CLIP", most=64 << 20)
    cli.check_file(merges, "CLIP's merges", most=64 << 20)
    try:
        tokenizer = Tokenizer(models.BPE.from_file(vocab, merges, end_of_word_suffix="</w>", unk_token="<|endoftext|>"))
    except Exception as error:                 # tokenizers raises no narrower class
        raise InputError(f"{vocab}: not a vocabulary of CLIP ({str(error):.200}); copy it and merges.txt again"
                         ) from None
    start_id, end_id = tokenizer.token_to_id("<|startoftext|>"), tokenizer.token_to_id("<|endoftext|>")
    if start_id is None or end_id is None:
        raise InputError(f"{vocab}: lacks <|startoftext|> or <|endoftext|>; use the file of {NETWORKS['clip'][0]}")
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "),
                                                 normalizers.Lowercase()])
    words = Regex(r"'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(words, "removed", invert=True), pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.post_processor = processors.RobertaProcessing(
        ("<|endoftext|>", end_id), ("<|startoftext|>", start_id), trim_offsets=False, add_prefix_space=False)
    return tokenizer


# ---------------------------------------------------------------------------------------------------------------------
# Scores by embeddings

def dino_pixels(image):
    """PIL RGB image -> (3, 224, 224) fp32: shorter side to 256 (bicubic), centre crop, ImageNet's mean and std."""
    square = data.center_square(image, 256, rounding=int).crop((16, 16, 240, 240))
    pixels = (np.asarray(square, dtype=np.float32) / 255 - np.float32(DINO_MEAN)) / np.float32(DINO_STD)
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()                         # (3, 224, 224)


def color_distance(images, targets):
    """L2: the mean over pixels of the distance between two colours (R, G, B), each in [0, 1].
    (B, 3, H, W) twice, in [-1, 1] -> (B,)"""
    return ((images.clamp(-1, 1) - targets) / 2).norm(dim=1).mean((1, 2))                 # (B,)


def mask_iou(images, masks):
    """Overlap of what is not black in drawn segmentations with the true masks; nan where both show nothing.
    images: (B, 3, H, W) in [-1, 1]; masks: (B, H, W) bool -> (B,)"""
    foreground = ((images + 1) / 2).amax(dim=1) > BLACK                                   # (B, H, W)
    return (foreground & masks).sum((1, 2)) / (foreground | masks).sum((1, 2))            # (B,)


class Scorer:
    """CLIP and DINO. clip, dino: folders of their files, None = from the hub."""

    def __init__(self, clip, dino, device, use_dino=True):
        files = network_files("clip", clip)
        network = read_network("clip", files, clip_of, CLIP_NAMES + CLIP_TEXT_NAMES, unused="position_ids$")
        if missing := {"vocab.json", "merges.txt"} - set(files):
            raise InputError(f"--clip: the folder lacks {' and '.join(sorted(missing))} of {NETWORKS['clip'][0]}")
        self.tokenizer = clip_tokenizer(files["vocab.json"], files["merges.txt"])
        self.tokenizer.enable_truncation(network.text.config.positions)
        if self.tokenizer.get_vocab_size() > network.text.config.vocab_size:
            raise InputError(f"{files['vocab.json']}: has more tokens than the weights beside it; use the same CLIP's")
        self.device = device
        self.clip, self.dino = network.to(device), None
        if use_dino:
            files = network_files("dino", dino)
            self.dino = read_network("dino", files, dino_of, DINO_NAMES, unused=r"^pooler\.").to(device)

    @torch.inference_mode()
    def embed_images(self, images, batch=32):
        """PIL images -> {"clip": (B, C), "dino": (B, C)} on the CPU, rows of length 1."""
        clip_rows, dino_rows = [], []
        for start in range(0, len(images), batch):
            chunk = images[start:start + batch]
            pixels = torch.stack([data.clip_pixels(image, self.clip.vision.config.image_size) for image in chunk])
            clip_rows.append(self.clip.embed_images(pixels.to(self.device)))
            if self.dino is not None:
                pixels = torch.stack([dino_pixels(image) for image in chunk])
                dino_rows.append(self.dino(pixels.to(self.device)))
        embeddings = {"clip": F.normalize(torch.cat(clip_rows), dim=-1).cpu()}            # (B, C)
        if self.dino is not None:
            embeddings["dino"] = F.normalize(torch.cat(dino_rows), dim=-1).cpu()          # (B, C)
        return embeddings

    @torch.inference_mode()
    def embed_text(self, text):
        """-> (C,) on the CPU, of length 1; the text is cut to what CLIP reads."""
        ids = torch.tensor([self.tokenizer.encode(text).ids], device=self.device)         # (1, L)
        return F.normalize(self.clip.embed_texts(ids)[0], dim=-1).cpu()                   # (C,)


# ---------------------------------------------------------------------------------------------------------------------
# Scores by a vision model behind HTTP

RUBRICS = {      # after DreamBench++ (arXiv 2406.16855), in our own words; cp_style: for references of a style
    "cp": """The first image shows a reference: {subject}. The second was made by a program that was asked to show the
very same one. Compare only the subject, not the background, pose or style of the image. Look at shape, colours, texture
and, if there is a face, its features. Give one whole number:
4 = the same one in every visible detail
3 = the same one with small differences
2 = similar, but several features differ
1 = only the same kind of thing
0 = something else, or no subject at all""",
    "cp_style": """The first image is an example of a style: {subject}. The second was made by a program that was asked
to show something in that very style. Compare only how the two are made, not what they show. Look at colours and light,
at lines or brush strokes, at texture and material, and at how shapes are simplified. Give one whole number:
4 = one artist could have made both
3 = the same style with small differences
2 = a similar style, but several of these traits differ
1 = only a trace of the style
0 = another style""",
    "pf": """This image was made for the prompt: "{prompt}"
Judge only whether it shows what the prompt asks for: the things, their properties, their number, what they do, where
they are, and the style if one is named. Beauty does not count. Give one whole number:
4 = all of it
3 = nearly all; one detail is missing or wrong
2 = about half
1 = a small part
0 = none of it""",
}
ANSWER = "\n\nSay in one sentence what you see, then end with a line of the form\nScore: N"


class Unreachable(Exception):
    """One request failed, but another try may succeed. hopeless: not if the address has never answered before."""

    def __init__(self, reason, hopeless=False):
        super().__init__(reason)
        self.hopeless = hopeless


class NoRedirect(urllib.request.HTTPRedirectHandler):
    """Makes a redirect an HTTPError: urllib would send the key on to the other host."""

    def redirect_request(self, *args):
        return None


CONTENT = re.compile(rb"content|policy|safety|moderat|sensitive", re.IGNORECASE)     # in an error: the question's fault


class Refused(InputError):
    """The service works but does not answer this very question; another one it may."""


class Endpoint:
    """A service with OpenAI's HTTP interface; a subclass says what `path` it asks there.

    url: up to and including /v1; wait: seconds before the second try, doubled for each further one; timeout: seconds.
    flag, name, kept: for messages: whose flags name it, what it is, and what a run that ends here has kept.
    """
    flag, name, kept, path = "--judge", "judge", "scored", "chat/completions"

    def __init__(self, url, model, key=None, tries=5, wait=1.0, timeout=60):
        if "@" in url:                         # not repeated in the message, since it holds a password
            raise InputError(f"{self.flag}-url: holds a user name or password; leave it out and put the key into the "
                             "environment variable OPENAI_API_KEY")
        try:
            parts = urlsplit(url)
            valid = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
        except ValueError:                     # a port that is no number, half an IPv6 address
            valid = False
        if not valid or not re.fullmatch("[!-~]+", url):
            raise InputError(f"{self.flag}-url {url!r}: not an address; give one like https://host/v1")
        if key and not re.fullmatch("[!-~]+", key):
            raise InputError("OPENAI_API_KEY: holds spaces or other characters that no key has; copy it again")
        path = parts.path.rstrip("/")
        self.address = f"{parts.scheme}://{parts.netloc}{path}"        # for messages: a query may hold secrets too
        self.url = parts._replace(path=f"{path}/{self.path}", fragment="").geturl()
        self.model, self.key, self.tries, self.wait, self.timeout = model, key, tries, wait, timeout
        self.opener, self.answered = urllib.request.build_opener(NoRedirect), False

    def post(self, body, most=MAX_ANSWER):
        """Asks once. most: bytes of the answer. -> what its JSON says; Unreachable if another try may succeed, else
        InputError"""
        headers = {"Content-Type": "application/json"}
        if self.key:
            headers["Authorization"] = f"Bearer {self.key}"
        request = urllib.request.Request(self.url, json.dumps(body).encode(), headers)
        try:
            with self.opener.open(request, timeout=self.timeout) as response:
                answer = response.read(most + 1)
        except urllib.error.HTTPError as error:
            self.raise_for(error)
        except (OSError, http.client.HTTPException) as error:                # refused, reset, too slow
            reason = getattr(error, "reason", error)
            nobody = isinstance(reason, (ConnectionRefusedError, socket.gaierror, ssl.SSLError))
            raise Unreachable(str(reason)[:200] or type(error).__name__, nobody) from None
        if len(answer) > most:
            raise Unreachable(f"an answer of more than {most >> 20} MiB", hopeless=True)
        try:
            return json.loads(answer)
        except (ValueError, RecursionError):
            return None                        # which is no answer of any kind that is looked for

    def chat(self, messages, **options):
        """Asks a chat model once. options: of the request. -> its first choice, with ["message"]["content"]"""
        answer = self.post({"model": self.model, "messages": messages, **options})
        with suppress(LookupError, TypeError, AttributeError):
            choice = answer["choices"][0]
            if choice["message"].keys() >= {"content"}:
                return choice
        raise Unreachable("an answer that is not a chat completion", hopeless=True)

    def raise_for(self, error):
        """The exception that an HTTPError stands for."""
        status, text = error.code, b""
        if status in (408, 409, 429) or status >= 500:
            raise Unreachable(f"HTTP {status}") from None
        if 300 <= status < 400:
            raise InputError(f"{self.address}: the {self.name} redirects to another address (HTTP {status}), where the "
                             f"key is not sent; give that address as {self.flag}-url") from None
        with suppress(OSError, http.client.HTTPException):
            text = error.read(4096)
        kind = Refused if status in (400, 413, 422) and (self.answered or CONTENT.search(text)) else InputError
        raise kind(f"{self.address}: the {self.name} refused the question (HTTP {status}); check {self.flag}-url, "
                   f"{self.flag}-model and the key in OPENAI_API_KEY") from None

    def answers(self, ask):
        """Yields what `ask()` returns, as often as asked for within the tries; those that fail are waited for and
        passed over. InputError if there was no answer at all, or none that this address ever gave."""
        answers = 0
        for attempt in range(self.tries):
            if attempt:
                time.sleep(self.wait * 2**(attempt - 1))
            try:
                answer = ask()
            except Unreachable as error:
                reason = error
                if error.hopeless and not self.answered:
                    raise InputError(f"{self.address}: no answer of a {self.name} ({reason}); check {self.flag}-url"
                                     ) from None
                continue
            self.answered = True
            answers += 1
            yield answer
        if not answers:
            raise InputError(f"{self.address}: the {self.name} gave no answer in {self.tries} tries ({reason}); what "
                             f"is {self.kept} is kept, give the same command again later")


def user_message(text, urls):
    """A question to a chat model, with pictures as data URLs."""
    pictures = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    return {"role": "user", "content": [{"type": "text", "text": text}, *pictures]}


def data_url(image, form="PNG", **options):
    """A PIL image as a request holds it. options: of PIL's `save`"""
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return f"data:image/{form.lower()};base64," + base64.b64encode(buffer.getvalue()).decode()


class VisionJudge(Endpoint):
    """A vision model that scores images."""

    def request(self, text, images):
        """Asks once, at temperature 1 as DreamBench++'s own scripts do, so that passes differ. -> the model's answer

        Raises Unreachable if another try may succeed, else InputError.
        """
        choice = self.chat([user_message(text, map(data_url, images))], temperature=1, max_tokens=300)
        return str(choice["message"]["content"])

    def score(self, rubric, images, subject, prompt):
        """Asks until an answer can be read. -> score 0 to 4, or None if none could; the answers in order.

        Raises InputError if there was no answer at all.
        """
        read, text = [], RUBRICS[rubric].format(subject=subject, prompt=prompt) + ANSWER
        for answer in self.answers(lambda: self.request(text, images)):
            read.append(answer)
            if scores := re.findall(r"score\W{0,5}([0-4])(?!\.?\d)", answer, re.IGNORECASE):
                return int(scores[-1]), read
        return None, read


def judge_score(rows, name):
    """Scores as DreamBench++ has them, 0 to 1: each pass's mean divided by 4, their mean over the passes and, as +-,
    their standard deviation; None where there is none. What could not be read does not count.
    name: cp or pf. -> {"pictures": number, "score": number, "spread": number}"""
    passes = [[score for score in scores if score is not None] for scores in zip(*(row[name] for row in rows))]
    means = [statistics.mean(scores) / 4 for scores in passes if scores]
    return {"pictures": len(rows), "score": statistics.mean(means) if means else None,
            "spread": statistics.stdev(means) if len(means) > 1 else None}


def judge_table(rows):
    """Concept preservation by category and prompt following by group of prompts, as DreamBench++ reports them; CP*PF
    and, as in the paper's Table 1, CP/PF of the overall scores. -> {"CP": {group: judge_score}, "PF": ..., ...}"""
    table = {"CP": {}, "PF": {}}
    for name, field, groups in (("CP", "group", CATEGORIES), ("PF", "prompt_group", PROMPT_GROUPS)):
        for group in groups:
            table[name][group] = judge_score([row for row in rows if row[field] == group], name.lower())
        table[name]["overall"] = judge_score(rows, name.lower())
    cp, pf = table["CP"]["overall"]["score"], table["PF"]["overall"]["score"]
    known = cp is not None and pf is not None
    return table | {"CP*PF": cp * pf if known else None, "CP/PF": cp / pf if known and pf else None}
