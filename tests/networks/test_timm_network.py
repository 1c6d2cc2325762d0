"""The plain network on the meta device."""

import pytest

from nats_zoo import GenotypeError, NatsError
from nats_zoo.networks.timm_network import meta_network


@pytest.mark.parametrize("name", ["test_resnet", "test_resnet.r160_in1k", "nats_resnet18", "resnet18.tv_in1k"])
def test_it_is_plain_and_takes_no_memory(name):
    model = meta_network(name)
    assert all(parameter.is_meta for parameter in model.parameters())
    assert type(model).__name__ == "ResNet"


def test_options_go_to_timm():
    assert meta_network("test_resnet", features_only=True).feature_info.channels()


@pytest.mark.parametrize("name", ["resnet5000", "", None, 5, "hf-hub:org/name", "a\nb"])
def test_what_is_no_network_of_timm_is_refused_in_one_line(name):
    with pytest.raises(GenotypeError) as error:
        meta_network(name, what="file.json", error=GenotypeError)
    assert str(error.value) == f"file.json: timm has no model {name!r}"


def test_options_that_a_network_does_not_take_are_refused():
    with pytest.raises(NatsError, match=r"^backbone test_resnet: .*colour"):
        meta_network("test_resnet", colour="red")
