"""What all command lines share: errors in one sentence, numbers, files that appear whole, processes, logs."""
import errno
import json
import os
import pathlib
import signal
import struct
import subprocess
import sys
import zlib
from dataclasses import asdict, dataclass

import numpy as np
import pytest
import torch
from PIL import Image

import cli
from cli import InputError

ROOT = pathlib.Path(cli.__file__).parent


def tree(folder):
    """{path below the folder: content}, content None for a folder."""
    return {str(path.relative_to(folder)): path.read_text() if path.is_file() else None for path in folder.rglob("*")}


def write(path, text):
    with cli.atomic_file(path) as temporary, open(temporary, "w") as file:
        file.write(text)


# ---------------------------------------------------------------------------------------------------------------------
# Running a script

def test_bad_input_is_one_line_and_exit_code_2_and_an_interrupt_exit_code_130(monkeypatch, capsys):
    def stop(error):
        def main():
            raise error
        with pytest.raises(SystemExit) as caught:
            cli.run(main)
        return caught.value.code

    monkeypatch.setattr(sys, "argv", ["/somewhere/sample.py", "--n", "3"])
    monkeypatch.delenv("TORCHELASTIC_ERROR_FILE", raising=False)
    monkeypatch.delenv("RANK", raising=False)
    assert stop(InputError("dog.jpg: no such file; check the path")) == 2
    assert capsys.readouterr() == ("", "sample.py: error: dog.jpg: no such file; check the path\n")
    assert stop(KeyboardInterrupt()) == 130
    assert capsys.readouterr() == ("", "")
    for rank, line in (("0", "sample.py: error: x\n"), ("3", "")):         # several processes, but not by torchrun
        monkeypatch.setenv("RANK", rank)
        assert stop(InputError("x")) == 2 and capsys.readouterr() == ("", line)
    with pytest.raises(ZeroDivisionError):               # a fault of the program keeps its traceback
        cli.run(lambda: 1 / 0)
    assert cli.run(lambda: None) is None


SCRIPT = """
import os, sys, time
import cli

def main():
    if os.environ["RANK"] in sys.argv[1]:
        raise cli.InputError("dog.jpg: no such file; check the path")
    time.sleep(60)

cli.run(main)
"""


@pytest.mark.parametrize("ranks", ["0123", pytest.param("2", marks=pytest.mark.full)])
def test_under_torchrun_an_error_is_reported_once_whichever_ranks_meet_it(tmp_path, ranks):
    (tmp_path / "script.py").write_text(SCRIPT)
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    result = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=4", "--master_port=0",
                             "--rdzv_backend=c10d", "--rdzv_endpoint=localhost:0", "script.py", ranks],
                            cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    lines = [line for line in (result.stdout + result.stderr).splitlines() if "dog.jpg" in line]
    assert lines == ["script.py: error: dog.jpg: no such file; check the path"]
    assert result.returncode != 0


# ---------------------------------------------------------------------------------------------------------------------
# Numbers

def parse(*arguments):
    parser = cli.Parser(prog="test")
    for flag in ("positive_int", "natural", "positive_float", "nonnegative_float"):
        parser.add_argument(f"--{flag}", type=getattr(cli, flag))
    return parser.parse_args(arguments)


@pytest.mark.parametrize("flag, text, value", [
    ("positive_int", "1", 1), ("natural", "0", 0), ("natural", "12", 12), ("positive_float", "1e-4", 1e-4),
    ("nonnegative_float", "0", 0.0), ("nonnegative_float", "2.5", 2.5), ("positive_int", str(2**53 - 1), 2**53 - 1)])
def test_a_number_in_its_range_is_taken(flag, text, value):
    number = getattr(parse(f"--{flag}", text), flag)
    assert number == value and type(number) is type(value)


@pytest.mark.parametrize("flag, text, requirement", [
    ("positive_int", "0", "must be a whole number above 0, not 0"),
    ("positive_int", "-3", "must be a whole number above 0, not -3"),
    ("positive_int", "1e400", "must be a whole number above 0, not 1e400"),
    ("positive_int", "1.5", "must be a whole number above 0, not 1.5"),
    ("positive_int", str(2**53), "must be a whole number above 0, not"),     # no longer exact as a float
    ("natural", "-1", "must be a whole number, 0 or above, not -1"),
    ("natural", "many", "must be a whole number, 0 or above, not many"),
    ("natural", "", "must be a whole number, 0 or above, not "),
    ("positive_float", "0", "must be a number above 0, not 0"),
    ("positive_float", "nan", "must be a number above 0, not nan"),
    ("positive_float", "inf", "must be a number above 0, not inf"),
    ("positive_float", "fast", "must be a number above 0, not fast"),
    ("nonnegative_float", "-0.1", "must be a number, 0 or above, not -0.1"),
    ("nonnegative_float", "nan", "must be a number, 0 or above, not nan")])
def test_a_number_outside_its_range_is_refused_with_flag_range_and_value(flag, text, requirement):
    with pytest.raises(InputError, match=f"argument --{flag}: {requirement}"):
        parse(f"--{flag}={text}")


def test_every_usage_error_is_an_input_error_that_points_to_help():
    for arguments in (["--colour", "red"], ["--natural"], ["stray"]):
        with pytest.raises(InputError, match="see --help$"):
            parse(*arguments)


# ---------------------------------------------------------------------------------------------------------------------
# Files

def test_a_file_appears_whole_in_folders_that_are_made_on_the_way(tmp_path):
    path = tmp_path / "new" / "deep" / "log.txt"
    with cli.atomic_file(path) as temporary:
        assert os.path.dirname(temporary) == str(path.parent) and temporary.endswith(".txt")
        pathlib.Path(temporary).write_text("half")
        assert not path.exists()
        pathlib.Path(temporary).write_text("whole")
    write(path, "newer")
    assert tree(tmp_path) == {"new": None, "new/deep": None, "new/deep/log.txt": "newer"}
    (tmp_path / "plain.txt").write_text("")
    assert path.stat().st_mode == (tmp_path / "plain.txt").stat().st_mode


def test_content_is_on_the_disk_before_its_name_is(tmp_path, monkeypatch):
    events, replace, rename, fsync = [], os.replace, os.rename, os.fsync
    monkeypatch.setattr(os, "fsync", lambda file: events.append("content") or fsync(file))
    monkeypatch.setattr(os, "replace", lambda *names: events.append("name") or replace(*names))
    monkeypatch.setattr(os, "rename", lambda *names: events.append("name") or rename(*names))
    write(tmp_path / "a.txt", "new")
    assert events == ["content", "name"]
    events.clear()
    with cli.atomic_folder(tmp_path / "model") as temporary:
        for name in ("a.txt", "b.txt"):
            pathlib.Path(temporary, name).write_text("new")
    assert events == ["content", "content", "name"]


@pytest.mark.parametrize("error", [ValueError("no"), KeyboardInterrupt(), InputError("x: no; fix it")])
def test_an_exception_in_the_block_leaves_the_old_content_and_nothing_else(tmp_path, error):
    write(tmp_path / "a.txt", "old")
    for name in ("a.txt", "b.txt"):
        with pytest.raises(type(error)) as caught:
            with cli.atomic_file(tmp_path / name) as temporary:
                pathlib.Path(temporary).write_text("new")
                raise error
        assert caught.value is error
    assert tree(tmp_path) == {"a.txt": "old"}


def test_a_planted_link_is_never_written_through(tmp_path, monkeypatch):
    victim, folder = tmp_path / "victim.txt", tmp_path / "out"
    victim.write_text("precious")
    folder.mkdir()
    path = folder / "a.txt"
    guessable = [".a.txt", "a.txt.tmp", ".a.txt.tmp", "a.txt.part", "a.part.txt", "a.tmp.txt", "tmp-a.txt",
                 f".{os.getpid()}-a.txt", f"a.txt.{os.getpid()}"]
    for name in guessable:
        (folder / name).symlink_to(victim)
    names = set()
    for i in range(5):
        with cli.atomic_file(path) as temporary:
            names.add(temporary)
            pathlib.Path(temporary).write_text(str(i))
    assert len(names) == 5 and path.read_text() == "4" and victim.read_text() == "precious"
    assert sorted(os.listdir(folder)) == sorted([*guessable, "a.txt"])
    path.unlink()
    path.symlink_to(victim)                              # the name itself is replaced, not what it points to
    write(path, "new")
    assert path.read_text() == "new" and not path.is_symlink() and victim.read_text() == "precious"

    monkeypatch.setattr(cli, "temporary_name", lambda path: str(folder / "guessed"))           # somebody guessed a name
    (folder / "guessed").symlink_to(victim)
    with pytest.raises(InputError, match="a.txt: cannot be written"):
        write(path, "newer")
    assert victim.read_text() == "precious" and path.read_text() == "new" and (folder / "guessed").is_symlink()


def test_a_write_error_is_one_sentence_that_names_the_file(tmp_path):
    write(tmp_path / "file", "old")
    with pytest.raises(InputError, match=r"file: cannot be written \(No space left on device\); choose another place"):
        with cli.atomic_file(tmp_path / "file"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with pytest.raises(InputError, match=r"file: cannot be written \(image file could not be written\)"):
        with cli.atomic_file(tmp_path / "file"):
            raise OSError("image file could not be written")           # as libraries raise it, without a number
    with pytest.raises(InputError, match=r"file/a.txt: cannot be written, what should be its folder is a file"):
        write(tmp_path / "file" / "a.txt", "new")
    (tmp_path / "folder").mkdir()
    with pytest.raises(InputError, match="folder: is a folder; choose another name"):
        write(tmp_path / "folder", "new")
    assert tree(tmp_path) == {"file": "old", "folder": None}


def test_a_probe_tells_whether_a_file_can_be_written_and_leaves_none(tmp_path):
    (tmp_path / "file").write_text("old")
    cli.probe(tmp_path / "file")
    cli.probe(tmp_path / "new" / "a.png")
    for path in (tmp_path / "file" / "a.png", tmp_path):
        with pytest.raises(InputError, match="cannot be written|is a folder"):
            cli.probe(path)
    assert tree(tmp_path) == {"file": "old", "new": None}


def test_json_is_written_whole_or_not_at_all(tmp_path):
    cli.write_json(tmp_path / "a.json", {"é": [1, 2.5, None]})
    assert json.loads((tmp_path / "a.json").read_text(encoding="utf-8")) == {"é": [1, 2.5, None]}
    with pytest.raises(TypeError):
        cli.write_json(tmp_path / "a.json", {"first": 1, "second": object()})
    assert json.loads((tmp_path / "a.json").read_text(encoding="utf-8")) == {"é": [1, 2.5, None]}
    assert os.listdir(tmp_path) == ["a.json"]


# ---------------------------------------------------------------------------------------------------------------------
# Folders

OURS = ("config.json", "model.safetensors")


def write_folder(path, text, ours=OURS):
    with cli.atomic_folder(path, ours) as temporary:
        pathlib.Path(temporary, "config.json").write_text(text)


def test_a_folder_appears_whole_and_takes_the_place_of_an_older_one_of_ours(tmp_path):
    path = tmp_path / "new" / "model"
    write_folder(path, "1")
    (path / "model.safetensors").write_text("1")
    write_folder(path, "2")
    assert tree(tmp_path) == {"new": None, "new/model": None, "new/model/config.json": "2"}
    (tmp_path / "empty").mkdir()
    write_folder(tmp_path / "empty", "3", ours=())
    assert tree(tmp_path / "empty") == {"config.json": "3"}


def test_a_folder_that_holds_anything_else_is_refused_by_the_name_of_it(tmp_path):
    path = tmp_path / "photos"
    path.mkdir()
    for name in ("config.json", "dog.jpg"):
        (path / name).write_text("precious")
    before = tree(tmp_path)
    for refused in (lambda: cli.check_folder(path, OURS), lambda: write_folder(path, "new")):
        with pytest.raises(InputError, match="photos: holds dog.jpg, which is no part"):
            refused()
    with pytest.raises(InputError, match="holds config.json"):
        write_folder(path, "new", ours=())               # nothing is ours unless it is said
    with pytest.raises(InputError, match="dog.jpg: cannot become a folder"):
        write_folder(path / "dog.jpg", "new")
    with pytest.raises(InputError, match="cannot be"):
        write_folder(path / "dog.jpg" / "model", "new")
    assert tree(tmp_path) == before


@pytest.mark.parametrize("error", [ValueError("no"), KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left")])
def test_an_exception_in_the_block_leaves_the_old_folder_and_nothing_else(tmp_path, error):
    write_folder(tmp_path / "model", "old")
    for name in ("model", "other"):
        with pytest.raises(InputError if isinstance(error, OSError) else type(error)):
            with cli.atomic_folder(tmp_path / name, OURS) as temporary:
                pathlib.Path(temporary, "config.json").write_text("new")
                raise error
    assert tree(tmp_path) == {"model": None, "model/config.json": "old"}


def test_the_old_folder_returns_when_the_last_rename_fails(tmp_path, monkeypatch):
    write_folder(tmp_path / "model", "old")
    rename, calls = os.rename, []

    def rename_once(source, target):
        calls.append(str(target))
        if len(calls) == 2:
            raise OSError(errno.EIO, "Input/output error")
        rename(source, target)

    monkeypatch.setattr(os, "rename", rename_once)
    with pytest.raises(InputError, match=r"model: cannot be written \(Input/output error\)"):
        write_folder(tmp_path / "model", "new")
    assert calls[1] == calls[2] == str(tmp_path / "model")
    assert tree(tmp_path) == {"model": None, "model/config.json": "old"}


# ---------------------------------------------------------------------------------------------------------------------
# Problems, processes, signals

def test_too_many_problems_stop_the_run_and_few_are_logged_once():
    log = []
    problems = cli.Problems(log.append)
    for _ in range(3):
        problems.seen += 6
        problems.add("a.jsonl:7: gone")                  # many of few do not stop it yet
    assert log == ["skipped a.jsonl:7: gone"]
    problems.seen += 62                                  # 3 of 80
    problems.add("a.jsonl:8: torn")                      # 4 of 80 is 5 %
    named = "; ".join(["a.jsonl:7: gone", "a.jsonl:8: torn", "a.jsonl:9: torn"])
    with pytest.raises(InputError, match=f"5 problems in 80 samples.*{named}$"):
        problems.add("a.jsonl:9: torn")


def test_the_device_is_the_one_asked_for_or_the_first_that_works(monkeypatch):
    assert cli.pick_device("cpu") == "cpu"
    for name in ("gpu", "cuda:77", "", "xpu"):
        with pytest.raises(InputError, match=f"--device {name} does not work here .*; try cpu") as caught:
            cli.pick_device(name)
        assert "\n" not in str(caught.value)
    for cuda, mps, default, mps_first in ((True, True, "cuda", "mps"), (True, False, "cuda", "cuda"),
                                          (False, True, "mps", "mps"), (False, False, "cpu", "cpu")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda cuda=cuda: cuda)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda mps=mps: mps)
        assert cli.pick_device() == default
        assert cli.pick_device(None, ("mps", "cuda", "cpu")) == mps_first
        assert cli.pick_device(None, ("cpu", "cuda")) == "cpu"


def test_a_single_process_is_rank_0_of_1_and_needs_no_others(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    ranks = cli.Ranks.join("cpu")
    assert ranks == cli.Ranks(0, 1, torch.device("cpu")) and not torch.distributed.is_initialized()
    assert ranks.sum([1, 2.5]) == [1, 2.5] and ranks.gather({"a": 1}) == [{"a": 1}]
    ranks.barrier()
    ranks.leave()
    with pytest.raises(InputError, match="--device nonsense"):
        cli.Ranks.join("nonsense")
    assert 0.05 < cli.used_memory(ranks.device) < 1000


def test_signals_are_remembered_and_an_interrupt_after_one_ends_at_once():
    before = {number: signal.getsignal(number) for number in cli.SIGNALS}
    assert {signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP} == set(before)
    try:
        for number in before:
            stop = cli.Stop()
            assert stop.signal is None
            signal.raise_signal(number)
            signal.raise_signal(signal.SIGTERM)
            assert stop.signal == number                       # the first counts
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# ---------------------------------------------------------------------------------------------------------------------
# A training run's folder, its log and the plot of it

def test_a_new_run_finds_no_other_in_its_folder_unless_it_resumes_or_replaces_it(tmp_path, monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    ranks, out = cli.Ranks.join("cpu"), tmp_path / "out"
    assert cli.checkpoints(out) == []
    with cli.claimed(out, ranks, resume=False):
        assert os.listdir(out) == [".lock"]
    for name in ("step-00000002", "step-00000010", "nonfinite-step-3", ".0a-step-00000011", "step-1"):
        (out / name).mkdir()
    assert cli.checkpoints(out) == [str(out / "step-00000010"), str(out / "step-00000002")]
    with pytest.raises(InputError, match="out: holds another run; go on with it by --resume, or choose another --out"):
        with cli.claimed(out, ranks, resume=False):
            pass
    with cli.claimed(out, ranks, resume=True, replace_old=True):
        assert len(cli.checkpoints(out)) == 2
    with cli.claimed(out, ranks, resume=False, replace_old=True):
        assert cli.checkpoints(out) == []
    assert ".lock" not in os.listdir(out)
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="file/log.jsonl: cannot be written"):
        with cli.claimed(tmp_path / "file", ranks, resume=False):
            pass


HOLD = """
import sys, time, torch, cli
with cli.claimed(sys.argv[1], cli.Ranks(0, 1, torch.device("cpu")), resume=True):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_second_run_in_a_folder_is_refused_until_the_first_has_ended_however_it_ends(tmp_path):
    ranks = cli.Ranks(0, 1, torch.device("cpu"))
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    for resume in (True, False):
        with pytest.raises(InputError, match="another run is writing there; wait for its end, or choose another --out"):
            with cli.claimed(tmp_path, ranks, resume=resume):
                pass
    process.kill()
    process.communicate()
    with cli.claimed(tmp_path, ranks, resume=True):
        assert os.listdir(tmp_path) == [".lock"]
    assert os.listdir(tmp_path) == []


LEAVE = """
import os, sys, cli
def die(*names):
    os._exit(9)
if sys.argv[2] == "file":
    with cli.atomic_file(sys.argv[1]) as temporary:
        open(temporary, "w").write("half")
        os._exit(9)
rename = os.rename
os.rename = lambda *names: rename(*names) if names[1] != os.path.realpath(sys.argv[1]) else die()
with cli.atomic_folder(sys.argv[1], ["config.json"]) as temporary:
    open(os.path.join(temporary, "config.json"), "w").write("new")
"""


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_what_a_killed_process_left_goes_at_the_next_start_and_a_moved_folder_returns(tmp_path, kind):
    path = tmp_path / "model"
    if kind == "folder":
        write_folder(path, "old")
    process = subprocess.run([sys.executable, "-c", LEAVE, str(path), kind], cwd=ROOT)
    assert process.returncode == 9 and any(name.startswith(".") for name in os.listdir(tmp_path))
    foreign = [tmp_path / ".0123456789abcdef-00000000-1-model", tmp_path / ".gitignore"]            # another machine's
    live = pathlib.Path(cli.temporary_name(path))
    for kept in (*foreign, live):
        kept.write_text("")
    if kind == "folder":
        cli.check_folder(path, OURS)
        assert (path / "config.json").read_text() == "old"
    else:
        cli.probe(path)
        assert not path.exists()
    assert {name for name in os.listdir(tmp_path) if name.startswith(".")} == {kept.name for kept in (*foreign, live)}


def test_output_that_nobody_reads_is_dropped_and_the_work_goes_on(tmp_path):
    script = ("import cli, sys\ndef main():\n for i in range(20000): print('a long line of output', i, '\\u2603')\n"
              " print('on the other', file=sys.stderr)\n open(sys.argv[1], 'w').write('done')\ncli.run(main)")
    started = {}
    for i, closed in enumerate(("| head -1", "2>&- | head -1", ">&-", ">&- 2>&-", "2> /dev/full > /dev/full")):
        shell = f"set -o pipefail; PYTHONIOENCODING=ascii {sys.executable} -c \"$SCRIPT\" {tmp_path / str(i)} {closed}"
        started[closed] = subprocess.Popen(["bash", "-c", shell], cwd=ROOT, env={**os.environ, "SCRIPT": script},
                                           text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    for i, (closed, process) in enumerate(started.items()):
        errors = process.communicate()[1]
        assert process.returncode == 0 and (tmp_path / str(i)).read_text() == "done", (closed, errors)
        assert "Traceback" not in errors and "Exception" not in errors, (closed, errors)


def test_an_error_stands_on_a_line_of_its_own_below_the_bar_and_is_never_long(tmp_path):
    script = ("import cli, time\ndef main():\n for _ in cli.bar(range(3)): time.sleep(0.01)\n"
              " for _ in cli.bar(range(3)): raise cli.InputError('first\\nsecond ' + 'x' * 9000 + ' fix it')\n"
              "cli.run(main)")
    finished = subprocess.run([sys.executable, "-c", script], cwd=ROOT, text=True, capture_output=True)
    last = finished.stderr.splitlines()[-1]
    assert finished.returncode == 2 and last.startswith("-c: error: first second xxx") and last.endswith("x fix it")
    assert len(last) < 520


def test_a_log_loses_what_was_written_behind_the_last_checkpoint(tmp_path):
    path = tmp_path / "log.jsonl"
    lines = [json.dumps({"step": step, "loss": 1 / step}) + "\n" for step in range(1, 6)]
    path.write_text("".join(lines) + '{"step": 6, "lo')                # killed in the middle of a line
    cli.trim_log(path, 5)
    assert path.read_text() == "".join(lines)
    cli.trim_log(path, 3)
    assert path.read_text() == "".join(lines[:3])
    cli.trim_log(path, 0)
    assert path.read_text() == ""
    cli.trim_log(tmp_path / "none.jsonl", 3)
    assert os.listdir(tmp_path) == ["log.jsonl"]


def plotted(tmp_path, records):
    """The inside of the plot's frame, frame included, as an array of its own pixels. -> (351, 701, 3)"""
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    cli.plot_log(tmp_path / "log.jsonl", tmp_path / "new" / "loss.png")
    image = Image.open(tmp_path / "new" / "loss.png")
    assert image.size == (800, 450)
    return np.asarray(image).astype(int)[50:401, 50:751]


def places(pixels, colour):
    """Rows and columns of a colour."""
    return np.argwhere((pixels == colour).all(axis=-1))


GREY, RED = (128, 128, 128), (255, 0, 0)


def test_a_plot_of_several_points_falls_from_the_upper_left_to_the_lower_right(tmp_path):
    records = [{"step": step, "loss": 10.0 - step} for step in range(1, 10)]
    records[3]["val"] = {"t2i": 9.0}
    records[8]["val"] = {"t2i": 9.0}
    pixels = plotted(tmp_path, records)
    train, val = places(pixels, GREY), places(pixels, RED)
    assert len(train) > 300 and train[train[:, 1].argmin()][0] < 5 and train[train[:, 1].argmax()][0] > 345
    assert val[:, 0].max() < 5 and val[:, 1].min() > 200 and val[:, 1].max() > 690         # level, from step 4 on


def test_a_plot_of_a_single_point_shows_it(tmp_path):
    pixels = plotted(tmp_path, [{"step": 1, "loss": 3.0}])
    assert len(places(pixels, GREY)) >= 1 and len(places(pixels, RED)) == 0
    pixels = plotted(tmp_path, [{"step": 1, "loss": 3.0, "val": {"t2i": 4.0}}])
    low, high = places(pixels, GREY), places(pixels, RED)
    assert low[:, 0].min() > 340 and high[:, 0].max() < 10


# ---------------------------------------------------------------------------------------------------------------------
# Images, sheets, names

def test_every_kind_of_image_opens_as_the_rgb_it_shows(tmp_path):
    def opened(image, name, **options):
        image.save(tmp_path / name, **options)
        result = cli.open_image(tmp_path / name)
        assert result.mode == "RGB"
        return np.asarray(result).astype(int)

    red = Image.new("RGB", (32, 16), (200, 30, 10))
    assert (opened(red.quantize(4), "palette.png") == (200, 30, 10)).all()
    assert (opened(Image.new("L", (32, 16), 77), "grey.png") == 77).all()
    assert (opened(Image.new("RGBA", (32, 16), (255, 0, 0, 0)), "clear.png") == 255).all()       # nothing, on white
    assert abs(opened(Image.new("RGBA", (32, 16), (255, 0, 0, 128)), "half.png") - (255, 127, 127)).max() <= 1
    deep = Image.fromarray(np.linspace(0, 65535, 512).reshape(16, 32).astype(np.uint16))
    grey = opened(deep, "deep.png")
    assert grey.min() == 0 and grey.max() == 255 and abs(grey[8, 0, 0] - 128) <= 1
    exif = Image.Exif()
    exif[0x0112] = 6                                     # to be turned clockwise
    assert opened(red, "turned.jpg", exif=exif).shape == (32, 16, 3)
    frames = [Image.new("RGB", (32, 16), colour) for colour in ("red", "lime")]
    assert (opened(frames[0], "moving.gif", save_all=True, append_images=frames[1:]) == (255, 0, 0)).all()


def test_every_damaged_image_is_refused_by_name(tmp_path):
    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    def png(width, height):                              # a header and no pixels
        return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
                + chunk(b"IDAT", b""))

    Image.effect_noise((64, 64), 50).save(tmp_path / "whole.jpg")
    whole = (tmp_path / "whole.jpg").read_bytes()
    Image.new("RGB", (1, 1)).save(tmp_path / "dot.png")
    Image.new("RGB", (20000, 10)).save(tmp_path / "line.png")
    for name, content in {"text.jpg": b"not a picture", "cut.jpg": whole[:len(whole) // 2], "empty.png": b"",
                          "bomb.png": png(60000, 60000)}.items():
        (tmp_path / name).write_bytes(content)
    for name, why in {"missing.jpg": "no such file", "text.jpg": "not a picture", "cut.jpg": "damaged", ".": "folder",
                      "empty.png": "not a picture", "dot.png": "too little", "line.png": "too little",
                      "bomb.png": "too many"}.items():
        with pytest.raises(InputError, match=why) as caught:
            cli.open_image(tmp_path / name)
        assert str(tmp_path / name) in str(caught.value)


def test_a_contact_sheet_is_nearly_square_or_has_the_columns_asked_for():
    images = [Image.new("RGB", (10, 6), (50 * i, 0, 0)) for i in range(5)]
    sheet = cli.contact_sheet(images)
    assert sheet.size == (3 * 10 + 2 * 4, 2 * 6 + 4)
    assert sheet.getpixel((0, 0)) == (0, 0, 0) and sheet.getpixel((14, 10)) == (200, 0, 0)
    assert sheet.getpixel((11, 3)) == sheet.getpixel((37, 15)) == (255, 255, 255)
    assert cli.contact_sheet(images, columns=5).size == (5 * 10 + 4 * 4, 6)
    assert cli.contact_sheet(images[:1]).size == (10, 6)


@pytest.mark.parametrize("path, subject", [
    ("photos/dog.jpg", "dog"), ("/a/red_boot-03.JPG", "red boot"), ("/a/red_boot/03.jpg", "red boot"),
    ("/a/Clay Vase/00.png", "clay vase"), ("/a/chat_noirà.png", "chat noirà"), ("lamp/03.jpg", "lamp"),
    ("/01/02.png", None), ("/2.png", None), ("03.jpg", None), ("./03.jpg", None), ("../03.jpg", None),
    ("10_dog/IMG_1.jpg", "dog"), ("a/20_sls frog/beach-01.jpg", "sls frog"), ("10_sks/IMG_1.jpg", None),
    ("10_0001/cat-1.jpg", "cat"), ("reg/1_dog/IMG_1.jpg", None), ("reg_girls/1_girl/girl-1.png", None),
    ("regina/1_dog/IMG_1.jpg", "dog"), ("dog/IMG_E0001.jpg", None), ("dog/COCO_train2014_000000000009.jpg", None)])
def test_names_of_files_and_folders_become_subjects_where_they_tell(path, subject):
    assert cli.subject_of(path) == subject


# ---------------------------------------------------------------------------------------------------------------------
# Reading JSON

@dataclass(frozen=True)
class Inner:
    rate: float
    names: tuple[str, ...] = ()


@dataclass(frozen=True)
class Outer:
    count: int
    word: str
    on: bool
    inner: Inner
    sizes: list[int]
    extra: dict
    limit: int | None = None
    text_or_list: str | list[str] = ""


GOOD = {"count": 3, "word": "a", "on": True, "inner": {"rate": 1, "names": ["x"]}, "sizes": [1, 2], "extra": {"k": [1]},
        "text_or_list": "t"}
OUTER_LIMITS = {"count": (0, 9), "word": {"a", "b"}, "sizes": (1, 5), "rate": (0, 1)}


def from_outer(values):
    return cli.from_json(Outer, values, "f.json", OUTER_LIMITS)


def test_a_dataclass_comes_back_from_its_json():
    made = from_outer(GOOD)
    assert made == Outer(3, "a", True, Inner(1.0, ("x",)), [1, 2], {"k": [1]}, None, "t")
    assert type(made.inner.rate) is float
    assert from_outer(json.loads(json.dumps(asdict(made)))) == made
    assert from_outer(GOOD | {"limit": None}).limit is None and from_outer(GOOD | {"limit": 4}).limit == 4
    assert from_outer(GOOD | {"text_or_list": ["t"]}).text_or_list == ["t"]
    values = {name: value for name, value in GOOD.items() if name != "sizes"}
    with pytest.raises(TypeError):             # optional, and yet without a default: the caller's mistake
        cli.from_json(Outer, values, "f.json", optional=("sizes",))


@pytest.mark.parametrize("field, values", {
    "count": [None, "3", 3.0, True, [], {}, -1, 10, 10**400], "word": [None, 3, "c", "", ["a"], "a" * 10**6],
    "on": [None, 0, 1, "true", []], "inner": [None, 3, [], "x", [{}]],
    "sizes": [None, 3, "12", {}, [0], [1, "2"], [[1]]],
    "extra": [None, 3, [], "x"], "limit": ["3", 1.5, True, [3]], "text_or_list": [None, 3, [3], {}, [["t"]]]}.items())
def test_every_wrong_value_is_one_sentence_with_file_and_field(field, values):
    for value in values:
        with pytest.raises(InputError) as error:
            from_outer(GOOD | {field: value})
        assert str(error.value).startswith(f"f.json: {field} is ") and len(str(error.value)) < 300


def test_fields_inside_are_named_with_what_they_are_in():
    for inner, said in (({"rate": "x", "names": []}, "inner.rate is 'x' but must be a number"),
                        ({"rate": 2, "names": []}, "inner.rate is 2 but must be a number from 0 to 1"),
                        ({"rate": 1, "names": [1]}, "inner.names is 1 but must be a text"),
                        ({"rate": 1}, "lacks inner.names"), ({"rate": 1, "names": [], "x": 1}, "holds inner.x")):
        with pytest.raises(InputError, match=f"f.json: {said}"):
            from_outer(GOOD | {"inner": inner})
    for values, said in (({"a": 1}, "holds a, "), ({}, "lacks count, word"), (None, "what it holds is None"),
                         ([GOOD], "what it holds is"), ("x", "what it holds is 'x'")):
        with pytest.raises(InputError, match=f"f.json: {said}"):
            from_outer(values)
    for infinite in (float("nan"), float("inf"), -float("inf"), 10**400):                 # from Python
        with pytest.raises(InputError, match="rate is"):
            cli.from_json(Inner, {"rate": infinite, "names": []}, "f.json")


@pytest.mark.parametrize("content, said", [
    (b"", "is empty"), (b"\0\0\0\0", "nothing but zeros"), (b"{", "is no JSON"), (b"nonsense", "is no JSON"),
    (b'{"a": NaN}', "no finite number"), (b"[Infinity]", "no finite number"), (b"[1e999]", "no finite number"),
    (b"[" * 100_000, "nested too deeply"), (b'{"a":' * 100_000, "nested too deeply"), (b"\xff\x00", "not UTF-8"),
    ('{"a": 1}'.encode("utf-16"), "UTF-16"), ("[1]".encode("utf-16-be"), "is no JSON"), (b"9" * 10_000, "is no JSON"),
    (b"version https://git-lfs.github.com/spec/v1\n", "a git-LFS pointer"), (b"<html>", "a web page"),
    (b"\x1f\x8b\x08\x00", "gzipped"), (b"PK\x03\x04", "a zip archive"), (b"PAR1", "a Parquet table"),
    (b"\x89PNG\r\n", "a picture"), (b"%PDF-1.4", "a PDF"), (b"\x80\x04.", "a pickle"),
    (b'{"a": "b\nc"}', "is no JSON"), (b"'a'", "is no JSON"), (b"{}{}", "is no JSON")], ids=range(24))
def test_what_is_no_json_is_one_sentence_that_names_the_file(tmp_path, content, said):
    path = tmp_path / "x.json"
    path.write_bytes(content)
    with pytest.raises(InputError, match=said) as error:
        cli.read_json(path, "settings")
    assert str(error.value).startswith(str(path)) and len(str(error.value)) < 300


def test_only_regular_files_of_a_sensible_size_are_read(tmp_path):
    (tmp_path / "good.json").write_bytes(b"\xef\xbb\xbf" + '{"é": [1, 2.5]}'.encode())
    assert cli.read_json(tmp_path / "good.json", "settings") == {"é": [1, 2.5]}
    with pytest.raises(InputError, match="good.json: has 19 bytes, too many for settings .at most 18"):
        cli.read_json(tmp_path / "good.json", "settings", most=18)
    os.mkfifo(tmp_path / "pipe")
    os.symlink("gone", tmp_path / "link")
    for path, said in ((tmp_path / "pipe", "is a pipe or a device"), ("/dev/zero", "is a pipe or a device"),
                       (tmp_path, "is a folder"), (tmp_path / "link", "a link to a file that is gone"),
                       (tmp_path / "none", "no such file"), (tmp_path / "good.json" / "x", "cannot be read"),
                       ("a\0b", "cannot be read"), ("x" * 5000, "cannot be read")):
        with pytest.raises(InputError, match=said):
            cli.read_json(path, "settings")
