"""Ways to train the small model, as tables: the rows that `evaluate.py` trains, scores and prints.

ABLATION is the paper's Table 4 in miniature, by its protocol: a variant without stage 1 keeps the steps that stage 2
has in every other. What a variant starts from, and how often copying pays, are conditions that each row names:

    captioned   after stages parts and connector of `train.py`: what the paper starts from and nothing more
    aligned     after `pretrain`, which has aligned every patch with the tokens under it before stage 1 does
    copies      the share of subject-driven pairs whose picture has its reference's own background

Next: `evaluate.py`.
"""
from typing import NamedTuple


class Run(NamedTuple):
    """A run of `world.train`."""
    stage: str
    flags: tuple = ()              # beyond those that all runs of a table share; each with one value
    part: str = "all"              # of the budget that both stages have together: "third", "rest" or "all"

    def steps(self, budget):
        """Its part of so many optimizer steps."""
        return {"third": budget // 3, "rest": budget - budget // 3, "all": budget}[self.part]

    @property
    def name(self):
        """Of its folder: with those that came before it all that tells it apart from the others of its table."""
        return "-".join([self.stage, *self.flags[1::2], *([] if self.part == "all" else [self.part])])


class Variant(NamedTuple):
    """A way to train the small model."""
    runs: tuple                    # one after the other
    paper: tuple | None = None     # CP, PF and CP * PF in its Table 4; None where it has no such row or number
    pretrain: str | None = None    # "captioned" or "aligned", see above; None = what --init names
    copies: float | None = None


class Table(NamedTuple):
    """What is trained, scored and printed."""
    variants: dict
    columns: tuple                 # of COLUMNS


COLUMNS = {
    "CP": ("subject", "cp"),
    "PF": ("subject", "pf"),
    "CP*PF": ("subject", "cp*pf"),
    "CP/PF": ("subject", "cp/pf"),
    "hue": ("subject", "hue"),
    "IoU": ("segment", "iou"),
    "L2": ("reconstruct", "l2"),
}


def both(first=(), second=(), paper=None, pretrain="captioned", copies=0.5):
    """The variant with both stages. first, second: flags of each"""
    told = () if "subject" in second else ("--copies", str(copies))        # without its pairs there is nothing to copy
    runs = Run("1", first, "third"), Run("2", (*told, *second), "rest")
    return Variant(runs, paper, pretrain, copies)


def alone(part="rest", paper=None, pretrain="captioned", copies=0.5):
    """The variant without stage 1. part: of the steps that both stages have together"""
    return Variant((Run("2", ("--copies", str(copies)), part),), paper, pretrain, copies)


NO_SEGMENTATION, NO_RECOVERY = ("--without", "segment"), ("--without", "recover")
IDENTITY = ("--prefix-rope", "identity")       # in place of the grid, which has no places for a query's rows
ABLATION = Table({
    "full": both(paper=(.555, .839, .466)),
    "without stage 1": alone(paper=(.179, .673, .120)),
    "without stage 1, equal total": alone("all"),
    "without segmentation in stage 1": both(first=NO_SEGMENTATION),
    "without recovery": both(second=NO_RECOVERY, paper=(.661, .284, .188)),
    "without segmentation in stage 2": both(second=NO_SEGMENTATION, paper=(.412, .918, .378)),
    "without subject-driven": both(second=("--without", "subject")),       # the paper's "w/o Multimodal T2I"
    "without text to image": both(second=("--without", "t2i")),
    "prefix without rotation": both(first=IDENTITY, second=IDENTITY),
    "full, copies 0": both(copies=0.0),
    "without recovery, copies 0": both(second=NO_RECOVERY, copies=0.0),
    "full, copies 0.9": both(copies=0.9),
    "without recovery, copies 0.9": both(second=NO_RECOVERY, copies=0.9),
    "full, aligned": both(pretrain="aligned"),
    "without stage 1, aligned": alone(pretrain="aligned"),
}, tuple(COLUMNS))
ARCHITECTURES = Table({            # each with a connector that starts from random weights, at stage 2's learning rate
    "MLP connector": Variant((Run("2", ("--connector", "released")),)),
    "query connector": Variant((Run("2", ("--connector", "query", *IDENTITY)),)),
    "MLP, several images": Variant((Run("multi", ("--lr", "2e-3", "--connector", "released")),)),
    "MLP, prefix without rotation": Variant((Run("2", ("--connector", "released", *IDENTITY)),)),
}, ("CP", "PF", "CP*PF", "L2"))


def further(copies, *flags):
    """More of stage 2 from trained weights, with pairs of which a share is worth copying."""
    return Variant((Run("2", ("--lr", "1e-3", "--copies", str(copies), *flags)),), copies=copies)


COPYING = Table({                  # what recovery is for, with a model that reads its references well
    "full, copies 0": further(0.0),
    "without recovery, copies 0": further(0.0, *NO_RECOVERY),
    "full, copies 0.9": further(0.9),
    "without recovery, copies 0.9": further(0.9, *NO_RECOVERY),
}, ("CP", "PF", "CP*PF", "CP/PF", "hue"))
