import json
import os
import pathlib
import shlex
import shutil
import subprocess
import sys

import numpy
import pytest
import torch
from conftest import finish, run
from PIL import Image

import cli
import model
import sample
from cli import InputError

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


@pytest.mark.full
def test_every_example_that_needs_no_download_runs_as_printed(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    lines = [line.strip() for line in (sample.__doc__ + sample.MORE_EXAMPLES).splitlines()]
    commands = [shlex.split(line, comments=True)[2:] for line in lines if line.startswith("python sample.py")]
    commands = [args for args in commands if "mentor" not in args]
    assert len(commands) >= 8 and any(args.count("--ref") == 2 for args in commands)
    for i, args in enumerate(commands):
        sample.main([*args, "--out", str(tmp_path / str(i) / "")])
        assert list((tmp_path / str(i)).glob("*.png")), args


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
        found, path = cli.picture_names(str(tmp_path), prompt, seeds)
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
    assert cli.picture_names(mine, "x", (1,)) == ([mine], mine)


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


# ---------------------------------------------------------------------------------------------------------------------
# A list of prompts

def write_list(path, lines):
    """A list of prompts: text as it stands, all else as JSON."""
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


@pytest.fixture
def mixed(tmp_path):
    """A list whose lines have none, one and two references."""
    shutil.copy(DOG, tmp_path / "my_dog.jpg")
    return write_list(tmp_path / "mixed.jsonl", [
        {"prompt": "a castle", "seed": 3}, {"prompt": "p", "refs": "my_dog.jpg", "n": 2, "tag": "theirs"}, "",
        {"prompt": "two", "refs": [DOG, "my_dog.jpg"], "subjects": ["big dog", "cat"], "seed": 8},
        {"prompt": "<image>, on Mars", "refs": ["my_dog.jpg"], "subjects": None}])


def test_a_lists_pictures_are_those_of_single_commands_whatever_the_batch(mixed, tmp_path):
    mine, given = str(tmp_path / "my_dog.jpg"), ["--size", 64, "--cfg", 2]
    singles = {
        "00000-a-castle.png": ["--prompt", "a castle", "--seed", 3],
        "00001-p-5.png": ["--prompt", "p", "--ref", mine, "--seed", 5],
        "00001-p-6.png": ["--prompt", "p", "--ref", mine, "--seed", 6],
        "00002-two.png": ["--prompt", "two", "--ref", DOG, "--ref", mine, "--subject", "big dog", "--subject", "cat",
                          "--seed", 8],
        "00003-on-mars.png": ["--prompt", "<image>, on Mars", "--ref", mine, "--seed", 5]}
    for batch in ("2", "8"):
        draw("--prompts", mixed, *given, "--seed", 5, "--batch", batch, "--out", tmp_path / batch)
        assert sorted(os.listdir(tmp_path / batch)) == sorted(singles)
    for name, flags in singles.items():
        draw(*given, *flags, "--out", tmp_path / "single.png")
        one = Image.open(tmp_path / "single.png")
        for batch in ("2", "8"):
            of_list = Image.open(tmp_path / batch / name)
            assert of_list.tobytes() == one.tobytes() and of_list.info == one.info, (name, batch)


def test_a_list_goes_on_where_it_stopped_and_keeps_what_is_there(mixed, tmp_path, capsys):
    def written():
        return {path.name: path.stat().st_mtime_ns for path in out.iterdir()}

    out = tmp_path / "out"
    given = ["--prompts", mixed, "--size", 64, "--out", out]
    draw(*given)
    before = written()
    os.remove(out / "00001-p-1.png")
    write_list(mixed, [*mixed.read_text().splitlines(), {"prompt": "one more"}])
    draw(*given)
    after = written()
    assert "wrote 2 picture(s)" in capsys.readouterr().out
    assert {name for name in after if after[name] != before.get(name)} == {"00001-p-1.png", "00004-one-more.png"}


@pytest.mark.parametrize("change", ["settings", "prompt", "order", "foreign", "damaged"])
def test_where_another_picture_lies_a_list_draws_nothing(mixed, tmp_path, monkeypatch, change):
    out, flags = tmp_path / "out", []
    draw("--prompts", mixed, "--size", 64, "--out", out)
    lines = mixed.read_text().splitlines()
    if change == "settings":
        flags = ["--top-k", 9]
    elif change == "prompt":
        write_list(mixed, [lines[0].replace("castle", "house"), *lines[1:]])
    elif change == "order":
        write_list(mixed, [*lines[1:], lines[0]])
    elif change == "foreign":
        Image.new("RGB", (64, 64)).save(out / "grid.png")
    else:
        (out / "00000-a-castle.png").write_bytes((out / "00000-a-castle.png").read_bytes()[:-2000])
    os.remove(out / "00003-on-mars.png")
    monkeypatch.setattr(sample, "draw", lambda *args: pytest.fail("drew"))
    with pytest.raises(cli.InputError, match="grid.png: is of other settings or of another list"
                       if change == "foreign" else "00000-a-castle.png: (is of other settings or|.*damaged)"):
        draw("--prompts", mixed, "--size", 64, "--out", out, *flags)


@pytest.mark.parametrize("content, prompts", [
    (b"a castle\n\n  \t\na dog, in the snow; [red]\n", ["a castle", "a dog, in the snow; [red]"]),
    (b"\xef\xbb\xbf\xe9\x9b\xaa\r\nb\r\n", ["雪", "b"]), (b"one without an end of line", ["one without an end of line"]),
    (b'\n {"prompt": "x"}\n\n{"prompt": "y\\nz"}', ["x", "y\nz"])])
def test_every_line_of_a_list_that_is_not_blank_is_a_prompt(tmp_path, content, prompts):
    (tmp_path / "list.txt").write_bytes(content)
    assert [request.prompt for request in cli.read_prompts(str(tmp_path / "list.txt"))] == prompts


@pytest.mark.parametrize("line, said", [
    ('{"seed": 1}', "list:2: has no prompt"), ('{"prompt": " "}', "list:2: has no prompt"),
    ('{"prompt": 5}', "list:2: prompt is 5 but must be a text"), ('{"prompt": "a"', "list:2: is no JSON"),
    ("a castle", "list:2: is neither a prompt nor an object of JSON"),
    ('["a"]', "list:2: is neither a prompt nor an object of JSON"),
    ('{"prompt": "a", "refs": "gone.jpg"}', "list:2: .*gone.jpg: no such file"),
    ('{"prompt": "a", "refs": ["list"]}', "list:2: .*list: not a picture"),
    ('{"prompt": "a", "refs": [5]}', "list:2: refs is 5"), ('{"prompt": "a", "refs": {}}', "list:2: refs is {}"),
    ('{"prompt": "a", "ref": "x.jpg"}', 'list:2: "ref" is not known; write "refs"'),
    ('{"Prompt": "a"}', 'list:2: "Prompt" is not known; write "prompt"'),
    ('{"prompt": "a <image>"}', "list:2: the prompt has 1 <image> but 0 reference"),
    ('{"prompt": "a", "subjects": ["dog"]}', r"list:2: has 1 subject\(s\) for 0 ref"),
    ('{"prompt": "a", "seed": -1}', "list:2: seed is -1"), ('{"prompt": "a", "seed": "7"}', "list:2: seed is '7'"),
    ('{"prompt": "a", "n": 0}', "list:2: n is 0"), ('{"prompt": "a", "n": true}', "list:2: n is True"),
    ('{"prompt": "a\\ud83d"}', "list:2: holds half of a letter"), (b'{"prompt": "\xff"}', "list:2: is not UTF-8")])
def test_a_bad_line_of_a_list_is_named_before_the_model_is_read(tmp_path, monkeypatch, line, said):
    line = line if isinstance(line, bytes) else line.encode()
    (tmp_path / "list").write_bytes(b'{"prompt": "good"}\n' + line + b'\n{"prompt": "good"}\n')
    monkeypatch.setattr(sample.weights, "load", lambda *a, **k: pytest.fail("read the model first"))
    with pytest.raises(cli.InputError, match=said):
        draw("--prompts", tmp_path / "list", "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name, content, said", [
    ("a.txt", b"", "holds no prompt"), ("a.txt", b"\n \n", "holds no prompt"), ("gone.txt", None, "no such file"),
    ("a.json", b'[{"prompt": "a"}]', "is a JSON array"), ("a.json", b'[\n  "a",\n  "b"\n]', "is a JSON array"),
    ("a.csv", b"prompt,seed\na,1\n", "is a table"), ("a.txt", b"a\tb\n", "a.txt:1: is neither a prompt"),
    ("a.txt", b"\xff\xfea\0", "UTF-16"), ("a.txt", b"\x89PNG\r\n", "is a picture"), ("a.txt", b"\x1f\x8b", "gzipped")])
def test_what_is_no_list_is_told_so(tmp_path, name, content, said):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(cli.InputError, match=said):
        draw("--prompts", tmp_path / name, "--out", tmp_path / "out")


def test_a_prompt_too_long_for_the_weights_is_named_before_anything_is_drawn(tmp_path):
    path = write_list(tmp_path / "list.txt", ["short", "word " * 200])
    with pytest.raises(cli.InputError, match="list.txt:2: the prompt needs .* the prefix has 512"):
        draw("--prompts", path, "--size", 64, "--batch", 1, "--out", tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize("args, said", [
    (["--prompt", "x"], "--prompt does not go with --prompts"), (["--ref", DOG], "--ref does not go with"),
    (["--subject", "a"], "--subject does not go with"), (["--task", "segment"], "--task does not go with"),
    (["--offload"], "--offload does not go with"), (["--out", "x.png"], "x.png: the pictures of a list need a folder")])
def test_flags_of_a_single_picture_are_refused_beside_a_list(tmp_path, args, said):
    with pytest.raises(cli.InputError, match=said):
        draw("--prompts", write_list(tmp_path / "list.txt", ["x"]), *args)
    for flag in (["--batch", "2"], ["--layout", "geneval"]):
        with pytest.raises(cli.InputError, match=f"{flag[0]} does not go without --prompts"):
            draw("--prompt", "x", *flag)


def test_genevals_layout_is_what_its_evaluator_reads(tmp_path, capsys):
    lines = ['{"tag": "single_object", "include": [{"class": "bench", "count": 1}], "prompt": "a photo of a bench"}',
             '{"tag": "counting",  "include": [], "exclude": [], "prompt": "two \\u732b", "n": 2}']
    given = ["--prompts", write_list(tmp_path / "metadata.jsonl", lines), "--size", 64, "--layout", "geneval", "--out",
             tmp_path / "out"]
    draw(*given)
    found = {str(path.relative_to(tmp_path / "out")): path for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert sorted(found) == [
        "00000/metadata.jsonl", *(f"00000/samples/000{k}.png" for k in range(4)),
        "00001/metadata.jsonl", *(f"00001/samples/000{k}.png" for k in range(2))]
    assert [found[f"0000{i}/metadata.jsonl"].read_text() for i in range(2)] == [line + "\n" for line in lines]
    seeds = [json.loads(Image.open(found[f"00000/samples/000{k}.png"]).info["mentor"])["seed"] for k in range(4)]
    assert seeds == [0, 1, 2, 3]
    os.remove(found["00001/samples/0001.png"])
    draw(*given)
    assert "wrote 1 picture(s)" in capsys.readouterr().out and found["00001/samples/0001.png"].exists()
    with pytest.raises(cli.InputError, match="00000/samples/000[123].png: is of other settings or of another list"):
        draw(*given, "--n", 1)


@pytest.mark.full
def test_processes_share_a_list_and_draw_what_one_does(mixed, tmp_path):
    torch.set_num_threads(1)                                   # as each of them has; sums may differ otherwise
    draw("--prompts", mixed, "--size", 64, "--out", tmp_path / "one")
    arguments = [*RANDOM, "--prompts", str(mixed), "--size", "64", "--batch", "2", "--out", str(tmp_path / "two")]
    said = finish(run([*arguments, "--device", "cpu"], processes=2, module="sample"))
    assert said.count("wrote 5 picture(s)") == 1 and said.count("prompt: ") == 1
    names = sorted(os.listdir(tmp_path / "one"))
    assert names == sorted(os.listdir(tmp_path / "two"))
    assert all(pixels(tmp_path / "one" / name) == pixels(tmp_path / "two" / name) for name in names)
    write_list(mixed, ['{"prompt": 5}'])
    said = finish(run([*arguments, "--device", "cpu"], processes=2, module="sample"), code=1)
    assert said.count("mixed.jsonl:1: prompt is 5") == 1


def test_a_picture_can_be_watched_while_it_grows_and_ends_as_ever(tmp_path, monkeypatch):
    written, save = [], cli.save_picture

    def spy(image, path, settings):
        written.append((numpy.asarray(image), path, settings))
        save(image, path, settings)

    monkeypatch.setattr(cli, "save_picture", spy)
    monkeypatch.setattr(sample.time, "perf_counter", lambda: 0.0)          # as if decoding took no time: every row
    for name, flags in {"plain": [], "watched": ["--watch"]}.items():
        sample.main(["--prompt", "a volcano", "--n", "2", "--out", str(tmp_path / name), *flags])
    plain, growing, final = written[:3], written[3:-3], written[-3:]
    assert len(growing) == 2 * 15                              # at the end of each row but the last
    for image, path, settings in growing:
        assert settings["unfinished"] and path in [path for _, path, _ in final]
    first, last = growing[0][0], growing[-2][0]
    assert first.shape == last.shape == final[0][0].shape      # enlarged alike
    assert (first[24:] == first[-1, 0]).all() and (last[-8:] == first[-1, 0]).all() and last[:-24].std() > 10
    for (image, path, settings), (other, _, others) in zip(plain, final):
        assert numpy.array_equal(image, other) and settings == others and "unfinished" not in settings
    with pytest.raises(InputError, match="--watch does not go with --prompts"):
        sample.main(["--prompts", str(tmp_path / "list.txt"), "--watch"])
