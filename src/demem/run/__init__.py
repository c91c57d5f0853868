"""The Trainer as data: read the examples of a run, weight how they are drawn, and refit its head.

Everything that has to know a ``Trainer`` is here: which loaders there are, in what order their examples come, how the
rows of several processes are put together, how modes and random state are restored, and what Lightning keeps private.
A callback of your own reads a run in three lines::

    data = RunData(trainer, pl_module)  # the callback's arguments
    rows = data.held_out.read(demem.sites.default_sites(pl_module))
    rows.y, rows.group, rows.activations["layer4"]  # (S,), (S,) or None, (S, N)
"""

from demem.run.balance import rebalance
from demem.run.cure import (
    changed_parameters,
    describe_rounds,
    read_examples,
    read_training_examples,
    refit_for_now,
    remove_and_refit,
    restored_on_failure,
    swapped_parameters,
    trained_parameters,
    write_parameters,
)
from demem.run.data import Rows, RunData, Split, UnevenRows
from demem.run.detection import check_range, describe_groups, has_learned, infer_groups_of_run
from demem.run.head import check_head, model_with_head, read_head, write_head
from demem.run.inputs import check_inputs
from demem.run.loaders import (
    draws_evenly,
    find_grouper,
    first_loader,
    has_positions,
    held_out_loader,
    kept_back_positions,
    sampler_of,
    size_of,
    train_loader,
)
from demem.run.observing import Before, observe_after, observe_before, observe_run
from demem.run.passes import (
    device_batches,
    examples,
    first_held_out_batch,
    in_extra_pass,
    in_stage,
    isolated_rng,
    undisturbed,
)
from demem.run.processes import gather_rows, ranks_of, validating_ranks
from demem.run.refusal import names_itself
from demem.run.sampling import ReweightedSampler, reweight, shuffles
from demem.run.sizes import TrainingSizes
from demem.run.stage import (
    is_dry_run,
    is_fit_validation,
    is_last_step,
    kept_checkpoints,
    on_root_device,
    resumed_within_epoch,
)
from demem.run.state import checks_version, with_version

__all__ = [
    "Before",
    "ReweightedSampler",
    "Rows",
    "RunData",
    "Split",
    "TrainingSizes",
    "UnevenRows",
    "changed_parameters",
    "check_head",
    "check_inputs",
    "check_range",
    "checks_version",
    "describe_groups",
    "describe_rounds",
    "device_batches",
    "draws_evenly",
    "examples",
    "find_grouper",
    "first_held_out_batch",
    "first_loader",
    "gather_rows",
    "has_learned",
    "has_positions",
    "held_out_loader",
    "in_extra_pass",
    "in_stage",
    "infer_groups_of_run",
    "is_dry_run",
    "is_fit_validation",
    "is_last_step",
    "isolated_rng",
    "kept_back_positions",
    "kept_checkpoints",
    "model_with_head",
    "names_itself",
    "observe_after",
    "observe_before",
    "observe_run",
    "on_root_device",
    "ranks_of",
    "read_examples",
    "read_head",
    "read_training_examples",
    "rebalance",
    "refit_for_now",
    "remove_and_refit",
    "restored_on_failure",
    "resumed_within_epoch",
    "reweight",
    "sampler_of",
    "shuffles",
    "size_of",
    "swapped_parameters",
    "train_loader",
    "trained_parameters",
    "undisturbed",
    "validating_ranks",
    "with_version",
    "write_head",
    "write_parameters",
]
