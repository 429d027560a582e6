"""Mixture of experts: Switch Transformer (Fedus 2021, arXiv:2101.03961) and its successors.

Switch sends each token to one of many MLPs: more parameters at the same FLOPs. Table 1 (negative
log perplexity after 100,000 steps): T5-Base −1.731, Switch-Base with capacity factors of 2.0, 1.25
and 1.0: −1.554, −1.553, −1.561; it reaches T5-Base's quality 7 times faster (Figure 5). A loss
keeps the experts' loads even (eq. 4), and an expert drops what exceeds its capacity (eq. 3).
Mixtral 8x7B (Jiang 2024, arXiv:2401.04088) has two experts per token and is as good as a dense
model of five times its active parameters (Table 2). MegaBlocks (Gale 2022, arXiv:2211.15841) drops
nothing; DeepSeek-V3 (arXiv:2412.19437, §2.1.2) balances by a bias instead of a loss.

Here every MLP of a decoder is replaced by 8 experts. A token uses one expert as wide as the dense
MLP, or two of half that width, so its FLOPs are those of the dense model (without the router).
A capacity counts the tokens of a row, where the paper's counts those of a device. Slots are given
in order of time, so that the content of a token does not change the experts of earlier ones. The
documents that are packed into a row share its capacity, so a document's tokens are dropped
depending on the documents before it (``capacity_group="segment"`` would count each apart).

    ablate run architecture/moe --scale=smoke    # a few steps, no findings
    ablate run architecture/moe                  # cpu: 2 cores; time in `ablate list`
    ablate run architecture/moe --scale=gpu      # one accelerator
    ablate run architecture/moe --scale=paper    # Switch-Base, 128 experts; 64 chips of TPU v5p
"""

import dataclasses

import numpy as np

from layers.routing import MoeConfig
from research.ablation import Arm, Claim, Unit, difference, mean
from research.ablation.language_model import (
    check_unit,
    eval_losses,
    evaluate_unit,
    language_model,
    train_unit,
)

PAPER = "Fedus 2021, Switch Transformers: Scaling to Trillion Parameter Models, arXiv:2101.03961"
CODE = ("layers/routing.py", "layers/moe.py")
MATCHED = (
    "tokens, steps and FLOPs a token (but for capacity that stays empty); the mixtures have as "
    "many times the MLP's parameters as experts, or half as many where they are of half the width"
)
SEEDS = (0, 1, 2, 3, 4)  # effects are small compared with the spread over seeds
TOPOLOGY = "v5p:4x4x4"  # the slice of paper scale
EVALUATIONS = 16  # during the training


def get_config(scale):
    config = language_model(scale)
    experts = 8
    if scale == "paper":  # Switch-Base (Table 9)
        experts = 128
        config.model.update(width=768, num_layers=12, vocab_size=32_128)
        config.model.attention.update(num_heads=12, num_kv_heads=12, head_dim=64)
        config.model.mlp.update(width=2048, activation="geglu_tanh")
        config.data.update(sequence_length=512, batch_size=2048)
        config.mesh.expert = 16
    mlp = config.model.mlp
    switch = MoeConfig(
        experts,
        mlp.width,
        top_k=1,
        activation=mlp.activation,
        normalize=False,
        capacity_factor=1.25,
        capacity_group="row",
        balance_weight=0.01,
        jitter=0.01,
    )
    config.model.moe = dataclasses.asdict(switch)
    config.training.eval_every = -(-config.training.steps // EVALUATIONS)
    return config


MIXTURE = {"model.feed_forward": ("moe",)}
DROPLESS = {
    **MIXTURE,
    "model.moe.capacity_factor": None,
    "model.moe.capacity_group": "segment",
}
TOP_2 = {
    **DROPLESS,
    "model.moe.top_k": 2,
    "model.moe.width": lambda config: config.model.mlp.width // 2,
    "model.moe.router": "choice_softmax",
    "model.moe.jitter": 0.0,
}

ARMS = (
    Arm("dense", {"mesh.expert": 1}),
    Arm("switch", MIXTURE),
    Arm("switch_unbalanced", {**MIXTURE, "model.moe.balance_weight": 0.0}),
    Arm("switch_capacity_1", {**MIXTURE, "model.moe.capacity_factor": 1.0}),
    Arm("switch_capacity_2", {**MIXTURE, "model.moe.capacity_factor": 2.0}),
    Arm("switch_dropless", DROPLESS),
    Arm("top_2", TOP_2),
    Arm(
        "top_2_bias",
        {
            **TOP_2,
            "model.moe.router": "sigmoid",
            "model.moe.balance_weight": 0.0,
            "model.moe.bias_rate": 0.01,
        },
    ),
)


def speedup(arm, baseline):
    """Steps of ``baseline`` / steps of ``arm`` to the final loss of ``baseline``; 0 if never."""

    def measure(results):
        ratios = []
        for curve, target in zip(
            results.metric(arm, "losses"), results.metric(baseline, "loss"), strict=True
        ):
            reached = np.flatnonzero(curve <= target)
            if not len(reached):
                ratios.append(0.0)
                continue
            i = reached[0]
            # interpolate linearly between two evaluations
            part = (curve[i - 1] - target) / (curve[i - 1] - curve[i]) if i else 1.0
            ratios.append(len(curve) / (i + part))
        return np.array(ratios)

    return measure


CLAIMS = (
    Claim(
        "switch_beats_dense",
        "At equal steps and FLOPs, Switch's held-out loss is below the dense model's",
        paper="Table 1: −1.553 against −1.731",
        measure=difference("loss", "switch", "dense"),
        comparison="<",
        margin=0.0,
    ),
    Claim(
        "switch_is_faster",
        "Switch reaches the dense model's final loss at least 1.25 times as fast",
        paper="Figure 5: 7 times, with 64 experts",
        measure=speedup("switch", "dense"),
        comparison=">",
        margin=1.25,
    ),
    Claim(
        "two_beat_dense",
        "At equal steps and FLOPs, two experts of half the width have a loss below the dense one's",
        paper="Mixtral, Table 2: level with 5 times its active parameters",
        measure=difference("loss", "top_2", "dense"),
        comparison="<",
        margin=0.0,
    ),
    Claim(
        "the_loss_balances",
        "The balance loss raises the entropy of the experts' loads by more than 0.02 of its range",
        paper="§2.2, eq. 4: no number",
        measure=difference("router_entropy", "switch", "switch_unbalanced"),
        comparison=">",
        margin=0.02,
    ),
    Claim(
        "imbalance_drops",
        "Without the balance loss, at least 2% more of all tokens are dropped",
        paper="§2.2: no number",
        measure=difference("router_drop_rate", "switch_unbalanced", "switch"),
        comparison=">",
        margin=0.02,
    ),
    Claim(
        "capacity_trades_drops",
        "With a capacity factor of 1, at least 2% more of all tokens are dropped than with 2",
        paper="§2.2: under 1% are dropped",
        measure=difference("router_drop_rate", "switch_capacity_1", "switch_capacity_2"),
        comparison=">",
        margin=0.02,
    ),
    Claim(
        "small_capacity_suffices",
        "With a capacity factor of 1, the loss is less than 0.02 nats above that with 2",
        paper="Table 1: −1.561 against −1.554",
        measure=difference("loss", "switch_capacity_1", "switch_capacity_2"),
        comparison="<",
        margin=0.02,
    ),
    Claim(
        "dropless_is_no_worse",
        "Dropping no token, the loss is less than 0.01 nats above that with a capacity of 1.25",
        paper="MegaBlocks, §6.1: the same loss as a mixture without drops",
        measure=difference("loss", "switch_dropless", "switch"),
        comparison="<",
        margin=0.01,
    ),
    Claim(
        "bias_balances",
        "Balanced by biases alone, the entropy of the loads is above 0.95 of its range",
        paper="DeepSeek-V3, §4.5.2: no number",
        measure=mean("router_entropy", "top_2_bias"),
        comparison=">",
        margin=0.95,
    ),
    Claim(
        "bias_is_no_worse",
        "Balanced by biases, the loss is less than 0.01 nats above that with the balance loss",
        paper="DeepSeek-V3, Table 5: better on most benchmarks",
        measure=difference("loss", "top_2_bias", "top_2"),
        comparison="<",
        margin=0.01,
    ),
)


check = check_unit


def run(unit: Unit):
    model = train_unit(unit).model
    metrics = evaluate_unit(unit, model)
    metrics.pop("router_z", None)
    return {**metrics, "losses": eval_losses(unit)}
