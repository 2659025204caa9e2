"""The smallest model with an optimizer that has something to remember."""

from typing import Any

import torch
from torch import nn


def trained(seed: int, **groups: Any) -> tuple[nn.Sequential, torch.optim.AdamW]:
    """After three steps."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, **groups)
    for _ in range(3):
        train_step(model, optimizer)
    return model, optimizer


def train_step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """One more."""
    model(torch.ones(4, 2)).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()
