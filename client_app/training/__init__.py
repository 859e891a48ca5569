"""Local training: so many optimizer steps on the site's own batches, changing the adapter and nothing else."""

from client_app.training.control import StepControl
from client_app.training.drift import DriftControl
from client_app.training.loop import train
from client_app.training.plan import StepReport, TrainPlan, TrainResult, learning_rate_at
from client_app.training.tail import TailPenalty

__all__ = [
    "DriftControl",
    "StepControl",
    "StepReport",
    "TailPenalty",
    "TrainPlan",
    "TrainResult",
    "learning_rate_at",
    "train",
]
