"""Weights: public files and saved folders in, a whole model out; complete, or an error that names what is missing.

The public files of MENTOR, LlamaGen, CLIP, FLAN-T5 and LLaVA's connector are recognised by the tensors in them and
read under the names their authors gave (the tables CLIP_NAMES and T5_NAMES stand beside the networks, LAYOUTS below
says which parts of our model each file fills). A folder written by `Mentor.save_pretrained` is read the same way, with
our own names. Nothing is copied where a file can be memory-mapped, and no pickle gets to run code.

    python weights.py convert mentor out/mentor      # public files, downloaded if need be -> one folder of safetensors

Used by `Mentor.from_pretrained`; a reader of the network can skip this file. Next: `sample.py`.
"""
import argparse
import hashlib
import json
import os
import pickle
import re
from dataclasses import fields, is_dataclass, replace

import torch
from safetensors.torch import load_file

import data
from data import InputError
from encoder import CLIP_NAMES, T5_NAMES, Connector
from model import SIZES, Mentor, MentorConfig, size_config
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
BUNDLED = {"tiny": os.path.join(os.path.dirname(os.path.abspath(__file__)), "assets", "tiny")}   # in the repository
OWN_FILES = ("config.json", "model.safetensors", "tokenizer.json")
PROJECTOR_NAMES = ((r"^fc", "cls_embedding.cap_proj.fc"), (r"^uncond$", "cls_embedding.uncond_embedding"))
LAYOUTS = {  # kind of public file: rows of (our prefix, what the table of names expects there, table, public prefix)
    "mentor": (("encoder.clip.", "vision.", CLIP_NAMES, "multimodal_encoder.vision_model.vision_tower."),
               ("encoder.t5.", "", T5_NAMES, "multimodal_encoder.language_model."),
               ("encoder.connector.", "", (), "multimodal_encoder.language_projection."),
               ("projector.", "", PROJECTOR_NAMES, ""),
               ("decoder.", "", (), "")),
    "decoder": (("projector.", "", PROJECTOR_NAMES, ""), ("decoder.", "", (), "")),
    "vqgan": (("vqgan.", "", (), ""),),
    "t5": (("encoder.t5.", "", T5_NAMES, ""),),
    "clip": (("encoder.clip.", "vision.", CLIP_NAMES, ""),),
    "connector": (("encoder.connector.", "", (), "model.mm_projector."),),
}
MARKS = (   # a tensor whose name starts so tells the kind of file; the first that fits
    ("mentor", "multimodal_encoder."), ("decoder", "tok_embeddings."), ("vqgan", "quantize.embedding."),
    ("clip", "vision_model."), ("t5", "encoder.block.0."), ("connector", "model.mm_projector."),
)
EXTRAS = re.compile(   # in public files, but of no use here: bookkeeping, aliases, what CLIP needs only for scores
    r"(position_ids|quantize\.codebook_used|(encoder|decoder)\.embed_tokens\.weight)$"
    r"|^(text_model|text_projection|visual_projection|logit_scale)\b")
T5_DECODER = re.compile(r"^(decoder\.|lm_head\.)")


def public_name(name, table):
    """Our tensor name -> its public one, by a table of regular expressions."""
    for ours, public in table:
        name = re.sub(ours, public, name)
    return name


def public_names(model, kind):
    """{public name: our name} of all tensors that a public file of that kind holds of the model."""
    names = {}
    for ours, expected, table, prefix in LAYOUTS[kind]:
        for name in model.state_dict():
            if name.startswith(ours):
                names[prefix + public_name(expected + name.removeprefix(ours), table)] = name
    return names


def shards(index):
    """The files that a shard index (.json) names."""
    with open(index) as file:
        return sorted(set(json.load(file)["weight_map"].values()))


def read_tensors(path):
    """{name: tensor} of a .safetensors file, a shard index (.json) or a pickle, memory-mapped where possible.

    Pickles are read with weights_only=True: one that would run code is refused, nothing of it runs.
    """
    path = str(path)
    try:
        if path.endswith(".safetensors"):
            return load_file(path)
        if path.endswith(".json"):
            return {k: v for shard in shards(path) for k, v in
                    read_tensors(os.path.join(os.path.dirname(path), shard)).items()}
        with torch.serialization.safe_globals([argparse.Namespace]):
            try:
                content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            except RuntimeError as error:      # files older than torch 1.6 are no archives and cannot be mapped
                if "mmap" not in str(error):
                    raise
                content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; check the path or download it again") from None
    except InputError:
        raise
    except pickle.UnpicklingError as error:
        reason = re.search(r"GLOBAL (\S+)", str(error))
        reason = f"would run code ({reason[1]})" if reason else "holds more than tensors"
        raise InputError(f"{path}: this pickle {reason} and was refused, nothing of it was run; "
                         f"get the file from its publisher") from None
    except Exception as error:                 # truncated archives fail in many ways
        raise InputError(f"{path}: not a weight file, or a truncated one ({type(error).__name__}); "
                         f"download it again") from None
    content = content.get("model", content) if isinstance(content, dict) else {}
    tensors = {name: value for name, value in content.items() if isinstance(value, torch.Tensor)}
    if not tensors:
        raise InputError(f"{path}: holds no tensors; it is not one of the public weight files")
    return tensors


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
        else:
            picked[ours] = tensors[public].float()
    problems += [f"{name} is not part of this model" for name in tensors if name not in names]
    if problems:
        more = f" and {len(problems) - 8} more problems" if len(problems) > 8 else ""
        raise InputError(f"{path}: does not fit this model: {'; '.join(problems[:8])}{more}")
    model.load_state_dict(picked, strict=False, assign=True)


def load_public(model, path, tensors, kind):
    """Puts one public file's tensors into the model, see LAYOUTS."""
    names = public_names(model, kind)
    prefix = {"mentor": "multimodal_encoder.language_model.", "t5": ""}.get(kind)
    if prefix is not None:                     # the token table may be stored under any of its three names
        for alias in ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight"):
            if prefix + alias in tensors:
                tensors.setdefault(prefix + "shared.weight", tensors[prefix + alias])
    if kind == "t5" and not hasattr(model.encoder.t5, "decoder"):
        tensors = {name: tensor for name, tensor in tensors.items() if not T5_DECODER.match(name)}
    tensors = {name: tensor for name, tensor in tensors.items() if name in names or not EXTRAS.search(name)}
    lengthen(tensors, "cls_embedding.uncond_embedding", model.config.prefix_tokens)
    fill_in(model, tensors, names, path)


def lengthen(tensors, name, rows, last=False):
    """Gives a shorter unconditional table that many rows, the new ones noise. The old ones come first, as in the
    release, though prompts, padded at the left, read the table from its end; with `last` they stay where they are read.
    """
    table = tensors.get(name)
    if table is not None and len(table) < rows:
        generator = torch.Generator().manual_seed(0)
        noise = torch.randn(rows - len(table), table.size(1), generator=generator) / table.size(1)**0.5
        tensors[name] = torch.cat([noise.type_as(table), table] if last else [table, noise.type_as(table)])


def public_config(files):
    """The published network's configuration, with what differs between its files read off them."""
    if "mentor" not in files and "decoder" not in files:
        return MentorConfig()
    path, tensors = files.get("mentor") or files["decoder"]
    layers = len({name.split(".")[1] for name in tensors if name.startswith("layers.")})
    width = tensors["tok_embeddings.weight"].size(1) if "tok_embeddings.weight" in tensors else 0
    sizes = [size for size, (n, _, w) in SIZES.items() if (n, w) == (layers, width)]
    if not sizes:
        raise InputError(f"{path}: a decoder of {layers} layers and width {width} is none of the sizes "
                         f"{', '.join(SIZES)}")
    config = size_config(sizes[0])
    if "cls_embedding.uncond_embedding" in tensors:
        config = replace(config, prefix_tokens=len(tensors["cls_embedding.uncond_embedding"]))
    # LlamaGen's own files were trained with the prefix erased (rope2d.py); their names also tell the picture's size
    if llamagen := re.match(r"t2i_.*_(\d+)\.pt$", os.path.basename(path)):
        config = replace(config, image_size=int(llamagen[1]), decoder=replace(config.decoder, prefix_rope="zero"))
    return config


def download(repo, name):
    """One file of a hub repository, from the cache or the net: shows progress, resumes, and checks the sum. -> path"""
    import huggingface_hub                     # here, for it takes a while to import and is seldom needed
    known = huggingface_hub.try_to_load_from_cache(repo, name)
    try:
        path = huggingface_hub.hf_hub_download(repo, name)
    except Exception as error:
        raise InputError(f"{repo}/{name}: the download failed ({str(error).splitlines()[0]}); check the connection "
                         f"and try again, it goes on where it stopped, or name a local folder") from None
    blob = os.path.realpath(path)
    digest = os.path.basename(blob)            # the cache names large files by their SHA-256
    if not isinstance(known, str) and re.fullmatch(r"[0-9a-f]{64}", digest):
        with open(blob, "rb") as file:
            actual = hashlib.file_digest(file, "sha256").hexdigest()
        if actual != digest:
            os.remove(blob)
            raise InputError(f"{repo}/{name}: the download was damaged and has been removed; try again")
    return path


def locate(weights):
    """A folder, a name of BUNDLED or HUB, or a hub repository -> list of local files."""
    weights = BUNDLED.get(weights, weights)
    if os.path.isdir(weights):
        names = sorted(os.listdir(weights))
        sharded = any(name.endswith(".index.json") for name in names)
        wanted = [name for name in names if name in OWN_FILES or name.endswith((".pt", ".pth", ".bin", ".index.json"))
                  or name.endswith(".safetensors") and not (sharded and re.search(r"-\d+-of-\d+\.", name))]
        return [os.path.join(weights, name) for name in wanted]
    if weights not in HUB and not re.fullmatch(r"[\w.-]+/[\w.-]+", weights):
        raise InputError(f"{weights}: no such folder of weights; name a folder, a hub repository (owner/name), or one "
                         f"of random, {', '.join([*BUNDLED, *HUB])}")
    paths = []
    for repo, name in HUB.get(weights) or [(weights, name) for name in OWN_FILES]:
        paths.append(download(repo, name))
        if name.endswith(".index.json"):
            for shard in shards(paths[-1]):
                download(repo, shard)
    return paths


def load(weights, device="cpu", dtype=torch.float32, config=None, prefix_rope=None, prefix_tokens=None,
         t5_decoder=False, offload=False, log=print):
    """Reads a whole model; raises InputError unless every tensor is there and fits.

    weights: "random", "random-XL" (any row of SIZES), a name of BUNDLED or HUB, a hub repository, or a folder that
    holds either a saved model or public files under any names. config: instead of what the files say; prefix_rope,
    prefix_tokens: override it. t5_decoder: also T5's captioning half. offload: see Mentor.cast. log: takes one
    line of news.
    """
    weights = str(weights)
    if re.fullmatch(r"random(-\w+)?", weights):
        size = weights[7:] or "toy"
        if size not in SIZES:
            raise InputError(f"{weights}: no such size; the sizes are {', '.join(SIZES)}")
        model = Mentor.random(size, 0, t5_decoder, prefix_rope, prefix_tokens)
        generator = torch.Generator().manual_seed(0)         # the published start, zero, would draw without looking
        torch.nn.init.normal_(model.decoder.output.weight, std=0.02, generator=generator)
        return model.cast(device, dtype, offload)
    paths = {os.path.basename(path): path for path in locate(weights)}
    if "config.json" in paths and "model.safetensors" in paths:
        model = load_folder(weights, paths, config, prefix_rope, prefix_tokens, t5_decoder)
    else:
        model = load_public_files(weights, paths, config, prefix_rope, prefix_tokens, t5_decoder, log)
    return model.cast(device, dtype, offload).eval()


def config_from_dict(cls, values):
    """The inverse of dataclasses.asdict, for nested configurations; raises InputError for names it does not know."""
    known = {f.name: f.type for f in fields(cls)}
    if unknown := sorted(set(values) - set(known)):
        raise InputError(f"config.json holds {', '.join(unknown)}, which {cls.__name__} does not know; "
                         f"it was written by another version")
    made = {name: config_from_dict(known[name], value) if is_dataclass(known[name]) else
            tuple(value) if isinstance(value, list) else value for name, value in values.items()}
    return cls(**made)


def tokenizer_in(weights, paths):
    """The tokenizer among the files of some weights."""
    if "tokenizer.json" not in paths:
        raise InputError(f"{weights}: tokenizer.json is missing; copy the one that belongs to these weights, FLAN-T5's "
                         f"with public files, into the folder")
    return data.load_tokenizer(paths["tokenizer.json"])


def load_folder(weights, paths, config, prefix_rope, prefix_tokens, t5_decoder):
    """A folder that save_pretrained wrote."""
    tokenizer = tokenizer_in(weights, paths)
    try:
        with open(paths["config.json"]) as file:
            config = config or config_from_dict(MentorConfig, json.load(file))
    except (json.JSONDecodeError, TypeError, AttributeError) as error:
        raise InputError(f"{paths['config.json']}: not a model's configuration ({error}); copy it again") from None
    config = config.override(prefix_rope, prefix_tokens)
    tensors = read_tensors(paths["model.safetensors"])
    if not t5_decoder:
        tensors = {name: tensor for name, tensor in tensors.items()
                   if not name.startswith(("encoder.t5.decoder.", "encoder.t5.lm_head."))}
    with torch.device("meta"):
        model = Mentor(config, tokenizer, t5_decoder)
    lengthen(tensors, "projector.uncond", config.prefix_tokens, last=True)
    fill_in(model, tensors, {name: name for name in model.state_dict()}, paths["model.safetensors"])
    return model


def load_public_files(weights, paths, config, prefix_rope, prefix_tokens, t5_decoder, log):
    """A set of public files, told apart by the names of the tensors in them."""
    files = {}                                 # kind -> (path, tensors)
    for name, path in paths.items():
        if name in ("config.json", "tokenizer.json"):
            continue
        tensors = read_tensors(path)
        kind = next((kind for kind, mark in MARKS if any(key.startswith(mark) for key in tensors)), None)
        if kind is None:
            raise InputError(f"{path}: its tensors ({', '.join(list(tensors)[:3])}, ...) are of no network known here")
        if kind in files:
            raise InputError(f"{weights}: holds two {kind} files, {files[kind][0]} and {path}; remove one")
        files[kind] = (path, tensors)
    needed = {"vqgan"} | (set() if "mentor" in files else {"decoder", "t5", "clip"})
    if missing := sorted(needed - set(files)):
        raise InputError(f"{weights}: no file there holds the {' or the '.join(missing)}; add it (README, weights)")
    tokenizer = tokenizer_in(weights, paths)
    for kind in ("decoder", "t5", "connector") if "mentor" in files else ():
        if kind in files:
            log(f"{files.pop(kind)[0]}: is not used, for {files['mentor'][0]} holds a {kind} of its own")
    if "mentor" in files and "clip" in files:  # the release may have re-initialised CLIP, so its own tensors win
        path, own = files["mentor"]
        tower = {LAYOUTS["mentor"][0][3] + name: tensor for name, tensor in files.pop("clip")[1].items()
                 if name.startswith("vision_model.") and not EXTRAS.search(name)}
        differing = [name for name in tower if name in own and not torch.equal(own[name].float(), tower[name].float())]
        if differing:
            log(f"{path}: {len(differing)} of its CLIP tensors differ from CLIP's own file; the checkpoint's are used")
        for name in tower:
            own.setdefault(name, tower[name])
    config = (config or public_config(files)).override(prefix_rope, prefix_tokens)
    with torch.device("meta"):
        model = Mentor(config, tokenizer, t5_decoder)
    for kind, (path, tensors) in files.items():
        load_public(model, path, tensors, kind)
    if "connector" not in files and "mentor" not in files:
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(0)               # the same on every rank
            model.encoder.connector = Connector(config.vision.width, config.t5.width, config.connector)
        model.config = replace(model.config, untrained=("encoder.connector",))
        log(f"{weights}: holds no connector; a new, untrained one is used, good for text to image only")
    return model


def main(argv=None):
    """The command line of this file: converts weights once."""
    parser = argparse.ArgumentParser(description="Convert weights to a folder of safetensors.")
    parser.add_argument("command", choices=["convert"])
    parser.add_argument("weights", help=f"a folder, a hub repository, or one of {', '.join([*BUNDLED, *HUB])}")
    parser.add_argument("out", help="the folder to write")
    parser.add_argument("--prefix-rope", choices=PREFIX_ROPE, help="how the prefix is rotated; default: as trained")
    parser.add_argument("--half", action="store_true", help="fp16 on disk: half the size; still computed in fp32")
    args = parser.parse_args(argv)
    model = load(args.weights, prefix_rope=args.prefix_rope)
    state = model.state_dict()
    model.save_pretrained(args.out, {name: t.half() for name, t in state.items()} if args.half else state)
    print(f"wrote {args.out} ({sum(p.numel() for p in model.parameters()) / 1e6:,.0f} M parameters)")


if __name__ == "__main__":
    data.run(main)
