"""ListOps: nested MIN/MAX/MED/SM expressions over digits, ten classes."""

from dmx.tasks.base import TASKS, Published, Task

TASKS.register("listops")(
    Task(
        name="listops",
        family="listops",
        max_length=2048,
        vocab_size=32,
        num_classes=10,
        paired=False,
        image_side=None,
        generated=True,
        published=Published(counts=((96000, 2000, 2000),), shares=(0.06, 0.18)),
        cpu_steps=160,
        cpu_batch_size=16,
        preset={
            "train.batch_size": 32,
            "train.num_steps": 5000,
            "train.eval_every_steps": 50,
            "optim.warmup_steps": 1000,
            "optim.learning_rate": 1.0e-4,
            "optim.weight_decay": 0.0,
            "optim.anneal": "linear",
            "attention.dropout": 0.1,
        },
    )
)
