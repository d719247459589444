"""Weights: public files and saved folders in, a whole model out; complete, or an error that names what is missing.

The public files of MENTOR, LlamaGen, CLIP, FLAN-T5, and LLaVA's and InstructBLIP's connectors are recognised by the
tensors in them and read under the names that their authors gave (CLIP_NAMES, T5_NAMES, QUERY_NAMES; LAYOUTS says which
parts of our model each file fills). A folder written by `save` is read the same way, with our own names. Nothing is
copied where a file can be memory-mapped, and no pickle gets to run code.

    mentor = weights.load("tiny")                    # or "mentor", "random", a folder, a hub repository
    python weights.py convert mentor out/mentor      # public files, downloaded if need be -> one folder of safetensors

Skip this file at first: nothing in it is about the network. Next: `sample.py`, the command line.
"""
import argparse
import filecmp
import hashlib
import json
import math
import os
import pickle
import re
import shutil
import zlib
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from torch import nn

import cli
import fast
import lora as adapters
from cli import InputError
from data import CAPTION_TOKENS, IMAGE, NAME_TOKENS
from encoder import CONNECTORS, QueryConfig, make_connector
from model import PARTS, SIZES, Mentor, MentorConfig, Sampling
from rope2d import PREFIX_ROPE

TOKENIZER = ("google/flan-t5-xl", "tokenizer.json")
ENCODERS = (("openai/clip-vit-large-patch14", "model.safetensors"),
            ("google/flan-t5-xl", "model.safetensors.index.json"), TOKENIZER)
VQ16, LLAMAGEN_VQ16 = ("BleachNick/Mentor", "vq_ds16_t2i.pt"), ("peizesun/llamagen_t2i", "vq_ds16_t2i.pt")
HUB = {     # name for --weights: the public files it is made of, as (repository, file)
    "mentor": (("BleachNick/Mentor", "stage2.pt"), VQ16, TOKENIZER),
    "generator": (("BleachNick/Mentor", "generator_ckpt.pt"), VQ16, *ENCODERS),
    "llamagen": (("peizesun/llamagen_t2i", "t2i_XL_stage2_512.pt"), LLAMAGEN_VQ16, *ENCODERS),
    "llamagen-256": (("peizesun/llamagen_t2i", "t2i_XL_stage1_256.pt"), LLAMAGEN_VQ16, *ENCODERS),
}
DEMO = Sampling(cfg_scale=2.5, temperature=0.9, top_k=5000)    # how MENTOR's demo samples; LlamaGen's are the defaults
LLAMAGEN_ROWS = 120                            # of its unconditional table
BUNDLED = {"tiny": os.path.join(os.path.dirname(os.path.abspath(__file__)), "assets", "tiny")}   # in the repository
MODEL_FILES = ("config.json", "model.safetensors", "tokenizer.json")
WORDS = "qformer_tokenizer.json"               # BERT's, where a query connector reads it
OWN_FILES = (*MODEL_FILES, WORDS)
ADAPTER = "adapter.safetensors"                # all that a run with --lora writes of its model
CHECKPOINT_FILES = (*OWN_FILES, ADAPTER, "training.safetensors", "training.json", "checksums.json")


# ---------------------------------------------------------------------------------------------------------------------
# Public names: ours -> theirs, regular expressions applied in order

CLIP_NAMES = (     # "pre_layrnorm" really is the public name
    (r"^vision\.blocks", "vision_model.encoder.layers"),
    (r"\.norm([12])\.", r".layer_norm\1."),
    (r"\.attn\.([qkv])\.", r".self_attn.\1_proj."),
    (r"\.attn\.o\.", r".self_attn.out_proj."),
    (r"\.(fc[12])\.", r".mlp.\1."),
    (r"^vision\.patch_embed", "vision_model.embeddings.patch_embedding"),
    (r"^vision\.class_embed", "vision_model.embeddings.class_embedding"),
    (r"^vision\.pos_embed", "vision_model.embeddings.position_embedding.weight"),
    (r"^vision\.norm_pre", "vision_model.pre_layrnorm"),
    (r"^vision\.norm_post", "vision_model.post_layernorm"),
)
T5_NAMES = (
    (r"^embed\.", "shared."),
    (r"\.relative_bias\.", ".block.0.layer.0.SelfAttention.relative_attention_bias."),
    (r"\.blocks\.(\d+)\.attn\.", r".block.\1.layer.0.SelfAttention."),
    (r"\.blocks\.(\d+)\.attn_norm\.", r".block.\1.layer.0.layer_norm."),
    (r"\.blocks\.(\d+)\.cross\.", r".block.\1.layer.1.EncDecAttention."),
    (r"\.blocks\.(\d+)\.cross_norm\.", r".block.\1.layer.1.layer_norm."),
    (r"^encoder\.blocks\.(\d+)\.(w\w+)\.", r"encoder.block.\1.layer.1.DenseReluDense.\2."),
    (r"^encoder\.blocks\.(\d+)\.ffn_norm\.", r"encoder.block.\1.layer.1.layer_norm."),
    (r"^decoder\.blocks\.(\d+)\.(w\w+)\.", r"decoder.block.\1.layer.2.DenseReluDense.\2."),
    (r"^decoder\.blocks\.(\d+)\.ffn_norm\.", r"decoder.block.\1.layer.2.layer_norm."),
    (r"^(encoder|decoder)\.norm\.", r"\1.final_layer_norm."),
)
QUERY_NAMES = (    # InstructBLIP's
    (r"^queries$", "query_tokens"),
    (r"^out\.", "language_projection."),
    (r"^embed\.", "qformer.embeddings.word_embeddings."),
    (r"^position\.", "qformer.embeddings.position_embeddings."),
    (r"^norm\.", "qformer.embeddings.layernorm."),
    (r"^blocks\.(\d+)\.attn\.o\.", r"qformer.encoder.layer.\1.attention.output.dense."),
    (r"^blocks\.(\d+)\.cross\.o\.", r"qformer.encoder.layer.\1.crossattention.output.dense."),
    (r"^blocks\.(\d+)\.attn\.", r"qformer.encoder.layer.\1.attention.attention."),
    (r"^blocks\.(\d+)\.cross\.", r"qformer.encoder.layer.\1.crossattention.attention."),
    (r"attention\.q\.", "attention.query."),
    (r"attention\.k\.", "attention.key."),
    (r"attention\.v\.", "attention.value."),
    (r"^blocks\.(\d+)\.attn_norm\.", r"qformer.encoder.layer.\1.attention.output.LayerNorm."),
    (r"^blocks\.(\d+)\.cross_norm\.", r"qformer.encoder.layer.\1.crossattention.output.LayerNorm."),
    (r"^blocks\.(\d+)\.query_fc1\.", r"qformer.encoder.layer.\1.intermediate_query.dense."),
    (r"^blocks\.(\d+)\.query_fc2\.", r"qformer.encoder.layer.\1.output_query.dense."),
    (r"^blocks\.(\d+)\.query_norm\.", r"qformer.encoder.layer.\1.output_query.LayerNorm."),
    (r"^blocks\.(\d+)\.fc1\.", r"qformer.encoder.layer.\1.intermediate.dense."),
    (r"^blocks\.(\d+)\.fc2\.", r"qformer.encoder.layer.\1.output.dense."),
    (r"^blocks\.(\d+)\.norm\.", r"qformer.encoder.layer.\1.output.LayerNorm."),
)
PROJECTOR_NAMES = ((r"^fc", "cls_embedding.cap_proj.fc"), (r"^uncond$", "cls_embedding.uncond_embedding"))


class Part(NamedTuple):
    """A part of our model as a public file holds it."""
    ours: str              # prefix of our names
    public: str = ""       # prefix of the file's names
    table: tuple = ()      # ours -> public, regular expressions applied in order
    in_table: str = ""     # prefix under which the table knows the part


CLIP_TOWER = "multimodal_encoder.vision_model.vision_tower."
LAYOUTS = {  # kind of public file: the parts that it fills
    "mentor": (Part("encoder.clip.", CLIP_TOWER, CLIP_NAMES, "vision."),
               Part("encoder.t5.", "multimodal_encoder.language_model.", T5_NAMES),
               Part("projector.", "", PROJECTOR_NAMES),
               Part("decoder.")),
    "decoder": (Part("projector.", "", PROJECTOR_NAMES), Part("decoder.")),
    "vqgan": (Part("vqgan."),),
    "t5": (Part("encoder.t5.", "", T5_NAMES),),
    "clip": (Part("encoder.clip.", "", CLIP_NAMES, "vision."),),
    "connector": (),
}
MLP_PARTS = {   # kind of public file: the connector as it holds it, an MLP or a query connector
    "mentor": Part("encoder.connector.", "multimodal_encoder.language_projection."),
    "connector": Part("encoder.connector.", "model.mm_projector."),          # LLaVA's
}
QUERY_PARTS = {
    "mentor": Part("encoder.connector.", "multimodal_encoder.", QUERY_NAMES),
    "connector": Part("encoder.connector.", "", QUERY_NAMES),                # InstructBLIP's
}
MARKS = (   # a tensor whose name starts so tells the kind of file; the first that fits
    ("mentor", "multimodal_encoder."), ("decoder", "tok_embeddings."), ("vqgan", "quantize.embedding."),
    ("connector", "query_tokens"), ("clip", "vision_model."), ("t5", "encoder.block.0."),
    ("connector", "model.mm_projector."),
)
EXTRAS = re.compile(   # in public files, but of no use here: bookkeeping, aliases, what CLIP needs only for scores
    r"(position_ids|quantize\.codebook_used|(encoder|decoder)\.embed_tokens\.weight)$"
    r"|^(text_model|text_projection|visual_projection|logit_scale)\b")
OF_INSTRUCTBLIP = re.compile(r"^(vision_model|language_model)\.")           # its file holds those networks, too
T5_DECODER = re.compile(r"^(decoder\.|lm_head\.)")


def public_name(name, table):
    """Our tensor name -> its public one, by a table of regular expressions."""
    for ours, public in table:
        name = re.sub(ours, public, name)
    return name


CONNECTOR_MARKS = {     # a tensor that tells what kind of connector a file holds
    "encoder.connector.queries": "query", "multimodal_encoder.query_tokens": "query", "query_tokens": "query",
    "encoder.connector.0.weight": "mlp", "multimodal_encoder.language_projection.0.weight": "mlp",
    "model.mm_projector.0.weight": "mlp",
}


def public_names(model, kind):
    """{public name: our name} of all tensors that a public file of that kind holds of the model."""
    connectors, names = QUERY_PARTS if model.config.connector == "query" else MLP_PARTS, {}
    for part in [*LAYOUTS[kind], *([connectors[kind]] if kind in connectors else ())]:
        for name in model.state_dict():
            if name.startswith(part.ours):
                in_table = part.in_table + name.removeprefix(part.ours)
                names[part.public + public_name(in_table, part.table)] = name
    return names


# ---------------------------------------------------------------------------------------------------------------------
# Reading files

def shards(index):
    """The names of the files that a shard index (.json) lists; they lie beside it."""
    content = cli.read_json(index, "an index of shards")
    names = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(names, dict) or not names:
        raise InputError(f'{index}: has no "weight_map"; it should be an index of shards')
    for name in names.values():
        if not isinstance(name, str) or name != os.path.basename(name) or not name.endswith(".safetensors"):
            raise InputError(f"{index}: names {cli.shortly(name)} for a shard; they are .safetensors files beside it")
    return sorted(set(names.values()))


def read_pickle(path):
    """What torch.save wrote, memory-mapped where possible; nothing but tensors and plain values is let in."""
    with torch.serialization.safe_globals([argparse.Namespace]):
        try:
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError as error:          # files older than torch 1.6 are no archives and cannot be mapped
            if "mmap" not in str(error):
                raise
            return torch.load(path, map_location="cpu", weights_only=True)


def read_content(path):
    """The content of a .safetensors file, a shard index (.json) or a pickle."""
    if path.endswith(".safetensors"):
        return load_file(path)
    if not path.endswith(".json"):
        return read_pickle(path)
    tensors = {}
    for shard in shards(path):
        tensors |= read_tensors(os.path.join(os.path.dirname(path), shard))
    return tensors


def read_tensors(path):
    """{name: tensor} of a weight file, memory-mapped where possible; raises InputError that names the file.

    Pickles are read with weights_only=True: one that would run code is refused, nothing of it runs.
    """
    path = str(path)
    head = cli.check_file(path, "weights")
    pickled = head.startswith((b"PK\x03\x04", b"\x80"))       # of torch.save, now and before version 1.6
    try:
        content = read_content(path)
    except (InputError, MemoryError):
        raise
    except pickle.UnpicklingError as error:
        if not pickled:
            raise InputError(f"{path}: is {cli.what_begins_so(head) or 'no weight file'}") from None
        code = re.search(r"GLOBAL (\S+)", str(error))
        reason = f"would run code ({code[1]:.100})" if code else "holds more than tensors"
        raise InputError(f"{path}: this pickle {reason} and was refused, nothing of it was run; "
                         f"get the file from its publisher") from None
    except Exception as error:                 # truncated archives fail in many ways
        found = None if pickled else cli.what_begins_so(head)
        truncated = f"not a weight file, or a truncated one ({type(error).__name__}); download it again"
        raise InputError(f"{path}: is {found or truncated}") from None
    if isinstance(content, dict):
        content = content.get("model", content)
    items = content.items() if isinstance(content, dict) else ()
    tensors = {name: value for name, value in items if isinstance(name, str) and isinstance(value, torch.Tensor)}
    if not tensors:
        raise InputError(f"{path}: holds no tensors; it is not one of the public weight files")
    return tensors


def hub_says(repo, error):
    """An exception of the hub's library -> what to do about it, as text for a message."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    kinds = {kind.__name__ for kind in type(error).__mro__}
    if "HFValidationError" in kinds:
        return f"{repo!r} is no name of a hub repository; write owner/name, or name a folder that is there"
    if "OfflineModeIsEnabled" in kinds:
        return "HF_HUB_OFFLINE forbids to ask the hub, and it is not in the cache; name a local folder"
    if "GatedRepoError" in kinds or status == 403:
        return "the hub does not hand it out; accept the terms on its page and log in with `hf auth login`"
    if status == 401 or "RepositoryNotFoundError" in kinds:
        return ("the hub has no such repository, or a private one; check the name, name a folder that is there, or log "
                "in with `hf auth login`")
    if status == 404:
        return ("the repository has no such file, so it is none that `weights.py convert` wrote; name another, or a "
                "folder with public files")
    if status:
        return f"the hub answers with an error (HTTP {status}); try again later, or name a local folder"
    return (f"the download failed ({cli.first_line(error)}); check the connection and try again, it goes on where it "
            "stopped, or name a local folder")


def download(repo, name):
    """One file of a hub repository, from the cache or the net: shows progress, resumes, and checks the sum. -> path"""
    import huggingface_hub                     # here, because it takes a while to import and is seldom needed
    try:
        known = huggingface_hub.try_to_load_from_cache(repo, name)
        if not isinstance(known, str):         # asks once: the library itself would try for half a minute
            huggingface_hub.get_hf_file_metadata(huggingface_hub.hf_hub_url(repo, name), timeout=10)
        path = huggingface_hub.hf_hub_download(repo, name, etag_timeout=5)
    except Exception as error:                 # of the library, of the one below it that speaks HTTP, of the disk
        raise InputError(f"{repo}/{name}: {hub_says(repo, error)}") from None
    blob = os.path.realpath(path)
    digest = os.path.basename(blob)            # the cache names large files by their SHA-256
    if not isinstance(known, str) and re.fullmatch(r"[0-9a-f]{64}", digest):
        with open(blob, "rb") as file:
            actual = hashlib.file_digest(file, "sha256").hexdigest()
        if actual != digest:
            os.remove(blob)
            raise InputError(f"{repo}/{name}: the download was damaged and has been removed; try again")
    return path


def files_in(folder):
    """Paths of the weight files, the configuration and the tokenizer in a folder."""
    try:
        names = sorted(os.listdir(folder))
    except OSError as error:
        raise InputError(f"{folder}: cannot be read ({error.strerror}); choose another folder of weights") from None
    sharded = any(name.endswith(".index.json") for name in names)
    paths = []
    for name in names:
        shard = sharded and re.search(r"-\d+-of-\d+\.safetensors$", name)
        if name in OWN_FILES or name.endswith((".pt", ".pth", ".bin", ".index.json", ".safetensors")) and not shard:
            paths.append(os.path.join(folder, name))
    return paths


def locate(weights):
    """A folder, a name of BUNDLED or HUB, or a hub repository -> list of local files."""
    weights = BUNDLED.get(weights, weights)
    if os.path.isdir(weights):
        return files_in(weights)
    if os.path.lexists(weights):
        raise InputError(f"{weights}: is no folder; weights are a folder of files, so name the one it lies in")
    # what begins as a path does, or lies in a folder that is there, is a path with a slip in it: the hub is not asked
    is_path = weights.startswith((".", "~", "out/", "assets/")) or os.path.isdir(os.path.dirname(weights))
    if weights not in HUB and (is_path or not re.fullmatch(r"[\w.-]+/[\w.-]+", weights)):
        raise InputError(f"{weights}: no such folder of weights; name a folder, a hub repository (owner/name), or one "
                         f"of random, {', '.join([*BUNDLED, *HUB])}")
    paths = []
    for repo, name in HUB.get(weights) or [(weights, name) for name in MODEL_FILES]:
        paths.append(download(repo, name))
        if repo == weights and name == "config.json":
            if is_public_folder({name: paths[0]}):
                raise InputError(f"{weights}: its config.json is another program's; name a repository with a folder "
                                 "that `weights.py convert` wrote, or download its files beside those that it needs "
                                 "(tutorial/drawing.md)")
            if reads_word_pieces(read_config(paths[0])):
                paths.append(download(repo, WORDS))
        if name.endswith(".index.json"):
            for shard in shards(paths[-1]):
                download(repo, shard)
    return paths


def byte_tokenizer():
    """A tokenizer that needs no file: one id for each byte behind <pad>, </s>, <unk>; for random models."""
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
    head = cli.check_file(path, "a tokenizer", most=64 << 20)
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:                 # the library raises bare Exceptions
        found = cli.what_begins_so(head) or f"not a readable tokenizer.json ({str(error):.200}); copy it again"
        raise InputError(f"{path}: is {found}") from None


def tokenizer_in(weights, paths):
    """The tokenizer among the files of some weights."""
    if "tokenizer.json" not in paths:
        raise InputError(f"{weights}: tokenizer.json is missing; copy the one that belongs to these weights, FLAN-T5's "
                         f"with public files, into the folder")
    return load_tokenizer(paths["tokenizer.json"])


def reads_word_pieces(config):
    """Whether the query connector has a vocabulary of its own, BERT's, which is smaller than the prompt's."""
    return config.connector == "query" and config.query.vocab_size <= config.image_id


def words_in(weights, paths, config):
    """The tokenizer that a query connector of its own vocabulary needs, else None."""
    if not reads_word_pieces(config):
        return None
    if WORDS not in paths:
        raise InputError(f"{weights}: {WORDS} is missing, the words that the query connector knows; copy BERT's "
                         "tokenizer.json (google-bert/bert-base-uncased) under this name into the folder")
    return load_tokenizer(paths[WORDS])


# ---------------------------------------------------------------------------------------------------------------------
# Filling a model

def is_plain(tensor):
    """Whether a tensor holds floats, one for each element, in memory: no whole or complex numbers, sparse or meta."""
    return tensor.is_floating_point() and tensor.layout is torch.strided and tensor.device.type == "cpu"


def is_finite(tensor):
    """Whether every number is. The sum tells it thirty times faster than a look at each: 10 GB in about a second."""
    return bool(tensor.detach().sum(dtype=torch.float32).isfinite()) or bool(tensor.detach().isfinite().all())


def fill_in(model, tensors, names, path):
    """Puts tensors into the model; raises InputError naming all that is missing, extra or mis-shaped.

    names: {name in the file: our name}, complete for the parts the file speaks of. fp32 tensors are not copied.
    """
    state, problems, picked = model.state_dict(), [], {}
    for public, ours in names.items():
        if public not in tensors:
            problems.append(f"{public} is missing")
        elif tensors[public].shape != state[ours].shape:
            problems.append(f"{public} is {list(tensors[public].shape)} but should be {list(state[ours].shape)}")
        elif not state[ours].is_floating_point():
            picked[ours] = tensors[public]
            if tensors[public].dtype != state[ours].dtype:
                problems.append(f"{public} holds {tensors[public].dtype} but should hold {state[ours].dtype}")
        elif not is_plain(tensors[public]):
            problems.append(f"{public} holds {tensors[public].dtype}, or is sparse, but should hold floats")
        else:
            picked[ours] = tensors[public].float()
            if not is_finite(picked[ours]):
                problems.append(f"{public} holds values that are not finite")
    problems += [f"{name} is not part of this model" for name in tensors if name not in names]
    if problems:
        more = f" and {len(problems) - 4} more problems" if len(problems) > 4 else ""
        raise InputError(f"{path}: does not fit this model: {'; '.join(problems[:4])}{more}")
    model.load_state_dict(picked, strict=False, assign=True)


def lengthen(tensors, name, rows, last=False):
    """Gives a shorter unconditional table that many rows, the new ones noise. The old ones come first, as in the
    release, though prompts, padded at the left, read the table from its end; with `last` they stay where they are read.
    """
    table = tensors.get(name)
    if table is None or table.dim() != 2 or len(table) >= rows:
        return
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(rows - len(table), table.size(1), generator=generator) / table.size(1)**0.5
    parts = [table, noise.type_as(table)]
    if last:
        parts.reverse()
    tensors[name] = torch.cat(parts)


def connector_in(tensors):
    """The kind of connector that a file holds: "query", "mlp", or None."""
    return next((kind for name, kind in CONNECTOR_MARKS.items() if name in tensors), None)


def check_connector(tensors, config, path):
    """Raises InputError where a file's connector is of another kind than the configuration's."""
    kinds = {"query": "the query connector", "mlp": "an MLP for its connector"}
    found, wanted = connector_in(tensors), "query" if config.connector == "query" else "mlp"
    if found not in (None, wanted):
        raise InputError(f"{path}: holds {kinds[found]} but the configuration ({config.connector}) asks for "
                         f"{kinds[wanted]}; use the one that belongs to these weights, or train.py --connector, which "
                         f"begins a new one")


def renew_cross_attention(model, tensors, names):
    """Where a Q-Former was made for patch features of another width (InstructBLIP's are ViT-g's), its keys and values
    start anew. -> how many"""
    state, generator, renewed = model.state_dict(), torch.Generator().manual_seed(0), 0
    for public, ours in names.items():
        if re.search(r"\.cross\.[kv]\.weight$", ours) and public in tensors:
            if tensors[public].shape != state[ours].shape:
                tensors[public] = torch.randn(state[ours].shape, generator=generator) * 0.02
                renewed += 1
    return renewed


def fill_public(model, path, tensors, kind, log):
    """Puts one public file's tensors into the model, see LAYOUTS."""
    check_connector(tensors, model.config, path)
    names = public_names(model, kind)
    prefix = {"mentor": "multimodal_encoder.language_model.", "t5": ""}.get(kind)
    if prefix is not None:                     # the token table may be stored under any of its three names
        for alias in ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight"):
            if prefix + alias in tensors:
                tensors.setdefault(prefix + "shared.weight", tensors[prefix + alias])
    if kind == "t5" and not hasattr(model.encoder.t5, "decoder"):
        tensors = {name: tensor for name, tensor in tensors.items() if not T5_DECODER.match(name)}
    if kind == "connector":
        tensors = {name: tensor for name, tensor in tensors.items() if not OF_INSTRUCTBLIP.match(name)}
        if renew_cross_attention(model, tensors, names):
            log(f"{path}: its Q-Former reads patch features of another width than CLIP's, so these keys and values are "
                "new and untrained, good for text to image only until --stage connector has trained them")
            model.config = replace(model.config, untrained=("encoder.connector",))
    tensors = {name: tensor for name, tensor in tensors.items() if name in names or not EXTRAS.search(name)}
    lengthen(tensors, "cls_embedding.uncond_embedding", model.config.prefix_tokens)
    fill_in(model, tensors, names, path)


def public_config(weights, files, log=print):
    """The published network's configuration, with what differs between its files read off them."""
    if "mentor" not in files and "decoder" not in files:
        return MentorConfig()
    path, tensors = files.get("mentor") or files["decoder"]
    layers = len({name.split(".")[1] for name in tensors if name.startswith("layers.")})
    table = tensors.get("tok_embeddings.weight")
    width = table.size(1) if table is not None and table.dim() == 2 else 0
    sizes = [size for size in SIZES.values() if (size.decoder.layers, size.decoder.width) == (layers, width)]
    if not sizes:
        raise InputError(f"{path}: a decoder of {layers} layers and width {width} is none of the sizes "
                         f"{', '.join(SIZES)}")
    config, uncond = sizes[0], tensors.get("cls_embedding.uncond_embedding")
    if any(connector_in(tensors) == "query" for _, tensors in files.values()):
        config = replace(config, connector="query")
    if uncond is not None and uncond.dim() == 2 and 0 < len(uncond) <= LIMITS["prefix_tokens"][1]:
        config = replace(config, prefix_tokens=len(uncond))
    if "mentor" in files:
        return replace(config, sampling=DEMO)
    # LlamaGen's own files, with 120 such rows, were trained with the prefix erased (rope2d.py); so has MENTOR's
    # generator, which was not. Names that the hub gives tell them apart, and the size of their images
    name = os.path.basename(path)
    size, erased = re.match(r"t2i_\w+_(256|512)\.pt$", name), config.prefix_tokens == LLAMAGEN_ROWS
    if weights == "generator" or name == HUB["generator"][0][1]:
        return config
    rope, owner = ("zero", "LlamaGen") if erased else ("identity", "MENTOR")
    if not size:
        log(f"{path}: taken for {owner}'s decoder for images of 512 pixels, with the prefix's rotation {rope}; if it "
            "is another, give --prefix-rope or --size")
    decoder = replace(config.decoder, prefix_rope=rope)
    return replace(config, image_size=int(size[1]) if size else 512, decoder=decoder)


def override(config, prefix_rope=None, prefix_tokens=None):
    """The same network with another rotation of the prefix, or with room for a longer one."""
    decoder = replace(config.decoder, prefix_rope=prefix_rope or config.decoder.prefix_rope)
    return replace(config, decoder=decoder, prefix_tokens=max(config.prefix_tokens, prefix_tokens or 0))


def with_connector(config, form):
    """The same network with another connector. A query connector reads the prompt's own tokens, and is as wide as T5
    where that is narrower than BERT."""
    t5, query = config.t5, replace(QueryConfig(), vocab_size=config.t5.vocab_size)
    if t5.width < query.width:
        query = replace(query, width=t5.width, layers=4, heads=math.gcd(t5.width, t5.heads), mlp=t5.mlp,
                        positions=NAME_TOKENS, queries=16, dropout=t5.dropout)
    return replace(config, connector=form, query=query)


def new_connector(mentor, form):
    """The model with a new, untrained connector in place of its own. form: one of CONNECTORS -> Mentor"""
    config, processor = mentor.config, mentor.processor
    words = processor.words if form == config.connector else None
    if form != config.connector:
        config = with_connector(config, form)
    config = replace(config, untrained=("encoder.connector",))
    with torch.device("meta"):
        model = Mentor(config, processor.tokenizer, hasattr(mentor.encoder.t5, "decoder"), words)
    kept = {name: tensor for name, tensor in mentor.state_dict().items() if not name.startswith("encoder.connector.")}
    model.load_state_dict(kept, strict=False, assign=True)
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)                   # the same on every rank
        model.encoder.connector = make_connector(config.vision.width, config.t5.width, form, config.query)
    return model


QUERY_PREFIX = 512         # rows that serve every stage with a query connector, whose images take so few


def prefix_room(stage, args):
    """Prefix rows that a training run makes room for, None = those of the weights. stage, args: train.py's"""
    form = args.connector or find_config(stage.init).connector
    if form == "query" and stage.prefix_tokens and not args.prefix_tokens:
        return min(stage.prefix_tokens, QUERY_PREFIX)
    return stage.prefix_tokens


def resize(mentor, image_size):
    """Gives a model a smaller size of its images, None = its own. -> the model; InputError where it cannot have it"""
    size = mentor.check_size(image_size or mentor.config.image_size)
    mentor.config = replace(mentor.config, image_size=size)
    return mentor


def is_public_folder(paths):
    """Whether config.json is one of the transformers library, as the hub has it beside public weights."""
    try:
        config = cli.read_json(paths["config.json"], CONFIGURATION)
    except (InputError, KeyError):
        return False
    return isinstance(config, dict) and bool({"model_type", "architectures", "transformers_version"} & config.keys())


RANDOM = re.compile(r"random(-\w+)?")          # names of random models


def random_config(name):
    """The configuration of a random model: "random" or "random-XL", any row of SIZES."""
    size = name[7:] or "toy"
    if size not in SIZES:
        raise InputError(f"{name}: no such size; the sizes are {', '.join(SIZES)}")
    return SIZES[size]


CONFIGURATION = "a model's configuration, as `weights.py convert` writes it"
MANY, SOME = (1, 1 << 20), (1, 1024)
LIMITS = {      # what the fields of a configuration may be, wherever they stand: cli.from_json
    "width": MANY, "layers": SOME, "heads": SOME, "mlp": MANY, "image_size": (8, 8192), "patch_size": SOME,
    "head_dim": (1, 4096), "vocab_size": (4, 1 << 24), "dropout": (0, 0.99), "buckets": (4, 4096),
    "max_distance": (4, 1 << 20), "multiple_of": MANY, "codes": MANY, "prefix_rope": set(PREFIX_ROPE),
    "rope_base": (1.001, 1e9), "channels": (4, 1 << 14), "multipliers": (1, 64), "res_blocks": (1, 64),
    "latent": MANY, "code_width": (1, 1 << 14), "beta": (0, 1e6), "prefix_tokens": (1, 1 << 17),
    "image_id": (3, 1 << 24), "connector": set(CONNECTORS), "cfg_scale": (-1e6, 1e6), "temperature": (0, 1e6),
    "top_k": MANY, "top_p": (1e-9, 1),
    "queries": SOME, "positions": (1, 1 << 16), "cross_every": SOME, "untrained": set(PARTS),
}


def read_config(path):
    """The configuration in a config.json that `write` wrote; InputError names the file and the field."""
    config = cli.from_json(MentorConfig, cli.read_json(path, CONFIGURATION), path, LIMITS,
                           optional=("untrained", "query"))              # older files lack them
    vision, decoder, vqgan, query = config.vision, config.decoder, config.vqgan, config.query
    widths = [vqgan.channels * multiplier for multiplier in (1, *vqgan.multipliers)]
    rules = (    # how the fields go together
        (vision.width % vision.heads == 0, "vision.heads must divide vision.width"),
        (vision.image_size % vision.patch_size == 0, "vision.patch_size must divide vision.image_size"),
        (query.width % query.heads == 0, "query.heads must divide query.width"),
        (query.positions >= NAME_TOKENS, f"query.positions must be at least {NAME_TOKENS}"),
        (config.connector != "query" or decoder.prefix_rope != "grid", "a query connector's rows have no place in the "
         "image, so decoder.prefix_rope cannot be grid"),
        (decoder.width % (4 * decoder.heads) == 0, "decoder.width must be a multiple of 4 x decoder.heads"),
        (decoder.codes == vqgan.codes, "decoder.codes must equal vqgan.codes"),
        (0 < len(vqgan.multipliers) <= 8, "vqgan.multipliers must be 1 to 8 numbers"),
        (all(c % min(32, c // 4) == 0 for c in widths), "vqgan.channels must be a multiple of 32, or of 4 below 128"),
        (config.image_size % vqgan.factor == 0, f"image_size must be a multiple of a token's {vqgan.factor} pixels"),
        (config.image_id < config.t5.vocab_size, "image_id must be less than t5.vocab_size"),
        (config.t5.buckets % 4 == 0 and config.t5.max_distance > config.t5.buckets // 2,
         "t5.buckets must be a multiple of 4, and t5.max_distance more than half of it"),
        (config.sampling.top_k <= decoder.codes, "sampling.top_k must be at most decoder.codes"))
    for holds, rule in rules:
        if not holds:
            raise InputError(f"{path}: {rule}; copy the file again")
    return config


def find_config(weights):
    """The configuration of weights that need not be there yet: a folder's or a random model's own, else the published
    one."""
    if RANDOM.fullmatch(weights):
        return random_config(weights)
    path = os.path.join(BUNDLED.get(weights, weights), "config.json")
    return read_config(path) if os.path.exists(path) and not is_public_folder({"config.json": path}) else MentorConfig()


def load_folder(weights, paths, config, overrides, t5_decoder):
    """A folder that `save` wrote."""
    tokenizer = tokenizer_in(weights, paths)
    config = override(config or read_config(paths["config.json"]), **overrides)
    tensors = read_tensors(paths["model.safetensors"])
    if not t5_decoder:
        tensors = {name: tensor for name, tensor in tensors.items()
                   if not name.startswith(("encoder.t5.decoder.", "encoder.t5.lm_head."))}
    check_connector(tensors, config, paths["model.safetensors"])
    with torch.device("meta"):
        model = Mentor(config, tokenizer, t5_decoder, words_in(weights, paths, config))
    lengthen(tensors, "projector.uncond", config.prefix_tokens, last=True)
    fast.expect_int8(model, tensors)
    fill_in(model, tensors, {name: name for name in model.state_dict()}, paths["model.safetensors"])
    return model


def sort_public_files(weights, paths):
    """Public files told apart by the names of the tensors in them. -> {kind: (path, tensors)}"""
    files = {}
    for name, path in paths.items():
        if name in ("config.json", "tokenizer.json", WORDS):
            continue
        tensors = read_tensors(path)
        kind = next((kind for kind, mark in MARKS if any(key.startswith(mark) for key in tensors)), None)
        if kind is None:
            raise InputError(f"{path}: its tensors ({', '.join(list(tensors)[:3])}, ...) are of no network known here")
        if kind in files:
            raise InputError(f"{weights}: holds two {kind} files, {files[kind][0]} and {path}; remove one")
        files[kind] = (path, tensors)
    needed = {"vqgan"} if "mentor" in files else {"vqgan", "decoder", "t5", "clip"}
    missing = sorted(needed - set(files))
    if missing:
        raise InputError(f"{weights}: no file there holds the {' or the '.join(missing)}; add it (tutorial/drawing.md)")
    return files


def prefer_checkpoint(files, log):
    """Where there is a MENTOR checkpoint, other files only add what it lacks."""
    path, own = files["mentor"]
    for kind in ("decoder", "t5", "connector"):
        if kind in files:
            log(f"{files.pop(kind)[0]}: is not used, because {path} holds a {kind} of its own")
    if "clip" not in files:
        return
    # the release may have re-initialised CLIP, so the checkpoint's own tensors win
    tower = {CLIP_TOWER + name: tensor for name, tensor in files.pop("clip")[1].items()
             if name.startswith("vision_model.") and not EXTRAS.search(name)}
    differing = [name for name in tower if name in own and not torch.equal(own[name].float(), tower[name].float())]
    if differing:
        log(f"{path}: {len(differing)} of its CLIP tensors differ from CLIP's own file; the checkpoint's are used")
    for name in tower:
        own.setdefault(name, tower[name])


def load_public_files(weights, paths, config, overrides, t5_decoder, log):
    """A set of public files."""
    files = sort_public_files(weights, paths)
    tokenizer = tokenizer_in(weights, paths)
    if "mentor" in files:
        prefer_checkpoint(files, log)
    config = override(config or public_config(weights, files, log), **overrides)
    with torch.device("meta"):
        model = Mentor(config, tokenizer, t5_decoder, words_in(weights, paths, config))
    for kind, (path, tensors) in files.items():
        fill_public(model, path, tensors, kind, log)
    if "connector" not in files and "mentor" not in files:
        log(f"{weights}: holds no connector; a new, untrained one is used, good for text to image only")
        return new_connector(model, config.connector)
    return model


# ---------------------------------------------------------------------------------------------------------------------
# Whole models

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "int8": torch.int8}


def usual_dtype(device):
    """What a network computes in for drawing where nothing else is asked for. -> a name of DTYPES"""
    return "bf16" if str(device).startswith("cuda") else "fp32"


def is_large(config):
    """Whether products, rather than the calls around them, take a decoder's time."""
    return config.decoder.width >= 768


def compile_decoder(mentor, images, wanted=None):
    """Compiles the decoder's blocks. wanted: True or False; default: where it saves more than it takes, so for a large
    model on a CPU always, on a GPU, where it is a minute to save 2 s an image, for 32 images and more."""
    if wanted is None:
        wanted = is_large(mentor.config) and (mentor.device.type == "cpu" or images >= 32)
    if wanted:
        fast.compile_blocks(mentor.decoder)


def warn_of_detours(device, dtype, log=print):
    """Says so where a CPU multiplies numbers of a type by detours, as those without bf16 instructions do."""
    if torch.device(device).type == "cpu" and dtype in (torch.bfloat16, torch.float16):
        times = fast.slowdown(dtype)
        if times > 3:
            log(f"products in {str(dtype)[6:]} take this CPU {times:.0f} times as long as in fp32, which is the better "
                "choice here; a large model draws fastest by --dtype int8")


def random_model(config, tokenizer, seed=0, t5_decoder=False):
    """Seeded weights, ready to be trained."""
    tokenizer.add_special_tokens([IMAGE])
    config = replace(config, image_id=tokenizer.token_to_id(IMAGE))
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        return Mentor(config, tokenizer, t5_decoder).eval()


def place(mentor, device, dtype, offload=False):
    """Moves a model for sampling. fp16 leaves the encoder in fp32, because T5 overflows; the VQGAN is always fp32.

    int8 is for a CPU: linear layers and cache, all else stays as it is (fast.py). offload: decoder and VQGAN stay on
    the CPU until `Mentor.sample` has freed the encoder's room. -> the model
    """
    if dtype == torch.int8:
        if torch.device(device).type != "cpu":
            raise InputError(f"int8 is for drawing on a CPU, not on {device}; take bf16 there")
        fast.decode_in_int8(mentor.decoder)
        fast.round_to_int8(mentor)
        mentor.vqgan.decode = fast.in_bf16(mentor.vqgan.decode)
        return mentor.eval()
    if fast.is_int8(mentor):
        raise InputError("these weights are int8, which serve for drawing on a CPU alone; give --dtype int8, or name "
                         "the weights that they were made of")
    later = "cpu" if offload else device
    mentor.encoder.to(device, torch.float32 if dtype == torch.float16 else dtype)
    mentor.projector.to(device, dtype)
    mentor.decoder.to(later, dtype)
    mentor.vqgan.to(later)
    fast.use_fast_products(mentor.decoder)
    mentor.replay = fast.Graphs
    return mentor.eval()


def halve_frozen(mentor):
    """The matrices that no gradient changes, of all but the tokenizer, in bf16: half the room, and no copy a step."""
    for name, module in mentor.named_modules():
        if isinstance(module, nn.Linear) and not name.startswith("vqgan") and not module.weight.requires_grad:
            module.weight.data = module.weight.data.to(torch.bfloat16)


def load_files(weights, config, overrides, t5_decoder, log):
    """What `load` reads for any weights but random ones. -> Mentor"""
    paths = {os.path.basename(path): path for path in locate(weights)}
    if "config.json" in paths and "model.safetensors" in paths and not is_public_folder(paths):
        return load_folder(weights, paths, config, overrides, t5_decoder)
    if paths and paths.keys() <= set(OWN_FILES) and not is_public_folder(paths):
        missing = next(name for name in MODEL_FILES if name not in paths)
        raise InputError(f"{weights}: {missing} is missing; it lies beside the others where `weights.py convert` or a "
                         "training run wrote them")
    if not paths and cli.checkpoints(weights):
        raise InputError(f"{weights}: holds no finished weights, only checkpoints; name one of them, such as "
                         f"{cli.checkpoints(weights)[0]}")
    return load_public_files(weights, paths, config, overrides, t5_decoder, log)


@dataclass(frozen=True)
class Adapter:
    """What an adapter.safetensors tells of itself."""
    base: str                  # the weights that it was trained from
    prefix_tokens: int
    prefix_rope: str


def read_adapter(folder):
    """-> {name: tensor} of an adapter's updates, Adapter"""
    path = os.path.join(folder, ADAPTER)
    cli.check_file(path, "an adapter, made with `train.py --lora`")
    tensors = read_tensors(path)
    with safe_open(path, "pt") as file:
        about = (file.metadata() or {}).get("mentor", "null")
    return tensors, cli.from_json(Adapter, cli.parse_json(about.encode(), path), path, LIMITS)


def add_lora(mentor, rank, trains, base):
    """Adds new low-rank updates (lora.py) to a model; from then on they are all that is saved of it. base: the weights'
    name"""
    adapters.add(mentor, rank, trains)
    base = os.path.abspath(base) if os.path.isdir(base) else base
    mentor.adapter = Adapter(base, mentor.config.prefix_tokens, mentor.config.decoder.prefix_rope)


def load_adapted(folder, base, merged, **options):
    """The weights `base`, default those that the adapter in a folder was trained from, with its updates. -> Mentor"""
    tensors, about = read_adapter(folder)
    options = {"prefix_tokens": about.prefix_tokens, "prefix_rope": about.prefix_rope} | {
        name: value for name, value in options.items() if value is not None}
    model = load(base or about.base, **options)
    adapters.put(model, tensors, os.path.join(folder, ADAPTER))
    model.adapter = replace(about, base=base or about.base)
    if merged:
        adapters.merge(model)
        model.adapter = None
    return model


def load(weights, device="cpu", dtype=torch.float32, config=None, image_size=None, t5_decoder=False, offload=False,
         connector=None, lora=None, merged=True, log=print, **overrides):
    """Reads a whole model; raises InputError unless every tensor is there and fits. -> Mentor, in eval mode

    weights: "random", "random-XL" (any row of SIZES), a name of BUNDLED or HUB, a hub repository, or a folder that
    holds either a saved model or public files under any names. config: instead of what the files say. image_size:
    smaller than the weights' own. t5_decoder: also T5's captioning half. offload: see `place`. connector: a new one of
    this form in place of the weights' own. lora: a folder with an adapter to be added; one that is given for weights
    brings its own along. merged: into the matrices. log: takes one line of news. overrides: as `override` takes them.
    """
    weights = str(weights)
    cli.pick_device(str(device))
    warn_of_detours(device, dtype, log)
    if lora or os.path.isfile(os.path.join(weights, ADAPTER)):
        model = load_adapted(lora or weights, weights if lora else None, merged, config=config, t5_decoder=t5_decoder,
                             log=log, **overrides)
        return place(resize(model, image_size), device, dtype, offload)
    if RANDOM.fullmatch(weights):
        config = override(config or random_config(weights), **overrides)
        model = random_model(config, byte_tokenizer(), 0, t5_decoder)
        generator = torch.Generator().manual_seed(0)         # the published start, zero, would not look at its input
        torch.nn.init.normal_(model.decoder.output.weight, std=0.02, generator=generator)
    else:
        model = load_files(weights, config, overrides, t5_decoder, log)
    if connector:
        model = new_connector(model, connector)
    return place(resize(model, image_size), device, dtype, offload)


def write_tensors(tensors, path, metadata=None):
    """Writes a .safetensors file, readable to whom other files are; the library would make it the owner's alone."""
    open(path, "wb").close()
    mode = os.stat(path).st_mode
    try:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata)
    except SafetensorError as error:           # a full disk; atomic_file and atomic_folder wait for an OSError
        raise OSError(str(error)) from None
    os.chmod(path, mode)


def write(mentor, folder, state=None):
    """Writes model.safetensors, config.json and the tokenizers into a folder; of a model with LoRA its updates alone.

    state: tensors to write in place of the model's own, for a model whose parameters are spread over processes.
    """
    state = state or mentor.state_dict()
    if mentor.adapter:
        updates = {name: tensor for name, tensor in state.items() if ".lora_" in name}
        return write_tensors(updates, os.path.join(folder, ADAPTER), {"mentor": json.dumps(asdict(mentor.adapter))})
    write_tensors(state, os.path.join(folder, "model.safetensors"))
    with open(os.path.join(folder, "config.json"), "w", encoding="utf-8") as file:
        json.dump(asdict(mentor.config), file, indent=1)
    if mentor.processor:
        written = {"tokenizer.json": mentor.processor.tokenizer}
        if reads_word_pieces(mentor.config):
            written[WORDS] = mentor.processor.words
        for name, tokenizer in written.items():
            with open(os.path.join(folder, name), "w", encoding="utf-8") as file:
                file.write(tokenizer.to_str(pretty=True))


def check_out(folder):
    """Raises InputError unless a model can be written there: a new or empty folder, or one that `save` wrote."""
    cli.check_folder(folder, OWN_FILES)
    if os.path.isdir(folder) and os.listdir(folder):
        try:
            read_config(os.path.join(folder, "config.json"))
        except InputError as error:
            raise InputError(f"{folder}: is no folder of ours that may be replaced ({str(error):.200}); choose another"
                             ) from None


def save(mentor, folder, state=None):
    """`write` to a folder of its own, which appears whole or not at all, in place of an older model of that name."""
    check_out(folder)
    with cli.atomic_folder(folder, OWN_FILES) as temporary:
        write(mentor, temporary, state)


def without_numbers(weights, t5_decoder, connector, image_size, lora, **overrides):
    """A model of the sizes that `load` would give, on the meta device, for plans. lora: (rank, what trains) or None"""
    config = override(find_config(weights), **overrides)
    if connector:
        config = with_connector(config, connector)
    with torch.device("meta"):
        mentor = resize(Mentor(config, t5_decoder=t5_decoder), image_size)
    if lora:
        add_lora(mentor, *lora, weights)
        for name, parameter in mentor.named_parameters():
            parameter.requires_grad_(".lora_" in name)
        halve_frozen(mentor)
    return mentor


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints of a training run: out/step-00000500/ is a model folder plus training.safetensors and training.json

@dataclass(frozen=True)
class Training:
    """What training.json holds."""
    step: int
    settings: dict


def checksum(path):
    """CRC-32 of a file, read in pieces: it finds every flipped bit as fast as a disk reads. -> str"""
    total = 0
    with open(path, "rb") as file:
        while piece := file.read(1 << 24):
            total = zlib.crc32(piece, total)
    return f"{total:08x}"


def seal(folder):
    """Writes checksums.json, {file: checksum} of all that is in the folder; to be called once that is complete."""
    sums = {name: checksum(os.path.join(folder, name)) for name in sorted(os.listdir(folder))}
    cli.write_json(os.path.join(folder, "checksums.json"), sums)


def check_seal(folder):
    """Raises InputError unless the files are those that were sealed; older checkpoints have no seal."""
    path = os.path.join(folder, "checksums.json")
    if not os.path.lexists(path):
        return
    sums = cli.read_json(path, "a checkpoint's checksums")
    if not isinstance(sums, dict) or ADAPTER not in sums and not sums.keys() >= {"model.safetensors", "config.json"}:
        raise InputError(f"{path}: holds no checksums of a checkpoint's files")
    for name, expected in sums.items():
        file = os.path.join(folder, os.path.basename(name))
        cli.check_file(file, "a part of the checkpoint")
        if checksum(file) != expected:
            raise InputError(f"{name} is not as it was written, bits of it have changed")


def save_checkpoint(mentor, folder, model, tensors, training):
    """Writes a checkpoint; it appears whole or not at all. model, tensors: {name: tensor} of the model, of the training
    alone; training: {"step", "settings"}"""
    with cli.atomic_folder(folder, CHECKPOINT_FILES) as temporary:
        write(mentor, temporary, model)
        write_tensors(tensors, os.path.join(temporary, "training.safetensors"))
        cli.write_json(os.path.join(temporary, "training.json"), training)
        seal(temporary)


def newest_checkpoint(out, t5_decoder=False, log=print):
    """The newest checkpoint that can be read and is as it was written, else the one before, and so on.

    -> model, {name: tensor} of the training state, {"step", "settings"}
    """
    for folder in cli.checkpoints(out):
        try:
            check_seal(folder)
            path = os.path.join(folder, "training.json")
            training = cli.from_json(Training, cli.read_json(path, "a run's settings"), path, {"step": (0, 2**53)})
            tensors = load_file(os.path.join(folder, "training.safetensors"))
            return load(folder, t5_decoder=t5_decoder, merged=False), tensors, asdict(training)
        except MemoryError:
            raise
        except Exception as error:             # truncated files fail in many ways
            log(f"{folder}: is damaged ({str(error):.300}); falling back to the checkpoint before it")
    raise InputError(f"{out}: holds no checkpoint to resume from; leave out --resume to start anew")


def link(source, target):
    """Makes `target` another name of a file, in one step; a copy where the file system has no such links."""
    with cli.atomic_file(target) as temporary:
        os.remove(temporary)
        try:
            os.link(source, temporary)
        except OSError:
            shutil.copyfile(source, temporary)


def publish(folder, out, keep=None):
    """Links the model's files of a checkpoint into out/, so that `sample.py --weights out` always works, then removes
    older checkpoints but for the newest `keep` in all.

    Several files cannot be replaced in one step. But all checkpoints of a run share configuration and tokenizers, so
    these stay and model.safetensors alone is replaced. Where they differ, the old config.json, without which nothing
    reads out/, goes first and the new one comes last: a kill in between leaves an incomplete model, never a mixed one.
    """
    def same(name):
        return os.path.exists(os.path.join(out, name)) and filecmp.cmp(
            os.path.join(folder, name), os.path.join(out, name), shallow=False)

    lasting = [name for name in ("tokenizer.json", WORDS, "config.json") if os.path.exists(os.path.join(folder, name))]
    changed = [] if all(map(same, lasting)) else lasting
    if changed:
        with suppress(FileNotFoundError):
            os.remove(os.path.join(out, "config.json"))
    model = ADAPTER if os.path.exists(os.path.join(folder, ADAPTER)) else "model.safetensors"
    for name in (model, *changed):
        link(os.path.join(folder, name), os.path.join(out, name))
    older = [other for other in cli.checkpoints(out) if other < folder]
    for other in older[keep - 1:] if keep else ():
        shutil.rmtree(other)


def fingerprint(vqgan):
    """Tells this VQGAN's codes from another's. -> str"""
    codes = vqgan.quantize.embedding.weight.detach().cpu().numpy()
    return hashlib.blake2b(codes.tobytes(), digest_size=8).hexdigest()


class Codes:
    """VQ tokens written by `python prepare.py encode`, found by a sample's key."""

    def __init__(self, folder, vqgan, image_size, fit="crop"):
        self.path, self.file = os.path.join(folder, "codes.safetensors"), None
        self.vocabulary = vqgan.config.codes
        cli.check_file(self.path, "codes, made with `python prepare.py encode`")
        try:
            with safe_open(self.path, "pt") as file:
                keys, metadata, tokens = file.get_tensor("keys"), file.metadata(), file.get_slice("tokens")
                shape, kind = list(tokens.get_shape()), tokens.get_dtype()
            made_for, made_by = int(metadata["image_size"]), metadata["vqgan"]
            made_with = metadata.get("fit", "crop")            # files of before there was a choice lack it
        except Exception as error:             # truncated and foreign files fail in many ways
            raise InputError(f"{self.path}: no codes ({str(error):.200}); make them with `python prepare.py encode`"
                             ) from None
        if made_for != image_size:
            raise InputError(f"{self.path}: made for pictures of {made_for} pixels, not {image_size}; encode again")
        if made_with != fit:
            raise InputError(f"{self.path}: made with --fit {made_with}, not {fit}; encode again, or give that one")
        if made_by != fingerprint(vqgan):
            raise InputError(f"{self.path}: made with another VQGAN than this model's; encode again")
        expected = [len(keys), (image_size // vqgan.factor)**2] if keys.dim() == 1 else None
        if shape != expected or keys.dtype != torch.int64 or not kind.startswith(("I", "U")):
            raise InputError(f"{self.path}: holds {kind} tokens of shape {shape} for keys of shape {list(keys.shape)}, "
                             f"{keys.dtype}, not whole numbers of one row for each key; encode again")
        self.keys = keys.numpy()
        if (self.keys[1:] <= self.keys[:-1]).any():
            raise InputError(f"{self.path}: its keys are not in order; encode again")

    def __getitem__(self, key):
        """-> (T,) int64"""
        self.file = self.file or safe_open(self.path, "pt")          # here, so that each worker opens its own
        i = int(np.searchsorted(self.keys, key))
        if i == len(self.keys) or self.keys[i] != key:
            raise InputError(f"{self.path}: no codes of this row, it was damaged then or changed since; encode again")
        tokens = self.file.get_slice("tokens")[i].long()                                  # (T,)
        if tokens.min() < 0 or tokens.max() >= self.vocabulary:
            raise InputError(f"{self.path}: codes of row {i} lie outside the vocabulary of {self.vocabulary}; encode "
                             "again")
        return tokens


# ---------------------------------------------------------------------------------------------------------------------
# Memory of a training step, by formula; tests/test_memory.py holds it against a count

class Stack(NamedTuple):
    """Blocks that gradients pass, and how many bytes each keeps of a sample for its backward pass."""
    blocks: nn.ModuleList
    inputs: int                # what comes into it
    kept: int                  # all, its input included


def room(itemsize, *modules):
    """Bytes of the parameters, of which none is smaller than itemsize."""
    return sum(p.numel() * max(p.element_size(), itemsize) for module in modules for p in module.parameters())


def matrices(*modules):
    """How many numbers stand in the matrices of all products that autocast copies: those in fp32."""
    return sum(p.numel() for module in modules for linear in module.modules() if isinstance(linear, nn.Linear)
               for p in linear.parameters(recurse=False) if p.dim() == 2 and p.dtype == torch.float32)


def t5_kept(config, itemsize, trains, norms):
    """Bytes a row that T5's block keeps, attention to a memory aside. norms: see `stacks`"""
    width, inner, mlp = config.width, config.heads * config.head_dim, config.mlp
    if not trains:             # a frozen product keeps nothing of its input; there is no dropout
        return 4 * 2 * width + itemsize * (4 * inner + 3 * mlp)
    # residual stream and normed rows in fp32, their casts, q, k, v and result, feed-forward, dropout's masks in bytes
    return 4 * norms * width + itemsize * (2 * width + 4 * inner + 4 * mlp) + 2 * width + mlp


def trainable_blocks(mentor):
    """The transformer blocks that gradients may pass: of T5 (both halves) and the decoder. -> list"""
    t5 = mentor.encoder.t5
    halves = [t5.encoder.blocks, t5.decoder.blocks] if hasattr(t5, "decoder") else [t5.encoder.blocks]
    return [block for stack in (*halves, mentor.decoder.layers) for block in stack]


def connector_blocks(mentor):
    """The transformer blocks of a query connector; an MLP has none."""
    return list(getattr(mentor.encoder.connector, "blocks", ()))


def stacks(mentor, trains, itemsize):
    """All blocks that gradients pass. Scores are not kept: attention is taken to be fused. -> list of Stack"""
    d, t5, rows, found = mentor.config.decoder, mentor.config.t5, mentor.config.prefix_tokens, []
    norms = 2 if mentor.adapter else 4         # rows of two norms: their inputs, and normed ones for their own weights
    kept = t5_kept(t5, itemsize, "encoder.t5" in trains, norms)
    if any(part.startswith("encoder") for part in trains):
        found.append(Stack(mentor.encoder.t5.encoder.blocks, 4 * rows * t5.width, rows * kept))
    if hasattr(mentor.encoder.t5, "decoder"):
        cross = 4 * 2 * CAPTION_TOKENS * t5.width + itemsize * 2 * (CAPTION_TOKENS + rows) * t5.heads * t5.head_dim
        found.append(Stack(mentor.encoder.t5.decoder.blocks, 4 * CAPTION_TOKENS * t5.width,
                           CAPTION_TOKENS * kept + cross))
    else:
        length = rows + mentor.config.grid**2 - 1
        kept = 4 * norms * d.width + itemsize * (8 * d.width + 4 * d.hidden) + 2 * d.width   # as T5's, and rotated q, k
        found.append(Stack(mentor.decoder.layers, 4 * length * d.width, length * kept))
    return found


NAMED = 8                  # words of a subject, as the formula takes them


def connector_kept(mentor, itemsize):
    """Bytes that a trained query connector keeps of a sample, its prefix full of pictures. An MLP's are so few that
    they do not count."""
    config, query, vision = mentor.config, mentor.config.query, mentor.config.vision
    if config.connector != "query":
        return 0
    row = itemsize * (8 * query.width + 2 * query.mlp) + 10 * query.width      # norms' inputs in fp32, masks in bytes
    patch = 2 * itemsize * (vision.width + query.width)                        # read in fp32, cast for keys and values
    reading = -(-query.layers // query.cross_every)                            # layers that look at the patches
    picture = query.layers * (query.queries + NAMED) * row + reading * vision.grid**2 * patch
    return config.prefix_tokens // query.queries * picture


def kept_for_backward(mentor, trains, passed, itemsize, recomputed):
    """-> bytes of the weights' bf16 copies, bytes of a sample's activations. passed: the stacks that gradients pass"""
    config, captions = mentor.config, hasattr(mentor.encoder.t5, "decoder")
    outer = [mentor.encoder.connector] if "encoder.connector" in trains else []
    if not captions:
        outer += [mentor.projector, mentor.decoder.output]
    outputs = CAPTION_TOKENS * config.t5.vocab_size if captions else config.grid**2 * config.decoder.codes
    loss = 4 * 3 * outputs             # log-probabilities, and two gradients on their way to the logits
    if recomputed:                     # a block is whole again when the loss has let go
        copied = max(matrices(stack.blocks[0]) for stack in passed) + matrices(*outer)
        kept = max(loss, *(stack.kept for stack in passed))
        kept += sum(len(stack.blocks) * stack.inputs for stack in passed)
    else:
        copied = matrices(*outer, *(stack.blocks for stack in passed))
        kept = sum(len(stack.blocks) * stack.kept for stack in passed) + loss
    if "encoder.connector" in trains:
        kept += connector_kept(mentor, itemsize)
    return 2 * copied if itemsize == 2 else 0, kept


class Way(NamedTuple):
    """How a step is computed; as text, the flags for it."""
    fsdp: bool
    recomputed: bool           # with activation checkpointing
    micro: int | None = None   # samples that a rank computes at once

    def __str__(self):
        flags = (("--fsdp", self.fsdp), ("--checkpoint-activations", self.recomputed),
                 (f"--micro-batch {self.micro}", self.micro))
        return " ".join(flag for flag, on in flags if on)


def training_memory(mentor, trains, ranks, way, itemsize=2):
    """GiB that each of so many ranks needs in a step with prefixes of full length, by formula. -> {what: GiB}

    trains: as a stage's row names it. itemsize: bytes of a number in a product, 2 under bf16 autocast, else 4. Of a
    stage that trains a tokenizer no activations are counted.
    """
    shards, total = ranks if way.fsdp else 1, room(itemsize, mentor)
    if mentor.adapter:
        trains = tuple(part for part in trains if part in ("encoder.t5", "decoder"))
    trained = sum(p.numel() for name, p in mentor.named_parameters()
                  if name.startswith(trains) and (not mentor.adapter or ".lora_" in name))
    rows = {"parameters": total / shards, "gradients": 4 * trained / shards, "AdamW": 8 * trained / shards}
    if "vqgan" not in trains:
        passed, outside, block = stacks(mentor, trains, itemsize), 0, 0
        if shards > 1:         # what FSDP gathers: all that lies outside of blocks, and the block at hand
            outside = total - room(itemsize, *mentor.encoder.clip.blocks, *connector_blocks(mentor),
                                   *trainable_blocks(mentor))
            block = max(room(itemsize, stack.blocks[0]) for stack in passed)
        copies, kept = kept_for_backward(mentor, trains, passed, itemsize, way.recomputed)
        # recomputing it, the next is gathered already and the gradients of the last are on their way
        backward = {"bf16 copies": copies, "activations": way.micro * kept,
                    "gathered": outside + block * (3 if way.recomputed else 1)}
        # targets are encoded one by one, while FSDP's buffer from the last gathering is still there
        encoding = {"activations": 5 * 4 * mentor.config.vqgan.channels * mentor.config.image_size**2,
                    "gathered": 2 * outside}
        phases = [backward] if hasattr(mentor.encoder.t5, "decoder") else [backward, encoding]       # captions: none
        rows |= max(phases, key=lambda phase: sum(phase.values()))
    return {what: count / 2**30 for what, count in rows.items()}


SPARE = 8e9 / 2**30        # GiB of a card left for what the formula does not know: CUDA, workspaces, NCCL's buffers
CARDS = {80: 79.1, 40: 39.4, 24: 23.6, 16: 15.6}               # GB as cards are sold: GiB that CUDA finds there
MACS = (16, 32, 64)                            # GiB of their memory
LAYOUTS_OF_A_STEP = [Way(fsdp, recomputed) for recomputed in (False, True) for fsdp in (False, True)]


def way_to_fit(mentor, trains, ranks, card, sizes, spare=SPARE, itemsize=2):
    """The first way that leaves `spare` of a card's GiB free. sizes: micro-batches to try. -> Way or None"""
    for way in LAYOUTS_OF_A_STEP:
        for way in [way._replace(micro=micro) for micro in sizes if ranks > 1 or not way.fsdp]:
            if sum(training_memory(mentor, trains, ranks, way, itemsize).values()) + spare <= card:
                return way
    return None


def micro_batch_that_fits(mentor, trains, ranks, card, way, sizes):
    """The largest micro-batch that leaves a GPU of `card` GiB 8 GB free; that of `way`, if it names one, may take them
    all. InputError where a step cannot fit, with flags under which it does."""
    most = card if way.micro else card - SPARE
    for micro in [way.micro] if way.micro else sizes:
        needed = sum(training_memory(mentor, trains, ranks, way._replace(micro=micro)).values())
        if needed <= most:
            return micro
    other = way_to_fit(mentor, trains, ranks, card, sizes)
    advice = f"it fits with {other}" if other else "take more GPUs and --fsdp, or larger ones"
    raise InputError(f"{micro} samples at once need {needed:.1f} GiB by estimate, but this GPU has {card:.1f} and 8 GB "
                     f"should stay free; {advice}")


def parts_table(mentor):
    """How large the parts of a model are and what of them trains. -> text"""
    lines = []
    for name in PARTS:
        parameters = list(mentor.get_submodule(name).parameters())
        millions, trained = (sum(p.numel() for p in parameters if p.requires_grad or every) / 1e6 for every in (1, 0))
        lines.append(f"  {name:18} {millions:9.2f} M  " + (f"{trained:.2f} M trains" if trained else "frozen"))
    return "\n".join(lines)


def memory_table(mentor, trains, ranks, sizes=(8, 4, 2, 1)):
    """What a step needs in every layout, and which of them fits which card. -> text"""
    config = mentor.config
    lines = [f"GiB a GPU, estimated for prefixes of {config.prefix_tokens} rows, images of {config.image_size} pixels:",
             f"{'--micro-batch':36}" + "".join(f"{micro:8}" for micro in sizes)]
    for way in LAYOUTS_OF_A_STEP:
        needs = [training_memory(mentor, trains, ranks, way._replace(micro=micro)) for micro in sizes]
        lines.append(f"{str(way):36}" + "".join(f"{sum(rows.values()):8.1f}" for rows in needs))
    for card, gib in CARDS.items():
        lines.append(f"{card} GB, 8 of them free: {way_to_fit(mentor, trains, ranks, gib, sizes) or 'nothing fits'}")
    for memory in MACS:                        # in fp32; MPS hands out about three quarters of the memory
        way = way_to_fit(mentor, trains, 1, 0.75 * memory, sizes, spare=0, itemsize=4)
        lines.append(f"a Mac of {memory} GB, --device mps: {way or 'nothing fits'}")
    return "\n".join(lines)


# ---------------------------------------------------------------------------------------------------------------------

def main(argv=None):
    """The command line: converts weights once."""
    parser = cli.Parser(description="Convert weights to a folder of safetensors.")
    parser.add_argument("command", choices=["convert"])
    parser.add_argument("weights", help=f"a folder, a hub repository, or one of {', '.join([*BUNDLED, *HUB])}")
    parser.add_argument("out", help="the folder to write")
    parser.add_argument("--prefix-rope", choices=PREFIX_ROPE, help="how the prefix is rotated; default: as trained")
    parser.add_argument("--lora", metavar="FOLDER", help="an adapter of `train.py --lora` to be merged into them")
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--half", action="store_true", help="fp16 on disk: half the size; still computed in fp32")
    size.add_argument("--int8", action="store_true", help="for `sample.py --dtype int8` alone: a quarter of the size")
    args = parser.parse_args(argv)
    check_out(args.out)
    source = BUNDLED.get(args.weights, args.weights)
    if os.path.isdir(source) and os.path.isdir(args.out) and os.path.samefile(source, args.out):
        raise InputError(f"{args.out}: is where the weights come from; choose another folder to write")
    mentor = load(args.weights, prefix_rope=args.prefix_rope, lora=args.lora)
    parameters = sum(p.numel() for p in mentor.parameters())
    if args.int8:
        fast.round_to_int8(mentor)
    state = mentor.state_dict()
    if args.half:
        state = {name: tensor.half() for name, tensor in state.items()}
        if large := [name for name, tensor in state.items() if not is_finite(tensor)]:
            raise InputError(f"{args.weights}: {large[0]} holds numbers that are too large for fp16; leave out --half")
    save(mentor, args.out, state)
    print(f"wrote {args.out} ({parameters / 1e6:,.0f} M parameters)")


if __name__ == "__main__":
    cli.run(main)
