import json
import os
import pathlib
import signal
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import TINY, material
from PIL import Image, ImageDraw
from safetensors.torch import load_file

import data
import train
import weights
from data import InputError, byte_tokenizer
from model import Mentor, MentorConfig

ROOT = pathlib.Path(__file__).parent.parent
pytestmark = pytest.mark.gradients
NO_DROPOUT = replace(TINY, decoder=replace(TINY.decoder, dropout=0.0), t5=replace(TINY.t5, dropout=0.0))
STAGES = list(train.STAGES)


def write_data(folder, pictures=6, side=48):
    """Pictures with captions and elliptic masks, as `data.py folder` reads them, and one row of two objects."""
    folder.mkdir()
    for i in range(pictures):
        stem = f"{('cat', 'dog', 'hat')[i % 3]}-{i:02}"
        Image.effect_noise((side, side), 60 + 20 * i).convert("RGB").save(folder / f"{stem}.png")
        (folder / f"{stem}.txt").write_text(f"a {stem[:3]} number {i}")
        mask = Image.new("L", (side, side))
        ImageDraw.Draw(mask).ellipse((8, 8, side - 12, side - 8), fill=255)
        mask.save(folder / f"{stem}.mask.png")
    data.main(["folder", str(folder)])
    with open(folder / "data.jsonl", "a") as file:
        file.write(json.dumps({"input_text": "both", "source_image": "cat-00.png", "objects": ["cat", "hat"],
                               "image_path": ["cat-00.mask.png"] * 2}) + "\n")
    return str(folder / "data.jsonl")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """-> (folder of a tiny model with all of T5, JSONL)"""
    folder = tmp_path_factory.mktemp("world")
    torch.manual_seed(0)
    model = Mentor(NO_DROPOUT, byte_tokenizer(), t5_decoder=True)
    with torch.no_grad():
        torch.nn.init.normal_(model.decoder.output.weight, std=0.02)
        model.vqgan.quantize.embedding.weight.normal_()
    model.save_pretrained(folder / "init")
    return str(folder / "init"), write_data(folder / "data")


def command(world, out, *flags, stage="2", steps=3, batch=4):
    return ["--stage", stage, "--init", world[0], "--data", world[1], "--out", str(out), "--steps", str(steps),
            "--global-batch", str(batch), "--workers", "0", "--device", "cpu", *map(str, flags)]


def run(arguments, processes=1):
    """train.py in a process of its own, or under torchrun in several."""
    launcher = [sys.executable] if processes == 1 else [
        sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={processes}", "--master_port=0",
        "--rdzv_backend=c10d", "--rdzv_endpoint=localhost:0"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([*launcher, "train.py", *arguments], cwd=ROOT, env=environment, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def finish(process, code=0):
    output = process.communicate(timeout=300)[0]
    assert process.returncode == code, output[-3000:]
    return output


def log(out):
    return [json.loads(line) for line in (pathlib.Path(out) / "log.jsonl").read_text().splitlines()]


def losses(out):
    return [record["loss"] for record in log(out)]


def assert_same_weights(a, b, atol):
    a, b = (load_file(pathlib.Path(out) / "model.safetensors") for out in (a, b))
    assert a.keys() == b.keys()
    worst = max((a[name] - b[name]).abs().max().item() for name in a)
    assert worst <= atol, worst


# ---------------------------------------------------------------------------------------------------------------------
# Schedule, optimizer, command line

def test_the_schedule_counts_optimizer_steps_up_to_the_peak_and_down_to_a_tenth():
    rates = [train.lr_at(step, 200, 1.0) for step in range(200)]
    assert rates[0] == 0.1 and rates[9] == 1.0                 # 5 % of 200 steps
    assert max(rates) == 1.0 and all(a > b for a, b in zip(rates[10:], rates[11:]))
    assert rates[10] == pytest.approx(1.0) and rates[-1] == pytest.approx(0.1)
    assert rates[105] == pytest.approx(0.55, abs=0.01)         # half way down
    assert train.lr_at(0, 1, 1.0) == 1.0


def test_only_matrices_decay():
    objective = torch.nn.ModuleDict({"linear": torch.nn.Linear(3, 3), "norm": torch.nn.LayerNorm(3)})
    groups = train.make_optimizer(objective, 1e-3).param_groups
    assert [(p.dim(), g["weight_decay"]) for g in groups for p in g["params"]] == [(2, 0.05)] + [(1, 0.0)] * 3
    assert groups[0]["betas"] == (0.9, 0.95)


def test_muon_moves_matrices_along_all_their_directions_alike_and_leaves_the_rest_to_adamw():
    torch.manual_seed(0)
    u, _, v = torch.linalg.svd(torch.randn(48, 20), full_matrices=False)
    matrix = u @ torch.diag(torch.logspace(0, -1.5, 20)) @ v
    for m in (matrix, matrix.T):
        found = train.orthogonal(m)
        values = torch.linalg.svdvals(found)
        assert found.shape == m.shape and 0.6 < values.min() and values.max() < 1.3
    across = u.T @ train.orthogonal(matrix) @ v.T              # the directions themselves are kept
    assert (across - across.diag().diag()).abs().max() < 1e-4

    objective = train.TokenObjective(Mentor(TINY), None)
    optimizer = train.make_optimizer(objective, 1e-3, muon=True)
    for p in objective.parameters():
        p.grad = torch.randn_like(p)
    before = {name: p.detach().clone() for name, p in objective.mentor.named_parameters()}
    optimizer.step()
    kinds = {name: set(optimizer.state[p]) for name, p in objective.mentor.named_parameters()}
    for name in ("decoder.layers.0.feed_forward.w1.weight", "encoder.connector.0.weight"):
        assert "momentum" in kinds[name]
    for name in ("decoder.output.weight", "decoder.tok_embeddings.weight", "decoder.norm.weight"):
        assert "exp_avg" in kinds[name]
    assert all((before[name] != p).any() for name, p in objective.mentor.named_parameters())


@pytest.mark.parametrize("flags, said", [
    (["--without", "multi"], "stage 2 has no such task"),
    (["--without", "t2i", "--without", "segment", "--without", "recover", "--without", "subject"], "no task"),
    (["--global-batch", "6", "--micro-batch", "4"], "--global-batch 6 is no multiple of --micro-batch 4 x 1 ranks"),
    (["--model", "B"], "--model is for --init random"),
    (["--model", "tiny", "--stage", "rope"], "--model tiny has no stage rope"),
    (["--stage", "pretrain"], "stage pretrain is for --model tiny; add that"),
    (["--model", "tiny", "--stage", "pretrain", "--init", "random", "--size", "48"], "take a multiple of 32"),
    (["--fsdp", "--stage", "vqgan"], "--fsdp is for the large parts"),
    (["--size", "40"], "up to 24 pixels"),
    (["--steps", "0"], "--steps is 0 but must be above 0"),
    (["--lr", "nan"], "--lr is nan but must be above 0"),
    (["--workers", "-1"], "--workers is -1 but must be 0 or more"),
    (["--resume"], "holds no checkpoint to resume from"),
    (["--device", "cuda"], "no CUDA here"),
    (["--data", "nowhere.jsonl"], "nowhere.jsonl")])
def test_impossible_runs_are_refused_in_one_sentence(world, tmp_path, flags, said):
    if "cuda" in flags and torch.cuda.is_available():
        pytest.skip("this machine has CUDA")
    with pytest.raises(InputError, match=said):
        train.main([*command(world, tmp_path / "out"), *flags])


def test_every_help_text_runs():
    for script in ("train.py", "sample.py", "data.py", "weights.py"):
        result = subprocess.run([sys.executable, script, "--help"], cwd=ROOT, capture_output=True, text=True)
        assert result.returncode == 0 and "usage" in result.stdout


# ---------------------------------------------------------------------------------------------------------------------
# Every stage

@pytest.mark.parametrize("stage", STAGES)
def test_each_stage_moves_its_parts_and_no_other_by_a_bit_and_leaves_a_model(world, tmp_path, stage):
    train.main([*command(world, tmp_path, "--val", world[1], "--sample-every", 2, stage=stage, steps=4)])
    before, after = load_file(f"{world[0]}/model.safetensors"), load_file(tmp_path / "model.safetensors")
    for name in after.keys() & before.keys():
        trains = name.startswith(train.STAGES[stage].trains)
        if not trains:
            assert torch.equal(before[name], after[name][-len(before[name]):]), f"{name} is frozen but moved"
    for part in train.STAGES[stage].trains:
        assert any(not torch.equal(before[name], after[name]) for name in after.keys() & before.keys()
                   if name.startswith(part) and name != "projector.uncond"), f"{part} trains but did not move"
    records = log(tmp_path)
    assert [record["step"] for record in records] == [1, 2, 3, 4] and "val" in records[1] and "val" in records[3]
    assert (tmp_path / "loss.png").exists()
    if stage != "connector":
        assert Image.open(tmp_path / "samples-00000004.png").size[0] > 200
    assert weights.load(tmp_path).draw("a cat", refs=[Image.new("RGB", (30, 30))])[0].size == (24, 24)


def test_the_tokenizer_takes_a_perceptual_loss_and_does_without_a_discriminator(world, tmp_path):
    from test_vqgan import lpips_files
    paths = [str(tmp_path / name) for name in ("vgg.pth", "heads.pth")]
    for path, tensors in zip(paths, lpips_files()):
        torch.save(tensors, path)
    for name, flags in {"plain": [], "lpips": ["--lpips", *paths]}.items():
        train.main([*command(world, tmp_path / name, "--adversarial", 0, stage="vqgan", steps=1), *flags])
    assert losses(tmp_path / "lpips")[0] > losses(tmp_path / "plain")[0]
    assert not [key for key in load_file(tmp_path / "plain/step-00000001/training.safetensors") if "discr" in key]


@pytest.mark.parametrize("stage", STAGES)
def test_each_stage_runs_on_two_processes(world, tmp_path, stage):
    finish(run(command(world, tmp_path, stage=stage, steps=1), processes=2))
    assert len(losses(tmp_path)) == 1 and (tmp_path / "model.safetensors").exists()


def test_the_small_model_trains_stage_after_stage_from_nothing_on_painted_pictures(tmp_path, monkeypatch):
    flags = ["--model", "tiny", "--steps", "3", "--global-batch", "4", "--workers", "0", "--device", "cpu"]
    monkeypatch.chdir(tmp_path)                                # each stage starts from the one before in out/tiny
    monkeypatch.setattr(train, "VAL_SAMPLES", 4)
    for stage in train.TINY:
        train.main(["--stage", stage, *flags])
    model = weights.load("out/tiny/2")
    assert model.draw("a dog face in the snow", refs=[Image.new("RGB", (64, 64))])[0].size == (64, 64)
    assert model.config.decoder.prefix_rope == "grid" and len(log("out/tiny/2")) == 3
    finish(run(["--stage", "pretrain", *flags, "--init", str(tmp_path / "out/tiny/vqgan"), "--out",
                str(tmp_path / "two"), "--micro-batch", "1"], processes=2))
    train.main(["--stage", "pretrain", *flags, "--out", "one", "--micro-batch", "1"])
    np.testing.assert_allclose(losses("one"), losses(tmp_path / "two"), rtol=1e-4)


@pytest.mark.full
def test_a_new_tokenizer_learns_the_same_on_two_processes_before_and_after_its_codes_are_placed(tmp_path):
    flags = ["--stage", "vqgan", "--model", "tiny", "--init", "random", "--steps", "101", "--global-batch", "2",
             "--micro-batch", "1", "--size", "16", "--workers", "0", "--device", "cpu"]   # 3 steps do not quantize
    finish(run([*flags, "--out", str(tmp_path / "two")], processes=2))
    train.main([*flags, "--out", str(tmp_path / "one")])
    np.testing.assert_allclose(losses(tmp_path / "one")[:10], losses(tmp_path / "two")[:10], rtol=1e-3)
    assert len(losses(tmp_path / "two")) == 101


def test_naming_aligned_tokens_pairs_each_patch_with_the_tokens_under_it():
    # 2 x 2 patches over 4 x 4 tokens
    model = Mentor(replace(TINY, vision=replace(TINY.vision, patch_size=28), image_size=16))
    objective = train.PretrainObjective(model, None)
    tokens = torch.arange(16).view(1, 16)
    prefix = model.prefix(torch.full((1, 4), TINY.image_id), torch.ones(1, 4, dtype=torch.bool),
                          torch.randn(1, 3, 56, 56))
    wanted = torch.tensor([[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]])
    codes = torch.nn.functional.normalize(model.vqgan.quantize.embedding.weight, dim=-1)
    objective.head.forward = lambda rows: codes[wanted].flatten(1)                            # (P, 4 * e), certain
    objective.sharpness.data.fill_(5000.0)
    assert objective.naming(prefix, tokens) < 1e-6
    assert (objective.naming(prefix, tokens.flip(1)) > 1000).all()


@pytest.mark.gradients
def test_pretraining_names_tokens_where_they_are_aligned_and_writes_them_where_they_are_not():
    model = Mentor(replace(TINY, vision=replace(TINY.vision, patch_size=28), image_size=16)).eval()
    torch.nn.init.normal_(model.decoder.output.weight)         # zero at first, which would see no difference
    objective = train.PretrainObjective(model, None).eval()
    ids = torch.tensor([[TINY.image_id] * 4 + [7, 8], [7, 8, 9, 0, 0, 0], [TINY.image_id] * 4 + [9, 0]])
    batch = {"ids": ids, "mask": ids > 0, "refs": torch.randn(2, 3, 56, 56), "tokens": torch.randint(64, (3, 16)),
             "tasks": ["segment", "t2i", "reconstruct"]}
    alone = train.TokenObjective(model, None)({**batch, "ids": ids[1:2, :3], "mask": ids[1:2, :3] > 0,
                                               "refs": None, "tokens": batch["tokens"][1:2]})
    losses = objective(batch)
    prefix = model.prefix(ids[1:2, :3], ids[1:2, :3] > 0)
    sketch = objective.sketching(prefix, model.vqgan.decode(batch["tokens"][1:2]))            # the caption's picture
    torch.testing.assert_close(losses[1:2], alone + sketch)
    assert objective.sketching(prefix, objective.sketch(prefix.rows[:, -1]).view(1, 3, 8, 8)) < 1e-9
    losses[[0, 2]].sum().backward()
    assert model.encoder.clip.patch_embed.weight.grad.abs().sum() > 0
    assert model.decoder.tok_embeddings.weight.grad.abs().sum() == 0      # there, lest other ranks wait for it
    dropped = objective({**batch, "drop": torch.ones(3, dtype=torch.bool)})
    torch.testing.assert_close(dropped[[0, 2]], losses[[0, 2]])           # naming nothing would teach nothing
    assert (dropped[1] - losses[1]).abs() > 0


def test_pretraining_blanks_what_was_written_in_half_of_the_samples_by_the_sample_alone():
    tokens = torch.randint(64, (400, 16), generator=torch.Generator().manual_seed(0))
    hidden = train.PretrainObjective.hidden(tokens)
    share = hidden.float().mean(dim=1)
    assert hidden.shape == (400, 15) and 0.4 < (share > 0).float().mean() < 0.6
    assert 0.03 < (share == 1).float().mean() < 0.2 and ((share > 0) & (share < 1)).sum() > 100
    assert torch.equal(train.PretrainObjective.hidden(tokens[200:]), hidden[200:])
    objective = train.PretrainObjective(Mentor(replace(TINY, image_size=16)), None)
    prefix = objective.mentor.prefix(torch.tensor([[7, 8]]), torch.ones(1, 2, dtype=torch.bool))
    torch.nn.init.normal_(objective.mentor.decoder.output.weight)
    objective.mentor.eval()
    objective.hidden = lambda tokens: torch.ones(1, 15, dtype=torch.bool)
    objective.writing(prefix, tokens[:1]).sum().backward()
    assert objective.mentor.decoder.tok_embeddings.weight.grad.abs().sum() == 0 and objective.blank.grad.abs().sum() > 0


@pytest.mark.parametrize("stage", ["1", "connector", "vqgan"])
def test_accumulating_4_x_1_equals_1_x_4(world, tmp_path, stage):
    for micro in (1, 4):
        train.main(command(world, tmp_path / str(micro), "--micro-batch", micro, stage=stage))
    np.testing.assert_allclose(losses(tmp_path / "1"), losses(tmp_path / "4"), rtol=1e-5)
    assert_same_weights(tmp_path / "1", tmp_path / "4", 1e-4)


MUON = ["--model", "tiny", "--init", "random"]                 # the stages of the small model train with it


@pytest.mark.parametrize("start", [[], MUON])
@pytest.mark.parametrize("fsdp", ["--no-fsdp", "--fsdp"])
def test_two_processes_equal_one_on_the_same_global_batch(world, tmp_path, fsdp, start):
    flags = ["--micro-batch", 1, "--val", world[1], "--sample-every", 2, *start]
    finish(run(command(world, tmp_path / "two", *flags, fsdp), processes=2))
    train.main(command(world, tmp_path / "one", *flags))
    one, two = log(tmp_path / "one"), log(tmp_path / "two")
    np.testing.assert_allclose([r["loss"] for r in one], [r["loss"] for r in two], rtol=1e-5)
    np.testing.assert_allclose([r["grad_norm"] for r in one], [r["grad_norm"] for r in two], rtol=1e-4)
    assert one[1]["losses"].keys() == two[1]["losses"].keys()
    for task, loss in one[1]["val"].items():
        assert two[1]["val"][task] == pytest.approx(loss, rel=1e-4)
    sheets = [Image.open(tmp_path / n / "samples-00000002.png") for n in ("one", "two")]
    assert sheets[0].size == sheets[1].size
    assert_same_weights(tmp_path / "one", tmp_path / "two", 1e-4)


# ---------------------------------------------------------------------------------------------------------------------
# Interruption

@pytest.mark.parametrize("processes, fsdp", [(1, "--no-fsdp"), (2, "--no-fsdp"), (2, "--fsdp")])
def test_a_run_killed_in_the_middle_resumes_with_the_same_losses(world, tmp_path, processes, fsdp):
    def arguments(out, *more):
        return command(world, out, "--micro-batch", 1, "--save-every", 4, fsdp, *more, stage="1", steps=14, batch=8)
    finish(run(arguments(tmp_path / "whole"), processes))
    process = run(arguments(tmp_path / "cut"), processes)
    while not train.checkpoints(tmp_path / "cut"):
        time.sleep(0.01)
        assert process.poll() is None, process.communicate()[0][-2000:]
    subprocess.run(["pkill", "-9", "-P", str(process.pid)])    # the workers first
    process.kill()
    process.communicate()
    assert len(losses(tmp_path / "cut")) < 14
    finish(run(arguments(tmp_path / "cut", "--resume"), processes))
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")
    assert_same_weights(tmp_path / "cut", tmp_path / "whole", 0)


def test_resuming_with_dropout_muon_the_tokenizer_and_its_critic_is_exact_too(world, tmp_path):
    for stage, init in (("vqgan", []), ("2", ["--init", "random", "--size", "32"]), ("1", MUON)):
        whole, cut = tmp_path / f"{stage}-whole", tmp_path / f"{stage}-cut"
        train.main([*command(world, whole, "--save-every", 2, "--keep", 9, stage=stage, steps=6), *init])
        train.main([*command(world, cut, "--save-every", 2, "--keep", 9, stage=stage, steps=6), *init])
        for late in ("step-00000004", "step-00000006"):
            for file in (cut / late).iterdir():
                file.unlink()
            (cut / late).rmdir()
        train.main([*command(world, cut, "--resume", stage=stage, steps=6), *init])
        assert losses(cut) == losses(whole)
        assert_same_weights(cut, whole, 0)


@pytest.mark.parametrize("file", ["model.safetensors", "training.safetensors", "training.json", "config.json"])
def test_a_damaged_newest_checkpoint_falls_back_to_the_one_before(world, tmp_path, file, capsys):
    train.main(command(world, tmp_path, "--save-every", 1, steps=3))
    before = losses(tmp_path)
    newest = train.checkpoints(tmp_path)[0] + "/" + file
    os.replace(newest, newest + ".whole")
    content = pathlib.Path(newest + ".whole").read_bytes()
    pathlib.Path(newest).write_bytes(content[:len(content) // 2])
    os.remove(newest + ".whole")
    train.main(command(world, tmp_path, "--resume", steps=3))
    printed = capsys.readouterr()
    assert "step-00000003" in printed.out + printed.err and "falling back" in printed.out + printed.err
    assert losses(tmp_path) == before


def test_a_resumed_run_must_be_the_same_run(world, tmp_path):
    train.main(command(world, tmp_path, steps=2))
    for flag, value, said in (("--seed", 5, "seed 0, not 5"), ("--init", "random", "init .*, not random"),
                              ("--prefix-rope", "zero", "prefix_rope identity, not zero")):
        with pytest.raises(InputError, match=f"started with {said}"):
            train.main(command(world, tmp_path, "--resume", flag, value, steps=2))


def test_data_to_validate_on_must_serve_the_stage(world, tmp_path):
    other = tmp_path / "other.jsonl"
    other.write_text('{"source_image": "a.png", "input_text": "x"}\n')          # reconstruction, which stage 2 lacks
    with pytest.raises(InputError, match="other.jsonl: holds no row of this stage's tasks"):
        train.main(command(world, tmp_path, "--val", other, stage="2"))


def test_training_a_connector_makes_references_welcome(world, tmp_path):
    model = weights.load(world[0])
    model.config = replace(model.config, untrained=("encoder.connector",))
    model.save_pretrained(tmp_path / "start")
    for stage, left in (("1", ("encoder.connector",)), ("2", ())):
        train.main([*command(world, tmp_path / stage, stage=stage, steps=1), "--init", str(tmp_path / "start")])
        assert weights.load(tmp_path / stage).config.untrained == left


@pytest.mark.parametrize("processes", [1, 2])
def test_sigterm_saves_before_leaving_and_the_newest_checkpoints_are_kept(world, tmp_path, processes):
    process = run(command(world, tmp_path, "--micro-batch", 1, "--save-every", 2, "--keep", 2, steps=400, batch=8),
                  processes)
    while len(train.checkpoints(tmp_path)) < 2:
        time.sleep(0.01)
        assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    output = process.communicate(timeout=60)[0]
    last = int(train.checkpoints(tmp_path)[0][-8:])
    assert last == log(tmp_path)[-1]["step"] < 400 and f"stopped after step {last} of 400" in output
    assert len(train.checkpoints(tmp_path)) == 2
    assert not [name for name in os.listdir(tmp_path) if name.endswith(".part")]


def test_a_loss_that_is_not_finite_stops_with_its_step_its_samples_and_a_saved_state(world, tmp_path):
    model = weights.load(world[0])
    with torch.no_grad():
        model.decoder.norm.weight[0] = float("inf")
    model.save_pretrained(tmp_path / "broken")
    with pytest.raises(InputError, match="step 0: the loss is nan.*data.jsonl:"):
        train.main([*command(world, tmp_path / "out"), "--init", str(tmp_path / "broken")])
    assert (tmp_path / "out" / "nonfinite-step-0" / "model.safetensors").exists()


def test_damaged_samples_are_skipped_and_named_and_too_many_stop_the_run(world, tmp_path, capsys):
    jsonl = pathlib.Path(write_data(tmp_path / "data"))
    good = jsonl.read_text()
    jsonl.write_text(good + '{"source_image": "gone.png", "input_text": "x", "generation_only": true}\n{broken\n')
    train.main([*command(world, tmp_path / "out", steps=4), "--data", str(jsonl)])
    printed = capsys.readouterr()
    assert f"data.jsonl:{len(good.splitlines()) + 2}" in printed.out + printed.err
    for picture in (tmp_path / "data").glob("*.png"):
        picture.write_bytes(b"damaged")
    with pytest.raises(InputError, match="mend the data"):
        train.main(["--stage", "1", "--init", world[0], "--data", str(jsonl), "--out", str(tmp_path / "none"),
                    "--steps", "9", "--global-batch", "4", "--workers", "0"])


def test_tokens_encoded_ahead_train_exactly_as_pictures_do(world, tmp_path):
    data.main(["encode", world[1], "--weights", world[0], "--out", str(tmp_path / "codes"), "--workers", "0"])
    train.main(command(world, tmp_path / "pictures"))
    train.main(command(world, tmp_path / "tokens", "--codes", tmp_path / "codes", "--sample-every", 3))
    np.testing.assert_allclose(losses(tmp_path / "tokens"), losses(tmp_path / "pictures"), rtol=1e-6)
    other = weights.load(world[0])
    other.vqgan.quantize.embedding.weight.data.neg_()
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(InputError, match="codes.safetensors: made with another VQGAN"):
        train.main([*command(world, tmp_path / "x", "--codes", tmp_path / "codes"), "--init", str(tmp_path / "other")])


# ---------------------------------------------------------------------------------------------------------------------
# Cost

@pytest.mark.parametrize("flags", [[], ["--checkpoint-activations"], ["--fsdp"]])
def test_the_start_prints_parts_batch_memory_and_steps(world, tmp_path, capsys, flags):
    train.main([*command(world, tmp_path, *flags, steps=1)])
    printed = capsys.readouterr().out
    for part in ("encoder.clip", "frozen", "decoder", "trains", "4 samples x 1 ranks x 1 micro-batches = 4",
                 "memory per rank", "activations (4 samples)", "steps: 1"):
        assert part in printed


def saved_bytes(objective, batch):
    """Bytes that autograd keeps for the backward pass, parameters aside."""
    own = {p.untyped_storage().data_ptr() for p in objective.parameters()}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        objective(batch).sum()
    return sum(kept.values())


def test_the_memory_formula_agrees_with_what_autograd_keeps():
    config = replace(TINY, prefix_tokens=192, image_size=48, decoder=replace(TINY.decoder, layers=6, dropout=0.0),
                     t5=replace(TINY.t5, layers=6, dropout=0.0))
    model = Mentor(config)
    objective = train.TokenObjective(model, None)
    batch = {"ids": torch.full((2, 192), 7), "mask": torch.ones(2, 192, dtype=torch.bool), "drop": None,
             "refs": torch.empty(0, 3, 56, 56), "tokens": torch.randint(64, (2, 144))}
    for trains in (train.STAGES["1"].trains, train.STAGES["2"].trains):
        train.freeze(objective, trains)
        model.encoder.t5.encoder.relative_bias.requires_grad_(False)       # else the CPU's attention is not fused
        full, half = train.activation_elements(config, 192, 144, trains)
        assert 2 * 4 * (full + half) == pytest.approx(saved_bytes(objective, batch), rel=0.1)


def test_full_size_stage_2_takes_one_optimizer_step_on_the_meta_device():
    args = train.parse(["--stage", "2", "--data", "x", "--out", "x", "--device", "cpu"])
    with torch.device("meta"):
        mentor = Mentor(MentorConfig())
        objective = train.TokenObjective(mentor, args)
        train.freeze(objective, args.trains)
        optimizer = train.make_optimizer(objective, args.lr)
        batch = {"ids": torch.zeros(1, 512, dtype=torch.long), "mask": torch.ones(1, 512, dtype=torch.bool),
                 "refs": torch.empty(1, 3, 224, 224), "tokens": torch.zeros(1, 1024, dtype=torch.long),
                 "drop": torch.zeros(1, dtype=torch.bool)}
        objective(batch).sum().backward()
        optimizer.step()
    stepped = {id(p) for p, state in optimizer.state.items() if state["exp_avg"].shape == p.shape}
    assert all(id(p) in stepped for p in mentor.parameters() if p.requires_grad)
    gpu = train.Ranks(0, 8, torch.device("cuda"))
    rows = train.memory(mentor, args, gpu, micro=4)
    assert 8 < rows["parameters (fp32)"] < 10 and sum(rows.values()) < 80


# ---------------------------------------------------------------------------------------------------------------------
# Learning

@pytest.mark.full
def test_eight_photographs_can_be_learnt_by_heart_in_every_task(tmp_path):
    photos = material("MENTOR_PHOTOS", "photos")
    folder = tmp_path / "data"
    folder.mkdir()
    for i, path in enumerate(sorted(photos.glob("*/00.jpg"))[:8]):
        stem = path.parent.name.rstrip("0123456789") + f"-{i:02}"
        data.center_square(data.open_image(path), 96).save(folder / f"{stem}.png")
        (folder / f"{stem}.txt").write_text(path.parent.name.replace("_", " "))
        mask = Image.new("L", (96, 96))                        # the foreground is taken to be a drawn ellipse
        ImageDraw.Draw(mask).ellipse((14, 14, 82, 82), fill=255)
        mask.save(folder / f"{stem}.mask.png")
    data.main(["folder", str(folder)])
    common = ["--data", str(folder / "data.jsonl"), "--workers", "1", "--global-batch", "8", "--save-every", "10000",
              "--sample-every", "10000"]
    torch.manual_seed(0)
    Mentor(replace(NO_DROPOUT, decoder=replace(NO_DROPOUT.decoder, layers=3, width=128)), byte_tokenizer()
           ).save_pretrained(tmp_path / "init")
    train.main(["--stage", "vqgan", "--init", str(tmp_path / "init"), "--out", str(tmp_path / "vq"), "--steps", "300",
                "--lr", "2e-3", *common])
    train.main(["--stage", "2", "--init", str(tmp_path / "vq"), "--out", str(tmp_path / "two"), "--steps", "500",
                "--lr", "2e-3", *common])
    last = log(tmp_path / "two")[-20:]
    for task in train.STAGES["2"].tasks:
        seen = [record["losses"][task] for record in last if task in record["losses"]]
        assert seen and np.mean(seen) < 0.3, (task, np.mean(seen))
    model = weights.load(tmp_path / "two")
    for path in sorted(folder.glob("*[0-9].png")):
        target = data.target_pixels(data.open_image(path), 24)[None]
        tokens = model.vqgan.encode(target)[0]
        ids, mask = model.prompter(path.with_suffix(".txt").read_text(), 0)
        drawn = model.generate(model.prefix(ids[None, mask], mask[None, mask]), [0],
                               replace(model.config.sampling, temperature=0.0))[0]
        assert (drawn == tokens).float().mean() > 0.9, path.name
