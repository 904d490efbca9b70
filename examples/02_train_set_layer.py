"""Which cards on a table are part of a SET? One order-2 layer learns to say; an order-1 layer of that size does not.

A card has four attributes with three values; three cards are a SET when every attribute sums to 0 modulo 3. Any two
cards can be completed to a SET, so pairs of cards say nothing: a layer must see triples. Both layers get the same
tables, the same Adam, and exactly as many parameters.
"""

import argparse
import time
from itertools import product

import torch
from torch.nn import functional

from korder.torch import OrderKAttention

TABLE, BATCH, HELD_OUT = 12, 128, 2000
DECK = torch.tensor(list(product(range(3), repeat=4)))  # 81 cards, 4 attributes
PLACES = 3 ** torch.arange(3, -1, -1)  # a card's place in the deck


def deal(tables: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Return tables of different cards, one-hot (tables, 12, 12), and whether each card is part of a SET."""
    places = torch.rand(tables, len(DECK), generator=generator).argsort(dim=1)[:, :TABLE]
    cards = DECK[places]
    # For every two cards the one that completes them, and whether it lies on the table.
    third = ((-(cards[:, :, None] + cards[:, None, :]) % 3) * PLACES).sum(-1)
    dealt = torch.zeros(tables, len(DECK), dtype=torch.bool).scatter_(1, places, True)
    completed = dealt.gather(1, third.flatten(1)).view_as(third)
    completed &= ~torch.eye(TABLE, dtype=torch.bool)  # a card taken three times sums to 0 as well
    return functional.one_hot(cards, 3).flatten(2).float(), completed.any(-1)


class SetLayer(torch.nn.Module):
    """One attention layer and a linear readout."""

    def __init__(self, order: int, head_width: int) -> None:
        super().__init__()
        self.attention = OrderKAttention(12, order=order, heads=2, head_width=head_width, value_width=16)
        self.readout = torch.nn.Linear(12, 1)

    def forward(self, cards: torch.Tensor) -> torch.Tensor:
        """Return for each card the log-odds that it is part of a SET."""
        x = 3**0.5 * cards  # mean square 1
        # A row of zeros, an empty place, is what a card may attend to when nothing matches.
        memory = functional.pad(x, (0, 0, 0, 1))
        return self.readout(self.attention(x, memory)).squeeze(-1)


def train(model: SetLayer, steps: int, seed: int) -> None:
    """Train on freshly dealt tables."""
    generator = torch.Generator().manual_seed(seed)
    optimiser = torch.optim.Adam(model.parameters(), lr=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: min(1.0, 3.0 * (1.0 - step / steps)))
    for _ in range(steps):
        cards, truth = deal(BATCH, generator)
        loss = functional.binary_cross_entropy_with_logits(model(cards), truth.float())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()


def main() -> None:
    """Train both layers and print what they know about tables that they have not seen."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=1000, help="training steps, 128 tables each")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # threads cost more than they bring at this size

    cards, truth = deal(HELD_OUT, torch.Generator().manual_seed(arguments.seed + 1_000_000))
    share = truth.float().mean().item()
    print(f"majority guess: {max(share, 1 - share):.1%} of {truth.numel()} held-out cards")
    # Order 2 has a second projection of keys and values; order 1 gets queries and keys twice as wide instead.
    for order, head_width in ((2, 16), (1, 32)):
        torch.manual_seed(arguments.seed)
        model = SetLayer(order, head_width)
        started = time.perf_counter()
        train(model, arguments.steps, arguments.seed)
        with torch.no_grad():
            right = ((model(cards) > 0) == truth).float().mean().item()
        count = sum(parameter.numel() for parameter in model.parameters())
        print(f"order {order}: {right:.1%} right, {count} parameters, {time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()
