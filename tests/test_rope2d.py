import torch

from rope2d import apply_rope, prefix_and_image_table, prefix_positions, rope_table, token_positions

HEAD = 16


def scores(positions_q, positions_k, seed=0):
    """Rotated q . k for one random query and key at each pair of positions."""
    g = torch.Generator().manual_seed(seed)
    q, k = torch.randn(2, 1, 1, 1, HEAD, generator=g).expand(2, 1, 1, len(positions_q), HEAD)
    turned_q = apply_rope(q, rope_table(positions_q, HEAD)[None])
    turned_k = apply_rope(k, rope_table(positions_k, HEAD)[None])
    return (turned_q * turned_k).sum(-1).flatten()


def prefix_table(setting, is_image=torch.zeros(1, 5, dtype=torch.bool), patch_grid=4, grid=8):
    return prefix_and_image_table(setting, is_image, patch_grid, grid, HEAD)


def test_positions_enter_only_through_differences_of_rows_and_columns():
    here, there = torch.tensor([[3., 5.], [0., 2.], [7., 1.]]), torch.tensor([[1., 9.], [4., 4.], [7., 0.]])
    shift = torch.tensor([11., 6.])
    torch.testing.assert_close(scores(here, there), scores(here + shift, there + shift), atol=1e-5, rtol=0)
    assert (scores(here, there) - scores(here + torch.tensor([1., 0.]), there)).abs().min() > 1e-3
    assert (scores(here, there) - scores(here + torch.tensor([0., 1.]), there)).abs().min() > 1e-3


def test_rows_turn_the_first_half_of_the_pairs_and_columns_the_second():
    table = rope_table(torch.tensor([[2., 0.], [0., 2.]]), HEAD)[..., 1]       # sines, zero = not turned
    assert (table[0, :HEAD // 4] > 0).all() and (table[0, HEAD // 4:] == 0).all()
    assert (table[1, :HEAD // 4] == 0).all() and (table[1, HEAD // 4:] > 0).all()
    assert token_positions(8)[19].tolist() == [2, 3]


def test_the_default_prefix_rotation_is_the_identity():
    x = torch.randn(2, 3, 5, HEAD)
    torch.testing.assert_close(apply_rope(x, prefix_table("identity")[:, :5]), x, atol=0, rtol=0)


def test_zero_makes_every_prefix_score_equal():
    q, k = torch.randn(2, 1, 1, 5 + 64, HEAD)
    table = prefix_table("zero")
    attention = apply_rope(q[None], table) @ apply_rope(k[None], table).transpose(-1, -2)
    assert (attention[..., :5] == 0).all() and (attention[..., 5:, 5:] != 0).all()


def test_grid_puts_patches_where_their_tokens_are_and_leaves_text_unturned():
    is_image = torch.tensor([[False, False] + [True] * 16 + [False] + [True] * 16])
    same = prefix_positions(is_image, patch_grid=4, token_grid=4)[0]
    torch.testing.assert_close(same[2:18], token_positions(4))                 # equal grids coincide
    torch.testing.assert_close(same[19:], token_positions(4))                  # and so for the second picture
    assert (same[[0, 1, 18]] == 0).all()
    double = prefix_positions(is_image, patch_grid=4, token_grid=8)[0]
    torch.testing.assert_close(double[2:18], 2 * token_positions(4) + 0.5)     # the middle of its 2 x 2 tokens


def test_each_setting_leaves_the_image_tokens_table_alone():
    tables = [prefix_table(setting, torch.ones(1, 16, dtype=torch.bool)) for setting in ("identity", "zero", "grid")]
    for table in tables:
        torch.testing.assert_close(table[:, 16:], rope_table(token_positions(8), HEAD)[None], atol=0, rtol=0)
    assert not torch.equal(tables[0][:, :16], tables[2][:, :16])
