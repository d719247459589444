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


@pytest.mark.gradients
def test_the_discriminator_speaks_in_training_only_and_learns_from_the_second_half_nothing_of_the_tokenizers_loss():
    torch.manual_seed(0)
    objective = PixelObjective(Mentor(TINY), adversarial=0.5, fresh=False)
    batch = {"target": torch.rand(2, 3, 24, 24) * 2 - 1}
    with torch.no_grad():
        losses = {}
        for progress in (0.0, 0.9):
            objective.progress = progress
            losses[progress, "eval"] = objective.eval()(batch)
            losses[progress, "train"] = objective.train()(batch)
    close(losses[0.0, "eval"], losses[0.9, "eval"], 1e-6)
    assert (losses[0.0, "train"] - losses[0.0, "eval"]).abs().min() > 0.1
    # the two hinge terms stay near 2 while scores are small; in the second half the tokenizer's term joins them
    assert ((losses[0.9, "train"] - losses[0.0, "train"]).abs() > 1e-4).all()

    gradients = {}
    for progress in (0.0, 0.9):
        objective.zero_grad()
        objective.progress = progress
        objective(batch).sum().backward()
        gradients[progress] = {name: p.grad.clone() for name, p in objective.named_parameters() if p.grad is not None}
    for name, gradient in gradients[0.0].items():
        moved = (gradients[0.9][name] - gradient).abs().max() > 1e-7
        if name.startswith("discriminator"):
            assert not moved, f"{name} learns from what the tokenizer wants"
    assert any((gradients[0.9][name] - gradients[0.0][name]).abs().max() > 1e-6 for name in gradients[0.0]
               if name.startswith("mentor.vqgan.decoder"))


def test_a_new_tokenizer_does_not_quantize_at_first_and_then_notes_the_codes_it_uses():
    objective = PixelObjective(Mentor(TINY), fresh=True).train()
    batch = {"target": torch.rand(2, 3, 24, 24) * 2 - 1}
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
