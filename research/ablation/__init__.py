"""Experiments: run the arms of an experiment file and judge the paper's claims.

An experiment file declares arms, seeds and claims (`experiment`). The runner runs the units that
are not finished (`runner`). Claims are judged by intervals over seeds (`claims`). A complete run is
recorded (`summary`), and the board is built from the records alone (`report`).
"""

from research.ablation.claims import Claim, Verdict, difference, judge, mean, ratio
from research.ablation.experiment import Arm, Experiment, Unit, discover, load
from research.ablation.results import Results

__all__ = [
    "Arm",
    "Claim",
    "Experiment",
    "Results",
    "Unit",
    "Verdict",
    "difference",
    "discover",
    "judge",
    "load",
    "mean",
    "ratio",
]
