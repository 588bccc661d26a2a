"""Run the example with Hugging Face's Trainer, and then what only a hostile script does."""

from __future__ import annotations

import json
import runpy
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from logsync.workers.integrations.huggingface import LogsyncCallback

EXAMPLE, FOLDER = sys.argv[1], Path(sys.argv[2])


class Restless(Trainer):
    """Logs from inside its steps, on rank 0 only."""

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        if model.training:
            (callback,) = (one for one in self.callback_handler.callbacks if isinstance(one, LogsyncCallback))
            callback.training_log.record({"images": len(inputs["labels"])}, reduce="sum")
            if dist.get_rank() == 0:
                inside: dict[str, Any] = {"inside": float(self.state.global_step), "note": "no number"}
                self.log(inside)
        return loss


class AsksOnOneRank(TrainerCallback):
    """Asks for a log where the other rank does not: the Trainer alone would hang in its next collective."""

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        control.should_log = state.global_step % 2 == dist.get_rank()
        return control


def run_example(*arguments: str) -> dict[str, Any]:
    sys.argv = [EXAMPLE, *arguments]
    return runpy.run_path(EXAMPLE, run_name="__main__")


def forget_logsync() -> None:
    """Leave a checkpoint as it would be if logsync had not been there when it was made."""
    checkpoint = FOLDER / "older" / "checkpoint-15"
    shutil.copytree(FOLDER / "example" / "checkpoint-15", checkpoint)
    state = json.loads((checkpoint / "trainer_state.json").read_text())
    del state["stateful_callbacks"]["LogsyncCallback"]
    (checkpoint / "trainer_state.json").write_text(json.dumps(state))


def main() -> None:
    example = run_example("--output-dir", str(FOLDER / "example"), "--steps", "40")
    if dist.get_rank() == 0:
        forget_logsync()
    dist.barrier()
    run_example("--output-dir", str(FOLDER / "older"), "--steps", "20", "--resume")

    digits = [{"pixels": torch.rand(64), "labels": label % 10} for label in range(64)]
    callback = LogsyncCallback(7, run_dir=FOLDER / "agreed", sinks=["jsonl"])
    trainer = Restless(
        model=example["DigitsModel"](example["PretrainedConfig"]()),
        args=TrainingArguments(
            output_dir=str(FOLDER / "second"),
            max_steps=20,
            per_device_train_batch_size=4,
            logging_steps=3,
            save_strategy="no",
            use_cpu=True,
            report_to="none",
            disable_tqdm=True,
        ),
        train_dataset=digits,
        eval_dataset=digits,
        callbacks=[AsksOnOneRank(), callback],
    )
    trainer.train()
    trained = len(trainer.state.log_history)
    trainer.evaluate()
    result = {"history": trainer.state.log_history, "trained": trained}
    (FOLDER / f"result.rank{dist.get_rank()}.json").write_text(json.dumps(result))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
