"""Hybrids of attention and Mamba: Jamba (Lieber 2024, arXiv:2403.19887).

A state of fixed size cannot store everything, and a cache that stores everything grows with the
length. Jamba has one layer of attention per seven of Mamba, and a mixture of experts in every other
layer. Hybrids of 1:3 and 1:7 are equally good, and both are better than attention alone and than
Mamba alone (§6.1). Where Mamba alone fails because it lacks induction heads, they are as good as
attention (§6.2, Table 6). Experts improve them further (§6.3). At 256,000 tokens the cache is 8
times smaller than Mixtral's (Table 1). Recall also separates attention from Mamba in small models:
attention copies texts verbatim that are too long for a state (Jelassi 2024, Repeat After Me,
arXiv:2402.01032).

Here one layer of four, two, all or none are attention, the others Mamba, all with an MLP. They are
trained on text, and on copying symbols that were shown once, which attention learns in the steps of
`cpu`. There Mamba alone stays at chance, and every arm with attention copies everything: `cpu` does
not show how much attention recall requires. (No arm learned the task tried first, recall of the
value of one in 16 keys.)

    ablate run architecture/hybrid --scale=smoke    # a few steps, no findings
    ablate run architecture/hybrid                  # cpu: 2 cores; time in `ablate list`
    ablate run architecture/hybrid --scale=gpu      # one accelerator
    ablate run architecture/hybrid --scale=paper    # Jamba's 7B ablation; 64 chips of TPU v5p
"""

import dataclasses

from layers.mamba import MambaConfig
from layers.routing import MoeConfig
from research.ablation import Arm, Claim, Unit, difference, ratio
from research.ablation.language_model import check_unit, evaluate_unit, language_model, train_unit
from research.ablation.measure import state_bytes

PAPER = "Lieber 2024, Jamba: A Hybrid Transformer-Mamba Language Model, arXiv:2403.19887"
CODE = ("layers/decoder.py", "layers/mamba.py", "layers/attention.py")
MATCHED = "tokens, steps, depth, width and MLPs; Mamba's mixer has 1.5 to 2 times the parameters"
SEEDS = (0, 1, 2)
TOPOLOGY = "v5p:4x4x4"  # the slice of paper scale
PATTERNS = {
    "mamba": ("mamba",) * 4,
    "quarter": ("mamba", "mamba", "attention", "mamba"),
    "half": ("mamba", "attention") * 2,
    "attention": ("attention",) * 4,
}


def get_config(scale):
    config = language_model(scale)
    small = scale in ("smoke", "cpu")
    if small:
        config.model.update(width=32 if scale == "smoke" else 64, num_layers=4)
        heads, width = 4, config.model.width
        config.model.attention.update(num_heads=heads, num_kv_heads=heads, head_dim=width // heads)
        config.model.mlp.width = 2 * width
    if scale == "paper":  # the 7B models of §6.1
        config.model.update(num_layers=32, vocab_size=65_536)
    mamba = MambaConfig(state=8 if small else 16)
    experts = MoeConfig(4 if small else 16, config.model.mlp.width, balance_weight=0.01)
    config.model.mamba = dataclasses.asdict(mamba)
    config.model.moe = dataclasses.asdict(experts)
    length, batch, steps = {"smoke": (24, 4, 6), "cpu": (96, 32, 400)}.get(
        scale, (1024, 64, 10_000)
    )
    config.recall_task = dict(task="copy", vocab_size=34)
    config.recall_length, config.recall_batch, config.recall_steps = length, batch, steps
    config.cache_length = 8 * config.data.sequence_length
    return config


def _text(pattern):
    return {"model.pattern": PATTERNS[pattern]}


def _recall(pattern):
    return {
        **_text(pattern),
        "data.source": "synthetic",
        "data.synthetic": lambda config: config.recall_task.to_dict(),
        "data.sequence_length": lambda config: config.recall_length,
        "data.batch_size": lambda config: config.recall_batch,
        "training.steps": lambda config: config.recall_steps,
        "training.eval_every": lambda config: config.recall_steps,
        "training.checkpoint_every": lambda config: max(1, config.recall_steps // 4),
        "training.optimizer.warmup_steps": lambda config: min(
            config.training.optimizer.warmup_steps, config.recall_steps // 2
        ),
    }


ARMS = (
    *(Arm(f"text_{name}", _text(name)) for name in ("mamba", "quarter", "attention")),
    Arm("text_quarter_moe", {**_text("quarter"), "model.feed_forward": ("mlp", "moe") * 2}),
    *(Arm(f"recall_{name}", _recall(name)) for name in PATTERNS),
)

CLAIMS = (
    Claim(
        "attention_recalls",
        "One layer of attention in four copies at least 10 points more symbols than Mamba alone",
        paper="Jamba, §6.2, Table 6: no number for copying itself",
        measure=difference("accuracy", "recall_quarter", "recall_mamba"),
        comparison=">",
        margin=0.1,
    ),
    Claim(
        "a_quarter_is_enough",
        "It copies at most 5 points fewer than attention in every layer",
        paper="Jamba, §6.2, Table 6: on par with attention",
        measure=difference("accuracy", "recall_quarter", "recall_attention"),
        comparison=">",
        margin=-0.05,
    ),
    Claim(
        "half_adds_little",
        "Attention in every other layer copies less than 5 points more than in one of four",
        paper="Jamba, §6.1: 1:3 and 1:7 are level",
        measure=difference("accuracy", "recall_half", "recall_quarter"),
        comparison="<",
        margin=0.05,
    ),
    Claim(
        "beats_attention",
        "On text, the hybrid's held-out loss is below attention's",
        paper="Jamba, §6.1: the hybrid is ahead",
        measure=difference("loss", "text_quarter", "text_attention"),
        comparison="<",
        margin=0.0,
    ),
    Claim(
        "beats_mamba",
        "On text, the hybrid's held-out loss is below Mamba's",
        paper="Jamba, §6.1: the hybrid is ahead",
        measure=difference("loss", "text_quarter", "text_mamba"),
        comparison="<",
        margin=0.0,
    ),
    Claim(
        "experts_help",
        "Experts in every other layer lower the hybrid's held-out loss",
        paper="Jamba, §6.3: experts improve the hybrid",
        measure=difference("loss", "text_quarter_moe", "text_quarter"),
        comparison="<",
        margin=0.0,
    ),
    Claim(
        "cache",
        "At 8 times the sequence length, the hybrid's cache and states are at most 0.3 of "
        "attention's cache",
        paper="Jamba, Table 1: 4 GB against Mixtral's 32 GB, with one layer in eight",
        measure=ratio("state_bytes", "text_quarter", "text_attention"),
        comparison="<",
        margin=0.3,
        deterministic=True,
    ),
)


check = check_unit


def run(unit: Unit):
    model = train_unit(unit).model
    found = evaluate_unit(unit, model)
    metrics = {name: found[name] for name in ("loss", "accuracy")}
    if unit.config.data.source != "synthetic":
        metrics["state_bytes"] = state_bytes(model, 1, unit.config.cache_length)
    return metrics
