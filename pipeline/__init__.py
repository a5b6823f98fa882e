"""Preference alignment: supervised fine-tuning, then DPO on the same adapter, with proof of data and reference."""

__version__ = "0.1.0"

import os as _os

# TRL reports each trainer that is built to the hub. The network is for models that a user names, and for W&B.
_os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
# W&B reports to its makers how it is used, also from an offline run.
_os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
