import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t2i_jax.errors import UserError
from t2i_jax.systems import trees
from t2i_jax.systems.adapters.lora import LoRA
from t2i_jax.systems.capabilities import Evaluated, FirstStage, Sampler, TextEncoder, make_options
from t2i_jax.systems.conditioning import TextConditioner
from t2i_jax.systems.diffusion.ddpm import DDPM
from t2i_jax.systems.gan.gan_cls import GANCLS
from t2i_jax.systems.randomness import picture_keys

KEY, STEP = jax.random.key(3), jnp.int32(0)
BASE = DDPM(
  TextConditioner(length=6, vocab_size=20, width=8, layers=1, heads=2, drop=0.5), 8, steps=50,
  channels=8, multipliers=(1,), blocks=1, attention_levels=(), head_channels=8, groups=4,
  patch=2, dropout=0.2,
)  # fmt: skip


def make_batch(rows=4, seed=0):
  random = np.random.default_rng(seed)
  return {
    "image": random.integers(0, 256, (rows, 8, 8, 3), dtype=np.uint8),
    "text": {"text_encoder": {"ids": random.integers(0, 20, (rows, 6)).astype(np.int32),
                              "mask": np.ones((rows, 6), bool)}},
  }


def system(**options):
  unused = options.pop("text", TextConditioner())
  return LoRA(unused, components={"base": options.pop("of", BASE)}, **{"rank": 2, **options})


def noised(tree, seed):
  leaves, structure = jax.tree.flatten(tree)
  random = np.random.default_rng(seed)
  return jax.tree.unflatten(
    structure, [jnp.asarray(0.3 * random.normal(size=x.shape), jnp.float32) for x in leaves]
  )


@pytest.fixture(scope="module")
def frozen():
  shapes = jax.eval_shape(BASE.init, KEY, make_batch())
  return {kind: {"base": noised(groups, 1)} for kind, groups in shapes.items()}


def variables_of(lora, frozen, seed=2):
  """Of a system that was trained: no adapter is zero."""
  own = jax.eval_shape(lora.init, KEY, make_batch(), frozen)
  alphas = jax.tree.map(lambda x: jnp.float32(lora.alpha), own["alphas"])
  return trees.merge(frozen, {"params": noised(own["params"], seed), "alphas": alphas})


def without_dropout(**changes):
  text = dataclasses.replace(BASE.text, drop=0.0)
  return dataclasses.replace(BASE, dropout=0.0, text=text, **changes)


def test_is_what_its_base_is():
  lora = system()
  assert isinstance(lora, Sampler) and isinstance(lora, Evaluated)
  assert not isinstance(lora, FirstStage) and not isinstance(lora, TextEncoder)
  assert lora.batch_spec() == BASE.batch_spec() and lora.text is BASE.text
  assert lora.Options is BASE.Options and lora.resolution == 8
  assert make_options(lora, {"steps": 3}).steps == 3
  with pytest.raises(AttributeError):
    lora.encode  # noqa: B018
  again = dataclasses.replace(lora, rank=3)
  assert again.text is BASE.text and again.rank == 3


def test_only_the_adapters_are_trained(frozen):
  lora = system(groups=("denoiser", "text_encoder"))
  (player,) = lora.players
  assert player.trains == ("adapters",) == lora.ema_groups and lora.frozen_groups == ("base",)
  fresh = lora.init(KEY, make_batch(), frozen)
  assert set(fresh["params"]) == {"adapters"}
  adapters = fresh["params"]["adapters"]
  assert set(adapters) == {"denoiser", "text_encoder"}
  query = adapters["denoiser"]["middle_attention"]["self_attention"]["query"]
  assert query["down"].shape == (8, 2) and query["up"].shape == (2, 8)
  gradients, aux = jax.jit(player.gradients)(
    variables_of(lora, frozen), make_batch(), KEY, STEP
  )
  assert set(gradients) == {"adapters"} and not aux.collections
  assert all(np.any(g) for g in jax.tree.leaves(gradients))


def test_a_fresh_system_computes_what_its_base_does(frozen):
  lora = system(groups=("denoiser", "text_encoder"), targets=("",))
  variables = trees.merge(frozen, lora.init(KEY, make_batch(), frozen))
  found, _ = jax.jit(lora.loss)(variables, make_batch(), KEY, STEP)
  wanted, _ = jax.jit(BASE.loss)(trees.group(frozen, "base"), make_batch(), KEY, STEP)
  np.testing.assert_allclose(found, wanted, rtol=1e-5)


def test_loss_and_pictures_are_the_merged_base_s(frozen):
  lora = system(groups=("text_encoder", "denoiser"), targets=("",), alpha=3.0)
  variables, batch = variables_of(lora, frozen), make_batch()
  merged = lora.merged(variables)
  loss = jax.jit(lora.loss)(variables, batch, KEY, STEP)[0]
  np.testing.assert_allclose(loss, jax.jit(BASE.loss)(merged, batch, KEY, STEP)[0], rtol=1e-4)
  plain = jax.jit(BASE.loss)(trees.group(frozen, "base"), batch, KEY, STEP)[0]
  assert abs(loss - plain) > 1e-3 * plain
  held_out = jax.jit(lora.evaluation_loss)(variables, batch, KEY)["loss"]
  np.testing.assert_allclose(
    held_out, jax.jit(BASE.evaluation_loss)(merged, batch, KEY)["loss"], rtol=1e-3
  )
  chosen = make_options(lora, {"steps": 2})

  def drawn(system, variables):
    given = jax.jit(system.condition)(variables, {"text": batch["text"]})
    keys = picture_keys(0, jnp.arange(4))
    return np.asarray(jax.jit(system.sample)(variables, given, keys, chosen))

  pictures = drawn(lora, variables)
  np.testing.assert_allclose(pictures, drawn(BASE, merged), atol=2e-3)
  assert np.abs(pictures - drawn(BASE, trees.group(frozen, "base"))).max() > 0.01


def test_merging_is_undone_by_its_opposite(frozen):
  lora = system(targets=("",))
  variables = variables_of(lora, frozen)
  merged = {"params": {**variables["params"], "base": lora.merged(variables)["params"]}}
  back = lora.merged({**variables, **merged}, -1.0)
  for a, b in zip(
    jax.tree.leaves(back), jax.tree.leaves(trees.group(frozen, "base")), strict=True
  ):
    np.testing.assert_allclose(a, b, atol=1e-5)


def test_dropout_is_on_in_training_alone(frozen):
  lora = system(of=without_dropout(), targets=("",))
  dropping = dataclasses.replace(lora, dropout=0.5)
  variables, batch = variables_of(lora, frozen), make_batch()
  loss = lambda s: float(jax.jit(s.loss)(variables, batch, KEY, STEP)[0])  # noqa: E731
  assert abs(loss(lora) - loss(dropping)) > 1e-4
  programs = [
    str(jax.make_jaxpr(s.evaluation_loss)(variables, batch, KEY)) for s in (lora, dropping)
  ]
  assert programs[0] == programs[1]


def test_layers_by_name_have_ranks_of_their_own(frozen):
  layers = (("denoiser/conv_in", 1), ("text_encoder/attention_0/query", 3))
  lora = system(layers=layers)
  adapters = lora.init(KEY, make_batch(), frozen)["params"]["adapters"]
  assert adapters["denoiser"]["conv_in"]["down"].shape == (3, 3, 12, 1)
  assert adapters["text_encoder"]["attention_0"]["query"]["up"].shape == (3, 8)
  assert len(jax.tree.leaves(adapters)) == 4


def test_what_cannot_be_adapted_is_refused(frozen):
  with pytest.raises(UserError, match="set components.base=PATH of its export"):
    LoRA(TextConditioner())
  with pytest.raises(UserError, match="and GANCLS has 2 players; only a system of one player"):
    system(of=GANCLS(TextConditioner()))
  with pytest.raises(UserError, match="components.base is a lora itself; merge it first"):
    system(of=system())
  with pytest.raises(UserError, match="components.base has stacked blocks, .* --apart"):
    system(of=dataclasses.replace(BASE, attention="transformer", scan=True))
  with pytest.raises(UserError, match="the text of a lora run is that of components.base"):
    system(text=TextConditioner(encoder="component", components={"text_encoder": None}))
  with pytest.raises(UserError, match=r"model.rank=0: use 1 or more"):
    system(rank=0)

  def refuses(match, **options):
    with pytest.raises(UserError, match=match):
      system(**options).init(KEY, make_batch(), frozen)

  refuses("unknown group of components.base in model.groups 'denoisr'; did you mean 'denoiser'",
          groups=("denoisr",))
  refuses(r"model.targets=\('atention',\) are in no path of the \d+ layers of denoiser, such as",
          targets=("atention",))
  refuses("unknown layer in model.layers 'denoiser/conv_inn'; did you mean 'denoiser/conv_in'",
          layers=(("denoiser/conv_inn", 1),))


def test_a_kernel_that_is_of_no_layer_is_named(frozen):
  lora = system()
  variables = variables_of(lora, frozen)
  adapters = variables["params"]["adapters"]
  stray = {"idle": {"down": jnp.ones((2, 2)), "up": jnp.ones((2, 2))}}
  variables["params"]["adapters"] = {**adapters, **stray}
  variables["alphas"]["adapters"] = {
    **variables["alphas"]["adapters"], "idle": {"alpha": jnp.float32(1)}
  }
  with pytest.raises(UserError, match="1 of .* kernels are of no Dense or Conv .* such as idle"):
    jax.eval_shape(lora.loss, variables, make_batch(), KEY, STEP)
