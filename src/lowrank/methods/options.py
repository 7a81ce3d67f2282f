"""What each argument of the methods in the catalogue means, in a sentence: for help, and read without an import.

Where a method's own docstring explains an argument, that stands.
"""

from __future__ import annotations

OPTIONS = {
    "target_modules": "which layers: a name, pattern, list, or group (all-linear, attention, q k v o, mlp, …)",
    "exclude_modules": "layers that are left out of them",
    "rest": "every parameter that is not chosen: train, freeze, or auto (train what was drawn at random, freeze what "
    "was loaded); under several ranks also local",
    "freeze": "parameters that do not train in any case, by name or pattern",
    "ties": "an output layer tied to its embedding: adapt both, leave the embedding as it is, or untie them",
    "rank": "columns of the factors, or dimensions of the subspace: more is nearer to full training, and costs more",
    "alpha": "scale of an adapter: its change counts alpha/rank (rslora: alpha/√rank)",
    "dropout": "share of an adapter's inputs set to zero in training",
    "ratio": "how many times faster B learns than A",
    "heads": "factors side by side, each layer's change being their mean",
    "inner": "the rule of the local steps: adamw or muon",
    "init": "how A is drawn: orthogonal, kaiming, or reference (as the authors' code, for alpha 4096)",
    "merge_every": "steps between merges of the factors into the weights",
    "keep": "go on with the factors after a merge, subtracting what was merged, instead of starting them anew",
    "forget": "share of the factors' moments set to zero at a merge; 1 starts them anew",
    "outer_lr": "step of an outer optimizer at merges (DiLoCo: 0.7); 1 merges plainly",
    "outer_momentum": "Nesterov momentum of the outer optimizer (DiLoCo: 0.9)",
    "exchange": "what travels between ranks: float32, rounded to bfloat16 or int8, or with error feedback in 2bit, or "
    "the largest 3 or 1 % of the numbers in 2 bits (topk3, topk1)",
    "weigh": "what a rank's heads weigh in the mean: equal, or by tokens, steps or seconds since the last merge",
    "overlap": "what is sent at one merge arrives at the next, while training goes on",
    "fragments": "groups of matrices that merge at different steps of the interval, so that less is sent at once",
    "rest_every": "over several ranks, steps between two averages of a rest that trains locally",
    "restart_warmup": "steps in which the learning rate climbs again after each merge",
    "refresh_every": "steps between two fits of the subspace to the gradient",
    "scale": "multiplies every step made in the subspace; of muon, dion and lora_muon: how long steps are (rms, "
    "keller, spectral, none)",
    "basis": "how the subspace is found: power (warm power iteration), svd (exact, slow), gaussian (random)",
    "outside": "steps by sign outside the subspace, in learning rates",
    "follow": "how far the subspace follows the momentum and not the gradient alone, from 0 to 1",
    "side": "the projected side of a matrix: the short one (as in the paper), or left, right, long",
    "transport": "what becomes of the moments at a refresh: keep them as they are, rotate them along (as statistics: "
    "mean and variance), or reset them",
    "lazy": "refresh less often where the subspace stands still (Q-GaLore)",
    "embeddings": "the rule of embeddings and output layer, which are not projected unless it says so",
    "basis_storage": "how the basis is kept: float32, bfloat16, int8 or int4",
    "storage": "how the optimizer's state is kept: float32, bfloat16, or int8 (in blocks)",
    "momentum": "share of the momentum that is kept from step to step",
    "nesterov": "step by the gradient and the momentum, as one step ahead",
    "iterations": "rounds of Newton and Schulz, by which the momentum is orthogonalised",
    "precision": "of those rounds: float32 or bfloat16",
    "largest": "a side of a matrix that is longer than this has no basis",
    "beta1": "decay of a first moment; none: it keeps none",
    "clip_threshold": "the largest root mean square of an update",
    "decay_rate": "exponent by which the second moment's decay nears 1, below 0",
    "scale_parameter": "multiply each step by the root mean square of its parameter",
    "relative_step": "multiply steps by min(0.01, 1/√t)",
    "embedding_lr": "ratio of the embeddings' learning rate to the run's",
    "head_lr": "ratio of the output layer's learning rate to the run's, where it is not tied",
    "vector_lr": "ratio of the learning rate of norms and biases to the run's",
    "embedding_decay": "ratio of the embeddings' weight decay to the run's; 0 for none",
    "head_decay": "ratio of the output layer's weight decay to the run's; 0 for none",
    "vector_decay": "ratio of the weight decay of norms and biases to the run's; 0 for none",
    "betas": "decay of Adam's two moments, such as 0.9,0.95; none: as the rule has them",
    "eps": "added to the root of Adam's second moment; none: as the rule has it",
}
