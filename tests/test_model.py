import contextlib
import shutil
from dataclasses import replace

import pytest
import torch
from conftest import TINY, Golden, close, decoder_config, t5_config, vision_config
from PIL import Image

import model as model_file
import weights
from data import InputError, byte_tokenizer
from model import SIZES, Decoder, Mentor, MentorConfig, Prefix, Sampling, draw_tokens, left_pad, make_mask, size_config
from vqgan import VQConfig


def tiny(**changes):
    """A tiny model whose output layer is not zero, so that everything matters."""
    torch.manual_seed(0)
    config = replace(TINY, decoder=replace(TINY.decoder, **changes))
    model = Mentor(config, byte_tokenizer()).eval()
    for parameter in model.decoder.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def random_prefix(valid, width=64):
    """Random rows; valid: per sample, how many of the rows are not padding."""
    rows = max(valid)
    mask = torch.arange(rows)[None] >= rows - torch.tensor(valid)[:, None]
    return Prefix(torch.randn(len(valid), rows, width) * mask[..., None], mask, torch.zeros_like(mask))


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
    losses, logits = model(ids, mask, refs, g["tokens"])
    close(logits, g["logits"], 1e-4)
    close(losses.mean().view(1), g["loss"], 1e-5)
    tokens = model.generate(model.prefix(ids, mask, refs), [0, 1], Sampling(c["cfg_scale"], temperature=0))
    assert torch.equal(tokens, g["greedy"])


def test_the_sizes_table_gives_the_published_numbers_of_parameters():
    for size, millions in {"B": 111, "L": 343, "XL": 775, "XXL": 1400, "3B": 3100}.items():
        with torch.device("meta"):
            decoder = Decoder(size_config(size).decoder)
        counted = sum(p.numel() for p in decoder.parameters()) / 1e6
        assert abs(counted - millions) / millions < 0.02, (size, counted)
        assert SIZES[size][2] % SIZES[size][1] == 0


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


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_the_fast_products_and_a_long_reach_draw_the_tokens_of_the_plain_loop(monkeypatch, batch):
    model = tiny()
    prefix, drawn = random_prefix([20, 9, 20, 14, 11][:batch]), []
    for some, stride in ((0, 1), (model_file.SOME, 1), (model_file.SOME, 16)):
        monkeypatch.setattr(model_file, "SOME", some)          # 0: the ordinary product everywhere
        reach = property(lambda cache, stride=stride: min(-(-(cache.length + 1) // stride) * stride, cache.total))
        monkeypatch.setattr(model_file.KVCache, "reach", reach)
        for sampling in (Sampling(3.0, 0, 64), Sampling(1.0, 1.0, 20, 0.9)):
            drawn.append(model.generate(prefix, range(batch), sampling))
    assert torch.equal(drawn[0], drawn[2]) and torch.equal(drawn[0], drawn[4])
    assert torch.equal(drawn[1], drawn[3]) and torch.equal(drawn[1], drawn[5])
    assert drawn[0].unique().numel() > 3


@pytest.mark.full
def test_compiled_blocks_draw_the_tokens_of_the_plain_loop():
    if not shutil.which("c++") and not shutil.which("g++"):
        pytest.skip("there is no C++ compiler; install g++ to compile blocks on a CPU")
    model = tiny(multiple_of=2112)                             # so that both ways of summing are met
    prefix, sampling = random_prefix([20, 9]), Sampling(3.0, 0, 64)
    plain = model.generate(prefix, [0, 1], sampling)
    model.decoder.compile_blocks()
    assert torch.equal(model.generate(prefix, [0, 1], sampling), plain)


def test_steps_recorded_as_graphs_do_what_steps_do(monkeypatch):
    """Stand-ins for CUDA graphs: recording computes nothing, a replay computes without Python's counting."""
    model = tiny()
    prefix, tokens = random_prefix([20, 9]), torch.randint(64, (2, 36))
    used = {"recorded": 0, "replayed": 0}

    def logits_of(make):
        logits, cache, rope = model.decoder.prefill(prefix, 6)
        out, place = torch.zeros(36, *logits.shape), torch.zeros(1, dtype=torch.long)
        state = [cache.kv, cache.mask, cache.at, out, place]

        def step():
            token = tokens.index_select(1, place).squeeze(1)
            out.index_copy_(0, place, model.decoder.decode_step(token, cache, rope)[None])
            place.add_(1)

        class Graph:
            def replay(self):
                length, used["replayed"] = cache.length, used["replayed"] + 1
                step()
                cache.length = length

        @contextlib.contextmanager
        def record(graph):
            before, used["recorded"] = [part.clone() for part in state], used["recorded"] + 1
            yield
            for part, old in zip(state, before):
                part.copy_(old)

        monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
        monkeypatch.setattr(torch.cuda, "graph", record)
        run = make(step, cache)
        for _ in range(36):
            run()
        return out

    plain = logits_of(lambda step, cache: step)
    monkeypatch.setattr(model_file.KVCache, "reach",
                        property(lambda cache: min(-(-(cache.length + 1) // 16) * 16, cache.total)))
    close(logits_of(model_file.Graphs), plain, 1e-5)
    assert used == {"recorded": 3, "replayed": 33}             # three strides, each begun with a plain step


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


def test_a_picture_depends_on_its_seed_and_prompt_but_not_on_its_batch():
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


def test_draws_follow_temperature_top_k_and_top_p():
    probabilities = torch.tensor([0.1, 0.4, 0.05, 0.3, 0.15])
    logits = probabilities.log().expand(20_000, 5)
    uniform = torch.rand(20_000, generator=torch.Generator().manual_seed(0))

    def share(**changes):
        sampling = Sampling(**{"top_k": 5, **changes})
        return torch.bincount(draw_tokens(logits, uniform, sampling), minlength=5) / 20_000
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


@pytest.mark.gradients
def test_dropped_conditions_train_the_unconditional_rows_and_nothing_else_does():
    model = tiny().train()
    ids, mask = torch.full((2, 8), 9), torch.arange(8)[None] < torch.tensor([[8], [5]])
    tokens = torch.randint(64, (2, 36))
    model(ids, mask, None, tokens, drop=torch.tensor([False, False]))[0].mean().backward()
    assert (model.projector.uncond.grad == 0).all()
    model(ids, mask, None, tokens, drop=torch.tensor([False, True]))[0].mean().backward()
    touched = model.projector.uncond.grad.abs().sum(dim=1) > 0
    assert touched[-5:].all() and not touched[:-5].any()       # the rows at the end, under the sample's own mask


@pytest.mark.gradients
def test_a_new_decoder_starts_at_the_uniform_distribution_with_its_published_spread():
    model = Mentor(size_config("toy"), None)
    tokens = torch.randint(1024, (1, 16))
    losses, _ = model(torch.full((1, 4), 9), torch.ones(1, 4, dtype=torch.bool), None, tokens)
    close(losses.detach(), torch.full((1, 16), 1024.).log(), 1e-5)
    assert (model.decoder.output.weight == 0).all()
    assert abs(model.decoder.layers[0].attention.wqkv.weight.std().item() - 0.02) < 2e-3


def test_fp16_and_bf16_compute_and_fp16_spares_the_encoder():
    for dtype in (torch.bfloat16, torch.float16):
        model = tiny().cast("cpu", dtype)
        tokens = model.generate(model.prefix(torch.full((1, 6), 9), torch.ones(1, 6, dtype=torch.bool)), [0])
        assert tokens.shape == (1, 36) and model.dtype == dtype
        assert model.encoder.t5.embed.weight.dtype == (torch.bfloat16 if dtype == torch.bfloat16 else torch.float32)


def test_draw_makes_pictures_from_paths_and_pictures(tmp_path):
    model = tiny()
    photo = Image.effect_noise((90, 70), 80).convert("RGB")
    photo.save(tmp_path / "dog.png")
    by_path = model.draw("in the snow", refs=[str(tmp_path / "dog.png")], seed=1)
    by_picture = model.draw("The dog in <image>.\nin the snow", refs=[photo], seed=1)
    assert by_path[0].size == (24, 24) and by_path[0].tobytes() == by_picture[0].tobytes()
    pair = model.draw("The dog in <image>.\nin the snow", refs=[photo], seed=0, n=2)
    assert pair[1].tobytes() == by_picture[0].tobytes()
    assert model.draw("text to image", size=16)[0].size == (16, 16)
    with pytest.raises(InputError, match="up to 24 pixels"):
        model.draw("too large", size=512)


@pytest.mark.parametrize("wrong", [dict(top_k=0), dict(top_k=65), dict(top_p=0.0), dict(top_p=1.5),
                                   dict(temperature=-1.0), dict(cfg_scale=float("nan"))])
def test_senseless_sampling_settings_are_refused(wrong):
    with pytest.raises(InputError, match="must"):
        tiny().draw("x", **wrong)


def test_offloading_draws_the_same_picture_with_less_in_memory():
    picture = Image.new("RGB", (40, 40), "red")
    plain = tiny().draw("a cat", [picture], seed=3)[0]
    model = tiny()
    assert model.draw("a cat", [picture], seed=3, offload=True)[0].tobytes() == plain.tobytes()
    assert all(p.is_meta for p in model.encoder.parameters())
