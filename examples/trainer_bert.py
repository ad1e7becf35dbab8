"""A compiled BERT trained by `transformers.Trainer` with its default arguments; heads alone, then the model too.

    python examples/trainer_bert.py

The texts are made up (which of three words comes first decides the class) and the BERT is tiny and untrained, so that it
runs offline in a minute. With a model and a data set of your own nothing else changes.
"""

from __future__ import annotations

import copy
import tempfile

import torch
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

from eecompile import eecompile

LENGTH, CLASSES = 12, 3


def texts(count: int, seed: int) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1 + CLASSES, 60, (count, LENGTH), generator=generator)
    labels = torch.randint(0, CLASSES, (count,), generator=generator)
    ids[:, 1] = 1 + labels
    return [{"input_ids": i, "attention_mask": torch.ones_like(i), "labels": y} for i, y in zip(ids, labels, strict=True)]


def main() -> None:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=60, hidden_size=32, num_hidden_layers=4, num_attention_heads=4, intermediate_size=64, num_labels=CLASSES
    )
    model = BertForSequenceClassification(config).eval()
    given = copy.deepcopy(model.state_dict())
    train, test = texts(512, 1), texts(256, 2)
    example = {name: torch.stack([row[name] for row in train[:8]]) for name in ("input_ids", "attention_mask")}

    fast = eecompile(model, "mebert", example_kwargs=example)
    fast.own_trunk()  # before the Trainer makes its optimizer: the user's model stays as it is
    fast.train_trunk = True  # without it the heads alone are trained
    arguments = TrainingArguments(
        output_dir=tempfile.mkdtemp(), num_train_epochs=3, learning_rate=1e-3, per_device_train_batch_size=16, report_to=[]
    )
    trainer = Trainer(model=fast, args=arguments, train_dataset=train, eval_dataset=test)
    trainer.train()
    assert all(torch.equal(value, given[name]) for name, value in model.state_dict().items())

    fast.eval()
    loader = [({n: torch.stack([r[n] for r in test]) for n in example}, torch.stack([r["labels"] for r in test]))]
    fast.set_thresholds(0.5)
    print(fast.evaluate(loader))
    print(f"Trainer.evaluate with early exits: {trainer.evaluate()}")


if __name__ == "__main__":
    main()
