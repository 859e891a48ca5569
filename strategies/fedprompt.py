"""FedPrompt: the weighted mean of soft prompts.

Zhao, Du, Li, Li, Liu, "FedPrompt: Communication-Efficient and Privacy-Preserving Prompt Tuning in Federated Learning",
ICASSP 2023 (arXiv 2208.12268).

Sites train a soft prompt on the frozen base; the server averages the prompts, weighted by examples. A prompt enters the
model linearly as it is, so unlike LoRA's factors its mean is what it should be: there is no product whose mean differs.
All prompts start from the same rows of the base's vocabulary, since those that start apart mean different things.

Where we differ: the paper sends prompts and averages those; we send differences to the state that a site received, which
comes to the same mean, and any server optimizer may move along it. P-tuning's network is averaged as it is, which is FedAvg
on its weights, not the mean of the prompts that it computes.
"""

from __future__ import annotations

from dataclasses import replace

from fedllm.config import RunConfig
from strategies.fedavg import fedavg
from strategies.slots import Strategy


def fedprompt(config: RunConfig) -> Strategy:
    """Choose FedPrompt's four slots: FedAvg's, on soft prompts."""
    return replace(fedavg(config), name="fedprompt")
