"""``python -m benchmarks speed remover``: what the remover adds to the training time of ERM with the same epochs.

Both fits take turns.  Besides the two clocks, a row has the CPU seconds of both, which on a busy machine say more.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from statistics import median

import torch

from benchmarks.experiment import TASKS, Experiment, Settings, add_task_options
from benchmarks.options import Parser
from benchmarks.results import append_jsonl
from demem.callbacks import MemorizationRemover


def main(argv: list[str]) -> int:
    parser = Parser("speed remover", __doc__)
    add_task_options(parser)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("results/speed"))
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    settings = Settings(options.data_root, options.weights, options.cache)
    seconds: dict[str, list[tuple[float, float]]] = {"erm": [], "demem": []}
    for seed in range(options.rounds):
        experiment = Experiment(TASKS[options.data], settings, seed, epochs=options.epochs)
        for name, times in seconds.items():
            data = experiment.data()  # not timed: made anew, or read from disk
            start = time.perf_counter(), time.process_time()
            remover = [MemorizationRemover(seed=seed)] if name == "demem" else []
            experiment.fit(data=data, callbacks=remover, validate=True)  # both validate every epoch
            times.append((time.perf_counter() - start[0], time.process_time() - start[1]))
    row: dict[str, object] = {"what": "remover", "data": options.data, "threads": options.threads}
    for i, clock in enumerate(("s", "cpu_s")):
        erm, ours = ([t[i] for t in seconds[name]] for name in ("erm", "demem"))
        added = [b / a - 1 for a, b in zip(erm, ours, strict=True)]
        row |= {f"erm_{clock}": median(erm), f"demem_{clock}": median(ours), f"added_{clock}": median(added)}
        row |= {f"added_{clock}_low": min(added), f"added_{clock}_high": max(added)}
    append_jsonl(options.out / "speed.jsonl", {**row, "rounds": options.rounds})
    print(json.dumps(row))
    return 0
