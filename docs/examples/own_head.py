"""A backbone between layers of one's own: patches of small pictures in, a class out; then one step at a time."""

import torch
import torch.nn.functional as F
from torch import nn

import zoo


class Pictures(nn.Module):
    """Pictures (B, 1, 8, 8) to logits (B, classes): 16 patches of 2 x 2 pixels, through a non-causal backbone."""

    def __init__(self, pattern: str, d_model: int = 32, classes: int = 2):
        super().__init__()
        self.patches = nn.Conv2d(1, d_model, kernel_size=2, stride=2)
        self.places = nn.Parameter(0.02 * torch.randn(16, d_model))
        self.backbone = zoo.create_backbone(pattern, d_model=d_model, causal=False)
        self.norm = nn.RMSNorm(d_model)  # the backbone gives the residual stream
        self.head = nn.Linear(d_model, classes)

    def forward(self, pictures: torch.Tensor) -> torch.Tensor:
        x = self.patches(pictures).flatten(2).transpose(1, 2) + self.places
        x, _ = self.backbone(x)
        return self.head(self.norm(x).mean(1))


def bars(n: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Noisy pictures of a horizontal (0) or a vertical (1) bar."""
    classes, places = torch.randint(2, (n,)), torch.randint(8, (n,))
    pictures = 0.2 * torch.randn(n, 1, 8, 8)
    for i in range(n):
        if classes[i]:
            pictures[i, 0, :, places[i]] += 1
        else:
            pictures[i, 0, places[i]] += 1
    return pictures, classes


torch.manual_seed(0)
model = Pictures("2*(gqa(n_heads=2) swiglu)")
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
for _ in range(80):
    pictures, classes = bars(32)
    loss = F.cross_entropy(model(pictures), classes)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
pictures, classes = bars(200)
accuracy = (model(pictures).argmax(-1) == classes).float().mean().item()
print(f"bars: accuracy {accuracy:.2f}")

# A policy, or a filter of a stream: one step at a time, at irregular times, from state to state.
policy = zoo.create_backbone("cfc swiglu", d_model=32)
state = policy.init_state(batch_size=4)
for _ in range(5):
    features, waited = torch.randn(4, 32), torch.rand(4, 1)  # what was seen, and how long after the step before
    features, state = policy.step(features, state, zoo.Context(timespans=waited))
print(f"policy: features {tuple(features.shape)}")
