"""The bound: a bare PyTorch loop over a job. Weights in, steps, a running sum, and no more."""

from __future__ import annotations

import torch
from peers.job import Laps, arguments
from torch.nn.functional import cross_entropy


def main() -> None:
    job, answer = arguments()
    model, laps = job.model(), Laps(job.settings)
    parameters = list(model.parameters())
    optimizer = torch.optim.SGD(parameters, job.settings.lr)
    server = [value.detach().clone() for value in parameters]
    for cohort in job.cohorts.tolist():
        total = [torch.zeros_like(value) for value in server]
        for client in cohort:
            with torch.no_grad():
                torch._foreach_copy_(parameters, server)
            for x, y in job.batches(client):
                optimizer.zero_grad()
                cross_entropy(model(x), y).backward()
                optimizer.step()
            with torch.no_grad():
                torch._foreach_add_(total, parameters, alpha=1 / len(cohort))
        server = total
        laps.lap()
    laps.write(answer, server)


if __name__ == "__main__":
    main()
