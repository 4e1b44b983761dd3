"""A network, a loader and a metric of your own, compressed to a share of the latency."""

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

import compressor


class Spots(Dataset):
    """Noisy pictures with a bright spot, and its place from 0 to 1."""

    def __init__(self, first, count):
        self.first, self.count = first, count

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        random = torch.Generator().manual_seed(self.first + index)
        picture = 0.5 * torch.rand(1, 48, 48, generator=random)
        x, y = torch.randint(3, 45, (2,), generator=random).tolist()
        picture[0, y - 3 : y + 4, x - 3 : x + 4] += 1
        return {"picture": picture, "place": torch.tensor([x, y]) / 48}


def finder(widths=(16, 32, 64)):
    layers, inputs = [], 1
    for width in widths:
        layers += [nn.Conv2d(inputs, width, 3, 2, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
        inputs = width
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(36 * inputs, 2))


def loss(model, batch):
    return nn.functional.mse_loss(model(batch["picture"]), batch["place"])


def found(loader):  # share of the spots that are found to within four pixels
    def score(model):
        near = [((model(b["picture"]) - b["place"]).norm(dim=1) < 4 / 48).float() for b in loader]
        return torch.cat(near).mean()

    return score


if __name__ == "__main__":
    torch.manual_seed(0)
    train = DataLoader(Spots(0, 768), batch_size=64, shuffle=True)
    chooses, judges = DataLoader(Spots(10_000, 256), 128), DataLoader(Spots(20_000, 256), 128)
    network = finder()
    optimizer = torch.optim.Adam(network.parameters(), 2e-3)
    for batch in (batch for _ in range(8) for batch in train):
        optimizer.zero_grad()
        loss(network, batch).backward()
        optimizer.step()
    result = compressor.compress(
        network, torch.zeros(1, 1, 48, 48), train=train, loss=loss, evaluate=found(chooses), test=found(judges),
        latency="75%", epochs=4, out="spots", search={"max_evaluations": 12},
    )  # fmt: skip
    print(result.manifest["accuracy"], result.model, result.onnx, sep="\n")
