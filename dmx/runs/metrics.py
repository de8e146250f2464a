"""Every metric key, once."""

# Metric keys. Flat on purpose: a nested key silently breaks Ray's keep-best (ray-notes.md, 5).
DEV_ACCURACY = "dev_accuracy"
DEV_LOSS = "dev_loss"
BEST_DEV_ACCURACY = "best_dev_accuracy"
BEST_STEP = "best_step"
TRAIN_LOSS = "train_loss"
TRAIN_ACCURACY = "train_accuracy"
TEST_ACCURACY = "test_accuracy"
TEST_LOSS = "test_loss"
LEARNING_RATE = "learning_rate"
GRADIENT_NORM = "gradient_norm"
STEPS = "steps"
SAMPLES = "samples"
SAMPLES_PER_SECOND = "samples_per_second"
SAMPLES_PER_SECOND_PER_WORKER = "samples_per_second_per_worker"
TOKENS_PER_SECOND = "tokens_per_second"
STEP_SECONDS = "step_seconds"
PROCESS_SECONDS = "process_seconds"
"""Seconds the run's process was busy with it: building, training, evaluating, saving."""
TRAIN_SECONDS = "train_seconds"
PEAK_MEMORY_MB = "peak_memory_mb"
PARAMETERS = "parameters"
MICRO_BATCH_SIZE = "micro_batch_size"
"""Sequences that go through the model at once; less than asked for after running out of memory."""
NUM_WORKERS = "num_workers"
"""Processes that train the run together; fewer than asked for after losing machines."""
SEGMENT_ENDED = "segment_ended"
"""The trial has ended a segment of its training and goes on in another (see pbt)."""
UNDER_WAY = "under_way"
"""No report yet: the run trains on, and could be stopped here without losing a step."""
FAILURE = "failure"
"""One line of why the trial cannot go on; a trial that reports it has FAILED."""
RESUMABLE = "resumable"
"""Beside a failure: it is the machine's or the storage's; the run can be continued."""

REPORT_KEYS = (
    *(STEPS, SAMPLES, TRAIN_LOSS, TRAIN_ACCURACY, DEV_LOSS, DEV_ACCURACY, BEST_DEV_ACCURACY),
    *(BEST_STEP, LEARNING_RATE, GRADIENT_NORM, TRAIN_SECONDS, STEP_SECONDS, SAMPLES_PER_SECOND),
    *(TOKENS_PER_SECOND, PEAK_MEMORY_MB, PARAMETERS, PROCESS_SECONDS),
    *(SAMPLES_PER_SECOND_PER_WORKER, MICRO_BATCH_SIZE, NUM_WORKERS),
)
"""What a run reports at each evaluation."""

NUM_DEV = "num_dev"
DEV_MAJORITY = "dev_majority"
"""Of the dev split that chose a checkpoint: its examples, and the share of its largest class."""
