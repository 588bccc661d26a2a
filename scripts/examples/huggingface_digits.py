"""Train a small network to read digits with Hugging Face's Trainer, and log it with logsync.

    python scripts/examples/huggingface_digits.py
    torchrun --standalone --nproc-per-node 2 scripts/examples/huggingface_digits.py

The digits come with scikit-learn; nothing is downloaded. `--resume` goes on from the last checkpoint, with as many
ranks as there are then.
"""

from __future__ import annotations

import argparse

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import nn
from transformers import EvalPrediction, PretrainedConfig, PreTrainedModel, Trainer, TrainingArguments
from transformers.modeling_outputs import SequenceClassifierOutput

from logsync.workers.integrations.huggingface import LogsyncCallback


class DigitsModel(PreTrainedModel):
    config_class = PretrainedConfig

    def __init__(self, config: PretrainedConfig) -> None:
        super().__init__(config)
        self.layers = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
        self.post_init()

    def forward(self, pixels: torch.Tensor, labels: torch.Tensor | None = None) -> SequenceClassifierOutput:
        logits = self.layers(pixels)
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return SequenceClassifierOutput(loss=loss, logits=logits)


def main() -> None:
    args = parse_args()
    images, labels = load_digits(return_X_y=True)
    digits = [
        {"pixels": torch.tensor(image, dtype=torch.float32) / 16, "labels": int(label)}
        for image, label in zip(images, labels, strict=True)
    ]

    trainer = Trainer(
        model=DigitsModel(PretrainedConfig()),
        args=TrainingArguments(
            output_dir=args.output_dir,
            max_steps=args.steps,
            per_device_train_batch_size=32,
            gradient_accumulation_steps=2,
            learning_rate=3e-3,
            logging_steps=10,
            logging_first_step=True,
            eval_strategy="steps",
            eval_steps=15,
            save_steps=15,
            use_cpu=True,
            report_to="none",
            disable_tqdm=True,
        ),
        train_dataset=digits[:1500],
        eval_dataset=digits[1500:],
        compute_metrics=accuracy,
        callbacks=[LogsyncCallback(run_dir=f"{args.output_dir}/log")],
    )
    trainer.train(resume_from_checkpoint=args.resume or None)
    trainer.save_state()


def accuracy(predicted: EvalPrediction) -> dict[str, float]:
    return {"accuracy": float(np.mean(np.argmax(predicted.predictions, axis=-1) == predicted.label_ids))}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--output-dir", default="runs/huggingface-digits")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint in the output folder")
    return parser.parse_args()


if __name__ == "__main__":
    main()
