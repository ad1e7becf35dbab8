"""What is minimised when exits are trained: small classes, by name, saved in artifacts as plain dicts.

An objective takes the `Result` of `fast.run(x)` in train mode (outputs of E exits and, last, of the model
itself) and labels, and gives one differentiable scalar. Outputs are `[B, C]` or `[B, S, C]` with labels
`[B]` or `[B, S]` of class indices, -100 left out.

| name | loss |
|---|---|
| exits | what strategies with exits ask for: the next three, put together from options |
| weighted_cross_entropy | sum of w_k CE(output_k, labels), w normalised to 1 (BranchyNet 2016) |
| distillation | (1 - alpha) CE + alpha T^2 KL(last / T, output_k / T) (Hinton et al. 2015) |
| adaloss | cross entropy or distillation, weights inverse to each one's running mean (Hu et al. 2019) |
| ensemble | mean CE of what exits answer together; trains its weights alone (Zero Time Waste, Wolczyk et al. 2021) |
| exit_score | BCE of the learned exit score against "this exit is right" (BERxiT, Xin et al. 2021) |
| ponder | mean ponder cost of adaptive computation time (Graves 2016) |
| pondernet | expected loss over where a row stops + beta x KL from a geometric prior (Banino et al. 2021) |
| depth_targets | cross entropy at every depth, and of the choice of depth against targets (Elbayad et al. 2020) |
| regret | cross entropy of the route that a row takes, weighted by regret: loss + price x cost of every one |
| choice_cost | price x mean cost of gated or routed rows, the price steered towards a target cost |
| reinforce | policy gradient of sampled gates or routes: task reward - price x cost, baseline, entropy (SkipNet 2018) |
| sum | any of them added, with weights; also written "a+b" |
| per_exit_loss | a function `(output, labels) -> scalar` of the user, for tasks that are not classification |
"""

from eecompile.training.objectives.adaloss import AdaLoss
from eecompile.training.objectives.base import (
    OBJECTIVES,
    Objective,
    Weights,
    check_weights,
    cross_entropy,
    divergence,
    heads_of,
    objective,
    outputs_of,
    register,
    weighted,
)
from eecompile.training.objectives.choices import ChoiceCost, Priced, Regret, Reinforce
from eecompile.training.objectives.depth import DepthTargets
from eecompile.training.objectives.exits import Distillation, Ensemble, Exits, ExitScore, WeightedCrossEntropy
from eecompile.training.objectives.general import Loss, PerExitLoss, Sum
from eecompile.training.objectives.ponder import Ponder
from eecompile.training.objectives.pondernet import PonderNet
from eecompile.training.objectives.price import Price, Steering

register(
    AdaLoss,
    Exits,
    WeightedCrossEntropy,
    Distillation,
    Ensemble,
    ExitScore,
    ChoiceCost,
    Regret,
    Reinforce,
    DepthTargets,
    PerExitLoss,
    Ponder,
    PonderNet,
    Sum,
)

__all__ = [
    "OBJECTIVES",
    "AdaLoss",
    "ChoiceCost",
    "DepthTargets",
    "Distillation",
    "Ensemble",
    "ExitScore",
    "Exits",
    "Loss",
    "Objective",
    "PerExitLoss",
    "Ponder",
    "PonderNet",
    "Price",
    "Priced",
    "Regret",
    "Reinforce",
    "Steering",
    "Sum",
    "WeightedCrossEntropy",
    "Weights",
    "check_weights",
    "cross_entropy",
    "divergence",
    "heads_of",
    "objective",
    "outputs_of",
    "register",
    "weighted",
]
