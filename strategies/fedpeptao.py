"""FedPepTAO: the layers of a prefix that changed most travel, and the server is adaptive.

Che, Liu, Zhou, Ren, Zhou, Sheng, Dai, Dou, "Federated Learning of Large Language Models with Parameter-Efficient Prompt
Tuning and Adaptive Optimization", EMNLP 2023 (arXiv 2310.15080).

A site trains the whole prefix and sends the share `strategy.layer_share` of its layers; the server averages each layer over
the sites that sent it and moves it with Adam, whose moments count the rounds of each layer by itself. A layer that nobody
sent stays as it is.

Where we differ: a layer's score is ``|delta| / |received|`` and the share is set by hand, where the paper scores layers and
chooses their number from the Hessian's eigenvalues; sites use plain AdamW, without the paper's corrected momentum.
"""

from __future__ import annotations

from dataclasses import replace

from fedllm.config import RunConfig
from fedllm.work import ClientWork
from strategies.aggregators import WeightedMean
from strategies.fedavg import fedavg
from strategies.slots import Strategy
from strategies.works import Always


def fedpeptao(config: RunConfig) -> Strategy:
    """Choose FedAvg's slots, with a share of the layers from every site."""
    work = Always(ClientWork(share=config.strategy.layer_share))
    return replace(fedavg(config), name="fedpeptao", work=work, aggregator=WeightedMean())
