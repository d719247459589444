"""A laboratory: a small world in which the whole method can be trained from nothing and scored on a laptop's CPU.

The full model needs public weights, data and GPUs. Here nothing is downloaded, and an experiment takes an hour or a few
on two cores: the images are emoji before painted scenes, 64 x 64 pixels, painted when they are asked for. The world is
built so that scores mean something:

- No prompt mentions hue, saturation or orientation, which every instance of an emoji has of its own. A model that shows
  the right ones must have read them from the reference.
- A tenth of the subjects, in whole families of similar ones, is held out of training. Scores are of these.
- Everything in a picture is known, so a small classifier can tell which scene, subject and hue a sampled image shows.

Nothing outside this folder depends on it. Read it in this order:

    rows.py         descriptions, pictures and samples of all six tasks and of lessons; the world as files on a disk
    scenes.py       the backgrounds, painted by code
    sprites.py      the emoji, recoloured and pasted before a background
    rules.py        lessons: rules that examples show and no prompt names
    tokenizer.py    trains a VQGAN from nothing
    train.py        the small model's stages, in place of the public weights of CLIP, T5 and LlamaGen
    judge.py        the classifier, and its own accuracy on true pictures
    ablation.py     the rows of the paper's Table 4 in miniature, and of a comparison of connectors
    evaluate.py     scores of the held-out subjects, a sheet of them, what is learned in context, both tables
"""
