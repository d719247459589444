"""Rotary positions in two dimensions: how the decoder knows where a token stands in the image.

A head's channels are taken in pairs, and each pair is a point in a plane that is rotated about the origin. A token at
(row, column) rotates the first half of its pairs by its row and the second half by its column, each pair at its own
speed. The score of a query and a key is a dot product, so only the *difference* of their angles remains: attention
sees "two rows up, one column left", wherever in the image that is.

By hand: a 2 x 2 grid and head_dim 8, so 4 pairs. Their speeds are (1, 1/100) for the row and (1, 1/100) for the column:

    token 0 at (0, 0): angles (0, 0,    0, 0   )          token 1 at (0, 1): angles (0, 0,    1, 1/100)
    token 2 at (1, 0): angles (1, 1/100, 0, 0  )          token 3 at (1, 1): angles (1, 1/100, 1, 1/100)

The prefix (prompt and reference rows in front of the image's tokens) stands in no row or column. Three settings:

    identity   angle 0: nothing is rotated, a prefix row is compared by its content alone.                     (default)
    zero       what LlamaGen's code did (its issue 54): its table held zeros for the prefix, meant as "angle 0"
               (autoregressive/models/gpt.py, `torch.zeros(cls_token_num, n_elem // 2, 2)`). But the table holds cosines
               and sines, and cos(0) = 1. Multiplying a key by (0, 0) does not leave it alone, it erases it:

                   rotated = (x0 * cos - x1 * sin, x0 * sin + x1 * cos)
                   table (cos, sin) = (0, 0)  ->  rotated = (0, 0)        error: key gone, every prefix score q.k = 0
                   table (cos, sin) = (1, 0)  ->  rotated = (x0, x1)      fix:   key as it was

               With all scores equal, softmax gives every prefix row the same weight: each image token reads the plain
               average of the prefix. LlamaGen's public weights were trained that way and need it.
    grid       the reference images' rows of the prefix are rotated by the place of their patch, scaled to the token
               grid; text stays at angle 0. What is at the upper left of the reference then has nearly the angles of
               the tokens at the upper left of the new image. This project's own; no public weights use it.

Shape letters: B batch, S prefix rows, T image tokens, L = S + T, H heads, hd channels a head.
Next: `model.py`, whose attention calls `apply_rope` on queries and keys.
"""
import torch

PREFIX_ROPE = ("identity", "zero", "grid")


def token_positions(grid, device=None):
    """(row, column) of the image tokens in raster order: token k stands at (k // grid, k % grid). -> (T, 2) fp32"""
    k = torch.arange(grid * grid, device=device)
    return torch.stack([k // grid, k % grid], dim=-1).float()                             # (T, 2)


def prefix_positions(is_image, patch_grid, token_grid):
    """(row, column) of every prefix row, for the setting `grid`.

    is_image: (B, S) bool, True where a row came from a reference image; such rows come in whole images of
    patch_grid**2 rows in raster order. Patch (r, c) covers token_grid / patch_grid tokens a side and stands in their
    middle; text and padding stand at (0, 0), which is angle 0. -> (B, S, 2) fp32
    """
    patch = (is_image.cumsum(dim=1) - 1) % patch_grid**2                                  # (B, S)
    position = torch.stack([patch // patch_grid, patch % patch_grid], dim=-1)             # (B, S, 2)
    scale = token_grid / patch_grid
    return ((position + 0.5) * scale - 0.5) * is_image.unsqueeze(-1)                      # (B, S, 2)


def rope_table(positions, head_dim, base=10000.0):
    """cos and sin of every pair's angle at the given places.

    positions: (..., 2) row and column. -> (..., head_dim / 2, 2) fp32, the last axis being (cos, sin); the first half
    of the pairs by row, the second by column, pair j of a half at base ** (-2j / (head_dim / 2)) radians a step.
    """
    j = torch.arange(head_dim // 4, device=positions.device)
    speed = base ** (-2 * j / (head_dim // 2))                                            # (hd / 4,)
    angle = (positions.unsqueeze(-1) * speed).flatten(-2)                                 # (..., hd / 2)
    return torch.stack([angle.cos(), angle.sin()], dim=-1)                                # (..., hd / 2, 2)


def prefix_and_image_table(prefix_rope, is_image, patch_grid, token_grid, head_dim, base=10000.0):
    """The table of a whole sequence, prefix then image tokens.

    prefix_rope: one of PREFIX_ROPE. is_image: (B, S) bool as in `prefix_positions`.
    -> (1 or B, S + T, head_dim / 2, 2); the batch axis is 1 unless the prefix positions differ from sample to sample.
    """
    if prefix_rope == "grid":
        prefix = rope_table(prefix_positions(is_image, patch_grid, token_grid), head_dim, base)
    else:
        prefix = rope_table(torch.zeros(1, is_image.size(1), 2, device=is_image.device), head_dim, base)
    if prefix_rope == "zero":
        prefix = torch.zeros_like(prefix)
    image = rope_table(token_positions(token_grid, is_image.device), head_dim, base)      # (T, hd / 2, 2)
    return torch.cat([prefix, image.expand(prefix.size(0), -1, -1, -1)], dim=1)           # (1 or B, L, hd / 2, 2)


def apply_rope(x, table):
    """Rotates queries or keys. x: (B, H, L, hd); table: (1 or B, L, hd / 2, 2). -> x's shape and dtype"""
    x0, x1 = x.float().unflatten(-1, (-1, 2)).unbind(-1)                                  # pairs are channels 2i, 2i+1
    cos, sin = table.unsqueeze(1).unbind(-1)                                              # (1 or B, 1, L, hd / 2)
    rotated = torch.stack([x0 * cos - x1 * sin, x0 * sin + x1 * cos], dim=-1)             # (B, H, L, hd / 2, 2)
    return rotated.flatten(-2).type_as(x)                                                 # (B, H, L, hd)
