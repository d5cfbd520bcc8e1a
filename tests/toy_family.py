"""A family of one dense layer between word vectors and classes, as one row of the table: all that a family must say."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxcompress._src.models.family import Family, Head
from jaxcompress._src.models.hf.names import Parameter
from jaxcompress._src.models.hf.settings import head_by_architecture
from jaxcompress._src.models.leaves import check_parameters, flatten_params
from jaxcompress.structured import UnitGroup, UnitSlices

HEADS = {"bag": Head(description="a bag of words", answer="classes", architectures=("ToyBag",), outputs=("logits",))}
SIZES = ("vocab_size", "hidden_size", "inner_size", "max_position_embeddings", "num_labels")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ToyConfig:
    vocab_size: int
    hidden_size: int
    inner_size: int
    max_position_embeddings: int = 16
    num_labels: int = 2
    num_hidden_layers: int = 1
    id2label: tuple[str, ...] = ()
    initializer_range: float = 0.02
    head: str = "bag"


class ToyModule(nn.Module):
    config: ToyConfig
    dtype: object = jnp.float32

    @nn.compact
    def __call__(self, input_ids, attention_mask, *, deterministic=True, output_hidden_states=False):
        del deterministic
        words = nn.Embed(self.config.vocab_size, self.config.hidden_size, name="words")(input_ids)
        inner = jax.nn.relu(nn.Dense(self.config.inner_size, name="up")(words))
        hidden = nn.Dense(self.config.hidden_size, name="down")(inner)
        mask = attention_mask[..., None]
        mean = (hidden * mask).sum(axis=-2) / jnp.maximum(mask.sum(axis=-2), 1)
        outputs = {"last_hidden_state": hidden, "logits": nn.Dense(self.config.num_labels, name="classes")(mean)}
        return outputs | ({"hidden_states": (words, hidden)} if output_hidden_states else {})


def toy_config(settings, head):
    head = head or head_by_architecture(settings.get("architectures"), HEADS)
    return ToyConfig(head=head, **{name: settings[name] for name in SIZES})


def toy_settings(config):
    sizes = {name: getattr(config, name) for name in SIZES}
    return {"model_type": "toy", "architectures": list(HEADS[config.head].architectures), **sizes}


def toy_parameters(config):
    width, inner = config.hidden_size, config.inner_size
    return {
        "words/embedding": Parameter((config.vocab_size, width), "toy.vectors"),
        "up/kernel": Parameter((width, inner), "toy.layer.in.weight", transposed=True),
        "up/bias": Parameter((inner,), "toy.layer.in.bias"),
        "down/kernel": Parameter((inner, width), "toy.layer.out.weight", transposed=True),
        "down/bias": Parameter((width,), "toy.layer.out.bias"),
        "classes/kernel": Parameter((width, config.num_labels), "classes.weight", transposed=True),
        "classes/bias": Parameter((config.num_labels,), "classes.bias"),
    }


def toy_neurons(config):
    slices = (
        UnitSlices(path="up/kernel", axis=1),
        UnitSlices(path="up/bias", axis=0),
        UnitSlices(path="down/kernel", axis=0, gated=True),
    )
    return [UnitGroup(name="neurons", kind="neurons", count=config.inner_size, slices=slices)]


def resized_config(params, config):
    leaves = flatten_params(params)
    config = dataclasses.replace(config, inner_size=leaves["up/kernel"].shape[1])
    shapes = {path: parameter.shape for path, parameter in toy_parameters(config).items()}
    check_parameters(leaves, shapes, "a toy")
    return config


TOY = Family(
    model_type="toy",
    prefix="toy",
    config=ToyConfig,
    heads=HEADS,
    config_from_settings=toy_config,
    settings_from_config=toy_settings,
    make_module=ToyModule,
    parameters=toy_parameters,
    resized_config=resized_config,
    units={"neurons": toy_neurons},
    default_units=("neurons",),
    head_components=("classes",),
)
