"""The tokenizer as it is used; its training stands in test_world_tokenizer.py."""
import pytest
import torch
from conftest import TINY, Golden, close

from vqgan import VQGAN, VQConfig


@pytest.mark.parametrize("name, atol", [
    ("vq16-64px", 1e-4),
    pytest.param("vq16-256px", 1e-3, marks=pytest.mark.full)])
def test_vq16_agrees_with_the_golden_outputs(name, atol):
    g = Golden(name)
    vqgan = VQGAN()
    g.fill(vqgan, {name: name for name in vqgan.state_dict()})
    close(vqgan.latent(g["image"]), g["latent"], atol)
    tokens = vqgan.encode(g["image"])
    assert torch.equal(tokens[0], g["indices"])
    close(vqgan.decode(tokens)[..., ::4, ::4], g["reconstruction"], atol)


def test_every_form_turns_images_into_a_square_of_tokens_and_back():
    for config in (TINY.vqgan, VQConfig(channels=16, multipliers=(1, 2, 2, 4), codes=32), VQConfig(channels=16)):
        side = 4 * config.factor
        tokens = VQGAN(config).encode(torch.rand(2, 3, side, side) * 2 - 1)
        assert tokens.shape == (2, 16) and 0 <= tokens.min() and tokens.max() < config.codes
        assert VQGAN(config).decode(tokens).shape == (2, 3, side, side)
    assert (VQConfig().factor, VQConfig(multipliers=(1, 2, 2, 4)).factor) == (16, 8)


def test_a_code_is_its_own_nearest_code_whatever_its_length():
    quantize = VQGAN(TINY.vqgan).quantize
    quantize.embedding.weight.copy_(torch.randn(64, 8))
    tokens = torch.arange(64).view(1, 8, 8)
    assert torch.equal(quantize.tokens(quantize.lookup(tokens) * 7), tokens.flatten(1))
