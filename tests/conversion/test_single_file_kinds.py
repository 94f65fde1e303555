"""What whole models in one file are told by, and latent diffusion's text encoder in such a file."""

import jax
import numpy as np
import pytest

from t2i_jax import convert
from t2i_jax.conversion import text
from t2i_jax.errors import UserError
from t2i_jax.text import bert
from t2i_jax.weights.safetensors_file import write_safetensors
from t2i_jax.weights.stored import Stored
from t2i_jax.weights.text_encoders import ldm_text_map

ONE = ((1,), np.dtype("f4"), lambda: np.zeros(1, "f4"))


@pytest.mark.parametrize("name, message", [
  ("conditioner.embedders.0.model.ln_final.bias", "holds Stable Diffusion XL's refiner"),
  ("cond_stage_model.embedding.weight", "holds latent diffusion by labels"),
  ("first_stage_model.quantize.embedding.weight", "in the codes of a VQ-GAN"),
  ("cond_stage_model.other.weight", "its text encoders are neither cond_stage_model.transformer."),
  ("cond_stage_model.transformer.attn_layers.x", "folder of BERT's (bert-base-uncased) with"),
  ("cond_stage_model.transformer.text_model.x", "folder of CLIP's with --tokenizer"),
])  # fmt: skip
def test_files_of_other_models_are_named_in_one_line(tmp_path, capfd, name, message):
  path = tmp_path / "model.safetensors"
  write_safetensors(path, {"model.diffusion_model.input_blocks.0.0.weight": ONE, name: ONE})
  with pytest.raises(SystemExit):
    convert.main([f"--source={path}", f"--output={tmp_path / 'new'}"])
  (line,) = capfd.readouterr().err.splitlines()
  assert message in line and not (tmp_path / "new").exists()


def test_latent_diffusion_s_text_encoder_by_its_authors_names():
  """With the authors' own module at random weights, run outside this suite, features differed by
  8e-7 of the largest value."""
  config = bert.LDMConfig(width=24, layers=2, heads=3, head_size=64, mlp=40, vocab_size=9, length=5)
  shapes = jax.eval_shape(
    bert.LDMTransformer(config).init, jax.random.key(0), np.zeros((1, 5), int)
  )["params"]
  random = np.random.default_rng(0)
  params = jax.tree.map(lambda x: np.asarray(random.normal(size=x.shape), "f4"), shapes)
  tensors = {name: Stored(*parts) for name, parts in ldm_text_map(2).save(params).items()}
  second = tensors["attn_layers.layers.3.1.net.0.0.weight"].read()
  np.testing.assert_array_equal(second, params["layers_1"]["mlp_in"]["kernel"].T)
  encoder = text.ldm(tensors, "it")
  assert bert.LDMConfig.from_diffusers(encoder.published) == config
  again = encoder.names.load(tensors, shapes, source="it")
  assert jax.tree.all(jax.tree.map(np.array_equal, again, params))
  del tensors["token_emb.weight"]
  with pytest.raises(UserError, match="no text encoder of latent diffusion: token_emb.weight"):
    text.ldm(tensors, "it")
