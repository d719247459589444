import http.server
import os
import shutil
import threading
from contextlib import contextmanager

import pytest
import torch
from conftest import Golden, close, material, text_config, vision_config
from PIL import Image

import scorers
import weights
from cli import InputError
from encoder import VisionConfig
from scorers import CLIP_TEXT_NAMES, DINO_NAMES, Clip, Dino

WHITE = Image.new("RGB", (32, 32), "white")


# ---------------------------------------------------------------------------------------------------------------------
# Public networks

@pytest.mark.parametrize("name, step, atol", [
    ("clip-small", 1, 1e-4),
    pytest.param("clip-vit-l14", 8, 1e-3, marks=pytest.mark.full)])
def test_clip_agrees_with_the_golden_outputs(name, step, atol):
    g = Golden(name)
    vision, text = vision_config(g.config["vision"]), text_config(g.config["text"])
    clip = Clip(vision, text, g.config["vision"]["projection_dim"])
    g.fill_by_table(clip, weights.CLIP_NAMES + CLIP_TEXT_NAMES)
    pixels = g.noise("pixels", (1, 3, vision.image_size, vision.image_size))
    close(clip.vision(pixels)[:, ::step, ::step], g["penultimate_patches"], atol)
    close(clip.embed_images(pixels), g["image_embedding"], atol)
    close(clip.embed_texts(g["text_ids"]), g["text_embedding"], atol)


@pytest.mark.parametrize("patch_size", [16, pytest.param(8, marks=pytest.mark.full)])
def test_dino_agrees_with_the_golden_outputs(patch_size):
    g = Golden(f"dino-vits{patch_size}")
    dino = g.fill_by_table(Dino(patch_size), DINO_NAMES)
    close(dino(g.noise("pixels", (2, 3, 224, 224))), g["embedding"], 1e-3)


def public_tensors(module, table):
    return {weights.public_name(name, table): tensor for name, tensor in module.state_dict().items()}


def test_networks_of_the_published_size_are_recognised_from_their_tensors():
    g = Golden("clip-vit-l14")
    vision, text = vision_config(g.config["vision"]), text_config(g.config["text"])
    with torch.device("meta"):
        clip, dino = Clip(vision, text, 768), Dino(8)
        clip_again = scorers.clip_of(public_tensors(clip, weights.CLIP_NAMES + CLIP_TEXT_NAMES))
        dino_again = scorers.dino_of(public_tensors(dino, DINO_NAMES))
    assert clip_again.vision.config == vision and clip_again.text.config == text
    for module, again in ((clip, clip_again), (dino, dino_again)):
        shapes = {name: tensor.shape for name, tensor in module.state_dict().items()}
        assert shapes == {name: tensor.shape for name, tensor in again.state_dict().items()}


def test_clips_tokenizer_gives_the_published_ids():
    folder = material("MENTOR_TOKENIZERS", "tokenizers") / "clip"
    encode = scorers.clip_tokenizer(str(folder / "vocab.json"), str(folder / "merges.txt")).encode
    assert encode("a photo of a cat").ids == [49406, 320, 1125, 539, 320, 2368, 49407]
    assert encode("A  Photo of\na CAT").ids == encode("a photo of a cat").ids
    assert encode("it's 25!").ids == [49406, 585, 568, 273, 276, 256, 49407]


def test_pictures_score_1_against_themselves_and_the_text_is_cut_to_what_clip_reads(networks):
    scorer = scorers.Scorer(networks[1], networks[3], "cpu")
    images = [Image.new("RGB", (80, 60), colour) for colour in ("red", "white", "black")]
    embeddings = scorer.embed_images(images, batch=2)
    assert set(embeddings) == {"clip", "dino"}
    for rows in embeddings.values():
        cosines = rows @ rows.T
        close(cosines.diagonal(), torch.ones(3), 1e-5)
        assert cosines[0, 1] < 0.9999
    alone = scorer.embed_images(images[2:])
    for name in ("clip", "dino"):
        close(embeddings[name][2:], alone[name], 1e-5)
    assert scorer.embed_text("word " * 200).shape == (48,)


def test_files_that_are_not_the_networks_are_one_clear_sentence(networks, tmp_path):
    def message(folder, **files):
        folder.mkdir()
        torch.save(files.pop("tensors"), folder / "pytorch_model.bin")
        for name, text in files.items():
            (folder / {"vocab": "vocab.json", "merges": "merges.txt"}[name]).write_text(text)
        with pytest.raises(InputError) as error:
            scorers.Scorer(str(folder), None, "cpu", use_dino=False)
        return str(error.value)

    clip = torch.load(f"{networks[1]}/pytorch_model.bin")
    scalar = "vision_model.embeddings.patch_embedding.weight"
    assert "holds no CLIP" in message(tmp_path / "a", tensors={"weight": torch.ones(2)})
    assert "holds no CLIP" in message(tmp_path / "b", tensors=clip | {scalar: torch.tensor(1.0)})
    assert "lacks merges.txt and vocab.json" in message(tmp_path / "c", tensors=clip)
    assert "not a vocabulary" in message(tmp_path / "d", tensors=clip, vocab="[1]", merges="#version: 0.2\n")
    assert "lacks <|startoftext|>" in message(tmp_path / "e", tensors=clip, merges="#version: 0.2\n",
                                              vocab='{"<|endoftext|>": 0}')
    with pytest.raises(InputError, match="no such folder"):
        scorers.Scorer(networks[1], str(tmp_path / "nowhere"), "cpu")


def test_files_of_a_network_are_regular_files_and_odd_pickles_are_refused(networks, tmp_path):
    folder = tmp_path / "clip"
    shutil.copytree(networks[1], folder)
    (folder / "vocab.json").unlink()
    os.mkfifo(folder / "vocab.json")
    with pytest.raises(InputError, match="vocab.json: is a pipe or a device"):
        scorers.Scorer(str(folder), None, "cpu", use_dino=False)
    for content in ([1], {1: torch.ones(2)}, {"model": [1]}, {"model": {"model": 3}}, torch.ones(2)):
        torch.save(content, folder / "pytorch_model.bin")
        with pytest.raises(InputError, match="pytorch_model.bin: holds no tensors"):
            scorers.Scorer(str(folder), None, "cpu", use_dino=False)
    clip = torch.load(f"{networks[1]}/pytorch_model.bin")
    torch.save(clip | {3: torch.ones(1), "visual_projection.weight": torch.ones(2, 2, dtype=torch.int8)},
               folder / "pytorch_model.bin")
    with pytest.raises(InputError, match="pytorch_model.bin: "):
        scorers.Scorer(str(folder), None, "cpu", use_dino=False)


def test_clip_is_called_by_its_published_name():
    def tower(width, patch_size, image_size):
        return VisionConfig(width=width, patch_size=patch_size, image_size=image_size)

    assert scorers.published_name(tower(1024, 14, 336)) == ("ViT-L/14 at 336 pixels", True)
    assert scorers.published_name(tower(1024, 14, 224)) == ("ViT-L/14 at 224 pixels", False)
    assert scorers.published_name(tower(768, 32, 224)) == ("ViT-B/32 at 224 pixels", False)


def test_the_distance_of_colours_is_0_for_equal_images_and_known_for_grey_ones():
    targets = torch.zeros(6, 3, 8, 8)
    close(scorers.color_distance(targets + 0.2, targets), torch.full((6,), 0.1 * 3**0.5), 1e-6)
    assert (scorers.color_distance(targets, targets) == 0).all()


def test_the_overlap_of_a_drawn_object_with_its_mask_is_known_for_two_squares():
    images, masks = torch.full((2, 3, 8, 8), -1.0), torch.zeros(2, 8, 8, dtype=torch.bool)
    images[:, :, :4] = torch.tensor([-0.65, -0.55])[:, None, None, None]       # brightness 0.175 is black, 0.225 is not
    images[:, 1, 6:] = 0.5                                                     # one channel is enough
    masks[:, :, :4] = True
    close(scorers.mask_iou(images, masks), torch.tensor([8 / 40, 24 / 56]), 1e-6)


# ---------------------------------------------------------------------------------------------------------------------
# A vision model behind HTTP

def ask(endpoint, *script, **options):
    endpoint.script[:] = script
    model = scorers.VisionJudge(endpoint.url, "eyes", "secret", **{"tries": 4, "wait": 0.01, "timeout": 10, **options})
    return model.score("cp", [WHITE, WHITE], subject="dog", prompt="a dog in the snow")


def test_a_good_answer_is_read_and_the_question_holds_rubric_pictures_and_key(endpoint):
    assert ask(endpoint, "Both are brown. Score: 4 at first sight, but the ears differ.\n**Score:** 3") == (
        3, ["Both are brown. Score: 4 at first sight, but the ears differ.\n**Score:** 3"])
    (path, key, body), = endpoint.seen
    assert path == "/v1/chat/completions" and key == "Bearer secret" and body["model"] == "eyes"
    text, *images = body["messages"][0]["content"]
    assert "reference: dog" in text["text"] and len(images) == 2
    assert all(image["image_url"]["url"].startswith("data:image/png;base64,") for image in images)


def test_answers_without_a_score_are_asked_again_and_given_up_in_the_end(endpoint):
    answers = ["A fine picture.", "Score: 7", "Score: 10", "Score: 45", "Score: 3.5", "score = 2"]
    assert ask(endpoint, *answers, tries=6) == (2, answers)
    assert ask(endpoint, "A fine picture.") == (None, ["A fine picture."] * 4)


def test_busy_broken_and_slow_servers_are_asked_again(endpoint):
    assert ask(endpoint, 429, 503, "Score: 4")[0] == 4
    assert ask(endpoint, "Hm.", 200, {"error": "odd"}, "Score: 0")[0] == 0           # one that has answered before
    assert ask(endpoint, "slow", "Score: 2", timeout=0.3)[0] == 2


def test_no_answer_and_a_refused_question_are_one_clear_sentence(endpoint):
    with pytest.raises(InputError, match="no answer in 4 tries .HTTP 500.; what is scored is kept"):
        ask(endpoint, 500)
    with pytest.raises(InputError, match="refused the question .HTTP 401.*OPENAI_API_KEY"):
        ask(endpoint, 401)
    with pytest.raises(InputError, match="no answer in 4 tries .*not a chat completion"):
        judge = scorers.VisionJudge(endpoint.url, "eyes", tries=4, wait=0.01)
        endpoint.script[:] = ["Score: 1", 200]
        assert judge.score("pf", [WHITE], "dog", "a dog")[0] == 1
        judge.score("pf", [WHITE], "dog", "a dog")
    endpoint.server_close()
    with pytest.raises(InputError, match="no answer of a judge .*refused.; check --judge-url"):
        ask(endpoint, "Score: 1")


def test_an_address_where_no_judge_ever_answered_is_given_up_at_the_first_try(endpoint):
    for answer in (200, {"error": "odd"}, {"choices": []}, [1]):
        endpoint.seen.clear()
        with pytest.raises(InputError, match="no answer of a judge .an answer that is not a chat completion"):
            ask(endpoint, answer, tries=5, wait=60)
        assert len(endpoint.seen) == 1
    with pytest.raises(InputError, match="no answer of a judge .*; check --judge-url"):
        scorers.VisionJudge("http://no-such-host.invalid/v1", "eyes", wait=60).score("pf", [WHITE], "dog", "a dog")


def test_a_style_is_compared_by_a_rubric_of_its_own(endpoint):
    endpoint.script[:] = ["Score: 3"]
    judge = scorers.VisionJudge(endpoint.url, "eyes")
    assert [judge.score(rubric, [WHITE], "ink drawing", "a cat")[0] for rubric in ("cp_style", "cp")] == [3, 3]
    style, subject = (body["messages"][0]["content"][0]["text"] for _, _, body in endpoint.seen)
    assert "example of a style: ink drawing" in style and "Compare only how the two are made" in style
    assert "Compare only the subject" in subject and all(body["temperature"] == 1 for _, _, body in endpoint.seen)


def test_the_judges_scores_are_the_hand_computed_ones():
    def row(group, prompt_group, cp, pf):
        return {"group": group, "prompt_group": prompt_group, "cp": cp, "pf": pf}

    rows = [row("animal", "photorealistic", [4, 3, 4], [4, 4, 4]),
            row("animal", "imaginative", [2, 3, None], [0, 1, 2]),           # None could not be read
            row("style", "photorealistic", [1, 1, 2], [3, 3, 3])]
    table = scorers.judge_table(rows)
    cp, pf = table["CP"], table["PF"]
    assert list(cp) == ["animal", "human", "object", "style", "overall"]
    assert list(pf) == ["photorealistic", "style transfer", "imaginative", "overall"]
    # animal: the passes' means are 3, 3, 4 -> 10 / 12, deviations from it -1/12, -1/12, 2/12
    assert cp["animal"] == {"pictures": 2, "score": pytest.approx(10 / 12),
                            "spread": pytest.approx((6 / 144 / 2)**0.5)}
    assert cp["human"] == {"pictures": 0, "score": None, "spread": None}
    assert cp["style"]["score"] == pytest.approx((1 / 4 + 1 / 4 + 2 / 4) / 3)
    assert pf["photorealistic"] == {"pictures": 2, "score": pytest.approx(3.5 / 4), "spread": 0}
    assert pf["imaginative"] == {"pictures": 1, "score": 1 / 4, "spread": 1 / 4}
    overall_cp, overall_pf = (7 / 3 + 7 / 3 + 3) / 3 / 4, (7 / 3 + 8 / 3 + 3) / 3 / 4
    assert cp["overall"]["score"] == pytest.approx(overall_cp) and pf["overall"]["score"] == pytest.approx(overall_pf)
    assert table["CP*PF"] == pytest.approx(overall_cp * overall_pf)
    assert table["CP/PF"] == pytest.approx(overall_cp / overall_pf)
    alone = scorers.judge_table([row("human", "imaginative", [2], [None])])
    assert alone["CP"]["overall"] == {"pictures": 1, "score": 0.5, "spread": None}
    assert alone["PF"]["overall"]["score"] is None and alone["CP*PF"] is None


@contextmanager
def raw_server(status, headers, content):
    """A local server that gives every request the same reply. -> its URL, a list of the headers it is sent"""
    received = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            received.append(dict(self.headers))
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(content)

        do_GET = do_POST

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/v1", received
    finally:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirect_is_refused_and_the_key_stays_with_the_server_it_is_for(status):
    with raw_server(200, {}, b"{}") as (other, received_there):
        with raw_server(status, {"Location": f"{other}/chat/completions"}, b"") as (url, received):
            with pytest.raises(InputError, match=f"redirects to another address .HTTP {status}"):
                scorers.VisionJudge(url, "eyes", "secret", tries=4, wait=0.01).score("pf", [WHITE], "dog", "a dog")
        assert len(received) == 1 and not received_there


@pytest.mark.parametrize("url", [
    "", "host/v1", "localhost:8000/v1", "ftp://host/v1", "file:///v1", "https://", "https:///v1", "http://host:port/v1",
    "http://host:0/v1", "http://host:99999/v1", "http://[::1/v1", "https://ho st/v1", "https://höst/v1",
    "https://host/v1\n"])
def test_a_url_that_cannot_be_asked_is_refused_at_once(url):
    with pytest.raises(InputError, match="--judge-url .*: not an address; give one like https://host/v1"):
        scorers.VisionJudge(url, "eyes")


def test_neither_key_nor_password_is_ever_printed():
    for url in ("https://user:secret@host/v1", "user:secret@host/v1", "ftp://user:secret@host:port/v1"):
        with pytest.raises(InputError, match="user name or password") as error:
            scorers.VisionJudge(url, "eyes")
        assert "secret" not in str(error.value)
    for key in ("secret\n", "sec ret", "sécret"):
        with pytest.raises(InputError, match="OPENAI_API_KEY") as error:
            scorers.VisionJudge("https://host/v1", "eyes", key)
        assert key not in str(error.value)
    with raw_server(403, {}, b"") as (url, _), pytest.raises(InputError, match="refused the question") as error:
        scorers.VisionJudge(f"{url}?token=secret", "eyes", "secret").score("pf", [WHITE], "dog", "a dog")
    assert "secret" not in str(error.value)


def test_a_query_in_the_url_stays_behind_the_path(endpoint):
    endpoint.script[:] = ["Score: 1"]
    judge = scorers.VisionJudge(f"{endpoint.url}/?version=2", "eyes")
    assert judge.score("pf", [WHITE], "dog", "a dog")[0] == 1
    (path, key, _), = endpoint.seen
    assert path == "/v1/chat/completions?version=2" and key is None


def test_of_a_very_long_or_deeply_nested_answer_little_is_read(endpoint):
    with pytest.raises(InputError, match="no answer of a judge .an answer of more than 4 MiB"):
        ask(endpoint, "Score: 4" + " " * (5 << 20))
    with raw_server(200, {}, b"[" * 100_000) as (url, _), pytest.raises(InputError, match="not a chat completion"):
        scorers.VisionJudge(url, "eyes", tries=2, wait=0.01).score("pf", [WHITE], "dog", "a dog")
