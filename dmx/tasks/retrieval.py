"""Retrieval: does one ACL Anthology paper cite the other? Two byte-level texts, two classes."""

from dmx.tasks.base import TASKS, Published, Task

TASKS.register("retrieval")(
    Task(
        name="retrieval",
        family="retrieval",
        max_length=4096,
        vocab_size=512,
        num_classes=2,
        paired=True,
        image_side=None,
        generated=False,
        published=Published(counts=((147086, 18090, 17437),), shares=(0.4, 0.6)),
        cpu_steps=80,
        cpu_batch_size=8,
        preset={
            "train.batch_size": 32,
            "train.num_steps": 30000,
            "train.eval_every_steps": 300,
            "optim.warmup_steps": 800,
            "optim.learning_rate": 1.0e-4,
            "optim.weight_decay": 0.0,
            "optim.anneal": "linear",
            "attention.dropout": 0.1,
        },
    )
)
