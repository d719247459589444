import os
import pathlib
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import (NO_DROPOUT, ROOT, assert_same_weights, command, finish, log, losses, material, run,
                      write_data)
from PIL import Image, ImageDraw
from safetensors.torch import load_file
from torch.distributed.checkpoint import state_dict
from torch.utils.checkpoint import checkpoint

import cli
import data
import prepare
import train
import weights
from cli import InputError
from model import Mentor, MentorConfig
from world.train import main as train_small_model

pytestmark = pytest.mark.gradients
STAGES = list(train.STAGES)


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
    optimizer, = train.make_optimizers(objective, train.STAGES["2"])
    groups = optimizer.param_groups
    assert [(p.dim(), g["weight_decay"]) for g in groups for p in g["params"]] == [(2, 0.05)] + [(1, 0.0)] * 3
    assert groups[0]["betas"] == (0.9, 0.95) and groups[0]["lr"] == 1e-4


@pytest.mark.parametrize("flags, said", [
    (["--without", "multi"], "stage 2 has no such task"),
    (["--without", "t2i", "--without", "segment", "--without", "recover", "--without", "subject"], "no task"),
    (["--global-batch", "6", "--micro-batch", "4"], "--global-batch 6 is no multiple of --micro-batch 4 x 1 ranks"),
    (["--stage", "pretrain"], "argument --stage: invalid choice: 'pretrain'"),
    (["--size", "40"], "up to 24 pixels"),
    (["--steps", "0"], "argument --steps: must be a whole number above 0, not 0"),
    (["--lr", "nan"], "argument --lr: must be a number above 0, not nan"),
    (["--workers", "-1"], "argument --workers: must be a whole number, 0 or above, not -1"),
    (["--resume"], "holds no checkpoint to resume from"),
    (["--device", "cuda"], "--device cuda does not work here"),
    (["--init", "out/nowhere/1"], "out/nowhere/1"),
    (["--data", "nowhere.jsonl"], "nowhere.jsonl")])
def test_impossible_runs_are_refused_in_one_sentence(toy, tmp_path, flags, said):
    if "cuda" in flags and torch.cuda.is_available():
        pytest.skip("this machine has CUDA")
    with pytest.raises(InputError, match=said):
        train.main([*command(toy, tmp_path / "out"), *flags])


def test_every_help_text_runs():
    commands = [[f"{name}.py"] for name in ("train", "sample", "prepare", "construct", "weights", "eval", "bench",
                                            "app")]
    commands += [["-m", f"world.{name}"] for name in ("rows", "train", "evaluate")]
    started = [subprocess.Popen([sys.executable, *script, "--help"], cwd=ROOT, stdout=subprocess.PIPE, text=True)
               for script in commands]
    for script, process in zip(commands, started):
        assert "usage" in process.communicate()[0] and process.returncode == 0, script


# ---------------------------------------------------------------------------------------------------------------------
# What a stage starts from, and its data, where no flag says so

def test_data_lies_in_a_folder_of_the_stage_or_in_data_itself(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data" / "2").mkdir(parents=True)
    for name in ("2/a.jsonl", "2/b.jsonl", "2/val-a.jsonl", "2/backgrounds.jsonl", "c.jsonl", "val.jsonl"):
        (tmp_path / "data" / name).write_text("{}")

    def found(*flags):
        args, stage, example = train.parse(["--stage", *flags])
        assert not example
        return args.data, args.val, args.backgrounds, stage.init, args.out

    assert found("2") == (["data/2/a.jsonl", "data/2/b.jsonl"], ["data/2/val-a.jsonl"], ["data/2/backgrounds.jsonl"],
                          "out/mentor/1", "out/mentor/2")
    assert found("1") == (["data/c.jsonl"], ["data/val.jsonl"], [], "out/mentor/connector", "out/mentor/1")
    assert found("2", "--data", "mine.jsonl")[:3] == (["mine.jsonl"], None, None)
    assert found("2", "--val", "mine.jsonl")[1] == ["mine.jsonl"]
    assert [train.STAGES[stage].init for stage in ("rope", "connector", "multi")] == [
        "llamagen", "generator", "out/mentor/2"]
    (tmp_path / "data" / "c.jsonl").unlink()
    with pytest.raises(InputError, match="nothing to learn from; put JSON lines into data/1/ or data/"):
        train.main(["--stage", "1"])


def test_weights_that_a_stage_starts_from_are_named_with_the_command_that_makes_them(toy, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for stage, said in (("2", "stage 2 starts from out/mentor/1, which is not there; make it by `python train.py "
                              "--stage 1`, or name other weights by --init"),
                        ("connector", "stage connector starts from generator, which `python weights.py convert "
                                      "generator out/generator` fetches")):
        with pytest.raises(InputError) as error:
            train.main(["--stage", stage, "--data", toy[1], "--workers", "0"])
        assert said in str(error.value)


def test_an_untrained_connector_that_stays_as_it_is_is_refused_unless_no_image_passes_it(toy, tmp_path):
    model = weights.load(toy[0])
    model.config = replace(model.config, untrained=("encoder.connector",))
    weights.save(model, tmp_path / "start")
    start = ["--init", str(tmp_path / "start")]
    with pytest.raises(InputError, match="no trained connector, and stage 1 leaves it as it is.*--stage connector"):
        train.main([*command(toy, tmp_path / "1", stage="1", steps=1), *start])
    train.main([*command(toy, tmp_path / "rope", stage="rope", steps=1), *start])
    assert weights.load(tmp_path / "rope").config.untrained == ("encoder.connector",)


def test_a_used_folder_is_refused_in_one_sentence(toy, tmp_path):
    train.main(command(toy, tmp_path, steps=1))
    with pytest.raises(InputError, match="holds another run; go on with it by --resume, or choose another --out"):
        train.main(command(toy, tmp_path, steps=1))
    assert len(cli.checkpoints(tmp_path)) == 1 and len(losses(tmp_path)) == 1


@pytest.mark.full
@pytest.mark.parametrize("processes", [1, 2])
def test_without_data_stage_2_is_an_example_from_rows_to_a_checkpoint_that_samples(tmp_path, processes):
    flags = ["--stage", "2", "--steps", "2", "--workers", "0", "--device", "cpu"]
    for _ in range(3 - processes):                             # a second run takes the place of the first
        output = finish(run(flags, processes, cwd=tmp_path))
        assert output.count("there is no data/: fine-tuning the small bundled model") == 1
    out = tmp_path / "out" / "example" / "2"
    assert len(losses(out)) == 2 and set(log(out)[1]["val"]) == set(train.STAGES["2"].tasks)
    mentor = weights.load(out)
    batch = data.collate([mentor.processor("a dog face in the snow")])
    assert mentor.sample(batch, [0]).shape == (1, 3, 64, 64)
    assert not (tmp_path / "out" / "mentor").exists()


def test_under_torchrun_a_mistake_is_said_once(tmp_path):
    output = finish(run(["--stage", "1"], processes=2, cwd=tmp_path), code=1)
    assert output.count("there is nothing to learn from") == 1


# ---------------------------------------------------------------------------------------------------------------------
# Every stage

@pytest.mark.parametrize("stage", STAGES)
def test_each_stage_moves_its_parts_and_no_other_by_a_bit_and_leaves_a_model(toy, tmp_path, stage):
    train.main([*command(toy, tmp_path, "--val", toy[1], "--sample-every", 2, stage=stage, steps=4)])
    before, after = load_file(f"{toy[0]}/model.safetensors"), load_file(tmp_path / "model.safetensors")
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
    mentor = weights.load(tmp_path)
    batch = data.collate([mentor.processor("The cat in <image>.", [Image.new("RGB", (30, 30))])])
    assert mentor.sample(batch, [0]).shape == (1, 3, 24, 24)


@pytest.mark.full
@pytest.mark.parametrize("stage", ["connector", "rope", "1", "2", "multi"])
def test_each_stage_runs_on_two_processes(toy, tmp_path, stage):
    finish(run(command(toy, tmp_path, stage=stage, steps=1), processes=2))
    assert len(losses(tmp_path)) == 1 and (tmp_path / "model.safetensors").exists()


@pytest.mark.parametrize("stage", ["connector", "2", *(pytest.param(stage, marks=pytest.mark.full)
                                                        for stage in ("1", "multi", "icl"))])
def test_a_query_connector_trains_in_each_stage_and_resumes_exactly(toy, tmp_path, stage):
    init = toy[0]
    if stage != "connector":
        train.main([*command(toy, tmp_path / "connector", "--connector", "query", stage="connector", steps=1)])
        init = str(tmp_path / "connector")
    flags = ["--connector", "query"] if stage == "connector" else ["--init", init]
    train.main([*command(toy, tmp_path / "whole", *flags, stage=stage, steps=4), "--save-every", "2"])
    before = weights.load(init, connector="query" if stage == "connector" else None)
    after = weights.load(tmp_path / "whole")
    assert after.config.connector == "query" and not after.config.untrained and after.config.prefix_tokens <= 512
    moved = any(not torch.equal(a, b) for a, b in zip(before.encoder.connector.parameters(),
                                                      after.encoder.connector.parameters()))
    assert moved == ("encoder.connector" in train.STAGES[stage].trains)
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    shutil.rmtree(tmp_path / "cut" / "step-00000004")
    train.main([*command(toy, tmp_path / "cut", *flags, stage=stage, steps=4), "--save-every", "2", "--resume"])
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")
    assert_same_weights(tmp_path / "cut", tmp_path / "whole", 0)


@pytest.mark.full
@pytest.mark.parametrize("fsdp", ["--no-fsdp", "--fsdp"])
def test_two_processes_with_a_query_connector_equal_one(toy, tmp_path, fsdp):
    train.main(command(toy, tmp_path / "connector", "--connector", "query", stage="connector", steps=1))
    flags = ["--micro-batch", 1, "--init", tmp_path / "connector"]
    finish(run(command(toy, tmp_path / "two", *flags, fsdp, stage="multi"), processes=2))
    train.main(command(toy, tmp_path / "one", *flags, stage="multi"))
    np.testing.assert_allclose(losses(tmp_path / "one"), losses(tmp_path / "two"), rtol=1e-5)
    assert_same_weights(tmp_path / "one", tmp_path / "two", 1e-4)


@pytest.mark.full
@pytest.mark.parametrize("stage", ["icl", "subjects", "reconstruct"])
def test_a_further_fine_tuning_resumes_exactly_and_is_the_same_on_two_processes(toy, tmp_path, stage):
    flags = ["--micro-batch", 1]
    train.main(command(toy, tmp_path / "one", *flags, stage=stage))
    finish(run(command(toy, tmp_path / "two", *flags, "--save-every", 1, stage=stage), processes=2))
    np.testing.assert_allclose(losses(tmp_path / "one"), losses(tmp_path / "two"), rtol=1e-5)
    shutil.rmtree(tmp_path / "two" / "step-00000003")
    whole = losses(tmp_path / "two")
    finish(run(command(toy, tmp_path / "two", *flags, "--save-every", 1, "--resume", stage=stage), processes=2))
    assert losses(tmp_path / "two") == whole


@pytest.mark.parametrize("stage", ["1", "connector"])
def test_accumulating_4_x_1_equals_1_x_4(toy, tmp_path, stage):
    for micro in (1, 4):
        train.main(command(toy, tmp_path / str(micro), "--micro-batch", micro, stage=stage))
    np.testing.assert_allclose(losses(tmp_path / "1"), losses(tmp_path / "4"), rtol=1e-5)
    assert_same_weights(tmp_path / "1", tmp_path / "4", 1e-4)


@pytest.mark.parametrize("fsdp", [pytest.param("--no-fsdp", marks=pytest.mark.full), "--fsdp"])
def test_two_processes_equal_one_on_the_same_global_batch(toy, tmp_path, fsdp):
    flags = ["--micro-batch", 1, "--val", toy[1], "--sample-every", 2]
    finish(run(command(toy, tmp_path / "two", *flags, fsdp), processes=2))
    train.main(command(toy, tmp_path / "one", *flags))
    one, two = log(tmp_path / "one"), log(tmp_path / "two")
    np.testing.assert_allclose([r["loss"] for r in one], [r["loss"] for r in two], rtol=1e-5)
    np.testing.assert_allclose([r["grad_norm"] for r in one], [r["grad_norm"] for r in two], rtol=1e-4)
    assert one[1]["losses"].keys() == two[1]["losses"].keys()
    for task, loss in one[1]["val"].items():
        assert two[1]["val"][task] == pytest.approx(loss, rel=1e-4)
    sheets = [Image.open(tmp_path / n / "samples-00000002.png") for n in ("one", "two")]
    assert sheets[0].size == sheets[1].size
    assert_same_weights(tmp_path / "one", tmp_path / "two", 1e-4)


@pytest.mark.full
def test_two_nodes_equal_one_process_and_resume_from_the_folder_they_share(toy, tmp_path):
    def nodes(*flags):
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        launcher = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=1", "--rdzv_id=7",
                    "--rdzv_backend=c10d", f"--rdzv_endpoint=localhost:{port}", "train.py"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        started = [subprocess.Popen([*launcher, *command(toy, tmp_path / "two", "--micro-batch", 1, *flags)], cwd=ROOT,
                                    env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
                   for _ in range(2)]
        for process in started:
            finish(process)
    nodes("--save-every", 1, "--keep", 9)
    train.main(command(toy, tmp_path / "one", "--micro-batch", 1))
    np.testing.assert_allclose(losses(tmp_path / "one"), losses(tmp_path / "two"), rtol=1e-5)
    before = losses(tmp_path / "two")
    shutil.rmtree(tmp_path / "two" / "step-00000003")
    nodes("--resume")
    assert losses(tmp_path / "two") == before


# ---------------------------------------------------------------------------------------------------------------------
# Interruption

@pytest.mark.parametrize("processes, fsdp", [
    (1, "--no-fsdp"), *(pytest.param(2, fsdp, marks=pytest.mark.full) for fsdp in ("--no-fsdp", "--fsdp"))])
def test_a_run_killed_in_the_middle_resumes_with_the_same_losses(toy, tmp_path, processes, fsdp):
    def arguments(out, *more):
        return command(toy, out, "--micro-batch", 1, "--save-every", 4, fsdp, *more, stage="1", steps=10, batch=8)
    finish(run(arguments(tmp_path / "whole"), processes))
    process = run(arguments(tmp_path / "cut"), processes)
    while not cli.checkpoints(tmp_path / "cut"):
        time.sleep(0.01)
        assert process.poll() is None, process.communicate()[0][-2000:]
    subprocess.run(["pkill", "-9", "-P", str(process.pid)])    # the workers first
    process.kill()
    process.communicate()
    assert len(losses(tmp_path / "cut")) < 10
    finish(run(arguments(tmp_path / "cut", "--resume"), processes))
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")
    assert_same_weights(tmp_path / "cut", tmp_path / "whole", 0)


def test_resuming_with_dropout_is_exact_too(toy, tmp_path):
    for stage, init in (("2", ["--init", "random", "--size", "32"]), ("connector", [])):
        whole, cut = tmp_path / f"{stage}-whole", tmp_path / f"{stage}-cut"
        train.main([*command(toy, whole, "--save-every", 2, "--keep", 9, stage=stage, steps=6), *init])
        train.main([*command(toy, cut, "--save-every", 2, "--keep", 9, stage=stage, steps=6), *init])
        for late in ("step-00000004", "step-00000006"):
            shutil.rmtree(cut / late)
        train.main([*command(toy, cut, "--resume", stage=stage, steps=6), *init])
        assert losses(cut) == losses(whole)
        assert_same_weights(cut, whole, 0)


KILL = """
import os, sys
import torch, train
torch.set_num_threads(1)
arguments = sys.argv[2:]


def child(main, last=0):
    # the exit code of `main` in a process of its own, killed at the call `last` of those that change names
    process = os.fork()
    if process:
        return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    seen = [0]

    def counted(function):
        def call(*args, **options):
            seen[0] += 1
            if seen[0] == last:
                os._exit(9)
            return function(*args, **options)
        return call
    for name in ("replace", "rename", "link", "remove", "fsync"):
        setattr(os, name, counted(getattr(os, name)))
    try:
        main()
    except BaseException:
        import traceback
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


last, code = 0, 9
while code == 9:
    last += 1
    out = f"{sys.argv[1]}/{last}"
    code = child(lambda: train.main([*arguments, "--out", out]), last)
    resume = ["--resume"] if any(name.startswith("step-") for name in os.listdir(out)) else []
    assert child(lambda: train.main([*arguments, "--out", out, *resume])) == 0, last
print(last)
"""


@pytest.mark.full
def test_a_run_killed_at_any_change_of_a_name_goes_on_from_whole_files_and_leaves_no_others(toy, tmp_path):
    arguments = command(toy, tmp_path, "--save-every", 1, "--keep", 1, "--sample-every", 2, steps=2)
    at = arguments.index("--out")
    script = subprocess.run([sys.executable, "-c", KILL, str(tmp_path), *arguments[:at], *arguments[at + 2:]], cwd=ROOT,
                            text=True, capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert script.returncode == 0, script.stderr[-3000:]
    count = int(script.stdout.split()[-1])
    assert count > 20
    whole = tmp_path / str(count)                              # this one was not killed
    for number in range(1, count):
        out = tmp_path / str(number)
        assert losses(out) == losses(whole)
        assert_same_weights(out, whole, 0)
        assert sorted(os.listdir(out)) == sorted(os.listdir(whole)), number


def test_bf16_products_over_fp32_weights_are_a_choice_on_the_cpu(toy, tmp_path):
    for name, flags in {"default": (), "fp32": ["--no-bf16"], "bf16": ["--bf16"]}.items():
        train.main([*command(toy, tmp_path / name, "--lr", 1e-4), *flags])
    assert losses(tmp_path / "default") == losses(tmp_path / "fp32") != losses(tmp_path / "bf16")
    np.testing.assert_allclose(losses(tmp_path / "fp32"), losses(tmp_path / "bf16"), rtol=1e-2)
    tensors = load_file(tmp_path / "bf16" / "step-00000003" / "training.safetensors")
    assert all(tensor.dtype != torch.bfloat16 for tensor in tensors.values())


@pytest.mark.parametrize("file", ["model.safetensors", "training.safetensors", "training.json", "config.json"])
def test_a_damaged_newest_checkpoint_falls_back_to_the_one_before(toy, tmp_path, file, capsys):
    train.main(command(toy, tmp_path, "--save-every", 1, steps=3))
    before = losses(tmp_path)
    newest = cli.checkpoints(tmp_path)[0] + "/" + file
    os.replace(newest, newest + ".whole")
    content = pathlib.Path(newest + ".whole").read_bytes()
    pathlib.Path(newest).write_bytes(content[:len(content) // 2])
    os.remove(newest + ".whole")
    train.main(command(toy, tmp_path, "--resume", steps=3))
    printed = capsys.readouterr()
    assert "step-00000003" in printed.out + printed.err and "falling back" in printed.out + printed.err
    assert losses(tmp_path) == before


def test_a_resumed_run_must_be_the_same_run(toy, tmp_path):
    train.main(command(toy, tmp_path, steps=2))
    for flag, value, said in (("--seed", 5, "seed 0, not 5"), ("--init", "random", "init .*, not random"),
                              ("--prefix-rope", "zero", "prefix_rope identity, not zero"),
                              ("--prefix-tokens", 200, "prefix_tokens 512, not 200"),
                              ("--lr", 1e-3, "lr 0.0001, not 0.001"), ("--without", "t2i", "tasks "),
                              ("--data", toy[1], "data ")):
        with pytest.raises(InputError, match=f"started with {said}"):
            train.main(command(toy, tmp_path, "--resume", flag, value, steps=2))


def test_data_to_validate_on_must_serve_the_stage(toy, tmp_path):
    other = tmp_path / "other.jsonl"
    other.write_text('{"source_image": "a.png", "input_text": "x"}\n')          # reconstruction, which stage 2 lacks
    with pytest.raises(InputError, match="other.jsonl: holds no row of this stage's tasks"):
        train.main(command(toy, tmp_path, "--val", other, stage="2"))


def test_training_a_connector_makes_references_welcome(toy, tmp_path):
    model = weights.load(toy[0])
    model.config = replace(model.config, untrained=("encoder.connector",))
    weights.save(model, tmp_path / "start")
    train.main([*command(toy, tmp_path / "2", stage="2", steps=1), "--init", str(tmp_path / "start")])
    assert weights.load(tmp_path / "2").config.untrained == ()


@pytest.mark.parametrize("processes, number, workers, whole_group", [
    (1, signal.SIGTERM, 2, True),
    *(pytest.param(*case, marks=pytest.mark.full) for case in (
        (2, signal.SIGTERM, 0, False), (1, signal.SIGINT, 2, True), (1, signal.SIGUSR1, 2, True),
        (1, signal.SIGHUP, 0, False), (1, signal.SIGTERM, 0, False), (2, signal.SIGTERM, 2, True),
        (2, signal.SIGINT, 2, True)))])
def test_a_signal_saves_before_leaving_and_the_newest_checkpoints_are_kept(toy, tmp_path, processes, number, workers,
                                                                           whole_group):
    process = run([*command(toy, tmp_path, "--micro-batch", 1, "--save-every", 2, "--keep", 2, steps=4000, batch=8),
                   "--workers", str(workers)], processes, start_new_session=True)
    while len(cli.checkpoints(tmp_path)) < 2:
        time.sleep(0.01)
        assert process.poll() is None, process.communicate()[0]
    if whole_group:
        os.killpg(process.pid, number)
    else:
        process.send_signal(number)
    output = process.communicate(timeout=120)[0]
    last = int(cli.checkpoints(tmp_path)[0][-8:])
    assert last == log(tmp_path)[-1]["step"] < 4000 and f"stopped after step {last} of 4000" in output
    assert len(cli.checkpoints(tmp_path)) == 2
    assert not [name for name in os.listdir(tmp_path) if name.startswith(".")]
    if processes == 1:
        assert process.returncode == 128 + number and "Traceback" not in output


def test_a_loss_that_is_not_finite_stops_with_its_step_its_samples_and_a_saved_state(toy, tmp_path):
    model = weights.load(toy[0])
    with torch.no_grad():
        model.decoder.norm.weight[0] = 3e38
    weights.save(model, tmp_path / "broken")
    with pytest.raises(InputError, match="step 0: the loss is (nan|inf).*data.jsonl:"):
        train.main([*command(toy, tmp_path / "out"), "--init", str(tmp_path / "broken")])
    assert (tmp_path / "out" / "nonfinite-step-0" / "model.safetensors").exists()


def test_damaged_samples_are_skipped_and_named_and_too_many_stop_the_run(toy, tmp_path, capsys):
    jsonl = pathlib.Path(write_data(tmp_path / "data"))
    good = jsonl.read_text()
    jsonl.write_text(good + '{"source_image": "gone.png", "input_text": "x", "generation_only": true}\n{broken\n')
    train.main([*command(toy, tmp_path / "out", steps=4), "--data", str(jsonl)])
    printed = capsys.readouterr()
    assert f"data.jsonl:{len(good.splitlines()) + 2}" in printed.out + printed.err
    for picture in (tmp_path / "data").glob("*.png"):
        picture.write_bytes(b"damaged")
    with pytest.raises(InputError, match="fix the data"):
        train.main(["--stage", "1", "--init", toy[0], "--data", str(jsonl), "--out", str(tmp_path / "none"),
                    "--steps", "9", "--global-batch", "4", "--workers", "0"])


def test_tokens_encoded_ahead_train_exactly_as_pictures_do(toy, tmp_path):
    prepare.main(["encode", toy[1], "--weights", toy[0], "--out", str(tmp_path / "codes"), "--workers", "0"])
    train.main(command(toy, tmp_path / "pictures"))
    train.main(command(toy, tmp_path / "tokens", "--codes", tmp_path / "codes", "--sample-every", 3))
    np.testing.assert_allclose(losses(tmp_path / "tokens"), losses(tmp_path / "pictures"), rtol=1e-6)
    other = weights.load(toy[0])
    other.vqgan.quantize.embedding.weight.data.neg_()
    weights.save(other, tmp_path / "other")
    with pytest.raises(InputError, match="codes.safetensors: made with another VQGAN"):
        train.main([*command(toy, tmp_path / "x", "--codes", tmp_path / "codes"), "--init", str(tmp_path / "other")])


# ---------------------------------------------------------------------------------------------------------------------
# Cost

@pytest.mark.parametrize("flags", [[], ["--checkpoint-activations"], ["--fsdp"]])
def test_the_start_prints_parts_batch_memory_and_steps(toy, tmp_path, capsys, flags):
    train.main([*command(toy, tmp_path, *flags, steps=1)])
    printed = capsys.readouterr().out
    for part in ("encoder.clip", "frozen", "decoder", "trains", "4 samples x 1 ranks x 1 micro-batches = 4",
                 "memory per rank", "activations", "steps: 1"):
        assert part in printed


@pytest.fixture
def card(monkeypatch):
    """Stand-in for a GPU: card(GiB) -> ranks of eight of them."""
    def make(gib, world=8):
        monkeypatch.setattr(cli, "card_memory", lambda device: gib)
        return cli.Ranks(0, world, torch.device("cuda", 0))
    return make


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("gib, flags", [(79.1, []), (39.4, ["--fsdp", "--checkpoint-activations"])])
def test_default_micro_batches_leave_8_gb_of_a_card_free_in_every_stage(card, stage, gib, flags):
    args, row = train.make_parser(train.STAGES, "").parse_args(["--stage", stage, *flags]), train.STAGES[stage]
    with torch.device("meta"):
        mentor = Mentor(replace(MentorConfig(), prefix_tokens=row.prefix_tokens), t5_decoder=stage == "connector")
    micro, accum, _ = train.batch_arithmetic(args, row, mentor, card(gib), 1000)
    assert micro * accum * 8 == row.global_batch

    def needed(micro):
        way = weights.Way(args.fsdp, args.checkpoint_activations, micro)
        return sum(weights.training_memory(mentor, row.trains, 8, way).values()) + 8e9 / 2**30
    assert needed(micro) <= gib and (micro == row.micro or needed(2 * micro) > gib)


@pytest.mark.parametrize("gib, world, flags, said", [
    (79.1, 8, ["--micro-batch", "16"], "16 samples at once need .* has 79.1 .* fits with --micro-batch 4$"),
    (39.4, 8, [], "1 samples at once need 40.0 GiB .* fits with --fsdp --micro-batch 4$"),
    (39.4, 1, ["--micro-batch", "1"], "1 samples .* take more GPUs and --fsdp, or larger ones$"),
    (48.0, 1, ["--micro-batch", "8"], "8 samples .* fits with --micro-batch 1$")])
def test_a_step_that_does_not_fit_is_refused_with_flags_that_make_it_fit(card, gib, world, flags, said):
    args = train.make_parser(train.STAGES, "").parse_args(["--stage", "2", *flags])
    with torch.device("meta"):
        mentor = Mentor(MentorConfig())
    with pytest.raises(InputError, match=said) as error:
        train.batch_arithmetic(args, train.STAGES["2"], mentor, card(gib, world), 1000)
    advised = re.search(r"fits with (.*)$", str(error.value))
    if advised:
        args = train.make_parser(train.STAGES, "").parse_args(["--stage", "2", *advised[1].split()])
        train.batch_arithmetic(args, train.STAGES["2"], mentor, card(gib, world), 1000)


def test_a_dry_run_prints_rows_steps_hours_and_memory_and_writes_nothing(toy, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    train.main(["--stage", "2", "--data", toy[1], "--steps", "4050", "--dry-run", "--gpus", "8", "--rate", "4"])
    printed = capsys.readouterr().out
    for line in (f"{'subject':12}{3:10} rows", "steps: 4,050 of 128 samples, 4.5 hours on 8 GPUs at 4.0 samples",
                 "--fsdp --checkpoint-activations", "80 GB, 8 of them free: --micro-batch 4"):
        assert line in printed
    assert not os.listdir(tmp_path)
    train.main(["--stage", "2", "--data", toy[1], "--init", "tiny", "--dry-run"])
    assert "prefixes of 512 rows, images of 64 pixels" in capsys.readouterr().out


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nMore"),
                                   RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"),
                                   MemoryError()])
def test_running_out_of_memory_in_a_step_is_one_sentence_and_resumes(toy, tmp_path, monkeypatch, error):
    step = train.train_step

    def fail(run, batches, number):
        if number == 2:
            raise error
        return step(run, batches, number)
    monkeypatch.setattr(train, "train_step", fail)
    with pytest.raises(InputError, match="^out of memory .*step 3 takes 4 samples at once; go on with a smaller"):
        train.main(command(toy, tmp_path, "--save-every", 1))
    monkeypatch.setattr(train, "train_step", step)
    train.main(command(toy, tmp_path, "--resume", "--micro-batch", 2))
    assert len(losses(tmp_path)) == 3


@pytest.mark.full
def test_activation_checkpointing_compiles_inside_and_leaves_drawing_alone(toy, tmp_path, monkeypatch):
    recomputed = []

    def record(forward, *inputs, **options):
        recomputed.append(torch.is_grad_enabled())
        return checkpoint(forward, *inputs, **options)
    monkeypatch.setattr(train, "checkpoint", record)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    train.main(command(toy, tmp_path / "both", "--compile", "--checkpoint-activations", "--sample-every", 1, steps=1))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    assert len(recomputed) == 4 and all(recomputed)            # two blocks of T5, two of the decoder
    train.main(command(toy, tmp_path / "plain", steps=1))
    np.testing.assert_allclose(losses(tmp_path / "both"), losses(tmp_path / "plain"), rtol=1e-4)


def test_resuming_copies_no_moments_to_the_host(toy, tmp_path, monkeypatch):
    train.main(command(toy, tmp_path, steps=2))
    copies = []
    offload = state_dict._offload_state_dict_to_cpu

    def record(*args, **options):
        copies.append(args)
        return offload(*args, **options)
    monkeypatch.setattr(state_dict, "_offload_state_dict_to_cpu", record)
    monkeypatch.setattr(train, "loop", lambda run, *_: run.steps)
    train.main(command(toy, tmp_path, "--resume", steps=2))
    assert not copies


@pytest.mark.parametrize("name, connector, pictures", [
    ("2", "released", 1), *(pytest.param(*case, marks=pytest.mark.full) for case in (
        ("connector", "query", 1), ("multi", "released", 4), ("multi", "query", 14), ("icl", "released", 5),
        ("icl", "query", 5)))])
def test_a_full_size_stage_takes_one_optimizer_step_on_the_meta_device(name, connector, pictures):
    stage = train.STAGES[name]
    rows = 512 if connector == "query" else stage.prefix_tokens
    with torch.device("meta"):
        config = replace(MentorConfig(), connector=connector, prefix_tokens=rows)
        mentor = Mentor(config, t5_decoder=name == "connector")
        assert pictures * mentor.encoder.image_tokens < rows
        objective = train.TokenObjective(mentor)
        train.freeze(objective, stage.trains)
        optimizer, = train.make_optimizers(objective, stage)
        batch = {"ids": torch.zeros(1, rows, dtype=torch.long), "mask": torch.ones(1, rows, dtype=torch.bool),
                 "refs": torch.empty(pictures, 3, 224, 224), "words": torch.zeros(pictures, 4, dtype=torch.long),
                 "tokens": torch.zeros(1, 1024, dtype=torch.long), "drop": torch.zeros(1, dtype=torch.bool)}
        if name == "connector":
            batch["labels"] = torch.zeros(1, data.CAPTION_TOKENS, dtype=torch.long)
        objective(batch).sum().backward()
        optimizer.step()
    stepped = {id(p) for p, state in optimizer.state.items() if state["exp_avg"].shape == p.shape}
    assert all(id(p) in stepped for p in mentor.parameters() if p.requires_grad)


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
    prepare.main(["folder", str(folder)])
    common = ["--data", str(folder / "data.jsonl"), "--workers", "1", "--global-batch", "8", "--save-every", "10000",
              "--sample-every", "10000"]
    torch.manual_seed(0)
    model = Mentor(replace(NO_DROPOUT, decoder=replace(NO_DROPOUT.decoder, layers=3, width=128)),
                   weights.byte_tokenizer())
    weights.save(model, tmp_path / "init")
    train_small_model(["--stage", "vqgan", "--init", str(tmp_path / "init"), "--out", str(tmp_path / "vq"), "--steps",
                       "300", "--lr", "2e-3", *common])
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
        batch = data.collate([model.processor(path.with_suffix(".txt").read_text())])
        sampled = model.generate(model.prefix(batch["ids"], batch["mask"]), [0],
                                 replace(model.config.sampling, temperature=0.0))[0]
        assert (sampled == tokens).float().mean() > 0.9, path.name
