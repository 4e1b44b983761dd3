"""Networks for 32x32 images: the CIFAR ResNets, MobileNet-V2 with the strides that such images want, VGG-16."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional


class PadShortcut(nn.Module):
    """The shortcut without parameters: every second pixel, new channels filled with zeros.

    "Deep residual learning for image recognition" (He et al., 2015), section 4.2, option A. The new
    channels are divided evenly before and after the old ones.
    """

    def __init__(self, new_channels: int, stride: int) -> None:
        super().__init__()
        self.before = new_channels // 2
        self.after = new_channels - self.before
        self.stride = stride

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, C, H, W) to (N, C + new channels, H / stride, W / stride)."""
        x = x[:, :, :: self.stride, :: self.stride]
        return functional.pad(x, (0, 0, 0, 0, self.before, self.after))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut around them."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        same = stride == 1 and in_channels == out_channels
        self.shortcut: nn.Module = nn.Identity() if same else PadShortcut(out_channels - in_channels, stride)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = functional.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return functional.relu(out + self.shortcut(x))


class CifarResNet(nn.Module):
    """The ResNet of 6n+2 layers for 32x32 images (He et al., 2015, section 4.2), widths 16, 32 and 64.

    Args:
        blocks: n, the blocks of each of the three stages (3 for ResNet-20, 9 for ResNet-56).
        num_classes: Outputs of the last layer.
    """

    def __init__(self, blocks: int, num_classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = _stage(16, 16, blocks, stride=1)
        self.layer2 = _stage(16, 32, blocks, stride=2)
        self.layer3 = _stage(32, 64, blocks, stride=2)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.linear = nn.Linear(64, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, 3, H, W) to logits (N, classes)."""
        out = functional.relu(self.bn1(self.conv1(x)))
        out = self.layer3(self.layer2(self.layer1(out)))
        logits: torch.Tensor = self.linear(torch.flatten(self.pool(out), 1))
        return logits


def _stage(in_channels: int, out_channels: int, blocks: int, stride: int) -> nn.Sequential:
    first = BasicBlock(in_channels, out_channels, stride)
    return nn.Sequential(first, *(BasicBlock(out_channels, out_channels, 1) for _ in range(blocks - 1)))


def cifar_resnet20(num_classes: int = 10) -> nn.Module:
    """ResNet-20: 0.27 M parameters, 41 M MACs at 32x32."""
    return CifarResNet(3, num_classes)


def cifar_resnet32(num_classes: int = 10) -> nn.Module:
    """ResNet-32: 0.46 M parameters, 69 M MACs at 32x32."""
    return CifarResNet(5, num_classes)


def cifar_resnet44(num_classes: int = 10) -> nn.Module:
    """ResNet-44: 0.66 M parameters, 98 M MACs at 32x32."""
    return CifarResNet(7, num_classes)


def cifar_resnet56(num_classes: int = 10) -> nn.Module:
    """ResNet-56: 0.85 M parameters, 126 M MACs at 32x32."""
    return CifarResNet(9, num_classes)


def cifar_resnet110(num_classes: int = 10) -> nn.Module:
    """ResNet-110: 1.73 M parameters, 254 M MACs at 32x32."""
    return CifarResNet(18, num_classes)


def cifar_mobilenet_v2(num_classes: int = 10) -> nn.Module:
    """MobileNet-V2 for 32x32 images: torchvision's, whose first and second stride are 1 instead of 2.

    The last feature map is 4x4 instead of 1x1, as in the CIFAR tables of the pruning papers.
    """
    from torchvision.models import mobilenet_v2

    # Expansion, channels, repeats and stride of table 2 of "MobileNetV2" (Sandler et al., 2018), the
    # second row at stride 1.
    rows = [[1, 16, 1, 1], [6, 24, 2, 1], [6, 32, 3, 2], [6, 64, 4, 2], [6, 96, 3, 1], [6, 160, 3, 2]]
    model: nn.Module = mobilenet_v2(num_classes=num_classes, inverted_residual_setting=[*rows, [6, 320, 1, 1]])
    stem = model.get_submodule("features.0.0")
    assert isinstance(stem, nn.Conv2d)
    stem.stride = (1, 1)
    return model


def cifar_vgg16_bn(num_classes: int = 10) -> nn.Module:
    """VGG-16 with batch norm for 32x32 images: torchvision's features, 512 averages and one linear layer.

    14.7 M parameters, 314 M MACs at 32x32; the VGG of the CIFAR tables of the pruning papers.
    """
    from torchvision.models.vgg import cfgs, make_layers

    model = nn.Sequential(
        OrderedDict(
            features=make_layers(cfgs["D"], batch_norm=True),
            average=nn.AdaptiveAvgPool2d(1),
            flatten=nn.Flatten(),
            classifier=nn.Linear(512, num_classes),
        )
    )
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return model


BUILDERS: dict[str, Callable[[int], nn.Module]] = {
    "cifar_resnet20": cifar_resnet20,
    "cifar_resnet32": cifar_resnet32,
    "cifar_resnet44": cifar_resnet44,
    "cifar_resnet56": cifar_resnet56,
    "cifar_resnet110": cifar_resnet110,
    "cifar_mobilenet_v2": cifar_mobilenet_v2,
    "cifar_vgg16_bn": cifar_vgg16_bn,
}
