"""Encoders of segmentation_models_pytorch by the zoo's names, which its prefix `tu-` passes to timm."""

import pytest
import timm
import torch

from tests.conftest import SHIPPED_MODEL, SMALL

smp = pytest.importorskip("segmentation_models_pytorch")


@pytest.mark.first_case
@pytest.mark.parametrize("name", [name for name in SMALL if "29" not in name])
@pytest.mark.parametrize("network", ["Unet", "DeepLabV3Plus"])
def test_encoders_have_the_maps_of_timm(network, name):
    if network == "DeepLabV3Plus" and name.startswith("dla"):
        pytest.skip("DLA has no output stride")
    model = getattr(smp, network)(f"tu-{name}", encoder_weights=None, classes=2).eval()
    options = {} if network == "Unet" else {"output_stride": 16}
    alone = timm.create_model(name, features_only=True, **options).eval()
    alone.load_state_dict(model.encoder.model.state_dict())
    image = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert model(image).shape == (1, 2, 64, 64)
        for ours, theirs in zip(reversed(alone(image)), reversed(model.encoder(image)), strict=False):
            assert torch.equal(ours, theirs)


def test_an_encoder_takes_the_weights_of_a_folder():
    name = f"local-dir:{SHIPPED_MODEL}"
    model = smp.Unet(f"tu-{name}", encoder_weights=True, classes=2)
    weights = timm.create_model(name, pretrained=True).state_dict()
    assert all(torch.equal(tensor, weights[key]) for key, tensor in model.encoder.model.state_dict().items())
