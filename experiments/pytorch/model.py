"""ResNet-18 for small images in PyTorch, as torchvision would have it with a CIFAR stem."""

import torch
from torch import nn
from torch.nn import functional


class Block(nn.Module):
    """Basic residual block, with a projection shortcut where asked."""

    def __init__(self, inputs: int, filters: int, stride: int, project: bool):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, filters, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(filters)
        self.conv2 = nn.Conv2d(filters, filters, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(filters)
        self.shortcut = nn.Identity()
        if project:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inputs, filters, 1, stride, bias=False), nn.BatchNorm2d(filters)
            )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = functional.relu(self.norm1(self.conv1(x)))
        return functional.relu(self.norm2(self.conv2(y)) + self.shortcut(x))


def resnet18(
    channels: int = 3, width: float = 1.0, first_shortcut: str = "projection"
) -> nn.Module:
    """The encoder: `[n, channels, h, w] -> [n, 512 width]`.

    Args:
      channels: of the images.
      width: factor on the numbers of filters.
      first_shortcut: "projection" or "identity", of the first block.
    """
    inputs = int(64 * width)
    stem = [nn.Conv2d(channels, inputs, 3, 1, 1, bias=False), nn.BatchNorm2d(inputs), nn.ReLU()]
    blocks = []
    for group in range(4):
        filters = int(64 * width) * 2**group
        project = group > 0 or first_shortcut == "projection"
        blocks += [Block(inputs, filters, 2 if group else 1, project)]
        blocks += [Block(filters, filters, 1, False)]
        inputs = filters
    model = nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return model


def projection(inputs: int, layers: tuple[int, ...]) -> nn.Module:
    """Linear layers with ReLU between them, the last one without a bias."""
    parts: list[nn.Module] = []
    for size in layers[:-1]:
        parts += [nn.Linear(inputs, size), nn.ReLU()]
        inputs = size
    return nn.Sequential(*parts, nn.Linear(inputs, layers[-1], bias=False))


def supcon_loss(features: torch.Tensor, labels: torch.Tensor, temperature: float) -> torch.Tensor:
    """Eq. 2 for features `[n, dim]` of length 1 with labels `[n]`, the mean over the anchors."""
    logits = features @ features.T / temperature
    itself = torch.eye(len(labels), dtype=torch.bool, device=labels.device)
    logits = logits.masked_fill(itself, -torch.inf)
    positive = (labels[:, None] == labels[None]) & ~itself
    log_ratios = (logits - logits.logsumexp(1, keepdim=True)).masked_fill(~positive, 0.0)
    return -(log_ratios.sum(1) / positive.sum(1)).mean()
