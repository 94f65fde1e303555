import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from t2i_jax.errors import UserError
from t2i_jax.systems import trees
from t2i_jax.systems.capabilities import Evaluated, FirstStage, Sampler, TextEncoder
from t2i_jax.systems.conditioning import TextConditioner
from t2i_jax.systems.perceptual.feature_net import FeatureNet
from t2i_jax.systems.pictures import normalize_images
from t2i_jax.systems.randomness import fold_name
from t2i_jax.systems.vae.kl_autoencoder import KLAutoencoder
from t2i_jax.training import state as states
from t2i_jax.training.step import StepOptions, make_step

pytestmark = pytest.mark.usefixtures("compiled_programs")
TEXT = TextConditioner()
NETWORK = FeatureNet(TEXT, 16, (("colour", 9),), channels=(4, 8), groups=2, width=6)
SYSTEM = KLAutoencoder(
  TEXT, 16, latent_channels=2, channels=4, multipliers=(1, 2), blocks=1, groups=2,
  kl_weight=0.01, log_variance=0.3, learn_log_variance=True, adversarial_start=3,
  discriminator_channels=4, discriminator_layers=1, components={"perceptual": NETWORK},
)  # fmt: skip
PLAIN = dataclasses.replace(
  SYSTEM, error="l2", perceptual_weight=0.0, adversarial_weight=0.0, learn_log_variance=False,
  log_variance=0.0, components={},
)  # fmt: skip
KEY = jax.random.key(3)
LATE, EARLY = jnp.int32(3), jnp.int32(2)


# One program each, for all tests of the system as it is.
ENCODE, DECODE = jax.jit(SYSTEM.encode), jax.jit(SYSTEM.decode)
SCORES = jax.jit(SYSTEM.evaluation_loss)


def make_batch(rows, seed=0):
  random = np.random.default_rng(seed)
  return {"image": random.integers(0, 256, (rows, 16, 16, 3), dtype=np.uint8)}


def filled(shapes, seed=9):
  """Random variables of given shapes, none at its initial zero, which would hide
  what depends on what; drawing them so compiles nothing."""
  random = np.random.default_rng(seed)

  def draw(path, leaf):
    around = 1.0 if path[-1].key in ("scale", "var") else 0.0
    return jnp.asarray(around + 0.3 * random.uniform(-1, 1, leaf.shape), leaf.dtype)

  return jax.tree_util.tree_map_with_path(draw, shapes)


@pytest.fixture(scope="module")
def variables(compiled_programs):
  batch = make_batch(2)
  own = jax.eval_shape(SYSTEM.init, jax.random.key(0), batch)
  network = jax.eval_shape(
    NETWORK.init, jax.random.key(0), {**batch, "label": np.zeros((2, 1), np.int32)}
  )
  return trees.merge(filled(own), {"params": {"perceptual": filled(network)["params"]}})


@pytest.fixture(scope="module")
def gradients_of():
  discriminator, autoencoder = SYSTEM.players
  return {
    "discriminator": jax.jit(discriminator.gradients), "autoencoder": jax.jit(autoencoder.gradients)
  }


@jax.jit
def reconstructed(variables, image):
  """Pictures from drawn latents, and the moments, as the loss has them."""
  mean, log_variance = jnp.split(SYSTEM.encode(variables, image), 2, axis=-1)
  noise = jax.random.normal(fold_name(KEY, "latent"), mean.shape)
  latents = mean + jnp.exp(0.5 * log_variance) * noise
  return SYSTEM.decode(variables, latents), mean, log_variance


@jax.jit
def judge(variables, image):
  own = trees.group(variables, "discriminator")
  return SYSTEM.discriminator.apply(own, image, True, mutable=["batch_stats"])[0]


def losses(params, variables, batch):
  """Each of the autoencoder's losses, written out."""
  variables = trees.with_params(variables, params)
  image = normalize_images(batch["image"])
  picture, mean, log_variance = reconstructed(variables, image)
  distance = NETWORK.distance(trees.group(variables, "perceptual"), image, picture)
  a_value = jnp.abs(image - picture) + distance[:, None, None, None]
  scale = variables["params"]["likelihood"]["log_variance"]
  likelihood = jnp.sum(a_value / jnp.exp(scale) + scale) / len(image)
  kl = 0.5 * jnp.sum(mean**2 + jnp.exp(log_variance) - 1 - log_variance) / len(image)
  return likelihood, kl, -jnp.mean(judge(variables, picture))


def test_is_a_first_stage_with_a_held_out_loss():
  assert isinstance(SYSTEM, FirstStage) and isinstance(SYSTEM, Evaluated)
  assert not isinstance(SYSTEM, Sampler) and not isinstance(SYSTEM, TextEncoder)
  assert [player.name for player in SYSTEM.players] == ["discriminator", "autoencoder"]
  assert SYSTEM.players[0].start == 3 and SYSTEM.frozen_groups == ("perceptual",)
  assert [player.name for player in PLAIN.players] == ["autoencoder"]
  assert SYSTEM.latent_shape(64) == (32, 32, 2)


def test_encode_gives_moments_within_bounds_and_decode_pictures(variables):
  large = jax.tree.map(lambda x: 100.0 * x, variables["params"]["encoder"]["conv_out"])
  encoder = {**variables["params"]["encoder"], "conv_out": large}
  image = normalize_images(make_batch(2)["image"])
  moments = ENCODE(trees.with_params(variables, {"encoder": encoder}), image)
  assert moments.shape == (2, 8, 8, 4)
  assert np.min(moments[..., 2:]) == -30 and np.max(moments[..., 2:]) == 20
  assert np.abs(moments[..., :2]).max() > 30
  assert DECODE(variables, moments[..., :2]).shape == (2, 16, 16, 3)


def test_the_gradient_is_of_all_losses_by_the_adaptive_weight(variables, gradients_of):
  batch = make_batch(3)
  params = {name: variables["params"][name] for name in ("encoder", "decoder", "likelihood")}

  @jax.jit
  def derived(params):
    values, pull_back = jax.vjp(lambda p: losses(p, variables, batch), params)
    one = jnp.eye(len(values))
    return values, [pull_back(tuple(row))[0] for row in one]

  (likelihood, kl, fooled), of = derived(params)
  lengths = [np.linalg.norm(np.ravel(g["decoder"]["conv_out"]["kernel"])) for g in of]
  weight = 0.5 * lengths[0] / (lengths[2] + 1e-4)
  expected = jax.tree.map(lambda a, b, c: a + 0.01 * b + weight * c, *of)

  gradients, aux = gradients_of["autoencoder"](variables, batch, KEY, LATE)
  metrics = aux.metrics
  np.testing.assert_allclose(metrics["adversarial_weight"], weight, rtol=1e-3)
  np.testing.assert_allclose(metrics["kl"], kl, rtol=1e-4)
  np.testing.assert_allclose(metrics["fooled"], fooled, rtol=1e-3, atol=1e-4)
  np.testing.assert_allclose(metrics["log_variance"], params["likelihood"]["log_variance"])
  np.testing.assert_allclose(
    metrics["loss"], likelihood + 0.01 * kl + weight * fooled, rtol=1e-4
  )
  assert set(gradients) == set(expected) and "feature_net" in metrics
  scale = max(np.abs(x).max() for x in jax.tree.leaves(expected))
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-3, atol=1e-5 * scale),
    gradients, expected,
  )  # fmt: skip


def test_before_its_start_the_discriminator_counts_for_nothing(variables, gradients_of):
  batch = make_batch(3)
  gradients, aux = gradients_of["autoencoder"](variables, batch, KEY, EARLY)
  assert aux.metrics["adversarial_weight"] == 0
  without = dataclasses.replace(SYSTEM, adversarial_weight=0.0)
  expected, other = jax.jit(without.players[0].gradients)(variables, batch, KEY, EARLY)
  np.testing.assert_allclose(aux.metrics["loss"], other.metrics["loss"], rtol=1e-5)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-2), gradients, expected
  )
  assert not SYSTEM.players[0].moves(EARLY) and SYSTEM.players[0].moves(LATE)


def test_a_plain_autoencoder_has_the_gradient_of_its_loss(variables):
  batch = make_batch(2)
  (player,) = PLAIN.players
  gradients, aux = jax.jit(player.gradients)(variables, batch, KEY, LATE)

  def loss(params):
    image = normalize_images(batch["image"])
    picture, mean, log_variance = reconstructed(trees.with_params(variables, params), image)
    kl = 0.5 * jnp.sum(mean**2 + jnp.exp(log_variance) - 1 - log_variance)
    return (jnp.sum((picture - image) ** 2) + 0.01 * kl) / 2

  params = {name: variables["params"][name] for name in ("encoder", "decoder")}
  value, expected = jax.jit(jax.value_and_grad(loss))(params)
  np.testing.assert_allclose(aux.metrics["loss"], value, rtol=1e-5)
  scale = max(np.abs(x).max() for x in jax.tree.leaves(expected))
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5 * scale),
    gradients, expected,
  )  # fmt: skip
  assert set(jax.eval_shape(PLAIN.init, KEY, batch)["params"]) == {"encoder", "decoder"}


def test_discriminator_sees_detached_reconstructions_by_batch_statistics(variables, gradients_of):
  batch = make_batch(4)
  gradients, aux = gradients_of["discriminator"](variables, batch, KEY, LATE)
  assert set(gradients) == {"discriminator"} and optax.tree.norm(gradients["discriminator"]) > 0
  image = normalize_images(batch["image"])
  picture, *_ = reconstructed(variables, image)
  logits = [judge(variables, x) for x in (image, picture)]
  expected = 0.5 * (np.maximum(1 - logits[0], 0).mean() + np.maximum(1 + logits[1], 0).mean())
  np.testing.assert_allclose(aux.metrics["loss"], expected, rtol=1e-4)
  assert set(aux.collections["batch_stats"]) == {"discriminator"}
  old, new = variables["batch_stats"]["discriminator"], aux.collections["batch_stats"]
  assert np.abs(new["discriminator"]["norm_1"]["mean"] - old["norm_1"]["mean"]).max() > 1e-4
  whole = jax.jit(jax.grad(
    lambda params: SYSTEM.discriminator_loss({**variables, "params": params}, batch, KEY, LATE)[0]
  ))(variables["params"])
  assert optax.tree.norm({k: v for k, v in whole.items() if k != "discriminator"}) == 0


def flops(f, *args):
  return jax.jit(f).lower(*args).compile().cost_analysis()["flops"]


@pytest.mark.slow
def test_both_players_make_one_reconstruction(variables):
  """The step's promise, although the discriminator begins later."""
  batch = make_batch(4)
  image = normalize_images(batch["image"])
  optimizers = {player.name: optax.sgd(0.1) for player in SYSTEM.players}
  frozen, trained = trees.split(variables, SYSTEM.frozen_groups)
  state = jax.eval_shape(lambda: states.create(SYSTEM, optimizers, trained, frozen, False))
  step = flops(make_step(SYSTEM, optimizers, StepOptions(ema_decay=0.0)), state, batch)
  alone = sum(
    flops(lambda v, player=player: player.gradients(v, batch, KEY, LATE), variables)
    for player in SYSTEM.players
  )
  forward = flops(lambda v: SYSTEM._features(v, image, KEY)[0], variables)
  updates = 3 * sum(x.size for x in jax.tree.leaves(variables))
  assert step < alone + updates - 0.8 * forward


def test_held_out_scores_are_of_the_mean_latents(variables):
  batch = make_batch(3)
  found = SCORES(variables, batch, KEY)
  other = SCORES(variables, batch, jax.random.key(4))
  assert set(found) == {"error", "psnr", "kl", "feature_net"}
  assert all(value.shape == (3,) for value in found.values())
  jax.tree.map(np.testing.assert_array_equal, found, other)
  image = normalize_images(batch["image"])
  mean = ENCODE(variables, image)[..., :2]
  picture = np.clip(DECODE(variables, mean), -1, 1)
  np.testing.assert_allclose(found["error"], np.abs(picture - image).mean((1, 2, 3)), rtol=1e-4)
  # In units of 8-bit values, whose peak is 255.
  square = np.mean((127.5 * (picture - image)) ** 2, axis=(1, 2, 3))
  np.testing.assert_allclose(found["psnr"], 10 * np.log10(255**2 / square), rtol=1e-4)
  black = {"image": np.zeros((1, 16, 16, 3), np.uint8)}
  decoder = jax.tree.map(jnp.zeros_like, variables["params"]["decoder"])
  decoder["conv_out"]["bias"] = decoder["conv_out"]["bias"] - 1.0
  perfect = SCORES(
    trees.with_params(variables, {"decoder": decoder}), black, KEY
  )
  np.testing.assert_allclose(perfect["psnr"], 10 * np.log10(4e10), rtol=1e-4)


def test_learns(variables):
  batch = make_batch(4)
  batch["image"][:, :8] = 200
  batch["image"][:, 8:] = 30
  optimizer = optax.adam(1e-2)
  system = dataclasses.replace(SYSTEM, kl_weight=1e-6, learn_log_variance=False)
  update = jax.jit(system.players[1].gradients)
  params = {name: variables["params"][name] for name in ("encoder", "decoder")}
  state, errors = optimizer.init(params), []
  for _ in range(40):
    gradients, aux = update(trees.with_params(variables, params), batch, KEY, EARLY)
    updates, state = optimizer.update(gradients, state)
    params = optax.apply_updates(params, updates)
    errors.append(float(aux.metrics["error"]))
  assert errors[-1] < 0.5 * errors[0]


def test_without_a_perceptual_network_the_files_are_named():
  with pytest.raises(UserError, match="vgg16-397923af.pth .*vgg.pth .*PerceptualSimilarity"):
    dataclasses.replace(SYSTEM, components={})
  with pytest.raises(UserError, match="configs/feature_net.py stands in"):
    dataclasses.replace(SYSTEM, components={})
  dataclasses.replace(SYSTEM, components={}, perceptual_weight=0.0)


@pytest.mark.parametrize(
  "wrong, named",
  [
    ({"error": "l3"}, "model.error"), ({"adversarial": "wgan"}, "model.adversarial"),
    ({"resolution": 15}, "15 pixels do not divide by 2"), ({"groups": 3}, "model.groups=3"),
    ({"attention_levels": (2,)}, "model.attention_levels"), ({"kl_weight": -1.0}, "kl_weight=-1"),
    ({"discriminator_layers": 3}, "lower model.discriminator_layers"),
    ({"components": {"perceptual": SYSTEM}}, "components.perceptual needs .* Perceptual"),
    ({"components": {"percetual": NETWORK}}, "unknown component .*'percetual'.*'perceptual'"),
  ],
)
def test_wrong_settings_are_named(wrong, named):
  with pytest.raises(UserError, match=named):
    dataclasses.replace(SYSTEM, **wrong)
