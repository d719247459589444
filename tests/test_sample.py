import json
import os
import pathlib
import shutil
import subprocess
import sys

import numpy
import pytest
from PIL import Image

import cli
import model
import sample

ROOT = pathlib.Path(__file__).parent.parent
DOG = str(ROOT / "assets" / "dog.jpg")
RANDOM = ["--weights", "random"]


def draw(*args):
    sample.main([*RANDOM, *map(str, args)])


def pixels(path):
    return Image.open(path).convert("RGB").tobytes()


def test_the_command_of_the_readme_writes_pictures_and_a_sheet_and_says_what_it_did(tmp_path):
    result = subprocess.run([sys.executable, "sample.py", *RANDOM, "--ref", DOG, "--prompt", "a dog in the snow",
                             "--n", "2", "--out", tmp_path / "new" / "folder"], cwd=ROOT, capture_output=True,
                            text=True)
    assert result.returncode == 0, result.stderr
    for said in ("'The dog in <image>.\\na dog in the snow'", "device: ", "s a picture", "random"):
        assert said in result.stdout
    assert "token" in result.stderr                            # the progress bar
    names = sorted(os.listdir(tmp_path / "new" / "folder"))
    assert names == ["a-dog-in-the-snow-0.png", "a-dog-in-the-snow-1.png", "a-dog-in-the-snow.png"]
    assert Image.open(tmp_path / "new" / "folder" / names[0]).size == (256, 256)
    assert Image.open(tmp_path / "new" / "folder" / names[2]).size == (516, 256)


def test_without_arguments_the_bundled_model_draws_an_example_and_says_what_else_to_try(tmp_path):
    result = subprocess.run([sys.executable, ROOT / "sample.py"], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "'The dog face in <image>.\\na dog face on a meadow'" in result.stdout
    assert result.stdout.count("knows nothing but emoji") == 1 and "--weights mentor" in result.stdout
    picture = Image.open(tmp_path / "out" / "a-dog-face-on-a-meadow.png")
    assert picture.size == (256, 256)                          # 64 pixels, enlarged to look at
    assert numpy.asarray(picture.convert("RGB")).std() > 20
    commands = [line.split() for line in result.stdout.splitlines() if line.startswith("  python sample.py")]
    assert len(commands) >= 3
    for words in commands:                                     # what it proposes exists
        assert all((ROOT / word).exists() for word in words if word.startswith("assets/"))


def test_a_photograph_as_reference_works_with_the_bundled_model_too(tmp_path, capsys):
    sample.main(["--ref", DOG, "--prompt", "a dog in the snow", "--out", str(tmp_path / "x.png")])
    assert capsys.readouterr().out.count("knows nothing but emoji") == 1
    assert json.loads(Image.open(tmp_path / "x.png").info["mentor"])["weights"] == "tiny"


def test_a_png_carries_the_settings_that_make_it_again(tmp_path):
    given = ["--ref", DOG, "--prompt", "x", "--top-p", 0.9, "--cfg", 2, "--size", 128]
    draw(*given, "--n", 2, "--seed", 4, "--out", tmp_path / "a.png")
    draw(*given, "--seed", 5, "--out", tmp_path / "b.png")
    assert pixels(tmp_path / "b.png") == pixels(tmp_path / "a-5.png") != pixels(tmp_path / "a-4.png")
    settings = {name: json.loads(Image.open(tmp_path / name).info["mentor"]) for name in ("a.png", "a-5.png", "b.png")}
    assert settings["a-5.png"] == settings["b.png"] == {
        "prompt": "The dog in <image>.\nx", "refs": [DOG], "seed": 5, "n": 1, "size": 128, "weights": "random",
        "prefix_rope": "identity", "dtype": "fp32", "cfg_scale": 2.0, "temperature": 1.0, "top_k": 1000, "top_p": 0.9}
    assert settings["a.png"] == settings["b.png"] | {"seed": 4, "n": 2}


@pytest.mark.parametrize("args, prompt", [
    (["--prompt", "a castle"], "a castle"),
    (["--ref", DOG, "--prompt", "p"], "The dog in <image>.\np"),
    (["--ref", DOG, "--ref", DOG, "--subject", "big dog", "--subject", "small dog", "--prompt", "p"],
     "The big dog in <image>.\nThe small dog in <image>.\np"),
    (["--ref", DOG, "--prompt", "Look: <image>, on Mars"], "Look: <image>, on Mars"),
    (["--ref", DOG, "--task", "segment"], "The dog in <image>."),
    (["--ref", DOG, "--task", "reconstruct"], "<image>\n"),
    (["--ref", DOG, "--task", "reconstruct", "--prompt", "a dog"], "The image is <image>\na dog")])
def test_the_prompt_follows_the_template_of_its_task(tmp_path, args, prompt):
    draw(*args, "--size", 64, "--out", tmp_path / "x.png")
    settings = json.loads(Image.open(tmp_path / "x.png").info["mentor"])
    assert settings["prompt"] == prompt


@pytest.mark.parametrize("args, said", [
    (["--prompt", " "], "there is nothing to draw; add --prompt"),
    (["--prompt", "x", "--ref", "nowhere.jpg"], "nowhere.jpg: no such file"),
    (["--prompt", "x", "--ref", __file__], "test_sample.py: not a picture"),
    (["--prompt", "<image> and <image>", "--ref", DOG], "2 <image> but 1 reference"),
    (["--prompt", "<image>"], "1 <image> but 0 reference"),
    (["--prompt", "x", *["--ref", DOG] * 9], "576"),           # 9 pictures x 64 patches; the prefix has 512 tokens
    (["--prompt", "word " * 200], "but the prefix has 512; use a shorter prompt"),
    (["--prompt", "x", "--subject", "dog"], "--subject names a reference picture"),
    (["--prompt", "x", "--ref", DOG, "--subject", "a", "--subject", "b"], "2 --subject were given for 1 --ref"),
    (["--task", "segment"], "takes one --ref but 0 were given"),
    (["--prompt", "x", "--top-k", "0"], "top-k is 0"),
    (["--prompt", "x", "--top-k", "1025"], "top-k is 1025"),
    (["--prompt", "x", "--top-p", "0"], "top-p is 0"),
    (["--prompt", "x", "--top-p", "1.1"], "top-p is 1.1"),
    (["--prompt", "x", "--temperature", "-1"], "temperature is -1"),
    (["--prompt", "x", "--cfg", "nan"], "guidance scale is nan"),
    (["--prompt", "x", "--n", "0"], "argument --n: must be a whole number from 1 to 1000, not 0"),
    (["--prompt", "x", "--n", str(2**53)], "argument --n: must be a whole number from 1 to 1000"),
    (["--prompt", "x", "--size", "-16"], "argument --size: must be a whole number above 0, not -16"),
    (["--prompt", "x", "--ref", DOG, "--task", "segment"], "--prompt would have no effect here"),
    (["--ref", DOG, "--subject", "cat", "--task", "reconstruct"], "--subject would have no effect here"),
    (["--ref", DOG, "--subject", "cat", "--prompt", "a <image>"], "--subject would have no effect here"),
    (["--prompt", "x", "--seed", "-1"], "argument --seed: must be a whole number, 0 or above, not -1"),
    (["--prompt", "x", "--no-such-flag"], "unrecognized arguments: --no-such-flag"),
    (["--prompt", "x", "--size", "512"], "up to 256 pixels"),
    (["--prompt", "x", "--size", "100"], "steps of 16, not 100"),
    (["--prompt", "x", "--device", "teapot"], "--device teapot does not work here"),
    (["--prompt", "x", "--weights", "no such thing"], "no such folder of weights"),
    (["--prompt", "x", "--weights", "random-XXXL"], "no such size")])
def test_bad_input_is_one_clear_sentence_and_leaves_no_file(tmp_path, capsys, monkeypatch, args, said):
    weights = [] if "--weights" in args else RANDOM
    monkeypatch.setattr(sys, "argv", ["sample.py", *weights, *args, "--out", str(tmp_path / "out")])
    with pytest.raises(SystemExit) as end:
        cli.run(sample.main)
    printed = capsys.readouterr()
    assert end.value.code == 2 and said in printed.err and "Traceback" not in printed.err
    assert printed.err.strip().splitlines()[-1].startswith("sample.py: error: ")
    assert not [name for _, _, names in os.walk(tmp_path) for name in names]


def test_an_output_that_cannot_be_written_is_found_before_the_model_is_read(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setattr(sample.weights, "load", lambda *a, **k: pytest.fail("read the model first"))
    with pytest.raises(cli.InputError, match="cannot be written"):
        draw("--prompt", "x", "--out", tmp_path / "file" / "x.png")


@pytest.mark.parametrize("name", ["x.jpg", "x.JPEG", "folder/x.webp", "x.png.tiff", "x.gif"])
def test_other_formats_are_refused(tmp_path, name):
    with pytest.raises(cli.InputError, match="pictures are written as PNG"):
        draw("--prompt", "x", "--out", tmp_path / name)
    assert not os.listdir(tmp_path)


def test_in_a_folder_nothing_is_ever_replaced_and_names_keep_the_letters_of_all_scripts(tmp_path):
    def names(prompt, seeds=(0,)):
        found, path = sample.out_names(str(tmp_path), prompt, seeds)
        for name in {*found, path}:
            assert not os.path.exists(name)
            pathlib.Path(name).touch()
        return [os.path.relpath(name, tmp_path) for name in (*found, path)]

    assert names("The dog in <image>.\na Dog, in the snow!") == ["a-dog-in-the-snow.png"] * 2
    assert names("a dog in the snow", (7,)) == ["a-dog-in-the-snow_2.png"] * 2
    assert names("a dog in the snow", (7, 8)) == [
        "a-dog-in-the-snow_3-7.png", "a-dog-in-the-snow_3-8.png", "a-dog-in-the-snow_3.png"]
    for prompt, name in (("собака в снегу", "собака-в-снегу"), ("雪の中の犬", "雪の中の犬"),
                         ("बर्फ में कुत्ता", "बर्फ-में-कुत्ता"),
                         ("Cafe\u0301 Straße", "café-strasse"), ("../../etc/passwd", "etc-passwd"), ("\0", "picture"),
                         (".hidden", "hidden"), ("😀", "picture_2"), ("<image>", "picture_3"), ("-rf", "rf")):
        assert names(prompt)[0] == f"{name}.png"
    for prompt in ("word " * 100, "雪" * 300, "ё" * 300):
        assert len(names(prompt)[0].encode()) < 140            # a file system takes 255, a temporary name is longer
    mine = str(tmp_path / "mine.png")
    pathlib.Path(mine).touch()
    assert sample.out_names(mine, "x", (1,)) == ([mine], mine)


def test_the_same_command_twice_keeps_both_pictures_and_a_name_given_is_taken(tmp_path, capsys):
    for seed in (0, 1, 1):
        draw("--prompt", "雪", "--size", 64, "--seed", seed, "--out", tmp_path / "folder")
        draw("--prompt", "x", "--size", 64, "--seed", seed, "--out", tmp_path / "mine.png")
    assert sorted(os.listdir(tmp_path / "folder")) == ["雪.png", "雪_2.png", "雪_3.png"]
    assert json.loads(Image.open(tmp_path / "mine.png").info["mentor"])["seed"] == 1
    said = capsys.readouterr().out
    assert f"wrote {tmp_path}/folder/雪_3.png" in said and said.count("size: below the weights' own 256 pixels") == 6


@pytest.mark.parametrize("environment", [
    {"LC_ALL": "C"}, {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}, {"PYTHONIOENCODING": "ascii"},
    {"PYTHONIOENCODING": "cp1252"}], ids=lambda environment: ",".join(environment.values()))
def test_no_encoding_loses_a_picture(tmp_path, environment):
    """A reference, a folder and a prompt whose bytes are no text of the terminal."""
    folder = os.fsencode(tmp_path) + b"/f\xff\xc3\xa9"
    os.mkdir(folder)
    shutil.copy(DOG, folder + b"/d\xffog.jpg")
    command = [sys.executable, "sample.py", *RANDOM, "--size", "64", "--ref", folder + b"/d\xffog.jpg", "--prompt",
               "hütte 雪".encode() + b" \xff", "--out", folder]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, env={**os.environ, **environment})
    assert result.returncode == 0, result.stderr.decode(errors="replace")
    picture, = (name for name in os.listdir(folder) if name.endswith(b".png"))
    settings = json.loads(Image.open(folder + b"/" + picture).info["mentor"])
    assert settings["prompt"].endswith("hütte 雪 �")
    assert os.fsencode(settings["refs"][0]) == folder + b"/d\xffog.jpg"


def test_too_little_memory_is_one_sentence_that_says_what_helps(tmp_path, monkeypatch):
    def sampling(self, *args, **options):
        raise RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: you tried ...")

    monkeypatch.setattr(model.Mentor, "sample", sampling)
    with pytest.raises(cli.InputError, match="out of memory .*try --offload, --dtype bf16, or a smaller --n or --size"):
        draw("--prompt", "x", "--out", tmp_path)


@pytest.mark.full
def test_a_full_size_picture_stays_under_16_gib():
    code = ("import resource, sample; sample.main(['--weights', 'random-XL', '--size', '64', '--prompt', 'a cat', "
            "'--ref', 'assets/dog.jpg', '--out', 'out/test/xl.png']); "
            "print('peak', resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)")
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert int(result.stdout.split("peak ")[1]) < 16 * 2**20   # KiB
