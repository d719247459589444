"""How a tokenizer is trained: straight-through gradients, dead codes, the discriminator and the perceptual distance."""
import pytest
import torch
import torch.nn.functional as F
from conftest import TINY, close

from cli import InputError
from model import Mentor
from vqgan import VQGAN
from world import tokenizer
from world.tokenizer import Discriminator, Perceptual, PixelObjective, quantize, reconstruct, restart_dead_codes


# ---------------------------------------------------------------------------------------------------------------------
# Codes

@pytest.mark.gradients
def test_training_gradients_pass_straight_through_the_codebook():
    vqgan = VQGAN(TINY.vqgan)
    z = torch.randn(1, 8, 4, 4, requires_grad=True)
    codes, loss, tokens = quantize(vqgan.quantize, z)
    close(codes, vqgan.quantize.lookup(tokens.view(1, 4, 4)), 1e-6)
    direction = torch.randn_like(codes)
    through, = torch.autograd.grad((codes * direction).sum(), z, retain_graph=True)
    plain, = torch.autograd.grad((F.normalize(z, dim=1) * direction).sum(), z)
    close(through, plain, 1e-6)
    loss.backward()
    assert vqgan.quantize.embedding.weight.grad.abs().sum() > 0 and z.grad.abs().sum() > 0


def test_a_reconstruction_is_what_its_tokens_decode_to_unless_it_is_not_quantized():
    vqgan, pixels = VQGAN(TINY.vqgan), torch.rand(2, 3, 16, 16) * 2 - 1
    image, loss, tokens = reconstruct(vqgan, pixels)
    assert torch.equal(tokens, vqgan.encode(pixels)) and loss > 0
    close(image, vqgan.decode(tokens), 1e-5)
    plain, loss, tokens = reconstruct(vqgan, pixels, quantized=False)
    assert loss == 0 and tokens is None
    close(plain, vqgan.decoder(vqgan.post_quant_conv(F.normalize(vqgan.latent(pixels), dim=1))), 0)


def test_codes_that_nothing_chose_are_placed_on_latents():
    quantizer = VQGAN(TINY.vqgan).quantize
    unused = torch.arange(64) % 2 == 0
    before, z = quantizer.embedding.weight.clone(), torch.randn(2, 8, 4, 4)
    restart_dead_codes(quantizer, unused, z)
    latents = F.normalize(z, dim=1).permute(0, 2, 3, 1).reshape(-1, 8)
    assert torch.equal(quantizer.embedding.weight[~unused], before[~unused])
    assert torch.cdist(quantizer.embedding.weight[unused], latents).min(dim=1).values.max() < 1e-2


# ---------------------------------------------------------------------------------------------------------------------
# Losses

def lpips_files():
    """Random weights under the names of the two public files."""
    features = Perceptual().features.state_dict()
    vgg = {f"features.{name}": torch.randn_like(tensor) * 0.05 for name, tensor in features.items()}
    heads = {f"lin{i}.model.1.weight": torch.rand(1, width, 1, 1) for i, width in enumerate((64, 128, 256, 512, 512))}
    return {**vgg, "classifier.0.weight": torch.zeros(1)}, heads


def test_the_perceptual_distance_takes_the_public_files_and_is_zero_for_equal_images_only():
    distance = Perceptual().load(*lpips_files())
    assert [name for name in distance.features.state_dict() if name.endswith("weight")][-1] == "28.weight"     # VGG-16
    a, b = torch.rand(2, 2, 3, 64, 64) * 2 - 1
    assert (distance(a, a) == 0).all() and (distance(a, b) > 0).all()
    close(distance(a, b), torch.stack([distance(a[i:i + 1], b[i:i + 1])[0] for i in range(2)]), 1e-5)


def test_files_that_hold_no_perceptual_distance_are_refused_in_one_sentence(tmp_path):
    vgg, heads = lpips_files()
    paths = [str(tmp_path / name) for name in ("vgg16.pth", "vgg.pth")]
    for path, tensors in zip(paths, (vgg, heads)):
        torch.save(tensors, path)
    distance = tokenizer.load_perceptual(paths)
    assert torch.equal(distance.heads[4], heads["lin4.model.1.weight"])
    assert not any(parameter.requires_grad for parameter in distance.parameters())
    with pytest.raises(InputError, match="--lpips .*do not hold VGG-16 and LPIPS' heads; give .* in this order"):
        tokenizer.load_perceptual(paths[::-1])
    torch.save({**heads, "lin2.model.1.weight": torch.ones(1, 3, 1, 1)}, paths[1])
    with pytest.raises(InputError, match="--lpips .*do not hold"):
        tokenizer.load_perceptual(paths)
    with pytest.raises(InputError, match="gone.pth"):
        tokenizer.load_perceptual([paths[0], str(tmp_path / "gone.pth")])


def test_the_discriminator_judges_an_image_whatever_its_batch():
    images = torch.rand(3, 3, 64, 64)
    discriminator = Discriminator()
    close(discriminator(images)[1:2], discriminator(images[1:2]), 1e-5)


def pixel_objective(adversarial):
    torch.manual_seed(0)
    return PixelObjective(Mentor(TINY), adversarial, fresh=False)


def image_batch():
    return {"target": torch.rand(2, 3, 24, 24, generator=torch.Generator().manual_seed(0)) * 2 - 1}


def test_the_discriminators_terms_count_in_training_only():
    plain, adversarial, losses = pixel_objective(0.0).eval(), pixel_objective(0.5), {}
    expected = plain(image_batch())
    for progress in (0.0, 0.9):
        adversarial.progress = progress
        close(adversarial.eval()(image_batch()), expected, 1e-6)
        losses[progress] = adversarial.train()(image_batch())
        assert (losses[progress] - expected).min() > 0.1
    assert (losses[0.9] - losses[0.0]).abs().min() > 1e-4


@pytest.mark.gradients
def test_the_tokenizer_listens_in_the_second_half_and_the_discriminator_never_learns_what_would_please_it():
    def gradients(adversarial, progress):
        objective = pixel_objective(adversarial).train()
        objective.progress = progress
        objective(image_batch()).sum().backward()
        return {name: p.grad for name, p in objective.named_parameters() if p.grad is not None}

    plain, first, second = gradients(0.0, 0.9), gradients(0.5, 0.0), gradients(0.5, 0.9)
    for name, gradient in first.items():
        if name.startswith("discriminator"):
            close(second[name], gradient, 1e-6)
        else:
            close(plain[name], gradient, 1e-6)
    last = "mentor.vqgan.decoder.conv_out.weight"
    assert (second[last] - first[last]).abs().max() > 1e-4


def test_a_new_tokenizer_does_not_quantize_at_first_and_then_notes_the_codes_it_uses():
    objective = PixelObjective(Mentor(TINY), fresh=True).train()
    batch = image_batch()
    objective.progress = 0.0
    first = objective(batch)
    assert first.shape == (2,) and not objective.used.any()
    objective.progress = tokenizer.UNQUANTIZED
    assert (objective(batch) - first).abs().max() > 1e-6
    tokens = objective.mentor.vqgan.encode(batch["target"])
    assert torch.equal(objective.used.nonzero().flatten(), tokens.unique())
    objective.used.zero_()
    objective.eval()(batch)
    assert not objective.used.any() and objective.elements(batch).tolist() == [1, 1]
