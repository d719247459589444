import pytest
import torch
from conftest import Golden, close, material, text_config, vision_config
from PIL import Image

import judge
import sprites
import weights
from data import InputError
from emoji import EmojiData
from encoder import CLIP_NAMES, DINO_NAMES, Clip, Dino

WHITE = Image.new("RGB", (32, 32), "white")


def true_samples(task="t2i", n=6):
    world = EmojiData(judge.plain_prompter(), weights={task: 1}, seed=5, held_out=True, extras=False)
    return [world[k] for k in range(n)]


class Oracle(torch.nn.Module):
    """A judge that knows the truth, `wrong` degrees off in hue."""

    def __init__(self, metas, wrong=0.0):
        super().__init__()
        self.scene, self.subject, hue = judge.truth(metas)
        self.hue = hue + wrong / 57.29578

    def forward(self, pixels):
        one_hot = torch.nn.functional.one_hot
        return (one_hot(self.scene, 30).float(), one_hot(self.subject, len(judge.held_out())).float(),
                torch.stack([self.hue.cos(), self.hue.sin()], dim=1) * 3)


def test_the_verdict_is_right_for_the_truth_and_wrong_for_another_hue_scene_or_subject():
    metas = [sample["meta"] for sample in true_samples()]
    scores = judge.verdict(Oracle(metas), None, metas)
    assert all((value == 1).all() for value in scores.values())
    assert (judge.verdict(Oracle(metas, 44), None, metas)["hue"] == 1).all()
    assert (judge.verdict(Oracle(metas, -46), None, metas)["hue"] == 0).all()
    other = [{**meta, "scene": "snow" if meta["scene"] != "snow" else "beach"} for meta in metas]
    assert (judge.verdict(Oracle(metas), None, other)["scene"] == 0).all()
    held_out = judge.held_out()
    other = [{**meta, "subject": held_out[held_out.index(meta["subject"]) - 7]} for meta in metas]
    assert (judge.verdict(Oracle(metas), None, other)["subject"] == 0).all()


def test_segmentation_and_reconstruction_scores_are_perfect_for_the_truth_only():
    samples = true_samples("segment")
    true, metas = torch.stack([s["target"] for s in samples]), [s["meta"] for s in samples]
    overlap = judge.iou(true, metas)
    assert overlap.mean() > 0.98 and overlap.min() > 0.9       # what is almost black itself is lost
    assert (judge.iou(torch.ones_like(true), metas) < 0.5).all()
    close(judge.decibels(true * 0 + 0.2, true * 0), torch.full((6,), 20.0), 1e-3)
    close(judge.distance(true * 0 + 0.2, true * 0), torch.full((6,), 0.1 * 3**0.5), 1e-6)
    assert (judge.distance(true, true) == 0).all()


# ---------------------------------------------------------------------------------------------------------------------
# Public networks

def test_networks_of_the_published_size_are_recognised_from_their_tensors():
    g = Golden("clip-vit-l14")
    vision, text = vision_config(g.config["vision"]), text_config(g.config["text"])
    with torch.device("meta"):
        clip, dino = Clip(vision, text, 768), Dino(8)
        found = judge.clip_of({weights.public_name(name, CLIP_NAMES): t for name, t in clip.state_dict().items()})
        other = judge.dino_of({weights.public_name(name, DINO_NAMES): t for name, t in dino.state_dict().items()})
    assert found.vision.config == vision and found.text.config == text
    shapes = [{name: t.shape for name, t in module.state_dict().items()} for module in (clip, found, dino, other)]
    assert shapes[0] == shapes[1] and shapes[2] == shapes[3]


def test_clips_tokenizer_gives_the_published_ids():
    folder = material("MENTOR_TOKENIZERS", "tokenizers") / "clip"
    encode = judge.clip_tokenizer(str(folder / "vocab.json"), str(folder / "merges.txt")).encode
    assert encode("a photo of a cat").ids == [49406, 320, 1125, 539, 320, 2368, 49407]
    assert encode("A  Photo of\na CAT").ids == encode("a photo of a cat").ids
    assert encode("it's 25!").ids == [49406, 585, 568, 273, 276, 256, 49407]


def test_pictures_score_1_against_themselves_and_the_text_is_cut_to_what_clip_reads(networks):
    scorer = judge.Scorer(networks[1], networks[3], "cpu")
    images = [Image.new("RGB", (80, 60), colour) for colour in ("red", "white", "black")]
    seen = scorer.pictures(images, batch=2)
    for embedding in seen.values():
        cosines = embedding @ embedding.T
        close(cosines.diagonal(), torch.ones(3), 1e-5)
        assert cosines[0, 1] < 0.9999
    alone = scorer.pictures(images[2:])
    for name in ("clip", "dino"):
        close(seen[name][2:], alone[name], 1e-5)
    assert scorer.text("word " * 200).shape == (48,)


# ---------------------------------------------------------------------------------------------------------------------
# A vision model behind HTTP

def ask(endpoint, *script, **options):
    endpoint.script[:] = script
    model = judge.VisionJudge(endpoint.url, "eyes", "secret", **{"tries": 4, "wait": 0.01, "timeout": 10, **options})
    return model.score("cp", [WHITE, WHITE], subject="dog", prompt="a dog in the snow")


def test_a_good_answer_is_read_and_the_question_holds_rubric_pictures_and_key(endpoint):
    assert ask(endpoint, "Both are brown. Score: 4 at first sight, but the ears differ.\n**Score:** 3") == (
        3, ["Both are brown. Score: 4 at first sight, but the ears differ.\n**Score:** 3"])
    (path, key, body), = endpoint.seen
    assert path == "/v1/chat/completions" and key == "Bearer secret" and body["model"] == "eyes"
    text, *pictures = body["messages"][0]["content"]
    assert "reference: dog" in text["text"] and len(pictures) == 2
    assert all(p["image_url"]["url"].startswith("data:image/png;base64,") for p in pictures)


def test_answers_without_a_score_are_asked_again_and_given_up_in_the_end(endpoint):
    said = ["A fine picture.", "Score: 7", "Score: 10", "Score: 45", "Score: 3.5", "score = 2"]
    assert ask(endpoint, *said, tries=6) == (2, said)
    assert ask(endpoint, "A fine picture.") == (None, ["A fine picture."] * 4)


def test_busy_broken_and_slow_servers_are_asked_again(endpoint):
    assert ask(endpoint, 429, 503, "Score: 4")[0] == 4
    assert ask(endpoint, 200, {"error": "odd"}, "Score: 0")[0] == 0
    assert ask(endpoint, "slow", "Score: 2", timeout=0.3)[0] == 2


def test_no_answer_and_a_refused_question_are_one_clear_sentence(endpoint):
    with pytest.raises(InputError, match="no answer in 4 tries .HTTP 500.; what is scored is kept"):
        ask(endpoint, 500)
    with pytest.raises(InputError, match="refused the question .HTTP 401.*OPENAI_API_KEY"):
        ask(endpoint, 401)
    endpoint.server_close()
    with pytest.raises(InputError, match="no answer in 4 tries .*refused"):
        ask(endpoint, "Score: 1")
