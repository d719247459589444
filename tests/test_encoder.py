"""The networks that read images and text (CLIP's text half and DINO, which only score, stand in test_scorers.py)."""
import pytest
import torch
from conftest import TINY, Golden, close, t5_config, vision_config

from cli import InputError
from encoder import T5, ClipVision, Connector, MultimodalEncoder, QueryConfig, QueryConnector, T5Config
from weights import CLIP_NAMES, QUERY_NAMES, T5_NAMES, public_name


@pytest.mark.parametrize("name, step, atol", [
    ("clip-small", 1, 1e-4),
    pytest.param("clip-vit-l14", 8, 1e-3, marks=pytest.mark.full)])
def test_clips_vision_tower_agrees_with_the_golden_outputs(name, step, atol):
    g = Golden(name)
    config = vision_config(g.config["vision"])
    vision = ClipVision(config)
    g.fill(vision, {public_name("vision." + name, CLIP_NAMES): name for name in vision.state_dict()})
    pixels = g.noise("pixels", (1, 3, config.image_size, config.image_size))
    close(vision(pixels)[:, ::step, ::step], g["penultimate_patches"], atol)
    close(vision.forward_features(pixels, config.layers - 1)[:, 1:], vision(pixels), 0)


@pytest.mark.parametrize("name, channels, codes, atol", [
    ("t5-small", 1, 4, 1e-4),
    ("t5-long", 4, 16, 1e-4),
    pytest.param("flan-t5-xl-encoder", 16, None, 1e-3, marks=pytest.mark.full)])
def test_t5_agrees_with_the_golden_outputs(name, channels, codes, atol):
    g = Golden(name)
    t5 = g.fill_by_table(T5(t5_config(g.config["config"]), decoder=codes is not None), T5_NAMES)
    mask = g["attention_mask"].bool()
    h = t5.encode(t5.embed(g["input_ids"]), mask)
    close(h[..., ::channels], g["encoder_output"], atol)
    if codes:
        close(t5.caption_logits(h, mask, g["labels"])[..., ::codes], g["logits"], atol)
        close(t5.caption_losses(h, mask, g["labels"]).mean().view(1), g["loss"], 1e-5)


def test_t5_starts_with_queries_small_enough_for_unscaled_scores():
    config = T5Config(width=192, layers=1, heads=6, head_dim=32, mlp=64, vocab_size=10)
    attention = T5(config).encoder.blocks[0].attn
    for part, std in ((attention.q, (192 * 32)**-0.5), (attention.k, 192**-0.5)):
        assert abs(part.weight.std() / std - 1) < 0.05
    x = torch.randn(1, 500, 192)
    q, k = (part(x).view(500, 6, 32) for part in (attention.q, attention.k))
    assert 0.8 < torch.einsum("qhd,khd->hqk", q, k).std() < 1.2


def test_padding_changes_nothing_and_padded_rows_are_zero():
    t5 = T5(TINY.t5, decoder=True).eval()
    ids = torch.randint(2, 200, (1, 9))
    short = t5.encode(t5.embed(ids), torch.ones(1, 9, dtype=torch.bool))
    padded_ids = torch.cat([ids, torch.randint(2, 200, (1, 7))], dim=1)
    mask = torch.arange(16)[None] < 9
    long = t5.encode(t5.embed(padded_ids), mask)
    close(long[:, :9], short, 1e-5)
    assert (long[:, 9:] == 0).all()
    labels, padded = torch.tensor([[5, 6, 1]]), torch.tensor([[5, 6, 1, -100, -100]])
    losses = t5.caption_losses(long, mask, padded)
    close(losses[:, :3], t5.caption_losses(short, None, labels), 1e-5)
    assert (losses[:, 3:] == 0).all()


def encoder_and_prompts():
    encoder = MultimodalEncoder(TINY.vision, TINY.t5, image_id=TINY.image_id).eval()
    ids = torch.full((2, 40), 7)
    ids[0, 3:19] = ids[1, 1:17] = ids[1, 20:36] = TINY.image_id            # one image, two images
    return encoder, ids, torch.ones(2, 40, dtype=torch.bool), torch.randn(3, 3, 56, 56)


def test_each_image_fills_its_own_image_rows_in_order():
    encoder, ids, mask, refs = encoder_and_prompts()
    rows = {}
    encoder.t5.encode, encode = lambda x, mask: rows.setdefault("seen", x), encoder.t5.encode
    encoder(ids, mask, refs)
    patches = encoder.connector(encoder.clip(refs))
    close(rows["seen"][0, 3:19], patches[0], 0)
    close(rows["seen"][1, 1:17], patches[1], 0)
    close(rows["seen"][1, 20:36], patches[2], 0)
    close(rows["seen"][0, 19:], encoder.t5.embed(ids)[0, 19:], 0)
    encoder.t5.encode = encode
    swapped = encoder(ids, mask, refs.flip(0))
    assert (swapped - encoder(ids, mask, refs)).abs().max() > 1e-3


def test_a_wrong_number_of_image_tokens_is_an_error_that_counts_them():
    encoder, ids, mask, refs = encoder_and_prompts()
    with pytest.raises(InputError, match="48 <image> tokens but 2 reference pictures become 32 rows"):
        encoder(ids, mask, refs[:2])


def query_connector(g):
    c = g.config["config"]
    config = QueryConfig(c["hidden_size"], c["num_hidden_layers"], c["num_attention_heads"], c["intermediate_size"],
                         c["vocab_size"], c["max_position_embeddings"], c["query_tokens"],
                         c["cross_attention_frequency"])
    connector = QueryConnector(config, c["encoder_hidden_size"], c["projection"])
    return g.fill_by_table(connector, QUERY_NAMES), g.noise("features", (2, 17, c["encoder_hidden_size"]))


def test_the_query_connector_agrees_with_the_golden_outputs():
    g = Golden("qformer-small")
    connector, patches = query_connector(g)
    words = g["input_ids"] * g["attention_mask"]
    close(connector(patches, words), g["projected"], 1e-4)
    close(connector(patches[1:], words[1:, :4]), g["projected"][1:], 1e-4)               # its other words are padding


def test_the_query_connector_reads_words_and_patches_and_gives_as_many_rows_whatever_their_number():
    connector, patches = query_connector(Golden("qformer-small"))
    words = torch.tensor([[3, 4], [3, 5]])
    rows = connector(patches, words)
    assert rows.shape == connector(patches[:, :5], words).shape == (2, 8, 96)
    for other in (connector(patches, words.flip(0)), connector(patches.flip(0), words)):
        assert (other - rows).abs().amax(dim=(1, 2)).min() > 1e-3


@pytest.mark.gradients
def test_a_query_connector_without_images_has_gradients_of_zero_and_not_none():
    connector = QueryConnector(QueryConfig(32, 2, 2, 48, 20, 8, 4), 16, 24)
    connector(torch.zeros(0, 9, 16), torch.zeros(0, 1, dtype=torch.long)).sum().backward()
    for name, parameter in connector.named_parameters():
        assert parameter.grad is not None and (parameter.grad == 0).all(), name


def test_both_published_connectors_can_be_built():
    released, paper = Connector(1024, 2048, "released"), Connector(1024, 2048, "paper")
    assert [tuple(p.shape) for p in released.parameters()] == [(2048, 1024), (2048,), (2048, 2048), (2048,)]
    assert [tuple(p.shape) for p in paper.parameters()] == [(4096, 1024), (4096,), (2048, 4096), (2048,)]
    assert isinstance(released[1], torch.nn.GELU) and isinstance(paper[1], torch.nn.SiLU)
