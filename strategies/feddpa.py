"""FedDPA: beside the federation's adapter every site has one of its own, which never leaves it.

Yang, Long, Shen, Jiang, Blumenstein, "Dual-Personalizing Adapter for Federated Foundation Models", NeurIPS 2024
(arXiv 2403.19211), with both adapters trained in every round (FedDPA-T).

In a round a site first trains its own adapter in front of the received one, which is frozen, each with its share of the sum
(`strategy.personal_share`); then it trains the received one alone and sends that. Both get the round's steps, so local work
is twice FedAvg's and traffic the same. At a site the two are summed with a share that depends on the instance: the cosine
of its last hidden state to those of five of the site's training examples, times `strategy.personal_share`
(:class:`fedllm.model.dual.ByLikeness`).

Where we differ: the site's adapter is trained from the first round on, the released code begins with the second; and that
code hands the likeness to the federation's adapter, we to the site's, so that what is like the site's data is answered by
the site's adapter.
"""

from __future__ import annotations

from dataclasses import replace

from fedllm.config import RunConfig
from fedllm.work import ClientWork
from strategies.fedavg import fedavg
from strategies.slots import Strategy
from strategies.works import Always


def feddpa(config: RunConfig) -> Strategy:
    """Choose FedAvg's slots, with a second adapter at every site."""
    work = Always(ClientWork(personal_share=config.strategy.personal_share))
    return replace(fedavg(config), name="feddpa", work=work)
