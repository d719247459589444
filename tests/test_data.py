"""Images, prompts and training data. Rows are made of small painted images, so that only the golden pixels and the T5
prompts need material from outside the repository."""
import json
import pathlib

import numpy as np
import pytest
import torch
from conftest import Golden, close, material
from PIL import Image

import data
import weights
from data import InputError, Processor, TaskData, batches, open_image

SIZE, CLIP = 24, 28          # pixels a side of targets and references in these tests
BOXES = {"wide": (0, 100, 640, 500), "tall": (200, 0, 500, 640), "tiny": (300, 300, 420, 380)}


# ---------------------------------------------------------------------------------------------------------------------
# Images

@pytest.mark.parametrize("kind, size, step", [("clip", 224, 3), ("target256", 256, 4), ("target512", 512, 8)])
def test_pixels_agree_with_the_golden_outputs(kind, size, step):
    g, photos = Golden("pixels"), material("MENTOR_PHOTOS", "photos")
    names = [name.removesuffix(f".{kind}") for name in g.tensors if name.endswith(f".{kind}")]
    assert names
    for name in names:
        subject, number, *part = name.split("-")
        image = open_image(photos / subject / f"{number}.jpg")
        image = image.crop(BOXES[part[0]]) if part else image
        pixels = (data.clip_pixels if kind == "clip" else data.target_pixels)(image, size)
        assert pixels.shape == (3, size, size)
        close(pixels[:, ::step, ::step], g[f"{name}.{kind}"], 1e-5)


# ---------------------------------------------------------------------------------------------------------------------
# Prompts

def test_prompts_have_the_published_t5_layout():
    tokenizer = weights.load_tokenizer(material("MENTOR_TOKENIZERS", "tokenizers") / "t5" / "tokenizer.json")
    processor = Processor(tokenizer, patches=256, max_tokens=512)
    assert processor.image_id == 32100
    image = Image.new("RGB", (300, 200), "red")
    prompt = data.prompt_for("subject", ["dog"], "A dog in the snow.")
    sample = processor(prompt, [image])
    ids, mask = sample["ids"], sample["mask"]
    valid = ids[mask].tolist()
    assert ids.shape == mask.shape == (512,) and not ids[~mask].any() and mask[:len(valid)].all()
    assert valid[3:259] == [32100] * 256 and valid.count(32100) == 256 and valid[-1] == 1 and valid.count(1) == 1
    assert [tokenizer.id_to_token(i) for i in valid[:3]] == ["▁The", "▁dog", "▁in"]
    assert tokenizer.decode(valid[259:]) == ". A dog in the snow."
    assert sample["prompt"] == prompt and torch.equal(sample["refs"], data.clip_pixels(image, 224)[None])
    with pytest.raises(InputError, match="needs 5.. tokens .*prefix has 512"):
        processor(data.prompt_for("subject", ["dog", "cat"], "Both."), [image, image])
    with pytest.raises(InputError, match="1 <image> but 2 reference"):
        processor("only <image>", [image, image])


def test_a_batch_stacks_its_samples_and_is_as_long_as_its_longest_prompt():
    processor = Processor(weights.byte_tokenizer(), patches=4, max_tokens=64, image_size=CLIP)
    red, blue = (Image.new("RGB", (40, 40), colour) for colour in ("red", "blue"))
    samples = [processor("<image> and <image>", [red, blue]), processor("none"), processor("<image>", [blue])]
    batch = data.collate(samples)
    longest = 4 + len(" and ") + 4 + 1                   # and the end of the text
    assert batch["ids"].shape == batch["mask"].shape == (3, longest) and batch["refs"].shape == (3, 3, CLIP, CLIP)
    assert torch.equal(batch["refs"][1], batch["refs"][2]) and torch.equal(batch["refs"][0], samples[0]["refs"][0])
    assert batch["prompt"] == ["<image> and <image>", "none", "<image>"]
    for i, sample in enumerate(samples):
        assert torch.equal(batch["ids"][i], sample["ids"][:longest]) and batch["mask"][i].sum() == sample["mask"].sum()


# ---------------------------------------------------------------------------------------------------------------------
# Training data

class Maker:
    """Paints images and masks into a folder and writes JSONL files there."""

    def __init__(self, path):
        self.path = path

    def image(self, name, seed=0, size=(40, 32)):
        colours = np.random.default_rng(seed).integers(40, 255, (4, 5, 3), dtype=np.uint8)
        Image.fromarray(colours).resize(size, Image.NEAREST).save(self.path / name)
        return name

    def mask(self, name, box=(10, 5, 26, 25), size=(40, 32), value=1):
        mask = Image.new("L", size, 0)
        mask.paste(value, box)
        mask.save(self.path / name)
        return name

    def rows(self, *rows, name="train.jsonl"):
        (self.path / name).write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n"
                                              for row in rows))
        return str(self.path / name)

    def every_task(self, repeat=1):
        """One row of each task, and a second multi row with ready images."""
        images = [self.image(f"{i}.png", i) for i in range(4)]
        masks = [self.mask("mask0.png"), self.mask("mask1.png", (0, 0, 30, 9))]
        base = {"source_image": images[0], "input_text": "a scene"}
        return self.rows(*[
            base | {"generation_only": True, "image_path": images[0]},
            base | {"source_image": images[1], "objects": None},
            base | {"image_path": masks[0], "objects": "cat", "do_mask": True},
            base | {"image_path": masks[0], "objects": "cat", "do_replace": True},
            base | {"image_path": images[1], "objects": "cat"},
            base | {"image_path": masks, "objects": ["cat", "sky"]},
            base | {"image_path": images[2:], "objects": ["cat", "sky"], "input_img_list": True},
        ] * repeat)


@pytest.fixture
def make(tmp_path):
    return Maker(tmp_path)


def load(paths, mixture=None, max_tokens=128, **options):
    processor = Processor(weights.byte_tokenizer(), patches=4, max_tokens=max_tokens, image_size=CLIP)
    return TaskData([paths] if isinstance(paths, str) else paths, processor, SIZE, mixture, **options)


def entries(dataset, task):
    """Each entry of a task as a sample, in the order of the rows."""
    rng = np.random.default_rng(0)
    return [dataset.sample(task, dataset.rows[row], order, rng, []) for row, order in dataset.entries[task]]


def flat(value):
    return value.tolist() if isinstance(value, torch.Tensor) else value


def same(a, b):
    return a.keys() == b.keys() and all(flat(a[key]) == flat(b[key]) for key in a)


def test_every_task_has_its_published_prompt_references_and_target(make):
    dataset = load(make.every_task())
    first, second, third, fourth = (open_image(make.path / f"{i}.png") for i in range(4))
    mask = data.open_mask(make.path / "mask0.png", first)
    ref, target = lambda image: data.clip_pixels(image, CLIP), lambda image: data.target_pixels(image, SIZE)

    def check(sample, prompt, refs, goal):
        assert sample["prompt"] == prompt and sample["name"].startswith(str(make.path / "train.jsonl:"))
        assert sample["ids"][sample["mask"]].tolist().count(dataset.processor.image_id) == 4 * len(sample["refs"])
        assert torch.equal(sample["target"], target(goal))
        if refs is not None:
            assert torch.equal(sample["refs"], torch.stack([ref(r) for r in refs]) if refs else sample["refs"][:0])

    check(entries(dataset, "t2i")[0], "a scene", [], first)
    black = np.zeros((32, 40, 3), np.uint8)
    black[5:25, 10:26] = np.asarray(first)[5:25, 10:26]
    check(entries(dataset, "segment")[0], "The cat in <image>.", [first], Image.fromarray(black))
    recover, = entries(dataset, "recover")
    check(recover, "The cat in <image>.\na scene", None, first)
    assert recover["refs"].shape == (1, 3, CLIP, CLIP)
    forward, swapped = entries(dataset, "subject")
    check(forward, "The cat in <image>.\na scene", [second], first)
    check(swapped, "The cat in <image>.\na scene", [first], second)
    multi, ready = entries(dataset, "multi")
    check(multi, "The cat in <image>.\nThe sky in <image>.\na scene", None, first)
    check(ready, "The cat in <image>.\nThe sky in <image>.\na scene", [third, fourth], first)
    forms = {tuple(np.asarray(data.multi_reference(first, mask, np.random.default_rng(i))).ravel()) for i in range(9)}
    box = (8, 5, 28, 25)                                 # a square around (10, 5, 26, 25)
    assert forms == {tuple(np.asarray(image.crop(box)).ravel()) for image in (first, Image.fromarray(black))}
    prompts = set()
    for seed in range(9):
        sample = dataset.sample("reconstruct", dataset.rows[1], 0, np.random.default_rng(seed), [])
        check(sample, sample["prompt"], [second], second)
        prompts.add(sample["prompt"])
    assert prompts == {"The image is <image>\na scene", "<image>\n"}


def test_captions_and_lone_images_reread_the_same_rows(make):
    dataset = load(make.every_task(), {"caption": 1})
    assert len(dataset) == 2
    for sample in entries(dataset, "caption"):
        labels = dataset.processor.tokenizer.encode("a scene").ids
        assert sample["prompt"] == "<image>" and len(sample["refs"]) == 1 and "target" not in sample
        assert sample["labels"].tolist() == labels + [-100] * (data.CAPTION_TOKENS - len(labels))
    dataset = load(make.every_task(), {"picture": None})
    assert len(dataset) == 7 and all(len(sample["refs"]) == 0 and sample["target"].shape == (3, SIZE, SIZE)
                                     for sample in entries(dataset, "picture"))
    with pytest.raises(InputError, match="captioning"):
        load(make.every_task(), {"caption": 1, "t2i": 1})


def test_a_recovered_object_lies_whole_on_the_background_at_the_published_scales(make):
    image = Image.new("RGB", (60, 40), (250, 0, 0))
    mask = np.zeros((40, 60), bool)
    mask[10:30, 20:50] = True
    sides, tilted = [], 0
    for seed in range(200):
        frame = np.asarray(data.recovery_input(image, mask, Image.new("RGB", (90, 70), (0, 0, 250)), 80,
                                               np.random.default_rng(seed))).astype(int)
        assert frame.shape == (80, 80, 3) and (frame[..., 0] + frame[..., 2] >= 240).all()     # one or the other
        columns, rows = (np.flatnonzero((frame[..., 0] > 60).any(axis=axis)) for axis in (0, 1))
        width, height = np.ptp(columns) + 1, np.ptp(rows) + 1
        sides.append(max(width, height) / 80)
        red = (frame[..., 0] > 125).sum()
        tilted += red < 0.93 * width * height - 12
        assert 0.3 < red / (width * height) <= 1.01
    assert 0.07 < min(sides) < 0.2 and 0.9 < max(sides) <= 1
    assert 60 < tilted < 130                             # about half of them


def test_recovery_stands_on_the_given_backgrounds_or_on_another_image(make):
    train = make.every_task()
    Image.new("RGB", (50, 50), (0, 255, 0)).save(make.path / "green.png")
    backgrounds = make.rows({"input_image": "green.png"}, {"input_image": "gone.png"}, name="backgrounds.jsonl")
    given, other = load(train, {"recover": 1}, backgrounds=[backgrounds]), load(train, {"recover": 1})
    green = data.clip_pixels(open_image(make.path / "green.png"), CLIP)
    problems = set()
    for k in range(20):
        problems |= set(given[k]["problems"])
        assert (given[k]["refs"][0] == green).all(dim=0).any() and not (other[k]["refs"][0] == green).all(dim=0).any()
    assert len(problems) == 1 and "backgrounds.jsonl:2: " in problems.pop()
    alone = make.rows({"source_image": "0.png", "image_path": "mask0.png", "objects": "cat", "do_replace": True,
                       "input_text": ""}, name="alone.jsonl")
    with pytest.raises(InputError, match="alone.jsonl:1: no other picture"):
        load(alone)[0]


def test_an_epoch_has_the_mixture_of_the_weights_and_shows_all_rows_equally_often(make):
    path = make.every_task(repeat=5)
    dataset = load(path, {"t2i": 1, "subject": 2, "multi": 0, "segment": 1.4})
    assert len(dataset) == 20 and dataset.counts == {"t2i": 5, "subject": 9, "segment": 6}
    plans = [dataset.plan(epoch) for epoch in range(10)]
    assert all(plan.shape == (20, 3) for plan in plans)
    assert all(np.bincount(plan[:, 0]).tolist() == [5, 9, 6] for plan in plans)
    shown = {}
    for number, row, order in np.concatenate(plans).tolist():
        shown[number, row, order] = shown.get((number, row, order), 0) + 1
    assert set(shown.values()) == {9, 10, 12} and len(shown) == 20       # 10 * 5 / 5, 10 * 9 / 10, 10 * 6 / 5
    assert not np.array_equal(plans[0], plans[1]) and np.array_equal(load(path, dataset.counts).plan(1), plans[1])
    assert not np.array_equal(load(path, dataset.counts, seed=1).plan(1), plans[1])
    assert load(path).counts == {"t2i": 5, "reconstruct": 5, "segment": 5, "recover": 5, "subject": 10, "multi": 10}
    only = make.rows({"source_image": "0.png"}, name="only.jsonl")
    with pytest.raises(InputError, match="only.jsonl: no row for segment and subject; .* 1 reconstruct"):
        load(only, {"reconstruct": 1, "segment": 1, "subject": None})


def test_samples_do_not_depend_on_workers_world_size_or_where_a_run_resumes(make):
    path = make.every_task()
    make.rows(*(pathlib.Path(path).read_text().splitlines() + [json.dumps({"source_image": "gone.png"})]))

    def run(start=0, world=1, workers=0, micro=2):
        """The samples of 24 positions, put together from all ranks."""
        dataset, parts = load(path, seed=3), {}
        for rank in range(world):
            for i, batch in enumerate(batches(dataset, start, 24, micro, rank, world, workers)):
                parts[i * world + rank] = batch
        return [parts[i] for i in range(len(parts))]

    whole = run()
    assert len(whole) == 12 and len({name for batch in whole for name in batch["name"]}) == 7
    assert any(any(batch["problems"]) for batch in whole)
    expected = data.collate([load(path, seed=3)[k] for k in (2, 3)])
    assert same(expected, whole[1]) and len(expected["refs"]) == sum(p.count("<image>") for p in expected["prompt"])
    for other in (run(workers=2), run(world=3), run(world=2, workers=1)):
        assert len(other) == 12 and all(map(same, whole, other))
    assert all(map(same, whole[7:], run(start=14))) and len(run(start=14)) == 5
    assert [name for batch in run(micro=4) for name in batch["name"]] == [n for batch in whole for n in batch["name"]]


class Threads(torch.utils.data.Dataset):
    def __getitem__(self, k):
        return {"task": "", "name": "", "prompt": "", "problems": [str(torch.get_num_threads())],
                "refs": torch.empty(0), "ids": torch.empty(0), "mask": torch.empty(0)}


def test_workers_compute_on_one_thread_and_spare_the_global_random_numbers():
    before = torch.get_rng_state()
    numbers = [batch["problems"] for batch in batches(Threads(), 0, 4, 1, workers=2)]
    assert numbers == [[["1"]]] * 4
    assert torch.equal(torch.get_rng_state(), before)


def test_every_damaged_row_is_skipped_and_named(make):
    make.image("good.png"), make.mask("good.mask.png")
    make.mask("empty.png", box=(0, 0, 0, 0)), make.mask("small.png", size=(20, 16), box=(0, 0, 9, 9))
    make.image("whole.jpg", size=(400, 320))
    (make.path / "cut.jpg").write_bytes((make.path / "whole.jpg").read_bytes()[:2000])
    good = {"source_image": "good.png", "image_path": "good.mask.png", "objects": "cat", "input_text": "a cat"}
    masked = good | {"do_mask": True}
    damaged = [
        ("{not JSON", "not JSON"), (b"\xff\xfe{".decode("latin-1"), "not JSON"), ("[1]", "not a JSON object"),
        ({"input_text": "a"}, '"source_image" is missing'), ({"source_image": 5}, '"source_image" must be text'),
        ({"source_image": "good.png", "generation_only": True}, '"input_text" is missing'),
        ({"source_image": "good.png", "input_text": "\ud83d"}, '"input_text" must be text'),
        ({"source_image": "good.png", "do_mask": True}, '"objects" is missing'),
        ({key: good[key] for key in ("source_image", "image_path", "objects")}, '"input_text" is missing'),
        ({"source_image": ["good.png", "good.png"]}, '"source_image" must be one text, not 2'),
        (good | {"objects": ["cat", "dog"]}, r"2 object\(s\) but 1 path"),
        (masked | {"source_image": "gone.png"}, "gone.png: no such file"),
        (masked | {"source_image": "cut.jpg"}, "cut.jpg: .*damaged"),
        (masked | {"image_path": "gone.mask.png"}, "gone.mask.png: no such file"),
        (masked | {"image_path": "empty.png"}, "empty.png: the mask is empty"),
        (masked | {"image_path": "small.png"}, "small.png: the mask is 20 x 16 but its picture 40 x 32"),
        (masked | {"objects": "cat in <image>"}, "2 <image> but 1 reference"),
        (masked | {"objects": "cat " * 60}, "prompt needs .* tokens"),
    ]
    dataset = load(make.rows(*[masked] * 16, *(row for row, _ in damaged)), {"segment": 1})
    assert dataset.lines == 34
    found = {problem.split(": ")[0]: problem for k in range(200) for problem in dataset[k]["problems"]}
    found |= {problem.split(": ")[0]: problem for problem in dataset.problems}
    for number, (_, why) in enumerate(damaged, 17):
        with pytest.raises(InputError, match=why):
            raise InputError(found[str(make.path / f"train.jsonl:{number}")])
    assert {dataset[k]["name"] for k in range(50)} == {str(make.path / f"train.jsonl:{i}") for i in range(1, 17)}
    assert same(dataset[13], load(str(make.path / "train.jsonl"), {"segment": 1})[13])


def test_data_that_cannot_be_used_at_all_is_refused_by_name(make):
    with pytest.raises(InputError, match="no usable row; first problem: .*none.jsonl:1: not JSON"):
        load(make.rows("?", name="none.jsonl"))
    with pytest.raises(InputError, match="absent.jsonl: No such file"):
        load(str(make.path / "absent.jsonl"))


def test_an_error_in_a_worker_arrives_as_the_sentence_it_is(make):
    hopeless, messages = make.rows(*[{"source_image": f"gone{i}.png"} for i in range(3)]), []
    for workers in (0, 1):
        with pytest.raises(InputError) as caught:
            list(batches(load(hopeless), 0, 2, 1, workers=workers))
        assert str(caught.value).startswith("task reconstruct: ") and str(caught.value).count("gone") == 3
        messages.append(str(caught.value))
    assert messages[0] == messages[1]
    assert "Traceback" not in messages[1] and "Error" not in messages[1] and 'File "' not in messages[1]


def test_image_placeholders_in_a_caption_are_removed_as_the_released_loader_does(make):
    make.every_task()
    base = {"source_image": "0.png", "input_text": "a <image>cat<image> sits"}
    dataset = load(make.rows(
        base | {"generation_only": True},
        base | {"source_image": "1.png"},
        base | {"image_path": "mask0.png", "objects": "cat", "do_replace": True},
        base | {"image_path": "1.png", "objects": "cat", "swapped_text": "<image>a cat\n"},
        base | {"image_path": ["mask0.png", "mask1.png"], "objects": ["cat", "sky"]}))
    prompts = {task: [sample["prompt"] for sample in entries(dataset, task)] for task in dataset.tasks}
    assert prompts["t2i"] == ["a cat sits"]
    assert prompts["recover"] == ["The cat in <image>.\na cat sits"]
    assert prompts["subject"] == ["The cat in <image>.\na cat sits", "The cat in <image>.\na cat\n"]
    assert prompts["multi"] == ["The cat in <image>.\nThe sky in <image>.\na cat sits"]
    seen = {dataset.sample("reconstruct", dataset.rows[1], 0, np.random.default_rng(seed), [])["prompt"]
            for seed in range(9)}
    assert seen == {"The image is <image>\na cat sits", "<image>\n"}
    labels = entries(load(str(make.path / "train.jsonl"), {"caption": 1}), "caption")[0]["labels"]
    assert labels[labels >= 0].tolist() == weights.byte_tokenizer().encode("a cat sits").ids


def test_a_list_of_input_images_keeps_the_placeholders_of_its_own_prompt(make):
    make.every_task()
    base = {"source_image": "0.png", "image_path": ["2.png", "3.png"], "objects": ["cat", "sky"],
            "input_img_list": True}
    path = make.rows(base | {"input_text": "<image> under <image>, at night"}, base | {"input_text": "at night"},
                     base | {"input_text": "only <image>"})
    dataset = load(path)
    own, template, wrong = dataset.rows
    samples = [dataset.sample("multi", row, 0, np.random.default_rng(0), []) for row in (own, template)]
    assert [sample["prompt"] for sample in samples] == [
        "<image> under <image>, at night", "The cat in <image>.\nThe sky in <image>.\nat night"]
    images = [data.clip_pixels(open_image(make.path / f"{i}.png"), CLIP) for i in (2, 3)]
    for sample in samples:
        assert torch.equal(sample["refs"], torch.stack(images))
    with pytest.raises(InputError, match="1 <image> but 2 reference"):
        dataset.sample("multi", wrong, 0, np.random.default_rng(0), [])
