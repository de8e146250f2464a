"""Ray: the connection, what a cluster has, runs as actors, shared GPUs.

This package is imported before Ray: it sets what Ray reads from the environment.
"""

import logging
import os

# Read by Ray at import. The trial's files are ours, so Ray must not move the working directory,
# and must not write its own TensorBoard, CSV and JSON files beside them (ray-notes.md, 3 and 7).
os.environ.setdefault("RAY_CHDIR_TO_TRIAL_DIR", "0")
os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_SYNCER", "1")
os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
os.environ.setdefault("TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S", "0")
# Our journal is what a study is rebuilt from; Ray's snapshots would only cost time.
os.environ.setdefault("TUNE_GLOBAL_CHECKPOINT_S", "86400")
# Ray speaks of trials by names that mean nothing to a user; what matters we say ourselves.
for _name in ("ray.tune", "ray.train", "ray.air"):
    logging.getLogger(_name).setLevel(logging.CRITICAL)
