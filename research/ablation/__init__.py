"""A paper's claim beside a verdict made by a machine.

An experiment file declares arms, seeds and claims (`experiment`); the runner trains what is not
yet finished (`runner`); claims are judged on intervals over seeds (`claims`); what was found is
recorded (`record`) and the board is built from the records alone (`report`).
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
