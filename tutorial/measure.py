"""Looks into trained small models, and keeps what the trainings of chapters 3 and 7 taught.

    python -m tutorial.measure rotations         # out/ten/zero, identity and grid -> tutorial/rotations.npz
    python -m tutorial.measure losses            # the logs of out/ten/vqgan, pretrain and grid -> tutorial/ten.json

Shape letters: B batch, T image tokens, S prefix rows, L = S + T, P patches of the reference, H heads, hd channels a
head. Next: `trainings.py`, then `figures.py`.
"""
import argparse
import json
import os
from dataclasses import replace

import numpy as np
import torch

import cli
import data
import weights
from rope2d import apply_rope
from tutorial.drawing import HERE
from world.rows import EmojiData

ROTATIONS = ("zero", "identity", "grid")
PLACES = ((0.3, 0.3), (0.55, 0.55), (0.8, 0.3))        # of the tokens that are looked at: row, column, as shares
SEED = 73                                              # of pictures that no training uses
TEN = os.path.join(HERE, "ten.json")


# ---------------------------------------------------------------------------------------------------------------------
# Looking into a model

def painted(mentor, task, count=1, seed=5):
    """Pictures of held-out subjects that the emoji world paints for a task, as the network reads them. -> list"""
    dataset = EmojiData(mentor.processor, mentor.config.image_size, {task: 1}, seed, held_out=True, extras=False)
    return [dataset[k] for k in range(count)]


def prefix_of(mentor, batch):
    """-> Prefix of a batch"""
    return mentor.prefix(batch["ids"], batch["mask"], batch["refs"], words=batch.get("words"))


def pictures_of(mentor, tokens):
    """(B, T) tokens -> PIL pictures"""
    return [data.to_image(mentor.vqgan.decode(row[None])[0]) for row in tokens]


def attention(module, x, rope, mask):
    """The softmax inside one model.Attention, which itself never keeps it. x: (B, L, D) -> (B, H, L, L)"""
    q, k, _ = module.wqkv(x).unflatten(-1, (3, module.heads, -1)).permute(2, 0, 3, 1, 4)  # each (B, H, L, hd)
    scores = apply_rope(q, rope) @ apply_rope(k, rope).transpose(-1, -2) / q.size(-1)**0.5
    return (scores + mask).softmax(dim=-1)


def attention_to_prefix(mentor, batch, prefix_rope=None):
    """How much every image token attends to every prefix row while it is predicted. prefix_rope: another rotation than
    the model's own. -> (layers, B, H, T, S)"""
    prefix, tokens, seen, config = prefix_of(mentor, batch), mentor.target_tokens(batch), [], mentor.decoder.config
    hooks = [layer.attention.register_forward_pre_hook(lambda module, inputs: seen.append((module, *inputs[:3])))
             for layer in mentor.decoder.layers]
    mentor.decoder.config = replace(config, prefix_rope=prefix_rope or config.prefix_rope)
    mentor.decoder(prefix, tokens[:, :-1], mentor.config.grid)
    mentor.decoder.config = config
    for hook in hooks:
        hook.remove()
    rows = prefix.rows.size(1)                             # row S - 1 predicts token 0
    return torch.stack([attention(*inputs)[:, :, rows - 1:, :rows] for inputs in seen])


# ---------------------------------------------------------------------------------------------------------------------
# What trainings taught

def measure_rotations(count=16, shown=3):
    """Where in the reference the models of chapter 3 look while they copy a held-out picture, and what they draw."""
    kept = {"maps": [], "shares": [], "losses": [], "drawn": []}
    for rotation in ROTATIONS:
        mentor = weights.load(os.path.join("out", "ten", rotation))
        batch = data.collate(painted(mentor, "reconstruct", count, SEED))
        grid, patches = mentor.config.grid, mentor.config.vision.grid
        is_image = prefix_of(mentor, batch).is_image
        found = attention_to_prefix(mentor, batch)                                        # (layers, B, H, T, S)
        found = torch.stack([found[:, i][..., is_image[i]] for i in range(count)]).mean(dim=0).flatten(0, 1)
        k = torch.arange(grid * grid)
        own = (k // grid * patches // grid) * patches + k % grid * patches // grid        # (T,) the patch under a token
        share = found.gather(-1, own.expand(len(found), -1)[..., None]).mean(dim=(1, 2))  # (layers * H,)
        head = share.argmax()
        tokens = [int(row * grid) * grid + int(column * grid) for row, column in PLACES]
        kept["maps"].append(found[head, tokens].unflatten(-1, (patches, patches)).numpy())
        kept["shares"].append(share[head].item())
        kept["losses"].append(mentor(batch).mean().item())
        drawn = mentor.generate(prefix_of(mentor, batch), list(range(count)))[:shown]
        kept["drawn"].append([np.asarray(image) for image in pictures_of(mentor, drawn)])
        print(f"{rotation}: {share[head]:.3f} of a head's attention on the patch under the token (evenly spread over "
              f"the patches: {1 / patches**2:.3f}), loss {kept['losses'][-1]:.3f}")
    targets = [np.asarray(data.to_image(pixels)) for pixels in batch["target"][:shown]]
    kept = {name: np.array(values) for name, values in kept.items()}
    with cli.atomic_file(os.path.join(HERE, "rotations.npz")) as temporary:
        with open(temporary, "wb") as file:
            np.savez_compressed(file, targets=np.array(targets), **kept | {"maps": kept["maps"].astype(np.float16)})


def measure_losses(window=30, points=40):
    """The losses of the ten-minute model, each the mean of `window` steps."""
    stages = {}
    for stage, folder in (("vqgan", "vqgan"), ("pretrain", "pretrain"), ("stage 1", "grid")):
        curves = {}
        with open(os.path.join("out", "ten", folder, "log.jsonl"), encoding="utf-8") as file:
            for record in map(json.loads, file):
                for task, loss in record.get("losses", {}).items():
                    curves.setdefault(task, []).append((record["step"], loss))
        stages[stage] = {}
        for task, curve in curves.items():
            steps, losses = np.array(curve).T
            smooth = np.convolve(losses, np.ones(window) / window, mode="valid")
            kept = np.linspace(0, len(smooth) - 1, points).round().astype(int)
            stages[stage][task] = [(int(steps[k + window - 1]), round(float(smooth[k]), 4)) for k in kept]
    cli.write_json(TEN, stages)


MEASURES = {"rotations": measure_rotations, "losses": measure_losses}


@torch.inference_mode()
def main(argv=None):
    """Takes one measure."""
    parser = cli.Parser(prog="python -m tutorial.measure", description=__doc__,
                        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=MEASURES)
    MEASURES[parser.parse_args(argv).name]()


if __name__ == "__main__":
    cli.run(main)
