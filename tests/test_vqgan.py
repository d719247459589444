import pytest
import torch
from conftest import TINY, Golden, close

from vqgan import VQGAN, Discriminator, Perceptual, VQConfig


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


def test_every_form_turns_pictures_into_a_square_of_tokens_and_back():
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


@pytest.mark.gradients
def test_training_gradients_pass_straight_through_the_codebook():
    vqgan = VQGAN(TINY.vqgan)
    z = torch.randn(1, 8, 4, 4, requires_grad=True)
    codes, loss, tokens = vqgan.quantize(z)
    close(codes, vqgan.quantize.lookup(tokens.view(1, 4, 4)), 1e-6)
    direction = torch.randn_like(codes)
    through, = torch.autograd.grad((codes * direction).sum(), z, retain_graph=True)
    plain, = torch.autograd.grad((torch.nn.functional.normalize(z, dim=1) * direction).sum(), z)
    close(through, plain, 1e-6)
    loss.backward()
    assert vqgan.quantize.embedding.weight.grad.abs().sum() > 0 and z.grad.abs().sum() > 0


def lpips_files():
    """Random weights under the names of the two public files."""
    features = Perceptual().features.state_dict()
    vgg = {f"features.{name}": torch.randn_like(tensor) * 0.05 for name, tensor in features.items()}
    heads = {f"lin{i}.model.1.weight": torch.rand(1, width, 1, 1) for i, width in enumerate((64, 128, 256, 512, 512))}
    return {**vgg, "classifier.0.weight": torch.zeros(1)}, heads


def test_the_perceptual_distance_takes_the_public_files_and_is_zero_for_equal_pictures_only():
    distance = Perceptual().load(*lpips_files())
    assert [name for name in distance.features.state_dict() if name.endswith("weight")][-1] == "28.weight"     # VGG-16
    a, b = torch.rand(2, 2, 3, 64, 64) * 2 - 1
    assert (distance(a, a) == 0).all() and (distance(a, b) > 0).all()
    close(distance(a, b), torch.stack([distance(a[i:i + 1], b[i:i + 1])[0] for i in range(2)]), 1e-5)


def test_the_discriminator_judges_a_picture_whatever_its_batch():
    pictures = torch.rand(3, 3, 64, 64)
    discriminator = Discriminator()
    close(discriminator(pictures)[1:2], discriminator(pictures[1:2]), 1e-5)


def test_codes_that_nothing_chose_are_placed_on_latents():
    quantize = VQGAN(TINY.vqgan).quantize
    unused = torch.arange(64) % 2 == 0
    before, z = quantize.embedding.weight.clone(), torch.randn(2, 8, 4, 4)
    quantize.revive(unused, z)
    latents = torch.nn.functional.normalize(z, dim=1).permute(0, 2, 3, 1).reshape(-1, 8)
    assert torch.equal(quantize.embedding.weight[~unused], before[~unused])
    assert torch.cdist(quantize.embedding.weight[unused], latents).min(dim=1).values.max() < 1e-2
