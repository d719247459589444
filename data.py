"""Pictures and prompts in, tensors out.

Everything the network sees passes through here: a reference photograph becomes CLIP pixels, a target picture becomes
VQGAN pixels, a task's prompt template is filled in, and the text becomes T5 ids in which every reference picture
holds one `<image>` token per CLIP patch. Nothing here computes with the network.

Next: `encoder.py` turns these tensors into the prefix the decoder reads.
"""
import os
import re
import sys

import numpy as np
import torch
from PIL import Image, ImageOps
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

IMAGE = "<image>"          # in a prompt: here stands a reference picture
MAX_PIXELS = 180_000_000   # a larger picture is taken for a decompression bomb
MIN_SIDE, MAX_ASPECT = 8, 20
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


class InputError(ValueError):
    """What the user gave cannot be used. The message is one sentence: what, where, and how to mend it."""


def run(main):
    """Runs a script's main; bad input becomes one line on stderr and exit code 2, an interrupt exit code 130."""
    try:
        main()
    except InputError as error:
        print(f"{os.path.basename(sys.argv[0])}: error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


# ---------------------------------------------------------------------------------------------------------------------
# Pictures

def open_image(path):
    """Opens a picture of any common kind as RGB; raises InputError naming the file where that cannot work.

    EXIF rotation is applied, 16-bit greys are reduced to 8, transparency is laid on white, of an animation the first
    frame is taken.
    """
    Image.MAX_IMAGE_PIXELS = None      # our own limit below comes with a sentence that names the file
    try:
        image = Image.open(path)
        width, height = image.size
        if width * height > MAX_PIXELS:
            raise InputError(f"{path}: {width} x {height} pixels are too many (at most {MAX_PIXELS:,}); scale it down")
        if min(width, height) < MIN_SIDE or max(width, height) > MAX_ASPECT * min(width, height):
            raise InputError(f"{path}: {width} x {height} pixels show too little; each side needs at least {MIN_SIDE} "
                             f"pixels and the longer at most {MAX_ASPECT} times the shorter")
        image.seek(0)
        image.load()
        image = ImageOps.exif_transpose(image)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; check the path of the picture") from None
    except IsADirectoryError:
        raise InputError(f"{path}: is a folder; name a picture in it") from None
    except PermissionError:
        raise InputError(f"{path}: not readable; check its permissions") from None
    except InputError:
        raise
    except Exception as error:         # Pillow's decoders raise many kinds: OSError, SyntaxError, struct.error, ...
        raise InputError(f"{path}: not a picture, or a damaged one ({error}); open and save it anew") from None
    if image.mode.startswith("I") or image.mode == "F":
        grey = np.asarray(image).astype(np.float32)
        scale = 255 / 65535 if grey.max() > 255 else 1
        image = Image.fromarray((grey * scale).clip(0, 255).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def center_square(image, size, rounding=round):
    """Shorter side to `size` by bicubic resampling, then the central square; rounding: of the longer side's length."""
    shorter = min(image.size)
    width, height = (rounding(side * size / shorter) for side in image.size)
    left, top = (width - size) // 2, (height - size) // 2
    return image.resize((width, height), Image.BICUBIC).crop((left, top, left + size, top + size))


def clip_pixels(image, size=224):
    """PIL RGB picture -> (3, size, size) fp32, normalised for CLIP (openai/clip-vit-large-patch14 preprocessing)."""
    square = center_square(image, size, rounding=int)      # int: as CLIP's published preprocessing truncates
    pixels = np.asarray(square, dtype=np.float32) / 255
    pixels = (pixels - np.float32(CLIP_MEAN)) / np.float32(CLIP_STD)
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()                         # (3, size, size)


def target_pixels(image, size=512):
    """PIL RGB picture -> (3, size, size) fp32 in [-1, 1], what the VQGAN encodes (LlamaGen's centre crop)."""
    while min(image.size) >= 2 * size:                     # box filter first: texture is averaged, not sampled
        image = image.resize((image.width // 2, image.height // 2), Image.BOX)
    pixels = np.asarray(center_square(image, size), dtype=np.float32) / 127.5 - 1
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()                         # (3, size, size)


def to_image(pixels):
    """(3, H, W) in [-1, 1] -> PIL RGB picture; values outside are cut off."""
    pixels = ((pixels.float().clamp(-1, 1) + 1) * 127.5).round().byte()
    return Image.fromarray(pixels.permute(1, 2, 0).cpu().numpy())


def contact_sheet(images, columns=None, gap=4):
    """A white sheet with equal-sized pictures in rows of `columns` (default: a near-square)."""
    columns = columns or int(np.ceil(np.sqrt(len(images))))
    rows = -(-len(images) // columns)
    width, height = images[0].size
    sheet = Image.new("RGB", (columns * (width + gap) - gap, rows * (height + gap) - gap), "white")
    for i, image in enumerate(images):
        sheet.paste(image, ((i % columns) * (width + gap), (i // columns) * (height + gap)))
    return sheet


# ---------------------------------------------------------------------------------------------------------------------
# Prompts (spec of the released data; in a template `<image>` stands once per reference picture)

def subject_prompt(subjects, prompt):
    """Subject-driven, recovery and multi-subject: one line per reference picture, then the prompt."""
    return "\n".join([f"The {subject} in {IMAGE}." for subject in subjects] + [prompt])


def segment_prompt(subject):
    """Segmentation: the answer is the subject on black."""
    return f"The {subject} in {IMAGE}."


def reconstruct_prompt(caption=""):
    """Reconstruction: the answer is the reference itself."""
    return f"The image is {IMAGE}\n{caption}" if caption else f"{IMAGE}\n"


def subject_of(path):
    """What a picture's file name says it shows, or else its folder's: red_boot-03.jpg, red_boot/03.jpg -> "red boot"."""
    folder, name = os.path.split(os.path.abspath(path))
    for text in (os.path.splitext(name)[0], os.path.basename(folder)):
        if words := re.sub(r"[\W\d_]+", " ", text).strip().lower():
            return words
    return "subject"


# ---------------------------------------------------------------------------------------------------------------------
# Tokens

def byte_tokenizer():
    """A tokenizer that needs no file: one id per byte behind <pad>, </s>, <unk>; for random and tiny models."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate(["<pad>", "</s>", "<unk>"] + alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    tokenizer.add_special_tokens(["<pad>", "</s>", "<unk>"])
    return tokenizer


def load_tokenizer(path):
    """Reads a tokenizer.json (FLAN-T5's, or a model folder's own)."""
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:
        raise InputError(f"{path}: not a readable tokenizer.json ({error}); copy it again") from None


class Prompter:
    """Text with `<image>` placeholders -> (ids, mask), each placeholder expanded to one token per CLIP patch.

    tokenizer: a `tokenizers.Tokenizer` whose `</s>` is 1 and whose pad is 0; `<image>` is added behind its vocabulary
    (id 32100 for FLAN-T5). patches: tokens per reference picture. max_tokens: the prefix length S.
    """

    def __init__(self, tokenizer, patches=256, max_tokens=512):
        tokenizer.add_special_tokens([IMAGE])
        self.tokenizer, self.patches, self.max_tokens = tokenizer, patches, max_tokens
        self.image_id = tokenizer.token_to_id(IMAGE)

    def __call__(self, prompt, n_images):
        """-> ids (S,) int64 padded with 0 at the right, mask (S,) bool, True = a token; raises InputError."""
        placeholders = prompt.count(IMAGE)
        if placeholders != n_images:
            raise InputError(f"the prompt has {placeholders} {IMAGE} but {n_images} reference picture(s) came with it; "
                             f"write one {IMAGE} for each")
        ids = self.tokenizer.encode(prompt.replace(IMAGE, IMAGE * self.patches)).ids
        if len(ids) > self.max_tokens:
            images = n_images * self.patches
            raise InputError(f"the prompt needs {len(ids)} tokens ({n_images} picture(s) x {self.patches} = {images}, "
                             f"text {len(ids) - images}) but the prefix has {self.max_tokens}; use fewer reference "
                             f"pictures or a shorter prompt")
        padded = torch.zeros(self.max_tokens, dtype=torch.long)
        padded[:len(ids)] = torch.tensor(ids)
        return padded, torch.arange(self.max_tokens) < len(ids)
