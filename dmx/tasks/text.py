"""Text: byte-level IMDB sentiment, two classes."""

from dmx.tasks.base import TASKS, Published, Task

TASKS.register("text")(
    Task(
        name="text",
        family="text",
        max_length=4096,
        vocab_size=512,
        num_classes=2,
        paired=False,
        image_side=None,
        generated=False,
        published=Published(counts=((25000, 25000, 25000),), shares=(0.5, 0.5)),
        cpu_steps=320,
        cpu_batch_size=16,
        preset={
            "train.batch_size": 32,
            "train.num_steps": 20000,
            "train.eval_every_steps": 500,
            "optim.warmup_steps": 8000,
            "optim.learning_rate": 1.0e-4,
            "optim.weight_decay": 0.0,
            "optim.anneal": "linear",
            "attention.dropout": 0.1,
        },
    )
)
