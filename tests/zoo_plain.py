"""The plain torch models of the zoo: recurrent, convolutional, residual, dense, and `nn.TransformerEncoder`."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

VOCABULARY, WIDTH = 99, 32


class Encoder(nn.Module):
    """`nn.TransformerEncoder` with a padding mask, batch first."""

    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(VOCABULARY, WIDTH)
        layer = nn.TransformerEncoderLayer(WIDTH, 4, 64, batch_first=True)
        self.enc = nn.TransformerEncoder(layer, 4)
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.enc(self.emb(x), src_key_padding_mask=x == 0).mean(1))


class SequenceFirstEncoder(nn.Module):
    """PyTorch's default layout: between the blocks the batch is on axis 1."""

    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(VOCABULARY, WIDTH)
        self.enc = nn.TransformerEncoder(nn.TransformerEncoderLayer(WIDTH, 4, 64), 4, enable_nested_tensor=False)
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.enc(self.emb(x).transpose(0, 1)).mean(0))


class LSTM(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(VOCABULARY, WIDTH)
        self.rnn = nn.LSTM(WIDTH, WIDTH, 2, batch_first=True, bidirectional=True)
        self.head = nn.Linear(2 * WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        out, _ = self.rnn(self.emb(x))
        return self.head(out.mean(1))


class UnrolledLSTMCell(nn.Module):
    """One cell called once per step: the repeated block is a leaf module."""

    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(VOCABULARY, WIDTH)
        self.cell = nn.LSTMCell(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        e = self.emb(x)
        h = e.new_zeros(e.shape[0], WIDTH)
        c = torch.zeros_like(h)
        for t in range(e.shape[1]):
            h, c = self.cell(e[:, t], (h, c))
        return self.head(h)


class BasicBlock(nn.Module):
    """The residual block of CIFAR ResNets, with the parameter-free shortcut."""

    def __init__(self, i: int, o: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(i, o, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(o)
        self.conv2 = nn.Conv2d(o, o, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(o)
        self.stride, self.pad = stride, o - i

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.stride != 1 or self.pad:
            low = self.pad // 2
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, low, self.pad - low))
        return F.relu(x + y)


class CifarResNet(nn.Module):
    def __init__(self, blocks: int = 18, width: int = 16, classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        i, layers = width, []
        for k, o in enumerate((width, 2 * width, 4 * width)):
            members = []
            for j in range(blocks):
                members.append(BasicBlock(i, o, 2 if j == 0 and k else 1))
                i = o
            layers.append(nn.Sequential(*members))
        self.layer1, self.layer2, self.layer3 = layers
        self.linear = nn.Linear(4 * width, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer3(self.layer2(self.layer1(F.relu(self.bn1(self.conv1(x))))))
        x = F.avg_pool2d(x, x.size()[3])
        return self.linear(x.view(x.size(0), -1))


class LeNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.c1, self.c2 = nn.Conv2d(1, 6, 5), nn.Conv2d(6, 16, 5)
        self.f1, self.f2, self.f3 = nn.Linear(256, 120), nn.Linear(120, 84), nn.Linear(84, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.c1(x)), 2)
        x = F.max_pool2d(F.relu(self.c2(x)), 2)
        x = x.view(-1, 256)
        return self.f3(F.relu(self.f2(F.relu(self.f1(x)))))


class AlexNet(nn.Module):
    """In-place ReLUs, dropout, adaptive pooling."""

    def __init__(self, w: int = 8) -> None:
        super().__init__()
        self.features = nn.Sequential(
            *(nn.Conv2d(3, w, 11, 4, 2), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2)),
            *(nn.Conv2d(w, 3 * w, 5, padding=2), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2)),
            *(nn.Conv2d(3 * w, 6 * w, 3, padding=1), nn.ReLU(inplace=True)),
            *(nn.Conv2d(6 * w, 4 * w, 3, padding=1), nn.ReLU(inplace=True)),
            *(nn.Conv2d(4 * w, 4 * w, 3, padding=1), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2)),
        )
        self.avgpool = nn.AdaptiveAvgPool2d((6, 6))
        self.classifier = nn.Sequential(
            *(nn.Dropout(), nn.Linear(4 * w * 36, 64), nn.ReLU(inplace=True)),
            *(nn.Dropout(), nn.Linear(64, 64), nn.ReLU(inplace=True)),
            nn.Linear(64, 10),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(torch.flatten(self.avgpool(self.features(x)), 1))


class VGG(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        i = 3
        for v in (8, "M", 16, "M", 32, 32, "M", 32, 32, "M"):
            if isinstance(v, str):
                layers.append(nn.MaxPool2d(2, 2))
            else:
                layers += [nn.Conv2d(i, v, 3, padding=1), nn.BatchNorm2d(v), nn.ReLU(inplace=True)]
                i = v
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Sequential(nn.Linear(128, 64), nn.ReLU(True), nn.Dropout(), nn.Linear(64, 10))

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(torch.flatten(self.features(x), 1))


class Conv(nn.Module):
    def __init__(self, i: int, o: int, stride: int) -> None:
        super().__init__()
        conv = nn.Conv2d(i, o, 3, stride, 1, bias=False)
        self.n = nn.Sequential(conv, nn.BatchNorm2d(o), nn.ReLU(True))

    def forward(self, x: Tensor) -> Tensor:
        return self.n(x)


class DenseBlock(nn.Module):
    """One layer of every scale; each concatenates all earlier ones."""

    def __init__(self, channels: list[int], growth: int) -> None:
        super().__init__()
        self.same = nn.ModuleList(Conv(c, growth * 2**k, 1) for k, c in enumerate(channels))
        self.down = nn.ModuleList(Conv(c, growth * 2 ** (k + 1), 2) for k, c in enumerate(channels[:-1]))

    def forward(self, xs: list[Tensor]) -> list[Tensor]:
        out = []
        for k, x in enumerate(xs):
            parts = [x, self.same[k](x)]
            if k:
                parts.append(self.down[k - 1](xs[k - 1]))
            out.append(torch.cat(parts, 1))
        return out


class MSDNet(nn.Module):
    """A three-scale dense net: a list of tensors crosses every block boundary."""

    def __init__(self, blocks: int = 5, growth: int = 4) -> None:
        super().__init__()
        self.first = nn.ModuleList([Conv(3, 8, 1), Conv(8, 16, 2), Conv(16, 32, 2)])
        channels = [8, 16, 32]
        members = []
        for _ in range(blocks):
            members.append(DenseBlock(channels, growth))
            channels = [c + growth * 2**k * (2 if k else 1) for k, c in enumerate(channels)]
        self.blocks = nn.ModuleList(members)
        self.head = nn.Linear(channels[-1], 10)

    def forward(self, x: Tensor) -> Tensor:
        xs = []
        for f in self.first:
            x = f(x)
            xs.append(x)
        for b in self.blocks:
            xs = b(xs)
        return self.head(F.adaptive_avg_pool2d(xs[-1], 1).flatten(1))


class InvertedResidual(nn.Module):
    def __init__(self, i: int, o: int, stride: int, expand: int) -> None:
        super().__init__()
        h = i * expand
        self.residual = stride == 1 and i == o
        self.conv = nn.Sequential(
            *(nn.Conv2d(i, h, 1, bias=False), nn.BatchNorm2d(h), nn.ReLU6(True)),
            *(nn.Conv2d(h, h, 3, stride, 1, groups=h, bias=False), nn.BatchNorm2d(h), nn.ReLU6(True)),
            *(nn.Conv2d(h, o, 1, bias=False), nn.BatchNorm2d(o)),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x) if self.residual else self.conv(x)


class MobileNet(nn.Module):
    """Inverted residual blocks inside one `nn.Sequential`, mean over both axes of the map."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU6(True)]
        i = 8
        for o, stride in ((8, 1), (16, 2), (16, 1), (24, 2), (24, 1), (24, 1)):
            layers.append(InvertedResidual(i, o, stride, 3))
            i = o
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Sequential(nn.Dropout(0.2), nn.Linear(24, 10))

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x).mean([2, 3]))
