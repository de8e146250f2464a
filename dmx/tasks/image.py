"""Image: CIFAR-10 in grey, one token a pixel, ten classes."""

from dmx.tasks.base import TASKS, Published, Task

TASKS.register("image")(
    Task(
        name="image",
        family="image",
        max_length=1024,
        vocab_size=512,
        num_classes=10,
        paired=False,
        image_side=32,
        generated=False,
        # The reference's pickles have two training images more (docs/quirks.md).
        published=Published(counts=((45000, 5000, 10000), (45002, 5000, 10000)), shares=(0.1, 0.1)),
        preset={
            "train.batch_size": 256,
            "train.num_steps": 35000,
            "train.eval_every_steps": 175,
            "optim.warmup_steps": 175,
            "optim.learning_rate": 1.0e-4,
            "optim.weight_decay": 0.0,
            "optim.anneal": "linear",
            "attention.dropout": 0.1,
        },
    )
)
