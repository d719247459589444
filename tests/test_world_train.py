"""The small model's own stages: its objective of pretraining, its optimizers, and all stages one after the other."""
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import TINY, assert_same_weights, command, finish, log, losses, run
from PIL import Image
from safetensors.torch import load_file
from test_world_tokenizer import lpips_files

import data
import train
import weights
from cli import InputError
from model import PARTS, Mentor
from world import train as world_train
from world.tokenizer import PixelObjective
from world.train import STAGES, PartsObjective, PretrainObjective, make_optimizers

pytestmark = pytest.mark.gradients
PATCHES = replace(TINY, vision=replace(TINY.vision, patch_size=28), image_size=16)     # 2 x 2 over 4 x 4 tokens


@pytest.mark.parametrize("flags, said", [
    (["--stage", "rope"], "invalid choice: 'rope'"),
    (["--stage", "pretrain", "--size", "48"], "take a multiple of 32"),
    (["--stage", "vqgan", "--fsdp"], "--fsdp is for large models"),
    (["--stage", "pretrain", "--fsdp"], "--fsdp is for large models"),
    (["--stage", "parts", "--fsdp"], "--fsdp is for large models"),
    (["--stage", "parts", "--model", "mini", "--grow"], "give one of the two"),
    (["--stage", "vqgan", "--refine"], "begins from random ones; add --init"),
    (["--stage", "2", "--copies", "1.5"], "argument --copies: must be a number from 0 to 1"),
    (["--stage", "1", "--copies", "0.5"], "in a stage without that task"),
    (["--stage", "2", "--copies", "0.5", "--data", "rows.jsonl"], "leave it out with --data"),
    (["--stage", "1", "--adversarial", "0.1"], "--adversarial and --lpips are for --stage vqgan"),
    (["--stage", "vqgan", "--adversarial", "-1"], "argument --adversarial: must be a number, 0 or above"),
    (["--stage", "vqgan", "--lpips", "VGG", "VGG"], "do not hold VGG-16 and LPIPS' heads")])
def test_impossible_runs_are_refused_in_one_sentence(tmp_path, flags, said):
    torch.save({"a": torch.zeros(1)}, tmp_path / "vgg.pth")
    flags = [str(tmp_path / "vgg.pth") if flag == "VGG" else flag for flag in flags]
    with pytest.raises(InputError, match=said):
        world_train.main([*flags, "--init", "random", "--out", str(tmp_path / "out"), "--device", "cpu"])


def test_a_stage_whose_start_is_missing_names_the_command_that_makes_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="starts from out/tiny/pretrain.*`python -m world.train --stage pretrain"):
        world_train.main(["--stage", "1"])


def test_muon_moves_the_hidden_matrices_and_adamw_the_rest():
    torch.manual_seed(0)
    objective = train.TokenObjective(Mentor(TINY))
    optimizers = world_train.make_optimizers(objective, replace(world_train.STAGES["2"], lr=1e-3))
    for p in objective.parameters():
        p.grad = torch.randn_like(p)
    before = {name: p.detach().clone() for name, p in objective.mentor.named_parameters()}
    for optimizer in optimizers:
        optimizer.step()
    state = {p: set(values) for optimizer in optimizers for p, values in optimizer.state.items()}
    kinds = {name: state[p] for name, p in objective.mentor.named_parameters()}
    for name in ("decoder.layers.0.feed_forward.w1.weight", "encoder.connector.0.weight"):
        assert "momentum_buffer" in kinds[name]
    for name in ("decoder.output.weight", "decoder.tok_embeddings.weight", "decoder.norm.weight"):
        assert "exp_avg" in kinds[name]
    assert all((before[name] != p).any() for name, p in objective.mentor.named_parameters())
    name, weight = "decoder.layers.0.feed_forward.w1.weight", objective.mentor.decoder.layers[0].feed_forward.w1.weight
    values = torch.linalg.svdvals(before[name] * (1 - 1e-3 * train.WEIGHT_DECAY) - weight)
    assert values.max() / values.min() < 2.5                   # every direction moves about alike


def test_the_tokenizer_takes_a_perceptual_loss_and_does_without_a_discriminator(toy, tmp_path):
    paths = [str(tmp_path / name) for name in ("vgg.pth", "heads.pth")]
    for path, tensors in zip(paths, lpips_files()):
        torch.save(tensors, path)
    for name, flags in {"plain": [], "lpips": ["--lpips", *paths]}.items():
        world_train.main([*command(toy, tmp_path / name, "--adversarial", 0, stage="vqgan", steps=1), *flags])
    assert losses(tmp_path / "lpips")[0] > losses(tmp_path / "plain")[0]
    assert not [key for key in load_file(tmp_path / "plain/step-00000001/training.safetensors") if "discr" in key]


def test_the_tokenizer_of_other_weights_trains_on_the_images_of_files_and_nothing_else_moves(toy, tmp_path):
    world_train.main(command(toy, tmp_path, "--val", toy[1], "--adversarial", 0.1, "--sample-every", 2, stage="vqgan",
                             steps=4))
    before, after = load_file(f"{toy[0]}/model.safetensors"), load_file(tmp_path / "model.safetensors")
    moved = {name.split(".")[0] for name in after if not torch.equal(before[name], after[name])}
    assert moved == {"vqgan"} and "val" in log(tmp_path)[1] and (tmp_path / "loss.png").exists()
    assert Image.open(tmp_path / "samples-00000004.png").size[0] > 200
    assert [key for key in load_file(tmp_path / "step-00000004/training.safetensors") if "discr" in key]


def test_accumulating_4_x_1_equals_1_x_4(toy, tmp_path):
    for micro in (1, 4):
        world_train.main(command(toy, tmp_path / str(micro), "--micro-batch", micro, "--lr", 1e-4, stage="vqgan"))
    np.testing.assert_allclose(losses(tmp_path / "1"), losses(tmp_path / "4"), rtol=1e-5)
    assert_same_weights(tmp_path / "1", tmp_path / "4", 5e-4)   # AdamW turns a last bit of a small gradient into a step


@pytest.mark.full
@pytest.mark.parametrize("fsdp", ["--no-fsdp", "--fsdp"])
def test_two_processes_equal_one_on_the_same_global_batch(toy, tmp_path, fsdp):
    flags = command(toy, "out", "--micro-batch", 1, "--val", toy[1], "--sample-every", 2)
    finish(run([*flags, "--out", str(tmp_path / "two"), fsdp], processes=2, module="world.train"))
    world_train.main([*flags, "--out", str(tmp_path / "one")])
    one, two = log(tmp_path / "one"), log(tmp_path / "two")
    np.testing.assert_allclose([r["loss"] for r in one], [r["loss"] for r in two], rtol=1e-4)
    np.testing.assert_allclose([r["grad_norm"] for r in one], [r["grad_norm"] for r in two], rtol=1e-2)
    for task, loss in one[1]["val"].items():
        assert two[1]["val"][task] == pytest.approx(loss, rel=1e-3)
    assert_same_weights(tmp_path / "one", tmp_path / "two", 2e-3)


def test_resuming_with_muon_the_tokenizer_and_its_discriminator_is_exact_too(toy, tmp_path):
    for stage, start in (("vqgan", ["--adversarial", "0.1"]), ("1", [])):
        whole, cut = tmp_path / f"{stage}-whole", tmp_path / f"{stage}-cut"
        for out in (whole, cut):
            world_train.main([*command(toy, out, "--save-every", 2, "--keep", 9, stage=stage, steps=6), *start])
        for late in ("step-00000004", "step-00000006"):
            shutil.rmtree(cut / late)
        world_train.main([*command(toy, cut, "--resume", stage=stage, steps=6), *start])
        assert losses(cut) == losses(whole)
        assert_same_weights(cut, whole, 0)


@pytest.mark.full
def test_the_small_model_trains_stage_after_stage_from_nothing_on_painted_images(tmp_path, monkeypatch):
    flags = ["--steps", "3", "--global-batch", "4", "--size", "32", "--workers", "0", "--device", "cpu"]
    monkeypatch.chdir(tmp_path)                                # each stage starts from the one before in out/tiny
    monkeypatch.setattr(train, "VAL_SAMPLES", 4)
    for stage in world_train.STAGES:
        world_train.main(["--stage", stage, *flags])
    model = weights.load("out/tiny/2")
    batch = data.collate([model.processor("The dog face in <image>.\na dog face", [Image.new("RGB", (64, 64))])])
    assert model.sample(batch, [0]).shape == (1, 3, 32, 32)
    assert model.config.decoder.prefix_rope == "grid" and len(log("out/tiny/2")) == 3
    finish(run(["--stage", "pretrain", *flags, "--init", str(tmp_path / "out/tiny/vqgan"), "--out",
                str(tmp_path / "two"), "--micro-batch", "1"], processes=2, module="world.train"))
    world_train.main(["--stage", "pretrain", *flags, "--out", "one", "--micro-batch", "1"])
    np.testing.assert_allclose(losses("one"), losses(tmp_path / "two"), rtol=1e-3)


@pytest.mark.full
def test_a_new_tokenizer_learns_the_same_on_two_processes_before_and_after_its_codes_are_placed(tmp_path):
    flags = ["--stage", "vqgan", "--init", "random", "--steps", "101", "--global-batch", "2", "--micro-batch", "1",
             "--size", "16", "--workers", "0", "--device", "cpu"]          # 3 steps do not quantize
    finish(run([*flags, "--out", str(tmp_path / "two")], processes=2, module="world.train"))
    world_train.main([*flags, "--out", str(tmp_path / "one")])
    np.testing.assert_allclose(losses(tmp_path / "one")[:10], losses(tmp_path / "two")[:10], rtol=1e-3)
    assert len(losses(tmp_path / "two")) == 101


def test_predicting_aligned_tokens_pairs_each_patch_with_the_tokens_under_it():
    model = Mentor(PATCHES)
    objective = PretrainObjective(model)
    tokens = torch.arange(16).view(1, 16)
    prefix = model.prefix(torch.full((1, 4), TINY.image_id), torch.ones(1, 4, dtype=torch.bool),
                          torch.randn(1, 3, 56, 56))
    under = torch.tensor([[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]])
    codes = torch.nn.functional.normalize(model.vqgan.quantize.embedding.weight, dim=-1)
    objective.token_head.forward = lambda rows: codes[under].flatten(1)                       # (P, 4 * e), certain
    objective.logit_scale.data.fill_(5000.0)
    assert objective.token_losses(prefix, tokens) < 1e-6
    assert (objective.token_losses(prefix, tokens.flip(1)) > 1000).all()


def test_pretraining_predicts_tokens_where_they_are_aligned_and_writes_them_where_they_are_not():
    model = Mentor(PATCHES).eval()
    torch.nn.init.normal_(model.decoder.output.weight)         # zero at first, which would see no difference
    objective = PretrainObjective(model).eval()
    ids = torch.tensor([[TINY.image_id] * 4 + [7, 8], [7, 8, 9, 0, 0, 0], [TINY.image_id] * 4 + [9, 0]])
    batch = {"ids": ids, "mask": ids > 0, "refs": torch.randn(2, 3, 56, 56), "tokens": torch.randint(64, (3, 16)),
             "task": ["segment", "t2i", "reconstruct"]}
    alone = train.TokenObjective(model)({**batch, "ids": ids[1:2, :3], "mask": ids[1:2, :3] > 0, "refs": None,
                                         "tokens": batch["tokens"][1:2]})
    values = objective(batch)
    prefix = model.prefix(ids[1:2, :3], ids[1:2, :3] > 0)
    thumbnail = objective.thumbnail_losses(prefix, model.vqgan.decode(batch["tokens"][1:2]))  # the caption's image
    torch.testing.assert_close(values[1:2], alone + thumbnail)
    predicted = objective.thumbnail_head(prefix.rows[:, -1]).view(1, 3, 8, 8)
    assert objective.thumbnail_losses(prefix, predicted) < 1e-9
    values[[0, 2]].sum().backward()
    assert model.encoder.clip.patch_embed.weight.grad.abs().sum() > 0
    assert model.decoder.tok_embeddings.weight.grad.abs().sum() == 0      # there, so that no rank waits for it
    dropped = objective({**batch, "drop": torch.ones(3, dtype=torch.bool)})
    torch.testing.assert_close(dropped[[0, 2]], values[[0, 2]])           # unconditional rows would teach nothing there
    assert (dropped[1] - values[1]).abs() > 0


def test_pretraining_masks_the_input_of_half_of_the_samples_by_the_sample_alone():
    tokens = torch.randint(64, (400, 16), generator=torch.Generator().manual_seed(0))
    masked = PretrainObjective.masked_inputs(tokens)
    share = masked.float().mean(dim=1)
    assert masked.shape == (400, 15) and 0.4 < (share > 0).float().mean() < 0.6
    assert 0.03 < (share == 1).float().mean() < 0.2 and ((share > 0) & (share < 1)).sum() > 100
    assert torch.equal(PretrainObjective.masked_inputs(tokens[200:]), masked[200:])
    objective = PretrainObjective(Mentor(PATCHES))
    mentor = objective.mentor.eval()
    prefix = mentor.prefix(torch.tensor([[7, 8]]), torch.ones(1, 2, dtype=torch.bool))
    torch.nn.init.normal_(mentor.decoder.output.weight)
    objective.masked_inputs = lambda tokens: torch.ones(1, 15, dtype=torch.bool)
    objective.writing_losses(prefix, tokens[:1]).sum().backward()
    assert mentor.decoder.tok_embeddings.weight.grad.abs().sum() == 0
    assert objective.mask_embedding.grad.abs().sum() > 0
    assert not mentor.decoder.tok_embeddings._forward_hooks


def captioned_pictures():
    """An objective of stage parts, and a batch of two captions and their pictures' tokens and pixels."""
    model = Mentor(PATCHES, t5_decoder=True)
    torch.nn.init.normal_(model.decoder.output.weight, std=0.02)           # zero at first: no gradient behind it
    objective = PartsObjective(model)
    torch.nn.init.normal_(objective.token_head.weight, std=0.02)
    train.freeze(objective, STAGES["parts"].trains)
    ids = torch.tensor([[7, 8, 9, 1], [7, 5, 1, 0]])
    return objective, {"ids": ids, "mask": ids > 0, "refs": None, "tokens": torch.randint(64, (2, 16)),
                       "target": torch.rand(2, 3, 16, 16) * 2 - 1, "task": ["t2i", "t2i"]}


def moved(objective):
    """The parts that have gradients other than zero."""
    return {name for name in (*PARTS, "encoder.t5.decoder") for p in objective.mentor.get_submodule(name).parameters()
            if p.grad is not None and p.grad.any()}


def test_what_the_eye_learns_reaches_neither_connector_nor_t5_nor_decoder_and_every_part_but_the_connector_learns():
    objective, batch = captioned_pictures()
    ids, mask = batch["ids"], batch["mask"]
    objective.seeing_losses(batch["target"], batch["tokens"], ids, mask).sum().backward()
    assert moved(objective) == {"encoder.clip"}
    assert objective.token_head.weight.grad.any() and objective.word_head.weight.grad.any()
    objective, batch = captioned_pictures()
    objective.reading_losses(ids, mask).sum().backward()
    assert moved(objective) == {"encoder.t5", "encoder.t5.decoder"}
    objective, batch = captioned_pictures()
    objective(batch).sum().backward()
    assert moved(objective) == {"encoder.clip", "encoder.t5", "encoder.t5.decoder", "projector", "decoder"}
    missing = [name for name, p in objective.named_parameters() if p.requires_grad and p.grad is None]
    assert not missing                                         # or a rank would wait for them
    read = [any(p.grad.any() for p in block.parameters()) for block in objective.mentor.encoder.clip.blocks]
    assert read == [True, True, False]                         # the connector reads the last block but one


def test_of_a_captions_words_some_are_blank_or_all_stand_in_another_order_whatever_the_batch():
    ids = torch.cat([torch.randint(2, 200, (60, 12)), torch.ones(60, 1, dtype=torch.long)], dim=1)
    mask = torch.arange(13) < torch.randint(5, 13, (60, 1))
    ids = ids * mask
    order = PartsObjective.order(ids, mask)
    assert torch.equal(order.sort(dim=1).values, torch.arange(13).expand(60, 13))
    assert torch.equal(order[~mask], torch.arange(13).expand(60, 13)[~mask])
    assert (order != torch.arange(13)).any(dim=1).float().mean() > 0.9
    assert torch.equal(PartsObjective.order(ids[30:, :12], mask[30:, :12]), order[30:, :12])
    objective, _ = captioned_pictures()
    t5, fed = objective.mentor.encoder.t5, []
    encode = t5.encode
    t5.encode = lambda rows, mask: fed.append(rows) or encode(rows, mask)
    objective.reading_losses(ids, mask)
    blank = (fed[0] == objective.blank).all(dim=-1)                                       # (60, 13)
    untouched = (fed[0] == t5.embed(ids)).all(dim=-1).all(dim=1)
    shuffled = ~blank.any(dim=1) & ~untouched
    assert 0.3 < (blank & mask).any(dim=1).float().mean() < 0.7 and shuffled.float().mean() > 0.2
    objective.eval().reading_losses(ids, mask)
    assert torch.equal(fed[1], t5.embed(ids))


def test_after_parts_the_connector_learns_to_caption_and_then_stages_1_and_2_go_on(toy, tmp_path):
    names = [tmp_path / stage for stage in ("parts", "connector", "1", "2")]
    parts, connector, first, second = map(str, names)
    flags = ["--size", 16, "--save-every", 2, "--seed", 1]           # the weights were made with seed 0
    world_train.main(command(toy, parts, *flags, stage="parts", steps=4))
    whole = load_file(f"{parts}/model.safetensors")
    shutil.rmtree(f"{parts}/step-00000004")
    world_train.main(command(toy, parts, *flags, "--resume", stage="parts", steps=4))
    again = load_file(f"{parts}/model.safetensors")
    assert all(torch.equal(whole[name], again[name]) for name in whole) and "encoder.t5.lm_head.weight" in whole
    before = load_file(f"{toy[0]}/model.safetensors")
    t5_decoder = "encoder.t5.decoder.blocks.0.wo.weight"
    assert (before[t5_decoder] - whole[t5_decoder]).abs().max() > 0.1      # begun anew
    assert all(torch.equal(before[name], whole[name]) for name in whole if name.startswith("vqgan"))
    assert weights.load(parts).config.untrained == ("encoder.connector",)
    with pytest.raises(InputError, match="holds no trained connector.*run --stage connector first"):
        world_train.main(command((parts, toy[1]), first, stage="1"))
    for stage, start, out in (("connector", parts, connector), ("1", connector, first), ("2", first, second)):
        world_train.main(command((start, toy[1]), out, stage=stage))
        after = load_file(f"{out}/model.safetensors")
        start = load_file(f"{start}/model.safetensors")
        changed = {name for name in after if not torch.equal(after[name], start[name])}
        if stage == "connector":
            assert changed == {name for name in after if name.startswith("encoder.connector")}
        assert stage != "1" or {name.split(".")[0] for name in changed} == {"projector", "decoder"}
    assert "encoder.t5.lm_head.weight" not in after and weights.load(second).config.untrained == ()


@pytest.mark.parametrize("stage", [pytest.param("parts", marks=pytest.mark.full), "pretrain"])
def test_a_model_of_another_size_is_begun_anew_around_the_tokenizer_of_the_bundled_one(tmp_path, stage):
    flags = ["--model", "mini", "--steps", 1, "--global-batch", 2, "--workers", 0, "--device", "cpu"]
    world_train.main([str(flag) for flag in ("--stage", stage, "--init", "tiny", *flags, "--out", tmp_path)])
    mini, bundled = weights.load(str(tmp_path)), weights.load("tiny")
    assert mini.config.decoder.width == mini.config.t5.width == mini.config.vision.width == 128
    assert mini.config.image_size == 48 and mini.config.decoder.codes == bundled.config.decoder.codes == 1024
    ours, theirs = mini.vqgan.state_dict(), bundled.vqgan.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_model_that_is_begun_anew_has_the_size_prefix_and_connector_that_its_stage_and_flags_ask_for(tmp_path):
    flags = ["--stage", "multi", "--model", "mini", "--size", "32", "--connector", "query", "--prefix-rope", "identity"]
    for init in ("tiny", "random"):
        args, stage = world_train.parse([*flags, "--init", init, "--out", str(tmp_path)])
        config = world_train.load_start(args, stage, print).config
        assert (config.image_size, config.prefix_tokens, config.connector) == (32, 360, "query")
        assert config.decoder.prefix_rope == "identity" and config.decoder.width == 128


def test_copies_are_of_the_samples_to_learn_from_and_not_of_those_to_validate_on():
    args, stage = world_train.parse(["--stage", "2", "--copies", "0.5"])
    learned, val, _ = world_train.make_data(args, stage, weights.load("tiny"), print)
    assert learned.world.copies == 0.5 and val.world.copies == 0


def test_a_tokenizer_and_its_discriminator_are_clipped_apart():
    objective = PixelObjective(Mentor(TINY), adversarial=0.5)
    train.freeze(objective, STAGES["vqgan"].trains)
    tokenizer, critic = make_optimizers(objective, STAGES["vqgan"])
    moved = [{p for group in optimizer.param_groups for p in group["params"]} for optimizer in (tokenizer, critic)]
    assert moved[1] == set(objective.discriminator.parameters()) and not moved[0] & moved[1]
    assert moved[0] == {p for p in objective.mentor.vqgan.parameters()}
    for p in moved[0]:
        p.grad = torch.full_like(p, 1e-9)
    for p in moved[1]:
        p.grad = torch.full_like(p, 1e3)
    before, after = train.clip_gradients(tokenizer), train.clip_gradients(critic)
    assert before < 1 < after and all((p.grad == 1e-9).all() for p in moved[0])
    assert train.clip_gradients(critic) == pytest.approx(train.CLIP_NORM, rel=1e-3)


def test_grown_weights_draw_what_they_drew_before_and_every_new_part_learns():
    small, task = weights.load("tiny"), {"reconstruct": 1}
    torch.manual_seed(0)
    larger = world_train.grow(small)
    samples = world_train.EmojiData(small.processor, weights=task, held_out=True)
    batch = data.collate([samples[k] for k in range(4)])
    with torch.no_grad():
        prefix = small.prefix(batch["ids"], batch["mask"], batch["refs"])
        tokens, codes = small.target_tokens(batch), small.config.vqgan.codes
        logits = small.decoder(prefix, tokens[:, :-1], small.config.grid)                 # (4, T, V)
        for inputs in (tokens, tokens + codes):                                           # either half of every code
            both = larger.decoder(prefix, inputs[:, :-1], small.config.grid)              # (4, T, 2 V)
            assert torch.allclose(both, torch.cat([logits, logits], dim=-1), atol=1e-3)
    objective = train.TokenObjective(larger)
    world_train.train.freeze(objective, ("encoder", "projector", "decoder"))
    objective(batch).sum().backward()
    new = larger.decoder.layers[-1]
    assert new.attention.wo.weight.grad.abs().max() > 0 and new.feed_forward.w2.weight.grad.abs().max() > 0
    assert (larger.target_tokens(batch) >= codes).float().mean() > 0.2                    # both halves are in use


def test_a_refined_model_reads_its_references_at_once_and_has_room_for_no_fewer():
    small = weights.load("tiny")
    finer = world_train.refine(small)
    images = lambda mentor: mentor.config.prefix_tokens // mentor.processor.image_tokens
    assert finer.config.vision.grid == 2 * small.config.vision.grid and images(finer) >= images(small)
    samples = world_train.EmojiData(finer.processor, weights={"reconstruct": 1}, held_out=True)
    batch = data.collate([samples[k] for k in range(4)])
    objective = train.TokenObjective(finer)
    with torch.no_grad():
        right = objective(batch).mean()
        others = objective(batch | {"refs": batch["refs"].roll(1, dims=0)}).mean()
    assert right < others - 1


@pytest.mark.parametrize("enlarge", [world_train.grow, world_train.refine])
def test_an_enlarged_model_keeps_all_parts(enlarge):
    small = weights.load("tiny")
    captioning = weights.random_model(small.config, small.processor.tokenizer, 0, True)
    larger = enlarge(captioning)
    before, after = captioning.state_dict(), larger.state_dict()
    name = "encoder.t5.lm_head.weight"
    assert set(before) <= set(after) and torch.equal(before[name], after[name])
