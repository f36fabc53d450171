"""Evaluators: what a model can do on held-out clips, measured during or after training.

The contract. An evaluator is one file of this folder with a class `Evaluator`, and one line in
`EVALUATORS`. It is made once, with keyword arguments only, and has one method:

    run(params, step) -> iterator of (name, value)

    params: the parameter tree to judge, as the train step holds it; never changed, never donated.
    step: the global step (updates done), for naming files; it must not change any value.
    name: letters, digits and underscores; the caller adds the prefix `eval/<evaluator>/`.
    value: a Python float, the same on every process.

All processes call `run` together. Averages are `losses.Mean`s over rows whose `valid` is true, divided
once at the end, so that padding rows and the batch size change nothing. What is random comes from
`batch["position"]`, so that each evaluation sees the same masks, on any number of devices and hosts.
Only process 0 writes files.
"""

from invideo_jax.registry import Registry

EVALUATORS = Registry(
    "evaluator",
    {
        "reconstruction": "invideo_jax.evals.reconstruction:Evaluator",
    },
)
