"""Rules of the small world that examples show and no prompt names: learning in context, as in the paper's appendix F.4.

A lesson has two examples, each an input and what the rule makes of it, and a third input, the query; the model is to
draw what the rule makes of the query. Subjects and scenes of the three differ. Inputs and prompt are the same whatever
the rule is, so a model that draws the right picture must have read the examples' outputs.

Next: `tokenizer.py`, which learns a VQGAN from the world's pictures.
"""
from dataclasses import dataclass, replace

from PIL import Image, ImageOps

import data
from world.sprites import paste

EXAMPLES = 2
TURNS = (120, 240)         # degrees by which an instance of the rule "recoloured" turns every subject's hue


# ---------------------------------------------------------------------------------------------------------------------
# The rules: (background, PlacedSprite, lesson) -> PIL RGB

def recoloured(background, sprite, lesson):
    """The subject in another hue, turned as far in all of a lesson."""
    appearance = replace(sprite.appearance, hue=sprite.appearance.hue + lesson.turn)
    return paste(background, [replace(sprite, appearance=appearance)])[0]


def silhouette(background, sprite, lesson):
    """The subject black before a pale scene."""
    return paste(background, [sprite], "silhouette")[0]


def pencil_sketch(background, sprite, lesson):
    """The whole picture drawn with a pencil."""
    return paste(background, [sprite], "pencil sketch")[0]


def another_scene(background, sprite, lesson):
    """The subject where it was, before a scene that is the same in all of a lesson."""
    return paste(lesson.elsewhere, [sprite])[0]


def mirrored(background, sprite, lesson):
    """The whole picture with left and right exchanged."""
    return ImageOps.mirror(paste(background, [sprite])[0])


def cut_out(background, sprite, lesson):
    """The subject alone on black."""
    image, (mask,) = paste(background, [sprite])
    return data.on_black(image, mask)


RULES = {rule.__name__.replace("_", " "): rule
         for rule in (recoloured, silhouette, pencil_sketch, another_scene, mirrored, cut_out)}


# ---------------------------------------------------------------------------------------------------------------------
# Lessons

@dataclass(frozen=True)
class Lesson:
    """An instance of a rule with its examples and its query."""
    rule: str                  # one of RULES
    inputs: tuple              # (background, PlacedSprite) of each example, then of the query
    turn: float                # of "recoloured"
    elsewhere: Image.Image     # the background of "another scene"

    def input(self, i):
        """The picture before the rule; i = EXAMPLES is the query. -> PIL RGB"""
        background, sprite = self.inputs[i]
        return paste(background, [sprite])[0]

    def output(self, i, rule=None):
        """What a rule makes of it, by default the lesson's own. -> PIL RGB"""
        return RULES[rule or self.rule](*self.inputs[i], self)

    def compose(self, shown=None):
        """shown: a rule for the examples in place of the lesson's own. -> prompt, [PIL references], PIL target"""
        references = []
        for i in range(EXAMPLES):
            references += [self.input(i), self.output(i, shown)]
        return data.prompt_for("icl", examples=EXAMPLES), [*references, self.input(EXAMPLES)], self.output(EXAMPLES)
