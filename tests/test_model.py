"""The network as a whole: agreement with independent implementations, and what must hold whatever the weights."""
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import TINY, Golden, close, decoder_config, t5_config, vision_config
from PIL import Image

import cli
import data
import weights
from cli import InputError
from encoder import QueryConfig
from model import (SIZES, Decoder, Mentor, MentorConfig, Prefix, Sampling, guide, left_pad, make_mask,
                   sample_tokens)
from vqgan import VQConfig


def tiny(t5_decoder=False, **changes):
    """A tiny model whose output layer is not zero, so that everything matters."""
    torch.manual_seed(0)
    config = replace(TINY, decoder=replace(TINY.decoder, **changes))
    model = Mentor(config, weights.byte_tokenizer(), t5_decoder).eval()
    for parameter in model.decoder.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def random_prefix(valid, width=64):
    """Random rows; valid: per sample, how many of the rows are not padding."""
    rows = max(valid)
    mask = torch.arange(rows)[None] >= rows - torch.tensor(valid)[:, None]
    return Prefix(torch.randn(len(valid), rows, width) * mask[..., None], mask, torch.zeros_like(mask))


def text_batch(lengths=(8, 5), count=36):
    """Prompts of so many tokens without images, and image tokens to teach."""
    mask = torch.arange(max(lengths))[None] < torch.tensor(lengths)[:, None]
    return {"ids": torch.full(mask.shape, 9) * mask, "mask": mask, "refs": torch.empty(0, 3, 56, 56),
            "tokens": torch.randint(64, (len(lengths), count))}


def prompts(model, *samples):
    """(prompt, images) each -> batch"""
    return data.collate([model.processor(prompt, images) for prompt, images in samples])


# ---------------------------------------------------------------------------------------------------------------------
# Agreement with independent implementations

@pytest.mark.parametrize("name, step, atol", [
    ("decoder-small", 1, 1e-4),
    ("decoder-b", 64, 1e-3),
    pytest.param("decoder-xl", 64, 1e-3, marks=pytest.mark.full)])
def test_the_decoder_agrees_with_the_golden_outputs(name, step, atol):
    g = Golden(name)
    c, rows = g.config, g.config["prefix_tokens"]
    config = replace(TINY, t5=replace(TINY.t5, width=c["caption_dim"]), decoder=decoder_config(c["model"]),
                     prefix_tokens=rows)
    model = Mentor(config)
    g.fill(model, weights.public_names(model, "decoder"))
    valid = torch.arange(rows)[None] >= rows - g["prefix_lengths"][:, None]
    h = g.noise("prefix", (2, rows, c["caption_dim"])) * valid[..., None]
    prefix = model.project(h, valid, torch.zeros_like(valid))
    close(model.decoder(prefix, g["tokens"], c["grid"])[..., ::step], g["logits"], atol)
    if "greedy" in g.tensors:
        scale = float(c["greedy"].split("guidance ")[1].split(":")[0])
        tokens = model.generate(prefix, [0, 1], Sampling(scale, temperature=0), c["grid"], g["greedy"].size(1))
        assert torch.equal(tokens, g["greedy"])


def test_the_whole_network_agrees_with_the_golden_outputs():
    g = Golden("mentor-small")
    c = g.config
    config = MentorConfig(vision_config(c["clip"]), t5_config(c["t5"]), "released",
                          decoder_config({**c["decoder"], "vocab_size": c["vocab"]}), VQConfig(channels=16),
                          c["prefix_tokens"], 16 * c["grid"], c["image_token_id"])
    model = Mentor(config)
    g.fill(model, weights.public_names(model, "mentor"))
    side = config.vision.image_size
    refs = g.noise("mentor-pixels", (2, 1, 3, side, side))[g["image_mask"]]
    ids, mask = g["input_ids"], g["attention_mask"].bool()
    close(model.encoder(ids, mask, refs), g["encoder_output"], 1e-4)
    losses = model({"ids": ids, "mask": mask, "refs": refs, "tokens": g["tokens"]})
    logits = model.decoder(model.prefix(ids, mask, refs), g["tokens"][:, :-1], c["grid"])
    close(logits, g["logits"], 1e-4)
    close(losses.mean().view(1), g["loss"], 1e-5)
    tokens = model.generate(model.prefix(ids, mask, refs), [0, 1], Sampling(c["cfg_scale"], temperature=0))
    assert torch.equal(tokens, g["greedy"])


def test_the_sizes_table_gives_the_published_numbers_of_parameters():
    for size, millions in {"B": 111, "L": 343, "XL": 775, "XXL": 1400, "3B": 3100}.items():
        with torch.device("meta"):
            decoder = Decoder(SIZES[size].decoder)
        counted = sum(p.numel() for p in decoder.parameters()) / 1e6
        assert abs(counted - millions) / millions < 0.02, (size, counted)
        assert SIZES[size].decoder.width % SIZES[size].decoder.heads == 0


# ---------------------------------------------------------------------------------------------------------------------
# Properties

@pytest.mark.parametrize("prefix_rope", ["identity", "zero", "grid"])
def test_cached_decoding_equals_the_full_forward_at_every_position(prefix_rope):
    model = tiny(prefix_rope=prefix_rope)
    prefix = random_prefix([20, 9, 20])
    prefix.is_image[:, 2:18] = prefix.valid[:, 2:18]
    tokens = torch.randint(64, (3, 36))
    full = model.decoder(prefix, tokens, 6)
    logits, cache, rope = model.decoder.prefill(prefix, 6)
    for k in range(36):
        close(logits, full[:, k], 1e-5)
        logits = model.decoder.decode_step(tokens[:, k], cache, rope)
    close(logits, full[:, 36], 1e-5)


def test_the_three_prefix_rotations_differ_in_what_they_compute():
    prefix, tokens = random_prefix([20]), torch.randint(64, (1, 36))
    prefix.is_image[:, 2:18] = True
    identity, zero, grid = (tiny(prefix_rope=setting).decoder(prefix, tokens, 6) for setting in
                            ("identity", "zero", "grid"))
    assert min((identity - zero).abs().max(), (identity - grid).abs().max()) > 1e-3


def test_padding_of_the_prefix_changes_nothing():
    model, tokens = tiny(), torch.randint(64, (1, 36))
    prefix = random_prefix([11])
    padded = Prefix(*(torch.cat([torch.ones_like(part[:, :7]) * (part.dtype != torch.bool), part], dim=1)
                      for part in prefix))
    assert padded.rows.size(1) == 18 and padded.valid.sum() == 11
    close(model.decoder(padded, tokens, 6), model.decoder(prefix, tokens, 6), 1e-5)
    sampling = Sampling(2.0, top_k=64)
    assert torch.equal(model.generate(padded, [3], sampling), model.generate(prefix, [3], sampling))


def test_an_image_depends_on_its_seed_and_prompt_but_not_on_its_batch():
    model = tiny()
    prefix = random_prefix([12, 5, 12])
    together = model.generate(prefix, [5, 6, 7])
    for i, rows in enumerate([12, 5, 12]):
        alone = Prefix(*(part[i:i + 1, -rows:] for part in prefix))
        assert torch.equal(model.generate(alone, [5 + i]), together[i:i + 1])
    assert not torch.equal(model.generate(prefix, [8, 9, 10]), together)


def test_left_pad_moves_valid_rows_to_the_end():
    rows = torch.arange(1., 9).view(2, 4, 1)
    mask = torch.tensor([[True, True, False, False], [True] * 4])
    assert left_pad(rows, mask).flatten().tolist() == [0, 0, 1, 2, 5, 6, 7, 8]
    assert left_pad(mask, mask).tolist() == [[0, 0, 1, 1], [1, 1, 1, 1]]


def test_the_mask_is_causal_hides_padding_and_opens_the_diagonal():
    mask = make_mask(torch.tensor([[False, True, True, True]]))[0, 0].exp().int()
    assert mask.tolist() == [[1, 0, 0, 0], [0, 1, 0, 0], [0, 1, 1, 0], [0, 1, 1, 1]]


def test_sampled_tokens_follow_temperature_top_k_and_top_p():
    probabilities = torch.tensor([0.1, 0.4, 0.05, 0.3, 0.15])
    logits = probabilities.log().expand(20_000, 5)
    uniform = torch.rand(20_000, generator=torch.Generator().manual_seed(0))

    def share(**changes):
        sampling = Sampling(**{"top_k": 5, **changes})
        return torch.bincount(sample_tokens(logits, uniform, sampling), minlength=5) / 20_000
    close(share(), probabilities, 0.01)
    close(share(top_k=2), torch.tensor([0, 4, 0, 3, 0]) / 7, 0.01)
    close(share(top_p=0.65), torch.tensor([0, 4, 0, 3, 0]) / 7, 0.01)
    close(share(top_p=0.75), torch.tensor([0, 0.4, 0, 0.3, 0.15]) / 0.85, 0.01)
    close(share(temperature=0.5), probabilities**2 / (probabilities**2).sum(), 0.01)
    assert share(temperature=0.0)[1] == 1 and share(top_p=1e-6)[1] == 1 and share(top_k=1)[1] == 1


def test_guidance_of_one_is_the_condition_alone():
    model = tiny()
    prefix = random_prefix([6])
    tokens = model.generate(prefix, [0], Sampling(1.0, temperature=0, top_k=64))
    logits = model.decoder(prefix, tokens[:, :-1], 6)
    assert torch.equal(tokens, logits.argmax(-1))


def test_guide_with_a_scale_of_one_is_the_condition_and_else_goes_away_from_the_unconditional():
    cond, uncond = torch.randn(2, 3, 5)
    assert guide(cond, 1) is cond and guide(cond, 1.0) is cond             # there is no unconditional half then
    both = torch.cat([cond, uncond])
    close(guide(both, 1 + 1e-6), cond, 1e-5)
    close(guide(both, 0), uncond, 0)
    close(guide(both, 3), uncond + 3 * (cond - uncond), 1e-6)
    assert guide(both.half(), 3).dtype == torch.float32        # in fp16 the difference would lose its last digits


@pytest.mark.gradients
def test_dropped_conditions_train_the_unconditional_rows_and_nothing_else_does():
    model, batch = tiny().train(), text_batch()
    model(batch | {"drop": torch.tensor([False, False])}).mean().backward()
    assert (model.projector.uncond.grad == 0).all()
    model(batch | {"drop": torch.tensor([False, True])}).mean().backward()
    touched = model.projector.uncond.grad.abs().sum(dim=1) > 0
    assert touched[-5:].all() and not touched[:-5].any()       # the rows at the end, under the sample's own mask


@pytest.mark.gradients
@pytest.mark.parametrize("frozen_clip", [False, True])
def test_a_batch_without_images_gives_the_connector_gradients_of_zero_and_not_none(frozen_clip):
    model = tiny().train()                                     # DDP waits for a gradient of everything that trains
    model.encoder.clip.requires_grad_(not frozen_clip)
    model(text_batch()).mean().backward()
    for name, parameter in model.encoder.connector.named_parameters():
        assert parameter.grad is not None and (parameter.grad == 0).all(), name
    assert model.encoder.t5.embed.weight.grad.abs().sum() > 0


def test_losses_are_the_cross_entropy_of_every_token_given_those_before_it():
    model, batch = tiny(), text_batch()
    losses, prefix = model(batch), model.prefix(batch["ids"], batch["mask"])
    log_p = model.decoder(prefix, batch["tokens"][:, :-1], 6).log_softmax(dim=-1)
    assert losses.shape == (2, 36)
    close(losses, -log_p.gather(-1, batch["tokens"].unsqueeze(-1)).squeeze(-1), 1e-5)
    changed = batch | {"tokens": torch.cat([batch["tokens"][:, :20], (batch["tokens"][:, 20:] + 1) % 64], dim=1)}
    difference = (model(changed) - losses).abs().amax(dim=0)
    assert difference[:20].max() < 1e-5 and difference[20:].min() > 1e-5


@pytest.mark.parametrize("connector", ["released", "query"])
def test_the_number_of_pictures_may_vary_inside_a_batch(connector):
    torch.manual_seed(0)
    query = QueryConfig(32, 2, 4, 48, vocab_size=264, positions=64, queries=6)
    config = replace(TINY, connector=connector, query=query, prefix_tokens=96)
    model = Mentor(config, weights.byte_tokenizer()).eval()
    torch.nn.init.normal_(model.decoder.output.weight)
    images = [Image.fromarray(np.random.default_rng(i).integers(0, 255, (30, 30, 3), dtype=np.uint8)) for i in range(4)]
    samples, words = [], ["one", "two and", "three " * 40, "four"]
    for n in (0, 4, 1, 2):
        samples.append(model.processor("<image> " * n, images[:n], words[:n]) | {"tokens": torch.arange(36)})
        assert (samples[-1]["ids"] == 259).sum() == model.encoder.image_tokens * n
    together = model(data.collate(samples))
    for i, sample in enumerate(samples):
        close(together[i:i + 1], model(data.collate([sample])), 1e-4)


def test_a_query_connectors_rows_have_no_place_for_the_grid_rotation():
    with pytest.raises(InputError, match="turns image rows by the place of their patch, but the query"):
        Mentor(replace(TINY, connector="query", decoder=replace(TINY.decoder, prefix_rope="grid")))


def test_losses_of_target_pixels_are_those_of_their_tokens():
    model, batch, pixels = tiny(), text_batch(), torch.rand(2, 3, 24, 24) * 2 - 1
    batch["tokens"] = model.vqgan.encode(pixels)
    by_pixels = {key: value for key, value in batch.items() if key != "tokens"} | {"target": pixels}
    close(model(by_pixels), model(batch), 0)


def test_a_batch_with_labels_gives_the_losses_of_captions():
    model, image = tiny(t5_decoder=True), Image.effect_noise((60, 60), 80).convert("RGB")
    batch = prompts(model, ("<image>", [image]), ("<image>", [image.rotate(90)]))
    batch["labels"] = torch.tensor([[7, 8, 9, 1, -100], [5, 1, -100, -100, -100]])
    losses = model(batch)
    memory = model.encoder(batch["ids"], batch["mask"], batch["refs"])
    close(losses, model.encoder.t5.caption_losses(memory, batch["mask"], batch["labels"]), 0)
    assert losses.shape == (2, 5) and ((losses > 0) == (batch["labels"] >= 0)).all()
    other = model(batch | {"refs": batch["refs"].flip(0)})
    assert ((other - losses).abs() > 1e-6).sum() == 6          # the image matters to every label


@pytest.mark.gradients
def test_a_new_decoder_starts_at_the_uniform_distribution_with_its_published_spread():
    model = Mentor(SIZES["toy"])
    losses = model({"ids": torch.full((1, 4), 9), "mask": torch.ones(1, 4, dtype=torch.bool), "refs": None,
                    "tokens": torch.randint(1024, (1, 16))})
    close(losses.detach(), torch.full((1, 16), 1024.).log(), 1e-5)
    assert (model.decoder.output.weight == 0).all()
    assert abs(model.decoder.layers[0].attention.wqkv.weight.std().item() - 0.02) < 2e-3


def test_fp16_and_bf16_compute_and_fp16_spares_the_encoder():
    for dtype in (torch.bfloat16, torch.float16):
        model = weights.place(tiny(), "cpu", dtype)
        tokens = model.generate(model.prefix(torch.full((1, 6), 9), torch.ones(1, 6, dtype=torch.bool)), [0])
        assert tokens.shape == (1, 36) and model.decoder.output.weight.dtype == dtype
        assert model.encoder.t5.embed.weight.dtype == (torch.bfloat16 if dtype == torch.bfloat16 else torch.float32)


def test_sample_makes_images_of_the_size_asked_for_from_a_prompt_and_references(tmp_path):
    model = tiny()
    photo = Image.effect_noise((90, 70), 80).convert("RGB")
    photo.save(tmp_path / "dog.png")
    path, prompt = str(tmp_path / "dog.png"), "The dog in <image>.\nin the snow"
    template = data.prompt_for("subject", [cli.subject_of(path)], "in the snow")
    by_path = model.sample(prompts(model, (template, [data.open_image(path)])), [1])
    by_image = model.sample(prompts(model, (prompt, [photo])), [1])
    assert by_path.shape == (1, 3, 24, 24) and torch.equal(by_path, by_image)
    pair = model.sample(prompts(model, (prompt, [photo])), [0, 1])
    assert torch.equal(pair[1:], by_image) and not torch.equal(pair[:1], by_image)
    text = prompts(model, ("text to image", []))
    assert model.sample(text, [0], size=16).shape == (1, 3, 16, 16)
    for size in (512, 18, -8):
        with pytest.raises(InputError, match=f"up to 24 pixels a side, in steps of 4, not {size}"):
            model.sample(text, [0], size=size)


def test_sampling_each_prompt_several_times_equals_single_samples():
    model, image = tiny(), Image.effect_noise((60, 60), 80).convert("RGB")
    samples = [("a cat", []), ("The dog in <image>.\na dog in the snow", [image])]
    together = model.sample(prompts(model, *samples), [4, 5, 6, 7, 8, 4])
    single = [model.sample(prompts(model, samples[i // 3]), [seed]) for i, seed in enumerate([4, 5, 6, 7, 8, 4])]
    assert torch.equal(together, torch.cat(single))
    assert all((a != b).any() for i, a in enumerate(single) for b in single[:i])


@pytest.mark.parametrize("wrong", [dict(top_k=0), dict(top_k=65), dict(top_p=0.0), dict(top_p=1.5),
                                   dict(temperature=-1.0), dict(cfg_scale=float("nan"))])
def test_senseless_sampling_settings_are_refused(wrong):
    model = tiny()
    with pytest.raises(InputError, match="must"):
        model.sample(prompts(model, ("x", [])), [0], replace(model.config.sampling, **wrong))


def test_numbers_too_large_for_their_type_stop_the_sampling():
    model = tiny()
    model.decoder.output.weight[5] = float("inf")
    with pytest.raises(InputError, match="not finite.*--dtype bf16 or fp32"):
        model.sample(prompts(model, ("x", [])), [0])


def test_masks_lie_in_memory_as_a_gpu_wants_them_so_that_no_layer_copies_them(monkeypatch):
    model, strides = tiny(t5_decoder=True), []
    attention = F.scaled_dot_product_attention

    def record(q, k, v, attn_mask=None, **options):
        if attn_mask is not None:
            strides.extend(attn_mask.stride()[:-1])
        return attention(q, k, v, attn_mask=attn_mask, **options)
    monkeypatch.setattr(F, "scaled_dot_product_attention", record)
    model({**text_batch((13, 5)), "drop": None})
    model({**text_batch((13, 5)), "labels": torch.randint(9, (2, 11))})
    model.generate(random_prefix([13, 5]), [0, 1], count=4)
    assert strides and not [stride for stride in strides if stride % 8]


def test_offloading_samples_the_same_image_with_less_in_memory():
    samples = [("The cat in <image>.\na cat", [Image.new("RGB", (40, 40), "red")])]
    model = tiny()
    plain = model.sample(prompts(model, *samples), [3])
    model = weights.place(tiny(), "cpu", torch.float32, offload=True)
    assert torch.equal(model.sample(prompts(model, *samples), [3], offload=True), plain)
    assert all(p.is_meta for p in model.encoder.parameters())
