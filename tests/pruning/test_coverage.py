"""Every network family is pruned at random, by half and to the smallest, runs, and costs less."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from benchmarks.pruning_coverage import Row, examine, networks, table
from compressor.pruning.build import build
from compressor.pruning.space import PruningSpace
from tests.pruning.networks import Attentive, Tied, UNet, Zoo

#: Left to the benchmark for their size; each has a smaller sibling here.
LARGE = """
    cifar_resnet56 convnext_base convnext_large convnext_small densenet161 densenet169 densenet201
    efficientnet_b1 efficientnet_b2 efficientnet_b3 efficientnet_b4 efficientnet_b5 efficientnet_b6
    efficientnet_b7 efficientnet_v2_l efficientnet_v2_m mnasnet0_75 mnasnet1_0 mnasnet1_3 regnet_x_16gf
    regnet_x_1_6gf regnet_x_32gf regnet_x_3_2gf regnet_x_800mf regnet_x_8gf regnet_y_16gf regnet_y_1_6gf
    regnet_y_32gf regnet_y_3_2gf regnet_y_800mf regnet_y_8gf resnet101 resnet152 resnet34 resnext101_32x8d
    resnext101_64x4d shufflenet_v2_x1_0 shufflenet_v2_x1_5 shufflenet_v2_x2_0 swin_b swin_s swin_v2_b swin_v2_s
    vgg11 vgg11_bn vgg13 vgg13_bn vgg16 vgg16_bn vgg19 vgg19_bn vit_b_16 wide_resnet101_2 wide_resnet50_2
"""
TIMM = """
    skresnet18 resnest14d res2net50_26w_4s mixnet_s ghostnet_100 cspresnet50 nfnet_l0 tresnet_m
    mobilenetv4_hybrid_medium
    vit_tiny_patch16_224 pvt_v2_b0 edgenext_xx_small coat_lite_tiny
"""
SKIPPED = {*LARGE.split()}
CASES = {
    name: (build, shape)
    for name, build, shape in networks(heavy=False)
    if name not in SKIPPED and (not name.startswith("timm:") or name[5:] in TIMM.split())
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.filterwarnings("ignore")
def test_network(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    build, shape = CASES[name]
    for fill in ("normal_", "uniform_"):  # shapes and counts do not depend on the weights, which take long to draw
        monkeypatch.setattr(Tensor, fill, lambda self, *_args, **_kwargs: self.zero_())
    # fvcore takes most of the time; the property tests compare with it on small networks, the benchmark on all.
    row = examine(name, build, shape, count=False)
    assert row.error == ""
    assert row.groups > 0
    assert row.least_macs < 0.25


@pytest.mark.parametrize("build", [Zoo, UNet, Attentive, Tied])
def test_special_networks_with_fvcore(build: type[nn.Module]) -> None:
    shape = {Zoo: (1, 3, 32, 32), UNet: (1, 3, 32, 32), Attentive: (1, 10, 24), Tied: (1, 8)}[build]
    assert examine(build.__name__, build, shape).error == ""


def test_vision_transformers_prune_heads_hidden_and_embedding() -> None:
    import torchvision

    models = torchvision.models
    network = models.VisionTransformer(64, 32, num_layers=2, num_heads=6, hidden_dim=96, mlp_dim=160)
    vit = PruningSpace(network.eval(), torch.randn(1, 3, 64, 64))
    by_name = {group.name: group for group in vit.groups}
    heads = by_name["encoder.layers.encoder_layer_0.self_attention"]
    hidden = by_name["encoder.layers.encoder_layer_0.mlp.0"]
    embedding = by_name["conv_proj"]
    assert (heads.width, heads.unit, hidden.width, embedding.width) == (6, 48, 160, 96)
    network = models.SwinTransformer([4, 4], 48, depths=[2, 2], num_heads=[3, 6], window_size=[7, 7])
    swin = PruningSpace(network.eval(), torch.randn(1, 3, 64, 64))
    found = {(g.width, g.unit) for g in swin.groups if g.name.endswith("attn.qkv")}
    assert found == {(3, 48), (6, 48)}


def test_same_widths_as_torch_pruning() -> None:
    import torchvision

    from benchmarks.pruning_speed import prune_with_torch_pruning

    models = torchvision.models
    dense_blocks = models.DenseNet(growth_rate=16, block_config=(2, 4, 4, 2), num_init_features=32)
    for model in (models.resnet18(), models.mobilenet_v2(), dense_blocks):
        model.eval()
        example = torch.randn(1, 3, 64, 64)
        space = PruningSpace(model, example, min_width=1)
        theirs = prune_with_torch_pruning(model, example, 0.5)
        widths = space.widths(space.uniform(0.5).widths)
        assert space.params(widths) == sum(parameter.numel() for parameter in theirs.parameters()), type(model)


def test_auxiliary_heads_fit_in_training() -> None:
    import torchvision

    model = torchvision.models.googlenet(weights=None, init_weights=False).eval()
    space = PruningSpace(model, torch.randn(1, 3, 64, 64))
    small = space.apply(space.uniform(0.5)).train()
    out = small(torch.randn(2, 3, 64, 64))
    assert [tuple(t.shape) for t in out] == [(2, 1000)] * 3


class WantsLabels(nn.Module):
    """In training it looks for labels that nobody gave it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head, self.spare = nn.Conv2d(3, 8, 3), nn.Linear(8, 4), nn.Linear(8, 4)
        self.given: dict[str, Tensor] = {}

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).mean((2, 3))
        return self.head(x) + (self.spare(self.given["labels"]) if self.training else 0)


def test_a_pass_in_training_may_fail_in_any_way() -> None:
    built = build(WantsLabels().eval(), (torch.zeros(1, 3, 8, 8),))
    assert built.on_meta  # the dense pass is not repeated with real tensors
    assert [group.name for group in built.resolved.groups] == ["stem"]


def test_the_real_checkpoint_survives_mild_pruning(shared_data: Path) -> None:
    from compressor.models import create_model

    model = create_model("cifar_resnet20", 10, shared_data / "resnet20_cifar10jpeg.pt").eval()
    space = PruningSpace(model, torch.randn(1, 3, 32, 32))
    assert space.params(space.dense_widths) == 269_722
    example = torch.randn(16, 3, 32, 32)
    with torch.no_grad():
        dense = model(example)
        kept = space.apply(space.plan(space.round(0.95 * space.dense_widths), "l1"))(example)
        random = space.apply(space.plan(space.round(0.5 * space.dense_widths), "random"))(example)
    # Dropping the least filters moves the logits less than dropping half of them at random.
    assert (kept - dense).square().mean() < (random - dense).square().mean()


def test_the_page_lists_failures_and_reasons(tmp_path: Path) -> None:
    page = table(
        [Row("good", "", 3, 0.1, 0.2, (("frozen by the caller", 2),)), Row("bad", "half: costs do not fall")]
    )
    assert "1 of 2 networks pass" in page
    assert "| good | 3 | 10.0% | 20.0% | 2: frozen by the caller |" in page
    assert "| bad | **fails**: half: costs do not fall | | | |" in page
