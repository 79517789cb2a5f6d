"""A rank's worker with a fault after step 2."""

from __future__ import annotations

import os
import signal
import time
from typing import Any

from qwen_cl.training import worker

STEP = 2


def main(directory: str, faults: dict[int, str]) -> int:
    """The callback that injects ``faults`` by rank: a signal, ``raises``, ``sleeps`` or ``spins``."""
    from qwen_cl.training.callbacks.metrics import RunRecorder

    fault = faults.get(int(os.environ["RANK"]))
    stock = RunRecorder.on_train_batch_end

    def on_train_batch_end(self: Any, trainer: Any, *args: Any, **kwargs: Any) -> None:
        if fault is not None and trainer.global_step == STEP:
            _strike(fault)
        stock(self, trainer, *args, **kwargs)

    patched: Any = RunRecorder
    patched.on_train_batch_end = on_train_batch_end
    return worker.main(directory)


def _strike(fault: str) -> None:
    if fault.startswith("SIG"):
        os.kill(os.getpid(), signal.Signals[fault])
    elif fault == "raises":
        raise ValueError("the adapter of this rank is made of cheese")
    elif fault == "sleeps":
        while True:
            time.sleep(1000)
    while fault == "spins":
        pass
